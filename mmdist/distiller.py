"""The distiller: the student's own class, with a loss that also sees the teacher."""

from __future__ import annotations

import inspect
import threading
from collections import defaultdict
from collections.abc import Mapping, Sequence
from copy import deepcopy
from functools import cache, partial
from os import PathLike
from typing import Any

from mmengine.logging import print_log
from torch import Tensor, nn

from . import arguments
from ._environment import check_ops
from .arguments import DistillTerm
from .balance import Balance
from .comparisons.base import Pair, build_comparison
from .comparisons.default import default_for, default_for_pair
from .data.labels import checked_labels
from .data.unlabelled import Part, by_parts
from .record import Fork
from .registry import MODELS
from .run import Watch, refuse_untried_strategies, told
from .step import Step
from .teachers import Teacher, build_teacher


@MODELS.register_module(name='Distiller')
def build_distiller(
    student: dict | str | PathLike | None = None,
    teacher: dict | None = None,
    distill: dict[str, dict] | None = None,
    teachers: dict[str, dict] | None = None,
    balance: float | None = 3.0,
    **student_overrides,
) -> nn.Module:
    """Build a student that is distilled while it trains.

    The result *is* the student, with its parameter names, ``predict`` and
    data_preprocessor; its class is a subclass of the student's. Only ``loss`` and
    ``init_weights`` use the teacher: testing and export need nothing of it.

    Args:
        student: Config of the student model, or the path to a config with a ``model``.
        teacher: Arguments of :class:`Teacher`: ``config``, ``checkpoint``, ...; or
            ``ema``, the arguments of :class:`MeanTeacher`; or ``stored``, the path to
            stored answers, see :class:`StoredTeacher`.
        distill: What to compare: a dict of name -> config of a comparison. If omitted,
            it is chosen for the pair once the teacher is loaded: ``dist``, plus ``box``
            where the teacher's boxes improved accuracy. With several teachers,
            ``from_teacher`` in a config is the name of one, or a dict of name ->
            weight; if omitted, the loss is the mean over all.
        teachers: Several teachers: a dict of name -> arguments as for ``teacher``.
        balance: Upper bound of the distillation gradient at each compared output, as a
            multiple of the gradient of the student's own losses; see :class:`Balance`.
            None sets no bound; if ``distill`` is omitted too, that is DIST as
            published.
        student_overrides: Entries that replace those of ``student``, for mmseg's APIs,
            which set ``pretrained`` and ``train_cfg`` on any model. A ``train_cfg`` or
            ``test_cfg`` of None, mmseg's default, is ignored, and so is the Runner's
            ``data_preprocessor`` if the student has its own.

    Returns:
        The student.

    Raises:
        ValueError: The student's family is not supported, or an argument is wrong.
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
    student = arguments.student_config(student)
    for key in ('train_cfg', 'test_cfg'):
        if student_overrides.get(key, '') is None:
            del student_overrides[key]
    arguments.check_overrides(student_overrides, student, build_distiller)
    if student.get('data_preprocessor') is not None:
        student_overrides.pop('data_preprocessor', None)
    model = MODELS.build(deepcopy({**student, **student_overrides}))
    named = arguments.named_teachers(teacher, teachers)
    if distill is None:
        default_for(model)  # raises for an unknown family
    entries = dict(dist={}) if distill is None else distill
    terms = arguments.distill_terms(entries, list(named))

    model.__class__ = distilled_class(type(model))
    model.teachers = {k: build_teacher(cfg, student, k) for k, cfg in named.items()}
    model.distill_terms = terms
    model.distill, model.why_default = nn.ModuleDict(), {}
    if distill is not None:  # else chosen when the teacher is loaded
        for key, term in terms.items():
            model.distill[key] = build_comparison(term.name, term.cfg)
            model.distill[key].bind(model, model.teachers[term.teacher])
    model.balance = None if balance is None else Balance(balance)
    model._watch = Watch()
    model._meta_before = told('dataset_meta')
    return model


class DistilledMixin:
    """What distillation adds to the student's class."""

    student_class: type[nn.Module]
    teachers: dict[str, Teacher]
    distill: nn.ModuleDict  # the comparisons, by the keys of `distill_terms`
    distill_terms: dict[str, DistillTerm]
    distill_factor = 1.0  # DistillScheduleHook changes it; at 0 the teacher is paused
    why_default: dict[str, str]  # why each entry was chosen, if `distill` is omitted
    _is_checked = False

    @property
    def teacher(self) -> Teacher:
        """The teacher, if there is only one."""
        if len(self.teachers) > 1:
            raise ValueError(f'Use `teachers[name]`, one of {list(self.teachers)}.')
        return next(iter(self.teachers.values()))

    def init_weights(self) -> None:
        """Initialise the student and load its teachers; the Runner does so to train."""
        super().init_weights()
        self._load_teachers()

    # ---- a training step, from top to bottom -------------------------------------

    def loss(
        self, inputs: Tensor | None = None, data_samples: list | None = None, **kwargs
    ) -> dict:
        """Compute the student's losses and those of each comparison.

        Args:
            inputs: The batch, (N, C, H, W), after the data_preprocessor. The student's
                own ``loss`` can name it differently; that name works too.
            data_samples: The N data samples; the student's name for them works too.

        Returns:
            The student's own losses, and for each entry of ``distill``
            ``loss_<name>``, the correlations ``<name>_inter`` and ``<name>_intra``, and
            ``<name>_scale``, the factor that :class:`Balance` gives its gradient. With
            several teachers, ``loss_<name>`` is the weighted mean over those that give
            it, and the names of the correlations end in ``_<teacher>``.

        Raises:
            RuntimeError: A loss is NaN or infinite.
        """
        inputs = kwargs.pop(self._loss_takes[0], inputs)
        data_samples = kwargs.pop(self._loss_takes[1], data_samples)
        # recording swaps methods of the model, so threads take turns
        turn = self.__dict__.setdefault('_turn', threading.RLock())
        with turn, checked_labels(self, data_samples, self._class_names()):
            for teacher in self.teachers.values():
                teacher.follow(self)
            if self.distill_factor:
                self._load_teachers()
                self._match_classes()
            terms = self.distill_terms if self.distill_factor else {}
            modules = [m for k in terms for m in self.distill[k].student_modules(self)]
            learn = partial(self._learn, terms, **kwargs)
            forks = [] if self.balance else None
            own, pairs = by_parts(
                self, modules, inputs, data_samples, learn, forks, paused=not terms
            )
            losses = own | self._distill_losses(own, pairs, forks)
            self._watch.rows(pairs)
            self._watch.losses(losses)
            return losses

    def _learn(
        self, terms: dict[str, DistillTerm], part: Part, **kwargs
    ) -> tuple[dict, dict[str, list[Pair]]]:
        """The student's own losses for a batch, and what each comparison compares."""
        names = self.teachers if terms else ()
        steps = {name: self._step(name, part) for name in names}

        # The teacher runs first where possible: its activations are freed before the
        # student's, which the backward pass needs, take memory.
        asked = {
            key: self._ask(key, steps[term.teacher])
            for key, term in terms.items()
            if self.distill[key].asks_first
        }
        if len(asked) == len(terms):
            for step in steps.values():
                step.forget_teacher_features()

        with part.recording(self):
            own = super().loss(part.inputs, part.data_samples, **kwargs)

        pairs = {}
        for key, term in terms.items():
            comparison, step = self.distill[key], steps[term.teacher]
            recorded = comparison.record(step)
            if key not in asked:
                asked[key] = self._ask(key, step, recorded)
            pairs[key] = list(comparison.pair(step, recorded, asked.pop(key)))
        return own, pairs

    def _step(self, name: str, part: Part) -> Step:
        """The step of a batch with one of the teachers."""
        teacher = self.teachers[name]
        teacher.move_to(part.inputs.device)
        modules = [
            module
            for key, term in self.distill_terms.items()
            if term.teacher == name
            for module in self.distill[key].teacher_modules(teacher.model)
        ]
        batch = part.inputs, part.data_samples, part.recorder
        return Step(self, teacher, teacher.classes, *batch, modules, part.labelled)

    def _ask(self, key: str, step: Step, recorded: Any = None) -> Any:
        """The teacher's answer for a comparison; with several views, their mean."""
        comparison = self.distill[key]
        teacher = self.teachers[self.distill_terms[key].teacher]
        with teacher.running():
            answer = comparison.ask(step, recorded)
            if teacher.views:
                mirrored = comparison.ask(step.mirrored, recorded)
                answer = comparison.mean_of_views(step, answer, mirrored)
        return answer

    def _distill_losses(
        self, own: dict, pairs: dict[str, list[Pair]], forks: list[Fork] | None
    ) -> dict:
        """The distillation losses, weighted and scheduled, and the correlations."""
        if not pairs:
            return self._zero_losses(own)
        values, logged = defaultdict(list), {}
        for key, term in self.distill_terms.items():
            for name, value in self.distill[key](term.name, pairs[key]).items():
                if name.startswith('loss_'):
                    values[term.name, name].append((term.weight, value))
                else:
                    logged['_'.join(filter(None, (name, term.teacher)))] = value
        losses: dict[str, Tensor] = {}
        entries = defaultdict(list)
        for (entry, name), found in values.items():
            factor = self.distill_factor / sum(weight for weight, _ in found)
            loss = sum(factor * weight * value for weight, value in found)
            losses[_free_name(name, own | losses)] = loss
            entries[entry].append(loss)
        if self.balance:
            scales = self.balance(entries, forks, self.distill_factor)
            logged |= {f'{entry}_scale': scale for entry, scale in scales.items()}
        return losses | logged

    def _zero_losses(self, own: dict) -> dict[str, Tensor]:
        """While paused: zeros of all parameters, which DDP needs in each step."""
        losses: dict[str, Tensor] = {}
        for key, comparison in self.distill.items():
            name = _free_name(f'loss_{self.distill_terms[key].name}', own)
            for parameter in comparison.parameters():
                losses[name] = losses.get(name, 0) + 0 * parameter.sum()
        return losses

    # ---- before the first step ---------------------------------------------------

    def _load_teachers(self) -> None:
        """Load the teachers, and check that the comparisons can use them."""
        if self._is_checked:
            return
        for teacher in self.teachers.values():
            teacher.load(self)
        if not self.distill:
            self._choose_defaults()
        for key, term in self.distill_terms.items():
            comparison, teacher = self.distill[key], self.teachers[term.teacher]
            comparison.check_pair(self, teacher.model)
            if teacher.views:
                comparison.check_views()
            name = ' '.join(filter(None, (type(teacher.model).__name__, term.teacher)))
            why = self.why_default.get(key, '')
            print_log(
                f'mmdist: {self.student_class.__name__} learns from {name} '
                f'({teacher.origin}) by `{term.name}`, {type(comparison).__name__} '
                f'with {type(comparison.loss).__name__}'
                f'{why and f", chosen because {why}"}.',
                logger='current',
            )
        self._is_checked = True

    def _choose_defaults(self) -> None:
        """Choose what to compare with each teacher, if `distill` is omitted."""
        terms, self.distill_terms = self.distill_terms.values(), {}
        for term in terms:
            teacher = self.teachers[term.teacher]
            chosen = default_for_pair(self, teacher, published=self.balance is None)
            for name, entry in chosen.items():
                named = term._replace(name=name)
                self.distill_terms[named.key] = named
                self.distill[named.key], self.why_default[named.key] = entry

    def _class_names(self) -> Sequence[str] | None:
        """Class names of the dataset, once the Runner has set it; else None."""
        meta = told('dataset_meta') or {}
        # what was set before the model was built belongs to another run
        return None if meta is self._meta_before else meta.get('classes')

    def _match_classes(self) -> None:
        """Match the classes once, in the first step."""
        for teacher in self.teachers.values():
            if teacher.classes is None:
                if told('dataset_meta') is not self._meta_before:
                    refuse_untried_strategies()
                teacher.classes = teacher.match_classes(self._class_names())

    # ---- as part of torch --------------------------------------------------------

    def _apply(self, fn, *args, **kwargs):
        for teacher in self.teachers.values():
            teacher.apply(fn)
        return super()._apply(fn, *args, **kwargs)

    def __reduce_ex__(self, protocol: int) -> tuple:
        # Pickle cannot find the class by name. A file does not contain the teacher, so
        # a copy loads it again.
        state = {**self.__dict__, '_is_checked': False, '_watch': Watch()}
        state.pop('_turn', None)
        return _new, (self.student_class,), state


def _free_name(name: str, taken: Mapping[str, Any]) -> str:
    """`distill=dict(cls=...)` must not replace the detector's loss_cls."""
    return f'{name}_distill' if name in taken else name


@cache
def distilled_class(student_class: type[nn.Module]) -> type[nn.Module]:
    """The class of a distilled model: the student's with :class:`DistilledMixin`."""
    inputs_and_samples = list(inspect.signature(student_class.loss).parameters)[1:3]
    attributes = dict(student_class=student_class, _loss_takes=inputs_and_samples)
    name, bases = f'Distilled{student_class.__name__}', (DistilledMixin, student_class)
    return type(name, bases, dict(__module__=__name__, **attributes))


def _new(student_class: type[nn.Module]) -> nn.Module:
    """A distilled model without its state, for pickle and copy."""
    cls = distilled_class(student_class)
    return cls.__new__(cls)
