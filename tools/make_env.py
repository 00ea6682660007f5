#!/usr/bin/env python3
"""Build the virtual environment of this checkout; `make env` calls it.

    python3 tools/make_env.py [--stack upstream|onedl]

Needs Python and a C++ compiler only. mmcv is compiled here, once, with its ops, from a
few files that include its sources: two minutes instead of eleven on two cores. The
other libraries are installed meanwhile. The wheel is kept in the user's cache under the
version of torch it was built for. What is finished is recognised, so an interrupted run
continues (the compilation too) and a second one ends at once. Environment variables:

    PIP_*                 pip's own, e.g. PIP_EXTRA_INDEX_URL for PyTorch's CPU wheels
    MAX_JOBS              compilers that run side by side
    FORCE_CUDA=1          build for CUDA although no GPU is in the machine
    CUDA_VISIBLE_DEVICES= build for the CPU although a GPU is in the machine
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
import time
from collections.abc import Callable
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from check_env import RUN_OPS
from progress import Plan, Progress, clock

ROOT = Path(__file__).resolve().parent.parent
# stack: requirements, environment, the distribution that holds mmcv's ops
STACKS = {
    'upstream': ('requirements.txt', '.venv', 'mmcv'),
    'onedl': ('requirements-onedl.txt', '.venv-onedl', 'onedl-mmcv'),
}
STAMP = 'mmdist-env.txt'
OPENCV_GUI = (
    'import cv2, re; print(re.search(r"GUI: *(\\w+)", cv2.getBuildInformation())[1])'
)
MIN_DISK_GB = 8
# of each step, on two cores with a fast network
SECONDS = {
    'virtual environment': 10,
    'torch and build tools': 60,
    'mmengine and opencv': 20,
    'the other libraries': 60,
    'mmcv': 10,
    'mmdist': 5,
    'check': 20,
}
COMPILE_SECONDS = 120  # on one core, beyond what the steps beside it take
COMPILED = r'^\s*\[(\d+)/(\d+)\]'  # what ninja says: 1 of 4
BUILD = '2'  # another one where mmcv must be compiled again
# mmcv's sources that define the same helpers, so no two of them fit in one unit
APART = (
    'bezier_align.cpp',
    'roi_align.cpp',
    'roi_align_rotated.cpp',
    'rotated_feature_align.cpp',
)
LAST = 'psamask.cpp'  # defines the macros min and max
# What mmcv's setup.py needs, also what it imports only where that is installed: the
# steps beside the compilation must not be unpacking it then.
FOR_MMCV = (
    'setuptools', 'wheel', 'ninja', 'torch', 'numpy', 'packaging', 'platformdirs',
    'tqdm',
)  # fmt: skip


class Stop(Exception):
    """The environment cannot be built; the message says what to do."""


def pins(requirements: str) -> dict[str, str]:
    """The pinned versions in the text of a requirements file."""
    return dict(re.findall(r'^([\w.-]+)==([\w.]+)', requirements, flags=re.M))


def wants_cuda(environ: dict[str, str] = os.environ) -> bool:
    """A GPU is in the machine and not hidden, or FORCE_CUDA asks for it."""
    if environ.get('FORCE_CUDA') == '1':
        return True
    if environ.get('CUDA_VISIBLE_DEVICES', 'all') in ('', '-1'):
        return False
    try:
        listed = subprocess.run(
            ['nvidia-smi', '-L'],
            env=dict(environ),
            capture_output=True,
            text=True,
            timeout=60,
        )
    except (OSError, subprocess.TimeoutExpired):
        return False
    return listed.returncode == 0 and 'GPU ' in listed.stdout


def find_nvcc(environ: dict[str, str] = os.environ) -> str | None:
    """The CUDA compiler, where torch will look for it too."""
    home = environ.get('CUDA_HOME') or environ.get('CUDA_PATH')
    if home and (Path(home) / 'bin/nvcc').exists():
        return str(Path(home) / 'bin/nvcc')
    found = shutil.which('nvcc', path=environ.get('PATH'))
    return found or shutil.which('nvcc', path='/usr/local/cuda/bin')


def preflight(stack: str, cuda: bool, compiles: bool, venv: Path) -> list[str]:
    """What stands in the way, before anything is downloaded or built."""
    problems, packages = [], []
    if sys.version_info < (3, 11):
        problems.append(
            f'The pinned versions need Python 3.11 or newer; this is '
            f'{sys.version.split()[0]}. Name another: make env PYTHON=python3.11'
        )
    if stack == 'upstream' and compiles and sys.version_info >= (3, 13):
        problems.append(
            'mmcv 2.1.0 cannot be built with Python 3.13 or newer: its setup.py reads '
            'its version in a way that Python has ended. Name another: '
            'make env PYTHON=python3.12, or take the maintained fork: STACK=onedl'
        )
    if not (venv / 'bin/pip').exists() and find_spec('ensurepip') is None:
        packages.append('python3-venv')
    if compiles:
        if not shutil.which(os.environ.get('CXX', 'c++')):
            packages.append('g++')
        if not Path(sysconfig.get_paths()['include'], 'Python.h').exists():
            packages.append('python3-dev')
        free = shutil.disk_usage(venv.parent).free / 1e9
        if free < MIN_DISK_GB:
            problems.append(
                f'{free:.0f} GB are free in {venv.parent}; '
                f'torch and the build of mmcv need {MIN_DISK_GB}.'
            )
    if packages:
        problems.append(
            'Missing from the system: '
            f'run `sudo apt-get install {" ".join(packages)}` (Debian, Ubuntu).'
        )
    if cuda and stack == 'upstream':
        problems.append(
            'There is a GPU, and mmcv 2.1.0 does not compile for CUDA with the torch '
            'that is pinned (it does not from torch 2.9 and CUDA 13 on). Omit STACK '
            '(or STACK=onedl) for the maintained fork, which does; or build for '
            'the CPU: CUDA_VISIBLE_DEVICES= make env STACK=upstream; or bring an '
            'environment of your own and let tools/check_env.py look at it.'
        )
    elif cuda and compiles and not find_nvcc():
        problems.append(
            'There is a GPU but no CUDA compiler (nvcc) to build the ops of mmcv with. '
            "Install the CUDA toolkit of torch's CUDA version and set CUDA_HOME, or "
            'build for the CPU: CUDA_VISIBLE_DEVICES= make env'
        )
    return problems


def check_toolkit(python: Path) -> None:
    """nvcc and torch must agree on the major version of CUDA."""
    wanted = ask(python, 'import torch; print(torch.version.cuda or "none")')
    nvcc = find_nvcc()
    shown = subprocess.run([nvcc, '--version'], capture_output=True, text=True).stdout
    release = re.search(r'release ([\d.]+)', shown)
    found = release[1] if release else 'unknown'
    if wanted.split('.')[0] != found.split('.')[0]:
        raise Stop(
            f'torch was built for CUDA {wanted}, but {nvcc} is of CUDA {found}: the '
            'major versions must agree. Install that toolkit and set CUDA_HOME, or '
            'build for the CPU: CUDA_VISIBLE_DEVICES= make env'
        )


def ask(python: Path, code: str) -> str:
    """What a line of Python prints in the environment; '' if it fails."""
    try:
        run = subprocess.run([python, '-c', code], capture_output=True, text=True)
    except OSError:  # not there yet, or a link to a Python that is gone
        return ''
    return run.stdout.strip() if run.returncode == 0 else ''


class Running(NamedTuple):
    """A command that has been started."""

    process: subprocess.Popen
    log: Path
    start: int  # where its output begins in the log
    began: float


class Builder:
    """The steps, each of which skips what is finished."""

    def __init__(self, stack: str, cuda: bool) -> None:
        requirements, venv, self.mmcv = STACKS[stack]
        self.plan = Plan(SECONDS)
        self.progress = Progress('env', len(SECONDS))
        self.cuda = cuda
        self.requirements = ROOT / requirements
        self.pins = pins(self.requirements.read_text())
        self.venv = ROOT / venv
        self.python = self.venv / 'bin/python'
        self.log = self.venv / 'make_env.log'
        self.mmcv_build = self.venv / 'mmcv_build'
        self.compiling: Running | None = None

    def stamp(self) -> str:
        """Changes with whatever a finished environment was made from."""
        digest = hashlib.sha256(f'{self.cuda} {BUILD}'.encode())
        # what lies in site-packages asks for a new install of mmdist
        for path in (
            self.requirements,
            ROOT / 'mmdist.pth',
            ROOT / 'mmdist/_startup.py',
            ROOT / 'mmdist/version.py',
        ):
            digest.update(path.read_bytes())
        return digest.hexdigest()

    def finished(self) -> bool:
        stamp = self.venv / STAMP
        return (
            self.python.exists()
            and stamp.exists()
            and stamp.read_text() == self.stamp()
        )

    def build(self) -> None:
        (self.venv / STAMP).unlink(missing_ok=True)
        wheels = self.wheels().parent.glob(f'*/{self.wheel_name()}')
        if not (any(wheels) or self.has_ops()):
            self.plan.waiting['mmcv'] += COMPILE_SECONDS / jobs()
        self.step('virtual environment', self.make_venv)
        self.step('torch and build tools', self.add_torch)
        try:
            self.begin_mmcv()
            self.step('mmengine and opencv', self.add_mmengine)
            self.step('the other libraries', self.add_libraries)
            self.step('mmcv', self.add_mmcv)
        finally:
            self.end_mmcv()
        self.step('mmdist', self.add_mmdist)
        self.step('check', self.check)
        (self.venv / STAMP).write_text(self.stamp())
        took = clock(self.progress.elapsed())
        self.progress.say(f'{self.venv.name} is ready, after {took}.')

    def step(self, title: str, action: Callable[[], str | None]) -> None:
        self.plan.begin(title)
        self.title = title
        self.progress.show(title, self.plan.left())
        note = action()
        self.progress.done(f'{title}: {note or "done"}')

    def run(self, *command) -> None:
        """Run a command into the log; its end is shown where it fails."""
        self.wait(self.start(*command))

    def start(
        self, *command, log: Path | None = None, group: bool = False, **environ: str
    ) -> Running:
        """Start a command that writes into a log.

        Args:
            command: The program and its arguments.
            log: Where its output is appended; ``self.log`` if omitted.
            group: Give it a process group, so that it can be stopped with all it runs.
            environ: Environment variables.
        """
        log = log or self.log
        with log.open('a') as file:
            file.write(f'\n$ {" ".join(map(str, command))}\n')
            file.flush()
            process = subprocess.Popen(
                [str(part) for part in command],
                cwd=ROOT,
                # torch finds ninja on the PATH; without it the build takes one core
                # and starts from the beginning after an interruption
                env={
                    **os.environ,
                    'PATH': f'{self.venv / "bin"}:{os.environ["PATH"]}',
                    **environ,
                },
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=group,
            )
            return Running(process, log, file.tell(), time.monotonic())

    def wait(self, running: Running, progress: str | None = None) -> None:
        """Wait for a command, and show how far it is.

        Args:
            running: The command.
            progress: Regular expression of the number of parts that are done, and of
                all, in its output.

        Raises:
            Stop: It failed.
        """
        process, log, start, began = running
        ended = False
        while not ended:
            with suppress(subprocess.TimeoutExpired):
                process.wait(timeout=0.5)
            ended = process.poll() is not None
            said = log.read_bytes()[start:].decode(errors='replace')
            counts = re.findall(progress, said, flags=re.M) if progress else []
            parts = map(int, counts[-1]) if counts else ()
            self.show(time.monotonic() - began, *parts)
        if process.returncode:
            lines = said.splitlines()
            # a compiler's is far from the end
            first = [f'{x.strip()}\n...' for x in lines if ' error: ' in x][:1]
            tail = '\n'.join([*first, *lines[-30:]])
            raise Stop(
                f'The end of {log}:\n{tail}\nThis failed: {" ".join(process.args)}'
            )

    def show(self, spent: float, part: int = 0, parts: int = 0) -> None:
        """How far the current step is, and how many of its parts are done, if known."""
        text = f'{self.title}, {part} of {parts}' if parts else self.title
        # of a few units two end at the same time; they say little
        known = part and parts > 2 * len(APART)
        eta = spent * (parts - part) / part if known else None
        self.progress.show(text, self.plan.left(eta))

    def pip(self, *arguments) -> None:
        self.run(*self.pip_command(*arguments))

    def install(self, *arguments) -> None:
        # bytecode of all files takes half a minute; most of them are never imported
        self.pip('install', '--no-compile', *arguments)

    def pip_command(self, *arguments) -> tuple:
        flags = ('--disable-pip-version-check', '--no-input')
        return (self.python, '-m', 'pip', *arguments, *flags)

    def make_venv(self) -> str | None:
        if ask(self.python, 'import pip; print(1)') and not self.moved():
            return 'was there'
        # --clear: a torso, or one that was copied here from another place
        self.venv.mkdir(exist_ok=True)
        command = [sys.executable, '-m', 'venv', '--clear', str(self.venv)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        if done.returncode:
            said = done.stdout + done.stderr
            raise Stop(f'{said}\nThis failed: {" ".join(command)}')
        return None

    def moved(self) -> bool:
        return ask(self.python, 'import sys; print(sys.prefix)') != str(self.venv)

    def add_torch(self) -> str | None:
        if ask(self.python, 'import torch; print(1)') and all(
            self.version(name) == self.pins[name] for name in FOR_MMCV
        ):
            return 'was there'
        wanted = [f'{name}=={self.pins[name]}' for name in FOR_MMCV]
        self.install(*wanted, '-c', self.requirements)
        return None

    def version(self, name: str) -> str:
        code = f'from importlib.metadata import version; print(version({name!r}))'
        return ask(self.python, code).split('+')[0]

    def add_mmengine(self) -> str | None:
        engine = 'onedl-mmengine' if self.mmcv.startswith('onedl') else 'mmengine'
        headless = 'opencv-python-headless'
        if (
            self.version(engine) == self.pins[engine]
            and self.version(headless) == self.pins[headless]
            and ask(self.python, OPENCV_GUI) == 'NONE'
        ):
            return 'was there'
        self.install(f'{engine}=={self.pins[engine]}', '-c', self.requirements)
        # Over opencv-python, which mmengine names: without libGL it does not import.
        pinned = f'{headless}=={self.pins[headless]}'
        self.install('--force-reinstall', '--no-deps', pinned)
        return None

    def has_ops(self) -> bool:
        build = self.mmcv_build.read_text() if self.mmcv_build.exists() else None
        if (self.version(self.mmcv), build) != (self.pins[self.mmcv], BUILD):
            return False
        return ask(self.python, f'{RUN_OPS}\nprint("fine")') == 'fine'

    def wheels(self) -> Path:
        """Where the wheels for this torch are kept; pip's cache ignores torch."""
        cache = Path(os.environ.get('XDG_CACHE_HOME') or Path.home() / '.cache')
        torch = ask(self.python, 'import torch; print(torch.__version__)')
        device = 'cuda' if self.cuda else 'cpu'
        return cache / 'mmdist' / f'torch-{torch}-{device}-build{BUILD}'

    def cached_wheel(self) -> Path | None:
        return next(iter(sorted(self.wheels().glob(self.wheel_name()))), None)

    def wheel_name(self) -> str:
        tag = f'cp{sys.version_info[0]}{sys.version_info[1]}'
        return f'{self.mmcv.replace("-", "_")}-{self.pins[self.mmcv]}-{tag}-*.whl'

    @property
    def tree(self) -> Path:
        """Where mmcv's sources are unpacked, its wheel beside them."""
        name = f'{self.mmcv.replace("-", "_")}-{self.pins[self.mmcv]}'
        return self.venv / 'src' / name

    def begin_mmcv(self) -> None:
        """Start to compile mmcv, if it must be."""
        if self.has_ops() or self.cached_wheel():
            return
        if self.cuda:
            check_toolkit(self.python)
        tree = self.tree
        if not tree.exists():
            pinned = f'{self.mmcv}=={self.pins[self.mmcv]}'
            build = ('--no-build-isolation', '--no-binary', ':all:', '--no-deps')
            self.pip('download', *build, '-d', tree.parent, pinned)
            shutil.unpack_archive(f'{tree}.tar.gz', f'{tree}.tmp')
            fix_setup(Path(f'{tree}.tmp', tree.name, 'setup.py'))
            Path(f'{tree}.tmp', tree.name).rename(tree)
        self.compiling = self.compile(units='1')

    def end_mmcv(self) -> None:
        """Stop the compilation where another step has failed."""
        if self.compiling and self.compiling.process.poll() is None:
            os.killpg(self.compiling.process.pid, signal.SIGTERM)

    def add_mmcv(self) -> str | None:
        if self.compiling:
            wheel, note = self.compiled_wheel(), None
        elif self.has_ops():
            return 'was there, with its ops'
        else:
            wheel = self.cached_wheel()
            note = f'its wheel was at hand in {self.wheels()}'
        self.install('--force-reinstall', '--no-deps', wheel)
        self.mmcv_build.write_text(BUILD)
        if not self.has_ops():
            raise Stop(
                f'The ops of mmcv do not run: `{self.python} tools/check_env.py` says '
                f'more. To compile them once more, delete {wheel}'
            )
        return note

    def compiled_wheel(self) -> Path:
        """Wait for the wheel, and keep it."""
        try:
            self.wait(self.compiling, COMPILED)
        except Stop:
            self.progress.say('mmcv does not compile from few files; now file by file.')
            self.compiling = self.compile(units='0')
            self.wait(self.compiling, COMPILED)
        built = next(self.tree.parent.glob(f'{self.tree.name}-cp*.whl'))
        self.wheels().mkdir(parents=True, exist_ok=True)
        wheel = shutil.copy(built, self.wheels() / f'{built.name}.part')
        wheel = Path(wheel).rename(self.wheels() / built.name)
        shutil.rmtree(self.tree.parent)
        return wheel

    def compile(self, units: str) -> Running:
        # pip builds a directory in place, so ninja goes on where it was interrupted.
        flags = ('-v', '--no-build-isolation', '--no-deps', '-w', self.tree.parent)
        return self.start(
            *self.pip_command('wheel', *flags, self.tree),
            log=self.venv / 'make_env_mmcv.log',
            group=True,
            MMCV_WITH_OPS='1',
            MMDIST_UNITS=units,
            CFLAGS=compiler_flags(),
            MAX_JOBS=os.environ.get('MAX_JOBS') or str(jobs()),
            FORCE_CUDA='1' if self.cuda else '0',
        )

    def add_libraries(self) -> None:
        # mmcv may not be there yet: without it, and without what asks for it
        others = self.venv / 'requirements.txt'
        lines = self.requirements.read_text().splitlines()
        others.write_text(
            '\n'.join(x for x in lines if not x.startswith(f'{self.mmcv}=='))
        )
        # --no-build-isolation: the fork's libraries are source only and import torch
        self.install('--no-build-isolation', '--no-deps', '-r', others)

    def add_mmdist(self) -> None:
        # what the libraries ask for is pinned; were it not, it would be added here
        self.install('--no-build-isolation', '-r', self.requirements)
        flags = ('--no-deps', '--no-build-isolation')
        self.install(*flags, '-e', ROOT)

    def check(self) -> None:
        self.run(self.python, ROOT / 'tools/check_env.py')


def compiler_flags() -> str:
    """Python's own, which CFLAGS replaces: without them nothing is optimized."""
    flags = (sysconfig.get_config_var('CFLAGS'), os.environ.get('CFLAGS'))
    # debug symbols take a third of the time
    return ' '.join([*filter(None, flags), '-g0'])


def fix_setup(setup: Path) -> None:
    """Let mmcv's setup.py compile units, by the C++ standard that torch asks for."""
    text = setup.read_text().replace('sources=op_files,', 'sources=as_units(op_files),')
    # torch adds the flag where there is none: C++20 from 2.14 on
    text = re.sub(r"(, )?'-std=c\+\+\d\d'", '', text)
    tools = str(Path(__file__).resolve().parent)
    load = f'import sys\nsys.path.append({tools!r})\nfrom make_env import as_units\n'
    setup.write_text(load + text)


def as_units(sources: list[str]) -> list[str]:
    """Replace C++ sources by a few units that include them, unless MMDIST_UNITS=0.

    Nearly all the time of a source goes into the same headers. What is not C++ (CUDA)
    stays as it is.
    """
    merged = [path for path in sources if path.endswith('.cpp')]
    if os.environ.get('MMDIST_UNITS') == '0' or len(merged) <= len(APART):
        return sources
    # the largest first, so that the units come out alike
    merged.sort(
        key=lambda path: (os.path.basename(path) in APART, os.path.getsize(path))
    )
    units = [[] for _ in range(max(len(APART), jobs()))]
    for number, path in enumerate(reversed(merged)):
        units[number % len(units)].append(path)
    folder = Path('units')
    folder.mkdir(exist_ok=True)
    written = [path for path in sources if path not in merged]
    for number, paths in enumerate(filter(None, units)):
        paths.sort(key=lambda path: os.path.basename(path) == LAST)
        lines = ''.join(f'#include "{os.path.abspath(path)}"\n' for path in paths)
        unit = folder / f'unit_{number}.cpp'
        if not unit.exists() or unit.read_text() != lines:
            unit.write_text(lines)  # ninja compiles again what is newer
        written.append(str(unit))
    return written


def jobs() -> int:
    """Compilers side by side: one for each core and each 2 GB of memory."""
    memory = os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 1e9
    return max(1, min(os.cpu_count() or 1, int(memory / 2)))


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        '--stack',
        choices=STACKS,
        help='upstream, or onedl, the maintained fork (the default on a GPU machine)',
    )
    parser.add_argument(
        '--which', action='store_true', help='print the default stack and stop'
    )
    args = parser.parse_args()
    for number in (signal.SIGTERM, signal.SIGHUP):  # end what runs
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
        compiles = not builder.has_ops()
        problems = preflight(stack, cuda, compiles, builder.venv)
        if problems:
            raise Stop('\n  '.join(['Nothing was built.', *problems]))
        if cuda:
            builder.progress.say(
                'A GPU: the onedl fork is taken, since upstream mmcv does not compile '
                'for CUDA 13. Nobody has run this build yet; tell us how it went.'
            )
        with builder.progress:
            builder.build()
    except Stop as stop:
        print(f'[env] {stop}', file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(
            '\n[env] Interrupted. The next `make env` continues here.', file=sys.stderr
        )
        return 130
    return 0


if __name__ == '__main__':
    sys.exit(main())
