# The student, without a teacher: what distillation is compared with.
_base_ = 'mmdet::retinanet/retinanet_r50_fpn_2x_coco.py'
