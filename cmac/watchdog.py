"""Ends a process whose training hangs, and leaves behind where each of its threads was."""

import faulthandler
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path

LEAST_START_SECONDS = 1800.0
"""The limit until the first step is done, where the run's own is shorter: kernels are compiled, caches are cold."""
_WRITE_SECONDS = 60.0
_ANSWER_SECONDS = 1.0
"""What data workers get to write their stacks in."""
_TURN_SECONDS = 0.1
"""What each gets alone, or their lines would mix."""
_GRACE_SECONDS = 3.0
"""A rank that has written its stacks ends so much later: torchrun then ends the others, which write theirs as well."""


class Watchdog:
    """Watches one rank in a thread. Without a step for `limit_seconds`, whatever the rank is doing, it writes the
    stacks of all threads to `folder/rank_RRR.txt` and ends the process with status 1.

    Data workers (any process below this one that catches SIGUSR2) are asked to write theirs to their stderr. Where the
    hang keeps the interpreter's lock, so that no Python thread runs, a timer in C writes the stacks to stderr and ends
    the process at twice the limit. A process that was suspended (SIGSTOP) for longer than the limit counts as hung.

    Args:
        folder: made when it is needed.
        rank: of this process.
        limit_seconds: 0: never.
    """

    def __init__(self, folder: Path, rank: int, limit_seconds: float) -> None:
        self._path = folder / f"rank_{rank:03d}.txt"
        self._rank = rank
        self._limit = limit_seconds
        self._doing = "starting"
        self._step = 0
        self._started = False
        self._since = time.monotonic()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True, name="watchdog")

    def __enter__(self) -> "Watchdog":
        if self._limit > 0:
            self._since = time.monotonic()
            self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._closed.set()
        if self._thread.is_alive():
            self._thread.join()

    @contextmanager
    def doing(self, what: str) -> Iterator[None]:
        """Inside, the rank is said to be doing that."""
        before, self._doing = self._doing, what
        try:
            yield
        finally:
            self._doing = before

    def step_done(self, step: int) -> None:
        """The rank has taken a step (counted from 1)."""
        self._step, self._started, self._since = step, True, time.monotonic()

    @property
    def _allowed(self) -> float:
        return self._limit if self._started else max(self._limit, LEAST_START_SECONDS)

    def _watch(self) -> None:
        tick = min(1.0, self._limit / 4)
        try:
            while True:
                faulthandler.dump_traceback_later(2 * self._allowed, exit=True, file=sys.__stderr__)
                if self._closed.wait(tick):
                    return
                waited = time.monotonic() - self._since
                if waited > self._allowed:
                    self._end(waited)
        finally:
            faulthandler.cancel_dump_traceback_later()

    def _end(self, waited: float) -> None:
        # Writing may hang as well, where it is the file system that does.
        faulthandler.dump_traceback_later(_WRITE_SECONDS, exit=True, file=sys.__stderr__)
        what = f"rank {self._rank}: no step for {waited:.0f} s after step {self._step} ({self._doing})"
        try:
            self._write(what)
            what += f"; where all threads are is in {self._path}"
        except Exception as error:  # whatever it is, the process has to end
            what += f"; {self._path} cannot be written ({error})"
            faulthandler.dump_traceback(sys.__stderr__, all_threads=True)
        what += "; ends with status 1, the same command goes on from the last checkpoint\n"
        os.write(2, what.encode())
        self._closed.wait(_GRACE_SECONDS)
        os._exit(1)

    def _write(self, what: str) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        now = datetime.now(timezone.utc).isoformat(timespec="seconds")
        with open(self._path, "a", encoding="utf-8") as file:
            file.write(f"{now} {what}, pid {os.getpid()}\n")
            file.flush()
            faulthandler.dump_traceback(file, all_threads=True)
            file.write("processes below it:\n")
            for process in descendants(os.getpid()):
                asked = _ask_for_stacks(process)
                file.write(f"  {_describe(process)}{', asked for its stacks on stderr' if asked else ''}\n")
                if asked:
                    self._closed.wait(_TURN_SECONDS)
            file.write("\n")
        self._closed.wait(_ANSWER_SECONDS)


def descendants(parent: int) -> list[int]:
    """Ids of all processes below one, by /proc; empty where there is none."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            after_name = entry.read_text(errors="replace").rpartition(")")[2].split()
        except OSError:  # it has ended meanwhile
            continue
        children.setdefault(int(after_name[1]), []).append(int(entry.parent.name))
    found, new = [], [parent]
    while new:
        new = [child for process in new for child in sorted(children.get(process, []))]
        found += new
    return found


def _describe(process: int) -> str:
    """Command, state and, where the kernel tells, what it waits in."""
    folder = Path(f"/proc/{process}")
    try:
        command = " ".join((folder / "cmdline").read_text(errors="replace").split("\0")).strip()
        state = (folder / "stat").read_text(errors="replace").rpartition(")")[2].split()[0]
        waits_in = (folder / "wchan").read_text(errors="replace")
    except OSError as error:
        return f"pid {process}: {error.strerror}"
    return f"pid {process}: state {state}, in {waits_in}: {command[:120]!r}"


def _ask_for_stacks(process: int) -> bool:
    """Send SIGUSR2 to a process that has a handler for it; others it would end."""
    try:
        status = Path(f"/proc/{process}/status").read_text(errors="replace")
        caught = next(line for line in status.splitlines() if line.startswith("SigCgt:"))
        if not int(caught.split()[1], 16) >> (signal.SIGUSR2 - 1) & 1:
            return False
        os.kill(process, signal.SIGUSR2)
    except (OSError, StopIteration):
        return False
    return True
