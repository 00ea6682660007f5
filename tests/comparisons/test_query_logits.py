"""QueryLogits on the six DETR families, against a matching computed in numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from builders import Seen, assert_learns, build_distiller, slow, without_dropout
from det_zoo import FAMILIES as ZOO
from det_zoo import batch, model_config
from mmengine.config import Config
from mmengine.logging import MessageHub
from mmengine.registry import init_default_scope
from oracles import assert_terms, corners, correlations, overlaps
from scipy.optimize import linear_sum_assignment
from scipy.special import expit, softmax
from scipy.stats import pearsonr

from mmdist.record import Recorder
from mmdist.registry import MODELS

FAMILIES = {
    'detr': 'detr/detr_r50_8xb2-150e_coco',
    'conditional': 'conditional_detr/conditional-detr_r50_8xb2-50e_coco',
    'dab': 'dab_detr/dab-detr_r50_8xb2-50e_coco',
    'deformable': 'deformable_detr/deformable-detr_r50_16xb2-50e_coco',
    'two-stage': 'deformable_detr/deformable-detr-refine-twostage_r50_16xb2-50e_coco',
    'dino': 'dino/dino-4scale_r50_8xb2-12e_coco',
    'ddq': 'ddq/ddq-detr-4scale_r50_8xb2-12e_coco',
}
SIZES = ((96, 128), (96, 100))  # the second image is padded


@pytest.fixture(autouse=True)
def det_scope():
    init_default_scope('mmdet')


def tiny(family: str, queries: int = 10, layers: int = 2, num_classes: int = 5) -> dict:
    """The family's own config, small, but 256 wide, as mmdet partly hard-codes it."""

    def shrink(cfg):
        if isinstance(cfg, (list, tuple)):
            return type(cfg)(map(shrink, cfg))
        if not isinstance(cfg, dict):
            return cfg
        small = dict(
            num_layers=layers,
            num_queries=queries,
            feedforward_channels=32,
            num_dn_queries=4,
            init_cfg=None,
        )
        return {key: small.get(key, shrink(value)) for key, value in cfg.items()}

    path = f'mmdet::{FAMILIES[family]}.py'
    cfg = shrink(Config.fromstring(f'_base_ = {path!r}', '.py').model.to_dict())
    cfg['backbone'].update(depth=18, base_channels=8)
    levels = len(cfg['backbone']['out_indices'])
    cfg['neck']['in_channels'] = [16, 32, 64][-levels:]
    cfg['bbox_head']['num_classes'] = num_classes
    return cfg


def build(student: dict, teacher: dict, distill: dict | None = None):
    """A distilled model with random, but not degenerate, weights on both sides."""
    teacher = dict(config=teacher, allow_random=True)
    model = build_distiller(student, teacher=teacher, distill=distill)
    for side in (model, model.teacher.model):
        # As initialised, all boxes coincide and all classes score 0.01.
        for name, parameter in side.named_parameters():
            parameter.data += 0.05 * torch.randn_like(parameter)
            if 'cls' in name and name.endswith('bias'):
                parameter.data.zero_()
            elif 'query_embedding' in name:
                parameter.data *= 10
        without_dropout(side)
    return model


def step(model) -> tuple[dict, list]:
    """Run one loss pass; return its losses and the outputs of both heads as numpy."""
    data, guest = batch(model, SIZES), model.teacher
    with Recorder([model.bbox_head]) as recorder:
        losses = model(**data, mode='loss')
    raw = [recorder.calls(model.bbox_head)[0].output]
    inputs = guest.renormalize(data['inputs'], SIZES)
    with torch.no_grad():
        raw.append(guest.model(inputs, data['data_samples'], mode='tensor'))
    return losses, [tuple(x.detach().double().numpy() for x in pair) for pair in raw]


# ---- the oracle: no code of mmdist or mmdet ----------------------------------------


def match(logits, boxes, teacher_logits, teacher_boxes, size, sigmoid):
    """Match by 2 L1 of class probabilities + 5 L1 of cx cy w h - 2 GIoU in pixels."""
    p, q = (expit(x) if sigmoid else softmax(x, 1) for x in (logits, teacher_logits))
    cls = np.abs(p[:, None] - q[None]).sum(-1)
    l1 = np.abs(boxes[:, None] - teacher_boxes[None]).sum(-1)
    scale = np.array([size[1], size[0]] * 2)
    both = corners(boxes) * scale, corners(teacher_boxes) * scale
    overlap = overlaps(*both, generalized=True)
    return linear_sum_assignment(2 * cls + 5 * l1 - 2 * overlap)


def matching_queries(family: str, output: tuple, queries: int, cache: dict) -> list:
    """Per image, the (logits, boxes) of the last layer that count."""
    logits, boxes = (x[-1] for x in output)
    total = logits.shape[1]
    images = []
    for i in range(len(logits)):
        end = total
        if family == 'ddq' and total > queries:  # trained: [denoising|matching|dense]
            end -= int(1.5 * queries)
        keep = np.arange(end - queries, end)
        if family == 'ddq':
            heads = len(cache['distinct_query_mask'][-1]) // len(logits)
            keep = keep[cache['distinct_query_mask'][-1][i * heads][0].numpy()]
        images.append((logits[i, keep], boxes[i, keep]))
    return images


def expected(student: list, teacher: list, sigmoid: bool = True):
    """Mean (inter, intra) correlations over the matched rows of all images."""
    rows = []
    for (ls, bs), (lt, bt), size in zip(student, teacher, SIZES, strict=True):
        of_student, of_teacher = match(ls, bs, lt, bt, size, sigmoid)
        rows.append((ls[of_student], lt[of_teacher]))
    s, t = (np.concatenate(side) for side in zip(*rows, strict=True))
    s, t = (expit(x) if sigmoid else softmax(x, 1) for x in (s, t))
    return correlations(s, t)


@pytest.mark.parametrize(
    'family',
    ['detr', 'dino', 'ddq', *slow(['dab', 'conditional', 'deformable', 'two-stage'])],
)
def test_rows_are_the_matched_queries(family):
    model = build(tiny(family, queries=10), tiny(family, queries=7))
    losses, (student, teacher) = step(model)
    caches = (getattr(m, 'cache_dict', {}) for m in (model, model.teacher.model))
    both = map(matching_queries, [family] * 2, (student, teacher), (10, 7), caches)
    assert_terms(losses, *expected(*both, sigmoid=family != 'detr'))

    losses['loss_dist'].backward()
    assert_learns(model.backbone)


def test_a_teacher_of_more_queries_is_matched_by_its_best():
    """DINO's best queries, as many as the student, a Deformable DETR, has."""
    model = build(tiny('deformable', queries=6), tiny('dino', queries=15))
    losses, (student, teacher) = step(model)
    best = []
    for ls, bs in matching_queries('dino', teacher, 15, {}):
        order = np.argsort(-ls.max(1))[:6]
        best.append((ls[order], bs[order]))
    ours = matching_queries('deformable', student, 6, {})
    assert_terms(losses, *expected(ours, best))


def test_every_layer_is_counted_from_the_last():
    """The student's two layers learn from the teacher's second and third of three."""
    student, teacher = tiny('dino', layers=2), tiny('dino', layers=3)
    model = build(
        student, teacher, dict(q=dict(type='mmdist.QueryLogits', layers='all'))
    )
    losses, (out_s, out_t) = step(model)
    correlations = []
    for layer in (-1, -2):
        last = [
            matching_queries('dino', tuple(x[layer:][:1] for x in out), 10, {})
            for out in (out_s, out_t)
        ]
        correlations.append(expected(*last))
    total = sum(2 - inter - intra for inter, intra in correlations)
    assert losses['loss_q'].item() == pytest.approx(total, abs=4e-4)
    mean = np.mean(correlations, axis=0)
    assert losses['q_inter'].item() == pytest.approx(mean[0], abs=1e-4)


def test_all_patterns_of_a_dab_detr_count():
    model = build({**tiny('dab'), 'num_patterns': 2}, tiny('dab'))
    losses, (student, teacher) = step(model)
    assert student[0].shape[2] == 20
    ours = matching_queries('dab', student, 20, {})
    theirs = matching_queries('dab', teacher, 10, {})
    assert_terms(losses, *expected(ours, theirs))


def test_min_score_leaves_out_unsure_queries_before_the_matching():
    def pair(min_score):
        distill = dict(q=dict(type='mmdist.QueryLogits', min_score=min_score))
        return build(tiny('dab'), tiny('dab'), distill)

    _, (_, (logits, _)) = step(pair(0.0))
    scores = np.sort(expit(logits[-1]).max(-1).ravel())
    threshold = float((scores[11] + scores[12]) / 2)  # 8 of 20 are left
    losses, (student, teacher) = step(pair(threshold))
    sure = []
    for ls, bs in matching_queries('dab', teacher, 10, {}):
        keep = expit(ls).max(1) >= threshold
        sure.append((ls[keep], bs[keep]))
    assert sum(len(ls) for ls, _ in sure) == 8
    relations = expected(matching_queries('dab', student, 10, {}), sure)
    assert_terms(losses, *relations, name='q')

    losses, _ = step(pair(0.999))
    assert losses['loss_q'].item() == 0  # no query is that sure
    losses['loss_q'].backward()


def test_classes_are_matched_by_name_and_the_others_are_background():
    """A DETR with three classes learns from one with five, in another order."""
    names = ('ant', 'bee', 'cow', 'dog', 'elk')
    teacher = Config(
        dict(
            model=tiny('detr', queries=7),
            train_dataloader=dict(dataset=dict(metainfo=dict(classes=names))),
        )
    )
    model = build(tiny('detr', num_classes=3), teacher)
    MessageHub.get_current_instance().update_info(
        'dataset_meta', dict(classes=('dog', 'ant', 'cow'))
    )
    losses, (student, teacher) = step(model)
    known = []
    for logits, boxes in matching_queries('detr', teacher, 7, {}):
        ant, bee, cow, dog, elk, background = softmax(logits, 1).T
        probabilities = np.stack([dog, ant, cow, background + bee + elk], 1)
        known.append((np.log(probabilities), boxes))
    ours = matching_queries('detr', student, 10, {})
    assert_terms(losses, *expected(ours, known, sigmoid=False))


def test_comparisons_share_one_run_of_the_teacher():
    kl = dict(type='mmdet.KnowledgeDistillationKLDivLoss', T=2)
    model = build(
        tiny('deformable'),
        tiny('deformable'),
        dict(
            q=dict(type='mmdist.QueryLogits'),
            all=dict(type='mmdist.QueryLogits', layers='all'),
            kl=dict(type='mmdist.QueryLogits', loss=kl),
        ),
    )
    parts = ('backbone', 'encoder', 'decoder')
    seen = Seen(**{name: getattr(model.teacher.model, name) for name in parts})
    losses = model(**batch(model, SIZES), mode='loss')
    assert seen.calls == dict.fromkeys(parts, 1)
    assert {'loss_q', 'loss_all', 'loss_kl'} <= losses.keys()
    assert losses['loss_kl'].isfinite()


def test_match_costs_of_ones_own():
    """With the class cost alone, boxes do not matter."""
    cost = dict(type='mmdet.ClassificationCost')
    distill = dict(q=dict(type='mmdist.QueryLogits', match_costs=[cost]))
    model = build(tiny('detr'), tiny('detr'), distill)
    losses, (student, teacher) = step(model)
    rows = []
    for (ls, _), (lt, _) in zip(
        *(matching_queries('detr', out, 10, {}) for out in (student, teacher)),
        strict=True,
    ):
        gain = softmax(ls, 1)[:, lt[:, :-1].argmax(1)]
        of_student, of_teacher = linear_sum_assignment(gain, maximize=True)
        rows += zip(softmax(ls, 1)[of_student], softmax(lt, 1)[of_teacher], strict=True)
    assert losses['q_inter'].item() == pytest.approx(
        np.mean([pearsonr(s, t)[0] for s, t in rows]), abs=1e-4
    )


@pytest.mark.parametrize(
    ('student', 'message'),
    [
        (tiny('conditional'), r'ConditionalDETR.*sigmoid.*DETR.*softmax'),
        (model_config(ZOO['RetinaNet']), 'QueryLogits cannot compare a RetinaNet'),
    ],
)
def test_another_activation_and_another_family_are_refused(student, message):
    with pytest.raises(ValueError, match=message):
        build(student, tiny('detr'), dict(q=dict(type='mmdist.QueryLogits')))


def test_a_detector_that_reads_prompts_is_refused():
    """Grounding DINO, known by its language model; building a real one needs BERT."""
    model = MODELS.build(tiny('dino'))
    model.language_model = torch.nn.Identity()
    with pytest.raises(ValueError, match=r'DINO.*words of a prompt'):
        MODELS.build(dict(type='mmdist.QueryLogits')).student_modules(model)


def test_half_precision():
    model = build(tiny('dino'), tiny('dino'))
    with torch.autocast('cpu', dtype=torch.bfloat16):
        losses = model(**batch(model, SIZES), mode='loss')
    assert losses['loss_dist'].dtype == torch.float32
    assert 0 < losses['loss_dist'].item() < 4
