"""What is kept of one video between slicing it and writing its shards: a file in the work area.

Layout: `MAGIC`, length and CRC-32 of the header (8 bytes, little-endian), the header (JSON), then the clips'
bytes.
"""

import json
import os
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shards import storage
from shards.schema import CLIP_SECONDS, ClipInfo, clip_key, video_number
from shards.slicing import SlicedVideo
from shards.sources import SourceVideo

MAGIC = b"CMACVID1"
RESULT_PREFIX = "video-"
_LENGTHS = struct.Struct("<II")


@dataclass(frozen=True, kw_only=True)
class ReportRow:
    """One line of `report.csv`."""

    path: str
    status: str
    """`kept` or `skipped`."""
    reason: str
    """Why it was skipped. A kept video may have `truncated` or `damaged`: its header promises more than is
    there."""
    num_clips: int
    """Different seconds that are kept."""
    seconds: int
    """Whole seconds with both picture and sound, silent ones included, as far as the video was read."""


@dataclass(frozen=True, kw_only=True)
class VideoResult:
    """Header of a result file."""

    row: ReportRow
    common: dict[str, Any]
    """Fields of `ClipInfo` that all clips of the video share."""
    clips: tuple[dict[str, Any], ...]
    """Per clip: start_seconds, loudness_dbfs, video_crc32, audio_crc32, video_bytes, audio_bytes."""
    num_bytes: int
    """Of the clips."""


def write_result(path: Path, source: SourceVideo, sliced: SlicedVideo) -> None:
    """Write `path` and flush it to disk."""
    header = {
        "row": {
            "path": source.video_id,
            "status": "kept" if sliced.clips else "skipped",
            "reason": sliced.reason,
            "num_clips": len(sliced.clips),
            "seconds": sliced.seconds,
        },
        "common": {},
        "clips": [
            {
                "start_seconds": round(clip.start_seconds, 6),
                "loudness_dbfs": clip.loudness_dbfs,
                "video_crc32": clip.video_crc32,
                "audio_crc32": clip.audio_crc32,
                "video_bytes": len(clip.video),
                "audio_bytes": len(clip.audio),
            }
            for clip in sliced.clips
        ],
    }
    if sliced.clips:
        assert sliced.probe is not None
        header["common"] = {
            "video_id": source.video_id,
            "video_number": video_number(source.video_id),
            "label": source.label,
            "source_fps": round(sliced.probe.fps, 6),
            "source_width": sliced.probe.width,
            "source_height": sliced.probe.height,
            "source_crop": sliced.crop,
            "frame_width": sliced.frame_size[0],
            "frame_height": sliced.frame_size[1],
        }
    data = json.dumps(header, separators=(",", ":"), allow_nan=False).encode("ascii")
    with open(path, "wb") as file:
        file.write(MAGIC + _LENGTHS.pack(len(data), zlib.crc32(data)) + data)
        for clip in sliced.clips:
            file.write(clip.video)
            file.write(clip.audio)
        file.flush()
        os.fsync(file.fileno())


def result_location(work: str, number: int) -> str:
    """Where the result of a video is kept; `number` is its place in the random order."""
    return storage.join(work, f"{RESULT_PREFIX}{number:07d}")


def published_row(location: str, video_id: str, folder: str) -> ReportRow | None:
    """Line of the report of a result that is there, whole, and of this video; else None.

    folder: for a temporary copy, if `location` is a URL.
    """
    path = Path(location)
    try:
        if storage.is_url(location):
            if storage.size(location) is None:
                return None
            path = Path(folder) / "published"
            storage.download(location, path, num_bytes=None, sha256=None)
        with ResultFile(path) as file:
            row = file.result.row
            return row if row.path == video_id else None
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None


def publish_result(path: Path, location: str, folder: str) -> ReportRow:
    """Move the result file `path` to `location`, whole or not at all; returns the line of the report.

    A result that is there stays: it is of another attempt, and somebody may have read it. Where two attempts
    differ (one was late, one was not), the first counts, for everybody.
    """
    with ResultFile(path) as file:
        row = file.result.row
    published = published_row(location, row.path, folder)
    if published is not None:
        return published
    if storage.is_url(location):
        storage.upload(path, location)
    else:
        os.replace(path, location)
    return row


class ResultFile:
    """Result of one video, open for reading; raises ValueError if the file is not whole."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = open(path, "rb")
        try:
            head = self._file.read(len(MAGIC) + _LENGTHS.size)
            if not head.startswith(MAGIC) or len(head) < len(MAGIC) + _LENGTHS.size:
                raise ValueError(f"{path} is not a result file")
            length, crc = _LENGTHS.unpack(head[len(MAGIC) :])
            data = self._file.read(length)
            if zlib.crc32(data) != crc:
                raise ValueError(f"{path}: damaged header")
            record = json.loads(data)
            clips = tuple(record["clips"])
            self._offsets = []
            offset = len(head) + length
            for clip in clips:
                self._offsets.append(offset)
                offset += clip["video_bytes"] + clip["audio_bytes"]
            if os.fstat(self._file.fileno()).st_size != offset:
                raise ValueError(f"{path} is cut")
            self.result = VideoResult(
                row=ReportRow(**record["row"]),
                common=record["common"],
                clips=clips,
                num_bytes=offset - len(head) - length,
            )
        except BaseException:
            self._file.close()
            raise

    def clip(self, number: int, slot: int, key_hash: str) -> tuple[ClipInfo, bytes, bytes]:
        """Clip `number` of the video as the one of `slot`: info, mp4, wav."""
        clip = self.result.clips[number]
        data = os.pread(self._file.fileno(), clip["video_bytes"] + clip["audio_bytes"], self._offsets[number])
        video, audio = data[: clip["video_bytes"]], data[clip["video_bytes"] :]
        if (zlib.crc32(video), zlib.crc32(audio)) != (clip["video_crc32"], clip["audio_crc32"]):
            raise OSError(f"{self.path}: damaged; delete it and run the same command again")
        info = ClipInfo(
            key=clip_key(key_hash, slot),
            slot=slot,
            start_seconds=clip["start_seconds"],
            end_seconds=round(clip["start_seconds"] + CLIP_SECONDS, 6),
            loudness_dbfs=clip["loudness_dbfs"],
            video_crc32=clip["video_crc32"],
            audio_crc32=clip["audio_crc32"],
            **{**self.result.common, "source_crop": tuple(self.result.common["source_crop"])},
        )
        return info, video, audio

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> "ResultFile":
        return self

    def __exit__(self, *unused: object) -> None:
        self.close()
