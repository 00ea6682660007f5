"""The site: what it holds, what its pages say, and that it builds without a warning."""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import cv2
import mmengine
import numpy as np
import pytest
import yaml
from docs_blocks import code, only

import mmdist
import mmdist.registry

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / 'docs'
SITE = yaml.safe_load((ROOT / 'mkdocs.yml').read_text())
FROM_DOCSTRINGS = re.compile(r'^::: (\S+)$', re.M)


def text_of(page: str) -> str:
    return (DOCS / page).read_text()


@pytest.fixture(scope='module')
def figure():
    """tools/dev/draw_dist.py as a module."""
    spec = importlib.util.spec_from_file_location(
        'draw_dist', ROOT / 'tools/dev/draw_dist.py'
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# --- the pages


def in_nav(entry) -> list[str]:
    if isinstance(entry, str):
        return [entry]
    children = entry.values() if isinstance(entry, dict) else entry
    return [page for child in children for page in in_nav(child)]


def test_the_navigation_has_every_page_once():
    pages = [path.name for path in DOCS.glob('*.md')]
    tops = SITE['extra']['pages']
    assert all((ROOT / source).is_file() for source in tops.values())
    assert sorted(in_nav(SITE['nav'])) == sorted([*pages, *tops])


def test_readme_leads_to_every_page():
    linked = re.findall(r'\]\(docs/(\w+\.md)', (ROOT / 'README.md').read_text())
    # those are for who reads or changes the code
    others = {'api.md', 'config_types.md', 'release.md'}
    assert {path.name for path in DOCS.glob('*.md')} - set(linked) <= others


def test_nothing_of_the_theme_is_fetched():
    assert SITE['theme']['font'] is False
    assert not {'extra_javascript'} & SITE.keys()
    assert not [url for url in SITE['extra_css'] if '//' in url]


# --- the reference


def test_the_python_reference_has_exactly_the_public_names():
    names = FROM_DOCSTRINGS.findall(text_of('api.md'))
    public = [name.split('.')[1] for name in names if name.count('.') == 1]
    assert sorted(public) == sorted(mmdist.__all__)


def test_the_reference_has_every_type_that_a_config_may_name():
    registered = set()
    for registry in vars(mmdist.registry).values():
        if isinstance(registry, mmengine.Registry) and registry.scope == 'mmdist':
            registry.import_from_location()
            registered |= {
                thing
                for thing in registry.module_dict.values()
                if thing.__module__.startswith('mmdist.')  # not what a test registered
            }
    shown = []
    for page in ('api.md', 'config_types.md'):
        for name in FROM_DOCSTRINGS.findall(text_of(page)):
            module, _, attribute = name.rpartition('.')
            thing = getattr(importlib.import_module(module), attribute)
            if callable(thing):
                shown.append(thing)
    assert len(shown) == len(set(shown))
    assert len(registered) > 20
    assert not registered - set(shown)


# --- what the pages say


def messages() -> list[str]:
    """All strings in the code, with a mark where a value is filled in."""

    def flat(node) -> str:
        if isinstance(node, ast.Constant):
            return node.value if isinstance(node.value, str) else '\0'
        if isinstance(node, ast.JoinedStr):
            return ''.join(map(flat, node.values))
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
            return flat(node.left) + flat(node.right)
        return '\0'

    files = [*(ROOT / 'mmdist').rglob('*.py'), *(ROOT / 'tools').rglob('*.py')]
    return [
        flat(node)
        for path in files
        if '.mim' not in path.parts
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, (ast.Constant, ast.JoinedStr, ast.BinOp))
    ]


def test_every_quoted_message_is_one_of_the_code():
    quoted = re.findall(r'^> (.*)$', text_of('troubleshooting.md'), re.M)
    assert len(quoted) > 20
    said = messages()
    for quote in quoted:
        parts = [part.strip() for part in quote.split('...') if part.strip()]
        pattern = re.compile('.*'.join(map(re.escape, parts)), re.S)
        assert any(pattern.search(text) for text in said), quote


def published(config: str) -> dict:
    """What the metafile has of the authors' result of a config."""
    (metafile,) = (ROOT / config).parent.glob('metafile.yml')
    for model in yaml.safe_load(metafile.read_text())['Models']:
        if model['Config'] == config:
            (result,) = model['Results']
            assert result['Source'] == 'published by the authors'
            (score,) = result['Metrics'].values()
            student = result.get('Student')
            return dict(score=score, student=student, teacher=result.get('Teacher'))
    raise AssertionError(config)


DET, SEG = 'configs/det/coco', 'configs/seg/cityscapes'
R101 = 'deeplabv3-r101-d8_8xb2-40k_cityscapes-512x1024.py'
PAPER = {
    'Faster R-CNN R50': [
        f'{DET}/faster-rcnn_r50_fpn_2x_coco.py',
        f'{DET}/dist_faster-rcnn_r50_fpn_cascade-mask-rcnn-x101-64x4d_2x_coco.py',
        f'{DET}/dist-mimic_faster-rcnn_r50_fpn_cascade-mask-rcnn-x101-64x4d_2x_coco.py',
    ],
    'RetinaNet R50': [
        f'{DET}/retinanet_r50_fpn_2x_coco.py',
        f'{DET}/dist_retinanet_r50_fpn_retinanet-x101-64x4d_2x_coco.py',
        f'{DET}/dist-mimic_retinanet_r50_fpn_retinanet-x101-64x4d_2x_coco.py',
    ],
    'DeepLabV3-R18': [
        f'{SEG}/deeplabv3_r18-d8_8xb2-40k_cityscapes-512x1024.py',
        f'{SEG}/dist_deeplabv3_r18-d8_{R101}',
    ],
    'PSPNet-R18': [
        f'{SEG}/pspnet_r18-d8_8xb2-40k_cityscapes-512x1024.py',
        f'{SEG}/dist_pspnet_r18-d8_{R101}',
    ],
}


@pytest.mark.parametrize('student', PAPER)
def test_expected_numbers_are_those_of_the_metafiles(student):
    page = text_of('reproduce_the_paper.md')
    (row,) = re.findall(rf'^\| {student} ←.*?\|(.*)\|$', page, re.M)
    shown = [float(cell) for cell in row.split('|')]
    found = [published(config) for config in PAPER[student]]
    assert shown == [*(one['score'] for one in found), found[-1]['teacher']]
    assert all(one['student'] in (None, shown[0]) for one in found)
    commands = '\n'.join(code('docs/reproduce_the_paper.md', 'shell'))
    assert all(f'{config} 8' in commands for config in PAPER[student])


@pytest.mark.slow
def test_the_pair_of_the_page_works_and_is_that_of_the_readme(tmp_path):
    command = only(code('docs/your_own_pair.md', 'shell'), 'new_pair')
    _, tool, *arguments = shlex.split(command.replace('\\\n', ' '))
    subprocess.run(
        [sys.executable, ROOT / tool, *arguments],
        cwd=tmp_path,
        env={**os.environ, 'OMP_NUM_THREADS': '1'},
        check=True,
        capture_output=True,
    )
    theirs = only(code('README.md'), 'retinanet_r18_fpn_1x_coco.py')
    assert ast.dump(ast.parse((tmp_path / 'my_pair.py').read_text())) == ast.dump(
        ast.parse(theirs)
    )


# --- the figure


def test_the_figure_is_drawn(figure, tmp_path):
    figure.draw(tmp_path / 'figure.png')
    drawn, kept = (
        cv2.imread(str(path)) for path in (tmp_path / 'figure.png', figure.FIGURE)
    )
    assert drawn.shape == kept.shape
    assert np.abs(drawn.astype(int) - kept).mean() < 5  # other fonts


def test_the_numbers_beside_the_figure(figure):
    page = ' '.join(text_of('how_dist_works.md').split())
    assert f'The student of the upper half has {figure.SOFTER} times' in page
    factors, losses = figure.against_sharpness()
    first, last = (
        [f'{losses[name][i]:.0%}'.replace('%', ' %') for name in ('KL', 'DIST')]
        for i in (0, -1)
    )
    assert (
        f'At the factor {factors[0]:g} KL is {first[0]} of what a student without any '
        f'relation gets, and DIST {first[1]}; at the factor {factors[-1]:g} they are '
        f'{last[0]} and {last[1]}.'
    ) in page
    scales, norms = figure.against_scale()
    ratio = np.divide(norms['DIST'], norms['cross entropy'])
    assert np.interp(0.03, scales, ratio) == pytest.approx(40, rel=0.1)
    assert ratio[-1] < 1


# --- the site


@pytest.mark.slow
def test_it_builds_without_a_warning_and_needs_no_network_to_be_read(tmp_path):
    """`make docs` itself; only its first run in a checkout installs what builds it."""
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
