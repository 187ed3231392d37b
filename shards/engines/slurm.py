"""Jobs as Slurm jobs, through submitit: a chunk of them per Slurm job, which works on them with processes of its
own (`shards.pool`), so that a video that crashes or hangs costs no other there either."""

import contextlib
import io
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shards.pool import JobFailed, without_main_module
from shards.pool import run_jobs as run_in_processes

log = logging.getLogger(__name__)

FOLDER = "make_shards-slurm"
"""In the work area: scripts, logs and results of Slurm jobs."""
SUBMISSIONS = 5
"""A chunk whose Slurm job ends without a result (pre-emption, a failed node, the time limit) is submitted so many
times. Videos that have a result are not sliced again."""
SUBMIT_SECONDS = 600.0
"""sbatch may fail for so long (its controller is busy, a limit on submissions is reached) while nothing else runs."""
FIRST_WAIT_SECONDS, LONGEST_WAIT_SECONDS = 5.0, 120.0
"""Before sbatch is tried again; doubled from the one to the other."""
CPUS = 4
"""Of a Slurm job, where the options do not tell."""
MINUTES = 240
"""Time limit of a Slurm job, where the options do not tell."""
POLL_SECONDS = {"local": 0.1}
"""Between two looks at the Slurm jobs; 5 for others."""


@dataclass
class _Chunk:
    jobs: list[Any]
    handle: Any = None
    """submitit's job; None while it is to be submitted."""
    num_submissions: int = 0


def run_jobs(
    function: Callable[[Any], Any],
    next_job: Callable[[], Any | None],
    num_workers: int,
    limit_seconds: float,
    *,
    folder: str | None,
    chunk: int,
    options: dict[str, str | bool],
) -> Iterator[tuple[Any, Any]]:
    """See `shards.pool.run_jobs`. At most `num_workers` Slurm jobs are outstanding at any time.

    Args:
        folder: for submitit's files, on a disk that all nodes see; `options["folder"]` wins.
        chunk: jobs per Slurm job.
        options: of sbatch, by their long names. `cluster` = `local` runs the Slurm jobs as processes of this
            machine, which is for tests.

    Raises:
        JobFailed: a job raised, or a chunk got no result though submitted `SUBMISSIONS` times, or sbatch failed for
            `SUBMIT_SECONDS` while nothing was running.
        ValueError: submitit or Slurm is not installed, or no `folder` is known.
    """
    submitit, executor, num_processes, poll_seconds = _executor(folder, options)

    def send(jobs: list[Any]) -> Any:
        return executor.submit(_run_chunk, function, jobs, num_processes, limit_seconds)

    errors = (submitit.core.utils.FailedJobError, submitit.core.utils.FailedSubmissionError)
    submitter = _Submitter(send, errors)
    chunks: list[_Chunk] = []
    try:
        while True:
            while True:
                waiting = next((one for one in chunks if one.handle is None), None)
                if waiting is None:
                    jobs: list[Any] = []
                    while len(chunks) < num_workers and len(jobs) < chunk and (job := next_job()) is not None:
                        jobs.append(job)
                    if not jobs:
                        break
                    waiting = _Chunk(jobs)
                    chunks.append(waiting)
                if not submitter.submit(waiting, alone=all(one.handle is None for one in chunks)):
                    break
            if not chunks:
                return
            ended = [one for one in chunks if one.handle is not None and one.handle.done()]
            if not ended:
                time.sleep(poll_seconds)
            for one in ended:
                try:
                    good, outcomes = one.handle.result()
                except submitit.core.utils.UncompletedJobError as error:
                    if one.num_submissions == SUBMISSIONS:
                        raise JobFailed(
                            f"Slurm job {one.handle.job_id} ended without a result, as did {SUBMISSIONS - 1} before "
                            f"it ({str(error)[-1000:]}); see its log {one.handle.paths.stderr}, check --slurm-option, "
                            f"and run the same command again, it goes on where it stopped"
                        ) from None
                    one.handle = None
                    continue
                if not good:
                    raise JobFailed(outcomes)
                chunks.remove(one)
                yield from zip(one.jobs, outcomes, strict=True)
    finally:
        for one in chunks:
            if one.handle is not None:
                one.handle.cancel(check=False)


class _Submitter:
    """Hands chunks to Slurm, and waits after each failure before the next attempt, longer each time."""

    def __init__(self, send: Callable[[list[Any]], Any], errors: tuple[type[Exception], ...]) -> None:
        """errors: of `send`, when sbatch fails."""
        self.send = send
        self.errors = errors
        self._forget()

    def _forget(self) -> None:
        self.wait = 0.0
        self.next_attempt = 0.0
        self.alone_since: float | None = None
        self.text = ""

    def submit(self, chunk: _Chunk, alone: bool) -> bool:
        """Whether the chunk is with Slurm now; if not, call again later.

        alone: no other chunk is with Slurm, so that this cannot go on for ever.
        """
        now = time.monotonic()
        if now < self.next_attempt:
            return False
        try:
            with contextlib.redirect_stderr(io.StringIO()):  # submitit prints what the error holds
                chunk.handle = self.send(chunk.jobs)
        except self.errors as error:
            text = " ".join(str(error).split()) or "without a word"
            if not alone:
                self.alone_since = None
            elif self.alone_since is None:
                self.alone_since = now
            elif now - self.alone_since >= SUBMIT_SECONDS:
                raise JobFailed(
                    f"sbatch failed for {SUBMIT_SECONDS:.0f} s ({text}); check --slurm-option and whether Slurm takes "
                    f"jobs (sinfo), and run the same command again, it goes on where it stopped"
                ) from None
            if text != self.text:
                self.text = text
                log.warning("sbatch failed (%s); it is tried again, what runs goes on", text)
            self.wait = min(max(2 * self.wait, FIRST_WAIT_SECONDS), LONGEST_WAIT_SECONDS)
            self.next_attempt = time.monotonic() + self.wait
            return False
        # Slurm may have taken the job of a failed attempt, too; it finds no file of its own and ends.
        chunk.num_submissions += 1
        self._forget()
        return True


def _run_chunk(
    function: Callable[[Any], Any], jobs: list[Any], num_processes: int, limit_seconds: float
) -> tuple[bool, Any]:
    """Body of a Slurm job: (True, outcomes in the order of `jobs`), or (False, text) if one raised."""
    numbered = list(enumerate(jobs))
    outcomes: list[Any] = [None] * len(jobs)
    with without_main_module():
        try:
            for (number, _), outcome in run_in_processes(
                _Numbered(function),
                lambda: numbered.pop(0) if numbered else None,
                num_processes,
                limit_seconds,
            ):
                outcomes[number] = outcome
        except JobFailed as error:
            return False, str(error)
    return True, outcomes


@dataclass(frozen=True)
class _Numbered:
    function: Callable[[Any], Any]

    def __call__(self, job: tuple[int, Any]) -> Any:
        return self.function(job[1])


def processes_per_job(options: dict[str, str | bool]) -> int:
    """Videos that a Slurm job works on at the same time; ValueError if the options tell no number."""
    cpus = {name.replace("-", "_"): value for name, value in options.items()}.get("cpus_per_task", CPUS)
    if not str(cpus).isdecimal() or int(cpus) < 1:
        raise ValueError(f"--slurm-option cpus-per-task is {cpus!r}, expected a number from 1 on")
    return int(cpus)


def _executor(folder: str | None, options: dict[str, str | bool]) -> tuple[Any, Any, int, float]:
    """submitit, its executor, processes per Slurm job, seconds between two looks."""
    try:
        import submitit
    except ImportError as error:
        raise ValueError(f"engine 'slurm' needs submitit ({error}); pip install cmac[slurm]") from error
    sbatch = {name.replace("-", "_"): value for name, value in options.items()}
    cluster = sbatch.pop("cluster", "slurm")
    folder = sbatch.pop("folder", folder)
    if folder is None:
        raise ValueError(
            "the work area is at a URL and Slurm's files need a folder that all nodes see; add --slurm-option "
            "folder=PATH"
        )
    cpus = processes_per_job(options)
    sbatch.pop("cpus_per_task", None)
    Path(folder).mkdir(parents=True, exist_ok=True)
    try:
        executor = submitit.AutoExecutor(folder=folder, cluster=cluster)
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"engine 'slurm': {error}; expected sbatch and srun on PATH") from error
    executor.update_parameters(
        name="make_shards",
        cpus_per_task=cpus,
        timeout_min=MINUTES,
        slurm_additional_parameters=sbatch,  # these win
    )
    return submitit, executor, cpus, POLL_SECONDS.get(cluster, 5.0)
