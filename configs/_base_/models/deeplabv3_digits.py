# A DeepLabV3 for 128x96 scenes, trained from scratch, on three of ResNet's four stages.
_base_ = 'mmseg::_base_/models/deeplabv3_r50-d8.py'
norm_cfg = dict(type='BN', requires_grad=True)
model = dict(
    data_preprocessor=dict(size=(96, 128)),
    pretrained=None,
    backbone=dict(
        depth=18,
        num_stages=3,
        strides=(1, 2, 1),
        dilations=(1, 1, 2),
        out_indices=(0, 1, 2),
        stem_channels=16,
        base_channels=8,
        zero_init_residual=False,
        norm_cfg=norm_cfg,
    ),
    decode_head=dict(
        in_channels=32,
        in_index=2,
        channels=16,
        dilations=(1, 3, 6, 9),
        dropout_ratio=0,
        num_classes=10,
        norm_cfg=norm_cfg,
        # the mean over the labelled pixels, like the distillation loss; below too
        loss_decode=dict(avg_non_ignore=True),
    ),
    auxiliary_head=dict(
        in_channels=16,
        in_index=1,
        channels=16,
        dropout_ratio=0,
        num_classes=10,
        norm_cfg=norm_cfg,
        loss_decode=dict(avg_non_ignore=True),
    ),
)
