"""Two-stage detectors: proposals, and heads that score them in one or more stages."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mmdist.families import Places, Refuse, unreadable
from mmdist.families.probabilities import foreground
from mmdist.lookup import is_a
from mmdist.record import Call
from mmdist.step import Step

ASSIGNED = 'overlap'
# The mask forwards that need only features and proposals.
MASK_FORWARDS = ('StandardRoIHead._mask_forward', 'CascadeRoIHead._mask_forward')


class Proposals(NamedTuple):
    """Input and output of one stage of the student's RoI head."""

    stage: int
    rois: Tensor  # (rois, 5), the image's index in the batch and the box
    # (rois, classes + background) from the bbox head; (rois, classes or 1, height,
    # width) from the mask head
    logits: Tensor
    deltas: Tensor | None = None  # (rois, 4) or (rois, 4 * classes), bbox head only


class Judged(NamedTuple):
    """Output of one stage of the teacher's bbox head for proposals."""

    stage: int
    logits: Tensor  # (rois, classes + background)
    deltas: Tensor  # (rois, 4) or (rois, 4 * classes)


def is_sparse(model: nn.Module) -> bool:
    """Whether the model's proposals are learned, as in Sparse R-CNN."""
    return is_a(getattr(model, 'roi_head', None), 'SparseRoIHead')


def check(model: nn.Module, refuse: Refuse = unreadable) -> None:
    """Raise unless the model's bbox head can score any proposals."""
    roi_head = getattr(model, 'roi_head', None)
    for part in ('bbox_roi_extractor', 'bbox_head', '_bbox_forward'):
        if not hasattr(roi_head, part):
            raise refuse(model, f'it has no `roi_head.{part}`')
    if is_sparse(model):
        raise refuse(
            model,
            'the bbox heads of its SparseRoIHead score only its own learned '
            'proposals, not those of another model (mmdist.QueryLogits compares it)',
        )


def check_masks(model: nn.Module, refuse: Refuse = unreadable) -> None:
    """Raise unless the model's mask head can segment any proposals."""
    roi_head = getattr(model, 'roi_head', None)
    if getattr(roi_head, 'mask_head', None) is None:
        raise refuse(model, 'it has no `roi_head.mask_head`')
    if type(roi_head)._mask_forward.__qualname__ not in MASK_FORWARDS:
        kind = type(roi_head).__name__
        raise refuse(
            model, f'the mask head of its {kind} needs more than features and proposals'
        )
    if getattr(roi_head, 'share_roi_extractor', False):
        raise refuse(model, 'its mask head does not have its own extractor')


def stages(model: nn.Module, part: str = 'bbox') -> list[tuple[nn.Module, nn.Module]]:
    """The extractor and the ``'bbox'`` or ``'mask'`` head of each stage."""
    sides = (getattr(model.roi_head, f'{part}_{x}') for x in ('roi_extractor', 'head'))
    sides = (x if isinstance(x, nn.ModuleList) else [x] for x in sides)
    return list(zip(*sides, strict=True))


def is_cascade(model: nn.Module) -> bool:
    """Whether the RoI head has a list of stages, even of one."""
    return isinstance(model.roi_head.bbox_head, nn.ModuleList)


def modules(
    model: nn.Module, refuse: Refuse = unreadable, part: str = 'bbox'
) -> list[nn.Module]:
    """The extractors and heads of all stages."""
    (check if part == 'bbox' else check_masks)(model, refuse)
    extractors, heads = zip(*stages(model, part), strict=True)
    return [*extractors, *heads]


def term_of(model: nn.Module, stage: int) -> dict:
    """``weight`` and ``name`` of a stage's term, as in the model's own loss."""
    if not is_cascade(model):
        return dict(weight=1.0, name='')
    return dict(weight=model.roi_head.stage_loss_weights[stage], name=f's{stage}')


# ---- the student's proposals -----------------------------------------------------


def sampled_rois(call: Call) -> Tensor:
    """The boxes passed to a RoI extractor, (rois, 5), image index first."""
    return call.args[1] if len(call.args) > 1 else call.kwargs['rois']


def record(step: Step, part: str = 'bbox') -> list[Proposals]:
    """The student's sampled proposals and what its heads returned, for each stage."""
    recorded = []
    for stage, (extractor, head) in enumerate(stages(step.student, part)):
        if stage > 0 and not step.has_run(head):
            # A cascade stops when no proposal is left. All processes must call the
            # loss equally often (`sync`), so call it here with no rows.
            none = (None if x is None else x[:0] for x in recorded[-1][1:])
            recorded.append(Proposals(stage, *none))
            continue
        # Samplers that look for hard examples call the head before the loss does.
        call = step.calls(head)[-1]
        rois = sampled_rois(step.call_before(extractor, call))
        outputs = call.output[:2] if part == 'bbox' else [call.output]
        recorded.append(Proposals(stage, rois, *outputs))
    return recorded


def places(step: Step) -> list[Places]:
    """The student's proposals, stage by stage."""
    found = []
    for stage, rois, logits, _ in record(step):
        logits = per_class(step.student, stage, logits)
        scores = foreground(step.classes.select_student(logits), 'softmax')
        # CrowdDet predicts several times per proposal, TridentNet in several branches
        rois = rois.repeat_interleave(len(scores) // max(len(rois), 1), 0)
        images = rois[:, 0] % len(step.data_samples)
        boxes, term = rois[:, 1:], term_of(step.student, stage)
        found.append(Places(scores, boxes, images, **term))
    return found


def per_class(model: nn.Module, stage: int, logits: Tensor) -> Tensor:
    """Logits whose softmax is the probabilities of the classes and the background.

    ``logits`` are what a stage of the model's bbox head returned, (rois, columns).
    """
    _, head = stages(model)[stage]
    if hasattr(head, 'num_instance'):  # CrowdDet: several predictions per proposal
        logits = logits.unflatten(1, (head.num_instance, -1)).flatten(0, 1)
    if getattr(head, 'custom_activation', False):
        # Seesaw loss has a separate objectness. Log-probabilities are logits as well.
        scores = head.loss_cls.get_activation(logits.float())
        return scores.clamp(min=torch.finfo(scores.dtype).tiny).log()
    return logits


# ---- the teacher's outputs for them ----------------------------------------------


def check_stage(who: str, teacher: nn.Module, stage: int | str | None) -> None:
    """Raise ValueError unless the teacher has the stage that a comparison wants."""
    number = len(stages(teacher))
    if isinstance(stage, int) and not -number <= stage < number:
        raise ValueError(
            f'{who}: stage={stage} of the teacher is out of range: its '
            f'{type(teacher).__name__} has {number} stage(s). Set `stage` to 0 to '
            f'{number - 1}, or omit it.'
        )


def judge(
    step: Step, recorded: Sequence[Proposals], stage: int | str | None
) -> list[list[Judged]]:
    """The outputs of the teacher's bbox head for any proposals, for each stage asked.

    A cascade is asked one ``stage``, all for ``'mean'``, or for None the student's
    stage, or the last one if the teacher has fewer.
    """
    roi_head, features = step.teacher_model.roi_head, step.teacher_features
    context = {}
    if getattr(roi_head, 'with_semantic', False):  # HTC, SCNet
        context['semantic_feat'] = roi_head.semantic_head(features)[1]
    if getattr(roi_head, 'with_glbctx', False):  # SCNet
        context['glbctx_feat'] = roi_head.glbctx_head(features)[1]
    number, cascade = len(stages(step.teacher_model)), is_cascade(step.teacher_model)
    judged = []
    for proposals in recorded:
        if not cascade:
            asked = [0]
        elif stage == 'mean':
            asked = range(number)
        else:
            asked = [min(proposals.stage, number - 1) if stage is None else stage]
        # TridentNet trains on a copy of the batch per branch, but tests on one copy
        rois = proposals.rois.clone()
        rois[:, 0] %= len(features[0])
        outputs = []
        for one in asked:
            which = [one] if cascade else []
            results = roi_head._bbox_forward(*which, features, rois, **context)
            outputs.append(Judged(one, results['cls_score'], results['bbox_pred']))
        judged.append(outputs)
    return judged


def judge_once(
    step: Step, recorded: Sequence[Proposals], stage: int | str | None
) -> list[list[Judged]]:
    """Like :func:`judge`, for the student's own proposals, once a step."""
    key = f'proposals, stage {stage}'
    return step.shared(key, lambda: judge(step, recorded, stage))


def judge_masks(step: Step, proposals: Proposals, stage: int) -> Tensor:
    """The mask logits of proposals from a stage of the teacher's mask head."""
    roi_head = step.teacher_model.roi_head
    which = [stage] if isinstance(roi_head.mask_head, nn.ModuleList) else []
    masks = roi_head._mask_forward(*which, step.teacher_features, proposals.rois)
    return masks['mask_preds']
