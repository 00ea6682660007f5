"""Recording of what a module was called with and what it returned."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from functools import partial
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten


class Call(NamedTuple):
    """One call of a module's ``forward``; ``index`` is its place among all calls."""

    args: tuple
    kwargs: dict
    output: Any
    index: int


class Fork(NamedTuple):
    """An output of a module, as the model uses it and as it is recorded."""

    own: Tensor
    recorded: Tensor  # in fp32 at least
    slot: int  # its place among all outputs of all modules


# Slots for outputs, in all and per module; outputs beyond that share the last.
SLOTS, OF_MODULE = 1024, 32

# Temporarily replaces an attribute of an instance, class or module, or adds it.
swapped = partial(patch.object, create=True)


class Recorder:
    """Records the calls of some modules inside a ``with`` block.

    The instance's ``forward`` is swapped, because forward hooks do not fire if a model
    calls ``head.forward(...)`` directly, as mmseg does.

    A list of ``forks`` receives the outputs with a gradient, each as two views that a
    backward pass can tell apart; without it, outputs are recorded as they are.
    """

    def __init__(
        self, modules: Iterable[nn.Module] = (), forks: list[Fork] | None = None
    ) -> None:
        self._forks = forks
        self._modules = list({id(m): m for m in modules}.values())
        self._calls: list[tuple[nn.Module, Call]] = []

    def calls(self, module: nn.Module) -> list[Call]:
        """The calls of ``module``, in order; empty if it did not run."""
        return [call for owner, call in self._calls if owner is module]

    def forget(self) -> None:
        """Drop all calls, and the tensors in them."""
        self._calls.clear()

    def changed(self, change: Callable[[Any], Any]) -> Recorder:
        """A copy with ``change`` applied to the arguments and output of each call."""
        other = Recorder(self._modules, self._forks)
        for module, call in self._calls:
            other._calls.append((module, Call(*map(change, call[:3]), call.index)))
        return other

    def __enter__(self) -> Recorder:
        self._swaps = ExitStack()
        for place, module in enumerate(self._modules):
            record = self._recording(module, place)
            self._swaps.enter_context(swapped(module, 'forward', record))
        return self

    def __exit__(self, *exc_info) -> None:
        self._swaps.close()

    def _recording(self, module: nn.Module, place: int) -> Callable:
        # activation checkpointing sets an instance's own, which is wrapped
        forward = module.forward

        def record(*args, **kwargs):
            own, recorded = self._fork(forward(*args, **kwargs), place)
            call = Call(args, kwargs, recorded, len(self._calls))
            self._calls.append((module, call))
            return own

        return record

    def _fork(self, output: Any, place: int) -> tuple[Any, Any]:
        """An output for the model to use, and the same output to record."""
        if self._forks is None:
            return output, output
        own, structure = tree_flatten(output)
        recorded = list(own)
        for i, x in enumerate(own):
            if isinstance(x, Tensor) and x.requires_grad:
                slot = min(OF_MODULE * place + min(i, OF_MODULE - 1), SLOTS - 1)
                kind = torch.promote_types(x.dtype, torch.float32)
                recorded[i], own[i] = x.view_as(x).to(kind), x.view_as(x)
                self._forks.append(Fork(own[i], recorded[i], slot))
        return tree_unflatten(own, structure), tree_unflatten(recorded, structure)
