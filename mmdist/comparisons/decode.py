"""The boxes of a dense head, decoded by the head itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from mmengine.config import ConfigDict
from torch import Tensor, nn

from mmdist.lookup import by_class_name, is_a


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
