"""The distiller: the student's own class, with a loss that sees the teacher too."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from copy import deepcopy
from typing import Any, NamedTuple

from mmengine.logging import MessageHub, print_log
from torch import Tensor, nn

from ._environment import check_ops
from .comparisons.base import Comparison, build_comparison
from .comparisons.default import default_for, default_for_pair
from .data.labels import checked_labels
from .registry import MODELS
from .step import Step
from .teachers import Teacher, build_teacher
from .unlabelled import Part, counted, counting, joined, split


@MODELS.register_module(name='Distiller')
def build_distiller(
    student: dict,
    teacher: dict | None = None,
    distill: dict[str, dict] | None = None,
    teachers: dict[str, dict] | None = None,
    **student_overrides,
) -> nn.Module:
    """Build a student that is distilled while it trains.

    The result *is* the student: an instance of a subclass of its class, with its
    parameter names, state dict, ``predict`` and data_preprocessor. Only ``loss`` and
    ``init_weights`` know the teacher, so testing and export need neither its config nor
    its weights.

    Args:
        student: Config of the student model.
        teacher: Arguments of :class:`Teacher`: ``config``, ``checkpoint``, ...; or
            ``ema``, the arguments of :class:`MeanTeacher`.
        distill: What to compare, a dict of name -> config of a comparison. If omitted,
            it is named ``dist`` and chosen for the pair once the teacher is loaded.
            With several teachers, ``from_teacher`` in a config is the name of one, or a
            dict of name -> weight; if omitted, it is the mean over all.
        teachers: Several teachers, a dict of name -> arguments as of ``teacher``.
        student_overrides: Entries that replace those of ``student``. The APIs of mmseg
            set ``pretrained`` and ``train_cfg`` on whatever model they are given. Only
            a ``data_preprocessor``, which the Runner adds where the model has none,
            does not replace that of ``student``.

    Returns:
        The student.

    Raises:
        ValueError: The student's family is not supported, or ``distill`` or
            ``teachers`` is malformed.
        RuntimeError: mmcv or its compiled ops are missing.

    Example:
        In a config::

            model = dict(
                _delete_=True,
                type='mmdist.Distiller',
                student=_base_.model,
                teacher=dict(config='teacher.py', checkpoint='teacher.pth'))
    """
    check_ops()
    if student.get('data_preprocessor') is not None:
        student_overrides.pop('data_preprocessor', None)
    model = MODELS.build(deepcopy({**student, **student_overrides}))
    is_default = distill is None
    if is_default:
        distill = dict(dist=default_for(model))
    _check_names(distill)
    if (teacher is None) == (teachers is None):
        raise ValueError(
            'Give either `teacher`, the arguments of one, or `teachers`, a dict of '
            'name -> arguments.'
        )
    guests = {
        name: build_teacher(cfg, student)
        for name, cfg in ({'': teacher} if teachers is None else teachers).items()
    }
    lessons = {lesson.key: lesson for lesson in _lessons(distill, list(guests))}
    comparisons = nn.ModuleDict(
        {
            key: build_comparison(lesson.name, lesson.cfg)
            for key, lesson in lessons.items()
        }
    )
    for key, comparison in comparisons.items():
        comparison.bind(model, guests[lessons[key].teacher])
    model.__class__ = distilled_class(type(model))
    model.teachers = guests
    model.distill = comparisons
    model._lessons = lessons
    model._is_default = is_default
    model._dataset_meta_before = _dataset_meta()
    return model


def _check_names(distill: dict) -> None:
    for name in distill:
        if not name.isidentifier() or 'loss' in name:
            raise ValueError(
                f'`distill` has an entry {name!r}. Names are identifiers without '
                '"loss" in them: they become the keys loss_<name> (added to the '
                'total) and <name>_inter, <name>_intra (only logged).'
            )


class Lesson(NamedTuple):
    """An entry of ``distill``, learned from one teacher."""

    name: str  # of the entry
    cfg: dict  # of the comparison
    teacher: str  # its name; '' if there is only one
    weight: float

    @property
    def key(self) -> str:
        """Its name in ``model.distill``."""
        return '_'.join(filter(None, (self.name, self.teacher)))


def _lessons(distill: dict[str, dict], teachers: list[str]) -> Iterator[Lesson]:
    """Each entry of ``distill`` with each teacher that it learns from.

    Raises:
        ValueError: ``from_teacher`` names a teacher that is not there.
    """
    for name, entry in distill.items():
        cfg = dict(entry) if isinstance(entry, Mapping) else entry
        wanted = cfg.pop('from_teacher', None) if isinstance(cfg, dict) else None
        if wanted is not None and teachers == ['']:
            raise ValueError(
                f'`distill.{name}.from_teacher` chooses among several teachers, but '
                'there is one `teacher`. Give `teachers=dict(<name>=dict(...))`.'
            )
        if wanted is None:
            weights = dict.fromkeys(teachers, 1)
        else:
            weights = wanted if isinstance(wanted, Mapping) else {wanted: 1}
        unknown = sorted(set(weights) - set(teachers))
        if unknown:
            raise ValueError(
                f'`distill.{name}.from_teacher` names {unknown}, but the teachers are '
                f'{teachers}. It names those of `teachers=dict(<name>=dict(...))`.'
            )
        for teacher, weight in weights.items():
            yield Lesson(name, cfg, teacher, weight / sum(weights.values()))


class DistilledMixin:
    """What a student's class gains by being distilled."""

    teachers: dict[str, Teacher]
    distill: nn.ModuleDict
    distill_factor = 1.0  # DistillScheduleHook changes it; at 0 the teacher rests
    why_default = ''  # why that comparison was chosen, if `distill` is omitted
    _is_default = False
    _is_checked = False

    @property
    def teacher(self) -> Teacher:
        """The teacher, where there is one."""
        if len(self.teachers) > 1:
            raise ValueError(f'There are several: `teachers` {list(self.teachers)}.')
        return next(iter(self.teachers.values()))

    def init_weights(self) -> None:
        """Initialise the student as usual, then load its teachers.

        The Runner calls this to train, not to test.
        """
        super().init_weights()
        self._load_teachers()

    def loss(self, inputs: Tensor, data_samples: list, **kwargs) -> dict:
        """The student's losses, and those of each comparison.

        Args:
            inputs: The batch, (N, C, H, W), after the data_preprocessor.
            data_samples: The N data samples.

        Returns:
            The student's own dict of losses with ``loss_<name>``, ``<name>_inter`` and
            ``<name>_intra`` of each entry of ``distill`` added. Of several teachers
            ``loss_<name>`` is the weighted mean, and the correlations are
            ``<name>_inter_<teacher>`` and ``<name>_intra_<teacher>``.
        """
        with checked_labels(self, data_samples, self._class_names()):
            return self._distilled_loss(inputs, data_samples, **kwargs)

    def _distilled_loss(self, inputs: Tensor, data_samples: list, **kwargs) -> dict:
        for teacher in self.teachers.values():
            teacher.follow(self)
        rests = self.distill_factor == 0
        if not rests:
            self._load_teachers()
            self._match_classes()
        modules = [m for c in self.distill.values() for m in c.student_modules(self)]
        losses: dict[str, Any] = {}
        pairs: dict[str, list] = {key: [] for key in self.distill}
        for part in split(self, inputs, data_samples, modules):
            if not rests:
                own = self._learn(part, pairs, **kwargs)
            elif part.is_rest:
                continue
            else:
                with counting(self, part):
                    own = super().loss(part.inputs, part.data_samples, **kwargs)
            losses |= counted(own, part)
        if rests:
            return losses | self._zero_losses()

        own = set(losses)
        for key, comparison in self.distill.items():
            lesson = self._lessons[key]
            terms = comparison(lesson.name, joined(pairs[key]))
            for term, value in terms.items():
                if term.startswith('loss_'):
                    # `distill=dict(cls=...)` must not replace the detector's loss_cls.
                    term = f'{term}_distill' if term in own else term
                    value = self.distill_factor * lesson.weight * value
                    losses[term] = losses[term] + value if term in losses else value
                else:
                    losses['_'.join(filter(None, (term, lesson.teacher)))] = value
        return losses

    def _learn(self, part: Part, pairs: dict[str, list], **kwargs) -> dict:
        """The student's own losses of images; what is compared goes into ``pairs``.

        Args:
            part: Images that go through the student together.
            pairs: For each comparison the pairs of the parts before.
        """
        steps = {name: self._step(name, part) for name in self.teachers}
        comparisons: dict[str, Comparison] = dict(self.distill.items())

        # The teacher goes first where it can: its activations are freed before those
        # of the student, which the backward pass needs, take memory.
        answers = {}
        for key, comparison in comparisons.items():
            if comparison.asks_first:
                answers[key] = self._ask(key, steps, None)
        if len(answers) == len(comparisons):
            for step in steps.values():
                step.forget_teacher_features()

        with ExitStack() as recordings:
            for step in steps.values():
                part.replay(recordings.enter_context(step.recording()))
            recordings.enter_context(counting(self, part))
            losses = super().loss(part.inputs, part.data_samples, **kwargs)

        for key, comparison in comparisons.items():
            step = steps[self._lessons[key].teacher]
            recorded = comparison.record(step)
            if key not in answers:
                answers[key] = self._ask(key, steps, recorded)
            pairs[key].append(comparison.pair(step, recorded, answers.pop(key)))
        return losses

    def _step(self, teacher: str, part: Part) -> Step:
        """A part of the batch, as it is for one of the teachers."""
        guest = self.teachers[teacher]
        guest.move_to(part.inputs.device)
        comparisons = [
            self.distill[key]
            for key, lesson in self._lessons.items()
            if lesson.teacher == teacher
        ]
        return Step(
            self,
            guest,
            guest.classes,
            part.inputs,
            part.data_samples,
            [m for c in comparisons for m in c.student_modules(self)],
            [m for c in comparisons for m in c.teacher_modules(guest.model)],
            part.labelled,
        )

    def _ask(self, key: str, steps: dict[str, Step], recorded: Any) -> Any:
        """The answer of a lesson's teacher; of several views the mean."""
        comparison, teacher = self.distill[key], self._lessons[key].teacher
        step = steps[teacher]
        with self.teachers[teacher].running():
            answer = comparison.ask(step, recorded)
            if self.teachers[teacher].views:
                mirrored = comparison.ask(step.mirrored, recorded)
                answer = comparison.mean_of_views(step, answer, mirrored)
        return answer

    def _load_teachers(self) -> None:
        """Load the teachers, and check them against what is compared."""
        if self._is_checked:
            return
        for teacher in self.teachers.values():
            teacher.load(self)
        for key, lesson in self._lessons.items():
            teacher = self.teachers[lesson.teacher]
            if self._is_default:
                self.distill[key], self.why_default = default_for_pair(self, teacher)
            self.distill[key].check_pair(self, teacher.model)
            if teacher.views:
                self.distill[key].check_views()
            print_log(self._in_words(key), logger='current')
        self._is_checked = True

    def _in_words(self, key: str) -> str:
        """What is distilled from which teacher into what, and why."""
        lesson, comparison = self._lessons[key], self.distill[key]
        teacher = self.teachers[lesson.teacher]
        name = ' '.join(filter(None, (type(teacher.model).__name__, lesson.teacher)))
        why = f', chosen because {self.why_default}' if self._is_default else ''
        return (
            f'mmdist: {type(self).__mro__[2].__name__} learns from {name} '
            f'({teacher.origin}) by `{lesson.name}`, {type(comparison).__name__} with '
            f'{type(comparison.loss).__name__}{why}.'
        )

    def _class_names(self) -> Sequence[str] | None:
        """The student's, when the Runner has said which it has."""
        meta = _dataset_meta()
        # What was there when the model was built belongs to another run.
        known = meta is not None and meta is not self._dataset_meta_before
        return meta.get('classes') if known else None

    def _match_classes(self) -> None:
        """Match the classes once."""
        names = self._class_names()
        for teacher in self.teachers.values():
            if teacher.classes is None:
                if names is not None:
                    _refuse_untried_strategies()
                teacher.classes = teacher.match_classes(names)

    def _zero_losses(self) -> dict[str, Tensor]:
        """Losses of 0 of the comparisons with parameters.

        DDP stops at parameters that take no part in a step.
        """
        losses: dict[str, Tensor] = {}
        for key, comparison in self.distill.items():
            if any(True for _ in comparison.parameters()):
                term = f'loss_{self._lessons[key].name}'
                zero = 0 * sum(p.sum() for p in comparison.parameters())
                losses[term] = losses.get(term, 0) + zero
        return losses

    def _apply(self, fn, *args, **kwargs):
        for teacher in self.teachers.values():
            teacher.apply(fn)
        return super()._apply(fn, *args, **kwargs)

    def __reduce_ex__(self, protocol: int) -> tuple:
        # The class is made at run time, so pickle does not find it by name. A copy
        # loads the teacher again, which a file does not hold.
        student_class = type(self).__mro__[2]
        return _new, (student_class,), {**self.__dict__, '_is_checked': False}


@functools.cache
def distilled_class(student_class: type[nn.Module]) -> type[nn.Module]:
    """The class of a distilled model: the student's with :class:`DistilledMixin`."""
    name = f'Distilled{student_class.__name__}'
    return type(name, (DistilledMixin, student_class), {'__module__': __name__})


def _new(student_class: type[nn.Module]) -> nn.Module:
    """A distilled model without its state, for pickle and copy."""
    cls = distilled_class(student_class)
    return cls.__new__(cls)


def _dataset_meta() -> dict | None:
    """Metainfo of the dataset that the Runner trains on, once training has begun."""
    return MessageHub.get_current_instance().get_info('dataset_meta')


def _refuse_untried_strategies() -> None:
    """Stop where FlexibleRunner hands the model to an engine of another library.

    These engines leave no mark on the model that they wrap; the Runner's config, which
    is known once training has begun, names them.

    Raises:
        NotImplementedError: The config names such a strategy.
    """
    config = MessageHub.get_current_instance().get_info('cfg') or ''
    found = re.search(r'\b(DeepSpeed|ColossalAI)Strategy\b', config)
    if found:
        raise NotImplementedError(
            f'mmdist does not distil under `{found[0]}`: nobody has tried whether the '
            'teacher survives its engine. Use `FSDPStrategy`, `DDPStrategy` or '
            '`SingleDeviceStrategy`, or omit `runner_type` and `strategy`.'
        )
