"""The kinds of comparison between a student and its teacher, one per file."""

from .base import Comparison, Pair
from .box_distributions import BoxDistributions
from .boxes import Boxes
from .dense_logits import DenseLogits
from .detections import Detections
from .features import Features
from .masks import Masks
from .query_logits import QueryLogits
from .roi_logits import RoILogits
from .seg_logits import SegLogits

__all__ = [
    'BoxDistributions',
    'Boxes',
    'Comparison',
    'DenseLogits',
    'Detections',
    'Features',
    'Masks',
    'Pair',
    'QueryLogits',
    'RoILogits',
    'SegLogits',
]
