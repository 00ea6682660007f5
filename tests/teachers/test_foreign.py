"""Teachers from other libraries, through ForeignTeacher."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from det_zoo import batch
from foreign_pairs import PSPNET, RETINANET, distil
from segmentors import make_batch
from torch import nn

from mmdist import MODELS, ForeignTeacher
from mmdist.record import Recorder

MEAN, STD = [110.0, 120.0, 130.0], [60.0, 62.0, 64.0]


@MODELS.register_module()
class ConvSegmentor(ForeignTeacher):
    """A segmentor that uses neither mmseg nor mmdet."""

    def __init__(self, class_names, gives='pixels', rgb=True):
        self.gives = gives
        super().__init__(class_names, MEAN, STD, rgb)
        torch.manual_seed(1)
        self.net = nn.Conv2d(3, len(class_names), 8, stride=8)

    def forward(self, images, sizes):
        self.seen = images, sizes
        return self.net(images)


@MODELS.register_module()
class Formula(ForeignTeacher):
    """A segmentor without parameters, like a model that another program runs."""

    def __init__(self, class_names):
        super().__init__(class_names, MEAN, STD)

    def forward(self, images, sizes):
        return torch.stack([images.mean(1) * i for i in range(19)], 1)


@MODELS.register_module()
class GridDetector(ForeignTeacher):
    """A detector with one box of 16x16 pixels in each cell of a grid."""

    gives = 'boxes'

    def __init__(self, class_names, activation='identity'):
        self.activation = activation
        super().__init__(class_names, MEAN, STD)
        torch.manual_seed(1)
        self.net = nn.Conv2d(3, len(class_names), 16, stride=16)

    def forward(self, images, sizes):
        scores = self.net(images)
        if self.activation == 'identity':
            scores = scores.softmax(1)
        y, x = torch.meshgrid(*map(torch.arange, scores.shape[2:]), indexing='ij')
        corner = 16.0 * torch.stack([x, y], -1).reshape(-1, 2)
        boxes = torch.cat([corner, corner + 16], 1)
        rows = scores.flatten(2).transpose(1, 2)
        self.given = [(boxes, s) for s in rows]
        return self.given


def names(number: int) -> list[str]:
    return [f'class {i}' for i in range(number)]


def segmentor(distill: dict | None = None, **teacher) -> nn.Module:
    config = dict(type='mmdist.ConvSegmentor', class_names=names(19)) | teacher
    return distil(PSPNET, config, distill)


def detector(distill: dict | None = None, **teacher) -> nn.Module:
    config = dict(type='mmdist.GridDetector', class_names=names(80)) | teacher
    return distil(RETINANET, config, distill)


@pytest.mark.parametrize('kind', ['ConvSegmentor', 'Formula'])
def test_a_segmentor_teaches_with_weights_of_its_own(kind):
    """It needs no checkpoint, `allow_random`, decode head or data set."""
    model = segmentor(type=f'mmdist.{kind}')
    data = make_batch(19)
    losses = model(**copy.deepcopy(data), mode='loss')
    assert 0 < losses['loss_dist'].item() < 3
    losses['loss_dist'].backward()
    assert model.backbone.stem[0].weight.grad.abs().sum() > 0
    assert not any(name.startswith('teacher') for name in model.state_dict())


@pytest.mark.parametrize('rgb', [True, False])
def test_it_gets_images_in_its_own_normalisation(rgb):
    model = segmentor(rgb=rgb)
    data = make_batch(19, valid=(48, 56))
    model(**copy.deepcopy(data), mode='loss')
    images, sizes = model.teacher.model.seen
    assert sizes == [(64, 64), (48, 56)]
    mean, std = (
        getattr(model.data_preprocessor, key).double().numpy()
        for key in ('mean', 'std')
    )
    pixels = data['inputs'].double().numpy() * std + mean  # RGB
    if not rgb:
        pixels = pixels[:, ::-1]
    expected = (pixels - np.reshape(MEAN, (3, 1, 1))) / np.reshape(STD, (3, 1, 1))
    expected[1, :, 48:], expected[1, :, :, 56:] = 0, 0
    np.testing.assert_allclose(images, expected, atol=1e-5)


def test_a_detector_teaches_by_its_boxes_after_nms():
    """Anchors get the scores that it gave to its boxes."""
    model = detector(dict(dist=dict(type='mmdist.Detections', min_iou=0.3)))
    with Recorder([model.distill['dist']]) as recorder:
        losses = model(**batch(model), mode='loss')
    assert 0 < losses['loss_dist'].item() < 6
    losses['loss_dist'].backward()
    assert model.neck.lateral_convs[0].conv.weight.grad.abs().sum() > 0
    # its boxes are cells of a grid, so NMS removes none; scores below 0.05 are dropped
    given = model.teacher.model.given
    wanted = {round(x, 4) for _, s in given for x in s.flatten().tolist() if x > 0.05}
    pairs = recorder.calls(model.distill['dist'])[0].args[1]
    found = {round(x, 4) for p in pairs for x in p.teacher.flatten().tolist()} - {0.0}
    assert found and found <= wanted


def test_detections_are_the_default_of_a_detector():
    model = detector(activation='sigmoid')
    assert type(model.distill['dist']).__name__ == 'Detections'
    assert model(**batch(model), mode='loss')['loss_dist'].item() > 0


def test_any_module_of_it_gives_features():
    mimic = dict(type='mmdist.Features', student='backbone.layer4', teacher='net')
    model = segmentor(dict(mimic=mimic), gives='features')
    assert model(**make_batch(19), mode='loss')['loss_mimic'].item() > 0


def test_what_it_does_not_give_is_refused():
    seg = dict(dist=dict(type='mmdist.SegLogits'))
    with pytest.raises(ValueError, match='it gives features'):
        segmentor(seg, gives='features')
    with pytest.raises(ValueError, match=r"gives must be one of .* got 'words'"):
        segmentor(gives='words')
    boxes = dict(dist=dict(type='mmdist.Detections'))
    model = detector(boxes)
    model.teacher.model.gives = 'pixels'
    with pytest.raises(ValueError, match='it gives pixels'):
        model.distill['dist'].check_pair(model, model.teacher.model)


def test_its_own_names_are_matched():
    """Its config needs no dataloader to name them; unused columns share a name."""
    unused = [0, 12]
    columns = ['N/A' if i in unused else name for i, name in enumerate(names(19))]
    model = segmentor(class_names=columns)
    used = [i for i in range(19) if i not in unused]
    match = model.teacher.match_classes([columns[i] for i in used[::-1]])
    assert match.teacher == [(i,) for i in used[::-1]]
