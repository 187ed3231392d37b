"""Which shards are there and whole, and what is read in place of those that are not.

Slots hold the same videos shard by shard. So a bad shard of one slot is replaced by the shard of the same index
of another slot: every video still comes once per epoch, with another of its seconds.

Shards are files in a local folder, or come from a URL through a `ShardCache`.
"""

import logging
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from loaders.shard_cache import ShardCache
from shards import storage
from shards.manifest import Manifest, ShardEntry
from shards.reader import RawClip, ShardReader, find_shard_fault
from shards.schema import BadClip
from shards.storage import Retry

CHECK_THREADS = 16  # for checks of sizes, which wait for the file system
OPEN_SHARDS = 64  # per process: a file descriptor and an index in memory each
PROGRESS_SECONDS = 10.0  # between two lines about a long check
SHARDS_IN_ERROR = 3  # named in an error
READ_PAUSES = (0.1, 0.5, 2.0)  # seconds before a failed read of a network file system is tried again

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ShardFiles:
    """The tars to read. i counts the shards of a slot that are left: 0 <= i < len(clips_per_shard)."""

    paths: tuple[tuple[str, ...], ...]
    """paths[slot][i]: the tar to read for shard i of a slot, substitutions done; with a cache below its URL."""
    clips_per_shard: tuple[int, ...]
    """Clips of shard i, the same in every slot."""
    substitutions: Mapping[tuple[int, int], int]
    """(slot, i) of a bad shard -> the slot that is read in its place."""
    dropped: tuple[int, ...]
    """ShardEntry.index of the shards that are left out, because too few slots have them."""
    problems: tuple[str, ...]
    """One sentence or two per bad shard: path, value, expected, way out, and what is done about it."""
    cache: ShardCache | None = None
    """Where the tars come through; None: the paths are local files."""
    num_open: int = OPEN_SHARDS
    """Shards that a process keeps open."""

    def epoch_paths(self, slots: Sequence[int], i: int) -> tuple[str, ...]:
        """Tars to read for shard i in an epoch of these slots (`plan.slots_of_epoch`), never one of them twice.

        Each good slot is read itself; a bad one gives way to the next good one, in a circle, that is not read
        already. For a single slot that is paths[slot][i].
        """
        taken = {slot for slot in slots if self._is_good(slot, i)}
        num_slots = len(self.paths)
        found = []
        for slot in slots:
            if not self._is_good(slot, i):
                others = ((slot + distance) % num_slots for distance in range(1, num_slots))
                slot = next(other for other in others if self._is_good(other, i) and other not in taken)
                taken.add(slot)
            found.append(self.paths[slot][i])
        return tuple(found)

    def state(self) -> dict[str, Any]:
        """What the order of clips depends on besides the manifest, JSON-able: to compare on resuming and over
        ranks. Substitutions are not part of it: they change which second of a video is seen, not the order."""
        return {"dropped_shards": list(self.dropped)}

    def _is_good(self, slot: int, i: int) -> bool:
        return (slot, i) not in self.substitutions


def open_shards(
    folder: str | os.PathLike,
    manifest: Manifest,
    verify: Literal["size", "sha256"] = "size",
    *,
    clips_per_video: int = 1,
    max_bad_shard_fraction: float = 0.1,
    cache: ShardCache | None = None,
) -> ShardFiles:
    """The tars of a folder of shards, those that are bad replaced or left out, and each of them said aloud.

    Ranks must come to the same `state()`: where they read different copies, compare it.

    Args:
        folder: holds the tars and their indexes; a URL with a cache.
        manifest: of that folder.
        verify: `size`: size of the tar, head, length and end of the index, and headers of the first and last
            clip (`shards.reader.find_shard_fault`). `sha256`: also the checksum of every tar, for which all of
            it is read, and every line of the index. Either way each member is checked by its own checksum when
            it is read. Of a URL: the sizes of the tars and whether there is an index, by listing the folder.
        clips_per_video: an index that is good in fewer slots than this is left out.
        max_bad_shard_fraction: LoaderConfig.max_bad_shard_fraction.
        cache: brings the shards of a URL.

    Raises:
        SourceError: the URL cannot be listed.
        ValueError: the manifest's slots do not fit each other, more than max_bad_shard_fraction of the shards
            are bad, or none is left.
    """
    if verify not in ("size", "sha256"):
        raise ValueError(f"loader.verify_shards is {verify!r}, expected size or sha256")
    slots = [manifest.slot_shards(slot) for slot in range(manifest.num_slots)]
    layouts = [[(entry.index, entry.num_clips) for entry in entries] for entries in slots]
    if not layouts or not layouts[0] or any(layout != layouts[0] for layout in layouts):
        raise ValueError(f"{folder}: slots do not hold the same videos shard by shard; re-run make_shards")
    entries = [entry for slot_entries in slots for entry in slot_entries]
    folder = os.fspath(folder)
    if cache is None:
        faults = _find_faults(Path(folder), entries, verify)
    else:
        faults = _find_url_faults(folder, entries, cache.config.retry)
    allowed = max_bad_shard_fraction * len(entries)
    if len(faults) > allowed:
        first = "\n  ".join(list(faults.values())[:SHARDS_IN_ERROR])
        more = len(faults) - SHARDS_IN_ERROR
        raise ValueError(
            f"{len(faults)} of {len(entries)} shards of {folder} are bad, expected at most "
            f"{max_bad_shard_fraction:.0%} (loader.max_bad_shard_fraction):\n  {first}"
            + (f"\n  and {more} more; tools/check_shards.py lists them" if more > 0 else "")
        )
    return replace(_replace_bad(folder, slots, faults, clips_per_video), cache=cache)


def _replace_bad(
    folder: str,
    slots: list[tuple[ShardEntry, ...]],
    faults: dict[str, str],
    clips_per_video: int,
) -> ShardFiles:
    """ShardFiles of a manifest's slots, given what is wrong with some of their tars, by name."""
    num_slots = len(slots)
    paths: list[list[str]] = [[] for _ in slots]
    clips_per_shard, dropped, problems = [], [], []
    substitutions: dict[tuple[int, int], int] = {}
    for column in zip(*slots):  # the shards of one index
        good = [slot for slot, entry in enumerate(column) if entry.name not in faults]
        num_needed = max(1, min(clips_per_video, num_slots))
        is_dropped = len(good) < num_needed
        for slot, entry in enumerate(column):
            source = slot
            if entry.name in faults:
                if is_dropped:
                    outcome = (
                        f"its {entry.num_clips} videos are left out: they are good in {len(good)} of {num_slots} "
                        f"slots, expected {num_needed}"
                    )
                else:
                    source = min(good, key=lambda other: (other - slot) % num_slots)
                    substitutions[slot, len(clips_per_shard)] = source
                    outcome = f"{column[source].name} is read in its place"
                problems.append(f"{faults[entry.name]}. Until then {outcome}")
            if not is_dropped:
                paths[slot].append(f"{folder.rstrip('/')}/{column[source].name}")
        if is_dropped:
            dropped.append(column[0].index)
        else:
            clips_per_shard.append(column[0].num_clips)
    for problem in problems:
        log.warning("%s", problem)
    if not clips_per_shard:
        raise ValueError(
            f"{folder}: no shard is left, expected at least one index that {clips_per_video} slots have: "
            f"{problems[0]}"
        )
    if dropped:
        num_lost = sum(entry.num_clips for entry in slots[0] if entry.index in dropped)
        log.warning(
            "%d of %d videos are left out with shards %s of %s; copy them again and start a new run to have them",
            num_lost, sum(entry.num_clips for entry in slots[0]), dropped, folder,
        )  # fmt: skip
    return ShardFiles(
        paths=tuple(tuple(slot_paths) for slot_paths in paths),
        clips_per_shard=tuple(clips_per_shard),
        substitutions=substitutions,
        dropped=tuple(dropped),
        problems=tuple(problems),
    )


def _find_faults(folder: Path, entries: list[ShardEntry], verify: str) -> dict[str, str]:
    """Name of a tar -> what is wrong with it, in the order of entries; those that are good are not in it."""
    find = _find_any_fault if verify == "sha256" else _find_cheap_fault
    num_threads = (os.cpu_count() or 1) if verify == "sha256" else CHECK_THREADS
    total_bytes, done_bytes, num_done = sum(entry.bytes for entry in entries), 0, 0
    faults: dict[str, str] = {}
    begin = last = time.monotonic()
    with ThreadPoolExecutor(num_threads, thread_name_prefix="check-shards") as pool:
        pending = {pool.submit(find, folder, entry): entry for entry in entries}
        try:
            for future in as_completed(pending):
                entry, fault = pending[future], future.result()
                if fault is not None:
                    faults[entry.name] = fault
                num_done, done_bytes = num_done + 1, done_bytes + entry.bytes
                if time.monotonic() - last > PROGRESS_SECONDS:
                    last = time.monotonic()
                    log.info(
                        "checked %d of %d shards (%.1f of %.1f GB, %.0f s), %d bad",
                        num_done, len(entries), done_bytes / 1e9, total_bytes / 1e9, last - begin, len(faults),
                    )  # fmt: skip
        finally:
            pool.shutdown(wait=False, cancel_futures=True)  # Ctrl-C does not wait for what has not begun
    return {entry.name: faults[entry.name] for entry in entries if entry.name in faults}


def _find_url_faults(url: str, entries: list[ShardEntry], retry: Retry) -> dict[str, str]:
    """Name of a tar behind a URL -> what is wrong with it, as far as a listing tells."""
    again = "copy it there again or re-run make_shards"
    is_listed = not url.startswith(
        ("http://", "https://")
    )  # where an index page tells no sizes, if there is one
    sizes = storage.list_sizes(url, retry) if is_listed else {}

    def find(entry: ShardEntry) -> str | None:
        for name in (entry.name, os.path.splitext(entry.name)[0] + ".idx"):
            location = storage.join(url, name)
            if is_listed:
                is_there, size = name in sizes, sizes.get(name)
            else:
                size = storage.size(location, retry)
                is_there = size is not None or storage.exists(location, retry)
            if not is_there:
                return f"{location} is missing; {again}"
            if name == entry.name and size not in (None, entry.bytes):
                return f"{location} has {size} bytes, expected {entry.bytes} bytes by its manifest; {again}"
        return None

    with ThreadPoolExecutor(CHECK_THREADS, thread_name_prefix="check-shards") as pool:
        try:
            faults = list(pool.map(find, entries))
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
    return {entry.name: fault for entry, fault in zip(entries, faults) if fault is not None}


def _find_cheap_fault(folder: Path, entry: ShardEntry) -> str | None:
    return find_shard_fault(folder / entry.name, entry.num_clips, entry.bytes)


def _find_any_fault(folder: Path, entry: ShardEntry) -> str | None:
    path = folder / entry.name
    fault = find_shard_fault(path, entry.num_clips, entry.bytes)
    if fault is not None:
        return fault
    try:
        ShardReader(path).close()  # every line of the index
        digest = storage.file_sha256(path)
    except ValueError as error:
        return str(error)
    except OSError as error:
        return f"{path} cannot be read ({error}); copy it again or re-run make_shards"
    if digest != entry.sha256:
        return (
            f"{path} has SHA-256 {digest[:12]}..., expected {entry.sha256[:12]}... by its manifest; copy it again "
            f"or re-run make_shards"
        )
    return None


class OpenShards:
    """Clips by position, from shards that are opened when they are first needed. Can be shared by threads, and
    pickled: what is open stays here."""

    def __init__(self, files: ShardFiles) -> None:
        self._files = files
        self._readers: OrderedDict[str, ShardReader] = OrderedDict()
        self._bad: dict[str, str] = {}  # tars that were downloaded in vain, and why
        self._lock = threading.Lock()

    def name(self, slots: tuple[int, ...], part: int, shard: int, position: int) -> tuple[str, str]:
        """(key, file name of the tar) of a clip; the key is made up where the shard cannot be opened.

        Raises:
            SourceError, OSError: as `read`.
        """
        path = self._files.epoch_paths(slots, shard)[part]
        try:
            return self._opened(path).key(position), os.path.basename(path)
        except (BadClip, IndexError):
            return f"{os.path.basename(path)}#{position}", os.path.basename(path)

    def read(self, slots: tuple[int, ...], part: int, shard: int, position: int) -> RawClip:
        """One clip of an epoch of these slots.

        Args:
            slots: slots of the epoch.
            part: which of them.
            shard: index of the shard in its slot.
            position: of the clip in the shard.

        Raises:
            BadClip: as `ShardReader.read`; `bad-shard` where the shard cannot be opened any more, or does not have
                this clip; `read-error` where the file system fails, and goes on failing.
            SourceError: the shard's URL cannot be read.
            OSError: the cache cannot be written to.
        """
        path = self._files.epoch_paths(slots, shard)[part]
        name = f"{os.path.basename(path)}#{position}", os.path.basename(path)
        for pause in (*READ_PAUSES, None):
            reader = self._opened(path, position)
            if position >= len(reader):
                raise BadClip(*name, "bad-shard")
            try:
                return reader.read(position)
            except OSError as error:
                self._forget(path, reader)  # a stale handle stays stale
                if pause is None or not storage.is_transient(error):
                    raise BadClip(*name, "read-error") from error
                log.warning("%s: clip %d cannot be read (%s); again in %g s", path, position, error, pause)
            time.sleep(pause)
        raise AssertionError("unreachable")

    def close(self) -> None:
        """Close what is open, and end downloads that are under way."""
        with self._lock:
            self._readers.clear()
        if self._files.cache is not None:
            self._files.cache.close()

    def _opened(self, path: str, position: int = 0) -> ShardReader:
        """Reader of a shard, the last used of which stay open. BadClip if it cannot be opened."""
        with self._lock:
            reader = self._readers.get(path)
            if reader is not None:
                self._readers.move_to_end(path)
                return reader
        # Without the lock: others go on reading while this one is brought.
        reader = self._open(path, position)
        with self._lock:
            reader = self._readers.setdefault(path, reader)
            self._readers.move_to_end(path)
            if len(self._readers) > self._files.num_open:
                self._readers.popitem(last=False)  # closed when no thread reads from it any more
            return reader

    def _open(self, path: str, position: int) -> ShardReader:
        bad = BadClip(f"{os.path.basename(path)}#{position}", os.path.basename(path), "bad-shard")
        if self._files.cache is not None:
            if path in self._bad:
                raise bad
            try:
                return self._files.cache.open(os.path.basename(path))
            except ValueError as error:
                self._bad[path] = str(error)
                log.warning("%s; its clips are left out", error)
                raise bad from error
        for pause in (*READ_PAUSES, None):
            try:
                return ShardReader(path)
            except ValueError as error:
                raise bad from error
            except OSError as error:
                if pause is None or not storage.is_transient(error):
                    raise bad from error
                log.warning("%s cannot be opened (%s); again in %g s", path, error, pause)
            time.sleep(pause)
        raise AssertionError("unreachable")

    def _forget(self, path: str, reader: ShardReader) -> None:
        with self._lock:
            if self._readers.get(path) is reader:
                del self._readers[path]

    def __getstate__(self) -> dict[str, Any]:
        return {"files": self._files}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["files"])
