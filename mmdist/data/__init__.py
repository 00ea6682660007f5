"""Images without labels: how they are loaded, marked and mixed, and what they teach."""

from .image_folder import ImageFolder
from .mark_unlabelled import MarkUnlabelled
from .mixed_sampler import MixedSampler

__all__ = ['ImageFolder', 'MarkUnlabelled', 'MixedSampler']
