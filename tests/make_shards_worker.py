"""For tests of make_shards: an engine without processes, folders compared, and kills."""

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from shards.make import ReportRow, ShardConfig, SilentProgress
from shards.slicing import SliceSettings

FAST = SliceSettings(max_clips=3, preset="ultrafast")


def configure(videos: Path | str, out: Path | str, **changes: object) -> ShardConfig:
    fields = dict(videos=str(videos), out=str(out), workers=2, videos_per_shard=4, slicing=FAST)
    return ShardConfig(**{**fields, **changes})


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def run_here(
    function: Callable[[Any], Any],
    next_job: Callable[[], Any | None],
    num_workers: int,
    limit_seconds: float,
) -> Iterator[tuple[Any, Any]]:
    """`shards.pool.run_jobs` in this process: jobs see what a test has replaced, and what they raise is raised."""
    while (job := next_job()) is not None:
        yield job, function(job)


class CountingProgress(SilentProgress):
    def __init__(self) -> None:
        self.num_videos = self.num_before = -1
        self.done: list[str] = []
        self.messages: list[str] = []

    def start(self, num_videos: int, num_done: int) -> None:
        self.num_videos, self.num_before = num_videos, num_done

    def video_done(self, row: ReportRow) -> None:
        self.done.append(row.path)

    def message(self, text: str) -> None:
        self.messages.append(text)


def processes() -> dict[int, tuple[int, int, str, str]]:
    """Of all that run: parent, process group, state, name."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            name, rest = (folder / "stat").read_text().split("(", 1)[1].rsplit(") ", 1)
        except OSError:
            continue
        state, parent, group = rest.split()[:3]
        found[int(folder.name)] = (int(parent), int(group), state, name)
    return found


def children(parent: int) -> list[int]:
    return sorted(pid for pid, (of, _, state, _) in processes().items() if of == parent and state != "Z")


def kill(pid: int, number: int = signal.SIGKILL) -> bool:
    """Whether it was still there."""
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return False
    return True
