"""Run functions and scripts in processes of their own.

They are forked from a server that has imported the libraries. GPUs are hidden, so that
every machine runs the same test.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import pickle
import re
import runpy
import socket
import subprocess
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from datetime import datetime, timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from unittest import mock

CONTEXT = multiprocessing.get_context('forkserver')
CONTEXT.set_forkserver_preload(
    [
        'mmdist.distiller',
        *(
            f'{library}.{part}'
            for library in ('mmdet', 'mmseg')
            for part in ('apis', 'datasets', 'engine', 'visualization')
        ),
    ]
)
SECONDS = 120  # time limit of a call


def hurry() -> None:
    """Skip what takes seconds in a process that has imported the libraries.

    A Runner formats the config that it writes, and each data set collects all garbage.
    Runs are named by the second in which they start; each gets a second of its own.
    """
    with suppress(ImportError):
        from mmengine.config import config
        from mmengine.runner import Runner

        set_up, form, last = Runner.setup_env, '%Y%m%d_%H%M%S', datetime.min

        def a_second_of_its_own(runner: Runner, options: dict) -> None:
            nonlocal last
            set_up(runner, options)
            now = datetime.strptime(runner._timestamp, form)
            last = max(now, last + timedelta(seconds=1))
            runner._timestamp = last.strftime(form)

        Runner.setup_env = a_second_of_its_own

        def as_it_is(text: str, **options) -> tuple[str, bool]:
            return re.sub(r'^(\w+)=', r'\1 = ', text, flags=re.M), True

        config.FormatCode = as_it_is
    gc.freeze()


def start(target: Callable, *args, daemon: bool = False) -> BaseProcess:
    """Start a process; a daemon cannot have children, and ends with the tests."""
    process = CONTEXT.Process(target=target, args=args, daemon=daemon)
    with mock.patch.dict(os.environ, CUDA_VISIBLE_DEVICES='', OMP_NUM_THREADS='1'):
        process.start()
    return process


def in_process(target: Callable, *args):
    """Return ``target(*args)`` of a new process, or its exit code if it was killed."""
    ours, theirs = CONTEXT.Pipe()
    process = start(_serve, theirs, None)
    theirs.close()
    ours.send_bytes(pickle.dumps((target, args)))
    try:
        return _result(ours)
    except EOFError:
        process.join()
        return process.exitcode
    finally:
        process.kill()


class Group:
    """A gloo group of ``size`` processes, which stay for many calls."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.members: list[tuple[BaseProcess, Connection]] = []

    def __call__(self, target: Callable, *args) -> list:
        """Return the result of ``target(*args)`` in each process.

        Raises:
            RuntimeError: A process failed; has its traceback. The next call starts new
                processes, as the others can still wait for the failed one.
        """
        if not self.members:
            with socket.socket() as s:
                s.bind(('127.0.0.1', 0))
                port = s.getsockname()[1]
            for rank in range(self.size):
                ours, theirs = CONTEXT.Pipe()
                group = (rank, self.size, port)
                process = start(_serve, theirs, group, daemon=True)
                self.members.append((process, ours))
                theirs.close()
        pipes = [pipe for _, pipe in self.members]
        for pipe in pipes:
            pipe.send_bytes(pickle.dumps((target, args)))
        results = {}
        try:
            while len(results) < self.size:
                ready = wait(set(pipes) - results.keys(), SECONDS)
                if not ready:
                    raise RuntimeError(f'{target.__name__} takes too long.')
                results |= {pipe: _result(pipe) for pipe in ready}
        except BaseException:
            self.close()
            raise
        return [results[pipe] for pipe in pipes]

    def close(self) -> None:
        for process, pipe in self.members:
            process.kill()
            pipe.close()
        self.members = []


def _result(pipe: Connection):
    result, error = pickle.loads(pipe.recv_bytes())
    if error:
        raise RuntimeError(error)
    return result


def _serve(pipe: Connection, group: tuple[int, int, int] | None) -> None:
    import torch

    hurry()
    torch.set_num_threads(1)
    if group is not None:
        rank, size, port = map(str, group)
        os.environ.update(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=size)
        os.environ.update(MASTER_ADDR='127.0.0.1', MASTER_PORT=port)
        # a process that waits for another in vain fails instead of hanging
        torch.distributed.init_process_group('gloo', timeout=timedelta(seconds=60))
    with suppress(EOFError):  # closed by the test
        while data := pipe.recv_bytes():
            try:
                target, args = pickle.loads(data)
                answer = pickle.dumps((target(*args), None))
            except BaseException:
                answer = pickle.dumps((None, traceback.format_exc()))
            pipe.send_bytes(answer)


def output_of(*command, cwd: Path, **environ: str) -> str:
    """All that a command prints, which starts a process and must succeed."""
    done = subprocess.run(
        [*map(str, command)],
        cwd=cwd,
        env={**os.environ, 'OMP_NUM_THREADS': '1', **environ},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-4000:]
    return done.stdout


def run_script(
    script: Path, *args, cwd: Path, **environ: str
) -> subprocess.CompletedProcess:
    """Run ``python script args`` without the time for importing the libraries.

    Args:
        script: The path of the script.
        args: Its arguments.
        cwd: The working directory.
        environ: Environment variables.

    Returns:
        The exit code and, as ``stdout``, all that was printed.
    """
    log = cwd / f'.{os.getpid()}.log'
    process = start(_run, os.fspath(script), list(map(str, args)), cwd, environ, log)
    process.join()
    output = log.read_text()
    log.unlink()
    return subprocess.CompletedProcess([script, *args], process.exitcode, output)


def _run(script: str, args: list[str], cwd: Path, environ: dict, log: Path) -> None:
    with open(log, 'w') as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    hurry()
    os.chdir(cwd)
    os.environ.update(environ)
    sys.argv = [script, *args]
    sys.path.insert(0, os.path.dirname(script))
    runpy.run_path(script, run_name='__main__')
