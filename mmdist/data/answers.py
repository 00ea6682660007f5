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
from mmdist.teachers.stored import StoredTeacher, other_sizes

from .geometry import Begin, End, follow, kind_of


def join(
    dataset: Any, teachers: Sequence[StoredTeacher], later: Sequence[list] = ()
) -> None:
    """Check stored answers against a data set, and make its pipelines note geometry.

    Images, labels and random numbers of the data set stay what they are.

    Args:
        dataset: The training's data set, with or without wrappers. Pipelines that are
            joined already stay as they are.
        teachers: The stored teachers; if there are none, nothing is done.
        later: Pipelines that it gets later, lists of transforms; they are checked.

    Raises:
        ValueError: An image has no answer or another size, the answers are of another
            kind or of unknown classes, or a transform moves pixels and is not known.
    """
    bases = [(base, _pipeline(base, around)) for base, around in _bases(dataset)]
    for teacher in teachers:
        store = teacher.store
        for base, pipeline in bases:
            if kind_of([t for part in pipeline for t in part]) != store.kind:
                other = dict(boxes='mmdet', maps='mmseg')[store.kind]
                raise ValueError(
                    f'{store.origin}: these are {store.kind} and teach a model of '
                    f'{other}, but the pipeline of the {type(base).__name__} packs no '
                    'samples of it.'
                )
        if not any(isinstance(t, Begin) for part in bases[0][1] for t in part):
            check_images([base for base, _ in bases], store)
    if teachers:
        for base, pipeline in bases:
            follow(pipeline, store.kind, f'The pipeline of a {type(base).__name__}')
        for transforms in later:
            follow([list(transforms)], store.kind, 'The pipeline that comes later')
        for _, around in _bases(dataset):
            _name(around)


def _bases(dataset: Any, around: tuple = ()) -> Iterator[tuple[Any, tuple]]:
    """Each data set within wrappers, and those that mix its images, outermost last."""
    if is_a(dataset, 'MultiImageMixDataset'):
        around = (dataset, *around)
    inner = getattr(dataset, 'datasets', None) or [getattr(dataset, 'dataset', None)]
    if inner == [None]:
        yield dataset, around
    else:
        for one in inner:
            yield from _bases(one, around)


def _pipeline(base: Any, around: Sequence) -> list[list]:
    return [base.pipeline.transforms, *(wrapper.pipeline for wrapper in around)]


def _name(around: Sequence) -> None:
    """Name what was added, since a wrapper skips transforms by their names."""
    for wrapper in around:
        if len(wrapper.pipeline) > len(wrapper.pipeline_types):
            names = iter(wrapper.pipeline_types)
            wrapper.pipeline_types = [
                'mmdist' if isinstance(t, (Begin, End)) else next(names)
                for t in wrapper.pipeline
            ]


def check_images(bases: Sequence[Any], store: Store) -> int:
    """Check that all images have answers, of files of the same size.

    Args:
        bases: Data sets without wrappers.
        store: The answers. Classes of a COCO results file get their names.

    Returns:
        The number of images.

    Raises:
        ValueError: It says of how many images that is not so, and names the first few.
    """
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
    return number


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
