"""Clips straight from original videos: an index of a folder of them, and one second of one of them as needed.

The sound and the picture of a clip are what `tools/make_shards.py` would have cut there: the same clock (it
starts with the container), the same choice of streams, frames (32 per second, each the source's nearest in
time) and sound (24 kHz, mono, 16 bits, silence where the stream has a hole). Three things are left to those
who make shards: silent seconds are not left out, a file's damage is seen only where a clip meets it, and every
clip costs a search in the file and the decoding of all that lies between its start and the key frame before.

    index_videos(folder) -> VideoIndex -> RawVideoReader.read(position, start) -> RawSecond
"""

import math
import os
import threading
import time
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction

import av
import av.logging
import numpy as np
from av.video.reformatter import ColorRange, Colorspace, Interpolation, VideoReformatter

from loaders.augment import random_stream, scaled_size
from loaders.raw_index import (
    INDEX_SECONDS,
    LIMITS,
    IndexedVideo,
    VideoIndex,
    index_videos,
    is_placeholder,
    lacks_times,
    origin_seconds,
    read_packets,
)
from shards.media import Unusable, open_media
from shards.schema import (
    CLIP_SECONDS,
    FPS,
    FRAMES_PER_CLIP,
    SAMPLE_RATE,
    SILENCE_FLOOR_DBFS,
    BadClip,
    ClipInfo,
    clip_key,
    video_number,
)
from shards.slicing import loudness_dbfs

__all__ = ["IndexedVideo", "RawSecond", "RawVideoReader", "VideoIndex", "index_videos", "random_start"]

PADDING_SECONDS = 0.031
"""So much silence may be put before or after the sound of a clip: less than one of its 32 frames."""
AUDIO_PREROLL_SECONDS = 0.2
"""Sound is decoded from so long before the clip: decoders need packets before they are right, and filters
samples."""
AUDIO_TAIL_SECONDS = 0.02
"""And until so long after it: the resampler looks ahead."""
ATTEMPTS = ((0.0, False), (1.0, False), (5.0, False), (0.0, True))
"""(back, primed): the picture is decoded from the key frame before the clip; where that fails, from the one
before a time `back` seconds earlier (what a file calls key frames are not always ones, and a search may end too
late); at last with a decoder that has seen the first packet of the file (in 4:4:4 of old x264, the only one that
says how to decode)."""
READ_SECONDS = INDEX_SECONDS
"""Reading a clip may take so long; then it is bad (`timeout`). Asked after each packet."""
EPSILON_SECONDS = 1e-6
"""For comparing sums of times that were rounded to microseconds."""

# PyAV 17 and later start a scaling thread per core for each frame unless told not to: 4 to 15 times slower.
_ONE_THREAD = {"threads": 1} if int(av.__version__.partition(".")[0]) >= 17 else {}
_COLORSPACES = {
    1: Colorspace.ITU709,
    4: Colorspace.FCC,
    7: Colorspace.SMPTE240M,
    9: 9,  # BT.2020; its name is not in PyAV before 17
    10: 9,
}
"""libav's number of a frame's color matrix -> swscale's; all others, unknown ones too, are BT.601."""
_per_thread = threading.local()

av.logging.set_level(av.logging.PANIC)  # libav prints what it finds odd; here that raises BadClip or is right


@dataclass(frozen=True, kw_only=True)
class RawSecond:
    """One clip."""

    info: ClipInfo
    """As a shard would have it, but for `source_crop`, which is the whole picture, `frame_width` and
    `frame_height`, which are those of the displayed picture with square pixels, and the checksums, which are
    0."""
    frames: np.ndarray
    """uint8 (T, height, width, 3), RGB; T is 0 where the picture is not used."""
    waveform: np.ndarray
    """float32 (num_samples,) in [-1, 1), 24 kHz; empty where the sound is not used."""


def random_start(seed: int, epoch: int, key: str, duration_seconds: float) -> float:
    """Where the clip `key` starts in `epoch`: uniform in [0, duration_seconds - 1], in whole microseconds.

    Counted from where picture and sound are both there (`IndexedVideo.start_seconds`).
    """
    room = duration_seconds - CLIP_SECONDS
    assert room >= 0, duration_seconds
    raw = int(random_stream(seed, epoch, key, "start").random_raw())
    return math.floor((raw >> 11) * 2.0**-53 * room * 1e6) / 1e6


class RawVideoReader:
    """Clips of the videos of an index. Keeps nothing of a video between two clips."""

    def __init__(self, index: VideoIndex) -> None:
        self._index = index

    def __len__(self) -> int:
        """Number of videos."""
        return len(self._index.videos)

    def video(self, position: int) -> IndexedVideo:
        """What is known of a video."""
        return self._index.videos[position]

    def key(self, position: int, slot: int = 0) -> str:
        """Key of a video's clip. slot: 1 for the second clip where there are two of a video."""
        return clip_key(self._index.videos[position].key_hash, slot)

    def video_number(self, position: int) -> int:
        """ClipInfo.video_number of a video."""
        return video_number(self._index.videos[position].video_id)

    def frame_size(self, position: int) -> tuple[int, int]:
        """(width, height) of the displayed picture with square pixels: what `scaled_size` is to be asked with."""
        return self._index.videos[position].frame_size

    def start_seconds(self, position: int, seed: int, epoch: int, slot: int = 0) -> float:
        """Start of a video's clip in an epoch, on the clock of `read`: a function of (seed, epoch, key) alone."""
        video = self._index.videos[position]
        offset = random_start(seed, epoch, self.key(position, slot), video.duration_seconds)
        return round(video.start_seconds + offset, 6)

    def read(
        self,
        position: int,
        start_seconds: float,
        *,
        short_side: int,
        frame_indices: Sequence[int] = tuple(range(FRAMES_PER_CLIP)),
        window: tuple[int, int, int, int] | None = None,
        out: np.ndarray | None = None,
        slot: int = 0,
    ) -> RawSecond:
        """The second of a video from start_seconds on, scaled and cut.

        Output frame i shows the source at start_seconds + i / 32: the last frame that is shown before the middle
        between this and the next output frame (the rule of ffmpeg's `fps` filter).

        Args:
            position: of the video in the index.
            start_seconds: on the source's clock, which starts with the container (`start_seconds()` draws one).
            short_side: frames are scaled to this short side, pixels, aspect kept.
            frame_indices: which of the 32 frames, ascending.
            window: (top, left, height, width) of the scaled frame to keep; None: all of it.
            out: uint8 (T, height, width, 3), contiguous, to write to and return.
            slot: see `key`.

        Raises:
            BadClip: `missing`, `unreadable`, `stale-index` (the file has another size than when it was indexed),
                `decode-error`, `frame-count` unless the picture is there for the whole clip, `sample-count`
                where more than 31 ms of sound are missing at either end, `timeout`, or what
                `shards.media.open_media` refuses. out then holds anything.
        """
        assert list(frame_indices) == sorted(set(frame_indices)), frame_indices
        bounds = tuple(start_seconds + (i + 0.5) / FPS - EPSILON_SECONDS for i in frame_indices)
        last = start_seconds + (FRAMES_PER_CLIP - 0.5) / FPS - EPSILON_SECONDS
        frames, samples = self.read_bounds(
            position,
            bounds,
            start_seconds,
            CLIP_SECONDS,
            last_bound=last,
            scaled=scaled_size(*self.frame_size(position), short_side),
            window=window,
            out=out,
            key=self.key(position, slot),
        )
        info = self.describe(position, start_seconds, CLIP_SECONDS, slot, samples)
        return RawSecond(info=info, frames=frames, waveform=samples.astype(np.float32) / np.float32(32768))

    def read_bounds(
        self,
        position: int,
        bounds: tuple[float, ...],
        start_seconds: float,
        clip_seconds: float,
        *,
        scaled: tuple[int, int],
        last_bound: float | None = None,
        window: tuple[int, int, int, int] | None = None,
        out: np.ndarray | None = None,
        key: str,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Pictures at any times and the sound between two, in one pass over that part of the file.

        Args:
            position: of the video in the index.
            bounds: seconds, ascending: picture i is the last one shown before bounds[i]. Not read where the
                picture is not used.
            start_seconds: where the sound starts. Not read where the sound is not used.
            clip_seconds: how much of it.
            scaled: (width, height) that frames are scaled to.
            last_bound: the picture has to last until then; None: until the last of bounds.
            window: as for `read`.
            out: as for `read`.
            key: for errors.

        Returns:
            uint8 (T, height, width, 3), RGB, and int16 (num_samples,), 24 kHz.

        Raises:
            BadClip: as `read`.
        """
        video = self._index.videos[position]
        if video.video_stream is None:
            bounds = ()
        clip = _Clip(
            video=video,
            path=self._index.path(position),
            key=key,
            start_seconds=start_seconds,
            num_samples=0 if video.audio_stream is None else round(clip_seconds * SAMPLE_RATE),
            bounds=bounds,
        )
        top, left, height, width = window or (0, 0, scaled[1], scaled[0])
        if bounds:
            assert 0 <= top <= scaled[1] - height and 0 <= left <= scaled[0] - width, window
        if out is None:
            out = np.empty((len(bounds), height, width, 3), dtype=np.uint8)
        assert out.shape == (len(bounds), height, width, 3), out.shape
        assert out.flags.c_contiguous
        canvas = _Canvas(video, scaled, (top, left, height, width), out)
        if bounds and (last_bound or bounds[-1]) > video.video_end_seconds + EPSILON_SECONDS:
            raise clip.bad("frame-count")
        return out, _read(clip, canvas)

    def read_soundtrack(
        self, position: int, start_seconds: float, seconds: float, rates: Sequence[int]
    ) -> tuple[np.ndarray, int]:
        """The sound between two times as one would hear it: at its own rate, with silence where nothing decodes.

        Args:
            position: of the video in the index.
            start_seconds: on the source's clock.
            seconds: how much.
            rates: sample rates that may come back, Hz; of a rate that is not among them, the next higher one is
                taken, or the highest.

        Returns:
            (float32 (1 or 2, num_samples) in [-1, 1), sample rate): mono or, of two and more channels, stereo.

        Raises:
            BadClip: `missing`, `unreadable`, `decode-error` (nothing decodes), `timeout`, or what
                `shards.media.open_media` refuses.
        """
        video = self._index.videos[position]
        assert video.audio_stream is not None, video.video_id
        try:
            with open_media(self._index.path(position), LIMITS) as container:
                found = _read_soundtrack(container, video.audio_stream, start_seconds, seconds, rates)
        except FileNotFoundError:
            raise BadClip(self.key(position), video.video_id, "missing") from None
        except (Unusable, _TooSlow) as error:
            raise BadClip(self.key(position), video.video_id, error.args[0]) from error
        except (av.error.FFmpegError, OSError) as error:
            raise BadClip(self.key(position), video.video_id, "unreadable") from error
        if found is None:
            raise BadClip(self.key(position), video.video_id, "decode-error")
        return found

    def describe(
        self, position: int, start_seconds: float, clip_seconds: float, slot: int, samples: np.ndarray
    ) -> ClipInfo:
        """What is known of a clip. samples: int16 (num_samples,), its sound; may be empty."""
        video = self._index.videos[position]
        display_width, display_height = video.frame_size
        return ClipInfo(
            key=self.key(position, slot),
            video_id=video.video_id,
            video_number=self.video_number(position),
            label=video.label,
            slot=slot,
            start_seconds=start_seconds,
            end_seconds=round(start_seconds + clip_seconds, 6),
            source_fps=video.fps,
            source_width=video.width,
            source_height=video.height,
            source_crop=(0.0, 0.0, float(video.width), float(video.height)),
            frame_width=display_width,
            frame_height=display_height,
            loudness_dbfs=loudness_dbfs(samples) if len(samples) else SILENCE_FLOOR_DBFS,
            video_crc32=0,
            audio_crc32=0,
        )


@dataclass(frozen=True, kw_only=True)
class _Clip:
    """What is asked for."""

    video: IndexedVideo
    path: str
    key: str
    start_seconds: float
    """Of the sound."""
    num_samples: int
    bounds: tuple[float, ...]
    """Frames that start before this time may be the output frame; the last of them is."""
    deadline: float = field(default_factory=lambda: time.monotonic() + READ_SECONDS)
    """Of the clock of `time.monotonic`."""

    @property
    def end_seconds(self) -> float:
        """Of the sound."""
        return self.start_seconds + self.num_samples / SAMPLE_RATE

    def bad(self, reason: str) -> BadClip:
        return BadClip(self.key, self.video.video_id, reason)


class _Canvas:
    """Scales, turns and cuts frames into the rows of the output."""

    def __init__(
        self,
        video: IndexedVideo,
        scaled: tuple[int, int],
        window: tuple[int, int, int, int],
        out: np.ndarray,
    ) -> None:
        self._stored_size = scaled[::-1] if video.rotation % 2 else scaled  # before it is turned
        self._rotation = video.rotation
        self._mirrored = video.mirrored
        self._window = window
        self._out = out

    def draw(self, frame: av.VideoFrame, row: int) -> None:
        """Writes a frame, as it was decoded, to a row."""
        reformatter = getattr(_per_thread, "reformatter", None)
        if reformatter is None:
            reformatter = _per_thread.reformatter = VideoReformatter()
        is_rgb = frame.format.is_rgb
        full_range = is_rgb or frame.color_range == 2 or frame.format.name.startswith("yuvj")
        width, height = self._stored_size
        image = reformatter.reformat(
            frame, width, height, "rgb24",
            src_colorspace=_COLORSPACES.get(int(frame.colorspace), Colorspace.ITU601),
            dst_colorspace=Colorspace.ITU601,
            src_color_range=ColorRange.JPEG if full_range else ColorRange.MPEG,
            dst_color_range=ColorRange.JPEG,
            interpolation=Interpolation.BILINEAR, **_ONE_THREAD,
        )  # fmt: skip
        plane = image.planes[0]
        rows = np.frombuffer(plane, np.uint8).reshape(height, plane.line_size)
        shown = rows[:, : 3 * width].reshape(height, width, 3)  # a view
        if self._mirrored:
            shown = shown[:, ::-1]
        shown = np.rot90(shown, self._rotation)
        top, left, height, width = self._window
        self._out[row] = shown[top : top + height, left : left + width]

    def repeat(self, row: int) -> None:
        """Writes to a row what the row before shows."""
        self._out[row] = self._out[row - 1]


class _TooSlow(Exception):
    """Reading takes too long; the argument is `timeout`."""


def _check_time(deadline: float) -> None:
    if time.monotonic() > deadline:
        raise _TooSlow("timeout")


class _Retry(Exception):
    """The picture cannot be had from where the search in the container ended; the argument is the reason that
    the BadClip will have."""


def _read(clip: _Clip, canvas: _Canvas) -> np.ndarray:
    """Draws the frames of a clip; returns its samples, int16 (24000,)."""
    try:
        num_bytes = os.stat(clip.path).st_size
    except FileNotFoundError:
        raise clip.bad("missing") from None
    except OSError:
        raise clip.bad("unreadable") from None
    if num_bytes != clip.video.num_bytes:
        raise clip.bad("stale-index")
    try:
        with open_media(clip.path, LIMITS) as container:
            return _read_container(clip, canvas, container)
    except (Unusable, _TooSlow) as error:
        raise clip.bad(error.args[0]) from error
    except (av.error.FFmpegError, OSError, ArithmeticError) as error:
        raise clip.bad("decode-error") from error


def _read_container(clip: _Clip, canvas: _Canvas, container: av.container.InputContainer) -> np.ndarray:
    video = clip.video
    wanted = [index for index in (video.video_stream, video.audio_stream) if index is not None]
    if max(wanted) >= len(container.streams):
        raise clip.bad("stale-index")
    for index in wanted:
        if container.streams[index].codec_context is None:
            raise clip.bad("decode-error")
        container.streams[index].codec_context.thread_type = "NONE"
    origin = origin_seconds(container)
    sound = None
    if video.audio_stream is not None:
        sound = _Sound(clip, container.streams[video.audio_stream], origin)
    if clip.bounds:
        _read_picture(clip, canvas, container, origin, sound)
    elif sound is not None:
        if clip.start_seconds - AUDIO_PREROLL_SECONDS > video.audio_start_seconds:
            _seek(container, sound.stream, clip.start_seconds - AUDIO_PREROLL_SECONDS, origin)
        _feed(container, None, sound, clip.deadline)
    if sound is None:
        return np.zeros(0, dtype=np.int16)

    # Its sound may lie before a picture in the file; then it is read by itself.
    for back in (0.5, 2.0, 5.0):
        if sound.complete:
            break
        seconds = clip.start_seconds - AUDIO_PREROLL_SECONDS - back
        is_last = back == 5.0
        if video.video_stream is None:
            _seek(container, sound.stream, max(seconds, video.audio_start_seconds), origin)
        else:
            keyframe = _keyframe_before(video, seconds)
            _seek(container, container.streams[video.video_stream], keyframe, origin)
            is_last = is_last or keyframe == video.keyframe_seconds[0]
        sound = _Sound(clip, sound.stream, origin, take_late=is_last)
        _feed(container, None, sound, clip.deadline)
    return sound.samples()


def _read_picture(
    clip: _Clip,
    canvas: _Canvas,
    container: av.container.InputContainer,
    origin: float,
    sound: "_Sound | None",
) -> None:
    """Draws the frames of a clip; gives to sound what lies beside them.

    Raises:
        BadClip: they cannot be drawn.
    """
    video = clip.video
    stream = container.streams[video.video_stream]
    reason, tried = "", None
    for back, primed in ATTEMPTS:
        keyframe = _keyframe_before(video, clip.bounds[0] - back)
        if keyframe == tried or (primed and keyframe == video.keyframe_seconds[0]):
            continue
        if primed:
            _prime(container, stream, video.keyframe_seconds[0], origin)
        if tried is not None or keyframe != video.keyframe_seconds[0]:
            _seek(container, stream, keyframe, origin)
        picture = _Picture(clip, canvas, stream, origin, keyframe)
        try:
            _feed(container, picture, sound if tried is None else None, clip.deadline)
            return
        except _Retry as error:
            reason, tried = error.args[0], keyframe
    raise clip.bad(reason)


def _keyframe_before(video: IndexedVideo, seconds: float) -> float:
    """The last key frame at or before a time, or the first."""
    return video.keyframe_seconds[max(bisect_right(video.keyframe_seconds, seconds) - 1, 0)]


def _seek(
    container: av.container.InputContainer, stream: av.stream.Stream, seconds: float, origin: float
) -> None:
    container.seek(round((seconds + origin) / stream.time_base), stream=stream)


def _prime(
    container: av.container.InputContainer, stream: av.VideoStream, first_keyframe: float, origin: float
) -> None:
    """Shows the decoder the first packet of the file."""
    _seek(container, stream, first_keyframe, origin)
    try:
        for packet in container.demux(stream):
            packet.decode()
            return
    except av.error.FFmpegError:
        pass


def _feed(
    container: av.container.InputContainer,
    picture: "_Picture | None",
    sound: "_Sound | None",
    deadline: float,
) -> None:
    """Gives packets to both until they have what they need, or to the end of the file.

    Raises:
        _TooSlow: the deadline is over.
    """
    takers = {taker.stream.index: taker for taker in (picture, sound) if taker is not None}
    waiting = set(takers)
    for packet in read_packets(container, *(taker.stream for taker in takers.values())):
        _check_time(deadline)
        index = packet.stream_index
        if index in waiting and takers[index].take(packet):
            waiting.remove(index)
            if not waiting:
                return
    for index in waiting:
        takers[index].finish()


class _Picture:
    """Draws the frames of a clip from the packets of its stream, which come in the order of decoding.

    Only what is needed is decoded: nothing before the key frame, nothing that is decoded after the last frame
    wanted, and of what no other frame refers to only what may be wanted.
    """

    def __init__(
        self, clip: _Clip, canvas: _Canvas, stream: av.VideoStream, origin: float, keyframe: float
    ) -> None:
        self.stream = stream
        self._canvas = canvas
        self._context = stream.codec_context
        self._origin = origin
        self._tick = float(stream.time_base)
        self._keyframe = keyframe - 1e-3  # containers round
        self._by_dts = lacks_times(stream.container)
        self._bounds = clip.bounds
        self._longest = clip.video.longest_frame_seconds
        self._frame_seconds = 1 / clip.video.fps if clip.video.fps > 0 else 1 / FPS
        self._started = False
        self._skipping = None
        self._row = 0  # to be drawn next
        self._held: av.VideoFrame | None = None
        self._held_seconds = -math.inf
        self._end_seconds = -math.inf  # the picture goes on at least until then

    def take(self, packet: av.Packet) -> bool:
        """Decodes a packet as far as needed; whether all frames are drawn.

        Raises:
            _Retry: they cannot be.
        """
        shown = self._seconds(packet.pts if packet.pts is not None else packet.dts)
        decoded = self._seconds(packet.dts) if packet.dts is not None else shown
        if not self._started:
            if shown is not None and shown > self._bounds[0]:
                raise _Retry("frame-count")  # the search ended too late
            if not packet.is_keyframe or is_placeholder(packet) or shown is None or shown < self._keyframe:
                return False
            self._started = True
        if shown is not None:
            self._end_seconds = max(self._end_seconds, shown)
        if decoded is not None and decoded >= self._bounds[-1]:
            self.finish()
            return True
        self._set_skipping(packet.pts is not None and shown is not None and self._is_needless(shown))
        self._decode(packet)
        return self._row == len(self._bounds)

    def finish(self) -> None:
        """The packets are at their end, or all that are needed were given: draws what is left.

        Raises:
            _Retry: not all frames can be drawn.
        """
        self._decode(None)
        while (
            self._row < len(self._bounds) and self._end_seconds >= self._bounds[self._row] - EPSILON_SECONDS
        ):
            self._draw()
        if self._row < len(self._bounds):
            raise _Retry("frame-count")

    def _seconds(self, ticks: int | None) -> float | None:
        return None if ticks is None else ticks * self._tick - self._origin

    def _is_needless(self, shown: float) -> bool:
        """Whether a picture shown from then on is certainly not among those drawn: another one follows it before
        the next bound."""
        if self._longest is None:
            return False
        place = bisect_right(self._bounds, shown)
        # Twice: pictures that are never shown have packets too, with times of their own.
        return place == len(self._bounds) or shown < self._bounds[place] - 2 * self._longest - 1e-3

    def _set_skipping(self, skipping: bool) -> None:
        if skipping != self._skipping:
            self._skipping = skipping
            self._context.skip_frame = "NONREF" if skipping else "DEFAULT"

    def _decode(self, packet: av.Packet | None) -> None:
        try:
            frames = self._context.decode(packet)
        except av.error.FFmpegError as error:
            raise _Retry("decode-error") from error
        for frame in frames:
            # A frame's dts is that of the packet after which it was shown, a time on the presentation clock.
            ticks = frame.dts if self._by_dts or frame.pts is None else frame.pts
            seconds = self._seconds(ticks)
            if seconds is None:
                seconds = self._held_seconds + self._frame_seconds
            if seconds < self._keyframe:
                continue  # leading pictures of an open group: they refer to what was not decoded
            if frame.is_corrupt:
                raise _Retry("decode-error")
            if seconds < self._held_seconds:
                raise _Retry("frame-count")
            while self._row < len(self._bounds) and self._bounds[self._row] <= seconds:
                self._draw()
            duration = frame.duration * self._tick if frame.duration else self._frame_seconds
            self._held, self._held_seconds = frame, seconds
            self._end_seconds = max(self._end_seconds, seconds + duration)

    def _draw(self) -> None:
        """Draws the frame held to the next row."""
        if self._held is None:
            raise _Retry("frame-count")
        if self._longest is not None:
            late = self._bounds[self._row] - self._held_seconds
            if late > 2 * self._longest + 1e-3:
                raise _Retry("frame-count")  # the decoder lost some without a word
        if self._held is self._drawn:
            self._canvas.repeat(self._row)
        else:
            self._canvas.draw(self._held, self._row)
            self._drawn = self._held
        self._row += 1

    _drawn: av.VideoFrame | None = None


class _Sound:
    """The samples of a clip from the packets of its stream."""

    def __init__(self, clip: _Clip, stream: av.AudioStream, origin: float, take_late: bool = False) -> None:
        """take_late: use what comes even if it comes too late for decoders to be right from the clip's start."""
        self.stream = stream
        self.complete = False
        """Whether all sound of the clip that is in the file was given."""
        self._clip = clip
        self._origin = origin
        self._tick = float(stream.time_base)
        self._begin = clip.start_seconds - AUDIO_PREROLL_SECONDS
        self._end = clip.end_seconds + AUDIO_TAIL_SECONDS
        self._take_late = take_late
        self._any = False
        self._mixer: _Mixer | None = None
        self._pieces: list[tuple[int, np.ndarray]] = []

    def take(self, packet: av.Packet) -> bool:
        """Decodes a packet if needed; whether no more are (either all were given, or they came too late).

        Raises:
            BadClip: `decode-error`.
        """
        ticks = packet.pts if packet.pts is not None else packet.dts
        begin = self._clip.start_seconds if ticks is None else ticks * self._tick - self._origin
        if begin + (packet.duration or 0) * self._tick < self._begin and ticks is not None:
            return False
        if begin >= self._end:
            self.finish()
            return True
        if not self._any:
            if begin > max(self._begin, self._clip.video.audio_start_seconds) + 1e-3 and not self._take_late:
                return True
            self._any = True
        try:
            frames = self.stream.codec_context.decode(packet)
        except av.error.FFmpegError as error:
            if begin + (packet.duration or 0) * self._tick <= self._clip.start_seconds:
                return False  # decoders may stumble where they start
            raise self._clip.bad("decode-error") from error
        self._mix(frames)
        return False

    def finish(self) -> None:
        """No more packets are there, or needed."""
        # With none so far, all may lie before the place where the search ended.
        self.complete = self._any or self._take_late or self._clip.video.audio_start_seconds >= self._begin
        if self._mixer is not None:
            self._pieces.append(self._mixer.finish())

    def _mix(self, frames: list[av.AudioFrame]) -> None:
        for frame in frames:
            if self._mixer is None or not self._mixer.fits(frame):
                if self._mixer is not None:
                    self._pieces.append(self._mixer.finish())
                self._mixer = _Mixer(frame, self._tick, self._origin)
            self._mixer.push(frame)

    def samples(self) -> np.ndarray:
        """int16 (num_samples,).

        Raises:
            BadClip: `sample-count`.
        """
        num_samples = self._clip.num_samples
        samples = np.zeros(num_samples, dtype=np.int16)
        first, last = num_samples, 0
        for place, piece in self._pieces:
            start = place - round(self._clip.start_seconds * SAMPLE_RATE)
            begin, end = max(start, 0), min(start + len(piece), num_samples)
            if begin < end:
                samples[begin:end] = piece[begin - start : end - start]
                first, last = min(first, begin), max(last, end)
        if max(first, num_samples - last) > PADDING_SECONDS * SAMPLE_RATE:
            raise self._clip.bad("sample-count")
        return samples


def _read_soundtrack(
    container: av.container.InputContainer,
    audio_stream: int,
    start_seconds: float,
    seconds: float,
    rates: Sequence[int],
) -> tuple[np.ndarray, int] | None:
    """See `RawVideoReader.read_soundtrack`; None: nothing decodes."""
    if audio_stream >= len(container.streams):
        return None
    stream = container.streams[audio_stream]
    stream.codec_context.thread_type = "NONE"
    origin, tick = origin_seconds(container), float(stream.time_base)
    rate, num_channels, mixer = 0, 0, None
    deadline = time.monotonic() + READ_SECONDS
    pieces: list[tuple[int, np.ndarray]] = []
    # Choice: all packets before are passed over, not searched: searching sound alone is not exact everywhere.
    for packet in read_packets(container, stream):
        _check_time(deadline)
        ticks = packet.pts if packet.pts is not None else packet.dts
        begin = None if ticks is None else ticks * tick - origin
        if begin is not None and begin > start_seconds + seconds + AUDIO_TAIL_SECONDS:
            break
        if (
            begin is not None
            and begin + (packet.duration or 0) * tick < start_seconds - AUDIO_PREROLL_SECONDS
        ):
            continue
        try:
            frames = stream.codec_context.decode(packet)
        except av.error.FFmpegError:
            continue  # silence there
        for frame in frames:
            if not rate:
                higher = [allowed for allowed in rates if allowed >= frame.sample_rate]
                rate = min(higher) if higher else max(rates)
                num_channels = min(frame.layout.nb_channels, 2)
            if mixer is None or not mixer.fits(frame):
                if mixer is not None:
                    pieces.append(mixer.finish())
                mixer = _Mixer(frame, tick, origin, rate, num_channels)
            mixer.push(frame)
    if mixer is None:
        return None
    pieces.append(mixer.finish())
    samples = np.zeros((round(seconds * rate), num_channels), dtype=np.int16)
    for place, piece in pieces:
        start, piece = place - round(start_seconds * rate), piece.reshape(-1, num_channels)
        begin, end = max(start, 0), min(start + len(piece), len(samples))
        if begin < end:
            samples[begin:end] = piece[begin - start : end - start]
    return np.ascontiguousarray(samples.T, dtype=np.float32) / np.float32(32768), rate


class _Mixer:
    """Decoded sound of one format -> int16, mono, 24 kHz, without holes: ffmpeg's filters, set as in
    `shards.ffmpeg.SliceCommand`."""

    def __init__(
        self,
        frame: av.AudioFrame,
        tick: float,
        origin: float,
        out_rate: int = SAMPLE_RATE,
        num_channels: int = 1,
    ) -> None:
        """frame: the first; it is not pushed. tick: seconds of a time stamp. num_channels: 1, or 2 for stereo."""
        self._form = _form(frame)
        self._rate = frame.sample_rate
        self._out_rate = out_rate
        self._num_channels = num_channels
        self._tick = tick
        self._origin = origin
        # What comes before the first sample that lies on the clock of both rates is left out: so the resampler
        # is in phase with one that began at 0, as for shards.
        step = self._rate // math.gcd(self._rate, out_rate)
        spare = -(self._place(frame) or 0) % step
        layout = {"layout": frame.layout.name}
        if frame.layout.name.endswith(" channels"):  # the file does not tell which is which
            layout = {"channels": frame.layout.nb_channels}
        self._graph = av.filter.Graph()
        self._graph.threads = 1
        self._graph.link_nodes(
            self._graph.add_abuffer(
                sample_rate=self._rate,
                format=frame.format.name,
                time_base=Fraction(1, self._rate),
                **layout,
            ),
            self._graph.add("atrim", f"start_sample={spare}"),
            self._graph.add("aresample", f"{out_rate}:async=1:min_hard_comp=0.025:rematrix_maxval=1.0"),
            self._graph.add(
                "aformat", f"sample_fmts=s16:channel_layouts={('mono', 'stereo')[num_channels - 1]}"
            ),
            self._graph.add("abuffersink"),
        ).configure()
        self._first: int | None = None
        self._parts: list[np.ndarray] = []

    def fits(self, frame: av.AudioFrame) -> bool:
        """Whether a frame has the format of the first."""
        return _form(frame) == self._form

    def push(self, frame: av.AudioFrame) -> None:
        """Adds a frame, which is changed."""
        frame.pts = self._place(frame)
        frame.time_base = Fraction(1, self._rate)
        self._graph.push(frame)
        self._pull()

    def finish(self) -> tuple[int, np.ndarray]:
        """(place of the first sample on the clock, in samples of 24 kHz; int16 samples).

        Samples of stereo take turns: left, right, left, ...
        """
        self._graph.push(None)
        self._pull()
        samples = np.concatenate(self._parts) if self._parts else np.zeros(0, dtype=np.int16)
        return self._first or 0, samples

    def _place(self, frame: av.AudioFrame) -> int | None:
        """Time of a frame, in samples of its own rate."""
        if frame.pts is None:
            return None
        return round((frame.pts * self._tick - self._origin) * self._rate)

    def _pull(self) -> None:
        while True:
            try:
                frame = self._graph.pull()
            except (av.error.BlockingIOError, av.error.EOFError):
                return
            if self._first is None and frame.pts is not None:
                self._first = round(frame.pts * frame.time_base * self._out_rate)
            num_values = frame.samples * self._num_channels
            self._parts.append(np.frombuffer(frame.planes[0], np.int16)[:num_values].copy())


def _form(frame: av.AudioFrame) -> tuple[str, int, str]:
    return frame.format.name, frame.sample_rate, frame.layout.name
