"""Check that the data set's class names, the head and the labels fit together.

If they do not, a loss stops with an IndexError, a GPU with an assertion, or training
runs but learns something else.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from mmengine.config import Config
from mmengine.fileio import get_text
from mmengine.structures import BaseDataElement
from torch import nn

from mmdist.lookup import is_a
from mmdist.registry import why_not_built
from mmdist.run import told
from mmdist.teachers.class_map import as_list, first_few
from mmdist.teachers.classes import (
    class_names_of_loader,
    dataset_class,
    inner_datasets,
)

# Heads with one column for each class of the data set.
HEADS = (
    *('decode_head', 'auxiliary_head', 'bbox_head', 'mask_head', 'panoptic_head'),
    'roi_head.bbox_head',
)
OTHER_HEADS = 'STDCHead', 'VPDDepthHead'  # for edges, for depth


@contextmanager
def checked_labels(
    student: nn.Module,
    data_samples: Sequence[BaseDataElement],
    classes: Sequence[str] | None,
) -> Iterator[None]:
    """Check the labels of the first batch, and those of a batch whose loss fails.

    Takes the arguments of :func:`check_labels`.

    Raises:
        ValueError: The labels, or the class lists of the run, do not match.
    """
    if not getattr(student, '_labels_are_checked', False):
        if classes is not None:
            check_class_lists(_config_of_run())
        check_labels(student, data_samples, classes)
        student._labels_are_checked = True
    try:
        yield
    except (IndexError, RuntimeError) as error:
        try:
            check_labels(student, data_samples, classes)
        except ValueError as found:
            raise found from error
        raise


def _config_of_run() -> Config:
    """Return the Runner's config; an empty one if its dump cannot be parsed."""
    try:
        return Config.fromstring(told('cfg', ''), '.py')
    except Exception:  # it is Python, and its dump can be incomplete
        return Config()


def check_labels(
    student: nn.Module,
    data_samples: Sequence[BaseDataElement],
    classes: Sequence[str] | None = None,
) -> None:
    """Check that the head has a column for each class and each label of a batch.

    ``classes`` are the names of the data set, None if unknown. Samples marked
    unlabelled are skipped.

    Raises:
        ValueError: They do not fit; the message compares the classes of data set, head
            and labels, and says what to do. Or an image has no labels.
    """
    heads = _heads(student)
    if not heads:
        return
    head = next(iter(heads.values()))
    size, void = head.num_classes, getattr(head, 'ignore_index', None)
    classes = None if classes is None else as_list(classes)
    held: dict[int, str] = {}  # label -> a file with it
    for sample in data_samples:
        if sample.metainfo.get('unlabelled'):
            continue
        if 'gt_sem_seg' in sample and hasattr(student, 'decode_head'):
            labels = sample.gt_sem_seg.data
            file = sample.metainfo.get('seg_map_path') or 'a label map'
            if labels.ndim != 3 or len(labels) != 1:
                raise ValueError(
                    f'{file} has several channels: the labels have the shape '
                    f'{tuple(labels.shape)} instead of (1, height, width): convert '
                    'colours to indices of the classes.'
                )
        elif 'labels' in sample.get('gt_instances', ()):
            labels = sample.gt_instances.labels
            file = sample.metainfo.get('img_path') or 'an image'
        else:
            raise ValueError(
                f'{sample.metainfo.get("img_path", "An image")} has no labels. Add '
                'LoadAnnotations to the `pipeline` of the data set, or, if its images '
                "have no labels, end it with dict(type='mmdist.MarkUnlabelled')."
            )
        held |= dict.fromkeys(labels.unique().tolist(), file)
    held.pop(void, None)
    check_heads(student, classes, labels=sorted(held))
    wrong = sorted(label for label in held if not 0 <= label < size)
    if wrong:
        named = 'no' if classes is None else len(classes)
        or_void = '' if void is None else f', or {void} for void'
        no_zero = ' If 0 is not a class, set `reduce_zero_label=True`.'
        raise ValueError(
            f'The labels contain {first_few(wrong)} ({held[wrong[0]]}), but the '
            f'student has {size} classes and the data set names {named} classes: '
            f'labels must be 0 to {size - 1}{or_void}. Convert the label maps to '
            'indices of the classes (for Cityscapes use the *_labelTrainIds.png, not '
            'the *_labelIds.png), or change `num_classes` and the `metainfo` of the '
            f'data set.{no_zero if wrong == [size] else ""}'
        )


def check_heads(
    model: nn.Module,
    classes: Sequence[str] | None,
    whose: str = 'student',
    labels: Sequence[int] = (),
) -> None:
    """Raise ValueError if a head has another number of classes than the data set.

    ``classes`` are their names, None if unknown. The message says ``whose`` model it
    is, and the ``labels`` of a batch.
    """
    if classes is None:
        return
    classes = as_list(classes)
    for name, head in _heads(model).items():
        if head.num_classes != len(classes):
            held = f', and a batch holds the labels {first_few(labels)}'
            raise ValueError(
                f"The {whose}'s data set names {len(classes)} classes "
                f'({first_few(classes)}), but its `{name}` has num_classes='
                f'{head.num_classes}{held if labels else ""}. Set `num_classes='
                f'{len(classes)}` in every head, or name the classes of the head in '
                'the data set: `metainfo=dict(classes=(...))`.'
            )


def _heads(model: nn.Module) -> dict[str, nn.Module]:
    """Return the heads with one column per class, by path."""
    # things and stuff in separate heads; classes given as a prompt
    apart = hasattr(model, 'semantic_head') or hasattr(model, 'language_model')
    if apart or is_a(model, 'RPN'):  # an RPN treats all labels as 0
        return {}
    return {
        name: module
        for name, module in model.named_modules()
        if re.sub(r'\.\d+$', '', name) in HEADS
        and isinstance(getattr(module, 'num_classes', None), int)
        and not is_a(module, *OTHER_HEADS)
    }


def check_class_lists(cfg: Config, whole_files: bool = False) -> None:
    """Check the class names of a whole config's data sets before they are built.

    Reads only the categories of COCO files, unless ``whole_files``.

    Raises:
        ValueError: A COCO file is invalid, lacks a class that its data set names, or
            has another class order; or the orders of training and validation differ.
    """
    lists = []
    for loader in ('train_dataloader', 'val_dataloader'):
        lists.append(class_names_of_loader(cfg, loader) or ())
        for inner in inner_datasets((cfg.get(loader) or {}).get('dataset')):
            _check_coco_file(loader, inner, cfg.get('default_scope'), whole_files)
    train, val = lists
    if train != val and sorted(train) == sorted(val):
        raise ValueError(
            '`val_dataloader` names the classes of `train_dataloader` in another order '
            f'({first_few(val)} instead of {first_few(train)}). Predictions are '
            'numbered as in training, so they would be scored as other classes: give '
            'both data sets the same `metainfo=dict(classes=(...))`.'
        )


def _check_coco_file(
    loader: str, dataset: Mapping, scope: str | None, whole: bool
) -> None:
    """Compare a data set's class names and their order with those in its file."""
    cls = dataset_class(dataset, scope)
    if not hasattr(cls, 'COCOAPI'):
        return
    from mmdet.datasets import CocoDataset

    classes = (dataset.get('metainfo') or {}).get('classes', cls.METAINFO['classes'])
    if cls.load_data_list is not CocoDataset.load_data_list or isinstance(classes, str):
        return
    file = os.path.join(dataset.get('data_root') or '', dataset.get('ann_file', ''))
    try:
        text = get_text(file, backend_args=dataset.get('backend_args'))
    except OSError:
        return  # the data set reports it
    try:
        if whole:
            content = json.loads(text)
            lists = content['images'], content['categories']
            found = [x['id'] for items in lists for x in items] and lists[1]
        else:
            start = text.index('[', text.index('"categories"'))
            found = json.JSONDecoder().raw_decode(text, start)[0]
        found = [category['name'] for category in found]
    except (LookupError, TypeError, ValueError) as error:
        if not whole:
            return _check_coco_file(loader, dataset, scope, True)
        raise ValueError(
            f'{file}, the `ann_file` of {loader}, is not a COCO annotation file: '
            f'{error!r}. It must be complete JSON, a dict of the lists `images`, '
            '`annotations` and `categories`.'
        ) from error
    names, theirs = first_few(classes), first_few(found)
    named = f"{loader}'s data set names {names}, but {file} has {theirs}"
    if lacking := [name for name in classes if name not in found]:
        raise ValueError(
            f'{named}: it has no class {first_few(lacking)}. Its objects would be left '
            'out and the others numbered wrongly. Correct '
            '`metainfo=dict(classes=(...))`.'
        )
    if list(classes) != [name for name in found if name in classes]:
        raise ValueError(
            f'{named}, in another order. mmdet numbers classes in the order of the '
            'file, so they would get the names of others: use the order of the file '
            'in `metainfo=dict(classes=(...))`.'
        )


@contextmanager
def data_sets_in_words(cfg: Config) -> Iterator[None]:
    """Raise a clear ValueError if a Runner cannot use a data set of ``cfg``."""
    try:
        yield
    except Exception as error:
        said = explain(error, cfg)
        if said in (str(error), repr(error)):
            raise
        raise ValueError(said) from error


def explain(error: Exception, cfg: Config) -> str:
    """Return the message of a Runner's error; a clear one if its config says why."""
    if said := why_not_built(error):
        return said
    is_in_words = isinstance(error, (ValueError, RuntimeError, OSError))
    is_empty = 'need at least one array to concatenate' in str(error)
    if is_empty or not is_in_words or isinstance(error, json.JSONDecodeError):
        try:
            check_class_lists(cfg, whole_files=True)
        except ValueError as found:
            return str(found)
    if is_empty:
        return (
            'A data set has no image with labels: its `ann_file`, `data_prefix` or '
            '`metainfo=dict(classes=(...))` does not fit the files, or its '
            '`filter_cfg` leaves out every image.'
        )
    return str(error) if is_in_words and str(error) else repr(error)
