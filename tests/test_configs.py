"""Every config of configs/: it loads, builds, is listed truly, and its pair trains."""

from __future__ import annotations

import re
import runpy
import subprocess
import sys
from copy import deepcopy
from functools import cache
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import yaml
from mmengine.config import Config
from mmengine.config.utils import MODULE2PACKAGE
from mmengine.registry import DefaultScope
from mmengine.utils import get_installed_path
from torch import nn

from mmdist.registry import MODELS
from mmdist.teachers.classes import class_names_of_config

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = sorted((ROOT / 'configs').glob('[!_]*/*/*.py'))
METAFILES = yaml.safe_load((ROOT / 'model-index.yml').read_text())['Import']
METHODS = {
    'DIST': 'dist',
    'DIST + mimic': 'dist-mimic',
    'DIST + boxes': 'dist-box',
    'DIST, intra-class term + boxes': 'dist-intra-box',
    'KL': 'kl',
    'PKD': 'pkd',
}
# One pair of each kind of comparison; the others are slow.
QUICK = (
    'dist-mimic_faster-rcnn',
    'kl_retinanet',
    'dist_pspnet_r18-d8_deeplabv3-r101-d8_8xb2-40k',
    'dist_segformer_mit-b2_mask2former',
)


@cache
def listed(package: str) -> dict[str, list[dict]]:
    """Models of a library's own metafiles, by their config."""
    mim = Path(get_installed_path(package)) / '.mim'
    models: dict[str, list[dict]] = {}
    for path in yaml.safe_load((mim / 'model-index.yml').read_text())['Import']:
        for model in yaml.safe_load((mim / path).read_text())['Models']:
            models.setdefault(model.get('Config'), []).append(model)
    return models


@cache
def load(path: str | Path) -> Config:
    """A config by its path or `pkg::path`; it is not to be changed."""
    if '::' in str(path):
        return Config.fromstring(f'_base_ = {str(path)!r}', '.py')
    return Config.fromfile(path)


def in_library(config: str) -> list[dict]:
    """The metafile's entries of `mmdet::x/y.py`."""
    module, path = config.split('::')
    return listed(MODULE2PACKAGE[module])[f'configs/{path}']


def zoo() -> list[dict]:
    """Our own metafiles' entries, with the folder of the metafile."""
    return [
        dict(model, folder=Path(path).parent)
        for path in METAFILES
        for model in yaml.safe_load((ROOT / path).read_text())['Models']
    ]


ZOO = zoo()
DISTILLED = [ROOT / m['Config'] for m in ZOO if m['In Collection'] in METHODS]


def stems(paths) -> list[str]:
    return [path.stem for path in paths]


@pytest.fixture
def uninitialized(monkeypatch):
    """Build at once: the numbers do not matter, and drawing them takes seconds."""
    for name in dir(nn.init):
        if name.endswith('_') and not name.startswith('_'):
            monkeypatch.setattr(nn.init, name, lambda tensor, *args, **kwargs: tensor)


@pytest.mark.parametrize('path', CONFIGS, ids=stems(CONFIGS))
def test_loads_dumps_and_builds(path, tmp_path, uninitialized):
    config = load(path)
    config.dump(tmp_path / 'dumped.py')
    assert Config.fromfile(tmp_path / 'dumped.py')._cfg_dict == config._cfg_dict

    with DefaultScope.overwrite_default_scope(config.default_scope):
        model = MODELS.build(deepcopy(config.model))  # models write into it
    if config.model.type == 'mmdist.Distiller':
        assert type(model).__name__.startswith('Distilled')
        assert type(model.teacher.build()).__name__
        assert config.model.teacher.checkpoint


@pytest.mark.parametrize('path', DISTILLED, ids=stems(DISTILLED))
def test_short_and_with_the_published_teacher(path):
    assert len(path.read_text().splitlines()) <= 20
    teacher = load(path).model.teacher
    # by the path: the onedl fork names the same files on another host
    weights = [m['Weights'] for m in in_library(teacher.config) if 'Weights' in m]
    assert urlsplit(teacher.checkpoint).path in [urlsplit(url).path for url in weights]


@pytest.mark.parametrize('path', DISTILLED, ids=stems(DISTILLED))
def test_named_as_the_student_with_its_teacher(path):
    method, *parts = path.stem.split('_')
    base = re.search(r"'((?:mm\w+::|\./)\S+)\.py'", path.read_text())[1]
    base = base.rpartition('/')[2].split('_')
    if base[0] in METHODS.values():
        assert parts == base[1:]
        return
    assert method in ('dist', 'pkd')
    words = [word for i, word in enumerate(parts) if parts[:i] + parts[i + 1 :] == base]
    (word,) = words
    teacher = Path(load(path).model.teacher.config).stem
    assert set(word.split('-')) <= set(re.split('[-_]', teacher))


def test_metafiles_list_every_config_once():
    folders = {model['folder'] for model in ZOO}
    there = [path for path in CONFIGS if path.parent.relative_to(ROOT) in folders]
    assert sorted(model['Config'] for model in ZOO) == [
        str(path.relative_to(ROOT)) for path in there
    ]


@pytest.mark.parametrize('entry', ZOO, ids=[model['Name'] for model in ZOO])
def test_metafile_says_what_the_config_does(entry):
    path = ROOT / entry['Config']
    assert entry['Name'] == path.stem
    model = load(path).model
    student = model.get('student', model)
    assert METHODS.get(entry['In Collection']) == (
        path.stem.split('_')[0] if 'student' in model else None
    )
    library = deepcopy(load(entry['Student']['Config']).model)
    if path.stem.startswith('dist_pidnet'):  # the config says why
        library.decode_head.loss_decode[0].class_weight = None
    assert student == library
    sides = [entry['Student']]
    if 'student' in model:
        assert entry['Teacher']['Config'] == model.teacher.config
        assert entry['Teacher']['Weights'] == model.teacher.checkpoint
        sides.append(entry['Teacher'])
    for side in sides:
        for name, value in side.get('Metrics', {}).items():
            assert value in [
                result['Metrics'].get(name)
                for model in in_library(side['Config'])
                for result in _list(model['Results'])
            ]
    for result in entry.get('Results', []):
        assert result['Metrics'] and result['Task'] and result['Dataset']
        if result['Source'] == 'measured here':
            assert result['Command'].startswith('tools/')
        else:
            assert result['Source'] == 'published by the authors'
            assert 'Command' not in result


def _list(x) -> list:
    return x if isinstance(x, list) else [x]


# The paper's tables 6 and 7: result, student alone, teacher.
PUBLISHED = {
    'dist_faster-rcnn_': (40.4, 38.4, 45.6),
    'dist-mimic_faster-rcnn_': (41.8, 38.4, 45.6),
    'dist_retinanet_': (39.8, 37.4, 41.0),
    'dist-mimic_retinanet_': (40.1, 37.4, 41.0),
    'dist_deeplabv3_r18-d8_deeplabv3-r101-d8_8xb2-40k_': (77.10, 74.21, 78.07),
    'dist_pspnet_r18-d8_deeplabv3-r101-d8_8xb2-40k_': (76.31, 72.55, 78.07),
}


def test_published_results_are_those_of_the_paper():
    found = {}
    for entry in ZOO:
        for result in entry.get('Results', []):
            if result['Source'] == 'published by the authors' and 'Teacher' in entry:
                (metric,) = result['Metrics'].values()
                found[entry['Name']] = (metric, result['Student'], result['Teacher'])
    assert {
        prefix: numbers
        for name, numbers in found.items()
        for prefix in PUBLISHED
        if name.startswith(prefix)
    } == PUBLISHED
    assert len(found) == len(PUBLISHED)


def test_published_schedule_on_cityscapes():
    for path in (ROOT / 'configs/seg/cityscapes').glob('*8xb2-40k*.py'):
        config = load(path)
        optimizer = config.optim_wrapper.optimizer
        assert (optimizer.lr, optimizer.momentum) == (0.02, 0.9)
        assert optimizer.weight_decay == 5e-4
        assert config.train_cfg.max_iters == 40000
        (scheduler,) = config.param_scheduler
        assert (scheduler.end, scheduler.power, scheduler.eta_min) == (40000, 0.9, 1e-4)
        assert 8 * config.train_dataloader.batch_size == 16
        assert config.crop_size == (512, 1024)


@pytest.mark.parametrize('tool', ['make_model_zoo', 'make_pair_matrix'])
def test_made_pages_are_up_to_date(tool, monkeypatch, uninitialized):
    monkeypatch.syspath_prepend(ROOT / 'tools')
    made = runpy.run_path(str(ROOT / f'tools/dev/{tool}.py'))
    text = made['PAGE'].read_text()
    assert made['page'](text) == text


@pytest.mark.parametrize(
    'path',
    [
        pytest.param(path, id=path.stem)
        if path.stem.startswith(QUICK)
        else pytest.param(path, id=path.stem, marks=pytest.mark.slow)
        for path in DISTILLED
    ],
)
def test_one_training_step_at_full_size(path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / 'tools')
    new_pair = runpy.run_path(str(ROOT / 'tools/new_pair.py'))
    config = load(path)
    if 'box' in config.model.get('distill', {}):  # a random teacher is sure of nothing
        config.model.distill.box.min_score = 0.0
    model = new_pair['build_pair'](config.model, config.default_scope)
    losses, shapes = new_pair['run_step'](model, class_names_of_config(config))
    for name in model.distill:
        assert losses[f'loss_{name}'] > 0
        assert shapes[name]


USER_CONFIG = """\
_base_ = 'mmdist::det/coco/dist_retinanet_r50_fpn_retinanet-x101-64x4d_2x_coco.py'
model = dict(distill=dict(dist=dict(loss=dict(type='mmdist.DISTLoss', gamma=2.0))))
"""
USER_SCRIPT = """
from mmengine.config import Config
from mmengine.hub import get_config
from mmengine.registry import MODELS, init_default_scope

config = Config.fromfile('my.py')
init_default_scope(config.default_scope)
loss = MODELS.build(config.model).distill['dist'].loss
print(loss.gamma, loss.beta, loss.activation)
# The path by which `mim` and mmengine.hub find a config: the metafiles.
path = open('my.py').readline().split("'")[1]
assert get_config(path).model.type == 'mmdist.Distiller'
"""


def test_a_user_inherits_a_config_in_a_directory_of_his_own(tmp_path):
    (tmp_path / 'my.py').write_text(USER_CONFIG)
    (tmp_path / 'script.py').write_text(USER_SCRIPT)
    done = subprocess.run(
        [sys.executable, '-W', 'ignore', 'script.py'],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == '2.0 1.0 sigmoid'
