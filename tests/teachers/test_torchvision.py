"""torchvision teachers: the examples of docs/teachers.md and ForeignTeacher."""

from __future__ import annotations

import inspect
import textwrap
from pathlib import Path

import pytest
import torch
from docs_blocks import code, only
from foreign_pairs import (
    PSPNET,
    RETINANET,
    as_of_a_student,
    check_gradient,
    distil,
    pictures,
)
from torch import nn

from mmdist import MODELS, ForeignTeacher
from mmdist.comparisons import detections

# Not a pinned package: the wheel on the package index needs CUDA's libraries.
pytest.importorskip('torchvision', reason='torchvision is not installed')
from torchvision.models import detection, segmentation
from torchvision.transforms._presets import SemanticSegmentation
from torchvision.transforms.functional import to_tensor

SIZES = [(40, 64), (48, 40)]  # the shorter side is torchvision's `min_size` of 40


@pytest.fixture(autouse=True)
def forgotten():
    """Unregister the examples after each test, since other tests run them too."""
    names = 'TorchvisionRetinaNet', 'LRASPP'
    before = {name: MODELS.module_dict.pop(name, None) for name in names}
    yield
    for name, cls in before.items():
        MODELS.module_dict.pop(name, None)
        if cls is not None:
            MODELS.module_dict[name] = cls


def run_code(text: str, name: str) -> type:
    """Run an example; returns its class of this name."""
    there = {'ForeignTeacher': ForeignTeacher, 'MODELS': MODELS, 'torch': torch}
    exec(text, there)
    return there[name]


def retinanet() -> type:
    """The example of the page."""
    example = only(code('docs/teachers.md'), 'class TorchvisionRetinaNet')
    return run_code(example, 'TorchvisionRetinaNet')


def lraspp() -> type:
    """The example of ForeignTeacher's docstring."""
    text = inspect.getdoc(ForeignTeacher)
    example = text[text.index('@MODELS.register_module') :]
    example = textwrap.dedent('        ' + example)
    load = 'from torchvision.models.segmentation import lraspp_mobilenet_v3_large\n'
    return run_code(load + example, 'LRASPP')


def randomise(model: nn.Module) -> None:
    """Set random weights that tell classes and locations apart."""
    torch.manual_seed(0)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.xavier_normal_(parameter)


def test_retinanet_gives_all_boxes_that_its_own_pipeline_filters():
    teacher = retinanet()(weights=None).double().eval()
    library = teacher.model
    randomise(library)
    images = pictures(*SIZES)
    library.transform.min_size = (40,)
    library.score_thresh, library.nms_thresh = 0.0, 1.0  # nothing is left out
    library.topk_candidates = library.detections_per_img = 10**6
    with torch.no_grad():
        expected = library([to_tensor(image).double() for image in images])
        found = teacher(as_of_a_student(teacher, images), SIZES)
    for (boxes, logits), image, (height, width) in zip(
        found, expected, SIZES, strict=True
    ):
        scores = logits.sigmoid()
        assert scores.shape[1] == len(teacher.class_names) == 91
        assert len(image['scores']) == scores.numel()
        high = torch.tensor([width, height, width, height])
        boxes = boxes.clamp(min=0).minimum(high)  # as torchvision does
        for label in (1, 17, 90):
            of_label = image['labels'] == label
            column, order = scores[:, label].sort(descending=True)
            close = dict(atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(column, image['scores'][of_label], **close)
            torch.testing.assert_close(boxes[order], image['boxes'][of_label], **close)


def test_a_segmentor_gives_what_its_own_pipeline_gives(tmp_path):
    teacher = segmentor_of_torchvision(tmp_path).double()
    images = pictures(SIZES[0])
    inputs = as_of_a_student(teacher, images)[:, :, :40]
    normalise = SemanticSegmentation(resize_size=None)
    with torch.no_grad():
        found = teacher(inputs, SIZES[:1])
        expected = teacher.model(normalise(to_tensor(images[0]))[None].double())['out']
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def segmentor_of_torchvision(folder: Path) -> nn.Module:
    cls = lraspp()
    names = [f'class {i}' for i in range(19)]
    model = segmentation.lraspp_mobilenet_v3_large(
        weights_backbone=None, num_classes=len(names)
    )
    randomise(model)
    torch.save(model.state_dict(), folder / 'lraspp.pth')
    return cls(str(folder / 'lraspp.pth'), names).eval()


# ---- a step of distillation ------------------------------------------------------


def test_retinanet_teaches_mmdets_retinanet(monkeypatch):
    monkeypatch.setattr(detections, 'MIN_SCORE', 0.0)  # random weights give low scores
    retinanet()
    names = detection.RetinaNet_ResNet50_FPN_V2_Weights.DEFAULT.meta['categories']
    names = [name for name in names if name not in ('__background__', 'N/A')]
    model = distil(RETINANET, dict(type='mmdist.TorchvisionRetinaNet', weights=None))
    guest = model.teacher
    guest.classes = guest.match_classes(names)
    assert guest.classes.teacher[0] == (1,) and guest.classes.teacher[-1] == (90,)
    check_gradient(model)


def test_a_segmentor_teaches_mmsegs_pspnet(tmp_path):
    names = list(segmentor_of_torchvision(tmp_path).class_names)
    teacher = dict(
        type='mmdist.LRASPP',
        checkpoint=str(tmp_path / 'lraspp.pth'),
        class_names=names,
    )
    check_gradient(distil(PSPNET, teacher))
