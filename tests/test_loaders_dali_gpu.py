"""The DALI video loader: its graph and its recovery on the CPU (with VP9, which DALI decodes there), the same with
H.264 on a GPU."""

import io
import itertools
import math
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from fractions import Fraction
from functools import cache
from pathlib import Path
from unittest import mock

import av
import loaders_media
import numpy as np
import pytest
import torch
from loaders_media import SIZES, clip_info, encode_audio, encode_video, picture, tone, write_shards

from loaders.augment import draw_augmentation
from loaders.base import BatchRequest
from loaders.batch import ClipBatch
from loaders.config import AudioConfig, LoaderConfig, VideoConfig, gdt_audio_config
from loaders.decode import uniform_frame_indices
from loaders.portable import PortableLoader
from loaders.video_ops import color_jitter, mean_grey, normalize_frames
from shards.mp4 import VideoTrack, read_video_track
from shards.reader import RawClip
from shards.schema import FRAMES_PER_CLIP, BadClip

pytest.importorskip("nvidia.dali", reason="NVIDIA DALI is not installed")

from nvidia.dali import fn, types  # noqa: E402
from nvidia.dali.pipeline import Pipeline  # noqa: E402

from loaders import dali_gpu, dali_video  # noqa: E402
from loaders.dali_gpu import DaliGpuLoader, check_coded_frames  # noqa: E402
from loaders.dali_video import DaliDecoder, EncodedClips  # noqa: E402

pytestmark = pytest.mark.dali

CPU = torch.device("cpu")
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
NO_AUGMENTATION = {"video": VideoConfig(augment=False), "audio": AudioConfig(augment=False)}


@cache
def encode_vp9(width: int, height: int, num_frames: int = FRAMES_PER_CLIP) -> bytes:
    """As loaders_media.encode_video, but VP9: DALI decodes no H.264 on the CPU."""
    buffer = io.BytesIO()
    options = {"crf": "10", "b:v": "0", "deadline": "realtime", "cpu-used": "8"}
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("libvpx-vp9", rate=FRAMES_PER_CLIP, options=options)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.codec_context.thread_count = 1
        for step in range(num_frames):
            frame = av.VideoFrame.from_ndarray(picture(width, height, step), format="rgb24")
            frame = frame.reformat(format="yuv420p", dst_colorspace="ITU601", dst_color_range="MPEG")
            frame.pts, frame.time_base = step, Fraction(1, FRAMES_PER_CLIP)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return buffer.getvalue()


@cache
def decode_whole(video: bytes) -> np.ndarray:
    """uint8 (frames, height, width, 3): what DALI makes of a VP9 file, nothing cut."""
    pipeline = Pipeline(batch_size=1, num_threads=1, device_id=None, prefetch_queue_depth=1)
    with pipeline:
        encoded = fn.external_source(name="video", dtype=types.UINT8, ndim=1)
        pipeline.set_outputs(fn.decoders.video(encoded, device="cpu"))
    (frames,) = pipeline.run(video=[np.frombuffer(video, np.uint8)])
    return np.array(frames[0])


def psnr(one: torch.Tensor, other: torch.Tensor) -> float:
    return 10 * math.log10(255**2 / (one.double() - other.double()).square().mean().clamp(min=1e-9).item())


def config_of(folder: Path, **changes: object) -> LoaderConfig:
    fields = {"shards": str(folder), "global_batch_size": 4, "num_workers": 2, "prefetch_batches": 2}
    return LoaderConfig(**{**fields, "dali_threads": 2, "max_bad_fraction": 1.0, **changes})


def take(loader: DaliGpuLoader | PortableLoader, num_batches: int) -> list[ClipBatch]:
    """The next batches, over the ends of epochs, on the CPU; closes the loader."""
    batches = list(itertools.islice(itertools.chain.from_iterable(itertools.repeat(loader)), num_batches))
    loader.close()
    return [batch.to("cpu") for batch in batches]


def portable(config: LoaderConfig, num_batches: int) -> list[ClipBatch]:
    """Batches of the portable loader, which here decodes whatever libav does."""
    with mock.patch("loaders.decode.read_video_track", track_of_any_codec):
        with mock.patch("loaders.decode._decode_track", decode_any_codec):
            return take(PortableLoader(replace(config, num_workers=0)), num_batches)


def track_of_any_codec(video: bytes) -> VideoTrack:
    try:
        with av.open(io.BytesIO(video)) as container:
            num_frames = sum(packet.size > 0 for packet in container.demux(video=0))
    except av.error.FFmpegError as error:
        raise ValueError(str(error)) from error
    return VideoTrack(b"", ((0, len(video)),) * num_frames)


def decode_any_codec(video: bytes, track: VideoTrack) -> Iterator[av.VideoFrame]:
    with av.open(io.BytesIO(video)) as container:
        yield from container.decode(video=0)


def assert_alike(batch: ClipBatch, expected: ClipBatch, decibels: float = 40.0) -> None:
    """Everything the same, but frames and log-mel only nearly so."""
    for name in ("keys", "clips", "augmentations", "bad", "epoch", "step"):
        assert getattr(batch, name) == getattr(expected, name), name
    assert torch.equal(batch.valid, expected.valid) and torch.equal(batch.video_ids, expected.video_ids)
    assert batch.frames.shape == expected.frames.shape and batch.frames.dtype == torch.uint8
    assert batch.frames.stride() == expected.frames.stride()
    assert batch.log_mel.shape == expected.log_mel.shape and batch.log_mel.dtype == torch.float32
    # The sounds are pure tones, for which float32 rounding shows most (see test_loaders_dali_audio.py).
    assert (batch.log_mel - expected.log_mel).abs().max() < 3e-3
    for row, valid in enumerate(expected.valid.tolist()):
        if valid:
            assert psnr(batch.frames[row], expected.frames[row]) > decibels
        else:
            assert torch.equal(batch.frames[row], expected.frames[row])
    assert (batch.second is None) == (expected.second is None)
    if batch.second is not None:
        assert_alike(batch.second, expected.second, decibels)


@pytest.fixture(scope="module")
def media(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, dict[str, Path]]]:
    """Device -> name -> folder of shards: VP9 for the CPU, H.264 for the GPU."""
    folder = tmp_path_factory.mktemp("shards")
    broken = {(0, 2): "video", (0, 5): "short", (1, 0): "video"}
    folders: dict[str, dict[str, Path]] = {}
    with pytest.MonkeyPatch.context() as patch:
        for device in ("cuda", "cpu"):
            names = {"good": folder / device / "good", "bad": folder / device / "bad"}
            write_shards(names["good"], [5, 7])
            write_shards(names["bad"], [5, 7], broken=broken)
            folders[device] = names
            patch.setattr(loaders_media, "encode_video", encode_vp9)  # for what comes next: the CPU
    yield folders


def clips_of(
    videos: list[bytes], sizes: list[tuple[int, int]], config: LoaderConfig, epoch: int = 0
) -> EncodedClips:
    augmentations = [
        draw_augmentation(config.video, config.audio, 0, epoch, f"clip{row}", height, width, 101)
        for row, (width, height) in enumerate(sizes)
    ]
    waveforms = [(tone(300 + 100 * row) * 32767).astype(np.int16) for row in range(len(videos))]
    return EncodedClips(videos=videos, sizes=sizes, waveforms=waveforms, augmentations=augmentations)


def good_clips(num_clips: int, config: LoaderConfig, epoch: int = 0) -> EncodedClips:
    sizes = [SIZES[row % len(SIZES)] for row in range(num_clips)]
    return clips_of([encode_vp9(*size) for size in sizes], sizes, config, epoch)


# The graph, on the CPU.


@pytest.mark.parametrize("num_frames", [32, 8, 1])
def test_crops_flips_and_frames_are_exactly_those_asked_for(num_frames):
    config = config_of(Path("unused"), video=VideoConfig(num_frames=num_frames))
    decoder = DaliDecoder(config, 6, CPU)
    corners = set()
    for epoch in range(4):
        clips = good_clips(6, config, epoch)
        decoder.submit(clips)
        decoded = decoder.take()
        assert decoded.faults == {} and decoded.frames.shape == (6, num_frames, 128, 128, 3)
        for frames, video, done in zip(decoded.frames, clips.videos, clips.augmentations):
            whole = decode_whole(video)[list(uniform_frame_indices(num_frames))]
            top, left = done.crop_top, done.crop_left
            expected = whole[:, top : top + 128, left : left + 128]
            expected = expected[:, :, ::-1] if done.flip else expected
            assert np.array_equal(frames.numpy(), expected)
            corners.add((top, left, done.flip))
    assert len(corners) > 20


def test_frames_are_scaled_before_the_crop():
    config = config_of(Path("unused"), video=VideoConfig(short_side=112, crop_size=96, num_frames=4))
    sizes = list(SIZES)
    augmentations = [
        draw_augmentation(
            config.video, config.audio, 0, 0, "clip", height * 112 // 144, round(width * 112 / 144), 101
        )
        for width, height in sizes
        if width >= height
    ]
    sizes = [size for size in sizes if size[0] >= size[1]]
    clips = replace(
        clips_of([encode_vp9(*size) for size in sizes], sizes, config), augmentations=augmentations
    )
    decoder = DaliDecoder(config, 2, CPU)
    decoder.submit(clips)
    decoded = decoder.take()
    assert decoded.frames.shape == (2, 4, 96, 96, 3) and decoded.faults == {}
    for frames, size, done in zip(decoded.frames, sizes, augmentations):
        whole = np.stack([picture(*size, step) for step in uniform_frame_indices(4)])
        scaled = torch.nn.functional.interpolate(
            torch.from_numpy(whole).permute(0, 3, 1, 2).float(),
            size=(done.scaled_height, done.scaled_width),
            mode="bilinear",
            antialias=True,
        ).permute(0, 2, 3, 1)
        expected = scaled[:, done.crop_top : done.crop_top + 96, done.crop_left : done.crop_left + 96]
        assert psnr(frames, expected.flip(2) if done.flip else expected) > 38


def test_clip_does_not_depend_on_its_neighbors_or_on_the_number_of_threads():
    config = config_of(Path("unused"), dali_threads=1)
    decoder = DaliDecoder(config, 6, CPU)
    clips = good_clips(6, config)
    decoder.submit(clips)
    together = decoder.take()
    threads = DaliDecoder(replace(config, dali_threads=5), 1, CPU)
    for row in (0, 4, 5):
        threads.submit(clips.select([row]))
        alone = threads.take()
        assert torch.equal(alone.frames[0], together.frames[row])
        assert torch.equal(alone.log_mel[0], together.log_mel[row])


def test_batches_come_in_order_and_are_not_overwritten():
    config = config_of(Path("unused"))
    decoder, single = DaliDecoder(config, 3, CPU), DaliDecoder(config, 3, CPU)
    batches = [good_clips(3, config, epoch) for epoch in range(5)]
    batches.insert(2, good_clips(0, config))
    results, waiting = [], iter(batches)
    for _ in batches:
        while decoder.has_room and (clips := next(waiting, None)) is not None:
            decoder.submit(clips)
        results.append(decoder.take())
    for clips, result in zip(batches, results):
        single.submit(clips)
        expected = single.take()
        assert torch.equal(result.frames, expected.frames) and torch.equal(result.log_mel, expected.log_mel)


# Recovery, on the CPU.


def refused_clips(num_clips: int, bad: dict[int, bytes], config: LoaderConfig) -> EncodedClips:
    clips = good_clips(num_clips, config)
    videos = [bad.get(row, video) for row, video in enumerate(clips.videos)]
    return replace(clips, videos=videos)


def damaged(kind: str) -> bytes:
    video = encode_vp9(*SIZES[0])
    return {
        "empty": b"",
        "cut": video[: len(video) // 2],
        "noise": bytes(np.random.default_rng(0).integers(0, 256, 4000, dtype=np.uint8)),
        "hole": video[:3000] + bytes(6000) + video[9000:],
        "h264": encode_video(*SIZES[0]),
    }[kind]


@pytest.mark.parametrize("kind", ["empty", "cut", "noise", "hole", "h264"])
def test_clips_that_dali_cannot_decode_are_found_and_no_others(kind, caplog):
    config = config_of(Path("unused"))
    decoder = DaliDecoder(config, 7, CPU)
    bad = {0: damaged(kind), 5: damaged(kind)}
    first, second, third = (
        good_clips(7, config),
        refused_clips(7, bad, config),
        good_clips(7, config, epoch=1),
    )
    results = []
    for clips in (first, second, third):
        decoder.submit(clips)
        if not decoder.has_room:
            results.append(decoder.take())
    results.append(decoder.take())
    assert [result.faults for result in results] == [{}, {0: "decode-error", 5: "decode-error"}, {}]
    assert "decoding it in parts" in caplog.text or "DALI" in caplog.text
    expected = DaliDecoder(config, 7, CPU)
    for clips, result in zip((first, good_clips(7, config), third), results):
        expected.submit(clips)
        undamaged = expected.take()
        for row in set(range(7)) - set(result.faults):
            assert torch.equal(result.frames[row], undamaged.frames[row])
            assert torch.equal(result.log_mel[row], undamaged.log_mel[row])


def test_short_and_misnamed_clips_do_not_stop_their_batch(monkeypatch):
    config = config_of(Path("unused"))
    decoder = DaliDecoder(config, 4, CPU)
    clips = good_clips(4, config)
    sizes = [*clips.sizes[:3], (256, 144)]
    clips = replace(
        clips, videos=[clips.videos[0], encode_vp9(*SIZES[1], 31), *clips.videos[2:]], sizes=sizes
    )
    monkeypatch.setattr(decoder, "_decode_in_parts", None)
    decoder.submit(good_clips(4, config))
    decoder.submit(clips)
    assert decoder.take().faults == {}
    decoder.submit(good_clips(4, config))
    assert decoder.take().faults == {1: "frame-count", 3: "frame-size"}


@pytest.mark.parametrize("num_clips", [1, 8])
def test_number_of_runs_is_bounded_when_all_clips_are_bad(num_clips, monkeypatch):
    config = config_of(Path("unused"))
    decoder = DaliDecoder(config, num_clips, CPU)
    decoder.submit(good_clips(num_clips, config))
    decoder.take()
    runs = []
    decode_once = decoder._decode_once
    monkeypatch.setattr(
        decoder, "_decode_once", lambda clips: (runs.append(len(clips)), decode_once(clips))[1]
    )
    bad = dict.fromkeys(range(num_clips), damaged("noise"))
    decoder.submit(refused_clips(num_clips, bad, config))
    assert decoder.take().faults == dict.fromkeys(range(num_clips), "decode-error")
    assert len(runs) == 2 * num_clips  # 2 n - 1, and one to see that DALI still decodes


def test_first_batch_of_which_nothing_decodes_is_an_error_and_not_bad_clips():
    config = config_of(Path("unused"))
    decoder = DaliDecoder(config, 3, CPU)
    decoder.submit(refused_clips(3, dict.fromkeys(range(3), damaged("h264")), config))
    with pytest.raises(
        RuntimeError, match="DALI decodes none of 3 clips .*use loader.backend dali-cpu-decode"
    ):
        decoder.take()


def test_broken_dali_is_an_error_and_not_bad_clips(monkeypatch):
    config = config_of(Path("unused"))
    decoder = DaliDecoder(config, 3, CPU)
    decoder.submit(good_clips(3, config))
    decoder.take()

    def raises(self: object, *unused: object) -> None:
        raise RuntimeError("Error in something.\n\nencountered:\n\nCUDA error 999\n")

    monkeypatch.setattr(dali_video.Pipeline, "run", raises)
    decoder.submit(good_clips(3, config))
    with pytest.raises(RuntimeError, match=r"decodes none of 3 clips \(CUDA error 999\)"):
        decoder.take()


# The loader, on both.


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "changes",
    [
        {},
        NO_AUGMENTATION,
        {"video": VideoConfig(num_frames=8, color_jitter=True)},
        {
            "clips_per_video": 2,
            "drop_last": False,
            "global_batch_size": 5,
            "prefetch_batches": 1,
            "video": VideoConfig(num_frames=4),
        },
        {"video": VideoConfig(num_frames=2, short_side=112, crop_size=96)},
    ],
    ids=["default", "no-augmentation", "jitter", "two-clips-padding", "scaled"],
)
def test_batches_are_those_of_the_portable_loader(media, device, changes):
    config = config_of(media[device]["good"], **changes)
    expected = portable(config, 7)
    # Scaling: swscale and DALI have filters of their own.
    decibels = 35.0 if config.video.short_side != 144 else 40.0
    for batch, other in zip(take(DaliGpuLoader(config, device=device), 7), expected, strict=True):
        assert_alike(batch, other, decibels)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("global_batch_size", [1, 4, 12])
def test_bad_clips_are_those_of_the_portable_loader(media, device, global_batch_size):
    video = VideoConfig(num_frames=16)
    config = config_of(media[device]["bad"], global_batch_size=global_batch_size, shuffle=False, video=video)
    num_batches = 24 // global_batch_size
    loader = DaliGpuLoader(config, device=device)
    batches = take(loader, num_batches)
    assert loader.bad_clips == {"decode-error": 2, "frame-count": 1}
    for batch, other in zip(batches, portable(config, num_batches), strict=True):
        assert_alike(batch, other)
    for batch in batches:
        for row in (~batch.valid).nonzero().flatten().tolist():
            assert (batch.frames[row] == mean_grey(0.45)[0]).all() and not batch.log_mel[row].any()


@pytest.mark.parametrize("device", DEVICES)
def test_normalized_frames_are_those_of_the_uint8_frames(media, device):
    config = config_of(
        media[device]["bad"], shuffle=False, video=VideoConfig(num_frames=4, color_jitter=True)
    )
    plain = take(DaliGpuLoader(config, device=device), 3)
    for dtype in (torch.float32, torch.bfloat16):
        for batch, other in zip(take(DaliGpuLoader(config, device=device, frames_dtype=dtype), 3), plain):
            expected = normalize_frames(other.frames, 0.45, 0.225, dtype)
            assert batch.frames.dtype == dtype and batch.frames.stride() == expected.stride()
            assert torch.allclose(batch.frames, expected, atol=1e-6 if dtype == torch.float32 else 0.02)
            assert torch.equal(batch.valid, other.valid) and torch.equal(batch.log_mel, other.log_mel)


def test_jitter_comes_after_crop_and_flip(media):
    config = config_of(media["cpu"]["good"], video=VideoConfig(num_frames=4, color_jitter=True))
    plain = replace(config, video=replace(config.video, color_jitter=False))
    for batch, other in zip(
        take(DaliGpuLoader(config, device="cpu"), 3), take(DaliGpuLoader(plain, device="cpu"), 3)
    ):
        for frames, before, done in zip(batch.frames, other.frames, batch.augmentations):
            factors = {name: getattr(done, name) for name in done.color_order}
            expected = color_jitter(before.permute(1, 2, 3, 0), done.color_order, **factors)
            difference = (frames.permute(1, 2, 3, 0).int() - expected.int()).abs()
            # Factors travel as float32: a value near a half may be rounded the other way.
            assert len(factors) == 3 and difference.max() <= 1 and difference.float().mean() < 1e-3


@pytest.mark.parametrize("device", DEVICES)
def test_resuming_equals_never_stopping(media, device):
    config = config_of(media[device]["good"], **NO_AUGMENTATION)
    whole = take(DaliGpuLoader(config, device=device), 8)
    first = DaliGpuLoader(config, device=device)
    begun = list(itertools.islice(first, 2))
    state = first.state_dict()
    first.close()
    assert state == {**PortableLoader(config).state_dict(), "epoch": 0, "next_batch": 2}
    resumed = DaliGpuLoader(config, device=device)
    resumed.load_state_dict(state)
    for batch, other in zip([batch.to("cpu") for batch in begun] + take(resumed, 6), whole, strict=True):
        assert batch.keys == other.keys and (batch.epoch, batch.step) == (other.epoch, other.step)
        assert torch.equal(batch.frames, other.frames) and torch.equal(batch.log_mel, other.log_mel)


@pytest.mark.parametrize("device", DEVICES)
def test_ranks_together_see_each_clip_once(media, device):
    config = config_of(media[device]["good"], video=VideoConfig(num_frames=1))
    keys = [
        key
        for rank in range(2)
        for batch in DaliGpuLoader(config, rank, 2, device=device)
        for key in batch.keys
    ]
    assert len(keys) == len(set(keys)) == 12


def test_closed_loader_goes_on_where_it_was(media):
    config = config_of(media["cpu"]["good"], video=VideoConfig(num_frames=1))
    expected = [batch.keys for batch in take(DaliGpuLoader(config, device="cpu"), 5)]
    loader = DaliGpuLoader(config, device="cpu")
    loader.close()
    keys = []
    while len(keys) < 5:
        for batch in loader:
            keys.append(batch.keys)
            loader.close()
    assert keys[:5] == expected


@pytest.mark.parametrize("place", ["read", "decode"])
def test_closing_does_not_wait_for_what_hangs_and_is_not_disturbed_by_it_later(media, monkeypatch, place):
    """Neither for a read of a file system that is gone nor for DALI."""
    monkeypatch.setattr(dali_gpu, "CLOSE_SECONDS", 0.5)
    config = config_of(media["cpu"]["good"], video=VideoConfig(num_frames=1))
    expected = [batch.keys for batch in take(DaliGpuLoader(config, device="cpu"), 6)]
    loader = DaliGpuLoader(config, device="cpu")
    release, hanging = threading.Event(), threading.Event()

    def hang() -> None:
        hanging.set()
        release.wait()

    def read(request: BatchRequest) -> object:
        if (request.epoch, request.step) >= (0, 2):
            hang()
        return DaliGpuLoader._read(loader, request)

    class Decoder(DaliDecoder):
        num_taken = 0

        def take(self) -> object:
            if self.num_taken == 2:
                hang()
            self.num_taken += 1
            return super().take()

    owner, name, patched = {
        "read": (loader, "_read", read),
        "decode": (dali_gpu, "DaliDecoder", Decoder),
    }[place]
    unpatched = getattr(owner, name)
    monkeypatch.setattr(owner, name, patched)
    others = set(threading.enumerate())
    batches = iter(loader)
    keys = [next(batches).keys]
    assert hanging.wait(60)
    threads = [thread for thread in set(threading.enumerate()) - others if thread.name.startswith("loader-")]
    begin = time.monotonic()
    loader.close()
    assert time.monotonic() - begin < 5
    assert any(thread.is_alive() for thread in threads) and all(thread.daemon for thread in threads)
    monkeypatch.setattr(owner, name, unpatched)
    batches = iter(loader)
    keys.append(next(batches).keys)
    release.set()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    keys.append(next(batches).keys)
    assert keys + [batch.keys for batch in take(loader, 3)] == expected


def test_clips_of_a_shard_that_vanishes_are_bad(media, tmp_path):
    folder = tmp_path / "shards"
    folder.mkdir()
    for path in media["cpu"]["good"].iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    loader = DaliGpuLoader(config_of(folder, prefetch_batches=1, num_workers=1), device="cpu")
    for path in folder.glob("*.idx"):
        path.unlink()
    (batch,) = take(loader, 1)
    assert [record.reason for record in batch.bad] == ["bad-shard"] * 4 and not batch.valid.any()


# What is refused.


def blank_frame(video: bytes, number: int) -> bytes:
    """video with zeros for one of its coded frames."""
    start, end = read_video_track(video).samples[number]
    return video[:start] + bytes(end - start) + video[end:]


def without_first_picture(video: bytes) -> bytes:
    """video whose first picture builds on one that is not there."""
    start, end = read_video_track(video).samples[0]
    while video[start + 4] & 31 != 5:
        start += 4 + int.from_bytes(video[start : start + 4], "big")
    return video[: start + 4] + bytes([video[start + 4] & ~31 | 1]) + video[start + 5 :]


@pytest.mark.parametrize(
    "video, reason",
    [
        (encode_video(192, 144), None),
        (encode_video(192, 144, 31), "frame-count"),
        (encode_video(192, 144)[:-100], "decode-error"),
        (b"", "decode-error"),
        (encode_vp9(192, 144), "decode-error"),
        (blank_frame(encode_video(192, 144), 7), "decode-error"),
        (blank_frame(encode_video(192, 144), 0), "decode-error"),
        (without_first_picture(encode_video(192, 144)), "decode-error"),
    ],
    ids=["good", "short", "cut", "empty", "vp9", "blank-frame", "blank-first", "no-first"],
)
def test_coded_frames_are_checked_before_a_hardware_decoder_sees_them(video, reason):
    sound = encode_audio(tone(440))
    raw = RawClip(info=clip_info("a.mp4", 0, 192, 144, video, sound), video=video, audio=sound, shard="a.tar")
    if reason is None:
        check_coded_frames(raw)
    else:
        with pytest.raises(BadClip) as error:
            check_coded_frames(raw)
        assert error.value.reason == reason and error.value.key == raw.info.key


@pytest.mark.parametrize("size", [(0, 144), (-192, 144), (192, 143), (144, 100_000), (10**9, 144)])
@pytest.mark.parametrize("short_side", [144, 112])
def test_sizes_that_cannot_be_are_bad_clips_and_are_not_allocated(media, size, short_side):
    video = VideoConfig(short_side=short_side, crop_size=96)
    loader = DaliGpuLoader(config_of(media["cpu"]["good"], video=video), device="cpu")
    mp4, sound = encode_vp9(192, 144), encode_audio(tone(440))
    raw = RawClip(info=clip_info("a.mp4", 0, *size, mp4, sound), video=mp4, audio=sound, shard="a.tar")
    if (size, short_side) == ((192, 143), 112):
        loader._check(raw)  # scaled: judged by what is decoded
    else:
        with pytest.raises(BadClip, match="frame-size"):
            loader._check(raw)


def test_what_it_cannot_do_is_refused_with_the_way_out(media):
    folder = media["cpu"]["good"]
    with pytest.raises(ValueError, match="front_end is 'gdt', .*portable"):
        DaliGpuLoader(config_of(folder, audio=gdt_audio_config()), device="cpu")
    with pytest.raises(ValueError, match="frames_dtype is torch.float64, expected one of torch.uint8"):
        DaliGpuLoader(config_of(folder), device="cpu", frames_dtype=torch.float64)
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="needs a CUDA device and torch sees none; use loader.backend"):
            DaliGpuLoader(config_of(folder))


# On a GPU only.


@pytest.mark.gpu
def test_batches_lie_on_the_gpu_and_are_those_of_the_shards(media):
    loader = DaliGpuLoader(config_of(media["cuda"]["good"]), device="cuda")
    batch = next(iter(loader))
    for tensor in (batch.frames, batch.log_mel, batch.video_ids, batch.valid):
        assert tensor.is_cuda
    loader.close()


@pytest.mark.gpu
def test_clip_that_the_hardware_decoder_refuses_is_found():
    config = config_of(Path("unused"))
    clips = [
        clips_of([encode_video(*size) for size in SIZES], list(SIZES), config, epoch) for epoch in range(3)
    ]
    noise = bytes(np.random.default_rng(0).integers(0, 256, 4000, dtype=np.uint8))
    clips[1] = replace(clips[1], videos=[clips[1].videos[0], noise, clips[1].videos[2]])
    decoder = DaliDecoder(config, 3, torch.device("cuda", 0))
    results = []
    for batch in clips:
        decoder.submit(batch)
        if not decoder.has_room:
            results.append(decoder.take())
    results.append(decoder.take())
    assert [result.faults for result in results] == [{}, {1: "decode-error"}, {}]


@pytest.mark.gpu
def test_memory_on_the_gpu_does_not_grow(media):
    loader = DaliGpuLoader(config_of(media["cuda"]["good"]), device="cuda")
    batches = itertools.chain.from_iterable(itertools.repeat(loader))
    used = []
    for _ in range(4):
        for _ in range(30):
            next(batches)
        free, total = torch.cuda.mem_get_info()
        used.append(total - free)
    loader.close()
    assert used[-1] - used[1] < 64 * 2**20
