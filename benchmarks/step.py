"""Forward and backward of a batch of two, random weights. *Student + teacher* is the
student's own step plus one bare forward of the compared parts of the teacher, without
gradient: nothing can be faster. The *usual way* is that of general distillation
libraries: the teacher's whole loss pass without gradient, outputs caught by hooks, and
the textbook formula. For two-stage detectors it compares the boxes that each model
happened to sample; mmdet's DINO has no loss pass in eval. *Peak* is as above, for the
step; it cannot be less than that of the student alone.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from copy import deepcopy
from typing import NamedTuple

import torch
from mmengine.hub import get_config
from mmengine.logging import MMLogger
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import DefaultScope
from mmengine.structures import PixelData
from torch import nn

from benchmarks import textbook
from benchmarks.measure import interleaved, peak_memory, table, verdict
from mmdist.teachers.teacher import without_pretrained


class Pair(NamedTuple):
    student: str
    teacher: str
    bare: Callable[[nn.Module, torch.Tensor, list], None]
    hook: str = ''  # the student's module that the usual way compares; '': none
    teacher_hook: str = ''  # the teacher's
    activation: str = 'sigmoid'
    size: tuple[int, int] = (320, 320)  # on a CPU
    full_size: tuple[int, int] = (800, 1333)  # on a GPU
    # at most this overhead, at least this speedup
    goals: tuple[float, float | None] = (1.10, None)


def bare_segmentor(teacher: nn.Module, inputs: torch.Tensor, samples: list) -> None:
    features = teacher.extract_feat(inputs)
    teacher.decode_head(features)
    if teacher.with_auxiliary_head:
        teacher.auxiliary_head(features)


def bare_dense(teacher: nn.Module, inputs: torch.Tensor, samples: list) -> None:
    teacher.bbox_head(teacher.extract_feat(inputs))


def bare_roi(teacher: nn.Module, inputs: torch.Tensor, samples: list) -> None:
    features = teacher.extract_feat(inputs)
    corners, sizes = torch.rand((2, 512, 2), device=inputs.device) * 140
    boxes = torch.cat([corners, corners + 16 + sizes], 1)
    rois = [torch.cat([boxes.new_full((512, 1), i), boxes], 1) for i in range(2)]
    teacher.roi_head._bbox_forward(0, features, torch.cat(rois))


def bare_detr(teacher: nn.Module, inputs: torch.Tensor, samples: list) -> None:
    teacher(inputs, samples, mode='tensor')


def bare_detections(teacher: nn.Module, inputs: torch.Tensor, samples: list) -> None:
    samples = [type(sample)(metainfo=sample.metainfo) for sample in samples]
    teacher.predict(inputs, samples, rescale=False)


RETINANET = 'mmdet::retinanet/retinanet_r50_fpn_1x_coco.py'
SEGMENTOR = dict(
    bare=bare_segmentor,
    hook='decode_head.conv_seg',
    teacher_hook='decode_head.conv_seg',
    activation='softmax',
    size=(256, 512),
    full_size=(512, 1024),
)
PAIRS = {
    'DeepLabV3 R18 <- R101': Pair(
        'mmseg::deeplabv3/deeplabv3_r18-d8_4xb2-80k_cityscapes-512x1024.py',
        'mmseg::deeplabv3/deeplabv3_r101-d8_4xb2-80k_cityscapes-512x1024.py',
        **SEGMENTOR,
    ),
    'RetinaNet R50 <- R101': Pair(
        RETINANET,
        'mmdet::retinanet/retinanet_r101_fpn_1x_coco.py',
        bare_dense,
        'bbox_head.retina_cls',
        'bbox_head.retina_cls',
        goals=(1.10, 1.1),
    ),
    'Faster R-CNN R50 <- Cascade Mask R-CNN R50': Pair(
        'mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py',
        'mmdet::cascade_rcnn/cascade-mask-rcnn_r50_fpn_1x_coco.py',
        bare_roi,
        'roi_head.bbox_head.fc_cls',
        'roi_head.bbox_head.0.fc_cls',
        activation='softmax',
        goals=(1.10, 1.25),
    ),
    'SegFormer B0 <- B2': Pair(
        'mmseg::segformer/segformer_mit-b0_8xb1-160k_cityscapes-1024x1024.py',
        'mmseg::segformer/segformer_mit-b2_8xb1-160k_cityscapes-1024x1024.py',
        **SEGMENTOR,
    ),
    'DINO R50 <- DINO R50, 36 epochs': Pair(
        'mmdet::dino/dino-4scale_r50_8xb2-12e_coco.py',
        'mmdet::dino/dino-4scale_r50_8xb2-36e_coco.py',
        bare_detr,
    ),
    'RetinaNet R50 <- Cascade R-CNN R50': Pair(
        RETINANET,
        'mmdet::cascade_rcnn/cascade-rcnn_r50_fpn_1x_coco.py',
        bare_detections,
    ),
    'RetinaNet R50 <- DINO R50': Pair(
        RETINANET, 'mmdet::dino/dino-4scale_r50_8xb2-12e_coco.py', bare_detections
    ),
}


class Models(NamedTuple):
    """The models of a comparison of steps, and their common batch."""

    student: nn.Module
    teacher: nn.Module
    distilled: nn.Module
    data: dict


def batch(library: str, size: tuple[int, int], model: nn.Module) -> dict:
    """Two images with their labels, as the model's ``loss`` takes them."""
    torch.manual_seed(0)
    if library == 'mmdet':
        from mmdet.testing import demo_mm_inputs

        data = demo_mm_inputs(2, [(3, *size)] * 2, num_items=[8, 8], with_mask=True)
    else:
        from mmseg.structures import SegDataSample

        data = dict(inputs=[], data_samples=[])
        for _ in range(2):
            sample = SegDataSample(metainfo=dict(img_shape=size, ori_shape=size))
            labels = torch.randint(0, 19, (1, *size))
            sample.gt_sem_seg = PixelData(data=labels)
            data['data_samples'].append(sample)
            data['inputs'].append(torch.randint(0, 255, (3, *size), dtype=torch.uint8))
    return model.data_preprocessor(data, True)


@functools.lru_cache(maxsize=1)
def models_of(
    name: str, device: str = 'cpu', size: tuple[int, int] | None = None
) -> Models:
    """The models of a pair, with random weights; ``size`` overrides the image size."""
    pair = PAIRS[name]
    size = size or pair.size
    library = pair.student.split('::')[0]
    if library == 'mmdet':
        from mmdet.utils import register_all_modules
    else:
        from mmseg.utils import register_all_modules
    register_all_modules(init_default_scope=False)
    MMLogger.get_current_instance().setLevel('ERROR')
    DefaultScope.get_instance(name, scope_name=library)
    from mmengine.registry import MODELS

    torch.manual_seed(0)
    student_cfg, teacher_cfg = (
        without_pretrained(get_config(x).model) for x in (pair.student, pair.teacher)
    )
    if library == 'mmseg':  # the batch already has this size
        for cfg in (student_cfg, teacher_cfg):
            cfg.data_preprocessor.size = size
    student, teacher = (
        # a copy: DINO writes into its config
        revert_sync_batchnorm(MODELS.build(deepcopy(cfg)))
        for cfg in (student_cfg, teacher_cfg)
    )
    for model in (student, teacher):
        model.init_weights()
    teacher.eval()
    teacher_cfg = dict(config=teacher_cfg, checkpoint=None, allow_random=True)
    distiller = dict(type='mmdist.Distiller', student=student_cfg, teacher=teacher_cfg)
    distilled = revert_sync_batchnorm(MODELS.build(distiller))
    distilled.init_weights()
    distilled.load_state_dict(student.state_dict())
    # the same weights: how long a detector takes depends on what it finds
    distilled.teacher.model.load_state_dict(teacher.state_dict())
    student, teacher, distilled = (x.to(device) for x in (student, teacher, distilled))
    return Models(student, teacher, distilled, batch(library, size, student))


def steps_of(
    name: str,
    device: str = 'cpu',
    size: tuple[int, int] | None = None,
    amp: torch.dtype | None = None,
) -> dict[str, Callable[[], None]]:
    """The contestants of a pair; ``amp`` is the dtype of autocast, if any."""
    pair = PAIRS[name]
    student, teacher, distilled, data = models_of(name, device, size)
    given = data['inputs'], data['data_samples']
    autocast = functools.partial(
        torch.autocast, device, dtype=amp, enabled=amp is not None
    )

    def train(model: nn.Module, extra: Callable = lambda: 0) -> None:
        with autocast():
            loss = model.parse_losses(model.loss(*given))[0] + extra()
        loss.backward()
        model.zero_grad()

    outputs: dict[str, list] = {'student': [], 'teacher': []}

    @torch.no_grad()
    def bare() -> None:
        with autocast():
            pair.bare(teacher, *given)

    def usual() -> None:
        hooks = [
            model.get_submodule(path).register_forward_hook(
                lambda module, args, out, key=key: outputs[key].append(out)
            )
            for key, model, path in (
                ('student', student, pair.hook),
                ('teacher', teacher, pair.teacher_hook),
            )
        ]
        with torch.no_grad(), autocast():
            teacher.loss(*given)

        def distil() -> torch.Tensor:
            both = zip(outputs['student'], outputs['teacher'], strict=True)
            return sum(textbook.dist_loss(s, t, pair.activation) for s, t in both)

        train(student, distil)
        for caught in outputs.values():
            caught.clear()
        for hook in hooks:
            hook.remove()

    steps = {
        'student': lambda: train(student),
        'teacher': bare,
        'distilled': lambda: train(distilled),
        'usual': usual,
    }
    return steps if pair.hook else {k: v for k, v in steps.items() if k != 'usual'}


def step_of(name: str, which: str) -> Callable[[], None]:
    return steps_of(name)[which]


def steps(seconds: float) -> str:
    """The table of steps, with its goals."""
    rows = []
    for name, pair in PAIRS.items():
        time = interleaved(steps_of(name), 3 * seconds)
        bare = time['student'] + time['teacher']
        peak = {
            which: peak_memory('benchmarks.step:step_of', name, which)
            for which in ('student', 'distilled', 'usual')
            if which in time
        }
        overhead = time['distilled'] / bare
        goal = pair.goals[0]
        cells = [f'{overhead:.2f} ({goal:.2f}), {verdict(overhead <= goal)}']
        cells += ['—'] * 3
        if pair.hook:
            faster = time['usual'] / time['distilled']
            memory = peak['distilled'] / peak['usual']
            alone = peak['student'] / peak['usual']
            cells[1:] = [f'{faster:.2f}x', f'{memory:.2f}', f'{alone:.2f}']
        if pair.goals[1]:
            cells[1] += f' ({pair.goals[1]}x), {verdict(faster >= pair.goals[1])}'
            cells[2] += f' (0.8), {verdict(memory <= 0.8)}'
        times = [f'{x:.2f}' for x in time.values()] + ['—'] * (4 - len(time))
        rows.append([f'{name}, {pair.size[0]}x{pair.size[1]}', *times, *cells])
        print(' | '.join(rows[-1]), flush=True)
    head = [
        'pair',
        'student, s',
        'teacher, s',
        'distilled, s',
        'usual way, s',
        'distilled / (student + teacher) (goal: at most)',
        'usual / distilled (goal: at least)',
        'peak, distilled / usual (goal: at most)',
        'peak, student alone / usual',
    ]
    return table(head, rows) + '\n'
