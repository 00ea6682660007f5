"""Child registries of mmdist, scope ``mmdist``.

mmengine imports this module by itself when a config names a type ``mmdist.*``.
"""

from mmengine.registry import DATA_SAMPLERS as MMENGINE_DATA_SAMPLERS
from mmengine.registry import DATASETS as MMENGINE_DATASETS
from mmengine.registry import HOOKS as MMENGINE_HOOKS
from mmengine.registry import MODELS as MMENGINE_MODELS
from mmengine.registry import TASK_UTILS as MMENGINE_TASK_UTILS
from mmengine.registry import TRANSFORMS as MMENGINE_TRANSFORMS
from mmengine.registry import Registry

MODELS = Registry(
    'model',
    parent=MMENGINE_MODELS,
    scope='mmdist',
    locations=[
        'mmdist.losses',
        'mmdist.comparisons',
        'mmdist.distiller',
        'mmdist.backbones',
        'mmdist.teachers',
    ],
)
TASK_UTILS = Registry(
    'task util',
    parent=MMENGINE_TASK_UTILS,
    scope='mmdist',
    locations=['mmdist.comparisons'],
)
DATASETS = Registry(
    'dataset',
    parent=MMENGINE_DATASETS,
    scope='mmdist',
    locations=['mmdist.datasets'],
)
TRANSFORMS = Registry(
    'transform',
    parent=MMENGINE_TRANSFORMS,
    scope='mmdist',
    locations=['mmdist.datasets'],
)
DATA_SAMPLERS = Registry(
    'data sampler',
    parent=MMENGINE_DATA_SAMPLERS,
    scope='mmdist',
    locations=['mmdist.datasets'],
)
HOOKS = Registry(
    'hook', parent=MMENGINE_HOOKS, scope='mmdist', locations=['mmdist.hooks']
)
