"""Lookup by name: of classes, of arguments, and of the word a typo was meant to be.

Classes are found by name, so that neither mmdet nor mmseg has to be installed.
"""

from __future__ import annotations

import difflib
import functools
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

T = TypeVar('T')


def by_class_name(module: object, table: Mapping[str, T]) -> T | None:
    """The table's entry for a module's class, or else for the nearest base class.

    None if no class of the module is in the table.
    """
    names = (cls.__name__ for cls in type(module).__mro__)
    return next((table[name] for name in names if name in table), None)


def is_a(module: object, *names: str) -> bool:
    """Whether a module is an instance of a class with one of these names."""
    return any(cls.__name__ in names for cls in type(module).__mro__)


def did_you_mean(word: object, known: Iterable[str]) -> str:
    """Suggest the known word that is nearest to a wrong one.

    Case and everything before the last dot are ignored, so 'distloss' finds
    'mmdist.DISTLoss'. Returns " Did you mean 'mmdist.DISTLoss'?", to append to a
    sentence; '' if no word is near.
    """
    bare = {name.rsplit('.', 1)[-1].lower(): name for name in known}
    close = difflib.get_close_matches(str(word).rsplit('.', 1)[-1].lower(), bare, n=1)
    return f' Did you mean {bare[close[0]]!r}?' if close else ''


def arguments_of(cls: type) -> set[str]:
    """The names of all arguments that a class and its base classes take."""
    inits = (c.__init__ for c in cls.__mro__[:-1])  # object's takes anything
    return set().union(*(inspect.signature(init).parameters for init in inits))


def check_arguments(
    name: str, function: Callable, cfg: Mapping[str, Any], given: Sequence[str] = ()
) -> None:
    """Check the arguments of a function or class in a user's config.

    Args:
        name: Where the arguments stand in the config, such as 'teacher'.
        function: The function or class to be called with them.
        cfg: The arguments, and possibly a ``type``.
        given: Arguments that the caller adds, so the user does not give them.

    Raises:
        ValueError: An argument is unknown (it names the nearest and all known ones),
            missing, or annotated as a number and not one.
    """
    parameters = inspect.signature(function).parameters.values()
    is_open = any(p.kind is p.VAR_KEYWORD for p in parameters)
    takes = {
        p.name: p
        for p in parameters
        if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD) and p.name not in given
    }
    it_takes = f'It takes {", ".join(takes) or "no arguments"}.'
    unknown = [key for key in cfg if key not in (*takes, 'type', '_scope_')]
    if unknown and not is_open:
        raise ValueError(
            f'`{name}`: unknown argument {unknown[0]!r}.'
            f'{did_you_mean(unknown[0], takes)} {it_takes}'
        )
    for key, parameter in takes.items():
        if parameter.default is parameter.empty and key not in cfg:
            raise ValueError(f'`{name}`: the argument {key!r} is missing. {it_takes}')
        value = cfg.get(key, parameter.default)
        if value is not parameter.default and not _may_be(value, parameter.annotation):
            raise ValueError(f'`{name}`: {key!r} must be a number, got {value!r:.100}.')


def _may_be(value: Any, annotation: Any) -> bool:
    """Whether a value fits an annotation; only annotations of numbers are checked."""
    kinds = set(getattr(annotation, '__name__', str(annotation)).split(' | '))
    if not kinds <= {'float', 'int', 'None'}:
        return True
    if value is None:
        return 'None' in kinds
    return not isinstance(value, (Sequence, Mapping))


def in_words(cls: type[T]) -> type[T]:
    """Decorate a class so that `check_arguments` reports a misspelt argument."""
    init = cls.__init__
    # object's accepts anything and complains later
    takes = (lambda self: None) if init is object.__init__ else init

    @functools.wraps(init)
    def checked(self, *args, **kwargs):
        positional = list(inspect.signature(takes).parameters)[: len(args) + 1]
        check_arguments(cls.__name__, takes, kwargs, given=positional)
        init(self, *args, **kwargs)

    cls.__init__ = checked
    return cls
