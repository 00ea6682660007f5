r"""Compare trainings by their logs: scores over seeds, a table and curves.

    python tools/compare.py alone=work_dirs/alone_0 alone=work_dirs/alone_1 \
        dist=work_dirs/dist_0 dist=work_dirs/dist_1 --out compare.png

Runs with the same name are seeds of one method; the seed is `randomness.seed` in the
config that the run dumped. The table has the last value of the metric, mean ± standard
deviation over seeds, and the mean difference to the first method, paired by seed, with
the 95 % interval of Student's t. Runs without a score are left out.
"""

from __future__ import annotations

import argparse
import itertools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from logs import LOG, interval, mean_and_spread, paired, read_log
from matplotlib.figure import Figure
from mmengine.config import Config

METRICS = ('mIoU', 'coco/bbox_mAP')
CORRELATION = re.compile(r'.*_(inter|intra)(_\w+)?')
STYLES = ('-', '--', ':', '-.')


class Run(NamedTuple):
    """One training, as read from its logs."""

    folder: Path
    seed: int | str  # its folder if it has no seed: it is paired with none
    entries: list[dict]

    def curve(self, key: str) -> dict[int, float]:
        """The values of a key by step, in order.

        A resumed or restarted run replaces what was logged from that step on.
        """
        curve: dict[int, float] = {}
        for entry in self.entries:
            if key in entry:
                while curve and next(reversed(curve)) >= entry['step']:
                    curve.popitem()
                curve[entry['step']] = entry[key]
        return curve

    @property
    def metrics(self) -> list[str]:
        """The keys that validation logged; entries of training have `lr`."""
        keys = {key for e in self.entries if 'lr' not in e for key in e}
        return sorted(keys - {'step', 'time', 'data_time'})


def read_run(folder: Path) -> Run:
    """Read the logs of a work dir, and the seed from the config next to them."""
    try:
        entries = read_log(folder)
    except ValueError as error:
        raise SystemExit(f'{folder} has a broken log, {LOG}: {error}') from None
    if not entries:
        raise SystemExit(
            f'{folder} has no log: there is no {LOG} in it, or it is empty. Give '
            'the work_dir of a training whose visualizer has a LocalVisBackend.'
        )
    config = sorted(folder.glob(LOG))[-1].with_name('config.py')
    try:
        cfg = Config.fromfile(config, import_custom_modules=False)
        seed = cfg.get('randomness', {}).get('seed')
    except Exception:  # no config, or a broken one
        seed = None
    return Run(folder, str(folder.resolve()) if seed is None else seed, entries)


Methods = dict[str, list[Run]]


def read(arguments: list[str]) -> Methods:
    """The runs by method; ``arguments`` are work dirs, as ``name=dir`` or ``dir``."""
    methods: Methods = {}
    for argument in arguments:
        name, _, path = argument.rpartition('=')
        if Path(argument).is_dir():
            name, path = '', argument
        run = read_run(Path(path))
        same = methods.setdefault(name or Path(path).resolve().name, [])
        for other in same:
            if other.seed == run.seed:
                raise SystemExit(
                    f'{other.folder} and {run.folder} have the same name and seed '
                    f'({run.seed}). Name the methods: name={run.folder}'
                )
        same.append(run)
    return methods


def choose_metric(methods: Methods, wanted: Sequence[str]) -> str:
    """The first of the wanted metrics that a run has logged."""
    logged = {key for same in methods.values() for run in same for key in run.metrics}
    if found := [metric for metric in wanted if metric in logged]:
        return found[0]
    raise SystemExit(
        f'No run has logged any of {list(wanted)}. Choose one with --metric, of '
        f'{sorted(logged)}; a run without validation logs none.'
    )


def make_table(methods: Methods, metric: str) -> str:
    """A Markdown table, and notes on incomplete runs."""
    scores: dict[str, dict] = {name: {} for name in methods}
    ends, notes = {}, []
    for name, run in [(name, run) for name, same in methods.items() for run in same]:
        if curve := run.curve(metric):
            ends[run.folder], scores[name][run.seed] = list(curve.items())[-1]
        else:
            has = run.metrics or 'nothing'
            notes.append(f'{run.folder} has no {metric!r} yet; it has logged {has}.')
    values = [value for by_seed in scores.values() for value in by_seed.values()]
    digits = 2 if max(map(abs, values)) > 1 else 4  # mmdet's AP is a fraction
    first = next(iter(scores))
    lines = [
        f'| method | seeds | last {metric} | minus {first}, paired by seed | pairs |',
        '|---|---:|---:|---:|---:|',
    ]
    for name, ours in scores.items():
        difference = paired(ours, scores[first])
        cells = interval(difference, digits), len(ours.keys() & scores[first])
        against = ' | '.join(map(str, cells)) if name != first else '|'
        spread = mean_and_spread(ours, digits)
        lines.append(f'| {name} | {len(ours)} | {spread} | {against} |')
    if len(set(ends.values())) > 1:
        steps = ', '.join(f'{folder} at {step}' for folder, step in ends.items())
        notes.insert(0, f'The last {metric} comes from different steps: {steps}.')
    return '\n\n'.join(['\n'.join(lines), *notes])


def draw(methods: Methods, metric: str, file: Path) -> None:
    """Draw each seed as a thin line and their mean as a thick one."""
    keys = {k for same in methods.values() for r in same for e in r.entries for k in e}
    correlations = sorted(filter(CORRELATION.fullmatch, keys))
    # mmdet validates by epoch, mmseg by iteration
    panels = [('step of the validation', metric, [metric])]
    if correlations:
        panels.append(('iteration', 'correlation with the teacher', correlations))
    figure = Figure((6.5 * len(panels), 4.5), layout='constrained')
    row = figure.subplots(1, len(panels), squeeze=False)[0]
    for axes, (xlabel, ylabel, keys) in zip(row, panels, strict=True):
        for i, (name, same) in enumerate(methods.items()):
            for key, style in zip(keys, itertools.cycle(STYLES), strict=False):
                label = name if key == metric else f'{name}, {key}'
                curves = [run.curve(key) for run in same]
                draw_seeds(axes, curves, f'C{i}', style, label)
        axes.set(xlabel=xlabel, ylabel=ylabel)
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(file, dpi=100)


def draw_seeds(axes, curves: list[dict], colour: str, style: str, label: str) -> None:
    """Draw the curves of a method, and their mean at the steps that all share."""
    curves = [curve for curve in curves if curve]
    for curve in curves if len(curves) > 1 else []:
        values = list(curve), list(curve.values())
        axes.plot(*values, style, color=colour, lw=0.7, alpha=0.5)
    steps = sorted(set.intersection(*map(set, curves))) if curves else []
    if steps:
        means = [sum(curve[step] for curve in curves) / len(curves) for step in steps]
        marker = 'o' if len(steps) == 1 else ''
        axes.plot(steps, means, style, marker=marker, color=colour, lw=2, label=label)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    text = '`dir` of a training, or `name=dir` with the name of its method (default: '
    add('work_dirs', nargs='+', metavar='WORK_DIR', help=f'{text}that of the folder)')
    text = f'key in the log (default: the first of {METRICS} that is logged)'
    add('--metric', nargs=1, default=METRICS, help=text)
    text = 'file of the plot (default: %(default)s)'
    add('--out', type=Path, default=Path('compare.png'), help=text)
    args = parser.parse_args()
    methods = read(args.work_dirs)
    metric = choose_metric(methods, args.metric)
    print(make_table(methods, metric))
    draw(methods, metric, args.out)
    print(f'\nCurves: {args.out}')


if __name__ == '__main__':
    main()
