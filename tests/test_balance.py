"""`balance` limits distillation's gradient to a multiple of the labels' gradient."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from builders import build_distiller, classifiers, dataset_batch
from det_zoo import FAMILIES, batch, build_pair
from mmengine.config import Config
from mmengine.logging import MessageHub
from mmengine.registry import MODELS, init_default_scope
from torch import Tensor, nn

from mmdist.balance import KEY, Balance
from mmdist.record import Fork

RATIO = 0.3  # so small that it binds


@pytest.fixture
def config(family, request) -> Config:
    """The config of a plain student."""
    config = Config.fromstring(request.getfixturevalue(f'{family}_config'), '.py')
    init_default_scope(config.default_scope)
    return config


def distilled(config: Config, balance: float | None) -> nn.Module:
    """The student with a random teacher; the same weights in each call."""
    teacher = dict(config=config.model, allow_random=True)
    model = build_distiller(config.model, teacher=teacher, balance=balance)
    # so that no map is constant, and distillation's gradient is far from the labels'
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
    return model


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


@pytest.mark.parametrize('ratio', [RATIO, 1e9])
def test_at_each_output_the_ratio_of_the_norms_is_bounded(config, ratio):
    data = dataset_batch(config)
    plain = MODELS.build(config.model)
    balanced, published = distilled(config, ratio), distilled(config, None)
    plain.load_state_dict(balanced.state_dict())
    _, own = step(plain.train(), data)
    values, both = step(published, data)
    _, first = step(balanced, data)
    torch.testing.assert_close(first, own)  # the labels' gradient is not known yet
    losses, found = step(balanced, data)
    scales: list[float] = []
    for a, b, result in zip(own, both, found, strict=True):
        dist = b - a
        scales.append(scale := min(ratio * norm(a) / norm(dist), 1))
        expected = a + scale * dist
        torch.testing.assert_close(result, expected, rtol=1e-3, atol=1e-3 * norm(a))
    assert min(scales) < 1 if ratio == RATIO else min(scales) == 1
    for key in values:  # the losses themselves are the published ones
        torch.testing.assert_close(losses[key], values[key])
    assert losses['dist_scale'] > 0
    assert 'dist_scale' not in values


def test_a_loss_scale_changes_nothing(config):
    """As from a GradScaler or gradient accumulation."""
    data = dataset_batch(config)
    scales = []
    for unit in (1.0, 1024.0):
        model = distilled(config, RATIO)
        step(model, data, unit)
        scales.append(step(model, data, unit)[0]['dist_scale'].item())
    assert scales[0] > 0
    assert scales[1] == pytest.approx(scales[0], rel=1e-4)


def unlabelled(data: dict) -> dict:
    data = copy.deepcopy(data)
    for sample in data['data_samples']:
        sample.set_metainfo(dict(unlabelled=True))
    return data


def test_images_without_labels_are_weighed_as_those_before(config):
    data = dataset_batch(config)
    plain = MODELS.build(config.model)
    model = distilled(config, RATIO)
    plain.load_state_dict(model.state_dict())
    _, own = step(plain.train(), data)
    step(model, data)
    _, found = step(model, unlabelled(data))
    for a, result in zip(own, found, strict=True):
        assert norm(result) <= RATIO * norm(a) * 1.001
    assert norm(found[0]) > 0


def test_without_any_label_it_is_the_published_loss(config):
    data = unlabelled(dataset_batch(config))
    _, expected = step(distilled(config, None), data)
    model = distilled(config, RATIO)
    _, first = step(model, data)
    assert all(norm(x) == 0 for x in first)
    _, found = step(model, data)
    for a, b in zip(expected, found, strict=True):
        torch.testing.assert_close(a, b)


def test_a_resumed_run_goes_on_with_what_is_known(config, hub):
    data = dataset_batch(config)
    model = distilled(config, RATIO)
    step(model, data)
    state = copy.deepcopy(hub.state_dict())
    expected, _ = step(model, data)
    hub.runtime_info.pop(KEY)
    resumed = distilled(config, RATIO)
    hub.load_state_dict(state)
    found, _ = step(resumed, data)
    assert torch.equal(found['dist_scale'], expected['dist_scale'])
    # another model in this process starts from nothing
    assert step(distilled(config, RATIO), data)[0]['dist_scale'] == 0


def scales_of_two_steps(coefficients: list[list[float]]) -> float:
    """Each process has its own gradients of labels and distillation, at one output."""
    MessageHub.get_current_instance().runtime_info.pop(KEY, None)
    rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
    own, dist = coefficients[rank]
    balance = Balance(RATIO)
    for _ in range(2):
        x = torch.ones(4, requires_grad=True) * 1.0
        fork = Fork(x.view_as(x), x.view_as(x), 0)
        loss = dist * fork.recorded.sum()
        scales = balance(dict(dist=[loss]), [fork])
        (own * fork.own.sum() + loss).backward()
    return scales['dist'].item()


def test_all_processes_have_the_same_factor(group_of):
    found = group_of(2)(scales_of_two_steps, [[1.0, 3.0], [2.0, 4.0]])
    assert found == pytest.approx([RATIO * np.sqrt(5 / 25)] * 2)


@pytest.mark.parametrize('ratio', [0, -1.0, float('nan'), 'auto', True])
def test_what_is_no_ratio_is_refused(ratio):
    with pytest.raises(ValueError, match='`balance` must be a number above 0'):
        Balance(ratio)


@pytest.mark.parametrize(
    'family',
    ['RetinaNet', 'YOLOX', 'Faster R-CNN', 'Cascade R-CNN', 'Deformable DETR'],
)
def test_every_family_of_detectors(family):
    model = build_pair(FAMILIES[family], balance=RATIO)
    data = batch(model)
    for _ in range(2):
        model.zero_grad()
        losses = model(**data, mode='loss')
        model.parse_losses(losses)[0].backward()
    assert 0 < losses['dist_scale'] <= 1
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert gradients and all(g.isfinite().all() for g in gradients)
