# The authors' student without a teacher. mmseg's has 512 channels in its decode head,
# and an auxiliary head.
_base_ = [
    'mmseg::mobilenet_v2/mobilenet-v2-d8_deeplabv3_4xb2-80k_cityscapes-512x1024.py',
    '../../_base_/schedules/published_40k.py',
]
model = dict(decode_head=dict(channels=128), auxiliary_head=None)
train_cfg = _base_.published.train_cfg
optim_wrapper = _base_.published.optim_wrapper
param_scheduler = _base_.published.param_scheduler
default_hooks = _base_.published.default_hooks
auto_scale_lr = _base_.published.auto_scale_lr
