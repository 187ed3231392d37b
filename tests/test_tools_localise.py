"""tools/localise.py from files and annotations to lines of results: a network whose map is the box, random weights,
what is missing, and a run that is killed."""

import dataclasses
import functools
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pytest
import torch
from loaders_media import encode_audio, noise, tone
from PIL import Image

from cmac.checkpoint import build_model, save_checkpoint
from cmac.config import PRESETS
from cmac.evaluation.results import Result, read_results
from loaders.config import AudioConfig, VideoConfig
from shards.make import ShardConfig, make_shards
from shards.schema import SAMPLE_RATE
from shards.slicing import SliceSettings
from tools import common, localise

ROOT = Path(__file__).resolve().parents[1]
WIDTH, HEIGHT = 192, 128
BOXES = {  # relative; white on black in the picture
    "100": (0.0, 0.0, 0.5, 0.5),
    "200": (0.5, 0.25, 1.0, 0.75),
    "300": (0.125, 0.5, 0.5, 0.875),
    "400": (0.25, 0.25, 0.75, 0.75),
}


def picture(box: tuple[float, float, float, float]) -> np.ndarray:
    """Black with a white rectangle, uint8 (HEIGHT, WIDTH, 3)."""
    image = np.zeros((HEIGHT, WIDTH, 3), dtype=np.uint8)
    x0, y0, x1, y1 = box
    image[round(y0 * HEIGHT) : round(y1 * HEIGHT), round(x0 * WIDTH) : round(x1 * WIDTH)] = 255
    return image


def write_pairs(folder: Path, names: dict[str, tuple[float, float, float, float]]) -> None:
    (folder / "frames").mkdir(parents=True, exist_ok=True)
    (folder / "audio").mkdir(exist_ok=True)
    for number, (name, box) in enumerate(names.items()):
        Image.fromarray(picture(box)).save(folder / "frames" / f"{name}.jpg", quality=95)
        sound = tone(300 + 200 * number, 2 * SAMPLE_RATE) + noise(number, 2 * SAMPLE_RATE)
        (folder / "audio" / f"{name}.wav").write_bytes(encode_audio(sound))


def bbox(box: tuple[float, float, float, float]) -> str:
    tags = ("xmin", "ymin", "xmax", "ymax")
    edges = "".join(f"<{tag}>{round(256 * edge)}</{tag}>" for tag, edge in zip(tags, box))
    return f"<bbox><name>source</name>{edges}</bbox>"


def write_flickr(folder: Path, names: dict[str, tuple[float, float, float, float]]) -> Path:
    """Two annotators who agree: the box is certain."""
    folder.mkdir()
    for name, box in names.items():
        annotators = f"<annotator>{bbox(box)}</annotator>" * 2
        (folder / f"{name}.xml").write_text(f"<annotation>{annotators}</annotation>")
    return folder


class SeesWhite(torch.nn.Module):
    """A network whose maps are how much of each cell of the picture is white, 2 steps of 8x8 cells; its predicted map
    is the opposite. Knows by the sound's loudness whether anything sounds."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def encode(self, frames: torch.Tensor, log_mel: torch.Tensor) -> SimpleNamespace:
        bright = (frames.mean(dim=1) > 0.5).float()  # (N, T, H, W); black is not quite black in a JPEG
        maps = torch.nn.functional.adaptive_avg_pool3d(bright, (2, 8, 8))
        loud = (log_mel.mean(dim=(1, 2, 3)) > -2).float().view(-1, 1, 1, 1)
        return SimpleNamespace(guided_v=maps * loud, predicted_v=1 - maps)


def fake_encoders() -> SimpleNamespace:
    model = SeesWhite()
    return SimpleNamespace(
        require_model=lambda: model,
        normalize_frames=lambda frames: frames.float() / 255,
        video_config=VideoConfig(num_frames=4, short_side=72, crop_size=64),
        audio_config=AudioConfig(),
        pixel_mean=0.45,
        pixel_std=0.225,
        source="fake",
        digest="0" * 16,
    )


@pytest.fixture
def sees_white(monkeypatch):
    monkeypatch.setattr(localise, "open_encoders", lambda args: fake_encoders())


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "200")
    # The networks are too small to share; more threads than cores that are free wait for each other.
    monkeypatch.setattr(common, "usable_cores", lambda: 1)


def run(tmp_path: Path, *arguments: object, checkpoint: str = "fake") -> dict[tuple[str, str, str], Result]:
    """Results of this run by (the protocol's last part, checkpoint, split)."""
    path = tmp_path / "results.jsonl"
    before = len(read_results(path)) if path.exists() else 0
    options = [
        "--out",
        tmp_path / "out",
        "--results",
        path,
        "--workers",
        0,
        "--device",
        "cpu",
        "--batch-size",
        2,
    ]
    status = localise.main([str(part) for part in (checkpoint, *options, *arguments)])
    assert status == 0
    made = read_results(path)[before:]
    return {(result.protocol.rpartition(", ")[2], result.checkpoint, result.split): result for result in made}


def share(box: tuple[float, float, float, float]) -> float:
    return (box[2] - box[0]) * (box[3] - box[1])


def test_a_map_that_is_the_box_scores_near_one_and_baselines_what_is_worked_out(tmp_path, sees_white, capsys):
    data = tmp_path / "flickr"
    write_pairs(data, BOXES)
    annotations = write_flickr(data / "Annotations", BOXES)
    results = run(
        tmp_path,
        "--dataset",
        "flickr-soundnet",
        "--data",
        data,
        "--annotations",
        annotations,
        "--no-untrained",
    )
    guided = results["guided-slice", "fake", "test"]
    assert guided.task == "localisation" and guided.protocol == "stills squash, 1s, top-half, guided-slice"
    assert guided.metrics["cIoU@0.5"].value == 1.0
    # The map's edge is blurred over a cell of 28 pixels: what is above the median (0) is half a cell larger all
    # around, so the least cIoU is that of the smallest box.
    x0, y0, x1, y1 = BOXES["300"]
    blurred = (min(x1 + 1 / 16, 1) - (x0 - 1 / 16)) * (y1 - y0 + 1 / 8)
    assert guided.metrics["AUC"].value >= share(BOXES["300"]) / blurred - 0.1
    assert guided.metrics["pixel AP"].value > 0.97 and guided.metrics["pointing"].value == 1.0
    assert results["guided-mean", "fake", "test"].metrics["pixel AP"].value > 0.97
    wrong = results["predicted-slice", "fake", "test"].metrics
    assert wrong["pointing"].value == 0.0 and wrong["cIoU@0.5"].value == 0.0
    # The whole picture's cIoU is the box's share of it: none reaches a half.
    whole = results["whole-image", "none", "test"].metrics
    assert whole["cIoU@0.5"].value == 0.0
    expected = np.mean([(np.floor(share(box) / 0.05 + 1e-9) + 0.5) * 0.05 for box in BOXES.values()])
    assert whole["AUC"].value == pytest.approx(expected)
    assert whole["pixel AP"].value == pytest.approx(np.mean([share(box) for box in BOXES.values()]))
    # The center lies in box 400, and on the corner that 100 ends at: of the four central pixels it has one.
    # 200 begins in the middle: two of them; 300 reaches the middle from below left: one.
    center = results["center", "none", "test"].metrics
    assert center["pointing"].value == pytest.approx((1 + 1 / 4 + 2 / 4 + 1 / 4) / 4)
    random = results["random", "none", "test"].metrics
    assert len(random["AUC"].per_fold) == 5 and guided.metrics["AUC"].chance == random["AUC"].value
    assert random["AUC"].value < guided.metrics["AUC"].value
    assert guided.counts == {
        "num_clips": 4,
        "num_clips_with_visible_source": 4,
        "num_clips_without_visible_source": 0,
        "num_videos": 4,
    }
    out = capsys.readouterr().out
    assert "guided-slice" in out and "whole-image" in out and "8 boxes" in out


def test_what_is_missing_or_damaged_is_counted_and_named(tmp_path, sees_white, capsys):
    data = tmp_path / "flickr"
    write_pairs(data, {**BOXES, "500": BOXES["100"], "600": BOXES["100"], "700": BOXES["100"]})
    annotations = write_flickr(
        tmp_path / "xml", {**BOXES, "600": BOXES["100"], "700": BOXES["100"], "800": BOXES["100"]}
    )
    (data / "frames" / "600.jpg").write_bytes(b"no image")
    (data / "audio" / "700.wav").write_bytes(encode_audio(tone(500, 1000)))
    (tmp_path / "test.csv").write_text("100,3\n200,1\n300,0\n400,9\n500,1\n600,1\n700,1\n800,1\n")
    results = run(
        tmp_path, "--dataset", "flickr-soundnet", "--data", data, "--annotations", annotations,
        "--list", tmp_path / "test.csv", "--no-untrained",
    )  # fmt: skip
    counts = results["guided-slice", "fake", "test"].counts
    assert counts["num_clips"] == 4
    assert {name: count for name, count in counts.items() if "skipped" in name or "bad" in name} == {
        "skipped no-annotation": 1,  # 500
        "skipped missing-image": 1,  # 800
        "skipped too-short": 1,  # 700
        "bad clips bad-image": 1,  # 600
    }
    (told,) = (tmp_path / "out").rglob("skipped.tsv")
    assert set(told.read_text().splitlines()) == {
        "500\tno-annotation", "800\tmissing-image", "700\ttoo-short", "600\tbad-image",
    }  # fmt: skip
    out = capsys.readouterr().out
    assert "skipped missing-image: 1" in out and "bad clips bad-image: 1" in out


def test_crop_cuts_boxes_with_the_picture_and_tells_what_is_lost(tmp_path, sees_white, capsys):
    data = tmp_path / "pairs"
    # 192x128 is scaled to 108x72, of which columns 22 .. 86 and rows 4 .. 68 are seen: cells of 8x8 begin there.
    rows = (20 / 72, 52 / 72)
    boxes = {
        "in": (38 / 108, rows[0], 70 / 108, rows[1]),
        "half": (0.0, rows[0], 54 / 108, rows[1]),
        "out": (0.0, 0.0, 0.1, 0.5),
    }
    write_pairs(data, boxes)
    annotations = write_flickr(tmp_path / "xml", boxes)
    results = run(
        tmp_path, "--dataset", "flickr-soundnet", "--data", data, "--annotations", annotations,
        "--fit", "crop", "--no-untrained",
    )  # fmt: skip
    guided = results["guided-slice", "fake", "test"]
    assert guided.protocol.startswith("stills crop, ")
    assert guided.metrics["cIoU@0.5"].value == 1.0 and guided.metrics["pointing"].value == 1.0
    assert guided.counts["num_clips"] == 2 and guided.counts["skipped outside-crop"] == 1
    lost = guided.config["share of truth outside of what was seen"]
    assert lost == pytest.approx((0 + 22 / 54 + 1) / 3, abs=0.02)
    assert f"{lost:.1%} of the ground truth lies outside" in capsys.readouterr().out


def vggss_rows(names: dict[str, tuple[float, float, float, float]]) -> str:
    return json.dumps([{"file": name, "class": "bell", "bbox": [list(box)]} for name, box in names.items()])


def test_vggss_stills_and_pairs_without_source(tmp_path, sees_white):
    data = tmp_path / "vggss"
    names = {f"{'v' * 10}{key[0]}_{key:0>6}": box for key, box in BOXES.items()}
    write_pairs(data, names)
    (tmp_path / "vggss.json").write_text(vggss_rows(names))
    # An image beside silence: the fake network hears that nothing sounds.
    (data / "audio" / "quiet.wav").write_bytes(encode_audio(np.zeros(2 * SAMPLE_RATE, dtype=np.float32)))
    first = next(iter(names))
    (tmp_path / "plus.csv").write_text(f"{first},{first},sounding\n{first},quiet,non-sounding\n")
    results = run(
        tmp_path, "--dataset", "vggss", "--data", data, "--annotations", tmp_path / "vggss.json",
        "--extended", tmp_path / "plus.csv", "--no-untrained",
    )  # fmt: skip
    guided = results["guided-slice", "fake", "test"]
    assert guided.protocol == "stills squash, 1s, top-half, extended, guided-slice"
    assert guided.counts["num_clips_without_visible_source"] == 1 and guided.counts["num_clips"] == 5
    assert guided.metrics["detection AP"].value == 1.0 and guided.metrics["detection max-F1"].value == 1.0
    assert results["predicted-slice", "fake", "test"].metrics["detection max-F1"].value == 0.0
    assert guided.metrics["cIoU@0.5"].value == 1.0


def write_video(path: Path, box: tuple[float, float, float, float], seconds: float = 3.0) -> None:
    """Black, and in the middle second with the white box; a tone."""
    with av.open(str(path), "w") as container:
        video = container.add_stream("libx264", rate=16, options={"crf": "10", "preset": "ultrafast"})
        video.width, video.height, video.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        audio = container.add_stream("aac", rate=SAMPLE_RATE, layout="mono")
        for index in range(round(16 * seconds)):
            shown = (
                picture(box) if abs((index + 0.5) / 16 - seconds / 2) < 0.5 else np.zeros_like(picture(box))
            )
            container.mux(video.encode(av.VideoFrame.from_ndarray(shown, format="rgb24")))
        container.mux(video.encode(None))
        sound = tone(440, round(seconds * SAMPLE_RATE)) + noise(1, round(seconds * SAMPLE_RATE))
        for start in range(0, len(sound), 1024):
            block = av.AudioFrame.from_ndarray(
                sound[None, start : start + 1024], format="fltp", layout="mono"
            )
            block.sample_rate, block.pts = SAMPLE_RATE, start
            container.mux(audio.encode(block))
        container.mux(audio.encode(None))


def test_vggss_videos_are_seen_at_their_middle(tmp_path, sees_white):
    data = tmp_path / "videos"
    data.mkdir()
    # In cells of what is seen, as above.
    boxes = {
        "a": (38 / 108, 4 / 72, 70 / 108, 36 / 72),
        "b": (54 / 108, 20 / 72, 86 / 108, 52 / 72),
        "gone": (0.2, 0.2, 0.4, 0.4),
        "brief": (0.2, 0.2, 0.4, 0.4),
    }
    write_video(data / "a.mp4", boxes["a"])
    write_video(data / "b.mp4", boxes["b"], seconds=4.0)
    write_video(data / "brief.mp4", boxes["brief"], seconds=0.5)
    (tmp_path / "vggss.json").write_text(vggss_rows(boxes))
    results = run(
        tmp_path,
        "--dataset",
        "vggss",
        "--data",
        data,
        "--annotations",
        tmp_path / "vggss.json",
        "--no-untrained",
    )
    guided = results["guided-slice", "fake", "test"]
    assert guided.protocol == "videos, 1s, top-half, guided-slice"
    assert guided.metrics["cIoU@0.5"].value == 1.0 and guided.metrics["pixel AP"].value > 0.9
    assert guided.counts["num_clips"] == 2
    assert guided.counts["skipped missing"] == 1 and guided.counts["skipped too-short"] == 1


def test_published_boxes_and_videos_go_together(tmp_path, sees_white, real_data):
    """Two of the real videos are in VGG-SS, under names with milliseconds."""
    lists = real_data / "annotations_full"
    results = run(
        tmp_path, "--dataset", "vggss", "--data", real_data / "av_videos" / "vggsound",
        "--annotations", lists / "vggss.json", "--list", lists / "vggss_test.csv", "--no-untrained",
    )  # fmt: skip
    guided, whole = results["guided-slice", "fake", "test"], results["whole-image", "none", "test"]
    assert guided.counts["num_clips"] == 2
    assert guided.counts["skipped missing"] == 5154 and guided.counts["skipped no-box"] == 2
    assert whole.metrics["cIoU@0.5"].value == 1.0  # both fill most of the picture
    assert 0 < guided.config["share of truth outside of what was seen"] < 0.4


def save_run(folder: Path) -> Path:
    """A run folder with a random network of the demo's kind, for small pictures."""
    config = PRESETS["demo"]()
    video = VideoConfig(num_frames=4, short_side=36, crop_size=32)
    config = dataclasses.replace(config, loader=dataclasses.replace(config.loader, video=video))
    torch.manual_seed(1)
    state = {"model": build_model(config).state_dict(), "commit": "0123456789"}
    save_checkpoint(folder / "checkpoints", 40, config, state, keep=1)
    return folder


def test_a_random_network_is_scored_beside_fresh_weights_and_asked_once(tmp_path, monkeypatch, capsys):
    checkpoint = save_run(tmp_path / "run")
    data = tmp_path / "flickr"
    write_pairs(data, BOXES)
    annotations = write_flickr(data / "Annotations", BOXES)
    arguments = ["--dataset", "flickr-soundnet", "--data", data, "--annotations", annotations, "--draws", 2]
    first = run(tmp_path, *arguments, checkpoint=str(checkpoint))
    names = [f"{kind}-{moment}" for kind in ("guided", "predicted") for moment in ("slice", "mean")]
    source = next(
        result.checkpoint for result in first.values() if result.checkpoint not in ("none", "random")
    )
    assert set(first) == {
        *((name, network, "test") for name in names for network in (source, "random")),
        *((name, "none", "test") for name in ("whole-image", "center", "random")),
    }
    trained, fresh = first["guided-slice", source, "test"], first["guided-slice", "random", "test"]
    assert trained.checkpoint_digest != fresh.checkpoint_digest and fresh.checkpoint_digest is not None
    assert fresh.config["weights"] != trained.config["weights"] == source
    assert trained.metrics["pixel AP"].value != fresh.metrics["pixel AP"].value

    def refuse(*_):
        raise AssertionError("the network was asked again")

    with monkeypatch.context() as patch:
        patch.setattr(localise, "map_encoder", lambda *_: refuse)
        again = run(tmp_path, *arguments, checkpoint=str(checkpoint))
        other = run(tmp_path, *arguments, "--threshold", "half-range", checkpoint=str(checkpoint))
    assert {key: result.metrics for key, result in again.items()} == {
        key: result.metrics for key, result in first.items()
    }
    ours, theirs = (each["guided-slice", source, "test"].metrics for each in (other, first))
    assert ours["pixel AP"] == theirs["pixel AP"] and ours["AUC"] != theirs["AUC"]
    assert read_results(tmp_path / "results.jsonl")[-1].protocol == "stills squash, 1s, half-range, random"
    assert "trained" in capsys.readouterr().out
    alone = run(tmp_path, *arguments[:-2], "--limit", 2, checkpoint=f"random:{checkpoint}")
    assert {network for _, network, _ in alone} == {"random", "none"}
    assert "trained" not in capsys.readouterr().out
    assert alone["guided-slice", "random", "test"].counts["num_clips"] == 2


def test_a_killed_run_goes_on_where_it_was(tmp_path, sees_white, monkeypatch):
    data = tmp_path / "flickr"
    write_pairs(data, BOXES)
    annotations = write_flickr(data / "Annotations", BOXES)
    arguments = [
        "--dataset",
        "flickr-soundnet",
        "--data",
        data,
        "--annotations",
        annotations,
        "--no-untrained",
    ]
    whole = run(tmp_path / "whole", *arguments)
    often = functools.partial(localise.extract_features, save_every_seconds=0.0)
    monkeypatch.setattr(localise, "extract_features", often)
    build, seen = localise.map_encoder, []

    def counted(networks, device, killed_at):
        encode = build(networks, device)

        def call(batch):
            if len(seen) == killed_at:
                raise KeyboardInterrupt
            seen.append(batch.step)
            return encode(batch)

        return call

    monkeypatch.setattr(localise, "map_encoder", lambda *args: counted(*args, killed_at=1))
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "killed", *arguments)
    assert seen == [0] and not (tmp_path / "killed" / "results.jsonl").exists()
    monkeypatch.setattr(localise, "map_encoder", lambda *args: counted(*args, killed_at=None))
    resumed = run(tmp_path / "killed", *arguments)
    assert seen == [0, 1]
    assert {key: result.metrics for key, result in resumed.items()} == {
        key: result.metrics for key, result in whole.items()
    }


@pytest.fixture(scope="module")
def small_world(tmp_path_factory) -> tuple[Path, Path]:
    """(world, shards of its test videos)."""
    folder = tmp_path_factory.mktemp("world")
    command = [sys.executable, "tools/make_world.py", "--out", str(folder / "world"), "--workers", "1"]
    command += ["--train-videos", "1", "--test-videos", "8", "--test-seconds", "3", "--seed", "5"]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=120)
    # Off-screen and silent videos are rare; two are marked so, as what is asked is what becomes of them.
    for name, sound in (("easy_000000", "off-screen"), ("hard_000001", "silent")):
        path = folder / "world" / "test" / f"{name}.json"
        truth = json.loads(path.read_text())
        path.write_text(json.dumps({**truth, "sound": sound}))
    settings = SliceSettings(max_clips=2, preset="ultrafast")
    videos, out = str(folder / "world" / "test"), folder / "shards"
    make_shards(ShardConfig(videos=videos, out=str(out), split="test", workers=1, slicing=settings))
    return folder / "world", out


def test_generated_world_is_scored_by_part_and_step_by_step(small_world, tmp_path):
    world, shards = small_world
    checkpoint = save_run(tmp_path / "run")
    results = run(
        tmp_path, "--dataset", "world", "--data", shards, "--annotations", world, "--draws", 2, "--batch-size", 4,
        checkpoint=str(checkpoint),
    )  # fmt: skip
    (guided,) = (
        result
        for (name, network, split), result in results.items()
        if name == "guided-steps" and split == "test" and network not in ("random", "none")
    )
    assert set(guided.metrics) == {"pixel AP", "pointing"}
    assert {split for _, _, split in results} == {"test", "test easy", "test hard"}
    easy = next(
        r for (name, n, split), r in results.items() if (name, n, split) == ("center", "none", "test easy")
    )
    counts = results["center", "none", "test"].counts
    # Two of eight videos have no visible source, two seconds of each video are read.
    assert counts["num_clips_without_visible_source"] == 4
    assert counts["num_clips"] + counts.get("skipped outside-crop", 0) == 16
    assert easy.counts["num_clips_without_visible_source"] == 2
    assert "detection AP" in results["whole-image", "none", "test"].metrics
    # Objects are small: a constant map's average precision over pixels and steps is their share.
    steps = results["whole-image-steps", "none", "test"].metrics
    assert 0.005 < steps["pixel AP"].value < 0.2
    assert steps["pointing"].value == pytest.approx(steps["pixel AP"].value, rel=1e-6)
    assert (
        guided.metrics["pixel AP"].chance == results["random-steps", "none", "test"].metrics["pixel AP"].value
    )


def test_clear_messages_for_what_cannot_be_done(tmp_path, sees_white, capsys):
    data = tmp_path / "flickr"
    write_pairs(data, {"100": BOXES["100"]})
    annotations = write_flickr(tmp_path / "xml", {"999": BOXES["100"]})
    common = [
        "fake",
        "--out",
        str(tmp_path / "out"),
        "--results",
        str(tmp_path / "r.jsonl"),
        "--workers",
        "0",
        "--no-untrained",
    ]
    flickr = [*common, "--dataset", "flickr-soundnet", "--data", str(data), "--annotations"]
    world = [*common, "--dataset", "world", "--data", str(data), "--annotations", str(data)]
    for arguments, message in (
        ([*flickr, str(annotations)], "none of the 1 annotated pairs"),
        ([*flickr, str(tmp_path / "nowhere")], "is not a folder"),
        ([*flickr, str(annotations), "--draws", "0"], "--draws is 0, expected at least 1"),
        ([*flickr, str(annotations), "--limit", "0"], "--limit is 0"),
        ([*world, "--limit", "3"], "not for the generated world"),
        ([*world, "--clip-seconds", "2"], "expected 1 for the generated world"),
    ):
        assert localise.main(arguments) == 1
        assert message in capsys.readouterr().err
    assert not (tmp_path / "r.jsonl").exists()
