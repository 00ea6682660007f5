"""Compile mmcv from a few files that include its sources; its setup.py imports this.

Compiling a C++ source spends nearly all its time on the same headers. If the few files
do not compile, MMDIST_UNITS=0 compiles the sources one by one. Standard library only.
"""

from __future__ import annotations

import os
import re
import sysconfig
from pathlib import Path

# Sources that define the same helpers, so no two of them can share a unit.
APART = (
    'bezier_align.cpp', 'roi_align.cpp', 'roi_align_rotated.cpp',
    'rotated_feature_align.cpp',
)  # fmt: skip
LAST = 'psamask.cpp'  # defines the macros min and max
# CUDA sources that define the same names as others: each is compiled alone.
CUDA_ALONE = (
    'box_iou_rotated_cuda.cu', 'carafe_cuda.cu', 'convex_iou.cu', 'filtered_lrelu.cu',
    'iou3d_cuda.cu', 'min_area_polygons.cu', 'nms_cuda.cu', 'nms_quadri_cuda.cu',
    'nms_rotated_cuda.cu', 'roiaware_pool3d_cuda.cu', 'roipoint_pool3d_cuda.cu',
    'sparse_reordering.cu', 'spconv_ops_cuda.cu', 'upfirdn2d_kernel.cu',
    'voxelization_cuda.cu',
)  # fmt: skip


def jobs() -> int:
    """Number of parallel compilers: one per core, at most one per 2 GB of memory."""
    memory = os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 1e9
    return max(1, min(os.cpu_count() or 1, int(memory / 2)))


def environment(units: bool, cuda: bool) -> dict[str, str]:
    """The environment variables that mmcv is compiled with."""
    # CFLAGS replaces Python's own, which optimize; symbols cost a third of the time
    flags = (sysconfig.get_config_var('CFLAGS'), os.environ.get('CFLAGS'), '-g0')
    return {
        'MMCV_WITH_OPS': '1',
        'MMDIST_UNITS': str(int(units)),
        'CFLAGS': ' '.join(filter(None, flags)),
        'MAX_JOBS': os.environ.get('MAX_JOBS') or str(jobs()),
        'FORCE_CUDA': str(int(cuda)),
    }


def fix_setup(setup: Path) -> None:
    """Make mmcv's setup.py compile units, with the C++ standard that torch needs."""
    text = setup.read_text().replace('sources=op_files,', 'sources=as_units(op_files),')
    # torch adds the flag if there is none: C++20 from torch 2.14 on
    text = re.sub(r"(, )?'-std=c\+\+\d\d'", '', text)
    here = str(Path(__file__).resolve().parent)
    load = f'import sys\nsys.path.append({here!r})\nfrom mmcv_units import as_units\n'
    setup.write_text(load + text)


def as_units(sources: list[str]) -> list[str]:
    """Replace sources by a few units that include them, unless MMDIST_UNITS=0."""
    if os.environ.get('MMDIST_UNITS') == '0':
        return sources
    cpp = [path for path in sources if path.endswith('.cpp')]
    cuda = [path for path in sources if path.endswith('.cu')]
    cuda = [path for path in cuda if os.path.basename(path) not in CUDA_ALONE]
    alone = [path for path in sources if path not in cpp + cuda]
    number = max(len(APART), jobs())
    return [*alone, *write_units(cpp, number), *write_units(cuda, jobs())]


def write_units(sources: list[str], number: int) -> list[str]:
    """Distribute sources over at most ``number`` files that include them."""
    # First those of APART, one per unit, then by size: units get similar sizes.
    ordered = sorted(
        sources,
        key=lambda path: (os.path.basename(path) in APART, os.path.getsize(path)),
        reverse=True,
    )
    written = []
    for first in range(min(number, len(ordered))):
        paths = ordered[first::number]
        paths.sort(key=lambda path: os.path.basename(path) == LAST)
        lines = ''.join(f'#include "{os.path.abspath(path)}"\n' for path in paths)
        unit = Path('units', f'unit_{first}{Path(paths[0]).suffix}')
        unit.parent.mkdir(exist_ok=True)
        if not unit.exists() or unit.read_text() != lines:
            unit.write_text(lines)  # ninja recompiles newer files
        written.append(str(unit))
    return written
