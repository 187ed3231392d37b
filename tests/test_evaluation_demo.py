"""The whole way: generated world -> shards -> loader -> model -> metrics.json and report.html."""

import dataclasses
import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from cmac.checkpoint import build_model, save_checkpoint
from cmac.config import PRESETS
from cmac.evaluation import boxes, demo, world
from cmac.evaluation.truth import find_truth, read_truth
from loaders import build_loader
from loaders.config import AudioConfig, LoaderConfig, VideoConfig
from shards.make import ShardConfig, make_shards
from shards.slicing import SliceSettings

ROOT = Path(__file__).resolve().parents[1]
NUM_VIDEOS = 12


def slice_folder(videos: Path, out: Path, split: str, max_clips: int) -> None:
    settings = SliceSettings(max_clips=max_clips, preset="ultrafast")
    make_shards(ShardConfig(videos=str(videos), out=str(out), split=split, workers=1, slicing=settings))


# --- boxes through the real slicing, decoding and augmentation ---

WIDTH, HEIGHT, FPS = 320, 180, 25


def rectangle(index: int) -> tuple[int, int, int, int]:
    """Box of the white rectangle in frame `index`: it moves 2 pixels per frame to the right and 1 down."""
    return 70 + 2 * index, 40 + index, 130 + 2 * index, 84 + index


@pytest.fixture(scope="module")
def rectangle_shards(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("rectangle")
    (folder / "videos").mkdir()
    with av.open(str(folder / "videos" / "moving.mp4"), "w") as container:
        video = container.add_stream("libx264", rate=FPS, options={"crf": "10", "preset": "ultrafast"})
        video.width, video.height, video.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        audio = container.add_stream("aac", rate=24_000, layout="mono")
        for index in range(2 * FPS + 5):
            picture = np.zeros((HEIGHT, WIDTH, 3), dtype=np.uint8)
            x0, y0, x1, y1 = rectangle(index)
            picture[y0:y1, x0:x1] = 255
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = index, Fraction(1, FPS)
            container.mux(video.encode(frame))
        container.mux(video.encode(None))
        tone = 0.3 * np.sin(2 * np.pi * 440 * np.arange(2.2 * 24_000) / 24_000).astype(np.float32)
        for start in range(0, len(tone), 1024):
            block = av.AudioFrame.from_ndarray(tone[None, start : start + 1024], format="fltp", layout="mono")
            block.sample_rate, block.pts, block.time_base = 24_000, start, Fraction(1, 24_000)
            container.mux(audio.encode(block))
        container.mux(audio.encode(None))
    slice_folder(folder / "videos", folder / "shards", "test", max_clips=2)
    return folder / "shards"


@pytest.mark.parametrize(("short_side", "crop_size"), [(144, 128), (72, 64)])
def test_mapped_box_is_where_the_object_is_in_the_loaded_frames(rectangle_shards, short_side, crop_size):
    """Slicing, scaling, random crop, flip and time: the box follows the pixels of a moving rectangle."""
    config = LoaderConfig(
        shards=str(rectangle_shards),
        global_batch_size=1,
        num_workers=0,
        backend="portable",
        video=VideoConfig(short_side=short_side, crop_size=crop_size),
    )
    truth = boxes_of_rectangle()
    flips, errors, loader = set(), [], build_loader(config, 0, 1)
    for _ in range(12):
        for batch in loader:
            info, crop = batch.clips[0], batch.augmentations[0]
            flips.add(crop.flip)
            source = boxes.object_boxes_in_clip(truth, FPS, info.start_seconds)
            mapped = boxes.map_boxes_to_crop(source, info, crop)
            white = batch.frames[0].float().mean(dim=0).numpy() > 127  # (T, H, W)
            for picture, box in zip(white, mapped, strict=True):
                rows, columns = picture.any(axis=1).nonzero()[0], picture.any(axis=0).nonzero()[0]
                clipped = np.clip(box, 0, crop_size)
                if clipped[2] - clipped[0] < 2 or clipped[3] - clipped[1] < 2:
                    continue
                seen = np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1])
                errors.append(np.abs(seen - clipped).max())
    loader.close()
    assert flips == {False, True}
    assert len(errors) > 300
    # Half a pixel is what an edge between two pixels costs; one more half for scaling and compression.
    assert np.quantile(errors, 0.99) <= 1.0
    assert np.mean(errors) < 0.6


def boxes_of_rectangle():
    class Item:
        boxes = np.array([rectangle(index) for index in range(2 * FPS + 5)], dtype=float)

    return Item()


# --- the tool ---


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory) -> dict[str, Path]:
    """A small world, its shards, and a run folder with an untrained network's checkpoint and a made-up
    log."""
    folder = tmp_path_factory.mktemp("demo")
    command = [sys.executable, "tools/make_world.py", "--out", str(folder / "world"), "--workers", "1"]
    command += ["--train-videos", "1", "--test-videos", str(NUM_VIDEOS), "--test-seconds", "3", "--seed", "5"]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=120)
    slice_folder(folder / "world" / "test", folder / "shards", "test", max_clips=2)
    config = PRESETS["demo"]()
    config = dataclasses.replace(config, loader=dataclasses.replace(config.loader, shards="elsewhere"))
    run = folder / "run"
    torch.manual_seed(1)
    state = {"model": build_model(config).state_dict(), "commit": "0123456789"}
    save_checkpoint(run / "checkpoints", 40, config, state, keep=1)
    row = {"loss": 3.0, "loss_contrastive": 2.0, "loss_consistency": 0.5}
    row |= {"accuracy_v2a": 0.1, "accuracy_a2v": 0.2}
    row |= {"clips_per_second": 40.0, "data_wait_fraction": 0.1, "train_seconds": 60.0}
    rows = [json.dumps({"step": step, **row}) + "\n" for step in range(10, 50, 10)]
    (run / "log.jsonl").write_text("".join(rows))
    return {"world": folder / "world", "shards": folder / "shards", "run": run}


def run_tool(*arguments: str | Path) -> subprocess.CompletedProcess:
    """The command as typed, in a process of its own."""
    command = [sys.executable, "tools/evaluate_demo.py", "--workers", "0", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=180, check=False)


@pytest.fixture(scope="module")
def tool() -> Callable[..., int]:
    """The tool's main, in this process (a new one spends seconds on importing torch)."""
    spec = importlib.util.spec_from_file_location("evaluate_demo", ROOT / "tools" / "evaluate_demo.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return lambda *arguments: module.main(["--workers", "0", *map(str, arguments)])


def test_truth_of_the_generated_world_is_read(finished_run):
    folder = finished_run["world"]
    truths = {path.stem: find_truth(folder, f"{path.stem}.mp4") for path in (folder / "test").glob("*.json")}
    assert len(truths) == NUM_VIDEOS
    for stem, truth in truths.items():
        assert truth.part == stem.partition("_")[0]
        assert len(truth.objects) >= 2 and truth.silent
        assert all(item.boxes.shape == (len(truth.objects[0].boxes), 4) for item in truth.objects)
        assert (truth.sounding is not None) == (truth.sound == "on-screen")
        if truth.sounding is not None:
            assert truth.sounding.category == truth.category and truth.sounding.moving and truth.bands_hz
            assert all(item.moving == (truth.part == "hard") for item in truth.silent)
    assert sum(truth.sounding is not None for truth in truths.values()) >= NUM_VIDEOS // 2
    assert find_truth(folder / "test", "hard_000001.mp4").category == truths["hard_000001"].category
    assert find_truth(finished_run["world"], "nothing.mp4") is None


def test_broken_truth_names_the_file(tmp_path):
    path = tmp_path / "easy_000000.json"
    path.write_text('{"part": "easy"}')
    with pytest.raises(ValueError, match="easy_000000.json.*make_world"):
        read_truth(path)


def test_tool_writes_figures_and_report_of_a_run(finished_run):
    run = finished_run["run"]
    result = run_tool(
        "--run", run, "--shards-test", finished_run["shards"], "--world", finished_run["world"],
        "--retrieval-clips", "8", "--command", "make demo",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    metrics = json.loads((run / "metrics.json").read_text())
    for key in (*demo.LOCALISATION_KEYS, *demo.RETRIEVAL_KEYS):
        assert {"value", "chance", "untrained", "num_clips", "interval"} <= set(metrics[key])
        assert key in result.stdout
    assert metrics["retrieval_v2a_r1"]["num_clips"] == 8
    assert metrics["retrieval_v2a_r1"]["chance"] == 1 / 8
    assert metrics["train_seconds"] == 60.0
    # 6 videos of the easy part and 2 slots: all videos' first second, then further ones until there are 8.
    assert metrics["retrieval_v2a_r1"]["num_videos"] >= 4
    html = (run / "report.html").read_text()
    assert "make demo" in html and "0123456789" in html and "40 steps of 32 clips" in html
    assert (run / "attention_grid.png").stat().st_size > 10_000
    assert "report.html" in result.stdout
    assert not list(run.glob(".*"))  # nothing half-written is left


def test_tool_measures_retrieval_alone_without_truth(finished_run, tool):
    run = finished_run["run"]
    assert tool("--run", run, "--shards-test", finished_run["shards"]) == 0
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["kind"] == "videos"
    assert not [key for key in metrics if "pointing" in key]
    assert metrics["retrieval_a2v_r1"]["num_clips"] > NUM_VIDEOS


def test_tool_says_what_is_wrong(finished_run, tool, tmp_path, capsys):
    shards = finished_run["shards"]
    assert tool("--run", tmp_path, "--shards-test", shards) == 1
    assert "holds no checkpoints" in capsys.readouterr().err
    (tmp_path / "world").mkdir()
    assert tool("--run", finished_run["run"], "--shards-test", shards, "--world", tmp_path / "world") == 1
    assert "no ground truth" in capsys.readouterr().err
    assert tool("--run", finished_run["run"], "--shards-test", tmp_path) == 1
    assert "manifest.json does not exist" in capsys.readouterr().err


def test_clips_that_repeat_are_counted_once(finished_run):
    """Three slots' worth of epochs over two slots: the third brings nothing new."""
    config = PRESETS["demo"]().loader
    config = dataclasses.replace(
        config,
        shards=str(finished_run["shards"]),
        global_batch_size=8,
        num_workers=0,
        shuffle=False,
        drop_last=False,
        video=dataclasses.replace(config.video, augment=False),
        audio=dataclasses.replace(config.audio, augment=False),
    )
    torch.manual_seed(0)
    model = build_model(PRESETS["demo"]())

    def epochs(count: int) -> world.ClipSet:
        loader = build_loader(config, 0, 1)
        try:
            batches = (batch for _ in range(count) for batch in loader)
            return world.encode_clips({"trained": model}, batches, world=finished_run["world"])
        finally:
            loader.close()

    two, three = epochs(2), epochs(3)
    keys = [(info.video_id, info.start_seconds) for info in two.clips]
    assert len(set(keys)) == len(keys) == two.num_clips == three.num_clips
    assert len(two.encoded["trained"].guided_v) == two.num_clips
    first = {info.video_id for info in two.clips[:NUM_VIDEOS]}
    assert len(first) >= NUM_VIDEOS - 2  # the first slot comes first and holds each video once
    figures = world.evaluate_clips(two, AudioConfig(), num_retrieval_clips=64).figures
    assert 0 <= figures["guided_pointing_easy"]["value"] <= 1
