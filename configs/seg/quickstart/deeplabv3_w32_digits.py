# The teacher: four times as wide, four times the scenes.
_base_ = 'deeplabv3_w8_digits.py'
model = dict(
    backbone=dict(base_channels=32),
    decode_head=dict(in_channels=128, channels=64),
    auxiliary_head=dict(in_channels=64, channels=64),
)
train_dataloader = dict(dataset=dict(ann_file='splits/train.txt'))
