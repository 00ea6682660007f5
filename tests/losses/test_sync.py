"""`sync=True`: k processes are one process on the concatenated batch."""

from __future__ import annotations

import functools
import os
import socket

import paths
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from mmdist.losses import DISTLoss
from mmdist.losses.correlations import gpu  # noqa: F401, a fork need not import it

CLASSES = 6
# by the number of processes: what their batches are like, and the loss
CASES = {
    2: [
        ('uneven', {}),
        ('no mask', dict(activation='sigmoid', tau=2.0)),
        ('no images', {}),
        ('none anywhere', {}),
    ],
    4: [
        ('no valid rows', dict(beta=0.5, gamma=2.0, loss_weight=3.0)),
        ('uneven', dict(beta=0, activation='identity')),
    ],
}


def make_model():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(5, 8, 1), nn.ReLU(), nn.Conv2d(8, CLASSES, 1)
    ).double()


def make_batch(rank, case):
    """Images, teacher's logits and mask of one process: uneven in all of them."""
    g = torch.Generator().manual_seed(10 + rank)
    n = 1 + rank
    if case == 'no images' and rank == 1:
        n = 0
    # each process sees other classes, as images do
    images = torch.randn((n, 5, 4, 3), generator=g).double() + 2 * rank
    teacher = torch.randn((n, CLASSES, 4, 3), generator=g).double() * 2
    teacher[:, rank % CLASSES] += 3
    mask = torch.rand((n, 4, 3), generator=g) < 0.7
    if (case == 'no valid rows' and rank == 1) or case == 'none anywhere':
        mask[:] = False
        images[:] = 0
    return images, teacher, mask


def run(rank, world_size, port, results):
    dist.init_process_group(
        'gloo', f'tcp://127.0.0.1:{port}', rank=rank, world_size=world_size
    )
    for number, (case, kwargs) in enumerate(CASES[world_size]):
        model = DistributedDataParallel(make_model())
        images, teacher, mask = make_batch(rank, case)
        loss = DISTLoss(sync=True, **kwargs)
        # the ways of computing the loss exchange the same sums
        if rank == 0:
            loss.path = 'plain'
        if rank == 1 and paths.INTERPRETED:
            loss.path = 'gpu'
        value = loss(model(images), teacher, None if case == 'no mask' else mask)
        value.backward()
        results[rank, number] = (
            value.item(),
            loss.inter_corr.item(),
            loss.intra_corr.item(),
            [p.grad.tolist() for p in model.parameters()],
        )
    dist.barrier()
    # torch may wait for ever for a thread of gloo while it takes the group down
    os._exit(0)


@pytest.fixture(scope='module')
def processes():
    """What each of so many processes got in each case."""

    @functools.cache
    def start(world_size):
        with socket.socket() as s:
            s.bind(('127.0.0.1', 0))
            port = s.getsockname()[1]
        with torch.multiprocessing.Manager() as manager:
            results = manager.dict()
            # a fork has all modules; not where a GPU may be in use
            method = 'spawn' if torch.cuda.is_available() else 'fork'
            torch.multiprocessing.start_processes(
                run,
                (world_size, port, results),
                nprocs=world_size,
                start_method=method,
            )
            return dict(results)

    return start


def one_process(world_size, case, kwargs):
    batches = [make_batch(rank, case) for rank in range(world_size)]
    images, teacher, mask = (torch.cat(x) for x in zip(*batches, strict=True))
    model = make_model()
    loss = DISTLoss(**kwargs)
    value = loss(model(images), teacher, None if case == 'no mask' else mask)
    value.backward()
    return value, loss.inter_corr, loss.intra_corr, [p.grad for p in model.parameters()]


@pytest.mark.parametrize(
    ('world_size', 'number'),
    [(size, number) for size in CASES for number in range(len(CASES[size]))],
)
def test_processes_equal_one(processes, world_size, number):
    case, kwargs = CASES[world_size][number]
    value, inter, intra, grads = one_process(world_size, case, kwargs)
    results = processes(world_size)
    results = [results[rank, number] for rank in range(world_size)]
    for got_value, got_inter, got_intra, got_grads in results:
        assert got_value == pytest.approx(value.item(), rel=1e-9)
        assert got_inter == pytest.approx(inter.item(), rel=1e-9)
        assert got_intra == pytest.approx(intra.item(), rel=1e-9)
        for got, grad in zip(got_grads, grads, strict=True):
            torch.testing.assert_close(
                torch.tensor(got, dtype=grad.dtype), grad, rtol=1e-9, atol=1e-12
            )
    if case != 'none anywhere':
        assert max(grad.abs().max() for grad in grads) > 1e-4


def test_without_sync_is_not_global():
    """The difference is real: the mean over processes of the local loss is another."""
    batches = [make_batch(rank, 'uneven') for rank in range(2)]
    model = make_model()
    local = [DISTLoss()(model(x), y, m).item() for x, y, m in batches]
    value = one_process(2, 'uneven', {})[0].item()
    assert abs(sum(local) / 2 - value) > 0.01


def test_one_process_needs_no_process_group():
    assert not dist.is_initialized()
    student, teacher = torch.randn(2, 8, 4)
    assert DISTLoss(sync=True)(student, teacher) == DISTLoss()(student, teacher)
