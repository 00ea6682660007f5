"""Class logits of the object queries of DETR-like detectors."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy

import torch
from mmengine.structures import InstanceData
from torch import nn

from mmdist.families import name_of, query
from mmdist.families.probabilities import check_min_score, foreground
from mmdist.families.query import Queries
from mmdist.losses import Terms
from mmdist.registry import MODELS
from mmdist.step import Step
from mmdist.teachers import Teacher

from .base import Comparison, Pair
from .matching import Matching


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

    With ``shared=True`` nothing is matched: the student's decoder also runs on the
    queries that the teacher's starts from, so a row is the same query on both sides
    (the idea of KD-DETR, Wang et al., arXiv 2211.08071). These rows teach their boxes
    too, by the L1 and IoU losses of the student's head, each row weighted by the
    teacher's probability of its best class: ``loss_<name>_box``.

    Args:
        loss: Config of the loss of the logits; ``mmdist.DISTLoss`` if omitted.
        layers: 'last', the last decoder layer, or 'all', every layer that both have,
            counted from the last, each with a matching of its own; their terms are
            summed. If omitted, 'all' of shared queries, else 'last'.
        match_costs: Configs of the costs to match by: :class:`ClassProbabilityCost` and
            any of mmdet's match costs of classes and boxes, which get the teacher's
            queries as ground truth, labelled with their best class;
            ``MATCH_COSTS`` if omitted.
        min_score: Queries whose best class the teacher gives a smaller probability
            are not compared, so that a few objects are not outvoted by hundreds of
            empty queries. 0 takes all.
        shared: Whether the student answers the teacher's queries. Both need
            decoders of the same class; DDQ and Sparse R-CNN are refused.
        teacher_embed_dims: Width of the teacher's decoder, where it is not the
            student's. A linear layer, which is trained with the student, brings shared
            queries to the student's width.

    Raises:
        ValueError: An option is out of its range.
    """

    families = (
        'the DETRs of mmdet with a fixed list of classes: what is derived from its '
        '`DetectionTransformer`, and Sparse R-CNN and QueryInst'
    )
    asks_first = True

    def __init__(
        self,
        loss: dict | None = None,
        layers: str | None = None,
        match_costs: Sequence[dict] | None = None,
        min_score: float = 0.0,
        shared: bool = False,
        teacher_embed_dims: int | None = None,
    ) -> None:
        super().__init__(loss)
        layers = layers or ('all' if shared else 'last')
        if layers not in ('last', 'all'):
            raise ValueError(f"`layers` is 'last' or 'all', got {layers!r}.")
        check_min_score(min_score)
        self.layers = layers
        self.match = Matching(match_costs, min_score)
        self.shared = shared
        self.teacher_embed_dims = teacher_embed_dims
        self.projection: nn.Module = nn.Identity()
        self.box_losses = nn.ModuleDict()  # of the student's head

    def bind(self, student: nn.Module, teacher: Teacher) -> None:
        """Check the student, complete the loss, and make the linear layer."""
        super().bind(student, teacher)
        if not self.shared:
            return
        head = query.head_of(student)
        self.box_losses = nn.ModuleDict(
            dict(l1=deepcopy(head.loss_bbox), iou=deepcopy(head.loss_iou))
        )
        width = self.teacher_embed_dims
        if width not in (None, student.embed_dims):
            # Forked: the student's own weights are those it has without distillation.
            with torch.random.fork_rng(devices=[]):
                self.projection = nn.Linear(width, student.embed_dims)

    def activation(self, student: nn.Module) -> str:
        """As the head's own classification loss."""
        return query.activation_of(student)

    def student_modules(self, student: nn.Module) -> Sequence[nn.Module]:
        """The head on the decoder, and the decoder if queries are shared."""
        modules = query.modules(student, self.unsupported)
        if self.shared:
            modules.append(query.decoder_of(student, self.unsupported))
        return modules

    def teacher_modules(self, teacher: nn.Module) -> Sequence[nn.Module]:
        """The decoder if queries are shared."""
        return [query.decoder_of(teacher, self.unsupported)] if self.shared else []

    def check_pair(self, student: nn.Module, teacher: nn.Module) -> None:
        """The teacher must be a DETR whose head has the student's activation."""
        query.head_of(teacher, self.unsupported)
        query.check_same_activation('QueryLogits', student, teacher)
        if self.shared:
            self._check_shared(student, teacher)

    def _check_shared(self, student: nn.Module, teacher: nn.Module) -> None:
        self.teacher_modules(teacher)
        ours, theirs = (
            f'{type(model.decoder).__name__}'
            + (' in two stages' if getattr(model, 'as_two_stage', False) else '')
            for model in (student, teacher)
        )
        if ours != theirs:
            raise ValueError(
                f'QueryLogits(shared=True): the student ({name_of(student)}) has a '
                f'{ours}, the teacher ({name_of(teacher)}) a {theirs}, which starts '
                'from other queries. Omit `shared`, and queries are matched.'
            )
        width = self.teacher_embed_dims or student.embed_dims
        if teacher.embed_dims != width:
            raise ValueError(
                "QueryLogits(shared=True): the teacher's queries have "
                f'{teacher.embed_dims} channels, not {width}. Set '
                f'`teacher_embed_dims={teacher.embed_dims}`.'
            )

    def record(self, step: Step) -> Queries:
        """The student's matching queries, from its own loss pass."""
        return [] if self.shared else query.record(step)

    def ask(self, step: Step, recorded: None) -> Queries:
        """The teacher's queries: its transformer and head on its features."""
        asked = query.ask(step)
        if self.shared:
            query.ask_initial(step)  # for `pair`, before the teacher is forgotten
        return asked

    def pair(self, step: Step, recorded: Queries, asked: Queries) -> list[Pair]:
        """One pair per decoder layer; rows are the paired queries of all images."""
        if self.shared:
            width = step.teacher_model.embed_dims
            initial = {
                name: self.projection(x) if x.size(-1) == width else x
                for name, x in query.ask_initial(step).items()
            }
            recorded = query.answer(step, initial)
        depth = 1 if self.layers == 'last' else min(len(recorded), len(asked))
        pairs = []
        for layers in zip(recorded[-depth:], asked[-depth:], strict=True):
            if self.shared:
                pairs += self._of_shared(step, *layers)
                continue
            sides = self.match.queries(step, *layers)
            pairs.append(Pair(*(torch.cat([x.scores for x in side]) for side in sides)))
        return pairs

    def _of_shared(
        self, step: Step, recorded: list[InstanceData], asked: list[InstanceData]
    ) -> list[Pair]:
        """The logits of a layer's queries, and their boxes relative to the image."""
        activation = query.activation_of(step.student)
        logits = (torch.cat([x.scores for x in side]) for side in (recorded, asked))
        ours, theirs = step.classes.select(*logits, activation=activation)
        best = foreground(theirs, activation).amax(1)
        counts = best >= self.match.min_score
        sizes = [best.new_tensor(x.img_shape[1::-1]).tile(2) for x in step.data_samples]
        boxes = (
            torch.cat([x.bboxes / size for x, size in zip(side, sizes, strict=True)])
            for side in (recorded, asked)
        )
        return [
            Pair(ours, theirs, counts if self.match.min_score else None),
            Pair(*boxes, name='box', row_weight=best * counts),
        ]

    def _compute(self, pair: Pair) -> Terms:
        if pair.name != 'box':
            return super()._compute(pair)
        from mmdet.structures.bbox import bbox_xyxy_to_cxcywh

        corners, weight = (pair.student, pair.teacher), pair.row_weight
        options = dict(avg_factor=weight.sum().clamp(min=1e-6))
        iou = self.box_losses['iou'](*corners, weight=weight, **options)
        centres = map(bbox_xyxy_to_cxcywh, corners)
        l1 = self.box_losses['l1'](*centres, weight=weight[:, None], **options)
        return Terms(iou + l1, None, None)
