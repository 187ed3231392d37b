"""The last step of frames: crop, RGB, flip, color jitter and normalization in one pass over the pixels."""

import functools
import importlib.util
import logging
import os
from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from loaders.augment import yuv_window_size
from loaders.video_ops import NUM_PARAMETERS, finish_frames_reference

Impl = Literal["auto", "reference", "fused"]
DTYPES = (torch.uint8, torch.float32, torch.bfloat16, torch.float16)

log = logging.getLogger(__name__)


def finish_frames(
    pixels: Tensor,
    parameters: Tensor,
    crop_size: int,
    *,
    mean: float | Sequence[float],
    std: float | Sequence[float],
    dtype: torch.dtype = torch.uint8,
    impl: Impl = "auto",
) -> Tensor:
    """Cropped, flipped, jittered frames of N clips, as ClipBatch.frames has them.

    YUV windows become RGB as `video_ops.yuv_windows_to_rgb` says; colors change as `video_ops.color_jitter`
    says (the mean of contrast is that of each cropped frame); both are rounded. Rows whose parameters say
    not valid are `video_ops.mean_grey(mean)`, whatever their pixels hold.

    Args:
        pixels: uint8, YUV windows (N, T, W * W * 3 // 2) with W = augment.yuv_window_size(crop_size): planes
            Y, U and V of the part of the frame that starts at the crop's row and column rounded down to even;
            or RGB (N, T, crop_size, crop_size, 3), already cut.
        parameters: float32 (N, NUM_PARAMETERS) of `video_ops.frame_parameters`, on the device of pixels, or on
            the CPU (then copied). For RGB its crop offsets are not used.
        crop_size: H and W of the result.
        mean: mean of pixels in [0, 1], one number or one per channel.
        std: standard deviation of pixels in [0, 1], likewise.
        dtype: uint8: pixels. float32, bfloat16 or float16: (pixel / 255 - mean) / std of those same pixels.
        impl: `fused`: one Triton kernel, for CUDA tensors, or for CPU tensors with TRITON_INTERPRET=1 in the
            environment. `reference`: plain torch (on a GPU it waits for the parameters). `auto`: fused on CUDA
            where Triton is installed, else the reference. They agree but for values within float32 rounding
            of a half, which may be one level apart.

    Returns:
        (N, 3, T, H, W) of dtype on the device of pixels, a view of contiguous (N, T, H, W, 3).

    Raises:
        ValueError: impl, dtype, or the shape or dtype of a tensor is not one of those above, or `fused` cannot
            run here; the message says what is missing.
    """
    _check(pixels, parameters, crop_size, dtype)
    if impl not in get_args(Impl):
        raise ValueError(f"impl is {impl!r}, expected {' or '.join(get_args(Impl))}")
    if impl == "auto":
        impl = _choose_impl(pixels.device.type)
    if impl == "fused":
        why_not = _why_not_fused(pixels.device.type)
        if why_not:
            raise ValueError(f"impl is 'fused', but {why_not}; expected impl 'auto' or 'reference' here")
        from loaders.kernels.frames_triton import finish_frames_fused

        finish = finish_frames_fused
    else:
        finish = finish_frames_reference
    return finish(pixels, parameters, crop_size, mean=mean, std=std, dtype=dtype)


@functools.cache
def _choose_impl(device_type: str) -> Literal["reference", "fused"]:
    """What `auto` means on this kind of device; said once."""
    why_not = _why_not_fused(device_type) if device_type == "cuda" else "pixels are on the CPU"
    if why_not and device_type == "cuda":
        log.warning("finish_frames: %s, frames are finished in plain torch: much slower", why_not)
    log.info("finish_frames on %s: %s", device_type, "reference" if why_not else "fused")
    return "reference" if why_not else "fused"


def _why_not_fused(device_type: str) -> str | None:
    """Why the Triton kernel cannot run on this kind of device; None if it can."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed (it comes with torch for CUDA on Linux)"
    if device_type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return f"pixels are on {device_type} and TRITON_INTERPRET=1 is not set"
    return None


def _check(pixels: Tensor, parameters: Tensor, crop_size: int, dtype: torch.dtype) -> None:
    """Raises ValueError unless the arguments of finish_frames fit together."""
    window = yuv_window_size(crop_size)
    expected = {3: (window * window * 3 // 2,), 5: (crop_size, crop_size, 3)}.get(pixels.dim())
    if pixels.dtype != torch.uint8 or tuple(pixels.shape[2:]) != expected:
        raise ValueError(
            f"pixels are {pixels.dtype} {tuple(pixels.shape)}, expected torch.uint8 (N, T, "
            f"{window * window * 3 // 2}) or (N, T, {crop_size}, {crop_size}, 3) for crop_size {crop_size}"
        )
    if parameters.dtype != torch.float32 or parameters.shape != (len(pixels), NUM_PARAMETERS):
        raise ValueError(
            f"parameters are {parameters.dtype} {tuple(parameters.shape)}, expected torch.float32 "
            f"({len(pixels)}, {NUM_PARAMETERS}) from frame_parameters"
        )
    if dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype}, expected one of {', '.join(map(str, DTYPES))}")
