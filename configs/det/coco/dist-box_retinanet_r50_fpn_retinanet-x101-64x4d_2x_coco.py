# The default, in place of the published loss: DIST and the teacher's boxes, balanced.
# docs/which_comparison.md says what they gained.
_base_ = './dist_retinanet_r50_fpn_retinanet-x101-64x4d_2x_coco.py'
model = dict(
    balance=3.0,
    distill=dict(dist=dict(ignore_mask=True), box=dict(type='mmdist.Boxes')),
)
