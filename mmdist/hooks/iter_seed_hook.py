"""Make a resumed run draw the same random numbers."""

from __future__ import annotations

import random

import numpy as np
import torch
from mmengine.dist import get_rank
from mmengine.hooks import Hook
from mmengine.runner import Runner

from mmdist.lookup import in_words
from mmdist.registry import HOOKS


@HOOKS.register_module()
@in_words
class IterSeedHook(Hook):
    """Seeds each iteration from the run's seed, the iteration and the rank.

    mmengine's checkpoints do not store the state of random number generators. With this
    hook, a resumed run draws the same numbers (dropout, sampled proposals) as an
    uninterrupted one. Augmentation in worker processes has its own generators;
    docs/reliability.md says when these repeat too.
    """

    priority = 'VERY_HIGH'  # before hooks that draw

    def before_train_epoch(self, runner: Runner) -> None:
        """Seed the draws before the epoch's first iteration, which load its data."""
        self._seed(runner, 1)

    def before_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: dict | None = None
    ) -> None:
        """Seed the draws of the iteration, and of loading the next one's data."""
        self._seed(runner, 0)

    def _seed(self, runner: Runner, purpose: int) -> None:
        entropy = (runner.seed, runner.iter, get_rank(), purpose)
        seed, *_ = np.random.SeedSequence(entropy).generate_state(1).tolist()
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
