"""docs/use_the_student.md, run where mmdist cannot be imported."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

import mmdet.apis
import mmseg.apis
import numpy as np
import pytest
import torch
from builders import distilled_text
from docs_blocks import code, only
from processes import output_of

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / 'docs' / 'use_the_student.md').read_text()
BLOCKS = code('docs/use_the_student.md')
COMPARED = dict(det='adapt=True', seg="adapt=True, student='backbone'")
STEPS = dict(det='train_cfg.max_epochs=1', seg='train_cfg.max_iters=2')
# a part of mmdist that training uses and testing must not
HOOK = "custom_hooks = [dict(type='mmdist.DistillScheduleHook', stop=100)]"
NAMES = dict(det='detector', seg='segmentor')


def run(command: list, folder: Path, path: Path = ROOT) -> str:
    """Run a command in a folder, with ``path`` first on Python's path."""
    python = sys.executable, '-W', 'ignore'
    return output_of(*python, *command, cwd=folder, PYTHONPATH=str(path))


@pytest.fixture(scope='module')
def no_mmdist(tmp_path_factory) -> Path:
    """A folder that, first on Python's path, makes `import mmdist` fail."""
    folder = tmp_path_factory.mktemp('no_mmdist')
    text = "raise ImportError('mmdist is not to be imported')\n"
    (folder / 'mmdist.py').write_text(text)
    with pytest.raises(AssertionError, match='mmdist is not to be imported'):
        run(['-c', 'import mmdist'], folder, folder)
    return folder


def exported(family: str, config: str, data: Path, folder: Path) -> Path:
    """Distil and export a student, under the page's names."""
    os.link(next((data / 'images').glob('*.png')), folder / 'image.png')
    (folder / 'student.py').write_text(config)
    distill = f"dict(mimic=dict(type='mmdist.Features', {COMPARED[family]}))"
    (folder / 'my_pair.py').write_text(
        distilled_text(HOOK, distill, config='student.py', allow_random=True)
    )
    run([ROOT / 'tools/train.py', 'my_pair.py', '--cfg-options', STEPS[family]], folder)
    (checkpoint,) = (folder / 'work_dirs/my_pair').glob('*.pth')
    (command,) = re.findall(r'python (tools/export_student\.py.*)', PAGE)
    command = command.replace('work_dirs/my_pair/epoch_12.pth', str(checkpoint))
    name = NAMES[family]
    tool, *args = command.replace('detector', name).split()
    said = run([ROOT / tool, *args], folder)
    assert 'loads strictly into my_pair.py' in said
    for suffix in ('py', 'pth'):
        (file,) = folder.glob(f'{name}-*.{suffix}')
        assert file.name in said
        os.link(file, folder / f'{name}.{suffix}')
    checkpoint.rename(folder / 'distilled.pth')
    return folder


@pytest.fixture(scope='module')
def det(det_config, coco_root, tmp_path_factory) -> Path:
    # so short a training gives no high scores
    config = det_config.replace('bbox_head=', 'test_cfg=dict(score_thr=0), bbox_head=')
    return exported('det', config, coco_root, tmp_path_factory.mktemp('det'))


@pytest.fixture(scope='module')
def seg(seg_config, seg_root, tmp_path_factory) -> Path:
    return exported('seg', seg_config, seg_root, tmp_path_factory.mktemp('seg'))


def run_block(words: str, more: str, folder: Path, no_mmdist: Path) -> str:
    check = '\nimport sys\nassert "mmdist" not in sys.modules\n'
    (folder / 'block.py').write_text(only(BLOCKS, words) + more + check)
    return run(['block.py'], folder, no_mmdist)


def test_a_detector_predicts(det, no_mmdist):
    save = "\nimport numpy as np\nnp.savez('first.npz', **first)\n"
    run_block('DetInferencer', save, det, no_mmdist)
    # the distilled model's own result, from the training's checkpoint
    model = mmdet.apis.init_detector(
        str(det / 'student.py'), str(det / 'distilled.pth'), device='cpu'
    )
    expected = mmdet.apis.inference_detector(model, str(det / 'image.png'))
    expected = expected.pred_instances
    found = np.load(det / 'first.npz')
    assert len(found['scores']) > 0
    np.testing.assert_allclose(found['bboxes'], expected.bboxes, rtol=1e-4, atol=1e-3)
    np.testing.assert_array_equal(found['labels'], expected.labels)
    assert (det / 'predictions/vis/image.png').is_file()


def expected_map(folder: Path) -> torch.Tensor:
    """The distilled segmentor's own label map, from the training's checkpoint."""
    model = mmseg.apis.init_model(
        str(folder / 'student.py'), str(folder / 'distilled.pth'), device='cpu'
    )
    # this API reads `test_pipeline` instead, which the tiny config does not change
    model.cfg.test_pipeline = model.cfg.test_dataloader.dataset.pipeline
    found = mmseg.apis.inference_model(model, str(folder / 'image.png'))
    return found.pred_sem_seg.data[0]


def test_a_segmentor_predicts(seg, no_mmdist):
    save = "\nimport numpy as np\nnp.save('labels.npy', labels)\n"
    run_block('MMSegInferencer', save, seg, no_mmdist)
    np.testing.assert_array_equal(np.load(seg / 'labels.npy'), expected_map(seg))
    assert (seg / 'predictions/vis/image.png').is_file()


@pytest.mark.parametrize('family', NAMES)
def test_the_librarys_own_tool_tests_with_augmentation(family, request, no_mmdist):
    folder = request.getfixturevalue(family)
    library = {'det': mmdet, 'seg': mmseg}[family]
    commands = re.findall(r'python (mm\w+/\.mim/tools/test\.py) (.*)', PAGE)
    (args,) = [args for tool, args in commands if tool.startswith(library.__name__)]
    tool = Path(library.__file__).parent / '.mim/tools/test.py'
    log = run([tool, *args.split()], folder, no_mmdist)
    assert {'det': 'DetTTAModel', 'seg': 'SegTTAModel'}[family] in log
    assert {'det': 'coco/bbox_mAP:', 'seg': 'mIoU:'}[family] in log


def test_onnx_says_what_the_segmentor_says(seg, no_mmdist):
    save = "\nnp.save('onnx.npy', logits.argmax(1)[0])\n"
    run_block('onnxruntime', save, seg, no_mmdist)
    same = np.load(seg / 'onnx.npy') == expected_map(seg).numpy()
    assert same.mean() > 0.999


def test_every_block_of_the_page_is_run():
    assert len(BLOCKS) == 3
