"""Class logits of the object queries of DETR-like detectors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from mmengine.structures import InstanceData
from torch import Tensor, nn

from mmdist.registry import MODELS, TASK_UTILS
from mmdist.step import Step

from . import sparse_queries
from .base import Comparison, Pair
from .probabilities import check_min_score

# Per decoder layer, per image: `scores`, logits (queries, classes), and `bboxes`,
# (queries, 4), x1 y1 x2 y2 in pixels; the form that mmdet's match costs take.
Queries = list[list[InstanceData]]

# The weights are those with which mmdet trains its DETRs.
MATCH_COSTS = (
    dict(type='mmdist.ClassProbabilityCost', weight=2.0),
    dict(type='mmdet.BBoxL1Cost', weight=5.0, box_format='xywh'),
    dict(type='mmdet.IoUCost', weight=2.0, iou_mode='giou'),
)


@TASK_UTILS.register_module()
class ClassProbabilityCost:
    """L1 distance between the class probabilities of two sets of queries.

    mmdet's class costs ask for the one class of a ground truth, so a query that is sure
    of its class is cheap for every target of that class. A teacher's query is mostly
    unsure, and should get a query that is as unsure: its own copy above all. For a
    softmax and a teacher that is certain, half of this is mmdet's ClassificationCost
    plus 1.

    Args:
        weight: Weight of the cost.
    """

    def __init__(self, weight: float = 1.0) -> None:
        self.weight = weight

    def __call__(
        self,
        pred_instances: InstanceData,
        gt_instances: InstanceData,
        img_meta: dict | None = None,
        **kwargs,
    ) -> Tensor:
        """Compute the cost.

        Args:
            pred_instances: The student's queries; ``probs`` is (n, classes).
            gt_instances: The teacher's queries; ``probs`` is (m, classes).
            img_meta: Not used.

        Returns:
            The costs, (n, m).
        """
        return self.weight * torch.cdist(pred_instances.probs, gt_instances.probs, p=1)


@MODELS.register_module()
class QueryLogits(Comparison):
    """Compare the class logits of the queries of two DETRs, paired one to one.

    The queries of two DETRs stand in no common order, nor need they be of one number.
    So, per image, they are assigned to one another by Hungarian matching on class and
    box, as a DETR is matched with the ground truth (Carion et al., ECCV 2020, equation
    1). A row is such a pair. Of a teacher with more queries than the student, those
    with the best scores are matched. Denoising queries, auxiliary dense queries and,
    for DDQ, those that are not distinct are left out. The proposals of Sparse R-CNN and
    QueryInst are queries as well, and each stage of their cascade is a decoder layer.

    Args:
        loss: Config of the loss; ``mmdist.DISTLoss`` if omitted.
        layers: 'last', the last decoder layer, or 'all', every layer that both have,
            counted from the last, each with a matching of its own; their terms are
            summed.
        match_costs: Configs of the costs to match by: :class:`ClassProbabilityCost` and
            any of mmdet's match costs of classes and boxes, which get the teacher's
            queries as ground truth, labelled with their best class;
            ``MATCH_COSTS`` if omitted.
        min_score: Queries whose best class the teacher gives a smaller probability
            are not matched, so that a few objects are not outvoted by hundreds of
            empty queries. 0 takes all.
    """

    families = (
        'the DETRs of mmdet with a fixed list of classes: what is derived from its '
        '`DetectionTransformer`, and Sparse R-CNN and QueryInst'
    )

    def __init__(
        self,
        loss: dict | None = None,
        layers: str = 'last',
        match_costs: Sequence[dict] | None = None,
        min_score: float = 0.0,
    ) -> None:
        super().__init__(loss)
        if layers not in ('last', 'all'):
            raise ValueError(f"`layers` is 'last' or 'all', got {layers!r}.")
        check_min_score(min_score)
        self.layers = layers
        self.min_score = min_score
        self.match_costs = [
            TASK_UTILS.build(dict(cost)) for cost in match_costs or MATCH_COSTS
        ]

    def activation(self, student: nn.Module) -> str:
        """As the head's own classification loss."""
        return 'sigmoid' if _uses_sigmoid(student) else 'softmax'

    def student_modules(self, student: nn.Module) -> Sequence[nn.Module]:
        """The head on the decoder."""
        head = self._head(student)
        return (
            sparse_queries.modules(student)
            if sparse_queries.is_sparse(student)
            else [head]
        )

    def check_pair(self, student: nn.Module, teacher: nn.Module) -> None:
        """The teacher must be a DETR whose head has the student's activation."""
        self._head(teacher)
        if _uses_sigmoid(student) != _uses_sigmoid(teacher):
            kinds = {True: 'sigmoid, no background', False: 'softmax with background'}
            raise ValueError(
                f'QueryLogits: the head of the student ({type(student).__name__}) has '
                f'{kinds[_uses_sigmoid(student)]}, that of the teacher '
                f'({type(teacher).__name__}) {kinds[_uses_sigmoid(teacher)]}. Take a '
                'teacher with the same `bbox_head.loss_cls.use_sigmoid`.'
            )

    def record(self, step: Step) -> Queries:
        """The student's matching queries, from its own loss pass."""
        if sparse_queries.is_sparse(step.student):
            return sparse_queries.record(step)
        output = step.calls(self._head(step.student))[-1].output
        return _queries(step.student, output, step)

    asks_first = True

    def ask(self, step: Step, recorded: None) -> Queries:
        """The teacher's queries: its transformer and head on its features."""

        def run() -> Queries:
            if sparse_queries.is_sparse(step.teacher_model):
                return sparse_queries.ask(step)
            head_inputs = step.teacher_model.forward_transformer(
                step.teacher_features, step.data_samples
            )
            return _queries(
                step.teacher_model,
                step.teacher_model.bbox_head.forward(**head_inputs),
                step,
            )

        return step.shared('queries', run)

    def pair(self, step: Step, recorded: Queries, asked: Queries) -> list[Pair]:
        """One pair per decoder layer; rows are the matched queries of all images."""
        depth = 1 if self.layers == 'last' else min(len(recorded), len(asked))
        return [
            self._pair_layer(step, student, teacher)
            for student, teacher in zip(recorded[-depth:], asked[-depth:], strict=True)
        ]

    def _pair_layer(
        self, step: Step, student: list[InstanceData], teacher: list[InstanceData]
    ) -> Pair:
        rows = self.matched(step, student, teacher)
        return Pair(*(torch.cat([x.scores for x in side]) for side in rows))

    def matched(
        self, step: Step, student: list[InstanceData], teacher: list[InstanceData]
    ) -> tuple[list[InstanceData], list[InstanceData]]:
        """The queries of both sides, per image, paired, with the common classes.

        Args:
            step: The step.
            student: The student's queries of a decoder layer, per image.
            teacher: The teacher's.
        """
        ours, theirs = [], []
        for s, t, sample in zip(student, teacher, step.data_samples, strict=True):
            s_logits, t_logits = step.classes.select(
                s.scores,
                t.scores,
                activation=self.activation(step.student),
            )
            s = InstanceData(scores=s_logits, bboxes=s.bboxes)
            t = InstanceData(scores=t_logits, bboxes=t.bboxes)
            of_student, of_teacher = self.match(
                self.candidates(s.scores, s.bboxes, step),
                self.candidates(t.scores, t.bboxes, step),
                sample.metainfo,
            )
            ours.append(s[of_student])
            theirs.append(t[of_teacher])
        return ours, theirs

    @staticmethod
    def candidates(logits: Tensor, bboxes: Tensor, step: Step) -> InstanceData:
        """What the match costs look at."""
        # Half precision would round the costs, and the matching with them.
        logits, bboxes = logits.detach().float(), bboxes.detach().float()
        if _uses_sigmoid(step.student):
            probs = foreground = logits.sigmoid()
        else:
            probs = logits.softmax(-1)
            foreground = probs[:, :-1]  # the last column is the background
        best, labels = foreground.max(-1)
        return InstanceData(
            scores=logits, probs=probs, best=best, labels=labels, bboxes=bboxes
        )

    def match(
        self, student: InstanceData, teacher: InstanceData, img_meta: dict
    ) -> tuple[Tensor, Tensor]:
        """Indices of the paired queries, the student's and the teacher's."""
        # mmdet brings scipy; the loss alone, which imports this file too, needs neither
        from scipy.optimize import linear_sum_assignment

        kept = (teacher.best >= self.min_score).nonzero().squeeze(1)
        # The matching would choose what costs least: of too many queries of the
        # teacher those as unsure as the student's, and none that has found an object.
        # The student's need no choice: each of the teacher's gets the one like it.
        if len(kept) > len(student):
            kept = kept[teacher.best[kept].topk(len(student)).indices]
        cost = sum(
            match_cost(
                pred_instances=student, gt_instances=teacher[kept], img_meta=img_meta
            )
            for match_cost in self.match_costs
        )
        of_student, of_kept = (
            torch.from_numpy(index).to(kept.device)
            for index in linear_sum_assignment(cost.cpu())
        )
        return of_student, kept[of_kept]

    def _head(self, model: nn.Module) -> nn.Module:
        if sparse_queries.is_sparse(model):
            return _last_head(model)
        if not hasattr(model, 'forward_transformer'):
            raise self.unsupported(model, 'it has no `forward_transformer`')
        if hasattr(model, 'language_model'):
            raise self.unsupported(
                model, 'it scores the words of a prompt, not a list of classes'
            )
        return _last_head(model)


def _last_head(model: nn.Module) -> nn.Module:
    """The head of the last decoder layer or stage."""
    return (
        model.roi_head.bbox_head[-1]
        if sparse_queries.is_sparse(model)
        else model.bbox_head
    )


def _uses_sigmoid(model: nn.Module) -> bool:
    return _last_head(model).loss_cls.use_sigmoid


def _queries(model: nn.Module, output: tuple[Tensor, Tensor], step: Step) -> Queries:
    """Keep the queries that the model is matched by and predicts with.

    Args:
        model: The detector that has just run.
        output: What its head returned: class logits, (layers, N, queries, classes),
            and boxes, (layers, N, queries, 4), cx cy w h relative to the image.
        step: Tells the sizes of the images.
    """
    from mmdet.structures.bbox import bbox_cxcywh_to_xyxy

    logits, boxes = output
    # In training, the queries are [denoising | matching | dense (of DDQ alone)].
    cache = getattr(model, 'cache_dict', {})
    end = logits.size(2)
    if model.training:
        end -= cache.get('num_dense_queries', 0)
    patterns = getattr(model, 'num_patterns', 0) or 1  # DAB-DETR: content queries
    matching = slice(end - model.num_queries * patterns, end)
    distinct = cache.get('distinct_query_mask', [])  # of DDQ, from its second layer on
    layers = []
    for layer in range(len(logits)):
        images = []
        for i, sample in enumerate(step.data_samples):
            height, width = sample.metainfo['img_shape'][:2]
            bboxes = bbox_cxcywh_to_xyxy(boxes[layer, i, matching])
            queries = InstanceData(
                scores=logits[layer, i, matching],
                bboxes=bboxes * bboxes.new_tensor([width, height, width, height]),
            )
            if distinct and layer:
                # As DDQDETRHead reads it: one mask per image and attention head.
                queries = queries[distinct[layer - 1][i * cache['num_heads']][0]]
            images.append(queries)
        layers.append(images)
    return layers
