"""The last step of frames: crop, RGB, flip, color jitter and normalization in one pass over the pixels."""

from collections.abc import Sequence

import torch
from torch import Tensor

from loaders.augment import yuv_window_size
from loaders.kernels.choice import Impl, choose_impl
from loaders.video_ops import NUM_PARAMETERS, finish_frames_reference

DTYPES = (torch.uint8, torch.float32, torch.bfloat16, torch.float16)


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
        impl: see `choice.Impl`; `fused` is one kernel, `reference` waits for the parameters on a GPU. They agree
            but for values within float32 rounding of a half, which may be one level apart.

    Returns:
        (N, 3, T, H, W) of dtype on the device of pixels, a view of contiguous (N, T, H, W, 3).

    Raises:
        ValueError: impl, dtype, or the shape or dtype of a tensor is not one of those above, or `fused` cannot
            run here; the message says what is missing.
    """
    _check(pixels, parameters, crop_size, dtype)
    if choose_impl("finish_frames", impl, pixels.device.type) == "fused":
        from loaders.kernels.frames_triton import finish_frames_fused

        finish = finish_frames_fused
    else:
        finish = finish_frames_reference
    return finish(pixels, parameters, crop_size, mean=mean, std=std, dtype=dtype)


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
