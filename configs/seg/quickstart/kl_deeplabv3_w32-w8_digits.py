_base_ = 'dist_deeplabv3_w32-w8_digits.py'
# The loss averages over the 10 classes; the weight makes it a sum again.
kl = dict(
    type='mmdist.SegLogits',
    loss=dict(type='mmdet.KnowledgeDistillationKLDivLoss', T=1, loss_weight=10.0),
)
model = dict(distill=dict(_delete_=True, kl=kl))
