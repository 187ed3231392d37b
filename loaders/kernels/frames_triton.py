"""`finish_frames` as one Triton kernel. Imports Triton: import it where it is needed.

One program makes one frame, a block of pixels at a time, one pixel per lane: neighboring lanes read
neighboring bytes of Y and write neighboring triples, whose three stores fill whole sectors of the L2 cache;
flipping is reading backwards. Only contrast, which needs the mean of the whole frame, reads the frame a second
time (from cache).

With colors changed, arithmetic is what limits it, not memory. So colors are in [0, 1] in between: there, a
clamp costs nothing (the .SAT of the instruction before it), in [0, 255] it takes two instructions of half rate.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from loaders import video_ops
from loaders.augment import yuv_window_size
from loaders.video_ops import mean_grey, scale_and_shift

BLOCK = 1024  # pixels per step of a program
NUM_WARPS = 4

NUM_PARAMETERS = tl.constexpr(video_ops.NUM_PARAMETERS)
Y_SCALE = tl.constexpr(video_ops.Y_SCALE)
RED_V = tl.constexpr(video_ops.RED_V)
GREEN_U = tl.constexpr(video_ops.GREEN_U)
GREEN_V = tl.constexpr(video_ops.GREEN_V)
BLUE_U = tl.constexpr(video_ops.BLUE_U)
CONTRAST = tl.constexpr(2)  # code in the parameters
SATURATION = tl.constexpr(3)
LEVEL = tl.constexpr(1 / 255)
# float32 has no fractions this far out: adding and subtracting it rounds |x| < 2^22 to nearest, ties to even.
ROUND = tl.constexpr(1.5 * 2**23)


def finish_frames_fused(
    pixels: Tensor,
    parameters: Tensor,
    crop_size: int,
    *,
    mean: float | Sequence[float],
    std: float | Sequence[float],
    dtype: torch.dtype = torch.uint8,
) -> Tensor:
    """`video_ops.finish_frames_reference`, of which this has the arguments and the result."""
    num_clips, num_frames = pixels.shape[:2]
    out = torch.empty((num_clips, num_frames, crop_size, crop_size, 3), dtype=dtype, device=pixels.device)
    if out.numel() == 0:
        return out.permute(0, 4, 1, 2, 3)
    scale, shift = ([v] * 3 if isinstance(v, float) else v for v in scale_and_shift(mean, std))
    cuda = pixels.device.type == "cuda"
    with torch.cuda.device(pixels.device) if cuda else contextlib.nullcontext():
        _finish_frames[(num_clips * num_frames,)](
            pixels.contiguous(),
            parameters.to(pixels.device, non_blocking=True).contiguous(),
            out,
            num_frames,
            *(pixel / 255 for pixel in mean_grey(mean)),
            *scale,
            *shift,
            CROP=crop_size,
            WINDOW=yuv_window_size(crop_size),
            YUV=pixels.dim() == 3,
            NORMALIZE=dtype != torch.uint8,
            BLOCK=min(BLOCK, triton.next_power_of_2(crop_size * crop_size)),
            num_warps=NUM_WARPS,
        )
    return out.permute(0, 4, 1, 2, 3)  # (N, 3, T, H, W)


@triton.jit
def _finish_frames(
    pixels,  # uint8 (N, T, WINDOW * WINDOW * 3 // 2) or (N, T, CROP, CROP, 3)
    parameters,  # float32 (N, NUM_PARAMETERS)
    out,  # (N, T, CROP, CROP, 3)
    num_frames,
    red_grey,
    green_grey,
    blue_grey,
    red_scale,
    green_scale,
    blue_scale,
    red_shift,
    green_shift,
    blue_shift,
    CROP: tl.constexpr,
    WINDOW: tl.constexpr,
    YUV: tl.constexpr,
    NORMALIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    frame = tl.program_id(0)
    row = parameters + (frame // num_frames) * NUM_PARAMETERS
    top = tl.load(row + 0).to(tl.int32)
    left = tl.load(row + 1).to(tl.int32)
    flip = tl.load(row + 2) != 0
    code_0 = tl.load(row + 3).to(tl.int32)
    code_1 = tl.load(row + 4).to(tl.int32)
    code_2 = tl.load(row + 5).to(tl.int32)
    factor_0 = tl.load(row + 6)
    factor_1 = tl.load(row + 7)
    factor_2 = tl.load(row + 8)
    valid = tl.load(row + 9) != 0

    # A batch may hold more than 2^31 bytes, a frame does not.
    target = out + frame.to(tl.int64) * (CROP * CROP * 3)
    if YUV:
        source = pixels + frame.to(tl.int64) * (WINDOW * WINDOW * 3 // 2)
    else:
        source = pixels + frame.to(tl.int64) * (CROP * CROP * 3)
        top = 0
        left = 0
    # Column c of the result is column first + step * c of the source.
    first = tl.where(flip, left + CROP - 1, left)
    step = tl.where(flip, -1, 1)

    if valid:
        # Loop bounds are constants: the interpreter knows no others.
        mean = 0.0
        if (code_0 == CONTRAST) | (code_1 == CONTRAST) | (code_2 == CONTRAST):
            total = tl.zeros((BLOCK,), tl.float32)
            for start in range(0, CROP * CROP, BLOCK):
                index = start + tl.arange(0, BLOCK)
                inside = index < CROP * CROP
                red, green, blue = _load_rgb(source, index, inside, top, first, step, CROP, WINDOW, YUV)
                if code_0 != CONTRAST:
                    red, green, blue = _change_color(red, green, blue, code_0, factor_0, 0.0)
                    if code_1 != CONTRAST:
                        red, green, blue = _change_color(red, green, blue, code_1, factor_1, 0.0)
                total += tl.where(inside, _grey(red, green, blue), 0.0)
            mean = tl.sum(total, 0) / (CROP * CROP)
        for start in range(0, CROP * CROP, BLOCK):
            index = start + tl.arange(0, BLOCK)
            inside = index < CROP * CROP
            red, green, blue = _load_rgb(source, index, inside, top, first, step, CROP, WINDOW, YUV)
            if code_0 != 0:  # code 0 after it has factor 1 and changes nothing
                red, green, blue = _change_color(red, green, blue, code_0, factor_0, mean)
                red, green, blue = _change_color(red, green, blue, code_1, factor_1, mean)
                red, green, blue = _change_color(red, green, blue, code_2, factor_2, mean)
            pointers = target + index * 3
            _store(pointers, red, inside, red_scale, red_shift, NORMALIZE)
            _store(pointers + 1, green, inside, green_scale, green_shift, NORMALIZE)
            _store(pointers + 2, blue, inside, blue_scale, blue_shift, NORMALIZE)
    else:
        for start in range(0, CROP * CROP, BLOCK):
            index = start + tl.arange(0, BLOCK)
            inside = index < CROP * CROP
            zero = tl.zeros((BLOCK,), tl.float32)
            pointers = target + index * 3
            _store(pointers, zero + red_grey, inside, red_scale, red_shift, NORMALIZE)
            _store(pointers + 1, zero + green_grey, inside, green_scale, green_shift, NORMALIZE)
            _store(pointers + 2, zero + blue_grey, inside, blue_scale, blue_shift, NORMALIZE)


@triton.jit
def _load_rgb(
    source, index, mask, top, first, step, CROP: tl.constexpr, WINDOW: tl.constexpr, YUV: tl.constexpr
):
    """float32 (BLOCK,) red, green and blue of pixels `index` of the result, as whole 255ths in [0, 1]."""
    source_row = top + index // CROP
    source_column = first + step * (index % CROP)
    if YUV:
        HALF: tl.constexpr = WINDOW // 2
        y = tl.load(source + (source_row * WINDOW + source_column), mask=mask, other=0)
        chroma = source + (WINDOW * WINDOW + (source_row >> 1) * HALF + (source_column >> 1))
        u = tl.load(chroma, mask=mask, other=0).to(tl.float32) - 128
        v = tl.load(chroma + HALF * HALF, mask=mask, other=0).to(tl.float32) - 128
        y = (y.to(tl.float32) - 16) * Y_SCALE
        red = (y + v * RED_V + ROUND) - ROUND
        green = (y + (u * GREEN_U + v * GREEN_V) + ROUND) - ROUND
        blue = (y + u * BLUE_U + ROUND) - ROUND
    else:
        pointers = source + (source_row * CROP + source_column) * 3
        red = tl.load(pointers, mask=mask, other=0).to(tl.float32)
        green = tl.load(pointers + 1, mask=mask, other=0).to(tl.float32)
        blue = tl.load(pointers + 2, mask=mask, other=0).to(tl.float32)
    return _clamp(red * LEVEL), _clamp(green * LEVEL), _clamp(blue * LEVEL)


@triton.jit
def _change_color(red, green, blue, code, factor, mean):
    """Brightness, contrast or saturation (code 1, 2, 3): clamp(factor x + (1 - factor) other)."""
    weight = tl.where(code == SATURATION, 1 - factor, 0.0)
    shift = tl.where(code == CONTRAST, 1 - factor, 0.0) * mean
    shift = weight * _grey(red, green, blue) + shift
    return _clamp(factor * red + shift), _clamp(factor * green + shift), _clamp(factor * blue + shift)


@triton.jit
def _store(pointers, x, mask, scale, shift, NORMALIZE: tl.constexpr):
    """Write x in [0, 1] as the nearest pixel, or as that pixel normalized."""
    x = x * 255 + ROUND
    if NORMALIZE:
        x = (x - ROUND) * scale - shift
    else:
        x = x.to(tl.int32, bitcast=True)  # its low byte is the pixel
    tl.store(pointers, x.to(pointers.dtype.element_ty), mask=mask)


@triton.jit
def _grey(red, green, blue):
    return red * 0.299 + green * 0.587 + blue * 0.114


@triton.jit
def _clamp(x):
    return tl.minimum(tl.maximum(x, 0.0), 1.0)
