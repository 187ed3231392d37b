"""`consistency_loss` as Triton kernels. Imports Triton: import it where it is needed.

A map's pyramid is a list of rows, one per position of each scale, full scale first; a row's vector is g(.) at
that position, for coarser scales pooled. Pooling is linear and each cell's children are its own, so a program that
holds a coarsest cell with all that lies under it needs to read g(.) once for all scales:

    forward     _correlate  every row's cosine with the filter (or product) and norm: the one pass over g(.)
                _compare    upsamples and averages the scales, compares with the sigmoid: loss, and its gradient
                            with respect to saliency and guided map, up to the factor that backward gets
    backward    _saliency_gradient  that factor times the gradient kept
      and, only where the guided map is not held fixed,
                _row_gradients      every row's part in the gradient: upsampling transposed
                _map_gradients      gradients of g(.) and of the filter from those

So both modalities are six launches where it is held fixed. All sums are float32, in a fixed order (no atomics).
"""

from __future__ import annotations

import contextlib

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from cmac.attention import AttentionConfig

WARP_TILE = (
    512  # values of a vector that _correlate gives to one warp, which then sums them without a barrier
)
POSITION_BLOCK = 1024  # positions per step of _compare
CELL_BLOCK = 8  # coarse rows per program of _row_gradients
CHANNEL_BLOCK = 64  # channels per program of _map_gradients
CHANNEL_TILE = 1024  # and those times the cells of one step
NUM_WARPS = 4

EPSILON = tl.constexpr(1e-8)  # of F.cosine_similarity


def fused_attention_consistency(
    transformed: Tensor,
    other_filter: Tensor,
    saliency: Tensor,
    config: AttentionConfig,
    reduction: str = "sum",
) -> Tensor:
    """`consistency.consistency_loss`, of which this has the arguments and the result.

    `config.norm` is "none" or "cosine" with `cosine_range` "shift" or "relu"; N is at least 1. Memory that is not
    channels-last is copied, which is one launch more.
    """
    assert config.norm == "none" or (config.norm == "cosine" and config.cosine_range in ("shift", "relu"))
    if config.detach_target:
        transformed, other_filter = transformed.detach(), other_filter.detach()
    # The kernels know three dimensions, a spectrogram's are the last two.
    maps = transformed.unsqueeze(2) if transformed.dim() == 4 else transformed  # (N, K, T, H, W)
    maps = maps.permute(0, 2, 3, 4, 1)  # (N, T, H, W, K)
    saliency = saliency.flatten(1)  # (N, P)
    guided_grad = torch.is_grad_enabled() and (maps.requires_grad or other_filter.requires_grad)
    return _Consistency.apply(maps, other_filter, saliency, config, reduction, guided_grad)


class _Consistency(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        maps: Tensor,
        other_filter: Tensor,
        saliency: Tensor,
        config: AttentionConfig,
        reduction: str,
        guided_grad: bool,
    ) -> Tensor:
        num_clips, time, height, width, channels = maps.shape
        maps = maps.contiguous()
        num_positions = time * height * width
        assert num_positions * channels < 2**31, "offsets within a clip are 32 bits"
        time_step = 2 if config.halve_time and time > 1 else 1
        num_rows, num_coarsest = _count_rows(time, height, width, time_step, config.num_scales)
        geometry = {"T": time, "H": height, "W": width, "TIME_STEP": time_step, "SCALES": config.num_scales}
        kind = {"COSINE": config.norm == "cosine", "SHIFT": config.cosine_range == "shift"}

        empty = maps.new_empty
        responses = empty((num_clips, num_rows), dtype=torch.float32)
        norms = torch.empty_like(responses) if guided_grad else responses
        loss = empty(num_clips, dtype=torch.float32)
        saliency_grad = empty((num_clips, num_positions), dtype=torch.float32)
        map_grad = torch.empty_like(saliency_grad) if guided_grad else saliency_grad
        block_c = triton.next_power_of_2(channels)
        cells = max(1, min(WARP_TILE // block_c, triton.next_power_of_2(num_coarsest)))
        with _device(maps):
            _correlate[(num_clips * triton.cdiv(num_coarsest, cells),)](
                maps,
                other_filter,
                responses,
                norms,
                *other_filter.stride(),
                C=channels,
                **geometry,
                COSINE=kind["COSINE"],
                SAVE_NORMS=guided_grad,
                CELLS=cells,
                BLOCK_C=block_c,
                num_warps=max(1, min(NUM_WARPS, block_c // WARP_TILE)),
            )
            _compare[(num_clips,)](
                responses,
                saliency,
                loss,
                saliency_grad,
                map_grad,
                *saliency.stride(),
                1.0 if reduction == "sum" else 1.0 / num_positions,
                **geometry,
                **kind,
                SAVE_MAP_GRAD=guided_grad,
                BLOCK=min(POSITION_BLOCK, triton.next_power_of_2(num_positions)),
                num_warps=NUM_WARPS,
            )
        if guided_grad:
            ctx.save_for_backward(saliency_grad, map_grad, maps, other_filter, responses, norms)
        else:
            ctx.save_for_backward(saliency_grad)
        ctx.geometry, ctx.kind, ctx.saliency_dtype = geometry, kind, saliency.dtype
        ctx.guided_grad = guided_grad
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        saliency_grad, *saved = ctx.saved_tensors
        maps_out = filter_out = saliency_out = None
        with _device(grad):
            if ctx.needs_input_grad[2]:
                saliency_out = _scaled(saliency_grad, grad, ctx.saliency_dtype)
            if ctx.guided_grad:
                maps_out, filter_out = _guided_backward(*saved, grad, ctx.geometry, ctx.kind)
        return (
            maps_out if ctx.needs_input_grad[0] else None,
            filter_out if ctx.needs_input_grad[1] else None,
            saliency_out,
            None,
            None,
            None,
        )


def _scaled(saliency_grad: Tensor, grad: Tensor, dtype: torch.dtype) -> Tensor:
    """Gradient of saliency: (N, P) float32 times (N,)."""
    num_clips, num_positions = saliency_grad.shape
    out = torch.empty_like(saliency_grad, dtype=dtype)
    block = min(POSITION_BLOCK, triton.next_power_of_2(num_positions))
    _saliency_gradient[(num_clips, triton.cdiv(num_positions, block))](
        saliency_grad, grad, out, grad.stride(0), num_positions, BLOCK=block, num_warps=NUM_WARPS
    )
    return out


def _guided_backward(
    map_grad: Tensor,
    maps: Tensor,
    other_filter: Tensor,
    responses: Tensor,
    norms: Tensor,
    grad: Tensor,
    geometry: dict[str, int],
    kind: dict[str, bool],
) -> tuple[Tensor, Tensor]:
    """Gradients of maps and filter, given that of the guided map (N, P) but for the factor grad (N,)."""
    num_clips, num_rows = responses.shape
    num_positions, channels = map_grad.shape[1], maps.shape[-1]
    coefficients = responses.new_empty((num_clips, 3, num_rows))
    block = min(POSITION_BLOCK, triton.next_power_of_2(num_positions))
    num_blocks = triton.cdiv(num_positions, block)
    scales = _scale_sizes(*(geometry[name] for name in ("T", "H", "W", "TIME_STEP", "SCALES")))
    num_blocks += sum(triton.cdiv(t * h * w, CELL_BLOCK) for t, h, w in scales[1:])
    filter_block = triton.next_power_of_2(channels)
    _row_gradients[(num_clips, num_blocks)](
        map_grad,
        grad,
        other_filter,
        responses,
        norms,
        coefficients,
        grad.stride(0),
        *other_filter.stride(),
        num_rows,
        C=channels,
        **geometry,
        **kind,
        BLOCK=block,
        CELLS=CELL_BLOCK,
        BLOCK_C=filter_block,
        num_warps=NUM_WARPS,
    )
    maps_out, filter_out = torch.empty_like(maps), other_filter.new_empty(other_filter.shape)
    num_coarsest = scales[-1][0] * scales[-1][1] * scales[-1][2]
    block_c = min(CHANNEL_BLOCK, filter_block)
    _map_gradients[(num_clips, triton.cdiv(channels, block_c))](
        maps,
        other_filter,
        coefficients,
        maps_out,
        filter_out,
        *other_filter.stride(),
        num_rows,
        C=channels,
        **geometry,
        COSINE=kind["COSINE"],
        CELLS=max(1, min(CHANNEL_TILE // block_c, triton.next_power_of_2(num_coarsest))),
        BLOCK_C=block_c,
        BLOCK_FILTER=filter_block,
        BLOCK_ROWS=min(POSITION_BLOCK, triton.next_power_of_2(num_rows)),
        num_warps=NUM_WARPS,
    )
    return maps_out, filter_out


def _scale_sizes(
    time: int, height: int, width: int, time_step: int, num_scales: int
) -> list[tuple[int, int, int]]:
    """(T, H, W) of each scale, as average pooling with ceil_mode has them."""
    sizes = [(time, height, width)]
    for _ in range(num_scales - 1):
        time, height, width = -(-time // time_step), -(-height // 2), -(-width // 2)
        sizes.append((time, height, width))
    return sizes


def _count_rows(time: int, height: int, width: int, time_step: int, num_scales: int) -> tuple[int, int]:
    """Rows of the pyramid, and how many of them are of its coarsest scale."""
    counts = [t * h * w for t, h, w in _scale_sizes(time, height, width, time_step, num_scales)]
    return sum(counts), counts[-1]


def _device(tensor: Tensor) -> contextlib.AbstractContextManager:
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


# Every kernel's T, H, W is the size at full scale; TIME_STEP is 2 where time is halved as well, else 1.


@triton.jit
def _correlate(
    maps,  # (N, T, H, W, C)
    other_filter,  # (N, C)
    responses,  # float32 (N, rows): cosine, or product where not COSINE
    norms,  # float32 (N, rows): of the row's vector
    filter_stride_n,
    filter_stride_c,
    C: tl.constexpr,
    T: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    TIME_STEP: tl.constexpr,
    SCALES: tl.constexpr,
    COSINE: tl.constexpr,
    SAVE_NORMS: tl.constexpr,
    CELLS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """CELLS cells of the coarsest scale with all under them."""
    T_1: tl.constexpr = (T + TIME_STEP - 1) // TIME_STEP
    H_1: tl.constexpr = (H + 1) // 2
    W_1: tl.constexpr = (W + 1) // 2
    T_2: tl.constexpr = (T_1 + TIME_STEP - 1) // TIME_STEP
    H_2: tl.constexpr = (H_1 + 1) // 2
    W_2: tl.constexpr = (W_1 + 1) // 2
    ROWS_1: tl.constexpr = T * H * W + T_1 * H_1 * W_1 * (SCALES > 1)
    ROWS: tl.constexpr = ROWS_1 + T_2 * H_2 * W_2 * (SCALES > 2)
    # Neighboring programs have the filter in common.
    COARSEST: tl.constexpr = (
        T * H * W if SCALES == 1 else (T_1 * H_1 * W_1 if SCALES == 2 else T_2 * H_2 * W_2)
    )
    PROGRAMS: tl.constexpr = (COARSEST + CELLS - 1) // CELLS
    clip = (tl.program_id(0) // PROGRAMS).to(tl.int64)
    cell = tl.program_id(0) % PROGRAMS * CELLS + tl.arange(0, CELLS)
    inside = cell < COARSEST
    channel = tl.arange(0, BLOCK_C)
    maps += clip * (T * H * W * C)
    responses += clip * ROWS
    norms += clip * ROWS
    kappa = _load_filter(other_filter + clip * filter_stride_n, filter_stride_c, channel, C)
    kappa_norm = tl.maximum(tl.sqrt(tl.sum(kappa * kappa, 0)), EPSILON, propagate_nan=tl.PropagateNan.ALL)
    if SCALES == 1:
        vector = _load_vector(maps, cell, inside, channel, C)
        _put_row(vector, kappa, kappa_norm, responses, norms, cell, inside, COSINE, SAVE_NORMS)
    elif SCALES == 2:
        _visit_1(
            maps, kappa, kappa_norm, responses, norms, cell // (H_1 * W_1), cell // W_1 % H_1, cell % W_1,
            inside, channel, C, T, H, W, TIME_STEP, COSINE, SAVE_NORMS, True,
        )  # fmt: skip
    else:
        _visit_2(
            maps, kappa, kappa_norm, responses, norms, cell // (H_2 * W_2), cell // W_2 % H_2, cell % W_2,
            inside, channel, C, T, H, W, TIME_STEP, COSINE, SAVE_NORMS, True,
        )  # fmt: skip


@triton.jit
def _compare(
    responses,  # float32 (N, rows)
    saliency,  # (N, P)
    loss,  # float32 (N,)
    saliency_grad,  # float32 (N, P)
    map_grad,  # float32 (N, P)
    saliency_stride_n,
    saliency_stride_p,
    factor,  # 1, or 1 / P for the mean
    T: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    TIME_STEP: tl.constexpr,
    SCALES: tl.constexpr,
    COSINE: tl.constexpr,
    SHIFT: tl.constexpr,
    SAVE_MAP_GRAD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """All positions of one clip."""
    T_1: tl.constexpr = (T + TIME_STEP - 1) // TIME_STEP
    H_1: tl.constexpr = (H + 1) // 2
    W_1: tl.constexpr = (W + 1) // 2
    T_2: tl.constexpr = (T_1 + TIME_STEP - 1) // TIME_STEP
    H_2: tl.constexpr = (H_1 + 1) // 2
    W_2: tl.constexpr = (W_1 + 1) // 2
    POSITIONS: tl.constexpr = T * H * W
    ROWS_1: tl.constexpr = POSITIONS + T_1 * H_1 * W_1 * (SCALES > 1)
    ROWS: tl.constexpr = ROWS_1 + T_2 * H_2 * W_2 * (SCALES > 2)
    clip = tl.program_id(0).to(tl.int64)
    responses += clip * ROWS
    saliency += clip * saliency_stride_n
    saliency_grad += clip * POSITIONS
    map_grad += clip * POSITIONS
    total = tl.zeros((BLOCK,), tl.float32)
    # Loop bounds are constants: the interpreter knows no others.
    for start in range(0, POSITIONS, BLOCK):
        position = start + tl.arange(0, BLOCK)
        inside = position < POSITIONS
        t, h, w = position // (H * W), position // W % H, position % W
        guided = _load_response(responses, position, inside, COSINE, SHIFT)
        if SCALES > 1:
            guided += _upsample(responses + POSITIONS, t, h, w, inside, T, H, W, T_1, H_1, W_1, COSINE, SHIFT)
        if SCALES > 2:
            guided += _upsample(responses + ROWS_1, t, h, w, inside, T, H, W, T_2, H_2, W_2, COSINE, SHIFT)
        pointers = saliency + position * saliency_stride_p
        predicted = tl.sigmoid(tl.load(pointers, mask=inside, other=0).to(tl.float32))
        error = tl.where(inside, guided / SCALES - predicted, 0.0)
        total += error * error
        slope = 2 * factor * error
        tl.store(saliency_grad + position, -slope * predicted * (1 - predicted), mask=inside)
        if SAVE_MAP_GRAD:
            tl.store(map_grad + position, slope, mask=inside)
    tl.store(loss + clip, tl.sum(total, 0) * factor)


@triton.jit
def _saliency_gradient(saliency_grad, grad, out, grad_stride, num_positions, BLOCK: tl.constexpr):
    clip = tl.program_id(0).to(tl.int64)
    position = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = position < num_positions
    factor = tl.load(grad + clip * grad_stride)
    value = tl.load(saliency_grad + clip * num_positions + position, mask=inside) * factor
    tl.store(out + clip * num_positions + position, value.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _row_gradients(
    map_grad,  # float32 (N, P)
    grad,  # float32 (N,)
    other_filter,  # (N, C)
    responses,  # float32 (N, rows)
    norms,  # float32 (N, rows)
    coefficients,  # float32 (N, 3, rows): of the filter and of the row's vector in the vector's gradient; d * cosine
    grad_stride,
    filter_stride_n,
    filter_stride_c,
    num_rows,
    C: tl.constexpr,
    T: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    TIME_STEP: tl.constexpr,
    SCALES: tl.constexpr,
    COSINE: tl.constexpr,
    SHIFT: tl.constexpr,
    BLOCK: tl.constexpr,
    CELLS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """A block of rows of one scale: d, the gradient of their cosine or product, and what follows from it."""
    T_1: tl.constexpr = (T + TIME_STEP - 1) // TIME_STEP
    H_1: tl.constexpr = (H + 1) // 2
    W_1: tl.constexpr = (W + 1) // 2
    T_2: tl.constexpr = (T_1 + TIME_STEP - 1) // TIME_STEP
    H_2: tl.constexpr = (H_1 + 1) // 2
    W_2: tl.constexpr = (W_1 + 1) // 2
    POSITIONS: tl.constexpr = T * H * W
    ROWS_1: tl.constexpr = POSITIONS + T_1 * H_1 * W_1
    BLOCKS: tl.constexpr = (POSITIONS + BLOCK - 1) // BLOCK
    BLOCKS_1: tl.constexpr = BLOCKS + (T_1 * H_1 * W_1 + CELLS - 1) // CELLS
    clip = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    map_grad += clip * POSITIONS
    responses += clip * num_rows
    norms += clip * num_rows
    coefficients += clip * 3 * num_rows
    factor = tl.load(grad + clip * grad_stride) / SCALES
    kappa_norm = 1.0
    if COSINE:
        kappa = _load_filter(other_filter + clip * filter_stride_n, filter_stride_c, tl.arange(0, BLOCK_C), C)
        kappa_norm = tl.maximum(tl.sqrt(tl.sum(kappa * kappa, 0)), EPSILON)
    # Names of their own in each branch: the blocks differ in size.
    if block < BLOCKS:
        position = block * BLOCK + tl.arange(0, BLOCK)
        inside = position < POSITIONS
        d_0 = tl.load(map_grad + position, mask=inside, other=0) * factor
        _put_coefficients(
            d_0, kappa_norm, responses, norms, coefficients, position, inside, num_rows, COSINE, SHIFT
        )
    elif block < BLOCKS_1:
        cell_1 = (block - BLOCKS) * CELLS + tl.arange(0, CELLS)
        d_1 = _gather(map_grad, cell_1, T, H, W, T_1, H_1, W_1, CELLS, BLOCK) * factor
        _put_coefficients(
            d_1, kappa_norm, responses, norms, coefficients, POSITIONS + cell_1, cell_1 < T_1 * H_1 * W_1,
            num_rows, COSINE, SHIFT,
        )  # fmt: skip
    else:
        cell_2 = (block - BLOCKS_1) * CELLS + tl.arange(0, CELLS)
        d_2 = _gather(map_grad, cell_2, T, H, W, T_2, H_2, W_2, CELLS, BLOCK) * factor
        _put_coefficients(
            d_2, kappa_norm, responses, norms, coefficients, ROWS_1 + cell_2, cell_2 < T_2 * H_2 * W_2,
            num_rows, COSINE, SHIFT,
        )  # fmt: skip


@triton.jit
def _map_gradients(
    maps,  # (N, T, H, W, C)
    other_filter,  # (N, C)
    coefficients,  # float32 (N, 3, rows)
    maps_out,  # as maps
    filter_out,  # (N, C)
    filter_stride_n,
    filter_stride_c,
    num_rows,
    C: tl.constexpr,
    T: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    TIME_STEP: tl.constexpr,
    SCALES: tl.constexpr,
    COSINE: tl.constexpr,
    CELLS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_FILTER: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):
    """BLOCK_C channels of one clip, CELLS cells of the coarsest scale at a time, from there down."""
    T_1: tl.constexpr = (T + TIME_STEP - 1) // TIME_STEP
    H_1: tl.constexpr = (H + 1) // 2
    W_1: tl.constexpr = (W + 1) // 2
    T_2: tl.constexpr = (T_1 + TIME_STEP - 1) // TIME_STEP
    H_2: tl.constexpr = (H_1 + 1) // 2
    W_2: tl.constexpr = (W_1 + 1) // 2
    ROWS_1: tl.constexpr = T * H * W + T_1 * H_1 * W_1 * (SCALES > 1)
    ROWS: tl.constexpr = ROWS_1 + T_2 * H_2 * W_2 * (SCALES > 2)
    clip = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    maps += clip * (T * H * W * C)
    maps_out += clip * (T * H * W * C)
    other_filter += clip * filter_stride_n
    coefficients += clip * 3 * num_rows
    kappa = _load_filter(other_filter, filter_stride_c, channel, C)
    products = tl.zeros((CELLS, BLOCK_C), tl.float32)
    above = tl.zeros((CELLS, BLOCK_C), tl.float32)
    if SCALES == 1:
        for start in range(0, T * H * W, CELLS):
            cell = start + tl.arange(0, CELLS)
            products += _push_0(
                maps, maps_out, kappa, coefficients, above, cell, cell < T * H * W, channel, C, ROWS
            )
    elif SCALES == 2:
        for start in range(0, T_1 * H_1 * W_1, CELLS):
            cell = start + tl.arange(0, CELLS)
            products += _push_1(
                maps, maps_out, kappa, coefficients, above, cell // (H_1 * W_1), cell // W_1 % H_1, cell % W_1,
                cell < T_1 * H_1 * W_1, channel, C, ROWS, T, H, W, TIME_STEP,
            )  # fmt: skip
    else:
        for start in range(0, T_2 * H_2 * W_2, CELLS):
            cell = start + tl.arange(0, CELLS)
            products += _push_2(
                maps, maps_out, kappa, coefficients, above, cell // (H_2 * W_2), cell // W_2 % H_2, cell % W_2,
                cell < T_2 * H_2 * W_2, channel, C, ROWS, T, H, W, TIME_STEP,
            )  # fmt: skip
    total = tl.sum(products, 0)
    if COSINE:
        whole = _load_filter(other_filter, filter_stride_c, tl.arange(0, BLOCK_FILTER), C)
        norm = tl.sqrt(tl.sum(whole * whole, 0))
        along = tl.zeros((BLOCK_ROWS,), tl.float32)
        for start in range(0, ROWS, BLOCK_ROWS):
            row = start + tl.arange(0, BLOCK_ROWS)
            along += tl.load(coefficients + 2 * num_rows + row, mask=row < ROWS, other=0)
        # The norm itself, not what it is clamped to: F.cosine_similarity clamps outside of autograd.
        inverse = tl.where(norm > 0, 1 / norm, 0.0)
        total -= kappa * (tl.sum(along, 0) * inverse / tl.maximum(norm, EPSILON))
    tl.store(filter_out + clip * C + channel, total.to(filter_out.dtype.element_ty), mask=channel < C)


# Rows of the pyramid: reading them upwards (_visit), and pushing gradients downwards (_push)


@triton.jit
def _load_filter(pointer, stride, channel, C: tl.constexpr):
    return tl.load(pointer + channel * stride, mask=channel < C, other=0).to(tl.float32)


@triton.jit
def _load_vector(maps, position, inside, channel, C: tl.constexpr):
    """float32 (CELLS, BLOCK_C); zero outside."""
    pointers = maps + position[:, None] * C + channel[None, :]
    return tl.load(pointers, mask=inside[:, None] & (channel < C)[None, :], other=0).to(tl.float32)


@triton.jit
def _put_row(
    vector, kappa, kappa_norm, responses, norms, row, inside, COSINE: tl.constexpr, SAVE_NORMS: tl.constexpr
):
    response = tl.sum(vector * kappa[None, :], 1)
    if COSINE:
        norm = tl.sqrt(tl.sum(vector * vector, 1))
        response = response / tl.maximum(norm, EPSILON, propagate_nan=tl.PropagateNan.ALL) / kappa_norm
        if SAVE_NORMS:
            tl.store(norms + row, norm, mask=inside)
    tl.store(responses + row, response, mask=inside)


@triton.jit
def _num_children(t, h, w, T: tl.constexpr, H: tl.constexpr, W: tl.constexpr, TIME_STEP: tl.constexpr):
    """float32 (CELLS,): children of the cells at (t, h, w); T, H, W is the size of the children's scale."""
    count = tl.minimum(H - 2 * h, 2) * tl.minimum(W - 2 * w, 2)
    if TIME_STEP == 2:
        count *= tl.minimum(T - 2 * t, 2)
    return tl.maximum(count, 1).to(tl.float32)  # cells that are none have zeros, not 0 / 0


@triton.jit
def _visit_1(
    maps, kappa, kappa_norm, responses, norms, t, h, w, inside, channel,
    C: tl.constexpr, T: tl.constexpr, H: tl.constexpr, W: tl.constexpr, TIME_STEP: tl.constexpr,
    COSINE: tl.constexpr, SAVE_NORMS: tl.constexpr, PUT: tl.constexpr,
):  # fmt: skip
    """float32 (CELLS, BLOCK_C): vectors of the second scale's cells; with PUT, their rows and those under them."""
    H_1: tl.constexpr = (H + 1) // 2
    W_1: tl.constexpr = (W + 1) // 2
    vector = tl.zeros((t.shape[0], channel.shape[0]), tl.float32)
    for child in tl.static_range(4 * TIME_STEP):
        child_t, child_h, child_w = t * TIME_STEP + child // 4, h * 2 + child // 2 % 2, w * 2 + child % 2
        within = inside & (child_t < T) & (child_h < H) & (child_w < W)
        position = (child_t * H + child_h) * W + child_w
        below = _load_vector(maps, position, within, channel, C)
        if PUT:
            _put_row(below, kappa, kappa_norm, responses, norms, position, within, COSINE, SAVE_NORMS)
        vector += below
    vector = vector / _num_children(t, h, w, T, H, W, TIME_STEP)[:, None]
    if PUT:
        row = T * H * W + (t * H_1 + h) * W_1 + w
        _put_row(vector, kappa, kappa_norm, responses, norms, row, inside, COSINE, SAVE_NORMS)
    return vector


@triton.jit
def _visit_2(
    maps, kappa, kappa_norm, responses, norms, t, h, w, inside, channel,
    C: tl.constexpr, T: tl.constexpr, H: tl.constexpr, W: tl.constexpr, TIME_STEP: tl.constexpr,
    COSINE: tl.constexpr, SAVE_NORMS: tl.constexpr, PUT: tl.constexpr,
):  # fmt: skip
    """`_visit_1` of the third scale."""
    T_1: tl.constexpr = (T + TIME_STEP - 1) // TIME_STEP
    H_1: tl.constexpr = (H + 1) // 2
    W_1: tl.constexpr = (W + 1) // 2
    H_2: tl.constexpr = (H_1 + 1) // 2
    W_2: tl.constexpr = (W_1 + 1) // 2
    vector = tl.zeros((t.shape[0], channel.shape[0]), tl.float32)
    for child in range(4 * TIME_STEP):
        child_t, child_h, child_w = t * TIME_STEP + child // 4, h * 2 + child // 2 % 2, w * 2 + child % 2
        within = inside & (child_t < T_1) & (child_h < H_1) & (child_w < W_1)
        below = _visit_1(
            maps, kappa, kappa_norm, responses, norms, child_t, child_h, child_w, within, channel,
            C, T, H, W, TIME_STEP, COSINE, SAVE_NORMS, PUT,
        )  # fmt: skip
        vector += below
    vector = vector / _num_children(t, h, w, T_1, H_1, W_1, TIME_STEP)[:, None]
    if PUT:
        row = T * H * W + T_1 * H_1 * W_1 + (t * H_2 + h) * W_2 + w
        _put_row(vector, kappa, kappa_norm, responses, norms, row, inside, COSINE, SAVE_NORMS)
    return vector


@triton.jit
def _push_0(
    maps, maps_out, kappa, coefficients, above, position, inside, channel, C: tl.constexpr, ROWS: tl.constexpr
):  # fmt: skip
    """Store the gradient of positions, of which `above` is what coarser scales give.

    Returns float32 (CELLS, BLOCK_C), whose sum over all is the filter's gradient but for its norm's part.
    """
    vector = _load_vector(maps, position, inside, channel, C)
    on_filter = tl.load(coefficients + position, mask=inside, other=0)[:, None]
    on_vector = tl.load(coefficients + ROWS + position, mask=inside, other=0)[:, None]
    gradient = on_filter * kappa[None, :] + on_vector * vector + above
    pointers = maps_out + position[:, None] * C + channel[None, :]
    mask = inside[:, None] & (channel < C)[None, :]
    tl.store(pointers, gradient.to(maps_out.dtype.element_ty), mask=mask)
    return on_filter * vector


@triton.jit
def _push_1(
    maps, maps_out, kappa, coefficients, above, t, h, w, inside, channel,
    C: tl.constexpr, ROWS: tl.constexpr, T: tl.constexpr, H: tl.constexpr, W: tl.constexpr,
    TIME_STEP: tl.constexpr,
):  # fmt: skip
    """`_push_0` of all positions under cells of the second scale."""
    H_1: tl.constexpr = (H + 1) // 2
    W_1: tl.constexpr = (W + 1) // 2
    vector = _visit_1(
        maps, kappa, 1.0, coefficients, coefficients, t, h, w, inside, channel,
        C, T, H, W, TIME_STEP, True, False, False,
    )  # fmt: skip
    row = T * H * W + (t * H_1 + h) * W_1 + w
    on_filter = tl.load(coefficients + row, mask=inside, other=0)[:, None]
    on_vector = tl.load(coefficients + ROWS + row, mask=inside, other=0)[:, None]
    above = on_filter * kappa[None, :] + on_vector * vector + above
    above = above / _num_children(t, h, w, T, H, W, TIME_STEP)[:, None]
    products = on_filter * vector
    for child in tl.static_range(4 * TIME_STEP):
        child_t, child_h, child_w = t * TIME_STEP + child // 4, h * 2 + child // 2 % 2, w * 2 + child % 2
        within = inside & (child_t < T) & (child_h < H) & (child_w < W)
        position = (child_t * H + child_h) * W + child_w
        products += _push_0(maps, maps_out, kappa, coefficients, above, position, within, channel, C, ROWS)
    return products


@triton.jit
def _push_2(
    maps, maps_out, kappa, coefficients, above, t, h, w, inside, channel,
    C: tl.constexpr, ROWS: tl.constexpr, T: tl.constexpr, H: tl.constexpr, W: tl.constexpr,
    TIME_STEP: tl.constexpr,
):  # fmt: skip
    """`_push_0` of all positions under cells of the third scale."""
    T_1: tl.constexpr = (T + TIME_STEP - 1) // TIME_STEP
    H_1: tl.constexpr = (H + 1) // 2
    W_1: tl.constexpr = (W + 1) // 2
    H_2: tl.constexpr = (H_1 + 1) // 2
    W_2: tl.constexpr = (W_1 + 1) // 2
    vector = _visit_2(
        maps, kappa, 1.0, coefficients, coefficients, t, h, w, inside, channel,
        C, T, H, W, TIME_STEP, True, False, False,
    )  # fmt: skip
    row = T * H * W + T_1 * H_1 * W_1 + (t * H_2 + h) * W_2 + w
    on_filter = tl.load(coefficients + row, mask=inside, other=0)[:, None]
    on_vector = tl.load(coefficients + ROWS + row, mask=inside, other=0)[:, None]
    above = on_filter * kappa[None, :] + on_vector * vector + above
    above = above / _num_children(t, h, w, T_1, H_1, W_1, TIME_STEP)[:, None]
    products = on_filter * vector
    for child in range(4 * TIME_STEP):
        child_t, child_h, child_w = t * TIME_STEP + child // 4, h * 2 + child // 2 % 2, w * 2 + child % 2
        within = inside & (child_t < T_1) & (child_h < H_1) & (child_w < W_1)
        products += _push_1(
            maps, maps_out, kappa, coefficients, above, child_t, child_h, child_w, within, channel,
            C, ROWS, T, H, W, TIME_STEP,
        )  # fmt: skip
    return products


# Responses: their range, upsampling, and the same backwards


@triton.jit
def _load_response(responses, row, inside, COSINE: tl.constexpr, SHIFT: tl.constexpr):
    response = tl.load(responses + row, mask=inside, other=0)
    if COSINE:
        if SHIFT:
            response = (1 + response) / 2
        response = tl.maximum(response, 0.0, propagate_nan=tl.PropagateNan.ALL)
        response = tl.minimum(response, 1.0, propagate_nan=tl.PropagateNan.ALL)
    return response


@triton.jit
def _source(index, FROM: tl.constexpr, TO: tl.constexpr):
    """Where F.interpolate (align_corners=False) reads for `index` of TO cells, in cells of FROM."""
    return tl.maximum((index.to(tl.float32) + 0.5) * (FROM / TO) - 0.5, 0.0)


@triton.jit
def _upsample(
    responses, t, h, w, inside,
    T: tl.constexpr, H: tl.constexpr, W: tl.constexpr, T_S: tl.constexpr, H_S: tl.constexpr, W_S: tl.constexpr,
    COSINE: tl.constexpr, SHIFT: tl.constexpr,
):  # fmt: skip
    """float32 (BLOCK,): at positions of full scale, a scale of T_S x H_S x W_S rows from `responses` on."""
    if T_S == T:
        return _upsample_plane(responses, t * (H_S * W_S), h, w, inside, H, W, H_S, W_S, COSINE, SHIFT)
    else:
        source = _source(t, T_S, T)
        first = source.to(tl.int32)
        second = tl.minimum(first + 1, T_S - 1)
        weight = source - first.to(tl.float32)
        early = _upsample_plane(
            responses, first * (H_S * W_S), h, w, inside, H, W, H_S, W_S, COSINE, SHIFT
        )  # fmt: skip
        late = _upsample_plane(
            responses, second * (H_S * W_S), h, w, inside, H, W, H_S, W_S, COSINE, SHIFT
        )  # fmt: skip
        return early * (1 - weight) + late * weight


@triton.jit
def _upsample_plane(
    responses, plane, h, w, inside,
    H: tl.constexpr, W: tl.constexpr, H_S: tl.constexpr, W_S: tl.constexpr,
    COSINE: tl.constexpr, SHIFT: tl.constexpr,
):  # fmt: skip
    source_h, source_w = _source(h, H_S, H), _source(w, W_S, W)
    top, left = source_h.to(tl.int32), source_w.to(tl.int32)
    bottom, right = tl.minimum(top + 1, H_S - 1), tl.minimum(left + 1, W_S - 1)
    down, across = source_h - top.to(tl.float32), source_w - left.to(tl.float32)
    upper = plane + top * W_S
    lower = plane + bottom * W_S
    upper_left = _load_response(responses, upper + left, inside, COSINE, SHIFT)
    upper_right = _load_response(responses, upper + right, inside, COSINE, SHIFT)
    lower_left = _load_response(responses, lower + left, inside, COSINE, SHIFT)
    lower_right = _load_response(responses, lower + right, inside, COSINE, SHIFT)
    return (upper_left * (1 - across) + upper_right * across) * (1 - down) + (
        lower_left * (1 - across) + lower_right * across
    ) * down


@triton.jit
def _weight(index, cell, FROM: tl.constexpr, TO: tl.constexpr):
    """How much `cell` of FROM gives to `index` of TO when interpolated."""
    source = tl.minimum(_source(index, FROM, TO), FROM - 1.0)
    return tl.maximum(1 - tl.abs(source - cell.to(tl.float32)), 0.0)


@triton.jit
def _gather(
    map_grad, cell,
    T: tl.constexpr, H: tl.constexpr, W: tl.constexpr, T_S: tl.constexpr, H_S: tl.constexpr, W_S: tl.constexpr,
    CELLS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """float32 (CELLS,): the transpose of `_upsample`."""
    cell_t, cell_h, cell_w = cell // (H_S * W_S), cell // W_S % H_S, cell % W_S
    total = tl.zeros((CELLS,), tl.float32)
    for start in range(0, T * H * W, BLOCK):
        position = start + tl.arange(0, BLOCK)
        t, h, w = position // (H * W), position // W % H, position % W
        value = tl.load(map_grad + position, mask=position < T * H * W, other=0)
        weight = _weight(t[None, :], cell_t[:, None], T_S, T)
        weight *= _weight(h[None, :], cell_h[:, None], H_S, H)
        weight *= _weight(w[None, :], cell_w[:, None], W_S, W)
        total += tl.sum(weight * value[None, :], 1)
    return total


@triton.jit
def _put_coefficients(
    d, kappa_norm, responses, norms, coefficients, row, inside, num_rows,
    COSINE: tl.constexpr, SHIFT: tl.constexpr,
):  # fmt: skip
    """From d, the gradient of a row's response: dx = (first) kappa + (second) x, d kappa = sum (first) x - ..."""
    if COSINE:
        cosine = tl.load(responses + row, mask=inside, other=0)
        norm = tl.load(norms + row, mask=inside, other=1)
        response = cosine
        if SHIFT:
            response = (1 + cosine) / 2
            d *= 0.5
        # As torch.clamp has it: the gradient passes at the bounds, too.
        d = tl.where((response >= 0) & (response <= 1), d, 0.0)
        clamped = tl.maximum(norm, EPSILON)
        inverse = tl.where(norm > 0, 1 / norm, 0.0)
        tl.store(coefficients + row, d / clamped / kappa_norm, mask=inside)
        tl.store(coefficients + num_rows + row, -d * cosine / clamped * inverse, mask=inside)
        tl.store(coefficients + 2 * num_rows + row, d * cosine, mask=inside)
    else:
        tl.store(coefficients + row, d, mask=inside)
        tl.store(coefficients + num_rows + row, tl.zeros_like(d), mask=inside)
