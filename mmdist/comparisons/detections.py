"""A teacher's detections at the student's anchors, proposals or queries."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from types import ModuleType

import torch
from mmengine.structures import InstanceData
from torch import Tensor, nn

from mmdist.families import Places, Refuse, reader_of
from mmdist.families.probabilities import foreground
from mmdist.losses import DISTLoss
from mmdist.losses.correlations.common import process_group, sum_over_processes
from mmdist.registry import MODELS
from mmdist.step import Step
from mmdist.teachers import ForeignTeacher

from .base import Comparison, Pair
from .matching import Matching

# For teachers of other libraries; mmdet's detectors have their own settings.
MIN_SCORE, NMS, MAX_PER_IMAGE = 0.05, dict(type='nms', iou_threshold=0.5), 100
# Places at once, to fit the cache; all, with 300 boxes, take 1 GB at 800x1333.
CHUNK = 4096


@MODELS.register_module()
class Detections(Comparison):
    """Compare the student's scores with any detector's detections at the same places.

    The teacher predicts as in a test, NMS included. A row is an anchor of a dense
    student, a proposal that a two-stage student sampled, or a query. The teacher's
    probability of a class there is the score of its best detection of that class that
    overlaps the anchor or proposal, or 0 if none does. Both sides are probabilities
    without background. The teacher only has to ``predict``, so it can be of any
    architecture: its anchors, strides and queries do not matter.

    An anchor overlaps a detection as in mmdet's ``MaxIoUAssigner``: with an IoU of at
    least ``min_iou``, or as the anchor that overlaps the detection most. A proposal
    needs ``min_iou``. Anchors in the padding do not count. Queries should find each
    object once, so they are assigned to the detections one to one, as in
    :class:`QueryLogits`, whatever the IoU.

    Args:
        loss: Config of the loss; if omitted, ``mmdist.DISTLoss`` with ``beta=0``. Most
            rows are background, 0 for all classes, and have no inter-class relation.
        min_iou: Minimum IoU of a detection with an anchor or proposal.

    Raises:
        ValueError: ``min_iou`` is out of range.
    """

    families = (
        'students with a dense head, a RoI head of extractor and bbox head, or object '
        'queries, and any detector as teacher'
    )
    asks_first = True
    learns_from_answers = True

    def __init__(self, loss: dict | None = None, min_iou: float = 0.5) -> None:
        super().__init__(loss or dict(type='mmdist.DISTLoss', beta=0.0))
        if not 0 < min_iou < 1:
            raise ValueError(f'`min_iou` must satisfy 0 < min_iou < 1, got {min_iou}.')
        self.min_iou = min_iou
        self.match = Matching()

    def activation(self, student: nn.Module) -> str:
        """Probabilities are compared."""
        return 'identity'

    def student_modules(self, student: nn.Module) -> Sequence[nn.Module]:
        """The dense head, extractor and bbox head, or the head of the queries."""
        reader = _reader_of(student)
        if reader is None:
            raise self.unsupported(student, 'it belongs to none of these families')
        return reader.modules(student, self.unsupported)

    def check_pair(self, student: nn.Module, teacher: nn.Module) -> None:
        """The teacher must be a detector."""
        check_detects(teacher, self.unsupported)

    def record(self, step: Step) -> list[Places]:
        """The student's anchors, proposals or queries, with its scores there."""
        return _reader_of(step.student).places(step)

    def ask(self, step: Step, recorded: None) -> list[InstanceData]:
        """The teacher's detections in each image: boxes, scores and labels."""
        return detected(step)

    def pair(
        self, step: Step, recorded: list[Places], asked: list[InstanceData]
    ) -> list[Pair]:
        """A pair for each level of a dense head or stage of a cascade."""
        boxes, images = (
            torch.cat([getattr(place, name) for place in recorded])
            for name in ('boxes', 'images')
        )
        scores = recorded[0].scores.detach()
        taught = scores.new_zeros(len(boxes), scores.shape[1])
        assigned = _reader_of(step.student).ASSIGNED
        for image, detections in enumerate(asked):
            found, here = common(step, detections), images == image
            if not len(found) or not here.any():
                continue
            if assigned == 'one to one':  # queries, in one term
                meta = step.data_samples[image].metainfo
                rows, columns = self.match.detections(
                    scores[here], boxes[here], found, meta
                )
                best = scores.new_zeros(scores[here].shape)
                best[rows, found.labels[columns]] = found.scores[columns].to(best)
            else:
                overlaps = assign(boxes[here], found.bboxes, self.min_iou, assigned)
                best = best_scores(overlaps > 0, found, scores.shape[1])
            taught[here] = best.to(taught)
        teachers = taught.split([len(place.scores) for place in recorded])
        return [
            Pair(x.scores, teacher, x.mask, x.weight, x.name, 'identity')
            for x, teacher in zip(recorded, teachers, strict=True)
        ]

    def forward(self, name: str, pairs: Iterable[Pair]) -> dict[str, Tensor]:
        """As in the base class, but DIST compares only detected classes.

        The others have no relation and would only dilute the mean over classes: a
        batch contains only a few of COCO's 80.
        """
        if isinstance(self.loss, DISTLoss):
            pairs = [self._of_detected_classes(pair) for pair in pairs]
        return super().forward(name, pairs)

    def _of_detected_classes(self, pair: Pair) -> Pair:
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


def _reader_of(model: nn.Module) -> ModuleType | None:
    """The module that reads a detector; None for any other model."""
    reader = reader_of(model)
    return reader if hasattr(reader, 'places') else None


def best_scores(matched: Tensor, detections: InstanceData, classes: int) -> Tensor:
    """The best score of the detections at each place, per class; 0 if there is none.

    ``matched`` is (places, detections), the result (places, classes).
    """
    places, which = matched.nonzero(as_tuple=True)
    scores = detections.scores.float()
    best = scores.new_zeros(len(matched) * classes)
    cells = places * classes + detections.labels[which]
    return best.scatter_reduce(0, cells, scores[which], 'amax').view(-1, classes)


def assign(places: Tensor, boxes: Tensor, min_iou: float, assigned: str) -> Tensor:
    """IoU of each place with each box it is assigned to, 0 elsewhere: (places, boxes).

    ``assigned`` is ``'overlap'`` or ``'overlap or best'``, the family's ``ASSIGNED``.
    """
    from mmdet.structures.bbox import bbox_overlaps

    chunks = places.float().split(CHUNK)
    overlaps = torch.cat([bbox_overlaps(chunk, boxes.float()) for chunk in chunks])
    if assigned == 'overlap or best':
        min_iou = overlaps.amax(0).clamp(1e-6, min_iou)
    return torch.where(overlaps >= min_iou, overlaps, 0)


def check_detects(teacher: nn.Module, refuse: Refuse) -> None:
    """Raise unless a teacher detects boxes."""
    heads = [getattr(teacher, f'{name}_head', ...) for name in ('bbox', 'roi')]
    if isinstance(teacher, ForeignTeacher):
        if teacher.gives not in ('boxes', 'detections'):
            raise refuse(teacher, f'it gives {teacher.gives}')
    elif _reader_of(teacher) is None:
        raise refuse(teacher, 'it is not a detector')
    elif None in heads:
        raise refuse(teacher, 'it detects no boxes')


def detected(step: Step) -> list[InstanceData]:
    """The teacher's detections in each image: boxes, scores and labels."""
    model = step.teacher_model
    if not isinstance(model, ForeignTeacher):
        return [sample.pred_instances for sample in step.teacher_predictions]
    if model.gives == 'detections':
        return step.teacher_features
    return [after_nms(model, *x) for x in step.teacher_features]


def common(step: Step, detections: InstanceData) -> InstanceData:
    """The detections of classes that the student knows, with common labels."""
    labels = detections.labels.long()  # CrowdDet's are floats
    labels = step.classes.common_labels(labels)
    columns = dict(bboxes=detections.bboxes, scores=detections.scores, labels=labels)
    return InstanceData(**columns)[labels >= 0]


def after_nms(model: ForeignTeacher, boxes: Tensor, scores: Tensor) -> InstanceData:
    """The detections in an image by a model that returns all its boxes.

    The boxes are (M, 4), x1 y1 x2 y2 in pixels, the scores (M, classes), with one more
    column, the background, if the model's ``activation`` is ``'softmax'``.
    """
    from mmdet.models.layers import multiclass_nms

    scores = foreground(scores, model.activation)
    background = scores.new_zeros(len(scores), 1)  # a column that is ignored
    found, labels = multiclass_nms(
        boxes.float(), torch.cat([scores, background], 1), MIN_SCORE, NMS, MAX_PER_IMAGE
    )
    return InstanceData(bboxes=found[:, :4], scores=found[:, 4], labels=labels)
