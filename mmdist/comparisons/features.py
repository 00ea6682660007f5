"""Feature maps of any module: the mimic of "DIST + mimic", and PKD."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from mmengine.logging import print_log
from mmengine.structures import BaseDataElement
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from mmdist.families import name_of
from mmdist.families.probabilities import fp32
from mmdist.record import Recorder
from mmdist.registry import MODELS
from mmdist.step import Step
from mmdist.teachers import ForeignTeacher, Teacher

from .base import Comparison, Pair


@MODELS.register_module()
class Features(Comparison):
    """Compare the maps that a module of each side returns, level by level.

    As published for "DIST + mimic" (Huang et al., NeurIPS 2022, section 4.2),
    ``dict(type='mmdist.Features', adapt=True)`` takes the mean squared error on each
    level of the FPN, after 1x1 convolutions on the student's maps. The terms of the
    levels are summed.

    With ``loss=dict(type='mmdist.DISTLoss', beta=0)`` and ``adapt=False`` it is PKD
    (Cao et al., NeurIPS 2022, arXiv 2207.02039, equation 6): Pearson's correlation of
    each channel over all locations of the batch. Neither scale nor offset of the
    teacher's features matter, so it suits a teacher of another architecture.

    The 1x1 convolutions are parameters of the student, ``distill.<name>.adapters``:
    trained, saved and resumed with it. ``tools/export_student.py`` leaves them out.
    They are made with the model, which requires the channels: unless
    ``student_channels`` and ``teacher_channels`` are given, the student, and the
    teacher built from its config without weights, are run once on zeros. A config that
    cannot be built stops training, but not a test.

    Args:
        student: Path of the student's module, as in ``named_modules()``. It returns a
            map, (N, C, h, w), or several in a tuple, list or dict.
        teacher: Path of the teacher's module; the student's if omitted.
        loss: Config of the loss; ``torch.nn.MSELoss`` if omitted. It is called with
            two maps, (N, C, h, w) in fp32, and, if it takes a mask, with the mask of
            the locations that are not padding.
        adapt: Which of the student's maps get a 1x1 convolution: the levels whose
            channels differ (None), every level (True), or none (False).
        levels: Indices of the student's maps to compare; all if omitted. ``'stride'``
            pairs the maps of the same stride and ignores the others: RetinaNet's FPN
            has the strides 8 to 128, Faster R-CNN's 4 to 64.
        teacher_levels: Indices of the teacher's maps; ``levels`` if omitted.
        student_channels: Channels of the student's compared maps, per level.
        teacher_channels: Channels of the teacher's compared maps, per level, or one
            number for all.
        weight: Factor of the loss.
    """

    families = (
        'any model, by the path of a module that returns maps (N, C, h, w), such as '
        '`neck` or `backbone`'
    )

    def __init__(
        self,
        student: str = 'neck',
        teacher: str | None = None,
        loss: dict | None = None,
        adapt: bool | None = None,
        levels: Sequence[int] | str | None = None,
        teacher_levels: Sequence[int] | None = None,
        student_channels: Sequence[int] | None = None,
        teacher_channels: int | Sequence[int] | None = None,
        weight: float = 1.0,
    ) -> None:
        super().__init__(loss or dict(type='torch.nn.MSELoss'))
        if isinstance(levels, str) and (levels != 'stride' or teacher_levels):
            raise ValueError(
                "`levels` of Features must be indices, or 'stride' without "
                f'`teacher_levels`, got {levels!r} and teacher_levels={teacher_levels}.'
            )
        self.student_path = student
        self.teacher_path = teacher or student
        self.adapt = adapt
        self.levels = levels
        self.teacher_levels = levels if teacher_levels is None else teacher_levels
        self.student_channels = student_channels
        self.teacher_channels = teacher_channels
        self.weight = weight
        self.adapters: nn.ModuleList | None = None
        self._not_adapted = ''  # why the adapters could not be made

    def activation(self, student: nn.Module) -> str:
        """Features are not logits."""
        return 'identity'

    def student_modules(self, student: nn.Module) -> Sequence[nn.Module]:
        """The student's module."""
        return [self._module(student, self.student_path, 'student')]

    def teacher_modules(self, teacher: nn.Module) -> Sequence[nn.Module]:
        """The teacher's module."""
        return [self._module(teacher, self.teacher_path, 'teacher')]

    def bind(self, student: nn.Module, teacher: Teacher) -> None:
        """Check the path, complete the loss, and make the 1x1 convolutions."""
        super().bind(student, teacher)
        try:
            if self.levels == 'stride':
                self._pair_by_stride(student, _built(teacher))
            if self.adapt is not False:
                self._make_adapters(student, teacher)
        except _NotRun as error:  # a test must work without the teacher
            self._not_adapted = str(error)

    def _make_adapters(self, student: nn.Module, teacher: Teacher) -> None:
        ours, theirs = self.student_channels, self.teacher_channels
        if ours is None:
            ours = [x.size(1) for x in self._dry_maps(student, 'student', self.levels)]
        if theirs is None:
            maps = self._dry_maps(_built(teacher), 'teacher', self.teacher_levels)
            theirs = [x.size(1) for x in maps]
        elif isinstance(theirs, int):
            theirs = [theirs] * len(ours)
        self._check_number(len(ours), len(theirs))
        if self.adapt or list(ours) != list(theirs):
            # Forked, so the student's initial weights are as without distillation.
            with torch.random.fork_rng(devices=[]):
                self.adapters = nn.ModuleList(
                    nn.Conv2d(s, t, 1) if self.adapt or s != t else nn.Identity()
                    for s, t in zip(ours, theirs, strict=True)
                )

    def _pair_by_stride(self, student: nn.Module, teacher: nn.Module) -> None:
        """Set ``levels`` to the maps whose strides both models have."""
        ours, theirs = (
            [round(512 / x.size(3)) for x in self._dry_maps(*side, None, (512,))]
            for side in ((student, 'student'), (teacher, 'teacher'))
        )
        common = [(i, theirs.index(s)) for i, s in enumerate(ours) if s in theirs]
        if not common:
            raise ValueError(
                "Features: levels='stride' pairs no maps: the student's "
                f"`{self.student_path}` has the strides {ours}, the teacher's "
                f'`{self.teacher_path}` {theirs}. Give indices, `levels` and '
                "`teacher_levels`; the teacher's maps are resized."
            )
        self.levels, self.teacher_levels = map(list, zip(*common, strict=True))
        print_log(
            'Features compares the maps of the strides '
            f'{[ours[i] for i, _ in common]}. The student has {ours}, the teacher '
            f'{theirs}.',
            logger='current',
        )

    def _dry_maps(
        self,
        model: nn.Module,
        whose: str,
        levels: Sequence[int] | None,
        sizes: Sequence[int] = (128, 512),
    ) -> list[Tensor]:
        """Run the model on a batch of zeros and return its maps.

        Raises:
            _NotRun: The model cannot be run.
        """
        path, name = getattr(self, f'{whose}_path'), name_of(model)
        module = self._module(model, path, whose)
        try:
            calls = _dry_run(model, module, sizes)
        except Exception as error:
            reason = f'{type(error).__name__}: {error}'
            raise _NotRun(f'{name} fails on a batch of zeros, {reason}') from error
        if not calls:
            raise _NotRun(f'{name} did not run its `{path}` in a forward pass.')
        return self._maps(calls, path, levels)

    def check_pair(self, student: nn.Module, teacher: nn.Module) -> None:
        """The teacher must have the module, and its channels must be known."""
        self._module(teacher, self.teacher_path, 'teacher')
        if self._not_adapted:
            raise RuntimeError(
                'Features could not determine the sizes and channels of the maps, '
                'which the 1x1 convolutions need, when the model was built: '
                f'{self._not_adapted}\n'
                f"Fix that, or set `student_channels` (of the student's "
                f"`{self.student_path}`) and `teacher_channels` (of the teacher's "
                f'`{self.teacher_path}`), or `adapt=False` for no convolution, and the '
                'indices of the maps, `levels` and `teacher_levels`.'
            )

    def record(self, step: Step) -> list[Tensor]:
        """The student's maps, as it computed them for its own loss."""
        module = self._module(step.student, self.student_path, 'student')
        return self._maps(step.calls(module), self.student_path, self.levels)

    asks_first = True

    def ask(self, step: Step, recorded: None) -> list[Tensor]:
        """The teacher's maps."""
        module = self._module(step.teacher_model, self.teacher_path, 'teacher')
        calls = step.teacher_calls(module)
        if not calls:
            raise RuntimeError(
                f'The teacher did not run its `{self.teacher_path}` in a forward pass, '
                'so there is nothing to compare. Choose another module.'
            )
        return self._maps(calls, self.teacher_path, self.teacher_levels)

    def pair(
        self, step: Step, recorded: list[Tensor], asked: list[Tensor]
    ) -> list[Pair]:
        """One pair per level, with the teacher's map resized to the student's."""
        self._check_number(len(recorded), len(asked))
        pairs = []
        for level, (student, teacher) in enumerate(zip(recorded, asked, strict=True)):
            if self.adapters is not None:
                student = self.adapters[level](student)
            if student.size(1) != teacher.size(1):
                raise ValueError(
                    f"Features: map {level} of the student's `{self.student_path}` has "
                    f"{student.size(1)} channels, that of the teacher's "
                    f'`{self.teacher_path}` {teacher.size(1)}. Omit `adapt` and '
                    '`teacher_channels`: 1x1 convolutions then adapt them.'
                )
            student, teacher = fp32(student), fp32(teacher)
            size = student.shape[-2:]
            if teacher.shape[-2:] != size:
                # Not the student's: the gradient should be that of its own map.
                teacher = F.interpolate(teacher, size, mode='bilinear')
            pairs.append(Pair(student, teacher, step.valid_mask(*size), self.weight))
        return pairs

    def _plain_loss(self, pair: Pair) -> Tensor:
        # Maps, not rows: a loss may depend on locations.
        mask = dict(mask=pair.mask) if self._loss_takes_mask else {}
        with torch.autocast(pair.student.device.type, enabled=False):
            return self.loss(pair.student, pair.teacher, **mask)

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args) -> None:
        if self._not_adapted:  # a test without the teacher's config
            for key in [key for key in state_dict if key.startswith(prefix)]:
                del state_dict[key]
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _module(self, model: nn.Module, path: str, whose: str) -> nn.Module:
        try:
            return model.get_submodule(path)
        except AttributeError:
            paths = [name for name, _ in model.named_modules()]
        close = difflib.get_close_matches(path, paths, n=3)
        names = ' or '.join(map(repr, close))
        top = ', '.join(name for name, _ in model.named_children())
        raise ValueError(
            f'Features: the {whose}, {name_of(model)}, has no module {path!r}. '
            + (f'Did you mean {names}?' if close else f'Its top-level modules: {top}.')
        )

    def _maps(
        self, calls: Sequence, path: str, levels: Sequence[int] | None
    ) -> list[Tensor]:
        outputs = tree_leaves([call.output for call in calls])
        tensors = [x for x in outputs if isinstance(x, Tensor)]
        maps = [x for x in tensors if x.ndim == 4]
        if not maps:
            raise ValueError(
                f'Features compares maps, (N, C, h, w), but `{path}` returned '
                f'{[tuple(x.shape) for x in tensors] or "no tensor"}. Choose another '
                'module, for example `neck` or `backbone`.'
            )
        num = len(maps)
        if levels is not None and not all(-num <= level < num for level in levels):
            raise ValueError(
                f'Features: `levels` are {list(levels)}, but `{path}` returned '
                f'{num} map(s), 0 to {num - 1}.'
            )
        return maps if levels is None else [maps[level] for level in levels]

    def _check_number(self, student: int, teacher: int) -> None:
        if student != teacher:
            raise ValueError(
                f"Features cannot compare {student} map(s) of the student's "
                f"`{self.student_path}` with {teacher} of the teacher's "
                f'`{self.teacher_path}`. Choose the same number of each with `levels` '
                'and `teacher_levels`.'
            )


class _NotRun(Exception):
    """A model could not be built or run to find its maps."""


def _built(teacher: Teacher) -> nn.Module:
    """The teacher without its weights."""
    try:
        return teacher.build()
    except Exception as error:  # any kind
        raise _NotRun(f'{type(error).__name__}: {error}') from error


def _dry_run(model: nn.Module, module: nn.Module, sizes: Sequence[int]) -> list:
    """The calls of ``module`` when ``model`` runs on a batch of zeros.

    The sizes are tried in order: some models, such as SSD, refuse small images.
    """
    reference = next(model.parameters())
    mean = getattr(getattr(model, 'data_preprocessor', None), 'mean', None)
    was_training = [m for m in model.modules() if m.training]
    model.eval()
    try:
        for size in sizes:
            shape = (size, size)
            zeros = reference.new_zeros(1, 3 if mean is None else len(mean), *shape)
            sizes_of = dict.fromkeys(
                ('img_shape', 'ori_shape', 'pad_shape', 'batch_input_shape'), shape
            )
            sample = BaseDataElement(metainfo=dict(sizes_of, scale_factor=(1.0, 1.0)))
            try:
                with (
                    torch.no_grad(),
                    torch.random.fork_rng(devices=[]),
                    Recorder([module]) as recorder,
                ):
                    if isinstance(model, ForeignTeacher):
                        model(zeros, [shape])
                        return recorder.calls(module)
                    model.extract_feat(zeros)
                    if not recorder.calls(module):
                        model(zeros, [sample], mode='tensor')
                return recorder.calls(module)
            except Exception:
                if size == sizes[-1]:
                    raise
    finally:
        for m in was_training:
            m.training = True
