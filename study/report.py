"""What comes out: tables of scores and paired differences, and a plot."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np

from tools.dev.runs import replace_between
from tools.logs import interval, mean_and_spread, paired

from .grid import DEFAULT, METHODS, SINGLE, TASKS, TEACHERS, Cell

BEGIN = '<!-- Made by `python -m study` from results.jsonl; do not edit. -->\n'
END = '<!-- End of what is made. -->\n'


def read_results(file: Path) -> dict[Cell, dict]:
    """The results by cell; of a cell that was trained again, the last."""
    lines = file.read_text().splitlines() if file.is_file() else []
    rows = [json.loads(line) for line in lines]
    return {Cell(*(row[key] for key in Cell._fields)): row for row in rows}


def by_seed(results: dict[Cell, dict], key: str, *cell: str) -> dict[int, float]:
    """Scores by seed of a method: scale, task, method, teacher."""
    return {
        c.seed: row[key] for c, row in results.items() if c[:4] == cell and key in row
    }


def make_tables(results: dict[Cell, dict]) -> str:
    """A table per scale and task: each method by each teacher."""
    text = ''
    for scale, task in sorted({cell[:2] for cell in results}):
        label = TASKS[task].label
        text += (
            f'\n### {task}, {scale}\n\n'
            f'| method | teacher | seeds | val {label} | against alone '
            f'| against KL T=1 | test {label} | against alone, test | seconds |\n'
            '|---|---|---:|---:|---:|---:|---:|---:|---:|\n'
        )
        for teacher in TEACHERS:
            cell = Cell(scale, task, 'alone', teacher, 0).its_teacher
            if row := results.get(cell):
                test = f'{row["test"]:.2f}' if 'test' in row else '-'
                text += (
                    f'| teacher, {row["parameters"] / 1e6:.2f} M | {teacher} | 1 '
                    f'| {row["score"]:.2f} | | | {test} | | {row["seconds"]} |\n'
                )
        for method, teacher in [
            ('alone', ''),
            *itertools.product(METHODS[1:], TEACHERS),
        ]:
            here = [
                r for c, r in results.items() if c[:4] == (scale, task, method, teacher)
            ]
            if not here:
                continue
            val, test = (
                by_seed(results, key, scale, task, method, teacher)
                for key in ('score', 'test')
            )
            alone, alone_test = (
                by_seed(results, key, scale, task, 'alone', '')
                for key in ('score', 'test')
            )
            # another training of the teacher than that of the table, or of KL's teacher
            cell = Cell(scale, task, method, teacher, 0)
            of_table = {results.get(cell.its_teacher, {}).get('score')}
            own, of_kl = (
                set(by_seed(results, 'teacher_score', scale, task, m, teacher).values())
                - of_table
                for m in (method, 'kl-t1')
            )
            kl_t1 = by_seed(results, 'score', scale, task, 'kl-t1', teacher)
            kl_t1 = kl_t1 if own == of_kl else {}
            cells = [
                method,
                ', '.join([teacher, *(f'{score:.2f}' for score in sorted(own))]),
                str(len(val)),
                mean_and_spread(val),
                interval(paired(val, alone)) if teacher else '',
                interval(paired(val, kl_t1)) if teacher and method != 'kl-t1' else '',
                mean_and_spread(test),
                interval(paired(test, alone_test)) if teacher else '',
                f'{np.mean([row["seconds"] for row in here]):.0f}',
            ]
            text += f'| {" | ".join(cells)} |\n'
    return text


def draw(results: dict[Cell, dict], file: Path) -> None:
    """Each seed's difference to the student alone, with means and 95 % intervals."""
    import matplotlib

    matplotlib.use('Agg')
    import matplotlib.pyplot as plt

    cells = {cell[:4] for cell in results if cell.method not in SINGLE}
    panels = sorted({cell[:2] for cell in cells})
    # a line for each method, and its axis
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
            colour = (
                'tab:green'
                if method.startswith((DEFAULT, 'dist', 'intra'))
                else 'tab:orange'
            )
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
