"""The boxes that two detectors predict."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from typing import Any

import torch
from mmengine.structures import InstanceData
from torch import Tensor, nn

from mmdist.families import (
    DENSE,
    QUERY,
    ROI,
    dense,
    family_of,
    query,
    reader_of,
    roi,
)
from mmdist.families.box_codes import Code, decode, encoded, encodes
from mmdist.families.probabilities import check_min_score, foreground
from mmdist.families.roi import Judged, Proposals
from mmdist.lookup import is_a
from mmdist.registry import MODELS
from mmdist.step import Step
from mmdist.teachers import Teacher

from .base import Comparison, Pair
from .detections import assign, check_detects, common, detected
from .matching import Matching

MIN_IOU = 0.5  # between a detection and an anchor or proposal


@MODELS.register_module()
class Boxes(Comparison):
    """Teach the student the boxes that the teacher predicts, row by row.

    Class scores do not say where a box ends. This complements ``RoILogits``,
    ``DenseLogits`` and ``QueryLogits``, with the same rows and the teacher's boxes as
    targets:

    - **two-stage**: a row is a proposal that the student sampled. The teacher regresses
      it for its own best class, and the student's box of the same class is compared.
    - **dense**: a row is an anchor or point of a location. Both models must have the
      same, but the shape of a location's single anchor or point can differ.
    - **queries**: a row is a pair that :class:`QueryLogits` matches.

    A teacher that is stored, or of another family or library, teaches its detections.
    An anchor or proposal gets the detection that overlaps it most, assigned as in
    :class:`Detections` with ``min_iou=0.5``. Queries are matched one to one.

    The weight of a row is the teacher's probability of its best class, or 0 if that is
    below ``min_score``. The loss is the weighted mean over the rows.

    Args:
        loss: Config of one of mmdet's box losses; if omitted, that of the student's
            head. An IoU loss gets boxes in pixels, any other (L1, smooth L1) gets them
            as the student's head encodes them, relative to anchors or proposals.
            Queries need an IoU loss.
        min_score: Minimum probability of the teacher's best class; for a dense head
            that ranks by class times centerness, objectness or IoU, that product.
        stage: The stage of a cascade teacher, as in :class:`RoILogits`.
        weight: Factor of the loss.

    Raises:
        ValueError: ``min_score`` is not a probability.
    """

    families = (
        'students that are dense, two-stage with bbox heads that regress four numbers, '
        'or have object queries; with teachers of the same family (if dense, with the '
        'same anchors), or the detections of teachers of any other family'
    )
    learns_from_answers = True

    def __init__(
        self,
        loss: dict | None = None,
        min_score: float = 0.3,
        stage: int | None = None,
        weight: float = 1.0,
    ) -> None:
        super().__init__(loss or dict(type='mmdet.GIoULoss'))
        check_min_score(min_score)
        self.is_own_loss = loss is None
        self.min_score = min_score
        self.weight = weight
        self.stage = stage
        self.match = Matching(min_score=min_score)

    @property
    def in_pixels(self) -> bool:
        """Whether the loss is an IoU loss, which takes boxes in pixels."""
        return 'IoU' in type(self.loss).__name__

    def bind(self, student: nn.Module, teacher: Teacher) -> None:
        """Check the student, and use its head's loss if none is given."""
        super().bind(student, teacher)
        is_queries = family_of(student) == QUERY
        head = _heads(student)[0]
        own = getattr(head, 'loss_iou' if is_queries else 'loss_bbox', None)
        if self.is_own_loss and own is not None:
            self.loss = deepcopy(own)
        if is_queries and not self.in_pixels:
            raise ValueError(
                'Boxes compares the boxes of queries in pixels: `loss` must be an IoU '
                f'loss, such as mmdet.GIoULoss, got {type(self.loss).__name__}.'
            )

    def student_modules(self, student: nn.Module) -> Sequence[nn.Module]:
        """The modules to record for the student's family."""
        if family_of(student) not in (DENSE, ROI, QUERY):
            raise self.unsupported(student, 'it belongs to none of these families')
        modules = reader_of(student).modules(student, self.unsupported)
        for head in _heads(student):
            if not _is_known(head, family_of(student)):
                raise self.unsupported(
                    student,
                    f'how a {type(head).__name__} encodes its boxes is not supported',
                )
        return modules

    def check_pair(self, student: nn.Module, teacher: nn.Module) -> None:
        """A teacher of the same family needs known boxes; any other must detect."""
        if family_of(student) != family_of(teacher):
            check_detects(teacher, self.unsupported)
            return
        self.student_modules(teacher)
        if family_of(student) == DENSE:
            dense.check_same_priors('Boxes', *_heads(student), *_heads(teacher), True)
        elif family_of(student) == ROI:
            roi.check_stage('Boxes', teacher, self.stage)
        else:
            query.check_same_activation('Boxes', student, teacher)

    def record(self, step: Step) -> list[Any]:
        """The proposals of all stages, the queries, or the output of a dense head."""
        if family_of(step.student) != DENSE:
            return reader_of(step.student).record(step)
        return [step.calls(dense.head_of(step.student))[-1].output]

    def ask(self, step: Step, recorded: list[Any]) -> list[Any]:
        """The teacher's outputs for the same proposals, its queries or dense output."""
        family = family_of(step.student)
        if family != family_of(step.teacher_model):
            return [common(step, one) for one in detected(step)]
        if family == ROI:
            judged = roi.judge_once(step, recorded, self.stage)
            return [outputs[-1] for outputs in judged]
        return query.ask(step) if family == QUERY else [dense.ask(step)]

    def pair(self, step: Step, recorded: list[Any], asked: list[Any]) -> list[Pair]:
        """A pair of boxes, (rows, 4), for each stage of the student."""
        family = family_of(step.student)
        if family != family_of(step.teacher_model):
            return self._of_detections(step, recorded, asked)
        if family == ROI:
            both = zip(recorded, asked, strict=True)
            return [self._of_proposals(step, *one) for one in both]
        compare = self._of_queries if family == QUERY else self._of_locations
        return [compare(step, recorded[-1], asked[-1])]

    def _of_proposals(self, step: Step, proposals: Proposals, judged: Judged) -> Pair:
        _, teacher = roi.stages(step.teacher_model)[judged.stage]
        logits = roi.per_class(step.teacher_model, judged.stage, judged.logits)
        scores, ours, theirs = step.classes.best(foreground(logits, 'softmax'))
        priors = proposals.rois[:, 1:]
        target = teacher.bbox_coder.decode(
            priors, _of_class(teacher, judged.deltas, theirs)
        )
        return self._two_stage(step, proposals, ours, target, scores)

    def _two_stage(
        self,
        step: Step,
        proposals: Proposals,
        classes: Tensor,
        target: Tensor,
        scores: Tensor,
    ) -> Pair:
        """A two-stage student's boxes, for targets given in pixels, (rows, 4)."""
        _, head = roi.stages(step.student)[proposals.stage]
        code, priors = _of_class(head, proposals.deltas, classes), proposals.rois[:, 1:]
        if self.in_pixels:
            code = head.bbox_coder.decode(priors, code)
        else:
            target = head.bbox_coder.encode(priors, target)
        term = roi.term_of(step.student, proposals.stage)
        return self._pair(code, target, scores, **term)

    def _of_locations(self, step: Step, recorded: tuple, asked: tuple) -> Pair:
        student, teacher = (
            dense.head_of(model) for model in (step.student, step.teacher_model)
        )
        scores = []
        for level in dense.scores_of(teacher, asked, 'joint'):
            rows = level.permute(0, 3, 4, 1, 2)  # (N, h, w, anchors, classes)
            best, *_ = step.classes.best(rows.flatten(0, 3))
            best = best.view(rows.shape[:-1])
            mask = step.valid_mask(*rows.shape[1:3])
            if mask is not None:
                best = best * mask.unsqueeze(-1)
            scores.append(best.flatten(1))
        target = decode(teacher, encoded(teacher, asked))
        return self._dense(student, recorded, target, torch.cat(scores, 1))

    def _dense(
        self, head: nn.Module, recorded: tuple, target: Tensor, scores: Tensor
    ) -> Pair:
        """A dense student's boxes, for targets given in pixels, (N, rows, 4)."""
        code = encoded(head, recorded)
        if self.in_pixels:
            code = Code(decode(head, code), code.priors)
        else:
            priors = code.priors.repeat(len(target), 1)
            target = head.bbox_coder.encode(priors, target.flatten(0, 1))
        return self._pair(
            code.code.flatten(0, 1), target.reshape(-1, 4), scores.flatten()
        )

    def _of_detections(
        self, step: Step, recorded: list[Any], asked: list[InstanceData]
    ) -> list[Pair]:
        """The student's boxes, with the teacher's detections as targets."""
        family = family_of(step.student)
        if family == QUERY:
            return [self._of_matched(step, recorded[-1], asked)]
        if family == DENSE:
            return [self._of_anchors(step, recorded[-1], asked)]
        return [self._of_rois(step, proposals, asked) for proposals in recorded]

    def _of_anchors(
        self, step: Step, recorded: tuple, asked: list[InstanceData]
    ) -> Pair:
        head, maps = dense.head_of(step.student), recorded[1]
        levels = dense.anchors(head, maps)
        found = [_nearest(torch.cat(levels), one, dense.ASSIGNED) for one in asked]
        target, scores, _ = map(torch.stack, zip(*found, strict=True))
        masks = [step.valid_mask(*x.shape[-2:]) for x in maps]
        if masks[0] is not None:  # some image is padded
            inside = [
                mask.flatten(1).repeat_interleave(len(boxes) // mask[0].numel(), 1)
                for mask, boxes in zip(masks, levels, strict=True)
            ]
            scores = scores * torch.cat(inside, 1)
        return self._dense(head, recorded, target, scores)

    def _of_rois(
        self, step: Step, proposals: Proposals, asked: list[InstanceData]
    ) -> Pair:
        priors = proposals.rois[:, 1:]
        target, scores = torch.zeros_like(priors), torch.zeros_like(priors[:, 0])
        labels = torch.zeros_like(scores, dtype=torch.long)
        images = proposals.rois[:, 0] % len(asked)
        for image, one in enumerate(asked):
            here = images == image
            target[here], scores[here], labels[here] = _nearest(
                priors[here], one, roi.ASSIGNED
            )
        if step.classes.student is not None:
            columns = [column for (column,) in step.classes.student]
            labels = labels.new_tensor(columns)[labels]
        return self._two_stage(step, proposals, labels, target, scores)

    def _of_matched(
        self, step: Step, queries: list[InstanceData], asked: list[InstanceData]
    ) -> Pair:
        (places,) = query.places(step)
        rows = []
        for image, (ours, one) in enumerate(zip(queries, asked, strict=True)):
            probs = places.scores[places.images == image].detach()
            meta = step.data_samples[image].metainfo
            own, theirs = self.match.detections(
                probs, ours.bboxes.detach().float(), one, meta
            )
            rows.append((ours.bboxes[own], one.bboxes[theirs], one.scores[theirs]))
        return self._pair(*map(torch.cat, zip(*rows, strict=True)))

    def _of_queries(
        self, step: Step, recorded: list[InstanceData], asked: list[InstanceData]
    ) -> Pair:
        rows = self.match.queries(step, recorded, asked)
        code, target = (torch.cat([x.bboxes for x in side]) for side in rows)
        logits = torch.cat([x.scores for x in rows[1]])
        activation = query.activation_of(step.teacher_model)
        return self._pair(code, target, foreground(logits, activation).amax(1))

    def _pair(
        self,
        code: Tensor,
        target: Tensor,
        scores: Tensor,
        weight: float = 1.0,
        name: str = '',
    ) -> Pair:
        row_weight = scores * (scores >= self.min_score)
        if self.in_pixels:
            # RTMDet's distances can be negative: not a box, so no IoU
            sizes = torch.cat([x[:, 2:] - x[:, :2] for x in (code, target)], 1)
            row_weight = row_weight * (sizes > 0).all(1)
        weight = self.weight * weight
        return Pair(
            code.float(), target.float(), None, weight, name, row_weight=row_weight
        )

    def _plain_loss(self, pair: Pair) -> Tensor:
        counts = pair.row_weight[:, None] > 0
        # a row that does not count can have any box, and a NaN loss
        target = torch.where(counts, pair.teacher, 0)
        code = torch.where(counts, pair.student, target)
        values = self.loss(code, target, reduction_override='none')
        # IoU gives (rows,), L1 (rows, 4); reshape would fail without rows
        values = torch.where(counts, values[..., None].flatten(1), 0).sum(1)
        total = pair.row_weight.sum()
        return (pair.row_weight * values).sum() / total.clamp(min=1e-6)


def _nearest(
    places: Tensor, found: InstanceData, assigned: str
) -> tuple[Tensor, Tensor, Tensor]:
    """The detection at each place: box, (places, 4), score (0 if none) and label."""
    if not len(found):
        nothing = torch.zeros_like(places[:, 0])
        return torch.zeros_like(places), nothing, nothing.long()
    overlap, which = assign(places, found.bboxes, MIN_IOU, assigned).max(1)
    scores = found.scores[which] * (overlap > 0)
    boxes, labels = found.bboxes[which], found.labels[which]
    return boxes.to(places), scores.to(places), labels


def _heads(model: nn.Module) -> Sequence[nn.Module]:
    """The heads that regress boxes; one per stage for a two-stage detector."""
    if family_of(model) == ROI:
        return [head for _, head in roi.stages(model)]
    return [dense.head_of(model) if family_of(model) == DENSE else query.head_of(model)]


def _is_known(head: nn.Module, family: str) -> bool:
    if family == DENSE:
        return encodes(head)
    if family == QUERY:
        return True
    # CrowdDet regresses several boxes per proposal, SABL the sides of one
    coder = getattr(head, 'bbox_coder', None)
    return not hasattr(head, 'num_instance') and not is_a(head, 'SABLHead') and coder


def _of_class(head: nn.Module, deltas: Tensor, classes: Tensor) -> Tensor:
    """The four deltas of each row's class, (rows, 4)."""
    if head.reg_class_agnostic:
        return deltas
    index = classes[:, None, None].expand(-1, 1, 4)
    return deltas.unflatten(1, (-1, 4)).gather(1, index).squeeze(1)
