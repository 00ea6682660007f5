"""Check a pair with its real weights and data before a long training.

    python tools/preflight.py CONFIG --images 50

It prepares the training as tools/train.py does, stops at the first step, and prints
what is compared, the first correlations, losses and gradients, and the time of a step.
With --images the teacher is scored on that many validation images, with its own
normalisation and its classes in the student's order; stored answers are scored on
training images.

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
from pair_report import Report, Seen, as_text, report_pair, watch, with_name
from stored_score import describe_storage, score_stored
from teacher_score import Scored, cannot_score, judge, predictor, score
from torch import nn
from train import load_distilling, seed_iterations

from mmdist import DISTLoss
from mmdist.data.labels import check_class_lists, explain
from mmdist.hooks import DistillScheduleHook
from mmdist.teachers import MeanTeacher, StoredTeacher, Teacher

STEPS = 3  # timed steps


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add('config', help='path of a config that distils')
    text = 'score the teacher on N validation images (default: 0, do not)'
    add('--images', type=int, default=0, metavar='N', help=text)
    add('--cfg-options', nargs='+', action=DictAction, help='key=value of the config')
    parser.set_defaults(launcher='none', work_dir=None)
    args = parser.parse_args()
    if args.images < 0:
        parser.error(f'--images must be at least 0, got {args.images}.')
    args.cfg = load_distilling(args, parser)
    return args


class Stop(Exception):
    """All is checked: the Runner need not train."""


class Preflight(Hook):
    """Checks a distilled model where the Runner would take its first step."""

    def __init__(self, report: Report, images: int) -> None:
        self.report = report
        self.images = images  # to score teachers on
        self.has_begun = False

    def before_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: dict | None = None
    ) -> None:
        """Check everything, and raise :class:`Stop`."""
        self.has_begun = True
        report, model = self.report, runner.model
        model = model.module if is_model_wrapper(model) else model
        dataset = runner.train_dataloader.dataset
        classes, starts = dataset.metainfo.get('classes'), runner.cfg.get('load_from')
        schedules = [h for h in runner.hooks if isinstance(h, DistillScheduleHook)]
        first_factor = model.distill_factor
        model.distill_factor = max(schedules[0].factors) if schedules else 1.0
        own_score = None
        if self.images and classes and runner.val_loop and starts:
            # before a step, which changes the statistics of BN
            predict = model.eval().val_step
            own_score, _ = score(runner, self.images, predict, len(classes))
            model.train()
        data = model.data_preprocessor(data_batch, training=True)
        # shown as it is before it is balanced
        balance, model.balance = model.balance, None
        seen = watch(model, lambda: losses_of(runner, model, data))
        report_pair(report, model, classes, seen)
        for name, teacher in model.teachers.items():
            if isinstance(teacher, StoredTeacher):
                text = describe_storage(dataset, teacher.store)
                report.line(with_name('stored', name), text)
        report.section('first step')
        if schedules:
            text = f'distillation has the weight {first_factor:g} in the first step; '
            text += f'the lines below are at its full weight, {model.distill_factor:g}'
            report.line('ramp', text)
        report_losses(report, model, seen)
        share = report_gradient(report, model, seen)
        model.balance = balance
        if balance:
            text = f'limits this to {balance.ratio:g} times their norm in training, at '
            report.line('balance', f'{text}each output that is compared')
        if not all(isinstance(t, MeanTeacher) for t in model.teachers.values()):
            # a mean teacher equals the student in the first step
            is_dist = any(isinstance(c.loss, DISTLoss) for c in model.distill.values())
            ramp = 'balance' if balance else 'schedule' if schedules else ''
            judge_gradient(report, share, ramp, is_dist and not starts)
        del seen
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
        """Score teachers on validation images, stored answers on training images."""
        teachers = model.teachers
        stored = {k: t for k, t in teachers.items() if isinstance(t, StoredTeacher)}
        asked = {k: t for k, t in teachers.items() if k not in stored}
        if asked or own_score:
            self.report.section(f'score on {self.images} validation images')
        for name, teacher in asked.items():
            found = cannot_score(teacher)
            if not runner.val_loop:
                found = 'the config has no `val_dataloader`'
            elif not classes:
                found = 'the data set has no class names'
            elif not found:
                predict = predictor(model, teacher)
                found = score(runner, self.images, predict, len(classes))
            self._judge(name, teacher, classes, found)
        if own_score:
            self.report.line('student', as_text(own_score))
        if stored:
            self.report.section(f'score on {self.images} training images')
        for name, teacher in stored.items():
            predict, kind = predictor(model, teacher), teacher.store.kind
            found = 'the data set has no class names'
            if classes:
                dataset = runner.train_dataloader.dataset
                found = score_stored(dataset, self.images, predict, kind, len(classes))
            found = found or 'no training image has labels'
            self._judge(name, teacher, classes, found)

    def _judge(
        self, name: str, teacher: Teacher, classes: Sequence[str], found: Scored | str
    ) -> None:
        """Report a score, or why there is none."""
        key = with_name('teacher', name)
        if isinstance(found, str):
            self.report.line(key, f'not scored: {found}')
            return
        metrics, confusion = found
        self.report.line(key, as_text(metrics) or 'nothing found')
        ours = teacher.classes.student
        compared = range(len(classes)) if ours is None else [i for (i,) in ours]
        if verdict := judge(metrics, confusion, classes, compared):
            who = f'Teacher {name}' if name else 'The teacher'
            self.report.reasons.append(f"{who}'s {verdict}")


def losses_of(runner: Runner, model: nn.Module, data: dict) -> dict:
    """The losses of a batch, in the precision of the training."""
    with runner.optim_wrapper.optim_context(runner.model):
        return model.loss(**data)


def report_losses(report: Report, model: nn.Module, seen: Seen) -> None:
    """Report the correlations and the losses, which must be finite."""
    _, values = model.parse_losses(seen.losses)
    values = {key: value.item() for key, value in values.items() if key != 'loss'}
    groups = {
        'correlations': [k for k in values if '_inter' in k or '_intra' in k],
        'distillation': [k for k in values if k in seen.terms],
        'own losses': [k for k in values if 'loss' in k and k not in seen.terms],
    }
    for title, keys in groups.items():
        if keys:
            report.line(title, as_text({key: values[key] for key in keys}, 20))
        for key in keys:
            if not math.isfinite(values[key]):
                report.reasons.append(f'`{key}` is {values[key]} in the first step.')
            elif values[key] == 0 and key in seen.terms:
                report.warnings.append(f'`{key}` is 0 in the first step.')


def report_gradient(report: Report, model: nn.Module, seen: Seen) -> float:
    """Report and return the gradient norm of distillation over the own losses' norm."""
    gradients = []
    for is_distill in (False, True):
        losses = seen.losses.items()
        part = {k: v for k, v in losses if (k in seen.terms) == is_distill}
        model.zero_grad(set_to_none=True)
        total, _ = model.parse_losses(part)
        if total.requires_grad:
            total.backward(retain_graph=not is_distill)
        named = model.named_parameters()
        gradients.append({n: p.grad for n, p in named if p.grad is not None})
    model.zero_grad(set_to_none=True)
    names = [name for name in gradients[0] if name in gradients[1]]
    backbone = [name for name in names if name.startswith('backbone.')]
    names = backbone or names
    own, distilled = (
        math.hypot(*(g[name].double().norm().item() for name in names))
        for g in gradients
    )
    share = distilled / own if own else math.inf if distilled else 0.0
    report.line(
        'gradient',
        f"distillation has {share:.3g} times the norm of the student's own losses, "
        f'over {len(names)} parameters of the {"backbone" if backbone else "student"}',
    )
    return share


def judge_gradient(report: Report, share: float, ramp: str, fresh: bool) -> None:
    """Report a gradient of distillation that is far too large, or too small.

    ``share`` is its norm over that of the student's own losses; ``ramp`` is what
    bridges the first steps, ``'balance'``, ``'schedule'`` or nothing; ``fresh`` is
    whether DIST meets a head with random weights.
    """
    times = f'The gradient of distillation is {share:.3g} times that of the own losses'
    if not share:
        report.reasons.append('No gradient of distillation reaches the student.')
    elif share < 0.01:
        report.warnings.append(f'{times}: it hardly counts. Use a larger weight.')
    elif share > 10 and ramp == 'schedule':
        report.warnings.append(
            f'{times} at full weight. The ramp must last until it falls: watch whether '
            'the own losses fall too.'
        )
    elif share > 10 and not ramp:
        report.cautions.append(
            f'{times}, so these hardly count. Leave `balance` at its default.'
        )
    if fresh and not ramp and 0 < share <= 10:
        report.warnings.append(
            "The student's head starts at random, where DIST has its largest "
            'gradients, and `balance=None` does not limit them. That may harm a short '
            'training: see docs/quickstart.md.'
        )


def report_cost(report: Report, runner: Runner, model: nn.Module, data: dict) -> None:
    """Report time and memory of a step with the teachers, and while they are paused."""
    device = data['inputs'].device.type
    is_cuda = device == 'cuda'
    factors = model.distill_factor, 0.0
    costs = {factor: [] for factor in factors}
    for model.distill_factor in factors * (1 + STEPS):
        model.zero_grad(set_to_none=True)
        if is_cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        model.parse_losses(losses_of(runner, model, data))[0].backward()
        if is_cuda:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        gib = torch.cuda.max_memory_allocated() / 2**30 if is_cuda else 0
        costs[model.distill_factor].append((seconds, gib))
    # the first one is a warm-up
    (on, on_gib), (off, off_gib) = (zip(*costs[f][1:], strict=True) for f in factors)
    on, off = median(on), median(off)
    report.section('cost of a step')
    report.line(
        'time',
        f'{on:.3g} s with the teacher, {off:.3g} s without: {on / off:.2f} times '
        f'(forward and backward of {len(data["inputs"])} images on {device}, median of '
        f'{STEPS})',
    )
    if is_cuda:
        on, off = max(on_gib), max(off_gib)
        report.line(
            'memory',
            f'at most {on:.2f} GiB with the teacher, {off:.2f} GiB while it is paused; '
            'both include its weights',
        )


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
            check_class_lists(cfg)
            runner = RUNNERS.build(cfg)
            runner.register_hook(hook, 'LOWEST')
            runner.train()
        except Stop:
            pass
        except Exception as error:
            expected = (ValueError, RuntimeError, OSError)
            if hook.has_begun and not isinstance(error, expected):
                raise  # a bug in this tool
            report.reasons.append(explain(error, cfg))
    return report.finish()


if __name__ == '__main__':
    sys.exit(main())
