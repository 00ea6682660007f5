_base_ = [
    '../../_base_/models/retinanet_digits.py',
    '../../_base_/datasets/digits_detection.py',
    '../../_base_/schedules/digits_detection.py',
]
