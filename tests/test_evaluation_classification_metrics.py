"""Accuracy of videos, retrieval by class and intervals, against scikit-learn, SciPy and cases worked by hand."""

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn import metrics as sklearn_metrics
from sklearn.neighbors import NearestNeighbors

from cmac.evaluation import retrieval
from cmac.evaluation.intervals import (
    bootstrap_interval,
    mean_interval,
    paired_difference_interval,
    proportion_interval,
)
from cmac.evaluation.metrics import (
    accuracy_metric,
    average_clips,
    class_accuracies,
    confusion_counts,
    mean_over_splits,
)
from cmac.evaluation.results import Metric

# --- clips to videos ---


def clips(num_videos: int = 60, num_classes: int = 7, seed: int = 0):
    """(logits, video ids, labels) of 3 to 6 clips per video, shuffled; some right, some wrong."""
    rng = np.random.default_rng(seed)
    ids, labels, rows = [], [], []
    for video in range(num_videos):
        label = int(rng.integers(num_classes))
        for _ in range(int(rng.integers(3, 7))):
            ids.append(f"v{video}")
            labels.append(label)
            rows.append(rng.normal(size=num_classes) * 2 + 1.5 * (np.arange(num_classes) == label))
    order = rng.permutation(len(ids))
    return np.array(rows)[order], [ids[i] for i in order], [labels[i] for i in order]


def test_softmax_and_raw_averages_of_a_case_worked_by_hand_disagree():
    # One clip is very sure of class 0, two are fairly sure of class 1. Mean logits: (4, 1.33): class 0. Softmax of
    # (8, 0) is (.9997, .0003), of (2, 2 + ln 3)... written out below: class 1 wins.
    scores = np.array([[8.0, 0.0], [0.0, np.log(3)], [0.0, np.log(3)]])
    softmax = average_clips(scores, ["v"] * 3, [1] * 3)
    sure = 1 / (1 + np.exp(-8.0))
    assert softmax.scores[0] == pytest.approx([(sure + 0.25 + 0.25) / 3, (1 - sure + 0.75 + 0.75) / 3])
    assert softmax.predicted.tolist() == [1] and softmax.accuracy() == 1.0
    raw = average_clips(scores, ["v"] * 3, [1] * 3, how="raw")
    assert raw.scores[0] == pytest.approx([8 / 3, 2 * np.log(3) / 3])
    assert raw.predicted.tolist() == [0] and raw.accuracy() == 0.0


@pytest.mark.parametrize("how", ["softmax", "raw"])
@pytest.mark.parametrize("k", [1, 2, 5])
def test_top_k_of_videos_is_that_of_scikit_learn(how, k):
    scores, ids, labels = clips()
    predictions = average_clips(scores, ids, labels, how)
    # Again, by another way: per video, by name.
    frame = torch.softmax(torch.tensor(scores), dim=1).numpy() if how == "softmax" else scores
    means = np.stack([frame[[name == video for name in ids]].mean(axis=0) for video in predictions.video_ids])
    truth = [labels[ids.index(video)] for video in predictions.video_ids]
    expected = sklearn_metrics.top_k_accuracy_score(truth, means, k=k, labels=range(7))
    assert predictions.accuracy(k) == pytest.approx(expected)
    assert 0.2 < expected < 1.0
    assert predictions.num_clips.sum() == len(ids)


def test_order_of_the_clips_does_not_matter():
    scores, ids, labels = clips()
    order = np.random.default_rng(1).permutation(len(ids))
    first = average_clips(scores, ids, labels)
    second = average_clips(scores[order], [ids[i] for i in order], [labels[i] for i in order])
    places = [second.video_ids.index(video) for video in first.video_ids]
    np.testing.assert_allclose(first.scores, second.scores[places], atol=1e-12)
    assert first.accuracy() == second.accuracy()


def test_of_equal_scores_the_first_class_is_predicted():
    # Four videos of four classes with the same scores everywhere: one class is named, one video is right.
    flat = average_clips(np.zeros((4, 4)), ["a", "b", "c", "d"], [0, 1, 2, 3])
    assert flat.predicted.tolist() == [0, 0, 0, 0]
    assert [flat.accuracy(k) for k in (1, 2, 3, 4)] == [0.25, 0.5, 0.75, 1.0]
    assert flat.correct(1).tolist() == (flat.predicted == flat.labels).tolist()


def test_large_logits_do_not_overflow():
    result = average_clips(np.array([[1e4, 0.0], [-1e4, 0.0]]), ["a", "b"], [0, 1])
    assert result.scores.tolist() == [[1.0, 0.0], [0.0, 1.0]]


@pytest.mark.parametrize(
    ("scores", "ids", "labels", "message"),
    [
        (
            [[0.0, float("nan")], [0.0, 1.0]],
            ["a", "b"],
            [0, 1],
            "1 of 2 clips hold NaN or infinity, first of a",
        ),
        ([[0.0, float("inf")]], ["a"], [0], "NaN or infinity"),
        ([[0.0, 1.0], [0.0, 1.0]], ["a", "a"], [0, 1], "a has the labels 0 and 1|a has the labels 1 and 0"),
        ([[0.0, 1.0]], ["a"], [2], "0 to 1"),
        ([[0.0, 1.0]], ["a"], [0.5], "whole numbers"),
        ([[0.0, 1.0]], ["a", "b"], [0], "2 video ids and 1 labels"),
        (np.zeros((0, 2)), [], [], "were all videos skipped"),
    ],
)
def test_scores_that_cannot_be_averaged_are_refused(scores, ids, labels, message):
    with pytest.raises(ValueError, match=message):
        average_clips(np.array(scores), ids, labels)


def test_unknown_average_and_k_are_refused():
    with pytest.raises(ValueError, match="how is 'max', expected one of softmax, raw"):
        average_clips(np.zeros((1, 2)), ["a"], [0], how="max")
    for k in (0, 3):
        with pytest.raises(ValueError, match=f"k is {k}, expected 1 to 2"):
            average_clips(np.zeros((1, 2)), ["a"], [0]).accuracy(k)


# --- classes and splits ---


def test_confusion_is_that_of_scikit_learn_and_its_trace_is_top_1():
    predictions = average_clips(*clips())
    counts = confusion_counts(predictions.labels, predictions.predicted, 9)
    expected = sklearn_metrics.confusion_matrix(predictions.labels, predictions.predicted, labels=range(9))
    assert np.array_equal(counts, expected)
    assert counts.trace() / counts.sum() == pytest.approx(predictions.accuracy())
    with pytest.raises(ValueError, match="expected 0 to 1"):
        confusion_counts([0, 2], [0, 0], 2)


def test_class_without_test_video_is_reported_and_does_not_count():
    # a: 1 of 2, b: no video (though it is predicted once), c: 1 of 1.
    result = class_accuracies(confusion_counts([0, 0, 2], [0, 1, 2], 3), ["a", "b", "c"])
    assert result.per_class == {"a": 0.5, "c": 1.0}
    assert result.without_videos == ("b",)
    assert result.mean == 0.75
    with pytest.raises(ValueError, match="no class has a test video"):
        class_accuracies(np.zeros((2, 2), dtype=int), ["a", "b"])


def test_mean_of_class_accuracies_is_scikit_learns_balanced_accuracy():
    predictions = average_clips(*clips())
    counts = confusion_counts(predictions.labels, predictions.predicted, 7)
    expected = sklearn_metrics.balanced_accuracy_score(predictions.labels, predictions.predicted)
    assert class_accuracies(counts, list("abcdefg")).mean == pytest.approx(expected)


def test_splits_count_alike_and_keep_their_values():
    splits = [{"top1": Metric(value=value, chance=0.25)} for value in (0.5, 0.6, 0.7)]
    mean = mean_over_splits(splits)["top1"]
    assert mean.value == pytest.approx(0.6) and mean.per_fold == (0.5, 0.6, 0.7) and mean.chance == 0.25
    # By hand: standard deviation 0.1, t(2 degrees, 97.5 %) = 4.303.
    assert mean.interval == pytest.approx((0.6 - 4.303 * 0.1 / 3**0.5, 0.6 + 4.303 * 0.1 / 3**0.5), abs=1e-4)
    with pytest.raises(ValueError, match="split 2 has the metrics"):
        mean_over_splits([splits[0], {"top5": Metric(value=0.1)}])
    with pytest.raises(ValueError, match="no splits"):
        mean_over_splits([])


def test_accuracy_metric_has_chance_and_the_interval_of_its_unit():
    predictions = average_clips(*clips())
    metric = accuracy_metric(predictions, k=2)
    assert metric.value == predictions.accuracy(2) and metric.chance == pytest.approx(2 / 7)
    low, high = metric.interval
    assert low < metric.value < high
    # Two clones of every video tell nothing new: the interval over recordings stays, the one over videos shrinks.
    scores, ids, labels = clips()
    twice = average_clips(np.tile(scores, (2, 1)), ids + [f"{name}'" for name in ids], labels + labels)
    by_video = accuracy_metric(twice).interval
    by_recording = accuracy_metric(twice, groups=[name.strip("'") for name in twice.video_ids]).interval
    once = accuracy_metric(predictions).interval
    assert by_video[1] - by_video[0] < 0.8 * (once[1] - once[0])
    assert by_recording[1] - by_recording[0] == pytest.approx(once[1] - once[0], rel=0.15)


# --- retrieval by class ---


def test_class_recall_of_a_case_worked_by_hand():
    # Directions in the plane; lengths must not matter. Query 0 (class a, 0 degrees) has b at 10 and a at 20: rank 2.
    # Query 1 (class b, 90 degrees) has b at 80: rank 1. Query 2 (class c): none in the gallery.
    def at(degrees, length):
        return [length * np.cos(np.radians(degrees)), length * np.sin(np.radians(degrees))]

    gallery = torch.tensor([at(10, 9.0), at(20, 0.1), at(80, 1.0)])
    query = torch.tensor([at(0, 2.0), at(90, 0.5), at(180, 1.0)])
    assert retrieval.class_ranks(query, list("abc"), gallery, list("bab")).tolist() == [2, 1, 4]
    recall = retrieval.class_recall(query, list("abc"), gallery, list("bab"), (1, 2, 3, 50))
    assert recall == pytest.approx({1: 1 / 3, 2: 2 / 3, 3: 2 / 3, 50: 2 / 3})


def test_class_recall_is_that_of_scikit_learns_neighbours():
    generator = torch.Generator().manual_seed(0)
    centers = torch.randn(12, 16, generator=generator)
    query_labels = torch.randint(12, (700,), generator=generator).tolist()  # more than one chunk of queries
    gallery_labels = torch.randint(12, (400,), generator=generator).tolist()
    query = centers[query_labels] + 2.5 * torch.randn(700, 16, generator=generator)
    gallery = centers[gallery_labels] + 2.5 * torch.randn(400, 16, generator=generator)
    _, neighbors = (
        NearestNeighbors(n_neighbors=20, metric="cosine").fit(gallery.numpy()).kneighbors(query.numpy())
    )
    same = np.array(gallery_labels)[neighbors] == np.array(query_labels)[:, None]
    recall = retrieval.class_recall(query, query_labels, gallery, gallery_labels, (1, 5, 10, 20))
    assert recall == pytest.approx({k: same[:, :k].any(axis=1).mean() for k in (1, 5, 10, 20)})
    assert 0.1 < recall[1] < recall[5] < 0.99


def test_one_feature_for_all_videos_finds_a_class_last():
    same = torch.ones(6, 3)
    ranks = retrieval.class_ranks(same[:2], ["a", "b"], same, ["a", "a", "b", "b", "b", "b"])
    assert ranks.tolist() == [5, 3]  # behind all entries of the other class


def test_chance_of_class_recall_is_what_a_random_order_gives():
    rng = np.random.default_rng(0)
    query_labels, gallery_labels = ["a"] * 5 + ["b"] * 2 + ["c"], ["a"] * 3 + ["b"] * 9
    chance = retrieval.class_recall_chance(query_labels, gallery_labels, (1, 2, 100))
    # By hand, k = 1: a has 3 of 12, b 9 of 12, c none: (5 * 3/12 + 2 * 9/12) / 8.
    assert chance[1] == pytest.approx((5 * 3 / 12 + 2 * 9 / 12) / 8)
    draws = [
        np.mean([label in rng.permutation(gallery_labels)[:2] for label in query_labels]) for _ in range(4000)
    ]
    assert chance[2] == pytest.approx(np.mean(draws), abs=0.01)
    assert chance[100] == pytest.approx(7 / 8)


def test_class_retrieval_refuses_what_has_no_cosine():
    rows = torch.ones(2, 3)
    with pytest.raises(ValueError, match="row 1 of gallery is all zeros"):
        retrieval.class_ranks(rows, ["a", "b"], torch.tensor([[1.0, 0, 0], [0, 0, 0]]), ["a", "b"])
    with pytest.raises(ValueError, match="query holds NaN"):
        retrieval.class_ranks(rows * float("nan"), ["a", "b"], rows, ["a", "b"])
    with pytest.raises(ValueError, match="2 rows of query and 1 labels"):
        retrieval.class_ranks(rows, ["a"], rows, ["a", "b"])
    with pytest.raises(ValueError, match=r"\(2, 3\) and gallery \(2, 4\)"):
        retrieval.class_ranks(rows, ["a", "b"], torch.ones(2, 4), ["a", "b"])
    with pytest.raises(ValueError, match="gallery is empty"):
        retrieval.class_ranks(rows, ["a", "b"], rows[:0], [])
    with pytest.raises(ValueError, match="k is 0"):
        retrieval.class_recall(rows, ["a", "b"], rows, ["a", "b"], (0,))


# --- intervals ---


@pytest.mark.parametrize(("hits", "total"), [(0, 40), (1, 40), (7, 13), (40, 40), (3000, 3783)])
@pytest.mark.parametrize("level", [0.9, 0.95])
def test_proportion_interval_is_scipys_wilson_interval(hits, total, level):
    expected = stats.binomtest(hits, total).proportion_ci(level, method="wilson")
    assert proportion_interval(hits, total, level) == pytest.approx((expected.low, expected.high))


def test_proportion_interval_of_nothing_is_none_and_of_nonsense_refused():
    assert proportion_interval(0, 0) is None
    with pytest.raises(ValueError, match="5 hits among 4"):
        proportion_interval(5, 4)


def test_proportion_interval_covers_the_truth_as_often_as_it_says():
    """Over all outcomes of 100 videos, weighted by how probable each is."""
    for truth in (0.05, 0.3, 0.5):
        covered = sum(
            stats.binom.pmf(hits, 100, truth)
            for hits in range(101)
            if proportion_interval(hits, 100)[0] <= truth <= proportion_interval(hits, 100)[1]
        )
        assert 0.93 < covered < 0.98


def test_mean_interval_is_scipys_t_interval():
    values = [0.71, 0.74, 0.69, 0.80, 0.75]
    expected = stats.t.interval(0.95, 4, loc=np.mean(values), scale=stats.sem(values))
    assert mean_interval(values) == pytest.approx(expected)
    assert mean_interval([0.5]) is None and mean_interval([]) is None
    assert mean_interval([0.5, 0.5, 0.5]) is None  # no spread seen: no interval of no width
    with pytest.raises(ValueError, match="finite"):
        mean_interval([0.5, float("nan")])


def test_paired_interval_is_narrower_than_two_separate_ones():
    rng = np.random.default_rng(0)
    a = (rng.random(300) < 0.6).astype(float)
    b = a.copy()
    b[:15] = 1 - b[:15]
    low, high = paired_difference_interval(a, b, list(range(300)))
    separate = bootstrap_interval(a.tolist(), list(range(300)))
    assert low < a.mean() - b.mean() < high
    assert high - low < 0.6 * (separate[1] - separate[0])


def test_paired_interval_is_the_normal_one_of_the_differences():
    rng = np.random.default_rng(1)
    a, b = rng.random(500), rng.random(500)
    difference = a - b
    half = 1.96 * difference.std(ddof=1) / 500**0.5
    result = paired_difference_interval(a, b, list(range(500)))
    assert result == pytest.approx((difference.mean() - half, difference.mean() + half), abs=0.1 * half)
    reverse = paired_difference_interval(b, a, list(range(500)))
    assert reverse == pytest.approx((-result[1], -result[0]), abs=1e-12)


def test_paired_interval_agrees_with_scipys_bootstrap():
    rng = np.random.default_rng(2)
    a, b = (rng.random(80) < 0.7).astype(float), (rng.random(80) < 0.5).astype(float)
    expected = stats.bootstrap(
        (a - b,), np.mean, n_resamples=20_000, method="percentile", rng=np.random.default_rng(0)
    ).confidence_interval
    result = paired_difference_interval(a, b, list(range(80)))
    assert result == pytest.approx((expected.low, expected.high), abs=0.02)


def test_paired_interval_over_videos_is_wider_when_their_clips_agree():
    rng = np.random.default_rng(3)
    a = np.repeat(rng.random(30) < 0.6, 10).astype(float)
    b = np.repeat(rng.random(30) < 0.6, 10).astype(float)
    by_video = paired_difference_interval(a, b, [index // 10 for index in range(300)])
    by_clip = paired_difference_interval(a, b, list(range(300)))
    assert by_video[1] - by_video[0] > 2 * (by_clip[1] - by_clip[0])


def test_methods_that_agree_everywhere_may_still_differ():
    room = stats.binomtest(0, 40).proportion_ci(0.95, method="exact").high
    ones, zeros, names = [1.0] * 40, [0.0] * 40, list(range(40))
    assert paired_difference_interval(ones, ones, names) == pytest.approx((-room, room))
    assert paired_difference_interval(ones, zeros, names) == pytest.approx((1 - 2 * room, 1.0))
    assert paired_difference_interval(zeros, ones, names) == pytest.approx((-1.0, 2 * room - 1))
    # Two clips of each of 20 videos are 20 observations.
    assert paired_difference_interval(ones, ones, [name // 2 for name in names])[1] > room


def test_paired_interval_refuses_what_it_cannot_pair():
    assert paired_difference_interval([], [], []) is None
    with pytest.raises(ValueError, match="2 and 1 values and 2 groups"):
        paired_difference_interval([0.0, 1.0], [0.0], [0, 1])
    for value in (87.2, float("nan")):
        with pytest.raises(ValueError, match="outside 0..1"):
            paired_difference_interval([value], [0.5], [0])
