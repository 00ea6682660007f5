"""mmdet's own configs at a size that a test can train."""

from __future__ import annotations

import inspect
import logging
from pathlib import Path

import mmdet
import torch
from mmdet.registry import MODELS as MMDET_MODELS
from mmdet.testing import demo_mm_inputs
from mmdet.utils import register_all_modules
from mmengine.config import Config, ConfigDict
from mmengine.logging import MMLogger
from torch import nn

from mmdist.registry import MODELS

CONFIGS = Path(mmdet.__file__).parent / '.mim' / 'configs'
CHANNELS = ('channels', 'embed_dim', 'num_feats', 'num_groups', 'hidden_dim', 'widen')


def shrink(cfg, factor: int):
    """Divide every number of channels by ``factor``, drop pretrained weights.

    Dividing all of them, defaults too, keeps a model consistent whatever it is made of.
    """
    if isinstance(cfg, (list, tuple)):
        return type(cfg)(shrink(x, factor) for x in cfg)
    if not isinstance(cfg, dict):
        return cfg
    out = ConfigDict()
    for key, value in {**_default_channels(cfg.get('type')), **cfg}.items():
        if key == 'pretrained' or (
            key == 'init_cfg' and 'Pretrained' in str(value.get('type', ''))
        ):
            continue
        is_channels = any(word in key for word in CHANNELS)
        out[key] = (_divide if is_channels else shrink)(value, factor)
    return out


def _default_channels(type_: str | type | None) -> dict:
    """The numbers of channels that a module takes if its config does not say."""
    cls = MMDET_MODELS.get(type_) if isinstance(type_, str) else type_
    if not isinstance(cls, type):
        return {}
    return {
        name: parameter.default
        for parent in reversed(cls.__mro__)
        for name, parameter in inspect.signature(parent.__init__).parameters.items()
        if any(word in name for word in CHANNELS) and isinstance(parameter.default, int)
    }


def _divide(value, factor: int):
    if isinstance(value, (list, tuple)):
        return type(value)(_divide(x, factor) for x in value)
    if isinstance(value, float):
        return value / factor
    # 3 is RGB, -1 and 1 are marks
    return max(value // factor, 1) if isinstance(value, int) and value > 3 else value


def model_config(path: str, factor: int = 8) -> ConfigDict:
    """The model of a config of the zoo, its channels divided by ``factor``."""
    return shrink(Config.fromfile(CONFIGS / path).model, factor)


def build_pair(student: str, teacher: str | None = None, distill: dict | None = None):
    """A student of 1/8 of the channels, its random teacher of 1/4 of them."""
    register_all_modules()
    MMLogger.get_current_instance().setLevel(logging.ERROR)  # a line per parameter
    torch.manual_seed(0)
    model = MODELS.build(
        dict(
            type='mmdist.Distiller',
            student=model_config(student),
            teacher=dict(config=model_config(teacher or student, 4), allow_random=True),
            distill=distill,
        )
    )
    model.init_weights()
    return model.train()


def batch(model: nn.Module, sizes=((64, 64), (48, 64)), num_classes: int = 3, **kwargs):
    """Two images of noise with boxes, one of them padded, after preprocessing."""
    data = demo_mm_inputs(
        batch_size=len(sizes),
        image_shapes=[(3, *size) for size in sizes],
        num_items=[4] * len(sizes),
        **kwargs,
    )
    for sample in data['data_samples']:
        sample.gt_instances.labels %= num_classes
    return model.data_preprocessor(data, training=True)
