"""The queries of Sparse R-CNN and QueryInst: proposals that a cascade refines."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from mmengine.structures import InstanceData
from torch import Tensor, nn

from mmdist.lookup import is_a
from mmdist.record import Call
from mmdist.step import Step


def is_sparse(model: nn.Module) -> bool:
    """Whether the model's proposals are learned, as in Sparse R-CNN."""
    roi_head = getattr(model, 'roi_head', None)
    return is_a(roi_head, 'SparseRoIHead')


def sampled_rois(call: Call) -> Tensor:
    """The boxes that a RoI extractor was called with, (rois, 5), image index first."""
    return call.args[1] if len(call.args) > 1 else call.kwargs['rois']


def modules(model: nn.Module) -> Sequence[nn.Module]:
    """The modules whose calls :func:`record` reads."""
    return [*model.roi_head.bbox_roi_extractor, *model.roi_head.bbox_head]


def record(step: Step) -> list[list[InstanceData]]:
    """The student's queries in its own loss pass.

    Returns:
        Per stage, per image: ``scores``, class logits (queries, classes), and
        ``bboxes``, (queries, 4), x1 y1 x2 y2 in pixels, as the stage has refined them.
    """
    roi_head = step.student.roi_head
    stages = []
    for extractor, head in zip(
        roi_head.bbox_roi_extractor, roi_head.bbox_head, strict=True
    ):
        said = step.calls(head)[-1]
        given = sampled_rois(step.call_before(extractor, said))
        images = []
        for logits, deltas, rois, sample in zip(
            *said.output[:2],
            given.view(len(step.inputs), -1, 5),
            step.data_samples,
            strict=True,
        ):
            bboxes = head.bbox_coder.decode(
                rois[:, 1:], deltas, max_shape=sample.img_shape
            )
            images.append(InstanceData(scores=logits, bboxes=bboxes))
        stages.append(images)
    return stages


def ask(step: Step) -> list[list[InstanceData]]:
    """The teacher's queries, as :func:`record` gives them: its stages without masks."""
    from mmdet.structures.bbox import bbox2roi

    features, roi_head = step.teacher_features, step.teacher_model.roi_head
    img_metas = [sample.metainfo for sample in step.data_samples]
    proposals = step.teacher_model.rpn_head.predict(features, step.data_samples)
    bboxes = [p.bboxes for p in proposals]
    object_features = torch.stack([p.features for p in proposals])
    stages = []
    for stage in range(roi_head.num_stages):
        results = roi_head._bbox_forward(
            stage, features, bbox2roi(bboxes), object_features, img_metas
        )
        object_features = results['object_feats']
        bboxes = results['detached_proposals']
        stages.append(
            [
                InstanceData(scores=scores, bboxes=boxes)
                for scores, boxes in zip(results['cls_score'], bboxes, strict=True)
            ]
        )
    return stages
