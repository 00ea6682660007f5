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

from tools.dev import runs
from tools.dev.progress import Progress
from tools.dev.quickstart.report import Finished, write_report
from tools.dev.quickstart.tasks import LAST, PARTS, TASKS, WORK_DIR, Part

# make_digits and mm* are imported where they are used: what they print on import goes
# into the log

REPORT_SECONDS = 20


def train(part: Part, smoke: bool, progress: Progress) -> Iterator[float]:
    """Train one part in its own process; yield the share that is done while it runs."""
    from mmengine.config import Config

    task, name, seed = part
    options = {'randomness.seed': seed, **(task.smoke if smoke else {})}
    folder, mark = task.folder(name, seed), part.fingerprint(options)
    if runs.finished(folder, mark):
        progress.done(f'{part.title}: finished before, {folder}')
        return
    shutil.rmtree(folder, ignore_errors=True)  # interrupted, or outdated
    folder.mkdir(parents=True)
    settings = [f'{key}={value}' for key, value in options.items()]
    arguments = [task.config(name), '--work-dir', folder, '--cfg-options', *settings]
    cfg = Config.fromfile(task.config(name))
    cfg.merge_from_dict(options)
    epochs = cfg.train_cfg.get('max_epochs', 1)
    log_file = folder / 'train.log'
    with runs.tool('train.py', arguments, log_file) as process:
        while process.is_alive():
            yield runs.share_done(log_file.read_text(), epochs)
    found = runs.read_training(
        folder, str(folder / 'last.pth'), task.metric, task.percent
    )
    # mmdet logs no AP if nothing at all was detected
    score = found['curve'][-1][1] if found['curve'] else 0.0
    runs.save_result(folder, dict(fingerprint=mark, score=score, **found))
    progress.done(f'{part.title}: {task.label} {score:.1f}')


def next_part(waiting: list[Part], running: Iterable[Part]) -> Part | None:
    """The first part that need not wait for its teacher."""
    unfinished = [*waiting, *running]
    ready = (part for part in waiting if part.teacher not in unfinished)
    return next(ready, None)


def finished_of(unfinished: Iterable[Part]) -> Finished:
    """The finished parts of each task that lacks nothing, or only KL."""
    lacking = {(part.task, part.name) for part in unfinished}
    finished = {
        task: [name for name in PARTS if (task, name) not in lacking] for task in TASKS
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
    students = [Part(t, name, seed) for t in tasks for seed in seeds for name in PARTS]
    waiting += sorted(
        (part for part in students if part.name != 'teacher'),
        key=lambda p: (p.name == LAST, tasks.index(p.task), -p.seconds),
    )
    running: dict[Part, Iterator[float]] = {}
    finished: Finished = {}
    done = 0.0  # seconds that the parts of this run should have taken
    try:
        while True:
            while len(running) < len(TASKS) and (part := next_part(waiting, running)):
                waiting.remove(part)
                training = train(part, smoke, progress)
                if next(training, None) is not None:  # else finished before
                    running[part] = training
            found = finished_of([*waiting, *running])
            if len(found) > len(finished) or not running:
                finished = found
                yield finished
            if not running:
                return
            shares = {part: next(training, None) for part, training in running.items()}
            done += sum(part.seconds for part in running if shares[part] is None)
            running = {p: running[p] for p in running if shares[p] is not None}
            if running:
                text = ', '.join(f'{p.title} {shares[p]:.0%}' for p in running)
                now = done + sum(shares[p] * p.seconds for p in running)
                left = sum(p.seconds for p in [*waiting, *running]) + done - now
                # as fast as so far, once that is known
                pace = progress.elapsed() / now if now > 20 else 1 / len(TASKS)
                progress.show(text, pace * left + REPORT_SECONDS)
            time.sleep(0.5)
    finally:
        for training in running.values():
            training.close()  # ends its process


def distil(seeds: list[int], smoke: bool) -> str:
    """Make the data, train, and write the report; return what to print."""
    WORK_DIR.mkdir(parents=True, exist_ok=True)
    steps = 2 + len(TASKS) * (1 + len(seeds) * len(PARTS[1:]))
    files = f'{WORK_DIR}/report.md and report.png'
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
                    progress.say(f'{files}: {names}, KL follows')
        progress.done(f'report: {files}')
        progress.show('done')
    return report


def main() -> None:
    parser = argparse.ArgumentParser(
        prog='python -m tools.dev.quickstart',
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add('--seeds', type=int, nargs='+', default=[0], help='of students (default: 0)')
    text = 'a dry run: few scenes, hardly any training'
    add('--smoke', action='store_true', help=text)
    args = parser.parse_args()
    try:
        print(distil(args.seeds, args.smoke))
    except KeyboardInterrupt:
        raise SystemExit(
            'Interrupted. What is finished is kept: run this again.'
        ) from None


if __name__ == '__main__':
    main()
