_base_ = 'mmdet::_base_/default_runtime.py'
max_epochs = 6
train_cfg = dict(type='EpochBasedTrainLoop', max_epochs=max_epochs, val_interval=1)
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')
optim_wrapper = dict(
    optimizer=dict(type='AdamW', lr=2e-3, weight_decay=0.05),
    clip_grad=dict(max_norm=10),
)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=50),
    dict(type='CosineAnnealingLR', T_max=max_epochs, convert_to_iter_based=True),
]
# One checkpoint, at the end, under a name that does not depend on the schedule.
default_hooks = dict(
    logger=dict(interval=10), checkpoint=dict(interval=1000, filename_tmpl='last.pth')
)
randomness = dict(seed=0)
