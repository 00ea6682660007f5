"""tools/new_pair.py: what it finds, what it writes, what it refuses."""

from __future__ import annotations

import runpy
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from mmengine.config import Config

TOOL = str(Path(__file__).parents[2] / 'tools' / 'new_pair.py')
DETECTORS = (
    'mmdet::retinanet/retinanet_r18_fpn_1x_coco.py',
    'mmdet::retinanet/retinanet_r50-caffe_fpn_1x_coco.py',
)
SEGMENTORS = (
    'mmseg::segformer/segformer_mit-b0_8xb1-160k_cityscapes-1024x1024.py',
    'mmseg::pspnet/pspnet_r18-d8_4xb2-80k_cityscapes-512x1024.py',
)


@pytest.fixture
def new_pair(monkeypatch, capsys, tmp_path):
    """Run the tool in an empty directory; gives what it printed, by key."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(Path(TOOL).parent)

    def run(student: str, teacher: str, *args: str) -> dict[str, str]:
        argv = ['new_pair.py', '--student', student, '--teacher', teacher, *args]
        monkeypatch.setattr(sys, 'argv', argv)
        runpy.run_path(TOOL, run_name='__main__')
        lines = capsys.readouterr().out.splitlines()
        return dict(line.split(maxsplit=1) for line in lines if line)

    return run


def test_detectors(new_pair, tmp_path):
    student, teacher = DETECTORS
    found = new_pair(student, teacher, '--out', 'pair.py')
    assert found['student'].startswith('RetinaNet of ResNet, RetinaHead; 21.')
    assert found['family'] == 'SingleStageDetector'
    assert found['dist'].startswith(
        'DenseLogits with DISTLoss, sigmoid; 720x32x40, 720x16x20'
    )
    assert found['dist'].endswith('strides 8, 16, 32, 64, 128')
    assert found['classes'] == '80, the same in the same order'
    # Caffe's weights want BGR, mean only.
    assert 'channels swapped, mean and std changed' in found['preprocessing']
    assert 'loss_dist' in found['first']

    config = tmp_path / 'pair.py'
    assert len(config.read_text().splitlines()) <= 12
    model = Config.fromfile(config).model
    assert model.type == 'mmdist.Distiller'
    assert model.teacher.config == teacher
    # mmdet's metafile
    assert model.teacher.checkpoint.endswith('_caffe_fpn_1x_coco_20200531-f11027c5.pth')
    assert model.student == Config.fromstring(f'_base_ = {student!r}', '.py').model


def test_segmentors_with_own_weights_and_a_config_of_ones_own(new_pair, tmp_path):
    student, teacher = SEGMENTORS
    (tmp_path / 'mine').mkdir()
    (tmp_path / 'mine' / 'student.py').write_text(f'_base_ = {student!r}\n')
    found = new_pair(
        'mine/student.py', teacher, '--checkpoint', 'own.pth', '--out', 'mine/pair.py'
    )
    assert 'SegformerHead' in found['student']
    # The smaller map of the two, 1/8, is compared; SegFormer has no auxiliary head.
    expected = 'SegLogits with DISTLoss, softmax; 19x32x40; strides 8'
    assert found['dist'] == expected
    assert found['checkpoint'] == 'own.pth'
    model = Config.fromfile(tmp_path / 'mine' / 'pair.py').model
    assert model.teacher.checkpoint == 'own.pth'
    assert model.student.decode_head.type == 'SegformerHead'


@pytest.mark.parametrize(
    ('student', 'teacher', 'reason'),
    [
        (
            'mmdet::centernet/centernet_r18_8xb16-crop512-140e_coco.py',
            'mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py',
            'compare a CenterNet.*how a CenterNetHead encodes its boxes is not known',
        ),
        (
            SEGMENTORS[1],
            'mmseg::pspnet/pspnet_r50-d8_4xb4-160k_ade20k-512x512.py',
            'classes of student and teacher cannot be matched by name',
        ),
        (
            DETECTORS[0],
            'mmdet::dino/dino-4scale_r50_8xb2-24e_coco.py',
            'No published weights are known .* Give --checkpoint',
        ),
    ],
    ids=['boxes that are not decoded', 'other classes', 'no weights'],
)
def test_refuses_with_a_sentence(new_pair, tmp_path, student, teacher, reason):
    with pytest.raises(SystemExit, match=f'(?s)This pair does not work.\n.*{reason}'):
        new_pair(student, teacher, '--out', 'pair.py')
    assert not (tmp_path / 'pair.py').exists()


def own_classes(library: str, names: Sequence[str], base: str, head: str) -> str:
    """A config of a data set of one's own with these classes."""
    dataset = {'mmdet': 'CocoDataset', 'mmseg': 'BaseSegDataset'}[library]
    return f"""
_base_ = {base!r}
model = dict({head})
train_dataloader = dict(dataset=dict(
    type={dataset!r}, metainfo=dict(classes={tuple(names)!r})))
"""


@pytest.mark.parametrize('number', [1, 2, 200])
@pytest.mark.parametrize('library', ['mmdet', 'mmseg'])
def test_any_number_of_classes(new_pair, tmp_path, library, number):
    """One class is what aerial images of trees have; `low >= high` was the answer."""
    names = [f'class {i}' for i in range(number)]
    # mmseg has the background as a class
    columns = max(number, 2) if library == 'mmseg' else number
    names += ['other'] * (columns - number)
    heads = {
        'mmdet': f'bbox_head=dict(num_classes={columns})',
        'mmseg': f'decode_head=dict(num_classes={columns}), '
        f'auxiliary_head=dict(num_classes={columns})',
    }
    bases = {
        'mmdet': DETECTORS[0],
        'mmseg': SEGMENTORS[1],
    }
    for side in ('student', 'teacher'):
        text = own_classes(library, names, bases[library], heads[library])
        (tmp_path / f'{side}.py').write_text(text)
    args = ['--checkpoint', 'own.pth', '--out', 'pair.py']
    found = new_pair('student.py', 'teacher.py', *args)
    assert found['classes'] == f'{columns}, the same in the same order'
    assert 'loss_dist' in found['first']


def test_class_map_and_comparisons_are_checked_and_written(new_pair, tmp_path):
    for side, names in dict(student=('car', 'dog'), teacher=('dog', 'vehicle')).items():
        head = 'bbox_head=dict(num_classes=2)'
        text = own_classes('mmdet', names, DETECTORS[0], head)
        (tmp_path / f'{side}.py').write_text(text)
    args = ['student.py', 'teacher.py', '--checkpoint', 'own.pth', '--out', 'pair.py']
    with pytest.raises(SystemExit, match='cannot be matched by name'):
        new_pair(*args)
    found = new_pair(
        *args,
        *('--class-map', 'car=vehicle', '--distill'),
        *('dist.type=mmdist.DenseLogits', 'dist.levels=concat'),
        *('dist.anchors=separate', 'mimic.type=mmdist.Features'),
    )
    assert found['classes'] == "2, 2 of them matched by name with the teacher's 2"
    assert found['dist'] == 'DenseLogits with DISTLoss, sigmoid; 30708 rows of 2'
    assert found['mimic'].startswith('Features with MSELoss; 256x32x40')
    model = Config.fromfile(tmp_path / 'pair.py').model
    assert model.teacher.class_map == dict(car='vehicle')
    assert model.distill == dict(
        dist=dict(type='mmdist.DenseLogits', levels='concat', anchors='separate'),
        mimic=dict(type='mmdist.Features'),
    )
