"""A hook that sees a training, and processes to train in."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import socket
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from unittest import mock

import torch
from mmengine.dist import get_rank
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.registry import HOOKS


@HOOKS.register_module()
class WatchHook(Hook):
    """Keeps the losses of each iteration, and what ``after`` returns.

    Attributes:
        after: Called with the Runner and the iteration's outputs.
    """

    after: Callable | None = None

    def __init__(self) -> None:
        self.losses: dict[int, dict[str, float]] = {}
        self.seen = []

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        self.losses[runner.iter] = {
            k: torch.as_tensor(v).item() for k, v in outputs.items()
        }
        if WatchHook.after is not None:
            self.seen.append(WatchHook.after(runner, outputs))


class Unlabel(Hook):
    """Takes the labels of another mix of images in each process and iteration."""

    def before_train_iter(self, runner, batch_idx, data_batch=None) -> None:
        unlabel(data_batch['data_samples'], runner.iter)


def unlabel(data_samples: list, iteration: int) -> None:
    """Of two images both, the first or none is unlabelled: by iteration and rank."""
    turn = (iteration + get_rank()) % 3
    for i, sample in enumerate(data_samples):
        sample.set_metainfo(dict(unlabelled=turn == 0 or (turn == 1 and i == 0)))


def student(runner):
    model = runner.model
    return model.module if is_model_wrapper(model) else model


def in_processes(target: Callable, *args, world_size: int = 1, folder: Path) -> list:
    """Call ``target(*args)`` in processes that form a gloo group, if several.

    They are forked from a server that has imported the libraries once. They have no
    GPU, so that every machine runs the same test.

    Returns:
        What each process returned; its exit code if it returned nothing.
    """
    context = multiprocessing.get_context('forkserver')
    context.set_forkserver_preload(['mmdet.apis', 'mmseg.apis', 'mmdist.distiller'])
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    with mock.patch.dict(os.environ, CUDA_VISIBLE_DEVICES='', OMP_NUM_THREADS='1'):
        processes = [
            context.Process(
                target=_enter, args=(target, args, rank, world_size, port, folder)
            )
            for rank in range(world_size)
        ]
        for process in processes:
            process.start()
    results = []
    for rank, process in enumerate(processes):
        process.join()
        path = folder / f'result{rank}'
        if path.exists():
            results.append(pickle.loads(path.read_bytes()))
            path.unlink()
        else:
            results.append(process.exitcode)
    return results


def _enter(target, args, rank, world_size, port, folder):
    torch.set_num_threads(1)
    os.environ.update(
        CUDA_VISIBLE_DEVICES='',
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        MASTER_ADDR='127.0.0.1',
        MASTER_PORT=str(port),
    )
    if world_size > 1:
        # a process that waits for a call that never comes fails, and does not hang
        torch.distributed.init_process_group('gloo', timeout=timedelta(seconds=60))
    result = target(*args)
    (folder / f'result{rank}').write_bytes(pickle.dumps(result))
    if world_size > 1:
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
