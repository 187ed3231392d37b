"""Accuracy of videos and sound files from the scores of their clips (paper section 4.2), over classes and splits.

predictions = average_clips(scores, video_ids, labels)      # logits of 10 clips per video -> one prediction each
metrics = {"top1": accuracy_metric(predictions, k=1), "top5": accuracy_metric(predictions, k=5)}
metrics = mean_over_splits([metrics_1, metrics_2, metrics_3])
"""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from cmac.evaluation.intervals import bootstrap_interval, mean_interval, proportion_interval
from cmac.evaluation.results import Metric

ClipAverage = Literal["softmax", "raw"]


@dataclass(frozen=True, kw_only=True)
class VideoPredictions:
    """One row of scores per video."""

    video_ids: tuple[str, ...]
    """In the order in which they first came up among the clips."""
    scores: np.ndarray
    """float64 (V, classes): mean over the video's clips."""
    labels: np.ndarray
    """int64 (V,): class index."""
    num_clips: np.ndarray
    """int64 (V,): clips that were averaged, at least 1."""

    @property
    def predicted(self) -> np.ndarray:
        """int64 (V,): class with the highest score; of equal ones the first."""
        return self.scores.argmax(axis=1)

    def correct(self, k: int = 1) -> np.ndarray:
        """bool (V,): whether the right class is among the k best.

        Choice: of classes with equal scores the one with the lower index comes first, so that `correct(1)` says what
        `predicted` says, and a network that scores all classes alike gets what naming one class would get. Raises
        ValueError unless 1 <= k <= classes.
        """
        num_classes = self.scores.shape[1]
        if not 1 <= k <= num_classes:
            raise ValueError(f"k is {k}, expected 1 to {num_classes}, the number of classes")
        own = self.scores[np.arange(len(self.labels)), self.labels][:, None]  # (V, 1)
        earlier = np.arange(num_classes) < self.labels[:, None]  # (V, classes)
        before = (self.scores > own) | ((self.scores == own) & earlier)
        return before.sum(axis=1) < k

    def accuracy(self, k: int = 1) -> float:
        """Share of videos whose right class is among the k best."""
        return float(self.correct(k).mean())


def average_clips(
    scores: np.ndarray, video_ids: Sequence[str], labels: Sequence[int], how: ClipAverage = "softmax"
) -> VideoPredictions:
    """Predictions of videos from those of their clips (and crops, which are rows like any other).

    Args:
        scores: (N, classes), one row per clip, in any order.
        video_ids: N.
        labels: N class indices, 0..classes-1.
        how: `softmax`: mean of the clips' softmax (section 4.2); scores are logits. `raw`: mean of the scores as
            they are: GDT's variant for logits, and the one for scores that are probabilities or distances already.

    Raises:
        ValueError: no clips, unequal lengths, NaN or infinity, a label out of range, a video with two labels.
    """
    scores = np.asarray(scores, dtype=np.float64)
    labels = np.asarray(labels)
    if how not in get_args(ClipAverage):
        raise ValueError(f"how is {how!r}, expected one of {', '.join(get_args(ClipAverage))}")
    if scores.ndim != 2 or not len(scores) == len(video_ids) == len(labels):
        raise ValueError(
            f"scores are {scores.shape} with {len(video_ids)} video ids and {len(labels)} labels, "
            "expected (N, classes), N and N"
        )
    if len(scores) == 0:
        raise ValueError("no clips to average, expected at least one; were all videos skipped?")
    bad = ~np.isfinite(scores).all(axis=1)
    if bad.any():
        raise ValueError(
            f"scores of {bad.sum()} of {len(bad)} clips hold NaN or infinity, first of "
            f"{video_ids[int(bad.argmax())]}; did training diverge?"
        )
    if not np.issubdtype(labels.dtype, np.integer) or labels.min() < 0 or labels.max() >= scores.shape[1]:
        raise ValueError(
            f"labels are not whole numbers of 0 to {scores.shape[1] - 1}, one per column of scores"
        )
    if how == "softmax":
        scores = np.exp(scores - scores.max(axis=1, keepdims=True))
        scores /= scores.sum(axis=1, keepdims=True)
    rows = {video_id: row for row, video_id in enumerate(dict.fromkeys(video_ids))}
    row_of = np.array([rows[video_id] for video_id in video_ids])  # (N,)
    num_clips = np.bincount(row_of, minlength=len(rows))  # (V,)
    sums = np.zeros((len(rows), scores.shape[1]))
    np.add.at(sums, row_of, scores)
    video_labels = np.zeros(len(rows), dtype=np.int64)
    video_labels[row_of] = labels
    unequal = video_labels[row_of] != labels
    if unequal.any():
        first = int(unequal.argmax())
        raise ValueError(
            f"{video_ids[first]} has the labels {labels[first]} and {video_labels[row_of[first]]}, expected one"
        )
    return VideoPredictions(
        video_ids=tuple(rows), scores=sums / num_clips[:, None], labels=video_labels, num_clips=num_clips
    )


def accuracy_metric(
    predictions: VideoPredictions, k: int = 1, groups: Sequence[Hashable] | None = None
) -> Metric:
    """Top-k accuracy with its interval and chance (k / classes).

    Args:
        predictions: of the test videos.
        k: 1 for top-1.
        groups: for each video, what it was cut from. None: videos are taken as independent and the interval is
            Wilson's. With groups it is the bootstrap over groups, which is wider where videos of a group are alike.
    """
    correct = predictions.correct(k)
    if groups is None:
        interval = proportion_interval(int(correct.sum()), len(correct))
    else:
        interval = bootstrap_interval(correct.astype(float).tolist(), groups)
    return Metric(value=float(correct.mean()), interval=interval, chance=k / predictions.scores.shape[1])


def confusion_counts(labels: Sequence[int], predicted: Sequence[int], num_classes: int) -> np.ndarray:
    """Number of videos by class and prediction: int64 (num_classes, num_classes), a row per right class.

    Raises ValueError for unequal lengths and for a class out of range.
    """
    labels, predicted = np.asarray(labels, dtype=np.int64), np.asarray(predicted, dtype=np.int64)
    if labels.shape != predicted.shape or labels.ndim != 1:
        raise ValueError(f"labels are {labels.shape} and predicted {predicted.shape}, expected the same (V,)")
    for name, values in (("labels", labels), ("predicted", predicted)):
        if len(values) and not (0 <= values.min() and values.max() < num_classes):
            raise ValueError(f"{name} are {values.min()} to {values.max()}, expected 0 to {num_classes - 1}")
    flat = np.bincount(labels * num_classes + predicted, minlength=num_classes**2)
    return flat.reshape(num_classes, num_classes)


@dataclass(frozen=True, kw_only=True)
class ClassAccuracies:
    """Accuracy class by class."""

    per_class: dict[str, float]
    """Class -> share of its videos that were recognised, in order of the classes. Classes without a video are
    missing here."""
    without_videos: tuple[str, ...]
    """Classes that have no test video: nothing can be said of them."""
    mean: float
    """Of `per_class`: accuracy if every class had equally many videos."""


def class_accuracies(confusion: np.ndarray, class_names: Sequence[str]) -> ClassAccuracies:
    """Accuracy of each class from `confusion_counts`. Raises ValueError when no class has a video."""
    if confusion.shape != (len(class_names), len(class_names)):
        raise ValueError(f"confusion is {confusion.shape} for {len(class_names)} classes, expected a square")
    totals = confusion.sum(axis=1)
    if not totals.any():
        raise ValueError("no class has a test video, expected at least one; were all videos skipped?")
    per_class = {
        name: float(hits / total)
        for name, hits, total in zip(class_names, confusion.diagonal(), totals)
        if total
    }
    return ClassAccuracies(
        per_class=per_class,
        without_videos=tuple(name for name, total in zip(class_names, totals) if not total),
        mean=float(np.mean(list(per_class.values()))),
    )


def mean_over_splits(per_split: Sequence[Mapping[str, Metric]]) -> dict[str, Metric]:
    """Metrics of splits, folds or seeds averaged, with each one's value in `per_fold`.

    Every split counts alike, as in the paper's "averaged across splits", however many videos it has. The interval
    is `mean_interval` over the splits (None for a single one), chance the mean of theirs.

    Raises:
        ValueError: no split, or splits with different metrics.
    """
    if not per_split:
        raise ValueError("no splits to average, expected at least one")
    names = list(per_split[0])
    for number, metrics in enumerate(per_split[1:], start=2):
        if set(metrics) != set(names):
            raise ValueError(f"split {number} has the metrics {sorted(metrics)}, the first {sorted(names)}")
    averaged = {}
    for name in names:
        values = [metrics[name].value for metrics in per_split]
        chances = [metrics[name].chance for metrics in per_split]
        averaged[name] = Metric(
            value=float(np.mean(values)),
            interval=mean_interval(values),
            per_fold=tuple(values),
            chance=None if None in chances else float(np.mean(chances)),
        )
    return averaged
