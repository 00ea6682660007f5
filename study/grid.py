"""The grid: tasks, methods, and the cells that they make."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

CONFIGS = Path(__file__).resolve().parent / 'configs'


ALONE = 'alone'
STORED = 'stored'  # as `default`, from the fused answers of several teachers and views
STORED_ONCE = 'stored-once'  # as `default`, from the answers of the one teacher
NO_LABELS = 'no-labels'  # as `default`, and no label is read
METHODS = (
    ALONE,
    'kl',
    'published',
    'inter',
    'intra',
    'default',
    STORED,
    STORED_ONCE,
    NO_LABELS,
)


def kl_loss(classes: int) -> dict:
    """Hinton's loss: mmdet's is a mean over the classes, the weight makes it a sum."""
    return dict(
        type='mmdet.KnowledgeDistillationKLDivLoss', T=1, loss_weight=float(classes)
    )


BINARY_KL = dict(type='mmdist.BinaryKLDivLoss', loss_weight=100.0)


@dataclass(frozen=True)
class Task:
    """A data set and a kind of model: where its configs are and how it is scored."""

    metric: str  # in the log
    label: str
    percent: float  # from the log to percent
    kind: str  # of the comparison of class logits
    kl: dict  # the loss of KL
    has_test: bool  # images by which nothing was chosen
    other: str = ''  # the task whose teacher is the 'other' one
    fused: tuple[str, ...] = ()  # the tasks whose teachers are fused, if several

    def changes(self, method: str, teacher: str) -> dict:
        """What a method writes into the Distiller; in doubt, mmdist chooses."""
        kind = self.kind if teacher == 'strong' else 'mmdist.Detections'
        published = dict(balance=None)
        if method == 'kl':
            return dict(distill=dict(kl=dict(type=kind, loss=self.kl)))
        if method in ('inter', 'intra'):  # a term alone
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
TEACHERS = ('strong', 'other')  # of the student's family, of another
SINGLE = ('teacher', ALONE)  # trained without another model


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
    def its_teachers(self) -> list[Cell]:
        """One, or those whose answers are fused; the same for all seeds."""
        tasks = [TASKS[self.task].other if self.teacher == 'other' else self.task]
        if self.method == STORED and TASKS[self.task].fused:
            tasks = TASKS[self.task].fused
        cells = [Cell(self.scale, task, 'teacher', 'strong', 0) for task in tasks]
        return [cell for cell in cells if len(cells) == 1 or cell.config.is_file()]

    @property
    def config(self) -> Path:
        """The config of its model, of the teacher or of the students."""
        folder = self.task + ('-full' if self.scale == 'full' else '')
        part = 'teacher' if self.method == 'teacher' else 'student'
        return CONFIGS / folder / f'{part}.py'

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
        if teacher == 'other' and not TASKS[task].other:
            continue
        for method in methods:
            if teacher == 'other' and method == STORED:  # all of them, as of 'strong'
                continue
            cell = Cell(scale, task, method, teacher, seed)
            if method == ALONE:
                yield cell._replace(teacher='')
            else:
                yield from cell.its_teachers
                if method != 'teacher':
                    yield cell
