"""Tools with a stored teacher whose answers are the labels."""

from __future__ import annotations

import json
import re
from pathlib import Path

import cv2
import numpy as np
import pairs
import pytest
import torch
from matplotlib.figure import Figure
from mmengine.config import Config
from pairs import SLOW
from tiny import SEG_CLASSES, SIZE

from mmdist.teachers.store import StoreWriter

HOOK = "custom_hooks = [dict(type='mmdist.StoredTeacherHook')]"


def write_results(coco_root: Path, file: Path, categories=(1, 2, 3)) -> None:
    """Write the labels as a COCO results file, with these categories for 1, 2, 3."""
    labels = json.loads((coco_root / 'train.json').read_text())['annotations']
    keys = 'image_id', 'category_id', 'bbox'
    results = [{key: x[key] for key in keys} | dict(score=0.9) for x in labels]
    for result in results:
        result['category_id'] = categories[result['category_id'] - 1]
    file.write_text(json.dumps(results))


def write_maps(
    seg_root: Path, folder: Path, order=(0, 1, 2), names=SEG_CLASSES
) -> None:
    """Write the labels as stored maps, with the classes in this order."""
    files = sorted((seg_root / 'images').glob('*.png'))
    manifest = dict(
        kind='maps',
        class_names=names,
        teachers=[dict(checkpoint='labels')],
    )
    writer = StoreWriter(folder, manifest)
    for file in files:
        label = cv2.imread(str(seg_root / 'labels' / file.name), cv2.IMREAD_UNCHANGED)
        one_hot = label == np.array(order)[:, None, None]
        writer.add(str(file), SIZE, torch.from_numpy(one_hot).float())


@pytest.fixture
def write(family, request, tmp_path):
    """Write answers with their classes in ``order``, a pair, and a checkpoint."""
    config = request.getfixturevalue(f'{family}_config')
    root = request.getfixturevalue('coco_root' if family == 'det' else 'seg_root')

    def run(order=(0, 1, 2), **options) -> None:
        pairs.write_pair(tmp_path, config, more=HOOK)
        pairs.write_weights(tmp_path, 'student', std=0.1)
        stored = 'results.json' if family == 'det' else 'answers'
        text = (tmp_path / 'pair.py').read_text()
        text = re.sub('teacher={.*}', f'teacher=dict(stored={stored!r})', text)
        (tmp_path / 'pair.py').write_text(text)
        if family == 'det':
            write_results(root, tmp_path / stored, [i + 1 for i in order])
        else:
            write_maps(root, tmp_path / stored, order, **options)

    return run


def test_preflight_scores_them_on_the_training_images(run_tool, family, write):
    write()
    found = run_tool('preflight', 'pair.py', '--images', '3')
    kind, name = dict(det=('boxes', 'results.json'), seg=('maps', 'answers'))[family]
    assert re.search(
        rf'stored {kind} of 4 of 4 training images \(100.0%\), \d\.\d MiB in {name}',
        found.text,
    )
    assert 'SCORE ON 3 TRAINING IMAGES' in found.text
    assert 'VALIDATION' not in found.text
    score = dict(det='bbox_mAP 1, ', seg='mIoU 100, ')[family]
    assert score in found.text
    assert '(teacher: what is stored)' in found.text
    assert 'images not shown to the teacher' in found.text


def test_preflight_finds_permuted_classes(run_tool, write):
    write(order=(1, 0, 2))
    found = run_tool('preflight', 'pair.py', '--images', '4', status=1)
    assert re.search("teacher's classes look permuted: it takes .* for ", found.text)


@pytest.mark.parametrize('family', ['seg'], indirect=True)
def test_preflight_scores_classes_by_their_names(run_tool, write):
    order = (2, 0, 1)
    write(order=order, names=[SEG_CLASSES[i] for i in order])
    found = run_tool('preflight', 'pair.py', '--images', '4')
    assert 'mIoU 100, ' in found.text, found


@pytest.mark.parametrize('family', ['seg'], indirect=True)
def test_preflight_scores_nothing_without_class_names(run_tool, write, tmp_path):
    write()
    pair = (tmp_path / 'pair.py').read_text()
    nameless = "_base_.train_dataloader['dataset'].pop('metainfo')\n"
    (tmp_path / 'pair.py').write_text(f'{pair}{nameless}')
    found = run_tool('preflight', 'pair.py', '--images', '3')
    assert 'not scored: the data set has no class names' in found.text


@pytest.mark.slow
def test_preflight_names_images_without_an_answer(run_tool, family, write, tmp_path):
    write()
    if family == 'det':
        results = json.loads((tmp_path / 'results.json').read_text())
        few = [x for x in results if x['image_id'] == 1]
        (tmp_path / 'results.json').write_text(json.dumps(few))
    else:
        part = tmp_path / 'answers/part-0-0.jsonl'
        part.write_text(part.read_text().splitlines(True)[0])
    found = run_tool('preflight', 'pair.py', status=1)
    assert '3 of 4 training images have no answer' in found.text


@pytest.fixture
def drawn(monkeypatch) -> list[dict]:
    """The axes of each saved picture, by their titles."""
    figures = []

    def keep(self, *args, **options):
        figures.append({axis.get_title(): axis for axis in self.axes})

    monkeypatch.setattr(Figure, 'savefig', keep)
    return figures


def boxes_of(axis) -> np.ndarray:
    """Sorted boxes of a picture, (M, 4) as x, y, width, height."""
    found = [(*x.get_xy(), x.get_width(), x.get_height()) for x in axis.patches]
    return np.array(sorted(found))


def test_visualize_shows_them_where_the_labels_are(
    run_tool, family, write, drawn, tmp_path
):
    """After augmentation, the stored labels still lie on the labels."""
    write()
    pack, labels = {
        'det': ('PackDetInputs', dict(with_bbox=True)),
        'seg': ('PackSegInputs', {}),
    }[family]
    pipeline = [
        dict(type='LoadImageFromFile'),
        dict(type='LoadAnnotations', **labels),
        dict(type='Resize', scale=(160, 120), keep_ratio=True),
        dict(type='RandomFlip', prob=1.0),
        dict(type='RandomCrop', crop_size=(96, 128)),
        dict(type=pack),
    ]
    with (tmp_path / 'pair.py').open('a') as file:
        file.write(f'\ntrain_dataloader = dict(dataset=dict(pipeline={pipeline}))\n')
        file.write('val_dataloader = val_cfg = val_evaluator = None\n')  # not needed
    args = 'visualize', 'pair.py', 'student.pth'
    run_tool(*args, '--num', '2', '--out', 'page')
    assert len(drawn) == 2
    for axes in drawn:
        labels, teacher = axes['labels'], axes['teacher']
        if family == 'det':
            assert len(boxes_of(labels))
            np.testing.assert_allclose(boxes_of(teacher), boxes_of(labels), atol=0.01)
            continue
        labels, teacher = (x.images[0].get_array() for x in (labels, teacher))
        assert labels.shape == teacher.shape == (96, 128, 3)
        same = (labels == teacher).all(-1)
        rows = same.mean(1) > 0.5  # the other rows are void
        assert rows.mean() > 0.7 and same[rows].mean() > 0.97
    page = (tmp_path / 'page/index.html').read_text()
    assert 'answers are stored,\nand moved like the images' in page
    cv2.imwrite('x.png', np.zeros((9, 9, 3)))
    stopped = run_tool(*args, 'x.png', '--out', 'page', status=1)
    assert 'knows only training images: omit IMAGES' in stopped.said


@pytest.mark.parametrize('hooks', ['', SLOW("[dict(type='EMAHook')]")])
def test_new_pair_writes_a_config_that_can_be_trained(
    run_tool, family, write, hooks, tmp_path
):
    write()
    if hooks:
        with (tmp_path / 'student.py').open('a') as file:
            file.write(f'\ncustom_hooks = {hooks}\n')
    stored = dict(det='results.json', seg='answers')[family]
    args = ['--student', 'student.py', '--stored', stored, '--out', 'pair.py']
    found = run_tool('new_pair', *args)
    assert f'teacher the answers in {stored}' in found.text
    assert 'compared (3): ' in found.text and 'loss_dist' in found.text
    config = Config.fromfile(tmp_path / 'pair.py')
    assert config.model.teacher.keys() == {'stored'}
    assert Path(config.model.teacher.stored).samefile(tmp_path / stored)
    kinds = [hook.type for hook in config.custom_hooks]
    assert kinds == ['EMAHook'] * bool(hooks) + ['mmdist.StoredTeacherHook']
    run_tool('preflight', 'pair.py')


@pytest.mark.parametrize(
    ('args', 'says'),
    [
        (['--stored', 'results.json', '--teacher', 'a.py'], 'Give either --teacher or'),
        ([], 'Give either --teacher or --stored'),
        (['--stored', 'results.json', '--checkpoint', 'a.pth'], '--checkpoint is for'),
        (['--stored', 'nowhere'], 'This pair does not work.*nowhere'),
        (['--stored', 'results.json'], 'with the category ids 7, but the annotation'),
    ],
)
def test_new_pair_refuses(run_tool, tmp_path, coco_root, det_config, args, says):
    (tmp_path / 'student.py').write_text(det_config)
    write_results(coco_root, tmp_path / 'results.json', (1, 2, 7))
    found = run_tool('new_pair', '--student', 'student.py', *args, status=None)
    assert found.status and re.search(says, found.said)
