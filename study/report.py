"""Results of the study: tables of scores and paired differences, and a plot."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np

from benchmarks.measure import table
from tools.dev.runs import replace_between
from tools.logs import interval, mean_and_spread, paired

from .grid import ALONE, METHODS, SINGLE, STORED, TASKS, TEACHERS, Cell

BEGIN = '<!-- Made by `python -m study` from results.jsonl; do not edit. -->\n'
END = '<!-- End of what is made. -->\n'


def read_results(file: Path) -> dict[Cell, dict]:
    """The results by cell; the last one of a cell that was trained again."""
    lines = file.read_text().splitlines() if file.is_file() else []
    rows = [json.loads(line) for line in lines]
    return {Cell(*(row[key] for key in Cell._fields)): row for row in rows}


def by_seed(results: dict[Cell, dict], key: str, *cell: str) -> dict[int, float]:
    """Values of ``key`` by seed; ``cell`` is scale, task, method, teacher."""
    return {
        c.seed: row[key] for c, row in results.items() if c[:4] == cell and key in row
    }


def make_tables(results: dict[Cell, dict]) -> str:
    """A table for each scale, task and teacher that students have learned from."""
    text = ''
    for scale, task, teacher in dict.fromkeys(
        (c.scale, c.task, c.teacher) for c in sorted(results) if c.method not in SINGLE
    ):
        title = f'{task}, {scale}'
        if teacher == 'other':
            title += f', teacher of {TASKS[task].other}'
        text += f'\n### {title}\n\n{_table(results, scale, task, teacher)}\n'
    return text


def _table(results: dict[Cell, dict], scale: str, task: str, teacher: str) -> str:
    """A line for each method."""

    def column(method: str, key: str) -> dict[int, float]:
        cell = Cell(scale, task, method, '' if method == ALONE else teacher, 0)
        cell = cell.its_teachers[0] if method == 'teacher' else cell
        return by_seed(results, key, *cell[:4])

    def against(method: str, other: str, key: str = 'score') -> str:
        if method in SINGLE or method == other:
            return ''
        return interval(paired(column(method, key), column(other, key)))

    def of_gap(method: str) -> str:
        """The gain over the student alone, as a share of the teacher's."""
        alone, teacher = column(ALONE, 'score'), column('teacher', 'score')
        gain = paired(column(method, 'score'), alone)
        # fused answers are not those of the teacher in the table
        if method in (*SINGLE, STORED) or not (gain and teacher):
            return ''
        gap = np.mean([*teacher.values()]) - np.mean([*alone.values()])
        return f'{gain.mean / gap:.0%}'

    label, has_test = TASKS[task].label, TASKS[task].has_test
    head = ['', 'seeds', label, 'against alone', 'of the gap', 'against published']
    head += ['minutes']
    if has_test:
        head += [f'test {label}', 'against alone']
    lines = []
    for method in ('teacher', *METHODS):
        scores = column(method, 'score')
        if not scores:
            continue
        minutes = np.mean(list(column(method, 'seconds').values())) / 60
        line = [method, str(len(scores)), mean_and_spread(scores)]
        line += [against(method, ALONE), of_gap(method)]
        line += [against(method, 'published'), f'{minutes:.0f}']
        if has_test:
            line += [mean_and_spread(column(method, 'test'))]
            line += [against(method, ALONE, 'test')]
        lines.append(line)
    return table(head, lines)


def draw(results: dict[Cell, dict], file: Path) -> None:
    """Plot each seed's difference to the student alone, means and 95 % intervals."""
    import matplotlib

    matplotlib.use('Agg')
    import matplotlib.pyplot as plt

    cells = {cell[:4] for cell in results if cell.method not in SINGLE}
    panels = sorted({cell[:2] for cell in cells})
    # a line for each method, plus the axis
    heights = [0.8 + 0.2 * sum(c[:2] == panel for c in cells) for panel in panels]
    figure, rows = plt.subplots(
        len(panels), 1, figsize=(8, 0.6 + sum(heights)), squeeze=False,
        layout='constrained', height_ratios=heights,
    )  # fmt: skip
    for axes, (scale, task) in zip(rows[:, 0], panels, strict=True):
        alone = by_seed(results, 'score', scale, task, 'alone', '')
        names = []
        for method, teacher in itertools.product(METHODS[1:], TEACHERS):
            ours = by_seed(results, 'score', scale, task, method, teacher)
            points = [ours[s] - alone[s] for s in sorted(ours.keys() & alone.keys())]
            if not points:
                continue
            y = len(names)
            names.append(f'{method}, {teacher}')
            colour = 'tab:orange' if method == 'kl' else 'tab:green'
            axes.plot(points, [y] * len(points), 'o', color=colour, alpha=0.5)
            if difference := paired(ours, alone):
                _, mean, low, high = difference
                axes.errorbar(
                    mean, y, xerr=[[mean - low], [high - mean]], fmt='|', color='black',
                    markersize=14, capsize=4,
                )  # fmt: skip
        axes.axvline(0, color='0.5', lw=1)
        axes.set_yticks(range(len(names)), names)
        axes.set_ylim(len(names) - 0.5, -0.5)
        axes.set(
            title=f'{task}, {scale}', xlabel=f'val {TASKS[task].label} minus alone'
        )
        axes.grid(axis='x', alpha=0.3)
    figure.savefig(file, dpi=100)
    plt.close(figure)


def write_up(out: Path) -> str:
    """Write the tables into results.md, between the marks, and draw the plot."""
    results = read_results(out / 'results.jsonl')
    if not results:
        return 'There are no results yet.'
    page = out / 'results.md'
    tables = make_tables(results)
    made = f'{tables}\n![differences to the student alone](results.png)\n'
    text = page.read_text() if page.is_file() else f'# Results\n\n{BEGIN}{END}'
    page.write_text(replace_between(text, BEGIN, END, made))
    if any(cell.method not in SINGLE for cell in results):
        draw(results, out / 'results.png')
    return tables
