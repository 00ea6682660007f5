"""The study: its tables, its grid, and cells that are skipped, resumed or redone."""

from __future__ import annotations

import json
import multiprocessing
import shutil
import threading
import time
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
import torch
from builders import slow
from det_zoo import batch
from mmengine.config import Config
from mmengine.registry import DefaultScope
from segmentors import make_batch

from mmdist.registry import MODELS
from study import __main__ as command
from study import grid, report, runs
from tools.logs import read_log

# ---- the tables ----------------------------------------------------------------


def row(method: str, teacher: str, seed: int, score: float, **more) -> dict:
    cell = grid.Cell('small', 'camvid', method, teacher, seed)
    return {
        **cell._asdict(), 'score': score, 'parameters': 2e6, 'seconds': 100, **more,
    }  # fmt: skip


def test_page_holds_the_tables_and_keeps_what_is_around_them(tmp_path):
    alone, ours, theirs = (41.0, 42.0, 40.0), (43.0, 45.0, 41.0), (42.0, 41.5, 41.0)
    rows = [row('teacher', 'strong', 0, 48.0, test=45.0)]
    rows += [row('alone', '', 0, 1.0)]  # trained again below
    for seed in range(3):
        rows.append(row('alone', '', seed, alone[seed], test=alone[seed] - 3))
        rows.append(row('default', 'strong', seed, ours[seed], test=ours[seed] - 4))
        rows.append(row('published', 'strong', seed, theirs[seed]))
        rows.append(row('stored', 'strong', seed, 47.0))
    (tmp_path / 'results.jsonl').write_text(''.join(json.dumps(r) + '\n' for r in rows))
    page = tmp_path / 'results.md'
    page.write_text(f'# By hand\n\n{report.BEGIN}old\n{report.END}\nmore by hand\n')
    report.write_up(tmp_path)
    text = page.read_text()
    assert text.startswith('# By hand\n')
    assert text.endswith('\nmore by hand\n')
    assert 'old' not in text

    def cells(start: str) -> list[str]:
        (line,) = (line for line in text.splitlines() if line.startswith(start))
        return [cell.strip() for cell in line.split('|')[1:-1]]

    def expected(a, b) -> str:
        low, high = scipy.stats.ttest_rel(a, b).confidence_interval(0.95)
        return f'{np.mean(np.subtract(a, b)):+.2f} [{low:+.2f}, {high:+.2f}]'

    assert cells('| default') == [
        'default', '3', '43.00 ± 2.00', expected(ours, alone), '29%',
        expected(ours, theirs), '2', '39.00 ± 2.00',
        expected(np.subtract(ours, 4), np.subtract(alone, 3)),
    ]  # fmt: skip
    assert cells('| teacher') == ['teacher', '1', '48.00', *[''] * 3, '2', '45.00', '']
    assert cells('| alone')[:6] == ['alone', '3', '41.00 ± 1.00', *[''] * 3]
    gain = expected(theirs, alone)
    assert cells('| published')[3:] == [gain, '7%', '', '2', '-', '-']
    assert cells('| stored')[4] == ''  # their teachers' score is not in the table
    assert (tmp_path / 'results.png').read_bytes()[:4] == b'\x89PNG'
    report.write_up(tmp_path)
    assert page.read_text() == text


# ---- the grid --------------------------------------------------------------------


def test_grid_trains_a_teacher_before_its_students_and_seed_by_seed():
    methods, tasks = ['alone', 'default'], ['bccd-retinanet']
    cells = grid.grid('small', tasks, methods, ['strong', 'other'], [0, 1])
    assert [str(cell.folder.relative_to('small')) for cell in dict.fromkeys(cells)] == [
        'bccd-retinanet/alone_seed0',
        'bccd-retinanet/teacher_strong_seed0',
        'bccd-retinanet/default_strong_seed0',
        'bccd-retinanet/alone_seed1',
        'bccd-retinanet/default_strong_seed1',
        'bccd-faster-rcnn/teacher_strong_seed0',
        'bccd-retinanet/default_other_seed0',
        'bccd-retinanet/default_other_seed1',
    ]


def test_answers_of_all_teachers_or_of_one_are_stored():
    methods, teachers = ['stored', 'stored-once'], ['strong', 'other']
    cells = grid.grid('small', ['bccd-retinanet'], methods, teachers, [0])
    assert [str(cell.folder.relative_to('small')) for cell in cells] == [
        'bccd-faster-rcnn/teacher_strong_seed0',
        'bccd-retinanet/teacher_strong_seed0',
        'bccd-dino/teacher_strong_seed0',
        'bccd-retinanet/stored_strong_seed0',
        'bccd-retinanet/teacher_strong_seed0',
        'bccd-retinanet/stored-once_strong_seed0',
        'bccd-faster-rcnn/teacher_strong_seed0',
        'bccd-retinanet/stored-once_other_seed0',
    ]
    full = grid.Cell('full', 'bccd-retinanet', 'stored', 'strong', 0).its_teachers
    assert [cell.task for cell in full] == ['bccd-faster-rcnn', 'bccd-retinanet']


def test_kl_on_detections_has_a_weight_of_its_own():
    for teacher, kind, weight in (
        ('strong', 'mmdist.DenseLogits', 100.0),
        ('other', 'mmdist.Detections', 1.0),
    ):
        (kl,) = grid.TASKS['bccd-retinanet'].changes('kl', teacher)['distill'].values()
        loss = dict(type='mmdist.BinaryKLDivLoss', loss_weight=weight)
        assert kl == dict(type=kind, loss=loss)


def test_teachers_that_no_task_has_are_refused(tmp_path):
    with pytest.raises(SystemExit, match=r"\['camvid'\] have no teacher of \['other'"):
        command.main(
            f'--tasks camvid --teachers other --data-root {tmp_path} '
            f'--out {tmp_path}'.split()
        )


@pytest.mark.parametrize('task', grid.TASKS)
def test_each_cell_has_settings_of_its_own(task, tmp_path):
    study = runs.Study(tmp_path, tmp_path)
    cells = dict.fromkeys(
        grid.grid('small', [task], grid.METHODS, grid.TEACHERS, [0, 1])
    )
    assert len({study.fingerprint(cell) for cell in cells}) == len(cells)


@pytest.mark.parametrize('task', ['camvid', 'bccd-retinanet'])
def test_students_without_labels_read_none(task, tmp_path):
    study = runs.Study(tmp_path, tmp_path)
    usual, loader = (
        Config(
            study.settings(grid.Cell('small', task, m, 'strong', 0)).to_dict()
        ).train_dataloader
        for m in ('default', 'no-labels')
    )
    assert loader.sampler == usual.sampler
    bare = loader.dataset
    kinds = [transform.type for transform in bare.pipeline]
    assert 'LoadAnnotations' not in kinds and kinds[-1] == 'mmdist.MarkUnlabelled'
    assert 'cat_max_ratio' not in str(bare.pipeline)


@pytest.mark.parametrize('scale', ['small', 'full'])
@pytest.mark.parametrize('task', ['camvid', 'bccd-retinanet', 'bccd-faster-rcnn'])
def test_student_is_smaller_than_its_teacher(task, scale):
    def size(method: str) -> int:
        cfg = Config.fromfile(grid.Cell(scale, task, method, '', 0).config)
        scope = DefaultScope.overwrite_default_scope(cfg.default_scope)
        with scope, torch.device('meta'):
            model = MODELS.build(deepcopy(cfg.model))
        return sum(p.numel() for p in model.parameters())

    assert size('alone') <= size('teacher') / (4 if scale == 'small' else 1)


@pytest.mark.parametrize(
    'task', ['camvid', *slow(['bccd-retinanet', 'bccd-faster-rcnn', 'bccd-dino'])]
)
def test_every_method_has_a_loss_with_a_gradient(task, tmp_path):
    study = runs.Study(tmp_path, tmp_path)
    added = {}
    for method in set(grid.METHODS) - {'alone', *runs.VIEWS}:
        cell = grid.Cell('small', task, method, 'strong', 0)
        cfg = study.settings(cell)
        teacher = study.settings(*cell.its_teachers)
        for side in (cfg.model.student, teacher.model):
            side.backbone.init_cfg = None
        cfg.model.teacher = dict(config=teacher, checkpoint=None, allow_random=True)
        torch.manual_seed(0)
        with DefaultScope.overwrite_default_scope(cfg.default_scope):
            model = MODELS.build(cfg.model).train()
            model.init_weights()  # DINO's constructor leaves memory uninitialised
            model.balance = None  # balancing leaves no gradient in the first step
            size = 96, 128
            data = (
                make_batch(11, size) if task == 'camvid' else batch(model, (size,) * 2)
            )
            losses = model.loss(**data)
        kinds = ('kl', 'dist', 'box')
        ours = {k: v for k, v in losses.items() if k.removeprefix('loss_') in kinds}
        added[method] = ' '.join(sorted(ours))
        total = sum(sum(v) if isinstance(v, list) else v for v in ours.values())
        total.backward()
        assert 0 < total.item() < 1e4
        # every comparison reaches the backbone
        gradient = model.backbone.conv1.conv.weight.grad
        assert gradient is not None and gradient.isfinite().all() and gradient.any()
    has_boxes = task in ('bccd-retinanet', 'bccd-faster-rcnn')
    default = 'loss_box loss_dist' if has_boxes else 'loss_dist'
    assert added == {
        'kl': 'loss_kl',
        **dict.fromkeys(('published', 'inter', 'intra'), 'loss_dist'),
        **dict.fromkeys(('default', 'no-labels'), default),
    }


# ---- cells -----------------------------------------------------------------------


@pytest.fixture
def tiny(tmp_path, monkeypatch, seg_config) -> Path:
    """The config folder of a study with one tiny task: three classes, 4 steps."""
    folder = tmp_path / 'configs' / 'tiny'
    folder.mkdir(parents=True)
    for part in ('student', 'teacher'):
        (folder / f'{part}.py').write_text(seg_config)
    monkeypatch.setattr(grid, 'CONFIGS', folder.parent)
    monkeypatch.setitem(grid.TASKS, 'tiny', grid.TASKS['camvid'])
    monkeypatch.chdir(tmp_path)
    return folder


def main(*arguments: str) -> None:
    command.main(
        ['--tasks', 'tiny', '--seeds', '0', '--data-root', '.', '--work-dir', 'work',
         '--out', 'out', *arguments]
    )  # fmt: skip


@pytest.mark.slow
def test_whole_study_and_again(tiny, capsys, monkeypatch):
    """Trained once, tested, then skipped, and trained again if a setting changes."""
    main('--methods', 'alone', 'default', '--test')
    rows = [json.loads(li) for li in Path('out/results.jsonl').read_text().splitlines()]
    assert [r['method'] for r in rows] == ['alone', 'teacher', 'default']
    assert all(0 <= r['score'] <= 100 and 0 <= r['test'] <= 100 for r in rows)
    # Val and test are the same images here, and mmseg rounds to two digits.
    assert all(abs(r['score'] - r['test']) < 0.011 for r in rows)
    assert rows[0]['parameters'] == rows[2]['parameters']
    assert -1 <= rows[2]['inter'] <= 1 and 'inter' not in rows[0]
    assert rows[2]['teacher_score'] == rows[1]['score']
    assert not any('teacher_score' in r for r in rows[:2])
    made = Path('work/small/tiny/default_strong_seed0')
    assert Config.fromfile(made / 'config.py').model.teacher.checkpoint == str(
        Path('work/small/tiny/teacher_strong_seed0/iter_4.pth').resolve()
    )
    page = Path('out/results.md').read_text()
    assert '| default | 1 |' in page

    calls = []
    monkeypatch.setattr(runs, 'run', lambda *a: calls.append(a))
    main('--methods', 'alone', 'default', '--test')
    assert calls == []
    assert len(Path('out/results.jsonl').read_text().splitlines()) == 3
    assert Path('out/results.md').read_text() == page

    # Another teacher: it and its student are outdated, the student alone is not.
    with (tiny / 'teacher.py').open('a') as file:
        file.write('optim_wrapper = dict(optimizer=dict(lr=0.001))\n')
    runs.read_config.cache_clear()  # as in another process
    main('--methods', 'alone', 'default')
    assert [Path(a[1][0]).parent.name for a in calls] == ['teacher_strong_seed0']
    assert not list(Path('work/small/tiny/teacher_strong_seed0').glob('*.pth'))


@pytest.mark.slow
def test_students_of_stored_answers_and_without_labels(tiny, monkeypatch):
    shutil.copytree(tiny, tiny.with_name('tiny-2'))
    task = replace(grid.TASKS['tiny'], fused=('tiny', 'tiny-2'))
    monkeypatch.setitem(grid.TASKS, 'tiny', task)
    monkeypatch.setitem(grid.TASKS, 'tiny-2', task)
    main('--methods', 'stored', 'stored-once', 'no-labels')
    rows = [json.loads(li) for li in Path('out/results.jsonl').read_text().splitlines()]
    methods = ['teacher', 'teacher', 'stored', 'stored-once', 'no-labels']
    assert [r['method'] for r in rows] == methods
    assert all(-1 <= r['inter'] <= 1 for r in rows[2:])
    made = Path('work/small/tiny')
    all_views = {(x, flip) for x in (0.75, 1.0, 1.25) for flip in (False, True)}
    for method, tasks, views in (
        ('stored', ['tiny', 'tiny-2'], all_views),
        ('stored-once', ['tiny'], {(1.0, False)}),
    ):
        config = Config.fromfile(made / f'{method}_strong_seed0' / 'config.py')
        assert set(config.model.teacher) == {'stored'}
        file = Path(config.model.teacher.stored) / 'manifest.json'
        asked = json.loads(file.read_text())['teachers']
        assert [Path(x['checkpoint']).parts[-3:] for x in asked] == [
            (task, 'teacher_strong_seed0', 'iter_4.pth') for task in tasks
        ]
        assert all(set(map(tuple, x['views'])) == views for x in asked)
    own = {
        key
        for entry in read_log(made / 'no-labels_strong_seed0')
        for key in entry
        if key.startswith('decode.loss') and entry[key]
    }
    assert own == set()


@pytest.mark.slow
def test_killed_cell_goes_on_where_it_was(tiny):
    for path in tiny.glob('*.py'):
        with path.open('a') as file:
            file.write('train_cfg = dict(max_iters=40, val_interval=40)\n')
    folder = Path('work/small/tiny/alone_seed0')
    others = set(multiprocessing.active_children())  # of other tests

    def kill() -> None:
        while not (folder / 'iter_4.pth').exists():  # so iter_2.pth is whole
            time.sleep(0.01)
        (process,) = set(multiprocessing.active_children()) - others
        process.kill()

    thread = threading.Thread(target=kill)
    thread.start()
    with pytest.raises(SystemExit, match='run this again'):
        main('--methods', 'alone')
    thread.join()
    before = read_log(folder)
    assert 0 < before[-1]['step'] < 40
    assert not (folder / 'metrics.json').exists()

    main('--methods', 'alone')
    log = sorted(folder.glob('*/vis_data/scalars.json'))[-1]
    steps = [json.loads(line)['step'] for line in log.read_text().splitlines()]
    assert 2 < steps[0] <= before[-1]['step'] + 1
    assert steps[-1] == 40
    (line,) = Path('out/results.jsonl').read_text().splitlines()
    assert json.loads(line)['curve'][-1][0] == 40


def test_cell_without_a_whole_checkpoint_starts_anew(tiny, monkeypatch):
    folder = Path('work/small/tiny/alone_seed0')
    left = []
    monkeypatch.setattr(
        runs, 'run', lambda *a: left.append([p.name for p in folder.glob('*.pth')])
    )
    main('--methods', 'alone')
    torch.save(dict(meta={}, message_hub={}, state_dict={}), folder / 'iter_2.pth')
    main('--methods', 'alone')
    whole = (folder / 'iter_2.pth').read_bytes()
    (folder / 'iter_2.pth').write_bytes(whole[: len(whole) // 2])
    main('--methods', 'alone')
    assert left == [[], ['iter_2.pth'], []]


@pytest.mark.slow
def test_time_is_up(tiny, capsys):
    main('--methods', 'alone', 'default', '--budget', '0.02')
    assert 'alone_seed0: time is up' in capsys.readouterr().out
    assert not Path('out/results.jsonl').exists()
    assert not Path('work/small/tiny/teacher_strong_seed0').exists()


def test_missing_data_and_unknown_task_are_told(tiny, capsys):
    with pytest.raises(SystemExit):
        main('--data-root', 'nowhere')
    assert 'there is no nowhere' in capsys.readouterr().err
    with pytest.raises(SystemExit, match=r'tiny-full/student\.py: the study has no'):
        main('--methods', 'alone', '--scale', 'full')
