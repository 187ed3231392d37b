"""tools.retrieve: figures, what was left out and why, resumption; on videos made here and on real ones."""

import dataclasses
import functools
import json
from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from narrow_run import save_narrow_run

import tools.retrieve as retrieve
from cmac.evaluation.features import extract_features
from cmac.evaluation.results import Result, read_results
from loaders.batch import ClipBatch
from tools.make_synthetic_videos import make_flash_beep_video

COLORS = {"Blue": (20, 30, 220), "Green": (30, 200, 40), "Red": (220, 20, 30)}


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def surroundings(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The index of the videos is not kept in the user's cache, and later tests compute with as many threads."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a narrow network whose weights are those of seed 5."""
    folder = tmp_path_factory.mktemp("run")
    save_narrow_run(folder)
    return folder


def write_video(path: Path, color: tuple[int, int, int], num_frames: int = 40) -> None:
    """MPEG-4 in AVI of one color, a little darker at one edge, without sound, as UCF101 has them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    shade = np.linspace(0.9, 1, 48)[:, None, None]
    picture = np.broadcast_to((shade * np.array(color)).astype(np.uint8), (48, 64, 3))
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=25, options={"qscale": "3"})
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for _ in range(num_frames):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


@pytest.fixture(scope="module")
def ucf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """UCF101's layout, a class per color: 3 videos each for training, 2 for test, and some that cannot be used."""
    folder = tmp_path_factory.mktemp("ucf")
    lists = folder / "ucfTrainTestlist"
    lists.mkdir()
    train, test = [], []
    for number, (label, color) in enumerate(COLORS.items(), 1):
        for group in range(1, 6):
            name = f"{label}/v_{label}_g{group:02d}_c01.avi"
            shade = tuple(min(255, part + 4 * group) for part in color)
            write_video(folder / "UCF-101" / name, shade)
            (test if group <= 2 else train).append(f"{name} {number}")
    train += ["Blue/v_Blue_g06_c01.avi 1", "Blue/v_Blue_g07_c01.avi 1"]  # the first is not there
    write_video(folder / "UCF-101/Blue/v_Blue_g07_c01.avi", (0, 0, 200), num_frames=31)
    (folder / "UCF-101/Red/v_Red_g08_c01.avi").write_bytes(b"RIFF no video at all")
    test.append("Red/v_Red_g08_c01.avi 3")
    classes = [f"{number} {label}" for number, label in enumerate((*COLORS, "White"), 1)]
    for name, lines in (("classInd", classes), ("trainlist01", train), ("testlist01", test)):
        (lists / f"{name}.txt").write_text("".join(f"{line}\n" for line in lines))
    return folder


@pytest.fixture
def run(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[list[Result], str]]:
    """Calls the tool: (results, what it printed); a status other than 0 gives (.., what it printed as error)."""

    def call(*arguments: object, status: int = 0, name: str = "a") -> tuple[list[Result], str]:
        out = tmp_path / name
        options = ["--out", out, "--results", out / "results.jsonl", "--device", "cpu", "--workers", 0]
        values = [str(value) for value in (*arguments, *options)]
        if not values[0].startswith("random:"):
            values = [str(checkpoint), *values]
        capsys.readouterr()
        assert retrieve.main(values) == status
        said = capsys.readouterr()
        return (read_results(out / "results.jsonl") if status == 0 else []), said.err if status else said.out

    return call


def test_classes_of_their_own_color_are_found_and_what_was_left_out_is_counted(ucf: Path, run) -> None:
    results, said = run("--data", ucf, "--clips", 2)
    trained, untrained = results
    assert (trained.task, trained.dataset, trained.split, trained.protocol) == (
        "video-retrieval",
        "ucf101",
        "1",
        "2x32f",
    )
    assert trained.metrics["R@1"].value == 1.0, "colors are told apart by any network"
    # 6 queries, 2 of each class; 3 of 9 gallery videos are of each.
    assert trained.metrics["R@1"].chance == pytest.approx(1 / 3)
    assert trained.metrics["R@5"].chance == pytest.approx(1 - (6 * 5 * 4 * 3 * 2) / (9 * 8 * 7 * 6 * 5))
    assert trained.metrics["R@10"].chance == 1.0
    assert trained.counts == {
        "num_videos": 6,
        "num_gallery_videos": 9,
        "num_clips": 30,
        "queries without their class in the gallery": 0,
        "classes without query": 1,
        "classes without gallery": 1,
        "skipped undecodable": 1,
        "skipped gallery missing": 1,
        "skipped gallery too-short": 1,
    }
    assert trained.config["sampling"]["clips_per_file"] == 2
    assert trained.config["ks above gallery"] == [10, 20, 50]
    assert "R@10, R@20, R@50: the gallery has only 9" in said
    assert "skipped gallery missing: 1" in said
    # The same network with random weights, on the same clips.
    assert untrained.checkpoint == "random" and trained.checkpoint.endswith("step_00000001.pt")
    assert untrained.checkpoint_digest != trained.checkpoint_digest
    assert untrained.counts == trained.counts
    difference = trained.metrics["R@1 above random weights"]
    assert difference.value == pytest.approx(trained.metrics["R@1"].value - untrained.metrics["R@1"].value)


def test_figures_are_those_of_the_stored_features(ucf: Path, run, tmp_path: Path) -> None:
    results, _ = run("--data", ucf, "--clips", 2, "--ks", 1, 2, 4, "--random-seed", 3)
    (chunk,) = (tmp_path / "a").rglob("chunk-*.npz")
    stored = np.load(chunk)
    names = np.array(json.loads(stored["__meta__"].tobytes())["video_ids"])
    for result, network in zip(results, ("trained", "random"), strict=True):
        means = {name: stored[network][names == name].astype(np.float64).mean(axis=0) for name in set(names)}
        query = sorted(name for name in means if "_g01_" in name or "_g02_" in name)
        gallery = sorted(means.keys() - set(query))
        hits = {1: [], 2: [], 4: []}
        for name in query:
            cosines = [
                means[name] @ means[other] / np.linalg.norm(means[name]) / np.linalg.norm(means[other])
                for other in gallery
            ]
            order = np.argsort(cosines)[::-1]
            own = [gallery[place].split("/")[1] == name.split("/")[1] for place in order]
            for k, found in hits.items():
                found.append(any(own[:k]))
        assert {k: result.metrics[f"R@{k}"].value for k in hits} == pytest.approx(
            {k: np.mean(found) for k, found in hits.items()}
        )


def test_a_killed_run_goes_on_and_each_batch_is_read_once_for_both_networks(
    ucf: Path, run, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["--data", ucf, "--clips", 2, "--batch-size", 4]
    whole, _ = run(*arguments, name="whole")
    encoded: list[int] = []
    killed_at = [3]
    make = retrieve.pooled_video_features

    def counted(networks, device):
        assert set(networks) == {"trained", "random"}
        encode = make(networks, device)

        def encode_or_die(batch: ClipBatch) -> dict:
            if len(encoded) == killed_at[0]:
                raise KeyboardInterrupt
            encoded.append(batch.step)
            return encode(batch)

        return encode_or_die

    monkeypatch.setattr(retrieve, "pooled_video_features", counted)
    monkeypatch.setattr(
        retrieve, "extract_features", functools.partial(extract_features, save_every_seconds=0.0)
    )
    with pytest.raises(KeyboardInterrupt):
        run(*arguments)
    assert encoded == [0, 1, 2]
    killed_at[0] = 99
    resumed, _ = run(*arguments)
    assert encoded == list(range(8)), "30 clips in batches of 4, none twice"
    for one, other in zip(whole, resumed, strict=True):
        assert (one.metrics, one.counts, one.checkpoint_digest) == (
            other.metrics,
            other.counts,
            other.checkpoint_digest,
        )
    again, _ = run(*arguments, "--ks", "1")
    assert len(encoded) == 8, "other figures of the same features read nothing"
    assert again[2].metrics["R@1"] == whole[0].metrics["R@1"]
    run(*arguments, "--clip-seconds", "1.0")
    assert len(encoded) == 16, "other clips do"


def test_all_splits_are_read_once_and_averaged(ucf: Path, run, tmp_path: Path) -> None:
    data = tmp_path / "three"
    data.mkdir()
    (data / "UCF-101").symlink_to(ucf / "UCF-101")
    lists = data / "ucfTrainTestlist"
    lists.mkdir()
    (lists / "classInd.txt").write_text("1 Blue\n2 Green\n3 Red\n")
    for split in (1, 2, 3):
        for part, groups in (("train", {1, 2, 3, 4, 5} - {split}), ("test", {split})):
            lines = [
                f"{label}/v_{label}_g{group:02d}_c01.avi {number}\n"
                for number, label in enumerate(COLORS, 1)
                for group in sorted(groups)
            ]
            (lists / f"{part}list0{split}.txt").write_text("".join(lines))
    results, said = run("--data", data, "--clips", 1, "--splits", 1, 2, 3, "--no-baseline-random")
    assert [result.split for result in results] == ["1", "2", "3", "1-3 mean"]
    assert "15 videos" in said
    assert [result.counts["num_videos"] for result in results] == [3, 3, 3, 9]
    assert results[3].metrics["R@1"].per_fold == tuple(r.metrics["R@1"].value for r in results[:3])


def test_three_crops_and_limits_are_in_the_protocols_name(checkpoint: Path, ucf: Path, run) -> None:
    options = ["--clips", 1, "--crops", 3, "--max-videos", 3, "--clip-seconds", 1]
    (result,), _ = run(f"random:{checkpoint}", "--data", ucf, *options)
    assert result.protocol == "1x1s, 3 crops, at most 3 videos"
    assert result.checkpoint == "random", "fresh weights need no fresh weights beside them"
    assert result.counts["num_clips"] == 3 * (
        result.counts["num_videos"] + result.counts["num_gallery_videos"]
    )


def test_query_of_a_class_that_the_gallery_lacks_is_said(ucf: Path, run, tmp_path: Path) -> None:
    data = tmp_path / "lacking"
    (data / "ucfTrainTestlist").mkdir(parents=True)
    (data / "UCF-101").symlink_to(ucf / "UCF-101")
    lists = data / "ucfTrainTestlist"
    (lists / "classInd.txt").write_text("1 Blue\n2 Green\n3 Red\n")
    (lists / "trainlist01.txt").write_text("Blue/v_Blue_g01_c01.avi 1\nRed/v_Red_g01_c01.avi 3\n")
    (lists / "testlist01.txt").write_text("Blue/v_Blue_g02_c01.avi\nGreen/v_Green_g02_c01.avi\n")
    (result, _), said = run("--data", data, "--clips", 1)
    assert result.counts["queries without their class in the gallery"] == 1
    assert "1 of 2 queries have no video of their class in the gallery" in said
    assert result.metrics["R@50"].value == result.metrics["R@50"].chance == 0.5


def test_what_cannot_be_evaluated_is_said_before_anything_is_read(
    ucf: Path, run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retrieve, "extract_features", lambda *args, **kwargs: pytest.fail("clips were read"))
    data = tmp_path / "unusable"
    (data / "ucfTrainTestlist").mkdir(parents=True)
    (data / "UCF-101").symlink_to(ucf / "UCF-101")
    lists = data / "ucfTrainTestlist"
    (lists / "classInd.txt").write_text("1 Blue\n2 Green\n3 Red\n")
    (lists / "trainlist01.txt").write_text("Blue/v_Blue_g01_c01.avi 1\n")
    (lists / "testlist01.txt").write_text("Blue/v_Blue_g07_c01.avi\nRed/v_Red_g08_c01.avi\n")
    _, said = run("--data", data, status=1)
    assert "no test video of split 1 can be used (too-short 1, undecodable 1)" in said
    _, said = run("--data", ucf / "UCF-101", status=1)
    assert "neither UCF101 (ucfTrainTestlist/classInd.txt) nor HMDB51" in said
    _, said = run("--data", ucf, "--splits", "4", status=1)
    assert "split is '4', expected one of 1, 2, 3" in said
    _, said = run("--data", ucf, "--clips", "0", status=1)
    assert "sampling.clips_per_file is 0" in said
    for options in (["--per-clip"], ["--ks", "0"], ["--dataset", "folder"], ["--max-videos", "0"]):
        with pytest.raises(SystemExit):
            run("--data", ucf, *options)


# --- across modalities ---


@pytest.fixture(scope="module")
def sounding(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four videos with sound, one without, one that is too short."""
    folder = tmp_path_factory.mktemp("sounding")
    for number in range(4):
        make_flash_beep_video(
            folder / f"{number}.mp4", seconds=1.5 + number / 4, beep_hz=300 * 2**number, size=(96, 72)
        )
    make_flash_beep_video(folder / "mute.mp4", seconds=2, sound="none", size=(96, 72))
    make_flash_beep_video(folder / "short.mp4", seconds=0.6, size=(96, 72))
    return folder


@pytest.mark.parametrize("per_clip", [False, True])
def test_across_modalities_rows_are_videos_or_clips(
    sounding: Path, run, tmp_path: Path, per_clip: bool
) -> None:
    options = ["--per-clip"] if per_clip else []
    results, said = run("--data", sounding, "--cross-modal", "--clips", 3, "--name", "beeps", *options)
    result = results[0]
    assert (result.task, result.dataset, result.split) == ("cross-modal-retrieval", "beeps", "all")
    assert result.protocol == ("3x1s, per clip" if per_clip else "3x1s")
    assert {name: count for name, count in result.counts.items() if name.startswith("skipped")} == {
        "skipped no-audio": 1,
        "skipped too-short": 1,
    }
    gallery = 12 if per_clip else 4
    assert (result.counts["num_videos"], result.counts["num_gallery_rows"]) == (4, gallery)
    assert result.metrics["R@1 a2v"].chance == 1 / gallery
    assert result.metrics["R@10 v2a"].chance == min(1, 10 / gallery)
    assert ("R@5, R@10: the gallery has only 4" in said) == (not per_clip)
    # The figures once more, from what was stored.
    (chunk,) = (tmp_path / "a").rglob("chunk-*.npz")
    stored = np.load(chunk)
    for each, network in zip(results, ("trained", "random"), strict=True):
        rows = [stored[f"{network}_{modality}"].astype(np.float64) for modality in "va"]
        if not per_clip:
            rows = [part.reshape(4, 3, -1).mean(axis=1) for part in rows]  # three clips of each video in turn
        v, a = (part / np.linalg.norm(part, axis=1, keepdims=True) for part in rows)
        for name, cosines in (("v2a", v @ a.T), ("a2v", a @ v.T)):
            ranks = (cosines >= np.diag(cosines)[:, None] - 1e-12).sum(axis=1)
            for k in (1, 5):
                assert each.metrics[f"R@{k} {name}"].value == pytest.approx((ranks <= k).mean())


def test_across_modalities_needs_a_whole_model(sounding: Path, run, monkeypatch: pytest.MonkeyPatch) -> None:
    load = retrieve.open_encoders
    monkeypatch.setattr(retrieve, "open_encoders", lambda args: dataclasses.replace(load(args), model=None))
    _, said = run("--data", sounding, "--cross-modal", status=1)
    assert "no whole CMAC model" in said


def test_intervals_resample_what_videos_were_cut_from(tmp_path: Path, run) -> None:
    """Three test videos of each class are cut from two films."""
    lists = tmp_path / "ucf/ucfTrainTestlist"
    lists.mkdir(parents=True)
    names = {"test": ("g01_c01", "g01_c02", "g02_c01"), "train": ("g03_c01",)}
    lines: dict[str, list[str]] = {"test": [], "train": []}
    for number, (label, color) in enumerate(COLORS.items(), 1):
        for part, cuts in names.items():
            for cut in cuts:
                write_video(tmp_path / f"ucf/UCF-101/{label}/v_{label}_{cut}.avi", color)
                lines[part].append(f"{label}/v_{label}_{cut}.avi {number}")
    (lists / "classInd.txt").write_text("".join(f"{n} {label}\n" for n, label in enumerate(COLORS, 1)))
    for part, rows in lines.items():
        (lists / f"{part}list01.txt").write_text("\n".join(rows))
    (trained, _), _ = run("--data", tmp_path / "ucf", "--clips", 1)
    assert trained.metrics["R@1"].value == 1.0 and trained.counts["num_videos"] == 9
    # All hits: the exact binomial interval of the six films, not of nine videos.
    assert trained.metrics["R@1"].interval[0] == pytest.approx(0.025 ** (1 / 6))


def test_labels_are_not_read_across_modalities(ucf: Path, run) -> None:
    _, said = run("--data", ucf, "--cross-modal", status=1)
    assert "no-audio 6" in said and "missing" not in said, "the test videos, none of which has sound"


# --- real videos ---


def test_real_ucf101_is_evaluated_and_every_listed_video_accounted_for(real_data: Path, run) -> None:
    (trained, untrained), _ = run("--data", real_data / "ucf101", "--clips", 1, "--max-videos", 12)
    counts = trained.counts
    assert counts["num_videos"] + sum(
        count for name, count in counts.items() if name.startswith("skipped ") and "gallery" not in name
    ) == min(12, 23)
    assert counts["num_gallery_videos"] + sum(
        count for name, count in counts.items() if name.startswith("skipped gallery")
    ) == min(12, 38)
    for result in (trained, untrained):
        for metric in (result.metrics[f"R@{k}"] for k in (1, 5, 10)):
            assert metric.interval[0] <= metric.value <= metric.interval[1] and 0 < metric.chance < 1


def test_real_ucf101_videos_without_sound_are_counted(real_data: Path, run) -> None:
    (trained, _), _ = run("--data", real_data / "ucf101", "--clips", 1, "--cross-modal")
    counts = trained.counts
    assert counts["num_videos"] + counts["skipped no-audio"] == 23 and counts["num_videos"] > 5
