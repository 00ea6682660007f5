"""The cut-off MobileNetV2, and torchvision's weights in it."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from mmengine.registry import DefaultScope

from mmdist.registry import MODELS
from study.mobilenet_v2 import MobileNetV2, rename_torchvision_keys

# Expansion, channels, blocks and stride of each stage: table 2 of the paper.
PAPER = [
    (1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1),
    (6, 160, 3, 2), (6, 320, 1, 1),
]  # fmt: skip


def conv_bn(state: dict, conv: str, bn: str, *shape: int) -> None:
    """A random convolution and BN, scaled to keep the variance of what goes through."""
    fan_in = math.prod(shape[1:])
    state[f'{conv}.weight'] = torch.randn(shape) * (2 / fan_in) ** 0.5
    state[f'{bn}.weight'] = 1 + 0.1 * torch.randn(shape[0])
    state[f'{bn}.bias'] = 0.1 * torch.randn(shape[0])
    state[f'{bn}.running_mean'] = 0.1 * torch.randn(shape[0])
    state[f'{bn}.running_var'] = 0.5 + torch.rand(shape[0])
    state[f'{bn}.num_batches_tracked'] = torch.tensor(3)


@pytest.fixture(scope='module')
def weights() -> dict:
    """A state dict with the keys of torchvision's mobilenet_v2, as it is published."""
    torch.manual_seed(0)
    state: dict = {}
    conv_bn(state, 'features.0.0', 'features.0.1', 32, 3, 3, 3)
    channels, block = 32, 0
    for expansion, out, blocks, _ in PAPER:
        for _ in range(blocks):
            block += 1
            at, hidden = f'features.{block}.conv', channels * expansion
            i = 0
            if expansion > 1:
                conv_bn(state, f'{at}.0.0', f'{at}.0.1', hidden, channels, 1, 1)
                i = 1
            conv_bn(state, f'{at}.{i}.0', f'{at}.{i}.1', hidden, 1, 3, 3)
            conv_bn(state, f'{at}.{i + 1}', f'{at}.{i + 2}', out, hidden, 1, 1)
            channels = out
    conv_bn(state, 'features.18.0', 'features.18.1', 1280, 320, 1, 1)
    state['classifier.1.weight'] = torch.randn(1000, 1280)
    state['classifier.1.bias'] = torch.randn(1000)
    return state


def published_forward(state: dict, x: torch.Tensor) -> list[torch.Tensor]:
    """The network of the paper, from torchvision's keys: the map of each stage."""

    def run(x, conv, bn, stride=1, groups=1, relu=True):
        weight = state[f'{conv}.weight']
        x = F.conv2d(x, weight, None, stride, weight.shape[-1] // 2, 1, groups)
        names = ('running_mean', 'running_var', 'weight', 'bias')
        x = F.batch_norm(x, *(state[f'{bn}.{name}'] for name in names))
        return x.clamp(0, 6) if relu else x

    x = run(x, 'features.0.0', 'features.0.1', 2)
    block, maps = 0, []
    for expansion, out, blocks, stride in PAPER:
        for i in range(blocks):
            block += 1
            at, y, n = f'features.{block}.conv', x, 0
            if expansion > 1:
                y = run(y, f'{at}.0.0', f'{at}.0.1')
                n = 1
            y = run(y, f'{at}.{n}.0', f'{at}.{n}.1', 1 if i else stride, y.size(1))
            y = run(y, f'{at}.{n + 1}', f'{at}.{n + 2}', relu=False)
            x = x + y if i or (stride == 1 and x.size(1) == out) else y
        maps.append(x)
    return maps


@pytest.mark.parametrize('num_stages', [1, 4, 7])
def test_computes_what_the_published_network_does(num_stages, weights, tmp_path):
    torch.save(weights, tmp_path / 'weights.pth')
    strides = (1, 2, 2, 2, 1, 2, 1)
    cfg = dict(
        type='mmdist.MobileNetV2',
        num_stages=num_stages,
        strides=strides,
        out_indices=tuple(range(num_stages)),
        init_cfg=dict(type='Pretrained', checkpoint=str(tmp_path / 'weights.pth')),
    )
    with DefaultScope.overwrite_default_scope('mmdet'):
        model = MODELS.build(cfg)
    model.init_weights()
    model.double().eval()
    x = torch.randn(2, 3, 64, 96, dtype=torch.float64)
    double = {k: v.double() for k, v in weights.items()}
    with torch.no_grad():
        ours = model(x)
    expected = published_forward(double, x)[:num_stages]
    assert len(ours) == num_stages
    for map_, reference in zip(ours, expected, strict=True):
        assert reference.std() > 0.1
        torch.testing.assert_close(map_, reference)


def test_cut_off_it_has_no_more_parameters():
    counts = [
        sum(p.numel() for p in MobileNetV2(num_stages=n).parameters()) for n in (4, 7)
    ]
    # by hand from table 2, without the classifier and the last 1x1 convolution
    expected, channels, total = {}, 32, 3 * 32 * 9 + 2 * 32
    for stage, (t, out, blocks, _) in enumerate(PAPER, 1):
        for _ in range(blocks):
            hidden = channels * t
            total += hidden * (channels + 2) if t > 1 else 0
            total += hidden * (9 + 2) + out * (hidden + 2)
            channels = out
        expected[stage] = total
    assert counts == [expected[4], expected[7]]
    assert [m.shape for m in MobileNetV2(num_stages=4)(torch.zeros(1, 3, 64, 64))]


def test_weights_that_do_not_fit_are_an_error(weights, tmp_path):
    path = str(tmp_path / 'weights.pth')
    missing = {k: v for k, v in weights.items() if k != 'features.5.conv.2.weight'}
    torch.save(missing, path)
    model = MobileNetV2(init_cfg=dict(type='Pretrained', checkpoint=path))
    with pytest.raises(RuntimeError, match=r'layer3\.1\.conv\.2\.conv\.weight') as e:
        model.init_weights()
    assert 'do not fit MobileNetV2' in str(e.value)
    assert 'teacher' not in str(e.value)
    narrow = MobileNetV2(
        widen_factor=0.5, init_cfg=dict(type='Pretrained', checkpoint=path)
    )
    with pytest.raises(RuntimeError, match='of another shape'):
        narrow.init_weights()
    with pytest.raises(ValueError, match=r'layer1\.0\.conv1\.weight'):
        rename_torchvision_keys({'layer1.0.conv1.weight': torch.zeros(1)})


def test_stages_that_are_not_there_are_an_error():
    with pytest.raises(ValueError, match='the last stage is 3'):
        MobileNetV2(num_stages=4, out_indices=(1, 6))
    with pytest.raises(ValueError, match='1 to 7 stages'):
        MobileNetV2(num_stages=8)
