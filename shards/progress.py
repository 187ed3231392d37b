"""Progress of make_shards: a bar on a terminal, a line now and then elsewhere."""

import io
import sys
import time
from collections import Counter
from typing import TextIO

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from shards.results import ReportRow

LINE_SECONDS = 15.0
"""Between two lines of progress where there is no terminal."""


def print_any_name() -> None:
    """From now on, what of a file's name is no text is printed with backslashes in place of an error that ends the
    program. Standard error does so already."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


class TextProgress:
    """`ProgressListener` that writes to `stream` (default: standard error)."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self.stream = stream or sys.stderr
        self.console = Console(file=self.stream)
        self.bar: Progress | None = None
        self.num_videos = self.num_done = self.num_before = self.num_clips = 0
        self.skipped: Counter[str] = Counter()
        self.begin = self.last = time.monotonic()

    def __enter__(self) -> "TextProgress":
        return self

    def __exit__(self, *unused: object) -> None:
        if self.bar is not None:
            self.bar.stop()

    def start(self, num_videos: int, num_done: int) -> None:
        self.num_videos, self.num_done, self.num_before = num_videos, num_done, num_done
        self.begin = self.last = time.monotonic()
        if num_done:
            self.message(f"{num_done} of {num_videos} videos were done by an earlier run")
        if self.console.is_terminal:
            self.bar = Progress(
                SpinnerColumn(),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("videos  {task.fields[state]}"),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                console=self.console,
            )
            # The rate is of this run: what an earlier one did would make the estimate too good.
            self.task = self.bar.add_task("", total=num_videos, completed=num_done, state="")
            self.bar.start()

    def video_done(self, row: ReportRow) -> None:
        self.num_done += 1
        self.num_clips += row.num_clips
        if row.status == "skipped":
            self.skipped[row.reason] += 1
        if self.bar is not None:
            self.bar.update(self.task, completed=self.num_done, state=self._state())
        elif time.monotonic() - self.last >= LINE_SECONDS or self.num_done == self.num_videos:
            self.last = time.monotonic()
            elapsed = self.last - self.begin
            left = elapsed / (self.num_done - self.num_before) * (self.num_videos - self.num_done)
            self.message(
                f"{self.num_done}/{self.num_videos} videos  {self._state()}  {elapsed:.0f} s, about "
                f"{left:.0f} s left"
            )

    def message(self, text: str) -> None:
        # Paths may hold bytes that no terminal can show.
        text = text.encode("utf-8", "backslashreplace").decode("utf-8")
        if self.bar is not None:
            self.bar.console.print(text, markup=False, highlight=False)
        else:
            print(text, file=self.stream, flush=True)

    def _state(self) -> str:
        parts = [f"{self.num_clips} clips"]
        if self.skipped:
            reasons = ", ".join(f"{reason} {count}" for reason, count in self.skipped.most_common(4))
            parts.append(f"skipped {sum(self.skipped.values())} ({reasons})")
        return ", ".join(parts)
