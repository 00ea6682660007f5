"""Types `mmdist.*` in a config are found without an import."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from builders import slow
from mmengine.registry import HOOKS, MODELS, OPTIM_WRAPPERS

from mmdist.registry import why_not_built

PACKAGE = Path(__file__).parents[1] / 'mmdist'


def registered() -> set[tuple[str, str]]:
    """Registry and name of everything that the package registers."""
    found = set()
    for path in PACKAGE.rglob('*.py'):
        for node in ast.walk(ast.parse(path.read_text())):
            for call in getattr(node, 'decorator_list', ()):
                if isinstance(call, ast.Call) and ast.unparse(call.func).endswith(
                    '.register_module'
                ):
                    names = [k.value.value for k in call.keywords if k.arg == 'name']
                    registry = ast.unparse(call.func).removesuffix('.register_module')
                    found.add((registry, *(names or [node.name])))
    return found


def run(code: str) -> str:
    done = subprocess.run(
        [sys.executable, '-W', 'ignore', '-c', code], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_every_type_is_found_in_a_fresh_process():
    types = registered()
    assert ('MODELS', 'BinaryKLDivLoss') in types and ('HOOKS', 'IterSeedHook') in types
    found = run(
        'from mmengine import registry\n'
        f'for kind, name in {sorted(types)!r}:\n'
        "    print(getattr(registry, kind).get(f'mmdist.{name}') is not None)"
    )
    assert found.split() == ['True'] * len(types)


class Broken:
    def __init__(self) -> None:
        dict()['a key of its own']


@pytest.mark.parametrize(
    ('registry', 'cfg', 'says'),
    [
        (HOOKS, dict(type='DistilScheduleHook'), "mean 'mmdist.DistillScheduleHook'?"),
        (MODELS, dict(type='mmdist.DISTLoss', betta=1), "'betta'. Did you mean 'beta'"),
        (OPTIM_WRAPPERS, dict(type='OptimWraper'), "Did you mean 'OptimWrapper'?"),
        (HOOKS, dict(kind='mmdist.DistillScheduleHook'), ''),  # mmengine says it
        (HOOKS, dict(type=3), ''),
        (HOOKS, dict(type=Broken), ''),  # the error is inside the class
    ],
)
def test_a_misspelt_name_is_said_with_the_right_one(registry, cfg, says):
    with pytest.raises((KeyError, TypeError)) as error:
        registry.build(cfg)
    said = why_not_built(error.value)
    assert says in said and bool(says) == bool(said)


@pytest.mark.parametrize('missing', ['mmseg', *slow(['mmdet'])])
def test_one_of_the_two_libraries_is_enough(missing):
    run(
        f'import sys; sys.modules[{missing!r}] = None\n'
        'from mmengine.registry import DATASETS, MODELS, TRANSFORMS\n'
        "assert MODELS.get('mmdist.Distiller') and MODELS.get('mmdist.RoILogits')\n"
        "assert DATASETS.get('mmdist.ImageFolder')\n"
        "assert TRANSFORMS.get('mmdist.MarkUnlabelled')"
    )


@pytest.mark.slow
def test_without_mmcv_a_sentence_says_so_before_a_model_is_built():
    """The loss alone works without it."""
    printed = run(
        "import sys; sys.modules['mmcv'] = None\n"
        'from mmdist import DISTLoss\n'
        'from mmengine.registry import MODELS\n'
        'try:\n'
        "    MODELS.build(dict(type='mmdist.Distiller', student={}, teacher={}))\n"
        'except RuntimeError as error:\n'
        '    print(error)'
    )
    assert 'mmdist needs mmcv, which is not installed. Run `python tools' in printed


@pytest.mark.slow
def test_the_finder_of_another_library_is_not_taken_for_ours():
    run(
        'import sys\n'
        'class _Finder:\n'
        '    def find_spec(self, name, path=None, target=None):\n'
        '        return None\n'
        'sys.meta_path[:] = [\n'
        "    f for f in sys.meta_path if not getattr(f, 'is_of_mmdist', False)]\n"
        'sys.meta_path.insert(0, _Finder())\n'
        'from mmdist._startup import prepare_mmengine  # imports mmengine.config\n'
        'before = len(sys.meta_path)\n'
        'assert sum(getattr(f, "is_of_mmdist", False) for f in sys.meta_path) == 1\n'
        'prepare_mmengine()\n'
        'assert len(sys.meta_path) == before'
    )
