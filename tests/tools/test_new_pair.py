"""tools/new_pair.py: what it finds, what it writes, what it refuses."""

from __future__ import annotations

import runpy
import sys
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
    assert found['family'].startswith('SingleStageDetector, compared by DenseLogits')
    assert found['strides'] == '8, 16, 32, 64, 128'
    assert found['shapes'].startswith('720x32x40, 720x16x20')
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
    assert 'compared by SegLogits' in found['family']
    # The smaller map of the two, 1/8, is compared; SegFormer has no auxiliary head.
    assert (found['shapes'], found['strides']) == ('19x32x40', '8')
    assert found['checkpoint'] == 'own.pth'
    model = Config.fromfile(tmp_path / 'mine' / 'pair.py').model
    assert model.teacher.checkpoint == 'own.pth'
    assert model.student.decode_head.type == 'SegformerHead'


@pytest.mark.parametrize(
    ('student', 'teacher', 'reason'),
    [
        (
            DETECTORS[0],
            'mmdet::fcos/fcos_r50-caffe_fpn_gn-head_1x_coco.py',
            r'\(9, 32, 40\).*the teacher \[\(1, 32, 40\).*'
            'Take a teacher with the same levels, strides and number of anchors',
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
    ids=['other anchors', 'other classes', 'no weights'],
)
def test_refuses_with_a_sentence(new_pair, tmp_path, student, teacher, reason):
    with pytest.raises(SystemExit, match=f'(?s)This pair does not work.\n.*{reason}'):
        new_pair(student, teacher, '--out', 'pair.py')
    assert not (tmp_path / 'pair.py').exists()
