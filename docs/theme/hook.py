"""What MkDocs needs to be told: pages outside docs/, links out of it, formulas."""

from __future__ import annotations

import posixpath
import re
from pathlib import Path

from latex2mathml.converter import convert
from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[2]
LINK = re.compile(r'(?<=\]\()(?!https?:|#)([^)#\s]+)')
LANGUAGES = {'.py': 'python', '.sh': 'shell', '.cff': 'yaml', '.yml': 'yaml'}


def on_config(config):
    # GitHub shows the same fence by its own means
    fence = {'name': 'math', 'class': 'math', 'format': math}
    superfences = config.mdx_configs.setdefault('pymdownx.superfences', {})
    superfences.setdefault('custom_fences', []).append(fence)
    return config


def math(source, *_args, **_kwargs) -> str:
    return ''.join(mathml(line, display='block') for line in source.split(r'\\'))


def mathml(latex: str, display: str = 'inline') -> str:
    return convert(latex.replace('&', ''), display=display).replace(r'\_', '_')


def on_files(files, config):
    """Add the pages of the top folder, and each file outside docs/ that is linked."""
    for page, source in config.extra['pages'].items():
        text = (ROOT / source).read_text()
        files.append(File.generated(config, page, content=text))
    for page in list(files.documentation_pages()):
        for link in LINK.findall(page.content_string):
            source = target(page.src_uri, link, config)
            uri = page_of(source, config)
            is_new = files.get_file_from_path(uri) is None
            # of what does not exist, MkDocs says that the link leads nowhere
            if is_new and uri.startswith('source/') and (ROOT / source).is_file():
                files.append(File.generated(config, uri, content=listing(source)))
    return files


def on_page_markdown(markdown, page, config, files):
    """Let each link name a page of the site, as on GitHub it names a file."""
    here = posixpath.dirname(page.file.src_uri)
    if page.is_homepage:
        page.meta['hide'] = ['navigation']

    def replace(match: re.Match) -> str:
        source = target(page.file.src_uri, match[1], config)
        if not (ROOT / source).is_file():
            return match[1]
        return posixpath.relpath(page_of(source, config), here)

    # a listing has no links
    return markdown if here else LINK.sub(replace, markdown)


def target(page: str, link: str, config) -> str:
    """The file, from the top folder, that a link on a page leads to."""
    source = config.extra['pages'].get(page, f'docs/{page}')
    return posixpath.normpath(posixpath.join(posixpath.dirname(source), link))


def page_of(source: str, config) -> str:
    """Where the site has a file of the repository."""
    for page, top in config.extra['pages'].items():
        if source == top:
            return page
    if source.startswith('docs/'):
        return source.removeprefix('docs/')
    # twice the suffix: a page of its own for configs/a.py
    return f'source/{source}.md'


def listing(source: str) -> str:
    language = LANGUAGES.get(Path(source).suffix, 'text')
    text = (ROOT / source).read_text()
    return (
        '---\nsearch: {exclude: true}\nhide: [toc]\n---\n'
        f'# {Path(source).name}\n\n`{source}`\n\n````{language}\n{text}````\n'
    )
