"""Ask teachers once about all training images, and keep their answers.

    python tools/store_teacher.py CONFIG --out work_dirs/teacher

CONFIG is a distillation config. Its teachers see each training image as in a test, with
no augmentation; labels are not read. Several teachers and views become one answer: the
mean of the probabilities, or boxes fused by weighted boxes fusion. An interrupted run
is continued. Then train from the folder: `teacher=dict(stored='work_dirs/teacher')`.
"""

from __future__ import annotations

import argparse
import io
import math
import os
import sys
from collections.abc import Callable, Sequence
from copy import deepcopy
from datetime import timedelta
from functools import partial
from itertools import product
from pathlib import Path

import torch
from dev.progress import Progress, clock
from mmengine.config import DictAction
from mmengine.dist import barrier, get_dist_info, is_distributed
from mmengine.registry import DATASETS, DefaultScope
from teacher_answers import Answers, Asked
from torch.distributed import init_process_group
from torch.utils.data import DataLoader
from train import load_distilling, mistakes_in_words

from mmdist.data.answers import infos_of
from mmdist.registry import MODELS
from mmdist.teachers.store import StoreWriter


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add('config', help='path of a config that distils')
    add('--out', required=True, metavar='FOLDER', help='where the answers go')
    add('--flip', action='store_true', help='ask about the mirrored images too')
    text = "image scales relative to the teacher's own size, such as 0.75 1 1.25"
    add('--scales', type=float, nargs='+', default=[1.0], help=text)
    add('--min-score', type=float, default=0.05, help='lowest score of a stored box')
    add('--launcher', choices=['none', 'pytorch'], default='none')
    add('--cfg-options', nargs='+', action=DictAction, help='key=value of the config')
    add('--traceback', action='store_true', help='show where a mistake was found')
    parser.set_defaults(work_dir=None)
    args = parser.parse_args()
    if min(args.scales) <= 0:
        parser.error(f'--scales must be above 0, got {args.scales}.')
    args.scales.sort(key=lambda scale: abs(math.log(scale)))  # the first gives the grid
    args.cfg = load_distilling(args, parser)
    return args


def build(args: argparse.Namespace) -> tuple[Answers, list[dict]]:
    """Load the teachers, and list the info of each training image once."""
    cfg = args.cfg
    given = cfg.model.get('teachers') or {'': cfg.model.get('teacher') or {}}
    if any('stored' in teacher or 'ema' in teacher for teacher in given.values()):
        raise SystemExit(
            'A teacher of this config is already stored, or is the mean of the student '
            'and changes with it. Give `teacher=dict(config=..., checkpoint=...)`.'
        )
    if cfg.get('data_preprocessor') is not None:
        cfg.model.setdefault('data_preprocessor', cfg.data_preprocessor)
    torch.manual_seed(0)  # the same random weights in all processes
    with DefaultScope.overwrite_default_scope(cfg.get('default_scope')):
        student = MODELS.build(cfg.model)
        dataset = DATASETS.build(cfg.train_dataloader.dataset)
    infos = {}
    for info in infos_of(dataset):
        info.pop('instances', None)  # gigabytes in a large data set
        infos[os.path.abspath(info['img_path'])] = info
    if torch.cuda.is_available():
        student.cuda()
    asked, classes = [], dataset.metainfo.get('classes') or ()
    for teacher in student.teachers.values():
        teacher.dtype, teacher.compile = None, False  # as in a test
        teacher.load(student)
        flips = (False, True) if args.flip or 'flip' in teacher.views else (False,)
        asked.append(Asked(teacher, cfg, classes, [*product(args.scales, flips)]))
    return Answers(asked, classes, args.min_score), [*infos.values()]


def pack(pipelines: Sequence[Callable], info: dict) -> tuple[str, list[dict] | str]:
    """The path of an image and each pipeline's output, or why it cannot be read."""
    path = info['img_path']
    try:
        return path, [pipe(dict(deepcopy(info), seg_fields=[])) for pipe in pipelines]
    except Exception as error:  # a worker would add its traceback
        return path, f'{path} cannot be read by the test pipeline: {error!r}'


def store(args: argparse.Namespace) -> None:
    if args.launcher == 'pytorch' and not is_distributed():
        # the first process to finish waits for the last
        init_process_group('gloo', timeout=timedelta(days=30))
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ['LOCAL_RANK']))
    rank, processes = get_dist_info()
    answers, infos = build(args)
    manifest = dict(
        kind=answers.kind,
        class_names=answers.class_names,
        teachers=[one.describe() for one in answers.asked],
        min_score=args.min_score,
    )
    if rank:
        barrier()
    writer = StoreWriter(args.out, manifest, rank)
    if not rank:
        barrier()
    share = infos[rank::processes]
    left = [x for x in share if os.path.abspath(x['img_path']) not in writer.done]
    loader = DataLoader(
        left,
        batch_size=None,
        collate_fn=partial(pack, [one.pipeline for one in answers.asked]),
        num_workers=args.cfg.train_dataloader.get('num_workers', 0),
    )
    out = io.StringIO() if rank else sys.stdout
    with Progress('store_teacher', len(left), out) as progress:
        for path, packed in loader:
            if isinstance(packed, str):
                raise SystemExit(packed)
            size = packed[0]['data_samples'].ori_shape[:2]
            writer.add(path, size, answers(packed))
            progress.finished += 1
            pace = progress.elapsed() / progress.finished
            progress.show('images', pace * (len(left) - progress.finished))
    barrier()
    files = [file for file in Path(args.out).rglob('*') if file.is_file()]
    size = sum(file.stat().st_size for file in files) / 1e6
    print(
        f'{len(infos)} images, {size:.1f} MB of {answers.kind} in {args.out}, '
        f'{clock(progress.elapsed())} for {len(left)} of them. Train with\n'
        f"    teacher=dict(stored='{args.out}')\n"
        "    custom_hooks = [dict(type='mmdist.StoredTeacherHook')]",
        file=out,
    )


def main() -> None:
    args = parse_args()
    with mistakes_in_words(args.traceback):
        store(args)


if __name__ == '__main__':
    main()
