"""Segmentors: heads that score the classes of each pixel, and mask classification."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from mmengine.structures import BaseDataElement
from torch import Tensor, nn

from mmdist.families import Refuse, unreadable
from mmdist.families.probabilities import fp32, mean_probability
from mmdist.lookup import by_class_name, is_a
from mmdist.step import Step
from mmdist.teachers.stored import Placed

# Which of several outputs of a head's forward predicts at inference. Names, so that
# mmseg need not be installed.
PREDICTING_OUTPUT: dict[str, int] = {
    'DAHead': 0,  # position and channel attention together | each alone
    'EncHead': 0,  # map | classes of the whole image
    'DDRHead': 0,  # context | spatial branch
    'PIDHead': 1,  # proportional | integral | derivative branch
    'IterativeDecodeHead': -1,  # one per stage of K-Net
}
MASK_HEADS = ('MaskFormerHead', 'Mask2FormerHead')
SAN_HEAD = 'SideAdapterCLIPHead'


# ---- maps ------------------------------------------------------------------------


@dataclass
class SegMap:
    """Per-pixel class logits, or masks and their class probabilities.

    Logits are resized bilinearly: those of the classes, or those of the masks before
    they are combined into class scores, as at inference (Cheng et al., MaskFormer,
    NeurIPS 2021, section 3.4).

    Attributes:
        maps: Logits of K classes or of K masks, (N, K, h, w).
        queries: Class probabilities of the K masks without "no object", (N, K, C);
            None if ``maps`` are class logits.
        as_scores: Read probabilities (per-pixel classes) or class scores (masks), not
            logits. The logits of masks are the logarithm of the scores, so their
            softmax is the scores normalised to sum 1.
        align_corners: As in ``F.interpolate``.
        mirrored: The map of the image mirrored left to right. If given, the mean of
            the probabilities is read; for logits, their softmax (sigmoid for one
            channel) is that mean.
    """

    maps: Tensor
    queries: Tensor | None = None
    as_scores: bool = False
    align_corners: bool = False
    mirrored: SegMap | None = None

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the head's output."""
        return tuple(self.maps.shape[-2:])

    def read(self, size: tuple[int, int]) -> Tensor:
        """The map resized to ``size`` (height, width), (N, C, height, width)."""
        scores = self._read(size)
        if self.mirrored is None:
            return scores
        activation = 'sigmoid' if scores.shape[1] == 1 else 'softmax'
        if self.as_scores:
            activation = 'identity'
        return mean_probability(scores, self.mirrored.read(size).flip(-1), activation)

    def shown(self, size: tuple[int, int]) -> Tensor | None:
        """Where the map has values, (N, height, width); None if everywhere."""
        return None

    def _read(self, size: tuple[int, int]) -> Tensor:
        maps = self.maps
        if self.size != size:
            maps = F.interpolate(
                maps, size, mode='bilinear', align_corners=self.align_corners
            )
        if self.queries is None and not self.as_scores:
            return maps
        maps = fp32(maps)
        if self.queries is None:
            return maps.sigmoid() if maps.shape[1] == 1 else maps.softmax(1)
        with torch.autocast(maps.device.type, enabled=False):
            scores = torch.einsum(
                'nqc,nq...->nc...', self.queries.to(maps.dtype), maps.sigmoid()
            )
        return scores if self.as_scores else scores.clamp_min(1e-7).log()


@dataclass
class StoredMap(SegMap):
    """Stored probabilities of whole files, read where the batch shows them.

    Attributes:
        maps: Any tensor with the batch's height and width, (N, K, H, W).
        placed: A stored map for each image, and its place in the batch.
    """

    placed: Sequence[Placed] = ()

    def _read(self, size: tuple[int, int]) -> Tensor:
        found = []
        for x in self.placed:
            grid = self._tensor(2 * self._points(x, size) / x.views[0].size[::-1] - 1)
            stored = x.probabilities[None] / 255
            options = dict(padding_mode='border', align_corners=False)
            found.append(F.grid_sample(stored, grid[None], **options))
        probabilities = torch.cat(found)
        if self.as_scores:
            return probabilities
        if probabilities.shape[1] == 1:
            return torch.logit(probabilities, eps=1e-4)
        return probabilities.clamp_min(1e-4).log()

    def shown(self, size: tuple[int, int]) -> Tensor:
        """Where the centre of a cell shows a point of the file, (N, height, width)."""
        found = []
        for placed in self.placed:
            points, inside = self._points(placed, size), True
            for matrix, (height, width) in placed.views:
                at = points @ matrix[:2, :2].T + matrix[:2, 2]
                inside &= ((at >= 0) & (at <= (width, height))).all(-1)
            found.append(self._tensor(inside))
        return torch.stack(found)

    def _points(self, placed: Placed, size: tuple[int, int]) -> np.ndarray:
        """The centre of each cell in pixels of its file, (height, width, 2) as x, y."""
        y, x = (
            np.linspace(0.5, pixels - 0.5, cells)
            if self.align_corners
            else (np.arange(cells) + 0.5) * pixels / cells
            for cells, pixels in zip(size, self.size, strict=True)
        )
        points, matrix = np.stack(np.meshgrid(x, y), -1), placed.views[-1].matrix
        return (points - matrix[:2, 2]) @ np.linalg.inv(matrix[:2, :2]).T

    def _tensor(self, x: np.ndarray) -> Tensor:
        x = torch.from_numpy(x)
        return (x.float() if x.is_floating_point() else x).to(self.maps.device)


# ---- heads -----------------------------------------------------------------------


def head_of(model: nn.Module, refuse: Refuse = unreadable) -> nn.Module:
    """The predicting head; for a cascade, the last one that returns a map."""
    if hasattr(model, 'panoptic_head') and is_mask_head(model.panoptic_head):
        return model.panoptic_head  # mmdet's MaskFormer and Mask2Former
    if not hasattr(model, 'decode_head'):
        raise refuse(model, 'it has no `decode_head`')
    if is_a(model, 'DepthEstimator'):
        raise refuse(model, 'it estimates depth and does not score classes')
    head = model.decode_head
    if isinstance(head, nn.ModuleList):
        head = [stage for stage in head if not is_a(stage, 'PointHead')][-1]
    return head


def is_mask_head(head: nn.Module) -> bool:
    """Whether a head predicts masks and the class of each, not a class per pixel."""
    return is_a(head, *MASK_HEADS, SAN_HEAD)


def activation_of(model: nn.Module) -> str:
    """The head's own: 'identity' for masks, 'sigmoid' for one channel."""
    head = head_of(model)
    if is_mask_head(head):
        return 'identity'
    return 'sigmoid' if head.out_channels == 1 else 'softmax'


def auxiliary_heads(model: nn.Module) -> list[nn.Module]:
    """The auxiliary heads with the same classes, the deepest first."""
    heads = getattr(model, 'auxiliary_head', None)
    if heads is None:
        return []
    classes = head_of(model).num_classes
    heads = [
        head
        for head in (heads if isinstance(heads, nn.ModuleList) else [heads])
        # STDC has a head for boundaries.
        if head.num_classes == classes and not is_a(head, 'STDCHead')
    ]
    return sorted(heads, key=_depth, reverse=True)


def _depth(head: nn.Module) -> float:
    """Index of the deepest feature that a head reads."""
    index = head.in_index
    indices = index if isinstance(index, Sequence) else [index]
    return max(float('inf') if i < 0 else i for i in indices)


def record(step: Step, head: nn.Module, as_scores: bool) -> SegMap:
    """The prediction of a student's head, as computed for its own loss."""
    # A cascade runs a head again to feed the next one; the first run is its own.
    return _map(step, head, step.calls(head)[0].output, as_scores)


def ask(step: Step, head: nn.Module, as_scores: bool) -> SegMap:
    """The prediction of a teacher's head, from the teacher's features."""
    is_main = head is head_of(step.teacher_model)
    output = _decode(step, head) if is_main else head.forward(step.teacher_features)
    return _map(step, head, output, as_scores)


def ask_foreign(step: Step, as_scores: bool) -> SegMap:
    """The prediction of a :class:`ForeignTeacher` of pixels, masks or stored maps."""
    output = step.teacher_features
    if step.teacher_model.gives == 'maps':
        full = step.inputs[:, :1]
        return StoredMap(full, None, as_scores, _align_corners(step), placed=output)
    maps = (output,) if step.teacher_model.gives == 'pixels' else output
    return SegMap(*maps, as_scores=as_scores, align_corners=_align_corners(step))


def _align_corners(step: Step) -> bool:
    return getattr(step.student, 'align_corners', False)


def _map(step: Step, head: nn.Module, output: Any, as_scores: bool) -> SegMap:
    """The head's prediction, from the output of its forward."""
    maps, queries = output, None
    if is_mask_head(head):
        classes, maps = (x[-1] for x in output[:2])
        if is_a(head, SAN_HEAD):
            classes, maps = maps, classes
        dtype = torch.promote_types(classes.dtype, torch.float32)
        queries = classes.softmax(dim=-1, dtype=dtype)[..., :-1]
    elif not isinstance(output, Tensor):
        index = by_class_name(head, PREDICTING_OUTPUT)
        if index is None:
            name = type(head).__name__
            raise ValueError(
                f'{name} returns {len(output)} outputs, and mmdist does not know which '
                'one predicts at inference. Set its index: '
                f"`mmdist.families.seg.PREDICTING_OUTPUT['{name}'] = 0`."
            )
        maps = output[index]
    return SegMap(maps, queries, as_scores, _align_corners(step))


def _decode(step: Step, head: nn.Module) -> Any:
    """The output of the teacher's head, run as at inference."""
    model = step.teacher_model
    if is_a(head, SAN_HEAD):
        inputs = images = step.teacher_inputs
        if model.asymetric_input:
            images = F.interpolate(
                inputs, scale_factor=model.encoder_resolution, mode='bilinear'
            )
        features = model.extract_feat(images)
        return head.forward([inputs, features, model.text_encoder()], [])
    features = step.teacher_features
    if is_a(head, *MASK_HEADS):
        full = tuple(step.inputs.shape[-2:])
        samples = [
            BaseDataElement(metainfo=dict(img_shape=size, batch_input_shape=full))
            for size in step.valid_sizes
        ]
        return head.forward(features, samples)
    if not isinstance(model.decode_head, nn.ModuleList):
        return head.forward(features)
    stages = iter(model.decode_head)
    output = next(stages).forward(features)
    for stage in stages:
        if is_a(stage, 'PointHead'):
            break
        output = stage.forward(features, output)
    return output
