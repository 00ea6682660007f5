"""Two-stage detectors: proposals, and heads that score them in one or more stages."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from mmdist.families import Places, Refuse, name_of
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
    # From the bbox head (rois, classes + background), whose softmax is probabilities;
    # from the mask head (rois, classes or 1, height, width).
    logits: Tensor
    deltas: Tensor | None = None  # (rois, 4) or (rois, 4 * classes), bbox head only


class Judged(NamedTuple):
    """What the teacher's heads say about proposals, in the last stage asked."""

    stage: int
    logits: Tensor  # as in Proposals, the mean over the stages asked
    deltas: Tensor  # as in Proposals
    masks: Tensor | None = None  # logits of the mask head, if asked


def is_sparse(model: nn.Module) -> bool:
    """Whether the model's proposals are learned, as in Sparse R-CNN."""
    return is_a(getattr(model, 'roi_head', None), 'SparseRoIHead')


def check(model: nn.Module, refuse: Refuse, part: str = 'bbox') -> None:
    """Raise unless the heads can score (``'mask'``: and segment) any proposals."""
    roi_head = getattr(model, 'roi_head', None)
    for name in ('bbox_roi_extractor', 'bbox_head', '_bbox_forward'):
        if not hasattr(roi_head, name):
            raise refuse(model, f'it has no `roi_head.{name}`')
    kind = type(roi_head).__name__
    if is_sparse(model):
        raise refuse(
            model,
            f'the bbox heads of its {kind} score only its own learned proposals, not '
            'those of another model (mmdist.QueryLogits compares it)',
        )
    if part == 'bbox':
        return
    if getattr(roi_head, 'mask_head', None) is None:
        raise refuse(model, 'it has no `roi_head.mask_head`')
    if type(roi_head)._mask_forward.__qualname__ not in MASK_FORWARDS:
        needs = 'needs more than features and proposals'
        raise refuse(model, f'the mask head of its {kind} {needs}')
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


def modules(model: nn.Module, refuse: Refuse, part: str = 'bbox') -> list[nn.Module]:
    """The extractors and heads of all stages."""
    check(model, refuse, part)
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
        if part == 'mask':
            recorded.append(Proposals(stage, rois, call.output))
        else:
            logits, deltas = call.output[:2]
            recorded.append(Proposals(stage, rois, _per_class(head, logits), deltas))
    return recorded


def places(step: Step) -> list[Places]:
    """The student's proposals, stage by stage."""
    found = []
    for stage, rois, logits, _ in record(step):
        scores = foreground(step.classes.select_student(logits), 'softmax')
        # CrowdDet predicts several times per proposal, TridentNet in several branches
        rois = rois.repeat_interleave(len(scores) // max(len(rois), 1), 0)
        images = rois[:, 0] % len(step.data_samples)
        boxes, term = rois[:, 1:], term_of(step.student, stage)
        found.append(Places(scores, boxes, images, **term))
    return found


def _per_class(head: nn.Module, logits: Tensor) -> Tensor:
    """Convert what a bbox head returned, (rois, columns), to logits of a softmax."""
    if hasattr(head, 'num_instance'):  # CrowdDet: several predictions per proposal
        logits = logits.unflatten(1, (head.num_instance, -1)).flatten(0, 1)
    if getattr(head, 'custom_activation', False):
        # Seesaw loss has a separate objectness. Log-probabilities are logits as well.
        scores = head.loss_cls.get_activation(logits.float())
        return scores.clamp(min=torch.finfo(scores.dtype).tiny).log()
    return logits


# ---- the teacher's outputs for them ----------------------------------------------


def check_stage(teacher: nn.Module, stage: int | str | None) -> None:
    """Raise ValueError unless the teacher has the stage that a comparison wants."""
    number = len(stages(teacher))
    if isinstance(stage, int) and not -number <= stage < number:
        raise ValueError(
            f'stage={stage} of the teacher is out of range: its {name_of(teacher)} has '
            f'{number} stage(s). Set `stage` to 0 to {number - 1}, or omit it.'
        )


def judge(
    step: Step, recorded: list[Proposals], stage: int | str | None, part: str = 'bbox'
) -> list[Judged]:
    """What the teacher's heads say about proposals, computed once per step.

    Args:
        step: The step.
        recorded: What :func:`record` returned for ``part``, ``'bbox'`` or ``'mask'``.
        stage: The stage of a cascade to ask; all for ``'mean'``; for None that of the
            student, or the last one if the teacher has fewer.
        part: For ``'mask'``, the mask head is asked too.
    """
    key = f'{part} proposals, stage {stage}'
    return step.shared(key, lambda: _judge(step, recorded, stage, part))


def _judge(
    step: Step, recorded: list[Proposals], stage: int | str | None, part: str
) -> list[Judged]:
    teacher, features = step.teacher_model, step.teacher_features
    roi_head, heads = teacher.roi_head, [head for _, head in stages(teacher)]
    context = {}
    if getattr(roi_head, 'with_semantic', False):  # HTC, SCNet
        context['semantic_feat'] = roi_head.semantic_head(features)[1]
    if getattr(roi_head, 'with_glbctx', False):  # SCNet
        context['glbctx_feat'] = roi_head.glbctx_head(features)[1]
    judged = []
    for proposals in recorded:
        if not is_cascade(teacher):
            asked = [0]
        elif stage == 'mean':
            asked = range(len(heads))
        else:
            asked = [min(proposals.stage, len(heads) - 1) if stage is None else stage]
        # TridentNet trains on a copy of the batch per branch, but tests on one copy
        rois = proposals.rois.clone()
        rois[:, 0] %= len(features[0])
        results = []
        for last in asked:
            which = [last] if is_cascade(teacher) else []
            results.append(roi_head._bbox_forward(*which, features, rois, **context))
        logits = torch.stack([x['cls_score'] for x in results]).mean(0)
        answer = last, _per_class(heads[last], logits), results[-1]['bbox_pred']
        if part == 'mask':
            which = [last] if isinstance(roi_head.mask_head, nn.ModuleList) else []
            masks = roi_head._mask_forward(*which, features, rois)['mask_preds']
            answer = *answer, masks
        judged.append(Judged(*answer))
    return judged


def of_class(values: Tensor, classes: Tensor) -> Tensor:
    """The values of each row's class: (rows, ...) of (rows, classes or 1, ...)."""
    if values.shape[1] == 1:  # class-agnostic
        return values[:, 0]
    return values[torch.arange(len(values), device=values.device), classes]
