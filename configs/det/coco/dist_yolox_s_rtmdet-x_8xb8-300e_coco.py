# YOLOX ranks by class score times objectness; RTMDet's class score holds both.
_base_ = 'mmdet::yolox/yolox_s_8xb8-300e_coco.py'
model = dict(
    _delete_=True,
    type='mmdist.Distiller',
    student=_base_.model,
    teacher=dict(
        config='mmdet::rtmdet/rtmdet_x_8xb32-300e_coco.py',
        checkpoint='https://download.openmmlab.com/mmdetection/v3.0/rtmdet/rtmdet_x_8xb32-300e_coco/rtmdet_x_8xb32-300e_coco_20220715_230555-cc79b9ae.pth',
    ),
    distill=dict(dist=dict(type='mmdist.DenseLogits', score='joint')),
)
