# The intra-class term and the teacher's boxes; docs/which_comparison.md says what they
# gained.
_base_ = './dist_faster-rcnn_r50_fpn_cascade-mask-rcnn-x101-64x4d_2x_coco.py'
model = dict(
    distill=dict(
        dist=dict(type='mmdist.RoILogits', loss=dict(type='mmdist.DISTLoss', beta=0.0)),
        box=dict(type='mmdist.Boxes'),
    ),
)
