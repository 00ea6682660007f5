"""Batches of images of several data sets in fixed shares."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from mmengine.dataset import ConcatDataset
from mmengine.dist import get_dist_info, sync_random_seed
from torch.utils.data import Sampler

from mmdist.lookup import in_words
from mmdist.registry import DATA_SAMPLERS


@DATA_SAMPLERS.register_module()
@in_words
class MixedSampler(Sampler):
    """Takes fixed numbers of images of each data set into every batch.

    An epoch shows the first data set once; of the others the next images follow, and
    each of theirs is shown once before any is repeated. Which images a batch holds
    depends on seed and epoch alone, so it works with loops by epochs and by iterations,
    with DDP, and when training is resumed. (mmdet's ``MultiSourceSampler`` has no end,
    so a loop by epochs never comes to one.)

    The data loader has ``batch_size=sum(per_batch)`` and ``batch_sampler=None``.

    Args:
        dataset: A ``ConcatDataset``.
        per_batch: Images of each data set in the batch of one process.
        seed: Seed of the order; the same for all processes if omitted.

    Raises:
        ValueError: The data set is not a ``ConcatDataset`` of as many.
    """

    def __init__(
        self, dataset: ConcatDataset, per_batch: Sequence[int], seed: int | None = None
    ) -> None:
        sizes = [len(d) for d in getattr(dataset, 'datasets', ())]
        if len(sizes) != len(per_batch) or min(per_batch) < 0 or not per_batch[0]:
            raise ValueError(
                '`mmdist.MixedSampler` takes a `ConcatDataset` and `per_batch`, how '
                'many images of each of its data sets are in a batch, at least one of '
                f'the first. It got {len(sizes)} data sets and {list(per_batch)}.'
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
        """Indices of a data set for this process, from the epoch's first on."""
        size, number = self.sizes[source], self.per_batch[source]
        place = self.epoch * self.batches * number * self.world_size
        turn, order = -1, []
        while True:
            first = place + self.rank * number
            for index in range(first, first + number):
                if index // size != turn:
                    turn = index // size
                    order = self._order(source, turn)
                yield self.offsets[source] + order[index % size]
            place += self.world_size * number

    def _order(self, source: int, turn: int) -> list[int]:
        """A data set in random order, another one each time that it is shown."""
        seed = hash((self.seed, source, turn)) % 2**63
        generator = torch.Generator().manual_seed(seed)
        return torch.randperm(self.sizes[source], generator=generator).tolist()
