"""A hook that watches a training, and one that removes labels."""

from __future__ import annotations

from collections.abc import Callable

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
    """Removes labels, of other images in each process and iteration."""

    def before_train_iter(self, runner, batch_idx, data_batch=None) -> None:
        unlabel(data_batch['data_samples'], runner.iter)


def unlabel(data_samples: list, iteration: int) -> None:
    """Mark both, the first or none of two images unlabelled, by iteration and rank."""
    turn = (iteration + get_rank()) % 3
    for i, sample in enumerate(data_samples):
        sample.set_metainfo(dict(unlabelled=turn == 0 or (turn == 1 and i == 0)))


def watched(runner) -> WatchHook:
    return next(hook for hook in runner.hooks if isinstance(hook, WatchHook))


def student(runner):
    model = runner.model
    return model.module if is_model_wrapper(model) else model
