"""The GPU kernels against the textbook formula in float64.

Without a GPU, Triton interprets them: the same arithmetic in numpy, but slow. Compiling
them needs no GPU. `test_dist_loss.py` and `test_sync.py` run on them too.
"""

from __future__ import annotations

import collections
import functools
import itertools
import logging
import os
import subprocess
import sys
from unittest.mock import Mock

import pytest
import torch
from predictions import (
    HARD,
    INTERPRETED,
    LAYOUTS,
    assert_close,
    kept_by,
    prediction,
    run,
)

from benchmarks import textbook
from mmdist.losses import DISTLoss, correlations
from mmdist.losses.correlations import gpu

DEVICE = 'cpu' if INTERPRETED else 'cuda'
# more rows than a tile has, and more classes than a block
SHAPES = [(2, 19, 3, 6), (40, 35)]


def on_device(name, shape):
    return (x.to(DEVICE) for x in prediction(name, shape))


def quick_first(*parameters):
    """Mark all combinations but the first as slow: interpreted, each takes a second."""
    first, *others = itertools.product(*parameters)
    return [first, *(pytest.param(*x, marks=pytest.mark.slow) for x in others)]


@pytest.mark.parametrize(
    ('name', 'shape', 'activation'),
    quick_first(HARD, SHAPES, ['softmax', 'sigmoid']),
)
def test_kernels_are_exact(loss_on, name, shape, activation):
    student, teacher = on_device(name, shape)
    formula = functools.partial(textbook.dist_loss, activation=activation)
    oracle = run(formula, student.double(), teacher.double())
    loss = loss_on('gpu', activation=activation, eps=1e-8)
    assert_close(run(loss, student, teacher), oracle)


@pytest.mark.parametrize(
    ('activation', 'layout'),
    quick_first(
        ['sigmoid', 'softmax'],
        ['a part of a larger one', 'channels last', 'expanded'],
    ),
)
def test_layout_and_mask(loss_on, activation, layout):
    student, teacher = on_device('ordinary', (2, 19, 6, 8))
    mask = torch.rand((2, 6, 8), device=DEVICE) < 0.5
    mask[0, :4] = False  # whole tiles without a row
    if layout == 'expanded':
        student = student[:1].expand(2, -1, -1, -1)
    rows = [x.movedim(1, -1)[mask] for x in (student.double(), teacher.double())]
    formula = functools.partial(textbook.dist_loss, activation=activation, tau=2.0)
    oracle = run(formula, *rows)
    if layout != 'expanded':
        student = LAYOUTS[layout](student)
    # no image is too small for tiles of its own
    loss = loss_on('gpu', 0, activation=activation, tau=2.0, eps=1e-8)
    value, grad = run(loss, student, teacher, mask)
    grad = grad.movedim(1, -1)
    assert not grad[~mask].any()
    assert_close((value, grad[mask]), oracle, 1e-6, 1e-6)


def test_half_precision_is_read_as_it_is(loss_on):
    student, teacher = (x.bfloat16() for x in on_device('ordinary', SHAPES[0]))
    oracle = run(textbook.dist_loss, student.double(), teacher.double())
    value, grad = run(loss_on('gpu', eps=1e-8), student, teacher)
    assert value.dtype == torch.float32 and grad.dtype == torch.bfloat16
    assert_close((value, grad), oracle, 1e-6, 1e-2)  # the gradient is rounded


@pytest.mark.slow
def test_nothing_large_is_kept(loss_on):
    student, teacher = on_device('ordinary', (2, 40, 8, 16))
    kept = kept_by(loss_on('gpu'), student, teacher)
    shapes = sorted(tuple(x.shape) for x in kept if x.numel() > student.numel() / 40)
    inputs = (1, 40, 256)  # small images as one; views of student and teacher
    assert shapes == [inputs, inputs, (2, 256)]


@pytest.fixture
def warnings(monkeypatch) -> list[str]:
    """The warnings about kernels that are not used; no earlier result is known."""
    correlations._WORK.clear()
    correlations._warn_once.cache_clear()
    texts = []

    def print_log(text, logger, level):
        assert level == logging.WARNING
        texts.append(text)

    monkeypatch.setattr(correlations, 'print_log', print_log)
    yield texts
    correlations._WORK.clear()


def kernels_work(activation='softmax', dtype=torch.float32) -> bool:
    device = torch.device(DEVICE)
    return correlations.kernels_work(device, dtype, torch.float32, activation)


@pytest.mark.slow
def test_the_kernels_are_taken_where_they_agree_with_the_plain_path(warnings):
    assert kernels_work('softmax', torch.float32)
    assert kernels_work('sigmoid', torch.bfloat16)
    assert kernels_work('identity', torch.float16)
    assert kernels_work('softmax', torch.float64)
    assert not warnings


def launcher(problem):
    """Stands in for a kernel, which is started as `kernel[grid](*args)`."""
    return collections.defaultdict(lambda: Mock(side_effect=problem))


@pytest.mark.parametrize(
    ('kernel', 'problem', 'message'),
    [
        pytest.param(
            *('_backward', lambda *args, **_: args[10].fill_(1), 'wrong results'),
            marks=pytest.mark.slow,
        ),
        ('_combine', RuntimeError('no compiler'), 'do not run: no compiler'),
    ],
)
def test_kernels_that_do_not_work_are_refused_once(
    kernel, problem, message, warnings, monkeypatch
):
    with monkeypatch.context() as patch:
        patch.setattr(gpu, kernel, launcher(problem))
        assert not kernels_work() and not kernels_work()
    (text,) = warnings
    assert 'slower path' in text and message in text
    assert not kernels_work()


@pytest.mark.parametrize(
    'error',
    [
        torch.cuda.OutOfMemoryError('CUDA out of memory. Tried to allocate 2 GiB'),
        RuntimeError('Triton Error [CUDA]: out of memory'),
    ],
)
def test_a_full_gpu_is_no_answer(error, warnings, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(gpu, '_forward', launcher(error))
        assert not kernels_work() and not kernels_work()
    monkeypatch.setattr(gpu, 'correlations', correlations.plain.correlations)
    assert kernels_work()
    assert not warnings


def test_without_triton(warnings, monkeypatch):
    monkeypatch.delitem(sys.modules, gpu.__name__)
    monkeypatch.delattr(correlations, 'gpu')
    monkeypatch.setitem(sys.modules, 'triton', None)
    assert not kernels_work('softmax') and not kernels_work('sigmoid')
    (text,) = warnings
    assert 'triton' in text


# One new process for all: the kernels of this one are for the interpreter.
COMPILE = """
import itertools, sys
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from mmdist.losses.correlations import gpu

LOGITS = ('student', 'teacher', 'grad')
FLOAT64 = (
    'row_shift', 'tile_sums', 'class_sums', 'total', 'class_corr', 'class_factors',
    'row_total', 'grad_inter', 'grad_intra')
POINTERS = dict(
    mask='*u8', finite='*u8', tile_flags='*i32', row_factors='*fp32',
    **dict.fromkeys(LOGITS, '*bf16'), **dict.fromkeys(FLOAT64, '*fp64'))
CONSTANTS = dict(HAS_MASK=True, TAU=1.0, EPS=0.0, SCALE=1.0, BLOCK_ROWS=gpu.BLOCK_ROWS)


def ptx(kernel, unit_stride='row', **constants):
    constants = {**CONSTANTS, **constants}
    # a stride of 1 is known when a kernel is compiled; all others are multiples of 16
    constants[f'{unit_stride}_stride'] = 1
    signature, values, attributes = {}, {}, {}
    for i, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name], values[i,] = 'constexpr', constants[name]
        else:
            signature[name] = POINTERS.get(name, 'i32')
            attributes[i,] = [['tt.divisibility', 16]]
    source = ASTSource(kernel, signature, values, attributes)
    return triton.compile(source, GPUTarget('cuda', int(sys.argv[1]), 32)).asm['ptx']


assert ptx(gpu._combine, ACTIVATION='softmax')
assert ptx(gpu._forward, ACTIVATION='sigmoid', DTYPE=tl.float32, ONLY=-1, classes=1)
cases = itertools.product(
    (gpu._forward, gpu._backward),
    ('softmax', 'sigmoid'),
    ('row', 'class'),
    ((tl.float32, 0), (tl.float64, 1)),
)
for kernel, activation, unit_stride, (dtype, only) in cases:
    code = ptx(kernel, unit_stride, ACTIVATION=activation, DTYPE=dtype, ONLY=only)
    # sixteen bytes of logits at a time, in whatever order they lie in memory
    assert 'ld.global.v4' in code, (kernel, activation, unit_stride, dtype)
    if kernel is gpu._backward:
        assert 'st.global.v4' in code, (activation, unit_stride, dtype)
"""


@pytest.mark.slow
@pytest.mark.parametrize('capability', ['80', '90'])
def test_kernels_compile(capability, tmp_path):
    environment = dict(os.environ, TRITON_CACHE_DIR=str(tmp_path))
    environment.pop('TRITON_INTERPRET', None)
    code = [sys.executable, '-c', COMPILE, capability]
    subprocess.run(code, env=environment, check=True)


@pytest.mark.gpu
@pytest.mark.skipif(INTERPRETED, reason='there is no GPU')
@pytest.mark.parametrize('masked', [False, True])
def test_a_gpu_takes_them_and_never_waits(masked):
    student, teacher = on_device('ordinary', (2, 19, 64, 64))
    mask = torch.ones((2, 64, 64), dtype=torch.bool, device='cuda') if masked else None
    assert correlations.choose_path(student, teacher, 'softmax') == 'gpu'
    run(DISTLoss(), student, teacher, mask)  # compiles
    torch.cuda.set_sync_debug_mode('error')
    try:
        run(DISTLoss(), student, teacher, mask)
    finally:
        torch.cuda.set_sync_debug_mode('default')
