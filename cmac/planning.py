"""What preparing a data set and pretraining on it costs, from rates that say where they come from.

Quantities are products and quotients of rates, so that each keeps the list of the rates it rests on, and their ranges.
No rate is measured here and none is a default: they are handed in (`tools/plan.py` reads them from result files).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

Kind = Literal["counted", "given", "published", "measured", "arithmetic", "assumed"]
"""Where a number comes from: counted exactly, the user's choice, a publication, a measurement, arithmetic on a
machine's data sheet that no measurement has confirmed, or nothing better than experience."""
FIRM = ("counted", "given")
"""Kinds that need no mention."""
ESTIMATES = ("arithmetic", "assumed")
"""Kinds that nothing has confirmed."""


@dataclass(frozen=True, kw_only=True)
class Rate:
    """A number that the plan rests on."""

    name: str
    value: float
    low: float
    high: float
    """`low` to `high`: 20th to 80th percentile of a measurement, or the range of an estimate."""
    unit: str
    kind: Kind
    where: str
    """Result file, commit and hardware of a measurement; source of a publication; reason of an estimate."""

    def __post_init__(self) -> None:
        if not 0 < self.low <= self.value <= self.high:
            raise ValueError(
                f"{self.name} is {self.value:g} with the range {self.low:g} to {self.high:g}, expected a positive "
                f"value within its range"
            )


def exactly(name: str, value: float, unit: str, kind: Kind, where: str) -> Rate:
    """A rate without a range."""
    return Rate(name=name, value=value, low=value, high=value, unit=unit, kind=kind, where=where)


@dataclass(frozen=True, kw_only=True)
class Quantity:
    """A line of the plan."""

    name: str
    value: float
    low: float
    high: float
    """`low` to `high`: with every rate at the end of its range that makes the quantity small or large."""
    unit: str
    rests_on: tuple[Rate, ...]
    """Without repetition."""

    @property
    def basis(self) -> str:
        """Kinds of the rates, the weakest last: `measured`, `measured + assumed`, ...; `counted` if nothing else."""
        order = get_args(Kind)
        kinds = {rate.kind for rate in self.rests_on} - set(FIRM)
        return " + ".join(sorted(kinds, key=order.index)) or "counted"


Factor = Rate | Quantity | float


def quantity(name: str, unit: str, times: Sequence[Factor], over: Sequence[Factor] = ()) -> Quantity:
    """The product of `times` divided by each of `over`, with its range and the rates in it."""
    value = low = high = 1.0
    rates: dict[str, Rate] = {}
    for factors, up in ((times, True), (over, False)):
        for factor in factors:
            ends = (
                (factor,) * 3 if isinstance(factor, (int, float)) else (factor.value, factor.low, factor.high)
            )
            if up:
                value, low, high = value * ends[0], low * ends[1], high * ends[2]
            else:
                value, low, high = value / ends[0], low / ends[2], high / ends[1]
            if isinstance(factor, Rate):
                rates[factor.name] = factor
            elif isinstance(factor, Quantity):
                rates |= {rate.name: rate for rate in factor.rests_on}
    return Quantity(name=name, value=value, low=low, high=high, unit=unit, rests_on=tuple(rates.values()))


@dataclass(frozen=True, kw_only=True)
class Rates:
    """All that a plan rests on."""

    videos: Rate
    """In the annotation or the folder."""
    kept: Rate
    """Share of the videos that give clips, 0 to 1."""
    video_seconds: Rate
    """Seconds of a video that are cut into clips."""
    source_bytes: Rate
    """Bytes of a source file per second of it."""
    prepare: Rate
    """Clips per second that one core makes."""
    clip_bytes: Rate
    """Bytes of a clip in a shard."""
    feed: Rate
    """Core seconds that a clip costs the loader of a GPU."""
    step: Rate
    """Clips per second that one GPU trains on."""
    scaling: Rate
    """Clips/s of all GPUs / (clips/s of one * number of GPUs), 0 to 1."""
    checkpoint: Rate
    """Bytes of one checkpoint."""


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """What there is."""

    gpus: int
    """Per node."""
    nodes: int = 1
    cores: int = 1
    """Per node."""

    def __post_init__(self) -> None:
        for name in ("gpus", "nodes", "cores"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected at least 1; check --{name}")


@dataclass(frozen=True, kw_only=True)
class Training:
    """The part of a run's configuration that cost depends on."""

    epochs: int
    global_batch_size: int
    clips_per_video: int = 1
    """Read of a video per epoch."""
    num_slots: int = 10
    """Clips stored of a video."""
    videos_per_shard: int = 1000
    keep_checkpoints: int = 3


def plan(rates: Rates, hardware: Hardware, training: Training) -> dict[str, list[Quantity]]:
    """The lines of a plan by section: `prepare`, `train`.

    Raises:
        ValueError: the GPUs do not divide the batch.
    """
    num_gpus = hardware.gpus * hardware.nodes
    if training.global_batch_size % num_gpus:
        raise ValueError(
            f"{num_gpus} GPUs do not divide the batch of {training.global_batch_size} clips, expected a number that "
            f"does; change --gpus, --nodes or --batch"
        )
    usable = quantity("videos that give clips", "videos", [rates.videos, rates.kept])
    seconds = quantity("seconds cut", "s", [rates.videos, rates.video_seconds])
    source = quantity("source files", "bytes", [seconds, rates.source_bytes])
    cpu_hours = quantity("CPU time", "core hours", [seconds], [rates.prepare, 3600.0])
    total_cores = float(hardware.cores * hardware.nodes)
    hours = quantity(f"wall time on {total_cores:.0f} cores", "hours", [cpu_hours], [total_cores])
    stored = quantity("shards", "bytes", [usable, float(training.num_slots), rates.clip_bytes])
    prepare = [
        usable,
        source,
        cpu_hours,
        hours,
        # The seconds and the videos cancel: what the cores eat while they work.
        quantity("read while preparing", "bytes/s", [total_cores, rates.prepare, rates.source_bytes]),
        stored,
        quantity(
            "shard files", "files", [usable, float(training.num_slots)], [float(training.videos_per_shard)]
        ),
    ]
    per_epoch = quantity("clips per epoch", "clips", [usable, float(training.clips_per_video)])
    clips = quantity("clips in all", "clips", [per_epoch, float(training.epochs)])
    gpu = quantity("one GPU among them", "clips/s", [rates.step, rates.scaling])
    gpu_hours = quantity("GPU time", "GPU hours", [clips], [gpu, 3600.0])
    checkpoints = float(training.keep_checkpoints)
    train = [
        quantity("steps", "steps", [usable, float(training.epochs)], [float(training.global_batch_size)]),
        clips,
        quantity(f"all {num_gpus} GPUs", "clips/s", [gpu, float(num_gpus)]),
        gpu_hours,
        quantity("an epoch", "hours", [per_epoch], [gpu, 3600.0, float(num_gpus)]),
        quantity("the run", "days", [gpu_hours], [24.0, float(num_gpus)]),
        quantity("cores that feed one GPU", "cores", [gpu, rates.feed]),
        quantity("cores that feed a node", "cores", [gpu, rates.feed, float(hardware.gpus)]),
        quantity("read per epoch", "bytes", [per_epoch, rates.clip_bytes]),
        quantity("read by a node", "bytes/s", [gpu, rates.clip_bytes, float(hardware.gpus)]),
        quantity("read by all nodes", "bytes/s", [gpu, rates.clip_bytes, float(num_gpus)]),
        quantity("a checkpoint", "bytes", [rates.checkpoint]),
        quantity(
            f"the {training.keep_checkpoints} checkpoints kept", "bytes", [rates.checkpoint, checkpoints]
        ),
    ]
    return {"prepare": prepare, "train": train}
