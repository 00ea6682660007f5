"""Time and memory of functions to compare, and the machine's name."""

from __future__ import annotations

import gc
import importlib.util
import os
import platform
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch


def interleaved(
    contestants: dict[str, Callable[[], None]], seconds: float, rounds: int = 3
) -> dict[str, float]:
    """Shortest time of each function, run in turns so that all share the same noise.

    Args:
        contestants (dict): Name -> function without arguments.
        seconds (float): Run for at least this long.
        rounds (int): And for at least this many rounds, each in a new order.

    Returns:
        dict: Name -> seconds, the minimum of its runs: other work on the machine can
            only add to it.
    """
    for function in contestants.values():
        function()
    times: dict[str, list[float]] = {name: [] for name in contestants}
    order = list(contestants)
    end = time.perf_counter() + seconds
    while rounds > 0 or time.perf_counter() < end:
        rounds -= 1
        random.shuffle(order)
        for name in order:
            start = time.perf_counter()
            contestants[name]()
            times[name].append(time.perf_counter() - start)
    return {name: min(runs) for name, runs in times.items()}


def peak_memory(function: str, *args: object) -> int:
    """Bytes by which a call raises the peak resident memory of a process.

    Args:
        function (str): ``package.module:name`` of a function that takes strings, does
            everything that should not count, and returns the call to measure.
        args: Its arguments.
    """
    args = (torch.get_num_threads(), *args)
    command = [sys.executable, '-m', 'benchmarks.measure', function, *map(str, args)]
    # freed tensors go back to the system at once, so resident memory is live memory
    environment = dict(os.environ, MALLOC_MMAP_THRESHOLD_='65536')
    done = subprocess.run(
        command, env=environment, check=True, stdout=subprocess.PIPE, text=True
    )
    return int(done.stdout.split()[-1])


def _peak_here(function: str, threads: str, *args: str) -> int:
    torch.set_num_threads(int(threads))
    module, name = function.split(':')
    call = getattr(importlib.import_module(module), name)(*args)
    call()
    peaks, end = [], time.perf_counter() + 10
    while len(peaks) < 3 and (not peaks or time.perf_counter() < end):
        gc.collect()
        Path('/proc/self/clear_refs').write_text('5')  # resets the peak
        before = resident('VmRSS')
        call()
        peaks.append(resident('VmHWM') - before)
    return sorted(peaks)[len(peaks) // 2]


def resident(key: str) -> int:
    """A size from /proc/self/status, in bytes."""
    lines = Path('/proc/self/status').read_text().splitlines()
    return 1024 * int(next(x for x in lines if x.startswith(key)).split()[1])


def processor() -> str:
    """Name of the CPU and, if there is one, of the GPU."""
    name = platform.processor() or platform.machine()
    info = Path('/proc/cpuinfo')
    if info.exists():
        names = [x for x in info.read_text().splitlines() if x.startswith('model name')]
        name = names[0].split(':')[1].strip() if names else name
    if torch.cuda.is_available():
        name += f', {torch.cuda.get_device_name()}'
    return name


def machine() -> str:
    """CPU, cores, load and versions in one sentence."""
    versions = [
        f'{name} {importlib.import_module(name).__version__}'
        for name in ('torch', 'mmengine', 'mmcv', 'mmdet', 'mmseg')
        if importlib.util.find_spec(name)  # the loss needs only torch and mmengine
    ]
    return (
        f'{processor()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads '
        f'used, load average {os.getloadavg()[0]:.1f} before the start; Python '
        f'{platform.python_version()}, {", ".join(versions)}.'
    )


def verdict(met: bool) -> str:
    return 'met' if met else '**missed**'


def table(head: list[str], rows: list[list[str]]) -> str:
    """A table in Markdown."""
    lines = [head, ['---'] * len(head), *rows]
    return '\n'.join('| ' + ' | '.join(line) + ' |' for line in lines)


if __name__ == '__main__':
    print(_peak_here(*sys.argv[1:]))
