"""Teachers of Hugging Face transformers, of random weights and saved to a folder."""

from __future__ import annotations

import logging
import subprocess
import sys

import numpy as np
import pytest
import torch
from det_zoo import batch, model_config
from hf_models import (
    DETECTORS,
    NAMES,
    SEGMENTORS,
    SIZE,
    grounding_dino,
    oneformer,
    save_model,
    tokenizer,
    transformers,
)
from mmdet.utils import register_all_modules as register_mmdet
from mmengine.model import ImgDataPreprocessor
from mmengine.registry import DefaultScope
from mmseg.utils import register_all_modules as register_mmseg
from segmentors import make_batch, zoo_model
from torch import nn

from mmdist.registry import MODELS
from mmdist.teachers import Renormalize, Teacher


@pytest.fixture(autouse=True)
def quiet():
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    register_mmdet()
    register_mmseg(init_default_scope=False)


@pytest.fixture
def saved(tmp_path_factory):
    """Save a random model and its image processor; returns the folder."""
    return lambda make, processor: save_model(
        make, processor, tmp_path_factory.mktemp('hf')
    )


def pixels() -> np.ndarray:
    """Two RGB images, (N, H, W, 3), at the size that the processor wants."""
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (2, SIZE, SIZE, 3), dtype=np.uint8)


def as_of_the_student(teacher: nn.Module) -> torch.Tensor:
    """The same images through a student's normalisation and from there."""
    student = ImgDataPreprocessor([123.7, 116.3, 103.5], [58.4, 57.1, 57.4])
    student._channel_conversion = True  # BGR images to RGB
    images = torch.from_numpy(pixels()).permute(0, 3, 1, 2).double()
    normalised = (images - student.mean) / student.std
    renormalize = Renormalize(student, teacher.data_preprocessor)
    return renormalize(normalised.float(), [(SIZE, SIZE)] * 2)


def pipeline(folder: str, auto: str):
    """The library's own model and its inputs from the images."""
    model = getattr(transformers, auto).from_pretrained(folder).double().eval()
    processor = transformers.AutoImageProcessor.from_pretrained(folder)
    inputs = processor(images=list(pixels()), return_tensors='pt')
    inputs['pixel_values'] = inputs['pixel_values'].double()
    with torch.no_grad():
        return processor, model(**inputs)


def run(model: nn.Module) -> tuple:
    """The teacher's answer to the same images, in float64 as the pipeline's."""
    images = as_of_the_student(model).double()
    with torch.no_grad():
        return model.double()(images, [(SIZE, SIZE)] * 2)


def load(kind: str, folder: str, **more) -> nn.Module:
    teacher = Teacher(dict(type=f'mmdist.{kind}', name=folder, **more))
    model = teacher.build().eval()
    assert model.class_names == tuple(NAMES.values())
    return model


@pytest.mark.parametrize('name', SEGMENTORS)
def test_a_segmentor_gives_what_its_own_pipeline_gives(name, saved):
    folder = saved(SEGMENTORS[name], 'SegformerImageProcessor')
    auto = 'AutoModelForSemanticSegmentation'
    model = load('HFSegmentor', folder)
    if model.gives == 'masks':
        auto = 'AutoModelForUniversalSegmentation'
    _, expected = pipeline(folder, auto)
    found = run(model)
    if model.gives == 'pixels':
        torch.testing.assert_close(found, expected.logits, atol=1e-5, rtol=1e-5)
        return
    masks, classes = found
    torch.testing.assert_close(
        masks, expected.masks_queries_logits, atol=1e-5, rtol=1e-5
    )
    probabilities = expected.class_queries_logits.softmax(-1)
    assert classes.shape[-1] == 3
    torch.testing.assert_close(
        classes.sum(-1), 1 - probabilities[..., -1], atol=1e-5, rtol=1e-5
    )
    torch.testing.assert_close(classes, probabilities[..., :3], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize('name', DETECTORS)
def test_a_detector_gives_what_its_own_pipeline_gives(name, saved):
    """Scores and boxes against the library's own post-processing, unfiltered."""
    folder = saved(DETECTORS[name], 'DetrImageProcessor')
    processor, output = pipeline(folder, 'AutoModelForObjectDetection')
    expected = processor.post_process_object_detection(
        output, threshold=0.0, target_sizes=[(SIZE, SIZE)] * 2
    )
    model = load('HFDetector', folder)
    found = run(model)
    for (boxes, scores), image, logits in zip(
        found, expected, output.logits, strict=True
    ):
        torch.testing.assert_close(scores, logits, atol=1e-5, rtol=1e-5)
        if model.activation == 'softmax':
            assert scores.shape[1] == 4  # "no object" last
            scores = scores.softmax(1)[:, :-1]
            torch.testing.assert_close(
                scores.amax(1), image['scores'], atol=1e-5, rtol=1e-5
            )
        else:
            assert scores.shape[1] == 3
        torch.testing.assert_close(boxes, image['boxes'], atol=1e-3, rtol=1e-5)


def test_padding_is_masked_and_boxes_refer_to_the_image(saved):
    """Of an image that fills half of the batch, DETR sees that half alone."""
    model = load('HFDetector', saved(DETECTORS['detr'], 'DetrImageProcessor'))
    images = torch.randn(1, 3, SIZE, SIZE)
    with torch.no_grad():
        ((boxes, _),) = model(images, [(SIZE, SIZE // 2)])
        ((whole, _),) = model(images, [(SIZE, SIZE)])
        mask = torch.ones(1, SIZE, SIZE, dtype=torch.long)
        mask[..., SIZE // 2 :] = 0
        x, y, w, h = model.model(images, pixel_mask=mask).pred_boxes[0].unbind(-1)
    scale = torch.tensor([SIZE / 2, SIZE, SIZE / 2, SIZE])
    expected = torch.stack([x - w / 2, y - h / 2, x + w / 2, y + h / 2], -1) * scale
    torch.testing.assert_close(boxes, expected)
    assert not torch.allclose(boxes, whole)


@pytest.mark.parametrize('name', ['beit', 'dpt', 'eomt'])
def test_a_model_of_one_size_gets_the_batch_resized(name, saved):
    model = load('HFSegmentor', saved(SEGMENTORS[name], 'SegformerImageProcessor'))
    with torch.no_grad():
        assert model(torch.randn(1, 3, 40, 72), [(40, 72)]) is not None
    assert model.size == (SIZE, SIZE)


# ---- a step of distillation ------------------------------------------------------


def distil(student, kind: str, folder: str, scope: str, **more) -> nn.Module:
    torch.manual_seed(0)
    logging.getLogger('mmengine').setLevel(logging.ERROR)
    with DefaultScope.overwrite_default_scope(scope):
        model = MODELS.build(
            dict(
                type='mmdist.Distiller',
                student=student,
                teacher=dict(
                    config=dict(type=f'mmdist.{kind}', name=folder, **more),
                    class_match='shared',
                ),
            )
        )
        model.init_weights()
    (teacher,) = model.teachers.values()
    return model.train(), teacher


def gradient(model: nn.Module, losses: dict) -> float:
    assert losses['loss_dist'].item() > 0
    losses['loss_dist'].backward()
    grads = [p.grad.norm() for p in model.parameters() if p.grad is not None]
    assert torch.stack(grads).isfinite().all()
    return torch.stack(grads).norm().item()


@pytest.mark.parametrize(
    ('student', 'teacher'),
    [
        ('pspnet/pspnet_r18-d8_4xb2-80k_cityscapes-512x1024', 'segformer'),
        ('segformer/segformer_mit-b0_8xb1-160k_cityscapes', 'mask2former'),
    ],
)
def test_it_teaches_a_segmentor(student, teacher, saved):
    folder = saved(SEGMENTORS[teacher], 'SegformerImageProcessor')
    width = 1 if 'mit-b0' in student else 1 / 8
    model, guest = distil(zoo_model(student, width), 'HFSegmentor', folder, 'mmseg')
    guest.classes = guest.match_classes([*['x'] * 16, 'sky', 'road', 'car'])
    assert guest.classes.student == [(16,), (17,), (18,)]
    losses = model(**make_batch(19), mode='loss')
    assert gradient(model, losses) > 1e-6


def test_it_teaches_a_detector(saved):
    folder = saved(DETECTORS['rt_detr'], 'DetrImageProcessor')
    student = model_config('retinanet/retinanet_r18_fpn_1x_coco.py')
    model, guest = distil(student, 'HFDetector', folder, 'mmdet')
    model.distill['dist'].min_iou = 0.0
    guest.classes = guest.match_classes(['car', *['x'] * 78, 'sky'])
    assert gradient(model, model(**batch(model), mode='loss')) > 1e-6


def test_grounding_dino_detects_what_prompts_say(saved):
    """The score of a prompt is that of its best token; its boxes are looked up."""
    folder = saved(grounding_dino, 'GroundingDinoImageProcessor')
    tokenizer(folder, ['red', 'car', 'person', 'drone'])
    student = model_config('retinanet/retinanet_r18_fpn_1x_coco.py')
    prompts = ['person', 'red car', 'drone']
    model, guest = distil(student, 'HFDetector', folder, 'mmdet', prompts=prompts)
    names = ['drone', 'person', *['x'] * 77, 'red car']
    guest.classes = guest.match_classes(names)
    model.distill['dist'].min_iou = 0.0
    assert gradient(model, model(**batch(model), mode='loss')) > 1e-6

    detector = guest.model
    text = transformers.AutoTokenizer.from_pretrained(folder)
    expected = text('person. red car. drone.', return_tensors='pt').input_ids
    assert torch.equal(detector.text, expected)
    images = torch.randn(1, 3, SIZE, SIZE)
    with torch.no_grad():
        ((_, scores),) = detector(images, [(SIZE, SIZE)])
        output = detector.model(pixel_values=images, input_ids=expected)
    # [CLS] person . red car . drone . [SEP]
    tokens = output.logits[0].sigmoid().numpy()
    by_prompt = [tokens[:, [1]], tokens[:, [3, 4]], tokens[:, [6]]]
    np.testing.assert_allclose(
        scores.sigmoid(), np.stack([t.max(1) for t in by_prompt], 1), atol=1e-5
    )


def test_oneformer_is_told_its_task(saved):
    folder = saved(oneformer, 'SegformerImageProcessor')
    words = ['the', 'task', 'is', 'semantic', 'instance']
    tokenizer(folder, words)
    model = load('HFSegmentor', folder)
    tokens = transformers.AutoTokenizer.from_pretrained(folder)
    masks, _ = run(model)
    for task, same in (('semantic', True), ('instance', False)):
        text = tokens(
            f'the task is {task}',
            padding='max_length',
            max_length=12,
            return_tensors='pt',
        )
        with torch.no_grad():
            output = model.model(
                as_of_the_student(model).double(),
                task_inputs=text.input_ids.expand(2, -1).double(),
            )
        assert torch.allclose(masks, output.masks_queries_logits) == same


# ---- mistakes --------------------------------------------------------------------


def test_a_missing_model_stops_before_the_first_step(tmp_path):
    for name in (str(tmp_path / 'none'), 'nobody/nothing'):
        with pytest.raises(FileNotFoundError, match='save_pretrained'):
            Teacher(dict(type='mmdist.HFSegmentor', name=name)).build()


def test_weights_that_are_not_there_are_an_error(saved):
    """transformers alone would initialise them at random and warn."""
    folder = saved(SEGMENTORS['segformer'], 'SegformerImageProcessor')
    model = transformers.SegformerModel.from_pretrained(folder)
    config = transformers.AutoConfig.from_pretrained(folder)
    model.save_pretrained(folder)
    config.save_pretrained(folder)
    with pytest.raises(RuntimeError, match=r'missing_keys.*decode_head'):
        Teacher(dict(type='mmdist.HFSegmentor', name=folder)).build()


def test_other_kinds_of_models_are_refused(saved):
    folder = saved(DETECTORS['yolos'], 'DetrImageProcessor')
    with pytest.raises(ValueError, match=r"is a 'yolos'.*segformer"):
        Teacher(dict(type='mmdist.HFSegmentor', name=folder)).build()
    with pytest.raises(ValueError, match='takes no `prompts`'):
        Teacher(dict(type='mmdist.HFDetector', name=folder, prompts=['a'])).build()


def test_without_transformers_only_these_teachers_are_missing(monkeypatch):
    """mmdist itself neither needs nor imports it."""
    monkeypatch.setitem(sys.modules, 'transformers', None)
    with pytest.raises(ImportError, match=r'pip install mmdist\[hf\]'):
        Teacher(dict(type='mmdist.HFSegmentor', name='a')).build()
    code = 'import sys; sys.modules["transformers"] = None; import mmdist.teachers'
    assert subprocess.run([sys.executable, '-W', 'ignore', '-c', code]).returncode == 0
