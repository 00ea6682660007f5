"""The distiller and everything that it can compare."""

from .comparison import Comparison, Pair
from .dense_logits import DenseLogits
from .distiller import build_distiller
from .features import Features
from .query_logits import QueryLogits
from .roi_logits import RoILogits
from .seg_logits import SegLogits

__all__ = [
    'Comparison',
    'DenseLogits',
    'Features',
    'Pair',
    'QueryLogits',
    'RoILogits',
    'SegLogits',
    'build_distiller',
]
