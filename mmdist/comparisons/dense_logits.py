"""Class logits at every location of a dense (one-stage) detector."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import attrgetter
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mmdist.registry import MODELS
from mmdist.step import Step

from .base import Comparison, Pair, rows


class ClassMaps(NamedTuple):
    """Where a head's forward returns its class scores, and as what."""

    maps: Callable[[nn.Module, tuple], Sequence[Tensor]] = lambda head, out: out[0]
    activation: str | None = None  # None: as the head's `use_sigmoid_cls` says
    # Outside training the head skips locations or suppresses neighbours.
    ask_as_in_training: bool = False


def _split_yolov3(head: nn.Module, out: tuple) -> list[Tensor]:
    """The class channels of box (4), objectness (1) and classes of each anchor."""
    return [
        pred.unflatten(1, (head.num_base_priors, -1))[:, :, 5:].flatten(1, 2)
        for pred in out[0]
    ]


# Heads that differ from `forward()[0]` with `use_sigmoid_cls`; the first of a head's
# classes in the table counts. Names, so that mmdet does not have to be installed.
HEADS: dict[str, ClassMaps] = {
    'TOODHead': ClassMaps(activation='identity'),  # it returns probabilities
    'CenterNetHead': ClassMaps(activation='identity'),  # the same
    # Top-left and bottom-right heatmaps, of every stack of the hourglass.
    'CornerHead': ClassMaps(lambda head, out: [*out[0], *out[1]], 'sigmoid'),
    'YOLOV3Head': ClassMaps(_split_yolov3, 'sigmoid'),
    'GuidedAnchorHead': ClassMaps(ask_as_in_training=True),
    'DecoupledSOLOHead': ClassMaps(lambda head, out: out[2], 'sigmoid', True),
    'SOLOHead': ClassMaps(lambda head, out: out[1], 'sigmoid', True),
}
# Heads with class scores that cannot be compared, and why.
REFUSED: dict[str, str] = {
    'ATSSVLFusionHead': 'whose classes are the words of a prompt',
    'CascadeRPNHead': 'whose stages need the anchors that each model refined itself',
}


@MODELS.register_module()
class DenseLogits(Comparison):
    """Compare the class logits of the dense heads, level by level.

    Of heads that also predict objectness or centerness, the classes alone count.
    Student and teacher must have the same levels, strides and anchors per location.

    Args:
        loss: Config of the loss; ``mmdist.DISTLoss`` if left out, with sigmoid or
            softmax as the head has it, or ``'identity'`` for the heads that return
            probabilities (TOOD, CenterNet).
        student: Path of the student's head, such as ``'rpn_head'`` for the objectness
            of a two-stage detector. Left out, it is ``'bbox_head'``, or ``'mask_head'``
            where there is no bbox head (SOLO).
        teacher: Path of the teacher's head; that of the student if left out.
        anchors: ``'joint'``, all anchors and classes of a location are one row
            (published for RetinaNet, 9 * 80 = 720 columns), or ``'separate'``, a row
            per anchor.
        levels: ``'sum'``, a loss per level, summed (published), or ``'concat'``, one
            loss over the rows of all levels.
        ignore_mask: Leave out locations in the padding of the batch. The published
            code does not; False restores it.
    """

    families = (
        'the one-stage detectors of mmdet, by their `bbox_head` (SOLO: `mask_head`), '
        "and the RPN of two-stage detectors, by `student='rpn_head'`"
    )

    def __init__(
        self,
        loss: dict | None = None,
        student: str | None = None,
        teacher: str | None = None,
        anchors: str = 'joint',
        levels: str = 'sum',
        ignore_mask: bool = True,
    ) -> None:
        super().__init__(loss)
        if anchors not in ('joint', 'separate'):
            raise ValueError(f"`anchors` is 'joint' or 'separate', got {anchors!r}.")
        if levels not in ('sum', 'concat'):
            raise ValueError(f"`levels` is 'sum' or 'concat', got {levels!r}.")
        self.student_path = student
        self.teacher_path = teacher or student
        self.anchors = anchors
        self.levels = levels
        self.ignore_mask = ignore_mask

    def activation(self, student: nn.Module, teacher: nn.Module) -> str:
        """As the head's own classification loss."""
        return _activation(self._head(student, self.student_path))

    def student_modules(self, student: nn.Module) -> Sequence[nn.Module]:
        """The dense head."""
        return [self._head(student, self.student_path)]

    def check_pair(self, student: nn.Module, teacher: nn.Module) -> None:
        """The teacher must have a dense head whose scores are of the same kind."""
        heads = [
            self._head(student, self.student_path),
            self._head(teacher, self.teacher_path),
        ]
        kinds = [_activation(head) for head in heads]
        if kinds[0] != kinds[1]:
            names = [type(head).__name__ for head in heads]
            raise ValueError(
                f"The student's {names[0]} gives scores for {kinds[0]}, the teacher's "
                f'{names[1]} for {kinds[1]}; they cannot be compared. Take a teacher '
                "of the student's family."
            )

    def record(self, step: Step) -> Sequence[Tensor]:
        """Class logits per level, each (N, anchors * classes, h, w)."""
        head = self._head(step.student, self.student_path)
        return _class_maps(head).maps(head, step.calls(head)[-1].output)

    asks_first = True

    def ask(self, step: Step, recorded: None) -> Sequence[Tensor]:
        """The teacher's class logits per level, from its features."""
        head = self._head(step.teacher_model, self.teacher_path)
        class_maps = _class_maps(head)
        # The flag of the head alone: its layers, Dropout or BN, stay in eval.
        head.training = class_maps.ask_as_in_training
        try:
            output = head(step.teacher_features)
        finally:
            head.training = False
        return class_maps.maps(head, output)

    def pair(
        self, step: Step, recorded: Sequence[Tensor], asked: Sequence[Tensor]
    ) -> list[Pair]:
        """One pair per level, or one of all levels' rows."""
        student_head = self._head(step.student, self.student_path)
        teacher_head = self._head(step.teacher_model, self.teacher_path)
        students = [_per_anchor(x, _num_columns(student_head)) for x in recorded]
        teachers = [_per_anchor(x, _num_columns(teacher_head)) for x in asked]
        _check_same_locations(students, teachers)
        softmax = _activation(student_head) == 'softmax'
        pairs = []
        for student, teacher in zip(students, teachers, strict=True):
            mask = step.valid_mask(*student.shape[-2:]) if self.ignore_mask else None
            # Two RPNs know no classes, so there is nothing to match.
            if not student_head.num_classes == teacher_head.num_classes == 1:
                student, teacher = step.classes.select(student, teacher, dim=2)
            if self.anchors == 'joint':
                if softmax and student.shape[1] > 1:
                    # Softmax is over the classes of an anchor: of log-probabilities of
                    # several anchors it is their probabilities, but for a factor.
                    student, teacher = student.log_softmax(2), teacher.log_softmax(2)
                student, teacher = student.flatten(1, 2), teacher.flatten(1, 2)
            else:
                student, teacher = student.transpose(1, 2), teacher.transpose(1, 2)
                if mask is not None:
                    mask = mask[:, None].expand(-1, student.shape[2], -1, -1)
            pairs.append(Pair(student, teacher, mask))
        return [_concatenate(pairs)] if self.levels == 'concat' else pairs

    def _head(self, model: nn.Module, path: str | None) -> nn.Module:
        paths = [path] if path else ['bbox_head', 'mask_head']
        heads = [attrgetter(p)(model) for p in paths if _has(model, p)]
        if not heads:
            raise self.unsupported(model, f'it has no `{"` or `".join(paths)}`')
        head = heads[0]
        for cls in type(head).__mro__:
            if cls.__name__ in REFUSED:
                raise self.unsupported(
                    model,
                    f'the class scores of its dense head, and found a '
                    f'{type(head).__name__}, {REFUSED[cls.__name__]}',
                )
        if _activation(head) is None:
            raise self.unsupported(
                model,
                f'`use_sigmoid_cls` of its dense head, which {type(head).__name__} '
                'does not have',
            )
        return head


def _has(model: nn.Module, path: str) -> bool:
    """Whether there is a module of that path; an instance may have None in place."""
    try:
        return isinstance(attrgetter(path)(model), nn.Module)
    except AttributeError:
        return False


def _class_maps(head: nn.Module) -> ClassMaps:
    for cls in type(head).__mro__:
        if cls.__name__ in HEADS:
            return HEADS[cls.__name__]
    return ClassMaps()


def _activation(head: nn.Module) -> str | None:
    """What turns the head's scores into probabilities; None if it does not say."""
    known = _class_maps(head).activation
    if known is None and hasattr(head, 'use_sigmoid_cls'):
        known = 'sigmoid' if head.use_sigmoid_cls else 'softmax'
    return known


def _num_columns(head: nn.Module) -> int:
    """Scores per anchor: the classes, and the background of a softmax head."""
    return getattr(head, 'cls_out_channels', head.num_classes)


def _per_anchor(logits: Tensor, num_columns: int) -> Tensor:
    """(N, anchors * classes, h, w) -> (N, anchors, classes, h, w)."""
    return logits.unflatten(1, (-1, num_columns))


def _check_same_locations(
    students: Sequence[Tensor], teachers: Sequence[Tensor]
) -> None:
    """Stop where the levels, their sizes or the anchors per location differ."""

    def locations(levels: Sequence[Tensor]) -> list[tuple]:
        return [(x.shape[1], *x.shape[-2:]) for x in levels]

    if locations(students) != locations(teachers):
        raise ValueError(
            'DenseLogits compares the same anchors at the same locations. Per level '
            '(anchors, height, width) the student has '
            f'{locations(students)}, the teacher {locations(teachers)}. Take a teacher '
            'with the same levels, strides and number of anchors per location.'
        )


def _concatenate(pairs: Sequence[Pair]) -> Pair:
    """One pair of the rows of several."""
    widths = {pair.student.shape[1] for pair in pairs}
    if len(widths) > 1:
        raise ValueError(
            "DenseLogits cannot do levels='concat' with anchors='joint' where levels "
            f'have different numbers of anchors (columns per level: {sorted(widths)}). '
            "Take anchors='separate', or levels='sum'."
        )
    mask = None
    if any(pair.mask is not None for pair in pairs):
        mask = torch.cat([pair.mask.flatten() for pair in pairs])
    return Pair(
        torch.cat([rows(pair.student) for pair in pairs]),
        torch.cat([rows(pair.teacher) for pair in pairs]),
        mask,
    )
