r"""Check that a teacher fits a student, and write the config of the pair.

    python tools/new_pair.py \
        --student mmdet::retinanet/retinanet_r50_fpn_2x_coco.py \
        --teacher mmdet::retinanet/retinanet_x101-64x4d_fpn_1x_coco.py --out my_pair.py

Both are built with random weights and take one training step on random images: no
data, no checkpoint and no GPU is needed. What training would refuse is refused here.
Give a teacher of another library, other class names and comparisons as in a config:

    --teacher type=mmdist.HFSegmentor name=nvidia/segformer-b5-finetuned-ade-640-640
    --class-map car=vehicle --distill dist.type=mmdist.DenseLogits dist.levels=concat

Stored answers need the training images, which they are checked against:

    --stored work_dirs/teacher
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from mmengine.config import Config, DictAction
from mmengine.config.utils import _get_cfg_metainfo, _get_package_and_cfg_path
from mmengine.dataset import pseudo_collate
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import DATASETS, DefaultScope
from mmengine.utils import get_installed_path
from pair_report import (
    Report,
    Seen,
    as_text,
    quiet,
    report_pair,
    tell_as_hooks,
    watch,
)
from torch import nn

from mmdist.data.answers import check_images, join
from mmdist.data.labels import check_heads
from mmdist.registry import MODELS, why_not_built
from mmdist.teachers import ForeignTeacher
from mmdist.teachers.classes import class_names_of_config
from mmdist.teachers.teacher import load_config, read_config, without_pretrained

SIZE = (256, 320)  # height, width of the random images
TEMPLATE = """\
_base_ = {student!r}
model = dict(
    _delete_=True,
    type='mmdist.Distiller',
    student=_base_.model{inner},
    teacher=dict(
        {teacher}
    ),{distill}
){hooks}
"""
HOOK = "\ncustom_hooks = [{}dict(type='mmdist.StoredTeacherHook')]"


class PathOrDict(DictAction):
    """A path, or the entries of a config."""

    def __call__(self, parser, namespace, values, option_string=None):
        if len(values) == 1 and '=' not in values[0]:
            setattr(namespace, self.dest, values[0])
        elif all('=' in value for value in values):
            super().__call__(parser, namespace, values, option_string)
        else:
            parser.error(
                f'{option_string} must be a path or KEY=VALUE ..., got {values}.'
            )


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )

    def add(name: str, text: str, metavar: str | None = None, **options) -> None:
        parser.add_argument(name, help=text, metavar=metavar, **options)

    add('--student', '`pkg::path`, or a path', required=True)
    text = '`pkg::path`, a path, or type=... and more of a model of another library'
    add('--teacher', text, 'CONFIG', nargs='+', action=PathOrDict)
    text = 'instead of --teacher: what tools/store_teacher.py wrote, or a COCO results '
    add('--stored', f'{text}file of the training images', 'PATH')
    text = "the teacher's weights (default: the published ones of a `pkg::path`)"
    add('--checkpoint', text, 'PATH_OR_URL')
    text = 'classes that the teacher names differently: car=auto vehicle=truck,bus'
    add('--class-map', text, 'STUDENT=TEACHER', nargs='+', default=[])
    text = 'shared: compare only the classes that both know'
    add('--class-match', text, choices=('strict', 'shared'))
    text = "what to compare, <name>.type=... first (default: the family's comparison)"
    add('--distill', text, 'KEY=VALUE', nargs='+', action=DictAction)
    add('--out', 'file for the config; printed if omitted')
    args = parser.parse_args()
    if bool(args.teacher) == bool(args.stored):
        parser.error('Give either --teacher or --stored.')
    if args.checkpoint and args.stored:
        parser.error('--checkpoint is for --teacher: stored answers need none.')
    if wrong := [pair for pair in args.class_map if '=' not in pair]:
        parser.error(f'--class-map must be STUDENT=TEACHER ..., got {wrong}.')
    pairs = (item.split('=', 1) for item in args.class_map)
    args.class_map = {k: v.split(',') if ',' in v else v for k, v in pairs}
    distill = Config()
    distill.merge_from_dict(args.distill or {})
    args.distill = distill.to_dict()
    return args


def published_checkpoint(config: str) -> str | None:
    """The weights' URL that the library's metafile lists for a config, or None."""
    if '::' not in config:
        return None
    package, path = _get_package_and_cfg_path(config)
    try:
        return _get_cfg_metainfo(get_installed_path(package), path).get('Weights')
    except ValueError:  # the metafiles do not list it
        return None


def build_pair(model: dict, student: Config) -> tuple[nn.Module, list[dict]]:
    """Build a distilled model for a step on the CPU, with random weights on both sides.

    Args:
        model: Its config.
        student: The student's whole config.

    Returns:
        The model, and two training images if its teacher is stored.
    """
    model, images = without_pretrained(model), []
    is_stored = 'stored' in model.teacher
    if not is_stored:
        model.teacher.update(checkpoint=None, allow_random=True)
        preprocessor = model.student.get('data_preprocessor') or {}
        if preprocessor.get('size') is not None:
            preprocessor['size'] = SIZE
    with DefaultScope.overwrite_default_scope(student.get('default_scope')):
        pair = revert_sync_batchnorm(MODELS.build(model))
        if is_stored:
            dataset = DATASETS.build(student.train_dataloader.dataset)
            join(dataset, pair.teacher.store.kind)
            check_images(dataset, pair.teacher.store)
            images = [dataset[0], dataset[len(dataset) - 1]]
        pair.init_weights()
    # Random weights give low scores only.
    for module in pair.teacher.model.modules():
        test_cfg = getattr(module, 'test_cfg', None)
        if isinstance(test_cfg, dict) and 'score_thr' in test_cfg:
            test_cfg['score_thr'] = 0.0
    return pair.train(), images


def run_step(model: nn.Module, classes: Sequence[str], batch: dict) -> Seen:
    """Run one training step, backward included."""
    tell_as_hooks(dict(classes=classes))
    data = model.data_preprocessor(batch, training=True)
    seen = watch(model, lambda: model.loss(**data))
    total, losses = model.parse_losses(seen.losses)
    total.backward()
    if not torch.isfinite(total):
        raise ValueError(f'A loss is not finite: {losses}')
    return seen._replace(losses=losses)


def random_batch(model: nn.Module, num_classes: int) -> dict:
    """Two images of noise with labels, as a data loader gives them."""
    if not hasattr(model, 'decode_head'):
        from mmdet.testing import demo_mm_inputs

        options = dict(with_mask=getattr(model, 'with_mask', False))
        if hasattr(model, 'roi_head'):
            options['with_semantic'] = getattr(model.roi_head, 'with_semantic', False)
        # it draws labels from 1 on
        data = demo_mm_inputs(2, [(3, *SIZE)] * 2, [4, 4], num_classes + 1, **options)
        for sample in data['data_samples']:
            sample.gt_instances.labels -= 1
        return data
    from mmseg.datasets import PackSegInputs

    rng = np.random.default_rng(0)
    pack = PackSegInputs(meta_keys=('img_shape', 'ori_shape'))
    samples = []
    for _ in range(2):
        image = rng.integers(256, size=(*SIZE, 3), dtype=np.uint8)
        labels = rng.integers(num_classes, size=SIZE)
        maps = dict(gt_seg_map=labels, gt_edge_map=labels % 2)  # edges for PIDNet
        samples.append(pack(dict(img=image, img_shape=SIZE, ori_shape=SIZE, **maps)))
    return pseudo_collate(samples)


def portable(path: str, folder: Path) -> str:
    """A path for a config in ``folder`` that is valid wherever it is read from."""
    if '::' in path or '://' in path or os.path.isabs(path):
        return path
    return f'{{{{ fileDirname }}}}/{os.path.relpath(path, folder)}'


def main() -> None:
    args = parse_args()
    quiet()
    given = dict(class_map=args.class_map, class_match=args.class_match)
    options = {key: value for key, value in given.items() if value}
    kind = 'stored' if args.stored else 'config'
    source = args.stored or args.teacher
    try:
        whole = read_config(args.student, '--student')
        student = load_config(whole, '--student')
        if isinstance(args.teacher, str):
            load_config(args.teacher, '--teacher')
        classes = class_names_of_config(student)
        if classes is None:
            raise ValueError(f'{args.student!r} has no data set with class names.')
        teacher = {kind: source, **options}
        pair = dict(type='mmdist.Distiller', student=student.model, teacher=teacher)
        if args.distill:
            pair['distill'] = args.distill
        model, images = build_pair(Config(pair)._cfg_dict, student)
        check_heads(model.teacher.model, model.teacher.class_names, 'teacher')
        batch = pseudo_collate(images) if images else random_batch(model, len(classes))
        seen = run_step(model, classes, batch)
    except Exception as error:
        expected = (ValueError, RuntimeError, OSError, ImportError)
        said = why_not_built(error)
        if not said and not isinstance(error, expected):
            raise  # a bug in this tool
        raise SystemExit(f'This pair does not work.\n{said or error}') from None
    report = Report()
    report_pair(report, model, classes, seen)
    losses = {k: v.item() for k, v in seen.losses.items() if 'loss' in k}
    report.section('first step')
    report.line('losses', as_text(losses, 20))

    folder = Path(args.out or 'config.py').parent
    entries = {kind: portable(source, folder) if isinstance(source, str) else source}
    if not isinstance(model.teacher.model, ForeignTeacher):  # it brings its weights
        checkpoint = args.checkpoint or published_checkpoint(args.teacher)
        if checkpoint is None:
            raise SystemExit(
                f'The pair works, but no published weights of {args.teacher!r} are '
                'known. To write its config, give --checkpoint, a path or a URL.'
            )
        missing = '://' not in checkpoint and not os.path.exists(checkpoint)
        note = ', which does not exist: training needs it' if missing else ''
        report.line('checkpoint', checkpoint + note)
        entries['checkpoint'] = portable(checkpoint, folder)
    lines = [f'{k}={v!r},' for k, v in (entries | options).items()]
    base, others = args.student, '*_base_.custom_hooks, '
    hooks = HOOK.format(others if whole.get('custom_hooks') else '')
    text = TEMPLATE.format(
        student=base if '::' in base else os.path.relpath(base, folder),
        inner='.student' if 'student' in whole.model else '',
        teacher='\n        '.join(lines),
        distill=f'\n    distill={args.distill},' if args.distill else '',
        hooks=hooks if args.stored else '',
    )
    if args.out is None:
        print(f'\n{text}', end='')
    else:
        Path(args.out).write_text(text)
        report.line('written', args.out)


if __name__ == '__main__':
    main()
