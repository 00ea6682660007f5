"""The code in README and docs."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import NamedTuple

from markdown_it import MarkdownIt

ROOT = Path(__file__).resolve().parents[1]
PAGES = ['README.md', *(f'docs/{p.name}' for p in sorted((ROOT / 'docs').glob('*.md')))]


class Block(NamedTuple):
    """A code block, or code within a sentence."""

    page: str
    line: int
    language: str  # 'indented' for a block without a fence, 'inline' in a sentence
    code: str
    section: str
    file: str = ''  # the name that the sentence before the block gives it

    def __str__(self) -> str:
        return f'{self.page}:{self.line}'


@cache
def blocks(page: str, language: str = '') -> list[Block]:
    """The code of a page, of one language only if it is given."""
    found, section, before = [], '', ''
    tokens = MarkdownIt('commonmark').parse((ROOT / page).read_text())
    for token, following in zip(tokens, [*tokens[1:], None], strict=True):
        if token.type == 'heading_open':
            section = following.content
        elif token.type == 'inline':
            before = token.content
            found += [
                Block(page, token.map[0] + 1, 'inline', child.content, section)
                for child in token.children
                if child.type == 'code_inline'
            ]
        elif token.type in ('fence', 'code_block'):
            info = token.info.strip() if token.type == 'fence' else 'indented'
            named = re.search(r'`([\w./]+\.py)`:$', before)
            code, line = token.content, token.map[0] + 1
            file = named[1] if named else ''
            found.append(Block(page, line, info, code, section, file))
    return [block for block in found if language in ('', block.language)]


def code(page: str, language: str = 'python') -> list[str]:
    """The texts of a page's code blocks."""
    return [block.code for block in blocks(page, language)]


def only(texts: list[str], words: str) -> str:
    """The only text that contains these words."""
    (found,) = [text for text in texts if words in text]
    return found
