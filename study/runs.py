"""Cells of the grid: their configs, and how they are trained and tested."""

from __future__ import annotations

import functools
import json
import math
import shutil
import time
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmengine.config import Config

from benchmarks.measure import processor
from mmdist.work_dir import last_whole_checkpoint
from tools.dev import runs

from .grid import NO_LABELS, SINGLE, STORED, STORED_ONCE, TASKS, Cell

WEIGHTS = 'mobilenet_v2-b0353104.pth'
# Options of tools/store_teacher.py.
VIEWS = {STORED: ['--flip', '--scales', 0.75, 1, 1.25], STORED_ONCE: []}


@functools.cache
def read_config(path: Path) -> Config:
    """Read a config file once; mmengine takes a second for each."""
    return Config.fromfile(path)


def walk(node: Any, change) -> Any:
    """A copy of nested dicts and lists with every string changed."""
    if isinstance(node, dict):
        return type(node)({k: walk(v, change) for k, v in node.items()})
    if isinstance(node, (list, tuple)):
        return type(node)(walk(v, change) for v in node)
    return change(node) if isinstance(node, str) else node


def without_labels(dataset: dict) -> dict:
    """Config of the same data set that reads no labels.

    Args:
        dataset: Config of a data set whose pipeline ends with packing.
    """
    bare = deepcopy(dataset)
    bare.pipeline = [x for x in bare.pipeline if x.type != 'LoadAnnotations']
    for transform in bare.pipeline:
        transform.pop('cat_max_ratio', None)  # it chooses crops by their labels
    bare.pipeline.append(dict(type='mmdist.MarkUnlabelled'))
    return bare


@dataclass
class Study:
    """Where the data are and where cells are trained."""

    work_dir: Path
    data_root: Path
    weights: Path | None = None

    def settings(self, cell: Cell) -> Config:
        """The config of a cell, before this machine's paths are filled in."""
        if not cell.config.is_file():
            raise SystemExit(
                f'There is no {cell.config}: the study has no task {cell.task!r} at '
                f'--scale {cell.scale}.'
            )
        cfg = deepcopy(read_config(cell.config))
        cfg.randomness = dict(seed=cell.seed)
        if cell.method in SINGLE:
            return cfg
        if cell.method == NO_LABELS:
            loader = cfg.train_dataloader
            loader.dataset = without_labels(loader.dataset)
        teacher = dict(config='', checkpoint='')
        if cell.method in VIEWS:
            teacher = dict(stored=' '.join(map(str, VIEWS[cell.method])))
            cfg.custom_hooks = [dict(type='mmdist.StoredTeacherHook')]
        cfg.model = dict(
            type='mmdist.Distiller',
            student=cfg.model,
            teacher=teacher,
            **deepcopy(TASKS[cell.task].changes(cell.method, cell.teacher)),
        )
        return cfg

    def fingerprint(self, cell: Cell) -> str:
        """Hash of all settings that a result depends on, including its teacher's."""
        # not pretty_text, which takes seconds
        text = json.dumps(self.settings(cell)._cfg_dict.to_dict(), sort_keys=True)
        if cell.method not in SINGLE:
            text += ''.join(map(self.fingerprint, cell.its_teachers))
        return runs.fingerprint(text)

    def folder(self, cell: Cell) -> Path:
        return self.work_dir / cell.folder

    def config(self, cell: Cell) -> Config:
        """Config of a cell with this machine's paths; its teacher must be trained."""

        def fill_in(text: str) -> str:
            if text.startswith('data/'):
                return str(self.data_root / text.removeprefix('data/'))
            if text.endswith(WEIGHTS) and self.weights:
                return str(self.weights)
            return text

        cfg = self.settings(cell)
        cfg = Config(walk(cfg._cfg_dict.to_dict(), fill_in))
        if cell.method in VIEWS:
            cfg.model.teacher = dict(stored=str(self.store(cell)))
        elif 'teacher' in cfg.model:
            cfg.model.teacher = self.trained(*cell.its_teachers)
        return cfg

    def trained(self, teacher: Cell) -> dict:
        """The arguments of a trained teacher."""
        folder = self.folder(teacher)
        checkpoint, _ = last_whole_checkpoint(folder)
        return dict(config=str(folder / 'config.py'), checkpoint=checkpoint)

    def store(self, cell: Cell) -> Path:
        """Store the answers of a cell's teachers unless done; returns the folder."""
        names = [one.task.replace('-', '_') for one in cell.its_teachers]
        teachers = dict(zip(names, map(self.trained, cell.its_teachers), strict=True))
        mark = runs.fingerprint(*map(self.fingerprint, cell.its_teachers))
        folder = self.work_dir / cell.scale / f'{cell.method}_{mark}'
        folder.mkdir(exist_ok=True)
        cfg = self.config(cell._replace(method='default'))
        cfg.model.teachers, cfg.model.teacher = teachers, None
        cfg.dump(folder / 'pair.py')
        out = folder / 'store'
        arguments = [folder / 'pair.py', '--out', out, *VIEWS[cell.method]]
        run('store_teacher.py', arguments, folder / 'store.log', math.inf)
        return out

    def finished(self, cell: Cell) -> dict | None:
        """The result of a cell, if it has finished with exactly these settings."""
        return runs.finished(self.folder(cell), self.fingerprint(cell))

    def train(self, cell: Cell, deadline: float) -> dict | None:
        """Train or resume a cell; None if time ran out."""
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
        done = run(
            'train.py',
            [folder / 'config.py', '--work-dir', folder, '--resume'],
            log_file,
            deadline,
        )
        with (folder / 'seconds').open('a') as file:
            file.write(f'{time.time() - began:.0f}\n')
        if not done:
            return None
        result = self.read(cell)
        if result is None and not is_new:  # it was stopped during validation
            note.unlink()
            return self.train(cell, deadline)
        if result is None:
            raise SystemExit(
                f'{log_file} ends without the {TASKS[cell.task].metric} of the last '
                'step. mmdet logs none where nothing at all was detected.'
            )
        result['fingerprint'] = mark
        runs.save_result(folder, result)
        return result

    def read(self, cell: Cell) -> dict | None:
        """Read a finished run's log; None if it has no score of the last step."""
        task, folder = TASKS[cell.task], self.folder(cell)
        checkpoint, _ = last_whole_checkpoint(folder)
        found = runs.read_training(folder, checkpoint, task.metric, task.percent)
        train_cfg = Config.fromfile(folder / 'config.py').train_cfg
        last = train_cfg.get('max_iters') or train_cfg.get('max_epochs')
        score = dict(found['curve']).get(last)
        if score is None:
            return None
        seconds = sum(map(int, (folder / 'seconds').read_text().split()))
        return dict(score=score, seconds=seconds, machine=processor(), **found)

    def test(self, cell: Cell, deadline: float) -> float | None:
        """The score of a finished cell on the test images; None if time ran out."""
        task, folder = TASKS[cell.task], self.folder(cell)
        out = folder / 'test'
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir()
        checkpoint, _ = last_whole_checkpoint(folder)
        arguments = [folder / 'config.py', checkpoint, '--work-dir', out]
        if not run('test.py', arguments, out / 'test.log', deadline):
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


def run(tool: str, arguments: list, log_file: Path, deadline: float) -> bool:
    """Run a tool in its own process; False if it was stopped at the deadline."""
    with runs.tool(tool, arguments, log_file) as process:
        left = None if math.isinf(deadline) else max(0.0, deadline - time.time())
        process.join(left)
        return not process.is_alive()
