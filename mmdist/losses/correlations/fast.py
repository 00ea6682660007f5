"""What the fast paths share: the formulas, and all but the work on the logits.

In autograd the loss makes some thirty passes over tensors of the size of the logits and
keeps a dozen of them. Here the logits are cut into tiles: all classes of some rows.
Each is read once per direction, and nothing of its size is kept but the gradient.

*Forward.* The correlation of a row (inter) is finished within its tile. That of a class
(intra) needs sums over all rows. Each tile is centred by its own means, so nothing
cancels in fp32, and the centred sums of the tiles are combined in float64 (Chan, Golub
and LeVeque, 1983)::

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

import torch
from mmengine.dist import get_world_size
from torch import Tensor

from .common import Settings, as_rows, is_constant, sum_over_processes
from .plain import differentiable_gradient

# Tiles are computed in float64 where fp32 leaves less than this: a spread (norm after
# centring / norm that centring takes) of which it still gives five digits, and a sum of
# squares that is far from overflowing it.
FLAT, LARGE = 1e-2, 1e20
# Images of fewer elements are taken together: a tile for each would be all overhead.
SMALL_IMAGE = 25_000


class FastPath(torch.autograd.Function):
    """The two correlations, by what a device makes of the logits.

    ``sums(student, teacher, mask, settings, **options)`` returns what :func:`combine`
    takes, and tensors for the backward pass. ``gradient``, called with these, the
    gradient of each row's correlation (0-dim) and the factors u, v, w of the classes
    (3, classes) beside the same arguments, returns that of the student's logits.
    """

    @staticmethod
    def forward(ctx, student, teacher, mask, settings, sums, gradient, options):
        *tiles, saved = sums(student, teacher, mask, settings, **options)
        row_total, class_corr, factors = combine(*tiles, settings)
        count = row_total[1].clamp(min=1)
        ctx.save_for_backward(student, teacher, mask, factors, count, *saved)
        ctx.rest = settings, gradient, options
        return row_total[0] / count, class_corr.mean()

    @staticmethod
    def backward(ctx, *grads):
        student, teacher, mask, factors, count, *saved = ctx.saved_tensors
        settings, gradient, options = ctx.rest
        inputs = student, teacher, mask, settings
        if torch.is_grad_enabled():  # under `create_graph=True`
            return differentiable_gradient(*inputs, grads), *[None] * 6
        # the derivatives of `logits / tau` and `sum_over_processes`
        world_size = 1 if settings.group is None else get_world_size(settings.group)
        inter, intra = (grad * (world_size / settings.tau) for grad in grads)
        scales = inter / count, factors * (intra / student.shape[1])
        return gradient(*inputs, *scales, saved, **options), *[None] * 6


def by_image(
    student: Tensor, teacher: Tensor, mask: Tensor | None, small: int = SMALL_IMAGE
) -> tuple[Tensor, Tensor, Tensor | None]:
    """View logits as (images, classes, positions), the mask as (images, positions).

    (rows, classes) are one image, and so are images of fewer than ``small`` elements.
    The teacher's logits are detached.
    """
    views = []
    for logits in (student, teacher.detach()):
        images, classes = logits.shape[:2]
        if logits.ndim == 2 or (images > 1 and logits[0].numel() < small):
            views.append(as_rows(logits).t().unsqueeze(0))
        else:
            views.append(logits.reshape(images, classes, -1))
    return *views, mask if mask is None else mask.reshape(len(views[0]), -1)


def combine(
    row_sums: Tensor, class_sums: Tensor, settings: Settings
) -> tuple[Tensor, Tensor, Tensor]:
    """Combine tiles and processes, all in float64.

    The exchanges and their order are those of the plain path, which another process may
    take.

    Args:
        row_sums: The sum of the correlations of the rows of each tile, and their
            number, (2, tiles).
        class_sums: Of the classes, what :func:`correlation` takes, (tiles, 5, classes).
        settings: How they are correlated.

    Returns:
        ``row_sums`` of all tiles and processes, (2,), the correlations of the classes,
        and the factors u, v, w of their gradient, (3, classes).
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


def correlation(
    sums: Tensor, count: int | Tensor, settings: Settings
) -> tuple[Tensor, Tensor, Tensor]:
    """Correlations and the factors u, v of their gradient, each (vectors,).

    Args:
        sums: Centred sums aa, ab, bb and means of p, q, (5, vectors).
        count: Scores of each vector.
        settings: How they are correlated.
    """
    var, mean = sums[0:3:2], sums[3:]
    constant = is_constant(var, mean, count, settings.activation).any(0)
    norm_a, norm_b = var.sqrt()
    u = (norm_a * norm_b).add_(settings.eps).reciprocal_().masked_fill_(constant, 0)
    corr = sums[1] * u
    if not settings.eps:
        # two scores correlate at 1 or -1: the gradient would be nothing but rounding
        u.mul_(count > 2)
    v = (corr * u).mul_(norm_b).div_(norm_a.masked_fill_(constant, 1))
    return corr, u, v
