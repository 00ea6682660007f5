# PKD (arXiv 2207.02039): the correlation of each channel of the FPN.
pkd = dict(
    pkd=dict(
        type='mmdist.Features',
        adapt=False,
        levels='stride',
        loss=dict(type='mmdist.DISTLoss', beta=0.0, loss_weight=6.0),
    )
)
