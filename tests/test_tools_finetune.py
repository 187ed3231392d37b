"""tools.finetune as a user runs it: splits in UCF101's layout to results, killed, with videos that cannot be used."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from action_videos import CLASSES, write_checkpoint, write_color_video, write_ucf101
from fake_runs import FakeLoader
from sklearn.metrics import accuracy_score, top_k_accuracy_score

from cmac.evaluation.features import extract_features
from cmac.evaluation.results import read_results
from cmac.finetune import PRESETS, FinetuneConfig
from loaders.base import TooManyBadClips
from shards.sources import with_hashes
from tools import finetune
from tools.finetune import constant_guess, split_metrics

ROOT = Path(__file__).resolve().parents[1]
TINY = (
    "--encoder.widths 4 8 --encoder.blocks 1 1 --encoder.stem-width 4 --video.num-frames 4 --video.short-side 36 "
    "--video.crop-size 32 --batch-size 4 --clips-per-video 2 --test-clips 2 --num-workers 0 --cpu-threads 1"
).split()


@pytest.fixture(scope="module")
def ucf101(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes, three splits: of each class four training and two test videos."""
    return write_ucf101(tmp_path_factory.mktemp("ucf101"))


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """What loaders remember of files goes into a folder of the test run."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))


def arguments(data: Path, out: Path, *more: str) -> list[str]:
    start = ["finetune-tiny", "--checkpoint", "scratch", "--data", str(data), "--out", str(out)]
    return [*start, "--results", str(out / "results.jsonl"), *TINY, *more]


def settings(data: Path, out: Path, *more: str) -> FinetuneConfig:
    return finetune.parse(arguments(data, out, *more))


def weights(out: Path, split: str = "1") -> dict[str, torch.Tensor]:
    (path,) = (out / f"split{split}/checkpoints").glob("step_*.pt")
    return torch.load(path, weights_only=True)["model"]


def test_three_splits_give_three_results_and_their_mean(ucf101: Path, tmp_path: Path) -> None:
    schedule = ["--epochs", "3", "--optimizer.learning-rate", "0.01"]
    assert finetune.main(arguments(ucf101, tmp_path, "--splits", "1", "2", "3", *schedule)) == 0
    *splits, mean = read_results(tmp_path / "results.jsonl")
    assert [result.split for result in (*splits, mean)] == ["1", "2", "3", "1-3 mean"]
    for result in splits:
        assert (result.task, result.dataset, result.checkpoint) == ("action-recognition", "ucf101", "random")
        assert result.protocol.startswith("finetune-tiny with ") and "splits" not in result.protocol
        assert result.counts["num_videos"] == 6 and result.counts["num_clips"] == 12
        assert result.counts["num_training_videos"] == 12 and result.config["epochs"] == 3
        assert result.metrics["top1"].chance == result.metrics["even guess"].value == pytest.approx(1 / 3)
        assert result.metrics["top1"].value == result.metrics["top1 skipped as wrong"].value
        assert result.metrics[finetune.BEST_EPOCH].value >= result.metrics["top1"].value
    top1 = [result.metrics["top1"].value for result in splits]
    assert mean.metrics["top1"].value == pytest.approx(np.mean(top1)) and mean.metrics[
        "top1"
    ].per_fold == tuple(top1)
    assert mean.metrics["top1"].value > 0.6  # colors: chance is a third
    assert (
        mean.counts["num_videos"] == 18 and len({result.checkpoint_digest for result in (*splits, mean)}) == 1
    )

    # Started again, nothing is trained, and nothing is added.
    before = (tmp_path / "results.jsonl").read_bytes()
    assert finetune.main(arguments(ucf101, tmp_path, "--splits", "1", "2", "3", *schedule)) == 0
    assert (tmp_path / "results.jsonl").read_bytes() == before
    # Split by split, in any order, the mean comes with the last one.
    assert finetune.main(arguments(ucf101, tmp_path, "--splits", "2", *schedule)) == 0
    assert (tmp_path / "results.jsonl").read_bytes() == before


def test_accuracies_are_what_scikit_learn_makes_of_the_kept_logits(ucf101: Path, tmp_path: Path) -> None:
    (result,) = finetune.run(settings(ucf101, tmp_path, "--epochs", "1"))
    store = tmp_path / "split1/tests/epoch_001"
    identity = json.loads((store / "identity.json").read_text())
    identity.pop("version")
    features = extract_features([], lambda batch: {}, store, identity)
    logits, videos, labels = features.arrays["logits"], features.video_ids, features.labels
    exponentials = np.exp(logits.astype(np.float64))
    softmax = exponentials / exponentials.sum(axis=1, keepdims=True)
    names = sorted(set(videos))
    scores = np.stack([softmax[[video == name for video in videos]].mean(axis=0) for name in names])
    truth = [CLASSES.index(dict(zip(videos, labels))[name]) for name in names]
    assert result.metrics["top1"].value == accuracy_score(truth, scores.argmax(axis=1))
    assert len(names) == 6 and len(videos) == 12


def test_the_batch_that_spends_the_budget_of_bad_clips_is_listed(
    ucf101: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    (batch,) = islice(FakeLoader(), 3, 4)

    def spend(*arguments: object) -> None:
        raise TooManyBadClips("1 of 4 clips are bad", batch)

    monkeypatch.setattr(finetune, "finetune", spend)
    assert finetune.main(arguments(ucf101, tmp_path)) == 1
    assert "tools.finetune: 1 of 4 clips are bad" in capsys.readouterr().err
    (line,) = (tmp_path / "split1/bad_clips.jsonl").read_text().splitlines()
    assert json.loads(line) == {"epoch": 0, "step": 3, "key": "d", "shard": "s", "reason": "decode-error"}


@pytest.mark.slow
def test_a_run_killed_at_random_moments_ends_as_one_that_was_not(ucf101: Path, tmp_path: Path) -> None:
    """SIGKILL, wherever it strikes: while it starts, trains, saves or tests."""
    more = (
        "--epochs",
        "4",
        "--dropout",
        "0.5",
        "--checkpoint-every",
        "2",
        "--log-every",
        "1",
        "--num-workers",
        "1",
    )
    assert finetune.main(arguments(ucf101, tmp_path / "whole", *more)) == 0
    command = [sys.executable, "-m", "tools.finetune", *arguments(ucf101, tmp_path / "killed", *more)]
    rng = random.Random(0)
    log, kills = tmp_path / "killed/split1/log.jsonl", 0
    for _ in range(2):
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
        )
        seen = log.stat().st_size if log.exists() else 0
        deadline = time.monotonic() + 120
        while process.poll() is None and time.monotonic() < deadline:
            if log.exists() and log.stat().st_size > seen:  # it trains
                time.sleep(rng.uniform(0, 0.6))
                break
            time.sleep(0.02)
        kills += process.poll() is None
        os.killpg(process.pid, signal.SIGKILL) if process.poll() is None else None
        process.wait()
    assert kills >= 1
    assert finetune.main(arguments(ucf101, tmp_path / "killed", *more)) == 0
    expected, found = (read_results(tmp_path / name / "results.jsonl")[-1] for name in ("whole", "killed"))
    assert (found.metrics, found.counts) == (expected.metrics, expected.counts)
    for name, value in weights(tmp_path / "whole").items():
        assert torch.equal(weights(tmp_path / "killed")[name], value), name
    rows = [
        [json.loads(line) for line in (tmp_path / name / "split1/log.jsonl").open()]
        for name in ("whole", "killed")
    ]
    assert [(row["step"], row["loss"]) for row in rows[0]] == [(row["step"], row["loss"]) for row in rows[1]]


@pytest.fixture(scope="module")
def damaged(ucf101: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Split 1 with a missing, a short and an unreadable test video, a short training video, and a fourth class that
    has training videos only."""
    folder = tmp_path_factory.mktemp("damaged")
    subprocess.run(["cp", "-r", f"{ucf101}/.", str(folder)], check=True)
    videos, lists = folder / "UCF-101", folder / "ucfTrainTestlist"
    (videos / "Blue/v_Blue_g01_c01.avi").unlink()
    write_color_video(videos / "Green/v_Green_g01_c01.avi", 1, 3, num_frames=31)
    (videos / "Green/v_Green_g02_c01.avi").write_bytes(b"RIFF no video at all")
    write_color_video(videos / "Red/v_Red_g06_c01.avi", 0, 3, num_frames=20)
    write_color_video(videos / "Gray/v_Gray_g01_c01.avi", 0, 5)
    with open(lists / "classInd.txt", "a") as file:
        file.write("4 Gray\n")
    with open(lists / "trainlist01.txt", "a") as file:
        file.write("Gray/v_Gray_g01_c01.avi 4\n")
    return folder


def test_videos_that_cannot_be_used_are_counted_by_reason_and_reported_both_ways(
    damaged: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (result,) = finetune.run(settings(damaged, tmp_path, "--epochs", "1", "--clip-seconds", "None"))
    counts = result.counts
    assert counts["num_videos"] == 3 and counts["num_training_videos"] == 12
    assert sum(count for name, count in counts.items() if name.startswith("skipped ")) == 3
    assert counts["skipped missing"] == 1 and counts["skipped too-short"] == 1
    assert counts["training skipped too-short"] == 1
    # Gray never had a test video, of Green none is left.
    assert counts["classes without test video"] == 2 and counts["classes without training video"] == 0
    hits = result.metrics["top1"].value * 3
    assert result.metrics["top1 skipped as wrong"].value == pytest.approx(hits / 6)
    printed = capsys.readouterr().out
    assert "not used: 3" in printed and "v_Green_g01_c01.avi (too-short)" in printed
    assert "2 of 4 classes have no test video: Green, Gray" in printed


def test_a_split_without_usable_test_video_is_refused_before_anything_is_trained(
    ucf101: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    data = tmp_path / "data"
    subprocess.run(["cp", "-r", str(ucf101), str(data)], check=True)
    for name in CLASSES:
        for group in (5, 6):  # the test videos of split 3
            (data / f"UCF-101/{name}/v_{name}_g0{group}_c01.avi").write_bytes(b"")
    out = tmp_path / "out"
    assert finetune.main(arguments(data, out, "--splits", "1", "3")) == 1
    assert "ucf101 split 3, test: " in capsys.readouterr().err
    assert not (out / "split1/checkpoints").exists()


def test_gdts_variant_runs_with_three_crops_and_raw_logits(ucf101: Path, tmp_path: Path) -> None:
    command = [
        "finetune-ucf101-gdt", "--checkpoint", "scratch", "--data", str(ucf101), "--out", str(tmp_path), "--results",
        str(tmp_path / "r.jsonl"), *TINY, "--epochs", "1", "--splits", "1", "--device", "cpu",
    ]  # fmt: skip
    assert finetune.main(command) == 0
    (result,) = read_results(tmp_path / "r.jsonl")
    assert result.counts["num_clips"] == 6 * 2 * 3
    assert result.protocol.startswith("finetune-ucf101-gdt with ")


def test_a_pretrained_network_its_random_twin_and_other_weights_in_the_same_folder(
    ucf101: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """The encoder is the checkpoint's, with its pixel statistics; a folder belongs to one set of weights."""
    digests = set()
    runs = [str(write_checkpoint(tmp_path / f"run{seed}", seed)) for seed in (5, 6)]

    def run(checkpoint: str, out: str, split: str = "1") -> int:
        values = arguments(ucf101, tmp_path / out, "--epochs", "1", "--max-videos", "6", "--splits", split)
        values[values.index("--checkpoint") + 1] = checkpoint
        return finetune.main(values)

    for checkpoint, out in ((runs[0], "a"), (f"random:{runs[0]}", "b")):
        assert run(checkpoint, out) == 0
        (result,) = read_results(tmp_path / out / "results.jsonl")
        digests.add(result.checkpoint_digest)
        assert (result.checkpoint == "random") == (out == "b")
        assert result.protocol.startswith("finetune-tiny with ") and "max_videos=6" in result.protocol
        assert result.counts["num_videos"] == 6 and result.counts["num_training_videos"] == 6
    assert len(digests) == 2
    assert run(runs[1], "a") == 1
    assert "choose another --out" in capsys.readouterr().err
    # A run folder whose newest checkpoint is another one by now: no mean over splits of two networks.
    Path(runs[0]).rename(tmp_path / "before")
    Path(runs[1]).rename(runs[0])
    assert run(runs[0], "a", split="2") == 1
    assert "split1 was started with other weights" in capsys.readouterr().err
    assert not (tmp_path / "a/split2").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"--checkpoint": ""}, "checkpoint is empty, expected weights"),
        ({"--checkpoint": "nowhere"}, "nowhere"),
        ({"--data": "/nowhere"}, "/nowhere"),
        ({"--data": ""}, "data is empty"),
        ({"--batch-size": "500"}, "global_batch_size is 500"),
        ({"--results": __file__}, "line 1: not JSON"),
    ],
)
def test_what_cannot_work_is_said_in_one_line(
    ucf101: Path, tmp_path: Path, capsys: pytest.CaptureFixture, change: dict, message: str
) -> None:
    values = arguments(ucf101, tmp_path)
    for name, value in change.items():
        values[values.index(name) + 1] = value
    assert finetune.main(values) == 1
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error


def test_presets_are_listed_and_a_misspelt_one_is_guessed(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as end:
        finetune.parse(["--help"])
    assert end.value.code == 0
    assert all(name in capsys.readouterr().out for name in ["finetune-ucf101"]) and len(PRESETS) == 9
    with pytest.raises(SystemExit, match="did you mean finetune-hmdb51?"):
        finetune.parse(["finetune-hmbd51"])


def test_two_processes_do_not_share_a_split(ucf101: Path, tmp_path: Path) -> None:
    (tmp_path / "split1").mkdir()
    with finetune._alone(tmp_path / "split1"):
        with pytest.raises(ValueError, match="in use by another process"):
            finetune.run(settings(ucf101, tmp_path))


def test_guessing_names_the_largest_training_classes() -> None:
    assert constant_guess([0, 1, 1, 2], [1, 1, 0, 2], 3) == 0.5
    assert constant_guess([0, 1, 1, 2], [1, 1, 0, 2], 3, k=2) == 0.75
    assert constant_guess([2], [0, 0], 3) == 0.0


def test_metrics_by_hand() -> None:
    """Three test videos of which one has no clip; two are right among the best five of six, one of them as the best."""
    from loaders.datasets import ClassificationSplit

    names = tuple("abcdef")
    test = tuple(with_hashes((f"UCF-101/{n}/v_{n}_g01_c01.avi", "x", n) for n in "abc"))
    train = tuple(with_hashes((f"UCF-101/{n}/v_{n}_g02_c0{i}.avi", "x", n) for n, i in ("a1", "b1", "b2")))
    split = ClassificationSplit(
        name="ucf101", split="1", folder="", classes=names, train=train, test=test, missing=()
    )
    scores = np.log(np.array([[6, 1, 1, 1, 1, 0.5], [6, 1, 1, 1, 1, 0.5], [9, 2, 3, 1, 1, 0.5]]))
    videos = [test[0].video_id, test[0].video_id, test[1].video_id]
    metrics, unused = split_metrics(scores, videos, ["a", "a", "b"], split, [], "softmax")
    assert metrics["top1"].value == 0.5 and metrics["top5"].value == 1.0
    assert metrics["top1 skipped as wrong"].value == pytest.approx(1 / 3)
    assert metrics["top1"].chance == metrics["largest class"].value == 0.5  # always b
    assert metrics["top5"].chance == 1.0 and metrics["even guess"].value == pytest.approx(1 / 6)
    assert unused == [test[2].video_id]
    assert top_k_accuracy_score([0, 1], scores[1:], k=2, labels=range(6)) == 0.5


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dataset", "videos"),
    [("ucf101", (38, 23)), ("hmdb51", (3, 2))],
)
def test_real_videos_from_list_to_result(
    real_data: Path, tmp_path: Path, dataset: str, videos: tuple
) -> None:
    """The official layout with videos of the dataset itself, in reduced form: the protocol runs, nothing more."""
    command = arguments(
        real_data / dataset, tmp_path, "--epochs", "1", "--dataset", dataset, "--num-workers", "2"
    )
    started = time.monotonic()
    assert finetune.main(command) == 0
    (result,) = read_results(tmp_path / "results.jsonl")
    assert (result.counts["num_training_videos"], result.counts["num_videos"]) == videos
    assert result.dataset == dataset and result.counts["num_clips"] == 2 * videos[1]
    assert 0 <= result.metrics["top1"].value <= result.metrics["top5"].value <= 1
    assert result.metrics["largest class"].value == pytest.approx(6 / 23 if dataset == "ucf101" else 0.0)
    assert 0 < result.seconds <= time.monotonic() - started
