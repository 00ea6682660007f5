"""The GPU check and its bundle, as far as they run without a GPU."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sysconfig
import tarfile
import venv
from pathlib import Path

import pytest
import torch

from benchmarks import gpu_step, step
from tools.dev import gpu_bundle, gpu_check
from tools.dev.gpu_check import Part

ROOT = Path(__file__).resolve().parents[3]
without_gpu = pytest.mark.skipif(
    torch.cuda.is_available(), reason='about a machine without a GPU'
)


def statuses(out: Path) -> dict[str, str]:
    page = (out / 'gpu_check.md').read_text()
    return dict(re.findall(r'^(.+): \*\*(.+)\*\*(?:, \d+ s)?$', page, re.M))


def test_names_of_stages():
    assert gpu_check.stage_numbers('1-3, 6,2') == [1, 2, 3, 6]
    with pytest.raises(gpu_check.argparse.ArgumentTypeError, match='1 to 6'):
        gpu_check.stage_numbers('8')


def test_every_command_is_there(tmp_path):
    options = ['--data-root', str(tmp_path), '--weights', str(tmp_path)]
    parts = gpu_check.parts_of(gpu_check.parse_args(options))
    assert {part.stage for part in parts} == set(gpu_check.TITLES)
    for part in parts:
        module, *arguments = part.command[1:]
        path = ROOT / module.replace('.', '/')
        ours = (path / '__main__.py').exists() or path.with_suffix('.py').exists()
        assert ours or module in ('pytest', 'torch.utils.collect_env')
        assert all(Path(x).exists() for x in arguments if '/tests/' in x)
    steps = [part.name for part in parts if part.stage == 4]
    found = [[x for x in step.PAIRS if x.startswith(name)] for name in steps[:7]]
    assert sorted(x for (x,) in found) == sorted(step.PAIRS)
    assert steps[7:] == [f'{name}, compiled' for name in steps[:7]]


TABLE = "print('| a | b |\\n| --- | --- |\\n| 1 | 2, **missed** |')"


def test_a_part_that_dies_or_takes_too_long_takes_nothing_with_it(
    tmp_path, monkeypatch
):
    def part(name, code, limit=20, needs=()):
        return Part(4, name, limit, ['-c', code], needs)

    child = 'import subprocess; subprocess.run(["sleep", "{}"])'
    parts = [
        part('hangs', child.format(31.4159), limit=0.5),
        part('dies', 'print("begun", flush=True); import os; os.abort()'),
        part('misses', TABLE),
        part('passes', 'print("well done")'),
        part('needs', 'print("not run")', needs=('nothing',)),
    ]
    monkeypatch.setattr(gpu_check, 'parts_of', lambda args: parts)
    monkeypatch.setitem(gpu_check.NEEDS, 'nothing', 'raise ValueError("no such card")')
    monkeypatch.setattr(gpu_check.signal, 'signal', lambda *_: None)
    monkeypatch.setattr(gpu_check.tempfile, 'tempdir', str(tmp_path / 'work'))
    (tmp_path / 'work').mkdir()
    earlier = Part(3, 'loss', 1, [])
    gpu_check.report(tmp_path, earlier, 'passed', output='seen before')
    gpu_check.report(tmp_path, parts[3], 'failed', output='replaced')
    assert gpu_check.main(['--stages', '4', '--out', str(tmp_path)]) == 1
    assert statuses(tmp_path) == {
        'loss': 'passed',
        'hangs': 'timed out',
        'dies': 'failed',
        'misses': 'goal missed',
        'passes': 'passed',
        'needs': 'skipped',
    }
    page = (tmp_path / 'gpu_check.md').read_text()
    for words in ('seen before', 'begun', 'well done', '| 1 | 2, **missed** |'):
        assert words in page
    assert 'ValueError: no such card' in page
    assert 'not run' not in page and 'replaced' not in page
    assert not list((tmp_path / 'work').iterdir())
    running = subprocess.run(['ps', 'ax', '-o', 'args'], capture_output=True, text=True)
    assert 'sleep 31.4159' not in running.stdout.splitlines()


@without_gpu
def test_without_a_gpu(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu_check.signal, 'signal', lambda *_: None)
    assert gpu_check.main(['--stages', '2-5', '--out', str(tmp_path)]) == 0
    assert set(statuses(tmp_path).values()) == {'skipped'}
    assert 'torch finds no GPU' in (tmp_path / 'gpu_check.md').read_text()
    assert gpu_check.main(['--minutes', '0', '--out', str(tmp_path)]) == 0
    assert 'the 0 minutes were over' in capsys.readouterr().out


@pytest.mark.slow
def test_a_step_is_measured_in_a_setting(monkeypatch, capsys):
    name = 'RetinaNet R50 <- R101'
    small = step.PAIRS[name]._replace(size=(64, 64), full_size=(64, 64))
    monkeypatch.setitem(step.PAIRS, name, small)
    monkeypatch.setattr(gpu_step, 'SETTINGS', gpu_step.SETTINGS[:1])
    gpu_step.main([name, '--seconds', '0'])
    rows = [x for x in capsys.readouterr().out.splitlines() if x.startswith('| ')]
    steps = [row.split('|')[2].strip() for row in rows if row.startswith('| fp32 |')]
    assert steps == [
        'student', 'teacher', 'distilled', 'usual', 'student + teacher',
        'distilled / needed (goal)',
    ]  # fmt: skip
    assert all(row.count('|') == 6 for row in rows)
    with pytest.raises(SystemExit):
        gpu_step.main(['RetinaNet'])  # matches three pairs


def test_memory_and_waits_have_goals():
    time = dict(student=1.0, teacher=1.0, distilled=2.5, both=2.0)
    peak = dict(student=10, teacher=5, distilled=10, both=10)
    waits = dict(student=0, teacher=0, distilled=3, both=1)
    found = gpu_step.Step('fp32', time, peak, 2**20, waits)
    *_, goals = gpu_step.rows_of(found, 'SegFormer B0 <- B2')
    assert goals[2:] == [
        '1.25 (1.10), **missed**',
        '1.00 (1.05), met',
        '2 more (0), **missed**',
    ]
    *_, goals = gpu_step.rows_of(found, 'RetinaNet R50 <- DINO R50')
    assert goals[4] == '2 more'


# --- the bundle


def test_the_bundle_compiles_with_optimization(tmp_path, monkeypatch):
    folder = tmp_path / 'onedl_mmcv-1'
    folder.mkdir()
    (folder / 'setup.py').touch()
    wheels = tmp_path / 'wheels'
    wheels.mkdir()
    shutil.make_archive(str(wheels / 'onedl_mmcv-1'), 'gztar', tmp_path, folder.name)
    environments = []

    def run(*args, env, **kwargs):
        environments.append(dict(env))
        return subprocess.CompletedProcess(args, 0)

    monkeypatch.setattr(gpu_bundle, 'cuda_home', lambda: '/cuda')
    monkeypatch.setattr(gpu_bundle.subprocess, 'run', run)
    assert gpu_bundle.build_ops(tmp_path / 'site', wheels, '9.0') == ''
    (environment,) = environments
    assert {'-O2', '-O3'} & set(environment['CFLAGS'].split())
    assert environment['FORCE_CUDA'] == environment['MMDIST_UNITS'] == '1'


def link_packages(site: Path) -> None:
    """Link what a GPU machine has: torch, Triton and their dependencies."""
    ours = Path(sysconfig.get_paths()['purelib'])
    names = (
        'torch', 'torchgen', 'functorch', 'triton', 'numpy', 'numpy.libs', 'scipy',
        'scipy.libs', 'sympy',
        'mpmath', 'networkx', 'jinja2', 'markupsafe', 'filelock', 'fsspec', 'yaml',
        '_yaml', 'packaging', 'typing_extensions.py', 'setuptools', '_distutils_hack',
    )  # fmt: skip
    for name in names:
        if (ours / name).exists() and not (site / name).exists():
            (site / name).symlink_to(ours / name)


@pytest.mark.slow
@without_gpu
def test_the_bundle_runs_in_a_fresh_environment(tmp_path, monkeypatch, capsys):
    bundle = tmp_path / 'mmdist_gpu.tar.xz'
    monkeypatch.setattr(gpu_bundle, 'PRESET', 0)
    assert gpu_bundle.main([str(bundle), '--loss-only']) == 0
    line = capsys.readouterr().out.strip().splitlines()[-1]
    with tarfile.open(bundle) as tar:
        names = tar.getnames()
    assert 'mmdist/mmdist/losses/dist_loss.py' in names
    assert not any('mmdist/.git/' in x or '.venv' in x for x in names)

    venv.create(tmp_path / 'venv', with_pip=True)
    (site,) = tmp_path.glob('venv/lib/python*/site-packages')
    link_packages(site)
    path = f'{tmp_path / "venv/bin"}:{os.environ["PATH"]}'
    environ = {**os.environ, 'PATH': path, 'PIP_NO_INDEX': '1'}
    environ.pop('PYTHONPATH', None)
    assert line.startswith('tar xf ')
    line = line.replace('--stages 1-3', '--stages 1-5')
    subprocess.run(line, shell=True, check=True, cwd=tmp_path, env=environ)
    found = statuses(tmp_path / 'gpu_check')
    assert found.pop('machine') == 'passed'
    assert set(found.values()) == {'skipped'}
    # stage 2's tests are found there, without the model libraries
    python, checkout = tmp_path / 'venv/bin/python', tmp_path / 'mmdist'
    environ['PYTHONPATH'] = f'{checkout}:{checkout / "site"}'
    (part,) = (x for x in gpu_check.parts_of(gpu_check.parse_args([])) if x.stage == 2)
    command = [x.replace(str(ROOT), str(checkout)) for x in part.command]
    done = subprocess.run(
        [str(python), *command, '--collect-only'],
        cwd=tmp_path,
        env=environ,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    assert 'test_kernels_are_exact' in done.stdout
    assert 'test_types_and_sizes' in done.stdout
