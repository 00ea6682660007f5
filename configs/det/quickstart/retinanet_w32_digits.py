# The teacher: twice as wide, a deeper head, four times the scenes.
_base_ = 'retinanet_w16_digits.py'
model = dict(
    backbone=dict(base_channels=32),
    neck=dict(in_channels=[32, 64, 128, 256], out_channels=64),
    bbox_head=dict(in_channels=64, feat_channels=64, stacked_convs=3),
)
train_dataloader = dict(
    dataset=dict(times=1, dataset=dict(ann_file='annotations/train.json'))
)
