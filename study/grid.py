"""The grid: tasks, methods, and the cells that they make."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

CONFIGS = Path(__file__).resolve().parent / 'configs'


DEFAULT = 'default'  # what mmdist chooses, with `balance`; other rows are without it
# class scores do not say where a box ends; without labels nothing else does
BOX = dict(type='mmdist.Boxes')


def kl(kind: str, classes: int, temperature: int, **options) -> dict:
    """Hinton's loss: mmdet's is a mean over the classes, the weight makes it a sum."""
    loss = dict(
        type='mmdet.KnowledgeDistillationKLDivLoss',
        T=temperature,
        loss_weight=float(classes),
    )
    return dict(kl=dict(type=kind, loss=loss, **options))


def methods(
    kind: str,
    classes: int,
    mimic: dict,
    sigmoid: bool = False,
    **kl_options,
) -> dict[str, Any]:
    """What `distill` is for each method; None where there is none.

    Args:
        kind: Type of the comparison of class logits.
        classes: Number of columns of a softmax.
        mimic: Arguments of the comparison of features.
        sigmoid: Whether the head has a sigmoid per class.
        kl_options: Arguments of the comparison for KL over the classes.
    """

    def dist(kind: str = kind, **options) -> dict:
        # the published eps, with which the rows of docs/results.md were trained
        return dict(type=kind, loss=dict(type='mmdist.DISTLoss', eps=1e-8, **options))

    pkd = dist('mmdist.Features', beta=0.0)
    if kind == 'mmdist.SegLogits':
        of_detectors = {}
        pkd |= mimic
    else:
        pkd |= dict(levels='stride')
        of_detectors = {
            'dist-box': dict(dist=dist(), box=BOX),
            'intra-box': dict(dist=dist(beta=0.0), box=BOX),
            'intra-box-pkd': dict(dist=dist(beta=0.0), box=BOX, pkd=pkd),
            'dist-detections': dict(
                dist=dict(
                    type='mmdist.Detections',
                    loss=dict(type='mmdist.DISTLoss', beta=0.0, eps=1e-8),
                )
            ),
        }

    kl_binary = dict(
        type=kind, loss=dict(type='mmdist.BinaryKLDivLoss', loss_weight=100.0)
    )
    return {
        'alone': None,
        DEFAULT: None,
        'kl-t1': kl(kind, classes, 1, **kl_options),
        'kl-t4': kl(kind, classes, 4, **kl_options),
        **({'kl-binary': dict(kl=kl_binary)} if sigmoid else {}),
        'dist': dict(dist=dist()),
        'dist-inter': dict(dist=dist(gamma=0.0)),
        'dist-intra': dict(dist=dist(beta=0.0)),
        'dist-mimic': dict(
            dist=dist(), mimic=dict(type='mmdist.Features', adapt=True, **mimic)
        ),
        'pkd': dict(pkd=pkd),
        'intra-pkd': dict(dist=dist(beta=0.0), pkd=pkd),
        **of_detectors,
    }


@dataclass(frozen=True)
class Task:
    """A data set and a kind of model: where its configs are and how it is scored."""

    folder: str
    metric: str  # in the log
    label: str
    percent: float  # from the log to percent
    methods: dict
    num_images: int  # for training
    has_test: bool  # images by which nothing was chosen
    other: str = ''  # the task whose strong teacher is the 'other' one

    def config(self, part: str, scale: str) -> Path:
        folder = self.folder + ('-full' if scale == 'full' else '')
        return CONFIGS / folder / f'{part}.py'


MIMIC = dict(student='backbone', levels=[-1], teacher_levels=[-1])
SEG = methods('mmdist.SegLogits', 11, MIMIC)
DENSE = methods('mmdist.DenseLogits', 3, {}, sigmoid=True, anchors='separate')
ROI = methods('mmdist.RoILogits', 4, {})
TASKS = {
    'camvid': Task('camvid', 'mIoU', 'mIoU', 1, SEG, 367, True),
    'bccd-retinanet': Task(
        'bccd-retinanet',
        'coco/bbox_mAP',
        'AP',
        100,
        DENSE,
        292,
        False,
        'bccd-faster-rcnn',
    ),
    'bccd-faster-rcnn': Task(
        'bccd-faster-rcnn', 'coco/bbox_mAP', 'AP', 100, ROI, 292, False
    ),
}
# Only every fourth training image is labelled for the students; not for the teachers,
# but for that of the name 'quarter'. The students of `dist-unlabelled` see the other
# images without labels, in half of each batch.
QUARTERS = {
    f'{name}-25': replace(
        task, methods={**task.methods, 'dist-unlabelled': task.methods['dist']}
    )
    for name, task in TASKS.items()
}
# The students of `dist-no-labels` see all images, none with its labels.
for name, more in {'camvid': {}, 'bccd-retinanet': dict(box=BOX)}.items():
    bare = {'dist-no-labels': {**TASKS[name].methods['dist'], **more}}
    TASKS[name] = replace(TASKS[name], methods={**TASKS[name].methods, **bare})
TASKS |= QUARTERS
DIGITS = methods('mmdist.SegLogits', 10, MIMIC)
TASKS['digits'] = Task('digits', 'mIoU', 'mIoU', 1, DIGITS, 300, False)
QUERIES = methods('mmdist.QueryLogits', 3, {}, sigmoid=True)
TASKS['bccd-dino'] = Task(
    'bccd-dino', 'coco/bbox_mAP', 'AP', 100, QUERIES, 292, False, 'bccd-faster-rcnn'
)
GONE = ('dist-boxes', 'dist-damped')  # measured once; mmdist cannot do it any more
METHODS = (
    *dict.fromkeys(name for task in TASKS.values() for name in task.methods),
    *GONE,
)
TEACHERS = ('strong', 'weak', 'other', 'quarter')
ACROSS = (DEFAULT, 'dist-detections', 'pkd')  # take a teacher of another family
SINGLE = ('teacher', 'alone')  # trained without another model


class Cell(NamedTuple):
    """One training: of a teacher, or of a student by a method from a teacher."""

    scale: str
    task: str
    method: str  # 'teacher', or a key of METHODS
    teacher: str  # '' for a student alone
    seed: int

    @property
    def folder(self) -> Path:
        """Where it is trained, below the work dir."""
        name = '_'.join(filter(None, (self.method, self.teacher, f'seed{self.seed}')))
        return Path(self.scale) / self.task / name

    @property
    def its_teacher(self) -> Cell:
        """The students of all seeds and labelled shares have the same."""
        task = TASKS[self.task]
        if self.teacher == 'quarter':  # trained with the labels of its students alone
            return Cell(self.scale, self.task, 'teacher', 'quarter', 0)
        if self.teacher == 'other':
            return Cell(self.scale, task.other, 'teacher', 'strong', 0)
        return Cell(self.scale, task.folder, 'teacher', self.teacher, 0)

    @property
    def command(self) -> str:
        """What trains it, and its teacher first."""
        teacher = f' --teachers {self.teacher}' if self.teacher else ''
        scale = f' --scale {self.scale}' if self.scale != 'small' else ''
        return (
            f'python -m study --tasks {self.task} --methods {self.method}'
            f'{teacher} --seeds {self.seed}{scale}'
        )


def grid(
    scale: str,
    tasks: Sequence[str],
    methods: Sequence[str],
    teachers: Sequence[str],
    seeds: Sequence[int],
) -> Iterator[Cell]:
    """Seed by seed, so that what is done when time is up can be compared in pairs."""
    for task, teacher, seed in itertools.product(tasks, teachers, seeds):
        for method in methods:
            if method not in ('teacher', *TASKS[task].methods):
                continue  # kl-binary, of heads with sigmoids
            if teacher == 'other' and not (method in ACROSS and TASKS[task].other):
                continue
            if teacher == 'quarter' and not task.endswith('-25'):
                continue
            cell = Cell(scale, task, method, teacher, seed)
            if method == 'alone':
                yield cell._replace(teacher='')
            else:
                yield cell.its_teacher
                if method != 'teacher':
                    yield cell
