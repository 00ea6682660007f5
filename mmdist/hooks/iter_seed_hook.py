"""Random numbers that a resumed run draws alike."""

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
    """Seeds each iteration by the run's seed, the iteration and the rank.

    mmengine's checkpoints hold no state of the random number generators. With this
    hook a run that is resumed draws the same numbers (dropout, sampled proposals) as
    one that was never interrupted: they depend on the iteration, not on what was drawn
    before.

    Augmentation in worker processes has generators of its own: docs/reliability.md says
    when those are repeated too.
    """

    priority = 'VERY_HIGH'  # before a hook that draws

    def before_train_epoch(self, runner: Runner) -> None:
        """Seed what is drawn before the epoch's first iteration, to load its data."""
        self._seed(runner, 1)

    def before_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: dict | None = None
    ) -> None:
        """Seed what the iteration draws, and the loading of the next one's data."""
        self._seed(runner, 0)

    def _seed(self, runner: Runner, purpose: int) -> None:
        entropy = (runner.seed, runner.iter, get_rank(), purpose)
        seed, *_ = np.random.SeedSequence(entropy).generate_state(1).tolist()
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
