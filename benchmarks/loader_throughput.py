"""Clips per second of this project's loaders and of what a user could pick instead, on the same videos.

    python benchmarks/loader_throughput.py [--videos FOLDER] [--shards FOLDER] [--only NAME ...] [--rounds 5]
        [--seconds 4] [--batch 16] [--workers N] [--cold] [--quick] [--output FOLDER] [--note TEXT]

Each contender (`benchmarks/contenders`) lives in a process of its own and decodes the same clips. First its output
without augmentation is compared with the reference; who fails is shown as failed and not timed. Then, in rounds (ABAB,
each beginning further on), each takes a turn while the processes of all others are stopped: what it has fetched
ahead is taken and not counted, then batches are counted for some seconds. Ratios are those of turns of the same round.
The CPU time is that of the contender's whole process tree; `foreign` is what the rest of the machine used meanwhile.

The ceiling is the fastest bare decoder: the same clips, in memory already, decoded to YUV and dropped.

Without --videos and --shards: the real videos that CMAC_DATA (default ../shared/data) holds in av_videos, or synthetic
ones. `--quick` uses synthetic ones, few contenders and short turns: for CI, not for figures.
"""

import argparse
import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402

from benchmarks.common import RESULTS, ROOT, append_row, make_row, quantiles, usable_cores  # noqa: E402
from benchmarks.contenders import CONTENDERS, Contender, scaling_contenders  # noqa: E402
from benchmarks.contenders.base import PREFETCH_PER_WORKER, Workload  # noqa: E402
from benchmarks.contenders.content import LEAST_PSNR, MOST_LOG_MEL_ERROR, write_reference  # noqa: E402
from benchmarks.contenders.host import ContenderFailed, HostedContender  # noqa: E402
from benchmarks.contenders.material import Material, prepare  # noqa: E402

CHECKED_CLIPS = 8
ROTATION = 7  # contenders further on that each round begins
QUICK = {"rounds": 2, "seconds": 0.8, "batch": 8}
MEMORY_PER_PROCESS = 350e6
"""Bytes that a contender's process is expected to need; with less memory they are started anew for each turn."""
FOREIGN_LIMIT = 0.05
"""Share of the machine's cores that others may use before the result is called disturbed."""


@dataclass(frozen=True, kw_only=True)
class Turn:
    """What one contender did in one round."""

    num_clips: int
    num_bad: int
    num_batches: int
    seconds: float
    cpu_seconds: float
    read_bytes: int | None
    wait_seconds: float
    foreign_cpu_seconds: float
    stolen_cpu_seconds: float
    memory_bytes: int

    @property
    def clips_per_second(self) -> float:
        return self.num_clips / self.seconds

    @property
    def cpu_seconds_per_clip(self) -> float:
        return self.cpu_seconds / max(self.num_clips, 1)


@dataclass(kw_only=True)
class Entry:
    """A contender in this run."""

    contender: Contender
    workload: Workload
    status: str = "timed"
    """`timed`, `not installed`, `not available`, `wrong content`, or `failed`."""
    reason: str | None = None
    """Why it is not timed."""
    check: dict[str, Any] | None = None
    """As content.Comparison."""
    first_batch_seconds: float | None = None
    gpu_memory_bytes: int | None = None
    turns: list[Turn | None] = field(default_factory=list)
    """By round; None where it had failed."""
    host: HostedContender | None = None

    @property
    def is_alive(self) -> bool:
        return self.status == "timed"

    def fail(self, status: str, reason: str) -> None:
        """Takes it out of the run."""
        self.status, self.reason = status, reason
        if self.host is not None:
            self.host.close()
            self.host = None

    @property
    def rate(self) -> float | None:
        """Median of clips per second."""
        rates = [turn.clips_per_second for turn in self.turns if turn is not None]
        return float(np.median(rates)) if rates else None

    @property
    def cpu_per_clip(self) -> float | None:
        """Median of CPU seconds per clip."""
        costs = [turn.cpu_seconds_per_clip for turn in self.turns if turn is not None and turn.num_clips]
        return float(np.median(costs)) if costs else None


@dataclass(frozen=True, kw_only=True)
class Ratio:
    """One line of what the run must show."""

    claim: str
    ours: str
    other: str
    by: str
    """`time`: clips per second; `CPU`: clips per CPU second."""
    median: float
    p20: float
    p80: float
    target: float | None

    @property
    def is_met(self) -> bool | None:
        return None if self.target is None else self.median >= self.target


def round_ratios(ours: Entry, other: Entry, by: str = "time") -> list[float]:
    """ours / other of each round in which both had their turn: how many times as many clips per second, or per CPU
    second."""
    ratios = []
    for mine, theirs in zip(ours.turns, other.turns, strict=True):
        if mine is None or theirs is None or not mine.num_clips or not theirs.num_clips:
            continue
        if by == "time":
            ratios.append(mine.clips_per_second / theirs.clips_per_second)
        elif mine.cpu_seconds > 0 and theirs.cpu_seconds > 0:
            ratios.append(theirs.cpu_seconds_per_clip / mine.cpu_seconds_per_clip)
    return ratios


def claims(entries: Sequence[Entry]) -> list[Ratio]:
    """The ratios that this run gives; what was not timed leaves its line out."""
    timed = [entry for entry in entries if any(entry.turns)]
    by_name = {entry.contender.name: entry for entry in timed}

    def fastest(candidates: Sequence[Entry]) -> Entry | None:
        return max((entry for entry in candidates if entry.rate), key=lambda entry: entry.rate, default=None)

    # Backend raw reads originals: it stands beside the 10-second loaders, not for the shards.
    ours = fastest([e for e in timed if e.contender.group == "ours" and not e.contender.needs_videos])
    raw = by_name.get("ours: raw")
    ceiling = fastest([entry for entry in timed if entry.contender.group == "ceiling"])
    library = fastest([e for e in timed if e.contender.name.startswith("webdataset + ")])
    spdl = fastest([e for e in timed if e.contender.name.startswith("spdl")])
    fixed = by_name.get("10-s videos, resize fixed")
    found: list[Ratio] = []

    def add(
        claim: str, mine: Entry | None, other: Entry | None, target: float | None, by: str = "time"
    ) -> None:
        if mine is None or other is None:
            return
        ratios = round_ratios(mine, other, by)
        if ratios:
            names = {"ours": mine.contender.name, "other": other.contender.name}
            found.append(Ratio(claim=claim, **names, by=by, target=target, **quantiles(ratios)))

    add("the best DataLoader with webdataset", ours, library, 2.5)
    add("the same, per core", ours, library, None, "CPU")
    if ours is not None and ours.workload.device != "cpu":
        add(
            "the best of all libraries",
            ours,
            fastest([e for e in timed if e.contender.group == "library"]),
            2.0,
        )
    add("the naive 10-second loader, resize fixed", ours, fixed, 7.0)
    add("the same, per core", ours, fixed, None, "CPU")
    add("SPDL's own pipeline", ours, spdl, 1.1)
    add("the same, per core", ours, spdl, None, "CPU")
    add("of the ceiling", ours, ceiling, 0.70)
    add("the same, per core", ours, ceiling, None, "CPU")
    add("of bare decoding with SPDL", ours, by_name.get("decode only: SPDL threads"), 0.70)
    add("raw beside the 10-second loader", raw, fixed, None)
    scaling = sorted((e for e in timed if e.contender.group == "scaling"), key=lambda e: e.contender.cores)
    targets = {2: 1.85, 16: 12.0}
    for entry in scaling[1:]:
        add(f"1 to {entry.contender.cores} cores", entry, scaling[0], targets.get(entry.contender.cores))
    step, supplied = by_name.get("ladder: step on one batch"), by_name.get("ladder: loader and step")
    # On a CPU the loader takes its cores from the step.
    target = 0.97 if supplied is not None and supplied.workload.device != "cpu" else None
    add("training with the loader, of the step on one batch", supplied, step, target)
    return found


def missing_library(contender: Contender) -> str | None:
    """The first of its libraries that is not installed."""
    for name in contender.libraries:
        try:
            found = importlib.util.find_spec(name) is not None
        except ImportError:
            found = False
        if not found:
            return name
    return None


def has_gpu() -> bool:
    """Whether there is a CUDA device; asked in another process, so that this one stays without CUDA."""
    if shutil.which("nvidia-smi") is None:
        return False
    command = [sys.executable, "-c", "import torch; raise SystemExit(not torch.cuda.is_available())"]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def gpu_memory_used() -> int | None:
    """Bytes in use on the first GPU by whomever."""
    if shutil.which("nvidia-smi") is None:
        return None
    command = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return int(done.stdout.split()[0]) << 20 if done.returncode == 0 and done.stdout.split() else None


class Run:
    """The contenders of one call, from the check to the last round."""

    def __init__(
        self,
        entries: list[Entry],
        material: Material,
        scratch: Path,
        *,
        seconds: float,
        cold: bool,
        restart: bool,
        reuse: bool,
        say: Callable[[str], None],
    ) -> None:
        self.entries = entries
        self._material = material
        self._scratch = scratch
        self._seconds = seconds
        self._cold = cold
        self._restart = restart
        self._reuse = reuse
        self._say = say

    def close(self) -> None:
        """Ends all processes."""
        for entry in self.entries:
            if entry.host is not None:
                entry.host.close()
                entry.host = None

    def check_all(self) -> None:
        """Starts each process and compares what it hands out with the reference."""
        reference = self._scratch / "reference.npz"
        write_reference(reference, self._material.shards[0], CHECKED_CLIPS)
        with ThreadPoolExecutor(usable_cores()) as pool:
            list(pool.map(lambda entry: self._check(entry, reference), self.entries))

    def _check(self, entry: Entry, reference: Path) -> None:
        if not entry.is_alive:
            return
        try:
            self._open(entry)
            if entry.contender.content == "none":
                return
            first = lambda paths: paths[:1]  # noqa: E731
            workload = replace(
                entry.workload,
                augment=False,
                num_workers=1,
                batch_size=min(CHECKED_CLIPS, entry.workload.batch_size, self._material.first_shard_clips),
                shards=first(entry.workload.shards),
                vp9_shards=first(entry.workload.vp9_shards),
                mjpeg_shards=first(entry.workload.mjpeg_shards),
                clip_files=_of_shard(entry.workload),
                videos=entry.workload.videos[:4],
            )
            if entry.contender.group == "ten-second":
                workload = replace(workload, batch_size=min(4, len(workload.videos)))
            content = entry.contender.content
            entry.check = entry.host.call(
                "check", workload=asdict(workload), reference=str(reference), content=content
            )
        except ContenderFailed as error:
            entry.fail("not available" if error.kind == "NotAvailable" else "failed", str(error))
            return
        if entry.check["problem"]:
            entry.fail("wrong content", entry.check["problem"])
        # A fresh process for the turns, without the check's workers and decoders.
        elif entry.host is not None and not self._reuse:
            entry.host.close()
            self._open(entry)

    def start_all(self) -> None:
        """Opens the streams one after the other and times their first batches."""
        for entry in self.entries:
            if not entry.is_alive:
                continue
            before = gpu_memory_used()
            try:
                if entry.host is None:
                    self._open(entry)
                self._start(entry)
            except ContenderFailed as error:
                entry.fail("not available" if error.kind == "NotAvailable" else "failed", str(error))
                continue
            after = gpu_memory_used()
            if before is not None and after is not None:
                entry.gpu_memory_bytes = max(0, after - before)
            if self._restart:
                entry.host.close()
                entry.host = None

    def play_round(self, number: int) -> None:
        """One turn of each, in the same circle from another place in every round."""
        alive = [entry for entry in self.entries if entry.is_alive]
        first = number * ROTATION % max(1, len(alive))
        for entry in alive[first:] + alive[:first]:
            workers = entry.workload.num_workers
            try:
                if entry.host is None:
                    self._open(entry)
                    self._start(entry)
                # It was stopped at the end of a turn with its queues in the state that a turn has; in the first
                # one they are full.
                full = number == 0 or self._restart
                drain = workers * (PREFETCH_PER_WORKER + 1) if full else workers
                if "step" in entry.contender.options.get("rung", ""):
                    drain = min(drain, 3)  # its queue is full by right
                turn = entry.host.call(
                    "turn",
                    seconds=self._seconds,
                    drain_batches=drain,
                    multiple=workers if entry.contender.group != "ladder" else 1,
                    paths_to_drop=self._files_of(entry) if self._cold else [],
                )
            except ContenderFailed as error:
                entry.fail("failed", f"round {number + 1}: {error}")
                entry.turns.append(None)
                continue
            entry.turns.append(Turn(**turn))
            if self._restart:
                entry.host.close()
                entry.host = None
            self._say(
                f"round {number + 1}  {entry.contender.name:34s}{entry.turns[-1].clips_per_second:9.1f} clips/s"
                f"{1000 * entry.turns[-1].cpu_seconds_per_clip:8.2f} ms CPU per clip"
            )
        for entry in self.entries:
            if len(entry.turns) <= number:
                entry.turns.append(None)

    def _open(self, entry: Entry) -> None:
        cores = entry.contender.cores
        usable = sorted(os.sched_getaffinity(0))
        name = "".join(c if c.isalnum() else "_" for c in entry.contender.name)
        entry.host = HostedContender(
            entry.contender.module,
            self._scratch / f"{name}.log",
            cores=None if cores is None else usable[:cores],
        )

    def _start(self, entry: Entry) -> None:
        answer = entry.host.call("start", workload=asdict(entry.workload))
        if entry.first_batch_seconds is None:
            entry.first_batch_seconds = answer["first_batch_seconds"]

    def _files_of(self, entry: Entry) -> list[str]:
        workload = entry.workload
        files = [path for row in workload.clip_files for path in row[1:]]
        return [*workload.shards, *workload.vp9_shards, *workload.mjpeg_shards, *files] + [
            path for path, _ in workload.videos
        ]


def _of_shard(workload: Workload) -> list[list[str]]:
    """The clip files of the first shard's first clips."""
    if not workload.clip_files:
        return []
    from shards.reader import ShardReader

    with ShardReader(workload.shards[0]) as reader:
        keys = {reader.key(position) for position in range(min(CHECKED_CLIPS, len(reader)))}
    return [row for row in workload.clip_files if row[0] in keys]


def choose(arguments: argparse.Namespace, num_cores: int) -> list[Contender]:
    """The contenders of a command line.

    Raises:
        ValueError: --only names none.
    """
    everyone = [*CONTENDERS, *scaling_contenders(num_cores)]
    if not arguments.only:
        return [contender for contender in everyone if contender.quick or not arguments.quick]
    chosen = [c for c in everyone if any(word.lower() in c.name.lower() for word in arguments.only)]
    if not chosen:
        names = ", ".join(contender.name for contender in everyone)
        raise ValueError(f"--only is {' '.join(arguments.only)}, expected parts of these names: {names}")
    return chosen


def enter(contender: Contender, material: Material, batch: int, workers: int, on_gpu: bool) -> Entry:
    """The contender's entry, out of the run where it cannot take part."""
    needs = contender.module
    workload = Workload(
        shard_folder=str(material.shard_folder),
        shards=material.shards,
        vp9_shards=material.vp9_shards if needs == "dali_native" else [],
        mjpeg_shards=material.mjpeg_shards if needs == "dali_native" else [],
        clip_files=material.clip_files if needs == "clip_files" else [],
        video_folder=material.video_folder,
        videos=material.videos if contender.needs_videos else [],
        batch_size=batch,
        num_workers=contender.cores or workers,
        device="cuda" if on_gpu and contender.group != "scaling" else "cpu",
        options=contender.options,
    )
    entry = Entry(contender=contender, workload=workload)
    missing = missing_library(contender)
    if missing:
        entry.fail("not installed", f"{missing} is not installed; pip install -e '.[bench]'")
    elif contender.needs_gpu and not on_gpu:
        entry.fail("not available", "no CUDA device")
    elif contender.needs_videos and not material.videos:
        entry.fail("not available", "no original videos; give --videos")
    return entry


def show_table(console: Console, entries: Sequence[Entry], ceiling: Entry | None, num_cores: int) -> None:
    """The table on the terminal."""
    table = Table(title=f"loader throughput, {num_cores} cores", title_justify="left")
    table.add_column("contender")
    for heading in (
        "clips/s", "p20-p80", "of ceiling", "CPU ms/clip", "clips/s per core", "memory MB", "MB/s read", "first s",
        "bad",
    ):  # fmt: skip
        table.add_column(heading, justify="right")
    group = None
    for entry in entries:
        name = entry.contender.name
        turns = [turn for turn in entry.turns if turn is not None]
        if not turns or not entry.is_alive:
            continue
        if group not in (None, entry.contender.group):
            table.add_section()
        group = entry.contender.group
        rates = quantiles([turn.clips_per_second for turn in turns])
        share = f"{entry.rate / ceiling.rate:.2f}" if ceiling is not None and ceiling.rate else ""
        cost = entry.cpu_per_clip
        read = _read_rate(turns)
        table.add_row(
            name,
            f"{rates['median']:.1f}",
            f"{rates['p20']:.0f}-{rates['p80']:.0f}",
            share,
            f"{1000 * cost:.2f}" if cost is not None else "",
            f"{1 / cost:.0f}" if cost else "",
            f"{max(turn.memory_bytes for turn in turns) / 1e6:.0f}",
            "" if read is None else f"{read / 1e6:.1f}",
            "" if entry.first_batch_seconds is None else f"{entry.first_batch_seconds:.2f}",
            str(sum(turn.num_bad for turn in turns)),
        )
    console.print(table)
    for entry in entries:
        if not entry.is_alive:
            console.print(
                f"{entry.contender.name}: [yellow]{entry.status}[/]: {entry.reason}", soft_wrap=True
            )


def _read_rate(turns: Sequence[Turn]) -> float | None:
    rates = [turn.read_bytes / turn.seconds for turn in turns if turn.read_bytes is not None]
    return float(np.median(rates)) if rates else None


def plot(path: Path, entries: Sequence[Entry], ceiling: Entry | None, title: str) -> None:
    """Horizontal bars of clips/s with the range of the rounds, and the ceiling as a line."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    colors = {"ceiling": "0.6", "ours": "tab:blue", "library": "tab:orange", "ten-second": "tab:red"}
    shown = [e for e in entries if e.is_alive and e.rate and e.contender.group in colors]
    shown.sort(key=lambda entry: entry.rate)
    if not shown:
        return
    figure, axes = pyplot.subplots(figsize=(9, 0.36 * len(shown) + 1.4), layout="constrained")
    for position, entry in enumerate(shown):
        rates = [turn.clips_per_second for turn in entry.turns if turn is not None]
        axes.barh(position, entry.rate, color=colors[entry.contender.group])
        axes.plot([min(rates), max(rates)], [position, position], color="black", linewidth=1.2)
        axes.annotate(
            f"{entry.rate:.0f}",
            (max(rates), position),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
        )
    axes.set_yticks(range(len(shown)), [entry.contender.name for entry in shown])
    if ceiling is not None and ceiling.rate:
        axes.axvline(ceiling.rate, color="0.4", linestyle="--")
    axes.set_xlabel("clips/s (median of the rounds; line: slowest to fastest round; dashed: decoding alone)")
    axes.set_title(title, fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=140)
    pyplot.close(figure)


def row_of(
    entry: Entry, ceiling: Entry | None, material: Material, arguments: argparse.Namespace
) -> dict[str, Any]:
    """The JSON row of a contender."""
    contender, workload = entry.contender, entry.workload
    turns = [turn for turn in entry.turns if turn is not None] if entry.is_alive else []
    cores = contender.cores or usable_cores()
    config = {
        "group": contender.group,
        "does": contender.does,
        "options": contender.options,
        "batch_size": workload.batch_size,
        "num_workers": workload.num_workers,
        "cores": cores,
        "device": workload.device,
        "seconds_per_turn": arguments.seconds,
        "quick": arguments.quick,
        "source": material.source,
        "num_clips": material.num_clips,
        "num_videos": len(material.videos),
    }
    measured: dict[str, Any] = {
        "status": entry.status,
        "reason": entry.reason,
        "content": entry.check
        and {
            **entry.check,
            "least_psnr": LEAST_PSNR["luma" if contender.group == "ceiling" else contender.content],
            "most_log_mel_error": MOST_LOG_MEL_ERROR.get(contender.content),
        },
        "note": arguments.note,
    }
    if turns:
        foreign = sum(turn.foreign_cpu_seconds + turn.stolen_cpu_seconds for turn in turns)
        seconds = sum(turn.seconds for turn in turns)
        costs = [turn.cpu_seconds_per_clip for turn in turns if turn.num_clips]
        measured |= {
            "clips_per_second": quantiles([turn.clips_per_second for turn in turns]),
            "clips_per_second_rounds": [turn.clips_per_second for turn in turns],
            "repeats": len(turns),
            "seconds": seconds,
            "first_batch_seconds": entry.first_batch_seconds,
            "read_bytes_per_second": _read_rate(turns),
            "cpu_seconds_per_clip": float(np.median(costs)) if costs else None,
            "peak_memory_bytes": max(turn.memory_bytes for turn in turns),
            "peak_gpu_memory_bytes": entry.gpu_memory_bytes,
            "num_bad": sum(turn.num_bad for turn in turns),
            "cache": "cold at the start of each turn" if arguments.cold else "warm",
            "ceiling": None
            if ceiling is None
            else {"variant": ceiling.contender.name, "clips_per_second": ceiling.rate},
            "share_of_ceiling": quantiles(round_ratios(entry, ceiling))
            if ceiling is not None and round_ratios(entry, ceiling)
            else None,
            "foreign_cpu_share": foreign / (seconds * usable_cores()),
        }
        if any(turn.wait_seconds for turn in turns):
            measured["data_wait_share"] = sum(turn.wait_seconds for turn in turns) / seconds
            batches = sum(turn.num_batches for turn in turns)
            measured["step_seconds"] = (seconds - sum(turn.wait_seconds for turn in turns)) / batches
    return make_row("loader_throughput", contender.name, config, **measured)


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="loader_throughput", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shards", metavar="FOLDER", help="shards to read (default: made from the videos)")
    parser.add_argument("--videos", metavar="FOLDER", help="original videos")
    parser.add_argument(
        "--only", nargs="+", metavar="NAME", help="contenders whose name contains one of these"
    )
    parser.add_argument("--rounds", type=int, help="turns of each contender (default: 5)")
    parser.add_argument("--seconds", type=float, help="length of a turn (default: 4)")
    parser.add_argument("--batch", type=int, help="clips per batch (default: 16)")
    parser.add_argument(
        "--workers", type=int, default=usable_cores(), help="per contender (default: all cores)"
    )
    parser.add_argument("--quick", action="store_true", help="a run of less than 2 minutes on 2 cores")
    parser.add_argument(
        "--cold", action="store_true", help="drop the files from the page cache before each turn"
    )
    parser.add_argument(
        "--restart", action="store_true", help="start contenders anew for each turn (less memory)"
    )
    parser.add_argument(
        "--cache", metavar="FOLDER", help="for what is made (default: in the temporary folder)"
    )
    parser.add_argument("--output", metavar="FOLDER", default=str(RESULTS), help="for rows and plot")
    parser.add_argument("--note", help="goes into the rows, for example what else the machine was doing")
    arguments = parser.parse_args(argv)
    for name, value in {"rounds": 5, "seconds": 4.0, "batch": 16}.items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, QUICK[name] if arguments.quick else value)
    for name, least in (("rounds", 1), ("batch", 1), ("workers", 1)):
        if getattr(arguments, name) < least:
            parser.error(f"--{name} is {getattr(arguments, name)}, expected at least {least}")
    return arguments


def material_of(
    arguments: argparse.Namespace, contenders: Sequence[Contender], say: Callable[[str], None]
) -> Material:
    """What the contenders read, made where it is not there yet."""
    videos = arguments.videos
    real = Path(os.environ.get("CMAC_DATA", ROOT.parent / "shared" / "data")) / "av_videos"
    if videos is None and arguments.shards is None and not arguments.quick and real.is_dir():
        videos = str(real)
    num_synthetic = max(2 * arguments.batch, 16) if arguments.quick else 64
    seconds = 3.0 if arguments.quick else 10.0
    identity = [videos and os.path.abspath(videos), arguments.shards and os.path.abspath(arguments.shards)]
    digest = hashlib.sha256(repr([*identity, num_synthetic, seconds]).encode()).hexdigest()[:12]
    root = Path(arguments.cache or Path(tempfile.gettempdir()) / f"cmac-loader-throughput-{os.getuid()}")
    modules = {contender.module for contender in contenders}
    return prepare(
        root / digest,
        shards=arguments.shards,
        videos=videos,
        num_synthetic=num_synthetic,
        synthetic_seconds=seconds,
        max_clips=2 if arguments.quick else 10,
        need_recoded="dali_native" in modules,
        need_files="clip_files" in modules,
        say=say,
    )


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark; returns the exit status."""
    arguments = parse(argv)
    console = Console(width=None if sys.stdout.isatty() else 150, highlight=False)
    begin = time.monotonic()

    def say(text: str) -> None:
        console.print(f"[dim]{time.monotonic() - begin:6.1f} s[/]  {text}", soft_wrap=True)

    try:
        contenders = choose(arguments, arguments.workers)
        material = material_of(arguments, contenders, say)
    except ValueError as error:
        print(f"loader_throughput: {error}", file=sys.stderr)
        return 2
    on_gpu = has_gpu()
    entries = [enter(c, material, arguments.batch, arguments.workers, on_gpu) for c in contenders]
    expected = sum(MEMORY_PER_PROCESS * (1 + e.workload.num_workers) for e in entries if e.is_alive)
    restart = arguments.restart or expected > 0.8 * _available_memory()
    if restart and not arguments.restart:
        say("little memory: contenders are started anew for each turn")
    with tempfile.TemporaryDirectory() as scratch:
        run = Run(
            entries,
            material,
            Path(scratch),
            seconds=arguments.seconds,
            cold=arguments.cold,
            restart=restart,
            reuse=arguments.quick,
            say=say,
        )
        try:
            say(
                f"{material.num_clips} clips ({material.source}); checking what {len(entries)} contenders hand out"
            )
            run.check_all()
            say("starting them one by one")
            run.start_all()
            for number in range(arguments.rounds):
                run.play_round(number)
        finally:
            run.close()

    ceiling = max(
        (e for e in entries if e.contender.group == "ceiling" and e.is_alive and e.rate),
        key=lambda e: e.rate,
        default=None,
    )
    ratios = claims(entries)
    if ceiling is not None:
        console.print(f"\nceiling: {ceiling.contender.name}, {ceiling.rate:.1f} clips/s")
    show_table(console, entries, ceiling, usable_cores())
    show_checks(console, entries)
    show_ratios(console, ratios)
    rows = [row_of(entry, ceiling, material, arguments) for entry in entries]
    disturbed = [row for row in rows if (row.get("foreign_cpu_share") or 0) > FOREIGN_LIMIT]
    if disturbed:
        worst = max(row["foreign_cpu_share"] for row in disturbed)
        console.print(
            f"[yellow]disturbed[/]: others used up to {worst:.0%} of the machine during a contender's turns"
        )
    output = Path(arguments.output)
    for row in rows:
        append_row(row, output)
    suffix = "_quick" if arguments.quick else ""
    machine = f"{rows[0]['cpu']}, {usable_cores()} cores{', ' + rows[0]['gpu'] if rows[0]['gpu'] else ''}"
    commit = (rows[0]["commit"] or "")[:7] + ("+" if rows[0]["dirty"] else "")
    plot(
        output / f"loader_throughput{suffix}.png",
        entries,
        ceiling,
        f"{machine}; {material.source}; commit {commit}; {arguments.rounds} rounds of {arguments.seconds:g} s",
    )
    summary = {
        "benchmark": "loader_throughput",
        "commit": rows[0]["commit"],
        "dirty": rows[0]["dirty"],
        "utc": rows[0]["utc"],
        "cpu": rows[0]["cpu"],
        "usable_cores": usable_cores(),
        "gpu": rows[0]["gpu"],
        "quick": arguments.quick,
        "seconds": time.monotonic() - begin,
        "clips_per_second": {
            entry.contender.name: entry.rate if entry.is_alive else None for entry in entries
        },
        "not_timed": {e.contender.name: f"{e.status}: {e.reason}" for e in entries if not e.is_alive},
        "ceiling": None if ceiling is None else ceiling.contender.name,
        "ratios": [{**asdict(ratio), "is_met": ratio.is_met} for ratio in ratios],
    }
    print(json.dumps(summary, allow_nan=False))
    return 0


def show_checks(console: Console, entries: Sequence[Entry]) -> None:
    """What the content check found."""
    for entry in entries:
        if entry.check is not None and entry.check["psnr"] is not None:
            mel = entry.check["log_mel_error"]
            sound = "" if mel is None else f", log-mel differs by {mel:.4f}"
            pixels = f"PSNR {entry.check['psnr']:.1f} dB, SNR {entry.check['snr']:.1f} dB"
            clips = f"{entry.check['num_clips']} clips, the worst of them"
            console.print(
                f"[dim]content: {entry.contender.name}: {pixels}{sound} ({clips})[/]", soft_wrap=True
            )


def show_ratios(console: Console, ratios: Sequence[Ratio]) -> None:
    """What the run must show, and whether it does."""
    table = Table(title="ratios of turns in the same round", title_justify="left")
    for heading in ("claim", "ours", "other", "by", "median", "p20-p80", "target", ""):
        table.add_column(heading)
    for ratio in ratios:
        verdict = {True: "[green]met[/]", False: "[red]missed[/]", None: ""}[ratio.is_met]
        target = "" if ratio.target is None else f"{ratio.target:g}"
        spread = f"{ratio.p20:.2f}-{ratio.p80:.2f}"
        table.add_row(
            ratio.claim, ratio.ours, ratio.other, ratio.by, f"{ratio.median:.2f}", spread, target, verdict
        )
    console.print(table)


def _available_memory() -> float:
    with open("/proc/meminfo", encoding="ascii") as file:
        fields = dict(line.split(":") for line in file)
    return 1024 * float(fields["MemAvailable"].split()[0])


if __name__ == "__main__":
    sys.exit(main())
