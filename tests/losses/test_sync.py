"""`sync=True`: k processes equal one process on the concatenated batch."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from predictions import INTERPRETED
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from mmdist.losses import DISTLoss

CLASSES = 6
# number of processes, kind of batches, arguments of the loss
CASES = [
    (2, 'uneven', {}),
    (2, 'no mask', dict(activation='sigmoid', tau=2.0)),
    (2, 'no images', {}),
    (2, 'none anywhere', {}),
    (4, 'no valid rows', dict(beta=0.5, gamma=2.0, loss_weight=3.0)),
    (4, 'uneven', dict(beta=0, activation='identity')),
]


def make_model():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(5, 8, 1), nn.ReLU(), nn.Conv2d(8, CLASSES, 1)
    ).double()


def make_batch(rank, case):
    """Images, teacher's logits and mask of one process; all differ by process."""
    g = torch.Generator().manual_seed(10 + rank)
    n = 1 + rank
    if case == 'no images' and rank == 1:
        n = 0
    # processes see different classes, as images do
    images = torch.randn((n, 5, 4, 3), generator=g).double() + 2 * rank
    teacher = torch.randn((n, CLASSES, 4, 3), generator=g).double() * 2
    teacher[:, rank % CLASSES] += 3
    mask = torch.rand((n, 4, 3), generator=g) < 0.7
    if (case == 'no valid rows' and rank == 1) or case == 'none anywhere':
        mask[:] = False
        images[:] = 0
    return images, teacher, mask


def in_each_process(case, kwargs):
    """The loss, both correlations and the gradients for the batch of this process."""
    rank = dist.get_rank()
    model = DistributedDataParallel(make_model())
    images, teacher, mask = make_batch(rank, case)
    loss = DISTLoss(sync=True, **kwargs)
    # the code paths of the loss exchange the same sums
    if rank == 0:
        loss.path = 'plain'
    if rank == 1 and INTERPRETED:
        loss.path = 'gpu'
    value = loss(model(images), teacher, None if case == 'no mask' else mask)
    value.backward()
    terms = [x.item() for x in (value, loss.inter_corr, loss.intra_corr)]
    return terms, [p.grad for p in model.parameters()]


def one_process(world_size, case, kwargs):
    batches = [make_batch(rank, case) for rank in range(world_size)]
    images, teacher, mask = (torch.cat(x) for x in zip(*batches, strict=True))
    model = make_model()
    loss = DISTLoss(**kwargs)
    value = loss(model(images), teacher, None if case == 'no mask' else mask)
    value.backward()
    return value, loss.inter_corr, loss.intra_corr, [p.grad for p in model.parameters()]


@pytest.mark.parametrize(('world_size', 'case', 'kwargs'), CASES)
def test_processes_equal_one(group_of, world_size, case, kwargs):
    *expected, grads = one_process(world_size, case, kwargs)
    expected = [x.item() for x in expected]
    for terms, found in group_of(world_size)(in_each_process, case, kwargs):
        assert terms == pytest.approx(expected, rel=1e-9)
        torch.testing.assert_close(found, grads, rtol=1e-9, atol=1e-12)
    if case != 'none anywhere':
        assert max(grad.abs().max() for grad in grads) > 1e-4


def test_without_sync_is_not_global():
    """The mean of the processes' local losses is a different value."""
    batches = [make_batch(rank, 'uneven') for rank in range(2)]
    model = make_model()
    local = [DISTLoss()(model(x), y, m).item() for x, y, m in batches]
    value = one_process(2, 'uneven', {})[0].item()
    assert abs(sum(local) / 2 - value) > 0.01


def test_one_process_needs_no_process_group():
    assert not dist.is_initialized()
    student, teacher = torch.randn(2, 8, 4)
    assert DISTLoss(sync=True)(student, teacher) == DISTLoss()(student, teacher)


def second_derivative():
    """What the error says, or None."""
    student, teacher = torch.randn(2, 8, 4)
    student.requires_grad_()
    value = DISTLoss(sync=True)(student, teacher)
    try:
        torch.autograd.grad(value, student, create_graph=True)
    except NotImplementedError as error:
        return str(error)


def test_a_second_derivative_over_processes_is_refused(group_of):
    for error in group_of(2)(second_derivative):
        assert 'Omit `create_graph=True` or `sync`.' in error
