"""The moving average of the student as its teacher."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from copy import deepcopy

import torch
from mmengine.logging import MessageHub
from mmengine.model import ExponentialMovingAverage
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from .classes import ClassMatch
from .renormalize import Renormalize
from .teacher import Teacher, build_model, load_config

# Message hub key; the Runner saves the hub in each checkpoint and loads it to resume.
SAVED = 'mmdist_mean_teacher'
_WRITERS: weakref.WeakSet[MeanTeacher] = weakref.WeakSet()


class MeanTeacher(Teacher):
    """An exponential moving average of the student's parameters.

    A mean teacher (Tarvainen and Valpola, NeurIPS 2017, arXiv 1703.01780) needs no
    initial weights: in the first step it is a copy of the student. After each
    optimizer step, teacher = momentum * teacher + (1 - momentum) * student. Buffers,
    such as batch norm statistics, are copied from the student.

    A checkpoint holds the mean in its message hub, not in the student's state dict, and
    a resumed run continues with it. A copy of the model starts its own mean.

    Args:
        student: Config of the student.
        momentum: As above, between 0 and 1; 0.999 averages about 1,000 steps.
        views: As in :class:`Teacher`.

    Raises:
        ValueError: ``momentum`` is not between 0 and 1.
    """

    def __init__(
        self, student: dict, momentum: float = 0.999, views: Sequence[str] = ()
    ) -> None:
        super().__init__(student, views=views)
        if not 0 < momentum < 1:
            raise ValueError(
                '`teacher.ema.momentum`, the share that the teacher keeps in a step, '
                f'must be between 0 and 1, got {momentum}.'
            )
        self.momentum = momentum
        self.__setstate__({})

    @property
    def origin(self) -> str:
        """A description of where the weights come from."""
        return "the mean of the student's weights"

    def __getstate__(self) -> dict:
        return {**super().__getstate__(), 'average': None, '_saved': None}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self.average: ExponentialMovingAverage | None = None
        # Whether the student has changed since the last update; a tensor, so that a
        # checkpoint saves its value at that time.
        self._is_behind = torch.tensor(True)
        # A mean that is already in the hub belongs to another run.
        self._saved = MessageHub.get_current_instance().get_info(SAVED)

    def load(self, student: nn.Module) -> None:
        """Build the teacher; :meth:`follow` gives it the student's weights."""
        if self.model is not None:
            return
        model = build_model(load_config(self.config))
        # the student's can come from the Runner, not from the config
        model.data_preprocessor = deepcopy(student.data_preprocessor)
        model.requires_grad_(False).eval()
        self.average = ExponentialMovingAverage(model, momentum=1 - self.momentum)
        self.model = self.average.module
        nn.Module.to(self.model, next(student.parameters()))
        self.renormalize = Renormalize(
            student.data_preprocessor, self.model.data_preprocessor
        )
        self._watch(student)

    def _watch(self, student: nn.Module) -> None:
        """Note each step of an optimizer that holds parameters of the student.

        Not every forward leads to a step: gradients can accumulate or overflow.
        """
        student, is_behind = weakref.ref(student), self._is_behind

        def stepped(optimizer: torch.optim.Optimizer, *args) -> None:
            model = student()
            own = () if model is None else {id(p) for p in model.parameters()}
            if any(id(p) in own for g in optimizer.param_groups for p in g['params']):
                is_behind.fill_(True)

        handle = register_optimizer_step_post_hook(stepped)
        weakref.finalize(self, handle.remove)

    def follow(self, student: nn.Module) -> None:
        """Update the mean, after restoring it if the run was resumed.

        Raises:
            RuntimeError: The student's parameters are sharded or renamed.
        """
        if not torch.is_grad_enabled():
            return  # validation losses
        self.load(student)
        self.move_to(next(student.parameters()).device)
        names = dict(student.named_parameters())
        if not names.keys() >= self.average.avg_parameters.keys():
            raise RuntimeError(
                "A teacher that is the student's mean cannot follow parameters that "
                'are sharded or renamed (FSDP). Train with DDP or on a single device.'
            )
        hub = MessageHub.get_current_instance()
        saved = hub.get_info(SAVED)
        known = (self._saved, *(teacher._saved for teacher in _WRITERS))
        if saved is not None and all(saved is not other for other in known):  # resumed
            saved = dict(saved)
            self._is_behind.copy_(saved.pop('is_behind', torch.tensor(True)))
            self.average.load_state_dict(saved)
        if self._is_behind:
            self.average.update_parameters(student)
            self._is_behind.fill_(False)
        # No copies: a checkpoint saves the values of these tensors at that time.
        self._saved = {**self.average.state_dict(), 'is_behind': self._is_behind}
        hub.update_info(SAVED, self._saved)
        _WRITERS.add(self)

    def match_classes(self, student_classes: Sequence[str] | None) -> ClassMatch:
        """Match all columns: the classes are the student's own."""
        return ClassMatch()
