"""tools.visualize: maps lie on the pixels they are of, at the time they are of, and no file name does harm."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pytest
import torch
from PIL import Image

from cmac.checkpoint import build_model, save_checkpoint
from cmac.config import demo
from cmac.evaluation import viewer
from loaders.augment import ClipAugmentation
from loaders.batch import BadClipRecord
from loaders.config import AudioConfig, VideoConfig
from loaders.raw_index import index_files
from shards.ffmpeg import find_ffmpeg
from tools import visualize
from tools.make_synthetic_videos import make_flash_beep_video

CONFIGS = (VideoConfig(num_frames=32, short_side=72, crop_size=64), AudioConfig())
SETTINGS = visualize.Settings(seconds=2.0, num_columns=1)
CORNER = (130, 76)
"""Left and top of the first tile of a grid, pixels."""


class PixelModel:
    """Maps that are high exactly where the network's input is red or white, and its sound loud."""

    def encode(self, frames: torch.Tensor, log_mel: torch.Tensor) -> SimpleNamespace:
        red, green, blue = (frames.float() / 255).unbind(1)  # (N, T, H, W)
        is_marked = (red > 0.5) & ((green < 0.3) == (blue < 0.3)) & (abs(green - blue) < 0.3)
        maps_v = is_marked.float()
        is_loud = (log_mel.amax(dim=2, keepdim=True) > 1.5).float()  # (N, 1, 1, S)
        maps_a = is_loud.expand_as(log_mel)[:, 0]
        return SimpleNamespace(
            guided_v=maps_v, predicted_v=1 - maps_v, guided_a=maps_a, predicted_a=1 - maps_a
        )


CROP = ClipAugmentation(scaled_height=8, scaled_width=16, crop_top=0, crop_left=6, crop_size=8, flip=True)


@dataclass(frozen=True)
class BoxVideo:
    """A red box on black."""

    size: tuple[int, int]
    """As stored."""
    box: tuple[int, int, int, int]
    """x, y, width, height, as stored."""
    shown_size: tuple[float, float]
    """As it is to be seen, with square pixels."""
    shown_center: tuple[float, float]
    sar: str = "1"
    rotation: int = 0

    def write(self, path: Path) -> Path:
        width, height = self.size
        x, y, across, down = self.box
        picture = (
            f"color=black:s={width}x{height}:r=25:d=1.04,format=rgb24,"
            f"drawbox=x={x}:y={y}:w={across}:h={down}:c=red:t=fill,setsar={self.sar}"
        )
        command = [find_ffmpeg(), *"-nostdin -v error -y -f lavfi -i".split(), picture]
        command += ["-f", "lavfi", "-i", "sine=r=22050:d=1.04", "-pix_fmt", "yuv444p"]
        whole = path.with_suffix(".whole.mp4")
        subprocess.run([*command, "-threads", "1", str(whole)], check=True)
        turn = ["-display_rotation", str(self.rotation)] if self.rotation else []
        subprocess.run(
            [
                find_ffmpeg(),
                *"-nostdin -v error -y".split(),
                *turn,
                "-i",
                str(whole),
                "-c",
                "copy",
                str(path),
            ],
            check=True,
        )
        whole.unlink()
        return path


BOXES = {
    "wide": BoxVideo((320, 120), (130, 20, 30, 16), (320, 120), (145, 28)),
    "tall": BoxVideo((90, 240), (56, 130, 16, 30), (90, 240), (64, 145)),
    "odd": BoxVideo((171, 131), (101, 71, 25, 19), (171, 131), (113.5, 80.5)),
    # A quarter turn counter-clockwise: what was at (x, y) is seen at (y, 200 - x).
    "rotated": BoxVideo((200, 120), (60, 20, 30, 20), (120, 200), (30, 125), rotation=90),
    "anamorphic": BoxVideo((100, 120), (55, 25, 10, 20), (200, 120), (120, 35), sar="2"),
    # Pixels that are twice as wide as high, turned: twice as high as wide.
    "anamorphic-rotated": BoxVideo((100, 120), (30, 25, 10, 20), (120, 200), (35, 130), sar="2", rotation=90),
}
FLASHES = {
    "mp4": dict(rate=44_100),
    "sound-late": dict(audio_start=0.3, suffix=".mkv", rate=44_100),
    "starts-late": dict(video_start=1.4, audio_start=1.7, suffix=".ts", rate=44_100),
    "mono-8khz": dict(sample_rate=8000, rate=8000),
    "surround": dict(sample_rate=48_000, channels=6, rate=48_000),
}
"""A flash and a beep half a second after the picture starts."""


@dataclass(frozen=True)
class Output:
    folder: Path
    left_out: list[str]
    told: list[str]
    starts: dict[str, float]
    """When what is shown of a video starts, on its clock, by its stem."""

    def frames(self, stem: str) -> np.ndarray:
        with av.open(str(self.folder / f"{stem}.mp4")) as container:
            return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])

    def sound(self, stem: str) -> tuple[np.ndarray, np.ndarray, int]:
        """(times a player plays the samples at, samples (C, n), rate)."""
        times, samples = [], []
        with av.open(str(self.folder / f"{stem}.mp4")) as container:
            for frame in container.decode(audio=0):
                times.append(frame.time + np.arange(frame.samples) / frame.sample_rate)
                samples.append(frame.to_ndarray())
            rate = container.streams.audio[0].sample_rate
        return np.concatenate(times), np.concatenate(samples, axis=1), rate


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Output:
    """All the videos above in one run."""
    folder = tmp_path_factory.mktemp("visualize")
    paths = [str(video.write(folder / f"{name}.mp4")) for name, video in BOXES.items()]
    for name, options in FLASHES.items():
        options = {key: value for key, value in options.items() if key not in ("rate", "suffix")}
        path = folder / f"{name}{FLASHES[name].get('suffix', '.mp4')}"
        paths.append(str(make_flash_beep_video(path, fps="32", seconds=1.36, size=(96, 72), **options)))
    told: list[str] = []
    left_out = visualize.visualize(PixelModel(), CONFIGS, paths, folder / "out", SETTINGS, tell=told.append)
    source_folder, sources = visualize.find_sources(paths)
    index = index_files(
        source_folder, list(sources.values()), min_seconds=lambda video: 1, cache=folder / "index", workers=0
    )
    starts = {Path(video.video_id).stem: video.start_seconds for video in index.videos}
    return Output(folder / "out", left_out, told, starts)


def panel_boxes(name: str) -> tuple[viewer.Layout, tuple[int, int]]:
    size = viewer.panel_size(*(round(side) for side in BOXES[name].shown_size))
    return viewer.make_layout(*size), size


def marked(panel: np.ndarray) -> np.ndarray:
    """bool (H, W): where a panel has the colors of a high map."""
    return panel[..., 1] > 120  # a red box that is only dimmed or grey has less green


def assert_on_the_box(mask: np.ndarray, name: str) -> None:
    height, width = mask.shape
    video = BOXES[name]
    rows, columns = np.nonzero(mask)
    assert len(rows), "nothing is marked"
    scale = width / video.shown_size[0], height / video.shown_size[1]
    center = columns.mean() + 0.5, rows.mean() + 0.5
    for found, expected, factor in zip(center, video.shown_center, scale):
        assert found == pytest.approx(expected * factor, abs=2.0), (center, video.shown_center, scale)
    area = video.box[2] * video.box[3] * scale[0] * scale[1]
    area *= video.shown_size[0] * video.shown_size[1] / (video.size[0] * video.size[1])
    assert len(rows) == pytest.approx(area, rel=0.35)


def test_every_video_is_shown(output):
    assert output.left_out == []
    expected = {f"{stem}{suffix}" for stem in (*BOXES, *FLASHES) for suffix in (".png", ".mp4")}
    assert {path.name for path in output.folder.iterdir()} == expected | {"index.html"}
    assert len(output.told) == len(BOXES) + len(FLASHES) + 1


@pytest.mark.parametrize("name", BOXES)
def test_map_lies_on_the_box_in_the_video(output, name):
    frames = output.frames(name)
    layout, (width, height) = panel_boxes(name)
    assert frames.shape[1:] == (layout.height, layout.width, 3)
    for frame in (frames[0], frames[len(frames) // 2], frames[-1]):
        picture, guided, predicted = (
            frame[box.y : box.y + box.height, box.x : box.x + box.width] for box in layout.panels
        )
        is_red = (picture[..., 0] > 150) & (picture[..., 1] < 100)
        assert_on_the_box(is_red, name)
        assert_on_the_box(marked(guided), name)
        # The other map is high in the rest of the square, and nowhere else.
        is_high = marked(predicted)
        side = 64 / 72 * min(width, height)
        assert is_high.sum() + marked(guided).sum() == pytest.approx(side**2, rel=0.1)
        rows, columns = np.nonzero(is_high)
        assert columns.max() - columns.min() == pytest.approx(side, abs=4)
        assert (columns.max() + columns.min()) / 2 == pytest.approx(width / 2, abs=2)
        assert (rows.max() + rows.min()) / 2 == pytest.approx(height / 2, abs=2)


@pytest.mark.parametrize("name", BOXES)
def test_map_lies_on_the_box_in_the_grid(output, name):
    grid = np.asarray(Image.open(output.folder / f"{name}.png"))
    _, (width, height) = panel_boxes(name)
    (left, top), gap = CORNER, 6
    assert grid.shape[1] == left + width + gap
    tiles = [grid[top + row * (height + gap) :][:height, left : left + width] for row in range(3)]
    assert_on_the_box((tiles[0][..., 0] > 150) & (tiles[0][..., 1] < 100), name)
    assert_on_the_box(marked(tiles[1]), name)


def first_rise(values: np.ndarray) -> int:
    """Index of the first value above the middle between the lowest and the highest."""
    return int(np.argmax(values > (values.min() + values.max()) / 2))


@pytest.mark.parametrize("name", FLASHES)
def test_map_picture_and_sound_keep_their_time(output, name):
    options = FLASHES[name]
    video_start, audio_start = options.get("video_start", 0.0), options.get("audio_start", 0.0)
    start = output.starts[name]
    assert start == pytest.approx(abs(video_start - audio_start), abs=0.03)  # where both are there
    event = video_start - min(video_start, audio_start) + 0.5 - start
    frames = output.frames(name)
    panels = viewer.make_layout(*viewer.panel_size(96, 72)).panels
    middles = [
        frames[:, box.y + box.height // 2 - 8 :][:, :16, box.x + box.width // 2 : box.x + box.width // 2 + 16]
        for box in panels
    ]
    picture, guided, predicted = (part.astype(float)[..., 1].mean(axis=(1, 2)) for part in middles)
    assert abs(first_rise(picture) - event * 32) <= 1
    assert abs(first_rise(guided) - event * 32) <= 1
    assert abs(first_rise(guided) - first_rise(picture)) <= 1
    assert first_rise(-predicted) == pytest.approx(event * 32, abs=1)
    times, samples, rate = output.sound(name)
    assert rate == options["rate"] and len(samples) == min(options.get("channels", 1), 2)
    loud = times[np.abs(samples).max(axis=0) > 0.25]
    assert loud[0] == pytest.approx(event, abs=0.02)
    assert times[0] == pytest.approx(0, abs=1e-3) and times[-1] == pytest.approx(len(frames) / 32, abs=0.15)


def test_spectrogram_has_the_sound_at_its_time(output):
    frame = output.frames("mp4")[-1]  # the mark of the time is at the end
    layout = viewer.make_layout(*viewer.panel_size(96, 72))
    seconds = 1.36 // (1 / 32) / 32
    for box, is_loud in ((layout.strips[1], 1), (layout.strips[2], -1)):
        strip = frame[box.y : box.y + box.height, box.x : box.x + box.width - 8].astype(float)
        onset = first_rise(is_loud * strip[..., 0].mean(axis=0)) / box.width * seconds
        assert onset == pytest.approx(0.5, abs=0.03)


def test_file_names_are_safe_and_no_two_alike():
    names = [
        "a/clip.mp4", "b/clip.mp4", "CLIP.MP4", "index.mp4", "-rf $(reboot);'\".mp4", "..mp4", "new\nline.mp4",
        os.fsdecode(b"caf\xe9.mp4"), "\N{SNOWMAN}.mp4", "x" * 300 + ".mp4", "<script>.mp4", "clip-2.mp4",
    ]  # fmt: skip
    stems = visualize.safe_stems(names)
    assert stems[:4] == ["clip", "clip-2", "CLIP-3", "index-2"]
    assert len({stem.lower() for stem in stems}) == len(names)
    for stem in stems:
        assert len(stem) <= 90 and stem[0] not in ".-_"
        assert set(stem) <= set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-")


def test_names_are_short_where_that_is_enough():
    paths = ["a/clip.mp4", "b/clip.mp4", "/long/way/to/other.mp4"]
    assert visualize.short_names(paths) == ["a/clip.mp4", "b/clip.mp4", "other.mp4"]
    assert visualize.printable(os.fsdecode(b"\xe9\n\x1b[31m\xe2\x98\x83")) == "???[31m\N{SNOWMAN}"


def test_windows_after_the_part_that_is_shown_are_neither_read_nor_counted():
    def batches() -> Iterator[SimpleNamespace]:
        for first in (0, 4, 8):
            is_bad = [place in (1, 6, 7) for place in range(first, first + 4)]
            yield SimpleNamespace(
                frames=torch.zeros(4, 3, 2, 8, 8, dtype=torch.uint8),
                log_mel=torch.zeros(4, 1, 5, 7),
                keys=tuple(f"key {place}" for place in range(first, first + 4)),
                clips=tuple(
                    None
                    if bad
                    else SimpleNamespace(
                        start_seconds=2 + 0.5 * (first + row),
                        end_seconds=3 + 0.5 * (first + row),
                        source_crop=(0.0, 0.0, 40.0, 20.0),
                        source_width=40,
                        source_height=20,
                    )
                    for row, bad in enumerate(is_bad)
                ),
                augmentations=(CROP,) * 4,
                bad=tuple(
                    BadClipRecord(key=f"key {first + row}", shard="a", reason="decode-error")
                    for row, bad in enumerate(is_bad)
                    if bad
                ),
            )
            assert first < 4, "read on after all that is shown"

    windows, bad = visualize.read_windows(PixelModel(), batches(), "cpu", 2.0, 0.5, 5.25)
    assert [window.start_seconds for window in windows] == [2.0, 3.0, 3.5, 4.0, 4.5]
    assert bad == {"decode-error": 2}  # that at 2.5 and that at 5.0; the one at 5.5 is not shown
    assert windows[0].region == (0.375, 0.0, 0.5, 1.0) and windows[0].flip
    assert windows[0].guided_v.shape == (2, 8, 8) and windows[0].guided_a.shape == (7, 5)
    assert windows[0].log_mel.shape == (7, 5)


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a checkpoint of fresh weights."""
    folder = tmp_path_factory.mktemp("run")
    config = demo()
    save_checkpoint(folder / "checkpoints", 1, config, {"model": build_model(config).state_dict()}, keep=1)
    return folder


@pytest.fixture
def in_folder(tmp_path: Path) -> Iterator[Path]:
    """The working folder, for names that are given relative to it."""
    before = Path.cwd()
    os.chdir(tmp_path)
    yield tmp_path
    os.chdir(before)


def test_command_shows_files_of_any_name_and_tells_what_it_leaves_out(run_folder, in_folder, capsys):
    make_flash_beep_video("plain.mp4", seconds=1.1, size=(64, 48))
    os.mkdir("other")
    names = ["./--out=<b>$(touch pwned)\n;.mp4", os.fsdecode(b"other/caf\xe9 [bold].mp4")]
    shutil.copy("plain.mp4", names[0])
    make_flash_beep_video("zeros.mp4", seconds=1.1, size=(64, 48), sound="zeros").rename(names[1])
    make_flash_beep_video("silent.mp4", seconds=1.1, size=(64, 48), sound="none")
    make_flash_beep_video("short.mp4", seconds=0.5, size=(64, 48))
    Path("text.mp4").write_text("not a video")
    bad = ["silent.mp4", "short.mp4", "text.mp4", "missing.mp4", "other"]
    arguments = [str(run_folder), "plain.mp4", *names, "plain.mp4", *bad, "--columns", "1"]
    assert visualize.main([*arguments, "--out", "out"]) == 1
    told = capsys.readouterr().out
    reasons = {
        "silent.mp4": "it has no sound, which the guided map needs",
        "short.mp4": "it is shorter than the 1 s that the network looks at",
        "text.mp4": "it is no video that can be decoded",
        "missing.mp4": "there is no such file",
        "other": "the file cannot be read",
    }
    page = Path("out/index.html").read_text(encoding="utf-8")
    for name, reason in reasons.items():
        assert f"{name} is left out: {reason}\n" in told and f"<li>{name} is left out: {reason}</li>" in page
    stems = sorted(path.stem for path in Path("out").glob("*.mp4"))
    assert stems == ["caf_bold", "out_b_touch_pwned", "plain"]  # once, though it was named twice
    assert "--out=&lt;b&gt;$(touch pwned)?;.mp4" in page and "caf? [bold].mp4" in page and "<b>" not in page
    assert "--out=<b>$(touch pwned)?;.mp4" in told and "caf? [bold].mp4" in told
    silence = "its sound is silence: what is guided by it means nothing"
    assert page.count(silence) == 1 and page.index(silence) > page.index("caf? [bold].mp4")
    assert not Path("pwned").exists() and len(told.splitlines()) == len(stems) + len(bad) + 1


def test_command_fails_where_nothing_can_be_shown(run_folder, in_folder, capsys):
    make_flash_beep_video("silent.mp4", seconds=1.1, size=(64, 48), sound="none")
    assert visualize.main([str(run_folder), "silent.mp4", "missing.mp4", "--out", "out"]) == 1
    captured = capsys.readouterr()
    assert "silent.mp4 is left out: it has no sound" in captured.out
    assert "none of the videos can be shown" in captured.err and not list(Path("out").iterdir())
    assert visualize.main([str(run_folder), "silent.mp4", "--out", "silent.mp4/out"]) == 1
    assert "silent.mp4" in capsys.readouterr().err
    assert visualize.main(["nowhere", "silent.mp4", "--out", "out"]) == 1
    assert "nowhere" in capsys.readouterr().err


def test_command_wants_a_model_that_has_maps(monkeypatch, capsys):
    monkeypatch.setattr(visualize, "open_encoders", lambda args: SimpleNamespace(model=None))
    assert visualize.main(["gdt.pth", "a.mp4"]) == 1
    assert "gdt.pth: holds encoders without filters and maps" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seconds", "0.5"], "--seconds is 0.5, expected 1 to 600"),
        (["--seconds", "nan"], "--seconds is nan"),
        (["--stride", "2"], "--stride is 2, expected 0.03125 to 1 seconds"),
        (["--columns", "0"], "--columns is 0, expected at least 1"),
        (["--workers", "-1"], "--workers is -1, expected at least 0"),
    ],
)
def test_settings_that_make_no_sense_are_refused(arguments, message, capsys):
    assert visualize.main(["run", "a.mp4", *arguments]) == 1
    assert message in capsys.readouterr().err


def test_page_that_might_become_too_large_is_refused_before_anything_is_done(tmp_path):
    settings = visualize.Settings(seconds=120)
    with pytest.raises(
        ValueError, match=r"40 videos of --seconds 120 may make a page of 16\d\d MiB.*lower --sec"
    ):
        visualize.visualize(PixelModel(), CONFIGS, ["a.mp4"] * 40, tmp_path / "out", settings)
    assert not (tmp_path / "out").exists()


def test_long_videos_are_cut_and_damaged_ones_shown_as_far_as_they_go(tmp_path):
    path = make_flash_beep_video(tmp_path / "damaged.mp4", seconds=4.0, size=(96, 72), gop_frames=10)
    content = bytearray(path.read_bytes())
    media = content.index(b"mdat") + 4
    length = int.from_bytes(content[media - 8 : media - 4], "big")
    first, count = media + length * 2 // 5, length // 5
    content[first : first + count] = bytes(count)  # the index stays whole
    path.write_bytes(content)
    told: list[str] = []
    settings = visualize.Settings(seconds=3.5, num_columns=1)
    left_out = visualize.visualize(
        PixelModel(), CONFIGS, [str(path)], tmp_path / "out", settings, tell=told.append
    )
    assert left_out == []
    page = (tmp_path / "out/index.html").read_text(encoding="utf-8")
    for text in (
        "3.5 s of 4.0 s are shown (--seconds shows more)",
        "windows could not be decoded (decode-error ",
        "s of the picture could not be decoded",
    ):
        assert text in told[0] and text in page
    frames = Output(tmp_path / "out", [], told, {}).frames("damaged")
    assert len(frames) == 112
    layout = viewer.make_layout(*viewer.panel_size(96, 72))
    corner = frames[:, layout.panels[1].y + 4, layout.panels[1].x + 4].astype(int)
    is_missing = np.abs(corner - viewer.NO_MAP_COLOR).max(axis=1) < 12
    assert is_missing[40:88].any() and not is_missing[:32].any() and not is_missing[-16:].any()


def test_maps_of_real_videos_are_shown(real_data, run_folder, tmp_path, capsys):
    path = real_data / "av_videos" / "kinetics" / "PaddleHub_1.mp4"  # upright, pixels not quite square
    assert visualize.main([str(run_folder), str(path), "--seconds", "1", "--out", str(tmp_path / "out")]) == 0
    told = capsys.readouterr().out
    assert "1.0 s of 10.0 s are shown" in told and "2 windows" in told
    frames = Output(tmp_path / "out", [], [], {}).frames("PaddleHub_1")
    layout = viewer.make_layout(*viewer.panel_size(144, 256))
    assert frames.shape == (32, layout.height, layout.width, 3)
