"""`manifest.json`: what a finished folder of shards holds."""

import hashlib
import json
import math
import os
import re
import secrets
import stat
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shards.schema import SCHEMA_VERSION

if TYPE_CHECKING:
    from shards.storage import Retry

MANIFEST_NAME = "manifest.json"
MAX_MANIFEST_BYTES = 1 << 26
"""That of two million videos in ten slots has five million."""
MAX_SHARDS = MAX_MANIFEST_BYTES // 256
"""A shard takes 199 bytes of a manifest, and a few more with a long name of its split."""
MAX_SLOTS = 99
"""A slot is two digits of a clip's key."""
_SHARD_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,250}\.tar")


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


def read_manifest(folder: str | os.PathLike, retry: "Retry | None" = None) -> Manifest:
    """Manifest of a folder of shards, which may be at a URL; retry: how long that is tried.

    Raises:
        ValueError: there is none, or it is of another schema version, or damaged.
    """
    from shards import storage  # which imports this module

    path = storage.join(os.fspath(folder), MANIFEST_NAME)
    try:
        if not storage.is_url(path):
            _check_size(path)
        data = storage.read_bytes(path, retry or storage.DEFAULT_RETRY)
    except FileNotFoundError:
        raise ValueError(
            f"{path} does not exist, expected a folder written by tools/make_shards.py; "
            f"if a run there was interrupted, run the same command again to finish it"
        ) from None
    return parse_manifest(data, path)


def _check_size(path: str) -> None:
    try:
        status = os.stat(path)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}), expected a manifest") from error
    if not stat.S_ISREG(status.st_mode):  # a pipe would block
        raise ValueError(f"{path} is not a plain file, expected a manifest; make the shards again")
    if status.st_size > MAX_MANIFEST_BYTES:
        raise ValueError(
            f"{path} has {status.st_size} bytes, expected at most {MAX_MANIFEST_BYTES}; make the shards again"
        )


def parse_manifest(data: bytes, path: str) -> Manifest:
    """Manifest of the contents of a `manifest.json`. Its shards' names lead nowhere but into their folder.

    Args:
        data: the contents.
        path: for the error.

    Raises:
        ValueError: it is of another schema version, or damaged.
    """
    try:
        record = json.loads(data, object_pairs_hook=_fields_once, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:  # also not UTF-8, and numbers of thousands of digits
        raise ValueError(
            f"{path} is not JSON ({error!s:.200}); delete the folder and make the shards again"
        ) from error
    version = record.get("schema_version") if isinstance(record, dict) else None
    if version != SCHEMA_VERSION or isinstance(version, (bool, float)):
        raise ValueError(
            f"{path} has schema version {version!r:.100}, expected {SCHEMA_VERSION}; make the shards again"
        )
    try:
        known = {item.name for item in fields(Manifest)}
        manifest = Manifest(**{name: value for name, value in record.items() if name in known})
        shards = [ShardEntry(**entry) for entry in manifest.shards]
    except TypeError as error:
        raise ValueError(f"{path} is not a manifest ({error!s:.200}); make the shards again") from error
    manifest = replace(manifest, shards=tuple(shards))
    fault = _type_fault(manifest, "") or _slots_fault(manifest)
    if fault is not None:
        raise ValueError(f"{path}: {fault}; the manifest is damaged, copy it again or make the shards again")
    return manifest


def _fields_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) < len(pairs):
        raise ValueError(f"a field of {str(sorted(record)):.100} twice")
    return record


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


def _type_fault(record: "Manifest | ShardEntry", prefix: str) -> str | None:
    """The first field that is not of its type or out of range, in words."""
    for item in fields(record):
        value, place = getattr(record, item.name), f"{prefix}{item.name}"
        if item.type is int and not (type(value) is int and 0 <= value < 2**63):
            return f"{place} is {value!r:.100}, expected a whole number from 0 on, less than 2**63"
        if item.type is str and not isinstance(value, str):
            return f"{place} is {value!r:.100}, expected text"
        if item.name in ("settings", "skipped") and not _is_plain(value, depth=4):
            return f"{place} is {value!r:.100}, expected an object of names and plain values"
    return None


def _is_plain(value: Any, depth: int) -> bool:
    """Whether it is an object, with text and finite numbers in it, and lists and objects down to a depth."""
    return isinstance(value, dict) and all(_is_plain_value(part, depth) for part in value.values())


def _is_plain_value(value: Any, depth: int) -> bool:
    if isinstance(value, (dict, list)):
        parts = value.values() if isinstance(value, dict) else value
        return depth > 0 and all(_is_plain_value(part, depth - 1) for part in parts)
    return not isinstance(value, float) or math.isfinite(value)  # 1e999 is infinite


def _slots_fault(manifest: Manifest) -> str | None:
    """What is wrong with the shards: names, slots, one of them twice."""
    if not 1 <= manifest.num_slots <= MAX_SLOTS:
        return f"num_slots is {manifest.num_slots}, expected 1 to {MAX_SLOTS}"
    names, places = set(), set()
    for number, shard in enumerate(manifest.shards):
        place = f"shards[{number}]."
        fault = _type_fault(shard, place)
        if fault is not None:
            return fault
        if not _SHARD_NAME.fullmatch(shard.name):
            return (
                f"{place}name is {shard.name!r:.100}, expected the plain name of a tar in the same folder (letters, "
                f"digits, '_', '-' and '.'; a manifest must not name files elsewhere)"
            )
        if shard.slot >= manifest.num_slots:
            return f"{place}slot is {shard.slot}, expected less than num_slots ({manifest.num_slots})"
        if shard.num_clips < 1:
            return f"{place}num_clips is {shard.num_clips}, expected at least 1"
        if shard.name in names or (shard.slot, shard.index) in places:
            return f"{shard.name}, slot {shard.slot}, index {shard.index}: there twice"
        names.add(shard.name)
        places.add((shard.slot, shard.index))
    return None


def write_manifest(folder: str | os.PathLike, manifest: Manifest) -> None:
    """Write `manifest.json` atomically; `folder` may be a URL."""
    from shards import storage  # which imports this module

    storage.write_bytes(storage.join(os.fspath(folder), MANIFEST_NAME), manifest.to_json())


def write_atomically(path: Path, data: bytes) -> None:
    """Replace `path` by `data`: after a crash at any moment, either the old file or the whole new one is
    there."""
    # The process id alone is not unique where several machines share the folder.
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
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
