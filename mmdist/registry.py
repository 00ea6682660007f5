"""Child registries of mmdist, with scope ``mmdist``.

mmengine imports this module itself when a config names a type ``mmdist.*``.
"""

from __future__ import annotations

import inspect
import re
import traceback
from collections.abc import Mapping
from typing import Any

from mmengine import registry as root
from mmengine.registry import Registry, build_from_cfg

from .lookup import arguments_of, did_you_mean


def _child(parent: Registry, *locations: str) -> Registry:
    modules = [f'mmdist.{name}' for name in locations]
    return Registry(parent.name, parent=parent, scope='mmdist', locations=modules)


MODELS = _child(root.MODELS, 'losses', 'comparisons', 'distiller', 'teachers')
TASK_UTILS = _child(root.TASK_UTILS, 'comparisons')
DATASETS = _child(root.DATASETS, 'data')
TRANSFORMS = _child(root.TRANSFORMS, 'data')
DATA_SAMPLERS = _child(root.DATA_SAMPLERS, 'data')
HOOKS = _child(root.HOOKS, 'hooks')


def class_of(cfg: Any) -> Any:
    """What the ``type`` in a config of a model or loss names; None if unknown."""
    kind = cfg.get('type') if isinstance(cfg, Mapping) else None
    with MODELS.switch_scope_and_registry(None) as registry:
        return registry.get(kind) if isinstance(kind, str) else kind


def no_such_type(kind: Any, registry: Registry) -> str:
    """The error message for a ``type`` that a registry does not know."""
    known = list(registry.module_dict)
    while registry.parent is not None:
        registry = registry.parent
        known += registry.module_dict
    if (ours := registry.children.get('mmdist')) is not None:
        ours.import_from_location()
        known += [f'mmdist.{name}' for name in ours.module_dict]
    return (
        f'No {registry.name} is called {kind!r}.{did_you_mean(kind, known)} Names of '
        'mmdist begin with `mmdist.`; your own types need `custom_imports`.'
    )


def why_not_built(error: Exception) -> str:
    """The error message for a misspelt type or argument in a config; else ''."""
    calls = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    found = [f for f in calls if f.f_code is build_from_cfg.__code__]
    if not found:
        return ''
    names = found[-1].f_locals
    if isinstance(error, KeyError) and 'obj_type' in names and found[-1] is calls[-1]:
        return no_such_type(names['obj_type'], names['registry'])
    word = re.search(r"unexpected keyword argument '(\w+)'", str(error))
    cls = names.get('obj_cls')
    if not (isinstance(error, TypeError) and word and inspect.isclass(cls)):
        return ''
    nearest = did_you_mean(word[1], arguments_of(cls))
    return f'`{cls.__name__}`: unknown argument {word[1]!r}.{nearest}'
