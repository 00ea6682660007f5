"""docs/stored_teachers.md, run word for word: store, train, and a COCO results file."""

from __future__ import annotations

import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
from builders import distilled_text
from docs_blocks import ROOT, blocks
from processes import run_script
from test_store_teacher import write_teacher
from tiny import DET_CLASSES, DET_CONFIG, TINY_RETINANET

from mmdist.teachers.store import Store
from tools.logs import read_log

PAGE = 'docs/stored_teachers.md'


@pytest.fixture
def data(tmp_path, coco_root) -> Path:
    """A detector, a student and a pair, with data laid out as the page says."""
    coco = tmp_path / 'data/coco'
    (coco / 'annotations').mkdir(parents=True)
    annotations = coco / 'annotations/instances_train2017.json'
    shutil.copy(coco_root / 'train.json', annotations)
    shutil.copytree(coco_root / 'images', coco / 'train2017')
    text = DET_CONFIG.format(
        model=TINY_RETINANET, classes=DET_CLASSES, data_root='data/coco'
    )
    text = text.replace('train.json', 'annotations/instances_train2017.json')
    text = text.replace('images/', 'train2017/')
    for name in ('my_detector', 'student'):
        write_teacher(tmp_path, text, name)
    pair = distilled_text(config='my_detector.py', checkpoint='my_detector.pth')
    (tmp_path / 'my_pair.py').write_text(pair)
    return tmp_path


@pytest.mark.slow
def test_the_page_word_by_word(data):
    for block in blocks(PAGE, 'python'):
        assert block.file
        (data / block.file).write_text(block.code)
    lines = '\n'.join(block.code for block in blocks(PAGE, 'shell')).splitlines()
    commands = [shlex.split(line) for line in lines if line.startswith('python')]
    commands.append(['python', 'tools/train.py', 'from_results.py'])
    folder = data / 'work_dirs'
    for _, tool, *args in commands:
        ran = run_script(ROOT / tool, *args, cwd=data)
        assert ran.returncode == 0, ran.stdout
        if '--out' in args:
            assert ' '.join(ran.stdout.split()).endswith(
                f"teacher=dict(stored='{args[args.index('--out') + 1]}') "
                "custom_hooks = [dict(type='mmdist.StoredTeacherHook')]"
            )
    stored, results = Store(folder / 'teacher'), Store(folder / 'answers.bbox.json')
    results.name_classes(dict(enumerate(DET_CLASSES, 1)))
    for i in range(1, 5):
        expected = stored.answer(dict(img_path=f'data/coco/train2017/{i}.png'))
        found = results.answer(dict(img_id=i))
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-4)
    logs = [read_log(folder / name) for name in ('stored', 'from_results')]
    intra = [
        [entry['dist_intra'] for entry in log if 'dist_intra' in entry] for log in logs
    ]
    assert len(intra[0]) > 1
    assert all(intra[0])
    np.testing.assert_allclose(*intra, rtol=1e-3, atol=1e-5)
