# DIST and the teacher's boxes; docs/which_comparison.md says what it gained.
_base_ = './dist_retinanet_r50_fpn_retinanet-x101-64x4d_2x_coco.py'
model = dict(distill=dict(box=dict(type='mmdist.Boxes')))
