"""Every command in README and docs is accepted by its program's own parser."""

from __future__ import annotations

import argparse
import functools
import importlib.util
import operator
import re
import runpy
import shlex
from contextlib import suppress
from itertools import dropwhile
from pathlib import Path
from string import Template

import mmdet
import mmseg
import pytest
from docs_blocks import PAGES, ROOT, Block, blocks
from mmengine.config import Config

SHELL = ('shell', 'indented', 'inline')
SHOWN = ('', 'text', 'math')  # formulas, drawings, what a program prints
PATTERN = '{student}_{teacher}_{schedule}'  # of config names, in a block of its own
# Third-party programs, whose arguments nothing here can parse, and the shell's.
FOREIGN = ('csCreateTrainIdLabelImgs', 'git', 'pip', 'tar', 'tensorboard', 'wandb')
FOREIGN += ('mkdir', 'ln', 'cd')
# What the scripts for several GPUs pass on: `tests/reliability` runs them.
SCRIPTS = {'tools/dist_train.sh': (0, 2), 'tools/slurm_train.sh': (2, 4)}


def is_command(block: Block) -> bool:
    """Code within a sentence is a command only if it has arguments."""
    if block.language != 'inline':
        return block.language in SHELL and PATTERN not in block.code
    words = re.sub(r'^(\w+=\S* )+', '', block.code)
    names = '|'.join(('python', 'make', *FOREIGN, r'tools/[\w/]+\.(py|sh)'))
    return bool(re.match(rf'({names}) \S', words))


ALL = [block for page in PAGES for block in blocks(page)]
COMMANDS = [block for block in ALL if is_command(block)]
# equal ones in sentences, such as `make env`, only once
DISTINCT = {b.code if b.language == 'inline' else str(b): b for b in COMMANDS}.values()


def test_every_block_is_known():
    known = (*SHELL, *SHOWN, 'python')
    assert not [str(block) for block in ALL if block.language not in known]
    shown = [block for block in ALL if block.language in SHOWN]
    start = re.compile(r'^(\$ |python |pip |make |tools/)', re.M)
    hidden = [str(block) for block in shown if start.search(block.code)]
    assert not hidden, 'These blocks hold commands: their language is `shell`.'


def words_of(block: Block) -> list[list[str]]:
    """The commands of a block, each as its words."""
    page = '\n'.join(b.code for b in COMMANDS if b.page == block.page)
    variables = dict(re.findall(r'^([A-Z]+)=(\S+)$', page, re.M))
    text = Template(block.code.replace('\\\n', ' ')).safe_substitute(variables)
    text = re.sub(r'\bN\b', '1', text)  # a sentence can write N for a number
    found = []
    for line in re.split(r'\n|&&', text):
        words = shlex.split(line, comments=True)
        found.append([*dropwhile(re.compile(r'\w+=').match, words)])
    return [words for words in found if words]


class Parsed(Exception):
    """A program has read its arguments and is about to start."""


@pytest.mark.parametrize('block', DISTINCT, ids=str)
def test_the_program_accepts_the_arguments(block, monkeypatch, capsys):
    monkeypatch.syspath_prepend(ROOT / 'tools')
    for program, *args in words_of(block):
        try:
            check(program, args, monkeypatch)
        except SystemExit:
            pytest.fail(f'{block}: {" ".join(args)}\n{capsys.readouterr().err}')


def check(program: str, args: list[str], monkeypatch) -> None:
    if program == 'make':
        text = (ROOT / 'Makefile').read_text()
        for arg in args:
            variable, _, value = arg.partition('=')
            known = rf'\$\({variable}\)' if value else rf'^{arg}:'
            assert re.search(known, text, re.M), f'the Makefile does not know {arg}'
    elif program == 'torchrun':
        from torch.distributed.run import get_args_parser

        read = get_args_parser().parse_args(args)
        check(read.training_script, read.training_script_args, monkeypatch)
    elif program in SCRIPTS:
        config, rest = SCRIPTS[program]
        assert len(args) >= rest
        check('tools/train.py', [args[config], *args[rest:]], monkeypatch)
    elif Path(program).name in ('python', 'python3'):
        if args[0] == '-c':
            compile(args[1], 'code', 'exec')
        else:
            program, *args = args[args[0] == '-m' :]
            check(program, args, monkeypatch)
    elif program not in FOREIGN:
        parse(names_of(program), [program, *args], monkeypatch)


def names_of(program: str) -> dict:
    """The names in a script, or in the module that follows `python -m`."""
    if program.endswith('.py'):
        library = {'mmdet/': mmdet, 'mmseg/': mmseg}.get(program[:6])
        root = Path(library.__file__).parents[1] if library else ROOT
        return runpy.run_path(str(root / program))
    is_package = importlib.util.find_spec(program).submodule_search_locations
    name = f'{program}.__main__' if is_package else program
    return vars(importlib.import_module(name))


def parse(names: dict, argv: list[str], monkeypatch) -> None:
    """Call the main function of a program, which stops once the arguments are read."""
    if 'argparse' not in names:
        assert len(argv) == 1, f'{argv[0]} takes no arguments'
        return
    original = argparse.ArgumentParser.parse_args
    read = []

    def parse_args(*args, **kwargs):
        read.append(original(*args, **kwargs))
        raise Parsed

    with monkeypatch.context() as patch, suppress(Parsed):
        patch.setattr(argparse.ArgumentParser, 'parse_args', parse_args)
        patch.setattr('sys.argv', argv)
        names['main']()
    (namespace,) = read
    for value in map(str, vars(namespace).values()):
        if value.startswith('configs/'):
            config = Config.fromfile(ROOT / value)
            for key in getattr(namespace, 'cfg_options', None) or {}:
                # it must exist, or nothing would read it
                functools.reduce(operator.getitem, key.split('.'), config)
