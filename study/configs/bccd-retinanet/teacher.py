# All of MobileNetV2, wider and deeper heads, 2.5 M parameters in all.
_base_ = './student.py'
model = dict(
    backbone=dict(num_stages=7, out_indices=(2, 4, 6)),
    neck=dict(in_channels=[32, 96, 320], out_channels=96),
    bbox_head=dict(in_channels=96, feat_channels=96, stacked_convs=2),
)
max_iters = 600
train_cfg = dict(max_iters=max_iters, val_interval=max_iters)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=30),
    dict(type='PolyLR', power=0.9, by_epoch=False, begin=30, end=max_iters),
]
