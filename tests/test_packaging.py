"""After `pip install .`, `mmdist::` paths and `mmdist.` types work anywhere."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest
import yaml
from builders import slow

from mmdist.version import __version__

ROOT = Path(__file__).resolve().parent.parent
PIP = (sys.executable, '-m', 'pip', '--disable-pip-version-check')
# No network: the build backend is taken from the environment of the tests.
OFFLINE = ('--no-build-isolation', '--no-deps', '--no-index')

# What a training script of mmdet or mmseg does, from a directory of its own.
READ_CONFIG = """
import sys
from mmengine.config import Config
assert 'mmdist' not in sys.modules
config = Config.fromfile('config.py')
assert config.found == 'by mmdist::', config
from mmengine.registry import DefaultScope, MODELS
import mmdet.registry, mmseg.registry
for scope in ('mmdet', 'mmseg'):
    with DefaultScope.overwrite_default_scope(scope):
        assert MODELS.get('mmdist.DISTLoss').__name__ == 'DISTLoss', scope
for known in ('mmdet::_base_/default_runtime.py', 'mmseg::_base_/default_runtime.py'):
    assert Config._get_cfg_path(known, '')[0].endswith('default_runtime.py')
"""

# Builds pairs that the package ships, which needs no weights.
BUILD_DISTILLERS = """
from mmengine.config import Config
from mmengine.registry import DefaultScope, MODELS
import mmdet.registry, mmseg.registry
for path, scope, student in (
    ('det/quickstart/dist_retinanet_w32-w16_digits.py', 'mmdet', 'RetinaNet'),
    ('seg/quickstart/dist_deeplabv3_w32-w8_digits.py', 'mmseg', 'EncoderDecoder'),
):
    config = Config.fromstring(f'_base_ = "mmdist::{path}"', '.py')
    with DefaultScope.overwrite_default_scope(scope):
        model = MODELS.build(config.model)
    assert type(model).__mro__[2].__name__ == student, type(model).__mro__
    assert list(model.distill) == ['dist']
"""


def run(*command, cwd) -> str:
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope='module')
def checkout(tmp_path_factory) -> Path:
    """A copy of what goes into the package, with a config that only the copy has."""
    copy = tmp_path_factory.mktemp('package') / 'checkout'
    copy.mkdir()
    for path in ROOT.iterdir():
        if path.name in ('mmdist', 'configs', 'tools', 'tests'):
            ignore = shutil.ignore_patterns('__pycache__')
            shutil.copytree(path, copy / path.name, symlinks=True, ignore=ignore)
        elif path.is_file() and path.name != '.git':
            shutil.copy(path, copy)
    config = copy / 'configs/det/only_here.py'
    config.parent.mkdir(parents=True, exist_ok=True)
    config.write_text("found = 'by mmdist::'\n")
    return copy


@pytest.fixture(scope='module')
def wheel(checkout) -> Path:
    run(*PIP, 'wheel', *OFFLINE, '-w', 'dist', '.', cwd=checkout)
    return checkout / 'dist' / f'mmdist-{__version__}-py3-none-any.whl'


def environment(directory: Path, *requirement) -> Path:
    """A bare environment in which the tests' pip has installed one thing."""
    venv.create(directory, symlinks=True)
    python = directory / 'bin/python'
    run(*PIP, '--python', python, 'install', *OFFLINE, *requirement, cwd=directory)
    return python


def site_of(python: Path) -> Path:
    return next(python.parents[1].glob('lib/python*/site-packages'))


def package_of(python: Path, code: str, directory: Path) -> Path:
    """Run code beside the libraries, in an empty directory; its mmdist's folder."""
    (site_of(python) / 'libraries.pth').write_text(sysconfig.get_paths()['purelib'])
    (directory / 'config.py').write_text("_base_ = 'mmdist::det/only_here.py'\n")
    code += 'import mmdist\nprint(mmdist.__file__)'
    printed = run(python, '-W', 'ignore', '-c', code, cwd=directory)
    return Path(printed.splitlines()[-1]).parent


def files(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


@pytest.mark.parametrize('code', [READ_CONFIG, *slow([BUILD_DISTILLERS])])
def test_installed(wheel, tmp_path, code):
    python = environment(tmp_path / 'env', wheel)
    assert package_of(python, code, tmp_path) == site_of(python) / 'mmdist'


@pytest.mark.slow
def test_installed_editable(checkout, tmp_path):
    # What `pip install -e` has the backend build; a bare environment has no backend.
    build = 'from hatchling.build import build_editable as b; print(b("dist/e"))'
    name = run(sys.executable, '-c', build, cwd=checkout).split()[-1]
    python = environment(tmp_path / 'env', checkout / 'dist/e' / name)
    assert package_of(python, READ_CONFIG, tmp_path) == checkout / 'mmdist'
    assert not (site_of(python) / 'mmdist').exists()  # it is in the checkout only


def test_wheel_holds_files_for_the_links(wheel, checkout):
    packed = files(wheel)
    mim = checkout / 'mmdist/.mim'
    for path in [*(mim / 'configs').rglob('*'), *(mim / 'tools').rglob('*')]:
        if path.is_file():
            name = str(path.relative_to(checkout))
            assert packed.pop(name) == path.read_bytes(), name
    assert packed['mmdist/.mim/model-index.yml']
    assert not [name for name in packed if '.mim' in name and '.yml' not in name]


def test_wheel_from_sdist_is_the_same(checkout, wheel, tmp_path):
    run(sys.executable, '-m', 'hatchling', 'build', '-t', 'sdist', cwd=checkout)
    shutil.unpack_archive(checkout / f'dist/mmdist-{__version__}.tar.gz', tmp_path)
    source = tmp_path / f'mmdist-{__version__}'
    run(*PIP, 'wheel', *OFFLINE, '-w', tmp_path, source, cwd=tmp_path)
    assert files(tmp_path / wheel.name) == files(wheel)


def test_dependencies_do_not_name_what_pip_would_get_wrong(wheel):
    """pip would build mmcv without ops, and install upstream over the onedl fork."""
    (metadata,) = (v for k, v in files(wheel).items() if k.endswith('/METADATA'))
    required = [
        line.split()[1]
        for line in metadata.decode().splitlines()
        if line.startswith('Requires-Dist:') and 'extra ==' not in line
    ]
    assert 'ftfy' in required
    assert not [name for name in required if name.startswith(('torch', 'mm', 'opencv'))]


def test_the_version_is_the_same_everywhere():
    citation = yaml.safe_load((ROOT / 'CITATION.cff').read_text())
    assert citation['version'] == __version__
    newest = re.search(r'^## (\S+)', (ROOT / 'CHANGELOG.md').read_text(), re.M)
    assert newest[1] == __version__


def test_interpreter_starts_silently_without_the_libraries(wheel, tmp_path):
    """`mmdist.pth` runs when Python starts, so it must never print anything."""
    python = environment(tmp_path / 'env', wheel)

    def start(code: str) -> str:
        # -E: a filter in PYTHONWARNINGS, as `make` sets it, imports `re`
        done = subprocess.run(
            [python, '-E', '-c', code], capture_output=True, text=True, cwd=tmp_path
        )
        assert not done.stderr
        return done.stdout

    # Cheap, below 1 ms: it imports nothing but itself.
    loaded = start('import sys; print(*sorted(sys.modules))').split()
    assert '_mmdist_startup' in loaded
    assert not {
        'mmdist', 'mmengine', 'importlib.util', 'importlib.metadata', 'contextlib',
        'functools', 'collections', '__future__', 'pickle',
    } & {*loaded}  # fmt: skip
    (site_of(python) / '_mmdist_startup.py').unlink()
    assert start('print("fine")') == 'fine\n'


def test_fork_provides_mmseg_under_another_distribution(wheel, tmp_path):
    """Without mmdist, `mmseg::` fails there: mmengine's table has 'mmsegmentation'."""
    python = environment(tmp_path / 'env', wheel)
    site = site_of(python)
    for path, text in {
        'mmengine/__init__.py': '',
        'mmengine/config/__init__.py': '',
        'mmengine/config/utils.py': 'MODULE2PACKAGE = dict(mmdet="mmdet", '
        'mmseg="mmsegmentation", mmpretrain="mmpretrain", mmaction="mmaction2")',
        'mmdet/__init__.py': '',
        'mmseg/__init__.py': 'raise AssertionError("looking must not import it")',
        'mmaction/__init__.py': '',
        'onedl_mmsegmentation-1.4.2.dist-info/METADATA': 'Name: onedl-mmsegmentation\n'
        'Version: 1.4.2\n',
        'mmaction2-1.2.0.dist-info/METADATA': 'Name: mmaction2\nVersion: 1.2.0\n',
    }.items():
        (site / path).parent.mkdir(exist_ok=True)
        (site / path).write_text(text)
    code = 'from mmengine.config.utils import MODULE2PACKAGE as t; print(t)'
    assert eval(run(python, '-c', code, cwd=tmp_path)) == {
        'mmdet': 'mmdet',
        'mmseg': 'mmseg.version',
        'mmpretrain': 'mmpretrain',
        'mmaction': 'mmaction2',
        'mmdist': 'mmdist.version',
    }
