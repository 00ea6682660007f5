"""Classes of student and teacher, matched by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain, groupby

import torch
from mmengine.config import Config
from mmengine.registry import DATASETS
from torch import Tensor, nn

from .class_map import (
    as_list,
    check_class_map,
    check_names,
    first_few,
    no_match,
    unknown_names,
)

Group = tuple[int, ...]


@dataclass
class ClassMatch:
    """Which columns of the two sides are the same class.

    Each class that is compared has a group of columns on either side: one column, or
    several where ``class_map`` names several classes of the teacher for one of the
    student's.

    Attributes:
        student: The student's groups; None for all its columns in their order.
        teacher: The teacher's groups of the same classes; None for all in order.
        num_student: Number of the student's classes.
        num_teacher: Number of the teacher's classes.
    """

    student: list[Group] | None = None
    teacher: list[Group] | None = None
    num_student: int | None = None
    num_teacher: int | None = None

    def select(
        self,
        student: Tensor,
        teacher: Tensor,
        dim: int = 1,
        activation: str = 'softmax',
    ) -> tuple[Tensor, Tensor]:
        """Take the common classes of both, in the same order, along ``dim``.

        A column after the named classes is the background, and is kept. What only one
        side knows is background to the other, so there its probability is added to the
        background of its own side. Without a background it is left out: scores of a
        sigmoid are independent of it, and a softmax is then over the common classes
        alone (see :meth:`mostly_known`).

        A group of several columns becomes one: the sum of their probabilities, or of
        sigmoids the largest.

        Args:
            student: The student's scores, with its classes along ``dim``.
            teacher: The teacher's scores, with its classes along ``dim``.
            dim: The dimension of the classes.
            activation: What turns the scores into probabilities: ``'softmax'``,
                ``'sigmoid'``, or ``'identity'`` where they are probabilities of one
                distribution. Sides with different ones are selected one by one.

        Returns:
            The scores of both, with equally many columns.
        """
        return (
            self.select_student(student, dim, activation),
            self.select_teacher(teacher, dim, activation),
        )

    def select_student(
        self, scores: Tensor, dim: int = 1, activation: str = 'softmax'
    ) -> Tensor:
        """The student's side of :meth:`select`."""
        return _select(scores, self.student, self.num_student, dim, activation)

    def select_teacher(
        self, scores: Tensor, dim: int = 1, activation: str = 'softmax'
    ) -> Tensor:
        """The teacher's side of :meth:`select`."""
        return _select(scores, self.teacher, self.num_teacher, dim, activation)

    def common_labels(self, labels: Tensor) -> Tensor:
        """Among the common classes, those that the teacher's labels are.

        Args:
            labels: Indices of the teacher's classes.

        Returns:
            Indices of the columns that :meth:`select` gives, -1 where the student does
            not know the class; of the same shape.
        """
        if self.teacher is None:
            return labels
        columns = [-1] * self.num_teacher
        for column, group in enumerate(self.teacher):
            for index in group:
                columns[index] = column
        return _on_device(tuple(columns), labels.device)[labels]

    def best(self, teacher: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The common class of which the teacher is surest.

        Args:
            teacher: Its probabilities of all its classes, without background,
                (rows, classes).

        Returns:
            The probability, and the index of the class for the student and for the
            teacher, each (rows,).
        """
        if self.teacher is None:
            probability, theirs = teacher.max(1)
            return probability, theirs, theirs
        columns = tuple(chain(*self.teacher))
        probability, index = _take(teacher, columns, 1).max(1)
        theirs = _on_device(columns, teacher.device)[index]
        ours = self.common_labels(theirs)
        if self.student is not None:
            ours = _on_device(tuple(chain(*self.student)), teacher.device)[ours]
        return probability, ours, theirs

    def describe(
        self, student: Sequence[str], teacher: Sequence[str], most: int | None = None
    ) -> str:
        """Say which classes are compared, under which names, and which are not.

        Args:
            student: The student's class names.
            teacher: The teacher's class names.
            most: Name at most so many of each kind, and count the rest.
        """
        student, teacher = as_list(student), as_list(teacher)
        ours = self.student or [(i,) for i in range(len(student))]
        theirs = self.teacher or [(i,) for i in range(len(teacher))]
        pairs = [
            (student[mine], ' + '.join(teacher[i] for i in group))
            for (mine,), group in zip(ours, theirs, strict=True)
        ]
        kinds = {
            'Classes that are compared': [name for name, _ in pairs],
            'Under other names': [f'{a} <- {b}' for a, b in pairs if a != b],
            'Only the student knows': _others(self.student, student),
            'Only the teacher knows': _others(self.teacher, teacher),
        }
        return ' '.join(
            f'{kind} ({len(names)}): {first_few(names, most)}.'
            for kind, names in kinds.items()
            if names
        )

    def mostly_known(
        self, teacher: Tensor, dim: int = 1, activation: str = 'softmax'
    ) -> Tensor | None:
        """Where the student knows what the teacher sees, for scores without background.

        Elsewhere a softmax over the common classes would tell apart the remainders of a
        probability that is on other classes.

        Args:
            teacher: All the teacher's scores, with its classes along ``dim``.
            dim: The dimension of the classes.
            activation: As in :meth:`select`.

        Returns:
            The shape of ``teacher`` without ``dim``, True where the common classes have
            at least half of the probability; None if the student knows all classes, or
            if they are those of a sigmoid, which are independent.
        """
        left_out = _others(self.teacher, range(self.num_teacher or 0))
        if not left_out or activation == 'sigmoid':
            return None
        known, unknown = (
            _as_one(teacher, tuple(columns), dim, activation).squeeze(dim)
            for columns in (chain(*self.teacher), left_out)
        )
        return known >= unknown


def _select(
    scores: Tensor,
    groups: list[Group] | None,
    num_classes: int | None,
    dim: int,
    activation: str,
) -> Tensor:
    """One column for each group, along ``dim``, and one for the background, if any."""
    if groups is None:
        return scores
    background = range(num_classes, scores.size(dim))
    if background and activation != 'sigmoid':
        background = (*_others(groups, range(num_classes)), *background)
    if background:
        groups = [*groups, tuple(background)]
    columns = []
    for are_single, some in groupby(groups, lambda group: len(group) == 1):
        if are_single:  # neighbours are taken together
            columns.append(_take(scores, tuple(chain(*some)), dim))
        else:
            columns += [_as_one(scores, group, dim, activation) for group in some]
    return columns[0] if len(columns) == 1 else torch.cat(columns, dim)


def _others(groups: list[Group] | None, of_classes: Sequence) -> list:
    """Those of a side's classes, in their order, that the other side does not know."""
    known = range(len(of_classes)) if groups is None else set(chain(*groups))
    return [x for i, x in enumerate(of_classes) if i not in known]


def _as_one(scores: Tensor, columns: Group, dim: int, activation: str) -> Tensor:
    """One column for several: the sum of their probabilities, as a score.

    Probabilities of a sigmoid are independent: there it is the largest.
    """
    taken = _take(scores, columns, dim)
    if activation == 'sigmoid':
        return taken.amax(dim, keepdim=True)
    # half precision would round the sum of many
    taken = taken.to(torch.promote_types(taken.dtype, torch.float32))
    if activation == 'identity':
        return taken.sum(dim, keepdim=True)
    return taken.logsumexp(dim, keepdim=True)


def _take(scores: Tensor, columns: Group, dim: int) -> Tensor:
    return scores.index_select(dim, _on_device(columns, scores.device))


@lru_cache
def _on_device(columns: Group, device: torch.device) -> Tensor:
    """Copied once: a GPU is waited for while numbers are copied to it."""
    return torch.tensor(columns, device=device)


def match_classes(
    student: Sequence[str] | None,
    teacher: Sequence[str] | None,
    class_map: Mapping[str, str | Sequence[str]] | None = None,
    class_match: str = 'strict',
) -> ClassMatch:
    """Match classes by name.

    Equal lists need no mapping; another order, or one list within the other, is mapped.

    Args:
        student: The student's class names; None if unknown.
        teacher: The teacher's class names; None if unknown.
        class_map: The teacher's name for each name of the student's that differs, or
            its several names for what is one class to the student; no name, ``[]``,
            if it does not know that class.
        class_match: ``'strict'``: one side must know all classes of the other.
            ``'shared'``: what both know is compared.

    Raises:
        ValueError: Neither list holds the other; it prints the first of both. Or a
            class is named twice, or ``class_map`` has names that are not there.
    """
    class_map = check_class_map(class_map)
    if student is None or teacher is None:
        if class_map or class_match == 'shared':
            raise ValueError(unknown_names(student, teacher))
        return ClassMatch()
    student, teacher = as_list(student), as_list(teacher)
    wanted = [class_map.get(name, [name]) for name in student]
    are_equal = wanted == [[name] for name in teacher]
    if class_map or not are_equal:
        check_names(student, teacher, class_map)
    if are_equal:
        return ClassMatch()
    common = [i for i, x in enumerate(wanted) if x and set(x) <= set(teacher)]
    match = ClassMatch(
        student=None if len(common) == len(wanted) else [(i,) for i in common],
        teacher=[tuple(map(teacher.index, wanted[i])) for i in common],
        num_student=len(student),
        num_teacher=len(teacher),
    )
    others = _others(match.student, student), _others(match.teacher, teacher)
    if not common or (all(others) and class_match != 'shared'):
        raise ValueError(no_match(student, teacher, *others, bool(class_map)))
    return match


def class_names_of_checkpoint(checkpoint: dict) -> list[str] | None:
    """The names in a checkpoint that ``load_checkpoint`` read; None if it has none."""
    meta = checkpoint.get('meta') or {}
    of_data = {k.lower(): v for k, v in (meta.get('dataset_meta') or {}).items()}
    # 'CLASSES': mmdet 2.x and mmseg 0.x.
    return as_list(of_data.get('classes') or meta.get('CLASSES') or ()) or None


def class_names_of_config(config: Config) -> Sequence[str] | None:
    """Names of the dataset that the config trains or tests on, through wrappers.

    Raises:
        ValueError: They are no list, so they have no order.
    """
    scope = config.get('default_scope')
    for loader in ('train_dataloader', 'val_dataloader', 'test_dataloader'):
        dataset = (config.get(loader) or {}).get('dataset')
        while dataset:
            classes = (dataset.get('metainfo') or {}).get('classes')
            kind, own_scope = dataset.get('type'), dataset.get('_scope_', scope)
            if classes is None and isinstance(kind, str):
                with (
                    suppress(RuntimeError),  # its library is not installed here
                    DATASETS.switch_scope_and_registry(own_scope) as registry,
                ):
                    classes = getattr(registry.get(kind), 'METAINFO', {}).get('classes')
            if classes is not None and not isinstance(classes, (str, list, tuple)):
                raise ValueError(
                    f'`{loader}`: the `classes` of a data set are a list of names, in '
                    f'the order of the labels, got {classes!r:.200}.'
                )
            if classes is not None:
                return tuple(as_list(classes))
            inner = dataset.get('dataset') or dataset.get('datasets')
            dataset = inner[0] if isinstance(inner, list) else inner
    return None


def check_number(names: Sequence[str], model: nn.Module) -> None:
    """Raise ValueError unless a head of the model has as many classes as names.

    Columns without a name would pass for the background.
    """
    heads = {
        module.num_classes
        for path, module in model.named_modules()
        if isinstance(getattr(module, 'num_classes', None), int) and 'rpn' not in path
    }
    # a panoptic detector has its things in one head and its stuff in another
    if heads and len(names) not in heads and not hasattr(model, 'semantic_head'):
        raise ValueError(
            f'The teacher has {len(names)} class names ({first_few(names)}), but its '
            f'head has {" or ".join(map(str, sorted(heads)))} classes. The names are '
            'those in its checkpoint, or else of the dataset in `teacher.config`: give '
            'the config and the checkpoint of one training.'
        )
