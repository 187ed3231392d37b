"""ClipBatch: what every loader hands to the training step."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from loaders.augment import ClipAugmentation
    from shards.schema import ClipInfo


@dataclass(frozen=True, kw_only=True)
class BadClipRecord:
    """One clip that could not be used, and why."""

    key: str
    """The clip's key."""
    shard: str
    """Name of the shard that holds it."""
    reason: str
    """Short slug: `checksum`, `frame-count`, `decode-error`, ..."""


@dataclass(frozen=True, kw_only=True)
class ClipBatch:
    """N clips of one rank.

    A row with valid False is a bad clip or padding: its frames are the mean grey (video.mean * 255, rounded),
    its log_mel is zero (the mean, after normalization). It must not count in losses, queues or figures.
    """

    frames: Tensor
    """uint8 (N, 3, T, H, W), RGB; a view of contiguous (N, T, H, W, 3): torch's channels_last_3d. Normalized
    floats where `build_loader` was asked for them. T is 0 where only sound was asked for (`loaders.listed`)."""
    log_mel: Tensor
    """float32 (N, 1, F, S): normalized and augmented. S is 0 where only pictures were asked for."""
    keys: tuple[str, ...]
    """N keys; empty for padding."""
    video_ids: Tensor
    """int64 (N,): ClipInfo.video_number, equal for two clips of a video; -1 if unknown and for padding."""
    valid: Tensor
    """bool (N,): False for a bad clip and for padding."""
    clips: tuple[ClipInfo | None, ...]
    """N descriptions as stored in the shard; None where the row is not valid."""
    augmentations: tuple[ClipAugmentation | None, ...]
    """What was done to each clip; None where the row is not valid."""
    bad: tuple[BadClipRecord, ...]
    """The bad clips of this batch; not those of `second`, which has its own."""
    epoch: int
    """Epoch the batch belongs to."""
    step: int
    """Index of the batch within its epoch."""
    second: ClipBatch | None = None
    """With clips_per_video=2: another clip of the same videos, row by row."""

    @property
    def num_clips(self) -> int:
        """N: rows of this batch, valid or not (`second` not counted)."""
        return len(self.keys)

    def to(self, device: torch.device | str, non_blocking: bool = True) -> ClipBatch:
        """The same batch with its tensors on device.

        non_blocking: pinned memory is copied beside the computation.
        """
        return replace(
            self,
            frames=self.frames.to(device, non_blocking=non_blocking),
            log_mel=self.log_mel.to(device, non_blocking=non_blocking),
            video_ids=self.video_ids.to(device, non_blocking=non_blocking),
            valid=self.valid.to(device, non_blocking=non_blocking),
            second=None if self.second is None else self.second.to(device, non_blocking=non_blocking),
        )

    def pin_memory(self) -> ClipBatch:
        """The same batch with its tensors in page-locked memory (needs CUDA)."""
        # Pinned as it lies in memory, so that the copy to the device is one contiguous transfer.
        return replace(
            self,
            frames=self.frames.permute(0, 2, 3, 4, 1).pin_memory().permute(0, 4, 1, 2, 3),
            log_mel=self.log_mel.pin_memory(),
            video_ids=self.video_ids.pin_memory(),
            valid=self.valid.pin_memory(),
            second=None if self.second is None else self.second.pin_memory(),
        )
