"""Data sets that mmseg does not have."""

try:
    from .camvid import CamVidDataset
except ModuleNotFoundError:  # mmseg is not installed
    __all__ = []
else:
    __all__ = ['CamVidDataset']
