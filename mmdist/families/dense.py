"""Dense (one-stage) detectors, and RPNs: a head that scores every location."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from functools import reduce
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmdist.families import Places, Refuse, unreadable
from mmdist.families.probabilities import foreground, fp32
from mmdist.lookup import by_class_name
from mmdist.losses import as_rows
from mmdist.record import swapped
from mmdist.step import Step

ASSIGNED = 'overlap or best'
# A point stands for a square of this many strides: ATSS's anchor, which does as well
# as FCOS's points (Zhang et al., CVPR 2020, arXiv 1912.02424, section 3.3).
POINT_SIZE = 8
SAME_ANCHORS = 'The same anchors at the same locations are compared'
OTHER_ANCHORS = (
    'Use a teacher with the same levels, strides and anchors per location, or '
    'mmdist.Detections, which works with any detector. If each location has a single '
    "anchor or point, `score='joint'` accepts any shape of it."
)


class ClassMaps(NamedTuple):
    """Where a head's forward returns its class scores, and in which form."""

    maps: Callable[[nn.Module, tuple], Sequence[Tensor]] = lambda head, out: out[0]
    activation: str | None = None  # None: from the head's `use_sigmoid_cls`
    # Outside training the head skips locations or suppresses neighbours.
    ask_as_in_training: bool = False
    # Gives the second score that the head's `predict` multiplies the class score by,
    # as log-probabilities per level, (N, anchors, h, w).
    factor: Callable[[nn.Module, tuple], Sequence[Tensor]] | None = None
    takes_root: bool = False  # `predict` takes the root of that product


def _yolov3(head: nn.Module, out: tuple) -> list[Tensor]:
    """Box (4), objectness (1) and classes of each anchor, (N, anchors, 85, h, w)."""
    return [x.unflatten(1, (head.num_base_priors, -1)) for x in out[0]]


def _third_output(head: nn.Module, out: tuple) -> list[Tensor]:
    """Objectness, centerness or IoU, after the classes and the boxes."""
    return [F.logsigmoid(fp32(x)) for x in out[2]]


def _sabl_confidence(head: nn.Module, out: tuple) -> list[Tensor]:
    """SABL's confidence in its buckets; it does not depend on the box, here zeros."""
    confidences = []
    for buckets, offsets in out[1]:
        n, _, h, w = buckets.shape
        predicted = [fp32(as_rows(x)).contiguous() for x in (buckets, offsets)]
        boxes = predicted[0].new_zeros(len(predicted[0]), 4)
        _, confidence = head.bbox_coder.decode(boxes, predicted)
        confidences.append(confidence.view(n, 1, h, w).log())
    return confidences


# Heads that differ from `forward()[0]` with `use_sigmoid_cls`; the first match in a
# head's MRO counts. Names, so that mmdet need not be installed.
HEADS: dict[str, ClassMaps] = {
    'TOODHead': ClassMaps(activation='identity'),  # it returns probabilities
    'CenterNetHead': ClassMaps(activation='identity'),  # so does this one
    # Top-left and bottom-right heatmaps of every stack of the hourglass.
    'CornerHead': ClassMaps(lambda head, out: [*out[0], *out[1]], 'sigmoid'),
    'YOLOV3Head': ClassMaps(
        lambda head, out: [x[:, :, 5:].flatten(1, 2) for x in _yolov3(head, out)],
        'sigmoid',
        factor=lambda *args: [F.logsigmoid(fp32(x[:, :, 4])) for x in _yolov3(*args)],
    ),
    'YOLOXHead': ClassMaps(factor=_third_output),  # objectness
    'FCOSHead': ClassMaps(factor=_third_output),  # centerness; AutoAssign too
    'ATSSHead': ClassMaps(factor=_third_output),  # centerness
    'DDODHead': ClassMaps(factor=_third_output),  # IoU
    'PAAHead': ClassMaps(factor=_third_output, takes_root=True),  # IoU; LAD too
    # Derived from ATSS, but without a second score: VFNet's third output is boxes.
    'RTMDetHead': ClassMaps(),
    'VFNetHead': ClassMaps(),
    'SABLRetinaHead': ClassMaps(factor=_sabl_confidence),
    'GuidedAnchorHead': ClassMaps(ask_as_in_training=True),
    'DecoupledSOLOHead': ClassMaps(lambda head, out: out[2], 'sigmoid', True),
    'SOLOHead': ClassMaps(lambda head, out: out[1], 'sigmoid', True),
}
# Heads whose class scores cannot be compared, and why.
REFUSED: dict[str, str] = {
    'ATSSVLFusionHead': 'whose classes are the words of a prompt',
    'CascadeRPNHead': 'whose stages need the anchors that each model refined itself',
}


def head_of(
    model: nn.Module, path: str | None = None, refuse: Refuse = unreadable
) -> nn.Module:
    """The dense head at ``path``; it must have class scores that are known here.

    Without a path, it is ``'bbox_head'``, or ``'mask_head'`` for a model without a bbox
    head (SOLO).
    """
    paths = [path] if path else ['bbox_head', 'mask_head']
    for name in paths:  # a model may have None there
        head = reduce(lambda m, n: getattr(m, n, None), name.split('.'), model)
        if head is not None:
            break
    else:
        raise refuse(model, f'it has no `{"` or `".join(paths)}`')
    problem = by_class_name(head, REFUSED)
    if problem is None and activation_of(head) is None:
        problem = 'which does not have `use_sigmoid_cls`'
    if problem:
        raise refuse(model, f'its dense head is a {type(head).__name__}, {problem}')
    return head


def modules(model: nn.Module, refuse: Refuse) -> list[nn.Module]:
    """The head, which must have anchors or points."""
    head = head_of(model, refuse=refuse)
    if prior_generator(head) is None:
        raise refuse(model, 'its head has no anchors or points')
    return [head]


# ---- scores ----------------------------------------------------------------------


def _class_maps(head: nn.Module) -> ClassMaps:
    return by_class_name(head, HEADS) or ClassMaps()


def activation_of(head: nn.Module) -> str | None:
    """What turns the head's scores into probabilities; None if unknown."""
    known = _class_maps(head).activation
    if known or not hasattr(head, 'use_sigmoid_cls'):
        return known
    return 'sigmoid' if head.use_sigmoid_cls else 'softmax'


def ask(step: Step, path: str | None = None) -> tuple:
    """The output of the teacher's head on its features, computed once per step."""
    head = head_of(step.teacher_model, path)

    def run() -> tuple:
        # Only the head's own flag: its layers, such as Dropout and BN, stay in eval.
        with swapped(head, 'training', _class_maps(head).ask_as_in_training):
            return head(step.teacher_features)

    return step.shared(f'head {path}', run)


def record(step: Step, path: str | None = None) -> tuple:
    """The output of the student's head in its own loss pass."""
    return step.calls(head_of(step.student, path))[-1].output


def scores_of(head: nn.Module, output: tuple, score: str = 'class') -> list[Tensor]:
    """The class scores of each level in a head's output, (N, anchors, classes, h, w).

    With ``score='joint'`` they are the probabilities that the head's own ``predict``
    ranks by, without background.
    """
    columns = getattr(head, 'cls_out_channels', head.num_classes)
    class_maps, activation = _class_maps(head), activation_of(head)
    logits = [x.unflatten(1, (-1, columns)) for x in class_maps.maps(head, output)]
    if score == 'class' or activation == 'identity':
        return logits
    if class_maps.factor is None:
        return [foreground(x, activation, dim=2) for x in logits]
    # The logarithm of a product does not underflow, and half of it, the root, has no
    # infinite gradient at 0.
    joint = []
    for x, factor in zip(logits, class_maps.factor(head, output), strict=True):
        x = fp32(x)
        is_sigmoid = activation == 'sigmoid'
        x = F.logsigmoid(x) if is_sigmoid else x.log_softmax(2)[:, :, :-1]
        x = x + factor.unsqueeze(2)
        joint.append((x / 2 if class_maps.takes_root else x).exp())
    return joint


# ---- anchors and points ----------------------------------------------------------


def prior_generator(head: nn.Module):
    """mmdet's generator of the head's anchors or points; None if there is none."""
    of_sabl = getattr(head, 'square_anchor_generator', None)  # and guided anchors
    return getattr(head, 'prior_generator', of_sabl)


def check_same_priors(
    student: nn.Module, teacher: nn.Module, any_shape: bool = True
) -> None:
    """Raise ValueError if two heads differ in levels, strides or anchors.

    With ``any_shape``, the shape of a location's single anchor or point can differ.
    Shifted anchors only give a warning.
    """
    generators = [prior_generator(head) for head in (student, teacher)]
    if None in generators:
        return
    differ = _difference(*generators, any_shape)
    if differ:
        raise ValueError(f'{SAME_ANCHORS}, but {differ}. {OTHER_ANCHORS}')
    centres = [_centres(generator) for generator in generators]
    if not torch.allclose(*centres):
        ours, theirs = (centre[0].tolist() for centre in centres)
        warnings.warn(
            'The same locations are compared, but the first anchor or point of one '
            f'lies {ours} strides (x, y) into it for the student, {theirs} for the '
            'teacher. The two may find an object at neighbouring locations; a teacher '
            'without this shift fits better.',
            stacklevel=2,
        )


def _difference(student, teacher, any_shape: bool) -> str | None:
    """How two generators differ, in words; points have no width or height."""
    ours, theirs = student.strides, teacher.strides
    if ours != theirs:
        return f'the strides of the student are {ours}, those of the teacher {theirs}'
    ours, theirs = student.num_base_priors, teacher.num_base_priors
    if ours != theirs:
        return (
            f'the student has {ours} anchors per location on its levels, the teacher '
            f'{theirs}'
        )
    if any_shape and set(ours) == {1}:
        return None
    levels = [getattr(x, 'base_anchors', ()) for x in (student, teacher)]
    for level, both in enumerate(zip(*levels, strict=False)):
        shapes = [anchors[:, 2:] - anchors[:, :2] for anchors in both]
        for k, (a, b) in enumerate(zip(*shapes, strict=True)):
            if not torch.allclose(a, b):
                ours, theirs = ('{:.1f} x {:.1f}'.format(*x.tolist()) for x in (a, b))
                return (
                    f'anchor {k} of level {level} is {ours} pixels (width x height) '
                    f'for the student, {theirs} for the teacher'
                )
    return None


def _centres(generator) -> Tensor:
    """Position of a location's first anchor or point, (levels, 2), in strides."""
    if not hasattr(generator, 'base_anchors'):
        return torch.full((generator.num_levels, 2), float(generator.offset))
    first = torch.stack([anchors[0] for anchors in generator.base_anchors])
    return (first[:, :2] + first[:, 2:]) / 2 / torch.tensor(generator.strides)


def places(step: Step) -> list[Places]:
    """The student's anchors, or squares around its points, level by level.

    The rows of a level are ordered by image, y, x, anchor; padding does not count.
    """
    head = head_of(step.student)
    levels = scores_of(head, record(step), 'joint')
    levels = [step.classes.select_student(x, 2, 'identity') for x in levels]
    found = []
    for x, boxes, mask in zip(
        levels, anchors(head, levels), inside(step, head, levels), strict=True
    ):
        rows = x.permute(0, 3, 4, 1, 2).flatten(0, 3)  # (N, h, w, anchors, classes)
        images = torch.arange(len(x), device=x.device).repeat_interleave(len(boxes))
        mask = None if mask is None else mask.flatten()
        found.append(Places(rows, boxes.repeat(len(x), 1), images, mask))
    return found


def inside(
    step: Step, head: nn.Module, levels: Sequence[Tensor]
) -> list[Tensor | None]:
    """The anchors of each map outside the padding, (N, h * w * anchors); None: all."""
    masks = [step.valid_mask(*x.shape[-2:]) for x in levels]
    if masks[0] is None:
        return masks
    numbers = prior_generator(head).num_base_priors
    both = zip(masks, numbers, strict=True)
    return [mask.flatten(1).repeat_interleave(number, 1) for mask, number in both]


def anchors(head: nn.Module, levels: Sequence[Tensor]) -> list[Tensor]:
    """The anchors of each map, (h * w * anchors, 4); squares around points."""
    generator = prior_generator(head)
    sizes = [x.shape[-2:] for x in levels]
    priors = generator.grid_priors(sizes, device=levels[0].device)
    if hasattr(generator, 'base_anchors'):
        return priors
    squares = []
    for points, stride in zip(priors, generator.strides, strict=True):
        half = points.new_tensor(stride).expand(2) * (POINT_SIZE / 2)
        squares.append(torch.cat([points[:, :2] - half, points[:, :2] + half], 1))
    return squares
