"""Shards to batches: decoding, cropping, log-mel and augmentation."""

import logging
from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from loaders.batch import ClipBatch
    from loaders.config import LoaderConfig


class Loader(Protocol):
    """What every backend gives: batches of one rank, epoch after epoch."""

    epoch: int
    """The epoch that iterating yields batches of."""
    bad_clips: "Counter[str]"
    """Clips of this rank that could not be used, by reason, over all epochs since the loader was made."""

    def __iter__(self) -> "Iterator[ClipBatch]":
        """The rest of the current epoch; when it is used up, the loader is at the start of the next epoch."""

    def __len__(self) -> int:
        """Batches per epoch, the same in every epoch and on every rank."""

    def state_dict(self) -> dict[str, Any]:
        """Position after the last batch handed out, for a checkpoint (JSON-able)."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a saved position; ValueError if the order of clips is another now."""

    def close(self) -> None:
        """End worker processes and free buffers."""


def build_loader(
    config: "LoaderConfig", rank: int = 0, world_size: int = 1, *, pin_memory: bool = False
) -> Loader:
    """The loader that config.backend names.

    Args:
        config: what to read and what to do to it.
        rank: which part of each global batch, 0 <= rank < world_size.
        world_size: number of ranks; divides config.global_batch_size.
        pin_memory: hand out batches in page-locked memory, for copies to a GPU that do not wait.

    Raises:
        ValueError: the shards or the configuration do not allow it; the message says what to change.
    """
    from loaders.portable import PortableLoader  # here: importing the configuration must not need PyAV

    log = logging.getLogger(__name__)
    log.info("loader backend: portable (PyAV in %d worker processes)", config.num_workers)
    return PortableLoader(config, rank, world_size, pin_memory=pin_memory)
