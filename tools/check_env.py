#!/usr/bin/env python
"""Check that an environment can run mmdist; for people who bring their own.

    python tools/check_env.py

It prints one line per requirement: what was found, what is wanted, and the command that
fixes it if it is wrong. The exit code is 1 if anything is wrong. It imports only the
standard library, so that it runs in a broken environment too.
"""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from typing import NamedTuple

PIP = 'python -m pip install'
UNINSTALL = 'python -m pip uninstall -y'
TOOLS = f'{PIP} "setuptools<81" wheel ninja'  # that build mmcv
# pip's cache is not keyed on torch: a cached wheel may be the one that does not fit.
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
# upstream: the fork that has the same modules
STACKS = {
    'mmengine==0.10.7': 'onedl-mmengine==0.10.12',
    'mmcv==2.1.0': 'onedl-mmcv==2.3.6',
    'mmdet==3.3.0': 'onedl-mmdetection==3.5.1',
    'mmsegmentation==1.2.2': 'onedl-mmsegmentation==1.4.2',
}


class Line(NamedTuple):
    """One requirement: ``fix`` is the command to run, None if all is well."""

    name: str
    found: str
    wanted: str
    fix: str | None = None


def version_of(requirement: str) -> str | None:
    """The installed version of a distribution, named with or without a pin."""
    try:
        return metadata.version(name_of(requirement))
    except metadata.PackageNotFoundError:
        return None


def name_of(requirement: str) -> str:
    return requirement.partition('==')[0]


def error_of(code: str) -> str:
    """Run code in a fresh interpreter; return the last line of its error, or ''."""
    command = [sys.executable, '-W', 'ignore', '-c', code]
    run = subprocess.run(command, capture_output=True, text=True, errors='replace')
    if run.returncode == 0:
        return ''
    lines = run.stderr.strip().splitlines()
    return lines[-1].strip() if lines else f'exit code {run.returncode}'


def numbers(version: str) -> tuple[int, ...]:
    """'2.13.0+cpu' -> (2, 13, 0)."""
    return tuple(int(n) for n in re.findall(r'\d+', version.split('+')[0])[:3])


def check() -> list[Line]:
    """Check all requirements, in the order in which they should be fixed."""
    fork = any(version_of(STACKS[name]) for name in list(STACKS)[:2])
    engine, mmcv, mmdet, mmseg = STACKS.values() if fork else STACKS
    sklearn = version_of('scikit-learn') or 'missing (optional)'
    checks = [
        check_python,
        check_torch,
        # from setuptools 81 on, every `mmdet::...` path in a config fails
        lambda: check_version('setuptools', '< 81 (pkg_resources)', (), (81,), TOOLS),
        check_single,
        lambda: check_version(engine, '>= 0.10, < 1', (0, 10), (1,)),
        lambda: check_mmcv(mmcv, fork),
        lambda: check_ops(mmcv, fork),
        check_cv2,
        lambda: check_import('ftfy'),
        lambda: check_import('regex'),
        lambda: check_library('mmdet', mmdet),
        lambda: check_library('mmseg', mmseg),
        lambda: Line('scikit-learn', sklearn, "for the quickstart, mmdet's PAA"),
        check_mmdist,
    ]
    # most of them wait for an interpreter that imports something
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        lines = list(pool.map(lambda run: run(), checks))
    return [line for line in lines if line is not None]


def check_version(
    requirement: str, wanted: str, low: tuple, high: tuple, fix: str = ''
) -> Line:
    """Check that a version from ``low`` to below ``high`` is installed."""
    version, fix = version_of(requirement), fix or f'{PIP} {requirement}'
    ok = version is not None and low <= numbers(version) < high
    return Line(name_of(requirement), version or 'missing', wanted, None if ok else fix)


def check_runs(line: Line, code: str, wanted: str, fix: str) -> Line:
    """Check that the code of an installed distribution runs."""
    if line.fix or not (error := error_of(code)):
        return line
    return Line(line.name, f'{line.found}, but: {error}', wanted, fix)


def check_python() -> Line:
    ok = sys.version_info >= (3, 10)
    fix = None if ok else 'make a virtual environment with Python 3.10 or newer'
    return Line('python', platform.python_version(), '>= 3.10', fix)


def check_torch() -> Line:
    line = check_version('torch==2.13.0', '>= 2.0', (2, 0), (99,))
    fix = f'{PIP} --force-reinstall torch=={line.found.split("+")[0]}'
    return check_runs(line, 'import torch', 'imports', fix)


def check_single() -> Line | None:
    """Find originals next to their fork: their files overwrite each other."""
    both = [name_of(x) for p in STACKS.items() if all(map(version_of, p)) for x in p]
    if not both:
        return None
    found = ' '.join(both)
    fix = f'{UNINSTALL} {found}, then install one of each pair'
    return Line('one stack', f'both of: {found}', 'upstream or the onedl fork', fix)


def check_mmcv(requirement: str, fork: bool) -> Line:
    fix = f'{TOOLS} && {BUILD} {requirement}'
    # mmdet 3.3.0 and mmsegmentation 1.2.2 assert the upper bound on import.
    wanted = ('>= 2.3', (2, 3), (3,)) if fork else ('>= 2.0, < 2.2', (2, 0), (2, 2))
    line = check_version(requirement, *wanted, fix)
    if not version_of('mmcv-lite'):
        return line
    fix = f'{UNINSTALL} mmcv-lite && {fix}'
    return line._replace(found='mmcv-lite, which has no ops', fix=fix)


def check_ops(requirement: str, fork: bool) -> Line:
    """Run one compiled op; its error tells how mmcv was built."""
    error, wanted = error_of(RUN_OPS), 'one op runs'
    if not error:
        return Line('mmcv.ops', 'nms runs', wanted)
    found, fix = error, f'{TOOLS} && {BUILD} {requirement}'
    if 'mmcv._ext' in error:
        found = 'built without ops'
    elif any(word in error for word in ('undefined symbol', 'libtorch', 'libc10')):
        found = 'built for another torch'
    elif 'cuda' in error.lower() or 'gpu' in error.lower():
        found, fix = f'CPU only, on a GPU machine: {error}', f'FORCE_CUDA=1 {fix}'
        if not fork and numbers(version_of('torch') or '0') >= (2, 9):
            fix = 'make env STACK=onedl (mmcv 2.1.0 has no CUDA build for torch >= 2.9)'
    return Line('mmcv.ops', found, wanted, fix)


def check_cv2() -> Line:
    name, wanted = 'opencv-python-headless', 'import cv2'
    version = version_of('opencv-python')
    if not (error := error_of(wanted)):
        return Line('opencv', version_of(name) or version or 'imports', wanted)
    # opencv-python links libGL, which a machine without a screen often lacks.
    pin = f'=={version}' if version else ''
    fix = f'{PIP} --force-reinstall --no-deps {name}{pin}'
    return Line('opencv', error, wanted, fix)


def check_import(name: str) -> Line:
    fix = f'{PIP} {name}' if error_of(f'import {name}') else None
    found = version_of(name) or ('missing' if fix else 'imports')
    return Line(name, found, 'for mmseg', fix)


def check_library(module: str, requirement: str) -> Line:
    # The fork's libraries are source only and import packaging during their build.
    flag = '--no-build-isolation ' if 'onedl' in requirement else ''
    fix, (major, *_) = f'{PIP} {flag}{requirement}', numbers(requirement.split('==')[1])
    line = check_version(requirement, f'{major}.x', (major,), (major + 1,), fix)
    fix = f'fix the lines above; if it still fails: {fix} --force-reinstall --no-deps'
    return check_runs(line, f'import {module}.apis', f'{major}.x, imports', fix)


def check_mmdist() -> Line:
    version, wanted = version_of('mmdist'), 'mmdist:: paths resolve'
    fix = f'{PIP} --no-deps . (in the checkout of mmdist)'
    line = Line('mmdist', version or 'not installed', wanted, None if version else fix)
    return check_runs(line, RUN_CONFIGS, wanted, fix)


def report(lines: list[Line]) -> str:
    """One line per requirement, and a summary."""
    rows = []
    for name, found, wanted, fix in lines:
        end = f'-> run: {fix}' if fix else 'ok'
        rows.append(f'{name:21} {found:21} wanted: {wanted:35} {end}')
    wrong = sum(line.fix is not None for line in lines)
    to_fix = f'{wrong} of {len(lines)} to fix, starting from the top; `python` is '
    good = f'all {len(lines)} are fine'
    return '\n'.join([*rows, to_fix + sys.executable if wrong else good])


def main() -> int:
    lines = check()
    print(report(lines))
    return int(any(line.fix for line in lines))


if __name__ == '__main__':
    sys.exit(main())
