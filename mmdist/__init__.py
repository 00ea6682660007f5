"""mmdist: DIST knowledge distillation for MMDetection and MMSegmentation."""

from ._environment import check_versions
from ._startup import prepare_mmengine
from .version import __version__

check_versions()
prepare_mmengine()

from .losses import DISTLoss  # noqa: E402  (a broken environment is reported first)

__all__ = ['DISTLoss', '__version__']
