"""Class logits at every location of a dense (one-stage) detector."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from mmdist.registry import MODELS

from .comparison import Comparison, Pair
from .step import Step


@MODELS.register_module()
class DenseLogits(Comparison):
    """Compare the class logits of the dense heads, level by level.

    Args:
        loss: Config of the loss; ``mmdist.DISTLoss`` if left out.
        anchors: 'joint', all anchors and classes of a location are one row (published
            for RetinaNet, 9 * 80 = 720 columns), or 'separate', a row per anchor.
        ignore_mask: Leave out locations in the padding of the batch. The published
            code does not; False restores it.
    """

    def __init__(
        self,
        loss: dict | None = None,
        anchors: str = 'joint',
        ignore_mask: bool = True,
    ) -> None:
        super().__init__(loss)
        if anchors not in ('joint', 'separate'):
            raise ValueError(f"`anchors` is 'joint' or 'separate', got {anchors!r}.")
        self.anchors = anchors
        self.ignore_mask = ignore_mask

    def activation(self, student: nn.Module) -> str:
        """As the head's own classification loss."""
        return 'sigmoid' if self._head(student).use_sigmoid_cls else 'softmax'

    def student_modules(self, student: nn.Module) -> Sequence[nn.Module]:
        """The dense head."""
        return [self._head(student)]

    def check_pair(self, student: nn.Module, teacher: nn.Module) -> None:
        """The teacher must be a dense detector too."""
        self._head(teacher)

    def record(self, step: Step) -> Sequence[Tensor]:
        """Class logits per level, each (N, anchors * classes, h, w)."""
        return step.calls(self._head(step.student))[-1].output[0]

    def ask(self, step: Step, recorded: Sequence[Tensor]) -> Sequence[Tensor]:
        """The teacher's class logits per level, from its features."""
        return self._head(step.teacher)(step.teacher_features)[0]

    def pair(
        self, step: Step, recorded: Sequence[Tensor], asked: Sequence[Tensor]
    ) -> list[Pair]:
        """One pair per level; the terms are summed, as published."""
        student_head, teacher_head = self._head(step.student), self._head(step.teacher)
        pairs = []
        for student, teacher in zip(recorded, asked, strict=True):
            mask = step.valid_mask(*student.shape[-2:]) if self.ignore_mask else None
            student, teacher = step.classes.select(
                _per_anchor(student, student_head.cls_out_channels),
                _per_anchor(teacher, teacher_head.cls_out_channels),
                dim=2,
            )
            if self.anchors == 'joint':
                student, teacher = student.flatten(1, 2), teacher.flatten(1, 2)
            else:
                student, teacher = student.transpose(1, 2), teacher.transpose(1, 2)
                if mask is not None:
                    mask = mask[:, None].expand(-1, student.shape[2], -1, -1)
            pairs.append(Pair(student, teacher, mask))
        return pairs

    @staticmethod
    def _head(model: nn.Module) -> nn.Module:
        head = getattr(model, 'bbox_head', None)
        if head is None:
            raise ValueError(
                f'DenseLogits compares one-stage detectors, and {type(model).__name__} '
                'has no `bbox_head`. Take a one-stage detector, or another comparison.'
            )
        return head


def _per_anchor(logits: Tensor, num_classes: int) -> Tensor:
    """(N, anchors * classes, h, w) -> (N, anchors, classes, h, w)."""
    return logits.unflatten(1, (-1, num_classes))
