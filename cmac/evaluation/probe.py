"""Linear classifiers on frozen features: fitted and chosen on training data alone."""

import re
import warnings
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from scipy.linalg import qr
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedGroupKFold
from sklearn.svm import LinearSVC

Classifier = Literal["logistic", "svm"]

C_GRID = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0)
"""Values of C (inverse regularisation strength) to choose from, for standardised features."""
MAX_ITERATIONS = 2_000


@dataclass(frozen=True, kw_only=True)
class LinearProbe:
    """A linear classifier and how it was chosen."""

    classifier: Classifier
    """`logistic`: multinomial logistic regression. `svm`: linear SVM, one against the rest, squared hinge."""
    classes: tuple[str, ...]
    """Class of each column of `scores`, sorted; those of the training labels."""
    C: float
    """Inverse regularisation strength, as in scikit-learn."""
    fold_accuracies: dict[float, float]
    """C -> share of held-out training items classified rightly; empty where there was one C to choose from."""
    num_folds: int
    """Folds that C was chosen with; 0 where there was nothing to choose."""
    converged: bool
    """False if the final fit ended at MAX_ITERATIONS."""
    mean: np.ndarray
    """float64 (D,): subtracted from features. Mean of the training rows, or 0."""
    scale: np.ndarray
    """float64 (D,): then divided by. Standard deviation of the training rows, or 1."""
    weights: np.ndarray
    """float64 (K, D)."""
    biases: np.ndarray
    """float64 (K,)."""

    def scores(self, features: np.ndarray) -> np.ndarray:
        """float64 (N, K): class probabilities (`logistic`) or signed distances (`svm`) of features (N, D).

        Raises:
            ValueError: D is not that of the training features, or a value is not finite.
        """
        rows = _as_rows(features, "features")
        if rows.shape[1] != len(self.mean):
            raise ValueError(
                f"features have {rows.shape[1]} dimensions, expected {len(self.mean)} as in training"
            )
        distances = (rows - self.mean) / self.scale @ self.weights.T + self.biases  # (N, K)
        return _scores(self.classifier, distances)

    def predict(self, features: np.ndarray) -> list[str]:
        """Class with the highest score of each row of features (N, D)."""
        return [self.classes[index] for index in self.scores(features).argmax(axis=1)]


def fit_linear_probe(
    features: np.ndarray,
    labels: Sequence[str],
    *,
    groups: Sequence[Hashable] | None = None,
    folds: Sequence[int] | None = None,
    items: Sequence[Hashable] | None = None,
    classifier: Classifier = "logistic",
    candidates: Sequence[float] = C_GRID,
    num_folds: int = 5,
    standardize: bool = True,
    seed: int = 0,
) -> LinearProbe:
    """A linear classifier on training features, C chosen by cross-validation among them. Sees no test data at all.

    The C with the highest held-out accuracy is taken, of equal ones the smallest (the strongest regularisation),
    then the classifier is fitted to all rows. A held-out row of a class that the other folds do not have counts as
    wrong; folds without which fewer than two classes remain are left out.

    Choice: mean and standard deviation are those of all training rows, for the cross-validation as well; it
    decides C alone.

    Args:
        features: (N, D), a row per clip or per video.
        labels: N class names.
        groups: N names of what must not lie on both sides of a fold (the video, or what several videos were cut
            from); default: `items`, and without those each row by itself. Folds are stratified by class.
        folds: N fold numbers that are used as they are (ESC-50's official ones), instead of groups.
        items: N names; the scores of an item's rows are averaged before its class is judged, as at test time.
            Default: each row by itself.
        classifier: `logistic` or `svm`.
        candidates: values of C; a single one is taken without cross-validation.
        num_folds: at most; fewer where there are fewer groups, or rows of the largest class.
        standardize: to mean 0 and standard deviation 1 in every dimension (constant ones are only shifted).
        seed: of the folds and of the SVM's coordinate descent.

    Raises:
        ValueError: nothing to fit, fewer than two classes, or no two folds to choose C with.
    """
    rows = _as_rows(features, "features")
    labels = list(labels)
    _check(rows, labels, {"groups": groups, "folds": folds, "items": items}, classifier, candidates)
    if groups is not None and folds is not None:
        raise ValueError("both groups and folds are given, expected one of them")
    classes, targets = np.unique(labels, return_inverse=True)
    if len(classes) < 2:
        raise ValueError(
            f"all {len(labels)} rows are of class {str(classes[0])!r}, expected at least two classes"
        )

    mean, scale = np.zeros(rows.shape[1]), np.ones(rows.shape[1])
    if standardize:
        mean, scale = rows.mean(axis=0), rows.std(axis=0)
        # A constant column has a spread of rounding errors at most, which is not to be blown up.
        scale[scale <= 1e-9 * np.maximum(1.0, np.abs(mean))] = 1.0
    rows = rows - mean
    rows /= scale  # in place: 2 GB for ESC-50's maps
    rotation = None
    if rows.shape[1] > rows.shape[0]:
        # Weights of an L2-regularised classifier lie in the span of its rows: fitting them in coordinates of that
        # span, of N dimensions, gives the same classifier.
        rotation, upper = qr(rows.T, mode="economic")  # (D, N), (N, N)
        rows = upper.T

    accuracies: dict[float, float] = {}
    num_used_folds = 0
    if len(candidates) > 1:
        units = items if items is not None else range(len(labels))
        if folds is None:
            folds = _deal_folds(targets, groups if groups is not None else units, num_folds, seed)
        accuracies, num_used_folds = _cross_validate(
            rows, targets, np.asarray(folds), list(units), classifier, sorted(candidates), seed
        )
    best = min(candidates, key=lambda c: (-accuracies.get(c, 0.0), c))
    weights, biases, converged = _fit(rows, targets, len(classes), classifier, best, seed)
    if rotation is not None:
        weights = weights @ rotation.T
    return LinearProbe(
        classifier=classifier,
        classes=tuple(str(name) for name in classes),
        C=best,
        fold_accuracies=accuracies,
        num_folds=num_used_folds,
        converged=converged,
        mean=mean,
        scale=scale,
        weights=weights,
        biases=biases,
    )


def mean_per_item(
    scores: np.ndarray, items: Sequence[Hashable]
) -> tuple[np.ndarray, list[Hashable], np.ndarray]:
    """Scores of an item's rows averaged: ((V, K), the V items in the order they first come, (N,) item of each row)."""
    names = {item: number for number, item in enumerate(dict.fromkeys(items))}
    index = np.array([names[item] for item in items], dtype=np.int64)
    sums = np.zeros((len(names), scores.shape[1]))
    np.add.at(sums, index, scores)
    return sums / np.bincount(index, minlength=len(names))[:, None], list(names), index


def source_group(video_id: str, label: str | None) -> str:
    """What an action video was cut from: UCF101's `v_Punch_g08_c01.avi` -> its class and g08, HMDB51's
    `TITLE_punch_u_nm_np1_ba_med_23.avi` -> the title; any other file is a group of its own.

    Videos of a group show the same people and place: they are not independent, nor may folds part them.
    """
    name = video_id.rpartition("/")[2]
    if match := re.fullmatch(r"v_(\w+)_g(\d+)_c\d+\.\w+", name):
        return f"{match[1]} g{match[2]}"
    if label and (match := re.fullmatch(rf"(.+)_{re.escape(label)}_(?:[a-z0-9]+_){{5}}\d+\.\w+", name)):
        return match[1]
    return video_id


def _scores(classifier: Classifier, distances: np.ndarray) -> np.ndarray:
    """(N, K) softmax over the classes for `logistic`; as they are for `svm`."""
    if classifier == "svm":
        return distances
    exponentials = np.exp(distances - distances.max(axis=1, keepdims=True))
    return exponentials / exponentials.sum(axis=1, keepdims=True)


def _as_rows(features: np.ndarray, name: str) -> np.ndarray:
    rows = np.asarray(features, dtype=np.float64)
    if rows.ndim != 2:
        raise ValueError(f"{name} have shape {rows.shape}, expected (rows, dimensions)")
    if not np.isfinite(rows).all():
        bad = int((~np.isfinite(rows).all(axis=1)).sum())
        raise ValueError(f"{name}: {bad} of {len(rows)} rows hold values that are not finite")
    return rows


def _check(
    rows: np.ndarray,
    labels: list[str],
    per_row: dict[str, Sequence | None],
    classifier: str,
    candidates: Sequence[float],
) -> None:
    if classifier not in get_args(Classifier):
        raise ValueError(f"classifier is {classifier!r}, expected {' or '.join(get_args(Classifier))}")
    if not candidates or min(candidates) <= 0:
        raise ValueError(f"candidates for C are {tuple(candidates)}, expected at least one, all above 0")
    if len(rows) == 0:
        raise ValueError("no rows to fit a classifier to, expected at least two classes of them")
    for name, values in {"labels": labels, **per_row}.items():
        if values is not None and len(values) != len(rows):
            raise ValueError(f"{len(values)} {name} for {len(rows)} rows of features, expected one for each")


def _deal_folds(targets: np.ndarray, groups: Sequence[Hashable], num_folds: int, seed: int) -> np.ndarray:
    """(N,) fold of each row: groups stay whole, classes are spread evenly."""
    names = {group: number for number, group in enumerate(dict.fromkeys(groups))}
    index = np.array([names[group] for group in groups])
    largest = int(np.bincount(targets).max())
    num_folds = min(num_folds, len(names), largest)
    if num_folds < 2:
        raise ValueError(
            f"{len(names)} group(s) of rows, {largest} row(s) of the largest class: no two folds to choose C with; "
            "give more rows, or a single candidate for C"
        )
    folds = np.empty(len(targets), dtype=np.int64)
    splitter = StratifiedGroupKFold(num_folds, shuffle=True, random_state=seed)
    with warnings.catch_warnings():
        # Classes with fewer rows than folds are in order: where they are held out alone they count as wrong.
        warnings.filterwarnings("ignore", message="The least populated class", category=UserWarning)
        for fold, (_, held_out) in enumerate(splitter.split(targets, targets, index)):
            folds[held_out] = fold
    return folds


def _cross_validate(
    rows: np.ndarray,
    targets: np.ndarray,
    folds: np.ndarray,
    items: list[Hashable],
    classifier: Classifier,
    candidates: list[float],
    seed: int,
) -> tuple[dict[float, float], int]:
    """(C -> accuracy over all held-out items, folds that could be used)."""
    num_classes = int(targets.max()) + 1
    right = dict.fromkeys(candidates, 0)
    num_items = num_used = 0
    for fold in np.unique(folds):
        held_out = folds == fold
        if len(np.unique(targets[~held_out])) < 2:
            continue
        num_used += 1
        names = [items[index] for index in np.flatnonzero(held_out)]
        truth = dict(zip(names, targets[held_out]))
        num_items += len(truth)
        for c in candidates:
            weights, biases, _ = _fit(rows[~held_out], targets[~held_out], num_classes, classifier, c, seed)
            scores = _scores(classifier, rows[held_out] @ weights.T + biases)
            means, order, _ = mean_per_item(scores, names)
            right[c] += sum(truth[name] == guess for name, guess in zip(order, means.argmax(axis=1)))
    if num_items == 0:
        raise ValueError(
            f"none of {len(np.unique(folds))} folds leaves two classes to fit a classifier to, expected at least one; "
            "give a single candidate for C instead"
        )
    return {c: float(count / num_items) for c, count in right.items()}, num_used


def _fit(
    rows: np.ndarray, targets: np.ndarray, num_classes: int, classifier: Classifier, c: float, seed: int
) -> tuple[np.ndarray, np.ndarray, bool]:
    """(weights (K, D), biases (K,), whether it converged). Classes without rows get a bias of minus infinity."""
    if classifier == "logistic":
        model = LogisticRegression(C=c, max_iter=MAX_ITERATIONS)
    else:
        model = LinearSVC(C=c, max_iter=MAX_ITERATIONS, dual="auto", random_state=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # said by `converged`
        model.fit(rows, targets)
    converged = bool(np.max(model.n_iter_) < MAX_ITERATIONS)
    coefficients, intercepts = model.coef_, model.intercept_
    if len(model.classes_) == 2:  # one row: of the second class, against the first
        first = 0.0 if classifier == "logistic" else -1.0
        coefficients = np.concatenate([first * coefficients, coefficients])
        intercepts = np.concatenate([first * intercepts, intercepts])
    weights, biases = np.zeros((num_classes, rows.shape[1])), np.full(num_classes, -np.inf)
    weights[model.classes_], biases[model.classes_] = coefficients, intercepts
    return weights, biases, converged
