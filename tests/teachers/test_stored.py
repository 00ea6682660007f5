"""Stored answers teach like a teacher that is asked in each step."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from builders import dataset_batch, distilled_text
from det_zoo import FAMILIES, batch, build_pair, model_config
from mmdet.utils import register_all_modules
from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from mmengine.hooks import Hook
from mmengine.registry import DATASETS, HOOKS, DefaultScope, init_default_scope
from mmengine.runner import Runner
from mmengine.structures import BaseDataElement
from scipy.ndimage import map_coordinates
from segmentors import distilled, make_batch, zoo_model
from tiny import DET_CLASSES, SEG_CLASSES, SIZE

from mmdist import MODELS
from mmdist.comparisons.detections import detected
from mmdist.data.answers import check_images, join
from mmdist.families.seg import StoredMap
from mmdist.hooks import StoredTeacherHook
from mmdist.record import Recorder
from mmdist.step import Step
from mmdist.teachers import ClassMatch, StoredTeacher, build_teacher
from mmdist.teachers.store import StoreWriter
from mmdist.teachers.stored import FRAMES, Frame, Placed, View
from mmdist.teachers.stored import SIZE as NOTED

SIZES = ((96, 96), (96, 96))
NAMES = tuple(f'class {i}' for i in range(80))
HOOK = "custom_hooks = [dict(type='mmdist.StoredTeacherHook')]"


def write(path: Path, kind: str, classes, answers: dict) -> str:
    """Write a store of answers, a dict of file -> (size, answer)."""
    manifest = dict(kind=kind, class_names=list(classes))
    manifest['teachers'] = [dict(config='c', checkpoint='w.pth', sha256='0')]
    writer = StoreWriter(path, manifest)
    for file, (size, answer) in answers.items():
        writer.add(file, size, answer)
    return str(path)


def with_stored(model, path, **options):
    """Replace the model's teacher by stored answers."""
    teacher = build_teacher(dict(stored=path, **options), {})
    model.teachers, model._is_checked = {'': teacher}, False
    model._load_teachers()
    return model


def note(data, *moves):
    """Mark each image as showing a file, moved so; by default the whole file."""
    for sample, name in zip(data['data_samples'], 'ab', strict=True):
        size = tuple(sample.img_shape[:2])
        file = dict(img_path=f'/images/{name}', height=size[0], width=size[1])
        sample.set_metainfo({FRAMES: (Frame(file, moves),), NOTED: size})
    return data


def of_files(size, answers) -> dict:
    """The answers for the two images of a batch."""
    return {f'/images/{x}': (size, y) for x, y in zip('ab', answers, strict=True)}


# ---- as exact as the teacher itself --------------------------------------------------


def no_tiny_proposals(cfg, *_):
    if 'rpn' in cfg.test_cfg:
        cfg.test_cfg.rpn.min_bbox_size = 8


@pytest.mark.parametrize('student', ['RetinaNet', 'Faster R-CNN', 'DINO'])
def test_without_augmentation_the_losses_are_those_of_the_teacher(student, tmp_path):
    """Class and box losses, of a teacher of another family that gives detections."""
    distill = dict(
        dist=dict(type='mmdist.Detections'), box=dict(type='mmdist.Boxes', min_score=0)
    )
    teacher = 'RetinaNet' if student == 'Faster R-CNN' else 'Faster R-CNN'
    paths = FAMILIES[student], FAMILIES[teacher]
    model = build_pair(*paths, distill, edit=no_tiny_proposals, sizes=SIZES)
    for name, parameter in model.teacher.model.named_parameters():
        if 'fc_reg' in name:
            parameter *= 1e-3  # boxes under a pixel are left out
    data = note(batch(model, SIZES))

    def losses():
        torch.manual_seed(0)
        return model(**copy.deepcopy(data), mode='loss')

    wanted, guest = losses(), model.teacher
    step = Step(model, guest, ClassMatch(), data['inputs'], data['data_samples'])
    with guest.running():
        found = detected(step)
    assert all(len(x) > 5 for x in found)
    rows = [
        torch.cat([x.bboxes, x.scores[:, None], x.labels[:, None].float()], 1)
        for x in found
    ]
    answers = of_files((96, 96), rows)
    with_stored(model, write(tmp_path / 'store', 'boxes', NAMES, answers))
    got = losses()
    for name, value in wanted.items():
        if name.startswith(('loss_dist', 'loss_box', 'dist', 'box')):
            assert torch.as_tensor(got[name]).item() == pytest.approx(
                float(value), abs=1e-4
            )
    got['loss_dist'].backward(retain_graph=True)
    assert got['loss_box'] > 0
    got['loss_box'].backward()
    assert sum(p.numel() for p in model.teacher.model.parameters()) == 0


def test_with_resize_and_flip_answers_move_as_labels_do(
    det_config, coco_root, tmp_path
):
    """A results file that holds the labels. Oracle: mmdet's own labels."""
    stored = results_of(coco_root, tmp_path / 'results.bbox.json')
    config = make_config(det_config, tmp_path, stored).train_dataloader.dataset
    config.pipeline = [
        *MOSAIC[:2],
        dict(type='Resize', scale=(256, 192), keep_ratio=True),
        dict(type='RandomFlip', prob=0.7, direction=['horizontal', 'vertical']),
        MOSAIC[-1],
    ]
    np.random.seed(0)
    with DefaultScope.overwrite_default_scope('mmdet'):
        dataset = DATASETS.build(config)
    teacher = StoredTeacher(stored)
    check_images(dataset, teacher.store)
    join(dataset, 'boxes')
    teacher.load(None)
    samples = pseudo_collate([*dataset])['data_samples']
    assert len({sample.flip_direction for sample in samples}) > 1
    found = teacher.model(torch.zeros(4, 3, 192, 256), samples)
    for answer, sample in zip(found, samples, strict=True):
        wanted = sample.gt_instances
        torch.testing.assert_close(answer.bboxes, wanted.bboxes.tensor)
        assert torch.equal(answer.labels, wanted.labels)
        assert answer.scores.tolist() == pytest.approx([0.9] * 3)


@pytest.mark.parametrize('as_scores', [True, False])
def test_a_map_is_read_bilinearly_at_the_centres_of_cells(as_scores):
    rng = np.random.default_rng(0)
    stored = rng.integers(0, 256, (5, 12, 16), dtype=np.uint8)
    # a crop from (16, 10) of 80 x 64, mirrored, enlarged by 2, padded to 192 x 160
    crop = np.array([[1, 0, -16], [0, 1, -10], [0, 0, 1.0]])
    flip = np.array([[-1, 0, 80], [0, 1, 0], [0, 0, 1.0]])
    views = [
        View(np.eye(3), (96, 128)),
        View(crop, (64, 80)),
        View(flip @ crop, (64, 80)),
    ]
    views.append(View(np.diag([2, 2, 1.0]) @ flip @ crop, (128, 160)))
    placed = Placed(torch.from_numpy(stored), views)
    maps = torch.zeros(1, 1, 160, 192)
    found = StoredMap(maps, as_scores=as_scores, placed=[placed])
    height, width = 20, 24
    y, x = (np.mgrid[:height, :width] + 0.5) * 8
    x, y = 16 + (160 - x) / 2, 10 + y / 2
    cells = [y / 8 - 0.5, x / 8 - 0.5]
    wanted = [
        map_coordinates(c / 255.0, cells, order=1, mode='nearest') for c in stored
    ]
    wanted = torch.from_numpy(np.stack(wanted))[None].float()
    shown = found.shown((height, width))[0]
    assert shown[:16, :20].all() and shown.sum() == 16 * 20
    got = found.read((height, width))
    got = got if as_scores else got.exp()
    torch.testing.assert_close(got, wanted.clamp_min(0 if as_scores else 1e-4))


PSPNET = 'pspnet/pspnet_r18-d8_4xb2-80k_cityscapes-512x1024'


def test_maps_teach_as_the_teacher_does_within_the_quantisation(tmp_path):
    teacher = zoo_model('deeplabv3/deeplabv3_r50-d8_4xb2-40k', 1 / 4)
    model = distilled(zoo_model(PSPNET), teacher, aux_weight=0).eval()
    data = note(make_batch(19), View(np.eye(3), (64, 64)))

    def loss():
        return model(**copy.deepcopy(data), mode='loss')['loss_dist']

    wanted, online = loss(), model.teacher
    with online.running():
        inputs = online.renormalize(data['inputs'], [(64, 64)] * 2)
        logits = online.model.decode_head.forward(online.model.extract_feat(inputs))
    answers = of_files((64, 64), logits.softmax(1))
    with_stored(model, write(tmp_path / 'store', 'maps', NAMES[:19], answers))
    got = loss()
    assert got.item() == pytest.approx(wanted.item(), abs=0.02)
    got.backward()


def test_where_the_file_is_not_shown_no_pixel_counts(tmp_path):
    model = distilled(zoo_model(PSPNET), zoo_model(PSPNET), aux_weight=0)
    answers = of_files((64, 64), torch.rand(2, 19, 8, 8) / 19)
    with_stored(model, write(tmp_path / 'store', 'maps', NAMES[:19], answers))
    right = np.array([[1, 0, 32], [0, 1, 0], [0, 0, 1.0]])  # by half an image
    moves = (View(np.eye(3), (64, 64)), View(right, (64, 64)))
    data = note(make_batch(19), *moves)
    for sample in data['data_samples']:
        sample.gt_sem_seg.data.fill_(0)  # no pixel is ignored
    with Recorder([model.distill['dist']]) as recorder:
        model.train()(**data, mode='loss')
    ((_, (pair,)),) = (x.args for x in recorder.calls(model.distill['dist']))
    half = pair.mask.shape[-1] // 2
    assert pair.mask[..., half:].all() and not pair.mask[..., :half].any()


def test_answers_follow_a_batch_that_is_resized_and_none_comes_back(tmp_path):
    """A box clipped to a line stays gone, even if a shear gives the line an area."""
    rows = torch.tensor([[10.0, 10, 30, 30, 0.9, 0], [50, 10, 90, 30, 0.8, 1]])
    path = write(
        tmp_path / 'store', 'boxes', NAMES[:2], {'/images/a': ((96, 96), rows)}
    )
    teacher = build_teacher(dict(stored=path), {})
    teacher.load(None)
    shear = np.array([[1, 0.5, 0], [0, 1, 0], [0, 0, 1.0]], np.float32)
    moves = (('clip_', ([40, 40],), {}), ('project_', (shear,), {}))
    frame = Frame(dict(img_path='/images/a', height=96, width=96), moves)
    sample = BaseDataElement(metainfo={'img_shape': (192, 288), NOTED: (96, 96)})
    sample.set_metainfo({FRAMES: (frame,)})
    (found,) = teacher.model(torch.zeros(1, 3, 192, 288), [sample])
    wanted = torch.tensor([[3 * (10 + 5), 2 * 10, 3 * (30 + 15), 2 * 30.0]])
    torch.testing.assert_close(found.bboxes, wanted)
    assert found.labels.tolist() == [0]


# ---- training ------------------------------------------------------------------------


def results_of(coco_root, path: Path, change=lambda entry: entry) -> str:
    """Write the labels of the tiny COCO data as a results file."""
    entries = json.loads((coco_root / 'train.json').read_text())['annotations']
    keys = ('image_id', 'category_id', 'bbox')
    entries = [dict({k: e[k] for k in keys}, score=0.9) for e in entries]
    path.write_text(json.dumps([e for e in map(change, entries) if e]))
    return str(path)


def make_config(det_config, folder: Path, stored: str, more=HOOK, **options) -> Config:
    (folder / 'student.py').write_text(det_config)
    text = distilled_text(more, stored=stored, **options)
    (folder / 'distilled.py').write_text(text)
    config = Config.fromfile(folder / 'distilled.py')
    config.work_dir = str(folder / 'work')
    config.val_dataloader = config.val_evaluator = config.val_cfg = None
    config.train_cfg = dict(type='EpochBasedTrainLoop', max_epochs=2)
    config.default_hooks.checkpoint = None
    return config


def train(config: Config) -> Runner:
    runner = Runner.from_cfg(copy.deepcopy(config))
    runner.train()
    return runner


MOSAIC = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations', with_bbox=True),
    dict(type='CachedMosaic', img_scale=(64, 64), max_cached_images=4),
    dict(type='RandomCrop', crop_size=(96, 96), allow_negative_crop=True),
    dict(type='CachedMixUp', img_scale=(96, 96), max_cached_images=2),
    dict(type='PackDetInputs'),
]
PLAIN = [*MOSAIC[:2], dict(type='Resize', scale=(96, 96)), MOSAIC[-1]]


@pytest.mark.parametrize('workers', [0, 1])
def test_a_student_is_trained_by_a_results_file(
    det_config, coco_root, tmp_path, workers
):
    """Through mosaic and mixup, and the pipeline that RTMDet's hook switches to."""
    stored = results_of(coco_root, tmp_path / 'results.bbox.json')
    config = make_config(det_config, tmp_path, stored)
    config.train_dataloader.dataset.pipeline = MOSAIC
    config.train_dataloader.update(
        num_workers=workers, persistent_workers=bool(workers)
    )
    switch = dict(type='PipelineSwitchHook', switch_epoch=1, switch_pipeline=PLAIN)
    config.custom_hooks.append(switch)
    runner = train(config)
    teacher = runner.model.teacher
    assert teacher.class_names == DET_CLASSES
    assert teacher.classes == ClassMatch()
    assert not [*teacher.model.parameters(), *teacher.model.buffers()]
    logged = runner.message_hub.log_scalars['train/loss_dist'].data[0]
    assert len(logged) == 4 and (logged > 0).all() and np.isfinite(logged).all()
    assert 'dist' in runner.model.distill
    assert '_pack' in str(runner.train_dataloader.dataset.pipeline)
    assert not any('teacher' in key for key in runner.model.state_dict())


def test_a_yolox_is_trained(det_config, coco_root, tmp_path):
    stored = results_of(coco_root, tmp_path / 'results.bbox.json')
    config = make_config(det_config, tmp_path, stored)
    inner = config.train_dataloader.dataset
    inner.pipeline = MOSAIC[:2]
    config.train_dataloader.dataset = dict(
        type='MultiImageMixDataset',
        dataset=inner,
        pipeline=[
            dict(type='Mosaic', img_scale=(64, 64)),
            dict(type='RandomAffine', border=(-32, -32)),
            dict(type='MixUp', img_scale=(64, 64)),
            MOSAIC[-1],
        ],
    )
    student = model_config(FAMILIES['YOLOX'])
    student.bbox_head.num_classes = 3
    student.data_preprocessor.batch_augments[0].update(
        random_size_range=(96, 96), size_divisor=32, interval=1
    )
    config.model.student = student
    config.custom_hooks.append(dict(type='YOLOXModeSwitchHook', num_last_epochs=1))
    logged = train(config).message_hub.log_scalars['train/loss_dist'].data[0]
    assert (logged > 0).all() and len(logged) == 4


@HOOKS.register_module()
class Batches(Hook):
    """Keeps the images and labels of all batches."""

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        labels = [s.gt_sem_seg.data for s in data_batch['data_samples']]
        batch = torch.stack(data_batch['inputs']), torch.stack(labels)
        self.seen = [*getattr(self, 'seen', []), batch]


def seen(runner):
    return next(h.seen for h in runner.hooks if isinstance(h, Batches))


@pytest.mark.parametrize('workers', [0, 1])
def test_a_segmentor_is_trained(seg_config, seg_root, tmp_path, workers):
    """By maps; its images and labels equal those of training without a teacher."""
    files = sorted((seg_root / 'images').iterdir())
    maps = torch.rand(len(files), 3, 12, 16)
    answers = {str(f): (SIZE, m) for f, m in zip(files, maps, strict=True)}
    stored = write(tmp_path / 'store', 'maps', SEG_CLASSES[::-1], answers)
    config = make_config(seg_config, tmp_path, stored)
    config.train_cfg = dict(type='IterBasedTrainLoop', max_iters=3)
    options = dict(num_workers=workers, persistent_workers=bool(workers))
    config.train_dataloader.update(options)
    steps = config.train_dataloader.dataset.pipeline
    steps.insert(2, dict(type='RandomCrop', crop_size=(80, 96)))
    steps.insert(2, dict(type='RandomResize', scale=SIZE[::-1], ratio_range=(1, 2)))
    config.custom_hooks.append(dict(type='Batches'))
    runner = train(config)
    student = copy.deepcopy(config)
    student.model, student.custom_hooks = config.model.student, [dict(type='Batches')]
    plain = train(student)
    for (images, labels), (others, same) in zip(seen(runner), seen(plain), strict=True):
        assert torch.equal(images, others) and torch.equal(labels, same)
    assert runner.model.teacher.classes.teacher == [(2,), (1,), (0,)]
    logged = runner.message_hub.log_scalars['train/loss_dist'].data[0]
    assert len(logged) == 3 and (logged > 0).all()


def test_it_mixes_with_a_teacher_that_is_asked(det_config, coco_root, tmp_path):
    stored = results_of(coco_root, tmp_path / 'results.bbox.json')
    config = make_config(det_config, tmp_path, stored)
    model = config.model
    del model['teacher']
    classes = dict(zip(DET_CLASSES, DET_CLASSES, strict=True))
    model.teachers = dict(
        a=dict(stored=stored, class_map=classes, class_match='shared'),
        b=dict(config=model.student, allow_random=True),
    )
    model.distill = dict(dist=dict(type='mmdist.Detections'))
    runner = train(config)
    scalars = runner.message_hub.log_scalars
    assert 'train/dist_intra_a' in scalars and 'train/loss_dist' in scalars


# ---- errors --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (lambda c: c.update(custom_hooks=[]), 'StoredTeacherHook'),
        (
            lambda c: c.train_dataloader.dataset.pipeline.insert(
                2, dict(type='RandomErasing', n_patches=1, ratio=0.1)
            ),
            'RandomErasing',
        ),
        (
            lambda c: c.custom_hooks.append(
                dict(
                    type='PipelineSwitchHook',
                    switch_epoch=1,
                    switch_pipeline=[*PLAIN[:3], dict(type='CopyPaste'), PLAIN[-1]],
                )
            ),
            '`switch_pipeline` of a hook: `CopyPaste`',
        ),
    ],
)
def test_what_cannot_work_stops_before_the_first_step(
    det_config, coco_root, tmp_path, change, message
):
    stored = results_of(coco_root, tmp_path / 'results.bbox.json')
    config = make_config(det_config, tmp_path, stored)
    change(config)
    with pytest.raises(ValueError, match=message):
        train(config)


def only_first(entry):
    return entry if entry['image_id'] == 1 else None


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (only_first, '3 of 4 training images have no answer: .*2.png'),
        (lambda e: dict(e, category_id=77), 'category ids 77'),
        (lambda e: dict(e, score=1.5), 'scores that are not'),
    ],
)
def test_answers_that_do_not_fit_are_refused(
    det_config, coco_root, tmp_path, change, message
):
    stored = results_of(coco_root, tmp_path / 'results.bbox.json', change)
    with pytest.raises(ValueError, match=message):
        train(make_config(det_config, tmp_path, stored))


def test_another_size_a_missing_image_and_another_kind(det_config, coco_root, tmp_path):
    files = sorted((coco_root / 'images').iterdir())
    empty = torch.zeros(0, 6)
    cases = {
        'size': ('boxes', {str(f): ((SIZE[0], 99), empty) for f in files}),
        'missing': ('boxes', {str(f): (SIZE, empty) for f in files[1:]}),
        'kind': ('maps', {str(f): (SIZE, torch.zeros(3, 2, 2)) for f in files}),
    }
    words = dict(size='was 96 x 99', missing='1 of 4 .*1.png', kind='for stored maps')
    for name, (kind, answers) in cases.items():
        stored = write(tmp_path / name, kind, DET_CLASSES, answers)
        with pytest.raises(ValueError, match=words[name]):
            train(make_config(det_config, tmp_path, stored))


@pytest.mark.parametrize(
    ('cfg', 'message'),
    [
        (
            dict(stored='x', config='c'),
            r"only with `class_map` and `class_match`, got \['config'\]",
        ),
        (dict(stored='x', views=['flip']), r"\['views'\]"),
        (dict(stored=3), '`teacher.stored` must be the path'),
        (dict(stored='x', class_match='some'), "'strict' or 'shared'"),
    ],
)
def test_arguments_are_refused_in_words(cfg, message):
    with pytest.raises(ValueError, match=message):
        build_teacher(cfg, {})


@pytest.mark.parametrize(
    ('student', 'kind'),
    [
        ('RetinaNet', dict(type='mmdist.DenseLogits')),
        ('RetinaNet', dict(type='mmdist.Features', student='neck')),
        ('GFL', dict(type='mmdist.BoxDistributions')),
        ('Faster R-CNN', dict(type='mmdist.RoILogits')),
        ('Mask R-CNN', dict(type='mmdist.Masks')),
        ('DINO', dict(type='mmdist.QueryLogits')),
    ],
)
def test_what_asks_for_modules_says_what_to_take(student, kind):
    register_all_modules()
    model = dict(type='mmdist.Distiller', student=model_config(FAMILIES[student]))
    with pytest.raises(ValueError, match=r'Use mmdist\.Detections or mmdist\.Boxes'):
        MODELS.build(dict(model, teacher=dict(stored='answers'), distill=dict(a=kind)))


def test_the_hook_leaves_other_trainings_alone(det_config, tmp_path):
    (tmp_path / 'student.py').write_text(det_config)
    config = Config.fromfile(tmp_path / 'student.py')
    init_default_scope('mmdet')
    config.work_dir = str(tmp_path)
    runner = Runner.from_cfg(config)
    StoredTeacherHook().before_run(runner)
    batch = dataset_batch(config)
    assert FRAMES not in batch['data_samples'][0].metainfo
