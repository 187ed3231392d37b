"""Index of a folder of original videos: what has to be known of each to read any second of it, without decoding.

Times are seconds on a video's presentation clock, which starts with the container, as in ClipInfo. Which streams
are taken, where they start and which videos are left out is as for shards (`shards.slicing.probe_video`).
"""

import hashlib
import json
import logging
import math
import os
import struct
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import av
import av.logging

from shards.manifest import write_atomically
from shards.media import SourceLimits, Unusable, bounded_memory, open_media
from shards.pool import Lost, run_jobs, usable_cores, without_main_module
from shards.schema import CLIP_SECONDS, FPS
from shards.slicing import HALF_FRAME_SECONDS, TIME_SLACK_SECONDS, is_cut_already, probe_video
from shards.sources import Needs, SourceVideo, videos_of_folder, videos_of_kinetics, videos_of_list

INDEX_VERSION = 3
INDEX_SECONDS = 120.0
"""Reading one video for the index may take so long; then it is left out (`timeout`)."""
SAVE_SECONDS = 60.0
"""While an index is made, what is known is saved this often: a run that is stopped goes on where it was."""
LIMITS = SourceLimits()
"""On what a file may ask of the machine."""
MPEG4_LEAST_BYTES = 20
"""Packets of MPEG-4 (part 2) that are smaller hold no picture of their own; libavcodec draws the line there, too."""

log = logging.getLogger(__name__)
av.logging.set_level(av.logging.PANIC)  # libav prints what it finds odd; here that gives a reason or is right


@dataclass(frozen=True, kw_only=True, slots=True)
class IndexedVideo:
    """What is known of one video without decoding it. Times are seconds on its presentation clock, which starts
    with the container, as in ClipInfo."""

    video_id: str
    """Path relative to the folder of videos, with `/`; surrogate escapes where it is not UTF-8."""
    key_hash: str
    """First part of its clips' keys."""
    label: str | None
    num_bytes: int
    """Size of the file."""
    start_seconds: float
    """From here on all streams that are used are there."""
    duration_seconds: float
    """How long they are, from `start_seconds` on."""
    width: int
    """Pixels of the picture in display orientation; this and the like are 0 where no picture is used."""
    height: int
    pixel_aspect: float
    """Width / height of a pixel, in display orientation."""
    rotation: int
    """Quarter turns counter-clockwise from the stored to the displayed picture, 0 to 3."""
    mirrored: bool
    """Whether the stored picture is mirrored left to right before it is turned."""
    fps: float
    """Average frame rate; 0 if the file does not tell."""
    num_frames: int
    """Pictures that are shown from `start_seconds` on."""
    video_stream: int | None
    """Number of the stream in the file; None: no picture is used."""
    audio_stream: int | None
    """None: no sound is used."""
    video_end_seconds: float
    """When the last picture ends."""
    audio_start_seconds: float
    """When the first sound starts, by the packets' times."""
    longest_frame_seconds: float | None
    """Longest time from one picture to the next; None if not all packets tell their time."""
    keyframe_seconds: tuple[float, ...]
    """When the key frames are shown, ascending; not empty if the picture is used."""

    @property
    def frame_size(self) -> tuple[int, int]:
        """(width, height) of the displayed picture with square pixels: what `scaled_size` is to be asked with."""
        return max(round(self.width * self.pixel_aspect), 1), self.height

    @property
    def end_seconds(self) -> float:
        """Until then all streams that are used are there."""
        return self.start_seconds + self.duration_seconds


@dataclass(frozen=True, kw_only=True)
class VideoIndex:
    """The videos of a folder that give clips, and those that do not."""

    folder: str
    """As given."""
    videos: tuple[IndexedVideo, ...]
    """Sorted by id. A video's position is its place here."""
    skipped: tuple[tuple[str, str], ...]
    """(video_id, reason) of the others: `missing`, `unreadable`, `undecodable`, `no-video`, `no-audio`,
    `no-samples`, `too-short`, `timeout`, `crash`, `memory`, `outside-window` (`SourceVideo.window`), and what
    `shards.media.open_media` refuses."""

    @property
    def digest(self) -> str:
        """SHA-256 over what the clips depend on, hex digits: the same wherever the folder lies."""
        return hashlib.sha256(self.to_json()).hexdigest()

    def path(self, position: int) -> str:
        """Where the file of a video is."""
        return os.path.join(self.folder, self.videos[position].video_id)

    def to_json(self) -> bytes:
        """Canonical bytes, without `folder`: sorted keys, ASCII."""
        record = {
            "version": INDEX_VERSION,
            "videos": [asdict(video) for video in self.videos],
            "skipped": self.skipped,
        }
        return json.dumps(record, sort_keys=True, separators=(",", ":"), allow_nan=False).encode("ascii")


def index_videos(
    folder: str | os.PathLike,
    *,
    list_file: str | None = None,
    csv_file: str | None = None,
    split: str = "train",
    cache: str | os.PathLike | None = None,
    workers: int | None = None,
    timeout_seconds: float = INDEX_SECONDS,
) -> VideoIndex:
    """Index of the videos of a folder, of a list, or of a Kinetics csv (see `shards.sources`).

    Each file is read once from end to end, without decoding more than its first picture; what was found is kept
    in `cache` and used again while size and time of change of a file stay the same. Nothing is written to
    `folder`. A damaged file costs that file only, and so does one that hangs or kills its process.

    Args:
        folder: of the videos.
        list_file: one path per line; None: not from a list.
        csv_file: Kinetics csv; None: not from a csv.
        split: which rows of the csv.
        cache: the file to keep the index in; None: `default_cache(folder)`. What cannot be written is not
            kept, aloud.
        workers: processes; None: one per core. 0: read in this one, without a watch on time and crashes.
        timeout_seconds: for one file.

    Raises:
        ValueError: nothing to read, or no video that gives clips.
    """
    folder = os.fspath(folder)
    if list_file is not None and csv_file is not None:
        raise ValueError(f"both a list ({list_file}) and a csv ({csv_file}) are given, expected at most one")
    if csv_file is not None:
        sources = videos_of_kinetics(folder, csv_file, split)
    elif list_file is not None:
        sources, _ = videos_of_list(folder, list_file)
    else:
        sources = videos_of_folder(folder)
    return index_files(
        folder,
        sources,
        min_seconds=lambda video: CLIP_SECONDS,
        cache=cache,
        workers=workers,
        timeout_seconds=timeout_seconds,
    )


def index_files(
    folder: str | os.PathLike,
    sources: Sequence[SourceVideo],
    *,
    needs: Needs = "both",
    min_seconds: Callable[[IndexedVideo], float],
    cache: str | os.PathLike | None = None,
    workers: int | None = None,
    timeout_seconds: float = INDEX_SECONDS,
    allow_none: bool = False,
) -> VideoIndex:
    """Index of the files named; see `index_videos`.

    Args:
        folder: that the files lie in.
        sources: the files, `path` below `folder`.
        needs: which streams are used; a file without them is left out, and others are not looked at.
        min_seconds: how long a file has to be; shorter ones are left out (`too-short`).
        cache: as for `index_videos`.
        workers: as for `index_videos`.
        timeout_seconds: as for `index_videos`.
        allow_none: an index without videos is returned where no file gives clips.

    Raises:
        ValueError: no file gives clips.
    """
    folder = os.fspath(folder)
    cache_path = Path(cache) if cache is not None else default_cache(folder, needs)
    known = _Cache(cache_path, folder, needs)
    stamps = {source.video_id: _stamp(source) for source in sources}
    todo = [source for source in sources if known.get(source.video_id, stamps[source.video_id]) is None]
    results: dict[str, dict[str, Any]] = {}
    if todo:
        log.info("indexing %d of %d files of %s", len(todo), len(sources), folder)
        workers = min(usable_cores() if workers is None else workers, len(todo))
        for source, result in _scan_all(todo, needs, workers, timeout_seconds):
            stamp = stamps[source.video_id]
            results[source.video_id] = result
            # What may be another thing next time is not kept.
            if stamp is not None and result.get("reason") not in (
                "missing",
                "unreadable",
                "timeout",
                "crash",
            ):
                known.put(source.video_id, stamp, result)
        known.save()
    videos, skipped = [], []
    for source in sources:
        result = results.get(source.video_id) or known.get(source.video_id, stamps[source.video_id])
        assert result is not None
        if "reason" in result:
            skipped.append((source.video_id, result["reason"]))
            continue
        video = _indexed(source, result)
        if source.window is not None and not is_cut_already(video.end_seconds, source.window):
            video = _inside_window(video, source.window)
            if video.duration_seconds <= 0:
                skipped.append((source.video_id, "outside-window"))
                continue
        if video.start_seconds + video.duration_seconds > LIMITS.max_hours * 3600:
            skipped.append((source.video_id, "too-long"))  # its packets are that far apart
        elif video.duration_seconds < min_seconds(video):
            skipped.append((source.video_id, "too-short"))
        else:
            videos.append(video)
    if not videos and not allow_none:
        reasons = ", ".join(f"{reason} {count}" for reason, count in Counter(r for _, r in skipped).items())
        streams = {"both": "picture and sound", "video": "picture", "audio": "sound"}[needs]
        raise ValueError(
            f"none of the {len(skipped)} videos of {folder} gives a clip ({reasons}), expected at least one with "
            f"{streams}, as long as a clip"
        )
    if skipped:
        counts = Counter(reason for _, reason in skipped).most_common()
        log.warning(
            "%s: %d of %d videos give no clips (%s)",
            folder, len(skipped), len(sources), ", ".join(f"{reason} {count}" for reason, count in counts),
        )  # fmt: skip
    return VideoIndex(folder=folder, videos=tuple(videos), skipped=tuple(skipped))


def default_cache(folder: str | os.PathLike, needs: Needs = "both") -> Path:
    """`$XDG_CACHE_HOME/cmac/videos-<hash of the folder's path>.json`; ~/.cache where the variable is not set.

    With other needs than both streams their name is in place of `videos`.
    """
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    name = hashlib.blake2b(os.fsencode(os.path.realpath(folder)), digest_size=8).hexdigest()
    kind = "videos" if needs == "both" else needs
    return Path(base) / "cmac" / f"{kind}-{name}.json"


class _Cache:
    """What is known of the files of a folder, by id: (size, time of change) and what was found."""

    def __init__(self, path: Path, folder: str, needs: Needs) -> None:
        self._path = path
        self._needs = needs
        self._folder = os.path.realpath(folder)
        self._files: dict[str, dict[str, Any]] = {}
        self._saved = time.monotonic()
        try:
            record = json.loads(path.read_bytes())
            made_for = record["version"], record["folder"], record["needs"]
            if made_for == (INDEX_VERSION, self._folder, needs):
                self._files = dict(record["files"])
        except FileNotFoundError:
            pass
        except (OSError, ValueError, KeyError, TypeError) as error:
            log.warning("%s is no index of videos (%s); it will be replaced", path, error)

    def get(self, video_id: str, stamp: tuple[int, int] | None) -> dict[str, Any] | None:
        """What was found in a file when its size and time of change were `stamp`; None: not known."""
        entry = self._files.get(video_id)
        if entry is None or stamp is None or entry.get("stamp") != list(stamp):
            return None
        result = entry.get("result")
        complete = isinstance(result, dict) and ("reason" in result or set(_FOUND) <= set(result))
        return result if complete else None

    def put(self, video_id: str, stamp: tuple[int, int], result: dict[str, Any]) -> None:
        self._files[video_id] = {"stamp": list(stamp), "result": result}
        if time.monotonic() - self._saved > SAVE_SECONDS:
            self.save()

    def save(self) -> None:
        record = {
            "version": INDEX_VERSION,
            "folder": self._folder,
            "needs": self._needs,
            "files": self._files,
        }
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(self._path, json.dumps(record, separators=(",", ":")).encode("ascii"))
        except OSError as error:
            log.warning(
                "%s cannot be written (%s); the videos will be read again next time", self._path, error
            )
        self._saved = time.monotonic()


def _stamp(source: SourceVideo) -> tuple[int, int] | None:
    """(size, time of change in ns) of a file; None if it is not there."""
    try:
        status = os.stat(source.path) if source.path is not None else None
    except OSError:
        return None
    return None if status is None else (status.st_size, status.st_mtime_ns)


def _scan_all(
    sources: list[SourceVideo], needs: Needs, workers: int, timeout_seconds: float
) -> Iterator[tuple[SourceVideo, dict[str, Any]]]:
    """(video, what was found) in the order in which they are done."""
    if workers == 0:
        for source in sources:
            yield source, scan_video(source.path, needs)
        return
    remaining = iter(sources)
    by_id = {source.video_id: source for source in sources}

    def next_job() -> tuple[str, str | None, Needs] | None:
        source = next(remaining, None)
        return None if source is None else (source.video_id, source.path, needs)

    with without_main_module():
        for (video_id, *_), outcome in run_jobs(_scan_job, next_job, workers, timeout_seconds):
            yield by_id[video_id], {"reason": outcome.reason} if isinstance(outcome, Lost) else outcome


def _scan_job(job: tuple[str, str | None, Needs]) -> dict[str, Any]:
    """Runs in a worker process."""
    with bounded_memory(LIMITS.max_memory_bytes):
        return scan_video(*job[1:])


def _indexed(source: SourceVideo, found: dict[str, Any]) -> IndexedVideo:
    values = {name: found[name] for name in _FOUND}
    values["keyframe_seconds"] = tuple(values["keyframe_seconds"])
    return IndexedVideo(video_id=source.video_id, key_hash=source.key_hash, label=source.label, **values)


def _inside_window(video: IndexedVideo, window: tuple[float, float]) -> IndexedVideo:
    """A video of which only what is in a window is used; its length is 0 or less where they do not meet."""
    start = max(video.start_seconds, window[0])
    end = min(video.end_seconds, window[1])
    share = max(end - start, 0.0) / max(video.duration_seconds, 1e-6)
    return replace(
        video,
        start_seconds=round(start, 6),
        duration_seconds=math.floor((end - start) * 1e6) / 1e6,
        num_frames=math.floor(video.num_frames * min(share, 1.0)),
    )


_FOUND = [field.name for field in fields(IndexedVideo) if field.name not in ("video_id", "key_hash", "label")]
"""Fields that come from the file itself."""


def scan_video(path: str | None, needs: Needs = "both") -> dict[str, Any]:
    """What the packets of a video tell: the fields of IndexedVideo but id, hash and label; or {"reason": why it
    gives no clips}. Raises nothing for what is in the file."""
    if path is None or not os.path.lexists(path):
        return {"reason": "missing"}
    if not os.path.isfile(path) or not os.access(path, os.R_OK):
        return {"reason": "unreadable"}
    try:
        return _scan(path, needs)
    except Unusable as error:
        return {"reason": error.reason}
    except MemoryError:
        return {"reason": "memory"}
    except (av.error.FFmpegError, OSError, ValueError, IndexError, ArithmeticError):
        return {"reason": "undecodable"}


def _scan(path: str, needs: Needs) -> dict[str, Any]:
    probe = probe_video(path, needs, LIMITS)
    with open_media(path, LIMITS) as container:
        origin = origin_seconds(container)
        indices = [index for index in (probe.video_stream, probe.audio_stream) if index is not None]
        streams = [container.streams[index] for index in indices]
        for stream in streams:
            stream.codec_context.thread_type = "NONE"
        times, keyframes, first = [], [], None
        untimed = by_dts = lacks_times(container)
        video_end, audio_start, audio_end = -math.inf, math.inf, -math.inf
        frame_seconds = 1 / probe.fps if probe.fps > 0 else 1 / FPS
        for packet in read_packets(container, *streams):
            ticks = packet.pts if packet.pts is not None else packet.dts
            if ticks is None or packet.time_base is None:
                untimed = untimed or packet.stream_index == probe.video_stream
                continue
            begin = float(ticks * packet.time_base) - origin
            end = begin + float((packet.duration or 0) * packet.time_base)
            if packet.stream_index == probe.audio_stream:
                audio_start, audio_end = min(audio_start, begin), max(audio_end, end)
                continue
            if first is None:
                first = _first_picture(packet)
            if packet.is_keyframe and not is_placeholder(packet):
                # A search looks for the time of decoding, which without presentation times is all that is there.
                ticks = packet.dts if by_dts and packet.dts is not None else ticks
                keyframes.append(float(ticks * packet.time_base) - origin)
            if not packet.is_discard:
                untimed = untimed or packet.pts is None
                times.append(begin)
                video_end = max(video_end, end if packet.duration else begin + frame_seconds)
    ends = []
    if needs != "audio":
        if not times or not keyframes or first is None:
            raise Unusable("undecodable")
        ends.append(video_end + HALF_FRAME_SECONDS)
    if needs != "video":
        if audio_end < audio_start:
            raise Unusable("no-samples" if needs == "audio" else "too-short")
        ends.append(audio_end + TIME_SLACK_SECONDS)
    start = probe.start_seconds
    if first is not None and by_dts and first.dts is not None:
        # Decoders that put pictures in order give the first one late; what is shown then is what there is.
        start = max(start, float(first.dts * first.time_base) - origin)
    duration = min(ends) - start
    if duration <= 0:
        raise Unusable("too-short")
    times.sort()
    longest = max((later - earlier for earlier, later in zip(times, times[1:])), default=0.0)
    rotation, mirrored = (0, False) if first is None else _orientation(first)
    return {
        "num_bytes": os.path.getsize(path),
        "start_seconds": round(start, 6),
        "duration_seconds": math.floor(duration * 1e6) / 1e6,
        "width": probe.width,
        "height": probe.height,
        "pixel_aspect": round(probe.pixel_aspect, 6),
        "rotation": rotation,
        "mirrored": mirrored,
        "fps": round(probe.fps, 6),
        "num_frames": sum(time > start - frame_seconds / 2 for time in times),
        "video_stream": probe.video_stream,
        "audio_stream": probe.audio_stream,
        "video_end_seconds": round(video_end, 6) if times else 0.0,
        "audio_start_seconds": round(audio_start, 6) if audio_end >= audio_start else 0.0,
        "longest_frame_seconds": None if untimed else round(longest, 6),
        "keyframe_seconds": sorted({round(keyframe, 6) for keyframe in keyframes}),
    }


def is_placeholder(packet: av.Packet) -> bool:
    """Whether a packet holds no picture although it may be called a key frame: DivX and XviD put two pictures into one
    packet of an AVI and an empty one after it. A decoder that starts there gives pictures, but not those of the file.
    """
    return packet.size < MPEG4_LEAST_BYTES and packet.stream.codec_context.name == "mpeg4"


def _first_picture(packet: av.Packet) -> av.VideoFrame | None:
    """The first picture that decodes; None: not from this packet."""
    try:
        for frame in packet.decode():
            return frame
    except av.error.FFmpegError:
        pass
    return None


def _orientation(frame: av.VideoFrame) -> tuple[int, bool]:
    """(quarter turns counter-clockwise, mirrored left to right before that) that a player applies.

    From the display matrix (a b u, c d v, x y w): a stored pixel (x, y) is shown at (ax + cy, bx + dy), y
    downwards. Other angles are taken to the nearest of these.
    """
    data = next((item for item in frame.side_data if item.type.name == "DISPLAYMATRIX"), None)
    if data is None or data.buffer_size < 36:
        return 0, False
    a, b, _, c, d, *_ = struct.unpack("=9i", bytes(data)[:36])
    mirrored = a * d - b * c < 0
    if mirrored:
        a, b = -a, -b
    # What is left is a rotation: the stored x axis (1, 0) is shown along (a, b), counter-clockwise by its angle
    # with y upwards.
    return round(math.atan2(-b, a) / (math.pi / 2)) % 4, mirrored


def origin_seconds(container: av.container.InputContainer) -> float:
    """Seconds that times of packets are to be lowered by."""
    return (container.start_time or 0) / av.time_base


def lacks_times(container: av.container.InputContainer) -> bool:
    """Whether the format has no presentation times: those of its packets are guesses, in the order of decoding."""
    return container.format.name == "avi"


def read_packets(container: av.container.InputContainer, *streams: av.stream.Stream) -> Iterator[av.Packet]:
    """Packets with contents up to the end or to where the container cannot be read any more."""
    packets = container.demux(*streams)
    while True:
        try:
            packet = next(packets)
        except (StopIteration, av.error.FFmpegError):
            return
        if packet.size:
            yield packet
