"""The losses of Eqs. (1), (2), (6), (7) and (8), written as the equations read."""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


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


class ContrastiveOutput(NamedTuple):
    """What `contrastive_loss` gives per clip."""

    loss: Tensor
    """(N,) float32."""
    correct: Tensor
    """(N,) bool: the positive has the highest similarity."""


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
    cross_keys: Tensor,
    within_keys: Tensor | None,
    temperature: float,
    *,
    cross_excluded: Tensor | None = None,
    within_excluded: Tensor | None = None,
) -> ContrastiveOutput:
    """Eq. (7), one direction, per clip: the positive against negatives of both modalities.

    Args:
        query: (N, D), unit norm: this modality's embedding.
        key: (N, D), unit norm, no gradient: the positive.
        cross_keys: (K, D), unit norm, no gradient: other clips' keys of the positive's modality.
        within_keys: (K', D) likewise of the query's modality, or None for Eq. (1)'s plain form.
        temperature: tau.
        cross_excluded: (N, K) bool, True where a key is no negative of a query (empty slot, same video).
        within_excluded: (N, K') bool likewise.
    """
    # Autocast would take the products with the queue in half precision, and the temperature multiplies the error.
    with torch.autocast(query.device.type, enabled=False):
        query, key = query.float(), key.float()
        logits = [(query * key).sum(dim=1, keepdim=True)]  # (N, 1)
        for keys, excluded in ((cross_keys, cross_excluded), (within_keys, within_excluded)):
            if keys is None:
                continue
            similarity = query @ keys.float().T  # (N, K)
            if excluded is not None:
                similarity = similarity.masked_fill(excluded, float("-inf"))
            logits.append(similarity)
        logits = torch.cat(logits, dim=1) / temperature  # (N, 1 + K + K')
        loss = torch.logsumexp(logits, dim=1) - logits[:, 0]
    return ContrastiveOutput(loss, logits[:, 1:].amax(dim=1) < logits[:, 0])


def attention_consistency_loss(guided: Tensor, predicted: Tensor, reduction: str = "sum") -> Tensor:
    """Eq. (6) per clip: ||s - s-hat||_2^2. guided, predicted: (N, ...). Returns (N,) float32.

    reduction: "sum" over a clip's positions as the equation has it, or "mean".
    """
    squared = (guided.float() - predicted.float()).square().flatten(1)
    return squared.sum(dim=1) if reduction == "sum" else squared.mean(dim=1)


def total_loss(contrastive: Tensor, consistency: Tensor, consistency_weight: float) -> Tensor:
    """Eq. (8): both directions of Eq. (7) plus lambda times both modalities of Eq. (6). Scalars."""
    return contrastive + consistency_weight * consistency
