"""What a teacher detects, at the student's anchors, proposals or queries."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch
from mmengine.structures import InstanceData
from torch import Tensor, nn

from mmdist.losses import DISTLoss
from mmdist.losses.correlations.common import sum_over_processes
from mmdist.losses.dist_loss import process_group
from mmdist.registry import MODELS
from mmdist.step import Step
from mmdist.teachers import ForeignTeacher

from .base import Comparison, Pair
from .default import DENSE, QUERIES, ROI, kind_of
from .dense_logits import DenseLogits, prior_generator
from .probabilities import foreground
from .query_logits import QueryLogits
from .roi_logits import Proposals, RoILogits

# Of teachers of other libraries; those of mmdet have their own.
MIN_SCORE, NMS, MAX_PER_IMAGE = 0.05, dict(type='nms', iou_threshold=0.5), 100
# of places at once, in the cache; all of them take 1 GB beside 300 boxes at 800x1333
CHUNK = 4096
# A point stands for a square of so many strides, the anchor of ATSS, which does as well
# as FCOS's points (Zhang et al., CVPR 2020, arXiv 1912.02424, section 3.3).
POINT_SIZE = 8


@MODELS.register_module()
class Detections(Comparison):
    """Compare the student's scores with what any detector detects at the same places.

    The teacher predicts as it does in a test, NMS included. A row is an anchor of the
    dense student, a proposal that the two-stage student sampled, or a query. The
    teacher's probability of a class there is the score of its best detection of that
    class which overlaps the anchor or proposal, and 0 where none does; both sides are
    probabilities without background. So all that is asked of the teacher is
    ``predict``: it may be of any architecture, and its own anchors, strides and queries
    do not matter.

    An anchor is overlapped as mmdet's ``MaxIoUAssigner`` has it: with an IoU of
    ``min_iou``, or if it is the one that overlaps the detection most. Anchors in the
    padding do not count. Queries are to find each object once: they are assigned to the
    detections one to one, as :class:`QueryLogits` does it, whatever the IoU.

    Args:
        loss: Config of the loss; if omitted, ``mmdist.DISTLoss`` with ``beta=0``. Most
            rows are of background, 0 for all classes, and have no inter-class relation.
        min_iou: The least IoU of a detection with an anchor or proposal.

    Raises:
        ValueError: ``min_iou`` is out of its range.
    """

    families = (
        'students with a dense head, a RoI head of extractor and bbox head, or object '
        'queries, and any detector as teacher'
    )
    asks_first = True

    def __init__(self, loss: dict | None = None, min_iou: float = 0.5) -> None:
        super().__init__(loss or dict(type='mmdist.DISTLoss', beta=0.0))
        if not 0 < min_iou < 1:
            raise ValueError(f'`min_iou` is an IoU, 0 < min_iou < 1, got {min_iou}.')
        self.min_iou = min_iou
        # what `predict` ranks by
        self._readers = {
            DENSE: DenseLogits(score='joint'),
            ROI: RoILogits(),
            QUERIES: QueryLogits(),
        }

    def activation(self, student: nn.Module) -> str:
        """Probabilities are compared."""
        return 'identity'

    def student_modules(self, student: nn.Module) -> Sequence[nn.Module]:
        """The dense head, extractor and bbox head, or the head of the queries."""
        modules = self._reader(student).student_modules(student)
        if kind_of(student) == DENSE and prior_generator(modules[0]) is None:
            raise self.unsupported(student, 'its head has no anchors or points')
        return modules

    def check_pair(self, student: nn.Module, teacher: nn.Module) -> None:
        """The teacher must be a detector."""
        if isinstance(teacher, ForeignTeacher):
            if teacher.gives != 'boxes':
                raise self.unsupported(teacher, f'it gives {teacher.gives}')
        elif kind_of(teacher) not in (DENSE, ROI, QUERIES):
            raise self.unsupported(teacher, 'it is no detector')
        elif getattr(teacher, 'bbox_head', getattr(teacher, 'roi_head', None)) is None:
            raise self.unsupported(teacher, 'it detects no boxes')

    def record(self, step: Step) -> list:
        """The output of the dense head, all stages' proposals, or the queries."""
        reader = self._reader(step.student)
        if kind_of(step.student) == ROI:
            return reader.record(step)
        if kind_of(step.student) == QUERIES:
            return reader.record(step)[-1:]
        (head,) = reader.student_modules(step.student)
        return [step.calls(head)[-1].output]

    def ask(self, step: Step, recorded: None) -> list[InstanceData]:
        """The teacher's detections in each image: boxes, scores and labels."""
        if isinstance(step.teacher_model, ForeignTeacher):
            return [after_nms(step.teacher_model, *x) for x in step.teacher_features]
        return [sample.pred_instances for sample in step.teacher_predictions]

    def pair(self, step: Step, recorded: list, asked: list[InstanceData]) -> list[Pair]:
        """A pair for each level of a dense head or stage of a cascade."""
        found = []
        for detections in asked:
            labels = detections.labels.long()  # CrowdDet's are floats
            labels = step.classes.common_labels(labels)
            common = InstanceData(
                bboxes=detections.bboxes, scores=detections.scores, labels=labels
            )
            found.append(common[labels >= 0])
        if kind_of(step.student) == ROI:
            return [self._of_proposals(step, one, found) for one in recorded]
        if kind_of(step.student) == QUERIES:
            return [self._of_queries(step, recorded[0], found)]
        return self._of_locations(step, recorded[0], found)

    def forward(self, name: str, pairs: Iterable[Pair]) -> dict[str, Tensor]:
        """As in the base; DIST compares the classes that are there."""
        if isinstance(self.loss, DISTLoss):
            pairs = [self._of_classes_that_are_there(pair) for pair in pairs]
        return super().forward(name, pairs)

    def _of_classes_that_are_there(self, pair: Pair) -> Pair:
        """Without the classes of which nothing is detected.

        They have no relation, and would only divide the mean over all classes: of
        COCO's 80 a batch shows a few.
        """
        there = pair.teacher.float().sum(0)
        if self.loss.sync:  # the same columns in all processes
            there = sum_over_processes(there, process_group())
        index = there.nonzero().squeeze(1)
        if not len(index):
            nothing = pair.teacher.new_zeros(len(pair.teacher), dtype=torch.bool)
            return replace(pair, mask=nothing)
        return replace(
            pair, student=pair.student[:, index], teacher=pair.teacher[:, index]
        )

    def _of_proposals(
        self, step: Step, proposals: Proposals, found: list[InstanceData]
    ) -> Pair:
        stage, rois, logits, _ = proposals
        logits = self._readers[ROI].per_class(step.student, stage, logits)
        logits = step.classes.select_student(logits, 1, 'softmax')
        student = foreground(logits, 'softmax')
        # CrowdDet predicts several times for a proposal, TridentNet in several branches
        rois = rois.repeat_interleave(len(student) // max(len(rois), 1), 0)
        images = rois[:, 0] % len(found)
        teacher = torch.zeros_like(student)
        for image, detections in enumerate(found):
            here = images == image
            if here.any() and len(detections):
                overlaps = _overlaps(rois[here, 1:], detections.bboxes)
                matched = overlaps >= self.min_iou
                teacher[here] = best_scores(matched, detections, student.shape[1])
        weight, name = 1.0, ''
        roi_head = step.student.roi_head
        if isinstance(roi_head.bbox_head, nn.ModuleList):
            weight, name = roi_head.stage_loss_weights[stage], f's{stage}'
        return Pair(student, teacher, None, weight, name, 'identity')

    def _of_queries(
        self, step: Step, queries: list[InstanceData], found: list[InstanceData]
    ) -> Pair:
        reader = self._readers[QUERIES]
        activation = reader.activation(step.student)
        students, teachers = [], []
        for query, detections, sample in zip(
            queries, found, step.data_samples, strict=True
        ):
            logits = step.classes.select_student(query.scores, 1, activation)
            student = foreground(logits, activation)
            best, labels = detections.scores.to(student), detections.labels
            probs = best[:, None] * nn.functional.one_hot(labels, student.shape[1])
            candidates = reader.candidates(logits, query.bboxes, step)
            candidates.probs = student.detach()  # without background, as the teacher's
            of_student, of_teacher = reader.match(
                candidates,
                InstanceData(
                    probs=probs,
                    best=best,
                    labels=labels,
                    bboxes=detections.bboxes.float(),
                ),
                sample.metainfo,
            )
            teacher = torch.zeros_like(student)
            teacher[of_student] = probs[of_teacher]
            students.append(student)
            teachers.append(teacher)
        return Pair(torch.cat(students), torch.cat(teachers), activation='identity')

    def _of_locations(
        self, step: Step, output: tuple, found: list[InstanceData]
    ) -> list[Pair]:
        reader = self._readers[DENSE]
        (head,) = reader.student_modules(step.student)
        levels = [
            step.classes.select_student(x, 2, 'identity')
            for x in reader.scores_of(head, output)
        ]
        anchors = _anchors(head, levels)
        numbers = [len(x) for x in anchors]
        teachers = torch.stack(
            [
                self._scores_at_anchors(torch.cat(anchors), detections, levels[0])
                for detections in found
            ]
        ).split(numbers, 1)
        pairs = []
        for student, teacher in zip(levels, teachers, strict=True):
            rows = student.permute(0, 3, 4, 1, 2)  # (N, h, w, anchors, classes)
            mask = step.valid_mask(*student.shape[-2:])
            if mask is not None:
                mask = mask[..., None].expand(rows.shape[:-1]).flatten()
            pairs.append(
                Pair(
                    rows.flatten(0, 3),
                    teacher.flatten(0, 1),
                    mask,
                    activation='identity',
                )
            )
        return pairs

    def _scores_at_anchors(
        self, anchors: Tensor, detections: InstanceData, like: Tensor
    ) -> Tensor:
        classes = like.shape[2]
        if not len(detections):
            return anchors.new_zeros(len(anchors), classes)
        overlaps = _overlaps(anchors, detections.bboxes)
        least = overlaps.amax(0).clamp(1e-6, self.min_iou)
        return best_scores(overlaps >= least, detections, classes)

    def _reader(self, model: nn.Module) -> Comparison:
        kind = kind_of(model)
        if kind not in self._readers:
            raise self.unsupported(model, 'it is of none of these families')
        return self._readers[kind]


def best_scores(matched: Tensor, detections: InstanceData, classes: int) -> Tensor:
    """For each place and class the best score of the detections there, else 0.

    Args:
        matched: Which detections are at a place, (places, detections).
        detections: With ``scores`` and ``labels``, (detections,).
        classes: Number of classes.

    Returns:
        (places, classes).
    """
    places, which = matched.nonzero(as_tuple=True)
    scores = detections.scores.float()
    best = scores.new_zeros(len(matched) * classes)
    cells = places * classes + detections.labels[which]
    return best.scatter_reduce(0, cells, scores[which], 'amax').view(-1, classes)


def _anchors(head: nn.Module, levels: Sequence[Tensor]) -> list[Tensor]:
    """The anchors of each level, (h * w * anchors, 4); squares around points."""
    generator = prior_generator(head)
    sizes = [x.shape[-2:] for x in levels]
    priors = generator.grid_priors(sizes, device=levels[0].device)
    if hasattr(generator, 'base_anchors'):
        return priors
    squares = []
    for points, stride in zip(priors, generator.strides, strict=True):
        half = points.new_tensor(stride).expand(2) * (POINT_SIZE / 2)
        squares.append(torch.cat([points[:, :2] - half, points[:, :2] + half], 1))
    return squares


def _overlaps(places: Tensor, boxes: Tensor) -> Tensor:
    """IoU of each place with each box."""
    from mmdet.structures.bbox import bbox_overlaps

    chunks = places.float().split(CHUNK)
    return torch.cat([bbox_overlaps(chunk, boxes.float()) for chunk in chunks])


def after_nms(model: ForeignTeacher, boxes: Tensor, scores: Tensor) -> InstanceData:
    """The detections in an image by a model that gives all its boxes.

    Args:
        model: The model.
        boxes: (M, 4), x1 y1 x2 y2 in pixels.
        scores: (M, classes), as its ``activation`` says.

    Returns:
        ``bboxes``, ``scores`` and ``labels``.
    """
    from mmdet.models.layers import multiclass_nms

    scores = foreground(scores, model.activation)
    background = scores.new_zeros(len(scores), 1)  # a column that is ignored
    found, labels = multiclass_nms(
        boxes.float(), torch.cat([scores, background], 1), MIN_SCORE, NMS, MAX_PER_IMAGE
    )
    return InstanceData(bboxes=found[:, :4], scores=found[:, 4], labels=labels)
