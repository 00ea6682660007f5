"""mmdet's own configs at a size that a test can train."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path

import mmdet
import torch
from builders import build_distiller
from mmdet.models.backbones.trident_resnet import TridentConv
from mmdet.registry import MODELS as MMDET_MODELS
from mmdet.testing import demo_mm_inputs, demo_mm_proposals
from mmdet.utils import register_all_modules
from mmengine.config import Config, ConfigDict
from mmengine.logging import MessageHub
from torch import nn

CONFIGS = Path(mmdet.__file__).parent / '.mim' / 'configs'
CHANNELS = (
    'channel',
    'embed_dim',
    'num_feats',
    'num_groups',
    'hidden_dim',
    'inplanes',
    'filters',
)
WITHOUT_CHANNELS = ('EfficientNet', 'MobileNetV2', 'RegNet')  # in their configs
SINE_BOXES = ('ConditionalDETR', 'DDQDETR', 'DINO')  # boxes embedded in 512 channels
AT_MOST = {'num_queries': 30, 'num_proposals': 30, 'num': 64, 'num_points': 400}

# Short names for a config of each family in mmdet's zoo.
FAMILIES = {
    'ATSS': 'atss/atss_r50_fpn_1x_coco.py',
    'CenterNet': 'centernet/centernet_r18_8xb16-crop512-140e_coco.py',
    'DDQ': 'ddq/ddq-detr-4scale_r50_8xb2-12e_coco.py',
    'DETR': 'detr/detr_r50_8xb2-150e_coco.py',
    'DINO': 'dino/dino-4scale_r50_8xb2-12e_coco.py',
    'Deformable DETR': 'deformable_detr/deformable-detr_r50_16xb2-50e_coco.py',
    'FCOS': 'fcos/fcos_r50-caffe_fpn_gn-head_1x_coco.py',
    'FSAF': 'fsaf/fsaf_r50_fpn_1x_coco.py',
    'FreeAnchor': 'free_anchor/freeanchor_r50_fpn_1x_coco.py',
    'GFL': 'gfl/gfl_r50_fpn_1x_coco.py',
    'HTC': 'htc/htc_r50_fpn_1x_coco.py',
    'Cascade Mask R-CNN': 'cascade_rcnn/cascade-mask-rcnn_r50_fpn_1x_coco.py',
    'Cascade R-CNN': 'cascade_rcnn/cascade-rcnn_r50_fpn_1x_coco.py',
    'Faster R-CNN': 'faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py',
    'Mask R-CNN': 'mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py',
    'Mask2Former': 'mask2former/mask2former_r50_8xb2-lsj-50e_coco.py',
    'PAA': 'paa/paa_r50_fpn_1x_coco.py',
    'RTMDet': 'rtmdet/rtmdet_tiny_8xb32-300e_coco.py',
    'RetinaNet': 'retinanet/retinanet_r50_fpn_1x_coco.py',
    'SOLO': 'solo/solo_r50_fpn_1x_coco.py',
    'SSD': 'ssd/ssd300_coco.py',
    'Sparse R-CNN': 'sparse_rcnn/sparse-rcnn_r50_fpn_1x_coco.py',
    'TOOD': 'tood/tood_r50_fpn_1x_coco.py',
    'VFNet': 'vfnet/vfnet_r50_fpn_1x_coco.py',
    'YOLOX': 'yolox/yolox_tiny_8xb8-300e_coco.py',
    'YOLOv3': 'yolo/yolov3_mobilenetv2_8xb24-320-300e_coco.py',
}

Sizes = tuple[tuple[int, int], ...]
SIZES: Sizes = ((64, 64), (48, 64))


def shrink(cfg, factor: int):
    """Divide all channels, also defaults, by ``factor``; drop pretrained weights."""
    if isinstance(cfg, (list, tuple)):
        return type(cfg)(shrink(x, factor) for x in cfg)
    if not isinstance(cfg, dict):
        return cfg
    out = ConfigDict()
    for key, value in {**_default_channels(cfg.get('type')), **cfg}.items():
        if key in ('pretrained', 'teacher_ckpt') or _is_pretrained(key, value):
            continue
        if key == 'widen_factor':
            out[key] = value / factor
        elif any(word in key for word in CHANNELS):
            out[key] = _divide(value, factor)
        elif key == 'depth' and value in (101, 152):
            out[key] = 50
        elif key == 'size':  # what BatchFixedSizePad pads to
            out[key] = (128, 128)
        elif isinstance(value, int) and value > AT_MOST.get(key, value):
            out[key] = AT_MOST[key]
        else:
            # without a launcher there is no process group
            is_sync = value in ('SyncBN', 'MMSyncBN')
            out[key] = 'BN' if is_sync else shrink(value, factor)
    return out


def _is_pretrained(key: str, value) -> bool:
    return key == 'init_cfg' and isinstance(value, dict) and 'checkpoint' in value


def _divide(value, factor: int):
    if isinstance(value, (list, tuple)):
        return type(value)(_divide(x, factor) for x in value)
    if isinstance(value, dict):
        return shrink(value, factor)
    # 3 is RGB, -1 and 1 have special meanings
    return max(value // factor, 1) if isinstance(value, int) and value > 3 else value


def _default_channels(type_: str | type | None) -> dict:
    """The channels that a module takes if its config does not set them."""
    cls = MMDET_MODELS.get(type_) if isinstance(type_, str) else type_
    defaults = {}
    for parent in cls.__mro__ if isinstance(cls, type) else ():
        parameters = inspect.signature(parent.__init__).parameters
        for name, parameter in parameters.items():
            if any(word in name for word in CHANNELS) and name not in defaults:
                defaults[name] = parameter.default
        if all(p.kind is not p.VAR_KEYWORD for p in parameters.values()):
            break  # a config cannot pass arguments to a parent
    return {name: value for name, value in defaults.items() if isinstance(value, int)}


def model_config(path: str, factor: int = 8, edit: Callable | None = None):
    """The model of a config of the zoo, its channels divided by ``factor``.

    Random weights are sure of nothing, so the detections of any score are kept.

    Args:
        path: Path within the zoo.
        factor: Divisor of the channels.
        edit: Repairs the shrunk config; takes it, the original one and the factor.
    """
    original = Config.fromfile(CONFIGS / path, import_custom_modules=False).model
    cfg = shrink(original, factor)
    backbone = original.get('backbone', {}).get('type')
    if original.type in SINE_BOXES or original.get('as_two_stage'):
        _keep_transformer(cfg, original, factor)
    elif backbone in WITHOUT_CHANNELS:
        cfg.backbone = shrink(original.backbone, 1)
        cfg.neck.in_channels = original.neck.in_channels
    if cfg.get('test_cfg'):
        cfg.test_cfg.get('rcnn', cfg.test_cfg).score_thr = 0.0
    if edit is not None:
        edit(cfg, original, factor)
    return cfg


def _keep_transformer(cfg, original, factor):
    for key in ('encoder', 'decoder', 'positional_encoding', 'bbox_head', 'dn_cfg'):
        if key in cfg:
            cfg[key] = shrink(original[key], 1)
    cfg.neck = shrink(original.neck, 1)
    cfg.neck.in_channels = [x // factor for x in original.neck.in_channels]


def build_pair(
    student: str,
    teacher: str | None = None,
    distill: dict | None = None,
    factors: tuple[int, int] = (8, 4),
    edit: Callable | None = None,
    sizes: Sizes = SIZES,
    balance: float | None = None,  # most tests look at each loss by itself
) -> nn.Module:
    """A student and a random teacher, with 1/8 and 1/4 of the channels."""
    register_all_modules()
    guest = model_config(teacher or student, factors[1], edit)
    model = build_distiller(
        model_config(student, factors[0], edit),
        teacher=dict(config=guest, allow_random=True),
        distill=distill,
        balance=balance,
    )
    for side in (model, model.teacher.model):
        _spread(side)
        _calibrate(side, sizes)
    model.train()
    return model  # LD's own `train` returns None


def _spread(model: nn.Module) -> None:
    """Enlarge mmdet's initial head weights, with which all scores are equal in fp32."""
    for name, parameter in model.named_parameters():
        if 'backbone' not in name and parameter.ndim > 1 and parameter.std() < 0.02:
            nn.init.kaiming_normal_(parameter)
    for module in model.modules():
        if isinstance(module, TridentConv):  # mmdet never initialises it
            nn.init.kaiming_normal_(module.weight)


def _calibrate(model: nn.Module, sizes: Sizes) -> None:
    """Fill BN's running statistics; otherwise deep random nets vanish or explode."""
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d) and m.eps]
    momentum = [norm.momentum for norm in norms]
    model.eval()
    for norm in norms:
        norm.train().momentum = 1.0
    with torch.no_grad():
        model.extract_feat(batch(model, sizes)['inputs'])
    for norm, value in zip(norms, momentum, strict=True):
        norm.momentum = value
    model.eval()


def batch(
    model: nn.Module,
    sizes: Sizes = SIZES,
    num_classes: int = 3,
    **kwargs,
) -> dict:
    """Preprocessed images of noise with boxes, some of them padded."""
    shapes = [(3, *size) for size in sizes]
    has_masks = (
        model.with_mask
        or hasattr(model, 'panoptic_head')
        or hasattr(getattr(model, 'bbox_head', None), 'mask_head')  # RTMDet-Ins
    )
    kwargs.setdefault('with_mask', has_masks)
    kwargs.setdefault('with_semantic', True)
    data = demo_mm_inputs(
        batch_size=len(sizes), image_shapes=shapes, num_items=[4] * len(sizes), **kwargs
    )
    for sample in data['data_samples']:
        sample.gt_instances.labels %= num_classes
    if hasattr(model, 'roi_head') and not model.with_rpn:
        proposals = demo_mm_proposals(shapes, 32)
        for sample, given in zip(data['data_samples'], proposals, strict=True):
            sample.proposals = given
    # A Runner tells these to models that count epochs.
    for key in ('iter', 'epoch'):
        MessageHub.get_current_instance().update_info(key, 0)
    return model.data_preprocessor(data, training=True)
