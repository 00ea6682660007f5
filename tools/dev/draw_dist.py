"""Draw the figure of docs/how_dist_works.md, with the real loss.

python -m tools.dev.draw_dist [--out FILE]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import matplotlib

matplotlib.use('Agg')
import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from matplotlib.patches import Rectangle
from torch import Tensor

from mmdist import DISTLoss

FIGURE = Path(__file__).resolve().parents[2] / 'docs' / 'how_dist_works.png'
CLASSES = ('road', 'car', 'bus', 'person', 'sky')
# Logits that a teacher could have for six pixels.
TEACHER = torch.tensor(
    [
        [3.6, 0.4, 0.2, 0.6, -0.8],
        [0.6, 3.0, 1.9, 0.2, -0.9],
        [0.2, 1.7, 2.9, -0.3, 0.1],
        [0.9, 0.5, -0.2, 2.8, -0.4],
        [-0.6, -0.2, 0.6, 0.0, 3.5],
        [2.3, 1.6, 0.3, 1.1, -0.9],
    ]
)
ROW, COLUMN = 1, 2  # the marked ones
SOFTER = 0.6  # the student in the upper half: the teacher's logits times this
INTER, INTRA, KL, OWN = '#1668b8', '#d1491f', '#8a8a8a', '#222222'


def kl(student: Tensor, teacher: Tensor) -> Tensor:
    return F.kl_div(
        student.log_softmax(1), teacher.log_softmax(1), log_target=True, reduction='sum'
    ) / len(student)


def correlation(a: Tensor, b: Tensor) -> float:
    return float(torch.corrcoef(torch.stack([a, b]))[0, 1])


def against_sharpness() -> tuple[list[float], dict[str, list[float]]]:
    """Losses of the teacher's logits times a factor; 1 is that of an unrelated student.

    That student has the teacher's logits of other pixels: the mean over all shifts.
    """
    factors = torch.linspace(0.1, 3, 59).tolist()
    losses = {}
    for name, loss in (('KL', kl), ('DIST', DISTLoss())):
        shifted = [
            loss(TEACHER.roll(shift, 0), TEACHER) for shift in range(1, len(TEACHER))
        ]
        whole = sum(shifted) / len(shifted)
        losses[name] = [float(loss(f * TEACHER, TEACHER) / whole) for f in factors]
    return factors, losses


def against_scale(num_rows: int = 2000) -> tuple[list[float], dict[str, list[float]]]:
    """Gradient norms for random student logits of increasing spread."""
    noise = torch.Generator().manual_seed(0)
    labels = torch.randint(len(CLASSES), (num_rows,), generator=noise)
    teacher = torch.randn(num_rows, len(CLASSES), generator=noise)
    teacher = teacher + 3 * F.one_hot(labels, len(CLASSES))
    student = torch.randn(num_rows, len(CLASSES), generator=noise)
    losses: dict[str, Callable[[Tensor], Tensor]] = {
        'cross entropy': lambda logits: F.cross_entropy(logits, labels),
        'KL': lambda logits: kl(logits, teacher),
        'DIST': lambda logits: DISTLoss()(logits, teacher),
    }
    scales = torch.logspace(-2, 0.7, 28).tolist()
    norms: dict[str, list[float]] = {}
    for scale in scales:
        for name, loss in losses.items():
            logits = (scale * student).requires_grad_()
            (gradient,) = torch.autograd.grad(loss(logits), logits)
            norms.setdefault(name, []).append(float(gradient.norm()))
    return scales, norms


def draw_matrix(axes: plt.Axes, scores: Tensor, title: str) -> None:
    """Draw probabilities, and mark a row and a column."""
    axes.imshow(scores.numpy(), cmap='Greys', vmin=0, vmax=1.3, aspect='auto')
    for (row, column), value in zip(
        [(r, c) for r in range(len(scores)) for c in range(len(CLASSES))],
        scores.flatten().tolist(),
        strict=True,
    ):
        axes.text(
            column,
            row,
            f'{value:.2f}'[1:],
            ha='center',
            va='center',
            fontsize=9,
            color='white' if value > 0.7 else 'black',
        )
    axes.set_xticks(range(len(CLASSES)), CLASSES, fontsize=9)
    axes.set_yticks(range(len(scores)), [f'pixel {i + 1}' for i in range(len(scores))])
    axes.tick_params(length=0, labelsize=9)
    axes.xaxis.tick_top()
    axes.set_title(title, fontsize=11, pad=8)
    row = Rectangle((-0.5, ROW - 0.5), len(CLASSES), 1)
    column = Rectangle((COLUMN - 0.5, -0.5), 1, len(scores))
    for box, colour in ((row, INTER), (column, INTRA)):
        box.set(fill=False, edgecolor=colour, linewidth=3, clip_on=False, zorder=3)
        axes.add_patch(box)


def draw_relation(
    axes: plt.Axes,
    student: Tensor,
    teacher: Tensor,
    names: tuple[str, ...],
    title: str,
    colour: str,
) -> None:
    """Draw two vectors side by side, and their correlation."""
    for scores, shift, alpha, label in (
        (teacher, -0.2, 1.0, 'teacher'),
        (student, 0.2, 0.4, 'student'),
    ):
        places = [place + shift for place in range(len(scores))]
        axes.bar(places, scores.tolist(), 0.38, color=colour, alpha=alpha, label=label)
    axes.set_xticks(range(len(names)), names, fontsize=9)
    axes.set_ylim(0, 0.9)
    axes.set_yticks([])
    rho = correlation(student, teacher)
    axes.set_title(f'{title}: ρ = {rho:.2f}', fontsize=11, color=colour)
    axes.legend(frameon=False, fontsize=9, loc='upper right', ncols=2)
    axes.spines[['left', 'right', 'top']].set_visible(False)


def draw_sharpness(axes: plt.Axes) -> None:
    factors, losses = against_sharpness()
    axes.axhline(1, color='#bbbbbb', linewidth=1, linestyle=':')
    axes.text(2.97, 1.02, 'an unrelated student', ha='right', fontsize=9)
    axes.plot(factors, losses['KL'], color=KL, linewidth=2.5)
    axes.plot(factors, losses['DIST'], color=INTER, linewidth=2.5)
    axes.text(2.97, losses['KL'][-1] + 0.05, 'KL', color=KL, ha='right', fontsize=12)
    axes.text(
        2.97, losses['DIST'][-1] + 0.05, 'DIST', color=INTER, ha='right', fontsize=12
    )
    axes.axvline(1, color='#bbbbbb', linewidth=1, linestyle=':')
    axes.set(xlim=(0.1, 3), ylim=(0, 1.15), ylabel='loss, relative')
    axes.set_xticks(
        [0.1, 1, 2, 3], ['×0.1\nsofter', '×1\nas sharp', '×2', '×3\nsharper']
    )
    axes.set_title(
        'Logits of the teacher, times a factor: KL changes, DIST hardly', size=11
    )
    axes.spines[['right', 'top']].set_visible(False)


def draw_scale(axes: plt.Axes) -> None:
    scales, norms = against_scale()
    for name, colour in (('cross entropy', OWN), ('KL', KL), ('DIST', INTER)):
        axes.loglog(scales, norms[name], color=colour, linewidth=2.5, label=name)
    axes.set_xlabel('spread (standard deviation) of the logits of the student')
    axes.set_ylabel('norm of the gradient')
    axes.annotate('a new head', (0.03, 0.02), xycoords=('data', 'axes fraction'))
    axes.annotate('a trained one', (1.2, 0.02), xycoords=('data', 'axes fraction'))
    axes.legend(frameon=False, fontsize=10)
    axes.set_title(
        'The smaller the logits of the student, the harder DIST pulls', size=11
    )
    axes.spines[['right', 'top']].set_visible(False)


def draw(path: Path) -> None:
    """Write the figure.

    Args:
        path: The PNG file to write.
    """
    teacher, student = TEACHER.softmax(1), (SOFTER * TEACHER).softmax(1)
    figure = plt.figure(figsize=(11, 7.2), layout='constrained')
    top, bottom = figure.subfigures(2, 1, height_ratios=(1, 0.95))
    axes = top.subplots(1, 3, width_ratios=(1, 1, 0.85))
    draw_matrix(axes[0], teacher, 'probabilities of the teacher')
    draw_matrix(axes[1], student, 'of a student that is less sure')
    grid = axes[2].get_subplotspec().subgridspec(2, 1)
    axes[2].remove()
    pixels = tuple(
        f'pixel {i + 1}' if not i else str(i + 1) for i in range(len(teacher))
    )
    draw_relation(
        top.add_subplot(grid[0]),
        student[ROW],
        teacher[ROW],
        CLASSES,
        f'inter-class, pixel {ROW + 1}',
        INTER,
    )
    draw_relation(
        top.add_subplot(grid[1]),
        student[:, COLUMN],
        teacher[:, COLUMN],
        pixels,
        f'intra-class, {CLASSES[COLUMN]}',
        INTRA,
    )
    left, right = bottom.subplots(1, 2)
    draw_sharpness(left)
    draw_scale(right)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--out', type=Path, default=FIGURE, help='docs/ if omitted')
    draw(parser.parse_args().out)


if __name__ == '__main__':
    main()
