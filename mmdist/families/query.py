"""Detectors with object queries: DETRs, and Sparse R-CNN's learned proposals."""

from __future__ import annotations

import torch
from mmengine.structures import InstanceData
from torch import Tensor, nn

from mmdist.families import Places, Refuse, name_of, unreadable
from mmdist.families.probabilities import foreground
from mmdist.families.roi import is_sparse, sampled_rois, stages
from mmdist.step import Step

ASSIGNED = 'one to one'

# Per decoder layer (or stage), per image: `scores`, logits (queries, classes), and
# `bboxes`, (queries, 4), x1 y1 x2 y2 in pixels; the form that mmdet's match costs take.
Queries = list[list[InstanceData]]


def head_of(model: nn.Module, refuse: Refuse = unreadable) -> nn.Module:
    """The head of the last decoder layer or stage; its classes are a fixed list."""
    if is_sparse(model):
        return model.roi_head.bbox_head[-1]
    if not hasattr(model, 'forward_transformer'):
        raise refuse(model, 'it has no `forward_transformer`')
    if hasattr(model, 'language_model'):
        raise refuse(model, 'it scores the words of a prompt, not a list of classes')
    return model.bbox_head


def modules(model: nn.Module, refuse: Refuse) -> list[nn.Module]:
    """The modules whose calls :func:`record` reads; the last is the head."""
    head = head_of(model, refuse)
    if not is_sparse(model):
        return [head]
    return [module for stage in stages(model) for module in stage]


def activation_of(model: nn.Module) -> str:
    """What turns the scores of the queries into probabilities."""
    return 'sigmoid' if head_of(model).loss_cls.use_sigmoid else 'softmax'


def check_same_activation(student: nn.Module, teacher: nn.Module) -> None:
    """Raise ValueError if the scores of two models are of different kinds."""
    kinds = {'sigmoid': 'a sigmoid per class', 'softmax': 'a softmax with background'}
    ours, theirs = (kinds[activation_of(model)] for model in (student, teacher))
    if ours != theirs:
        raise ValueError(
            f'The head of the student ({name_of(student)}) has {ours}, that of the '
            f'teacher ({name_of(teacher)}) {theirs}. Use a teacher with the same '
            '`bbox_head.loss_cls.use_sigmoid`.'
        )


def record(step: Step) -> Queries:
    """The student's matching queries, from its own loss pass."""
    if is_sparse(step.student):
        return _record_sparse(step)
    output = step.calls(head_of(step.student))[-1].output
    return _of_detr(step.student, output, step)


def ask(step: Step) -> Queries:
    """The teacher's queries, from transformer and head on its features, once a step."""

    def run() -> Queries:
        teacher = step.teacher_model
        if is_sparse(teacher):
            return _ask_sparse(step)
        inputs = teacher.forward_transformer(step.teacher_features, step.data_samples)
        return _of_detr(teacher, teacher.bbox_head.forward(**inputs), step)

    return step.shared('queries', run)


def places(step: Step) -> list[Places]:
    """The student's queries of the last decoder layer, as one term."""
    activation, images = activation_of(step.student), record(step)[-1]
    logits = torch.cat([x.scores for x in images])
    scores = step.classes.select_student(logits, 1, activation)
    boxes = torch.cat([x.bboxes.detach().float() for x in images])
    index = [torch.full_like(x.bboxes[:, 0], i) for i, x in enumerate(images)]
    return [Places(foreground(scores, activation), boxes, torch.cat(index))]


def _of_detr(model: nn.Module, output: tuple[Tensor, Tensor], step: Step) -> Queries:
    """Keep the queries that the model matches in training and predicts with.

    The model has just run, and its head returned class logits, (layers, N, queries,
    classes), and boxes, (layers, N, queries, 4), cx cy w h relative to the image.
    """
    from mmdet.structures.bbox import bbox_cxcywh_to_xyxy

    logits, boxes = output
    # In training, the queries are [denoising | matching | dense (DDQ only)].
    cache = getattr(model, 'cache_dict', {})
    end = logits.size(2)
    if model.training:
        end -= cache.get('num_dense_queries', 0)
    patterns = getattr(model, 'num_patterns', 0) or 1  # DAB-DETR: content queries
    matching = slice(end - model.num_queries * patterns, end)
    distinct = cache.get('distinct_query_mask', [])  # DDQ, from its second layer on
    logits, boxes = logits[:, :, matching], bbox_cxcywh_to_xyxy(boxes[:, :, matching])
    layers = []
    for layer in range(len(logits)):
        images = []
        for i, sample in enumerate(step.data_samples):
            height, width = sample.metainfo['img_shape'][:2]
            bboxes = boxes[layer, i]
            bboxes = bboxes * bboxes.new_tensor([width, height, width, height])
            queries = InstanceData(scores=logits[layer, i], bboxes=bboxes)
            if distinct and layer:
                # As DDQDETRHead reads it: one mask per image and attention head.
                queries = queries[distinct[layer - 1][i * cache['num_heads']][0]]
            images.append(queries)
        layers.append(images)
    return layers


def _record_sparse(step: Step) -> Queries:
    """The student's proposals as refined by each stage."""
    recorded = []
    for extractor, head in stages(step.student):
        call = step.calls(head)[-1]
        rois = sampled_rois(step.call_before(extractor, call))
        rois = rois.view(len(step.inputs), -1, 5)[..., 1:]
        images = []
        for i, sample in enumerate(step.data_samples):
            logits, deltas = call.output[0][i], call.output[1][i]
            bboxes = head.bbox_coder.decode(rois[i], deltas, sample.img_shape)
            images.append(InstanceData(scores=logits, bboxes=bboxes))
        recorded.append(images)
    return recorded


def _ask_sparse(step: Step) -> Queries:
    """The teacher's proposals, as in :func:`_record_sparse`, without masks."""
    from mmdet.structures.bbox import bbox2roi

    features, roi_head = step.teacher_features, step.teacher_model.roi_head
    img_metas = [sample.metainfo for sample in step.data_samples]
    proposals = step.teacher_model.rpn_head.predict(features, step.data_samples)
    bboxes = [p.bboxes for p in proposals]
    object_features = torch.stack([p.features for p in proposals])
    asked = []
    for stage in range(roi_head.num_stages):
        results = roi_head._bbox_forward(
            stage, features, bbox2roi(bboxes), object_features, img_metas
        )
        object_features = results['object_feats']
        bboxes = results['detached_proposals']
        both = zip(results['cls_score'], bboxes, strict=True)
        asked.append([InstanceData(scores=s, bboxes=boxes) for s, boxes in both])
    return asked
