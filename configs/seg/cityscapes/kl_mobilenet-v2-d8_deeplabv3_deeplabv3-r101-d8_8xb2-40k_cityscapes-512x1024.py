# Hinton's loss in place of DIST; mmdet's is a mean over the 19 classes, not a sum.
_base_ = (
    './dist_mobilenet-v2-d8_deeplabv3_deeplabv3-r101-d8_8xb2-40k_cityscapes-512x1024.py'
)
model = dict(
    distill=dict(
        _delete_=True,
        kl=dict(
            type='mmdist.SegLogits',
            ignore_mask=False,
            loss=dict(
                type='mmdet.KnowledgeDistillationKLDivLoss', T=1, loss_weight=19.0
            ),
        ),
    ),
)
