"""The pages' links work, their statements match the code, and the site builds."""

from __future__ import annotations

import ast
import importlib
import os
import re
import shlex
import subprocess
import sys

import mmengine
import pytest
import yaml
from docs_blocks import PAGES, ROOT, code, only

import mmdist
import mmdist.registry

SITE = yaml.safe_load((ROOT / 'mkdocs.yml').read_text())
DOCS = {path.name for path in (ROOT / 'docs').glob('*.md')}


def text_of(page: str) -> str:
    return (ROOT / page).read_text()


@pytest.mark.parametrize('page', [*PAGES, 'CHANGELOG.md', 'CONTRIBUTING.md'])
def test_links_and_paths_lead_somewhere(page):
    for link in re.findall(r'\]\((?!https?:)([^)]*)\)', text_of(page)):
        path, _, anchor = link.partition('#')
        target = (ROOT / page).parent / path if path else ROOT / page
        assert target.exists(), link
        headings = re.findall(r'^#+ (.*)', target.read_text(), re.M) if anchor else []
        # as GitHub forms them
        anchors = [
            re.sub(r'[^\w\- ]', '', h.lower()).replace(' ', '-') for h in headings
        ]
        assert not anchor or anchor in anchors, link
    if page == 'CHANGELOG.md':  # it names paths of the past
        return
    # the tests that reliability.md names are relative to tests/
    names = r'(?:configs|docs|study|tests|tools)/[\w./-]+|[\w/]*test_\w+\.py'
    for path in re.findall(rf'(?:\bpython |`)({names})', text_of(page)):
        assert (ROOT / path).exists() or (ROOT / 'tests' / path).exists(), path


def in_nav(entry) -> list[str]:
    if isinstance(entry, str):
        return [entry]
    children = entry.values() if isinstance(entry, dict) else entry
    return [page for child in children for page in in_nav(child)]


def test_readme_and_the_navigation_lead_to_every_page():
    tops = SITE['extra']['pages']
    assert all((ROOT / source).is_file() for source in tops.values())
    assert sorted(in_nav(SITE['nav'])) == sorted([*DOCS, *tops])
    linked = re.findall(r'\]\(docs/(\w+\.md)', text_of('README.md'))
    # these are for people who read or change the code
    assert DOCS - set(linked) <= {'api.md', 'config_types.md', 'release.md'}


def test_the_reference_has_the_public_names_and_every_type_of_a_config():
    registered = set()
    for registry in vars(mmdist.registry).values():
        if isinstance(registry, mmengine.Registry) and registry.scope == 'mmdist':
            registry.import_from_location()
            registered |= {
                thing
                for thing in registry.module_dict.values()
                if thing.__module__.startswith('mmdist.')  # not what a test registered
            }
    shown, public = [], []
    for page in ('docs/api.md', 'docs/config_types.md'):
        for name in re.findall(r'^::: (\S+)$', text_of(page), re.M):
            module, _, attribute = name.rpartition('.')
            thing = getattr(importlib.import_module(module), attribute)
            shown += [thing] if callable(thing) else []
            public += [attribute] if module == 'mmdist' and 'api' in page else []
    assert sorted(public) == sorted(mmdist.__all__)
    assert len(shown) == len(set(shown))
    assert len(registered) > 15
    assert not registered - set(shown)


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
def test_the_pair_of_the_page_works_and_is_that_of_the_readme(tmp_path):
    command = only(code('docs/your_own_pair.md', 'shell'), 'new_pair')
    _, tool, *arguments = shlex.split(command.replace('\\\n', ' '))
    environ = dict(os.environ, OMP_NUM_THREADS='1')
    command = [sys.executable, ROOT / tool, *arguments]
    subprocess.run(command, cwd=tmp_path, env=environ, check=True)
    made, theirs = (tmp_path / 'my_pair.py').read_text(), code('README.md')
    theirs = only(theirs, 'retinanet_r18_fpn_1x_coco.py')
    assert ast.dump(ast.parse(made)) == ast.dump(ast.parse(theirs))


@pytest.mark.slow
def test_the_site_builds_without_a_warning_and_is_read_without_a_network(tmp_path):
    """Runs `make docs`, whose first run in a checkout installs what it needs."""
    command = ['make', 'docs', f'SITE={tmp_path}', f'PYTHON={sys.executable}']
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    for page in in_nav(SITE['nav']):
        assert (tmp_path / page).with_suffix('.html').is_file()
    pages = {path: path.read_text() for path in tmp_path.rglob('*.html')}
    loaded = re.compile(r'<(?:script|img|iframe|link)\b[^>]*(?:https?:)?//[^>]*>')
    for path, html in pages.items():
        found = [tag for tag in loaded.findall(html) if 'rel="canonical"' not in tag]
        assert not found, (path, found)
    zoo, api = (pages[tmp_path / f'{name}.html'] for name in ('model_zoo', 'api'))
    sources = re.findall(r'href="(source/[^"#]+)"', zoo)
    assert len(sources) > 30
    assert all((tmp_path / source).is_file() for source in sources)
    assert 'id="mmdist.DISTLoss"' in api
    assert ':class:' not in api and ':math:' not in api
    assert '<math' in api
