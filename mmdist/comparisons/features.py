"""Feature maps of any module: the mimic of "DIST + mimic", and PKD."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from mmengine.logging import print_log
from mmengine.structures import BaseDataElement
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from mmdist.families import name_of
from mmdist.families.probabilities import fp32
from mmdist.record import Call, Recorder
from mmdist.registry import MODELS
from mmdist.step import Step
from mmdist.teachers import ForeignTeacher, Teacher

from .base import Comparison, Pair

# Height and width of a batch of zeros; some models, such as SSD, refuse small images.
DRY_SIZE = 512


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
    asks_first = True

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
        return [self._module(student, 'student')]

    def teacher_modules(self, teacher: nn.Module) -> Sequence[nn.Module]:
        """The teacher's module."""
        return [self._module(teacher, 'teacher')]

    def check_pair(self, student: nn.Module, teacher: nn.Module) -> None:
        """The teacher must have the module, and its channels must be known."""
        self._module(teacher, 'teacher')
        if self._not_adapted:
            raise RuntimeError(
                'The maps that Features compares could not be found when the model was '
                f'built: {self._not_adapted}\nFix that, or set `student_channels` and '
                f'`teacher_channels` (of {self._name("student")} and '
                f'{self._name("teacher")}) or `adapt=False` for no 1x1 convolutions, '
                'and `levels` and `teacher_levels`, the indices of the maps.'
            )

    def record(self, step: Step) -> list[Tensor]:
        """The student's maps, as it computed them for its own loss."""
        return self._maps(step.calls(self._module(step.student, 'student')), 'student')

    def ask(self, step: Step, recorded: None) -> list[Tensor]:
        """The teacher's maps."""
        calls = step.teacher_calls(self._module(step.teacher_model, 'teacher'))
        if not calls:
            raise RuntimeError(
                f'The teacher did not run its `{self.teacher_path}` in a forward pass, '
                'so there is nothing to compare. Choose another module.'
            )
        return self._maps(calls, 'teacher')

    def pair(
        self, step: Step, recorded: list[Tensor], asked: list[Tensor]
    ) -> list[Pair]:
        """One pair per level, with the teacher's map resized to the student's."""
        self._check_number(recorded, asked)
        pairs = []
        for level, (student, teacher) in enumerate(zip(recorded, asked, strict=True)):
            if self.adapters is not None:
                student = self.adapters[level](student)
            if student.size(1) != teacher.size(1):
                raise ValueError(
                    f'Features: map {level} of {self._name("student")} has '
                    f'{student.size(1)} channels, that of {self._name("teacher")} '
                    f'{teacher.size(1)}. Omit `adapt` and `teacher_channels`: 1x1 '
                    'convolutions then adapt them.'
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

    # ---- the 1x1 convolutions ----------------------------------------------------

    def bind(self, student: nn.Module, teacher: Teacher) -> None:
        """Check the path, complete the loss, and make the 1x1 convolutions."""
        super().bind(student, teacher)
        try:
            if self.levels == 'stride':
                self._pair_by_stride(student, teacher)
            if self.adapt is not False:
                self._make_adapters(student, teacher)
        except _NotRun as error:  # a test must work without the teacher
            self._not_adapted = str(error)

    def _make_adapters(self, student: nn.Module, teacher: Teacher) -> None:
        ours, theirs = self.student_channels, self.teacher_channels
        if ours is None:
            ours = [x.size(1) for x in self._dry_maps(student, 'student')]
        if theirs is None:
            theirs = [x.size(1) for x in self._dry_maps(teacher, 'teacher')]
        elif isinstance(theirs, int):
            theirs = [theirs] * len(ours)
        self._check_number(ours, theirs)
        if self.adapt or list(ours) != list(theirs):
            # Forked, so the student's initial weights are as without distillation.
            with torch.random.fork_rng(devices=[]):
                self.adapters = nn.ModuleList(
                    nn.Conv2d(s, t, 1) if self.adapt or s != t else nn.Identity()
                    for s, t in zip(ours, theirs, strict=True)
                )

    def _pair_by_stride(self, student: nn.Module, teacher: Teacher) -> None:
        """Set ``levels`` to the maps whose strides both models have."""
        self.levels = self.teacher_levels = None
        sides = self._dry_maps(student, 'student'), self._dry_maps(teacher, 'teacher')
        ours, theirs = ([round(DRY_SIZE / x.size(3)) for x in side] for side in sides)
        common = [(i, theirs.index(s)) for i, s in enumerate(ours) if s in theirs]
        if not common:
            raise ValueError(
                f"Features: levels='stride' pairs no maps: {self._name('student')} has "
                f'the strides {ours}, {self._name("teacher")} {theirs}. Give indices, '
                "`levels` and `teacher_levels`; the teacher's maps are resized."
            )
        self.levels, self.teacher_levels = map(list, zip(*common, strict=True))
        strides = [ours[i] for i in self.levels]
        print_log(
            f'Features compares the maps of the strides {strides}. The student has '
            f'{ours}, the teacher {theirs}.',
            logger='current',
        )

    def _dry_maps(self, model: nn.Module | Teacher, whose: str) -> list[Tensor]:
        """Run a model, of the teacher without its weights, on zeros for its maps.

        Raises:
            _NotRun: The model cannot be built or run.
        """
        if whose == 'teacher':
            with _failing(''):
                model = model.build()
        module = self._module(model, whose)
        with _failing(f'{name_of(model)} fails on a batch of zeros, '):
            calls = _dry_run(model, module)
        if not calls:
            raise _NotRun(f'{self._name(whose)} did not run in a forward pass.')
        return self._maps(calls, whose)

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args) -> None:
        if self._not_adapted:  # a test without the teacher's config
            for key in [key for key in state_dict if key.startswith(prefix)]:
                del state_dict[key]
        super()._load_from_state_dict(state_dict, prefix, *args)

    # ---- the two modules; `whose` is 'student' or 'teacher' ----------------------

    def _path(self, whose: str) -> str:
        return self.student_path if whose == 'student' else self.teacher_path

    def _name(self, whose: str) -> str:
        return f"the {whose}'s `{self._path(whose)}`"

    def _module(self, model: nn.Module, whose: str) -> nn.Module:
        path = self._path(whose)
        modules = dict(model.named_modules(remove_duplicate=False))
        if path in modules:
            return modules[path]
        close = difflib.get_close_matches(path, modules, n=3)
        top = ', '.join(name for name, _ in model.named_children())
        hint = f'Its top-level modules: {top}.'
        if close:
            hint = f'Did you mean {" or ".join(map(repr, close))}?'
        raise ValueError(
            f'Features: the {whose}, {name_of(model)}, has no module {path!r}. {hint}'
        )

    def _maps(self, calls: Sequence[Call], whose: str) -> list[Tensor]:
        """The maps to compare of those that a module returned."""
        outputs = tree_leaves([call.output for call in calls])
        tensors = [x for x in outputs if isinstance(x, Tensor)]
        maps = [x for x in tensors if x.ndim == 4]
        if not maps:
            raise ValueError(
                f'Features compares maps, (N, C, h, w), but {self._name(whose)} '
                f'returned {[tuple(x.shape) for x in tensors] or "no tensor"}. Choose '
                'another module, for example `neck` or `backbone`.'
            )
        levels = self.levels if whose == 'student' else self.teacher_levels
        if levels is None:
            return maps
        try:
            return [maps[level] for level in levels]
        except IndexError:
            raise ValueError(
                f'Features: `levels` are {list(levels)}, but {self._name(whose)} '
                f'returned {len(maps)} map(s), 0 to {len(maps) - 1}.'
            ) from None

    def _check_number(self, student: Sequence, teacher: Sequence) -> None:
        if len(student) != len(teacher):
            raise ValueError(
                f'Features cannot compare {len(student)} map(s) of '
                f'{self._name("student")} with {len(teacher)} of '
                f'{self._name("teacher")}. Choose the same number of each with '
                '`levels` and `teacher_levels`.'
            )


class _NotRun(Exception):
    """A model could not be built or run to find its maps."""


@contextmanager
def _failing(prefix: str) -> Iterator[None]:
    """Context whose errors, of any kind, become a :class:`_NotRun`."""
    try:
        yield
    except Exception as error:
        raise _NotRun(f'{prefix}{type(error).__name__}: {error}') from error


def _dry_run(model: nn.Module, module: nn.Module) -> list[Call]:
    """The calls of ``module`` when ``model`` runs on a batch of zeros."""
    mean = getattr(getattr(model, 'data_preprocessor', None), 'mean', range(3))
    size = (DRY_SIZE, DRY_SIZE)
    zeros = next(model.parameters()).new_zeros(1, len(mean), *size)
    was_training = [m for m in model.modules() if m.training]
    model.eval()
    recorder, fork = Recorder([module]), torch.random.fork_rng(devices=[])
    try:
        with torch.no_grad(), fork, recorder:
            if isinstance(model, ForeignTeacher):
                model(zeros, [size])
                return recorder.calls(module)
            model.extract_feat(zeros)
            if not recorder.calls(module):
                names = ('img_shape', 'ori_shape', 'pad_shape', 'batch_input_shape')
                metainfo = dict.fromkeys(names, size) | {'scale_factor': (1.0, 1.0)}
                model(zeros, [BaseDataElement(metainfo=metainfo)], mode='tensor')
    finally:
        for m in was_training:
            m.training = True
    return recorder.calls(module)
