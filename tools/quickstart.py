"""Distil a small detector and a small segmentor, from nothing, in minutes.

Makes scenes of digits, then trains for detection and for segmentation a teacher, a
student alone, a student with KL and a student with DIST, each by `tools/train.py` from
a config of `configs/*/quickstart`, two at a time. KL is a second baseline and comes
last: report.md and report.png are written as soon as one of the two tasks is finished
but for KL, and again as there is more. A part that is finished is skipped when this is
run again.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import closing, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import runs
from progress import Plan, Progress

# make_digits and mm* are imported where they are used: what they print as they are
# imported goes into the log

ROOT = Path(__file__).resolve().parents[1]
WORK_DIR = Path('work_dirs/quickstart')
PARTS = ('teacher', 'student alone', 'student + KL', 'student + DIST')
LAST = 'student + KL'  # trained last: what DIST gains is seen without it
REPORT_SECONDS = 20
NOTE = """inter and intra: the mean correlations with the teacher, as last logged in
training. The teachers train on all scenes of `train`, the students on its
first ones (`train-few`), alone or distilled."""
COLOURS = ('0.6', 'tab:blue', 'tab:orange', 'tab:green')


@dataclass(eq=False)
class Task:
    """One of the two tasks: its four configs and how it is scored."""

    name: str
    configs: tuple[str, ...]  # one per part
    metric: str  # in the log
    label: str
    scale: float  # from the log to percent
    smoke: dict  # settings of a dry run
    seconds: tuple[int, ...]  # of each part, on one core of two

    def config(self, part: str) -> Path:
        name = self.configs[PARTS.index(part)]
        return ROOT / 'configs' / self.name / 'quickstart' / f'{name}.py'

    def folder(self, part: str, seed: int) -> Path:
        # The students of all seeds share a teacher.
        suffix = f'_seed{seed}' if seed and part != 'teacher' else ''
        return WORK_DIR / f'{self.config(part).stem}{suffix}'


TASKS = (
    Task(
        'det',
        (
            'retinanet_w32_digits',
            'retinanet_w16_digits',
            'kl_retinanet_w32-w16_digits',
            'dist_retinanet_w32-w16_digits',
        ),
        'coco/bbox_mAP',
        'AP',
        100,
        {'train_cfg.max_epochs': 1, 'train_cfg.val_interval': 1},
        (140, 80, 110, 115),
    ),
    Task(
        'seg',
        (
            'deeplabv3_w32_digits',
            'deeplabv3_w8_digits',
            'kl_deeplabv3_w32-w8_digits',
            'dist_deeplabv3_w32-w8_digits',
        ),
        'mIoU',
        'mIoU',
        1,
        # two steps, DIST in both
        {'train_cfg.max_iters': 2, 'train_cfg.val_interval': 2, 'custom_hooks': []},
        (110, 50, 70, 95),
    ),
)


class Part(NamedTuple):
    """A training of one of the models of a task."""

    task: Task
    name: str  # of PARTS
    seed: int

    @property
    def teacher(self) -> Part | None:
        """What must be trained before it."""
        alone = self.name in PARTS[:2]
        return None if alone else Part(self.task, 'teacher', 0)

    @property
    def seconds(self) -> int:
        """How long it takes on one core of two, on some machine."""
        return self.task.seconds[PARTS.index(self.name)]


Finished = dict[Task, list[str]]  # the names of a task's finished parts


class State(NamedTuple):
    """How far a training is."""

    text: str
    left: float  # seconds
    pace: float  # this machine's time over that of the other


def fingerprint(task: Task, part: str, options: dict) -> str:
    """Hash of all that a result depends on: settings, data, and the teacher's."""
    from mmengine.config import Config

    parts = [
        Config.fromfile(task.config(part)).pretty_text,
        repr(sorted(options.items())),
        Path('data/digits/digits.json').read_text(),
    ]
    if part not in ('teacher', 'student alone'):
        parts.append(result_of(task, 'teacher', 0)['fingerprint'])
    return runs.fingerprint(*parts)


def result_of(task: Task, part: str, seed: int) -> dict:
    """What came out of a finished part."""
    return json.loads((task.folder(part, seed) / 'metrics.json').read_text())


def train(part: Part, smoke: bool, pace: float, progress: Progress) -> Iterator[State]:
    """Train one part in a process of its own; yields while that runs."""
    from mmdist.checkpoint import load_checkpoint

    task, name, seed = part
    options = {'randomness.seed': seed, **(task.smoke if smoke else {})}
    folder = task.folder(name, seed)
    # short: two of them are in one line
    title = f'{task.name} {name.removeprefix("student ")}'
    title += f' seed {seed}' if seed else ''
    plan = Plan({name: 20 if smoke else part.seconds})
    plan.pace = pace
    plan.begin(name)
    mark = fingerprint(task, name, options)
    if runs.finished(folder, mark):
        progress.done(f'{title}: finished before, {folder}')
        return
    shutil.rmtree(folder, ignore_errors=True)  # what was interrupted, or is outdated
    folder.mkdir(parents=True)
    arguments = [task.config(name), '--work-dir', folder, '--cfg-options']
    arguments += [f'{key}={value}' for key, value in options.items()]
    log_file = folder / 'train.log'
    with runs.tool('train.py', arguments, log_file) as process:
        step, said = None, 0.0
        while process.is_alive():
            last = runs.last_step(log_file.read_text())
            if last != step:
                step, said = last, plan.spent()
            if step is None:
                yield State(title, plan.left(), plan.pace)
            else:
                eta = max(0, step.eta - (plan.spent() - said))
                left = plan.left(eta)
                yield State(f'{title} {step.share:.0%}', left, plan.pace)
    entries = runs.read_log(folder)
    scores = [entry for entry in entries if task.metric in entry]
    state = load_checkpoint(str(folder / 'last.pth'))['state_dict']
    result = {
        'fingerprint': mark,
        # mmdet logs no AP where nothing at all was detected.
        'score': task.scale * scores[-1][task.metric] if scores else 0.0,
        'curve': [(e['step'], task.scale * e[task.metric]) for e in scores],
        'parameters': runs.count_parameters(state),
        'seconds': plan.spent(),
        **runs.last_correlations(entries),
    }
    runs.save_result(folder, result)
    progress.done(f'{title}: {task.label} {result["score"]:.1f}')


def next_part(waiting: list[Part], running: Iterable[Part]) -> Part | None:
    """The first that need not wait for its teacher."""
    unfinished = [*waiting, *running]
    ready = (part for part in waiting if part.teacher not in unfinished)
    return next(ready, None)


def finished_of(unfinished: Iterable[Part]) -> Finished:
    """What is finished of the tasks that lack KL at most."""
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

    The students of the shorter task go first, and those with KL last, so that there is
    a first result soon. Then the longest go first, so that the last ones end together.

    Yields:
        What is finished of the tasks that lack KL at most, whenever there is one more
        of them, and at the end.
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
                if next(training, None):  # or it was finished before
                    running[part] = training
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


def results(task: Task, part: str, seeds: list[int]) -> list[dict]:
    """What came out of a part, one dict per seed; a teacher has one seed."""
    seeds = [0] if part == 'teacher' else seeds
    return [result_of(task, part, s) for s in seeds]


def make_table(finished: Finished, seeds: list[int]) -> str:
    """The results as a table in Markdown."""
    spread = ', mean ± std over seeds' if len(seeds) > 1 else ''
    lines = [
        f'|     | model          | parameters | AP / mIoU{spread} | inter | intra |',
        '|-----|----------------|-----------:|----------:|------:|------:|',
    ]
    for task, parts in finished.items():
        for part in parts:
            found = results(task, part, seeds)
            scores = [result['score'] for result in found]
            score = f'{np.mean(scores):.1f}'
            if len(scores) > 1:
                score += f' ± {np.std(scores, ddof=1):.1f}'
            relations = [
                f'{np.mean([result[r] for result in found]):.3f}'
                if r in found[0]
                else '-'
                for r in ('inter', 'intra')
            ]
            lines.append(
                f'| {task.name} | {part:14} | {found[0]["parameters"]:10,} '
                f'| {task.label} {score} | {relations[0]:>5} | {relations[1]:>5} |'
            )
    return '\n'.join(lines)


def predict(task: Task, part: str, seed: int, images: list[str]) -> list:
    """The predictions of a student, by the library's own API and the plain config."""
    config = str(task.config('student alone'))
    checkpoint = str(task.folder(part, seed) / 'last.pth')
    if task.name == 'det':
        from mmdet.apis import inference_detector, init_detector

        model = init_detector(config, checkpoint, device='cpu')
        found = [inference_detector(model, image).pred_instances for image in images]
        return [
            [(b.tolist(), int(c)) for b, c in zip(p.bboxes, p.labels, strict=True)]
            for p in (p[p.scores > 0.3] for p in found)
        ]
    from mmseg.apis import inference_model, init_model

    model = init_model(config, checkpoint, device='cpu')
    return [
        inference_model(model, image).pred_sem_seg.data[0].numpy() for image in images
    ]


def draw_report(finished: Finished, seed: int, file: Path, num_images: int = 4) -> None:
    """Draw the validation curves, and val images with truth and predictions."""
    import matplotlib

    matplotlib.use('Agg')
    import cv2
    import matplotlib.pyplot as plt
    from mmengine.registry import DefaultScope

    names = [f'{i:06d}.png' for i in range(num_images)]
    images = [f'data/digits/img_dir/val/{name}' for name in names]
    coco = json.loads(Path('data/digits/annotations/val.json').read_text())
    boxes = [[] for _ in names]
    for a in coco['annotations']:
        if a['image_id'] < num_images:
            x, y, w, h = a['bbox']
            boxes[a['image_id']].append(([x, y, x + w, y + h], a['category_id'] - 1))
    maps = [
        cv2.imread(f'data/digits/ann_dir/val/{n}', cv2.IMREAD_UNCHANGED) for n in names
    ]
    truth = {'det': boxes, 'seg': [m.clip(1, 10) - 1 for m in maps]}

    figure = plt.figure(figsize=(7.5 * len(finished), 12), layout='constrained')
    top, bottom = figure.subfigures(2, 1, height_ratios=(1, 2))
    plots = top.subplots(1, len(finished), squeeze=False)[0]
    for axes, (task, parts) in zip(plots, finished.items(), strict=True):
        for part in parts:
            colour = COLOURS[PARTS.index(part)]
            curve = results(task, part, [seed])[0]['curve'] or [(1, 0)]
            steps, scores = np.array(curve, float).T
            axes.plot(steps / steps[-1], scores, 'o-', color=colour, label=part)
        title = (
            'Detection, RetinaNet' if task.name == 'det' else 'Segmentation, DeepLabV3'
        )
        axes.set(
            title=title, xlabel='share of the schedule', ylabel=f'val {task.label}'
        )
        axes.grid(alpha=0.3)
        axes.legend()
    palette = plt.get_cmap('tab10')
    columns = bottom.subfigures(1, len(finished), squeeze=False)[0]
    for column, task in zip(columns, finished, strict=True):
        with DefaultScope.overwrite_default_scope('mmdet'):
            shown = [truth[task.name]]
            shown += [predict(task, p, seed, images) for p in (PARTS[1], PARTS[3])]
        grid = column.subplots(num_images, 3)
        for axes, title in zip(
            grid[0], ('ground truth', PARTS[1], PARTS[3]), strict=True
        ):
            axes.set_title(title)
        for j, predictions in enumerate(shown):
            for i, prediction in enumerate(predictions):
                axes = grid[i, j]
                axes.axis('off')
                axes.imshow(cv2.imread(images[i])[..., ::-1])
                if task.name == 'seg':
                    overlay = palette(prediction)
                    # the background is void, as is what is ambiguous
                    overlay[..., 3] = (maps[i] > 0) & (maps[i] < 255)
                    axes.imshow(overlay)
                    continue
                for (x1, y1, x2, y2), label in prediction:
                    colour = palette(label)
                    axes.add_patch(
                        plt.Rectangle(
                            (x1, y1), x2 - x1, y2 - y1, fill=False, color=colour, lw=2
                        )
                    )
                    axes.text(
                        x1,
                        y1,
                        str(label),
                        color='white',
                        fontsize=9,
                        bbox={'facecolor': colour, 'edgecolor': 'none', 'pad': 1},
                    )
    figure.savefig(file, dpi=80)


def demo_command(task: Task, seed: int) -> str:
    """The command that runs the distilled student on an image."""
    call = 'mmdet.apis', 'DetInferencer'
    if task.name == 'seg':
        call = 'mmseg.apis', 'MMSegInferencer'
    config = os.path.relpath(task.config('student alone'))
    checkpoint = task.folder('student + DIST', seed) / 'last.pth'
    image = 'data/digits/img_dir/val/000000.png'
    return (
        f'{os.path.relpath(sys.executable)} -c "from {call[0]} import {call[1]}; '
        f"{call[1]}('{config}', '{checkpoint}', device='cpu')"
        f"('{image}', out_dir='{WORK_DIR}/demo')\""
    )


def write_report(finished: Finished, seeds: list[int]) -> str:
    """Write report.md and report.png; the lines that are to be seen as well."""
    table = make_table(finished, seeds)
    commands = '\n\n'.join(demo_command(task, seeds[0]) for task in finished)
    draw_report(finished, seeds[0], WORK_DIR / 'report.png')
    (WORK_DIR / 'report.md').write_text(
        f'# Quickstart\n\n{table}\n\n{NOTE}\n\n![curves and val images](report.png)\n\n'
        f'The distilled students on an image:\n\n```shell\n{commands}\n```\n'
    )
    return (
        f'\n{table}\n\n{NOTE}\n\nReport: {WORK_DIR}/report.md and report.png\n'
        f'The distilled students on an image:\n\n{commands}\n'
    )


def distil(seeds: list[int], smoke: bool) -> str:
    """Make the data, train, and write the report; what is to be said of it."""
    WORK_DIR.mkdir(parents=True, exist_ok=True)
    steps = 2 + len(TASKS) * (1 + len(seeds) * len(PARTS[1:]))
    with (
        Progress('quickstart', steps) as progress,
        # what the libraries print
        (WORK_DIR / 'quickstart.log').open('w') as log,
        redirect_stdout(log),
        redirect_stderr(log),
    ):
        threads = max(1, (os.cpu_count() or 1) // len(TASKS))
        os.environ['OMP_NUM_THREADS'] = str(threads)
        runs.import_libraries()
        progress.show('scenes of digits')
        import make_digits

        make_digits.main(
            ['--train', '16', '--train-few', '16', '--val', '8'] if smoke else []
        )
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
    parser = argparse.ArgumentParser(description=__doc__)
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
