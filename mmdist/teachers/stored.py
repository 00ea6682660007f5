"""A teacher without a model: it looks up answers stored on disk."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from mmengine.structures import BaseDataElement, InstanceData
from torch import Tensor, nn

from .foreign import ForeignTeacher
from .store import Store
from .teacher import Teacher

# Keys in a sample's metainfo: the files its image shows and how their pixels moved,
FRAMES = 'mmdist_frames'
SIZE = 'mmdist_size'  # and height and width of the image at that time
NO_HOOK = (
    'A stored teacher must know how each image was augmented. Add '
    "`custom_hooks = [dict(type='mmdist.StoredTeacherHook')]` to the config; if its "
    "base has hooks, `[*_base_.custom_hooks, dict(type='mmdist.StoredTeacherHook')]`."
)


class Frame(NamedTuple):
    """A file that an image shows, and how its pixels were moved."""

    file: Mapping[str, Any]  # data set info; `height`, `width` as loaded
    # for a detector, calls of mmdet's box methods, (method, args, kwargs); for a
    # segmentor, a View from each transform
    moves: tuple


class View(NamedTuple):
    """The part of a file that an image shows after a transform."""

    matrix: np.ndarray  # (3, 3), from file pixels to image pixels
    size: tuple[int, int]  # height and width of the image, before padding


class Placed(NamedTuple):
    """A stored map, and the part of its file that the image shows."""

    probabilities: Tensor  # (classes, h, w), times 255, uint8; the whole file
    views: Sequence[View]  # the first is the file itself, the last the image


class StoredTeacher(Teacher):
    """A teacher that consists of stored answers: no model is built, moved or run.

    ``mmdist.StoredTeacherHook`` records how each image of a batch was augmented, and
    the stored answers are transformed in the same way.

    Args:
        stored: A folder written by ``tools/store_teacher.py``, or a COCO results file
            of the training images.
        options: ``class_map`` and ``class_match`` of :class:`Teacher`.

    Raises:
        ValueError: ``stored`` is not a path, or an option is invalid.
    """

    def __init__(self, stored: str | os.PathLike, **options) -> None:
        if not isinstance(stored, (str, os.PathLike)):
            raise ValueError(
                '`teacher.stored` must be the path of a folder or of a COCO results '
                f'file, got {stored!r}.'
            )
        super().__init__(stored, **options)
        self._store: Store | None = None

    @property
    def origin(self) -> str:
        """A description of whose answers these are."""
        return self.store.origin

    @property
    def store(self) -> Store:
        """The answers, read on first use."""
        if self._store is None:
            self._store = Store(self.config)
        return self._store

    def __getstate__(self) -> dict:
        return {**super().__getstate__(), '_store': None}

    def move_to(self, device: torch.device) -> None:
        """Do nothing: only the answers of a batch are moved."""

    def load(self, student: nn.Module) -> None:
        """Read the answers; ValueError if they are damaged or the hook is missing."""
        self.class_names = self.store.class_names
        if self.class_names is None:  # the hook names those of a COCO results file
            raise ValueError(NO_HOOK)
        self.model = StoredAnswers(self.store)


class StoredAnswers(ForeignTeacher):
    """Looks up the answers for a batch, in its geometry; it has no parameters.

    Attributes:
        gives: ``'detections'``, after NMS: an ``InstanceData`` of ``bboxes``,
            ``scores`` and ``labels`` for each image. Or ``'maps'``: a :class:`Placed`
            for each image.
    """

    activation = 'identity'

    def __init__(self, store: Store) -> None:
        nn.Module.__init__(self)  # it sees no images, so it needs no normalisation
        self.gives = 'detections' if store.kind == 'boxes' else 'maps'
        self.class_names, self.store = store.class_names, store

    def answer(self, step: Any) -> list[InstanceData] | list[Placed]:
        """Look up the answers for the batch of a step."""
        return self(step.inputs, step.data_samples)

    def forward(
        self, images: Tensor, samples: Sequence[BaseDataElement]
    ) -> list[InstanceData] | list[Placed]:
        """Look up the answers for each image, and transform them as the image was.

        ``images`` are the batch, (N, C, H, W), whose device the answers are put on.

        Raises:
            ValueError: It is not known how an image was augmented, or as in
                :meth:`Store.check`.
        """
        if any(FRAMES not in sample.metainfo for sample in samples):
            raise ValueError(NO_HOOK)
        if self.gives == 'detections':
            return [self._detections(sample).to(images.device) for sample in samples]
        frames = [sample.metainfo[FRAMES][0] for sample in samples]
        answers = (self.store.answer(file).to(images.device) for file, _ in frames)
        return [Placed(x, views) for x, (_, views) in zip(answers, frames, strict=True)]

    def _detections(self, sample: BaseDataElement) -> InstanceData:
        meta = sample.metainfo
        rows = [moved(self.store.answer(file), moves) for file, moves in meta[FRAMES]]
        rows = torch.cat(rows)
        # the whole batch may have been resized since
        now, then = meta['img_shape'][1::-1], meta[SIZE][::-1]
        limits, before = (rows.new_tensor(size).repeat(2) for size in (now, then))
        boxes = (rows[:, :4] * (limits / before)).clamp(min=0).minimum(limits)
        found = InstanceData(bboxes=boxes, scores=rows[:, 4], labels=rows[:, 5].long())
        return found[(boxes[:, 2:] - boxes[:, :2] >= 1).all(1)]


def moved(rows: Tensor, moves: Sequence[tuple]) -> Tensor:
    """Apply the calls that moved an image's labels to boxes; see :class:`Frame`.

    ``rows`` have x1 y1 x2 y2 in pixels of the file, followed by any other columns.
    Boxes that a call clips to nothing are dropped.
    """
    from mmdet.structures.bbox import HorizontalBoxes

    boxes = HorizontalBoxes(rows[:, :4])
    seen = torch.ones(len(rows), dtype=torch.bool)
    for name, args, kwargs in moves:
        getattr(boxes, name)(*args, **kwargs)
        if name == 'clip_':  # a later shear could give them an area again
            seen &= (boxes.widths > 0) & (boxes.heights > 0)
    return torch.cat([boxes.tensor, rows[:, 4:]], 1)[seen]
