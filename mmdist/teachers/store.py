"""A teacher's answers on disk: written once, read in every training.

A store is a folder: ``manifest.json``, ``part-*.jsonl`` with a line for each image, one
part for each process that wrote, and for segmentors ``maps/*.npy``. Nothing in it is
code. What is read may also be a COCO results file.
"""

from __future__ import annotations

import base64
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

FORMAT, VERSION = 'mmdist answers of a teacher', 1
COLUMNS = 6  # of a box: x1 y1 x2 y2 score label, float32
CHUNK = 1 << 24  # characters of a results file at once
KINDS = ('boxes', 'maps')
AGAIN = 'Run tools/store_teacher.py again: it goes on where it stopped.'


class Store:
    """Reads a folder that ``tools/store_teacher.py`` wrote, or a COCO results file.

    Args:
        path: The folder, or a file ``[{image_id, category_id, bbox, score}, ...]``.

    Attributes:
        kind: ``'boxes'`` of a detector or ``'maps'`` of a segmentor.
        class_names: The teacher's classes; None for a results file until
            :meth:`name_classes`.
        origin: Whose answers these are, in words.
        is_by_id: Whether images are known by their ``img_id``, not by their path. A
            results file has no entry for an image in which nothing was found.

    Raises:
        FileNotFoundError: There is no such folder or file, or it is none of these.
        ValueError: It is incomplete, damaged, or of another version, or a box or a map
            is none; with the first few names.
    """

    kind: str
    class_names: tuple[str, ...] | None
    origin: str
    is_by_id: bool

    def __init__(self, path: str | os.PathLike) -> None:
        self.path = Path(path)
        self.is_by_id = self.path.is_file()
        self._rows: dict[str | int, slice | str] = {}
        self._sizes: dict[str, tuple[int, int]] = {}
        if self.is_by_id:
            self._read_results()
        else:
            self._read_folder()

    def __len__(self) -> int:
        """The number of images that have answers."""
        return len(self._rows)

    def name_classes(self, categories: Mapping[int, str]) -> None:
        """Name the classes of a results file.

        Args:
            categories: The name of each ``category_id`` of the annotation file.

        Raises:
            ValueError: The results have ids that are not there.
        """
        ids = self._categories.tolist()
        if unknown := [i for i in ids if i not in categories]:
            raise ValueError(
                f'{self.path} has boxes of the category ids {_some(unknown)}, but the '
                f'annotation file knows {_some(categories)}. The results are of '
                'another data set, or number its classes differently.'
            )
        columns = {category: i for i, category in enumerate(categories)}
        table = torch.tensor([columns[i] for i in ids], dtype=torch.int32)
        self.class_names = tuple(categories.values())
        self._labels = table[self._category] if len(ids) else self._category

    def key(self, results: Mapping) -> str | int | None:
        """The key of an image, by what its data set knows of it; None: no answer.

        The path is looked up as it is. If the data were moved, it is known by the
        folders and the name that it shares with one path of the store.
        """
        if self.is_by_id:
            image = results.get('img_id')
            return image if image in self._rows else None
        path = full_path(results.get('img_path') or '')
        if path in self._rows:
            return path
        parts = path.split('/')
        numbers = range(len(parts), self._depth - 1, -1)
        tails = ('/'.join(parts[-number:]) for number in numbers)
        return next((self._tails[tail] for tail in tails if tail in self._tails), None)

    def size(self, key: str | int) -> tuple[int, int] | None:
        """Height and width of the file in pixels; None if it is not known."""
        return self._sizes.get(key)

    def boxes(self, key: str | int) -> tuple[Tensor, Tensor, Tensor]:
        """What was found in an image.

        Returns:
            The boxes, (M, 4) float32, x1 y1 x2 y2 in pixels of the file; their scores,
            (M,); their labels, (M,) long, indices of :attr:`class_names`.
        """
        rows = self._rows[key]
        return self._boxes[rows], self._scores[rows], self._labels[rows].long()

    def map(self, key: str) -> Tensor:
        """The probabilities of an image times 255, (classes, h, w) uint8.

        The map covers the whole image.

        Raises:
            ValueError: The file is damaged or is another map.
        """
        path = self.path / 'maps' / self._rows[key]
        try:
            found = np.load(path, mmap_mode='c', allow_pickle=False)
        except (OSError, ValueError) as error:
            raise ValueError(f'The map of {key}, {path}, is damaged: {error}') from None
        if (
            found.ndim != 3
            or found.dtype != np.uint8
            or len(found) != len(self.class_names)
        ):
            raise ValueError(
                f'The map of {key}, {path}, is of the shape {found.shape} and the type '
                f'{found.dtype}; uint8 of {len(self.class_names)} classes is needed.'
            )
        return torch.from_numpy(found)

    # ---- a folder ------------------------------------------------------------------

    def _read_folder(self) -> None:
        manifest = read_manifest(self.path)
        self.kind = manifest['kind']
        self.class_names = tuple(manifest['class_names'])
        names = ', '.join(str(x['checkpoint']) for x in manifest['teachers'])
        self.origin = f'answers in {self.path}, of {names}'
        if self.kind == 'maps':
            files = {x.name: x.stat().st_size for x in os.scandir(self.path / 'maps')}
        found, wrong = {}, []
        for file, line in read_parts(self.path):
            try:
                entry = json.loads(line)
                name, (height, width) = entry['file'], entry['size']
                if min(int(height), int(width)) < 1:
                    raise ValueError
                if self.kind == 'boxes':
                    data = base64.b64decode(entry['boxes'], validate=True)
                    found[name] = np.frombuffer(data, '<f4').reshape(-1, COLUMNS)
                else:
                    found[name] = entry['map']
                    classes, *_ = entry['shape']
                    if classes != len(self.class_names):
                        wrong.append(f'{name} ({classes} classes)')
                    elif files.get(entry['map']) != entry['bytes']:
                        wrong.append(f'{name} ({entry["map"]} is missing or cut off)')
            except (LookupError, TypeError, ValueError):
                raise ValueError(
                    f'{file} is damaged: a line of it is no answer, {line[:60]!r}... '
                    'Remove the file and run tools/store_teacher.py again.'
                ) from None
            self._sizes[name] = int(height), int(width)
        if not manifest['complete'] or len(found) != manifest['images']:
            raise ValueError(
                f'{self.path} holds the answers for {len(found)} of '
                f'{manifest["images"]} images: it is still being written, was '
                f'interrupted or was not wholly copied. {AGAIN}'
            )
        if wrong:
            raise ValueError(
                f'{self.path}: {len(wrong)} maps are not those that were stored, of '
                f'{len(self.class_names)} classes: {_some(wrong)}.'
            )
        self._rows = found
        if self.kind == 'boxes':
            self._keep(found)
        self._tails, self._depth = tails_of(found)

    def _keep(self, found: dict[str | int, np.ndarray]) -> None:
        """Put the rows of all images into one tensor, checked."""
        ends = np.cumsum([len(rows) for rows in found.values()]).tolist()
        rows = np.concatenate([*found.values(), np.empty((0, COLUMNS), np.float32)])
        rows = torch.from_numpy(rows.astype(np.float32, copy=False))
        images = list(found)
        self._boxes, self._scores = rows[:, :4].contiguous(), rows[:, 4].contiguous()
        self._labels = rows[:, 5].to(torch.int32)
        self._rows = {
            image: slice(start, end)
            for image, start, end in zip(images, [0, *ends], ends, strict=False)
        }
        self._check(images, ends)
        is_label = (rows[:, 5] == self._labels) & (self._labels >= 0)
        is_label &= self._labels < len(self.class_names)
        self._refuse(~is_label, images, ends, 'labels that are no class')

    def _check(self, images: list, ends: list[int]) -> None:
        boxes, scores = self._boxes, self._scores
        bad = ~torch.isfinite(boxes).all(1)
        self._refuse(bad, images, ends, 'boxes with NaN or infinite numbers')
        bad = ((boxes[:, 2:] - boxes[:, :2]) < 0).any(1)
        self._refuse(bad, images, ends, 'boxes of negative width or height')
        bad = ~((scores >= 0) & (scores <= 1))
        self._refuse(bad, images, ends, 'scores that are not between 0 and 1')

    def _refuse(self, bad: Tensor, images: list, ends: list[int], what: str) -> None:
        if rows := bad.nonzero().flatten().tolist():
            where = np.searchsorted(ends, rows, side='right').tolist()
            where = list(dict.fromkeys(images[i] for i in where))
            raise ValueError(f'{self.path} has {what}, in {_some(where)}.')

    # ---- a COCO results file -------------------------------------------------------

    def _read_results(self) -> None:
        self.kind, self.class_names = 'boxes', None
        self.origin = f'answers in {self.path}'
        image_of: dict[int | str, int] = {}
        parts = [(np.empty(0, int), np.empty(0, int), np.empty((0, 5), np.float32))]
        for entries in filter(None, _entries(self.path)):
            try:
                images, *columns = _columns(entries)
            except (LookupError, TypeError, ValueError):
                raise ValueError(
                    f'{self.path} is no COCO results file of boxes, where each entry '
                    'is {image_id, category_id, bbox: [x, y, width, height], score}: '
                    f'it has {_first_wrong(entries)}'
                ) from None
            index = [image_of.setdefault(image, len(image_of)) for image in images]
            parts.append((np.array(index), *columns))
        index, categories, numbers = map(np.concatenate, zip(*parts, strict=True))
        order = np.argsort(index, kind='stable')
        ends = np.cumsum(np.bincount(index, minlength=len(image_of))).tolist()
        numbers = torch.from_numpy(numbers[order])
        self._boxes, self._scores = numbers[:, :4].contiguous(), numbers[:, 4].clone()
        ids, category = np.unique(categories[order], return_inverse=True)
        self._categories, self._category = ids, torch.from_numpy(category)
        self._labels = torch.from_numpy(categories[order])
        self._rows = {
            image: slice(start, end)
            for image, start, end in zip(image_of, [0, *ends], ends, strict=False)
        }
        self._check(list(image_of), ends)


def _columns(entries: list[dict]) -> tuple[list, np.ndarray, np.ndarray]:
    """Images, categories, and x1 y1 x2 y2 score of entries of a results file."""
    images = [entry['image_id'] for entry in entries]
    categories = np.array([entry['category_id'] for entry in entries])
    rows = np.array([(*entry['bbox'], entry['score']) for entry in entries], float)
    rows = rows.reshape(len(entries), 5)
    if categories.dtype.kind != 'i' or not {*map(type, images)} <= {int, str}:
        raise TypeError
    rows[:, 2:4] += rows[:, :2]
    return images, categories, rows.astype(np.float32)


def _first_wrong(entries: list[dict]) -> str:
    for entry in entries:
        try:
            _columns([entry])
        except (LookupError, TypeError, ValueError):
            return str(entry)[:200]
    return 'ids of different types'


def _entries(path: Path) -> Iterator[list[dict]]:
    """The entries of a JSON list, some at a time: as a whole they take gigabytes."""
    decode, skip = json.JSONDecoder().raw_decode, re.compile(r'[\s,]*').match
    with path.open(encoding='utf-8', errors='replace') as file:
        text, entries = file.read(CHUNK).lstrip(), []
        if not text.startswith('['):
            raise ValueError(
                f'{path} is no COCO results file: that is a JSON list of boxes, and '
                f'this begins with {text[:30]!r}.'
            )
        position = 1
        while True:
            position = skip(text, position).end()
            if text[position : position + 1] == ']':
                yield entries
                return
            try:
                entry, position = decode(text, position)
                entries.append(entry)
            except json.JSONDecodeError:  # the rest of it may come
                more = file.read(CHUNK)
                if not more:
                    raise ValueError(
                        f'{path} is cut off or damaged at '
                        f'{text[position : position + 60]!r}.'
                    ) from None
                yield entries
                text, position, entries = text[position:] + more, 0, []


# ---- what reader and writer share ----------------------------------------------------


def full_path(path: str) -> str:
    """A path that does not depend on the working directory; of a URL itself."""
    return path if '://' in path else os.path.abspath(path)


def tails_of(paths: Iterable[str]) -> tuple[dict[str, str | None], int]:
    """How paths are known if their common root has moved.

    Returns:
        The path of each tail, which begins with the name of the last folder that they
        have in common; and the least number of parts of one.
    """
    paths = list(paths)
    if not paths:
        return {}, 1
    root = os.path.commonprefix([path.split('/')[:-1] for path in paths])  # noqa: RUF071
    start = max(len(root) - 1, 0)
    tails = {'/'.join(path.split('/')[start:]): path for path in paths}
    return tails, min(tail.count('/') for tail in tails) + 1


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of a store, checked.

    Raises:
        FileNotFoundError: There is none.
        ValueError: It is none of this version.
    """
    file = path / 'manifest.json'
    if not file.is_file():
        what = 'is no store: it has no manifest.json' if path.is_dir() else 'is missing'
        raise FileNotFoundError(
            f'{path} {what}. A stored teacher is a folder that tools/store_teacher.py '
            'wrote, or a COCO results file.'
        )
    try:
        manifest = json.loads(file.read_text())
        version = manifest['format'], manifest['version']
    except (LookupError, TypeError, ValueError):
        raise ValueError(f'{file} is damaged: it is no manifest of a store.') from None
    if version != (FORMAT, VERSION):
        raise ValueError(
            f'{file} is of {version[0]!r}, version {version[1]!r}; this mmdist reads '
            f'{FORMAT!r}, version {VERSION}. Store the teacher again.'
        )
    lacking = {'kind', 'class_names', 'teachers', 'images', 'complete'} - {*manifest}
    if lacking or manifest['kind'] not in KINDS:
        raise ValueError(f'{file} is damaged: it is no manifest of a store.')
    return manifest


def read_parts(path: Path, repair: bool = False) -> Iterator[tuple[Path, bytes]]:
    """The lines of all parts, with the file of each.

    Args:
        path: The store.
        repair: Cut off what a killed process wrote of a last line; else it is refused.

    Raises:
        ValueError: A part ends within a line.
    """
    for file in sorted(path.glob('part-*.jsonl')):
        with file.open('r+b' if repair else 'rb') as lines:
            whole = 0
            for line in lines:
                if line.endswith(b'\n'):
                    whole += len(line)
                    yield file, line
                elif repair:
                    lines.truncate(whole)
                else:
                    raise ValueError(
                        f'{file} ends within a line: it is still being written, was '
                        f'interrupted or was not wholly copied. {AGAIN}'
                    )


def _some(values: Iterable, most: int = 5) -> str:
    values = list(values)
    rest = f' and {len(values) - most} more' if len(values) > most else ''
    return ', '.join(map(str, values[:most])) + rest
