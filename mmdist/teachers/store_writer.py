"""Writes a teacher's answers, as :mod:`mmdist.teachers.store` reads them."""

from __future__ import annotations

import base64
import fcntl
import hashlib
import io
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from torch import Tensor

from .store import AGAIN, FORMAT, WRONG, damaged, read_manifest, read_parts


class StoreWriter:
    """Writes a store, and goes on with one that was interrupted.

    Args:
        path: The folder.
        manifest: ``kind``, ``class_names``, ``teachers``, ``images`` (how many there
            will be), and what else the answers depend on, as JSON.
        process: The number of this process. 0 begins before the others, checks, and
            keeps other commands out while it lives.

    Attributes:
        done: Paths of the images that have answers; of process 0.

    Raises:
        ValueError: Another command writes there, or has begun the store.
        OSError: It cannot be written.
    """

    def __init__(
        self, path: str | os.PathLike, manifest: dict, process: int = 0
    ) -> None:
        self.path = Path(path)
        self.manifest = json.loads(json.dumps(dict(FORMAT, **manifest, complete=False)))
        self.done: set[str] = set()
        if process == 0:
            self._begin()
        self._part = (self.path / f'part-{process}.jsonl').open('ab', buffering=0)

    def _begin(self) -> None:
        (self.path / 'maps').mkdir(parents=True, exist_ok=True)
        self._lock = (self.path / 'lock').open('w')
        try:  # of a process that was killed, the system gives it back
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f'Another command is writing {self.path}. Let it end, or store into '
                'another folder.'
            ) from None
        if (self.path / 'manifest.json').exists():
            old = read_manifest(self.path)
            for key in sorted((old.keys() | self.manifest) - {'images', 'complete'}):
                if old.get(key) != self.manifest.get(key):
                    raise ValueError(
                        f'{self.path} was begun by another command. Its `{key}` is '
                        f'{old.get(key)}, and now it is {self.manifest.get(key)}. '
                        'Store into another folder, or remove this one.'
                    )
        self._save_manifest()
        self.done = {entry['file'] for entry in self._entries(repair=True)}

    def _entries(self, repair: bool = False) -> Iterator[dict]:
        for file, line in read_parts(self.path, repair):
            try:
                yield dict(json.loads(line), file=json.loads(line)['file'])
            except WRONG:
                raise ValueError(damaged(file, line)) from None

    def add(self, file: str, size: Sequence[int], answer: Tensor) -> None:
        """Store the answer for an image; it is kept whatever happens afterwards.

        Args:
            file: The path of the image, :func:`full_path`.
            size: Height and width of the file in pixels.
            answer: Boxes, (M, 6), x1 y1 x2 y2 score label; or a map, (classes, h, w)
                uint8.

        Raises:
            ValueError: The answer has NaN.
            OSError: The disk is full, or cannot be written.
        """
        entry, data = dict(file=file, size=list(size)), answer.cpu().numpy()
        if not np.isfinite(data).all():
            raise ValueError(f'The teacher answers {file} with NaN.')
        if answer.ndim == 2:
            data = data.astype('<f4').tobytes()
            entry['boxes'] = base64.b64encode(data).decode()
        else:
            buffer = io.BytesIO()
            np.save(buffer, data, allow_pickle=False)
            mark = hashlib.sha1(file.encode()).hexdigest()[:8]
            entry.update(map=f'{Path(file).stem}-{mark}.npy', bytes=buffer.tell())
            self._replace(self.path / 'maps' / entry['map'], buffer.getvalue())
        self._write(self._part, f'{json.dumps(entry)}\n'.encode())

    def complete(self) -> int:
        """Say that all images are stored, and how many these are."""
        number = len({entry['file'] for entry in self._entries()})
        self.manifest.update(images=number, complete=True)
        self._save_manifest()
        return number

    def _save_manifest(self) -> None:
        text = json.dumps(self.manifest, indent=1)
        self._replace(self.path / 'manifest.json', text.encode())

    def _replace(self, file: Path, data: bytes) -> None:
        """Write a file that is there as a whole or not at all."""
        new = file.with_name(f'{file.name}.new')
        with new.open('wb', buffering=0) as opened:
            self._write(opened, data)
        new.replace(file)

    def _write(self, file: io.FileIO, data: bytes) -> None:
        try:
            while data:
                data = data[file.write(data) :]
            os.fsync(file.fileno())
        except OSError as error:
            raise OSError(
                f'{file.name} cannot be written: {error.strerror}. What is stored is '
                f'kept. Make room. {AGAIN}'
            ) from None
