"""Write the tables of docs/model_zoo.md from the metafiles.

Run it after you change a metafile: python -m tools.dev.make_model_zoo
"""

from __future__ import annotations

from pathlib import Path

import yaml

from tools.dev.runs import replace_between

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / 'docs' / 'model_zoo.md'
BEGIN = (
    '<!-- Made by tools/dev/make_model_zoo.py from the metafiles; do not edit. -->\n'
)
END = '<!-- End of what is made. -->\n'
HEADER = '| Config | Student | Teacher | Result | Source |\n|---|---|---|---|---|\n'


def tables() -> str:
    """A table per metafile and collection."""
    index = yaml.safe_load((ROOT / 'model-index.yml').read_text())
    text = ''
    for path in index['Import']:
        metafile = yaml.safe_load((ROOT / path).read_text())
        text += f'\n## `{Path(path).parent}`\n'
        for collection in metafile['Collections']:
            text += f'\n### {collection["Name"]}\n\n{HEADER}'
            text += ''.join(
                row(model)
                for model in metafile['Models']
                if model['In Collection'] == collection['Name']
            )
    return text + '\n'


def row(model: dict) -> str:
    """The row of one config."""
    results = model.get('Results')
    config = f'[{model["Name"]}](../{model["Config"]})'
    student, teacher = model['Student'], model.get('Teacher')
    cells = [
        config,
        f'`{student["Config"]}`{_metrics(student)}',
        f'`{teacher["Config"]}`{_metrics(teacher)}, [weights]({teacher["Weights"]})'
        if teacher
        else '',
        '<br>'.join(_result(result) for result in results or ()) or 'none yet',
        '<br>'.join(_source(result) for result in results or ()),
    ]
    return f'| {" | ".join(cells)} |\n'


def _metrics(entry: dict) -> str:
    metrics = entry.get('Metrics', {})
    return ''.join(f', {key} {value}' for key, value in metrics.items())


def _result(result: dict) -> str:
    text = ', '.join(f'{k} **{v}**' for k, v in result['Metrics'].items())
    if 'Student' in result:
        text += f' (student {result["Student"]}, teacher {result["Teacher"]})'
    return text


def _source(result: dict) -> str:
    command = result.get('Command')
    return result['Source'] + (f': `{command}`' if command else '')


def page(text: str) -> str:
    """The page with new tables."""
    return replace_between(text, BEGIN, END, tables())


if __name__ == '__main__':
    PAGE.write_text(page(PAGE.read_text()))
