from __future__ import annotations

import copy
import functools
import pickle

import numpy as np
import published
import pytest
import torch
import torch.nn.functional as F
from mmengine.registry import DefaultScope
from predictions import logits, run, value_and_grad
from scipy.special import expit
from scipy.stats import pearsonr
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks import textbook
from mmdist.losses import DISTLoss

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


@pytest.mark.parametrize('eps', [0.0, 1e-8])
@pytest.mark.parametrize('shape', SHAPES)
@pytest.mark.parametrize('kwargs', SETTINGS, ids=str)
def test_is_the_published_formula(make_loss, shape, kwargs, eps):
    student, teacher = logits(shape)
    value, grad = value_and_grad(make_loss(**kwargs, eps=eps), student, teacher)
    oracle = published.value_and_gradient(student, teacher, **kwargs, eps=eps)
    assert value == pytest.approx(oracle[0], rel=1e-9)
    np.testing.assert_allclose(grad, oracle[1], atol=1e-9 * np.abs(oracle[1]).max())


@pytest.mark.parametrize('eps', [0.0, 1e-2])
@pytest.mark.parametrize(
    'kwargs', [{}, dict(activation='sigmoid', tau=2.0, beta=0.7), SETTINGS[2]], ids=str
)
def test_textbook_of_the_benchmarks_is_the_published_formula(kwargs, eps):
    """And the gradient of the oracle is that of its value, by autograd."""
    student, teacher = logits((2, 5, 3, 2))
    formula = functools.partial(textbook.dist_loss, **kwargs, eps=eps)
    value, grad = run(formula, torch.tensor(student), torch.tensor(teacher))
    oracle = published.value_and_gradient(student, teacher, **kwargs, eps=eps)
    assert value == pytest.approx(oracle[0])
    np.testing.assert_allclose(grad, oracle[1], atol=1e-12)


@pytest.mark.parametrize('shape', SHAPES)
@pytest.mark.parametrize(
    'kwargs', [{}, dict(activation='sigmoid', tau=2.0, loss_weight=0.1)], ids=str
)
def test_mask_removes_rows(make_loss, shape, kwargs):
    student, teacher = logits(shape)
    mask = np.random.default_rng(1).random((shape[0], *shape[2:])) < 0.6
    oracle = published.value_and_gradient(student, teacher, mask=mask, **kwargs)
    out = np.broadcast_to(~np.expand_dims(mask, 1), shape)
    poisons = [0.0, 1e4, np.nan, np.inf]
    for i, poison in enumerate(poisons):
        student[out], teacher[out] = poison, poisons[i - 1]
        for m in (mask, mask.reshape(-1)):
            loss = make_loss(**kwargs)
            value, grad = value_and_grad(loss, student, teacher, m)
            assert value == pytest.approx(oracle[0], rel=1e-9)
            np.testing.assert_allclose(grad, oracle[1], rtol=0, atol=1e-9)
            assert (grad.numpy()[out] == 0).all()
            assert loss.inter_corr.isfinite() and loss.intra_corr.isfinite()


@pytest.mark.parametrize('fill', [0.0, np.nan])
@pytest.mark.parametrize('shape', [(4, 3), (0, 3), (0, 3, 2, 2)])
def test_no_row_counts(make_loss, shape, fill):
    mask = np.zeros((shape[0], *shape[2:]), bool) if shape[0] else None
    loss = make_loss()
    value, grad = value_and_grad(loss, *[np.full(shape, fill)] * 2, mask)
    assert value == loss.inter_corr == loss.intra_corr == 0
    assert grad.shape == shape and not grad.any()


def test_both_terms_left_out(make_loss):
    value, grad = value_and_grad(make_loss(beta=0, gamma=0), *logits((12, 5)))
    assert value == 0 and not grad.any()


DEGENERATE = {
    'constant rows': lambda x, y: x[::2].fill_(1.7),
    'constant columns': lambda x, y: x[:, ::2].fill_(1.7),
    'constant teacher': lambda x, y: y.fill_(0.3),
    'zeros': lambda x, y: x.zero_(),
    'saturated': lambda x, y: (x.sign_().mul_(1e4), y.sign_().mul_(1e4)),
    'one saturated class': lambda x, y: (x[:, 0].fill_(1e4), y[:, 1].fill_(1e4)),
    'a saturated row': lambda x, y: (x[0].fill_(1e4), y[1].fill_(-1e4)),
}


def degenerate(name):
    shape = {'one row': (1, 9), 'one class': (64, 1)}.get(name, (64, 9))
    x, y = torch.randn((2, *shape), generator=torch.Generator().manual_seed(0)) * 3
    if name in DEGENERATE:
        DEGENERATE[name](x, y)
    return x, y


@pytest.mark.parametrize('name', [*DEGENERATE, 'one row', 'one class'])
def test_degenerate_input(make_loss, name):
    """In half precision, where most can go wrong; the loss reads it as it is."""
    for activation in ('softmax', 'sigmoid', 'identity'):
        student, teacher = (x.half() for x in degenerate(name))
        value, grad = run(make_loss(activation=activation), student, teacher)
        assert value.dtype == torch.float32 and grad.dtype == torch.float16
        assert grad.abs().max() < 10  # fails for NaN
        if name == 'zeros':  # the published formula gives the teacher's norm / eps
            assert not grad.any()
        both = (x.double().numpy() for x in (student, teacher))
        oracle = published.dist_loss(*both, activation)
        assert value.item() == pytest.approx(oracle, abs=2e-5), activation


def test_autocast_changes_nothing(make_loss):
    both = [torch.tensor(x).float() for x in logits((2, 5, 4, 4))]
    expected = run(make_loss(), *both)
    with torch.autocast('cpu', torch.bfloat16):
        found = run(make_loss(), *both)
    assert found[0].dtype == torch.float32
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize('offset', [0.0, -4.6, -12.0, 12.0])
@pytest.mark.parametrize('scale', [1e-3, 1.0, 18.0])
def test_the_same_logits_correlate_at_1_on_any_scale(path, make_loss, scale, offset):
    logits = torch.randn((40, 3), generator=torch.Generator().manual_seed(0))
    logits = logits * scale + offset
    activations = ['softmax', 'sigmoid', 'identity']
    if path == 'plain' and max(scale, offset) >= 12:
        # it is all fp32, where sigmoids near 1 are constant
        activations.remove('sigmoid')
    for activation in activations:
        loss = make_loss(activation=activation)
        value, grad = run(loss, logits, logits)
        for corr in (loss.inter_corr, loss.intra_corr, 1 - value):
            assert corr.item() == pytest.approx(1, abs=2e-6), activation
        assert grad.norm() < 1e-2


def test_a_new_retinanet_head_and_its_copy_correlate_at_1():
    """All its scores are near 0.01: their norms are small against the published eps."""
    # the loss itself, and its other tests, need no mmdet
    heads = pytest.importorskip('mmdet.models.dense_heads')
    torch.manual_seed(0)
    with DefaultScope.overwrite_default_scope('mmdet'):
        head = heads.RetinaHead(num_classes=80, in_channels=256)
    head.init_weights()
    levels, _ = head([torch.randn(1, 256, size, size) / 5 for size in (8, 4, 2)])
    for level in levels:
        for eps in (0.0, 1e-8):
            loss = DISTLoss(activation='sigmoid', eps=eps)
            value = loss(level, level)
            same = [level.detach().numpy()] * 2
            expected = published.dist_loss(*same, 'sigmoid', eps=eps)
            assert value.item() == pytest.approx(expected, abs=1e-5)
            assert (loss.inter_corr < 0.9) == (loss.intra_corr < 0.9) == bool(eps)


def test_a_row_that_is_saturated_as_a_whole_has_a_relation():
    """And p and 1 - p have the same one; see the docstring of `DISTLoss`."""
    teacher = torch.tensor([[14.0, 17.0, 20.0], [-3.0, 2.0, 1.0]])
    student = torch.tensor([[20.0, 15.0, 16.0], [1.0, -1.0, 2.0]])
    loss = DISTLoss(activation='sigmoid', gamma=0)
    a, b = expit(-student.double().numpy()), expit(-teacher.double().numpy())
    expected = pearsonr(a, b, axis=1).statistic.mean()
    for sign in (1, -1):
        loss(sign * student, sign * teacher)
        assert loss.inter_corr.item() == pytest.approx(expected, abs=1e-6)
    beyond = torch.tensor([[45.0, 50.0, 55.0]])
    for sign in (1, -1):
        loss(sign * beyond, sign * beyond)
        assert loss.inter_corr.item() == 0


@pytest.mark.parametrize('activation', ['softmax', 'sigmoid'])
@pytest.mark.parametrize('size', 10.0 ** np.arange(-9, 2))
def test_gradient_is_bounded_near_a_constant(make_loss, size, activation):
    student, teacher = logits((64, 9))
    student = np.float32(student * size)
    loss = make_loss(activation=activation)
    _, grad = value_and_grad(loss, student, teacher, dtype=torch.float32)
    assert grad.isfinite().all()
    # one row's correlation: 1 / (MIN_SPREAD * norm), times the scores' own slope
    assert grad.norm(dim=1).max() <= 1.1e6 / len(student)
    if size > 1e-4:  # well above rounding, it is the true gradient
        _, oracle, _ = published.value_and_gradient(student, teacher, activation)
        error = np.linalg.norm(grad.numpy() - oracle) / np.linalg.norm(oracle)
        assert error < 1e-4


@pytest.mark.parametrize('masked', [False, True])
def test_second_derivative(make_loss, masked):
    student, teacher = (torch.tensor(x) for x in logits((2, 4, 3, 2)))
    mask = torch.tensor([1, 1, 0, 1, 1, 1] * 2).bool() if masked else None
    for kwargs in (dict(activation='sigmoid', gamma=0.0), dict(tau=2.0)):
        loss = make_loss(**kwargs)
        assert torch.autograd.gradgradcheck(
            lambda x, loss=loss: loss(x, teacher, mask),
            student.requires_grad_(),
            fast_mode=True,
        )


@pytest.mark.parametrize('activation', ['softmax', 'sigmoid', 'identity'])
@pytest.mark.parametrize('shape', [(1000, 2), (2, 20), (2, 2)])
def test_two_scores_have_no_gradient(make_loss, shape, activation):
    """They correlate at 1 or -1, whatever their values."""
    student, teacher = map(np.float32, logits(shape, scale=0.1))
    kwargs = dict(activation=activation)
    if shape != (2, 2):
        kwargs |= dict(beta=float(shape[1] == 2), gamma=float(shape[0] == 2))
    loss = make_loss(**kwargs)
    value, grad = value_and_grad(loss, student, teacher, dtype=torch.float32)
    assert not grad.any()
    expected = published.dist_loss(student, teacher, **kwargs)
    assert value == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize('scale', [1e-9, 1e-3, 1e12, 1e19, 1e30])
def test_a_correlation_is_the_same_on_any_scale(path, make_loss, scale):
    """The squares of the largest are inf in fp32."""
    student, teacher = (np.float32(x * scale) for x in logits((2, 5, 6)))
    loss = make_loss(activation='identity')
    value, grad = value_and_grad(loss, student, teacher, dtype=torch.float32)
    oracle = published.value_and_gradient(student, teacher, 'identity')
    assert value == pytest.approx(oracle[0], rel=1e-4)
    assert grad.isfinite().all()
    if path != 'gpu' or scale < 1e15:  # it keeps factors of the gradient in fp32
        grad, expected = grad.double().numpy() * scale, oracle[1] * scale
        np.testing.assert_allclose(grad, expected, rtol=0, atol=1e-4)


def test_teacher_and_mask_from_inference_mode():
    student, teacher = logits((12, 5))
    mask = np.arange(12) % 3 > 0
    expected = value_and_grad(DISTLoss(), student, teacher, mask)
    with torch.inference_mode():
        teacher, mask = torch.tensor(teacher), torch.tensor(mask)
        value = DISTLoss()(torch.tensor(student), teacher, mask)
    assert value.item() == pytest.approx(expected[0])
    student = torch.tensor(student, requires_grad=True)
    DISTLoss()(student, teacher, mask).backward()
    torch.testing.assert_close(student.grad, expected[1])


def test_transforms_of_torch_func():
    student, teacher = logits((3, 12, 5))
    results = map(published.value_and_gradient, student, teacher)
    values, grads, _ = (torch.tensor(np.array(x)) for x in zip(*results, strict=True))
    student, teacher = torch.tensor(student), torch.tensor(teacher)
    loss = DISTLoss()
    torch.testing.assert_close(torch.func.vmap(loss)(student, teacher), values)
    got = torch.func.vmap(torch.func.grad(loss))(student, teacher)
    torch.testing.assert_close(got, grads)
    got = torch.func.jvp(lambda x: loss(x, teacher[0]), (student[0],), (teacher[0],))
    torch.testing.assert_close(got[1], (grads[0] * teacher[0]).sum())


@pytest.mark.parametrize('masked', [False, True])
def test_meta_tensors(masked):
    student, teacher = torch.empty((2, 2, 5, 8), device='meta').unbind()
    mask = torch.ones((2, 8), dtype=torch.bool, device='meta') if masked else None
    student.requires_grad_()
    for kwargs in ({}, dict(activation='identity')):
        DISTLoss(**kwargs)(student, teacher, mask).backward()
        assert student.grad.shape == student.shape


def test_is_compiled_as_one_graph():
    student, teacher = logits((12, 5))
    mask = np.arange(12) % 3 > 0
    expected = value_and_grad(DISTLoss(), student, teacher, mask)
    loss = torch.compile(DISTLoss(), backend='eager', fullgraph=True)
    value, grad = value_and_grad(loss, student, teacher, mask)
    assert value == pytest.approx(expected[0])
    torch.testing.assert_close(grad, expected[1])
    teacher[1] = np.nan
    with pytest.raises(RuntimeError, match="The teacher's logits contain NaN"):
        value_and_grad(loss, student, teacher, mask)


@pytest.mark.parametrize(
    ('bad', 'dtype', 'activation'),
    [
        (float('nan'), torch.float16, 'softmax'),
        (float('inf'), torch.float32, 'sigmoid'),
        (-float('inf'), torch.float64, 'identity'),
        (float('nan'), torch.float64, 'identity'),
    ],
)
def test_bad_teacher_is_named(make_loss, bad, dtype, activation):
    student, teacher = (torch.tensor(x, dtype=dtype) for x in logits((2, 5, 4, 4)))
    teacher[1, 2, 3, 0] = bad
    loss = make_loss(activation=activation)
    mask = torch.ones(2, 4, 4, dtype=torch.bool)
    for some in (None, mask):
        with pytest.raises(ValueError, match=r'teacher.*checkpoint'):
            loss(student, teacher, some)
    mask[1, 3, 0] = False
    assert loss(student, teacher, mask).isfinite()


def test_large_finite_teacher_is_not_bad(make_loss):
    student, teacher = (torch.tensor(x).half() for x in logits((2, 5, 4, 4)))
    teacher = teacher.abs() + 6e4  # its sum overflows fp16
    assert make_loss()(student, teacher).isfinite()


def test_nan_of_the_student_is_not_hidden(make_loss):
    """So that a GradScaler skips the step, or a loss check stops the run."""
    student, teacher = logits((2, 5, 4, 4))
    for bad in (np.nan, np.inf):
        student[1, 2, 3, 0] = bad
        value, grad = value_and_grad(make_loss(), student, teacher)
        assert not value.isfinite() and not grad.isfinite().all()


def test_wrong_arguments():
    x = torch.rand(4, 3, 2, 2)
    with pytest.raises(ValueError, match=r"'sofmax'.*'softmax', 'sigmoid', 'identity'"):
        DISTLoss(activation='sofmax')
    with pytest.raises(ValueError, match='tau'):
        DISTLoss(tau=0)
    row = x[0, 0, 0]
    for error, message, *arguments in (
        (ValueError, r'\(4, 3, 2, 2\).*\(4, 2, 2, 2\).*[Mm]ap the', x, x[:, :2]),
        (ValueError, 'rows, classes', row, row),
        (TypeError, r'teacher.*int64', x, x.long()),
        (TypeError, r'student.*int64', x.long(), x),
        (ValueError, r'mask.*\(4, 3, 2, 2\).*\(4, 2, 2\)', x, x, x > 0),
        (TypeError, 'bool', x, x, torch.ones(4, 2, 2)),
    ):
        with pytest.raises(error, match=message):
            DISTLoss()(*arguments)


def test_terms_of_one_call(make_loss):
    """A call can change settings; the correlation of a term with weight 0 is None."""
    student, teacher = (torch.tensor(x, requires_grad=True) for x in logits((9, 4)))
    loss = make_loss()
    both = loss.terms(student, teacher)
    assert both.loss.item() == pytest.approx(2 - (both.inter + both.intra).item())
    assert both[1:] == (loss.inter_corr, loss.intra_corr)
    own = make_loss(activation='sigmoid', beta=0)
    value = own(student, teacher)
    assert value.item() == pytest.approx(1 - own.intra_corr.item())
    for corr in (own.inter_corr, own.intra_corr):
        assert corr.shape == () and not corr.requires_grad
    got = loss.terms(student, teacher, activation='sigmoid', beta=0)
    assert got == (value, None, own.intra_corr) and got.intra == loss.intra_corr
    assert make_loss(gamma=0).terms(student, teacher).intra is None
    assert loss(student, teacher) == both.loss  # for that one call only
    with pytest.raises(ValueError, match='sofmax'):
        loss.terms(student, teacher, activation='sofmax')
    assert not loss.state_dict()
    copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))


def test_small_logits_have_large_gradients():
    """What docs/how_dist_works.md says of them."""
    rng = torch.Generator().manual_seed(0)
    labels = torch.randint(5, (2000,), generator=rng)
    teacher = torch.randn(2000, 5, generator=rng) + 3 * F.one_hot(labels, 5)
    noise = torch.randn(2000, 5, generator=rng)

    def ratio(spread: float) -> float:
        student = (spread * noise).requires_grad_()
        losses = DISTLoss()(student, teacher), F.cross_entropy(student, labels)
        norms = [torch.autograd.grad(loss, student)[0].norm() for loss in losses]
        return float(norms[0] / norms[1])

    assert ratio(0.03) == pytest.approx(40, rel=0.1)
    assert ratio(5.0) < 1


@pytest.mark.parametrize('masked', [False, True])
def test_no_step_waits_for_the_gpu(masked):
    """A fake GPU tensor has no values: reading one raises."""
    with FakeTensorMode():
        student, teacher = torch.empty((2, 2, 5, 8, 8), device='cuda').unbind()
        with pytest.raises(Exception, match=r'data-dependent|aten._local_scalar_dense'):
            bool(student.sum() > 0)
        mask = torch.empty((2, 8, 8), dtype=torch.bool, device='cuda')
        mask = mask if masked else None
        loss = DISTLoss()
        assert loss(student, teacher, mask).device.type == 'cuda'
        assert loss.inter_corr.device.type == loss.intra_corr.device.type == 'cuda'
