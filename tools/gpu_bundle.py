#!/usr/bin/env python
"""Pack mmdist for a GPU machine without a network, with all that it needs there.

    python tools/gpu_bundle.py mmdist_gpu.tar.xz

needs a package index here. The archive holds the tracked files of this checkout and
the wheels of the onedl stack for Python 3.12 on Linux, at the pins of
requirements-onedl.txt, and mmcv's unchanged sources. The machine brings Python, torch
and Triton, nvcc for mmcv's ops, and what is common: numpy, scipy, scikit-learn,
matplotlib. The command that this prints unpacks it and runs `tools/gpu_check.py`; see
docs/gpu.md.
"""

from __future__ import annotations

import argparse
import io
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import time
import zipfile
from copy import copy
from importlib.util import find_spec
from pathlib import Path

import make_env

ROOT = Path(__file__).resolve().parent.parent
MMCV = 'onedl-mmcv'
# what mmengine and the loss need beside numpy, PyYAML and packaging
LOSS = (
    'onedl-mmengine', 'addict', 'yapf', 'platformdirs', 'termcolor', 'rich',
    'markdown-it-py', 'mdurl', 'Pygments', 'PyYAML', 'packaging',
    'opencv-python-headless',
)  # fmt: skip
# what the models need beside scipy and matplotlib; the first two are source only
MODELS = (
    'onedl-mmdetection', 'onedl-mmsegmentation', 'pycocotools', 'shapely',
    'terminaltables', 'tqdm', 'ftfy', 'regex', 'prettytable', 'wcwidth', 'six',
    'ninja', 'wheel',
)  # fmt: skip
SOURCE_ONLY = MODELS[:2]
# pip matches the platforms of wheels one by one
GLIBC = (17, 24, 27, 28)
TARGET = [
    '--only-binary=:all:', '--python-version=3.12', '--implementation=cp',
    '--platform=manylinux2014_x86_64',
    *(f'--platform=manylinux_2_{minor}_x86_64' for minor in GLIBC),
]  # fmt: skip
LIMIT = 60 * 2**20
# mmcv's CUDA sources that define the same names as another one
CUDA_APART = (
    'box_iou_rotated_cuda.cu', 'carafe_cuda.cu', 'convex_iou.cu', 'filtered_lrelu.cu',
    'iou3d_cuda.cu', 'min_area_polygons.cu', 'nms_cuda.cu', 'nms_quadri_cuda.cu',
    'nms_rotated_cuda.cu', 'roiaware_pool3d_cuda.cu', 'roipoint_pool3d_cuda.cu',
    'sparse_reordering.cu', 'spconv_ops_cuda.cu', 'upfirdn2d_kernel.cu',
    'voxelization_cuda.cu',
)  # fmt: skip


def pip(*arguments: object) -> None:
    command = [sys.executable, '-m', 'pip', *map(str, arguments)]
    subprocess.run([*command, '-q', '--disable-pip-version-check'], check=True)


# --- here


def collect(wheels: Path, names: tuple[str, ...]) -> None:
    """Download the pinned wheels for the target; build those that are source only."""
    pins = make_env.pins((ROOT / 'requirements-onedl.txt').read_text())
    wanted = [f'{name}=={pins[name]}' for name in names if name not in SOURCE_ONLY]
    pip('download', '--no-deps', '-d', wheels, *TARGET, *wanted)
    sources = [f'{name}=={pins[name]}' for name in names if name in SOURCE_ONLY]
    if sources:
        plain = ('--no-deps', '--no-build-isolation')
        pip('wheel', *plain, '-w', wheels, *sources)
        flags = ('--no-binary', ':all:', '-d', wheels)
        pip('download', *plain, *flags, f'{MMCV}=={pins[MMCV]}')


def tracked() -> list[str]:
    """The files of the checkout that git tracks or would, and that are there."""
    command = ['git', 'ls-files', '-z', '--cached', '--others', '--exclude-standard']
    said = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    names = {x for x in said.stdout.split('\0') if x and os.path.lexists(ROOT / x)}
    return sorted(names)


def stored(wheel: Path) -> bytes:
    """A wheel with its files as they are, but not compressed: xz does that better."""
    out = io.BytesIO()
    with zipfile.ZipFile(wheel) as old, zipfile.ZipFile(out, 'w') as new:
        for info in old.infolist():
            data = old.read(info)
            new.writestr(copy(info), data, compress_type=zipfile.ZIP_STORED)
    return out.getvalue()


def pack(archive: Path, wheels: Path, preset: int) -> None:
    """Write the archive: the checkout, and `wheels` in it."""
    with tarfile.open(archive, 'w:xz', preset=preset) as tar:
        for name in tracked():
            tar.add(ROOT / name, f'mmdist/{name}', recursive=False)
        for file in sorted(wheels.iterdir()):
            data = stored(file) if file.suffix == '.whl' else file.read_bytes()
            info = tarfile.TarInfo(f'mmdist/wheels/{file.name}')
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def command_for(archive: Path, *arguments: str) -> str:
    """The one command line for the machine."""
    run = ' '.join(['python3 mmdist/tools/gpu_bundle.py --run', *arguments])
    return f'tar xf {archive.name} && {run}'


# --- there


def install_missing(site: Path, wheels: Path) -> None:
    """Install into a folder what this Python lacks; nothing that it has is replaced."""
    missing = [
        wheel
        for wheel in sorted(wheels.glob('*.whl'))
        if not all(find_spec(name) for name in modules_of(wheel))
    ]
    # one by one: a wheel for another Python is missed by its stage alone
    for wheel in missing:
        flags = ('--no-index', '--no-deps', '--no-compile', '--target', site)
        try:
            pip('install', *flags, wheel)
        except subprocess.CalledProcessError:
            print(f'{wheel.name} cannot be installed here', flush=True)
    print(f'{len(missing)} wheels were missing, installed into {site}', flush=True)


def modules_of(wheel: Path) -> set[str]:
    """What a wheel makes importable; another distribution may do so as well."""
    with zipfile.ZipFile(wheel) as file:
        tops = {name.split('/')[0] for name in file.namelist() if '/' in name}
        files = {name for name in file.namelist() if '/' not in name}
    packages = {name for name in tops if '.' not in name}
    return packages | {Path(x).stem for x in files if x.endswith('.py')}


def as_units(sources: list[str]) -> list[str]:
    """As `make_env.as_units`, and the CUDA sources too: 8 of 10 fit in any unit."""
    sources = make_env.as_units(sources)
    merged = [
        path
        for path in sources
        if path.endswith('.cu') and os.path.basename(path) not in CUDA_APART
    ]
    if os.environ.get('MMDIST_UNITS') == '0' or not merged:
        return sources
    merged.sort(key=os.path.getsize, reverse=True)
    number = max(1, make_env.jobs())
    written = [path for path in sources if path not in merged]
    for i in range(min(number, len(merged))):
        lines = [f'#include "{os.path.abspath(x)}"\n' for x in merged[i::number]]
        unit = Path('units') / f'cuda_{i}.cu'
        unit.parent.mkdir(exist_ok=True)
        unit.write_text(''.join(lines))
        written.append(str(unit))
    return written


def cuda_home() -> str | None:
    """The CUDA toolkit; nvcc on the PATH may be a script that starts that of it."""
    nvcc = make_env.find_nvcc()
    if nvcc is None:
        return None
    command = [nvcc, '--dryrun', '-x', 'cu', os.devnull]
    said = subprocess.run(command, capture_output=True, text=True).stderr
    top = re.search(r'^#\$ TOP=(.+)$', said, re.M)
    return str(Path(top[1].strip() if top else Path(nvcc).parents[1]).resolve())


def build_ops(site: Path, wheels: Path, card: str) -> str:
    """Compile mmcv for an architecture, e.g. '9.0'; returns '' or why it cannot be."""
    home = cuda_home()
    if home is None:
        return 'there is no nvcc: install the CUDA toolkit and set CUDA_HOME'
    (archive,) = wheels.glob('onedl_mmcv-*.tar.gz')
    sources = site.with_name('sources')
    shutil.rmtree(sources, ignore_errors=True)
    shutil.unpack_archive(archive, sources)
    (tree,) = sources.iterdir()
    make_env.fix_setup(tree / 'setup.py')
    text = (tree / 'setup.py').read_text()
    (tree / 'setup.py').write_text(text.replace('from make_env', 'from gpu_bundle'))
    # torch includes headers that a small toolkit lacks and torch's own wheels bring
    purelib = Path(sysconfig.get_paths()['purelib'])
    more = [str(x) for x in sorted(purelib.glob('nvidia/*/include'))]
    environment = {
        **os.environ,
        'MMCV_WITH_OPS': '1',
        'FORCE_CUDA': '1',
        'TORCH_CUDA_ARCH_LIST': card,
        'CUDA_HOME': home,
        'CPATH': os.pathsep.join([*filter(None, [os.environ.get('CPATH')]), *more]),
        'PYTHONPATH': os.pathsep.join([str(site), os.environ.get('PYTHONPATH', '')]),
        'PATH': os.pathsep.join([str(site / 'bin'), os.environ['PATH']]),
        'CFLAGS': make_env.compiler_flags(),
        'MAX_JOBS': os.environ.get('MAX_JOBS') or str(make_env.jobs()),
    }
    flags = ['-v', '--no-build-isolation', '--no-deps', '--no-index', '--target', site]
    command = [sys.executable, '-m', 'pip', 'install', *map(str, flags), str(tree)]
    log = site.with_name('mmcv.log')
    for units in ('1', '0'):  # from few files, and if that fails one by one
        environment['MMDIST_UNITS'] = units
        with log.open('w') as file:
            done = subprocess.run(
                command, env=environment, stdout=file, stderr=subprocess.STDOUT
            )
        if done.returncode == 0:
            return ''
        print('\n'.join(log.read_text(errors='replace').splitlines()[-15:]))
    return f'it does not compile, see {log}'


def run(arguments: list[str]) -> int:
    """Install what is missing, check, compile mmcv, and check the rest."""
    from gpu_check import parse_args

    stages = parse_args(arguments).stages
    site, wheels = ROOT / 'site', ROOT / 'wheels'
    install_missing(site, wheels)
    path = os.pathsep.join(filter(None, [os.environ.get('PYTHONPATH'), str(site)]))
    environment = {**os.environ, 'PYTHONPATH': path}

    def check(some: list[int]) -> int:
        if not some:
            return 0
        command = [sys.executable, str(ROOT / 'tools' / 'gpu_check.py'), *arguments]
        command += ['--stages', ','.join(map(str, some))]
        return subprocess.run(command, env=environment).returncode

    # those that need no compiler first: the time may be up before it is done
    status = check([x for x in stages if x <= 4])
    rest = [x for x in stages if x > 4]
    if rest and find_spec('mmcv') is None and not (site / 'mmcv').exists():
        import torch

        began, problem = time.time(), 'there is no GPU'
        if torch.cuda.is_available():
            card = '{}.{}'.format(*torch.cuda.get_device_capability())
            problem = build_ops(site, wheels, card)
        note = f'not compiled: {problem}' if problem else 'compiled'
        print(f'mmcv: {note}, {time.time() - began:.0f} s', flush=True)
    return max(status, check(rest))


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ['--run']:
        return run(argv[1:])
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('archive', type=Path, help='to be written, .tar.xz')
    parser.add_argument(
        '--loss-only', action='store_true', help='without what stages 5 to 7 need'
    )
    parser.add_argument(
        '--preset', type=int, default=6, help='of xz, 0 to 9 (default: %(default)s)'
    )
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        wheels = Path(folder)
        collect(wheels, LOSS if args.loss_only else LOSS + MODELS)
        pack(args.archive, wheels, args.preset)
    size = args.archive.stat().st_size
    print(f'{args.archive}: {size / 2**20:.1f} MiB. On the machine, beside it:\n')
    stages = ' --stages 1-4' if args.loss_only else ''
    print(command_for(args.archive, f'--out gpu_check{stages}'))
    if size > LIMIT:
        print(f'It is larger than {LIMIT // 2**20} MiB.', file=sys.stderr)
    return int(size > LIMIT)


if __name__ == '__main__':
    sys.exit(main())
