"""Distilled configs that train quickly, and Runners with a WatchHook."""

from __future__ import annotations

import os
import uuid

import pytest
from builders import distilled_text
from mmengine.config import Config
from watch import WatchHook, watched

WATCHED = """
custom_hooks = [dict(type='WatchHook')]
val_dataloader = None
val_cfg = None
val_evaluator = None
"""


@pytest.fixture
def pair(group_of):
    """Calls a function in two processes; returns both results."""
    return group_of(2)


@pytest.fixture(scope='module')
def make_config(det_config, seg_config, tmp_path_factory):
    """Makes the distilled config of a family, changed by options."""
    folder = tmp_path_factory.mktemp('configs')
    paths = {}
    for family, text in dict(det=det_config, seg=seg_config).items():
        (folder / family).mkdir()
        student = folder / family / 'student.py'
        student.write_text(text)
        paths[family] = folder / family / 'distilled.py'
        paths[family].write_text(
            distilled_text(WATCHED, config=str(student), allow_random=True)
        )

    def make(family: str, work_dir, **options) -> Config:
        cfg = Config.fromfile(paths[family])
        cfg.work_dir = os.fspath(work_dir)
        # otherwise two runs that begin within a second share a message hub
        cfg.experiment_name = uuid.uuid4().hex
        cfg.merge_from_dict(options)
        return cfg

    return make


@pytest.fixture(scope='module')
def train():
    """Trains; returns the Runner and its WatchHook."""
    from mmengine.runner import Runner

    def train(cfg: Config) -> tuple[Runner, WatchHook]:
        runner = Runner.from_cfg(cfg)
        runner.train()
        return runner, watched(runner)

    return train
