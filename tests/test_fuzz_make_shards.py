"""Damaged videos: each gives whole clips or a reason, in bounded time and memory, and nothing is left lying around.

One child process slices them all (see fuzz_child); by hand, one alone:

    cd tests && PYTHONPATH=..:. python test_fuzz_make_shards.py FOLDER --only NAME
"""

import csv
import random
import re
import resource
import shutil
import struct
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import fuzz_child
import numpy as np
import pytest
from damaged_clips import boxes
from mutations import flipped, put

from shards.check import check_shards
from shards.ffmpeg import find_ffmpeg
from shards.mp4 import decode, open_decoder, read_video_track
from shards.schema import FRAMES_PER_CLIP, SAMPLES_PER_CLIP, WAV_HEADER
from shards.slicing import SlicedVideo, SliceSettings, slice_video
from tools.make_synthetic_videos import make_flash_beep_video

FFMPEG_SECONDS = 20.0  # for a pass; the whole videos take a fiftieth of it
LIMIT_SECONDS = 100  # for all that is done to a video
PEAK_BYTES = 300_000_000  # of this process
FFMPEG_BYTES = 1_500_000_000  # of the largest ffmpeg
SETTINGS = SliceSettings(max_clips=2, max_seconds=4, preset="ultrafast")
SOURCES: dict[str, dict[str, object]] = {
    "a.mp4": {},
    "b.mkv": {"audio_start": 0.1},
    "c.avi": {"codecs": ("mpeg4", "libmp3lame")},
    "d.webm": {"codecs": ("libvpx", "libopus"), "sample_rate": 48000},
    "e.ts": {},
    "f.ogg": {"codecs": ("libtheora", "libvorbis"), "pixel_format": "yuv420p"},
    "g.flv": {"codecs": ("flv", "libmp3lame")},
}
MAGIC = {
    "x.mp4": b"\0\0\0\x20ftypisom\0\0\x02\0isomiso2avc1mp41\0\0\0\0moov",
    "x.mkv": bytes.fromhex("1a45dfa3a3428681014 2f7810142f2810442f381084282 88".replace(" ", ""))
    + b"matroska",
    "x.avi": b"RIFF\xff\xff\xff\x7fAVI LIST",
    "x.ogg": b"OggS\0\x02",
    "x.flv": b"FLV\x01\x05\0\0\0\x09\0\0\0\0",
    "x.ts": b"G@\0\x10\0",
    "x.asf": bytes.fromhex("3026b2758e66cf11a6d900aa0062ce6c"),
    "x.wmv": b"\0",
    "x.m4v": b"\x89PNG\r\n\x1a\n",
    "x.mov": b"GIF89a",
}


def make_sources(folder: Path) -> dict[str, bytes]:
    """Whole videos of two seconds, one per container."""
    folder.mkdir(parents=True, exist_ok=True)
    return {
        name: make_flash_beep_video(folder / name, seconds=2.3, **options).read_bytes()
        for name, options in SOURCES.items()
    }


def broken_videos(sources: dict[str, bytes]) -> Iterator[tuple[str, str, bytes]]:
    """(what was done, name of the file, contents), the same ones each time."""
    rng = random.Random(0)
    for name, whole in sources.items():
        size = len(whole)
        yield "whole", name, whole
        for number in range(4):
            yield f"a few bits/{number}", name, flipped(whole, rng, most=8)
        for number in range(2):
            yield f"many bits/{number}", name, flipped(whole, rng, most=300)
        for number in range(4):
            yield f"bits of the beginning/{number}", name, flipped(whole, rng, 0, min(1000, size), most=6)
        for share in (0.02, 0.3, 0.6, 0.95):
            yield f"cut at {share}", name, whole[: int(share * size)]
        for number, filler in enumerate((b"\0", b"\xff", rng.randbytes(997))):
            start, length = rng.randrange(size), rng.randrange(100, size // 3)
            yield f"a part overwritten/{number}", name, put(whole, start, (filler * length)[:length])[:size]
        start = rng.randrange(size // 2)
        yield "a part missing", name, whole[:start] + whole[start + size // 5 :]
        yield "without its beginning", name, whole[rng.randrange(50, 500) :]
    mp4 = sources["a.mp4"]
    places = list(boxes(mp4))
    moov = next((start, end) for box, start, end in places if box == "moov")
    for number in range(24):
        yield f"bits of moov/{number}", "a.mp4", flipped(mp4, rng, *moov)
    for number in range(24):
        _, start, end = rng.choice(places)
        size = rng.choice((0, 1, 7, 8, end - start - 1, 2**31, 2**32 - 1))
        yield f"a box of {size} bytes/{number}", "a.mp4", put(mp4, start, struct.pack(">I", size))
    for number in range(8):
        (_, a, b), (_, c, d) = sorted(rng.sample(places, 2), key=lambda place: place[1])
        if b <= c:
            yield f"swapped boxes/{number}", "a.mp4", mp4[:a] + mp4[c:d] + mp4[b:c] + mp4[a:b] + mp4[d:]
    for table, offset in (
        ("stts", 12),
        ("stsz", 16),
        ("stsc", 20),
        ("stco", 12),
        ("stsd", 12),
        ("ctts", 12),
        ("elst", 20),
    ):
        for start in [start for box, start, _ in places if box == table]:
            yield f"{table} at {start} of 4 billion", "a.mp4", put(mp4, start + offset, b"\xff" * 4)
    for one, two in (
        ("a.mp4", "a.mp4"),
        ("a.mp4", "b.mkv"),
        ("b.mkv", "b.mkv"),
        ("e.ts", "e.ts"),
        ("c.avi", "a.mp4"),
        ("f.ogg", "f.ogg"),
    ):
        yield f"followed by {two}", one, sources[one] + sources[two]
    for name, magic in MAGIC.items():
        yield "noise after its magic", name, magic + rng.randbytes(20_000)
        yield "zeros after its magic", name, magic + bytes(20_000)
    for what, data in {
        "nothing": b"",
        "one byte": b"\0",
        "text": b"hello\n" * 999,
        "noise": rng.randbytes(50_000),
    }.items():
        yield what, "x.mp4", data
    yield "the wrong suffix", "x.flv", sources["b.mkv"]
    yield "the wrong suffix", "x.mkv", sources["c.avi"]


def check_sliced(sliced: SlicedVideo) -> str:
    """Outcome; AssertionError unless it is whole clips or a reason."""
    if not sliced.clips:
        assert re.fullmatch("[a-z]+(-[a-z]+)*", sliced.reason), sliced.reason
        return f"skipped: {sliced.reason}"
    assert len(sliced.clips) <= SETTINGS.max_clips and sliced.reason in ("", "truncated", "damaged")
    for clip in sliced.clips:
        track = read_video_track(clip.video)
        sizes = [(frame.width, frame.height) for frame in decode(open_decoder(track), clip.video, track)]
        assert sizes == [sliced.frame_size] * FRAMES_PER_CLIP
        assert clip.audio.startswith(WAV_HEADER) and len(clip.audio) == len(WAV_HEADER) + 2 * SAMPLES_PER_CLIP
        assert np.isfinite(clip.loudness_dbfs) and np.isfinite(clip.start_seconds)
    return f"kept{', ' * bool(sliced.reason)}{sliced.reason}"


def main(folder: Path, only: str | None = None) -> None:
    """The child: slices all damaged videos, or one, in a folder that it makes."""
    videos, work = folder / "videos", folder / "work"
    work.mkdir(parents=True)
    sources = make_sources(videos)
    program = find_ffmpeg()

    def slice_one(name: str, data: bytes) -> str:
        with fuzz_child.unwatched():
            (videos / name).write_bytes(data)
        sliced = slice_video(str(videos / name), name, 0, SETTINGS, program, FFMPEG_SECONDS, str(work))
        assert list(work.iterdir()) == [], "files are left in the work folder"
        return check_sliced(sliced)

    def inputs() -> Iterator[tuple[str, Callable[[], str]]]:
        for what, name, data in broken_videos(sources):
            if only in (None, f"{name}: {what}"):
                yield f"{name}: {what}", partial(slice_one, name, data)

    fuzz_child.examine(
        inputs(), guarded=folder.parent, writable=work, readable=videos, limit_seconds=LIMIT_SECONDS
    )
    children = 1024 * resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    assert children < FFMPEG_BYTES, f"an ffmpeg had {children / 1e6:.0f} MB"


def test_damaged_videos_give_whole_clips_or_a_reason(tmp_path):
    outside = tmp_path / "outside"
    (outside / "here").mkdir(parents=True)
    (outside / "secret.txt").write_text("secret")
    before = fuzz_child.snapshot(tmp_path, outside / "made")
    report = fuzz_child.run_child(
        "test_fuzz_make_shards.py", str(outside / "made"), cwd=outside / "here", timeout_seconds=550
    )
    text = report.text("shard making")
    print(text)
    assert report.failures == [], text
    assert report.num_inputs >= 150 and report.peak_bytes < PEAK_BYTES, text
    assert report.outcomes["kept"] >= len(SOURCES), text
    assert fuzz_child.snapshot(tmp_path, outside / "made") == before, "written outside of the work folder"


@pytest.mark.timeout(300)
def test_make_shards_ends_well_over_a_folder_of_damaged_videos(tmp_path):
    sources = make_sources(tmp_path / "sources")
    broken = list(broken_videos(sources))
    chosen = [item for item in broken if item[0] == "whole"][:2]
    chosen += random.Random(1).sample([item for item in broken if item[0] != "whole"], 40)
    videos, here = tmp_path / "videos", tmp_path / "here"
    videos.mkdir()
    here.mkdir()
    for number, (_, name, data) in enumerate(chosen):
        (videos / f"{number:02d}{Path(name).suffix}").write_bytes(data)
    shutil.rmtree(tmp_path / "sources")
    before = fuzz_child.snapshot(tmp_path, tmp_path / "out")
    arguments = [
        "--videos",
        str(videos),
        "--out",
        str(tmp_path / "out"),
        "--workers",
        "2",
        "--max-clips",
        "2",
    ]
    arguments += [
        "--max-seconds",
        "4",
        "--preset",
        "ultrafast",
        "--videos-per-shard",
        "10",
        "--timeout",
        "20",
    ]
    done = subprocess.run(
        [sys.executable, str(fuzz_child.ROOT / "tools/make_shards.py"), *arguments],
        cwd=here,
        env={**fuzz_child.child_environment(), "TMPDIR": str(here)},
        capture_output=True,
        text=True,
        timeout=250,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    with open(tmp_path / "out/report.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert sorted(row["path"] for row in rows) == sorted(path.name for path in videos.iterdir())
    outcomes = Counter(row["reason"] if row["status"] == "skipped" else "kept" for row in rows)
    print(f"make_shards over {len(rows)} videos: {dict(outcomes)}")
    assert all(row["reason"] for row in rows if row["status"] == "skipped")
    assert outcomes["kept"] >= 2 and set(row["status"] for row in rows) == {"kept", "skipped"}
    assert check_shards(tmp_path / "out", decode=True).problems == []
    assert fuzz_child.snapshot(tmp_path, tmp_path / "out") == before, "written outside of the output folder"


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[3] if len(sys.argv) > 3 else None)
