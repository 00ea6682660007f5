"""A teacher's answers on disk: computed once, read in every training.

A store is a folder with ``manifest.json`` and, for each process of each run that wrote
to it, ``part-*.jsonl`` with one line per image, and ``part-*.bin`` with the boxes or
maps in sequence. It contains no code. A COCO results file can be read as well.
"""

from __future__ import annotations

import fcntl
import json
import logging
import math
import os
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.logging import print_log
from torch import Tensor
from torch.utils._pytree import keystr, tree_leaves_with_path

from .class_map import first_few

some = partial(first_few, most=5)
FORMAT = 'stored teacher of mmdist, version 2'
DTYPES = dict(boxes=np.dtype('<f4'), maps=np.dtype('u1'))
AGAIN = 'Run tools/store_teacher.py again: it continues where it stopped.'
WRONG = (AttributeError, LookupError, TypeError, ValueError)  # from unexpected JSON


class Store:
    """Reads a folder that ``tools/store_teacher.py`` wrote, or a COCO results file.

    Args:
        path: The folder, or a file ``[{image_id, category_id, bbox, score}, ...]``.

    Attributes:
        kind: ``'boxes'`` of a detector or ``'maps'`` of a segmentor.
        class_names: Class names; None for a results file until :meth:`name_classes`.
        is_by_id: Whether it is a results file, which identifies images by ``img_id``
            instead of path, and has no entry for an image without detections.

    Raises:
        FileNotFoundError: There is no such folder or file.
        ValueError: It is damaged, of another version or not a store at all, or has
            invalid boxes, scores or labels; the message names the first few images.
    """

    def __init__(self, path: str | os.PathLike) -> None:
        self.path = Path(path)
        self.kind, self.origin = 'boxes', f'the answers in {self.path}'
        self.class_names: tuple[str, ...] | None = None
        self.is_by_id = self.path.is_file()
        self._sizes: dict[str, tuple[int, int]] = {}
        self._of: dict[str | int, np.ndarray] = (
            self._read_results() if self.is_by_id else self._read_folder()
        )

    def name_classes(self, categories: Mapping[int, str]) -> None:
        """Name each ``category_id`` of a results file; ValueError if one is unknown."""
        if self.class_names is not None:
            return
        ids = np.unique(self._rows[:, 5]).astype(int).tolist()
        if unknown := [i for i in ids if i not in categories]:
            raise ValueError(
                f'{self.path} has boxes with the category ids {some(unknown)}, but the '
                f'annotation file has {some(categories)}. The results belong to '
                'another data set or use other category ids.'
            )
        columns = np.array([list(categories).index(i) for i in ids], int)
        self._rows[:, 5] = columns[np.searchsorted(ids, self._rows[:, 5])]
        self.class_names = tuple(categories.values())

    def key(self, image: Mapping) -> str | int | None:
        """Find the key of an image by its data set's info; None if it has no answer.

        The data may have been moved, so only the part of the path below the last folder
        that all images share counts.
        """
        if self.is_by_id:
            tails = [image.get('img_id')]
        else:
            parts = os.path.abspath(image.get('img_path') or '').split('/')
            tails = ['/'.join(parts[start:]) for start in range(1, len(parts))]
        return next((tail for tail in tails if tail in self._of), None)

    def answer(self, image: Mapping) -> Tensor:
        """Return what the teacher found in an image; raises like :meth:`check`.

        Returns:
            For a detector, (M, 6) float32: x1 y1 x2 y2 in pixels of the file, score and
            label, an index into :attr:`class_names`. For a segmentor, probabilities
            times 255 over the whole image, (classes, h, w) uint8.
        """
        key = self.key(image)
        if key is None and self.is_by_id:
            return torch.zeros(0, 6)
        self.check([image])
        return torch.from_numpy(self._of[key])

    def check(self, images: Iterable[Mapping]) -> None:
        """Check that images have answers, and have kept their size if it is known.

        Raises:
            ValueError: Some do not; the message counts them and names the first few. Up
                to half of the images can be missing from a results file.
        """
        missing, other, number = [], [], 0
        for image in images:
            number += 1
            name, key = image.get('img_path') or image.get('img_id'), self.key(image)
            now = image.get('height'), image.get('width')
            then = self._sizes.get(key, now)
            if key is None:
                missing.append(name)
            elif None not in now and now != then:
                other.append('{} ({} x {}, was {} x {})'.format(name, *now, *then))
        text = f'{self.origin}: {len(missing)} of {number} training images'
        if self.is_by_id and 0 < len(missing) <= number / 2:
            text += f' are missing, so they count as without boxes: {some(missing)}.'
            print_log(f'mmdist: {text}', 'current', logging.WARNING)
        elif missing:
            raise ValueError(
                f'{text} have no answer: {some(missing)}. Ask the teacher about all of '
                + ('them.' if self.is_by_id else f'them. {AGAIN}')
            )
        if other:
            raise ValueError(
                f'{self.origin}: training images differ in height x width from those '
                f'that the teacher saw: {some(other)}. Store its answers for these '
                'images.'
            )

    def _read_folder(self) -> dict[str, np.ndarray]:
        manifest = read_manifest(self.path)
        self.kind, self.class_names = manifest['kind'], tuple(manifest['class_names'])
        names = some(teacher['checkpoint'] for teacher in manifest['teachers'])
        self.origin += f', of {names}'
        parts, found = list(read_parts(self.path, manifest)), {}
        folders = {os.path.dirname(name) for name, *_ in parts}
        shared = os.path.dirname(os.path.commonpath(folders)) if folders else ''
        for name, size, answer in parts:
            key = name.removeprefix(shared).lstrip('/')
            self._sizes[key], found[key] = size, answer
        if self.kind == 'maps':
            return found
        return self._checked(found, len(self.class_names))

    def _read_results(self) -> dict[int, np.ndarray]:
        found, entry = {}, None
        try:
            for entry in json.loads(self.path.read_bytes()):
                x, y, width, height = entry['bbox']
                row = x, y, x + width, y + height, entry['score'], entry['category_id']
                found.setdefault(entry['image_id'], array('d')).extend(row)
        except WRONG as error:
            is_json = not isinstance(error, (json.JSONDecodeError, UnicodeDecodeError))
            raise ValueError(
                f'{self.path} is cut off or not a COCO results file of boxes, a list '
                'of {image_id, category_id, bbox: [x, y, width, height], score}: '
                + (f'it contains {str(entry)[:200]}.' if is_json else f'{error}.')
            ) from None
        found = {image: np.array(rows).reshape(-1, 6) for image, rows in found.items()}
        return self._checked(found, math.inf)

    def _checked(self, found: dict[Any, np.ndarray], classes: float) -> dict:
        """Check the rows of all images, and return views of them per image."""
        rows = np.concatenate([np.empty((0, 6)), *found.values()], dtype=np.float32)
        ends = np.cumsum([len(of_image) for of_image in found.values()])
        boxes, scores, labels = rows[:, :4], rows[:, 4], rows[:, 5]
        is_label = (labels >= 0) & (labels < classes) & (labels == np.floor(labels))
        for what, good in {
            'boxes with NaN or infinite numbers': np.isfinite(boxes).all(1),
            'boxes of negative size': (boxes[:, 2:] >= boxes[:, :2]).all(1),
            'scores that are not between 0 and 1': (scores >= 0) & (scores <= 1),
            'labels that belong to no class': is_label,
        }.items():
            if not good.all():
                bad = np.unique(np.searchsorted(ends, np.flatnonzero(~good), 'right'))
                names = some(np.array([*found], object)[bad])
                raise ValueError(f'{self.path} has {what}, in {names}.')
        self._rows = rows
        return dict(zip(found, np.split(rows, ends[:-1]), strict=False))


class StoreWriter:
    """Writes a store, or continues one that was interrupted.

    Args:
        path: The folder.
        manifest: ``kind``, ``class_names``, ``teachers``, and whatever else the answers
            depend on, as JSON.
        process: Number of this process. Process 0 has to start first, and locks other
            commands out while it lives.

    Attributes:
        done: Full paths of the images that already had answers at the start.

    Raises:
        ValueError: Another command is writing the store, or began it.
    """

    def __init__(
        self, path: str | os.PathLike, manifest: dict, process: int = 0
    ) -> None:
        self.path, self.kind = Path(path), manifest['kind']
        text = json.dumps(dict(manifest, format=FORMAT), default=str)
        manifest = json.loads(text)
        if process == 0:
            self._begin(manifest)
        there, now = map(_by_place, (read_manifest(self.path), manifest))
        if other := [key for key in {**there, **now} if there.get(key) != now.get(key)]:
            raise ValueError(
                f'{self.path} was started by another command: manifest{other[0]} is '
                f'{there.get(other[0])!r}, but now it is {now.get(other[0])!r}. Store '
                'into another folder, or delete this one.'
            )
        self.done = {name for name, _, _ in read_parts(self.path, manifest)}
        parts = (self.path / f'part-{process}-{run}.jsonl' for run in count())
        file = next(part for part in parts if not part.exists())
        self._lines, self._data = file.open('xb'), file.with_suffix('.bin').open('wb')

    def _begin(self, manifest: dict) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock = (self.path / 'lock').open('w')
        try:  # the system releases the lock of a killed process
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f'Another command is writing to {self.path}. Wait until it ends, or '
                'store into another folder.'
            ) from None
        if not (self.path / 'manifest.json').exists():
            new = self.path / 'manifest.new'  # it appears whole or not at all
            new.write_text(json.dumps(manifest, indent=1))
            new.replace(self.path / 'manifest.json')

    def add(self, file: str, size: Sequence[int], answer: Tensor) -> None:
        """Store the answer for an image; it is kept if the process is killed later.

        Args:
            file: The path of the image.
            size: Height and width of the file in pixels.
            answer: (M, 6), x1 y1 x2 y2 score label; or probabilities, (classes, h, w).

        Raises:
            ValueError: The answer has NaN or infinite values.
            OSError: The disk is full, or cannot be written.
        """
        if not answer.isfinite().all():
            raise ValueError(f"The teacher's answer for {file} contains NaN or inf.")
        answer = (answer * 255).round() if self.kind == 'maps' else answer
        data = answer.cpu().numpy().astype(DTYPES[self.kind])
        line = dict(file=os.path.abspath(file), size=list(size), shape=data.shape)
        line['start'] = self._data.tell()
        try:  # a line follows once its data is on the disk
            self._data.write(data.tobytes())
            self._data.flush()
            os.fsync(self._data.fileno())
            self._lines.write(f'{json.dumps(line)}\n'.encode())
            self._lines.flush()
        except OSError as error:
            raise OSError(
                f'{self.path} cannot be written: {error.strerror}. The answers so far '
                f'are kept. Free some space. {AGAIN}'
            ) from None


def _by_place(manifest: dict) -> dict[str, Any]:
    """Flatten a manifest, without the teachers' paths: a hash identifies weights."""
    places = {keystr(path): x for path, x in tree_leaves_with_path(manifest)}
    paths = ("['config']", "['checkpoint']")
    return {place: x for place, x in places.items() if not place.endswith(paths)}


def read_manifest(path: Path) -> dict[str, Any]:
    """Read and check the manifest of a store; raises like :class:`Store`."""
    file = path / 'manifest.json'
    try:
        manifest = json.loads(file.read_text())
        if manifest['format'] == FORMAT:
            return manifest
    except FileNotFoundError:
        raise FileNotFoundError(
            f'{path} has no manifest.json. A stored teacher is a folder that '
            'tools/store_teacher.py wrote, or a COCO results file.'
        ) from None
    except WRONG:
        pass
    raise ValueError(f'{file} is damaged or not a {FORMAT!r}: store it again.')


def read_parts(path: Path, manifest: Mapping) -> Iterator[tuple]:
    """Yield the path, (height, width) and array of each complete answer.

    An incomplete answer, at a truncated file end or still being written, is skipped.
    Raises ValueError if a line is not an answer.
    """
    kind = manifest['kind']
    axis, size = (1, 6) if kind == 'boxes' else (0, len(manifest['class_names']))
    for file in sorted(path.glob('part-*.jsonl')):
        data = file.with_suffix('.bin')
        is_empty = not data.is_file() or not data.stat().st_size
        numbers = np.empty(0, 'u1') if is_empty else np.memmap(data, 'u1', 'c')
        for line in file.read_bytes().split(b'\n')[:-1]:
            try:
                entry = json.loads(line)
                name, (height, width) = entry['file'], entry['size']
                shape, start = entry['shape'], entry['start']
                fits = len(shape) == 3 - axis and shape[axis] == size
                if not fits or min(start, *shape) < 0:
                    raise ValueError
                end = start + math.prod(shape) * DTYPES[kind].itemsize
                if end > len(numbers):
                    continue
                answer = np.asarray(numbers[start:end]).view(DTYPES[kind])
                answer = answer.reshape(shape)
            except WRONG:
                raise ValueError(
                    f'{file} is damaged: {line[:60]!r}... is not an answer. Delete it '
                    f'and {data.name}, and run tools/store_teacher.py again.'
                ) from None
            yield name, (height, width), answer
