"""Files on local disks and behind URLs, through one set of functions that retry what may pass.

A *location* is a local path or a URL `scheme://...` that fsspec knows (s3://, gs://, https://, memory://, ...).
Credentials and endpoints come from where the libraries look for them: AWS_ACCESS_KEY_ID, AWS_ENDPOINT_URL,
GOOGLE_APPLICATION_CREDENTIALS, fsspec's configuration files and FSSPEC_* variables.

What may pass (no connection, timeouts, server errors, no bytes for a while, a network file system's EIO) is tried
again, with waits that grow, and said aloud each time. What stays (not found, forbidden) is not.
"""

import asyncio
import errno
import hashlib
import logging
import os
import random
import re
import secrets
import shutil
import socket
import stat
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote, unquote, urlsplit, urlunsplit

from shards.manifest import sync_folder, write_atomically

PIECE_BYTES = 4 << 20  # of a file whose download goes on where it stopped
LEAST_PIECE_BYTES = 1 << 16  # from a server that cuts longer ones
HASH_BYTES = 1 << 20  # read at a time
UPLOAD_BYTES = 10_000_000  # an upload may wait `stall_seconds` for each
LISTING_SECONDS = 3600.0  # for all pages of a listing; each is under the time limits of the client
STOP_SECONDS = 0.5  # between two looks whether a download is still wanted
SHA256_FIELD = "sha256"  # metadata of the objects that `upload` writes

# Object stores show a file when all of it is there; elsewhere it gets another name first.
ATOMIC_PROTOCOLS = {"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "adl", "oss", "memory"}
READ_ONLY_PROTOCOLS = {"http", "https"}
S3_PROTOCOLS = {"s3", "s3a"}
EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs"}  # of this package

TRANSIENT_ERRNOS = {
    getattr(errno, name)
    for name in (
        "EIO", "EREMOTEIO", "ESTALE", "ETIMEDOUT", "EBUSY", "EAGAIN", "EINTR", "EPIPE", "ECONNREFUSED", "ECONNRESET",
        "ECONNABORTED", "ENETDOWN", "ENETUNREACH", "ENETRESET", "EHOSTDOWN", "EHOSTUNREACH", "ENOTCONN", "ENOBUFS",
    )
    if hasattr(errno, name)
}  # fmt: skip
DISK_ERRNOS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS}  # of where a download is written to
TRANSIENT_STATUS = {408, 425, 429}  # and all from 500 on
CLIENT_LIBRARIES = (
    "aiohttp",
    "aiobotocore",
    "botocore",
    "gcsfs",
    "google",
    "requests",
    "urllib3",
    "adlfs",
    "azure",
)

log = logging.getLogger(__name__)

_waits = random.Random()  # its own: the training's generators are not to notice a retry
_Result = TypeVar("_Result")


@dataclass(frozen=True, kw_only=True)
class Retry:
    """How long a failing location is tried."""

    total_seconds: float = 300.0
    """Without any progress, then SourceError. 0: one attempt."""
    first_wait: float = 0.5
    """Seconds before the second attempt; each wait is twice the one before, less up to half of it at random."""
    longest_wait: float = 30.0
    """Seconds that a wait grows to."""
    stall_seconds: float = 60.0
    """An attempt that brings no bytes for so long is given up and counts as failed."""


DEFAULT_RETRY = Retry()


class SourceError(OSError):
    """A location cannot be read or written, and trying again did not help. str() is a sentence for a user."""


class SourceRefused(SourceError):
    """The answer was that this one location is not to be had: 401, 403, 410 and the like."""


class WrongContents(ValueError):
    """What is at a location is whole, but not what was expected there: size or checksum. Twice in a row."""


class TooLarge(ValueError):
    """More bytes come than the caller takes."""


class _Stalled(TimeoutError):
    """No bytes for Retry.stall_seconds."""


class _Cut(OSError):
    """Fewer bytes came than there are."""


def is_url(location: str | os.PathLike) -> bool:
    """Whether a location is a URL (`scheme://...`) and no local path."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", os.fspath(location)) is not None


def join(location: str | os.PathLike, *names: str) -> str:
    """The location of a file or folder below a folder. names: plain, relative; a URL gets them quoted where its
    scheme wants that (http, https)."""
    location = os.fspath(location)
    if not is_url(location):
        return os.path.join(location, *names)
    relative = "/".join(name.strip("/") for name in names)
    if _protocol(location) in READ_ONLY_PROTOCOLS:
        parts = urlsplit(location)  # a signature in the query stays at the end
        path = parts.path.rstrip("/") + "/" + quote(relative, errors="surrogateescape")
        return urlunsplit(parts._replace(path=path))
    return location.rstrip("/") + "/" + relative


def read_bytes(location: str | os.PathLike, retry: Retry = DEFAULT_RETRY) -> bytes:
    """All bytes of a file.

    Raises:
        FileNotFoundError: it is not there.
        SourceError: it could not be read.
    """
    location = os.fspath(location)
    path = _local_path(location)
    if path is not None:
        return _retried("read", location, retry, path.read_bytes)

    def attempt() -> bytes:
        # Into a file: whole files arrive in pieces, which is how a stall shows.
        with tempfile.TemporaryDirectory(prefix="cmac-") as folder:
            target = Path(folder) / "file"
            _get(location, target, retry.stall_seconds)
            return target.read_bytes()

    return _retried("read", location, retry, attempt)


def write_bytes(location: str | os.PathLike, data: bytes, retry: Retry = DEFAULT_RETRY) -> None:
    """Make a file of these bytes, atomically: others see the old file or the whole new one. Folders are made.

    Raises:
        SourceError: it could not be written.
        ValueError: the scheme cannot be written to.
    """
    location = os.fspath(location)
    path = _local_path(location)
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        _retried("write", location, retry, lambda: write_atomically(path, data))
        return
    with tempfile.TemporaryDirectory(prefix="cmac-") as folder:
        source = Path(folder) / "file"
        source.write_bytes(data)
        _retried("write", location, retry, lambda: _put(source, location, None, retry.stall_seconds))


def upload(
    path: str | os.PathLike,
    location: str | os.PathLike,
    sha256: str | None = None,
    retry: Retry = DEFAULT_RETRY,
) -> None:
    """Copy a local file to a location, atomically; nothing is sent if the same bytes are there already.

    Afterwards the size there is checked. S3 checks the bytes by a checksum that the client sends along.

    Args:
        path: the file.
        location: its new place. Local folders are made.
        sha256: of the file, hex digits; None: it is computed.
        retry: how long to try.

    Raises:
        SourceError: it could not be written.
        ValueError: the scheme cannot be written to.
    """
    path, location = Path(path), os.fspath(location)
    num_bytes = path.stat().st_size
    sha256 = sha256 or file_sha256(path)
    if size(location, retry) == num_bytes and checksum(location, retry) == sha256:
        return
    target = _local_path(location)
    if target is not None:
        target.parent.mkdir(parents=True, exist_ok=True)
        _retried("write", location, retry, lambda: _copy(path, target))
    else:
        _retried("write", location, retry, lambda: _put(path, location, sha256, retry.stall_seconds))
    there = size(location, retry)
    if there != num_bytes:
        raise SourceError(
            f"{location} has {there} bytes after it was written, expected {num_bytes}; try again"
        )


def download(
    location: str | os.PathLike,
    path: str | os.PathLike,
    *,
    num_bytes: int | None = None,
    max_bytes: int | None = None,
    sha256: str | None = None,
    retry: Retry = DEFAULT_RETRY,
    temporary: str | os.PathLike | None = None,
    stop: threading.Event | None = None,
) -> None:
    """Copy a file to a local path, atomically: `path` is there when all of it is, checked and on the disk.

    With a checksum, an attempt goes on where the one before stopped if the server has ranges; else each begins anew.

    Args:
        location: the file.
        path: where to; its folder exists.
        num_bytes: expected size; None: any.
        max_bytes: it is given up soon after so many have come; None: never. A server may not tell the size before.
        sha256: expected checksum, hex digits; None: any.
        retry: how long to try; the time counts from the last progress.
        temporary: name until then, in the same folder; removed whatever happens. None: one of its own.
        stop: ends it with a SourceError soon after it is set.

    Raises:
        FileNotFoundError: it is not there.
        WrongContents: twice in a row, size or checksum is another one.
        TooLarge: it has more than max_bytes.
        SourceError: it could not be read.
        OSError: the local disk is full or cannot be written.
    """
    location, path = os.fspath(location), Path(path)
    if temporary is None:
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    part = Path(temporary)
    stop = stop or threading.Event()
    attempts = _Attempts("read", location, retry, stop)
    download_ = _Download(location, part, num_bytes, stop, resumes=sha256 is not None)
    wrong: list[str] = []
    try:
        while True:
            try:
                download_.attempt(retry.stall_seconds, max_bytes)
            except Exception as error:
                if download_.has_progressed():
                    attempts.restart()
                if isinstance(error, OSError) and error.errno in DISK_ERRNOS:
                    raise OSError(error.errno, os.strerror(error.errno), str(part)) from error
                attempts.failed(error)
                continue
            if max_bytes is not None and part.stat().st_size > max_bytes:
                raise TooLarge(f"{location} has more than {max_bytes} bytes")
            fault = _contents_fault(part, num_bytes, sha256)
            if fault is None:
                break
            download_.start_anew()
            wrong.append(fault)
            if len(wrong) == 2:
                raise WrongContents(f"{location} has {fault}, read twice; copy it there again")
            log.warning("%s has %s; it is read again", location, fault)
        with open(part, "rb") as file:
            os.fsync(file.fileno())
        os.replace(part, path)
        sync_folder(path.parent)
    finally:
        part.unlink(missing_ok=True)


def size(location: str | os.PathLike, retry: Retry = DEFAULT_RETRY) -> int | None:
    """Bytes of a file; None if it is not there, or the server does not tell how long it is.

    Raises:
        SourceError: the location could not be asked.
    """
    info = _info(os.fspath(location), retry)
    return info.get("size") if info is not None and info.get("type") == "file" else None


def exists(location: str | os.PathLike, retry: Retry = DEFAULT_RETRY) -> bool:
    """Whether there is a file or a folder.

    Raises:
        SourceError: the location could not be asked.
    """
    return _info(os.fspath(location), retry) is not None


def _info(location: str, retry: Retry) -> dict[str, Any] | None:
    """fsspec's description of what is at a location, `type` and `size` of a local path alone; None: nothing is."""
    path = _local_path(location)
    try:
        if path is not None:
            found = _retried("look at", location, retry, path.stat)
            return {"type": "file" if stat.S_ISREG(found.st_mode) else "other", "size": found.st_size}
        return _retried("look at", location, retry, lambda: _call(location, "info", retry.stall_seconds))
    except (FileNotFoundError, NotADirectoryError):
        return None


def checksum(location: str | os.PathLike, retry: Retry = DEFAULT_RETRY) -> str | None:
    """SHA-256 of a file, hex digits; None if it is not there. S3 keeps that of what `upload` wrote; else the whole
    file is read.

    Raises:
        SourceError: it could not be read.
    """
    location = os.fspath(location)
    path = _local_path(location)
    try:
        if path is not None:
            return _retried("read", location, retry, lambda: file_sha256(path))
        if _protocol(location) in S3_PROTOCOLS:
            known = _retried(
                "look at", location, retry, lambda: _call(location, "metadata", retry.stall_seconds)
            )
            if SHA256_FIELD in known:
                return known[SHA256_FIELD]
        with tempfile.TemporaryDirectory(prefix="cmac-") as folder:
            target = Path(folder) / "file"
            download(location, target, retry=retry)
            return file_sha256(target)
    except FileNotFoundError:
        return None


def list_sizes(location: str | os.PathLike, retry: Retry = DEFAULT_RETRY) -> dict[str, int | None]:
    """Name -> bytes of the files directly in a folder; None where the listing does not tell (http). Empty if there
    is no such folder."""
    location = os.fspath(location)
    return {
        name: info.get("size")
        for name, info in _listed(location, retry).items()
        if info.get("type") != "directory"
    }


def list_names(location: str | os.PathLike, retry: Retry = DEFAULT_RETRY) -> list[str]:
    """Names of the files and folders directly in a folder, sorted; none if there is no such folder. Over http it is
    what an index page links to."""
    location = os.fspath(location)
    path = _local_path(location)
    if path is None:
        return sorted(_listed(location, retry))
    try:
        return sorted(os.listdir(path))
    except (FileNotFoundError, NotADirectoryError):
        return []


def find_names(location: str | os.PathLike, retry: Retry = DEFAULT_RETRY) -> list[str]:
    """All files below a folder, relative to it, with `/`, sorted; none if there is no such folder."""
    location = os.fspath(location)
    path = _local_path(location)
    if path is not None:
        return sorted(
            os.path.relpath(os.path.join(folder, name), path).replace(os.sep, "/")
            for folder, _, names in os.walk(path)
            for name in names
        )
    try:
        found = _retried(
            "list",
            location,
            retry,
            lambda: _call(location, "find", retry.stall_seconds, limit=LISTING_SECONDS),
        )
    except FileNotFoundError:
        return []
    return sorted(filter(None, map(_relative_to(location), found)))


def remove(location: str | os.PathLike, retry: Retry = DEFAULT_RETRY) -> None:
    """Delete a file. None there is no error.

    Raises:
        SourceError: it could not be deleted.
    """
    location = os.fspath(location)
    path = _local_path(location)
    try:
        if path is not None:
            _retried("delete", location, retry, path.unlink)
        else:
            _check_writable(location)
            _retried("delete", location, retry, lambda: _call(location, "rm_file", retry.stall_seconds))
    except FileNotFoundError:
        pass


def is_transient(error: BaseException) -> bool:
    """Whether an error of reading or writing may pass if one tries again."""
    if isinstance(error, (TimeoutError, asyncio.TimeoutError, ConnectionError, _Cut, socket.gaierror)):
        return True
    if isinstance(error, FileNotFoundError) and _is_of(error.__cause__, "aiohttp"):
        # What fsspec makes of any failure when it asks for a size over http.
        return is_transient(error.__cause__)
    status = _http_status(error)
    if status is not None:
        return status >= 500 or status in TRANSIENT_STATUS
    if _is_of(error, "aiohttp"):
        import aiohttp

        return isinstance(error, aiohttp.ClientError) and not isinstance(
            error, (aiohttp.InvalidURL, aiohttp.ClientConnectorCertificateError)
        )
    if _is_of(error, "botocore", "aiobotocore"):
        from botocore import exceptions
        from botocore.parsers import ResponseParserError

        passing = (
            exceptions.HTTPClientError,
            exceptions.ConnectionError,
            exceptions.IncompleteReadError,
            ResponseParserError,
        )
        return isinstance(error, passing) and not isinstance(error, exceptions.SSLError)
    if isinstance(error, OSError):
        permanent = (
            FileNotFoundError,
            PermissionError,
            FileExistsError,
            IsADirectoryError,
            NotADirectoryError,
        )
        return not isinstance(error, permanent) and (error.errno is None or error.errno in TRANSIENT_ERRNOS)
    return False


class _Attempts:
    """Failures of one operation: says each aloud and waits, or raises when there were enough."""

    def __init__(self, what: str, location: str, retry: Retry, stop: threading.Event | None = None) -> None:
        self._what, self._location, self._retry = what, location, retry
        self._stop = stop or threading.Event()
        self._begin = self._last_progress = time.monotonic()
        self._num_failed = self._num_failed_in_row = 0

    def restart(self) -> None:
        """There was progress: the time and the waits count from here."""
        self._last_progress = time.monotonic()
        self._num_failed_in_row = 0

    def failed(self, error: Exception) -> None:
        """Wait, to try again.

        Raises:
            FileNotFoundError: that was the error.
            SourceError: it is one that stays, or the time is up; SourceRefused if the location is refused.
            Exception: error itself, where it is neither of the system nor of a client library.
        """
        if self._stop.is_set():
            raise self._given_up() from error
        retry, now = self._retry, time.monotonic()
        self._num_failed += 1
        self._num_failed_in_row += 1
        if not is_transient(error):
            if isinstance(error, FileNotFoundError) and self._what != "write":
                raise FileNotFoundError(errno.ENOENT, "there is no such file", self._location) from error
            if isinstance(error, OSError) or _is_of(error, *CLIENT_LIBRARIES):
                refused = isinstance(error, PermissionError) or 400 <= (_http_status(error) or 0) < 500
                raise (SourceRefused if refused else SourceError)(
                    f"cannot {self._what} {self._location}: {_describe(error)}; {_way_out(error)}"
                ) from error
            raise error
        seconds = now - self._last_progress
        if seconds >= retry.total_seconds:
            raise SourceError(
                f"cannot {self._what} {self._location}: {_describe(error)}; tried {self._num_failed} times in "
                f"{now - self._begin:.0f} s, the last {seconds:.0f} s without progress; see whether it can be "
                f"reached from this machine, then run the same command again"
            ) from error
        pause = min(retry.first_wait * 2 ** (self._num_failed_in_row - 1), retry.longest_wait)
        pause = min(pause * _waits.uniform(0.5, 1.0), retry.total_seconds - seconds)
        log.warning(
            "cannot %s %s: %s; attempt %d, the next in %.1f s, for up to %.0f s more",
            self._what, self._location, _describe(error), self._num_failed, pause, retry.total_seconds - seconds,
        )  # fmt: skip
        if self._stop.wait(pause):
            raise self._given_up() from error

    def _given_up(self) -> SourceError:
        return SourceError(f"{self._location} was given up: what wanted it was closed")


def _retried(what: str, location: str, retry: Retry, attempt: Callable[[], _Result]) -> _Result:
    """Result of the first attempt that succeeds; raises as `_Attempts.failed`."""
    attempts = _Attempts(what, location, retry)
    while True:
        try:
            return attempt()
        except Exception as error:
            attempts.failed(error)


class _Download:
    """One file on its way into a part file, over several attempts."""

    def __init__(
        self, location: str, part: Path, num_bytes: int | None, stop: threading.Event, resumes: bool
    ) -> None:
        self._location, self._part, self._num_bytes, self._stop = location, part, num_bytes, stop
        self._resumes = resumes and _local_path(location) is None
        self._most = 0  # bytes that an attempt came to
        self._piece_bytes = PIECE_BYTES

    def attempt(self, stall_seconds: float, max_bytes: int | None) -> None:
        """Read the file, or the rest of it, to its end as far as the server tells it."""
        have = self._have()
        if self._resumes and have:
            total = self._num_bytes
            if total is None:
                total = _call(self._location, "info", stall_seconds).get("size")
            if total is not None and have < total:
                self._read_pieces(have, total, stall_seconds)
                return
        self.start_anew()
        _get(self._location, self._part, stall_seconds, self._stop, max_bytes)
        have = self._have()
        if self._num_bytes is not None and have < self._num_bytes:
            # Short for good, or cut without a word because the server does not tell the length beforehand?
            there = _call(self._location, "info", stall_seconds).get("size")
            if there is not None and there > have:
                raise _Cut(f"{have} bytes came of {there}")

    def has_progressed(self) -> bool:
        """Whether the attempt before came further than any earlier one."""
        have, most = self._have(), self._most
        self._most = max(have, most)
        if have <= most:  # of a piece that was cut nothing is kept
            self._piece_bytes = max(self._piece_bytes // 2, LEAST_PIECE_BYTES)
        return have > most

    def start_anew(self) -> None:
        """Forget what is there."""
        self._part.write_bytes(b"")  # not deleted: its name may mean something

    def _have(self) -> int:
        try:
            return self._part.stat().st_size
        except FileNotFoundError:
            return 0

    def _read_pieces(self, have: int, total: int, stall_seconds: float) -> None:
        with open(self._part, "ab") as file:
            while have < total:
                end = min(have + self._piece_bytes, total)
                piece = _call(self._location, "cat_file", stall_seconds, stop=self._stop, start=have, end=end)
                if len(piece) != end - have:
                    # No ranges here: the answer is the whole file, or was cut.
                    self._resumes = False
                    self.start_anew()
                    raise _Cut(
                        f"{len(piece)} bytes came for bytes {have} to {end}; it is read from its start"
                    )
                file.write(piece)
                file.flush()
                have = end


def _contents_fault(path: Path, num_bytes: int | None, sha256: str | None) -> str | None:
    """What is wrong with a file; None: nothing."""
    have = path.stat().st_size
    if num_bytes is not None and have != num_bytes:
        return f"{have} bytes, expected {num_bytes}"
    if sha256 is not None:
        digest = file_sha256(path)
        if digest != sha256:
            return f"SHA-256 {digest[:12]}..., expected {sha256[:12]}..."
    return None


def file_sha256(path: str | os.PathLike) -> str:
    """SHA-256 of a local file, hex digits; not tried again."""
    digest, buffer = hashlib.sha256(), bytearray(HASH_BYTES)
    with open(path, "rb", buffering=0) as file:
        while length := file.readinto(buffer):
            digest.update(memoryview(buffer)[:length])
    return digest.hexdigest()


def _copy(source: Path, target: Path) -> None:
    """Atomic copy between local paths."""
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(8)}.tmp")
    try:
        with open(source, "rb") as reading, open(temporary, "wb") as writing:
            shutil.copyfileobj(reading, writing, HASH_BYTES)
            writing.flush()
            os.fsync(writing.fileno())
        os.replace(temporary, target)
        sync_folder(target.parent)
    finally:
        temporary.unlink(missing_ok=True)


def _get(
    location: str,
    target: Path,
    stall_seconds: float,
    stop: threading.Event | None = None,
    max_bytes: int | None = None,
) -> None:
    """Copy a file to a local path, where what came stays if it fails."""
    source = _local_path(location)
    if source is not None:
        shutil.copyfile(source, target)
        return
    # In sequence, so that what came is the file's beginning.
    options = {"max_concurrency": 1} if _protocol(location) in S3_PROTOCOLS else {}
    _call(
        location, "get_file", stall_seconds, os.fspath(target),
        watched=True, stop=stop, max_bytes=max_bytes, **options,
    )  # fmt: skip


def _put(source: Path, location: str, sha256: str | None, stall_seconds: float) -> None:
    """Copy a local file to a URL, atomically."""
    _check_writable(location)
    protocol = _protocol(location)
    options: dict[str, Any] = {}
    if protocol in S3_PROTOCOLS and sha256 is not None:
        options["Metadata"] = {SHA256_FIELD: sha256}
    limit = stall_seconds * (1 + source.stat().st_size / UPLOAD_BYTES)
    if protocol in ATOMIC_PROTOCOLS:
        _call(
            location, "put_file", stall_seconds, limit=limit, first=os.fspath(source), watched=True, **options
        )
        return
    from fsspec import AbstractFileSystem

    file_system, path = _file_system(location, stall_seconds)
    if type(file_system).mv is AbstractFileSystem.mv:  # a copy
        raise ValueError(
            f"{location} is to be written, expected a scheme whose files appear when they are whole "
            f"({', '.join(sorted(ATOMIC_PROTOCOLS))}) or can be renamed; write to a local folder and copy it"
        )
    folder, name = location.rsplit("/", 1)
    temporary = f"{folder}/.{name}.{secrets.token_hex(8)}.tmp"
    _call(folder, "makedirs", stall_seconds, exist_ok=True)
    _call(temporary, "put_file", stall_seconds, limit=limit, first=os.fspath(source), watched=True)
    _call(temporary, "mv", stall_seconds, path, limit=limit)
    file_system.invalidate_cache()


def _check_writable(location: str) -> None:
    if _protocol(location) in READ_ONLY_PROTOCOLS:
        raise ValueError(
            f"{location} is to be written, expected a scheme that can be, such as s3://, gs:// or a local path"
        )


def _listed(location: str, retry: Retry) -> dict[str, dict[str, Any]]:
    """Name -> fsspec's description of what is directly in a folder."""
    path = _local_path(location)
    if path is not None:
        try:
            with os.scandir(path) as entries:
                return {entry.name: info for entry in entries if (info := _described(entry)) is not None}
        except (FileNotFoundError, NotADirectoryError):
            return {}
    try:
        found = _retried(
            "list",
            location,
            retry,
            lambda: _call(location, "ls", retry.stall_seconds, limit=LISTING_SECONDS, detail=True),
        )
    except (FileNotFoundError, NotADirectoryError):
        return {}
    listed, relative = {}, _relative_to(location)
    for info in found:
        name = relative(info["name"].rstrip("/"))
        if name and "/" not in name:
            listed[name] = info
    return listed


def _described(entry: os.DirEntry) -> dict[str, Any] | None:
    """What `_listed` gives for an entry of a local folder; None if it is deleted this moment."""
    if entry.is_dir():
        return {"type": "directory"}
    try:
        return {"type": "file", "size": entry.stat().st_size if entry.is_file() else None}
    except FileNotFoundError:
        return None


def _relative_to(location: str) -> Callable[[str], str]:
    """Function from a name that fsspec lists to that relative to the folder at location; "" if it is not below it."""
    # Once: a bucket may have millions of names.
    _, folder = _file_system(location, DEFAULT_RETRY.stall_seconds)
    quoted = _protocol(location) in READ_ONLY_PROTOCOLS
    folder = (urlsplit(folder).path if quoted else folder).rstrip("/") + "/"

    def relative(name: str) -> str:
        name = urlsplit(name).path if quoted else name
        below = name[len(folder) :] if name.startswith(folder) else ""
        return unquote(below) if quoted else below

    return relative


def _protocol(location: str) -> str:
    return location.partition("://")[0].lower()


def _local_path(location: str) -> Path | None:
    """Path of a location on this machine; None: it is behind a URL."""
    if not is_url(location):
        return Path(location)
    if _protocol(location) in ("file", "local"):
        return Path(location.partition("://")[2])
    return None


def _file_system(location: str, stall_seconds: float) -> tuple[Any, str]:
    """fsspec's file system of a URL, and the path in it.

    Raises:
        ValueError: there is no such scheme, or its library is not installed.
    """
    import fsspec
    from fsspec.config import conf

    protocol = _protocol(location)
    kinds = next((kinds for kinds in (READ_ONLY_PROTOCOLS, S3_PROTOCOLS) if protocol in kinds), {protocol})

    def given(option: str) -> dict[str, Any]:
        """What the user's configuration of fsspec has for an option, which options here would hide."""
        return {
            key: value for kind in sorted(kinds) for key, value in conf.get(kind, {}).get(option, {}).items()
        }

    client_seconds = 2 * stall_seconds  # comes after `_call`'s limit, for what has none
    options: dict[str, Any] = {"use_listings_cache": False}  # others write there, too
    if protocol in READ_ONLY_PROTOCOLS:
        import aiohttp

        timeout = aiohttp.ClientTimeout(total=None, sock_connect=stall_seconds, sock_read=client_seconds)
        options["client_kwargs"] = {"timeout": timeout, **given("client_kwargs")}
        # Sizes and ranges are those of the file, not of a compressed copy.
        options["headers"] = {"Accept-Encoding": "identity", **given("headers")}
    elif protocol in S3_PROTOCOLS:
        # The retries here are the only ones: those of the client say nothing and know no limit of time.
        options["config_kwargs"] = {
            "retries": {"total_max_attempts": 1},
            "connect_timeout": stall_seconds,
            "read_timeout": client_seconds,
            **given("config_kwargs"),
        }
    try:
        file_system = fsspec.filesystem(protocol, **options)
    except ImportError as error:
        extra = EXTRAS.get(protocol)
        needed = f"pip install cmac[{extra}]" if extra else str(error)
        raise ValueError(f"{location} needs a library that is not installed: {needed}") from error
    except ValueError as error:
        raise ValueError(f"{location} cannot be opened: {error}") from error
    if protocol in S3_PROTOCOLS:
        file_system.retries = 1
    return file_system, file_system._strip_protocol(location)


def _call(
    location: str,
    method: str,
    stall_seconds: float,
    *args: Any,
    first: Any = None,
    watched: bool = False,
    limit: float | None = None,
    stop: threading.Event | None = None,
    max_bytes: int | None = None,
    **options: Any,
) -> Any:
    """What a method of fsspec's file system returns for a location.

    Args:
        location: a URL; the method's first argument, or second after `first`.
        method: its name.
        stall_seconds: it is given up when it takes longer, or with `watched` when it moves no bytes for so long.
        args: arguments after the location.
        first: one before it.
        watched: the method takes a callback that counts bytes.
        limit: in place of stall_seconds here, but not within the client.
        stop: it is given up soon after this is set.
        max_bytes: it is given up soon after it has moved more.
        options: by name.

    Raises:
        _Stalled: given up.
        TooLarge: given up.
    """
    from fsspec.callbacks import Callback

    file_system, path = _file_system(location, stall_seconds)
    limit = stall_seconds if limit is None else limit
    args = (path, *args) if first is None else (first, path, *args)
    progress = Callback()
    if watched:
        options["callback"] = progress
    task: Future = _submit(file_system, method, args, options)
    moved, since = 0, time.monotonic()
    while True:
        wait([task], max(0.0, min(since + limit - time.monotonic(), STOP_SECONDS)))
        if task.done():
            return task.result()
        if stop is not None and stop.is_set():
            task.cancel()
            raise _Stalled("given up")
        if max_bytes is not None and progress.value > max_bytes:
            task.cancel()
            raise TooLarge(f"{location} has more than {max_bytes} bytes")
        if progress.value != moved:
            moved, since = progress.value, time.monotonic()
        elif time.monotonic() - since >= limit:
            task.cancel()
            raise _Stalled(f"no bytes for {limit:g} s")


def _submit(file_system: Any, method: str, args: tuple, options: dict[str, Any]) -> Future:
    """Start a method in the background. What is asynchronous can be cancelled; a thread that hangs is left behind."""
    if file_system.async_impl and asyncio.iscoroutinefunction(getattr(file_system, f"_{method}", None)):
        return asyncio.run_coroutine_threadsafe(
            getattr(file_system, f"_{method}")(*args, **options), file_system.loop
        )
    task: Future = Future()

    def work() -> None:
        try:
            task.set_result(getattr(file_system, method)(*args, **options))
        except BaseException as error:
            task.set_exception(error)

    task.set_running_or_notify_cancel()
    threading.Thread(target=work, daemon=True, name="storage-call").start()
    return task


def _is_of(error: BaseException | None, *libraries: str) -> bool:
    """Whether an error's type comes from one of these packages."""
    return error is not None and any(
        base.__module__.partition(".")[0] in libraries for base in type(error).__mro__
    )


def _http_status(error: BaseException) -> int | None:
    """Status code of a server's answer, where the error is one; else None."""
    response = getattr(error, "response", None)
    if isinstance(response, dict):  # botocore
        status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    elif _is_of(error, *CLIENT_LIBRARIES):
        status = getattr(error, "status", None) or getattr(error, "code", None)
    else:
        status = None
    return int(status) if isinstance(status, int) and status >= 100 else None


def _describe(error: BaseException) -> str:
    cause = error.__cause__ if isinstance(error, FileNotFoundError) and error.__cause__ else error
    return f"{type(cause).__name__}: {cause}" if str(cause) else type(cause).__name__


def _way_out(error: BaseException) -> str:
    if isinstance(error, OSError) and error.errno in DISK_ERRNOS:
        return "make room there, or see whether it can be written to, then run the same command again"
    if isinstance(error, PermissionError) or _http_status(error) in (401, 403):
        return (
            "see whether this account may do that, and the credentials (AWS_PROFILE, AWS_ACCESS_KEY_ID, ...)"
        )
    if isinstance(error, FileNotFoundError):
        return "make the bucket or folder first"
    if "Credentials" in type(error).__name__:
        return "give credentials (AWS_PROFILE, AWS_ACCESS_KEY_ID, ... or fsspec's configuration)"
    return "trying again does not help; see whether the location is right"
