# A RetinaNet for 128x96 scenes, trained from scratch: trainable BN, three levels, and
# anchors of 24 to 150 pixels, square or tall like digits.
_base_ = 'mmdet::_base_/models/retinanet_r50_fpn.py'
model = dict(
    backbone=dict(
        depth=18,
        base_channels=16,
        frozen_stages=-1,
        norm_eval=False,
        init_cfg=None,
    ),
    neck=dict(in_channels=[16, 32, 64, 128], out_channels=32, num_outs=3),
    bbox_head=dict(
        num_classes=10,
        in_channels=32,
        feat_channels=32,
        stacked_convs=2,
        norm_cfg=dict(type='GN', num_groups=8, requires_grad=True),
        anchor_generator=dict(
            octave_base_scale=3, ratios=[1.0, 2.0], strides=[8, 16, 32]
        ),
    ),
)
