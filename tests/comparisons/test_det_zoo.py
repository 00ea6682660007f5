"""A pair from each directory of mmdet's config zoo trains a step or is refused."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch
import torch.nn.functional as F
from builders import assert_learns, quick_or_slow
from det_zoo import (
    CONFIGS,
    SIZES,
    Sizes,
    batch,
    build_pair,
    shrink,
)
from mmdet.registry import MODELS as MMDET_MODELS
from mmdet.utils import register_all_modules
from mmengine.config import Config
from torch import nn

from mmdist.comparisons.default import default_for
from mmdist.record import Recorder
from mmdist.registry import MODELS

# Only in the onedl fork: it detects lanes, and DenseLogits refuses it.
OF_THE_FORK = ('clrnet',)
DIRECTORIES = sorted(
    path.name
    for path in CONFIGS.iterdir()
    if path.is_dir() and path.name not in OF_THE_FORK
)
WITHOUT_MODEL = ('_base_', 'common')  # parts of other configs
# One for each way in which mmdist reads a detector; the others are slow.
QUICK = {
    'cascade_rpn', 'ddq', 'detr', 'guided_anchoring', 'htc', 'mask2former', 'queryinst',
    'rtmdet', 'sabl', 'vfnet', 'yolact', 'yolo', 'glip', 'mask2former_vis',
}  # fmt: skip


@dataclass
class Case:
    """How to make a directory's pair small.

    Attributes:
        config: File name; by default the first in the directory.
        factors: Divisors of the channels of student and teacher.
        sizes: Height and width of the images.
        num_classes: Labels are below it.
        edit: Changes the shrunk config, see ``model_config``.
        prepare: Changes the batch.
    """

    config: str | None = None
    factors: tuple[int, int] = (8, 4)
    sizes: Sizes = SIZES
    num_classes: int = 3
    edit: Callable | None = None
    prepare: Callable = field(default=lambda data: None)


# ---- what shrinking cannot know --------------------------------------------------


def take_resnet(cfg, original, factor):
    """Replace a backbone of mmpretrain or timm; the rest of the detector is mmdet's."""
    cfg.backbone = shrink(
        dict(type='ResNet', depth=50, norm_cfg=dict(type='BN')), factor
    )
    cfg.neck.in_channels = [x // factor for x in (256, 512, 1024, 2048)]


def count_mask_parameters(cfg, original, factor):
    """Correct the number of parameters that CondInst states for its dynamic layers."""
    hidden = cfg.mask_head.feat_channels
    inputs = cfg.mask_head.mask_feature_head.out_channels + 2
    cfg.bbox_head.num_params = (inputs + 1 + hidden + 1 + 1) * hidden + 1


def color_similarity_by_hand(cfg, original, factor):
    """Replace BoxInst's data_preprocessor, which needs scikit-image."""
    count_mask_parameters(cfg, original, factor)
    usual = {k: original.data_preprocessor[k] for k in ('mean', 'std')}
    cfg.data_preprocessor = dict(
        type='DetDataPreprocessor', pad_size_divisor=32, pad_mask=True, **usual
    )


def add_pairwise_masks(data):
    for sample in data['data_samples']:
        boxes = len(sample.gt_instances.bboxes)
        height, width = sample.batch_input_shape
        sample.gt_instances.pairwise_masks = torch.ones(
            boxes, 8, height // 4, width // 4
        )


def own_roi_align(cfg, original, factor):
    """Use mmcv's RoIAlign, where CrowdDet's config wants torchvision's."""
    cfg.roi_head.bbox_roi_extractor.roi_layer.use_torchvision = False


def few_proposals(cfg, original, factor):
    """Sample few proposals: a ResNet stage of full width runs on each."""
    cfg.train_cfg.rcnn.sampler.num = 4


def own_teacher_from_the_zoo(cfg, original, factor):
    """Shrink the teacher of LD, itself a distiller, whose config is given by path."""
    path = CONFIGS.parent / original.teacher_config
    cfg.teacher_config = dict(model=shrink(Config.fromfile(path).model, factor))


BIG, HUGE = ((128, 128), (96, 128)), ((256, 256), (256, 192))
CASES = {
    'boxinst': Case(edit=color_similarity_by_hand, prepare=add_pairwise_masks),
    'bytetrack': Case(
        'yolox_x_8xb4-amp-80e_crowdhuman-mot17halftrain_test-mot17halfval.py',
        num_classes=1,
    ),
    'cascade_rpn': Case('cascade-rpn_faster-rcnn_r50-caffe_fpn_1x_coco.py'),
    'centripetalnet': Case(sizes=HUGE),
    'condinst': Case(edit=count_mask_parameters),
    'convnext': Case(edit=take_resnet),
    'cornernet': Case(sizes=HUGE),
    'crowddet': Case(edit=own_roi_align, num_classes=1),
    'dcn': Case(sizes=BIG),
    'ddod': Case(sizes=((384, 384), (384, 320))),
    'empirical_attention': Case(sizes=BIG),
    'gcnet': Case('mask-rcnn_r50-gcb-r16-c3-c5_fpn_1x_coco.py'),
    'gfl': Case(sizes=BIG),
    'guided_anchoring': Case('ga-retinanet_r50-caffe_fpn_1x_coco.py'),
    'hrnet': Case('faster-rcnn_hrnetv2p-w32-1x_coco.py', factors=(4, 2)),
    'htc': Case('htc_r50_fpn_1x_coco.py'),
    'ld': Case('ld_r50-gflv1-r101_fpn_1x_coco.py', edit=own_teacher_from_the_zoo),
    'libra_rcnn': Case('libra-faster-rcnn_r50_fpn_1x_coco.py'),
    'pascal_voc': Case('faster-rcnn_r50_fpn_1x_voc0712.py'),
    'pvt': Case('retinanet_pvt-t_fpn_1x_coco.py'),
    'regnet': Case('retinanet_regnetx-800MF_fpn_1x_coco.py'),
    'res2net': Case(factors=(4, 2)),
    'rtmdet': Case('rtmdet_tiny_8xb32-300e_coco.py'),
    'sort': Case(num_classes=1),
    'ssd': Case(factors=(1, 1), sizes=((300, 300),)),
    'strongsort': Case(
        'yolox_x_8xb4-80e_crowdhuman-mot17halftrain_test-mot17halfval.py',
        num_classes=1,
    ),
    'timm_example': Case(edit=take_resnet),
    'tridentnet': Case(factors=(1, 1), sizes=((64, 64),), edit=few_proposals),
    'wider_face': Case(num_classes=1),
    'yolact': Case(sizes=((64, 64), (64, 64))),
    'yolo': Case('yolov3_mobilenetv2_8xb24-320-300e_coco.py'),
    'yolox': Case('yolox_tiny_8xb8-300e_coco.py'),
}
# Families that share a directory with another.
MORE = {
    'cascade_rcnn/cascade-rcnn_r50_fpn_1x_coco.py': Case(),
    'centernet/centernet_r18_8xb16-crop512-140e_coco.py': Case(),
    'crowddet/crowddet-rcnn_refine_r50_fpn_8xb2-30e_crowdhuman.py': Case(
        edit=own_roi_align, num_classes=1
    ),
    'faster_rcnn/faster-rcnn_r50-caffe_c4-1x_coco.py': Case(
        factors=(1, 1), sizes=((64, 64),), edit=few_proposals
    ),
    'faster_rcnn/faster-rcnn_r50_fpn_ohem_1x_coco.py': Case(),
    'fast_rcnn/fast-rcnn_r50_fpn_1x_coco.py': Case(),
    'guided_anchoring/ga-faster-rcnn_r50_fpn_1x_coco.py': Case(),
    'guided_anchoring/ga-rpn_r50_fpn_1x_coco.py': Case(),
    'libra_rcnn/libra-retinanet_r50_fpn_1x_coco.py': Case(),
    'pisa/retinanet-r50_fpn_pisa_1x_coco.py': Case(),
    'rtmdet/rtmdet-ins_tiny_8xb32-300e_coco.py': Case(sizes=((64, 64), (64, 64))),
    'sabl/sabl-retinanet_r50_fpn_1x_coco.py': Case(),
    'seesaw_loss/mask-rcnn_r50_fpn_seesaw-loss_random-ms-2x_lvis-v1.py': Case(),
    'solo/solo_r50_fpn_1x_coco.py': Case(),
    'solo/decoupled-solo_r50_fpn_1x_coco.py': Case(),
}


# ---- refusals --------------------------------------------------------------------

TRACKER = 'mmdist does not know what to compare for a {}.*SingleStageDetector.*own_comp'
PROMPT = 'cannot compare a {}.*own_comparison.md|{} scores the words of a prompt'
# Patterns of the messages; `misc` wraps Detectron2.
REFUSED = dict.fromkeys(
    ('deepsort', 'mask2former_vis', 'masktrack_rcnn', 'misc', 'ocsort', 'qdtrack',
     'reid', 'soft_teacher'), TRACKER,
) | dict.fromkeys(('glip', 'grounding_dino', 'mm_grounding_dino'), PROMPT)  # fmt: skip
# They need detectron2, lap, mmpretrain or transformers: the bare class is refused.
NOT_BUILT_HERE = {
    'deepsort', 'glip', 'grounding_dino', 'misc', 'mm_grounding_dino', 'ocsort', 'reid',
}  # fmt: skip


# ---- a step ----------------------------------------------------------------------


@pytest.fixture(autouse=True)
def fast_on_small_tensors():
    torch.set_flush_denormal(True)
    yield
    torch.set_flush_denormal(False)


@pytest.fixture
def carafe_on_cpu(monkeypatch):
    """CARAFE in torch, as mmcv has it for CUDA only."""

    def carafe(features, masks, kernel_size, group_size, scale_factor):
        (n, c, h, w), k = features.shape, kernel_size
        patches = F.unfold(features, k, padding=k // 2).view(n, c * k * k, h, w)
        patches = F.interpolate(patches, scale_factor=scale_factor, mode='nearest')
        masks = masks.view(n, group_size, 1, k * k, *masks.shape[-2:])
        patches = patches.view(n, group_size, -1, k * k, *masks.shape[-2:])
        return (patches * masks).sum(3).flatten(1, 2)

    monkeypatch.setattr(sys.modules['mmcv.ops.carafe'], 'carafe', carafe)


def take_a_step(path: str, case: Case) -> None:
    model = build_pair(path, factors=case.factors, edit=case.edit, sizes=case.sizes)
    teacher = model.teacher.model
    before = {key: value.clone() for key, value in teacher.state_dict().items()}
    data = batch(model, case.sizes, case.num_classes)
    case.prepare(data)
    comparison = model.distill['dist']
    with Recorder([comparison]) as recorder:
        losses = model(**data, mode='loss')
    columns = {p.student.shape[1] for p in recorder.calls(comparison)[0].args[1]}

    terms = [losses[key] for key in losses if key.startswith('loss_dist')]
    assert terms and all(term.isfinite() for term in terms)
    # one or two classes have no inter-class relation, and none is logged
    for relation, counts in (('inter', min(columns) > 2), ('intra', True)):
        values = [v for k, v in losses.items() if re.match(f'dist.*_{relation}', k)]
        assert len(values) == len(terms) or not (values or counts)  # or left out
        assert not counts or all(value != 0 for value in values), losses
    torch.stack(terms).sum().backward()
    assert_learns(model.backbone, least=1e-4)
    assert all(p.grad is None for p in teacher.parameters())

    torch.optim.SGD(model.parameters(), lr=1e-3).step()
    for key, value in teacher.state_dict().items():
        assert torch.equal(value, before[key]), key


def first_config(directory: str) -> str:
    return min(path.name for path in (CONFIGS / directory).glob('*.py'))


@pytest.mark.usefixtures('carafe_on_cpu')
@pytest.mark.parametrize(
    'name',
    quick_or_slow(
        QUICK, [d for d in DIRECTORIES if d not in {*REFUSED, *WITHOUT_MODEL}]
    ),
)
def test_a_pair_of_each_directory_trains_a_step(name):
    case = CASES.get(name, Case())
    take_a_step(f'{name}/{case.config or first_config(name)}', case)


@pytest.mark.slow
@pytest.mark.parametrize('path', MORE)
def test_a_pair_of_further_families_trains_a_step(path):
    take_a_step(path, MORE[path])


def bare(cfg) -> nn.Module:
    """An uninitialised instance with only the attributes that mmdist looks at."""
    model = MMDET_MODELS.get(cfg.type)
    model = model.__new__(model)
    if isinstance(model, nn.Module):  # mmpretrain's stand-in is not
        nn.Module.__init__(model)
    if 'bbox_head' in cfg:
        model.bbox_head = bare(cfg.bbox_head)
    if 'language_model' in cfg:
        model.language_model = nn.Identity()
    return model


@pytest.mark.parametrize('directory', quick_or_slow(QUICK, REFUSED))
def test_a_refusal_names_the_family_and_what_to_do(directory):
    register_all_modules()
    path = f'{directory}/{first_config(directory)}'
    cfg = Config.fromfile(CONFIGS / path, import_custom_modules=False).model
    message = REFUSED[directory].replace('{}', cfg.type)
    with pytest.raises(ValueError, match=f'(?s){message}'):
        if directory in NOT_BUILT_HERE:
            model = bare(cfg)
            MODELS.build(default_for(model)).student_modules(model)
        else:
            build_pair(path)


def test_no_directory_is_left_out_but_parts_of_configs():
    for directory in WITHOUT_MODEL:
        paths = (CONFIGS / directory).glob('*.py')
        assert not any('model' in Config.fromfile(path) for path in paths)
