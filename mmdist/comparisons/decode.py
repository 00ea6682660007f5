"""The boxes of a dense head, decoded by the head itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from mmengine.config import ConfigDict
from torch import Tensor, nn

from mmdist.lookup import by_class_name, class_name_in, is_a


def _scaled_by_strides(head: nn.Module, output: tuple) -> tuple:
    boxes = [x * s for x, s in zip(output[1], head.strides, strict=True)]
    return (output[0], boxes, *output[2:])


def _fcos(head: nn.Module, output: tuple) -> tuple:
    return _scaled_by_strides(head, output) if head.norm_on_bbox else output


# Heads whose forward returns other boxes in training than at inference, and how to get
# from the former to the latter.
OUTPUT_AT_INFERENCE: dict[str, Callable[[nn.Module, tuple], tuple]] = {
    'VFNetHead': lambda head, output: (output[0], output[2]),  # the refined boxes
    'FCOSHead': _fcos,
    'CenterNetUpdateHead': _scaled_by_strides,
    'RepPointsHead': lambda head, output: (
        output[0],
        [head.points2bbox(points) for points in output[2]],
    ),
}


# Heads whose ``predict_by_feat`` takes or filters something else.
NOT_DECODED = (
    'PAAHead',
    'SABLRetinaHead',
    'GuidedAnchorHead',
    'YOLOV3Head',
    'YOLACTHead',
    'CondInstBboxHead',
    'RTMDetInsHead',
)


def decodes(head: nn.Module) -> bool:
    """Whether :func:`decode_boxes` knows the boxes of a dense head."""
    return hasattr(head, 'prior_generator') and not is_a(head, *NOT_DECODED)


def decode_boxes(
    head: nn.Module, output: tuple, activation: str, img_metas: Sequence[dict]
) -> list[Tensor]:
    """Decode the boxes of all locations and anchors, before any filtering and NMS.

    ``predict_by_feat`` of each head knows how its boxes are encoded, and returns them
    in the order of their scores. So it is given scores that fall from one location to
    the next.

    Args:
        head: A dense head of mmdet.
        output: What its ``forward`` has just returned.
        activation: What turns its class maps into probabilities.
        img_metas: Metainfo of the N images.

    Returns:
        Per image the boxes, (rows, 4), x1 y1 x2 y2 in pixels, without gradient. Rows
        are in the order of levels, y, x, anchors.
    """
    if head.training:
        convert = by_class_name(head, OUTPUT_AT_INFERENCE)
        output = output if convert is None else convert(head, output)
    maps, boxes, *factors = output
    columns = head.cls_out_channels
    ordered = [_falling_scores(x, columns, activation) for x in maps]
    factors = [[torch.full_like(x, 50.0) for x in levels] for levels in factors]
    everything = ConfigDict(
        nms_pre=2**31, score_thr=0.0, min_bbox_size=-1, max_per_img=2**31
    )
    with torch.no_grad(), _able_to_predict(head):
        results = head.predict_by_feat(
            ordered,
            [x.detach().float() for x in boxes],
            *factors,
            batch_img_metas=img_metas,
            cfg=everything,
            rescale=False,
            with_nms=False,
        )
    return [result.bboxes for result in results]


class Code(NamedTuple):
    """The boxes of a dense head as it learns them; rows are levels, y, x, anchors."""

    code: Tensor  # (N, rows, 4)
    priors: Tensor  # (rows, k), what they are relative to


# Heads whose boxes :func:`encoded` reads; the first of a head's classes in the table
# counts. None is the rule: anchors or points of the generator, and the bbox coder.
ENCODED: dict[str, str | None] = {
    'AnchorHead': None,
    'FCOSHead': None,
    'RTMDetHead': None,
    'VFNetHead': None,
    'GFLHead': 'distributions',
    'TOODHead': 'boxes',
    'YOLOXHead': 'cxcywh',
}


def encodes(head: nn.Module) -> bool:
    """Whether :func:`encoded` knows the boxes of a dense head."""
    return decodes(head) and class_name_in(head, ENCODED) is not None


def encoded(head: nn.Module, output: tuple) -> Code:
    """The boxes of all locations and anchors as the head encodes them, with gradient.

    Args:
        head: A dense head of mmdet that :func:`encodes` knows.
        output: What its ``forward`` has just returned.
    """
    if head.training:
        convert = by_class_name(head, OUTPUT_AT_INFERENCE)
        output = output if convert is None else convert(head, output)
    maps = output[1]
    kind = by_class_name(head, ENCODED)
    sizes = [x.shape[-2:] for x in maps]
    generator, device = head.prior_generator, maps[0].device
    options = dict(with_stride=True) if kind == 'cxcywh' else {}
    priors = generator.grid_priors(sizes, device=device, **options)
    levels = []
    for x, prior, stride in zip(maps, priors, generator.strides, strict=True):
        rows = flat(x, len(prior)).float()
        if kind == 'distributions':
            rows = head.integral(rows).view(len(x), -1, 4) * stride[0]
        elif kind == 'boxes':
            rows = rows * stride[0]
        levels.append(rows)
    priors = torch.cat(priors)
    if kind == 'distributions':
        priors = head.anchor_center(priors)
    return Code(torch.cat(levels, 1), priors)


def flat(x: Tensor, rows: int) -> Tensor:
    """A level, (N, anchors * k, h, w), as (N, h * w * anchors, k)."""
    return x.permute(0, 2, 3, 1).reshape(len(x), rows, -1)


def decode(head: nn.Module, code: Code) -> Tensor:
    """The boxes of a code, (N, rows, 4), x1 y1 x2 y2 in pixels, with gradient."""
    kind = by_class_name(head, ENCODED)
    if kind == 'boxes':
        return code.code
    if kind == 'cxcywh':
        return head._bbox_decode(code.priors, code.code)
    priors = code.priors.repeat(len(code.code), 1)
    boxes = head.bbox_coder.decode(priors, code.code.flatten(0, 1))
    return boxes.view_as(code.code)


@contextmanager
def _able_to_predict(head: nn.Module) -> Iterator[None]:
    """mmdet 3.3's SSDHead lacks the ``loss_cls`` that its ``predict_by_feat`` reads."""
    lacks = not hasattr(head, 'loss_cls')
    if lacks:
        head.loss_cls = None
    try:
        yield
    finally:
        if lacks:
            del head.loss_cls


def _falling_scores(like: Tensor, columns: int, activation: str) -> Tensor:
    """Scores of a level, (N, anchors * columns, h, w): only class 0 is above 0.

    Its probability falls strictly from one (y, x, anchor) to the next.
    """
    images, channels, height, width = like.shape
    anchors = channels // columns
    order = torch.linspace(2, -2, height * width * anchors, device=like.device)
    order = order.view(height, width, anchors).permute(2, 0, 1)
    scores = order.new_full((anchors, columns, height, width), -1e4)
    scores[:, 0] = order
    if activation == 'identity':
        scores = scores.sigmoid()
    elif activation == 'softmax':
        scores[:, -1] = 0  # the background
    return scores.flatten(0, 1).expand(images, -1, -1, -1)
