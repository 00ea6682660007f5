"""tools/new_pair.py: what it finds, what it writes, what it refuses."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from mmengine.config import Config
from pairs import SLOW
from tiny import TINY_RETINANET, TINY_SEGMENTOR

DETECTORS = (
    'mmdet::retinanet/retinanet_r18_fpn_1x_coco.py',
    'mmdet::retinanet/retinanet_r50-caffe_fpn_1x_coco.py',
)
SEGMENTORS = (
    'mmseg::segformer/segformer_mit-b0_8xb1-160k_cityscapes-1024x1024.py',
    'mmseg::pspnet/pspnet_r18-d8_4xb2-80k_cityscapes-512x1024.py',
)


@pytest.fixture
def new_pair(run_tool):
    """Run the tool; returns what it printed, or its error."""

    def run(student: str, teacher: str, *args: str) -> str:
        argv = ['--student', student, '--teacher', *teacher.split(), *args]
        ran = run_tool('new_pair', *argv, status=None)
        return ran.said if ran.status else ran.text

    return run


def test_detectors(new_pair, tmp_path):
    student, teacher = DETECTORS
    found = new_pair(student, teacher, '--out', 'pair.py')
    for text in (
        'student RetinaNet of ResNet, RetinaHead; 21.',
        'DenseLogits with DISTLoss, sigmoid chosen because student and teacher are of',
        'pairs 5: 2x720x32x40, 2560 rows, 100.0% count; 2x720x16x20, 640 rows',
        'Classes that are compared (80): person, bicycle',
        # Caffe's weights take BGR with only the mean subtracted.
        'channels swapped, mean and std changed. Student: RGB, mean 123.7',
        ', loss_dist ',
    ):
        assert text in found
    config = tmp_path / 'pair.py'
    assert len(config.read_text().splitlines()) <= 12
    model = Config.fromfile(config).model
    assert model.type == 'mmdist.Distiller'
    assert model.teacher.config == teacher
    # from mmdet's metafile
    assert model.teacher.checkpoint.endswith('_caffe_fpn_1x_coco_20200531-f11027c5.pth')
    assert model.student == Config.fromstring(f'_base_ = {student!r}', '.py').model


def test_configs_and_weights_of_ones_own_hold_in_any_directory(
    new_pair, monkeypatch, tmp_path
):
    for folder, path in zip(('mine', 'theirs'), SEGMENTORS, strict=True):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / 'config.py').write_text(f'_base_ = {path!r}\n')
    found = new_pair(
        *('mine/config.py', 'theirs/config.py'),
        *('--checkpoint', 'own.pth', '--out', 'mine/pair.py'),
    )
    assert 'SegformerHead' in found
    # The smaller map, 1/8, is compared; SegFormer has no auxiliary head.
    assert 'SegLogits with DISTLoss, softmax' in found
    assert 'pairs 1: 2x19x32x40' in found
    assert 'own.pth, which does not exist' in found
    (tmp_path / 'own.pth').touch()
    monkeypatch.chdir('/')
    model = Config.fromfile(tmp_path / 'mine' / 'pair.py').model
    assert Path(model.teacher.checkpoint).samefile(tmp_path / 'own.pth')
    assert Path(model.teacher.config).samefile(tmp_path / 'theirs' / 'config.py')
    assert model.student.decode_head.type == 'SegformerHead'


def test_a_student_that_distils_already(new_pair, tmp_path, det_config):
    """Its student is taken; a distiller of a distiller cannot be built."""
    (tmp_path / 'plain.py').write_text(det_config)
    args = ['plain.py', '--checkpoint', 'own.pth', '--out']
    new_pair('plain.py', *args, 'pair.py')
    new_pair('pair.py', *args, 'again.py')
    pair, again = (
        Config.fromfile(tmp_path / f'{x}.py').model for x in ('pair', 'again')
    )
    assert again == pair and again.student.type == 'RetinaNet'


def test_a_teacher_of_another_library(new_pair, tmp_path, seg_config):
    import hf_models

    make = hf_models.SEGMENTORS['segformer']
    hf_models.save_model(make, 'SegformerImageProcessor', tmp_path / 'hub')
    (tmp_path / 'student.py').write_text(seg_config)
    teacher = 'type=mmdist.HFSegmentor name=hub'
    shared = ('--class-match', 'shared')
    found = new_pair('student.py', teacher, '--out', 'pair.py', *shared)
    assert 'teacher HFSegmentor' in found and 'checkpoint' not in found
    assert 'compared (2): sky, road' in found
    assert Config.fromfile(tmp_path / 'pair.py').model.teacher == dict(
        config=dict(type='mmdist.HFSegmentor', name='hub'), class_match='shared'
    )


def own_classes(library: str, names: list[str], columns: int) -> str:
    """Config of a custom data set with these classes."""
    base, dataset, model = {
        'mmdet': (DETECTORS[0], 'CocoDataset', TINY_RETINANET),
        'mmseg': (SEGMENTORS[1], 'BaseSegDataset', TINY_SEGMENTOR),
    }[library]
    return f"""
_base_ = {base!r}
model = dict({model.replace('num_classes=3', f'num_classes={columns}')})
train_dataloader = dict(dataset=dict(
    type={dataset!r}, metainfo=dict(classes={tuple(names)!r})))
"""


@pytest.mark.parametrize(
    ('library', 'number'),
    [
        ('mmdet', 1),
        SLOW('mmdet', 2),
        SLOW('mmdet', 200),
        SLOW('mmseg', 1),
        SLOW('mmseg', 2),
        ('mmseg', 200),
    ],
)
def test_any_number_of_classes(new_pair, tmp_path, library, number):
    """One class, as for trees in aerial images, once failed with `low >= high`."""
    names = [f'class {i}' for i in range(number)]
    if library == 'mmseg' and number == 1:  # the background is a class
        names.append('other')
    (tmp_path / 'own.py').write_text(own_classes(library, names, len(names)))
    found = new_pair('own.py', 'own.py', '--checkpoint', 'own.pth')
    assert f'Classes that are compared ({len(names)}): class 0' in found
    assert 'loss_dist' in found


def test_class_map_and_comparisons_are_checked_and_written(new_pair, tmp_path):
    for side, names in dict(student=['car', 'dog'], teacher=['dog', 'auto']).items():
        (tmp_path / f'{side}.py').write_text(own_classes('mmdet', names, 2))
    args = ['student.py', 'teacher.py', '--checkpoint', 'own.pth', '--out', 'pair.py']
    assert 'cannot be matched by name' in new_pair(*args)
    found = new_pair(
        *args,
        *('--class-map', 'car=auto', '--distill'),
        *('dist.type=mmdist.DenseLogits', 'dist.levels=concat'),
        *('dist.anchors=separate', 'mimic.type=mmdist.Features'),
    )
    assert 'compared (2): car, dog. Under other names (1): car <- auto' in found
    assert 'dist DenseLogits with DISTLoss, sigmoid' in found
    assert 'pairs 1: 30708x2' in found
    assert 'mimic Features with MSELoss' in found
    model = Config.fromfile(tmp_path / 'pair.py').model
    assert model.teacher.class_map == dict(car='auto')
    assert model.distill == dict(
        dist=dict(type='mmdist.DenseLogits', levels='concat', anchors='separate'),
        mimic=dict(type='mmdist.Features'),
    )


@pytest.mark.parametrize(
    ('student', 'teacher', 'reason'),
    [
        SLOW(
            'mmdet::centernet/centernet_r18_8xb16-crop512-140e_coco.py',
            'mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py',
            'not work. DenseLogits cannot .* FasterRCNN.*Detections cannot .* Center',
        ),
        SLOW(
            SEGMENTORS[1],
            'mmseg::pspnet/pspnet_r50-d8_4xb4-160k_ade20k-512x512.py',
            'not work. The classes of student and teacher cannot be matched by name',
        ),
        ('five.py', 'three.py', "student's data set names 3 .*num_classes=5.*holds"),
        ('three.py', 'five.py', 'teacher has 3 class names .*, but its head has 5'),
        ('three.py', 'three.py', 'The pair works, but no published .* --checkpoint'),
        ('hello.py', 'three.py', "`--student` is 'hello.py', .* 'hello' is not def"),
        ('three.py', 'thre.py', "`--teacher` is 'thre.py', but .* similar: three.py"),
        ('three.py', 'empty.py', '`--teacher` has no `model`'),
        ('typo.py', 'three.py', "`RetinaHead`: .* Did you mean 'num_classes'"),
        ('three.py', 'type=mmdist.HFSegmentor name=none', 'not work. .*none'),
    ],
)  # fmt: skip
def test_refuses_with_a_sentence(new_pair, tmp_path, student, teacher, reason):
    for name, columns in dict(three=3, five=5).items():
        text = own_classes('mmdet', ['a', 'b', 'c'], columns)
        (tmp_path / f'{name}.py').write_text(text)
    (tmp_path / 'hello.py').write_text('hello')
    (tmp_path / 'empty.py').touch()
    typo = text.replace('num_classes', 'num_clases')
    (tmp_path / 'typo.py').write_text(typo)
    assert re.search(reason, new_pair(student, teacher, '--out', 'pair.py'))
    assert not (tmp_path / 'pair.py').exists()
