# All of MobileNetV2 and twice the layers.
_base_ = './student.py'
model = dict(
    num_queries=150,
    backbone=dict(num_stages=7, out_indices=(2, 4, 6)),
    neck=dict(in_channels=[32, 96, 320]),
    encoder=dict(num_layers=2, layer_cfg=dict(ffn_cfg=dict(feedforward_channels=512))),
    decoder=dict(num_layers=4, layer_cfg=dict(ffn_cfg=dict(feedforward_channels=512))),
)
max_iters = 600
train_cfg = dict(max_iters=max_iters)
optim_wrapper = dict(optimizer=dict(lr=5e-4))
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=30),
    dict(type='PolyLR', power=0.9, by_epoch=False, begin=30, end=max_iters),
]
