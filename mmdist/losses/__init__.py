from __future__ import annotations

from .binary_kl_div_loss import BinaryKLDivLoss
from .dist_loss import DISTLoss

__all__ = ['BinaryKLDivLoss', 'DISTLoss']
