# Hinton's loss in place of DIST; mmdet's is a mean over the 81 classes, not a sum.
_base_ = './dist_faster-rcnn_r50_fpn_cascade-mask-rcnn-x101-64x4d_2x_coco.py'
model = dict(
    distill=dict(
        _delete_=True,
        kl=dict(
            type='mmdist.RoILogits',
            loss=dict(
                type='mmdet.KnowledgeDistillationKLDivLoss', T=1, loss_weight=81.0
            ),
        ),
    ),
)
