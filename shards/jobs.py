"""What workers of make_shards do, on whatever machine: slice one video, or write the shards of one block.

A job leaves what it made under names that depend on the number of its video or block alone, each whole or not
at all, and looks first whether that is there. So a job may be done again after its worker was given up for
dead, and even twice at the same time: nothing is lost and nothing is there twice.
"""

import functools
import glob
import json
import os
import re
import shutil
import socket
import stat
import tempfile
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from shards import storage
from shards.ffmpeg import ffmpeg_version, find_ffmpeg
from shards.lock import try_lock
from shards.media import SourceLimits, is_unmounted
from shards.order import shuffled
from shards.results import (
    ReportRow,
    ResultFile,
    publish_result,
    published_row,
    result_location,
    write_result,
)
from shards.slicing import SlicedVideo, SliceSettings, slice_video
from shards.sources import SourceVideo
from shards.writer import ShardWriter, UnexpectedShard

RECORD_PREFIX = "block-"
FOLDER_PREFIX = f"make_shards-job-{socket.gethostname()}-"
LOCK_NAME = "lock"
LOCKED_SECONDS = 60.0
"""A temporary folder that is older is locked if anybody is at work in it."""
SWEEP_SECONDS = 600.0
"""Between two looks of a process for temporary folders that others left."""
TRANSFERS_AT_ONCE = 8
"""Small files that one worker reads from or deletes at a URL at the same time."""
RETRY = storage.DEFAULT_RETRY
"""For a video at a URL."""
PROBE = storage.Retry(total_seconds=10.0)
"""For a look whether another one can be read."""
_next_sweep: dict[Path, float] = {}
_last_url: str | None = None
"""Of a video that could be read."""


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """What all jobs of a run share."""

    out: str
    """Location of the shards."""
    work: str
    """Location of the work area."""
    temporary: str | None
    """Folder for temporary files, in `work`; None: the system's, as that is a URL."""
    split: str
    seed: int
    slicing: SliceSettings
    host: str = field(default_factory=socket.gethostname)
    """The machine that started the run."""
    program: str
    """ffmpeg there."""
    ffmpeg: str
    """Its version, which it has to have on all."""
    timeout_seconds: float
    """For one ffmpeg pass over one video."""
    max_source_bytes: int
    """Larger files are `too-large`."""
    skip_unavailable: bool
    """A video whose URL is refused, or cannot be read while the one before can, does not stop the run."""
    limits: SourceLimits


@dataclass(frozen=True, kw_only=True)
class SliceJob:
    """One video."""

    number: int
    """Place of the video in the random order."""
    source: SourceVideo
    run: RunSettings


@dataclass(frozen=True, kw_only=True)
class BlockJob:
    """The shards of one block of videos."""

    index: int
    first: int
    """Number of its first video."""
    sources: tuple[SourceVideo, ...]
    run: RunSettings
    expected: dict[str, str] | None = None
    """Names of the shards to write, with the SHA-256 that each has to have; None: all, with any."""


def do_job(job: SliceJob | BlockJob) -> Any:
    """Result of a job: the line of the report of a video, the record of a block.

    Raises:
        OSError: something is wrong with the machine, which is named if it is not the one that started the run.
    """
    try:
        return slice_job(job) if isinstance(job, SliceJob) else block_job(job)
    except OSError as error:
        host = socket.gethostname()
        if host == job.run.host:
            raise
        raise OSError(f"{host}: {error}") from error


def slice_job(job: SliceJob) -> ReportRow:
    """Leaves the result of a video in the work area."""
    location = result_location(job.run.work, job.number)
    with _temporary_folder(job.run) as folder:
        row = published_row(location, job.source.video_id, folder)
        if row is not None:
            return row
        path = Path(folder) / "result"
        write_result(path, job.source, _sliced(job, folder))
        return publish_result(path, location, folder)


def give_up(job: SliceJob, reason: str) -> ReportRow:
    """Leaves `reason` as the result of a video that cannot be sliced, unless it has one after all."""
    with _temporary_folder(job.run) as folder:
        path = Path(folder) / "result"
        write_result(path, job.source, SlicedVideo(reason=reason, seconds=0))
        return publish_result(path, result_location(job.run.work, job.number), folder)


def _sliced(job: SliceJob, folder: str) -> SlicedVideo:
    path, run = job.source.path, job.run
    if path is not None and storage.is_url(path):
        found = _downloaded(path, Path(folder), run)
        if isinstance(found, SlicedVideo):
            return found
        path = str(found)
    else:
        reason = "missing" if path is None else _local_fault(path, run.max_source_bytes)
        if reason is not None:
            return SlicedVideo(reason=reason, seconds=0)
    return slice_video(
        path,
        job.source.video_id,
        run.seed,
        run.slicing,
        _checked_program(run.program, run.ffmpeg),
        run.timeout_seconds,
        folder,
        window=job.source.window,
        limits=run.limits,
    )


def _local_fault(path: str, max_bytes: int) -> str | None:
    """Why a file that was listed cannot be taken; None: it can.

    Raises:
        OSError: its file system is not there, or fails, on this machine.
    """
    try:
        status = os.stat(path)
    except FileNotFoundError as error:
        if os.path.lexists(path):
            return "unreadable"  # a link to nothing
        if not is_unmounted(path):
            return "missing"  # deleted meanwhile
        raise OSError(
            f"{os.path.dirname(path)} is not there or empty, expected the videos that were listed when the run "
            f"started; mount them, then run the same command again"
        ) from error
    except PermissionError:
        return "unreadable"
    if not stat.S_ISREG(status.st_mode) or not os.access(path, os.R_OK):
        return "unreadable"
    return "too-large" if status.st_size > max_bytes else None


def _downloaded(url: str, folder: Path, run: RunSettings) -> Path | SlicedVideo:
    """A copy of a video in `folder`, or why there is none.

    Raises:
        SourceError: it could not be read, which is not the video's fault or not to be skipped.
    """
    global _last_url
    suffix = re.search(r"\.[A-Za-z0-9]{1,8}$", url)  # which ffmpeg takes as a hint
    path = folder / f"source{suffix[0] if suffix else ''}"
    try:
        num_bytes = storage.size(url, RETRY)
        if num_bytes is not None and num_bytes > run.max_source_bytes:
            return SlicedVideo(reason="too-large", seconds=0)
        storage.download(url, path, num_bytes=num_bytes, max_bytes=run.max_source_bytes, retry=RETRY)
    except FileNotFoundError:
        return SlicedVideo(reason="missing", seconds=0)
    except storage.TooLarge:
        return SlicedVideo(reason="too-large", seconds=0)
    except storage.SourceError as error:
        if not run.skip_unavailable:
            raise storage.SourceError(f"{error}; or leave out such videos with --skip-unavailable") from error
        refused = isinstance(error, storage.SourceRefused)
        if not (refused if _last_url is None else _can_be_read(_last_url)):
            raise
        return SlicedVideo(reason="refused" if refused else "unreachable", seconds=0)
    _last_url = url
    return path


def _can_be_read(url: str) -> bool:
    try:
        return storage.size(url, PROBE) is not None
    except storage.SourceError:
        return False


@functools.lru_cache
def _checked_program(program: str, version: str) -> str:
    """An ffmpeg of this machine that is the one of the machine that started the run."""
    if not os.access(program, os.X_OK):
        program = find_ffmpeg()
    found = ffmpeg_version(program)
    if found != version:
        raise OSError(
            f"{program} is {found!r}, expected {version!r}, which the run was started with; install the same version "
            f"of imageio-ffmpeg on all machines, or shards would differ"
        )
    return program


def record_location(work: str, index: int) -> str:
    """Where the record of a block is: that its shards are there, and what they hold."""
    return storage.join(work, f"{RECORD_PREFIX}{index:06d}.json")


def read_record(work: str, index: int) -> dict[str, Any] | None:
    """Record of a block: `shards`, its `ShardEntry`s, and `rows`, its lines of the report. None if its shards
    are not written yet."""
    try:
        return json.loads(storage.read_bytes(record_location(work, index)))
    except FileNotFoundError:
        return None


def block_job(job: BlockJob) -> dict[str, Any]:
    """Writes the shards of a block, one per slot, then its record, which is returned, and removes the results
    of its videos.

    If a shard does not have the checksum that is expected of it, the record is {"unexpected": why}, and
    neither shard nor record is written.
    """
    record = read_record(job.run.work, job.index)
    if record is not None:
        return record
    results = [result_location(job.run.work, job.first + number) for number in range(len(job.sources))]
    with _temporary_folder(job.run) as folder:
        try:
            record = _write_block(job, _local_results(results, Path(folder)), folder)
        except UnexpectedShard as error:
            return {"unexpected": str(error)}
        except FileNotFoundError:
            # Another worker that does this job was faster, and is tidying up already.
            record = read_record(job.run.work, job.index)
            if record is None:
                raise
            return record
    storage.write_bytes(
        record_location(job.run.work, job.index), json.dumps(record, separators=(",", ":")).encode("ascii")
    )
    remove_all(results)
    return record


def _write_block(job: BlockJob, results: list[Path], folder: str) -> dict[str, Any]:
    run, num_slots = job.run, job.run.slicing.max_clips
    rows, kept, orders = [], [], []
    for source, path in zip(job.sources, results):
        with ResultFile(path) as file:
            if file.result.row.path != source.video_id:
                raise OSError(
                    f"{path} is of {file.result.row.path!r}, expected {source.video_id!r}: workers of another run "
                    f"write to {run.work}; end them, then run the same command again"
                )
            rows.append(asdict(file.result.row))
            num_clips = len(file.result.clips)
        if num_clips:
            order: list[int] = []
            while len(order) < num_slots:  # a video with too few seconds begins again, in another order
                order += shuffled(range(num_clips), run.seed, "slots", source.video_id, len(order))
            kept.append((source, path))
            orders.append(order)
    entries = []
    for slot in range(num_slots if kept else 0):
        writer = ShardWriter(run.out, run.split, slot, job.index, work_folder=folder)
        if job.expected is not None:
            if writer.name not in job.expected:
                continue
            writer.expected_sha256 = job.expected[writer.name]
        with writer:
            for (source, path), order in zip(kept, orders):
                with ResultFile(path) as file:
                    writer.write(*file.clip(order[slot], slot, source.key_hash))
        assert writer.entry is not None
        entries.append(asdict(writer.entry))
    return {"shards": entries, "rows": rows}


def _local_results(locations: list[str], folder: Path) -> list[Path]:
    """Files with these results: themselves, or copies in `folder`."""
    if not any(map(storage.is_url, locations)):
        return [Path(location) for location in locations]
    paths = [folder / f"result-{number}" for number in range(len(locations))]
    with ThreadPoolExecutor(TRANSFERS_AT_ONCE) as threads:
        list(threads.map(storage.download, locations, paths))
    return paths


def remove_all(locations: Iterable[str]) -> None:
    """Delete files; those that are not there are no error."""
    with ThreadPoolExecutor(TRANSFERS_AT_ONCE) as threads:
        list(threads.map(storage.remove, locations))


@contextmanager
def _temporary_folder(run: RunSettings) -> Iterator[str]:
    parent = Path(run.temporary or tempfile.gettempdir())
    _sweep(parent)
    with tempfile.TemporaryDirectory(dir=parent, prefix=FOLDER_PREFIX, ignore_cleanup_errors=True) as folder:
        with open(os.path.join(folder, LOCK_NAME), "w") as file:
            with suppress(OSError):  # without locks nobody deletes it
                try_lock(file)
            yield folder


def _sweep(parent: Path) -> None:
    """Delete the temporary folders of this machine's workers that were killed."""
    now = time.monotonic()
    if now < _next_sweep.get(parent, now):
        return
    _next_sweep[parent] = now + SWEEP_SECONDS
    for folder in parent.glob(f"{glob.escape(FOLDER_PREFIX)}*"):
        if _is_abandoned(folder):
            shutil.rmtree(folder, ignore_errors=True)


def _is_abandoned(folder: Path) -> bool:
    """Whether it is of a worker that was killed: one that is at work holds its lock."""
    try:
        if time.time() - folder.stat().st_mtime < LOCKED_SECONDS:
            return False
        with open(folder / LOCK_NAME, "r+") as file:
            return try_lock(file)
    except FileNotFoundError:  # killed while it was deleted
        return True
    except OSError:  # another user's, or on a file system without locks
        return False
