"""Does a student gain from its teacher? Train the grid of the study and write it up.

    python tools/study.py --tasks camvid --methods alone kl-t1 dist --budget 60

A cell of the grid is a task, a method, a teacher and a seed. Each is trained by
`tools/train.py` from the configs of `configs/study/<task>`, one process at a time. A
finished cell is skipped as long as its settings and its teacher are the same; one that
was stopped goes on from its last checkpoint. Each finished cell is a line of
`results.jsonl`; tables and a plot of all of them go into `results.md`, `results.png`.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from mmengine.config import Config
from run_log import count_parameters, failure, read_log
from scipy import stats

from mmdist.checkpoint import load_checkpoint
from mmdist.work_dir import last_whole_checkpoint

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = ROOT / 'configs' / 'study'
BEGIN = '<!-- Made by tools/study.py from results.jsonl; do not edit. -->\n'
END = '<!-- End of what is made. -->\n'
WEIGHTS = 'mobilenet_v2-b0353104.pth'


# ---- the grid --------------------------------------------------------------------


def kl(kind: str, classes: int, temperature: int, **options) -> dict:
    """Hinton's loss: mmdet's is a mean over the classes, the weight makes it a sum."""
    loss = dict(
        type='mmdet.KnowledgeDistillationKLDivLoss',
        T=temperature,
        loss_weight=float(classes),
    )
    return dict(kl=dict(type=kind, loss=loss, **options))


def methods(
    kind: str, classes: int, mimic: dict, sigmoid: bool = False, **kl_options
) -> dict[str, Any]:
    """What `distill` is for each method; None where there is no teacher.

    Args:
        kind: Type of the comparison of class logits.
        classes: Number of columns of a softmax.
        mimic: Arguments of the comparison of features.
        sigmoid: Whether the head has a sigmoid per class.
        kl_options: Arguments of the comparison for KL over the classes.
    """

    def dist(**options) -> dict:
        return dict(type=kind, loss=dict(type='mmdist.DISTLoss', **options))

    kl_binary = dict(
        type=kind, loss=dict(type='mmdist.BinaryKLDivLoss', loss_weight=100.0)
    )
    return {
        'alone': None,
        'kl-t1': kl(kind, classes, 1, **kl_options),
        'kl-t4': kl(kind, classes, 4, **kl_options),
        **({'kl-binary': dict(kl=kl_binary)} if sigmoid else {}),
        'dist': dict(dist=dist()),
        'dist-inter': dict(dist=dist(gamma=0.0)),
        'dist-intra': dict(dist=dist(beta=0.0)),
        'dist-mimic': dict(
            dist=dist(), mimic=dict(type='mmdist.Features', adapt=True, **mimic)
        ),
    }


@dataclass(frozen=True)
class Task:
    """A data set and a kind of model: where its configs are and how it is scored."""

    folder: str
    metric: str  # in the log
    label: str
    percent: float  # from the log to percent
    methods: dict
    num_images: int  # for training
    has_test: bool  # images by which nothing was chosen

    def config(self, part: str, scale: str) -> Path:
        folder = self.folder + ('-full' if scale == 'full' else '')
        return CONFIGS / folder / f'{part}.py'


SEG = methods(
    'mmdist.SegLogits', 11, dict(student='backbone', levels=[-1], teacher_levels=[-1])
)
DENSE = methods('mmdist.DenseLogits', 3, {}, sigmoid=True, anchors='separate')
ROI = methods('mmdist.RoILogits', 4, {})
TASKS = {
    'camvid': Task('camvid', 'mIoU', 'mIoU', 1, SEG, 367, True),
    'bccd-retinanet': Task(
        'bccd-retinanet', 'coco/bbox_mAP', 'AP', 100, DENSE, 292, False
    ),
    'bccd-faster-rcnn': Task(
        'bccd-faster-rcnn', 'coco/bbox_mAP', 'AP', 100, ROI, 292, False
    ),
}
# Only every fourth training image is labelled for the students; not for the teachers.
TASKS |= {f'{name}-25': task for name, task in TASKS.items()}
METHODS = tuple(DENSE)
TEACHERS = ('strong', 'weak')
SINGLE = ('teacher', 'alone')  # trained without another model


class Cell(NamedTuple):
    """One training: of a teacher, or of a student by a method from a teacher."""

    scale: str
    task: str
    method: str  # 'teacher', or a key of METHODS
    teacher: str  # '' for a student alone
    seed: int

    @property
    def folder(self) -> Path:
        """Where it is trained, below the work dir."""
        name = '_'.join(filter(None, (self.method, self.teacher, f'seed{self.seed}')))
        return Path(self.scale) / self.task / name

    @property
    def its_teacher(self) -> Cell:
        """The students of all seeds and labelled shares have the same."""
        task = TASKS[self.task].folder
        return Cell(self.scale, task, 'teacher', self.teacher, 0)

    @property
    def command(self) -> str:
        """What trains it, and its teacher first."""
        teacher = f' --teachers {self.teacher}' if self.teacher else ''
        scale = f' --scale {self.scale}' if self.scale != 'small' else ''
        return (
            f'python tools/study.py --tasks {self.task} --methods {self.method}'
            f'{teacher} --seeds {self.seed}{scale}'
        )


def grid(
    scale: str,
    tasks: Sequence[str],
    methods: Sequence[str],
    teachers: Sequence[str],
    seeds: Sequence[int],
) -> Iterator[Cell]:
    """Seed by seed, so that what is done when time is up can be compared in pairs."""
    for task, teacher, seed in itertools.product(tasks, teachers, seeds):
        for method in methods:
            if method not in ('teacher', *TASKS[task].methods):
                continue  # kl-binary, of heads with sigmoids
            cell = Cell(scale, task, method, teacher, seed)
            if method == 'alone':
                yield cell._replace(teacher='')
            else:
                yield cell.its_teacher
                if method != 'teacher':
                    yield cell


def walk(node: Any, change) -> Any:
    """A copy of nested dicts and lists with every string changed."""
    if isinstance(node, dict):
        return type(node)({k: walk(v, change) for k, v in node.items()})
    if isinstance(node, (list, tuple)):
        return type(node)(walk(v, change) for v in node)
    return change(node) if isinstance(node, str) else node


@dataclass
class Study:
    """Where the data are and where cells are trained."""

    work_dir: Path
    data_root: Path
    weights: Path | None = None

    def settings(self, cell: Cell) -> Config:
        """The config of a cell, before paths of this machine are filled in."""
        task = TASKS[cell.task]
        is_teacher = cell.method == 'teacher'
        part = f'teacher-{cell.teacher}' if is_teacher else 'student'
        path = task.config(part, cell.scale)
        if not path.is_file():
            raise SystemExit(
                f'There is no {path}: the study has no task {cell.task!r} at --scale '
                f'{cell.scale}.'
            )
        cfg = Config.fromfile(path)
        cfg.randomness = dict(seed=cell.seed)
        if is_teacher:
            return cfg
        if cell.task.endswith('-25'):
            # neighbours are alike: every fourth, not the first quarter
            cfg.train_dataloader.dataset.indices = list(range(0, task.num_images, 4))
        if cell.method != 'alone':
            cfg.model = dict(
                type='mmdist.Distiller',
                student=cfg.model,
                teacher=dict(config='', checkpoint=''),
                distill=deepcopy(task.methods[cell.method]),
            )
        return cfg

    def fingerprint(self, cell: Cell) -> str:
        """Hash of all settings that a result depends on, and its teacher's."""
        # not pretty_text, which takes seconds
        text = json.dumps(self.settings(cell)._cfg_dict.to_dict(), sort_keys=True)
        if cell.method not in SINGLE:
            text += self.fingerprint(cell.its_teacher)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def folder(self, cell: Cell) -> Path:
        return self.work_dir / cell.folder

    def config(self, cell: Cell) -> Config:
        """The config of a cell with the paths of this machine; its teacher is done."""

        def fill_in(text: str) -> str:
            if text.startswith('data/'):
                return str(self.data_root / text.removeprefix('data/'))
            if text.endswith(WEIGHTS) and self.weights:
                return str(self.weights)
            return text

        cfg = self.settings(cell)
        cfg = Config(walk(cfg._cfg_dict.to_dict(), fill_in))
        if 'teacher' in cfg.model:
            folder = self.folder(cell.its_teacher)
            checkpoint, _ = last_whole_checkpoint(folder)
            cfg.model.teacher = dict(
                config=str(folder / 'config.py'), checkpoint=checkpoint
            )
        return cfg

    def finished(self, cell: Cell) -> dict | None:
        """What came out of a cell, if it is done with these very settings."""
        file = self.folder(cell) / 'metrics.json'
        result = json.loads(file.read_text()) if file.is_file() else {}
        return result if result.get('fingerprint') == self.fingerprint(cell) else None

    def train(self, cell: Cell, deadline: float) -> dict | None:
        """Train a cell, or go on with it; None if the time was up before the end."""
        folder, mark = self.folder(cell), self.fingerprint(cell)
        note = folder / 'fingerprint'
        is_new = not note.is_file() or note.read_text() != mark or is_broken(folder)
        if is_new:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            self.config(cell).dump(folder / 'config.py')
            note.write_text(mark)
        log_file = folder / 'train.log'
        began = time.time()
        code = run(
            'train.py',
            [folder / 'config.py', '--work-dir', folder, '--resume'],
            log_file,
            deadline,
        )
        with (folder / 'seconds').open('a') as file:
            file.write(f'{time.time() - began:.0f}\n')
        if code is None:
            return None
        result = self.read(cell)
        if result is None and not is_new:  # it was stopped while it was validated
            note.unlink()
            return self.train(cell, deadline)
        if result is None:
            raise SystemExit(
                f'{log_file} ends without the {TASKS[cell.task].metric} of the last '
                'step. mmdet logs none where nothing at all was detected.'
            )
        result['fingerprint'] = mark
        (folder / 'metrics.json').write_text(json.dumps(result))
        return result

    def read(self, cell: Cell) -> dict | None:
        """What a finished run has logged; None without a score of the last step."""
        task, folder = TASKS[cell.task], self.folder(cell)
        entries = read_log(folder)
        curve = {
            entry['step']: round(task.percent * entry[task.metric], 3)
            for entry in entries
            if task.metric in entry
        }
        train_cfg = Config.fromfile(folder / 'config.py').train_cfg
        last = train_cfg.get('max_iters') or train_cfg.get('max_epochs')
        if last not in curve:
            return None
        checkpoint, _ = last_whole_checkpoint(folder)
        state = load_checkpoint(checkpoint)['state_dict']
        result = {
            'score': curve[last],
            'curve': sorted(curve.items()),
            'parameters': count_parameters(state),
            'seconds': sum(map(int, (folder / 'seconds').read_text().split())),
        }
        for relation in ('inter', 'intra'):
            values = [e[f'dist_{relation}'] for e in entries if f'dist_{relation}' in e]
            if values:
                result[relation] = values[-1]
        return result

    def test(self, cell: Cell, deadline: float) -> float | None:
        """The score of a finished cell on the test images; None if time was up."""
        task, folder = TASKS[cell.task], self.folder(cell)
        out = folder / 'test'
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir()
        checkpoint, _ = last_whole_checkpoint(folder)
        arguments = [folder / 'config.py', checkpoint, '--work-dir', out]
        if run('test.py', arguments, out / 'test.log', deadline) is None:
            return None
        (file,) = out.glob('*/*.json')
        return round(task.percent * json.loads(file.read_text())[task.metric], 3)


def is_broken(folder: Path) -> bool:
    """Whether a run was stopped while it wrote its first checkpoint."""
    try:
        last_whole_checkpoint(folder)
    except RuntimeError:
        return True
    return False


def run(tool: str, arguments: list, log_file: Path, deadline: float) -> int | None:
    """Run a tool in a process of its own; None if it was stopped at the deadline."""
    command = [sys.executable, str(ROOT / 'tools' / tool), *map(str, arguments)]
    with log_file.open('a') as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        try:
            process.wait(max(0.0, deadline - time.time()))
        except subprocess.TimeoutExpired:
            return None
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait()
    if process.returncode:
        raise SystemExit(failure(tool, process.returncode, log_file))
    return 0


# ---- what comes out --------------------------------------------------------------


class Paired(NamedTuple):
    """The mean of paired differences and its 95 % interval."""

    n: int
    mean: float
    low: float
    high: float


def paired(ours: dict[int, float], theirs: dict[int, float]) -> Paired | None:
    """Differences of two methods, paired by seed, with Student's t; None below two.

    Args:
        ours: Scores by seed.
        theirs: Scores by seed; seeds that only one of the two has are left out.
    """
    seeds = sorted(ours.keys() & theirs.keys())
    if len(seeds) < 2:
        return None
    differences = np.array([ours[s] - theirs[s] for s in seeds])
    n, mean = len(seeds), differences.mean()
    half = stats.t.ppf(0.975, n - 1) * differences.std(ddof=1) / np.sqrt(n)
    return Paired(n, float(mean), float(mean - half), float(mean + half))


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


def mean_and_spread(scores: dict[int, float]) -> str:
    """Mean and standard deviation over seeds; a dash for none."""
    values = list(scores.values())
    if not values:
        return '-'
    spread = f' ± {np.std(values, ddof=1):.2f}' if len(values) > 1 else ''
    return f'{np.mean(values):.2f}{spread}'


def interval(difference: Paired | None) -> str:
    if difference is None:
        return '-'
    _, mean, low, high = difference
    return f'{mean:+.2f} [{low:+.2f}, {high:+.2f}]'


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

    panels = sorted({cell[:2] for cell in results if cell.method not in SINGLE})
    figure, rows = plt.subplots(
        len(panels), 1, figsize=(8, 0.6 + 2.6 * len(panels)), squeeze=False,
        layout='constrained',
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
            colour = 'tab:green' if method.startswith('dist') else 'tab:orange'
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
    made = f'{BEGIN}{tables}\n![differences to the student alone](results.png)\n{END}'
    text = page.read_text() if page.is_file() else f'# Results\n\n{BEGIN}{END}'
    before, _, rest = text.partition(BEGIN)
    page.write_text(before + made + rest.partition(END)[2])
    if any(cell.method not in SINGLE for cell in results):
        draw(results, out / 'results.png')
    return tables


# ---- the command -----------------------------------------------------------------


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--tasks', nargs='+', default=['camvid'], choices=list(TASKS))
    parser.add_argument(
        '--methods', nargs='+', default=list(METHODS), metavar='METHOD',
        choices=('teacher', *METHODS), help=f'of {", ".join(METHODS)} (default: all)',
    )  # fmt: skip
    parser.add_argument('--teachers', nargs='+', default=['strong'], choices=TEACHERS)
    parser.add_argument('--seeds', nargs='+', type=int, default=[0, 1, 2])
    parser.add_argument(
        '--scale', default='small', choices=('small', 'full'),
        help='full: usual sizes and schedules, for a GPU',
    )  # fmt: skip
    parser.add_argument(
        '--budget', type=float, metavar='MINUTES',
        help='stop then; what is unfinished goes on when this is run again',
    )  # fmt: skip
    parser.add_argument(
        '--test', action='store_true',
        help='score the finished cells of this grid on the test images as well',
    )  # fmt: skip
    parser.add_argument(
        '--data-root', type=Path, default=Path('data'),
        help='the folder that holds camvid and bccd (default: data)',
    )  # fmt: skip
    parser.add_argument(
        '--weights', type=Path, help=f'a copy of {WEIGHTS} (default: downloaded)'
    )
    parser.add_argument('--work-dir', type=Path, default=Path('work_dirs/study'))
    parser.add_argument(
        '--out', type=Path, default=ROOT / 'docs',
        help='where results.jsonl, results.md and results.png are (default: docs)',
    )  # fmt: skip
    args = parser.parse_args(argv)
    for path in (args.data_root, args.weights):
        if path is not None and not path.exists():
            parser.error(f'there is no {path}')
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # with what it runs
    start = time.time()
    deadline = start + 60 * args.budget if args.budget else float('inf')
    study = Study(
        args.work_dir.resolve(),
        args.data_root.resolve(),
        args.weights and args.weights.resolve(),
    )
    file = args.out / 'results.jsonl'
    args.out.mkdir(parents=True, exist_ok=True)
    grid_ = dict.fromkeys(
        grid(args.scale, args.tasks, args.methods, args.teachers, args.seeds)
    )
    if not grid_:
        raise SystemExit(f'{args.tasks} have no method of {args.methods}.')
    for number, cell in enumerate(grid_, 1):
        title = f'[{number}/{len(grid_)}] {cell.folder}'
        result = study.finished(cell)
        if result is None:
            print(f'{title}: trains, {(time.time() - start) / 60:.0f} min', flush=True)
            result = study.train(cell, deadline)
        wanted = args.test and TASKS[cell.task].has_test
        if result is not None and wanted and 'test' not in result:
            score = study.test(cell, deadline)
            if score is not None:
                result['test'] = score
                (study.folder(cell) / 'metrics.json').write_text(json.dumps(result))
        if result is None:
            print(f'{title}: time is up; run this again to go on', flush=True)
            break
        label = TASKS[cell.task].label
        print(f'{title}: {label} {result["score"]:.2f}', flush=True)
        row = {**cell._asdict(), **result, 'command': cell.command}
        if cell.method not in SINGLE:
            # which one it had: on another kind of CPU the same settings give another
            row['teacher_score'] = study.finished(cell.its_teacher)['score']
        if read_results(file).get(cell) != row:
            with file.open('a') as lines:
                lines.write(json.dumps(row) + '\n')
    print(write_up(args.out))


if __name__ == '__main__':
    main()
