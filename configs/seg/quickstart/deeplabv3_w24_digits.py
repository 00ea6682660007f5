# The teacher: three times as wide, four times the scenes.
_base_ = 'deeplabv3_w8_digits.py'
model = dict(
    backbone=dict(stem_channels=32, base_channels=24),
    decode_head=dict(in_channels=192, channels=48),
    auxiliary_head=dict(in_channels=96, channels=48),
)
train_dataloader = dict(dataset=dict(ann_file='splits/train.txt'))
