"""What a stored teacher has to know of the images of a training."""

from __future__ import annotations

from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.registry import TRANSFORMS
from mmengine.runner import Runner

from mmdist.data.answers import join
from mmdist.lookup import in_words
from mmdist.registry import HOOKS
from mmdist.teachers import StoredTeacher


@HOOKS.register_module()
@in_words
class StoredTeacherHook(Hook):
    """Lets a stored teacher know which files an image shows, and where.

    Before the first step it checks that all images have answers, and that the pipelines
    move pixels in ways that are known, those too that another hook switches to. Images
    and labels stay what they are.

    Example:
        The line that a config with ``teacher=dict(stored=...)`` needs::

            custom_hooks = [dict(type='mmdist.StoredTeacherHook')]

        A list replaces that of the base. If that has some (RTMDet, YOLOX), write
        ``[*_base_.custom_hooks, dict(type='mmdist.StoredTeacherHook')]``.
    """

    priority = 'LOWEST'  # after a hook that switches the pipeline

    def before_run(self, runner: Runner) -> None:
        """Check the answers and the pipelines.

        Raises:
            ValueError: As of :func:`mmdist.data.answers.join`.
        """
        later = [getattr(hook, 'switch_pipeline', None) for hook in runner.hooks]
        built = [
            [TRANSFORMS.build(dict(transform)) for transform in pipeline]
            for pipeline in later
            if pipeline
        ]
        self._join(runner, built)

    def before_train_epoch(self, runner: Runner) -> None:
        """See a pipeline that another hook has switched to."""
        self._join(runner)

    def _join(self, runner: Runner, later: list[list] | None = None) -> None:
        model = runner.model.module if is_model_wrapper(runner.model) else runner.model
        every = getattr(model, 'teachers', {}).values()
        teachers = [t for t in every if isinstance(t, StoredTeacher)]
        if teachers:
            join(runner.train_dataloader.dataset, teachers, later or [])
