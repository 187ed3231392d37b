"""Is a folder of shards whole, and what is in it: verification, statistics, a contact sheet."""

import os
from array import array
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import av
import numpy as np
from PIL import Image, ImageDraw

from shards.manifest import Manifest, ShardEntry, read_manifest
from shards.mp4 import decode, open_decoder, read_video_track
from shards.reader import RawClip, ShardReader, find_shard_fault
from shards.schema import FRAME_SIZES, FRAMES_PER_CLIP, WAV_HEADER, BadClip, shard_stem, video_number
from shards.slicing import loudness_dbfs
from shards.storage import file_sha256

MAX_PROBLEMS_PER_SHARD = 20
THUMBNAIL_WIDTH, THUMBNAIL_HEIGHT, WAVE_HEIGHT = 192, 144, 24
"""Pixels of one clip on the contact sheet: its picture and, below, its waveform."""


@dataclass(kw_only=True)
class ShardStatistics:
    """Counts over the clips that were read."""

    num_clips: int = 0
    num_distinct_clips: int = 0
    num_videos: int = 0
    video_bytes: int = 0
    audio_bytes: int = 0
    frame_sizes: Counter[tuple[int, int]] = field(default_factory=Counter)
    source_sizes: Counter[tuple[int, int]] = field(default_factory=Counter)
    labels: Counter[str] = field(default_factory=Counter)
    """Videos by label."""
    seconds_per_video: Counter[int] = field(default_factory=Counter)
    """Videos by number of different seconds."""
    loudness_dbfs: Counter[float] = field(default_factory=Counter)
    """Clips by loudness."""
    source_fps: Counter[float] = field(default_factory=Counter)


@dataclass(kw_only=True)
class CheckResult:
    """What a check found."""

    manifest: Manifest
    problems: list[str]
    """Empty if the folder is what the manifest says."""
    statistics: ShardStatistics


def check_shards(
    folder: str | os.PathLike,
    decode: bool = False,
    on_shard: Callable[[ShardEntry], None] | None = None,
) -> CheckResult:
    """Compare every shard with the manifest, every member with its checksum, and slots with each other.

    Args:
        decode: decode the video of every clip, too (checksums already tell that it is what was decoded when
            written).
        on_shard: called after each shard.

    Raises:
        ValueError: there is no manifest, or it cannot be read.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    problems: list[str] = []
    statistics = ShardStatistics()
    expected = {entry.name for entry in manifest.shards}
    for path in sorted(folder.glob("*.tar")):
        if path.name not in expected:
            problems.append(f"{path.name}: not in the manifest; delete it, or make the shards again")
    clips = _Clips()
    clips_of: dict[int, dict[int, tuple[ShardEntry, slice]]] = {}
    for entry in manifest.shards:
        first = len(clips.videos)
        found = _check_shard(folder, entry, manifest, decode, statistics, clips)
        problems += found[:MAX_PROBLEMS_PER_SHARD]
        if len(found) > MAX_PROBLEMS_PER_SHARD:
            problems.append(f"{entry.name}: {len(found) - MAX_PROBLEMS_PER_SHARD} more problems")
        clips_of.setdefault(entry.index, {})[entry.slot] = entry, slice(first, len(clips.videos))
        if on_shard is not None:
            on_shard(entry)
    problems += _check_slots(folder, manifest, clips_of, np.asarray(clips.videos))
    clips.count(statistics)
    for name, value in (
        ("num_clips", statistics.num_clips),
        ("num_videos", statistics.num_videos),
        ("num_distinct_clips", statistics.num_distinct_clips),
        ("num_bytes", sum(entry.bytes for entry in manifest.shards)),
    ):
        if getattr(manifest, name) != value:
            problems.append(f"manifest.json: {name} is {getattr(manifest, name)}, the shards have {value}")
    return CheckResult(manifest=manifest, problems=problems, statistics=statistics)


class _Clips:
    """What is kept of each clip that is read, in this order. A folder may have tens of millions."""

    def __init__(self) -> None:
        self.videos = array("Q")
        """Numbers of the videos."""
        self.starts = array("d")
        """Seconds."""
        self.labels = array("I")
        """Places of the labels in `label_numbers`."""
        self.label_numbers: dict[str | None, int] = {}

    def add(self, clip: RawClip) -> None:
        self.videos.append(video_number(clip.info.video_id))
        self.starts.append(clip.info.start_seconds)
        self.labels.append(self.label_numbers.setdefault(clip.info.label, len(self.label_numbers)))

    def count(self, statistics: ShardStatistics) -> None:
        """Set what depends on all clips of a video."""
        videos, starts = np.asarray(self.videos), np.asarray(self.starts)
        order = np.lexsort((starts, videos))
        videos, starts = videos[order], starts[order]
        first = np.ones(len(videos), bool)  # of its video
        first[1:] = videos[1:] != videos[:-1]
        different = first.copy()
        different[1:] |= starts[1:] != starts[:-1]
        groups = np.flatnonzero(first)
        num_seconds = np.add.reduceat(different, groups, dtype=np.int64)
        statistics.num_videos = len(groups)
        statistics.num_distinct_clips = int(num_seconds.sum())
        statistics.seconds_per_video = Counter(num_seconds.tolist())
        last = np.maximum.reduceat(order, groups)
        counts = np.bincount(np.asarray(self.labels)[last], minlength=len(self.label_numbers)).tolist()
        statistics.labels = Counter(
            {label: count for label, count in zip(self.label_numbers, counts) if label is not None and count}
        )


def _check_shard(
    folder: Path,
    entry: ShardEntry,
    manifest: Manifest,
    decode: bool,
    statistics: ShardStatistics,
    clips: _Clips,
) -> list[str]:
    """Problems of one shard; adds its clips to `statistics` and `clips`."""
    found: list[str] = []
    path = folder / entry.name

    def problem(text: str) -> None:
        found.append(f"{entry.name}: {text}")

    if path.stem != shard_stem(manifest.split, entry.slot, entry.index):
        problem(f"name does not fit split {manifest.split!r}, slot {entry.slot}, index {entry.index}")
    fault = find_shard_fault(path, entry.num_clips, entry.bytes)
    if fault is not None:
        problem(fault)
    elif file_sha256(path) != entry.sha256:
        problem("SHA-256 differs from the manifest; copy it again or make the shards again")
    try:
        reader = ShardReader(path)
    except ValueError as error:
        if fault is None:
            problem(str(error))
        return found
    with reader:
        if len(reader) != entry.num_clips:
            problem(f"{len(reader)} clips by its index, expected {entry.num_clips}")
        stray = reader.find_stray_bytes()
        if stray is not None:
            problem(stray)
        keys = set()
        for position in range(len(reader)):
            try:
                clip = reader.read(position)
            except BadClip as error:
                problem(f"clip {error.key}: {error.reason}")
                continue
            info = clip.info
            if info.key in keys:
                problem(f"clip {info.key}: twice")
            keys.add(info.key)
            if info.slot != entry.slot or not info.key.endswith(f"_{entry.slot:02d}"):
                problem(f"clip {info.key}: of slot {info.slot}, expected {entry.slot}")
            if (info.frame_width, info.frame_height) not in FRAME_SIZES:
                size_text = f"{info.frame_width}x{info.frame_height}"
                problem(f"clip {info.key}: frame size {size_text} is not one of the schema")
            if decode:
                flaw = _find_flaw(clip)
                if flaw is not None:
                    problem(f"clip {info.key}: {flaw}")
                loudness = loudness_dbfs(waveform(clip))
                if abs(loudness - info.loudness_dbfs) > 0.02:
                    problem(f"clip {info.key}: loudness {loudness}, key.json has {info.loudness_dbfs}")
            clips.add(clip)
            statistics.num_clips += 1
            statistics.video_bytes += len(clip.video)
            statistics.audio_bytes += len(clip.audio)
            statistics.frame_sizes[info.frame_width, info.frame_height] += 1
            statistics.source_sizes[info.source_width, info.source_height] += 1
            statistics.loudness_dbfs[info.loudness_dbfs] += 1
            statistics.source_fps[info.source_fps] += 1
    return found


def _find_flaw(clip: RawClip) -> str | None:
    """What is wrong with a clip's pictures for a loader, in words."""
    expected, sizes = (clip.info.frame_width, clip.info.frame_height), []
    try:
        track = read_video_track(clip.video)
        if len(track.samples) != FRAMES_PER_CLIP:
            return f"{len(track.samples)} coded frames, expected {FRAMES_PER_CLIP}"
        for frame in decode(open_decoder(track), clip.video, track):
            sizes.append((frame.width, frame.height))
    except (ValueError, av.error.FFmpegError) as error:
        return f"frame {len(sizes)} does not decode ({error})"
    if sizes != [expected] * FRAMES_PER_CLIP:
        return f"{len(sizes)} frames decode, of sizes {sorted(set(sizes))}, key.json has {expected}"
    return None


def _check_slots(
    folder: Path,
    manifest: Manifest,
    clips_of: dict[int, dict[int, tuple[ShardEntry, slice]]],
    videos: np.ndarray,
) -> list[str]:
    """Every slot has each video once, and equal indices the same videos in the same order.

    Args:
        clips_of: per index and slot, the shard and where the videos of its clips are in `videos`.
    """
    problems = []
    first_shards = []
    for index, by_slot in sorted(clips_of.items()):
        if sorted(by_slot) != list(range(manifest.num_slots)):
            problems.append(f"index {index}: slots {sorted(by_slot)}, expected 0 to {manifest.num_slots - 1}")
        first_shards.append(by_slot[min(by_slot)])
        first = videos[first_shards[-1][1]]
        for slot, (_, place) in sorted(by_slot.items()):
            if not np.array_equal(videos[place], first):
                problems.append(
                    f"index {index}: slot {slot} does not hold the videos of slot {min(by_slot)} in order"
                )
    numbers, counts = np.unique(
        np.concatenate([videos[place] for _, place in first_shards] or [videos]), return_counts=True
    )
    repeated = numbers[counts > 1]
    if len(repeated):
        name = next(
            name
            for entry, place in first_shards
            if np.isin(videos[place], repeated).any()
            for name in _video_ids(folder / entry.name)
            if video_number(name) in repeated
        )
        problems.append(f"{len(repeated)} videos are in a slot more than once, for example {name!r}")
    return problems


def _video_ids(path: Path) -> Iterator[str]:
    """Videos of the clips of a shard, those left out that cannot be read."""
    with ShardReader(path) as reader:
        for position in range(len(reader)):
            try:
                yield reader.read(position).info.video_id
            except BadClip:
                continue


def waveform(clip: RawClip) -> np.ndarray:
    """Samples of `key.wav`, int16."""
    return np.frombuffer(clip.audio[len(WAV_HEADER) :], "<i2")


def spread_clips(
    folder: str | os.PathLike, manifest: Manifest, num_clips: int, slot: int = 0
) -> Iterator[RawClip]:
    """About `num_clips` clips of one slot, evenly spread over it; damaged ones are left out."""
    shards = manifest.slot_shards(slot)
    total = sum(shard.num_clips for shard in shards)
    wanted = (
        [total * number // num_clips for number in range(num_clips)] if total > num_clips else range(total)
    )
    first = 0
    for shard in shards:
        chosen = [place - first for place in wanted if first <= place < first + shard.num_clips]
        first += shard.num_clips
        if not chosen:
            continue
        try:
            reader = ShardReader(Path(folder) / shard.name)
        except ValueError:
            continue
        with reader:
            for position in chosen:
                try:
                    yield reader.read(position)
                except (BadClip, IndexError):
                    continue


def write_contact_sheet(
    path: str | os.PathLike,
    folder: str | os.PathLike,
    manifest: Manifest,
    num_clips: int = 48,
    columns: int = 8,
) -> int:
    """Write a PNG with the middle frame and the waveform of some clips; returns how many.

    Raises:
        ValueError: no clip can be read.
    """
    tiles = [_tile(clip) for clip in spread_clips(folder, manifest, num_clips)]
    if not tiles:
        raise ValueError(f"{folder}: no clip can be read, expected at least one for the contact sheet")
    columns = min(columns, len(tiles))
    rows = -(-len(tiles) // columns)
    height = THUMBNAIL_HEIGHT + WAVE_HEIGHT
    sheet = Image.new("RGB", (columns * (THUMBNAIL_WIDTH + 4) + 4, rows * (height + 4) + 4), "white")
    for number, tile in enumerate(tiles):
        row, column = divmod(number, columns)
        sheet.paste(tile, (4 + column * (THUMBNAIL_WIDTH + 4), 4 + row * (height + 4)))
    sheet.save(path, format="PNG")
    return len(tiles)


def _tile(clip: RawClip) -> Image.Image:
    tile = Image.new("RGB", (THUMBNAIL_WIDTH, THUMBNAIL_HEIGHT + WAVE_HEIGHT), (235, 235, 235))
    picture = middle_frame(clip.video)
    draw = ImageDraw.Draw(tile)
    if picture is None:
        draw.text((8, 8), f"{clip.info.key}\ndoes not decode", fill="red")
    else:
        picture.thumbnail((THUMBNAIL_WIDTH, THUMBNAIL_HEIGHT))
        tile.paste(
            picture, ((THUMBNAIL_WIDTH - picture.width) // 2, (THUMBNAIL_HEIGHT - picture.height) // 2)
        )
    samples = waveform(clip).astype(np.float32)
    whole = len(samples) // THUMBNAIL_WIDTH * THUMBNAIL_WIDTH
    peaks = np.abs(samples[:whole]).reshape(THUMBNAIL_WIDTH, -1).max(1)
    middle = THUMBNAIL_HEIGHT + WAVE_HEIGHT / 2
    for x, peak in enumerate(peaks / 32768 * WAVE_HEIGHT / 2):
        draw.line([(x, middle - peak), (x, middle + peak)], fill=(40, 80, 160))
    return tile


def middle_frame(video: bytes) -> Image.Image | None:
    """Frame 16 of a clip as an RGB picture; None if it does not decode."""
    try:
        track = read_video_track(video)
        for number, frame in enumerate(decode(open_decoder(track), video, track)):
            if number == FRAMES_PER_CLIP // 2:
                return frame.to_image()
    except (ValueError, av.error.FFmpegError):
        pass
    return None
