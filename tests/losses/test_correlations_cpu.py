"""The CPU path and the plain path against the textbook formula in float64."""

from __future__ import annotations

import functools
import subprocess
import sys

import pytest
import torch
from predictions import FLAT, HARD, LAYOUTS, assert_close, kept_by, prediction, run

from benchmarks import textbook
from mmdist.losses import DISTLoss
from mmdist.losses.correlations import Settings, choose_path
from mmdist.losses.correlations.plain import pearson

# (N, classes, *spatial); large enough for several tiles each
SHAPES = [(2, 19, 96, 128), (1, 720, 20, 40), (3000, 81), (40, 16, 7, 7)]


@pytest.fixture
def set_threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def in_tiles(loss_on):
    """Builds the loss with tiles so small that these logits are cut into several."""
    return functools.partial(loss_on, 'cpu', 2**12)


def test_a_cpu_takes_this_path():
    assert choose_path(*torch.randn(2, 4, 3), 'softmax') == 'cpu'


@pytest.mark.parametrize('activation', ['softmax', 'sigmoid'])
@pytest.mark.parametrize('shape', SHAPES, ids=str)
@pytest.mark.parametrize(
    ('path', 'name'),
    # the plain path is all fp32, which rounds the spreads of FLAT away
    [('cpu', name) for name in HARD]
    + [('plain', name) for name in HARD if name not in FLAT],
)
def test_it_is_exact(loss_on, path, name, shape, activation):
    student, teacher = prediction(name, shape)
    loss = loss_on(path, 2**12, activation=activation, eps=1e-8)
    formula = functools.partial(textbook.dist_loss, activation=activation)
    oracle = run(formula, student.double(), teacher.double())
    assert_close(run(loss, student, teacher), oracle)


@pytest.mark.parametrize('layout', ['contiguous', 'channels last'])
def test_gradient_keeps_the_layout(in_tiles, layout):
    """Its values are those of any layout, see test_fuzz.py."""
    student, teacher = map(LAYOUTS[layout], prediction('ordinary', (2, 19, 24, 32)))
    assert run(in_tiles(), student, teacher)[1].stride() == student.stride()


def test_gradient_is_not_copied(in_tiles):
    """Autograd copies a gradient that something else still refers to."""
    student, teacher = prediction('ordinary', (2, 19, 96, 128))
    student.requires_grad_()
    given = []
    student.register_hook(lambda grad: given.append(grad.data_ptr()))
    for _ in range(10):
        in_tiles()(student, teacher).backward()
        assert student.grad.data_ptr() == given[-1]
        student.grad = None


def test_expanded_logits():
    both = prediction('ordinary', (1, 19, 24, 32))
    oracle = run(DISTLoss(), *(x.repeat(3, 1, 1, 1) for x in both))
    ours = run(DISTLoss(), *(x.expand(3, -1, -1, -1) for x in both))
    assert_close(ours, oracle, 1e-7, 1e-7)


def test_student_and_teacher_of_different_precision(in_tiles):
    student, teacher = prediction('ordinary', (2, 19, 24, 32))
    oracle = run(DISTLoss(), student.double(), teacher.double())
    ours = run(in_tiles(), student, teacher.double())
    assert ours[0].dtype == torch.float64 and ours[1].dtype == torch.float32
    assert_close(ours, oracle, 1e-12, 1e-6)


def test_graph_can_be_retained():
    student, teacher = prediction('ordinary', (2, 19, 24, 32))
    value = DISTLoss()(student.requires_grad_(), teacher)
    first, second = (
        torch.autograd.grad(value, student, retain_graph=True)[0] for _ in range(2)
    )
    assert torch.equal(first, second)


def test_same_result_every_time_whatever_the_threads(set_threads):
    """Also if their number changes between the passes."""
    student, teacher = prediction('ordinary', (2, 19, 96, 128))
    student.requires_grad_()
    results = []
    for number in (1, 1, 2, 2, 4, 4):
        set_threads(number)
        value = DISTLoss()(student, teacher)
        assert torch.get_num_threads() == number
        set_threads(5)
        results.append((value.detach(), *torch.autograd.grad(value, student)))
    for value, grad in results[1:]:
        assert value == pytest.approx(results[0][0].item(), rel=1e-7)
        torch.testing.assert_close(grad, results[0][1], rtol=1e-4, atol=1e-10)
    for one, two in zip(results[::2], results[1::2], strict=True):
        assert all(map(torch.equal, one, two))


@pytest.mark.slow
def test_starts_no_threads():
    """While threads of ours used torch, its own operations took twice as long."""
    code = (
        'import threading, torch; from mmdist.losses import DISTLoss\n'
        'torch.set_num_threads(2); before = threading.active_count()\n'
        'x = torch.randn(2, 19, 128, 256, requires_grad=True)\n'
        'DISTLoss()(x, torch.randn_like(x)).backward()\n'
        'assert threading.active_count() == before'
    )
    # a process of its own, in which no other test has started threads
    subprocess.run([sys.executable, '-c', code], check=True)


def test_logits_changed_in_place_are_noticed():
    student, teacher = (x.requires_grad_() for x in prediction('ordinary', (64, 9)))
    logits = student * 1
    value = DISTLoss()(logits, teacher)
    logits.add_(1)
    with pytest.raises(RuntimeError, match='modified by an inplace operation'):
        value.backward()


def test_nothing_large_is_kept():
    student, teacher = prediction('ordinary', (4, 19, 128, 256))
    storages = {x.untyped_storage().data_ptr() for x in (student, teacher)}
    kept = kept_by(DISTLoss(), student, teacher)
    others = [x for x in kept if x.untyped_storage().data_ptr() not in storages]
    # the factors u and v of each row, and those of the classes
    assert sum(x.numel() for x in others) < 2.01 * student.numel() / 19


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
@pytest.mark.parametrize('value', [0.0, 1.0, 1 / 3, 0.1, 1e-4, 1 / 1203, 123.456, -7.7])
@pytest.mark.parametrize('shape', [(1, 1), (1, 9), (9, 1), (100_003, 3), (5, 1203)])
def test_constant_has_no_relation(shape, value, dtype):
    a = torch.full(shape, value, dtype=dtype, requires_grad=True)
    b = torch.rand(shape, dtype=dtype)
    for dim in (0, 1):
        for x, y in ((a, b), (b, a)):
            corr = pearson(x, y, dim, None, Settings('identity'))
            (grad,) = torch.autograd.grad(corr.sum(), a)
            assert not corr.any() and not grad.any()
