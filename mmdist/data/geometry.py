"""Record where the pixels of a training image come from, through its pipeline.

mmdet's transforms move the boxes of the labels, which record how
(:class:`TrackedBoxes`). mmseg has no boxes, so a matrix is computed for each transform
that moves pixels. Neither changes images, labels or random numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any
from unittest.mock import patch

import cv2
import numpy as np

from mmdist.teachers.stored import FRAMES, SIZE, Frame, View


def _names(text: str) -> set[str]:
    return set(text.split())


PACKS = dict(boxes='PackDetInputs', maps='PackSegInputs')
# Class names of transforms that move no pixels or only pad at the bottom and right, or
# that contain other transforms and run some of them.
STILL = _names("""
    LoadImageFromFile LoadAnnotations LoadPanopticAnnotations LoadProposals
    PackDetInputs PackSegInputs MarkUnlabelled FilterAnnotations GenerateEdge SegRescale
    Pad Normalize PhotoMetricDistortion YOLOXHSVRandomAug Corrupt CutOut RandomCutOut
    RandomGrayscale RGB2Gray AdjustGamma CLAHE Rerange ColorTransform Color Brightness
    Contrast Sharpness Solarize SolarizeAdd Posterize Equalize AutoContrast Invert
    Compose RandomChoice RandomApply RandomOrder AutoAugment RandAugment""")
# mmdet transforms that record a homography.
HOMOGRAPHY = _names("""
    Resize FixScaleResize FixShapeResize ResizeShortestEdge RandomResize
    RandomChoiceResize RandomFlip RandomCrop ShearX ShearY Rotate TranslateX
    TranslateY""")
# mmdet transforms that move boxes by calling methods of the boxes.
BOXES = HOMOGRAPHY | _names("""
    RandomShift Expand MinIoURandomCrop RandomAffine Mosaic CachedMosaic MixUp
    CachedMixUp""")


# How mmseg transforms move pixels


def _shift(x: float, y: float) -> np.ndarray:
    return np.array([[1, 0, x], [0, 1, y], [0, 0, 1.0]])


def _scaled(before: Sequence[int], results: dict, how: Any) -> np.ndarray:
    height, width = (b / a for a, b in zip(before, results['img'].shape, strict=False))
    return np.diag([width, height, 1.0])


def _flipped(before: Sequence[int], results: dict, how: Any) -> np.ndarray:
    direction = results['flip_direction'] if results['flip'] else None
    x, y = (direction in (way, 'diagonal') for way in ('horizontal', 'vertical'))
    return _shift(x * before[1], y * before[0]) @ np.diag([1 - 2 * x, 1 - 2 * y, 1.0])


def _cropped(before: Sequence[int], results: dict, how: Any) -> np.ndarray:
    top, _, left, _ = how
    return _shift(-left, -top)


def _rotated(before: Sequence[int], results: dict, how: Any) -> np.ndarray:
    if how is None:  # not rotated this time
        return np.eye(3)
    # in OpenCV the centre of the first pixel is 0
    return _shift(0.5, 0.5) @ np.vstack([how, [0, 0, 1]]) @ _shift(-0.5, -0.5)


MAPS: dict[str, Callable] = {
    **dict.fromkeys(('Resize', 'RandomResize', 'RandomChoiceResize'), _scaled),
    **dict.fromkeys(('ResizeToMultiple', 'ResizeShortestEdge'), _scaled),
    'RandomFlip': _flipped,
    'RandomCrop': _cropped,
    'RandomRotate': _rotated,
}
# The function, its own or OpenCV's, that a transform calls to move pixels; the second
# argument of the last call says how.
CALLS = {
    'RandomCrop': 'crop',
    'RandomRotate': 'warpAffine',
    'RandomAffine': 'warpPerspective',
}


# Replacements for transforms


def _load(transform: Callable, kind: str, results: dict) -> dict | None:
    """Run the last transform that loads something, and record the file."""
    results = transform(results)
    if results is None:
        return None
    height, width = size = tuple(results['ori_shape'][:2])
    file = dict(height=height, width=width)
    file |= {key: results.get(key) for key in ('img_path', 'img_id')}
    views = (View(np.eye(3), size),) if kind == 'maps' else ()
    results[FRAMES] = (Frame(file, views),)
    if kind == 'boxes' and (boxes := results.get('gt_bboxes')) is not None:
        from .tracked_boxes import TrackedBoxes

        results['gt_bboxes'] = TrackedBoxes(boxes.tensor, clone=False)
        results['gt_bboxes'].frames = results[FRAMES]
    return results


def _move(transform: Callable, results: dict) -> dict | None:
    """Run an mmseg transform that moves pixels, or mmdet's RandomAffine."""
    name, before = type(transform).__name__, results['img'].shape[:2]
    boxes, how, called = results.get('gt_bboxes'), None, nullcontext()
    if call := CALLS.get(name):
        owner = transform if hasattr(transform, call) else cv2
        called = patch.object(owner, call, wraps=getattr(owner, call))
    with called as calls:
        results = transform(results)
        if calls and calls.called:
            how = calls.call_args.args[1]
    if name in MAPS and results is not None:
        ((file, views),) = results[FRAMES]
        matrix = MAPS[name](before, results, how) @ views[-1].matrix
        view = View(matrix, results['img'].shape[:2])
        results[FRAMES] = (Frame(file, (*views, view)),)
    elif boxes is not None and not len(boxes):  # RandomAffine skips these
        boxes.project_(how)
        boxes.clip_(results['img_shape'])
    return results


def _pack(transform: Callable, results: dict) -> dict:
    """Pack the record into the sample, and turn its boxes back into mmdet's own."""
    frames, boxes = results[FRAMES], results.get('gt_bboxes')
    if boxes is not None:
        from mmdet.structures.bbox import HorizontalBoxes

        frames = boxes.frames
        results['gt_bboxes'] = HorizontalBoxes(boxes.tensor, clone=False)
    elif 'homography_matrix' in results:
        move = 'project_', (results['homography_matrix'],), {}
        frames = (Frame(frames[0].file, (move,)),)
    packed = transform(results)
    size = tuple(packed['inputs'].shape[-2:])
    packed['data_samples'].set_metainfo({FRAMES: frames, SIZE: size})
    return packed


def follow(pipeline: Sequence[list[Callable]], kind: str, where: str) -> None:
    """Make a pipeline record where pixels come from, if it does not yet.

    Args:
        pipeline: Lists of transforms, which are replaced in place; more than one list
            if wrappers have transforms of their own.
        kind: ``'boxes'`` for mmdet, ``'maps'`` for mmseg.
        where: Name of the pipeline, for errors.

    Raises:
        ValueError: Loading or packing is missing, or a transform's moves are unknown.
    """
    every = [t for transforms in pipeline for t in transforms]
    if any(isinstance(t, partial) and t.func is _load for t in every):
        return
    names = [type(t).__name__ for t in every]
    loads = [i for i, name in enumerate(names) if name.startswith('Load')]
    if not loads or PACKS[kind] not in names:
        raise ValueError(
            f'{where} must load the image with `LoadImageFromFile` and pack it with '
            f'`{PACKS[kind]}`, for stored {kind}.'
        )
    with_boxes = any(getattr(t, 'with_bbox', False) for t in every)
    allowed = {*MAPS} if kind == 'maps' else BOXES if with_boxes else HOMOGRAPHY
    _refuse_unknown(every[: loads[-1]], STILL, f'{where}, before labels are loaded')
    _refuse_unknown(every, STILL | allowed, where)
    noting = dict.fromkeys(MAPS if kind == 'maps' else ['RandomAffine'], _move)
    noting[PACKS[kind]] = _pack
    last = every[loads[-1]]
    for transforms in [found for some in pipeline for found in _lists(some)]:
        for i, transform in enumerate(transforms):
            if transform is last:
                transforms[i] = partial(_load, transform, kind)
            elif note := noting.get(type(transform).__name__):
                transforms[i] = partial(note, transform)


def _lists(transforms: list[Callable]) -> Iterator[list[Callable]]:
    """Yield a list of transforms, and the lists nested in it."""
    yield transforms
    for transform in transforms:
        held = getattr(transform, 'transforms', None)
        if held is not None:  # a list, or a Compose of one
            yield from _lists(held if isinstance(held, list) else [held])


def _refuse_unknown(every: list[Callable], known: set[str], where: str) -> None:
    for transform in [t for transforms in _lists(every) for t in transforms]:
        name, does = type(transform).__name__, ''
        if name not in known and not hasattr(transform, 'keeps_geometry'):
            does = 'may move pixels'
        elif getattr(transform, 'recompute_bbox', False):
            does = 'makes boxes (`recompute_bbox=True`)'
        elif getattr(transform, 'box_type', 'hbox') != 'hbox':
            does = "makes boxes (`box_type` is not 'hbox')"
        if does:
            raise ValueError(
                f'{where}: `{name}` {does} in a way that mmdist does not know, so '
                'stored answers would not fit the image. Remove it, or run the teacher '
                'in each step (`config`, `checkpoint`). If it is your own and moves no '
                'pixels, give its class the attribute `keeps_geometry = True`.'
            )
