"""From the bytes of a clip to frames and waveform: PyAV and the standard library, one thread.

A decoder that returns less than it should is worse than one that fails: everything here gives exactly what a
clip holds or raises BadClip.
"""

import io
import threading
import wave
from collections import OrderedDict
from collections.abc import Iterator, Sequence

import av
import av.logging
import numpy as np
import torch
from av.video.reformatter import ColorRange, Colorspace, Interpolation, VideoReformatter

from loaders.augment import scaled_size, yuv_window_size
from shards.mp4 import VideoTrack, decode, open_decoder, read_video_track
from shards.schema import FRAMES_PER_CLIP, SAMPLE_RATE, SAMPLES_PER_CLIP, WAV_HEADER, BadClip

av.logging.set_level(av.logging.PANIC)  # libav prints what it finds odd; here that raises BadClip or is right

# PyAV 17 and later start a scaling thread per core for each frame unless told not to: 4 to 15 times slower.
_ONE_THREAD = {"threads": 1} if int(av.__version__.partition(".")[0]) >= 17 else {}
_TO_RGB = {
    "src_colorspace": Colorspace.ITU601, "dst_colorspace": Colorspace.ITU601,
    "src_color_range": ColorRange.MPEG, "dst_color_range": ColorRange.JPEG,
    "interpolation": Interpolation.BILINEAR,
}  # fmt: skip
_TO_YUV = {**_TO_RGB, "dst_color_range": ColorRange.MPEG}
KEPT_TARGETS = 8  # per thread; one for each size of crop, even and odd offsets apart
KEPT_DECODERS = 16  # per thread; a data set has one for each frame size and setting of the encoder
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
    flip: bool = False,
    out: np.ndarray | None = None,
    key: str = "",
    shard: str = "",
) -> np.ndarray:
    """RGB frames of a clip, scaled, cut and mirrored.

    All 32 frames are decoded; only those asked for are scaled (swscale, bilinear, as YUV) and only what is
    kept of them is converted (BT.601 limited range, the color of each block of 2x2 pixels).

    Args:
        video: contents of key.mp4.
        frame_indices: which of the 32 frames, ascending.
        short_side: scale to this short side, pixels, aspect kept; the stored one means no scaling.
        stored_size: (width, height) that the stored frames must have; None: any.
        window: (top, left, height, width) of the scaled frame to keep; None: all of it.
        flip: mirror what is kept left to right.
        out: uint8 (T, height, width, 3), contiguous, to write to and return.
        key: for the error.
        shard: for the error.

    Returns:
        uint8 (T, height, width, 3), RGB.

    Raises:
        BadClip: `decode-error`, `frame-size`, or `frame-count` unless there are exactly 32 frames in order.
    """
    target, copier = None, None
    for row, frame in _chosen_frames(video, frame_indices, stored_size, key, shard):
        frame = _scaled_yuv(frame, short_side, key, shard)
        if target is None:
            window = window or (0, 0, frame.height, frame.width)
            top, left, height, width = window
            assert 0 <= top <= frame.height - height and 0 <= left <= frame.width - width, window
            target = _rgb_target(len(frame_indices), top % 2 + height, left % 2 + width)
            copier = _PlaneCopier(frame, top, left, target.planes)
        copier.copy(frame, row)
    assert target is not None
    left %= 2
    if flip:
        target.flip()
        left = target.width - left - width
    return target.convert(top % 2, left, height, width, out)


class _RgbTarget:
    """Where the parts of a clip's frames are put one below the other, to be converted in one call.

    swscale takes the color of a pixel from the U and V of its own block of 2x2 and from nothing else: frames do
    not mix. One call for 32 small images costs a third of 32 calls for whole frames.
    """

    def __init__(self, num_frames: int, height: int, width: int) -> None:
        """height, width: even."""
        self._shape = (num_frames, height, width)
        self.width = width
        pixels = num_frames * height * width
        memory = np.empty((3 * num_frames * height // 2, width), dtype=np.uint8)
        flat = memory.reshape(-1)
        self.planes = (
            flat[:pixels].reshape(self._shape),
            flat[pixels : pixels * 5 // 4].reshape(num_frames, height // 2, width // 2),
            flat[pixels * 5 // 4 :].reshape(num_frames, height // 2, width // 2),
        )
        self._image = av.VideoFrame.from_numpy_buffer(memory, format="yuv420p")
        self._reformatter = VideoReformatter()

    def flip(self) -> None:
        """Mirrors all parts left to right. A third of the bytes that the RGB pixels would be."""
        for plane in map(torch.from_numpy, self.planes):
            plane.copy_(plane.flip(-1))

    def convert(
        self, top: int, left: int, height: int, width: int, out: np.ndarray | None = None
    ) -> np.ndarray:
        """uint8 (T, height, width, 3), RGB: rows from top and columns from left of each part."""
        num_frames, rows, columns = self._shape
        image = self._reformatter.reformat(
            self._image, columns, num_frames * rows, "rgb24", **_TO_RGB, **_ONE_THREAD
        )
        pixels = _plane(image, 0, num_frames * rows)[:, : 3 * columns].reshape(num_frames, rows, 3 * columns)
        cut = pixels[:, top : top + height, 3 * left : 3 * (left + width)]
        if out is None:
            out = np.empty((num_frames, height, width, 3), dtype=np.uint8)
        assert out.shape == (num_frames, height, width, 3) and out.flags.c_contiguous, out.shape
        out.reshape(num_frames, height, 3 * width)[:] = cut
        return out


def _rgb_target(num_frames: int, height: int, width: int) -> _RgbTarget:
    """This thread's target for parts of at least this size."""
    size = (num_frames, height + height % 2, width + width % 2)
    if not hasattr(_per_thread, "targets"):
        _per_thread.targets = OrderedDict()
    targets: OrderedDict[tuple[int, int, int], _RgbTarget] = _per_thread.targets
    if size not in targets:
        targets[size] = _RgbTarget(*size)
        if len(targets) > KEPT_TARGETS:
            targets.popitem(last=False)
    targets.move_to_end(size)
    return targets[size]


def decode_yuv_windows(
    video: bytes,
    frame_indices: Sequence[int],
    short_side: int,
    *,
    top: int,
    left: int,
    crop_size: int,
    out: np.ndarray,
    stored_size: tuple[int, int] | None = None,
    key: str = "",
    shard: str = "",
) -> np.ndarray:
    """YUV 4:2:0 planes of the part of each frame that a crop needs, for conversion on the device.

    Of each frame, scaled to short_side, the part of `yuv_window_size(crop_size)` rows and columns that starts
    at row top and column left, both rounded down to even: Y, then U and V of half the size, one after the
    other. What would lie outside the frame (the last rows or columns) is left as it was in out.

    Args:
        video: contents of key.mp4.
        frame_indices: which of the 32 frames, ascending.
        short_side: as in `decode_frames`.
        top: first row of the crop in the scaled frame.
        left: first column of the crop.
        crop_size: side of the crop, pixels.
        out: uint8 (T, window * window * 3 // 2), contiguous, written.
        stored_size: (width, height) that the stored frames must have; None: any.
        key: for the error.
        shard: for the error.

    Returns:
        out.

    Raises:
        BadClip: as `decode_frames`.
    """
    window = yuv_window_size(crop_size)
    assert out.shape == (len(frame_indices), window * window * 3 // 2) and out.flags.c_contiguous, out.shape
    luma = out[:, : window * window].reshape(-1, window, window)
    chroma = out[:, window * window :].reshape(-1, 2, window // 2, window // 2)
    copier = None
    for row, frame in _chosen_frames(video, frame_indices, stored_size, key, shard):
        frame = _scaled_yuv(frame, short_side, key, shard)
        if copier is None:
            assert 0 <= top <= frame.height - crop_size and 0 <= left <= frame.width - crop_size, (top, left)
            copier = _PlaneCopier(frame, top, left, (luma, chroma[:, 0], chroma[:, 1]))
        copier.copy(frame, row)
    return out


def _scaled_yuv(frame: av.VideoFrame, short_side: int, key: str, shard: str) -> av.VideoFrame:
    """frame as 8-bit 4:2:0, scaled to short_side; itself if it is that already."""
    width, height = scaled_size(frame.width, frame.height, short_side)
    if (frame.width, frame.height, frame.format.name) == (width, height, "yuv420p"):
        return frame
    if not hasattr(_per_thread, "scaler"):
        _per_thread.scaler = VideoReformatter()
    try:
        return _per_thread.scaler.reformat(frame, width, height, "yuv420p", **_TO_YUV, **_ONE_THREAD)
    except (av.error.FFmpegError, MemoryError) as error:
        raise BadClip(key, shard, "decode-error") from error


class _PlaneCopier:
    """Copies the part of each frame of a clip that starts at (top, left), rounded down to even, as far as both
    the frame and planes go. planes: uint8 Y (T, rows, columns), U and V (T, rows / 2, columns / 2), written."""

    def __init__(
        self, frame: av.VideoFrame, top: int, left: int, planes: tuple[np.ndarray, np.ndarray, np.ndarray]
    ) -> None:
        self._cuts = []
        for shift, target in zip((0, 1, 1), planes):  # U and V: half the size, rounded up
            first_row, first_column = top // 2 * 2 >> shift, left // 2 * 2 >> shift
            rows = min(target.shape[1], -(-frame.height >> shift) - first_row)
            columns = min(target.shape[2], -(-frame.width >> shift) - first_column)
            self._cuts.append((first_row, first_column, (rows, columns), target[:, :rows, :columns]))

    def copy(self, frame: av.VideoFrame, row: int) -> None:
        """frame, of the size of the first one, into row."""
        for plane, (first_row, first_column, shape, target) in zip(frame.planes, self._cuts):
            line = plane.line_size
            target[row] = np.ndarray(shape, np.uint8, plane, first_row * line + first_column, (line, 1))


def _plane(frame: av.VideoFrame, index: int, height: int) -> np.ndarray:
    """uint8 (height, bytes of a line) of a plane."""
    plane = frame.planes[index]
    return np.frombuffer(plane, np.uint8).reshape(-1, plane.line_size)[:height]


def _chosen_frames(
    video: bytes,
    frame_indices: Sequence[int],
    stored_size: tuple[int, int] | None,
    key: str,
    shard: str,
) -> Iterator[tuple[int, av.VideoFrame]]:
    """(row, frame) of the frames asked for; all 32 are decoded and checked."""
    assert list(frame_indices) == sorted(set(frame_indices)), frame_indices
    assert set(frame_indices) <= set(range(FRAMES_PER_CLIP)), frame_indices
    rows = dict(zip(frame_indices, range(len(frame_indices))))
    count, size, previous_pts = 0, None, None
    try:
        track = read_video_track(video)
    except ValueError as error:
        raise BadClip(key, shard, "decode-error") from error
    if len(track.samples) != FRAMES_PER_CLIP:
        raise BadClip(key, shard, "frame-count")
    decoded = _decode_track(video, track)
    try:
        for frame in decoded:
            if frame.is_corrupt or frame.pts is None:
                raise BadClip(key, shard, "decode-error")
            if count == FRAMES_PER_CLIP or (previous_pts is not None and frame.pts <= previous_pts):
                raise BadClip(key, shard, "frame-count")
            previous_pts = frame.pts
            if size is None:
                size = (frame.width, frame.height)
                if stored_size not in (None, size):
                    raise BadClip(key, shard, "frame-size")
            elif (frame.width, frame.height) != size:
                raise BadClip(key, shard, "frame-size")
            row = rows.get(count)
            count += 1
            if row is not None:
                yield row, frame
    except av.error.FFmpegError as error:
        raise BadClip(key, shard, "decode-error") from error
    finally:
        decoded.close()
    if count != FRAMES_PER_CLIP:
        raise BadClip(key, shard, "frame-count")


def _decode_track(video: bytes, track: VideoTrack) -> Iterator[av.VideoFrame]:
    """Frames of a track, by a decoder that is kept for the next clip with the same parameter sets.

    Opening a container and a decoder for each clip costs a quarter of the time. A decoder that was left before
    the clip's end, for whatever reason, is not used again.
    """
    if not hasattr(_per_thread, "decoders"):
        _per_thread.decoders = OrderedDict()
    decoders: OrderedDict[bytes, av.VideoCodecContext] = _per_thread.decoders
    decoder = decoders.pop(track.extradata, None)
    if decoder is None:
        decoder = open_decoder(track)
    yield from decode(decoder, video, track)
    decoders[track.extradata] = decoder
    if len(decoders) > KEPT_DECODERS:
        decoders.popitem(last=False)


def waveform_samples(audio: bytes, *, key: str = "", shard: str = "") -> np.ndarray:
    """Samples of a clip as they are stored: int16 (24000,), read-only.

    Args:
        audio: contents of key.wav (16-bit, mono, 24 kHz).
        key: for the error.
        shard: for the error.

    Raises:
        BadClip: `decode-error` if it is no such file, `sample-count` unless there are 24,000 samples.
    """
    if len(audio) == len(WAV_HEADER) + 2 * SAMPLES_PER_CLIP and audio.startswith(WAV_HEADER):
        return np.frombuffer(audio, dtype="<i2", offset=len(WAV_HEADER))
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
    return samples


def decode_waveform(audio: bytes, *, key: str = "", shard: str = "") -> np.ndarray:
    """Waveform of a clip: float32 (24000,) in [-1, 1); arguments and errors as `waveform_samples`."""
    return waveform_samples(audio, key=key, shard=shard).astype(np.float32) / np.float32(32768)
