"""Distil a small detector and a small segmentor, from nothing, in minutes.

    python -m tools.dev.quickstart [--seeds 0 1 2]

It makes scenes of digits. For detection and for segmentation, it then trains a teacher,
a student alone, a student with KL and a student with DIST, each with `tools/train.py`
from a config of `configs/*/quickstart`, two at a time. KL is a second baseline and is
trained last: report.md and report.png are written as soon as one task lacks only KL,
and again as more is finished. Parts that are finished are skipped in the next run.
"""

from __future__ import annotations

import argparse
import os
import shutil
import time
from collections.abc import Iterable, Iterator
from contextlib import closing, redirect_stderr, redirect_stdout
from typing import NamedTuple

import numpy as np

from tools.dev import runs
from tools.dev.progress import Plan, Progress
from tools.dev.quickstart.report import Finished, write_report
from tools.dev.quickstart.tasks import LAST, PARTS, TASKS, WORK_DIR, Part
from tools.logs import read_log

# make_digits and mm* are imported where they are used: what they print on import goes
# into the log

REPORT_SECONDS = 20


class State(NamedTuple):
    """Progress of a training."""

    text: str
    left: float  # seconds
    pace: float  # this machine's time over the expected time


def train(part: Part, smoke: bool, pace: float, progress: Progress) -> Iterator[State]:
    """Train one part in its own process; yield its progress while it runs."""
    from mmengine.config import Config

    from mmdist.checkpoint import load_checkpoint

    task, name, seed = part
    options = {'randomness.seed': seed, **(task.smoke if smoke else {})}
    folder = task.folder(name, seed)
    # short: one line shows two of them
    title = f'{task.name} {name.removeprefix("student ")}'
    title += f' seed {seed}' if seed else ''
    plan = Plan({name: 20 if smoke else part.seconds})
    plan.pace = pace
    plan.begin(name)
    mark = part.fingerprint(options)
    if runs.finished(folder, mark):
        progress.done(f'{title}: finished before, {folder}')
        return
    shutil.rmtree(folder, ignore_errors=True)  # interrupted, or outdated
    folder.mkdir(parents=True)
    arguments = [task.config(name), '--work-dir', folder, '--cfg-options']
    arguments += [f'{key}={value}' for key, value in options.items()]
    settings = Config.fromfile(task.config(name))
    settings.merge_from_dict(options)
    epochs = settings.train_cfg.get('max_epochs', 1)
    log_file = folder / 'train.log'
    with runs.tool('train.py', arguments, log_file) as process:
        step, logged = None, 0.0
        while process.is_alive():
            last = runs.last_step(log_file.read_text(), epochs)
            if last != step:
                step, logged = last, plan.spent()
            if step is None:
                yield State(title, plan.left(), plan.pace)
            else:
                eta = max(0, step.eta - (plan.spent() - logged))
                left = plan.left(eta)
                yield State(f'{title} {step.share:.0%}', left, plan.pace)
    entries = read_log(folder)
    scores = [entry for entry in entries if task.metric in entry]
    state = load_checkpoint(str(folder / 'last.pth'))['state_dict']
    result = {
        'fingerprint': mark,
        # mmdet logs no AP if nothing at all was detected
        'score': task.scale * scores[-1][task.metric] if scores else 0.0,
        'curve': [(e['step'], task.scale * e[task.metric]) for e in scores],
        'parameters': runs.count_parameters(state),
        'seconds': plan.spent(),
        **runs.last_correlations(entries),
    }
    runs.save_result(folder, result)
    progress.done(f'{title}: {task.label} {result["score"]:.1f}')


def next_part(waiting: list[Part], running: Iterable[Part]) -> Part | None:
    """The first part that need not wait for its teacher."""
    unfinished = [*waiting, *running]
    ready = (part for part in waiting if part.teacher not in unfinished)
    return next(ready, None)


def finished_of(unfinished: Iterable[Part]) -> Finished:
    """The finished parts of each task that lacks nothing, or only KL."""
    lacking = {(part.task.name, part.name) for part in unfinished}
    finished = {
        task: [name for name in PARTS if (task.name, name) not in lacking]
        for task in TASKS
    }
    return {
        task: parts for task, parts in finished.items() if {*PARTS} - {*parts} <= {LAST}
    }


def train_all(seeds: list[int], smoke: bool, progress: Progress) -> Iterator[Finished]:
    """Train all parts, as many at a time as there are tasks.

    Students of the shorter task go first and those with KL last, for an early first
    result. Within a task the longest go first, so that the last ones end together.

    Yields:
        The result of :func:`finished_of` whenever it has one more task, and at the end.
    """
    tasks = sorted(TASKS, key=lambda task: sum(task.seconds))
    waiting = [Part(task, 'teacher', 0) for task in tasks]
    students = [
        Part(task, name, seed) for task in tasks for seed in seeds for name in PARTS[1:]
    ]
    waiting += sorted(
        students, key=lambda p: (p.name == LAST, tasks.index(p.task), -p.seconds)
    )
    running: dict[Part, Iterator[State]] = {}
    finished: Finished = {}
    pace = 1.0
    try:
        while True:
            while len(running) < len(TASKS) and (part := next_part(waiting, running)):
                waiting.remove(part)
                training = train(part, smoke, pace, progress)
                running[part] = training
                if not next(training, None):  # finished before
                    del running[part]
            unfinished = [*waiting, *running]
            found = finished_of(unfinished)
            if len(found) > len(finished) or not unfinished:
                finished = found
                yield finished
            if not unfinished:
                return
            states = {part: next(training, None) for part, training in running.items()}
            running = {part: running[part] for part, state in states.items() if state}
            if running:
                shown = [states[part] for part in running]
                pace = float(np.mean([state.pace for state in shown]))
                lefts = [state.left for state in shown]
                rest = 0 if smoke else pace * sum(part.seconds for part in waiting)
                left = max(*lefts, (sum(lefts) + rest) / len(TASKS))
                text = ', '.join(state.text for state in shown)
                progress.show(text, left + REPORT_SECONDS)
            time.sleep(0.5)
    finally:
        for training in running.values():
            training.close()  # ends its process


def distil(seeds: list[int], smoke: bool) -> str:
    """Make the data, train, and write the report; return what to print."""
    WORK_DIR.mkdir(parents=True, exist_ok=True)
    steps = 2 + len(TASKS) * (1 + len(seeds) * len(PARTS[1:]))
    with (
        Progress('quickstart', steps) as progress,
        # the libraries' output
        (WORK_DIR / 'quickstart.log').open('w') as log,
        redirect_stdout(log),
        redirect_stderr(log),
    ):
        threads = max(1, (os.cpu_count() or 1) // len(TASKS))
        os.environ['OMP_NUM_THREADS'] = str(threads)
        runs.import_libraries()
        progress.show('scenes of digits')
        from tools.dev import make_digits

        few = ['--train', '16', '--train-few', '16', '--val', '8']
        make_digits.main(few if smoke else [])
        progress.done('scenes of digits: data/digits')
        with closing(train_all(seeds, smoke, progress)) as training:
            for finished in training:
                progress.show('report', REPORT_SECONDS)
                report = write_report(finished, seeds)
                if any(LAST not in parts for parts in finished.values()):
                    names = ' and '.join(task.name for task in finished)
                    progress.say(
                        f'{WORK_DIR}/report.md and report.png: {names}, KL follows'
                    )
        progress.done(f'report: {WORK_DIR}/report.md and report.png')
        progress.show('done')
    return report


def main() -> None:
    parser = argparse.ArgumentParser(
        prog='python -m tools.dev.quickstart',
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        '--seeds', type=int, nargs='+', default=[0], help='of the students (default: 0)'
    )
    parser.add_argument(
        '--smoke',
        action='store_true',
        help='a dry run: few scenes, hardly any training',
    )
    args = parser.parse_args()
    try:
        print(distil(args.seeds, args.smoke))
    except KeyboardInterrupt:
        raise SystemExit(
            'Interrupted. What is finished is kept: run this again.'
        ) from None


if __name__ == '__main__':
    main()
