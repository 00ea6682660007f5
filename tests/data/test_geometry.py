"""Tracking where pixels come from, on images whose pixels store their position."""

from __future__ import annotations

import copy
import json
import random

import cv2
import numpy as np
import pytest
import torch
from det_zoo import CONFIGS
from mmdet.utils import register_all_modules as register_mmdet
from mmengine.config import Config
from mmengine.dataset import Compose
from mmengine.registry import DATASETS, DefaultScope
from mmseg.utils import register_all_modules as register_mmseg

from mmdist.data.geometry import follow
from mmdist.teachers.stored import FRAMES, SIZE, moved

HEIGHT, WIDTH = 90, 120
LOAD = [
    dict(type='LoadImageFromFile', to_float32=True),
    dict(type='LoadAnnotations', with_bbox=True),
]
PACK = dict(type='PackDetInputs')


def of_the_zoo(path: str) -> list[dict]:
    """The transforms of an mmdet config, with its sizes divided by 8."""
    config = Config.fromfile(CONFIGS / path, import_custom_modules=False)
    steps = smaller(config.train_pipeline)
    return [step for step in steps if not step['type'].startswith('Load')]


def smaller(value, key: str = ''):
    if isinstance(value, dict):
        return {k: smaller(v, k) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(smaller(v, key) for v in value)
    is_size = key.endswith(('scale', 'scales', 'size', 'border'))
    return value // 8 if is_size and isinstance(value, int) else value


YOLOX = of_the_zoo('yolox/yolox_s_8xb8-300e_coco.py')
RTMDET = of_the_zoo('rtmdet/rtmdet_s_8xb32-300e_coco.py')
SSD = of_the_zoo('ssd/ssd300_coco.py')
DETR = of_the_zoo('detr/detr_r50_8xb2-150e_coco.py')
GEOMETRIC = [
    dict(type='Resize', scale=(100, 100), keep_ratio=True),
    dict(type='RandomShift', max_shift_px=8),
    dict(type='Rotate', prob=1.0),
    dict(type='FilterAnnotations', keep_empty=False),
    dict(type='ShearX', prob=1.0),
    dict(type='FilterAnnotations', keep_empty=False),
    dict(type='TranslateY', prob=1.0),
    dict(type='FilterAnnotations', keep_empty=False),
    dict(type='RandomAffine'),
    PACK,
]


@pytest.fixture(scope='module')
def root(tmp_path_factory):
    """Six images whose channels hold x and y; the last one has no boxes."""
    register_mmdet(init_default_scope=False)
    register_mmseg(init_default_scope=False)
    root = tmp_path_factory.mktemp('places')
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    rng = np.random.default_rng(0)
    images, annotations = [], []
    for i in range(6):
        image = np.stack([x, y, np.full_like(x, 40 * i)], -1).astype(np.uint8)
        cv2.imwrite(str(root / f'{i}.png'), image)
        cv2.imwrite(str(root / f'{i}_label.png'), image[..., 0] // 50)
        images.append(dict(id=i, file_name=f'{i}.png', height=HEIGHT, width=WIDTH))
        for n in range(4 if i < 5 else 0):
            (left, top), size = rng.integers(0, 60, 2), rng.integers(15, 30, 2)
            box = [*map(int, (left, top, *size))]
            entry = dict(image_id=i, category_id=1, bbox=box, area=1, iscrowd=0)
            annotations.append(dict(entry, id=len(annotations), ignore=0, n=n))
            annotations[-1]['iscrowd'] = int(n == 3)
    text = dict(images=images, annotations=annotations)
    text['categories'] = [dict(id=1, name='thing')]
    (root / 'train.json').write_text(json.dumps(text))
    return root


def dataset(root, transforms, load=LOAD):
    """A data set with a pipeline; YOLOX, which mixes images, needs a wrapper."""
    cfg = dict(
        type='CocoDataset',
        ann_file=str(root / 'train.json'),
        data_prefix=dict(img=str(root)),
        metainfo=dict(classes=('thing',)),
        pipeline=[*load, *transforms],
    )
    if transforms is YOLOX:
        cfg['pipeline'] = load
        cfg = dict(type='MultiImageMixDataset', dataset=cfg, pipeline=transforms)
    with DefaultScope.overwrite_default_scope('mmdet'):
        return DATASETS.build(copy.deepcopy(cfg))


def followed(data):
    """The data set, with a pipeline that records where pixels come from."""
    inner = getattr(data, 'dataset', None)
    if inner is None:
        follow([data.pipeline.transforms], 'boxes', 'here')
    else:
        follow([inner.pipeline.transforms, data.pipeline], 'boxes', 'here')
    return data


def samples(data, number, indices=range(6), seed=0):
    """Samples of a data set, drawn with a fixed seed."""
    random.seed(seed), np.random.seed(seed), torch.manual_seed(seed)
    indices = list(indices)
    found = [data[indices[i % len(indices)]] for i in range(number)]
    return [(x['inputs'], x['data_samples']) for x in found]


def of_labels(root, sample):
    """The boxes of the annotation file, moved like stored answers."""
    entries = json.loads((root / 'train.json').read_text())['annotations']
    found = [torch.zeros(0, 4)]
    for file, moves in sample.metainfo[FRAMES]:
        boxes = [e['bbox'] for e in entries if e['image_id'] == file['img_id']]
        boxes = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        found.append(moved(boxes, moves))
    return torch.cat(found)


@pytest.mark.parametrize('transforms', [YOLOX, RTMDET, SSD, DETR, GEOMETRIC])
def test_answers_move_as_labels_do_and_these_stay_to_the_bit(root, transforms):
    """The labels themselves are the answers. Oracle: mmdet's own labels."""
    plain = samples(dataset(root, transforms), 24, range(5))
    tracked = samples(followed(dataset(root, transforms)), 24, range(5))
    kinds, matched = set(), 0
    for (image, wanted), (other, sample) in zip(plain, tracked, strict=True):
        assert torch.equal(image, other)
        for name in ('gt_instances', 'ignored_instances'):
            a, b = wanted.get(name), sample.get(name)
            assert type(a.bboxes) is type(b.bboxes)
            assert torch.equal(a.bboxes.tensor, b.bboxes.tensor)
            assert torch.equal(a.labels, b.labels)
        labels = [sample.gt_instances.bboxes, sample.ignored_instances.bboxes]
        labels = torch.cat([x.tensor for x in labels])
        # some transforms keep boxes that they clipped to nothing
        labels = labels[((labels[:, 2:] - labels[:, :2]) > 0).all(1)]
        answers = of_labels(root, sample)
        # each label has its answer; mmdet may have dropped other labels
        distance = torch.cdist(labels, answers, p=1)
        assert distance.numel() == 0 or distance.amin(1).max() < 1e-4
        matched += len(labels)
        kinds.add(len(sample.metainfo[FRAMES]))
        assert sample.metainfo[SIZE] == tuple(image.shape[1:])
    assert matched > 30
    if transforms is YOLOX or transforms is RTMDET:
        assert max(kinds) >= 5


class Places:
    """A custom transform that moves no pixel, and says so."""

    keeps_geometry = True

    def __call__(self, results):
        return results


MARKS = [(20, 30), (60, 45), (100, 70), (90, 20)]


@pytest.mark.parametrize(
    ('load', 'transforms'),
    [
        (LOAD, [dict(type='MinIoURandomCrop', min_crop_size=0.3)]),
        (LOAD, [dict(type='RandomAffine', max_translate_ratio=0.2)]),
        (
            LOAD,
            [dict(type='RandomCrop', crop_size=(60, 50), allow_negative_crop=True)],
        ),
        (LOAD, [dict(type='Expand', mean=[0, 0, 0], prob=1.0)]),
        (  # images without annotations are followed by their homography
            LOAD[:1],
            [
                dict(type='RandomResize', scale=(100, 200), ratio_range=(0.5, 2)),
                dict(type='RandomCrop', crop_size=(70, 60)),
                dict(type='RandomFlip', prob=0.5),
            ],
        ),
    ],
)
def test_an_image_without_boxes_moves_all_the_same(root, load, transforms):
    """Oracle: its pixels, which store their position."""
    plain, tracked = (dataset(root, [*transforms, PACK], load) for _ in range(2))
    plain, tracked = samples(plain, 20, [5]), samples(followed(tracked), 20, [5])
    checked = 0
    for (image, _), (other, sample) in zip(plain, tracked, strict=True):
        assert torch.equal(image, other)
        ((_, moves),) = sample.metainfo[FRAMES]
        # boxes of single pixels well inside
        marks = torch.tensor([[x, y, x + 1.0, y + 1.0] for x, y in MARKS])
        boxes = moved(marks, [m for m in moves if m[0] != 'clip_'])
        for (x, y), box in zip(MARKS, boxes, strict=True):
            column, row = ((box[:2] + box[2:]) / 2 - 0.5).round().int().tolist()
            if 1 <= row < image.shape[1] - 1 and 1 <= column < image.shape[2] - 1:
                found = image[:2, row, column]
                # rounded to a whole pixel, and the image can be half as large
                assert (found - torch.tensor([x, y])).abs().max() <= 1.5
                checked += 1
    assert checked > 10


def pipeline(transforms, scope='mmdet'):
    with DefaultScope.overwrite_default_scope(scope):
        return Compose(copy.deepcopy(transforms)).transforms


LOAD_MAP, PACK_MAP = dict(type='LoadAnnotations'), dict(type='PackSegInputs')


@pytest.mark.parametrize(
    ('kind', 'transforms', 'words'),
    [
        ('boxes', [*LOAD, dict(type='RandomErasing', n_patches=1, ratio=0.1), PACK],
            'RandomErasing'),
        ('boxes', [*LOAD, dict(type='CopyPaste'), PACK], 'CopyPaste'),
        ('boxes', [*LOAD, dict(type='RandomCrop', crop_size=(9, 9),
            recompute_bbox=True), PACK], 'makes boxes'),
        ('boxes', [*LOAD, dict(type='RandomApply', transforms=[dict(type='CopyPaste')]),
            PACK], 'CopyPaste'),
        ('boxes', [LOAD[0], dict(type='RandomAffine'), PACK], 'RandomAffine'),
        ('boxes', [LOAD[0], dict(type='RandomFlip', prob=0.5), LOAD[1], PACK],
            'before labels are loaded'),
        ('boxes', [LOAD[0], dict(LOAD[1], box_type=None), PACK], 'makes boxes'),
        ('boxes', LOAD, 'pack it with `PackDetInputs`'),
        ('maps', [LOAD[0], dict(type='RandomMosaic', prob=1.0), PACK_MAP],
            'RandomMosaic'),
        ('maps', [LOAD[0], dict(type='RandomRotFlip'), PACK_MAP], 'RandomRotFlip'),
    ],
)  # fmt: skip
def test_what_is_not_understood_is_refused_by_name(kind, transforms, words):
    found = pipeline(transforms, dict(boxes='mmdet', maps='mmseg')[kind])
    before = [*found]
    with pytest.raises(ValueError, match=words):
        follow([found], kind, 'The pipeline')
    assert found == before


def test_a_transform_of_ones_own_says_that_it_moves_nothing():
    with pytest.raises(ValueError, match='keeps_geometry'):
        follow([[*pipeline(LOAD), object(), *pipeline([PACK])]], 'boxes', 'Here')
    follow([[*pipeline(LOAD), Places(), *pipeline([PACK])]], 'boxes', 'Here')


# ---- mmseg ---------------------------------------------------------------------------

SEG = {
    'resize and crop': [
        dict(type='RandomResize', scale=(200, 100), ratio_range=(0.5, 2.0)),
        dict(type='RandomCrop', crop_size=(48, 64), cat_max_ratio=0.75),
        dict(type='RandomFlip', prob=0.5),
        dict(type='Pad', size=(80, 100)),
    ],
    'rotate': [
        dict(type='RandomRotate', prob=0.8, degree=30),
        dict(type='RandomFlip', prob=0.8, direction=['vertical', 'diagonal']),
        dict(type='RandomChoiceResize', scales=[(60, 90), (100, 160)]),
    ],
    'whole': [
        dict(type='RandomRotate', prob=1.0, degree=30, auto_bound=True),
        dict(type='ResizeToMultiple', size_divisor=16),
    ],
    'choice': [
        dict(
            type='RandomChoice',
            transforms=[
                [dict(type='Resize', scale=(60, 90), keep_ratio=True)],
                [dict(type='RandomCrop', crop_size=(40, 40))],
            ],
        ),
        dict(type='RandomFlip', prob=1.0),
    ],
}


def seg_samples(root, transforms, follows):
    found = pipeline([LOAD[0], LOAD_MAP, *transforms, PACK_MAP], 'mmseg')
    if follows:
        follow([found], 'maps', 'here')
    random.seed(0), np.random.seed(0)
    samples = []
    for i in range(12):
        names = dict(
            img_path=f'{root}/{i % 6}.png', seg_map_path=f'{root}/{i % 6}_label.png'
        )
        results = dict(names, reduce_zero_label=False, seg_fields=[])
        for transform in found:
            results = transform(results)
        samples.append((results['inputs'], results['data_samples']))
    return samples


@pytest.mark.parametrize('name', SEG)
def test_a_matrix_says_where_each_pixel_was(root, name):
    plain, tracked = (seg_samples(root, SEG[name], follows) for follows in (0, 1))
    for (image, wanted), (other, sample) in zip(plain, tracked, strict=True):
        assert torch.equal(image, other)
        assert torch.equal(wanted.gt_sem_seg.data, sample.gt_sem_seg.data)
        ((file, views),) = sample.metainfo[FRAMES]
        matrix = views[-1].matrix
        assert (file['height'], file['width']) == (HEIGHT, WIDTH)
        y, x = np.mgrid[: image.shape[1], : image.shape[2]] + 0.5
        points = np.stack([x, y, np.ones_like(x)], -1) @ np.linalg.inv(matrix).T
        points = points[..., :2] - 0.5  # in pixel indices
        inside = np.ones(x.shape, bool)
        for seen, size in views:  # not the edge, which OpenCV repeats
            there = (points + 0.5) @ seen[:2, :2].T + seen[:2, 2]
            inside &= ((there >= 3) & (there <= np.array(size[::-1]) - 3)).all(-1)
        assert inside.mean() > 0.3
        # OpenCV interpolates in steps of 1/32
        difference = np.abs(image[:2].permute(1, 2, 0).numpy() - points)[inside]
        assert difference.max() < 0.05
