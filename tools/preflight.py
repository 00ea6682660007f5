"""Check a pair with its real weights and data before a long training.

    python tools/preflight.py CONFIG --images 50

It prepares the training as tools/train.py does, stops at the first step, and prints
what is compared, the first correlations, losses and gradients, and the time of a step.
With --images the teacher is scored on that many validation images, with its own
normalisation and its classes in the student's order.

Exit status: 0, go on (there may be warnings); 1, the training would not start or would
be pointless; 2, wrong usage.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import math
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from statistics import median

import torch
from mmengine.config import DictAction
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.registry import RUNNERS
from mmengine.runner import Runner
from pair_report import (
    Report,
    as_text,
    parts,
    report_classes,
    report_comparisons,
    with_name,
)
from teacher_score import cannot_score, judge, predictor, score
from torch import nn
from train import load_distilling, seed_iterations

from mmdist import DISTLoss
from mmdist.hooks import DistillScheduleHook
from mmdist.record import Recorder
from mmdist.teachers import MeanTeacher

STEPS = 3  # that are timed


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('config', help='path of a config that distils')
    parser.add_argument(
        '--images',
        type=int,
        default=0,
        metavar='N',
        help='score the teacher on N validation images; 0, the default, does not',
    )
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        action=DictAction,
        help='override settings of the config, key=value',
    )
    parser.set_defaults(launcher='none', work_dir=None)
    args = parser.parse_args()
    if args.images < 0:
        parser.error(f'--images is a number of images, got {args.images}.')
    args.cfg = load_distilling(args, parser)
    return args


class Stop(Exception):
    """All is seen: the Runner need not train."""


class Preflight(Hook):
    """Looks at a distilled model where the Runner would take its first step.

    Args:
        report: Where it says what it saw.
        images: Number of validation images to score the teachers on.
    """

    def __init__(self, report: Report, images: int) -> None:
        self.report = report
        self.images = images
        self.has_begun = False

    def before_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: dict | None = None
    ) -> None:
        """Look at everything, and stop the Runner.

        Raises:
            Stop: Always.
        """
        self.has_begun = True
        report, model = self.report, runner.model
        model = model.module if is_model_wrapper(model) else model
        schedules = [h for h in runner.hooks if isinstance(h, DistillScheduleHook)]
        first_factor = model.distill_factor
        model.distill_factor = max(schedules[0].factors) if schedules else 1.0
        classes = runner.train_dataloader.dataset.metainfo.get('classes')
        own_score = None
        if self.images and classes and runner.val_loop and runner.cfg.get('load_from'):
            own_score, _ = score(
                runner, self.images, model.eval().val_step, len(classes)
            )
            model.train()

        data = model.data_preprocessor(data_batch, training=True)
        comparisons = dict(model.distill.items())
        heads = [m for t in model.teachers.values() for m in parts(t.model)]
        with Recorder(comparisons.values()) as recorder, Recorder(heads) as ran:
            losses = losses_of(runner, model, data)
        calls = {key: recorder.calls(c)[0] for key, c in comparisons.items()}
        ran = [module for module in heads if ran.calls(module)]
        report_comparisons(report, model, {k: c.args[1] for k, c in calls.items()}, ran)
        report_classes(report, model, classes)

        report.section('first step')
        if schedules:
            report.line(
                'ramp',
                f'distillation has the weight {first_factor:g} in the first step; what '
                f'follows is at its full weight, {model.distill_factor:g}',
            )
        terms = {
            # the distiller's own name for a term that the student has as well
            f'{term}_distill' if f'{term}_distill' in losses else term
            for call in calls.values()
            for term in call.output
            if term.startswith('loss_')
        }
        report_losses(report, model, losses, terms)
        share = report_gradient(report, model, losses, terms)
        if not all(isinstance(t, MeanTeacher) for t in model.teachers.values()):
            # the student's own mean is the student in the first step
            judge_gradient(report, share)
            is_dist = any(isinstance(c.loss, DISTLoss) for c in comparisons.values())
            if is_dist and not schedules and not runner.cfg.get('load_from'):
                report.warnings.append(
                    "The student's head starts at random, where DIST has its largest "
                    'gradients, and there is no ramp. That may cost much in a short '
                    'training: see `mmdist.DistillScheduleHook` and docs/quickstart.md.'
                )
        del losses, recorder, calls
        if self.images:
            self._score_teachers(runner, model, classes, own_score)
        report_cost(report, runner, model, data)
        raise Stop

    def _score_teachers(
        self,
        runner: Runner,
        model: nn.Module,
        classes: Sequence[str] | None,
        own_score: dict | None,
    ) -> None:
        report = self.report
        report.section(f'score on {self.images} validation images')
        for name, teacher in model.teachers.items():
            key, reason = with_name('teacher', name), cannot_score(teacher)
            if not runner.val_loop:
                reason = 'the config has no `val_dataloader`'
            elif not classes:
                reason = 'the classes of the data set have no names'
            if reason:
                report.line(key, f'not scored: {reason}')
                continue
            predict = predictor(model, teacher)
            metrics, confusion = score(runner, self.images, predict, len(classes))
            report.line(key, as_text(metrics) or 'nothing found')
            ours = teacher.classes.student
            compared = range(len(classes)) if ours is None else [i for (i,) in ours]
            verdict = judge(metrics, confusion, classes, compared)
            if verdict:
                who = f'Teacher {name}' if name else 'The teacher'
                report.reasons.append(f"{who}'s {verdict}")
        if own_score:
            report.line('student', as_text(own_score))


def losses_of(runner: Runner, model: nn.Module, data: dict) -> dict:
    """The losses of a batch, in the precision of the training."""
    with runner.optim_wrapper.optim_context(runner.model):
        return model.loss(**data)


def report_losses(
    report: Report, model: nn.Module, losses: dict, terms: set[str]
) -> None:
    """The correlations and the losses, which must be numbers."""
    _, values = model.parse_losses(losses)
    values = {key: value.item() for key, value in values.items() if key != 'loss'}
    groups = {
        'correlations': [k for k in values if '_inter' in k or '_intra' in k],
        'distillation': [k for k in values if k in terms],
        'own losses': [k for k in values if 'loss' in k and k not in terms],
    }
    for title, keys in groups.items():
        if keys:
            report.line(title, as_text({key: values[key] for key in keys}, 20))
        for key in keys:
            if not math.isfinite(values[key]):
                report.reasons.append(f'`{key}` is {values[key]} in the first step.')
            elif values[key] == 0 and key in terms:
                report.warnings.append(f'`{key}` is 0 in the first step.')


def report_gradient(
    report: Report, model: nn.Module, losses: dict, terms: set[str]
) -> float:
    """The gradient of distillation against that of the student's own losses.

    Returns:
        The ratio of their norms.
    """
    gradients = []
    for is_distill in (False, True):
        part = {k: v for k, v in losses.items() if (k in terms) == is_distill}
        model.zero_grad(set_to_none=True)
        total, _ = model.parse_losses(part)
        if total.requires_grad:
            total.backward(retain_graph=not is_distill)
        named = model.named_parameters()
        gradients.append({n: p.grad for n, p in named if p.grad is not None})
    model.zero_grad(set_to_none=True)
    both = [name for name in gradients[0] if name in gradients[1]]
    backbone = [name for name in both if name.startswith('backbone.')]
    own, distilled = (
        math.hypot(*(g[name].double().norm().item() for name in backbone or both))
        for g in gradients
    )
    share = distilled / own if own else math.inf if distilled else 0.0
    report.line(
        'gradient',
        f"distillation has {share:.3g} times the norm of the student's own losses, "
        f'over {len(backbone or both)} parameters of '
        f'{"the backbone" if backbone else "the student"}',
    )
    return share


def judge_gradient(report: Report, share: float) -> None:
    """Say where a share of the gradient is far too large or small."""
    if not share:
        report.reasons.append('No gradient of distillation reaches the student.')
    elif share > 10:
        report.warnings.append(
            f'The gradient of distillation is {share:.3g} times that of the own '
            'losses, which hardly count beside it. If no ramp bridges the first '
            'steps, take one, or a smaller weight.'
        )
    elif share < 0.01:
        report.warnings.append(
            f'The gradient of distillation is {share:.2g} times that of the own '
            'losses: it hardly counts. Take a larger weight.'
        )


def report_cost(report: Report, runner: Runner, model: nn.Module, data: dict) -> None:
    """Time and memory of a step with the teachers and while they rest."""
    device = data['inputs'].device
    factors = (model.distill_factor, 0.0)
    steps: dict[float, list] = {factor: [] for factor in factors}
    for _ in range(1 + STEPS):
        for factor in factors:
            model.distill_factor = factor
            steps[factor].append(measure(runner, model, data))
    costs = [steps[factor][1:] for factor in factors]  # the first warms up
    seconds = [median(time for time, _ in cost) for cost in costs]
    report.section('cost of a step')
    report.line(
        'time',
        f'{seconds[0]:.3g} s with the teacher, {seconds[1]:.3g} s without: '
        f'{seconds[0] / seconds[1]:.2f} times (forward and backward of '
        f'{len(data["inputs"])} images on {device.type}, median of {STEPS})',
    )
    if device.type == 'cuda':
        most = [max(memory for _, memory in cost) / 2**30 for cost in costs]
        report.line(
            'memory',
            f'at most {most[0]:.2f} GiB with the teacher, {most[1]:.2f} GiB while it '
            'rests; both with its weights',
        )


def measure(runner: Runner, model: nn.Module, data: dict) -> tuple[float, int]:
    """Seconds of a step without the optimizer, and its peak memory in bytes."""
    on_gpu = data['inputs'].is_cuda
    model.zero_grad(set_to_none=True)
    if on_gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    total, _ = model.parse_losses(losses_of(runner, model, data))
    total.backward()
    if on_gpu:
        torch.cuda.synchronize()
    memory = torch.cuda.max_memory_allocated() if on_gpu else 0
    return time.perf_counter() - start, memory


def main() -> int:
    args = parse_args()
    report = Report()
    with (
        tempfile.TemporaryDirectory() as work_dir,
        contextlib.redirect_stdout(io.StringIO()),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter('ignore')
        cfg = args.cfg
        cfg.merge_from_dict(dict(work_dir=work_dir, resume=False))
        cfg.pop('visualizer', None)  # it may log in to a service
        seed_iterations(cfg)
        hook = Preflight(report, args.images)
        try:
            runner = RUNNERS.build(cfg)
            runner.register_hook(hook, 'LOWEST')
            runner.train()
        except Stop:
            pass
        except Exception as error:
            expected = (ValueError, RuntimeError, OSError)
            if hook.has_begun and not isinstance(error, expected):
                raise  # a mistake of this tool
            report.reasons.append(str(error) or repr(error))
    return report.finish()


if __name__ == '__main__':
    sys.exit(main())
