"""Tracking where pixels come from, on images whose pixels store their position."""

from __future__ import annotations

import copy
import json
import random

import cv2
import numpy as np
import pytest
import torch
from mmdet.utils import register_all_modules as register_mmdet
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
YOLOX = [
    dict(type='Mosaic', img_scale=(96, 80), pad_val=114.0),
    dict(type='RandomAffine', scaling_ratio_range=(0.5, 1.5), border=(-48, -40)),
    dict(type='MixUp', img_scale=(96, 80), ratio_range=(0.8, 1.6), pad_val=114.0),
    dict(type='YOLOXHSVRandomAug'),
    dict(type='RandomFlip', prob=0.5),
    dict(type='Resize', scale=(96, 96), keep_ratio=True),
    dict(type='Pad', pad_to_square=True, pad_val=dict(img=(114.0, 114.0, 114.0))),
    dict(type='FilterAnnotations', min_gt_bbox_wh=(1, 1), keep_empty=False),
    PACK,
]
RTMDET = [
    dict(type='CachedMosaic', img_scale=(96, 80), pad_val=114.0, max_cached_images=5),
    dict(type='RandomResize', scale=(192, 160), ratio_range=(0.5, 2), keep_ratio=True),
    dict(type='RandomCrop', crop_size=(96, 80)),
    dict(type='YOLOXHSVRandomAug'),
    dict(type='RandomFlip', prob=0.5),
    dict(type='Pad', size=(96, 80), pad_val=dict(img=(114, 114, 114))),
    dict(type='CachedMixUp', img_scale=(96, 80), max_cached_images=3, prob=0.5),
    PACK,
]
SSD = [
    dict(type='Expand', mean=[0, 0, 0], ratio_range=(1, 4)),
    dict(type='MinIoURandomCrop', min_ious=(0.1, 0.3), min_crop_size=0.3),
    dict(type='Resize', scale=(100, 100), keep_ratio=False),
    dict(type='RandomFlip', prob=0.5),
    dict(type='PhotoMetricDistortion'),
    PACK,
]
CHOICES = [dict(type='RandomChoiceResize', scales=[(100, 64), (150, 96)])]
DETR = [
    dict(type='RandomFlip', prob=0.5),
    dict(
        type='RandomChoice',
        transforms=[
            CHOICES,
            [
                *CHOICES,
                dict(type='RandomCrop', crop_type='absolute_range', crop_size=(50, 70)),
                *CHOICES,
            ],
        ],
    ),
    PACK,
]
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


@pytest.mark.parametrize(
    'transform',
    [
        dict(type='MinIoURandomCrop', min_crop_size=0.3),
        dict(type='RandomAffine', max_translate_ratio=0.2),
        dict(type='RandomCrop', crop_size=(60, 50), allow_negative_crop=True),
        dict(type='Expand', mean=[0, 0, 0], prob=1.0),
    ],
)
def test_an_image_without_boxes_moves_all_the_same(root, transform):
    """Oracle: its pixels, which store their position."""
    data = followed(dataset(root, [transform, PACK]))
    checked = 0
    for image, sample in samples(data, 20, [5]):
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


MARKS = [(20, 30), (60, 45), (100, 70), (90, 20)]


def pipeline(transforms, scope='mmdet'):
    with DefaultScope.overwrite_default_scope(scope):
        return Compose(copy.deepcopy(transforms)).transforms


@pytest.mark.parametrize(
    ('transforms', 'words'),
    [
        ([dict(type='RandomErasing', n_patches=1, ratio=0.1)], 'RandomErasing'),
        ([dict(type='CopyPaste')], 'CopyPaste'),
        (
            [dict(type='RandomCrop', crop_size=(9, 9), recompute_bbox=True)],
            'makes boxes',
        ),
        (
            [dict(type='RandomApply', transforms=[dict(type='CopyPaste')])],
            'CopyPaste',
        ),
    ],
)
def test_a_transform_that_is_not_understood_is_refused_by_name(transforms, words):
    found = pipeline([*LOAD, *transforms, PACK])
    with pytest.raises(ValueError, match=words):
        follow([found], 'boxes', 'The pipeline')
    assert [type(t).__name__ for t in found[:2]] == [
        'LoadImageFromFile',
        'LoadAnnotations',
    ]


def test_other_pipelines_are_refused():
    no_boxes = [LOAD[0], dict(type='RandomAffine'), PACK]
    late = [LOAD[0], dict(type='RandomFlip', prob=0.5), LOAD[1], PACK]
    arrays = [LOAD[0], dict(LOAD[1], box_type=None), PACK]
    for transforms, words in {
        'RandomAffine': no_boxes,
        'before labels are loaded': late,
        'makes boxes': arrays,
        'pack it with `PackDetInputs`': LOAD,
    }.items():
        with pytest.raises(ValueError, match=transforms):
            follow([pipeline(words)], 'boxes', 'The pipeline')
    with pytest.raises(ValueError, match='keeps_geometry'):
        follow([[*pipeline(LOAD), object(), *pipeline([PACK])]], 'boxes', 'Here')
    follow([[*pipeline(LOAD), Places(), *pipeline([PACK])]], 'boxes', 'Here')


def test_images_without_annotations_are_followed_by_their_homography(root):
    transforms = [
        dict(type='RandomResize', scale=(100, 200), ratio_range=(0.5, 2)),
        dict(type='RandomCrop', crop_size=(70, 60)),
        dict(type='RandomFlip', prob=0.5),
        PACK,
    ]
    plain = samples(dataset(root, transforms, LOAD[:1]), 8)
    tracked = samples(followed(dataset(root, transforms, LOAD[:1])), 8)
    for (image, _), (other, sample) in zip(plain, tracked, strict=True):
        assert torch.equal(image, other)
        ((_, moves),) = sample.metainfo[FRAMES]
        pixel = moved(torch.tensor([[60.0, 45.0, 61.0, 46.0]]), moves)
        column, row = ((pixel[0, :2] + pixel[0, 2:]) / 2 - 0.5).round().int().tolist()
        if 0 <= row < image.shape[1] and 0 <= column < image.shape[2]:
            assert (image[:2, row, column] - torch.tensor([60, 45])).abs().max() < 1.5


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
    found = pipeline(
        [
            LOAD[0],
            dict(type='LoadAnnotations'),
            *transforms,
            dict(type='PackSegInputs'),
        ],
        'mmseg',
    )
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


def test_mosaics_of_segmentors_are_refused():
    with DefaultScope.overwrite_default_scope('mmseg'):
        for transform in (
            dict(type='RandomMosaic', prob=1.0),
            dict(type='RandomRotFlip'),
        ):
            found = pipeline(
                [*LOAD[:1], transform, dict(type='PackSegInputs')], 'mmseg'
            )
            with pytest.raises(ValueError, match=transform['type']):
                follow([found], 'maps', 'here')
