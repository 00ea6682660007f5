"""The balance between the teacher and the labels."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from functools import partial

import torch
from mmengine.dist import all_reduce
from mmengine.logging import MessageHub
from torch import Tensor

from .record import SLOTS, Fork
from .run import told

# Momentum of the running mean of the labels' squared gradient norms: a single batch
# with few or no objects must not decide.
MOMENTUM = 0.9
KEY = 'mmdist_balance'  # in the message hub


class Balance:
    """Bounds the distillation gradient by a multiple of the labels' gradient.

    A correlation is scale-invariant, so its gradient grows as the student's logits
    shrink: to hundreds of times the labels' gradient while a head is fresh, and to ten
    thousand times on RetinaNet's coarse levels even later. So at each student output
    that is compared, the distillation gradient is multiplied by a factor such that

        its norm <= ratio * norm of the gradient of the student's own losses.

    A smaller gradient stays as published: an enlarged one can be too much for a
    learning rate that suits the student alone.

    The distillation norm is measured in this step, by a backward pass through the
    distillation losses alone. The norm of the student's own losses is a running mean
    over previous backward passes, at no extra cost; images without labels are therefore
    weighted like earlier ones with labels. Both norms are summed over all processes, so
    these use the same factors. The means are kept in mmengine's ``MessageHub``, and so
    in checkpoints; a resumed run continues with them.

    In the first step no mean is known, and the factor is 0. Where no gradient of the
    student's own losses ever arrives, as in training without labels, the factor is 1
    from the second step on.

    Args:
        ratio: The largest allowed ratio, above 0.

    Raises:
        ValueError: The ratio is not a finite number above 0.
    """

    def __init__(self, ratio: float) -> None:
        if type(ratio) not in (int, float) or not 0 < ratio < math.inf:
            raise ValueError(
                '`balance` must be a number above 0, or None for the published loss, '
                f'got {ratio!r}.'
            )
        self.ratio = ratio
        self._saved_before = told(KEY)
        self._state: dict[str, Tensor] | None = None

    def __call__(
        self,
        entries: Mapping[str, Sequence[Tensor]],
        forks: Sequence[Fork],
        factor: float = 1.0,
    ) -> dict[str, Tensor]:
        """Scale the gradients of the next backward pass; losses keep their values.

        Args:
            entries: The losses of each entry of ``distill``.
            forks: The student's recorded outputs of this step.
            factor: Multiplies the ratio in this step.

        Returns:
            For each entry, the mean scale at the outputs that it compares.
        """
        if not (torch.is_grad_enabled() and entries):
            return {}
        gradients = {key: _gradients(losses, forks) for key, losses in entries.items()}
        first = next(iter(entries.values()))[0]
        distill = first.new_zeros(SLOTS, dtype=torch.float32)
        compared = []
        for i, fork in enumerate(forks):
            parts = [found[i] for found in gradients.values() if i in found]
            if parts:
                distill[fork.slot] += _square(sum(parts))
                compared.append(fork)

        state = self._prepared(distill)
        # `unit`: what a GradScaler and gradient accumulation multiply gradients by
        squares = torch.stack([state['own'] / state['unit'].square(), distill])
        state['own'], state['unit'] = torch.zeros_like(distill), distill.new_ones(())
        all_reduce(squares)
        scales = self._scales(state, *squares, self.ratio * factor)

        for loss in itertools.chain(*entries.values()):
            if loss.requires_grad:
                loss.register_hook(partial(_keep, state))
        for fork in compared:
            fork.own.register_hook(partial(_add, state, fork.slot))
            fork.recorded.register_hook(partial(torch.mul, scales[fork.slot]))
        return {
            key: torch.stack([scales[forks[i].slot] for i in found]).mean()
            for key, found in gradients.items()
            if found
        }

    def _prepared(self, like: Tensor) -> dict[str, Tensor]:
        """The running state; the first step restores it from a resumed run."""
        if self._state is None:
            saved = told(KEY)
            if saved is None or saved is self._saved_before:
                # a mean of -1: no step so far
                zero, one = torch.zeros_like(like), like.new_ones(())
                saved = dict(mean=zero - one, own=zero, unit=one)
            self._state = {key: value.to(like) for key, value in saved.items()}
            MessageHub.get_current_instance().update_info(KEY, self._state)
        return self._state

    @staticmethod
    def _scales(
        state: dict[str, Tensor], own: Tensor, distill: Tensor, ratio: float
    ) -> Tensor:
        """The factor at each output, from squared norms; also updates the mean."""
        mean = state['mean']
        known = torch.where(mean > 0, mean.lerp(own, 1 - MOMENTUM), own)
        # `own` is infinite in a step that a GradScaler skips
        mean = torch.where((own > 0) & own.isfinite(), known, mean)
        state['mean'] = mean.clamp(min=0)
        scales = (ratio * (mean / distill).sqrt()).clamp(max=1)
        return torch.where(mean > 0, scales, (mean == 0).to(scales))


def _gradients(losses: Sequence[Tensor], forks: Sequence[Fork]) -> dict[int, Tensor]:
    """The gradient of an entry's losses at the recorded outputs that they reach."""
    loss = sum(losses)
    if not (loss.requires_grad and forks):
        return {}
    recorded = [fork.recorded for fork in forks]
    found = torch.autograd.grad(loss, recorded, retain_graph=True, allow_unused=True)
    return {i: x for i, x in enumerate(found) if x is not None}


def _square(gradient: Tensor) -> Tensor:
    return gradient.detach().float().square().sum()


def _add(state: dict[str, Tensor], slot: int, gradient: Tensor) -> None:
    state['own'][slot] += _square(gradient)


def _keep(state: dict[str, Tensor], gradient: Tensor) -> None:
    state['unit'] = gradient.detach().float()
