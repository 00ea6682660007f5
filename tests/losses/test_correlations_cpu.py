"""The CPU path and the plain path against the textbook formula in float64."""

from __future__ import annotations

import subprocess
import sys

import paths
import pytest
import torch
from predictions import FLAT, NAMES, assert_close, prediction, run

from benchmarks import textbook
from mmdist.losses import DISTLoss
from mmdist.losses.correlations import choose_path

# (N, classes, *spatial); large enough for several tiles each
SHAPES = [(2, 19, 96, 128), (1, 720, 20, 40), (3000, 81), (40, 16, 7, 7)]


@pytest.fixture
def set_threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def in_tiles(**kwargs) -> DISTLoss:
    """The loss with tiles so small that these logits are cut into several."""
    loss = DISTLoss(**kwargs)
    loss.path = paths.of('cpu in many tiles', tile_size=2**12)
    return loss


def test_a_cpu_takes_this_path():
    assert choose_path(*torch.randn(2, 4, 3), 'softmax') == 'cpu'


@pytest.mark.parametrize('activation', ['softmax', 'sigmoid'])
@pytest.mark.parametrize('shape', SHAPES, ids=str)
@pytest.mark.parametrize(
    ('path', 'name'),
    # the plain path is all fp32, which rounds the spreads of FLAT away
    [('cpu', name) for name in NAMES]
    + [('plain', name) for name in NAMES if name not in FLAT],
)
def test_it_is_exact(path, name, shape, activation):
    student, teacher = prediction(name, shape)
    loss = in_tiles(activation=activation, eps=1e-8)
    if path == 'plain':
        loss.path = path
    oracle = run(
        lambda s, t: textbook.dist_loss(s, t, activation),
        student.double(),
        teacher.double(),
    )
    assert_close(run(loss, student, teacher), oracle)


def layouts(x):
    """The same values, laid out differently in memory."""
    big = x.new_zeros((x.shape[0], x.shape[1] + 1, x.shape[2] + 2, x.shape[3] + 3))
    big[:, 1:, 1:-1, 2:-1] = x
    return {
        'contiguous': x,
        'channels last': x.contiguous(memory_format=torch.channels_last),
        'a part of a larger one': big[:, 1:, 1:-1, 2:-1],
        'transposed': x.transpose(2, 3).contiguous().transpose(2, 3),
        'classes first': x.transpose(0, 1).contiguous().transpose(0, 1),
    }


@pytest.mark.parametrize('masked', [False, True])
@pytest.mark.parametrize('activation', ['softmax', 'sigmoid'])
def test_layout_does_not_matter(activation, masked):
    student, teacher = prediction('ordinary', (2, 19, 24, 32))
    mask = torch.rand((2, 24, 32)) < 0.5
    mask[0, :20] = False  # whole tiles without a row
    mask = mask if masked else None
    loss = in_tiles(activation=activation, tau=2.0)
    oracle = run(loss, student.double(), teacher.double(), mask)
    for s in layouts(student).values():
        for t in layouts(teacher).values():
            assert_close(run(loss, s, t, mask), oracle, 1e-6, 1e-6)


def test_gradient_keeps_the_layout():
    student, teacher = prediction('ordinary', (2, 19, 24, 32))
    student = student.contiguous(memory_format=torch.channels_last)
    assert student.stride() == run(DISTLoss(), student, teacher)[1].stride()


def test_gradient_is_not_copied():
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
    student, teacher = prediction('ordinary', (1, 19, 24, 32))
    oracle = run(DISTLoss(), student.repeat(3, 1, 1, 1), teacher.repeat(3, 1, 1, 1))
    ours = run(DISTLoss(), student.expand(3, -1, -1, -1), teacher.expand(3, -1, -1, -1))
    assert_close(ours, oracle, 1e-7, 1e-7)


@pytest.mark.parametrize('dtypes', [(torch.float32, torch.float64), (torch.half,) * 2])
def test_mixed_precision(dtypes):
    student, teacher = prediction('ordinary', (2, 19, 24, 32))
    student, teacher = student.to(dtypes[0]), teacher.to(dtypes[1])
    oracle = run(DISTLoss(), student.double(), teacher.double())
    ours = run(in_tiles(), student, teacher)
    assert ours[1].dtype == dtypes[0]
    assert_close(ours, oracle, 1e-6, 1e-6 if dtypes[0] != torch.half else 5e-2)


def test_graph_can_be_retained():
    student, teacher = prediction('ordinary', (2, 19, 24, 32))
    student.requires_grad_()
    value = DISTLoss()(student, teacher)
    (first,) = torch.autograd.grad(value, student, retain_graph=True)
    (second,) = torch.autograd.grad(value, student, retain_graph=True)
    assert torch.equal(first, second)


def test_same_result_every_time_whatever_the_threads(set_threads):
    student, teacher = prediction('ordinary', (2, 19, 96, 128))
    results = []
    for number in (1, 2, 4, 2):
        set_threads(number)
        results += [run(DISTLoss(), student, teacher) for _ in range(2)]
        assert torch.get_num_threads() == number
    for value, grad in results[1:]:
        assert value == pytest.approx(results[0][0].item(), rel=1e-7)
        torch.testing.assert_close(grad, results[0][1], rtol=1e-4, atol=1e-10)
    for one, two in zip(results[::2], results[1::2], strict=True):
        assert torch.equal(one[0], two[0]) and torch.equal(one[1], two[1])


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


@pytest.mark.parametrize('number', [1, 3])
def test_number_of_threads_may_change_between_the_passes(number, set_threads):
    set_threads(number)
    student, teacher = prediction('ordinary', (2, 19, 96, 128))
    expected = run(in_tiles(), student, teacher)[1]
    student.requires_grad_()
    value = in_tiles()(student, teacher)
    set_threads(5)
    value.backward()
    torch.testing.assert_close(student.grad, expected)


def test_bad_teacher_is_named_in_every_tile():
    student, teacher = prediction('ordinary', (2, 19, 96, 128))
    teacher[1, 5, 90, 100] = float('nan')
    with pytest.raises(ValueError, match='teacher'):
        in_tiles()(student, teacher)


def test_logits_changed_in_place_are_noticed():
    student, teacher = (x.requires_grad_() for x in prediction('ordinary', (64, 9)))
    logits = student * 1
    value = DISTLoss()(logits, teacher)
    logits.add_(1)
    with pytest.raises(RuntimeError, match='modified by an inplace operation'):
        value.backward()


def test_nothing_large_is_kept():
    student, teacher = prediction('ordinary', (4, 19, 128, 256))
    student.requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda x: kept.append(x) or x, lambda x: x
    ):
        DISTLoss()(student, teacher)
    storages = {x.untyped_storage().data_ptr() for x in (student, teacher)}
    others = [x for x in kept if x.untyped_storage().data_ptr() not in storages]
    # the factors u and v of each row, and those of the classes
    assert sum(x.numel() for x in others) < 2.01 * student.numel() / 19
