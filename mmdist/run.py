"""What the Runner knows about a training run, and what is watched during it."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from mmengine.dist import is_distributed
from mmengine.logging import MessageHub, print_log
from torch import Tensor
from torch.utils._pytree import tree_leaves

from .comparisons.base import Pair

NEVER = torch.iinfo(torch.long).max


def told(key: str, default: Any = None) -> Any:
    """A value that the Runner has put into mmengine's message hub."""
    return MessageHub.get_current_instance().get_info(key, default)


def refuse_untried_strategies() -> None:
    """Raise an error if FlexibleRunner hands the model to another library's engine.

    Such an engine leaves no mark on the model, but the Runner's config names it.
    """
    found = re.search(r'\b(DeepSpeed|ColossalAI)Strategy\b', told('cfg') or '')
    if found:
        raise NotImplementedError(
            f'mmdist does not support `{found[0]}`: it has never been tested with a '
            'teacher. Use `FSDPStrategy`, `DDPStrategy` or `SingleDeviceStrategy`, or '
            'omit `runner_type` and `strategy`.'
        )


class Watch:
    """Stops a diverged training, and warns of a comparison that teaches nothing.

    Both are tracked on the device and read every 50 steps, because reading waits for
    it. A single CPU process has nothing to wait for, so it reads losses in each step.
    """

    every = 50

    def __init__(self) -> None:
        self._steps = 0
        self._terms: tuple[str, ...] = ()
        self._lost_at: Tensor  # iteration of each term, from 1, or NEVER
        self._compared = 0
        self._counts: dict[str, Tensor | bool] = {}  # whether a row counted
        self._warned: set[str] = set()

    def losses(self, losses: Mapping[str, Any]) -> None:
        """Check the losses of a step; raise RuntimeError if some became non-finite.

        One that is finite again, as can happen in mixed precision, does not count.
        """
        if not torch.is_grad_enabled():
            return  # validation losses
        self._steps += 1
        iteration = told('iter', self._steps - 1) + 1
        found = [
            (name, leaf.detach().isfinite().all())
            for name, value in losses.items()
            if 'loss' in name
            for leaf in tree_leaves(value)
        ]
        if not found:
            return
        terms, finite = zip(*found, strict=True)
        finite = torch.stack(finite)
        if terms != self._terms:
            self._terms = terms
            self._lost_at = torch.full_like(finite, NEVER, dtype=torch.long)
        self._lost_at = self._lost_at.clamp(max=iteration).masked_fill(finite, NEVER)
        is_free = finite.device.type == 'cpu' and not is_distributed()
        is_last = iteration == told('max_iters')
        if is_free or is_last or self._steps % self.every == 0:
            self._stop_if_lost(self._lost_at.tolist())

    def _stop_if_lost(self, lost_at: list[int]) -> None:
        first = min(lost_at)
        if first == NEVER:
            return
        terms = {t for t, i in zip(self._terms, lost_at, strict=True) if i == first}
        path = last_checkpoint_before(first)
        good = f' The last checkpoint before it is {path}.' if path else ''
        raise RuntimeError(
            f'The training was stopped: {" and ".join(sorted(terms))} became NaN or '
            f'infinite in iteration {first}.{good} Try a smaller learning rate, a '
            'longer warm-up or `optim_wrapper=dict(clip_grad=dict(max_norm=35))`. If '
            'the student trains well alone, set `balance` to 3.0, the default, or less.'
        )

    def rows(self, pairs: Mapping[str, Sequence[Pair]]) -> None:
        """Warn once of each comparison in which no row has counted for long."""
        if not pairs:
            return  # paused
        self._compared += 1
        for key, terms in pairs.items():
            for pair in terms:
                count = pair.student.numel() > 0
                for rows in (pair.mask, pair.row_weight):
                    if rows is not None:
                        count = count & (rows > 0).any()
                self._counts[key] = count | self._counts.get(key, False)
        if self._compared % self.every:
            return
        for key in pairs.keys() - self._warned:
            if not self._counts.get(key):
                self._warned.add(key)
                print_log(
                    f'mmdist: no row of `distill.{key}` has counted for {self.every} '
                    'iterations, so it teaches nothing. Either all labels are void or '
                    'padding, or the teacher gives the common classes too little '
                    'probability: check `class_map`, `class_match`, any `min_score`.',
                    logger='current',
                    level=logging.WARNING,
                )
        self._counts.clear()


def last_checkpoint_before(iteration: int) -> str | None:
    """The run's last checkpoint that an iteration before the given one used."""
    if told('last_ckpt') is None:
        return None
    per_epoch = told('max_iters', 0) // (told('max_epochs') or 1)
    found = {}
    for path in Path(told('last_ckpt')).parent.glob('*_*.pth'):
        unit, _, number = path.stem.partition('_')
        if unit in ('iter', 'epoch') and number.isdecimal():
            steps = int(number) * (per_epoch if unit == 'epoch' else 1)
            if steps < iteration - 1:  # iteration `steps + 1` used it, and went well
                found[steps] = str(path)
    return found.get(max(found, default=None))
