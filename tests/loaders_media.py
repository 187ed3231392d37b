"""Small shards for the loader tests, encoded here so that these tests need no ffmpeg binary."""

import io
import tempfile
import wave
import zlib
from fractions import Fraction
from functools import cache
from pathlib import Path

import av
import numpy as np
import torch

from loaders.batch import ClipBatch
from shards.manifest import Manifest, write_manifest
from shards.schema import (
    FRAMES_PER_CLIP,
    SAMPLE_RATE,
    SAMPLES_PER_CLIP,
    WAV_HEADER,
    ClipInfo,
    clip_key,
    video_hash,
    video_number,
)
from shards.writer import ShardWriter

SIZES = ((192, 144), (144, 144), (144, 192))


def picture(width: int, height: int, step: int) -> np.ndarray:
    """uint8 (height, width, 3): red grows to the right, green downwards, blue with the step."""
    y, x = np.mgrid[:height, :width]
    red = 255 * x / (width - 1)
    green = 255 * y / (height - 1)
    blue = np.full_like(red, 8.0 * step)
    return np.stack([red, green, blue], axis=-1).round().clip(0, 255).astype(np.uint8)


@cache
def encode_video(width: int, height: int, num_frames: int = FRAMES_PER_CLIP, crf: int = 12) -> bytes:
    """mp4 of `picture(width, height, t)` for t = 0 .. num_frames-1, coded as shards have it."""
    buffer = io.BytesIO()
    options = {"crf": str(crf), "preset": "veryfast", "tune": "fastdecode", "bf": "0", "refs": "1", "g": "32"}
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=FRAMES_PER_CLIP, options=options)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.codec_context.thread_count = 1
        for step in range(num_frames):
            frame = av.VideoFrame.from_ndarray(picture(width, height, step), format="rgb24")
            frame = frame.reformat(format="yuv420p", dst_colorspace="ITU601", dst_color_range="MPEG")
            frame.pts, frame.time_base = step, Fraction(1, FRAMES_PER_CLIP)
            for packet in stream.encode(frame):
                container.mux(packet)
        for packet in stream.encode(None):
            container.mux(packet)
    return buffer.getvalue()


def remuxed(video: bytes, options: dict[str, str]) -> bytes:
    """The same coded frames in a file muxed with other options."""
    with (
        av.open(io.BytesIO(video), format="mp4") as source,
        tempfile.NamedTemporaryFile(suffix=".mp4") as file,
    ):
        with av.open(file.name, "w", format="mp4", options=options) as target:
            stream = target.add_stream_from_template(source.streams.video[0])
            for packet in source.demux(video=0):
                if packet.dts is not None:
                    packet.stream = stream
                    target.mux(packet)
        return Path(file.name).read_bytes()


def tone(hertz: float, num_samples: int = SAMPLE_RATE, amplitude: float = 0.5) -> np.ndarray:
    """float32 (num_samples,): a sine."""
    return (amplitude * np.sin(2 * np.pi * hertz * np.arange(num_samples) / SAMPLE_RATE)).astype(np.float32)


def noise(seed: int, num_samples: int = SAMPLE_RATE, amplitude: float = 0.003) -> np.ndarray:
    """float32 (num_samples,): white noise. Between the harmonics of a pure tone there is nothing but the rounding
    errors of an FFT."""
    return (amplitude * np.random.default_rng(seed).standard_normal(num_samples)).astype(np.float32)


def encode_audio(waveform: np.ndarray) -> bytes:
    """wav: 16-bit, mono, 24 kHz."""
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(SAMPLE_RATE)
        file.writeframes((waveform * 32767).astype("<i2").tobytes())
    return buffer.getvalue()


def write_shards(
    folder: Path,
    clips_per_shard: list[int],
    num_slots: int = 2,
    broken: dict[tuple[int, int], str] | None = None,
    sizes: tuple[tuple[int, int], ...] = SIZES,
) -> Manifest:
    """Shards of sum(clips_per_shard) videos of these sizes, in turn. broken: (slot, video) -> "video"
    (undecodable), "short" (31 frames)."""
    broken = broken or {}
    folder.mkdir(parents=True, exist_ok=True)
    entries = []
    for slot in range(num_slots):
        video = 0
        for index, num_clips in enumerate(clips_per_shard):
            with ShardWriter(folder, "train", slot, index) as writer:
                for _ in range(num_clips):
                    width, height = sizes[video % len(sizes)]
                    kind = broken.get((slot, video))
                    frames = encode_video(width, height, 31 if kind == "short" else 32)
                    if kind == "video":
                        frames = frames[: len(frames) // 2]
                    sound = encode_audio(tone(200 + 100 * (video % 50) + 50 * slot) + noise(video))
                    info = clip_info(f"{video:05d}.mp4", slot, width, height, frames, sound)
                    writer.write(info, frames, sound)
                    video += 1
            entries.append(writer.entry)
    manifest = Manifest(
        split="train",
        seed=0,
        num_slots=num_slots,
        num_videos=sum(clips_per_shard),
        num_clips=num_slots * sum(clips_per_shard),
        num_distinct_clips=num_slots * sum(clips_per_shard),
        num_bytes=sum(entry.bytes for entry in entries),
        video_list_sha256="",
        shards=tuple(entries),
    )
    write_manifest(folder, manifest)
    return manifest


def write_noise_shards(
    folder: Path,
    clips_per_shard: list[int],
    num_slots: int,
    indices: tuple[int, ...] | None = None,
    video_bytes: int | None = None,
) -> Manifest:
    """Shards whose clips are no videos but noise, of video_bytes or of 5 to 50 kB, for tests of how bytes get from here
    to there."""
    folder.mkdir(parents=True, exist_ok=True)
    rng, entries = np.random.default_rng(0), []
    for slot in range(num_slots):
        for index, num_clips in zip(indices or range(len(clips_per_shard)), clips_per_shard):
            with ShardWriter(folder, "train", slot, index) as writer:
                for number in range(num_clips):
                    video = rng.bytes(video_bytes or int(rng.integers(5_000, 50_000)))
                    audio = WAV_HEADER + bytes(2 * SAMPLES_PER_CLIP)
                    info = clip_info(f"{index}/{number}.mp4", slot, 192, 144, video, audio)
                    writer.write(info, video, audio)
            entries.append(writer.entry)
    num_videos = sum(clips_per_shard)
    manifest = Manifest(
        split="train",
        seed=0,
        num_slots=num_slots,
        num_videos=num_videos,
        num_clips=num_videos * num_slots,
        num_distinct_clips=num_videos * num_slots,
        num_bytes=sum(entry.bytes for entry in entries),
        video_list_sha256="",
        shards=tuple(entries),
    )
    write_manifest(folder, manifest)
    return manifest


def clip_info(video_id: str, slot: int, width: int, height: int, video: bytes, audio: bytes) -> ClipInfo:
    return ClipInfo(
        key=clip_key(video_hash(video_id), slot),
        video_id=video_id,
        video_number=video_number(video_id),
        label=None,
        slot=slot,
        start_seconds=float(slot),
        end_seconds=slot + 1.0,
        source_fps=32.0,
        source_width=2 * width,
        source_height=2 * height,
        source_crop=(0.0, 0.0, 2.0 * width, 2.0 * height),
        frame_width=width,
        frame_height=height,
        loudness_dbfs=-9.0,
        video_crc32=zlib.crc32(video),
        audio_crc32=zlib.crc32(audio),
    )


def assert_equal(a: ClipBatch, b: ClipBatch) -> None:
    a, b = a.to("cpu", non_blocking=False), b.to("cpu", non_blocking=False)
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
