"""Bad input: the rows of docs/reliability.md that no other test covers."""

from __future__ import annotations

import resource
from pathlib import Path

import pytest
import torch
from builders import build, dataset_batch, losses_of
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from mmengine.runner import Runner
from processes import in_process
from watch import WatchHook

from mmdist.checkpoint import load_checkpoint
from mmdist.work_dir import last_whole_checkpoint


def assert_trains(model, data: dict) -> dict:
    """Assert that losses and gradients of a step are finite; returns the losses."""
    losses = losses_of(model, data)
    losses = {k: sum(v) if isinstance(v, list) else v for k, v in losses.items()}
    assert all(value.isfinite().all() for value in losses.values()), losses
    sum(v for k, v in losses.items() if 'loss' in k).backward()
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    assert grads
    assert all(grad.isfinite().all() for grad in grads)
    return losses


# ---- the teacher ---------------------------------------------------------------------


def test_a_teacher_with_nan_in_its_weights(make_config, tmp_path, family):
    cfg = make_config(family, tmp_path)
    init_default_scope(cfg.default_scope)
    state = MODELS.build(cfg.model.student).state_dict()
    state['backbone.layer1.0.conv1.weight'][0, 0] = float('nan')
    cfg.model.teacher.checkpoint = str(tmp_path / 'teacher.pth')
    torch.save(dict(state_dict=state), tmp_path / 'teacher.pth')
    with pytest.raises(RuntimeError, match=r'NaN or infinite .*layer1\.0\.conv1'):
        build(cfg)


@pytest.mark.parametrize('whose', ['images', 'teacher', 'student'])
def test_nan_is_not_hidden(make_config, tmp_path, family, whose):
    """Not even by losses that mask and clamp."""
    cfg = make_config(family, tmp_path)
    model, data = build(cfg), dataset_batch(cfg)
    if whose == 'images':
        data['inputs'] = [x.float() for x in data['inputs']]
        data['inputs'][0][0, 50, 60] = float('nan')
    else:  # a teacher that overflows, in half precision for instance
        broken = model if whose == 'student' else model.teacher.model
        head = broken.bbox_head if family == 'det' else broken.decode_head
        next(head.parameters()).data.fill_(float('nan'))
    if whose == 'student':
        error, message = RuntimeError, 'loss_dist.* became NaN'
    else:
        error, message = ValueError, r"teacher's logits .* NaN or inf.*images"
    with pytest.raises(error, match=message):
        losses_of(model, data)


# ---- images and labels ---------------------------------------------------------------


def test_images_without_ground_truth(make_config, tmp_path, family):
    """A detector still learns from its teacher; a segmentor skips void pixels."""
    cfg = make_config(family, tmp_path)
    data = dataset_batch(cfg)
    for sample in data['data_samples']:
        if family == 'det':
            sample.gt_instances = sample.gt_instances[:0]
        else:
            sample.gt_sem_seg.data.fill_(255)
    losses = assert_trains(build(cfg), data)
    assert (losses['loss_dist'] > 0) == (family == 'det')


def test_images_smaller_than_the_stride(make_config, tmp_path, family):
    options = (
        {} if family == 'det' else {'model.student.data_preprocessor.size': (7, 5)}
    )
    cfg = make_config(family, tmp_path, **options)
    cfg.train_dataloader.dataset.pipeline.insert(
        2, dict(type='Resize', scale=(5, 7), keep_ratio=False)
    )
    data = dataset_batch(cfg)
    assert data['inputs'][0].shape[-2:] == (7, 5)
    assert_trains(build(cfg), data)


def test_a_batch_of_one_with_batch_norm(make_config, tmp_path):
    """PSPNet's single pooled value fails in batch norm, except in a teacher (eval)."""
    cfg = make_config('seg', tmp_path)
    data = dataset_batch(cfg, size=1)
    for config in (cfg.model, cfg.model.student):
        init_default_scope('mmseg')
        model = MODELS.build(config).train()
        with pytest.raises(ValueError, match='more than 1 value per channel'):
            losses_of(model, dict(data))
    student = cfg.model.student
    student.decode_head.update(type='FCNHead', num_convs=1)
    student.decode_head.pop('pool_scales')
    assert_trains(build(cfg), dict(data))
    det = make_config('det', tmp_path)
    assert_trains(build(det), dataset_batch(det, size=1))


# ---- files ---------------------------------------------------------------------------


def test_a_work_dir_that_is_not_writable(make_config, tmp_path):
    (tmp_path / 'file').write_text('')
    with pytest.raises(OSError, match=r'file/work'):
        Runner.from_cfg(make_config('seg', tmp_path / 'file' / 'work'))


def train_until_the_disk_is_full(cfg: Config) -> str:
    def fill(runner, _):
        if runner.iter == 2:  # half of the checkpoint after the next iteration fits
            size = (Path(cfg.work_dir) / 'iter_2.pth').stat().st_size // 2
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))

    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    WatchHook.after = fill
    try:
        Runner.from_cfg(cfg).train()
    except OSError as error:
        message = str(error)
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    return message


@pytest.mark.slow
def test_a_disk_that_is_full(make_config, tmp_path):
    """The training stops with the system's error, and can be resumed."""
    cfg = make_config('seg', tmp_path / 'work')
    message = in_process(train_until_the_disk_is_full, cfg)
    assert 'too large' in message  # on a real disk: no space left on device
    assert (tmp_path / 'work' / 'iter_4.pth').exists()
    path, checkpoint = last_whole_checkpoint(tmp_path / 'work')
    assert path.endswith('iter_2.pth')
    assert checkpoint['meta']['iter'] == 2
    with pytest.raises(RuntimeError, match=r"iter_4\.pth' cannot be .* truncated"):
        load_checkpoint(str(tmp_path / 'work' / 'iter_4.pth'))
