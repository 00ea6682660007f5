"""tools/store_teacher.py: what it stores is what mmdet and mmseg answer in a test."""

from __future__ import annotations

import functools
from pathlib import Path

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

from mmdist.teachers.store import Store
from mmdist.teachers.teacher import build_model, load_config

TWICE = "dict(type='Resize', scale=(256, 192), keep_ratio=True),"  # the size of a file
PLAIN = "dict(type='Resize', scale=(128, 96)),"


@pytest.fixture
def store(run_tool):
    """Run the tool."""
    return functools.partial(run_tool, 'store_teacher')


def write_teacher(folder: Path, text: str, name: str = 'teacher', seed: int = 1) -> str:
    """Write a teacher's config and weights with which it is sure of something."""
    (folder / f'{name}.py').write_text(text)
    torch.manual_seed(seed)
    model = build_model(load_config(folder / f'{name}.py'), random=True)
    for head in ('retina_cls', 'conv_seg'):
        for path, parameter in model.named_parameters():
            if f'{head}.weight' in path:
                torch.nn.init.normal_(parameter, std=0.5)
            elif f'{head}.bias' in path:
                torch.nn.init.constant_(parameter, -1.0)
    meta = dict(dataset_meta=dict(classes=DET_CLASSES if 'retina' in text else None))
    torch.save(dict(state_dict=model.state_dict(), meta=meta), folder / f'{name}.pth')
    return text


def write_pair(folder: Path, student: str, teacher: str, **options) -> None:
    """Write a student, its teacher, and the config of the pair."""
    (folder / 'student.py').write_text(student)
    write_teacher(folder, teacher)
    options = dict(config='teacher.py', checkpoint='teacher.pth') | options
    (folder / 'pair.py').write_text(distilled_text(**options))


def asked_of_mmdet(file: Path, config: str = 'teacher', scale: str = '') -> np.ndarray:
    """The teacher's boxes of a file, asked by mmdet's own API, (M, 6)."""
    cfg = Config.fromfile(f'{config}.py')
    if scale:
        cfg.merge_from_dict({'test_dataloader.dataset.pipeline.1.scale': eval(scale)})
    model = init_detector(cfg, f'{config}.pth', device='cpu')
    found = inference_detector(model, str(file)).pred_instances
    rows = [found.bboxes, found.scores[:, None], found.labels[:, None]]
    rows = torch.cat(rows, 1).numpy()
    return rows[rows[:, 4] >= 0.05]


def asked_of_mmseg(file: Path, config: str = 'teacher') -> torch.Tensor:
    """The teacher's probabilities, (classes, h, w), while mmseg's own API asks it."""
    cfg = Config.fromfile(f'{config}.py')
    cfg.test_pipeline = cfg.test_dataloader.dataset.pipeline
    model = init_model(cfg, f'{config}.pth', device='cpu')
    logits, forward = [], model.decode_head.forward
    model.decode_head.forward = lambda x: logits.append(forward(x)) or logits[-1]
    inference_model(model, str(file))
    return logits[0][0].detach().softmax(0)


def mirrored(file: Path, folder: Path) -> Path:
    path = folder / f'mirrored{file.name}'
    cv2.imwrite(str(path), cv2.imread(str(file))[:, ::-1])
    return path


def rows_of(stored: Store, key: str) -> np.ndarray:
    boxes, scores, labels = stored.boxes(key)
    return torch.cat([boxes, scores[:, None], labels[:, None]], 1).numpy()


def images(root: Path) -> list[Path]:
    return sorted((root / 'images').iterdir())


def test_boxes_are_those_of_mmdet(store, tmp_path, det_config, coco_root):
    write_pair(tmp_path, det_config, det_config.replace(PLAIN, TWICE))
    ran = store('pair.py', '--out', 'answers')
    assert ran.status == 0, ran
    assert '4 images' in ran.out
    assert "teacher=dict(stored='answers')" in ran.out
    assert "dict(type='mmdist.StoredTeacherHook')" in ran.out
    stored = Store('answers')
    assert (stored.kind, stored.class_names) == ('boxes', DET_CLASSES)
    for file in images(coco_root):
        key = stored.key(dict(img_path=str(file)))
        expected = asked_of_mmdet(file)
        assert len(expected) > 5
        np.testing.assert_array_equal(rows_of(stored, key), expected)
        assert stored.size(key) == SIZE


def test_maps_are_those_of_mmseg(store, tmp_path, seg_config, seg_root):
    both = "dict(type='LoadAnnotations'),\n    dict(type='PackSegInputs')]"
    assert both in seg_config
    teacher = seg_config.replace(both, f'{TWICE} {both}')
    write_pair(tmp_path, seg_config, teacher)
    ran = store('pair.py', '--out', 'answers')
    assert ran.status == 0, ran
    stored = Store('answers')
    assert (stored.kind, stored.class_names) == ('maps', SEG_CLASSES)
    for file in images(seg_root):
        found = stored.map(stored.key(dict(img_path=str(file))))
        expected = asked_of_mmseg(file)
        assert found.shape == expected.shape == (3, 24, 32)
        assert expected.std() > 0.1
        torch.testing.assert_close(found.float(), expected * 255, rtol=0, atol=0.501)


def published_fusion(rows: np.ndarray, models: int, min_iou: float = 0.55) -> list:
    """Section 3 of Solovyev et al., arXiv 1910.13302, step by step, with lists.

    Without numpy's vectors, and clusters are kept as the lists that the paper has.
    """
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


@pytest.mark.parametrize('number', [0, 1, 40, 200])
def test_the_fusion_is_the_published_one(tools, number):
    from wbf import fuse

    rng = np.random.default_rng(number)
    rows = rng.random((number, 6))
    rows[:, 2:4] = rows[:, :2] + 0.3 + 0.2 * rows[:, 2:4]
    rows[:, 5] = rng.integers(0, 3, number)
    expected = np.array(published_fusion(rows, 4)).reshape(-1, 6)
    assert len(expected) < number or number < 2
    np.testing.assert_allclose(fuse(rows, 4), expected, rtol=1e-9)


def test_flipped_and_scaled_boxes_are_fused(store, tmp_path, det_config, coco_root):
    write_pair(tmp_path, det_config, det_config)
    ran = store('pair.py', '--out', 'answers', '--flip', '--scales', '1.5', '1')
    assert ran.status == 0, ran
    stored = Store('answers')
    for file in images(coco_root)[:2]:
        rows = []
        for scale in ('(128, 96)', '(192, 144)'):
            rows.append(asked_of_mmdet(file, scale=scale))
            other = asked_of_mmdet(mirrored(file, tmp_path), scale=scale)
            other[:, [0, 2]] = SIZE[1] - other[:, [2, 0]]
            rows.append(other)
        expected = np.array(published_fusion(np.concatenate(rows), 4))
        expected = expected[expected[:, 4] >= 0.05][:100]
        found = rows_of(stored, stored.key(dict(img_path=str(file))))
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-3)


def test_flipped_and_scaled_maps_are_their_mean(store, tmp_path, seg_config, seg_root):
    write_pair(tmp_path, seg_config, seg_config)
    ran = store('pair.py', '--out', 'answers', '--flip', '--scales', '2', '1')
    assert ran.status == 0, ran
    both = "dict(type='LoadAnnotations'),\n    dict(type='PackSegInputs')]"
    twice = seg_config.replace(both, f'{TWICE} {both}')
    (tmp_path / 'twice.py').write_text(twice)
    (tmp_path / 'twice.pth').write_bytes((tmp_path / 'teacher.pth').read_bytes())
    stored = Store('answers')
    for file in images(seg_root)[:2]:
        other = mirrored(file, tmp_path)
        maps = [asked_of_mmseg(file), asked_of_mmseg(other).flip(-1)]
        for path, flip in ((file, False), (other, True)):
            large = asked_of_mmseg(path, 'twice')
            large = F.interpolate(large[None], maps[0].shape[-2:], mode='bilinear')[0]
            maps.append(large.flip(-1) if flip else large)
        found = stored.map(stored.key(dict(img_path=str(file)))).float()
        expected = 255 * sum(maps) / 4
        torch.testing.assert_close(found, expected, rtol=0, atol=0.51)
