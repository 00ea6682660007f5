"""The truncated MobileNetV2, and torchvision's weights in it."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from study.mobilenet_v2 import MobileNetV2, rename_torchvision_keys

# Expansion, channels, blocks and stride of each stage: table 2 of the paper.
PAPER = [
    (1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1),
    (6, 160, 3, 2), (6, 320, 1, 1),
]  # fmt: skip


def conv_bn(state: dict, conv: str, bn: str, *shape: int) -> None:
    """Add a random convolution and BN, scaled to keep the variance of activations."""
    fan_in = math.prod(shape[1:])
    state[f'{conv}.weight'] = torch.randn(shape) * (2 / fan_in) ** 0.5
    state[f'{bn}.weight'] = 1 + 0.1 * torch.randn(shape[0])
    state[f'{bn}.bias'] = 0.1 * torch.randn(shape[0])
    state[f'{bn}.running_mean'] = 0.1 * torch.randn(shape[0])
    state[f'{bn}.running_var'] = 0.5 + torch.rand(shape[0])
    state[f'{bn}.num_batches_tracked'] = torch.tensor(3)


def layers(channels: int = 32):
    """Yield the stage, stride and convolutions (name, bn, shape) of each block."""
    block = 0
    for stage, (expansion, out, blocks, stride) in enumerate(PAPER):
        for i in range(blocks):
            block += 1
            at, hidden = f'features.{block}.conv', channels * expansion
            convs = [(f'{at}.0.0', f'{at}.0.1', (hidden, channels, 1, 1))]
            convs = convs if expansion > 1 else []
            n = len(convs)
            convs.append((f'{at}.{n}.0', f'{at}.{n}.1', (hidden, 1, 3, 3)))
            convs.append((f'{at}.{n + 1}', f'{at}.{n + 2}', (out, hidden, 1, 1)))
            yield stage, 1 if i else stride, convs
            channels = out


@pytest.fixture(scope='module')
def weights() -> dict:
    """A random state dict with the keys of torchvision's published mobilenet_v2."""
    torch.manual_seed(0)
    state: dict = {}
    conv_bn(state, 'features.0.0', 'features.0.1', 32, 3, 3, 3)
    for _, _, convs in layers():
        for conv, bn, shape in convs:
            conv_bn(state, conv, bn, *shape)
    conv_bn(state, 'features.18.0', 'features.18.1', 1280, 320, 1, 1)
    state['classifier.1.weight'] = torch.randn(1000, 1280)
    state['classifier.1.bias'] = torch.randn(1000)
    return state


def published_forward(state: dict, x: torch.Tensor) -> list[torch.Tensor]:
    """The map of each stage of the paper's network, with torchvision's keys."""

    def run(x, conv, bn, stride=1, groups=1, relu=True):
        weight = state[f'{conv}.weight']
        x = F.conv2d(x, weight, None, stride, weight.shape[-1] // 2, 1, groups)
        names = ('running_mean', 'running_var', 'weight', 'bias')
        x = F.batch_norm(x, *(state[f'{bn}.{name}'] for name in names))
        return x.clamp(0, 6) if relu else x

    x = run(x, 'features.0.0', 'features.0.1', 2)
    maps = {}
    for stage, stride, convs in layers():
        *first, depthwise, last = convs
        y = x
        for conv, bn, _ in first:
            y = run(y, conv, bn)
        y = run(y, *depthwise[:2], stride, y.size(1))
        y = run(y, *last[:2], relu=False)
        x = x + y if stride == 1 and x.size(1) == y.size(1) else y
        maps[stage] = x
    return list(maps.values())


@pytest.mark.parametrize('num_stages', [1, 4, 7])
def test_computes_what_the_published_network_does(num_stages, weights, tmp_path):
    torch.save(weights, tmp_path / 'weights.pth')
    strides = (1, 2, 2, 2, 1, 2, 1)
    model = MobileNetV2(
        num_stages=num_stages,
        strides=strides,
        out_indices=tuple(range(num_stages)),
        init_cfg=dict(type='Pretrained', checkpoint=str(tmp_path / 'weights.pth')),
    )
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
    expected, total = {}, 3 * 32 * 9 + 2 * 32
    for stage, _, convs in layers():
        total += sum(math.prod(shape) + 2 * shape[0] for _, _, shape in convs)
        expected[stage + 1] = total
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
