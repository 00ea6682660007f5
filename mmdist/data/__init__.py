"""Images without labels: load, mark and mix them, and learn from them."""

from .image_folder import ImageFolder
from .mark_unlabelled import MarkUnlabelled
from .mixed_sampler import MixedSampler

__all__ = ['ImageFolder', 'MarkUnlabelled', 'MixedSampler']
