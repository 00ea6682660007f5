"""See what a module was called with and what it returned."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch import nn


class Call(NamedTuple):
    """One call of a module's ``forward``; ``index`` is its place among all recorded."""

    args: tuple
    kwargs: dict
    output: Any
    index: int


class Recorder:
    """Records the calls of some modules inside a ``with`` block.

    The instance's ``forward`` is swapped, because forward hooks do not fire where a
    model calls ``head.forward(...)`` itself, as mmseg does.

    Args:
        modules: The modules to watch.
    """

    def __init__(self, modules: Iterable[nn.Module] = ()) -> None:
        self._modules = list({id(m): m for m in modules}.values())
        self._calls: list[tuple[nn.Module, Call]] = []

    def calls(self, module: nn.Module) -> list[Call]:
        """The calls of ``module``, in order; empty if it did not run."""
        return [call for owner, call in self._calls if owner is module]

    def forget(self) -> None:
        """Drop all calls, and the tensors in them."""
        self._calls.clear()

    def changed(self, change: Callable[[Any], Any]) -> Recorder:
        """A recorder with the same calls, their arguments and outputs changed."""
        other = Recorder(self._modules)
        for module, call in self._calls:
            other._calls.append((module, Call(*map(change, call[:3]), call.index)))
        return other

    def __enter__(self) -> Recorder:
        # A forward of the instance's own (activation checkpointing sets one) is
        # wrapped and put back, not lost.
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
            output = forward(*args, **kwargs)
            call = Call(args, kwargs, output, len(self._calls))
            self._calls.append((module, call))
            return output

        return record


@contextmanager
def swapped(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Give an instance or a module of Python another attribute for a while."""
    own = vars(owner).get(name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if own is None:
            delattr(owner, name)
        else:
            setattr(owner, name, own)
