"""Boxes of labels that record how mmdet's transforms moved them."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from functools import wraps

from mmdet.structures.bbox import HorizontalBoxes
from torch import Tensor

from mmdist.teachers.stored import Frame

MOVES = ('flip_', 'translate_', 'clip_', 'rotate_', 'project_', 'rescale_', 'resize_')
SAME_IMAGE = ('__getitem__', '__deepcopy__', 'clone', 'to', 'cpu', 'detach')


class TrackedBoxes(HorizontalBoxes):
    """Boxes that record which methods mmdet's transforms call to move them.

    Every method behaves as in mmdet. It does not matter which boxes are left, or
    whether any are: a frame belongs to the image.

    Attributes:
        frames: The files that the image shows, each with the calls so far.
    """

    frames: tuple[Frame, ...] = ()

    @classmethod
    def cat(cls, box_list: Sequence[TrackedBoxes], dim: int = 0) -> TrackedBoxes:
        """As in mmdet; the result has the frames of all."""
        boxes = super().cat(box_list, dim)
        boxes.frames = sum((x.frames for x in box_list), ())
        return boxes

    @staticmethod
    def overlaps(boxes1, boxes2, *args, **kwargs) -> Tensor:
        """As in mmdet."""
        # MinIoURandomCrop crops an image without boxes to the patch that it passes here
        if isinstance(boxes2, TrackedBoxes) and not len(boxes2):
            left, top, right, bottom = boxes1.tensor[0].tolist()
            boxes2.translate_([-left, -top])
            boxes2.clip_([bottom - top, right - left])
        plain = (HorizontalBoxes(x.tensor, clone=False) for x in (boxes1, boxes2))
        return HorizontalBoxes.overlaps(*plain, *args, **kwargs)


def _tracking(name: str):
    method = getattr(HorizontalBoxes, name)

    @wraps(method)
    def track(self, *args, **kwargs):
        frames = self.frames
        if name in MOVES:
            move = deepcopy((name, args, kwargs))
            frames = tuple(Frame(file, (*moves, move)) for file, moves in frames)
        boxes = method(self, *args, **kwargs)
        (self if boxes is None else boxes).frames = frames
        return boxes

    return track


for _name in (*MOVES, *SAME_IMAGE):
    setattr(TrackedBoxes, _name, _tracking(_name))
