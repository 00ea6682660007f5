"""The teacher sees its own normalisation; checked against numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from mmdet.models.data_preprocessors import DetDataPreprocessor
from mmengine.config import Config
from mmseg.models.data_preprocessor import SegDataPreProcessor

from mmdist.registry import MODELS
from mmdist.teachers import Renormalize, Teacher


def reference(raw, mean, std, swap, pad_value, size):
    """What a data_preprocessor does to one image, in numpy."""
    image = raw[::-1] if swap else raw
    image = (image - np.reshape(mean, (-1, 1, 1))) / np.reshape(std, (-1, 1, 1))
    out = np.full((3, *size), float(pad_value))
    out[:, : image.shape[1], : image.shape[2]] = image
    return out


IMAGENET = dict(mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375])
CAFFE = dict(mean=[103.53, 116.28, 123.675], std=[1.0, 1.0, 1.0])


@pytest.mark.parametrize(
    ('student', 'teacher'),
    [
        (dict(**IMAGENET, bgr_to_rgb=True), dict(**CAFFE, pad_value=3)),
        (dict(), dict(**IMAGENET, bgr_to_rgb=True)),
        (dict(**CAFFE, pad_value=1), dict(mean=[0, 0, 0], std=[255, 255, 255])),
        (dict(**IMAGENET, pad_value=2), dict(**IMAGENET)),
    ],
)
def test_the_teacher_sees_what_its_own_preprocessor_would_give(student, teacher):
    rng = np.random.default_rng(0)
    raw = [rng.integers(0, 256, (3, h, w)) for h, w in ((32, 20), (24, 32))]

    def batch(**cfg):
        swap, pad = cfg.get('bgr_to_rgb', False), cfg.get('pad_value', 0)
        mean, std = cfg.get('mean', [0] * 3), cfg.get('std', [1] * 3)
        return np.stack([reference(r, mean, std, swap, pad, (32, 32)) for r in raw])

    renormalize = Renormalize(
        DetDataPreprocessor(**student), DetDataPreprocessor(**teacher)
    )
    inputs = torch.from_numpy(batch(**student)).float()
    before = inputs.clone()
    outputs = renormalize(inputs, [(32, 20), (24, 32)])
    np.testing.assert_allclose(outputs.numpy(), batch(**teacher), atol=2e-4)
    assert torch.equal(inputs, before)


@pytest.mark.parametrize('dtype', ['bf16', 'fp16'])
def test_half_precision_does_not_round_the_normalisation(det_config, tmp_path, dtype):
    path = tmp_path / 'student.py'
    path.write_text(det_config)
    student = MODELS.build(Config.fromfile(path).model)
    teacher = Teacher(str(path), allow_random=True, dtype=dtype)
    teacher.load(student)
    assert next(teacher.model.parameters()).itemsize == 2
    inputs = torch.rand(1, 3, 8, 8)
    assert teacher.renormalize(inputs, [(8, 8)]) is inputs


def test_the_same_normalisation_costs_nothing_across_libraries():
    student = SegDataPreProcessor(**IMAGENET, bgr_to_rgb=True, size=(8, 8), pad_val=0)
    teacher = DetDataPreprocessor(**IMAGENET, bgr_to_rgb=True)
    inputs = torch.rand(1, 3, 8, 8)
    assert Renormalize(student, teacher)(inputs, [(4, 8)]) is inputs
