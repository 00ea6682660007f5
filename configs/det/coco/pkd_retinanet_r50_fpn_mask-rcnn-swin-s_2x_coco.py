_base_ = [
    'mmdet::retinanet/retinanet_r50_fpn_2x_coco.py',
    '../../_base_/distill/pkd.py',
]
model = dict(
    _delete_=True,
    type='mmdist.Distiller',
    student=_base_.model,
    balance=None,
    teacher=dict(
        config='mmdet::swin/mask-rcnn_swin-s-p4-w7_fpn_amp-ms-crop-3x_coco.py',
        checkpoint='https://download.openmmlab.com/mmdetection/v2.0/swin/mask_rcnn_swin-s-p4-w7_fpn_fp16_ms-crop-3x_coco/mask_rcnn_swin-s-p4-w7_fpn_fp16_ms-crop-3x_coco_20210903_104808-b92c91f1.pth',
    ),
    distill=_base_.pkd,
)
