# The student without a teacher, as the baseline.
_base_ = [
    'mmseg::pspnet/pspnet_r18-d8_4xb2-80k_cityscapes-512x1024.py',
    '../../_base_/schedules/published_40k.py',
]
train_cfg = _base_.published.train_cfg
optim_wrapper = _base_.published.optim_wrapper
param_scheduler = _base_.published.param_scheduler
default_hooks = _base_.published.default_hooks
auto_scale_lr = _base_.published.auto_scale_lr
