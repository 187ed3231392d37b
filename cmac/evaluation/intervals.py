"""Confidence intervals for the figures of a report and of an evaluation.

Which one: `proportion_interval` for hits among independent trials (top-1 of videos), `bootstrap_interval` where
several values belong together or are no hits, `paired_difference_interval` for two methods on the same items,
`mean_interval` over folds, splits or seeds.
"""

import math
import statistics
from collections.abc import Hashable, Sequence

import numpy as np
from scipy.special import stdtrit

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
    sums, counts = _per_group(values, groups)
    if sums.sum() in (0.0, float(len(values))):
        room = _room(len(sums), level)
        return (0.0, room) if sums.sum() == 0 else (1 - room, 1.0)
    return _resampled_means(sums, counts, seed, level)


def paired_difference_interval(
    a: Sequence[float], b: Sequence[float], groups: Sequence[Hashable], seed: int = 0, level: float = 0.95
) -> tuple[float, float] | None:
    """Percentile bootstrap interval of mean(a) - mean(b) for two methods on the same items; None for no items.

    Much narrower than what two separate intervals suggest: both methods find the same items easy. An interval that
    holds 0 means that these items do not tell the methods apart.

    Choice: as in `bootstrap_interval` whole groups are resampled. Where the difference is the same in all groups
    (two methods that agree everywhere) resampling would give an interval of no width; then as many groups as the
    exact binomial interval allows to have gone unseen are taken to differ as far as they can: two methods that agree
    on 40 videos may still differ by 8.8 % either way.

    Args:
        a: score of the first method for each item, 0..1.
        b: of the second, for the same items in the same order.
        groups: for each item, what it belongs to; the item itself (its video) where all are independent.
        seed: of the resampling.
        level: share of resampled differences inside the interval.

    Raises:
        ValueError: if lengths differ, or a score is outside 0..1 or not finite.
    """
    if not len(a) == len(b) == len(groups):
        raise ValueError(f"{len(a)} and {len(b)} values and {len(groups)} groups, expected equally many")
    if len(a) == 0:
        return None
    scores = np.asarray([a, b], dtype=np.float64)  # (2, N)
    if not ((scores >= 0) & (scores <= 1)).all():
        raise ValueError("a score is NaN or outside 0..1, expected hits (0 or 1) or fractions")
    difference = scores[0] - scores[1]  # (N,)
    sums, counts = _per_group(difference, groups)
    first = float(sums[0] / counts[0])
    if (sums / counts == first).all():
        room = _room(len(sums), level)
        return first - room * (1 + first), first + room * (1 - first)
    return _resampled_means(sums, counts, seed, level)


def proportion_interval(hits: int, total: int, level: float = 0.95) -> tuple[float, float] | None:
    """Wilson score interval of hits / total for independent trials; None for no trials.

    Choice: Wilson and not hits / total +- z * standard error, which has no width at 0 and at `total` and reaches
    outside 0..1; and not Clopper-Pearson, which is wider than it says at the few hundred videos of a test list.
    Videos of UCF101 that were cut from one recording are not independent: `bootstrap_interval` with the recording
    as group is the more careful one there.
    """
    if not 0 <= hits <= total:
        raise ValueError(f"{hits} hits among {total}, expected 0 <= hits <= total")
    if total == 0:
        return None
    z = statistics.NormalDist().inv_cdf((1 + level) / 2)
    share, weight = hits / total, z * z / total
    middle = (share + weight / 2) / (1 + weight)
    half = math.sqrt(weight * (share * (1 - share) + weight / 4)) / (1 + weight)
    return max(0.0, middle - half), min(1.0, middle + half)


def mean_interval(values: Sequence[float], level: float = 0.95) -> tuple[float, float] | None:
    """Student's t interval of the mean of independent values (seeds); None for fewer than two, or for equal ones.

    Not clipped to 0..1. For splits or folds of one dataset it is a rule of thumb: their training sets overlap, so
    they vary less than independent repetitions would. With three values it is 2.2 times as wide as the same spread
    would give with many. Values that are all equal show no spread to judge by, and no interval is better than one
    of no width.

    Raises:
        ValueError: if a value is not finite.
    """
    array = np.asarray(values, dtype=np.float64)
    if not np.isfinite(array).all():
        raise ValueError(f"values are {list(values)}, expected finite numbers")
    if len(array) < 2 or (array == array[0]).all():
        return None
    half = stdtrit(len(array) - 1, (1 + level) / 2) * array.std(ddof=1) / math.sqrt(len(array))
    return float(array.mean() - half), float(array.mean() + half)


def _per_group(values: Sequence[float], groups: Sequence[object]) -> tuple[np.ndarray, np.ndarray]:
    """Sum and number of the values of each group: float64 (groups,) twice."""
    names = {group: number for number, group in enumerate(dict.fromkeys(groups))}
    index = np.array([names[group] for group in groups])
    sums = np.bincount(index, weights=np.asarray(values, dtype=np.float64), minlength=len(names))
    return sums, np.bincount(index, minlength=len(names)).astype(np.float64)


def _room(num_groups: int, level: float) -> float:
    """Largest share that may do what none of `num_groups` did, at this level (Clopper-Pearson)."""
    return 1 - ((1 - level) / 2) ** (1 / num_groups)


def _resampled_means(sums: np.ndarray, counts: np.ndarray, seed: int, level: float) -> tuple[float, float]:
    rng = np.random.default_rng(seed)
    equal = np.full(len(sums), 1 / len(sums))
    draws = rng.multinomial(len(sums), equal, size=NUM_RESAMPLES)  # (R, groups)
    means = (draws @ sums) / (draws @ counts)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
