"""The teacher: read its config, load its weights strictly, and freeze it."""

from __future__ import annotations

import difflib
import inspect
import itertools
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from copy import copy, deepcopy
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config, ConfigDict
from mmengine.logging import print_log
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import DefaultScope
from torch import nn

from mmdist.checkpoint import load_checkpoint, load_strictly
from mmdist.lookup import check_arguments
from mmdist.registry import MODELS, no_such_type

from .class_map import check_class_map
from .classes import (
    ClassMatch,
    check_number,
    class_names_of_checkpoint,
    class_names_of_config,
    match_classes,
)
from .foreign import ForeignTeacher
from .renormalize import Renormalize

_HALF_PRECISION = dict(bf16=torch.bfloat16, fp16=torch.float16)


@dataclass(eq=False, repr=False)
class Teacher:
    """A frozen model beside the student: not a module of it, never saved or trained.

    :meth:`load` builds and loads it; the Runner triggers that only for training.

    Args:
        config: Config of the teacher: a path, ``pkg::path``, a Config, or the config
            dict of the model alone.
        checkpoint: Path or URL of the weights. A :class:`ForeignTeacher` loads its own.
        allow_random: Permit ``checkpoint=None``, a teacher with random weights.
        class_map: For each student class that the teacher names differently, the
            teacher's name, or a list of names that are one class to the student.
        class_match: ``'strict'``: one side must know all classes of the other.
            ``'shared'``: only the classes that both know are compared, and the log
            lists them once.
        weights_only: False lets the checkpoint run code while it is read; for trusted
            files that the safe loader refuses.
        dtype: 'bf16' or 'fp16' keeps the weights in half precision, which halves their
            memory, and runs the teacher under autocast of that type.
        channels_last: Keep the weights in the channels_last memory format.
        compile: Compile the backbone and the neck with torch.compile.
        views: ``['flip']``: the teacher also sees the mirrored images, and its
            probabilities are averaged; for dense comparisons.

    Attributes:
        name: Where its arguments are in the config.
        classes: Which of its columns are the student's classes; None until these are
            known.

    Raises:
        ValueError: ``dtype``, ``class_map``, ``class_match`` or ``views`` is invalid.
    """

    config: str | os.PathLike | Config | dict
    checkpoint: str | None = None
    allow_random: bool = False
    class_map: Mapping[str, str | Sequence[str]] | None = None
    class_match: str = 'strict'
    weights_only: bool = True
    dtype: str | None = None
    channels_last: bool = False
    compile: bool = False
    views: Sequence[str] = ()

    name = 'teacher'

    def __post_init__(self) -> None:
        for key, known, words in (
            ('dtype', (None, *_HALF_PRECISION), "'bf16' or 'fp16'"),
            ('class_match', ('strict', 'shared'), "'strict' or 'shared'"),
            ('views', ((), [], ('flip',), ['flip']), "['flip'] or omitted"),
        ):
            if (value := getattr(self, key)) not in known:
                raise ValueError(f'`teacher.{key}` must be {words}, got {value!r}.')
        check_class_map(self.class_map)
        self.dtype = _HALF_PRECISION.get(self.dtype)
        self.views = tuple(self.views)
        self.model: nn.Module | None = None
        self.renormalize: Renormalize | None = None
        self.class_names: Sequence[str] | None = None
        self.classes: ClassMatch | None = None

    @property
    def origin(self) -> str:
        """A description of where the weights come from."""
        if self.checkpoint is not None:
            return self.checkpoint
        return 'random weights' if self.allow_random else 'weights of its own'

    # The model belongs to one student. A copy of the student, made by EMA or read from
    # a file, has none to move, cast or train: it loads its own if it is ever trained.

    def __deepcopy__(self, memo: dict) -> Teacher:
        return copy(self)

    def __getstate__(self) -> dict:
        return {**self.__dict__, 'model': None}

    @property
    def device(self) -> torch.device:
        """Device of the model; one from another library can have buffers only."""
        tensors = itertools.chain(self.model.parameters(), self.model.buffers())
        return next(tensors).device

    def move_to(self, device: torch.device) -> None:
        """Move the model, since FSDP moves the student's tensors without ``_apply``."""
        if self.device != device:
            self.apply(lambda tensor: tensor.to(device))

    def apply(self, fn) -> None:
        """Follow ``.to()``, ``.cuda()`` and ``.half()`` of the student."""
        if self.model is not None:
            self.model._apply(fn)

    def build(self) -> nn.Module:
        """Build a model from the config, without its weights; it is not kept."""
        return build_model(self._load_config())

    def load(self, student: nn.Module) -> None:
        """Build the teacher, load its weights strictly and freeze it.

        The student provides the device, the weights' dtype and the normalisation of
        the batches.

        Raises:
            ValueError: There is no checkpoint and ``allow_random`` is not set, or the
                numbers of class names and classes differ.
            RuntimeError: A key is missing, unexpected or has another shape, or the file
                cannot be read.
            FileNotFoundError: There is no such file.
        """
        if self.model is not None:
            return
        config = self._load_config()
        cls = _foreign_class(config, f'{self.name}.config')
        needs_weights = self.checkpoint is None and cls is None
        if needs_weights and not self.allow_random:
            raise ValueError(
                'The teacher has no checkpoint. Give `teacher.checkpoint`, a path or a '
                'URL, or set `teacher.allow_random=True` if you want random weights.'
            )
        model = build_model(config, random=needs_weights)
        names = getattr(model, 'class_names', None)
        if self.checkpoint is not None:
            checkpoint = load_checkpoint(self.checkpoint, self.weights_only)
            load_strictly(model, checkpoint, self.checkpoint)
            names = class_names_of_checkpoint(checkpoint) or names
        self.class_names = names or class_names_of_config(config)
        if self.class_names is not None:
            check_number(self.class_names, model)
        model.requires_grad_(False).eval()
        weight = next(student.parameters())
        model.to(weight.device)
        # before the cast, which rounds mean and std too
        self.renormalize = Renormalize(
            student.data_preprocessor, model.data_preprocessor
        )
        # LD's own `to` takes only a device
        nn.Module.to(model, self.dtype or weight.dtype)
        if self.channels_last:
            nn.Module.to(model, memory_format=torch.channels_last)
        if self.compile:
            for part in ('backbone', 'neck'):
                if hasattr(model, part):
                    getattr(model, part).compile()
        self.model = model

    def follow(self, student: nn.Module) -> None:
        """Update from the student at the start of a step; see :class:`MeanTeacher`."""

    @contextmanager
    def running(self) -> Iterator[None]:
        """Context for all computations of the teacher: no gradients, its own dtype."""
        half = nullcontext()
        if self.dtype is not None:
            half = torch.autocast(self.device.type, self.dtype)
        with torch.no_grad(), half:
            yield

    def _load_config(self) -> Config:
        key = f'{self.name}.config'
        config = load_config(self.config, key)
        if (cls := _foreign_class(config, key)) is not None:
            check_arguments(key, cls, config.model)
        return config

    def match_classes(self, student_classes: Sequence[str] | None) -> ClassMatch:
        """Find the teacher's column for each class of the student's data set.

        Raises:
            ValueError: The classes cannot be matched by name.
        """
        if getattr(self.model, 'gives', '') == 'features':  # those have no classes
            return ClassMatch()
        match = match_classes(
            student_classes, self.class_names, self.class_map, self.class_match
        )
        if student_classes is None or self.class_names is None:
            whose = 'student' if student_classes is None else 'teacher'
            print_log(
                f'The class names of the {whose} are unknown: student and teacher are '
                'assumed to have the same classes in the same order.',
                logger='current',
                level=logging.WARNING,
            )
        elif match != ClassMatch() or self.class_map or self.class_match == 'shared':
            text = match.describe(student_classes, self.class_names, most=8)
            print_log(f'mmdist: `{self.name}`. {text}', 'current')
        return match


def load_config(
    config: str | os.PathLike | Config | dict, key: str = 'config'
) -> Config:
    """The teacher's config, with a ``model``.

    For a distillation config, its model is the student. A top-level
    ``data_preprocessor`` becomes the model's, as in the Runner.

    Args:
        config: A path, ``pkg::path``, a Config, or the config dict of a model.
        key: Name of the option, for errors.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is none of these, cannot be read, or has no ``model``.
    """
    if isinstance(config, (str, os.PathLike)):
        config = read_config(config, key)
    elif not isinstance(config, (Mapping, Config)):
        raise ValueError(
            f"`{key}` must be the path of a config, 'package::path' or a dict, got "
            f'{config!r:.100}.'
        )
    elif 'model' in config:
        config = Config(deepcopy(dict(config)))
    else:
        config = Config(dict(model=deepcopy(config)))
    if not isinstance(config.get('model'), Mapping) or not config.model:
        raise ValueError(f'`{key}` has no `model`, which must be a dict.')
    preprocessor = config.model.get(
        'data_preprocessor', config.get('data_preprocessor')
    )
    if config.model.get('student') is not None:
        config.model = config.model.student
    if preprocessor is not None:
        config.model.setdefault('data_preprocessor', preprocessor)
    return config


def read_config(path: str | os.PathLike, key: str = 'config') -> Config:
    """Read the config of a path or ``pkg::path``; raises like :func:`load_config`."""
    path = os.fspath(path)
    _check_path(path, key)
    try:
        if '::' in path:
            # Not mmengine.hub.get_config: it pip-installs missing packages.
            return Config.fromstring(f'_base_ = {path!r}', '.py')
        return Config.fromfile(path)
    except Exception as error:  # it is Python: anything can go wrong
        said = ' '.join(f'{type(error).__name__}: {error}'.split())
        raise ValueError(
            f'`{key}` is {path!r}, which cannot be read: {said:.300}'
        ) from error


def _check_path(config: str, key: str) -> None:
    """Raise FileNotFoundError, with similar names, if there is no such config."""
    package, _, inner = config.rpartition('::')
    path = Path(inner).absolute()
    if package:
        origin = getattr(find_spec(package), 'origin', None)
        if origin is None:
            raise FileNotFoundError(
                f'`{key}` is {config!r}, but {package!r} is not installed.'
            )
        path = Path(origin).parent / '.mim/configs' / inner
    if path.is_file():
        return
    while not path.parent.is_dir():
        path = path.parent
    near = difflib.get_close_matches(path.name, os.listdir(path.parent))
    text = f'`{key}` is {config!r}, but there is no {path.name!r} in {path.parent}'
    text += f'; similar: {", ".join(near)}.' if near else '.'
    if not package and not os.path.isabs(config):
        text += (
            f' Relative paths count from the working directory, {os.getcwd()}. To '
            "count from the config, begin the path with '{{ fileDirname }}/'."
        )
    raise FileNotFoundError(text)


def _foreign_class(config: Config, key: str) -> type[ForeignTeacher] | None:
    """Return a model's class if it is a ForeignTeacher, which loads its own weights."""
    kind, scope = config.model.get('type'), config.get('default_scope')
    with MODELS.switch_scope_and_registry(scope) as registry:
        cls = registry.get(kind) if isinstance(kind, str) else kind
        if cls is None:
            raise ValueError(f'`{key}`: {no_such_type(kind, registry)}')
    return cls if inspect.isclass(cls) and issubclass(cls, ForeignTeacher) else None


def build_model(config: Config, random: bool = False) -> nn.Module:
    """Build a model without pretrained weights; leave the student's RNG untouched."""
    cfg = without_pretrained(config.model)
    scope = config.get('default_scope')
    with torch.random.fork_rng(devices=[]), DefaultScope.overwrite_default_scope(scope):
        model = MODELS.build(cfg)
        if random and hasattr(model, 'init_weights'):
            model.init_weights()
    return revert_sync_batchnorm(model)  # the same in eval mode


def without_pretrained(cfg: Any) -> Any:
    """Copy a model's config so that it loads no pretrained weights when initialised."""
    if isinstance(cfg, Mapping):
        kept = {key: without_pretrained(value) for key, value in cfg.items()}
        if 'pretrained' in kept:
            kept['pretrained'] = None
        init_cfg = kept.get('init_cfg')
        # PVT's has a checkpoint, but no type
        if isinstance(init_cfg, Mapping) and 'checkpoint' in init_cfg:
            del kept['init_cfg']
        return ConfigDict(kept)
    if isinstance(cfg, (list, tuple)):
        return type(cfg)(without_pretrained(value) for value in cfg)
    return deepcopy(cfg)
