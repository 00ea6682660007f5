"""The boxes of a dense head as it encodes them, and their decoding to pixels."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mmdist.lookup import by_class_name


class Code(NamedTuple):
    """The encoded boxes of a dense head; rows are ordered by level, y, x, anchor."""

    code: Tensor  # (N, rows, 4)
    priors: Tensor  # (rows, k), the anchors or points they refer to


def _fcos(head: nn.Module, output: tuple) -> tuple:
    if not head.norm_on_bbox:
        return output
    boxes = [x * s for x, s in zip(output[1], head.strides, strict=True)]
    return (output[0], boxes, *output[2:])


# Heads whose forward returns other boxes in training than at inference, and how to
# convert the former to the latter.
OUTPUT_AT_INFERENCE: dict[str, Callable[[nn.Module, tuple], tuple]] = {
    'VFNetHead': lambda head, output: (output[0], output[2]),  # the refined boxes
    'FCOSHead': _fcos,
}
# Heads whose boxes :func:`encoded` reads, and how; the first match in a head's MRO
# counts. 'coder' is the usual kind: priors of the generator, and a bbox coder.
ENCODED: dict[str, str | None] = {
    'AnchorHead': 'coder',
    'FCOSHead': 'coder',
    'RTMDetHead': 'coder',
    'VFNetHead': 'coder',
    'GFLHead': 'distributions',
    'TOODHead': 'boxes',
    'YOLOXHead': 'cxcywh',
    # Derived from the heads above, but with other boxes or outputs.
    **dict.fromkeys(('PAAHead', 'GuidedAnchorHead', 'YOLACTHead')),
    **dict.fromkeys(('CondInstBboxHead', 'RTMDetInsHead')),
}


def encodes(head: nn.Module) -> bool:
    """Whether :func:`encoded` supports the boxes of a dense head."""
    known = by_class_name(head, ENCODED) is not None
    return known and hasattr(head, 'prior_generator')


def encoded(head: nn.Module, output: tuple) -> Code:
    """The boxes of all locations and anchors as the head encodes them, with gradient.

    ``head`` must be one that :func:`encodes` accepts; ``output`` is what its
    ``forward`` just returned.
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
        # (N, anchors * k, h, w) -> (N, h * w * anchors, k)
        rows = x.permute(0, 2, 3, 1).reshape(len(x), len(prior), -1).float()
        if kind == 'distributions':
            rows = head.integral(rows).view(len(x), -1, 4) * stride[0]
        elif kind == 'boxes':
            rows = rows * stride[0]
        levels.append(rows)
    priors = torch.cat(priors)
    if kind == 'distributions':
        priors = head.anchor_center(priors)
    return Code(torch.cat(levels, 1), priors)


def decode(head: nn.Module, code: Code) -> Tensor:
    """Decode boxes: (N, rows, 4), x1 y1 x2 y2 in pixels, with gradient."""
    kind = by_class_name(head, ENCODED)
    if kind == 'boxes':
        return code.code
    if kind == 'cxcywh':
        return head._bbox_decode(code.priors, code.code)
    priors = code.priors.repeat(len(code.code), 1)
    boxes = head.bbox_coder.decode(priors, code.code.flatten(0, 1))
    return boxes.view_as(code.code)
