"""The generated world: the JSON says what is seen and heard, and in the hard part sight alone cannot tell."""

import colorsys
import fcntl
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import av
import numpy as np
import pytest

from tools.make_world import (
    CATEGORIES,
    CENTRAL_SIDE,
    FRAME_RATES,
    FRAME_SIZES,
    SAMPLE_RATE,
    WorldSettings,
    draw_truth,
    main,
    make_world,
    render_video,
    video_stem,
    write_video,
)

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def videos() -> list[tuple[np.ndarray, np.ndarray, dict]]:
    """The first 24 training videos, 4 s each."""
    return [render_video(3, "train", index, 4) for index in range(24)]


@pytest.fixture(scope="module")
def truths() -> list[dict]:
    """The truth of 1,200 videos of both parts."""
    return [draw_truth(5, "train", index, 4) for index in range(1200)]


def boxes_of(thing: dict) -> np.ndarray:
    return np.array(thing["boxes"])  # (T, 4)


def sound_level(waveform: np.ndarray, truth: dict, window_seconds: float = 0.04) -> np.ndarray:
    """Return the RMS of the sound around the time of each frame, (T,)."""
    half = round(window_seconds * SAMPLE_RATE / 2)
    power = np.concatenate([np.zeros(1), np.cumsum(waveform.astype(np.float64) ** 2)])
    at = np.rint(np.arange(truth["num_frames"]) / truth["fps"] * SAMPLE_RATE).astype(int)
    low, high = np.clip(at - half, 0, len(waveform)), np.clip(at + half, 0, len(waveform))
    return np.sqrt((power[high] - power[low]) / (high - low))


def folder_digest(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


# One video -----------------------------------------------------------------------------------------


def test_same_seed_gives_the_same_video_and_another_seed_split_or_index_another() -> None:
    frames, waveform, truth = render_video(1, "train", 7, 2)
    again = render_video(1, "train", 7, 2)
    assert np.array_equal(frames, again[0])
    assert np.array_equal(waveform, again[1])
    assert truth == again[2]
    for other in ((2, "train", 7), (1, "test", 7), (1, "train", 9)):
        assert render_video(*other, 2)[2]["objects"] != truth["objects"]


def test_train_and_test_share_no_video(truths: list[dict]) -> None:
    train = {json.dumps(truth["objects"]) for truth in truths}
    test = {json.dumps(draw_truth(5, "test", index, 4)["objects"]) for index in range(200)}
    assert len(train) == len(truths)
    assert not train & test


def test_arrays_have_the_stated_shapes_and_the_truth_has_all_fields(videos: list) -> None:
    for index, (frames, waveform, truth) in enumerate(videos):
        assert frames.dtype == np.uint8
        assert frames.shape == (truth["num_frames"], truth["height"], truth["width"], 3)
        assert waveform.dtype == np.float32
        assert np.abs(waveform).max() < 1
        assert waveform.shape == (round(truth["seconds"] * SAMPLE_RATE),)
        assert truth["num_frames"] == round(truth["seconds"] * truth["fps"])
        assert 4 <= truth["seconds"] < 4 + 1 / 14
        assert truth["part"] == ("hard" if index % 2 else "easy")
        assert truth["categories"] == [category.name for category in CATEGORIES]
        for thing in truth["objects"]:
            assert boxes_of(thing).shape == (truth["num_frames"], 4)
        shown = [thing["category"] for thing in truth["objects"]]
        assert len(set(shown)) == len(shown) in (2, 3)
        sounding = [thing["category"] for thing in truth["objects"] if thing["sounding"]]
        assert sounding == ([truth["category"]] if truth["sound"] == "on-screen" else [])
        if truth["sound"] == "off-screen":
            assert truth["category"] not in shown
        json.dumps(truth)


def test_everything_bright_lies_in_the_boxes_and_fills_them(videos: list) -> None:
    for frames, _, truth in videos:
        for t in range(0, truth["num_frames"], 7):
            bright = frames[t].max(2) >= 206  # backgrounds end at 190 + 7, objects begin at 215 - 7
            for thing in truth["objects"]:
                x0, y0, x1, y1 = boxes_of(thing)[t]
                rows, columns = slice(round(y0) - 1, round(y1) + 2), slice(round(x0) - 1, round(x1) + 2)
                y, x = np.nonzero(bright[rows, columns])
                y, x = y + rows.start, x + columns.start
                found = np.array([x.min(), y.min(), x.max() + 1, y.max() + 1])
                assert np.abs(found - (x0, y0, x1, y1)).max() <= 2
                bright[rows, columns] = False
            assert not bright.any()


def test_objects_wear_the_hue_of_their_category(videos: list) -> None:
    hues = {category.name: category.hue for category in CATEGORIES}
    for frames, _, truth in videos:
        for thing in truth["objects"]:
            x0, y0, x1, y1 = np.rint(boxes_of(thing)[0]).astype(int)
            pixels = frames[0, y0:y1, x0:x1].reshape(-1, 3).astype(float)
            body = pixels[(pixels.max(1) >= 206) & (pixels.min(1) < 0.4 * pixels.max(1))]
            assert len(body) > 0.15 * len(pixels)
            hue = colorsys.rgb_to_hsv(*np.median(body, 0))[0]
            apart = abs(hue - hues[thing["category"]])
            assert min(apart, 1 - apart) < 0.02


def test_sounding_objects_pulse_and_still_ones_follow_the_drift_alone(videos: list) -> None:
    drifted = 0
    for frames, _, truth in videos:
        for thing in truth["objects"]:
            boxes = boxes_of(thing)
            width = boxes[:, 2] - boxes[:, 0]
            assert thing["moving"] == (truth["part"] == "hard" or thing["sounding"])
            if thing["moving"]:
                assert width.max() > 1.3 * width.min()
                continue
            assert np.ptp(width) < 0.02
            shift = np.rint(boxes[:, :2] - boxes[0, :2]).astype(int)
            last = int(np.abs(shift).sum(1).argmax())
            dx, dy = shift[last]
            drifted += bool(dx or dy)
            # The corner of the frame, far from all objects, moved by the same whole pixels.
            before = frames[0, 8:18, 8:18].astype(int)
            after = frames[last, 8 + dy : 18 + dy, 8 + dx : 18 + dx].astype(int)
            assert np.abs(after - before).max() <= 14
    assert drifted > 5


def test_size_follows_the_sound_of_the_sounding_object_alone(videos: list) -> None:
    silent = []
    for _, waveform, truth in videos:
        if truth["sound"] == "silent":
            continue
        level = sound_level(waveform, truth)
        for thing in truth["objects"]:
            if thing["moving"]:
                width = boxes_of(thing)[:, 2] - boxes_of(thing)[:, 0]
                correlation = np.corrcoef(width, level)[0, 1]
                if thing["sounding"]:
                    assert correlation > 0.8
                else:
                    silent.append(abs(correlation))
    assert len(silent) > 8
    assert np.mean(silent) < 0.3
    assert max(silent) < 0.7


def test_sound_lies_in_the_bands_of_its_category_and_noise_is_soft(videos: list) -> None:
    for _, waveform, truth in videos:
        level_dbfs = 10 * np.log10(np.mean(waveform.astype(np.float64) ** 2))
        if truth["sound"] == "silent":
            assert truth["category"] is None
            assert truth["bands_hz"] == []
            assert -55 < level_dbfs < -45
            continue
        assert -23 < level_dbfs < -11
        energy = np.abs(np.fft.rfft(waveform)) ** 2
        frequency = np.fft.rfftfreq(len(waveform), 1 / SAMPLE_RATE)
        inside = np.zeros(len(frequency), bool)
        for low, high in truth["bands_hz"]:
            band = (low <= frequency) & (frequency <= high)
            assert energy[band].sum() > 0.01 * energy.sum()
            inside |= band
        assert energy[inside].sum() > 0.95 * energy.sum()


def test_categories_are_at_least_16_and_apart_in_hue_and_on_the_mel_axis() -> None:
    assert len({category.name for category in CATEGORIES}) == len(CATEGORIES) >= 16
    assert max(high for category in CATEGORIES for _, high in category.bands_hz) <= 11_000
    first_mel = 2595 * np.log10(1 + np.array([category.partials[0][0] for category in CATEGORIES]) / 700)
    assert np.diff(np.sort(first_mel)).min() > 130
    assert np.diff(np.sort([category.hue for category in CATEGORIES])).min() > 1 / 17
    assert len({(category.shape, category.core_color) for category in CATEGORIES}) == len(CATEGORIES)


# Many videos ---------------------------------------------------------------------------------------


def test_shares_of_parts_marks_sizes_rates_and_lengths(truths: list[dict]) -> None:
    for part in ("easy", "hard"):
        sounds = [truth["sound"] for truth in truths if truth["part"] == part]
        assert len(sounds) == len(truths) / 2
        for mark in ("off-screen", "silent"):
            assert 0.025 < sounds.count(mark) / len(sounds) < 0.085
    assert {(truth["width"], truth["height"]) for truth in truths} == set(FRAME_SIZES)
    assert {truth["fps"] for truth in truths} == {float(fps) for fps in FRAME_RATES}
    sounding = [truth["category"] for truth in truths if truth["sound"] == "on-screen"]
    counts = [sounding.count(category.name) for category in CATEGORIES]
    assert min(counts) > 0.5 * np.mean(counts)
    lengths = [draw_truth(5, "train", index)["seconds"] for index in range(200)]
    assert min(lengths) >= 4
    assert max(lengths) <= 10.1
    assert 4.7 < np.mean(lengths) < 5.4


def test_objects_are_large_apart_and_inside_the_central_square(truths: list[dict]) -> None:
    for truth in truths[:400]:
        short = min(truth["width"], truth["height"])
        middle = np.array([truth["width"], truth["height"]]) / 2
        everything = np.stack([boxes_of(thing) for thing in truth["objects"]])  # (O, T, 4)
        assert (everything[..., :2] >= middle - CENTRAL_SIDE / 2 * short).all()
        assert (everything[..., 2:] <= middle + CENTRAL_SIDE / 2 * short).all()
        sides = (everything[..., 2:] - everything[..., :2]) / short
        assert sides.min() > 0.1
        assert sides.max() < 0.5
        for i in range(len(everything)):
            for j in range(i):
                a, b = everything[i], everything[j]
                overlap = np.minimum(a[:, 2:], b[:, 2:]) - np.maximum(a[:, :2], b[:, :2])
                assert (overlap.min(1) <= 0).all()


def _seen_features(truth: dict, thing: dict, position: int) -> list[float]:
    short = min(truth["width"], truth["height"])
    boxes = boxes_of(thing) / short
    width, height = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    size = np.sqrt(width * height)
    center = np.stack([boxes[:, 0] + boxes[:, 2], boxes[:, 1] + boxes[:, 3]], 1) / 2
    center -= np.array([truth["width"], truth["height"]]) / 2 / short
    spectrum = np.abs(np.fft.rfft(size - size.mean()))
    names = truth["categories"]
    return [
        float(size.mean()),
        float(size.max()),
        float(size.min() / size.max()),
        float(center[:, 0].mean()),
        float(center[:, 1].mean()),
        float(np.hypot(*center.mean(0))),
        float(np.hypot(*np.ptp(center, axis=0))),
        float((spectrum * np.arange(len(spectrum))).sum() / spectrum.sum()),
        float(np.abs(np.diff(size)).mean()),
        float(size[0]),
        float(np.abs(width / height - 1).mean()),
        float(position),
        float(names.index(thing["category"])),
    ]


def test_in_the_hard_part_nothing_seen_tells_which_object_sounds(truths: list[dict]) -> None:
    from scipy.stats import ks_2samp
    from sklearn.ensemble import RandomForestClassifier
    from sklearn.model_selection import GroupKFold, cross_val_score

    hard = [truth for truth in truths if truth["part"] == "hard" and truth["sound"] == "on-screen"]
    features, sounding, group = [], [], []
    for number, truth in enumerate(hard):
        pair = [thing for thing in truth["objects"] if thing["sounding"]]
        pair.append(next(thing for thing in truth["objects"] if not thing["sounding"]))
        rows = np.array([_seen_features(truth, thing, truth["objects"].index(thing)) for thing in pair])
        for mine, other in ((0, 1), (1, 0)):
            features.append(np.concatenate([rows[mine], rows[mine] - rows[other]]))
            sounding.append(mine == 0)
            group.append(number)
    features, sounding = np.array(features), np.array(sounding)
    num_own = len(rows[0])
    for column in range(num_own):
        if column != num_own - 2:  # the first silent object of three has no even chance of each position
            values = features[:, column]
            assert ks_2samp(values[sounding], values[~sounding]).pvalue > 0.001, f"feature {column} leaks"
    pairs = [truth["objects"] for truth in hard if len(truth["objects"]) == 2]
    position = np.array([objects[1]["sounding"] for objects in pairs])
    assert abs(position.mean() - 0.5) < 4 * 0.5 / np.sqrt(len(position))
    keep = [column for column in range(features.shape[1]) if column % num_own != num_own - 2]
    forest = RandomForestClassifier(60, min_samples_leaf=5, random_state=0)
    accuracy = cross_val_score(forest, features[:, keep], sounding, groups=group, cv=GroupKFold(4)).mean()
    assert abs(accuracy - 0.5) < 0.07, accuracy  # four standard errors of 500 pairs would be 0.09


def test_in_the_easy_part_only_the_sounding_object_moves(truths: list[dict]) -> None:
    for truth in truths:
        if truth["part"] == "easy":
            assert all(thing["moving"] == thing["sounding"] for thing in truth["objects"])
        else:
            assert all(thing["moving"] for thing in truth["objects"])


# Files ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 6 + 4 videos, made by one process; training videos of 2 s, for speed."""
    out = tmp_path_factory.mktemp("world") / "out"
    argv = ["--out", str(out), "--seed", "11", "--train-seconds", "2", "--workers", "1"]
    assert main([*argv, "--train-videos", "6", "--test-videos", "4"]) == 0
    return out


def test_mp4_decodes_to_the_stated_frames_and_sound(world: Path) -> None:
    for split, num in (("train", 6), ("test", 4)):
        for suffix in ("mp4", "json"):
            stems = {path.stem for path in (world / split).glob(f"*.{suffix}")}
            assert stems == {video_stem(index) for index in range(num)}
        for index in range(num):
            path = world / split / f"{video_stem(index)}.mp4"
            truth = json.loads(path.with_suffix(".json").read_text())
            frames, waveform, rendered_truth = render_video(11, split, index, 2 if split == "train" else 4)
            assert {key: truth[key] for key in rendered_truth} == rendered_truth
            with av.open(str(path)) as container:
                assert container.streams.video[0].codec_context.name == "h264"
                assert container.streams.audio[0].codec_context.name == "aac"
                decoded = list(container.decode(video=0))
            assert len(decoded) == truth["num_frames"] == len(frames)
            assert (decoded[0].width, decoded[0].height) == (truth["width"], truth["height"])
            seconds = [float(frame.pts * frame.time_base) for frame in decoded]
            assert np.allclose(seconds, np.arange(len(frames)) / truth["fps"], atol=1e-3)
            picture = decoded[len(frames) // 2].to_ndarray(format="rgb24").astype(int)
            assert np.abs(picture - frames[len(frames) // 2]).mean() < 6
            with av.open(str(path)) as container:
                sound = np.concatenate([frame.to_ndarray()[0] for frame in container.decode(audio=0)])
            assert 0 <= len(sound) - len(waveform) <= 1024  # AAC comes in frames of 1,024 samples
            if truth["sound"] != "silent":
                assert np.corrcoef(sound[: len(waveform)], waveform)[0, 1] > 0.98  # any shift would end this


def test_files_are_the_same_for_any_number_of_workers(world: Path, tmp_path: Path) -> None:
    settings = WorldSettings(seed=11, train_seconds=2)
    assert make_world(tmp_path, train_videos=6, test_videos=4, settings=settings, workers=2) == (10, 0)
    assert folder_digest(tmp_path) == folder_digest(world)


def test_a_second_run_keeps_finished_videos_renders_missing_ones_and_says_so(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    argv = ["--out", str(tmp_path), "--seed", "11", "--train-seconds", "2", "--workers", "1"]
    argv += ["--test-videos", "0"]
    assert main([*argv, "--train-videos", "3"]) == 0
    first = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "train").iterdir()}
    torn, lost = tmp_path / "train" / "easy_000000.mp4", tmp_path / "train" / "hard_000001.json"
    torn.write_bytes(torn.read_bytes()[:-100])
    lost.unlink()
    (tmp_path / "train" / ".easy_000002.mp4.part").write_bytes(b"left by a killed run")
    capsys.readouterr()
    assert main([*argv, "--train-videos", "6"]) == 0
    said = capsys.readouterr().out
    assert "1 videos are there already, 5 to render" in said
    assert "5 videos rendered, 1 kept" in said
    assert (tmp_path / "train" / "easy_000002.mp4").stat().st_mtime_ns == first["easy_000002.mp4"]
    assert folder_digest(tmp_path / "train") == folder_digest(world / "train")


def _alive(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def test_after_a_kill_no_half_file_stands_and_the_next_run_ends_the_work(world: Path, tmp_path: Path) -> None:
    train = tmp_path / "train"
    command = [sys.executable, "-m", "tools.make_world", "--out", str(tmp_path), "--seed", "11"]
    command += ["--train-seconds", "2", "--train-videos", "500", "--test-videos", "0", "--workers", "2"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, start_new_session=True)
    try:
        deadline = time.monotonic() + 60
        while len(list(train.glob("*.json"))) < 6 and time.monotonic() < deadline:
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        process.wait()
        while _alive(process.pid) and time.monotonic() < deadline:  # workers end by themselves
            time.sleep(0.02)
        assert not _alive(process.pid)
    finally:
        if _alive(process.pid):
            os.killpg(process.pid, signal.SIGKILL)
    finished = sorted(train.glob("*.json"))
    assert 6 <= len(finished) < 500
    for path in finished:
        truth = json.loads(path.read_text())
        assert path.with_suffix(".mp4").stat().st_size == truth["file_bytes"]
    for path in finished[6:]:  # so that the rest of this test is short
        path.unlink()
    for path in train.glob("*.mp4"):
        if int(path.stem[-6:]) >= 6:
            path.unlink()
            path.with_suffix(".json").unlink(missing_ok=True)
    settings = WorldSettings(seed=11, train_seconds=2)
    num_rendered, num_kept = make_world(tmp_path, train_videos=6, test_videos=0, settings=settings, workers=1)
    assert num_rendered + num_kept == 6
    assert num_kept >= 1
    assert folder_digest(train) == folder_digest(world / "train")


def test_a_failing_encoder_leaves_no_video_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr("tools.make_world._encode", fail)
    with pytest.raises(OSError, match="no space left"):
        write_video(tmp_path, WorldSettings(), "train", 0)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--train-videos", "-1"], "--train-videos is -1, expected 0 to 999999"),
        (["--workers", "0"], "--workers is 0, expected at least 1"),
        (["--seed", "-3"], "seed is -3, expected at least 0"),
        (["--test-seconds", "0.5"], "test_seconds is 0.5, expected 1 to 20"),
    ],
)
def test_a_bad_argument_is_named_with_what_was_expected(
    argv: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert main(["--out", str(tmp_path / "out"), *argv]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_render_video_refuses_what_no_world_has() -> None:
    with pytest.raises(ValueError, match="split is 'valid', expected one of train, test"):
        render_video(0, "valid", 0)
    with pytest.raises(ValueError, match="index -1"):
        render_video(0, "train", -1)
    with pytest.raises(ValueError, match="seconds is 0.2, expected 1 to 20"):
        render_video(0, "train", 0, 0.2)


def test_other_settings_in_the_same_folder_are_refused_with_the_way_out(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    before = folder_digest(world)
    same = ["--out", str(world), "--train-seconds", "2", "--workers", "1"]
    assert main([*same, "--train-videos", "6", "--test-videos", "4", "--seed", "12"]) == 2
    assert "seed 11 (asked: 12); remove it, or choose another --out" in capsys.readouterr().err
    assert main([*same, "--train-videos", "5", "--test-videos", "4", "--seed", "11"]) == 2
    assert "hard_000005.json is beyond the 5 videos asked for" in capsys.readouterr().err
    assert folder_digest(world) == before

    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "holiday.mp4").write_bytes(b"")
    assert main(["--out", str(tmp_path), "--train-videos", "1", "--test-videos", "0"]) == 2
    assert "holiday.mp4 was not made by make_world" in capsys.readouterr().err

    file = tmp_path / "file"
    file.write_bytes(b"")
    assert main(["--out", str(file)]) == 2
    assert "is a file, expected a folder" in capsys.readouterr().err


def test_two_runs_in_one_folder_at_a_time_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    with open(tmp_path / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert main(["--out", str(tmp_path), "--train-videos", "1", "--test-videos", "0"]) == 2
    assert "another make_world is at work" in capsys.readouterr().err


@pytest.mark.parametrize("how", [["tools/make_world.py"], ["-m", "tools.make_world"]])
def test_it_runs_as_a_file_and_as_a_module(how: list[str], tmp_path: Path) -> None:
    argv = ["--out", str(tmp_path), "--train-videos", "2", "--test-videos", "0", "--train-seconds", "1"]
    done = subprocess.run([sys.executable, *how, *argv], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "2 videos rendered, 0 kept" in done.stdout
