"""The base of everything that can be compared between a student and its teacher."""

from __future__ import annotations

import difflib
import inspect
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mmengine.model import BaseModule
from torch import Tensor, nn

from mmdist.losses import DISTLoss
from mmdist.registry import MODELS
from mmdist.step import Step
from mmdist.teachers.teacher import Teacher


@dataclass
class Pair:
    """One term of a comparison: what the loss is called with.

    Attributes:
        student: Logits, (rows, classes) or (N, classes, *spatial).
        teacher: Logits of the same shape.
        mask: True where a row counts, (rows,) or (N, *spatial); None counts all.
        weight: Factor of this term.
        name: The terms of one name are added up, and logged as one.
    """

    student: Tensor
    teacher: Tensor
    mask: Tensor | None = None
    weight: float = 1.0
    name: str = ''


class Comparison(BaseModule):
    """What of the student is compared with what of the teacher, in three steps.

    A subclass says which modules it needs (:meth:`student_modules`), and how to
    :meth:`record` the student's logits, :meth:`ask` the teacher for the counterpart
    and :meth:`pair` the two.

    Args:
        loss: Config of the loss, any module with a forward of (student logits, teacher
            logits) or (student logits, teacher logits, mask). If it has no ``mask``, it
            is called with the rows that count. Left out, it is ``mmdist.DISTLoss``
            with the activation of the student's head.

    Attributes:
        families: The models that the comparison supports, for its messages.
        asks_first: Whether :meth:`ask` needs nothing of the student. It is then called
            before the student runs, with None for ``recorded``, which takes less
            memory.
    """

    families = 'models that its docstring names'
    asks_first = False

    def __init__(self, loss: dict | None = None) -> None:
        super().__init__()
        self._loss_cfg = dict(loss or dict(type='mmdist.DISTLoss'))

    # ---- what a subclass fills in ------------------------------------------------

    def activation(self, student: nn.Module) -> str:
        """The default activation of DISTLoss, as the student's head has it."""
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
            ValueError: It says what was looked for in the teacher.
        """

    def record(self, step: Step):
        """The student's side, from the calls recorded in its own loss pass."""
        raise NotImplementedError

    def ask(self, step: Step, recorded: Any):
        """The teacher's side, by the cheapest forward that gives the counterpart."""
        raise NotImplementedError

    def pair(self, step: Step, recorded, asked) -> Iterable[Pair]:
        """Logits of both sides, rows in the same order, with the rows that count."""
        raise NotImplementedError

    # ---- the same for all --------------------------------------------------------

    def unsupported(self, model: nn.Module, looked_for: str) -> ValueError:
        """The error for a model that has nothing to compare here."""
        return ValueError(
            f'{type(self).__name__} cannot compare a {type(model).__name__}: it looked '
            f'for {looked_for}. It compares {self.families}. For any other model write '
            'a comparison of your own, docs/own_comparison.md shows how.'
        )

    def bind(self, student: nn.Module, teacher: Teacher) -> None:
        """Check the student and build the loss for its activation.

        Args:
            student: The student, just built.
            teacher: The teacher, neither built nor loaded.

        Raises:
            ValueError: The student has nothing to compare.
        """
        self.student_modules(student)
        cfg = dict(self._loss_cfg)
        if cfg['type'] in ('mmdist.DISTLoss', 'DISTLoss'):
            cfg.setdefault('activation', self.activation(student))
        self.loss = MODELS.build(cfg)
        self._loss_takes_mask = (
            'mask' in inspect.signature(self.loss.forward).parameters
        )

    def forward(self, step: Step, name: str) -> dict[str, Tensor]:
        """Compute the distillation losses of one batch.

        Args:
            step: The batch, with the student's recorded calls and the teacher.
            name: The entry's name in ``distill``.

        Returns:
            ``loss_<name>`` and, where the loss knows them, the mean correlations
            ``<name>_inter`` and ``<name>_intra``, which mmengine logs and does not add.
        """
        recorded = self.record(step)
        asked = step.answer(self, recorded)
        terms: dict[str, list[Tensor]] = {}
        for pair in self.pair(step, recorded, asked):
            self._leave_out_inter_class(pair.student.shape[1])
            key = '_'.join(filter(None, (name, pair.name)))
            loss = pair.weight * self._compute(pair)
            terms.setdefault(f'loss_{key}', []).append(loss)
            for relation in ('inter', 'intra'):
                correlation = getattr(self.loss, f'{relation}_corr', None)
                if correlation is not None:
                    terms.setdefault(f'{key}_{relation}', []).append(correlation)
        return {
            key: sum(values) if key.startswith('loss_') else sum(values) / len(values)
            for key, values in terms.items()
        }

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args) -> None:
        # The checkpoint of a plain student knows nothing of distillation: what is
        # learned here (Features has convolutions) starts as it is.
        if not any(key.startswith(prefix) for key in state_dict):
            state_dict.update({prefix + k: v for k, v in self.state_dict().items()})
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _leave_out_inter_class(self, num_columns: int) -> None:
        """Two classes have no relation but more or less; one has none at all."""
        if num_columns <= 2 and isinstance(self.loss, DISTLoss) and self.loss.beta:
            self.loss.beta = 0.0
            what = 'one channel' if num_columns == 1 else 'two classes'
            value = 'undefined' if num_columns == 1 else '1 or -1, whatever they are'
            warnings.warn(
                f'{type(self).__name__} compares {what} per row: the inter-class '
                f'correlation of such a row is {value}, and gives nothing to learn '
                'from. The term is left out, as with `beta=0`; the intra-class term '
                'remains.',
                stacklevel=2,
            )

    def _compute(self, pair: Pair) -> Tensor:
        if pair.student.shape != pair.teacher.shape:
            raise ValueError(
                f'{type(self).__name__}: the student gives logits of shape '
                f'{tuple(pair.student.shape)}, the teacher of '
                f'{tuple(pair.teacher.shape)}. '
                'Take a teacher with the same strides and, per location, the same '
                'anchors; classes are matched by name, see `class_map`.'
            )
        if self._loss_takes_mask:
            return self.loss(pair.student, pair.teacher, mask=pair.mask)
        student, teacher = rows(pair.student), rows(pair.teacher)
        if pair.mask is not None:
            student, teacher = (
                student[pair.mask.flatten()],
                teacher[pair.mask.flatten()],
            )
        if not len(student):  # the mean of nothing is NaN in most losses
            return pair.student.sum() * 0
        return self.loss(student, teacher)


def build_comparison(name: str, cfg: dict) -> Comparison:
    """Build an entry of ``distill``.

    Args:
        name: The entry's name.
        cfg: Its config, with a ``type``.

    Raises:
        ValueError: There is no such kind, or it has no such argument.
    """
    kinds = sorted(
        f'mmdist.{key}'
        for key, cls in MODELS.module_dict.items()
        if inspect.isclass(cls) and issubclass(cls, Comparison)
    )
    kind = cfg.get('type') if isinstance(cfg, Mapping) else None
    with MODELS.switch_scope_and_registry(None) as registry:
        cls = registry.get(kind) if isinstance(kind, str) else kind
    if not (inspect.isclass(cls) and issubclass(cls, Comparison)):
        raise ValueError(
            f'`distill.{name}` says what to compare by its `type`, but there is no '
            f'{kind!r} that compares.{_did_you_mean(str(kind).split(".")[-1], kinds)} '
            f'mmdist has {", ".join(kinds)}; for one of your own see `custom_imports` '
            'and docs/own_comparison.md.'
        )
    takes = inspect.signature(cls).parameters
    if not any(p.kind is p.VAR_KEYWORD for p in takes.values()):
        for key in cfg.keys() - takes.keys() - {'type', '_scope_'}:
            raise ValueError(
                f'`distill.{name}`: {cls.__name__} has no argument {key!r}.'
                f'{_did_you_mean(key, takes)} It takes {", ".join(takes)}.'
            )
    return MODELS.build(dict(cfg))


def _did_you_mean(word: str, known: Iterable[str]) -> str:
    bare = {name.rsplit('.')[-1]: name for name in known}
    close = difflib.get_close_matches(word, bare, n=1)
    return f' Did you mean {bare[close[0]]!r}?' if close else ''


def rows(logits: Tensor) -> Tensor:
    """(N, classes, *spatial) -> (N * prod(spatial), classes)."""
    return logits.movedim(1, -1).flatten(0, -2)
