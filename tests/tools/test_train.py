"""Training and testing from the command line, by our tools and the libraries' own."""

from __future__ import annotations

import sys
from pathlib import Path

import mmdet
import mmengine
import mmseg
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import init_default_scope
from pairs import SLOW, write_pair, write_weights
from processes import output_of, run_script
from tiny import DET_CLASSES, SEG_CLASSES

REPO = Path(__file__).parents[2]
TOOLS = dict(
    ours=REPO / 'tools',
    det=Path(mmdet.__file__).parent / '.mim' / 'tools',
    seg=Path(mmseg.__file__).parent / '.mim' / 'tools',
)


def run(script: Path, *args, cwd: Path, ok: bool = True, fresh: bool = False) -> str:
    """The output of a script; a ``fresh`` interpreter has not imported mmdist."""
    if fresh:
        return output_of(sys.executable, script, *args, cwd=cwd)
    done = run_script(script, *args, cwd=cwd)
    assert (done.returncode == 0) == ok, done.stdout[-4000:]
    return done.stdout


@pytest.fixture(
    scope='module', params=['det', pytest.param('seg', marks=pytest.mark.slow)]
)
def family(request) -> str:
    return request.param


@pytest.fixture(scope='module')
def folder(family, tmp_path_factory, request) -> Path:
    """A folder with a student, its distillation config, and a teacher's weights."""
    folder = tmp_path_factory.mktemp(family)
    write_pair(folder, request.getfixturevalue(f'{family}_config'))
    write_weights(folder)
    return folder


@pytest.mark.parametrize('tools', ['ours', SLOW('its own')])
def test_distilled_training_and_testing(family, folder, tools):
    tools = TOOLS['ours' if tools == 'ours' else family]
    work_dir = folder / f'work_{tools.parts[-3]}'
    log = run(
        tools / 'train.py', 'pair.py', '--work-dir', work_dir,
        cwd=folder, fresh=tools != TOOLS['ours'],
    )  # fmt: skip
    for logged in ('loss_dist:', 'dist_inter:', 'dist_intra:'):
        assert logged in log
    checkpoint = (work_dir / 'last_checkpoint').read_text()

    # Neither the teacher's weights nor its config are needed to test.
    hidden = folder / 'hidden.pth'
    (folder / 'teacher.pth').rename(hidden)
    try:
        log = run(
            tools / 'test.py', 'pair.py', checkpoint, '--cfg-options',
            'model.teacher.config=nowhere.py', '--work-dir', work_dir, cwd=folder,
        )  # fmt: skip
        assert 'Load checkpoint' in log
        log = run(
            tools / 'train.py', 'pair.py', '--work-dir', work_dir / 'no',
            cwd=folder, ok=False,
        )  # fmt: skip
        assert "checkpoint 'teacher.pth' does not exist" in log
        assert 'Iter(train)' not in log
    finally:
        hidden.rename(folder / 'teacher.pth')

    # The trained model is the plain student.
    init_default_scope({'det': 'mmdet', 'seg': 'mmseg'}[family])
    plain = mmengine.registry.MODELS.build(Config.fromfile(folder / 'student.py').model)
    state = torch.load(checkpoint, map_location='cpu', weights_only=False)['state_dict']
    plain.load_state_dict(state, strict=True)


APIS = """
import sys
import numpy as np
image = np.zeros((96, 128, 3), np.uint8)
family, *configs = sys.argv[1:]
if family == 'det':
    from mmdet.apis import inference_detector, init_detector
    for config in configs:
        model = init_detector(config, 'trained.pth', device='cpu')
        assert 'pred_instances' in inference_detector(model, image)
        assert model.dataset_meta['classes'] == ('person', 'car', 'dog')
else:
    from mmseg.apis import inference_model, init_model
    for config in configs:
        model = init_model(config, 'trained.pth', device='cpu')
        assert 'pred_sem_seg' in inference_model(model, image)
"""


@pytest.mark.slow
def test_the_apis_run_what_was_trained(family, folder):
    """In a process that has not imported mmdist."""
    classes = {'det': DET_CLASSES, 'seg': SEG_CLASSES}[family]
    checkpoint = torch.load(folder / 'teacher.pth')
    meta = dict(dataset_meta=dict(classes=classes))
    torch.save(dict(checkpoint, meta=meta), folder / 'trained.pth')
    (folder / 'apis.py').write_text(APIS)
    run(folder / 'apis.py', family, 'student.py', 'pair.py', cwd=folder, fresh=True)


@pytest.mark.parametrize('key', ['tta_model', 'tta_pipeline'])
def test_tta_names_the_keys_that_it_needs(key, run_tool, tmp_path):
    (tmp_path / 'config.py').write_text(f'model, {key} = dict(), dict()\n')
    ran = run_tool('test', 'config.py', 'student.pth', '--tta', status=1)
    assert '--tta needs `tta_model` and `tta_pipeline` in the config.' in ran.said
