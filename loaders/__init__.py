"""Shards to batches: decoding, cropping, log-mel and augmentation."""

import logging
from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch

    from loaders.batch import ClipBatch
    from loaders.config import LoaderConfig

log = logging.getLogger(__name__)


class Loader(Protocol):
    """What every backend gives: batches of one rank, epoch after epoch."""

    epoch: int
    """The epoch that iterating yields batches of."""
    bad_clips: "Counter[str]"
    """Clips of this rank that could not be used, by reason, over all epochs since the loader was made."""
    judges_bad_clips: bool
    """Whether iterating ends with TooManyBadClips when this rank's clips are over max_bad_fraction. A training turns it
    off, and judges the clips of all ranks together."""

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
    config: "LoaderConfig",
    rank: int = 0,
    world_size: int = 1,
    *,
    device: "torch.device | str" = "cpu",
    frames_dtype: "torch.dtype | None" = None,
) -> Loader:
    """The loader that config.backend names; for `auto` the fastest of a short trial.

    Args:
        config: what to read and what to do to it.
        rank: which part of each global batch, 0 <= rank < world_size.
        world_size: number of ranks; divides config.global_batch_size. With more than one and backend `auto`,
            call `probe.resolve_backend` first, so that all ranks choose alike.
        device: where the batches will be used. The `dali` backends hand them out there; the others in memory of
            the CPU, page-locked if this is a GPU, for copies that do not wait.
        frames_dtype: None: uint8. A float type, for the `dali` backends on a GPU: frames that are normalized by
            the kernel that finishes them.

    Raises:
        ValueError: the shards or the configuration do not allow it; the message says what to change.
        ImportError: the backend needs a library that is not installed.
    """
    import torch  # here and below: the configuration alone must not need what the backends do

    device = torch.device(device)
    if config.backend == "auto":
        from loaders.probe import resolve_backend

        config = resolve_backend(config, rank, 1, device, log.info)
    if config.backend == "dali-gpu" and device.type != "cuda":
        raise ValueError(
            f"loader.backend is 'dali-gpu' and the device is {device.type}, expected cuda; use dali-cpu-decode or "
            f"portable"
        )
    frames_dtype = frames_dtype or torch.uint8
    if frames_dtype != torch.uint8 and not (config.backend.startswith("dali") and device.type == "cuda"):
        raise ValueError(
            f"frames_dtype is {frames_dtype}, expected uint8 with backend {config.backend} on {device.type}"
        )
    if config.backend == "raw":
        from loaders.raw import RawLoader

        return RawLoader(config, rank, world_size, pin_memory=device.type == "cuda")
    if config.backend == "dali-cpu-decode":
        from loaders.dali_cpu_decode import DaliCpuDecodeLoader

        return DaliCpuDecodeLoader(config, rank, world_size, device=device, frames_dtype=frames_dtype)
    if config.backend == "dali-gpu":
        from loaders.dali_gpu import DaliGpuLoader

        return DaliGpuLoader(config, rank, world_size, device=device, frames_dtype=frames_dtype)
    from loaders.portable import PortableLoader

    return PortableLoader(config, rank, world_size, pin_memory=device.type == "cuda")
