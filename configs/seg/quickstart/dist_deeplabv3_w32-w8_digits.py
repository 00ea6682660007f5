_base_ = 'deeplabv3_w8_digits.py'
model = dict(
    _delete_=True,
    type='mmdist.Distiller',
    student=_base_.model,
    teacher=dict(
        config='mmdist::seg/quickstart/deeplabv3_w32_digits.py',
        checkpoint='work_dirs/quickstart/deeplabv3_w32_digits/last.pth',
    ),
    distill=dict(dist=dict(type='mmdist.SegLogits')),
)
