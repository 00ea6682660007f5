# The teacher, trained as mmseg trains on Cityscapes, except for the size.
_base_ = [
    'mmseg::_base_/models/deeplabv3_r50-d8.py',
    '../../_base_/datasets/camvid.py',
    'mmseg::_base_/default_runtime.py',
    'mmseg::_base_/schedules/schedule_20k.py',
]
norm_cfg = dict(type='BN', requires_grad=True)  # one GPU
model = dict(
    data_preprocessor=dict(size=(360, 480)),
    backbone=dict(norm_cfg=norm_cfg),
    decode_head=dict(num_classes=11, norm_cfg=norm_cfg),
    auxiliary_head=dict(num_classes=11, norm_cfg=norm_cfg),
)
