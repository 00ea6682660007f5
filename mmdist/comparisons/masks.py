"""The masks that two instance segmentors predict for the same proposals."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmdist.registry import MODELS
from mmdist.step import Step

from .base import Comparison, Pair
from .probabilities import check_min_score, foreground
from .roi_logits import Proposals, RoILogits, stages_of
from .sparse_queries import sampled_rois

# Those that take nothing but features and proposals.
MASK_FORWARDS = ('StandardRoIHead._mask_forward', 'CascadeRoIHead._mask_forward')


class ProposedMasks(NamedTuple):
    """What one stage of the student's mask head was given and what it returned."""

    stage: int
    rois: Tensor  # (rois, 5), the image's index in the batch and the box
    logits: Tensor  # (rois, classes or 1, height, width)


class JudgedMasks(NamedTuple):
    """What one stage of the teacher says of them."""

    stage: int
    scores: Tensor  # (rois, classes + background), as the bbox head returned them
    logits: Tensor  # (rois, classes or 1, height, width)


@MODELS.register_module()
class Masks(Comparison):
    """Compare the masks of the same proposals, for instance segmentors.

    This complements ``RoILogits``. A row is a positive proposal of the student's own
    loss, its columns are the pixels of the mask. The teacher's RoI head classifies and
    segments the same proposal; of both sides the mask of the teacher's best class is
    compared. A row counts if the teacher is sure of that class.

    By default each mask is compared by its correlation: ``mmdist.DISTLoss`` with
    ``gamma=0`` over the pixels, so large and small objects count alike. The log's
    ``<name>_inter`` is the mean correlation of a mask. ``<name>_intra``, of a pixel
    over all masks, means little. ``mmdist.BinaryKLDivLoss`` compares pixel by pixel,
    summed over a mask.

    Images without labels have no positive proposals, and so no rows.

    Args:
        loss: Config of the loss.
        min_score: The least probability of the teacher's best class.
        stage: The stage of a cascade teacher, as in :class:`RoILogits`.

    Raises:
        ValueError: ``min_score`` is no probability.
    """

    families = (
        'Mask R-CNN, Cascade Mask R-CNN and what has their RoI heads, with a mask '
        'head that has an extractor of its own'
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
        self._reader = RoILogits(stage=stage)

    def activation(self, student: nn.Module) -> str:
        """A mask has a sigmoid per pixel."""
        return 'sigmoid'

    def student_modules(self, student: nn.Module) -> Sequence[nn.Module]:
        """The extractors and mask heads of all stages."""
        extractors, heads = self._stages(student)
        return [*extractors, *heads]

    def check_pair(self, student: nn.Module, teacher: nn.Module) -> None:
        """The teacher must predict masks of proposals, too."""
        self._reader.check_pair(student, teacher)
        self._stages(teacher)

    def record(self, step: Step) -> list[ProposedMasks]:
        """The positive proposals and their masks, for each stage."""
        recorded = []
        for stage, (extractor, head) in enumerate(
            zip(*self._stages(step.student), strict=True)
        ):
            if stage > 0 and not step.has_run(head):  # no proposal is left
                _, rois, logits = recorded[-1]
                recorded.append(ProposedMasks(stage, rois[:0], logits[:0]))
                continue
            said = step.calls(head)[-1]
            rois = sampled_rois(step.call_before(extractor, said))
            recorded.append(ProposedMasks(stage, rois, said.output))
        return recorded

    def ask(self, step: Step, recorded: list[ProposedMasks]) -> list[JudgedMasks]:
        """The teacher's classes and masks of the same proposals."""
        roi_head = step.teacher_model.roi_head
        proposals = [Proposals(stage, rois, None) for stage, rois, _ in recorded]
        asked = []
        for one, said in zip(
            proposals, self._reader.judge(step, proposals), strict=True
        ):
            stage, scores, _ = said[-1]
            which = [stage] if isinstance(roi_head.mask_head, nn.ModuleList) else []
            masks = roi_head._mask_forward(*which, step.teacher_features, one.rois)
            asked.append(JudgedMasks(stage, scores, masks['mask_preds']))
        return asked

    def pair(
        self, step: Step, recorded: list[ProposedMasks], asked: list[JudgedMasks]
    ) -> list[Pair]:
        """A pair for each stage of the student, (proposals, pixels)."""
        roi_head = step.student.roi_head
        is_cascade = isinstance(roi_head.mask_head, nn.ModuleList)
        pairs = []
        for ours, theirs in zip(recorded, asked, strict=True):
            scores = self._reader.per_class(
                step.teacher_model, theirs.stage, theirs.scores
            )
            best, *classes = step.classes.best(foreground(scores, 'softmax'))
            student, teacher = (
                _of_class(side.logits, index)
                for side, index in zip((ours, theirs), classes, strict=True)
            )
            if teacher.shape != student.shape:
                teacher = F.interpolate(
                    teacher[:, None], student.shape[1:], mode='bilinear'
                )[:, 0]
            pairs.append(
                Pair(
                    student.flatten(1),
                    teacher.flatten(1),
                    best >= self.min_score,
                    roi_head.stage_loss_weights[ours.stage] if is_cascade else 1.0,
                    f's{ours.stage}' if is_cascade else '',
                )
            )
        return pairs

    def _stages(self, model: nn.Module) -> tuple[Sequence, Sequence]:
        """Extractors and mask heads."""
        roi_head = getattr(model, 'roi_head', None)
        if getattr(roi_head, 'mask_head', None) is None:
            raise self.unsupported(model, 'it has no `roi_head.mask_head`')
        if type(roi_head)._mask_forward.__qualname__ not in MASK_FORWARDS:
            raise self.unsupported(
                model, f'the mask head of its {type(roi_head).__name__} needs more'
            )
        if getattr(roi_head, 'share_roi_extractor', False):
            raise self.unsupported(model, 'its mask head has no extractor of its own')
        return stages_of(roi_head.mask_roi_extractor), stages_of(roi_head.mask_head)


def _of_class(logits: Tensor, classes: Tensor) -> Tensor:
    """The mask of one class of each row, (rows, height, width)."""
    if logits.shape[1] == 1:  # class-agnostic
        return logits[:, 0]
    return logits[torch.arange(len(logits), device=logits.device), classes]
