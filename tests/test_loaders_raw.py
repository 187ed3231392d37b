"""Batches straight from original videos: the same contract, a new second in each epoch."""

import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from loaders_media import assert_equal, take

from loaders import build_loader
from loaders.audio_ops import augment_log_mel, log_mel_spectrogram
from loaders.config import AudioConfig, LoaderConfig, VideoConfig
from loaders.raw_index import index_files, index_videos
from loaders.raw_video import RawVideoReader
from loaders.video_ops import flip_frames
from shards.sources import with_hashes
from tools.make_synthetic_videos import make_flash_beep_video


@pytest.fixture(scope="module")
def videos(tmp_path_factory) -> Path:
    """Seven videos of two and a half to four seconds, and one without sound."""
    folder = tmp_path_factory.mktemp("videos")
    for number, fps in enumerate(("25", "30", "30000/1001", "32", "15", "60", "24")):
        seconds, size = 2.5 + number / 4, [(160, 120), (192, 108), (96, 160)][number % 3]
        make_flash_beep_video(folder / f"{number}.mp4", fps=fps, seconds=seconds, size=size)
    make_flash_beep_video(folder / "mute.mp4", seconds=2, sound="none")
    return folder


@pytest.fixture
def config(videos, tmp_path_factory, monkeypatch) -> LoaderConfig:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))
    return LoaderConfig(
        shards=str(videos),
        backend="raw",
        global_batch_size=3,
        num_workers=0,
        video=VideoConfig(num_frames=4, short_side=36, crop_size=32),
    )


def test_batch_is_the_reference_transforms_of_the_second_that_was_drawn(config):
    config = replace(config, video=VideoConfig(num_frames=8), seed=5)
    reader = RawVideoReader(index_videos(config.shards))
    batch = take(build_loader(config), 3)[2]  # of the second epoch
    assert batch.epoch == 1 and batch.valid.all() and batch.bad == ()
    assert batch.frames.shape == (3, 3, 8, 128, 128) and batch.log_mel.shape == (3, 1, 257, 101)
    positions = {reader.key(position): position for position in range(len(reader))}
    for row, (key, info, done) in enumerate(zip(batch.keys, batch.clips, batch.augmentations)):
        start = reader.start_seconds(positions[key], 5, 1)
        assert (info.key, info.start_seconds, info.end_seconds) == (key, start, pytest.approx(start + 1))
        second = reader.read(
            positions[key], start, short_side=144, frame_indices=[2, 6, 10, 14, 18, 22, 26, 30],
            window=(done.crop_top, done.crop_left, 128, 128),
        )  # fmt: skip
        frames = torch.from_numpy(second.frames)
        frames = flip_frames(frames) if done.flip else frames
        assert torch.equal(batch.frames[row].permute(1, 2, 3, 0), frames)
        log_mel = log_mel_spectrogram(torch.from_numpy(second.waveform), AudioConfig())
        assert torch.equal(batch.log_mel[row, 0], augment_log_mel(log_mel, done))
        assert batch.video_ids[row] == info.video_number


def test_each_video_comes_once_per_epoch_over_ranks_with_another_second_each_time(config):
    starts = []
    for epoch in range(3):
        keys = []
        for rank in range(3):
            loader = build_loader(replace(config, drop_last=False), rank, 3)
            loader.load_state_dict({**loader.state_dict(), "epoch": epoch})
            for batch in loader:
                keys += [key for key in batch.keys if key]
                starts += [(epoch, clip.key, clip.start_seconds) for clip in batch.clips if clip]
        assert len(keys) == len(set(keys)) == 7
    assert len({start for _, _, start in starts}) == 21


def test_workers_resume_and_second_clips_are_as_with_shards(config):
    config = replace(config, clips_per_video=2)
    whole = take(build_loader(config), 5)
    for batch in whole:
        assert batch.video_ids.tolist() == batch.second.video_ids.tolist()
        for clip, other in zip(batch.clips, batch.second.clips):
            assert clip.video_id == other.video_id and clip.start_seconds != other.start_seconds
            assert clip.key != other.key
    loader = build_loader(replace(config, num_workers=1))
    for a, b in zip(whole[:2], take(loader, 2)):
        assert_equal(a, b)
    state = loader.state_dict()
    loader.close()
    resumed = build_loader(config)
    resumed.load_state_dict(state)
    for a, b in zip(whole[2:], take(resumed, 3)):
        assert_equal(a, b)


def test_a_file_that_was_damaged_since_costs_one_clip(videos, config, tmp_path):
    for path in videos.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    loader = build_loader(replace(config, shards=str(tmp_path), global_batch_size=7))
    data = bytearray((tmp_path / "3.mp4").read_bytes())
    start, end = data.index(b"mdat") + 4, data.index(b"moov") - 4
    data[start:end] = random.Random(0).randbytes(end - start)
    (tmp_path / "3.mp4").write_bytes(data)
    batch = take(loader, 1)[0]
    assert [record.shard for record in batch.bad] == ["3.mp4"] and batch.valid.sum() == 6
    assert (batch.frames[~batch.valid] == 115).all() and (batch.log_mel[~batch.valid] == 0).all()
    assert loader.bad_clips.total() == 1


def test_other_videos_and_folders_without_any_are_refused(config, tmp_path):
    state = build_loader(config).state_dict()
    only = tmp_path / "list.txt"
    only.write_text("0.mp4\n1.mp4\n2.mp4\n")
    fewer = build_loader(replace(config, video_list=str(only)))
    assert len(fewer) == 1
    with pytest.raises(ValueError, match="loader state was saved with videos"):
        fewer.load_state_dict(state)
    with pytest.raises(ValueError, match="loader.global_batch_size is 8, expected at most 7"):
        build_loader(replace(config, global_batch_size=8))
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(ValueError):
        build_loader(replace(config, shards=str(empty)))


def test_real_videos_train(config, real_data):
    loader = build_loader(replace(config, shards=str(real_data / "av_videos"), global_batch_size=9))
    batches = list(loader)
    assert len(batches) == 5 and sum(int(batch.valid.sum()) for batch in batches) >= 43
    assert all(torch.isfinite(batch.log_mel).all() for batch in batches)


def test_clips_of_a_window_lie_inside_it(videos, tmp_path):
    """As of an annotated segment of a longer file."""
    path = make_flash_beep_video(tmp_path / "long.mp4", seconds=9, size=(64, 48))
    whole, late = (
        with_hashes([("long.mp4", str(path), None, start, end)])
        for start, end in ((5.25, 7.75), (20.0, 24.0))
    )
    options = {"min_seconds": lambda video: 1.0, "workers": 0, "cache": tmp_path / "index.json"}
    index = index_files(tmp_path, whole, **options)
    reader = RawVideoReader(index)
    starts = [reader.start_seconds(0, 0, epoch) for epoch in range(40)]
    assert 5.25 <= min(starts) < 5.6 and 6.4 < max(starts) <= 6.75
    assert reader.read(0, 6.75, short_side=36).frames.shape[0] == 32
    assert index_files(tmp_path, late, **options, allow_none=True).skipped == (
        ("long.mp4", "outside-window"),
    )
    cut = with_hashes([("long.mp4", str(path), None, 20.0, 28.5)])  # it is that segment already
    assert index_files(tmp_path, cut, **options).videos[0].duration_seconds > 8.9
