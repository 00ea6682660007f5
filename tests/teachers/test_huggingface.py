"""Teachers from Hugging Face transformers, with random weights saved to a folder."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from builders import quick_or_slow, slow
from foreign_pairs import (
    PSPNET,
    RETINANET,
    as_of_a_student,
    check_gradient,
    distil,
    pictures,
)
from hf_models import (
    DETECTORS,
    NAMES,
    SEGMENTORS,
    SIZE,
    grounding_dino,
    mm_grounding_dino,
    oneformer,
    save_model,
    tokenizer,
    transformers,
)
from mmdet.datasets import CocoDataset
from safetensors.torch import load_file, save_file
from torch import nn

from mmdist.comparisons import detections
from mmdist.teachers import Teacher, huggingface


@pytest.fixture(autouse=True)
def unsure(monkeypatch):
    """Keep low scores: random weights give no high ones."""
    monkeypatch.setattr(detections, 'MIN_SCORE', 0.0)


@pytest.fixture
def saved(tmp_path_factory):
    """Save a random model and its image processor; returns the folder."""
    return lambda make, processor: save_model(
        make, processor, tmp_path_factory.mktemp('hf')
    )


FILL = list(map(str, range(80)))  # classes that the teacher does not know
# Several kinds share an image processor.
PROCESSORS = {
    **dict.fromkeys(('detr', 'table-transformer'), 'DetrImageProcessor'),
    **dict.fromkeys(('conditional_detr', 'dab-detr'), 'ConditionalDetrImageProcessor'),
    **dict.fromkeys(('rt_detr', 'rt_detr_v2', 'd_fine'), 'RTDetrImageProcessor'),
    'deformable_detr': 'DeformableDetrImageProcessor',
    'yolos': 'YolosImageProcessor',
}


SQUARE = [(SIZE, SIZE)] * 2  # of the image processor


def pipeline(
    folder: str, auto: str, images: list[np.ndarray], dtype: torch.dtype = torch.float64
):
    """The library's own image processor, and its model's output for the images."""
    model = getattr(transformers, auto).from_pretrained(folder).to(dtype).eval()
    processor = transformers.AutoImageProcessor.from_pretrained(folder)
    inputs = processor(images=images, do_resize=False, return_tensors='pt')
    inputs['pixel_values'] = inputs['pixel_values'].to(dtype)
    with torch.no_grad():
        return processor, model(**inputs)


def run(
    model: nn.Module, images: list[np.ndarray], dtype: torch.dtype = torch.float64
) -> tuple:
    """The teacher's answer for the same images and dtype as the pipeline's."""
    batch = as_of_a_student(model, images).to(dtype)
    with torch.no_grad():
        return model.to(dtype)(batch, [image.shape[:2] for image in images])


def sees(of_two_images: Sequence[torch.Tensor]) -> bool:
    """Whether the random model answers differently for another image."""
    return (of_two_images[0] - of_two_images[1]).abs().max().item() > 1e-2


def edit(folder: str, name: str, **changes) -> None:
    """Change entries of a JSON file."""
    path = Path(folder, name)
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def build(kind: str, name: str, **more) -> nn.Module:
    return Teacher(dict(type=f'mmdist.{kind}', name=name, **more)).build()


def load(kind: str, folder: str, **more) -> nn.Module:
    model = build(kind, folder, **more).eval()
    assert model.class_names == tuple(NAMES.values())
    return model


# One quick model for each kind of handling; the others are slow.
FEW_SEGMENTORS = ('segformer', 'dpt', 'mask2former')
FEW_DETECTORS = ('detr', 'deformable_detr', 'rt_detr')


@pytest.mark.parametrize('name', quick_or_slow(FEW_SEGMENTORS, SEGMENTORS))
def test_a_segmentor_gives_what_its_own_pipeline_gives(name, saved):
    folder = saved(SEGMENTORS[name], 'SegformerImageProcessor')
    auto = 'AutoModelForSemanticSegmentation'
    model = load('HFSegmentor', folder)
    if model.gives == 'masks':
        auto = 'AutoModelForUniversalSegmentation'
    images = pictures(*SQUARE)
    _, expected = pipeline(folder, auto, images)
    found = run(model, images)
    assert sees(found if model.gives == 'pixels' else found[0])
    close = dict(atol=1e-5, rtol=1e-5)
    if model.gives == 'pixels':
        torch.testing.assert_close(found, expected.logits, **close)
        return
    masks, classes = found
    torch.testing.assert_close(masks, expected.masks_queries_logits, **close)
    probabilities = expected.class_queries_logits.softmax(-1)
    torch.testing.assert_close(classes, probabilities[..., :3], **close)


@pytest.mark.parametrize('name', quick_or_slow(FEW_DETECTORS, DETECTORS))
def test_a_detector_gives_what_its_own_pipeline_gives(name, saved):
    """No box is filtered out; models that mask padding get images of two sizes."""
    folder = saved(DETECTORS[name], PROCESSORS[name])
    model = load('HFDetector', folder)
    images = pictures((SIZE, SIZE), (24, 40) if model.takes_mask else (SIZE, SIZE))
    # DAB-DETR computes its position embeddings in float32 only
    dtype = torch.float32 if name == 'dab-detr' else torch.float64
    auto = 'AutoModelForObjectDetection'
    processor, output = pipeline(folder, auto, images, dtype)
    expected = processor.post_process_object_detection(
        output, threshold=0.0, target_sizes=[image.shape[:2] for image in images]
    )
    found = run(model, images, dtype)
    assert all(sees(pair) for pair in zip(*found, strict=True))
    for (boxes, scores), image in zip(found, expected, strict=True):
        if model.activation == 'softmax':
            assert scores.shape == (10, 4)  # "no object" last
            scores, labels = scores.softmax(1)[:, :-1].max(1)
        else:
            assert scores.shape == (10, 3)
            scores, best = scores.sigmoid().flatten().sort(descending=True)
            best = best[: len(image['scores'])]
            scores, labels, boxes = scores[: len(best)], best % 3, boxes[best // 3]
        torch.testing.assert_close(scores, image['scores'], atol=1e-5, rtol=0)
        assert torch.equal(labels, image['labels'])
        close = dict(atol=1e-5 * SIZE, rtol=0)  # relative to the image
        torch.testing.assert_close(boxes, image['boxes'], **close)


@pytest.mark.parametrize('name', ['dpt', *slow(['beit', 'data2vec-vision', 'eomt'])])
def test_a_model_of_one_size_gets_the_batch_resized(name, saved):
    model = load('HFSegmentor', saved(SEGMENTORS[name], 'SegformerImageProcessor'))
    with torch.no_grad():
        assert model(torch.randn(1, 3, 40, 72), [(40, 72)]) is not None
    assert model.size == (SIZE, SIZE)


# ---- a step of distillation ------------------------------------------------------


def taught(student: str, names: list[str], kind: str, folder: str, **more):
    """A student with these classes, and its teacher, which knows some of them."""
    config = dict(type=f'mmdist.{kind}', name=folder, **more)
    model = distil(student, config, class_match='shared')
    model.teacher.classes = model.teacher.match_classes(names)
    return model, model.teacher


@pytest.mark.parametrize(
    ('student', 'teacher'),
    [
        ('segformer/segformer_mit-b0_8xb1-160k_cityscapes', 'mask2former'),
        *slow([(PSPNET, 'segformer')]),
    ],
)
def test_it_teaches_a_segmentor(student, teacher, saved):
    folder = saved(SEGMENTORS[teacher], 'SegformerImageProcessor')
    names = [*FILL[:16], 'sky', 'road', 'car']
    model, guest = taught(student, names, 'HFSegmentor', folder)
    assert guest.classes.student == [(16,), (17,), (18,)]
    check_gradient(model)


def test_it_teaches_a_detector(saved):
    folder = saved(DETECTORS['rt_detr'], 'RTDetrImageProcessor')
    model, _ = taught(RETINANET, ['car', *FILL[:78], 'sky'], 'HFDetector', folder)
    check_gradient(model)


@pytest.mark.parametrize('make', [grounding_dino, *slow([mm_grounding_dino])])
def test_grounding_dino_detects_what_prompts_say(make, saved):
    """A prompt's score is the score of its best token."""
    folder = saved(make, 'GroundingDinoImageProcessor')
    tokenizer(folder, ['red', 'car', 'person', 'drone'])
    prompts = ['person', 'red car', 'drone']
    names = ['drone', 'person', *FILL[:77], 'red car']
    model, guest = taught(RETINANET, names, 'HFDetector', folder, prompts=prompts)
    check_gradient(model)

    images = pictures((SIZE, SIZE), (24, 40))
    processor = transformers.GroundingDinoProcessor(
        transformers.AutoImageProcessor.from_pretrained(folder),
        transformers.AutoTokenizer.from_pretrained(folder),
    )
    inputs = processor(
        images, ['person. red car. drone.'] * 2, do_resize=False, return_tensors='pt'
    )
    assert torch.equal(guest.model.text['input_ids'], inputs['input_ids'][:1])
    inputs['pixel_values'] = inputs['pixel_values'].double()
    with torch.no_grad():
        output = guest.model.model.double()(**inputs)
    expected = processor.post_process_grounded_object_detection(
        output, threshold=0.0, target_sizes=[image.shape[:2] for image in images]
    )
    for n, (boxes, scores) in enumerate(run(guest.model, images)):
        # [CLS] person . red car . drone . [SEP]
        tokens = output.logits[n].sigmoid().numpy()
        by_prompt = [tokens[:, [1]], tokens[:, [3, 4]], tokens[:, [6]]]
        np.testing.assert_allclose(
            scores.sigmoid(), np.stack([t.max(1) for t in by_prompt], 1), atol=1e-5
        )
        close = dict(atol=1e-5 * SIZE, rtol=0)
        torch.testing.assert_close(boxes, expected[n]['boxes'], **close)


def test_oneformer_is_told_its_task(saved):
    """Its image processor names a file in another repository, which is not needed."""
    folder = saved(oneformer, 'OneFormerImageProcessor')
    edit(folder, 'preprocessor_config.json', class_info_file='ade20k_panoptic.json')
    words = ['the', 'task', 'is', 'semantic', 'instance']
    tokenizer(folder, words)
    model = load('HFSegmentor', folder)
    tokens = transformers.AutoTokenizer.from_pretrained(folder)
    images = pictures(*SQUARE)
    masks, _ = run(model, images)
    for task, same in (('semantic', True), ('instance', False)):
        padded = dict(padding='max_length', max_length=12, return_tensors='pt')
        ids = tokens(f'the task is {task}', **padded).input_ids.expand(2, -1).double()
        with torch.no_grad():
            output = model.model(as_of_a_student(model, images), task_inputs=ids)
        assert torch.allclose(masks, output.masks_queries_logits) == same


# ---- published checkpoints -------------------------------------------------------


@pytest.mark.parametrize(
    ('name', 'key'),
    [
        ('detr', 'backbone.conv_encoder.model.layer4.0.bn.num_batches_tracked'),
        ('mask2former', 'pixel_level_module.encoder.self.relative_position_index'),
        ('oneformer', 'text_mapper.prompt_ctx.weight'),
    ],
)
def test_what_no_prediction_needs_may_be_in_the_file(name, key, saved):
    """Published checkpoints hold such keys, which older versions of the models had."""
    make = {**SEGMENTORS, **DETECTORS, 'oneformer': oneformer}[name]
    folder = saved(make, 'DetrImageProcessor')
    tokenizer(folder, [])
    path = Path(folder, 'model.safetensors')
    state = {**load_file(path), f'model.{key}': torch.zeros(1)}
    save_file(state, path, metadata={'format': 'pt'})
    load('HFDetector' if name == 'detr' else 'HFSegmentor', folder)


def test_weights_of_half_precision_are_loaded_as_float32(saved):
    """The images are float32; `teacher.dtype` chooses half precision."""
    half = saved(lambda: SEGMENTORS['segformer']().half(), 'SegformerImageProcessor')
    model = load('HFSegmentor', half)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    with torch.no_grad():
        assert model(torch.randn(1, 3, SIZE, SIZE), [(SIZE, SIZE)]).isfinite().all()


def test_classes_of_coco_are_found_among_the_91_ids_of_detr(tmp_path):
    """DETR's columns are COCO's ids; all unused ids are named 'N/A'."""
    names = CocoDataset.METAINFO['classes']
    unused = (0, 12, 26, 29, 30, 45, 66, 68, 69, 71, 83)
    ids = [i for i in range(91) if i not in unused]
    labels = dict.fromkeys(range(91), 'N/A') | dict(zip(ids, names, strict=True))
    folder = save_model(DETECTORS['detr'], 'DetrImageProcessor', tmp_path, labels)
    teacher = Teacher(dict(type='mmdist.HFDetector', name=folder))
    teacher.class_names = teacher.build().class_names
    assert len(set(teacher.class_names)) == 91
    match = teacher.match_classes(names)
    assert match.student is None
    assert match.teacher == [(i,) for i in ids]


# ---- mistakes --------------------------------------------------------------------


def test_a_missing_model_stops_before_the_first_step(tmp_path):
    for name in (str(tmp_path / 'none'), 'nobody/nothing'):
        with pytest.raises(FileNotFoundError, match='save_pretrained'):
            build('HFSegmentor', name)
    with pytest.raises(ValueError, match=r"`teacher.config`: .*'nme'.*Did you mean"):
        Teacher(dict(type='mmdist.HFSegmentor', nme='a')).build()


def test_weights_that_do_not_fit_are_an_error(saved):
    """transformers itself would initialise them at random and only warn."""
    folder, bare = (
        saved(SEGMENTORS['segformer'], 'SegformerImageProcessor') for _ in range(2)
    )
    config = transformers.AutoConfig.from_pretrained(bare)
    transformers.SegformerModel.from_pretrained(bare).save_pretrained(bare)
    config.save_pretrained(bare)
    edit(folder, 'config.json', id2label={0: 'a', 1: 'b'}, label2id={'a': 0, 'b': 1})
    detr = saved(DETECTORS['detr'], 'DetrImageProcessor')
    edit(detr, 'config.json', decoder_layers=1)
    for kind, name, message in (
        ('HFSegmentor', bare, r'missing_keys.*decode_head'),
        ('HFSegmentor', folder, r'mismatched_keys.*classifier'),
        ('HFDetector', detr, r'unexpected_keys.*decoder\.layers\.1'),
    ):
        with pytest.raises(RuntimeError, match=message):
            build(kind, name)


def test_prompts_that_do_not_fit_are_an_error(saved):
    """Grounding DINO itself would silently drop the last ones."""
    folder = saved(grounding_dino, 'GroundingDinoImageProcessor')
    tokenizer(folder, ['person'])
    build('HFDetector', folder, prompts=['person'] * 15)
    with pytest.raises(ValueError, match=r'34 tokens, but .* takes at most 32'):
        build('HFDetector', folder, prompts=['person'] * 16)


def test_other_kinds_of_models_are_refused(saved):
    folder = saved(DETECTORS['yolos'], 'YolosImageProcessor')
    with pytest.raises(ValueError, match=r"is a 'yolos'.*segformer"):
        build('HFSegmentor', folder)
    with pytest.raises(ValueError, match='takes no `prompts`'):
        build('HFDetector', folder, prompts=['a'])


def test_without_transformers_only_these_teachers_are_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, 'transformers', None)
    with pytest.raises(ImportError, match=r'pip install mmdist\[hf\]'):
        build('HFSegmentor', 'a')
    assert 'transformers' not in vars(huggingface)  # at the top of the module
