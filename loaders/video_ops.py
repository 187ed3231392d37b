"""What is done to frames: the reference in plain torch."""

from collections.abc import Sequence

import torch
from torch import Tensor


def normalize_frames(
    frames: Tensor, mean: float | Sequence[float], std: float | Sequence[float], dtype: torch.dtype = torch.float32
) -> Tensor:
    """(frames / 255 - mean) / std, in the memory layout of frames.

    Args:
        frames: uint8 (N, 3, T, H, W) on any device.
        mean: mean of pixels in [0, 1], one number or one per channel.
        std: standard deviation of pixels in [0, 1], likewise.
        dtype: of the result; the arithmetic is float32.

    Returns:
        (N, 3, T, H, W) of dtype, on the device of frames.
    """
    scale = _per_channel(std, frames.device).mul(255).reciprocal()
    shift = _per_channel(mean, frames.device) / _per_channel(std, frames.device)
    return frames.to(torch.float32).mul_(scale).sub_(shift).to(dtype)


def _per_channel(value: float | Sequence[float], device: torch.device) -> Tensor:
    """value as float32, shape () or (3, 1, 1, 1)."""
    if isinstance(value, (int, float)):
        # Built on the CPU: a 0-dimensional CPU tensor takes part in device arithmetic without a copy.
        return torch.tensor(float(value))
    return torch.tensor([float(v) for v in value]).view(-1, 1, 1, 1).to(device)
