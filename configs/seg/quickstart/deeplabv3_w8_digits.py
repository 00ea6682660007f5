_base_ = [
    '../../_base_/models/deeplabv3_digits.py',
    '../../_base_/datasets/digits_segmentation.py',
    '../../_base_/schedules/digits_segmentation.py',
]
