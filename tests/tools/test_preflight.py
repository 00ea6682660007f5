"""tools/preflight.py: what it prints about real pairs, and the mistakes it finds."""

from __future__ import annotations

import functools
import json
import re
import shutil
from pathlib import Path

import cv2
import numpy as np
import pairs
import pytest
import torch
from builders import dataset_batch, distilled_text
from mmengine.config import Config
from pairs import SLOW
from tiny import DET_CLASSES, SEG_CLASSES, SEG_CONFIG, SIZE, TINY_SEGMENTOR
from torch import nn

from mmdist.teachers.teacher import build_model

RAMP = (
    'custom_hooks = [dict(type="mmdist.DistillScheduleHook", '
    'points=[(0, 0.0), (2, 1.0)])]'
)


@pytest.fixture
def preflight(run_tool):
    return functools.partial(run_tool, 'preflight')


def write_pair(
    folder: Path, student: str, weights: dict | None = None, **options
) -> None:
    """Like :func:`pairs.write_pair`, with the teacher's weights; random if omitted."""
    pairs.write_pair(folder, student, **options)
    if weights is None:
        pairs.write_weights(folder)
    else:
        torch.save(dict(state_dict=weights), folder / 'teacher.pth')


COLOURS = np.array([(255, 40, 40), (40, 255, 40), (40, 40, 255)])


def coloured_images(folder: Path, num_classes: int) -> str:
    """Write four images coloured by their classes; returns a segmentor's config."""
    rng = np.random.default_rng(0)
    for name in ('images', 'labels'):
        (folder / name).mkdir()
    for i in range(4):
        label = rng.permutation(np.arange(12) % num_classes).reshape(3, 4)
        label = np.kron(label, np.ones((32, 32))).astype(np.uint8)
        noise = rng.integers(-30, 30, (*SIZE, 3))
        image = (COLOURS[label] + noise).clip(0, 255).astype(np.uint8)
        cv2.imwrite(str(folder / 'images' / f'{i}.png'), image)
        cv2.imwrite(str(folder / 'labels' / f'{i}.png'), label)
    return SEG_CONFIG.format(
        model=TINY_SEGMENTOR.replace('num_classes=3', f'num_classes={num_classes}'),
        classes=SEG_CLASSES[:num_classes],
        data_root=str(folder),
    )


@pytest.fixture(scope='session')
def learned(tmp_path_factory) -> tuple[str, dict]:
    """A segmentor's config, and weights that tell its classes by colour."""
    text = coloured_images(tmp_path_factory.mktemp('coloured'), 3)
    config = Config.fromstring(text, '.py')
    torch.manual_seed(0)
    model = build_model(config, random=True).train()
    data = model.data_preprocessor(dataset_batch(config, 4), training=True)
    optimizer = torch.optim.Adam(model.parameters())
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 0.5  # the training is short
    for step in range(20):
        optimizer.param_groups[0]['lr'] = 0.01 * (1 - step / 20)
        optimizer.zero_grad()
        model.parse_losses(model.loss(**data))[0].backward()
        optimizer.step()
    return text, model.state_dict()


def classifier(weights: dict, change) -> dict:
    """The weights with changed classifiers, (classes, ...)."""
    return {k: change(v) if 'conv_seg' in k else v for k, v in weights.items()}


def miou(line: str) -> float:
    return float(re.search(r'mIoU ([\d.]+)', line)[1])


def test_a_good_pair_of_segmentors(preflight, tmp_path, learned):
    more = f'{RAMP}\nload_from = "teacher.pth"'
    write_pair(tmp_path, *learned, more=more)
    found = preflight('pair.py', '--images', '3')
    assert found.out.splitlines()[-1] == 'GO ON'
    lines = found.out.splitlines()
    assert len(lines) <= 45 and max(map(len, lines)) <= 100
    for text in (
        'SegLogits with DISTLoss, softmax',
        'chosen because student and teacher are of the same family',
        'decode_head, auxiliary_head (teacher: backbone, decode_head, auxiliary_head)',
        'pairs 2: 2x3x12x16, 384 rows, 100.0% count;',
        'Classes that are compared (3): sky, road, tree. They are in the same order.',
        'images the same',
        '0 in the first step; the lines below are at its full weight, 1',
        'dist_inter 0.',
        'loss_dist 0.',
        'own losses decode.loss_ce ',
        'parameters of the backbone',
        's with the teacher, ',
    ):
        assert text in found.text
    # the student starts from the teacher's weights
    teacher, student = (line for line in lines if 'mIoU' in line)
    assert teacher.startswith('  teacher') and student.startswith('  student')
    assert miou(teacher) == miou(student) > 80
    assert 'starts at random' not in found.text
    assert not list(tmp_path.glob('work_dirs*'))


def test_a_good_pair_of_detectors(preflight, tmp_path, det_config):
    write_pair(tmp_path, det_config)
    found = preflight('pair.py')
    assert 'DenseLogits with DISTLoss, sigmoid' in found.text
    assert 'bbox_head (teacher: backbone, neck, bbox_head)' in found.text
    assert '5: 2x27x12x16, 384 rows, 100.0% count; 2x27x6x8, 96 rows' in found.text
    assert re.search(r'gradient distillation has \d+\.?\d* times', found.text)
    assert 'SCORE' not in found.text
    assert '3 of 5 pairs have few rows per process (fewest: 2)' in found.text
    # its gradient is far larger than the labels', and balanced
    assert 'balance limits this to 3 times their norm in training' in found.text
    assert 'GO ON' in found.text


def test_images_and_classes_of_another_teacher(preflight, tmp_path, learned):
    """Its classes are put into the student's order, its images renormalised."""
    text, weights = learned
    order = [2, 0, 1]
    write_pair(tmp_path, text, classifier(weights, lambda x: x[order]))
    teacher = text.replace(str(SEG_CLASSES), "('tree', 'sky', 'road')")
    teacher = teacher.replace(
        'data_preprocessor=dict(',
        'data_preprocessor=dict(bgr_to_rgb=False, mean=[103.53, 116.28, 123.675], '
        'std=[57.375, 57.12, 58.395], ',
    )
    (tmp_path / 'teacher.py').write_text(teacher)
    # the first layer reads the channels in the other order too
    checkpoint = torch.load(tmp_path / 'teacher.pth')
    first = 'backbone.stem.0.weight'
    checkpoint['state_dict'][first] = checkpoint['state_dict'][first].flip(1)
    torch.save(checkpoint, tmp_path / 'teacher.pth')
    found = preflight(
        'pair.py', '--images', '4', '--cfg-options', 'model.teacher.config=teacher.py'
    )
    assert 'compared (3): sky, road, tree.' in found.text
    assert 'in the same order' not in found.text
    assert 'channels swapped' in found.text
    assert 'teacher: BGR, mean 103.5 116.3 123.7, std 57.38 57.12 58.4' in found.text
    assert miou(found.text) > 80


@pytest.mark.parametrize('named', [True, SLOW(False)])
def test_permuted_classes(preflight, tmp_path, learned, named):
    text, weights = learned
    config = (
        {} if named else dict(config=Config.fromstring(text, '.py').model.to_dict())
    )
    order = [1, 0, 2]
    write_pair(tmp_path, text, classifier(weights, lambda x: x[order]), **config)
    found = preflight('pair.py', '--images', '4', status=1)
    assert (
        "The teacher's classes look permuted: it takes sky for road, road for sky."
        in found.text
    )
    unknown = 'The class names of the teacher are unknown'
    assert (unknown in found.text) == (not named)


@pytest.mark.slow
@pytest.mark.parametrize('family', ['seg', 'det'])
def test_random_weights_score_like_noise(preflight, tmp_path, request, family):
    write_pair(tmp_path, request.getfixturevalue(f'{family}_config'))
    found = preflight('pair.py', '--images', '4', status=1)
    assert 'SCORE ON 4 VALIDATION IMAGES' in found.text
    assert re.search("The teacher's (mean IoU|AP|pred).* like noise", found.text)
    assert 'permuted' not in found.text


ORACLE = """
import torch
from mmdist import MODELS
from mmdist.teachers import ForeignTeacher

@MODELS.register_module()
class Oracle(ForeignTeacher):
    gives = 'boxes'
    activation = 'identity'

    def __init__(self, class_names):
        super().__init__(class_names, mean=[0, 0, 0], std=[1, 1, 1])
        self.unused = torch.nn.Linear(1, 1)

    def forward(self, images, sizes):
        results = []
        for image in images:
            boxes = []
            for channel in image:
                y, x = torch.nonzero(channel > 200, as_tuple=True)
                boxes.append([x.min(), y.min(), x.max() + 1, y.max() + 1])
            results.append((image.new_tensor(boxes), torch.eye(3).to(image)))
        return results
"""


@pytest.mark.slow
def test_a_detector_of_another_library(
    preflight, monkeypatch, tmp_path, coco_root, det_config
):
    """Every image has a red person, a green car and a blue dog, which Oracle finds."""
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / 'oracle.py').write_text(ORACLE)
    root = shutil.copytree(coco_root, tmp_path / 'coloured')
    data = json.loads((root / 'train.json').read_text())
    for image in data['images']:
        pixels = np.zeros((*SIZE, 3), np.uint8)
        for box in data['annotations']:
            if box['image_id'] == image['id']:
                x, y, width, height = box['bbox']
                # BGR; boxes overlap, but not within a channel
                pixels[y : y + height, x : x + width, 3 - box['category_id']] = 255
        cv2.imwrite(str(root / 'images' / image['file_name']), pixels)
    student = det_config.replace(str(coco_root), str(root))
    (tmp_path / 'student.py').write_text(student)
    imports = 'custom_imports = dict(imports=["oracle"])'
    for names, status in ((DET_CLASSES, 0), (('car', 'person', 'dog'), 1)):
        oracle = dict(type='mmdist.Oracle', class_names=names)
        pair = distilled_text(config=oracle, more=f'{RAMP}\n{imports}')
        (tmp_path / 'pair.py').write_text(pair)
        found = preflight('pair.py', '--images', '2', status=status)
        # over the two images, not all four
        average = float(re.search(r'bbox_mAP ([\d.]+)', found.text)[1])
        assert average > 0.95 or status
        wrong = 'look permuted: it takes person for car, car for person.'
        assert (wrong in found.text) == bool(status)
        assert 'Detections with DISTLoss' in found.text


@pytest.mark.slow
def test_a_constant_teacher(preflight, tmp_path, learned):
    """Biases alone: each class has the same score everywhere."""
    text, weights = learned

    def constant(x):
        return torch.zeros_like(x) if x.ndim > 1 else torch.arange(3.0)

    write_pair(tmp_path, text, classifier(weights, constant))
    found = preflight('pair.py', status=1)
    assert 'the teacher gives all rows the same scores' in found.text


@pytest.mark.slow
def test_two_classes(preflight, tmp_path):
    write_pair(tmp_path, coloured_images(tmp_path, 2))
    found = preflight('pair.py')
    assert 'the inter-class term is useless there' in found.text


@pytest.mark.parametrize(
    ('option', 'says'),
    [
        ('teacher.checkpoint=other.pth', "'other.pth' do not fit the teacher's conf"),
        SLOW('teacher.checkpoint=hello.pth', "'hello.pth' cannot be read"),
        SLOW('teacher.config=nowhere.py', 'nowhere.py'),
        ('student.decode_head.num_classes=2', 'set names 3 classes (sky, road, tre'),
        ('student.decode_head.chanels=2', "'chanels'. Did you mean 'channels'?"),
    ],
)
def test_a_training_that_would_not_start(
    preflight, tmp_path, det_config, seg_config, option, says
):
    pairs.write_pair(tmp_path, det_config)
    pairs.write_weights(tmp_path, 'other')
    (tmp_path / 'hello.pth').write_text('hello')
    write_pair(tmp_path, seg_config)
    found = preflight('pair.py', '--cfg-options', f'model.{option}', status=1)
    assert 'DO NOT TRAIN' in found.out.splitlines() and says in found.text


@pytest.mark.parametrize(
    ('old', 'new', 'says'),
    [
        ("'car'", "'caar'", 'it has no class caar'),
        SLOW("ann_file='train.json'", "ann_file='none.json'", 'none.json'),
        ('randomness', "val_dataloader['dataset']['metainfo'] = dict(classes=('car', "
         "'dog', 'person'))\nrandomness", 'in another order'),
    ],
)  # fmt: skip
def test_data_sets_that_do_not_fit(preflight, tmp_path, det_config, old, new, says):
    """The teacher is not blamed."""
    (tmp_path / 'teacher.py').write_text(det_config)
    assert old in det_config
    write_pair(tmp_path, det_config.replace(old, new), config='teacher.py')
    found = preflight('pair.py', '--images', '2', status=1)
    assert 'DO NOT TRAIN' in found.out.splitlines()
    assert says in found.text and 'teacher' not in found.text


def test_a_weight_of_0_has_no_gradient(preflight, tmp_path, det_config):
    write_pair(tmp_path, det_config)
    found = preflight(
        'pair.py',
        '--cfg-options',
        'model.distill.dist.type=mmdist.DenseLogits',
        'model.distill.dist.loss.type=mmdist.DISTLoss',
        'model.distill.dist.loss.loss_weight=0',
        status=1,
    )
    assert '`loss_dist` is 0 in the first step.' in found.text
    assert 'No gradient of distillation reaches the student.' in found.text
    assert 'chosen' not in found.text  # the user chose


@pytest.mark.parametrize(
    ('args', 'says'),
    [
        (['nowhere.py'], 'nowhere.py'),
        (['student.py'], 'does not distil'),
        (['hello.py'], 'hello'),
        (['pair.py', '--images', '-1'], '--images must be at least 0'),
    ],
)
def test_wrong_usage(preflight, tmp_path, det_config, args, says):
    pairs.write_pair(tmp_path, det_config)
    (tmp_path / 'hello.py').write_text('hello')
    found = preflight(*args, status=2)
    assert says in found.said


@pytest.mark.parametrize(
    ('share', 'ramp', 'fresh', 'verdict', 'says'),
    [
        (509, '', True, 'BETTER CHANGE THIS FIRST', 'is 509 times .*Leave `balance`'),
        (509, 'schedule', True, 'GO ON', 'The ramp must last until'),
        (509, 'balance', True, 'GO ON', '^GO ON$'),
        (2, '', True, 'GO ON', 'head starts at random'),
        (2, '', False, 'GO ON', '^GO ON$'),
        (0.001, 'schedule', False, 'GO ON', 'hardly counts'),
        (0.02, 'balance', False, 'GO ON', '^GO ON$'),
        (0.001, 'balance', False, 'GO ON', 'hardly counts'),
        (0, 'balance', True, 'DO NOT TRAIN', 'No gradient .* reaches'),
    ],
)
def test_the_verdict_fits_the_gradient(
    tools, capsys, share, ramp, fresh, verdict, says
):
    from preflight import Report, judge_gradient

    report = Report()
    judge_gradient(report, share, ramp, fresh)
    assert report.finish() == (verdict == 'DO NOT TRAIN')
    text = capsys.readouterr().out
    assert verdict in text.splitlines() and re.search(says, ' '.join(text.split()))


# ---- judging a score ----------------------------------------------------------------


def confusion(order: list[int], share: list[float], right: float) -> torch.Tensor:
    """Table for classes of these shares; ``right`` of each is taken for ``order``."""
    n = len(order)
    table = torch.full((n, n + 1), (1 - right) / n)
    table[:, -1] = 0
    table[range(n), order] += right
    return table * torch.tensor(share)[:, None] * 1000


@pytest.mark.parametrize(
    ('table', 'says'),
    [
        (confusion([0, 1], [0.9, 0.1], 0.8), ''),
        (confusion([0, 1], [0.9, 0.1], 0.02), 'noise'),
        (confusion([1, 0], [0.5, 0.5], 0.8), 'permuted: it takes a for b, b for a.'),
        (confusion([0, 0], [0.9, 0.1], 1.0), 'noise'),  # one class for everything
        (confusion([1, 1], [0.9, 0.1], 1.0), 'noise'),
        (confusion([0, 2, 1, 3], [0.4, 0.3, 0.2, 0.1], 0.9), 'b for c, c for b.'),
        (confusion(list(range(19)), [1 / 19] * 19, 0.3), ''),  # weak
        (confusion([0, 1, 1, 3], [0.4, 0.3, 0.2, 0.1], 0.9), ''),  # a class is unknown
    ],
)
def test_judge(tools, table, says):
    from teacher_score import judge

    names = 'abcdefghijklmnopqrs'
    said = judge(dict(mIoU=1.0), table, names, range(len(table)))
    assert says in said and bool(says) == bool(said)
