from __future__ import annotations

from .binary_kl_div_loss import BinaryKLDivLoss
from .correlations import as_rows
from .dist_loss import DISTLoss, Terms

__all__ = ['BinaryKLDivLoss', 'DISTLoss', 'Terms', 'as_rows']
