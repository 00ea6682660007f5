"""The stored answers of a teacher and the images of a training, checked and joined."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

from mmengine.fileio import get_text

from mmdist.lookup import is_a
from mmdist.teachers.store import Store

from .geometry import follow


def join(dataset: Any, kind: str, later: Sequence[list] = ()) -> None:
    """Make the pipelines of a training note where pixels come from, if they do not yet.

    Args:
        dataset: The training's data set, with or without wrappers.
        kind: Of the stored answers, ``'boxes'`` or ``'maps'``.
        later: Pipelines that it gets later, lists of transforms; they are checked.

    Raises:
        ValueError: A transform moves pixels and is not known, or the samples are not
            those of a detector or a segmentor, as the answers are.
    """
    for base, around in bases_of(dataset):
        pipeline = [base.pipeline.transforms, *(x.pipeline for x in around)]
        follow(pipeline, kind, f'The pipeline of a {type(base).__name__}')
    for transforms in later:
        follow([list(transforms)], kind, 'The pipeline that comes later')


def bases_of(dataset: Any, around: tuple = ()) -> Iterator[tuple[Any, tuple]]:
    """Each data set within wrappers, and those that mix its images, outermost last."""
    if is_a(dataset, 'MultiImageMixDataset'):
        around = (dataset, *around)
    inner = getattr(dataset, 'datasets', None) or [getattr(dataset, 'dataset', None)]
    if inner == [None]:
        yield dataset, around
    else:
        for one in inner:
            yield from bases_of(one, around)


def infos_of(dataset: Any) -> Iterator[dict]:
    """What the data sets within wrappers know of each of their images."""
    for base, _ in bases_of(dataset):
        base.full_init()
        yield from map(base.get_data_info, range(len(base)))


def check_images(dataset: Any, store: Store) -> None:
    """Check that all images of a training have answers, as :meth:`Store.check` does.

    Classes of a COCO results file get their names. ValueError: It has others, or the
    training is not that of one annotation file.
    """
    if store.is_by_id:
        bases = [base for base, _ in bases_of(dataset)]
        if len(bases) > 1 or not hasattr(bases[0], 'cat2label'):
            raise ValueError(
                f'{store.origin}: a COCO results file knows images by the ids of one '
                'annotation file, but the training has '
                f'{" and ".join(type(base).__name__ for base in bases)}. Take a folder '
                'of tools/store_teacher.py, which knows files, or one `CocoDataset`.'
            )
        (base,) = bases
        base.full_init()
        # a category is the label that the data set gives it, whatever its own name
        classes = base.metainfo['classes']
        names = {i: classes[label] for i, label in base.cat2label.items()}
        try:
            store.name_classes(names)
        except ValueError:  # of classes that the training leaves out
            text = json.loads(get_text(base.ann_file))
            store.name_classes({x['id']: x['name'] for x in text['categories']} | names)
    store.check(infos_of(dataset))
