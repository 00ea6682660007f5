"""Where the pixels of a training image come from, through the transforms of a pipeline.

Transforms of mmdet move the boxes of the labels, which note how
(:class:`TrackedBoxes`). Those of mmseg have no boxes; of each one that moves pixels a
matrix is found. Neither changes an image, a label or a random number.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from typing import Any

import cv2
import numpy as np

from mmdist.lookup import is_a
from mmdist.record import swapped
from mmdist.teachers.stored import FRAMES, SIZE, Frame, Source, View

SOURCE = 'mmdist_source'


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


# By the name of the class. They move no pixel, or only add some below and on the right.
STILL = _names("""
    LoadImageFromFile LoadAnnotations LoadPanopticAnnotations LoadProposals
    PackDetInputs PackSegInputs MarkUnlabelled FilterAnnotations GenerateEdge SegRescale
    Pad Normalize PhotoMetricDistortion YOLOXHSVRandomAug Corrupt CutOut RandomCutOut
    RandomGrayscale RGB2Gray AdjustGamma CLAHE Rerange ColorTransform Color Brightness
    Contrast Sharpness Solarize SolarizeAdd Posterize Equalize AutoContrast Invert""")
# They hold others, and run some of them.
NESTED = _names('RandomChoice RandomApply RandomOrder AutoAugment RandAugment')
# Of mmdet: they record a homography.
HOMOGRAPHY = _names("""
    Resize FixScaleResize FixShapeResize ResizeShortestEdge RandomResize
    RandomChoiceResize RandomFlip RandomCrop ShearX ShearY Rotate TranslateX
    TranslateY""")
# Of mmdet: they move boxes by methods of boxes.
BOXES = HOMOGRAPHY | _names("""
    RandomShift Expand MinIoURandomCrop RandomAffine Mosaic CachedMosaic MixUp
    CachedMixUp""")


# ---- how single transforms move pixels -----------------------------------------------


def _shift(x: float, y: float) -> np.ndarray:
    return np.array([[1, 0, x], [0, 1, y], [0, 0, 1.0]])


def _scaled(before: Sequence[int], results: dict, seen: list) -> np.ndarray:
    height, width = (b / a for a, b in zip(before, results['img'].shape, strict=False))
    return np.diag([width, height, 1.0])


def _flipped(before: Sequence[int], results: dict, seen: list) -> np.ndarray:
    direction = results['flip_direction'] if results['flip'] else None
    x, y = (direction in (way, 'diagonal') for way in ('horizontal', 'vertical'))
    return _shift(x * before[1], y * before[0]) @ np.diag([1 - 2 * x, 1 - 2 * y, 1.0])


def _cropped(before: Sequence[int], results: dict, seen: list) -> np.ndarray:
    top, _, left, _ = seen[-1][1]  # of the candidates the last is taken
    return _shift(-left, -top)


def _rotated(before: Sequence[int], results: dict, seen: list) -> np.ndarray:
    if not seen:
        return np.eye(3)
    # to OpenCV the centre of the first pixel is 0
    return _shift(0.5, 0.5) @ np.vstack([seen[0][1], [0, 0, 1]]) @ _shift(-0.5, -0.5)


# Of mmseg: the matrix of a transform.
MAPS: dict[str, Callable] = {
    'Resize': _scaled,
    'RandomResize': _scaled,
    'RandomChoiceResize': _scaled,
    'ResizeToMultiple': _scaled,
    'ResizeShortestEdge': _scaled,
    'RandomFlip': _flipped,
    'RandomCrop': _cropped,
    'RandomRotate': _rotated,
}
# The calls within a transform that say how it moved pixels: whose, None for its own,
# and which.
CALLS = {
    'RandomCrop': (None, 'crop'),
    'RandomRotate': (cv2, 'warpAffine'),
    'RandomAffine': (None, '_get_random_homography_matrix'),
}


def noted(owner: Any, name: str, seen: list) -> AbstractContextManager:
    """Append the arguments and the result of each call of ``owner.name`` within."""
    call = getattr(owner, name)

    def spy(*args, **kwargs):
        output = call(*args, **kwargs)
        seen.append((*args, output))
        return output

    return swapped(owner, name, spy)


class Followed:
    """A transform of mmseg, or mmdet's RandomAffine, that notes how it moves pixels."""

    def __init__(self, inner: Callable) -> None:
        self.inner = inner

    def __call__(self, results: dict) -> dict | None:
        """Transform an image."""
        name, before = type(self.inner).__name__, results['img'].shape[:2]
        boxes, seen = results.get('gt_bboxes'), []
        with ExitStack() as stack:
            if name in CALLS:
                owner, called = CALLS[name]
                stack.enter_context(noted(owner or self.inner, called, seen))
            results = self.inner(results)
        if name in MAPS and results is not None:
            ((source, views),) = results[FRAMES]
            matrix = MAPS[name](before, results, seen) @ views[-1].matrix
            view = View(matrix, results['img'].shape[:2])
            results[FRAMES] = (Frame(source, (*views, view)),)
        elif boxes is not None and not len(boxes):  # RandomAffine leaves out to move
            boxes.project_(seen[0][-1])
            boxes.clip_(results['img_shape'])
        return results

    def __repr__(self) -> str:
        return repr(self.inner)


class Begin:
    """Notes the file of an image, after it is loaded."""

    def __init__(self, kind: str) -> None:
        self.kind = kind

    def __call__(self, results: dict) -> dict:
        """See an image that has just been loaded."""
        size = tuple(results['ori_shape'][:2])
        source = Source(results.get('img_path'), results.get('img_id'), size)
        boxes = results.get('gt_bboxes')
        if self.kind == 'maps':
            results[FRAMES] = (Frame(source, (View(np.eye(3), size),)),)
        elif boxes is None:
            results[SOURCE] = source
        else:
            from .tracked_boxes import TrackedBoxes

            results['gt_bboxes'] = TrackedBoxes(
                boxes.tensor, clone=False, frames=[Frame(source, ())]
            )
        return results


class End:
    """Moves what is known of an image of mmdet into its packed sample."""

    def __call__(self, results: dict) -> dict:
        """See a packed sample; its boxes are mmdet's own again."""
        from mmdet.structures.bbox import HorizontalBoxes

        sample = results['data_samples']
        frames = getattr(sample.gt_instances.get('bboxes'), 'frames', None)
        for instances in (sample.gt_instances, sample.ignored_instances):
            if hasattr(instances.get('bboxes'), 'frames'):
                boxes = instances.bboxes.tensor
                instances.bboxes = HorizontalBoxes(boxes, clone=False)
        if frames is None:
            matrix = sample.metainfo.get('homography_matrix')
            moves = () if matrix is None else (('project_', (matrix,), {}),)
            frames = (Frame(sample.metainfo[SOURCE], moves),)
        size = tuple(results['inputs'].shape[-2:])
        sample.set_metainfo({FRAMES: frames, SIZE: size})
        return results


# ---- a pipeline ----------------------------------------------------------------------


def follow(pipeline: Sequence[list[Callable]], kind: str, where: str) -> None:
    """Make a pipeline note where pixels come from.

    Args:
        pipeline: Its transforms; in several lists where a wrapper has some of its own.
            The lists are changed, once.
        kind: ``'boxes'`` for mmdet, ``'maps'`` for mmseg.
        where: Which pipeline it is, for errors.

    Raises:
        ValueError: A transform moves pixels and is not known.
    """
    every = [t for transforms in pipeline for t in transforms]
    if any(isinstance(t, Begin) and t.kind == kind for t in every):
        return
    loads = [i for i, t in enumerate(every) if type(t).__name__.startswith('Load')]
    packs = dict(boxes='PackDetInputs', maps='PackSegInputs')[kind]
    if not loads or packs not in [type(t).__name__ for t in every]:
        raise ValueError(
            f'{where}: stored {kind} need one that loads the image by '
            f'`LoadImageFromFile` and packs it by `{packs}`.'
        )
    last = every[loads[-1]]
    with_boxes = any(getattr(t, 'with_bbox', False) for t in every)
    allowed = {*MAPS} if kind == 'maps' else BOXES if with_boxes else HOMOGRAPHY
    _refuse_unknown(every[: loads[-1]], set(), f'{where}, before it has loaded labels')
    _refuse_unknown(every, allowed, where)
    for transforms in pipeline:
        transforms[:] = [_followed(t, kind) for t in transforms]
        for i, transform in reversed(list(enumerate(transforms))):
            if transform is last:
                transforms.insert(i + 1, Begin(kind))
            if type(transform).__name__ == packs:
                keys = (FRAMES,) if kind == 'maps' else (SOURCE, 'homography_matrix')
                transform.meta_keys = (*transform.meta_keys, *keys)
                if kind == 'boxes':
                    transforms.insert(i + 1, End())


def _refuse_unknown(transforms: Sequence[Callable], allowed, where: str) -> None:
    for transform in transforms:
        name, why = type(transform).__name__, None
        if name in NESTED:
            for inner in _lists(transform):
                _refuse_unknown(inner, allowed, where)
        elif getattr(transform, 'recompute_bbox', False):
            why = 'makes boxes of masks (`recompute_bbox=True`)'
        elif getattr(transform, 'box_type', 'hbox') != 'hbox':
            why = "loads boxes in another way (`box_type` is not 'hbox')"
        elif name not in STILL | allowed and not hasattr(transform, 'keeps_geometry'):
            why = 'may move pixels in a way that is not known here'
        if why:
            raise ValueError(
                f'{where}: `{name}` {why}, so stored answers would not lie where the '
                'image shows them. Remove it, or ask the teacher in each step '
                '(`config`, `checkpoint`). A transform of your own that moves no pixel '
                'says so by a class attribute, `keeps_geometry = True`.'
            )


def _lists(holder: Any) -> list[list[Callable]]:
    """The lists of transforms that one of NESTED holds."""
    held = holder.transforms
    if not isinstance(held, list):  # a Compose
        return [held.transforms]
    is_choice = all(is_a(part, 'Compose') for part in held)
    return [part.transforms for part in held] if is_choice else [held]


def _followed(transform: Any, kind: str) -> Callable:
    name = type(transform).__name__
    if name in NESTED:
        for transforms in _lists(transform):
            transforms[:] = [_followed(t, kind) for t in transforms]
    follows = name in MAPS if kind == 'maps' else name == 'RandomAffine'
    return Followed(transform) if follows else transform
