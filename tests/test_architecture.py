"""The structure that docs/architecture.md describes."""

from __future__ import annotations

import ast
import re
from graphlib import TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / 'mmdist'
PAGE = ROOT / 'docs' / 'architecture.md'


def modules() -> dict[str, Path]:
    return {
        '.'.join(path.relative_to(ROOT).with_suffix('').parts).removesuffix(
            '.__init__'
        ): path
        for path in PACKAGE.rglob('*.py')
        if '.mim' not in path.parts
    }


def imports(name: str, path: Path, known: set[str]) -> set[str]:
    """The modules of mmdist that a module imports, also inside functions."""
    package = name if path.name == '__init__.py' else name.rpartition('.')[0]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            base = node.module or ''
            if node.level:
                parents = package.split('.')
                parents = parents[: len(parents) - node.level + 1]
                base = '.'.join([*parents, *filter(None, [base])])
            # a module of the package, or a name in it
            inner = {f'{base}.{alias.name}' for alias in node.names} & known
            found |= inner or {base}
    return found & known - {name}


def test_imports_make_no_cycle():
    paths = modules()
    graph = {name: imports(name, path, set(paths)) for name, path in paths.items()}
    assert 'mmdist.step' in graph['mmdist.comparisons.base']
    assert (
        'mmdist.losses.correlations.common' in graph['mmdist.losses.correlations.cpu']
    )
    order = list(TopologicalSorter(graph).static_order())  # raises if there is a cycle
    assert order.index('mmdist.step') < order.index('mmdist.distiller')


def test_every_path_of_the_page_exists():
    rows = re.findall(r'^\| (`.*?) \|', PAGE.read_text(), re.MULTILINE)
    names = [name for row in rows for name in re.findall(r'`([\w./<>]+)`', row)]
    assert len(names) > 15
    for name in names:
        name = name.replace('<kind>', 'base')
        assert (PACKAGE / name).exists() or (ROOT / name).exists(), name
