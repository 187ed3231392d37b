"""Audio classification with a linear classifier on the frozen audio encoder (paper sections 4.2 and 4.5, Table 6).

Clips of each file -> features of f_a -> a linear classifier fitted to the training files' clips -> mean score of a test
file's clips. The same protocol serves two baselines: the same network with random weights, and statistics of the
log-mel without any network. Fine-tuning the encoder, as XDC does on ESC-50, is not done here.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from cmac.evaluation.intervals import bootstrap_interval, paired_difference_interval
from cmac.evaluation.metrics import VideoPredictions, accuracy_metric, average_clips
from cmac.evaluation.probe import Classifier, fit_linear_probe
from cmac.evaluation.results import Metric
from shards.manifest import write_atomically

if TYPE_CHECKING:
    from cmac.weights import Encoders
    from loaders.batch import ClipBatch

FeatureKind = Literal["map", "gap", "gdt-pool", "flatten+l2"]
"""What becomes of the encoder's map a in R^{C x F x S}. Choice: the paper names no feature, and neither GDT, AVID nor
XDC ships its audio evaluation. `map`: the largest values of 9 x 3 regions. `gap`: mean over frequency and time.
`gdt-pool`: largest values of three neighboring steps, every second step. `flatten+l2`: the whole map at unit length, as
CrissCross has it."""

MAP_SIZE = (9, 3)
"""Regions of `map` over frequency and time: what 257 bands leave of the frequency axis in ResNet-9, and thirds."""
FEATURES_VERSION = 1
"""Raised when the same clips and weights give other features or scores than before: those stored are then made anew."""
_HIGH_DIMENSIONAL = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
LOG_MEL = "log-mel"
"""Name of the baseline without a network."""
CANDIDATES: dict[str, tuple[float, ...]] = {
    "map": _HIGH_DIMENSIONAL,
    "gap": (*_HIGH_DIMENSIONAL, 10.0, 100.0),
    "gdt-pool": _HIGH_DIMENSIONAL,
    "flatten+l2": (1.0, 10.0, 100.0, 1e3, 1e4),
    LOG_MEL: _HIGH_DIMENSIONAL,
}
"""Values of C to choose from. Choice: where dimensions are many, all above 1 separate the training clips, and take the
solver longest; dimensions of a vector of unit length are small, and want larger ones."""
ESC_NAME = re.compile(r"(?:.*/)?(\d-\d+)-[A-Z]-\d+\.wav")
"""`{fold}-{recording}-{take}-{class}.wav`: several clips were cut from one recording."""


@dataclass(frozen=True, kw_only=True)
class AudioProtocol:
    """How a dataset's files are cut into clips, and what its splits mean."""

    clips_per_file: int
    """Clips of each file, evenly spread, for training and for test."""
    clip_seconds: float
    """Length of a clip."""
    reading: str
    """Which files train and which test."""
    official_folds: bool
    """Whether the dataset's splits are folds, which C is then chosen with, too."""


_ESC = AudioProtocol(
    clips_per_file=10,
    clip_seconds=2.0,
    reading="the five official folds, each for test once",
    official_folds=True,
)
_SCENES = "DCASE 2013's scenes, there was no challenge in 2014: "
PROTOCOLS: dict[str, AudioProtocol] = {
    "esc50": _ESC,
    "esc10": _ESC,
    "dcase2013": AudioProtocol(
        clips_per_file=60,
        clip_seconds=1.0,
        reading=_SCENES + "five stratified folds of the development files, each for test once",
        official_folds=False,
    ),
    "dcase2014": AudioProtocol(
        clips_per_file=60,
        clip_seconds=1.0,
        reading=_SCENES + "the development files train, the test files test",
        official_folds=False,
    ),
}
"""By dataset; section 4.2."""


def pool_map(feature_map: Tensor, kind: FeatureKind) -> Tensor:
    """Features of clips from the encoder's maps: (N, C, F, S) -> (N, D).

    `map` of 512 x 9 x S is 13,824 numbers, `gap` 512. Maps with fewer than 9 bands, or fewer steps than pooling needs,
    keep what they have.

    Raises:
        ValueError: no such kind.
    """
    if kind not in get_args(FeatureKind):
        raise ValueError(f"features is {kind!r}, expected {', '.join(get_args(FeatureKind))}")
    _, _, num_bands, num_steps = feature_map.shape
    if kind == "map":
        size = min(MAP_SIZE[0], num_bands), min(MAP_SIZE[1], num_steps)
        return F.adaptive_max_pool2d(feature_map, size).flatten(1)
    if kind == "gap":
        return feature_map.mean(dim=(2, 3))
    if kind == "gdt-pool":
        return F.max_pool2d(feature_map, (1, min(3, num_steps)), stride=(1, 2)).flatten(1)
    return F.normalize(feature_map.flatten(1), dim=1)


def band_statistics(log_mel: Tensor, deltas: bool = False) -> Tensor:
    """Mean and standard deviation over time of each mel band: (N, 1, F, S) -> (N, 2 F).

    deltas: the same of the differences of neighboring steps besides, (N, 4 F).
    """
    bands = log_mel[:, 0]  # (N, F, S)
    parts = [bands, bands.diff(dim=-1)] if deltas else [bands]
    statistics = [values for part in parts for values in (part.mean(dim=-1), part.std(dim=-1, correction=0))]
    return torch.cat(statistics, dim=1)


def clip_encoder(
    networks: Mapping[str, Encoders],
    kinds: Sequence[FeatureKind],
    device: torch.device,
    *,
    deltas: bool = False,
) -> Callable[[ClipBatch], dict[str, Tensor]]:
    """What `extract_features` computes of each batch: `{network} {kind}` for each network and kind, and `log-mel`.

    networks: with the same front end, as they see the same log-mel.
    """
    audio = {name: encoders.require_audio() for name, encoders in networks.items()}

    def encode(batch: ClipBatch) -> dict[str, Tensor]:
        log_mel = batch.log_mel.to(device)
        features = {LOG_MEL: band_statistics(log_mel, deltas)}
        for name, encoder in audio.items():
            feature_map = encoder(log_mel)  # (N, C, F', S')
            for kind in kinds:
                features[f"{name} {kind}"] = pool_map(feature_map, kind)
        return features

    return encode


def recording_of(file: str) -> str:
    """What a file was cut from, the unit of an interval: ESC-50 has several clips of some recordings; else the file."""
    match = ESC_NAME.fullmatch(file)
    return match[1] if match else file


@dataclass(frozen=True, kw_only=True)
class FoldTask:
    """The files of one fold."""

    name: str
    """Of the fold: `1`, `test`."""
    classes: tuple[str, ...]
    """Of the dataset, in its order."""
    train: dict[str, str]
    """File -> class."""
    test: dict[str, str]
    """File -> class. Used to judge, and for nothing else."""
    inner_folds: dict[str, int] | None
    """Training file -> the official fold that it is in; None: folds to choose C with are drawn, by class."""


@dataclass(frozen=True, kw_only=True)
class FoldResult:
    """What one method gave on one fold."""

    name: str
    """Of the fold."""
    C: float
    """Inverse regularization strength, chosen among the training files."""
    inner_accuracies: dict[float, float]
    """C -> accuracy of held-out training files."""
    converged: bool
    """Whether the final fit did."""
    classifier_digest: str
    """16 hex digits over the classifier's weights."""
    files: tuple[str, ...]
    """Test files."""
    labels: tuple[int, ...]
    """Right class of each."""
    scores: np.ndarray
    """float64 (V, classes): mean over each file's clips."""
    num_clips: tuple[int, ...]
    """Clips that were averaged for each file."""
    seconds: float
    """That it took."""

    @property
    def predictions(self) -> VideoPredictions:
        """For the metrics."""
        return VideoPredictions(
            video_ids=self.files,
            scores=self.scores,
            labels=np.array(self.labels, dtype=np.int64),
            num_clips=np.array(self.num_clips, dtype=np.int64),
        )

    def hits(self) -> dict[str, float]:
        """File -> 1 if its class was told rightly, else 0."""
        return dict(zip(self.files, self.predictions.correct().astype(float).tolist()))

    def to_json(self) -> dict[str, Any]:
        """What `from_json` reads back."""
        return {
            **asdict(self),
            "inner_accuracies": [[c, accuracy] for c, accuracy in self.inner_accuracies.items()],
            "scores": self.scores.tolist(),
        }

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> FoldResult:
        """Inverse of `to_json`."""
        return cls(
            **{
                **record,
                "inner_accuracies": dict(map(tuple, record["inner_accuracies"])),
                "files": tuple(record["files"]),
                "labels": tuple(record["labels"]),
                "scores": np.array(record["scores"], dtype=np.float64),
                "num_clips": tuple(record["num_clips"]),
            }
        )


def classify_fold(
    features: np.ndarray,
    files: Sequence[str],
    task: FoldTask,
    *,
    kind: FeatureKind | Literal["log-mel"],
    classifier: Classifier = "logistic",
    seed: int = 0,
) -> FoldResult:
    """A linear classifier on the clips of a fold's training files, and the mean scores of its test files.

    C is chosen among the training files alone: each official fold (or drawn one) of them is held out once, and its
    files are judged as test files are. Of a test file's clips, class probabilities (`logistic`) or signed distances
    (`svm`) are averaged.

    Args:
        features: (N, D), a row per clip of any fold.
        files: N file names.
        task: which files train and which test; files without a row are left out.
        kind: of features. All but those of unit length are standardized by the training clips.
        classifier: `logistic` or `svm`.
        seed: of drawn folds and of the SVM.

    Raises:
        ValueError: no row of a training or of a test file, or fewer than two classes to train on.
    """
    began = time.monotonic()
    rows = {part: np.array([file in named for file in files]) for part, named in _parts(task).items()}
    for part, chosen in rows.items():
        if not chosen.any():
            raise ValueError(
                f"fold {task.name}: none of its {len(_parts(task)[part])} {part} files has a clip that can be used, "
                f"expected at least one"
            )
    train_files = [file for file, chosen in zip(files, rows["train"]) if chosen]
    probe = fit_linear_probe(
        features[rows["train"]],
        [task.train[file] for file in train_files],
        items=train_files,
        folds=None if task.inner_folds is None else [task.inner_folds[file] for file in train_files],
        classifier=classifier,
        candidates=CANDIDATES[kind],
        standardize=kind != "flatten+l2",
        seed=seed,
    )
    clip_scores = probe.scores(features[rows["test"]])  # (N_test, classes seen in training)
    # A class without training files is never the answer, and its test files count as wrong.
    scores = np.full((len(clip_scores), len(task.classes)), clip_scores.min() - 1.0)
    scores[:, [task.classes.index(label) for label in probe.classes]] = clip_scores
    test_files = [file for file, chosen in zip(files, rows["test"]) if chosen]
    labels = [task.classes.index(task.test[file]) for file in test_files]
    predictions = average_clips(scores, test_files, labels, "raw")
    digest = hashlib.sha256(probe.weights.tobytes() + probe.biases.tobytes()).hexdigest()[:16]
    return FoldResult(
        name=task.name,
        C=probe.C,
        inner_accuracies=probe.fold_accuracies,
        converged=probe.converged,
        classifier_digest=digest,
        files=predictions.video_ids,
        labels=tuple(predictions.labels.tolist()),
        scores=predictions.scores,
        num_clips=tuple(predictions.num_clips.tolist()),
        seconds=time.monotonic() - began,
    )


def _parts(task: FoldTask) -> dict[str, dict[str, str]]:
    return {"train": task.train, "test": task.test}


def classify_folds(
    features: np.ndarray,
    files: Sequence[str],
    tasks: Sequence[FoldTask],
    store: Path,
    identity: Mapping[str, Any],
    *,
    kind: FeatureKind | Literal["log-mel"],
    classifier: Classifier = "logistic",
    seed: int = 0,
    say: Callable[[str], None] | None = None,
) -> list[FoldResult]:
    """`classify_fold` of each task; finished folds are kept in `store` and not computed again.

    Args:
        features: as for `classify_fold`.
        files: as for `classify_fold`.
        tasks: the folds.
        store: folder for the results of folds, which may be shared by all methods and datasets.
        identity: JSON-able; what the features depend on.
        kind: as for `classify_fold`.
        classifier: as for `classify_fold`.
        seed: as for `classify_fold`.
        say: told of each fold.

    Raises:
        ValueError: as `classify_fold`, or a kept result is damaged.
    """
    store.mkdir(parents=True, exist_ok=True)
    results = []
    for task in tasks:
        described = {
            "version": FEATURES_VERSION,
            "features": identity,
            "files": sorted(set(files)),
            "task": asdict(task),
            "classifier": [kind, classifier, seed],
            "candidates": CANDIDATES[kind],
        }
        text = json.dumps(described, sort_keys=True)
        path = store / f"{hashlib.sha256(text.encode()).hexdigest()[:16]}.json"
        if path.exists():
            try:
                result = FoldResult.from_json(json.loads(path.read_bytes()))
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{path} cannot be read ({error}); remove it and run again") from error
        else:
            result = classify_fold(features, files, task, kind=kind, classifier=classifier, seed=seed)
            write_atomically(path, (json.dumps(result.to_json()) + "\n").encode("ascii"))
        if say is not None:
            say(
                f"fold {task.name}: {100 * result.predictions.accuracy():.1f} %, C {result.C:g}, "
                f"{result.seconds:.0f} s{'' if result.converged else ', NOT CONVERGED'}"
            )
        results.append(result)
    return results


def top1_metric(folds: Sequence[FoldResult]) -> Metric:
    """Accuracy of files: the mean over folds, with each fold's, and an interval whose unit is the recording.

    Choice: the interval is the bootstrap over all test files, each of which is tested once; folds share most of their
    training files and are no repetitions of each other.
    """
    metrics = [accuracy_metric(fold.predictions) for fold in folds]
    files = [file for fold in folds for file in fold.files]
    hits = [hit for fold in folds for hit in fold.hits().values()]
    return Metric(
        value=float(np.mean([metric.value for metric in metrics])),
        interval=bootstrap_interval(hits, [recording_of(file) for file in files]),
        per_fold=tuple(metric.value for metric in metrics) if len(metrics) > 1 else None,
        chance=metrics[0].chance,
    )


def difference_metric(method: Sequence[FoldResult], others: Sequence[Sequence[FoldResult]]) -> Metric:
    """How much better a method tells the same test files than others do (their mean, of several random networks).

    The value is the mean over folds, as the accuracies are; the interval is that of the difference over all files, with
    the recording as unit (`recording_of`).

    Raises:
        ValueError: the methods were tested on different files.
    """
    per_fold, ours, theirs, groups = [], [], [], []
    for fold, counterparts in zip(method, zip(*others, strict=True), strict=True):
        hits = fold.hits()
        other_hits = [counterpart.hits() for counterpart in counterparts]
        if any(other.keys() != hits.keys() for other in other_hits):
            raise ValueError(f"fold {fold.name}: the methods were tested on different files")
        own = [hits[file] for file in fold.files]
        mean = [math.fsum(other[file] for other in other_hits) / len(other_hits) for file in fold.files]
        per_fold.append(float(np.mean(own) - np.mean(mean)))
        ours += own
        theirs += mean
        groups += [recording_of(file) for file in fold.files]
    return Metric(
        value=float(np.mean(per_fold)),
        interval=paired_difference_interval(ours, theirs, groups),
        per_fold=tuple(per_fold) if len(per_fold) > 1 else None,
    )
