"""Recording of what a module was called with and what it returned."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

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


class Recorder:
    """Records the calls of some modules inside a ``with`` block.

    The instance's ``forward`` is swapped, because forward hooks do not fire if a model
    calls ``head.forward(...)`` directly, as mmseg does.

    Args:
        modules: The modules to watch.
        forks: A list that receives the outputs with a gradient, each as two views that
            a backward pass can tell apart. If omitted, outputs are recorded as they
            are.
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
        # An instance's own forward (activation checkpointing sets one) is wrapped and
        # later restored.
        self._own = [vars(module).get('forward') for module in self._modules]
        for module in self._modules:
            module.forward = self._recording(module)
        return self

    def __exit__(self, *exc_info) -> None:
        for module, own in zip(self._modules, self._own, strict=True):
            if own is None:
                del module.forward
            else:
                module.forward = own

    def _recording(self, module: nn.Module) -> Callable:
        forward = module.forward

        def record(*args, **kwargs):
            own, recorded = self._fork(module, forward(*args, **kwargs))
            call = Call(args, kwargs, recorded, len(self._calls))
            self._calls.append((module, call))
            return own

        return record

    def _fork(self, module: nn.Module, output: Any) -> tuple[Any, Any]:
        """An output for the model to use, and the same output to record."""
        if self._forks is None:
            return output, output
        leaves, structure = tree_flatten(output)
        both = [leaves, list(leaves)]
        first = OF_MODULE * [m is module for m in self._modules].index(True)
        for i, x in enumerate(leaves):
            if isinstance(x, Tensor) and x.requires_grad and x.is_floating_point():
                recorded = x.view_as(x).to(torch.promote_types(x.dtype, torch.float32))
                slot = min(first + min(i, OF_MODULE - 1), SLOTS - 1)
                fork = Fork(x.view_as(x), recorded, slot)
                self._forks.append(fork)
                both[0][i], both[1][i] = fork[:2]
        return tuple(tree_unflatten(side, structure) for side in both)


@contextmanager
def swapped(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Temporarily replace an attribute of an instance or a Python module."""
    own = vars(owner).get(name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if own is None:
            delattr(owner, name)
        else:
            setattr(owner, name, own)
