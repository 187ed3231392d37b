"""Linear probes are scikit-learn's classifiers, chosen and fitted without sight of any test data."""

import dataclasses
import warnings

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score
from sklearn.model_selection import GridSearchCV, PredefinedSplit
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import LinearSVC

from cmac.evaluation.probe import fit_linear_probe, mean_per_item, source_group


def clusters(
    num_rows: int, dim: int = 6, num_classes: int = 3, noise: float = 1.0, seed: int = 0
) -> tuple[np.ndarray, list[str]]:
    """Rows around one center per class, with columns of very different scale."""
    rng = np.random.default_rng(seed)
    centers = np.random.default_rng(99).normal(size=(num_classes, dim))
    targets = np.arange(num_rows) % num_classes
    rows = centers[targets] + noise * rng.normal(size=(num_rows, dim))
    rows = 5.0 + rows * 10.0 ** (np.arange(dim) % 3)
    return rows.astype(np.float32), [f"class {number}" for number in targets]


@pytest.mark.parametrize("num_classes", [2, 4])
@pytest.mark.parametrize("classifier", ["logistic", "svm"])
def test_probe_is_scikit_learns_classifier_behind_a_scaler_of_training_rows(
    classifier: str, num_classes: int
) -> None:
    train, labels = clusters(60, num_classes=num_classes)
    test, _ = clusters(40, num_classes=num_classes, seed=1)
    probe = fit_linear_probe(train, labels, classifier=classifier, candidates=[0.1])
    model = LogisticRegression(C=0.1, max_iter=2000) if classifier == "logistic" else LinearSVC(C=0.1)
    theirs = make_pipeline(StandardScaler(), model).fit(train.astype(np.float64), labels)
    if classifier == "logistic":
        expected = theirs.predict_proba(test)
    else:
        expected = theirs.decision_function(test)
        if num_classes == 2:
            expected = np.stack([-expected, expected], axis=1)
    np.testing.assert_allclose(probe.scores(test), expected, atol=5e-3)
    assert probe.predict(test) == list(theirs.predict(test))
    assert probe.classes == tuple(theirs.classes_) and probe.converged and probe.num_folds == 0


@pytest.mark.parametrize("classifier", ["logistic", "svm"])
def test_c_is_the_one_that_grid_search_over_the_same_folds_chooses(classifier: str) -> None:
    train, labels = clusters(60, noise=2.5)
    train = StandardScaler().fit_transform(train.astype(np.float64))
    folds = np.arange(60) // 3 % 4
    candidates = (1e-4, 1e-2, 1.0, 100.0)
    probe = fit_linear_probe(
        train, labels, folds=folds.tolist(), classifier=classifier, candidates=candidates, standardize=False
    )
    model = LogisticRegression(max_iter=2000) if classifier == "logistic" else LinearSVC(random_state=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        search = GridSearchCV(model, {"C": candidates}, cv=PredefinedSplit(folds), scoring="accuracy")
        search.fit(train, labels)
    expected = dict(zip(candidates, search.cv_results_["mean_test_score"]))
    assert probe.fold_accuracies == pytest.approx(expected)
    assert probe.C == min(c for c in candidates if expected[c] > max(expected.values()) - 1e-9)
    assert probe.num_folds == 4


def test_more_dimensions_than_rows_give_the_same_classifier_as_fitting_all_dimensions() -> None:
    train, labels = clusters(24, dim=90)
    test, _ = clusters(30, dim=90, seed=1)
    probe = fit_linear_probe(train, labels, candidates=[0.01])
    theirs = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=2000, tol=1e-6))
    theirs.fit(train.astype(np.float64), labels)
    np.testing.assert_allclose(probe.scores(test), theirs.predict_proba(test), atol=1e-3)


def test_rows_of_a_group_never_lie_on_both_sides_of_a_fold() -> None:
    """Features that tell the group and nothing else: who mixes groups over folds measures 100 %."""
    rng = np.random.default_rng(0)
    groups = np.repeat(np.arange(24), 5)
    rows = np.eye(24)[groups] + 0.01 * rng.normal(size=(120, 24))
    labels = [f"class {number}" for number in rng.permutation(np.repeat(np.arange(4), 6))[groups]]
    mixed = fit_linear_probe(rows, labels)
    apart = fit_linear_probe(rows, labels, groups=groups.tolist())
    assert max(mixed.fold_accuracies.values()) == 1.0
    assert max(apart.fold_accuracies.values()) < 0.6


def test_c_is_judged_by_the_mean_score_of_an_items_rows() -> None:
    rows, labels = clusters(30, noise=1.0)
    rng = np.random.default_rng(3)
    items = np.repeat(np.arange(30), 8).tolist()
    clips = rows[items] + 8.0 * rng.normal(size=(240, rows.shape[1])) * 10.0 ** (np.arange(6) % 3)
    clip_labels = [labels[item] for item in items]
    by_row = fit_linear_probe(clips, clip_labels, groups=items)
    by_item = fit_linear_probe(clips, clip_labels, items=items)
    assert max(by_item.fold_accuracies.values()) > max(by_row.fold_accuracies.values())
    assert all(value * 30 == pytest.approx(round(value * 30)) for value in by_item.fold_accuracies.values())


def test_test_labels_cannot_influence_what_is_fitted() -> None:
    """Whatever the test rows' labels are, classifier, C and scores are the same; the accuracy follows the labels."""
    train, labels = clusters(60, noise=2.0)
    test, truth = clusters(60, noise=2.0, seed=1)
    results = []
    for seed in (None, 0, 1):
        test_labels = list(truth) if seed is None else np.random.default_rng(seed).permutation(truth).tolist()
        probe = fit_linear_probe(train, labels)
        scores = probe.scores(test)
        accuracy = accuracy_score(test_labels, [probe.classes[index] for index in scores.argmax(axis=1)])
        results.append((probe, scores, accuracy))
    for probe, scores, accuracy in results[1:]:
        for field in dataclasses.fields(probe):
            np.testing.assert_equal(getattr(probe, field.name), getattr(results[0][0], field.name))
        np.testing.assert_array_equal(scores, results[0][1])
        assert accuracy < results[0][2]


def test_labels_without_relation_to_the_features_give_chance() -> None:
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(400, 20))
    labels = rng.integers(0, 4, 400).astype(str).tolist()
    probe = fit_linear_probe(rows[:200], labels[:200])
    assert accuracy_score(labels[200:], probe.predict(rows[200:])) < 0.36


def test_scores_are_standardised_by_the_training_rows_whatever_is_scored_beside() -> None:
    train, labels = clusters(60)
    test, _ = clusters(40, seed=1)
    probe = fit_linear_probe(train, labels, candidates=[1.0])
    np.testing.assert_allclose(probe.mean, train.mean(axis=0), rtol=1e-5)
    np.testing.assert_array_equal(
        probe.scores(test)[:3], probe.scores(np.concatenate([test[:3], 1e3 * test]))[:3]
    )


def test_constant_dimensions_are_harmless() -> None:
    train, labels = clusters(60)
    train[:, 2] = 0.1
    probe = fit_linear_probe(train, labels, candidates=[1.0])
    assert probe.scale[2] == 1.0 and np.isfinite(probe.scores(train)).all()


def test_a_class_that_a_fold_lacks_counts_as_wrong_there_and_stops_nothing() -> None:
    train, labels = clusters(40, noise=0.1)
    labels[7] = "seen once"
    probe = fit_linear_probe(train, labels)
    assert "seen once" in probe.classes
    assert 0.9 < max(probe.fold_accuracies.values()) < 1.0


def test_means_per_item_are_in_the_order_items_first_come() -> None:
    scores = np.array([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]])
    means, items, index = mean_per_item(scores, ["b", "a", "b"])
    assert items == ["b", "a"] and index.tolist() == [0, 1, 0]
    np.testing.assert_array_equal(means, [[0.5, 0.0], [0.0, 1.0]])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"classifier": "tree"}, "classifier is 'tree', expected logistic or svm"),
        ({"candidates": []}, "candidates for C are \\(\\), expected at least one"),
        ({"candidates": [0.0, 1.0]}, "all above 0"),
        ({"groups": ["one"] * 60}, "1 group\\(s\\) of rows, 20 row\\(s\\) of the largest class"),
        ({"groups": ["a"]}, "1 groups for 60 rows of features"),
        ({"groups": ["a"] * 60, "folds": [0] * 60}, "both groups and folds"),
        ({"folds": [0] * 60}, "none of 1 folds leaves two classes"),
        ({"labels": ["same"] * 60}, "all 60 rows are of class 'same'"),
        ({"features": np.full((60, 6), np.nan)}, "60 of 60 rows hold values that are not finite"),
        ({"features": np.zeros((60, 2, 3))}, "expected \\(rows, dimensions\\)"),
        ({"features": np.zeros((0, 6)), "labels": []}, "no rows"),
    ],
)
def test_what_cannot_be_fitted_is_refused_by_name(change: dict, message: str) -> None:
    train, labels = clusters(60)
    with pytest.raises(ValueError, match=message):
        fit_linear_probe(**{"features": train, "labels": labels, **change})


def test_features_of_another_size_are_refused() -> None:
    train, labels = clusters(60)
    probe = fit_linear_probe(train, labels, candidates=[1.0])
    with pytest.raises(ValueError, match="features have 5 dimensions, expected 6"):
        probe.scores(train[:, :5])


@pytest.mark.parametrize(
    ("video_id", "label", "group"),
    [
        ("UCF-101/Punch/v_Punch_g08_c01.avi", "Punch", "Punch g08"),
        ("UCF-101/Punch/v_Punch_g08_c07.avi", "Punch", "Punch g08"),
        ("UCF-101/PushUps/v_PushUps_g08_c01.avi", "PushUps", "PushUps g08"),
        ("hmdb51_org/wave/RATRACE_wave_f_nm_np1_fr_goo_37.avi", "wave", "RATRACE"),
        ("hmdb51_org/shoot_bow/6arrows_shoot_bow_f_nm_np1_fr_med_3.avi", "shoot_bow", "6arrows"),
        ("hmdb51_org/golf/Tips!!!_golf_golf_f_nm_np1_fr_med_0.avi", "golf", "Tips!!!_golf"),
        ("other/film.mp4", None, "other/film.mp4"),
    ],
)
def test_videos_cut_from_one_source_are_a_group(video_id: str, label: str | None, group: str) -> None:
    assert source_group(video_id, label) == group
