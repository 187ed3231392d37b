"""Only one make_shards at a time works in a work area: a lock on its file, or a lease where it is at a URL."""

import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from shards import storage
from shards.lock import take_lock

LOCK_NAME = "make_shards.lock"
LEASE_NAME = "lease.json"
HEARTBEAT_SECONDS = 30.0
"""Between two renewals of a lease."""
STALE_SECONDS = 300.0
"""A lease that was not renewed for so long is taken over. Clocks have to agree better than that."""
SETTLE_SECONDS = 1.0
"""Of two runs that take the same lease, the one that wrote last has it so long after."""


class LeaseLost(OSError):
    """Another run has taken over the work area."""


@contextmanager
def held(work: str, out: str) -> Iterator[Callable[[], None]]:
    """Hold the work area while inside. Gives a function that raises LeaseLost once it is held no more.

    A local lock goes with the process, however that ends. A lease stays when the process is killed: a run on
    the same machine takes it over at once, one on another machine when it is stale.

    Raises:
        ValueError: another run holds it.
    """
    if storage.is_url(work):
        with _leased(work, out) as check:
            yield check
    else:
        with _locked(Path(work), out):
            yield lambda: None


@contextmanager
def _locked(work: Path, out: str) -> Iterator[None]:
    path = work / LOCK_NAME
    while True:
        with open(path, "w", encoding="ascii") as file:
            if not take_lock(file, work):
                raise ValueError(f"{out} is being written by another make_shards; wait for it or stop it")
            if not path.exists() or os.fstat(file.fileno()).st_ino != path.stat().st_ino:
                work.mkdir(parents=True, exist_ok=True)  # a run that ended has just tidied up
                continue
            yield
            return


@contextmanager
def _leased(work: str, out: str) -> Iterator[Callable[[], None]]:
    location = storage.join(work, LEASE_NAME)
    me = {"host": socket.gethostname(), "pid": os.getpid(), "token": secrets.token_hex(8)}
    other = _read(location)
    if other is not None and not _is_over(other, me):
        age = max(time.time() - other["time"], 0)
        raise ValueError(
            f"{out} is being written by another make_shards (process {other['pid']} on {other['host']}, alive "
            f"{age:.0f} s ago); wait for it or stop it; its lease is taken over {STALE_SECONDS:.0f} s after it "
            f"was last alive"
        )
    _write(location, me)
    time.sleep(SETTLE_SECONDS)
    _check_owner(location, me, out)
    lost = threading.Event()
    stop = threading.Event()

    def renew() -> None:
        last = time.monotonic()
        while not stop.wait(HEARTBEAT_SECONDS):
            try:
                _check_owner(location, me, out)
                _write(location, me)
                last = time.monotonic()
            except LeaseLost:
                lost.set()
                return
            except Exception:  # whatever a client library raises
                if time.monotonic() - last > STALE_SECONDS - HEARTBEAT_SECONDS:
                    lost.set()
                    return

    def check() -> None:
        if lost.is_set():
            raise LeaseLost(
                f"{location} was taken over by another make_shards, or could not be renewed for "
                f"{STALE_SECONDS:.0f} s; see that no other run writes to {out}, then run the same command again"
            )

    thread = threading.Thread(target=renew, daemon=True, name="lease")
    thread.start()
    try:
        yield check
    finally:
        stop.set()
        thread.join()
        if not lost.is_set():
            storage.remove(location)


def _is_over(other: dict[str, Any], me: dict[str, Any]) -> bool:
    """Whether the run that holds a lease is gone."""
    if time.time() - other["time"] > STALE_SECONDS:
        return True
    if other["host"] != me["host"]:
        return False
    try:
        os.kill(other["pid"], 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        pass
    return False


def _read(location: str) -> dict[str, Any] | None:
    try:
        lease = json.loads(storage.read_bytes(location))
        return {name: lease[name] for name in ("host", "pid", "token", "time")}
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{location} is not a lease ({error}); delete it if no make_shards runs") from error


def _write(location: str, me: dict[str, Any]) -> None:
    storage.write_bytes(location, json.dumps({**me, "time": time.time()}).encode("ascii"))


def _check_owner(location: str, me: dict[str, Any], out: str) -> None:
    lease = _read(location)
    if lease is None or lease["token"] != me["token"]:
        raise LeaseLost(
            f"{location} was taken by another make_shards that writes to {out}; expected to be alone: stop one"
        )
