"""Pack mmdist and its requirements for a GPU machine without a network.

    python -m tools.dev.gpu_bundle mmdist_gpu.tar.xz

This needs a package index. The archive holds all files of this checkout that git does
not ignore, the wheels of the onedl stack for Python 3.12 on Linux, at the pins of
requirements-onedl.txt, and mmcv's unchanged sources. The machine brings Python, torch,
Triton, nvcc for mmcv's ops, and numpy, scipy, scikit-learn, matplotlib. The printed
command unpacks the archive and runs `tools/dev/gpu_check.py`; see docs/gpu.md.
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

from . import gpu_check, make_env, mmcv_units
from .gpu_check import joined

ROOT = Path(__file__).resolve().parents[2]
MMCV = 'onedl-mmcv'
# what mmengine, the loss and its tests need in addition to numpy and scipy
LOSS = (
    'onedl-mmengine', 'addict', 'yapf', 'platformdirs', 'termcolor', 'rich',
    'markdown-it-py', 'mdurl', 'Pygments', 'PyYAML', 'packaging',
    'opencv-python-headless', 'pytest', 'pluggy', 'iniconfig',
)  # fmt: skip
# what the models need in addition to matplotlib
MODELS = (
    'pycocotools', 'shapely', 'terminaltables', 'tqdm', 'ftfy', 'regex', 'prettytable',
    'wcwidth', 'six', 'ninja', 'wheel',
)  # fmt: skip
SOURCE_ONLY = ('onedl-mmdetection', 'onedl-mmsegmentation')
# pip matches the platforms of wheels one by one
TARGET = [
    '--only-binary=:all:', '--python-version=3.12', '--implementation=cp',
    '--platform=manylinux2014_x86_64',
    *(f'--platform=manylinux_2_{minor}_x86_64' for minor in (17, 24, 27, 28)),
]  # fmt: skip
OFFLINE = ('--no-index', '--no-deps', '--target')
PRESET = 6  # of xz
LIMIT = 60 * 2**20


def pip(*arguments: object, **options) -> int:
    """Run pip; return its exit status."""
    command = [sys.executable, '-m', 'pip', *map(str, arguments)]
    command += ['--disable-pip-version-check']
    return subprocess.run(command, **options).returncode


# --- where there is a package index


def collect(wheels: Path, loss_only: bool) -> None:
    """Download the pinned wheels for the target; build those that are source only."""
    pins = make_env.pins((ROOT / 'requirements-onedl.txt').read_text())
    names = LOSS if loss_only else LOSS + MODELS
    wanted = [f'{name}=={pins[name]}' for name in names]
    flags = ('--no-deps', '-q')
    pip('download', *flags, '-d', wheels, *TARGET, *wanted, check=True)
    if not loss_only:
        flags += ('--no-build-isolation',)
        sources = [f'{name}=={pins[name]}' for name in SOURCE_ONLY]
        pip('wheel', *flags, '-w', wheels, *sources, check=True)
        flags += ('--no-binary', ':all:', '-d', wheels)
        pip('download', *flags, f'{MMCV}=={pins[MMCV]}', check=True)


def stored(wheel: Path) -> bytes:
    """Repack a wheel without compression: xz compresses it better."""
    out = io.BytesIO()
    with zipfile.ZipFile(wheel) as old, zipfile.ZipFile(out, 'w') as new:
        for info in old.infolist():
            data = old.read(info)
            new.writestr(copy(info), data, compress_type=zipfile.ZIP_STORED)
    return out.getvalue()


def pack(archive: Path, wheels: Path) -> None:
    """Write the archive: all files that git does not ignore, and `wheels`."""
    command = ['git', 'ls-files', '-z', '--cached', '--others', '--exclude-standard']
    listed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    with tarfile.open(archive, 'w:xz', preset=PRESET) as tar:
        for name in sorted({*listed.stdout.decode().split('\0')} - {''}):
            if os.path.lexists(ROOT / name):
                tar.add(ROOT / name, f'mmdist/{name}', recursive=False)
        for file in sorted(wheels.iterdir()):
            data = stored(file) if file.suffix == '.whl' else file.read_bytes()
            info = tarfile.TarInfo(f'mmdist/wheels/{file.name}')
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


# --- on the machine


def install_missing(site: Path, wheels: Path) -> None:
    """Install the wheels that this Python lacks into a folder; replace nothing."""
    missing = [
        wheel
        for wheel in sorted(wheels.glob('*.whl'))
        if not all(find_spec(name) for name in modules_of(wheel))
    ]
    # one by one: a wheel for another Python fails only the stage that needs it
    for wheel in missing:
        if pip('install', '-q', '--no-compile', *OFFLINE, site, wheel):
            print(f'{wheel.name} cannot be installed here', flush=True)
    print(f'{len(missing)} wheels were missing, installed into {site}', flush=True)


def modules_of(wheel: Path) -> set[str]:
    """Modules that a wheel provides; another distribution may provide them too."""
    with zipfile.ZipFile(wheel) as file:
        tops = {tuple(name.split('/')[:2]) for name in file.namelist()}
    files = {Path(top[0]).stem for top in tops if top[0].endswith('.py')}
    return files | {top[0] for top in tops if len(top) > 1 and '.' not in top[0]}


def cuda_home() -> str | None:
    """The CUDA toolkit; nvcc on the PATH may be a script that starts its nvcc."""
    nvcc = make_env.find_nvcc()
    if nvcc is None:
        return None
    command = [nvcc, '--dryrun', '-x', 'cu', os.devnull]
    printed = subprocess.run(command, capture_output=True, text=True).stderr
    top = re.search(r'^#\$ TOP=(.+)$', printed, re.M)
    return str(Path(top[1].strip() if top else Path(nvcc).parents[1]).resolve())


def build_ops(site: Path, wheels: Path, card: str) -> str:
    """Compile mmcv for an architecture such as '9.0'; return '' or why it failed."""
    home = cuda_home()
    if home is None:
        return 'there is no nvcc: install the CUDA toolkit and set CUDA_HOME'
    (archive,) = wheels.glob('onedl_mmcv-*.tar.gz')
    sources = site.with_name('sources')
    shutil.rmtree(sources, ignore_errors=True)
    shutil.unpack_archive(archive, sources)
    (tree,) = sources.iterdir()
    mmcv_units.fix_setup(tree / 'setup.py')
    # torch includes headers that a small toolkit lacks; torch's own wheels bring them
    includes = Path(sysconfig.get_paths()['purelib']).glob('nvidia/*/include')
    environ = os.environ | {
        'TORCH_CUDA_ARCH_LIST': card,
        'CUDA_HOME': home,
        'CPATH': joined(os.environ.get('CPATH'), *sorted(includes)),
        'PYTHONPATH': joined(site, os.environ.get('PYTHONPATH')),
        'PATH': joined(site / 'bin', os.environ['PATH']),
    }
    log = site.with_name('mmcv.log')
    for units in (True, False):  # from few files; if that fails, one by one
        environ |= mmcv_units.environment(units, cuda=True)
        with log.open('w') as file:
            flags = ('-v', '--no-build-isolation', *OFFLINE, site)
            if pip('install', *flags, tree, env=environ, stdout=file, stderr=file) == 0:
                return ''
        print('\n'.join(log.read_text(errors='replace').splitlines()[-15:]))
    return f'it does not compile, see {log}'


def run(arguments: list[str]) -> int:
    """Install what is missing, check, compile mmcv, and check the rest."""
    stages = gpu_check.parse_args(arguments).stages
    site, wheels = ROOT / 'site', ROOT / 'wheels'
    install_missing(site, wheels)
    # for this process, and those that it starts
    sys.path.append(str(site))
    os.environ['PYTHONPATH'] = joined(os.environ.get('PYTHONPATH'), site)

    def check(some: list[int]) -> int:
        numbers = ','.join(map(str, some))
        return gpu_check.main([*arguments, '--stages', numbers]) if some else 0

    # stages without a compiler first: the time may be up before it is done
    status = check([x for x in stages if x <= 3])
    others = [x for x in stages if x > 3]
    if others and find_spec('mmcv') is None:
        import torch

        began, problem = time.time(), 'there is no GPU'
        if torch.cuda.is_available():
            card = '{}.{}'.format(*torch.cuda.get_device_capability())
            problem = build_ops(site, wheels, card)
        note = f'not compiled: {problem}' if problem else 'compiled'
        print(f'mmcv: {note}, {time.time() - began:.0f} s', flush=True)
    return max(status, check(others))


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ['--run']:
        return run(argv[1:])
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('archive', type=Path, help='to be written, .tar.xz')
    text = 'without what stages 4 to 6 need'
    parser.add_argument('--loss-only', action='store_true', help=text)
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        collect(Path(folder), args.loss_only)
        pack(args.archive, Path(folder))
    size = args.archive.stat().st_size
    print(f'{args.archive}: {size / 2**20:.1f} MiB. On the machine, beside it:\n')
    check = 'python3 -m tools.dev.gpu_bundle --run --out ../gpu_check'
    check += ' --stages 1-3' if args.loss_only else ''
    print(f'tar xf {args.archive.name} && cd mmdist && {check}')
    if size > LIMIT:
        print(f'It is larger than {LIMIT // 2**20} MiB.', file=sys.stderr)
    return int(size > LIMIT)


if __name__ == '__main__':
    sys.exit(main())
