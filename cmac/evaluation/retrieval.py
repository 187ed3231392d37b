"""Cross-modal retrieval: does a clip's picture find its own sound among many, and the other way round?"""

import torch
from torch import Tensor


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
    similarity = query.double() @ gallery.double().T  # (N, N)
    own = similarity.diagonal()[:, None]  # (N, 1)
    # Products of equal embeddings may differ in the last bit; 1e-12 is far below any float32 difference.
    return (similarity >= own - 1e-12).sum(dim=1)


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
