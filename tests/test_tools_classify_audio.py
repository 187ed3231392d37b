"""classify_audio from files to results: splits, skips, baselines, and that a killed run goes on."""

import csv
import dataclasses
import functools
import wave
from pathlib import Path

import numpy as np
import pytest
import torch

import tools.classify_audio as classify_audio
from cmac.checkpoint import build_model, save_checkpoint
from cmac.config import demo
from cmac.encoders import AudioEncoderConfig
from cmac.evaluation.audio_classification import FoldTask, clip_encoder
from cmac.evaluation.features import extract_features
from cmac.evaluation.results import Result, read_results
from loaders.config import AudioConfig
from loaders.datasets import read_split

RATE = 24_000
PITCHES = {"dog": 400.0, "rain": 1500.0, "rooster": 5000.0}
TARGETS = {"dog": 0, "rain": 10, "rooster": 1}


def write_wav(path: Path, label: str | None, seconds: float, seed: int = 0) -> None:
    """A tone of the class's pitch in noise; a file without samples for None."""
    samples = np.zeros(0)
    if label is not None:
        rng = np.random.default_rng(seed)
        times = np.arange(round(seconds * RATE)) / RATE
        pitch = PITCHES[label] * rng.uniform(0.97, 1.03)
        samples = 0.3 * np.sin(2 * np.pi * pitch * times) + 0.05 * rng.normal(size=len(times))
    path.parent.mkdir(parents=True, exist_ok=True)
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(RATE)
        file.writeframes((samples.clip(-1, 1) * 32767).astype("<i2").tobytes())


@pytest.fixture(scope="module")
def esc(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ESC-50's layout: one file per class and fold, one more without samples, one too short, one that is missing."""
    folder = tmp_path_factory.mktemp("ESC-50")
    rows = []

    def add(fold: int, number: int, label: str, esc10: bool = True) -> Path:
        name = f"{fold}-{number}-A-{TARGETS[label]}.wav"
        rows.append([name, fold, TARGETS[label], label, esc10, number, "A"])
        return folder / "audio" / name

    for fold in range(1, 6):
        for label in PITCHES:
            write_wav(add(fold, TARGETS[label], label), label, 2.2, seed=10 * fold + TARGETS[label])
    write_wav(add(2, 77, "dog"), None, 0)
    write_wav(add(3, 78, "rain"), "rain", 0.5)
    add(4, 79, "rooster")
    (folder / "meta").mkdir()
    with open(folder / "meta" / "esc50.csv", "w", newline="") as file:
        csv.writer(file).writerows(
            [["filename", "fold", "target", "category", "esc10", "src_file", "take"], *rows]
        )
    return folder


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small network that was never trained, as a run has it."""
    folder = tmp_path_factory.mktemp("run")
    config = demo()
    model = dataclasses.replace(
        config.model, queue_length=8, audio=AudioEncoderConfig(widths=(4, 8), blocks=(1, 1))
    )
    audio = AudioConfig(num_mel_bins=40, frequency_mask_bins=4, n_fft=1024)
    config = dataclasses.replace(config, model=model, loader=dataclasses.replace(config.loader, audio=audio))
    torch.manual_seed(7)
    state = {"model": build_model(config).state_dict(), "commit": "abc1234567"}
    save_checkpoint(folder / "checkpoints", 1, config, state, keep=1)
    return folder


def classify(run: Path, data: Path, out: Path, *options: str, dataset: str = "esc10") -> list[Result]:
    """The results that a run of the command appends."""
    results = out / "results.jsonl"
    before = len(read_results(results)) if results.exists() else 0
    arguments = [str(run), "--dataset", dataset, "--data", str(data), "--out", str(out), "--workers", "0"]
    assert classify_audio.main([*arguments, "--results", str(results), "--device", "cpu", *options]) == 0
    return read_results(results)[before:]


def test_each_file_is_for_test_once_and_c_is_chosen_with_the_official_folds(
    esc: Path, run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[FoldTask] = []
    classify_folds = classify_audio.classify_folds

    def spy(
        features: np.ndarray, files: list[str], tasks: list[FoldTask], *others: object, **options: object
    ):
        seen.extend(tasks)
        return classify_folds(features, files, tasks, *others, **options)

    monkeypatch.setattr(classify_audio, "classify_folds", spy)
    results = classify(run_folder, esc, tmp_path, "--clips", "2", "--random-networks", "0", "--no-log-mel")
    assert [task.name for task in seen] == ["1", "2", "3", "4", "5"]
    tested = [name for task in seen for name in task.test]
    assert len(tested) == len(set(tested)) == 15
    for number, task in enumerate(seen):
        official = read_split("esc10", esc, task.name)
        assert set(task.test) <= {video.video_id for video in official.test}
        assert not set(task.train) & set(task.test)
        assert len(task.train) == 12
        for name, inner in task.inner_folds.items():
            assert inner != number and name.startswith(f"audio/{inner + 1}-")
    (result,) = results
    assert (result.split, result.protocol, result.dataset) == ("folds 1-5", "2x2s map logistic", "esc10")
    assert len(result.metrics["top1"].per_fold) == 5
    assert result.metrics["top1"].chance == pytest.approx(1 / 3)


def test_files_that_cannot_be_used_are_named_and_counted(
    esc: Path, run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (result,) = classify(run_folder, esc, tmp_path, "--clips", "2", "--random-networks", "0", "--no-log-mel")
    skipped = {name: count for name, count in result.counts.items() if name.startswith("skipped") and count}
    assert sum(skipped.values()) == 3 and {"skipped missing", "skipped too-short"} <= skipped.keys()
    assert result.counts["num_videos"] == 15 and result.counts["num_clips"] == 30
    printed = capsys.readouterr().out
    for name in ("2-77-A-0.wav", "3-78-A-10.wav", "4-79-A-1.wav"):
        assert f"skipped audio/{name}: " in printed


def test_network_random_weights_and_log_mel_statistics_are_compared_on_the_same_clips(
    esc: Path, run_folder: Path, tmp_path: Path
) -> None:
    options = ("--clips", "2", "--random-networks", "2", "--features", "map", "gap", "--folds", "1", "2")
    results = classify(run_folder, esc, tmp_path, *options)
    assert [(each.checkpoint, each.protocol) for each in results] == [
        ("none", "2x2s log-mel statistics logistic, folds 1 2 alone"),
        ("random", "2x2s map logistic, folds 1 2 alone"),
        ("random", "2x2s map logistic, folds 1 2 alone"),
        (str(run_folder / "checkpoints/step_00000001.pt"), "2x2s map logistic, folds 1 2 alone"),
        ("random", "2x2s gap logistic, folds 1 2 alone"),
        ("random", "2x2s gap logistic, folds 1 2 alone"),
        (str(run_folder / "checkpoints/step_00000001.pt"), "2x2s gap logistic, folds 1 2 alone"),
    ]
    log_mel, random, other, trained, *_ = results
    assert log_mel.checkpoint_digest is None
    assert len({random.checkpoint_digest, other.checkpoint_digest, trained.checkpoint_digest}) == 3
    assert log_mel.metrics["top1"].value == 1.0  # tones of three pitches
    assert log_mel.config["dimensions"] == 80
    for name, baselines in (
        ("top1 above random weights", (random, other)),
        ("top1 above log-mel statistics", (log_mel,)),
    ):
        expected = trained.metrics["top1"].value - np.mean([each.metrics["top1"].value for each in baselines])
        difference = trained.metrics[name]
        assert difference.value == pytest.approx(expected)
        assert difference.interval[0] <= difference.value <= difference.interval[1]
        assert len(difference.per_fold) == 2


def test_fresh_weights_are_not_compared_with_themselves(run_folder: Path) -> None:
    arguments = [f"random:{run_folder}", "--dataset", "esc10", "--data", "esc", "--device", "cpu"]
    args = classify_audio.parse([*arguments, "--random-networks", "2", "--random-seed", "5"])
    networks = classify_audio.open_networks(args)
    assert list(networks) == ["trained", "random 6", "random 7"]
    assert len({network.digest for network in networks.values()}) == 3


def test_a_killed_run_goes_on_where_it_was(
    esc: Path, run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ("--clips", "2", "--batch-size", "6", "--random-networks", "0", "--folds", "1", "2")
    expected = classify(run_folder, esc, tmp_path / "undisturbed", *options)
    read: list[int] = []
    stop_after = 2

    def counted(*arguments: object, **others: object):
        encode = clip_encoder(*arguments, **others)

        def counted_encode(batch):
            if len(read) == stop_after:
                raise KeyboardInterrupt
            read.append(batch.step)
            return encode(batch)

        return counted_encode

    monkeypatch.setattr(classify_audio, "clip_encoder", counted)
    monkeypatch.setattr(
        classify_audio, "extract_features", functools.partial(extract_features, save_every_seconds=0.0)
    )
    with pytest.raises(KeyboardInterrupt):
        classify(run_folder, esc, tmp_path, *options)
    stop_after = 100
    results = classify(run_folder, esc, tmp_path, *options)
    assert read == [0, 1, 2, 3, 4]  # 30 clips, each batch once
    for result, other in zip(results, expected, strict=True):
        assert result.metrics == other.metrics and result.config == other.config


def test_both_readings_of_dcase_are_offered_and_said(
    run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    data, pitches = tmp_path / "DCASE", {"bus": "dog", "tube": "rooster"}
    for folder, count in (("scenes_stereo", 5), ("scenes_stereo_testset", 2)):
        for number in range(1, count + 1):
            for seed, (scene, sound) in enumerate(pitches.items()):
                write_wav(
                    data / folder / f"{scene}{number:02d}.wav", sound, 1.3, seed=number + 10 * seed + count
                )
    options = ("--clips", "3", "--random-networks", "0", "--features", "gap")
    log_mel, trained = classify(run_folder, data, tmp_path / "a", *options, dataset="dcase2014")
    assert "the development files train, the test files test" in " ".join(capsys.readouterr().out.split())
    assert (trained.split, trained.protocol) == ("test", "3x1s gap logistic")
    assert trained.counts["num_videos"] == 4 and trained.counts["num_clips"] == 3 * 14
    assert log_mel.metrics["top1"].value == 1.0 and log_mel.metrics["top1"].per_fold is None
    assert "no challenge in 2014" in trained.config["reading"]

    log_mel, trained = classify(run_folder, data, tmp_path / "b", *options, dataset="dcase2013")
    assert "five stratified folds" in " ".join(capsys.readouterr().out.split())
    assert trained.split == "folds 1-5" and trained.counts["num_videos"] == 10
    assert log_mel.metrics["top1"].value == 1.0 and len(log_mel.metrics["top1"].per_fold) == 5


def test_a_quick_look_says_what_was_left_out(esc: Path, run_folder: Path, tmp_path: Path) -> None:
    options = (
        "--clips",
        "1",
        "--max-files",
        "1",
        "--folds",
        "1",
        "3",
        "--random-networks",
        "0",
        "--no-log-mel",
    )
    (result,) = classify(run_folder, esc, tmp_path, *options)
    assert result.split == "folds 1,3"
    assert result.protocol.endswith("folds 1 3 alone, at most 1 files of each class and part")
    assert result.counts["num_videos"] == 6 and "skipped missing" not in result.counts


def test_wrong_input_is_refused_with_the_way_out(
    esc: Path, run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    arguments = [str(run_folder), "--dataset", "esc10", "--data"]
    assert classify_audio.main([*arguments, str(tmp_path)]) == 1
    assert "has no esc50.csv" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        classify_audio.main([*arguments, str(esc), "--folds", "6"])
    assert "--folds is '6', expected some of 1, 2, 3, 4, 5" in capsys.readouterr().err


@pytest.mark.slow
def test_real_recordings_are_classified_above_chance(
    real_data: Path, run_folder: Path, tmp_path: Path
) -> None:
    if not (real_data / "ESC-50").is_dir():
        pytest.skip(f"no ESC-50 in {real_data}")
    options = ("--clips", "2", "--max-files", "2", "--random-networks", "0", "--folds", "1", "2")
    log_mel, _ = classify(run_folder, real_data / "ESC-50", tmp_path, *options)
    assert log_mel.counts["num_videos"] == 40
    assert log_mel.metrics["top1"].value > 3 * log_mel.metrics["top1"].chance
