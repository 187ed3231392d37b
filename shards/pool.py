"""Worker processes that outlive bad jobs: a job that crashes or hangs its process costs that process
alone."""

import multiprocessing
import multiprocessing.connection
import os
import platform
import signal
import sys
import time
import traceback
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from types import FrameType
from typing import Any

TERMINATE_SECONDS = 5.0
"""A process that is told to end gets so long before it is killed."""


class JobFailed(Exception):
    """A job raised; the message holds the traceback. The cause has nothing to do with what is in a video."""


@dataclass(frozen=True)
class Lost:
    """Takes the place of the result of a job whose process died (`crash`) or was killed for being late
    (`timeout`)."""

    reason: str


@dataclass
class _Worker:
    process: multiprocessing.process.BaseProcess
    connection: Connection
    job: Any = None
    deadline: float = float("inf")


def run_jobs(
    function: Callable[[Any], Any],
    next_job: Callable[[], Any | None],
    num_workers: int,
    limit_seconds: float,
) -> Iterator[tuple[Any, Any]]:
    """Run jobs in processes and give (job, result) pairs as they finish.

    `next_job` is asked whenever a process is free and gives None while there is nothing to do; it may have
    more once the caller has seen further results. Ends when it gives None and nothing is running. Closing the
    iterator early, or an exception, ends all processes. Processes end by themselves when this one is gone.

    Args:
        function: of one job; importable, as are jobs and results.
        limit_seconds: a process that has worked for longer than this on one job is killed.

    Raises:
        JobFailed: a job raised.
    """
    context = multiprocessing.get_context("spawn")
    workers: list[_Worker] = []

    def start() -> _Worker:
        ours, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(theirs, function), daemon=True)
        process.start()
        theirs.close()
        return _Worker(process, ours)

    try:
        while True:
            for slot in range(num_workers):
                if slot < len(workers) and workers[slot].job is not None:
                    continue
                job = next_job()
                if job is None:
                    break
                if slot == len(workers):
                    workers.append(start())
                worker = workers[slot]
                worker.job, worker.deadline = job, time.monotonic() + limit_seconds
                try:
                    worker.connection.send(job)
                except (BrokenPipeError, ConnectionResetError):
                    pass  # it died while idle or while starting; seen below
            busy = [worker for worker in workers if worker.job is not None]
            if not busy:
                return
            wait = max(min(worker.deadline for worker in busy) - time.monotonic(), 0)
            ready = multiprocessing.connection.wait(
                [worker.connection for worker in busy], timeout=min(wait, 3600)
            )
            for slot, worker in enumerate(workers):
                if worker.job is None:
                    continue
                if worker.connection in ready:
                    outcome = _receive(worker)
                elif time.monotonic() >= worker.deadline:
                    outcome = Lost("timeout")
                else:
                    continue
                job, worker.job = worker.job, None
                if isinstance(outcome, Lost):
                    _end(worker)
                    workers[slot] = start()
                yield job, outcome
    finally:
        for worker in workers:
            if worker.process.is_alive():
                worker.process.terminate()
        for worker in workers:
            _end(worker)


def _receive(worker: _Worker) -> Any:
    try:
        good, value = worker.connection.recv()
    except (EOFError, ConnectionResetError):
        return Lost("crash")
    if not good:
        raise JobFailed(value)
    return value


def _end(worker: _Worker) -> None:
    worker.process.terminate()
    worker.process.join(TERMINATE_SECONDS)
    if worker.process.is_alive():
        worker.process.kill()
        worker.process.join()
    worker.connection.close()


def attempt(function: Callable[[Any], Any], job: Any) -> tuple[bool, Any]:
    """(True, result) of one job, or (False, text) if it raised: the message of an OSError, which is about the
    machine, and the traceback of everything else."""
    try:
        return True, function(job)
    except Exception as error:  # whatever it is, the parent has to know
        return False, str(error) if isinstance(error, OSError) else traceback.format_exc()


def _serve(connection: Connection, function: Callable[[Any], Any]) -> None:
    """Body of a worker process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the whole group; the parent decides

    def leave(number: int, frame: FrameType | None) -> None:
        sys.exit(128 + number)  # as an exception, so that a running ffmpeg is killed on the way out

    signal.signal(signal.SIGTERM, leave)
    while True:
        try:
            job = connection.recv()
        except (EOFError, OSError):
            return
        try:
            connection.send(attempt(function, job))
        except OSError:
            return


@contextmanager
def without_main_module() -> Iterator[None]:
    """Processes started inside do not import the program's main module, which they do not need.

    They start faster and smaller, and a script without an `if __name__ == "__main__":` guard works.
    """
    main = sys.modules["__main__"]
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


def usable_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cpu_model() -> str:
    """Name of the CPU as the system gives it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.machine()
