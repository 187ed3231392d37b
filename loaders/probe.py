"""Which backend is the fastest here: a short trial of each on the user's own shards."""

import importlib.util
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from loaders.config import Backend, LoaderConfig
from loaders.plan import check_world

if TYPE_CHECKING:
    from loaders import Loader
    from loaders.batch import ClipBatch

CANDIDATES: tuple[Backend, ...] = ("dali-gpu", "dali-cpu-decode", "portable")
"""What `auto` chooses among; at equal speed the last is taken, which needs the least."""
NUM_ROUNDS = 3
CLIPS_PER_BATCH = 16  # at most, on a rank: small batches make for short turns
SLACK_BATCHES = 5  # ready beyond what workers have, at most: in the thread that finishes them and in DALI
CLEAR_GAIN = 1.05  # a candidate before the last must be this much faster to be taken


@dataclass(frozen=True, kw_only=True)
class Trial:
    """What one candidate did."""

    backend: Backend
    clips_per_second: float | None
    """On this rank, all ranks working; None: it could not run."""
    first_batch_seconds: float | None
    """From making the loader to its first batch."""
    reason: str
    """Why it could not run; empty if it did."""

    def __str__(self) -> str:
        if self.clips_per_second is None:
            return f"{self.backend}: {self.reason}"
        return (
            f"{self.backend}: {self.clips_per_second:,.0f} clips/s, first batch after "
            f"{self.first_batch_seconds:.1f} s"
        )


def why_unavailable(backend: Backend, config: LoaderConfig, device: torch.device) -> str:
    """Why this backend cannot run here; empty if nothing is known to be in the way."""
    if backend in ("dali-gpu", "dali-cpu-decode"):
        if importlib.util.find_spec("nvidia") is None or importlib.util.find_spec("nvidia.dali") is None:
            return "NVIDIA DALI is not installed"
        if config.audio.front_end != "log-mel":
            return f"DALI does not do the audio front end {config.audio.front_end}"
    if backend == "dali-gpu" and device.type != "cuda":
        return f"needs a GPU, the device is {device.type}"
    return ""


def try_backends(
    config: LoaderConfig,
    rank: int,
    world_size: int,
    device: torch.device,
    candidates: Sequence[Backend] = CANDIDATES,
) -> list[Trial]:
    """Times each candidate that can run for config.probe_seconds, in turns, on the configuration's own shards.

    Errors of a candidate are its reason for not being chosen: but for those of the configuration itself, which
    every candidate would have.

    Args:
        config: what to read; its backend does not matter.
        rank: this rank.
        world_size: number of ranks. All of them should be trying at the same time, as in training.
        device: where batches are wanted.
        candidates: what to try.

    Raises:
        ValueError: no candidate could run.
    """
    check_world(config.global_batch_size, rank, world_size)
    small = min(config.global_batch_size, CLIPS_PER_BATCH * world_size)
    config = replace(config, global_batch_size=small)
    contestants, reasons = {}, {}
    for backend in candidates:
        reasons[backend] = why_unavailable(backend, config, device)
        if not reasons[backend]:
            contestants[backend] = _Contestant(replace(config, backend=backend), rank, world_size, device)
    try:
        for contestant in contestants.values():
            contestant.start()
        for _ in range(NUM_ROUNDS):  # in turns: a machine that is busy for a while is so for all of them
            for contestant in contestants.values():
                contestant.run(config.probe_seconds / NUM_ROUNDS)
    finally:
        for contestant in contestants.values():
            contestant.close()
    trials = [
        contestants[backend].trial()
        if backend in contestants
        else Trial(backend=backend, clips_per_second=None, first_batch_seconds=None, reason=reasons[backend])
        for backend in candidates
    ]
    if all(trial.clips_per_second is None for trial in trials):
        raise ValueError("no loader backend could run: " + "; ".join(str(trial) for trial in trials))
    return trials


def choose_backend(trials: Sequence[Trial]) -> Backend:
    """The fastest; one that is not clearly faster gives way to those after it, which need less."""
    assert any(trial.clips_per_second is not None for trial in trials)
    chosen: Trial | None = None
    for trial in reversed(trials):
        if trial.clips_per_second is None:
            continue
        if chosen is None or trial.clips_per_second > CLEAR_GAIN * chosen.clips_per_second:
            chosen = trial
    return chosen.backend


def resolve_backend(
    config: LoaderConfig,
    rank: int,
    world_size: int,
    device: torch.device,
    say: Callable[[str], None],
    previous: str | None = None,
) -> LoaderConfig:
    """config with `auto` replaced by a backend, the same on all ranks, and the reason said.

    Args:
        config: returned as it is unless its backend is `auto`.
        rank: this rank.
        world_size: number of ranks; with more than one, torch.distributed must be set up and all must call.
        device: where batches are wanted.
        say: called with each line of what was found, on rank 0.
        previous: backend that the run to be resumed was using: taken again if it can run.

    Raises:
        ValueError: no backend can run.
    """
    if config.backend != "auto":
        return config
    # Every rank comes to every gather, whatever it knows and finds: else some would wait for the others for ever.
    unavailable = {backend: why_unavailable(backend, config, device) for backend in CANDIDATES}
    known = _gather((previous, unavailable), world_size)
    previous = known[0][0]
    reasons = {
        backend: next((of_rank[backend] for _, of_rank in known if of_rank[backend]), "")
        for backend in CANDIDATES
    }
    able = [backend for backend in CANDIDATES if not reasons[backend]]
    if previous in able:
        chosen, lines = previous, [f"loader backend: {previous}, as before in this run"]
    elif len(able) == 1:
        chosen = able[0]
        others = "; ".join(f"{backend}: {reason}" for backend, reason in reasons.items() if reason)
        lines = [f"loader backend: {chosen}, the only one that can run here ({others})"]
    else:
        trials = _try_together(config, rank, world_size, device, able)
        chosen = choose_backend(trials)
        lines = [
            f"loader backend: {chosen}, the fastest of a trial of {config.probe_seconds:g} s each on these "
            f"shards (--loader.backend {chosen} skips it)",
            *(f"  {trial}" for trial in trials),
            *(f"  {backend}: {reason}" for backend, reason in reasons.items() if reason),
        ]
    if rank == 0:
        for line in lines:
            say(line)
    return replace(config, backend=chosen)


def _gather(value: Any, world_size: int) -> list[Any]:
    """value of every rank."""
    if world_size == 1:
        return [value]
    values: list[Any] = [None] * world_size
    dist.all_gather_object(values, value)
    return values


def _try_together(
    config: LoaderConfig,
    rank: int,
    world_size: int,
    device: torch.device,
    candidates: Sequence[Backend],
) -> list[Trial]:
    """Each candidate's speed over all ranks; it must have run on every one."""
    trials, error = [], ""
    try:
        trials = try_backends(config, rank, world_size, device, candidates)
    except ValueError as problem:
        error = str(problem)
    by_rank = _gather((trials, error), world_size)
    for number, (_, problem) in enumerate(by_rank):
        if problem:
            raise ValueError(problem if number == rank else f"rank {number}: {problem}")
    together = []
    for of_ranks in zip(*(trials for trials, _ in by_rank), strict=True):
        failed = [trial for trial in of_ranks if trial.clips_per_second is None]
        if failed:
            together.append(failed[0])
        else:
            rate = sum(trial.clips_per_second for trial in of_ranks)
            together.append(replace(of_ranks[0], clips_per_second=rate))
    if all(trial.clips_per_second is None for trial in together):
        raise ValueError("no loader backend could run on every rank: " + "; ".join(map(str, together)))
    return together


class _Contestant:
    """One candidate's loader, kept between its turns: what works ahead then fills its buffers and waits."""

    def __init__(self, config: LoaderConfig, rank: int, world_size: int, device: torch.device) -> None:
        self._config = config
        self._build = partial(_build, config, rank, world_size, device)
        self._device = device
        self._loader: Loader | None = None
        self._batches: Iterator[ClipBatch] | None = None
        self._first_batch_seconds: float | None = None
        self._rates: list[float] = []
        self._reason = ""

    def start(self) -> None:
        """Makes the loader and takes the first batch."""
        started = time.perf_counter()
        with self._catch():
            self._loader = self._build()
            self._batches = _endless(self._loader)
            next(self._batches)
            self._first_batch_seconds = time.perf_counter() - started

    def run(self, seconds: float) -> None:
        """One turn, unless an earlier one failed."""
        if self._reason:
            return
        with self._catch():
            # What was made ready between the turns must not count.
            num_workers = max(1, self._config.num_workers)
            num_ready = -(-self._config.prefetch_batches // num_workers) * num_workers + SLACK_BATCHES
            for _ in range(num_ready):
                next(self._batches)
            self._wait()
            num_clips, start = 0, time.perf_counter()
            while num_clips == 0 or time.perf_counter() - start < seconds:
                num_clips += next(self._batches).num_clips
            self._wait()
            self._rates.append(num_clips / (time.perf_counter() - start))

    def close(self) -> None:
        """Ends the loader."""
        if self._loader is not None:
            self._loader.close()

    def trial(self) -> Trial:
        """The result."""
        return Trial(
            backend=self._config.backend,
            clips_per_second=None if self._reason else statistics.median(self._rates),
            first_batch_seconds=self._first_batch_seconds,
            reason=self._reason,
        )

    @contextmanager
    def _catch(self) -> Iterator[None]:
        """An error of this candidate is the reason why it is not chosen; but what is wrong with the
        configuration or the shards is wrong for all, and goes on as ValueError."""
        try:
            yield
        except (ImportError, OSError, RuntimeError) as error:
            self._reason = f"{type(error).__name__}: {(str(error) or 'no message').splitlines()[0]}"

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


def _build(config: LoaderConfig, rank: int, world_size: int, device: torch.device) -> "Loader":
    from loaders import build_loader

    return build_loader(config, rank, world_size, device=device)


def _endless(loader: "Loader") -> "Iterator[ClipBatch]":
    while True:
        yield from loader
