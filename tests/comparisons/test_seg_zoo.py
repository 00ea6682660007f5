"""A pair from each directory of mmseg's config zoo trains a step or is refused."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from builders import assert_learns, quick_or_slow
from mmengine.registry import DefaultScope
from segmentors import ZOO, calibrate, distilled, make_batch, zoo_model
from torch import nn

from mmdist.registry import MODELS

# directory: how the names of the student's and the teacher's config begin
PAIRS = {
    'ann': ('ann_r50', 'ann_r101'),
    'apcnet': ('apcnet_r50', 'apcnet_r101'),
    'beit': ('beit-base', 'beit-large'),
    'bisenetv1': ('bisenetv1_r18-d32_4xb4-160k_city', 'bisenetv1_r50-d32_4xb4-160k'),
    'bisenetv2': ('bisenetv2_fcn_4xb4-160k', 'bisenetv2_fcn_4xb8'),
    'ccnet': ('ccnet_r50', 'ccnet_r101'),
    'cgnet': ('cgnet_fcn_4xb4', 'cgnet_fcn_4xb8'),
    'danet': ('danet_r50', 'danet_r101'),
    'ddrnet': ('ddrnet_23-slim', 'ddrnet_23_in1k'),
    'deeplabv3': ('deeplabv3_r18-d8', 'deeplabv3_r101-d8'),
    'deeplabv3plus': ('deeplabv3plus_r18-d8', 'deeplabv3plus_r101-d8'),
    'dmnet': ('dmnet_r50', 'dmnet_r101'),
    'dnlnet': ('dnl_r50', 'dnl_r101'),
    'dpt': ('dpt_vit-b16', 'dpt_vit-b16'),
    'dsdl': ('cityscapes', 'cityscapes'),
    'emanet': ('emanet_r50', 'emanet_r101'),
    'encnet': ('encnet_r50', 'encnet_r101'),
    'erfnet': ('erfnet_fcn', 'erfnet_fcn'),
    'fastfcn': ('fastfcn_r50-d32_jpu_psp', 'fastfcn_r50-d32_jpu_enc'),
    'fastscnn': ('fast_scnn', 'fast_scnn'),
    'fcn': ('fcn_r18-d8', 'fcn_r101-d8'),
    'gcnet': ('gcnet_r50', 'gcnet_r101'),
    'hrnet': ('fcn_hr18s', 'fcn_hr48'),
    'icnet': ('icnet_r18-d8', 'icnet_r50-d8'),
    'isanet': ('isanet_r50', 'isanet_r101'),
    'knet': ('knet-s3_r50-d8_fcn', 'knet-s3_r50-d8_deeplabv3'),
    'mae': ('mae-base', 'mae-base'),
    'mask2former': ('mask2former_r50_8xb2-90k', 'mask2former_r101_8xb2-90k'),
    'maskformer': ('maskformer_r50', 'maskformer_r101'),
    'mobilenet_v2': ('mobilenet-v2-d8_fcn', 'mobilenet-v2-d8_deeplabv3'),
    'mobilenet_v3': ('mobilenet-v3-d8-s', 'mobilenet-v3-d8-scratch-s'),
    'nonlocal_net': ('nonlocal_r50', 'nonlocal_r101'),
    'ocrnet': ('ocrnet_hr18s', 'ocrnet_r101'),
    'pidnet': ('pidnet-s', 'pidnet-m'),
    'point_rend': ('pointrend_r50', 'pointrend_r101'),
    'psanet': ('psanet_r50-d8_4xb2', 'psanet_r101-d8_4xb2'),
    'pspnet': ('pspnet_r18-d8', 'pspnet_r101-d8'),
    'resnest': ('resnest_s101-d8_fcn', 'resnest_s101-d8_deeplabv3'),
    'san': ('san-vit-b16_coco', 'san-vit-b16_coco'),
    'segformer': ('segformer_mit-b0', 'segformer_mit-b1'),
    'segmenter': ('segmenter_vit-t', 'segmenter_vit-s_mask'),
    'segnext': ('segnext_mscan-t', 'segnext_mscan-s'),
    'sem_fpn': ('fpn_r50', 'fpn_r101'),
    'setr': ('setr_vit-l_naive_8xb1', 'setr_vit-l_pup_8xb1'),
    'stdc': ('stdc1_4xb12', 'stdc2_4xb12'),
    'swin': ('swin-tiny-patch4-window7-in1k', 'swin-small'),
    'twins': ('twins_pcpvt-s_fpn', 'twins_svt-s_fpn'),
    'unet': ('unet-s5-d16_fcn_4xb4-40k_drive', 'unet-s5-d16_pspnet_4xb4-40k_drive'),
    'upernet': ('upernet_r18', 'upernet_r50'),
    'vit': ('vit_deit-s16_upernet', 'vit_deit-b16_upernet'),
}
# One for each way in which mmdist reads a head; the others are slow.
QUICK = {
    'danet', 'ddrnet', 'encnet', 'knet', 'maskformer', 'ocrnet', 'pidnet', 'point_rend',
    'segmenter', 'stdc',
}  # fmt: skip
# Their backbones need mmpretrain, which mmdist does not install.
PAIRS_OF_MMPRETRAIN = {
    'convnext': ('convnext-tiny', 'convnext-small'),
    'poolformer': ('fpn_poolformer_s12', 'fpn_poolformer_s24'),
}

# Widths that the config does not set, or only as multiples of the number of heads.
FULL_WIDTH = {
    'convnext', 'ddrnet', 'erfnet', 'mobilenet_v2', 'mobilenet_v3', 'pidnet',
    'poolformer', 'segformer',
}  # fmt: skip
OVERRIDES = {
    # one sentence instead of 14 for each of 171 classes
    'san': {
        'text_encoder.templates': ['a photo of a {}.'],
        'text_encoder.num_layers': 2,
    },
    # their position embeddings fit one size only
    'beit': {'backbone.img_size': (64, 64)},
    'mae': {'backbone.img_size': (64, 64)},
    # mmseg 1.2.2 indexes the class weights by the labels, 255 included
    'cgnet': {'decode_head.loss_decode.class_weight': None},
    'pidnet': {'decode_head.loss_decode.0.class_weight': None},
    # it draws random bases in each forward, also at inference
    'segnext': {'decode_head.ham_kwargs.rand_init': False},
}
SIZES = {'mobilenet_v3': (400, 400)}  # its head pools 49 x 49 cells of 8 pixels


@pytest.mark.parametrize('directory', quick_or_slow(QUICK, PAIRS))
def test_a_pair_of_every_directory(directory, tmp_path):
    train_one_step(directory, *PAIRS[directory], tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize('directory', PAIRS_OF_MMPRETRAIN)
def test_a_pair_with_backbones_of_mmpretrain(directory, tmp_path):
    if importlib.util.find_spec('mmpretrain') is None:
        with pytest.raises(ImportError, match='mmpretrain'):
            zoo_model(f'{directory}/{PAIRS_OF_MMPRETRAIN[directory][0]}')
    else:
        train_one_step(directory, *PAIRS_OF_MMPRETRAIN[directory], tmp_path)


def train_one_step(directory: str, student: str, teacher: str, tmp_path: Path) -> None:
    width = 1 if directory in FULL_WIDTH else 1 / 8
    student, teacher = (
        zoo_model(f'{directory}/{name}', width, **OVERRIDES.get(directory, {}))
        for name in (student, teacher)
    )
    checkpoint = None
    if directory == 'san':  # it cannot be initialised without weights of CLIP
        checkpoint = student.pretrained = save_weights(teacher, tmp_path / 'clip.pth')
    model = distilled(student, teacher, checkpoint)
    data = make_batch(model.num_classes, SIZES.get(directory, (64, 64)))
    before = {k: v.clone() for k, v in model.teacher.model.state_dict().items()}

    losses = model.loss(**data)
    term = losses['loss_dist']
    assert term.isfinite()
    # correlations of constant maps would be 0
    assert model.out_channels <= 2 or losses['dist_inter'] != 0
    assert losses['dist_intra'] != 0
    term.backward(retain_graph=True)
    assert_learns(getattr(model, 'backbone', None) or model.decode_head)

    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    model.zero_grad()
    model.parse_losses(losses)[0].backward()
    optimizer.step()
    assert all(p.grad is None for p in model.teacher.model.parameters())
    after = model.teacher.model.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)

    if directory != 'point_rend':  # its coarse map is compared, not the refined one
        assert_maps_are_what_predicts(model, data)


def save_weights(config: dict, path: Path) -> str:
    with DefaultScope.overwrite_default_scope('mmseg'):
        model = MODELS.build(config)
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.1)
    torch.save(model.state_dict(), path)
    return str(path)


def assert_maps_are_what_predicts(model: nn.Module, data: dict) -> None:
    """Check the compared maps of both sides against mmseg's own inference."""
    comparison = model.distill.dist
    seen = {}
    pair = comparison.pair

    def spy(step, recorded, asked):
        seen.update(student=recorded[0], teacher=asked[0], inputs=step.teacher_inputs)
        return pair(step, recorded, asked)

    comparison.pair = spy
    # As at inference, but heads and backbones return what they do in training.
    calibrate(model)
    model.eval()
    for module in (model, getattr(model, 'backbone', None), model.decode_head):
        if module is not None:
            module.training = True
    with torch.no_grad():
        model.loss(**data)
        model.eval()
        size = tuple(data['inputs'].shape[-2:])
        for side, segmentor, inputs in (
            ('student', model, data['inputs']),
            ('teacher', model.teacher.model, seen['inputs']),
        ):
            metas = [dict(img_shape=size, pad_shape=size) for _ in inputs]
            expected = segmentor.encode_decode(inputs, metas)
            seg_map = seen[side]
            seg_map.align_corners = segmentor.align_corners
            assert expected.std() > 0
            torch.testing.assert_close(
                seg_map.read(size), expected, rtol=1e-3, atol=1e-4
            )


def test_depth_estimators_are_refused():
    """vpd is the one directory without classes."""
    model = zoo_model('pspnet/pspnet_r18-d8')
    del model['auxiliary_head']
    model.type = 'DepthEstimator'
    model.decode_head = dict(
        type='VPDDepthHead',
        in_channels=[64, 128, 256, 512],
        embed_dim=8,
        feature_dim=16,
        num_deconv_filters=(8, 8, 8),
    )
    assert 'DepthEstimator' in (ZOO / '_base_/models/vpd_sd.py').read_text()
    with pytest.raises(ValueError, match='estimates depth'):
        distilled(model, model)


def test_no_directory_is_left_out():
    directories = {p.name for p in ZOO.iterdir() if p.is_dir() and p.name != '_base_'}
    assert PAIRS.keys() | PAIRS_OF_MMPRETRAIN.keys() | {'vpd'} == directories
