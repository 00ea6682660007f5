"""The fast path of DISTLoss on a GPU: the algorithm of ``cpu.py`` as Triton kernels.

It uses the formulas of ``cpu.py``. A tile is all classes of ``BLOCK_ROWS`` rows. One
program of the grid processes it, in blocks of ``BLOCK_CLASSES`` classes. The logits are
read from memory once per direction, in their own dtype. Softmax has to see all classes
first and reads them twice, the second time from the cache.

``_forward`` computes, per tile, the correlations of its rows, the factors u, v, w of
their gradient, and centred sums of the classes; ``_combine``, per class, its sums over
all tiles and its factors; ``_backward``, per tile, the gradient.

Tiles for which fp32 is too inaccurate (``cpu.has_digits``) are computed in float64.
Only the device knows which, and nothing waits for it: both passes are launched in fp32
and again in float64, and a program exits at once if its launch skips its tile.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from mmengine.utils import digit_version
from torch import Tensor

from .common import (
    MIN_DISTANCE,
    MIN_SCORE,
    MIN_SPREAD,
    Settings,
    compute_dtype,
    raise_for_teacher,
)
from .cpu import FLAT, LARGE, FewPasses, by_image, combine

if digit_version(triton.__version__) < digit_version('3.1'):
    raise ImportError(f'Triton {triton.__version__} is older than 3.1')

# The largest blocks with which the fp32 kernels keep everything in registers, seen in
# the code compiled for sm_80 and sm_90
BLOCK_CLASSES = tl.constexpr(16)
BLOCK_ROWS = 128
# A tile has fewer rows if a large GPU could run more tiles at a time than there are, or
# if the tiles that it runs at a time would leave its cache
MIN_BLOCK_ROWS, MIN_TILES, MAX_TILE_BYTES = 16, 256, 96 * 1024
BLOCK_TILES = tl.constexpr(512)  # tiles combined at a time
EVERY_TILE, STEEP_TILES, FLAT_TILES = -1, 0, 1


def correlations(
    student: Tensor, teacher: Tensor, mask: Tensor | None, settings: Settings
) -> tuple[Tensor, Tensor]:
    """See :func:`mmdist.losses.correlations.correlations`; never waits for the GPU."""
    student, teacher, mask = by_image(student, teacher, mask)
    # both get the student's layout; most logits have it already and are not copied
    if student.is_contiguous():
        teacher = teacher.contiguous()
    else:
        student, teacher = (x.mT.contiguous().mT for x in (student, teacher))
    mask = mask if mask is None else mask.contiguous().view(torch.uint8)
    with torch.cuda.device_of(student):  # where kernels are launched
        return FewPasses.apply(student, teacher, mask, settings, forward_pass)


def forward_pass(student, teacher, mask, settings):
    """The correlations, for ``FewPasses``."""
    activation, tau, eps, group = settings
    images, classes, positions = student.shape
    dtype = compute_dtype(student, teacher)
    rows = images * positions
    block_rows = BLOCK_ROWS
    row_bytes = classes * (student.itemsize + teacher.itemsize)
    while block_rows > MIN_BLOCK_ROWS and (
        rows < MIN_TILES * block_rows
        or (activation == 'softmax' and row_bytes * block_rows > MAX_TILE_BYTES)
    ):
        block_rows //= 2
    parts = triton.cdiv(positions, block_rows)
    tiles = images * parts

    new = functools.partial(student.new_empty, dtype=torch.float64)
    row_factors = new((2, rows), dtype=dtype)
    # softmax cancels what all classes of a row share
    row_shift = new(0 if activation == 'softmax' else rows)
    tile_sums, class_sums = new((2, tiles)), new((classes, 5, tiles))
    tile_flags = new((2, tiles), dtype=torch.int32)
    strides = (positions, 1) if student.is_contiguous() else (1, classes)
    sizes = (rows, classes, positions, parts, *strides)
    constants = dict(HAS_MASK=mask is not None, BLOCK_ROWS=block_rows)
    constants |= dict(ACTIVATION=activation, TAU=float(tau))
    # dtype, tiles of the forward pass, tiles of the backward pass
    passes = [(tl.float64, EVERY_TILE, EVERY_TILE)]
    if dtype == torch.float32:
        passes = [(tl.float32, EVERY_TILE, STEEP_TILES)]
        passes += [(tl.float64, FLAT_TILES, FLAT_TILES)]
    inputs = (student, teacher, student if mask is None else mask)
    outputs = (row_factors, row_shift, tile_sums, tile_flags, class_sums)
    for pass_dtype, only, _ in passes:
        which = dict(EPS=float(eps), ONLY=only, DTYPE=pass_dtype)
        _forward[(tiles,)](*inputs, *outputs, tiles, *sizes, **which, **constants)
    total, class_corr, factors = map(new, ((5, classes), classes, (3, classes)))
    row_total, finite = new(2), new(1, dtype=torch.uint8)
    inputs = (tile_sums, tile_flags, class_sums)
    outputs = (total, class_corr, factors, row_total, finite)
    settled = dict(ACTIVATION=activation, EPS=float(eps))
    _combine[(classes,)](*inputs, *outputs, tiles, classes, **settled)
    raise_for_teacher(finite.view(torch.bool))
    if group is not None:
        row_total, class_corr, factors = combine(
            row_total.unsqueeze(1), total.unsqueeze(0), settings
        )
    corrs = row_total[0] / row_total[1].clamp(min=1), class_corr.mean()
    saved = (row_factors, row_shift, factors, row_total, tile_flags)
    return corrs, saved, functools.partial(gradient, passes, sizes, constants)


def gradient(
    passes, sizes, constants, student, teacher, mask, settings, saved, grads, scale
):
    """The student's gradient, for ``FewPasses``."""
    grad, tiles = torch.empty_like(student), saved[-1].shape[1]
    inputs = (student, teacher, student if mask is None else mask)
    tensors = (*inputs, *saved, *grads, grad)
    for dtype, _, only in passes:
        which = dict(SCALE=scale, ONLY=only, DTYPE=dtype)
        _backward[(tiles,)](*tensors, *sizes, **which, **constants)
    return grad


# Triton recompiles a kernel when an integer becomes 1 or a multiple of 16. These change
# from step to step with the number of rows, and gain nothing from it.
COUNTS = ('parts', 'tiles', 'number_of_rows')
# constants that a kernel can read
_FLAT_SQUARED = tl.constexpr(FLAT**2)
_LARGE = tl.constexpr(LARGE)
_MIN_SPREAD = tl.constexpr(MIN_SPREAD)
_MIN_DISTANCE = tl.constexpr(MIN_DISTANCE)
_MIN_SCORE = tl.constexpr(MIN_SCORE)

# A line for each of so many arguments would hide the arithmetic.
# fmt: off


@triton.jit
def _rows(tile, parts, positions, classes, row_stride, mask, HAS_MASK, BLOCK_ROWS):
    """The rows of a tile, their offsets in the logits, which exist and which count."""
    image = (tile // parts).to(tl.int64)
    position = (tile % parts) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    exists = position < positions
    row = image * positions + position
    start = image * positions * classes + position.to(tl.int64) * row_stride
    keep = exists
    if HAS_MASK:
        keep = exists & (tl.load(mask + row, mask=exists, other=0) != 0)
    return row, start, exists, keep


@triton.jit
def _block(first, classes, stride, exists, keep):
    """The classes of a block, the offsets of their logits, which exist and count."""
    index = first + tl.arange(0, BLOCK_CLASSES)
    there = (index < classes)[:, None] & exists[None, :]
    return index, index.to(tl.int64)[:, None] * stride, there, there & keep[None, :]


@triton.jit
def _load(rows, place, there, counts, DTYPE):
    """Logits (classes, rows) of a block, 0 where they do not count."""
    # not masked by `counts`: a mask that changes between neighbours prevents wide loads
    x = tl.load(rows[None, :] + place, mask=there, other=0)
    if x.dtype != tl.float64:  # Triton 3.1 cannot convert bf16 to float64
        x = x.to(tl.float32)
    return tl.where(counts, x.to(DTYPE), 0)


@triton.jit
def _denominator(rows, stride, classes, exists, keep, ACTIVATION, TAU, DTYPE):
    """For softmax, each row's largest logit and sum of exp(logit - largest)."""
    largest = tl.full(keep.shape, float('-inf'), DTYPE)
    total = tl.zeros(keep.shape, DTYPE)
    if ACTIVATION == 'softmax':
        for first in range(0, classes, BLOCK_CLASSES):
            _, place, there, counts = _block(first, classes, stride, exists, keep)
            x = _load(rows, place, there, counts, DTYPE) / TAU
            # no row is empty
            x = tl.where(counts | (keep[None, :] == 0), x, float('-inf'))
            new = tl.maximum(largest, tl.max(x, 0))
            total = total * tl.exp(largest - new) + tl.sum(tl.exp(x - new[None, :]), 0)
            largest = new
    return largest, total


@triton.jit
def _scores(rows, place, there, counts, largest, total, ACTIVATION, TAU, DTYPE):
    """Scores (classes, rows) of a block, 0 where they do not count, and the number of
    logits that are NaN or inf."""
    x = _load(rows, place, there, counts, DTYPE)
    p = x / TAU
    if ACTIVATION == 'softmax':
        p = tl.exp(p - largest[None, :]) / total[None, :]
    if ACTIVATION == 'sigmoid':
        p = 1 / (1 + tl.exp(-p))
    # NaN and inf minus themselves are NaN
    return tl.where(counts, p, 0), tl.sum(tl.sum((x - x != 0).to(tl.int32), 1), 0)


@triton.jit
def _centred_sums(p, q, counts, number, AXIS: tl.constexpr):
    """Means and centred sums aa, ab, bb of a block along an axis."""
    number = tl.maximum(number, 1)
    mean_p, mean_q = tl.sum(p, AXIS) / number, tl.sum(q, AXIS) / number
    a = tl.where(counts, p - tl.expand_dims(mean_p, AXIS), 0)
    b = tl.where(counts, q - tl.expand_dims(mean_q, AXIS), 0)
    return mean_p, mean_q, tl.sum(a * a, AXIS), tl.sum(a * b, AXIS), tl.sum(b * b, AXIS)


@triton.jit
def _is_constant(var, mean, number, ACTIVATION, DTYPE):
    """Whether vectors are constant, by float64 sums of scores in DTYPE."""
    size = tl.abs(mean)
    if ACTIVATION != 'identity' and DTYPE == tl.float64:  # noqa: SIM300
        size = tl.minimum(size, tl.maximum(tl.abs(1 - mean), _MIN_DISTANCE))
    spread = tl.maximum(size * _MIN_SPREAD, _MIN_SCORE)
    return var <= number * spread * spread


@triton.jit
def _correlation(aa, ab, bb, mean_p, mean_q, number, ACTIVATION, DTYPE, EPS):
    """Correlation and the factors u, v of its gradient, in float64."""
    constant = _is_constant(aa, mean_p, number, ACTIVATION, DTYPE)
    constant |= _is_constant(bb, mean_q, number, ACTIVATION, DTYPE)
    norm_a, norm_b = tl.sqrt(aa), tl.sqrt(bb)
    u = tl.where(constant, 0, 1 / (tl.where(constant, 1, norm_a * norm_b) + EPS))
    corr = ab * u
    if EPS == 0:  # as in `cpu.correlation`
        u = tl.where(constant | (number <= 2), 0, u)
    v = corr * u * norm_b / tl.where(constant, 1, norm_a)
    return corr, u, v


@triton.jit
def _flatness(aa, mean, number, counts):
    """Sum over rows (or classes) of (mean / spread)^2, inf for huge scores."""
    flatness = number * mean * mean / aa
    flatness = tl.where(flatness == flatness, flatness, 0)  # all scores are 0
    flatness = tl.where(aa <= _LARGE, flatness, float('inf'))  # NaN as well
    return tl.sum(tl.where(counts, flatness, 0), 0).to(tl.float32)


@triton.jit(do_not_specialize=COUNTS)
def _forward(
    student, teacher, mask, row_factors, row_shift, tile_sums, tile_flags, class_sums,
    tiles, number_of_rows, classes, positions, parts, class_stride, row_stride,
    HAS_MASK: tl.constexpr, ACTIVATION: tl.constexpr, TAU: tl.constexpr,
    EPS: tl.constexpr, ONLY: tl.constexpr, DTYPE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):
    tile = tl.program_id(0)
    if ONLY >= 0:  # noqa: SIM102, `and` would load the flag in every case
        if tl.load(tile_flags + tile) != ONLY:
            return
    row, start, exists, keep = _rows(
        tile, parts, positions, classes, row_stride, mask, HAS_MASK, BLOCK_ROWS
    )
    s_rows, t_rows = student + start, teacher + start
    s_largest, s_total = _denominator(
        s_rows, class_stride, classes, exists, keep, ACTIVATION, TAU, DTYPE
    )
    t_largest, t_total = _denominator(
        t_rows, class_stride, classes, exists, keep, ACTIVATION, TAU, DTYPE
    )

    count = tl.sum(keep.to(tl.int32), 0)
    zero = tl.zeros([BLOCK_ROWS], DTYPE)
    seen, mean_p, mean_q, aa, ab, bb = zero, zero, zero, zero, zero, zero
    bad, flat_p, flat_q = 0, 0.0, 0.0
    for first in range(0, classes, BLOCK_CLASSES):
        index, place, there, counts = _block(
            first, classes, class_stride, exists, keep
        )
        p, _ = _scores(
            s_rows, place, there, counts, s_largest, s_total, ACTIVATION, TAU, DTYPE
        )
        q, block_bad = _scores(
            t_rows, place, there, counts, t_largest, t_total, ACTIVATION, TAU, DTYPE
        )
        bad += block_bad

        # rows: combine the block with the classes before it
        there = index < classes
        size = tl.sum(there.to(DTYPE), 0)
        block_p, block_q, block_aa, block_ab, block_bb = _centred_sums(
            p, q, counts, size, 0
        )
        share = size / (seen + size)
        between = seen * share
        seen += size
        d_p, d_q = block_p - mean_p, block_q - mean_q
        mean_p += d_p * share
        mean_q += d_q * share
        aa += block_aa + d_p * d_p * between
        ab += block_ab + d_p * d_q * between
        bb += block_bb + d_q * d_q * between

        # classes: the block has all rows of the tile
        class_p, class_q, class_aa, class_ab, class_bb = _centred_sums(
            p, q, counts, count.to(DTYPE), 1
        )
        place = class_sums + index.to(tl.int64) * 5 * tiles + tile
        tl.store(place, class_aa.to(tl.float64), mask=there)
        tl.store(place + tiles, class_ab.to(tl.float64), mask=there)
        tl.store(place + 2 * tiles, class_bb.to(tl.float64), mask=there)
        tl.store(place + 3 * tiles, class_p.to(tl.float64), mask=there)
        tl.store(place + 4 * tiles, class_q.to(tl.float64), mask=there)
        flat_p += _flatness(class_aa, class_p, count, there)
        flat_q += _flatness(class_bb, class_q, count, there)

    if ONLY < 0:
        flat_rows = tl.maximum(
            _flatness(aa, mean_p, classes, keep), _flatness(bb, mean_q, classes, keep)
        )
        flat = tl.maximum(flat_p, flat_q) * _FLAT_SQUARED > classes
        flat = (flat | (flat_rows * _FLAT_SQUARED > count)) & (count > 0)
        tl.store(tile_flags + tile, flat.to(tl.int32))
        tl.store(tile_flags + tiles + tile, bad)

    mean_p, mean_q = mean_p.to(tl.float64), mean_q.to(tl.float64)
    corr, u, v = _correlation(
        aa.to(tl.float64), ab.to(tl.float64), bb.to(tl.float64), mean_p, mean_q,
        classes, ACTIVATION, DTYPE, EPS,
    )
    tl.store(tile_sums + tile, tl.sum(tl.where(keep, corr, 0), 0))
    tl.store(tile_sums + tiles + tile, count.to(tl.float64))
    u, v = u.to(row_factors.dtype.element_ty), v.to(row_factors.dtype.element_ty)
    tl.store(row_factors + row, u, mask=exists)
    tl.store(row_factors + number_of_rows + row, v, mask=exists)
    if ACTIVATION != 'softmax':
        # from the rounded u and v, so that the means cancel
        w = v.to(tl.float64) * mean_p - u.to(tl.float64) * mean_q
        tl.store(row_shift + row, w, mask=exists)


@triton.jit(do_not_specialize=COUNTS)
def _combine(
    tile_sums, tile_flags, class_sums, total, class_corr, class_factors, row_total,
    finite, tiles, classes,
    ACTIVATION: tl.constexpr, EPS: tl.constexpr,
):
    index = tl.program_id(0)
    sums = class_sums + index.to(tl.int64) * 5 * tiles
    zero = tl.zeros([BLOCK_TILES], tl.float64)
    counts, sum_p, sum_q, corr = zero, zero, zero, zero
    bad = tl.zeros([BLOCK_TILES], tl.int32)
    for first in range(0, tiles, BLOCK_TILES):
        tile = first + tl.arange(0, BLOCK_TILES)
        there = tile < tiles
        n = tl.load(tile_sums + tiles + tile, mask=there, other=0)
        counts += n
        sum_p += n * tl.load(sums + 3 * tiles + tile, mask=there, other=0)
        sum_q += n * tl.load(sums + 4 * tiles + tile, mask=there, other=0)
        corr += tl.load(tile_sums + tile, mask=there, other=0)
        bad += tl.load(tile_flags + tiles + tile, mask=there, other=0)
    count = tl.sum(counts, 0)
    number = tl.maximum(count, 1)
    mean_p, mean_q = tl.sum(sum_p, 0) / number, tl.sum(sum_q, 0) / number

    sum_aa, sum_ab, sum_bb = zero, zero, zero
    for first in range(0, tiles, BLOCK_TILES):
        tile = first + tl.arange(0, BLOCK_TILES)
        there = tile < tiles
        n = tl.load(tile_sums + tiles + tile, mask=there, other=0)
        d_p = tl.load(sums + 3 * tiles + tile, mask=there, other=0) - mean_p
        d_q = tl.load(sums + 4 * tiles + tile, mask=there, other=0) - mean_q
        sum_aa += tl.load(sums + tile, mask=there, other=0) + n * d_p * d_p
        sum_ab += tl.load(sums + tiles + tile, mask=there, other=0) + n * d_p * d_q
        sum_bb += tl.load(sums + 2 * tiles + tile, mask=there, other=0) + n * d_q * d_q
    aa, ab, bb = tl.sum(sum_aa, 0), tl.sum(sum_ab, 0), tl.sum(sum_bb, 0)

    tl.store(total + index, aa)
    tl.store(total + classes + index, ab)
    tl.store(total + 2 * classes + index, bb)
    tl.store(total + 3 * classes + index, mean_p)
    tl.store(total + 4 * classes + index, mean_q)
    rho, u, v = _correlation(
        aa, ab, bb, mean_p, mean_q, number, ACTIVATION, tl.float64, EPS
    )
    tl.store(class_corr + index, rho)
    tl.store(class_factors + index, u)
    tl.store(class_factors + classes + index, v)
    tl.store(class_factors + 2 * classes + index, v * mean_p - u * mean_q)
    if index == 0:
        tl.store(row_total, tl.sum(corr, 0))
        tl.store(row_total + 1, count)
        tl.store(finite, tl.sum(bad, 0) == 0)


@triton.jit(do_not_specialize=COUNTS)
def _backward(
    student, teacher, mask, row_factors, row_shift, class_factors, row_total,
    tile_flags, grad_inter, grad_intra, grad,
    number_of_rows, classes, positions, parts, class_stride, row_stride,
    SCALE: tl.constexpr, HAS_MASK: tl.constexpr, ACTIVATION: tl.constexpr,
    TAU: tl.constexpr, ONLY: tl.constexpr, DTYPE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):
    tile = tl.program_id(0)
    if ONLY >= 0:  # noqa: SIM102, `and` would load the flag in every case
        if tl.load(tile_flags + tile) != ONLY:
            return
    row, start, exists, keep = _rows(
        tile, parts, positions, classes, row_stride, mask, HAS_MASK, BLOCK_ROWS
    )
    s_rows, t_rows = student + start, teacher + start
    s_largest, s_total = _denominator(
        s_rows, class_stride, classes, exists, keep, ACTIVATION, TAU, DTYPE
    )
    t_largest, t_total = _denominator(
        t_rows, class_stride, classes, exists, keep, ACTIVATION, TAU, DTYPE
    )
    row_scale = tl.load(grad_inter) * SCALE / tl.maximum(tl.load(row_total + 1), 1)
    class_scale = tl.load(grad_intra) * SCALE / classes
    u_row = tl.load(row_factors + row, mask=keep, other=0).to(DTYPE)
    v_row = tl.load(row_factors + number_of_rows + row, mask=keep, other=0).to(DTYPE)
    u_row, v_row = u_row * row_scale.to(DTYPE), v_row * row_scale.to(DTYPE)
    w_row, dot = tl.zeros([BLOCK_ROWS], DTYPE), tl.zeros([BLOCK_ROWS], DTYPE)
    if ACTIVATION != 'softmax':
        w_row = (tl.load(row_shift + row, mask=keep, other=0) * row_scale).to(DTYPE)

    # softmax has to see all classes first
    for last in tl.static_range(0 if ACTIVATION == 'softmax' else 1, 2):
        for first in range(0, classes, BLOCK_CLASSES):
            index, place, there, counts = _block(
                first, classes, class_stride, exists, keep
            )
            p, _ = _scores(
                s_rows, place, there, counts, s_largest, s_total, ACTIVATION, TAU, DTYPE
            )
            q, _ = _scores(
                t_rows, place, there, counts, t_largest, t_total, ACTIVATION, TAU, DTYPE
            )
            factors, real = class_factors + index, index < classes
            u = tl.load(factors, mask=real, other=0) * class_scale
            v = tl.load(factors + classes, mask=real, other=0) * class_scale
            w = tl.load(factors + 2 * classes, mask=real, other=0) * class_scale
            g = (u_row[None, :] + u.to(DTYPE)[:, None]) * q
            g -= (v_row[None, :] + v.to(DTYPE)[:, None]) * p
            g += w_row[None, :] + w.to(DTYPE)[:, None]
            if last == 0:
                dot += tl.sum(g * p, 0)
            else:
                if ACTIVATION == 'softmax':
                    g = p * (g - dot[None, :])
                if ACTIVATION == 'sigmoid':
                    g = g * p * (1 - p)
                g = tl.where(counts, g, 0)
                if grad.dtype.element_ty != tl.float64:  # as in _load
                    g = g.to(tl.float32)
                g = g.to(grad.dtype.element_ty)
                tl.store((grad + start)[None, :] + place, g, mask=there)
