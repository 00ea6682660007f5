"""The base class of all comparisons between a student and its teacher."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from mmengine.model import BaseModule
from torch import Tensor, nn

from mmdist.families import name_of
from mmdist.lookup import by_class_name, check_arguments, did_you_mean
from mmdist.losses import DISTLoss, Terms, as_rows
from mmdist.registry import MODELS, class_of
from mmdist.step import Step
from mmdist.teachers import StoredTeacher, Teacher


@dataclass
class Pair:
    """One term of a comparison: what the loss is called with.

    Attributes:
        student: Logits, (rows, classes) or (N, classes, *spatial).
        teacher: Logits of the same shape.
        mask: True where a row counts, (rows,) or (N, *spatial); None counts all.
        weight: Factor of this term.
        name: Terms with the same name are summed and logged as one.
        row_weight: Weight of each row, (rows,), for a loss that weights rows.
        activation: What turns these logits into probabilities, if not the activation
            of the student's head; 'identity' if they already are probabilities.
    """

    student: Tensor
    teacher: Tensor
    mask: Tensor | None = None
    weight: float = 1.0
    name: str = ''
    activation: str | None = None
    row_weight: Tensor | None = None


# Advice for a pair whose shapes differ.
OTHER_CLASSES = (
    'The rows are the same, so the classes differ. Classes are matched by name if the '
    'names of both sides are known; the log says whose are not. Use a teacher whose '
    "checkpoint or dataset names its classes, or one with the student's classes."
)
OTHER_ROWS = 'Use a teacher with the same strides and the same anchors per location.'
# Losses that take logits, and how to recover these from probabilities: log-odds for a
# sigmoid, logarithms for a softmax.
LOSSES_OF_LOGITS: dict[str, Callable[[Tensor], Tensor]] = {
    'BinaryKLDivLoss': partial(torch.logit, eps=1e-6),
    'KnowledgeDistillationKLDivLoss': lambda p: p.clamp(min=1e-6).log(),
}


class Comparison(BaseModule):
    """Select outputs of student and teacher and yield aligned pairs, in three steps.

    A subclass names the modules it needs (:meth:`student_modules`), and defines how to
    :meth:`record` the student's logits, :meth:`ask` the teacher for the counterpart
    and :meth:`pair` the two. docs/own_comparison.md has an example. To support teachers
    with ``views``, a comparison of locations defines ``mean_of_views(step, asked,
    mirrored)``: the mean of what :meth:`ask` returned for a batch and for the batch
    mirrored left to right.

    Args:
        loss: Config of the loss; ``mmdist.DISTLoss`` if omitted. Any module whose
            forward takes (student logits, teacher logits), and optionally ``mask``;
            without ``mask`` it gets only the rows that count. A DISTLoss without an
            ``activation`` gets :meth:`activation`. Where probabilities are compared,
            ``mmdist.BinaryKLDivLoss`` gets their log-odds, mmdet's KL their logarithms,
            and any other loss the probabilities.

    Attributes:
        families: The models that the comparison supports, for error messages.
        asks_first: Whether :meth:`ask` needs nothing from the student. It is then
            called before the student runs, with ``recorded=None``, to save memory.
        learns_from_answers: Whether it can learn from a :class:`StoredTeacher`, which
            has no modules, only the answers in ``step.teacher_features``.
        loss: The loss, complete after :meth:`bind`.
    """

    families = 'models that its docstring names'
    asks_first = False
    learns_from_answers = False

    def __init__(self, loss: dict | None = None) -> None:
        super().__init__()
        self._loss_cfg = dict(loss or dict(type='mmdist.DISTLoss'))
        self.loss = MODELS.build(dict(self._loss_cfg))
        takes = inspect.signature(self.loss.forward).parameters
        self._loss_takes_mask = 'mask' in takes
        self._has_warned = False

    # ---- what a subclass fills in ------------------------------------------------

    def activation(self, student: nn.Module) -> str:
        """The default activation of DISTLoss: that of the student's head."""
        return 'softmax'

    def student_modules(self, student: nn.Module) -> Sequence[nn.Module]:
        """Modules of the student to record while it computes its own loss.

        Raises:
            ValueError: The student has no such module.
        """
        raise NotImplementedError

    def teacher_modules(self, teacher: nn.Module) -> Sequence[nn.Module]:
        """Modules of the teacher to record while its features are computed."""
        return ()

    def check_pair(self, student: nn.Module, teacher: nn.Module) -> None:
        """Stop before the first step if the two cannot be compared.

        Raises:
            ValueError: They cannot be compared; the message says why.
        """

    def record(self, step: Step):
        """The student's side, from the calls recorded in its own loss pass."""
        raise NotImplementedError

    def ask(self, step: Step, recorded: Any):
        """The teacher's side, from the cheapest forward that gives the counterpart."""
        raise NotImplementedError

    def pair(self, step: Step, recorded, asked) -> Iterable[Pair]:
        """Logits of both sides, rows in the same order, and which rows count."""
        raise NotImplementedError

    # ---- shared by all -----------------------------------------------------------

    def unsupported(self, model: nn.Module, reason: str) -> ValueError:
        """The error for a model that has nothing to compare here.

        Args:
            model: The model.
            reason: The reason, a clause such as 'it has no ``neck``'.
        """
        return ValueError(
            f'{type(self).__name__} cannot compare a {name_of(model)}: {reason}. '
            f'It compares {self.families}. For any other model write your own '
            'comparison; docs/own_comparison.md shows how.'
        )

    def bind(self, student: nn.Module, teacher: Teacher) -> None:
        """Check the student and complete the loss, when the model is built.

        Modules that a subclass creates here become part of the student.

        Args:
            student: The student, just built.
            teacher: The teacher, not yet built or loaded.

        Raises:
            ValueError: The student has nothing to compare, or the teacher is stored
                and the comparison needs its modules.
        """
        if isinstance(teacher, StoredTeacher) and not self.learns_from_answers:
            raise ValueError(
                f"{type(self).__name__} needs the teacher's modules, but a stored "
                'teacher has none. Use mmdist.Detections or mmdist.Boxes for the '
                'answers of a detector, mmdist.SegLogits for those of a segmentor.'
            )
        self.student_modules(student)
        if isinstance(self.loss, DISTLoss):
            activation = self.activation(student)
            self.loss = MODELS.build({'activation': activation, **self._loss_cfg})

    def check_views(self) -> None:
        """Stop before the first step if a teacher with ``views`` cannot be compared.

        Raises:
            ValueError: The comparison has no ``mean_of_views``.
        """
        if not hasattr(self, 'mean_of_views'):
            raise ValueError(
                "`teacher.views` averages the teacher's answers at each location, but "
                f'{type(self).__name__} does not compare locations. Use '
                'mmdist.SegLogits or mmdist.DenseLogits, or omit `views`.'
            )

    def forward(self, name: str, pairs: Iterable[Pair]) -> dict[str, Tensor]:
        """Compute the distillation losses of one batch.

        Args:
            name: The entry's name in ``distill``.
            pairs: The result of :meth:`pair`.

        Returns:
            ``loss_<name>`` and, if the loss computes them, the mean correlations
            ``<name>_inter`` and ``<name>_intra``, which mmengine logs but does not add.
        """
        terms: dict[str, list[Tensor]] = {}
        for pair in pairs:
            key = '_'.join(filter(None, (name, pair.name)))
            found = self._compute(pair)
            terms.setdefault(f'loss_{key}', []).append(pair.weight * found.loss)
            for relation in ('inter', 'intra'):
                correlation = getattr(found, relation)
                if correlation is not None:  # None: the term is left out
                    terms.setdefault(f'{key}_{relation}', []).append(correlation)
        return {
            key: sum(values) if key.startswith('loss_') else sum(values) / len(values)
            for key, values in terms.items()
        }

    def _compute(self, pair: Pair) -> Terms:
        ours, theirs = tuple(pair.student.shape), tuple(pair.teacher.shape)
        if ours != theirs:
            same_rows = (ours[0], *ours[2:]) == (theirs[0], *theirs[2:])
            raise ValueError(
                f"{type(self).__name__}: the student's logits have the shape {ours}, "
                f"the teacher's {theirs}. {OTHER_CLASSES if same_rows else OTHER_ROWS}"
            )
        if not isinstance(self.loss, DISTLoss):
            return Terms(self._plain_loss(pair), None, None)
        few_columns = ours[1] <= 2 and self.loss.beta
        if few_columns and not self._has_warned:
            self._has_warned = True
            one, two = ('one channel', 'undefined'), ('two classes', 'always 1 or -1')
            columns, correlation = one if ours[1] == 1 else two
            warnings.warn(
                f'{type(self).__name__} compares {columns} per row: the inter-class '
                f'correlation of such a row is {correlation}, so it teaches nothing. '
                'The term is left out, as with `beta=0`; the intra-class term remains.',
                stacklevel=2,
            )
        return self.loss.terms(
            pair.student,
            pair.teacher,
            pair.mask,
            activation=None if 'activation' in self._loss_cfg else pair.activation,
            beta=0.0 if few_columns else None,
        )

    def _plain_loss(self, pair: Pair) -> Tensor:
        """The loss of a pair, for a loss without correlations."""
        student, teacher = pair.student, pair.teacher
        to_logits = by_class_name(self.loss, LOSSES_OF_LOGITS)
        if to_logits is not None and pair.activation == 'identity':
            student, teacher = to_logits(student), to_logits(teacher)
        if self._loss_takes_mask:
            return self.loss(student, teacher, mask=pair.mask)
        student, teacher = as_rows(student), as_rows(teacher)
        if pair.mask is not None:
            mask = pair.mask.flatten()
            student, teacher = student[mask], teacher[mask]
        if not len(student):  # the mean of nothing is NaN in most losses
            return pair.student.sum() * 0
        return self.loss(student, teacher)

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args) -> None:
        # A plain student's checkpoint has no parameters of distillation: those here
        # (the convolutions of Features) keep their initial values.
        if not any(key.startswith(prefix) for key in state_dict):
            state_dict.update({prefix + k: v for k, v in self.state_dict().items()})
        super()._load_from_state_dict(state_dict, prefix, *args)


def check_choice(name: str, value: Any, *known: str) -> None:
    """Raise ValueError unless the option ``name`` has one of its known values."""
    if value not in known:
        *others, last = map(repr, known)
        either = f'{", ".join(others)} or {last}'
        raise ValueError(f'{name} must be {either}, got {value!r}.')


# Removed kinds and arguments, and what to take instead.
REMOVED = {
    'mmdist.BoxLogits': 'mmdist.BoxLogits was removed: it lost accuracy. Use '
    'mmdist.Detections, which works with any detector.',
    'DISTLoss.damping': '`damping` of DISTLoss was removed: omit it. `model.balance`, '
    'which is on by default, replaces it and works better.',
}


def build_comparison(name: str, cfg: dict) -> Comparison:
    """Build an entry of ``distill``.

    Args:
        name: The entry's name.
        cfg: Its config, with a ``type``.

    Raises:
        ValueError: The kind, the loss or an argument does not exist.
    """
    _check(f'distill.{name}', cfg, 'comparison')
    if cfg.get('loss') is not None:
        _check(f'distill.{name}.loss', cfg['loss'], 'loss')
    return MODELS.build(dict(cfg))


def _check(where: str, cfg: Any, what: str) -> None:
    """Raise ValueError unless ``cfg`` can build a ``'comparison'`` or a ``'loss'``."""
    if not isinstance(cfg, Mapping):
        raise ValueError(f'`{where}` must be a dict with a `type`, got {cfg!r:.200}.')
    kind, cls = cfg.get('type'), class_of(cfg)
    for name in (str(kind), *(f'{getattr(cls, "__name__", "")}.{key}' for key in cfg)):
        if name in REMOVED:
            raise ValueError(f'`{where}`: {REMOVED[name]}')
    base = Comparison if what == 'comparison' else nn.Module
    if not (inspect.isclass(cls) and issubclass(cls, base)):
        classes = {n: c for n, c in MODELS.module_dict.items() if inspect.isclass(c)}
        known = sorted(
            f'mmdist.{name}'
            for name, c in classes.items()
            if (issubclass(c, base) if base is Comparison else 'losses' in c.__module__)
        )
        raise ValueError(
            f'`{where}` has the unknown {what} type {kind!r}.'
            f'{did_you_mean(kind, known)} mmdist has {", ".join(known)}; for your own '
            'see `custom_imports` and docs/own_comparison.md.'
        )
    check_arguments(where, cls, cfg)
