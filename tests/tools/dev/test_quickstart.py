"""The quickstart: the order of its parts, and a dry run of all of it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tools.dev.quickstart.__main__ import finished_of, next_part
from tools.dev.quickstart.tasks import PARTS, ROOT, TASKS, Part


def run(cwd: Path) -> str:
    command = [sys.executable, '-m', 'tools.dev.quickstart', '--smoke']
    env = {**os.environ, 'PYTHONPATH': str(ROOT)}
    done = subprocess.run(
        command, cwd=cwd, env=env, check=True, capture_output=True, text=True
    )
    assert not done.stderr  # the libraries' warnings are in the log
    return done.stdout


def test_a_distilled_student_waits_for_its_own_teacher():
    det, seg = (Part(task, 'teacher', 0) for task in TASKS)
    det_dist, seg_dist = (Part(task, 'student + DIST', 1) for task in TASKS)
    alone = Part(TASKS[0], 'student alone', 1)
    assert next_part([det, seg, det_dist], []) == det
    assert next_part([seg, det_dist], [det]) == seg
    assert next_part([det_dist, seg_dist], [det]) == seg_dist
    assert next_part([det_dist, seg_dist, alone], [det, seg]) == alone
    assert next_part([det_dist, seg_dist], [det, seg]) is None


def test_a_task_is_reported_as_soon_as_it_lacks_nothing_but_kl():
    det, seg = TASKS
    kl, alone = Part(det, 'student + KL', 0), Part(seg, 'student alone', 1)
    assert finished_of([kl, alone]) == {
        det: ['teacher', 'student alone', 'student + DIST']
    }
    assert finished_of([kl])[seg] == list(PARTS)
    assert finished_of([]) == {det: list(PARTS), seg: list(PARTS)}


@pytest.mark.slow
def test_dry_run(tmp_path):
    output = run(tmp_path)
    work_dir = tmp_path / 'work_dirs' / 'quickstart'
    assert 'Warning' in (work_dir / 'quickstart.log').read_text()
    progress, _, _ = output.partition('\n\n')
    # the first result waits neither for the other task nor for KL
    first, both = re.finditer(
        r'^\[quickstart\] .* report\.png: (.*), KL follows\n', progress, re.M
    )
    assert (first[1], both[1]) == ('seg', 'det and seg')
    assert 'seg + DIST: mIoU' in progress[: first.start()]
    assert 'det + DIST: AP' not in progress[: first.start()]
    assert 'seg + KL: mIoU' not in progress[: both.start()]
    for line in (first, both):
        progress = progress.replace(line.group(), '')
    steps = re.findall(r'^\[quickstart\] (\d+)/10 .*; \d+:\d\d', progress, re.M)
    assert len(steps) == progress.count('\n') + 1
    assert set(map(int, steps)) >= set(range(1, 11))
    assert 'mmengine' not in output
    rows = [line for line in output.splitlines() if line.startswith(('| det', '| seg'))]
    assert len(rows) == 8
    assert all(row in (work_dir / 'report.md').read_text() for row in rows)
    assert (work_dir / 'report.png').read_bytes()[:4] == b'\x89PNG'
    for task in ('det', 'seg'):
        metrics = {
            name.split('_')[0] if '-' in name else name: json.loads(
                (work_dir / name / 'metrics.json').read_text()
            )
            for name in (p.parent.name for p in work_dir.glob('*/metrics.json'))
            if ('retinanet' in name) == (task == 'det')
        }
        assert len(metrics) == 4
        # Only DIST logs correlations; a distilled student is as large as a plain one.
        assert {n for n, m in metrics.items() if 'inter' in m} == {'dist'}
        sizes = sorted(m['parameters'] for m in metrics.values())
        assert sizes[0] == sizes[1] == sizes[2] < sizes[3] / 3

    # The printed command runs the distilled student on an image.
    for command in (li for li in output.splitlines() if ' -c "from mm' in li):
        subprocess.run(command, shell=True, cwd=tmp_path, check=True)
    assert list((work_dir / 'demo').rglob('*.png'))

    # Finished parts are skipped; a part without a metrics file runs again.
    (work_dir / 'retinanet_w16_digits' / 'metrics.json').unlink()
    again = run(tmp_path)
    assert again.count('finished before') == 7
    assert [line for line in again.splitlines() if line.startswith('| seg')] == rows[4:]
