"""Compare trainings by their logs: scores over seeds, a table and curves.

    python tools/compare.py alone=work_dirs/alone_0 alone=work_dirs/alone_1 \
        dist=work_dirs/dist_0 dist=work_dirs/dist_1 --out compare.png

Runs of one name are seeds of one method; its seed is `randomness.seed` of the config
that the run has dumped. The table has the last value of the metric, mean ± standard
deviation over seeds, and the mean of the differences to the first method, paired by
seed, with the 95 % interval of Student's t.
"""

from __future__ import annotations

import argparse
import re
from dataclasses import dataclass, field
from pathlib import Path

import runs
import seeds
from mmengine.config import Config

METRICS = ('mIoU', 'coco/bbox_mAP')
LOG = '*/vis_data/scalars.json'
CORRELATION = re.compile(r'.*_(inter|intra)(_\w+)?')
STYLES = ('-', '--', ':', '-.')


@dataclass
class Run:
    """One training, as its logs have it."""

    folder: Path
    seed: int | str  # of a run without one, its folder: it is paired with none
    entries: list[dict] = field(repr=False)

    @classmethod
    def read(cls, folder: Path) -> Run:
        """Read the logs of a work dir, and the seed of the config beside them.

        Raises:
            SystemExit: There is no log.
        """
        entries = runs.read_log(folder)
        if not entries:
            raise SystemExit(
                f'{folder} has no log: there is no {LOG} in it, or it is empty. Give '
                'the work_dir of a training whose visualizer has a LocalVisBackend.'
            )
        config = sorted(folder.glob(LOG))[-1].with_name('config.py')
        seed = None
        if config.is_file():
            cfg = Config.fromfile(config, import_custom_modules=False)
            seed = cfg.get('randomness', {}).get('seed')
        return cls(folder, str(folder.resolve()) if seed is None else seed, entries)

    def curve(self, key: str) -> dict[int, float]:
        """The values of a key by step, in order.

        A run that was resumed, or started again, replaces what was logged from there
        on.
        """
        curve: list[tuple[int, float]] = []
        for entry in self.entries:
            if key in entry:
                while curve and curve[-1][0] >= entry['step']:
                    curve.pop()
                curve.append((entry['step'], entry[key]))
        return dict(curve)

    @property
    def metrics(self) -> list[str]:
        """What was logged by validation; the entries of training have `lr`."""
        keys = {key for e in self.entries if 'lr' not in e for key in e}
        return sorted(keys - {'step', 'time', 'data_time'})

    @property
    def correlations(self) -> list[str]:
        """The keys of the correlations with the teacher."""
        return sorted({k for e in self.entries for k in e if CORRELATION.fullmatch(k)})


Methods = dict[str, list[Run]]


def read(arguments: list[str]) -> Methods:
    """The runs by method, in the order of the command line.

    Args:
        arguments: Work dirs, each as ``name=dir`` or as ``dir``.

    Raises:
        SystemExit: A run has no log, or two of a method have the same seed.
    """
    methods: Methods = {}
    for argument in arguments:
        name, _, path = argument.rpartition('=')
        if Path(argument).is_dir():
            name, path = '', argument
        run = Run.read(Path(path))
        same = methods.setdefault(name or Path(path).resolve().name, [])
        for other in same:
            if other.seed == run.seed:
                raise SystemExit(
                    f'{other.folder} and {run.folder} have the same name and seed '
                    f'({run.seed}). Name the methods: name={run.folder}'
                )
        same.append(run)
    return methods


def choose_metric(methods: Methods, metric: str | None = None) -> str:
    """The metric to compare by, which all runs have.

    Raises:
        SystemExit: A run lacks it, or has none of the known ones.
    """
    all_runs = [run for same in methods.values() for run in same]
    logged = {key for run in all_runs for key in run.metrics}
    metric = metric or next((known for known in METRICS if known in logged), None)
    if metric is None:
        raise SystemExit(
            f'No run has logged any of {list(METRICS)}. Choose one with --metric, of '
            f'{sorted(logged)}; without a validation there is none.'
        )
    for run in all_runs:
        if not run.curve(metric):
            raise SystemExit(
                f'{run.folder} has no {metric!r} in its log, only {run.metrics}. '
                'Either it was not validated yet, or --metric names another one.'
            )
    return metric


def make_table(methods: Methods, metric: str) -> str:
    """The table in Markdown, and a note if the runs do not end at the same step."""
    scores = {
        name: {run.seed: list(run.curve(metric).values())[-1] for run in same}
        for name, same in methods.items()
    }
    values = [value for by_seed in scores.values() for value in by_seed.values()]
    digits = 2 if max(map(abs, values)) > 1 else 4  # mmdet's AP are fractions
    first, *others = scores
    lines = [
        f'| method | seeds | last {metric} | minus {first}, paired by seed | pairs |',
        '|---|---:|---:|---:|---:|',
        f'| {first} | {len(scores[first])} '
        f'| {seeds.mean_and_spread(scores[first], digits)} | | |',
    ]
    for name in others:
        difference = seeds.paired(scores[name], scores[first])
        lines.append(
            f'| {name} | {len(scores[name])} '
            f'| {seeds.mean_and_spread(scores[name], digits)} '
            f'| {seeds.interval(difference, digits)} '
            f'| {len(scores[name].keys() & scores[first].keys())} |'
        )
    ends = {
        run.folder: list(run.curve(metric))[-1]
        for same in methods.values()
        for run in same
    }
    if len(set(ends.values())) > 1:
        steps = ', '.join(f'{folder} at {step}' for folder, step in ends.items())
        lines += ['', f'The last {metric} is not of the same step: {steps}.']
    return '\n'.join(lines)


def draw(methods: Methods, metric: str, file: Path) -> None:
    """Draw each seed thin and the mean of the seeds thick."""
    import matplotlib

    matplotlib.use('Agg')
    import matplotlib.pyplot as plt

    correlations = sorted(
        {key for same in methods.values() for run in same for key in run.correlations}
    )
    panels = 2 if correlations else 1
    figure, (row,) = plt.subplots(
        1, panels, figsize=(6.5 * panels, 4.5), squeeze=False, layout='constrained'
    )
    for i, (name, same) in enumerate(methods.items()):
        draw_seeds(row[0], [run.curve(metric) for run in same], f'C{i}', '-', name)
        for j, key in enumerate(correlations):
            curves = [run.curve(key) for run in same if key in run.correlations]
            style = STYLES[j % len(STYLES)]
            draw_seeds(row[1], curves, f'C{i}', style, f'{name}, {key}')
    # mmdet validates by epoch, mmseg by iteration
    row[0].set(xlabel='step of the validation', ylabel=metric)
    if correlations:
        row[1].set(xlabel='iteration', ylabel='correlation with the teacher')
    for axes in row:
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(file, dpi=100)
    plt.close(figure)


def draw_seeds(axes, curves: list[dict], colour: str, style: str, label: str) -> None:
    """Draw curves of a method, and their mean at the steps that all of them have."""
    for curve in curves if len(curves) > 1 else []:
        steps = sorted(curve)
        values = [curve[step] for step in steps]
        axes.plot(steps, values, style, color=colour, lw=0.7, alpha=0.5)
    steps = sorted(set.intersection(*map(set, curves))) if curves else []
    if steps:
        means = [sum(curve[step] for curve in curves) / len(curves) for step in steps]
        marker = 'o' if len(steps) == 1 else ''
        axes.plot(steps, means, style, marker=marker, color=colour, lw=2, label=label)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        'work_dirs',
        nargs='+',
        metavar='WORK_DIR',
        help='work dir of a training, `dir` or `name=dir`; the name is that of the '
        'method, else that of the folder',
    )
    parser.add_argument(
        '--metric', help=f'key in the log; the first of {METRICS} that is there'
    )
    parser.add_argument(
        '--out', type=Path, default=Path('compare.png'), help='the plot: %(default)s'
    )
    args = parser.parse_args()
    methods = read(args.work_dirs)
    metric = choose_metric(methods, args.metric)
    print(make_table(methods, metric))
    draw(methods, metric, args.out)
    print(f'\nCurves: {args.out}')


if __name__ == '__main__':
    main()
