"""SegLogits: both terms from raw outputs in numpy; masks, sizes, heads, classes."""

from __future__ import annotations

import copy
import warnings

import numpy as np
import pytest
import torch
from builders import assert_learns, build_distiller, slow
from det_zoo import FAMILIES, model_config
from mmdet.utils import register_all_modules
from mmengine.config import Config
from mmengine.logging import MessageHub
from mmengine.registry import init_default_scope
from oracles import correlations, dist, step
from scipy.special import expit, softmax
from scipy.stats import pearsonr
from segmentors import distilled, make_batch, zoo_model
from torch import nn

from mmdist.families.seg import SegMap, auxiliary_heads
from mmdist.record import Recorder
from mmdist.registry import MODELS
from mmdist.teachers import ClassMatch, match_classes

KL = dict(type='mmdet.KnowledgeDistillationKLDivLoss', T=1)
SIZE, VALID = (64, 96), (48, 56)  # of the batch, and of its second image


@pytest.fixture(autouse=True)
def scope():
    init_default_scope('mmseg')


@pytest.fixture
def pspnet() -> dict:
    """The student, with logits at 1/8 of the image size."""
    return zoo_model('pspnet/pspnet_r18-d8')


@pytest.fixture
def upernet() -> dict:
    """A teacher with logits at 1/4, and at 1/16 in its auxiliary head."""
    return zoo_model('upernet/upernet_r50')


@pytest.fixture
def mask2former() -> dict:
    return zoo_model('mask2former/mask2former_r50_8xb2-90k')


# ---- the oracle ------------------------------------------------------------------


def plain_student(model: nn.Module) -> nn.Module:
    plain = MODELS.build(model.plain)
    plain.load_state_dict(model.state_dict())
    return plain.train()


def raw_outputs(model: nn.Module, data: dict, seed: int = 0) -> tuple:
    """Outputs of the plain student in training: decode head, auxiliary head."""
    plain = plain_student(model)
    with torch.no_grad():
        torch.manual_seed(seed)  # of the dropout
        features = plain.extract_feat(data['inputs'])
        heads = [plain.decode_head]
        if plain.with_auxiliary_head:
            heads.append(plain.auxiliary_head)
        return tuple(head(features).double().numpy() for head in heads)


def bilinear(x: np.ndarray, size: tuple[int, int], align_corners: bool) -> np.ndarray:
    """Resize (N, C, h, w), one axis after the other."""
    for axis, new in zip((2, 3), size, strict=True):
        old = x.shape[axis]
        if align_corners:
            at = np.arange(new) * (old - 1) / (new - 1)
        else:
            at = np.clip((np.arange(new) + 0.5) * old / new - 0.5, 0, old - 1)
        low = np.minimum(at.astype(int), old - 2)
        share = (at - low).reshape([-1 if i == axis else 1 for i in range(4)])
        x = x.take(low, axis) * (1 - share) + x.take(low + 1, axis) * share
    return x


def rows_that_count(x: np.ndarray, data: dict | None) -> np.ndarray:
    """(N, C, h, w) -> (rows, C), without void and padded pixels."""
    _, c, h, w = x.shape
    rows = x.transpose(0, 2, 3, 1)
    if data is None:
        return rows.reshape(-1, c)
    height, width = data['inputs'].shape[-2:]
    i, j = np.arange(h) * height // h, np.arange(w) * width // w
    keep = []
    for sample in data['data_samples']:
        label = sample.gt_sem_seg.data[0].numpy()[np.ix_(i, j)]
        valid_h, valid_w = sample.img_shape
        inside = np.ix_(
            (np.arange(h) + 0.5) * height / h < valid_h,
            (np.arange(w) + 0.5) * width / w < valid_w,
        )
        valid = np.zeros((h, w), bool)
        valid[inside] = True
        keep.append((label != 255) & valid)
    return rows[np.stack(keep)]


def map_of_the_teacher(model: nn.Module, data: dict, size: tuple | None = None):
    """The rows of its logits that count, resized to ``size`` if given."""
    with torch.no_grad():
        logits = model.teacher.model(data['inputs']).double().numpy()
    return rows_that_count(bilinear(logits, size, False) if size else logits, data)


def loss_of(model: nn.Module, data: dict, seed: int = 0) -> dict:
    torch.manual_seed(seed)
    return model.loss(data['inputs'], copy.deepcopy(data['data_samples']))


def make_pair(student: dict, teacher: dict, **comparison) -> nn.Module:
    model = distilled(student, teacher, **comparison)
    model.plain = student
    # A random model's logits are nearly equal or enormous.
    for segmentor in (model, model.teacher.model):
        scale_logits(segmentor)
    return model.train()


def scale_logits(segmentor: nn.Module, std: float = 2.0) -> None:
    layers = [
        module
        for name, module in segmentor.named_modules()
        if name.endswith(('conv_seg', 'cls_embed'))
    ]

    def scale(layer, _, output):
        factor = std / output.std()
        for parameter in layer.parameters():
            parameter.mul_(factor)

    hooks = [layer.register_forward_hook(scale) for layer in layers]
    data = make_batch(segmentor.num_classes)
    with torch.no_grad():
        segmentor.eval().encode_decode(
            data['inputs'], [s.metainfo for s in data['data_samples']]
        )
        features = segmentor.extract_feat(data['inputs'])
        if segmentor.with_auxiliary_head and not isinstance(
            segmentor.auxiliary_head, nn.ModuleList
        ):
            segmentor.auxiliary_head(features)
    for hook in hooks:
        hook.remove()


# ---- per-pixel heads -------------------------------------------------------------


@pytest.mark.parametrize('align_corners', [False, True])
@pytest.mark.parametrize('ignore_mask', [True, False])
def test_both_terms_from_raw_outputs(pspnet, upernet, align_corners, ignore_mask):
    pspnet.decode_head.align_corners = align_corners
    model = make_pair(pspnet, upernet, ignore_mask=ignore_mask)
    data = make_batch(19, SIZE, VALID)
    raw = raw_outputs(model, data)
    losses = loss_of(model, data)

    teacher = model.teacher.model
    with torch.no_grad():
        features = teacher.extract_feat(data['inputs'])
        raw_teacher = (teacher.decode_head(features), teacher.auxiliary_head(features))
    for suffix, weight, ours, theirs, size in zip(
        ('', '_aux'), (1, 0.4), raw, raw_teacher, ((8, 12), (4, 6)), strict=True
    ):
        theirs = theirs.double().numpy()
        assert ours.shape[2:] != theirs.shape[2:]
        both = [
            softmax(
                rows_that_count(
                    bilinear(x, size, align_corners) if x.shape[2:] != size else x,
                    data if ignore_mask else None,
                ),
                axis=1,
            )
            for x in (ours, theirs)
        ]
        inter, intra = correlations(*both)
        keys = f'loss_dist{suffix}', f'dist{suffix}_inter', f'dist{suffix}_intra'
        assert [losses[key].item() for key in keys] == pytest.approx(
            [weight * (2 - inter - intra), inter, intra], rel=1e-4
        )


def test_images_without_a_label_give_zero(pspnet, upernet):
    model = make_pair(pspnet, upernet)
    data = make_batch(19)
    for sample in data['data_samples']:
        sample.gt_sem_seg.data.fill_(255)
    losses = loss_of(model, data)
    assert losses['loss_dist'] == 0
    assert losses['loss_dist_aux'] == 0
    (losses['loss_dist'] + losses['loss_dist_aux']).backward()
    assert not any(p.grad.any() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize('ignore_index', [0, None])
def test_the_heads_own_ignore_index(pspnet, ignore_index):
    dice = dict(type='DiceLoss')  # it also takes None
    pspnet.decode_head.update(ignore_index=ignore_index, loss_decode=dice)
    model = distilled(pspnet, pspnet, resize='label', aux_weight=0)
    data = make_batch(19)
    labels = torch.cat([s.gt_sem_seg.data for s in data['data_samples']])
    labels = labels.where(labels < 19, 0)
    for sample, label in zip(data['data_samples'], labels, strict=True):
        sample.gt_sem_seg.data = label[None]
    counts = labels != 0 if ignore_index == 0 else torch.ones_like(labels, dtype=bool)
    _, (pair,) = step(model, data)
    assert torch.equal(pair.mask, counts)


@pytest.mark.parametrize(
    ('resize', 'size'),
    [
        ('smaller', (8, 12)),
        ('student', (8, 12)),
        ('teacher', (16, 24)),
        ('label', SIZE),
    ],
)
def test_whose_size_is_compared(pspnet, upernet, resize, size):
    model = make_pair(pspnet, upernet, resize=resize, aux_weight=0)
    _, (pair,) = step(model, make_batch(19, SIZE))
    assert pair.student.shape == pair.teacher.shape == (2, 19, *size)
    assert pair.mask.shape == (2, *size)


@pytest.mark.parametrize(
    ('student', 'teacher', 'expected'),
    [
        ((8, 40), (9, 20), (9, 20)),  # not the one whose height is smaller
        ((40, 8), (20, 9), (20, 9)),
        ((8, 8), (16, 16), (8, 8)),
        ((6, 8), (8, 6), (6, 8)),  # equally many pixels: the student's
    ],
)
def test_the_smaller_map_is_the_one_with_fewer_pixels(student, teacher, expected):
    comparison = MODELS.build(dict(type='mmdist.SegLogits'))
    maps = [SegMap(torch.zeros(1, 2, *size)) for size in (student, teacher)]
    assert comparison._size(None, *maps) == expected


def test_the_classes_are_matched_by_name(pspnet):
    """Pixels where the teacher mostly sees unknown classes do not count."""
    names, more = ('dog', 'road', 'tree'), ('tree', 'car', 'sky', 'road', 'dog')
    student, teacher = copy.deepcopy(pspnet), copy.deepcopy(pspnet)
    for head in ('decode_head', 'auxiliary_head'):
        student[head].num_classes, teacher[head].num_classes = 3, 5
    dataset = dict(type='BaseSegDataset', metainfo=dict(classes=more))
    config = Config(dict(model=teacher, train_dataloader=dict(dataset=dataset)))
    model = make_pair(student, config)
    MessageHub.get_current_instance().update_info('dataset_meta', dict(classes=names))
    data = make_batch(3)
    (raw, _), losses = raw_outputs(model, data), loss_of(model, data)
    raw, theirs = rows_that_count(raw, data), map_of_the_teacher(model, data)
    known = softmax(theirs, axis=1)[:, [4, 3, 0]].sum(1) >= 0.5
    assert 0.1 < known.mean() < 0.9
    both = [softmax(x[known], axis=1) for x in (raw, theirs[:, [4, 3, 0]])]
    assert losses['loss_dist'].item() == pytest.approx(dist(*both), rel=1e-4)


def test_autocast_does_not_reach_the_loss(pspnet, mask2former):
    model = make_pair(pspnet, mask2former, resize='label')
    with torch.autocast('cpu', torch.bfloat16):
        losses = loss_of(model, make_batch(19))
    assert losses['loss_dist'].dtype == torch.float32
    assert losses['loss_dist'].isfinite()


# ---- which head, which output ----------------------------------------------------


def test_the_coarse_head_of_pointrend_is_compared(pspnet):
    pointrend = zoo_model('point_rend/pointrend_r50')
    model = make_pair(pointrend, pspnet)
    comparison = model.distill.dist
    assert comparison.student_modules(model) == [model.decode_head[0]]
    loss_of(model, make_batch(19))['loss_dist'].backward()
    assert model.decode_head[0].conv_seg.weight.grad.abs().sum() > 0
    assert model.decode_head[1].fc_seg.weight.grad is None


def test_a_head_with_unknown_outputs_is_an_error(pspnet):
    from mmseg.models.decode_heads import PSPHead
    from mmseg.registry import MODELS as MMSEG_MODELS

    @MMSEG_MODELS.register_module(force=True)
    class TwinHead(PSPHead):
        def forward(self, inputs):
            return super().forward(inputs), None

        def loss_by_feat(self, outputs, samples):
            return super().loss_by_feat(outputs[0], samples)

    pspnet.decode_head.type = 'TwinHead'
    model = distilled(pspnet, zoo_model('pspnet/pspnet_r18-d8'))
    with pytest.raises(ValueError, match='TwinHead returns 2 outputs'):
        loss_of(model, make_batch(19))


def test_a_model_without_a_decode_head_is_an_error(pspnet):
    register_all_modules(init_default_scope=False)
    model = model_config(FAMILIES['RetinaNet'])
    retinanet = Config(dict(model=model, default_scope='mmdet'))
    with pytest.raises(ValueError, match='SegLogits cannot compare a RetinaNet'):
        distilled(pspnet, retinanet)


def test_auxiliary_heads_are_paired_the_deepest_first(pspnet):
    stdc = zoo_model('stdc/stdc1_4xb12')
    model = make_pair(stdc, zoo_model('bisenetv1/bisenetv1_r18-d32_4xb4-160k_city'))
    # STDC's third head predicts boundaries.
    assert auxiliary_heads(model) == list(model.auxiliary_head[:2])
    assert [h.in_index for h in auxiliary_heads(model)] == [2, 1]
    theirs = auxiliary_heads(model.teacher.model)
    assert [h.in_index for h in theirs] == [2, 1]

    model = make_pair(stdc, pspnet)  # two heads and one
    loss_of(model, make_batch(19))['loss_dist_aux'].backward()
    deep, shallow, boundary = model.auxiliary_head
    assert deep.conv_seg.weight.grad.abs().sum() > 0
    assert shallow.conv_seg.weight.grad is None
    assert boundary.conv_seg.weight.grad is None


@pytest.mark.parametrize('without', ['teacher', 'weight'])
def test_auxiliary_heads_that_one_side_lacks_are_left_out(pspnet, without):
    teacher = copy.deepcopy(pspnet)
    if without == 'teacher':
        del teacher['auxiliary_head']
    model = distilled(pspnet, teacher, aux_weight=0 if without == 'weight' else 0.4)
    losses = loss_of(model, make_batch(19))
    assert 'loss_dist' in losses
    assert not any('dist_aux' in key for key in losses)


# ---- mask classification ---------------------------------------------------------


def scores_of(model: nn.Module, data: dict) -> np.ndarray:
    """Class scores per pixel as mmseg's inference gives them, (N, C, height, width)."""
    size = tuple(data['inputs'].shape[-2:])
    metas = [dict(img_shape=size, pad_shape=size) for _ in data['inputs']]
    with torch.no_grad():
        features = model.extract_feat(data['inputs'])
        return model.decode_head.predict(features, metas, None).double().numpy()


@pytest.mark.parametrize(
    ('student', 'teacher', 'options'),
    [
        ('segformer_mit-b0', 'maskformer', {}),
        ('pspnet_r18-d8', 'mask2former', dict(loss=KL)),
        *slow([('deeplabv3_r18-d8', 'mask2former', {})]),
    ],
)
def test_per_pixel_student_of_a_mask_classification_teacher(student, teacher, options):
    """A loss other than DIST gets logits whose softmax are the scores."""
    width = 1 if 'mit' in student else 1 / 8
    student = zoo_model(f'{student.split("_")[0]}/{student}', width)
    teacher = zoo_model(f'{teacher}/{teacher}_r50')
    classes = teacher.decode_head.num_classes
    student.decode_head.num_classes = classes
    student.pop('auxiliary_head', None)
    model = make_pair(student, teacher, resize='label', **options)
    data = make_batch(classes)
    (raw,), losses = raw_outputs(model, data), loss_of(model, data)
    raw = bilinear(raw, (64, 64), student.decode_head.align_corners)
    ours = softmax(rows_that_count(raw, data), axis=1)
    theirs = rows_that_count(scores_of(model.teacher.model, data), data)
    if options:
        theirs /= theirs.sum(axis=1, keepdims=True)
        expected = np.mean(theirs * np.log(theirs / ours))
    else:
        expected = dist(ours, theirs)
    assert losses['loss_dist'].item() == pytest.approx(expected, rel=1e-3)
    losses['loss_dist'].backward()
    assert_learns(model.decode_head.conv_seg)


def test_mask_classification_student_of_a_per_pixel_teacher(mask2former, pspnet):
    model = make_pair(mask2former, pspnet, resize='label')
    data = make_batch(19)
    ours = rows_that_count(scores_of(plain_student(model), data), data)
    theirs = softmax(map_of_the_teacher(model, data, (64, 64)), axis=1)
    losses = loss_of(model, data)
    expected = dist(ours, theirs)
    assert losses['loss_dist'].item() == pytest.approx(expected, rel=1e-3)
    losses['loss_dist'].backward()
    # the classes, and the masks
    assert_learns(model.decode_head.cls_embed, model.decode_head.mask_embed)


# ---- two classes -----------------------------------------------------------------


def binary(channels: int) -> dict:
    model = zoo_model('pspnet/pspnet_r18-d8')
    for head in (model.decode_head, model.auxiliary_head):
        head.update(num_classes=2, out_channels=channels)
        head.loss_decode.use_sigmoid = channels == 1
    return model


@pytest.mark.parametrize('ours', [1, 2])
@pytest.mark.parametrize('theirs', [1, 2])
def test_binary_segmentation_has_the_intra_class_term_only(ours, theirs):
    model = make_pair(binary(ours), binary(theirs), aux_weight=0)
    data = make_batch(2)
    (raw, _) = raw_outputs(model, data)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        losses = [loss_of(model, data) for _ in range(2)]
    said = [str(w.message) for w in caught if 'inter-class' in str(w.message)]
    assert len(said) == 1
    assert ('one channel' if ours == 1 else 'two classes') in said[0]
    foreground = [
        expit(x[:, 0]) if x.shape[1] == 1 else softmax(x, axis=1)[:, 1]
        for x in (rows_that_count(raw, data), map_of_the_teacher(model, data))
    ]
    # The background is 1 - foreground: the same correlation.
    expected = 1 - pearsonr(*foreground).statistic
    assert losses[0]['loss_dist'].item() == pytest.approx(expected, rel=1e-4)
    losses[0]['loss_dist'].backward()
    assert model.decode_head.conv_seg.weight.grad.abs().sum() > 0


def other_classes(channels: int, match: ClassMatch) -> nn.Module:
    """A binary student of a teacher with the classes of a match."""
    teacher = zoo_model('pspnet/pspnet_r18-d8')
    for head in (teacher.decode_head, teacher.auxiliary_head):
        head.num_classes = match.num_teacher
    model = distilled(binary(channels), teacher, aux_weight=0)
    model.teacher.classes = match
    return model


@pytest.mark.parametrize(
    ('channels', 'names', 'class_map'),
    [
        (1, ['tree', 'road', 'sky'], {'rest': ['sky', 'tree']}),
        (2, ['tree', 'road', 'sky'], {'rest': ['sky', 'tree']}),
        (1, ['road', 'rest'], None),
        (2, ['lane', 'rest', 'sky'], {'road': 'lane'}),
    ],
)
def test_a_binary_student_learns_from_other_classes(channels, names, class_map):
    """With one channel or two, it learns the road's share, computed here in numpy."""
    model = other_classes(channels, match_classes(['rest', 'road'], names, class_map))
    data = make_batch(2)
    with Recorder([model.decode_head]) as recorder:
        losses, (pair,) = step(model, data)
    losses['loss_dist'].backward()
    assert_learns(model.decode_head.conv_seg)
    own = recorder.calls(model.decode_head)[0].output.detach().numpy()
    guest = model.teacher.model
    with torch.no_grad():
        logits = guest.decode_head(guest.extract_feat(data['inputs']))
    p = dict(zip(names, softmax(logits.numpy(), 1).swapaxes(0, 1), strict=True))
    rest = sum(p[x] for x in (class_map or {}).get('rest', ['rest']))
    road = p['lane'] if 'lane' in names else p['road']
    for found, expected in (
        (pair.teacher, road / (rest + road)),
        (pair.student, expit(own[:, 0]) if channels == 1 else softmax(own, 1)[:, 1]),
    ):
        found = found.detach().numpy()
        assert found.shape[1] == channels
        found = expit(found[:, 0]) if channels == 1 else softmax(found, 1)[:, 1]
        np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_a_binary_student_needs_both_classes():
    match = match_classes(['rest', 'road'], ['road', 'sky'], None, 'shared')
    with pytest.raises(ValueError, match='map both of them'):
        step(other_classes(1, match), make_batch(2))


# ---- inference -------------------------------------------------------------------


def test_inference_with_augmentation_is_the_students_own(pspnet):
    """Sliding windows over an image and its mirror image."""
    pspnet.test_cfg = dict(mode='slide', crop_size=(48, 48), stride=(32, 32))
    nothing = dict(config='nowhere.py', checkpoint='nowhere.pth')  # never read
    models = [MODELS.build(pspnet), build_distiller(pspnet, False, teacher=nothing)]
    models[0].init_weights()
    scale_logits(models[0])
    models[1].load_state_dict(models[0].state_dict())
    image = torch.randint(256, (3, *SIZE), generator=torch.manual_seed(0)).byte()
    samples = []
    for flip in (False, True):
        sample = make_batch(19, SIZE)['data_samples'][0]
        sample.set_metainfo(
            dict(flip=flip, flip_direction='horizontal', img_path='1.png')
        )
        samples.append([sample])
    data = dict(inputs=[[image], [image.flip(-1)]], data_samples=samples)
    plain, ours = (
        MODELS.build(dict(type='SegTTAModel', module=model)).eval().test_step(data)[0]
        for model in models
    )
    assert torch.equal(plain.pred_sem_seg.data, ours.pred_sem_seg.data)
    assert len(plain.pred_sem_seg.data.unique()) > 1
