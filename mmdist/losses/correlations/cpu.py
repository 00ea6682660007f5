"""The fast path of DISTLoss on a CPU: the same two numbers, in few passes.

In autograd the loss makes some thirty passes over tensors of the size of the logits and
keeps a dozen of them. Here the logits are split into tiles that stay in cache. Each is
read once per direction. Besides the gradient, nothing of its size is kept, except the
scores of a single tile.

*Forward.* A tile holds all classes of some rows, so it completes each row's correlation
(inter). A class's correlation (intra) needs sums over all rows. Each tile is centred by
its own means, so nothing cancels in fp32, and the centred sums of the tiles are
combined in float64 (Chan, Golub and LeVeque, 1983)::

    cov = sum over tiles i of  cov_i + n_i * (mean_i - mean) * (mean'_i - mean')

*Backward.* With a and b the centred scores of student and teacher and
``rho = <a, b> / (|a| |b| + eps)``::

    d rho / d a = u * b - v * a
    u = 1 / (|a| |b| + eps)
    v = <a, b> * |b| / |a| * u ** 2

Centring needs no term of its own, since a and b sum to zero. A score is in one row and
in one class, so with p and q the scores before centring, its gradient is::

    (u_row + u_class) * q - (v_row + v_class) * p + (w_row + w_class)
    w = v * mean(p) - u * mean(q)

It then goes through the derivative of the activation.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from . import plain
from .common import (
    Settings,
    as_rows,
    check_teacher,
    compute_dtype,
    is_constant,
    sum_over_processes,
)

# Elements per tile. In smaller tiles, calls cost more than the work; larger ones leave
# the cache. In between, a tile is this share of the logits. The forward pass needs five
# tensors of its size, the backward pass one (two in half precision) and the gradient.
MIN_TILE, MAX_TILE, SHARE = 200_000, 800_000, 1 / 16

# The spread (norm after centring / norm that centring removes) at which fp32 still
# gives five digits, and a sum of squares that is far from overflow
FLAT, LARGE = 1e-2, 1e20


def correlations(
    student: Tensor, teacher: Tensor, mask: Tensor | None, settings: Settings
) -> tuple[Tensor, Tensor]:
    """See :func:`mmdist.losses.correlations.correlations`."""
    inputs = by_image(student, teacher, mask)
    return FewPasses.apply(*inputs, settings, forward_pass)


class FewPasses(torch.autograd.Function):
    """Correlations of logits from ``by_image``, by the two passes of a fast path.

    ``forward(student, teacher, mask, settings)`` returns the correlations, tensors to
    save, and a function of the four, the saved tensors, the gradients of the
    correlations, and the factor that ``logits / tau`` and ``sum_over_processes`` put on
    these. It returns the student's gradient.
    """

    @staticmethod
    def forward(ctx, student, teacher, mask, settings, forward):
        corrs, saved, gradient = forward(student, teacher, mask, settings)
        ctx.save_for_backward(student, teacher, mask, *saved)
        ctx.rest = settings, gradient
        return corrs

    @staticmethod
    def backward(ctx, *grads):
        student, teacher, mask, *saved = ctx.saved_tensors
        settings, gradient = ctx.rest
        inputs = student, teacher, mask, settings
        group = settings.group
        if not torch.is_grad_enabled():
            scale = 1 if group is None else dist.get_world_size(group)
            grad = gradient(*inputs, saved, grads, scale / settings.tau)
        elif group is not None:
            raise NotImplementedError(
                'With `sync=True`, DISTLoss has no second derivative. Omit '
                '`create_graph=True` or `sync`.'
            )
        else:  # under `create_graph=True`
            corrs = plain.correlations(*inputs)
            grads = [grad.to(corr) for corr, grad in zip(corrs, grads, strict=True)]
            (grad,) = torch.autograd.grad(corrs, student, grads, create_graph=True)
        return grad, None, None, None, None


def forward_pass(student, teacher, mask, settings):
    """The correlations tile by tile, for ``FewPasses``."""
    places = tiles(student)
    row_sums = torch.zeros((2, len(places)), dtype=torch.float64)
    class_sums = row_sums.new_zeros((len(places), 5, student.shape[1]))
    kept = []
    # separate, since the scores of a single tile are kept
    memory, spare_memory = Scratch(2), Scratch(3)
    mean = 1 / student.shape[1] if settings.activation == 'softmax' else None
    for i, (image, part) in enumerate(places):
        keep = tile_mask(mask, image, part)
        count = part.stop - part.start if keep is None else int(keep.sum())
        if count == 0:
            kept += [None, None]
            continue
        s, t = (x[image, :, part] for x in (student, teacher))
        for dtype in (compute_dtype(student, teacher), torch.float64):
            p, q = memory.like(s, dtype)
            spare = spare_memory.like(s, dtype)
            scores(s, keep, settings, out=p)
            scores(t, keep, settings, out=q, is_teacher=True)
            rows = centred_sums(p, q, spare, 0, len(p), mean=mean)
            classes = centred_sums(p, q, spare, 1, count, keep)
            if has_digits(rows, len(p), keep) and has_digits(classes, count):
                break
        corr, u, v = correlation(rows, len(p), settings)
        corr = corr if keep is None else corr * keep
        row_sums[0, i], row_sums[1, i] = corr.sum(dtype=torch.float64), count
        class_sums[i] = classes
        kept += [u, v] if len(places) > 1 else [u, v, p, q]
    row_total, class_corr, factors = combine(row_sums, class_sums, settings)
    count = row_total[1].clamp(min=1)
    corrs = row_total[0] / count, class_corr.mean()
    return corrs, (factors, count, *kept), functools.partial(gradient, places)


def gradient(places, student, teacher, mask, settings, saved, grads, scale):
    """The student's gradient tile by tile, for ``FewPasses``."""
    factors, count, *kept = saved
    grad_inter, grad_intra = (x * scale for x in grads)
    row_scale = (grad_inter / count).item()
    factors = factors * (grad_intra / student.shape[1])
    is_softmax = settings.activation == 'softmax'
    grad = torch.empty_like(student)
    memory = Scratch(2)
    for i, (image, part) in enumerate(places):
        u_row, v_row = kept[2 * i : 2 * i + 2]
        out = grad[image, :, part]
        if u_row is None:  # no row of the tile counts
            out.zero_()
            continue
        dtype = u_row.dtype
        u_row, v_row = u_row * row_scale, v_row * row_scale
        u_class, v_class, w_class = factors.to(dtype).unsqueeze(-1)
        keep = tile_mask(mask, image, part)
        s, t = (x[image, :, part] for x in (student, teacher))
        scratch, spare = memory.like(s, dtype)
        g = out if out.dtype == dtype else spare
        p, q = kept[2:] if len(places) == 1 else (None, None)
        # first everything that needs q, then everything that needs p
        q = scores(t, keep, settings, out=scratch) if q is None else q
        torch.mul(q, u_row, out=g).addcmul_(q, u_class)
        # softmax cancels w_row, which all classes of a row share
        w_row = 0 if is_softmax else u_row * q.mean(0)
        p = scores(s, keep, settings, out=scratch) if p is None else p
        g.addcmul_(p, v_row, value=-1).addcmul_(p, v_class, value=-1).add_(w_class)
        if is_softmax:
            g.mul_(p)
            g.addcmul_(p, g.sum(0), value=-1)
        else:
            g.add_(v_row * p.mean(0) - w_row)
        if settings.activation == 'sigmoid':
            torch.ops.aten.sigmoid_backward.grad_input(g, p, grad_input=g)
        if keep is not None:
            g.mul_(keep)
        if g is not out:
            out.copy_(g)
    return grad


def by_image(
    student: Tensor, teacher: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """View logits as (images, classes, positions), the mask as (images, positions).

    Logits (rows, classes) become one image, and so do images that are small beside a
    tile: one for each would be all overhead. The teacher's logits are detached.
    """
    both = student, teacher.detach()
    if student.ndim == 2 or (len(student) > 1 and student[0].numel() < MIN_TILE // 8):
        both = [as_rows(logits).t().unsqueeze(0) for logits in both]
    else:
        both = [logits.flatten(2) for logits in both]
    return *both, mask if mask is None else mask.reshape(len(both[0]), -1)


class Scratch:
    """Tensors of the size of a tile, reused by every tile.

    New ones for every operation would leave the cache, and be returned to the system
    and fetched from it, page by page.
    """

    def __init__(self, number: int) -> None:
        self._memory = torch.empty((number, 0))

    def like(self, tile: Tensor, dtype: torch.dtype) -> Sequence[Tensor]:
        """Tensors with the shape and the memory layout of a tile."""
        number, size = len(self._memory), tile.numel()
        if self._memory.dtype != dtype or self._memory.shape[1] < size:
            self._memory = torch.empty((number, size), dtype=dtype)
        memory = self._memory[:, :size]
        if tile.stride(0) == 1:
            return memory.view(number, *tile.shape[::-1]).transpose(1, 2).unbind()
        return memory.view(number, *tile.shape).unbind()


def tiles(logits: Tensor) -> list[tuple[int, slice]]:
    """Image and positions of each tile of (images, classes, positions)."""
    images, classes, positions = logits.shape
    size = min(max(SHARE * logits.numel(), MIN_TILE), MAX_TILE)
    step = math.ceil(positions / math.ceil(positions * classes / size))
    if step > 16:  # whole cache lines, an odd number of them so that classes share none
        step = math.ceil(step / 16) // 2 * 32 + 16
    parts = [slice(i, min(i + step, positions)) for i in range(0, positions, step)]
    return [(image, part) for image in range(images) for part in parts]


def tile_mask(mask: Tensor | None, image: int, part: slice) -> Tensor | None:
    """Which rows of a tile count; None if all do."""
    keep = None if mask is None else mask[image, part]
    return None if keep is None or keep.all() else keep


def scores(
    logits: Tensor,
    keep: Tensor | None,
    settings: Settings,
    out: Tensor,
    is_teacher: bool = False,
) -> Tensor:
    """Write the scores of a tile's logits, (classes, rows), to ``out``; returns it."""
    out.copy_(logits)
    if keep is not None:  # before any arithmetic: 0 * nan is nan
        out.masked_fill_(keep.logical_not(), 0)
    if is_teacher and not math.isfinite(out.sum()):
        check_teacher(out)
    if settings.tau != 1:
        out.div_(settings.tau)
    if settings.activation == 'sigmoid':
        out.sigmoid_()
    elif settings.activation == 'softmax':
        # torch is fast along the last dimension only
        x, dim = (out.t(), 1) if out.stride(0) == 1 else (out, 0)
        torch.softmax(x, dim, out=x)
    return out


def centred_sums(
    p: Tensor,
    q: Tensor,
    spare: Sequence[Tensor],
    dim: int,
    count: int,
    keep: Tensor | None = None,
    mean: float | None = None,
) -> Tensor:
    """Centred sums aa, ab, bb and means of the scores p, q (classes, rows) of a tile.

    There is one of each per row (``dim`` 0) or class (1), over ``count`` scores in the
    rows to ``keep``; shape (5, rows) or (5, classes). ``mean`` is given if it is the
    same for all. The three tensors in ``spare``, shaped like ``p``, are overwritten.
    """
    a, b, ab = spare
    sums = p.new_empty((5, p.shape[1 - dim]))
    for x, centred, means in ((p, a, sums[3]), (q, b, sums[4])):
        if mean is None:
            counted = x if keep is None else torch.mul(x, keep, out=centred)
            torch.sum(counted, dim, out=means).div_(count)
        else:
            means.fill_(mean)
        torch.sub(x, means.unsqueeze(dim) if mean is None else mean, out=centred)
        if keep is not None:
            centred.mul_(keep)
    torch.sum(torch.mul(a, b, out=ab), dim, out=sums[1])
    torch.sum(a.mul_(a), dim, out=sums[0])
    torch.sum(b.mul_(b), dim, out=sums[2])
    return sums


def has_digits(sums: Tensor, count: int, keep: Tensor | None = None) -> bool:
    """Whether fp32 is accurate enough for the correlations of a tile; if not, it is
    computed in float64.

    A score has a relative rounding error of 6e-8; relative to what centring leaves, it
    is 6e-8 / spread. Its root mean square over all rows (or classes) can be too large,
    and squares of huge scores overflow. Arguments: :func:`centred_sums`.
    """
    var = sums[0:3:2]
    inverse = sums[3:].square().mul_(count).div_(var)
    inverse.nan_to_num_(nan=0, posinf=math.inf)  # all scores 0: nothing was rounded
    inverse.masked_fill_((var <= LARGE).logical_not_(), math.inf)  # NaN as well
    if keep is not None:
        inverse = inverse[:, keep]
    return inverse.mean(1).amax().item() <= FLAT**-2


def correlation(
    sums: Tensor, count: int | Tensor, settings: Settings
) -> tuple[Tensor, Tensor, Tensor]:
    """Correlations and the factors u, v of their gradient, each (vectors,), from
    :func:`centred_sums` over ``count`` scores per vector, (5, vectors)."""
    var, mean = sums[0:3:2], sums[3:]
    constant = is_constant(var, mean, count, settings.activation).any(0)
    norm_a, norm_b = var.sqrt()
    u = (norm_a * norm_b).add_(settings.eps).reciprocal_().masked_fill_(constant, 0)
    corr = sums[1] * u
    if not settings.eps:
        # two scores correlate at 1 or -1: the gradient would be only rounding error
        u.mul_(count > 2)
    v = (corr * u).mul_(norm_b).div_(norm_a.masked_fill_(constant, 1))
    return corr, u, v


def combine(
    row_sums: Tensor, class_sums: Tensor, settings: Settings
) -> tuple[Tensor, Tensor, Tensor]:
    """Combine tiles and processes, all in float64.

    Processes exchange the same sums in the same order as on the plain path, which
    another process may take.

    Args:
        row_sums: Each tile's sum of row correlations and number of rows, (2, tiles).
        class_sums: The sums that :func:`correlation` takes, (tiles, 5, classes).
        settings: How they are correlated.

    Returns:
        ``row_sums`` over all tiles and processes, (2,), the correlations of the
        classes, and the factors u, v, w of their gradient, (3, classes).
    """
    group = settings.group
    row_total = sum_over_processes(row_sums.sum(1), group)
    if len(class_sums) == 1 and group is None:
        total = class_sums[0]
    else:
        counts = row_sums[1].view(-1, 1, 1)
        means = class_sums[:, 3:]
        total = torch.cat([counts.expand_as(means[:, :1]), counts * means], 1).sum(0)
        total = sum_over_processes(total, group)
        mean = total[1:] / total[0].clamp(min=1)
        a, b = (means - mean).unbind(1)
        between = torch.stack([a * a, a * b, b * b], 1) * counts
        total = sum_over_processes((class_sums[:, :3] + between).sum(0), group)
        total = torch.cat([total, mean])
    corr, u, v = correlation(total, row_total[1].clamp(min=1), settings)
    return row_total, corr, torch.stack([u, v, v * total[3] - u * total[4]])
