"""What an earlier run left: the last whole checkpoint, and nothing mixed."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from torch import nn

from mmdist.work_dir import check_fits, last_whole_checkpoint, refuse_other_config

REPO = Path(__file__).parents[1]
CONFIG = "model = dict(type='A', size=(1, 2), none=None)\nwork_dir = 'here'\n"


def save(folder: Path, iteration: int, cut: int = 0, **content) -> Path:
    """A checkpoint as mmengine's, ``cut`` bytes short; later ones are newer."""
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
    """Also if killed while ``last_checkpoint`` was written, or its file is gone."""
    save(tmp_path, 1)
    save(tmp_path, 2)
    save(tmp_path, 3, cut=200)
    if note is not None:
        (tmp_path / 'last_checkpoint').write_text(note)
    path, _ = last_whole_checkpoint(tmp_path)
    assert path.endswith('iter_2.pth')
    printed = capsys.readouterr().out
    assert "Passed over: The checkpoint '" in printed
    assert "iter_3.pth' cannot be read: it is damaged, cut off" in printed


def test_weights_alone_are_not_resumed_from(tmp_path):
    save(tmp_path, 1)
    save(tmp_path, 2, state_dict={})
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


def test_the_config_in_a_checkpoint_is_not_run(tmp_path):
    """It may come from anybody."""
    trace = tmp_path / 'ran'
    code = f"x = __import__('os').mkdir({str(trace)!r})\n"
    earlier = dict(meta=dict(cfg=CONFIG + code))
    with pytest.raises(RuntimeError, match=r'these differ: x\)'):
        refuse_other_config(Config.fromstring(CONFIG, '.py'), earlier, 'a.pth')
    assert not trace.exists()


def test_equal_settings_are_equal_in_any_text():
    written = 'a = {"b": [1, (2.0, None)], "c": dict(d=-1)}\nb = float("inf")\n'
    earlier = dict(meta=dict(cfg=written.replace('dict(d=-1)', '{"d": -1}')))
    cfg = Config(dict(a=dict(c=dict(d=-1), b=[1, (2.0, None)])))
    with pytest.raises(RuntimeError, match=r'these differ: b\)'):
        refuse_other_config(cfg, earlier, 'a.pth')
    same = Config.fromfile(
        REPO / 'configs/det/quickstart/dist_retinanet_w32-w16_digits.py'
    )
    refuse_other_config(same, dict(meta=dict(cfg=same.pretty_text)), 'a.pth')


def test_another_model_is_not_resumed():
    state = nn.Linear(2, 3).state_dict()
    check_fits(nn.Linear(2, 3), dict(state_dict=state), 'a.pth')
    with pytest.raises(RuntimeError, match=r'weight: \(3, 2\) in the file, \(4, 2\)'):
        check_fits(nn.Linear(2, 4), dict(state_dict=state), 'a.pth')
    with pytest.raises(RuntimeError, match=r'bias: \(3,\) in the file, missing in'):
        check_fits(nn.Linear(2, 3, bias=False), dict(state_dict=state), 'a.pth')
