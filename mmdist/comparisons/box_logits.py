"""Class logits of boxes: any detector teaches any other."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import NamedTuple

import torch
from mmengine.logging import print_log
from mmengine.structures import InstanceData
from torch import Tensor, nn

from mmdist.registry import MODELS
from mmdist.step import Step
from mmdist.teachers import ForeignTeacher

from .base import Comparison, Pair
from .decode import decode_boxes, decodes
from .default import DENSE, QUERIES, ROI, kind_of
from .dense_logits import DenseLogits, activation_of
from .probabilities import foreground
from .query_logits import QueryLogits
from .roi_logits import Proposals, RoILogits, mean_logits

FEW_MATCHES = 0.05  # share of rows below which a warning says so
WARN_AFTER = 100  # steps over which that share is averaged


class BoxRows(NamedTuple):
    """Boxes of all images of a batch, and what one side says of them."""

    stage: int  # of a cascade
    rois: Tensor  # (rows, 5), the image's index in the batch, x1 y1 x2 y2 in pixels
    logits: Tensor  # (rows, columns)


@MODELS.register_module()
class BoxLogits(Comparison):
    """Compare what two detectors say of the same boxes, whatever their architectures.

    A row is a box of the student: a proposal that it sampled (two-stage), a box that
    its dense head decodes, or that of a query. A two-stage teacher *judges* these
    boxes: its RoI extractor and bbox head run on them, and nothing else. Any other
    teacher is *looked up*: of all its predictions before NMS the one with the largest
    IoU. Rows that overlap with none by ``min_iou`` do not count; the log shows the
    share of rows that do, ``<name>_matched``.

    Where both heads have the same activation, logits are compared. Where they differ
    (a softmax with background, a sigmoid per class), it is the probabilities of the
    classes without background, and ``mmdist.DISTLoss`` gets ``activation='identity'``.

    Args:
        loss: Config of the loss; ``mmdist.DISTLoss`` if omitted.
        top_k: Of a dense student, the number of boxes per image: those with the highest
            class score.
        add_gt: Of a dense student, add for each ground truth the box that overlaps it
            most.
        min_iou: The least IoU of a box of the student with one of a teacher that is
            looked up.
        stage: The stage of a cascade teacher, as in :class:`RoILogits`.
        score: As in :class:`DenseLogits`, for both sides: ``'joint'`` takes what dense
            heads rank by, class times objectness or centerness.

    Raises:
        ValueError: An option is out of its range.
    """

    families = (
        'detectors with a dense head, with a RoI head of extractor and bbox head, or '
        'with object queries'
    )

    def __init__(
        self,
        loss: dict | None = None,
        top_k: int = 300,
        add_gt: bool = False,
        min_iou: float = 0.5,
        stage: int | str | None = None,
        score: str = 'class',
    ) -> None:
        super().__init__(loss)
        if top_k < 1:
            raise ValueError(f'`top_k` is a number of boxes per image, got {top_k}.')
        if not 0 <= min_iou < 1:
            raise ValueError(f'`min_iou` is an IoU, 0 <= min_iou < 1, got {min_iou}.')
        self.top_k = top_k
        self.add_gt = add_gt
        self.min_iou = min_iou
        # how each family is read
        self._readers = {
            DENSE: DenseLogits(score=score),
            ROI: RoILogits(stage=stage),
            QUERIES: QueryLogits(),
        }
        self._shares: list[Tensor] = []

    def activation(self, student: nn.Module) -> str:
        """That of the student's head; pairs with another head say theirs."""
        return self._activation(student)

    def student_modules(self, student: nn.Module) -> Sequence[nn.Module]:
        """The student's head, and the extractor of a two-stage student."""
        return self._reader(student).student_modules(student)

    def check_pair(self, student: nn.Module, teacher: nn.Module) -> None:
        """The teacher must be of one of the families."""
        if not isinstance(teacher, ForeignTeacher):
            self._reader(teacher).student_modules(teacher)
        elif teacher.gives != 'boxes':
            raise self.unsupported(teacher, f'it gives {teacher.gives}')

    def record(self, step: Step) -> list[BoxRows]:
        """The student's boxes and its logits of them, per stage of a cascade."""
        kind, student = kind_of(step.student), step.student
        reader = self._readers[kind]
        if kind == ROI:
            return [
                BoxRows(stage, rois, reader.per_class(student, stage, logits))
                for stage, rois, logits, _ in reader.record(step)
            ]
        if kind == QUERIES:
            return [_as_rows(reader.record(step)[-1])]
        (head,) = reader.student_modules(student)
        predictions = self._predictions_of_head(head, step.calls(head)[-1].output, step)
        chosen = [self._choose(p, step, i) for i, p in enumerate(predictions)]
        return [_as_rows(chosen)]

    def ask(self, step: Step, recorded: list[BoxRows]) -> list[tuple[Tensor, Tensor]]:
        """The teacher's logits of each box, and whether the row counts."""
        teacher = step.teacher_model
        if isinstance(teacher, ForeignTeacher):
            predictions = [
                InstanceData(bboxes=boxes, scores=scores)
                for boxes, scores in step.teacher_features
            ]
            return [self._look_up(boxes.rois, predictions) for boxes in recorded]
        kind = kind_of(teacher)
        reader = self._readers[kind]
        if kind == ROI:
            judged = reader.judge(step, [Proposals(*boxes) for boxes in recorded])
            return [
                (
                    reader.per_class(teacher, -1, mean_logits(said)),
                    torch.ones_like(boxes.rois[:, 0], dtype=torch.bool),
                )
                for boxes, said in zip(recorded, judged, strict=True)
            ]
        if kind == QUERIES:
            predictions = reader.ask(step, None)[-1]
        else:
            (head,) = reader.student_modules(teacher)
            predictions = self._predictions_of_head(
                head, reader.run_teacher(step, head), step
            )
        return [self._look_up(boxes.rois, predictions) for boxes in recorded]

    def pair(
        self,
        step: Step,
        recorded: list[BoxRows],
        asked: list[tuple[Tensor, Tensor]],
    ) -> list[Pair]:
        """One pair per stage of the student, a row per box."""
        kinds = [self._activation(m) for m in (step.student, step.teacher_model)]
        pairs = []
        for (stage, _, student), (teacher, counts) in zip(recorded, asked, strict=True):
            activation = kinds[0]
            student = step.classes.select_student(student, 1, kinds[0])
            teacher = step.classes.select_teacher(teacher, 1, kinds[1])
            if kinds[0] != kinds[1]:
                activation = 'identity'
                student, teacher = (
                    foreground(logits, kind)
                    for logits, kind in zip((student, teacher), kinds, strict=True)
                )
            weight, name = 1.0, ''
            if len(recorded) > 1:  # a cascade
                weight = step.student.roi_head.stage_loss_weights[stage]
                name = f's{stage}'
            pairs.append(Pair(student, teacher, counts, weight, name, activation))
        return pairs

    def forward(self, name: str, pairs: Sequence[Pair]) -> dict[str, Tensor]:
        """As in the base, with ``<name>_matched``, the share of rows that count."""
        terms = super().forward(name, pairs)
        counts = torch.cat([pair.mask for pair in pairs])
        share = counts.float().sum() / max(len(counts), 1)
        self._warn_of_few_matches(share)
        return {**terms, f'{name}_matched': share}

    def _warn_of_few_matches(self, share: Tensor) -> None:
        self._shares.append(share)
        if len(self._shares) < WARN_AFTER:
            return
        mean = torch.stack(self._shares).mean().item()
        self._shares.clear()
        if mean < FEW_MATCHES:
            print_log(
                f'BoxLogits: of the boxes of the last {WARN_AFTER} steps the teacher '
                f'predicted only {mean:.1%} with an IoU of at least {self.min_iou}, so '
                'hardly anything is distilled. Lower `min_iou`, or check that the '
                'teacher detects anything in these images.',
                logger='current',
                level=logging.WARNING,
            )

    def _reader(self, model: nn.Module) -> Comparison:
        kind = kind_of(model)
        if kind not in self._readers:
            raise self.unsupported(model, 'it is of none of these families')
        reader = self._readers[kind]
        if kind == DENSE:
            (head,) = reader.student_modules(model)
            if not decodes(head):
                raise self.unsupported(
                    model,
                    f'how a {type(head).__name__} encodes its boxes is not known here',
                )
        return reader

    def _activation(self, model: nn.Module) -> str:
        if isinstance(model, ForeignTeacher):
            return model.activation
        return self._readers[kind_of(model)].activation(model)

    def _predictions_of_head(
        self, head: nn.Module, output: tuple, step: Step
    ) -> list[InstanceData]:
        """Per image the boxes and logits of all locations of a dense head."""
        reader: DenseLogits = self._readers[DENSE]
        levels = reader.scores_of(head, output)
        logits = torch.cat([x.permute(0, 3, 4, 1, 2).flatten(1, 3) for x in levels], 1)
        metas = [sample.metainfo for sample in step.data_samples]
        boxes = decode_boxes(head, output, activation_of(head), metas)
        return [
            InstanceData(scores=scores, bboxes=bboxes)
            for scores, bboxes in zip(logits, boxes, strict=True)
        ]

    def _choose(
        self, predictions: InstanceData, step: Step, image: int
    ) -> InstanceData:
        """The boxes of an image that a dense student is compared at."""
        from mmdet.structures.bbox import bbox_overlaps

        scores = foreground(predictions.scores.detach(), self._activation(step.student))
        number = min(self.top_k, len(scores))
        index = scores.amax(1).topk(number, sorted=False).indices
        truth = step.data_samples[image].gt_instances.bboxes
        if self.add_gt and len(truth):
            best = bbox_overlaps(truth, predictions.bboxes).argmax(1)
            index = torch.cat([index, best]).unique()
        return predictions[index]

    def _look_up(
        self, rois: Tensor, predictions: list[InstanceData]
    ) -> tuple[Tensor, Tensor]:
        """The logits of the prediction with the largest IoU, and whether it counts."""
        logits = rois.new_zeros((len(rois), predictions[0].scores.shape[1]))
        counts = torch.zeros_like(rois[:, 0], dtype=torch.bool)
        for image, predicted in enumerate(predictions):
            here = rois[:, 0] == image
            if len(predicted):
                overlap, best = largest_overlap(rois[here, 1:], predicted.bboxes)
                logits[here] = predicted.scores[best].to(logits.dtype)
                counts[here] = overlap >= self.min_iou
        return logits, counts


def largest_overlap(
    boxes: Tensor, candidates: Tensor, chunk: int = 2**15
) -> tuple[Tensor, Tensor]:
    """For each box the candidate with the largest IoU.

    Args:
        boxes: (n, 4), x1 y1 x2 y2.
        candidates: (m, 4), m >= 1.
        chunk: Candidates that are compared at a time; a dense head has 200,000.

    Returns:
        The IoUs, (n,), and the indices of the candidates, (n,).
    """
    from mmdet.structures.bbox import bbox_overlaps

    boxes, candidates = boxes.float(), candidates.float()
    overlap = boxes.new_full((len(boxes),), -1.0)
    best = torch.zeros_like(overlap, dtype=torch.long)
    for start in range(0, len(candidates), chunk):
        found, index = bbox_overlaps(boxes, candidates[start : start + chunk]).max(1)
        best = torch.where(found > overlap, index + start, best)
        overlap = torch.maximum(found, overlap)
    return overlap, best


def _as_rows(predictions: Sequence[InstanceData]) -> BoxRows:
    from mmdet.structures.bbox import bbox2roi

    rois = bbox2roi([p.bboxes.detach() for p in predictions])
    # a head may predict a right edge that is left of the left one
    rois = torch.cat([rois[:, :3], torch.maximum(rois[:, 1:3], rois[:, 3:])], 1)
    return BoxRows(0, rois, torch.cat([p.scores for p in predictions]))
