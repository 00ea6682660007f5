_base_ = 'mmseg::pidnet/pidnet-s_2xb6-120k_1024x1024-cityscapes.py'
student = _base_.model
# With class weights, mmseg's cross entropy fails at pixels without a label (255).
student.decode_head.loss_decode[0].class_weight = None
model = dict(
    _delete_=True,
    type='mmdist.Distiller',
    student=student,
    teacher=dict(
        config='mmseg::pidnet/pidnet-l_2xb6-120k_1024x1024-cityscapes.py',
        checkpoint='https://download.openmmlab.com/mmsegmentation/v0.5/pidnet/pidnet-l_2xb6-120k_1024x1024-cityscapes/pidnet-l_2xb6-120k_1024x1024-cityscapes_20230303_114514-0783ca6b.pth',
    ),
)
del student
