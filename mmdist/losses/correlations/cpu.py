"""The fast path of DISTLoss on a CPU: the same two numbers, in few passes.

Written out in autograd, the loss makes some thirty passes over tensors of the size
of the logits and keeps a dozen of them for the backward pass. Here the logits are
cut into tiles that stay in cache. Each is read twice, once per direction, and
nothing of its size is kept but the gradient.

*Forward.* A tile holds all classes of some rows, so the correlation of a row (inter)
is finished within it. The correlation of a class (intra) needs sums over all rows.
Each tile is centred by its own means, so nothing cancels in fp32 as it does in
``sum(x ** 2) - n * mean ** 2``, and the centred sums of the tiles are combined in
float64 (Chan, Golub and LeVeque, 1983)::

    cov = sum over tiles i of  cov_i + n_i * (mean_i - mean) * (mean'_i - mean')

*Backward.* With a and b the centred scores of student and teacher and
``rho = <a, b> / (|a| |b| + eps)``::

    d rho / d a = u * b - v * a
    u = 1 / (|a| |b| + eps)
    v = <a, b> * |b| / |a| * u ** 2

Centring needs no term of its own, since a and b sum to zero. A score lies in one row
and in one class, so with p and q the scores before centring its gradient is::

    (u_row + u_class) * q - (v_row + v_class) * p + (w_row + w_class)
    w = v * mean(p) - u * mean(q)

which then goes through the derivative of the activation.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from .common import (
    Settings,
    as_rows,
    check_teacher,
    compute_dtype,
    is_constant,
    sum_over_processes,
)

# Elements of a tile. Too small and the calls cost more than the work, too large and
# it leaves the cache. Between the two, a tile is this share of the logits: the forward
# pass needs five tensors of it, the backward pass one (two in half precision) and the
# gradient.
MIN_TILE, MAX_TILE = 200_000, 800_000
SHARE = 1 / 16

# A spread (norm after centring / norm that centring takes) of which fp32 still gives
# five digits
FLAT = 1e-2


def correlations(
    student: Tensor,
    teacher: Tensor,
    mask: Tensor | None,
    settings: Settings,
    *,
    tile_size: int | None = None,
) -> tuple[Tensor, Tensor]:
    """See :func:`mmdist.losses.correlations.correlations`.

    Args:
        student: As there, and so are the others.
        teacher: See there.
        mask: See there.
        settings: See there.
        tile_size: Elements of a tile. ``None`` chooses by the size of the logits.
    """
    small = (tile_size or MIN_TILE) // 8
    student, teacher = by_image(student, small), by_image(teacher.detach(), small)
    if mask is not None:
        mask = mask.reshape(student.shape[0], -1)
    if tile_size is None:
        tile_size = min(max(SHARE * student.numel(), MIN_TILE), MAX_TILE)
    return _Correlations.apply(student, teacher, mask, settings, tile_size)


class _Correlations(torch.autograd.Function):
    @staticmethod
    def forward(ctx, student, teacher, mask, settings, tile_size):
        activation, tau, _, group = settings
        dtype = compute_dtype(student, teacher)
        places = tiles(student, tile_size)
        # apart, since the scores of a single tile are kept for the backward pass
        memory, spare_memory = Scratch(2), Scratch(3)

        def sums_of_tile(image: int, part: slice) -> _Tile:
            keep = tile_mask(mask, image, part)
            count = part.stop - part.start if keep is None else int(keep.sum())
            if count == 0:
                return _Tile(0)
            s, t = (x[image, :, part] for x in (student, teacher))
            for tile_dtype in (dtype, torch.float64):
                p, q = memory.like(s, tile_dtype)
                spare = spare_memory.like(s, tile_dtype)
                scores(s, keep, activation, tau, out=p)
                scores(t, keep, activation, tau, out=q, check=check_teacher)
                row_sums = sums_of_rows(p, q, activation, spare)
                class_sums = sums_of_classes(p, q, keep, count, spare)
                if not (is_flat(row_sums, len(p), keep) or is_flat(class_sums, count)):
                    break
            corr, u, v = correlation(row_sums, len(p), settings)
            corr = (corr if keep is None else corr * keep).sum(dtype=torch.float64)
            kept = (p, q) if len(places) == 1 else ()
            return _Tile(count, corr, class_sums.double(), (u, v, *kept))

        done = [sums_of_tile(*place) for place in places]
        some = [x for x in done if x.count > 0]
        # the same exchanges in the same order as the plain path, which another
        # process may take
        counts = torch.tensor([x.count for x in some], dtype=torch.float64)
        row_total = torch.stack([x.corr for x in some] or [counts.sum()]).sum()
        total = torch.stack([row_total, counts.sum()])
        row_total, count = sum_over_processes(total, group)
        count = count.clamp(min=1)
        class_sums = combine(counts, [x.class_sums for x in some], student, group)
        class_corr, u, v = correlation(class_sums, count, settings)
        class_factors = torch.stack([u, v, v * class_sums[3] - u * class_sums[4]])
        ctx.save_for_backward(student, teacher, mask)
        ctx.tiles = places, [x.saved for x in done]
        ctx.settings = class_factors, count, settings
        ctx.set_materialize_grads(False)
        return row_total / count, class_corr.mean()

    @staticmethod
    def backward(ctx, grad_inter, grad_intra):
        refuse_second_derivative()
        student, teacher, mask = ctx.saved_tensors
        class_factors, count, settings = ctx.settings
        activation, tau, _, group = settings
        # by the derivative of `logits / tau`, and as `sum_over_processes` does
        scale = (1 if group is None else dist.get_world_size(group)) / tau
        row_scale = 0.0 if grad_inter is None else float(grad_inter * scale / count)
        class_scale = 0.0 if grad_intra is None else float(grad_intra * scale)
        class_factors = class_factors * (class_scale / student.shape[1])
        grad = torch.empty_like(student)
        memory = Scratch(2)

        for (image, part), saved in zip(*ctx.tiles, strict=True):
            if not saved:  # no row of the tile counts
                grad[image, :, part] = 0
                continue
            u_row, v_row, *kept = saved
            dtype = u_row.dtype
            u_row, v_row = u_row * row_scale, v_row * row_scale
            u_class, v_class, w_class = class_factors.to(dtype).unsqueeze(-1)
            keep = tile_mask(mask, image, part)
            s, t = (x[image, :, part] for x in (student, teacher))
            scratch, spare = memory.like(s, dtype)
            out = grad[image, :, part]
            g = out if out.dtype == dtype else spare
            # first all that needs q, then what needs p
            q = kept[1] if kept else scores(t, keep, activation, tau, out=scratch)
            torch.mul(q, u_row, out=g).addcmul_(q, u_class)
            mean_q = row_mean(q, activation)
            p = kept[0] if kept else scores(s, keep, activation, tau, out=scratch)
            g.addcmul_(p, v_row, value=-1).addcmul_(p, v_class, value=-1)
            g.add_(w_class)
            if activation == 'softmax':  # sends what all of a row share, w_row, to 0
                g.mul_(p)
                g.addcmul_(p, g.sum(0), value=-1)
            else:
                g.add_(v_row * row_mean(p, activation) - u_row * mean_q)
            if activation == 'sigmoid':
                torch.ops.aten.sigmoid_backward.grad_input(g, p, grad_input=g)
            if keep is not None:
                g.mul_(keep)
            if g is not out:
                out.copy_(g)
        return grad, None, None, None, None


def refuse_second_derivative() -> None:
    """Stop a backward pass that is to be differentiated itself."""
    if torch.is_grad_enabled():  # under `create_graph=True`
        raise NotImplementedError(
            'DISTLoss can be differentiated once only. Leave out `create_graph=True`, '
            'or take this loss out of what is differentiated twice.'
        )


class _Tile(NamedTuple):
    count: int  # rows that count
    corr: Tensor | None = None  # sum of their correlations
    class_sums: Tensor | None = None
    saved: tuple[Tensor, ...] = ()  # for the backward pass: u, v of the rows (p, q)


def by_image(logits: Tensor, small: int) -> Tensor:
    """View logits as (images, classes, positions), (rows, classes) as one image.

    Images of fewer than ``small`` elements too: a tile for each would be all overhead.
    """
    if logits.ndim == 2:
        return logits.t().unsqueeze(0)
    images, classes = logits.shape[:2]
    if images > 1 and logits[0].numel() < small:
        return as_rows(logits).t().unsqueeze(0)
    return logits.reshape(images, classes, -1)


class Scratch:
    """Tensors of the size of a tile that every next tile overwrites.

    New ones for every operation would leave the cache, and go back to the system and
    come from it, page by page.
    """

    def __init__(self, number: int) -> None:
        self._number = number
        self._memory = torch.empty((number, 0))

    def like(self, tile: Tensor, dtype: torch.dtype) -> Sequence[Tensor]:
        """Tensors of the shape of a tile, laid out alike."""
        if self._memory.dtype != dtype or self._memory.shape[1] < tile.numel():
            self._memory = torch.empty((self._number, tile.numel()), dtype=dtype)
        memory = self._memory[:, : tile.numel()]
        if tile.stride(0) == 1:
            return memory.view(-1, *tile.shape[::-1]).transpose(1, 2).unbind()
        return memory.view(-1, *tile.shape).unbind()


def tiles(logits: Tensor, size: float) -> list[tuple[int, slice]]:
    """Image and positions of each tile of (images, classes, positions)."""
    images, classes, positions = logits.shape
    step = math.ceil(positions / math.ceil(positions * classes / size))
    if step > 16:  # whole cache lines, and an odd number so that classes share none
        step = math.ceil(step / 16) // 2 * 32 + 16
    parts = [slice(i, min(i + step, positions)) for i in range(0, positions, step)]
    return [(image, part) for image in range(images) for part in parts]


def tile_mask(mask: Tensor | None, image: int, part: slice) -> Tensor | None:
    """Which rows of a tile count, None where all do."""
    if mask is None or mask[image, part].all():
        return None
    return mask[image, part]


def scores(
    logits: Tensor,
    keep: Tensor | None,
    activation: str,
    tau: float,
    out: Tensor,
    check: Callable[[Tensor], None] | None = None,
) -> Tensor:
    """Put the scores of the logits (classes, rows) of a tile in ``out``; returns it."""
    out.copy_(logits)
    if keep is not None:  # before any arithmetic: 0 * nan is nan
        out.masked_fill_(keep.logical_not(), 0)
    if check is not None and not math.isfinite(out.sum()):
        check(out)
    if tau != 1:
        out.div_(tau)
    if activation == 'sigmoid':
        out.sigmoid_()
    elif activation == 'softmax':
        if out.stride(0) == 1:  # torch is fast along the last dimension only
            torch.softmax(out.t(), 1, out=out.t())
        else:
            torch.softmax(out, 0, out=out)
    return out


def row_mean(p: Tensor, activation: str) -> Tensor | float:
    """Mean score of each row of a tile."""
    return 1 / len(p) if activation == 'softmax' else p.mean(0)


def sums_of_rows(
    p: Tensor, q: Tensor, activation: str, spare: Sequence[Tensor]
) -> Tensor:
    """Centred sums aa, ab, bb and means of p, q of each row, shape (5, rows)."""
    a, b, ab = spare
    means = [row_mean(x, activation) for x in (p, q)]
    sums = p.new_empty((5, p.shape[1]))
    sums[3], sums[4] = means
    torch.sub(p, means[0], out=a)
    torch.sub(q, means[1], out=b)
    products(a, b, ab, 0, sums)
    return sums


def sums_of_classes(
    p: Tensor, q: Tensor, keep: Tensor | None, count: int, spare: Sequence[Tensor]
) -> Tensor:
    """The same of each class, shape (5, classes)."""
    a, b, ab = spare
    sums = p.new_empty((5, len(p)))
    for x, centred, mean in ((p, a, sums[3]), (q, b, sums[4])):
        counted = x if keep is None else torch.mul(x, keep, out=centred)
        torch.sum(counted, 1, out=mean).div_(count)
        torch.sub(x, mean.unsqueeze(1), out=centred)
        if keep is not None:
            centred.mul_(keep)
    products(a, b, ab, 1, sums)
    return sums


def products(a: Tensor, b: Tensor, ab: Tensor, dim: int, out: Tensor) -> None:
    """Put the sums of a * a, a * b and b * b in out[:3]. Overwrites all three."""
    torch.sum(torch.mul(a, b, out=ab), dim, out=out[1])
    torch.sum(a.mul_(a), dim, out=out[0])
    torch.sum(b.mul_(b), dim, out=out[2])


def is_flat(sums: Tensor, count: int, keep: Tensor | None = None) -> bool:
    """Whether fp32 leaves the correlations of a tile too few digits.

    A score has a rounding error of 6e-8 of itself, which is 6e-8 / spread of what
    centring leaves of it. Where that is too much in the root mean square over all rows
    (or classes), the tile is computed in float64.

    Args:
        sums: Centred sums aa, ab, bb and means of p, q, shape (5, n).
        count: Number of scores of a row (or class).
        keep: Which of the rows count.
    """
    inverse = sums[3:].square().mul_(count).div_(sums[0:3:2])
    # all scores 0: nothing was rounded. And a NaN of the student is no matter of digits
    inverse.nan_to_num_(nan=0, posinf=math.inf)
    if keep is not None:
        inverse = inverse[:, keep]
    return inverse.mean(1).amax().item() > FLAT**-2


def correlation(
    sums: Tensor, count: int | Tensor, settings: Settings
) -> tuple[Tensor, Tensor, Tensor]:
    """Correlations and the factors u, v of their gradient.

    Args:
        sums: Centred sums aa, ab, bb and means of p, q, shape (5, n).
        count: Number of entries that were summed.
        settings: How they are correlated.
    """
    var, mean = sums[0:3:2], sums[3:]
    constant = is_constant(var, mean, count, settings.activation).any(0)
    norm_a, norm_b = var.sqrt()
    u = (norm_a * norm_b).add_(settings.eps).reciprocal_().masked_fill_(constant, 0)
    corr = sums[1] * u
    v = (corr * u).mul_(norm_b).div_(norm_a.masked_fill_(constant, 1))
    return corr, u, v


def combine(
    counts: Tensor,
    sums: list[Tensor],
    student: Tensor,
    group: dist.ProcessGroup | None,
) -> Tensor:
    """Sums of the classes over all tiles (and processes).

    Args:
        counts: Rows of each tile that count, float64, shape (tiles,).
        sums: Theirs, float64, shape (5, classes).
        student: The logits, for the number of classes.
        group: As in ``Settings``.

    Returns:
        Shape (5, classes).
    """
    if len(sums) == 1 and group is None:
        return sums[0]
    counts = counts.view(-1, 1, 1)
    if sums:
        sums = torch.stack(sums)
    else:
        sums = counts.new_zeros((0, 5, student.shape[1]))
    means = sums[:, 3:]
    total = torch.cat([counts.expand_as(means[:, :1]), counts * means], 1).sum(0)
    total = sum_over_processes(total, group)
    mean = total[1:] / total[0].clamp(min=1)
    a, b = (means - mean).unbind(1)
    between = torch.stack([a * a, a * b, b * b], 1) * counts
    total = sum_over_processes((sums[:, :3] + between).sum(0), group)
    return torch.cat([total, mean])
