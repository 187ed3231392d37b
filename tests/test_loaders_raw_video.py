"""Clips straight from original videos: in sync, what make_shards would cut there, and never made up."""

import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import pytest

from loaders import raw_index
from loaders.decode import decode_frames, decode_waveform
from loaders.raw_video import RawSecond, RawVideoReader, VideoIndex, _Picture, index_videos, random_start
from shards.ffmpeg import find_ffmpeg
from shards.schema import BadClip, clip_key, video_hash, video_number
from shards.slicing import SliceSettings, slice_video
from tools.make_synthetic_videos import make_flash_beep_video

MAX_OFFSET_SECONDS = 0.5 / 32 + 2e-3  # half an output frame, and what finding the beep's first samples costs
SOURCE_OFFSET_SECONDS = {"mpeg4 and mp3 in avi": 0.026, "vp8 and opus in webm": 0.007}  # these files are off
MILLISECOND = 24  # samples: what containers with a clock of milliseconds may be off


def index_folder(folder: Path, **options: object) -> VideoIndex:
    """Index made in this process, kept beside the folder."""
    options = {"cache": folder.parent / f"{folder.name}.index.json", "workers": 0, **options}
    return index_videos(folder, **options)


def reader_of(path: Path) -> RawVideoReader:
    """Reader of a folder with one video."""
    index = index_folder(path.parent)
    assert len(index.videos) == 1, index
    return RawVideoReader(index)


def make_video(
    tmp_path: Path, suffix: str = ".mp4", rotation: int = 0, mirrored: bool = False, **options: object
) -> Path:
    """`videos/a<suffix>`, see make_flash_beep_video; shown turned counter-clockwise, mirrored left to right
    after that."""
    folder = tmp_path / "videos"
    folder.mkdir(exist_ok=True)
    path = make_flash_beep_video(folder / f"a{suffix}", **options)
    if rotation or mirrored:
        whole = path.rename(tmp_path / path.name)
        turn = ["-display_rotation", str(rotation)] + ["-display_hflip"] * mirrored  # ffmpeg 6 has these
        subprocess.run(
            [imageio_ffmpeg.get_ffmpeg_exe(), *"-nostdin -v error".split(), *turn, "-i", str(whole)]
            + ["-c", "copy", str(path)],
            check=True,
        )
    return path


def correlation(first: np.ndarray, second: np.ndarray, max_lag: int) -> float:
    """Highest correlation of two waveforms, shifted by up to max_lag samples."""
    middle = first[max_lag : len(first) - max_lag]
    lags = range(2 * max_lag + 1)
    return max(np.corrcoef(middle, second[lag : lag + len(middle)])[0, 1] for lag in lags)


def psnr(first: np.ndarray, second: np.ndarray) -> float:
    error = np.mean((first.astype(np.float64) - second.astype(np.float64)) ** 2)
    return 10 * np.log10(255**2 / max(error, 1e-9))


def flashes_and_beeps(clip: RawSecond) -> tuple[list[float], list[float]]:
    """Times, counted from the clip's start, at which a flash and a beep begin inside the clip."""
    lit = clip.frames.reshape(len(clip.frames), -1).mean(1) > 150
    loud = np.flatnonzero(np.abs(clip.waveform) > 0.3) / 24_000
    onsets = [time for i, time in enumerate(loud) if i == 0 or time - loud[i - 1] > 0.3]
    flashes = [i / 32 for i in range(1, 32) if lit[i] and not lit[i - 1]]
    return flashes, [time for time in onsets if time > 0.002]


SYNC_CASES = {
    "25 fps": dict(fps="25"),
    "29.97 fps": dict(fps="30000/1001"),
    "30 fps": dict(fps="30"),
    "60 fps": dict(fps="60"),
    "B-frames": dict(fps="30", extra=("-preset", "veryfast", "-bf", "3")),
    "variable rate": dict(fps="30", variable_rate=True),
    "audio 300 ms late": dict(audio_start=0.3),
    "audio 320 ms early": dict(video_start=0.32),
    "audio 300 ms late, mkv": dict(audio_start=0.3, suffix=".mkv"),
    "container starts at 1.4 s": dict(video_start=1.4, audio_start=1.7, suffix=".ts"),
    "container starts at 2 s, mkv": dict(video_start=2.0, audio_start=2.0, suffix=".mkv"),
    "one key frame": dict(gop_frames=1000),
    "flv": dict(suffix=".flv"),
    "8 kHz": dict(sample_rate=8000),
    "mpeg4 and mp3 in avi": dict(codecs=("mpeg4", "libmp3lame"), suffix=".avi"),
    "vp8 and opus in webm": dict(codecs=("libvpx", "libopus"), suffix=".webm", sample_rate=48000),
    "mpeg4 and pcm in mov": dict(codecs=("mpeg4", "pcm_s16le"), suffix=".mov", channels=2),
}


@pytest.mark.parametrize("name", SYNC_CASES)
def test_flash_and_beep_stay_together_and_where_they_are(name: str, tmp_path: Path) -> None:
    options = dict(SYNC_CASES[name])
    reader = reader_of(make_video(tmp_path, seconds=3.6, size=(96, 72), **options))
    video = reader.video(0)
    # Events are at half a second of the picture and every (nearly) second from there; the clock starts with the
    # stream that comes first.
    lead = max(options.get("video_start", 0.0) - options.get("audio_start", 0.0), 0.0)
    num_events = 0
    last = video.start_seconds + video.duration_seconds - 1
    for start in (video.start_seconds, 0.37, 0.7, 1.0, 1.613, 2.05, last):
        if not video.start_seconds <= start <= last:
            continue
        clip = reader.read(0, start, short_side=72)
        assert clip.waveform.shape == (24_000,) and clip.waveform.dtype == np.float32
        flashes, beeps = flashes_and_beeps(clip)
        for flash in flashes:
            beep = min(beeps, key=lambda time: abs(time - flash), default=None)
            if beep is None or abs(beep - flash) > 0.45:
                continue
            num_events += 1
            assert abs(flash - beep) <= MAX_OFFSET_SECONDS + SOURCE_OFFSET_SECONDS.get(name, 0), (
                start,
                flash,
                beep,
            )
            event = (start + beep - lead - 0.5) % 1  # rates that are no whole numbers: up to 20 ms a second
            assert min(event, 1 - event) <= 0.045, (start, beep)
    assert num_events >= 3


PARITY_CASES = {
    "25 fps": dict(fps="25"),
    "29.97 fps": dict(fps="30000/1001"),
    "60 fps": dict(fps="60"),
    "B-frames, mkv": dict(extra=("-preset", "veryfast", "-bf", "3"), suffix=".mkv"),
    "audio 300 ms late": dict(audio_start=0.3),
    "transport stream": dict(video_start=1.4, audio_start=1.7, suffix=".ts"),
    "rotated 90": dict(rotation=90),
    "rotated 180": dict(rotation=180),
    "rotated 270": dict(rotation=-90),
    "mirrored": dict(mirrored=True),
    "mirrored and rotated": dict(rotation=90, mirrored=True),
    "5.1": dict(channels=6),
    "4:4:4": dict(pixel_format="yuv444p"),
    # 2.1 s: so that it is cut from its start on. ffmpeg's fps filter can start only at a whole frame of an avi.
    "mpeg4 with B-frames in avi": dict(
        seconds=2.1, codecs=("mpeg4", "libmp3lame"), suffix=".avi", extra=("-bf", "2", "-q:v", "2")
    ),
}


@pytest.mark.parametrize("name", PARITY_CASES)
def test_a_second_is_what_make_shards_cuts_there(name: str, tmp_path: Path) -> None:
    options = {"fps": "30", "size": (192, 144), "seconds": 2.6, **PARITY_CASES[name]}
    path = make_video(tmp_path, **options)
    sliced = slice_video(str(path), path.name, 0, SliceSettings(crf=10), find_ffmpeg(), 60)
    reader = reader_of(path)
    assert len(sliced.clips) >= 2
    for clip in sliced.clips:
        frames = decode_frames(clip.video, range(32), 144)
        waveform = decode_waveform(clip.audio)
        raw = reader.read(0, clip.start_seconds, short_side=144)
        assert raw.frames.shape == frames.shape
        assert psnr(raw.frames, frames) >= 30
        for index in range(32):  # none is of another time
            assert psnr(raw.frames[index], frames[index]) >= 25, index
        max_lag = MILLISECOND if path.suffix == ".mkv" else 0
        assert correlation(raw.waveform, waveform, max_lag) > 0.99
        assert abs(raw.info.loudness_dbfs - clip.loudness_dbfs) < 0.5


def test_parts_of_a_clip_are_those_of_the_whole(tmp_path: Path) -> None:
    reader = reader_of(
        make_video(
            tmp_path, fps="30", size=(160, 120), extra=("-preset", "veryfast", "-bf", "3"), rotation=90
        )
    )
    whole = reader.read(0, 1.21, short_side=60)
    assert whole.frames.shape == (32, 80, 60, 3)
    out = np.zeros((4, 40, 24, 3), np.uint8)
    part = reader.read(0, 1.21, short_side=60, frame_indices=(4, 12, 20, 28), window=(7, 5, 40, 24), out=out)
    assert part.frames is out
    np.testing.assert_array_equal(out, whole.frames[[4, 12, 20, 28], 7:47, 5:29])
    np.testing.assert_array_equal(part.waveform, whole.waveform)


@pytest.mark.parametrize("codec", ["libx264", "mpeg4", "libvpx-vp9"])
def test_leaving_out_what_is_not_needed_changes_nothing(
    codec: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    extra = ("-bf", "3", "-preset", "veryfast") if codec == "libx264" else ("-bf", "2")
    path = make_video(
        tmp_path, ".mkv", fps="50", seconds=3, size=(96, 72), gop_frames=1000, codecs=(codec, "aac"),
        extra=("-cpu-used", "8", "-deadline", "realtime") if codec == "libvpx-vp9" else extra,
    )  # fmt: skip
    reader = reader_of(path)
    asked = []
    is_needless = _Picture._is_needless
    monkeypatch.setattr(_Picture, "_is_needless", lambda *args: asked.append(is_needless(*args)) or asked[-1])
    starts = (0.1, 0.55, 1.203, 1.97)
    clips = [reader.read(0, start, short_side=72, frame_indices=(3, 17, 30)) for start in starts]
    assert asked.count(True) > 50
    monkeypatch.setattr(_Picture, "_is_needless", lambda *_: False)
    for start, clip in zip(starts, clips):
        again = reader.read(0, start, short_side=72)
        np.testing.assert_array_equal(clip.frames, again.frames[[3, 17, 30]])


def test_clip_info_describes_the_clip(tmp_path: Path) -> None:
    path = make_video(tmp_path, fps="25", size=(160, 120), rotation=90)
    reader = reader_of(path)
    clip = reader.read(0, 0.25, short_side=96)
    info = clip.info
    assert info.key == reader.key(0) == clip_key(video_hash("a.mp4"), 0)
    assert info.video_number == reader.video_number(0) == video_number("a.mp4")
    assert (info.start_seconds, info.end_seconds, info.slot, info.label) == (0.25, 1.25, 0, None)
    assert (info.source_width, info.source_height) == (120, 160) == reader.frame_size(0)
    assert info.source_crop == (0, 0, 120, 160)
    assert (info.frame_width, info.frame_height) == (120, 160)
    assert (info.video_crc32, info.audio_crc32) == (0, 0)
    assert info.source_fps == 25
    assert clip.frames.shape == (32, 128, 96, 3)
    assert type(info).from_json(info.to_json()) == info


def test_pixels_that_are_not_square_are_shown_as_they_should_be(tmp_path: Path) -> None:
    reader = reader_of(make_video(tmp_path, size=(160, 120), extra=("-aspect", "16:9")))
    assert reader.frame_size(0) == (213, 120)
    assert reader.read(0, 0.0, short_side=60).frames.shape == (32, 60, 106, 3)


@pytest.mark.parametrize("matrix", ["bt709", "bt601"])
@pytest.mark.parametrize("color_range", ["tv", "pc"])
def test_colors_are_those_that_the_source_declares(matrix: str, color_range: str, tmp_path: Path) -> None:
    path = tmp_path / "videos" / "a.mp4"
    path.parent.mkdir()
    subprocess.run(
        [find_ffmpeg(), *"-nostdin -v error -f lavfi -i color=c=0xC83C50:s=64x64:r=25:d=1.5".split()]
        + "-f lavfi -i sine=d=1.5 -c:v libx264 -crf 5 -c:a aac -threads 1".split()
        + ["-vf", f"scale=out_color_matrix={matrix}:out_range={color_range},format=yuv420p"]
        + ["-colorspace", {"bt601": "smpte170m"}.get(matrix, matrix), "-color_range", color_range, str(path)],
        check=True,
    )
    frames = reader_of(path).read(0, 0.2, short_side=64).frames
    assert np.abs(frames.mean((0, 1, 2)) - (0xC8, 0x3C, 0x50)).max() < 6  # swscale cuts where it could round


def test_missing_sound_is_padded_by_less_than_a_frame_or_the_clip_is_bad(tmp_path: Path) -> None:
    path = make_video(
        tmp_path, ".mkv", seconds=4, audio_start=0.5, audio_seconds=3.0, codecs=("libx264", "pcm_s16le")
    )
    reader = reader_of(path)
    video = reader.video(0)
    assert video.start_seconds == pytest.approx(0.5, abs=2e-3)
    assert video.duration_seconds == pytest.approx(2.5, abs=5e-3)
    start = reader.read(0, 0.48, short_side=72).waveform
    assert not start[: int(0.018 * 24_000)].any() and np.abs(start[-1000:]).max() > 0
    end = reader.read(0, 2.02, short_side=72).waveform
    assert not end[-int(0.018 * 24_000) :].any() and np.abs(end[:1000]).max() > 0
    for seconds in (0.0, 0.46, 2.04, 3.0):
        with pytest.raises(BadClip, match="sample-count") as caught:
            reader.read(0, seconds, short_side=72)
        assert caught.value.key == reader.key(0) and caught.value.shard == "a.mkv"


def test_a_second_that_the_picture_does_not_fill_is_bad(tmp_path: Path) -> None:
    path = make_video(tmp_path, ".mkv", seconds=2, video_start=0.5, audio_seconds=4.0)
    reader = reader_of(path)
    video = reader.video(0)
    for start in (video.start_seconds, video.start_seconds + video.duration_seconds - 1):
        reader.read(0, start, short_side=72)
    for start in (0.0, video.start_seconds - 0.03, video.video_end_seconds - 0.96, 3.0):
        with pytest.raises(BadClip, match="frame-count"):
            reader.read(0, start, short_side=72)


def test_files_that_changed_or_are_gone_are_bad_clips(tmp_path: Path) -> None:
    path = make_video(tmp_path)
    reader = reader_of(path)
    with open(path, "ab") as file:
        file.write(b"more")
    with pytest.raises(BadClip, match="stale-index"):
        reader.read(0, 0.0, short_side=72)
    path.unlink()
    with pytest.raises(BadClip, match="missing"):
        reader.read(0, 0.0, short_side=72)


def test_damage_costs_the_seconds_that_it_touches(tmp_path: Path) -> None:
    path = make_video(tmp_path, ".mkv", seconds=6, gop_frames=25)
    reader = reader_of(path)
    data = bytearray(path.read_bytes())
    middle = len(data) // 2
    data[middle : middle + 3000] = np.random.default_rng(0).bytes(3000)
    path.write_bytes(data)
    good = []
    for start in np.arange(0.5, 5.01, 0.5):
        try:
            reader.read(0, float(start), short_side=72)
            good.append(float(start))
        except BadClip as error:
            assert error.reason in ("decode-error", "frame-count", "sample-count")
    assert {0.5, 1.0, 4.5, 5.0} <= set(good) and len(good) < 10


def test_random_start_is_uniform_and_depends_on_its_arguments_alone() -> None:
    starts = np.array([random_start(0, epoch, "abc_00", 11.0) for epoch in range(4000)])
    assert starts.min() >= 0 and starts.max() <= 10 and len(set(starts)) > 3990
    histogram, _ = np.histogram(starts, 10, (0, 10))
    assert histogram.min() > 330 and histogram.max() < 470
    assert random_start(0, 1, "abc_00", 11.0) == starts[1]
    assert (
        len(
            {
                random_start(0, 1, "abc_00", 11.0),
                random_start(1, 1, "abc_00", 11.0),
                random_start(0, 1, "b", 11.0),
            }
        )
        == 3
    )
    assert random_start(3, 1, "abc_00", 1.0) == 0.0


def test_starts_drawn_for_a_video_lie_where_picture_and_sound_are(tmp_path: Path) -> None:
    reader = reader_of(make_video(tmp_path, seconds=2.5, audio_start=0.3))
    video = reader.video(0)
    starts = [reader.start_seconds(0, 0, epoch) for epoch in range(30)]
    assert (
        video.start_seconds <= min(starts) < 0.6
        and 1.2 < max(starts) <= video.start_seconds + video.duration_seconds - 1
    )
    assert starts[0] != reader.start_seconds(0, 0, 0, slot=1)
    for start in (min(starts), max(starts)):
        assert reader.read(0, start, short_side=72).info.start_seconds == start


# ------------------------------------------------------------------------------------------------------ index


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two good videos and six that give no clips."""
    folder = tmp_path_factory.mktemp("index") / "videos"
    for name in ("dog", "cat"):
        (folder / name).mkdir(parents=True)
    make_flash_beep_video(folder / "dog" / "a.mp4", seconds=2, size=(96, 72))
    make_flash_beep_video(folder / "cat" / "b.mkv", seconds=3, size=(72, 96), fps="30", gop_frames=15)
    make_flash_beep_video(folder / "cat" / "short.mp4", seconds=0.6, size=(96, 72))
    make_flash_beep_video(folder / "cat" / "mute.mp4", seconds=2, size=(96, 72), sound="none")
    make_flash_beep_video(folder / "cat" / "sound.mp4", seconds=2, has_video=False)
    (folder / "empty.mp4").write_bytes(b"")
    (folder / "noise.mp4").write_bytes(np.random.default_rng(0).bytes(20_000))
    data = (folder / "dog" / "a.mp4").read_bytes()
    (folder / "cut.mp4").write_bytes(data[: len(data) // 2])
    return folder


def test_index_tells_what_is_in_each_video_and_why_others_are_left_out(folder: Path) -> None:
    before = sorted(path for path in folder.rglob("*"))
    index = index_folder(folder)
    assert sorted(path for path in folder.rglob("*")) == before
    assert [video.video_id for video in index.videos] == ["cat/b.mkv", "dog/a.mp4"]
    assert dict(index.skipped) == {
        "cat/mute.mp4": "no-audio",
        "cat/short.mp4": "too-short",
        "cat/sound.mp4": "no-video",
        "cut.mp4": "undecodable",
        "empty.mp4": "undecodable",
        "noise.mp4": "undecodable",
    }
    video = index.videos[0]
    assert (video.width, video.height, video.fps, video.rotation, video.mirrored) == (72, 96, 30, 0, False)
    assert video.label == "cat" and video.key_hash == video_hash("cat/b.mkv")
    assert video.duration_seconds == pytest.approx(3, abs=0.03)
    assert video.keyframe_seconds == pytest.approx([0, 0.5, 1, 1.5, 2, 2.5], abs=0.03)
    assert video.longest_frame_seconds == pytest.approx(1 / 30, abs=2e-3)
    assert index.path(0) == str(folder / "cat" / "b.mkv")
    assert json.loads(index.to_json())["skipped"] == [list(row) for row in index.skipped]


def test_index_is_the_same_from_processes_and_from_the_cache(folder: Path, tmp_path: Path, caplog) -> None:
    cache = tmp_path / "deep" / "index.json"
    with caplog.at_level("INFO"):
        first = index_videos(folder, cache=cache, workers=2)
        assert "indexing 8 of 8" in caplog.text
        caplog.clear()
        assert index_videos(folder, cache=cache, workers=2) == first
        assert "indexing" not in caplog.text
    assert first == index_folder(folder)
    cache.write_bytes(b"{")
    assert index_videos(folder, cache=cache, workers=0) == first
    assert json.loads(cache.read_bytes())["version"] == raw_index.INDEX_VERSION


def test_only_changed_files_are_read_again(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    index = index_folder(copy)
    assert index.digest == index_folder(folder).digest  # wherever it lies
    read = []
    scan = raw_index.scan_video
    monkeypatch.setattr(
        raw_index, "scan_video", lambda path, needs: read.append(os.path.basename(path)) or scan(path, needs)
    )
    make_flash_beep_video(copy / "empty.mp4", seconds=2, size=(96, 72))
    os.utime(copy / "dog" / "a.mp4", ns=(0, 0))
    changed = index_folder(copy)
    assert sorted(read) == ["a.mp4", "empty.mp4"]
    assert len(changed.videos) == 3 and changed.digest != index.digest
    (copy / "empty.mp4").unlink()
    assert [video.video_id for video in index_folder(copy).videos] == ["cat/b.mkv", "dog/a.mp4"]


def test_index_of_a_list_names_what_is_missing(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "list.txt"
    path.write_text("dog/a.mp4\tbark\nnowhere.mp4\n")
    index = index_folder(folder, list_file=str(path), cache=tmp_path / "index.json")
    assert [(video.video_id, video.label) for video in index.videos] == [("dog/a.mp4", "bark")]
    assert index.skipped == (("nowhere.mp4", "missing"),)
    (tmp_path / "csv").write_text(
        "label,youtube_id,time_start,time_end,split\nmeow,b,0,3,train\nwoof,a,0,2,val\n"
    )
    index = index_folder(folder, csv_file=str(tmp_path / "csv"), cache=tmp_path / "index.json")
    assert [(video.video_id, video.label) for video in index.videos] == [("cat/b.mkv", "meow")]


def test_a_folder_without_a_usable_video_is_refused(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "list.txt"
    path.write_text("empty.mp4\ncat/mute.mp4\n")
    with pytest.raises(
        ValueError, match="none of the 2 videos.*(no-audio 1, undecodable 1|undecodable 1, no-audio 1)"
    ):
        index_folder(folder, list_file=str(path), cache=tmp_path / "index.json")


def test_default_cache_lies_in_the_cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    first, second = raw_index.default_cache("/videos/a"), raw_index.default_cache("/videos/b")
    assert first != second and first.parent == tmp_path / "cmac" and first.name.startswith("videos-")


def test_a_cache_that_cannot_be_written_is_said_and_done_without(
    folder: Path, tmp_path: Path, caplog
) -> None:
    (tmp_path / "file").write_bytes(b"")
    index = index_folder(folder, cache=tmp_path / "file" / "index.json")
    assert len(index.videos) == 2 and "cannot be written" in caplog.text


def test_raw_video_does_not_import_torch() -> None:
    code = "import sys, loaders.raw_video; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[1])


# -------------------------------------------------------------------------------------------------- real data


def test_real_videos_give_clips_at_random_starts(real_data: Path, tmp_path: Path) -> None:
    index = index_videos(real_data / "av_videos", cache=tmp_path / "index.json", workers=1)
    assert len(index.videos) >= 40 and not index.skipped
    reader = RawVideoReader(index)
    for position in range(len(reader)):
        for epoch in range(3):
            start = reader.start_seconds(position, 0, epoch)
            clip = reader.read(position, start, short_side=72, frame_indices=range(2, 32, 4))
            assert clip.frames.shape[0] == 8 and min(clip.frames.shape[1:3]) == 72
            assert clip.frames.dtype == np.uint8 and clip.frames.std() > 0
            assert clip.waveform.shape == (24_000,) and np.abs(clip.waveform).max() <= 1


def test_odd_videos_give_bad_clips_or_are_left_out(real_data: Path, tmp_path: Path) -> None:
    index = index_videos(real_data / "odd_videos", cache=tmp_path / "index.json", workers=1)
    assert {"no-audio", "no-video", "too-short", "undecodable"} == set(Counter(dict(index.skipped).values()))
    reader = RawVideoReader(index)
    for position in range(len(reader)):
        for epoch in range(3):
            try:
                clip = reader.read(position, reader.start_seconds(position, 0, epoch), short_side=72)
            except BadClip as error:
                assert error.reason in ("decode-error", "frame-count", "sample-count")
            else:
                assert len(clip.frames) == 32 and clip.waveform.shape == (24_000,)
