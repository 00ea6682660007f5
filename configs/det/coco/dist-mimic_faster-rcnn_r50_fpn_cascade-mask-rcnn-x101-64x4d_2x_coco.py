# As published: DIST and the FPN's levels.
_base_ = './dist_faster-rcnn_r50_fpn_cascade-mask-rcnn-x101-64x4d_2x_coco.py'
model = dict(distill=dict(mimic=dict(type='mmdist.Features', adapt=True)))
