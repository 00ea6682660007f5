"""The gradient of distillation is a fixed multiple of that of the labels."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from builders import dataset_batch
from mmengine.config import Config
from mmengine.logging import MessageHub
from mmengine.registry import MODELS, init_default_scope
from torch import Tensor, nn

from mmdist.balance import KEY, MAX_SCALE, Balance

RATIO = 3.0


@pytest.fixture(autouse=True)
def hub() -> MessageHub:
    """Without what another test has left in it."""
    hub = MessageHub.get_current_instance()
    hub.runtime_info.pop(KEY, None)
    yield hub
    hub.runtime_info.pop(KEY, None)


@pytest.fixture(params=['det', 'seg'])
def config(request, tmp_path) -> Config:
    """A plain student."""
    init_default_scope({'det': 'mmdet', 'seg': 'mmseg'}[request.param])
    path = tmp_path / 'student.py'
    path.write_text(request.getfixturevalue(f'{request.param}_config'))
    return Config.fromfile(path)


def distilled(config: Config, balance: float | None, distill=None) -> nn.Module:
    """The student with a random teacher; the same weights in each call."""
    torch.manual_seed(0)
    model = MODELS.build(
        dict(
            type='mmdist.Distiller',
            student=config.model,
            teacher=dict(config=config.model, allow_random=True),
            balance=balance,
            **({} if distill is None else dict(distill=distill)),
        )
    )
    model.init_weights()
    # so that no map is constant, and the published gradient far from that of the labels
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
    return model.train()


def classifiers(model: nn.Module) -> list[nn.Module]:
    if hasattr(model, 'bbox_head'):
        return [model.bbox_head.retina_cls]
    return [model.decode_head.conv_seg, model.auxiliary_head.conv_seg]


def step(model: nn.Module, data: dict, unit: float = 1.0) -> tuple[dict, list[Tensor]]:
    """The losses of a batch, and the gradients at the logits of each level or head."""
    model.zero_grad()
    logits: list[Tensor] = []
    hooks = [
        module.register_forward_hook(lambda *args: logits.append(args[-1]))
        for module in classifiers(model)
    ]
    torch.manual_seed(0)  # dropout
    losses = model(**model.data_preprocessor(copy.deepcopy(data), True), mode='loss')
    for hook in hooks:
        hook.remove()
    for x in logits:
        x.retain_grad()
    total, _ = model.parse_losses(losses)
    (unit * total).backward()
    return losses, [x.grad for x in logits]


def norm(x: Tensor) -> float:
    return float(np.linalg.norm(x.double().numpy()))


def test_at_each_output_the_ratio_is_that_of_the_norms(config):
    data = dataset_batch(config)
    plain = MODELS.build(config.model)
    balanced, published = distilled(config, RATIO), distilled(config, None)
    plain.load_state_dict(balanced.state_dict())
    _, own = step(plain.train(), data)
    values, both = step(published, data)
    for expected, factor in ((own, 0.0), (both, RATIO)):
        losses, found = step(balanced, data)
        for a, b, total, result in zip(own, both, expected, found, strict=True):
            dist = b - a
            if factor:
                scale = min(factor * norm(a) / norm(dist), MAX_SCALE)
                total = a + scale * dist
            torch.testing.assert_close(result, total, rtol=1e-3, atol=1e-3 * norm(a))
        for key in values:  # the losses themselves are the published ones
            assert losses[key] is not None
            torch.testing.assert_close(losses[key], values[key])
    assert losses['dist_scale'] > 0
    assert 'dist_scale' not in values
