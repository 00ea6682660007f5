"""Check how well mmdist runs on this card, the most valuable checks first.

    python -m tools.dev.gpu_check --out gpu_check

Six stages of commands, each with a time limit and a process group of its own, so that
an error on the GPU takes nothing else with it. After each command the page
`gpu_check.md` is written; what the commands print goes to `gpu_check.log`. Stages 1 to
3 need torch, Triton, mmengine and pytest; 4 to 6 also mmcv with its compiled ops, mmdet
and mmseg. Without a GPU, what needs one is skipped. docs/gpu.md explains the stages.
This file needs only the standard library.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from tools.check_env import RUN_OPS

ROOT = Path(__file__).resolve().parents[2]
PAIRS = (
    'DeepLabV3', 'RetinaNet R50 <- R101', 'Faster R-CNN', 'SegFormer', 'DINO',
    'RetinaNet R50 <- Cascade', 'RetinaNet R50 <- DINO',
)  # fmt: skip
TITLES = {
    1: 'Card, driver and versions',
    2: 'The kernels against the formula in float64',
    3: 'Speed and memory of the loss',
    4: 'A training step',
    5: 'Training',
    6: 'The study at full size',
}
NEEDS = {
    'gpu': 'import torch\nassert torch.cuda.is_available(), "torch finds no GPU"',
    'models': f'import mmdet, mmseg, scipy, pycocotools\n{RUN_OPS}',
}
# how a part ended, the worst last
STATUS = ('skipped', 'passed', 'goal missed', 'stopped', 'timed out', 'failed')
SHOWN = 80  # lines of a part's output, in addition to its tables


class Part(NamedTuple):
    """A command of a stage, run by this Python; its time limit is in seconds."""

    stage: int
    name: str
    limit: float
    command: list[str]
    needs: tuple[str, ...] = ('gpu', 'models')


def parts_of(args: argparse.Namespace) -> list[Part]:
    pytest = ['-m', 'pytest', '-p', 'no:cacheprovider', '--rootdir', str(ROOT)]
    # other files in tests/losses build from the registry, which needs the models
    names = ('losses/test_correlations_gpu.py', 'test_gpu.py')
    tests = [str(ROOT / 'tests' / name) for name in names]
    out, step = args.out.resolve(), ['-m', 'benchmarks.gpu_step']
    speed = ['-m', 'benchmarks', 'gpu', '--seconds', '2', '--output', f'{out}/loss.md']
    training = [*pytest, tests[1], '-k', 'training']
    study = ['-m', 'study', '--scale', 'full', '--methods', 'alone', 'kl', 'default']
    study += ['--out', str(out / 'study')]
    for name, path in (('--data-root', args.data_root), ('--weights', args.weights)):
        study += [name, str(path.resolve())] if path else []
    return [
        Part(1, 'machine', 90, ['-m', 'torch.utils.collect_env'], ()),
        Part(2, 'loss', 900, [*pytest, *tests, '-k', 'not training'], ('gpu',)),
        Part(3, 'loss', 240, speed, ('gpu',)),
        *(Part(4, pair, 120, [*step, pair]) for pair in PAIRS),
        *(Part(4, f'{x}, compiled', 240, [*step, x, '--compiled']) for x in PAIRS),
        Part(5, 'AMP, EMA, resume; SyncBN', 400, training),
        Part(5, 'quickstart', 420, ['-m', 'tools.dev.quickstart']),
        *([Part(6, 'study', 24 * 3600, study)] if args.data_root else []),
    ]


def stage_numbers(text: str) -> list[int]:
    """'1-4,6' -> [1, 2, 3, 4, 6]."""
    if not re.fullmatch(r'[1-6](-[1-6])?(, ?[1-6](-[1-6])?)*', text):
        raise argparse.ArgumentTypeError(
            f'{text!r} names no stages; they are 1 to 6, e.g. 1-3 or 1,4-6'
        )
    ends = [[int(x) for x in piece.split('-')] for piece in text.split(',')]
    return sorted({n for piece in ends for n in range(piece[0], piece[-1] + 1)})


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add('--stages', type=stage_numbers, default=[*TITLES], help='e.g. 1-3')
    text = 'folder of the results; those of other stages stay (%(default)s)'
    add('--out', type=Path, default=Path('gpu_check'), help=text)
    text = 'time for all stages; the study takes what is left of it'
    add('--minutes', type=float, default=float('inf'), help=text)
    add('--data-root', type=Path, help='of the study, see its --help')
    add('--weights', type=Path, help='of the study, see its --help')
    return parser.parse_args(argv)


def joined(*folders: object) -> str:
    """A search path of these folders; empty ones do not count."""
    return os.pathsep.join(map(str, filter(None, folders)))


def environment() -> dict[str, str]:
    path = joined(ROOT, os.environ.get('PYTHONPATH'))
    return os.environ | {'PYTHONPATH': path, 'PYTHONUNBUFFERED': '1'}


@functools.cache
def lacking(need: str) -> str:
    """'' if this machine has what is needed; otherwise the last line of the error."""
    command = [sys.executable, '-c', NEEDS[need]]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True)
    if done.returncode == 0:
        return ''
    return (done.stderr.strip().splitlines() or ['it ended without a word'])[-1]


def report(
    out: Path, part: Part, status: str, seconds: float = 0, output: str = ''
) -> None:
    """Replace a part's section: its tables and the end of its output. Then write the
    page of all sections, those of earlier runs included."""
    lines = [x for x in output.splitlines() if x.strip()]
    tables = [x for x in lines if x.startswith('| ')]
    others = [x for x in lines if not x.startswith('| ')][-SHOWN:]
    text = f'{part.name}: **{status}**' + (f', {seconds:.0f} s' if seconds else '')
    text += '\n'.join(['\n', *tables]) if tables else ''
    text += '\n'.join(['\n', '```text', *others, '```']) if others else ''
    sections = out / 'sections'
    sections.mkdir(exist_ok=True)
    (sections / f'{part.stage}. {part.name}.md').write_text(text)
    page = ['# mmdist on this machine']
    for number, title in TITLES.items():
        files = sorted(sections.glob(f'{number}. *.md'))
        page += [f'## {number}. {title}'] if files else []
        page += [file.read_text() for file in files]
    (out / 'gpu_check.md').write_text('\n\n'.join(page) + '\n')


def run_part(part: Part, limit: float, log: Path) -> tuple[str, str]:
    """Run a part in its own process group; return its status and its output."""
    command, status = [sys.executable, *part.command], ''
    if part.name == 'study':
        command += ['--budget', f'{(limit - 30) / 60:.2f}']
    folder = tempfile.TemporaryDirectory('gpu_check', ignore_cleanup_errors=True)
    with folder as work, log.open('a') as file:
        file.write(f'\n===== {part.stage}. {TITLES[part.stage]}: {part.name}\n')
        file.flush()
        start = file.tell()
        options = dict(stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT)
        options |= dict(cwd=work, env=environment(), start_new_session=True)
        process = subprocess.Popen(command, **options)
        try:
            process.wait(limit)
        except subprocess.TimeoutExpired:
            status = 'timed out'
        finally:
            end(process)
    output = log.read_bytes()[start:].decode(errors='replace')[-20_000:]
    if not status:
        passed = 'goal missed' if '**missed**' in output else 'passed'
        status = 'failed' if process.returncode else passed
    return status, output


def end(process: subprocess.Popen) -> None:
    """End a process and all that it started."""
    # torchrun's workers have their own session, and end when torchrun is terminated
    for number, patience in ((signal.SIGTERM, 10), (signal.SIGKILL, 30)):
        with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
            os.killpg(process.pid, number)
            process.wait(patience)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # ends the part that runs
    worst, deadline = 'skipped', time.time() + 60 * args.minutes
    for part in parts_of(args):
        if part.stage not in args.stages:
            continue
        print(f'{part.stage}. {TITLES[part.stage]}: {part.name}', flush=True)
        reason = next(filter(None, map(lacking, part.needs)), '')
        start = time.time()
        if deadline - start < 5:
            reason = f'the {args.minutes:g} minutes were over'
        if reason:
            status = 'skipped'
            report(args.out, part, status, output=reason)
        else:
            report(args.out, part, 'stopped')  # until it has ended
            limit = min(part.limit, deadline - start)
            status, output = run_part(part, limit, args.out / 'gpu_check.log')
            report(args.out, part, status, time.time() - start, output)
        print('  ' + ': '.join(filter(None, [status, reason])), flush=True)
        worst = max(worst, status, key=STATUS.index)
    print(f'{args.out / "gpu_check.md"}: {worst}')
    return int(worst in ('timed out', 'failed'))


if __name__ == '__main__':
    sys.exit(main())
