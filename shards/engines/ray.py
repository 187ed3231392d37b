"""Jobs as Ray tasks, on a cluster or on a Ray of this machine that lives as long as the run.

Of Ray, only tasks are used, each on one CPU, started one by one as earlier ones end. A task whose worker or
node dies is seen here, so Ray itself tries nothing again.
"""

import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from shards.pool import JobFailed, Lost, attempt

log = logging.getLogger(__name__)

NODE_DEATHS = 10
"""A job is started again without further ado when its machine goes, but not more often."""
STARTS = 3
"""A Ray of this machine may be late on a busy one, and has no option for how long is waited for it."""
LOOK_SECONDS = 10.0
"""While no task starts or ends, it is looked so often whether there is a machine at all."""
OBJECT_STORE_BYTES = 100 << 20
"""Of a Ray of this machine. Results are small."""


@dataclass
class _Task:
    job: Any
    stream: Any
    """Of two objects: one when it starts, one when it is done."""
    deadline: float | None = None
    """None until it starts: it may wait for a CPU."""
    num_deaths: int = 0


def run_jobs(
    function: Callable[[Any], Any],
    next_job: Callable[[], Any | None],
    num_workers: int,
    limit_seconds: float,
    address: str | None = None,
) -> Iterator[tuple[Any, Any]]:
    """See `shards.pool.run_jobs`. At most `num_workers` tasks are handed to Ray at any time.

    Args:
        limit_seconds: counted from when the task starts; a worker that is late is killed.
        address: of a cluster, for `ray.init`; None: a Ray of this machine with `num_workers` CPUs. A Ray that this
            process has joined already is used as it is.

    Raises:
        JobFailed: a job raised, or Ray could not run it.
        OSError: the Ray of this machine has ended.
        ValueError: Ray is not installed, or there is no cluster at `address`.
    """
    with _joined(num_workers, address) as ray:
        remote = ray.remote(num_cpus=1, max_retries=0, num_returns="streaming")(_run)
        tasks: list[_Task] = []
        try:
            while True:
                while len(tasks) < num_workers and (job := next_job()) is not None:
                    tasks.append(_Task(job, remote.remote(function, job)))
                if not tasks:
                    return
                wait = min(task.deadline or float("inf") for task in tasks) - time.monotonic()
                ready, _ = ray.wait(
                    [task.stream for task in tasks], num_returns=1, timeout=min(max(wait, 0), LOOK_SECONDS)
                )
                if not ready:
                    _check_machines(ray, address)
                for task in list(tasks):
                    if any(task.stream is stream for stream in ready):
                        try:
                            value = ray.get(next(task.stream))
                        except _machine_errors(ray):
                            task.num_deaths += 1
                            if task.num_deaths <= NODE_DEATHS:
                                task.stream, task.deadline = remote.remote(function, task.job), None
                                continue
                            outcome = Lost("crash")
                        except (ray.exceptions.WorkerCrashedError, ray.exceptions.OutOfMemoryError):
                            outcome = Lost("crash")
                        except ray.exceptions.RayError as error:
                            raise JobFailed(
                                f"{error}\nThis project has to be installed, in the same version, on all machines "
                                f"of the cluster."
                            ) from None
                        else:
                            if value is None:
                                task.deadline = time.monotonic() + limit_seconds
                                continue
                            good, outcome = value
                            if not good:
                                raise JobFailed(outcome)
                    elif task.deadline is not None and time.monotonic() >= task.deadline:
                        ray.cancel(task.stream, force=True)
                        outcome = Lost("timeout")
                    else:
                        continue
                    tasks.remove(task)
                    yield task.job, outcome
        finally:
            for task in tasks:
                ray.cancel(task.stream, force=True)


def _run(function: Callable[[Any], Any], job: Any) -> Iterator[tuple[bool, Any] | None]:
    """Body of a task."""
    yield None
    yield attempt(function, job)


def _machine_errors(ray: Any) -> tuple[type[Exception], ...]:
    """What tells of the end of a machine, for which no job can be blamed."""
    errors = ray.exceptions
    return (errors.NodeDiedError, errors.ObjectLostError, errors.LocalRayletDiedError)


def _check_machines(ray: Any, address: str | None) -> None:
    """Without a machine, tasks wait for ever: an error if it was this one, else a warning, as others may come."""
    if any(node["Alive"] and node["Resources"].get("CPU") for node in ray.nodes()):
        return
    if address is None:
        raise OSError(
            "the Ray of this machine has ended; run the same command again, it goes on where it stopped (short of "
            "memory? lower --workers)"
        )
    log.warning("no machine of the Ray cluster at %s has a CPU; waiting for one", address)


@contextmanager
def _joined(num_workers: int, address: str | None) -> Iterator[Any]:
    """Gives the module `ray`, connected; what was started here ends here."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # or it warns of a future default
    try:
        import ray
    except ImportError as error:
        raise ValueError(f"engine 'ray' needs Ray ({error}); pip install cmac[ray]") from error
    if ray.is_initialized():
        yield ray
        return
    options: dict[str, Any] = {"address": address}
    if address is None:
        options = {
            "address": "local",
            "num_cpus": num_workers,
            "num_gpus": 0,
            "include_dashboard": False,
            "object_store_memory": OBJECT_STORE_BYTES,
        }
    in_main = threading.current_thread() is threading.main_thread()
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    _silence()
    _start(ray, options)
    try:
        if in_main:  # ray.init puts its own in place
            for number, handler in handlers.items():
                signal.signal(number, handler)
        yield ray
    finally:
        ray.shutdown()


def _start(ray: Any, options: dict[str, Any]) -> None:
    for _ in range(STARTS):
        try:
            ray.init(**options, log_to_driver=False, logging_level=logging.ERROR)
            return
        except (ConnectionError, RuntimeError) as error:
            if options["address"] != "local":
                raise ValueError(
                    f"no Ray cluster at {options['address']!r} ({error}); see `ray status`, or start one with `ray "
                    f"start --head`"
                ) from error
            last = error
        except Exception as error:  # which is what it raises, and no less, when it waits 30 s in vain
            last = error
        ray.shutdown()
    raise OSError(f"Ray did not start on this machine, {STARTS} times: {last}; is it overloaded?") from last


def _silence() -> None:
    """Keep Ray from printing into the progress bar. `log_to_driver` does not cover what it says of each worker
    that died, for which there is no option."""
    import ray._private.worker

    ray._private.worker.print_to_stdstream = lambda *unused, **named: None
