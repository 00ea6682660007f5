"""Child registries of mmdist, scope ``mmdist``.

mmengine imports this module by itself when a config names a type ``mmdist.*``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mmengine import registry as mmengine_registry
from mmengine.registry import Registry


def _child(parent: Registry, *locations: str) -> Registry:
    modules = [f'mmdist.{name}' for name in locations]
    return Registry(parent.name, parent=parent, scope='mmdist', locations=modules)


MODELS = _child(
    mmengine_registry.MODELS, 'losses', 'comparisons', 'distiller', 'teachers'
)
TASK_UTILS = _child(mmengine_registry.TASK_UTILS, 'comparisons')
DATASETS = _child(mmengine_registry.DATASETS, 'data')
TRANSFORMS = _child(mmengine_registry.TRANSFORMS, 'data')
DATA_SAMPLERS = _child(mmengine_registry.DATA_SAMPLERS, 'data')
HOOKS = _child(mmengine_registry.HOOKS, 'hooks')


def class_of(cfg: Any) -> Any:
    """What the ``type`` of a model's or a loss's config names; None if nothing."""
    kind = cfg.get('type') if isinstance(cfg, Mapping) else None
    with MODELS.switch_scope_and_registry(None) as registry:
        return registry.get(kind) if isinstance(kind, str) else kind
