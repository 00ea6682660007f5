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
import functools
import json
import os
import re
import shutil
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
    speed = ['-m', 'benchmarks', 'gpu', '--seconds', '2']
    speed += ['--output', str(args.out.resolve() / 'loss.md')]
    step = ['-m', 'benchmarks.gpu_step']
    training = [*pytest, tests[1], '-k', 'training']
    study = ['-m', 'study', '--scale', 'full', '--methods', 'alone', 'kl', 'default']
    study += ['--out', str(args.out.resolve() / 'study')]
    study += ['--data-root', str(args.data_root and args.data_root.resolve())]
    study += ['--weights', str(args.weights.resolve())] if args.weights else []
    return [
        Part(1, 'machine', 90, ['-m', 'torch.utils.collect_env'], ()),
        Part(2, 'loss', 900, [*pytest, *tests, '-k', 'not training'], ('gpu',)),
        Part(3, 'loss', 240, speed, ('gpu',)),
        *(Part(4, pair, 120, [*step, pair]) for pair in PAIRS),
        *(Part(4, f'{x}, compiled', 240, [*step, x, '--compiled']) for x in PAIRS),
        Part(5, 'AMP, EMA, resume; SyncBN', 400, training),
        Part(5, 'quickstart', 420, ['-m', 'tools.dev.quickstart']),
        *[Part(6, 'study', 24 * 3600, study)][: bool(args.data_root)],
    ]


def stage_numbers(text: str) -> list[int]:
    """'1-4,6' -> [1, 2, 3, 4, 6]."""
    numbers = set()
    for piece in text.split(','):
        found = re.fullmatch(r'([1-6])(?:-([1-6]))?', piece.strip())
        if not found:
            raise argparse.ArgumentTypeError(
                f'{text!r} names no stages; they are 1 to 6, e.g. 1-3 or 1,4-6'
            )
        numbers.update(range(int(found[1]), int(found[2] or found[1]) + 1))
    return sorted(numbers)


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


def environment() -> dict[str, str]:
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get('PYTHONPATH')]))
    return {**os.environ, 'PYTHONPATH': path, 'PYTHONUNBUFFERED': '1'}


@functools.cache
def lacking(need: str) -> str:
    """'' if this machine has what is needed; otherwise the last line of the error."""
    command = [sys.executable, '-c', NEEDS[need]]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True)
    if done.returncode == 0:
        return ''
    return (done.stderr.strip().splitlines() or ['it ended without a word'])[-1]


class Results:
    """The results so far, always up to date on disk."""

    def __init__(self, out: Path) -> None:
        self.file = out / 'gpu_check.json'
        self.parts: list[dict] = []
        if self.file.exists():
            self.parts = json.loads(self.file.read_text())

    def set(self, part: Part, status: str, seconds: float = 0, output: str = '') -> str:
        """Replace the result of a part; return its status."""
        key = part.stage, part.name
        new = dict(stage=part.stage, name=part.name, status=status, seconds=seconds)
        new['output'] = output
        others = [x for x in self.parts if (x['stage'], x['name']) != key]
        self.parts = sorted([*others, new], key=lambda x: x['stage'])
        texts = {'.json': json.dumps(self.parts, indent=1), '.md': page(self.parts)}
        for suffix, text in texts.items():
            (self.file.with_suffix('.new')).write_text(text)
            self.file.with_suffix('.new').replace(self.file.with_suffix(suffix))
        return status


def page(parts: list[dict]) -> str:
    """The results as Markdown: for each part, its tables and the end of its output."""
    text = '# mmdist on this machine\n'
    for number, title in TITLES.items():
        of_stage = [part for part in parts if part['stage'] == number]
        text += f'\n## {number}. {title}\n' if of_stage else ''
        for part in of_stage:
            lines = part['output'].splitlines()
            tables = '\n'.join(line for line in lines if line.startswith('| '))
            others = [x for x in lines if x.strip() and not x.startswith('| ')]
            seconds = f', {part["seconds"]:.0f} s' if part['seconds'] else ''
            text += f'\n{part["name"]}: **{part["status"]}**{seconds}\n'
            text += f'\n{tables}\n' if tables else ''
            if others:
                text += '\n'.join(['\n```text', *others[-SHOWN:], '```\n'])
    return text


def run_part(part: Part, results: Results, left: float) -> str:
    """Run a part in its own process group; return its status."""
    limit, start = min(part.limit, left), time.time()
    command = [sys.executable, *part.command]
    if part.name == 'study':
        command += ['--budget', f'{(limit - 30) / 60:.2f}']
    results.set(part, 'stopped')  # until it has ended
    work = tempfile.mkdtemp(prefix='gpu_check-')
    log = results.file.with_suffix('.log')
    with log.open('a') as file:
        file.write(f'\n===== {part.stage}. {TITLES[part.stage]}: {part.name}\n')
        file.flush()
        position, status = file.tell(), ''
        process = subprocess.Popen(
            command,
            cwd=work,
            env=environment(),
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            process.wait(limit)
        except subprocess.TimeoutExpired:
            status = 'timed out'
        finally:
            end(process)
    output = log.read_bytes()[position:].decode(errors='replace')[-20_000:]
    if not status:
        passed = 'goal missed' if '**missed**' in output else 'passed'
        status = 'failed' if process.returncode else passed
    shutil.rmtree(work, ignore_errors=True)
    return results.set(part, status, time.time() - start, output)


def end(process: subprocess.Popen) -> None:
    """End a process and all that it started."""
    # torchrun's workers have their own session, and end when torchrun is terminated
    for number, patience in ((signal.SIGTERM, 10), (signal.SIGKILL, 30)):
        try:
            os.killpg(process.pid, number)
            process.wait(patience)
        except ProcessLookupError:
            break
        except subprocess.TimeoutExpired:
            continue


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # ends the part that runs
    results = Results(args.out)
    deadline = time.time() + 60 * args.minutes
    worst = 'skipped'
    for part in parts_of(args):
        if part.stage not in args.stages:
            continue
        print(f'{part.stage}. {TITLES[part.stage]}: {part.name}', flush=True)
        left = deadline - time.time()
        reason = next(filter(None, map(lacking, part.needs)), '')
        if left < 5:
            reason = f'the {args.minutes:g} minutes were over'
        if reason:
            status = results.set(part, 'skipped', output=reason)
        else:
            status = run_part(part, results, left)
        print('  ' + ': '.join(filter(None, [status, reason])), flush=True)
        worst = max(worst, status, key=STATUS.index)
    print(f'{results.file.with_suffix(".md")}: {worst}')
    return int(worst in ('timed out', 'failed'))


if __name__ == '__main__':
    sys.exit(main())
