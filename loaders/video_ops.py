"""What is done to frames: the reference in plain torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from loaders.augment import COLOR_OPERATIONS

if TYPE_CHECKING:
    from loaders.augment import ClipAugmentation

NUM_PARAMETERS = 10  # columns of frame_parameters

Y_SCALE = 255 / 219
RED_V = 1.402 * 255 / 224
GREEN_U = -0.344136 * 255 / 224
GREEN_V = -0.714136 * 255 / 224
BLUE_U = 1.772 * 255 / 224


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
    scale, shift = (_over_channels(value, frames.device) for value in scale_and_shift(mean, std))
    return frames.to(torch.float32).mul_(scale).sub_(shift).to(dtype)


def scale_and_shift(
    mean: float | Sequence[float], std: float | Sequence[float]
) -> tuple[float | list[float], float | list[float]]:
    """(scale, shift) with (pixel / 255 - mean) / std = scale pixel - shift, each a float32 value or three."""
    mean32, std32 = np.asarray(mean, np.float32), np.asarray(std, np.float32)
    return (1 / (std32 * np.float32(255))).tolist(), (mean32 / std32).tolist()


def _over_channels(value: float | list[float], device: torch.device) -> Tensor:
    """value as float32, shape () or (3, 1, 1, 1)."""
    if isinstance(value, float):
        # Built on the CPU: a 0-dimensional CPU tensor takes part in device arithmetic without a copy.
        return torch.tensor(value)
    return torch.tensor(value).view(-1, 1, 1, 1).to(device)


def mean_grey(mean: float | Sequence[float]) -> tuple[int, int, int]:
    """Pixel (R, G, B) that is zero after normalization, up to rounding: what a bad clip's frames show."""
    means = [mean] * 3 if isinstance(mean, (int, float)) else list(mean)
    red, green, blue = (round(255 * value) for value in means)
    return red, green, blue


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


def yuv_windows_to_rgb(yuv: Tensor) -> Tensor:
    """RGB of 4:2:0 pictures, BT.601, limited range.

        Y' = (Y - 16) 255/219    U' = (U - 128) 255/224    V' = (V - 128) 255/224
        R = Y' + 1.402 V'    G = Y' - 0.344136 U' - 0.714136 V'    B = Y' + 1.772 U'

    rounded to nearest and clamped to 0 .. 255. Each U and V stands for its 2x2 pixels, as in swscale's
    unscaled conversion; that cuts fractions off where this rounds, so its pictures are about 1 level darker.

    Args:
        yuv: uint8 (..., W * W * 3 // 2), W even: planes Y (W, W), U (W/2, W/2) and V (W/2, W/2), one after the
            other.

    Returns:
        uint8 (..., W, W, 3).
    """
    size = round((yuv.shape[-1] / 1.5) ** 0.5)
    assert size % 2 == 0 and size * size * 3 // 2 == yuv.shape[-1], yuv.shape
    half = size // 2
    y, u, v = yuv.split((size * size, half * half, half * half), dim=-1)
    y = (y.float() - 16) * Y_SCALE
    u = u.float() - 128
    v = v.float() - 128
    y = y.unflatten(-1, (half, 2, half, 2))  # (..., W/2, 2, W/2, 2)
    chroma = torch.stack([v * RED_V, u * GREEN_U + v * GREEN_V, u * BLUE_U], dim=-1)  # (..., W/2 * W/2, 3)
    chroma = chroma.unflatten(-2, (half, 1, half, 1))  # (..., W/2, 1, W/2, 1, 3)
    rgb = (y.unsqueeze(-1) + chroma).round_().clamp_(0, 255)  # (..., W/2, 2, W/2, 2, 3)
    return rgb.to(torch.uint8).flatten(-3, -2).flatten(-4, -3)  # (..., W, W, 3)


def frame_parameters(augmentations: Sequence[ClipAugmentation | None]) -> Tensor:
    """What `finish_frames` does to each clip, as numbers that travel to the device with the pixels.

    Columns: row and column of the crop in its YUV window (0 or 1); flip (0 or 1); the three color operations in
    their order (0 none, 1 brightness, 2 contrast, 3 saturation); their three factors; valid (0 or 1).

    Args:
        augmentations: one per clip; None makes the row invalid.

    Returns:
        float32 (N, NUM_PARAMETERS) on the CPU.
    """
    rows = []
    for augmentation in augmentations:
        if augmentation is None:
            rows.append([0.0] * NUM_PARAMETERS)
            continue
        order = augmentation.color_order
        assert len(set(order)) == len(order), order
        unused = len(COLOR_OPERATIONS) - len(order)
        rows.append(
            [
                augmentation.crop_top % 2,
                augmentation.crop_left % 2,
                augmentation.flip,
                *(1 + COLOR_OPERATIONS.index(name) for name in order),
                *[0] * unused,
                *(getattr(augmentation, name) for name in order),
                *[1] * unused,
                1,
            ]
        )
    return torch.tensor(rows, dtype=torch.float32).view(-1, NUM_PARAMETERS)


def finish_frames_reference(
    pixels: Tensor,
    parameters: Tensor,
    crop_size: int,
    *,
    mean: float | Sequence[float],
    std: float | Sequence[float],
    dtype: torch.dtype = torch.uint8,
) -> Tensor:
    """Cropped, flipped, jittered frames of N clips: `kernels.frames.finish_frames` in plain torch.

    Clip by clip, on any device; reads the parameters, so on a GPU it waits for the device.

    Args:
        pixels: uint8, YUV windows (N, T, W * W * 3 // 2) with W = yuv_window_size(crop_size), or RGB
            (N, T, crop_size, crop_size, 3).
        parameters: float32 (N, NUM_PARAMETERS) of `frame_parameters`; its crop offsets are for YUV windows
            only.
        crop_size: H and W of the result.
        mean: what invalid clips show, and for normalization; one number or one per channel.
        std: for normalization, likewise.
        dtype: uint8: pixels; float32, bfloat16 or float16: those pixels after `normalize_frames`.

    Returns:
        (N, 3, T, H, W) of dtype, a view of contiguous (N, T, H, W, 3).
    """
    num_clips, num_frames = pixels.shape[:2]
    out = torch.empty(
        (num_clips, num_frames, crop_size, crop_size, 3), dtype=torch.uint8, device=pixels.device
    )
    for target, clip, row in zip(out, pixels, parameters.tolist()):
        top, left, flip, *operations, valid = row
        if not valid:
            target.copy_(torch.tensor(mean_grey(mean), dtype=torch.uint8))
            continue
        if pixels.dim() == 3:
            clip = crop_frames(yuv_windows_to_rgb(clip), int(top), int(left), crop_size)  # (T, H, W, 3)
        if flip:
            clip = flip_frames(clip)
        factors = {
            COLOR_OPERATIONS[int(code) - 1]: factor
            for code, factor in zip(operations[:3], operations[3:])
            if code
        }
        target.copy_(color_jitter(clip, tuple(factors), **factors) if factors else clip)
    frames = out.permute(0, 4, 1, 2, 3)  # (N, 3, T, H, W)
    return frames if dtype == torch.uint8 else normalize_frames(frames, mean, std, dtype)
