"""Speed, memory and growth of DISTLoss."""

from __future__ import annotations

import ast
import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks import textbook
from benchmarks.measure import interleaved, peak_memory, table, verdict
from mmdist import DISTLoss

# What is compared in training: RetinaNet's P3 with joint anchors, Cityscapes and
# ADE20K logits, proposals of Faster R-CNN
SHAPES = [
    ((2, 720, 100, 136), 'sigmoid'),
    ((8, 19, 128, 256), 'softmax'),
    ((4, 150, 128, 128), 'softmax'),
    ((1024, 81), 'softmax'),
]
CALLS_ON_GPU = 20


class Goals(NamedTuple):
    faster: float  # than the textbook formula, in the geometric mean
    floor: float  # at most this many times the floor


GOALS = {'cpu': Goals(4, 4), 'cuda': Goals(8, 2)}


def pair(
    shape: tuple[int, ...], device: str = 'cpu', dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    student = torch.randn(shape, generator=g)
    teacher = student + torch.randn(shape, generator=g)
    student, teacher = (x.mul_(2).to(device, dtype) for x in (student, teacher))
    return student.requires_grad_(), teacher


def step(loss: Callable, student: Tensor, teacher: Tensor) -> None:
    """Forward and backward; drops the gradient, as an optimizer's step does."""
    loss(student, teacher).backward()
    student.grad = None


def dist(activation: str, path: str = 'auto', eps: float = 0.0) -> DISTLoss:
    loss = DISTLoss(activation=activation, eps=eps)
    loss.path = path
    return loss


def step_of(name: str, shape: str, activation: str) -> Callable[[], None]:
    """A step, from strings."""
    losses = {
        'textbook': functools.partial(textbook.dist_loss, activation=activation),
        'fast': dist(activation),
    }
    return functools.partial(step, losses[name], *pair(ast.literal_eval(shape)))


def peak_of(name: str, shape: tuple[int, ...], activation: str) -> int:
    return peak_memory('benchmarks.loss:step_of', name, shape, activation)


def peak_on_gpu(call: Callable[[], None]) -> int:
    """Peak bytes of all tensors that a call allocates."""
    call()  # what is kept from the first call on does not count
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    return torch.cuda.max_memory_allocated() - before


def often(call: Callable[[], None]) -> None:
    """Wait for the GPU only after several calls, as in training."""
    for _ in range(CALLS_ON_GPU):
        call()
    torch.cuda.synchronize()


def check_same(activation: str, device: str = 'cpu') -> None:
    """Check that the textbook formula and DISTLoss are the same function."""
    grads = []
    for loss in (
        functools.partial(textbook.dist_loss, activation=activation),
        dist(activation, eps=1e-8),
    ):
        student, teacher = pair((2, 19, 16, 32), device, torch.float64)
        value = loss(student, teacher)
        grads.append(torch.autograd.grad(value, student)[0])
    torch.testing.assert_close(*grads, rtol=1e-6, atol=1e-12)


class Measured(NamedTuple):
    """Measurements of one kind of logits."""

    name: str
    time: dict[str, float]  # seconds by contestant
    peak: dict[str, int]  # bytes
    size: int  # bytes of the gradient

    @property
    def floor(self) -> float:
        # a copy reads and writes once; the floor is four reads and one write
        return 2.5 * self.time['copy']

    @property
    def faster(self) -> float:
        return self.time['textbook'] / self.time['fast']

    @property
    def to_floor(self) -> float:
        return self.time['fast'] / self.floor


def geometric_mean(ratios: Sequence[float]) -> float:
    return math.prod(ratios) ** (1 / len(ratios))


def measured(
    seconds: float,
    device: str = 'cpu',
    shapes: Sequence[tuple[tuple[int, ...], str]] = SHAPES,
) -> Iterator[Measured]:
    """Measure kinds of logits one by one."""
    on_gpu = device == 'cuda'
    dtypes = (torch.float32, torch.bfloat16) if on_gpu else (torch.float32,)
    for (shape, activation), dtype in itertools.product(shapes, dtypes):
        check_same(activation, device)
        student, teacher = pair(shape, device, dtype)
        out = torch.empty_like(student, requires_grad=False)
        losses = {
            'textbook': functools.partial(textbook.dist_loss, activation=activation),
            'plain': dist(activation, 'plain'),
            'fast': dist(activation),
        }
        steps = {
            k: functools.partial(step, v, student, teacher) for k, v in losses.items()
        }
        steps['copy'] = functools.partial(out.copy_, student.detach())
        steps['new'] = functools.partial(torch.ones_like, out)
        if on_gpu:
            peak = {name: peak_on_gpu(steps[name]) for name in ('textbook', 'fast')}
            steps = {k: functools.partial(often, v) for k, v in steps.items()}
        else:
            peak = {x: peak_of(x, shape, activation) for x in ('textbook', 'fast')}
        time = interleaved(steps, seconds)
        if on_gpu:
            time = {k: v / CALLS_ON_GPU for k, v in time.items()}
        kind = f', {str(dtype).removeprefix("torch.")}' if on_gpu else ''
        yield Measured(f'{shape} {activation}{kind}', time, peak, student.nbytes)


def speed(seconds: float, device: str = 'cpu') -> str:
    """The table of speed and memory, with its goals."""
    goals, on_gpu = GOALS[device], device == 'cuda'
    rows, ratios = [], []
    for found in measured(seconds, device):
        time, peak, size = found.time, found.peak, found.size
        ratios.append(found.faster)
        memory = peak['fast'] / peak['textbook'], peak['fast'] / size
        times = [time[which] for which in ('textbook', 'plain', 'fast')]
        rows.append(
            [
                found.name,
                *(f'{1e3 * x:.{3 if on_gpu else 1}f}' for x in times),
                f'{ratios[-1]:.1f}x, {verdict(ratios[-1] >= 1)}',
                f'{found.to_floor:.1f}x, {verdict(found.to_floor <= goals.floor)}',
                f'{time["new"] / found.floor:.1f}x',
                f'{peak["textbook"] / size:.2f}',
                f'{peak["fast"] / size:.2f}',
                f'{memory[0]:.2f}, {verdict(memory[0] <= 0.25)}; '
                f'{memory[1]:.2f}, {verdict(memory[1] <= 1.25)}',
            ]
        )
        print(' | '.join(rows[-1]), flush=True)
    mean = geometric_mean(ratios)
    head = [
        'logits',
        'textbook, ms',
        'plain path, ms',
        'fast path, ms',
        'textbook / fast (goal: at least 1)',
        f'fast / floor (goal: at most {goals.floor})',
        'new gradient / floor',
        'peak, textbook',
        'peak, fast',
        'fast / textbook (goal: 0.25); fast / gradient (goal: 1.25)',
    ]
    return (
        f'{table(head, rows)}\n\n'
        f'Geometric mean of textbook / fast: {mean:.1f}x (goal: {goals.faster}x), '
        f'{verdict(mean >= goals.faster)}.\n'
    )


def growth(seconds: float, plot: Path | None) -> str:
    """Time and memory against rows and classes; a plot too, if ``plot`` is a path."""
    series = {
        'rows, at 19 classes': [
            (rows, (1, 19, rows)) for rows in (10**4, 10**5, 10**6, 10**7)
        ],
        'classes, at 20,000 rows': [
            (classes, (1, classes, 20_000)) for classes in (2, 19, 80, 365, 1203)
        ],
    }
    lines, points = [], {}
    for name, shapes in series.items():
        points[name] = []
        for x, shape in shapes:
            student, teacher = pair(shape)
            run = functools.partial(step, dist('softmax'), student, teacher)
            time = interleaved({'fast': run}, seconds)['fast']
            peak = peak_of('fast', shape, 'softmax')
            points[name].append((x, time, peak))
            lines.append(
                [
                    f'{x:,} {name}',
                    f'{1e3 * time:.1f}',
                    f'{1e9 * time / student.numel():.1f}',
                    f'{peak / 2**20:.1f}',
                    f'{peak / student.nbytes:.2f}',
                ]
            )
            print(' | '.join(lines[-1]), flush=True)
    text = table(['size', 'ms', 'ns per logit', 'peak, MiB', 'peak / gradient'], lines)
    if plot is not None:
        draw(points, plot)
        text += f'\n\n![time and memory against rows and classes]({plot.name})'
    rows = []
    for shape, what in (
        ((2, 1203, 100, 136), '1203 classes (LVIS)'),
        ((4, 150, 512, 512), '150 classes at the size of the labels'),
    ):
        inputs = 2 * 4 * math.prod(shape)
        gib = (inputs + peak_of('fast', shape, 'softmax')) / 2**30
        rows.append([what, str(shape), f'{gib:.2f} GiB', verdict(gib <= 2)])
    head = ['', 'logits', 'both inputs and all that the loss needs', 'goal: 2 GiB']
    return f'{text}\n\n{table(head, rows)}\n'


def draw(points: dict[str, list[tuple[int, float, int]]], path: Path) -> None:
    import matplotlib

    matplotlib.use('Agg')
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(8, 3), layout='constrained')
    for axis, (name, series) in zip(axes, points.items(), strict=True):
        xs, times, peaks = zip(*series, strict=True)
        axis.loglog(xs, [1e3 * t for t in times], 'o-', label='time, ms')
        axis.loglog(xs, [p / 2**20 for p in peaks], 's--', label='peak memory, MiB')
        axis.set_xlabel(name)
        axis.grid(alpha=0.3)
    axes[0].legend()
    figure.savefig(path, dpi=80)
