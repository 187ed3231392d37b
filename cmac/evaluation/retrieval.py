"""Retrieval among many. Cross-modal: does a clip's picture find its own sound, and the other way round? By class:
does a video find one of its own class (paper section 4.2, Table 5)?"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cmac.evaluation.intervals import bootstrap_interval
from cmac.evaluation.results import Metric

if TYPE_CHECKING:
    from cmac.weights import Encoders
    from loaders.batch import ClipBatch

CLASS_KS = (1, 5, 10, 20, 50)
"""Table 5 has 1, 5 and 10; others who use its protocol add 20 and 50."""
CROSS_MODAL_KS = (1, 5, 10)
QUERIES_AT_ONCE = 512
"""Queries compared with the whole gallery in one product; bounds memory, not the result."""
FEATURES_VERSION = 1
"""Raised when the same clips and weights give other features than before: those stored are then made anew."""


def retrieval_ranks(query: Tensor, gallery: Tensor) -> Tensor:
    """Rank of each query's own gallery entry, 1 is best.

    Args:
        query: (N, D), any floating dtype; row n belongs to gallery row n. Rows are compared by inner product,
            so unit norm makes it the cosine of Eq. (7).
        gallery: (N, D).

    Returns:
        int64 (N,), values 1..N. Choice: ties count against the query (every other entry that scores as high
        as the right one is put before it): a network that gives all clips one embedding gets rank N, not 1.

    Raises:
        ValueError: if the shapes differ, or a value is not finite.
    """
    if query.ndim != 2 or query.shape != gallery.shape:
        raise ValueError(
            f"query is {tuple(query.shape)} and gallery {tuple(gallery.shape)}, "
            "expected the same (N, D) for both"
        )
    if not (torch.isfinite(query).all() and torch.isfinite(gallery).all()):
        raise ValueError("an embedding holds NaN or infinity, expected finite values; did training diverge?")
    query, gallery = query.double(), gallery.double()
    ranks = []
    for start in range(0, len(query), QUERIES_AT_ONCE):
        similarity = query[start : start + QUERIES_AT_ONCE] @ gallery.T  # (q, N)
        own = similarity.diagonal(start)[:, None]  # (q, 1)
        # Products of equal embeddings may differ in the last bit; 1e-12 is far below any float32 difference.
        ranks.append((similarity >= own - 1e-12).sum(dim=1))
    return torch.cat(ranks) if ranks else torch.zeros(0, dtype=torch.int64)


def retrieval_recall(query: Tensor, gallery: Tensor, k: int) -> float:
    """Recall at k: share of queries whose own entry is among the k best of the gallery.

    query, gallery: (N, D), row n of both is one clip. Ties count against the query (see `retrieval_ranks`).
    Chance is k / N. Raises ValueError for k < 1 and for no clips.
    """
    if k < 1:
        raise ValueError(f"k is {k}, expected at least 1")
    if len(query) == 0:
        raise ValueError("no clips to retrieve from, expected at least one")
    return (retrieval_ranks(query, gallery) <= k).double().mean().item()


def class_ranks(
    query: Tensor, query_labels: Sequence[Hashable], gallery: Tensor, gallery_labels: Sequence[Hashable]
) -> Tensor:
    """Rank of the best gallery entry of each query's own class, 1 is best.

    Args:
        query: (Q, D), any floating dtype, any norm: rows are compared by cosine.
        query_labels: class of each query, a name or a number.
        gallery: (G, D). In Table 5 queries are test videos and the gallery the training videos of split 1.
        gallery_labels: class of each gallery entry.

    Returns:
        int64 (Q,), values 1..G; G + 1 for a query whose class has no gallery entry: it can be found at no k.
        Choice: ties count against the query, as in `retrieval_ranks`: entries of other classes that score as high
        are put before it.

    Raises:
        ValueError: if shapes or numbers of labels differ, or a row has no direction (zeros, NaN or infinity).
    """
    if query.ndim != 2 or gallery.ndim != 2 or query.shape[1] != gallery.shape[1]:
        raise ValueError(
            f"query is {tuple(query.shape)} and gallery {tuple(gallery.shape)}, expected (Q, D) and (G, D)"
        )
    for name, rows, labels in (("query", query, query_labels), ("gallery", gallery, gallery_labels)):
        if len(rows) != len(labels):
            raise ValueError(
                f"{len(rows)} rows of {name} and {len(labels)} labels, expected one label per row"
            )
        if len(rows) == 0:
            raise ValueError(f"{name} is empty, expected at least one video")
    query, gallery = unit_rows(query, "query"), unit_rows(gallery, "gallery")
    numbers: dict[Hashable, int] = {}
    own = torch.tensor([numbers.setdefault(label, len(numbers)) for label in query_labels])
    other = torch.tensor([numbers.setdefault(label, len(numbers)) for label in gallery_labels])
    ranks = []
    for start in range(0, len(query), QUERIES_AT_ONCE):
        rows = slice(start, start + QUERIES_AT_ONCE)
        similarity = query[rows] @ gallery.T  # (q, G)
        same = own[rows, None].to(similarity.device) == other[None].to(similarity.device)  # (q, G)
        best = similarity.masked_fill(~same, -torch.inf).amax(dim=1, keepdim=True)  # (q, 1)
        # Products of equal rows may differ in the last bits, see retrieval_ranks.
        before = (similarity >= best - 1e-12) & ~same
        ranks.append(torch.where(same.any(dim=1), before.sum(dim=1) + 1, len(gallery) + 1))
    return torch.cat(ranks).cpu()


def class_recall(
    query: Tensor,
    query_labels: Sequence[Hashable],
    gallery: Tensor,
    gallery_labels: Sequence[Hashable],
    ks: Sequence[int],
) -> dict[int, float]:
    """Recall at each k of Table 5: share of queries with an entry of their class among the k nearest by cosine.

    Arguments, ties and what is raised as in `class_ranks`. Returns {k: 0..1}; ValueError for k < 1. A query whose
    class has no gallery entry counts as not found.
    """
    _check_ks(ks)
    ranks = class_ranks(query, query_labels, gallery, gallery_labels)
    # A query without an entry has rank G + 1, which a larger k does not find either.
    return {k: (ranks <= min(k, len(gallery))).double().mean().item() for k in ks}


def class_recall_chance(
    query_labels: Sequence[Hashable], gallery_labels: Sequence[Hashable], ks: Sequence[int]
) -> dict[int, float]:
    """What `class_recall` is on average when the gallery is in random order: {k: 0..1}.

    For a class with g of the G entries, 1 - C(G - g, k) / C(G, k).
    """
    counts = Counter(gallery_labels)
    total = len(gallery_labels)
    chance = {}
    for k in ks:
        drawn = min(k, total)
        missed = {
            label: math.comb(total - counts[label], drawn) / math.comb(total, drawn)
            for label in set(query_labels)
        }
        chance[k] = 1 - sum(missed[label] for label in query_labels) / len(query_labels)
    return chance


def unit_rows(rows: Tensor, name: str) -> Tensor:
    """Rows divided by their norm, float64. Means of several embeddings have another than 1.

    Raises:
        ValueError: a row has no direction (zeros, NaN or infinity); `name` says of what.
    """
    rows = rows.double()
    norms = rows.norm(dim=1, keepdim=True)
    if not torch.isfinite(norms).all():
        raise ValueError(f"{name} holds NaN or infinity, expected finite features; did training diverge?")
    if (norms == 0).any():
        raise ValueError(
            f"row {int((norms == 0).flatten().nonzero()[0])} of {name} is all zeros and has no cosine; "
            "is that layer dead?"
        )
    return rows / norms


def class_recall_metrics(
    query: Tensor,
    groups: Sequence[Hashable],
    query_labels: Sequence[Hashable],
    gallery: Tensor,
    gallery_labels: Sequence[Hashable],
    ks: Sequence[int] = CLASS_KS,
    seed: int = 0,
) -> dict[str, Metric]:
    """`R@k` of Table 5 for each k, with its interval and what a gallery in random order gives.

    Args:
        query: (Q, D), one row per test video; see `class_ranks`.
        groups: Q, what each query was cut from: what is resampled for the interval.
        query_labels: Q classes.
        gallery: (G, D), one row per training video. A k above G finds all there is, as its chance shows.
        gallery_labels: G classes.
        ks: numbers of nearest videos.
        seed: of the interval.

    Raises:
        ValueError: see `class_ranks`; k < 1.
    """
    _check_ks(ks)
    ranks = class_ranks(query, query_labels, gallery, gallery_labels)
    chance = class_recall_chance(query_labels, gallery_labels, ks)
    return {f"R@{k}": _recall_metric(ranks, min(k, len(gallery)), groups, chance[k], seed) for k in ks}


def cross_modal_metrics(
    embedding_v: Tensor,
    embedding_a: Tensor,
    groups: Sequence[Hashable],
    ks: Sequence[int] = CROSS_MODAL_KS,
    seed: int = 0,
) -> dict[str, Metric]:
    """`R@k v2a` (a picture finds its sound among N) and `R@k a2v` (a sound its picture), chance k / N.

    Args:
        embedding_v: (N, D), unit norm; row n belongs to row n of embedding_a.
        embedding_a: (N, D).
        groups: N, the video of each row, or what that was cut from: what is resampled for the intervals.
        ks: numbers of nearest rows.
        seed: of the intervals.

    Raises:
        ValueError: see `retrieval_ranks`; no rows; k < 1.
    """
    _check_ks(ks)
    if len(embedding_v) == 0:
        raise ValueError("no clips to retrieve from, expected at least one")
    metrics = {}
    for name, query, gallery in (("v2a", embedding_v, embedding_a), ("a2v", embedding_a, embedding_v)):
        ranks = retrieval_ranks(query, gallery)
        for k in ks:
            chance = min(1.0, k / len(gallery))
            metrics[f"R@{k} {name}"] = _recall_metric(ranks, k, groups, chance, seed)
    return metrics


def pooled_video_features(
    networks: Mapping[str, Encoders], device: torch.device | str
) -> Callable[[ClipBatch], dict[str, Tensor]]:
    """What gives the features of section 4.2, "pooled features after the last residual block", of a batch of clips.

    Args:
        networks: name -> encoders; each batch goes through all of them.
        device: where they compute.

    Returns:
        batch -> name -> float32 (N, C): v of section 3.1 averaged over time and place.

    Raises:
        ValueError: one of them has no video encoder.
    """
    for encoders in networks.values():
        encoders.require_video()

    def encode(batch: ClipBatch) -> dict[str, Tensor]:
        frames = batch.frames.to(device, non_blocking=True)
        return {name: net.video_features(frames).mean(dim=(2, 3, 4)) for name, net in networks.items()}

    return encode


def cross_modal_embeddings(
    networks: Mapping[str, Encoders], device: torch.device | str
) -> Callable[[ClipBatch], dict[str, Tensor]]:
    """What gives the embeddings that Eq. (7) compares, of both modalities of a batch of clips.

    Args:
        networks: name -> encoders of a whole model; each batch goes through all of them.
        device: where they compute.

    Returns:
        batch -> `NAME_v` and `NAME_a` -> float32 (N, D) of unit norm.

    Raises:
        ValueError: one of them is not of a whole CMAC model.
    """
    models = {name: encoders.require_model() for name, encoders in networks.items()}

    def encode(batch: ClipBatch) -> dict[str, Tensor]:
        frames = batch.frames.to(device, non_blocking=True)
        log_mel = batch.log_mel.to(device, non_blocking=True)
        embeddings = {}
        for name, model in models.items():
            encoded = model.encode(frames, log_mel)
            embeddings[f"{name}_v"], embeddings[f"{name}_a"] = encoded.embedding_v, encoded.embedding_a
        return embeddings

    return encode


def _check_ks(ks: Sequence[int]) -> None:
    for k in ks:
        if k < 1:
            raise ValueError(f"k is {k}, expected at least 1")


def _recall_metric(ranks: Tensor, k: int, groups: Sequence[Hashable], chance: float, seed: int) -> Metric:
    hits = (ranks <= k).double().tolist()
    return Metric(value=sum(hits) / len(hits), interval=bootstrap_interval(hits, groups, seed), chance=chance)
