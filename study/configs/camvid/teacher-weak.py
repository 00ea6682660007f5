# The stronger teacher's network, trained for 600 iterations instead of 1,600.
_base_ = './teacher-strong.py'
max_iters = 600
train_cfg = dict(max_iters=max_iters, val_interval=max_iters)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=30),
    dict(type='PolyLR', power=0.9, by_epoch=False, begin=30, end=max_iters),
]
