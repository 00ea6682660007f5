"""The distiller: the student's own class, with a loss that sees the teacher too."""

from __future__ import annotations

import functools
import re
from copy import deepcopy

from mmengine.logging import MessageHub, print_log
from torch import Tensor, nn

from ._environment import check_ops
from .comparisons.base import Comparison, build_comparison
from .comparisons.default import default_for, default_for_pair
from .registry import MODELS
from .step import Step
from .teachers import ClassMatch, Teacher


@MODELS.register_module(name='Distiller')
def build_distiller(
    student: dict,
    teacher: dict,
    distill: dict[str, dict] | None = None,
    **student_overrides,
) -> nn.Module:
    """Build a student that is distilled while it trains.

    The result *is* the student: an instance of a subclass of its class, with its
    parameter names, state dict, ``predict`` and data_preprocessor. Only ``loss`` and
    ``init_weights`` know the teacher, so testing and export need neither its config nor
    its weights.

    Args:
        student: Config of the student model.
        teacher: Arguments of :class:`Teacher`: ``config``, ``checkpoint``, ...
        distill: What to compare, a dict of name -> config of a comparison. If omitted,
            it is named ``dist`` and chosen for the pair once the teacher is loaded.
        student_overrides: Entries that replace those of ``student``. The APIs of mmseg
            set ``pretrained`` and ``train_cfg`` on whatever model they are given. Only
            a ``data_preprocessor``, which the Runner adds where the model has none,
            does not replace that of ``student``.

    Returns:
        The student.

    Raises:
        ValueError: The student's family is not supported, or ``distill`` is malformed.
        RuntimeError: mmcv or its compiled ops are missing.

    Example:
        In a config::

            model = dict(
                _delete_=True,
                type='mmdist.Distiller',
                student=_base_.model,
                teacher=dict(config='teacher.py', checkpoint='teacher.pth'))
    """
    check_ops()
    if student.get('data_preprocessor') is not None:
        student_overrides.pop('data_preprocessor', None)
    model = MODELS.build(deepcopy({**student, **student_overrides}))
    is_default = distill is None
    if is_default:
        distill = dict(dist=default_for(model))
    _check_names(distill)
    teacher = Teacher(**teacher)
    comparisons = nn.ModuleDict(
        {name: build_comparison(name, cfg) for name, cfg in distill.items()}
    )
    for comparison in comparisons.values():
        comparison.bind(model, teacher)
    model.__class__ = distilled_class(type(model))
    model.teacher = teacher
    model.distill = comparisons
    model._is_default = is_default
    model._dataset_meta_before = _dataset_meta()
    return model


def _check_names(distill: dict) -> None:
    for name in distill:
        if not name.isidentifier() or 'loss' in name:
            raise ValueError(
                f'`distill` has an entry {name!r}. Names are identifiers without '
                '"loss" in them: they become the keys loss_<name> (added to the '
                'total) and <name>_inter, <name>_intra (only logged).'
            )


class DistilledMixin:
    """What a student's class gains by being distilled."""

    teacher: Teacher
    distill: nn.ModuleDict
    distill_factor = 1.0  # DistillScheduleHook changes it; at 0 the teacher rests
    class_match: ClassMatch | None = None
    why_default = ''  # why that comparison was chosen, if `distill` is omitted
    _is_default = False
    _is_checked = False

    def init_weights(self) -> None:
        """Initialise the student as usual, then load the teacher.

        The Runner calls this to train, not to test.
        """
        super().init_weights()
        self._load_teacher()

    def loss(self, inputs: Tensor, data_samples: list, **kwargs) -> dict:
        """The student's losses, and those of each comparison.

        Args:
            inputs: The batch, (N, C, H, W), after the data_preprocessor.
            data_samples: The N data samples.

        Returns:
            The student's own dict of losses with ``loss_<name>``, ``<name>_inter`` and
            ``<name>_intra`` of each entry of ``distill`` added.
        """
        comparisons: dict[str, Comparison] = dict(self.distill.items())
        if self.distill_factor == 0:
            losses = super().loss(inputs, data_samples, **kwargs)
            return losses | _zero_losses(comparisons)

        self._load_teacher()
        self._match_classes()
        self.teacher.move_to(inputs.device)
        teacher_model = self.teacher.model
        step = Step(
            self,
            self.teacher,
            self.class_match,
            inputs,
            data_samples,
            [m for c in comparisons.values() for m in c.student_modules(self)],
            [m for c in comparisons.values() for m in c.teacher_modules(teacher_model)],
        )

        # The teacher goes first where it can: its activations are freed before those
        # of the student, which the backward pass needs, take memory.
        answers = {}
        for name, comparison in comparisons.items():
            if comparison.asks_first:
                with self.teacher.running():
                    answers[name] = comparison.ask(step, None)
        if len(answers) == len(comparisons):
            step.forget_teacher_features()

        with step.recording():
            losses = super().loss(inputs, data_samples, **kwargs)

        for name, comparison in comparisons.items():
            recorded = comparison.record(step)
            if name not in answers:
                with self.teacher.running():
                    answers[name] = comparison.ask(step, recorded)
            pairs = comparison.pair(step, recorded, answers.pop(name))
            for key, value in comparison(name, pairs).items():
                if key.startswith('loss_'):
                    value = self.distill_factor * value
                # `distill=dict(cls=...)` must not replace the detector's loss_cls.
                losses[f'{key}_distill' if key in losses else key] = value
        return losses

    def _load_teacher(self) -> None:
        """Load the teacher, and check it against what is compared."""
        if not self._is_checked:
            self.teacher.load(self)
            if self._is_default:
                self.distill['dist'], self.why_default = default_for_pair(
                    self, self.teacher
                )
                print_log(
                    f'mmdist.{type(self.distill["dist"]).__name__} compares student '
                    f'and teacher, because {self.why_default}.',
                    logger='current',
                )
            for comparison in self.distill.values():
                comparison.check_pair(self, self.teacher.model)
            self._is_checked = True

    def _match_classes(self) -> None:
        """Match the classes once, when the Runner has said which the student has."""
        if self.class_match is None:
            meta = _dataset_meta()
            # What was there when the model was built belongs to another run.
            known = meta is not None and meta is not self._dataset_meta_before
            if known:
                _refuse_untried_strategies()
            names = meta.get('classes') if known else None
            self.class_match = self.teacher.match_classes(names)

    def _apply(self, fn, *args, **kwargs):
        self.teacher.apply(fn)
        return super()._apply(fn, *args, **kwargs)

    def __reduce_ex__(self, protocol: int) -> tuple:
        # The class is made at run time, so pickle does not find it by name. A copy
        # loads the teacher again, which a file does not hold.
        student_class = type(self).__mro__[2]
        return _new, (student_class,), {**self.__dict__, '_is_checked': False}


@functools.cache
def distilled_class(student_class: type[nn.Module]) -> type[nn.Module]:
    """The class of a distilled model: the student's with :class:`DistilledMixin`."""
    name = f'Distilled{student_class.__name__}'
    return type(name, (DistilledMixin, student_class), {'__module__': __name__})


def _new(student_class: type[nn.Module]) -> nn.Module:
    """A distilled model without its state, for pickle and copy."""
    cls = distilled_class(student_class)
    return cls.__new__(cls)


def _zero_losses(comparisons: dict[str, Comparison]) -> dict[str, Tensor]:
    """Losses of 0 of the comparisons with parameters.

    DDP stops at parameters that take no part in a step.
    """
    return {
        f'loss_{name}': 0 * sum(p.sum() for p in comparison.parameters())
        for name, comparison in comparisons.items()
        if any(True for _ in comparison.parameters())
    }


def _dataset_meta() -> dict | None:
    """Metainfo of the dataset that the Runner trains on, once training has begun."""
    return MessageHub.get_current_instance().get_info('dataset_meta')


def _refuse_untried_strategies() -> None:
    """Stop where FlexibleRunner hands the model to an engine of another library.

    These engines leave no mark on the model that they wrap; the Runner's config, which
    is known once training has begun, names them.

    Raises:
        NotImplementedError: The config names such a strategy.
    """
    config = MessageHub.get_current_instance().get_info('cfg') or ''
    found = re.search(r'\b(DeepSpeed|ColossalAI)Strategy\b', config)
    if found:
        raise NotImplementedError(
            f'mmdist does not distil under `{found[0]}`: nobody has tried whether the '
            'teacher survives its engine. Use `FSDPStrategy`, `DDPStrategy` or '
            '`SingleDeviceStrategy`, or omit `runner_type` and `strategy`.'
        )
