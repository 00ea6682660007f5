"""The box distributions of GFL: localization distillation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor, nn

from mmdist.families import dense
from mmdist.families.probabilities import check_min_score
from mmdist.registry import MODELS
from mmdist.step import Step

from .base import Comparison, Pair


@MODELS.register_module()
class BoxDistributions(Comparison):
    """Compare the distributions that GFL predicts for the edges of a box.

    GFL predicts each edge as a distribution over ``reg_max + 1`` distances.
    Localization distillation (Zheng et al., CVPR 2022, arXiv 2102.12252) teaches the
    student its teacher's distributions. A row is an edge of the box at a location.

    Args:
        loss: Config of the loss; if omitted, the KL divergence with the temperature 10
            and the ``loss_weight`` 0.25 of mmdet's LD configs, but on another scale:
            it is the mean over the edges that count. mmdet's ``LDHead`` sums over the
            positive locations, weighted by the student's class scores, and divides by
            4. If these weights sum to 15, its loss is 15 times as large; raise
            ``loss_weight`` accordingly.
        min_score: Locations count where the teacher's best class has at least this
            probability.

    Raises:
        ValueError: ``min_score`` is not a probability.
    """

    families = 'GFL and the detectors whose head is derived from its head'
    asks_first = True

    def __init__(self, loss: dict | None = None, min_score: float = 0.05) -> None:
        kl = dict(type='mmdet.KnowledgeDistillationKLDivLoss', T=10, loss_weight=0.25)
        super().__init__(loss or kl)
        check_min_score(min_score)
        self.min_score = min_score

    def student_modules(self, student: nn.Module) -> Sequence[nn.Module]:
        """The dense head."""
        return [self._head(student)]

    def check_pair(self, student: nn.Module, teacher: nn.Module) -> None:
        """Both must have distributions over the same number of distances."""
        ours, theirs = self._head(student).reg_max, self._head(teacher).reg_max
        if ours != theirs:
            raise ValueError(
                'BoxDistributions needs the same `bbox_head.reg_max` on both sides, '
                f'but it is {ours} for the student and {theirs} for the teacher.'
            )

    def record(self, step: Step) -> Sequence[Tensor]:
        """The student's distributions per level, (N, 4 * (reg_max + 1), h, w)."""
        return dense.record(step)[1]

    def ask(self, step: Step, recorded: None) -> list[tuple[Tensor, Tensor]]:
        """Class logits and distributions of the teacher per level."""
        return list(zip(*dense.ask(step), strict=True))

    def pair(
        self,
        step: Step,
        recorded: Sequence[Tensor],
        asked: list[tuple[Tensor, Tensor]],
    ) -> Iterator[Pair]:
        """One pair per level, (4 N, distances, h, w)."""
        for student, (scores, teacher) in zip(recorded, asked, strict=True):
            edges = [x.unflatten(1, (4, -1)).flatten(0, 1) for x in (student, teacher)]
            counts = scores.sigmoid().amax(1) >= self.min_score
            mask = step.valid_mask(*student.shape[-2:])
            if mask is not None:
                counts = counts & mask
            yield Pair(*edges, mask=counts.repeat_interleave(4, dim=0))

    def _head(self, model: nn.Module) -> nn.Module:
        head = getattr(model, 'bbox_head', None)
        if not hasattr(head, 'reg_max'):
            raise self.unsupported(model, 'it has no `bbox_head` with a `reg_max`')
        return head
