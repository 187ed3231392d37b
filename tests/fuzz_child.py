"""A process of its own for inputs that may crash it, hang it, fill the memory or write where they should not.

The child calls `examine`, the test `run_child`. What an input does to the child is seen from outside: the name of the
input is printed before it is tried, so that it is known even of one that kills the process.
"""

import collections
import faulthandler
import json
import os
import resource
import subprocess
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
# Events of sys.audit whose first arguments are paths that something is done to.
CHANGES = {
    "os.mkdir": 1, "os.remove": 1, "os.rename": 2, "os.rmdir": 1, "os.symlink": 2, "os.link": 2, "os.chmod": 1,
    "os.chown": 1, "os.truncate": 1, "os.utime": 1,
}  # fmt: skip
FORBIDDEN = ("socket.connect", "socket.bind", "pickle.find_class", "os.exec", "os.posix_spawn", "os.system")
MAX_FAILURES = 20  # reported


@dataclass
class Report:
    """What came of the inputs."""

    outcomes: Counter[str] = field(default_factory=Counter)
    """Number of inputs by outcome."""
    failures: list[str] = field(default_factory=list)
    """Name of an input, and what it did that it may not do."""
    slowest: tuple[float, str] = (0.0, "")
    """Seconds, name."""
    peak_bytes: int = 0
    """By how much the child's resident memory rose above what it was before the first input."""

    @property
    def num_inputs(self) -> int:
        return self.outcomes.total()

    def text(self, title: str) -> str:
        """Counts in words, then the failures."""
        counts = ", ".join(f"{outcome} {count}" for outcome, count in self.outcomes.most_common())
        shown = "".join(f"\n- {failure}" for failure in self.failures[:MAX_FAILURES])
        seconds, name = self.slowest
        head = f"{title}: {self.num_inputs} inputs, {len(self.failures)} failures, {self.peak_bytes / 1e6:.0f} MB"
        return f"{head}, slowest {seconds:.1f} s ({name}): {counts}{shown}"


def child_environment() -> dict[str, str]:
    """For a program that imports this project's modules from any folder."""
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
        "PYTHONDONTWRITEBYTECODE": "1",
        "OMP_NUM_THREADS": "1",
        "MALLOC_ARENA_MAX": "1",  # else each thread takes 64 MB of address space
    }


def run_child(script: str, *arguments: str, cwd: Path, timeout_seconds: float) -> Report:
    """Runs `python tests/SCRIPT ARGUMENTS` in a folder; AssertionError that names the input at which it died."""
    report, started, errors = Report(), "before the first input", ""
    command = [sys.executable, str(ROOT / "tests" / script), *arguments]
    with subprocess.Popen(
        command, cwd=cwd, env=child_environment(), text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as child:
        try:
            output, errors = child.communicate(timeout=timeout_seconds)
        except subprocess.TimeoutExpired:
            child.kill()
            output, errors = child.communicate()
            errors += f"\nkilled after {timeout_seconds} s"
    for line in output.splitlines():
        record = json.loads(line)
        started = record.get("start", started)
        if "outcome" in record:
            report.outcomes[record["outcome"]] += 1
            report.slowest = max(report.slowest, (record["seconds"], started))
        if "failure" in record:
            report.failures.append(f"{started}: {record['failure']}")
        report.peak_bytes = record.get("peak_bytes", report.peak_bytes)
    if child.returncode != 0:
        report.failures.append(
            f"{started}: the process ended with {child.returncode}; {errors[-3000:]}\nOne alone: {' '.join(command)} "
            f"--only {started!r}"
        )
    return report


def examine(
    inputs: Iterable[tuple[str, Callable[[], str]]],
    *,
    guarded: Path,
    writable: Path,
    readable: Path | None = None,
    limit_seconds: float,
    extra_bytes: int | None = None,
) -> None:
    """Calls each input's function, which returns its outcome; prints a line of JSON before and after.

    Args:
        inputs: (name, function), made one after the other.
        guarded: nothing below this folder may be opened but what is below writable or readable.
        writable: nothing anywhere may be written but below this folder.
        limit_seconds: for one input; the process ends with a stack after that.
        extra_bytes: address space that all inputs together may take, besides what is taken already.
    """
    trespasses: list[str] = []
    _watch(
        guarded.resolve(), [writable.resolve()], [] if readable is None else [readable.resolve()], trespasses
    )
    before = _status_bytes("VmRSS")
    if extra_bytes is not None:
        limit = _status_bytes("VmSize") + extra_bytes
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    for name, function in inputs:
        _say(start=name)
        begin = time.monotonic()
        faulthandler.dump_traceback_later(limit_seconds, exit=True)
        trespasses.clear()
        try:
            outcome = function()
        except Exception:
            _say(failure=traceback.format_exc(limit=-6))
            outcome = "failed"
        faulthandler.cancel_dump_traceback_later()
        if outcome != "failed" and trespasses:  # a traceback opens the source files
            _say(failure="; ".join(trespasses))
        _say(outcome=outcome, seconds=time.monotonic() - begin)
    _say(peak_bytes=max(0, _status_bytes("VmHWM") - before))


_unwatched: list[bool] = []


@contextmanager
def unwatched() -> Iterator[None]:
    """What the test itself does: to put an input in its place."""
    _unwatched.append(True)
    try:
        yield
    finally:
        _unwatched.pop()


def _say(**record: object) -> None:
    sys.stdout.write(json.dumps(record) + "\n")
    sys.stdout.flush()


def _status_bytes(name: str) -> int:
    """A line of /proc/self/status, in bytes."""
    text = Path("/proc/self/status").read_text(encoding="ascii")
    return 1024 * int(text.partition(f"{name}:")[2].split()[0])


def _watch(guarded: Path, writable: list[Path], readable: list[Path], trespasses: list[str]) -> None:
    """Notes what this process opens, changes or connects to that it should not. For the life of the process."""

    def inside(path: object, folders: list[Path]) -> bool:
        if isinstance(path, int):
            return True  # a descriptor that was opened under a name before
        whole = Path(os.path.realpath(os.fsdecode(path)))
        return any(folder == whole or folder in whole.parents for folder in folders)

    def hook(event: str, arguments: tuple) -> None:
        if _unwatched:
            return
        if event == "open":
            path, mode, flags = arguments
            writes = bool(flags & WRITING) or (isinstance(mode, str) and any(c in mode for c in "wax+"))
            if writes and not inside(path, [*writable, Path("/dev/null")]):
                trespasses.append(f"opened {path!r} for writing")
            elif not inside(path, [*writable, *readable]) and inside(path, [guarded]):
                trespasses.append(f"opened {path!r}")
        elif event in CHANGES:
            paths = arguments[: CHANGES[event]]
            if event in ("os.remove", "os.rmdir") and arguments[1] != -1:  # relative to an open folder
                paths = (os.path.join(os.readlink(f"/proc/self/fd/{arguments[1]}"), os.fsdecode(paths[0])),)
            for path in paths:
                if not inside(path, writable):
                    trespasses.append(f"{event} of {path!r}")
        elif event in FORBIDDEN:
            trespasses.append(f"{event} {arguments!r}"[:200])

    sys.addaudithook(hook)


def snapshot(folder: Path, leave_out: Path) -> dict[str, tuple[int, int, int]]:
    """Relative path -> (mode, size, time of the last change) of all below a folder but `leave_out`."""
    found = {}
    queue = collections.deque([folder])
    while queue:
        for path in queue.popleft().iterdir():
            if path == leave_out:
                continue
            status = path.lstat()
            size_and_time = (0, 0) if path.is_dir() else (status.st_size, status.st_mtime_ns)
            found[str(path.relative_to(folder))] = (status.st_mode, *size_and_time)
            if path.is_dir() and not path.is_symlink():
                queue.append(path)
    return found
