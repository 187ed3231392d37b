"""relu(bn(x) + shortcut) in training and its gradients. Imports Triton: import it where it is needed.

Memory limits these kernels, so what counts is how often a value passes: forward reads x twice (and the shortcut once)
and writes once; backward reads dy and x twice and writes dx, after a shortcut it also reads the output and writes the
shortcut's gradient. In bytes per value of 16 bits: 6 and 10, after a shortcut 8 and 14. Three launches each way:
sums of blocks of rows, one small kernel that joins them in a fixed order (no atomics: same input, same bits), and the
pointwise rest. All groups of clips that have statistics of their own are in the same launches.

A channels-last x is a dense (rows, C). The kernels see it as (rows / fold, fold * C), the same memory: fold makes a
row a whole number of 16-byte vectors where C is odd, and a whole number of tiles, whose width is a power of two, or
nearly. Column j holds channel j % C.
"""

from __future__ import annotations

import contextlib
import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from cmac.norm import FUSED_DTYPES, is_channels_last

FOLDS = (1, 2, 4, 8, 16)
WIDTHS = (512, 256, 128, 64, 32, 16)  # of a tile
VECTOR = 8  # values of 16 bits in 16 bytes
REDUCE_TILE = 2048  # values per step of a program
APPLY_TILE = 2048  # 4096 makes fewer programs fit
NUM_WARPS = 4
STATISTICS_UNROLL = tl.constexpr(4)  # tiles that are on their way at a time
GRADIENTS_UNROLL = tl.constexpr(2)
MAX_REDUCE_PROGRAMS = 1024  # what an H100 runs at a time, about; each leaves a row of partial sums
MIN_APPLY_PROGRAMS = 2048
MAX_APPLY_STEPS = 8
JOIN_TILE = 4096
MAX_JOIN_ROWS = 1024  # of partial sums at a time

# Which values of dy count
ALL = tl.constexpr(0)
RECOMPUTED = tl.constexpr(1)  # where relu(bn(x)) > 0
SAVED = tl.constexpr(2)  # where the saved output > 0


def fused_batch_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    shortcut: Tensor | None = None,
    relu: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    group_size: int | None = None,
    update_statistics: bool = True,
    num_batches_tracked: Tensor | None = None,
) -> Tensor:
    """relu(bn(x) + shortcut) as `cmac.norm.BatchNorm2d` defines it in training, in x's dtype and memory format.

    Args:
        x: (N, C, H, W) or (N, C, T, H, W), channels-last; float32, bfloat16 or float16.
        weight, bias: (C,) float32.
        running_mean, running_var: (C,) float32, updated in place; None with update_statistics False.
        shortcut: of x's shape; brought to x's dtype and memory format where it has others.
        relu: clamp at 0.
        momentum: weight of this batch in the running statistics.
        eps: added to the variance.
        group_size: clips that share statistics, where it divides a larger N; None: all.
        update_statistics: change running_mean, running_var and num_batches_tracked.
        num_batches_tracked: int64 scalar on x's device, plus 1; None: there is none.

    Raises:
        ValueError: x is of another dtype or memory format, or a group has one value per channel.
    """
    if x.dtype not in FUSED_DTYPES:
        raise ValueError(f"x is {x.dtype}, expected one of {FUSED_DTYPES}")
    if not is_channels_last(x):
        raise ValueError(f"x {tuple(x.shape)} has strides {x.stride()}, expected channels-last memory")
    num_groups = 1
    if group_size is not None and x.shape[0] > group_size and x.shape[0] % group_size == 0:
        num_groups = x.shape[0] // group_size
    if x.numel() == num_groups * x.shape[1]:
        raise ValueError(
            f"x is {tuple(x.shape)} in {num_groups} groups, expected more than 1 value per channel"
        )
    if shortcut is not None:
        shortcut = _like(x, shortcut.to(x.dtype))
    update = None
    if update_statistics:
        update = (running_mean, running_var, num_batches_tracked, momentum)
    inputs = (x, weight, bias, shortcut)
    if torch.is_grad_enabled() and any(v is not None and v.requires_grad for v in inputs):
        return _FusedBatchNorm.apply(*inputs, relu, eps, num_groups, update)
    return _forward(*inputs, relu, eps, num_groups, update)[0]


class _FusedBatchNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, shortcut, relu, eps, num_groups, update):
        out, mean, rstd = _forward(x, weight, bias, shortcut, relu, eps, num_groups, update)
        ctx.num_groups = num_groups
        ctx.counts = ALL.value if not relu else RECOMPUTED.value if shortcut is None else SAVED.value
        ctx.save_for_backward(x, weight, bias, mean, rstd, out if ctx.counts == SAVED.value else None)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, weight, bias, mean, rstd, out = ctx.saved_tensors
        for_x, for_weight, for_bias, for_shortcut = ctx.needs_input_grad[:4]
        dx, dweight, dbias, dshortcut = _backward(
            _like(x, grad),
            x,
            weight,
            bias,
            mean,
            rstd,
            out,
            ctx.counts,
            ctx.num_groups,
            for_x=for_x,
            for_weights=for_weight or for_bias,
            for_shortcut=for_shortcut,
        )
        return (
            dx,
            dweight if for_weight else None,
            dbias if for_bias else None,
            dshortcut,
            None,
            None,
            None,
            None,
        )


def _like(x: Tensor, other: Tensor) -> Tensor:
    """other in x's memory format."""
    if is_channels_last(other):
        return other
    return other.contiguous(memory_format=torch.channels_last if x.dim() == 4 else torch.channels_last_3d)


class View(NamedTuple):
    """How the kernels see (groups * rows * fold, C) in memory, and which rows a program of a reduction takes."""

    fold: int
    width: int
    """Of a row: fold * C."""
    rows: int
    """Of a group."""
    aligned: bool
    """Rows begin at multiples of 16 bytes."""
    tile_width: int
    num_blocks: int
    """Tiles side by side."""
    splits: int
    """Programs among which the tiles of a column are dealt out, per group."""
    steps: int
    """Tiles per program."""

    @property
    def reduce_grid(self) -> int:
        return self.num_blocks * self.splits

    @property
    def units(self) -> tuple[int, int]:
        """(width / unit, unit): what the compiler has to know of the width."""
        return (self.width // VECTOR, VECTOR) if self.aligned else (self.width, 1)


@functools.cache
def _view(rows: int, channels: int, groups: int) -> View:
    """rows: of a group, before folding."""

    def cost(fold: int, tile_width: int) -> tuple:
        width = fold * channels
        waste = triton.cdiv(width, tile_width) * tile_width / width
        return (width % VECTOR != 0, max(waste, 1.07), tile_width < 64, fold, -tile_width)

    folds = [fold for fold in FOLDS if rows % fold == 0]
    fold, tile_width = min(((f, w) for f in folds for w in WIDTHS), key=lambda pair: cost(*pair))
    width = fold * channels
    num_blocks = triton.cdiv(width, tile_width)
    tiles = triton.cdiv(rows // fold, max(1, REDUCE_TILE // tile_width))
    steps = STATISTICS_UNROLL.value
    while triton.cdiv(tiles, steps) * num_blocks * groups > MAX_REDUCE_PROGRAMS and steps < tiles:
        steps *= 2
    return View(
        fold,
        width,
        rows // fold,
        width % VECTOR == 0,
        tile_width,
        num_blocks,
        triton.cdiv(tiles, steps),
        steps,
    )


def _forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    shortcut: Tensor | None,
    relu: bool,
    eps: float,
    num_groups: int,
    update: tuple | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The output, and (G, C) float32 mean and 1 / standard deviation."""
    channels = x.shape[1]
    view = _view(x.numel() // (channels * num_groups), channels, num_groups)
    width, unit = view.units
    join = _join_constants(view, num_groups)
    out = torch.empty_like(x)
    partials = x.new_empty((2, num_groups, view.splits * view.width), dtype=torch.float32)
    mean, rstd = x.new_empty((2, num_groups, channels), dtype=torch.float32)
    running_mean, running_var, num_batches, momentum = update or (None, None, None, 0.0)
    tile_rows = max(1, REDUCE_TILE // view.tile_width)
    with _on(x.device):
        _statistics[(view.reduce_grid, num_groups)](
            x,
            partials[0],
            partials[1],
            width,
            view.rows,
            view.splits,
            UNIT=unit,
            TILE_ROWS=tile_rows,
            TILE_WIDTH=view.tile_width,
            STEPS=view.steps,
            num_warps=NUM_WARPS,
        )
        _join_statistics[_join_grid(channels, join)](
            partials[0],
            partials[1],
            mean,
            rstd,
            running_mean,
            running_var,
            num_batches,
            channels,
            view.rows,
            view.splits,
            momentum,
            eps,
            FOLD=view.fold,
            TILE_ROWS=tile_rows,
            UPDATE=update is not None,
            **join,
            num_warps=NUM_WARPS,
        )
        grid, constants = _apply_grid(view, num_groups)
        _normalize[grid](
            x,
            shortcut,
            out,
            mean,
            rstd,
            weight,
            bias,
            width,
            view.rows,
            channels,
            UNIT=unit,
            RELU=relu,
            **constants,
            num_warps=NUM_WARPS,
        )
    return out, mean, rstd


def _backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    rstd: Tensor,
    out: Tensor | None,
    counts: int,
    num_groups: int,
    *,
    for_x: bool,
    for_weights: bool,
    for_shortcut: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of x, weight, bias and shortcut, those that are asked for."""
    channels = x.shape[1]
    view = _view(x.numel() // (channels * num_groups), channels, num_groups)
    width, unit = view.units
    join = _join_constants(view, num_groups)
    partials = x.new_empty((2, num_groups, view.splits * view.width), dtype=torch.float32)
    slope, offset = x.new_empty((2, num_groups, channels), dtype=torch.float32)
    dx = dweight = dbias = dshortcut = None
    cut = for_shortcut and counts != ALL.value
    if for_shortcut:
        dshortcut = torch.empty_like(x) if cut else grad
    if not (for_x or for_weights or cut):
        return None, None, None, dshortcut
    with _on(x.device):
        _gradient_sums[(view.reduce_grid, num_groups)](
            grad,
            x,
            out,
            mean,
            rstd,
            weight,
            bias,
            dshortcut if cut else None,
            partials[0],
            partials[1],
            width,
            view.rows,
            view.splits,
            channels,
            UNIT=unit,
            COUNTS=counts,
            TILE_ROWS=max(1, REDUCE_TILE // view.tile_width),
            TILE_WIDTH=view.tile_width,
            STEPS=view.steps,
            num_warps=NUM_WARPS,
        )
        if for_x or for_weights:
            dweight, dbias = torch.empty_like(weight), torch.empty_like(bias)
            _join_gradients[_join_grid(channels, join)](
                partials[0],
                partials[1],
                rstd,
                weight,
                slope,
                offset,
                dweight,
                dbias,
                channels,
                view.rows,
                view.splits,
                FOLD=view.fold,
                **join,
                num_warps=NUM_WARPS,
            )
        if for_x:
            dx = torch.empty_like(x)
            grid, constants = _apply_grid(view, num_groups)
            _gradients[grid](
                dshortcut if cut else grad,
                x,
                None if cut else out,
                mean,
                rstd,
                weight,
                bias,
                slope,
                offset,
                dx,
                width,
                view.rows,
                channels,
                UNIT=unit,
                COUNTS=ALL.value if cut else counts,
                **constants,
                num_warps=NUM_WARPS,
            )
    return dx, dweight, dbias, dshortcut


def _on(device: torch.device) -> contextlib.AbstractContextManager:
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def _join_constants(view: View, num_groups: int) -> dict[str, int]:
    partial_rows = view.splits * view.fold
    chunk = min(MAX_JOIN_ROWS, triton.next_power_of_2(partial_rows))
    return {
        "GROUPS": num_groups,
        "CHUNKS": triton.cdiv(partial_rows, chunk),
        "CHUNK": chunk,
        "CHANNELS": max(4, min(32, JOIN_TILE // chunk)),
    }


def _join_grid(channels: int, constants: dict[str, int]) -> tuple[int]:
    return (triton.cdiv(channels, constants["CHANNELS"]),)


def _apply_grid(view: View, num_groups: int) -> tuple[tuple[int, int], dict[str, int]]:
    tile_rows = max(1, APPLY_TILE // view.tile_width)
    tiles = triton.cdiv(view.rows, tile_rows)
    steps = MAX_APPLY_STEPS
    while steps > 1 and triton.cdiv(tiles, steps) * view.num_blocks * num_groups < MIN_APPLY_PROGRAMS:
        steps //= 2
    grid = (view.num_blocks * triton.cdiv(tiles, steps), num_groups)
    return grid, {"TILE_ROWS": tile_rows, "TILE_WIDTH": view.tile_width, "STEPS": steps}


# Kernels. Loop bounds are constants: the interpreter knows no others. Sizes of which nothing is assumed are not
# specialized, so that a layer compiles once.


@triton.jit(do_not_specialize=["units", "rows", "splits"])
def _statistics(
    x,
    means,  # float32 (G, splits, width)
    squares,  # the same: sums of squared distances from those means
    units,  # width / UNIT
    rows,
    splits,
    UNIT: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_WIDTH: tl.constexpr,
    STEPS: tl.constexpr,
):
    """Mean and squared distances of tiles split, split + splits, ...: Welford at each place of a tile, then joined."""
    width = units * UNIT
    block, split, group = _place(width, TILE_WIDTH)
    columns = block * TILE_WIDTH + tl.arange(0, TILE_WIDTH)
    start = x + group.to(tl.int64) * rows * width
    mean = tl.zeros((TILE_ROWS, TILE_WIDTH), tl.float32)
    square = tl.zeros((TILE_ROWS, TILE_WIDTH), tl.float32)
    count = tl.zeros((TILE_ROWS,), tl.float32)
    for step in range(0, STEPS, STATISTICS_UNROLL):
        row = (step * splits + split) * TILE_ROWS + tl.arange(0, TILE_ROWS)
        stride = splits * TILE_ROWS
        x_0 = _load(start, row, columns, rows, width)
        x_1 = _load(start, row + stride, columns, rows, width)
        x_2 = _load(start, row + 2 * stride, columns, rows, width)
        x_3 = _load(start, row + 3 * stride, columns, rows, width)
        mean, square, count = _add_values(mean, square, count, x_0, row < rows, step)
        mean, square, count = _add_values(mean, square, count, x_1, row + stride < rows, step + 1)
        mean, square, count = _add_values(mean, square, count, x_2, row + 2 * stride < rows, step + 2)
        mean, square, count = _add_values(mean, square, count, x_3, row + 3 * stride < rows, step + 3)
    count = count[:, None]
    joint = tl.sum(mean * count, 0) / tl.sum(count)
    distance = mean - joint[None, :]
    square = tl.sum(square + count * distance * distance, 0)
    target = (group * splits + split) * width + columns
    tl.store(means + target, joint, mask=columns < width)
    tl.store(squares + target, square, mask=columns < width)


@triton.jit
def _add_values(mean, square, count, x, inside, before):
    """Welford's step for the (before + 1)-th value of each place; rows not inside stay, and had x = 0 loaded."""
    share = 1.0 / (before + 1.0)
    weight = tl.where(inside, share, 0.0)[:, None]
    rest = tl.where(inside, before * share, 0.0)[:, None]
    distance = x.to(tl.float32) - mean
    mean += distance * weight
    square += distance * distance * rest
    return mean, square, count + tl.where(inside, 1.0, 0.0)


@triton.jit(do_not_specialize=["rows", "splits"])
def _join_statistics(
    means,
    squares,
    mean,  # float32 (G, C)
    rstd,
    running_mean,
    running_var,
    num_batches,
    channels,
    rows,
    splits,
    momentum,
    eps,
    FOLD: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    UPDATE: tl.constexpr,
    GROUPS: tl.constexpr,
    CHUNKS: tl.constexpr,
    CHUNK: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Joins what the programs of `_statistics` found, by Chan's formula, and brings running statistics forward."""
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    inside = channel < channels
    tiles = tl.cdiv(rows, TILE_ROWS)
    total = rows * (FOLD * 1.0)
    mean_of_groups = tl.zeros((CHANNELS,), tl.float32)
    variance_of_groups = tl.zeros((CHANNELS,), tl.float32)
    for group in range(GROUPS):
        joint = tl.zeros((CHANNELS,), tl.float32)
        square = tl.zeros((CHANNELS,), tl.float32)
        seen = 0.0
        for chunk in range(CHUNKS):
            partial = chunk * CHUNK + tl.arange(0, CHUNK)
            split = partial // FOLD
            # Tiles go round; the last may not be full.
            count = (tiles - split + splits - 1) // splits * TILE_ROWS
            count -= tl.where((tiles - 1) % splits == split, tiles * TILE_ROWS - rows, 0)
            count = tl.where(split < splits, count, 0).to(tl.float32)[:, None]
            source = (group * splits * FOLD + partial)[:, None] * channels + channel[None, :]
            mask = (split < splits)[:, None] & inside[None, :]
            their_mean = tl.load(means + source, mask=mask, other=0.0)
            their_square = tl.load(squares + source, mask=mask, other=0.0)
            new = tl.sum(count)
            new_mean = tl.sum(their_mean * count, 0) / new
            distance = their_mean - new_mean[None, :]
            new_square = tl.sum(their_square + count * distance * distance, 0)
            distance = new_mean - joint
            joint += distance * (new / (seen + new))
            square += new_square + distance * distance * (seen * new / (seen + new))
            seen += new
        variance = square / total
        tl.store(mean + group * channels + channel, joint, mask=inside)
        tl.store(rstd + group * channels + channel, 1.0 / tl.sqrt(variance + eps), mask=inside)
        mean_of_groups += joint / GROUPS
        variance_of_groups += square / (total - 1) / GROUPS
    if UPDATE:
        old = tl.load(running_mean + channel, mask=inside)
        tl.store(running_mean + channel, old + momentum * (mean_of_groups - old), mask=inside)
        old = tl.load(running_var + channel, mask=inside)
        tl.store(running_var + channel, old + momentum * (variance_of_groups - old), mask=inside)
        if num_batches is not None:
            if tl.program_id(0) == 0:
                tl.store(num_batches, tl.load(num_batches) + 1)


@triton.jit(do_not_specialize=["units", "rows"])
def _normalize(
    x,
    shortcut,
    out,
    mean,
    rstd,
    weight,
    bias,
    units,
    rows,
    channels,
    UNIT: tl.constexpr,
    RELU: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_WIDTH: tl.constexpr,
    STEPS: tl.constexpr,
):
    """relu((x - mean) * rstd * weight + bias + shortcut). Last rows first: those are still in the L2 cache."""
    width = units * UNIT
    block, place, group = _place(width, TILE_WIDTH)
    columns = block * TILE_WIDTH + tl.arange(0, TILE_WIDTH)
    inside = columns < width
    center, scale, shift = _load_channels(
        mean, rstd, weight, bias, group, columns % channels, channels, inside
    )
    first = group.to(tl.int64) * rows * width
    last = tl.num_programs(0) // tl.cdiv(width, TILE_WIDTH) - 1
    for step in range(STEPS):
        row = ((last - place) * STEPS + step) * TILE_ROWS + tl.arange(0, TILE_ROWS)
        value = _load(x + first, row, columns, rows, width).to(tl.float32)
        value = _affine(value - center, scale, shift)
        if shortcut is not None:
            value += _load(shortcut + first, row, columns, rows, width).to(tl.float32)
        if RELU:
            value = _relu(value)
        _store(out + first, value, row, columns, rows, width)


@triton.jit(do_not_specialize=["units", "rows", "splits"])
def _gradient_sums(
    grad,
    x,
    out,
    mean,
    rstd,
    weight,
    bias,
    dshortcut,
    sums,  # float32 (G, splits, width)
    products,
    units,
    rows,
    splits,
    channels,
    UNIT: tl.constexpr,
    COUNTS: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_WIDTH: tl.constexpr,
    STEPS: tl.constexpr,
):
    """Sums of dy and of dy * (x - mean), dy being that before the ReLU, over the tiles of `_statistics`.

    dy is the shortcut's gradient as well; `_gradients` then reads it in place of dy and output.
    """
    width = units * UNIT
    block, split, group = _place(width, TILE_WIDTH)
    columns = block * TILE_WIDTH + tl.arange(0, TILE_WIDTH)
    inside = columns < width
    center, scale, shift = _load_channels(
        mean, rstd, weight, bias, group, columns % channels, channels, inside
    )
    first = group.to(tl.int64) * rows * width
    total = tl.zeros((TILE_ROWS, TILE_WIDTH), tl.float32)
    product = tl.zeros((TILE_ROWS, TILE_WIDTH), tl.float32)
    if COUNTS == SAVED:  # three streams
        for step in range(STEPS):
            row = (step * splits + split) * TILE_ROWS + tl.arange(0, TILE_ROWS)
            dy = _load(grad + first, row, columns, rows, width)
            y = _load(out + first, row, columns, rows, width)
            distance = _load(x + first, row, columns, rows, width).to(tl.float32) - center
            dy = _counted(dy, distance, y, scale, shift, COUNTS)
            total += dy
            product += dy * distance
            if dshortcut is not None:
                _store(dshortcut + first, dy, row, columns, rows, width)
    else:  # two streams, so two tiles
        for step in range(0, STEPS, GRADIENTS_UNROLL):
            row_0 = (step * splits + split) * TILE_ROWS + tl.arange(0, TILE_ROWS)
            row_1 = row_0 + splits * TILE_ROWS
            dy_0 = _load(grad + first, row_0, columns, rows, width)
            x_0 = _load(x + first, row_0, columns, rows, width)
            dy_1 = _load(grad + first, row_1, columns, rows, width)
            x_1 = _load(x + first, row_1, columns, rows, width)
            distance = x_0.to(tl.float32) - center
            dy = _counted(dy_0, distance, dy_0, scale, shift, COUNTS)
            total += dy
            product += dy * distance
            distance = x_1.to(tl.float32) - center
            dy = _counted(dy_1, distance, dy_1, scale, shift, COUNTS)
            total += dy
            product += dy * distance
    target = (group * splits + split) * width + columns
    tl.store(sums + target, tl.sum(total, 0), mask=inside)
    tl.store(products + target, tl.sum(product, 0), mask=inside)


@triton.jit(do_not_specialize=["rows", "splits"])
def _join_gradients(
    sums,
    products,
    rstd,
    weight,
    slope,  # float32 (G, C)
    offset,
    dweight,
    dbias,
    channels,
    rows,
    splits,
    FOLD: tl.constexpr,
    GROUPS: tl.constexpr,
    CHUNKS: tl.constexpr,
    CHUNK: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """dweight, dbias, and slope and offset of dx = weight * rstd * dy + slope * (x - mean) + offset."""
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    inside = channel < channels
    count = rows * (FOLD * 1.0)
    gain = tl.load(weight + channel, mask=inside, other=0.0)
    dweight_value = tl.zeros((CHANNELS,), tl.float32)
    dbias_value = tl.zeros((CHANNELS,), tl.float32)
    for group in range(GROUPS):
        total = tl.zeros((CHANNELS,), tl.float32)
        product = tl.zeros((CHANNELS,), tl.float32)
        for chunk in range(CHUNKS):
            partial = chunk * CHUNK + tl.arange(0, CHUNK)
            source = (group * splits * FOLD + partial)[:, None] * channels + channel[None, :]
            mask = (partial < splits * FOLD)[:, None] & inside[None, :]
            total += tl.sum(tl.load(sums + source, mask=mask, other=0.0), 0)
            product += tl.sum(tl.load(products + source, mask=mask, other=0.0), 0)
        inverse = tl.load(rstd + group * channels + channel, mask=inside, other=0.0)
        product *= inverse  # sum of dy times normalized x
        dweight_value += product
        dbias_value += total
        scale = -gain * inverse / count
        tl.store(slope + group * channels + channel, scale * inverse * product, mask=inside)
        tl.store(offset + group * channels + channel, scale * total, mask=inside)
    tl.store(dweight + channel, dweight_value, mask=inside)
    tl.store(dbias + channel, dbias_value, mask=inside)


@triton.jit(do_not_specialize=["units", "rows"])
def _gradients(
    grad,
    x,
    out,
    mean,
    rstd,
    weight,
    bias,
    slope,
    offset,
    dx,
    units,
    rows,
    channels,
    UNIT: tl.constexpr,
    COUNTS: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_WIDTH: tl.constexpr,
    STEPS: tl.constexpr,
):
    """dx = weight * rstd * dy + slope * (x - mean) + offset. Last rows first, as in `_normalize`."""
    width = units * UNIT
    block, place, group = _place(width, TILE_WIDTH)
    columns = block * TILE_WIDTH + tl.arange(0, TILE_WIDTH)
    inside = columns < width
    channel = columns % channels
    center, scale, shift = _load_channels(mean, rstd, weight, bias, group, channel, channels, inside)
    rise = tl.load(slope + group * channels + channel, mask=inside, other=0.0)[None, :]
    start = tl.load(offset + group * channels + channel, mask=inside, other=0.0)[None, :]
    first = group.to(tl.int64) * rows * width
    last = tl.num_programs(0) // tl.cdiv(width, TILE_WIDTH) - 1
    for step in range(STEPS):
        row = ((last - place) * STEPS + step) * TILE_ROWS + tl.arange(0, TILE_ROWS)
        dy = _load(grad + first, row, columns, rows, width)
        y = dy
        if COUNTS == SAVED:
            y = _load(out + first, row, columns, rows, width)
        distance = _load(x + first, row, columns, rows, width).to(tl.float32) - center
        dy = _counted(dy, distance, y, scale, shift, COUNTS)
        _store(dx + first, dy * scale + (distance * rise + start), row, columns, rows, width)


@triton.jit
def _place(width, TILE_WIDTH: tl.constexpr):
    """(block of columns, block of rows, group): neighboring programs read neighboring columns."""
    num_blocks = tl.cdiv(width, TILE_WIDTH)
    program = tl.program_id(0)
    return program % num_blocks, program // num_blocks, tl.program_id(1)


@triton.jit
def _load_channels(mean, rstd, weight, bias, group, channel, channels, inside):
    """Mean, rstd * weight and bias of each column: (1, TILE_WIDTH) each."""
    center = tl.load(mean + group * channels + channel, mask=inside, other=0.0)
    scale = tl.load(rstd + group * channels + channel, mask=inside, other=0.0)
    scale *= tl.load(weight + channel, mask=inside, other=0.0)
    return center[None, :], scale[None, :], tl.load(bias + channel, mask=inside, other=0.0)[None, :]


@triton.jit
def _affine(distance, scale, shift):
    """The one formula by which forward and backward get what goes into the ReLU."""
    return distance * scale + shift


@triton.jit
def _counted(dy, distance, y, scale, shift, COUNTS: tl.constexpr):
    """float32 gradient before the ReLU: 0 where the ReLU gave 0."""
    dy = dy.to(tl.float32)
    if COUNTS == RECOMPUTED:
        dy = tl.where(_affine(distance, scale, shift) > 0, dy, 0.0)
    elif COUNTS == SAVED:
        dy = tl.where(y > 0, dy, 0.0)
    return dy


@triton.jit
def _relu(value):
    """NaN stays NaN, as in torch."""
    return tl.where(value < 0, 0.0, value)


@triton.jit
def _offsets(row, columns, width):
    return row.to(tl.int64)[:, None] * width + columns[None, :]


@triton.jit
def _load(start, row, columns, rows, width):
    mask = (row < rows)[:, None] & (columns < width)[None, :]
    return tl.load(start + _offsets(row, columns, width), mask=mask, other=0.0)


@triton.jit
def _store(start, value, row, columns, rows, width):
    mask = (row < rows)[:, None] & (columns < width)[None, :]
    tl.store(start + _offsets(row, columns, width), value.to(start.dtype.element_ty), mask=mask)
