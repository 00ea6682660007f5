"""Check that a teacher fits a student, and write the config of the pair.

    python tools/new_pair.py \
        --student mmdet::retinanet/retinanet_r50_fpn_2x_coco.py \
        --teacher mmdet::retinanet/retinanet_x101-64x4d_fpn_1x_coco.py --out my_pair.py

Both are built with random weights and take one training step on random images: no
data, no checkpoint and no GPU is needed. What training would refuse is refused here.
Classes with other names and what is compared are given as in a config:

    --class-map car=vehicle --distill dist.type=mmdist.DenseLogits dist.levels=concat
"""

from __future__ import annotations

import argparse
import logging
import os
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from mmengine.config import Config, DictAction
from mmengine.config.utils import _get_cfg_metainfo, _get_package_and_cfg_path
from mmengine.logging import MessageHub, MMLogger
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import DefaultScope
from mmengine.structures import PixelData
from mmengine.utils import get_installed_path
from pair_report import (
    describe_comparison,
    describe_model,
    describe_preprocessing,
)
from torch import Tensor, nn

from mmdist import Comparison, Pair
from mmdist.families import FAMILIES
from mmdist.lookup import class_name_in
from mmdist.record import Recorder
from mmdist.registry import MODELS
from mmdist.teachers.classes import class_names_of_config
from mmdist.teachers.teacher import load_config, without_pretrained

SIZE = (256, 320)  # height, width of the random images
TEMPLATE = """\
_base_ = {student!r}
model = dict(
    _delete_=True,
    type='mmdist.Distiller',
    student=_base_.model,
    teacher=dict(
        config={teacher!r},
        checkpoint={checkpoint!r},{names}
    ),{distill}
)
"""


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--student', required=True, help='`pkg::path`, or a path')
    parser.add_argument('--teacher', required=True, help='`pkg::path`, or a path')
    parser.add_argument(
        '--checkpoint',
        help="the teacher's weights, path or URL; of a `pkg::path` those that the "
        'library publishes, if omitted',
    )
    parser.add_argument(
        '--class-map',
        nargs='+',
        default=[],
        metavar='STUDENT=TEACHER',
        help="the teacher's names of classes that the student names differently, or "
        'several that are one class to the student: vehicle=car,truck',
    )
    parser.add_argument(
        '--class-match',
        choices=('strict', 'shared'),
        help='shared: compare only the classes that both know',
    )
    parser.add_argument(
        '--distill',
        nargs='+',
        action=DictAction,
        metavar='KEY=VALUE',
        help='what is compared, <name>.type=... first; if omitted, the default of the '
        "student's family",
    )
    parser.add_argument('--out', help='where the config goes; printed if omitted')
    return parser.parse_args()


def published_checkpoint(config: str) -> str:
    """The URL that the library's metafile lists for a config.

    Raises:
        ValueError: The config is not the library's, or it has no weights.
    """
    if '::' in config:
        package, path = _get_package_and_cfg_path(config)
        try:
            meta = _get_cfg_metainfo(get_installed_path(package), path)
        except ValueError:  # it lists all the configs that there are
            meta = {}
        if 'Weights' in meta:
            return meta['Weights']
    raise ValueError(
        f'No published weights are known for {config!r}. Give --checkpoint, a path or '
        'a URL, or take a teacher that its library has weights for.'
    )


def build_pair(model: dict, scope: str) -> nn.Module:
    """Build a distilled model with random weights on both sides.

    Args:
        model: Config of the model, of type ``mmdist.Distiller``.
        scope: Default scope of the student's config.

    Returns:
        The model, ready for a step on the CPU.
    """
    model = without_pretrained(model)
    model.teacher.update(checkpoint=None, allow_random=True)
    preprocessor = model.student.get('data_preprocessor') or {}
    if preprocessor.get('size') is not None:
        preprocessor['size'] = SIZE
    with DefaultScope.overwrite_default_scope(scope):
        pair = revert_sync_batchnorm(MODELS.build(model))
        pair.init_weights()
    _expect_little(pair)
    return pair.train()


def _expect_little(pair: nn.Module) -> None:
    """Random weights are sure of nothing."""
    for module in pair.teacher.model.modules():
        test_cfg = getattr(module, 'test_cfg', None)
        if isinstance(test_cfg, dict) and 'score_thr' in test_cfg:
            test_cfg['score_thr'] = 0.0


def run_step(
    model: nn.Module, classes: Sequence[str]
) -> tuple[dict[str, Tensor], dict[str, list[Pair]]]:
    """One training step on random images, backward included.

    Args:
        model: The distilled model.
        classes: The student's class names.

    Returns:
        The losses as they are logged, and the pairs of each comparison.
    """
    message_hub = MessageHub.get_current_instance()
    message_hub.update_info('dataset_meta', dict(classes=classes))
    for key in ('iter', 'epoch'):  # some heads count
        message_hub.update_info(key, 0)
    data = model.data_preprocessor(_random_batch(model, len(classes)), training=True)
    comparisons = dict(model.distill.items())
    with Recorder(comparisons.values()) as recorder:
        total, losses = model.parse_losses(model.loss(**data))
    total.backward()
    if not torch.isfinite(total):
        raise ValueError(f'A loss is not finite: {losses}')
    pairs = {name: recorder.calls(c)[0].args[1] for name, c in comparisons.items()}
    return losses, pairs


def _random_batch(model: nn.Module, num_classes: int) -> dict:
    """Two images of noise with labels, as a data loader gives them."""
    if not hasattr(model, 'decode_head'):
        from mmdet.testing import demo_mm_inputs

        data = demo_mm_inputs(
            image_shapes=[(3, *SIZE)] * 2,
            num_items=[4, 4],
            num_classes=num_classes + 1,  # it draws labels from 1 on
            with_mask=getattr(model, 'with_mask', False),
            with_semantic=getattr(model.roi_head, 'with_semantic', False)
            if hasattr(model, 'roi_head')
            else False,
        )
        for sample in data['data_samples']:
            sample.gt_instances.labels -= 1
        return data
    from mmseg.structures import SegDataSample

    rng = np.random.default_rng(0)
    samples = []
    for _ in range(2):
        labels = rng.integers(0, num_classes, (8, 8)).repeat(SIZE[0] // 8, 0)
        labels = torch.from_numpy(labels.repeat(SIZE[1] // 8, 1))[None]
        sample = SegDataSample(metainfo=dict(img_shape=SIZE, ori_shape=SIZE))
        sample.gt_sem_seg = PixelData(data=labels)
        sample.gt_edge_map = PixelData(data=labels % 2)  # PIDNet's
        samples.append(sample)
    images = [
        torch.from_numpy(rng.integers(0, 256, (3, *SIZE), dtype=np.uint8))
        for _ in samples
    ]
    return dict(inputs=images, data_samples=samples)


def findings(
    model: nn.Module,
    classes: Sequence[str],
    losses: dict[str, Tensor],
    pairs: dict[str, list[Pair]],
) -> dict[str, str]:
    """What the check found, a line each."""
    teacher = model.teacher
    family = class_name_in(model, FAMILIES)
    lines = {
        'student': describe_model(model),
        'teacher': describe_model(teacher.model),
        'family': family or 'none with a default comparison',
    }
    for name, comparison in model.distill.items():
        lines[name] = _describe_pairs(comparison, pairs[name])
    if model.why_default:
        lines['chosen'] = f'because {model.why_default}'
    match = teacher.classes
    lines['classes'] = f'{len(classes)}, ' + (
        'the same in the same order'
        if match.teacher is None
        else f'{len(match.teacher)} of them matched by name with the '
        f"teacher's {match.num_teacher}"
    )
    lines['preprocessing'] = describe_preprocessing(teacher.renormalize)
    lines['first step'] = ', '.join(
        f'{key} {value.item():.3g}' for key, value in losses.items() if 'loss' in key
    )
    return lines


def _describe_pairs(comparison: Comparison, pairs: Sequence[Pair]) -> str:
    """What is compared, and what the loss was given."""
    shapes, strides = [], []
    for pair in pairs:
        rows, *shape = pair.student.shape
        if len(shape) > 1:
            shapes.append('x'.join(map(str, shape)))
            strides.append(str(round(SIZE[0] / shape[-2])))
        else:
            shapes.append(f'{rows} rows of {shape[0]}')
    return (
        f'{describe_comparison(comparison, pairs)}; '
        + ', '.join(shapes)
        + (f'; strides {", ".join(strides)}' if strides else '')
    )


def main() -> None:
    args = parse_args()
    warnings.filterwarnings('ignore')
    MMLogger.get_instance('mmdist', logger_name='mmdist', log_level='ERROR')
    logging.getLogger('mmengine').setLevel(logging.ERROR)
    try:
        checkpoint = args.checkpoint or published_checkpoint(args.teacher)
        student = load_config(args.student)
        classes = class_names_of_config(student)
        if classes is None:
            raise ValueError(f'{args.student!r} has no data set with class names.')
        if 'data_preprocessor' in student:  # as the Runner does
            student.model.setdefault('data_preprocessor', student.data_preprocessor)
        names = {}
        if args.class_map:
            pairs = (item.split('=', 1) for item in args.class_map)
            class_map = {k: v.split(',') if ',' in v else v for k, v in pairs}
            names['class_map'] = class_map
        if args.class_match:
            names['class_match'] = args.class_match
        distiller = dict(
            type='mmdist.Distiller',
            student=student.model,
            teacher=dict(config=args.teacher, **names),
        )
        if args.distill:
            distill = Config()
            distill.merge_from_dict(args.distill)
            distiller['distill'] = distill.to_dict()
        model = build_pair(Config(distiller)._cfg_dict, student.get('default_scope'))
        losses, pairs = run_step(model, classes)
    except (ValueError, RuntimeError, OSError, ImportError) as error:
        raise SystemExit(f'This pair does not work.\n{error}') from None
    for key, value in findings(model, classes, losses, pairs).items():
        print(f'{key:14} {value}')
    print(f'{"checkpoint":14} {checkpoint}')
    base = args.student
    if '::' not in base:
        base = os.path.relpath(base, Path(args.out or 'config.py').parent)
    text = TEMPLATE.format(
        student=base,
        teacher=args.teacher,
        checkpoint=checkpoint,
        names=''.join(f'\n        {k}={v!r},' for k, v in names.items()),
        distill=f'\n    distill={distiller["distill"]},' if args.distill else '',
    )
    if args.out is None:
        print(f'\n{text}', end='')
    else:
        Path(args.out).write_text(text)
        print(f'{"written":14} {args.out}')


if __name__ == '__main__':
    main()
