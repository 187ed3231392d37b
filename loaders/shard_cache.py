"""Shards from a URL, through a folder on this machine that has a size limit and that all its processes share.

A shard is downloaded when a clip of it is first needed, or a little before, and checked against the manifest. Locks on
files see to it that no two processes download the same one. Over the limit the least recently opened shards are
deleted; whoever has one open reads on from it.
"""

import logging
import math
import os
import re
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from shards import storage
from shards.lock import NO_LOCKS, try_lock
from shards.manifest import ShardEntry
from shards.reader import ShardReader, find_shard_fault
from shards.storage import Retry, SourceError

INDEX_BYTES_PER_CLIP = 256  # more than a line of an index has
ROOM_SECONDS = 0.05  # between two looks for room, while other processes hold all of it
LOCK_SECONDS = 0.02  # between two tries for a lock
FETCH_THREADS = 4  # that bring shards ahead, on each rank
OTHERS_SECONDS = 0.5  # until a shard is looked for again that another process is bringing
FOLDER_DIGITS = 16  # of the manifest's digest, which name the folder of its shards

_FOLDER_NAME = re.compile(rf"[0-9a-f]{{{FOLDER_DIGITS}}}")

log = logging.getLogger(__name__)


def default_cache_dir() -> Path:
    """`$XDG_CACHE_HOME/cmac/shards`, or `~/.cache/cmac/shards`."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "cmac" / "shards"


@dataclass(frozen=True, kw_only=True)
class CacheConfig:
    """Where shards are kept, how many bytes of them, and how long a source is tried."""

    url: str
    """Folder of shards."""
    folder: Path
    """On this machine; other runs may use it too."""
    max_bytes: int
    """Of all shards in it, those on their way included."""
    retry: Retry


class ShardCache:
    """Shards of one URL on local disk. Can be shared by threads, and pickled.

    <folder>/<digits of the manifest's digest>/ holds the tars, their indexes, a lock file for each, and parts of
    what is on its way. A part carries its final size in its name: that much is taken, whatever it has yet.
    """

    def __init__(self, config: CacheConfig, digest: str, entries: Sequence[ShardEntry]) -> None:
        """
        Args:
            config: see there.
            digest: of the manifest: other shards under the same names get another folder.
            entries: all shards of the manifest.

        Raises:
            ValueError: the limit is less than the largest shard, or the file system has no locks.
            OSError: the folder cannot be made.
        """
        self.config = config
        self._entries = {entry.name: entry for entry in entries}
        self._folder = config.folder / digest[:FOLDER_DIGITS]
        largest = max(entries, key=_num_bytes)
        if _num_bytes(largest) > config.max_bytes:
            raise ValueError(
                f"loader.cache_gb is {config.max_bytes / 1e9:g}, expected at least "
                f"{math.ceil(_num_bytes(largest) / 1e3) / 1e6:g}, the size of {largest.name} of {config.url}"
            )
        self._folder.mkdir(parents=True, exist_ok=True)
        with _flock(config.folder / ".lock", wait=False):  # or it is refused now
            pass
        self._stop = threading.Event()

    def close(self) -> None:
        """End the downloads that are under way here, with SourceError. It can be used again."""
        stop, self._stop = self._stop, threading.Event()
        stop.set()

    def num_bytes(self, name: str) -> int:
        """What a shard takes of the limit."""
        return _num_bytes(self._entries[name])

    def open(self, name: str) -> ShardReader:
        """Reader of a shard, which is downloaded if it is not there. Deleting it later does not disturb the reader.

        Raises:
            ValueError: it cannot be had as the manifest has it: it is not there, or was another one twice.
            SourceError: the source could not be read.
            OSError: the cache cannot be written to.
        """
        path = self._folder / name
        reader = self._open_whole(path)
        if reader is not None:
            return reader
        begin, stop = time.monotonic(), self._stop
        while True:
            with self._lock(name) as locked:
                if locked:
                    reader = self._open_whole(path)
                    if reader is not None:
                        return reader
                    # Whoever had the lock may have tried in vain all the while.
                    left = max(0.0, self.config.retry.total_seconds - (time.monotonic() - begin))
                    self._download(name, replace(self.config.retry, total_seconds=left), stop)
                    return ShardReader(path)
            if stop.wait(LOCK_SECONDS):
                raise SourceError(f"{name} was waited for, and what wanted it was closed")

    def fetch(self, name: str) -> bool:
        """Download a shard if it is not there and no other process or thread is at it. Whether it is there.

        Raises:
            ValueError, SourceError, OSError: as `open`.
        """
        path = self._folder / name
        if self._is_whole(path):
            return True
        stop = self._stop
        with self._lock(name) as locked:
            if locked and not self._is_whole(path):
                self._download(name, self.config.retry, stop)
            return locked

    def keep(self, names: Iterable[str]) -> None:
        """Let these be the last that are deleted, in this order, of those that are there."""
        for name in reversed(list(names)):
            try:
                os.utime(self._folder / name)
            except FileNotFoundError:
                pass

    def _open_whole(self, path: Path) -> ShardReader | None:
        """Reader of a shard that is there; None if it is not, or is deleted this moment, or not whole."""
        if not self._is_whole(path):
            return None
        try:
            reader = ShardReader(path)
            os.utime(path)  # the order of deletion
        except (ValueError, FileNotFoundError):
            return None
        return reader

    def _is_whole(self, path: Path) -> bool:
        entry = self._entries[path.name]
        return path.exists() and find_shard_fault(path, entry.num_clips, entry.bytes) is None

    def _download(self, name: str, retry: Retry, stop: threading.Event) -> None:
        """Bring a shard, whose lock is held."""
        entry, path = self._entries[name], self._folder / name
        index = path.with_suffix(".idx")
        for stale in (path, index):
            stale.unlink(missing_ok=True)
        part = self._folder / f".{name}.{_num_bytes(entry)}.part"
        begin, url = time.monotonic(), self.config.url
        index_part = self._folder / f".{index.name}.part"
        try:
            self._make_room(part, _num_bytes(entry), stop)
            # The index first: a tar that is there has one.
            storage.download(
                storage.join(url, index.name), index, retry=retry, temporary=index_part, stop=stop
            )
            storage.download(
                storage.join(url, name), path, num_bytes=entry.bytes, sha256=entry.sha256, retry=retry,
                temporary=part, stop=stop,
            )  # fmt: skip
        except FileNotFoundError as error:
            raise ValueError(f"{error.filename} is not there any more; copy it there again") from error
        except OSError as error:
            if error.errno not in storage.DISK_ERRNOS:
                raise
            raise OSError(
                error.errno,
                f"{os.strerror(error.errno)} for a shard of {entry.bytes / 1e9:.3g} GB in the cache "
                f"(loader.cache_dir), which may take {self.config.max_bytes / 1e9:g} GB (loader.cache_gb); free space "
                f"or lower the limit",
                str(path),
            ) from error
        finally:
            part.unlink(missing_ok=True)
            if not path.exists():
                index.unlink(missing_ok=True)
        fault = find_shard_fault(path, entry.num_clips, entry.bytes)
        if fault is not None:
            for stale in (path, index):
                stale.unlink(missing_ok=True)
            raise ValueError(f"{storage.join(url, index.name)}: {fault}")
        seconds = time.monotonic() - begin
        log.info("%s: %.1f MB in %.1f s", storage.join(url, name), entry.bytes / 1e6, seconds)

    def _make_room(self, part: Path, num_bytes: int, stop: threading.Event) -> None:
        """Delete what was not opened for longest until num_bytes fit in, and take them with an empty part."""
        while True:
            with _flock(self.config.folder / ".lock", wait=True):
                used, shards = self._contents()
                for path, size in shards:
                    if used + num_bytes <= self.config.max_bytes:
                        break
                    if self._evict(path):
                        used -= size
                if used + num_bytes <= self.config.max_bytes:
                    part.touch()
                    return
            # The rest is on its way, or being opened, and will be there to be deleted.
            if stop.wait(ROOM_SECONDS):
                raise SourceError(f"{part.name} waited for room, and what wanted it was closed")

    def _contents(self) -> tuple[int, list[tuple[Path, int]]]:
        """Bytes taken, and the shards that are there with theirs, least recently opened first. Deletes the parts that a
        process left which was killed."""
        used, found = 0, []
        for folder in self.config.folder.iterdir():
            # Nothing else is ours: the user may have named a folder that has shards of his own below it.
            if not _FOLDER_NAME.fullmatch(folder.name) or not folder.is_dir():
                continue
            for path in folder.iterdir():
                try:
                    if path.suffix == ".part":
                        used += self._part_bytes(path)
                    elif path.suffix == ".tar":
                        status, index = path.stat(), path.with_suffix(".idx")
                        size = status.st_size + (index.stat().st_size if index.exists() else 0)
                        used += size
                        found.append((status.st_mtime_ns, path, size))
                except FileNotFoundError:
                    pass  # renamed or deleted this moment
        return used, [(path, size) for _, path, size in sorted(found)]

    def _part_bytes(self, part: Path) -> int:
        """What a part takes; 0, and it is deleted, if nobody is at it."""
        name, _, digits = part.name[1 : -len(".part")].rpartition(".")
        if not digits.isdigit():  # of an index: counted with its tar's
            name, digits = Path(part.name[1 : -len(".part")]).with_suffix(".tar").name, "0"
        with _flock(part.parent / f".{name}.lock", wait=False) as locked:
            if locked:  # left by a process that was killed
                part.unlink(missing_ok=True)
                return 0
        return int(digits)

    def _evict(self, path: Path) -> bool:
        """Delete a shard, unless it is being opened; the tar first, so that none is without an index."""
        with _flock(path.parent / f".{path.name}.lock", wait=False) as locked:
            if locked:
                path.unlink(missing_ok=True)
                path.with_suffix(".idx").unlink(missing_ok=True)
            return locked

    def _lock(self, name: str) -> AbstractContextManager[bool]:
        return _flock(self._folder / f".{name}.lock", wait=False)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_stop"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _stop=threading.Event())


def _num_bytes(entry: ShardEntry) -> int:
    return entry.bytes + INDEX_BYTES_PER_CLIP * entry.num_clips


@contextmanager
def _flock(path: Path, wait: bool) -> Iterator[bool]:
    """Holds the lock of a file, against threads and processes; the system gives it up when a process ends. Yields False
    if another has it and wait is false."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        try:
            locked = try_lock(descriptor, wait=wait)
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            raise ValueError(
                f"loader.cache_dir: {path.parent} cannot be locked ({error.strerror}), expected a file system with "
                f"locks; choose a folder on a disk of this machine"
            ) from error
        yield locked
    finally:
        os.close(descriptor)


@dataclass(frozen=True)
class ComingShard:
    """A shard, and from which batch to which clips of it are read."""

    name: str
    first: tuple[int, int]
    """(epoch, batch)."""
    last: tuple[int, int]


class FetchAhead:
    """Threads that bring shards into a cache before they are needed.

    Errors are not theirs to report: whoever needs the shard meets them himself.
    """

    def __init__(self, cache: ShardCache, coming: Iterator[ComingShard], num_ahead: int) -> None:
        """
        Args:
            cache: where to.
            coming: shards in the order of `first`, without end.
            num_ahead: how many shards are brought beyond those that the batch being made may need; fewer if the cache
                does not hold them together.
        """
        assert num_ahead >= 1
        self._cache = cache
        self._coming = coming
        self._num_ahead = num_ahead
        self._window: list[ComingShard] = []  # from those in use on
        self._position = (0, 0)
        self._done: set[str] = set()  # of the window: there, or not to be had
        self._busy: set[str] = set()
        self._closed = False
        self._changed = threading.Condition()
        for _ in range(min(num_ahead, FETCH_THREADS)):
            threading.Thread(target=self._run, daemon=True, name="shards-ahead").start()

    def move(self, epoch: int, batch: int) -> None:
        """Clips of this batch are read next; the first call starts the work."""
        with self._changed:
            self._position = (epoch, batch)
            for shard in [shard for shard in self._window if shard.last < self._position]:
                self._window.remove(shard)
                self._done.discard(shard.name)
            while not self._window or self._num_beyond() < self._num_ahead:
                self._window.append(next(self._coming))
            self._changed.notify_all()

    def close(self) -> None:
        """End the threads, soon."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _num_beyond(self) -> int:
        return sum(shard.first > self._position for shard in self._window)

    def _next(self) -> str | None:
        """A shard to bring, marked busy; None: there is none now."""
        names: dict[str, None] = {}
        room = self._cache.config.max_bytes
        for shard in self._window:
            if shard.name not in names:
                room -= self._cache.num_bytes(shard.name)
                if room < 0:
                    return None
                names[shard.name] = None
            if shard.name not in self._done and shard.name not in self._busy:
                self._busy.add(shard.name)
                self._cache.keep(names)
                return shard.name
        return None

    def _run(self) -> None:
        while True:
            with self._changed:
                name = None
                while not self._closed and (not self._window or (name := self._next()) is None):
                    self._changed.wait()
                if self._closed:
                    return
            assert name is not None
            pause, done = 0.0, False
            try:
                done = self._cache.fetch(name)
                pause = 0.0 if done else OTHERS_SECONDS
            except ValueError as error:
                done = True  # a bad shard
                log.warning("%s", error)
            except OSError as error:
                pause = self._cache.config.retry.longest_wait
                if not self._closed:
                    log.warning("%s", error)
            if pause:
                with self._changed:
                    self._changed.wait_for(lambda: self._closed, pause)
            with self._changed:
                self._busy.discard(name)
                if done:
                    self._done.add(name)
                self._changed.notify_all()
