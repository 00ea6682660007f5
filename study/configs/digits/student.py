# That of the quickstart, from scratch on 300 scenes of tools/dev/make_digits.py.
_base_ = '../../../configs/seg/quickstart/deeplabv3_w8_digits.py'
