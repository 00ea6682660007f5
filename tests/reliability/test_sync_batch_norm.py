"""Synchronised norms and losses, in two processes with other mixes of labelled images.

Each call of such a norm waits for the other process. The norms of torch and mmcv need a
GPU; those here decide as they do and exchange over gloo.
"""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
from builders import slow
from det_zoo import FAMILIES, batch, build_pair
from mmcv.ops import SyncBatchNorm as MMSyncBatchNorm
from mmengine.registry import DefaultScope
from mmseg.utils import register_all_modules as register_mmseg
from segmentors import distilled, make_batch, zoo_model
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from watch import unlabel

from mmdist.data.unlabelled import Part, labelled_losses_only

SEGMENTORS = {
    'PSPNet': 'pspnet/pspnet_r18-d8_4xb2-80k_cityscapes-512x1024',
    'MaskFormer': 'maskformer/maskformer_r50-d32_8xb2-160k_ade20k-512x512',
}


class Exchange(torch.autograd.Function):
    """Sum over the processes, in both directions; ``told`` records every call."""

    @staticmethod
    def forward(ctx, x: Tensor, told: list, name: str) -> Tensor:
        ctx.told, ctx.name = told, name
        told.append(('forward', name))
        total = x.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        ctx.told.append(('backward', ctx.name))
        total = grad.clone()
        dist.all_reduce(total)
        return total, None, None


class Norm:
    """The part that both norms share."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return nn.functional.batch_norm(
                x, self.running_mean, self.running_var, self.weight, self.bias
            )
        rows = x.movedim(1, -1).flatten(0, -2)
        sums = torch.cat(
            [rows.sum(0), rows.square().sum(0), rows.new_tensor([len(rows)])]
        )
        if self.waits():
            sums = Exchange.apply(sums, self.told, self.name)
        count = sums[-1].detach().clamp(min=1)
        mean, square = (sums[:-1] / count).chunk(2)
        var = (square - mean.square()).clamp(min=0)
        for running, new in ((self.running_mean, mean), (self.running_var, var)):
            running.lerp_(new.detach(), 0.1)
        weight = self.weight * (var + self.eps).rsqrt()
        shape = (-1, *[1] * (x.ndim - 2))
        return (x - mean.view(shape)) * weight.view(shape) + self.bias.view(shape)


class LikeTorch(Norm, nn.BatchNorm2d):
    def waits(self) -> bool:  # as in `torch.nn.SyncBatchNorm.forward`
        return dist.is_available() and dist.is_initialized()


class LikeMMCV(Norm, MMSyncBatchNorm):
    def waits(self) -> bool:  # as in its autograd function
        return self.group_size > 1


def synchronise(model: nn.Module, kind: type[Norm]) -> list:
    """Replace all norms by a kind, in training mode; returns a list of their calls."""
    told = []
    for path, parent in list(model.named_modules()):
        for name, norm in list(parent.named_children()):
            if not isinstance(norm, (nn.BatchNorm2d, nn.GroupNorm)):
                continue
            new = kind(norm.weight.numel(), eps=norm.eps)
            new.weight, new.bias = norm.weight, norm.bias
            new.told, new.name = told, f'{path}.{name}'
            setattr(parent, name, new)
    return told


def with_norms(cfg, original, factor) -> None:
    """Add batch norm to heads that have none."""
    norm = dict(type='BN')
    if 'roi_head' in cfg:
        head = cfg.roi_head.bbox_head
        head.type, head.norm_cfg = 'Shared4Conv1FCBBoxHead', norm
        head.conv_out_channels = head.in_channels
    elif cfg.type == 'RetinaNet':
        cfg.bbox_head.norm_cfg = norm


def model_and_batch(name: str, distill: dict | None) -> tuple[nn.Module, dict]:
    if distill:
        model = build_pair(FAMILIES[name], distill=distill)
        return model, batch(model)
    if name not in SEGMENTORS:
        model = build_pair(FAMILIES[name], edit=with_norms)
        return model, batch(model)
    register_mmseg(init_default_scope=False)
    student = zoo_model(SEGMENTORS[name])
    with DefaultScope.overwrite_default_scope('mmseg'):
        model = distilled(student, copy.deepcopy(student))
    return model, make_batch(19)


def steps(name: str, kind: type[Norm] | None, distill: dict | None = None) -> dict:
    """Three steps, each with another mix of labelled images than the other process."""
    model, data = model_and_batch(name, distill)
    told = synchronise(model, kind) if kind else []
    model = DistributedDataParallel(model)
    for iteration in range(3):
        unlabel(data['data_samples'], iteration)
        losses = model(**copy.deepcopy(data), mode='loss')
        model.module.parse_losses(losses)[0].backward()
    norms = {m.name: m for m in model.modules() if isinstance(m, Norm)}
    return dict(
        told=told,
        means={k: m.running_mean for k, m in norms.items() if m.training},
        gradients={k: p.grad for k, p in model.named_parameters() if p.requires_grad},
    )


@pytest.mark.parametrize(
    ('name', 'kind'),
    [
        ('Faster R-CNN', LikeMMCV),  # in two passes, like DETR and MaskFormer
        *slow([('PSPNet', LikeTorch), ('RetinaNet', LikeTorch)]),
        *slow([('Faster R-CNN', LikeTorch), ('MaskFormer', LikeTorch)]),
        *slow([('Deformable DETR', LikeMMCV)]),
    ],
)
def test_processes_with_other_mixes_exchange_in_the_same_order(pair, name, kind):
    """A norm without its counterpart would hang, or get the sums of another norm."""
    first, second = pair(steps, name, kind)
    assert first['told'] == second['told']
    assert {name for _, name in first['told']} == first['means'].keys()
    assert {way for way, _ in first['told']} == {'forward', 'backward'}
    assert_same_gradients(first, second)
    # all images of both processes count, except in heads that run twice
    for name, mean in first['means'].items():
        assert torch.equal(mean, second['means'][name]) or 'head' in name, name


def assert_same_gradients(first: dict, second: dict) -> None:
    for name, gradient in first['gradients'].items():
        assert gradient.isfinite().all()
        assert torch.equal(gradient, second['gradients'][name]), name


@pytest.mark.parametrize(
    ('name', 'kind'),
    [
        ('DETR', 'QueryLogits'),
        *slow([('Faster R-CNN', 'RoILogits'), ('ATSS', 'DenseLogits')]),
    ],
)
def test_a_process_with_two_passes_does_not_wait_for_one_with_one(pair, name, kind):
    """DETR and ATSS divide by a number that is averaged over the processes."""
    loss = dict(type='mmdist.DISTLoss', sync=True)
    distill = dict(dist=dict(type=f'mmdist.{kind}', loss=loss))
    assert_same_gradients(*pair(steps, name, None, distill))


def norms_of_the_libraries() -> list[str]:
    """What torch's norm says in usual and unlabelled parts, and mmcv's group sizes."""
    said = []
    for is_unlabelled in (False, True):
        norm = nn.SyncBatchNorm(3)
        part = Part(torch.zeros(0), [], (not is_unlabelled,), is_unlabelled)
        with labelled_losses_only(norm, part):
            try:
                said.append(str(norm(torch.rand(2, 3, 4, 4)).shape))
            except ValueError as error:
                said.append(str(error))
    mmcv = MMSyncBatchNorm(3)
    with labelled_losses_only(
        nn.Sequential(mmcv), Part(torch.zeros(0), [], (False,), True)
    ):
        said.append(mmcv.group_size)
    return [*said, mmcv.group_size]


def test_the_libraries_norms_decide_so(pair):
    """torch's asks for a GPU exactly where it would wait for the other process."""
    for said in pair(norms_of_the_libraries):
        assert 'expected input tensor to be on GPU' in said[0]
        assert said[1:] == ['torch.Size([2, 3, 4, 4])', 1, 2]
