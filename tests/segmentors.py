"""Thin versions of the segmentors in mmseg's configs, and a batch for them."""

from __future__ import annotations

from pathlib import Path

import mmseg
import torch
from builders import build_distiller
from mmengine.config import Config
from mmengine.registry import DefaultScope
from mmengine.structures import PixelData
from mmseg.structures import SegDataSample
from mmseg.utils import register_all_modules
from torch import nn

ZOO = Path(mmseg.__file__).parent / '.mim' / 'configs'


def zoo_model(name: str, width: float = 1 / 8, **overrides) -> dict:
    """The model of an mmseg config, without pretrained weights or a fixed size.

    Args:
        name: '<directory>/<beginning of the file name>'.
        width: Factor for all numbers of channels from 64 up.
        overrides: Merged into the model's config, as ``--cfg-options`` are.
    """
    directory, beginning = name.split('/')
    path = min((ZOO / directory).glob(f'{beginning}*.py'))
    model = thin(Config.fromfile(path).model, width)
    for key in ('size', 'size_divisor', 'test_cfg'):
        model.data_preprocessor.pop(key, None)
    config = Config(dict(model=model))
    config.merge_from_dict({f'model.{key}': v for key, v in overrides.items()})
    return config.model


def thin(cfg, width: float, key: str = ''):
    """A model's config with its channels times ``width``, without weights to load."""
    if isinstance(cfg, dict):
        kind = str(cfg.get('type'))
        if kind == 'SyncBN':
            cfg['type'] = 'BN'
        elif kind.startswith(('ResNet', 'ResNeSt')):
            cfg.setdefault('base_channels', 64)
        for k in cfg:
            if k == 'pretrained' or (
                k == 'init_cfg' and 'Pretrained' in str((cfg[k] or {}).get('type'))
            ):
                cfg[k] = None
            else:
                cfg[k] = thin(cfg[k], width, k)
        return cfg
    if isinstance(cfg, (list, tuple)):
        return type(cfg)(thin(value, width, key) for value in cfg)
    counts_channels = key.endswith(('channels', 'dims', 'dim', 'num_feats'))
    wide = counts_channels and isinstance(cfg, int) and cfg >= 64
    return int(cfg * width) if wide else cfg


def make_batch(
    num_classes: int,
    size: tuple[int, int] = (64, 64),
    valid: tuple[int, int] | None = None,
) -> dict:
    """Two images as mmseg's data_preprocessor gives them; the top of each is void.

    Args:
        num_classes: Number of classes of the labels.
        size: Height and width of the batch.
        valid: Height and width of the second image without its padding.
    """
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(2, 3, *size, generator=generator)
    samples = []
    for image, shape in zip(inputs, (size, valid or size), strict=True):
        cells = torch.randint(
            num_classes, (size[0] // 8, size[1] // 8), generator=generator
        )
        labels = cells.repeat_interleave(8, 0).repeat_interleave(8, 1)[None]
        labels[:, :8] = 255
        labels[:, shape[0] :] = 255
        labels[:, :, shape[1] :] = 255
        image[:, shape[0] :] = 0
        image[:, :, shape[1] :] = 0
        sample = SegDataSample(
            metainfo=dict(img_shape=shape, pad_shape=size, ori_shape=size)
        )
        sample.gt_sem_seg = PixelData(data=labels)
        sample.gt_edge_map = PixelData(data=labels % 2)
        samples.append(sample)
    return dict(inputs=inputs, data_samples=samples)


def distilled(
    student: dict, teacher: dict, checkpoint=None, distill=None, **comparison
) -> nn.Module:
    """A student in training mode, distilled from a teacher.

    Args:
        student: Config of the model.
        teacher: Config of the model.
        checkpoint: The teacher's weights; None takes random ones.
        distill: What is compared; None takes SegLogits.
        comparison: Arguments of SegLogits.
    """
    register_all_modules(init_default_scope=False)
    teacher = dict(
        config=teacher, checkpoint=checkpoint, allow_random=checkpoint is None
    )
    distill = distill or dict(dist=dict(type='mmdist.SegLogits', **comparison))
    with DefaultScope.overwrite_default_scope('mmseg'):
        model = build_distiller(student, teacher=teacher, distill=distill)
    calibrate(model.teacher.model)
    return model


def calibrate(model: nn.Module) -> None:
    """Fill BN's statistics; otherwise deep random models' eval outputs are constant."""
    training = {module: module.training for module in model.modules()}
    model.train()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.momentum = None  # the mean of all batches since the last reset
            module.reset_running_stats()
    with torch.no_grad():
        model.extract_feat(torch.randn(4, 3, 64, 64))
    for module, mode in training.items():
        module.training = mode
