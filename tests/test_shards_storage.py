"""Files behind URLs and on disks: what may pass is tried again, what stays is not, and nothing half is left."""

import errno
import hashlib
import logging
import os
import threading
import time
from pathlib import Path

import aiohttp
import pytest
from fake_servers import FaultyServer
from fsspec.implementations.memory import MemoryFileSystem

from shards import storage
from shards.storage import Retry, SourceError, WrongContents

FAST = Retry(total_seconds=20.0, first_wait=0.01, longest_wait=0.05, stall_seconds=0.5)
SHORT = Retry(total_seconds=0.3, first_wait=0.05, longest_wait=0.1, stall_seconds=0.5)
DATA = os.urandom(300_000)
DIGEST = hashlib.sha256(DATA).hexdigest()


@pytest.fixture
def server(tmp_path):
    (tmp_path / "served").mkdir()
    (tmp_path / "served" / "file").write_bytes(DATA)
    with FaultyServer(tmp_path / "served") as server:
        yield server


def download(server: FaultyServer, target: Path, **options) -> bytes:
    options = {"num_bytes": len(DATA), "sha256": DIGEST, "retry": FAST, **options}
    storage.download(f"{server.url}/file", target, **options)
    return target.read_bytes()


@pytest.mark.parametrize(
    "faults",
    [
        ["503", "503", "503"],
        ["reset"],
        ["stall"],
        ["cut"],
        ["cut-unsaid"],
        ["wrong"],
        ["503", "reset", "cut", "stall", "wrong", "503"],
    ],
    ids="-".join,
)
@pytest.mark.parametrize("ranges", [True, False], ids=["ranges", "no-ranges"])
def test_a_download_outlasts_the_fault_and_is_whole(server, tmp_path, faults, ranges, caplog):
    server.ranges = ranges
    server.fail("file", *faults)
    assert download(server, tmp_path / "copy") == DATA
    assert sorted(path.name for path in tmp_path.iterdir()) == ["copy", "served"]  # no temporary stays
    assert caplog.records and all(record.levelno == logging.WARNING for record in caplog.records)
    assert server.url in caplog.text


def test_a_cut_download_goes_on_where_it_stopped(server, tmp_path):
    server.fail("file", "reset")
    assert download(server, tmp_path / "copy") == DATA
    (_, _, first), (_, _, second) = [request for request in server.requests if request[0] == "GET"]
    assert first is None
    start = int(second.removeprefix("bytes=").split("-")[0])
    assert 0 < start <= len(DATA) // 2


def test_a_download_without_a_checksum_begins_anew(server, tmp_path):
    """Else it could be joined from two versions of the file."""
    server.fail("file", "cut")
    assert download(server, tmp_path / "copy", sha256=None) == DATA
    assert [wanted for method, _, wanted in server.requests if method == "GET"] == [None, None]


def test_a_server_that_never_tells_lengths_is_read(server, tmp_path):
    server.says_length = False
    assert download(server, tmp_path / "copy") == DATA
    assert storage.read_bytes(f"{server.url}/file", FAST) == DATA
    assert storage.size(f"{server.url}/file", FAST) is None and storage.exists(f"{server.url}/file", FAST)


@pytest.mark.parametrize(
    ("fault", "error"),
    [("503", "503"), ("stall", r"no bytes for 0.5 s"), ("reset", "Client|Connection")],
)
def test_a_source_that_goes_on_failing_is_named_with_attempts_time_and_way_out(
    server, tmp_path, fault, error
):
    server.always["file"] = fault
    server.ranges = False
    begin = time.monotonic()
    with pytest.raises(SourceError, match=error) as caught:
        download(server, tmp_path / "copy", retry=SHORT)
    assert time.monotonic() - begin < 10
    message = str(caught.value)
    assert message.startswith(f"cannot read {server.url}/file: ")
    assert "tried" in message and "times in" in message and "run the same command again" in message
    assert [path.name for path in tmp_path.iterdir()] == ["served"]


def test_the_time_counts_from_the_last_progress(server, tmp_path, monkeypatch):
    """A file that takes longer than the budget, from a server that fails now and then, comes all the same."""
    (server.folder / "file").write_bytes(DATA * 60)
    digest = hashlib.sha256(DATA * 60).hexdigest()
    server.fail("file", *["reset", "", ""] * 5)
    monkeypatch.setattr(storage, "PIECE_BYTES", 1 << 20)
    retry = Retry(total_seconds=0.4, first_wait=0.2, longest_wait=0.2, stall_seconds=5.0)
    download(server, tmp_path / "copy", num_bytes=None, sha256=digest, retry=retry)
    assert (tmp_path / "copy").stat().st_size == 60 * len(DATA)


def test_a_server_that_cuts_long_answers_is_read_in_short_ones(server, tmp_path, monkeypatch):
    (server.folder / "file").write_bytes(DATA * 4)
    server.longest = 200_000
    monkeypatch.setattr(storage, "PIECE_BYTES", 1 << 20)
    storage.download(
        f"{server.url}/file", tmp_path / "copy", sha256=hashlib.sha256(DATA * 4).hexdigest(), retry=FAST
    )
    assert (tmp_path / "copy").read_bytes() == DATA * 4


def test_contents_that_stay_wrong_are_read_twice_and_refused(server, tmp_path):
    server.always["file"] = "wrong"
    with pytest.raises(
        WrongContents, match=r"/file has SHA-256 .*, expected .*, read twice; copy it there again"
    ):
        download(server, tmp_path / "copy")
    assert server.num_gets()["file"] == 2 and not (tmp_path / "copy").exists()
    with pytest.raises(WrongContents, match="has 300000 bytes, expected 400000"):
        download(server, tmp_path / "copy", num_bytes=400_000)


def test_what_stays_is_not_tried_again(server, tmp_path):
    with pytest.raises(FileNotFoundError, match="/none"):
        storage.download(f"{server.url}/none", tmp_path / "copy", retry=FAST)
    assert server.num_gets()["none"] == 1
    server.always["file"] = "403"
    with pytest.raises(SourceError, match="403.*credentials"):
        download(server, tmp_path / "copy")
    assert server.num_gets()["file"] == 1
    with pytest.raises(ValueError, match="is to be written, expected a scheme that can be"):
        storage.write_bytes(f"{server.url}/file", b"", FAST)


def test_a_download_ends_soon_after_it_is_given_up(server, tmp_path):
    server.always["file"] = "stall"
    stop = threading.Event()
    threading.Timer(0.3, stop.set).start()
    begin = time.monotonic()
    with pytest.raises(SourceError, match="given up"):
        download(server, tmp_path / "copy", stop=stop, retry=Retry(stall_seconds=60))
    assert time.monotonic() - begin < 10


def test_a_server_that_is_not_there_is_tried_until_it_comes(tmp_path, free_port):
    (tmp_path / "file").write_bytes(DATA)
    came, leave = threading.Event(), threading.Event()

    def come() -> None:
        with FaultyServer(tmp_path, port=free_port):
            came.set()
            leave.wait()

    timer = threading.Timer(0.5, come)
    timer.start()
    try:
        assert storage.read_bytes(f"http://127.0.0.1:{free_port}/file", FAST) == DATA
        assert came.is_set()
    finally:
        leave.set()
        timer.join()


NAMES = ["plain", "a b#c%20?d=é&+.txt", "sub/deep"]


@pytest.mark.parametrize("scheme", ["path", "file", "memory", "renamed"])
def test_a_folder_is_written_listed_read_and_emptied(tmp_path, scheme, monkeypatch):
    """`renamed`: a file system that shows files before all of them is there."""
    if scheme == "renamed":
        monkeypatch.setattr(storage, "ATOMIC_PROTOCOLS", set())
        with pytest.raises(ValueError, match="can be renamed; write to a local folder"):
            storage.write_bytes(f"memory://{tmp_path.name}/x", b"", FAST)

        def rename(self, source: str, target: str) -> None:
            self.store[target] = self.store.pop(source)

        monkeypatch.setattr(MemoryFileSystem, "mv", rename)
    base = {
        "path": str(tmp_path / "x"),
        "file": f"file://{tmp_path / 'x'}",
        "memory": f"memory://{tmp_path.name}",
        "renamed": f"memory://{tmp_path.name}",
    }
    folder = base[scheme]
    assert storage.list_names(folder) == storage.find_names(folder) == [] == list(storage.list_sizes(folder))
    for name in NAMES:
        storage.write_bytes(storage.join(folder, *name.split("/")), name.encode())
    (tmp_path / "local").write_bytes(b"12345")
    storage.upload(tmp_path / "local", storage.join(folder, "sent"))
    top = sorted([*NAMES[:2], "sent", "sub"])
    assert storage.list_names(folder) == top
    assert storage.find_names(folder) == sorted([*NAMES, "sent"])
    assert storage.list_sizes(folder) == {name: len(name.encode()) for name in NAMES[:2]} | {"sent": 5}
    assert all(storage.read_bytes(storage.join(folder, name)) == name.encode() for name in NAMES)
    assert storage.checksum(storage.join(folder, "sent")) == hashlib.sha256(b"12345").hexdigest()
    assert (
        storage.size(storage.join(folder, "sent")) == 5 and storage.size(storage.join(folder, "sub")) is None
    )
    for name in [*NAMES, "sent", "none"]:
        storage.remove(storage.join(folder, name))
        assert storage.size(storage.join(folder, name)) is None
        assert not storage.exists(storage.join(folder, name))
    with pytest.raises(FileNotFoundError):
        storage.read_bytes(storage.join(folder, "none"))
    assert storage.find_names(folder) == []


def test_a_file_that_vanishes_while_a_folder_is_listed_hides_no_other(tmp_path, monkeypatch):
    """A worker that was given up for dead may be at work there still."""
    for name in "abc":
        (tmp_path / name).write_bytes(b"12")
    real = storage._described

    def vanishing(entry: os.DirEntry) -> dict | None:
        (tmp_path / "b").unlink(missing_ok=True)
        return real(entry)

    monkeypatch.setattr(storage, "_described", vanishing)
    assert storage.list_sizes(tmp_path) == {"a": 2, "c": 2}
    assert storage.list_names(tmp_path) == ["a", "c"]


def test_names_are_quoted_for_http_and_come_back_from_its_index(server):
    (server.folder / NAMES[1]).write_bytes(b"odd")
    assert storage.read_bytes(storage.join(server.url, NAMES[1]), FAST) == b"odd"
    assert storage.list_names(server.url, FAST) == sorted([NAMES[1], "file"])
    assert storage.join("https://host/dir?signature=1", "a b", "c") == "https://host/dir/a%20b/c?signature=1"


def test_the_users_configuration_of_fsspec_counts(server, monkeypatch):
    from fsspec.config import conf

    monkeypatch.setitem(conf, "http", {"headers": {"Authorization": "Bearer me"}})
    assert storage.read_bytes(f"{server.url}/file", FAST) == DATA
    assert server.authorizations == ["Bearer me"]


def test_an_upload_of_what_is_there_sends_nothing(tmp_path, monkeypatch):
    (tmp_path / "local").write_bytes(DATA)
    location = f"memory://{tmp_path.name}/sent"
    storage.upload(tmp_path / "local", location, DIGEST)
    with monkeypatch.context() as patch:
        patch.setattr(storage, "_put", lambda *unused: pytest.fail("sent again"))
        storage.upload(tmp_path / "local", location, DIGEST)
    (tmp_path / "local").write_bytes(DATA[::-1])  # of the same size
    storage.upload(tmp_path / "local", location)
    assert storage.read_bytes(location) == DATA[::-1]


def test_a_network_file_system_that_fails_for_a_while_is_read(tmp_path, monkeypatch, caplog):
    (tmp_path / "file").write_bytes(b"here")
    failures = iter([errno.EIO, errno.ESTALE, errno.ETIMEDOUT])
    read = Path.read_bytes

    def flaky(path: Path) -> bytes:
        code = next(failures, None)
        if code is not None:
            raise OSError(code, os.strerror(code), str(path))
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", flaky)
    assert storage.read_bytes(tmp_path / "file", FAST) == b"here"
    assert [record.args[3] for record in caplog.records] == [1, 2, 3]  # the attempts


def test_a_full_disk_is_no_fault_of_the_source(server, tmp_path, monkeypatch):
    def full(*unused) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(storage, "_get", full)
    with pytest.raises(OSError, match="No space left") as caught:
        download(server, tmp_path / "copy")
    assert caught.value.errno == errno.ENOSPC and not isinstance(caught.value, SourceError)
    assert [path.name for path in tmp_path.iterdir()] == ["served"]


def test_a_full_disk_that_is_written_to_has_its_way_out(tmp_path, monkeypatch):
    def full(*unused) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(storage, "write_atomically", full)
    with pytest.raises(
        SourceError, match="^cannot write .*/file: .*No space left on device; make room there"
    ):
        storage.write_bytes(tmp_path / "file", b"x")


def test_libraries_that_are_missing_and_schemes_that_do_not_exist_say_so(monkeypatch):
    import fsspec

    def missing(*unused, **options):
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(fsspec, "filesystem", missing)
    with pytest.raises(ValueError, match=r"s3://bucket/x needs a library .*: pip install cmac\[s3\]"):
        storage.read_bytes("s3://bucket/x")
    monkeypatch.undo()
    with pytest.raises(ValueError, match="nonsense://x cannot be opened: Protocol not known"):
        storage.read_bytes("nonsense://x")


@pytest.mark.parametrize(
    ("error", "passes"),
    [
        (TimeoutError(), True),
        (ConnectionResetError(), True),
        (OSError(errno.EIO, ""), True),
        (OSError(errno.ESTALE, ""), True),
        (OSError(errno.ENOSPC, ""), False),
        (OSError(errno.EINVAL, ""), False),
        (PermissionError(), False),
        (IsADirectoryError(), False),
        (ValueError(), False),
        (aiohttp.ServerDisconnectedError(), True),
        (aiohttp.ClientPayloadError(), True),
        (aiohttp.InvalidURL("x"), False),
        (aiohttp.ClientResponseError(None, (), status=500), True),
        (aiohttp.ClientResponseError(None, (), status=429), True),
        (aiohttp.ClientResponseError(None, (), status=401), False),
    ],
    ids=lambda value: repr(value) if isinstance(value, BaseException) else str(value),
)
def test_what_may_pass_is_told_from_what_stays(error, passes):
    assert storage.is_transient(error) == passes


def test_waits_grow_and_do_not_touch_the_random_numbers_of_the_training(monkeypatch):
    import random

    waits = []
    monkeypatch.setattr(threading.Event, "wait", lambda self, seconds=None: waits.append(seconds) and False)
    state = random.getstate()
    attempts = storage._Attempts("read", "s3://x", Retry(first_wait=1.0, longest_wait=8.0))
    for _ in range(6):
        attempts.failed(TimeoutError())
    for wait, most in zip(waits, [1, 2, 4, 8, 8, 8]):
        assert most / 2 <= wait <= most
    assert random.getstate() == state
