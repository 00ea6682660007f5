"""A teacher's score on validation images, its classes in the student's order."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from mmengine.evaluator import Evaluator
from mmengine.runner import Runner
from mmengine.structures import BaseDataElement
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from mmdist.comparisons import Detections, SegLogits
from mmdist.families import SEG, family_of
from mmdist.families.seg import ask_foreign
from mmdist.step import Step
from mmdist.teachers import ClassMatch, ForeignTeacher, MeanTeacher, Teacher

VOID = 255  # label of whatever the student has no class for
MUCH = 0.2  # a permuted class fits another one better by this much
Predict = Callable[[dict], Sequence[BaseDataElement]]  # of a batch
Scored = tuple[dict[str, float], Tensor]  # metrics, and a `confusion`


def cannot_score(teacher: Teacher) -> str:
    """Why a teacher's predictions cannot be scored; empty if they can."""
    model = teacher.model
    if isinstance(teacher, MeanTeacher):
        return "it is the student's mean"
    if isinstance(model, ForeignTeacher) and model.gives == 'features':
        return 'it gives only features'
    return 'its predictions are panoptic' * hasattr(model, 'panoptic_head')


@torch.no_grad()
def score(runner: Runner, number: int, predict: Predict, num_classes: int) -> Scored:
    """Score predictions of ``number`` validation images with the config's evaluator.

    Returns:
        The metrics, and the :func:`confusion` of the student's classes.
    """
    dataset = runner.val_dataloader.dataset
    subset = dataset.get_subset(spread(number, len(dataset)))
    loader = Runner.build_dataloader(dict(runner.cfg.val_dataloader, dataset=subset))
    evaluator = runner.val_evaluator
    for metric in evaluator.metrics:
        if hasattr(metric, 'img_ids'):  # COCO: the others would count as missed
            infos = map(subset.get_data_info, range(len(subset)))
            metric.img_ids = [info['img_id'] for info in infos]
    batches = ((batch, predict(batch)) for batch in loader)
    return evaluate(evaluator, batches, num_classes)


def spread(number: int, size: int) -> list[int]:
    """Indices of ``number`` samples, or of all, spread over the whole data set."""
    number = min(number, size)
    return [i * size // number for i in range(number)]


def evaluate(
    evaluator: Evaluator, batches: Iterable[tuple[dict, Sequence]], num_classes: int
) -> Scored:
    """The metrics and the confusion of batches with their predictions."""
    total, number = torch.zeros(num_classes, num_classes + 1), 0
    for batch, samples in batches:
        total += sum(confusion(sample, num_classes) for sample in samples)
        evaluator.process(data_samples=samples, data_batch=batch)
        number += len(samples)
    return evaluator.evaluate(number), total


def predictor(student: nn.Module, teacher: Teacher) -> Predict:
    """Predictor that works like the teacher in training, in the student's classes."""
    model = teacher.model
    gives = model.gives if isinstance(model, ForeignTeacher) else None
    activation = 'softmax' if gives == 'pixels' else 'identity'
    if gives is None:
        if family_of(model) == SEG:
            activation = SegLogits().activation(model)
        if teacher.dtype is not None:
            model = copy.deepcopy(model).float()  # NMS and metrics take no bf16

    def predict(batch: dict) -> list[BaseDataElement]:
        data = student.data_preprocessor(batch, training=False)
        step = Step(student, teacher, teacher.classes, **data)
        samples = step.data_samples
        if gives is None:
            samples = model.predict(step.teacher_inputs, samples)
        elif gives in ('boxes', 'detections'):
            detected = Detections().ask(step, None)
            for sample, found in zip(samples, detected, strict=True):
                # in pixels of the file
                found.bboxes /= found.bboxes.new_tensor(sample.scale_factor).repeat(2)
                sample.pred_instances = found
        else:
            size = tuple(step.inputs.shape[-2:])
            pixels = ask_foreign(step, as_scores=gives != 'pixels')
            scores = pixels.read(size).float()
            samples = student.postprocess_result(scores, samples)
        for sample in samples:
            to_students_classes(sample, teacher.classes, activation)
        if gives == 'maps':  # nothing is known outside the file
            found = samples[0].pred_sem_seg.data
            height, width = found.shape[-2:]
            found[~pixels.shown(size)[:, :height, :width]] = VOID
        return samples

    return predict


def to_students_classes(
    sample: BaseDataElement, match: ClassMatch, activation: str | None
) -> None:
    """Renumber the predicted classes as the student's."""
    if match.teacher is None:
        return
    ours = match.student or [(i,) for i in range(len(match.teacher))]
    # after the compared classes comes the background, or none of them
    table = torch.tensor([*(i for (i,) in ours), VOID])
    if 'pred_sem_seg' in sample and len(sample.seg_logits.data) > 1:
        scores = match.select_teacher(sample.seg_logits.data, 0, activation)
        best = scores.argmax(0, keepdim=True)
        sample.pred_sem_seg.data = table.to(best.device)[best]
    elif 'pred_instances' in sample:
        found = sample.pred_instances
        common = match.common_labels(found.labels)  # -1: the student does not know it
        found.labels = table.to(common.device)[common]
        sample.pred_instances = found[common >= 0]


def confusion(sample: BaseDataElement, num_classes: int) -> Tensor:
    """Confusion matrix, in pixels or in objects.

    Returns:
        (classes, classes + 1), labels by predictions; the last column counts what is
        not found or predicted as no class of the student. Zeros without labels.
    """
    columns = num_classes + 1
    labels = found = torch.empty(0)
    if 'pred_sem_seg' in sample and 'gt_sem_seg' in sample:
        labels, found = sample.gt_sem_seg.data, sample.pred_sem_seg.data
    elif 'pred_instances' in sample and 'gt_instances' in sample:
        labels, found = sample.gt_instances.labels, _found(sample)
    labels, found = (x.flatten().cpu().long() for x in (labels, found))
    pairs = (labels * columns + found.clamp(max=num_classes))[labels < num_classes]
    counts = torch.bincount(pairs, minlength=num_classes * columns)
    return counts.view(num_classes, columns).float()


def _found(sample: BaseDataElement) -> Tensor:
    """For each labelled object, the class of the box with the best score there."""
    from mmdet.structures.bbox import bbox_overlaps

    truth, found = sample.gt_instances, sample.pred_instances
    if not len(found) or not len(truth):
        return torch.full((len(truth),), VOID)
    overlap = bbox_overlaps(truth.bboxes, found.bboxes)
    surest, index = (found.scores * (overlap >= 0.5)).max(1)
    return torch.where(surest > 0, found.labels[index], VOID)


def judge(
    metrics: Mapping[str, float],
    confusion: Tensor,
    names: Sequence[str],
    compared: Sequence[int],
) -> str:
    """What speaks against a teacher that knows the classes ``compared``, or ''.

    ``confusion`` covers all of the student's classes, (classes, classes + 1).
    """
    rows = confusion[list(compared)]
    known = rows[:, list(compared)]
    others = (rows.sum(1) - known.sum(1)).unsqueeze(1)
    confusion = torch.cat([known, others], 1)
    ious, mean = _ious(confusion)
    # labelled class i is best matched by predictions of class best[i]
    best = linear_sum_assignment(ious.numpy(), maximize=True)[1]
    permuted = torch.cat([known[:, best], others], 1)
    gains = ious[range(len(best)), best] - ious.diag()
    moved = (gains > MUCH).nonzero().flatten().tolist()
    if len(moved) > 1 and not _chance(permuted):
        names = [names[i] for i in compared]
        found = ', '.join(f'{names[i]} for {names[best[i]]}' for i in moved[:10])
        return (
            f'classes look permuted: it takes {found}. Its mean IoU is {mean:.1%}, and '
            f'would be {_ious(permuted)[1]:.1%} in the right order. '
            'Check the class names of its checkpoint and config.'
        )
    average = [value for key, value in metrics.items() if key.endswith('mAP')]
    if average and 0 <= average[0] < 0.01:  # -1 where there are no objects
        return f'AP of {average[0]:.1%} is like noise.'
    if confusion.any() and not known.any():
        return 'predictions are like noise: none of the labels is found.'
    chance = _chance(confusion)
    if chance and any(key.endswith('mIoU') for key in metrics):
        return (
            f'mean IoU of {mean:.1%} is like noise: the same predictions in random '
            f'order have {chance:.1%}.'
        )
    return ''


def _ious(confusion: Tensor) -> tuple[Tensor, float]:
    """IoU of each labelled class with each predicted one, and the mean IoU."""
    labelled, both = confusion.sum(1), confusion[:, : len(confusion)]
    ious = both / (labelled.unsqueeze(1) + both.sum(0) - both).clamp(min=1)
    return ious, ious.diag()[labelled > 0].mean().item()


def _chance(confusion: Tensor) -> float:
    """Mean IoU of the same predictions dealt out at random, or 0 if theirs is higher.

    It is not higher if it is below 2 / classes and, as that is a lot for few classes,
    less than a tenth of the way from chance to 1.
    """
    dealt = confusion.sum(1, keepdim=True) * confusion.sum(0)
    chance = _ious(dealt / confusion.sum().clamp(min=1))[1]
    least = min(2 / len(confusion), chance + (1 - chance) / 10)
    return chance if _ious(confusion)[1] < least else 0.0
