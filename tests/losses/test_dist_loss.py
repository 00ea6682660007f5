from __future__ import annotations

import copy
import functools
import pickle

import numpy as np
import paths
import published
import pytest
import torch
from scipy.stats import pearsonr
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks import textbook
from mmdist.losses import DISTLoss, dist_loss
from mmdist.losses.correlations import cpu as fused
from mmdist.registry import MODELS

SHAPES = [(12, 5), (2, 5, 6), (2, 4, 3, 2), (1, 3, 2, 2, 2)]
SETTINGS = [
    {},
    dict(activation='sigmoid'),
    dict(activation='identity'),
    dict(tau=4.0),
    dict(tau=0.5, scale_by_tau=False),
    dict(activation='sigmoid', beta=2.0, gamma=0.5, loss_weight=3.0),
    dict(beta=0.0),
    dict(gamma=0.0, tau=2.0),
]


@pytest.fixture(autouse=True, params=['plain', 'fast', 'fast in many tiles', 'kernels'])
def path(request, monkeypatch):
    """Every test runs on each of the ways in which the loss is computed."""
    if request.param == 'plain':
        monkeypatch.setattr(dist_loss, 'choose_path', paths.plain)
    elif request.param == 'kernels':
        monkeypatch.setattr(dist_loss, 'choose_path', paths.kernels)
    elif request.param == 'fast in many tiles':
        monkeypatch.setattr(fused, 'MIN_TILE', 40)
        monkeypatch.setattr(fused, 'MAX_TILE', 40)
    return request.param


def logits(shape, seed=0, scale=2.0):
    """Student's and teacher's logits, which agree somewhat."""
    rng = np.random.default_rng(seed)
    teacher = rng.normal(size=shape) * scale
    return teacher * 0.5 + rng.normal(size=shape) * scale, teacher


def textbook_of(activation, student, teacher, mask=None):
    return textbook.dist_loss(student, teacher, activation)


def value_and_grad(loss, student, teacher, mask=None, dtype=torch.float64):
    student = torch.tensor(student, dtype=dtype, requires_grad=True)
    mask = None if mask is None else torch.tensor(mask)
    value = loss(student, torch.tensor(teacher, dtype=dtype), mask)
    value.backward()
    return value.item(), student.grad


@pytest.mark.parametrize('shape', SHAPES)
@pytest.mark.parametrize('kwargs', SETTINGS, ids=str)
def test_is_the_published_formula(shape, kwargs):
    student, teacher = logits(shape)
    value, grad = value_and_grad(DISTLoss(**kwargs), student, teacher)
    assert value == pytest.approx(
        published.dist_loss(student, teacher, **kwargs), rel=1e-9
    )
    oracle = published.gradient(student, teacher, **kwargs)
    np.testing.assert_allclose(grad, oracle, rtol=0, atol=1e-6 * np.abs(oracle).max())


@pytest.mark.parametrize('kwargs', SETTINGS, ids=str)
def test_fp32_is_the_published_formula(kwargs):
    student, teacher = logits((2, 19, 32, 24))
    value, _ = value_and_grad(DISTLoss(**kwargs), student, teacher, None, torch.float32)
    oracle = published.dist_loss(np.float32(student), np.float32(teacher), **kwargs)
    assert value == pytest.approx(oracle, rel=1e-5)


@pytest.mark.parametrize('kwargs', [{}, dict(activation='sigmoid', tau=2.0, beta=0.7)])
def test_textbook_of_the_benchmarks_is_the_published_formula(kwargs):
    student, teacher = logits((2, 5, 3, 2))
    ours = torch.tensor(student, requires_grad=True)
    value = textbook.dist_loss(ours, torch.tensor(teacher), **kwargs)
    value.backward()
    assert value.item() == pytest.approx(
        published.dist_loss(student, teacher, **kwargs)
    )
    oracle = published.gradient(student, teacher, **kwargs)
    np.testing.assert_allclose(ours.grad, oracle, rtol=0, atol=1e-7)


@pytest.mark.parametrize('activation', ['softmax', 'sigmoid'])
def test_every_pixel_is_an_instance(activation):
    student, teacher = logits((1, 4, 6, 5))
    loss = DISTLoss(activation=activation)
    _, grad = value_and_grad(loss, student, teacher)
    a, b = (published.scores(x, activation) for x in (student, teacher))
    assert loss.inter_corr.item() == pytest.approx(pearsonr(a, b, axis=1)[0].mean())
    assert loss.intra_corr.item() == pytest.approx(pearsonr(a, b, axis=0)[0].mean())
    # the batch-wise correlation of other libraries has gradient 0 for one image
    _, grad = value_and_grad(DISTLoss(beta=0, activation=activation), student, teacher)
    assert grad.abs().max() > 1e-4


@pytest.mark.parametrize('shape', SHAPES)
@pytest.mark.parametrize('kwargs', [{}, dict(activation='sigmoid', tau=2.0)], ids=str)
def test_mask_removes_rows(shape, kwargs):
    student, teacher = logits(shape)
    mask = np.random.default_rng(1).random((shape[0], *shape[2:])) < 0.6
    oracle = published.gradient(student, teacher, mask=mask, **kwargs)
    out = np.broadcast_to(~np.expand_dims(mask, 1), shape)
    poisons = [0.0, 1e4, np.nan, np.inf]
    for i, poison in enumerate(poisons):
        student[out], teacher[out] = poison, poisons[i - 1]
        for m in (mask, mask.reshape(-1)):
            loss = DISTLoss(**kwargs)
            value, grad = value_and_grad(loss, student, teacher, m)
            # values of rows left out are nan in the oracle's input as well
            assert value == pytest.approx(
                published.dist_loss(student, teacher, mask=mask, **kwargs), rel=1e-9
            )
            np.testing.assert_allclose(grad, oracle, rtol=0, atol=1e-7)
            assert (grad.numpy()[out] == 0).all()
            assert loss.inter_corr.isfinite() and loss.intra_corr.isfinite()


@pytest.mark.parametrize('fill', [0.0, float('nan')])
def test_no_row_counts(fill):
    weight = torch.ones(3, requires_grad=True)
    student = torch.full((4, 3), fill) * weight
    loss = DISTLoss()
    value = loss(student, torch.full((4, 3), fill), torch.zeros(4, dtype=torch.bool))
    value.backward()
    assert value.item() == 0
    assert loss.inter_corr.item() == loss.intra_corr.item() == 0
    if fill == 0:
        assert weight.grad.tolist() == [0, 0, 0]


def test_no_rows():
    weight = torch.ones(3, requires_grad=True)
    for shape in ((0, 3), (0, 3, 2, 2)):
        student = torch.zeros(shape)
        student = student * weight.reshape(1, 3, *[1] * (student.ndim - 2))
        value = DISTLoss()(student, torch.zeros(shape))
        value.backward()
        assert value.item() == 0
    assert weight.grad.tolist() == [0, 0, 0]


def test_both_terms_left_out():
    student, teacher = logits((12, 5))
    value, grad = value_and_grad(DISTLoss(beta=0, gamma=0), student, teacher)
    assert value == 0 and (grad == 0).all()


def degenerate(name, dtype):
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn((2, 64, 9), generator=g) * 3
    if name == 'constant rows':
        x[::2] = 1.7
    elif name == 'constant columns':
        x[:, ::2] = 1.7
    elif name == 'constant teacher':
        y[:] = 0.3
    elif name == 'zeros':
        x[:] = 0
    elif name == 'one row':
        x, y = x[:1], y[:1]
    elif name == 'one class':
        x, y = x[:, :1], y[:, :1]
    elif name == 'saturated':
        x, y = x.sign() * 1e4, y.sign() * 1e4
    elif name == 'one saturated class':
        x[:, 0], y[:, 1] = 1e4, 1e4
    elif name == 'a saturated row':
        x[0], y[1] = 1e4, -1e4
    return x.to(dtype), y.to(dtype)


@pytest.mark.parametrize('activation', ['softmax', 'sigmoid', 'identity'])
@pytest.mark.parametrize('autocast', [None, torch.bfloat16])
@pytest.mark.parametrize(
    'dtype', [torch.float16, torch.bfloat16, torch.float32, torch.float64]
)
@pytest.mark.parametrize(
    'name',
    [
        'ordinary',
        'constant rows',
        'constant columns',
        'constant teacher',
        'zeros',
        'one row',
        'one class',
        'saturated',
        'one saturated class',
        'a saturated row',
    ],
)
def test_degenerate_input(name, dtype, autocast, activation):
    student, teacher = degenerate(name, dtype)
    student.requires_grad_()
    loss = DISTLoss(activation=activation)
    with torch.autocast('cpu', autocast, enabled=autocast is not None):
        value = loss(student, teacher)
    value.backward()
    assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert 0 <= value.item() <= 4
    assert student.grad.dtype == dtype
    assert student.grad.isfinite().all()
    assert student.grad.abs().max() < 10
    # half-precision inputs are read as they are and computed on in fp32
    oracle = published.dist_loss(
        student.detach().double(), teacher.double(), activation
    )
    assert value.item() == pytest.approx(oracle, abs=2e-5)


def test_zero_student_gets_no_gradient():
    """The published formula gives it 5.6e6: 1 / eps."""
    for shape in ((8, 5), (1, 81), (2, 19, 16, 16)):
        student = torch.zeros(shape, requires_grad=True)
        DISTLoss()(student, torch.randn(shape)).backward()
        assert (student.grad == 0).all()


@pytest.mark.parametrize('activation', ['softmax', 'sigmoid'])
@pytest.mark.parametrize('size', 10.0 ** np.arange(-9, 2))
def test_gradient_is_bounded_near_a_constant(size, activation):
    student, teacher = logits((64, 9))
    student = student * size
    _, grad = value_and_grad(
        DISTLoss(activation=activation), student, teacher, None, torch.float32
    )
    assert grad.isfinite().all()
    # one row's correlation: 1 / (MIN_SPREAD * norm), times the scores' own slope
    assert grad.norm(dim=1).max() <= 1.1e6 / len(student)
    if size > 1e-4:  # and well above rounding it is the true gradient
        student, teacher = np.float32(student), np.float32(teacher)
        _, oracle = value_and_grad(
            functools.partial(textbook_of, activation), student, teacher
        )
        error = (grad - oracle).norm() / oracle.norm()
        assert error < 1e-4


@pytest.mark.parametrize('kwargs', SETTINGS, ids=str)
@pytest.mark.parametrize('masked', [False, True])
def test_gradcheck(path, kwargs, masked):
    student, teacher = (torch.tensor(x) for x in logits((2, 4, 3, 2)))
    mask = (
        torch.tensor([1, 1, 0, 1, 1, 1] * 2).bool().reshape(2, 3, 2) if masked else None
    )
    loss = DISTLoss(**kwargs)
    assert torch.autograd.gradcheck(
        lambda x: loss(x, teacher, mask),
        student.requires_grad_(),
        fast_mode=path == 'kernels',  # one direction; interpreted, each call takes long
    )


def test_teacher_gets_no_gradient():
    student, teacher = (torch.tensor(x, requires_grad=True) for x in logits((8, 3)))
    DISTLoss()(student, teacher).backward()
    assert teacher.grad is None and student.grad is not None


@pytest.mark.parametrize('activation', ['softmax', 'sigmoid', 'identity'])
@pytest.mark.parametrize('dtype', [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize('bad', [float('nan'), float('inf'), -float('inf')])
def test_bad_teacher_is_named(bad, dtype, activation):
    student, teacher = (torch.tensor(x, dtype=dtype) for x in logits((2, 5, 4, 4)))
    teacher[1, 2, 3, 0] = bad
    loss = DISTLoss(activation=activation)
    with pytest.raises(ValueError, match=r'teacher.*checkpoint'):
        loss(student, teacher)
    mask = torch.ones(2, 4, 4, dtype=torch.bool)
    with pytest.raises(ValueError, match=r'teacher.*checkpoint'):
        loss(student, teacher, mask)
    mask[1, 3, 0] = False
    assert loss(student, teacher, mask).isfinite()


def test_large_finite_teacher_is_not_bad():
    student, teacher = (torch.tensor(x).half() for x in logits((2, 5, 40, 40)))
    teacher = teacher.abs() + 6e4  # its sum overflows fp16
    assert DISTLoss()(student, teacher).isfinite()


def test_nan_of_the_student_is_not_hidden():
    """So that a GradScaler skips the step, or a loss check stops the run."""
    for bad in (float('nan'), float('inf')):
        student, teacher = (torch.tensor(x) for x in logits((2, 5, 4, 4)))
        student[1, 2, 3, 0] = bad
        student.requires_grad_()
        value = DISTLoss()(student, teacher)
        value.backward()
        assert not value.isfinite() and not student.grad.isfinite().all()


def test_wrong_arguments():
    x = torch.rand(4, 3, 2, 2)
    with pytest.raises(ValueError, match=r"'sofmax'.*'softmax', 'sigmoid', 'identity'"):
        DISTLoss(activation='sofmax')
    with pytest.raises(ValueError, match='tau'):
        DISTLoss(tau=0)
    loss = DISTLoss()
    with pytest.raises(ValueError, match=r'\(4, 3, 2, 2\).*\(4, 2, 2, 2\).*[Mm]ap the'):
        loss(x, x[:, :2])
    with pytest.raises(ValueError, match='rows, classes'):
        loss(x[0, 0, 0], x[0, 0, 0])
    with pytest.raises(TypeError, match=r'teacher.*int64'):
        loss(x, x.long())
    with pytest.raises(TypeError, match=r'student.*int64'):
        loss(x.long(), x)
    with pytest.raises(ValueError, match=r'mask.*\(4, 3, 2, 2\).*\(4, 2, 2\)'):
        loss(x, x, x > 0)
    with pytest.raises(TypeError, match='bool'):
        loss(x, x, torch.ones(4, 2, 2))


def test_correlations_of_the_last_call():
    student, teacher = (torch.tensor(x, requires_grad=True) for x in logits((9, 4)))
    loss = DISTLoss(beta=0)
    value = loss(student, teacher)
    for corr in (loss.inter_corr, loss.intra_corr):
        assert corr.shape == () and not corr.requires_grad
    assert value.item() == pytest.approx(1 - loss.intra_corr.item())
    assert not loss.state_dict()
    copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))


@pytest.mark.parametrize('masked', [False, True])
def test_no_step_waits_for_the_gpu(path, masked):
    """A fake GPU tensor has no values: reading one raises."""
    if path == 'kernels':
        pytest.skip('they take no fake tensors; distillation/test_no_waiting.py')
    with FakeTensorMode():
        student, teacher = torch.empty((2, 2, 5, 8, 8), device='cuda').unbind()
        with pytest.raises(Exception, match=r'data-dependent|aten._local_scalar_dense'):
            bool(student.sum() > 0)
        mask = torch.empty((2, 8, 8), dtype=torch.bool, device='cuda')
        mask = mask if masked else None
        loss = DISTLoss()
        assert loss(student, teacher, mask).device.type == 'cuda'
        assert loss.inter_corr.device.type == loss.intra_corr.device.type == 'cuda'


def test_is_in_the_registry():
    assert isinstance(MODELS.build(dict(type='mmdist.DISTLoss', tau=2)), DISTLoss)
