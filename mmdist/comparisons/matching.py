"""Assign the queries of a student to those of its teacher, one to one."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from mmengine.structures import InstanceData
from torch import Tensor

from mmdist.families import query
from mmdist.registry import TASK_UTILS
from mmdist.step import Step

# The weights in mmdet's configs of DETRs with focal loss.
MATCH_COSTS = (
    dict(type='mmdist.ClassProbabilityCost', weight=2.0),
    dict(type='mmdet.BBoxL1Cost', weight=5.0, box_format='xywh'),
    dict(type='mmdet.IoUCost', weight=2.0, iou_mode='giou'),
)


@TASK_UTILS.register_module()
class ClassProbabilityCost:
    """L1 distance between the class probabilities of two sets of queries.

    mmdet's class costs look only at the ground truth's class, so a query that is sure
    of its class is cheap for every target of that class. Most of a teacher's queries
    are unsure, and should get an equally unsure query: a copy of itself above all. For
    a softmax and a certain teacher, half of this is mmdet's ClassificationCost plus 1.

    Args:
        weight: Weight of the cost.
    """

    def __init__(self, weight: float = 1.0) -> None:
        self.weight = weight

    def __call__(
        self, pred_instances: InstanceData, gt_instances: InstanceData, **kwargs
    ) -> Tensor:
        """The costs, (n, m), between ``probs`` (n, classes) and (m, classes)."""
        return self.weight * torch.cdist(pred_instances.probs, gt_instances.probs, p=1)


class Matching:
    """Hungarian matching on class and box (Carion et al., ECCV 2020, equation 1).

    Args:
        costs: Configs of the costs to match by; ``MATCH_COSTS`` if omitted.
        min_score: Teacher queries whose best class has a smaller probability are left
            out.
    """

    def __init__(
        self, costs: Sequence[dict] | None = None, min_score: float = 0.0
    ) -> None:
        self.costs = [TASK_UTILS.build(dict(cost)) for cost in costs or MATCH_COSTS]
        self.min_score = min_score

    def __call__(
        self, student: InstanceData, teacher: InstanceData, img_meta: dict
    ) -> tuple[Tensor, Tensor]:
        """Indices of an image's paired queries, the student's and the teacher's.

        Both have ``probs`` and ``bboxes``, the inputs of the costs; the teacher's also
        have ``best``, the probability of the best class.
        """
        # scipy comes with mmdet; the loss alone imports this file, but needs neither
        from scipy.optimize import linear_sum_assignment

        kept = (teacher.best >= self.min_score).nonzero().squeeze(1)
        # With too many teacher queries, the cheapest matching would take those as
        # unsure as the student's, and none that has found an object. The student's need
        # no choice: each of the teacher's gets the one most like it.
        if len(kept) > len(student):
            kept = kept[teacher.best[kept].topk(len(student)).indices]
        given = dict(pred_instances=student, gt_instances=teacher[kept])
        cost = sum(match_cost(**given, img_meta=img_meta) for match_cost in self.costs)
        of_student, of_kept = (
            torch.from_numpy(index).to(kept.device)
            for index in linear_sum_assignment(cost.cpu())
        )
        return of_student, kept[of_kept]

    def detections(
        self, probs: Tensor, boxes: Tensor, found: InstanceData, img_meta: dict
    ) -> tuple[Tensor, Tensor]:
        """Match an image's queries with detections in it; returns as ``__call__``.

        The queries are given by ``probs`` of the common classes, (n, classes), and
        ``boxes``, (n, 4); ``found`` has boxes, scores and common labels.
        """
        best = found.scores.to(probs)
        scores = best[:, None] * F.one_hot(found.labels, probs.shape[1])
        teacher = InstanceData(
            probs=scores, best=best, labels=found.labels, bboxes=found.bboxes.float()
        )
        return self(InstanceData(probs=probs, bboxes=boxes), teacher, img_meta)

    def queries(
        self, step: Step, student: list[InstanceData], teacher: list[InstanceData]
    ) -> tuple[list[InstanceData], list[InstanceData]]:
        """The paired queries of a layer, per image, with the common classes."""
        activation = query.activation_of(step.student)
        ours, theirs = [], []
        for s, t, sample in zip(student, teacher, step.data_samples, strict=True):
            logits = step.classes.select(s.scores, t.scores, activation=activation)
            s, t = (
                InstanceData(scores=scores, bboxes=side.bboxes)
                for scores, side in zip(logits, (s, t), strict=True)
            )
            of_student, of_teacher = self(
                _candidates(s, activation), _candidates(t, activation), sample.metainfo
            )
            ours.append(s[of_student])
            theirs.append(t[of_teacher])
        return ours, theirs


def _candidates(queries: InstanceData, activation: str) -> InstanceData:
    """The inputs of the match costs."""
    # Half precision would round the costs, and so change the matching.
    logits, bboxes = queries.scores.detach().float(), queries.bboxes.detach().float()
    probs = logits.sigmoid() if activation == 'sigmoid' else logits.softmax(-1)
    # the last column of a softmax is the background
    best, labels = (probs if activation == 'sigmoid' else probs[:, :-1]).max(-1)
    return InstanceData(
        scores=logits, probs=probs, best=best, labels=labels, bboxes=bboxes
    )
