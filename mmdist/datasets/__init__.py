"""Datasets, transforms and samplers that mmdet and mmseg do not have."""

from .camvid import CamVidDataset
from .image_folder import ImageFolder
from .mark_unlabelled import MarkUnlabelled
from .mixed_sampler import MixedSampler

__all__ = ['CamVidDataset', 'ImageFolder', 'MarkUnlabelled', 'MixedSampler']
