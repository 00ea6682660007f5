"""Keep images without labels out of the student's own losses.

A sample with ``metainfo['unlabelled'] = True`` counts in every comparison and in none
of the student's own losses.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from mmengine.structures import BaseDataElement, InstanceData, PixelData
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from mmdist.comparisons.base import Pair
from mmdist.families import DENSE, SEG, family_of
from mmdist.lookup import is_a
from mmdist.record import Fork, Recorder, swapped


class Part(NamedTuple):
    """Images of a batch that go through the student's heads together."""

    inputs: Tensor  # (N, C, H, W)
    data_samples: list[BaseDataElement]
    labelled: tuple[bool, ...]  # for each image
    is_unlabelled: bool = False  # all of it, while another part has labels
    recorder: Recorder | None = None  # of these images, with earlier calls
    features: Any = None  # of these images, if already extracted

    @contextmanager
    def recording(self, student: nn.Module) -> Iterator[None]:
        """Context in which the student computes its own losses and is recorded."""
        with self.recorder or ExitStack(), labelled_losses_only(student, self):
            yield


def by_parts(
    student: nn.Module,
    modules: Sequence[nn.Module],
    inputs: Tensor,
    data_samples: Sequence[BaseDataElement],
    learn: Callable[[Part], tuple[dict, dict[str, list[Pair]]]],
    forks: list[Fork] | None = None,
    paused: bool = False,
) -> tuple[dict[str, Any], dict[str, list[Pair]]]:
    """Learn from a batch, (N, C, H, W), in one pass unless :func:`split` splits it.

    ``learn`` returns the student's own losses and the pairs of each comparison for a
    part, whose ``modules`` and ``forks`` are recorded; the result is that of the whole
    batch. If ``paused``, nothing is distilled: an unlabelled part is skipped.
    """
    losses, pairs = {}, []
    for part in split(student, Recorder(modules, forks), inputs, data_samples):
        if paused and part.is_unlabelled:
            continue
        own, compared = learn(part)
        losses |= drop_unlabelled_losses(own, part)
        pairs.append(compared)
    return losses, {key: joined([part[key] for part in pairs]) for key in pairs[0]}


def split(
    student: nn.Module,
    recorder: Recorder,
    inputs: Tensor,
    data_samples: Sequence[BaseDataElement],
) -> list[Part]:
    """Split a batch with unlabelled images into parts that the student can take.

    A labelled batch stays as it is. Otherwise, unlabelled images get new samples
    without labels. The batch stays one part if the student's losses can be limited to
    some images (:func:`labelled_losses_only`), or if no image is labelled. Else there
    are two parts, the labelled images first, with the features of one pass over the
    whole batch.
    """
    labelled = tuple(not s.metainfo.get('unlabelled') for s in data_samples)
    if all(labelled):
        return [Part(inputs, list(data_samples), labelled, recorder=recorder)]
    like = data_samples[labelled.index(True) if any(labelled) else 0]
    void = _void_label(student)
    samples = [
        sample if mark else without_labels(sample, like, inputs, void)
        for sample, mark in zip(data_samples, labelled, strict=True)
    ]
    if not any(labelled) or _heads(student):
        return [Part(inputs, samples, labelled, recorder=recorder)]
    with recorder:
        features = student.extract_feat(inputs)
    maps = [x for x in tree_leaves(features) if isinstance(x, Tensor)]
    if any(len(x) != len(inputs) for x in maps):  # TridentNet: one for each branch
        features = None
        recorder.forget()
    parts = []
    for mark in (True, False):
        index = [i for i, own in enumerate(labelled) if own is mark]
        choose = partial(_rows_of, index=index, number=len(labelled))
        part = Part(
            inputs[index],
            [samples[i] for i in index],
            (mark,) * len(index),
            not mark,
            recorder.changed(choose),
            choose(features),
        )
        parts.append(part)
    return parts


def _rows_of(tree: Any, index: list[int], number: int) -> Any:
    """Choose images in all tensors with a row for each of ``number`` images."""

    def choose(x: Any) -> Any:
        per_image = isinstance(x, Tensor) and x.ndim and len(x) == number
        return x[index] if per_image else x

    return tree_map(choose, tree)


@contextmanager
def labelled_losses_only(student: nn.Module, part: Part) -> Iterator[None]:
    """Limit the student's own losses to the labelled images of a part.

    In a mixed part, the heads run on all images, so that batch norm sees one batch, and
    their ``loss_by_feat`` gets only what belongs to the labelled images. A part of a
    split batch takes its features from the pass over the whole batch.
    """
    with ExitStack() as stack:
        swaps = []
        if part.features is not None:
            swaps.append((student, 'extract_feat', lambda *_, **__: part.features))
        if part.is_unlabelled:
            # Another process may have no such part, so this one must not wait for it,
            # neither in its losses, which are dropped, nor in batch norm.
            swaps.append((torch.distributed, 'is_initialized', lambda: False))
            norms = [m for m in student.modules() if is_a(m, 'SyncBatchNorm')]
            swaps += [(m, 'group_size', 1) for m in norms]  # mmcv's ignores that
        if len(set(part.labelled)) > 1:
            index = [i for i, mark in enumerate(part.labelled) if mark]
            for head in _heads(student):
                loss = _loss_of_images(head.loss_by_feat, index, len(part.labelled))
                swaps.append((head, 'loss_by_feat', loss))
        for swap in swaps:
            stack.enter_context(swapped(*swap))
        yield


def _heads(student: nn.Module) -> list[nn.Module]:
    """Return the heads that run forward first, and then ``loss_by_feat``.

    All segmentors and most one-stage detectors have such heads. Two-stage detectors and
    DETRs read labels earlier, to sample proposals or to denoise.
    """
    family, heads = family_of(student), []
    if family == SEG and hasattr(student, 'decode_head'):
        heads = [student.decode_head, getattr(student, 'auxiliary_head', None)]
    elif family == DENSE and isinstance(getattr(student, 'bbox_head', None), nn.Module):
        others = (getattr(student, name, None) for name in ('mask_head', 'segm_head'))
        # nothing is known about a class with its own `loss`
        own = type(student.bbox_head).loss.__qualname__ != 'BaseDenseHead.loss'
        if not own and all(other is None for other in others):
            heads = [student.bbox_head]
    parts = (h if isinstance(h, nn.ModuleList) else [h] for h in heads if h is not None)
    return [head for part in parts for head in part]


def _loss_of_images(loss_by_feat: Callable, index: list[int], number: int) -> Callable:
    """Limit a head's loss to some images; RuntimeError if these are not rows."""
    signature = inspect.signature(loss_by_feat)

    def choose(x: Any) -> Any:
        if isinstance(x, Tensor):
            if not x.ndim or len(x) != number:
                raise RuntimeError(
                    f'{loss_by_feat.__qualname__} gets a tensor of shape '
                    f'{tuple(x.shape)} for {number} images: which part belongs to the '
                    'labelled ones? Train this student on labelled images only.'
                )
            return x[index]
        if not isinstance(x, (list, tuple)):
            return x
        per_image = len(x) == number and not any(
            isinstance(item, (Tensor, list, tuple)) for item in x
        )
        return type(x)([x[i] for i in index] if per_image else map(choose, x))

    def loss(*args, **kwargs):
        given = signature.bind(*args, **kwargs)
        for name, value in given.arguments.items():
            # MaskFormer: (decoder layers, N, ...)
            is_stack = name.startswith('all_') and isinstance(value, Tensor)
            given.arguments[name] = value[:, index] if is_stack else choose(value)
        return loss_by_feat(*given.args, **given.kwargs)

    return loss


def without_labels(
    sample: BaseDataElement,
    like: BaseDataElement,
    inputs: Tensor,
    ignore_index: int = 255,
) -> BaseDataElement:
    """Make a sample of the same image without labels: no boxes, and void pixels.

    Args:
        sample: A data sample of mmdet or mmseg, with labels, with garbage or without.
        like: A sample of the batch, a labelled one if there is any, with all fields
            that the student expects.
        inputs: The batch, (N, C, H, W).
        ignore_index: The label of void pixels.
    """
    blank = type(sample)(metainfo=sample.metainfo)
    if 'proposals' in sample:  # for a detector without RPN
        blank.proposals = sample.proposals
    size, device = tuple(inputs.shape[-2:]), inputs.device
    if is_a(sample, 'DetDataSample'):
        blank.gt_instances = no_instances(size, device)
        blank.ignored_instances = no_instances(size, device)
        if not like.metainfo.get('unlabelled'):
            blank.gt_instances = like.gt_instances[:0]  # with all expected fields
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
    size: tuple[int, int], device: torch.device | str = 'cpu', masks: bool = True
) -> InstanceData:
    """Make empty instances for an image of a size, (height, width)."""
    from mmdet.structures.mask import BitmapMasks

    labels = torch.zeros(0, dtype=torch.long, device=device)
    none = InstanceData(bboxes=torch.zeros((0, 4), device=device), labels=labels)
    if masks:
        none.masks = BitmapMasks([], *size)
    return none


def _void(size: Sequence[int], value: int, device: torch.device) -> Tensor:
    return torch.full((1, *size), value, dtype=torch.long, device=device)


def _void_label(student: nn.Module) -> int:
    """The label of pixels that a segmentor's own loss ignores; 255 for a detector."""
    head = getattr(student, 'decode_head', None)
    head = head[-1] if isinstance(head, nn.ModuleList) else head
    index = getattr(head, 'ignore_index', 255)
    return 0 if index is None else index  # no void; the loss is dropped anyway


def drop_unlabelled_losses(own: dict[str, Any], part: Part) -> dict[str, Any]:
    """Keep the student's own losses of a part with labels, drop others.

    Without any labels in the batch, they become zeros that keep all parameters in the
    graph, since DDP waits for unused ones.
    """
    if any(part.labelled):
        return own
    if part.is_unlabelled:
        return {}
    return {
        key: tree_map(lambda loss: 0 * loss.nan_to_num(), value)
        for key, value in own.items()
        if 'loss' in key
    }


def joined(parts: Sequence[Sequence[Pair]]) -> Sequence[Pair]:
    """Concatenate the rows of the pairs of all parts of a batch."""
    if len(parts) == 1:
        return parts[0]
    names = ('student', 'teacher', 'mask', 'row_weight')
    return [
        dataclasses.replace(pairs[0], **{name: _rows(pairs, name) for name in names})
        for pairs in zip(*parts, strict=True)
    ]


def _rows(pairs: Sequence[Pair], name: str) -> Tensor | None:
    found = [getattr(pair, name) for pair in pairs]
    if all(rows is None for rows in found):
        return None
    # all rows of a part without a mask count
    every = [torch.ones_like(x.student[:, 0], dtype=torch.bool) for x in pairs]
    return torch.cat([y if x is None else x for x, y in zip(found, every, strict=True)])
