"""The structure that docs/architecture.md describes."""

from __future__ import annotations

import ast
from graphlib import TopologicalSorter
from importlib.util import resolve_name
from pathlib import Path

ROOT = Path(__file__).parents[1]


def imports(path: Path) -> set[str]:
    """The modules that one imports, also inside functions, and names from them."""
    package = '.'.join(path.relative_to(ROOT).parent.parts)
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            base = resolve_name('.' * node.level + (node.module or ''), package)
            inner = {f'{base}.{alias.name}' for alias in node.names} & MODULES.keys()
            found |= inner or {base}
    return found


PATHS = [p for p in (ROOT / 'mmdist').rglob('*.py') if '.mim' not in p.parts]
MODULES = {
    '.'.join(p.relative_to(ROOT).with_suffix('').parts).removesuffix('.__init__'): p
    for p in PATHS
}


def test_imports_make_no_cycle():
    graph = {name: imports(p) & MODULES.keys() - {name} for name, p in MODULES.items()}
    assert 'mmdist.step' in graph['mmdist.comparisons.base']
    order = list(TopologicalSorter(graph).static_order())  # raises if there is a cycle
    assert order.index('mmdist.step') < order.index('mmdist.distiller')
