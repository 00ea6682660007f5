"""The code of the pages, and small models in place of those that their configs name."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

from markdown_it import MarkdownIt
from mmengine.config import Config

ROOT = Path(__file__).resolve().parents[1]
PAGES = ['README.md', *(f'docs/{p.name}' for p in sorted((ROOT / 'docs').glob('*.md')))]


class Block(NamedTuple):
    """A code block, or a command within a sentence."""

    page: str
    line: int
    language: str  # 'indented' for a block without a fence, 'inline' for a command
    code: str
    section: str = ''
    file: str = ''  # the name that the sentence before the block gives it

    def __str__(self) -> str:
        return f'{self.page}:{self.line}'


def blocks(page: str, language: str = '') -> list[Block]:
    """The code blocks of a page, those of one language alone if it is given."""
    text = (ROOT / page).read_text()
    found, section, before = [], '', ''
    tokens = MarkdownIt('commonmark').parse(text)
    for token, following in zip(tokens, [*tokens[1:], None], strict=True):
        if token.type == 'heading_open':
            section = following.content
        if token.type == 'inline':
            before = token.content
        if token.type in ('fence', 'code_block'):
            info = token.info.strip() if token.type == 'fence' else 'indented'
            named = re.search(r'`([\w./]+\.py)`:$', before)
            file = named[1] if named else ''
            found.append(
                Block(page, token.map[0] + 1, info, token.content, section, file)
            )
    return [block for block in found if language in ('', block.language)]


def inline_code(page: str) -> list[Block]:
    """The code within the sentences and tables of a page."""
    return [
        Block(page, token.map[0] + 1, 'inline', child.content)
        for token in MarkdownIt('commonmark').parse((ROOT / page).read_text())
        for child in token.children or []
        if child.type == 'code_inline'
    ]


def code(page: str, language: str = 'python') -> list[str]:
    """The texts of a page's code blocks."""
    return [block.code for block in blocks(page, language)]


def only(texts: list[str], words: str) -> str:
    """The one text that has these words."""
    (found,) = [text for text in texts if words in text]
    return found


def small(model: dict, scope: str) -> dict:
    """The config of a model at the size for a test."""
    from det_zoo import shrink
    from segmentors import thin

    if scope == 'mmdet':
        return shrink(model, 8)
    for key in ('size', 'test_cfg'):
        model.data_preprocessor.pop(key, None)
    return thin(model, 1 if 'MixVisionTransformer' in str(model) else 1 / 8)


def replace_teacher(teacher: dict, names: list[str], scope: str, folder: Path) -> None:
    """A small model for the named one, with the classes that the config expects."""
    from mmdist.teachers.teacher import load_config

    if 'ema' in teacher:
        return
    if isinstance(teacher.config, (str, Config)):
        config = teacher.config
        if isinstance(config, str):
            # the ADE20K teacher's attention is slow on a CPU
            config = load_config(config.replace('b5_8xb2', 'b0_8xb2'))
        config.model = small(config.model, scope)
        teacher.update(config=config, checkpoint=None, allow_random=True)
    elif 'Torchvision' in teacher.config.type:
        teacher.config.weights = None
    else:
        from hf_models import STANDS_IN, save_model, tokenizer

        (key,) = [key for key in STANDS_IN if teacher.config.name.startswith(key)]
        renamed = teacher.get('class_map', {})
        labels = {i: renamed.get(name, name) for i, name in enumerate(names)}
        make, processor = STANDS_IN[key]
        teacher.config.name = save_model(make, processor, folder / 'hf', labels)
        if 'prompts' in teacher.config:
            tokenizer(teacher.config.name, ['person', 'car', 'drone'])
