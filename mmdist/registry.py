"""Child registries of mmdist, scope ``mmdist``.

mmengine imports this module by itself when a config names a type ``mmdist.*``.
"""

from mmengine.registry import MODELS as MMENGINE_MODELS
from mmengine.registry import Registry

MODELS = Registry(
    'model',
    parent=MMENGINE_MODELS,
    scope='mmdist',
    locations=['mmdist.losses', 'mmdist.distillation'],
)
