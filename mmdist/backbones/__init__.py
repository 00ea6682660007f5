"""Backbones that mmdet and mmseg do not have."""

from torch import nn

from mmdist.registry import MODELS


@MODELS.register_module(name='MobileNetV2')
def build_mobilenet_v2(**kwargs) -> nn.Module:
    """Build a :class:`.mobilenet_v2.MobileNetV2`; only then is mmseg imported."""
    from .mobilenet_v2 import MobileNetV2

    return MobileNetV2(**kwargs)
