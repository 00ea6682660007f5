"""report.md and report.png of the quickstart."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import numpy as np

from tools.logs import mean_and_spread

from .tasks import PARTS, WORK_DIR, Task

Finished = dict[Task, list[str]]  # the names of a task's finished parts

NOTE = """inter and intra: the mean correlations with the teacher, as last logged in
training. The teachers train on all scenes of `train`, the students on its
first ones (`train-few`), alone or distilled."""
COLOURS = ('0.6', 'tab:blue', 'tab:orange', 'tab:green')
NUM_IMAGES = 4


def make_table(finished: Finished, seeds: list[int]) -> str:
    """The results as a table in Markdown."""
    spread = ', mean ± std over seeds' if len(seeds) > 1 else ''
    lines = [
        f'|     | model          | parameters | AP / mIoU{spread} | inter | intra |',
        '|-----|----------------|-----------:|----------:|------:|------:|',
    ]
    for task, part in [(task, p) for task, parts in finished.items() for p in parts]:
        found = task.results(part, seeds)
        scores = dict(enumerate(result['score'] for result in found))
        inter, intra = (
            f'{np.mean([result[r] for result in found]):.3f}' if r in found[0] else '-'
            for r in ('inter', 'intra')
        )
        lines.append(
            f'| {task.name} | {part:14} | {found[0]["parameters"]:10,} '
            f'| {task.label} {mean_and_spread(scores, 1)} | {inter:>5} | {intra:>5} |'
        )
    return '\n'.join(lines)


def predict(task: Task, part: str, seed: int, images: list[str]) -> list:
    """Predict with a student, through the library's own API and the plain config.

    Returns a label map for each image, or pairs of a box and its label.
    """
    config = str(task.config('student alone'))
    checkpoint = str(task.folder(part, seed) / 'last.pth')
    if task.name == 'det':
        from mmdet.apis import inference_detector, init_detector

        model = init_detector(config, checkpoint, device='cpu')
        found = [inference_detector(model, image).pred_instances for image in images]
        found = [p[p.scores > 0.3] for p in found]
        return [
            list(zip(p.bboxes.tolist(), p.labels.tolist(), strict=True)) for p in found
        ]
    from mmseg.apis import inference_model, init_model

    model = init_model(config, checkpoint, device='cpu')
    found = [inference_model(model, image).pred_sem_seg for image in images]
    return [labels.data[0].numpy() for labels in found]


def draw_report(finished: Finished, seed: int, file: Path) -> None:
    """Draw the validation curves, and val images with labels and predictions."""
    import cv2
    from matplotlib import colormaps
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle
    from mmengine.registry import DefaultScope

    names = [f'{i:06d}.png' for i in range(NUM_IMAGES)]
    images = [f'data/digits/img_dir/val/{name}' for name in names]
    coco = json.loads(Path('data/digits/annotations/val.json').read_text())
    boxes = [[] for _ in names]
    for a in coco['annotations']:
        if a['image_id'] < NUM_IMAGES:
            x, y, w, h = a['bbox']
            boxes[a['image_id']].append(([x, y, x + w, y + h], a['category_id'] - 1))
    maps = [
        cv2.imread(f'data/digits/ann_dir/val/{n}', cv2.IMREAD_UNCHANGED) for n in names
    ]
    truth = {'det': boxes, 'seg': [m.clip(1, 10) - 1 for m in maps]}
    palette = colormaps['tab10']

    def draw_image(axes, i: int, prediction) -> None:
        axes.axis('off')
        axes.imshow(cv2.imread(images[i])[..., ::-1])
        if isinstance(prediction, np.ndarray):
            overlay = palette(prediction)
            # background and ambiguous pixels are void
            overlay[..., 3] = (maps[i] > 0) & (maps[i] < 255)
            axes.imshow(overlay)
            return
        for (x1, y1, x2, y2), label in prediction:
            ec = palette(label)
            box = Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, ec=ec, lw=2)
            axes.add_patch(box)
            background = {'facecolor': ec, 'edgecolor': 'none', 'pad': 1}
            axes.text(x1, y1, str(label), color='w', fontsize=9, bbox=background)

    figure = Figure(figsize=(7.5 * len(finished), 12), layout='constrained')
    top, bottom = figure.subfigures(2, 1, height_ratios=(1, 2))
    plots = top.subplots(1, len(finished), squeeze=False)[0]
    columns = bottom.subfigures(1, len(finished), squeeze=False)[0]
    for axes, column, task in zip(plots, columns, finished, strict=True):
        for part in finished[task]:
            colour = COLOURS[PARTS.index(part)]
            curve = task.results(part, [seed])[0]['curve'] or [(1, 0)]
            steps, scores = np.array(curve, float).T
            axes.plot(steps / steps[-1], scores, 'o-', color=colour, label=part)
        axes.set(title=task.title, xlabel='share of the schedule')
        axes.set_ylabel(f'val {task.label}')
        axes.grid(alpha=0.3)
        axes.legend()
        shown = {'ground truth': truth[task.name]}
        with DefaultScope.overwrite_default_scope('mmdet'):
            shown |= {p: predict(task, p, seed, images) for p in (PARTS[1], PARTS[3])}
        grid = column.subplots(NUM_IMAGES, len(shown))
        for j, (title, predictions) in enumerate(shown.items()):
            grid[0, j].set_title(title)
            for i, prediction in enumerate(predictions):
                draw_image(grid[i, j], i, prediction)
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
    """Write report.md and report.png; return the lines to print."""
    table = make_table(finished, seeds)
    commands = '\n\n'.join(demo_command(task, seeds[0]) for task in finished)
    students = 'The distilled students on an image:\n\n'
    draw_report(finished, seeds[0], WORK_DIR / 'report.png')
    (WORK_DIR / 'report.md').write_text(
        f'# Quickstart\n\n{table}\n\n{NOTE}\n\n![curves and val images](report.png)\n\n'
        f'{students}```shell\n{commands}\n```\n'
    )
    return (
        f'\n{table}\n\n{NOTE}\n\nReport: {WORK_DIR}/report.md and report.png\n'
        f'{students}{commands}\n'
    )
