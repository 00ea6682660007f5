"""A training step at full size on a GPU: one pair, in several precisions.

    python -m benchmarks.gpu_step 'RetinaNet R50 <- R101' [--compiled]

*Student + teacher* is the bare teacher's forward and the student's step in one go. Each
time is followed by the peak memory, with the weights of both models, and by how often
the step waits for the GPU. DINO's queries are matched on the CPU, so it waits. On a
CPU, which is only for trying it, images are small and only the time is measured.
"""

from __future__ import annotations

import argparse
import functools
import warnings
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import nn

from benchmarks.loss import peak_on_gpu
from benchmarks.measure import interleaved, machine, table, verdict
from benchmarks.step import PAIRS, Models, models_of, steps_of


class Setting(NamedTuple):
    """How a step is run."""

    name: str
    amp: torch.dtype | None = None
    channels_last: bool = False
    compile: bool = False


# in this order: neither layout nor compilation is undone
SETTINGS = [
    Setting('fp32'),
    Setting('bf16', torch.bfloat16),
    Setting('fp16', torch.float16),
    Setting('bf16, channels_last', torch.bfloat16, channels_last=True),
    Setting('bf16, channels_last, compiled', torch.bfloat16, True, True),
]


class Step(NamedTuple):
    """Measurements of a pair in a setting."""

    setting: str
    time: dict[str, float] = {}  # seconds by contestant; `both` in one go
    peak: dict[str, int] = {}  # bytes beyond the weights, by contestant; on a GPU
    weights: int = 0  # bytes, of student and teacher
    waits: dict[str, int] = {}  # waits for the device, by contestant
    error: str = ''  # why it does not run

    @property
    def overhead(self) -> float:
        """Time of the distilled step over that of student and bare teacher."""
        return self.time['distilled'] / self.time['both']

    @property
    def memory(self) -> float:
        """Peak memory of the distilled step over what student and teacher need."""
        need = max(self.peak['student'], self.peak['teacher'])
        return (self.weights + self.peak['distilled']) / (self.weights + need)


def measured(
    name: str, seconds: float, device: str, size: tuple[int, int], settings=SETTINGS
) -> Iterator[Step]:
    """Measure a pair in one setting after the other."""
    on_gpu = device == 'cuda'
    for setting in settings:
        doing = 'building the models'
        try:
            models = models_of(name, device, size)
            change(models, setting)
            steps = steps_of(name, device, size, setting.amp)
            alone, bare = steps['student'], steps['teacher']
            steps['both'] = lambda bare=bare, alone=alone: (bare(), alone())
            for doing in list(steps):
                try:
                    steps[doing]()
                except Exception:
                    if doing != 'usual':  # two models may sample different boxes
                        raise
                    del steps[doing]
            doing = 'measuring'
            state = [*models.student.state_dict().values()]
            state += models.teacher.state_dict().values()
            weights = sum(x.nbytes for x in state)
            peak, waits = {}, {}
            if on_gpu:
                peak = {k: peak_on_gpu(v) for k, v in steps.items()}
                waits = {k: waits_of(v) for k, v in steps.items()}
                steps = {k: functools.partial(and_wait, v) for k, v in steps.items()}
            time = interleaved(steps, seconds)
            yield Step(setting.name, time, peak, weights, waits)
        except Exception as error:  # of a library, a compiler or the device
            message = (str(error).strip().splitlines() or [''])[0][:200]
            message = f'{doing}: {type(error).__name__}: {message}'
            yield Step(setting.name, error=message)


def change(models: Models, setting: Setting) -> None:
    """Apply a setting: the memory layout, and compiled backbones and necks."""
    its_teacher = models.distilled.teacher.model
    every = (models.student, models.teacher, models.distilled, its_teacher)
    if setting.channels_last:
        for model in every:
            nn.Module.to(model, memory_format=torch.channels_last)
        inputs = models.data['inputs']
        models.data['inputs'] = inputs.contiguous(memory_format=torch.channels_last)
    if setting.compile:
        for model in every:
            for part in ('backbone', 'neck'):
                if getattr(model, part, None) is not None:
                    getattr(model, part).compile()


def and_wait(call: Callable[[], None]) -> None:
    call()
    torch.cuda.synchronize()


def waits_of(call: Callable[[], None]) -> int:
    """How often a call waits for the GPU, with the same random numbers each time."""
    torch.manual_seed(0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        torch.cuda.set_sync_debug_mode('warn')
        try:
            call()
        finally:
            torch.cuda.set_sync_debug_mode('default')
    return sum('synchronizing' in str(x.message) for x in caught)


def rows_of(found: Step, name: str) -> list[list[str]]:
    """A row per contestant in a setting, and the goals."""
    if found.error:
        return [[found.setting, 'does not run', found.error, '', '']]
    rows = []
    for which in found.time:
        peak = found.peak.get(which)
        mib = '' if peak is None else f'{(found.weights + peak) / 2**20:.0f}'
        waits = str(found.waits.get(which, ''))
        time = f'{1e3 * found.time[which]:.1f}'
        which = which.replace('both', 'student + teacher')
        rows.append([found.setting, which, time, mib, waits])
    limit = PAIRS[name].goals[0]
    goals = [f'{found.overhead:.2f} ({limit:.2f}), {verdict(found.overhead <= limit)}']
    if found.peak:
        goals.append(f'{found.memory:.2f} (1.05), {verdict(found.memory <= 1.05)}')
        more = found.waits['distilled'] - found.waits['both']
        met = '' if 'DINO' in name else f' (0), {verdict(more <= 0)}'
        goals.append(f'{more} more{met}')
    return [*rows, [found.setting, 'distilled / needed (goal)', *goals, '', ''][:5]]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('pair', help=f'the beginning of one of: {"; ".join(PAIRS)}')
    text = 'compile backbones and necks, which takes long'
    parser.add_argument('--compiled', action='store_true', help=text)
    parser.add_argument('--seconds', type=float, default=2, help='for each setting')
    args = parser.parse_args(argv)
    names = [name for name in PAIRS if name.startswith(args.pair)]
    if len(names) != 1:
        parser.error(f'{args.pair!r} begins {len(names)} of: {"; ".join(PAIRS)}')
    (name,) = names
    device = 'cuda' if torch.cuda.is_available() else 'cpu'
    pair = PAIRS[name]
    size = pair.full_size if device == 'cuda' else pair.size
    settings = SETTINGS[3:] if args.compiled else SETTINGS[:3]
    print(f'{name}, {size[0]}x{size[1]}, batch of 2. {machine()}\n')
    head = ['setting', 'step', 'ms', 'peak, MiB', 'waits']
    print(table(head, []), flush=True)
    for found in measured(name, args.seconds, device, size, settings):
        for row in rows_of(found, name):
            print('| ' + ' | '.join(row) + ' |', flush=True)


if __name__ == '__main__':
    main()
