"""The files of the digit scenes, read with numpy."""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import numpy as np
import pytest
from pycocotools.coco import COCO
from sklearn.datasets import load_digits

from tools.dev import make_digits as tool

OPTIONS = ['--train', '8', '--train-few', '3', '--val', '6', '--seed', '5']


@pytest.fixture(scope='module')
def root(tmp_path_factory):
    out = tmp_path_factory.mktemp('digits') / 'a'
    tool.main(['--out', str(out), *OPTIONS])
    return out


def files(root: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(root)): path.read_bytes()
        for path in root.rglob('*')
        if path.is_file()
    }


def scene_annotations(root: Path, split: str):
    coco = COCO(root / 'annotations' / f'{split}.json')
    for image in coco.loadImgs(coco.getImgIds()):
        yield coco, image, coco.loadAnns(coco.getAnnIds(imgIds=image['id']))


def test_same_options_give_the_same_files(root, tmp_path):
    tool.main(['--out', str(tmp_path / 'b'), *OPTIONS])
    assert files(root) == files(tmp_path / 'b')
    tool.main(['--out', str(tmp_path / 'c'), *OPTIONS[:-1], '6'])
    other = files(tmp_path / 'c')
    assert other['img_dir/train/000000.png'] != files(root)['img_dir/train/000000.png']


def test_a_scene_does_not_depend_on_how_many_there_are(root, tmp_path):
    options = ['--train', '4', '--train-few', '1', '--val', '2', '--seed', '5']
    tool.main(['--out', str(tmp_path / 'b'), *options])
    few, many = files(tmp_path / 'b'), files(root)
    pictures = [name for name in few if name.endswith('.png')]
    assert len(pictures) == 2 * (4 + 2)
    assert all(few[name] == many[name] for name in pictures)


def test_digit_images_have_their_labels_and_are_in_train_or_in_val(root):
    target = load_digits().target
    split = json.loads((root / 'digits.json').read_text())['digits']
    assert not set(split['train']) & set(split['val'])
    assert sorted(split['train'] + split['val']) == list(range(1797))
    for name in ('train', 'train-few', 'val'):
        listed = set(split[name.removesuffix('-few')])
        for coco, _, anns in scene_annotations(root, name):
            assert {a['digit'] for a in anns} <= listed
            for a in anns:
                label = coco.loadCats(a['category_id'])[0]['name']
                assert label == str(target[a['digit']])


@pytest.mark.parametrize('split', ['train', 'train-few', 'val'])
def test_coco_json_is_valid_and_boxes_are_tight(root, split):
    seen = 0
    for coco, image, anns in scene_annotations(root, split):
        folder = root / 'img_dir' / split.removesuffix('-few')
        picture = cv2.imread(str(folder / image['file_name']))
        assert picture.shape == (image['height'], image['width'], 3) == (96, 128, 3)
        for a in anns:
            ink = coco.annToMask(a).astype(bool)
            ys, xs = np.nonzero(ink)
            left, top = xs.min(), ys.min()
            assert a['bbox'] == [left, top, xs.max() - left + 1, ys.max() - top + 1]
            assert a['area'] == ink.sum()
            assert a['iscrowd'] == 0
            # Whole digits only: a box that touched the border could be cut off.
            assert left > 0 and top > 0 and xs.max() < 127 and ys.max() < 95
            seen += 1
    assert seen >= 9


def test_label_maps_agree_with_the_coco_masks(root):
    for split in ('train', 'val'):
        overlaps = 0
        for coco, image, anns in scene_annotations(root, split):
            path = root / 'ann_dir' / split / image['file_name']
            ann = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
            assert ann.shape == (96, 128) and ann.dtype == np.uint8
            assert set(np.unique(ann)) <= {*range(11), 255}
            ink = np.stack([coco.annToMask(a) for a in anns]).astype(bool)
            value = np.array([a['category_id'] for a in anns])
            # Where a single digit has ink, the map holds that digit or void.
            alone = ink.sum(0) == 1
            expected = (ink * value[:, None, None]).sum(0)
            labelled = alone & (ann != 255)
            assert (ann[labelled] == expected[labelled]).all()
            assert labelled.sum() > 0.6 * alone.sum()
            assert (ann[ink.sum(0) > 1] == 255).all()
            assert not np.isin(ann[~ink.any(0)], range(1, 11)).any()
            # The edges of the ink are ambiguous, hence void.
            assert (ann == 255).any()
            overlaps += (ink.sum(0) > 1).any()
        assert overlaps


def test_lists_name_the_scenes(root):
    for split, count in (('train', 8), ('train-few', 3), ('val', 6)):
        names = (root / 'splits' / f'{split}.txt').read_text().split()
        assert names == [f'{i:06d}' for i in range(count)]
        for folder in ('img_dir', 'ann_dir'):
            for name in names:
                part = split.removesuffix('-few')
                assert (root / folder / part / f'{name}.png').exists()


def test_made_once(root, capsys):
    picture = root / 'img_dir' / 'val' / '000000.png'
    before = picture.stat().st_mtime_ns
    tool.main(['--out', str(root), *OPTIONS])
    assert 'already made' in capsys.readouterr().out
    assert picture.stat().st_mtime_ns == before


def test_leaves_a_folder_of_others_alone(tmp_path):
    (tmp_path / 'mine.txt').write_text('mine')
    with pytest.raises(SystemExit, match='not made by this tool'):
        tool.main(['--out', str(tmp_path), *OPTIONS])
    assert [path.name for path in tmp_path.iterdir()] == ['mine.txt']


def test_options_that_cannot_work_are_refused(capsys):
    with pytest.raises(SystemExit):
        tool.parse_args(['--train', '3', '--train-few', '4'])
    assert 'make it smaller or --train larger' in capsys.readouterr().err
