"""What a segmentation head predicts, read at any size or at a few pixels of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .probabilities import mean_probability


@dataclass
class SegMap:
    """Per-pixel class logits, or masks and the classes that they stand for.

    Resizing is bilinear and done on logits: of the classes, or of the masks before
    they are combined to class scores, as at inference (Cheng et al., MaskFormer,
    NeurIPS 2021, section 3.4).

    Attributes:
        maps: Logits of K classes or of K masks, (N, K, h, w).
        queries: Class probabilities of the K masks without "no object", (N, K, C);
            None where ``maps`` are the class logits.
        as_scores: Read probabilities (per-pixel classes) and class scores (masks), not
            logits. Of masks the logits are the logarithm of the scores: their softmax
            is the scores normalised to 1.
        align_corners: As in ``F.interpolate``.
    """

    maps: Tensor
    queries: Tensor | None = None
    as_scores: bool = False
    align_corners: bool = False

    @property
    def size(self) -> tuple[int, int]:
        """Height and width that the head computes."""
        return tuple(self.maps.shape[-2:])

    def read(self, size: tuple[int, int]) -> Tensor:
        """The whole map.

        Args:
            size: Height and width to resize it to.

        Returns:
            (N, C, height, width).
        """
        maps = self.maps
        if self.size != size:
            maps = F.interpolate(
                maps, size, mode='bilinear', align_corners=self.align_corners
            )
        return self._classes(maps, self.queries)

    def read_at(self, pixels: Sequence[Tensor], size: tuple[int, int]) -> Tensor:
        """The same values at some pixels, without computing the others.

        Args:
            pixels: For each image the flat indices of its pixels in a map of ``size``.
            size: Height and width of the map that the indices count in.

        Returns:
            (pixels of all images, C), image after image.
        """
        rows = []
        for n, index in enumerate(pixels):
            maps = self.maps[n : n + 1]
            if self.size == size:
                maps = maps.flatten(2)[..., index]
            else:
                maps = self._sample(maps, index, size)
            queries = None if self.queries is None else self.queries[n : n + 1]
            rows.append(self._classes(maps, queries)[0].T)
        return torch.cat(rows)

    def _sample(self, maps: Tensor, index: Tensor, size: tuple[int, int]) -> Tensor:
        """(1, K, h, w) -> (1, K, pixels), what ``F.interpolate`` gives there."""
        maps = maps.to(torch.promote_types(maps.dtype, torch.float32))
        height, width = size
        grid = []
        for position, length in ((index % width, width), (index // width, height)):
            position = position.to(maps.dtype)
            if self.align_corners:
                grid.append(2 * position / max(length - 1, 1) - 1)
            else:
                grid.append((2 * position + 1) / length - 1)
        return F.grid_sample(
            maps,
            torch.stack(grid, dim=-1)[None, None],
            mode='bilinear',
            padding_mode='border',
            align_corners=self.align_corners,
        ).squeeze(2)

    def _classes(self, maps: Tensor, queries: Tensor | None) -> Tensor:
        """(N, K, *spatial) -> (N, C, *spatial)."""
        if queries is None and not self.as_scores:
            return maps
        maps = maps.to(torch.promote_types(maps.dtype, torch.float32))
        with torch.autocast(maps.device.type, enabled=False):
            if queries is None:
                return maps.sigmoid() if maps.shape[1] == 1 else maps.softmax(1)
            scores = torch.einsum(
                'nqc,nq...->nc...', queries.to(maps.dtype), maps.sigmoid()
            )
            return scores if self.as_scores else scores.clamp_min(1e-7).log()


@dataclass
class TwoViews:
    """The mean of a map and of that of the mirrored image, read like a :class:`SegMap`.

    The mean is that of probabilities. Read as logits, its softmax (its sigmoid, with
    one channel) is this mean.

    Attributes:
        plain: The map of the image.
        mirrored: The map of the image mirrored, left to right.
    """

    plain: SegMap
    mirrored: SegMap

    @property
    def size(self) -> tuple[int, int]:
        """Height and width that the head computes."""
        return self.plain.size

    @property
    def as_scores(self) -> bool:
        """Whether probabilities are read, not logits."""
        return self.plain.as_scores

    def read(self, size: tuple[int, int]) -> Tensor:
        """The whole map, (N, C, height, width); see :meth:`SegMap.read`."""
        return self._mean(self.plain.read(size), self.mirrored.read(size).flip(-1))

    def read_at(self, pixels: Sequence[Tensor], size: tuple[int, int]) -> Tensor:
        """The values at some pixels, (pixels, C); see :meth:`SegMap.read_at`."""
        width = size[1]
        mirrored = [i - i % width + (width - 1 - i % width) for i in pixels]
        return self._mean(
            self.plain.read_at(pixels, size), self.mirrored.read_at(mirrored, size)
        )

    def _mean(self, plain: Tensor, mirrored: Tensor) -> Tensor:
        activation = 'sigmoid' if plain.shape[1] == 1 else 'softmax'
        if self.as_scores:
            activation = 'identity'
        return mean_probability(plain, mirrored, activation)


def draw_pixels(
    max_rows: int,
    mask: Tensor,
    generator: torch.Generator,
    labels: Tensor | None = None,
) -> tuple[list[Tensor], Tensor]:
    """Draw pixels of a batch without replacement.

    It costs one number per pixel, for any number of classes. An exponential
    variable over a weight is the key of each pixel, and the smallest keys win, which
    draws without replacement by these weights (Efraimidis and Spirakis, 2006).

    Args:
        max_rows: How many to draw; fewer come back only if there are fewer.
        mask: (N, height, width), True where a pixel may be drawn.
        generator: On the device of ``mask``.
        labels: Class of each pixel, of the same shape, to draw every class equally
            often as far as it goes; None draws uniformly.

    Returns:
        The flat indices of the pixels of each image, and whether each of them, image
        after image, may count: where too few pixels may be drawn, others fill up.
    """
    keys = torch.empty(mask.numel(), device=mask.device)
    keys.exponential_(generator=generator)
    may = mask.flatten()
    if labels is not None:
        labels = labels.flatten()
        counts = torch.zeros(
            int(labels.max()) + 1, dtype=torch.long, device=labels.device
        ).scatter_add_(0, labels, may.long())
        keys *= counts[labels]
    keys.masked_fill_(~may, math.inf)
    index = keys.topk(min(max_rows, len(keys)), largest=False, sorted=False).indices
    index = index.sort().values
    pixels = mask[0].numel()
    of_image = torch.bincount(index // pixels, minlength=len(mask)).tolist()
    return list((index % pixels).split(of_image)), may[index]
