"""Confidence intervals for the figures of a report."""

from collections.abc import Sequence

import numpy as np

NUM_RESAMPLES = 2_000


def bootstrap_interval(
    values: Sequence[float], groups: Sequence[object], seed: int = 0, level: float = 0.95
) -> tuple[float, float] | None:
    """Percentile bootstrap interval of the mean of `values`, seeded; None for no values.

    Choice: whole groups (videos) are resampled, not clips. Two seconds of one video show the same objects, so
    they are not independent and resampling clips would give intervals that are too narrow. Where every value
    is 0 (or every value 1) resampling would give an interval of no width; then it is the exact binomial one
    (Clopper-Pearson) for that many videos: no hit among 40 videos still allows 8.8 %.

    Args:
        values: one figure per clip.
        groups: for each value, what it belongs to (its video).
        seed: of the resampling.
        level: share of resampled means inside the interval.
    """
    if len(values) != len(groups):
        raise ValueError(f"{len(values)} values and {len(groups)} groups, expected one group per value")
    if len(values) == 0:
        return None
    names = {group: number for number, group in enumerate(dict.fromkeys(groups))}
    index = np.array([names[group] for group in groups])
    sums = np.bincount(index, weights=np.asarray(values, dtype=np.float64), minlength=len(names))
    counts = np.bincount(index, minlength=len(names)).astype(np.float64)
    if sums.sum() in (0.0, float(len(values))):
        room = 1 - ((1 - level) / 2) ** (1 / len(names))
        return (0.0, room) if sums.sum() == 0 else (1 - room, 1.0)
    rng = np.random.default_rng(seed)
    equal = np.full(len(names), 1 / len(names))
    draws = rng.multinomial(len(names), equal, size=NUM_RESAMPLES)  # (R, groups)
    means = (draws @ sums) / (draws @ counts)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
