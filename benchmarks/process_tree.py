"""What a process and everything it started use: CPU time, bytes read, memory. Linux, from /proc, no library."""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

_TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, kw_only=True)
class TreeUsage:
    """Sums over the processes of a tree since they were started."""

    cpu_seconds: float
    """User and system time, that of ended and awaited children included; in steps of 10 ms per process."""
    read_bytes: int | None
    """What read calls returned, from disk, page cache and pipes alike; memory-mapped files do not count. None if
    the system does not tell."""


def descendants(pid: int) -> list[int]:
    """pid and all processes below it, parents before children; empty if pid is gone. Also those that have ended and
    were not waited for: their CPU time is not in their parent's yet."""
    children: dict[int, list[int]] = {}
    alive = set()
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            fields = _stat_fields(int(entry))
            if fields is not None:
                children.setdefault(int(fields[1]), []).append(int(entry))
                alive.add(int(entry))
    found = [pid] if pid in alive else []
    for process in found:  # grows while it is walked
        found.extend(children.get(process, ()))
    return found


def tree_usage(pid: int) -> TreeUsage:
    """Usage of pid and all processes below it."""
    ticks, read_bytes = 0, 0
    readable = True
    for process in descendants(pid):
        fields = _stat_fields(process)
        if fields is None:
            continue
        # utime, stime and the same of children that were waited for: a process that ends moves to its parent's.
        ticks += sum(int(fields[index]) for index in (11, 12, 13, 14))
        rchar = _rchar(process)
        readable &= rchar is not None
        read_bytes += rchar or 0
    return TreeUsage(cpu_seconds=ticks / _TICKS, read_bytes=read_bytes if readable else None)


def tree_memory(pid: int) -> int:
    """Bytes of memory that pid and all processes below it keep for themselves: anonymous and shared memory.

    Pages that processes share count once (proportional set sizes), where the system tells them. Mapped files do not
    count: the libraries are shared with whatever else runs them, and a share of them says more about others.
    """
    return sum(_process_memory(process) for process in descendants(pid))


def machine_cpu_seconds() -> tuple[float, float]:
    """(busy, stolen) CPU time of the whole machine since it started; stolen: taken by the host of a virtual machine."""
    with open("/proc/stat", encoding="ascii") as file:
        user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, file.readline().split()[1:9])
    return (user + nice + system + irq + softirq) / _TICKS, steal / _TICKS


def drop_from_page_cache(paths: Iterable[str | os.PathLike]) -> None:
    """Asks the system to forget the contents of files, so that the next read goes to the disk. Needs no privilege."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


@contextmanager
def pinned_to(cores: Iterable[int]) -> Iterator[None]:
    """This thread, and what it starts inside, on these cores."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def _stat_fields(pid: int) -> list[str] | None:
    """Fields of /proc/PID/stat from the third (state) on; None if there is no such process."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    return text.rpartition(")")[2].split()


def _rchar(pid: int) -> int | None:
    try:
        text = Path(f"/proc/{pid}/io").read_text(encoding="ascii")
    except OSError:
        return None
    return next(int(line.split()[1]) for line in text.splitlines() if line.startswith("rchar:"))


def _process_memory(pid: int) -> int:
    for name, labels in (
        ("smaps_rollup", ("Pss_Anon:", "Pss_Shmem:")),
        ("status", ("RssAnon:", "RssShmem:")),
    ):
        try:
            text = Path(f"/proc/{pid}/{name}").read_text(encoding="utf-8", errors="replace")
        except OSError:
            continue
        found = [int(line.split()[1]) for line in text.splitlines() if line.startswith(labels)]
        if found:
            return 1024 * sum(found)
    return 0
