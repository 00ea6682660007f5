"""CamVid in the layout that its configs read."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
from mmengine.config import Config
from mmengine.registry import DATASETS, init_default_scope

CONFIGS = Path(__file__).parents[2] / 'configs' / 'seg' / 'camvid'


@pytest.fixture
def data_root(tmp_path) -> Path:
    rng = np.random.default_rng(0)
    for number, split in enumerate(('train', 'val', 'test'), start=1):
        for folder in ('img_dir', 'ann_dir'):
            (tmp_path / folder / split).mkdir(parents=True)
        for i in range(number):
            image = rng.integers(0, 256, (360, 480, 3), dtype=np.uint8)
            label = np.kron(
                rng.choice([*range(11), 255], (36, 48)), np.ones((10, 10))
            ).astype(np.uint8)
            cv2.imwrite(str(tmp_path / 'img_dir' / split / f'{i}.jpg'), image)
            cv2.imwrite(str(tmp_path / 'ann_dir' / split / f'{i}.png'), label)
    return tmp_path


@pytest.mark.parametrize('path', sorted(CONFIGS.glob('*.py')), ids=lambda p: p.stem)
def test_the_configs_read_it(path, data_root):
    init_default_scope('mmseg')
    config = Config.fromfile(path)
    assert config.train_dataloader.dataset.data_root == 'data/camvid'
    for number, split in enumerate(('train', 'val', 'test'), start=1):
        cfg = config[f'{split}_dataloader'].dataset
        cfg.data_root = str(data_root)
        dataset = DATASETS.build(cfg)
        assert len(dataset) == number
        sample = dataset[0]
        labels = np.unique(sample['data_samples'].gt_sem_seg.data)
        assert set(labels) <= {*range(11), 255}
        assert len(labels) > 2
        if split != 'train':
            written = cv2.imread(str(data_root / 'ann_dir' / split / '0.png'), -1)
            seen = sample['data_samples'].gt_sem_seg.data[0].numpy()
            np.testing.assert_array_equal(seen, written)  # no id is shifted
    assert len(dataset.metainfo['classes']) == len(dataset.metainfo['palette']) == 11
    model = config.model.get('student', config.model)
    assert model.decode_head.num_classes == model.auxiliary_head.num_classes == 11
