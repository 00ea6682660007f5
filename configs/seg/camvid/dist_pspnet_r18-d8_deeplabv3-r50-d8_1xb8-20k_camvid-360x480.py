# PSPNet-R18 distilled from DeepLabV3-R50. Train the teacher first:
# tools/train.py configs/seg/camvid/deeplabv3_r50-d8_1xb8-20k_camvid-360x480.py
_base_ = './pspnet_r18-d8_1xb8-20k_camvid-360x480.py'
teacher = 'deeplabv3_r50-d8_1xb8-20k_camvid-360x480'
model = dict(
    _delete_=True,
    type='mmdist.Distiller',
    student=_base_.model,
    teacher=dict(
        config=f'mmdist::seg/camvid/{teacher}.py',
        checkpoint=f'work_dirs/{teacher}/iter_20000.pth',
    ),
)
