"""The distiller: the student's own class, with a loss that sees the teacher too."""

from __future__ import annotations

import re
from copy import deepcopy

from mmengine.logging import MessageHub
from torch import Tensor, nn

from mmdist.registry import MODELS

from .comparisons.base import Comparison, build_comparison
from .record import Recorder
from .step import Step
from .teachers.teacher import Teacher

# What is compared if `distill` is left out, by the first of the student's classes that
# is in the table. Names, so that neither mmdet nor mmseg has to be installed.
DEFAULT_COMPARISONS: dict[str, str] = {
    'EncoderDecoder': 'mmdist.SegLogits',
    'MultimodalEncoderDecoder': 'mmdist.SegLogits',
    'MaskFormer': 'mmdist.SegLogits',
    'SingleStageDetector': 'mmdist.DenseLogits',
    'SingleStageInstanceSegmentor': 'mmdist.DenseLogits',
    'SparseRCNN': 'mmdist.QueryLogits',
    'TwoStageDetector': 'mmdist.RoILogits',
    'DetectionTransformer': 'mmdist.QueryLogits',
}


@MODELS.register_module(name='Distiller')
def build_distiller(
    student: dict,
    teacher: dict,
    distill: dict[str, dict] | None = None,
    **student_overrides,
) -> nn.Module:
    """Build a student that is distilled while it trains.

    The result *is* the student: of a subclass of its class, with its parameter names,
    state dict, ``predict`` and data_preprocessor. Only ``loss`` and ``init_weights``
    know of the teacher, so testing and export need neither its config nor its weights.

    Args:
        student: Config of the student model.
        teacher: Arguments of :class:`Teacher`: ``config``, ``checkpoint``, ...
        distill: What to compare, a dict of name -> config of a comparison. Left out,
            it is chosen for the student's family and named ``dist``.
        student_overrides: Entries that replace those of ``student``. The APIs of mmseg
            set ``pretrained`` and ``train_cfg`` on whatever model they are given. Only
            a ``data_preprocessor``, which the Runner adds where the model has none,
            does not replace that of ``student``.

    Returns:
        The student.

    Raises:
        ValueError: The student's family is not supported, or ``distill`` is malformed.
    """
    if student.get('data_preprocessor') is not None:
        student_overrides.pop('data_preprocessor', None)
    model = MODELS.build(deepcopy({**student, **student_overrides}))
    if distill is None:
        distill = dict(dist=_default_comparison(model))
    _check_names(distill)
    teacher = Teacher(**teacher)
    comparisons = nn.ModuleDict(
        {name: build_comparison(name, cfg) for name, cfg in distill.items()}
    )
    for comparison in comparisons.values():
        comparison.bind(model, teacher)
    student_class = type(model)
    model.__class__ = type(
        f'Distilled{student_class.__name__}', (DistilledMixin, student_class), {}
    )
    model.teacher = teacher
    model.distill = comparisons
    model._dataset_meta_before = _dataset_meta()
    return model


def _default_comparison(student: nn.Module) -> dict:
    for cls in type(student).__mro__:
        if cls.__name__ in DEFAULT_COMPARISONS:
            return dict(type=DEFAULT_COMPARISONS[cls.__name__])
    raise ValueError(
        f'mmdist does not know what to compare for a {type(student).__name__}: neither '
        'it nor a base class of it is among the supported families '
        f'({", ".join(DEFAULT_COMPARISONS)}). Say what to compare, '
        '`distill=dict(<name>=dict(type=...))`, if need be with a comparison of your '
        'own, docs/own_comparison.md shows how.'
    )


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
    _teacher_is_checked = False
    _classes_are_matched = False

    def init_weights(self) -> None:
        """Initialise the student as ever, then load the teacher.

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
        if self.distill_factor == 0:
            losses = super().loss(inputs, data_samples, **kwargs)
            for name, comparison in self.distill.items():
                # DDP stops at parameters that take no part in a step.
                for parameter in comparison.parameters():
                    zero = 0 * parameter.sum()
                    losses[f'loss_{name}'] = losses.get(f'loss_{name}', 0) + zero
            return losses
        self._load_teacher()
        self._match_classes()
        # FSDP moves the student's tensors one by one, and not through `_apply`.
        if next(self.teacher.model.parameters()).device != inputs.device:
            self.teacher.apply(lambda tensor: tensor.to(inputs.device))
        comparisons: dict[str, Comparison] = dict(self.distill.items())
        watched = [m for c in comparisons.values() for m in c.student_modules(self)]
        recorder = Recorder(watched)
        step = Step(
            self,
            self.teacher,
            inputs,
            data_samples,
            recorder,
            [
                m
                for c in comparisons.values()
                for m in c.teacher_modules(self.teacher.model)
            ],
        )
        step.ask_first(list(comparisons.values()))
        with recorder:
            losses = super().loss(inputs, data_samples, **kwargs)
        for name, comparison in comparisons.items():
            for key, value in comparison(step, name).items():
                if key.startswith('loss_'):
                    value = self.distill_factor * value
                # `distill=dict(cls=...)` must not replace the detector's loss_cls.
                losses[f'{key}_distill' if key in losses else key] = value
        return losses

    def _apply(self, fn, *args, **kwargs):
        self.teacher.apply(fn)
        return super()._apply(fn, *args, **kwargs)

    def _load_teacher(self) -> None:
        self.teacher.load(self)
        if not self._teacher_is_checked:
            for comparison in self.distill.values():
                comparison.check_pair(self, self.teacher.model)
            self._teacher_is_checked = True

    def _match_classes(self) -> None:
        """Match the classes once, when the Runner has told which the student has."""
        if not self._classes_are_matched:
            meta = _dataset_meta()
            # What was there when the model was built belongs to another run.
            known = meta is not None and meta is not self._dataset_meta_before
            if known:
                _refuse_untried_strategies()
            self.teacher.match_classes(meta.get('classes') if known else None)
            self._classes_are_matched = True


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
            'teacher survives its engine. Take `FSDPStrategy`, `DDPStrategy` or '
            '`SingleDeviceStrategy`, or leave `runner_type` and `strategy` away.'
        )
