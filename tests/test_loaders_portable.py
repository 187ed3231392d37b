"""The portable loader: contract of a batch, epochs, determinism, exact resume, bad clips, processes."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from loaders_media import encode_audio, encode_video, tone, write_shards

from loaders import build_loader
from loaders.audio_ops import augment_log_mel, log_mel_spectrogram
from loaders.augment import draw_augmentation
from loaders.base import TooManyBadClips
from loaders.batch import BadClipRecord, ClipBatch
from loaders.config import AudioConfig, LoaderConfig, VideoConfig
from loaders.decode import decode_frames, decode_waveform, uniform_frame_indices
from loaders.portable import PortableLoader
from loaders.video_ops import color_jitter, crop_frames, flip_frames
from shards.reader import ShardReader

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


def assert_equal(a: ClipBatch, b: ClipBatch) -> None:
    for name in ("frames", "log_mel", "video_ids", "valid"):
        assert torch.equal(getattr(a, name), getattr(b, name)), name
    for name in ("keys", "clips", "augmentations", "bad", "epoch", "step"):
        assert getattr(a, name) == getattr(b, name), name
    assert (a.second is None) == (b.second is None)
    if a.second is not None:
        assert_equal(a.second, b.second)


def take(loader, count: int) -> list[ClipBatch]:
    """count batches, over the ends of epochs."""
    batches = []
    while len(batches) < count:
        for batch in loader:
            batches.append(batch)
            if len(batches) == count:
                break
    return batches


def test_batch_has_the_promised_shapes_types_and_layout(shards):
    batch = next(iter(build_loader(config(shards, video=VideoConfig()))))
    assert batch.num_clips == 6
    assert batch.frames.shape == (6, 3, 32, 128, 128) and batch.frames.dtype == torch.uint8
    assert batch.frames.permute(0, 2, 3, 4, 1).is_contiguous()
    assert batch.log_mel.shape == (6, 1, 257, 101) and batch.log_mel.dtype == torch.float32
    assert batch.video_ids.dtype == torch.int64 and batch.valid.dtype == torch.bool and batch.valid.all()
    assert batch.video_ids.tolist() == [clip.video_number for clip in batch.clips]
    assert batch.keys == tuple(clip.key for clip in batch.clips)
    assert (batch.epoch, batch.step, batch.bad, batch.second) == (0, 0, (), None)
    moved = batch.to("cpu")
    assert_equal(moved, batch)


@pytest.mark.parametrize("jitter", [False, True])
def test_row_is_the_reference_transforms_with_the_drawn_parameters(shards, jitter):
    video, audio = VideoConfig(num_frames=8, color_jitter=jitter), AudioConfig()
    batch = next(iter(build_loader(config(shards, video=video, seed=3))))
    raw = {clip.info.key: clip for clip in every_raw_clip(shards, slot=0)}
    for row, key in enumerate(batch.keys):
        clip = raw[key]
        height, width = clip.info.frame_height, clip.info.frame_width
        drawn = draw_augmentation(video, audio, 3, 0, key, height, width, 101)
        assert batch.augmentations[row] == drawn
        frames = torch.from_numpy(decode_frames(clip.video, uniform_frame_indices(8), 144))
        frames = crop_frames(frames, drawn.crop_top, drawn.crop_left, drawn.crop_size)
        frames = flip_frames(frames) if drawn.flip else frames
        frames = color_jitter(frames, drawn.color_order, drawn.brightness, drawn.contrast, drawn.saturation)
        assert torch.equal(batch.frames[row].permute(1, 2, 3, 0), frames)
        log_mel = log_mel_spectrogram(torch.from_numpy(decode_waveform(clip.audio)), audio)
        assert torch.allclose(batch.log_mel[row, 0], augment_log_mel(log_mel, drawn), atol=1e-4)


def every_raw_clip(folder: Path, slot: int):
    for path in sorted(folder.glob(f"train-slot{slot:02d}-*.tar")):
        with ShardReader(path) as reader:
            yield from (reader.read(position) for position in range(len(reader)))


def test_without_augmentation_rows_do_not_depend_on_the_epoch(shards):
    video, audio = replace(SMALL, augment=False), AudioConfig(augment=False)
    still = config(shards, video=video, audio=audio, shuffle=False)
    loader = build_loader(still)
    first = take(loader, len(loader))
    again = take(loader, 2 * len(loader))[len(loader) :]  # epoch 2 reads slot 0 again
    assert again[0].epoch == 2
    for a, b in zip(first, again):
        assert_equal(replace(a, epoch=2), b)


@pytest.mark.parametrize(("world_size", "drop_last"), [(1, True), (2, False), (3, True), (6, False)])
def test_each_clip_of_the_slot_comes_once_over_ranks(shards, world_size, drop_last):
    keys, lengths, padding = [], set(), 0
    for rank in range(world_size):
        loader = build_loader(config(shards, drop_last=drop_last), rank, world_size)
        for batch in loader:
            assert batch.num_clips == 6 // world_size
            keys += [key for key in batch.keys if key]
            padding += sum(not key for key in batch.keys)
            assert batch.valid.tolist() == [key != "" for key in batch.keys]
        lengths.add(len(loader))
        assert (loader.epoch, loader.next_batch) == (1, 0)
    every_key = {clip.info.key for clip in every_raw_clip(shards, slot=0)}
    assert lengths == {6 if drop_last else 7} and padding == (0 if drop_last else 5)
    assert len(keys) == len(set(keys)) == (36 if drop_last else 37) and set(keys) <= every_key


def test_padding_rows_hold_the_mean(shards):
    loader = build_loader(config(shards, drop_last=False))
    last = list(loader)[-1]
    assert last.valid.tolist() == [True] + [False] * 5
    assert (last.frames[1:] == 115).all() and (last.log_mel[1:] == 0).all()
    assert last.video_ids[1:].tolist() == [-1] * 5 and last.clips[1:] == last.augmentations[1:] == (None,) * 5
    assert last.bad == () and loader.bad_clips.total() == 0


def test_epochs_read_their_slots_with_new_augmentation(shards):
    loader = build_loader(config(shards, shuffle=False))
    first, second, third = take(loader, 6), take(loader, 6), take(loader, 6)
    assert [batch.epoch for batch in first + second + third] == [0] * 6 + [1] * 6 + [2] * 6
    assert {clip.slot for batch in first for clip in batch.clips} == {0}
    assert {clip.slot for batch in second for clip in batch.clips} == {1}
    assert [batch.video_ids.tolist() for batch in first] == [batch.video_ids.tolist() for batch in second]
    assert first[0].keys == third[0].keys and first[0].augmentations != third[0].augmentations


def test_second_clips_are_of_the_same_videos_and_another_slot(shards):
    for batch in take(build_loader(config(shards, clips_per_video=2)), 8):
        assert batch.video_ids.tolist() == batch.second.video_ids.tolist()
        assert {clip.slot for clip in batch.clips} != {clip.slot for clip in batch.second.clips}
        assert batch.second.second is None and batch.second.valid.all()
        for key, augmentation, other in zip(batch.keys, batch.augmentations, batch.second.augmentations):
            assert augmentation != other, key


def test_batches_are_the_same_for_any_number_of_workers(shards):
    batches = {}
    for num_workers in (0, 1, 2):
        loader = build_loader(config(shards, num_workers=num_workers, clips_per_video=2, seed=11))
        batches[num_workers] = take(loader, 9)  # into the second epoch
        loader.close()
    for num_workers in (1, 2):
        for a, b in zip(batches[0], batches[num_workers]):
            assert_equal(a, b)


def test_resume_with_other_ranks_and_workers_gives_what_was_left(shards):
    whole = take(build_loader(config(shards)), 12)
    first = build_loader(config(shards, num_workers=2, prefetch_batches=8))
    head = take(first, 4)
    state = first.state_dict()
    first.close()
    assert (state["epoch"], state["next_batch"]) == (0, 4)  # not the batches that workers had ready
    for world_size in (2, 3):
        ranks = [build_loader(config(shards), rank, world_size) for rank in range(world_size)]
        for loader in ranks:
            loader.load_state_dict(state)
        tail = [take(loader, 8) for loader in ranks]
        for index, batch in enumerate(whole[4:]):
            parts = [tail[rank][index] for rank in range(world_size)]
            assert sum((part.keys for part in parts), ()) == batch.keys
            assert torch.equal(torch.cat([part.frames for part in parts]), batch.frames)
            assert torch.equal(torch.cat([part.log_mel for part in parts]), batch.log_mel)
    for a, b in zip(whole, head):
        assert_equal(a, b)


def test_state_counts_batches_when_they_are_handed_out(shards):
    loader = build_loader(config(shards))
    for index, batch in enumerate(loader):
        state = loader.state_dict()
        assert (batch.step, state["epoch"], state["next_batch"]) == (index, 0, index + 1)
    assert (loader.state_dict()["epoch"], loader.state_dict()["next_batch"]) == (1, 0)


def test_state_of_an_epochs_last_batch_ends_the_epoch_once(shards):
    loader = build_loader(config(shards))
    batches = iter(loader)
    for _ in range(6):
        next(batches)
    resumed = build_loader(config(shards))
    resumed.load_state_dict(loader.state_dict())
    assert list(resumed) == [] and resumed.epoch == 1


def test_going_back_gives_the_same_batches_again(shards):
    loader = build_loader(config(shards, num_workers=1))
    start = loader.state_dict()
    first = take(loader, 3)
    loader.load_state_dict(start)
    for a, b in zip(first, take(loader, 3)):
        assert_equal(a, b)
    loader.close()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 1}, "loader state was saved with seed 0, but it is 1 now"),
        ({"global_batch_size": 12}, "loader state was saved with global_batch_size 6, but it is 12 now"),
        ({"shuffle_window": 5}, "loader state was saved with shuffle_window 4096, but it is 5 now"),
    ],
)
def test_state_of_another_order_is_refused(shards, changes, message):
    state = build_loader(config(shards)).state_dict()
    with pytest.raises(ValueError, match=message):
        build_loader(config(shards, **changes)).load_state_dict(state)


def test_state_of_other_shards_is_refused(shards, tmp_path):
    write_shards(tmp_path, [8])
    state = build_loader(config(shards)).state_dict()
    with pytest.raises(ValueError, match="loader state was saved with manifest"):
        build_loader(config(tmp_path)).load_state_dict(state)


def test_bad_clips_are_counted_marked_and_never_replaced(tmp_path):
    write_shards(tmp_path, [10, 10], num_slots=1, broken={(0, 3): "video", (0, 14): "short"})
    flip_a_bit_of_the_sound(tmp_path / "train-slot00-000001.tar", position=7)
    loader = build_loader(config(tmp_path, global_batch_size=5))
    batches = list(loader)
    records = [record for batch in batches for record in batch.bad]
    keys = [ShardReader(tmp_path / f"train-slot00-00000{i}.tar").key(p) for i, p in ((0, 3), (1, 4), (1, 7))]
    assert sorted(records, key=lambda r: keys.index(r.key)) == [
        BadClipRecord(key=keys[0], shard="train-slot00-000000.tar", reason="decode-error"),
        BadClipRecord(key=keys[1], shard="train-slot00-000001.tar", reason="frame-count"),
        BadClipRecord(key=keys[2], shard="train-slot00-000001.tar", reason="checksum"),
    ]
    assert loader.bad_clips == Counter({"decode-error": 1, "frame-count": 1, "checksum": 1})
    assert len({key for batch in batches for key in batch.keys}) == 20
    for batch in batches:
        bad = [key in keys for key in batch.keys]
        assert batch.valid.tolist() == [not b for b in bad]
        assert [clip is None for clip in batch.clips] == [a is None for a in batch.augmentations] == bad
        assert (batch.frames[~batch.valid] == 115).all() and (batch.log_mel[~batch.valid] == 0).all()


def flip_a_bit_of_the_sound(tar: Path, position: int) -> None:
    data = bytearray(tar.read_bytes())
    raw = ShardReader(tar).read(position)
    data[data.find(raw.audio) + 1000] ^= 1
    tar.write_bytes(data)


def test_a_bad_second_clip_leaves_the_first_valid(tmp_path):
    write_shards(tmp_path, [4], num_slots=2, broken={(1, 2): "video"})
    loader = build_loader(config(tmp_path, global_batch_size=4, clips_per_video=2))
    batch = next(iter(loader))
    assert batch.valid.all() and batch.bad == () and batch.second.valid.sum() == 3
    assert [record.reason for record in batch.second.bad] == ["decode-error"]
    assert loader.bad_clips == {"decode-error": 1}


def test_too_many_bad_clips_stop_the_loader_by_name(tmp_path):
    broken = {(0, video): "video" for video in range(0, 60, 10)}
    write_shards(tmp_path, [60, 60], num_slots=1, broken=broken)
    loader = build_loader(config(tmp_path, global_batch_size=10, max_bad_fraction=0.04))
    with pytest.raises(TooManyBadClips) as caught:
        for _ in loader:
            pass
    message = str(caught.value)
    assert "clips are bad (decode-error " in message
    assert "expected at most 4.00% (loader.max_bad_fraction)" in message
    assert "most are in train-slot00-000000.tar" in message
    assert loader.next_batch >= 10  # not judged on fewer than 100 clips
    tolerant = build_loader(config(tmp_path, global_batch_size=10, max_bad_fraction=0.06))
    assert len(list(tolerant)) == 12 and tolerant.bad_clips == {"decode-error": 6}


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


def test_error_of_a_worker_reaches_the_consumer(tmp_path):
    write_shards(tmp_path, [8], num_slots=1)
    loader = build_loader(config(tmp_path, num_workers=1))
    (tmp_path / "train-slot00-000000.idx").unlink()  # after the check at the start
    with pytest.raises(ValueError, match="train-slot00-000000.idx does not exist"):
        next(iter(loader))


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
def test_no_process_outlives_a_killed_parent(shards):
    # The script has no `if __name__ == "__main__":` guard: workers must not import it either.
    script = f"""
        import os, sys, threading, time
        from loaders import build_loader
        from loaders.config import LoaderConfig, VideoConfig
        print("imported", flush=True)
        loader = build_loader(LoaderConfig(shards={str(shards)!r}, global_batch_size=6, num_workers=2,
                                           backend="portable", video=VideoConfig(num_frames=4, short_side=36, crop_size=32)))
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
