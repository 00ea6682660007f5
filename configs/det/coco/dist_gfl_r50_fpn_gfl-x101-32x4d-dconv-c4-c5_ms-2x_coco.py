_base_ = 'mmdet::gfl/gfl_r50_fpn_ms-2x_coco.py'
model = dict(
    _delete_=True,
    type='mmdist.Distiller',
    student=_base_.model,
    teacher=dict(
        config='mmdet::gfl/gfl_x101-32x4d-dconv-c4-c5_fpn_ms-2x_coco.py',
        checkpoint='https://download.openmmlab.com/mmdetection/v2.0/gfl/gfl_x101_32x4d_fpn_dconv_c4-c5_mstrain_2x_coco/gfl_x101_32x4d_fpn_dconv_c4-c5_mstrain_2x_coco_20200630_102002-14a2bf25.pth',
    ),
)
