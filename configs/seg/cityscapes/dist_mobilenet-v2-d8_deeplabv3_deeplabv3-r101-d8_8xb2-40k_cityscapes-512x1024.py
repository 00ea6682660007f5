# The published settings, with mmseg's own teacher; the authors give no number for it.
_base_ = './mobilenet-v2-d8_deeplabv3_8xb2-40k_cityscapes-512x1024.py'
model = dict(
    _delete_=True,
    type='mmdist.Distiller',
    student=_base_.model,
    balance=None,
    teacher=dict(
        config='mmseg::deeplabv3/deeplabv3_r101-d8_4xb2-80k_cityscapes-512x1024.py',
        checkpoint='https://download.openmmlab.com/mmsegmentation/v0.5/deeplabv3/deeplabv3_r101-d8_512x1024_80k_cityscapes/deeplabv3_r101-d8_512x1024_80k_cityscapes_20200606_113503-9e428899.pth',
    ),
    distill=dict(dist=dict(type='mmdist.SegLogits', ignore_mask=False)),
)
