"""Per-pixel class logits of segmentors (all of mmseg's)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from mmengine.dist import get_rank
from mmengine.logging import MessageHub
from mmengine.structures import BaseDataElement
from torch import Tensor, nn

from mmdist.lookup import by_class_name, is_a
from mmdist.registry import MODELS
from mmdist.step import Step
from mmdist.teachers import ForeignTeacher

from .base import Comparison, Pair
from .seg_map import SegMap, TwoViews, draw_pixels

# Which of several outputs of a head's forward predicts at inference. Names, so that
# mmseg does not have to be installed.
PREDICTING_OUTPUT: dict[str, int] = {
    'DAHead': 0,  # position and channel attention together | each alone
    'EncHead': 0,  # | the classes of the whole image
    'DDRHead': 0,  # context | spatial branch
    'PIDHead': 1,  # proportional | integral | derivative branch
    'IterativeDecodeHead': -1,  # one per stage of K-Net
}
MASK_HEADS = ('MaskFormerHead', 'Mask2FormerHead')
SAN_HEAD = 'SideAdapterCLIPHead'


@MODELS.register_module()
class SegLogits(Comparison):
    """Compare the class logits of the head that predicts, and of auxiliary heads.

    A row is a pixel of the unresized logits (1/8 of the image, say), as published.

    The head that predicts is the decode head; of a cascade the last one that gives a
    map. PointRend's point head gives none: it trains on points that the student draws
    for itself, so its coarse head is compared. Mask classification (MaskFormer,
    Mask2Former, SAN) is compared by its class scores per pixel, those of inference;
    with it, also a per-pixel head is compared by its probabilities, and
    ``mmdist.DISTLoss`` gets ``activation='identity'`` unless it has one.

    Where the teacher gives most of the probability to classes that the student does not
    know, a pixel does not count.

    Args:
        loss: Config of the loss; ``mmdist.DISTLoss`` if omitted.
        aux_weight: Weight of the auxiliary heads, which are compared where both sides
            have them, the deepest with the deepest; 0 omits them. The published
            code has 0.4.
        ignore_mask: Exclude pixels whose label is the head's ``ignore_index`` and
            padded pixels. The published code does not; False restores it.
        resize: Whose size both maps are compared at: that of the 'smaller' one, of the
            'student', the 'teacher' or the 'label'.
        max_rows: Compare at most so many pixels of a batch and head, drawn anew in
            every step; None takes all.
        sampling: How they are drawn: 'uniform', or 'balanced', equally many of every
            class that the teacher predicts, as far as there are.
        seed: Seed of the drawing. With the iteration and the rank of the process it
            decides which pixels are drawn, so a resumed run draws the same.
    """

    families = (
        'the segmentors of mmseg: heads that score the classes of each pixel, cascades '
        "of them, and mask classification (MaskFormer, Mask2Former, SAN), mmdet's too"
    )

    def __init__(
        self,
        loss: dict | None = None,
        aux_weight: float = 0.4,
        ignore_mask: bool = True,
        resize: str = 'smaller',
        max_rows: int | None = None,
        sampling: str = 'uniform',
        seed: int = 0,
    ) -> None:
        super().__init__(loss)
        if resize not in ('smaller', 'student', 'teacher', 'label'):
            raise ValueError(
                "`resize` of SegLogits is 'smaller', 'student', 'teacher' or 'label', "
                f'got {resize!r}.'
            )
        if sampling not in ('uniform', 'balanced'):
            raise ValueError(
                f"`sampling` of SegLogits is 'uniform' or 'balanced', got {sampling!r}."
            )
        if max_rows is not None and max_rows < 1:
            raise ValueError(
                '`max_rows` of SegLogits is a number of pixels or None, got '
                f'{max_rows}.'
            )
        self.aux_weight = aux_weight
        self.ignore_mask = ignore_mask
        self.resize = resize
        self.max_rows = max_rows
        self.sampling = sampling
        self.seed = seed
        self._steps = 0

    def activation(self, student: nn.Module) -> str:
        """As the head predicts: 'identity' for masks, 'sigmoid' for one channel."""
        head = self._head(student)
        if is_mask_head(head):
            return 'identity'
        return 'sigmoid' if head.out_channels == 1 else 'softmax'

    def student_modules(self, student: nn.Module) -> Sequence[nn.Module]:
        """The head that predicts and the auxiliary heads."""
        return [self._head(student), *self._auxiliary_heads(student)]

    def check_pair(self, student: nn.Module, teacher: nn.Module) -> None:
        """The teacher must be a segmentor."""
        if not isinstance(teacher, ForeignTeacher):
            self._head(teacher)
        elif teacher.gives not in ('pixels', 'masks'):
            raise self.unsupported(teacher, f'it gives {teacher.gives}')

    def record(self, step: Step) -> list[SegMap]:
        """The map of each head, as it computed it for its own loss."""
        # A cascade runs a head once more for the next one; the first run is its own.
        return [
            self._map(step, head, step.calls(head)[0].output)
            for head in self.student_modules(step.student)
        ]

    asks_first = True

    def ask(self, step: Step, recorded: None) -> list[SegMap]:
        """The teacher's maps of the same heads, from its features."""
        if isinstance(step.teacher_model, ForeignTeacher):
            return [self._foreign_map(step)]
        head = self._head(step.teacher_model)
        maps = [self._map(step, head, _decode(step, head))]
        for _, teacher_head in self._auxiliary_pairs(step):
            output = teacher_head.forward(step.teacher_features)
            maps.append(self._map(step, teacher_head, output))
        return maps

    def mean_of_views(
        self, step: Step, asked: list[SegMap], mirrored: list[SegMap]
    ) -> list[TwoViews]:
        """Maps of the mean probabilities."""
        return list(map(TwoViews, asked, mirrored))

    def pair(
        self,
        step: Step,
        recorded: list[SegMap],
        asked: list[SegMap] | list[TwoViews],
    ) -> list[Pair]:
        """Logits or scores at the same pixels, with those that count."""
        heads = self.student_modules(step.student)
        used = [heads[0], *(head for head, _ in self._auxiliary_pairs(step))]
        generator = self._generator(step)
        pairs = []
        for head, teacher in zip(used, asked, strict=True):
            student = recorded[heads.index(head)]
            size = self._size(step, student, teacher)
            mask = self._mask(step, head, size) if self.ignore_mask else None
            if self.max_rows is None:
                student, teacher = student.read(size), teacher.read(size)
            else:
                pixels, mask = draw_pixels(
                    self.max_rows,
                    step.inputs.new_ones((len(step.inputs), *size), dtype=torch.bool)
                    if mask is None
                    else mask,
                    generator,
                    _predicted(teacher, size) if self.sampling == 'balanced' else None,
                )
                student = student.read_at(pixels, size)
                teacher = teacher.read_at(pixels, size)
            as_scores = self._as_scores(step)
            is_binary = student.shape[1] == 1 != step.classes.num_student
            student = _two_classes(student, step.classes.num_student, as_scores)
            teacher = _two_classes(teacher, step.classes.num_teacher, as_scores)
            activation = 'identity' if as_scores else 'softmax'
            known = step.classes.mostly_known(teacher, activation=activation)
            if known is not None:
                mask = known if mask is None else mask & known
            student, teacher = step.classes.select(
                student, teacher, activation=activation
            )
            if is_binary:
                student, teacher = (
                    _foreground(x, as_scores) for x in (student, teacher)
                )
            weight, name = (1.0, '') if head is heads[0] else (self.aux_weight, 'aux')
            scores = 'identity' if as_scores else None
            pairs.append(Pair(student, teacher, mask, weight, name, scores))
        return pairs

    def _as_scores(self, step: Step) -> bool:
        """Whether scores are compared, not logits: DISTLoss does, where masks are."""
        models = (step.student, step.teacher_model)
        return (
            any(map(self._predicts_masks, models))
            and hasattr(self.loss, 'activation')
            and self._loss_cfg.get('activation', 'identity') == 'identity'
        )

    def _predicts_masks(self, model: nn.Module) -> bool:
        if isinstance(model, ForeignTeacher):
            return model.gives == 'masks'
        return is_mask_head(self._head(model))

    def _head(self, model: nn.Module) -> nn.Module:
        """The head that predicts: of a cascade the last that gives a map."""
        if hasattr(model, 'panoptic_head') and is_mask_head(model.panoptic_head):
            return model.panoptic_head  # mmdet's MaskFormer and Mask2Former
        if not hasattr(model, 'decode_head'):
            raise self.unsupported(model, 'it has no `decode_head`')
        if is_a(model, 'DepthEstimator'):
            raise self.unsupported(
                model, 'it estimates depth, and does not score classes'
            )
        head = model.decode_head
        if isinstance(head, nn.ModuleList):
            head = [stage for stage in head if not is_a(stage, 'PointHead')][-1]
        return head

    def _auxiliary_heads(self, model: nn.Module) -> list[nn.Module]:
        """The auxiliary heads with the same classes, the deepest first."""
        heads = getattr(model, 'auxiliary_head', None)
        if heads is None or not self.aux_weight:
            return []
        classes = self._head(model).num_classes
        heads = [
            head
            for head in (heads if isinstance(heads, nn.ModuleList) else [heads])
            # STDC has a head for boundaries.
            if head.num_classes == classes and not is_a(head, 'STDCHead')
        ]
        return sorted(heads, key=_depth, reverse=True)

    def _auxiliary_pairs(self, step: Step) -> list[tuple[nn.Module, nn.Module]]:
        """The auxiliary heads of student and teacher, the deepest with the deepest."""
        student = self._auxiliary_heads(step.student)
        return list(
            zip(student, self._auxiliary_heads(step.teacher_model), strict=False)
        )

    def _map(self, step: Step, head: nn.Module, output) -> SegMap:
        """What the head predicts, from the output of its forward."""
        queries = None
        if is_a(head, *MASK_HEADS):
            classes, masks = output[0][-1], output[1][-1]
        elif is_a(head, SAN_HEAD):
            masks, classes = output[0][-1], output[1][-1]
        else:
            masks, classes = output, None
            if not isinstance(output, Tensor):
                masks = output[_predicting_output(head, output)]
        if classes is not None:
            dtype = torch.promote_types(classes.dtype, torch.float32)
            queries = classes.softmax(dim=-1, dtype=dtype)[..., :-1]
        return self._seg_map(step, masks, queries)

    def _foreign_map(self, step: Step) -> SegMap:
        output = step.teacher_features
        if step.teacher_model.gives == 'pixels':
            return self._seg_map(step, output)
        return self._seg_map(step, *output)

    def _seg_map(
        self, step: Step, maps: Tensor, queries: Tensor | None = None
    ) -> SegMap:
        align_corners = getattr(step.student, 'align_corners', False)
        return SegMap(maps, queries, self._as_scores(step), align_corners)

    def _size(self, step: Step, student: SegMap, teacher: SegMap) -> tuple[int, int]:
        if self.resize == 'label':
            return tuple(step.data_samples[0].gt_sem_seg.data.shape[-2:])
        if self.resize == 'smaller':
            return min(student.size, teacher.size, key=lambda size: size[0] * size[1])
        return student.size if self.resize == 'student' else teacher.size

    @staticmethod
    def _mask(step: Step, head: nn.Module, size: tuple[int, int]) -> Tensor | None:
        """(N, height, width), True where a pixel is labelled and not padding."""
        valid = step.valid_mask(*size)
        if not hasattr(head, 'ignore_index'):  # of mmdet, which labels no pixels
            return valid
        labels = torch.stack([s.gt_sem_seg.data for s in step.data_samples])
        labels = F.interpolate(labels.float(), size=size, mode='nearest').squeeze(1)
        # None where the head's own loss ignores nothing
        ignore = -1 if head.ignore_index is None else head.ignore_index
        mask = labels != ignore
        for pixels, labelled in zip(mask, step.labelled, strict=True):
            if not labelled:  # void, and they count
                pixels.fill_(True)
        return mask if valid is None else mask & valid

    def _generator(self, step: Step) -> torch.Generator:
        # Of the Runner; without one, the calls are counted.
        iteration = MessageHub.get_current_instance().get_info('iter', self._steps)
        self._steps += 1
        seed = hash((self.seed, iteration, get_rank())) % 2**63
        return torch.Generator(step.inputs.device).manual_seed(seed)


# ---- heads -----------------------------------------------------------------------


def is_mask_head(head: nn.Module) -> bool:
    """Whether a head predicts masks and the class of each, not a class per pixel."""
    return is_a(head, *MASK_HEADS, SAN_HEAD)


def _depth(head: nn.Module) -> float:
    """Index of the deepest feature that a head reads."""
    index = head.in_index
    indices = index if isinstance(index, Sequence) else [index]
    return max(float('inf') if i < 0 else i for i in indices)


def _predicting_output(head: nn.Module, outputs: Sequence) -> int:
    index = by_class_name(head, PREDICTING_OUTPUT)
    if index is not None:
        return index
    name = type(head).__name__
    raise ValueError(
        f'{name} returns {len(outputs)} outputs, and SegLogits does not know which one '
        'predicts at inference. Give its index: '
        f"`mmdist.comparisons.seg_logits.PREDICTING_OUTPUT['{name}'] = 0`."
    )


def _decode(step: Step, head: nn.Module):
    """Output of the teacher's head, run as the model runs it at inference."""
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


# ---- maps ------------------------------------------------------------------------


def _predicted(teacher: SegMap, size: tuple[int, int]) -> Tensor:
    """The teacher's class of each pixel, (N, *size), found at its own size."""
    scores = teacher.read(teacher.size)
    if scores.shape[1] == 1:
        labels = scores > (0.5 if teacher.as_scores else 0)
    else:
        labels = scores.argmax(dim=1, keepdim=True)
    return F.interpolate(labels.float(), size=size, mode='nearest').squeeze(1).long()


def _two_classes(scores: Tensor, classes: int | None, as_scores: bool) -> Tensor:
    """A binary segmentor's one channel, (N, 1, h, w), as those of its two classes."""
    if scores.shape[1] > 1 or classes == 1:
        return scores
    background = 1 - scores if as_scores else torch.zeros_like(scores)
    return torch.cat([background, scores], dim=1)


def _foreground(scores: Tensor, as_scores: bool) -> Tensor:
    """Two channels as the one of a binary segmentor."""
    if scores.shape[1] != 2:
        raise ValueError(
            'A binary student learns which of its two classes a pixel is, so the '
            'teacher has to know both: map both of them with `teacher.class_map`.'
        )
    background, foreground = scores.split(1, dim=1)
    return foreground if as_scores else foreground - background
