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
    scale: float  # from the log to percent
    smoke: dict  # settings of a dry run
    seconds: tuple[int, ...]  # of each part, on one core of two

    def config(self, part: str) -> Path:
        name = self.configs[PARTS.index(part)]
        return ROOT / 'configs' / self.name / 'quickstart' / f'{name}.py'

    def folder(self, part: str, seed: int) -> Path:
        # the students of all seeds share a teacher
        suffix = f'_seed{seed}' if seed and part != 'teacher' else ''
        return WORK_DIR / f'{self.config(part).stem}{suffix}'

    def result(self, part: str, seed: int) -> dict:
        """The result of a finished part."""
        return json.loads((self.folder(part, seed) / 'metrics.json').read_text())

    def results(self, part: str, seeds: list[int]) -> list[dict]:
        """The results of a part, one per seed; a teacher has one seed."""
        seeds = [0] if part == 'teacher' else seeds
        return [self.result(part, seed) for seed in seeds]


TASKS = (
    Task(
        'det',
        'Detection, RetinaNet',
        (
            'retinanet_w32_digits',
            'retinanet_w16_digits',
            'kl_retinanet_w32-w16_digits',
            'dist_retinanet_w32-w16_digits',
        ),
        'coco/bbox_mAP',
        'AP',
        100,
        {'train_cfg.max_epochs': 1, 'train_cfg.val_interval': 1},
        (140, 80, 110, 115),
    ),
    Task(
        'seg',
        'Segmentation, DeepLabV3',
        (
            'deeplabv3_w32_digits',
            'deeplabv3_w8_digits',
            'kl_deeplabv3_w32-w8_digits',
            'dist_deeplabv3_w32-w8_digits',
        ),
        'mIoU',
        'mIoU',
        1,
        {'train_cfg.max_iters': 2, 'train_cfg.val_interval': 2},
        (110, 50, 70, 95),
    ),
)


class Part(NamedTuple):
    """The training of one model of a task."""

    task: Task
    name: str  # of PARTS
    seed: int

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
            inputs.append(self.task.result('teacher', 0)['fingerprint'])
        return runs.fingerprint(*inputs)
