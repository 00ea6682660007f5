"""Over many steps nothing grows, and recorded tensors are released at once."""

from __future__ import annotations

import gc
import os
import weakref

import pytest
import torch
from builders import slow
from mmengine.runner import Runner
from watch import WatchHook

from mmdist.record import Recorder

MB = 2**20


def usage() -> dict[str, int]:
    """What this process holds: bytes of memory, open files and tensors."""
    gc.collect()
    with open('/proc/self/statm') as file:
        resident = int(file.read().split()[1]) * os.sysconf('SC_PAGE_SIZE')
    return dict(
        memory=resident,
        files=len(os.listdir('/proc/self/fd')),
        tensors=sum(issubclass(type(x), torch.Tensor) for x in gc.get_objects()),
    )


@pytest.mark.skipif(not os.path.exists('/proc/self/statm'), reason='reads /proc')
@pytest.mark.slow
def test_nothing_grows(make_config, train, tmp_path, monkeypatch, steps=2000):
    """All kinds of terms, on images of 32x32; takes three minutes."""

    def look(runner, outputs):
        if runner.iter + 1 in (100, steps):
            return usage()

    monkeypatch.setattr(WatchHook, 'after', look)
    cfg = make_config(
        'seg',
        tmp_path,
        train_cfg=dict(max_iters=steps, val_interval=10**9),
        default_hooks=dict(logger=dict(interval=50), checkpoint=dict(interval=10**9)),
        **{
            'model.student.data_preprocessor.size': (32, 32),
            'model.distill': dict(
                dist=dict(type='mmdist.SegLogits'),
                mimic=dict(type='mmdist.Features', student='backbone', adapt=True),
            ),
        },
    )
    cfg.train_dataloader.dataset.pipeline.insert(
        2, dict(type='Resize', scale=(32, 32), keep_ratio=False)
    )
    _, watch = train(cfg)
    early, late = (seen for seen in watch.seen if seen)
    assert late['tensors'] == early['tensors']
    assert late['files'] == early['files']
    # the allocator's noise is a few MB; one kept step is 1 MB or more
    assert late['memory'] < early['memory'] + 16 * MB


@pytest.mark.parametrize('family', ['det', *slow(['seg'])])
def test_recorded_tensors_die_with_their_step(
    make_config, tmp_path, monkeypatch, family
):
    """By reference counts alone: no cycle leaves them to the garbage collector."""
    recorded = []
    leave = Recorder.__exit__

    def leave_and_note(self, *exc_info):
        leave(self, *exc_info)
        for _, call in self._calls:
            outputs = call.output
            while isinstance(outputs, (tuple, list)):
                outputs = outputs[0]
            recorded.append(weakref.ref(outputs))

    alive = []
    monkeypatch.setattr(Recorder, '__exit__', leave_and_note)
    monkeypatch.setattr(
        WatchHook, 'before_train_iter',
        lambda *_, **__: alive.append(sum(ref() is not None for ref in recorded)),
    )  # fmt: skip
    cfg = make_config(family, tmp_path)
    runner = Runner.from_cfg(cfg)
    gc.collect()
    gc.disable()
    try:
        runner.train()
    finally:
        gc.enable()
    assert len(recorded) >= 4
    assert len(alive) == 4
    assert max(alive) == 0
