"""The boxes that two detectors predict."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from typing import Any

import torch
from mmengine.structures import InstanceData
from torch import Tensor, nn

from mmdist.families import DENSE, QUERY, ROI, dense, family_of, query, reader_of, roi
from mmdist.families.box_codes import decode, encoded, encodes
from mmdist.families.probabilities import check_min_score, foreground
from mmdist.families.roi import Proposals
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
        name = 'loss_iou' if is_queries else 'loss_bbox'
        own = getattr(_heads(student)[0], name, None)
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
            dense.check_same_priors(*_heads(student), *_heads(teacher))
        elif family_of(student) == ROI:
            roi.check_stage(teacher, self.stage)
        else:
            query.check_same_activation(student, teacher)

    def record(self, step: Step) -> Any:
        """The proposals of all stages, the queries, or the output of a dense head."""
        return reader_of(step.student).record(step)

    def ask(self, step: Step, recorded: Any) -> Any:
        """The teacher's outputs for the same proposals, its queries or dense output.

        From a teacher of another family, its detections in each image.
        """
        if not _are_alike(step):
            return [common(step, one) for one in detected(step)]
        if family_of(step.student) == ROI:
            return roi.judge(step, recorded, self.stage)
        return reader_of(step.teacher_model).ask(step)

    def pair(self, step: Step, recorded: Any, asked: Any) -> list[Pair]:
        """A pair of boxes, (rows, 4), for each stage of the student."""
        family = family_of(step.student)
        if family == DENSE:
            return [self._of_locations(step, recorded, asked)]
        if family == QUERY:
            return [self._of_queries(step, recorded[-1], asked)]
        asked = asked if _are_alike(step) else [asked] * len(recorded)
        both = zip(recorded, asked, strict=True)
        return [self._of_proposals(step, *one) for one in both]

    def _of_locations(self, step: Step, output: tuple, asked: Any) -> Pair:
        """A dense student's boxes."""
        head = dense.head_of(step.student)
        if _are_alike(step):
            teacher, best = dense.head_of(step.teacher_model), []
            for level in dense.scores_of(teacher, asked, 'joint'):
                rows = level.permute(0, 3, 4, 1, 2)  # (N, h, w, anchors, classes)
                score, *_ = step.classes.best(rows.flatten(0, 3))
                best.append(score.view(len(level), -1))
            scores = torch.cat(best, 1)
            target = decode(teacher, encoded(teacher, asked))
        else:
            anchors = torch.cat(dense.anchors(head, output[1]))
            found = [_nearest(anchors, one, dense.ASSIGNED) for one in asked]
            target, scores, _ = map(torch.stack, zip(*found, strict=True))
        inside = dense.inside(step, head, output[1])
        if inside[0] is not None:
            scores = scores * torch.cat(inside, 1)
        code = encoded(head, output)
        if self.in_pixels:
            own = decode(head, code)
        else:
            own, priors = code.code, code.priors.repeat(len(target), 1)
            target = head.bbox_coder.encode(priors, target.flatten(0, 1))
        return self._pair(own.flatten(0, 1), target.reshape(-1, 4), scores.flatten())

    def _of_proposals(self, step: Step, proposals: Proposals, asked: Any) -> Pair:
        """The boxes of a stage of a two-stage student."""
        _, head = roi.stages(step.student)[proposals.stage]
        priors = proposals.rois[:, 1:]
        if _are_alike(step):
            _, teacher = roi.stages(step.teacher_model)[asked.stage]
            probabilities = foreground(asked.logits, 'softmax')
            scores, classes, theirs = step.classes.best(probabilities)
            deltas = roi.of_class(asked.deltas.unflatten(1, (-1, 4)), theirs)
            target = teacher.bbox_coder.decode(priors, deltas)
        else:
            target, scores = torch.zeros_like(priors), torch.zeros_like(priors[:, 0])
            classes = torch.zeros_like(scores, dtype=torch.long)
            images = proposals.rois[:, 0] % len(asked)
            for image, one in enumerate(asked):
                here = images == image
                found = _nearest(priors[here], one, roi.ASSIGNED)
                target[here], scores[here], classes[here] = found
            if step.classes.student is not None:
                columns = [column for (column,) in step.classes.student]
                classes = classes.new_tensor(columns)[classes]
        own = roi.of_class(proposals.deltas.unflatten(1, (-1, 4)), classes)
        if self.in_pixels:
            own = head.bbox_coder.decode(priors, own)
        else:
            target = head.bbox_coder.encode(priors, target)
        term = roi.term_of(step.student, proposals.stage)
        return self._pair(own, target, scores, **term)

    def _of_queries(self, step: Step, queries: list[InstanceData], asked: list) -> Pair:
        """The boxes of the queries that are matched one to one."""
        if _are_alike(step):
            ours, theirs = self.match.queries(step, queries, asked[-1])
            logits = torch.cat([x.scores for x in theirs])
            activation = query.activation_of(step.teacher_model)
            scores = foreground(logits, activation).amax(1)
        else:
            (places,) = query.places(step)
            ours, theirs = [], []
            for image, (own, found) in enumerate(zip(queries, asked, strict=True)):
                here = places.images == image
                rows, columns = self.match.detections(
                    places.scores[here].detach(),
                    places.boxes[here],
                    found,
                    step.data_samples[image].metainfo,
                )
                ours.append(own[rows])
                theirs.append(found[columns])
            scores = torch.cat([x.scores for x in theirs])
        own, target = (torch.cat([x.bboxes for x in side]) for side in (ours, theirs))
        return self._pair(own, target, scores)

    def _pair(
        self, own: Tensor, target: Tensor, scores: Tensor, weight=1.0, name=''
    ) -> Pair:
        row_weight = scores * (scores >= self.min_score)
        if self.in_pixels:
            # RTMDet's distances can be negative: not a box, so no IoU
            sizes = torch.cat([x[:, 2:] - x[:, :2] for x in (own, target)], 1)
            row_weight = row_weight * (sizes > 0).all(1)
        rows, weight = (own.float(), target.float()), self.weight * weight
        return Pair(*rows, weight=weight, name=name, row_weight=row_weight)

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


def _are_alike(step: Step) -> bool:
    """Whether student and teacher are of the same family."""
    return family_of(step.student) == family_of(step.teacher_model)


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
