"""Check ``class_map``, and explain what to do if class names do not match."""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mmengine.config import Config

READY_MAPS = Path(__file__).parents[1] / '.mim/configs/_base_/class_maps'


def as_list(classes: Sequence[str]) -> list[str]:
    """Return the names as a list; a single class can be given as a string."""
    return [classes] if isinstance(classes, str) else list(classes)


def first_few(values: Iterable, most: int | None = 8) -> str:
    """Join the first ``most`` values, or all, and say how many more there are."""
    values = list(map(str, values))
    more = 0 if most is None else len(values) - most
    return ', '.join(values[:most]) + (f' and {more} more' if more > 0 else '')


def check_class_map(class_map: Any) -> dict[str, list[str]]:
    """Check a ``class_map``, and make each of its values a list.

    Raises:
        ValueError: It does not map names to names, or a list contains a name twice.
    """
    class_map = {} if class_map is None else class_map
    is_right = isinstance(class_map, Mapping)
    for own, theirs in class_map.items() if is_right else ():
        names = as_list(theirs) if isinstance(theirs, (str, list, tuple)) else [None]
        is_right &= all(isinstance(name, str) for name in (own, *names))
        is_right = is_right and len(set(names)) == len(names)
    if not is_right:
        raise ValueError(
            "`teacher.class_map` must be a dict from the student's names to one of the "
            f"teacher's, or to a list of different ones, got {class_map!r:.200}."
        )
    return {own: as_list(theirs) for own, theirs in class_map.items()}


def check_names(
    student: list[str], teacher: list[str], class_map: Mapping[str, list[str]]
) -> None:
    """Raise ValueError if a name is unknown, not a string or stands for two columns."""
    for whose, names in (('student', student), ('teacher', teacher)):
        if odd := [name for name in names if not isinstance(name, str)]:
            raise ValueError(
                f'Class names of the {whose} must be strings, got {odd!r:.200}.'
            )
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(
                f'Classes are matched by name, but the {whose} has several of the same '
                f'name: {twice}.'
            )
    mapped = set(itertools.chain(*class_map.values()))
    lacking = {
        'the student': sorted(set(class_map) - set(student)),
        'the teacher': sorted(mapped - set(teacher)),
    }
    lacks = [f'{who} has no class {names}' for who, names in lacking.items() if names]
    if lacks:
        raise ValueError(
            '`teacher.class_map` maps class names of the student to class names of the '
            f'teacher, but {" and ".join(lacks)}.\n{_both(student, teacher)}'
        )
    for name in mapped:
        same = [own for own in student if name in class_map.get(own, [own])]
        if len(same) > 1:
            raise ValueError(
                f"`teacher.class_map` compares the student's {same} with one class of "
                f'the teacher, {name!r}. Two columns of the same scores would distort '
                "every softmax: map one of the student's classes to it."
            )


def unknown_names(student: Any, teacher: Any) -> str:
    """Say why classes cannot be matched if one side's names are None."""
    whose = 'the teacher' if student is not None else 'the student'
    return (
        '`class_map` and `class_match` match classes by name, but the class names of '
        f'{"both" if student is teacher is None else whose} are unknown. The data set '
        'names them, `metainfo=dict(classes=(...))`: the one that the Runner trains '
        'on; for the teacher, that of `teacher.config`, if its checkpoint has no names.'
    )


def no_match(
    student: list[str], teacher: list[str], only: Sequence[list[str]], has_map: bool
) -> str:
    """Say how the lists differ, what ``only`` one side knows, and what to do."""
    close = dict(_close_names(*only))
    text = (
        f'The classes of student and teacher cannot be matched by name.\n'
        f'{_both(student, teacher)}\n{_both(*only, "Only the ")}\n'
        "If some differ only in name, set `teacher.class_map=dict(<student's>="
        f"<teacher's>, ...)`{f'; similar names: {close}' if close else ''}."
    )
    if not has_map and (ready := _ready_map(student, teacher)):
        text += (
            f" mmdist has such a map for these two: add '{ready}' to `_base_`, and "
            "`class_map=_base_.class_map, class_match='shared'` to `teacher`."
        )
    if len(only[0]) < len(student):
        text += " To compare only what both know, set `teacher.class_match='shared'`."
    return text


def _both(student: list[str], teacher: list[str], only: str = '') -> str:
    return (
        f'{only}student ({len(student)}): {first_few(student)}\n'
        f'{only}teacher ({len(teacher)}): {first_few(teacher)}'
    )


def _close_names(student: list[str], teacher: list[str]) -> Iterator[tuple[str, str]]:
    """Yield pairs of similar names that may mean the same class."""
    bare = {name.strip().casefold().replace('_', ' '): name for name in teacher}
    for name in student:
        key = name.strip().casefold().replace('_', ' ')
        for found in difflib.get_close_matches(key, bare, n=1, cutoff=0.7):
            yield name, bare[found]


def _ready_map(student: list[str], teacher: list[str]) -> str | None:
    """Return the class map that mmdist ships for these two data sets, if any."""
    for path in sorted(READY_MAPS.glob('*.py')):
        names = Config.fromfile(path).class_map
        mapped = itertools.chain(*map(as_list, names.values()))
        if set(names) <= set(student) and set(mapped) <= set(teacher):
            return f'mmdist::_base_/class_maps/{path.name}'
    return None
