"""Boxes of labels that remember how transforms of mmdet moved them."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from functools import wraps

import torch
from mmdet.structures.bbox import HorizontalBoxes

from mmdist.teachers.stored import Frame

MOVES = ('flip_', 'translate_', 'clip_', 'rotate_', 'project_', 'rescale_', 'resize_')
SAME_IMAGE = ('__getitem__', '__deepcopy__', 'clone', 'to', 'cpu', 'detach')


class TrackedBoxes(HorizontalBoxes):
    """The boxes that a transform of mmdet moves, with what it calls to do so.

    Every method does what mmdet's does. Which boxes are left does not matter, and there
    may be none: a frame is of an image.

    Attributes:
        frames: The files that the image shows, each with the calls so far.
    """

    frames: tuple[Frame, ...] = ()

    def __init__(self, *args, frames: Sequence[Frame] = (), **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.frames = tuple(frames)

    @classmethod
    def cat(cls, box_list: Sequence[TrackedBoxes], dim: int = 0) -> TrackedBoxes:
        """As in mmdet; the image shows the files of all."""
        boxes = super().cat(box_list, dim)
        boxes.frames = sum((x.frames for x in box_list), ())
        return boxes

    @staticmethod
    def overlaps(boxes1, boxes2, *args, **kwargs) -> torch.Tensor:
        """As in mmdet."""
        # MinIoURandomCrop crops an image without boxes to the patch that it asks about
        if isinstance(boxes2, TrackedBoxes) and not len(boxes2):
            left, top, right, bottom = boxes1.tensor[0].tolist()
            boxes2.translate_([-left, -top])
            boxes2.clip_([bottom - top, right - left])
        plain = (HorizontalBoxes(x.tensor, clone=False) for x in (boxes1, boxes2))
        return HorizontalBoxes.overlaps(*plain, *args, **kwargs)


def _moving(name: str):
    move = getattr(HorizontalBoxes, name)

    @wraps(move)
    def note(self, *args, **kwargs):
        call = deepcopy((name, args, kwargs))
        self.frames = tuple(Frame(s, (*moves, call)) for s, moves in self.frames)
        return move(self, *args, **kwargs)

    return note


def _carrying(name: str):
    give = getattr(HorizontalBoxes, name)

    @wraps(give)
    def carry(self, *args, **kwargs):
        boxes = give(self, *args, **kwargs)
        boxes.frames = self.frames
        return boxes

    return carry


for _name in MOVES:
    setattr(TrackedBoxes, _name, _moving(_name))
for _name in SAME_IMAGE:
    setattr(TrackedBoxes, _name, _carrying(_name))
