"""Class logits at every location of a dense (one-stage) detector."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from operator import attrgetter
from typing import NamedTuple

import torch
import torch.nn.functional as F
from mmengine.logging import print_log
from torch import Tensor, nn

from mmdist.lookup import by_class_name
from mmdist.losses import as_rows
from mmdist.registry import MODELS
from mmdist.step import Step

from .base import Comparison, Pair
from .probabilities import foreground, fp32, mean_probability


class ClassMaps(NamedTuple):
    """Where a head's forward returns its class scores, and as what."""

    maps: Callable[[nn.Module, tuple], Sequence[Tensor]] = lambda head, out: out[0]
    activation: str | None = None  # None: as the head's `use_sigmoid_cls` says
    # Outside training the head skips locations or suppresses neighbours.
    ask_as_in_training: bool = False
    # The second score that the head's `predict` multiplies the class score by: its
    # log-probabilities per level, (N, anchors, h, w).
    factor: Callable[[nn.Module, tuple], Sequence[Tensor]] | None = None
    takes_root: bool = False  # `predict` takes the root of that product


def _split_yolov3(head: nn.Module, out: tuple) -> list[Tensor]:
    """The class channels of box (4), objectness (1) and classes of each anchor."""
    return [
        pred.unflatten(1, (head.num_base_priors, -1))[:, :, 5:].flatten(1, 2)
        for pred in out[0]
    ]


def _yolov3_objectness(head: nn.Module, out: tuple) -> list[Tensor]:
    return [
        F.logsigmoid(fp32(pred.unflatten(1, (head.num_base_priors, -1))[:, :, 4]))
        for pred in out[0]
    ]


def _third_output(head: nn.Module, out: tuple) -> list[Tensor]:
    """Objectness, centerness or IoU, after the classes and the boxes."""
    return [F.logsigmoid(fp32(x)) for x in out[2]]


def _sabl_confidence(head: nn.Module, out: tuple) -> list[Tensor]:
    """How sure SABL is of its buckets; the sides of a box, whatever the box is."""
    confidences = []
    for buckets, offsets in out[1]:
        n, _, h, w = buckets.shape
        predicted = [fp32(as_rows(x)).contiguous() for x in (buckets, offsets)]
        boxes = predicted[0].new_zeros(len(predicted[0]), 4)
        _, confidence = head.bbox_coder.decode(boxes, predicted)
        confidences.append(confidence.view(n, 1, h, w).log())
    return confidences


# Heads that differ from `forward()[0]` with `use_sigmoid_cls`; the first of a head's
# classes in the table counts. Names, so that mmdet does not have to be installed.
HEADS: dict[str, ClassMaps] = {
    'TOODHead': ClassMaps(activation='identity'),  # it returns probabilities
    'CenterNetHead': ClassMaps(activation='identity'),  # the same
    # Top-left and bottom-right heatmaps, of every stack of the hourglass.
    'CornerHead': ClassMaps(lambda head, out: [*out[0], *out[1]], 'sigmoid'),
    'YOLOV3Head': ClassMaps(_split_yolov3, 'sigmoid', factor=_yolov3_objectness),
    'YOLOXHead': ClassMaps(factor=_third_output),  # objectness
    'FCOSHead': ClassMaps(factor=_third_output),  # centerness; of AutoAssign too
    'ATSSHead': ClassMaps(factor=_third_output),  # centerness
    'DDODHead': ClassMaps(factor=_third_output),  # IoU
    'PAAHead': ClassMaps(factor=_third_output, takes_root=True),  # IoU; of LAD too
    # Derived from ATSS, but with no second score: VFNet's third output are boxes.
    'RTMDetHead': ClassMaps(),
    'VFNetHead': ClassMaps(),
    'SABLRetinaHead': ClassMaps(factor=_sabl_confidence),
    'GuidedAnchorHead': ClassMaps(ask_as_in_training=True),
    'DecoupledSOLOHead': ClassMaps(lambda head, out: out[2], 'sigmoid', True),
    'SOLOHead': ClassMaps(lambda head, out: out[1], 'sigmoid', True),
}
# Heads with class scores that cannot be compared, and why.
REFUSED: dict[str, str] = {
    'ATSSVLFusionHead': 'whose classes are the words of a prompt',
    'CascadeRPNHead': 'whose stages need the anchors that each model refined itself',
}

SAME_LOCATIONS = (
    'Take a teacher with the same levels, strides and anchors per location. '
    "`anchors='best'` compares what the best anchor of a location says, and "
    'mmdist.Detections what the teacher detects. Where a location has a single anchor '
    "or point, `score='joint'` takes any."
)


@MODELS.register_module()
class DenseLogits(Comparison):
    """Compare the class logits of the dense heads, level by level.

    Student and teacher must have the same levels, strides and anchors per location,
    unless ``anchors='best'``.

    Logits are compared where both heads have the same activation. Where they differ (a
    softmax with background, a sigmoid per class, the probabilities that TOOD returns),
    it is the probabilities of the classes without background.

    Class scores are not of one meaning. Those of YOLOX and YOLOv3 are trained at
    objects alone: elsewhere they say nothing, and objectness tells where. FCOS, ATSS
    and their kin leave to centerness or IoU how good a box is, whereas GFL, VFNet, TOOD
    and RTMDet have that in the class score. With ``score='joint'`` each side is
    compared by what its own ``predict`` ranks by, which means the same for all: the
    probability of the class times the second score, where there is one. Take it for
    heads of different meaning, and for YOLOX and YOLOv3.

    Args:
        loss: Config of the loss; ``mmdist.DISTLoss`` if omitted, with sigmoid or
            softmax as the head has it, or ``'identity'`` where probabilities are
            compared.
        student: Path of the student's head, such as ``'rpn_head'`` for the objectness
            of a two-stage detector. If omitted, it is ``'bbox_head'``, or
            ``'mask_head'`` where there is no bbox head (SOLO).
        teacher: Path of the teacher's head; that of the student if omitted.
        anchors: ``'joint'``, all anchors and classes of a location are one row
            (published for RetinaNet, 9 * 80 = 720 columns). ``'separate'``, a row
            per anchor. ``'best'``, a row per location, for each class the score of the
            anchor with the highest one; levels are paired by their strides, those of
            one side only are ignored, and the anchors may be any.
        levels: ``'sum'``, a loss per level, summed (published), or ``'concat'``, one
            loss over the rows of all levels.
        ignore_mask: Ignore locations in the padding of the batch. The published code
            does not; False restores it.
        score: ``'class'``, the class scores alone (published), or ``'joint'``, the
            probabilities that ``predict`` ranks by: class times objectness, centerness
            or IoU, without background. Heads with one
            anchor or point per location are then compared whatever it is.
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
        score: str = 'class',
    ) -> None:
        super().__init__(loss)
        if anchors not in ('joint', 'separate', 'best'):
            raise ValueError(
                f"`anchors` is 'joint', 'separate' or 'best', got {anchors!r}."
            )
        if levels not in ('sum', 'concat'):
            raise ValueError(f"`levels` is 'sum' or 'concat', got {levels!r}.")
        if score not in ('class', 'joint'):
            raise ValueError(f"`score` is 'class' or 'joint', got {score!r}.")
        self.student_path = student
        self.teacher_path = teacher or student
        self.anchors = anchors
        self.levels = levels
        self.ignore_mask = ignore_mask
        self.score = score
        # with 'best': which levels of the two have the same stride
        self._levels: list[tuple[int, int]] | None = None

    def activation(self, student: nn.Module) -> str:
        """As the head's own classification loss; 'identity' for probabilities."""
        if self.score == 'joint':
            return 'identity'
        return activation_of(self._head(student, self.student_path))

    def student_modules(self, student: nn.Module) -> Sequence[nn.Module]:
        """The dense head."""
        return [self._head(student, self.student_path)]

    def check_pair(self, student: nn.Module, teacher: nn.Module) -> None:
        """The teacher must have a dense head with the same anchors."""
        heads = [
            self._head(student, self.student_path),
            self._head(teacher, self.teacher_path),
        ]
        generators = [prior_generator(head) for head in heads]
        if self.anchors == 'best':
            self._levels = _common_levels(*generators)
        elif None not in generators:
            _check_same_priors(*generators, any_shape=self.score == 'joint')

    def record(self, step: Step) -> Sequence[Tensor]:
        """Class scores per level, each (N, anchors, classes, h, w)."""
        head = self._head(step.student, self.student_path)
        return self.scores_of(head, step.calls(head)[-1].output)

    asks_first = True

    def ask(self, step: Step, recorded: None) -> Sequence[Tensor]:
        """The teacher's class scores per level, from its features."""
        head = self._head(step.teacher_model, self.teacher_path)
        return self.scores_of(head, self.run_teacher(step, head))

    def mean_of_views(
        self, step: Step, asked: Sequence[Tensor], mirrored: Sequence[Tensor]
    ) -> list[Tensor]:
        """Scores of the mean probabilities, level by level."""
        head = self._head(step.teacher_model, self.teacher_path)
        kind = 'identity' if self.score == 'joint' else activation_of(head)
        return [
            mean_probability(a, b.flip(-1), kind, 2)
            for a, b in zip(asked, mirrored, strict=True)
        ]

    def run_teacher(self, step: Step, head: nn.Module) -> tuple:
        """The output of a head of the teacher, on its features, once a step."""

        def run() -> tuple:
            # The flag of the head alone: its layers, Dropout or BN, stay in eval.
            head.training = _class_maps(head).ask_as_in_training
            try:
                return head(step.teacher_features)
            finally:
                head.training = False

        return step.shared(f'head {self.teacher_path}', run)

    def pair(
        self, step: Step, recorded: Sequence[Tensor], asked: Sequence[Tensor]
    ) -> list[Pair]:
        """One pair per level, or one of all levels' rows."""
        heads = (
            self._head(step.student, self.student_path),
            self._head(step.teacher_model, self.teacher_path),
        )
        if self.anchors == 'best':
            recorded, asked = self._same_levels(recorded, asked)
        else:
            _check_same_locations(recorded, asked)
        activation = self._common_activation(heads, (*recorded, *asked))
        selects = step.classes.select_student, step.classes.select_teacher
        if heads[0].num_classes == heads[1].num_classes == 1:
            selects = None, None  # two RPNs know no classes to match
        recorded, asked = (
            self._comparable(scores, head, select, activation)
            for scores, head, select in zip(
                (recorded, asked), heads, selects, strict=True
            )
        )
        pairs = []
        for student, teacher in zip(recorded, asked, strict=True):
            mask = step.valid_mask(*student.shape[-2:]) if self.ignore_mask else None
            if self.anchors == 'separate':
                student, teacher = student.transpose(1, 2), teacher.transpose(1, 2)
                if mask is not None:
                    mask = mask[:, None].expand(-1, student.shape[2], -1, -1)
            else:
                if activation == 'softmax' and student.shape[1] > 1:
                    # Softmax is over the classes of an anchor: of log-probabilities of
                    # several anchors it is their probabilities, but for a factor.
                    student, teacher = student.log_softmax(2), teacher.log_softmax(2)
                student, teacher = student.flatten(1, 2), teacher.flatten(1, 2)
            pairs.append(Pair(student, teacher, mask, activation=activation))
        return [_concatenate(pairs)] if self.levels == 'concat' else pairs

    def _same_levels(
        self, recorded: Sequence[Tensor], asked: Sequence[Tensor]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """The levels of the strides that both have, at the student's size."""
        if self._levels is None:
            both = list(zip(recorded, asked, strict=True))
        else:
            both = [(recorded[i], asked[k]) for i, k in self._levels]
        return [s for s, _ in both], [_resized(t, s) for s, t in both]

    def _common_activation(
        self, heads: Sequence[nn.Module], scores: Sequence[Tensor]
    ) -> str:
        """What turns the scores that are compared into probabilities."""
        kinds = {activation_of(head) for head in heads}
        if self.score == 'joint' or len(kinds) > 1:
            return 'identity'
        # The logits of the softmax of two anchors have no common scale.
        best_of_many = self.anchors == 'best' and any(x.shape[1] > 1 for x in scores)
        return 'identity' if best_of_many and kinds == {'softmax'} else kinds.pop()

    def _comparable(
        self,
        scores: Sequence[Tensor],
        head: nn.Module,
        select: Callable[[Tensor, int, str], Tensor] | None,
        activation: str,
    ) -> list[Tensor]:
        """One side's scores of the common classes, for an activation of both."""
        kind = activation_of(head)
        if select is not None:
            # joint scores of sigmoids are independent of each other, as these are
            is_joint = self.score == 'joint' and kind == 'softmax'
            scores = [select(x, 2, 'identity' if is_joint else kind) for x in scores]
        if activation != kind and self.score == 'class':
            scores = [foreground(x, kind, 2) for x in scores]
        if self.anchors == 'best':
            scores = [x.amax(1, keepdim=True) for x in scores]
        return scores

    def scores_of(self, head: nn.Module, output: tuple) -> list[Tensor]:
        """Of the output of a head's forward, per level (N, anchors, classes, h, w)."""
        columns = getattr(head, 'cls_out_channels', head.num_classes)
        logits = [
            x.unflatten(1, (-1, columns)) for x in _class_maps(head).maps(head, output)
        ]
        return logits if self.score == 'class' else _joint(head, logits, output)

    def _head(self, model: nn.Module, path: str | None) -> nn.Module:
        paths = [path] if path else ['bbox_head', 'mask_head']
        heads = [attrgetter(p)(model) for p in paths if _has(model, p)]
        if not heads:
            raise self.unsupported(model, f'it has no `{"` or `".join(paths)}`')
        head = heads[0]
        refused = by_class_name(head, REFUSED)
        if refused is not None:
            raise self.unsupported(
                model, f'its dense head is a {type(head).__name__}, {refused}'
            )
        if activation_of(head) is None:
            raise self.unsupported(
                model,
                f'its dense head is a {type(head).__name__}, which does not have '
                '`use_sigmoid_cls`',
            )
        return head


def _has(model: nn.Module, path: str) -> bool:
    """Whether there is a module of that path; an instance may have None in place."""
    try:
        return isinstance(attrgetter(path)(model), nn.Module)
    except AttributeError:
        return False


def _class_maps(head: nn.Module) -> ClassMaps:
    return by_class_name(head, HEADS) or ClassMaps()


def activation_of(head: nn.Module) -> str | None:
    """What turns the head's scores into probabilities; None if it does not say."""
    known = _class_maps(head).activation
    if known is None and hasattr(head, 'use_sigmoid_cls'):
        known = 'sigmoid' if head.use_sigmoid_cls else 'softmax'
    return known


def _joint(
    head: nn.Module, logits: Sequence[Tensor], output: tuple
) -> Sequence[Tensor]:
    """The probabilities that the head's own ``predict`` ranks by, no background."""
    class_maps, activation = _class_maps(head), activation_of(head)
    if activation == 'identity':
        return logits
    # The logarithm of a product does not underflow, nor has its half, the root, an
    # infinite gradient at 0.
    if activation == 'sigmoid':
        joint = [F.logsigmoid(fp32(x)) for x in logits]
    else:
        joint = [fp32(x).log_softmax(2)[:, :, :-1] for x in logits]
    if class_maps.factor is not None:
        factors = class_maps.factor(head, output)
        joint = [x + f.unsqueeze(2) for x, f in zip(joint, factors, strict=True)]
    if class_maps.takes_root:
        joint = [x / 2 for x in joint]
    return [x.exp() for x in joint]


def prior_generator(head: nn.Module):
    """What places the head's anchors or points, of mmdet; None if there is none."""
    for name in ('prior_generator', 'square_anchor_generator'):  # SABL, guided anchors
        if hasattr(head, name):
            return getattr(head, name)
    return None


def _common_levels(student, teacher) -> list[tuple[int, int]] | None:
    """Indices of the levels with the same stride; None if there are no strides.

    Args:
        student: The student's generator of anchors or points.
        teacher: The teacher's.

    Raises:
        ValueError: The two have no stride in common.
    """
    if student is None or teacher is None:
        return None
    ours, theirs = list(student.strides), list(teacher.strides)
    common = [(i, theirs.index(s)) for i, s in enumerate(ours) if s in theirs]
    if not common:
        raise ValueError(
            "DenseLogits with anchors='best' pairs levels of the same stride, but the "
            f'student has the strides {ours}, the teacher {theirs}. Compare what the '
            "teacher detects, `type='mmdist.Detections'`."
        )
    if len(common) < max(len(ours), len(theirs)):
        print_log(
            f'DenseLogits compares the levels of the strides '
            f'{[ours[i] for i, _ in common]}. The student has {ours}, the teacher '
            f'{theirs}.',
            logger='current',
        )
    return common


def _resized(teacher: Tensor, student: Tensor) -> Tensor:
    """The teacher's level at the size of the student's, if it differs by rounding."""
    ours, theirs = student.shape[-2:], teacher.shape[-2:]
    if ours == theirs:
        return teacher
    if max(abs(a - b) for a, b in zip(ours, theirs, strict=True)) > 1:
        raise ValueError(
            'DenseLogits compares the same locations, but a level is '
            f'{tuple(ours)} for the student and {tuple(theirs)} for the teacher.'
        )
    resized = F.interpolate(teacher.flatten(1, 2), ours, mode='bilinear')
    return resized.unflatten(1, teacher.shape[1:3])


def _check_same_priors(student, teacher, any_shape: bool) -> None:
    """Stop where two heads have other anchors; warn where these are shifted.

    Args:
        student: The student's generator of anchors or points.
        teacher: The teacher's.
        any_shape: Whether the single anchor or point of a location may be any.
    """
    counts = student.num_base_priors, teacher.num_base_priors
    differ = None
    if student.strides != teacher.strides:
        differ = (
            f'the strides of the student are {student.strides}, those of the teacher '
            f'{teacher.strides}'
        )
    elif counts[0] != counts[1]:
        differ = (
            f'the student has {counts[0]} anchors per location on its levels, the '
            f'teacher {counts[1]}'
        )
    elif not (any_shape and set(counts[0]) == {1}):
        differ = _other_shape(student, teacher)
    if differ:
        raise ValueError(
            'DenseLogits compares the same anchors at the same locations, but '
            f'{differ}. {SAME_LOCATIONS}'
        )
    centres = [_centres(generator) for generator in (student, teacher)]
    if not torch.allclose(*centres):
        ours, theirs = (centre[0].tolist() for centre in centres)
        warnings.warn(
            'DenseLogits compares location with location. The first anchor or point of '
            f'a location lies {ours} strides (x, y) into it for the student, {theirs} '
            'for the teacher, so the two may find an object at neighbouring locations. '
            'A teacher without that shift, if there is one, fits better.',
            stacklevel=2,
        )


def _other_shape(student, teacher) -> str | None:
    """The first anchor of another width or height, in words; points have none."""
    if not (hasattr(student, 'base_anchors') and hasattr(teacher, 'base_anchors')):
        return None
    levels = zip(student.base_anchors, teacher.base_anchors, strict=True)
    for level, both in enumerate(levels):
        shapes = [anchors[:, 2:] - anchors[:, :2] for anchors in both]
        same = torch.isclose(*shapes).all(1).tolist()
        if not all(same):
            k = same.index(False)
            ours, theirs = ('{:.1f} x {:.1f}'.format(*x[k].tolist()) for x in shapes)
            return (
                f'anchor {k} of level {level} is {ours} pixels (width x height) for '
                f'the student, {theirs} for the teacher'
            )
    return None


def _centres(generator) -> Tensor:
    """Where in a location its first anchor or point lies, (levels, 2), in strides."""
    if not hasattr(generator, 'base_anchors'):
        return torch.full((generator.num_levels, 2), float(generator.offset))
    first = torch.stack([anchors[0] for anchors in generator.base_anchors])
    return (first[:, :2] + first[:, 2:]) / 2 / torch.tensor(generator.strides)


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
            f'{locations(students)}, the teacher {locations(teachers)}. '
            f'{SAME_LOCATIONS}'
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
        torch.cat([as_rows(pair.student) for pair in pairs]),
        torch.cat([as_rows(pair.teacher) for pair in pairs]),
        mask,
        activation=pairs[0].activation,
    )
