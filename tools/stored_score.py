"""A teacher's stored answers: how many images have one, their size and their score."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import chain
from typing import Any

import torch
from mmengine.dataset import pseudo_collate
from mmengine.evaluator import Evaluator
from mmengine.structures import BaseDataElement, InstanceData
from teacher_score import Predict, Scored, evaluate, spread

from mmdist.data.answers import infos_of
from mmdist.teachers.store import Store


def describe_storage(dataset: Any, store: Store) -> str:
    """The share of training images with answers, and the answers' size on disk."""
    has_answer = [store.key(info) is not None for info in infos_of(dataset)]
    found, number, path = sum(has_answer), len(has_answer), store.path
    files = [path, *path.rglob('*')] if path.is_dir() else [path]
    size = sum(file.stat().st_size for file in files if file.is_file())
    return (
        f'{store.kind} of {found} of {number} training images '
        f'({found / max(number, 1):.1%}), {size / 2**20:.1f} MiB in {path}'
    )


@torch.no_grad()
def score_stored(
    dataset: Any, number: int, predict: Predict, kind: str, num_classes: int
) -> Scored | None:
    """Score the predictions for ``number`` training images, with their augmentation.

    Returns the metrics and the confusion of the student's classes; None without labels.
    ``kind`` is ``'boxes'`` or ``'maps'``.
    """
    if kind == 'boxes':
        from mmdet.evaluation import CocoMetric as Metric
    else:
        from mmseg.evaluation import IoUMetric as Metric

    evaluator = Evaluator([Metric()])
    evaluator.dataset_meta = dataset.metainfo
    images = _labelled(dataset, number)
    if (first := next(images, None)) is None:
        return None
    batches = (({}, predict(data)) for data in chain([first], images))
    return evaluate(evaluator, batches, num_classes)


def _labelled(dataset: Any, number: int) -> Iterator[dict]:
    """Those of ``number`` images that have labels, each as a batch."""
    for index in spread(number, len(dataset)):
        data = dataset[index]
        sample = data['data_samples']
        if sample.get('unlabelled'):
            continue
        in_its_pixels(sample)
        if 'gt_instances' in sample:  # as the metric expects them
            both = sample.gt_instances, sample.ignored_instances
            labels = [
                dict(bbox=box, bbox_label=label, ignore_flag=ignore)
                for ignore, x in enumerate(both)
                for box, label in zip(
                    x.bboxes.tensor.tolist(), x.labels.tolist(), strict=True
                )
            ]
            sample.set_metainfo(dict(img_id=index, instances=labels))
        yield pseudo_collate([data])


def in_its_pixels(sample: BaseDataElement) -> None:
    """Make predictions for an augmented image be in pixels of that image."""
    size = sample.img_shape[:2]
    sample.set_metainfo(dict(ori_shape=size, scale_factor=(1.0, 1.0), flip=False))


def labels_of(info: Mapping) -> InstanceData:
    """The labelled objects of an image, in pixels of its file."""
    objects = [x for x in info['instances'] if not x.get('ignore_flag')]
    boxes = torch.tensor([x['bbox'] for x in objects]).view(-1, 4)
    labels = torch.tensor([x['bbox_label'] for x in objects], dtype=torch.long)
    return InstanceData(bboxes=boxes, labels=labels)
