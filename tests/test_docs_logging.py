"""The configs of docs/logging.md, and what a log says before the first step."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest
from builders import distilled_text
from docs_blocks import code, only
from mmengine.config import Config
from mmengine.registry import VISBACKENDS
from mmengine.runner import Runner

BLOCKS = code('docs/logging.md')


@pytest.fixture
def pair(seg_config, tmp_path, monkeypatch) -> Path:
    """A pair's config for two steps, as `my_pair.py` in the working directory."""
    monkeypatch.chdir(tmp_path)
    Path('student.py').write_text(seg_config)
    Path('my_pair.py').write_text(
        distilled_text(
            "train_cfg = dict(max_iters=2, val_interval=5)\nwork_dir = 'work'",
            "dict(dist=dict(type='mmdist.SegLogits'))",
            config='student.py',
            allow_random=True,
        )
    )
    return tmp_path


def config_with(backend: str) -> Config:
    """The config of the page that names a backend."""
    Path('config.py').write_text(only(BLOCKS, backend))
    config = Config.fromfile('config.py')
    assert [entry.type for entry in config.visualizer.vis_backends] == [
        'LocalVisBackend', backend,
    ]  # fmt: skip
    assert config.visualizer.type == 'SegLocalVisualizer'
    return config


def test_tensorboard_gets_the_correlations(pair):
    pytest.importorskip('tensorboard')
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    Runner.from_cfg(config_with('TensorboardVisBackend')).train()
    (file,) = pair.glob('work/*/vis_data/events.out.tfevents.*')
    events = EventAccumulator(str(file)).Reload()
    for key in ('loss_dist', 'dist_inter', 'dist_intra'):
        values = events.Scalars(key)
        assert [event.step for event in values] == [1, 2], key
    assert all(abs(event.value) <= 1 for event in events.Scalars('dist_inter'))
    assert list(pair.glob('work/*/vis_data/scalars.json'))


def test_wandb_is_configured_as_mmengine_has_it(pair):
    backend = config_with('WandbVisBackend').visualizer.vis_backends[-1]
    cls = VISBACKENDS.get(backend.pop('type'))
    inspect.signature(cls).bind(save_dir='.', **backend)
    assert backend.init_kwargs.keys() == {'project', 'name'}


def test_every_config_of_the_page_is_tried():
    assert len(BLOCKS) == 2


def test_the_log_says_once_what_is_distilled(pair):
    config = Config.fromfile('my_pair.py')
    Runner.from_cfg(config).train()
    (file,) = pair.glob('work/*/*.log')
    before, step, after = file.read_text().partition('Iter(train)')
    assert step
    (line,) = re.findall(r'mmdist: .* learns from .*', before)  # for one entry, one
    assert line.startswith('mmdist: EncoderDecoder learns from EncoderDecoder (')
    assert '`dist`, SegLogits with DISTLoss' in line
    assert 'learns from' not in after
