"""Describe a student and its teacher in words, for the tools that check a pair."""

from __future__ import annotations

import logging
import sys
import textwrap
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

from mmengine.logging import MessageHub, MMLogger
from torch import Tensor, nn

from mmdist import Comparison, DISTLoss, Pair
from mmdist.lookup import is_a
from mmdist.losses import as_rows
from mmdist.record import Recorder
from mmdist.teachers import MeanTeacher, StoredTeacher, Teacher
from mmdist.teachers.renormalize import swaps_channels

FEW_ROWS = 30  # of a pair, per process
PARTS = ('backbone', 'decode_head', 'bbox_head', 'roi_head', 'mask_head')


class Seen(NamedTuple):
    """What a distilled model did in a step."""

    losses: dict
    pairs: dict[str, Sequence[Pair]]  # by key of `distill`
    terms: set[str]  # names of the distillation losses
    ran: list[nn.Module]  # backbones, necks and heads of the teachers


def watch(model: nn.Module, step: Callable[[], dict]) -> Seen:
    """Record a distilled model in a step, which returns its losses."""
    heads = [m for t in model.teachers.values() for m in parts(t.model)]
    with Recorder([*model.distill.values(), *heads]) as recorder:
        losses = step()
    calls = {key: recorder.calls(c)[0] for key, c in model.distill.items()}
    terms = {x for call in calls.values() for x in call.output if x.startswith('loss_')}
    # the distiller renames a term that the student has as well
    terms = {f'{x}_distill' if f'{x}_distill' in losses else x for x in terms}
    pairs = {key: call.args[1] for key, call in calls.items()}
    return Seen(losses, pairs, terms, [m for m in heads if recorder.calls(m)])


def parts(model: nn.Module) -> Iterator[nn.Module]:
    """Backbone, neck and heads: the modules that a detector or segmentor calls."""
    for child in model.children():
        if isinstance(child, nn.ModuleList) or is_a(child, 'BaseRoIHead'):
            yield from parts(child)
        else:
            yield child


def describe_comparison(comparison: Comparison, pairs: Sequence[Pair]) -> str:
    """The type of a comparison, its loss, and its activation."""
    loss = comparison.loss
    activation = pairs[0].activation or getattr(loss, 'activation', None)
    kinds = filter(None, (type(loss).__name__, activation))
    return f'{type(comparison).__name__} with {", ".join(kinds)}'


def quiet() -> None:
    """Drop the warnings and the log lines of the libraries."""
    warnings.simplefilter('ignore')
    MMLogger.get_instance('mmdist', logger_name='mmdist', log_level='ERROR')
    logging.getLogger('mmengine').setLevel(logging.ERROR)


def tell_as_hooks(dataset_meta: dict) -> None:
    """Tell the distiller and some heads what hooks tell them in training."""
    info = dict(dataset_meta=dataset_meta, iter=0, epoch=0)
    MessageHub.get_current_instance().update_info_dict(info)


def with_name(key: str, teacher: str) -> str:
    """A key of the report, with the teacher's name if there are several."""
    return f'{key} {teacher}'.strip()


def as_text(values: Mapping[str, float], limit: int = 6) -> str:
    """At most ``limit`` numbers in one line."""
    texts = [f'{k.split("/")[-1]} {v:.4g}' for k, v in values.items()]
    return ', '.join(texts[:limit])


class Report:
    """The printed report, and what speaks against the training."""

    def __init__(self) -> None:
        self._out = sys.stdout  # the libraries' own output is dropped
        self.warnings: list[str] = []  # the training can start
        self.cautions: list[str] = []  # it can, but something should be changed first
        self.reasons: list[str] = []  # it would be pointless

    def section(self, title: str, sentences: Sequence[str] = ()) -> None:
        print(title.upper(), file=self._out)
        for text in sentences:
            if '\n' in text:
                print(text, file=self._out)  # has its own line breaks
            else:
                self._wrapped('  - ', text, 5)

    def line(self, key: str, text: str, max_lines: int = 3) -> None:
        """A line, wrapped to 100 columns and cut off after ``max_lines``."""
        self._wrapped(f'  {key:13} ', text, max_lines)

    def _wrapped(self, start: str, text: str, most: int) -> None:
        options = dict(initial_indent=start, subsequent_indent=' ' * len(start))
        options |= dict(max_lines=most, placeholder=' ...', break_on_hyphens=False)
        print(textwrap.fill(text, 100, **options), file=self._out)

    def finish(self) -> int:
        """Print the warnings and the verdict; return the exit status."""
        if self.warnings:
            self.section('warnings', self.warnings)
        if self.reasons:
            self.section('do not train', self.reasons + self.cautions)
        elif self.cautions:
            self.section('better change this first', self.cautions)
        else:
            self.section('go on')
        return int(bool(self.reasons))


def report_pair(
    report: Report, model: nn.Module, classes: Sequence[str] | None, seen: Seen
) -> None:
    """Report what is compared with what, which classes, and how the images differ.

    ``classes`` are the student's class names, None if unknown.
    """
    report.section('what is compared')
    report.line('student', _describe_model(model))
    for name, teacher in model.teachers.items():
        is_stored = isinstance(teacher, StoredTeacher)
        text = teacher.origin if is_stored else _describe_model(teacher.model)
        report.line(with_name('teacher', name), text)
    for key, comparison in model.distill.items():
        teacher = model.teachers[model.distill_terms[key].teacher]
        its_model = teacher.model
        ran = [module for module in parts(its_model) if module in seen.ran]
        theirs = _paths(comparison.teacher_modules(its_model) or ran, its_model)
        ours, pairs = _paths(comparison.student_modules(model), model), seen.pairs[key]
        report.line(key, describe_comparison(comparison, pairs))
        if key in model.why_default:
            report.line('  chosen', f'because {model.why_default[key]}')
        is_stored = isinstance(teacher, StoredTeacher)
        forward = 'what is stored' if is_stored else 'its forward'
        report.line('  modules', f'{ours} (teacher: {theirs or forward})')
        rows = [_counting(pair) for pair in pairs]
        shapes = '; '.join(map(_describe, pairs, rows))
        report.line('  pairs', f'{len(pairs)}: {shapes}', 4)
        _judge_rows(report, key, isinstance(comparison.loss, DISTLoss), rows)
    report.section('classes and images')
    for name, teacher in model.teachers.items():
        names = classes if isinstance(teacher, MeanTeacher) else teacher.class_names
        if classes and names:
            text = teacher.classes.describe(classes, names)
            if teacher.classes.teacher is None:
                text += ' They are in the same order.'
        else:
            text = (
                f'The class names of the {"teacher" if classes else "student"} are '
                'unknown: the two are assumed to have the same classes in the same '
                'order.'
            )
            advice = '`tools/preflight.py --images N` checks that.'
            report.warnings.append(f'{text} {advice}')
        report.line(with_name('classes', name), text, 5)
        report.line(with_name('images', name), _describe_images(model, teacher))


def _describe_images(model: nn.Module, teacher: Teacher) -> str:
    """How the student's batch is changed for a teacher."""
    if isinstance(teacher, StoredTeacher):
        return 'not shown to the teacher; its answers are moved like the images'
    change = teacher.renormalize
    steps = {
        'channels swapped': change.flip,
        'mean and std changed': change.rescale,
        'padding refilled': change.refill,
    }
    done = ', '.join(step for step, needed in steps.items() if needed)
    text = f'for the teacher: {done}' if done else 'the same'
    if change.flip or change.rescale:
        both = model.data_preprocessor, teacher.model.data_preprocessor
        text += '. Student: {}; teacher: {}'.format(*map(_normalisation, both))
    return text


def _describe_model(model: nn.Module) -> str:
    """The class, the main parts and the size of a model."""
    found = (getattr(model, name, None) for name in PARTS)
    of = ', '.join(type(x).__name__ for x in found if isinstance(x, nn.Module))
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    name = type(model).__name__.removeprefix('Distilled')
    return f'{name}{of and f" of {of}"}; {millions:.1f} M parameters'


def _normalisation(preprocessor: nn.Module) -> str:
    if getattr(preprocessor, 'mean', None) is None:
        return 'values from 0 to 255'
    values = (preprocessor.mean, preprocessor.std)
    mean, std = (' '.join(f'{x:.4g}' for x in v.flatten().tolist()) for v in values)
    return f'{"RGB" if swaps_channels(preprocessor) else "BGR"}, mean {mean}, std {std}'


def _describe(pair: Pair, counting: Tensor) -> str:
    """The shape of a pair, its rows and how many of them count."""
    shape, rows = 'x'.join(map(str, pair.student.shape)), len(as_rows(pair.student))
    return f'{shape}, {rows} rows, {len(counting) / max(rows, 1):.1%} count'


def _counting(pair: Pair) -> Tensor:
    """The teacher's scores of the rows that count, (rows, columns)."""
    rows = as_rows(pair.teacher)
    return rows if pair.mask is None else rows[pair.mask.flatten()]


def _is_constant(rows: Tensor) -> bool:
    """Whether all rows are the same, up to rounding."""
    low, high = rows.amin(0), rows.amax(0)
    return bool((high - low <= 1e-6 * high.maximum(-low).abs()).all())


def _paths(modules: Sequence[nn.Module], model: nn.Module) -> str:
    names = {id(module): name for name, module in model.named_modules()}
    return ', '.join(dict.fromkeys(names[id(module)] for module in modules))


def _judge_rows(
    report: Report, key: str, is_dist: bool, rows: Sequence[Tensor]
) -> None:
    """Warn about too few rows or columns, and about a constant teacher.

    ``rows`` are the teacher's scores of the rows that count, for each pair.
    """
    constant = [_is_constant(x) for x in rows if len(x) > 1]
    same = f'`{key}`: the teacher gives all rows the same scores'
    if constant and all(constant):
        report.reasons.append(
            f'{same}, so it has nothing to teach. Check its weights and its images.'
        )
    elif any(constant):
        report.warnings.append(f'{same} in {sum(constant)} of {len(rows)} pairs.')
    if is_dist and min(x.shape[1] for x in rows) <= 2:
        report.warnings.append(
            f'`{key}` compares fewer than three classes: the inter-class term is '
            'useless there and left out; the intra-class term remains.'
        )
    few = [len(x) for x in rows if len(x) < FEW_ROWS]
    if is_dist and few:
        report.warnings.append(
            f'`{key}`: {len(few)} of {len(rows)} pairs have few rows per process '
            f'(fewest: {min(few)}), and a correlation of so few is mostly chance. Use '
            'a larger batch, `sync=True` of DISTLoss with several processes, or '
            "`levels='concat'` of DenseLogits."
        )
