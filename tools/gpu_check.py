#!/usr/bin/env python
"""Does mmdist run well on this card? Everything that can be asked, the best first.

    python tools/gpu_check.py --out gpu_check

Seven stages, each in processes of its own with a time limit of its own, so that an
error on the GPU takes nothing else with it. What is found is written at once to
`gpu_check.json` and the page `gpu_check.md`; what the stages print goes to
`gpu_check.log`. Stages 1 to 4 need torch, Triton and mmengine alone, 5 to 7 mmcv with
its compiled ops, mmdet and mmseg. Without a GPU, what needs one is skipped and says so.
docs/gpu.md explains the stages. This file needs the standard library only.
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
PAIRS = (
    *('DeepLabV3', 'RetinaNet R50 <- R101', 'Faster R-CNN', 'SegFormer', 'DINO'),
    *('RetinaNet R50 <- Cascade', 'RetinaNet R50 <- DINO'),
)


class Part(NamedTuple):
    """What runs in one process: its name, and its time limit in seconds."""

    name: str
    limit: float


class Stage(NamedTuple):
    title: str
    parts: list[Part]


STAGES = {
    1: Stage('Card, driver and versions', [Part('machine', 90)]),
    2: Stage(
        'The kernels against the formula in float64',
        [
            Part('hard scores', 240),
            Part('types and sizes', 240),
            Part('layouts and masks', 180),
            Part('bad teacher', 90),
        ],
    ),
    3: Stage('Speed and memory of the loss', [Part('loss', 180)]),
    4: Stage('The loss never waits for the GPU', [Part('waits', 90)]),
    5: Stage(
        'A training step',
        [Part(pair, 120) for pair in PAIRS]
        + [Part(f'{pair}, compiled', 240) for pair in PAIRS],
    ),
    6: Stage(
        'Training',
        [Part('AMP, EMA, resume', 180), Part('NCCL, SyncBN', 180)]
        + [Part('quickstart', 420)],
    ),
    7: Stage('The study at full size', [Part('study', 24 * 3600)]),
}
# how a part ended, the worst last
STATUS = ('skipped', 'passed', 'goal missed', 'stopped', 'timed out', 'failed')
BAD = ('timed out', 'failed')


def stage_numbers(text: str) -> list[int]:
    """'1-4,6' -> [1, 2, 3, 4, 6]."""
    numbers = set()
    for piece in text.split(','):
        found = re.fullmatch(r'([1-7])(?:-([1-7]))?', piece.strip())
        if not found:
            raise argparse.ArgumentTypeError(
                f'{text!r} names no stages; they are 1 to 7, e.g. 1-4 or 1,3,5-7'
            )
        first, last = int(found[1]), int(found[2] or found[1])
        numbers.update(range(first, last + 1))
    return sorted(numbers)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--stages', type=stage_numbers, default=[*STAGES], help='1-4')
    parser.add_argument(
        '--out',
        type=Path,
        default=Path('gpu_check'),
        help='folder of the results; other stages that are there stay (%(default)s)',
    )
    parser.add_argument(
        '--minutes',
        type=float,
        default=float('inf'),
        help='time for all stages; the study takes what is left of it',
    )
    parser.add_argument(
        '--small',
        action='store_true',
        help='tiny sizes: without a GPU, try stages 3, 5 and 6 on the CPU',
    )
    parser.add_argument('--data-root', type=Path, help='of the study, see its --help')
    parser.add_argument('--weights', type=Path, help='of the study, see its --help')
    return parser.parse_args(argv)


class Results:
    """All that is known so far, on the disk at any time."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.file = out / 'gpu_check.json'
        self.stages: dict[str, dict] = {}
        if self.file.exists():
            self.stages = json.loads(self.file.read_text())['stages']

    def begin(self, number: int) -> None:
        self.stages[str(number)] = dict(title=STAGES[number].title, parts={}, rows=[])

    def part(self, number: int, name: str, **what) -> None:
        self.stages[str(number)]['parts'].setdefault(name, {}).update(what)
        self.save()

    def row(self, number: int, row: dict) -> None:
        """Add a row; one of the same table and name is replaced."""
        rows = self.stages[str(number)]['rows']
        key = row['table'], row['name']
        rows[:] = [x for x in rows if (x['table'], x['name']) != key] + [row]
        self.save()

    def save(self) -> None:
        self.stages = dict(sorted(self.stages.items()))
        for file, text in (
            (self.file, json.dumps(dict(stages=self.stages), indent=1)),
            (self.file.with_suffix('.md'), page(self.stages)),
        ):
            new = file.with_name(f'{file.name}.new')
            new.write_text(text)
            new.replace(file)


def goals_of(row: dict) -> list[dict]:
    return [x for x in row['cells'].values() if isinstance(x, dict)]


def status_of(part: dict, rows: list[dict]) -> str:
    """How a part that came to its end went, by its rows."""
    goals = [goal for row in rows for goal in goals_of(row)]
    if not all(goal['met'] for goal in goals if 'goal' not in goal):
        return 'failed'  # what has no number to reach is right or wrong
    if not all(goal['met'] for goal in goals):
        return 'goal missed'
    return 'skipped' if 'skipped' in part else 'passed'


def cell(value) -> str:
    """A value as the page shows it."""
    if isinstance(value, dict):
        verdict = 'pass' if value['met'] else '**miss**'
        shown = cell(value['value'])
        if 'goal' not in value:
            right = 'ok' if value['met'] else '**wrong**'
            return f'{shown}, {right}' if shown else right
        return f'{shown} ({value["goal"]}), {verdict}'
    if isinstance(value, float):
        return f'{value:.3g}' if abs(value) < 1000 else f'{value:.0f}'
    return str(value).replace('|', '\\|').replace('\n', ' ')


def page(stages: dict[str, dict]) -> str:
    """The results as Markdown."""
    lines = ['# mmdist on this machine', '', 'Written by `tools/gpu_check.py`.', '']
    for number, stage in stages.items():
        lines += [f'## {number}. {stage["title"]}', '']
        for name, part in stage['parts'].items():
            note = part.get('skipped') or part.get('error', '')
            seconds = f', {part["seconds"]:.0f} s' if 'seconds' in part else ''
            note = f': {cell(note)}' if note else ''
            lines.append(f'- {name}: **{part["status"]}**{seconds}{note}')
        for table in dict.fromkeys(row['table'] for row in stage['rows']):
            rows = [row for row in stage['rows'] if row['table'] == table]
            head = dict.fromkeys(key for row in rows for key in row['cells'])
            lines += ['', '| ' + ' | '.join([table, *head]) + ' |']
            lines.append('| ' + ' | '.join(['---'] * (1 + len(head))) + ' |')
            for row in rows:
                cells = [cell(row['cells'].get(key, '')) for key in head]
                lines.append('| ' + ' | '.join([cell(row['name']), *cells]) + ' |')
        lines.append('')
    return '\n'.join(lines)


def run_part(
    number: int, part: Part, results: Results, args: argparse.Namespace, left: float
) -> str:
    """Run a part in a process of its own; returns how it ended."""
    work = Path(tempfile.mkdtemp(prefix='gpu_check-'))
    read, write = os.pipe()
    command = [sys.executable, '-m', 'tools.gpu', str(number), part.name]
    command += ['--results', str(write), '--work', str(work)]
    # a CPU is slower by more than small sizes save
    limit = min(part.limit * (5 if args.small else 1), left)
    command += ['--seconds', str(limit), '--out', str(args.out.resolve())]
    command += ['--small'] * args.small
    for name in ('data_root', 'weights'):
        if getattr(args, name):
            path = getattr(args, name).resolve()
            command += [f'--{name.replace("_", "-")}', str(path)]
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get('PYTHONPATH')]))
    environment = {**os.environ, 'PYTHONPATH': path, 'PYTHONUNBUFFERED': '1'}
    if args.small:
        environment.setdefault('OMP_NUM_THREADS', '1')
    start = time.time()
    rows: list[dict] = []
    ended = ''
    results.part(number, part.name, status='stopped')  # until it is known better
    with (args.out / 'gpu_check.log').open('a') as log:
        log.write(f'\n===== {number}. {STAGES[number].title}: {part.name}\n')
        log.flush()
        began_at = log.tell()
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            pass_fds=[write],
            start_new_session=True,  # ends with all that it started
        )
        os.close(write)
        said: queue.Queue = queue.Queue()
        reader = threading.Thread(target=read_lines, args=(read, said), daemon=True)
        reader.start()
        try:
            while True:
                try:
                    line = said.get(timeout=max(0.0, start + limit - time.time()))
                except queue.Empty:
                    ended = 'timed out'
                    break
                if line is None:
                    process.wait()
                    break
                if 'skipped' in line:
                    results.part(number, part.name, **line)
                else:
                    rows.append(line)
                    results.row(number, line)
                    say(line)
        finally:
            end(process)
    known = results.stages[str(number)]['parts'][part.name]
    extra = {}
    if ended == 'timed out':
        extra['error'] = f'not finished within {limit:.0f} s'
    elif process.returncode:
        ended = 'failed'
        extra['error'] = last_words(args.out / 'gpu_check.log', began_at)
    status = ended or status_of(known, rows)
    results.part(number, part.name, status=status, seconds=time.time() - start, **extra)
    shutil.rmtree(work, ignore_errors=True)
    return status


def read_lines(pipe: int, said: queue.Queue) -> None:
    """Hand on what a part reports, line by line, and None at its end."""
    with os.fdopen(pipe) as lines:
        for line in lines:
            said.put(json.loads(line))
    said.put(None)


def say(row: dict) -> None:
    """Print a row, unless it only says that all is well."""
    cells = row['cells'].values()
    if all(isinstance(x, dict) and 'goal' not in x and x['met'] for x in cells):
        return
    text = ', '.join(f'{key}: {cell(value)}' for key, value in row['cells'].items())
    print(f'  {row["table"]}: {row["name"]}: {text}', flush=True)


def end(process: subprocess.Popen) -> None:
    """End a process and all that it started."""
    # torchrun's workers have a session of their own, and end when it is asked to
    for number, patience in ((signal.SIGTERM, 10), (signal.SIGKILL, 30)):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            break
        try:
            process.wait(patience)
        except subprocess.TimeoutExpired:
            continue
    process.wait()


def last_words(log: Path, position: int) -> str:
    """The last line that a part printed."""
    with log.open(errors='replace') as file:
        file.seek(position)
        lines = [line.strip() for line in file if line.strip()]
    return lines[-1][:300] if lines else 'it printed nothing'


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # ends the part that runs
    results = Results(args.out)
    deadline = time.time() + 60 * args.minutes
    worst = 'skipped'
    for number in args.stages:
        results.begin(number)
        for part in STAGES[number].parts:
            print(f'{number}. {STAGES[number].title}: {part.name}', flush=True)
            left = deadline - time.time()
            if left < 5:
                reason = dict(skipped=f'the {args.minutes:g} minutes were over')
                results.part(number, part.name, status='skipped', **reason)
            else:
                run_part(number, part, results, args, left)
            known = results.stages[str(number)]['parts'][part.name]
            note = known.get('skipped') or known.get('error', '')
            print(f'  {known["status"]}' + (f': {note}' if note else ''), flush=True)
            worst = max(worst, known['status'], key=STATUS.index)
    print(f'{results.file.with_suffix(".md")}: {worst}')
    return int(worst in BAD)


if __name__ == '__main__':
    sys.exit(main())
