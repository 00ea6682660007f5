"""Distilled configs and batches, as many tests need them."""

from __future__ import annotations

import copy
import logging
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from mmengine.logging import MMLogger
from mmengine.registry import DATASETS, DefaultScope
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from mmdist.registry import MODELS


def slow(cases: Iterable) -> list:
    """Cases of a parametrised test that are left to `make test-all`."""
    cases = [case if isinstance(case, tuple) else (case,) for case in cases]
    return [pytest.param(*case, marks=pytest.mark.slow) for case in cases]


@contextmanager
def quiet() -> Iterator[None]:
    """Without a line in the log for each parameter that is initialised."""
    logger = MMLogger.get_current_instance()
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def build_distiller(student: dict, init: bool = True, **options) -> nn.Module:
    """A distilled model in training, the same in each call.

    Args:
        student: Config of the student.
        init: Whether to initialise it, which loads the teacher.
        options: Further arguments; the losses are not balanced, as most tests look at
            each by itself.
    """
    torch.manual_seed(0)
    config = dict(type='mmdist.Distiller', balance=None, student=student)
    with quiet():
        model = MODELS.build(config | options)
        if init:
            model.init_weights()
    model.train()
    return model  # LD's own `train` returns None


def distilled_text(more: str = '', distill: str = '', **teacher) -> str:
    """Text of a config that distils the one of `student.py` beside it.

    Args:
        more: Lines after the model.
        distill: What is compared; empty takes the default.
        teacher: Arguments of the teacher.
    """
    compared = f', distill={distill}' if distill else ''
    return f"""
_base_ = './student.py'
model = dict(
    _delete_=True, type='mmdist.Distiller', student=_base_.model,
    teacher={teacher!r}{compared})
{more}
"""


def distilled_config(folder: Path, student: str, **teacher) -> Config:
    """The config of a pair, written to a folder.

    Args:
        folder: The folder.
        student: Text of the student's config.
        teacher: Arguments of the teacher; without any it is the same, untrained.
    """
    (folder / 'student.py').write_text(student)
    itself = dict(config=str(folder / 'student.py'), allow_random=True)
    (folder / 'distilled.py').write_text(distilled_text(**(teacher or itself)))
    return Config.fromfile(folder / 'distilled.py')


class Waits(TorchDispatchMode):
    """Counts what reads a tensor, or what copies Python's numbers to the device."""

    READS = (
        '_local_scalar_dense',
        'nonzero',
        'masked_select',
        'unique_dim',
        '_unique2',
    )

    def __init__(self) -> None:
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        by_mask = name in ('index', 'index_put', 'index_put_') and any(
            index is not None and index.dtype == torch.bool for index in args[1]
        )
        reads = (
            '_local_scalar_dense nonzero masked_select unique_dim _unique2 lift_fresh'
        )
        if name in reads.split() or by_mask:
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))


def dataset_batch(config: Config, size: int = 2) -> dict:
    """A raw training batch of the config's own data set and pipeline."""
    with DefaultScope.overwrite_default_scope(config.default_scope):
        dataset = DATASETS.build(copy.deepcopy(config.train_dataloader.dataset))
        return pseudo_collate([dataset[i] for i in range(size)])
