_base_ = './teacher-weak.py'
model = dict(pretrained='open-mmlab://resnet101_v1c', backbone=dict(depth=101))
