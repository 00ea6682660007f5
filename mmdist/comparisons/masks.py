"""The masks that two instance segmentors predict for the same proposals."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import nn

from mmdist.families import roi
from mmdist.families.probabilities import check_min_score, foreground
from mmdist.families.roi import Judged, Proposals
from mmdist.registry import MODELS
from mmdist.step import Step

from .base import Comparison, Pair


@MODELS.register_module()
class Masks(Comparison):
    """Compare the masks of the same proposals, for instance segmentors.

    This complements ``RoILogits``. A row is a positive proposal of the student's own
    loss; its columns are the pixels of the mask. The teacher's RoI head classifies and
    segments the same proposal, and both sides' masks of the teacher's best class are
    compared. A row counts if the teacher is sure of that class.

    By default masks are compared by their correlation: ``mmdist.DISTLoss`` with
    ``gamma=0`` over the pixels, so large and small objects count alike. The logged
    ``<name>_inter`` is the mean correlation of the masks. With ``gamma``,
    ``<name>_intra`` is that of a pixel over all masks, and means little.
    ``mmdist.BinaryKLDivLoss`` compares pixel by pixel, summed over a mask.

    Images without labels have no positive proposals, and so no rows.

    Args:
        loss: Config of the loss; ``mmdist.DISTLoss`` with ``gamma=0`` if omitted.
        min_score: Minimum probability of the teacher's best class.
        stage: The stage of a cascade teacher, as in :class:`RoILogits`.

    Raises:
        ValueError: ``min_score`` is not a probability.
    """

    families = (
        'Mask R-CNN, Cascade Mask R-CNN and models with their RoI heads, if the mask '
        'head has its own extractor'
    )

    def __init__(
        self,
        loss: dict | None = None,
        min_score: float = 0.3,
        stage: int | None = None,
    ) -> None:
        super().__init__(loss or dict(type='mmdist.DISTLoss', gamma=0.0))
        check_min_score(min_score)
        self.min_score = min_score
        self.stage = stage

    def activation(self, student: nn.Module) -> str:
        """A mask has a sigmoid per pixel."""
        return 'sigmoid'

    def student_modules(self, student: nn.Module) -> Sequence[nn.Module]:
        """The extractors and mask heads of all stages."""
        return roi.modules(student, self.unsupported, 'mask')

    def check_pair(self, student: nn.Module, teacher: nn.Module) -> None:
        """The teacher must predict masks of proposals too."""
        roi.check(teacher, self.unsupported, 'mask')
        roi.check_stage(teacher, self.stage)

    def record(self, step: Step) -> list[Proposals]:
        """The positive proposals and their masks, for each stage."""
        return roi.record(step, 'mask')

    def ask(self, step: Step, recorded: list[Proposals]) -> list[Judged]:
        """The teacher's class scores and masks of the same proposals."""
        return roi.judge(step, recorded, self.stage, 'mask')

    def pair(
        self, step: Step, recorded: list[Proposals], asked: list[Judged]
    ) -> list[Pair]:
        """One pair per stage of the student, (proposals, pixels)."""
        pairs = []
        for proposals, judged in zip(recorded, asked, strict=True):
            probabilities = foreground(judged.logits, 'softmax')
            best, ours, theirs = step.classes.best(probabilities)
            student = roi.of_class(proposals.logits, ours)
            teacher = roi.of_class(judged.masks, theirs)
            if teacher.shape != student.shape:
                teacher = F.interpolate(
                    teacher[:, None], student.shape[1:], mode='bilinear'
                )[:, 0]
            term = roi.term_of(step.student, proposals.stage)
            sure = best >= self.min_score
            pairs.append(Pair(student.flatten(1), teacher.flatten(1), sure, **term))
        return pairs
