"""Does the distilled student train wherever the student alone does?

Students train from scratch on scenes of digits (`python -m tools.dev.make_digits`) with
mmdet's and mmseg's own optimizer settings: alone, and with the defaults of mmdist. The
teacher is the same network from another start, trained as long. *Own* is the mean of
the student's own losses over the last ten iterations. *Most* is their largest ratio to
those of the student alone at the same time, in windows of ten; the goal is 1.5.
"""

from __future__ import annotations

import functools
import logging
import math
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from mmdet.utils import register_all_modules as register_mmdet
from mmengine.config import Config, ConfigDict
from mmengine.dataset import pseudo_collate
from mmengine.logging import MMLogger
from mmengine.model import revert_sync_batchnorm
from mmengine.optim import build_optim_wrapper
from mmengine.registry import DATASETS, DefaultScope
from mmseg.utils import register_all_modules as register_mmseg
from torch import nn
from torch.optim.lr_scheduler import LinearLR

from benchmarks.measure import table
from mmdist.registry import MODELS
from mmdist.teachers.teacher import without_pretrained

STUDENTS = {
    'RetinaNet': 'mmdet::retinanet/retinanet_r18_fpn_1x_coco.py',
    'ATSS': 'mmdet::atss/atss_r50_fpn_1x_coco.py',
    'FCOS': 'mmdet::fcos/fcos_r50-caffe_fpn_gn-head_1x_coco.py',
    'Faster R-CNN': 'mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py',
    'DINO': 'mmdet::dino/dino-4scale_r50_8xb2-12e_coco.py',
    'YOLOX': 'mmdet::yolox/yolox_tiny_8xb8-300e_coco.py',
    'PSPNet': 'mmseg::pspnet/pspnet_r18-d8_4xb2-80k_cityscapes-512x1024.py',
    'SegFormer': 'mmseg::segformer/segformer_mit-b0_8xb1-160k_cityscapes-1024x1024.py',
}
WARM_UPS = (10, 500)
ITERATIONS, WINDOW, BATCH = 60, 10, 2
RESNETS = (64, 128, 256, 512, 1024, 2048)  # channels of their stages
DATASETS_OF = Path(__file__).parent.parent / 'configs' / '_base_' / 'datasets'
DATA = {'mmdet': 'digits_detection.py', 'mmseg': 'digits_segmentation.py'}


def small(node: Any, is_narrow: bool = True) -> Any:
    """Shrink a model's config: ten classes, from scratch, with a narrow ResNet-18.

    Args:
        node: The config.
        is_narrow: Whether to make its neck and heads a quarter as wide, too.
    """
    if isinstance(node, list):
        if node and all(x in RESNETS for x in node):
            return [channels * 128 // node[-1] for channels in node]
        return [small(x, is_narrow) for x in node]
    if not isinstance(node, dict):
        return node
    changes = dict(num_classes=10, norm_eval=False, frozen_stages=-1, num_queries=100)
    if 'depth' in node:
        node = {**node, 'base_channels': 16, 'stem_channels': 16}
        changes |= dict(depth=18)
    if node.get('num_layers') == 6:  # of a transformer
        changes['num_layers'] = 2
    if is_narrow:
        for key in ('in_channels', 'out_channels', 'feat_channels', 'fc_out_channels'):
            if node.get(key) in (256, 512, 1024):
                changes[key] = node[key] // 4
    return ConfigDict({k: changes.get(k, small(x, is_narrow)) for k, x in node.items()})


@functools.cache
def samples(scope: str) -> Any:
    """The data set of the students."""
    config = Config.fromfile(DATASETS_OF / DATA[scope])
    with DefaultScope.overwrite_default_scope(scope):
        return DATASETS.build(config.train_dataloader.dataset)


def train(model: nn.Module, config: Config, scope: str, warm_up: int) -> list[float]:
    """Train; return the student's own loss by iteration, NaN from a failure on."""
    with DefaultScope.overwrite_default_scope(scope):
        settings = deepcopy(config.optim_wrapper)
        settings.type = 'OptimWrapper'
        optimizer = build_optim_wrapper(model, settings)
    schedule = LinearLR(optimizer.optimizer, 0.001, total_iters=warm_up)
    data, order = samples(scope), torch.Generator().manual_seed(0)
    own = []
    for iteration in range(ITERATIONS):
        torch.manual_seed(iteration)
        index = torch.randint(len(data), (BATCH,), generator=order).tolist()
        batch = model.data_preprocessor(pseudo_collate([data[i] for i in index]), True)
        try:
            losses = model(**batch, mode='loss')
        except RuntimeError as error:  # NaN stops a distilled model
            print(str(error).splitlines()[0])
            return own + [math.nan] * (ITERATIONS - len(own))
        total, logged = model.parse_losses(losses)
        optimizer.update_params(total)
        schedule.step()
        own.append(
            sum(
                value.item()
                for key, value in logged.items()
                if 'loss' in key
                and key != 'loss'
                and not key.startswith(('loss_dist', 'loss_box'))
            )
        )
    return own


def built(cfg: dict, scope: str, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    with DefaultScope.overwrite_default_scope(scope):
        model = MODELS.build(deepcopy(cfg))  # DINO writes into it
        model = revert_sync_batchnorm(model)
        model.init_weights()
    return model.train()


def windows(values: list[float]) -> list[float]:
    return [sum(values[i : i + WINDOW]) / WINDOW for i in range(0, ITERATIONS, WINDOW)]


def steps(seconds: float) -> str:
    """The table; it takes ten minutes on one core (`--threads 1`)."""
    register_mmdet(init_default_scope=False)
    register_mmseg(init_default_scope=False)
    MMLogger.get_current_instance().setLevel(logging.ERROR)
    rows = []
    for name, path in STUDENTS.items():
        scope = path.partition('::')[0]
        config = Config.fromstring(f'_base_ = {path!r}', '.py')
        # DINO's code has 256 channels hard-coded
        cfg = small(without_pretrained(config.model), name != 'DINO')
        cfg.data_preprocessor.pop('batch_augments', None)
        if scope == 'mmseg':
            cfg.data_preprocessor.size = (96, 128)
        trained = built(cfg, scope, seed=1)
        train(trained, config, scope, WARM_UPS[0])
        for warm_up in WARM_UPS:
            alone = train(built(cfg, scope), config, scope, warm_up)
            row = [name, str(warm_up), f'{windows(alone)[-1]:.2f}']
            for balance in (None, 3.0):
                if balance is None and warm_up != WARM_UPS[0]:
                    row += ['', '']  # diverges where it does with a short warm-up
                    continue
                teacher = dict(config=cfg, allow_random=True)
                distiller = dict(
                    type='mmdist.Distiller',
                    student=cfg,
                    teacher=teacher,
                    balance=balance,
                )
                model = built(distiller, scope)
                model.teacher.model.load_state_dict(trained.state_dict())
                own = train(model, config, scope, warm_up)
                ratios = [
                    a / b for a, b in zip(windows(own), windows(alone), strict=True)
                ]
                most = math.nan if math.isnan(sum(ratios)) else max(ratios)
                row += [f'{windows(own)[-1]:.2f}', f'{most:.2f}']
            rows.append(row)
            print(' | '.join(row), flush=True)
    head = ['student', 'warm-up', 'own, alone']
    head += ['own, published', 'most', 'own, balance 3', 'most']
    return table(head, rows) + '\n'
