_base_ = 'dist_retinanet_w32-w16_digits.py'
kl = dict(
    type='mmdist.DenseLogits',
    anchors='separate',
    loss=dict(type='mmdet.KnowledgeDistillationKLDivLoss', T=1, loss_weight=10.0),
)
model = dict(distill=dict(_delete_=True, kl=kl))
