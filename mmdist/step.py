"""One training step as the comparisons see it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from mmengine.structures import BaseDataElement
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from .record import Call, Recorder
from .teachers.teacher import Teacher

if TYPE_CHECKING:
    from .comparisons.base import Comparison


class Step:
    """The batch, the student's recorded calls and the teacher, for one step.

    What the teacher computes is computed at most once, whatever number of comparisons
    asks for it, and nothing is kept after the step.

    Args:
        student: The distilled model.
        teacher: Its teacher, loaded.
        inputs: The student's batch after its data_preprocessor, (N, C, H, W).
        data_samples: The N data samples of the batch.
        recorder: The student's calls during its own loss.
        teacher_modules: Modules of the teacher to record in :attr:`teacher_features`.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: Teacher,
        inputs: Tensor,
        data_samples: Sequence[BaseDataElement],
        recorder: Recorder,
        teacher_modules: Sequence[nn.Module] = (),
    ) -> None:
        self.student = student
        self.teacher = teacher.model
        self.inputs = inputs
        self.data_samples = data_samples
        self.classes = teacher.classes
        self._guest = teacher
        self._recorder = recorder
        self._teacher_recorder = Recorder(teacher_modules)
        self._shared: dict[str, Any] = {}
        self._answers: dict[Comparison, Any] = {}

    def ask_first(self, comparisons: Sequence[Comparison]) -> None:
        """Ask the teacher, before the student runs, what does not depend on it.

        The teacher's activations are gone before the student's come, which are kept
        for the backward pass: the two never take memory at one time.

        Args:
            comparisons: All of the step.
        """
        for comparison in comparisons:
            if comparison.asks_first:
                self._answers[comparison] = self._ask(comparison, None)
        if len(self._answers) == len(comparisons):  # nobody reads them any more
            self.__dict__.pop('teacher_features', None)

    def answer(self, comparison: Comparison, recorded: Any) -> Any:
        """What the teacher answers to a comparison, or has answered before."""
        if comparison in self._answers:
            return self._answers.pop(comparison)
        return self._ask(comparison, recorded)

    def _ask(self, comparison: Comparison, recorded: Any) -> Any:
        with self._guest.running():
            return comparison.ask(self, recorded)

    def calls(self, module: nn.Module) -> list[Call]:
        """The student's calls of ``module`` in its own loss pass.

        Raises:
            RuntimeError: The module did not run.
        """
        calls = self._recorder.calls(module)
        if not calls:
            raise RuntimeError(
                f'The student did not run its `{self._name(module)}` while it computed '
                'its loss, so there is nothing to distil. Compare another module.'
            )
        if torch.is_grad_enabled() and _lost_gradient(module, calls):
            raise RuntimeError(
                'What the student returned from its '
                f'`{self._name(module)}` carries no gradient, so there is nothing '
                'to learn. It runs within activation checkpointing (`with_cp` or '
                '`activation_checkpointing`): compare the module around it, or turn '
                'the checkpointing off there.'
            )
        return calls

    def _name(self, module: nn.Module) -> str:
        return next(n for n, m in self.student.named_modules() if m is module)

    def has_run(self, module: nn.Module) -> bool:
        """Whether the student ran ``module`` in its own loss pass."""
        return bool(self._recorder.calls(module))

    def teacher_calls(self, module: nn.Module) -> list[Call]:
        """The teacher's calls of ``module``, one of ``teacher_modules``.

        It was called while the teacher's features were computed, or else is in the
        rest of the teacher's forward pass, which then runs on these features.
        """
        features = self.teacher_features
        if not self._teacher_recorder.calls(module):
            self.shared('forward', lambda: self._teacher_forward(features))
        return self._teacher_recorder.calls(module)

    def _teacher_forward(self, features: Any) -> None:
        self.teacher.extract_feat = lambda *args, **kwargs: features
        try:
            with self._teacher_recorder:
                self.teacher(self.teacher_inputs, self.data_samples, mode='tensor')
        finally:
            del self.teacher.extract_feat

    def shared(self, key: str, compute: Callable[[], Any]) -> Any:
        """Compute something of the teacher for whoever asks first, and keep it.

        Args:
            key: Name of the result; the same for all that mean the same.
            compute: Gives the result.
        """
        if key not in self._shared:
            with self._guest.running():
                self._shared[key] = compute()
        return self._shared[key]

    @cached_property
    def teacher_inputs(self) -> Tensor:
        """The batch as the teacher's own data_preprocessor would have given it."""
        return self._guest.renormalize(self.inputs, self.valid_sizes)

    @cached_property
    def teacher_features(self) -> Any:
        """The teacher's ``extract_feat``, backbone and neck."""
        with self._guest.running(), self._teacher_recorder:
            return self.teacher.extract_feat(self.teacher_inputs)

    @cached_property
    def valid_sizes(self) -> list[tuple[int, int]]:
        """Height and width in pixels of each image without its padding."""
        full = tuple(self.inputs.shape[-2:])
        return [
            tuple(map(min, sample.metainfo.get('img_shape', full)[:2], full))
            for sample in self.data_samples
        ]

    def valid_mask(self, height: int, width: int) -> Tensor | None:
        """Where a map of the whole batch looks at an image, not at its padding.

        Args:
            height: Height of the map.
            width: Width of the map.

        Returns:
            (N, height, width), True where the centre of a cell lies in the image; None
            if no image is padded.
        """
        full_h, full_w = self.inputs.shape[-2:]
        if all(size == (full_h, full_w) for size in self.valid_sizes):
            return None
        mask = self.inputs.new_zeros(
            (len(self.inputs), height, width), dtype=torch.bool
        )
        for cells, (valid_h, valid_w) in zip(mask, self.valid_sizes, strict=True):
            # The centre (i + 0.5) * stride < valid  <=>  i < valid / stride - 0.5.
            rows = math.ceil(valid_h * height / full_h - 0.5)
            columns = math.ceil(valid_w * width / full_w - 0.5)
            cells[:rows, :columns].fill_(True)
        return mask


def _lost_gradient(module: nn.Module, calls: list[Call]) -> bool:
    """Whether a module that is trained returned tensors that cannot train it."""
    if not any(p.requires_grad for p in module.parameters()):
        return False
    outputs = [
        x
        for x in tree_leaves([call.output for call in calls])
        if isinstance(x, Tensor) and x.is_floating_point()
    ]
    return bool(outputs) and not any(x.requires_grad for x in outputs)
