"""What one clip on disk is: constants, the contents of `key.json`, keys, and the error for a bad clip.

A clip is three adjacent members of a tar file:

- `key.mp4`: H.264, exactly 32 frames at 32 fps, one closed group of pictures without B-frames, 8-bit 4:2:0,
  limited range, BT.601, one of `FRAME_SIZES`;
- `key.wav`: 16-bit PCM, mono, 24 kHz, exactly 24,000 samples;
- `key.json`: `ClipInfo`.
"""

import hashlib
import json
import math
import os
import struct
from dataclasses import asdict, dataclass, fields
from typing import Any

SCHEMA_VERSION = 1
CLIP_SECONDS = 1.0
FPS = 32
FRAMES_PER_CLIP = 32
SAMPLE_RATE = 24_000
"""Hz."""
SAMPLES_PER_CLIP = 24_000
SHORT_SIDE = 144
"""Pixels."""
FRAME_SIZES = ((144, 144), (192, 144), (256, 144), (336, 144), (144, 192), (144, 256))
"""(width, height) that a clip can have. Few, and multiples of 16: hardware decoders are cached by size."""
MEMBER_SUFFIXES = ("mp4", "wav", "json")
"""Order of a clip's members in the tar."""
SILENCE_FLOOR_DBFS = -120.0
"""`loudness_dbfs` of a clip whose samples are all zero (JSON has no minus infinity)."""
WAV_HEADER = struct.pack(
    "<4sI4s4sIHHIIHH4sI",
    b"RIFF", 36 + 2 * SAMPLES_PER_CLIP, b"WAVE",
    b"fmt ", 16, 1, 1, SAMPLE_RATE, 2 * SAMPLE_RATE, 2, 16,
    b"data", 2 * SAMPLES_PER_CLIP,
)  # fmt: skip
"""The 44 bytes that every `key.wav` starts with."""


class BadClip(Exception):
    """One clip cannot be used; the loader counts it by `reason` and never replaces it quietly.

    Reasons: `missing-member`, `stale-index`, `bad-json`, `checksum`, `sample-count`, `frame-count`,
    `frame-size`, `decode-error`; and of a loader `bad-shard`, `read-error`.
    """

    def __init__(self, key: str, shard: str, reason: str) -> None:
        super().__init__(key, shard, reason)
        self.key = key
        self.shard = shard
        self.reason = reason

    def __str__(self) -> str:
        return f"clip {self.key!r} of {self.shard}: {self.reason}"


@dataclass(frozen=True, kw_only=True)
class ClipInfo:
    """Contents of `key.json`."""

    key: str
    """`<12 hex digits of the video>_<slot, two digits>`: unique within a folder of shards."""
    video_id: str
    """Path relative to the folder of videos, with `/`. Bytes that are not UTF-8 are kept as surrogate
    escapes."""
    video_number: int
    """Hash of `video_id`, 0 <= number < 2**63: the same for all clips of a video, in every folder of
    shards."""
    label: str | None
    """Class name, if the input told one."""
    slot: int
    """An epoch reads one slot."""
    start_seconds: float
    """Start of the clip in the source, on its presentation clock counted from the start of the container."""
    end_seconds: float
    """`start_seconds` + 1."""
    source_fps: float
    """Average frame rate of the source."""
    source_width: int
    """Pixels of the source frame in display orientation (rotation applied)."""
    source_height: int
    source_crop: tuple[float, float, float, float]
    """(x, y, width, height): the part of the source frame, in display orientation, that the clip shows.
    Pixels."""
    frame_width: int
    """Pixels of the clip's frames."""
    frame_height: int
    loudness_dbfs: float
    """Root mean square of the waveform in dB relative to full scale (a full-scale square wave is 0)."""
    video_crc32: int
    """`zlib.crc32` of `key.mp4`."""
    audio_crc32: int
    """`zlib.crc32` of `key.wav`."""

    def to_json(self) -> bytes:
        """Canonical bytes: sorted keys, ASCII only, no spaces."""
        text = json.dumps(asdict(self), sort_keys=True, separators=(",", ":"), allow_nan=False)
        return text.encode("ascii")

    @classmethod
    def from_json(cls, data: bytes) -> "ClipInfo":
        """Inverse of `to_json`; fields that a later version added are ignored.

        Raises:
            ValueError: `data` is not the JSON of a clip.
        """
        try:
            record = json.loads(data)
        except (ValueError, RecursionError) as error:  # also numbers of thousands of digits, endless nesting
            raise ValueError(
                f"key.json is not JSON ({error!s:.200}); the shard is damaged, write it again"
            ) from error
        names = [field.name for field in fields(cls)]
        if not isinstance(record, dict) or not set(names) <= set(record):
            missing = sorted(set(names) - set(record)) if isinstance(record, dict) else names
            raise ValueError(f"key.json lacks {', '.join(missing)}; expected schema version {SCHEMA_VERSION}")
        return cls(**{name: _checked(name, record[name]) for name in names})


def _checked(name: str, value: Any) -> Any:
    """`value` in the type of field `name` of `ClipInfo`; ValueError if it has another one."""
    kind = ClipInfo.__dataclass_fields__[name].type
    if kind is str or kind == "str":
        good = _is_text(value)
    elif name == "label":
        good = value is None or _is_text(value)
    elif name == "source_crop":
        good = isinstance(value, list) and len(value) == 4 and all(_is_number(part) for part in value)
        value = tuple(float(part) for part in value) if good else value
    elif kind is int:
        good = isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63
    else:
        good = _is_number(value)
        value = float(value) if good else value
    if not good:
        range_text = ", 0 to 2**63 - 1" if kind is int else ""
        raise ValueError(
            f"key.json: {name} is {value!r:.100}, expected {kind}{range_text}; the shard is damaged, write it again"
        )
    return value


def _is_text(value: Any) -> bool:
    """Whether it is text that stands for bytes: surrogates only as the escapes of what is not UTF-8."""
    if not isinstance(value, str):
        return False
    try:
        value.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        return False
    return True


def _is_number(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # an int beyond the largest float
        return False


def video_hash(video_id: str) -> str:
    """12 hex digits of the video, the first part of its clips' keys. `video_id` may hold surrogate
    escapes."""
    return hashlib.blake2b(_id_bytes(video_id), digest_size=6).hexdigest()


def video_number(video_id: str) -> int:
    """Integer that stands for the video in batches: 0 <= number < 2**63."""
    digest = hashlib.blake2b(_id_bytes(video_id), digest_size=8, person=b"video-number").digest()
    return int.from_bytes(digest, "big") >> 1


def clip_key(hash_digits: str, slot: int) -> str:
    """Key of the clip of a video (`video_hash`) in a slot. Without dots: a dot would start the suffix."""
    return f"{hash_digits}_{slot:02d}"


def _id_bytes(video_id: str) -> bytes:
    return os.fsencode(video_id) if os.sep == "/" else video_id.encode("utf-8", "surrogateescape")


def shard_stem(split: str, slot: int, index: int) -> str:
    """Name of a shard without its suffix, for example `train-slot03-000012`."""
    return f"{split}-slot{slot:02d}-{index:06d}"
