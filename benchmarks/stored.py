"""Loading two images by one worker, forward and backward, random weights: the student
alone, and distilled from stored answers (40 boxes per image, or a map at 1/8 size).
Only the loss adds to the cost. *Peak* is that of the step.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from mmcv.image import imwrite
from mmengine.dataset import InfiniteSampler, pseudo_collate
from mmengine.hub import get_config
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import DATASETS, DefaultScope
from torch.utils.data import DataLoader

from benchmarks.measure import interleaved, peak_memory, table, verdict
from benchmarks.step import PAIRS, models_of
from mmdist.data.answers import check_images, join
from mmdist.registry import MODELS
from mmdist.teachers.store import StoreWriter
from mmdist.teachers.teacher import without_pretrained

NAMES = ('RetinaNet R50 <- Cascade R-CNN R50', 'DeepLabV3 R18 <- R101')
IMAGES, BOXES, GOAL = 8, 40, 1.05


def data_of(library: str, folder: Path, size: tuple[int, int]) -> tuple[dict, list]:
    """Config of a data set of random images, and an answer for each of them."""
    rng, (height, width) = np.random.default_rng(0), size
    coco, answers = dict(images=[], annotations=[]), []
    for i in range(IMAGES):
        file = f'{i}.png'
        imwrite(rng.integers(0, 256, (*size, 3), np.uint8), f'{folder}/images/{file}')
        imwrite(rng.integers(0, 19, size, np.uint8), f'{folder}/labels/{file}')
        coco['images'].append(dict(id=i, file_name=file, height=height, width=width))
        start = rng.uniform(0, (width / 2, height / 2), (BOXES, 2))
        sides = rng.uniform(16, (width / 2, height / 2), (BOXES, 2))
        for box in np.c_[start, sides][:8].tolist():
            n = len(coco['annotations'])
            entry = dict(id=n, image_id=i, category_id=n % 80, bbox=box, area=999)
            coco['annotations'].append(entry | dict(iscrowd=0))
        if library == 'mmdet':
            ends = np.c_[rng.uniform(0.05, 1, BOXES), rng.integers(0, 80, BOXES)]
            answer = np.c_[start, start + sides, ends]
        else:
            scores = rng.uniform(size=(19, height // 8, width // 8)) ** 8
            answer = scores / scores.sum(0)
        answers.append((f'{folder}/images/{file}', torch.from_numpy(answer)))
    if library == 'mmdet':
        from mmdet.datasets import CocoDataset

        names = CocoDataset.METAINFO['classes']
        coco['categories'] = [dict(id=i, name=name) for i, name in enumerate(names)]
        (folder / 'train.json').write_text(json.dumps(coco))
        data = dict(ann_file='train.json', data_prefix=dict(img='images'))
        kind, load, pack = 'CocoDataset', dict(with_bbox=True), 'PackDetInputs'
    else:
        from mmseg.utils import cityscapes_classes as names_of

        names = names_of()
        prefix = dict(img_path='images', seg_map_path='labels')
        data = dict(img_suffix='.png', seg_map_suffix='.png', data_prefix=prefix)
        kind, load, pack = 'BaseSegDataset', {}, 'PackSegInputs'
    pipeline = [
        dict(type='LoadImageFromFile'),
        dict(type='LoadAnnotations', **load),
        dict(type='Resize', scale=(width, height), keep_ratio=True),
        dict(type='RandomFlip', prob=0.5),
        dict(type=pack),
    ]
    data.update(type=kind, data_root=str(folder), pipeline=pipeline)
    return data | dict(metainfo=dict(classes=names)), answers


def step_of(name: str, which: str, folder: str) -> Callable[[], None]:
    """A step of the student ``'alone'`` or ``'stored'``, with its data."""
    pair, place = PAIRS[name], Path(folder) / which
    library = pair.student.split('::')[0]
    model = models_of(name).student  # it also registers modules and sets the scope
    data, answers = data_of(library, place, pair.size)
    dataset = DATASETS.build(data)
    if which == 'stored':
        store = str(place / 'store')
        manifest = dict(
            kind='boxes' if library == 'mmdet' else 'maps',
            class_names=list(dataset.metainfo['classes']),
            teachers=[],
        )
        writer = StoreWriter(store, manifest)
        for file, answer in answers:
            writer.add(file, pair.size, answer)
        student = without_pretrained(get_config(pair.student).model)
        if library == 'mmseg':
            student.data_preprocessor.size = pair.size
        teacher = dict(stored=store)
        model = dict(type='mmdist.Distiller', student=student, teacher=teacher)
        with DefaultScope.overwrite_default_scope(library):
            model = revert_sync_batchnorm(MODELS.build(model))
        check_images(dataset, model.teacher.store)
        join(dataset, manifest['kind'])
        model.init_weights()
    batches = iter(
        DataLoader(
            dataset,
            batch_size=2,
            sampler=InfiniteSampler(dataset, seed=0),
            num_workers=1,
            collate_fn=pseudo_collate,
        )
    )

    def step() -> None:
        given = model.data_preprocessor(next(batches), True)
        model.parse_losses(model(**given, mode='loss'))[0].backward()
        model.zero_grad()

    return step


def steps(seconds: float) -> str:
    """The table of steps with stored answers."""
    rows = []
    for name in NAMES:
        with tempfile.TemporaryDirectory() as folder:
            both = ('alone', 'stored')
            time = interleaved({k: step_of(name, k, folder) for k in both}, seconds)
            peak = [
                peak_memory('benchmarks.stored:step_of', name, k, f'{folder}/peak')
                for k in both
            ]
        times, memory = time['stored'] / time['alone'], peak[1] / peak[0]
        rows.append(
            [
                name,
                *(f'{x:.2f}' for x in time.values()),
                f'{times:.3f} ({verdict(times <= GOAL)})',
                f'{memory:.3f} ({verdict(memory <= GOAL)})',
            ]
        )
        print(' | '.join(rows[-1]), flush=True)
    head = ['pair', 'alone, s', 'stored, s', f'ratio (goal {GOAL})', 'peak, ratio']
    return table(head, rows) + '\n'
