"""The student's own mean over time as its teacher."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from mmengine.logging import MessageHub
from mmengine.model import ExponentialMovingAverage
from torch import nn

from .classes import ClassMatch
from .renormalize import Renormalize
from .teacher import Teacher, build_model, load_config

# What the Runner saves in each checkpoint beside the model, and loads to resume.
SAVED = 'mmdist_mean_teacher'


class MeanTeacher(Teacher):
    """An exponential moving average of the student's parameters.

    A mean teacher (Tarvainen and Valpola, NeurIPS 2017, arXiv 1703.01780) needs no
    weights to begin with: in the first step it is a copy of the student. Each later
    step starts with teacher = momentum * teacher + (1 - momentum) * student. Buffers,
    such as the statistics of batch norm, are the student's.

    A checkpoint holds the mean in its message hub, not in the student's state dict, and
    a resumed run goes on with it.

    Args:
        student: Config of the student.
        momentum: As above, between 0 and 1; 0.999 remembers about 1,000 steps.
        views: As of :class:`Teacher`.

    Raises:
        ValueError: ``momentum`` is not between 0 and 1.
    """

    def __init__(
        self, student: dict, momentum: float = 0.999, views: Sequence[str] = ()
    ) -> None:
        super().__init__(student, views=views)
        if not 0 < momentum < 1:
            raise ValueError(
                '`teacher.ema.momentum` is the share that the teacher keeps in each '
                f'step, between 0 and 1, got {momentum}.'
            )
        self.momentum = momentum
        self.average: ExponentialMovingAverage | None = None
        # What was there when the model was built belongs to another run.
        self._saved = MessageHub.get_current_instance().get_info(SAVED)

    @property
    def origin(self) -> str:
        """Where its weights are from, in words."""
        return "the mean of the student's weights"

    def __getstate__(self) -> dict:
        return {**super().__getstate__(), 'average': None, '_saved': None}

    def load(self, student: nn.Module) -> None:
        """Build the teacher; :meth:`follow` gives it the student's weights.

        Args:
            student: Gives the device.
        """
        if self.model is not None:
            return
        model = build_model(load_config(self.config)).requires_grad_(False).eval()
        self.average = ExponentialMovingAverage(model, momentum=1 - self.momentum)
        self.model = self.average.module
        nn.Module.to(self.model, next(student.parameters()).device)
        preprocessors = student.data_preprocessor, self.model.data_preprocessor
        self.renormalize = Renormalize(*preprocessors)

    def follow(self, student: nn.Module) -> None:
        """Move on from the last mean, or from that of a resumed checkpoint.

        Raises:
            RuntimeError: The student's parameters are sharded.
        """
        if not torch.is_grad_enabled():
            return  # losses of a validation
        self.load(student)
        self.move_to(next(student.parameters()).device)
        names = dict(student.named_parameters())
        if not names.keys() >= self.average.avg_parameters.keys():
            raise RuntimeError(
                'A teacher that is the mean of the student needs its parameters under '
                'their own names, but here they are sharded or renamed (FSDP). Train '
                'with DDP or on a single device.'
            )
        hub = MessageHub.get_current_instance()
        saved = hub.get_info(SAVED)
        if saved is not None and saved is not self._saved:  # resumed
            self.average.load_state_dict(saved)
        self.average.update_parameters(student)
        # The tensors themselves: what is saved is what they are then.
        self._saved = self.average.state_dict()
        hub.update_info(SAVED, self._saved)

    def match_classes(self, student_classes: Sequence[str] | None) -> ClassMatch:
        """The student's own classes."""
        return ClassMatch()
