"""Files that want more than to be decoded: to have other files read, connections opened, memory, disk or time taken.

Whatever they hold and whatever they are called, they cost themselves and nothing else.
"""

import ast
import io
import os
import resource
import signal
import struct
import subprocess
import sys
import threading
import wave
import zlib
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from hostile_files import Watched, attacks, watched
from PIL import Image

from loaders.decode import decode_frames, waveform_samples
from loaders.listed import ClipSampling, ListedLoader, listed_config
from loaders.raw_index import VideoIndex, index_files, scan_video
from loaders.raw_video import RawVideoReader
from loaders.stills import read_still
from shards import slicing
from shards.check import middle_frame
from shards.damage import find_damage
from shards.ffmpeg import FfmpegTimeout, SliceCommand, find_ffmpeg, run_ffmpeg
from shards.make import ShardConfig, make_shards, read_report
from shards.media import SourceLimits, Unusable, bounded_memory, open_media
from shards.schema import BadClip
from shards.slicing import SlicedVideo, SliceSettings, decoded_frames, probe_video, slice_video
from shards.sources import with_hashes
from tools.make_synthetic_videos import make_flash_beep_video

SUFFIXES = (".mp4", ".mkv", ".avi", ".wav", ".m3u8", ".jpg")
FAST = SliceSettings(preset="ultrafast", max_clips=2, silence_dbfs=-120)


def program(text: str) -> list[str]:
    return [sys.executable, "-c", text]


def slice_file(path: Path, limits: SourceLimits | None = None) -> SlicedVideo:
    return slice_video(str(path), path.name, 0, FAST, find_ffmpeg(), 60, limits=limits)


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A video with sound."""
    return make_flash_beep_video(
        tmp_path_factory.mktemp("good") / "good.mp4", seconds=1.3, size=(64, 48), fps="25"
    )


@pytest.fixture
def secret(hostile_folder: Watched) -> Watched:
    """The folder of hostile files; what earlier tests did to the canary is forgotten."""
    hostile_folder.touches()
    return hostile_folder


@pytest.fixture(scope="module")
def hostile_folder(good: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    """A folder of hostile files, beside the canary that they want."""
    folder = tmp_path_factory.mktemp("hostile")
    canary = folder / "canary.secret"  # not one of the suffixes that a folder is searched for
    canary.write_bytes(good.read_bytes())
    with watched(folder, canary) as secret:
        for name, data in attacks(
            canary, secret.listener.url, secret.listener.port, good.read_bytes()
        ).items():
            for suffix in SUFFIXES:
                (folder / f"{name}{suffix}").write_bytes(data)
        yield secret


def hostile(secret: Watched, suffix: str) -> list[Path]:
    return sorted(secret.folder.glob(f"*{suffix}"))


# --- the watch sees what it is for -------------------------------------------------------------------------------


OPEN_TO_ALL = {
    "protocol_whitelist": "file,http,tcp,crypto,data,concat,subfile,rtp,udp",
    "allowed_extensions": "ALL",
    "extension_picky": "0",
    "safe": "0",
    "enable_drefs": "1",
}


@pytest.mark.parametrize(
    "name, touches",
    [
        ("hls-file.m3u8", "canary"),
        ("hls-http.m3u8", "connection"),
        ("concat.mp4", "canary"),
        ("concat-http.mp4", "connection"),
        ("mov-alias.mp4", "canary"),
    ],
)
def test_without_guards_libav_does_what_such_a_file_asks(name: str, touches: str, secret: Watched) -> None:
    """So the tests below could fail."""
    with suppress(av.error.FFmpegError), av.open(str(secret.folder / name), options=OPEN_TO_ALL) as container:
        next(container.demux(), None)
    with pytest.raises(AssertionError, match=touches):
        secret.check(name)


# --- nothing but the given file is opened ------------------------------------------------------------------------


def test_hostile_files_are_not_followed_when_they_are_sliced(secret: Watched) -> None:
    for suffix in SUFFIXES:
        for path in hostile(secret, suffix):
            sliced = slice_file(path)
            secret.check(path.name)
            # Of tracks that are said to lie at a URL, libav takes what is in the file itself.
            if not path.name.startswith("mov-url"):
                assert not sliced.clips and sliced.reason in ("undecodable", "no-video", "no-audio"), (
                    path.name
                )


def test_the_program_that_slices_is_guarded_by_itself(secret: Watched, tmp_path: Path) -> None:
    for path in hostile(secret, ".mp4"):
        if "hls" not in path.name and "concat" not in path.name and "mov" not in path.name:
            continue
        command = SliceCommand(
            path=str(path),
            video_stream=0,
            audio_stream=1,
            start_seconds=0,
            read_seconds=2,
            seconds=None,
            scaled_size=(192, 144),
            crop_offset=(0, 0),
            frame_size=(192, 144),
            scale_first=True,
            crf=23,
            preset="ultrafast",
        )
        run_ffmpeg(command.build(find_ffmpeg()), tmp_path, 60)
        secret.check(path.name)


def test_hostile_files_are_not_followed_when_they_are_indexed_or_read_as_videos(
    secret: Watched, good: Path
) -> None:
    (video,) = index_files(
        good.parent,
        with_hashes([(good.name, str(good), None)]),
        min_seconds=lambda video: 1,
        workers=0,
        cache=secret.folder / "index.json",
    ).videos
    for suffix in (".mp4", ".wav"):
        for path in hostile(secret, suffix):
            for needs in ("both", "video", "audio"):
                found = scan_video(str(path), needs)
                assert "reason" in found or path.name.startswith("mov-url"), path.name
            secret.check(path.name)
            # As if it had been exchanged after it was indexed, for another of its size.
            exchanged = replace(video, video_id=path.name, num_bytes=path.stat().st_size)
            reader = RawVideoReader(VideoIndex(folder=str(secret.folder), videos=(exchanged,), skipped=()))
            with suppress(BadClip):
                reader.read(0, 0.1, short_side=36)
                assert path.name.startswith("mov-url")
            with suppress(BadClip):
                reader.read_soundtrack(0, 0.0, 1.0, (48_000,))
                assert path.name.startswith("mov-url")
            find_damage(str(path), 0, 1, 1.0, SourceLimits())
            secret.check(path.name)


def test_hostile_members_of_a_shard_are_not_followed(secret: Watched) -> None:
    for path in hostile(secret, ".mp4"):
        data = path.read_bytes()
        for read in (
            lambda data: decode_frames(data, range(32), 36),
            decoded_frames,
            middle_frame,
            waveform_samples,
        ):
            with suppress(BadClip):
                read(data)
        secret.check(path.name)


def test_hostile_images_are_not_followed(
    secret: Watched, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Pillow asks Ghostscript to draw PostScript.
    program = tmp_path / "gs"
    program.write_text(f"#!/bin/sh\ntouch '{tmp_path}/called'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    for path in hostile(secret, ".jpg"):
        with pytest.raises(BadClip, match="bad-image"):
            read_still(str(path))
        secret.check(path.name)
    assert not (tmp_path / "called").exists()


def test_make_shards_skips_each_hostile_file_with_a_reason_and_keeps_the_rest(
    secret: Watched, good: Path, tmp_path: Path
) -> None:
    listed = [path.name for path in hostile(secret, ".mp4")]
    (tmp_path / "list").write_text("".join(f"{name}\n" for name in [*listed, str(good)]))
    make_shards(
        ShardConfig(
            videos=str(secret.folder),
            list_file=str(tmp_path / "list"),
            out=str(tmp_path / "out"),
            workers=1,
            slicing=FAST,
        )
    )
    secret.check("make_shards")
    rows = {row.path: row for row in read_report(tmp_path / "out" / "report.csv")}
    assert len(rows) == len(listed) + 1
    kept = {name for name, row in rows.items() if row.status == "kept" and not name.startswith("mov-url")}
    assert kept == {str(good)}
    assert all(row.reason for name, row in rows.items() if row.status == "skipped")


def test_names_that_libav_takes_for_more_than_a_name_are_names(
    good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [
        "concat:good.mp4|good.mp4", "subfile,,start,0,end,0,,:good.mp4", "data:text,a", "crypto:good.mp4", "pipe:0",
        "fd:", "-y", "a%03d.mp4", "a[0-9]*.mp4", "async:cache:file:good.mp4", "tee:a|b", "unix:good", "http:a",
    ]  # fmt: skip
    plain = probe_video(str(good))
    for name in ("good.mp4", "a001.mp4"):
        (tmp_path / name).write_bytes(good.read_bytes())
    monkeypatch.chdir(tmp_path)
    for name in names:  # bare, as in a list beside them
        with pytest.raises(Unusable, match="undecodable"):
            probe_video(name)
        (tmp_path / name).write_bytes(good.read_bytes())
        assert probe_video(name) == plain, name


# --- what is no file ---------------------------------------------------------------------------------------------


@pytest.fixture
def no_file(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Path]:
    """A path at which something else than a file is. A pipe ends after a while, so that a test fails and does not
    hang."""
    path = tmp_path / "odd.mp4"
    timer = None
    if request.param == "pipe":
        os.mkfifo(tmp_path / "pipe")
        path.symlink_to(tmp_path / "pipe")

        def release() -> None:
            with suppress(OSError):
                os.close(os.open(tmp_path / "pipe", os.O_WRONLY | os.O_NONBLOCK))

        timer = threading.Timer(10, release)
        timer.start()
    elif request.param == "device":
        path.symlink_to("/dev/zero")
    else:
        path.mkdir()
    yield path
    if timer is not None:
        timer.cancel()


@pytest.mark.parametrize("no_file", ["pipe", "device", "folder"], indirect=True)
def test_what_is_no_file_is_not_opened(no_file: Path) -> None:
    assert slice_file(no_file).reason == "unreadable"
    assert scan_video(str(no_file)) == {"reason": "unreadable"}
    with pytest.raises(BadClip, match="unreadable"):
        read_still(str(no_file))
    with pytest.raises(Unusable, match="unreadable"), open_media(str(no_file)):
        pass


# --- limits ------------------------------------------------------------------------------------------------------


def with_png_size(data: bytes, width: int, height: int) -> bytes:
    """The same with another size in the header of each PNG in it."""
    header = data[data.index(b"IHDR") : data.index(b"IHDR") + 17]
    changed = b"IHDR" + struct.pack(">II", width, height) + header[12:]
    return data.replace(
        header + struct.pack(">I", zlib.crc32(header)), changed + struct.pack(">I", zlib.crc32(changed))
    )


def png_in_avi(width: int, height: int, said_width: int, said_height: int, path: Path) -> None:
    """An AVI of one small PNG which says that it is width x height; the container says something else."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="avi") as container:
        stream = container.add_stream("png", rate=25)
        stream.width = stream.height = 16
        stream.pix_fmt = "rgb24"
        frame = av.VideoFrame.from_ndarray(np.zeros((16, 16, 3), np.uint8), format="rgb24")
        for _ in range(30):
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    data = buffer.getvalue()
    data = with_png_size(data, width, height)
    at = data.index(b"strf") + 8
    data = data[: at + 4] + struct.pack("<ii", said_width, said_height) + data[at + 12 :]
    path.write_bytes(data)


def wav(path: Path, rate: int = 24_000, channels: int = 1) -> None:
    with wave.open(str(path), "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(bytes(2 * channels * 100))


@pytest.mark.parametrize(
    "said", [(12_000, 12_000), (16, 16)], ids=["by its container", "by its picture alone"]
)
def test_a_picture_of_too_many_pixels_is_not_decoded(
    said: tuple[int, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "large.avi"
    png_in_avi(12_000, 12_000, *said, path)
    assert path.stat().st_size < 20_000
    with bounded_memory(2**28):  # a picture takes 432 MB
        # libav refuses such a size itself, and then does not tell it.
        assert scan_video(str(path), "video") == {"reason": "undecodable"}
        monkeypatch.setattr("loaders.raw_index.LIMITS", SourceLimits(max_pixels=2**31 - 1))
        assert scan_video(str(path), "video") == {"reason": "memory"}, "it is decoded where it is allowed"
    png_in_avi(16, 16, 16, 16, path)
    assert "reason" not in scan_video(str(path), "video")


def test_limits_are_asked_before_a_video_is_decoded(good: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert slice_file(good, SourceLimits(max_pixels=64 * 48)).clips
    monkeypatch.setattr("shards.slicing._first_frame", lambda *_: pytest.fail("decoded"))
    assert slice_file(good, SourceLimits(max_pixels=64 * 48 - 1)).reason == "too-many-pixels"
    assert slice_file(good, SourceLimits(max_fps=24)).reason == "too-fast"
    assert slice_file(good, SourceLimits(max_hours=1 / 3600)).reason == "too-long"
    assert slice_file(good, SourceLimits(max_streams=1)).reason == "too-many-streams"
    assert slice_file(good, SourceLimits(max_sample_rate=8000)).reason == "too-fast"


@pytest.mark.parametrize(
    "rate, channels, reason",
    [
        (24_000, 1, "too-short"),
        (2**31 - 1, 1, "too-fast"),
        (24_000, 200, "too-many-streams"),
    ],
)
def test_sound_of_unheard_rates_and_channels_is_refused(
    rate: int, channels: int, reason: str, tmp_path: Path
) -> None:
    wav(tmp_path / "odd.wav", rate, channels)
    index = index_files(
        tmp_path,
        with_hashes([("odd.wav", str(tmp_path / "odd.wav"), None)]),
        needs="audio",
        min_seconds=lambda video: 1,
        workers=0,
        cache=tmp_path / "index.json",
        allow_none=True,
    )
    assert index.skipped == (("odd.wav", reason),)


def test_a_file_of_a_million_frames_a_second_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "fast.avi"
    png_in_avi(16, 16, 16, 16, path)
    data = bytearray(path.read_bytes())
    at = data.index(b"strh") + 8 + 20
    data[at : at + 8] = struct.pack("<II", 1, 1_000_000)
    path.write_bytes(data)
    assert scan_video(str(path), "video") == {"reason": "too-fast"}


def test_a_file_of_a_hundred_tracks_and_more_is_refused(tmp_path: Path) -> None:
    for count, reason in ((100, "too-short"), (101, "too-many-streams")):
        with av.open(str(tmp_path / "many.mkv"), "w") as container:
            streams = [container.add_stream("pcm_s16le", rate=8000, layout="mono") for _ in range(count)]
            for stream in streams:
                frame = av.AudioFrame.from_ndarray(np.zeros((1, 80), np.int16), format="s16", layout="mono")
                frame.sample_rate = 8000
                container.mux(stream.encode(frame))
                container.mux(stream.encode(None))
        index = index_files(
            tmp_path,
            with_hashes([("many.mkv", str(tmp_path / "many.mkv"), None)]),
            needs="audio",
            min_seconds=lambda video: 1,
            workers=0,
            cache=tmp_path / f"{count}.json",
            allow_none=True,
        )
        assert index.skipped == (("many.mkv", reason),)


def gapped(path: Path, seconds: float, **options: str) -> None:
    """Sound of which the last packet is `seconds` after the first."""
    with av.open(str(path), "w", options=options) as container:
        stream = container.add_stream("pcm_s16le", rate=8000, layout="mono")
        for start in (0, round(seconds * 8000)):
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 8000), np.int16), format="s16", layout="mono")
            frame.sample_rate, frame.time_base, frame.pts = 8000, Fraction(1, 8000), start
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


@pytest.mark.parametrize("options", [{}, {"live": "1"}], ids=["by its header", "by its packets alone"])
def test_times_that_are_years_apart_are_refused(options: dict[str, str], tmp_path: Path) -> None:
    gapped(tmp_path / "long.mkv", 1e9, **options)
    index = index_files(
        tmp_path,
        with_hashes([("long.mkv", str(tmp_path / "long.mkv"), None)]),
        needs="audio",
        min_seconds=lambda video: 1,
        workers=0,
        cache=tmp_path / "index.json",
        allow_none=True,
    )
    assert index.skipped == (("long.mkv", "too-long"),)


def late_sound(path: Path, late: float) -> Path:
    """A video whose sound starts after so many seconds, of which only the first and the last have pictures."""
    with av.open(str(path), "w") as container:
        picture = container.add_stream("mjpeg", rate=25)
        picture.width, picture.height, picture.pix_fmt = 64, 48, "yuvj420p"
        sound = container.add_stream("pcm_s16le", rate=8000, layout="mono")
        for start in (0.0, late):
            for number in range(40):
                frame = av.VideoFrame.from_ndarray(np.zeros((72, 64), np.uint8), format="yuvj420p")
                frame.pts, frame.time_base = round(start * 25) + number, Fraction(1, 25)
                container.mux(picture.encode(frame))
        container.mux(picture.encode(None))
        block = av.AudioFrame.from_ndarray(np.ones((1, 12_000), np.int16), format="s16", layout="mono")
        block.sample_rate, block.time_base, block.pts = 8000, Fraction(1, 8000), round(late * 8000)
        container.mux(sound.encode(block))
        container.mux(sound.encode(None))
    return path


def test_sound_that_starts_late_takes_no_disk_for_what_is_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Silence from the start of the file on would take 3 MB a minute."""
    sizes = []
    collect = slicing._collect

    def measured(folder: Path, *rest: object) -> object:
        sizes.extend(file.stat().st_size for file in folder.iterdir())
        return collect(folder, *rest)

    monkeypatch.setattr(slicing, "_collect", measured)
    sliced = slice_file(late_sound(tmp_path / "late.mkv", 600.0))
    assert [clip.start_seconds for clip in sliced.clips] == [pytest.approx(600.0, abs=0.5)]
    assert max(sizes) < 3e6
    assert slice_file(late_sound(tmp_path / "later.mkv", 40 * 3600.0)).reason == "too-long"


def test_ffmpeg_gets_no_more_memory_than_allowed(good: Path, tmp_path: Path) -> None:
    for size, fails in ((2**27, False), (2**30, True)):
        finished = run_ffmpeg(program(f"bytearray({size})"), tmp_path, 60, max_memory_bytes=2**29)
        assert (finished.return_code != 0) == fails, finished.errors
    # What ffmpeg says when an encoder gets none.
    failing = tmp_path / "ffmpeg"
    failing.write_text("#!/bin/sh\necho 'x264 [error]: malloc of size 98368 failed' >&2\nexit 187\n")
    failing.chmod(0o755)
    assert slice_video(str(good), "a", 0, FAST, str(failing), 60).reason == "memory"


def test_memory_is_bounded_inside_and_free_again_outside() -> None:
    with bounded_memory(2**28):
        np.empty(2**26, np.uint8)
        with pytest.raises(MemoryError):
            np.empty(2**29, np.uint8)
    np.empty(2**29, np.uint8)


def test_what_takes_more_memory_than_allowed_to_probe_is_left_out(
    good: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def greedy(*_: object) -> None:
        np.empty(2**30, np.uint8)

    monkeypatch.setattr("shards.slicing._first_frame", greedy)
    assert slice_file(good, SourceLimits(max_memory_bytes=2**28)).reason == "memory"


def test_a_program_that_writes_a_large_file_is_killed(tmp_path: Path) -> None:
    finished = run_ffmpeg(
        program("open('a', 'wb').write(bytes(10**7)); open('end', 'w')"), tmp_path, 60, max_file_bytes=10**6
    )
    assert finished.return_code != 0 and not (tmp_path / "end").exists()
    assert (tmp_path / "a").stat().st_size <= 10**6
    command = [find_ffmpeg(), *"-v error -f lavfi -i anullsrc -t 1000 -f s16le b".split()]
    assert run_ffmpeg(command, tmp_path, 60, max_file_bytes=10**6).return_code == -signal.SIGXFSZ


@pytest.mark.skipif(sys.platform != "linux", reason="limits of ffmpeg are set on Linux alone")
def test_limits_of_the_machine_that_are_lower_stay(tmp_path: Path) -> None:
    """A login node may allow so much CPU time and no more."""
    command = [
        sys.executable,
        "-c",
        "import resource; raise SystemExit(resource.getrlimit(resource.RLIMIT_CPU)[1])",
    ]
    code = (
        "import sys; from pathlib import Path; from shards.ffmpeg import run_ffmpeg; "
        f"sys.exit(run_ffmpeg({command!r}, Path({str(tmp_path)!r}), 1000).return_code)"
    )
    done = subprocess.run(["sh", "-c", 'ulimit -t 100; exec "$0" -c "$1"', sys.executable, code], cwd=ROOT)
    assert done.returncode == 100


@pytest.mark.skipif(sys.platform != "linux", reason="limits of ffmpeg are set on Linux alone")
def test_the_limit_on_processor_time_is_a_timeout_and_no_crash(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    getrlimit = resource.getrlimit
    monkeypatch.setattr(
        resource, "getrlimit", lambda kind: (1, 1) if kind == resource.RLIMIT_CPU else getrlimit(kind)
    )
    with pytest.raises(FfmpegTimeout, match="after 1 s of processor time"):
        run_ffmpeg(program("while True: pass"), tmp_path, 60)
    finished = run_ffmpeg(program("import os; os.kill(os.getpid(), 9)"), tmp_path, 60)
    assert finished.return_code == -signal.SIGKILL and finished.killed


def test_a_video_that_crashes_ffmpeg_each_time_costs_itself_alone(
    good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    deadly = tmp_path / "ffmpeg"
    deadly.write_text(
        f'#!/bin/sh\ncase "$*" in *deadly.mp4*) kill -SEGV $$;; esac\nexec "{find_ffmpeg()}" "$@"\n'
    )
    deadly.chmod(0o755)
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", str(deadly))
    monkeypatch.setattr(slicing, "KILLED_WAIT_SECONDS", (0.0, 0.0, 0.0))

    def in_this_process(function, next_job, num_workers, limit_seconds):
        while (job := next_job()) is not None:
            yield job, function(job)

    monkeypatch.setattr("shards.make.open_engine", lambda *unused: in_this_process)
    (tmp_path / "videos").mkdir()
    for name in ("deadly.mp4", "good.mp4"):
        (tmp_path / "videos" / name).write_bytes(good.read_bytes())
    make_shards(ShardConfig(videos=str(tmp_path / "videos"), out=str(tmp_path / "out"), slicing=FAST))
    rows = {row.path: (row.status, row.reason) for row in read_report(tmp_path / "out" / "report.csv")}
    assert rows == {"deadly.mp4": ("skipped", "crash"), "good.mp4": ("kept", "")}


def test_a_program_that_prints_without_end_takes_no_memory_and_is_killed_in_time(tmp_path: Path) -> None:
    with bounded_memory(2**24), pytest.raises(FfmpegTimeout):
        run_ffmpeg(program("import sys\nwhile True: sys.stderr.write('x' * 2**20)"), tmp_path, 3)
    finished = run_ffmpeg(program("import sys; sys.stderr.write('x' * 2**20 + 'the end')"), tmp_path, 60)
    assert len(finished.errors) == 4000 and finished.errors.endswith("the end")


def test_words_in_a_file_do_not_make_the_disk_full(tmp_path: Path) -> None:
    """A name of a codec or a track is printed by ffmpeg; the run must not end for it."""
    text = "import sys; open('runs', 'a').write('x'); sys.stderr.write('No space left on device')"
    finished = run_ffmpeg(program(text), tmp_path, 60)
    assert finished.return_code == 0
    assert (tmp_path / "runs").read_text() == "xx", "it is tried again: there may be room again by then"


def test_reading_a_clip_has_a_limit_on_time(
    good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = with_hashes([(good.name, str(good), None)])
    sampling = ClipSampling(needs="both", placement="center", clip_seconds=1.0)
    config = listed_config(str(good.parent), batch_size=1, num_workers=0)
    loader = ListedLoader(
        config, files, sampling, folder=str(good.parent), cache=str(tmp_path / "index.json")
    )
    (batch,) = loader
    assert batch.valid.all()
    monkeypatch.setattr("loaders.raw_video.READ_SECONDS", -1.0)
    (batch,) = loader
    assert [record.reason for record in batch.bad] == ["timeout"]


def test_an_image_of_too_many_pixels_is_not_decoded(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16)).save(buffer, "PNG")
    for side in (16, 12_000, 40_000):
        path = tmp_path / f"{side}.png"
        path.write_bytes(with_png_size(buffer.getvalue(), side, side))
        if side == 16:
            assert read_still(str(path)).size == (16, 16)
            continue
        with bounded_memory(2**28), pytest.raises(BadClip, match="too-many-pixels"):
            read_still(str(path))


def test_limits_that_make_no_sense_are_refused() -> None:
    with pytest.raises(ValueError, match="max_pixels is 0, expected at least 1"):
        SourceLimits(max_pixels=0)
    with pytest.raises(ValueError, match="max_hours is -1, expected more than 0"):
        SourceLimits(max_hours=-1)


# --- how the code is written -------------------------------------------------------------------------------------

ROOT = Path(__file__).resolve().parents[1]
OPENS_ITS_OWN = {
    "shards/media.py": {"av.open"},
    "shards/slicing.py": {"av.open"},  # a clip that it has just written, from memory
    "shards/check.py": {
        "av.open",
        "tarfile.open",
    },  # members of shards, from memory; a tar, to list its members
    "cmac/evaluation/videos.py": {"av.open"},  # writes
    "tools/make_world.py": {"av.open"},  # writes
    "loaders/stills.py": {"Image.open"},
}
"""What is to be looked at again when it changes: where media files and archives are opened."""
NEVER = {
    "os.system", "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput", "eval", "exec", "pickle.load",
    "pickle.loads", "pickle.Unpickler", "shutil.unpack_archive", "torch.hub.load", "torchaudio.load",
}  # fmt: skip


def dotted(node: ast.AST) -> str:
    """`a.b.c` of a name; what stands before the last dots may be anything."""
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def calls(tree: ast.AST) -> Iterator[tuple[str, ast.Call]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield dotted(node.func), node


def test_the_code_has_no_shell_no_unpickling_and_no_unguarded_opening() -> None:
    """What the tests above show of files, said of the code: it is to hold for what is written next, too."""
    found = []
    paths = [
        ROOT / "train.py",
        *(p for part in ("shards", "loaders", "cmac", "tools") for p in (ROOT / part).rglob("*.py")),
    ]
    assert len(paths) > 80
    for path in paths:
        name = path.relative_to(ROOT).as_posix()
        for called, node in calls(ast.parse(path.read_text(encoding="utf-8"))):
            given = {keyword.arg: getattr(keyword.value, "value", None) for keyword in node.keywords}
            bad = called in NEVER or called.endswith((".extractall", ".extract"))
            bad |= given.get("shell", False) is not False
            bad |= called == "torch.load" and given.get("weights_only") is not True
            bad |= called == "np.load" and given.get("allow_pickle") is not False
            bad |= called in ("av.open", "Image.open", "tarfile.open") and called not in OPENS_ITS_OWN.get(
                name, ()
            )
            if bad:
                found.append(f"{name}:{node.lineno}: {called}")
    assert not found
