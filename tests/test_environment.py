"""tools/check_env.py in fake environments, and the pins of the requirements."""

from __future__ import annotations

import re
import subprocess
import sys
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# The parts of torch and mmcv that check_env uses.
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
    'mmcv/ops/__init__.py': FAKE_OPS,
    **dict.fromkeys(('cv2.py', 'ftfy.py', 'regex.py', 'mmdet/apis.py'), ''),
    **dict.fromkeys(
        (
            f'{package}/__init__.py'
            for package in ('mmcv', 'mmdet', 'mmseg', 'mmengine', 'mmengine/config')
        ),
        '',
    ),
    'mmseg/apis.py': 'import ftfy, regex',
    'mmengine/config/utils.py': 'MODULE2PACKAGE = {"mmdist": "mmdist.version"}',
}
FORK = {
    **{name: None for name in ('mmengine', 'mmcv', 'mmdet', 'mmsegmentation')},
    'onedl-mmengine': '0.10.12',
    'onedl-mmcv': '2.3.6',
    'onedl-mmdetection': '3.5.1',
    'onedl-mmsegmentation': '1.4.2',
}


def run(*command) -> subprocess.CompletedProcess:
    return subprocess.run(list(map(str, command)), capture_output=True, text=True)


@pytest.fixture
def check_env(tmp_path):
    """Run check_env.py where only the given distributions and modules exist."""

    def check(distributions, modules) -> tuple[int, dict[str, str]]:
        venv.create(tmp_path / 'env', symlinks=True)
        site = next((tmp_path / 'env/lib').glob('python*/site-packages'))
        # None: not installed
        present = {k: v for k, v in distributions.items() if v is not None}
        for name, version in present.items():
            info = site / f'{name.replace("-", "_")}-{version}.dist-info'
            info.mkdir()
            (info / 'METADATA').write_text(f'Name: {name}\nVersion: {version}\n')
        present = {k: v for k, v in modules.items() if v is not None}
        for path, text in present.items():
            (site / path).parent.mkdir(parents=True, exist_ok=True)
            (site / path).write_text(text)
        done = run(tmp_path / 'env/bin/python', ROOT / 'tools/check_env.py')
        assert not done.stderr, done.stderr
        lines = done.stdout.splitlines()
        wrong = {line.split()[0]: line for line in lines if '-> run: ' in line}
        return done.returncode, wrong

    return check


@pytest.mark.parametrize('stack', [{}, FORK], ids=['upstream', 'onedl'])
def test_a_good_environment_has_nothing_to_fix(check_env, stack):
    assert check_env({**DISTRIBUTIONS, **stack}, MODULES) == (0, {})


@pytest.mark.slow
def test_the_environment_of_these_tests_is_good():
    done = run(sys.executable, ROOT / 'tools/check_env.py')
    assert done.returncode == 0, done.stdout
    assert 'nms runs' in done.stdout


PIP = 'python -m pip install'
FORCE = '--no-cache-dir --force-reinstall --no-deps mmcv==2.1.0'


CPU_OPS = f'MMCV_WITH_OPS=1 {PIP} --no-build-isolation {FORCE}'
FAULTS = {
    'what does not depend on one another': (
        {'setuptools': '81.0.0', 'ftfy': None},
        {
            'mmcv/ops/__init__.py': 'import mmcv._ext',
            'cv2.py': 'raise ImportError("libGL.so.1: cannot open shared object file")',
            'mmengine/config/utils.py': 'MODULE2PACKAGE = {}',
            'ftfy.py': None,
        },
        {
            'mmcv.ops': ('built without ops', CPU_OPS),
            'setuptools': ('81.0.0', f'{PIP} "setuptools<81"'),
            'opencv': ('libGL.so.1', '--no-deps opencv-python-headless'),
            'ftfy': ('', f'{PIP} ftfy'),
            'mmsegmentation': ('ftfy', ''),
            'mmdist': ('does not know mmdist::', f'{PIP} --no-deps .'),
        },
    ),
    'two stacks in one': (
        {'onedl-mmcv': '2.3.6'},
        {},
        {'one': ('both of: mmcv onedl-mmcv', 'uninstall -y mmcv onedl-mmcv')},
    ),
    'another mmcv, for another torch': (
        {'mmcv': '2.2.0'},
        {'mmcv/ops/__init__.py': 'raise ImportError("_ext.so: undefined symbol")'},
        {
            'mmcv': ('2.2.0', 'mmcv==2.1.0'),
            'mmcv.ops': ('built for another torch', FORCE),
        },
    ),
    'mmcv-lite': (
        {'mmcv': None, 'mmcv-lite': '2.1.0'},
        {},
        {'mmcv': ('has no ops', 'pip uninstall -y mmcv-lite')},
    ),
}


@pytest.mark.parametrize('name', FAULTS)
def test_each_fault_is_named_with_its_fix(check_env, name):
    distributions, modules, expected = FAULTS[name]
    code, wrong = check_env({**DISTRIBUTIONS, **distributions}, {**MODULES, **modules})
    assert code == 1
    for name, (fault, fix) in expected.items():
        found, command = wrong[name].split('-> run: ')
        assert fault in found
        assert fix in command


def test_gpu_without_cuda_ops(check_env):
    """torch sees a GPU, but mmcv is built for the CPU; the fork can be built there."""
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
