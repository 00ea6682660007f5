"""Write a pair of two models of one tiny config, as files that tools read."""

from __future__ import annotations

from functools import cache, partial
from pathlib import Path

import pytest
import torch
from builders import distilled_text
from mmengine.config import Config

from mmdist.teachers.teacher import build_model, load_config

SLOW = partial(pytest.param, marks=pytest.mark.slow)


def write_pair(
    folder: Path, student: str, more: str = '', distill: str = '', **teacher
) -> None:
    """Write `student.py` and `pair.py`, in which `teacher.pth` teaches the student.

    Args:
        folder: Where to write them.
        student: Text of the student's config.
        more: Lines at the end of `pair.py`.
        distill: What is compared; empty takes the default.
        teacher: Arguments of the teacher, in addition to or instead of the defaults.
    """
    (folder / 'student.py').write_text(student)
    teacher = dict(config='student.py', checkpoint='teacher.pth') | teacher
    (folder / 'pair.py').write_text(distilled_text(more, distill, **teacher))


def write_weights(
    folder: Path, name: str = 'teacher', seed: int = 1, std: float | None = None
) -> None:
    """Save random weights of the student, for `teacher.pth` or another name.

    Args:
        folder: Where `student.py` is.
        name: Name of the file, without its suffix.
        seed: Seed of the weights.
        std: Standard deviation of all weights; the model's own initialisation if None.
    """
    weights = _random_weights((folder / 'student.py').read_text(), seed, std)
    torch.save(dict(state_dict=weights), folder / f'{name}.pth')


@cache
def _random_weights(student: str, seed: int, std: float | None) -> dict:
    torch.manual_seed(seed)
    config = load_config(Config.fromstring(student, '.py'))
    model = build_model(config, random=True)
    for parameter in model.parameters() if std else ():
        torch.nn.init.normal_(parameter, std=std)
    return model.state_dict()
