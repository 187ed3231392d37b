"""Eq. (7) without a matrix of similarities, in Triton. Imports Triton: import it where it is needed.

The loss of a query is the logsumexp of a row of logits less the first of them, and its gradient is the softmax of that
row times the keys: attention whose keys and values are both the bank. So `_sweep` goes over the banks once with an
online softmax, as flash attention does, and what it accumulates already is the gradient; backward only scales it.
Only queries are trained, which makes this possible.

A program takes `rows` queries and a share of one bank, as a batch alone is too small to fill a GPU. What the programs
of a query found (maximum, sum, weighted keys) `_combine` puts together with its positive. So forward is two launches
and backward one, and the largest thing stored in between is (queries, shares, dimensions) in float32: at most
MAX_PARTIAL_BYTES, or one share of each bank per query where that is more (from 10,000 queries on).

What limits it:
- Registers: the weighted keys of `rows` queries lie there, 128 per thread at MAX_FUSED_DIM dimensions.
- From about a thousand queries on, tensor cores: 4 * queries * keys * dimensions FLOP in bfloat16, behind which the
  softmax between the two products hides in part only. Three times as many for float32 banks, as a product of float32
  tensors is three of float16 tensors: each number is the sum of two, of 22 bits together, which errs by about 1e-6 in
  a logit (in the interpreter). Triton's own `tf32x3` has twice the work in that and takes over 200 KiB of shared
  memory, `ieee` has no tensor cores, plain TF32 errs by 1e-3. Float16 ends at 65,504: this is for vectors of about
  unit norm.
- At the paper's 2 x 128 queries and 2 x 15,000 keys, reading the banks, partial results and launches weigh alike.

With a bfloat16 bank queries and softmax weights are rounded to bfloat16, too, and summed in float32. The positive's
logit is float32 throughout.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from cmac import queue

MAX_PARTIAL_BYTES = 20 * 2**20
LOG2_E = math.log2(math.e)

EMPTY = tl.constexpr(queue.EMPTY)
LN_2 = tl.constexpr(math.log(2))
# A maximum over nothing: finite, as the difference of two infinities is not a number.
NOTHING = tl.constexpr(-1e30)


class Tiling(NamedTuple):
    """How `_sweep` cuts its work."""

    rows: int
    """Queries of a program."""
    keys: int
    """Keys of one step of its loop."""
    num_warps: int
    num_stages: int


def fused_info_nce(
    query: Tensor,
    key: Tensor,
    video_ids: Tensor,
    negatives: Sequence[tuple[Tensor, Tensor]],
    temperature: float,
) -> tuple[Tensor, Tensor]:
    """`losses.contrastive_loss`, of which this has the arguments and the result; checks nothing."""
    keys, ids = zip(*((bank.detach(), ids) for bank, ids in negatives))
    return _InfoNCE.apply(query, key.detach(), video_ids, keys, ids, float(temperature))


class _InfoNCE(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        video_ids: Tensor,
        keys: tuple[Tensor, ...],
        ids: tuple[Tensor, ...],
        temperature: float,
    ) -> tuple[Tensor, Tensor]:
        loss, correct, gradient = _forward(query, key, video_ids, keys, ids, temperature)
        ctx.save_for_backward(gradient)
        ctx.dtype = query.dtype
        ctx.mark_non_differentiable(correct)
        return loss, correct

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, grad_correct: None) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        grad_query = torch.empty_like(gradient, dtype=ctx.dtype)
        torch.mul(gradient, grad_loss[:, None], out=grad_query)
        return grad_query, None, None, None, None, None


def _forward(
    query: Tensor,
    key: Tensor,
    video_ids: Tensor,
    keys: tuple[Tensor, ...],
    ids: tuple[Tensor, ...],
    temperature: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss (B,) float32, correct (B,) bool, gradient of the loss by the query (B, D) float32)."""
    query, key, video_ids = _readable(query.detach()), _readable(key), _readable(video_ids)
    keys, ids = [_readable(bank) for bank in keys], [_readable(bank) for bank in ids]
    (num_queries, dim), device = query.shape, query.device
    padded_dim = max(16, triton.next_power_of_2(dim))
    architecture, num_multiprocessors = _describe(device)
    tiling = choose_tiling(num_queries, keys[0].dtype, architecture)
    row_blocks = triton.cdiv(num_queries, tiling.rows)
    num_keys = [len(bank) for bank in keys]
    tiles = tuple(triton.cdiv(count, tiling.keys) for count in num_keys)
    # Registers of a multiprocessor are enough for eight warps.
    tiles_per_share = choose_share(
        tiles,
        row_blocks,
        num_programs=num_multiprocessors * (8 // tiling.num_warps),
        max_shares=MAX_PARTIAL_BYTES // (num_queries * dim * 4),
    )
    shares = [triton.cdiv(count, tiles_per_share) for count in tiles]

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    maxima, sums = empty(num_queries, sum(shares)), empty(num_queries, sum(shares))
    weighted = empty(num_queries, sum(shares), dim)
    loss, correct = empty(num_queries), empty(num_queries, dtype=torch.bool)
    gradient = empty(num_queries, dim)
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        _sweep[(row_blocks, sum(shares))](
            query,
            video_ids,
            keys[0],
            ids[0],
            keys[-1],
            ids[-1],
            maxima,
            sums,
            weighted,
            num_queries,
            num_keys[0],
            num_keys[-1],
            shares[0],
            sum(shares),
            LOG2_E / temperature,
            DIM=dim,
            PADDED_DIM=padded_dim,
            ROWS=tiling.rows,
            KEYS=tiling.keys,
            SPLIT=keys[0].dtype == torch.float32,
            INTERPRETED=triton.knobs.runtime.interpret,
            TILES=tiles_per_share,
            num_warps=tiling.num_warps,
            num_stages=tiling.num_stages,
        )
        columns = min(padded_dim, 64)
        _combine[(num_queries, padded_dim // columns)](
            query,
            key,
            maxima,
            sums,
            weighted,
            loss,
            correct,
            gradient,
            sum(shares),
            LOG2_E / temperature,
            1 / temperature,
            DIM=dim,
            PADDED_DIM=padded_dim,
            COLUMNS=columns,
            SHARES=max(16, triton.next_power_of_2(sum(shares))),
            num_warps=4,
        )
    return loss, correct, gradient


def _readable(tensor: Tensor) -> Tensor:
    """The tensor, or a copy of it that is contiguous from a multiple of 16 bytes on."""
    tensor = tensor.contiguous()
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()


def choose_tiling(num_queries: int, dtype: torch.dtype, architecture: int) -> Tiling:
    """A tiling of `_sweep` that fits at 256 dimensions; dtype is that of the banks.

    Looked up, not searched for: next to no spilled registers as Triton 3.6 compiles it, see the tests. sm_90 has 227
    KiB of shared memory for a program and products that read it (from 64 rows on); all else gets what fits in 99 KiB.
    """
    rows = max(16, triton.next_power_of_2(num_queries))
    hopper = 90 <= architecture < 120
    if dtype == torch.float32:
        if hopper and rows >= 128:
            return Tiling(128, 32, num_warps=8, num_stages=2)
        if hopper and rows == 64:
            return Tiling(64, 32, num_warps=4, num_stages=3)
        return Tiling(16, 32, 4, 3) if rows == 16 else Tiling(32, 32, num_warps=8, num_stages=3)
    if hopper and rows >= 128:
        return Tiling(128, 64, num_warps=8, num_stages=3)
    if hopper:
        return Tiling(rows, 64, num_warps=4, num_stages=3)
    if rows >= 64:
        return Tiling(64, 64, num_warps=8, num_stages=3)
    return Tiling(rows, 32, num_warps=4, num_stages=3)


@functools.lru_cache(maxsize=64)
def choose_share(tiles: tuple[int, ...], row_blocks: int, num_programs: int, max_shares: int) -> int:
    """How many tiles of a bank a program takes, so that the last one ends early.

    Args:
        tiles: of each bank.
        row_blocks: programs that take the same share, of other queries.
        num_programs: how many run at a time.
        max_shares: of all banks together, for which there is memory.
    """
    best, best_time = max(tiles), math.inf
    for shares in range(1, min(sum(tiles), max(max_shares, len(tiles)), 4 * num_programs) + 1):
        each = min(triton.cdiv(sum(tiles), shares), max(tiles))
        count = sum(triton.cdiv(bank, each) for bank in tiles)
        if count > max(max_shares, len(tiles)):
            continue
        # Starting and ending a program takes about the time of two tiles.
        time = triton.cdiv(row_blocks * count, num_programs) * (each + 2)
        if time < best_time:
            best, best_time = each, time
    return best


@functools.cache
def _describe(device: torch.device) -> tuple[int, int]:
    """(architecture as 80, 86, 90; number of multiprocessors), made up where there is no GPU."""
    if device.type != "cuda":
        return 86, 2
    properties = torch.cuda.get_device_properties(device)
    return 10 * properties.major + properties.minor, properties.multi_processor_count


@triton.jit(do_not_specialize=["num_queries", "num_keys_0", "num_keys_1", "num_shares_0", "num_shares"])
def _sweep(
    query,  # (B, D)
    video_ids,  # int64 (B,)
    keys_0,  # (K, D), float32 or bfloat16
    ids_0,  # int64 (K,)
    keys_1,  # (K', D), the dtype of keys_0
    ids_1,  # int64 (K',)
    maxima,  # float32 (B, shares): of base-2 logits
    sums,  # float32 (B, shares): of 2 ** (logit - maximum)
    weighted,  # float32 (B, shares, D): keys, so weighted
    num_queries,
    num_keys_0,
    num_keys_1,
    num_shares_0,
    num_shares,
    scale,  # log2(e) / temperature
    DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    SPLIT: tl.constexpr,  # products of float32 tensors as three of float16
    INTERPRETED: tl.constexpr,
    TILES: tl.constexpr,  # of a share; the interpreter knows no loops but of constant length
):
    share = tl.program_id(1)
    keys = keys_0
    ids = ids_0
    num_keys = num_keys_0
    first = share * (TILES * KEYS)
    if share >= num_shares_0:
        keys = keys_1
        ids = ids_1
        num_keys = num_keys_1
        first = (share - num_shares_0) * (TILES * KEYS)

    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, PADDED_DIM)
    slot = tl.arange(0, KEYS)
    inside = (row < num_queries)[:, None] & (column < DIM)[None, :]
    # A batch or a bank may hold more than 2^31 numbers, a tile of it does not.
    at = row.to(tl.int64)[:, None] * DIM + column[None, :]
    own = tl.load(video_ids + row, mask=row < num_queries, other=EMPTY)
    # Logits to base 2, as that is the exponential the GPU has. Queries go by way of memory (the place of this program's
    # result), as tensor cores of sm_90 read only what was loaded from shared memory; what was computed they take from
    # registers, and there are none left.
    out = row.to(tl.int64) * num_shares + share
    half: tl.constexpr = tl.float16 if SPLIT else tl.bfloat16
    scratch = (weighted + out[:, None] * DIM).to(tl.pointer_type(half)) + column[None, :]
    q = tl.load(query + at, mask=inside, other=0.0).to(tl.float32) * scale
    tl.store(scratch, _split(q, SPLIT, INTERPRETED)[0], mask=inside)
    if SPLIT:  # read again, as both parts at once are more than registers hold
        q = tl.load(query + at, mask=inside, other=0.0).to(tl.float32) * scale
        tl.store(scratch + DIM, _split(q, SPLIT, INTERPRETED)[1], mask=inside)
    tl.debug_barrier()
    q_high = tl.load(scratch, mask=inside, other=0.0)  # (ROWS, PADDED_DIM)
    q_low = q_high
    if SPLIT:
        q_low = tl.load(scratch + DIM, mask=inside, other=0.0)

    maximum = tl.full((ROWS,), NOTHING, tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    sum_of_keys = tl.zeros((ROWS, PADDED_DIM), tl.float32)
    for tile in range(0, TILES):
        start = first + tile * KEYS
        key_id = tl.load(ids + start + slot, mask=start + slot < num_keys, other=EMPTY)
        filled = key_id != EMPTY
        # What an empty slot holds is not read: it may be no number.
        t = tl.load(
            keys + start.to(tl.int64) * DIM + (slot[:, None] * DIM + column[None, :]),
            mask=filled[:, None] & (column < DIM)[None, :],
            other=0.0,
        )  # (KEYS, PADDED_DIM)
        t_high, t_low = _split(t, SPLIT, INTERPRETED)
        logits = tl.zeros((ROWS, KEYS), tl.float32)
        logits = _dot(q_high, q_low, tl.trans(t_high), tl.trans(t_low), logits, SPLIT, INTERPRETED)
        counts = (key_id[None, :] != own[:, None]) & filled[None, :]
        logits = tl.where(counts, logits, float("-inf"))
        new_maximum = tl.maximum(maximum, tl.max(logits, 1))
        shrink = tl.exp2(maximum - new_maximum)
        weight = tl.exp2(logits - new_maximum[:, None])
        total = total * shrink + tl.sum(weight, 1)
        sum_of_keys = sum_of_keys * shrink[:, None]
        w_high, w_low = _split(weight, SPLIT, INTERPRETED)
        sum_of_keys = _dot(w_high, w_low, t_high, t_low, sum_of_keys, SPLIT, INTERPRETED)
        maximum = new_maximum

    tl.store(maxima + out, maximum, mask=row < num_queries)
    tl.store(sums + out, total, mask=row < num_queries)
    tl.store(weighted + (out[:, None] * DIM + column[None, :]), sum_of_keys, mask=inside)


@triton.jit
def _split(x, SPLIT: tl.constexpr, INTERPRETED: tl.constexpr):
    """x in bfloat16, twice; with SPLIT two float16 tensors whose sum is x."""
    if SPLIT:
        high = x.to(tl.float16)
        low = (x - high.to(tl.float32)).to(tl.float16)
    else:
        if INTERPRETED:  # which cuts off where a GPU rounds
            if x.dtype == tl.float32:
                bits = x.to(tl.int32, bitcast=True)
                x = (bits + 0x7FFF + ((bits >> 16) & 1)).to(tl.float32, bitcast=True)
        high = x.to(tl.bfloat16)
        low = high
    return high, low


@triton.jit
def _dot(a_high, a_low, b_high, b_low, total, SPLIT: tl.constexpr, INTERPRETED: tl.constexpr):
    """total + a @ b in float32; with SPLIT of sums, where the product of the low parts is too small to matter."""
    if INTERPRETED:  # the interpreter would multiply the bits of bfloat16
        a_high, b_high = a_high.to(tl.float32), b_high.to(tl.float32)
        a_low, b_low = a_low.to(tl.float32), b_low.to(tl.float32)
    if SPLIT:
        total = tl.dot(a_low, b_high, total)
        total = tl.dot(a_high, b_low, total)
    return tl.dot(a_high, b_high, total)


@triton.jit(do_not_specialize=["num_shares"])
def _combine(
    query,  # (B, D)
    key,  # (B, D)
    maxima,  # as of _sweep
    sums,
    weighted,
    loss,  # float32 (B,)
    correct,  # bool (B,)
    gradient,  # float32 (B, D)
    num_shares,
    scale,  # log2(e) / temperature
    inverse_temperature,
    DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    COLUMNS: tl.constexpr,  # of the gradient, per program
    SHARES: tl.constexpr,  # at least num_shares, a power of 2
):
    row = tl.program_id(0).to(tl.int64)
    every = tl.arange(0, PADDED_DIM)
    q = tl.load(query + row * DIM + every, mask=every < DIM, other=0.0).to(tl.float32)
    k = tl.load(key + row * DIM + every, mask=every < DIM, other=0.0).to(tl.float32)
    positive = tl.sum(q * k, 0) * scale

    share = tl.arange(0, SHARES)
    there = share < num_shares
    share_maximum = tl.load(maxima + row * num_shares + share, mask=there, other=NOTHING)
    share_sum = tl.load(sums + row * num_shares + share, mask=there, other=0.0)
    hardest = tl.max(share_maximum, 0)
    maximum = tl.maximum(positive, hardest)
    own_weight = tl.exp2(positive - maximum)
    total = own_weight + tl.sum(share_sum * tl.exp2(share_maximum - maximum), 0)

    BLOCK: tl.constexpr = 16
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    sum_of_keys = tl.zeros((COLUMNS,), tl.float32)
    for first in range(0, SHARES, BLOCK):
        part = first + tl.arange(0, BLOCK)
        out = row * num_shares + part
        weight = tl.exp2(tl.load(maxima + out, mask=part < num_shares, other=NOTHING) - maximum)
        block = tl.load(
            weighted + (out[:, None] * DIM + column[None, :]),
            mask=(part < num_shares)[:, None] & (column < DIM)[None, :],
            other=0.0,
        )  # (BLOCK, COLUMNS)
        sum_of_keys += tl.sum(weight[:, None] * block, 0)
    k = tl.load(key + row * DIM + column, mask=column < DIM, other=0.0).to(tl.float32)
    slope = (sum_of_keys + own_weight * k) / total - k
    tl.store(gradient + row * DIM + column, slope * inverse_temperature, mask=column < DIM)
    if tl.program_id(1) == 0:
        tl.store(loss + row, (maximum - positive + tl.log2(total)) * LN_2)
        tl.store(correct + row, hardest < positive)
