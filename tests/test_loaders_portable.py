"""The portable loader: its processes and buffers, and what is refused at the start."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from loaders_media import assert_equal, encode_audio, encode_video, take, tone, write_shards

from loaders import build_loader
from loaders.base import TooManyBadClips
from loaders.batch import ClipBatch
from loaders.config import LoaderConfig, VideoConfig
from loaders.decode import decode_frames, decode_waveform
from loaders.portable import PortableLoader

SMALL = VideoConfig(num_frames=4, short_side=36, crop_size=32)


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    """37 videos in 3 shards, 2 slots."""
    folder = tmp_path_factory.mktemp("shards")
    write_shards(folder, [15, 12, 10], num_slots=2)
    return folder


def config(folder: Path, **changes) -> LoaderConfig:
    fields = {
        "shards": str(folder),
        "global_batch_size": 6,
        "num_workers": 0,
        "backend": "portable",
        "video": SMALL,
        **changes,
    }
    return LoaderConfig(**fields)


def test_missing_cut_and_too_few_shards_are_refused_at_once(shards, tmp_path):
    with pytest.raises(ValueError, match="expected a folder written by tools/make_shards.py"):
        build_loader(config(tmp_path))
    write_shards(tmp_path, [3, 3], num_slots=1)
    with pytest.raises(ValueError, match="loader.global_batch_size is 8, expected at most 6"):
        build_loader(config(tmp_path, global_batch_size=8))
    with pytest.raises(ValueError, match="make shards with --max-clips of at least 2"):
        build_loader(config(tmp_path, clips_per_video=2))
    tar = tmp_path / "train-slot00-000001.tar"
    tar.write_bytes(tar.read_bytes()[:-512])
    with pytest.raises(ValueError, match=r"000001.tar has \d+ bytes, expected \d+ bytes by its manifest"):
        build_loader(config(tmp_path))
    tar.unlink()
    with pytest.raises(ValueError, match="train-slot00-000001.tar is missing"):
        build_loader(config(tmp_path))


def test_uneven_ranks_are_refused_at_once(shards):
    with pytest.raises(ValueError, match=r"global_batch_size is 6, expected a multiple of .* ranks \(4\)"):
        build_loader(config(shards), 0, 4)


def test_a_shard_that_is_lost_while_training_costs_its_clips_and_then_the_budget(tmp_path):
    write_shards(tmp_path, [60, 60], num_slots=1)
    loader = build_loader(config(tmp_path, num_workers=1, shuffle=False, max_bad_fraction=0.06))
    (tmp_path / "train-slot00-000001.idx").unlink()  # after the check at the start
    batches = []
    with pytest.raises(TooManyBadClips, match=r"bad-shard \d+\), .* most are in train-slot00-000001.tar"):
        for batch in loader:
            batches.append(batch)
    assert all(batch.valid.all() for batch in batches[:10])
    first = batches[10].bad[0]
    assert (first.shard, first.reason) == ("train-slot00-000001.tar", "bad-shard")
    assert first.key == "train-slot00-000001.tar#0" == batches[10].keys[0]


def test_error_of_a_worker_reaches_the_consumer(shards, monkeypatch):
    def broken(*arguments):
        raise MemoryError("no more")

    loader = build_loader(config(shards))
    monkeypatch.setattr("loaders.workers.ShardClips.make", broken)
    with pytest.raises(MemoryError, match="no more"):
        next(iter(loader))


@pytest.mark.parametrize("num_workers", [0, 1])
def test_starting_a_loader_draws_no_random_numbers(shards, num_workers):
    before = torch.get_rng_state()
    take(build_loader(config(shards, num_workers=num_workers)), 1)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_frame_that_would_be_scaled_to_a_giant_is_a_bad_clip(tmp_path):
    write_shards(tmp_path, [3], num_slots=1, sizes=((192, 144), (16, 4096), (144, 144)))
    batch = next(iter(build_loader(config(tmp_path, global_batch_size=3, video=VideoConfig(num_frames=2)))))
    assert [record.reason for record in batch.bad] == ["frame-size"] and batch.valid.sum() == 2


def test_dead_worker_is_named(shards):
    loader = build_loader(config(shards, num_workers=1, prefetch_batches=1))
    batches = iter(loader)
    next(batches)
    os.kill(loader._workers.process_ids[0], signal.SIGKILL)
    with pytest.raises(RuntimeError, match=r"worker died \(pid \d+: killed by signal 9\)"):
        for _ in batches:
            pass


def test_threads_of_the_training_process_stay_as_they_were(shards):
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        next(iter(build_loader(config(shards))))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)


def test_batches_stay_as_they_were_while_later_ones_come(shards):
    loader = build_loader(config(shards, num_workers=2, prefetch_batches=2, clips_per_video=2))
    expected = take(build_loader(config(shards, clips_per_video=2)), 12)
    whole, views = [], []
    for index in range(12):
        batch = take(loader, 1)[0]
        if index % 3 == 0:
            whole.append(batch)
        elif index % 3 == 1:
            views.append(batch.second.log_mel[2:4])
        del batch  # every third buffer is used again while the others are held
    assert loader._workers.num_buffers < 12
    for batch, reference in zip(whole, expected[::3]):
        assert_equal(batch, reference)
    for view, reference in zip(views, expected[1::3]):
        assert torch.equal(view, reference.second.log_mel[2:4])
    loader.close()
    assert torch.equal(views[0], expected[1].second.log_mel[2:4])


def test_buffers_are_used_again(shards):
    loader = build_loader(config(shards, num_workers=1, prefetch_batches=2))
    for _ in range(5):
        for batch in loader:
            del batch
    assert loader._workers.num_buffers <= 4  # two on their way, one handed out, one just given back
    loader.close()


def test_pinned_copy_is_the_batch_and_frees_the_buffer(shards, monkeypatch):
    # As on a machine with a GPU, where a thread makes page-locked copies; here it only copies.
    def copied(batch: ClipBatch) -> ClipBatch:
        return replace(batch, frames=batch.frames.clone(), log_mel=batch.log_mel.clone())

    monkeypatch.setattr(ClipBatch, "pin_memory", copied)
    expected = take(build_loader(config(shards)), 5)
    loader = PortableLoader(config(shards, num_workers=1, prefetch_batches=1), pin_memory=True)
    pinned = take(loader, 5)
    assert loader._workers.num_buffers <= 3
    for a, b in zip(pinned, expected):
        assert_equal(a, b)
    loader.close()


def test_workers_without_buffers_give_the_same(shards, monkeypatch):
    monkeypatch.setattr("loaders.workers.BufferPool.is_supported", lambda: False)
    loader = build_loader(config(shards, num_workers=1, clips_per_video=2))
    for a, b in zip(take(loader, 3), take(build_loader(config(shards, clips_per_video=2)), 3)):
        assert_equal(a, b)
    loader.close()


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="reads /proc")
@pytest.mark.parametrize("backend", ["portable", pytest.param("dali-cpu-decode", marks=pytest.mark.dali)])
def test_no_process_outlives_a_killed_parent(shards, backend):
    if backend != "portable":
        pytest.importorskip("nvidia.dali")
    # The script has no `if __name__ == "__main__":` guard: workers must not import it either.
    script = f"""
        import os, sys, threading, time
        from loaders import build_loader
        from loaders.config import LoaderConfig, VideoConfig
        print("imported", flush=True)
        loader = build_loader(LoaderConfig(shards={str(shards)!r}, global_batch_size=6, num_workers=2,
                                           backend="{backend}",
                                           video=VideoConfig(num_frames=4, short_side=36, crop_size=32)))
        for batch in loader:
            print("batch", flush=True)
            time.sleep(60)
    """
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script)], stdout=subprocess.PIPE, text=True, cwd=shards
    )
    try:
        assert [process.stdout.readline().strip() for _ in range(2)] == ["imported", "batch"]
        family = descendants(process.pid)
        assert len(family) >= 3  # the fork server and two workers
    finally:
        process.kill()
        process.wait()
    deadline = time.monotonic() + 20
    while any(is_running(pid) for pid in family) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert [pid for pid in family if is_running(pid)] == []
    assert process.stdout.read() == ""  # "imported" once: no worker ran the script


def descendants(pid: int) -> list[int]:
    children = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        children += [int(child) for child in (task / "children").read_text().split()]
    return children + [grandchild for child in children for grandchild in descendants(child)]


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_close_ends_the_workers_and_iterating_starts_new_ones(shards):
    loader = build_loader(config(shards, num_workers=2))
    whole = take(build_loader(config(shards)), 4)
    head = take(loader, 2)
    pids = loader._workers.process_ids
    loader.close()
    assert not any(is_running(pid) for pid in pids)
    for a, b in zip(whole, head + take(loader, 2)):
        assert_equal(a, b)
    loader.close()
    loader.close()


@pytest.mark.gpu
def test_batches_are_pinned_where_there_is_a_gpu(shards):
    loader = build_loader(config(shards, num_workers=1, clips_per_video=2), device="cuda")
    batch = next(iter(loader))
    assert batch.frames.is_pinned() and batch.log_mel.is_pinned() and batch.second.frames.is_pinned()
    moved = batch.to("cuda")
    assert moved.frames.stride() == batch.frames.stride()
    assert torch.equal(moved.frames.cpu(), batch.frames)
    loader.close()


def test_media_of_these_tests_decode():
    # What the tests above rest on, apart from the loader.
    assert decode_frames(encode_video(192, 144), range(32), 144).shape == (32, 144, 192, 3)
    assert np.abs(decode_waveform(encode_audio(tone(440))) - tone(440)).max() < 1e-4
