# The first four of MobileNetV2's seven stages, 0.4 M parameters in all.
_base_ = ['mmdet::_base_/models/faster-rcnn_r50_fpn.py', '../_base_/bccd.py']
model = dict(
    backbone=dict(
        _delete_=True,
        type='mmdist.MobileNetV2',
        num_stages=4,
        out_indices=(2, 3),
        init_cfg=_base_.imagenet,
    ),
    neck=dict(in_channels=[32, 64], out_channels=32, num_outs=3),
    rpn_head=dict(
        in_channels=32,
        feat_channels=32,
        anchor_generator=dict(scales=[4], strides=[8, 16, 32]),
    ),
    roi_head=dict(
        bbox_roi_extractor=dict(
            out_channels=32, featmap_strides=[8, 16, 32], finest_scale=32
        ),
        bbox_head=dict(in_channels=32, fc_out_channels=64, num_classes=3),
    ),
    train_cfg=dict(
        rpn_proposal=dict(nms_pre=500, max_per_img=250),
        rcnn=dict(sampler=dict(num=128)),
    ),
    test_cfg=dict(rpn=dict(nms_pre=250, max_per_img=250)),
)
