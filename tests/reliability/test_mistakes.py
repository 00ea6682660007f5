"""The mistakes of docs/reliability.md: `tools/train.py` prints a sentence for each."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from typing import NamedTuple

import cv2
import numpy as np
import pytest
import torch
from builders import distilled_text
from docs_blocks import ROOT
from mmengine.config import config as mmengine_config

from tools import train as tools_train


class Mistake(NamedTuple):
    """A row of the table, and the change to a working pair that causes it."""

    words: str
    says: str  # `...` stands for a value or more words
    change: str | tuple[str, str] | Callable  # to the pair, student, label maps
    family: str = 'seg'


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


MISTAKES = [
    Mistake(
        'An argument of `teacher` is misspelt',
        "`teacher`: unknown argument 'chekpoint'. Did you mean 'checkpoint'?",
        teacher(chekpoint='teacher.pth'),
    ),
    Mistake(
        'An argument of a loss is misspelt',
        "`distill.dist.loss`: unknown argument 'betta'. Did you mean 'beta'?",
        DISTILL.format("type='mmdist.DISTLoss', betta=1"),
    ),
    Mistake(
        'A loss without its prefix',
        "`distill.dist.loss` has the unknown loss type 'DISTLoss'. Did you mean "
        "'mmdist.DISTLoss'?",
        DISTILL.format("type='DISTLoss'"),
    ),
    Mistake(
        'A text where a number belongs',
        "`distill.dist.loss`: 'beta' must be a number, got '1'",
        DISTILL.format("type='mmdist.DISTLoss', beta='1'"),
    ),
    Mistake(
        '`Distiller` without its prefix',
        "No model is called 'Distiller'. Did you mean 'mmdist.Distiller'?",
        "model['type'] = 'Distiller'",
    ),
    Mistake(
        "An argument of the student's own is misspelt",
        "`PSPHead`: unknown argument 'chanels'. Did you mean 'channels'?",
        "model['student']['decode_head']['chanels'] = 8",
    ),
    Mistake(
        'A comparison is misspelt',
        "`distill.dist` has the unknown comparison type 'mmdist.SegLogit'. Did you "
        "mean 'mmdist.SegLogits'?",
        "model['distill'] = dict(dist=dict(type='mmdist.SegLogit'))",
    ),
    Mistake(
        '`distill` without a name for its entry',
        '`distill` must be a dict of name -> config',
        "model['distill'] = dict(type='mmdist.SegLogits')",
    ),
    Mistake(
        '`distil=` beside `teacher=`',
        "neither mmdist.Distiller nor EncoderDecoder has an argument 'distil'. Did you "
        "mean 'distill'?",
        "model['distil'] = dict()",
    ),
    Mistake(
        'An argument of the schedule is misspelt',
        "unknown argument 'point'. Did you mean 'points'?",
        "custom_hooks = [dict(type='mmdist.DistillScheduleHook', point=[(0, 1)])]",
    ),
    Mistake(
        'A hook without its prefix',
        "No hook is called 'IterSeedHook'. Did you mean 'mmdist.IterSeedHook'?",
        "custom_hooks = [dict(type='IterSeedHook')]",
    ),
    Mistake(
        'A schedule that begins after the training has ended',
        'DistillScheduleHook leaves the weight of distillation at 0 for all of the ...',
        "custom_hooks = [dict(type='mmdist.DistillScheduleHook', points=[(9, 0.), "
        '(10, 1.)])]',
    ),
    Mistake(
        "The teacher's config does not exist",
        "`teacher.config` is 'taecher.py', but ... similar: teacher.py",
        teacher('taecher.py'),
    ),
    Mistake(
        "The teacher's config is no valid Python",
        "`teacher.config` is 'broken.py', which cannot be read: SyntaxError",
        teacher('broken.py'),
    ),
    Mistake(
        'A teacher of another library is misspelt',
        "No model is called 'mmdist.HFSegmenter'. Did you mean 'mmdist.HFSegmentor'?",
        teacher(dict(type='mmdist.HFSegmenter', name='hub')),
    ),
    Mistake(
        'The teacher has no checkpoint',
        'The teacher has no checkpoint. Give `teacher.checkpoint`',
        teacher(),
    ),
    Mistake(
        'The checkpoint does not exist',
        "The checkpoint 'nowhere.pth' does not exist. Relative paths start at",
        teacher(checkpoint='nowhere.pth'),
    ),
    Mistake(
        'The checkpoint is some other file, or cut off',
        'cannot be read: it is damaged, truncated or not a checkpoint',
        teacher(checkpoint='teacher.py'),
    ),
    Mistake(
        'The checkpoint belongs to another model',
        "The weights in 'other.pth' do not fit ... missing in the file",
        teacher(checkpoint='other.pth'),
    ),
    Mistake(
        'Student and teacher have other class names',
        'The classes of student and teacher cannot be matched by name',
        ("('sky', 'road', 'tree')", "('cat', 'dog', 'cow')"),
    ),
    Mistake(
        '`class_map` names a class that is not there',
        "`teacher.class_map` maps ... but the student has no class ['sly']",
        teacher(allow_random='True', class_map=dict(sly='sky')),
    ),
    Mistake(
        'Classes without an order',
        'the `classes` of a data set must be a list of names, in the order of the '
        "labels, got {'sky'}",
        ("('sky', 'road', 'tree')", "{'sky'}"),
    ),
    Mistake(
        'The data set loads no labels',
        'has no labels. Add LoadAnnotations to the `pipeline`',
        (
            "dict(type='LoadAnnotations'),\n        dict(type='RandomFlip'",
            "dict(type='RandomFlip'",
        ),
    ),
    Mistake(
        'Label maps of Cityscapes with its own ids (labelIds)',
        'The labels contain 33 ... but the student has 3 classes ... labels must be 0 '
        'to 2, or 255 for void',
        lambda label: np.where(label == 2, 33, label),
    ),
    Mistake(
        'Label maps with colours',
        'has several channels ... convert colours to indices',
        lambda label: np.stack([label] * 3, 2),
    ),
    Mistake(
        '`num_classes` is not that of the data',
        "The student's data set names 3 classes (sky, road, tree), but its "
        '`decode_head` has num_classes=2',
        ('num_classes=3', 'num_classes=2'),
    ),
    Mistake(
        'A class is misspelt',
        "train_dataloader's data set names person, caar, dog, but ... it has no class "
        'caar',
        ("'car'", "'caar'"),
        'det',
    ),
    Mistake(
        'The data set has none of the classes that it names',
        "train_dataloader's data set names cat, cow, pig, but ... it has no class cat, "
        'cow, pig',
        (
            "classes=('person', 'car', 'dog'))",
            "classes=('cat', 'cow', 'pig')), filter_cfg=dict(filter_empty_gt=True)",
        ),
        'det',
    ),
    Mistake(
        "Classes in another order than in COCO's file",
        'in another order. mmdet numbers classes in the order of the file',
        ("('person', 'car'", "('car', 'person'"),
        'det',
    ),
    Mistake(
        'Classes of validation in another order',
        '`val_dataloader` names the classes of `train_dataloader` in another order',
        "val_dataloader = dict(dataset=dict(metainfo=dict(classes=('tree', 'sky', "
        "'road'))))",
    ),
    Mistake(
        '`load_from` is no checkpoint',
        "The checkpoint 'broken.py' cannot be read: it is damaged, truncated or not a",
        "load_from = 'broken.py'",
    ),
    Mistake(
        'The work_dir holds a run of another config',
        "'work/iter_4.pth' was trained with another config (these differ: ... and its "
        'run would be mixed with this one or overwritten',
        finished('optim_wrapper = 1'),
    ),
    Mistake(
        'The work_dir holds a run of this config, and `--resume` is missing',
        "'work/iter_4.pth' was trained with this config, and its run would be mixed "
        'with this one or overwritten',
        finished(None),
    ),
    Mistake(
        'The training diverges',
        'The training was stopped: ... became NaN or infinite in iteration ... '
        'Try a smaller learning rate',
        'optim_wrapper = dict(optimizer=dict(lr=1e30))',
    ),
]


@pytest.mark.parametrize('mistake', MISTAKES, ids=lambda mistake: mistake.words)
def test_it_ends_in_a_sentence(mistake, request, tmp_path, monkeypatch):
    text = request.getfixturevalue(f'{mistake.family}_config')
    more, change = '', mistake.change
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
    # formatting the config that a Runner writes takes a second
    monkeypatch.setattr(mmengine_config, 'FormatCode', lambda text, **_: (text, True))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr('sys.argv', ['train.py', str(config), '--work-dir', 'work'])
    with pytest.raises(SystemExit) as stop:
        tools_train.main()
    parts = [re.escape(part.strip()) for part in mistake.says.split('...')]
    assert re.search('.*'.join(parts), str(stop.value), re.S), stop.value
    assert len(str(stop.value)) < 900


def test_the_table_of_the_page_has_them_all():
    page = (ROOT / 'docs' / 'reliability.md').read_text()
    (section,) = re.findall(r'^## Mistakes\n(.*?)^## ', page, re.M | re.S)
    _, _, *rows = re.findall(r'^\| (.*) \| (.*) \|$', section, re.M)
    assert rows == [(mistake.words, mistake.says) for mistake in MISTAKES]
