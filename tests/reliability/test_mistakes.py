"""The mistakes of docs/reliability.md: `tools/train.py` prints a sentence for each."""

from __future__ import annotations

import re
import shutil

import cv2
import numpy as np
import pytest
import torch
from builders import distilled_text
from docs_blocks import ROOT

from tools import train as tools_train

DISTILL = "model['distill'] = dict(dist=dict(type='mmdist.SegLogits', loss=dict({})))"


def teacher(config: str | dict = 'teacher.py', **more: str | dict) -> str:
    """Config line with the teacher's arguments."""
    return f"model['teacher'] = dict(config={config!r}, **{more})"


def finished(config: str | None) -> str:
    """Code that leaves a run of a config in the work_dir."""
    return f"""
import torch
from pathlib import Path
Path('work').mkdir()
torch.save(
    dict(meta=dict(cfg={config!r}), message_hub={{}}, state_dict={{}}),
    'work/iter_4.pth')
del torch, Path
"""


# Changes to a working pair, by what is wrong: lines at its end, words of the student's
# config and others in their place, or a function of its label maps.
OF_SEGMENTORS = {
    'An argument of `teacher` is misspelt': teacher(chekpoint='teacher.pth'),
    'An argument of a loss is misspelt': DISTILL.format(
        "type='mmdist.DISTLoss', betta=1"
    ),
    'A loss without its prefix': DISTILL.format("type='DISTLoss'"),
    'A text where a number belongs': DISTILL.format("type='mmdist.DISTLoss', beta='1'"),
    '`Distiller` without its prefix': "model['type'] = 'Distiller'",
    "An argument of the student's own is misspelt": (
        "model['student']['decode_head']['chanels'] = 8"
    ),
    'A comparison is misspelt': (
        "model['distill'] = dict(dist=dict(type='mmdist.SegLogit'))"
    ),
    '`distill` without a name for its entry': (
        "model['distill'] = dict(type='mmdist.SegLogits')"
    ),
    '`distil=` beside `teacher=`': "model['distil'] = dict()",
    'An argument of the schedule is misspelt': (
        "custom_hooks = [dict(type='mmdist.DistillScheduleHook', point=[(0, 1)])]"
    ),
    'A hook without its prefix': "custom_hooks = [dict(type='IterSeedHook')]",
    'A schedule that begins after the training has ended': (
        "custom_hooks = [dict(type='mmdist.DistillScheduleHook', points=[(9, 0.), "
        '(10, 1.)])]'
    ),
    "The teacher's config does not exist": teacher('taecher.py'),
    "The teacher's config is no valid Python": teacher('broken.py'),
    'A teacher of another library is misspelt': teacher(
        dict(type='mmdist.HFSegmenter', name='hub')
    ),
    'The teacher has no checkpoint': teacher(),
    'The checkpoint does not exist': teacher(checkpoint='nowhere.pth'),
    'The checkpoint is some other file, or cut off': teacher(checkpoint='teacher.py'),
    'The checkpoint belongs to another model': teacher(checkpoint='other.pth'),
    'Student and teacher have other class names': (
        "('sky', 'road', 'tree')",
        "('cat', 'dog', 'cow')",
    ),
    '`class_map` names a class that is not there': teacher(
        allow_random='True', class_map=dict(sly='sky')
    ),
    'Classes without an order': ("('sky', 'road', 'tree')", "{'sky'}"),
    'The data set loads no labels': (
        "dict(type='LoadAnnotations'),\n        dict(type='RandomFlip'",
        "dict(type='RandomFlip'",
    ),
    'Label maps of Cityscapes with its own ids (labelIds)': lambda label: np.where(
        label == 2, 33, label
    ),
    'Label maps with colours': lambda label: np.stack([label] * 3, 2),
    '`num_classes` is not that of the data': ('num_classes=3', 'num_classes=2'),
    'Classes of validation in another order': (
        "val_dataloader = dict(dataset=dict(metainfo=dict(classes=('tree', 'sky', "
        "'road'))))"
    ),
    '`load_from` is no checkpoint': "load_from = 'broken.py'",
    'The work_dir holds a run of another config': finished('optim_wrapper = 1'),
    'The work_dir holds a run of this config, and `--resume` is missing': finished(
        None
    ),
    'The training diverges': 'optim_wrapper = dict(optimizer=dict(lr=1e30))',
}
OF_DETECTORS = {
    'A class is misspelt': ("'car'", "'caar'"),
    'The data set has none of the classes that it names': (
        "classes=('person', 'car', 'dog'))",
        "classes=('cat', 'cow', 'pig')), filter_cfg=dict(filter_empty_gt=True)",
    ),
    "Classes in another order than in COCO's file": (
        "('person', 'car'",
        "('car', 'person'",
    ),
}


def rows() -> list[tuple[str, str]]:
    """What is wrong, and the message; in it, `...` stands for a value or more words."""
    page = (ROOT / 'docs' / 'reliability.md').read_text()
    (section,) = re.findall(r'^## Mistakes\n(.*?)^## ', page, re.M | re.S)
    _, _, *found = re.findall(r'^\| (.*) \| (.*) \|$', section, re.M)
    assert {words for words, _ in found} == OF_SEGMENTORS.keys() | OF_DETECTORS.keys()
    return found


@pytest.mark.parametrize(('words', 'says'), rows())
def test_it_ends_in_a_sentence(words, says, request, tmp_path, monkeypatch):
    family = 'det' if words in OF_DETECTORS else 'seg'
    text = request.getfixturevalue(f'{family}_config')
    more, change = '', (OF_SEGMENTORS | OF_DETECTORS)[words]
    (tmp_path / 'teacher.py').write_text(text)
    (tmp_path / 'broken.py').write_text('model = dict(')
    torch.save(torch.nn.Linear(1, 1).state_dict(), tmp_path / 'other.pth')
    if isinstance(change, str):
        more = change
    elif isinstance(change, tuple):
        assert change[0] in text
        text = text.replace(*change)
    else:
        root = request.getfixturevalue('seg_root')
        own = shutil.copytree(root, tmp_path / 'own')
        for file in (own / 'labels').iterdir():
            cv2.imwrite(str(file), change(cv2.imread(str(file), 0)))
        text = text.replace(str(root), str(own))
    (tmp_path / 'student.py').write_text(text)
    pair = distilled_text(more, config='teacher.py', allow_random=True)
    config = tmp_path / f'pair_{tmp_path.name}.py'  # mmengine names loggers by it
    config.write_text(pair)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr('sys.argv', ['train.py', str(config), '--work-dir', 'work'])
    with pytest.raises(SystemExit) as stop:
        tools_train.main()
    parts = [re.escape(part.strip()) for part in says.split('...')]
    assert re.search('.*'.join(parts), str(stop.value), re.S), stop.value
    assert len(str(stop.value)) < 900
