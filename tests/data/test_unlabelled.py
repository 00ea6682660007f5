"""Images without labels are distilled; the student's own losses ignore them."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from builders import assert_learns, quick_or_slow, without_dropout
from det_zoo import FAMILIES, batch, build_pair
from mmengine.structures import InstanceData, PixelData
from oracles import step
from segmentors import distilled, make_batch, zoo_model
from torch import nn
from torch.utils._pytree import tree_leaves

from mmdist.comparisons.base import Pair
from mmdist.data.unlabelled import _loss_of_images, joined
from mmdist.record import Recorder

SIZES = ((160, 160), (128, 160))
SMALL = ((96, 96), (72, 96))  # for slow transformers
DETECTORS = (
    *('RetinaNet', 'FCOS', 'ATSS', 'TOOD', 'RTMDet', 'YOLOX', 'YOLOv3', 'PAA'),
    *('CenterNet', 'Faster R-CNN', 'Mask R-CNN', 'Cascade R-CNN', 'HTC', 'SOLO'),
    *('Sparse R-CNN', 'DETR', 'Deformable DETR', 'DINO', 'DDQ', 'Mask2Former'),
)
SEGMENTORS = {
    'PSPNet': 'pspnet/pspnet_r18-d8_4xb2-80k_cityscapes-512x1024',
    'UPerNet': 'upernet/upernet_r50_4xb2-40k_cityscapes-512x1024',
    'OCRNet': 'ocrnet/ocrnet_r101-d8_4xb2-40k_cityscapes-512x1024',
    'PointRend': 'point_rend/pointrend_r50_4xb2-80k_cityscapes-512x1024',
    'STDC': 'stdc/stdc1_4xb12-80k_cityscapes-512x1024',
    'BiSeNetV2': 'bisenetv2/bisenetv2_fcn_4xb4-160k_cityscapes-1024x1024',
    'MaskFormer': 'maskformer/maskformer_r50-d32_8xb2-160k_ade20k-512x512',
    'Mask2Former of mmseg': 'mask2former/mask2former_r50_8xb2-90k_cityscapes-512x1024',
}


def sizes_of(name: str) -> tuple:
    return SMALL if name in ('DINO', 'DDQ', 'Deformable DETR') else SIZES


def detector(name: str) -> nn.Module:
    return build_pair(FAMILIES[name], sizes=sizes_of(name))


def segmentor(name: str) -> nn.Module:
    return without_dropout(distilled(*(zoo_model(SEGMENTORS[name]) for _ in range(2))))


def freeze_norms(model: nn.Module) -> None:
    """Make batch norm treat an image the same in any batch."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()


def model_and_data(name: str) -> tuple[nn.Module, dict]:
    if name in SEGMENTORS:
        return segmentor(name), make_batch(19)
    model = detector(name)
    return model, batch(model, sizes_of(name))


def as_double(model: nn.Module, data: dict) -> None:
    torch.set_default_dtype(torch.float64)
    model.double()
    data['inputs'] = data['inputs'].double()
    for sample in data['data_samples']:
        sample.gt_instances.bboxes = sample.gt_instances.bboxes.double()


def mark(data: dict, *indices: int, garbage: bool = False) -> dict:
    """A copy of a batch with some images marked as unlabelled."""
    data = copy.deepcopy(data)
    for index in indices:
        sample = data['data_samples'][index]
        sample.set_metainfo(dict(unlabelled=True))
        if garbage:
            spoil(sample)
    return data


def spoil(sample) -> None:
    """Set labels that would raise or give NaN if anything read them."""
    if 'gt_instances' in sample:
        sample.gt_instances = InstanceData(
            bboxes=torch.full((3, 4), float('nan')), labels=torch.full((3,), 10**6)
        )
    else:
        labels = torch.full_like(sample.gt_sem_seg.data, 10**6)
        sample.gt_sem_seg = PixelData(data=labels)


def losses_of(model: nn.Module, data: dict) -> dict:
    torch.manual_seed(0)  # sampling, denoising
    np.random.seed(0)
    return model(**copy.deepcopy(data), mode='loss')


def split(losses: dict) -> tuple[dict, dict]:
    """The student's own losses, and what distillation adds."""
    added = {k: v for k, v in losses.items() if 'dist' in k.split('_')}
    return {k: v for k, v in losses.items() if k not in added}, added


def assert_close(a: dict, b: dict, **tolerance) -> None:
    assert a.keys() == b.keys()
    for key in a:
        for x, y in zip(tree_leaves(a[key]), tree_leaves(b[key]), strict=True):
            torch.testing.assert_close(x, y, **tolerance, msg=key)


# One for each way in which mmdist splits a batch; the others are slow.
QUICK = ('RetinaNet', 'PAA', 'Faster R-CNN', 'SOLO', 'DETR', 'PSPNet', 'MaskFormer')
EVERY = quick_or_slow(QUICK, (*DETECTORS, *SEGMENTORS))


@pytest.fixture
def exact():
    """Make convolutions round an image alike in any batch; proposals depend on it."""
    with torch.backends.mkldnn.flags(enabled=False):
        yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.usefixtures('exact')
@pytest.mark.parametrize('name', EVERY)
def test_own_losses_are_those_of_the_labelled_images(name):
    """Whatever labels the other images have; those images are distilled."""
    model, data = model_and_data(name)
    freeze_norms(model)
    if name == 'Sparse R-CNN':  # rounding grows from stage to stage
        as_double(model, data)
    other = name in ('RetinaNet', 'Faster R-CNN', 'Deformable DETR', 'PSPNet')
    labelled, unlabelled = other, 1 - other  # either image can be the unlabelled one
    mixed = losses_of(model, mark(data, unlabelled))
    own, added = split(mixed)
    terms = [k for k in added if k.startswith('loss')]
    sum(added[k] for k in terms).backward()
    assert_learns(model.backbone, least=1e-6)

    spoiled = losses_of(model, mark(data, unlabelled, garbage=True))
    assert_close(mixed, spoiled, rtol=0, atol=0)
    alone = {k: x[labelled : labelled + 1] for k, x in data.items()}
    expected, without = split(losses_of(model, alone))
    # PointRend draws points, whose choice depends on the number of images
    own, expected = (
        {k: v for k, v in x.items() if 'point' not in k} for x in (own, expected)
    )
    assert_close(own, expected, rtol=2e-4, atol=1e-5)
    # the rows of the unlabelled image count: without it the term differs
    assert any(added[k].item() != without[k].item() for k in terms)


@pytest.mark.parametrize('name', EVERY)
def test_without_any_label_only_distillation_learns(name):
    model, data = model_and_data(name)
    losses = losses_of(model, mark(data, 0, 1, garbage=True))
    own, added = split(losses)
    assert own and all((leaf == 0).all() for leaf in tree_leaves(own))
    assert sum(v.item() for k, v in added.items() if k.startswith('loss')) > 0
    total, _ = model.parse_losses(losses)
    total.backward()
    assert_learns(model)
    # all parameters that labels would train are in the graph: DDP waits for them
    with_gradient = {n for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    total, _ = model.parse_losses(losses_of(model, data))
    total.backward()
    usual = {n for n, p in model.named_parameters() if p.grad is not None}
    assert usual <= with_gradient


def test_a_batch_in_two_parts_has_one_pass_of_the_backbone():
    """Batch norm sees one batch, and what is recorded there covers all images."""
    features = dict(type='mmdist.Features', student='neck', adapt=True)
    path = FAMILIES['Faster R-CNN']
    model = build_pair(
        path, distill=dict(dist=dict(type='mmdist.RoILogits'), mimic=features)
    )
    norm = model.backbone.layer4[0].bn1.train()  # norm_eval has frozen it
    data = batch(model)
    with torch.no_grad():
        usual = losses_of(model, data)
        mean = norm.running_mean.clone()
        norm.reset_running_stats()
        model.extract_feat(data['inputs'])
        expected = norm.running_mean.clone()
        norm.reset_running_stats()
        with Recorder([model.backbone]) as recorder:
            mixed = losses_of(model, mark(data, 0))
    assert len(recorder.calls(model.backbone)) == 1
    assert not torch.equal(expected, mean)
    assert torch.equal(norm.running_mean, expected)
    torch.testing.assert_close(mixed['loss_mimic'], usual['loss_mimic'])
    assert 'extract_feat' not in vars(model)


def test_rows_of_images_are_found_in_what_a_head_gives_its_loss():
    """MaskFormer stacks its decoder layers, here as many as there are images."""
    stack = torch.arange(9.0).view(3, 3, 1)  # (layers, images, 1)

    def loss_by_feat(all_cls_scores, levels, batch_gt_instances, ignored=None):
        return all_cls_scores, levels, batch_gt_instances, ignored

    loss = _loss_of_images(loss_by_feat, [0, 2], 3)
    scores, levels, truth, ignored = loss(stack, [stack] * 3, ['a', 'b', 'c'])
    assert torch.equal(scores, stack[:, [0, 2]])
    assert len(levels) == 3
    assert all(torch.equal(level, stack[[0, 2]]) for level in levels)
    assert truth == ['a', 'c'] and ignored is None
    with pytest.raises(RuntimeError, match=r'shape \(2, 3, 1\) for 3 images'):
        loss(stack, stack[:2], [])


def test_labelled_batches_are_as_they_were(monkeypatch):
    """The batch itself, not a copy, goes to the student."""
    model = detector('RetinaNet')
    data = batch(model)
    seen = []
    loss = model.student_class.loss

    def keep(self, *args):
        seen.append(args)
        return loss(self, *args)

    monkeypatch.setattr(model.student_class, 'loss', keep)
    model.loss(**data)
    ((inputs, samples),) = seen
    assert inputs is data['inputs']
    assert all(a is b for a, b in zip(samples, data['data_samples'], strict=True))


def test_void_pixels_of_an_unlabelled_image_count_and_its_padding_does_not():
    model = segmentor('PSPNet')

    def mask(data: dict) -> torch.Tensor:
        _, (pair, _) = step(model, data)
        return torch.ones(2, 8, 8).bool() if pair.mask is None else pair.mask

    data, padded = make_batch(19), make_batch(19, valid=(48, 64))
    labelled, mixed = mask(data), mask(mark(data, 1))
    assert not labelled[0, 0].any() and not labelled[1, 0].any()
    assert torch.equal(mixed[0], labelled[0])
    assert mixed[1].all()
    second = mask(mark(padded, 1))[1]
    assert second[:6].all() and not second[6:].any()


def test_distillation_that_rests_leaves_the_labelled_images():
    model = detector('RetinaNet')
    data = batch(model)
    model.distill_factor = 0.0
    found = losses_of(model, mark(data, 1, garbage=True))
    alone = dict(inputs=data['inputs'][:1], data_samples=data['data_samples'][:1])
    assert_close(found, losses_of(model, alone), rtol=1e-4, atol=1e-5)
    assert not any('dist' in key for key in found)


def test_rows_of_all_parts_are_one_matrix():
    a, b = (Pair(torch.rand(n, 3), torch.rand(n, 3), weight=0.5) for n in (2, 4))
    b.mask = torch.tensor([True, False, True, True])
    (both,) = joined([[a], [b]])
    assert torch.equal(both.student, torch.cat([a.student, b.student]))
    assert torch.equal(both.teacher, torch.cat([a.teacher, b.teacher]))
    assert both.mask.tolist() == [True, True, True, False, True, True]
    assert both.weight == 0.5
    assert joined([[a], [a]])[0].mask is None
