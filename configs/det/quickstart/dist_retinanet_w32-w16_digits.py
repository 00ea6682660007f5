_base_ = 'retinanet_w16_digits.py'
model = dict(
    _delete_=True,
    type='mmdist.Distiller',
    student=_base_.model,
    teacher=dict(
        config='mmdist::det/quickstart/retinanet_w32_digits.py',
        checkpoint='work_dirs/quickstart/retinanet_w32_digits/last.pth',
    ),
    distill=dict(dist=dict(type='mmdist.DenseLogits')),
)
