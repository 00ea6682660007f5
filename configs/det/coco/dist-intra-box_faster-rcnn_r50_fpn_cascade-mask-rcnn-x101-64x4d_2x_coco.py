# The default, in place of the published loss: the intra-class term and the teacher's
# boxes, balanced. docs/which_comparison.md says what they gained.
_base_ = './dist_faster-rcnn_r50_fpn_cascade-mask-rcnn-x101-64x4d_2x_coco.py'
model = dict(
    balance=3.0,
    distill=dict(
        dist=dict(loss=dict(type='mmdist.DISTLoss', beta=0.0)),
        box=dict(type='mmdist.Boxes'),
    ),
)
