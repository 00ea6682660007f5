"""Give a stored teacher what it has to know about the training images."""

from __future__ import annotations

import torch
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.registry import TRANSFORMS
from mmengine.runner import Runner

from mmdist.data.answers import check_images, join
from mmdist.lookup import in_words
from mmdist.registry import HOOKS
from mmdist.teachers import StoredTeacher


@HOOKS.register_module()
@in_words
class StoredTeacherHook(Hook):
    """Tells a stored teacher which files an image shows, and where.

    Before the first step it checks that all images have answers, and that all pipelines
    move pixels in known ways, including those that another hook switches to. Images and
    labels do not change. A config with ``teacher=dict(stored=...)`` needs
    ``custom_hooks = [dict(type='mmdist.StoredTeacherHook')]``; if its base has hooks
    (RTMDet, YOLOX), ``[*_base_.custom_hooks, dict(type='mmdist.StoredTeacherHook')]``.
    """

    priority = 'LOWEST'  # after hooks that switch the pipeline

    def before_run(self, runner: Runner) -> None:
        """Check the answers and the pipelines; ValueError if they do not fit."""
        if teachers := self._teachers(runner):
            dataset = runner.train_dataloader.dataset
            pipelines = (getattr(x, 'switch_pipeline', None) for x in runner.hooks)
            later = [[TRANSFORMS.build(t) for t in p] for p in pipelines if p]
            for teacher in teachers:
                join(dataset, teacher.store.kind, later)
                check_images(dataset, teacher.store)
            _restart(runner)

    def before_train_epoch(self, runner: Runner) -> None:
        """Follow a pipeline that another hook has switched to."""
        for teacher in self._teachers(runner):
            join(runner.train_dataloader.dataset, teacher.store.kind)

    @staticmethod
    def _teachers(runner: Runner) -> list[StoredTeacher]:
        model = runner.model.module if is_model_wrapper(runner.model) else runner.model
        every = getattr(model, 'teachers', {}).values()
        return [t for t in every if isinstance(t, StoredTeacher)]


def _restart(runner: Runner) -> None:
    """Restart the workers of an iteration-based loop to use the changed pipeline."""
    loader = runner.train_dataloader
    iterator = getattr(runner.train_loop, 'dataloader_iterator', None)
    if iterator is None or not loader.num_workers:
        return
    loader._iterator = None
    if hasattr(loader.sampler, '_indices_of_rank'):  # the old workers took some
        loader.sampler.indices = loader.sampler._indices_of_rank()
    with torch.random.fork_rng(devices=[]):
        runner.train_loop.dataloader_iterator = type(iterator)(loader)
