"""Fixtures: tiny data sets in standard formats, and tiny configs of real models."""

from __future__ import annotations

import json
import os
from pathlib import Path

# One thread: small tensors gain nothing from more, and tests run in parallel. It is set
# before numpy and torch are imported, and inherited by the processes that tests start.
os.environ.setdefault('OMP_NUM_THREADS', '1')

import cv2
import numpy as np
import pytest
import torch
from processes import Group, hurry
from tiny import (
    DET_CLASSES,
    DET_CONFIG,
    SEG_CLASSES,
    SEG_CONFIG,
    SIZE,
    TINY_RETINANET,
    TINY_SEGMENTOR,
)

# No access to the hub; read when transformers is imported, which mmengine does
os.environ.setdefault('HF_HUB_OFFLINE', '1')

# Without a GPU, Triton's kernels are interpreted; read when Triton is imported
if not torch.cuda.is_available():
    os.environ.setdefault('TRITON_INTERPRET', '1')


@pytest.fixture(scope='session', autouse=True)
def in_a_hurry() -> None:
    hurry()


@pytest.fixture(autouse=True)
def hub():
    """The message hub, without what a Runner of an earlier test left in it."""
    from mmengine.logging import MessageHub

    hub = MessageHub.get_current_instance()
    hub.runtime_info.clear()
    return hub


@pytest.fixture(params=['det', 'seg'])
def family(request) -> str:
    return request.param


@pytest.fixture(scope='session')
def group_of():
    """Returns a gloo group of a given size, shared by all tests."""
    groups = {}
    yield lambda size: groups.setdefault(size, Group(size))
    for group in groups.values():
        group.close()


@pytest.fixture(scope='session')
def coco_root(tmp_path_factory) -> Path:
    """Four images of random texture, with boxes in a COCO json."""
    root = tmp_path_factory.mktemp('coco')
    (root / 'images').mkdir()
    rng = np.random.default_rng(0)
    images, annotations = [], []
    for image_id in range(1, 5):
        name = f'{image_id}.png'
        cv2.imwrite(
            str(root / 'images' / name),
            rng.integers(0, 256, (*SIZE, 3), dtype=np.uint8),
        )
        images.append(dict(id=image_id, file_name=name, height=SIZE[0], width=SIZE[1]))
        for category in range(1, 4):
            x, y = rng.integers(0, 60, 2).tolist()
            annotations.append(
                dict(
                    id=len(annotations) + 1,
                    image_id=image_id,
                    category_id=category,
                    bbox=[x, y, 32, 30],
                    area=32 * 30,
                    iscrowd=0,
                )
            )
    categories = [dict(id=i + 1, name=name) for i, name in enumerate(DET_CLASSES)]
    (root / 'train.json').write_text(
        json.dumps(dict(images=images, annotations=annotations, categories=categories))
    )
    return root


@pytest.fixture(scope='session')
def seg_root(tmp_path_factory) -> Path:
    """Four images of random texture, with label maps that are partly 255."""
    root = tmp_path_factory.mktemp('seg')
    rng = np.random.default_rng(0)
    for folder in ('images', 'labels'):
        (root / folder).mkdir()
    for i in range(4):
        cv2.imwrite(
            str(root / 'images' / f'{i}.png'),
            rng.integers(0, 256, (*SIZE, 3), dtype=np.uint8),
        )
        label = np.kron(rng.integers(0, 3, (3, 4)), np.ones((32, 32))).astype(np.uint8)
        label[:16] = 255
        cv2.imwrite(str(root / 'labels' / f'{i}.png'), label)
    return root


@pytest.fixture(scope='session')
def det_config(coco_root) -> str:
    """Config text of a tiny RetinaNet on the tiny COCO data."""
    return DET_CONFIG.format(
        model=TINY_RETINANET, classes=DET_CLASSES, data_root=str(coco_root)
    )


@pytest.fixture(scope='session')
def seg_config(seg_root) -> str:
    """Config text of a tiny PSPNet on the tiny segmentation data."""
    return SEG_CONFIG.format(
        model=TINY_SEGMENTOR, classes=SEG_CLASSES, data_root=str(seg_root)
    )
