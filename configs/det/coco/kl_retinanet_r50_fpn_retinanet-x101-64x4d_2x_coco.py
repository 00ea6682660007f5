# Hinton's loss in place of DIST; mmdet's is a mean over the 80 classes, not a sum.
_base_ = './dist_retinanet_r50_fpn_retinanet-x101-64x4d_2x_coco.py'
model = dict(
    distill=dict(
        _delete_=True,
        kl=dict(
            type='mmdist.DenseLogits',
            anchors='separate',
            ignore_mask=False,
            loss=dict(
                type='mmdet.KnowledgeDistillationKLDivLoss', T=1, loss_weight=80.0
            ),
        ),
    ),
)
