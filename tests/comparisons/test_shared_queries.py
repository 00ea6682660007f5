"""QueryLogits(shared=True), against mmdet's own student fed with other queries."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from builders import slow
from common import corners, correlations, overlaps
from mmengine.config import Config
from mmengine.logging import MessageHub
from scipy.special import expit, softmax
from test_query_logits import batch, build, det_scope, tiny

from mmdist.balance import Balance

assert det_scope  # a fixture of this file, too

SIZES = ((96, 128), (96, 100))
INITIAL = ('query', 'query_pos', 'reference_points')


def shared(**options) -> dict:
    return dict(q=dict(type='mmdist.QueryLogits', shared=True, **options))


def answers(model, data: dict, project=lambda x: x) -> list[tuple]:
    """What teacher and student say of the teacher's queries, by mmdet alone.

    A layer each: ((logits, boxes) of the student, of the teacher), per image.
    """
    guest, samples = model.teacher, data['data_samples']
    inputs = guest.renormalize(data['inputs'], [s.img_shape for s in samples])
    given = {}

    def see(module, args, kwargs):
        given.update({k: project(v) for k, v in kwargs.items() if k in INITIAL})

    handle = guest.model.decoder.register_forward_pre_hook(see, with_kwargs=True)
    own = model.pre_decoder

    def pre_decoder(*args, **kwargs):
        decoder_inputs, head_inputs = own(*args, **kwargs)
        return decoder_inputs | given, head_inputs

    with torch.no_grad():
        theirs = guest.model(inputs, samples, mode='tensor')
        handle.remove()
        model.eval()
        model.pre_decoder = pre_decoder
        ours = model(data['inputs'], samples, mode='tensor')
        del model.pre_decoder
        model.train()
    return [tuple(x.double().numpy() for x in side) for side in (ours, theirs)]


def expected(ours: tuple, theirs: tuple, sigmoid: bool, min_score: float = 0.0):
    """Of a layer: (inter, intra), and the boxes' 5 L1 + 2 (1 - GIoU)."""
    prob = expit if sigmoid else lambda x: softmax(x, -1)
    p, q = prob(ours[0]), prob(theirs[0])
    best = (q if sigmoid else q[..., :-1]).max(-1)
    keep = best >= min_score
    weight = best * keep
    l1 = np.abs(ours[1] - theirs[1]).sum(-1)
    giou = np.stack(
        [
            np.diag(overlaps(corners(a) * size, corners(b) * size, generalized=True))
            for a, b, size in zip(
                ours[1], theirs[1], [(w, h, w, h) for h, w in SIZES], strict=True
            )
        ]
    )
    boxes = (weight * (5 * l1 + 2 * (1 - giou))).sum() / weight.sum()
    return correlations(p[keep], q[keep]), boxes


@pytest.mark.parametrize(
    'family',
    ['dino', *slow(['detr', 'conditional', 'dab', 'deformable', 'two-stage'])],
)
def test_rows_are_the_teachers_queries_in_every_layer(family):
    model = build(tiny(family, queries=10), tiny(family, queries=7), shared())
    data = batch(model)
    losses = model(**data, mode='loss')
    ours, theirs = answers(model, data)
    assert ours[0].shape[:3] == (2, 2, 7)
    layers = [
        expected(*([x[i] for x in side] for side in (ours, theirs)), family != 'detr')
        for i in range(2)
    ]
    relations = np.mean([relations for relations, _ in layers], 0)
    found = [losses[key].item() for key in ('q_inter', 'q_intra')]
    assert found == pytest.approx(relations, abs=2e-4)
    assert losses['loss_q'].item() == pytest.approx(4 - 2 * sum(relations), abs=1e-3)
    boxes = sum(boxes for _, boxes in layers)
    assert losses['loss_q_box'].item() == pytest.approx(boxes, rel=1e-4)

    (losses['loss_q'] + losses['loss_q_box']).backward()
    for part in (model.backbone.layer4[0].conv1, model.decoder.layers[0].ffn.layers[1]):
        assert part.weight.grad.abs().sum() > 0
    assert all(p.grad is None for p in model.teacher.model.parameters())


def test_a_teacher_in_half_precision():
    model = build(tiny('dino'), tiny('dino', queries=7), shared())
    expected = model(**batch(model), mode='loss')
    model.teacher.dtype = torch.bfloat16
    model.teacher.model.bfloat16()
    losses = model(**batch(model), mode='loss')
    for key in ('loss_q', 'loss_q_box'):
        assert losses[key].dtype == torch.float32
        assert losses[key].item() == pytest.approx(expected[key].item(), rel=0.1)
    (losses['loss_q'] + losses['loss_q_box']).backward()


def test_the_students_own_losses_are_those_without_distillation():
    model = build(tiny('dino'), tiny('dino', queries=7), shared())
    data = batch(model)
    torch.manual_seed(0)
    losses = model(**data, mode='loss')
    torch.manual_seed(0)
    own = model.student_class.loss(model, data['inputs'], data['data_samples'])
    for key, value in own.items():
        assert torch.equal(losses[key], value), key


def test_min_score_and_the_last_layer_alone():
    def of(min_score):
        model = build(tiny('dino'), tiny('dino', layers=3), distill(min_score))
        data = batch(model)
        return model(**data, mode='loss'), answers(model, data)

    def distill(min_score):
        return shared(layers='last', min_score=min_score)

    _, (_, theirs) = of(0.0)
    scores = np.sort(expit(theirs[0][-1]).max(-1).ravel())
    threshold = float((scores[11] + scores[12]) / 2)  # 8 of 20 are left
    losses, (ours, theirs) = of(threshold)
    last = ([x[-1] for x in side] for side in (ours, theirs))
    relations, boxes = expected(*last, True, threshold)
    found = [losses[key].item() for key in ('q_inter', 'q_intra', 'loss_q_box')]
    assert found == pytest.approx([*relations, boxes], abs=2e-4)
    losses, _ = of(0.999)
    assert losses['loss_q'].item() == losses['loss_q_box'].item() == 0
    (losses['loss_q'] + losses['loss_q_box']).backward()


def test_a_teacher_of_another_width_is_projected():
    teacher = tiny('detr', queries=7)
    for cfg in (teacher['encoder'], teacher['decoder']):
        layer = cfg['layer_cfg']
        for part in layer.values():
            if 'embed_dims' in part:
                part['embed_dims'] = 128
    teacher['positional_encoding']['num_feats'] = 64
    teacher['bbox_head']['embed_dims'] = 128
    teacher['neck']['out_channels'] = 128
    with pytest.raises(ValueError, match='Set `teacher_embed_dims=128`'):
        build(tiny('detr'), teacher, shared())
    torch.manual_seed(0)
    model = build(tiny('detr'), teacher, shared(teacher_embed_dims=128))
    torch.manual_seed(0)
    matched = build(tiny('detr'), teacher)
    for (name, one), other in zip(
        matched.named_parameters(), model.parameters(), strict=False
    ):  # of the student, which come first
        assert torch.equal(one, other), name
    data = batch(model)
    losses = model(**data, mode='loss')
    projection = model.distill['q'].projection
    ours, theirs = answers(model, data, projection)
    layers = [
        expected(*([x[i] for x in side] for side in (ours, theirs)), False)
        for i in range(2)
    ]
    boxes = sum(boxes for _, boxes in layers)
    assert losses['loss_q_box'].item() == pytest.approx(boxes, rel=1e-4)
    sum(losses[key] for key in ('loss_q', 'loss_q_box')).backward()
    assert projection.weight.grad.abs().sum() > 0


def test_classes_are_matched_by_name():
    """A student of three classes learns from a teacher of five, in another order."""
    data_of_teacher = dict(metainfo=dict(classes=('ant', 'bee', 'cow', 'dog', 'elk')))
    teacher = Config(
        dict(
            model=tiny('dino', queries=7),
            train_dataloader=dict(dataset=data_of_teacher),
        )
    )
    model = build(tiny('dino', num_classes=3), teacher, shared(layers='last'))
    MessageHub.get_current_instance().update_info(
        'dataset_meta', dict(classes=('dog', 'ant', 'cow'))
    )
    data = batch(model)
    losses = model(**data, mode='loss')
    ours, (logits, boxes) = answers(model, data)
    theirs = logits[..., [3, 0, 2]], boxes
    relations, found = expected(*([x[-1] for x in s] for s in (ours, theirs)), True)
    values = [losses[key].item() for key in ('q_inter', 'q_intra', 'loss_q_box')]
    assert values == pytest.approx([*relations, found], abs=2e-4)


@pytest.mark.parametrize(
    'student, teacher, words',
    [
        ('ddq', 'ddq', 'DDQDETR: it chooses queries between its decoder layers'),
        ('dino', 'deformable', 'a DinoTransformerDecoder in two stages, the teacher'),
        ('deformable', 'two-stage', 'TransformerDecoder in two stages'),
    ],
)
def test_decoders_that_start_from_other_queries_are_refused(student, teacher, words):
    with pytest.raises(ValueError, match=words):
        build(tiny(student), tiny(teacher), shared())


def test_its_gradient_is_bounded_by_that_of_the_labels():
    """Beside the student's own queries, at the outputs of its head."""
    norms = {}
    for balance in (0.01, None):
        torch.manual_seed(0)
        model = build(tiny('dino'), tiny('dino', queries=7), shared())
        model.balance = balance and Balance(balance)
        for _ in range(2):
            model.zero_grad()
            losses = model(**batch(model), mode='loss')
            distilled = losses['loss_q'] + losses['loss_q_box']
            own = [v for k, v in losses.items() if 'loss' in k and 'loss_q' not in k]
            sum(own).backward(retain_graph=True)
            before = model.decoder.layers[0].ffn.layers[1].weight.grad.clone()
            distilled.backward()
        grad = model.decoder.layers[0].ffn.layers[1].weight.grad - before
        norms[balance] = grad.norm().item()
    assert 0 < norms[0.01] < 0.2 * norms[None]
