"""A teacher's answers on disk: asked once, read in every training.

A store is a folder: ``manifest.json``; ``part-*.jsonl`` with a line for each image, one
part for each process that wrote; and of segmentors ``maps/*.npy``. Nothing in it is
code. A COCO results file is read as well.
"""

from __future__ import annotations

import base64
import json
import os
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

FORMAT = dict(format='mmdist stored teacher', version=1)
KEYS = ('kind', 'class_names', 'teachers', 'images', 'complete')
AGAIN = 'Run tools/store_teacher.py again: it goes on where it stopped.'
WRONG = (
    AttributeError,
    LookupError,
    TypeError,
    ValueError,
)  # where it is not as it was


class Store:
    """Reads a folder that ``tools/store_teacher.py`` wrote, or a COCO results file.

    Args:
        path: The folder, or a file ``[{image_id, category_id, bbox, score}, ...]``.

    Attributes:
        kind: ``'boxes'`` of a detector or ``'maps'`` of a segmentor.
        class_names: The teacher's classes; None for a results file until
            :meth:`name_classes`.
        origin: Whose answers these are, in words.
        is_by_id: Whether images are known by ``img_id``, not by their path. A results
            file has no entry for an image in which nothing was found.

    Raises:
        FileNotFoundError: There is no such folder or file.
        ValueError: It is incomplete, damaged, of another version or none at all, or has
            numbers that are no boxes, scores or labels; with the first few names.
    """

    def __init__(self, path: str | os.PathLike) -> None:
        self.path = Path(path)
        self.kind = 'boxes'
        self.class_names: tuple[str, ...] | None = None
        self.origin = f'the answers in {self.path}'
        self.is_by_id = self.path.is_file()
        self._of: dict[str | int, Any] = {}  # the rows of an image, or its map
        self._sizes: dict[str, tuple[int, int]] = {}
        self._read_results() if self.is_by_id else self._read_folder()

    def name_classes(self, categories: Mapping[int, str]) -> None:
        """Name the classes of a results file.

        Args:
            categories: The name of each ``category_id`` of the annotation file.

        Raises:
            ValueError: The results have ids that are not there.
        """
        if unknown := [i for i in self._ids if i not in categories]:
            raise ValueError(
                f'{self.path} has boxes of the category ids {_some(unknown)}, but the '
                f'annotation file knows {_some(categories)}. The results are of '
                'another data set, or number its classes in their own way.'
            )
        columns = [list(categories).index(i) for i in self._ids]
        self._labels = torch.tensor(columns, dtype=torch.long)[self._labels.long()]
        self._ids, self.class_names = list(categories), tuple(categories.values())

    def key(self, results: Mapping) -> str | int | None:
        """The key of an image, by what its data set knows of it; None: no answer.

        The path is looked up as it is. If the data were moved, it is known by the
        folders and the name that it shares with one path of the store.
        """
        if self.is_by_id:
            image = results.get('img_id')
            return image if image in self._of else None
        path = full_path(results.get('img_path') or '')
        if path in self._of:
            return path
        parts = path.split('/')
        tails = ('/'.join(parts[start:]) for start in range(len(parts)))
        return next((self._tails[tail] for tail in tails if tail in self._tails), None)

    def size(self, key: str | int) -> tuple[int, int] | None:
        """Height and width of the file in pixels; None if they are not known."""
        return self._sizes.get(key)

    def boxes(self, key: str | int) -> tuple[Tensor, Tensor, Tensor]:
        """What was found in an image.

        Returns:
            The boxes, (M, 4) float32, x1 y1 x2 y2 in pixels of the file; their scores,
            (M,); their labels, (M,) long, indices of :attr:`class_names`.
        """
        rows = self._of[key]
        return self._boxes[rows], self._scores[rows], self._labels[rows].long()

    def map(self, key: str) -> Tensor:
        """The probabilities times 255 over the whole image, (classes, h, w) uint8.

        Raises:
            ValueError: The file is damaged, or it is another map.
        """
        try:
            found = np.load(self._of[key], mmap_mode='c', allow_pickle=False)
            if found.ndim != 3 or found.dtype != np.uint8:
                raise ValueError(f'its shape is {found.shape}, its type {found.dtype}')
            if len(found) != len(self.class_names):
                raise ValueError(f'it has {len(found)} classes')
        except (OSError, ValueError) as error:
            raise ValueError(
                f'{self._of[key]} is not the map of {len(self.class_names)} classes '
                f'that was stored: {error}'
            ) from None
        return torch.from_numpy(found)

    def _read_folder(self) -> None:
        manifest = read_manifest(self.path)
        self.kind, number = manifest['kind'], manifest['images']
        self.class_names = tuple(manifest['class_names'])
        names = _some(teacher['checkpoint'] for teacher in manifest['teachers'])
        self.origin += f', of {names}'
        found, cut_off = {}, []
        for file, line in read_parts(self.path):
            try:
                entry = json.loads(line)
                name, (height, width) = entry['file'], entry['size']
                self._sizes[name] = int(height), int(width)
                if self.kind == 'boxes':
                    data = base64.b64decode(entry['boxes'], validate=True)
                    found[name] = np.frombuffer(data, '<f4').reshape(-1, 6)
                    continue
                map_file = self.path / 'maps' / Path(entry['map']).name  # never outside
                found[name] = map_file
                is_whole = map_file.is_file()
                if not is_whole or map_file.stat().st_size != entry['bytes']:
                    cut_off.append(map_file.name)
            except WRONG:
                raise ValueError(damaged(file, line)) from None
        if not manifest['complete'] or len(found) != number:
            raise ValueError(
                f'{self.path} has answers for {len(found)} of {number} images: it is '
                f'being written, was interrupted or was not copied whole. {AGAIN}'
            )
        if cut_off:
            raise ValueError(
                f'{self.path}/maps: {len(cut_off)} of {number} files are missing or '
                f'cut off: {_some(cut_off)}. Copy the folder again.'
            )
        self._of = found
        if self.kind == 'boxes':
            ends = np.cumsum([len(rows) for rows in found.values()])
            rows = np.concatenate([np.empty((0, 6), np.float32), *found.values()])
            self._keep(list(found), ends, rows, len(self.class_names))
        root = os.path.commonprefix([x.split('/')[:-1] for x in found])  # noqa: RUF071
        start = max(len(root) - 1, 0)  # the last folder that they have in common
        self._tails = {'/'.join(x.split('/')[start:]): x for x in found}

    def _read_results(self) -> None:
        images, index, ids, rows = {}, array('q'), array('q'), array('d')
        last: dict = {}

        def keep(entry: dict) -> dict | None:  # so that not all of them are in memory
            nonlocal last
            if 'counts' in entry:  # a mask within an entry
                return entry
            last = entry
            x, y, width, height = entry['bbox']
            rows.extend((x, y, x + width, y + height, entry['score']))
            ids.append(entry['category_id'])
            index.append(images.setdefault(entry['image_id'], len(images)))
            return None

        try:
            entries = json.loads(self.path.read_bytes(), object_hook=keep)
            if not isinstance(entries, list) or any(entries):
                last = entries
                raise TypeError
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(
                f'{self.path} is no COCO results file, or is cut off: {error}.'
            ) from None
        except WRONG:
            raise ValueError(
                f'{self.path} is no COCO results file of boxes, a list of {{image_id, '
                'category_id, bbox: [x, y, width, height], score}: it has '
                f'{str(last)[:200]}.'
            ) from None
        order = np.argsort(index, kind='stable')
        known, labels = np.unique(np.array(ids)[order], return_inverse=True)
        boxes = np.array(rows).reshape(-1, 5)[order]
        rows = np.concatenate([boxes, labels[:, None]], 1, dtype=np.float32)
        ends = np.cumsum(np.bincount(index, minlength=len(images)))
        self._ids = known.tolist()
        self._keep(list(images), ends, rows, len(known))

    def _keep(
        self, images: Sequence, ends: np.ndarray, rows: np.ndarray, classes: int
    ) -> None:
        """Check the boxes of all images, and put them into one tensor."""
        rows = torch.from_numpy(rows)
        boxes, scores, labels = rows[:, :4], rows[:, 4], rows[:, 5]
        is_label = (labels >= 0) & (labels < classes) & (labels == labels.floor())
        for what, good in {
            'boxes with NaN or infinite numbers': boxes.isfinite().all(1),
            'boxes of negative size': (boxes[:, 2:] >= boxes[:, :2]).all(1),
            'scores that are not between 0 and 1': (scores >= 0) & (scores <= 1),
            'labels that are no class': is_label,
        }.items():
            if not good.all():
                bad = np.searchsorted(
                    ends, (~good).nonzero()[:, 0].numpy(), side='right'
                )
                names = _some(dict.fromkeys(images[i] for i in bad))
                raise ValueError(f'{self.path} has {what}, in {names}.')
        self._boxes, self._scores = boxes.contiguous(), scores.contiguous()
        self._labels = labels.to(torch.int32)
        starts = [0, *ends.tolist()]
        self._of = {x: slice(*starts[i : i + 2]) for i, x in enumerate(images)}


def full_path(path: str) -> str:
    """A path that does not depend on the working directory; a URL as it is."""
    return path if '://' in path else os.path.abspath(path)


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of a store, checked.

    Raises:
        FileNotFoundError: There is none.
        ValueError: It is none of this version.
    """
    file = path / 'manifest.json'
    if not file.is_file():
        why = 'has no manifest.json' if path.is_dir() else 'is not there'
        raise FileNotFoundError(
            f'{path} {why}. A stored teacher is a folder that tools/store_teacher.py '
            'wrote, or a COCO results file.'
        )
    try:
        manifest = json.loads(file.read_text())
        found = {key: manifest[key] for key in FORMAT}
    except WRONG:
        manifest, found = {}, 'damaged'
    if found != FORMAT or not manifest.keys() >= {*KEYS}:
        raise ValueError(f'{file} is {found}, not {FORMAT}: store the teacher again.')
    return manifest


def read_parts(path: Path, repair: bool = False) -> Iterator[tuple[Path, bytes]]:
    """The lines of all parts, with the file of each.

    Args:
        path: The store.
        repair: Cut off a last line that was not wholly written; else it is refused.

    Raises:
        ValueError: A part ends within a line.
    """
    for file in sorted(path.glob('part-*.jsonl')):
        with file.open('r+b' if repair else 'rb') as lines:
            for line in lines:
                if line.endswith(b'\n'):
                    yield file, line
                elif repair:
                    lines.truncate(lines.seek(0, os.SEEK_END) - len(line))
                else:
                    raise ValueError(f'{file} ends within a line. {AGAIN}')


def damaged(file: Path, line: bytes) -> str:
    return (
        f'{file} is damaged: {line[:60]!r}... is no answer. Remove this file, and run '
        'tools/store_teacher.py again.'
    )


def _some(values: Iterable, most: int = 5) -> str:
    values = list(map(str, values))
    rest = f' and {len(values) - most} more' if len(values) > most else ''
    return ', '.join(values[:most]) + rest
