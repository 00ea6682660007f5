"""Schedule the weight of distillation over the course of training."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.runner import Runner

from mmdist.lookup import in_words
from mmdist.registry import HOOKS

# Message hub key: the names logged by the last iteration that distilled.
LOGGED = 'mmdist_logged'


@HOOKS.register_module()
@in_words
class DistillScheduleHook(Hook):
    """Ramps the weight of all distillation losses, or stops them.

    It depends only on the time, so a resumed run continues where it stopped. While it
    is 0, the teacher does not run at all.

    Example:
        Ramp up over the first 1,000 iterations, and stop distilling at 30,000::

            custom_hooks = [dict(type='mmdist.DistillScheduleHook',
                                 points=[(0, 0.0), (1000, 1.0)], stop=30000)]

        The list replaces the hooks of the base. If there are any (RTMDet, YOLOX), write
        ``[*_base_.custom_hooks, dict(type='mmdist.DistillScheduleHook', ...)]``.

    Args:
        points: (time, factor) pairs in order of time. The factor is linear between
            them, and constant before the first and after the last. It multiplies each
            comparison's own weight.
        stop: Time from which the factor is 0; None never stops.
        by_epoch: Whether times are epochs, fractions included; else iterations.

    Raises:
        ValueError: Times are not in order, or a factor is negative.
    """

    def __init__(
        self,
        points: Sequence[tuple[float, float]] = ((0, 1.0),),
        stop: float | None = None,
        by_epoch: bool = False,
    ) -> None:
        try:
            times, factors = zip(*points, strict=True)
            is_fine = list(times) == sorted(set(times)) and min(factors) >= 0
        except (TypeError, ValueError):
            is_fine = False
        if not is_fine:
            raise ValueError(
                '`points` must be (time, factor) pairs with increasing times and '
                f'factors of at least 0, got {points!r}.'
            )
        self.points, self.times, self.factors = points, times, factors
        self.stop = stop
        self.by_epoch = by_epoch

    def factor_at(self, time: float) -> float:
        """The factor at a time, in iterations or epochs."""
        if self.stop is not None and time >= self.stop:
            return 0.0
        return float(np.interp(time, self.times, self.factors))

    def before_train(self, runner: Runner) -> None:
        """Raise ValueError if the factor is 0 from the first iteration to the last."""
        times = (self._time(runner, i) for i in range(runner.max_iters))
        if not any(map(self.factor_at, times)):  # usually the first few decide
            end = self._time(runner, runner.max_iters)
            unit = 'epochs' if self.by_epoch else 'iterations'
            raise ValueError(
                'DistillScheduleHook leaves the weight of distillation at 0 for all of '
                f'the {end:g} {unit} of this training, from points={self.points} and '
                f'stop={self.stop}. Nothing would be distilled. Start the points '
                'earlier, train longer, or remove the hook.'
            )

    def before_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: dict | None = None
    ) -> None:
        """Set the factor of the coming iteration, and log it."""
        model = runner.model.module if is_model_wrapper(runner.model) else runner.model
        if not hasattr(model, 'distill_factor'):
            raise TypeError(
                'DistillScheduleHook needs a model of type `mmdist.Distiller`, but '
                f'`model` is a {type(model).__name__}. Remove the hook, or distil.'
            )
        model.distill_factor = self.factor_at(self._time(runner, runner.iter))
        runner.message_hub.update_scalar('train/distill_factor', model.distill_factor)

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch=None, outputs=None
    ) -> None:
        """Drop from the log what was not computed; mmengine repeats the last value."""
        hub, logged = runner.message_hub, list(outputs or ())
        if hub.get_scalar('train/distill_factor').current():
            hub.update_info(LOGGED, logged)
            return
        for name in set(hub.get_info(LOGGED, ())).difference(logged):
            hub.log_scalars.pop(f'train/{name}', None)

    def _time(self, runner: Runner, iteration: int) -> float:
        """Convert an iteration to the unit of the schedule."""
        return iteration / len(runner.train_dataloader) if self.by_epoch else iteration
