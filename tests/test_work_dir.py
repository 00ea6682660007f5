"""Resuming an earlier run: from its last whole checkpoint, with the same config."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from torch import nn

from mmdist.work_dir import check_fits, last_whole_checkpoint, refuse_other_config

REPO = Path(__file__).parents[1]
CONFIG = "model = dict(type='A', size=(1, 2), none=None)\nwork_dir = 'here'\n"


def save(folder: Path, iteration: int, cut: int = 0, **content) -> Path:
    """Save a checkpoint like mmengine's, ``cut`` bytes short; later ones are newer."""
    content = content or dict(
        meta=dict(iter=iteration), state_dict=nn.Linear(2, 3).state_dict(),
        message_hub={},
    )  # fmt: skip
    path = folder / f'iter_{iteration}.pth'
    torch.save(content, path)
    if cut:
        path.write_bytes(path.read_bytes()[:-cut])
    os.utime(path, (iteration, iteration))
    return path


def test_the_last_is_the_one_that_is_named(tmp_path):
    for i in (1, 2, 3):
        path = save(tmp_path, i)
    assert last_whole_checkpoint(tmp_path)[0] == str(path)
    (tmp_path / 'last_checkpoint').write_text('elsewhere/iter_2.pth')
    path, checkpoint = last_whole_checkpoint(tmp_path)
    assert (Path(path).name, checkpoint['meta']['iter']) == ('iter_2.pth', 2)


@pytest.mark.parametrize('note', ['iter_3.pth', 'iter_9.pth', '', None])
def test_what_is_cut_off_is_passed_over_and_named(tmp_path, capsys, note):
    """Also if ``last_checkpoint`` is empty, missing, or names a file that is gone."""
    save(tmp_path, 1)
    save(tmp_path, 2)
    save(tmp_path, 3, cut=200)
    if note is not None:
        (tmp_path / 'last_checkpoint').write_text(note)
    path, _ = last_whole_checkpoint(tmp_path)
    assert path.endswith('iter_2.pth')
    printed = capsys.readouterr().out
    assert "Skipped: The checkpoint '" in printed
    assert "iter_3.pth' cannot be read: it is damaged, truncated" in printed


NO_CHECKPOINTS = dict(
    a_list=lambda path: torch.save([1], path),
    no_weights=lambda path: torch.save(dict(state_dict=None), path),
    weights=lambda path: torch.save(dict(state_dict={}), path),
    no_meta=lambda path: torch.save(
        dict(meta=None, message_hub={}, state_dict={}), path
    ),
    a_text=lambda path: path.write_text('hello'),
    a_link_to_nothing=lambda path: path.symlink_to('nowhere'),
    a_folder=lambda path: path.mkdir(),
)


@pytest.mark.parametrize('kind', NO_CHECKPOINTS)
def test_what_is_no_checkpoint_is_passed_over_and_named(tmp_path, capsys, kind):
    NO_CHECKPOINTS[kind](tmp_path / 'odd.pth')
    assert last_whole_checkpoint(tmp_path) is None
    if kind not in ('weights', 'no_meta'):  # these are skipped silently
        assert re.search(r"Skipped: .*odd\.pth'", capsys.readouterr().out)
    save(tmp_path, 1)
    (tmp_path / 'last_checkpoint').write_bytes(b'\xff\xfe\x00')
    assert last_whole_checkpoint(tmp_path)[0].endswith('iter_1.pth')


def test_nothing_to_resume_from_and_nothing_whole(tmp_path):
    assert last_whole_checkpoint(tmp_path) is None
    assert last_whole_checkpoint(tmp_path / 'nowhere') is None
    save(tmp_path, 1, cut=200)
    with pytest.raises(RuntimeError, match=r'can be read.*iter_1.pth.*--resume PATH'):
        last_whole_checkpoint(tmp_path)


def test_another_config_is_refused_by_what_differs():
    earlier = dict(meta=dict(cfg=Config.fromstring(CONFIG, '.py').pretty_text))
    same = Config.fromstring(CONFIG.replace('here', 'there'), '.py')
    refuse_other_config(same, earlier, 'a.pth')
    other = Config.fromstring(CONFIG.replace("'A'", "'B'") + 'lr = 1', '.py')
    with pytest.raises(RuntimeError, match=r'these differ: lr, model.*--work-dir'):
        refuse_other_config(other, earlier, 'a.pth')


@pytest.mark.parametrize(
    'text', ['a = (', 'a=1\0', f'a = {"(" * 300}', f'a = {"-" * 10**5}1', 'a = {[]: 1}']
)
def test_the_config_in_a_checkpoint_is_not_run(tmp_path, text):
    """It can come from anybody and contain anything."""
    trace = tmp_path / 'ran'
    code = f"x = __import__('os').mkdir({str(trace)!r})\n"
    earlier = dict(meta=dict(cfg=CONFIG + code + text))
    with pytest.raises(RuntimeError, match=r'these differ: .*x\)'):
        refuse_other_config(Config.fromstring(CONFIG, '.py'), earlier, 'a.pth')
    assert not trace.exists()
    for odd in (5, None, ''):
        refuse_other_config(
            Config.fromstring(CONFIG, '.py'), dict(meta=dict(cfg=odd)), 'a.pth'
        )


def test_equal_settings_are_equal_however_they_are_broken_into_lines():
    same = Config.fromfile(
        REPO / 'configs/det/quickstart/dist_retinanet_w32-w16_digits.py'
    )
    text = same.pretty_text
    for earlier in (text, text.replace('(', '(\n    '), text.replace(',\n    ', ', ')):
        refuse_other_config(same, dict(meta=dict(cfg=earlier)), 'a.pth')
        with pytest.raises(RuntimeError, match=r'with this config, and its run would'):
            refuse_other_config(same, dict(meta=dict(cfg=earlier)), 'a.pth', True)


def test_another_model_is_not_resumed():
    state = nn.Linear(2, 3).state_dict()
    check_fits(nn.Linear(2, 3), dict(state_dict=state), 'a.pth')
    with pytest.raises(
        RuntimeError, match=r'weight.*\[3, 2\].*\[4, 2\].*\n.*\nThe run'
    ):
        check_fits(nn.Linear(2, 4), dict(state_dict=state), 'a.pth')
    with pytest.raises(RuntimeError, match=r'1 in the file, but not .*\n +bias'):
        check_fits(nn.Linear(2, 3, bias=False), dict(state_dict=state), 'a.pth')
    with pytest.raises(RuntimeError, match=r'weight.*received <class .int.>'):
        check_fits(nn.Linear(2, 3), dict(state_dict=dict(weight=1, bias='x')), 'a.pth')
