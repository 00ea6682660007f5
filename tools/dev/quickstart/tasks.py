"""The two tasks of the quickstart, their trainings, and where the results are."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from tools.dev import runs

ROOT = Path(__file__).resolve().parents[3]
WORK_DIR = Path('work_dirs/quickstart')
PARTS = ('teacher', 'student alone', 'student + KL', 'student + DIST')
LAST = 'student + KL'  # trained last: the gain of DIST is seen without it


@dataclass(eq=False)
class Task:
    """One of the two tasks: its four configs and how it is scored."""

    name: str
    title: str
    configs: tuple[str, ...]  # one per part
    metric: str  # in the log
    label: str
    percent: float  # factor from the log to percent
    smoke: dict  # settings of a dry run
    seconds: tuple[int, ...]  # of each part, on one core of two

    def config(self, part: str) -> Path:
        name = self.configs[PARTS.index(part)]
        return ROOT / 'configs' / self.name / 'quickstart' / f'{name}_digits.py'

    def folder(self, part: str, seed: int) -> Path:
        # the students of all seeds share a teacher
        suffix = f'_seed{seed}' if seed and part != 'teacher' else ''
        return WORK_DIR / f'{self.config(part).stem}{suffix}'

    def results(self, part: str, seeds: list[int]) -> list[dict]:
        """The results of a finished part, one per seed; a teacher has one seed."""
        folders = [self.folder(part, seed) for seed in seeds]
        files = [folder / 'metrics.json' for folder in dict.fromkeys(folders)]
        return [json.loads(file.read_text()) for file in files]


TASKS = (
    Task(
        name='det',
        title='Detection, RetinaNet',
        configs=(
            'retinanet_w32', 'retinanet_w16',
            'kl_retinanet_w32-w16', 'dist_retinanet_w32-w16',
        ),
        metric='coco/bbox_mAP',
        label='AP',
        percent=100,
        smoke={'train_cfg.max_epochs': 1, 'train_cfg.val_interval': 1},
        seconds=(140, 80, 110, 115),
    ),
    Task(
        name='seg',
        title='Segmentation, DeepLabV3',
        configs=(
            'deeplabv3_w32', 'deeplabv3_w8',
            'kl_deeplabv3_w32-w8', 'dist_deeplabv3_w32-w8',
        ),
        metric='mIoU',
        label='mIoU',
        percent=1,
        smoke={'train_cfg.max_iters': 2, 'train_cfg.val_interval': 2},
        seconds=(110, 50, 70, 95),
    ),
)  # fmt: skip


class Part(NamedTuple):
    """The training of one model of a task."""

    task: Task
    name: str  # of PARTS
    seed: int

    @property
    def title(self) -> str:
        """A short name: one line of progress shows two of them."""
        title = f'{self.task.name} {self.name.removeprefix("student ")}'
        return f'{title} seed {self.seed}' if self.seed else title

    @property
    def teacher(self) -> Part | None:
        """The part that must be trained before it, if any."""
        alone = self.name in PARTS[:2]
        return None if alone else Part(self.task, 'teacher', 0)

    @property
    def seconds(self) -> int:
        """Its training time on one core of two, on the machine that was measured."""
        return self.task.seconds[PARTS.index(self.name)]

    def fingerprint(self, options: dict) -> str:
        """Hash of all that the result depends on: settings, data and teacher."""
        from mmengine.config import Config

        inputs = [
            Config.fromfile(self.task.config(self.name)).pretty_text,
            repr(sorted(options.items())),
            Path('data/digits/digits.json').read_text(),
        ]
        if self.teacher:
            (teacher,) = self.task.results('teacher', [0])
            inputs.append(teacher['fingerprint'])
        return runs.fingerprint(*inputs)
