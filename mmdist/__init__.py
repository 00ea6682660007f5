"""mmdist: DIST knowledge distillation for MMDetection and MMSegmentation."""

from ._environment import allow_safe_loading, check_versions
from .version import __version__

check_versions()
allow_safe_loading()

from .losses import DISTLoss  # noqa: E402  (a broken environment is reported first)

__all__ = ['DISTLoss', '__version__']
