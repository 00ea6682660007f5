"""Class logits at every location of a dense (one-stage) detector."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mmdist.families import dense
from mmdist.families.probabilities import foreground, mean_probability
from mmdist.losses import as_rows
from mmdist.registry import MODELS
from mmdist.step import Step

from .base import Comparison, Pair, check_choice


@MODELS.register_module()
class DenseLogits(Comparison):
    """Compare the class logits of the dense heads, level by level.

    Student and teacher must have the same levels, strides and anchors per location.

    Logits are compared if both heads have the same activation. If they differ (a
    softmax with background, a sigmoid per class, the probabilities that TOOD returns),
    the probabilities of the classes without background are compared.

    The meaning of a class score depends on the head. YOLOX and YOLOv3 train it only at
    objects: elsewhere it means nothing, and objectness says where they are. FCOS, ATSS
    and their kin leave the quality of a box to centerness or IoU, whereas in GFL,
    VFNet, TOOD and RTMDet the class score includes it. With ``score='joint'`` each side
    is compared by what its own ``predict`` ranks by, which means the same for all: the
    class probability times the second score, if there is one. Use it for heads whose
    scores differ in meaning, and for YOLOX and YOLOv3.

    Args:
        loss: Config of the loss; ``mmdist.DISTLoss`` if omitted, with the head's
            sigmoid or softmax, or ``'identity'`` if probabilities are compared.
        student: Path of the student's head, such as ``'rpn_head'`` for the objectness
            of a two-stage detector; ``'bbox_head'`` if omitted, or ``'mask_head'`` for
            a model without a bbox head (SOLO).
        teacher: Path of the teacher's head; the student's if omitted.
        anchors: ``'joint'``: all anchors and classes of a location are one row
            (published for RetinaNet, 9 * 80 = 720 columns). ``'separate'``: a row per
            anchor.
        levels: ``'sum'``: a loss per level, summed (published). ``'concat'``: one loss
            over the rows of all levels.
        ignore_mask: Ignore locations in the padding of the batch. The published code
            does not; False restores that.
        score: ``'class'``: the class scores alone (published). ``'joint'``: the
            probabilities that ``predict`` ranks by, class times objectness, centerness
            or IoU, without background. If each location has a single anchor or point,
            its shape can then differ.

    Raises:
        ValueError: An option has an unknown value.
    """

    families = (
        'the one-stage detectors of mmdet, by their `bbox_head` (SOLO: `mask_head`), '
        "and the RPN of two-stage detectors, by `student='rpn_head'`"
    )
    asks_first = True

    def __init__(
        self,
        loss: dict | None = None,
        student: str | None = None,
        teacher: str | None = None,
        anchors: str = 'joint',
        levels: str = 'sum',
        ignore_mask: bool = True,
        score: str = 'class',
    ) -> None:
        super().__init__(loss)
        if anchors == 'best':
            raise ValueError(
                "`anchors='best'` of DenseLogits was removed. Use mmdist.Detections, "
                'which compares heads with any anchors and levels.'
            )
        check_choice('`anchors`', anchors, 'joint', 'separate')
        check_choice('`levels`', levels, 'sum', 'concat')
        check_choice('`score`', score, 'class', 'joint')
        self.student_path = student
        self.teacher_path = teacher or student
        self.anchors = anchors
        self.levels = levels
        self.ignore_mask = ignore_mask
        self.score = score

    def activation(self, student: nn.Module) -> str:
        """That of the head's classification loss; 'identity' for probabilities."""
        if self.score == 'joint':
            return 'identity'
        return dense.activation_of(dense.head_of(student, self.student_path))

    def student_modules(self, student: nn.Module) -> Sequence[nn.Module]:
        """The dense head."""
        return [dense.head_of(student, self.student_path, self.unsupported)]

    def check_pair(self, student: nn.Module, teacher: nn.Module) -> None:
        """The teacher must have a dense head with the same anchors."""
        theirs = dense.head_of(teacher, self.teacher_path, self.unsupported)
        ours = dense.head_of(student, self.student_path)
        dense.check_same_priors(ours, theirs, self.score == 'joint')

    def record(self, step: Step) -> Sequence[Tensor]:
        """Class scores per level, each (N, anchors, classes, h, w)."""
        head = dense.head_of(step.student, self.student_path)
        return dense.scores_of(head, dense.record(step, self.student_path), self.score)

    def ask(self, step: Step, recorded: None) -> Sequence[Tensor]:
        """The teacher's class scores per level, from its features."""
        head = dense.head_of(step.teacher_model, self.teacher_path)
        return dense.scores_of(head, dense.ask(step, self.teacher_path), self.score)

    def mean_of_views(
        self, step: Step, asked: Sequence[Tensor], mirrored: Sequence[Tensor]
    ) -> list[Tensor]:
        """Scores of the mean probabilities, level by level."""
        head = dense.head_of(step.teacher_model, self.teacher_path)
        kind = 'identity' if self.score == 'joint' else dense.activation_of(head)
        return [
            mean_probability(a, b.flip(-1), kind, 2)
            for a, b in zip(asked, mirrored, strict=True)
        ]

    def pair(
        self, step: Step, recorded: Sequence[Tensor], asked: Sequence[Tensor]
    ) -> list[Pair]:
        """One pair per level, or one with the rows of all levels."""
        ours, theirs = (
            [(x.shape[1], *x.shape[-2:]) for x in side] for side in (recorded, asked)
        )
        if ours != theirs:
            raise ValueError(
                f'{dense.SAME_ANCHORS}, but (anchors, height, width) per level differ: '
                f'the student has {ours}, the teacher {theirs}. {dense.OTHER_ANCHORS}'
            )
        heads = (
            dense.head_of(step.student, self.student_path),
            dense.head_of(step.teacher_model, self.teacher_path),
        )
        kinds = [dense.activation_of(head) for head in heads]
        is_joint, differ = self.score == 'joint', kinds[0] != kinds[1]
        activation = 'identity' if is_joint or differ else kinds[0]
        are_rpns = heads[0].num_classes == heads[1].num_classes == 1
        selects = step.classes.select_student, step.classes.select_teacher
        sides = []
        for side, kind, select in zip((recorded, asked), kinds, selects, strict=True):
            if not are_rpns:  # these have no classes to match
                # joint scores of sigmoids stay independent of each other
                of = 'identity' if is_joint and kind == 'softmax' else kind
                side = [select(x, 2, of) for x in side]
            if differ and not is_joint:
                side = [foreground(x, kind, 2) for x in side]
            sides.append(side)
        levels = zip(*sides, strict=True)
        pairs = [self._of_level(step, *level, activation) for level in levels]
        return [_concatenate(pairs)] if self.levels == 'concat' else pairs

    def _of_level(
        self, step: Step, student: Tensor, teacher: Tensor, activation: str
    ) -> Pair:
        mask = step.valid_mask(*student.shape[-2:]) if self.ignore_mask else None
        if self.anchors == 'separate':
            student, teacher = student.transpose(1, 2), teacher.transpose(1, 2)
            if mask is not None:
                mask = mask[:, None].expand(-1, student.shape[2], -1, -1)
        else:
            if activation == 'softmax' and student.shape[1] > 1:
                # Softmax is over the classes of one anchor. A softmax of several
                # anchors' log-probabilities is their probabilities, up to a factor.
                student, teacher = student.log_softmax(2), teacher.log_softmax(2)
            student, teacher = student.flatten(1, 2), teacher.flatten(1, 2)
        return Pair(student, teacher, mask, activation=activation)


def _concatenate(pairs: Sequence[Pair]) -> Pair:
    """Merge the rows of several pairs into one pair."""
    widths = {pair.student.shape[1] for pair in pairs}
    if len(widths) > 1:
        raise ValueError(
            "DenseLogits cannot combine levels='concat' with anchors='joint' if levels "
            f'have different numbers of anchors (columns per level: {sorted(widths)}). '
            "Use anchors='separate', or levels='sum'."
        )
    student = torch.cat([as_rows(pair.student) for pair in pairs])
    teacher = torch.cat([as_rows(pair.teacher) for pair in pairs])
    mask = None
    if pairs[0].mask is not None:
        mask = torch.cat([pair.mask.flatten() for pair in pairs])
    return Pair(student, teacher, mask, activation=pairs[0].activation)
