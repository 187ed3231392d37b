"""tools.linear_probe as a user runs it: features kept, test labels without influence, random weights beside."""

import subprocess
from pathlib import Path

import numpy as np
import pytest
from action_videos import CLASSES, write_checkpoint, write_ucf101
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score
from sklearn.preprocessing import StandardScaler

from cmac.evaluation.probe import fit_linear_probe
from cmac.evaluation.results import read_results
from tools import linear_probe, retrieve


@pytest.fixture(scope="module")
def ucf101(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_ucf101(tmp_path_factory.mktemp("ucf101"))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("run"), 5)


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """What loaders remember of files goes into a folder of the test run."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))


def run(checkpoint: Path | str, data: Path, out: Path, *more: str) -> int:
    places = ["--data", str(data), "--out", str(out), "--results", str(out / "results.jsonl")]
    common = ["--workers", "0", "--device", "cpu", "--clips", "2", *places]
    return linear_probe.main([str(checkpoint), *common, *more])


def test_splits_their_mean_and_random_weights_are_reported(
    ucf101: Path, checkpoint: Path, tmp_path: Path
) -> None:
    assert run(checkpoint, ucf101, tmp_path, "--splits", "1", "2", "3") == 0
    results = read_results(tmp_path / "results.jsonl")
    assert [(result.split, result.checkpoint == "random") for result in results] == [
        (split, is_random) for split in ("1", "2", "3", "1-3 mean") for is_random in (False, True)
    ]
    assert len({result.checkpoint_digest for result in results}) == 2
    for result in results[:6]:
        assert (result.task, result.protocol) == ("linear-probe", "2x32f logistic")
        assert result.counts["num_videos"] == 6 and result.counts["num_training_videos"] == 12
        assert result.counts["num_clips"] == 36
        assert result.metrics["top1"].value > 0.6  # colors: chance is a third
        assert ("top1 above random weights" in result.metrics) == (result.checkpoint != "random")
    mean = results[6]
    assert mean.metrics["top1"].per_fold == tuple(result.metrics["top1"].value for result in results[:6:2])
    assert len(mean.config["chosen"]) == 3 and mean.counts["num_videos"] == 18


def test_accuracy_is_scikit_learns_on_the_same_features(
    ucf101: Path, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the chosen C, from the features themselves to the accuracy."""
    kept = {}

    def extract(*arguments, **options):
        kept["extracted"] = retrieve.extract(*arguments, **options)
        return kept["extracted"]

    monkeypatch.setattr(linear_probe, "extract", extract)
    assert run(checkpoint, ucf101, tmp_path, "--no-baseline-random") == 0
    (result,) = read_results(tmp_path / "results.jsonl")
    means, videos, labels = kept["extracted"].features.mean_per_video("trained")
    is_test = np.array([any(f"_g0{group}_" in video for group in (1, 2)) for video in videos])
    labels = np.array(labels)
    scaler = StandardScaler().fit(means[~is_test].astype(np.float64))
    model = LogisticRegression(C=result.config["chosen"][0]["C"], max_iter=5000)
    model.fit(scaler.transform(means[~is_test].astype(np.float64)), labels[~is_test])
    guesses = model.predict(scaler.transform(means[is_test].astype(np.float64)))
    assert result.metrics["top1"].value == accuracy_score(labels[is_test], guesses)
    assert is_test.sum() == 6 and set(labels) == set(CLASSES)


def test_test_labels_have_no_part_in_what_is_fitted(
    ucf101: Path, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The test videos' classes are exchanged among them: what is fitted stays, bit by bit, and the accuracy falls."""
    swapped = tmp_path / "swapped"
    subprocess.run(["cp", "-r", str(ucf101), str(swapped)], check=True)
    names = dict(zip(CLASSES, CLASSES[1:] + CLASSES[:1]))
    for group in (1, 2):
        videos = {name: swapped / f"UCF-101/{name}/v_{name}_g0{group}_c01.avi" for name in CLASSES}
        contents = {name: path.read_bytes() for name, path in videos.items()}
        for name, path in videos.items():
            path.write_bytes(contents[names[name]])
    fitted = []

    def fit(*arguments, **options):
        fitted.append(fit_linear_probe(*arguments, **options))
        return fitted[-1]

    monkeypatch.setattr(linear_probe, "fit_linear_probe", fit)
    accuracies = []
    for data, out in ((ucf101, tmp_path / "a"), (swapped, tmp_path / "b")):
        assert run(checkpoint, data, out, "--no-baseline-random") == 0
        accuracies.append(read_results(out / "results.jsonl")[0].metrics["top1"].value)
    np.testing.assert_array_equal(fitted[0].weights, fitted[1].weights)
    np.testing.assert_array_equal(fitted[0].mean, fitted[1].mean)
    assert fitted[0].C == fitted[1].C and fitted[0].fold_accuracies == fitted[1].fold_accuracies
    assert accuracies[1] < accuracies[0]


def test_features_are_read_once_and_kept(
    ucf101: Path, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(checkpoint, ucf101, tmp_path, "--splits", "1") == 0

    def nothing(*arguments):
        raise AssertionError("a clip was encoded again")

    monkeypatch.setattr(retrieve, "pooled_video_features", lambda networks, device: nothing)
    # Another split has the same videos: their features are there.
    assert run(checkpoint, ucf101, tmp_path, "--splits", "2", "--per-clip", "--classifier", "svm") == 0
    assert (
        retrieve.main(
            [
                str(checkpoint),
                "--data",
                str(ucf101),
                "--out",
                str(tmp_path),
                "--results",
                str(tmp_path / "r.jsonl"),
            ]
            + ["--workers", "0", "--device", "cpu", "--clips", "2"]
        )
        == 0
    )
    results = read_results(tmp_path / "results.jsonl")
    assert results[-1].protocol == "2x32f svm, per clip" and results[-1].split == "2"


def test_what_is_missing_is_counted_and_too_little_is_refused(
    ucf101: Path, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    data = tmp_path / "data"
    subprocess.run(["cp", "-r", str(ucf101), str(data)], check=True)
    for group in (1, 2):
        (data / f"UCF-101/Red/v_Red_g0{group}_c01.avi").unlink()
    assert run(f"random:{checkpoint}", data, tmp_path / "a") == 0
    (result,) = read_results(tmp_path / "a/results.jsonl")
    assert result.checkpoint == "random" and result.counts["skipped missing"] == 2
    assert result.counts["classes without test video"] == 1
    assert result.metrics["top1 skipped as wrong"].value == pytest.approx(
        result.metrics["top1"].value * 4 / 6
    )
    assert "1 of 3 classes have no test video: Red" in capsys.readouterr().out
    for name in ("Blue", "Green"):
        for group in (1, 2):
            (data / f"UCF-101/{name}/v_{name}_g0{group}_c01.avi").unlink()
    assert run(checkpoint, data, tmp_path / "b") == 1
    error = capsys.readouterr().err
    assert "0 usable test videos, expected at least 2 and 1" in error


@pytest.mark.slow
def test_real_videos_from_lists_to_a_result(
    real_data: Path, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """UCF101's own videos in reduced form: the protocol runs, nothing more is claimed. HMDB51's sample has one training
    video of each of its classes, and no second one of any."""
    assert run(checkpoint, real_data / "ucf101", tmp_path) == 0
    trained, untrained = read_results(tmp_path / "results.jsonl")
    for result in (trained, untrained):
        assert (result.counts["num_training_videos"], result.counts["num_videos"]) == (38, 23)
        assert result.metrics["largest class"].value == pytest.approx(6 / 23)
    assert run(checkpoint, real_data / "hmdb51", tmp_path, "--dataset", "hmdb51") == 1
    assert "one usable training video per class at most" in capsys.readouterr().err
    assert run(checkpoint, real_data / "hmdb51", tmp_path, "--dataset", "hmdb51", "--C", "1") == 0
    assert read_results(tmp_path / "results.jsonl")[-1].counts["num_videos"] == 2
