"""mmdist: DIST knowledge distillation for MMDetection and MMSegmentation."""

from ._environment import check_versions
from ._startup import prepare_mmengine
from .version import __version__

check_versions()
prepare_mmengine()

# after the checks, so that they report a broken environment first
from .comparisons import Comparison, Pair  # noqa: E402
from .losses import DISTLoss  # noqa: E402
from .registry import MODELS  # noqa: E402
from .teachers import ForeignTeacher  # noqa: E402

__all__ = ['MODELS', 'Comparison', 'DISTLoss', 'ForeignTeacher', 'Pair', '__version__']
