"""The pages name what exists: files, sections of other pages, tests."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = [
    ROOT / 'README.md',
    ROOT / 'CHANGELOG.md',
    ROOT / 'CONTRIBUTING.md',
    *sorted((ROOT / 'docs').glob('*.md')),
]


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub forms them."""
    headings = re.findall(r'^#+ (.*)', page.read_text(), re.MULTILINE)
    return {re.sub(r'[^\w\- ]', '', h.lower()).replace(' ', '-') for h in headings}


@pytest.mark.parametrize('page', PAGES, ids=lambda page: page.name)
def test_links_and_paths_lead_somewhere(page):
    text = page.read_text()
    for link in re.findall(r'\]\((?!https?:)([^)]*)\)', text):
        path, _, anchor = link.partition('#')
        target = page.parent / path if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link

    # not the tests of reliability.md, which are relative to tests/
    paths = r'(?:\bpython |`)((?!\w+/test_)(?:configs|docs|study|tests|tools)/[\w./-]+)'
    for path in re.findall(paths, text):
        assert (ROOT / path).exists(), path


def test_every_test_that_the_reliability_page_names_exists():
    text = (ROOT / 'docs' / 'reliability.md').read_text()
    names = set(re.findall(r'`((?:\w+/)*test_\w+\.py)`', text))
    assert len(names) > 10
    missing = [name for name in names if not (ROOT / 'tests' / name).exists()]
    assert not missing
