"""Teachers: load and freeze them, and map images and classes to their conventions."""

from collections.abc import Mapping

from mmdist.lookup import check_arguments

from .classes import ClassMatch, match_classes
from .foreign import ForeignTeacher
from .hf_backbone import HFBackbone
from .huggingface import HFDetector, HFSegmentor
from .mean_teacher import MeanTeacher
from .renormalize import Renormalize
from .stored import StoredAnswers, StoredTeacher
from .teacher import Teacher

__all__ = [
    'ClassMatch',
    'ForeignTeacher',
    'HFBackbone',
    'HFDetector',
    'HFSegmentor',
    'MeanTeacher',
    'Renormalize',
    'StoredAnswers',
    'StoredTeacher',
    'Teacher',
    'build_teacher',
    'match_classes',
]


# Other kinds of teachers, by the argument that asks for them: what it does, and what
# it can be combined with.
OTHER_KINDS = dict(
    ema=('makes the teacher from the student', ['views']),
    stored=('names stored answers', ['class_map', 'class_match']),
)


def build_teacher(cfg: dict, student: dict, name: str = '') -> Teacher:
    """Build a teacher from its arguments.

    Args:
        cfg: Arguments of :class:`Teacher` or :class:`StoredTeacher`; or ``ema``, a dict
            of arguments of :class:`MeanTeacher`.
        student: Config of the student.
        name: Key of the teacher in ``teachers``; '' for a single teacher.

    Raises:
        ValueError: ``cfg`` is not a dict, an argument is unknown or missing, or ``ema``
            or ``stored`` is combined with arguments of another kind of teacher.
    """
    name = f'teachers.{name}' if name else 'teacher'
    _check_dict(name, cfg)
    for key, (why, allowed) in OTHER_KINDS.items():
        if key in cfg and (others := sorted(set(cfg) - {key, *allowed})):
            raise ValueError(
                f'`{name}.{key}` {why}, so it can be combined only with '
                f'{" and ".join(f"`{x}`" for x in allowed)}, got {others}.'
            )
    if 'ema' in cfg:
        ema = cfg['ema'] or {}
        _check_dict(f'{name}.ema', ema)
        check_arguments(f'{name}.ema', MeanTeacher, ema, given=('student', 'views'))
        teacher = MeanTeacher(student, views=cfg.get('views', ()), **ema)
    elif 'stored' in cfg:
        teacher = StoredTeacher(**cfg)
    else:
        check_arguments(name, Teacher, cfg)
        teacher = Teacher(**cfg)
    teacher.name = name
    return teacher


def _check_dict(name: str, cfg: object) -> None:
    if not isinstance(cfg, Mapping):
        raise ValueError(f'`{name}` must be a dict of arguments, got {cfg!r}.')
