"""The Python of README and docs: configs train a step at a small size, code runs.

An incomplete config is merged into a small pair. `RUN_BY` lists what other tests run.
"""

from __future__ import annotations

import ast
import inspect
import itertools
import re
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from det_zoo import FAMILIES, batch, build_pair
from docs_blocks import PAGES, ROOT, blocks, code, only
from mmdet.utils import register_all_modules as register_mmdet
from mmengine.config import Config
from mmengine.registry import HOOKS, VISBACKENDS, DefaultScope
from mmseg.utils import register_all_modules as register_mmseg
from one_step import train_a_step
from scipy.special import expit
from scipy.stats import pearsonr
from segmentors import distilled, make_batch, zoo_model

from mmdist.registry import MODELS
from mmdist.step import Step
from mmdist.teachers import ClassMatch

# Page and words of a block: what runs it. Without a file name, it is a test below.
RUN_BY = {
    ('README.md', 'retinanet_r18_fpn_1x_coco.py'): 'test_readme_pair.py',
    ('docs/stored_teachers.md', ''): 'tools/test_stored_teachers_page.py',
    ('docs/unlabelled.md', 'mmdist.MixedSampler'): 'data/test_unlabelled_images.py',
    ('docs/use_the_student.md', ''): 'tools/test_use_the_student.py',
    ('docs/teachers.md', 'class TorchvisionRetinaNet'): 'the config after it',
    ('docs/own_comparison.md', 'Centerness'): 'test_the_own_comparison',
    ('docs/logging.md', 'vis_backends'): 'the last test here',
}
# The pair that a `distill` is tried on, by the first of these types that it has.
PAIRS = {
    'BoxDistributions': ('GFL', 'GFL'),
    'Masks': ('Mask R-CNN', 'Cascade Mask R-CNN'),
    'RoILogits': ('Faster R-CNN', 'Cascade R-CNN'),
    'QueryLogits': ('Sparse R-CNN', 'Sparse R-CNN'),
    'Detections': ('RetinaNet', 'Faster R-CNN'),
    'mmdist.': ('RetinaNet', 'RetinaNet'),
}
PYTHON = [
    block
    for page in PAGES
    for block in blocks(page, 'python')
    if not any(page == p and words in block.code for p, words in RUN_BY)
]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> Path:
    """The working directory, from which modules can be imported."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    register_mmdet(init_default_scope=False)
    register_mmseg(init_default_scope=False)
    return tmp_path


def is_config(text: str) -> bool:
    """Whether the text is only settings: a config file, or arguments of a dict."""
    try:
        body = ast.parse(text).body
    except SyntaxError:
        return True  # arguments, which end in a comma
    names = [node.targets[0] for node in body if isinstance(node, ast.Assign)]
    return len(names) == len(body) and all(isinstance(n, ast.Name) for n in names)


@pytest.mark.parametrize('block', PYTHON, ids=str)
def test_code_runs_and_a_config_trains_a_step(block, folder):
    text = textwrap.dedent(block.code)
    if not is_config(text):
        exec(compile(text, str(block), 'exec'), {'__name__': '__main__'})
        return
    if text.strip().endswith(','):
        text = f'globals().update(dict(\n{text}\n))'  # arguments
    Path('config.py').write_text(text)
    if 'Torchvision' in text:
        pytest.importorskip('torchvision')
        teacher = only(code(block.page), 'class TorchvisionRetinaNet')
        Path('torchvision_teacher.py').write_text(teacher)
    config = Config.fromfile('config.py')
    with DefaultScope.overwrite_default_scope(config.get('default_scope')):
        for hook in config.get('custom_hooks', []):
            hook.pop('priority', None)  # as a Runner does
            HOOKS.build(hook)
    if 'model' in config:
        assert len(block.code.splitlines()) <= 15
        train_a_step(config, folder)
    elif 'distill' in config:
        is_compared(config.distill)
    elif 'student' not in config:  # teachers/test_start_from_the_teacher.py has it
        assert set(config) == {'custom_hooks'}, f'nobody knows where {block} belongs'


def is_compared(distill: dict) -> None:
    """Check that a `distill` gives each of its losses on a pair of its kind."""
    types = str(distill)
    if 'SegLogits' in types:
        student = zoo_model('deeplabv3/deeplabv3_r18')
        with DefaultScope.overwrite_default_scope('mmseg'):
            model = distilled(student, student, distill=distill)
        data = make_batch(19)
    else:
        pair = next(pair for kind, pair in PAIRS.items() if kind in types)
        model = build_pair(*(FAMILIES[x] for x in pair), distill, factors=(8, 8))
        data = batch(model)
    losses = model(**data, mode='loss')
    for name in distill:
        found = [v for k, v in losses.items() if re.match(rf'loss_{name}(_|$)', k)]
        assert found
        values = itertools.chain(*(v if isinstance(v, list) else [v] for v in found))
        assert all(value.isfinite().all() for value in values)


# ---- docs/own_comparison.md ----------------------------------------------------------


def test_the_own_comparison(folder, monkeypatch):
    """Its loss equals the one by hand, and the attributes that the page names exist."""
    monkeypatch.setattr(MODELS, '_module_dict', MODELS.module_dict.copy())
    for block in blocks('docs/own_comparison.md', 'python'):
        assert len(block.code.splitlines()) <= 30
        Path(block.file).write_text(block.code)
    config = Config.fromfile('distilled.py').model
    sys.modules.pop('own_comparisons')
    with pytest.raises(ValueError, match='Centerness cannot compare a RetinaNet'):
        build_pair(FAMILIES['RetinaNet'], distill=config.distill)
    teacher = config.teacher.config.removeprefix('mmdet::')
    model = build_pair(FAMILIES['ATSS'], teacher, config.distill)
    data = batch(model)
    outputs = []
    hook = model.bbox_head.register_forward_hook(lambda *a: outputs.append(a[-1]))
    losses = model(**data, mode='loss')
    hook.remove()
    step = Step(model, model.teacher, ClassMatch(), **data)
    with torch.no_grad():
        outputs.append(step.teacher_model.bbox_head(step.teacher_features))
    expected, counted, total = 0.0, 0, 0
    (_, _, student), (scores, _, taught) = outputs
    for s, score, t in zip(student, scores, taught, strict=True):
        score, s, t = (x.detach().double().numpy() for x in (score, s, t))
        sure = expit(score).max(1) > 0.05
        counted, total = counted + sure.sum(), total + sure.size
        s, t = expit(s[:, 0][sure]), expit(t[:, 0][sure])
        # a single row has no correlation
        expected += 1 - (pearsonr(s, t)[0] if len(s) > 1 else 0) if len(s) else 0
    assert 0 < counted < total
    assert losses['loss_centre'].item() == pytest.approx(expected, rel=1e-4)
    assert {'loss_dist', 'dist_inter', 'dist_intra', 'centre_intra'} <= losses.keys()
    losses['loss_centre'].backward()
    assert model.backbone.layer4[0].downsample[0].weight.grad.abs().sum() > 0

    text = (ROOT / 'docs/own_comparison.md').read_text()
    assert set(re.findall(r'\bstep\.(\w+)', text)) <= set(dir(step))


# ---- docs/logging.md -----------------------------------------------------------------


@pytest.mark.parametrize('text', code('docs/logging.md'), ids=['TensorBoard', 'wandb'])
def test_logging_is_configured_as_mmengine_has_it(text, seg_config):
    """`test_distiller.py` tests what is logged."""
    Path('my_pair.py').write_text(seg_config)
    Path('config.py').write_text(text)
    visualizer = Config.fromfile('config.py').visualizer
    assert visualizer.type == 'SegLocalVisualizer'
    local, backend = visualizer.vis_backends
    assert local.type == 'LocalVisBackend'
    inspect.signature(VISBACKENDS.get(backend.pop('type'))).bind(
        save_dir='.', **backend
    )
