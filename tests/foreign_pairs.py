"""Students of mmdet or mmseg that learn from a model of another library."""

from __future__ import annotations

from builders import assert_learns, build_distiller
from det_zoo import batch, model_config
from mmdet.utils import register_all_modules as register_mmdet
from mmengine.registry import DefaultScope
from mmseg.utils import register_all_modules as register_mmseg
from segmentors import make_batch, zoo_model
from torch import nn

RETINANET = 'retinanet/retinanet_r18_fpn_1x_coco.py'
PSPNET = 'pspnet/pspnet_r18-d8_4xb2-80k_cityscapes-512x1024'


def distil(
    student: str, teacher: dict, distill: dict | None = None, **options
) -> nn.Module:
    """A pair in training mode.

    Args:
        student: Path of an mmdet config, ending in '.py', or name of an mmseg config.
        teacher: Config of the model.
        distill: What is compared; None takes the default.
        options: Further arguments of the teacher.
    """
    register_mmdet()
    register_mmseg(init_default_scope=False)
    if student.endswith('.py'):
        student, scope = model_config(student), 'mmdet'
    else:
        width = 1 if 'mit-b0' in student else 1 / 8
        student, scope = zoo_model(student, width), 'mmseg'
    with DefaultScope.overwrite_default_scope(scope):
        teacher = dict(config=teacher, **options)
        return build_distiller(student, teacher=teacher, distill=distill)


def check_gradient(model: nn.Module, least: float = 1e-6) -> None:
    """Check that the gradient of a batch's `loss_dist` is finite and not tiny."""
    is_segmentor = hasattr(model, 'decode_head')
    data = make_batch(19) if is_segmentor else batch(model)
    losses = model(**data, mode='loss')
    assert losses['loss_dist'].item() > 0
    losses['loss_dist'].backward()
    assert_learns(model, least=least)
