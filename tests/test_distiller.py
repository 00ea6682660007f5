"""A distilled model is the student except for its loss; the teacher is a guest."""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from builders import (
    build,
    classifiers,
    dataset_batch,
    distilled_config,
    losses_of,
)
from mmengine.config import Config
from mmengine.logging import MessageHub, MMLogger
from mmengine.registry import MODELS, DefaultScope, init_default_scope
from torch import nn

from mmdist.record import Recorder

SIZE = (96, 128)
KINDS = dict(det='DenseLogits', seg='SegLogits')


@pytest.fixture(scope='module')
def pairs(det_config, seg_config, tmp_path_factory) -> dict[str, Config]:
    """Distilled configs whose teacher has the student's architecture."""
    made = {}
    for family, text in dict(det=det_config, seg=seg_config).items():
        folder = tmp_path_factory.mktemp(family)
        student = Config.fromstring(text, '.py')
        torch.manual_seed(1)
        with DefaultScope.overwrite_default_scope(student.default_scope):
            teacher = MODELS.build(student.model)
        spread_logits(teacher)
        torch.save(dict(state_dict=teacher.state_dict()), folder / 'teacher.pth')
        config, checkpoint = (str(folder / x) for x in ('student.py', 'teacher.pth'))
        options = dict(config=config, checkpoint=checkpoint)
        made[family] = distilled_config(folder, text, **options)
    return made


@pytest.fixture
def config(family, pairs) -> Config:
    init_default_scope(pairs[family].default_scope)
    return copy.deepcopy(pairs[family])


def spread_logits(model: nn.Module) -> None:
    """Set random weights whose logits vary, but do not saturate a sigmoid."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
    layers = classifiers(model)
    for conv in layers:
        nn.init.zeros_(conv.bias)
    with Recorder(layers) as recorder, torch.no_grad():
        features = model.eval().extract_feat(torch.randn(1, 3, *SIZE))
        for head in ('bbox_head', 'decode_head', 'auxiliary_head'):
            if hasattr(model, head):
                getattr(model, head).forward(features)
    for conv in layers:
        conv.weight.data /= 4 * recorder.calls(conv)[0].output.std()


def total(value) -> torch.Tensor:
    return sum(value) if isinstance(value, list) else value


def test_it_is_the_student_in_everything_but_its_loss(config):
    plain, model = build(config, distilled=False), build(config)
    assert isinstance(model, type(plain))
    assert list(model.state_dict()) == list(plain.state_dict())
    for kind in ('named_parameters', 'named_buffers'):
        theirs, ours = (dict(getattr(m, kind)()) for m in (plain, model))
        assert list(theirs) == list(ours)
        # building the teacher does not touch the student's random numbers
        assert all(torch.equal(theirs[name], ours[name]) for name in theirs)
    model.load_state_dict(plain.state_dict(), strict=True)
    plain.load_state_dict(model.state_dict(), strict=True)

    data = dataset_batch(config)
    own, distilled = losses_of(plain, data), losses_of(model, data)
    assert set(distilled) - set(own) >= {'loss_dist', 'dist_inter', 'dist_intra'}
    for key in own:
        torch.testing.assert_close(total(own[key]), total(distilled[key]))


def test_predictions_are_the_students(config):
    plain, model = build(config, distilled=False).eval(), build(config).eval()
    data = dataset_batch(config)
    for sample in data['data_samples']:
        sample.set_metainfo(dict(scale_factor=(1.0, 1.0)))
    results = [m.test_step(copy.deepcopy(data)) for m in (plain, model)]
    for a, b in zip(*results, strict=True):
        if 'pred_sem_seg' in a:
            assert torch.equal(a.pred_sem_seg.data, b.pred_sem_seg.data)
        else:
            assert torch.equal(a.pred_instances.scores, b.pred_instances.scores)


def test_the_teacher_is_a_guest(config):
    model = build(config)
    teacher = model.teacher.model
    before = copy.deepcopy(teacher.state_dict())
    assert not any(m is teacher for m in model.modules())
    assert not any(p.requires_grad for p in teacher.parameters())

    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model.train()
    assert not any(module.training for module in teacher.modules())
    loss, _ = model.parse_losses(losses_of(model, dataset_batch(config)))
    loss.backward()
    optimizer.step()
    assert all(p.grad is None for p in teacher.parameters())
    after = teacher.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_the_log_says_once_who_learns_what_from_whom(config, family, monkeypatch):
    lines = []
    logger = MMLogger.get_current_instance()
    monkeypatch.setattr(logger, 'handle', lambda record: lines.append(record.msg))
    logger.setLevel('INFO')
    model = build(config)
    model._load_teachers()
    said = [str(line) for line in lines if 'learns from' in str(line)]
    model = dict(det='RetinaNet', seg='EncoderDecoder')[family]
    boxes = [line for line in said if ' by `box`, Boxes with ' in line]
    assert len(boxes) == (family == 'det')
    assert [line for line in said if line not in boxes] == [
        f'mmdist: {model} learns from {model} ({config.model.teacher.checkpoint}) by '
        f'`dist`, {KINDS[family]} with DISTLoss, chosen because student and teacher '
        'are of the same family.'
    ]


def test_the_term_reaches_the_backbone_and_changes_with_the_student(config):
    model, data = build(config), dataset_batch(config)
    model.balance = None  # balancing leaves no gradient in the first step
    losses = losses_of(model, data)
    assert 0 < losses['loss_dist'] < 100
    model.zero_grad()
    losses['loss_dist'].backward()
    trained = [p for p in model.backbone.parameters() if p.requires_grad]
    assert all(p.grad is not None for p in trained)
    assert any(p.grad.abs().max() > 0 for p in trained)
    first = losses['loss_dist'].item()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.05)
    assert losses_of(model, data)['loss_dist'].item() != pytest.approx(first, rel=1e-3)


def test_a_student_like_its_teacher_has_correlation_one(config):
    model = build(config)
    model.load_state_dict(model.teacher.model.state_dict())
    model.eval()  # the teacher's batch norm is in eval too
    losses = losses_of(model, dataset_batch(config))
    found = [losses[f'dist_{relation}'].item() for relation in ('inter', 'intra')]
    assert found == pytest.approx([1, 1], abs=1e-5)
    assert losses['loss_dist'].item() == pytest.approx(0, abs=1e-4)


def test_inference_needs_no_teacher(config):
    config.model.teacher = dict(config='nowhere.py', checkpoint='nowhere.pth')
    model = MODELS.build(config.model)
    model.eval()
    model(torch.rand(1, 3, 96, 128), mode='tensor')
    assert model.teacher.model is None


def test_a_model_in_a_file_or_a_copy_trains_alike(config, tmp_path):
    """Pickled whole, as by `torch.save` and `spawn`, it holds no second model."""
    model, data = build(config), dataset_batch(config)
    expected = losses_of(model, data)['loss_dist']
    torch.save(model, tmp_path / 'model.pt')
    weights = sum(p.nbytes for p in model.state_dict().values())
    assert (tmp_path / 'model.pt').stat().st_size < 1.5 * weights + 2e5
    saved = torch.load(tmp_path / 'model.pt', weights_only=False)
    for other in (saved, copy.deepcopy(model)):
        assert type(other) is type(model)
        state = model.state_dict()
        assert all(torch.equal(state[k], v) for k, v in other.state_dict().items())
        torch.testing.assert_close(losses_of(other, data)['loss_dist'], expected)
    assert saved.teacher is not model.teacher


@pytest.mark.slow  # the new process imports the libraries
@pytest.mark.parametrize('family', ['det'], indirect=True)  # the same for both
def test_a_model_is_handed_to_a_process_that_is_spawned(config):
    model = build(config)
    context = torch.multiprocessing.get_context('spawn')
    queue = context.SimpleQueue()
    process = context.Process(target=tell_class, args=(model, queue))
    process.start()
    process.join()
    assert process.exitcode == 0
    assert queue.get() == ['DistilledRetinaNet', 'DistilledMixin', 'RetinaNet']


def tell_class(model: nn.Module, queue) -> None:
    queue.put([cls.__name__ for cls in type(model).__mro__[:3]])


def test_the_teacher_follows_the_students_type(config):
    model = build(config).double()
    assert {p.dtype for p in model.teacher.model.parameters()} == {torch.float64}


def test_weights_of_another_architecture_stop_before_the_first_step(config):
    config.model.teacher.config = (
        'mmdet::fcos/fcos_r50-caffe_fpn_gn-head_1x_coco.py'
        if config.default_scope == 'mmdet'
        else 'mmseg::fcn/fcn_r50-d8_4xb2-40k_cityscapes-512x1024.py'
    )
    with pytest.raises(RuntimeError, match='do not fit the teacher'):
        build(config)


@pytest.mark.parametrize('family', ['det'], indirect=True)  # it has a loss_cls
def test_an_entry_named_like_a_loss_of_the_student_replaces_nothing(config):
    plain, data = build(config, distilled=False), dataset_batch(config)
    config.model.distill = dict(cls=dict(type='mmdist.DenseLogits'))
    losses = losses_of(build(config), data)
    torch.testing.assert_close(
        total(losses['loss_cls']), total(losses_of(plain, data)['loss_cls'])
    )
    assert losses['loss_cls_distill'] > 0


@pytest.mark.parametrize('family', ['det'], indirect=True)  # it has a loss_cls
def test_a_paused_teacher_leaves_the_students_losses(config):
    """Also one with an entry's name; DDP needs the adapters in the graph."""
    plain, data = build(config, distilled=False), dataset_batch(config)
    mimic = dict(type='mmdist.Features', student='neck', adapt=True)
    config.model.distill = dict(cls=mimic)
    model = build(config)
    model.distill_factor = 0.0
    losses, own = losses_of(model, data), losses_of(plain, data)
    assert set(losses) - set(own) == {'loss_cls_distill'}
    assert losses['loss_cls_distill'] == 0 and losses['loss_cls_distill'].requires_grad
    torch.testing.assert_close({k: losses[k] for k in own}, own)


def test_the_students_own_names_of_a_batch_are_taken(config, family):
    model, data = build(config), dataset_batch(config)
    expected = losses_of(model, data)['loss_dist']
    data = model.data_preprocessor(copy.deepcopy(data), True)
    if family == 'det':
        data = {f'batch_{name}': value for name, value in data.items()}
    torch.manual_seed(0)
    assert model.loss(**data)['loss_dist'] == expected


@pytest.mark.parametrize('family', ['det'], indirect=True)  # the same for both
def test_threads_take_turns(config):
    """What one thread records must not reach another."""
    model = build(config).eval()
    batches = [model.data_preprocessor(dataset_batch(config), True) for _ in range(2)]
    batches[1]['inputs'] = batches[1]['inputs'] + 1
    expected = [model.loss(**batch)['loss_dist'] for batch in batches]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda i: model.loss(**batches[i % 2]), range(12)))
    for i, losses in enumerate(found):
        torch.testing.assert_close(losses['loss_dist'], expected[i % 2])


@pytest.mark.parametrize('family', ['seg'], indirect=True)
def test_a_teacher_without_an_auxiliary_head_takes_nothing_from_the_others_term(config):
    model, data = build(config), dataset_batch(config)
    expected = losses_of(model, data)['loss_dist_aux']
    other = Config.fromfile(config.model.teacher.config)
    other.model.auxiliary_head = None
    teachers = dict(
        a=config.model.teacher, b=dict(config=other.model, allow_random=True)
    )
    config.model.update(teacher=None, teachers=teachers)
    found = losses_of(build(config), data)
    torch.testing.assert_close(found['loss_dist_aux'], expected)
    assert 'dist_aux_inter_b' not in found


def test_what_a_term_leaves_out_is_not_logged(config, family):
    loss = dict(type='mmdist.DISTLoss', beta=0.0)
    config.model.distill = dict(dist=dict(type=f'mmdist.{KINDS[family]}', loss=loss))
    model = build(config)
    losses = losses_of(model, dataset_batch(config))
    assert 'dist_inter' not in losses
    assert model.distill['dist'].loss.intra_corr.isfinite()


@pytest.mark.parametrize(
    'loss',
    [
        dict(type='mmdet.KnowledgeDistillationKLDivLoss', T=2),
        dict(type='mmdist.BinaryKLDivLoss', tau=2),
    ],
)
def test_kl_and_dist_differ_by_one_line(config, family, loss):
    config.model.distill = dict(kl=dict(type=f'mmdist.{KINDS[family]}', loss=loss))
    model, data = build(config), dataset_batch(config)
    losses = losses_of(model, data)
    assert losses['loss_kl'] > 0
    assert 'kl_inter' not in losses
    model.load_state_dict(model.teacher.model.state_dict())
    assert losses_of(model.eval(), data)['loss_kl'].item() == pytest.approx(0, abs=1e-5)


def tell_classes(names) -> None:
    """Store the class names as a Runner does."""
    hub = MessageHub.get_current_instance()
    hub.update_info('dataset_meta', dict(classes=tuple(names)))


def test_classes_of_the_runs_data_set_are_matched_by_name(config, monkeypatch):
    """The order of the teacher's classes does not matter."""
    model, data = build(config).eval(), dataset_batch(config)
    names = list(config.train_dataloader.dataset.metainfo.classes)
    tell_classes(names)
    with monkeypatch.context() as patch:
        patch.setattr(model.teacher, 'class_names', names)
        expected = losses_of(model, data)
    # permute the teacher's classes, and the last layer that predicts them
    order = [2, 0, 1]
    for conv in classifiers(model.teacher.model):
        for p in conv.parameters():
            p.data = p.unflatten(0, (-1, 3))[:, order].flatten(0, 1)
    model.teacher.class_names = [names[i] for i in order]
    model.teacher.classes = None
    losses = losses_of(model, data)
    for key in ('loss_dist', 'dist_inter', 'dist_intra'):
        torch.testing.assert_close(losses[key], expected[key])


def test_classes_left_by_another_run_are_not_taken_for_the_students(config):
    tell_classes('xyz')
    losses_of(build(config), dataset_batch(config))


def test_classes_that_do_not_match_stop_the_first_step(config):
    model = build(config)
    tell_classes('xyz')
    with pytest.raises(ValueError, match='cannot be matched by name'):
        losses_of(model, dataset_batch(config))


@pytest.mark.parametrize(
    ('options', 'tolerance'),
    [(dict(dtype='bf16'), 0.02), (dict(channels_last=True), 1e-4)],
)
def test_options_of_the_teacher_change_little(config, options, tolerance):
    data = dataset_batch(config)
    expected = losses_of(build(config), data)
    config.model.teacher.update(options)
    model = build(config)
    losses = losses_of(model, data)
    assert losses['loss_dist'].dtype == torch.float32
    torch.testing.assert_close(
        losses['loss_dist'], expected['loss_dist'], rtol=tolerance, atol=tolerance
    )
    if 'dtype' in options:  # the weights themselves take half the memory
        weights = model.teacher.model.parameters()
        assert {p.dtype for p in weights} == {torch.bfloat16}
