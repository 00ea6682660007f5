_base_ = 'deeplabv3_w8_digits.py'
model = dict(
    _delete_=True,
    type='mmdist.Distiller',
    student=_base_.model,
    teacher=dict(
        config='mmdist::seg/quickstart/deeplabv3_w32_digits.py',
        checkpoint='work_dirs/quickstart/deeplabv3_w32_digits/last.pth',
    ),
    # the published eps, with which the numbers of docs/quickstart.md were measured
    distill=dict(
        dist=dict(type='mmdist.SegLogits', loss=dict(type='mmdist.DISTLoss', eps=1e-8))
    ),
)
# The student starts from scratch. DIST at full weight from the first step holds it
# back, see docs/quickstart.md.
custom_hooks = [
    dict(type='mmdist.DistillScheduleHook', points=[(100, 0.0), (300, 1.0)])
]
