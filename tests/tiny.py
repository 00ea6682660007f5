"""Texts of tiny configs of real models, and the size and classes of their data."""

from __future__ import annotations

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
