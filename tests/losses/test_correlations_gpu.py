"""The kernels for a GPU against the textbook formula in float64.

Where there is no GPU, Triton interprets them: the same arithmetic in numpy, slowly.
That they compile is seen for GPUs that need not be there. `test_dist_loss.py` and
`test_sync.py` run all their tests on them too.
"""

from __future__ import annotations

import logging
import os
import subprocess
import sys

import paths
import pytest
import torch
from predictions import NAMES, assert_close, prediction, run

from benchmarks import textbook
from mmdist.losses import DISTLoss, dist_loss
from mmdist.losses.correlations import gpu as fused_gpu

DEVICE = 'cpu' if paths.INTERPRETED else 'cuda'
# more rows than a tile has, and more classes than a block
SHAPES = [(2, 19, 5, 9), (90, 40)]


@pytest.fixture(autouse=True)
def kernels(monkeypatch):
    monkeypatch.setattr(dist_loss, 'choose_path', paths.kernels)


@pytest.mark.parametrize('activation', ['softmax', 'sigmoid'])
@pytest.mark.parametrize('shape', SHAPES, ids=str)
@pytest.mark.parametrize('name', NAMES)
def test_kernels_are_exact(name, shape, activation):
    student, teacher = (x.to(DEVICE) for x in prediction(name, shape))
    oracle = run(
        lambda s, t: textbook.dist_loss(s, t, activation),
        student.double(),
        teacher.double(),
    )
    assert_close(run(DISTLoss(activation=activation), student, teacher), oracle)


@pytest.mark.parametrize(
    'layout', ['channels last', 'a part of a larger one', 'expanded']
)
@pytest.mark.parametrize('activation', ['softmax', 'sigmoid'])
def test_layout_and_mask(activation, layout, monkeypatch):
    monkeypatch.setattr(dist_loss.fused, 'MIN_TILE', 0)  # images are left apart
    student, teacher = (x.to(DEVICE) for x in prediction('ordinary', (2, 19, 6, 8)))
    mask = torch.rand((2, 6, 8), device=DEVICE) < 0.5
    mask[0, :4] = False  # whole tiles without a row
    if layout == 'expanded':
        student = student[:1].expand(2, -1, -1, -1)
    rows = [x.movedim(1, -1)[mask] for x in (student.double(), teacher.double())]
    oracle = run(lambda s, t: textbook.dist_loss(s, t, activation, tau=2.0), *rows)
    if layout == 'channels last':
        student = student.contiguous(memory_format=torch.channels_last)
    if layout == 'a part of a larger one':
        student = torch.nn.functional.pad(student, (1, 2, 1, 1, 1, 0))
        student = student[:, 1:, 1:-1, 1:-2]
    value, grad = run(DISTLoss(activation=activation, tau=2.0), student, teacher, mask)
    grad = grad.movedim(1, -1)
    assert not grad[~mask].any()
    assert_close((value, grad[mask]), oracle, 1e-6, 1e-6)


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_half_precision_is_read_as_it_is(dtype):
    student, teacher = (x.to(DEVICE, dtype) for x in prediction('ordinary', SHAPES[0]))
    oracle = run(textbook.dist_loss, student.double(), teacher.double())
    value, grad = run(DISTLoss(), student, teacher)
    assert value.dtype == torch.float32 and grad.dtype == dtype
    assert_close((value, grad), oracle, 1e-6, 1e-2)  # the gradient is rounded


def test_nothing_large_is_kept():
    student, teacher = (x.to(DEVICE) for x in prediction('ordinary', (2, 40, 8, 16)))
    student.requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda x: kept.append(x) or x, lambda x: x
    ):
        DISTLoss()(student, teacher)
    shapes = sorted(tuple(x.shape) for x in kept if x.numel() > student.numel() / 40)
    inputs = (1, 40, 256)  # small images as one; a view of the student, the teacher's
    assert shapes == [inputs, inputs, (2, 256)]


def gpu_path(activation='softmax', dtype=torch.float32):
    device = torch.device(DEVICE)
    dist_loss.gpu_path.cache_clear()
    return dist_loss.gpu_path(device, dtype, torch.float32, activation)


@pytest.mark.parametrize('activation', dist_loss.ACTIVATIONS)
@pytest.mark.parametrize(
    'dtype', [torch.float64, torch.float32, torch.float16, torch.bfloat16]
)
def test_the_kernels_are_taken_where_they_agree_with_the_plain_path(activation, dtype):
    assert gpu_path(activation, dtype) is fused_gpu.correlations


@pytest.mark.parametrize(
    'attribute, message, level',
    [
        ('_backward', 'something else', logging.WARNING),  # computes something else
        ('_combine', 'cannot be compiled', logging.INFO),
    ],
)
def test_what_goes_wrong_with_the_kernels(attribute, message, level, monkeypatch):
    class Launcher:
        def __getitem__(self, grid):
            return self

        def __call__(self, *args, **kwargs):
            if attribute == '_combine':
                raise RuntimeError('cannot be compiled')
            args[10].fill_(1)  # the gradient

    said = []
    monkeypatch.setattr(
        dist_loss, 'print_log', lambda text, logger, level: said.append((text, level))
    )
    monkeypatch.setattr(fused_gpu, attribute, Launcher())
    assert gpu_path() is dist_loss.correlations
    ((text, said_level),) = said
    assert message in text and said_level == level


def test_without_triton(monkeypatch):
    monkeypatch.delitem(sys.modules, 'mmdist.losses.fused_gpu')
    monkeypatch.delattr(sys.modules['mmdist.losses'], 'fused_gpu')
    monkeypatch.setitem(sys.modules, 'triton', None)
    assert gpu_path() is dist_loss.correlations


# One process for all: the kernels of this one are for the interpreter.
COMPILE = """
import itertools, sys
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from mmdist.losses.correlations import gpu as fused_gpu

LOGITS = ('student', 'teacher', 'grad')
FLOAT64 = (
    'row_shift', 'tile_sums', 'class_sums', 'total', 'class_corr', 'class_factors',
    'row_total', 'grad_inter', 'grad_intra')
POINTERS = dict(
    mask='*u8', finite='*u8', tile_flags='*i32', row_factors='*fp32',
    **dict.fromkeys(LOGITS, '*bf16'), **dict.fromkeys(FLOAT64, '*fp64'))
CONSTANTS = dict(
    HAS_MASK=True, TAU=1.0, EPS=1e-8, FLAT_SQUARED=1e-4, MIN_SPREAD_SQUARED=1e-12,
    SCALE=1.0, BLOCK_CLASSES=fused_gpu.BLOCK_CLASSES, BLOCK_ROWS=fused_gpu.BLOCK_ROWS,
    BLOCK_TILES=fused_gpu.BLOCK_TILES)


def ptx(kernel, unit_stride='row', **constants):
    constants = {**CONSTANTS, **constants}
    # a stride of 1 is known when a kernel is compiled; all others are multiples of 16
    constants.update({f'{name}_{unit_stride}': 1 for name in LOGITS})
    signature, values, attributes = {}, {}, {}
    for i, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name], values[i,] = 'constexpr', constants[name]
        else:
            signature[name] = POINTERS.get(name, 'i32')
            attributes[i,] = [['tt.divisibility', 16]]
    source = ASTSource(kernel, signature, values, attributes)
    return triton.compile(source, GPUTarget('cuda', int(sys.argv[1]), 32)).asm['ptx']


assert ptx(fused_gpu._combine)
cases = itertools.product(
    (fused_gpu._forward, fused_gpu._backward),
    ('softmax', 'sigmoid'),
    ('row', 'class'),
    ((tl.float32, 0), (tl.float64, 1)),
)
for kernel, activation, unit_stride, (dtype, only) in cases:
    code = ptx(kernel, unit_stride, ACTIVATION=activation, DTYPE=dtype, ONLY=only)
    # sixteen bytes of logits at a time, in whatever order they lie in memory
    assert 'ld.global.v4' in code, (kernel, activation, unit_stride, dtype)
    if kernel is fused_gpu._backward:
        assert 'st.global.v4' in code, (activation, unit_stride, dtype)
"""


@pytest.mark.parametrize('capability', [80, 90])
def test_kernels_compile(capability, tmp_path):
    environment = dict(os.environ, TRITON_CACHE_DIR=str(tmp_path))
    environment.pop('TRITON_INTERPRET', None)
    code = [sys.executable, '-c', COMPILE, str(capability)]
    subprocess.run(code, env=environment, check=True)


@pytest.mark.gpu
@pytest.mark.skipif(paths.INTERPRETED, reason='there is no GPU')
@pytest.mark.parametrize('masked', [False, True])
def test_a_gpu_takes_them_and_never_waits(masked, monkeypatch):
    monkeypatch.undo()
    student, teacher = (x.cuda() for x in prediction('ordinary', (2, 19, 64, 64)))
    mask = torch.ones((2, 64, 64), dtype=torch.bool, device='cuda') if masked else None
    path = dist_loss.choose_path(student, teacher, 'softmax')
    assert path is fused_gpu.correlations
    run(DISTLoss(), student, teacher, mask)  # compiles
    torch.cuda.set_sync_debug_mode('error')
    try:
        run(DISTLoss(), student, teacher, mask)
    finally:
        torch.cuda.set_sync_debug_mode('default')
