"""What is done to frames: the reference in plain torch."""

from collections.abc import Sequence

import torch
from torch import Tensor


def normalize_frames(
    frames: Tensor,
    mean: float | Sequence[float],
    std: float | Sequence[float],
    dtype: torch.dtype = torch.float32,
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


def crop_frames(frames: Tensor, top: int, left: int, size: int) -> Tensor:
    """View of frames (..., H, W, 3) cut to rows top .. top+size-1 and columns left .. left+size-1.

    Raises:
        ValueError: the window does not lie inside the frames.
    """
    height, width = frames.shape[-3:-1]
    if top < 0 or left < 0 or top + size > height or left + size > width:
        raise ValueError(
            f"crop of {size} at row {top}, column {left} of {width}x{height} frames, expected it inside"
        )
    return frames[..., top : top + size, left : left + size, :]


def flip_frames(frames: Tensor) -> Tensor:
    """Copy of frames (..., H, W, 3) mirrored left to right."""
    return frames.flip(-2)


def color_jitter(
    frames: Tensor,
    order: Sequence[str],
    brightness: float = 1.0,
    contrast: float = 1.0,
    saturation: float = 1.0,
) -> Tensor:
    """Copy of frames with brightness, contrast and saturation changed in this order, alike in all frames.

    With x in [0, 255] and grey(x) = 0.299 R + 0.587 G + 0.114 B:

        brightness: x <- clamp(b x)
        contrast:   x <- clamp(c x + (1 - c) mean(grey(x)))      the mean is over one frame
        saturation: x <- clamp(s x + (1 - s) grey(x))

    clamp is to [0, 255]; float32 in between, rounded to nearest once at the end.

    Choice: the mean of contrast is that of each frame, as torchvision and the SlowFast family have it, not of
    the clip.

    Args:
        frames: uint8 (T, H, W, 3), RGB.
        order: which of "brightness", "contrast", "saturation", in which order; those left out are not
            applied.
        brightness: b; 1 changes nothing.
        contrast: c, likewise.
        saturation: s, likewise.

    Returns:
        uint8 (T, H, W, 3).

    Raises:
        ValueError: a name in order is unknown.
    """
    # Planes are contiguous while we compute: a dimension of 3 in the innermost place is slow.
    x = frames.permute(3, 0, 1, 2).to(torch.float32, memory_format=torch.contiguous_format)  # (3, T, H, W)
    for name in order:
        if name == "brightness":
            x.mul_(brightness)
        elif name == "contrast":
            mean = _grey(x).mean(dim=(1, 2), keepdim=True)  # (T, 1, 1)
            x.mul_(contrast).add_(mean, alpha=1 - contrast)
        elif name == "saturation":
            x = torch.lerp(_grey(x), x, saturation)
        else:
            raise ValueError(f"color operation is {name!r}, expected brightness, contrast or saturation")
        x.clamp_(0, 255)
    return x.round_().to(torch.uint8).permute(1, 2, 3, 0).contiguous()  # (T, H, W, 3)


def _grey(x: Tensor) -> Tensor:
    """Luma (T, H, W) of x (3, T, H, W)."""
    return (x[0] * 0.299).add_(x[1], alpha=0.587).add_(x[2], alpha=0.114)
