"""Class logits of the object queries of DETR-like detectors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from mmdist.families import query
from mmdist.families.probabilities import check_min_score
from mmdist.families.query import Queries
from mmdist.registry import MODELS
from mmdist.step import Step

from .base import Comparison, Pair, check_choice
from .matching import Matching


@MODELS.register_module()
class QueryLogits(Comparison):
    """Compare the class logits of the queries of two DETRs, paired one to one.

    The queries of two DETRs have no common order and can differ in number. So, per
    image, they are paired by Hungarian matching on class and box, as a DETR is matched
    with the ground truth (Carion et al., ECCV 2020, equation 1). A row is such a pair.
    If the teacher has more queries than the student, those with the best scores are
    matched. Denoising queries, auxiliary dense queries and, for DDQ, queries that are
    not distinct are left out. The proposals of Sparse R-CNN and QueryInst are queries
    as well, and each stage of their cascade is a decoder layer.

    Args:
        loss: Config of the loss; ``mmdist.DISTLoss`` if omitted.
        layers: ``'last'``: the last decoder layer. ``'all'``: every layer that both
            have, counted from the last, each matched separately; the terms are summed.
        match_costs: Configs of the costs to match by; ``MATCH_COSTS`` if omitted. Takes
            :class:`ClassProbabilityCost` and mmdet's match costs of classes and boxes,
            which get the teacher's queries as ground truth, labelled with their best
            class.
        min_score: Teacher queries whose best class has a smaller probability are not
            matched, so that hundreds of empty queries do not outvote a few objects. 0
            takes all.

    Raises:
        ValueError: An option is out of range.
    """

    families = (
        'the DETRs of mmdet with a fixed list of classes (derived from its '
        '`DetectionTransformer`), Sparse R-CNN and QueryInst'
    )
    asks_first = True

    def __init__(
        self,
        loss: dict | None = None,
        layers: str = 'last',
        match_costs: Sequence[dict] | None = None,
        min_score: float = 0.0,
    ) -> None:
        super().__init__(loss)
        check_choice('`layers`', layers, 'last', 'all')
        check_min_score(min_score)
        self.layers = layers
        self.match = Matching(match_costs, min_score)

    def activation(self, student: nn.Module) -> str:
        """The activation of the head's classification loss."""
        return query.activation_of(student)

    def student_modules(self, student: nn.Module) -> Sequence[nn.Module]:
        """The head of the decoder, or the extractors and heads of all stages."""
        return query.modules(student, self.unsupported)

    def check_pair(self, student: nn.Module, teacher: nn.Module) -> None:
        """The teacher must have queries, and a head with the student's activation."""
        query.head_of(teacher, self.unsupported)
        query.check_same_activation(student, teacher)

    def record(self, step: Step) -> Queries:
        """The student's matching queries, from its own loss pass."""
        return query.record(step)

    def ask(self, step: Step, recorded: None) -> Queries:
        """The teacher's queries: its transformer and head on its features."""
        return query.ask(step)

    def pair(self, step: Step, recorded: Queries, asked: Queries) -> list[Pair]:
        """One pair per decoder layer; rows are the matched queries of all images."""
        depth = 1 if self.layers == 'last' else min(len(recorded), len(asked))
        pairs = []
        for layers in zip(recorded[-depth:], asked[-depth:], strict=True):
            sides = self.match.queries(step, *layers)
            pairs.append(Pair(*(torch.cat([x.scores for x in side]) for side in sides)))
        return pairs
