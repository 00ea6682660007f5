"""A new family takes a file and a line; families know nothing of comparisons."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from builders import build_distiller
from det_zoo import FAMILIES as ZOO
from det_zoo import batch, model_config
from mmdet.models.detectors import BaseDetector
from mmdet.registry import MODELS as MMDET_MODELS
from mmdet.utils import register_all_modules
from torch import nn

import mmdist
from mmdist import Comparison, families
from mmdist.families import Places, family_of, reader_of
from mmdist.registry import MODELS


@MMDET_MODELS.register_module()
class CellDetector(BaseDetector):
    """A detector unlike any of mmdet's: it classifies cells of 32 x 32 pixels."""

    def __init__(self, data_preprocessor=None):
        super().__init__(data_preprocessor)
        self.cells = nn.Conv2d(3, 80, 32, stride=32)

    def extract_feat(self, batch_inputs):
        return batch_inputs

    def loss(self, batch_inputs, batch_data_samples):
        return dict(loss_cls=self.cells(batch_inputs).square().mean())

    predict = _forward = None


def cells() -> ModuleType:
    """The only file that this family needs."""
    reader = ModuleType('mmdist.families.cells')
    reader.ASSIGNED = 'overlap or best'
    reader.modules = lambda model, refuse=None: [model.cells]

    def places(step):
        output = step.calls(step.student.cells)[-1].output
        n, _, h, w = output.shape
        y, x = torch.meshgrid(torch.arange(h), torch.arange(w), indexing='ij')
        corner = 32.0 * torch.stack([x, y], -1).reshape(-1, 2)
        boxes = torch.cat([corner, corner + 32], 1).repeat(n, 1)
        rows = output.sigmoid().permute(0, 2, 3, 1).flatten(0, 2)
        return [Places(rows, boxes, torch.arange(n).repeat_interleave(h * w))]

    reader.places = places
    return reader


def test_a_new_family_is_a_file_and_a_line(monkeypatch):
    """And any detector can teach it."""
    register_all_modules()
    monkeypatch.setitem(sys.modules, 'mmdist.families.cells', cells())
    monkeypatch.setitem(families.FAMILIES, 'CellDetector', 'cells')
    teacher = model_config(ZOO['RetinaNet'])
    teacher.test_cfg.score_thr = 0.0
    model = build_distiller(
        dict(type='CellDetector', data_preprocessor=teacher.data_preprocessor),
        teacher=dict(config=teacher, allow_random=True),
    )
    assert type(model.distill['dist']).__name__ == 'Detections'
    losses = model(**batch(model), mode='loss')
    assert 0 < losses['loss_dist'].item() < 2
    losses['loss_dist'].backward()
    assert model.cells.weight.grad.abs().sum() > 0


def test_models_of_no_family_are_not_read():
    assert family_of(nn.Identity()) is reader_of(nn.Identity()) is None


def test_families_know_nothing_of_comparisons():
    folder = Path(mmdist.__file__).parent / 'families'
    files = {path.stem: path.read_text() for path in folder.glob('*.py')}
    assert set(families.FAMILIES.values()) <= files.keys()
    importing = re.compile(r'^\s*(from|import) .*\b(comparisons|losses\.dist)', re.M)
    assert not [name for name, text in files.items() if importing.search(text)]


KINDS = [
    name
    for name, cls in MODELS.module_dict.items()
    if isinstance(cls, type) and issubclass(cls, Comparison)
    if cls.__module__.startswith('mmdist.')
]


@pytest.mark.parametrize('name', KINDS)
def test_no_comparison_builds_another(name, monkeypatch):
    built = []
    init = Comparison.__init__
    monkeypatch.setattr(
        Comparison, '__init__', lambda self, *a: built.append(self) or init(self, *a)
    )
    MODELS.build(dict(type=f'mmdist.{name}'))
    assert len(built) == 1
