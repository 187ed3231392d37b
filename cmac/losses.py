"""The losses of Eqs. (1), (2), (6), (7) and (8), written as the equations read."""

import functools
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from cmac.queue import EMPTY
from loaders.kernels.choice import Impl, choose_impl

MAX_FUSED_DIM = 256
"""Dimensions of an embedding that the kernel of Eq. (7) holds in registers."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """Which terms of Eq. (8) are trained, and how; the defaults are the paper's full model."""

    contrastive: bool = True
    """L_cl of Eq. (7). False is "CMAC w/o L_cl" of Table 1."""
    consistency_weight: float = 1.5
    """lambda of Eq. (8) (Fig. 4). 0 is "CMAC w/o L_ac" of Table 1."""
    consistency_reduction: Literal["sum", "mean"] = "sum"
    """Squared error of Eq. (6) summed or averaged over a clip's positions. Choice: the sum, as the equation is
    written; at full size that is 256 visual and 36 audio positions, so `mean` changes what lambda means."""
    positives: Literal["cross", "within", "both"] = "cross"
    """`cross`: the other modality of the same clip (the paper's). `within`: the same modality of another clip of the
    video ("Single Modality" of Table 1). `both`: AVID's, "w/i Pos" of Table 3. The last two need
    `loader.clips_per_video` 2."""
    within_negatives: bool = True
    """Past keys of the query's own modality among the negatives, the second sum of Eq. (7) ("w/i Neg" of Table 3).
    False gives the plain Eqs. (1)-(2)."""
    negatives: Literal["queue", "batch"] = "queue"
    """Where negatives come from. Choice: the queues alone ("negative samples from previous batch data"). `batch`:
    the other keys of the global batch, as Eq. (1) reads."""
    temperature: float = 0.07
    """tau of Eq. (1)."""

    def __post_init__(self) -> None:
        if self.temperature <= 0:
            raise ValueError(f"loss.temperature is {self.temperature}, expected more than 0")
        if self.consistency_weight < 0:
            raise ValueError(f"loss.consistency_weight is {self.consistency_weight}, expected at least 0")
        if not self.contrastive and self.consistency_weight == 0:
            raise ValueError(
                "loss.contrastive is False and loss.consistency_weight is 0: nothing is left to train"
            )
        if not self.contrastive and self.positives != "cross":
            raise ValueError(
                f"loss.positives is {self.positives!r} without loss.contrastive; leave it at 'cross' or train L_cl"
            )
        if self.positives == "within" and self.consistency_weight > 0:
            raise ValueError(
                "loss.positives 'within' trains each modality alone, so no filter of the other guides it; "
                "set loss.consistency_weight to 0"
            )


class Negatives(NamedTuple):
    """A bank of keys to tell the positive from."""

    keys: Tensor
    """(K, D), unit norm, float32 or bfloat16; no gradient reaches them."""
    video_ids: Tensor
    """(K,) int64. A key is no negative of a query with its id, and of no query if it is `cmac.queue.EMPTY`."""


class ContrastiveOutput(NamedTuple):
    """What `contrastive_loss` gives per clip."""

    loss: Tensor
    """(B,) float32."""
    correct: Tensor
    """(B,) bool: the positive has a higher similarity than all negatives."""


def noise_contrastive_loss(query: Tensor, key: Tensor, temperature: float) -> Tensor:
    """Eq. (1): -log sim(v_n, a_n) / sum_m sim(v_n, a_m), mean over the batch; sim = exp(cos / temperature).

    query, key: (N, D), any norm. Returns a float32 scalar. Eq. (2) is this for both directions.
    """
    with torch.autocast(query.device.type, enabled=False):
        query, key = F.normalize(query.float(), dim=1), F.normalize(key.float(), dim=1)
        similarity = query @ key.T / temperature  # (N, N)
        return F.cross_entropy(similarity, torch.arange(len(query), device=query.device))


def contrastive_loss(
    query: Tensor,
    key: Tensor,
    video_ids: Tensor,
    negatives: Sequence[Negatives],
    temperature: float,
    impl: Impl = "auto",
) -> ContrastiveOutput:
    """Eq. (7) per clip: -log(exp(q.k / t) / (exp(q.k / t) + sum of exp(q.n / t) over all negatives n)).

    Queries of both directions may be stacked if their banks are the same: then one pass over the banks serves both.
    Only `query` gets a gradient.

    Args:
        query: (B, D), unit norm, any float dtype: this modality's embeddings.
        key: (B, D), unit norm: the positives.
        video_ids: (B,) int64: the videos of the queries.
        negatives: one bank for Eq. (1)'s plain form, or two: past keys of the positive's modality and of the query's.
        temperature: tau.
        impl: see `choice.Impl`. The kernel takes at most 256 dimensions, banks that are all float32 or all bfloat16,
            and no float64 query; where that does not hold `auto` takes the reference.

    Returns:
        Losses in float32, or float64 for a float64 query, whatever the dtypes of keys and banks. The kernel rounds
        queries to the dtype of bfloat16 banks.

    Raises:
        ValueError: a shape, dtype, device, temperature or impl is not one of those above, or `fused` cannot run; the
            message says what is missing.
    """
    _check_contrastive(query, key, video_ids, negatives, temperature)
    why_not = _why_not_fused(query, negatives)
    if why_not and impl == "fused":
        raise ValueError(f"impl is 'fused', but {why_not}; or take impl 'auto' or 'reference'")
    if why_not and impl == "auto":
        _log_reference(why_not)
        impl = "reference"
    if choose_impl("contrastive loss", impl, query.device.type) == "fused" and len(query) > 0:
        from cmac.kernels.info_nce_triton import fused_info_nce

        return ContrastiveOutput(*fused_info_nce(query, key, video_ids, negatives, temperature))
    return contrastive_loss_reference(query, key, video_ids, negatives, temperature)


def contrastive_loss_reference(
    query: Tensor, key: Tensor, video_ids: Tensor, negatives: Sequence[Negatives], temperature: float
) -> ContrastiveOutput:
    """`contrastive_loss` as the equation reads, in plain torch; it stores the similarities (B, K) of each bank."""
    dtype = torch.promote_types(query.dtype, torch.float32)
    # Autocast would take the products with the queue in half precision, and the temperature multiplies the error.
    with torch.autocast(query.device.type, enabled=False):
        query, key = query.to(dtype), key.detach().to(dtype)
        logits = [(query * key).sum(dim=1, keepdim=True)]  # (B, 1)
        for bank in negatives:
            empty = bank.video_ids == EMPTY  # (K,)
            # An empty slot may hold anything: its weight is 0, and 0 * NaN would reach the gradient.
            keys = bank.keys.detach().to(dtype).masked_fill(empty[:, None], 0)  # (K, D)
            excluded = empty | (bank.video_ids == video_ids[:, None])  # (B, K)
            logits.append((query @ keys.T).masked_fill(excluded, float("-inf")))
        logits = torch.cat(logits, dim=1) / temperature  # (B, 1 + K + K')
        loss = torch.logsumexp(logits, dim=1) - logits[:, 0]
    return ContrastiveOutput(loss, logits[:, 1:].amax(dim=1) < logits[:, 0])


def _check_contrastive(
    query: Tensor, key: Tensor, video_ids: Tensor, negatives: Sequence[Negatives], temperature: float
) -> None:
    """Raises ValueError unless the arguments of contrastive_loss fit together. Reads no value on the device."""
    if temperature <= 0:
        raise ValueError(f"temperature is {temperature}, expected more than 0")
    if query.dim() != 2 or query.shape[1] == 0 or not query.is_floating_point():
        raise ValueError(f"query is {_text(query)}, expected floats (B, D)")
    if key.shape != query.shape or not key.is_floating_point():
        raise ValueError(f"key is {_text(key)}, expected floats {tuple(query.shape)} as query")
    if len(negatives) not in (1, 2):
        raise ValueError(f"negatives holds {len(negatives)} banks, expected 1 or 2")
    tensors = [("key", key), ("video_ids", video_ids)]
    ids = [("video_ids", video_ids, len(query))]
    for n, bank in enumerate(negatives):
        name = f"negatives[{n}]"
        if bank.keys.dim() != 2 or bank.keys.shape[1] != query.shape[1] or len(bank.keys) == 0:
            raise ValueError(
                f"{name}.keys is {_text(bank.keys)}, expected (K, {query.shape[1]}) with K at least 1"
            )
        tensors += [(f"{name}.keys", bank.keys), (f"{name}.video_ids", bank.video_ids)]
        ids.append((f"{name}.video_ids", bank.video_ids, len(bank.keys)))
    for name, tensor, length in ids:
        if tensor.shape != (length,) or tensor.dtype != torch.int64:
            raise ValueError(f"{name} is {_text(tensor)}, expected torch.int64 ({length},)")
    for name, tensor in tensors:
        if tensor.device != query.device:
            raise ValueError(f"{name} is on {tensor.device}, expected {query.device} as query")


def _text(tensor: Tensor) -> str:
    return f"{tensor.dtype} {tuple(tensor.shape)}"


def _why_not_fused(query: Tensor, negatives: Sequence[Negatives]) -> str | None:
    """What the kernel of contrastive_loss lacks for these arguments, and the way out; None if nothing."""
    if query.shape[1] > MAX_FUSED_DIM:
        return f"embeddings have {query.shape[1]} dimensions; expected model.embedding_dim at most {MAX_FUSED_DIM}"
    if query.dtype == torch.float64:
        return "query is torch.float64; expected at most float32"
    dtypes = {bank.keys.dtype for bank in negatives}
    if len(dtypes) > 1 or not dtypes <= {torch.float32, torch.bfloat16}:
        names = " and ".join(sorted(map(str, dtypes)))
        return f"banks of negatives are {names}; expected all torch.float32 or all torch.bfloat16"
    return None


@functools.cache
def _log_reference(why_not: str) -> None:
    log.warning("contrastive loss: %s; runs in plain torch, which is slower", why_not)


def attention_consistency_loss(guided: Tensor, predicted: Tensor, reduction: str = "sum") -> Tensor:
    """Eq. (6) per clip: ||s - s-hat||_2^2. guided, predicted: (N, ...). Returns (N,) float32.

    reduction: "sum" over a clip's positions as the equation has it, or "mean".
    """
    squared = (guided.float() - predicted.float()).square().flatten(1)
    return squared.sum(dim=1) if reduction == "sum" else squared.mean(dim=1)


def total_loss(contrastive: Tensor, consistency: Tensor, consistency_weight: float) -> Tensor:
    """Eq. (8): both directions of Eq. (7) plus lambda times both modalities of Eq. (6). Scalars."""
    return contrastive + consistency_weight * consistency
