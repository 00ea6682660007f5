"""The teacher: found, loaded, frozen, and shown images and classes as it knows them."""

from .classes import ClassMatch, match_classes
from .foreign import ForeignTeacher
from .renormalize import Renormalize
from .teacher import Teacher

__all__ = ['ClassMatch', 'ForeignTeacher', 'Renormalize', 'Teacher', 'match_classes']
