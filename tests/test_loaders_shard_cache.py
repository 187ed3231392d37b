"""Shards from a URL: each is brought once, checked, kept within the limit, and read while and after it is deleted."""

import errno
import itertools
import logging
import multiprocessing
import os
import pickle
import random
import shutil
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import cache_processes
import pytest
from fake_servers import FaultyServer
from loaders_media import assert_equal, take, write_noise_shards, write_shards

from loaders import build_loader
from loaders.base import TooManyBadClips, open_shard_table
from loaders.config import LoaderConfig, VideoConfig
from loaders.plan import EpochPlan
from loaders.shard_cache import CacheConfig, ComingShard, FetchAhead, ShardCache, default_cache_dir
from loaders.shard_files import OpenShards, open_shards
from shards import storage
from shards.manifest import Manifest, read_manifest
from shards.pool import without_main_module
from shards.reader import ShardReader
from shards.schema import BadClip
from shards.storage import Retry, SourceError

FAST = Retry(total_seconds=20.0, first_wait=0.01, longest_wait=0.05, stall_seconds=5.0)
SHORT = Retry(total_seconds=0.3, first_wait=0.05, longest_wait=0.1, stall_seconds=0.5)
NUM_CLIPS = [4, 4, 4]
NUM_SLOTS = 2
NAMES = [f"train-slot{slot:02d}-{index:06d}.tar" for slot in range(NUM_SLOTS) for index in range(3)]
SPAWN = multiprocessing.get_context("spawn")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    write_noise_shards(folder, NUM_CLIPS, NUM_SLOTS, video_bytes=30_000)
    return folder


@pytest.fixture(scope="module")
def manifest(folder) -> Manifest:
    return read_manifest(folder)


@pytest.fixture
def server(folder):
    with FaultyServer(folder) as server:
        yield server


@pytest.fixture
def build(server, manifest, tmp_path):
    """build(max_bytes, retry) -> ShardCache of the server's shards in tmp_path/cache."""

    def build_one(max_bytes: int = 1 << 40, retry: Retry = FAST) -> ShardCache:
        config = CacheConfig(url=server.url, folder=tmp_path / "cache", max_bytes=max_bytes, retry=retry)
        return ShardCache(config, manifest.digest, manifest.shards)

    return build_one


def largest(manifest: Manifest) -> int:
    """What a shard takes of the limit: all are alike."""
    (num_bytes,) = {entry.bytes for entry in manifest.shards}
    return num_bytes + 300 * NUM_CLIPS[0]


def disk_use(cache_dir: Path) -> int:
    """Bytes of the files there, parts by the size that they will have."""
    total = 0
    for path in cache_dir.rglob("*"):
        try:
            digits = path.name.split(".")[-2] if path.suffix == ".part" else ""
            total += int(digits) if digits.isdigit() else path.stat().st_size
        except FileNotFoundError:
            pass
    return total


def names_there(cache_dir: Path) -> set[str]:
    return {path.name for path in cache_dir.rglob("*.tar")}


def all_bytes(reader) -> list[bytes]:
    return [reader.read(position).video for position in range(len(reader))]


def expected_bytes(folder: Path, name: str) -> list[bytes]:
    with ShardReader(folder / name) as reader:
        return all_bytes(reader)


def test_a_shard_is_brought_once_and_read_from_the_disk_from_then_on(build, server, folder, tmp_path):
    cache = build()
    assert all_bytes(cache.open(NAMES[0])) == expected_bytes(folder, NAMES[0])
    assert server.num_gets() == {NAMES[0]: 1, NAMES[0][:-4] + ".idx": 1}
    again = pickle.loads(pickle.dumps(cache))  # what a worker gets
    assert all_bytes(again.open(NAMES[0])) == expected_bytes(folder, NAMES[0])
    assert all_bytes(build().open(NAMES[0])) == expected_bytes(folder, NAMES[0])  # another run
    assert server.num_gets()[NAMES[0]] == 1 and names_there(tmp_path) == {NAMES[0]}


def in_processes(tasks: list[tuple[ShardCache, list[str]]]) -> tuple[list, Any]:
    """(processes, queue of their results): each opens shards in its order, then reads all clips of them."""
    results = SPAWN.Queue()
    processes = [SPAWN.Process(target=cache_processes.open_all, args=(*task, results)) for task in tasks]
    with without_main_module():
        for process in processes:
            process.start()
    return processes, results


def test_processes_that_want_a_shard_at_once_download_it_once(build, server, folder):
    server.fail(NAMES[0], "503", "cut", "503", "503")  # so that all of them meet it under way
    processes, results = in_processes([(build(), [NAMES[0]])] * 3)
    found = [results.get(timeout=60) for _ in processes]
    for process in processes:
        process.join()
    assert found == [[expected_bytes(folder, NAMES[0])]] * 3
    assert server.num_gets()[NAMES[0]] == 5  # four that failed and the one that did not


def test_the_least_recently_opened_shards_make_way(build, manifest, tmp_path):
    limit = int(2.5 * largest(manifest))
    cache = build(limit)
    for name in NAMES[:2]:
        cache.open(name)
        time.sleep(0.02)
    cache.open(NAMES[0])
    time.sleep(0.02)
    cache.open(NAMES[3])
    assert names_there(tmp_path) == {NAMES[0], NAMES[3]}
    cache.keep([NAMES[0]])
    cache.open(NAMES[4])
    assert names_there(tmp_path) == {NAMES[0], NAMES[4]}
    assert disk_use(tmp_path / "cache") <= limit


def test_shards_of_the_user_below_the_folder_of_the_cache_are_left_alone(build, manifest, folder, tmp_path):
    """With `--loader.cache-dir /scratch`, where /scratch/k400 holds shards, too."""
    mine = tmp_path / "cache" / "k400"
    shutil.copytree(folder, mine)
    (mine / ".x.tar.100.part").write_bytes(b"mine")
    for path in mine.iterdir():
        os.utime(path, (1, 1))
    before = sorted(mine.iterdir())
    cache = build(int(1.2 * largest(manifest)))
    for name in NAMES:
        cache.open(name)
    assert sorted(mine.iterdir()) == before and len(names_there(tmp_path / "cache") & set(NAMES)) == len(
        NAMES
    )


def test_whoever_has_a_shard_open_reads_on_after_it_was_deleted(build, manifest, folder, tmp_path):
    cache = build(int(1.2 * largest(manifest)))
    readers = {name: cache.open(name) for name in NAMES}
    assert names_there(tmp_path) == {NAMES[-1]}
    for name, reader in readers.items():
        assert all_bytes(reader) == expected_bytes(folder, name)


def test_processes_keep_the_limit_together(build, manifest, folder, tmp_path):
    limit = int(2.2 * largest(manifest))
    orders = [random.Random(number).sample(NAMES * 3, 3 * len(NAMES)) for number in range(3)]
    processes, results = in_processes([(build(limit), order) for order in orders])
    most, found = 0, []
    while len(found) < 3:
        most = max(most, disk_use(tmp_path / "cache"))
        if not results.empty():
            found.append(results.get())
        assert len(found) == 3 or any(process.is_alive() for process in processes) or not results.empty()
        time.sleep(0.001)
    for process in processes:
        process.join()
    expected = {name: expected_bytes(folder, name) for name in NAMES}
    assert sorted(found) == sorted([expected[name] for name in order] for order in orders)
    assert 0 < most <= limit


def test_a_limit_below_a_shard_is_refused_with_both_numbers(build, manifest):
    with pytest.raises(
        ValueError, match=r"loader.cache_gb is 1e-06, expected at least 0.000\d+, the size of train-"
    ):
        build(1000)
    build(largest(manifest))


def test_a_folder_that_cannot_be_locked_is_refused_by_name(build, manifest, tmp_path, monkeypatch):
    def refuse(descriptor, operation):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", refuse)
    with pytest.raises(
        ValueError, match=rf"loader.cache_dir: {tmp_path}.* cannot be locked .*a disk of this machine"
    ):
        build(largest(manifest))


def test_what_a_killed_process_left_is_cleared_away(build, server, manifest, folder, tmp_path):
    """Its part is deleted, and takes no room: the limit holds one shard."""
    cache = build(int(1.2 * largest(manifest)), replace(FAST, stall_seconds=60))
    server.fail(NAMES[0], "stall")
    (process,), _ = in_processes([(cache, [NAMES[0]])])
    while server.num_gets()[NAMES[0]] == 0:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert list(tmp_path.rglob("*.part"))
    assert all_bytes(cache.open(NAMES[1])) == expected_bytes(folder, NAMES[1])
    assert not list(tmp_path.rglob("*.part"))
    assert all_bytes(cache.open(NAMES[0])) == expected_bytes(folder, NAMES[0])


def test_a_cached_shard_that_was_damaged_is_brought_again(build, server, folder, tmp_path):
    build().open(NAMES[0])
    path = next(tmp_path.rglob(NAMES[0]))
    path.write_bytes(path.read_bytes()[:-1024])
    assert all_bytes(build().open(NAMES[0])) == expected_bytes(folder, NAMES[0])
    path.with_suffix(".idx").unlink()
    assert all_bytes(build().open(NAMES[0])) == expected_bytes(folder, NAMES[0])
    assert server.num_gets()[NAMES[0]] == 3


def open_files(build, server, folder, **options) -> OpenShards:
    return OpenShards(open_shards(server.url, read_manifest(folder), cache=build(**options)))


def test_a_shard_that_stays_wrong_costs_its_clips_and_is_downloaded_twice(
    build, server, folder, tmp_path, caplog
):
    server.always[NAMES[1]] = "wrong"
    shards = open_files(build, server, folder)
    for position in range(NUM_CLIPS[1]):
        assert shards.name((0,), 0, 1, position) == (f"{NAMES[1]}#{position}", NAMES[1])
        with pytest.raises(BadClip) as caught:
            shards.read((0,), 0, 1, position)
        assert (caught.value.shard, caught.value.reason) == (NAMES[1], "bad-shard")
    assert server.num_gets()[NAMES[1]] == 2 and names_there(tmp_path) == set()
    assert f"{server.url}/{NAMES[1]} has SHA-256" in caplog.text
    assert shards.read((0,), 0, 0, 0).shard == NAMES[0]


@pytest.mark.parametrize("what", ["index", "gone", "index gone"])
def test_what_is_not_as_the_manifest_has_it_costs_its_clips(build, server, folder, what, tmp_path):
    shards = open_files(build, server, folder)
    index = NAMES[1][:-4] + ".idx"
    server.always[NAMES[1] if what == "gone" else index] = "wrong" if what == "index" else "404"
    with pytest.raises(BadClip) as caught:
        shards.read((0,), 0, 1, 0)
    assert caught.value.reason == "bad-shard"
    assert (NAMES[1] if what == "gone" else index) in str(caught.value.__cause__)
    assert names_there(tmp_path) == set() and not list(tmp_path.rglob("*.idx"))


def test_a_source_that_is_down_is_named_with_the_shard(build, server, folder):
    shards = open_files(build, server, folder, retry=SHORT)
    server.always[NAMES[1]] = "503"
    for ask in (shards.name, shards.read):
        with pytest.raises(
            SourceError, match=rf"cannot read {server.url}/{NAMES[1]}: .*503.* tried \d+ times"
        ):
            ask((0,), 0, 1, 0)


def test_a_full_disk_names_the_cache_and_the_limit(build, server, folder, monkeypatch):
    def full(*unused, **options) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "x")

    shards = open_files(build, server, folder)
    monkeypatch.setattr(storage, "download", full)
    with pytest.raises(
        OSError, match=r"No space left.*\(loader.cache_dir\).*\(loader.cache_gb\); free space"
    ):
        shards.read((0,), 0, 1, 0)


def test_readers_in_threads_do_not_wait_for_a_shard_that_is_being_brought(build, server, folder):
    """As with dali-gpu; and closing ends the download."""
    shards = open_files(build, server, folder, retry=replace(FAST, stall_seconds=60))
    shards.read((0,), 0, 0, 0)
    server.always[NAMES[1]] = "stall"
    errors = []

    def read() -> None:
        try:
            shards.read((0,), 0, 1, 0)
        except SourceError as error:
            errors.append(error)

    thread = threading.Thread(target=read)
    thread.start()
    while server.num_gets()[NAMES[1]] == 0:
        time.sleep(0.01)
    assert shards.read((0,), 0, 0, 1).shard == NAMES[0]
    shards.close()
    thread.join(10)
    assert not thread.is_alive() and len(errors) == 1


def test_shards_that_are_missing_or_short_on_the_server_are_found_by_listing(
    build, server, folder, tmp_path, caplog
):
    copy = shutil.copytree(folder, tmp_path / "copy")
    (copy / NAMES[0]).unlink()
    (copy / NAMES[1][:-4]).with_suffix(".idx").unlink()
    (copy / NAMES[5]).write_bytes(b"short")
    manifest = read_manifest(folder)
    memory = f"memory://{tmp_path.name}"
    for path in copy.iterdir():
        storage.upload(path, storage.join(memory, path.name))
    server.folder = copy
    for url in (server.url, memory):
        caplog.clear()
        files = open_shards(url, manifest, cache=build(), max_bad_shard_fraction=1.0)
        assert files.substitutions == {(0, 0): 1, (0, 1): 1, (1, 2): 0}
        assert f"{url}/{NAMES[0]} is missing" in files.problems[0]
        assert f"{NAMES[1][:-4]}.idx is missing" in files.problems[1]
        assert f"{NAMES[5]} has 5 bytes, expected" in files.problems[2]
        assert len(caplog.records) == 3
        with pytest.raises(ValueError, match="3 of 6 shards of .* are bad"):
            open_shards(url, manifest, cache=build())
    assert {name for name in server.num_gets() if name.endswith(".tar")} <= {NAMES[0]}  # looked for once more


def test_coming_shards_are_brought_ahead_in_order_and_no_further_than_asked(build, server, manifest):
    cache = build()
    coming = [ComingShard(name, (0, 2 * n), (0, 2 * n + 1)) for n, name in enumerate(NAMES)]
    coming += [ComingShard(NAMES[0], (1, n), (1, n)) for n in range(100)]
    ahead = FetchAhead(cache, iter(coming), num_ahead=2)

    def brought() -> set[str]:
        return {name for name in server.num_gets() if name.endswith(".tar")}

    try:
        for batch, expected in [(0, 3), (1, 3), (2, 4), (3, 4), (6, 6)]:
            ahead.move(0, batch)
            end = time.monotonic() + 20
            while brought() != set(NAMES[:expected]) and time.monotonic() < end:
                time.sleep(0.01)
            time.sleep(0.1)
            assert brought() == set(NAMES[:expected])
    finally:
        ahead.close()
        cache.close()


def test_bringing_ahead_leaves_what_is_in_use_where_it_is(build, server, manifest, tmp_path):
    """The limit holds two shards: one is in use and one comes, however many are asked for."""
    cache = build(int(2.2 * largest(manifest)))
    coming = [ComingShard(name, (0, n), (0, n)) for n, name in enumerate(NAMES)]
    coming += [ComingShard(NAMES[0], (1, n), (1, n)) for n in range(100)]
    ahead = FetchAhead(cache, iter(coming), num_ahead=4)
    try:
        for batch in range(4):
            ahead.move(0, batch)
            end = time.monotonic() + 20
            while names_there(tmp_path) != set(NAMES[batch : batch + 2]) and time.monotonic() < end:
                time.sleep(0.01)
            time.sleep(0.1)
            assert names_there(tmp_path) == set(NAMES[batch : batch + 2])
    finally:
        ahead.close()
        cache.close()


@pytest.mark.parametrize("drop_last", [True, False])
@pytest.mark.parametrize("window", [0, 7, 4096])
def test_spans_of_shards_are_where_their_clips_are(drop_last, window):
    plan = EpochPlan(
        clips_per_shard=[9, 4, 1, 12, 6],
        seed=3,
        epoch=1,
        global_batch_size=5,
        drop_last=drop_last,
        shuffle_window=window,
    )
    places: dict[int, list[int]] = {}
    for batch in range(plan.num_batches):
        for shard in plan.batch(batch)[:, 0].tolist():
            if shard >= 0:
                places.setdefault(shard, []).append(batch)
    assert plan.shard_spans() == [(shard, min(where), max(where)) for shard, where in places.items()]


def test_the_default_folder_is_the_users_cache(monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert default_cache_dir() == Path("/somewhere/cmac/shards")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert default_cache_dir() == Path.home() / ".cache" / "cmac" / "shards"


@pytest.fixture(scope="module")
def videos(tmp_path_factory) -> Path:
    """Real clips: 24 videos in 4 shards, 2 slots."""
    folder = tmp_path_factory.mktemp("videos")
    write_shards(folder, [6] * 4, num_slots=2)
    return folder


def loader_config(shards: str, tmp_path: Path, **changes) -> LoaderConfig:
    fields = {
        "shards": shards,
        "global_batch_size": 6,
        "num_workers": 2,
        "backend": "portable",
        "shuffle_window": 8,
        "cache_dir": str(tmp_path / "cache"),
        "video": VideoConfig(num_frames=4, short_side=36, crop_size=32),
    }
    return LoaderConfig(**{**fields, **changes})


def test_a_url_gives_the_batches_of_the_folder_whatever_fails_meanwhile(videos, tmp_path, caplog):
    size = max(path.stat().st_size for path in videos.glob("*.tar"))
    with FaultyServer(videos) as server:
        for number, path in enumerate(sorted(videos.glob("*.tar"))):
            server.fail(path.name, *[("503",), ("cut",), ("reset",), ("wrong",)][number % 4])
        config = loader_config(
            server.url, tmp_path, cache_gb=4.5 * size / 1e9, cache_ahead=1, clips_per_video=2
        )
        loader = build_loader(config)
        remote = take(loader, 8)
        state = loader.state_dict()
        loader.close()
    local = build_loader(replace(config, shards=str(videos), num_workers=0))
    for a, b in zip(remote, take(local, 8), strict=True):
        assert_equal(a, b)
    assert state == local.state_dict()  # a run may move from one to the other
    assert loader.bad_clips.total() == 0
    assert disk_use(tmp_path / "cache") <= 4.5 * size


def test_workers_hand_on_the_error_of_a_source_as_itself(videos, tmp_path):
    with FaultyServer(videos) as server:
        config = loader_config(
            server.url, tmp_path, num_workers=1, source_retry_seconds=0.5, source_stall_seconds=2.0
        )
        loader = build_loader(config)
        for path in videos.glob("*.tar"):
            server.always[path.name] = "503"
        begin = time.monotonic()
        with pytest.raises(
            SourceError, match=rf"^cannot read {server.url}/train-slot00-\d+.tar: [^\n]*503[^\n]*$"
        ):
            next(iter(loader))
        assert time.monotonic() - begin < 60
        loader.close()


def test_a_cache_that_is_too_small_for_the_window_is_said(videos, tmp_path, caplog):
    size = max(path.stat().st_size for path in videos.glob("*.tar"))
    with FaultyServer(videos) as server:
        open_shard_table(loader_config(server.url, tmp_path, cache_gb=1.1 * size / 1e9))
        assert "a window of 8 clips and 4 shards ahead may take" in caplog.text
        caplog.clear()
        files, _ = open_shard_table(loader_config(server.url, tmp_path))
        assert caplog.records == [] and files.num_open == 4


def test_a_budget_that_is_spent_names_the_worst_shards_of_the_url(videos, tmp_path):
    with FaultyServer(videos) as server:
        worst = sorted(path.name for path in videos.glob("train-slot00-*.tar"))[0]
        config = loader_config(server.url, tmp_path, num_workers=0, cache_ahead=0)
        loader = build_loader(config)
        server.always[worst] = "wrong"
        with pytest.raises(
            TooManyBadClips, match=rf"bad-shard \d+\), expected at most 1.00% .*{worst} \(\d+\)"
        ):
            take(loader, 40)


def test_failures_of_a_local_read_are_tried_again_before_they_cost_a_clip(folder, monkeypatch, caplog):
    monkeypatch.setattr("loaders.shard_files.READ_PAUSES", (0.01, 0.01, 0.01))
    shards = OpenShards(open_shards(folder, read_manifest(folder)))
    failures = iter([errno.ESTALE, errno.EIO, errno.ETIMEDOUT])
    handles = []
    pread = os.pread

    def flaky(descriptor: int, length: int, offset: int) -> bytes:
        handles.append(descriptor)
        code = next(failures, None)
        if code is not None:
            raise OSError(code, os.strerror(code))
        return pread(descriptor, length, offset)

    expected = shards.read((0,), 0, 0, 1)
    monkeypatch.setattr(os, "pread", flaky)
    with caplog.at_level(logging.WARNING):
        assert shards.read((0,), 0, 0, 1) == expected
    assert len(caplog.records) == 3 and NAMES[0] in caplog.text
    assert len(handles) == 4 and all(
        a != b for a, b in itertools.pairwise(handles)
    )  # the file is opened anew
    failures = iter([errno.EIO] * 4)
    with pytest.raises(BadClip) as caught:
        shards.read((0,), 0, 0, 1)
    assert caught.value.reason == "read-error"
    assert shards.read((0,), 0, 0, 1) == expected  # the next clip of the shard is tried anew
