"""Per-pixel class logits of segmentors (all of mmseg's)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmdist.families import seg
from mmdist.families.seg import SegMap
from mmdist.registry import MODELS
from mmdist.step import Step
from mmdist.teachers import ForeignTeacher

from .base import Comparison, Pair, check_choice


@MODELS.register_module()
class SegLogits(Comparison):
    """Compare the class logits of the predicting head, and of auxiliary heads.

    A row is a pixel of the logits before upsampling (1/8 of the image, say), as
    published.

    The predicting head is the decode head; for a cascade, the last one that returns a
    map. PointRend's point head trains only on points that the student draws for itself,
    so its coarse head is compared. Mask classification (MaskFormer, Mask2Former, SAN)
    is compared by its per-pixel class scores, as at inference. If one side does it, a
    per-pixel head on the other is compared by its probabilities, and
    ``mmdist.DISTLoss`` gets ``activation='identity'`` unless it has one.

    A pixel does not count if the teacher gives most of its probability to classes that
    the student does not know.

    Args:
        loss: Config of the loss; ``mmdist.DISTLoss`` if omitted.
        aux_weight: Weight of the auxiliary heads (published: 0.4; 0 omits them). They
            are compared if both sides have them, the deepest with the deepest.
        ignore_mask: Exclude pixels whose label is the head's ``ignore_index`` and
            padded pixels. The published code does not; False restores that.
        resize: The size at which maps are compared: that of the ``'smaller'`` map, the
            ``'student'``, the ``'teacher'`` or the ``'label'``.

    Raises:
        ValueError: ``resize`` is none of these.
    """

    families = (
        'the segmentors of mmseg: heads that score the classes of each pixel, cascades '
        "of them, and mask classification (MaskFormer, Mask2Former, SAN), mmdet's too"
    )
    asks_first = True
    learns_from_answers = True

    def __init__(
        self,
        loss: dict | None = None,
        aux_weight: float = 0.4,
        ignore_mask: bool = True,
        resize: str = 'smaller',
    ) -> None:
        super().__init__(loss)
        sizes = 'smaller', 'student', 'teacher', 'label'
        check_choice('`resize` of SegLogits', resize, *sizes)
        self.aux_weight = aux_weight
        self.ignore_mask = ignore_mask
        self.resize = resize

    def activation(self, student: nn.Module) -> str:
        """The head's own: 'identity' for masks, 'sigmoid' for one channel."""
        return seg.activation_of(student)

    def student_modules(self, student: nn.Module) -> Sequence[nn.Module]:
        """The predicting head and the auxiliary heads."""
        return [seg.head_of(student, self.unsupported), *self._auxiliary_heads(student)]

    def check_pair(self, student: nn.Module, teacher: nn.Module) -> None:
        """The teacher must be a segmentor."""
        if not isinstance(teacher, ForeignTeacher):
            seg.head_of(teacher, self.unsupported)
        elif teacher.gives not in ('pixels', 'masks', 'maps'):
            raise self.unsupported(teacher, f'it gives {teacher.gives}')

    def record(self, step: Step) -> list[SegMap]:
        """The map of each head, as computed for its own loss."""
        as_scores = self._as_scores(step)
        heads = self.student_modules(step.student)
        return [seg.record(step, head, as_scores) for head in heads]

    def ask(self, step: Step, recorded: None) -> list[SegMap]:
        """The teacher's maps of the same heads, from its features."""
        as_scores = self._as_scores(step)
        if isinstance(step.teacher_model, ForeignTeacher):
            return [seg.ask_foreign(step, as_scores)]
        heads = [head for _, head in self._auxiliary_pairs(step)]
        heads.insert(0, seg.head_of(step.teacher_model))
        return [seg.ask(step, head, as_scores) for head in heads]

    def mean_of_views(
        self, step: Step, asked: list[SegMap], mirrored: list[SegMap]
    ) -> list[SegMap]:
        """Maps of the mean probabilities."""
        both = zip(asked, mirrored, strict=True)
        return [replace(one, mirrored=other) for one, other in both]

    def pair(
        self, step: Step, recorded: list[SegMap], asked: list[SegMap]
    ) -> list[Pair]:
        """Logits or scores at the same pixels, and which pixels count."""
        heads = self.student_modules(step.student)
        used = [heads[0], *(head for head, _ in self._auxiliary_pairs(step))]
        as_scores = self._as_scores(step)
        activation = 'identity' if as_scores else 'softmax'
        pairs = []
        for head, taught in zip(used, asked, strict=True):
            own = recorded[heads.index(head)]
            size = self._size(step, own, taught)
            mask = self._mask(step, head, size) if self.ignore_mask else None
            student, teacher = own.read(size), taught.read(size)
            is_binary = student.shape[1] == 1 != step.classes.num_student
            student = _two_classes(student, step.classes.num_student, as_scores)
            teacher = _two_classes(teacher, step.classes.num_teacher, as_scores)
            known = step.classes.mostly_known(teacher, activation=activation)
            mask = _both(mask, _both(known, taught.shown(size)))
            logits = step.classes.select(student, teacher, activation=activation)
            if is_binary:
                logits = [_foreground(x, as_scores) for x in logits]
            weight, name = (1.0, '') if head is heads[0] else (self.aux_weight, 'aux')
            scores = 'identity' if as_scores else None
            pairs.append(Pair(*logits, mask, weight, name, scores))
        return pairs

    def _as_scores(self, step: Step) -> bool:
        """Whether to compare scores: for DISTLoss, if either side predicts masks."""
        return (
            any(map(_predicts_masks, (step.student, step.teacher_model)))
            and hasattr(self.loss, 'activation')
            and self._loss_cfg.get('activation', 'identity') == 'identity'
        )

    def _auxiliary_heads(self, model: nn.Module) -> list[nn.Module]:
        return seg.auxiliary_heads(model) if self.aux_weight else []

    def _auxiliary_pairs(self, step: Step) -> list[tuple[nn.Module, nn.Module]]:
        """The auxiliary heads of student and teacher, the deepest with the deepest."""
        models = step.student, step.teacher_model
        return list(zip(*map(self._auxiliary_heads, models), strict=False))

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
        if not hasattr(head, 'ignore_index'):  # mmdet's heads have no pixel labels
            return valid
        labels = torch.stack([s.gt_sem_seg.data for s in step.data_samples])
        labels = F.interpolate(labels.float(), size=size, mode='nearest').squeeze(1)
        # None where the head's own loss ignores nothing
        ignore = -1 if head.ignore_index is None else head.ignore_index
        mask = labels != ignore
        for pixels, labelled in zip(mask, step.labelled, strict=True):
            if not labelled:  # its pixels are void, but count
                pixels.fill_(True)
        return _both(mask, valid)


def _both(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    """Where both masks are True; None is True everywhere."""
    return b if a is None else a if b is None else a & b


def _predicts_masks(model: nn.Module) -> bool:
    if isinstance(model, ForeignTeacher):
        return model.gives == 'masks'
    return seg.is_mask_head(seg.head_of(model))


def _two_classes(scores: Tensor, classes: int | None, as_scores: bool) -> Tensor:
    """A binary segmentor's one channel, (N, 1, h, w), as two, one per class."""
    if scores.shape[1] > 1 or classes == 1:
        return scores
    background = 1 - scores if as_scores else torch.zeros_like(scores)
    return torch.cat([background, scores], dim=1)


def _foreground(scores: Tensor, as_scores: bool) -> Tensor:
    """Two channels as the single channel of a binary segmentor."""
    if scores.shape[1] != 2:
        raise ValueError(
            'The teacher must know both classes of a binary student: map both of them '
            'with `teacher.class_map`.'
        )
    background, foreground = scores.split(1, dim=1)
    return foreground if as_scores else foreground - background
