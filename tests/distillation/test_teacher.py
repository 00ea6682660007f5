"""The teacher: config, weights, images and classes, each with what can go wrong."""

from __future__ import annotations

import os
import pickle

import numpy as np
import pytest
import torch
from mmdet.models.data_preprocessors import DetDataPreprocessor
from mmengine.config import Config
from mmengine.logging import HistoryBuffer
from mmengine.registry import init_default_scope
from mmseg.models.data_preprocessor import SegDataPreProcessor
from torch import nn

from mmdist.distillation.teacher import (
    Renormalize,
    Teacher,
    load_checkpoint,
    load_config,
    load_strictly,
    match_classes,
)

RETINANET = 'mmdet::retinanet/retinanet_r18_fpn_1x_coco.py'


# ---- config ----------------------------------------------------------------------


def test_configs_are_taken_in_every_form(tmp_path):
    by_name = load_config(RETINANET)
    path = tmp_path / 'config.py'
    path.write_text(f'_base_ = {RETINANET!r}')
    for config in (path, str(path), by_name, Config.fromfile(path), by_name.model):
        assert load_config(config).model.backbone.depth == 18


def test_of_a_distillation_config_the_student_is_the_teacher(tmp_path):
    path = tmp_path / 'config.py'
    path.write_text(
        f"_base_ = {RETINANET!r}\nmodel = dict(_delete_=True, type='mmdist.Distiller',"
        ' student=_base_.model, teacher=dict(config="none.py"))'
    )
    assert load_config(path).model.type == 'RetinaNet'


# ---- weights ---------------------------------------------------------------------


def net(width: int = 3) -> nn.Sequential:
    return nn.Sequential(nn.Linear(2, width), nn.BatchNorm1d(width))


def test_weights_are_loaded_also_from_within_ddp():
    source, target = net(), net()
    state = {f'module.{k}': v for k, v in source.state_dict().items()}
    load_strictly(target, dict(state_dict=state), 'a.pth')
    for key, value in source.state_dict().items():
        assert torch.equal(target.state_dict()[key], value)


def test_every_key_that_does_not_fit_is_named():
    state = net(4).state_dict()
    state['stranger'] = state.pop('0.bias')
    with pytest.raises(RuntimeError) as error:
        load_strictly(net(), state, 'a.pth')
    message = str(error.value)
    assert '1 missing in the file:\n    0.bias' in message
    assert '1 in the file, but not in the model:\n    stranger' in message
    assert 'size mismatch for 0.weight' in message
    assert '`teacher.config`' in message


def test_at_most_ten_keys_of_a_sort_are_listed():
    state = {**net().state_dict(), **{f'x{i:02}': torch.ones(1) for i in range(12)}}
    with pytest.raises(RuntimeError, match=r'x09\n    \.\.\. and 2 more') as error:
        load_strictly(net(), state, 'a.pth')
    assert 'x10' not in str(error.value)


def test_no_checkpoint_is_an_error_unless_random_is_meant():
    with pytest.raises(ValueError, match='allow_random'):
        Teacher(RETINANET).load(nn.Linear(1, 1))


def test_a_missing_file_says_from_where_it_was_looked_for():
    with pytest.raises(FileNotFoundError, match='working directory'):
        load_checkpoint('no/such.pth')


@pytest.mark.parametrize('content', [b'', b'no checkpoint', b'PK\x03\x04 cut off'])
def test_a_damaged_file_says_so(tmp_path, content):
    path = tmp_path / 'damaged.pth'
    path.write_bytes(content)
    with pytest.raises(RuntimeError, match='damaged, cut off or no checkpoint'):
        load_checkpoint(str(path))


def test_a_truncated_checkpoint_says_so(tmp_path):
    path = tmp_path / 'cut.pth'
    torch.save(net().state_dict(), path)
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(RuntimeError, match='damaged, cut off or no checkpoint'):
        load_checkpoint(str(path))


class Exploit:
    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_code_in_a_checkpoint_is_not_run_unless_asked_for(tmp_path):
    path, trace = str(tmp_path / 'evil.pth'), tmp_path / 'ran'
    torch.save(dict(state_dict={}, meta=Exploit(str(trace))), path)
    with pytest.raises(RuntimeError, match=r'teacher\.weights_only=False'):
        load_checkpoint(path)
    assert not trace.exists()
    load_checkpoint(path, weights_only=False)
    assert trace.exists()


class AttributeThief:
    """Asks for an attribute that no checkpoint needs."""

    def __reduce__(self):
        return getattr, (HistoryBuffer, '__init__')


def test_of_getattr_only_the_history_buffers_methods_are_given_out(tmp_path):
    path = str(tmp_path / 'thief.pth')
    torch.save(dict(x=AttributeThief()), path)
    with pytest.raises((RuntimeError, pickle.UnpicklingError)):
        load_checkpoint(path)


def test_checkpoints_of_mmengine_are_read_safely(tmp_path):
    path = str(tmp_path / 'a.pth')
    history = HistoryBuffer([1.0, 2.0], [1, 1])
    torch.save(dict(message_hub=history, meta=np.float64(3.0)), path)
    read = load_checkpoint(path)
    assert read['message_hub'].mean() == 1.5
    assert read['meta'] == 3.0


# ---- images ----------------------------------------------------------------------


def reference(raw, mean, std, swap, pad_value, size):
    """What a data_preprocessor does to one image, in numpy."""
    image = raw[::-1] if swap else raw
    image = (image - np.reshape(mean, (-1, 1, 1))) / np.reshape(std, (-1, 1, 1))
    out = np.full((3, *size), float(pad_value))
    out[:, : image.shape[1], : image.shape[2]] = image
    return out


IMAGENET = dict(mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375])
CAFFE = dict(mean=[103.53, 116.28, 123.675], std=[1.0, 1.0, 1.0])


@pytest.mark.parametrize(
    ('student', 'teacher'),
    [
        (dict(**IMAGENET, bgr_to_rgb=True), dict(**CAFFE, pad_value=3)),
        (dict(), dict(**IMAGENET, bgr_to_rgb=True)),
        (dict(**CAFFE, pad_value=1), dict(mean=[0, 0, 0], std=[255, 255, 255])),
        (dict(**IMAGENET, pad_value=2), dict(**IMAGENET)),
    ],
)
def test_the_teacher_sees_what_its_own_preprocessor_would_give(student, teacher):
    rng = np.random.default_rng(0)
    raw = [rng.integers(0, 256, (3, h, w)) for h, w in ((32, 20), (24, 32))]

    def batch(**cfg):
        swap, pad = cfg.get('bgr_to_rgb', False), cfg.get('pad_value', 0)
        mean, std = cfg.get('mean', [0] * 3), cfg.get('std', [1] * 3)
        return np.stack([reference(r, mean, std, swap, pad, (32, 32)) for r in raw])

    renormalize = Renormalize(
        DetDataPreprocessor(**student), DetDataPreprocessor(**teacher)
    )
    inputs = torch.from_numpy(batch(**student)).float()
    before = inputs.clone()
    outputs = renormalize(inputs, [(32, 20), (24, 32)])
    np.testing.assert_allclose(outputs.numpy(), batch(**teacher), atol=2e-4)
    assert torch.equal(inputs, before)


def test_the_same_normalisation_costs_nothing_across_libraries():
    student = SegDataPreProcessor(**IMAGENET, bgr_to_rgb=True, size=(8, 8), pad_val=0)
    teacher = DetDataPreprocessor(**IMAGENET, bgr_to_rgb=True)
    inputs = torch.rand(1, 3, 8, 8)
    assert Renormalize(student, teacher)(inputs, [(4, 8)]) is inputs


# ---- classes ---------------------------------------------------------------------


def test_equal_classes_need_no_mapping():
    match = match_classes(('a', 'b'), ['a', 'b'])
    logits = torch.rand(2, 2)
    assert all(x is logits for x in match.select(logits, logits))


@pytest.mark.parametrize(
    ('student', 'teacher', 'columns_s', 'columns_t'),
    [
        ('abc', 'cab', [0, 1, 2], [1, 2, 0]),
        ('ca', 'abcd', [0, 1], [2, 0]),
        ('abcd', 'db', [1, 3], [1, 0]),
    ],
)
def test_another_order_or_a_subset_is_mapped_by_name(
    student, teacher, columns_s, columns_t
):
    match = match_classes(list(student), list(teacher))
    # a column holds the number of its class; the last one is the background
    logits_s = torch.tensor([[*map(ord, student), 0]])
    logits_t = torch.tensor([[*map(ord, teacher), 0]])
    selected_s, selected_t = match.select(logits_s, logits_t)
    assert selected_s.tolist() == [[*(ord(student[i]) for i in columns_s), 0]]
    assert torch.equal(selected_s, selected_t)
    assert selected_t.tolist() == [[*(ord(teacher[i]) for i in columns_t), 0]]


def test_other_names_are_mapped_by_class_map():
    match = match_classes(
        ['person', 'car'], ['auto', 'human'], {'person': 'human', 'car': 'auto'}
    )
    assert match.teacher == [1, 0]


def test_classes_that_cannot_be_matched_print_both_lists():
    with pytest.raises(ValueError) as error:
        match_classes(['cat', 'dog'], ['dog', 'cow'])
    for part in ("['cat', 'dog']", "['dog', 'cow']", "['cat']", "['cow']", 'class_map'):
        assert part in str(error.value)
    with pytest.raises(ValueError, match='cannot be matched'):
        match_classes(['cat'], ['dog'])


def test_a_class_map_with_unknown_names_is_an_error():
    with pytest.raises(ValueError, match=r"neither has \['bird'\]"):
        match_classes(['cat'], ['dog'], {'cat': 'bird'})


def test_unknown_names_pass():
    assert match_classes(None, ['a']).teacher is None


@pytest.fixture(autouse=True)
def _scope():
    init_default_scope('mmdet')
