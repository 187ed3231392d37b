"""Slicing: clips are whole and in sync, and only what is really there becomes a clip."""

import errno
import io
import os
import socket
import subprocess
from pathlib import Path

import av
import numpy as np
import pytest

from shards import damage, slicing
from shards.damage import find_damage
from shards.ffmpeg import FfmpegTimeout, Finished, SliceCommand, find_ffmpeg, run_ffmpeg
from shards.media import SourceLimits, open_media
from shards.schema import (
    FRAME_SIZES,
    FRAMES_PER_CLIP,
    SAMPLE_RATE,
    SAMPLES_PER_CLIP,
    SILENCE_FLOOR_DBFS,
    WAV_HEADER,
)
from shards.slicing import (
    SlicedClip,
    SlicedVideo,
    SliceSettings,
    frame_geometry,
    loudness_dbfs,
    probe_video,
    slice_video,
)
from tools.make_synthetic_videos import make_flash_beep_video

OUTPUT_FRAME_SECONDS = 1 / 32


def slice_file(path: Path, seed: int = 0, timeout: float = 60, **settings: object) -> SlicedVideo:
    return slice_video(str(path), path.name, seed, SliceSettings(**settings), find_ffmpeg(), timeout)


def decode_luma(video: bytes) -> np.ndarray:
    """(T, H, W) uint8, the luma plane."""
    frames = []
    with av.open(io.BytesIO(video)) as container:
        for frame in container.decode(video=0):
            plane = frame.planes[0]
            frames.append(
                np.frombuffer(plane, np.uint8).reshape(-1, plane.line_size)[: frame.height, : frame.width]
            )
    return np.stack(frames)


def waveform(clip: SlicedClip) -> np.ndarray:
    assert clip.audio.startswith(WAV_HEADER)
    return np.frombuffer(clip.audio[len(WAV_HEADER) :], "<i2")


def offsets_seconds(sliced: SlicedVideo) -> list[float]:
    """Per event that begins inside a clip: time of the flash minus time of the beep."""
    offsets = []
    for clip in sliced.clips:
        lit = decode_luma(clip.video).reshape(FRAMES_PER_CLIP, -1).mean(1) > 150
        flashes = [i / FRAMES_PER_CLIP for i in range(1, FRAMES_PER_CLIP) if lit[i] and not lit[i - 1]]
        loud = np.abs(waveform(clip).astype(int)) > 0.3 * 32768
        onsets = np.flatnonzero(loud) / SAMPLE_RATE
        for flash in flashes:
            near = onsets[np.abs(onsets - flash) < 0.45]
            if len(near) and near[0] > 0.002:  # a beep that began before the clip has no onset in it
                offsets.append(flash - near[0])
    return offsets


def check_clips(sliced: SlicedVideo) -> None:
    assert sliced.clips
    for clip in sliced.clips:
        luma = decode_luma(clip.video)
        assert luma.shape == (FRAMES_PER_CLIP, sliced.frame_size[1], sliced.frame_size[0])
        assert sliced.frame_size in FRAME_SIZES
        assert len(waveform(clip)) == SAMPLES_PER_CLIP


SYNC_CASES = {
    "25 fps": dict(fps="25"),
    "29.97 fps": dict(fps="30000/1001"),
    "30 fps": dict(fps="30"),
    "60 fps": dict(fps="60"),
    "variable rate, 30": dict(fps="30", variable_rate=True),
    "variable rate, 60": dict(fps="60", variable_rate=True),
    "audio 300 ms late": dict(audio_start=0.3),
    "audio 300 ms early": dict(video_start=0.3),
    "audio 300 ms late, mkv": dict(audio_start=0.3, suffix=".mkv"),
    "audio 300 ms early, mkv": dict(video_start=0.3, suffix=".mkv"),
    "both late, transport stream": dict(video_start=1.4, audio_start=1.7, suffix=".ts"),
    "rotated": dict(rotation=90),
    "5.1": dict(channels=6),
    "odd size, 4:4:4": dict(size=(175, 131), pixel_format="yuv444p"),
    "8 kHz": dict(sample_rate=8000),
    "mpeg4 and mp3 in avi": dict(codecs=("mpeg4", "libmp3lame"), suffix=".avi"),
    "vp8 and opus in webm": dict(codecs=("libvpx", "libopus"), suffix=".webm", sample_rate=48000),
}


@pytest.mark.parametrize("name", SYNC_CASES)
def test_flash_and_beep_stay_together(name: str, tmp_path: Path) -> None:
    options = dict(SYNC_CASES[name])
    path = make_flash_beep_video(tmp_path / f"a{options.pop('suffix', '.mp4')}", seconds=3.6, **options)
    sliced = slice_file(path)
    check_clips(sliced)
    assert len(sliced.clips) == 3
    offsets = offsets_seconds(sliced)
    assert len(offsets) >= 2
    assert max(map(abs, offsets)) <= OUTPUT_FRAME_SECONDS + 1e-3, offsets


@pytest.mark.parametrize("lag", [0.2, -0.2])
def test_what_is_out_of_sync_in_the_source_stays_so(lag: float, tmp_path: Path) -> None:
    sliced = slice_file(make_flash_beep_video(tmp_path / "a.mp4", seconds=4.1, beep_lag=lag))
    offsets = offsets_seconds(sliced)
    assert len(offsets) >= 2
    assert max(abs(offset + lag) for offset in offsets) <= OUTPUT_FRAME_SECONDS + 1e-3, offsets


def test_nothing_is_made_up_where_one_stream_starts_late(tmp_path: Path) -> None:
    sliced = slice_file(make_flash_beep_video(tmp_path / "a.mkv", seconds=3.9, audio_start=1.3))
    assert sliced.seconds == 2
    assert sliced.clips[0].start_seconds >= 1.299
    assert min(clip.loudness_dbfs for clip in sliced.clips) > -50


def test_start_moves_with_the_seed_inside_the_spare_part_of_a_second(tmp_path: Path) -> None:
    path = make_flash_beep_video(tmp_path / "a.mp4", seconds=2.9)
    starts = [slice_file(path, seed).clips[0].start_seconds for seed in range(8)]
    assert len(set(starts)) > 3
    assert 0 <= min(starts) and max(starts) <= 0.9
    assert starts[0] == slice_file(path, 0).clips[0].start_seconds


def test_slicing_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    path = make_flash_beep_video(tmp_path / "a.mp4", seconds=2.0)
    assert slice_file(path) == slice_file(path)


def test_seconds_of_a_long_video_are_chosen_by_seed_from_all_of_it(tmp_path: Path) -> None:
    path = make_flash_beep_video(tmp_path / "a.mp4", seconds=12.0)
    choices = set()
    for seed in range(4):
        sliced = slice_file(path, seed, max_clips=2)
        check_clips(sliced)
        assert sliced.seconds == 12 and len(sliced.clips) == 2
        choices.add(tuple(clip.second for clip in sliced.clips))
        offsets = offsets_seconds(sliced)
        assert max(map(abs, offsets), default=0) <= OUTPUT_FRAME_SECONDS + 1e-3
    assert len(choices) > 1 and max(max(choice) for choice in choices) > 5


def test_only_max_seconds_are_read(tmp_path: Path) -> None:
    path = make_flash_beep_video(tmp_path / "a.mp4", seconds=6.0)
    sliced = slice_file(path, max_clips=3, max_seconds=3)
    assert sliced.seconds == 3 and [clip.second for clip in sliced.clips] == [0, 1, 2]


def test_rotation_is_applied(tmp_path: Path) -> None:
    """Stored with a bright patch at the top left; turned counter-clockwise, it is at the bottom left."""
    path = make_flash_beep_video(tmp_path / "a.mp4", seconds=1.4, size=(160, 120), rotation=90)
    sliced = slice_file(path)
    assert sliced.frame_size == (144, 192)
    assert sliced.probe is not None and (sliced.probe.width, sliced.probe.height) == (120, 160)
    luma = decode_luma(sliced.clips[0].video)[0].astype(float)
    assert luma[-40:, :30].mean() > luma[:40, :30].mean() + 40
    assert luma[-40:, :30].mean() > luma[-40:, -30:].mean() + 40


def test_surround_sound_is_mixed_without_clipping(tmp_path: Path) -> None:
    stereo = slice_file(make_flash_beep_video(tmp_path / "2.mp4", seconds=1.4, channels=2)).clips[0]
    surround = slice_file(make_flash_beep_video(tmp_path / "6.mp4", seconds=1.4, channels=6)).clips[0]
    for clip in (stereo, surround):
        peak = np.abs(waveform(clip).astype(int)).max() / 32768
        assert 0.7 < peak < 0.95  # the beep has 0.8 in every channel
    assert abs(stereo.loudness_dbfs - surround.loudness_dbfs) < 1


def test_clips_are_what_the_schema_says(tmp_path: Path) -> None:
    clip = slice_file(make_flash_beep_video(tmp_path / "a.mp4", seconds=1.4)).clips[0]
    with av.open(io.BytesIO(clip.video)) as container:
        stream = container.streams.video[0]
        assert stream.codec_context.name == "h264" and stream.codec_context.pix_fmt == "yuv420p"
        assert not stream.codec_context.has_b_frames
        assert stream.average_rate == 32
        frames = list(container.decode(stream))
    assert [frame.key_frame for frame in frames] == [True] + [False] * 31
    assert [int(frame.pict_type) for frame in frames] == [1] + [2] * 31  # I, then P
    assert int(frames[0].color_range) == 1 and int(frames[0].colorspace) in (5, 6)  # limited; BT.601
    assert b"Lavf" not in clip.video and b"Lavc libx264" in clip.video  # no versions of libraries


@pytest.mark.parametrize(
    "width, height, aspect, size",
    [
        (340, 256, 1.0, (192, 144)),
        (1920, 1080, 1.0, (256, 144)),
        (1080, 1920, 1.0, (144, 256)),
        (100, 100, 1.0, (144, 144)),
        (2560, 1080, 1.0, (336, 144)),
        (5000, 100, 1.0, (336, 144)),
        (100, 5000, 1.0, (144, 256)),
        (720, 576, 64 / 45, (256, 144)),
        (1, 1, 1.0, (144, 144)),
    ],
)
def test_geometry_covers_the_nearest_size_and_keeps_the_aspect(
    width: int, height: int, aspect: float, size: tuple[int, int]
) -> None:
    geometry = frame_geometry(width, height, aspect)
    assert geometry.frame_size == size
    for axis in range(2):
        assert geometry.scaled_size[axis] >= size[axis] + geometry.crop_offset[axis]
        assert geometry.crop_offset[axis] % 2 == 0
    x, y, crop_width, crop_height = geometry.source_crop
    assert 0 <= x <= x + crop_width <= width + 1e-3 and 0 <= y <= y + crop_height <= height + 1e-3
    assert min(geometry.scaled_size[0] - size[0], geometry.scaled_size[1] - size[1]) == 0
    if min(width, height) > 90:
        assert crop_width * aspect / crop_height == pytest.approx(size[0] / size[1], rel=0.02)


def test_source_crop_is_where_the_clip_comes_from(tmp_path: Path) -> None:
    """The left quarter of the source is bright; its edge is where `source_crop` says."""
    sliced = slice_file(make_flash_beep_video(tmp_path / "a.mp4", seconds=1.4, size=(300, 120)))
    x, _, width, _ = sliced.crop
    row = decode_luma(sliced.clips[0].video)[0, 10].astype(int)
    edge = np.flatnonzero(row < 130)[0] / sliced.frame_size[0]
    assert edge == pytest.approx((300 / 4 - x) / width, abs=0.02)


def test_loudness() -> None:
    assert loudness_dbfs(np.zeros(100, np.int16)) == SILENCE_FLOOR_DBFS
    assert loudness_dbfs(np.full(100, -32768, np.int16)) == 0.0
    sine = 0.1 * 32768 * np.sin(2 * np.pi * np.arange(24000) * 440 / 24000)
    assert loudness_dbfs(sine.astype(np.int16)) == pytest.approx(-23.0, abs=0.05)


BAD_CASES = {
    "no sound": (dict(sound="none"), "no-audio"),
    "no picture": (dict(has_video=False), "no-video"),
    "digital silence": (dict(sound="zeros"), "silent"),
    "below the threshold": (dict(sound="noise", noise_dbfs=-70), "silent"),
    "short": (dict(seconds=0.7), "too-short"),
    "sound for a moment": (dict(audio_seconds=0.5), "too-short"),
}


@pytest.mark.parametrize("name", BAD_CASES)
def test_what_cannot_be_used_has_its_reason(name: str, tmp_path: Path) -> None:
    options, reason = BAD_CASES[name]
    sliced = slice_file(make_flash_beep_video(tmp_path / "a.mp4", **{"seconds": 2.0, **options}))
    assert (sliced.reason, sliced.clips) == (reason, ())


def test_quiet_sound_above_the_threshold_is_kept(tmp_path: Path) -> None:
    path = make_flash_beep_video(tmp_path / "a.mp4", seconds=2.0, sound="noise", noise_dbfs=-50)
    assert len(slice_file(path).clips) == 2
    assert slice_file(path, silence_dbfs=-40).reason == "silent"


def test_silent_seconds_of_a_video_with_sound_are_dropped(tmp_path: Path) -> None:
    path = make_flash_beep_video(tmp_path / "a.mp4", seconds=4.0, noise_dbfs=-90, beep_lag=1.7)
    sliced = slice_file(path)  # beeps from 2.2 s on
    assert sliced.seconds == 4 and [clip.second for clip in sliced.clips] == [2, 3]


@pytest.mark.parametrize("kind", ["garbage", "empty", "playlist", "concat list", "text"])
def test_what_is_no_video_is_undecodable(kind: str, tmp_path: Path) -> None:
    good = make_flash_beep_video(tmp_path / "good.mp4", seconds=1.4)
    content = {
        "garbage": np.random.default_rng(0).bytes(20000),
        "empty": b"",
        "playlist": f"#EXTM3U\n#EXT-X-TARGETDURATION:2\n#EXTINF:2,\n{good}\n#EXT-X-ENDLIST\n".encode(),
        "concat list": f"ffconcat version 1.0\nfile {good.name}\n".encode(),
        "text": b"hello\n" * 100,
    }[kind]
    path = tmp_path / "bad.mp4"
    path.write_bytes(content)
    assert slice_file(path).reason == "undecodable"


def faststart(path: Path, out: Path) -> bytes:
    subprocess.run(
        [find_ffmpeg(), "-v", "error", "-y", "-i", path, "-c", "copy", "-movflags", "+faststart", out],
        check=True,
    )
    return out.read_bytes()


@pytest.mark.parametrize("kind", ["mp4 with its index first", "mkv"])
def test_truncated_files_give_the_seconds_that_are_there(kind: str, tmp_path: Path) -> None:
    if kind == "mkv":
        data = make_flash_beep_video(tmp_path / "a.mkv", seconds=6.0).read_bytes()
    else:
        data = faststart(make_flash_beep_video(tmp_path / "a.mp4", seconds=6.0), tmp_path / "b.mp4")
    seen = set()
    for share in (0.35, 0.6, 0.8):
        path = tmp_path / f"cut{share}.{'mkv' if kind == 'mkv' else 'mp4'}"
        path.write_bytes(data[: int(len(data) * share)])
        sliced = slice_file(path)
        picture, sound = really_there(path)
        # ffmpeg hides the frame at the cut, or shows it half: one source frame either way.
        assert int(min(picture - 0.06, sound - 0.03)) <= sliced.seconds <= min(picture + 0.06, sound + 0.001)
        assert sliced.reason == "truncated"
        if sliced.clips:
            check_clips(sliced)
            assert max(map(abs, offsets_seconds(sliced)), default=0) <= OUTPUT_FRAME_SECONDS + 1e-3
        seen.add(sliced.seconds)
    assert len(seen) == 3


def really_there(path: Path) -> tuple[float, float]:
    """Seconds of picture (25 fps) and of sound that decode, by another decoder."""
    frames = samples = 0
    with av.open(str(path)) as container:
        packets = container.demux()
        while True:
            try:
                packet = next(packets)
                for frame in packet.decode():
                    if isinstance(frame, av.VideoFrame):
                        frames += 1
                    else:
                        samples += frame.samples
            except StopIteration:
                break
            except av.error.FFmpegError:
                continue
    return frames / 25, samples / 44100


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
@pytest.mark.parametrize("kind", ["zeros", "flipped bits", "hole"])
def test_seconds_that_do_not_decode_are_left_out(kind: str, suffix: str, tmp_path: Path) -> None:
    """ffmpeg would repeat frames, guess blocks and fill in silence, and exit with 0."""
    path = make_flash_beep_video(tmp_path / f"a{suffix}", seconds=6.0)
    data = bytearray(path.read_bytes())
    half, part = len(data) // 2, len(data) // 6
    if kind == "zeros":
        data[half : half + part] = bytes(part)
    elif kind == "flipped bits":
        for position in np.random.default_rng(0).integers(half, half + part, 40):
            data[position] ^= 0x5A
    elif suffix == ".mkv":
        del data[half : half + part]
    else:
        data[half : half + part] = data[:part]
    path.write_bytes(data)
    sliced = slice_file(path)
    assert sliced.reason == "damaged"
    assert [clip.second for clip in sliced.clips] in ([0, 1, 2, 5], [0, 1, 2, 4, 5], [0, 1, 2])
    assert sliced.seconds == len(sliced.clips)
    assert min(clip.loudness_dbfs for clip in sliced.clips) > -16
    assert max(map(abs, offsets_seconds(sliced))) <= OUTPUT_FRAME_SECONDS + 1e-3


def test_truncated_mp4_without_index_is_undecodable(tmp_path: Path) -> None:
    path = make_flash_beep_video(tmp_path / "a.mp4", seconds=3.0)
    path.write_bytes(path.read_bytes()[:-3000])
    assert slice_file(path).reason == "undecodable"


def test_sound_that_ends_early_limits_the_clips(tmp_path: Path) -> None:
    sliced = slice_file(make_flash_beep_video(tmp_path / "a.mp4", seconds=5.0, audio_seconds=2.5))
    assert (sliced.reason, sliced.seconds, len(sliced.clips)) == ("", 2, 2)


def test_names_that_are_hard_for_shells_and_ffmpeg(tmp_path: Path) -> None:
    good = make_flash_beep_video(tmp_path / "good.mp4", seconds=1.4).read_bytes()
    for name in (
        b"-y.mp4",
        b"a b'\"$(x)`.mp4",
        b"%03d*?[a].mp4",
        b"new\nline.mp4",
        b"concat:x|y.mp4",
        b"not \xff utf8.mp4",
    ):
        path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/" + name))
        path.write_bytes(good)
        assert len(slice_file(path).clips) == 1, name


def test_no_shell_and_no_network_in_the_command() -> None:
    command = SliceCommand(
        path="/x/a; rm b.mp4",
        video_stream=0,
        audio_stream=1,
        start_seconds=0.0,
        read_seconds=61,
        seconds=(0, 2),
        scaled_size=(192, 144),
        crop_offset=(0, 0),
        frame_size=(192, 144),
        scale_first=True,
        crf=23,
        preset="medium",
    ).build("ffmpeg")
    assert isinstance(command, list) and all(isinstance(word, str) for word in command)
    assert command[command.index("-i") + 1] == "file:/x/a; rm b.mp4"
    for words in (
        ["-protocol_whitelist", "file,pipe"],
        ["-tune", "fastdecode"],
        ["-bf", "0"],
        ["-refs", "1"],
        ["-g", "32"],
    ):
        assert command[command.index(words[0]) + 1] == words[1]
    assert "-nostdin" in command


def test_timeout_kills_ffmpeg_and_is_a_reason(tmp_path: Path) -> None:
    path = make_flash_beep_video(tmp_path / "a.mp4", seconds=3.0)
    assert slice_file(path, timeout=0.001).reason == "timeout"
    with pytest.raises(FfmpegTimeout):
        run_ffmpeg(
            [find_ffmpeg(), "-v", "error", "-re", "-f", "lavfi", "-i", "color", "-f", "null", "-"],
            tmp_path,
            0.3,
        )


# --- a window of a file ------------------------------------------------------------------------------------------


WINDOW_FILES = {
    "mp4, 25 fps": dict(suffix=".mp4", fps="25"),
    "mp4, 29.97 fps, sound late": dict(suffix=".mp4", fps="30000/1001", audio_start=0.3),
    "mkv, 30 fps": dict(suffix=".mkv", fps="30"),
    "transport stream": dict(suffix=".ts", fps="25", video_start=1.4, audio_start=1.4),
    "avi": dict(suffix=".avi", fps="25", codecs=("mpeg4", "pcm_s16le")),
}


@pytest.fixture(scope="module")
def long_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("long")
    paths = {}
    for name, options in WINDOW_FILES.items():
        options = {"gop_frames": 100, **options, "seconds": 22.0, "size": (64, 48)}
        path = folder / f"{len(paths)}{options.pop('suffix')}"
        paths[name] = make_flash_beep_video(path, **options)
    return paths


def slice_window(path: Path, start: float, end: float, seed: int = 0, **settings: object) -> SlicedVideo:
    settings = {"preset": "ultrafast", **settings}
    return slice_video(
        str(path), path.name, seed, SliceSettings(**settings), find_ffmpeg(), 60, window=(start, end)
    )


@pytest.mark.parametrize("name", WINDOW_FILES)
def test_a_window_gives_its_seconds_alone_as_if_all_before_had_been_decoded(
    name: str, long_files: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = long_files[name]
    jumps = []
    can_seek = slicing._can_seek
    monkeypatch.setattr(slicing, "_can_seek", lambda *args: jumps.append(can_seek(*args)) or jumps[-1])
    sliced = slice_window(path, 17.3, 21.6)
    check_clips(sliced)
    assert jumps == [path.suffix in (".mp4", ".mkv")]
    starts = [clip.start_seconds for clip in sliced.clips]
    assert sliced.seconds == len(starts) == 4 and sliced.reason == ""
    assert np.diff(starts) == pytest.approx([1, 1, 1])
    assert 17.3 <= starts[0] and starts[-1] + 1 <= 21.6
    offsets = offsets_seconds(sliced)
    assert len(offsets) >= 3
    assert max(map(abs, offsets)) <= OUTPUT_FRAME_SECONDS + 1e-3, offsets
    monkeypatch.setattr(slicing, "_can_seek", lambda *_: False)
    whole = slice_window(path, 17.3, 21.6)
    assert [clip.start_seconds for clip in whole.clips] == starts
    for clip, other in zip(sliced.clips, whole.clips):
        assert clip.video == other.video
        # The clock of Matroska has milliseconds, by which the sound is placed after a jump.
        quiet = np.abs(waveform(clip).astype(int) - waveform(other)) < 2000
        assert quiet.all() if path.suffix != ".mkv" else quiet.mean() > 0.9


def test_seconds_of_a_window_are_those_of_the_whole_file_there(long_files: dict[str, Path]) -> None:
    path = long_files["mp4, 25 fps"]
    window = slice_window(path, 5.0, 9.0)
    assert [clip.start_seconds for clip in window.clips] == [5.0, 6.0, 7.0, 8.0]
    whole = slice_file(path, preset="ultrafast", max_clips=22, max_seconds=22)
    shift = whole.clips[0].start_seconds
    assert 0 <= shift < 1
    assert len(whole.clips) == whole.seconds >= 21
    again = slice_window(path, 5.0 + shift, 9.0 + shift)
    by_start = {round(clip.start_seconds, 6): clip for clip in whole.clips}
    for clip in again.clips:
        other = by_start[round(clip.start_seconds, 6)]
        assert clip.audio == other.audio
        # x264 has seen other frames before.
        assert np.abs(decode_luma(clip.video).astype(int) - decode_luma(other.video)).mean() < 4


def test_the_random_part_of_a_second_stays_inside_the_window(long_files: dict[str, Path]) -> None:
    starts = [
        slice_window(long_files["mp4, 25 fps"], 18.0, 20.9, seed).clips[0].start_seconds for seed in range(5)
    ]
    assert len(set(starts)) > 3
    assert 18.0 <= min(starts) and max(starts) <= 18.9


def test_max_seconds_counts_from_the_start_of_the_window(long_files: dict[str, Path]) -> None:
    sliced = slice_window(long_files["mp4, 25 fps"], 10.0, 20.0, max_seconds=3, max_clips=3)
    assert [clip.start_seconds for clip in sliced.clips] == [10.0, 11.0, 12.0]


def test_a_file_that_is_no_longer_than_the_window_is_used_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make_flash_beep_video(tmp_path / "cut.mp4", seconds=4.4, size=(64, 48))
    whole = slice_file(path, preset="ultrafast")
    assert slice_window(path, 30.0, 34.0) == whole
    assert slice_window(path, 30.0, 33.0).reason == "outside-window"
    live = tmp_path / "cut.mkv"  # its header does not tell how long it is
    subprocess.run(
        [find_ffmpeg(), "-v", "error", "-i", str(path), "-c", "copy", "-live", "1", str(live)], check=True
    )
    assert probe_video(str(live)).audio_end_seconds is None
    seen = []
    monkeypatch.setattr(
        slicing, "open_media", lambda path, limits=None: seen.append(limits) or open_media(path, limits)
    )
    assert len(slice_window(live, 30.0, 34.0).clips) == 4
    assert slice_window(live, 30.0, 33.0).reason == "outside-window"
    assert seen and None not in seen  # the user's limits count there, too


def test_what_ends_before_or_inside_a_window_says_so(long_files: dict[str, Path]) -> None:
    path = long_files["mp4, 25 fps"]
    assert slice_window(path, 30.0, 40.0).reason == "outside-window"
    late = slice_window(path, 19.0, 29.0)
    assert late.seconds == 3 and late.clips[-1].start_seconds + 1 <= 22.1
    assert slice_window(path, 21.5, 31.5).reason == "too-short"


# --- a late window of a damaged file ----------------------------------------------------------------------------


def packets_of(path: Path, kind: str, begin: float, end: float) -> list[tuple[int, int]]:
    """(position, bytes) of the packets of one stream that are shown in between."""
    found = []
    with open_media(str(path)) as container:
        (stream,) = getattr(container.streams, kind)
        for packet in container.demux(stream):
            if packet.pts is not None and begin <= float(packet.pts * packet.time_base) < end:
                found.append((packet.pos, packet.size))
    return found


def damage_packets(path: Path, kind: str, begin: float, end: float) -> None:
    data = bytearray(path.read_bytes())
    packets = packets_of(path, kind, begin, end)
    assert packets
    for position, size in packets:
        data[position + size // 3 : position + size] = bytes(size - size // 3)
    path.write_bytes(data)


def overlapping(spans: list[tuple[float, float]], begin: float, end: float) -> list[tuple[float, float]]:
    """The parts of spans that lie in between, joined."""
    joined: list[tuple[float, float]] = []
    for start, stop in sorted((max(start, begin), min(stop, end)) for start, stop in spans):
        if start >= stop:
            continue
        if joined and start <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(stop, joined[-1][1]))
        else:
            joined.append((start, stop))
    return joined


OPEN_GOP = ("-flags", "-cgop", "-bf", "3", "-x264-params", "open-gop=1:b-adapt=0:scenecut=0")


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
@pytest.mark.parametrize(
    "gop", [dict(gop_frames=40), dict(gop_frames=180, extra=OPEN_GOP)], ids=["4 s", "open, 18 s"]
)
def test_damage_in_a_late_window_is_found_without_decoding_what_is_before(
    suffix: str, gop: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make_flash_beep_video(tmp_path / f"a{suffix}", seconds=60.0, size=(64, 48), fps="10", **gop)
    decoded = []
    decodes = damage._decodes
    monkeypatch.setattr(damage, "_decodes", lambda *args: decoded.append(args) or decodes(*args))

    def spans(seek: float | None) -> tuple[list[tuple[float, float]], int]:
        decoded.clear()
        found = find_damage(str(path), 0, 1, 56.0, SourceLimits(), seek_seconds=seek)
        return overlapping(found, 50.0, 56.0), len(decoded)

    assert spans(38.0)[0] == spans(None)[0] == []
    damage_packets(path, "video", 5.0, 8.0)
    damage_packets(path, "audio", 20.0, 21.0)
    few, many = spans(38.0), spans(None)
    assert few[0] == many[0] == []
    assert few[1] < 0.75 * many[1]
    damage_packets(path, "audio", 52.2, 52.6)
    assert spans(38.0)[0] == spans(None)[0]
    sound = spans(38.0)[0]
    assert 52.1 < sound[0][0] < sound[-1][1] < 52.7
    damage_packets(path, "video", 54.5, 54.6)
    assert spans(38.0)[0] == spans(None)[0]
    assert spans(38.0)[0][-1] == pytest.approx((54.5, 56.0), abs=0.2)
    for begin in (0.0, 1.0):  # no key frame is before that
        assert overlapping(find_damage(str(path), 0, 1, 4.0, SourceLimits(), seek_seconds=begin), 0, 4) == []


def test_seconds_of_a_late_window_that_do_not_decode_are_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make_flash_beep_video(tmp_path / "a.mp4", seconds=40.0, size=(64, 48))
    damage_packets(path, "audio", 3.0, 5.0)
    damage_packets(path, "audio", 34.2, 34.6)
    asked = []
    find = slicing.find_damage
    monkeypatch.setattr(
        slicing, "find_damage", lambda *args, **options: asked.append(options) or find(*args, **options)
    )
    sliced = slice_window(path, 32.0, 38.0)
    assert asked == [{"seek_seconds": 20}]
    assert sliced.reason == "damaged"
    assert [clip.start_seconds for clip in sliced.clips] == [32.0, 33.0, 35.0, 36.0, 37.0]
    assert slice_file(path, preset="ultrafast").reason == "damaged"
    assert asked[1:] == [{"seek_seconds": None}]


# --- faults of the machine --------------------------------------------------------------------------------------


def ffmpeg_after(tmp_path: Path, times: int, instead: str) -> Path:
    """A program that is ffmpeg after it was something else so many times; `runs` beside it counts."""
    path = tmp_path / "program"
    path.write_text(
        f"#!/bin/sh\n"
        f"ffmpeg='{find_ffmpeg()}'\n"
        f"echo x >> '{tmp_path}/runs'\n"
        f"if [ $(wc -l < '{tmp_path}/runs') -le {times} ]; then\n{instead}\nfi\n"
        f'exec "$ffmpeg" "$@"\n'
    )
    path.chmod(0o755)
    return path


def num_runs(tmp_path: Path) -> int:
    runs = (tmp_path / "runs").read_text().count("x")
    (tmp_path / "runs").unlink()
    return runs


HALF_DONE = '"$ffmpeg" "$@"; rm -f video0001.mp4; truncate -s 50000 audio.raw; '


@pytest.mark.parametrize("end", ["kill -KILL $$", "exit 255"], ids=["SIGKILL", "SIGTERM"])
@pytest.mark.parametrize("times", [1, 3])
def test_a_pass_whose_ffmpeg_is_killed_is_done_again(
    end: str, times: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slicing, "KILLED_WAIT_SECONDS", (0.0, 0.0, 0.0))
    path = make_flash_beep_video(tmp_path / "a.mp4", seconds=4.4, size=(64, 48))
    settings = SliceSettings(preset="ultrafast", max_clips=2)
    unbroken = slice_video(str(path), "a", 0, settings, find_ffmpeg(), 60)
    assert len(unbroken.clips) == 2
    program = ffmpeg_after(tmp_path, times, HALF_DONE + end)
    assert slice_video(str(path), "a", 0, settings, str(program), 60, str(tmp_path)) == unbroken
    assert num_runs(tmp_path) == times + 1
    assert not list(tmp_path.glob("pass-*"))


def test_ffmpeg_ends_with_the_code_that_tells_it_was_asked_to(tmp_path: Path) -> None:
    command = [find_ffmpeg(), *"-v error -re -f lavfi -i anullsrc -f s16le sound".split()]
    script = '"$@" & sleep 1; kill -TERM $!; wait $!; exit $?'
    finished = run_ffmpeg(["sh", "-c", script, "sh", *command], tmp_path, 60)
    assert finished.return_code == 255 and finished.killed


def test_an_error_of_a_decoder_with_that_code_is_the_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make_flash_beep_video(
        tmp_path / "a.ogg", seconds=2.4, size=(64, 48), codecs=("libtheora", "libvorbis")
    )
    data = bytearray(path.read_bytes())
    at = data.index(b"\x82theora") + 7
    data[at : at + 400] = bytes(400)
    path.write_bytes(data)
    codes = []

    def watched(*args: object, **options: object) -> Finished:
        codes.append(run_ffmpeg(*args, **options))
        return codes[-1]

    monkeypatch.setattr(slicing, "run_ffmpeg", watched)
    assert slice_file(path).reason == "undecodable"
    assert {finished.return_code for finished in codes} == {255} and len(codes) <= 2


@pytest.mark.parametrize("signal_name", ["KILL", "SEGV"])
def test_a_video_whose_ffmpeg_always_dies_is_a_crash(
    signal_name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slicing, "KILLED_WAIT_SECONDS", (0.0, 0.0, 0.0))
    path = make_flash_beep_video(tmp_path / "a.mp4", seconds=2.4, size=(64, 48))
    program = ffmpeg_after(tmp_path, 99, f"kill -{signal_name} $$")
    sliced = slice_video(str(path), "a", 0, SliceSettings(), str(program), 60)
    assert (sliced.reason, sliced.clips) == ("crash", ())
    assert num_runs(tmp_path) == 4
    monkeypatch.setattr(slicing, "KILLED_WAIT_SECONDS", (0.0, 60.0, 0.0))
    assert slice_video(str(path), "a", 0, SliceSettings(), str(program), 30).reason == "crash"
    assert num_runs(tmp_path) == 2, "what does not fit into the time of a pass is not waited for"


@pytest.fixture
def unreadable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file of which each read gives EIO."""
    monkeypatch.setattr(slicing, "READ_WAIT_SECONDS", (0.0, 0.0, 0.0))
    path = tmp_path / "a.mp4"
    path.symlink_to("/proc/self/mem")
    if not path.exists():
        pytest.skip("no /proc/self/mem on this machine")
    with pytest.raises(OSError) as raised, open(path, "rb", buffering=0) as file:
        file.read(1)
    assert raised.value.errno == errno.EIO
    return path


def test_a_file_that_stays_unreadable_is_not_called_undecodable(unreadable: Path) -> None:
    assert slice_file(unreadable) == SlicedVideo(reason="unreadable", seconds=0)


def test_a_file_that_can_be_read_again_is_sliced_again(
    unreadable: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = make_flash_beep_video(unreadable.with_name("good.mp4"), seconds=2.4, size=(64, 48))
    failures = []

    def read_through(path: str, seconds: float) -> None:
        try:
            read(path, seconds)
        except OSError as error:
            failures.append(error.errno)
            if len(failures) == 2:
                unreadable.unlink()
                unreadable.symlink_to(good)
            raise

    read = slicing.read_through
    monkeypatch.setattr(slicing, "read_through", read_through)
    assert (
        slice_file(unreadable).clips
        == slice_video(str(good), unreadable.name, 0, SliceSettings(), find_ffmpeg(), 60).clips
    )
    assert failures == [errno.EIO, errno.EIO]


def test_a_read_that_failed_for_ffmpeg_alone_costs_nothing(tmp_path: Path) -> None:
    path = make_flash_beep_video(tmp_path / "a.mp4", seconds=4.4, size=(64, 48))
    settings = SliceSettings(preset="ultrafast", max_clips=2)
    unbroken = slice_video(str(path), "a", 0, settings, find_ffmpeg(), 60)
    failing = f"{HALF_DONE} echo 'Error during demuxing: Input/output error' >&2; exit 0"
    program = str(ffmpeg_after(tmp_path, 1, failing))
    assert slice_video(str(path), "a", 0, settings, program, 60) == unbroken
    num_runs(tmp_path)
    # Damage may be called so, too.
    program = str(ffmpeg_after(tmp_path, 99, "echo 'Input/output error' >&2; exit 1"))
    assert slice_video(str(path), "a", 0, settings, program, 60).reason == "undecodable"
    assert num_runs(tmp_path) == 4, "two passes, and once more"
    program = str(ffmpeg_after(tmp_path, 99, "echo 'Invalid data' >&2; exit 1"))
    assert slice_video(str(path), "a", 0, settings, program, 60).reason == "undecodable"
    assert num_runs(tmp_path) == 2


@pytest.mark.parametrize("num_failures", [3, 99])
def test_a_file_system_that_fails_is_waited_for_and_then_named(
    num_failures: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slicing, "READ_WAIT_SECONDS", (0.0, 0.0, 0.0))
    path = make_flash_beep_video(tmp_path / "a.mp4", seconds=2.4, size=(64, 48))
    unbroken = slice_file(path)
    failures = []
    stat = os.stat

    def stale(name: object, *args: object, **options: object) -> os.stat_result:
        if name == str(path) and len(failures) < num_failures:
            failures.append(name)
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), name)
        return stat(name, *args, **options)

    monkeypatch.setattr(os, "stat", stale)
    if num_failures == 99:
        with pytest.raises(OSError, match="Stale file handle.*run the same command again") as raised:
            slice_file(path)
        assert str(path) in str(raised.value) and socket.gethostname() in str(raised.value)
        assert len(failures) == 5
    else:
        assert slice_file(path) == unbroken
        assert len(failures) == 3


def test_a_file_that_is_gone_by_then_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slicing, "READ_WAIT_SECONDS", (0.0, 0.0, 0.0))
    (tmp_path / "b.mp4").write_bytes(b"")
    assert slice_file(tmp_path / "a.mp4").reason == "missing"
    (tmp_path / "b.mp4").unlink()
    for folder in (tmp_path, tmp_path / "gone"):  # as if it were mounted no more
        with pytest.raises(OSError, match=r"a\.mp4 cannot be read.*No such file.*run the same command again"):
            slice_file(folder / "a.mp4")


@pytest.mark.parametrize(
    "options, words",
    [
        (dict(max_clips=0), "max_clips is 0, expected 1 to 99"),
        (dict(max_clips=20, max_seconds=10), "max_seconds is 10, expected at least max_clips"),
        (dict(silence_dbfs=3.0), "silence_dbfs is 3.0"),
        (dict(crf=99), "crf is 99"),
        (dict(preset="quick"), "preset is 'quick', expected one of"),
    ],
)
def test_wrong_settings_are_refused_with_the_way_out(options: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        SliceSettings(**options)
