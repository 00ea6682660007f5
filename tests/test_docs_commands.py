"""Every command and every piece of Python in README and docs does what the page says.

Bash reads a command, with recorders in place of the programs; the programs' own parsers
read what was recorded. Python is executed. A config is built as a small model; what is
not complete is merged into one. Code that another test runs is listed in `RUN_BY`. A
block that fits nowhere is an error.
"""

from __future__ import annotations

import argparse
import ast
import importlib.util
import itertools
import json
import re
import shutil
import subprocess
import sys
import textwrap
from contextlib import suppress
from pathlib import Path
from types import ModuleType

import mmdet
import mmseg
import pytest
import torch
from det_zoo import FAMILIES, batch, build_pair
from docs_blocks import (
    PAGES,
    ROOT,
    Block,
    blocks,
    code,
    inline_code,
    only,
    replace_teacher,
    small,
)
from mmdet.utils import register_all_modules as register_mmdet
from mmengine.config import Config
from mmengine.registry import HOOKS, DefaultScope
from mmseg.utils import register_all_modules as register_mmseg
from segmentors import calibrate, make_batch, zoo_model

from mmdist.registry import MODELS
from mmdist.teachers.classes import class_names_of_config

SHELL = ('shell', 'bash', 'sh', 'console', 'indented', 'inline')
SHOWN = ('', 'text', 'math', 'mermaid')  # formulas, drawings, what a program prints
# Page, words of the blocks, and the test that runs them.
RUN_BY = [
    ('README.md', 'retinanet_r18_fpn_1x_coco.py', 'test_readme_pair.py'),
    ('docs/logging.md', 'vis_backends', 'test_docs_logging.py'),
    ('docs/own_comparison.md', 'Centerness', 'test_docs_own_comparison.py'),
    ('docs/teachers.md', 'mmdist.Distiller', 'test_docs_teachers.py'),
    ('docs/teachers.md', 'class TorchvisionRetinaNet', 'test_docs_teachers.py'),
    ('docs/unlabelled.md', 'mmdist.MixedSampler', 'datasets/test_unlabelled_images.py'),
    ('docs/use_the_student.md', 'DetInferencer', 'tools/test_use_the_student.py'),
    ('docs/use_the_student.md', 'MMSegInferencer', 'tools/test_use_the_student.py'),
    ('docs/use_the_student.md', 'onnxruntime', 'tools/test_use_the_student.py'),
]
# Page, and words of an indented block that is no command: with the reason.
NO_COMMAND = [
    ('docs/model_zoo.md', '{student}_{teacher}_{schedule}', 'a pattern of names'),
]
# Programs that are not mmdist's, whose arguments nothing here can read.
FOREIGN = {
    'csCreateTrainIdLabelImgs': 'of cityscapesscripts',
    'git': 'about the checkout, in the checklist of a release',
    'tar': 'unpacks what another command has written',
    'tensorboard': 'an option of the user',
    'wandb': 'an option of the user',
}
RECORDED = ('python', 'python3', 'pip', 'make', 'torchrun', 'srun', *FOREIGN)
SYSTEM = ('bash', 'dirname', 'env', 'ln', 'mkdir', 'sh')
RECORDER = f"""#!{sys.executable} -S
import json, os, sys
with open(os.environ['RECORD'], 'a') as file:
    file.write(json.dumps([os.path.basename(sys.argv[0]), *sys.argv[1:]]) + '\\n')
if sys.argv[1:2] == ['clone']:
    os.makedirs(sys.argv[-1].split('://')[-1], exist_ok=True)
"""
# The pair that a `distill` is tried on, by the first of these types that is in it.
PAIRS = {
    'BoxDistributions': ('GFL', 'GFL'),
    'Masks': ('Mask R-CNN', 'Cascade Mask R-CNN'),
    'RoILogits': ('Faster R-CNN', 'Cascade R-CNN'),
    'QueryLogits': ('Sparse R-CNN', 'Sparse R-CNN'),
    'Detections': ('RetinaNet', 'Faster R-CNN'),
    'mmdist.': ('RetinaNet', 'RetinaNet'),
}


def is_command(text: str) -> bool:
    """Whether a piece of code within a sentence is a command with its arguments."""
    words = re.sub(r'^(\w+=\S* )+', '', text)
    return bool(re.match(rf'({"|".join(RECORDED)}|tools/\w+\.(py|sh)) \S', words))


def has_test(block: Block) -> bool:
    return any(page == block.page and words in block.code for page, words, _ in RUN_BY)


def is_no_command(block: Block) -> bool:
    return any(p == block.page and words in block.code for p, words, _ in NO_COMMAND)


ALL = [block for page in PAGES for block in blocks(page)]
COMMANDS = [b for b in ALL if b.language in SHELL and not is_no_command(b)]
COMMANDS += [b for page in PAGES for b in inline_code(page) if is_command(b.code)]
PYTHON = [block for block in ALL if block.language == 'python']


def test_every_block_is_known():
    known = (*SHELL, *SHOWN, 'python')
    unknown = [f'{b}: {b.language}' for b in ALL if b.language not in known]
    assert not unknown, 'No test knows what to do with these blocks.'
    hidden = [
        str(block)
        for block in ALL
        if block.language in SHOWN
        and re.search(r'^(\$ |python |pip |make |tools/)', block.code, re.M)
    ]
    assert not hidden, 'These blocks hold commands: their language is `shell`.'


def test_every_exception_is_still_in_the_pages():
    for page, words, test in RUN_BY:
        assert [b for b in PYTHON if b.page == page and words in b.code], words
        text = (ROOT / 'tests' / test).read_text()
        assert f"'{page}'" in text, f'{test} does not read {page}'
    for page, words, _ in NO_COMMAND:
        assert only([b.code for b in ALL if b.page == page], words)
    recorded = ' '.join(b.code for b in COMMANDS)
    assert all(program in recorded for program in FOREIGN)


# ---- commands


class Parsed(Exception):
    """A program has read its arguments and is about to start."""


@pytest.fixture
def checkout(tmp_path) -> Path:
    """What a user sees around the commands, with recorders in place of programs."""
    folder = tmp_path / 'checkout'
    programs = folder / 'programs'
    programs.mkdir(parents=True)
    for name in RECORDED:
        (programs / name).write_text(RECORDER)
        (programs / name).chmod(0o755)
    for name in SYSTEM:
        (programs / name).symlink_to(shutil.which(name))
    (folder / '.venv/bin').mkdir(parents=True)
    (folder / '.venv/bin/python').symlink_to(programs / 'python')
    for name in ('configs', 'tools', 'study', 'benchmarks'):
        (folder / name).symlink_to(ROOT / name)
    (folder / 'mmdist').mkdir()  # as an archive of the checkout unpacks
    (folder / 'mmdist/tools').symlink_to(ROOT / 'tools')
    for library in (mmdet, mmseg):  # as it lies below site-packages
        (folder / library.__name__).symlink_to(Path(library.__file__).parent)
    return folder


def recorded(text: str, checkout: Path) -> list[list[str]]:
    """The programs that a shell would start, each with its arguments."""
    record = checkout / 'record.jsonl'
    record.write_text('')
    environ = {'PATH': str(checkout / 'programs'), 'RECORD': str(record)}
    command = ['bash', '-euc', text]
    done = subprocess.run(
        command, cwd=checkout, env=environ, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return [json.loads(line) for line in record.read_text().splitlines()]


def shell_text(block: Block) -> str:
    """The commands of a block, with the variables that the page has set before."""
    if block.language == 'console':
        lines = re.findall(r'^\$ (.*)', block.code, re.M)
        assert lines, 'a console block without a prompt'
        return '\n'.join(lines)
    before = [b.code for b in COMMANDS if b.page == block.page and b.line < block.line]
    variables = re.findall(r'^[A-Z]+=\S+$', '\n'.join(before), re.M)
    text = block.code
    if block.language == 'inline':
        # a sentence may omit Python, and say N for a number
        text = re.sub(r'^((?:\w+=\S* )*)(tools/\w+\.py)', r'\1python \2', text)
        text = re.sub(r'\bN\b', '1', text)
    return '\n'.join([*variables, text])


@pytest.mark.parametrize('block', COMMANDS, ids=str)
def test_the_program_accepts_the_arguments(block, checkout, monkeypatch, capsys):
    calls = recorded(shell_text(block), checkout)
    assert calls or block.code.startswith('mkdir')
    for call in calls:
        try:
            check(call, checkout, monkeypatch)
        except SystemExit:
            pytest.fail(f'{block}: {" ".join(call)}\n{capsys.readouterr().err}')


def check(call: list[str], checkout: Path, monkeypatch) -> None:
    program, *args = call
    if program in FOREIGN:
        return
    if program == 'make':
        make(*args)
    elif program == 'pip':
        pip(args)
    elif program == 'torchrun':
        from torch.distributed.run import get_args_parser

        args = get_args_parser().parse_args(args)
        script = [args.training_script, *args.training_script_args]
        python(script, checkout, monkeypatch)
    elif program == 'srun':
        python(args[args.index('python') + 1 :], checkout, monkeypatch)
    else:
        python(args, checkout, monkeypatch)


def make(*args: str) -> None:
    """The Makefile has the targets and reads the variables."""
    text = (ROOT / 'Makefile').read_text()
    for arg in args:
        variable, _, value = arg.partition('=')
        known = rf'\$\({variable}\)' if value else rf'^{arg}:'
        assert re.search(known, text, re.M), f'the Makefile does not know {arg}'


def pip(args: list[str]) -> None:
    # in a process of its own: where pip is imported, setuptools gives up its distutils,
    # which torch.compile needs
    code = (
        'import sys; from pip._internal.commands import create_command; '
        'create_command(sys.argv[1]).parse_args(sys.argv[2:])'
    )
    command = [sys.executable, '-c', code, *args]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def python(args: list[str], checkout: Path, monkeypatch) -> None:
    """Let a script or a module read its arguments."""
    if args[0] == '-u':
        args = args[1:]
    if args[0] == '-c':
        compile(args[1], 'code', 'exec')
    elif args[:2] == ['-m', 'pip']:
        pip(args[2:])
    elif args[0] == '-m':
        module = importlib.import_module(f'{args[1]}.__main__')
        parse(module, args[1:], monkeypatch)
    else:
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
    values = [v for v in vars(namespace).values() if isinstance(v, str | Path)]
    for value in map(str, values):
        if value.startswith('configs/'):
            assert (ROOT / value).is_file(), f'there is no {value}'
            options = getattr(namespace, 'cfg_options', None) or {}
            settings_exist(Config.fromfile(ROOT / value), options)


def settings_exist(config: Config, options: dict) -> None:
    """What `--cfg-options` sets is there already: nothing else would read it."""
    for key in options:
        value = config
        for part in key.split('.'):
            assert part in value, f'the config has no {key}'
            value = value[part]


def test_another_test_runs_each_tool():
    """Here its arguments are read, and no more."""
    named = re.findall(r'\btools/(\w+\.(?:py|sh))', ' '.join(b.code for b in COMMANDS))
    assert len(set(named)) > 10
    tests = [p.read_text() for p in (ROOT / 'tests').rglob('test_*.py')]
    tests.remove(Path(__file__).read_text())
    for tool in set(named):
        words = rf"\b{tool}|import {Path(tool).stem}\b|'{Path(tool).stem}'"
        assert any(re.search(words, text) for text in tests), tool


# ---- Python


def title(block: Block) -> str:
    return str(block).replace('docs/', '')


@pytest.mark.parametrize(
    'block', [block for block in PYTHON if not has_test(block)], ids=title
)
def test_python_runs_and_configs_are_built(block, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = textwrap.dedent(block.code)
    if is_config(text):
        build(text, tmp_path)
    else:
        exec(compile(text, str(block), 'exec'), {'__name__': '__main__'})


def is_config(text: str) -> bool:
    """Whether it has settings alone, as a file of them or as arguments of a dict."""
    try:
        body = ast.parse(text).body
    except SyntaxError:
        return True  # arguments, which end in a comma
    names = [node.targets[0] for node in body if isinstance(node, ast.Assign)]
    return len(names) == len(body) and all(isinstance(n, ast.Name) for n in names)


def build(text: str, folder: Path) -> None:
    """Build what a config makes; what it leaves out is that of a small pair."""
    register_mmdet(init_default_scope=False)
    register_mmseg(init_default_scope=False)
    Path('my_pair.py').write_text(only(code('README.md'), '_base_'))
    if text.strip().endswith(','):
        text = f'globals().update(dict(\n{text}\n))'  # arguments
    Path('config.py').write_text(text)
    config = Config.fromfile('config.py')
    if 'model' in config:
        is_built(config, folder)
    else:
        strange = set(config) - {'distill', 'custom_hooks'}
        assert config and not strange, f'nobody knows where {strange} belong'
    for hook in config.get('custom_hooks', []):
        HOOKS.build(hook)
    if 'distill' in config:
        takes_a_step(config.distill)


def takes_a_step(distill: dict) -> None:
    """A `distill` gives each of its losses for a pair of its kind."""
    types = str(distill)
    if 'SegLogits' in types:
        with DefaultScope.overwrite_default_scope('mmseg'):
            model = segmentor(distill)
        data = make_batch(19)
    else:
        student, teacher = next(pair for kind, pair in PAIRS.items() if kind in types)
        model = build_pair(
            FAMILIES[student], FAMILIES[teacher], distill, factors=(8, 8)
        )
        data = batch(model)
    losses = model(**data, mode='loss')
    for name in distill:
        found = [v for k, v in losses.items() if re.match(rf'loss_{name}(_|$)', k)]
        assert found
        values = itertools.chain(*(v if isinstance(v, list) else [v] for v in found))
        assert all(value.isfinite().all() for value in values)


def segmentor(distill: dict) -> torch.nn.Module:
    """A small DeepLabV3 that learns from another."""
    student, teacher = (zoo_model('deeplabv3/deeplabv3_r18') for _ in range(2))
    guest = dict(config=teacher, allow_random=True)
    model = MODELS.build(
        dict(type='mmdist.Distiller', student=student, teacher=guest, distill=distill)
    )
    model.init_weights()
    calibrate(model.teacher.model)
    return model.train()


def is_built(config: Config, folder: Path) -> None:
    """A complete config makes a distilled student."""
    scope, names = config.default_scope, class_names_of_config(config)
    config.model.student = small(config.model.student, scope)
    teachers = config.model.get('teachers', {'': config.model.get('teacher')})
    for teacher in teachers.values():
        replace_teacher(teacher, names, scope, folder)
    with DefaultScope.overwrite_default_scope(scope):
        model = MODELS.build(config.model)
        model.init_weights()
    assert model.teachers
