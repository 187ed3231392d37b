"""The FIFO of past keys that MoCo takes negatives from, one per modality."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

EMPTY = -1
"""Video id of a slot that holds no usable key."""
UNKNOWN = -1
"""Time stamp of a key that an older version stored without."""
DTYPES = (torch.float32, torch.bfloat16)
"""What keys can be stored as."""


class Staleness(NamedTuple):
    """How old a queue's keys are when the next step reads them, in steps; float32 scalars on the queue's device."""

    oldest: Tensor
    """Age of the oldest key: 1 if all are of the step before. NaN if there is none, or one of unknown age."""
    mean: Tensor
    """Mean age; NaN as above."""
    filled: Tensor
    """Share of slots that hold a usable key."""


class KeyQueue(nn.Module):
    """The newest `length` keys with the ids of their videos and the steps they are of; all of it is in the state dict.

    Slots start empty (MoCo starts them with random unit vectors; here they are left out of the loss until filled),
    and a batch that does not divide the length wraps around.

    Args:
        length: keys kept.
        dim: D, their dimensions.
        dtype: what they are stored as, float32 or bfloat16. bfloat16 halves memory and traffic; at 256 dimensions and
            temperature 0.07 it moves a logit by 0.002 (root mean square), at most by 0.01.
    """

    def __init__(self, length: int, dim: int, dtype: torch.dtype = torch.float32) -> None:
        if length < 1:
            raise ValueError(f"model.queue_length is {length}, expected at least 1")
        if dtype not in DTYPES:
            names = " or ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
            raise ValueError(f"model.queue_dtype is {dtype}, expected {names}")
        super().__init__()
        self.register_buffer("keys", torch.zeros(length, dim, dtype=dtype))
        self.register_buffer("video_ids", torch.full((length,), EMPTY, dtype=torch.int64))
        self.register_buffer("position", torch.zeros((), dtype=torch.int64))
        # On the device, as a CUDA graph knows no other numbers that change.
        self.register_buffer("enqueued_at", torch.full((length,), UNKNOWN, dtype=torch.int64))
        self.register_buffer("clock", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def enqueue(self, keys: Tensor, video_ids: Tensor, valid: Tensor | None = None) -> None:
        """Replace the oldest entries by those of one step. No host synchronisation.

        Args:
            keys: (N, D), unit norm. If N exceeds the length, the last ones stay.
            video_ids: (N,) int64, at least 0.
            valid: (N,) bool; a false row takes a slot that stays out of the loss, and so does a key that is not
                finite (of a step that loss scaling skips).
        """
        length = self.keys.shape[0]
        usable = torch.isfinite(keys).all(dim=1)  # (N,)
        if valid is not None:
            usable = usable & valid
        video_ids = torch.where(usable, video_ids, EMPTY)
        keys = torch.where(usable[:, None], keys, 0)  # a masked NaN would still reach the gradient
        keys, video_ids = keys[-length:].to(self.keys.dtype), video_ids[-length:]
        slots = (self.position + torch.arange(len(keys), device=keys.device)) % length
        self.keys.index_copy_(0, slots, keys)
        self.video_ids.index_copy_(0, slots, video_ids)
        self.position.copy_((self.position + len(keys)) % length)
        self.enqueued_at.index_copy_(0, slots, self.clock.expand(len(slots)))
        self.clock.add_(1)

    @torch.no_grad()
    def staleness(self) -> Staleness:
        """How old the keys are, and how many slots hold one. No host synchronisation."""
        filled = self.video_ids != EMPTY  # (K,)
        known = filled & (self.enqueued_at != UNKNOWN)
        age = torch.where(known, self.clock - self.enqueued_at, 0).float()
        all_known = (known == filled).all() & filled.any()
        nan = torch.full_like(age[0], torch.nan)
        return Staleness(
            oldest=torch.where(all_known, age.max(), nan),
            mean=torch.where(all_known, age.sum() / filled.sum(), nan),
            filled=filled.float().mean(),
        )

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args) -> None:
        """Takes a queue saved before keys had stamps: they are of unknown age until the queue has turned over once."""
        stamps = {
            "enqueued_at": torch.full_like(self.enqueued_at, UNKNOWN),
            "clock": torch.zeros_like(self.clock),
        }
        if f"{prefix}keys" in state_dict and not any(f"{prefix}{name}" in state_dict for name in stamps):
            state_dict.update({f"{prefix}{name}": value for name, value in stamps.items()})
        super()._load_from_state_dict(state_dict, prefix, *args)
