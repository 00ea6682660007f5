"""Datasets that mmdet and mmseg do not have."""

from .camvid import CamVidDataset

__all__ = ['CamVidDataset']
