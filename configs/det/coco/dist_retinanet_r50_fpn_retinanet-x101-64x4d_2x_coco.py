# As published.
_base_ = './retinanet_r50_fpn_2x_coco.py'
model = dict(
    _delete_=True,
    type='mmdist.Distiller',
    student=_base_.model,
    balance=None,
    teacher=dict(
        config='mmdet::retinanet/retinanet_x101-64x4d_fpn_1x_coco.py',
        checkpoint='https://download.openmmlab.com/mmdetection/v2.0/retinanet/retinanet_x101_64x4d_fpn_1x_coco/retinanet_x101_64x4d_fpn_1x_coco_20200130-366f5af1.pth',
    ),
    distill=dict(dist=dict(type='mmdist.DenseLogits', ignore_mask=False)),
)
