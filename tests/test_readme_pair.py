"""The first screen of the README, executed as written."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
import torch
from docs_blocks import blocks
from mmdet.datasets import CocoDataset
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope
from processes import run_script

ROOT = Path(__file__).resolve().parent.parent
# Replaces what a test cannot have: the network, and time for full-size images.
SMALL = (
    'model.teacher.checkpoint=teacher.pth',
    'model.student.backbone.init_cfg=None',
    'train_dataloader.dataset.pipeline.2.scale=(128,96)',
    'val_dataloader.dataset.pipeline.1.scale=(128,96)',
    'train_cfg.max_epochs=1',
    'default_hooks.logger.interval=1',
)


def first_screen(language: str) -> list[str]:
    found = blocks('README.md', language)
    return [block.code for block in found if block.section == 'mmdist']


@pytest.fixture
def folder(coco_root, tmp_path) -> Path:
    """A directory with data/coco, of four images instead of 118,000."""
    data = tmp_path / 'data' / 'coco'
    (data / 'annotations').mkdir(parents=True)
    names = CocoDataset.METAINFO['classes']
    content = json.loads((coco_root / 'train.json').read_text())
    ids = {c['id']: names.index(c['name']) + 1 for c in content['categories']}
    content['categories'] = [dict(id=i + 1, name=name) for i, name in enumerate(names)]
    for annotation in content['annotations']:
        annotation['category_id'] = ids[annotation['category_id']]
    for part in ('train2017', 'val2017'):
        (data / part).symlink_to(coco_root / 'images')
        (data / 'annotations' / f'instances_{part}.json').write_text(
            json.dumps(content)
        )
    return tmp_path


@pytest.mark.slow
def test_as_written(folder):
    (config,) = first_screen('python')
    (folder / 'my_pair.py').write_text(config)
    assert len(config.splitlines()) <= 12

    # A teacher of exactly that config, with random weights.
    teacher = Config.fromfile(folder / 'my_pair.py').model.teacher
    assert teacher.checkpoint.startswith('https://')
    teacher_config = Config.fromstring(f'_base_ = {teacher.config!r}', '.py')
    teacher_config.model.backbone.init_cfg = None
    with DefaultScope.overwrite_default_scope('mmdet'):
        model = MODELS.build(teacher_config.model)
    torch.save(dict(state_dict=model.state_dict(), meta={}), folder / 'teacher.pth')

    (commands,) = first_screen('shell')
    assert commands.startswith('make quickstart')
    *_, command = commands.splitlines()
    program, script, *args = shlex.split(command, comments=True)
    assert program == 'python' and script == 'tools/train.py'
    args += ['--cfg-options', *SMALL]
    done = run_script(ROOT / script, *args, cwd=folder)
    assert done.returncode == 0, done.stdout[-4000:]
    log = next((folder / 'work_dirs' / 'my_pair').glob('*/*.log')).read_text()
    assert len(re.findall(r'Epoch\(train\).*loss_dist: [\d.]+', log)) == 2
    assert 'Epoch(val) [1]' in log
    assert (folder / 'work_dirs' / 'my_pair' / 'epoch_1.pth').exists()
