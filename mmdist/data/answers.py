"""The stored answers of a teacher and the images of a training, checked and joined."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from typing import Any

from mmengine.fileio import get_text
from mmengine.logging import print_log

from mmdist.lookup import is_a
from mmdist.teachers.store import Store
from mmdist.teachers.stored import other_sizes

from .geometry import Begin, End, follow


def join(dataset: Any, kind: str, later: Sequence[list] = ()) -> None:
    """Make the pipelines of a training note where pixels come from.

    Images, labels and random numbers of the data set stay what they are. Pipelines that
    note it already stay as they are.

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
        for wrapper in around:
            # it skips transforms by their names, and these have been added
            if len(wrapper.pipeline) > len(wrapper.pipeline_types):
                names = iter(wrapper.pipeline_types)
                wrapper.pipeline_types = [
                    'mmdist' if isinstance(t, (Begin, End)) else next(names)
                    for t in wrapper.pipeline
                ]
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


def check_images(dataset: Any, store: Store) -> None:
    """Check that all images have answers, of files of the same size.

    Args:
        dataset: The training's data set, with or without wrappers.
        store: The answers. Classes of a COCO results file get their names.

    Raises:
        ValueError: It says of how many images that is not so, and names the first few.
    """
    bases = [base for base, _ in bases_of(dataset)]
    if store.is_by_id:
        _name_classes(bases, store)
    missing, other, number = [], [], 0
    for base in bases:
        for i in range(len(base)):
            info, number = base.get_data_info(i), number + 1
            name, key = info.get('img_path') or info.get('img_id'), store.key(info)
            size = None if key is None else store.size(key)
            now = info.get('height'), info.get('width')
            if key is None:
                missing.append(name)
            elif size is not None and None not in now and now != tuple(size):
                other.append((name, now, size))
    some = ', '.join(map(str, missing[:3]))
    some += f' and {len(missing) - 3} more' if len(missing) > 3 else ''
    text = f'{store.origin}: {len(missing)} of {number} images of the training'
    if store.is_by_id and len(missing) <= number / 2:
        if missing:
            print_log(
                f'mmdist: {text} are not in the file, so nothing was found in them: '
                f'{some}.',
                logger='current',
                level=logging.WARNING,
            )
    elif missing:
        raise ValueError(
            f'{text} have no answer: {some}. Ask the teacher about all of them, with '
            'tools/store_teacher.py or a tool of its own.'
        )
    if other:
        raise ValueError(other_sizes(store, other))


def _name_classes(bases: Sequence[Any], store: Store) -> None:
    """Name the classes of a COCO results file as the annotation file does."""
    if len(bases) > 1 or not hasattr(bases[0], 'cat2label'):
        raise ValueError(
            f'{store.origin}: a COCO results file knows images by the ids of one '
            'annotation file, but the training has '
            f'{" and ".join(type(base).__name__ for base in bases)}. Take a folder of '
            'tools/store_teacher.py, which knows files, or one `CocoDataset`.'
        )
    (base,) = bases
    base.full_init()
    # a category is the label that the data set gives it, whatever its own name
    labels = base.cat2label
    names = {i: base.metainfo['classes'][label] for i, label in labels.items()}
    try:
        store.name_classes(names)
    except ValueError:  # of classes that the training leaves out
        text = json.loads(get_text(base.ann_file))
        store.name_classes({x['id']: x['name'] for x in text['categories']} | names)
