"""`python -m benchmarks`: measure, print, and write docs/benchmarks.md."""

from __future__ import annotations

import argparse
import importlib
import re
from pathlib import Path

import torch

from benchmarks import loss, measure

PAGE = Path(__file__).parent.parent / 'docs' / 'benchmarks.md'
# for a new page; the text above the first part of an old page is kept
INTRODUCTION = """# Benchmarks

Written by `make bench` (`python -m benchmarks`). Contestants run in turns in one
process; times are the minima of their runs. Compare the ratios, not the times, across
machines, and only roughly. A goal that was not reached says **missed**.
"""
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
TITLES = {
    'loss': 'The loss alone',
    'growth': 'Growth',
    'step': 'A training step',
    'unlabelled': 'Half the batch unlabelled',
    'stored': 'A stored teacher',
    'stability': 'Where the student alone trains',
    'teacher': 'Options of the teacher',
    'gpu': 'On a GPU',
}


def measured(part: str, seconds: float, page: Path) -> tuple[str, str]:
    """The text of a part, and its measurements."""
    if part == 'loss':
        return LOSS, loss.speed(seconds)
    if part == 'gpu':
        return GPU, loss.speed(seconds, 'cuda')
    if part == 'growth':
        plot = page.with_name('benchmarks_growth.png')
        return GROWTH, loss.growth(seconds / 5, plot)
    # the loss needs torch and mmengine, these also need the models
    module = importlib.import_module(f'benchmarks.{part}')
    return module.__doc__, module.steps(seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parts = list(TITLES)
    parser.add_argument(
        'parts',
        nargs='*',
        default=parts if torch.cuda.is_available() else parts[:-1],
        help=f'{", ".join(parts)}; the rest of the page stays as it is',
    )
    parser.add_argument('--threads', type=int, default=2)
    parser.add_argument(
        '--seconds', type=float, default=10, help='time to spend on each comparison'
    )
    parser.add_argument('--output', type=Path, default=PAGE)
    args = parser.parse_args()
    unknown = ', '.join({*args.parts} - {*parts})
    if unknown:
        parser.error(f'no such part: {unknown}; there are {", ".join(parts)}')
    torch.set_num_threads(args.threads)
    for part in args.parts:
        where = f'Machine: {measure.machine()}'
        about, result = measured(part, args.seconds, args.output)
        introduction, sections = read_page(args.output)
        sections[part] = f'## {TITLES[part]}\n\n{about}\n{where}\n\n{result}'
        sections.setdefault('gpu', f'## {TITLES["gpu"]}\n\n{GPU}\nNot measured.')
        text = [introduction]
        text += [
            f'<!-- {k} -->\n{sections[k].strip()}\n' for k in TITLES if k in sections
        ]
        args.output.write_text('\n'.join(text))
    print(args.output.read_text())


def read_page(page: Path) -> tuple[str, dict[str, str]]:
    """Introduction and parts of the existing page."""
    if not page.exists():
        return INTRODUCTION, {}
    introduction, *parts = re.split(r'<!-- (\w+) -->\n', page.read_text())
    return introduction.strip() + '\n', dict(zip(parts[::2], parts[1::2], strict=True))


if __name__ == '__main__':
    main()
