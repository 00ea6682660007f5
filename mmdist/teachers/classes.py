"""Classes of student and teacher, matched by name."""

from __future__ import annotations

import difflib
import itertools
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

    Each class that is compared has a group of columns on either side: one column, or
    several where ``class_map`` names several classes of the teacher for one of the
    student's.

    Attributes:
        student: The student's groups; None for all its columns in their order.
        teacher: The teacher's groups of the same classes; None for all in order.
        num_student: Number of the student's classes.
        num_teacher: Number of the teacher's classes.
    """

    student: list[tuple[int, ...]] | None = None
    teacher: list[tuple[int, ...]] | None = None
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

        See :meth:`select_student` and :meth:`select_teacher`, for sides with different
        activations.

        Args:
            student: The student's scores, with its classes along ``dim``.
            teacher: The teacher's scores, with its classes along ``dim``.
            dim: The dimension of the classes.
            activation: What turns the scores into probabilities: ``'softmax'``,
                ``'sigmoid'``, or ``'identity'`` where they are probabilities of one
                distribution.

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
        """Take the common classes of the student's scores.

        A column after the named classes is the background, and is kept. What only one
        side knows is background to the other, so there its probability is added to the
        background of its own side. Without a background it is left out: scores of a
        sigmoid are independent of it, and a softmax is then over the common classes
        alone (see :meth:`mostly_known`).

        A group of several columns becomes one: the sum of their probabilities, or of
        sigmoids the largest.

        Args:
            scores: Scores with the classes along ``dim``.
            dim: The dimension of the classes.
            activation: As in :meth:`select`.
        """
        return _select(scores, self.student, self.num_student, dim, activation)

    def select_teacher(
        self, scores: Tensor, dim: int = 1, activation: str = 'softmax'
    ) -> Tensor:
        """Take the common classes of the teacher's scores; see :meth:`select_student`.

        Args:
            scores: Scores with the classes along ``dim``.
            dim: The dimension of the classes.
            activation: As in :meth:`select`.
        """
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
        columns = tuple(itertools.chain(*self.teacher))
        ours = self.student or [(i,) for i in range(len(self.teacher))]
        students = tuple(
            mine
            for (mine,), group in zip(ours, self.teacher, strict=True)
            for _ in group
        )
        probability, index = _take(teacher, columns, 1).max(1)
        return (
            probability,
            _on_device(students, teacher.device)[index],
            _on_device(columns, teacher.device)[index],
        )

    def describe(self, student: Sequence[str], teacher: Sequence[str]) -> str:
        """Say which classes are compared and which are not.

        Args:
            student: The student's class names.
            teacher: The teacher's class names.
        """
        student, teacher = _names(student), _names(teacher)
        ours = self.student or [(i,) for i in range(len(student))]
        theirs = self.teacher or [(i,) for i in range(len(teacher))]
        pairs = []
        for (mine,), group in zip(ours, theirs, strict=True):
            names = ' + '.join(teacher[i] for i in group)
            same = names == student[mine]
            pairs.append(names if same else f'{student[mine]} <- {names}')
        text = f'Classes that are compared ({len(pairs)}): {", ".join(pairs)}.'
        for whose, names, groups in (
            ('student', student, self.student),
            ('teacher', teacher, self.teacher),
        ):
            others = [names[i] for i in _others(groups, len(names))]
            if others:
                text += f' Only the {whose} knows ({len(others)}): {", ".join(others)}.'
        return text

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
        others = _others(self.teacher, self.num_teacher)
        if not others or activation == 'sigmoid':
            return None
        known, unknown = (
            _as_one(teacher, columns, dim, activation).squeeze(dim)
            for columns in (tuple(itertools.chain(*self.teacher)), others)
        )
        return known >= unknown


def _select(
    scores: Tensor,
    groups: list[tuple[int, ...]] | None,
    num_classes: int | None,
    dim: int,
    activation: str,
) -> Tensor:
    if groups is None:
        return scores
    background = tuple(range(num_classes, scores.size(dim)))
    if background and activation != 'sigmoid':
        background = (*_others(groups, num_classes), *background)
    groups = [*groups, background] if background else groups
    if all(len(group) == 1 for group in groups):
        return _take(scores, tuple(itertools.chain(*groups)), dim)
    columns = []
    for is_one, some in itertools.groupby(groups, lambda group: len(group) == 1):
        if is_one:  # neighbours are taken together
            columns.append(_take(scores, tuple(itertools.chain(*some)), dim))
        else:
            columns += [_as_one(scores, group, dim, activation) for group in some]
    return torch.cat(columns, dim)


def _others(
    groups: list[tuple[int, ...]] | None, num_classes: int | None
) -> tuple[int, ...]:
    """The columns of classes that the other side does not know."""
    if groups is None:
        return ()
    known = set(itertools.chain(*groups))
    return tuple(i for i in range(num_classes) if i not in known)


def _as_one(
    scores: Tensor, columns: tuple[int, ...], dim: int, activation: str
) -> Tensor:
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


def _take(scores: Tensor, columns: tuple[int, ...], dim: int) -> Tensor:
    return scores.index_select(dim, _on_device(columns, scores.device))


@lru_cache
def _on_device(columns: tuple[int, ...], device: torch.device) -> Tensor:
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
        ValueError: Neither list holds the other; it prints both. Or ``class_map`` has
            names that are not there, or one name of the teacher's for two classes.
    """
    class_map = class_map or {}
    if student is None or teacher is None:
        if class_map or class_match == 'shared':
            raise ValueError(_cannot_translate(student, teacher))
        return ClassMatch()
    student, teacher = _names(student), _names(teacher)
    wanted = [_names(class_map.get(name, name)) for name in student]
    _check_class_map(class_map, student, teacher)
    if wanted == [[name] for name in teacher]:
        return ClassMatch()
    common = [
        i for i, names in enumerate(wanted) if names and set(names) <= set(teacher)
    ]
    match = ClassMatch(
        student=None if len(common) == len(wanted) else [(i,) for i in common],
        teacher=[tuple(map(teacher.index, wanted[i])) for i in common],
        num_student=len(student),
        num_teacher=len(teacher),
    )
    one_in_the_other = match.student is None or not _others(match.teacher, len(teacher))
    if common and (class_match == 'shared' or one_in_the_other):
        return match
    only_student = [student[i] for i in range(len(student)) if i not in common]
    only_teacher = [teacher[i] for i in _others(match.teacher, len(teacher))]
    raise ValueError(
        'The classes of student and teacher cannot be matched by name.\n'
        f'Student ({len(student)}): {student}\nTeacher ({len(teacher)}): {teacher}\n'
        f'Only the student has {sorted(only_student)}, only the teacher '
        f'{sorted(only_teacher)}. If they are the same under other names, say so: '
        "`teacher.class_map=dict(<student's>=<teacher's>, ...)`"
        f'{_close_names(only_student, only_teacher)}.'
        + (
            " To compare only what both know, `teacher.class_match='shared'`."
            if common
            else ''
        )
    )


def _close_names(student: Sequence[str], teacher: Sequence[str]) -> str:
    """Names that may mean the same, as a ``class_map``."""
    bare = {name.strip().casefold().replace('_', ' '): name for name in teacher}
    close = {}
    for name in student:
        key = name.strip().casefold().replace('_', ' ')
        for found in difflib.get_close_matches(key, bare, n=1, cutoff=0.7):
            close[name] = bare[found]
    return f'; close names are {close}' if close else ''


def _names(classes: Sequence[str]) -> list[str]:
    """The names as a list; the name of a single class may stand alone."""
    return [classes] if isinstance(classes, str) else list(classes)


def _cannot_translate(
    student: Sequence[str] | None, teacher: Sequence[str] | None
) -> str:
    whose = 'the teacher' if student is not None else 'the student'
    return (
        '`teacher.class_map` translates class names, but the class names of '
        f'{"both" if student is teacher is None else whose} are unknown. Those of the '
        'student are the `metainfo` of the dataset that the Runner trains on. Those of '
        'the teacher are in its checkpoint, or come from the dataset in the '
        '`train_dataloader` of `teacher.config`: give the whole config, with '
        "`metainfo=dict(classes=(...))` in its dataset, not the model's alone."
    )


def _check_class_map(
    class_map: Mapping[str, str | Sequence[str]],
    student: list[str],
    teacher: list[str],
) -> None:
    mapped = set(itertools.chain(*map(_names, class_map.values())))
    lacking = {
        'the student': sorted(set(class_map) - set(student)),
        'the teacher': sorted(mapped - set(teacher)),
    }
    lacks = [f'{who} has no class {names}' for who, names in lacking.items() if names]
    if lacks:
        raise ValueError(
            '`teacher.class_map` maps class names of the student to class names of the '
            f'teacher, but {" and ".join(lacks)}.\n'
            f'Student: {student}\nTeacher: {teacher}'
        )
    for name in mapped:
        same = [own for own in student if name in _names(class_map.get(own, own))]
        if len(same) > 1:
            raise ValueError(
                f"`teacher.class_map` compares the student's {same} with one class of "
                f'the teacher, {name!r}. Two columns of the same scores would distort '
                "every softmax: map one of the student's classes to it."
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
