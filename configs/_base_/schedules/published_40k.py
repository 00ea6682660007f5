# The authors' schedule for Cityscapes: 40k iterations of 16 images, SGD at 0.02. The
# configs of mmseg already have a schedule, and two bases cannot both set a key, so the
# students take this one over part by part.
published = dict(
    train_cfg=dict(max_iters=40000, val_interval=4000),
    optim_wrapper=dict(optimizer=dict(lr=0.02, momentum=0.9, weight_decay=5e-4)),
    param_scheduler=[
        dict(
            type='PolyLR', eta_min=1e-4, power=0.9, begin=0, end=40000, by_epoch=False
        ),
    ],
    default_hooks=dict(checkpoint=dict(interval=4000)),
    auto_scale_lr=dict(enable=False, base_batch_size=16),
)
