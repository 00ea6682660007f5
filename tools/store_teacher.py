"""Ask teachers once about all training images, and keep their answers.

    python tools/store_teacher.py CONFIG --out work_dirs/teacher

CONFIG distils. Its teachers see each training image as in a test, without augmentation;
labels are not read. Several teachers and views become one answer: the mean of the
probabilities, or boxes fused by weighted boxes fusion. A run that was interrupted goes
on. Then train from the folder: `teacher=dict(stored='work_dirs/teacher')`.
"""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from copy import deepcopy
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from dev.progress import Progress, clock
from mmengine.config import DictAction
from mmengine.dataset import Compose
from mmengine.dist import (
    barrier,
    broadcast_object_list,
    get_dist_info,
    is_distributed,
)
from mmengine.registry import DATASETS, DefaultScope
from teacher_answers import Answers, Asked
from torch.distributed import init_process_group
from torch.utils.data import DataLoader, Dataset
from train import load_distilling, mistakes_in_words

from mmdist.data.answers import bases_of
from mmdist.registry import MODELS
from mmdist.teachers.store import full_path
from mmdist.teachers.store_writer import StoreWriter

LABELS = ('instances', 'proposals', 'seg_map_path', 'segments_info')  # in a data set


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add('config', help='path of a config that distils')
    add('--out', required=True, metavar='FOLDER', help='where the answers go')
    add('--flip', action='store_true', help='ask about the mirrored images too')
    text = "sizes of the images beside the teacher's own, such as 0.75 1 1.25"
    add('--scales', type=float, nargs='+', default=[1.0], help=text)
    add('--min-score', type=float, default=0.05, help='the least score of a box')
    add('--launcher', choices=['none', 'pytorch'], default='none')
    add('--cfg-options', nargs='+', action=DictAction, help='key=value of the config')
    add('--traceback', action='store_true', help='of a mistake, show where it is found')
    parser.set_defaults(work_dir=None)
    args = parser.parse_args()
    if min(args.scales) <= 0:
        parser.error(f'--scales are above 0, got {args.scales}.')
    args.scales.sort(key=lambda scale: abs(math.log(scale)))  # the first gives the grid
    args.cfg = load_distilling(args, parser)
    return args


def images_of(dataset: Any) -> Iterator[dict]:
    """What a data set, through wrappers, knows of each image, but its labels."""
    for base, _ in bases_of(dataset):
        base.full_init()
        for index in range(len(base)):
            info = base.get_data_info(index)
            info = {key: x for key, x in info.items() if key not in LABELS}
            yield dict(info, img_path=full_path(info['img_path']), seg_fields=[])


class Images(Dataset):
    """Images as each pipeline packs them; a sentence for one that cannot be read."""

    def __init__(self, infos: Sequence[Mapping], pipelines: Sequence[Compose]) -> None:
        self.infos, self.pipelines = infos, pipelines

    def __len__(self) -> int:
        return len(self.infos)

    def __getitem__(self, index: int) -> list[dict] | str:
        info = self.infos[index]
        try:
            return [pipeline(deepcopy(info)) for pipeline in self.pipelines]
        except Exception as error:  # a worker would add its traceback
            return f'{info["img_path"]} cannot be read as in a test: {error!r}'


def as_it_is(packed: Any) -> Any:
    return packed


def build(args: argparse.Namespace) -> tuple[Answers, dict[str, dict]]:
    """The teachers, loaded, and what is known of each training image, by its path."""
    cfg = args.cfg
    given = cfg.model.get('teachers') or {'': cfg.model.get('teacher') or {}}
    if any('stored' in teacher or 'ema' in teacher for teacher in given.values()):
        raise SystemExit(
            'A teacher of this config is stored already, or is the mean of the student '
            'and changes with it. Give `teacher=dict(config=..., checkpoint=...)`.'
        )
    if cfg.get('data_preprocessor') is not None:
        cfg.model.setdefault('data_preprocessor', cfg.data_preprocessor)
    torch.manual_seed(0)  # random weights are those of all processes
    with DefaultScope.overwrite_default_scope(cfg.get('default_scope')):
        student = MODELS.build(cfg.model)
        dataset = DATASETS.build(cfg.train_dataloader.dataset)
    infos = {info['img_path']: info for info in images_of(dataset)}
    if torch.cuda.is_available():
        student.cuda()
    asked, classes = [], dataset.metainfo.get('classes')
    for teacher in student.teachers.values():
        teacher.dtype, teacher.compile = None, False  # it runs as in a test
        teacher.load(student)
        asked.append(Asked(teacher, cfg, classes, args.flip, args.scales))
    return Answers(asked, classes, args.min_score), infos


def store(args: argparse.Namespace) -> None:
    if args.launcher == 'pytorch' and not is_distributed():
        # the first to finish waits for the last
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
        images=len(infos),
    )
    writer = StoreWriter(args.out, manifest) if rank == 0 else None
    done = [writer and writer.done]
    broadcast_object_list(done)
    writer = writer or StoreWriter(args.out, manifest, rank)
    left = [x for path, x in infos.items() if path not in done[0]][rank::processes]
    pipelines = []
    for one in answers.asked:
        with DefaultScope.overwrite_default_scope(one.scope):
            pipelines += map(Compose, one.pipelines)
    loader = DataLoader(
        Images(left, pipelines),
        batch_size=None,
        collate_fn=as_it_is,
        num_workers=args.cfg.train_dataloader.get('num_workers', 0),
    )
    progress = Progress('store_teacher', len(left))
    with progress if rank == 0 else nullcontext():
        for info, packed in zip(left, loader, strict=True):
            if isinstance(packed, str):
                raise SystemExit(packed)
            writer.add(info['img_path'], *answers(packed))
            progress.finished += 1
            if rank == 0:
                pace = progress.elapsed() / progress.finished
                progress.show('images', pace * (len(left) - progress.finished))
    barrier()
    if rank == 0:
        number = writer.complete()
        files = [file for file in Path(args.out).rglob('*') if file.is_file()]
        size = sum(file.stat().st_size for file in files) / 1e6
        print(
            f'{number} images, {size:.1f} MB of {answers.kind} in {args.out}, '
            f'{clock(progress.elapsed())} for {len(left)} of them. Train with\n'
            f"    teacher=dict(stored='{args.out}')\n"
            "    custom_hooks = [dict(type='mmdist.StoredTeacherHook')]"
        )


def main() -> None:
    args = parse_args()
    with mistakes_in_words(args.traceback):
        store(args)


if __name__ == '__main__':
    main()
