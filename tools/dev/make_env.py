"""Build the virtual environment of this checkout; `make env` calls it.

    python3 -m tools.dev.make_env [--stack upstream|onedl]

It needs only Python and a C++ compiler. mmcv is compiled once, with its ops, from a few
files that include its sources: two minutes instead of eleven on two cores. The other
libraries are installed meanwhile. The wheel is kept in the user's cache under the
version of torch it was built for. An interrupted run continues, even the compilation;
a finished environment is left alone. Environment variables:

    PIP_*                 pip's own, e.g. PIP_EXTRA_INDEX_URL for PyTorch's CPU wheels
    MAX_JOBS              number of compilers that run in parallel
    FORCE_CUDA=1          build for CUDA on a machine without a GPU
    CUDA_VISIBLE_DEVICES= build for the CPU on a machine with a GPU
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from time import monotonic

from . import mmcv_units
from .progress import Progress, clock

ROOT = Path(__file__).resolve().parents[2]
# stack: requirements, environment, the distribution with mmcv's ops
STACKS = {
    'upstream': ('requirements.txt', '.venv', 'mmcv'),
    'onedl': ('requirements-onedl.txt', '.venv-onedl', 'onedl-mmcv'),
}
BUILD = '2'  # change it when mmcv must be compiled again
# per step, on two cores with a fast network
SECONDS = {
    'virtual environment': 10,
    'torch and build tools': 60,
    'libraries': 80,
    'mmcv': 10,
    'mmdist': 5,
    'check': 20,
}
COMPILE_SECONDS = 120  # on one core, in addition to the parallel step
# What mmcv's setup.py needs, optional imports included: the step that runs during the
# compilation must not be unpacking them.
FOR_MMCV = (
    'setuptools', 'wheel', 'ninja', 'torch', 'numpy', 'packaging', 'platformdirs',
    'tqdm',
)  # fmt: skip
MIN_DISK_GB = 8
FOR_CPU = 'build for the CPU: CUDA_VISIBLE_DEVICES= make env'
UPSTREAM_CUDA = f"""There is a GPU, and mmcv 2.1.0 does not compile for CUDA with the \
pinned torch. Omit STACK for the maintained fork, which does; or {FOR_CPU} \
STACK=upstream; or bring your own environment and run tools/check_env.py in it."""
NO_NVCC = f"""There is a GPU but no CUDA compiler (nvcc) to build the ops of mmcv \
with. Install the CUDA toolkit of torch's version and set CUDA_HOME, or {FOR_CPU}"""


class Stop(Exception):
    """The environment cannot be built; the message says what to do."""


def pins(requirements: str) -> dict[str, str]:
    """The pinned versions in the text of a requirements file."""
    return dict(re.findall(r'^([\w.-]+)==([\w.]+)', requirements, flags=re.M))


def output(*command: object) -> str:
    """The output of a command; '' if it fails or does not exist."""
    command = [str(part) for part in command]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return ''
    return done.stdout.strip() if done.returncode == 0 else ''


def wants_cuda() -> bool:
    """Whether there is a GPU that is not hidden, or FORCE_CUDA asks for CUDA."""
    if os.environ.get('FORCE_CUDA') == '1':
        return True
    hidden = os.environ.get('CUDA_VISIBLE_DEVICES', 'all') in ('', '-1')
    return not hidden and 'GPU ' in output('nvidia-smi', '-L')


def find_nvcc() -> str | None:
    """The CUDA compiler, found where torch looks for it too."""
    home = os.environ.get('CUDA_HOME') or os.environ.get('CUDA_PATH')
    if home and (Path(home) / 'bin/nvcc').exists():
        return str(Path(home) / 'bin/nvcc')
    return shutil.which('nvcc') or shutil.which('nvcc', path='/usr/local/cuda/bin')


def preflight(stack: str, cuda: bool, compiles: bool, venv: Path) -> list[str]:
    """List what prevents the build, before anything is downloaded or built."""
    python, is_upstream = sys.version_info, stack == 'upstream'
    header = Path(sysconfig.get_paths()['include'], 'Python.h')
    packages = {
        'python3-venv': not (venv / 'bin/pip').exists() and not find_spec('ensurepip'),
        'g++': compiles and not shutil.which(os.environ.get('CXX', 'c++')),
        'python3-dev': compiles and not header.exists(),
    }
    missing = ' '.join(name for name, lacks in packages.items() if lacks)
    free = shutil.disk_usage(venv.parent).free / 1e9
    problems = {
        f'The pinned versions need Python 3.11 or newer; this is {python[0]}.'
        f'{python[1]}. Name another: make env PYTHON=python3.11': python < (3, 11),
        'mmcv 2.1.0 cannot be built with Python 3.13 or newer. Name another: make env '
        'PYTHON=python3.12, or take the maintained fork: STACK=onedl': (
            is_upstream and compiles and python >= (3, 13)
        ),
        f'Missing from the system: run `sudo apt-get install {missing}` (Debian, '
        'Ubuntu).': missing,
        f'{free:.0f} GB are free in {venv.parent}; torch and the build of mmcv '
        f'need {MIN_DISK_GB}.': compiles and free < MIN_DISK_GB,
        UPSTREAM_CUDA: cuda and is_upstream,
        NO_NVCC: cuda and compiles and not is_upstream and not find_nvcc(),
    }
    return [text for text, applies in problems.items() if applies]


class Builder:
    """The build steps; pip skips what is installed."""

    def __init__(self, stack: str, cuda: bool) -> None:
        requirements, venv, self.mmcv = STACKS[stack]
        self.waiting, self.progress = dict(SECONDS), Progress('env', len(SECONDS))
        self.cuda, self.venv = cuda, ROOT / venv
        self.requirements = ROOT / requirements
        self.pins = pins(self.requirements.read_text())
        self.python = self.venv / 'bin/python'
        self.stamp = self.venv / 'mmdist-env.txt'
        self.release = f'{self.mmcv.replace("-", "_")}-{self.pins[self.mmcv]}'
        self.tree = self.venv / 'src' / self.release  # mmcv's, next to its wheel
        self.compiling: subprocess.Popen | None = None

    def made_from(self) -> str:
        """Hash of everything that a finished environment was made from."""
        digest = hashlib.sha256(f'{self.cuda} {BUILD}'.encode())
        # site-packages holds these: a change needs a new install of mmdist
        installed = ('mmdist.pth', 'mmdist/_startup.py', 'mmdist/version.py')
        for path in (self.requirements, *(ROOT / name for name in installed)):
            digest.update(path.read_bytes())
        return digest.hexdigest()

    def finished(self) -> bool:
        there = self.python.exists() and self.stamp.exists()
        return there and self.stamp.read_text() == self.made_from()

    def build(self) -> None:
        self.stamp.unlink(missing_ok=True)
        if not self.cached_wheel('*'):
            self.waiting['mmcv'] += COMPILE_SECONDS / mmcv_units.jobs()
        self.step('virtual environment', self.make_venv)
        self.step('torch and build tools', self.add_torch)
        try:
            self.begin_mmcv()
            self.step('libraries', self.add_libraries)
            self.step('mmcv', self.add_mmcv)
        finally:  # another step failed, or this process is ending
            if self.compiling and self.compiling.poll() is None:
                os.killpg(self.compiling.pid, signal.SIGTERM)
        self.step('mmdist', self.add_mmdist)
        self.step('check', self.check)
        self.stamp.write_text(self.made_from())
        took = clock(self.progress.elapsed())
        self.progress.say(f'{self.venv.name} is ready, after {took}.')

    def step(self, title: str, action: Callable[[], None]) -> None:
        self.title, self.expected = title, self.waiting.pop(title)
        self.began = monotonic()
        action()
        self.progress.done(f'{title}: done')

    def left(self) -> float:
        """About how many seconds are left for all steps."""
        spent = monotonic() - self.began
        # assume that a step that takes longer than expected is nearly done
        return max(self.expected - spent, spent / 10) + sum(self.waiting.values())

    # --- commands

    def pinned(self, *names: str) -> list[str]:
        return [f'{name}=={self.pins[name]}' for name in names]

    def pip(self, *arguments: object) -> list:
        flags = ('--disable-pip-version-check', '--no-input')
        return [self.python, '-m', 'pip', *arguments, *flags]

    def install(self, *arguments: object) -> None:
        # compiling all files to bytecode takes half a minute; most are never imported
        self.run(*self.pip('install', '--no-compile', *arguments))

    def run(self, *command: object) -> None:
        self.wait(self.start('make_env.log', command))

    def start(self, log: str, command, environ=(), **options) -> subprocess.Popen:
        """Start a command that appends to a log in the environment."""
        # torch finds ninja on the PATH; without it the build uses one core and restarts
        # from scratch after an interruption
        path = f'{self.venv / "bin"}:{os.environ["PATH"]}'
        options |= dict(cwd=ROOT, env={**os.environ, 'PATH': path, **dict(environ)})
        command = [str(part) for part in command]
        with (self.venv / log).open('a') as file:
            print(f'\n$ {" ".join(command)}', file=file, flush=True)
            options |= dict(stdout=file, stderr=subprocess.STDOUT)
            process = subprocess.Popen(command, **options)
            process.log, process.log_start = self.venv / log, file.tell()
        return process

    def wait(self, process: subprocess.Popen) -> None:
        """Wait for a command; raise Stop with the end of its output if it fails."""
        try:
            while process.poll() is None:
                self.progress.show(self.title, self.left())
                with suppress(subprocess.TimeoutExpired):
                    process.wait(timeout=0.5)
        finally:  # a signal asks this process to end
            process.terminate()
        if process.returncode:
            output = process.log.read_bytes()[process.log_start :]
            lines = output.decode(errors='replace').splitlines()
            # a compiler's first error is far from the end
            first = [f'{x.strip()}\n...' for x in lines if ' error: ' in x][:1]
            tail = '\n'.join([*first, *lines[-30:]])
            failed = ' '.join(process.args)
            raise Stop(f'The end of {process.log}:\n{tail}\nThis failed: {failed}')

    # --- steps

    def make_venv(self) -> None:
        code = 'import pip, sys; print(sys.prefix)'
        if output(self.python, '-c', code) != str(self.venv):
            # --clear: it is incomplete, or was copied here from another place
            command = [sys.executable, '-m', 'venv', '--clear', str(self.venv)]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                failed = ' '.join(command)
                raise Stop(f'{done.stdout}{done.stderr}\nThis failed: {failed}')

    def add_torch(self) -> None:
        self.install(*self.pinned(*FOR_MMCV), '-c', self.requirements)

    def add_libraries(self) -> None:
        # mmcv may not be there yet: leave it out, and let nothing pull it in
        others = self.venv / 'requirements.txt'
        (mmcv,) = self.pinned(self.mmcv)
        others.write_text(self.requirements.read_text().replace(f'{mmcv}\n', ''))
        # --no-build-isolation: the fork's libraries are source only and import torch
        self.install('--no-build-isolation', '--no-deps', '-r', others)
        # replaces opencv-python, required by mmengine: it does not import without libGL
        headless = self.pinned('opencv-python-headless')
        self.install('--force-reinstall', '--no-deps', *headless)

    def add_mmdist(self) -> None:
        # all that the libraries require is pinned; if not, it would be added here
        self.install('--no-build-isolation', '-r', self.requirements)
        self.install('--no-build-isolation', '--no-deps', '-e', ROOT)

    def check(self) -> None:
        try:
            self.run(self.python, ROOT / 'tools/check_env.py')
        except Stop as stop:
            raise Stop(
                f'{stop}\nIf it is about mmcv.ops, delete {self.cached_wheel()} to '
                'compile them again.'
            ) from None

    # --- mmcv

    def wheels(self, torch: str | None = None) -> Path:
        """The folder of the wheels for this torch; pip's cache ignores torch."""
        cache = Path(os.environ.get('XDG_CACHE_HOME') or Path.home() / '.cache')
        version = 'from importlib.metadata import version as v; print(v("torch"))'
        torch = torch or output(self.python, '-c', version)
        device = 'cuda' if self.cuda else 'cpu'
        return cache / 'mmdist' / f'torch-{torch}-{device}-build{BUILD}'

    def cached_wheel(self, torch: str | None = None) -> Path | None:
        folder, tag = self.wheels(torch), 'cp{}{}'.format(*sys.version_info)
        found = folder.parent.glob(f'{folder.name}/{self.release}-{tag}-*.whl')
        return min(found, default=None)

    def begin_mmcv(self) -> None:
        """Start compiling mmcv, unless its wheel is cached."""
        if self.cached_wheel():
            return
        if not self.tree.exists():
            flags = ('--no-build-isolation', '--no-binary', ':all:', '--no-deps', '-d')
            pinned = self.pinned(self.mmcv)
            self.run(*self.pip('download', *flags, self.tree.parent, *pinned))
            unpacked = Path(f'{self.tree}.tmp')
            shutil.unpack_archive(f'{self.tree}.tar.gz', unpacked)
            mmcv_units.fix_setup(unpacked / self.release / 'setup.py')
            (unpacked / self.release).rename(self.tree)
        self.compiling = self.compile(units=True)

    def compile(self, units: bool) -> subprocess.Popen:
        # pip builds a directory in place, so ninja continues after an interruption
        flags = ('-v', '--no-build-isolation', '--no-deps', '-w', self.tree.parent)
        command = self.pip('wheel', *flags, self.tree)
        environ = mmcv_units.environment(units, self.cuda)
        # its own process group, to be stopped with all compilers
        return self.start('make_env_mmcv.log', command, environ, start_new_session=True)

    def add_mmcv(self) -> None:
        wheel = self.compiled_wheel() if self.compiling else self.cached_wheel()
        self.install('--force-reinstall', '--no-deps', wheel)

    def compiled_wheel(self) -> Path:
        """Wait for the wheel, and cache it."""
        try:
            self.wait(self.compiling)
        except Stop:
            self.progress.say('mmcv does not compile from few files; now file by file.')
            self.compiling = self.compile(units=False)
            self.wait(self.compiling)
        (built,) = self.tree.parent.glob(f'{self.release}-cp*.whl')
        kept = self.wheels() / built.name
        kept.parent.mkdir(parents=True, exist_ok=True)
        Path(shutil.copy(built, f'{kept}.part')).rename(kept)
        shutil.rmtree(self.tree.parent)
        return kept


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    text = 'upstream, or onedl, the maintained fork (the default on a GPU machine)'
    parser.add_argument('--stack', choices=STACKS, help=text)
    text = 'print the default stack and stop'
    parser.add_argument('--which', action='store_true', help=text)
    args = parser.parse_args()
    for number in (signal.SIGTERM, signal.SIGHUP):  # ends the compilation too
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    cuda = wants_cuda()
    stack = args.stack or ('onedl' if cuda else 'upstream')
    if args.which:
        print(stack)
        return 0
    builder = Builder(stack, cuda)
    if builder.finished():
        return 0
    try:
        compiles = not builder.cached_wheel('*')
        if problems := preflight(stack, cuda, compiles, builder.venv):
            raise Stop('\n  '.join(['Nothing was built.', *problems]))
        if cuda:
            builder.progress.say(
                'There is a GPU, so the onedl fork is taken. Nobody has run this build '
                'yet: please report how it went.'
            )
        with builder.progress:
            builder.build()
    except Stop as stop:
        print(f'[env] {stop}', file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print('\n[env] Interrupted. `make env` continues here.', file=sys.stderr)
        return 130
    return 0


if __name__ == '__main__':
    sys.exit(main())
