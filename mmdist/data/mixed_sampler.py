"""Mix several data sets in each batch, in fixed shares."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import count

import torch
from mmengine.dataset import ConcatDataset
from mmengine.dist import get_dist_info, sync_random_seed
from torch.utils.data import Sampler

from mmdist.lookup import in_words
from mmdist.registry import DATA_SAMPLERS


@DATA_SAMPLERS.register_module()
@in_words
class MixedSampler(Sampler):
    """Puts a fixed number of images from each data set into every batch.

    An epoch shows the first data set once. The others continue where the last epoch
    ended, and show each image once before repeating any. Batches depend only on seed
    and epoch, so epoch-based and iteration-based loops, DDP and resuming all work.
    (mmdet's ``MultiSourceSampler`` is infinite, so an epoch never ends.)

    The data loader needs ``batch_size=sum(per_batch)`` and ``batch_sampler=None``.

    Args:
        dataset: A ``ConcatDataset``.
        per_batch: Number of images from each data set in the batch of one process.
        seed: Seed of the order; if omitted, a random one shared by all processes.

    Raises:
        ValueError: ``dataset`` is not a ``ConcatDataset`` of ``len(per_batch)`` data
            sets, one is empty, a number is negative, or the first is 0.
    """

    def __init__(
        self, dataset: ConcatDataset, per_batch: Sequence[int], seed: int | None = None
    ) -> None:
        sizes = [len(d) for d in getattr(dataset, 'datasets', ())]
        fits = 0 < len(sizes) == len(per_batch) and per_batch[0] > 0 <= min(per_batch)
        if not fits or 0 in sizes:
            raise ValueError(
                '`mmdist.MixedSampler` needs a `ConcatDataset` of non-empty data sets, '
                'and `per_batch`, the number of images from each in a batch, at least '
                f'1 from the first; got sizes {sizes} and per_batch={list(per_batch)}.'
            )
        self.sizes = sizes
        self.offsets = [sum(sizes[:i]) for i in range(len(sizes))]
        self.per_batch = list(per_batch)
        self.rank, self.world_size = get_dist_info()
        self.seed = sync_random_seed() if seed is None else seed
        self.epoch = 0
        self.batches = math.ceil(sizes[0] / (self.per_batch[0] * self.world_size))

    def __len__(self) -> int:
        return self.batches * sum(self.per_batch)

    def set_epoch(self, epoch: int) -> None:
        """Begin an epoch; the data loader calls it."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        streams = [self._stream(source) for source in range(len(self.sizes))]
        for _ in range(self.batches):
            for stream, number in zip(streams, self.per_batch, strict=True):
                for _ in range(number):
                    yield next(stream)

    def _stream(self, source: int) -> Iterator[int]:
        """Yield a data set's indices for this process, from the start of the epoch."""
        size, number = self.sizes[source], self.per_batch[source]
        step = number * self.world_size
        turn, order = -1, []
        for first in count(self.epoch * self.batches * step + self.rank * number, step):
            for index in range(first, first + number):
                if index // size != turn:
                    turn = index // size
                    order = self._order(source, turn)
                yield self.offsets[source] + order[index % size]

    def _order(self, source: int, turn: int) -> list[int]:
        """Return the random order of a data set, a new one for each pass through it."""
        seed = hash((self.seed, source, turn)) % 2**63
        generator = torch.Generator().manual_seed(seed)
        return torch.randperm(self.sizes[source], generator=generator).tolist()
