"""Train the grid of the study and write it up.

    python -m study --tasks camvid --methods alone published default --budget 60

A cell of the grid is a task, a method, a teacher and a seed. Each is trained by
`tools/train.py` from the configs of `study/configs/<task>`, one process at a time. A
finished cell is skipped as long as its settings and its teacher are the same; a stopped
one continues from its last checkpoint. Each finished cell is a line of `results.jsonl`;
tables and a plot of all cells go into `results.md` and `results.png`.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import time
from pathlib import Path

from tools.dev import runs

from .grid import METHODS, SINGLE, TASKS, TEACHERS, grid
from .report import read_results, write_up
from .runs import WEIGHTS, Study

ROOT = Path(__file__).resolve().parents[1]


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog='python -m study',
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add('--tasks', nargs='+', default=['camvid'], choices=list(TASKS))
    text, names = f'of {", ".join(METHODS)} (default: all)', ('teacher', *METHODS)
    options = dict(default=list(METHODS), choices=names, metavar='METHOD')
    add('--methods', nargs='+', help=text, **options)
    add('--teachers', nargs='+', default=['strong'], choices=TEACHERS)
    add('--seeds', nargs='+', type=int, default=[0, 1, 2])
    text = 'full: usual sizes and schedules, for a GPU'
    add('--scale', default='small', choices=('small', 'full'), help=text)
    text = 'stop then; what is unfinished goes on when this is run again'
    add('--budget', type=float, metavar='MINUTES', help=text)
    text = 'score the finished cells of this grid on the test images as well'
    add('--test', action='store_true', help=text)
    text = 'the folder that holds camvid and bccd (default: data)'
    add('--data-root', type=Path, default=Path('data'), help=text)
    add('--weights', type=Path, help=f'a copy of {WEIGHTS} (default: downloaded)')
    add('--work-dir', type=Path, default=Path('work_dirs/study'))
    text = 'where results.jsonl, results.md and results.png are (default: docs)'
    add('--out', type=Path, default=ROOT / 'docs', help=text)
    args = parser.parse_args(argv)
    for path in (args.data_root, args.weights):
        if path is not None and not path.exists():
            parser.error(f'there is no {path}')
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # ends the running tool
    start = time.time()
    deadline = start + 60 * args.budget if args.budget else float('inf')
    study = Study(
        args.work_dir.resolve(),
        args.data_root.resolve(),
        args.weights and args.weights.resolve(),
    )
    file = args.out / 'results.jsonl'
    args.out.mkdir(parents=True, exist_ok=True)
    grid_ = dict.fromkeys(
        grid(args.scale, args.tasks, args.methods, args.teachers, args.seeds)
    )
    if not grid_:
        raise SystemExit(f'{args.tasks} have no teacher of {args.teachers}.')
    for number, cell in enumerate(grid_, 1):
        title = f'[{number}/{len(grid_)}] {cell.folder}'
        result = study.finished(cell)
        if result is None:
            print(f'{title}: trains, {(time.time() - start) / 60:.0f} min', flush=True)
            result = study.train(cell, deadline)
        wanted = args.test and TASKS[cell.task].has_test
        if result is not None and wanted and 'test' not in result:
            score = study.test(cell, deadline)
            if score is not None:
                result['test'] = score
                runs.save_result(study.folder(cell), result)
        if result is None:
            print(f'{title}: time is up; run this again to go on', flush=True)
            break
        label = TASKS[cell.task].label
        print(f'{title}: {label} {result["score"]:.2f}', flush=True)
        row = {**cell._asdict(), **result, 'command': cell.command}
        if cell.method not in SINGLE:
            # tells which teacher: on another CPU model the same settings give another
            scores = [study.finished(teacher)['score'] for teacher in cell.its_teachers]
            row['teacher_score'] = max(scores)
        if read_results(file).get(cell) != row:
            with file.open('a') as lines:
                lines.write(json.dumps(row) + '\n')
    print(write_up(args.out))


if __name__ == '__main__':
    main()
