"""The arguments of the Distiller: parsing, checks and error messages."""

from __future__ import annotations

import inspect
import math
import os
from collections.abc import Mapping
from typing import Any, NamedTuple

from mmengine.logging import print_log
from torch import nn

from .lookup import did_you_mean
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
        print_log(
            'mmdist: `student` is the config of a distillation. Only its student is '
            'used; its teacher and its `distill` are ignored.',
            logger='current',
        )
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
    inits = [inspect.signature(c.__init__).parameters for c in cls.__mro__[:-1]]
    takes = set().union(*inits)
    is_open = any(p.kind is p.VAR_KEYWORD for p in inits[0].values())
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
            'Give either `teacher`, the arguments of one teacher, or `teachers`, a '
            'dict of name -> arguments.'
        )
    if teachers is None:
        return {'': teacher}
    _check_names('teachers', teachers, "config='teacher.py', checkpoint='teacher.pth'")
    return dict(teachers)


def distill_terms(distill: Any, teachers: list[str]) -> dict[str, DistillTerm]:
    """The terms of ``distill`` by key: each entry with each of its teachers.

    Raises:
        ValueError: ``distill`` is malformed, or a ``from_teacher`` is: it names an
            unknown teacher, or its weights are negative, infinite or sum to 0.
    """
    _check_names('distill', distill, "type='mmdist.SegLogits'")
    terms: dict[str, DistillTerm] = {}
    for name, entry in distill.items():
        cfg = dict(entry) if isinstance(entry, Mapping) else entry
        wanted = cfg.pop('from_teacher', None) if isinstance(cfg, dict) else None
        if not isinstance(wanted, (str, Mapping, type(None))):
            raise ValueError(
                f'`distill.{name}.from_teacher` must be the name of a teacher or a '
                f'dict of name -> weight, got {wanted!r}.'
            )
        weights = wanted if isinstance(wanted, Mapping) else {wanted: 1}
        if wanted is None:
            weights = dict.fromkeys(teachers, 1)
        elif teachers == ['']:
            raise ValueError(
                f'`distill.{name}.from_teacher` needs several teachers, but there is '
                'only one `teacher`. Give `teachers=dict(<name>=dict(...))`.'
            )
        unknown = sorted(set(weights) - set(teachers))
        if unknown:
            raise ValueError(
                f'`distill.{name}.from_teacher` names the unknown teachers {unknown}. '
                f'`teachers=dict(<name>=dict(...))` has {teachers}.'
            )
        right = [
            isinstance(w, (int, float)) and 0 <= w < math.inf for w in weights.values()
        ]
        if not all(right) or not sum(weights.values()):
            raise ValueError(
                f'`distill.{name}.from_teacher` has the weights {dict(weights)}: each '
                'must be a finite number >= 0, and at least one must be above 0.'
            )
        for teacher, weight in weights.items():
            term = DistillTerm(name, cfg, teacher, weight)
            other = terms.get(term.key)
            if other is not None:
                raise ValueError(
                    f'The name {term.key!r} is ambiguous: entry {other.name!r} with '
                    f'teacher {other.teacher!r}, or entry {name!r} with teacher '
                    f'{teacher!r}. Rename one of them.'
                )
            if weight:
                terms[term.key] = term
    return terms


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
                'identifier without "loss", and not a method of a dict: it becomes the '
                'keys loss_<name> (added to the total) and <name>_inter, <name>_intra '
                '(only logged).'
            )
