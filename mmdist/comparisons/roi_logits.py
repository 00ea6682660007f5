"""Class logits of the proposals of a two-stage detector."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mmdist.registry import MODELS
from mmdist.step import Step

from .base import Comparison, Pair
from .sparse_queries import is_sparse, sampled_rois


class Proposals(NamedTuple):
    """What one stage of the student's RoI head was given and what it returned."""

    stage: int
    rois: Tensor  # (rois, 5), the image's index in the batch and the box
    logits: Tensor  # (rois, classes + background), as the bbox head returned them
    deltas: Tensor | None = None  # (rois, 4) or (rois, 4 * classes), likewise


class Judged(NamedTuple):
    """What one stage of the teacher says of proposals."""

    stage: int
    logits: Tensor  # (rois, classes + background)
    deltas: Tensor  # (rois, 4) or (rois, 4 * classes)


@MODELS.register_module()
class RoILogits(Comparison):
    """Compare the class logits of the same proposals, background last.

    The proposals are the student's, the very ones that it sampled for its own loss
    (ground truth added included). They go through the teacher's extractor and bbox
    head; neither its RPN nor any other part of its RoI head runs, but for the semantic
    and the global context features that HTC and SCNet feed to their bbox heads.

    A student that is a cascade gives one term per stage, ``loss_<name>_s0`` and so on,
    with the weights of its own stages (``stage_loss_weights``).

    Args:
        loss: Config of the loss; ``mmdist.DISTLoss`` with softmax if omitted.
        stage: The stage of a cascade teacher to ask, an int (0 is published), or
            ``'mean'``: the mean of the logits of all stages, as at inference, except
            that each stage sees the same, unrefined proposals. If omitted, it is the
            stage with the number of the student's, so 0 for a student of one stage.
        background: False leaves the background's column out; softmax is then over the
            classes alone.
    """

    families = (
        'the two-stage detectors of mmdet whose RoI head has an extractor and a bbox '
        'head: Faster, Mask and Cascade R-CNN and what is derived from them'
    )

    def __init__(
        self,
        loss: dict | None = None,
        stage: int | str | None = None,
        background: bool = True,
    ) -> None:
        super().__init__(loss)
        if not (stage is None or stage == 'mean' or isinstance(stage, int)):
            raise ValueError(f"`stage` is an int, 'mean' or None, got {stage!r}.")
        self.stage = stage
        self.background = background

    def student_modules(self, student: nn.Module) -> Sequence[nn.Module]:
        """The extractors and bbox heads of all stages."""
        roi_head = self._roi_head(student)
        return [
            *stages_of(roi_head.bbox_roi_extractor),
            *stages_of(roi_head.bbox_head),
        ]

    def check_pair(self, student: nn.Module, teacher: nn.Module) -> None:
        """The teacher must be a two-stage detector with the wanted stage."""
        num_stages = len(stages_of(self._roi_head(teacher).bbox_head))
        if isinstance(self.stage, int) and not -num_stages <= self.stage < num_stages:
            raise ValueError(
                f'RoILogits asks for stage={self.stage} of the teacher, but its '
                f'{type(teacher).__name__} has {num_stages} stage(s). Give one of '
                "0, 1, ..., or 'mean'."
            )

    def record(self, step: Step) -> list[Proposals]:
        """The sampled proposals and their logits, for each stage."""
        roi_head = self._roi_head(step.student)
        recorded = []
        for stage, (extractor, head) in enumerate(
            zip(
                stages_of(roi_head.bbox_roi_extractor),
                stages_of(roi_head.bbox_head),
                strict=True,
            )
        ):
            if stage > 0 and not step.has_run(head):
                # A cascade stops where no proposal is left. All processes must call
                # the loss equally often (`sync`), so here with no rows.
                none = (x[:0] for x in recorded[-1][1:])
                recorded.append(Proposals(stage, *none))
                continue
            # Samplers that look for hard examples call the head before the loss does.
            said = step.calls(head)[-1]
            rois = sampled_rois(step.call_before(extractor, said))
            recorded.append(Proposals(stage, rois, *said.output[:2]))
        return recorded

    def ask(self, step: Step, recorded: list[Proposals]) -> list[Tensor]:
        """The teacher's logits of the same proposals, (rois, classes + background)."""
        return [mean_logits(judged) for judged in self.judge_once(step, recorded)]

    def judge_once(self, step: Step, recorded: list[Proposals]) -> list[list[Judged]]:
        """As :meth:`judge`, of the student's own proposals, once a step."""
        return step.shared(
            f'proposals, stage {self.stage}', lambda: self.judge(step, recorded)
        )

    def judge(self, step: Step, recorded: list[Proposals]) -> list[list[Judged]]:
        """What the teacher's RoI head says of proposals, of each stage that is asked.

        Args:
            step: The step.
            recorded: Any boxes; their logits are not read.
        """
        roi_head, features = step.teacher_model.roi_head, step.teacher_features
        context = {}
        if getattr(roi_head, 'with_semantic', False):  # HTC, SCNet
            context['semantic_feat'] = roi_head.semantic_head(features)[1]
        if getattr(roi_head, 'with_glbctx', False):  # SCNet
            context['glbctx_feat'] = roi_head.glbctx_head(features)[1]
        num_stages = len(stages_of(roi_head.bbox_head))
        cascade = isinstance(roi_head.bbox_head, nn.ModuleList)
        judged = []
        for proposals in recorded:
            if not cascade:
                stages = [0]
            elif self.stage == 'mean':
                stages = range(num_stages)
            elif self.stage is None:
                stages = [min(proposals.stage, num_stages - 1)]
            else:
                stages = [self.stage]
            rois = self._rois(step, proposals.rois)
            said = []
            for stage in stages:
                which = [stage] if cascade else []
                results = roi_head._bbox_forward(*which, features, rois, **context)
                said.append(Judged(stage, results['cls_score'], results['bbox_pred']))
            judged.append(said)
        return judged

    def pair(
        self, step: Step, recorded: list[Proposals], asked: list[Tensor]
    ) -> list[Pair]:
        """One pair per stage of the student, a row per proposal."""
        student_head = self._roi_head(step.student)
        cascade = isinstance(student_head.bbox_head, nn.ModuleList)
        pairs = []
        for (stage, _, student, _), teacher in zip(recorded, asked, strict=True):
            student, teacher = step.classes.select(
                self.per_class(step.student, stage, student),
                self.per_class(step.teacher_model, -1, teacher),
            )
            if not self.background:
                student, teacher = student[:, :-1], teacher[:, :-1]
            weight = student_head.stage_loss_weights[stage] if cascade else 1.0
            name = f's{stage}' if cascade else ''
            pairs.append(Pair(student, teacher, None, weight, name))
        return pairs

    def per_class(self, model: nn.Module, stage: int, logits: Tensor) -> Tensor:
        """Logits whose softmax is the probabilities of the classes and the background.

        Args:
            model: The detector whose bbox head returned them.
            stage: Of a cascade.
            logits: (rois, columns), as the bbox head returned them.
        """
        return _per_class(stages_of(model.roi_head.bbox_head)[stage], logits)

    @staticmethod
    def _rois(step: Step, rois: Tensor) -> Tensor:
        """The proposals with indices of images in the teacher's batch.

        TridentNet trains on one copy of the batch per branch, and tests on one copy.
        """
        num_images = len(step.teacher_features[0])
        return torch.cat([rois[:, :1] % num_images, rois[:, 1:]], dim=1)

    def _roi_head(self, model: nn.Module) -> nn.Module:
        roi_head = getattr(model, 'roi_head', None)
        for part in ('bbox_roi_extractor', 'bbox_head', '_bbox_forward'):
            if not hasattr(roi_head, part):
                raise self.unsupported(model, f'it has no `roi_head.{part}`')
        if is_sparse(model):
            raise self.unsupported(
                model,
                'the bbox heads of its SparseRoIHead need the features of its own '
                'learned proposals, so no other model can be asked about them '
                '(mmdist.QueryLogits compares it)',
            )
        return roi_head


def mean_logits(judged: list[Judged]) -> Tensor:
    """The mean over the stages that were asked."""
    return torch.stack([said.logits for said in judged]).mean(0)


def stages_of(module: nn.Module) -> Sequence[nn.Module]:
    """The stages of a cascade, or the single stage in a list."""
    return module if isinstance(module, nn.ModuleList) else [module]


def _per_class(head: nn.Module, logits: Tensor) -> Tensor:
    """Logits whose softmax are the probabilities of the classes and the background."""
    if hasattr(head, 'num_instance'):  # CrowdDet: several predictions per proposal
        logits = logits.unflatten(1, (head.num_instance, -1)).flatten(0, 1)
    if getattr(head, 'custom_activation', False):
        # Seesaw loss: objectness comes apart. Log-probabilities are logits as well.
        scores = head.loss_cls.get_activation(logits.float())
        return scores.clamp(min=torch.finfo(scores.dtype).tiny).log()
    return logits
