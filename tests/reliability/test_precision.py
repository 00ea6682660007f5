"""Mixed precision, EMA, activation checkpointing and torch.compile."""

from __future__ import annotations

import functools
import gc
import runpy
from pathlib import Path
from unittest import mock

import pytest
import torch
from builders import slow
from mmengine.hooks import EMAHook
from mmengine.optim.optimizer import amp_optimizer_wrapper
from mmengine.runner import Runner, amp
from watch import WatchHook, student

EXPORT = Path(__file__).parents[2] / 'tools' / 'export_student.py'


@pytest.fixture
def after(monkeypatch):
    return lambda function: monkeypatch.setattr(WatchHook, 'after', function)


@pytest.fixture
def amp_on_cpu(monkeypatch):
    """mmengine requires a GPU or bfloat16; torch's autocast and scaler do not."""
    autocast = functools.partial(torch.autocast, 'cpu')
    monkeypatch.setattr(amp, 'autocast', autocast)
    monkeypatch.setattr(amp_optimizer_wrapper, 'is_cuda_available', lambda: True)
    scaler = functools.partial(torch.amp.GradScaler, 'cpu')
    monkeypatch.setattr(amp_optimizer_wrapper, 'GradScaler', scaler)


@pytest.mark.skipif(torch.cuda.is_available(), reason='replaces the scaler of GPUs')
@pytest.mark.parametrize(
    ('family', 'dtype'),
    [
        ('det', 'float16'),
        *slow([('seg', 'bfloat16'), ('det', 'bfloat16'), ('seg', 'float16')]),
    ],
)
def test_mixed_precision(
    make_config, train, tmp_path, after, amp_on_cpu, family, dtype
):
    """The loss is in fp32, and a step that the scaler skips corrupts nothing."""
    after(
        lambda runner, outputs: (
            outputs['loss_dist'].dtype,
            runner.optim_wrapper.loss_scaler.get_scale(),
            [p.detach().clone() for p in student(runner).parameters()],
        )
    )
    wrapper = dict(
        type='AmpOptimWrapper',
        dtype=dtype,
        # the first step overflows and is skipped; later ones are taken
        loss_scale=dict(init_scale=2.0**127, backoff_factor=2.0**-120),
    )
    options = {'optim_wrapper': wrapper, 'model.balance': None}
    _, watch = train(make_config(family, tmp_path, **options))
    (loss_dtype, scale, first), (_, _, second), *_ = watch.seen
    assert loss_dtype == torch.float32
    assert scale == 2.0**7
    assert any(not torch.equal(a, b) for a, b in zip(first, second, strict=True))
    for losses in watch.losses.values():
        assert all(abs(value) < float('inf') for value in losses.values()), losses
        for relation in ('inter', 'intra'):
            assert -1.01 <= losses[f'dist_{relation}'] <= 1.01


def test_ema_keeps_evaluates_and_saves_the_student_alone(
    make_config, tmp_path, det_config, monkeypatch
):
    """Three models are alive, not four: the student, its average and the teacher."""
    cfg = make_config('det', tmp_path)
    for key in ('val_dataloader', 'val_cfg', 'val_evaluator'):
        cfg[key] = {
            key: value
            for key, value in type(cfg).fromstring(det_config, '.py')[key].items()
        }
    cfg.train_cfg.val_interval = 1
    cfg.train_cfg.max_epochs = 1
    cfg.custom_hooks.append(dict(type='EMAHook', momentum=0.5))
    evaluated = []
    monkeypatch.setattr(
        WatchHook, 'before_val_iter',
        lambda self, runner, **_: evaluated.append(weight(runner).clone()),
    )  # fmt: skip

    def weight(runner) -> torch.Tensor:
        return student(runner).bbox_head.retina_cls.weight.detach()

    gc.collect()
    before = count('RetinaNet')
    runner = Runner.from_cfg(cfg)
    runner.train()
    gc.collect()
    assert count('RetinaNet') - before == 3
    average = next(h for h in runner.hooks if isinstance(h, EMAHook)).ema_model.module
    model = student(runner)
    assert average.teacher.model is None
    assert average.state_dict().keys() == model.state_dict().keys()

    saved = torch.load(tmp_path / 'epoch_1.pth', weights_only=False)
    teachers = {id(x) for x in model.teacher.model.parameters()}
    assert not teachers & {id(x) for x in average.parameters()}
    assert saved['state_dict'].keys() == model.state_dict().keys()
    assert len(saved['ema_state_dict']) == len(model.state_dict()) + 1  # its steps
    ema_weight = average.bbox_head.retina_cls.weight
    assert torch.equal(saved['state_dict']['bbox_head.retina_cls.weight'], ema_weight)
    assert evaluated
    assert all(torch.equal(x, ema_weight) for x in evaluated)
    assert not torch.equal(weight(runner), ema_weight)


@pytest.mark.slow
def test_the_export_holds_the_average(make_config, train, tmp_path, after):
    """Recomputed in float64 from the weights after each step."""
    after(
        lambda runner, _: {
            k: v.detach().double() for k, v in student(runner).state_dict().items()
        }
    )
    momentum = 0.3
    cfg = make_config('seg', tmp_path)
    cfg.custom_hooks.append(dict(type='EMAHook', momentum=momentum))
    runner, watch = train(cfg)
    assert len(watch.seen) == 4
    expected = dict(watch.seen[0])
    for weights in watch.seen[1:]:
        for name, weight in weights.items():
            expected[name] = (1 - momentum) * expected[name] + momentum * weight
    # buffers are not averaged; those of the last step are kept
    averaged = {name for name, _ in student(runner).named_parameters()}
    expected |= {k: v for k, v in watch.seen[-1].items() if k not in averaged}

    checkpoint = str(tmp_path / 'iter_4.pth')
    argv = ['export_student.py', checkpoint, '--out', str(tmp_path / 'student.pth')]
    with mock.patch('sys.argv', argv):
        runpy.run_path(str(EXPORT), run_name='__main__')
    (path,) = tmp_path.glob('student-*.pth')
    exported = torch.load(path)['state_dict']
    assert exported.keys() == expected.keys()
    for name, weight in exported.items():
        torch.testing.assert_close(
            weight.double(), expected[name], rtol=1e-5, atol=1e-7, msg=name
        )
    last = watch.seen[-1]['decode_head.conv_seg.weight']
    assert (last - expected['decode_head.conv_seg.weight']).abs().max() > 1e-4


def count(name: str) -> int:
    """Number of live models of a class, distilled or not."""
    return sum(
        any(cls.__name__ == name for cls in type(x).__mro__) for x in gc.get_objects()
    )


@pytest.fixture(scope='module')
def plain_losses(make_config, train, tmp_path_factory) -> dict:
    return train(make_config('seg', tmp_path_factory.mktemp('plain')))[1].losses


@pytest.mark.parametrize(
    'options',
    [
        {'activation_checkpointing': ['backbone.layer2', 'decode_head.conv_seg']},
        *slow(
            [
                {'model.student.backbone.with_cp': True},
                # dynamo alone takes 1 minute; with inductor's code, 7 minutes
                {'compile': dict(backend='eager')},
                {'compile': dict(backend='inductor')},
            ]
        ),
    ],
    ids=['activation_checkpointing', 'with_cp', 'compile_eager', 'compile_inductor'],
)
def test_it_changes_no_loss(
    make_config, train, tmp_path, plain_losses, options, monkeypatch
):
    monkeypatch.setenv('TORCHINDUCTOR_CACHE_DIR', str(tmp_path / 'inductor'))
    _, watch = train(make_config('seg', tmp_path, **options))
    assert watch.losses.keys() == plain_losses.keys()
    # Compiled, DISTLoss takes its plain path and inductor rounds differently. Each step
    # multiplies that by 5; the second shows that the first one's gradients are right.
    steps = 2 if 'compile' in options else 4
    for i in range(steps):
        expected = pytest.approx(plain_losses[i], rel=1e-3, abs=1e-4)
        assert watch.losses[i] == expected


def test_a_map_within_activation_checkpointing_is_refused(make_config, tmp_path):
    """It has no gradient there, so nothing would be learned."""
    cfg = make_config('seg', tmp_path)
    cfg.model.student.backbone.with_cp = True
    cfg.model.distill = dict(
        inner=dict(type='mmdist.Features', student='backbone.layer2.1.conv1')
    )
    with pytest.raises(RuntimeError, match=r'layer2\.1\.conv1` carries no gradient'):
        Runner.from_cfg(cfg).train()
