"""tools/compare.py on logs that mmengine wrote, against numpy and scipy."""

from __future__ import annotations

from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
import scipy.stats
from matplotlib.figure import Figure
from mmengine.config import Config
from mmengine.visualization import LocalVisBackend


@pytest.fixture
def compare(run_tool):
    """Run the tool; returns what it printed, or its error."""

    def run(*args: str, status: int = 0) -> str:
        ran = run_tool('compare', *args, status=status)
        return ran.said if status else ran.out

    return run


def write_log(
    work_dir: Path,
    scores: dict[int, float],
    seed: int | None = 0,
    metric: str = 'mIoU',
    correlation: float | None = None,
    timestamp: str = '20260101_000000',
) -> Path:
    """Write a run's log of a metric by step, with mmengine's own backend.

    ``correlation`` is logged as `dist_inter` and, minus 0.1, as `dist_intra`.
    """
    folder = work_dir / timestamp / 'vis_data'
    folder.mkdir(parents=True)
    backend = LocalVisBackend(save_dir=str(folder))
    seeds = {} if seed is None else dict(randomness=dict(seed=seed))
    backend.add_config(Config(dict(default_scope='mmseg', **seeds)))
    for step, score in scores.items():
        train = dict(lr=0.1, loss=1.0, step=step)
        if correlation is not None:
            train |= dict(dist_inter=correlation, dist_intra=correlation - 0.1)
        backend.add_scalars(train)
        backend.add_scalars({metric: score, 'time': 0.1, 'step': step})
    return work_dir


def rows(output: str) -> list[list[str]]:
    """The cells of the table's rows, without the heading."""
    lines = [line for line in output.splitlines() if line.startswith('|')][2:]
    return [[cell.strip() for cell in line.split('|')[1:-1]] for line in lines]


def test_table_has_the_last_values_over_seeds_and_paired_differences(compare, tmp_path):
    alone, dist = np.array([41.0, 42.5, 40.25]), np.array([43.0, 47.0, 41.5])
    names = []
    for seed in range(3):
        write_log(tmp_path / f'a{seed}', {2: 1.0, 4: alone[seed]}, seed)
        write_log(tmp_path / f'd{seed}', {2: 9.0, 4: dist[seed]}, seed, correlation=0.5)
        names += [f'alone=a{seed}', f'DIST=d{seed}']
    # a seed that the first method lacks only counts in the mean
    write_log(tmp_path / 'd7', {4: 50.0}, 7)

    output = compare(*names, 'DIST=d7', '--out', 'out.png')
    low, high = scipy.stats.ttest_rel(dist, alone).confidence_interval(0.95)
    all_dist = [*dist, 50.0]
    assert rows(output) == [
        ['alone', '3', f'{alone.mean():.2f} ± {alone.std(ddof=1):.2f}', '', ''],
        [
            'DIST', '4', f'{np.mean(all_dist):.2f} ± {np.std(all_dist, ddof=1):.2f}',
            f'{(dist - alone).mean():+.2f} [{low:+.2f}, {high:+.2f}]', '3',
        ],
    ]  # fmt: skip
    assert 'last mIoU | minus alone, paired by seed' in output
    assert 'different steps' not in output
    height, width, _ = matplotlib.image.imread(tmp_path / 'out.png').shape
    assert width > 2 * height  # two panels


def test_the_mean_is_drawn_at_the_steps_that_all_seeds_have(tools):
    from compare import draw_seeds

    axes = Figure().add_subplot()
    curves = [{1: 10.0, 2: 20.0, 3: 30.0}, {1: 30.0, 2: 60.0}]
    draw_seeds(axes, curves, 'C0', '-', 'DIST')
    *thin, mean = axes.lines
    for line, curve in zip(thin, curves, strict=True):
        np.testing.assert_array_equal(line.get_xydata(), list(curve.items()))
        assert line.get_linewidth() < mean.get_linewidth()
    np.testing.assert_array_equal(mean.get_xydata(), [(1, 20), (2, 40)])
    assert mean.get_label() == 'DIST'


def test_methods_are_named_by_their_folders_and_fractions_have_four_digits(
    compare, tmp_path
):
    for name, score in (('alone', 0.482), ('dist', 0.513)):
        write_log(tmp_path / name, {1: score}, metric='coco/bbox_mAP')
    assert rows(compare('alone', 'dist/')) == [
        ['alone', '1', '0.4820', '', ''],
        ['dist', '1', '0.5130', '-', '1'],
    ]
    height, width, _ = matplotlib.image.imread(tmp_path / 'compare.png').shape
    assert width < 2 * height  # no correlations, no second panel


def test_runs_without_a_seed_are_seeds_but_no_pairs(compare, tmp_path):
    for name, score in dict(a=10.0, b=20.0, c=30.0, d=40.0).items():
        write_log(tmp_path / name, {1: score}, seed=None)
    output = compare('alone=a', 'alone=b', 'dist=c', 'dist=d')
    assert rows(output) == [
        ['alone', '2', '15.00 ± 7.07', '', ''],
        ['dist', '2', '35.00 ± 7.07', '-', '0'],
    ]


def test_a_run_that_went_on_or_began_anew_counts_as_the_last_of_it(compare, tmp_path):
    write_log(tmp_path / 'a', {1: 10.0, 2: 11.0, 3: 12.0})
    write_log(tmp_path / 'a', {2: 21.0, 3: 22.0, 4: 23.0}, timestamp='20260102_000000')
    write_log(tmp_path / 'b', {1: 10.0, 2: 11.0, 3: 12.0})
    write_log(tmp_path / 'b', {1: 30.0}, seed=5, timestamp='20260102_000000')
    output = compare('a', 'b')
    assert [row[2] for row in rows(output)] == ['23.00', '30.00']
    assert 'The last mIoU comes from different steps: a at 4, b at 1.' in output
    assert rows(output)[1][4] == '0'  # seed 0 and seed 5


def test_another_metric_can_be_chosen(compare, tmp_path):
    write_log(tmp_path / 'a', {1: 70.0}, metric='mAcc')
    assert rows(compare('a', '--metric', 'mAcc'))[0][2] == '70.00'
    said = compare('a', status=1)
    assert "No run has logged any of ['mIoU', 'coco/bbox_mAP']" in said
    assert "['mAcc']" in said


def test_a_run_without_a_score_has_a_dash(compare, tmp_path):
    write_log(tmp_path / 'good', {1: 10.0})
    write_log(tmp_path / 'young', {}, seed=1)
    backend = tmp_path / 'young' / '20260101_000000' / 'vis_data'
    (backend / 'scalars.json').write_text('{"lr": 0.1, "step": 1}\n{"lr": ')
    write_log(tmp_path / 'det', {1: 0.1}, metric='coco/bbox_mAP')
    (tmp_path / 'det' / '20260101_000000' / 'vis_data' / 'config.py').write_text(
        'hello'
    )
    output = compare('a=good', 'a=young', 'b=det')
    assert rows(output) == [['a', '1', '10.00', '', ''], ['b', '0', '-', '-', '0']]
    assert "young has no 'mIoU' yet; it has logged nothing." in output
    assert "det has no 'mIoU' yet; it has logged ['coco/bbox_mAP']." in output


def test_runs_that_cannot_be_compared_are_named(compare, tmp_path):
    write_log(tmp_path / 'good', {1: 10.0})
    (tmp_path / 'empty').mkdir()
    write_log(tmp_path / 'twin', {1: 10.0})
    write_log(tmp_path / 'broken', {1: 1.0})
    log = tmp_path / 'broken/20260101_000000/vis_data/scalars.json'
    log.write_text('hello}')
    for args, expected in {
        ('good', 'empty'): 'empty has no log',
        ('good', 'missing'): 'missing has no log',
        ('good', 'broken'): 'broken has a broken log',
        ('a=good', 'a=twin'): 'good and twin have the same name and seed (0)',
    }.items():
        assert expected in compare(*args, status=1)
    assert not (tmp_path / 'compare.png').exists()
