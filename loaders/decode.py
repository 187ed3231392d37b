"""From the bytes of a clip to frames and waveform: PyAV and the standard library, one thread.

A decoder that returns less than it should is worse than one that fails: everything here gives exactly what a
clip holds or raises BadClip.
"""

import io
import threading
import wave
from collections.abc import Sequence

import av
import av.logging
import numpy as np
from av.video.reformatter import ColorRange, Colorspace, Interpolation, VideoReformatter

from loaders.augment import scaled_size
from shards.schema import FRAMES_PER_CLIP, SAMPLE_RATE, SAMPLES_PER_CLIP, BadClip

av.logging.set_level(av.logging.PANIC)  # libav prints what it finds odd; here that raises BadClip or is right

# PyAV 17 and later start a scaling thread per core for each frame unless told not to: 4 to 15 times slower.
_ONE_THREAD = {"threads": 1} if int(av.__version__.partition(".")[0]) >= 17 else {}
_per_thread = threading.local()


def uniform_frame_indices(num_frames: int, total: int = FRAMES_PER_CLIP) -> tuple[int, ...]:
    """num_frames indices, each in the middle of its part of total: 8 of 32 are 2, 6, ..., 30."""
    return tuple((2 * i + 1) * total // (2 * num_frames) for i in range(num_frames))


def decode_frames(
    video: bytes,
    frame_indices: Sequence[int],
    short_side: int,
    *,
    stored_size: tuple[int, int] | None = None,
    window: tuple[int, int, int, int] | None = None,
    out: np.ndarray | None = None,
    key: str = "",
    shard: str = "",
) -> np.ndarray:
    """RGB frames of a clip, scaled and cut.

    All 32 frames are decoded; only those asked for are scaled and converted (swscale, bilinear, BT.601
    limited range, one call for both).

    Args:
        video: contents of key.mp4.
        frame_indices: which of the 32 frames, ascending.
        short_side: scale to this short side, pixels, aspect kept; the stored one means no scaling.
        stored_size: (width, height) that the stored frames must have; None: any.
        window: (top, left, height, width) of the scaled frame to keep; None: all of it.
        out: uint8 (T, height, width, 3), contiguous, to write to and return.
        key: for the error.
        shard: for the error.

    Returns:
        uint8 (T, height, width, 3), RGB.

    Raises:
        BadClip: `decode-error`, `frame-size`, or `frame-count` unless there are exactly 32 frames in order.
    """
    assert list(frame_indices) == sorted(set(frame_indices)), frame_indices
    assert set(frame_indices) <= set(range(FRAMES_PER_CLIP)), frame_indices
    reformatter = getattr(_per_thread, "reformatter", None)
    if reformatter is None:
        reformatter = _per_thread.reformatter = VideoReformatter()
    wanted = dict(zip(frame_indices, range(len(frame_indices))))
    count, size, previous_pts = 0, None, None
    try:
        with av.open(io.BytesIO(video), format="mp4", metadata_errors="replace") as container:
            if not container.streams.video:
                raise BadClip(key, shard, "decode-error")
            stream = container.streams.video[0]
            stream.thread_type = "NONE"
            for frame in container.decode(stream):
                row = wanted.get(count)
                count += 1
                if frame.is_corrupt or frame.pts is None:
                    raise BadClip(key, shard, "decode-error")
                if count > FRAMES_PER_CLIP or (previous_pts is not None and frame.pts <= previous_pts):
                    raise BadClip(key, shard, "frame-count")
                previous_pts = frame.pts
                if size is None:
                    size = (frame.width, frame.height)
                    if stored_size not in (None, size):
                        raise BadClip(key, shard, "frame-size")
                    scaled_width, scaled_height = scaled_size(*size, short_side)
                    top, left, height, width = window or (0, 0, scaled_height, scaled_width)
                    assert 0 <= top <= scaled_height - height and 0 <= left <= scaled_width - width, window
                    if out is None:
                        out = np.empty((len(frame_indices), height, width, 3), dtype=np.uint8)
                    assert out.shape == (len(frame_indices), height, width, 3), out.shape
                    assert out.flags.c_contiguous
                elif (frame.width, frame.height) != size:
                    raise BadClip(key, shard, "frame-size")
                if row is None:
                    continue
                image = reformatter.reformat(
                    frame, scaled_width, scaled_height, "rgb24",
                    src_colorspace=Colorspace.ITU601, dst_colorspace=Colorspace.ITU601,
                    src_color_range=ColorRange.MPEG, dst_color_range=ColorRange.JPEG,
                    interpolation=Interpolation.BILINEAR, **_ONE_THREAD,
                )  # fmt: skip
                plane = image.planes[0]
                rows = np.frombuffer(plane, np.uint8).reshape(scaled_height, plane.line_size)
                cut = rows[top : top + height, 3 * left : 3 * (left + width)]
                out[row].reshape(height, 3 * width)[:] = cut
    except av.error.FFmpegError as error:
        raise BadClip(key, shard, "decode-error") from error
    if count != FRAMES_PER_CLIP:
        raise BadClip(key, shard, "frame-count")
    assert out is not None
    return out


def decode_waveform(audio: bytes, *, key: str = "", shard: str = "") -> np.ndarray:
    """Waveform of a clip: float32 (24000,) in [-1, 1).

    Args:
        audio: contents of key.wav (16-bit, mono, 24 kHz).
        key: for the error.
        shard: for the error.

    Raises:
        BadClip: `decode-error` if it is no such file, `sample-count` unless there are 24,000 samples.
    """
    try:
        with wave.open(io.BytesIO(audio)) as file:
            form = (file.getnchannels(), file.getsampwidth(), file.getframerate())
            samples = np.frombuffer(file.readframes(file.getnframes()), dtype="<i2")
    except (wave.Error, EOFError, ValueError, RuntimeError) as error:
        raise BadClip(key, shard, "decode-error") from error
    if form != (1, 2, SAMPLE_RATE):
        raise BadClip(key, shard, "decode-error")
    if samples.size != SAMPLES_PER_CLIP:
        raise BadClip(key, shard, "sample-count")
    return samples.astype(np.float32) / np.float32(32768)
