"""A student and its teacher in words, for the tools that check a pair."""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from mmdist import Comparison, DISTLoss, Pair
from mmdist.lookup import is_a
from mmdist.losses import as_rows
from mmdist.losses.correlations.plain import ACTIVATIONS
from mmdist.teachers import MeanTeacher, Renormalize
from mmdist.teachers.renormalize import swaps_channels

FEW_ROWS = 30  # of a pair, in a process


def describe_model(model: nn.Module) -> str:
    """The class, the main parts and the size of a model."""
    parts = [
        part
        for name in ('backbone', 'decode_head', 'bbox_head', 'roi_head', 'mask_head')
        if isinstance(part := getattr(model, name, None), nn.Module)
    ]
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    name = type(model).__name__.removeprefix('Distilled')
    of = f' of {", ".join(type(part).__name__ for part in parts)}' if parts else ''
    return f'{name}{of}; {millions:.1f} M parameters'


def describe_comparison(comparison: Comparison, pairs: Sequence[Pair]) -> str:
    """The kind of a comparison, its loss, and what makes probabilities of scores."""
    loss = comparison.loss
    activation = pairs[0].activation or getattr(loss, 'activation', None)
    kinds = filter(None, (type(loss).__name__, activation))
    return f'{type(comparison).__name__} with {", ".join(kinds)}'


def probabilities(
    comparison: Comparison, student: nn.Module, pair: Pair
) -> tuple[Tensor, str]:
    """What is correlated in a pair, and the activation that it comes from.

    Args:
        comparison: It gave the pair.
        student: The distilled model.
        pair: The pair.

    Returns:
        Scores of student and teacher, (2, rows, columns) in float64, on the CPU.
    """
    loss = comparison._loss_for(pair)
    activation = getattr(loss, 'activation', None) or pair.activation
    activation = activation or comparison.activation(student)
    tau = getattr(loss, 'tau', 1.0)
    both = [as_rows(x).double().cpu() / tau for x in (pair.student, pair.teacher)]
    return torch.stack([ACTIVATIONS[activation](x) for x in both]), activation


def describe_preprocessing(renormalize: Renormalize) -> str:
    """What is done to the student's images before the teacher sees them."""
    steps = {
        'channels swapped': renormalize.flip,
        'mean and std changed': renormalize.rescale,
        'padding refilled': renormalize.refill,
    }
    done = [step for step, needed in steps.items() if needed]
    return f'for the teacher: {", ".join(done)}' if done else 'the same'


def describe_normalisation(preprocessor: nn.Module) -> str:
    """Mean, standard deviation and order of the channels of a model's images."""
    if getattr(preprocessor, 'mean', None) is None:
        return 'values from 0 to 255'
    mean, std = (
        ' '.join(f'{x:.4g}' for x in getattr(preprocessor, name).flatten().tolist())
        for name in ('mean', 'std')
    )
    return f'{"RGB" if swaps_channels(preprocessor) else "BGR"}, mean {mean}, std {std}'


def describe_rows(pair: Pair) -> str:
    """The shape of a pair, its rows and how many of them count."""
    shape = 'x'.join(map(str, pair.student.shape))
    rows = len(as_rows(pair.student))
    return (
        f'{shape}, {rows} rows, {len(rows_that_count(pair)) / max(rows, 1):.1%} count'
    )


def rows_that_count(pair: Pair) -> Tensor:
    """The teacher's scores of the rows that count, (rows, columns)."""
    rows = as_rows(pair.teacher)
    return rows if pair.mask is None else rows[pair.mask.flatten()]


def is_constant(rows: Tensor) -> bool:
    """Whether all rows are the same, but for rounding."""
    low, high = rows.amin(0), rows.amax(0)
    return bool((high - low <= 1e-6 * torch.maximum(-low, high).abs()).all())


def parts(model: nn.Module) -> Iterator[nn.Module]:
    """Backbone, neck and heads: what a detector or a segmentor calls."""
    for child in model.children():
        if isinstance(child, nn.ModuleList) or is_a(child, 'BaseRoIHead'):
            yield from parts(child)
        else:
            yield child


def names_of(modules: Sequence[nn.Module], model: nn.Module) -> str:
    """Paths of modules in their model."""
    names = {id(module): name for name, module in model.named_modules()}
    return ', '.join(dict.fromkeys(names[id(module)] for module in modules))


def with_name(key: str, teacher: str) -> str:
    """A key of the report, with the name of one of several teachers."""
    return f'{key} {teacher}'.strip()


def as_text(values: Mapping[str, float], limit: int = 6) -> str:
    """Numbers in a line, at most ``limit`` of them."""
    texts = [f'{k.split("/")[-1]} {v:.4g}' for k, v in values.items()]
    return ', '.join(texts[:limit])


class Report:
    """What is printed, and what speaks against the training.

    Attributes:
        warnings: Sentences; the training may go on.
        reasons: Sentences that say why it is pointless.
    """

    def __init__(self) -> None:
        self._out = sys.stdout  # the libraries' own output is dropped
        self.warnings: list[str] = []
        self.reasons: list[str] = []

    def section(self, title: str) -> None:
        print(title.upper(), file=self._out)

    def line(self, key: str, text: str, max_lines: int = 3) -> None:
        """A line, wrapped to 100 columns and cut off after ``max_lines``."""
        self._wrapped(f'  {key:13} ', text, max_lines)

    def _wrapped(self, start: str, text: str, max_lines: int) -> None:
        wrapper = textwrap.TextWrapper(
            width=100,
            initial_indent=start,
            subsequent_indent=' ' * len(start),
            max_lines=max_lines,
            placeholder=' ...',
            break_on_hyphens=False,
        )
        print(wrapper.fill(text), file=self._out)

    def finish(self) -> int:
        """Print the warnings and the verdict; gives the exit status."""
        if self.warnings:
            self.section('warnings')
        for text in self.warnings:
            self._wrapped('  - ', text, 5)
        self.section('do not train' if self.reasons else 'go on')
        for text in self.reasons:
            if '\n' in text:
                print(text, file=self._out)  # has lines of its own
            else:
                self._wrapped('  - ', text, 5)
        return 1 if self.reasons else 0


def report_comparisons(
    report: Report,
    model: nn.Module,
    pairs: dict[str, list[Pair]],
    ran: Sequence[nn.Module],
) -> None:
    """What is compared with what, and whether its rows say anything.

    Args:
        report: Where it goes.
        model: The distilled model.
        pairs: What each comparison compared.
        ran: Modules of the teachers that took part.
    """
    report.section('what is compared')
    report.line('student', describe_model(model))
    for name, teacher in model.teachers.items():
        report.line(with_name('teacher', name), describe_model(teacher.model))
    for key, comparison in model.distill.items():
        teacher = model.teachers[model.distill_terms[key].teacher].model
        theirs = comparison.teacher_modules(teacher) or [
            module for module in parts(teacher) if module in ran
        ]
        report.line(key, describe_comparison(comparison, pairs[key]))
        if model.why_default:
            report.line('  chosen', f'because {model.why_default}')
        ours = names_of(comparison.student_modules(model), model)
        report.line(
            '  modules',
            f'{ours} (teacher: {names_of(theirs, teacher) or "its forward"})',
        )
        shapes = '; '.join(map(describe_rows, pairs[key]))
        report.line('  pairs', f'{len(pairs[key])}: {shapes}', 4)
        warn_of_rows(report, key, isinstance(comparison.loss, DISTLoss), pairs[key])


def warn_of_rows(report: Report, key: str, is_dist: bool, pairs: list[Pair]) -> None:
    """Warn of too few rows or columns, and of a constant teacher."""
    rows = [rows_that_count(pair) for pair in pairs]
    constant = [is_constant(x) for x in rows if len(x) > 1]
    if constant and all(constant):
        report.reasons.append(
            f'`{key}`: the teacher gives all rows the same scores, so it has nothing '
            'to teach. Check its weights and its images.'
        )
    elif any(constant):
        report.warnings.append(
            f'`{key}`: the teacher gives all rows the same scores in '
            f'{sum(constant)} of {len(pairs)} pairs.'
        )
    if not is_dist:
        return
    if min(x.shape[1] for x in rows) <= 2:
        report.warnings.append(
            f'`{key}` compares two classes or one: the inter-class term is useless '
            'there and left out; the intra-class term remains.'
        )
    few = [len(x) for x in rows if len(x) < FEW_ROWS]
    if few:
        report.warnings.append(
            f'`{key}`: {len(few)} of {len(pairs)} pairs have few rows per process, '
            f'{min(few)} at least, and a correlation of so few is mostly chance. Take '
            'a larger batch, `sync=True` of DISTLoss with several processes, or '
            "`levels='concat'` of DenseLogits."
        )


def report_classes(
    report: Report, model: nn.Module, classes: Sequence[str] | None
) -> None:
    """Which classes are compared, and how the images of the two differ."""
    report.section('classes and images')
    for name, teacher in model.teachers.items():
        names = classes if isinstance(teacher, MeanTeacher) else teacher.class_names
        if classes and names:
            text = teacher.classes.describe(classes, names)
            if teacher.classes.teacher is None:
                text += ' They are in the same order.'
        else:
            whose = 'teacher' if classes else 'student'
            text = (
                f'The class names of the {whose} are unknown: the two are taken to '
                'have the same classes in the same order.'
            )
            report.warnings.append(f'{text} --images shows whether they have.')
        report.line(with_name('classes', name), text, 5)
        text = describe_preprocessing(teacher.renormalize)
        if teacher.renormalize.flip or teacher.renormalize.rescale:
            both = model.data_preprocessor, teacher.model.data_preprocessor
            ours, theirs = map(describe_normalisation, both)
            text += f'. Student: {ours}; teacher: {theirs}'
        report.line(with_name('images', name), text)
