"""Hooks of the Runner."""

from .distill_schedule_hook import DistillScheduleHook
from .iter_seed_hook import IterSeedHook

__all__ = ['DistillScheduleHook', 'IterSeedHook']
