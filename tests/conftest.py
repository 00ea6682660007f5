"""Tiny data sets in the field's own formats, and tiny configs of real models."""

from __future__ import annotations

import json
import os
from pathlib import Path

# One thread each: small tensors gain nothing by more, and tests run side by side. Set
# before numpy and torch are loaded, and handed down to the processes that tests start.
os.environ.setdefault('OMP_NUM_THREADS', '1')

import cv2
import numpy as np
import pytest
import torch

# Nothing is asked of the hub; read when transformers is imported, which mmengine does
os.environ.setdefault('HF_HUB_OFFLINE', '1')

# Triton's kernels are interpreted where there is no GPU; read when it is imported
if not torch.cuda.is_available():
    os.environ.setdefault('TRITON_INTERPRET', '1')

SIZE = (96, 128)  # height, width
DET_CLASSES = ('person', 'car', 'dog')
SEG_CLASSES = ('sky', 'road', 'tree')

# Student settings that make a real RetinaNet small and fast.
TINY_RETINANET = """
    backbone=dict(base_channels=8, init_cfg=None),
    neck=dict(in_channels=[8, 16, 32, 64], out_channels=16),
    bbox_head=dict(num_classes=3, in_channels=16, feat_channels=16, stacked_convs=1)"""

DET_CONFIG = """
_base_ = 'mmdet::retinanet/retinanet_r18_fpn_1x_coco.py'
model = dict({model})
dataset = dict(
    _delete_=True, type='CocoDataset', metainfo=dict(classes={classes}),
    data_root={data_root!r}, ann_file='train.json', data_prefix=dict(img='images/'),
    pipeline=[
        dict(type='LoadImageFromFile'), dict(type='LoadAnnotations', with_bbox=True),
        dict(type='RandomFlip', prob=0.5), dict(type='PackDetInputs')])
test_pipeline = [
    dict(type='LoadImageFromFile'), dict(type='Resize', scale=(128, 96)),
    dict(type='LoadAnnotations', with_bbox=True),
    dict(type='PackDetInputs', meta_keys=(
        'img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor'))]
train_dataloader = dict(
    batch_size=2, num_workers=0, persistent_workers=False, dataset=dataset)
val_dataloader = dict(
    num_workers=0, persistent_workers=False,
    dataset=dict(**dataset, test_mode=True))
val_dataloader['dataset']['pipeline'] = test_pipeline
test_dataloader = val_dataloader
val_evaluator = dict(ann_file={data_root!r} + '/train.json')
test_evaluator = val_evaluator
train_cfg = dict(max_epochs=2, val_interval=2)
param_scheduler = []
optim_wrapper = dict(optimizer=dict(lr=0.001))
default_hooks = dict(logger=dict(interval=1), checkpoint=dict(interval=1))
randomness = dict(seed=0)
auto_scale_lr = dict(enable=False)
"""

TINY_SEGMENTOR = """
    data_preprocessor=dict(size=(96, 128)),
    backbone=dict(base_channels=8, norm_cfg=dict(type='BN')),
    pretrained=None,
    decode_head=dict(
        in_channels=64, channels=16, num_classes=3, norm_cfg=dict(type='BN')),
    auxiliary_head=dict(
        in_channels=32, channels=8, num_classes=3, norm_cfg=dict(type='BN'))"""

SEG_CONFIG = """
_base_ = 'mmseg::pspnet/pspnet_r18-d8_4xb2-80k_cityscapes-512x1024.py'
model = dict({model})
dataset = dict(
    _delete_=True, type='BaseSegDataset', metainfo=dict(classes={classes}),
    data_root={data_root!r}, img_suffix='.png', seg_map_suffix='.png',
    data_prefix=dict(img_path='images', seg_map_path='labels'),
    pipeline=[
        dict(type='LoadImageFromFile'), dict(type='LoadAnnotations'),
        dict(type='RandomFlip', prob=0.5), dict(type='PackSegInputs')])
train_dataloader = dict(
    batch_size=2, num_workers=0, persistent_workers=False, dataset=dataset)
val_dataloader = dict(num_workers=0, persistent_workers=False, dataset=dict(**dataset))
val_dataloader['dataset']['pipeline'] = [
    dict(type='LoadImageFromFile'), dict(type='LoadAnnotations'),
    dict(type='PackSegInputs')]
test_dataloader = val_dataloader
train_cfg = dict(max_iters=4, val_interval=4)
param_scheduler = []
default_hooks = dict(logger=dict(interval=1), checkpoint=dict(interval=2))
randomness = dict(seed=0)
"""


@pytest.fixture(scope='session')
def coco_root(tmp_path_factory) -> Path:
    """Four images of random texture with boxes, as a COCO json."""
    root = tmp_path_factory.mktemp('coco')
    (root / 'images').mkdir()
    rng = np.random.default_rng(0)
    images, annotations = [], []
    for image_id in range(1, 5):
        name = f'{image_id}.png'
        cv2.imwrite(
            str(root / 'images' / name),
            rng.integers(0, 256, (*SIZE, 3), dtype=np.uint8),
        )
        images.append(dict(id=image_id, file_name=name, height=SIZE[0], width=SIZE[1]))
        for category in range(1, 4):
            x, y = rng.integers(0, 60, 2).tolist()
            annotations.append(
                dict(
                    id=len(annotations) + 1,
                    image_id=image_id,
                    category_id=category,
                    bbox=[x, y, 32, 30],
                    area=32 * 30,
                    iscrowd=0,
                )
            )
    categories = [dict(id=i + 1, name=name) for i, name in enumerate(DET_CLASSES)]
    (root / 'train.json').write_text(
        json.dumps(dict(images=images, annotations=annotations, categories=categories))
    )
    return root


@pytest.fixture(scope='session')
def seg_root(tmp_path_factory) -> Path:
    """Four images of random texture with label maps, some of it 255."""
    root = tmp_path_factory.mktemp('seg')
    rng = np.random.default_rng(0)
    for folder in ('images', 'labels'):
        (root / folder).mkdir()
    for i in range(4):
        cv2.imwrite(
            str(root / 'images' / f'{i}.png'),
            rng.integers(0, 256, (*SIZE, 3), dtype=np.uint8),
        )
        label = np.kron(rng.integers(0, 3, (3, 4)), np.ones((32, 32))).astype(np.uint8)
        label[:16] = 255
        cv2.imwrite(str(root / 'labels' / f'{i}.png'), label)
    return root


@pytest.fixture(scope='session')
def det_config(coco_root) -> str:
    """Config text of a tiny RetinaNet on the tiny COCO data."""
    return DET_CONFIG.format(
        model=TINY_RETINANET, classes=DET_CLASSES, data_root=str(coco_root)
    )


@pytest.fixture(scope='session')
def seg_config(seg_root) -> str:
    """Config text of a tiny PSPNet on the tiny segmentation data."""
    return SEG_CONFIG.format(
        model=TINY_SEGMENTOR, classes=SEG_CLASSES, data_root=str(seg_root)
    )
