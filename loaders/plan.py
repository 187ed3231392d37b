"""Which clips make up which batch of an epoch.

The order is one for all ranks and knows nothing of their number: batch k of the epoch is the k-th run of
global_batch_size clips, and each rank takes its equal part of it. So a run may be stopped at any step and
carried on with another number of ranks or workers.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from loaders.augment import random_permutation, random_stream

PADDING = -1


def slots_of_epoch(epoch: int, num_slots: int, clips_per_video: int = 1) -> tuple[int, ...]:
    """The slot an epoch reads: epoch mod num_slots; with clips_per_video 2 also that of the second clips.

    Choice: the second slot is 1 further on in the first num_slots epochs, 2 further on in the next, and so
    on, never the first itself: every two seconds of a video meet, not only neighbors.

    Raises:
        ValueError: two clips per video from one slot.
    """
    first = epoch % num_slots
    if clips_per_video == 1:
        return (first,)
    if num_slots < 2:
        raise ValueError(
            f"loader.clips_per_video is {clips_per_video}, but the shards have {num_slots} slot; make shards "
            f"with --max-clips of at least 2"
        )
    distance = 1 + (epoch // num_slots) % (num_slots - 1)
    return first, (first + distance) % num_slots


def count_batches(num_clips: int, global_batch_size: int, drop_last: bool) -> int:
    """Global batches in an epoch of num_clips."""
    return num_clips // global_batch_size if drop_last else -(-num_clips // global_batch_size)


def shards_in_window(clips_per_shard: Sequence[int], num_clips: int) -> int:
    """From how many shards, at most about, a run of num_clips of them in any order of the shards comes."""
    mean = sum(clips_per_shard) / len(clips_per_shard)
    return min(len(clips_per_shard), math.ceil(num_clips / mean) + 1)


@dataclass(frozen=True, kw_only=True)
class EpochPlan:
    """The order of one epoch's clips, cut into batches."""

    clips_per_shard: Sequence[int]
    """Number of clips of each shard of the slot, by shard index (the same in every slot)."""
    seed: int
    """LoaderConfig.seed."""
    epoch: int
    """Epoch number."""
    global_batch_size: int
    """Clips per batch over all ranks."""
    shuffle: bool = True
    """A new order each epoch; off: shards and clips in sequence."""
    shuffle_window: int = 4096
    """After the shards were permuted, clips are shuffled within windows of this many. 0: they are not."""
    drop_last: bool = True
    """Leave out the last, incomplete batch; off: pad it."""

    @property
    def num_clips(self) -> int:
        """Clips in the slot."""
        return int(sum(self.clips_per_shard))

    @property
    def num_batches(self) -> int:
        """Global batches in the epoch, the same on every rank."""
        return count_batches(self.num_clips, self.global_batch_size, self.drop_last)

    @cached_property
    def order(self) -> np.ndarray:
        """int64 (num_clips, 2): (shard index, position in the shard) of each clip, in reading order."""
        num_shards = len(self.clips_per_shard)
        shard_order = np.arange(num_shards, dtype=np.int64)
        if self.shuffle:
            shard_order = random_permutation(num_shards, random_stream(self.seed, self.epoch, "shard-order"))
        order = np.empty((self.num_clips, 2), dtype=np.int64)
        end = 0
        for shard in shard_order:
            start, end = end, end + self.clips_per_shard[shard]
            order[start:end, 0] = shard
            order[start:end, 1] = np.arange(self.clips_per_shard[shard])
        if self.shuffle and self.shuffle_window > 1:
            stream = random_stream(self.seed, self.epoch, "clip-order")
            for start in range(0, self.num_clips, self.shuffle_window):
                window = order[start : start + self.shuffle_window]
                window[:] = window[random_permutation(len(window), stream)]
        return order

    def shard_spans(self) -> list[tuple[int, int, int]]:
        """(shard index, first batch, last batch) of each shard that the batches have clips of, in the order of their
        first clips."""
        shards = self.order[: self.num_batches * self.global_batch_size, 0]
        indices, first = np.unique(shards, return_index=True)
        last = len(shards) - 1 - np.unique(shards[::-1], return_index=True)[1]
        size = self.global_batch_size
        return [
            (int(indices[n]), int(first[n]) // size, int(last[n]) // size)
            for n in np.argsort(first, kind="stable")
        ]

    def batch(self, index: int, rank: int = 0, world_size: int = 1) -> np.ndarray:
        """int64 (global_batch_size // world_size, 2): the rank's part of a batch; PADDING past the last clip.

        Raises:
            ValueError: world_size does not divide global_batch_size.
            IndexError: index is not in 0 .. num_batches - 1.
        """
        check_world(self.global_batch_size, rank, world_size)
        if not 0 <= index < self.num_batches:
            raise IndexError(f"batch {index} of an epoch of {self.num_batches}")
        size = self.global_batch_size // world_size
        start = index * self.global_batch_size + rank * size
        rows = self.order[start : start + size]
        padding = np.full((size - len(rows), 2), PADDING, dtype=np.int64)
        return np.concatenate([rows, padding])


def check_world(global_batch_size: int, rank: int, world_size: int) -> None:
    """Raises ValueError unless the ranks can take equal parts of a batch."""
    if world_size < 1 or not 0 <= rank < world_size:
        raise ValueError(f"rank {rank} of world_size {world_size}, expected 0 <= rank < world_size")
    if global_batch_size % world_size:
        raise ValueError(
            f"loader.global_batch_size is {global_batch_size}, expected a multiple of the number of ranks "
            f"({world_size})"
        )
