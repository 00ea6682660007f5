# All of MobileNetV2 with narrow, shallow heads, and half the training.
_base_ = './teacher-strong.py'
model = dict(
    neck=dict(out_channels=48),
    bbox_head=dict(in_channels=48, feat_channels=48, stacked_convs=1),
)
max_iters = 300
train_cfg = dict(max_iters=max_iters, val_interval=max_iters)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=30),
    dict(type='PolyLR', power=0.9, by_epoch=False, begin=30, end=max_iters),
]
