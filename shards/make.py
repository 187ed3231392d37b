"""Videos -> a folder of shards: the engine behind `tools/make_shards.py`.

The videos are put in random order once, by seed, and cut into blocks of `videos_per_shard`. A block becomes
one shard per slot; what is in it depends on the seed and the list of videos alone. Workers leave one result
file per video in `OUT/.work`; when all of a block's are there, its shards are written, a record of the block
replaces them, and after the last block the report and the manifest are written, and `OUT/.work` goes. Every
step ends in a rename, so a run that was killed goes on where it stopped.
"""

import csv
import fcntl
import io
import json
import os
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

from shards.ffmpeg import ffmpeg_version, find_ffmpeg
from shards.manifest import (
    MANIFEST_NAME,
    Manifest,
    ShardEntry,
    read_manifest,
    write_atomically,
    write_manifest,
)
from shards.order import shuffled
from shards.pool import Lost, run_jobs, usable_cores
from shards.results import ReportRow, ResultFile, write_result
from shards.schema import SCHEMA_VERSION
from shards.slicing import SlicedVideo, SliceSettings, slice_video
from shards.sources import (
    SourceVideo,
    video_list_sha256,
    videos_of_folder,
    videos_of_kinetics,
    videos_of_list,
)
from shards.writer import ShardWriter

WORK_FOLDER = ".work"
PLAN_NAME = "plan.json"
REPORT_NAME = "report.csv"
REPORT_COLUMNS = ("path", "status", "reason", "num_clips", "seconds")
DRY_RUN_VIDEOS = 16
"""A dry run slices so many videos."""


class NothingKept(ValueError):
    """Not one video gave a clip."""


@dataclass(frozen=True, kw_only=True)
class ShardConfig:
    """One run of make_shards."""

    videos: str
    """Folder of videos."""
    out: str
    """Folder for the shards of one split."""
    csv: str | None = None
    """Kinetics csv: rows of `split` are taken, looked for in `videos`."""
    list_file: str | None = None
    """File with one path per line, relative to `videos`."""
    split: str = "train"
    """Name that shards start with."""
    seed: int = 0
    workers: int = field(default_factory=usable_cores)
    """Processes; does not change a byte."""
    videos_per_shard: int = 1000
    timeout_seconds: float = 300.0
    """For one ffmpeg pass over one video."""
    slicing: SliceSettings = field(default_factory=SliceSettings)

    def __post_init__(self) -> None:
        if self.csv is not None and self.list_file is not None:
            raise ValueError("both --csv and --list are given, expected at most one")
        if not self.split or not all(c.isascii() and (c.isalnum() or c in "_") for c in self.split):
            raise ValueError(f"split is {self.split!r}, expected letters, digits and underscores")
        if len(self.split) > 40:
            raise ValueError(f"split is {self.split!r}, expected at most 40 characters")
        for name, least in (("workers", 1), ("videos_per_shard", 1), ("timeout_seconds", 1), ("seed", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}, expected at least {least}")


class ProgressListener(Protocol):
    """What make_shards tells about its progress."""

    def start(self, num_videos: int, num_done: int) -> None:
        """There are `num_videos`, of which an earlier run did `num_done`."""

    def video_done(self, row: ReportRow) -> None:
        """One more video is sliced or skipped."""

    def message(self, text: str) -> None:
        """Something worth a line."""


class SilentProgress:
    """Tells nobody."""

    def start(self, num_videos: int, num_done: int) -> None:
        pass

    def video_done(self, row: ReportRow) -> None:
        pass

    def message(self, text: str) -> None:
        pass


def list_videos(config: ShardConfig, progress: ProgressListener | None = None) -> list[SourceVideo]:
    """Videos of the input, sorted by id; ValueError if there are none."""
    if config.csv is not None:
        return videos_of_kinetics(config.videos, config.csv, config.split, leave_out=config.out)
    if config.list_file is not None:
        videos, repeated = videos_of_list(config.videos, config.list_file)
        if repeated and progress is not None:
            progress.message(f"{config.list_file}: {repeated} lines name a video again and are left out")
        return videos
    return videos_of_folder(config.videos, leave_out=config.out)


def make_shards(config: ShardConfig, progress: ProgressListener | None = None) -> Manifest:
    """Write the shards, or finish writing them, or do nothing if they are there. Returns their manifest.

    Raises:
        ValueError: wrong input, or `out` holds shards of other videos or settings, or another run is writing
        there.
        NothingKept: no video gave a clip; `report.csv` tells why.
        OSError: the disk is full, or such.
    """
    progress = progress or SilentProgress()
    program = find_ffmpeg()
    videos = list_videos(config, progress)
    out = Path(config.out)
    identity = _identity(config, videos)
    finished = _finished_manifest(out, identity)
    if finished is not None:
        progress.message(f"{out} is finished already: nothing to do")
        shutil.rmtree(out / WORK_FOLDER, ignore_errors=True)
        return finished
    _refuse_foreign_shards(out)
    work = out / WORK_FOLDER
    work.mkdir(parents=True, exist_ok=True)
    with _locked(work):
        _write_plan(work, identity, ffmpeg_version(program))
        run = _Run(config, videos, program, progress)
        run.resume()
        run.work_off()
        manifest = run.finish(identity)
        shutil.rmtree(work)
    return manifest


def _identity(config: ShardConfig, videos: list[SourceVideo]) -> dict[str, Any]:
    """What the shards depend on."""
    return {
        "schema_version": SCHEMA_VERSION,
        "split": config.split,
        "seed": config.seed,
        "settings": {"videos_per_shard": config.videos_per_shard, **asdict(config.slicing)},
        "video_list_sha256": video_list_sha256(videos),
    }


def _differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """One phrase per setting in which two identities differ."""
    phrases = []
    old_flat = {**old, **old.get("settings", {})}
    for name, value in {**new, **new["settings"]}.items():
        if name == "settings" or old_flat.get(name) == value:
            continue
        if name == "video_list_sha256":
            phrases.append("another list of videos")
        else:
            phrases.append(f"{name} {old_flat.get(name)!r} (now {value!r})")
    return phrases


def _finished_manifest(out: Path, identity: dict[str, Any]) -> Manifest | None:
    """Manifest of a finished folder; None if it is not finished; ValueError if it is another one."""
    if not (out / MANIFEST_NAME).exists():
        return None
    manifest = read_manifest(out)
    different = _differences(asdict(manifest), identity)
    if different:
        raise ValueError(
            f"{out} holds finished shards made with {', '.join(different)}; expected the same: "
            f"choose another --out, or delete that folder"
        )
    for shard in manifest.shards:
        path = out / shard.name
        size = path.stat().st_size if path.exists() else None
        if size != shard.bytes or not path.with_suffix(".idx").exists():
            raise ValueError(
                f"{path} has {'no file' if size is None else f'{size} bytes'}, expected {shard.bytes} bytes "
                f"and an index by {MANIFEST_NAME}; copy it again, or delete {MANIFEST_NAME} and all shards"
            )
    return manifest


def _refuse_foreign_shards(out: Path) -> None:
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file, expected a folder or nothing there yet; choose another --out")
    if not (out / WORK_FOLDER / PLAN_NAME).exists() and out.is_dir():
        foreign = sorted(path.name for path in out.iterdir() if path.suffix in (".tar", ".idx"))
        if foreign:
            raise ValueError(
                f"{out} has {len(foreign)} tar and idx files ({foreign[0]}, ...) but neither manifest nor an "
                f"unfinished run; expected an empty folder: choose another --out, or delete them"
            )


def _write_plan(work: Path, identity: dict[str, Any], version: str) -> None:
    path = work / PLAN_NAME
    plan = {**identity, "ffmpeg": version}
    if not path.exists():
        write_atomically(path, json.dumps(plan, sort_keys=True, indent=1).encode("ascii"))
        return
    old = json.loads(path.read_bytes())
    different = _differences(old, identity)
    if old.get("ffmpeg") != version:
        different.append(f"ffmpeg {old.get('ffmpeg')!r} (now {version!r})")
    if different:
        raise ValueError(
            f"{work.parent} holds an unfinished run with {', '.join(different)}; expected the same, to go on "
            f"with it: repeat the old command, choose another --out, or delete that folder"
        )


@contextmanager
def _locked(work: Path) -> Iterator[None]:
    """Hold the folder for this process; the lock goes with the process, however that ends."""
    with open(work / "lock", "w", encoding="ascii") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"{work.parent} is being written by another make_shards; wait for it or stop it"
            ) from None
        yield


@dataclass(frozen=True)
class _SliceJob:
    number: int
    """Place of the video in the random order."""
    source: SourceVideo
    seed: int
    settings: SliceSettings
    program: str
    timeout_seconds: float
    work: str
    """Folder of this run for temporary files."""
    attempt: int = 0


@dataclass(frozen=True)
class _BlockJob:
    index: int
    sources: tuple[SourceVideo, ...]
    results: tuple[str, ...]
    """Result files, one per video."""
    config: ShardConfig
    work: str


def _do_job(job: "_SliceJob | _BlockJob") -> Any:
    """Runs in a worker process."""
    return _slice_job(job) if isinstance(job, _SliceJob) else _block_job(job)


def _slice_job(job: _SliceJob) -> tuple[str, ReportRow]:
    """Slices a video; returns the result file, under a temporary name, and its line of the report."""
    path = Path(job.work) / f"{job.number:07d}.tmp"
    write_result(path, job.source, _sliced(job))
    with ResultFile(path) as result:
        return str(path), result.result.row


def _sliced(job: _SliceJob) -> SlicedVideo:
    if job.source.path is None or not os.path.lexists(job.source.path):
        return SlicedVideo(reason="missing", seconds=0)
    if not os.path.isfile(job.source.path) or not os.access(job.source.path, os.R_OK):
        return SlicedVideo(reason="unreadable", seconds=0)
    return slice_video(
        job.source.path,
        job.source.video_id,
        job.seed,
        job.settings,
        job.program,
        job.timeout_seconds,
        job.work,
    )


def _block_job(job: _BlockJob) -> dict[str, Any]:
    """Writes the shards of a block, one per slot; returns the block's record."""
    rows, kept, orders = [], [], []
    num_slots, seed = job.config.slicing.max_clips, job.config.seed
    for source, path in zip(job.sources, job.results):
        with ResultFile(Path(path)) as file:
            rows.append(asdict(file.result.row))
            num_clips = len(file.result.clips)
        if num_clips:
            order: list[int] = []
            while len(order) < num_slots:  # a video with too few seconds begins again, in another order
                order += shuffled(range(num_clips), seed, "slots", source.video_id, len(order))
            kept.append((source, path))
            orders.append(order)
    entries = []
    for slot in range(num_slots if kept else 0):
        with ShardWriter(job.config.out, job.config.split, slot, job.index, work_folder=job.work) as writer:
            for (source, path), order in zip(kept, orders):
                with ResultFile(Path(path)) as file:
                    writer.write(*file.clip(order[slot], slot, source.key_hash))
        assert writer.entry is not None
        entries.append(asdict(writer.entry))
    return {"shards": entries, "rows": rows}


class _Run:
    """State of one run: which videos and blocks are done."""

    def __init__(
        self, config: ShardConfig, videos: list[SourceVideo], program: str, progress: ProgressListener
    ) -> None:
        self.config = config
        self.program = program
        self.progress = progress
        self.work = Path(config.out) / WORK_FOLDER
        self.temporary = self.work / f"tmp-{os.getpid()}-{time.time_ns():x}"
        self.videos = shuffled(videos, config.seed, "videos", name=lambda video: video.video_id)
        size = config.videos_per_shard
        self.blocks = [range(first, min(first + size, len(videos))) for first in range(0, len(videos), size)]
        self.missing = [len(block) for block in self.blocks]
        """Per block: videos without a result."""
        self.todo_videos: list[int] = []
        self.todo_blocks: list[int] = []

    def result_path(self, number: int) -> Path:
        return self.work / f"video-{number:07d}"

    def record_path(self, index: int) -> Path:
        return self.work / f"block-{index:06d}.json"

    def resume(self) -> None:
        """Find what earlier runs did, and clear away what they left half done."""
        names = set(os.listdir(self.work))
        for name in names:
            if name.startswith("tmp-"):
                shutil.rmtree(self.work / name, ignore_errors=True)
            elif name.startswith("."):
                (self.work / name).unlink(missing_ok=True)
        self.temporary.mkdir()
        num_done = 0
        for index, block in enumerate(self.blocks):
            if self.record_path(index).name in names:
                self.missing[index] = 0
                num_done += len(block)
                for number in block:
                    if self.result_path(number).name in names:
                        self.result_path(number).unlink()
                continue
            for number in block:
                if self.result_path(number).name in names and self._is_whole(number):
                    self.missing[index] -= 1
                    num_done += 1
                else:
                    self.todo_videos.append(number)
            if self.missing[index] == 0:
                self.todo_blocks.append(index)
        self.todo_videos.reverse()  # taken from the end
        self.progress.start(len(self.videos), num_done)

    def _is_whole(self, number: int) -> bool:
        try:
            ResultFile(self.result_path(number)).close()
        except (ValueError, KeyError, TypeError):
            return False
        return True

    def next_job(self) -> "_SliceJob | _BlockJob | None":
        if self.todo_blocks:
            return self._block_job(self.todo_blocks.pop(0))
        if self.todo_videos:
            return self._slice_job(self.todo_videos.pop())
        return None

    def _slice_job(self, number: int, attempt: int = 0) -> _SliceJob:
        return _SliceJob(
            number=number,
            source=self.videos[number],
            seed=self.config.seed,
            settings=self.config.slicing,
            program=self.program,
            timeout_seconds=self.config.timeout_seconds,
            work=str(self.temporary),
            attempt=attempt,
        )

    def _block_job(self, index: int) -> _BlockJob:
        block = self.blocks[index]
        return _BlockJob(
            index=index,
            sources=tuple(self.videos[number] for number in block),
            results=tuple(str(self.result_path(number)) for number in block),
            config=self.config,
            work=str(self.temporary),
        )

    def work_off(self) -> None:
        # Two passes at most, each with its own limit, and the rest of the work on a video.
        limit = 2 * self.config.timeout_seconds + 60
        for job, outcome in run_jobs(_do_job, self.next_job, self.config.workers, limit):
            if isinstance(job, _BlockJob):
                if isinstance(outcome, Lost):
                    raise OSError(
                        f"writing the shards of block {job.index} ended with {outcome.reason}; run the same "
                        f"command again, it goes on where it stopped"
                    )
                self._block_done(job.index, outcome)
            elif isinstance(outcome, Lost):
                self._lost(job, outcome.reason)
            else:
                self._video_done(job.number, *outcome)

    def _lost(self, job: _SliceJob, reason: str) -> None:
        """The process died or hung on a video. A death may have had another cause (memory), so it is tried
        again."""
        if reason == "crash" and job.attempt == 0:
            path, row = None, None
            jobs = [self._slice_job(job.number, attempt=1)]
            limit = 2 * job.timeout_seconds + 60
            for _, outcome in run_jobs(_do_job, lambda: jobs.pop() if jobs else None, 1, limit):
                if not isinstance(outcome, Lost):
                    path, row = outcome
            if path is not None and row is not None:
                self._video_done(job.number, path, row)
                return
        path = str(self.temporary / f"{job.number:07d}.tmp")
        write_result(Path(path), job.source, SlicedVideo(reason=reason, seconds=0))
        with ResultFile(Path(path)) as file:
            self._video_done(job.number, path, file.result.row)

    def _video_done(self, number: int, path: str, row: ReportRow) -> None:
        os.replace(path, self.result_path(number))
        self.progress.video_done(row)
        index = number // self.config.videos_per_shard
        self.missing[index] -= 1
        if self.missing[index] == 0:
            self.todo_blocks.append(index)

    def _block_done(self, index: int, record: dict[str, Any]) -> None:
        write_atomically(self.record_path(index), json.dumps(record, separators=(",", ":")).encode("ascii"))
        for number in self.blocks[index]:
            self.result_path(number).unlink()

    def finish(self, identity: dict[str, Any]) -> Manifest:
        """Write report and manifest."""
        shards: list[ShardEntry] = []
        rows: list[ReportRow] = []
        for index in range(len(self.blocks)):
            record = json.loads(self.record_path(index).read_bytes())
            shards += [ShardEntry(**entry) for entry in record["shards"]]
            rows += [ReportRow(**row) for row in record["rows"]]
        rows.sort(key=lambda row: os.fsencode(row.path))
        out = Path(self.config.out)
        for name in (REPORT_NAME, MANIFEST_NAME):
            for abandoned in out.glob(f".{name}.*.tmp"):  # of a run that was killed while it wrote
                abandoned.unlink()
        write_atomically(out / REPORT_NAME, report_csv(rows))
        skipped = Counter(row.reason for row in rows if row.status == "skipped")
        if not shards:
            reasons = ", ".join(f"{reason} {count}" for reason, count in skipped.most_common())
            raise NothingKept(
                f"none of {len(rows)} videos gave a clip ({reasons}); expected at least one with a second of "
                f"picture and sound: see {out / REPORT_NAME}"
            )
        manifest = Manifest(
            **identity,
            ffmpeg=ffmpeg_version(self.program),
            num_slots=self.config.slicing.max_clips,
            num_videos=sum(row.status == "kept" for row in rows),
            num_clips=sum(shard.num_clips for shard in shards),
            num_distinct_clips=sum(row.num_clips for row in rows),
            num_bytes=sum(shard.bytes for shard in shards),
            skipped=dict(sorted(skipped.items())),
            shards=tuple(sorted(shards, key=lambda shard: (shard.slot, shard.index))),
        )
        write_manifest(out, manifest)
        return manifest


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What a dry run expects, from a sample of the videos."""

    num_videos: int
    num_sampled: int
    num_kept: int
    """Of the sample."""
    skipped: dict[str, int]
    """Of the sample, by reason."""
    num_clips: int
    """Expected, over all slots."""
    num_distinct_clips: int
    num_bytes: int
    seconds: float
    """Expected wall time."""


def estimate_shards(config: ShardConfig, progress: ProgressListener | None = None) -> Estimate:
    """Slice a few videos (the first of the random order) and extrapolate. Writes nothing to `out`.

    Raises:
        ValueError: wrong input.
    """
    progress = progress or SilentProgress()
    program = find_ffmpeg()
    videos = shuffled(list_videos(config, progress), config.seed, "videos", name=lambda video: video.video_id)
    sample = videos[: max(DRY_RUN_VIDEOS, config.workers)]
    progress.start(len(sample), 0)
    rows, num_bytes = [], 0
    with tempfile.TemporaryDirectory(prefix="make_shards-") as folder:
        jobs = [
            _SliceJob(number, video, config.seed, config.slicing, program, config.timeout_seconds, folder)
            for number, video in enumerate(sample)
        ]
        begin = time.monotonic()
        for _job, outcome in run_jobs(
            _do_job, lambda: jobs.pop(0) if jobs else None, config.workers, 2 * config.timeout_seconds + 60
        ):
            if isinstance(outcome, Lost):
                rows.append(
                    ReportRow(path="", status="skipped", reason=outcome.reason, num_clips=0, seconds=0)
                )
            else:
                path, row = outcome
                rows.append(row)
                with ResultFile(Path(path)) as file:
                    if row.num_clips:
                        clip_bytes = file.result.num_bytes / row.num_clips
                        # Each member is padded to blocks of 512 bytes and has a header of 512; key.json is
                        # below 1024.
                        num_bytes += config.slicing.max_clips * (clip_bytes + 3 * 512 + 2 * 256 + 1024)
                os.unlink(path)
            progress.video_done(rows[-1])
        elapsed = time.monotonic() - begin
    factor = len(videos) / len(sample)
    kept = [row for row in rows if row.status == "kept"]
    return Estimate(
        num_videos=len(videos),
        num_sampled=len(sample),
        num_kept=len(kept),
        skipped=dict(Counter(row.reason for row in rows if row.status == "skipped")),
        num_clips=round(len(kept) * factor * config.slicing.max_clips),
        num_distinct_clips=round(sum(row.num_clips for row in kept) * factor),
        num_bytes=round(num_bytes * factor),
        seconds=elapsed * factor,
    )


def report_csv(rows: list[ReportRow]) -> bytes:
    """`report.csv`: UTF-8, except for paths that are not."""
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(REPORT_COLUMNS)
    for row in rows:
        writer.writerow([getattr(row, column) for column in REPORT_COLUMNS])
    return text.getvalue().encode("utf-8", "surrogateescape")


def read_report(path: str | os.PathLike) -> list[ReportRow]:
    """Rows of a `report.csv`."""
    with open(path, encoding="utf-8", errors="surrogateescape", newline="") as file:
        return [
            ReportRow(**{**row, "num_clips": int(row["num_clips"]), "seconds": int(row["seconds"])})
            for row in csv.DictReader(file)
        ]
