"""Every command in README and docs is accepted by its program.

Bash runs a command with recorders in place of the programs, whose own parsers then read
what was recorded. A block of another kind is an error.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import operator
import re
import shutil
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from types import ModuleType

import mmdet
import mmseg
import pytest
from docs_blocks import PAGES, ROOT, Block, blocks
from mmengine.config import Config

SHELL = ('shell', 'bash', 'sh', 'indented', 'inline')
SHOWN = ('', 'text', 'math', 'mermaid')  # formulas, drawings, what a program prints
PATTERN = '{student}_{teacher}_{schedule}'  # of config names, in a block of its own
# Third-party programs, whose arguments nothing here can parse.
FOREIGN = ('csCreateTrainIdLabelImgs', 'git', 'pip', 'tar', 'tensorboard', 'wandb')
RECORDED = ('python', 'python3', 'make', 'torchrun', 'srun', *FOREIGN)
RECORDER = f"""#!{shutil.which('bash')}
IFS=$'\\x1f'; echo "${{0##*/}}$IFS$*" >> "$RECORD"
[[ ${{1-}} == clone ]] && mkdir -p "${{@: -1}}"
exit 0
"""


def is_command(block: Block) -> bool:
    """Code within a sentence is a command only if it has arguments."""
    if block.language != 'inline':
        return block.language in SHELL and PATTERN not in block.code
    words = re.sub(r'^(\w+=\S* )+', '', block.code)
    return bool(re.match(rf'({"|".join(RECORDED)}|tools/[\w/]+\.(py|sh)) \S', words))


ALL = [block for page in PAGES for block in blocks(page)]
COMMANDS = [block for block in ALL if is_command(block)]
# equal ones in sentences, such as `make env`, only once
DISTINCT = {b.code if b.language == 'inline' else str(b): b for b in COMMANDS}.values()


def test_every_block_is_known():
    known = (*SHELL, *SHOWN, 'python')
    unknown = [f'{b}: {b.language}' for b in ALL if b.language not in known]
    assert not unknown, 'No test knows what to do with these blocks.'
    shown = [block for block in ALL if block.language in SHOWN]
    start = re.compile(r'^(\$ |python |pip |make |tools/)', re.M)
    hidden = [str(block) for block in shown if start.search(block.code)]
    assert not hidden, 'These blocks hold commands: their language is `shell`.'


class Parsed(Exception):
    """A program has read its arguments and is about to start."""


@pytest.fixture
def checkout(tmp_path) -> Path:
    """A user's working directory, with recorders in place of programs."""
    programs = tmp_path / 'checkout' / 'programs'
    programs.mkdir(parents=True)
    for name in RECORDED:
        (programs / name).write_text(RECORDER)
        (programs / name).chmod(0o755)
    for name in ('bash', 'dirname', 'env', 'ln', 'mkdir', 'sh'):
        (programs / name).symlink_to(shutil.which(name))
    folder = programs.parent
    (folder / '.venv/bin').mkdir(parents=True)
    (folder / '.venv/bin/python').symlink_to(programs / 'python')
    for name in ('configs', 'tools', 'study', 'benchmarks'):
        (folder / name).symlink_to(ROOT / name)
    (folder / 'mmdist').mkdir()  # as an archive of the checkout unpacks
    (folder / 'mmdist/tools').symlink_to(ROOT / 'tools')
    for library in (mmdet, mmseg):  # as it lies below site-packages
        (folder / library.__name__).symlink_to(Path(library.__file__).parent)
    return folder


def recorded(block: Block, checkout: Path) -> list[list[str]]:
    """The programs that a shell would start, each with its arguments."""
    record = checkout / 'record'
    record.write_text('')
    # with the variables that the page has set earlier
    before = [b.code for b in COMMANDS if b.page == block.page and b.line < block.line]
    text = '\n'.join(re.findall(r'^[A-Z]+=\S+$', '\n'.join(before), re.M))
    if block.language == 'inline':
        # a sentence can omit `python`, and write N for a number
        code = re.sub(r'^((?:\w+=\S* )*)(tools/\S+\.py)', r'\1python \2', block.code)
        text += '\n' + re.sub(r'\bN\b', '1', code)
    else:
        text += '\n' + block.code
    environ = {'PATH': str(checkout / 'programs'), 'RECORD': str(record)}
    command = ['bash', '-euc', text]
    done = subprocess.run(
        command, cwd=checkout, env=environ, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return [line.split('\x1f') for line in record.read_text().splitlines()]


@pytest.mark.parametrize('block', DISTINCT, ids=str)
def test_the_program_accepts_the_arguments(block, checkout, monkeypatch, capsys):
    calls = recorded(block, checkout)
    assert calls or block.code.startswith('mkdir')
    for program, *args in calls:
        try:
            check(program, args, checkout, monkeypatch)
        except SystemExit:
            pytest.fail(f'{block}: {" ".join(args)}\n{capsys.readouterr().err}')


def check(program: str, args: list[str], checkout: Path, monkeypatch) -> None:
    if program == 'make':
        text = (ROOT / 'Makefile').read_text()
        for arg in args:
            variable, _, value = arg.partition('=')
            known = rf'\$\({variable}\)' if value else rf'^{arg}:'
            assert re.search(known, text, re.M), f'the Makefile does not know {arg}'
    elif program == 'torchrun':
        from torch.distributed.run import get_args_parser

        read = get_args_parser().parse_args(args)
        script = [read.training_script, *read.training_script_args]
        python(script, checkout, monkeypatch)
    elif program == 'srun':
        python(args[args.index('python') + 1 :], checkout, monkeypatch)
    elif program not in FOREIGN:
        python(args, checkout, monkeypatch)


def python(args: list[str], checkout: Path, monkeypatch) -> None:
    """Let a script or a module read its arguments."""
    args = args[args[0] == '-u' :]
    if args[0] == '-c':
        compile(args[1], 'code', 'exec')
    elif args[0] == '-m' and args[1] != 'pip':
        is_package = importlib.util.find_spec(args[1]).submodule_search_locations
        name = f'{args[1]}.__main__' if is_package else args[1]
        parse(importlib.import_module(name), args[1:], monkeypatch)
    elif args[0] != '-m':
        script = checkout / args[0]
        assert script.is_file(), f'there is no {args[0]}'
        monkeypatch.syspath_prepend(script.resolve().parent)
        name = f'a_page_runs_{script.stem}'
        spec = importlib.util.spec_from_file_location(name, script)
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, name, module)
        spec.loader.exec_module(module)
        parse(module, args, monkeypatch)


def parse(module: ModuleType, argv: list[str], monkeypatch) -> None:
    """Call the main function of a module, which stops once the arguments are read."""
    if not hasattr(module, 'argparse'):
        assert len(argv) == 1, f'{argv[0]} takes no arguments'
        return
    original = argparse.ArgumentParser.parse_args
    read = []

    def parse_args(*args, **kwargs):
        read.append(original(*args, **kwargs))
        raise Parsed

    with monkeypatch.context() as patch, suppress(Parsed):
        patch.setattr(argparse.ArgumentParser, 'parse_args', parse_args)
        patch.setattr(sys, 'argv', argv)
        module.main()
    (namespace,) = read
    for value in map(str, vars(namespace).values()):
        if value.startswith('configs/'):
            config = Config.fromfile(ROOT / value)
            for key in getattr(namespace, 'cfg_options', None) or {}:
                # it must exist, or nothing would read it
                functools.reduce(operator.getitem, key.split('.'), config)
