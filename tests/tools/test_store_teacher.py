"""tools/store_teacher.py stores what mmdet and mmseg predict in a test."""

from __future__ import annotations

import functools
import itertools
import os
import re
import runpy
import shutil
import sys
from pathlib import Path
from typing import ClassVar

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from builders import distilled_text
from mmdet.apis import inference_detector, init_detector
from mmengine.config import Config
from mmseg.apis import inference_model, init_model
from tiny import DET_CLASSES, SEG_CLASSES, SIZE

from mmdist import MODELS, ForeignTeacher
from mmdist.teachers.store import Store
from mmdist.teachers.teacher import build_model, load_config

TOOLS = Path(__file__).parents[2] / 'tools'
TWICE = "dict(type='Resize', scale=(256, 192), keep_ratio=True),"  # files are 128x96
PLAIN = "dict(type='Resize', scale=(128, 96)),"


@pytest.fixture
def store(run_tool):
    """Run the tool on `pair.py`."""
    return functools.partial(run_tool, 'store_teacher', 'pair.py', '--out', 'answers')


@pytest.fixture
def answers(store):
    """Run the tool to its end and read what it wrote."""

    def run(*args: str) -> Store:
        store(*args)
        return Store('answers')

    return run


def write_teacher(
    folder: Path, text: str, name: str = 'teacher', seed: int = 1
) -> None:
    """Write a teacher's config, and weights that give high scores."""
    (folder / f'{name}.py').write_text(text)
    torch.manual_seed(seed)
    model = build_model(load_config(folder / f'{name}.py'), random=True)
    for head in ('retina_cls', 'conv_seg'):
        for path, parameter in model.named_parameters():
            if f'{head}.weight' in path:
                torch.nn.init.normal_(parameter, std=0.5)
            elif f'{head}.bias' in path:
                torch.nn.init.constant_(parameter, -1.0)
    torch.save(dict(state_dict=model.state_dict(), meta={}), folder / f'{name}.pth')


def write_pair(folder: Path, student: str, teacher: str, **options) -> None:
    """Write a student, its teacher, and the config of the pair."""
    (folder / 'student.py').write_text(student)
    write_teacher(folder, teacher)
    options = dict(config='teacher.py', checkpoint='teacher.pth') | options
    (folder / 'pair.py').write_text(distilled_text(**options))


def asked_of_mmdet(image: Path | np.ndarray, config: str = 'teacher') -> np.ndarray:
    """The teacher's boxes in an image by mmdet's own API, (M, 6)."""
    cfg = Config.fromfile(f'{config}.py')
    if isinstance(image, Path):
        image = str(image)
    else:
        for step in cfg.test_dataloader.dataset.pipeline[1:3]:  # Resize, Pad
            step.update(
                {key: image.shape[1::-1] for key in {'scale', 'size'} & {*step}}
            )
    model = init_detector(cfg, f'{config}.pth', device='cpu')
    found = inference_detector(model, image).pred_instances
    rows = [found.bboxes, found.scores[:, None], found.labels[:, None]]
    rows = torch.cat(rows, 1).numpy()
    return rows[rows[:, 4] >= 0.05]


def asked_of_mmseg(image: Path | np.ndarray, config: str = 'teacher') -> torch.Tensor:
    """The teacher's probabilities by mmseg's own API, (classes, h, w)."""
    cfg = Config.fromfile(f'{config}.py')
    cfg.test_pipeline = cfg.test_dataloader.dataset.pipeline
    model = init_model(cfg, f'{config}.pth', device='cpu')
    logits, forward = [], model.decode_head.forward
    model.decode_head.forward = lambda x: logits.append(forward(x)) or logits[-1]
    inference_model(model, str(image) if isinstance(image, Path) else image)
    return logits[0][0].detach().softmax(0)


def view_of(image: np.ndarray, scale: float, flip: bool) -> np.ndarray:
    """Resize an image and, with ``flip``, mirror it."""
    pixels = torch.from_numpy(image).permute(2, 0, 1)[None].float()
    pixels = F.interpolate(pixels, scale_factor=scale, mode='bilinear')[0]
    pixels = pixels.permute(1, 2, 0).numpy()
    return np.ascontiguousarray(pixels[:, ::-1] if flip else pixels)


def answer_of(stored: Store, file: Path) -> torch.Tensor:
    return stored.answer(dict(img_path=str(file), height=SIZE[0], width=SIZE[1]))


def images(root: Path) -> list[Path]:
    return sorted((root / 'images').iterdir())


def test_boxes_are_those_of_mmdet(store, tmp_path, det_config, coco_root):
    write_pair(tmp_path, det_config, det_config.replace(PLAIN, TWICE))
    ran = store()
    assert '4 images' in ran.out
    assert "teacher=dict(stored='answers')" in ran.out
    assert "dict(type='mmdist.StoredTeacherHook')" in ran.out
    stored = Store('answers')
    assert (stored.kind, stored.class_names) == ('boxes', DET_CLASSES)
    for file in images(coco_root):
        expected = asked_of_mmdet(file)
        assert len(expected) > 5
        np.testing.assert_array_equal(answer_of(stored, file), expected)


def test_maps_are_those_of_mmseg(answers, tmp_path, seg_config, seg_root):
    both = "dict(type='LoadAnnotations'),\n    dict(type='PackSegInputs')]"
    assert both in seg_config
    teacher = seg_config.replace(both, f'{TWICE} {both}')
    write_pair(tmp_path, seg_config, teacher)
    stored = answers()
    assert (stored.kind, stored.class_names) == ('maps', SEG_CLASSES)
    for file in images(seg_root):
        found = answer_of(stored, file)
        expected = asked_of_mmseg(file)
        assert found.shape == expected.shape == (3, 24, 32)
        assert expected.std() > 0.1
        torch.testing.assert_close(found.float(), expected * 255, rtol=0, atol=0.501)


def published_fusion(rows: np.ndarray, models: int, min_iou: float = 0.55) -> list:
    """Section 3 of Solovyev et al., arXiv 1910.13302, step by step, with its lists."""
    clusters, fused = [], []  # L and F
    for box in sorted(rows.tolist(), key=lambda row: -row[4]):  # step 1
        best, where = min_iou, None  # steps 2 and 3
        for i, other in enumerate(fused):
            if other[5] != box[5]:
                continue
            width = min(box[2], other[2]) - max(box[0], other[0])
            height = min(box[3], other[3]) - max(box[1], other[1])
            both = max(width, 0) * max(height, 0)
            areas = sum((b[2] - b[0]) * (b[3] - b[1]) for b in (box, other))
            if both / (areas - both) > best:
                best, where = both / (areas - both), i
        if where is None:  # step 4
            clusters.append([box])
            fused.append(list(box))
            continue
        clusters[where].append(box)  # step 5
        cluster = clusters[where]
        weight = sum(b[4] for b in cluster)  # step 6
        mean = [sum(b[4] * b[k] for b in cluster) / weight for k in range(4)]
        fused[where] = [*mean, weight / len(cluster), box[5]]
    for cluster, box in zip(clusters, fused, strict=True):  # steps 7 and 8
        box[4] *= min(len(cluster), models) / models
    return sorted(fused, key=lambda row: -row[4])


def test_a_run_that_stopped_goes_on(store, tmp_path, det_config, coco_root):
    root = tmp_path / 'coco'
    shutil.copytree(coco_root, root)
    text = det_config.replace(str(coco_root), str(root))
    write_pair(tmp_path, text, text)
    file = images(root)[2]
    whole = file.read_bytes()
    file.write_bytes(b'no image')
    ran = store(status=1)
    assert f'{file} cannot be read by the test pipeline' in ran.said
    begun = (tmp_path / 'answers/part-0-0.jsonl').read_text()
    assert begun.count('\n') == 2
    file.write_bytes(whole)
    ran = store('--flip', status=1)
    assert "answers was started by another command: manifest['teachers']" in ran.said
    ran = store()
    assert '4 images' in ran.out
    assert 'for 2 of them' in ran.out
    assert (tmp_path / 'answers/part-0-0.jsonl').read_text() == begun
    expected = asked_of_mmdet(file)
    np.testing.assert_array_equal(answer_of(Store('answers'), file), expected)


def run_in_group(folder: Path, arguments: list[str]) -> None:
    os.chdir(folder)
    sys.argv = ['store_teacher.py', *arguments]
    sys.path.insert(0, str(TOOLS))
    runpy.run_path(str(TOOLS / 'store_teacher.py'), run_name='__main__')


def test_processes_share_the_images(tmp_path, det_config, coco_root, group_of):
    write_pair(tmp_path, det_config, det_config)
    arguments = ['pair.py', '--out', 'answers', '--launcher', 'pytorch']
    group_of(2)(run_in_group, tmp_path, arguments)
    for i in range(2):
        part = (tmp_path / f'answers/part-{i}-0.jsonl').read_text()
        assert part.count('\n') == 2
    stored = Store(tmp_path / 'answers')
    os.chdir(tmp_path)
    for file in images(coco_root):
        found = answer_of(stored, file)
        np.testing.assert_allclose(found, asked_of_mmdet(file), rtol=1e-5, atol=1e-4)


BOTH = ('teacher', 'other')


def write_two(folder: Path, text: str, classes: tuple, theirs: tuple) -> None:
    """Write a pair with two teachers; the second one has other classes."""
    write_pair(folder, text, text)
    other = text.replace(str(classes), str(theirs))
    assert other != text
    write_teacher(folder, other, 'other', seed=2)
    teachers = (
        "teachers=dict(a=dict(config='teacher.py', checkpoint='teacher.pth'), "
        "b=dict(config='other.py', checkpoint='other.pth', class_match='shared'))"
    )
    pair = (folder / 'pair.py').read_text()
    (folder / 'pair.py').write_text(re.sub('teacher={.*}', teachers, pair))


def test_flipped_and_scaled_boxes_are_fused(answers, tmp_path, det_config, coco_root):
    pad = "dict(type='Pad', size=(192, 160)),"  # below and on the right
    write_pair(tmp_path, det_config, det_config.replace(PLAIN, PLAIN + pad))
    stored = answers('--flip', '--scales', '1.5', '1')
    for file in images(coco_root)[:2]:
        padded = np.pad(cv2.imread(str(file)), [(0, 64), (0, 64), (0, 0)])
        rows = []
        for scale, flip in itertools.product((1, 1.5), (False, True)):
            found = asked_of_mmdet(view_of(padded, scale, flip))
            found[:, :4] /= scale
            if flip:
                found[:, [0, 2]] = padded.shape[1] - found[:, [2, 0]]
            rows.append(found)
        expected = np.array(published_fusion(np.concatenate(rows), 4))
        expected = expected[expected[:, 4] >= 0.05][:100]
        found = answer_of(stored, file)
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-3)


def test_boxes_of_two_teachers_are_fused(answers, tmp_path, det_config, coco_root):
    write_two(tmp_path, det_config, DET_CLASSES, [DET_CLASSES[i] for i in (2, 0, 1)])
    stored = answers()
    assert stored.class_names == DET_CLASSES
    for file in images(coco_root)[:2]:
        rows = [asked_of_mmdet(file), asked_of_mmdet(file, 'other')]
        assert all(len(one) for one in rows)
        rows[1][:, 5] = (rows[1][:, 5] + 2) % 3
        expected = np.array(published_fusion(np.concatenate(rows), 2))
        expected = expected[expected[:, 4] >= 0.05][:100]
        found = answer_of(stored, file)
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-4)


def test_boxes_without_an_area_or_a_score_are_not_fused(tools):
    from teacher_answers import fused

    bad = torch.tensor([[1, 1, 1, 5, 0.5, 0], [1, 1, 5, 5, 0, 0]])
    good = torch.tensor([[1, 1, 5, 5, 0.5, 0]])
    assert fused([bad, bad]).shape == (0, 6)
    assert torch.equal(fused([torch.cat([bad, good])] * 2), good)


def test_maps_of_teachers_and_views_are_their_mean(
    answers, tmp_path, seg_config, seg_root
):
    write_two(tmp_path, seg_config, SEG_CLASSES, ('tree', 'sky', 'road'))
    stored = answers('--flip', '--scales', '2', '1')
    assert stored.class_names == SEG_CLASSES
    for file in images(seg_root)[:2]:
        maps = []
        for name, scale, flip in itertools.product(BOTH, (1, 2), (False, True)):
            found = asked_of_mmseg(view_of(cv2.imread(str(file)), scale, flip), name)
            found = F.interpolate(found[None], (12, 16), mode='bilinear')[0]
            found = found.flip(-1) if flip else found
            maps.append(found[[1, 2, 0]] if name == 'other' else found)
        found = answer_of(stored, file).float()
        expected = 255 * sum(maps) / len(maps)
        torch.testing.assert_close(found, expected, rtol=0, atol=0.51)


def test_several_teachers_have_to_know_all_classes(store, tmp_path, det_config):
    write_two(tmp_path, det_config, DET_CLASSES, ('dog', 'cat', 'person'))
    ran = store(status=1)
    assert 'of `teachers.b` and the other teachers cannot be combined' in ran.said


def test_maps_of_windows_are_put_together(answers, tmp_path, seg_config, seg_root):
    windows = "test_cfg=dict(mode='slide', crop_size=(64, 64), stride=(48, 48)),"
    teacher = seg_config.replace('pretrained=None,', f'pretrained=None, {windows}')
    assert teacher != seg_config
    write_pair(tmp_path, seg_config, teacher)
    stored = answers()
    file = images(seg_root)[0]
    cfg = Config.fromfile('teacher.py')
    cfg.test_pipeline = cfg.test_dataloader.dataset.pipeline
    model = init_model(cfg, 'teacher.pth', device='cpu')
    logits = inference_model(model, str(file)).seg_logits.data
    expected = F.interpolate(logits.softmax(0)[None], (12, 16), mode='bilinear')[0]
    found = answer_of(stored, file).float()
    torch.testing.assert_close(found, expected * 255, rtol=0, atol=0.51)


def test_each_image_is_asked_about_once(store, tmp_path, seg_config, seg_root):
    """Through wrappers, images without labels included; labels are not read."""
    shutil.copytree(seg_root / 'images', tmp_path / 'unlabelled')
    shutil.copytree(seg_root / 'labels', tmp_path / 'labels')
    shutil.copytree(seg_root / 'images', tmp_path / 'images')
    text = seg_config.replace(str(seg_root), str(tmp_path))
    write_pair(tmp_path, text, text)
    with (tmp_path / 'pair.py').open('a') as pair:
        pair.write(
            'labelled = _base_.train_dataloader.dataset\n'
            "both = dict(type='ConcatDataset', ignore_keys=['classes', 'palette', "
            "'label_map', 'reduce_zero_label'], datasets=[labelled, labelled, "
            "dict(type='mmdist.ImageFolder', pipeline=[], data_root='unlabelled')])\n"
            "train_dataloader = dict(dataset=dict(_delete_=True, type='RepeatDataset', "
            'times=3, dataset=both))\n'
        )
    shutil.rmtree(tmp_path / 'labels')
    (tmp_path / 'labels').mkdir()
    ran = store()
    stored = Store('answers')
    assert '8 images' in ran.out
    for folder in ('images', 'unlabelled'):
        for file in (tmp_path / folder).iterdir():
            key = stored.key(dict(img_path=f'{folder}/{file.name}'))
            assert str(file).endswith(key)


@MODELS.register_module()
class SeesTwoBoxes(ForeignTeacher):
    """A detector of another library."""

    gives = 'boxes'
    seen: ClassVar[list] = []

    def __init__(self) -> None:
        super().__init__(DET_CLASSES, mean=[1, 2, 3], std=[4, 5, 6])
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def forward(self, images, sizes):
        self.seen.append((images, sizes))
        boxes = images.new_tensor([[20.0, 40, 60, 80], [100, 100, 180, 160]])
        scores = images.new_tensor([[-9.0, 2, -9], [1, -9, -9]])
        return [(boxes, scores)]


def test_a_teacher_of_another_library(answers, tmp_path, det_config, coco_root):
    write_pair(tmp_path, det_config.replace(PLAIN, TWICE), det_config)
    text = distilled_text(config=dict(type='mmdist.SeesTwoBoxes'))
    (tmp_path / 'pair.py').write_text(text)
    stored = answers()
    file = images(coco_root)[0]
    found = answer_of(stored, file)
    sigmoid = 1 / (1 + np.exp([-2.0, -1.0]))
    expected = [[10, 20, 30, 40, sigmoid[0], 1], [50, 50, 90, 80, sigmoid[1], 0]]
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    inputs, sizes = SeesTwoBoxes.seen[0]
    assert sizes == [(192, 256)]
    image = cv2.resize(cv2.imread(str(file)), (256, 192))[..., ::-1]
    image = torch.tensor((image - np.array([1, 2, 3])) / np.array([4, 5, 6]))
    torch.testing.assert_close(inputs[0].double(), image.permute(2, 0, 1))


@pytest.mark.parametrize(
    ('teacher', 'words'),
    [
        (dict(ema=dict()), 'is the mean of the student'),
        (dict(stored='answers'), 'is already stored'),
        (dict(config='teacher.py'), 'The teacher has no checkpoint'),
    ],
)
def test_what_cannot_be_stored_is_said(store, tmp_path, det_config, teacher, words):
    write_pair(tmp_path, det_config, det_config)
    (tmp_path / 'pair.py').write_text(distilled_text(**teacher))
    ran = store(status=1)
    assert words in ran.said
    assert not (tmp_path / 'answers').exists()
