"""Videos -> a folder of shards: the engine behind `tools/make_shards.py`.

The videos are put in random order once, by seed, and cut into blocks of `videos_per_shard`. A block becomes
one shard per slot; what is in it depends on the seed and the list of videos alone, not on who works on it where
or how often. Workers (`shards.jobs`, brought to them by one of `shards.engines`) leave one result file per video
in the work area, `OUT/.work`; when all of a block's are there, its shards are written, a record of the block
replaces them, and after the last block the report and the manifest are written, and the work area goes. Every
step ends in a rename or in the upload of a whole object, so a run that was killed goes on where it stopped.
"""

import csv
import io
import json
import os
import re
import shutil
import socket
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from shards import lease, storage
from shards.engines import EngineConfig, open_engine
from shards.engines.slurm import FOLDER as SLURM_FOLDER
from shards.engines.slurm import processes_per_job
from shards.ffmpeg import ffmpeg_version, find_ffmpeg
from shards.jobs import (
    RECORD_PREFIX,
    BlockJob,
    RunSettings,
    SliceJob,
    do_job,
    give_up,
    read_record,
    record_location,
    remove_all,
)
from shards.manifest import MANIFEST_NAME, MAX_SHARDS, Manifest, ShardEntry, read_manifest, write_manifest
from shards.media import SourceLimits
from shards.order import shuffled
from shards.pool import Lost, run_jobs, usable_cores
from shards.reader import find_shard_fault, index_fault
from shards.results import RESULT_PREFIX, ReportRow, ResultFile, result_location
from shards.schema import SCHEMA_VERSION
from shards.slicing import SliceSettings
from shards.sources import (
    SourceVideo,
    video_list_sha256,
    videos_of_csv,
    videos_of_folder,
    videos_of_list,
)

WORK_FOLDER = ".work"
PLAN_NAME = "plan.json"
TEMPORARY_PREFIX = ".make_shards-"
"""Of folders in the work area. Hidden: they hold videos, and may lie below the folder of videos."""
REPORT_NAME = "report.csv"
REPORT_COLUMNS = ("path", "status", "reason", "num_clips", "seconds")
DRY_RUN_VIDEOS = 16
"""A dry run slices so many videos."""
ATTEMPTS = 4
"""A job whose worker dies is given to others until so many have died of it."""
TRANSFER_SECONDS = 3600.0
"""More time for a job that reads or writes at URLs, whose own limits are about progress."""
VIDEOS_BETWEEN = 50
"""Before a video whose worker died is tried again, so many others come: the machine may lack memory for now."""
EXAMPLES = 5
"""Names in a message."""


class NothingKept(ValueError):
    """Not one video gave a clip."""


@dataclass(frozen=True, kw_only=True)
class ShardConfig:
    """One run of make_shards."""

    videos: str
    """Folder of videos. This and the next four may be URLs."""
    out: str
    """Folder for the shards of one split."""
    csv: str | None = None
    """Annotations of Kinetics, AudioSet or VGGSound: rows of `split` are taken, looked for in `videos`."""
    class_names: str | None = None
    """AudioSet's `class_labels_indices.csv`, for labels with names."""
    list_file: str | None = None
    """File with one path per line, relative to `videos`."""
    split: str = "train"
    """Name that shards start with."""
    seed: int = 0
    workers: int = field(default_factory=usable_cores)
    """Processes, Ray tasks or Slurm jobs at the same time; does not change a byte, nor does `engine`."""
    engine: EngineConfig = field(default_factory=EngineConfig)
    """What runs the workers."""
    work: str | None = None
    """Location of the work area, which all workers reach; None: `.work` in `out`."""
    verify: bool = False
    """Of finished shards, compare the checksums and not only the sizes."""
    videos_per_shard: int = 1000
    timeout_seconds: float = 300.0
    """For one ffmpeg pass over one video."""
    max_source_bytes: int = 16 << 30
    """Larger files are left out as `too-large`."""
    skip_unavailable: bool = False
    """Leave out videos whose URLs are refused (401, 403, 410 ...) or cannot be read while others can, as `refused` and
    `unreachable`. If not, the first stops the run: that is how expired credentials and a lost network look, too."""
    limits: SourceLimits = field(default_factory=SourceLimits)
    """On what a file may ask of the machine."""
    slicing: SliceSettings = field(default_factory=SliceSettings)

    def __post_init__(self) -> None:
        if self.csv is not None and self.list_file is not None:
            raise ValueError("both --csv and --list are given, expected at most one")
        if not self.split or not all(c.isascii() and (c.isalnum() or c in "_") for c in self.split):
            raise ValueError(f"split is {self.split!r}, expected letters, digits and underscores")
        if len(self.split) > 40:
            raise ValueError(f"split is {self.split!r}, expected at most 40 characters")
        for name, least in (
            ("workers", 1), ("videos_per_shard", 1), ("timeout_seconds", 1), ("max_source_bytes", 1), ("seed", 0)
        ):  # fmt: skip
            if not getattr(self, name) >= least:  # nan is not
                raise ValueError(f"{name} is {getattr(self, name)}, expected at least {least}")

    @property
    def work_location(self) -> str:
        """Where the work area is."""
        return self.work or storage.join(self.out, WORK_FOLDER)

    def job_seconds(self, videos: Iterable[SourceVideo]) -> float:
        """Limit of one job: two passes at most, each with its own limit, and the rest of the work on it.

        videos: of this run; a list may name URLs though `videos` is a folder.
        """
        remote = any(map(storage.is_url, (self.videos, self.out, self.work_location))) or any(
            video.path is not None and storage.is_url(video.path) for video in videos
        )
        return 2 * self.timeout_seconds + 60 + (TRANSFER_SECONDS if remote else 0)


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
        return videos_of_csv(
            config.videos, config.csv, config.split, config.class_names, leave_out=config.out
        )
    if config.list_file is not None:
        videos, repeated = videos_of_list(config.videos, config.list_file)
        if repeated and progress is not None:
            progress.message(f"{config.list_file}: {repeated} lines name a video again and are left out")
        return videos
    return videos_of_folder(config.videos, leave_out=config.out)


def make_shards(config: ShardConfig, progress: ProgressListener | None = None) -> Manifest:
    """Write the shards, or finish writing them, or make those again that are missing or damaged, or do nothing
    if they are there. Returns their manifest.

    Raises:
        ValueError: wrong input, or `out` holds shards of other videos or settings, or another run is writing
        there.
        NothingKept: no video gave a clip; `report.csv` tells why.
        OSError: the disk is full, or such.
    """
    progress = progress or SilentProgress()
    program = find_ffmpeg()
    version = ffmpeg_version(program)
    videos = list_videos(config, progress)
    num_shards = config.slicing.max_clips * -(-len(videos) // config.videos_per_shard)
    if num_shards > MAX_SHARDS:
        raise ValueError(
            f"{len(videos)} videos would become {num_shards} shards, expected at most {MAX_SHARDS}; raise "
            f"--videos-per-shard (now {config.videos_per_shard})"
        )
    identity = _identity(config, videos)
    if not storage.is_url(config.out) and os.path.exists(config.out) and not os.path.isdir(config.out):
        raise ValueError(
            f"{config.out} is a file, expected a folder or nothing there yet; choose another --out"
        )
    finished = _finished_manifest(config.out, identity)
    bad: list[ShardEntry] = []
    if finished is not None:
        bad = _bad_shards(config.out, finished.shards, config.verify)
        if not bad:
            progress.message(f"{config.out} is finished already: nothing to do")
            _clear_left_work(config, identity)
            return finished
        names = ", ".join(entry.name for entry in bad[:EXAMPLES]) + (", ..." if len(bad) > EXAMPLES else "")
        progress.message(
            f"{len(bad)} of {len(finished.shards)} shards are missing or damaged and made again: {names}"
        )
        if finished.ffmpeg != version:
            raise ValueError(
                f"{config.out} was made with {finished.ffmpeg!r}, now there is {version!r}: {names} would differ; "
                f"install that version, copy the shards again, or delete the folder"
            )
    else:
        _refuse_foreign_shards(config)
    if not storage.is_url(config.work_location):
        os.makedirs(config.work_location, exist_ok=True)
    if not storage.is_url(config.out):
        os.makedirs(config.out, exist_ok=True)
    with lease.held(config.work_location, config.out) as check_lease:
        _write_plan(config, identity, version)
        run = _Run(config, videos, program, version, progress, check_lease, bad)
        run.resume()
        run.work_off()
        manifest = run.finish(identity) if finished is None else finished
        _clear_work(config.work_location)
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
    # What an older version did not write down, it did as the defaults do.
    old_flat = {**asdict(SliceSettings()), **old, **old.get("settings", {})}
    for name, value in {**new, **new["settings"]}.items():
        if name == "settings" or old_flat.get(name) == value:
            continue
        if name == "video_list_sha256":
            phrases.append("another list of videos")
        else:
            phrases.append(f"{name} {old_flat.get(name)!r} (now {value!r})")
    return phrases


def _finished_manifest(out: str, identity: dict[str, Any]) -> Manifest | None:
    """Manifest of a finished folder; None if it is not finished; ValueError if it is another one."""
    if storage.size(storage.join(out, MANIFEST_NAME)) is None:
        return None
    manifest = read_manifest(out)
    different = _differences(asdict(manifest), identity)
    if different:
        raise ValueError(
            f"{out} holds finished shards made with {', '.join(different)}; expected the same: "
            f"choose another --out, or delete that folder"
        )
    return manifest


def _bad_shards(out: str, entries: Sequence[ShardEntry], verify: bool) -> list[ShardEntry]:
    """Those of the shards that are not there, or without index, or of another size, or with `verify` of another
    checksum. An index that is no such one counts as none; behind a URL it is looked at with `verify`."""
    sizes = storage.list_sizes(out)

    def is_good(entry: ShardEntry) -> bool:
        if sizes.get(entry.name) != entry.bytes or _index_name(entry) not in sizes:
            return False
        if not storage.is_url(out):
            if find_shard_fault(os.path.join(out, entry.name), entry.num_clips, entry.bytes) is not None:
                return False
        elif verify and index_fault(
            storage.read_bytes(storage.join(out, _index_name(entry))), entry.num_clips
        ):
            return False
        return not verify or storage.checksum(storage.join(out, entry.name)) == entry.sha256

    with ThreadPoolExecutor(usable_cores()) as threads:
        return [entry for entry, good in zip(entries, threads.map(is_good, entries)) if not good]


def _index_name(entry: ShardEntry) -> str:
    return entry.name.removesuffix(".tar") + ".idx"


def _refuse_foreign_shards(config: ShardConfig) -> None:
    out = config.out
    if storage.size(storage.join(config.work_location, PLAN_NAME)) is None:
        foreign = [name for name in storage.list_names(out) if name.endswith((".tar", ".idx"))]
        if foreign:
            raise ValueError(
                f"{out} has {len(foreign)} tar and idx files ({foreign[0]}, ...) but neither manifest nor an "
                f"unfinished run ({config.work_location}); expected an empty folder: choose another --out, or "
                f"delete them"
            )


def _write_plan(config: ShardConfig, identity: dict[str, Any], version: str) -> None:
    old = _read_plan(config.work_location)
    if old is None:
        plan = json.dumps({**identity, "ffmpeg": version}, sort_keys=True, indent=1)
        storage.write_bytes(storage.join(config.work_location, PLAN_NAME), plan.encode("ascii"))
        return
    different = _differences(old, identity)
    if old.get("ffmpeg") != version:
        different.append(f"ffmpeg {old.get('ffmpeg')!r} (now {version!r})")
    if different:
        raise ValueError(
            f"{config.out} holds an unfinished run with {', '.join(different)}; expected the same, to go on "
            f"with it: repeat the old command, choose another --out, or delete that folder"
        )


def _read_plan(work: str) -> dict[str, Any] | None:
    """Identity and ffmpeg of the run that a work area is of; None if it is of none."""
    try:
        return json.loads(storage.read_bytes(storage.join(work, PLAN_NAME)))
    except FileNotFoundError:
        return None


def _clear_left_work(config: ShardConfig, identity: dict[str, Any]) -> None:
    """Remove what a run that was killed at its very end left in the work area, unless another is at work there."""
    work = config.work_location
    plan = _read_plan(work)
    if plan is None:
        names = (lease.LEASE_NAME, lease.LOCK_NAME)
        if all(storage.size(storage.join(work, name)) is None for name in names):
            return
    elif _differences(plan, identity):
        return
    try:
        with lease.held(work, config.out):
            _clear_work(work)
    except ValueError:
        pass  # it is held


def _clear_work(work: str) -> None:
    """Remove the work area, but nothing in it that is not ours, as a user may have named any folder.

    The plan goes last: without it, what is there would belong to nobody.
    """
    names = storage.find_names(work)
    ours = [name for name in names if _RESULT_OR_RECORD.fullmatch(name) or _is_abandoned(name)]
    remove_all(storage.join(work, name) for name in ours)
    if not storage.is_url(work):
        for name in storage.list_names(work):
            if name.startswith(TEMPORARY_PREFIX) or name == SLURM_FOLDER:
                shutil.rmtree(os.path.join(work, name), ignore_errors=True)
    for name in (PLAN_NAME, lease.LOCK_NAME):
        storage.remove(storage.join(work, name))
    if not storage.is_url(work):
        try:
            os.rmdir(work)
        except OSError:
            pass  # not there, or it holds something else


_RESULT_OR_RECORD = re.compile(rf"{RESULT_PREFIX}\d{{7,}}|{RECORD_PREFIX}\d{{6,}}\.json")
_SHARD_FILE = r"\w+-slot\d+-\d+\.(tar|idx)"
_OTHER_FILES = (PLAN_NAME, lease.LEASE_NAME, REPORT_NAME, MANIFEST_NAME)
_ABANDONED = re.compile(
    rf"\.({_RESULT_OR_RECORD.pattern}|{_SHARD_FILE}|{'|'.join(map(re.escape, _OTHER_FILES))})\.[0-9a-f-]+\.tmp"
)


def _is_abandoned(name: str) -> bool:
    """Whether a file is a temporary one of this program that it did not come to rename."""
    return _ABANDONED.fullmatch(name) is not None


class _Run:
    """State of one run: which videos and blocks are done."""

    def __init__(
        self,
        config: ShardConfig,
        videos: list[SourceVideo],
        program: str,
        version: str,
        progress: ProgressListener,
        check_lease: Callable[[], None],
        bad: list[ShardEntry],
    ) -> None:
        """bad: of a finished folder, the shards to make again; else empty, and all are made."""
        self.config = config
        self.version = version
        self.progress = progress
        self.check_lease = check_lease
        self.work = config.work_location
        self.settings = run_settings(config, program, version, self.work)
        self.videos = shuffled(videos, config.seed, "videos", name=lambda video: video.video_id)
        size = config.videos_per_shard
        self.blocks = [range(first, min(first + size, len(videos))) for first in range(0, len(videos), size)]
        self.expected: dict[int, dict[str, str]] = {}
        """Per block of which shards are made again: their names, with the checksums they have to have."""
        for entry in bad:
            self.expected.setdefault(entry.index, {})[entry.name] = entry.sha256
        self.missing = [len(block) for block in self.blocks]
        """Per block: videos without a result."""
        self.todo_videos: list[int] = []
        self.todo_blocks: list[int] = []
        self.deaths: Counter[str] = Counter()
        """Per video or block: how many workers died of it."""

    def resume(self) -> None:
        """Find what earlier runs did, and clear away what they left half done."""
        names = set(storage.list_names(self.work))
        if self.settings.temporary is not None:
            for name in names:
                if name.startswith(TEMPORARY_PREFIX):
                    shutil.rmtree(os.path.join(self.work, name), ignore_errors=True)
                elif _is_abandoned(name):
                    storage.remove(storage.join(self.work, name))
            os.mkdir(self.settings.temporary)
        wanted = sorted(self.expected) or range(len(self.blocks))
        there = storage.list_sizes(self.config.out)
        num_done = 0
        for index in wanted:
            block = self.blocks[index]
            if os.path.basename(record_location(self.work, index)) in names:
                if not self.expected and self._has_shards(index, there):
                    num_done += len(block)
                    remove_all(
                        result_location(self.work, number)
                        for number in block
                        if f"{RESULT_PREFIX}{number:07d}" in names
                    )
                    continue
                storage.remove(record_location(self.work, index))
            self.missing[index] = 0
            for number in block:
                if f"{RESULT_PREFIX}{number:07d}" in names and self._is_whole(number):
                    num_done += 1
                else:
                    self.missing[index] += 1
                    self.todo_videos.append(number)
            if self.missing[index] == 0:
                self.todo_blocks.append(index)
        self.todo_videos.reverse()  # taken from the end
        self.progress.start(sum(len(self.blocks[index]) for index in wanted), num_done)

    def _has_shards(self, index: int, sizes: dict[str, int | None]) -> bool:
        """Whether the shards of a block are there that its record names."""
        record = read_record(self.work, index)
        return record is not None and all(
            sizes.get(entry.name) == entry.bytes and _index_name(entry) in sizes
            for entry in (ShardEntry(**fields) for fields in record["shards"])
        )

    def _is_whole(self, number: int) -> bool:
        if storage.is_url(self.work):
            return True  # objects are
        try:
            ResultFile(Path(result_location(self.work, number))).close()
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            return False
        return True

    def next_job(self) -> SliceJob | BlockJob | None:
        if self.todo_blocks:
            index = self.todo_blocks.pop(0)
            block = self.blocks[index]
            return BlockJob(
                index=index,
                first=block.start,
                sources=tuple(self.videos[number] for number in block),
                run=self.settings,
                expected=self.expected.get(index),
            )
        if self.todo_videos:
            number = self.todo_videos.pop()
            source = self.videos[number]
            if source.path is not None and not storage.is_url(source.path):
                # Workers may start elsewhere. Not `abspath`, to which `link/..` is nothing.
                source = replace(source, path=os.path.join(os.getcwd(), source.path))
            return SliceJob(number=number, source=source, run=self.settings)
        return None

    def work_off(self) -> None:
        run_jobs = open_engine(self.config.engine, self.work)
        limit_seconds = self.config.job_seconds(self.videos)
        for job, outcome in run_jobs(do_job, self.next_job, self.config.workers, limit_seconds):
            self.check_lease()
            if isinstance(outcome, Lost):
                self._lost(job, outcome.reason)
            elif isinstance(job, SliceJob):
                self._video_done(job.number, outcome)
            elif "unexpected" in outcome:
                raise ValueError(
                    f"{outcome['unexpected']} by {MANIFEST_NAME} of {self.config.out}: a video was changed, or "
                    f"ffmpeg or the processor gives other bytes; bring back what there was, copy the shard "
                    f"again, or delete the folder and make all shards again"
                )

    def _lost(self, job: SliceJob | BlockJob, reason: str) -> None:
        """The process died or hung. A death may have had another cause than the video (memory, an end of the
        machine), so it is tried again, a little later."""
        key = f"video {job.number}" if isinstance(job, SliceJob) else f"block {job.index}"
        self.deaths[key] += 1
        if reason == "crash" and self.deaths[key] < ATTEMPTS:
            if isinstance(job, SliceJob):
                self.todo_videos.insert(max(len(self.todo_videos) - VIDEOS_BETWEEN, 0), job.number)
            else:
                self.todo_blocks.append(job.index)
        elif isinstance(job, SliceJob):
            self._video_done(job.number, give_up(job, reason))
        else:
            raise OSError(
                f"writing the shards of {key} ended with {reason}; run the same command again, it goes on where "
                f"it stopped"
            )

    def _video_done(self, number: int, row: ReportRow) -> None:
        self.progress.video_done(row)
        index = number // self.config.videos_per_shard
        self.missing[index] -= 1
        if self.missing[index] == 0:
            self.todo_blocks.append(index)

    def finish(self, identity: dict[str, Any]) -> Manifest:
        """Write report and manifest."""
        out = self.config.out
        shards: list[ShardEntry] = []
        rows: list[ReportRow] = []
        for index in range(len(self.blocks)):
            record = read_record(self.work, index)
            assert record is not None, index
            shards += [ShardEntry(**entry) for entry in record["shards"]]
            rows += [ReportRow(**row) for row in record["rows"]]
        rows.sort(key=lambda row: os.fsencode(row.path))
        for name in storage.list_names(out):
            if _is_abandoned(name):
                storage.remove(storage.join(out, name))  # of a run that was killed while it wrote
        report = storage.join(out, REPORT_NAME)
        storage.write_bytes(report, report_csv(rows))
        skipped = Counter(row.reason for row in rows if row.status == "skipped")
        if not shards:
            reasons = ", ".join(f"{reason} {count}" for reason, count in skipped.most_common())
            raise NothingKept(
                f"none of {len(rows)} videos gave a clip ({reasons}); expected at least one with a second of "
                f"picture and sound: see {report}"
            )
        manifest = Manifest(
            **identity,
            ffmpeg=self.version,
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


def run_settings(config: ShardConfig, program: str, version: str, work: str) -> RunSettings:
    """What the jobs of a run have to know; local locations are absolute, as workers may start elsewhere."""
    out, work = (
        location if storage.is_url(location) else os.path.abspath(location) for location in (config.out, work)
    )
    temporary = None
    if not storage.is_url(work):
        temporary = os.path.join(
            work, f"{TEMPORARY_PREFIX}{socket.gethostname()}-{os.getpid()}-{time.time_ns():x}"
        )
    return RunSettings(
        out=out,
        work=work,
        temporary=temporary,
        split=config.split,
        seed=config.seed,
        slicing=config.slicing,
        program=program,
        ffmpeg=version,
        timeout_seconds=config.timeout_seconds,
        max_source_bytes=config.max_source_bytes,
        skip_unavailable=config.skip_unavailable,
        limits=config.limits,
    )


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
    workers: int
    """Videos at the same time in the run that is expected, each by a worker as fast as a core of this machine."""
    seconds: float
    """Expected wall time."""


def estimate_shards(config: ShardConfig, progress: ProgressListener | None = None) -> Estimate:
    """Slice a few videos (the first of the random order) and extrapolate. Writes nothing to `out`.

    They are sliced by processes of this machine, one per core at most, whatever the engine.

    Raises:
        ValueError: wrong input.
    """
    progress = progress or SilentProgress()
    program = find_ffmpeg()
    videos = shuffled(list_videos(config, progress), config.seed, "videos", name=lambda video: video.video_id)
    workers = _videos_at_once(config, len(videos))
    sample = videos[:DRY_RUN_VIDEOS]
    progress.start(len(sample), 0)
    rows, num_bytes, busy_seconds = [], 0, 0.0
    with tempfile.TemporaryDirectory(prefix="make_shards-") as folder:
        settings = run_settings(config, program, ffmpeg_version(program), folder)
        os.mkdir(settings.temporary)
        jobs = [SliceJob(number=number, source=video, run=settings) for number, video in enumerate(sample)]
        begun: dict[int, float] = {}

        def next_job() -> SliceJob | None:
            if not jobs:
                return None
            job = jobs.pop(0)
            begun[job.number] = time.monotonic()
            return job

        num_processes = min(config.workers, usable_cores())
        for job, outcome in run_jobs(_do_timed, next_job, num_processes, config.job_seconds(sample)):
            if isinstance(outcome, Lost):
                row, seconds = give_up(job, outcome.reason), time.monotonic() - begun[job.number]
            else:
                row, seconds = outcome
            busy_seconds += seconds
            rows.append(row)
            if row.num_clips:
                with ResultFile(Path(result_location(folder, job.number))) as file:
                    clip_bytes = file.result.num_bytes / row.num_clips
                # Each member is padded to blocks of 512 bytes and has a header of 512; key.json is below 1024.
                num_bytes += config.slicing.max_clips * (clip_bytes + 3 * 512 + 2 * 256 + 1024)
            os.unlink(result_location(folder, job.number))
            progress.video_done(row)
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
        workers=workers,
        seconds=busy_seconds * factor / workers,
    )


def _do_timed(job: SliceJob) -> tuple[ReportRow, float]:
    """Result of a job, and the seconds that it took; without the start of the process."""
    begin = time.monotonic()
    row = do_job(job)
    return row, time.monotonic() - begin


def _videos_at_once(config: ShardConfig, num_videos: int) -> int:
    """Videos that the engine of a run works on at the same time; on this machine, one per core at most."""
    engine = config.engine
    if engine.name == "slurm":
        num_jobs = min(config.workers, -(-num_videos // engine.slurm_chunk))
        return min(num_jobs * processes_per_job(dict(engine.slurm_options)), num_videos)
    if engine.name == "ray" and engine.ray_address is not None:
        return min(config.workers, num_videos)
    return min(config.workers, usable_cores(), num_videos)


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
