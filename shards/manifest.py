"""`manifest.json`: what a finished folder of shards holds."""

import hashlib
import json
import os
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from shards.schema import SCHEMA_VERSION

MANIFEST_NAME = "manifest.json"


@dataclass(frozen=True, kw_only=True)
class ShardEntry:
    """One tar file."""

    name: str
    """File name in the folder, for example `train-slot00-000000.tar`; its index has the suffix `.idx`
    instead."""
    slot: int
    index: int
    """Shards of equal `index` hold the same videos in the same order in every slot. Indices may have gaps."""
    num_clips: int
    bytes: int
    """Size of the tar."""
    sha256: str
    """Of the tar, hex digits."""


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """A finished folder of shards.

    Every slot has each kept video exactly once, and shard `index` i holds the same videos in the same order
    in every slot: clip p of `slot00-000003` and clip p of `slot01-000003` are two clips of one video.
    """

    schema_version: int = SCHEMA_VERSION
    split: str
    seed: int
    num_slots: int
    num_videos: int
    """Kept videos = clips per slot."""
    num_clips: int
    """Over all slots: num_videos * num_slots."""
    num_distinct_clips: int
    """Different seconds of video; less than `num_clips` where videos have fewer seconds than there are
    slots."""
    num_bytes: int
    """Of all tar files."""
    settings: dict[str, Any] = field(default_factory=dict)
    """What the bytes depend on, besides the videos and the seed."""
    ffmpeg: str = ""
    """Version of the program that cut the videos."""
    video_list_sha256: str
    """Of the input: ids and labels of all videos, kept or not."""
    skipped: dict[str, int] = field(default_factory=dict)
    """Number of videos left out, by reason."""
    shards: tuple[ShardEntry, ...] = ()
    """Sorted by slot, then index."""

    @property
    def digest(self) -> str:
        """SHA-256 over the whole manifest, hex digits: equal only for byte-identical folders of shards."""
        return hashlib.sha256(self.to_json()).hexdigest()

    def slot_shards(self, slot: int) -> tuple[ShardEntry, ...]:
        """Shards of one slot, by index."""
        return tuple(shard for shard in self.shards if shard.slot == slot)

    def to_json(self) -> bytes:
        """Canonical bytes: sorted keys, ASCII, one line per shard for reading by people."""
        return (json.dumps(asdict(self), sort_keys=True, indent=1, allow_nan=False) + "\n").encode("ascii")


def read_manifest(folder: str | os.PathLike) -> Manifest:
    """Manifest of a folder of shards.

    Raises:
        ValueError: there is none, or it is of another schema version, or damaged.
    """
    path = Path(folder) / MANIFEST_NAME
    try:
        record = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise ValueError(
            f"{path} does not exist, expected a folder written by tools/make_shards.py; "
            f"if a run there was interrupted, run the same command again to finish it"
        ) from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(
            f"{path} is not JSON ({error}); delete the folder and make the shards again"
        ) from error
    version = record.get("schema_version") if isinstance(record, dict) else None
    if version != SCHEMA_VERSION:
        raise ValueError(
            f"{path} has schema version {version}, expected {SCHEMA_VERSION}; make the shards again"
        )
    try:
        shards = tuple(ShardEntry(**entry) for entry in record.pop("shards"))
        known = {item.name for item in fields(Manifest)}
        return Manifest(**{name: value for name, value in record.items() if name in known}, shards=shards)
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a manifest ({error}); make the shards again") from error


def write_manifest(folder: str | os.PathLike, manifest: Manifest) -> Path:
    """Write `manifest.json` atomically; returns its path."""
    path = Path(folder) / MANIFEST_NAME
    write_atomically(path, manifest.to_json())
    return path


def write_atomically(path: Path, data: bytes) -> None:
    """Replace `path` by `data`: after a crash at any moment, either the old file or the whole new one is
    there."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make renames in `folder` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
