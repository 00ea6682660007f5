"""The teacher: found, loaded strictly, frozen, and shown what it was trained on."""

from __future__ import annotations

import logging
import os
import pickle
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from mmengine.config import Config, ConfigDict
from mmengine.logging import print_log
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import DATASETS, DefaultScope
from mmengine.runner import CheckpointLoader
from torch import Tensor, nn

from mmdist.registry import MODELS

_HALF_PRECISION = dict(bf16=torch.bfloat16, fp16=torch.float16)


class Teacher:
    """A frozen guest of the student: not a module of it, never saved, never trained.

    It is built and loaded by :meth:`load`, which the Runner triggers only to train.

    Args:
        config: Config of the teacher: a path, ``pkg::path``, a Config, or the config
            dict of the model alone.
        checkpoint: Path or URL of its weights.
        allow_random: Permit ``checkpoint=None``, a teacher with random weights.
        class_map: Name of the teacher's class for each name of the student's, where
            the two name the same thing differently.
        weights_only: False lets the checkpoint run code while it is read; for files of
            trusted origin that the safe loader refuses.
        dtype: 'bf16' or 'fp16' keeps the weights in half precision, half the memory,
            and runs the teacher under autocast of that type.
        channels_last: Keep the weights in the memory format channels_last.
        compile: Compile the backbone and the neck with torch.compile.

    Raises:
        ValueError: ``dtype`` is neither of the two.
    """

    def __init__(
        self,
        config: str | os.PathLike | Config | dict,
        checkpoint: str | None = None,
        allow_random: bool = False,
        class_map: Mapping[str, str] | None = None,
        weights_only: bool = True,
        dtype: str | None = None,
        channels_last: bool = False,
        compile: bool = False,
    ) -> None:
        if dtype not in (None, *_HALF_PRECISION):
            raise ValueError(
                f'`teacher.dtype` is one of {list(_HALF_PRECISION)} or None, '
                f'got {dtype!r}.'
            )
        self.config = config
        self.checkpoint = checkpoint
        self.allow_random = allow_random
        self.class_map = class_map
        self.weights_only = weights_only
        self.dtype = _HALF_PRECISION.get(dtype)
        self.channels_last = channels_last
        self.compile = compile
        self.model: nn.Module | None = None
        self.class_names: Sequence[str] | None = None
        self.classes = ClassMatch()

    def __deepcopy__(self, memo: dict) -> Teacher:
        # A copy of the student (EMA makes one) has the same guest, not a second one.
        return self

    def apply(self, fn) -> None:
        """Follow ``.to()``, ``.cuda()`` and ``.half()`` of the student."""
        if self.model is not None:
            self.model._apply(fn)

    def build(self) -> nn.Module:
        """A model of the teacher's config, without its weights; it is not kept."""
        return _build(load_config(self.config), random=False)

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
        if self.checkpoint is None and not self.allow_random:
            raise ValueError(
                'The teacher has no checkpoint. Give `teacher.checkpoint`, a path or a '
                'URL, or set `teacher.allow_random=True` if random weights are meant.'
            )
        config = load_config(self.config)
        model = _build(config, random=self.checkpoint is None)
        self.class_names = _class_names_of_config(config)
        if self.checkpoint is not None:
            checkpoint = load_checkpoint(self.checkpoint, self.weights_only)
            load_strictly(model, checkpoint, self.checkpoint)
            self.class_names = (
                _class_names_of_checkpoint(checkpoint) or self.class_names
            )
        model.requires_grad_(False).eval()
        model.to(next(student.parameters()).device, self.dtype)
        if self.channels_last:
            model.to(memory_format=torch.channels_last)
        if self.compile:
            for part in ('backbone', 'neck'):
                if hasattr(model, part):
                    getattr(model, part).compile()
        self.renormalize = Renormalize(
            student.data_preprocessor, model.data_preprocessor
        )
        self.model = model

    @contextmanager
    def running(self) -> Iterator[None]:
        """Whatever the teacher computes is computed within: no gradient, its dtype."""
        device = next(self.model.parameters()).device.type
        half = (
            nullcontext() if self.dtype is None else torch.autocast(device, self.dtype)
        )
        with torch.no_grad(), half:
            yield

    def match_classes(self, student_classes: Sequence[str] | None) -> None:
        """Find the teacher's column of each of the student's classes.

        Args:
            student_classes: Class names of the student's dataset; None if unknown.

        Raises:
            ValueError: The classes cannot be matched by name; it prints both lists.
        """
        if student_classes is None or self.class_names is None:
            whose = 'student' if student_classes is None else 'teacher'
            print_log(
                f'The class names of the {whose} are unknown: student and teacher are '
                'taken to have the same classes in the same order.',
                logger='current',
                level=logging.WARNING,
            )
        self.classes = match_classes(student_classes, self.class_names, self.class_map)


# ---- config ----------------------------------------------------------------------


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


def _build(config: Config, random: bool) -> nn.Module:
    """Build without pretrained backbones, and without touching the student's RNG."""
    cfg = _without_pretrained(config.model)
    scope = config.get('default_scope')
    with torch.random.fork_rng(), DefaultScope.overwrite_default_scope(scope):
        model = MODELS.build(cfg)
        if random and hasattr(model, 'init_weights'):
            model.init_weights()
    return revert_sync_batchnorm(model)  # in eval they are the same


def _without_pretrained(cfg: Any) -> Any:
    if isinstance(cfg, Mapping):
        init_cfg = cfg.get('init_cfg')
        return ConfigDict(
            {
                key: None if key == 'pretrained' else _without_pretrained(value)
                for key, value in cfg.items()
                if not (
                    key == 'init_cfg'
                    and isinstance(init_cfg, Mapping)
                    and init_cfg.get('type') == 'Pretrained'
                )
            }
        )
    if isinstance(cfg, (list, tuple)):
        return type(cfg)(_without_pretrained(value) for value in cfg)
    return deepcopy(cfg)


# ---- weights ---------------------------------------------------------------------


def load_checkpoint(path: str, weights_only: bool = True) -> dict:
    """Read a checkpoint with torch's safe loader.

    Args:
        path: Path or URL, whatever mmengine's ``CheckpointLoader`` reads.
        weights_only: False lets the file run code.

    Raises:
        FileNotFoundError: There is no such file.
        RuntimeError: The file is damaged, or cannot be read safely.
    """
    try:
        with _loader_forced(weights_only):
            return CheckpointLoader.load_checkpoint(path, map_location='cpu')
    except FileNotFoundError:
        raise FileNotFoundError(
            f'The checkpoint {path!r} does not exist. Relative paths count from the '
            f'working directory, {os.getcwd()!r}.'
        ) from None
    except pickle.UnpicklingError as error:
        if weights_only and 'global' in str(error).lower():
            raise RuntimeError(
                f'The checkpoint {path!r} holds objects that the safe loader does not '
                'read: reading them could run code of its author. If you trust the '
                'file, set `teacher.weights_only=False` (a tool: --no-weights-only). '
                f'The loader says: {error}'
            ) from error
        raise RuntimeError(_DAMAGED.format(path, error)) from error
    except (EOFError, RuntimeError) as error:
        raise RuntimeError(_DAMAGED.format(path, error)) from error


_DAMAGED = (
    'The checkpoint {!r} cannot be read: it is damaged, cut off or no checkpoint at '
    'all. Fetch it again. The loader says: {}'
)


@contextmanager
def _loader_forced(weights_only: bool) -> Iterator[None]:
    """Decide for every ``torch.load`` below, whichever way mmengine calls it."""
    name = f'TORCH_FORCE_{"" if weights_only else "NO_"}WEIGHTS_ONLY_LOAD'
    before = os.environ.get(name)
    os.environ[name] = '1'
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def load_strictly(model: nn.Module, checkpoint: dict, path: str) -> None:
    """Load weights; any missing, unexpected or mis-shaped key is an error.

    Args:
        model: The model to fill.
        checkpoint: A checkpoint with a ``state_dict``, or a state dict.
        path: Where it came from, for the message.

    Raises:
        RuntimeError: It lists up to ten keys of each sort.
    """
    state = checkpoint.get('state_dict', checkpoint)
    prefix = 'module.'  # saved from within DistributedDataParallel
    if state and all(key.startswith(prefix) for key in state):
        state = {key[len(prefix) :]: value for key, value in state.items()}
    missing, unexpected, errors = [], [], []
    metadata = getattr(state, '_metadata', {})
    state = dict(state)

    def load(module: nn.Module, prefix: str = '') -> None:
        # As torch's load_state_dict, which lists no keys once a shape is wrong. It runs
        # the models' own conversions of older checkpoints.
        module._load_from_state_dict(
            state,
            prefix,
            metadata.get(prefix[:-1], {}),
            True,
            missing,
            unexpected,
            errors,
        )
        for name, child in module.named_children():
            load(child, f'{prefix}{name}.')

    load(model)
    problems = {
        'missing in the file': missing,
        'in the file, but not in the model': sorted(set(unexpected)),
        'of another shape': [' '.join(error.split()) for error in errors],
    }
    if any(problems.values()):
        lines = [f"The weights in {path!r} do not fit the teacher's config."]
        for what, keys in problems.items():
            if keys:
                lines.append(f'{len(keys)} {what}:')
                lines += [f'    {key}' for key in keys[:10]]
                lines += [f'    ... and {len(keys) - 10} more'] * (len(keys) > 10)
        lines.append(
            'Check that `teacher.config` is the very config this checkpoint was '
            'trained with (backbone, depth, neck, number of classes).'
        )
        raise RuntimeError('\n'.join(lines))


# ---- images ----------------------------------------------------------------------


class Renormalize:
    """Maps a batch from the student's normalisation to the teacher's.

    Both are affine per channel, so the map is one affine step (after a swap of the
    channels where one wants RGB and the other BGR); the padding is filled again with
    the teacher's value.

    Args:
        student: The student's data_preprocessor.
        teacher: The teacher's data_preprocessor.
    """

    def __init__(self, student: nn.Module, teacher: nn.Module) -> None:
        mean_s, std_s = _mean_std(student)
        mean_t, std_t = _mean_std(teacher)
        self.flip = _swaps_channels(student) != _swaps_channels(teacher)
        if self.flip:
            mean_s, std_s = mean_s.flip(0), std_s.flip(0)
        self.scale = (std_s / std_t).float()
        self.shift = ((mean_s - mean_t) / std_t).float()
        self.fill = _pad_value(teacher)
        self.refill = self.fill != _pad_value(student)
        self.rescale = not (
            torch.all(self.scale == 1).item() and torch.all(self.shift == 0).item()
        )

    def __call__(
        self, inputs: Tensor, valid_sizes: Sequence[tuple[int, int]]
    ) -> Tensor:
        """Map a batch.

        Args:
            inputs: (N, C, H, W), normalised and padded as the student's.
            valid_sizes: Height and width of each image without padding.

        Returns:
            (N, C, H, W), as the teacher's data_preprocessor would have given it;
            ``inputs`` itself where the two agree.
        """
        outputs = inputs.flip(1) if self.flip else inputs
        if self.rescale:
            self.scale, self.shift = (
                t.to(inputs.device) for t in (self.scale, self.shift)
            )
            outputs = outputs * self.scale + self.shift
        if self.rescale or self.refill:
            if outputs is inputs:
                outputs = inputs.clone()
            for image, (height, width) in zip(outputs, valid_sizes, strict=True):
                image[:, height:] = self.fill
                image[:, :, width:] = self.fill
        return outputs


def _mean_std(preprocessor: nn.Module) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation, each (C, 1, 1), in float64 on the CPU."""
    if getattr(preprocessor, 'mean', None) is None:
        return torch.zeros(1, 1, 1).double(), torch.ones(1, 1, 1).double()
    return preprocessor.mean.double().cpu(), preprocessor.std.double().cpu()


def _swaps_channels(preprocessor: nn.Module) -> bool:
    """Whether images are turned from BGR to RGB, by either library's name for it."""
    return bool(
        getattr(preprocessor, '_channel_conversion', False)
        or getattr(preprocessor, 'channel_conversion', False)
    )


def _pad_value(preprocessor: nn.Module) -> float:
    """The value of padded pixels; mmdet and mmseg name it differently."""
    return getattr(preprocessor, 'pad_value', getattr(preprocessor, 'pad_val', 0))


# ---- classes ---------------------------------------------------------------------


@dataclass
class ClassMatch:
    """Which columns of the two sides are the same class.

    Attributes:
        student: The student's columns to compare; None for all in their order.
        teacher: The teacher's columns of the same classes; None for all in order.
        num_student: Number of the student's classes.
        num_teacher: Number of the teacher's classes.
    """

    student: list[int] | None = None
    teacher: list[int] | None = None
    num_student: int | None = None
    num_teacher: int | None = None

    def select(self, student: Tensor, teacher: Tensor, dim: int = 1) -> tuple:
        """Take the common classes of both, in the same order, along ``dim``.

        Columns after the named classes (the background of a softmax head) are kept.
        """
        return (
            _select(student, self.student, self.num_student, dim),
            _select(teacher, self.teacher, self.num_teacher, dim),
        )


def _select(
    logits: Tensor, columns: list[int] | None, num_classes: int | None, dim: int
) -> Tensor:
    if columns is None:
        return logits
    columns = [*columns, *range(num_classes, logits.size(dim))]
    return logits.index_select(dim, torch.tensor(columns, device=logits.device))


def match_classes(
    student: Sequence[str] | None,
    teacher: Sequence[str] | None,
    class_map: Mapping[str, str] | None = None,
) -> ClassMatch:
    """Match classes by name.

    Equal lists need no mapping; another order, or one list within the other, is mapped.

    Args:
        student: The student's class names; None if unknown.
        teacher: The teacher's class names; None if unknown.
        class_map: The teacher's name for each name of the student's that differs.

    Raises:
        ValueError: Neither list holds the other; it prints both.
    """
    if student is None or teacher is None:
        return ClassMatch()
    student, teacher = list(student), list(teacher)
    unknown = sorted(
        (set(class_map or ()) - set(student))
        | (set((class_map or {}).values()) - set(teacher))
    )
    if unknown:
        raise ValueError(
            f'`teacher.class_map` maps names of the student to names of the teacher, '
            f'but neither has {unknown}.\nStudent: {student}\nTeacher: {teacher}'
        )
    wanted = [(class_map or {}).get(name, name) for name in student]
    if wanted == teacher:
        return ClassMatch()
    common = [i for i, name in enumerate(wanted) if name in teacher]
    if common and len(common) in (len(wanted), len(teacher)):
        return ClassMatch(
            student=None if len(common) == len(wanted) else common,
            teacher=[teacher.index(wanted[i]) for i in common],
            num_student=len(student),
            num_teacher=len(teacher),
        )
    raise ValueError(
        'The classes of student and teacher cannot be matched by name.\n'
        f'Student ({len(student)}): {student}\nTeacher ({len(teacher)}): {teacher}\n'
        f'Only the student has {sorted(set(wanted) - set(teacher))}, only the teacher '
        f'{sorted(set(teacher) - set(wanted))}. If they are the same under other '
        "names, say so: `teacher.class_map=dict(<student's>=<teacher's>, ...)`."
    )


def _class_names_of_checkpoint(checkpoint: dict) -> Sequence[str] | None:
    meta = checkpoint.get('meta') or {}
    dataset_meta = {k.lower(): v for k, v in (meta.get('dataset_meta') or {}).items()}
    # 'CLASSES': mmdet 2.x and mmseg 0.x.
    return dataset_meta.get('classes') or meta.get('CLASSES')


def _class_names_of_config(config: Config) -> Sequence[str] | None:
    """Names of the dataset that the config trains or tests on, through wrappers."""
    scope = config.get('default_scope')
    for loader in ('train_dataloader', 'val_dataloader', 'test_dataloader'):
        dataset = (config.get(loader) or {}).get('dataset')
        while dataset:
            classes = (dataset.get('metainfo') or {}).get('classes')
            if classes is None and isinstance(dataset.get('type'), str):
                classes = _class_names_of_type(
                    dataset['type'], dataset.get('_scope_', scope)
                )
            if classes is not None:
                return (classes,) if isinstance(classes, str) else tuple(classes)
            inner = dataset.get('dataset') or dataset.get('datasets')
            dataset = inner[0] if isinstance(inner, list) else inner
    return None


def _class_names_of_type(dataset_type: str, scope: str | None) -> Sequence[str] | None:
    try:
        with (
            DefaultScope.overwrite_default_scope(scope),
            DATASETS.switch_scope_and_registry(None) as registry,
        ):
            cls = registry.get(dataset_type)
    except RuntimeError:  # not registered: the teacher's dataset is not installed here
        return None
    return getattr(cls, 'METAINFO', {}).get('classes')
