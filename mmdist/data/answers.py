"""Check a teacher's stored answers, and join them with the training images."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

from mmengine.fileio import get_text

from mmdist.lookup import is_a
from mmdist.teachers.store import Store

from .geometry import follow


def join(dataset: Any, kind: str, later: Sequence[list] = ()) -> None:
    """Make the training pipelines record where pixels come from, if they do not yet.

    Args:
        dataset: The training data set, with or without wrappers.
        kind: Kind of the stored answers, ``'boxes'`` or ``'maps'``.
        later: Pipelines that it gets later, lists of transforms; they are only checked.

    Raises:
        ValueError: A transform moves pixels in an unknown way, or the samples are of
            another kind (detector or segmentor) than the answers.
    """
    for base, around in bases_of(dataset):
        pipeline = [base.pipeline.transforms, *(x.pipeline for x in around)]
        follow(pipeline, kind, f'The pipeline of a {type(base).__name__}')
    for transforms in later:
        follow([list(transforms)], kind, 'The `switch_pipeline` of a hook')


def bases_of(dataset: Any, around: tuple = ()) -> Iterator[tuple[Any, tuple]]:
    """Yield each inner data set, and the wrappers mixing its images, outermost last."""
    if is_a(dataset, 'MultiImageMixDataset'):
        around = (dataset, *around)
    inner = getattr(dataset, 'datasets', None) or [getattr(dataset, 'dataset', None)]
    if inner == [None]:
        yield dataset, around
    else:
        for one in inner:
            yield from bases_of(one, around)


def infos_of(dataset: Any) -> Iterator[dict]:
    """Yield the info of each image of the data sets inside wrappers."""
    for base, _ in bases_of(dataset):
        base.full_init()
        yield from map(base.get_data_info, range(len(base)))


def check_images(dataset: Any, store: Store) -> None:
    """Check that all training images have answers, as :meth:`Store.check` does.

    Also names the classes of a COCO results file; ValueError if it has unknown ones, or
    if the training does not use a single annotation file.
    """
    if store.is_by_id:
        bases = [base for base, _ in bases_of(dataset)]
        if len(bases) > 1 or not hasattr(bases[0], 'cat2label'):
            raise ValueError(
                f'{store.origin}: a COCO results file identifies images by the ids of '
                'one annotation file, but the training uses '
                f'{" and ".join(type(base).__name__ for base in bases)}. Use a folder '
                'of tools/store_teacher.py, which identifies images by path, or a '
                'single `CocoDataset`.'
            )
        (base,) = bases
        base.full_init()
        # a category is what the data set labels it as, whatever its own name
        classes = base.metainfo['classes']
        names = {i: classes[label] for i, label in base.cat2label.items()}
        try:
            store.name_classes(names)
        except ValueError:  # boxes of classes that the training leaves out
            text = json.loads(get_text(base.ann_file))
            store.name_classes({x['id']: x['name'] for x in text['categories']} | names)
    store.check(infos_of(dataset))
