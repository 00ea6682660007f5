"""The exported student is the plain student's checkpoint."""

from __future__ import annotations

import hashlib
import os
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from builders import distilled_text
from mmdet.apis import inference_detector, init_detector
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from mmengine.runner import Runner

TOOL = Path(__file__).parents[2] / 'tools' / 'export_student.py'
DISTILL = "dict(mimic=dict(type='mmdist.Features', adapt=True))"
WITH_EMA = """
custom_hooks = [dict(type='EMAHook', momentum=0.5)]
train_cfg = dict(max_epochs=1, val_interval=10)
work_dir = 'work'
"""


@pytest.fixture(scope='module')
def trained(tmp_path_factory, det_config) -> Path:
    """A student's config and its checkpoint, distilled with EMA."""
    root = tmp_path_factory.mktemp('export')
    (root / 'student.py').write_text(det_config)
    (root / 'distilled.py').write_text(
        distilled_text(WITH_EMA, DISTILL, config='student.py', allow_random=True)
    )
    before = os.getcwd()
    os.chdir(root)
    try:
        model = Runner.from_cfg(Config.fromfile('distilled.py')).train()
        torch.save(model.state_dict(), 'unaveraged.pth')
    finally:
        os.chdir(before)
    return root


@pytest.fixture
def export(trained, monkeypatch, capsys):
    """Run the tool in that directory; returns what it printed."""

    def run(*args: str) -> str:
        monkeypatch.chdir(trained)
        monkeypatch.setattr(sys, 'argv', [str(TOOL), *args])
        runpy.run_path(str(TOOL), run_name='__main__')
        return capsys.readouterr().out

    return run


def test_the_export_is_a_plain_student(trained, export):
    output = export('work/epoch_1.pth', '--config', 'student.py')
    assert '10 left out, loads strictly into student.py' in output
    (file,) = trained.glob('work/epoch_1_student-*.pth')
    digits = hashlib.sha256(file.read_bytes()).hexdigest()[:8]
    assert file.name == f'epoch_1_student-{digits}.pth'
    exported = torch.load(file, weights_only=True)
    assert exported.keys() == {'meta', 'state_dict'}
    assert exported['meta']['dataset_meta']['classes'] == ('person', 'car', 'dog')
    assert str(trained) not in repr(exported['meta'])

    init_default_scope('mmdet')
    model = MODELS.build(Config.fromfile(trained / 'student.py').model)
    model.load_state_dict(exported['state_dict'], strict=True)

    saved = torch.load(trained / 'work/epoch_1.pth', weights_only=False)
    plain = {k for k in saved['state_dict'] if not k.startswith('distill.')}
    assert exported['state_dict'].keys() == plain
    # The averaged weights: EMAHook keeps the Runner's own as `ema_state_dict`.
    key = 'bbox_head.retina_cls.weight'
    unaveraged = torch.load(trained / 'unaveraged.pth')[key]
    assert torch.equal(saved['ema_state_dict'][f'module.{key}'], unaveraged)
    assert torch.equal(exported['state_dict'][key], saved['state_dict'][key])
    assert not torch.equal(exported['state_dict'][key], unaveraged)


def test_the_config_beside_it_is_the_plain_students_and_mmdets_own_api_runs_it(
    trained, export
):
    args = ('--config', 'distilled.py', '--out', 'published/retinanet.pth')
    assert 'loads strictly into distilled.py' in export('work/epoch_1.pth', *args)
    (weights,) = trained.glob('published/retinanet-*.pth')
    written = Config.fromfile(weights.with_suffix('.py'))
    student = Config.fromfile(trained / 'student.py')
    for key in ('model', 'test_dataloader', 'test_evaluator', 'default_scope'):
        assert written[key] == student[key], key
    assert 'mmdist' not in written.pretty_text
    assert '_base_ =' not in weights.with_suffix('.py').read_text()
    unused = {'custom_hooks', 'train_cfg', 'train_dataloader', 'work_dir'}
    assert not unused & written.keys()
    model = init_detector(written, str(weights), device='cpu')
    assert model.dataset_meta['classes'] == ('person', 'car', 'dog')
    image = np.random.default_rng(0).integers(0, 256, (96, 128, 3), dtype=np.uint8)
    result = inference_detector(model, image)
    assert result.pred_instances.bboxes.shape[1] == 4


@pytest.mark.parametrize(
    ('file', 'error', 'says'),
    [
        ('work/epoch_1.pth', RuntimeError, 'size mismatch'),
        ('diverged.pth', RuntimeError, r'broken: 1 .*bbox_head\.retina_cls\.bias'),
        ('odd.pth', ValueError, 'no `state_dict`'),
        ('epoch_2.pth', FileNotFoundError, r'epoch_2\.pth.*does not exist'),
    ],
)
def test_what_is_no_student_is_refused(trained, export, det_config, file, error, says):
    text = det_config.replace('out_channels=16', 'out_channels=8')
    (trained / 'other.py').write_text(text)
    diverged = torch.load(trained / 'work/epoch_1.pth', weights_only=False)
    diverged['state_dict']['bbox_head.retina_cls.bias'][0] = float('nan')
    torch.save(diverged, trained / 'diverged.pth')
    torch.save(dict(weights={}), trained / 'odd.pth')
    config = ['--config', 'other.py'] if 'work' in file else []
    with pytest.raises(error, match=says):
        export(file, *config, '--out', 'refused.pth')
    assert not list(trained.glob('refused*'))
