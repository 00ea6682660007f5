"""The grid of the study: tasks, methods and their cells."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

CONFIGS = Path(__file__).resolve().parent / 'configs'


ALONE = 'alone'
STORED = 'stored'  # `default` with the fused answers of several teachers and views
STORED_ONCE = 'stored-once'  # `default` with the stored answers of one teacher
NO_LABELS = 'no-labels'  # `default` without reading labels
METHODS = (ALONE, 'kl', 'published', 'inter', 'intra', 'default')
METHODS += (STORED, STORED_ONCE, NO_LABELS)


def kl_loss(classes: int) -> dict:
    """Hinton's loss; mmdet's averages over classes, which the weight makes a sum."""
    return dict(
        type='mmdet.KnowledgeDistillationKLDivLoss', T=1, loss_weight=float(classes)
    )


BINARY_KL = dict(type='mmdist.BinaryKLDivLoss', loss_weight=100.0)


@dataclass(frozen=True)
class Task:
    """A data set and a kind of model: how it is scored and compared."""

    metric: str  # its name in the log
    label: str
    percent: float  # factor from the log to percent
    kind: str  # type of the comparison of class logits
    kl: dict  # the loss for KL
    has_test: bool  # whether it has images by which nothing was chosen
    other: str = ''  # the task whose teacher is the 'other' one
    fused: tuple[str, ...] = ()  # the tasks whose teachers are fused, if several

    def changes(self, method: str, teacher: str) -> dict:
        """Arguments of the Distiller that a method sets; mmdist chooses the rest."""
        kind = self.kind if teacher == 'strong' else 'mmdist.Detections'
        published = dict(balance=None)
        if method == 'kl':
            loss = self.kl
            if teacher == 'other':  # of weights 1, 10 and 100 the best, with seed 0
                loss = dict(loss, loss_weight=1.0)
            return dict(distill=dict(kl=dict(type=kind, loss=loss)))
        if method in ('inter', 'intra'):  # one term alone
            other = dict(gamma=0.0) if method == 'inter' else dict(beta=0.0)
            loss = dict(type='mmdist.DISTLoss', **other)
            return dict(distill=dict(dist=dict(type=kind, loss=loss)), **published)
        return published if method == 'published' else {}


BCCD = dict(
    metric='coco/bbox_mAP',
    label='AP',
    percent=100,
    has_test=False,
    fused=('bccd-faster-rcnn', 'bccd-retinanet', 'bccd-dino'),
)
TASKS = {
    'camvid': Task('mIoU', 'mIoU', 1, 'mmdist.SegLogits', kl_loss(11), True),
    'bccd-retinanet': Task(
        **BCCD, kind='mmdist.DenseLogits', kl=BINARY_KL, other='bccd-faster-rcnn'
    ),
    'bccd-faster-rcnn': Task(**BCCD, kind='mmdist.RoILogits', kl=kl_loss(4)),
    'bccd-dino': Task(**BCCD, kind='mmdist.QueryLogits', kl=BINARY_KL),
}
TEACHERS = ('strong', 'other')  # of the student's family, or of another
SINGLE = ('teacher', ALONE)  # trained without another model


class Cell(NamedTuple):
    """One training: of a teacher, or of a student with a method and a teacher."""

    scale: str
    task: str
    method: str  # 'teacher', or one of METHODS
    teacher: str  # '' for a student alone
    seed: int

    @property
    def folder(self) -> Path:
        """Where it is trained, relative to the work dir."""
        name = '_'.join(filter(None, (self.method, self.teacher, f'seed{self.seed}')))
        return Path(self.scale) / self.task / name

    @property
    def its_teachers(self) -> list[Cell]:
        """Its teacher, or those whose answers are fused; the same for all seeds."""
        fused, other = TASKS[self.task].fused, TASKS[self.task].other
        task = other if self.teacher == 'other' else self.task
        tasks = fused if fused and self.method == STORED else [task]
        cells = [Cell(self.scale, task, 'teacher', 'strong', 0) for task in tasks]
        # not every task has models of every scale
        return [cell for cell in cells if len(cells) == 1 or cell.config.is_file()]

    @property
    def config(self) -> Path:
        """The config file of its model, a teacher's or a student's."""
        folder = self.task + ('-full' if self.scale == 'full' else '')
        part = 'teacher' if self.method == 'teacher' else 'student'
        return CONFIGS / folder / f'{part}.py'

    @property
    def command(self) -> str:
        """The command that trains it, and its teacher first."""
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
    """Seed by seed, so that cells finished when time is up can be compared in pairs."""
    for task, teacher, seed in itertools.product(tasks, teachers, seeds):
        if teacher == 'other' and not TASKS[task].other:
            continue
        for method in methods:
            if teacher == 'other' and method == STORED:  # it is that of 'strong'
                continue
            cell = Cell(scale, task, method, teacher, seed)
            if method == ALONE:
                yield cell._replace(teacher='')
            else:
                yield from cell.its_teachers
                if method != 'teacher':
                    yield cell
