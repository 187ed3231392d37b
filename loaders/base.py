"""What all loaders share: the order of clips, the position in it, its state, and the budget for bad clips."""

import logging
import math
import os
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from loaders.batch import ClipBatch
from loaders.config import LoaderConfig
from loaders.plan import EpochPlan, check_world, count_batches, shards_in_window, slots_of_epoch
from loaders.shard_cache import CacheConfig, ComingShard, FetchAhead, ShardCache, default_cache_dir
from loaders.shard_files import OPEN_SHARDS, ShardFiles, open_shards
from loaders.shared_memory import SharedBuffer
from shards.manifest import read_manifest
from shards.storage import Retry, is_url

MIN_CLIPS_FOR_BUDGET = 100  # of fewer, one bad clip or two say nothing of their share
CHANCE_OF_BUDGET = 1e-6  # that clips within max_bad_fraction look as bad as those that end a run, at most
STATE_VERSION = 2

log = logging.getLogger(__name__)


class TooManyBadClips(RuntimeError):
    """More than max_bad_fraction of the clips could not be used."""

    def __init__(self, message: str, batch: ClipBatch) -> None:
        super().__init__(message)
        self.batch = batch
        """The batch with which they became too many: it is not handed out, but its bad clips count."""


@dataclass(kw_only=True)
class ClipCounts:
    """How many clips were seen, and which of them were bad."""

    seen: int = 0
    """Without padding; of two clips per video both count."""
    by_reason: Counter[str] = field(default_factory=Counter)
    """Bad clips by reason."""
    by_shard: Counter[str] = field(default_factory=Counter)
    """Bad clips by the shard that holds them."""

    @property
    def bad(self) -> int:
        """Number of bad clips."""
        return self.by_reason.total()

    def add(self, batch: ClipBatch) -> None:
        """Count a batch, and its second clips."""
        for part in (batch, batch.second):
            if part is not None:
                self.seen += sum(key != "" for key in part.keys)
                self.by_reason.update(record.reason for record in part.bad)
                self.by_shard.update(record.shard for record in part.bad)

    def over_budget(self, allowed: float, folder: str, whose: str = "") -> str:
        """What is said where more than `allowed` of them are bad. whose: follows the number of clips."""
        reasons = ", ".join(f"{reason} {count}" for reason, count in self.by_reason.most_common())
        shards = ", ".join(f"{shard} ({count})" for shard, count in self.by_shard.most_common(3))
        return (
            f"{self.bad} of {self.seen} clips{whose} are bad ({reasons}), expected at most {allowed:.2%} "
            f"(loader.max_bad_fraction); {f'most are in {shards}; ' if shards else ''}run tools/check_shards.py on "
            f"{folder}"
        )


def is_over_budget(num_bad: int, num_seen: int, num_left: int, allowed: float) -> bool:
    """Whether more than the share `allowed` of all clips is bad: with those that are left of the epoch, were they all
    good, from MIN_CLIPS_FOR_BUDGET on. What is bad often lies together, in one shard, so the share of those seen says
    little of the rest. But at half of them or more one does not wait: it is over if that is beyond a doubt.

    Args:
        num_bad: clips that are bad.
        num_seen: clips so far, with those.
        num_left: clips to come until the epoch ends.
        allowed: 0: none may be bad; 1: all may.
    """
    if num_bad <= allowed * num_seen:
        return False
    num_clips = num_seen + num_left
    if allowed == 0 or (num_clips >= MIN_CLIPS_FOR_BUDGET and num_bad > allowed * num_clips):
        return True
    share = num_bad / num_seen
    if share < 0.5:
        return False
    # Chernoff: where `allowed` of all clips are bad, so large a share of a sample is with this chance at most.
    divergence = share * math.log(share / allowed)
    if share < 1:
        divergence += (1 - share) * math.log((1 - share) / (1 - allowed))
    return math.exp(-num_seen * divergence) < CHANCE_OF_BUDGET


class WorkerDied(RuntimeError):
    """A worker process ended, or made nothing for so long that it was ended. str() is a sentence for a user."""


@dataclass(frozen=True, kw_only=True)
class ClipTable:
    """Which clips there are, without their contents."""

    folder: str
    """Where they come from, for messages."""
    num_slots: int
    """An epoch reads one slot; each holds every video once."""
    clips_per_shard: Sequence[int]
    """Number of clips of each shard of a slot, the same in every slot."""
    identity: dict[str, Any]
    """JSON-able: equal only where the same numbers mean the same clips."""
    files: ShardFiles | None = None
    """The shards, where the clips come from shards."""


@dataclass(frozen=True, kw_only=True)
class BatchRequest:
    """Which clips make up one rank's batch: positions, no data."""

    epoch: int
    """Epoch number."""
    step: int
    """Index of the batch in the epoch."""
    rows: np.ndarray
    """int64 (N, 2): (shard index, position in the shard); PADDING for no clip."""
    slots: tuple[int, ...]
    """The slot to read, and with two clips per video that of the second ones."""
    buffer: SharedBuffer | None = None
    """Where a worker process puts the clips; None: into memory of its own."""


class PositionedLoader(ABC):
    """Batches of one rank; see `loaders.Loader` for the interface.

    `for batch in loader` yields the rest of the current epoch and then moves on to the next one. What works
    ahead of the consumer starts at the first batch, lives through all epochs, and works on over the end of an
    epoch. A subclass makes the batches: `_take` and `close`.
    """

    def __init__(self, config: LoaderConfig, rank: int, world_size: int, table: ClipTable) -> None:
        """
        Raises:
            ValueError: world_size does not divide the global batch, fewer clips than one batch, or two clips
                per video from one slot.
        """
        check_world(config.global_batch_size, rank, world_size)
        self.config = config
        self.rank = rank
        self.world_size = world_size
        self.table = table
        slots_of_epoch(0, table.num_slots, config.clips_per_video)
        num_clips = sum(table.clips_per_shard)
        self._num_batches = count_batches(num_clips, config.global_batch_size, config.drop_last)
        if self._num_batches == 0:
            raise ValueError(
                f"loader.global_batch_size is {config.global_batch_size}, expected at most {num_clips}, the "
                f"clips in a slot of {table.folder}; or use drop_last=False"
            )
        self.epoch = 0
        self._next_batch = 0
        self.judges_bad_clips = True
        self._counts = ClipCounts()
        self._ahead: FetchAhead | None = None

    @abstractmethod
    def _take(self) -> ClipBatch:
        """Batch number `next_batch` of `epoch`; starts what works ahead if it does not run."""

    @abstractmethod
    def close(self) -> None:
        """End what works ahead. Iterating again starts it anew at the current position."""

    @property
    def bad_clips(self) -> Counter[str]:
        """See `loaders.Loader`."""
        return self._counts.by_reason

    @property
    def batch_size(self) -> int:
        """Clips per batch of this rank (N)."""
        return self.config.global_batch_size // self.world_size

    def __len__(self) -> int:
        """Batches per epoch, the same in every epoch and on every rank."""
        return self._num_batches

    @property
    def next_batch(self) -> int:
        """Index in the epoch of the batch that comes next; len(self) after the epoch's last one."""
        return self._next_batch

    def plan(self, epoch: int) -> EpochPlan:
        """Order of the clips of an epoch, over all ranks."""
        config = self.config
        return EpochPlan(
            clips_per_shard=self.table.clips_per_shard,
            seed=config.seed,
            epoch=epoch,
            global_batch_size=config.global_batch_size,
            shuffle=config.shuffle,
            shuffle_window=config.shuffle_window,
            drop_last=config.drop_last,
        )

    def requests(self) -> Iterator[BatchRequest]:
        """This rank's batches from the current position on, through all later epochs. Shards from a URL are brought
        ahead of them, until `stop_fetching`."""
        epoch, first = self.epoch, self._next_batch
        ahead = self._start_fetching()
        while True:
            plan = self.plan(epoch)
            slots = slots_of_epoch(epoch, self.table.num_slots, self.config.clips_per_video)
            for step in range(first, plan.num_batches):
                rows = plan.batch(step, self.rank, self.world_size)
                if ahead is not None:
                    ahead.move(epoch, step)
                yield BatchRequest(epoch=epoch, step=step, rows=rows, slots=slots)
            epoch, first = epoch + 1, 0

    def coming_shards(self) -> Iterator[ComingShard]:
        """Shards that the batches from the current position on read from, through all later epochs, in the order in
        which they are first needed by any rank."""
        assert self.table.files is not None
        epoch, start = self.epoch, self._next_batch
        while True:
            slots = slots_of_epoch(epoch, self.table.num_slots, self.config.clips_per_video)
            for index, first, last in self.plan(epoch).shard_spans():
                if last >= start:
                    for path in self.table.files.epoch_paths(slots, index):
                        yield ComingShard(os.path.basename(path), (epoch, first), (epoch, last))
            epoch, start = epoch + 1, 0

    def _start_fetching(self) -> FetchAhead | None:
        self.stop_fetching()
        files = self.table.files
        if files is not None and files.cache is not None and self.config.cache_ahead > 0:
            self._ahead = FetchAhead(files.cache, self.coming_shards(), self.config.cache_ahead)
        return self._ahead

    def stop_fetching(self) -> None:
        """End what `requests` began: to be called by `close`."""
        ahead, self._ahead = self._ahead, None
        if ahead is not None:
            assert self.table.files is not None and self.table.files.cache is not None
            ahead.close()
            self.table.files.cache.close()

    def __iter__(self) -> Iterator[ClipBatch]:
        """The batches that are left of the current epoch.

        Raises:
            TooManyBadClips: more than max_bad_fraction of the clips are bad; not with judges_bad_clips off.
            SourceError: the URL of the shards could not be read.
            WorkerDied: a worker process died, or made nothing for too long.
        """
        epoch = self.epoch
        while self.epoch == epoch and self._next_batch < len(self):
            batch = self._take()
            assert (batch.epoch, batch.step) == (self.epoch, self._next_batch)
            self._next_batch += 1
            self._count(batch)
            yield batch
        if self.epoch == epoch:
            self.epoch, self._next_batch = epoch + 1, 0

    def state_dict(self) -> dict[str, Any]:
        """Position after the last batch handed out, in global batches, and what makes it mean the same again.

        Batches that are ready but were not handed out are not counted. Equal on all ranks that have taken
        equally many batches, and loadable with another number of ranks or workers, and by another backend on
        the same shards.
        """
        return {
            "version": STATE_VERSION,
            "epoch": self.epoch,
            "next_batch": self._next_batch,
            **self._order_fields(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a saved position; batches already made ready are thrown away.

        Raises:
            ValueError: the state is of another version, or of another order of clips: other shards, seed,
                global batch size, shuffling, drop_last or clips per video.
        """
        if state.get("version") != STATE_VERSION:
            raise ValueError(f"loader state has version {state.get('version')}, expected {STATE_VERSION}")
        for name, expected in self._order_fields().items():
            if state.get(name) != expected:
                raise ValueError(
                    f"loader state was saved with {name} {state.get(name)!r}, but it is {expected!r} now; "
                    f"resume with the old value or start a new run"
                )
        if state["epoch"] < 0 or not 0 <= state["next_batch"] <= len(self):
            raise ValueError(
                f"loader state is at batch {state['next_batch']} of epoch {state['epoch']}, "
                f"expected 0 to {len(self)}"
            )
        if (self.epoch, self._next_batch) != (state["epoch"], state["next_batch"]):
            self.close()
            self.epoch, self._next_batch = state["epoch"], state["next_batch"]

    def _order_fields(self) -> dict[str, Any]:
        """What the order of clips depends on, besides the epoch."""
        names = ("seed", "global_batch_size", "shuffle", "shuffle_window", "drop_last", "clips_per_video")
        return {**self.table.identity, **{name: getattr(self.config, name) for name in names}}

    def _count(self, batch: ClipBatch) -> None:
        """Adds up bad clips; raises TooManyBadClips over the budget, if this loader judges them."""
        self._counts.add(batch)
        for part in (batch, batch.second):
            for record in () if part is None else part.bad:
                log.info("bad clip %s of %s: %s", record.key, record.shard, record.reason)
        allowed, counts = self.config.max_bad_fraction, self._counts
        num_left = (len(self) - self._next_batch) * self.batch_size * self.config.clips_per_video
        if self.judges_bad_clips and is_over_budget(counts.bad, counts.seen, num_left, allowed):
            self.close()
            raise TooManyBadClips(counts.over_budget(allowed, self.table.folder), batch)


def open_shard_table(config: LoaderConfig) -> tuple[ShardFiles, ClipTable]:
    """The shards of a configuration, checked, and which clips they hold.

    Raises:
        ValueError: no manifest, too many shards are missing or damaged, or the cache cannot hold one.
        SourceError: the URL of the shards could not be read.
        OSError: the folder of the cache cannot be made.
    """
    retry = Retry(total_seconds=config.source_retry_seconds, stall_seconds=config.source_stall_seconds)
    manifest = read_manifest(config.shards, retry)
    cache = None
    if is_url(config.shards):
        if not manifest.shards:
            raise ValueError(f"{config.shards}: the manifest has no shards; re-run make_shards")
        settings = CacheConfig(
            url=config.shards,
            folder=Path(config.cache_dir).expanduser() if config.cache_dir else default_cache_dir(),
            max_bytes=int(config.cache_gb * 1e9),
            retry=retry,
        )
        cache = ShardCache(settings, manifest.digest, manifest.shards)
    files = open_shards(
        config.shards,
        manifest,
        config.verify_shards,
        clips_per_video=config.clips_per_video,
        max_bad_shard_fraction=config.max_bad_shard_fraction,
        cache=cache,
    )
    if cache is not None:
        files = replace(files, num_open=_num_open(config, files, cache))
    table = ClipTable(
        folder=config.shards,
        num_slots=manifest.num_slots,
        clips_per_shard=files.clips_per_shard,
        identity={"manifest": manifest.digest, **files.state()},
        files=files,
    )
    return files, table


def _num_open(config: LoaderConfig, files: ShardFiles, cache: ShardCache) -> int:
    """Shards that a worker keeps open: those that clips may come from at a time, and no more, as what is deleted from
    the cache stays on the disk while it is open. Warns if the cache is too small for them."""
    window = config.shuffle_window if config.shuffle else 0
    reach = (
        shards_in_window(files.clips_per_shard, window + config.global_batch_size) * config.clips_per_video
    )
    sizes = sorted(
        (cache.num_bytes(os.path.basename(path)) for slot in files.paths for path in slot), reverse=True
    )
    needed = sum(sizes[: reach + config.cache_ahead])
    if needed > cache.config.max_bytes:
        log.warning(
            "loader.cache_gb is %g; a window of %d clips and %d shards ahead may take %.3g: with less, shards are "
            "brought more than once or later",
            config.cache_gb, window, config.cache_ahead, needed / 1e9,
        )  # fmt: skip
    return min(reach, OPEN_SHARDS)
