# The first four of MobileNetV2's seven stages, 0.3 M parameters in all.
_base_ = ['mmdet::_base_/models/retinanet_r50_fpn.py', '../_base_/bccd.py']
model = dict(
    backbone=dict(
        _delete_=True,
        type='mmdist.MobileNetV2',
        num_stages=4,
        out_indices=(2, 3),
        init_cfg=_base_.imagenet,
    ),
    neck=dict(in_channels=[32, 64], out_channels=32, start_level=0, num_outs=3),
    bbox_head=dict(
        num_classes=3,
        in_channels=32,
        feat_channels=32,
        stacked_convs=1,
        norm_cfg=dict(type='GN', num_groups=8),
        anchor_generator=dict(octave_base_scale=3, strides=[8, 16, 32]),
    ),
)
