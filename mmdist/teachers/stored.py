"""Answers of a teacher that was asked once, as a teacher without a model."""

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

# In a sample's metainfo: which files its image shows, and how their pixels were moved.
FRAMES = 'mmdist_frames'
SIZE = 'mmdist_size'  # height and width of the image when that was noted
NO_HOOK = (
    'A stored teacher has to know how each image was augmented. Add '
    "`custom_hooks = [dict(type='mmdist.StoredTeacherHook')]` to the config; where its "
    "base has hooks, `[*_base_.custom_hooks, dict(type='mmdist.StoredTeacherHook')]`."
)


class Source(NamedTuple):
    """The file of an image, as its data set knows it."""

    img_path: str | None
    img_id: str | int | None
    size: tuple[int, int]  # height and width as it was loaded


class Frame(NamedTuple):
    """A file that an image shows, and how its pixels got where they are.

    ``moves`` are calls of mmdet's box methods for a detector, (method, arguments,
    keyword arguments); for a segmentor a :class:`View` from each transform.
    """

    source: Source
    moves: tuple


class View(NamedTuple):
    """What of a file an image shows, after a transform."""

    matrix: np.ndarray  # (3, 3), from pixels of the file to those of the image
    size: tuple[int, int]  # height and width of the image, before it is padded


class Placed(NamedTuple):
    """A stored map, and what of its file the image shows."""

    probabilities: Tensor  # (classes, h, w), times 255, uint8; the whole file
    views: Sequence[View]  # the first is the file itself, the last the image


class StoredTeacher(Teacher):
    """A teacher of which only the answers are there: no model is built, moved or run.

    ``mmdist.StoredTeacherHook`` notes how each image of a batch was augmented, and the
    stored answers are moved in the same way.

    Args:
        stored: What ``tools/store_teacher.py`` wrote, or a COCO results file of the
            training images.
        class_map: As of :class:`Teacher`.
        class_match: As of :class:`Teacher`.

    Raises:
        ValueError: ``stored`` is no path, or ``class_map`` or ``class_match`` is none.
    """

    def __init__(
        self,
        stored: str | os.PathLike,
        class_map: Mapping[str, str | Sequence[str]] | None = None,
        class_match: str = 'strict',
    ) -> None:
        if not isinstance(stored, (str, os.PathLike)):
            raise ValueError(
                '`teacher.stored` is the path of a folder or of a COCO results file, '
                f'got {stored!r}.'
            )
        super().__init__(stored, class_map=class_map, class_match=class_match)
        self._store: Store | None = None

    @property
    def origin(self) -> str:
        """Whose answers these are, in words."""
        return self.store.origin

    @property
    def store(self) -> Store:
        """The answers, read when they are first needed; its errors are those."""
        if self._store is None:
            self._store = Store(self.config)
        return self._store

    def __getstate__(self) -> dict:
        return {**super().__getstate__(), '_store': None}

    def move_to(self, device: torch.device) -> None:
        """There is nothing to move but the answers of a batch."""

    def load(self, student: nn.Module) -> None:
        """Read the answers.

        Raises:
            ValueError: They are damaged, or the classes of a COCO results file have no
                names yet, since the hook is missing.
        """
        self.class_names = self.store.class_names
        if self.class_names is None:
            raise ValueError(NO_HOOK)
        self.model = StoredAnswers(self.store)


class StoredAnswers(ForeignTeacher):
    """Gives the answers for a batch, in its geometry; it has no parameters.

    Attributes:
        gives: ``'detections'``, after NMS: an ``InstanceData`` of ``bboxes``,
            ``scores`` and ``labels`` for each image. Or ``'maps'``: a :class:`Placed`
            for each image.
    """

    activation = 'identity'

    def __init__(self, store: Store) -> None:
        nn.Module.__init__(self)  # it sees no images, so it normalises none
        self.gives = 'detections' if store.kind == 'boxes' else 'maps'
        self.class_names = store.class_names
        self.store = store

    def answer(self, step: Any) -> list[InstanceData] | list[Placed]:
        """The answers for the batch of a step."""
        return self(step.inputs, step.data_samples)

    def forward(
        self, images: Tensor, samples: Sequence[BaseDataElement]
    ) -> list[InstanceData] | list[Placed]:
        """Look up the answers of each image, and move them as it was moved.

        Args:
            images: The batch, (N, C, H, W); its device is that of the answers.
            samples: Its N data samples.

        Raises:
            ValueError: How an image was augmented is not known, it has no answer, or
                its file has another size than the one that the teacher saw.
        """
        if any(FRAMES not in sample.metainfo for sample in samples):
            raise ValueError(NO_HOOK)
        give = self._detections if self.gives == 'detections' else self._map
        return [give(sample, images.device) for sample in samples]

    def _detections(self, sample: BaseDataElement, device: torch.device):
        found = []
        for source, moves in sample.metainfo[FRAMES]:
            boxes, *rest = self._boxes(source)
            boxes, seen = moved(boxes, moves)
            found.append([x[seen] for x in (boxes, *rest)])
        boxes, scores, labels = map(torch.cat, zip(*found, strict=True))
        # the whole batch may have been resized since
        height, width = sample.metainfo['img_shape'][:2]
        then_h, then_w = sample.metainfo[SIZE]
        boxes = boxes * boxes.new_tensor([width / then_w, height / then_h]).repeat(2)
        limits = boxes.new_tensor([width, height]).repeat(2)
        boxes = boxes.clamp(min=0).minimum(limits)
        seen = (boxes[:, 2:] - boxes[:, :2] >= 1).all(1)
        columns = dict(bboxes=boxes, scores=scores, labels=labels)
        return InstanceData(**{k: x[seen].to(device) for k, x in columns.items()})

    def _boxes(self, source: Source) -> tuple[Tensor, Tensor, Tensor]:
        key = self.store.key(source._asdict())
        if key is None and self.store.is_by_id:  # where nothing was found
            return torch.zeros(0, 4), torch.zeros(0), torch.zeros(0, dtype=torch.long)
        return self.store.boxes(self._checked(key, source))

    def _map(self, sample: BaseDataElement, device: torch.device) -> Placed:
        ((source, views),) = sample.metainfo[FRAMES]
        key = self._checked(self.store.key(source._asdict()), source)
        return Placed(self.store.map(key).to(device), views)

    def _checked(self, key: str | int | None, source: Source) -> str | int:
        name = source.img_path or source.img_id
        if key is None:
            raise ValueError(f'{self.store.origin}: there is no answer for {name}.')
        size = self.store.size(key)
        if size is not None and tuple(size) != tuple(source.size):
            raise ValueError(other_sizes(self.store, [(name, source.size, size)]))
        return key


def other_sizes(store: Store, found: Sequence[tuple]) -> str:
    """Say of which images, (name, size now, size then), the size differs."""
    images = [
        f'{name} ({now[0]} x {now[1]}, was {then[0]} x {then[1]})'
        for name, now, then in found[:3]
    ]
    more = f' and {len(found) - 3} more' if len(found) > 3 else ''
    return (
        f'{store.origin}: images of the training have another height x width than '
        f'those that the teacher saw: {", ".join(images)}{more}. Store its answers for '
        'these images.'
    )


def moved(boxes: Tensor, moves: Sequence[tuple]) -> tuple[Tensor, Tensor]:
    """Boxes after the calls that moved the labels of their image.

    Args:
        boxes: (M, 4), x1 y1 x2 y2 in pixels of the file.
        moves: (method of mmdet's ``HorizontalBoxes``, arguments, keyword arguments).

    Returns:
        The boxes, (M, 4), and which of them no call has clipped to nothing, (M,).
    """
    from mmdet.structures.bbox import HorizontalBoxes

    found = HorizontalBoxes(boxes)
    seen = torch.ones(len(boxes), dtype=torch.bool)
    for name, args, kwargs in moves:
        getattr(found, name)(*args, **kwargs)
        if name == 'clip_':  # what a shear would give an area again
            seen &= (found.widths > 0) & (found.heights > 0)
    return found.tensor, seen
