"""From make_shards to trained weights over S3, against a real server process that is killed midway and comes back."""

import hashlib
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from fake_servers import FaultyServer
from loaders_media import write_shards
from s3_environment import s3_at

import cmac
import train
from shards import storage
from shards.check import check_shards
from shards.manifest import read_manifest
from shards.storage import Retry, SourceError
from tools import make_shards
from tools.make_synthetic_videos import make_synthetic_videos

ROOT = Path(__file__).resolve().parents[1]
FAST = Retry(total_seconds=20.0, first_wait=0.02, longest_wait=0.1, stall_seconds=5.0)
AWAY_SECONDS = 3.0  # that the server is gone
LARGEST_SHARDS = 2.3  # that the cache holds
NUM_VIDEOS = 8

Start = Callable[..., subprocess.Popen]


@pytest.fixture(scope="module")
def port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def s3(port, tmp_path_factory) -> Iterator[Start]:
    """start(num_gets=0) -> process of a server on `port`, filled from `start.copy`. AWS's variables lead there."""
    copy = tmp_path_factory.mktemp("s3") / "copy"
    (copy / "bucket").mkdir(parents=True)
    servers: list[subprocess.Popen] = []

    def start(num_gets: int = 0) -> subprocess.Popen:
        command = [sys.executable, str(ROOT / "tests/s3_server.py"), str(port), str(copy), str(num_gets)]
        servers.append(
            subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        )
        assert servers[-1].stdout.readline() == "serving\n"
        return servers[-1]

    start.copy = copy
    with s3_at(f"http://127.0.0.1:{port}"):
        yield start
    for server in servers:
        server.kill()
        server.wait()


@pytest.fixture(scope="module")
def server(s3) -> subprocess.Popen:
    return s3()


def test_files_in_a_bucket_are_written_listed_read_and_deleted(server, tmp_path, caplog):
    folder, names = "s3://bucket/files", ["a b#c%20?d=é&+.txt", "plain", "sub/deep"]
    for name in names:
        storage.write_bytes(storage.join(folder, name), name.encode(), FAST)
    assert storage.list_names(folder) == sorted([*names[:2], "sub"])
    assert storage.find_names(folder) == sorted(names)
    assert storage.list_sizes(folder) == {name: len(name.encode()) for name in names[:2]}
    assert all(storage.read_bytes(storage.join(folder, name), FAST) == name.encode() for name in names)
    (tmp_path / "file").write_bytes(bytes(range(256)) * 1000)
    digest = hashlib.sha256((tmp_path / "file").read_bytes()).hexdigest()
    storage.upload(tmp_path / "file", storage.join(folder, "sent"), retry=FAST)
    assert storage.checksum(storage.join(folder, "sent")) == digest
    storage.download(
        storage.join(folder, "sent"), tmp_path / "back", num_bytes=256_000, sha256=digest, retry=FAST
    )
    assert (tmp_path / "back").read_bytes() == (tmp_path / "file").read_bytes()
    with pytest.raises(FileNotFoundError):
        storage.read_bytes(storage.join(folder, "none"), FAST)
    with pytest.raises(SourceError, match="cannot write s3://none/x: .*make the bucket or folder first"):
        storage.write_bytes("s3://none/x", b"", FAST)
    for name in [*names, "sent", "none"]:
        storage.remove(storage.join(folder, name), FAST)
    assert storage.find_names(folder) == storage.list_names(folder) == []
    assert caplog.records == []  # nothing had to be tried again


def weights(run_dir: Path) -> dict[str, torch.Tensor]:
    return cmac.load_checkpoint(run_dir)[0].state_dict()


def test_a_source_that_stays_down_ends_the_run_in_one_line_with_shard_and_url(tmp_path, monkeypatch, capsys):
    write_shards(tmp_path / "shards", [4, 4], num_slots=1)
    with FaultyServer(tmp_path / "shards") as server:
        server.fail("train-slot00-000001.tar", *["503"] * 1000)  # answers what it has, not what is in it
        command = train_command(
            server.url, tmp_path / "run", "--loader.cache-dir", str(tmp_path / "cache"), "--loader.num-workers", "0",
            "--loader.no-shuffle", "--loader.source-retry-seconds", "0.5",
        )  # fmt: skip
        monkeypatch.setattr(sys, "argv", command[1:])
        with pytest.raises(SystemExit) as ended:
            train.main()
    assert ended.value.code == 1
    said = capsys.readouterr().err
    assert "Traceback" not in said
    last = said.strip().splitlines()[-1]
    assert last.startswith(f"train.py: cannot read {server.url}/train-slot00-000001.tar: ") and "503" in last


def train_command(shards: str, run_dir: Path, *more: str) -> list[str]:
    small = (
        "--epochs 2 --log-every 1 --device cpu --cpu-threads 1 --loader.backend portable --loader.num-workers 2 "
        "--loader.global-batch-size 2 --loader.prefetch-batches 2 --loader.shuffle-window 0 "
        "--loader.video.num-frames 4 --loader.video.short-side 36 --loader.video.crop-size 32 "
        "--model.video.widths 8 16 --model.video.blocks 1 1 --model.audio.widths 8 16 --model.audio.blocks 1 1 "
        "--model.filter-channels 16 --model.embedding-dim 8 --model.queue-length 8"
    ).split()
    return [
        sys.executable, "train.py", "demo", "--run-dir", str(run_dir), "--loader.shards", shards, *small, *more
    ]  # fmt: skip


@pytest.mark.slow
def test_training_from_s3_outlives_the_server_and_ends_with_the_weights_of_a_local_run(s3, server, tmp_path):
    """Videos and shards in a bucket; the cache holds 2.3 of 8 shards, so that they are brought again and again. The
    server dies by SIGKILL in the middle of sending its third tar, and one like it takes its place seconds later."""
    make_synthetic_videos(tmp_path / "videos", num_videos=NUM_VIDEOS, seconds=2.2, seed=1)
    for path in (tmp_path / "videos").glob("*.mp4"):
        storage.upload(path, f"s3://bucket/videos/{path.name}", retry=FAST)
    made = "--max-clips 2 --videos-per-shard 2 --preset ultrafast --workers 2".split()
    assert make_shards.main(["--videos", "s3://bucket/videos", "--out", "s3://bucket/shards", *made]) == 0
    manifest = read_manifest("s3://bucket/shards")
    assert manifest.num_videos == NUM_VIDEOS and len(manifest.shards) == 8

    local = s3.copy / "bucket" / "shards"
    local.mkdir()
    for name in storage.find_names("s3://bucket/shards"):
        storage.download(f"s3://bucket/shards/{name}", local / name, retry=FAST)
    assert check_shards(local).problems == []
    subprocess.run(
        train_command(str(local), tmp_path / "local", "--loader.num-workers", "0"),
        cwd=ROOT, check=True, capture_output=True, timeout=240,
    )  # fmt: skip

    server.kill()
    server.wait()
    dying = s3(num_gets=3)
    limit = LARGEST_SHARDS * max(entry.bytes + 1000 for entry in manifest.shards)
    cache = ("--loader.cache-dir", str(tmp_path / "cache"), "--loader.cache-gb", str(limit / 1e9))
    with open(tmp_path / "stderr", "w+") as errors:
        training = subprocess.Popen(
            train_command("s3://bucket/shards", tmp_path / "remote", *cache, "--loader.cache-ahead", "1"),
            cwd=ROOT, stdout=subprocess.DEVNULL, stderr=errors,
        )  # fmt: skip
        try:
            assert dying.wait(120) == -signal.SIGKILL
            time.sleep(AWAY_SECONDS)
            assert training.poll() is None  # it waits
            s3()
            assert training.wait(120) == 0, (tmp_path / "stderr").read_text()[-3000:]
        finally:
            training.kill()
            training.wait()
    said = (tmp_path / "stderr").read_text()
    assert "cannot read s3://bucket/shards/train-slot" in said and "attempt 2" in said
    expected, found = weights(tmp_path / "local"), weights(tmp_path / "remote")
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        assert torch.equal(value, found[name]), name
    logged = [json.loads(line) for line in (tmp_path / "remote" / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in logged] == list(range(1, NUM_VIDEOS // 2 * 2 + 1))
    assert sum(path.stat().st_size for path in (tmp_path / "cache").rglob("*.*")) <= limit
