"""Images without labels: the student's own losses do not see them.

A sample with ``metainfo['unlabelled'] = True`` counts in every comparison and in none
of the student's own losses.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from mmengine.structures import BaseDataElement, InstanceData, PixelData
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from .comparisons.base import Pair
from .comparisons.default import DENSE, SEG, kind_of
from .lookup import is_a


class Part(NamedTuple):
    """Images of a batch that go through the student together."""

    inputs: Tensor  # (N, C, H, W)
    data_samples: list[BaseDataElement]
    labelled: tuple[bool, ...]  # for each image


def split(
    student: nn.Module, inputs: Tensor, data_samples: Sequence[BaseDataElement]
) -> list[Part]:
    """Split a batch with unlabelled images as the student can take it.

    Args:
        student: The student.
        inputs: The batch, (N, C, H, W).
        data_samples: The N data samples.

    Returns:
        The batch itself if all images are labelled. Else unlabelled images have samples
        of their own, without labels. It is one part if the student's losses can be told
        which images count (:func:`counting`), or if no image is labelled; else two, the
        labelled images first.
    """
    labelled = tuple(not s.metainfo.get('unlabelled') for s in data_samples)
    if all(labelled):
        return [Part(inputs, list(data_samples), labelled)]
    like = data_samples[labelled.index(True) if any(labelled) else 0]
    void = _void_label(student)
    samples = [
        sample if mark else without_labels(sample, like, inputs, void)
        for sample, mark in zip(data_samples, labelled, strict=True)
    ]
    if not any(labelled) or _heads(student):
        return [Part(inputs, samples, labelled)]
    parts = []
    for mark in (True, False):
        index = [i for i, own in enumerate(labelled) if own is mark]
        parts.append(
            Part(inputs[index], [samples[i] for i in index], (mark,) * len(index))
        )
    return parts


@contextmanager
def counting(student: nn.Module, part: Part) -> Iterator[None]:
    """Let the student's own losses see the labelled images of a part alone.

    Its heads run on all images, so that batch norm sees one batch. What they give to
    their ``loss_by_feat`` is that of the labelled images.
    """
    heads = _heads(student) if len(set(part.labelled)) > 1 else []
    index = [i for i, mark in enumerate(part.labelled) if mark]
    for head in heads:
        head.loss_by_feat = _of_images(head.loss_by_feat, index, len(part.labelled))
    try:
        yield
    finally:
        for head in heads:
            del head.loss_by_feat


def _heads(student: nn.Module) -> list[nn.Module]:
    """Heads whose forward is one step and whose ``loss_by_feat`` the next.

    Those of all segmentors and of most one-stage detectors. A two-stage detector or a
    DETR reads labels before, to sample proposals or to denoise.
    """
    kind = kind_of(student)
    if kind == SEG and hasattr(student, 'decode_head'):
        heads = [student.decode_head, getattr(student, 'auxiliary_head', None)]
    elif kind == DENSE and isinstance(getattr(student, 'bbox_head', None), nn.Module):
        heads = [student.bbox_head]
        others = ('mask_head', 'segm_head')
        if any(getattr(student, name, None) is not None for name in others):
            return []
        # of a class with a `loss` of its own nothing is known
        if type(heads[0]).loss.__qualname__ != 'BaseDenseHead.loss':
            return []
    else:
        return []
    return [
        part
        for head in heads
        if head is not None
        for part in (head if isinstance(head, nn.ModuleList) else [head])
    ]


def _of_images(loss_by_feat: Callable, index: list[int], number: int) -> Callable:
    """A head's loss, given what belongs to some of the images."""

    def choose(x: Any) -> Any:
        if isinstance(x, Tensor):
            return x[index] if x.ndim and len(x) == number else x
        if not isinstance(x, (list, tuple)):
            return x
        per_image = len(x) == number and not any(
            isinstance(item, (Tensor, list, tuple)) for item in x
        )
        return type(x)([x[i] for i in index] if per_image else map(choose, x))

    def loss(*args, **kwargs):
        kwargs = {key: choose(value) for key, value in kwargs.items()}
        return loss_by_feat(*map(choose, args), **kwargs)

    return loss


def without_labels(
    sample: BaseDataElement,
    like: BaseDataElement,
    inputs: Tensor,
    ignore_index: int = 255,
) -> BaseDataElement:
    """A sample of the same image without labels: no boxes, and void pixels.

    Args:
        sample: A data sample of mmdet or mmseg, with labels, with garbage or without.
        like: A sample of the same batch, which has the maps that the student expects.
        inputs: The batch, (N, C, H, W).
        ignore_index: The label of void pixels.
    """
    blank = sample.new()
    size, device = tuple(inputs.shape[-2:]), inputs.device
    if is_a(sample, 'DetDataSample'):
        blank.gt_instances = no_instances(size, device)
        blank.ignored_instances = no_instances(size, device)
        maps = dict(gt_sem_seg='sem_seg')
    else:
        blank.gt_sem_seg = PixelData(data=_void(size, ignore_index, device))
        maps = dict(gt_sem_seg='data', gt_edge_map='data')
    for name, field in maps.items():
        if name in like:
            shape = like.get(name).get(field).shape[-2:]
            # an edge map has no void, and its loss is dropped
            value = 0 if name == 'gt_edge_map' else ignore_index
            blank.set_field(PixelData(**{field: _void(shape, value, device)}), name)
    return blank


def no_instances(
    size: tuple[int, int],
    device: torch.device | str = 'cpu',
    masks: bool = True,
) -> InstanceData:
    """Instances of an image without any.

    Args:
        size: Height and width of its masks.
        device: Where its boxes are.
        masks: Whether it has masks, of which there are none.
    """
    from mmdet.structures.mask import BitmapMasks

    instances = InstanceData(
        bboxes=torch.zeros((0, 4), device=device),
        labels=torch.zeros(0, dtype=torch.long, device=device),
    )
    if masks:
        instances.masks = BitmapMasks([], *size)
    return instances


def _void(size: Sequence[int], value: int, device: torch.device) -> Tensor:
    return torch.full((1, *size), value, dtype=torch.long, device=device)


def _void_label(student: nn.Module) -> int:
    """The label of pixels that a segmentor's own loss ignores; 255 for a detector."""
    head = getattr(student, 'decode_head', None)
    if isinstance(head, nn.ModuleList):
        head = head[-1]
    index = getattr(head, 'ignore_index', 255)
    return 0 if index is None else index  # it ignores nothing, and is dropped anyway


def without(own: dict[str, Any], labelled: dict[str, Any]) -> dict[str, Any]:
    """The student's own losses of unlabelled images, which do not count.

    Args:
        own: These losses.
        labelled: Those of the labelled images of the batch.

    Returns:
        Nothing beside labelled images. Without any, zeros that keep all parameters in
        the graph, since DDP waits for those that take no part.
    """
    if labelled:
        return {}
    return {
        key: tree_map(lambda loss: 0 * loss.nan_to_num(), value)
        for key, value in own.items()
        if 'loss' in key
    }


def joined(parts: Sequence[Sequence[Pair]]) -> Sequence[Pair]:
    """The pairs of all parts of a batch, with their rows in one.

    Args:
        parts: For each part what :meth:`Comparison.pair` gave.
    """
    parts = [list(pairs) for pairs in parts]
    if len(parts) == 1:
        return parts[0]
    return [_join(pairs) for pairs in zip(*parts, strict=True)]


def _join(pairs: Sequence[Pair]) -> Pair:
    first = pairs[0]
    masks = None
    if any(pair.mask is not None for pair in pairs):
        masks = torch.cat([_mask(pair) for pair in pairs])
    return dataclasses.replace(
        first,
        student=torch.cat([pair.student for pair in pairs]),
        teacher=torch.cat([pair.teacher for pair in pairs]),
        mask=masks,
    )


def _mask(pair: Pair) -> Tensor:
    if pair.mask is not None:
        return pair.mask
    rows, _, *spatial = pair.student.shape
    return pair.student.new_ones((rows, *spatial), dtype=torch.bool)
