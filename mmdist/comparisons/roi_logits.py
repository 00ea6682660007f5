"""Class logits of the proposals of a two-stage detector."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from mmdist.families import roi
from mmdist.families.roi import Proposals
from mmdist.registry import MODELS
from mmdist.step import Step

from .base import Comparison, Pair


@MODELS.register_module()
class RoILogits(Comparison):
    """Compare the class logits of the same proposals, background last.

    The proposals are those that the student sampled for its own loss, including added
    ground truth. They go through the teacher's extractor and bbox head. The teacher's
    RPN and the rest of its RoI head do not run, except for the semantic and global
    context features that HTC and SCNet feed to their bbox heads.

    A cascade student gives one term per stage, ``loss_<name>_s0`` and so on, with the
    weights of its own stages (``stage_loss_weights``).

    Args:
        loss: Config of the loss; ``mmdist.DISTLoss`` with softmax if omitted.
        stage: The stage of a cascade teacher to ask, an int (0 is published).
            ``'mean'``: the mean of the logits of all stages, as at inference, except
            that all stages see the same, unrefined proposals. If omitted, the same
            stage as the student's, or the teacher's last if it has fewer.
        background: False leaves out the background's column; softmax is then over the
            classes alone.

    Raises:
        ValueError: ``stage`` is none of these.
    """

    families = (
        'the two-stage detectors of mmdet whose RoI head has an extractor and a bbox '
        'head: Faster, Mask and Cascade R-CNN and models derived from them'
    )

    def __init__(
        self,
        loss: dict | None = None,
        stage: int | str | None = None,
        background: bool = True,
    ) -> None:
        super().__init__(loss)
        if not (stage is None or stage == 'mean' or isinstance(stage, int)):
            raise ValueError(f"`stage` must be an int, 'mean' or None, got {stage!r}.")
        self.stage = stage
        self.background = background

    def student_modules(self, student: nn.Module) -> Sequence[nn.Module]:
        """The extractors and bbox heads of all stages."""
        return roi.modules(student, self.unsupported)

    def check_pair(self, student: nn.Module, teacher: nn.Module) -> None:
        """The teacher must be a two-stage detector with the wanted stage."""
        roi.check(teacher, self.unsupported)
        roi.check_stage(teacher, self.stage)

    def record(self, step: Step) -> list[Proposals]:
        """The sampled proposals and their logits, for each stage."""
        return roi.record(step)

    def ask(self, step: Step, recorded: list[Proposals]) -> list[Tensor]:
        """The teacher's logits of the same proposals, (rois, classes + background)."""
        return [judged.logits for judged in roi.judge(step, recorded, self.stage)]

    def pair(
        self, step: Step, recorded: list[Proposals], asked: list[Tensor]
    ) -> list[Pair]:
        """One pair per stage of the student, a row per proposal."""
        pairs = []
        for (stage, _, student, _), teacher in zip(recorded, asked, strict=True):
            student, teacher = step.classes.select(student, teacher)
            if not self.background:
                student, teacher = student[:, :-1], teacher[:, :-1]
            pairs.append(Pair(student, teacher, **roi.term_of(step.student, stage)))
        return pairs
