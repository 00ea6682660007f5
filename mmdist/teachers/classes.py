"""Classes of student and teacher, matched by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from mmengine.config import Config
from mmengine.registry import DATASETS, DefaultScope
from torch import Tensor


@dataclass
class ClassMatch:
    """Which columns of the two sides are the same class.

    Attributes:
        student: The student's columns to compare; None for all in their order.
        teacher: The teacher's columns of the same classes; None for all in order.
        num_student: Number of the student's classes.
        num_teacher: Number of the teacher's classes.
    """

    student: list[int] | None = None
    teacher: list[int] | None = None
    num_student: int | None = None
    num_teacher: int | None = None

    def select(self, student: Tensor, teacher: Tensor, dim: int = 1) -> tuple:
        """Take the common classes of both, in the same order, along ``dim``.

        Columns after the named classes (the background of a softmax head) are kept.
        """
        return (
            _select(student, self.student, self.num_student, dim),
            _select(teacher, self.teacher, self.num_teacher, dim),
        )


def _select(
    logits: Tensor, columns: list[int] | None, num_classes: int | None, dim: int
) -> Tensor:
    if columns is None:
        return logits
    columns = (*columns, *range(num_classes, logits.size(dim)))
    return logits.index_select(dim, _on_device(columns, logits.device))


@lru_cache
def _on_device(columns: tuple[int, ...], device: torch.device) -> Tensor:
    """Copied once: a GPU is waited for while numbers are copied to it."""
    return torch.tensor(columns, device=device)


def match_classes(
    student: Sequence[str] | None,
    teacher: Sequence[str] | None,
    class_map: Mapping[str, str] | None = None,
) -> ClassMatch:
    """Match classes by name.

    Equal lists need no mapping; another order, or one list within the other, is mapped.

    Args:
        student: The student's class names; None if unknown.
        teacher: The teacher's class names; None if unknown.
        class_map: The teacher's name for each name of the student's that differs.

    Raises:
        ValueError: Neither list holds the other; it prints both.
    """
    if student is None or teacher is None:
        return ClassMatch()
    student, teacher = list(student), list(teacher)
    unknown = sorted(
        (set(class_map or ()) - set(student))
        | (set((class_map or {}).values()) - set(teacher))
    )
    if unknown:
        raise ValueError(
            f'`teacher.class_map` maps names of the student to names of the teacher, '
            f'but neither has {unknown}.\nStudent: {student}\nTeacher: {teacher}'
        )
    wanted = [(class_map or {}).get(name, name) for name in student]
    if wanted == teacher:
        return ClassMatch()
    common = [i for i, name in enumerate(wanted) if name in teacher]
    if common and len(common) in (len(wanted), len(teacher)):
        return ClassMatch(
            student=None if len(common) == len(wanted) else common,
            teacher=[teacher.index(wanted[i]) for i in common],
            num_student=len(student),
            num_teacher=len(teacher),
        )
    raise ValueError(
        'The classes of student and teacher cannot be matched by name.\n'
        f'Student ({len(student)}): {student}\nTeacher ({len(teacher)}): {teacher}\n'
        f'Only the student has {sorted(set(wanted) - set(teacher))}, only the teacher '
        f'{sorted(set(teacher) - set(wanted))}. If they are the same under other '
        "names, say so: `teacher.class_map=dict(<student's>=<teacher's>, ...)`."
    )


def class_names_of_checkpoint(checkpoint: dict) -> Sequence[str] | None:
    meta = checkpoint.get('meta') or {}
    dataset_meta = {k.lower(): v for k, v in (meta.get('dataset_meta') or {}).items()}
    # 'CLASSES': mmdet 2.x and mmseg 0.x.
    return dataset_meta.get('classes') or meta.get('CLASSES')


def class_names_of_config(config: Config) -> Sequence[str] | None:
    """Names of the dataset that the config trains or tests on, through wrappers."""
    scope = config.get('default_scope')
    for loader in ('train_dataloader', 'val_dataloader', 'test_dataloader'):
        dataset = (config.get(loader) or {}).get('dataset')
        while dataset:
            classes = (dataset.get('metainfo') or {}).get('classes')
            if classes is None and isinstance(dataset.get('type'), str):
                classes = _class_names_of_type(
                    dataset['type'], dataset.get('_scope_', scope)
                )
            if classes is not None:
                return (classes,) if isinstance(classes, str) else tuple(classes)
            inner = dataset.get('dataset') or dataset.get('datasets')
            dataset = inner[0] if isinstance(inner, list) else inner
    return None


def _class_names_of_type(dataset_type: str, scope: str | None) -> Sequence[str] | None:
    try:
        with (
            DefaultScope.overwrite_default_scope(scope),
            DATASETS.switch_scope_and_registry(None) as registry,
        ):
            cls = registry.get(dataset_type)
    except RuntimeError:  # not registered: the teacher's dataset is not installed here
        return None
    return getattr(cls, 'METAINFO', {}).get('classes')
