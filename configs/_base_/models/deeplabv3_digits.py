# A DeepLabV3 for 128x96 scenes, trained from scratch.
_base_ = 'mmseg::_base_/models/deeplabv3_r50-d8.py'
norm_cfg = dict(type='BN', requires_grad=True)
model = dict(
    data_preprocessor=dict(size=(96, 128)),
    pretrained=None,
    backbone=dict(
        depth=18,
        stem_channels=16,
        base_channels=8,
        zero_init_residual=False,
        norm_cfg=norm_cfg,
    ),
    decode_head=dict(
        in_channels=64,
        channels=16,
        dilations=(1, 3, 6, 9),
        num_classes=11,
        norm_cfg=norm_cfg,
    ),
    auxiliary_head=dict(
        in_channels=32,
        channels=16,
        num_classes=11,
        norm_cfg=norm_cfg,
    ),
)
