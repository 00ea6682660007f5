"""Students of mmdet or mmseg that learn from a model of another library."""

from __future__ import annotations

import numpy as np
import torch
from builders import assert_learns, build_distiller
from det_zoo import batch, model_config
from mmdet.utils import register_all_modules as register_mmdet
from mmengine.model import ImgDataPreprocessor
from mmengine.registry import DefaultScope
from mmseg.utils import register_all_modules as register_mmseg
from segmentors import make_batch, zoo_model
from torch import nn

from mmdist.teachers import Renormalize

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


def pictures(*sizes: tuple[int, int]) -> list[np.ndarray]:
    """RGB images of noise, (H, W, 3), of at most 64 x 64 pixels."""
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (*size, 3), dtype=np.uint8) for size in sizes]


def as_of_a_student(teacher: nn.Module, images: list[np.ndarray]) -> torch.Tensor:
    """RGB images, padded and normalised for a BGR student, then for the teacher."""
    student = ImgDataPreprocessor([103.5, 116.3, 123.7], [57.4, 57.1, 58.4])
    inputs = torch.zeros(len(images), 3, 64, 64, dtype=torch.float64)
    for cells, image in zip(inputs, images, strict=True):
        height, width, _ = image.shape
        bgr = torch.from_numpy(image).permute(2, 0, 1).flip(0)
        cells[:, :height, :width] = (bgr - student.mean) / student.std
    renormalize = Renormalize(student, teacher.data_preprocessor)
    return renormalize(inputs, [image.shape[:2] for image in images])


def check_gradient(model: nn.Module, least: float = 1e-6) -> None:
    """Check that the gradient of a batch's `loss_dist` is finite and not tiny."""
    is_segmentor = hasattr(model, 'decode_head')
    data = make_batch(19) if is_segmentor else batch(model)
    losses = model(**data, mode='loss')
    assert losses['loss_dist'].item() > 0
    losses['loss_dist'].backward()
    assert_learns(model, least=least)
