# DINO on the first four of MobileNetV2's seven stages, with fewer layers, levels and
# queries. mmdet has no base config for DINO, and its code fixes 256 channels.
_base_ = '../_base_/bccd.py'
attention = dict(embed_dims=256, num_heads=8, dropout=0.0)
deformable = dict(embed_dims=256, num_levels=3, dropout=0.0)
ffn = dict(embed_dims=256, feedforward_channels=256, ffn_drop=0.0)
model = dict(
    type='DINO',
    num_queries=100,
    with_box_refine=True,
    as_two_stage=True,
    data_preprocessor=dict(
        type='DetDataPreprocessor',
        mean=[123.675, 116.28, 103.53],
        std=[58.395, 57.12, 57.375],
        bgr_to_rgb=True,
    ),
    backbone=dict(
        type='mmdist.MobileNetV2',
        num_stages=4,
        out_indices=(2, 3),
        init_cfg=_base_.imagenet,
    ),
    neck=dict(
        type='ChannelMapper',
        in_channels=[32, 64],
        kernel_size=1,
        out_channels=256,
        act_cfg=None,
        norm_cfg=dict(type='GN', num_groups=8),
        num_outs=3,
    ),
    encoder=dict(num_layers=1, layer_cfg=dict(self_attn_cfg=deformable, ffn_cfg=ffn)),
    decoder=dict(
        num_layers=2,
        return_intermediate=True,
        layer_cfg=dict(self_attn_cfg=attention, cross_attn_cfg=deformable, ffn_cfg=ffn),
        post_norm_cfg=None,
    ),
    positional_encoding=dict(num_feats=128, normalize=True, offset=0.0, temperature=20),
    bbox_head=dict(
        type='DINOHead',
        num_classes=3,
        sync_cls_avg_factor=True,
        loss_cls=dict(
            type='FocalLoss', use_sigmoid=True, gamma=2.0, alpha=0.25, loss_weight=1.0
        ),
        loss_bbox=dict(type='L1Loss', loss_weight=5.0),
        loss_iou=dict(type='GIoULoss', loss_weight=2.0),
    ),
    dn_cfg=dict(
        label_noise_scale=0.5,
        box_noise_scale=1.0,
        group_cfg=dict(dynamic=True, num_groups=None, num_dn_queries=50),
    ),
    train_cfg=dict(
        assigner=dict(
            type='HungarianAssigner',
            match_costs=[
                dict(type='FocalLossCost', weight=2.0),
                dict(type='BBoxL1Cost', weight=5.0, box_format='xywh'),
                dict(type='IoUCost', iou_mode='giou', weight=2.0),
            ],
        )
    ),
    test_cfg=dict(max_per_img=100),
)
train_cfg = dict(val_interval=200)
optim_wrapper = dict(
    clip_grad=dict(max_norm=1),
    paramwise_cfg=dict(custom_keys={'backbone': dict(lr_mult=0.5)}),
)
