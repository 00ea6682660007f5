"""tools/gpu_check.py and tools/gpu_bundle.py, as far as they go without a GPU."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
from pathlib import Path

import pytest
import torch

from benchmarks import step
from mmdist.losses.correlations import gpu, plain
from tools.gpu import __main__ as parts
from tools.gpu import loss, report

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / 'tools'))  # they import one another

import gpu_bundle  # noqa: E402
import gpu_check  # noqa: E402

without_gpu = pytest.mark.skipif(
    torch.cuda.is_available(), reason='about a machine without a GPU'
)
# Python starts with this, and then finds none of them
BLOCK = "import sys; sys.modules.update(dict.fromkeys(['mmcv', 'mmdet', 'mmseg']))"


def results(out: Path) -> dict:
    return json.loads((out / 'gpu_check.json').read_text())['stages']


def statuses(stages: dict) -> dict[str, str]:
    return {
        name: part['status']
        for stage in stages.values()
        for name, part in stage['parts'].items()
    }


def test_every_part_is_there():
    names = {n: [p.name for p in s.parts] for n, s in gpu_check.STAGES.items()}
    pairs = names.pop(5)
    assert {x for some in names.values() for x in some} == set(parts.PARTS)
    wanted = [x for x in pairs if not x.endswith(', compiled')]
    found = [[x for x in step.PAIRS if x.startswith(name)] for name in wanted]
    assert sorted(x for (x,) in found) == sorted(step.PAIRS)


def test_names_of_stages():
    assert gpu_check.stage_numbers('1-3, 6,2') == [1, 2, 3, 6]
    with pytest.raises(gpu_check.argparse.ArgumentTypeError, match='1 to 7'):
        gpu_check.stage_numbers('8')


@pytest.mark.slow
@without_gpu
def test_without_a_gpu_and_without_the_libraries_of_models(tmp_path, monkeypatch):
    (tmp_path / 'sitecustomize.py').write_text(BLOCK)
    monkeypatch.setenv('PYTHONPATH', str(tmp_path))
    command = [sys.executable, str(ROOT / 'tools' / 'gpu_check.py'), '--small']
    command += ['--out', str(tmp_path / 'out'), '--stages', '1,3-4,6']
    subprocess.run(command, check=True, cwd=tmp_path)
    stages = results(tmp_path / 'out')
    assert statuses(stages) == {
        'machine': 'passed',
        'loss': 'passed',
        'waits': 'skipped',
        'AMP, EMA, resume': 'skipped',
        'NCCL, SyncBN': 'skipped',
        'quickstart': 'skipped',
    }
    assert stages['4']['parts']['waits']['skipped'] == 'torch finds no CUDA device'
    assert 'mmcv' in stages['6']['parts']['quickstart']['skipped']
    page = (tmp_path / 'out' / 'gpu_check.md').read_text()
    assert '- waits: **skipped**, ' in page and 'torch finds no CUDA device' in page
    (row,) = (x for x in page.splitlines() if x.startswith('| (4, 19, 64, 64) softmax'))
    assert row.count('|') == 10


class Rows(report.Run):
    small = False

    def __init__(self):
        super().__init__()
        self.all = []

    def write(self, what):
        self.all.append(what)


@pytest.mark.parametrize('wrong', [None, 'value', 'gradient', 'outside the mask'])
def test_wrong_kernels_are_seen(wrong, monkeypatch):
    def kernels(student, teacher, mask, settings):
        inter, intra = plain.correlations(student, teacher, mask, settings)
        if wrong == 'value':
            return inter + 1e-3, intra
        if wrong == 'gradient':
            return inter, intra.detach() + 1.01 * (intra - intra.detach())
        if wrong == 'outside the mask':
            leak = student[~mask.unsqueeze(1).expand_as(student)].sum()
            return inter, intra + 1e-20 * (leak - leak.detach())
        return inter, intra

    monkeypatch.setattr(gpu, 'correlations', kernels)
    g = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 2, 7, 5, 6, generator=g).unbind()
    mask = torch.rand(2, 5, 6, generator=g) < 0.5
    rows = Rows()
    loss.compare(rows, 'table', 'name', student, teacher, mask)
    (row,) = rows.all
    right = {key: x['met'] for key, x in row['cells'].items()}
    assert set(right) == {'value', 'gradient', 'gradient outside the mask'}
    assert right['value'] == (wrong != 'value')
    assert right['gradient outside the mask'] == (wrong != 'outside the mask')
    assert right['gradient'] or wrong
    expected = 'failed' if wrong else 'passed'
    assert gpu_check.status_of({}, rows.all) == expected


def test_a_goal_that_is_missed_is_no_failure():
    rows = [dict(cells=dict(a=report.at_most(1.2, 1.1), b=3))]
    assert gpu_check.status_of({}, rows) == 'goal missed'
    assert gpu_check.cell(rows[0]['cells']['a']) == '1.2 (at most 1.1), **miss**'
    rows[0]['cells']['a'] = report.at_least(9.0, 8)
    assert gpu_check.status_of({}, rows) == 'passed'
    assert gpu_check.cell(rows[0]['cells']['a']) == '9 (at least 8), pass'


def test_a_part_that_dies_or_takes_too_long_takes_nothing_with_it(
    tmp_path, monkeypatch
):
    broken = [
        gpu_check.Part('hard scores', 0.5),
        gpu_check.Part('there is no such part', 60),
        gpu_check.Part('machine', 60),
    ]
    monkeypatch.setattr(gpu_check, 'STAGES', {2: gpu_check.Stage('Broken', broken)})
    monkeypatch.setattr(gpu_check.tempfile, 'tempdir', str(tmp_path / 'work'))
    (tmp_path / 'work').mkdir()
    earlier = dict(title='Earlier', parts=dict(loss=dict(status='passed')), rows=[])
    (tmp_path / 'gpu_check.json').write_text(json.dumps(dict(stages={'3': earlier})))
    assert gpu_check.main(['--stages', '2', '--out', str(tmp_path)]) == 1
    stages = results(tmp_path)
    assert list(stages) == ['2', '3'] and stages['3'] == earlier
    assert list(statuses(stages).values())[:3] == ['timed out', 'failed', 'passed']
    assert 'KeyError' in stages['2']['parts']['there is no such part']['error']
    assert any(row['table'] == 'software' for row in stages['2']['rows'])
    assert not list((tmp_path / 'work').iterdir())


def test_what_is_reported_is_written_at_once(tmp_path):
    found = gpu_check.Results(tmp_path)
    found.begin(3)
    found.part(3, 'loss', status='stopped')
    for value in (1.0, 2.0):  # the second replaces the first
        found.row(3, dict(table='t', name='n', cells=dict(a=value)))
    again = gpu_check.Results(tmp_path).stages
    assert [row['cells'] for row in again['3']['rows']] == [dict(a=2.0)]
    assert '| n | 2 |' in (tmp_path / 'gpu_check.md').read_text()


def test_the_bundle_compiles_with_optimization(tmp_path, monkeypatch):
    folder = tmp_path / 'onedl_mmcv-1'
    folder.mkdir()
    (folder / 'setup.py').touch()
    wheels = tmp_path / 'wheels'
    wheels.mkdir()
    shutil.make_archive(str(wheels / 'onedl_mmcv-1'), 'gztar', tmp_path, folder.name)
    environments = []

    def run(*args, env, **kwargs):
        environments.append(env)
        return subprocess.CompletedProcess(args, 0)

    monkeypatch.setattr(gpu_bundle, 'cuda_home', lambda: '/cuda')
    monkeypatch.setattr(gpu_bundle.make_env, 'fix_setup', lambda setup: None)
    monkeypatch.setattr(gpu_bundle.subprocess, 'run', run)
    assert gpu_bundle.build_ops(tmp_path / 'site', wheels, '9.0') == ''
    (environment,) = environments
    assert {'-O2', '-O3'} & set(environment['CFLAGS'].split())


def test_cuda_sources_are_compiled_from_few_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(gpu_bundle.make_env, 'jobs', lambda: 3)
    names = [f'{i}.cu' for i in range(7)] + [*gpu_bundle.CUDA_APART, 'a.cpp']
    for name in names:
        Path(name).write_text('')
    written = gpu_bundle.as_units(names)
    units = [x for x in written if x.startswith('units')]
    assert len(units) == 3 and set(written) - set(units) == set(names[7:])
    lines = ''.join(Path(x).read_text() for x in units).splitlines()
    assert sorted(lines) == [f'#include "{tmp_path / x}"' for x in names[:7]]
    monkeypatch.setenv('MMDIST_UNITS', '0')
    assert gpu_bundle.as_units(names) == names


def link_packages(site: Path) -> None:
    """Give an environment what a GPU machine has: torch, Triton, and their needs."""
    ours = Path(sysconfig.get_paths()['purelib'])
    names = (
        'torch', 'torchgen', 'functorch', 'triton', 'numpy', 'numpy.libs', 'sympy',
        'mpmath', 'networkx', 'jinja2', 'markupsafe', 'filelock', 'fsspec', 'yaml',
        '_yaml', 'packaging', 'typing_extensions.py', 'setuptools', '_distutils_hack',
    )  # fmt: skip
    for name in names:
        if (ours / name).exists() and not (site / name).exists():
            (site / name).symlink_to(ours / name)


@pytest.mark.slow
@without_gpu
def test_the_bundle_runs_in_a_fresh_environment(tmp_path):
    bundle = tmp_path / 'here' / 'mmdist_gpu.tar.xz'
    bundle.parent.mkdir()
    command = [sys.executable, str(ROOT / 'tools' / 'gpu_bundle.py'), str(bundle)]
    made = subprocess.run(
        [*command, '--loss-only', '--preset', '0'],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    ).stdout
    assert bundle.stat().st_size < gpu_bundle.LIMIT
    with tarfile.open(bundle) as tar:
        names = tar.getnames()
    assert 'mmdist/mmdist/losses/dist_loss.py' in names
    assert not any('mmdist/.git/' in x or '.venv' in x for x in names)

    there = tmp_path / 'there'
    there.mkdir()
    shutil.move(bundle, there)
    venv.create(there / 'venv', with_pip=True)
    (site,) = there.glob('venv/lib/python*/site-packages')
    link_packages(site)
    environment = {**os.environ, 'PATH': f'{there / "venv/bin"}:{os.environ["PATH"]}'}
    environment.pop('PYTHONPATH', None)
    environment['PIP_NO_INDEX'] = '1'
    line = made.strip().splitlines()[-1]
    assert line.startswith('tar xf ')
    line = line.replace('--stages 1-4', '--stages 1-6')
    subprocess.run(line, shell=True, check=True, cwd=there, env=environment)
    stages = results(there / 'gpu_check')
    said = statuses(stages)
    assert [said[part.name] for part in gpu_check.STAGES[2].parts] == ['passed'] * 4
    assert said['machine'] == 'passed'
    rest = {name for n in range(3, 7) for name in stages[str(n)]['parts']}
    assert {said[name] for name in rest} == {'skipped'}
    software = {r['name']: r['cells']['is'] for r in stages['1']['rows'][:8]}
    assert 'onedl-0.10' in software['others'] or 'mmengine' in software['others']
    (log,) = there.glob('gpu_check/gpu_check.log')
    assert 'Traceback' not in log.read_text()
