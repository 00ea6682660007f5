"""A Cityscapes config trains and validates on a tree in the data set's exact layout."""

from __future__ import annotations

import re
from pathlib import Path

import cv2
import mmseg
import numpy as np
import pytest
from processes import run_script

REPO = Path(__file__).parents[1]
CONFIGS = REPO / 'configs' / 'seg' / 'cityscapes'
CONFIG = 'dist_pspnet_r18-d8_deeplabv3-r101-d8_8xb2-40k_cityscapes-512x1024.py'
TOOLS = dict(ours=REPO / 'tools', mmseg=Path(mmseg.__file__).parent / '.mim' / 'tools')
HEIGHT, WIDTH = 128, 256  # instead of 1024 x 2048

# Only sizes and durations change, and what needs GPUs or the network.
OPTIONS = [
    'train_dataloader.dataset.pipeline.2.scale=(256,128)',
    'train_dataloader.dataset.pipeline.3.crop_size=(64,128)',
    'val_dataloader.dataset.pipeline.1.scale=(256,128)',
    'model.student.data_preprocessor.size=(64,128)',
    'train_cfg.max_iters=2',
    'train_cfg.val_interval=2',
    'default_hooks.logger.interval=1',
    'default_hooks.checkpoint.interval=2',
    'train_dataloader.num_workers=0',
    'train_dataloader.persistent_workers=False',
    'val_dataloader.num_workers=0',
    'val_dataloader.persistent_workers=False',
    'model.student.backbone.norm_cfg.type=BN',
    'model.student.decode_head.norm_cfg.type=BN',
    'model.student.auxiliary_head.norm_cfg.type=BN',
    'model.student.pretrained=None',
    'model.teacher.checkpoint=None',
    'model.teacher.allow_random=True',
]


@pytest.fixture(scope='module')
def folder(tmp_path_factory) -> Path:
    """A working directory with ``data/cityscapes``: three cities, two images each."""
    folder = tmp_path_factory.mktemp('cityscapes')
    rng = np.random.default_rng(0)
    for split, city in (('train', 'aachen'), ('train', 'bochum'), ('val', 'lindau')):
        for frame in range(2):
            name = f'{city}_{frame:06d}_000019'
            image = rng.integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
            label = rng.integers(0, 19, (HEIGHT // 16, WIDTH // 16), dtype=np.uint8)
            label = np.kron(label, np.ones((16, 16), np.uint8))
            label[-20:] = 255  # the bonnet of the car
            for kind, suffix, array in (
                ('leftImg8bit', 'leftImg8bit', image),
                ('gtFine', 'gtFine_labelTrainIds', label),
            ):
                path = folder / 'data' / 'cityscapes' / kind / split / city
                path.mkdir(parents=True, exist_ok=True)
                cv2.imwrite(str(path / f'{name}_{suffix}.png'), array)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize('tools', ['ours', 'mmseg'])
def test_the_papers_pair_trains_and_validates(folder, tools):
    script, config = TOOLS[tools] / 'train.py', CONFIGS / CONFIG
    arguments = ['--work-dir', folder / tools, '--cfg-options', *OPTIONS]
    done = run_script(script, config, *arguments, cwd=folder)
    log = done.stdout
    assert done.returncode == 0, log[-4000:]
    assert 'class names' not in log  # both sides' names are known, and equal
    terms = [float(x) for x in re.findall(r'loss_dist: (\S+)', log)]
    assert len(terms) == 2
    assert all(0 < term < 4 for term in terms)
    assert re.search(r'Iter\(val\).*mIoU: \d', log)
    assert (folder / tools / 'iter_2.pth').exists()
