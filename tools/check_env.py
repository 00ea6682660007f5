#!/usr/bin/env python
"""Check that an environment can run mmdist; for people who bring their own.

    python tools/check_env.py

prints one line per requirement: what was found, what is wanted, and for each thing
wrong the command that fixes it. The exit code is 1 if anything is wrong. Only the
standard library is imported here, so that it runs in a broken environment too.
"""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib import metadata
from typing import NamedTuple

PIP = 'python -m pip install'
BUILD_TOOLS = f'{PIP} "setuptools<81" wheel ninja'
# A cached wheel may be the very one that does not fit: it is not keyed on torch.
BUILD = (
    'MMCV_WITH_OPS=1 '
    f'{PIP} --no-build-isolation --no-cache-dir --force-reinstall --no-deps'
)

RUN_OPS = """
import torch
from mmcv.ops import nms
for device in ['cpu'] + ['cuda'] * torch.cuda.is_available():
    boxes = torch.tensor([[0., 0., 9., 9.], [0., 0., 9., 8.]], device=device)
    _, keep = nms(boxes, torch.tensor([0.5, 0.9], device=device), 0.5)
    assert keep.tolist() == [1], f'nms kept {keep.tolist()} on {device}'
"""
RUN_CONFIGS = """
from mmengine.config.utils import MODULE2PACKAGE
assert 'mmdist' in MODULE2PACKAGE, 'mmengine does not know mmdist:: config paths'
"""


class Line(NamedTuple):
    """One requirement: ``fix`` is the command to run, None where all is well."""

    name: str
    found: str
    wanted: str
    fix: str | None = None


class Probe:
    """What is installed for this interpreter; each answer is asked for once."""

    def version(self, distribution: str) -> str | None:
        try:
            return metadata.version(distribution)
        except metadata.PackageNotFoundError:
            return None

    def error(self, code: str) -> str:
        """Run code in a fresh interpreter; the last line of its error, or ''."""
        run = subprocess.run(
            [sys.executable, '-W', 'ignore', '-c', code],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            errors='replace',
        )
        if run.returncode == 0:
            return ''
        lines = [line for line in run.stderr.splitlines() if line.strip()]
        return lines[-1].strip() if lines else f'exit code {run.returncode}'


def numbers(version: str) -> tuple[int, ...]:
    """'2.13.0+cpu' -> (2, 13, 0)."""
    return tuple(int(n) for n in re.findall(r'\d+', version.split('+')[0])[:3])


def check(probe: Probe) -> list[Line]:
    """All requirements, in the order in which they should be fixed."""
    fork = any(probe.version(f'onedl-{name}') for name in ('mmengine', 'mmcv'))
    checks = [
        check_python,
        partial(check_torch, probe),
        partial(check_setuptools, probe, fork),
        partial(check_single, probe),
        partial(check_engine, probe, fork),
        partial(check_mmcv, probe, fork),
        partial(check_ops, probe, fork),
        partial(check_cv2, probe),
        partial(check_import, probe, 'ftfy'),
        partial(check_import, probe, 'regex'),
        partial(check_library, probe, fork, 'mmdet'),
        partial(check_library, probe, fork, 'mmseg'),
        partial(check_sklearn, probe),
        partial(check_mmdist, probe),
    ]
    # most of them wait for an interpreter that imports something
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        lines = list(pool.map(lambda run: run(), checks))
    return [line for line in lines if line is not None]


def check_python() -> Line:
    ok = sys.version_info >= (3, 10)
    fix = None if ok else 'make a virtual environment with Python 3.10 or newer'
    return Line('python', platform.python_version(), '>= 3.10', fix)


def check_torch(probe: Probe) -> Line:
    version = probe.version('torch')
    if version is None:
        return Line('torch', 'missing', '>= 2.0', f'{PIP} torch==2.13.0')
    if numbers(version) < (2, 0):
        return Line('torch', version, '>= 2.0', f'{PIP} torch==2.13.0')
    error = probe.error('import torch')
    if error:
        fix = f'{PIP} --force-reinstall torch=={version.split("+")[0]}'
        return Line('torch', f'{version}, but: {error}', 'imports', fix)
    return Line('torch', version, '>= 2.0')


def check_setuptools(probe: Probe, fork: bool) -> Line:
    version = probe.version('setuptools')
    wanted = '< 81 (pkg_resources)'
    if version is None or numbers(version) >= (81,):
        # Without it, every `mmdet::...` path in a config fails.
        return Line('setuptools', version or 'missing', wanted, BUILD_TOOLS)
    return Line('setuptools', version, wanted)


def check_single(probe: Probe) -> Line | None:
    """Both an original and its fork: their files overwrite each other."""
    pairs = [
        (name, f'onedl-{fork}')
        for name, fork in [
            ('mmengine', 'mmengine'),
            ('mmcv', 'mmcv'),
            ('mmdet', 'mmdetection'),
            ('mmsegmentation', 'mmsegmentation'),
        ]
        if probe.version(name) and probe.version(f'onedl-{fork}')
    ]
    if not pairs:
        return None
    names = ' '.join(name for pair in pairs for name in pair)
    return Line(
        'one stack',
        f'both of: {names}',
        'upstream or the onedl fork',
        f'python -m pip uninstall -y {names}, then install one of each pair',
    )


def check_engine(probe: Probe, fork: bool) -> Line:
    name = 'onedl-mmengine' if fork else 'mmengine'
    pin = '0.10.12' if fork else '0.10.7'
    version = probe.version(name)
    if version is None or not (0, 10) <= numbers(version) < (1,):
        fix = f'{PIP} {name}=={pin}'
        return Line(name, version or 'missing', '>= 0.10, < 1', fix)
    return Line(name, version, '>= 0.10, < 1')


def check_mmcv(probe: Probe, fork: bool) -> Line:
    if fork:
        name, pin, wanted, low, high = 'onedl-mmcv', '2.3.6', '>= 2.3', (2, 3), (3,)
    else:
        # mmdet 3.3.0 and mmsegmentation 1.2.2 assert it when they are imported.
        name, pin, wanted, low, high = 'mmcv', '2.1.0', '>= 2.0, < 2.2', (2, 0), (2, 2)
    build = f'{BUILD_TOOLS} && {BUILD} {name}=={pin}'
    if probe.version('mmcv-lite'):
        fix = f'python -m pip uninstall -y mmcv-lite && {build}'
        return Line(name, 'mmcv-lite, which has no ops', wanted, fix)
    version = probe.version(name)
    if version is None or not low <= numbers(version) < high:
        return Line(name, version or 'missing', wanted, build)
    return Line(name, version, wanted)


def check_ops(probe: Probe, fork: bool) -> Line:
    """Run one compiled op; what it says tells how mmcv was built."""
    wanted = 'one op runs'
    error = probe.error(RUN_OPS)
    if not error:
        return Line('mmcv.ops', 'nms runs', wanted)
    name = 'onedl-mmcv' if fork else 'mmcv'
    version = probe.version(name) or ('2.3.6' if fork else '2.1.0')
    if not fork and numbers(version) >= (2, 2):
        version = '2.1.0'
    fix = f'{BUILD_TOOLS} && {BUILD} {name}=={version}'
    if 'mmcv._ext' in error:
        found = 'built without ops'
    elif 'undefined symbol' in error or 'libtorch' in error or 'libc10' in error:
        found = 'built for another torch'
    elif 'cuda' in error.lower() or 'gpu' in error.lower():
        found, fix = f'CPU only, on a GPU machine: {error}', f'FORCE_CUDA=1 {fix}'
        if not fork and numbers(probe.version('torch') or '0') >= (2, 9):
            fix = 'make env STACK=onedl (mmcv 2.1.0 has no CUDA build for torch >= 2.9)'
    else:
        found = error
    return Line('mmcv.ops', found, wanted, fix)


def check_cv2(probe: Probe) -> Line:
    error = probe.error('import cv2')
    wanted = 'import cv2'
    if not error:
        version = probe.version('opencv-python-headless') or probe.version(
            'opencv-python'
        )
        return Line('opencv', version or 'imports', wanted)
    # opencv-python links libGL, which a machine without a screen often lacks.
    version = probe.version('opencv-python')
    pin = f'=={version}' if version else ''
    fix = f'{PIP} --force-reinstall --no-deps opencv-python-headless{pin}'
    return Line('opencv', error, wanted, fix)


def check_import(probe: Probe, name: str) -> Line:
    error = probe.error(f'import {name}')
    version = probe.version(name)
    if error:
        return Line(name, version or 'missing', 'for mmseg', f'{PIP} {name}')
    return Line(name, version or 'imports', 'for mmseg')


def check_library(probe: Probe, fork: bool, module: str) -> Line:
    name, pin, wanted = {
        ('mmdet', False): ('mmdet', '3.3.0', '3.x'),
        ('mmseg', False): ('mmsegmentation', '1.2.2', '1.x'),
        ('mmdet', True): ('onedl-mmdetection', '3.5.1', '3.x'),
        ('mmseg', True): ('onedl-mmsegmentation', '1.4.2', '1.x'),
    }[module, fork]
    version = probe.version(name)
    # The fork's are source only and import packaging while they are built.
    flag = '--no-build-isolation ' if fork else ''
    fix = f'{PIP} {flag}{name}=={pin}'
    if version is None or f'{numbers(version)[0]}.x' != wanted:
        return Line(name, version or 'missing', wanted, fix)
    error = probe.error(f'import {module}.apis')
    if error:
        fix = f'fix the lines above; if it stays: {fix} --force-reinstall --no-deps'
        return Line(name, f'{version}, but: {error}', f'{wanted}, imports', fix)
    return Line(name, version, wanted)


def check_sklearn(probe: Probe) -> Line:
    found = probe.version('scikit-learn') or 'missing (optional)'
    return Line('scikit-learn', found, "by the quickstart, mmdet's PAA")


def check_mmdist(probe: Probe) -> Line:
    version = probe.version('mmdist')
    wanted = 'mmdist:: paths resolve'
    fix = f'{PIP} --no-deps . (in the checkout of mmdist)'
    if version is None:
        return Line('mmdist', 'not installed', wanted, fix)
    error = probe.error(RUN_CONFIGS)
    if error:
        return Line('mmdist', f'{version}, but: {error}', wanted, fix)
    return Line('mmdist', version, wanted)


def report(lines: list[Line]) -> str:
    """A line for each requirement, and a last one that sums up."""
    rows = []
    for name, found, wanted, fix in lines:
        end = f'-> run: {fix}' if fix else 'ok'
        rows.append(f'{name:21} {found:21} wanted: {wanted:35} {end}')
    wrong = sum(line.fix is not None for line in lines)
    if wrong:
        rows.append(
            f'{wrong} of {len(lines)} to fix, best from the top; '
            f'`python` is {sys.executable}'
        )
    else:
        rows.append(f'all {len(lines)} are as they should be')
    return '\n'.join(rows)


def main() -> int:
    lines = check(Probe())
    print(report(lines))
    return int(any(line.fix for line in lines))


if __name__ == '__main__':
    sys.exit(main())
