_base_ = './student.py'
model = _base_.resnet101
