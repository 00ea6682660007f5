"""Every config in configs/ loads, builds, is listed correctly, and its pair trains."""

from __future__ import annotations

import functools
import runpy
from copy import deepcopy
from functools import cache
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import torch
import yaml
from docs_blocks import code
from mmengine.config import Config
from mmengine.config.utils import MODULE2PACKAGE
from mmengine.hub import get_config
from mmengine.registry import DATASETS, METRICS, DefaultScope
from mmengine.utils import get_installed_path
from one_step import train_a_step
from torch import nn

from mmdist.registry import MODELS
from mmdist.teachers import Teacher

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
# One pair per kind of comparison is trained at a small size, all at full size.
QUICK = (
    'dist-intra-box_faster-rcnn',
    'dist-mimic_faster-rcnn',
    'kl_retinanet',
    'dist_pspnet_r18-d8_deeplabv3-r101-d8_8xb2-40k',
    'dist_segformer_mit-b0_segformer-mit-b5_8xb1',
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
    """A config by its path or `pkg::path`; cached, so it must not be changed."""
    if '::' in str(path):
        return Config.fromstring(f'_base_ = {str(path)!r}', '.py')
    return Config.fromfile(path)


def in_library(config: str) -> list[dict]:
    """The entries of `mmdet::x/y.py` in its library's metafile."""
    module, path = config.split('::')
    return listed(MODULE2PACKAGE[module])[f'configs/{path}']


ZOO = [
    model
    for path in METAFILES
    for model in yaml.safe_load((ROOT / path).read_text())['Models']
]
DISTILLED = [ROOT / m['Config'] for m in ZOO if m['In Collection'] in METHODS]


def stem(path) -> str:
    return Path(path['Name'] if isinstance(path, dict) else path).stem


@pytest.fixture
def without_memory(monkeypatch):
    """Build quickly on the meta device: the weights do not matter."""
    # models read its values, the drop path rates of their blocks
    linspace = functools.partial(torch.linspace, device='cpu')
    monkeypatch.setattr(torch, 'linspace', linspace)
    with torch.device('meta'):
        yield


@cache  # most teachers have several students
def build_teacher(config: str) -> None:
    assert isinstance(Teacher(config).build(), nn.Module)


@pytest.mark.parametrize('path', CONFIGS, ids=stem)
def test_loads_dumps_and_builds(path, tmp_path, without_memory):
    config = load(path)
    config.dump(tmp_path / 'dumped.py')
    assert Config.fromfile(tmp_path / 'dumped.py')._cfg_dict == config._cfg_dict
    with DefaultScope.overwrite_default_scope(config.default_scope):
        model = MODELS.build(deepcopy(config.model))  # models write into it
    if config.model.type == 'mmdist.Distiller':
        assert type(model).__name__.startswith('Distilled')
        build_teacher(config.model.teacher.config)


def test_metafiles_list_every_config_once():
    folders = {Path(path).parent for path in METAFILES}
    there = [path.relative_to(ROOT) for path in CONFIGS]
    there = [str(path) for path in there if path.parent in folders]
    assert sorted(model['Config'] for model in ZOO) == there


@pytest.mark.parametrize('entry', ZOO, ids=stem)
def test_metafile_says_what_the_config_does(entry):
    path = ROOT / entry['Config']
    assert entry['Name'] == path.stem
    model = load(path).model
    student = model.get('student', model)
    library = deepcopy(load(entry['Student']['Config']).model)
    if path.stem.startswith('dist_pidnet'):  # the config says why
        library.decode_head.loss_decode[0].class_weight = None
    assert student == library
    sides = [entry['Student']]
    if 'student' in model:
        assert METHODS[entry['In Collection']] == path.stem.split('_')[0]
        assert entry['Teacher']['Config'] == model.teacher.config
        assert entry['Teacher']['Weights'] == model.teacher.checkpoint
        sides.append(entry['Teacher'])
        # only the path: the onedl fork has the same files on another host
        weights = [m.get('Weights', '') for m in in_library(model.teacher.config)]
        paths = [urlsplit(url).path for url in weights]
        assert urlsplit(model.teacher.checkpoint).path in paths
    else:
        assert entry['In Collection'] not in METHODS
    for side in sides:
        for name, value in side.get('Metrics', {}).items():
            results = [model['Results'] for model in in_library(side['Config'])]
            results = [r if isinstance(r, list) else [r] for r in results]
            assert value in [r['Metrics'].get(name) for rs in results for r in rs]
    for result in entry.get('Results', []):
        assert result['Metrics'] and result['Task'] and result['Dataset']
        if result['Source'] == 'measured here':
            assert result['Command'].startswith('tools/')
        else:
            assert result['Source'] == 'published by the authors'
            assert 'Command' not in result


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
    commands = '\n'.join(code('docs/reproduce_the_paper.md', 'shell'))
    found = {}
    for entry in ZOO:
        for result in entry.get('Results', []):
            if result['Source'] == 'published by the authors' and 'Teacher' in entry:
                (metric,) = result['Metrics'].values()
                name = next(n for n in PUBLISHED if entry['Name'].startswith(n))
                found[name] = (metric, result['Student'], result['Teacher'])
                assert f'{entry["Config"]} 8' in commands
    assert found == PUBLISHED


def test_published_schedule_on_cityscapes():
    name = 'mobilenet-v2-d8_deeplabv3_8xb2-40k_cityscapes-512x1024'
    authors = load(ROOT / f'configs/seg/cityscapes/{name}.py').model
    assert authors.decode_head.channels == 128 and authors.auxiliary_head is None
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
def test_made_pages_are_up_to_date(tool, monkeypatch):
    for name in dir(nn.init):  # numbers that take seconds and do not matter
        if name.endswith('_') and not name.startswith('_'):
            monkeypatch.setattr(nn.init, name, lambda tensor, *args, **kwargs: tensor)
    (path,) = (ROOT / 'tools').rglob(f'{tool}.py')
    monkeypatch.syspath_prepend(ROOT / 'tools')
    made = runpy.run_path(str(path))
    text = made['PAGE'].read_text()
    assert made['page'](text) == text


@pytest.mark.parametrize(
    'path', [p for p in DISTILLED if p.stem.startswith(QUICK)], ids=stem
)
def test_a_small_pair_trains_a_step(path, tmp_path):
    train_a_step(Config.fromfile(path), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize('path', DISTILLED, ids=stem)
def test_a_pair_of_full_size_trains_a_step(path, tmp_path):
    train_a_step(Config.fromfile(path), tmp_path, full_size=True)


def test_a_user_inherits_a_config_in_a_directory_of_his_own(tmp_path, monkeypatch):
    """`test_registry.py` and `test_packaging.py` do so in processes of their own."""
    monkeypatch.chdir(tmp_path)
    base = 'mmdist::det/coco/dist_retinanet_r50_fpn_retinanet-x101-64x4d_2x_coco.py'
    loss = "dict(dist=dict(loss=dict(type='mmdist.DISTLoss', gamma=2.0)))"
    Path('my.py').write_text(f'_base_ = {base!r}\nmodel = dict(distill={loss})\n')
    config = Config.fromfile('my.py')
    with DefaultScope.overwrite_default_scope(config.default_scope):
        loss = MODELS.build(config.model).distill['dist'].loss
    assert (loss.gamma, loss.beta, loss.activation) == (2.0, 1.0, 'sigmoid')
    # `mim` and mmengine.hub find a config by the metafiles
    assert get_config(base).model.type == 'mmdist.Distiller'


@pytest.mark.parametrize('name', ['camvid', 'digits_detection', 'digits_segmentation'])
def test_own_data_sets_are_built_through_mmdist_paths(name):
    """mmengine marks what it reads by `mmdist::` with the scope of mmdist."""
    config = load(f'mmdist::_base_/datasets/{name}.py')
    for loader in ('train', 'val', 'test'):
        dataset = deepcopy(config[f'{loader}_dataloader'].dataset)
        dataset.get('dataset', dataset).lazy_init = True
        built = DATASETS.build(dataset | dict(lazy_init=True))
        assert len(getattr(built, 'dataset', built).pipeline.transforms) >= 3
    evaluator = config.val_evaluator | dict(prefix='own')
    evaluator.pop('ann_file', None)
    assert METRICS.build(evaluator).prefix == 'own'
