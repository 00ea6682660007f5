"""Building an environment, with pip and compilers replaced."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from tools.dev import make_env, mmcv_units

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def smi(tmp_path, monkeypatch) -> Path:
    """A PATH with an nvidia-smi that lists a GPU."""
    smi = tmp_path / 'bin/nvidia-smi'
    smi.parent.mkdir()
    smi.write_text('#!/bin/sh\necho "GPU 0: NVIDIA A100 (UUID: GPU-0)"\n')
    smi.chmod(0o755)
    monkeypatch.setenv('PATH', f'{smi.parent}:/usr/bin:/bin')
    monkeypatch.setenv('CUDA_VISIBLE_DEVICES', '0')
    return smi


def test_the_fork_is_the_default_where_there_is_a_gpu(smi, monkeypatch):
    # a bare Python: only the standard library
    command = [sys.executable, '-S', '-m', 'tools.dev.make_env', '--which']
    assert subprocess.check_output(command, cwd=ROOT, text=True) == 'onedl\n'
    monkeypatch.setenv('CUDA_VISIBLE_DEVICES', '')
    assert not make_env.wants_cuda()
    monkeypatch.delenv('CUDA_VISIBLE_DEVICES')
    smi.unlink()
    assert not make_env.wants_cuda()
    monkeypatch.setenv('FORCE_CUDA', '1')
    assert make_env.wants_cuda()


def test_upstream_on_a_gpu_stops_before_anything_is_built(
    smi, tmp_path, monkeypatch, capsys
):
    for name in ('requirements.txt', 'mmdist.pth'):
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    monkeypatch.setattr(make_env, 'ROOT', tmp_path)
    monkeypatch.setattr(make_env.signal, 'signal', lambda *_: None)
    monkeypatch.setattr(sys, 'argv', ['make_env', '--stack', 'upstream'])
    assert make_env.main() == 1
    printed = capsys.readouterr().err
    assert 'Nothing was built' in printed and 'does not compile for CUDA' in printed
    assert 'CUDA_VISIBLE_DEVICES= make env STACK=upstream' in printed
    assert not list(tmp_path.glob('.venv*'))


@pytest.mark.parametrize(
    'python, stack, cuda, compiles, problem',
    [
        ((3, 10), 'upstream', False, False, 'need Python 3.11 or newer; this is 3.10'),
        ((3, 13), 'upstream', False, True, 'mmcv 2.1.0 cannot be built with Python'),
        ((3, 13), 'upstream', False, False, None),
        ((3, 13), 'onedl', False, True, None),
        ((3, 11), 'onedl', True, True, 'no CUDA compiler (nvcc)'),
        ((3, 11), 'onedl', True, False, None),
    ],
)
def test_what_stands_in_the_way(
    python, stack, cuda, compiles, problem, monkeypatch, tmp_path
):
    monkeypatch.setattr(make_env, 'sys', SimpleNamespace(version_info=python))
    monkeypatch.setattr(make_env, 'find_nvcc', lambda: None)
    problems = make_env.preflight(stack, cuda, compiles, tmp_path)
    assert [problem in text for text in problems] == ([True] if problem else [])


def test_what_the_system_lacks_is_named_with_its_packages(monkeypatch, tmp_path):
    monkeypatch.setenv('CXX', 'no-compiler')
    monkeypatch.setattr(make_env, 'find_spec', lambda name: None)
    monkeypatch.setattr(
        make_env.shutil, 'disk_usage', lambda path: SimpleNamespace(free=3e9)
    )
    packages, disk = make_env.preflight('upstream', False, True, tmp_path / '.venv')
    assert 'sudo apt-get install python3-venv g++' in packages
    assert f'3 GB are free in {tmp_path}' in disk


@pytest.fixture
def builder(monkeypatch, tmp_path) -> make_env.Builder:
    """A builder with existing folders, whose pip only keeps a list of calls."""
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))
    builder = make_env.Builder('upstream', cuda=False)
    builder.venv = tmp_path
    builder.python = tmp_path / 'no-python'
    builder.stamp = tmp_path / 'stamp'
    builder.tree = tmp_path / 'src' / builder.release
    builder.step('mmcv', lambda: None)
    builder.installed = []
    monkeypatch.setattr(builder, 'install', lambda *a: builder.installed.append(a))
    return builder


def build(builder, monkeypatch, **steps) -> None:
    """Build with these steps replaced, and most of the others left out."""
    names = ('make_venv', 'add_torch', 'add_mmdist', 'check')
    for name, step in {**dict.fromkeys(names, lambda: None), **steps}.items():
        monkeypatch.setattr(builder, name, step)
    builder.waiting = dict(make_env.SECONDS)
    builder.build()


def test_mmcv_is_compiled_while_the_libraries_are_installed(builder, monkeypatch):
    order = []
    names = ('add_torch', 'begin_mmcv', 'add_libraries', 'add_mmcv', 'check')
    steps = {name: lambda name=name: order.append(name) for name in names}
    build(builder, monkeypatch, **steps)
    assert order == list(names)
    assert builder.finished() is False  # the Python is not there
    builder.python.touch()
    assert builder.finished()
    builder.stamp.write_text('of other requirements')
    assert not builder.finished()


def test_the_estimate_follows_the_clock(builder, monkeypatch):
    time = 1000.0
    monkeypatch.setattr(make_env, 'monotonic', lambda: time)
    builder.waiting = {'torch': 60, 'libraries': 100, 'check': 20}
    builder.step('torch', lambda: None)
    assert builder.left() == 180
    time += 20
    assert builder.left() == 160
    time += 180  # it takes longer than expected, by an unknown time
    assert builder.left() == 20 + 100 + 20
    builder.step('libraries', lambda: None)
    time += 30
    assert builder.left() == 70 + 20


def test_what_mmcv_imports_is_there_before_it_and_the_libraries_do_without(builder):
    builder.add_torch()
    builder.add_libraries()
    before, libraries, opencv = builder.installed
    names = {str(arg).partition('==')[0] for arg in before}
    assert names >= {'torch', 'numpy', 'packaging', 'platformdirs'}
    assert '--no-deps' in libraries  # some of their releases would require mmcv
    lines = Path(libraries[-1]).read_text().splitlines()
    wanted = builder.requirements.read_text().splitlines()
    assert set(wanted) - set(lines) == {f'mmcv=={builder.pins["mmcv"]}'}
    assert opencv[-1].startswith('opencv-python-headless==')


def test_a_wheel_is_kept_for_its_torch_and_its_python(builder, monkeypatch):
    def torch(version):
        monkeypatch.setattr(make_env, 'output', lambda *_: version)

    torch('2.13.0+cpu')
    tag = 'cp{}{}'.format(*sys.version_info)
    wheel = builder.wheels() / f'{builder.release}-{tag}-{tag}-linux_x86_64.whl'
    wheel.parent.mkdir(parents=True)
    wheel.touch()
    (wheel.parent / f'{builder.release}-cp39-cp39-linux_x86_64.whl').touch()
    builder.begin_mmcv()
    builder.add_mmcv()
    assert builder.compiling is None and builder.installed[0][-1] == wheel
    torch('2.14.0+cpu')
    assert builder.cached_wheel() is None
    assert builder.cached_wheel('*') == wheel


def test_mmcv_that_fails_in_few_files_is_compiled_file_by_file(builder, monkeypatch):
    builder.tree.parent.mkdir()
    scripts = {
        True: 'echo broken; exit 1',
        False: f'echo whole > {builder.tree}-cp311.whl',
    }
    printed = []
    monkeypatch.setattr(builder.progress, 'say', printed.append)
    monkeypatch.setattr(
        builder,
        'compile',
        lambda units: builder.start('log', ['sh', '-c', scripts[units]]),
    )
    builder.compiling = builder.compile(units=True)
    builder.add_mmcv()
    (wheel,) = builder.wheels().iterdir()
    assert wheel.name == f'{builder.release}-cp311.whl'
    assert wheel.read_text() == 'whole\n'
    assert builder.installed[-1][-1] == wheel
    assert 'file by file' in printed[0]


def test_a_failure_stops_the_compilation_and_what_it_runs(builder, monkeypatch):
    mark, log = builder.venv / 'mark', builder.venv / 'log'
    script = f'(sleep 0.7; touch {mark}) & echo started; wait'

    def begin():
        command = ['sh', '-c', script]
        builder.compiling = builder.start('log', command, start_new_session=True)

    def fail():
        while 'started\n' not in log.read_text().splitlines(keepends=True):
            time.sleep(0.01)
        raise make_env.Stop('no network')

    with pytest.raises(make_env.Stop, match='no network'):
        build(builder, monkeypatch, begin_mmcv=begin, add_libraries=fail)
    assert builder.compiling.wait(10) == -signal.SIGTERM
    time.sleep(1)
    assert not mark.exists()


def test_the_end_of_the_log_of_what_failed_is_shown(builder):
    builder.run(sys.executable, '-c', 'print("of an earlier command: error: x")')
    code = (
        'print("a.h:5:2: error: C++20")\nprint("b.h:6:1: error: more")\n'
        'for i in range(100): print("line", i)\nraise SystemExit("no compiler")'
    )
    with pytest.raises(make_env.Stop) as stop:
        builder.run(sys.executable, '-c', code)
    assert 'line 99\nno compiler\nThis failed: ' in str(stop.value)
    assert ':\na.h:5:2: error: C++20\n...\nline 7' in str(stop.value)
    assert 'line 50' not in str(stop.value)
    assert 'line 50' in (builder.venv / 'make_env.log').read_text()


# --- mmcv_units


def test_mmcv_is_compiled_with_optimization(monkeypatch):
    # without it, RoIAlign and NMS take up to twice as long
    monkeypatch.setenv('CFLAGS', '-funroll-loops')
    code = (
        'from setuptools._distutils import ccompiler, sysconfig; '
        'compiler = ccompiler.new_compiler(); sysconfig.customize_compiler(compiler); '
        'print(*compiler.compiler_so)'  # torch's BuildExtension uses it for C++ too
    )
    environ = {**os.environ, **mmcv_units.environment(units=True, cuda=False)}
    command = [sys.executable, '-c', code]
    flags = subprocess.check_output(command, env=environ, text=True).split()
    assert {'-O2', '-O3'} & set(flags)
    assert '-funroll-loops' in flags
    assert [flag for flag in flags if flag.startswith('-g')][-1] == '-g0'


def test_setup_compiles_units_by_the_standard_of_torch(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, 'path', [*sys.path])  # which setup.py extends
    monkeypatch.setenv('MMDIST_UNITS', '0')
    setup = tmp_path / 'setup.py'
    setup.write_text(
        "op_files, cuda = ['a.cpp'], '-O2'\n"
        "args = {'cxx': ['-std=c++14'], 'nvcc': [cuda, '-std=c++14']}\n"
        "args['cxx'] = ['-Wall', '-std=c++17']\n"
        'extension = dict(sources=op_files, args=args)\n'
    )
    mmcv_units.fix_setup(setup)
    space = {}
    exec(setup.read_text(), space)
    assert space['extension']['args'] == {'cxx': ['-Wall'], 'nvcc': ['-O2']}
    assert space['extension']['sources'] == ['a.cpp']


def test_sources_are_included_by_few_units(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(mmcv_units, 'jobs', lambda: 2)
    cpp = [f'{i}.cpp' for i in range(9)] + [*mmcv_units.APART, mmcv_units.LAST]
    cuda = [f'{i}.cu' for i in range(7)]
    sources = [*cpp, *cuda, *mmcv_units.CUDA_ALONE]
    for i, name in enumerate(sources):
        Path(name).write_text(i * 'x')
    written = mmcv_units.as_units(sources)
    units = {x: Path(x).read_text() for x in written if x.startswith('units')}
    assert set(written) - set(units) == {*mmcv_units.CUDA_ALONE}
    lines = ''.join(units.values()).splitlines()
    assert sorted(lines) == sorted(f'#include "{tmp_path / x}"' for x in cpp + cuda)
    of_cpp = [text for x, text in units.items() if x.endswith('.cpp')]
    assert len(of_cpp) == 4 and len(units) == 6
    assert all(sum(f'/{x}"' in text for x in mmcv_units.APART) == 1 for text in of_cpp)
    (last,) = (text for text in of_cpp if mmcv_units.LAST in text)
    assert last.endswith(f'{mmcv_units.LAST}"\n')
    monkeypatch.setenv('MMDIST_UNITS', '0')
    assert mmcv_units.as_units(sources) == sources
