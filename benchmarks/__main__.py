"""`python -m benchmarks`: measure, print, and write docs/benchmarks.md."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import torch

from benchmarks import loss, measure, step, teacher, unlabelled

PARTS = ['loss', 'growth', 'step', 'unlabelled', 'teacher', 'gpu']
PAGE = Path(__file__).parent.parent / 'docs' / 'benchmarks.md'
# of a new page; what stands there above the first part is kept
INTRODUCTION = """# Benchmarks

Written by `make bench` (`python -m benchmarks`). Contestants run in turns in one
process; times are the minima of their runs. Compare the ratios, not the times, across
machines, and only roughly. A goal that was not reached says **missed**.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        'parts',
        nargs='*',
        default=PARTS if torch.cuda.is_available() else PARTS[:-1],
        help=f'{", ".join(PARTS)}; the rest of the page stays as it is',
    )
    parser.add_argument('--threads', type=int, default=2)
    parser.add_argument(
        '--seconds', type=float, default=10, help='time to spend on each comparison'
    )
    parser.add_argument('--output', type=Path, default=PAGE)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    measured = {
        'loss': lambda: loss.speed(args.seconds),
        'growth': lambda: loss.growth(
            args.seconds / 5, args.output.with_name('benchmarks_growth.png')
        ),
        'step': lambda: step.steps(args.seconds),
        'unlabelled': lambda: unlabelled.steps(args.seconds),
        'teacher': lambda: teacher.options(args.seconds),
        'gpu': lambda: loss.speed(args.seconds, 'cuda'),
    }
    titles = {
        'loss': f'## The loss alone\n\n{LOSS}',
        'growth': f'## Growth\n\n{GROWTH}',
        'step': f'## A training step\n\n{step.__doc__}',
        'unlabelled': f'## Half the batch unlabelled\n\n{unlabelled.__doc__}',
        'teacher': f'## Options of the teacher\n\n{teacher.__doc__}',
        'gpu': f'## On a GPU\n\n{GPU}',
    }
    for part in args.parts:
        where = f'Machine: {measure.machine()}'
        introduction, sections = read_page(args.output)
        sections[part] = f'{titles[part]}\n{where}\n\n{measured[part]()}'
        sections.setdefault('gpu', f'{titles["gpu"]}\nNot measured.')
        text = [introduction]
        text += [
            f'<!-- {k} -->\n{sections[k].strip()}\n' for k in titles if k in sections
        ]
        args.output.write_text('\n'.join(text))
    print(args.output.read_text())


def read_page(page: Path) -> tuple[str, dict[str, str]]:
    """Introduction and parts of the page that was written before."""
    if not page.exists():
        return INTRODUCTION, {}
    introduction, *parts = re.split(r'<!-- (\w+) -->\n', page.read_text())
    return introduction.strip() + '\n', dict(zip(parts[::2], parts[1::2], strict=True))


LOSS = """Forward and backward. *Textbook* is the formula as the paper prints it, in
eager PyTorch (`benchmarks/textbook.py`, checked to be the same function). The *fast
path* is what `DISTLoss` takes on a CPU, the *plain path* is the reference. The
*floor* is the time to read both inputs twice and to write one gradient, at the speed
of a copy of the same tensor into memory that is there already. A gradient is a new
tensor, and the system hands out its memory page by page at the first write: *new
gradient* is the time to fill one, which no loss can do without. *Peak* is the memory
of all tensors that live at once beyond the inputs, the gradient included, in sizes of
the gradient.

Small logits take a millisecond or two, nearly all of it the cost of the calls. The
formula compiled by `torch.compile` needs about two thirds of that for (1024, 81), but
15 to 80 seconds and a C++ compiler before the first step, for each shape. So it is not
used.
"""
GROWTH = """Forward and backward of the fast path, softmax. A straight line has the same
time per logit and the same share of memory everywhere. Small inputs pay for the calls,
and keep their scores between the two passes.
"""
GPU = """The same on a GPU, also for logits in bf16: the textbook formula computes
in bf16, `DISTLoss` reads them as they are and computes in fp32. *Peak* is what all
tensors take at once. The *fast path* is Triton kernels
(`mmdist/losses/correlations/gpu.py`), the *plain path* is taken where they do not run.
"""
if __name__ == '__main__':
    main()
