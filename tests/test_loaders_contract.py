"""What every backend must do: the same clips in the same order, cut and mirrored alike, exactly resumed."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from loaders_media import assert_equal, take, write_shards

from loaders import Loader, build_loader
from loaders.audio_ops import augment_log_mel, log_mel_spectrogram
from loaders.augment import draw_augmentation
from loaders.base import TooManyBadClips
from loaders.batch import BadClipRecord
from loaders.config import AudioConfig, LoaderConfig, VideoConfig
from loaders.decode import decode_frames, decode_waveform, uniform_frame_indices
from loaders.video_ops import color_jitter, crop_frames, flip_frames
from shards.reader import ShardReader

SMALL = VideoConfig(num_frames=4, short_side=36, crop_size=32)
MIN_PSNR = 40.0  # dB, of frames that were converted or decoded by something other than the reference
MAX_LOG_MEL_ERROR = 1e-3  # in standard deviations


@pytest.fixture(
    params=[
        pytest.param(("portable", "cpu"), id="portable"),
        pytest.param(("dali-cpu-decode", "cpu"), id="dali-cpu-decode", marks=pytest.mark.dali),
        pytest.param(("portable", "cuda"), id="portable-cuda", marks=pytest.mark.gpu),
        pytest.param(
            ("dali-cpu-decode", "cuda"), id="dali-cpu-decode-cuda", marks=[pytest.mark.gpu, pytest.mark.dali]
        ),
        pytest.param(("dali-gpu", "cuda"), id="dali-gpu", marks=[pytest.mark.gpu, pytest.mark.dali]),
    ]
)
def build(request):
    """build(config, rank=0, world_size=1) -> loader of one backend; closed at the end."""
    backend, device = request.param
    if backend != "portable":
        pytest.importorskip("nvidia.dali")
    loaders: list[Loader] = []

    def build_one(config: LoaderConfig, rank: int = 0, world_size: int = 1) -> Loader:
        loaders.append(build_loader(replace(config, backend=backend), rank, world_size, device=device))
        return loaders[-1]

    build_one.exact_frames = backend == "portable" or device == "cpu"
    build_one.device = device
    yield build_one
    for loader in loaders:
        loader.close()


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
        "dali_threads": 2,
        "video": SMALL,
    }
    return LoaderConfig(**{**fields, **changes})


def test_batch_has_the_promised_shapes_types_and_layout(build, shards):
    batch = next(iter(build(config(shards, video=VideoConfig()))))
    assert batch.num_clips == 6
    assert batch.frames.shape == (6, 3, 32, 128, 128) and batch.frames.dtype == torch.uint8
    assert batch.frames.permute(0, 2, 3, 4, 1).is_contiguous()
    assert batch.log_mel.shape == (6, 1, 257, 101) and batch.log_mel.dtype == torch.float32
    assert batch.video_ids.dtype == torch.int64 and batch.valid.dtype == torch.bool and batch.valid.all()
    assert batch.video_ids.tolist() == [clip.video_number for clip in batch.clips]
    assert batch.keys == tuple(clip.key for clip in batch.clips)
    assert (batch.epoch, batch.step, batch.bad, batch.second) == (0, 0, (), None)
    for tensor in (batch.frames, batch.log_mel, batch.video_ids, batch.valid):
        assert tensor.device.type == ("cpu" if batch.frames.is_pinned() else build.device)
    assert_equal(batch.to("cpu"), batch)


@pytest.mark.parametrize("jitter", [False, True])
def test_row_is_the_reference_transforms_with_the_drawn_parameters(build, shards, jitter):
    video, audio = VideoConfig(num_frames=8, color_jitter=jitter), AudioConfig()
    batch = next(iter(build(config(shards, video=video, seed=3))))
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
        found = batch.frames[row].permute(1, 2, 3, 0).cpu()
        if build.exact_frames:
            assert torch.equal(found, frames)
        else:
            assert psnr(found, frames) >= MIN_PSNR
        log_mel = log_mel_spectrogram(torch.from_numpy(decode_waveform(clip.audio)), audio)
        expected, log_mel = augment_log_mel(log_mel, drawn), batch.log_mel[row, 0].cpu()
        assert (log_mel - expected).abs().max() <= MAX_LOG_MEL_ERROR
        assert torch.equal(log_mel == 0, expected == 0)  # masks


def psnr(a: torch.Tensor, b: torch.Tensor) -> float:
    error = (a.double() - b.double()).square().mean()
    return float(10 * torch.log10(255**2 / error))


def test_log_mel_and_center_crop_without_augmentation_are_the_references(build, shards):
    video, audio = VideoConfig(augment=False), AudioConfig(augment=False)
    batch = next(iter(build(config(shards, video=video, audio=audio))))
    raw = {clip.info.key: clip for clip in every_raw_clip(shards, slot=0)}
    for row, key in enumerate(batch.keys):
        clip, done = raw[key], batch.augmentations[row]
        top, left = (clip.info.frame_height - 128) // 2, (clip.info.frame_width - 128) // 2
        assert (done.crop_top, done.crop_left, done.flip, done.color_order) == (top, left, False, ())
        frames = torch.from_numpy(decode_frames(clip.video, range(32), 144, window=(top, left, 128, 128)))
        assert psnr(batch.frames[row].permute(1, 2, 3, 0).cpu(), frames) >= MIN_PSNR
        log_mel = log_mel_spectrogram(torch.from_numpy(decode_waveform(clip.audio)), audio)
        assert (batch.log_mel[row, 0].cpu() - log_mel).abs().max() <= MAX_LOG_MEL_ERROR


def every_raw_clip(folder: Path, slot: int):
    for path in sorted(folder.glob(f"train-slot{slot:02d}-*.tar")):
        with ShardReader(path) as reader:
            yield from (reader.read(position) for position in range(len(reader)))


def test_without_augmentation_rows_do_not_depend_on_the_epoch(build, shards):
    video, audio = replace(SMALL, augment=False), AudioConfig(augment=False)
    still = config(shards, video=video, audio=audio, shuffle=False)
    loader = build(still)
    first = take(loader, len(loader))
    again = take(loader, 2 * len(loader))[len(loader) :]  # epoch 2 reads slot 0 again
    assert again[0].epoch == 2
    for a, b in zip(first, again):
        assert_equal(replace(a, epoch=2), b)


@pytest.mark.parametrize(("world_size", "drop_last"), [(1, True), (2, False), (3, True), (6, False)])
def test_each_clip_of_the_slot_comes_once_over_ranks(build, shards, world_size, drop_last):
    keys, lengths, padding = [], set(), 0
    for rank in range(world_size):
        loader = build(config(shards, drop_last=drop_last), rank, world_size)
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


def test_padding_rows_hold_the_mean(build, shards):
    loader = build(config(shards, drop_last=False))
    last = list(loader)[-1]
    assert last.valid.tolist() == [True] + [False] * 5
    assert (last.frames[1:] == 115).all() and (last.log_mel[1:] == 0).all()
    assert last.video_ids[1:].tolist() == [-1] * 5 and last.clips[1:] == last.augmentations[1:] == (None,) * 5
    assert last.bad == () and loader.bad_clips.total() == 0


def test_epochs_read_their_slots_with_new_augmentation(build, shards):
    loader = build(config(shards, shuffle=False))
    first, second, third = take(loader, 6), take(loader, 6), take(loader, 6)
    assert [batch.epoch for batch in first + second + third] == [0] * 6 + [1] * 6 + [2] * 6
    assert {clip.slot for batch in first for clip in batch.clips} == {0}
    assert {clip.slot for batch in second for clip in batch.clips} == {1}
    assert [batch.video_ids.tolist() for batch in first] == [batch.video_ids.tolist() for batch in second]
    assert first[0].keys == third[0].keys and first[0].augmentations != third[0].augmentations


def test_second_clips_are_of_the_same_videos_and_another_slot(build, shards):
    for batch in take(build(config(shards, clips_per_video=2)), 8):
        assert batch.video_ids.tolist() == batch.second.video_ids.tolist()
        assert {clip.slot for clip in batch.clips} != {clip.slot for clip in batch.second.clips}
        assert batch.second.second is None and batch.second.valid.all()
        for key, augmentation, other in zip(batch.keys, batch.augmentations, batch.second.augmentations):
            assert augmentation != other, key


def test_batches_are_the_same_for_any_number_of_workers(build, shards):
    batches = {}
    for num_workers in (0, 1, 2):
        loader = build(config(shards, num_workers=num_workers, clips_per_video=2, seed=11))
        batches[num_workers] = take(loader, 9)  # into the second epoch
    for num_workers in (1, 2):
        for a, b in zip(batches[0], batches[num_workers]):
            assert_equal(a, b)


def test_resume_with_other_ranks_and_workers_gives_what_was_left(build, shards):
    whole = take(build(config(shards)), 12)
    first = build(config(shards, num_workers=2, prefetch_batches=8))
    head = take(first, 4)
    state = first.state_dict()
    first.close()
    assert (state["epoch"], state["next_batch"]) == (0, 4)  # not the batches that workers had ready
    for world_size in (2, 3):
        ranks = [build(config(shards), rank, world_size) for rank in range(world_size)]
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


def test_state_counts_batches_when_they_are_handed_out(build, shards):
    loader = build(config(shards))
    for index, batch in enumerate(loader):
        state = loader.state_dict()
        assert (batch.step, state["epoch"], state["next_batch"]) == (index, 0, index + 1)
    assert (loader.state_dict()["epoch"], loader.state_dict()["next_batch"]) == (1, 0)


def test_state_of_an_epochs_last_batch_ends_the_epoch_once(build, shards):
    loader = build(config(shards))
    batches = iter(loader)
    for _ in range(6):
        next(batches)
    resumed = build(config(shards))
    resumed.load_state_dict(loader.state_dict())
    assert list(resumed) == [] and resumed.epoch == 1


def test_going_back_gives_the_same_batches_again(build, shards):
    loader = build(config(shards, num_workers=1))
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
def test_state_of_another_order_is_refused(build, shards, changes, message):
    state = build(config(shards)).state_dict()
    with pytest.raises(ValueError, match=message):
        build(config(shards, **changes)).load_state_dict(state)


def test_state_of_other_shards_is_refused(build, shards, tmp_path):
    write_shards(tmp_path, [8])
    state = build(config(shards)).state_dict()
    with pytest.raises(ValueError, match="loader state was saved with manifest"):
        build(config(tmp_path)).load_state_dict(state)


def test_bad_clips_are_counted_marked_and_never_replaced(build, tmp_path):
    write_shards(tmp_path, [10, 10], num_slots=1, broken={(0, 3): "video", (0, 14): "short"})
    flip_a_bit_of_the_sound(tmp_path / "train-slot00-000001.tar", position=7)
    loader = build(config(tmp_path, global_batch_size=5))
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


def test_a_bad_second_clip_leaves_the_first_valid(build, tmp_path):
    write_shards(tmp_path, [4], num_slots=2, broken={(1, 2): "video"})
    loader = build(config(tmp_path, global_batch_size=4, clips_per_video=2))
    batch = next(iter(loader))
    assert batch.valid.all() and batch.bad == () and batch.second.valid.sum() == 3
    assert [record.reason for record in batch.second.bad] == ["decode-error"]
    assert loader.bad_clips == {"decode-error": 1}


def test_too_many_bad_clips_stop_the_loader_by_name(build, tmp_path):
    broken = {(0, video): "video" for video in range(0, 60, 10)}
    write_shards(tmp_path, [60, 60], num_slots=1, broken=broken)
    loader = build(config(tmp_path, global_batch_size=10, max_bad_fraction=0.04))
    with pytest.raises(TooManyBadClips) as caught:
        for _ in loader:
            pass
    message = str(caught.value)
    assert "clips are bad (decode-error " in message
    assert "expected at most 4.00% (loader.max_bad_fraction)" in message
    assert "most are in train-slot00-000000.tar" in message
    # 4.8 of the epoch's 120 may be bad; the batch that was one too many has two.
    assert message.startswith("6 of 80 ") and loader.next_batch == 8
    tolerant = build(config(tmp_path, global_batch_size=10, max_bad_fraction=0.06))
    assert len(list(tolerant)) == 12 and tolerant.bad_clips == {"decode-error": 6}
