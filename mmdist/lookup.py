"""Find what belongs to a module by the names of its classes.

Names, so that neither mmdet nor mmseg has to be installed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

T = TypeVar('T')


def by_class_name(module: object, table: Mapping[str, T]) -> T | None:
    """The entry of the first of a module's classes, its own before its bases.

    Args:
        module: Any object.
        table: Entries by class name.

    Returns:
        The entry; None if no class of the module is in the table.
    """
    name = class_name_in(module, table)
    return None if name is None else table[name]


def class_name_in(module: object, names: Mapping[str, object]) -> str | None:
    """The first of a module's class names that is among ``names``; None if none is."""
    return next((c.__name__ for c in type(module).__mro__ if c.__name__ in names), None)


def is_a(module: object, *names: str) -> bool:
    """Whether a module is of a class with one of these names, or of a subclass."""
    return any(cls.__name__ in names for cls in type(module).__mro__)
