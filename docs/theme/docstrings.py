"""The docstrings are reStructuredText, as Sphinx reads it; MkDocs reads Markdown."""

from __future__ import annotations

import re
import textwrap

import griffe
from latex2mathml.converter import convert

ROLE = re.compile(r':(?:class|meth|attr|func|mod):`~?([^`]+)`')
INLINE_MATH = re.compile(r':math:`([^`]+)`')
BLOCK_MATH = re.compile(r'^( *)\.\. math::\n((?:\1 +.*\n|\n)+)', re.M)


def to_markdown(docstring: str) -> str:
    """Roles as code, formulas as the fence that docs/theme/hook.py shows."""
    text = ROLE.sub(r'`\1`', docstring)
    text = BLOCK_MATH.sub(_fence, text + '\n')
    text = INLINE_MATH.sub(lambda match: convert(match[1]), text)
    text = re.sub(r'^( *)Example:$', r'\1Examples:', text, flags=re.M)
    return re.sub(r'::$', ':', text, flags=re.M).rstrip()


def _fence(match: re.Match) -> str:
    indent, body = match.groups()
    lines = f'```math\n{textwrap.dedent(body).strip()}\n```'
    return textwrap.indent(lines, indent) + '\n\n'


class Docstrings(griffe.Extension):
    def on_instance(self, *, obj: griffe.Object, **_) -> None:
        if obj.docstring is not None:
            obj.docstring.value = to_markdown(obj.docstring.value)
