"""One training step: its batch, and results that comparisons share."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial, wraps
from typing import Any
from unittest.mock import patch

import torch
from mmengine.structures import BaseDataElement
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from .record import Call, Recorder, swapped
from .teachers import ClassMatch, ForeignTeacher, Teacher


def computed_once(compute: Callable[[Step], Any]) -> Callable[[Step], Any]:
    """Decorate a method whose result :meth:`Step.shared` keeps."""

    @wraps(compute)
    def get(step: Step) -> Any:
        return step.shared(compute.__name__, partial(compute, step))

    return get


class Step:
    """The batch, the student's recorded calls and one of its teachers, for one step.

    The teacher computes each result once, however many comparisons ask for it.

    Args:
        student: The distilled model.
        teacher: The teacher, loaded.
        classes: Which columns of student and teacher are the same class.
        inputs: The student's batch after its data_preprocessor, (N, C, H, W).
        data_samples: The N data samples of the batch.
        recorder: Records the student while it computes its own loss.
        teacher_modules: Modules of the teacher to record in :attr:`teacher_features`.
        labelled: Whether each image has labels; None if all do. The student's own
            losses on the others do not count.

    Attributes:
        student, classes, inputs, data_samples, labelled: As given.
        teacher_model: The teacher's own model, a plain detector or segmentor in eval.
        valid_sizes: Height and width in pixels of each image, without its padding.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: Teacher,
        classes: ClassMatch,
        inputs: Tensor,
        data_samples: Sequence[BaseDataElement],
        recorder: Recorder | None = None,
        teacher_modules: Sequence[nn.Module] = (),
        labelled: Sequence[bool] | None = None,
    ) -> None:
        self.student = student
        self.teacher_model = teacher.model
        self.classes = classes
        self.inputs = inputs
        self.data_samples = data_samples
        self.labelled = labelled or (True,) * len(data_samples)
        full = tuple(inputs.shape[-2:])
        self.valid_sizes = [
            tuple(map(min, sample.metainfo.get('img_shape', full)[:2], full))
            for sample in data_samples
        ]
        self._teacher = teacher
        self._student_recorder = recorder or Recorder()
        self._teacher_recorder = Recorder(teacher_modules)
        self._shared: dict[str, Any] = {}

    # ---- the student's side ------------------------------------------------------

    def calls(self, module: nn.Module) -> list[Call]:
        """The student's calls of ``module`` in its own loss pass.

        Raises:
            RuntimeError: The module did not run, or its output carries no gradient.
        """
        calls = self._student_recorder.calls(module)
        if not calls:
            raise RuntimeError(
                f'The student did not run its `{self._name(module)}` while it computed '
                'its loss, so there is nothing to distil. Compare another module.'
            )
        if torch.is_grad_enabled() and _lost_gradient(module, calls):
            raise RuntimeError(
                f"The output of the student's `{self._name(module)}` "
                'carries no gradient, so nothing can be learned from it. It runs in '
                'activation checkpointing (`with_cp`, `activation_checkpointing`): '
                'compare the module around it, or turn checkpointing off there.'
            )
        return calls

    def call_before(self, module: nn.Module, call: Call) -> Call:
        """The student's last call of ``module`` before ``call``."""
        return [c for c in self.calls(module) if c.index < call.index][-1]

    def has_run(self, module: nn.Module) -> bool:
        """Whether the student ran ``module`` in its own loss pass."""
        return bool(self._student_recorder.calls(module))

    def _name(self, module: nn.Module) -> str:
        return next(n for n, m in self.student.named_modules() if m is module)

    # ---- the teacher's side ------------------------------------------------------

    def shared(self, key: str, compute: Callable[[], Any]) -> Any:
        """Compute a result of the teacher when first asked for, and keep it.

        Whoever shares a result uses the same ``key``.
        """
        if key not in self._shared:
            with self._teacher.running():
                self._shared[key] = compute()
        return self._shared[key]

    @property
    @computed_once
    def teacher_inputs(self) -> Tensor:
        """The batch as the teacher's own data_preprocessor would have produced it."""
        return self._teacher.renormalize(self.inputs, self.valid_sizes)

    @property
    @computed_once
    def teacher_features(self) -> Any:
        """What the teacher's ``extract_feat``, backbone and neck, returns.

        For a :class:`ForeignTeacher`, what its forward returns.
        """
        with self._teacher_recorder:
            if isinstance(self.teacher_model, ForeignTeacher):
                return self.teacher_model.answer(self)
            return self.teacher_model.extract_feat(self.teacher_inputs)

    @property
    @computed_once
    def mirrored(self) -> Step:
        """The same batch, but the teacher sees it mirrored, left to right."""
        step = Step(
            self.student, self._teacher, self.classes, self.inputs, self.data_samples
        )
        # padding is now on the left, so all of a map counts as image
        step.valid_sizes = [tuple(self.inputs.shape[-2:])] * len(self.inputs)
        step.shared('teacher_inputs', lambda: self.teacher_inputs.flip(-1))
        return step

    def forget_teacher_features(self) -> None:
        """Free the teacher's features, which nothing needs any more."""
        for key in ('teacher_features', 'mirrored'):
            self._shared.pop(key, None)
        self._teacher_recorder.forget()

    def teacher_calls(self, module: nn.Module) -> list[Call]:
        """The teacher's calls of ``module``, one of ``teacher_modules``.

        It runs either while the teacher's features are computed, or in the rest of the
        teacher's forward pass, which is then run on these features.
        """
        features = self.teacher_features
        is_foreign = isinstance(self.teacher_model, ForeignTeacher)

        def run_the_rest() -> None:
            with self._teacher_recorder:
                self._run_teacher(features, self.data_samples, 'tensor')

        if not (is_foreign or self._teacher_recorder.calls(module)):
            self.shared('forward', run_the_rest)
        return self._teacher_recorder.calls(module)

    def _run_teacher(self, features: Any, data_samples: list, mode: str) -> Any:
        """Run the teacher's forward pass on features that are computed already."""
        model = self.teacher_model
        with swapped(model, 'extract_feat', lambda *args, **kwargs: features):
            return model(self.teacher_inputs, data_samples, mode=mode)

    @property
    @computed_once
    def teacher_predictions(self) -> list[BaseDataElement]:
        """The teacher's test-time predictions, in the geometry of the batch.

        For a two-stage detector they are boxes only, without masks.
        """
        from mmcv.ops.nms import NMSop

        samples = []
        for sample in self.data_samples:
            # the image's size in the batch, not in the file
            size = dict(ori_shape=sample.metainfo['img_shape'], scale_factor=(1.0, 1.0))
            samples.append(type(sample)(metainfo=sample.metainfo | size))
            if 'proposals' in sample:  # for a detector without RPN
                samples[-1].proposals = sample.proposals
        suppress = NMSop.apply

        def suppress_in_float32(*args):  # on a CPU it takes nothing else
            return suppress(*(x.float() if isinstance(x, Tensor) else x for x in args))

        roi_head = getattr(self.teacher_model, 'roi_head', None)
        with (
            swapped(NMSop, 'apply', suppress_in_float32),
            patch.dict(getattr(roi_head, '_modules', {}), mask_head=None),
        ):
            return self._run_teacher(self.teacher_features, samples, 'predict')

    # ---- the batch ---------------------------------------------------------------

    def valid_mask(self, height: int, width: int) -> Tensor | None:
        """The cells of a map of the whole batch that show an image, not its padding.

        Returns:
            (N, height, width), True where the centre of a cell is in the image; None if
            no image is padded.
        """
        full_h, full_w = self.inputs.shape[-2:]
        if all(size == (full_h, full_w) for size in self.valid_sizes):
            return None
        shape = len(self.inputs), height, width
        mask = self.inputs.new_zeros(shape, dtype=torch.bool)
        for cells, (valid_h, valid_w) in zip(mask, self.valid_sizes, strict=True):
            # The centre (i + 0.5) * stride < valid  <=>  i < valid / stride - 0.5.
            rows = math.ceil(valid_h * height / full_h - 0.5)
            columns = math.ceil(valid_w * width / full_w - 0.5)
            cells[:rows, :columns].fill_(True)
        return mask


def _lost_gradient(module: nn.Module, calls: list[Call]) -> bool:
    """Whether a trainable module returned only tensors without a gradient."""
    if not any(p.requires_grad for p in module.parameters()):
        return False
    outputs = tree_leaves([call.output for call in calls])
    floats = [x for x in outputs if isinstance(x, Tensor) and x.is_floating_point()]
    return bool(floats) and not any(x.requires_grad for x in floats)
