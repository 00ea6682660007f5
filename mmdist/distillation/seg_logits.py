"""Per-pixel class logits of segmentors (mmseg's encoder-decoders)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmdist.registry import MODELS

from .comparison import Comparison, Pair
from .step import Step


@MODELS.register_module()
class SegLogits(Comparison):
    """Compare the decode heads' logits, and those of the auxiliary heads.

    A row is a pixel of the unresized logits (1/8 of the image, say), as published.

    Args:
        loss: Config of the loss; ``mmdist.DISTLoss`` if left out.
        aux_weight: Weight of the auxiliary heads, which are compared where both sides
            have them; 0 leaves them out. The published code has 0.4.
        ignore_mask: Leave out pixels whose label is the student's ``ignore_index`` and
            padded pixels. The published code does not; False restores it.
    """

    def __init__(
        self,
        loss: dict | None = None,
        aux_weight: float = 0.4,
        ignore_mask: bool = True,
    ) -> None:
        super().__init__(loss)
        self.aux_weight = aux_weight
        self.ignore_mask = ignore_mask

    def activation(self, student: nn.Module) -> str:
        """'sigmoid' for a single output channel, else 'softmax'."""
        return 'sigmoid' if student.decode_head.out_channels == 1 else 'softmax'

    def student_modules(self, student: nn.Module) -> Sequence[nn.Module]:
        """The decode head and the auxiliary heads."""
        return [head for _, head in self._heads(student)]

    def check_pair(self, student: nn.Module, teacher: nn.Module) -> None:
        """The teacher must be a segmentor with a decode head."""
        self._heads(teacher)

    def record(self, step: Step) -> list[Tensor]:
        """The logits of each head, as it computed them for its own loss."""
        return [
            step.calls(head)[-1].output for head in self.student_modules(step.student)
        ]

    def ask(self, step: Step, recorded: list[Tensor]) -> list[Tensor]:
        """The teacher's logits of the same heads, from its features."""
        return [
            head.forward(step.teacher_features)
            for _, head in self._heads(step.teacher)[: len(recorded)]
        ]

    def pair(
        self, step: Step, recorded: list[Tensor], asked: list[Tensor]
    ) -> list[Pair]:
        """Logits of the same size, with the pixels that count."""
        pairs = []
        names = [name for name, _ in self._heads(step.student)]
        # zip: an auxiliary head that only one side has is left out.
        for name, student, teacher in zip(names, recorded, asked, strict=False):
            student, teacher = self._to_smaller(step, student, teacher)
            student, teacher = step.classes.select(student, teacher)
            mask = self._mask(step, student) if self.ignore_mask else None
            weight = self.aux_weight if name else 1.0
            pairs.append(Pair(student, teacher, mask, weight, name))
        return pairs

    def _heads(self, model: nn.Module) -> list[tuple[str, nn.Module]]:
        """(name of the term, head): the decode head as '', then the auxiliary ones."""
        if not hasattr(model, 'decode_head'):
            raise ValueError(
                f'SegLogits compares segmentors, and {type(model).__name__} has no '
                '`decode_head`. Take a segmentor of mmseg, or another comparison.'
            )
        heads = [('', model.decode_head)]
        if self.aux_weight and model.with_auxiliary_head:
            aux = model.auxiliary_head
            aux = aux if isinstance(aux, nn.ModuleList) else [aux]
            heads += [('aux', head) for head in aux]
        return heads

    @staticmethod
    def _to_smaller(step: Step, student: Tensor, teacher: Tensor) -> tuple:
        """Resize the larger of the two maps to the smaller one."""
        size = min(student.shape[-2:], teacher.shape[-2:])
        resize = dict(
            size=size, mode='bilinear', align_corners=step.student.align_corners
        )
        return tuple(
            x if x.shape[-2:] == size else F.interpolate(x, **resize)
            for x in (student, teacher)
        )

    @staticmethod
    def _mask(step: Step, logits: Tensor) -> Tensor:
        """(N, h, w), True where a pixel is labelled and not padding."""
        size = logits.shape[-2:]
        labels = torch.stack([s.gt_sem_seg.data for s in step.data_samples])
        labels = F.interpolate(labels.float(), size=size, mode='nearest').squeeze(1)
        mask = labels != step.student.decode_head.ignore_index
        valid = step.valid_mask(*size)
        return mask if valid is None else mask & valid
