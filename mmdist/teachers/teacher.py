"""The teacher: found, loaded strictly, frozen, and shown what it was trained on."""

from __future__ import annotations

import inspect
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from typing import Any

import torch
from mmengine.config import Config, ConfigDict
from mmengine.logging import print_log
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import DefaultScope
from torch import nn

from mmdist.checkpoint import check_class_names, load_checkpoint, load_strictly
from mmdist.registry import MODELS

from .classes import (
    ClassMatch,
    class_names_of_checkpoint,
    class_names_of_config,
    match_classes,
)
from .foreign import ForeignTeacher
from .renormalize import Renormalize

_HALF_PRECISION = dict(bf16=torch.bfloat16, fp16=torch.float16)


class Teacher:
    """A frozen guest of the student: not a module of it, never saved, never trained.

    It is built and loaded by :meth:`load`, which the Runner triggers only to train.

    Args:
        config: Config of the teacher: a path, ``pkg::path``, a Config, or the config
            dict of the model alone.
        checkpoint: Path or URL of its weights. A :class:`ForeignTeacher` brings its
            own.
        allow_random: Permit ``checkpoint=None``, a teacher with random weights.
        class_map: Name of the teacher's class for each name of the student's, where
            the two name the same thing differently, or a list of names that are one
            class to the student.
        class_match: ``'strict'``: one side knows all classes of the other.
            ``'shared'``: only the classes that both know are compared, and the log
            says once which these are.
        weights_only: False lets the checkpoint run code while it is read; for files of
            trusted origin that the safe loader refuses.
        dtype: 'bf16' or 'fp16' keeps the weights in half precision, half the memory,
            and runs the teacher under autocast of that type.
        channels_last: Keep the weights in the memory format channels_last.
        compile: Compile the backbone and the neck with torch.compile.
        views: ``['flip']``: the teacher also sees the mirrored images, and its
            probabilities are averaged, where the comparison is dense.

    Attributes:
        classes: Which of its columns are the student's classes; None until these are
            known.

    Raises:
        ValueError: ``dtype``, ``class_match`` or ``views`` is none of these.
    """

    def __init__(
        self,
        config: str | os.PathLike | Config | dict,
        checkpoint: str | None = None,
        allow_random: bool = False,
        class_map: Mapping[str, str | Sequence[str]] | None = None,
        class_match: str = 'strict',
        weights_only: bool = True,
        dtype: str | None = None,
        channels_last: bool = False,
        compile: bool = False,
        views: Sequence[str] = (),
    ) -> None:
        if dtype not in (None, *_HALF_PRECISION):
            raise ValueError(
                f'`teacher.dtype` is one of {list(_HALF_PRECISION)} or None, '
                f'got {dtype!r}.'
            )
        if class_match not in ('strict', 'shared'):
            raise ValueError(
                f"`teacher.class_match` is 'strict' or 'shared', got {class_match!r}."
            )
        if list(views) not in ([], ['flip']):
            raise ValueError(f"`teacher.views` is ['flip'] or omitted, got {views!r}.")
        self.config = config
        self.checkpoint = checkpoint
        self.allow_random = allow_random
        self.class_map = class_map
        self.class_match = class_match
        self.weights_only = weights_only
        self.dtype = _HALF_PRECISION.get(dtype)
        self.channels_last = channels_last
        self.compile = compile
        self.views = tuple(views)
        self.model: nn.Module | None = None
        self.renormalize: Renormalize | None = None
        self.class_names: Sequence[str] | None = None
        self.classes: ClassMatch | None = None

    @property
    def origin(self) -> str:
        """Where its weights are from, in words."""
        if self.checkpoint is not None:
            return self.checkpoint
        return 'random weights' if self.allow_random else 'weights of its own'

    def __deepcopy__(self, memo: dict) -> Teacher:
        # A copy of the student (EMA makes one) has the same guest, not a second one.
        return self

    def __getstate__(self) -> dict:
        # A file holds no second model: the teacher is loaded again from its own.
        return {**self.__dict__, 'model': None}

    def move_to(self, device: torch.device) -> None:
        """Move the model; FSDP moves the student's tensors without ``_apply``."""
        if next(self.model.parameters()).device != device:
            self.apply(lambda tensor: tensor.to(device))

    def apply(self, fn) -> None:
        """Follow ``.to()``, ``.cuda()`` and ``.half()`` of the student."""
        if self.model is not None:
            self.model._apply(fn)

    def build(self) -> nn.Module:
        """A model of the teacher's config, without its weights; it is not kept."""
        return build_model(load_config(self.config))

    def load(self, student: nn.Module) -> None:
        """Build the teacher, load its weights strictly and freeze it.

        Args:
            student: Gives the device and the normalisation that batches come with.

        Raises:
            ValueError: There is no checkpoint and ``allow_random`` is not set.
            RuntimeError: A key is missing, unexpected or of another shape, or the file
                cannot be read.
            FileNotFoundError: There is no such file.
        """
        if self.model is not None:
            return
        config = load_config(self.config)
        needs_weights = self.checkpoint is None and not _brings_weights(config)
        if needs_weights and not self.allow_random:
            raise ValueError(
                'The teacher has no checkpoint. Give `teacher.checkpoint`, a path or a '
                'URL, or set `teacher.allow_random=True` if random weights are meant.'
            )
        model = build_model(config, random=needs_weights)
        self.class_names = getattr(model, 'class_names', None) or class_names_of_config(
            config
        )
        if self.checkpoint is not None:
            checkpoint = load_checkpoint(self.checkpoint, self.weights_only)
            load_strictly(model, checkpoint, self.checkpoint)
            names = class_names_of_checkpoint(checkpoint)
            check_class_names(names, model, self.checkpoint)
            self.class_names = names or self.class_names
        model.requires_grad_(False).eval()
        model.to(next(student.parameters()).device)
        # before the cast, which rounds mean and std too
        self.renormalize = Renormalize(
            student.data_preprocessor, model.data_preprocessor
        )
        # LD's own `to` takes a device alone.
        nn.Module.to(model, self.dtype)
        if self.channels_last:
            nn.Module.to(model, memory_format=torch.channels_last)
        if self.compile:
            for part in ('backbone', 'neck'):
                if hasattr(model, part):
                    getattr(model, part).compile()
        self.model = model

    def follow(self, student: nn.Module) -> None:
        """Learn from the student, at the start of a step; see :class:`MeanTeacher`."""

    @contextmanager
    def running(self) -> Iterator[None]:
        """Whatever the teacher computes is computed within: no gradient, its dtype."""
        device = next(self.model.parameters()).device.type
        half = (
            nullcontext() if self.dtype is None else torch.autocast(device, self.dtype)
        )
        with torch.no_grad(), half:
            yield

    def match_classes(self, student_classes: Sequence[str] | None) -> ClassMatch:
        """Find the teacher's column of each of the student's classes.

        Args:
            student_classes: Class names of the student's dataset; None if unknown.

        Raises:
            ValueError: The classes cannot be matched by name; it prints both lists.
        """
        match = match_classes(
            student_classes, self.class_names, self.class_map, self.class_match
        )
        if self.class_match == 'shared':
            print_log(match.describe(student_classes, self.class_names), 'current')
        if student_classes is None or self.class_names is None:
            whose = 'student' if student_classes is None else 'teacher'
            print_log(
                f'The class names of the {whose} are unknown: student and teacher are '
                'taken to have the same classes in the same order.',
                logger='current',
                level=logging.WARNING,
            )
        return match


def load_config(config: str | os.PathLike | Config | dict) -> Config:
    """The teacher's config, with a ``model``.

    Args:
        config: A path, ``pkg::path``, a Config, or the config dict of a model.

    Returns:
        The config. Of a distillation config, the student is taken as the model.
    """
    if isinstance(config, (str, os.PathLike)):
        config = os.fspath(config)
        if '::' in config:
            # Not mmengine.hub.get_config: it pip-installs what it does not find.
            config = Config.fromstring(f'_base_ = {config!r}', '.py')
        else:
            config = Config.fromfile(config)
    elif 'model' in config:
        config = Config(deepcopy(dict(config)))
    else:
        config = Config(dict(model=deepcopy(config)))
    if config.model.get('student') is not None:
        config.model = config.model.student
    return config


def _brings_weights(config: Config) -> bool:
    """Whether the model is of a class that loads its weights itself."""
    scope = config.get('default_scope')
    with (
        DefaultScope.overwrite_default_scope(scope),
        MODELS.switch_scope_and_registry(None) as registry,
    ):
        kind = config.model.get('type')
        cls = registry.get(kind) if isinstance(kind, str) else kind
    return inspect.isclass(cls) and issubclass(cls, ForeignTeacher)


def build_model(config: Config, random: bool = False) -> nn.Module:
    """Build without pretrained backbones, and without touching the student's RNG."""
    cfg = without_pretrained(config.model)
    scope = config.get('default_scope')
    with torch.random.fork_rng(devices=[]), DefaultScope.overwrite_default_scope(scope):
        model = MODELS.build(cfg)
        if random and hasattr(model, 'init_weights'):
            model.init_weights()
    return revert_sync_batchnorm(model)  # in eval they are the same


def without_pretrained(cfg: Any) -> Any:
    """A copy of a model's config that loads no pretrained weights when initialised."""
    if isinstance(cfg, Mapping):
        init_cfg = cfg.get('init_cfg')
        return ConfigDict(
            {
                key: None if key == 'pretrained' else without_pretrained(value)
                for key, value in cfg.items()
                # PVT's has a checkpoint, but no type
                if not (
                    key == 'init_cfg'
                    and isinstance(init_cfg, Mapping)
                    and 'checkpoint' in init_cfg
                )
            }
        )
    if isinstance(cfg, (list, tuple)):
        return type(cfg)(without_pretrained(value) for value in cfg)
    return deepcopy(cfg)
