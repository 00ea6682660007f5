"""Run a training in its own process, and read its results."""

from __future__ import annotations

import functools
import hashlib
import json
import multiprocessing
import os
import re
import runpy
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import forkserver
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess
from pathlib import Path

from tools.logs import read_log

TOOLS = Path(__file__).resolve().parents[1]
LIBRARIES = ['mmdist'] + [
    f'{name}.{part}'
    for name in ('mmdet', 'mmseg')
    for part in ('models', 'datasets', 'engine', 'evaluation', 'visualization')
]
BUFFERS = ('running_mean', 'running_var', 'num_batches_tracked')


def fingerprint(*parts: str) -> str:
    """Hash of everything that a result depends on."""
    return hashlib.sha256(''.join(parts).encode()).hexdigest()[:16]


def finished(folder: Path, mark: str) -> dict | None:
    """The result of a finished run with this fingerprint, or None."""
    file = folder / 'metrics.json'
    result = json.loads(file.read_text()) if file.is_file() else {}
    return result if result.get('fingerprint') == mark else None


def save_result(folder: Path, result: dict) -> None:
    """Save a result, with its ``fingerprint``, for :func:`finished`."""
    (folder / 'metrics.json').write_text(json.dumps(result))


@functools.cache
def context() -> BaseContext:
    """The context of processes: forks of one that has imported the libraries.

    Importing them takes a quarter of a minute. CUDA does not survive a fork.
    """
    import torch

    method = 'spawn' if torch.cuda.is_available() else 'forkserver'
    return multiprocessing.get_context(method)


def import_libraries() -> None:
    """Start importing the tools' libraries in the background, once for all tools.

    The tools get the environment variables that are set now.
    """
    if context().get_start_method() == 'forkserver':
        context().set_forkserver_preload(LIBRARIES)
        forkserver.ensure_running()


@contextmanager
def tool(name: str, arguments: list, log_file: Path) -> Iterator[BaseProcess]:
    """Run one of the tools, and terminate it when the block is left.

    Args:
        name: File name of the tool.
        arguments: Its arguments.
        log_file: Its output is appended here.

    Raises:
        SystemExit: The tool failed; the message has the end of its output.
    """
    process = context().Process(
        target=_run, args=(TOOLS / name, list(map(str, arguments)), log_file)
    )
    log_file.touch()
    process.start()
    stopped = True
    try:
        yield process
        stopped = process.is_alive()
    finally:
        process.terminate()  # if it is alive
        process.join()
    if process.exitcode and not stopped:
        tail = '\n'.join(log_file.read_text().splitlines()[-15:])
        raise SystemExit(
            f'{tail}\n{name} stopped with exit status {process.exitcode}; all of its '
            f'output is in {log_file}. What is finished is kept: run this again.'
        )


def _run(file: Path, arguments: list[str], log_file: Path) -> None:
    """Run the tool in the new process, as from the command line."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    with log_file.open('a') as log:
        os.dup2(log.fileno(), sys.stdout.fileno())
        os.dup2(log.fileno(), sys.stderr.fileno())
    sys.argv = [str(file), *arguments]
    sys.path.insert(0, str(TOOLS))
    runpy.run_path(str(file), run_name='__main__')


def _end_with_parent() -> None:
    """Stop when the process that started this one was killed."""
    multiprocessing.parent_process().join()
    os.kill(os.getpid(), signal.SIGTERM)


def share_done(log: str, epochs: int = 1) -> float:
    """The share of a training that is done, by its log.

    Args:
        log: The text of the log.
        epochs: Number of epochs of the training, if it counts them.
    """
    steps = re.findall(r'\(train\) +(?:\[ *(\d+)\])?\[ *(\d+)/(\d+)\]', log)
    if not steps:
        return 0.0
    epoch, step, of = (int(n or 0) for n in steps[-1])
    return (epoch - 1 + step / of) / epochs if epoch else step / of


def read_training(folder: Path, checkpoint: str, metric: str, percent: float) -> dict:
    """What both results of a finished training hold.

    Args:
        folder: Its work dir.
        checkpoint: Its last checkpoint.
        metric: The name of its score in the log.
        percent: Factor from the log to percent.

    Returns:
        ``curve``, pairs of a step and its score; ``parameters``, the number of those
        of the model, without those of `distill`; and ``inter`` and ``intra``, the last
        logged correlations with the teacher, if any.
    """
    from mmdist.checkpoint import load_checkpoint  # imports torch

    entries = read_log(folder)
    scores = {e['step']: round(percent * e[metric], 3) for e in entries if metric in e}
    state = load_checkpoint(checkpoint)['state_dict']
    parameters = sum(
        value.numel()
        for key, value in state.items()
        if not key.startswith('distill.') and not key.endswith(BUFFERS)
    )
    correlations = {
        relation: entry[f'dist_{relation}']
        for entry in entries
        for relation in ('inter', 'intra')
        if f'dist_{relation}' in entry
    }
    return dict(curve=sorted(scores.items()), parameters=parameters, **correlations)


def replace_between(page: str, begin: str, end: str, made: str) -> str:
    """Replace the text of a page between two marks."""
    before, _, rest = page.partition(begin)
    return before + begin + made + end + rest.partition(end)[2]
