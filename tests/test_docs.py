"""The pages' links work, their statements match the code, and the site builds."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys

import mmengine
import pytest
from docs_blocks import PAGES, ROOT

import mmdist
import mmdist.registry


def text_of(page: str) -> str:
    return (ROOT / page).read_text()


@pytest.mark.parametrize('page', [*PAGES, 'CONTRIBUTING.md'])
def test_links_and_paths_lead_somewhere(page):
    """`make docs` checks the anchors too, and that each page is in the navigation."""
    links = re.findall(r'\]\((?!https?:|#)([^)#]+)', text_of(page))
    assert not [x for x in links if not (ROOT / page).parent.joinpath(x).exists()]
    # the tests that reliability.md names are relative to tests/
    names = r'(?:configs|docs|study|tests|tools)/[\w./-]+|[\w/]*test_\w+\.py'
    for path in re.findall(rf'(?:\bpython |`)({names})', text_of(page)):
        assert (ROOT / path).exists() or (ROOT / 'tests' / path).exists(), path


def test_readme_leads_to_every_page():
    linked = {f'docs/{x}' for x in re.findall(r'\]\(docs/(\w+\.md)', text_of(PAGES[0]))}
    # these are for people who read or change the code
    inner = {f'docs/{name}.md' for name in ('api', 'config_types', 'release')}
    assert set(PAGES[1:]) - linked <= inner


def test_the_reference_has_the_public_names_and_every_type_of_a_config():
    registered = set()
    for registry in vars(mmdist.registry).values():
        if isinstance(registry, mmengine.Registry) and registry.scope == 'mmdist':
            registry.import_from_location()
            registered.update(registry.module_dict.values())
    shown, public = set(), []
    for page in ('docs/api.md', 'docs/config_types.md'):
        for name in re.findall(r'^::: (\S+)$', text_of(page), re.M):
            module, _, attribute = name.rpartition('.')
            shown.add(getattr(importlib.import_module(module), attribute))
            public += [attribute] if module == 'mmdist' and 'api' in page else []
    assert sorted(public) == sorted(mmdist.__all__)
    # tests register some of their own
    ours = {thing for thing in registered if thing.__module__.startswith('mmdist.')}
    assert len(ours) > 15
    assert not ours - shown


def test_every_quoted_message_is_one_of_the_code():
    """Adjacent literals are joined; `...` stands for a value that is filled in."""
    files = [*(ROOT / 'mmdist').rglob('*.py'), *(ROOT / 'tools').rglob('*.py')]
    source = '\n'.join(path.read_text() for path in files if '.mim' not in path.parts)
    source = re.sub(r"""['"]\)?\s*\+?\s*\n\s*\(?r?f?['"]""", '', source)
    quoted = re.findall(r'^> (.*)$', text_of('docs/troubleshooting.md'), re.M)
    assert len(quoted) > 20
    for quote in quoted:
        parts = [re.escape(part.strip()) for part in quote.split('...')]
        assert re.search('.*'.join(parts), source), quote


@pytest.mark.slow
def test_the_site_builds_without_a_warning_and_is_read_without_a_network(tmp_path):
    """Runs `make docs`, whose first run in a checkout installs what it needs."""
    command = ['make', 'docs', f'SITE={tmp_path}', f'PYTHON={sys.executable}']
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    pages = {path.stem: path.read_text() for path in tmp_path.rglob('*.html')}
    assert 'index' in pages
    loaded = re.compile(r'<(?:script|img|iframe|link)\b[^>]*(?:https?:)?//[^>]*>')
    for name, html in pages.items():
        found = [tag for tag in loaded.findall(html) if 'rel="canonical"' not in tag]
        assert not found, (name, found)
    sources = re.findall(r'href="(source/[^"#]+)"', pages['model_zoo'])
    assert len(sources) > 30
    assert all((tmp_path / source).is_file() for source in sources)
    assert 'id="mmdist.DISTLoss"' in pages['api'] and '<math' in pages['api']
    assert ':class:' not in pages['api'] and ':math:' not in pages['api']
