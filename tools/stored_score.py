"""What is stored of a teacher: for how many images, in how much, and how good it is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from mmengine.evaluator import Evaluator
from mmengine.structures import BaseDataElement, InstanceData, PixelData
from teacher_score import Scored, evaluate, spread, to_students_classes

from mmdist.data.answers import bases_of
from mmdist.lookup import is_a
from mmdist.teachers import StoredTeacher


def describe_storage(dataset: Any, teacher: StoredTeacher) -> str:
    """What share of a training's images has answers, and what they take on the disk."""
    bases, store = [base for base, _ in bases_of(dataset)], teacher.store
    infos = [base.get_data_info(i) for base in bases for i in range(len(base))]
    found = sum(store.key(info) is not None for info in infos)
    path = store.path
    files = [path, *path.rglob('*')] if path.is_dir() else [path]
    size = sum(file.stat().st_size for file in files if file.is_file())
    return (
        f'{store.kind} of {found} of {len(infos)} training images '
        f'({found / max(len(infos), 1):.1%}), {size / 2**20:.1f} MiB in {path}'
    )


def _labelled_images(dataset: Any) -> list[tuple[Any, int]]:
    """The images of a training with labels: their data set, and the index there."""
    return [
        (base, i)
        for base, _ in bases_of(dataset)
        if any(is_a(t, 'LoadAnnotations') for t in base.pipeline.transforms)
        for i in range(len(base))
    ]


@torch.no_grad()
def score_stored(
    dataset: Any, number: int, teacher: StoredTeacher, num_classes: int
) -> Scored | None:
    """Score the answers for that many labelled training images, not augmented.

    Returns:
        The metrics, and the confusion of the student's classes; None without labels.
    """
    images = _labelled_images(dataset)
    if not images:
        return None
    if teacher.store.kind == 'boxes':
        from mmdet.evaluation import CocoMetric as Metric
    else:
        from mmseg.evaluation import IoUMetric as Metric
    evaluator = Evaluator([Metric()])
    evaluator.dataset_meta = dataset.metainfo
    answer = _boxes if teacher.store.kind == 'boxes' else _map
    batches = []
    for index in spread(number, len(images)):
        base, i = images[index]
        sample = answer(base, base.get_data_info(i), teacher)
        sample.set_metainfo(dict(img_id=index))
        to_students_classes(sample, teacher.classes, 'identity')
        batches.append(({}, [sample]))
    return evaluate(evaluator, batches, num_classes)


def _boxes(base: Any, info: Mapping, teacher: StoredTeacher) -> BaseDataElement:
    """The answer for an image and its labels, in pixels of the file."""
    from mmdet.structures import DetDataSample

    store, key = teacher.store, teacher.store.key(info)
    size = info['height'], info['width']
    sample = DetDataSample(metainfo=dict(ori_shape=size, instances=info['instances']))
    sample.gt_instances = labels_of(info)
    found = torch.empty(0, 4), torch.empty(0), torch.empty(0, dtype=torch.long)
    if key is not None:  # a results file lacks images in which nothing is found
        found = store.boxes(key)
    columns = zip(('bboxes', 'scores', 'labels'), found, strict=True)
    sample.pred_instances = InstanceData(**dict(columns))
    return sample


def labels_of(info: Mapping) -> InstanceData:
    """The labelled objects of an image, in pixels of its file."""
    objects = [x for x in info['instances'] if not x.get('ignore_flag')]
    boxes = torch.tensor([x['bbox'] for x in objects]).view(-1, 4)
    labels = torch.tensor([x['bbox_label'] for x in objects], dtype=torch.long)
    return InstanceData(bboxes=boxes, labels=labels)


def _map(base: Any, info: Mapping, teacher: StoredTeacher) -> BaseDataElement:
    """The answer for an image and its labels, at the size of these."""
    from mmseg.structures import SegDataSample

    (load,) = (t for t in base.pipeline.transforms if is_a(t, 'LoadAnnotations'))
    labels = torch.from_numpy(load(dict(info))['gt_seg_map']).long()
    scores = teacher.store.map(teacher.store.key(info))[None] / 255
    scores = F.interpolate(scores, labels.shape, mode='bilinear')[0]
    sample = SegDataSample()
    sample.gt_sem_seg = PixelData(data=labels[None])
    sample.seg_logits = PixelData(data=scores)
    sample.pred_sem_seg = PixelData(data=scores.argmax(0, keepdim=True))
    return sample
