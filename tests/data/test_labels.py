"""Labels, heads and class lists that do not fit raise errors before the first step."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from builders import dataset_batch, distilled_text
from mmengine.config import Config
from mmengine.registry import DATASETS, DefaultScope
from mmengine.runner import Runner

from mmdist import MODELS
from mmdist.data.labels import (
    check_class_lists,
    check_heads,
    check_labels,
    data_sets_in_words,
    explain,
)
from mmdist.teachers.teacher import build_model, load_config


def write_pair(folder: Path, text: str, **changes: str) -> Config:
    """A pair of a correct teacher and a student whose config is changed."""
    (folder / 'teacher.py').write_text(text)
    for old, new in changes.items():
        assert old in text
        text = text.replace(old, new)
    (folder / 'student.py').write_text(text)
    pair = distilled_text(config=str(folder / 'teacher.py'), allow_random=True)
    (folder / 'pair.py').write_text(pair)
    return Config.fromfile(folder / 'pair.py')


def train(cfg: Config, folder: Path) -> None:
    """Train as the libraries' own tools/train.py does."""
    cfg.work_dir = str(folder / 'work')
    Runner.from_cfg(cfg).train()


@pytest.fixture
def own_labels(tmp_path, seg_root, seg_config):
    """A function that changes a copy of the label maps and returns the config text."""

    def config(change) -> str:
        root = shutil.copytree(seg_root, tmp_path / 'own')
        for file in (root / 'labels').iterdir():
            cv2.imwrite(str(file), change(cv2.imread(str(file), 0)))
        return seg_config.replace(str(seg_root), str(root))

    return config


def test_a_misspelt_type_is_the_reason_that_is_given(det_config):
    cfg = Config.fromstring(det_config, '.py')
    with pytest.raises(KeyError) as error:
        DATASETS.build(dict(type='CocoDatset'))
    assert "is called 'CocoDatset'" in explain(error.value, cfg)


@pytest.mark.parametrize(
    ('change', 'says'),
    [
        (
            lambda x: np.where(x == 2, 33, x),
            r'contain 33 \(.*own/labels/\d\.png\), but the student has 3 classes and '
            'the data set names 3 classes: labels must be 0 to 2, or 255 for void.*'
            'labelTrain',
        ),
        (lambda x: np.where(x == 2, 3, x), 'contain 3 .* set `reduce_zero_label=True`'),
        (
            lambda x: np.stack([x] * 3, 2),
            r'\d\.png has several channels: .* \(96, 128, 3\)',
        ),
    ],
)
def test_label_maps(own_labels, tmp_path, change, says):
    cfg = write_pair(tmp_path, own_labels(change))
    with pytest.raises(ValueError, match=says):
        train(cfg, tmp_path)


@pytest.mark.parametrize(
    ('library', 'old', 'new', 'says'),
    [
        (
            *('seg', 'num_classes=3', 'num_classes=2'),
            r"student's data set names 3 classes \(sky, road, tree\), but its "
            r'`decode_head` has num_classes=2, and a batch holds the labels 0, 1, 2\. '
            r'Set `num_classes=3` in every head, or',
        ),
        ('seg', "('sky', 'road', 'tree')", "('sky',)", r'1 classes \(sky\),.*=3'),
        # `('sky')`, without a comma, names three classes s, k and y
        ('seg', "('sky', 'road', 'tree')", "('sky')", r'1 classes \(sky\),.*=3'),
        ('seg', "('sky', 'road', 'tree')", "{'a', 'b', 'c'}", 'a list of names, in'),
        (
            *('seg', "dict(type='LoadAnnotations'),\n        dict(type='Ra"),
            *("dict(type='Ra", r'images/\d\.png has no labels\. Add .*MarkUnlabelled'),
        ),
        (
            *('seg', 'test_dataloader = val_dataloader'),
            "val_dataloader['dataset']['metainfo'] = dict(classes=('tree', 'sky', "
            "'road'))",
            r'`val_dataloader` .* order \(tree, sky, road instead of sky, road, tree\)',
        ),
        ('det', 'num_classes=3', 'num_classes=80', 'names 3 .*`bbox_head` .*=80'),
        ('det', "'car'", "'caar'", "train_dataloader's .* no class caar.*Correct"),
        ('det', "('person', 'car'", "('car', 'person'", 'in another order. mmdet'),
    ],
)
def test_numbers_and_names(request, tmp_path, library, old, new, says):
    text = request.getfixturevalue(f'{library}_config')
    cfg = write_pair(tmp_path, text, **{old: new})
    with pytest.raises(ValueError, match=says):
        train(cfg, tmp_path)


def test_a_data_set_without_a_known_class(det_config):
    cfg = Config.fromstring(
        det_config.replace("'person', 'car', 'dog'", "'a', 'b'"), '.py'
    )
    with pytest.raises(ValueError, match='has person, car, dog: it has no class a, b'):
        check_class_lists(cfg)
    with (
        DefaultScope.overwrite_default_scope('mmdet'),
        pytest.raises(ValueError, match='concatenate') as error,
    ):
        filter_cfg = dict(filter_empty_gt=True)
        DATASETS.build(dict(cfg.train_dataloader.dataset, filter_cfg=filter_cfg))
    assert 'it has no class a, b' in explain(error.value, cfg)
    assert 'no image with labels' in explain(error.value, Config())


@pytest.mark.parametrize(
    'content',
    [
        *('', '[]', '{"images": [', '{"categories": 3}'),
        '{"images": [], "annotations": []}',
    ],
)
def test_a_file_that_is_no_annotation_file(det_config, coco_root, tmp_path, content):
    """Also if only the end of the file, after the categories, is missing."""
    root = shutil.copytree(coco_root, tmp_path / 'own')
    file = root / 'train.json'
    whole = json.dumps(dict(sorted(json.loads(file.read_text()).items())[::-1]))
    text = det_config.replace(str(coco_root), str(root))
    cfg = write_pair(tmp_path, text)
    for written in (content, whole[:-9]):
        file.write_text(written)
        with (
            pytest.raises(ValueError, match=r'train.json, .* is not a COCO annotation'),
            data_sets_in_words(cfg),
        ):
            train(cfg, tmp_path)


def test_a_later_batch_whose_loss_fails(tmp_path, seg_config):
    cfg = write_pair(tmp_path, seg_config)
    with DefaultScope.overwrite_default_scope('mmseg'):
        model = MODELS.build(cfg.model)
    for label in (2, 3):
        data = model.data_preprocessor(dataset_batch(cfg), training=True)
        data['data_samples'][1].gt_sem_seg.data[:, 20:60] = label
        if label == 2:
            model.loss(**data)
    with pytest.raises(ValueError, match='The labels contain 3 ') as raised:
        model.loss(**data)
    assert isinstance(raised.value.__cause__, IndexError)


def test_what_is_right_passes(seg_config, det_config):
    for text in (seg_config, det_config):
        cfg = Config.fromstring(text, '.py')
        check_class_lists(cfg)
        with DefaultScope.overwrite_default_scope(cfg.default_scope):
            model = MODELS.build(cfg.model)
            samples = dataset_batch(cfg)['data_samples']
        names = cfg.train_dataloader.dataset.metainfo.classes
        check_labels(model, samples, names)
        samples[0].set_metainfo(dict(unlabelled=True))  # so its labels are not checked
        delattr(
            samples[0], 'gt_sem_seg' if 'gt_sem_seg' in samples[0] else 'gt_instances'
        )
        check_labels(model, samples, None)


@pytest.mark.parametrize(
    ('path', 'classes'),
    [
        ('mmdet::panoptic_fpn/panoptic-fpn_r50_fpn_1x_coco.py', 133),  # things, stuff
        ('mmdet::mask2former/mask2former_r50_8xb2-lsj-50e_coco-panoptic.py', 133),
        ('mmdet::solo/solo_r50_fpn_1x_coco.py', 80),
        ('mmdet::cascade_rcnn/cascade-rcnn_r50_fpn_1x_coco.py', 80),
        # its head of edges has 2 classes
        ('mmseg::stdc/stdc1_4xb12-80k_cityscapes-512x1024.py', 19),
        ('mmseg::mask2former/mask2former_r50_8xb2-90k_cityscapes-512x1024.py', 19),
    ],
)
def test_families_with_heads_of_other_numbers_pass(path, classes):
    with torch.device('meta'):
        model = build_model(load_config(path))
    names = [str(i) for i in range(classes)]
    check_heads(model, names)
    if 'panoptic-fpn' not in path:
        with pytest.raises(ValueError, match=f'{classes + 1} classes .*={classes}'):
            check_heads(model, [*names, 'one more'])
