"""`python -m benchmarks`: measure, print, and write docs/benchmarks.md."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import torch

from benchmarks import loss, measure, step, teacher

PARTS = ['loss', 'growth', 'step', 'teacher', 'gpu']
PAGE = Path(__file__).parent.parent / 'docs' / 'benchmarks.md'
INTRODUCTION = """# Benchmarks

Written by `make bench` (`python -m benchmarks`). Contestants run in turns in one
process; times are the minima of their runs. Compare the ratios, not the times, across
machines, and only roughly: for the loss two cores of an AMD EPYC had 8.1x, 3.1x, 7.5x
and 1.1x, two of an Intel Xeon (Sapphire Rapids) 5.6x, 2.6x, 4.7x and 1.0x. The same
machine differs too, as its neighbours come and go: four runs on the EPYC had geometric
means of 3.5x, 3.5x, 3.7x and 3.8x. A goal that was not reached says **missed**.
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
        'teacher': lambda: teacher.options(args.seconds),
        'gpu': lambda: loss.speed(args.seconds, 'cuda'),
    }
    titles = {
        'loss': f'## The loss alone\n\n{LOSS}',
        'growth': f'## Growth\n\n{GROWTH}',
        'step': f'## A training step\n\n{step.__doc__}',
        'teacher': f'## Options of the teacher\n\n{teacher.__doc__}',
        'gpu': f'## On a GPU\n\n{GPU}',
    }
    for part in args.parts:
        where = f'Machine: {measure.machine()}'
        sections = read_sections(args.output)
        sections[part] = f'{titles[part]}\n{where}\n\n{measured[part]()}'
        if 'Machine: ' not in sections.get('gpu', ''):
            sections['gpu'] = f'{titles["gpu"]}\n{NOT_MEASURED}'
        text = [INTRODUCTION]
        text += [
            f'<!-- {k} -->\n{sections[k].strip()}\n' for k in titles if k in sections
        ]
        args.output.write_text('\n'.join(text))
    print(args.output.read_text())


def read_sections(page: Path) -> dict[str, str]:
    """Parts of the page that was written before."""
    if not page.exists():
        return {}
    parts = re.split(r'<!-- (\w+) -->\n', page.read_text())
    return dict(zip(parts[1::2], parts[2::2], strict=True))


LOSS = """Forward and backward. *Textbook* is the formula as the paper prints it, in
eager PyTorch (`benchmarks/textbook.py`, checked to be the same function). The *fast
path* is what `DISTLoss` takes on a CPU, the *plain path* is the reference. The
*floor* is the time to read both inputs twice and to write one gradient, at the speed
of a copy of the same tensor into memory that is there already. A gradient is a new
tensor, and the system hands out its memory page by page at the first write: *new
gradient* is the time to fill one, which no loss can do without. *Peak* is the memory
of all tensors that live at once beyond the inputs, the gradient included, in sizes of
the gradient.
"""
GROWTH = """Forward and backward of the fast path, softmax. A straight line has the same
time per logit and the same share of memory everywhere. Small inputs pay for the calls,
and keep their scores between the two passes.
"""
GPU = """The same on a GPU, also for logits in bf16: the textbook formula computes
in bf16, `DISTLoss` reads them as they are and computes in fp32. *Peak* is what all
tensors take at once. The *fast path* is Triton kernels (`mmdist/losses/fused_gpu.py`),
the *plain path* is taken where they do not run.
"""
NOT_MEASURED = """**Not measured: no GPU was at hand.**

| goal | |
| --- | --- |
| 8x faster than the textbook formula, in the geometric mean | not measured |
| within 2x of the floor, the time of a copy of as many bytes | not measured |
| no waiting for the device | counted on a CPU, not seen on a GPU |

What is known without one: interpreted on a CPU, the kernels pass the tests of the loss,
agree with float64 as closely as is asked of the fast path of the CPU, and do nothing
that waits for the device. They compile for compute capability 7.5 to 12.0 with Triton
3.7, and for 8.0 with 3.1, 3.3 and 3.6 too; for 8.0 and 9.0 they read and write sixteen
bytes at a time and in fp32 keep next to everything in registers. As long as the cache
holds the tiles that are worked on, they read both inputs twice and write one gradient,
which is the floor; what else they write and read comes to 8 % of it at each of the
three large shapes (counted, in fp32). A whole step of DeepLabV3, RetinaNet and Faster
R-CNN pairs waits as often as the student's own step and the teacher's layers do
(`tests/comparisons/test_no_waiting.py`).

Before `DISTLoss` takes the kernels on a machine it compares them with the plain path
there, once, and stays with that if they do not run or compute something else.
"""

if __name__ == '__main__':
    main()
