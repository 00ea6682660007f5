"""Match the classes of student and teacher by name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
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
    """Which columns of student and teacher are the same class.

    Each compared class has a group of columns on either side. A group is one column, or
    several if ``class_map`` maps several teacher classes to one student class.

    Attributes:
        student: The student's groups; None for all columns in order.
        teacher: The teacher's groups of the same classes; None for all in order.
        num_student: Number of student classes.
        num_teacher: Number of teacher classes.
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
        """Select the common classes of both sides, in the same order, along ``dim``.

        A column after the named classes is the background, and is kept. A class that
        only one side knows is background to the other, so its probability is added to
        the background of its own side. Without a background, or with a sigmoid, it is
        dropped: sigmoid scores are independent of it, and a softmax then covers only
        the common classes (see :meth:`mostly_known`).

        A group of several columns becomes one column: the sum of their probabilities,
        or for sigmoids the largest.

        Args:
            student: The student's scores.
            teacher: The teacher's scores.
            dim: The dimension of the classes.
            activation: What turns scores into probabilities, ``'softmax'`` or
                ``'sigmoid'``; ``'identity'`` if they are probabilities of one
                distribution. If the sides differ, call :meth:`select_student` and
                :meth:`select_teacher`.
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
        """Map the teacher's labels to indices of the columns that `select` returns.

        A class that the student does not know becomes -1.
        """
        if self.teacher is None:
            return labels
        columns = [-1] * self.num_teacher
        for column, group in enumerate(self.teacher):
            for index in group:
                columns[index] = column
        return _on_device(tuple(columns), labels.device)[labels]

    def best(self, teacher: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Find the common class with the highest teacher probability.

        ``teacher`` has the probabilities of all its classes, without background,
        (rows, classes). Returns that probability, and the class as an index of the
        student and of the teacher, each (rows,).
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

        ``most`` limits the names of each kind; the rest are counted.
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
        """Find where the student knows most of what the teacher sees.

        This is for scores without background. Elsewhere most of the probability is on
        other classes, and a softmax over the common ones would only see its remainders.

        Returns:
            A mask of ``teacher``'s shape without ``dim``, True where the common classes
            have at least half of the probability. None if the student knows all
            classes, or for a sigmoid, whose classes are independent.
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
    """Return a column per group along ``dim``, and one for the background, if any."""
    if groups is None:
        return scores
    background = range(num_classes, scores.size(dim))
    if background and activation != 'sigmoid':
        background = (*_others(groups, range(num_classes)), *background)
    if background:
        groups = [*groups, tuple(background)]
    columns = []
    for are_single, some in groupby(groups, lambda group: len(group) == 1):
        if are_single:  # take neighbours in one call
            columns.append(_take(scores, tuple(chain(*some)), dim))
        else:
            columns += [_as_one(scores, group, dim, activation) for group in some]
    return columns[0] if len(columns) == 1 else torch.cat(columns, dim)


def _others(groups: list[Group] | None, of_classes: Sequence) -> list:
    """Return the classes of one side that the other does not know, in order."""
    known = range(len(of_classes)) if groups is None else set(chain(*groups))
    return [x for i, x in enumerate(of_classes) if i not in known]


def _as_one(scores: Tensor, columns: Group, dim: int, activation: str) -> Tensor:
    """Merge several columns into one: the sum of their probabilities, as a score.

    Sigmoid probabilities are independent, so the largest is taken.
    """
    taken = _take(scores, columns, dim)
    if activation == 'sigmoid':
        return taken.amax(dim, keepdim=True)
    # half precision would round a sum of many
    taken = taken.to(torch.promote_types(taken.dtype, torch.float32))
    if activation == 'identity':
        return taken.sum(dim, keepdim=True)
    return taken.logsumexp(dim, keepdim=True)


def _take(scores: Tensor, columns: Group, dim: int) -> Tensor:
    return scores.index_select(dim, _on_device(columns, scores.device))


@lru_cache
def _on_device(columns: Group, device: torch.device) -> Tensor:
    """Cache the index tensor, since copying numbers to a GPU makes the CPU wait."""
    return torch.tensor(columns, device=device)


def match_classes(
    student: Sequence[str] | None,
    teacher: Sequence[str] | None,
    class_map: Mapping[str, str | Sequence[str]] | None = None,
    class_match: str = 'strict',
) -> ClassMatch:
    """Match classes by name.

    Equal lists need no mapping. Another order, or one list within the other, is mapped.

    Args:
        student: The student's class names; None if unknown.
        teacher: The teacher's class names; None if unknown.
        class_map: As in :class:`Teacher`; ``[]`` leaves a class out.
        class_match: As in :class:`Teacher`.

    Raises:
        ValueError: Neither list contains the other (the message shows the first names
            of both), a class is named twice, or ``class_map`` has unknown names.
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
        raise ValueError(no_match(student, teacher, others, bool(class_map)))
    return match


def class_names_of_checkpoint(checkpoint: dict) -> list[str] | None:
    """Class names in a checkpoint read by ``load_checkpoint``; None if it has none."""
    meta = checkpoint.get('meta') or {}
    of_data = {k.lower(): v for k, v in (meta.get('dataset_meta') or {}).items()}
    # 'CLASSES': mmdet 2.x and mmseg 0.x.
    return as_list(of_data.get('classes') or meta.get('CLASSES') or ()) or None


def inner_datasets(dataset: Mapping | None) -> Iterator[Mapping]:
    """Yield a data set's config without wrappers; for a concatenation, each part."""
    if not isinstance(dataset, Mapping):
        return
    parts = [dataset.get('dataset'), *(dataset.get('datasets') or ())]
    if not any(parts):
        yield dataset
    for part in parts:
        yield from inner_datasets(part)


def dataset_class(dataset: Mapping, scope: str | None) -> type | None:
    """Return the class of a data set's config; None if its library is not installed."""
    kind, scope = dataset.get('type'), dataset.get('_scope_', scope)
    with suppress(RuntimeError), DATASETS.switch_scope_and_registry(scope) as registry:
        return registry.get(kind) if isinstance(kind, str) else kind
    return None


def class_names_of_config(config: Config) -> Sequence[str] | None:
    """Class names of the data set that a config trains or tests on, inside wrappers.

    Raises:
        ValueError: They are not a list, so they have no order.
    """
    loaders = 'train_dataloader', 'val_dataloader', 'test_dataloader'
    found = (class_names_of_loader(config, loader) for loader in loaders)
    return next((names for names in found if names is not None), None)


def class_names_of_loader(config: Config, loader: str) -> Sequence[str] | None:
    """Like :func:`class_names_of_config`, for one data loader."""
    dataset = next(inner_datasets((config.get(loader) or {}).get('dataset')), {})
    classes = (dataset.get('metainfo') or {}).get('classes')
    if classes is None:
        cls = dataset_class(dataset, config.get('default_scope'))
        classes = getattr(cls, 'METAINFO', {}).get('classes')
    if classes is not None and not isinstance(classes, (str, list, tuple)):
        raise ValueError(
            f'`{loader}`: the `classes` of a data set must be a list of names, in the '
            f'order of the labels, got {classes!r:.200}.'
        )
    return None if classes is None else tuple(as_list(classes))


def check_number(names: Sequence[str], model: nn.Module) -> None:
    """Raise ValueError unless a head of the model has as many classes as names.

    Columns without a name would be taken for the background.
    """
    heads = {
        module.num_classes
        for path, module in model.named_modules()
        if isinstance(getattr(module, 'num_classes', None), int) and 'rpn' not in path
    }
    # a panoptic detector has things in one head and stuff in another
    if heads and len(names) not in heads and not hasattr(model, 'semantic_head'):
        raise ValueError(
            f'The teacher has {len(names)} class names ({first_few(names)}), but its '
            f'head has {" or ".join(map(str, sorted(heads)))} classes. The names '
            'come from its checkpoint, or else from the dataset in `teacher.config`: '
            'give the config and the checkpoint of the same training.'
        )
