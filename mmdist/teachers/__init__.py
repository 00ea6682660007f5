"""The teacher: found, loaded, frozen, and shown images and classes as it knows them."""

from .classes import ClassMatch, match_classes
from .foreign import ForeignTeacher
from .huggingface import HFDetector, HFSegmentor
from .mean_teacher import MeanTeacher
from .renormalize import Renormalize
from .teacher import Teacher

__all__ = [
    'ClassMatch',
    'ForeignTeacher',
    'HFDetector',
    'HFSegmentor',
    'MeanTeacher',
    'Renormalize',
    'Teacher',
    'build_teacher',
    'match_classes',
]


def build_teacher(cfg: dict, student: dict) -> Teacher:
    """Build a teacher from its arguments.

    Args:
        cfg: Arguments of :class:`Teacher`, or ``ema``, those of :class:`MeanTeacher`.
        student: Config of the student.

    Raises:
        ValueError: ``ema`` stands beside arguments of another teacher.
    """
    cfg = dict(cfg)
    if 'ema' not in cfg:
        return Teacher(**cfg)
    ema = dict(cfg.pop('ema') or {})
    views = cfg.pop('views', ())
    if cfg:
        raise ValueError(
            '`teacher.ema` makes the teacher from the student, so it takes nothing but '
            f'`views` beside it, got {sorted(cfg)}.'
        )
    return MeanTeacher(student, views=views, **ema)
