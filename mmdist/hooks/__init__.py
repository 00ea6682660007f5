"""Hooks for the Runner."""

from .distill_schedule_hook import DistillScheduleHook
from .iter_seed_hook import IterSeedHook
from .stored_teacher_hook import StoredTeacherHook

__all__ = ['DistillScheduleHook', 'IterSeedHook', 'StoredTeacherHook']
