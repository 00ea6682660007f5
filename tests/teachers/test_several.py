"""Several teachers, and a teacher that also sees the mirrored image."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from builders import Seen, build_distiller
from det_zoo import batch, model_config
from mmdet.utils import register_all_modules as register_mmdet
from mmengine.registry import DefaultScope
from mmseg.utils import register_all_modules as register_mmseg
from oracles import step
from scipy.special import expit, softmax
from segmentors import calibrate, make_batch, zoo_model
from torch import nn

from mmdist.families.probabilities import mean_probability

PSPNET = 'pspnet/pspnet_r18-d8_4xb2-80k_cityscapes-512x1024'
MASK2FORMER = 'mask2former/mask2former_r50_8xb2-90k_cityscapes-512x1024'
RETINANET = 'retinanet/retinanet_r18_fpn_1x_coco.py'
FCOS = 'fcos/fcos_r50-caffe_fpn_gn-head_1x_coco.py'


@pytest.fixture(autouse=True)
def scopes():
    register_mmdet()
    register_mmseg(init_default_scope=False)


def teacher(path: str, width: float = 1 / 8, **more) -> dict:
    return dict(config=zoo_model(path, width), allow_random=True, **more)


def build(distill: dict | None = None, **teachers) -> nn.Module:
    with DefaultScope.overwrite_default_scope('mmseg'):
        model = build_distiller(zoo_model(PSPNET), distill=distill, **teachers)
    for guest in model.teachers.values():
        calibrate(guest.model)
    return model


def losses_of(model: nn.Module, data: dict) -> dict:
    torch.manual_seed(0)  # dropout
    return model(**copy.deepcopy(data), mode='loss')


def seg(**options) -> dict:
    return dict(dist=dict(type='mmdist.SegLogits', **options))


# ---- several teachers ------------------------------------------------------------


def two(weights=None) -> nn.Module:
    options = {} if weights is None else dict(from_teacher=weights)
    teachers = dict(a=teacher(PSPNET), b=teacher(PSPNET, 1 / 4))
    return build(seg(**options), teachers=teachers)


def test_the_term_is_the_weighted_mean_over_the_teachers():
    data = make_batch(19)
    a, b, mean, weighted = (
        losses_of(two(weights), data) for weights in ('a', 'b', None, dict(a=3, b=1))
    )
    for key in ('loss_dist', 'loss_dist_aux'):
        of_a, of_b = a[key].item(), b[key].item()
        assert of_a != pytest.approx(of_b, rel=1e-3)
        assert mean[key].item() == pytest.approx((of_a + of_b) / 2, rel=1e-5)
        expected = 0.75 * of_a + 0.25 * of_b
        assert weighted[key].item() == pytest.approx(expected, rel=1e-5)
    assert mean['dist_inter_a'] == a['dist_inter_a']
    assert mean['dist_inter_b'] == b['dist_inter_b']


def test_each_teacher_keeps_its_own_normalisation_and_classes():
    """The second one gets pixels of 0 to 255 and has its classes in reverse order."""
    model = two()
    data = make_batch(19)
    other = model.teachers['b']
    other.model.data_preprocessor.mean.zero_()
    other.model.data_preprocessor.std.fill_(1)
    other.renormalize = type(other.renormalize)(
        model.data_preprocessor, other.model.data_preprocessor
    )
    names = [str(i) for i in range(19)]
    for guest, theirs in zip(
        model.teachers.values(), (names, names[::-1]), strict=True
    ):
        guest.class_names = theirs
        guest.classes = guest.match_classes(names)
    seen = Seen(**{key: x.model.backbone for key, x in model.teachers.items()})
    losses_of(model, data)
    first, second = (seen.inputs[key][0][0] for key in 'ab')
    assert model.teachers['a'].classes.teacher is None
    assert other.classes.teacher == [(i,) for i in range(19)][::-1]
    preprocessor = model.data_preprocessor
    np.testing.assert_array_equal(first, data['inputs'])
    pixels = data['inputs'] * preprocessor.std + preprocessor.mean
    np.testing.assert_allclose(second, pixels, atol=1e-3)


def test_teachers_of_two_architectures_with_the_comparison_chosen_for_each():
    same, other = (
        dict(config=model_config(path), allow_random=True) for path in (RETINANET, FCOS)
    )
    teachers = dict(same=same, other=other)
    model = build_distiller(model_config(RETINANET), teachers=teachers)
    kinds = {name: type(c).__name__ for name, c in model.distill.items()}
    assert kinds == dict(dist_same='DenseLogits', dist_other='Detections')
    model.teachers['other'].model.bbox_head.test_cfg.score_thr = 0.0
    losses = model(**batch(model), mode='loss')
    assert losses['loss_dist'].item() > 0
    assert {'dist_intra_same', 'dist_intra_other'} <= losses.keys()


@pytest.mark.parametrize(
    ('distill', 'teachers', 'message'),
    [
        (seg(from_teacher='c'), dict(teachers=dict(a={}, b={})), r"unknown .* \['c'\]"),
        (seg(from_teacher='a'), dict(teacher={}), 'there is only one `teacher`'),
        (None, {}, 'Give either'),
        (None, dict(teacher={}, teachers={}), 'Give either'),
    ],
)
def test_mistakes_stop_when_the_model_is_built(distill, teachers, message):
    config = dict(config=zoo_model(PSPNET), allow_random=True)
    teachers = {
        key: {name: config for name in value} if key == 'teachers' else config
        for key, value in teachers.items()
    }
    with pytest.raises(ValueError, match=message):
        build(distill, **teachers)


# ---- views -----------------------------------------------------------------------


def test_probabilities_of_a_per_pixel_teacher_are_averaged():
    data = make_batch(19)
    twice = teacher(PSPNET, 1 / 4, views=['flip'])
    model = build(seg(ignore_mask=False), teacher=twice)
    guest = model.teacher.model
    with torch.no_grad():
        plain, mirrored = (
            guest.decode_head.forward(guest.extract_feat(x)).double().numpy()
            for x in (data['inputs'], data['inputs'].flip(-1))
        )
    expected = (softmax(plain, 1) + softmax(mirrored[..., ::-1], 1)) / 2
    _, (found, _) = step(model, data)
    np.testing.assert_allclose(softmax(found.teacher.numpy(), 1), expected, atol=1e-5)
    assert abs(softmax(plain, 1) - expected).max() > 1e-3


def test_class_scores_of_masks_are_averaged():
    data = make_batch(19)
    model = build(seg(ignore_mask=False), teacher=teacher(MASK2FORMER, views=['flip']))
    once = build(seg(ignore_mask=False), teacher=teacher(MASK2FORMER))
    once.teacher.model.load_state_dict(model.teacher.model.state_dict())
    scores = []
    for inputs in (data['inputs'], data['inputs'].flip(-1)):
        _, (one, *_) = step(once, dict(data, inputs=inputs))
        scores.append(one.teacher.double().numpy())
    expected = (scores[0] + scores[1][..., ::-1]) / 2
    np.testing.assert_allclose(step(model, data)[1][0].teacher, expected, atol=1e-5)


def test_probabilities_of_a_dense_detector_are_averaged():
    both = dict(config=model_config(RETINANET, 4), allow_random=True, views=['flip'])
    model = build_distiller(model_config(RETINANET), teacher=both)
    guest = model.teacher.model
    nn.init.normal_(guest.bbox_head.retina_cls.weight, std=0.3)
    data = batch(model)
    pair = step(model, data)[1][0]
    with torch.no_grad():
        plain, mirrored = (
            guest.bbox_head(guest.extract_feat(x))[0][0].double().numpy()
            for x in (data['inputs'], data['inputs'].flip(-1))
        )
    expected = (expit(plain) + expit(mirrored[..., ::-1])) / 2
    np.testing.assert_allclose(expit(pair.teacher.numpy()), expected, atol=1e-5)


def test_views_are_refused_where_no_location_is_compared():
    faster = 'faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py'
    both = dict(config=model_config(faster), allow_random=True, views=['flip'])
    with pytest.raises(ValueError, match='RoILogits does not compare locations'):
        build_distiller(model_config(faster), teacher=both)
    with pytest.raises(ValueError, match=r"must be \['flip'\] or omitted"):
        build(teacher=teacher(PSPNET, views=['scale']))


@pytest.mark.parametrize('offset', [0.0, 50.0, -50.0])
@pytest.mark.parametrize('activation', ['softmax', 'sigmoid', 'identity'])
def test_scores_of_the_mean_probability(activation, offset):
    a, b = torch.randn(2, 3, 4, 5, dtype=torch.float64) * 4
    to_probability = dict(
        softmax=lambda x: softmax(x, 1), sigmoid=expit, identity=lambda x: x
    )[activation]
    found = mean_probability(a + offset, b + offset, activation)
    expected = (to_probability(a + offset) + to_probability(b + offset)) / 2
    np.testing.assert_allclose(to_probability(found.numpy()), expected, rtol=1e-6)
