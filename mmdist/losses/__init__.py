from __future__ import annotations

from .dist_loss import DISTLoss

__all__ = ['DISTLoss']
