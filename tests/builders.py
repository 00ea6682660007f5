"""Builders of distilled configs, models and batches that many tests share."""

from __future__ import annotations

import copy
import logging
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
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
    """Mark cases of a parametrised test as slow: only `make test-all` runs them."""
    cases = [case if isinstance(case, tuple) else (case,) for case in cases]
    return [pytest.param(*case, marks=pytest.mark.slow) for case in cases]


def quick_or_slow(quick: Collection[str], names: Iterable[str]) -> list:
    """The names, marked as slow where they are not among the quick ones."""
    return [name if name in quick else slow([name])[0] for name in names]


@contextmanager
def quiet() -> Iterator[None]:
    """Silence mmengine's log line for each initialised parameter."""
    logger = MMLogger.get_current_instance()
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def build_distiller(student: dict, init: bool = True, **options) -> nn.Module:
    """Build a distilled model in training mode, with the same weights in each call.

    Args:
        student: Config of the student.
        init: Whether to initialise it, which loads the teacher.
        options: Further arguments; `balance` is off, as most tests check one loss.
    """
    torch.manual_seed(0)
    config = dict(type='mmdist.Distiller', balance=None, student=student)
    with quiet():
        model = MODELS.build(config | options)
        if init:
            model.init_weights()
    model.train()
    return model  # LD's own `train` returns None


def build(config: Config, distilled: bool = True) -> nn.Module:
    """Build a complete config's model, or its plain student, in training mode."""
    torch.manual_seed(0)
    with DefaultScope.overwrite_default_scope(config.default_scope):
        model = MODELS.build(config.model if distilled else config.model.student)
        model.init_weights()
    return model.train()


def losses_of(model: nn.Module, data: dict) -> dict:
    """The losses of a raw batch."""
    data = model.data_preprocessor(copy.deepcopy(data), True)
    torch.manual_seed(0)  # dropout
    return model(**data, mode='loss')


def classifiers(model: nn.Module) -> list[nn.Conv2d]:
    """The convolutions of a tiny RetinaNet or PSPNet that predict the classes."""
    if hasattr(model, 'bbox_head'):
        return [model.bbox_head.retina_cls]
    return [model.decode_head.conv_seg, model.auxiliary_head.conv_seg]


def distilled_text(more: str = '', distill: str = '', **teacher) -> str:
    """Text of a config that distils the model of `student.py` in the same folder.

    Args:
        more: Lines after the model.
        distill: Text of the `distill` argument; if empty, the default is used.
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
    """Write the config of a pair to a folder and load it.

    Args:
        folder: The folder.
        student: Text of the student's config.
        teacher: Arguments of the teacher; by default it is the student, untrained.
    """
    (folder / 'student.py').write_text(student)
    itself = dict(config=str(folder / 'student.py'), allow_random=True)
    (folder / 'distilled.py').write_text(distilled_text(**(teacher or itself)))
    return Config.fromfile(folder / 'distilled.py')


def assert_learns(*modules: nn.Module, least: float = 0.0) -> None:
    """Check that each module has a finite gradient whose norm is above ``least``."""
    for module in modules:
        grads = [p.grad for p in module.parameters() if p.grad is not None]
        norms = torch.stack([grad.norm() for grad in grads])
        assert norms.isfinite().all() and norms.norm() > least


def without_dropout(model: nn.Module) -> nn.Module:
    """Turn dropout off, so that training and eval mode compute the same."""
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        elif isinstance(module, nn.MultiheadAttention):
            module.dropout = 0.0
    return model


class Seen:
    """Inputs and outputs of modules in each call, recorded by torch's own hooks."""

    def __init__(self, **modules: nn.Module) -> None:
        self.inputs = {name: [] for name in modules}
        self.outputs = {name: [] for name in modules}
        for name, module in modules.items():
            module.register_forward_hook(partial(self._see, name))

    def _see(self, name: str, module: nn.Module, args: tuple, output) -> None:
        self.inputs[name].append(args)
        self.outputs[name].append(output)

    @property
    def calls(self) -> dict[str, int]:
        """How often each module ran."""
        return {name: len(outputs) for name, outputs in self.outputs.items()}


class Waits(TorchDispatchMode):
    """Counts operations that read tensors or copy Python numbers to the device."""

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
    """A raw training batch from the config's own data set and pipeline."""
    with DefaultScope.overwrite_default_scope(config.default_scope):
        dataset = DATASETS.build(copy.deepcopy(config.train_dataloader.dataset))
        return pseudo_collate([dataset[i] for i in range(size)])
