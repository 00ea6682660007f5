# FCN on the first four of MobileNetV2's seven stages, 0.28 M parameters, logits at 1/8.
_base_ = '../_base_/camvid.py'
model = dict(
    backbone=dict(
        num_stages=4,
        strides=(1, 2, 2, 1, 1, 1, 1),
        dilations=(1, 1, 1, 2, 1, 1, 1),
    ),
    decode_head=dict(
        type='FCNHead',
        in_channels=64,
        channels=64,
        num_convs=1,
        concat_input=False,
    ),
)
# half a batch, to save time; the teachers use 8
train_dataloader = dict(batch_size=4)
