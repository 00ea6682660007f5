# That of the quickstart: four times as wide, on four times the scenes.
_base_ = '../../../configs/seg/quickstart/deeplabv3_w32_digits.py'
