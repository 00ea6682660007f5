"""The teacher: found, loaded, frozen, and shown images and classes as it knows them."""

from collections.abc import Mapping

from mmdist.lookup import check_arguments

from .classes import ClassMatch, match_classes
from .foreign import ForeignTeacher
from .hf_backbone import HFBackbone
from .huggingface import HFDetector, HFSegmentor
from .mean_teacher import MeanTeacher
from .renormalize import Renormalize
from .teacher import Teacher

__all__ = [
    'ClassMatch',
    'ForeignTeacher',
    'HFBackbone',
    'HFDetector',
    'HFSegmentor',
    'MeanTeacher',
    'Renormalize',
    'Teacher',
    'build_teacher',
    'match_classes',
]


def build_teacher(cfg: dict, student: dict, name: str = '') -> Teacher:
    """Build a teacher from its arguments.

    Args:
        cfg: Arguments of :class:`Teacher`, or ``ema``, those of :class:`MeanTeacher`.
        student: Config of the student.
        name: Its name in ``teachers``; '' for the only one.

    Raises:
        ValueError: It is no dict, an argument is unknown or missing, or ``ema`` stands
            beside arguments of another teacher.
    """
    name = f'teachers.{name}' if name else 'teacher'
    _check_dict(name, cfg)
    if 'ema' in cfg:
        ema = cfg['ema'] or {}
        _check_dict(f'{name}.ema', ema)
        check_arguments(f'{name}.ema', MeanTeacher, ema, given=('student', 'views'))
        others = sorted(set(cfg) - {'ema', 'views'})
        if others:
            raise ValueError(
                f'`{name}.ema` makes the teacher from the student, so it takes nothing '
                f'but `views` beside it, got {others}.'
            )
        teacher = MeanTeacher(student, views=cfg.get('views', ()), **ema)
    else:
        check_arguments(name, Teacher, cfg)
        teacher = Teacher(**cfg)
    teacher.name = name
    return teacher


def _check_dict(name: str, cfg: object) -> None:
    if not isinstance(cfg, Mapping):
        raise ValueError(f'`{name}` is a dict of arguments, got {cfg!r}.')
