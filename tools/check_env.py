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
        partial(check_setuptools, probe),
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
    version, wanted = probe.version('torch'), '>= 2.0'
    if version is None or numbers(version) < (2, 0):
        return Line('torch', version or 'missing', wanted, f'{PIP} torch==2.13.0')
    if error := probe.error('import torch'):
        fix = f'{PIP} --force-reinstall torch=={version.split("+")[0]}'
        return Line('torch', f'{version}, but: {error}', 'imports', fix)
    return Line('torch', version, wanted)


def check_setuptools(probe: Probe) -> Line:
    version = probe.version('setuptools')
    # From 81 on, every `mmdet::...` path in a config fails.
    ok = version is not None and numbers(version) < (81,)
    fix = None if ok else BUILD_TOOLS
    return Line('setuptools', version or 'missing', '< 81 (pkg_resources)', fix)


def check_single(probe: Probe) -> Line | None:
    """Both an original and its fork: their files overwrite each other."""
    pairs = dict(
        mmengine='mmengine',
        mmcv='mmcv',
        mmdet='mmdetection',
        mmsegmentation='mmsegmentation',
    )
    both = [(name, f'onedl-{fork}') for name, fork in pairs.items()]
    found = ' '.join(' '.join(p) for p in both if all(map(probe.version, p)))
    if not found:
        return None
    fix = f'python -m pip uninstall -y {found}, then install one of each pair'
    return Line('one stack', f'both of: {found}', 'upstream or the onedl fork', fix)


def check_engine(probe: Probe, fork: bool) -> Line:
    name, pin = ('onedl-mmengine', '0.10.12') if fork else ('mmengine', '0.10.7')
    version = probe.version(name)
    ok = version is not None and (0, 10) <= numbers(version) < (1,)
    fix = None if ok else f'{PIP} {name}=={pin}'
    return Line(name, version or 'missing', '>= 0.10, < 1', fix)


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
    ok = version is not None and low <= numbers(version) < high
    return Line(name, version or 'missing', wanted, None if ok else build)


def check_ops(probe: Probe, fork: bool) -> Line:
    """Run one compiled op; what it says tells how mmcv was built."""
    error, wanted = probe.error(RUN_OPS), 'one op runs'
    if not error:
        return Line('mmcv.ops', 'nms runs', wanted)
    name = 'onedl-mmcv' if fork else 'mmcv'
    version = probe.version(name) or ('2.3.6' if fork else '2.1.0')
    if not fork and numbers(version) >= (2, 2):
        version = '2.1.0'
    found, fix = error, f'{BUILD_TOOLS} && {BUILD} {name}=={version}'
    if 'mmcv._ext' in error:
        found = 'built without ops'
    elif any(word in error for word in ('undefined symbol', 'libtorch', 'libc10')):
        found = 'built for another torch'
    elif 'cuda' in error.lower() or 'gpu' in error.lower():
        found, fix = f'CPU only, on a GPU machine: {error}', f'FORCE_CUDA=1 {fix}'
        if not fork and numbers(probe.version('torch') or '0') >= (2, 9):
            fix = 'make env STACK=onedl (mmcv 2.1.0 has no CUDA build for torch >= 2.9)'
    return Line('mmcv.ops', found, wanted, fix)


def check_cv2(probe: Probe) -> Line:
    name, wanted = 'opencv-python-headless', 'import cv2'
    version = probe.version('opencv-python')
    if not (error := probe.error(wanted)):
        return Line('opencv', probe.version(name) or version or 'imports', wanted)
    # opencv-python links libGL, which a machine without a screen often lacks.
    pin = f'=={version}' if version else ''
    fix = f'{PIP} --force-reinstall --no-deps {name}{pin}'
    return Line('opencv', error, wanted, fix)


def check_import(probe: Probe, name: str) -> Line:
    fix = f'{PIP} {name}' if probe.error(f'import {name}') else None
    found = probe.version(name) or ('missing' if fix else 'imports')
    return Line(name, found, 'for mmseg', fix)


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
    if error := probe.error(f'import {module}.apis'):
        fix = f'fix the lines above; if it stays: {fix} --force-reinstall --no-deps'
        return Line(name, f'{version}, but: {error}', f'{wanted}, imports', fix)
    return Line(name, version, wanted)


def check_sklearn(probe: Probe) -> Line:
    found = probe.version('scikit-learn') or 'missing (optional)'
    return Line('scikit-learn', found, "by the quickstart, mmdet's PAA")


def check_mmdist(probe: Probe) -> Line:
    version, wanted = probe.version('mmdist'), 'mmdist:: paths resolve'
    error = probe.error(RUN_CONFIGS) if version else ''
    found = f'{version}, but: {error}' if error else version or 'not installed'
    fix = f'{PIP} --no-deps . (in the checkout of mmdist)'
    return Line('mmdist', found, wanted, fix if error or not version else None)


def report(lines: list[Line]) -> str:
    """A line for each requirement, and a last one that sums up."""
    rows = []
    for name, found, wanted, fix in lines:
        end = f'-> run: {fix}' if fix else 'ok'
        rows.append(f'{name:21} {found:21} wanted: {wanted:35} {end}')
    wrong = sum(line.fix is not None for line in lines)
    to_fix = f'{wrong} of {len(lines)} to fix, best from the top; `python` is '
    good = f'all {len(lines)} are as they should be'
    return '\n'.join([*rows, to_fix + sys.executable if wrong else good])


def main() -> int:
    lines = check(Probe())
    print(report(lines))
    return int(any(line.fix for line in lines))


if __name__ == '__main__':
    sys.exit(main())
