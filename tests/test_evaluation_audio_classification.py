"""The protocol of audio classification: what is fitted to, what is chosen with what, and how files are judged."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

import cmac.evaluation.audio_classification as audio_classification
from cmac.evaluation.audio_classification import (
    CANDIDATES,
    FoldResult,
    FoldTask,
    band_statistics,
    classify_fold,
    classify_folds,
    difference_metric,
    pool_map,
    recording_of,
    top1_metric,
)

CLASSES = ("dog", "rain", "rooster")
CLIPS = 3


def file_name(fold: int, number: int, label: str) -> str:
    return f"audio/{fold}-{CLASSES.index(label)}{number}-A-{CLASSES.index(label)}.wav"


def make_files(
    distance: float, seed: int = 0, dimensions: int = 8
) -> tuple[np.ndarray, list[str], dict[str, tuple[str, int]]]:
    """(features of 3 clips of each file, the clips' files, file -> (class, fold)): 2 files per class and fold, whose
    classes lie that far apart."""
    rng = np.random.default_rng(seed)
    known = {
        file_name(fold, number, label): (label, fold)
        for fold in range(1, 6)
        for label in CLASSES
        for number in range(2)
    }
    rows, files = [], []
    for name, (label, _) in known.items():
        center = distance * np.eye(dimensions)[CLASSES.index(label)] + rng.normal(size=dimensions) * 0.7
        rows.append(center + rng.normal(size=(CLIPS, dimensions)))
        files += [name] * CLIPS
    return np.concatenate(rows).astype(np.float32) * 5 + 3, files, known


def task_of(fold: int, known: dict[str, tuple[str, int]]) -> FoldTask:
    train = {name: label for name, (label, own) in known.items() if own != fold}
    return FoldTask(
        name=str(fold),
        classes=CLASSES,
        train=train,
        test={name: label for name, (label, own) in known.items() if own == fold},
        inner_folds={name: known[name][1] for name in train},
    )


def test_features_are_pooled_as_their_names_say() -> None:
    feature_map = torch.arange(18 * 6, dtype=torch.float32).reshape(1, 1, 18, 6)
    pooled = pool_map(feature_map, "map").reshape(9, 3)
    # The largest value of each 2 x 2 block is its last: row 2 i + 1, column 2 j + 1.
    assert torch.equal(pooled, feature_map[0, 0, 1::2, 1::2])
    assert pool_map(feature_map, "gap").tolist() == [[53.5]]
    steps = pool_map(feature_map, "gdt-pool").reshape(18, 2)
    assert torch.equal(steps, feature_map[0, 0, :, [2, 4]])  # of steps 0-2 and 2-4
    flat = pool_map(feature_map, "flatten+l2")
    torch.testing.assert_close(flat, feature_map.flatten(1) / feature_map.norm())
    with pytest.raises(ValueError, match=r"features is 'mean', expected map, gap"):
        pool_map(feature_map, "mean")


def test_features_have_the_papers_sizes_for_one_and_two_seconds() -> None:
    one, two = torch.zeros(2, 512, 9, 4), torch.zeros(2, 512, 9, 7)
    assert [pool_map(one, kind).shape[1] for kind in ("map", "gap", "gdt-pool")] == [13_824, 512, 4_608]
    assert [pool_map(two, kind).shape[1] for kind in ("map", "gap", "gdt-pool")] == [13_824, 512, 13_824]
    small = torch.zeros(2, 8, 2, 1)  # of 40 bands and a fraction of a second
    assert [pool_map(small, kind).shape[1] for kind in ("map", "gap", "gdt-pool")] == [16, 8, 16]


def test_band_statistics_are_means_and_deviations_over_time() -> None:
    log_mel = torch.randn(2, 1, 5, 11, generator=torch.Generator().manual_seed(0))
    bands = log_mel[:, 0].numpy()
    expected = np.concatenate([bands.mean(axis=2), bands.std(axis=2)], axis=1)
    np.testing.assert_allclose(band_statistics(log_mel).numpy(), expected, rtol=1e-5, atol=1e-6)
    steps = np.diff(bands, axis=2)
    expected = np.concatenate([expected, steps.mean(axis=2), steps.std(axis=2)], axis=1)
    np.testing.assert_allclose(band_statistics(log_mel, deltas=True).numpy(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("classifier", ["logistic", "svm"])
def test_separable_classes_are_told_apart(classifier: str) -> None:
    features, files, known = make_files(distance=20)
    for fold in (1, 4):
        result = classify_fold(features, files, task_of(fold, known), kind="map", classifier=classifier)
        assert result.predictions.accuracy() == 1.0
        assert result.converged
        assert result.num_clips == (CLIPS,) * 6


def test_neither_labels_nor_clips_of_test_files_change_the_classifier() -> None:
    features, files, known = make_files(distance=1.5)
    task = task_of(2, known)
    before = classify_fold(features, files, task, kind="map")

    others = list(np.roll(list(task.test.values()), 2))
    assert others != list(task.test.values())
    relabelled = dataclasses.replace(task, test=dict(zip(task.test, others)))
    after = classify_fold(features, files, relabelled, kind="map")
    assert (after.C, after.inner_accuracies) == (before.C, before.inner_accuracies)
    assert after.classifier_digest == before.classifier_digest
    np.testing.assert_array_equal(after.scores, before.scores)
    assert after.predictions.accuracy() != before.predictions.accuracy()

    disturbed = features.copy()
    disturbed[[file in task.test for file in files]] += 100
    after = classify_fold(disturbed, files, task, kind="map")
    assert (after.C, after.classifier_digest) == (before.C, before.classifier_digest)
    assert not np.allclose(after.scores, before.scores)

    disturbed = features.copy()
    disturbed[[file in task.train for file in files]] *= np.linspace(0.5, 2, 8, dtype=np.float32) ** 3
    disturbed[0 if files[0] in task.train else CLIPS] += 5
    assert classify_fold(disturbed, files, task, kind="map").classifier_digest != before.classifier_digest


def test_scores_and_choice_of_c_are_scikit_learns_on_the_official_folds() -> None:
    features, files, known = make_files(distance=1.5, seed=3, dimensions=40)
    task = task_of(5, known)
    result = classify_fold(features, files, task, kind="map")

    names = np.array(files)
    targets = np.array([CLASSES.index(known[name][0]) for name in files])
    folds = np.array([known[name][1] for name in files])
    train = features[folds != 5].astype(np.float64)
    rows = (features - train.mean(axis=0)) / train.std(axis=0)

    def mean_scores(held_out: np.ndarray, fitted_to: np.ndarray, c: float) -> dict[str, np.ndarray]:
        model = LogisticRegression(C=c, max_iter=2000).fit(rows[fitted_to], targets[fitted_to])
        clips = model.predict_proba(rows[held_out])
        return {name: clips[names[held_out] == name].mean(axis=0) for name in set(names[held_out])}

    accuracies = {}
    for c in CANDIDATES["map"]:
        hits = []
        for inner in (1, 2, 3, 4):
            scores = mean_scores(folds == inner, (folds != inner) & (folds != 5), c)
            hits += [CLASSES.index(known[name][0]) == mean.argmax() for name, mean in scores.items()]
        accuracies[c] = np.mean(hits)
    assert len(set(accuracies.values())) > 1  # there is something to choose
    assert result.inner_accuracies == pytest.approx(accuracies)
    assert result.C == min(c for c in accuracies if accuracies[c] == max(accuracies.values()))
    expected = mean_scores(folds == 5, folds != 5, result.C)
    np.testing.assert_allclose(result.scores, [expected[name] for name in result.files], atol=1e-3)


class FixedProbe:
    """A classifier of dogs and rain that gives the clips' scores as they were written down."""

    C, fold_accuracies, converged, classes = 1.0, {1.0: 1.0}, True, ("dog", "rain")
    weights, biases = np.zeros((2, 2)), np.zeros(2)

    def scores(self, features: np.ndarray) -> np.ndarray:
        return np.asarray(features, dtype=np.float64)


def test_a_file_is_judged_by_the_mean_of_its_clips_scores_not_by_their_votes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(audio_classification, "fit_linear_probe", lambda *_, **__: FixedProbe())
    features = np.array([[0.6, 0.4], [0.6, 0.4], [0.1, 0.9], [0.7, 0.3], [0.2, 0.8], [0.5, 0.5]])
    files = ["a.wav", "a.wav", "a.wav", "b.wav", "b.wav", "train.wav"]
    task = FoldTask(
        name="1",
        classes=("rooster", "dog", "rain"),
        train={"train.wav": "dog"},
        test={"a.wav": "rain", "b.wav": "rooster"},
        inner_folds=None,
    )
    result = classify_fold(features, files, task, kind="gap")
    assert result.files == ("a.wav", "b.wav")
    np.testing.assert_allclose(result.scores[:, 1:], [[1.3 / 3, 1.7 / 3], [0.45, 0.55]])
    # Two of three clips of a.wav say dog; their mean says rain. No training file was a rooster.
    assert result.predictions.predicted.tolist() == [2, 2]
    assert result.hits() == {"a.wav": 1.0, "b.wav": 0.0}
    assert result.num_clips == (3, 2)


def test_a_fold_without_usable_files_says_so() -> None:
    features, files, known = make_files(distance=5)
    task = task_of(1, known)
    kept = np.array([file not in task.test for file in files])
    with pytest.raises(ValueError, match=r"fold 1: none of its 6 test files has a clip that can be used"):
        classify_fold(features[kept], [f for f, keep in zip(files, kept) if keep], task, kind="map")


def test_finished_folds_are_kept_and_others_computed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    features, files, known = make_files(distance=2)
    tasks = [task_of(fold, known) for fold in (1, 2, 3)]
    fitted: list[str] = []

    def counted(features: np.ndarray, files: Sequence[str], task: FoldTask, **options: object) -> FoldResult:
        if len(fitted) == 2 and not done:
            raise KeyboardInterrupt
        fitted.append(task.name)
        return classify_fold(features, files, task, **options)

    monkeypatch.setattr(audio_classification, "classify_fold", counted)
    done = False
    with pytest.raises(KeyboardInterrupt):
        classify_folds(features, files, tasks, tmp_path, {"features": "a"}, kind="map")
    done = True
    results = classify_folds(features, files, tasks, tmp_path, {"features": "a"}, kind="map")
    assert fitted == ["1", "2", "3"]
    for result, task in zip(results, tasks):
        fresh = classify_fold(features, files, task, kind="map")
        assert dataclasses.replace(result, scores=None, seconds=0) == dataclasses.replace(
            fresh, scores=None, seconds=0
        )
        np.testing.assert_array_equal(result.scores, fresh.scores)

    # Other features or another classifier are other results.
    classify_folds(features, files, tasks[:1], tmp_path, {"features": "b"}, kind="map")
    classify_folds(features, files, tasks[:1], tmp_path, {"features": "a"}, kind="map", classifier="svm")
    assert fitted == ["1", "2", "3", "1", "1"]
    for path in tmp_path.glob("*.json"):
        path.write_text("{}")
    with pytest.raises(ValueError, match=r"cannot be read .*; remove it and run again"):
        classify_folds(features, files, tasks, tmp_path, {"features": "a"}, kind="map")


def fold_result(name: str, hits: dict[str, bool]) -> FoldResult:
    """A result in which these files, all dogs of two classes, were told rightly or not."""
    return FoldResult(
        name=name,
        C=1.0,
        inner_accuracies={1.0: 1.0},
        converged=True,
        classifier_digest="",
        files=tuple(hits),
        labels=(0,) * len(hits),
        scores=np.array([[1.0, 0.0] if hit else [0.0, 1.0] for hit in hits.values()]),
        num_clips=(1,) * len(hits),
        seconds=0.0,
    )


def test_differences_are_paired_by_file() -> None:
    first = {"audio/1-1-A-0.wav": True, "audio/1-1-B-0.wav": True, "audio/1-2-A-0.wav": False}
    second = {"audio/2-3-A-0.wav": True}
    method = [fold_result("1", first), fold_result("2", second)]
    worse = [fold_result("1", dict.fromkeys(first, False)), fold_result("2", second)]
    # Files in another order, as another run may have read them.
    equal = [fold_result("1", dict(reversed(first.items()))), fold_result("2", second)]
    top1 = top1_metric(method)
    assert top1.value == pytest.approx((2 / 3 + 1) / 2) and top1.per_fold == pytest.approx((2 / 3, 1.0))
    assert top1.chance == 0.5
    low, high = top1.interval
    assert 0 <= low < 0.75 < high <= 1  # 3 of 4 files
    difference = difference_metric(method, [worse])
    assert difference.value == pytest.approx(1 / 3) and difference.per_fold == pytest.approx((2 / 3, 0.0))
    low, high = difference.interval
    assert low <= 0.5 <= high  # 2 of 4 files
    assert difference_metric(method, [equal]).value == 0.0
    assert difference_metric(method, [equal, worse]).value == pytest.approx(1 / 6)
    with pytest.raises(ValueError, match="fold 2: the methods were tested on different files"):
        difference_metric(method, [[worse[0], fold_result("2", {"other.wav": True})]])


def test_clips_of_one_recording_count_as_one() -> None:
    assert recording_of("audio/1-181071-A-40.wav") == recording_of("audio/1-181071-B-40.wav") == "1-181071"
    assert recording_of("scenes_stereo/bus01.wav") == "scenes_stereo/bus01.wav"
