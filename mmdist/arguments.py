"""The arguments of the Distiller: parsing, checks and error messages."""

from __future__ import annotations

import inspect
import math
import os
from collections.abc import Mapping
from typing import Any, NamedTuple

from mmengine.logging import print_log
from torch import nn

from .lookup import arguments_of, did_you_mean
from .registry import class_of
from .teachers.teacher import load_config


class DistillTerm(NamedTuple):
    """An entry of ``distill``, learned from one teacher."""

    name: str  # of the entry
    cfg: dict  # of the comparison
    teacher: str  # its name; '' if there is only one
    weight: float

    @property
    def key(self) -> str:
        """The term's name in ``model.distill``."""
        return '_'.join(filter(None, (self.name, self.teacher)))


def student_config(student: Any) -> dict:
    """The student's config, given as is, as a path, or within a Distiller's config."""
    if isinstance(student, (str, os.PathLike)):
        student = load_config(student, 'student').model
    names = ('mmdist.Distiller', 'Distiller')
    while isinstance(student, Mapping) and student.get('type') in names:
        text = 'mmdist: `student` is a distillation: only its student is used.'
        print_log(text, logger='current')
        student = student.get('student')
    if not isinstance(student, Mapping) or 'type' not in student:
        raise ValueError(
            '`student` must be the config of a model, such as '
            f'`student=_base_.model`, or the path of a config, got {student!r:.200}.'
        )
    return student


def check_overrides(overrides: Mapping[str, Any], student: dict, own: Any) -> None:
    """Raise ValueError for an override that neither student nor ``own`` takes."""
    cls = class_of(student)
    if not inspect.isclass(cls):
        return  # building it raises the right error
    ours = list(inspect.signature(own).parameters)[:-1]
    takes = arguments_of(cls)
    init = inspect.signature(cls.__init__).parameters.values()
    is_open = any(p.kind is p.VAR_KEYWORD for p in init)
    for key in overrides.keys() - takes:
        nearest = did_you_mean(key, ours if is_open else [*ours, *takes])
        if nearest or not is_open:
            raise ValueError(
                f'`model`: neither mmdist.Distiller nor {cls.__name__} has an argument '
                f'{key!r}.{nearest} mmdist.Distiller takes {", ".join(ours)}.'
            )


def named_teachers(teacher: Any, teachers: Any) -> dict[str, Any]:
    """The arguments of each teacher by name; a single teacher has the name ''."""
    if (teacher is None) == (teachers is None):
        raise ValueError(
            'Give either `teacher`, the arguments of one, or `teachers`, a dict of '
            'name -> arguments.'
        )
    if teachers is None:
        return {'': teacher}
    _check_names('teachers', teachers, "config='teacher.py', checkpoint='teacher.pth'")
    return dict(teachers)


def distill_terms(distill: Any, teachers: list[str]) -> dict[str, DistillTerm]:
    """The terms of ``distill`` by key: each entry with each of its teachers."""
    _check_names('distill', distill, "type='mmdist.SegLogits'")
    terms: dict[str, DistillTerm] = {}
    for name, entry in distill.items():
        cfg = dict(entry) if isinstance(entry, Mapping) else entry
        wanted = cfg.pop('from_teacher', None) if isinstance(cfg, dict) else None
        weights = _weights(f'`distill.{name}.from_teacher`', wanted, teachers)
        for teacher, weight in weights.items():
            term = DistillTerm(name, cfg, teacher, weight)
            if (other := terms.get(term.key)) is not None:
                raise ValueError(
                    f'The name {term.key!r} is ambiguous: entry {other.name!r} with '
                    f'teacher {other.teacher!r}, or entry {name!r} with teacher '
                    f'{teacher!r}. Rename one of them.'
                )
            if weight:
                terms[term.key] = term
    return terms


def _weights(option: str, wanted: Any, teachers: list[str]) -> dict[str, float]:
    """The weight of each teacher that an entry's ``from_teacher`` names."""
    if wanted is None:
        return dict.fromkeys(teachers, 1)
    if not isinstance(wanted, (str, Mapping)):
        raise ValueError(
            f'{option} must be the name of a teacher or a dict of name -> weight, got '
            f'{wanted!r}.'
        )
    has = 'only one `teacher`' if teachers == [''] else f'the `teachers` {teachers}'
    weights = {wanted: 1} if isinstance(wanted, str) else dict(wanted)
    if unknown := sorted(set(weights) - set(teachers)):
        raise ValueError(
            f'{option} names the unknown teachers {unknown}, there is {has}. Give '
            '`teachers=dict(<name>=dict(...))`.'
        )
    right = [w for w in weights.values() if isinstance(w, (int, float))]
    right = [w for w in right if 0 <= w < math.inf]
    if len(right) < len(weights) or not sum(right):
        raise ValueError(
            f'{option} has the weights {weights}: each must be a finite number >= 0, '
            'and at least one must be above 0.'
        )
    return weights


def _check_names(argument: str, entries: Any, example: str) -> None:
    example = f'`{argument}=dict(<name>=dict({example}))`'
    if not isinstance(entries, Mapping) or not entries or 'type' in entries:
        raise ValueError(
            f'`{argument}` must be a dict of name -> config, {example}, got '
            f'{entries!r:.200}.'
        )
    for name in entries:
        is_name = isinstance(name, str) and name.isidentifier() and 'loss' not in name
        if not is_name or hasattr(nn.ModuleDict, name):
            raise ValueError(
                f'`{argument}` has the invalid entry name {name!r}. A name must be an '
                'identifier without "loss", which marks what is added to the total '
                'loss, and not a method of a dict.'
            )
