"""Show what a network attends to in videos: a picture, an MP4 with sound and one page for all of them.

    python -m tools.visualize runs/demo video.mp4 other.mp4 --out runs/visualize

writes for each video NAME.png (moments as in the paper's Fig. 5) and NAME.mp4 (the maps move with the video and its
sound), and index.html, which plays all of them and needs nothing but itself. A video that cannot be shown is left out
with the reason; the exit status is then 1.
"""

from __future__ import annotations

import argparse
import logging
import math
import os
import re
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from cmac.evaluation import pictures
from cmac.evaluation.boxes import FPS
from cmac.evaluation.demo import write_text
from cmac.evaluation.videos import AAC_RATES, write_mp4
from cmac.evaluation.viewer import (
    KINDS,
    Course,
    PlayedVideo,
    Renderer,
    Window,
    build_page,
    moments,
    panel_size,
    range_text,
)
from loaders.augment import crop_in_source
from loaders.config import AudioConfig, VideoConfig
from loaders.listed import ClipSampling, ListedLoader, listed_config
from loaders.raw_index import IndexedVideo, VideoIndex, index_files
from loaders.raw_video import EPSILON_SECONDS, RawVideoReader
from shards.manifest import write_atomically
from shards.schema import BadClip
from shards.slicing import SliceSettings, loudness_dbfs
from shards.sources import SourceVideo, with_hashes
from tools.common import fail, open_encoders, say

if TYPE_CHECKING:
    from cmac.model import CMAC
    from loaders.batch import ClipBatch

CLIP_SECONDS = 1.0
"""What the network sees at a time, as in pretraining."""
CHUNK_SECONDS = 1.0
"""Pictures are decoded in pieces of this length, and where one does not decode, in halves of it."""
LEAST_FRAMES = 4
"""One that does not decode costs so many pictures."""
MAX_BITS_PER_SECOND = 2_000_000
"""Of a rendered picture: what bounds the page."""
AUDIO_BITS_PER_SECOND = 140_000
MAX_PAGE_BYTES = 256 * 2**20
SECONDS_HINT = "--seconds shows more"
REASONS = {
    "missing": "there is no such file",
    "unreadable": "the file cannot be read",
    "undecodable": "it is no video that can be decoded",
    "no-video": "it has no picture",
    "no-audio": "it has no sound, which the guided map needs",
    "too-short": f"it is shorter than the {CLIP_SECONDS:g} s that the network looks at",
    "timeout": "reading it took too long",
    "crash": "reading it crashed",
    "frame-size": "its picture is too long for its height",
}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How videos are shown."""

    seconds: float = 10.0
    """At most so much of each video, from its start."""
    stride_seconds: float = 0.5
    """From one window of the network to the next."""
    num_columns: int = 6
    """Moments in the picture."""
    batch_size: int = 8
    """Windows at a time."""
    num_workers: int = 0
    """Processes that decode windows; 0: this one."""

    def __post_init__(self) -> None:
        if not CLIP_SECONDS <= self.seconds <= 600:
            raise ValueError(f"--seconds is {self.seconds:g}, expected {CLIP_SECONDS:g} to 600")
        if not 1 / FPS <= self.stride_seconds <= CLIP_SECONDS:
            raise ValueError(
                f"--stride is {self.stride_seconds:g}, expected {1 / FPS:g} to {CLIP_SECONDS:g} seconds"
            )
        for name, value in (("--columns", self.num_columns), ("--batch-size", self.batch_size)):
            if value < 1:
                raise ValueError(f"{name} is {value}, expected at least 1")
        if self.num_workers < 0:
            raise ValueError(f"--workers is {self.num_workers}, expected at least 0")


class LeftOut(Exception):
    """A video cannot be shown; the argument says why."""


def printable(name: str) -> str:
    """A name on one line of any terminal: what is not UTF-8 or not printable becomes a question mark."""
    text = name.encode("utf-8", "replace").decode("utf-8")
    return "".join(letter if letter.isprintable() else "?" for letter in text)


def safe_stems(names: Sequence[str]) -> list[str]:
    """File names without suffix for videos, one each: letters, digits, `.`, `_` and `-` only, no two alike, also
    where upper and lower case are the same."""
    stems, taken = [], {"index"}
    for name in names:
        stem = re.sub(r"[^A-Za-z0-9._-]+", "_", os.path.splitext(os.path.basename(name))[0])
        stem = stem.strip("._-")[:80] or "video"
        attempt, number = stem, 1
        while attempt.lower() in taken:
            number += 1
            attempt = f"{stem}-{number}"
        taken.add(attempt.lower())
        stems.append(attempt)
    return stems


def short_names(paths: Sequence[str]) -> list[str]:
    """What videos are called: the last part of the path where that is enough, for one line of text."""
    ends = Counter(os.path.basename(path) for path in paths)
    return [
        printable(os.path.basename(path) if ends[os.path.basename(path)] == 1 else path) for path in paths
    ]


def find_sources(paths: Sequence[str]) -> tuple[str, dict[str, SourceVideo]]:
    """(folder, the videos as files below it by the names given, each file once, in the order given)."""
    names = {os.path.abspath(path): path for path in reversed(paths)}
    whole = dict.fromkeys(os.path.abspath(path) for path in paths)
    folder = os.path.commonpath([os.path.dirname(path) for path in whole])
    sources = with_hashes(
        (os.path.relpath(path, folder), path if os.path.lexists(path) else None, None) for path in whole
    )
    return folder, {names[path]: source for path, source in zip(whole, sources)}


def index_each(folder: str, sources: Sequence[SourceVideo], cache: Path) -> tuple[VideoIndex, dict[str, str]]:
    """(index of the videos that can be shown, reason by id of the others)."""
    index = index_files(
        folder,
        sources,
        min_seconds=lambda video: CLIP_SECONDS,
        cache=cache,
        workers=1,  # watched: a file that hangs or crashes it costs that file
        allow_none=True,
    )
    return index, dict(index.skipped)


def covered_seconds(duration: float, settings: Settings) -> float:
    """How much of a video is shown: whole frames."""
    return math.floor(min(duration, settings.seconds) * FPS + 1e-6) / FPS


@torch.no_grad()
def read_windows(
    model: CMAC,
    batches: Iterable[ClipBatch],
    device: torch.device | str,
    start_seconds: float,
    stride_seconds: float,
    until_seconds: float,
) -> tuple[list[Window], Counter[str]]:
    """(windows of one video that start before a time, bad ones by reason).

    Args:
        model: has `encode`; in eval mode.
        batches: windows in the order of their start.
        device: where the model is.
        start_seconds: where the first window starts.
        stride_seconds: from one to the next.
        until_seconds: reading ends at the first window that starts then or later.
    """
    windows: list[Window] = []
    bad: Counter[str] = Counter()
    planned_seconds = start_seconds  # of the next window, also where that is bad
    for batch in batches:
        reasons = {record.key: record.reason for record in batch.bad}
        for key, info in zip(batch.keys, batch.clips):
            if key and info is None and planned_seconds < until_seconds:
                bad[reasons[key]] += 1
            planned_seconds += stride_seconds
        rows = [
            row
            for row, info in enumerate(batch.clips)
            if info is not None and info.start_seconds < until_seconds
        ]
        if rows:
            encoded = model.encode(batch.frames[rows].to(device), batch.log_mel[rows].to(device))
            maps = {
                "guided_v": encoded.guided_v,
                "predicted_v": encoded.predicted_v,
                "guided_a": encoded.guided_a.transpose(1, 2),  # (N, S', F')
                "predicted_a": encoded.predicted_a.transpose(1, 2),
                "log_mel": batch.log_mel[rows, 0].transpose(1, 2),  # (N, S, F)
            }
            maps = {name: values.float().cpu().numpy() for name, values in maps.items()}
        for place, row in enumerate(rows):
            info, done = batch.clips[row], batch.augmentations[row]
            x, y, width, height = crop_in_source(info, done)
            across, down = info.source_width, info.source_height
            windows.append(
                Window(
                    start_seconds=info.start_seconds,
                    end_seconds=info.end_seconds,
                    region=(x / across, y / down, width / across, height / down),
                    flip=done.flip,
                    **{name: values[place] for name, values in maps.items()},
                )
            )
        if planned_seconds >= until_seconds:
            break
    return windows, bad


def read_pictures(
    folder: str, video: IndexedVideo, start_seconds: float, num_frames: int, size: tuple[int, int]
) -> Iterator[np.ndarray | None]:
    """Frames of a video, FPS a second from start_seconds on, scaled to (width, height): uint8 (height, width, 3);
    None where they cannot be decoded."""
    silent = replace(video, audio_stream=None)  # damaged sound costs no pictures
    reader = RawVideoReader(VideoIndex(folder=folder, videos=(silent,), skipped=()))

    def read(places: range) -> Iterator[np.ndarray | None]:
        # Each the last one shown before the middle between it and the next, as for the network.
        bounds = tuple(start_seconds + (place + 0.5) / FPS - EPSILON_SECONDS for place in places)
        begin = start_seconds + places.start / FPS
        try:
            frames, _ = reader.read_bounds(
                0, bounds, begin, len(places) / FPS, scaled=size, key=reader.key(0)
            )
        except BadClip:
            if len(places) <= LEAST_FRAMES:
                frames = [None] * len(places)
            else:
                middle = places.start + len(places) // 2
                yield from read(range(places.start, middle))
                frames = read(range(middle, places.stop))
        yield from frames

    step = round(CHUNK_SECONDS * FPS)
    for first in range(0, num_frames, step):
        yield from read(range(first, min(first + step, num_frames)))


def show_video(
    model: CMAC,
    device: torch.device | str,
    configs: tuple[VideoConfig, AudioConfig],
    source: SourceVideo,
    name: str,
    index: VideoIndex,
    folder: str,
    cache: Path,
    stem: Path,
    settings: Settings,
) -> PlayedVideo:
    """Writes `stem`.png and `stem`.mp4 of one video, called `name`; returns what the page shows of it.

    Raises:
        LeftOut: it cannot be shown.
    """
    position = next(n for n, video in enumerate(index.videos) if video.video_id == source.video_id)
    video = index.videos[position]
    start, seconds = video.start_seconds, covered_seconds(video.duration_seconds, settings)
    sampling = ClipSampling(
        needs="both",
        placement="stride",
        stride_seconds=settings.stride_seconds,
        clip_seconds=CLIP_SECONDS,
        decode_once=video.duration_seconds <= 2 * seconds,  # else most of it is not shown
    )
    config = listed_config(
        folder,
        video=configs[0],
        audio=configs[1],
        batch_size=settings.batch_size,
        num_workers=settings.num_workers,
    )
    loader = ListedLoader(config, [source], sampling, folder=folder, cache=str(cache))
    try:
        windows, bad = read_windows(model, loader, device, start, settings.stride_seconds, start + seconds)
    finally:
        loader.close()
    if not windows:
        raise LeftOut(f"none of its windows can be decoded ({_counts(bad)})")

    reader = RawVideoReader(index)
    size = panel_size(*video.frame_size)
    num_frames = round(seconds * FPS)
    course = Course(windows)
    renderer = Renderer(course, size, start, seconds)
    try:
        sound, sample_rate = reader.read_soundtrack(position, start, seconds, AAC_RATES)
    except BadClip as error:
        raise LeftOut(f"its sound cannot be read ({error.reason})") from error

    wanted = moments(start, seconds, settings.num_columns)
    columns: list[tuple[float, list[np.ndarray]]] = []
    poster: list[np.ndarray] = []
    num_missing = 0

    def rendered() -> Iterator[np.ndarray]:
        nonlocal num_missing
        for place, frame in enumerate(read_pictures(folder, video, start, num_frames, size)):
            begin, middle = start + place / FPS, start + (place + 0.5) / FPS
            num_missing += frame is None
            while len(columns) < len(wanted) and wanted[len(columns)] < begin + 1 / FPS:
                columns.append((wanted[len(columns)], renderer.column(frame, wanted[len(columns)])))
            drawn = renderer.frame(frame, middle)
            if place == num_frames // 2:
                poster.append(drawn)
            yield drawn

    write_mp4(
        stem.with_name(f"{stem.name}.mp4"),
        rendered(),
        (renderer.layout.width, renderer.layout.height),
        sound,
        fps=FPS,
        sample_rate=sample_rate,
        max_bits_per_second=MAX_BITS_PER_SECOND,
    )
    write_atomically(stem.with_name(f"{stem.name}.png"), pictures.encode_png(renderer.grid(columns, name)))
    notes = [
        f"{seconds:.1f} s of {video.duration_seconds:.1f} s are shown"
        + (", the whole video" if seconds > video.duration_seconds - 1 / FPS else f" ({SECONDS_HINT})"),
        f"{video.width}x{video.height} pixels"
        + (f" of aspect {video.pixel_aspect:.2f}" if abs(video.pixel_aspect - 1) > 0.01 else "")
        + f", {video.fps:.4g} frames a second, sound at {sample_rate:,} Hz",
        f"{len(windows)} windows of {CLIP_SECONDS:g} s, one every {settings.stride_seconds:g} s",
    ]
    if bad:
        notes.append(f"{sum(bad.values())} windows could not be decoded ({_counts(bad)}): no map there")
    if loudness_dbfs((sound * 32767).astype(np.int16)) < SliceSettings().silence_dbfs:
        notes.append("its sound is silence: what is guided by it means nothing")
    if num_missing:
        notes.append(f"{num_missing / FPS:.1f} s of the picture could not be decoded")
    return PlayedVideo(
        name=name,
        notes=notes,
        ranges=[
            (f"{kind} map of the {what}", range_text(course.range(kind, modality)))
            for modality, what in (("v", "picture"), ("a", "sound"))
            for kind in KINDS
        ],
        video=stem.with_name(f"{stem.name}.mp4").read_bytes(),
        poster=pictures.encode_jpeg(poster[0], quality=80),
        layout=renderer.layout,
    )


def _counts(bad: Counter[str]) -> str:
    return ", ".join(f"{reason} {count}" for reason, count in sorted(bad.items()))


def check_page_size(num_videos: int, settings: Settings) -> None:
    """
    Raises:
        ValueError: the page might become larger than MAX_PAGE_BYTES.
    """
    bits = MAX_BITS_PER_SECOND + AUDIO_BITS_PER_SECOND
    largest = num_videos * settings.seconds * bits / 8 * 4 / 3  # base64
    if largest > MAX_PAGE_BYTES:
        raise ValueError(
            f"{num_videos} videos of --seconds {settings.seconds:g} may make a page of {largest / 2**20:.0f} MiB, "
            f"expected at most {MAX_PAGE_BYTES / 2**20:.0f}; lower --seconds or give fewer videos"
        )


def visualize(
    model: CMAC,
    configs: tuple[VideoConfig, AudioConfig],
    paths: Sequence[str],
    out: Path,
    settings: Settings,
    *,
    device: torch.device | str = "cpu",
    facts: Sequence[tuple[str, str]] = (),
    tell: Callable[[str], None] = say,
) -> list[str]:
    """Writes pictures and MP4s of videos and the page; returns what was left out, a sentence each.

    Args:
        model: has `encode`; in eval mode, on `device`.
        configs: what it was trained with.
        paths: of the videos.
        out: folder, made if it is not there.
        settings: how they are shown.
        device: where the model is.
        facts: for the page: (name, value).
        tell: takes lines about how it goes.

    Raises:
        ValueError: nothing to show, or too much for one page.
    """
    check_page_size(len(paths), settings)
    folder, sources = find_sources(paths)
    out.mkdir(parents=True, exist_ok=True)
    stems = safe_stems(list(sources))
    played: list[PlayedVideo] = []
    left_out: list[str] = []
    with tempfile.TemporaryDirectory(prefix="visualize-") as work:
        cache = Path(work) / "index.json"
        index, reasons = index_each(folder, list(sources.values()), cache)
        for source, name, stem in zip(sources.values(), short_names(list(sources)), stems):
            started = time.monotonic()
            try:
                if source.video_id in reasons:
                    raise LeftOut(REASONS.get(reasons[source.video_id], reasons[source.video_id]))
                video = show_video(
                    model, device, configs, source, name, index, folder, cache, out / stem, settings
                )
            except LeftOut as error:
                left_out.append(f"{name} is left out: {error}")
                tell(left_out[-1])
                continue
            played.append(video)
            tell(
                f"{name}: {stem}.png, {stem}.mp4 ({len(video.video) / 2**20:.1f} MiB; "
                f"{'; '.join(video.notes)}) in {time.monotonic() - started:.0f} s"
            )
    if not played:
        raise ValueError("none of the videos can be shown, expected at least one with picture and sound")
    page_bytes = sum(len(video.video) + len(video.poster) for video in played) * 4 / 3
    page_facts = [
        *facts,
        ("Length", f"at most {settings.seconds:g} s of each video ({SECONDS_HINT})"),
        ("Size", f"about {page_bytes / 2**20:.1f} MiB; the page is complete in itself"),
    ]
    page = build_page(played, "What the network attends to", page_facts, left_out)
    write_text(out / "index.html", page)
    tell(f"page: {printable(str(out / 'index.html'))} ({len(page) / 2**20:.1f} MiB)")
    return left_out


def main(argv: list[str] | None = None) -> int:
    """Command line; 0 when everything is shown, 1 when something is left out or wrong."""
    defaults = Settings()
    parser = argparse.ArgumentParser(
        prog="visualize",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "checkpoint",
        help="run folder or checkpoint of a whole CMAC; random:PATH is the same network with fresh weights",
    )
    parser.add_argument("videos", nargs="+", metavar="VIDEO", help="files with picture and sound")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/visualize"), metavar="FOLDER", help="(default: runs/visualize)"
    )
    parser.add_argument(
        "--seconds",
        type=float,
        default=defaults.seconds,
        help=f"show at most so much of each video, from its start (default: {defaults.seconds:g})",
    )
    parser.add_argument(
        "--stride",
        type=float,
        default=defaults.stride_seconds,
        metavar="SECONDS",
        help="from one window of the network to the next; smaller is smoother and slower "
        f"(default: {defaults.stride_seconds:g})",
    )
    parser.add_argument(
        "--columns",
        type=int,
        default=defaults.num_columns,
        metavar="N",
        help=f"moments in the picture (default: {defaults.num_columns})",
    )
    parser.add_argument("--batch-size", type=int, default=defaults.batch_size, metavar="N")
    parser.add_argument(
        "--workers",
        type=int,
        default=defaults.num_workers,
        metavar="N",
        help="processes that decode windows; 0: this one (default)",
    )
    parser.add_argument("--random-seed", type=int, default=0, help="of fresh weights (default: 0)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: auto")
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.ERROR, format="%(name)s: %(message)s")
    try:
        settings = Settings(
            seconds=args.seconds,
            stride_seconds=args.stride,
            num_columns=args.columns,
            batch_size=args.batch_size,
            num_workers=args.workers,
        )
        encoders = open_encoders(args)
        if encoders.model is None:
            raise ValueError(
                f"{args.checkpoint}: holds encoders without filters and maps, expected a whole CMAC; give a run "
                f"folder or a checkpoint"
            )
        left_out = visualize(
            encoders.model,
            (encoders.video_config, encoders.audio_config),
            args.videos,
            args.out,
            settings,
            device=encoders.device,
            facts=[("Checkpoint", printable(encoders.source)), ("Digest of its weights", encoders.digest)],
        )
    except (ValueError, OSError) as error:  # OSError: the folder or the disk does not take the files
        return fail("visualize", error)
    return 1 if left_out else 0


if __name__ == "__main__":
    sys.exit(main())
