"""tools/check_env.py and tools/make_env.py, run in faked-up environments."""

from __future__ import annotations

import importlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import venv
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).resolve().parent.parent

# A torch and an mmcv that answer what check_env asks of them.
FAKE_TORCH = """
class cuda:
    is_available = staticmethod(lambda: False)
def tensor(data, device):
    return data
"""
FAKE_OPS = """
class Keep:
    tolist = staticmethod(lambda: [1])
def nms(boxes, scores, iou_threshold):
    return None, Keep
"""
DISTRIBUTIONS = {
    'torch': '2.13.0+cpu',
    'setuptools': '80.10.2',
    'mmengine': '0.10.7',
    'mmcv': '2.1.0',
    'opencv-python-headless': '4.14.0.94',
    'ftfy': '6.3.1',
    'regex': '2026.11.19',
    'mmdet': '3.3.0',
    'mmsegmentation': '1.2.2',
    'scikit-learn': '1.9.1',
    'mmdist': '0.1.0',
}
MODULES = {
    'torch/__init__.py': FAKE_TORCH,
    'mmcv/__init__.py': '',
    'mmcv/ops/__init__.py': FAKE_OPS,
    'cv2.py': '',
    'ftfy.py': '',
    'regex.py': '',
    'mmdet/__init__.py': '',
    'mmdet/apis.py': '',
    'mmseg/__init__.py': '',
    'mmseg/apis.py': 'import ftfy, regex',
    'mmengine/__init__.py': '',
    'mmengine/config/__init__.py': '',
    'mmengine/config/utils.py': 'MODULE2PACKAGE = {"mmdist": "mmdist.version"}',
}
FORK = {
    'mmengine': 'onedl-mmengine',
    'mmcv': 'onedl-mmcv',
    'mmdet': 'onedl-mmdetection',
    'mmsegmentation': 'onedl-mmsegmentation',
}
FORK_VERSIONS = {
    'onedl-mmengine': '0.10.12',
    'onedl-mmcv': '2.3.6',
    'onedl-mmdetection': '3.5.1',
    'onedl-mmsegmentation': '1.4.2',
}


def run(*command, **environ) -> subprocess.CompletedProcess:
    return subprocess.run(
        [str(part) for part in command],
        env={**os.environ, **environ},
        capture_output=True,
        text=True,
    )


@pytest.fixture
def check_env(tmp_path):
    """Run check_env.py where only the given distributions and modules exist."""

    def check(distributions, modules) -> tuple[int, dict[str, str]]:
        venv.create(tmp_path / 'env', symlinks=True)
        site = next((tmp_path / 'env/lib').glob('python*/site-packages'))
        for name, version in distributions.items():
            info = site / f'{name.replace("-", "_")}-{version}.dist-info'
            info.mkdir()
            (info / 'METADATA').write_text(f'Name: {name}\nVersion: {version}\n')
        for path, text in modules.items():
            (site / path).parent.mkdir(parents=True, exist_ok=True)
            (site / path).write_text(text)
        done = run(tmp_path / 'env/bin/python', ROOT / 'tools/check_env.py')
        assert not done.stderr, done.stderr
        lines = done.stdout.splitlines()
        wrong = {line.split()[0]: line for line in lines if '-> run: ' in line}
        return done.returncode, wrong

    return check


def test_a_good_environment_has_nothing_to_fix(check_env):
    assert check_env(DISTRIBUTIONS, MODULES) == (0, {})


def test_a_good_environment_of_the_fork(check_env):
    distributions = {k: v for k, v in DISTRIBUTIONS.items() if k not in FORK}
    assert check_env({**distributions, **FORK_VERSIONS}, MODULES) == (0, {})


@pytest.mark.slow
def test_the_environment_of_these_tests_is_good():
    done = run(sys.executable, ROOT / 'tools/check_env.py')
    assert done.returncode == 0, done.stdout
    assert 'nms runs' in done.stdout


@pytest.mark.parametrize(
    'distributions, modules, name, said, fix',
    [
        pytest.param(
            {},
            {'mmcv/ops/__init__.py': 'import mmcv._ext'},
            'mmcv.ops',
            'built without ops',
            'MMCV_WITH_OPS=1 python -m pip install --no-build-isolation '
            '--no-cache-dir --force-reinstall --no-deps mmcv==2.1.0',
            id='mmcv without ops',
        ),
        pytest.param(
            {},
            {
                'mmcv/ops/__init__.py': 'raise ImportError("_ext.so: undefined symbol: '
                '_ZN3c106detail14torchCheckFail")'
            },
            'mmcv.ops',
            'built for another torch',
            '--no-cache-dir --force-reinstall --no-deps mmcv==2.1.0',
            id='mmcv of another torch',
        ),
        pytest.param(
            {'mmcv': '2.2.0'},
            {},
            'mmcv',
            '2.2.0',
            'mmcv==2.1.0',
            id='mmcv 2.2 under mmdet 3.3',
        ),
        pytest.param(
            {'mmcv': None, 'mmcv-lite': '2.1.0'},
            {},
            'mmcv',
            'has no ops',
            'pip uninstall -y mmcv-lite',
            id='mmcv-lite',
        ),
        pytest.param(
            {'setuptools': '81.0.0'},
            {},
            'setuptools',
            '81.0.0',
            'python -m pip install "setuptools<81"',
            id='setuptools 81',
        ),
        pytest.param(
            {},
            {'cv2.py': 'raise ImportError("libGL.so.1: cannot open shared object")'},
            'opencv',
            'libGL.so.1',
            '--force-reinstall --no-deps opencv-python-headless',
            id='opencv without libGL',
        ),
        pytest.param(
            {'onedl-mmcv': '2.3.6'},
            {},
            'one',
            'both of: mmcv onedl-mmcv',
            'pip uninstall -y mmcv onedl-mmcv',
            id='two stacks in one',
        ),
        pytest.param(
            {},
            {'mmengine/config/utils.py': 'MODULE2PACKAGE = {}'},
            'mmdist',
            'does not know mmdist::',
            'python -m pip install --no-deps .',
            id='mmdist without its hook',
        ),
    ],
)
def test_one_thing_wrong(check_env, distributions, modules, name, said, fix):
    changed = {**DISTRIBUTIONS, **distributions}
    changed = {k: v for k, v in changed.items() if v is not None}
    code, wrong = check_env(changed, {**MODULES, **modules})
    assert code == 1
    assert said in wrong[name]
    assert fix in wrong[name].split('-> run: ')[1]


def test_missing_ftfy_is_named_for_itself_and_for_mmseg(check_env):
    distributions = {k: v for k, v in DISTRIBUTIONS.items() if k != 'ftfy'}
    modules = {k: v for k, v in MODULES.items() if k != 'ftfy.py'}
    code, wrong = check_env(distributions, modules)
    assert code == 1
    assert wrong['ftfy'].endswith('-> run: python -m pip install ftfy')
    assert set(wrong) == {'ftfy', 'mmsegmentation'}


def test_gpu_without_cuda_ops(check_env):
    """torch sees a GPU, mmcv was built for the CPU: the fork can be built there."""
    torch = FAKE_TORCH.replace('False', 'True')
    ops = FAKE_OPS.replace(
        '    return None, Keep',
        '    if boxes[0][0] == 0 and nms.calls:\n'
        '        raise RuntimeError("nms_impl: implementation for device cuda:0 not")\n'
        '    nms.calls += 1\n    return None, Keep\nnms.calls = 0',
    )
    modules = {**MODULES, 'torch/__init__.py': torch, 'mmcv/ops/__init__.py': ops}
    code, wrong = check_env(DISTRIBUTIONS, modules)
    assert code == 1
    assert 'CPU only' in wrong['mmcv.ops']
    assert 'make env STACK=onedl' in wrong['mmcv.ops']


def test_an_empty_environment_gets_the_pins_of_requirements(check_env):
    code, wrong = check_env({}, {})
    assert code == 1
    named = set(re.findall(r'([\w-]+)==([\d.]+)', '\n'.join(wrong.values())))
    assert named <= set(pins('requirements.txt').items())
    assert {'torch', 'mmengine', 'mmcv', 'mmdet'} <= {name for name, _ in named}


def pins(name: str) -> dict[str, str]:
    lines = (ROOT / name).read_text().splitlines()
    lines = [re.split('[#;]', line)[0].strip() for line in lines]
    return dict(line.split('==') for line in lines if line)  # all pinned exactly


@pytest.mark.parametrize('name', ['requirements.txt', 'requirements-onedl.txt'])
def test_pins(name):
    pinned = pins(name)
    assert pinned['opencv-python'] == pinned['opencv-python-headless']
    assert int(pinned['setuptools'].split('.')[0]) < 81
    # the fork has the same import names: of two, one overwrites the other
    names = ['mmengine', 'mmcv', 'mmdet', 'mmsegmentation']
    if 'onedl' in name:
        fork = ['mmdetection' if x == 'mmdet' else x for x in names]
        assert {f'onedl-{x}' for x in fork} <= pinned.keys()
        assert not pinned.keys() & set(names)
    else:
        assert set(names) <= pinned.keys()
        assert not any(x.startswith('onedl') for x in pinned)


@pytest.fixture
def gpu_machine(tmp_path):
    """A checkout's tools, and a PATH with an nvidia-smi that lists a GPU."""
    smi = tmp_path / 'bin/nvidia-smi'
    smi.parent.mkdir()
    smi.write_text('#!/bin/sh\necho "GPU 0: NVIDIA A100 (UUID: GPU-0)"\n')
    smi.chmod(0o755)
    checkout = tmp_path / 'checkout'
    checkout.mkdir()
    for name in ('requirements.txt', 'requirements-onedl.txt', 'pyproject.toml'):
        shutil.copy(ROOT / name, checkout)
    shutil.copytree(ROOT / 'tools', checkout / 'tools')

    def make_env(*arguments, **environ):
        environ = {'PATH': f'{smi.parent}:/usr/bin:/bin', **environ}
        environ = {'CUDA_HOME': '', 'CUDA_VISIBLE_DEVICES': '0', **environ}
        script = checkout / 'tools/make_env.py'
        done = run(sys.executable, script, *arguments, **environ)
        assert not list(checkout.glob('.venv*')), 'something was built'
        return done

    return make_env


def test_default_stack(gpu_machine, tmp_path):
    assert gpu_machine('--which').stdout == 'onedl\n'
    hidden = gpu_machine('--which', CUDA_VISIBLE_DEVICES='')
    assert hidden.stdout == 'upstream\n'
    bare = gpu_machine('--which', PATH='/nowhere')
    assert bare.stdout == 'upstream\n'
    forced = gpu_machine('--which', PATH='/nowhere', FORCE_CUDA='1')
    assert forced.stdout == 'onedl\n'


def test_upstream_on_a_gpu_stops_before_anything_is_built(gpu_machine):
    done = gpu_machine('--stack', 'upstream')
    assert done.returncode == 1
    assert 'does not compile for CUDA' in done.stderr
    assert 'CUDA_VISIBLE_DEVICES= make env STACK=upstream' in done.stderr


def test_gpu_without_a_cuda_compiler(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(ROOT / 'tools')
    make_env = importlib.import_module('make_env')
    monkeypatch.setattr(make_env, 'find_nvcc', lambda: None)
    (problem,) = make_env.preflight('onedl', True, True, tmp_path)
    assert 'no CUDA compiler (nvcc)' in problem
    assert 'CUDA_VISIBLE_DEVICES= make env' in problem
    assert make_env.preflight('onedl', False, True, tmp_path) == []


def test_upstream_is_not_built_with_python_313(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(ROOT / 'tools')
    make_env = importlib.import_module('make_env')
    newer = SimpleNamespace(version_info=(3, 13, 0), version='3.13.0 (main)')
    monkeypatch.setattr(make_env, 'sys', newer)
    monkeypatch.setattr(make_env, 'find_spec', lambda name: True)
    (problem,) = make_env.preflight('upstream', False, True, tmp_path)
    assert 'mmcv 2.1.0 cannot be built with Python 3.13' in problem
    assert make_env.preflight('onedl', False, True, tmp_path) == []
    assert make_env.preflight('upstream', False, False, tmp_path) == []


def test_mmcv_is_compiled_with_optimization(monkeypatch):
    # without it RoIAlign and NMS take up to twice as long
    monkeypatch.syspath_prepend(ROOT / 'tools')
    make_env = importlib.import_module('make_env')
    monkeypatch.setenv('CFLAGS', '-funroll-loops')
    code = (
        'from setuptools._distutils import ccompiler, sysconfig; '
        'compiler = ccompiler.new_compiler(); sysconfig.customize_compiler(compiler); '
        'print(*compiler.compiler_so)'  # of C++ too, by torch's BuildExtension
    )
    done = run(sys.executable, '-c', code, CFLAGS=make_env.compiler_flags())
    flags = done.stdout.split()
    assert {'-O2', '-O3'} & set(flags), done.stderr
    assert '-funroll-loops' in flags
    assert [flag for flag in flags if flag.startswith('-g')][-1] == '-g0'


def test_ops_of_another_build_are_compiled_again(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(ROOT / 'tools')
    make_env = importlib.import_module('make_env')
    builder = make_env.Builder('upstream', False)
    builder.mmcv_build = tmp_path / 'mmcv_build'
    monkeypatch.setattr(builder, 'version', lambda name: builder.pins[name])
    monkeypatch.setattr(make_env, 'ask', lambda *_: 'fine')
    assert not builder.has_ops()  # of a time when no build had a number
    builder.mmcv_build.write_text('1')
    assert not builder.has_ops()
    builder.mmcv_build.write_text(make_env.BUILD)
    assert builder.has_ops()


@pytest.fixture
def builder(monkeypatch, tmp_path):
    """What builds an environment; its folders are there, its pip does nothing."""
    monkeypatch.syspath_prepend(ROOT / 'tools')
    make_env = importlib.import_module('make_env')
    builder = make_env.Builder('upstream', False)
    builder.venv = tmp_path
    builder.log = tmp_path / 'log'
    builder.plan.begin('mmcv')
    builder.title = 'mmcv'
    builder.pip_calls = []
    monkeypatch.setattr(builder, 'pip', lambda *args: builder.pip_calls.append(args))
    monkeypatch.setattr(builder, 'wheels', lambda: tmp_path / 'wheels')
    return builder


def test_mmcv_is_compiled_while_the_libraries_are_installed(builder, monkeypatch):
    order = []
    for name in ('begin_mmcv', 'add_libraries', 'add_mmcv', 'end_mmcv'):
        monkeypatch.setattr(builder, name, lambda name=name: order.append(name))
    for name in ('make_venv', 'add_torch', 'add_mmengine', 'add_mmdist', 'check'):
        monkeypatch.setattr(builder, name, lambda: None)
    builder.plan = type(builder.plan)({**builder.plan.waiting, 'mmcv': 10})
    builder.build()
    assert order == ['begin_mmcv', 'add_libraries', 'add_mmcv', 'end_mmcv']
    assert not builder.plan.waiting


def test_the_libraries_are_installed_without_mmcv(builder):
    builder.add_libraries()
    (call,) = builder.pip_calls
    assert '--no-deps' in call  # or they ask for mmcv, if a release of theirs does
    lines = Path(call[-1]).read_text().splitlines()
    wanted = builder.requirements.read_text().splitlines()
    assert set(wanted) - set(lines) == {f'mmcv=={builder.pins["mmcv"]}'}


def test_mmcv_that_fails_in_few_files_is_compiled_file_by_file(builder, monkeypatch):
    builder.tree.parent.mkdir()
    scripts = {
        '1': 'echo broken; exit 1',
        '0': f'echo whole > {builder.tree}-cp311.whl',
    }
    tried, said = [], []
    monkeypatch.setattr(builder.progress, 'say', said.append)

    def compile(units):
        tried.append(units)
        return builder.start('sh', '-c', scripts[units], group=True)

    monkeypatch.setattr(builder, 'compile', compile)
    builder.compiling = builder.compile('1')
    wheel = builder.compiled_wheel()
    assert tried == ['1', '0']
    assert wheel == builder.wheels() / f'{builder.tree.name}-cp311.whl'
    assert wheel.read_text() == 'whole\n'
    assert 'file by file' in said[0]


def test_a_failure_stops_the_compilation_and_what_it_runs(builder, monkeypatch):
    make_env = importlib.import_module('make_env')
    mark = builder.venv / 'mark'
    script = f'(sleep 1.5; touch {mark}) & echo started; wait'

    def begin():
        builder.compiling = builder.start('sh', '-c', script, group=True)

    def fail():
        while 'started\n' not in builder.log.read_text().splitlines(keepends=True):
            time.sleep(0.01)
        raise make_env.Stop('no network')

    monkeypatch.setattr(builder, 'begin_mmcv', begin)
    monkeypatch.setattr(builder, 'add_mmengine', fail)
    for name in ('make_venv', 'add_torch'):
        monkeypatch.setattr(builder, name, lambda: None)
    builder.plan = type(builder.plan)({**builder.plan.waiting, 'mmcv': 10})
    with pytest.raises(make_env.Stop, match='no network'):
        builder.build()
    assert builder.compiling.process.wait(10) == -signal.SIGTERM
    time.sleep(2)
    assert not mark.exists()


def test_mmcv_is_compiled_by_the_standard_that_torch_asks_for(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(ROOT / 'tools')
    make_env = importlib.import_module('make_env')
    setup = tmp_path / 'setup.py'
    setup.write_text(
        "op_files, cuda = ['a.cpp'], '-O2'\n"
        "args = {'cxx': ['-std=c++14'], 'nvcc': [cuda, '-std=c++14']}\n"
        "args['cxx'] = ['-Wall', '-std=c++17']\n"
        'extension = dict(sources=op_files, args=args)\n'
    )
    make_env.fix_setup(setup)
    space = {}
    exec(setup.read_text(), space)
    assert space['extension']['args'] == {'cxx': ['-Wall'], 'nvcc': ['-O2']}
    assert space['extension']['sources'] == ['a.cpp']
