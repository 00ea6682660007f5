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

import torch
import torch.distributed as dist
from torch import Tensor

from .relation import check_teacher, compute_dtype, is_constant, sum_over_processes

# Elements of a tile. Too small and the calls cost more than the work, too large and
# it leaves the cache; 1/32 of the logits keeps its five copies a small part of the
# memory.
MIN_TILE, MAX_TILE = 2**17, 2**19

# A spread (norm after centring / norm) at which fp32 still gives five digits of it.
FLAT = 1e-2


def supports(student: Tensor, teacher: Tensor) -> bool:
    """Whether the fast path takes these logits; the plain path takes the others."""
    return (
        student.device.type == teacher.device.type == 'cpu'
        and student.numel() > 0
        and not torch.compiler.is_compiling()
    )


def correlations(
    student: Tensor,
    teacher: Tensor,
    mask: Tensor | None,
    activation: str,
    tau: float,
    eps: float,
    group: dist.ProcessGroup | None,
) -> tuple[Tensor, Tensor]:
    """Mean inter- and intra-class correlation of student and teacher.

    Args:
        student (Tensor): Logits of shape (rows, classes) or
            (N, classes, *spatial).
        teacher (Tensor): Logits of the same shape; they get no gradient.
        mask (Tensor, optional): Bool, True where a row counts, shape (rows,)
            or (N, *spatial).
        activation (str): ``'softmax'``, ``'sigmoid'`` or ``'identity'``.
        tau (float): Temperature that divides the logits.
        eps (float): Added to the product of the norms.
        group (ProcessGroup, optional): Correlate over the rows of all its
            processes. ``None`` means this process only.

    Returns:
        tuple[Tensor, Tensor]: The two correlations, 0-dim, float64 (so that
            1 - correlation keeps its digits). They can be differentiated once.

    Raises:
        ValueError: The teacher's logits hold NaN or inf in rows that count.
    """
    student, teacher = by_image(student), by_image(teacher.detach())
    if mask is not None:
        mask = mask.reshape(student.shape[0], -1)
    return _Correlations.apply(student, teacher, mask, activation, tau, eps, group)


class _Correlations(torch.autograd.Function):
    @staticmethod
    def forward(ctx, student, teacher, mask, activation, tau, eps, group):
        dtype = compute_dtype(student, teacher)
        parts = tiles(student)
        rows, classes, counts = [], [], []
        row_total = torch.zeros((), dtype=torch.float64)
        for image, part in parts:
            keep = tile_mask(mask, image, part)
            count = part.stop - part.start if keep is None else int(keep.sum())
            if count == 0:
                rows.append(None)
                continue
            s, t = (tile(x, image, part, keep) for x in (student, teacher))
            if not math.isfinite(t.sum(dtype=dtype)):
                check_teacher(t)
            for tile_dtype in (dtype, torch.float64):
                p, q = (scores(x, activation, tau, tile_dtype) for x in (s, t))
                row_sums = sums_of_rows(p, q, activation)
                class_sums = sums_of_classes(p, q, keep, count)
                if not (is_flat(row_sums, len(p)) or is_flat(class_sums, count)):
                    break
            corr, u, v, _ = correlation(row_sums, len(p), eps)
            row_total += (corr if keep is None else corr * keep).sum()
            # the scores of a single tile are small enough to be kept
            rows.append((u, v, p, q) if len(parts) == 1 else (u, v))
            classes.append(class_sums.double())
            counts.append(count)

        # the same exchanges in the same order as the plain path, which another
        # process may take
        row_total, count = sum_over_processes(
            torch.stack([row_total, row_total.new_tensor(sum(counts))]), group
        )
        count = count.clamp(min=1)
        class_sums = combine(counts, classes, student.shape[1], group)
        class_corr, *class_factors = correlation(class_sums, count, eps)
        ctx.save_for_backward(student, teacher, mask)
        ctx.saved = rows, torch.stack(class_factors), count, activation, tau, group
        ctx.set_materialize_grads(False)
        return row_total / count, class_corr.mean()

    @staticmethod
    def backward(ctx, grad_inter, grad_intra):
        if torch.is_grad_enabled():  # under `create_graph=True`
            raise NotImplementedError(
                'On a CPU DISTLoss can be differentiated once only. Leave out '
                '`create_graph=True`, or take this loss out of what is differentiated '
                'twice.'
            )
        student, teacher, mask = ctx.saved_tensors
        rows, class_factors, count, activation, tau, group = ctx.saved
        # by the derivative of `logits / tau`, and as `sum_over_processes` does
        scale = (1 if group is None else dist.get_world_size(group)) / tau
        row_scale = 0.0 if grad_inter is None else float(grad_inter * scale / count)
        class_scale = 0.0 if grad_intra is None else float(grad_intra * scale)
        class_factors = class_factors * (class_scale / student.shape[1])
        grad = torch.empty_like(student)
        for (image, part), row in zip(tiles(student), rows, strict=True):
            if row is None:  # no row of the tile counts
                grad[image, :, part] = 0
                continue
            keep = tile_mask(mask, image, part)
            u_row, v_row, *kept = row
            p, q = kept or (
                scores(tile(x, image, part, keep), activation, tau, u_row.dtype)
                for x in (student, teacher)
            )
            u_row, v_row = u_row * row_scale, v_row * row_scale
            w_row = v_row * row_mean(p, activation) - u_row * row_mean(q, activation)
            u_class, v_class, w_class = class_factors.to(p.dtype).unsqueeze(-1)
            g = (u_class + u_row).mul_(q)
            g.sub_((v_class + v_row).mul_(p))
            g.add_(w_class + w_row)
            if activation == 'softmax':
                g.mul_(p)
                g.addcmul_(p, g.sum(0), value=-1)
            elif activation == 'sigmoid':
                g = torch.ops.aten.sigmoid_backward(g, p)
            grad[image, :, part] = g if keep is None else g.mul_(keep)
        return grad, None, None, None, None, None, None


def by_image(logits: Tensor) -> Tensor:
    """View logits as (images, classes, positions), (rows, classes) as one image."""
    if logits.ndim == 2:
        return logits.t().unsqueeze(0)
    images, classes = logits.shape[:2]
    if images > 1 and logits[0].numel() < MIN_TILE:
        # many small images: a tile for each would be all overhead
        return logits.movedim(1, -1).reshape(-1, classes).t().unsqueeze(0)
    return logits.reshape(images, classes, -1)


def tiles(logits: Tensor) -> list[tuple[int, slice]]:
    """Image and positions of each tile of (images, classes, positions)."""
    images, classes, positions = logits.shape
    size = min(max(logits.numel() // 32, MIN_TILE), MAX_TILE)
    step = math.ceil(positions / math.ceil(positions * classes / size))
    return [
        (image, slice(start, min(start + step, positions)))
        for image in range(images)
        for start in range(0, positions, step)
    ]


def tile_mask(mask: Tensor | None, image: int, part: slice) -> Tensor | None:
    """Which rows of a tile count, None where all do."""
    if mask is None or mask[image, part].all():
        return None
    return mask[image, part]


def tile(logits: Tensor, image: int, part: slice, keep: Tensor | None) -> Tensor:
    """Logits (classes, rows) of a tile, 0 in the rows that do not count."""
    logits = logits[image, :, part]
    if keep is None:
        return logits
    # before any arithmetic: 0 * nan is nan
    return logits.masked_fill(keep.logical_not(), 0)


def scores(logits: Tensor, activation: str, tau: float, dtype: torch.dtype) -> Tensor:
    """Scores of a tile (classes, rows), always in a new tensor."""
    if tau != 1:
        logits = logits.to(dtype) / tau
    if activation == 'softmax':
        if logits.stride(0) == 1:  # torch is fast along the last dimension only
            return logits.t().softmax(1, dtype=dtype).t()
        return logits.softmax(0, dtype=dtype)
    if activation == 'sigmoid':
        return logits.to(dtype).sigmoid()
    return logits.to(dtype, copy=True)


def row_mean(p: Tensor, activation: str) -> Tensor | float:
    """Mean score of each row of a tile."""
    return 1 / len(p) if activation == 'softmax' else p.mean(0)


def sums_of_rows(p: Tensor, q: Tensor, activation: str) -> Tensor:
    """Centred sums aa, ab, bb and means of p, q of each row, shape (5, rows)."""
    means = [row_mean(x, activation) for x in (p, q)]
    sums = p.new_empty((5, p.shape[1]))
    centred_sums(p - means[0], q - means[1], 0, sums)
    sums[3], sums[4] = means
    return sums


def sums_of_classes(p: Tensor, q: Tensor, keep: Tensor | None, count: int) -> Tensor:
    """The same of each class, shape (5, classes)."""
    sums = p.new_empty((5, len(p)))
    centred = []
    for x, mean in ((p, sums[3]), (q, sums[4])):
        torch.sum(x if keep is None else x * keep, 1, out=mean).div_(count)
        x = x - mean.unsqueeze(1)
        centred.append(x if keep is None else x.mul_(keep))
    centred_sums(*centred, 1, sums)
    return sums


def centred_sums(a: Tensor, b: Tensor, dim: int, out: Tensor) -> None:
    """Put the sums of a * a, a * b and b * b in out[:3]. Overwrites a and b."""
    torch.sum(a * a, dim, out=out[0])
    torch.sum(a.mul_(b), dim, out=out[1])
    torch.sum(b.mul_(b), dim, out=out[2])


def is_flat(sums: Tensor, count: int) -> bool:
    """Whether all rows (or classes) of a tile are nearly constant.

    A score has a rounding error of 6e-8 of itself, which is 6e-8 / spread of what
    centring leaves of it. Where that is too much the tile is computed in float64.
    """
    largest = (sums[0:3:2] / sums[3:].square()).amax(1)
    return bool((largest < FLAT**2 * count).any())


def correlation(
    sums: Tensor, count: int | Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Correlations and the factors u, v, w of their gradient.

    Args:
        sums (Tensor): Centred sums aa, ab, bb and means of p, q, shape (5, n).
        count (int | Tensor): Number of entries that were summed.
        eps (float): Added to the product of the norms.
    """
    aa, ab, bb, mean_p, mean_q = sums
    constant = is_constant(aa, mean_p.square() * count)
    constant |= is_constant(bb, mean_q.square() * count)
    norm_a, norm_b = aa.sqrt(), bb.sqrt()
    u = (norm_a * norm_b).add_(eps).reciprocal_().masked_fill_(constant, 0)
    corr = ab * u
    v = (corr * u).mul_(norm_b).div_(norm_a.masked_fill_(constant, 1))
    return corr, u, v, v * mean_p - u * mean_q


def combine(
    counts: list[int],
    sums: list[Tensor],
    num_classes: int,
    group: dist.ProcessGroup | None,
) -> Tensor:
    """Sums of the classes over all tiles (and processes).

    Args:
        counts (list[int]): Rows of each tile that count.
        sums (list[Tensor]): Theirs, float64, shape (5, classes).
        num_classes (int): Number of classes, should there be no tile.
        group (ProcessGroup, optional): As in ``correlations``.

    Returns:
        Tensor: Shape (5, classes).
    """
    if not sums:
        sums, counts = [torch.zeros((5, num_classes), dtype=torch.float64)], [0]
    sums = torch.stack(sums)
    counts = torch.tensor(counts, dtype=torch.float64).view(-1, 1, 1)
    means = sums[:, 3:]
    total = torch.cat([counts.expand_as(means[:, :1]), counts * means], 1).sum(0)
    total = sum_over_processes(total, group)
    mean = total[1:] / total[0].clamp(min=1)
    a, b = (means - mean).unbind(1)
    between = torch.stack([a * a, a * b, b * b], 1) * counts
    total = sum_over_processes((sums[:, :3] + between).sum(0), group)
    return torch.cat([total, mean])
