_base_ = 'retinanet_w16_digits.py'
model = dict(
    _delete_=True,
    type='mmdist.Distiller',
    student=_base_.model,
    teacher=dict(
        config='mmdist::det/quickstart/retinanet_w32_digits.py',
        checkpoint='work_dirs/quickstart/retinanet_w32_digits/last.pth',
    ),
    # the published eps, with which the numbers of docs/quickstart.md were measured
    distill=dict(
        dist=dict(
            type='mmdist.DenseLogits', loss=dict(type='mmdist.DISTLoss', eps=1e-8)
        )
    ),
)
