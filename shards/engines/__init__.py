"""What brings jobs to workers: processes of this machine, a Ray cluster, or Slurm jobs.

All have the interface of `shards.pool.run_jobs`: a generator of (job, result or `Lost`) pairs. Where and in which
order jobs run does not change what they leave.
"""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, get_args

from shards import pool, storage

EngineName = Literal["local", "ray", "slurm"]
ENGINES: tuple[str, ...] = get_args(EngineName)


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Which engine, and what it needs to know."""

    name: EngineName = "local"
    ray_address: str | None = None
    """Cluster to join: `auto`, `host:port` or `ray://host:port`; None: a Ray of its own on this machine."""
    slurm_chunk: int = 64
    """Videos per Slurm job."""
    slurm_options: tuple[tuple[str, str | bool], ...] = ()
    """(name, value) of sbatch options, without dashes in front; True for one without a value."""

    def __post_init__(self) -> None:
        if self.name not in ENGINES:
            raise ValueError(f"engine is {self.name!r}, expected one of {', '.join(ENGINES)}")
        if self.slurm_chunk < 1:
            raise ValueError(f"slurm_chunk is {self.slurm_chunk}, expected at least 1")
        for field, engine in (("ray_address", "ray"), ("slurm_options", "slurm")):
            if getattr(self, field) and self.name != engine:
                raise ValueError(
                    f"{field} is given for engine {self.name!r}, expected it with {engine!r} only; add --engine "
                    f"{engine}"
                )


def open_engine(config: EngineConfig, work: str) -> Callable[..., Iterator[tuple[Any, Any]]]:
    """A function like `shards.pool.run_jobs`.

    Args:
        work: location of the work area. Slurm's files go there too, if it is a folder.

    Raises:
        ValueError: the engine is not installed.
    """
    if config.name == "ray":
        from shards.engines import ray

        return functools.partial(ray.run_jobs, address=config.ray_address)
    if config.name == "slurm":
        from shards.engines import slurm

        folder = None if storage.is_url(work) else storage.join(work, slurm.FOLDER)
        return functools.partial(
            slurm.run_jobs, folder=folder, chunk=config.slurm_chunk, options=dict(config.slurm_options)
        )
    return pool.run_jobs
