"""One video -> its 1-second clips: 32 frames and 24,000 samples each, in sync, checked by decoding them back.

Time is counted on the source's presentation clock from the start of its container. Clips lie on a grid of
seconds that starts where both streams have started, so nothing is made up at the front; a second counts as
there only if the pass over the file really produced 32 frames and 24,000 samples for it, so nothing is made
up at the end; and where ffmpeg reports errors, seconds that touch a part that does not decode are left out,
so nothing is made up in between. The header's durations are only a hint: where the pass finds less than they
promise, a second one takes what is there.
"""

import errno
import functools
import io
import math
import os
import re
import socket
import tempfile
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import av
import numpy as np

from shards.damage import find_damage
from shards.ffmpeg import AUDIO_FILE, FfmpegTimeout, Finished, SliceCommand, run_ffmpeg
from shards.media import (
    SourceLimits,
    Unusable,
    bounded_memory,
    is_unmounted,
    open_media,
    read_through,
)
from shards.order import hash_fraction, shuffled
from shards.schema import (
    FPS,
    FRAME_SIZES,
    FRAMES_PER_CLIP,
    SAMPLE_RATE,
    SAMPLES_PER_CLIP,
    SILENCE_FLOOR_DBFS,
    WAV_HEADER,
)
from shards.sources import Needs
from shards.storage import TRANSIENT_ERRNOS

HALF_FRAME_SECONDS = 0.5 / FPS
"""The video is on a grid of 1/32 s, to which times are rounded."""
TIME_SLACK_SECONDS = 1e-4
"""For comparing times that are sums of rounded ones."""
MAX_PROBE_PACKETS = 500
"""The first frame is looked for in so many packets."""
CUT_SLACK_SECONDS = 1.0
"""A file that is longer than the window asked for by no more than this is that window already."""
SEEK_MARGIN_SECONDS = 12
"""Reading begins so long before a window that starts late in a file: decoders and filters are right by then."""
MAX_LATE_SECONDS = 3600.0
"""A stream may start so long after the other: ffmpeg puts silence there, which takes time. More is `too-long`."""
EXACT_FORMATS = ("mov", "matroska")
"""Formats with an index of times, in which a jump ends where it should; others are decoded from their start."""
KILLED_WAIT_SECONDS = (1.0, 4.0, 10.0)
"""A pass whose ffmpeg was killed is done again after these, then the video is `crash`."""
READ_WAIT_SECONDS = (0.5, 1.0, 2.0)
"""A file that cannot be read is read again after these."""
SLACK_SECONDS = 45
"""For all passes over a video there is twice the time of one, as without trying again, and this."""
ATTEMPTS = 4
"""A video is sliced so often at most, where reading it fails in between."""
FAULTS = frozenset(
    "undecodable unreadable truncated damaged too-short outside-window no-video no-audio".split()
)
"""Reasons that speak against a file if it can be read, and against its file system if it cannot."""
READ_FAILED = re.compile(
    "|".join([*(re.escape(os.strerror(n)) for n in sorted(TRANSIENT_ERRNOS)), "I/O error"])
)
"""What libav says where reading failed, or where it calls damage so."""


@dataclass(frozen=True, kw_only=True)
class SliceSettings:
    """What the clips of a video depend on, besides the video and the seed."""

    max_clips: int = 10
    """At most so many different seconds of a video are kept; also the number of slots."""
    max_seconds: int = 60
    """Only the first so many seconds of a video are read."""
    silence_dbfs: float = -60.0
    """Seconds quieter than this (root mean square, dB relative to full scale) are dropped."""
    crf: int = 23
    """Quality of x264: lower is better and larger."""
    preset: str = "medium"
    """Speed of x264."""

    def __post_init__(self) -> None:
        if not 1 <= self.max_clips <= 99:
            raise ValueError(f"max_clips is {self.max_clips}, expected 1 to 99")
        if self.max_seconds < self.max_clips:
            raise ValueError(
                f"max_seconds is {self.max_seconds}, expected at least max_clips ({self.max_clips}): "
                f"raise --max-seconds or lower --max-clips"
            )
        if not SILENCE_FLOOR_DBFS <= self.silence_dbfs <= 0:
            raise ValueError(f"silence_dbfs is {self.silence_dbfs}, expected {SILENCE_FLOOR_DBFS:g} to 0")
        if not 0 <= self.crf <= 51:
            raise ValueError(f"crf is {self.crf}, expected 0 to 51")
        presets = "ultrafast superfast veryfast faster fast medium slow slower veryslow".split()
        if self.preset not in presets:
            raise ValueError(f"preset is {self.preset!r}, expected one of {', '.join(presets)}")


@dataclass(frozen=True, kw_only=True)
class SlicedClip:
    """One second."""

    second: int
    """On the video's grid of seconds."""
    start_seconds: float
    video: bytes
    """mp4."""
    audio: bytes
    """wav."""
    loudness_dbfs: float
    video_crc32: int
    audio_crc32: int


@dataclass(frozen=True, kw_only=True)
class VideoProbe:
    """What the header and the first frame of a video say."""

    video_stream: int | None
    """None if no picture was asked for."""
    audio_stream: int | None
    """None if no sound was asked for."""
    width: int
    """Pixels, in display orientation; 0 without picture."""
    height: int
    pixel_aspect: float
    """Width / height of a pixel, in display orientation."""
    fps: float
    start_seconds: float
    """Where all streams that were asked for have started."""
    video_end_seconds: float | None
    """None if the header does not tell."""
    audio_end_seconds: float | None
    format_name: str = ""
    """Of the container, as libav calls it."""

    def promised_seconds(self, max_seconds: float) -> float | None:
        """How long picture and sound last together by the header, from `start_seconds` on; None if it does
        not tell.

        The picture's end is rounded to the nearest output frame, as ffmpeg does it; the sound has to be
        there.
        """
        if self.video_end_seconds is None or self.audio_end_seconds is None:
            return None
        end = min(self.video_end_seconds + HALF_FRAME_SECONDS, self.audio_end_seconds + TIME_SLACK_SECONDS)
        return max(min(end - self.start_seconds, max_seconds + TIME_SLACK_SECONDS), 0.0)


@dataclass(frozen=True, kw_only=True)
class SlicedVideo:
    """What is left of a video."""

    reason: str
    """Why there are no clips. With clips: '', or why there are fewer seconds than the header promises:
    'truncated' if the end is missing, 'damaged' if some in between do not decode."""
    seconds: int
    """Whole seconds in which picture and sound are both there, silent ones included."""
    clips: tuple[SlicedClip, ...] = ()
    """By time."""
    probe: VideoProbe | None = None
    crop: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0)
    """(x, y, width, height) of the part of the source frame that clips show, in pixels of the source."""
    frame_size: tuple[int, int] = (0, 0)


def slice_video(
    path: str,
    video_id: str,
    seed: int,
    settings: SliceSettings,
    program: str,
    timeout_seconds: float,
    work_folder: str | None = None,
    *,
    window: tuple[float, float] | None = None,
    limits: SourceLimits | None = None,
) -> SlicedVideo:
    """Clips of one video. Never raises for what is in the file.

    What speaks against the file counts only if the file can be read from its start to its end; where that fails at
    first, it is sliced again.

    Args:
        path: the file.
        video_id, seed: the random start within the first spare part of a second, and the random choice of
            seconds where there are more than `max_clips`, depend on these.
        program: ffmpeg, see `find_ffmpeg`.
        timeout_seconds: for each pass.
        work_folder: for temporary files; default: the system's.
        window: (start, end), seconds after the start of the container: only what is between is used, and
            `max_seconds` counts from its start. A file that is not longer than that (and a second) has been cut
            already and is used whole. `outside-window` where the file ends before the window starts.
        limits: on what the file may ask of the machine; None: the default ones.

    Raises:
        OSError: the disk is full, the work folder is gone, or the file system that the file is on fails.
    """
    deadline = time.monotonic() + 2 * timeout_seconds + SLACK_SECONDS
    for attempt in range(ATTEMPTS):
        said: list[str] = []
        sliced = _slice_once(
            path, video_id, seed, settings, program, timeout_seconds, work_folder, window,
            limits or SourceLimits(), deadline, said,
        )  # fmt: skip
        if sliced.reason not in FAULTS and not (any(said) and sliced.reason in ("", "silent")):
            return sliced
        try:
            num_failed = _failed_reads(path, deadline)
        except Unusable as error:
            return SlicedVideo(reason=error.reason, seconds=0)
        # A failure may be over by the time the file is read. But words may be no more than words: once is enough.
        if not num_failed and (attempt or not READ_FAILED.search("\n".join(said))):
            return sliced
    return SlicedVideo(reason="unreadable", seconds=0)


def _failed_reads(path: str, deadline: float) -> int:
    """How often reading a file fails before it works.

    Raises:
        Unusable: it does not, for what may be wrong with the file alone.
        OSError: it does not, for what is wrong with its file system.
    """
    for num_failed, wait in enumerate((*READ_WAIT_SECONDS, None)):
        try:
            read_through(path, deadline - time.monotonic())
            return num_failed
        except OSError as error:
            if wait is not None:
                time.sleep(wait)
            elif error.errno in TRANSIENT_ERRNOS - {errno.EIO} or is_unmounted(path):
                raise OSError(
                    f"{path} cannot be read on {socket.gethostname()} ({error.strerror}); see what its file system "
                    f"lacks there, then run the same command again, it goes on where it stopped"
                ) from error
            else:
                raise Unusable("missing" if error.errno == errno.ENOENT else "unreadable") from error
    raise AssertionError


def _slice_once(
    path: str,
    video_id: str,
    seed: int,
    settings: SliceSettings,
    program: str,
    timeout_seconds: float,
    work_folder: str | None,
    window: tuple[float, float] | None,
    limits: SourceLimits,
    deadline: float,
    said: list[str],
) -> SlicedVideo:
    """See `slice_video`. What libav and ffmpeg say of errors is appended to `said`."""
    run = functools.partial(
        _run_pass, timeout_seconds=timeout_seconds, deadline=deadline, work_folder=work_folder, said=said
    )
    try:
        with bounded_memory(limits.max_memory_bytes):
            probe = probe_video(path, limits=limits)
            if window is not None:
                window = None if _is_window(path, probe, window, limits) else window
            return _slice_probed(path, video_id, seed, settings, program, run, probe, window, limits)
    except Unusable as error:
        if error.__cause__ is not None:
            said.append(str(error.__cause__))
        return SlicedVideo(reason=error.reason, seconds=0)
    except FfmpegTimeout:
        return SlicedVideo(reason="timeout", seconds=0)
    except MemoryError:
        return SlicedVideo(reason="memory", seconds=0)


def is_cut_already(end_seconds: float, window: tuple[float, float]) -> bool:
    """Whether a file that ends then holds no more than the window that is asked for: it is used whole."""
    return end_seconds <= window[1] - window[0] + CUT_SLACK_SECONDS


def _is_window(path: str, probe: VideoProbe, window: tuple[float, float], limits: SourceLimits) -> bool:
    ends = [end for end in (probe.video_end_seconds, probe.audio_end_seconds) if end is not None]
    if ends:
        return is_cut_already(max(ends), window)
    # The header does not tell.
    try:
        with open_media(path, limits) as container:
            origin = (container.start_time or 0) / av.time_base
            for packet in container.demux(probe.video_stream, probe.audio_stream):
                if packet.pts is None:
                    continue
                if not is_cut_already(float(packet.pts * packet.time_base) - origin, window):
                    return False
    except (av.error.FFmpegError, OSError, ValueError):
        pass  # it goes on no further
    return True


def _slice_probed(
    path: str,
    video_id: str,
    seed: int,
    settings: SliceSettings,
    program: str,
    run: Callable[..., "_Pass"],
    probe: VideoProbe,
    window: tuple[float, float] | None,
    limits: SourceLimits,
) -> SlicedVideo:
    if probe.start_seconds > MAX_LATE_SECONDS:
        raise Unusable("too-long")
    max_seconds: float = settings.max_seconds
    if window is not None:
        ends = [end for end in (probe.video_end_seconds, probe.audio_end_seconds) if end is not None]
        if ends and min(ends) <= window[0]:
            raise Unusable("outside-window")
        probe = replace(probe, start_seconds=max(probe.start_seconds, window[0]))
        max_seconds = min(max_seconds, window[1] - probe.start_seconds)
    start, chosen, promised = probe.start_seconds, None, None
    length = probe.promised_seconds(max_seconds)
    if length is not None:
        promised = math.floor(length)
    if promised:
        # Only what the last whole second leaves over, less a margin: the end of a header is rarely exact.
        spare = max(length - promised - 4 / FPS, 0.0)
        start += math.floor(hash_fraction(seed, "start", video_id) * spare * FPS) / FPS
        order = shuffled(range(promised), seed, "choice", video_id)
        chosen = tuple(sorted(order[: settings.max_clips]))
    geometry = frame_geometry(probe.width, probe.height, probe.pixel_aspect)
    origin = math.floor(probe.start_seconds) - SEEK_MARGIN_SECONDS
    seek = window is not None and origin > 0 and _can_seek(path, probe, origin, limits)
    if origin < 5 * SEEK_MARGIN_SECONDS and not seek:
        origin = 0  # not worth it
    read_seconds = probe.start_seconds + max(max_seconds, 0) + 1

    def one_pass(start: float, chosen: tuple[int, ...] | None) -> _Pass:
        command = SliceCommand(
            path=path,
            video_stream=probe.video_stream,
            audio_stream=probe.audio_stream,
            start_seconds=start,
            read_seconds=read_seconds,
            origin_seconds=origin,
            seek=seek,
            max_pixels=limits.max_pixels,
            seconds=chosen,
            scaled_size=geometry.scaled_size,
            crop_offset=geometry.crop_offset,
            frame_size=geometry.frame_size,
            scale_first=probe.fps < FPS,
            crf=settings.crf,
            preset=settings.preset,
        )
        return run(
            command.build(program),
            lambda folder, errors: _collect(
                folder, start, origin, chosen, geometry.frame_size, max_seconds, errors
            ),
            max_memory_bytes=limits.max_memory_bytes,
            # Twice what the sound takes, and far more than a second of picture.
            max_file_bytes=2**26 + round(4 * SAMPLE_RATE * (read_seconds - origin)),
        )

    result = one_pass(start, chosen)
    damage = []
    if result.errors:
        damage = find_damage(
            path,
            probe.video_stream,
            probe.audio_stream,
            probe.start_seconds + max_seconds,
            limits,
            seek_seconds=origin if seek else None,
        )
    if chosen is not None and (len(result.clips) < len(chosen) or result.more_audio_than(promised) or damage):
        # The header lied, or not everything decodes. Without choice and shift, nothing that is there is lost.
        chosen, result = None, one_pass(probe.start_seconds, None)
    clips = [clip for clip in result.clips if not _overlaps(clip, damage)]
    if chosen is None:
        whole = len(clips)
        order = shuffled((clip.second for clip in clips), seed, "choice", video_id)
        kept = set(order[: settings.max_clips])
        clips = [clip for clip in clips if clip.second in kept]
    else:
        whole = promised
    flaw = ""
    if promised is not None and whole < promised:
        flaw = "damaged" if len(result.clips) > whole else "truncated"
    if not clips:
        if window is not None and not (result.any_video and result.any_audio):
            raise Unusable("outside-window")
        if not result.any_video or not result.any_audio:
            raise Unusable("undecodable")
        raise Unusable(flaw or "too-short")
    loud = tuple(clip for clip in clips if clip.loudness_dbfs >= settings.silence_dbfs)
    if not loud:
        return SlicedVideo(reason="silent", seconds=whole)
    return SlicedVideo(
        reason=flaw,
        seconds=whole,
        clips=loud,
        probe=probe,
        crop=geometry.source_crop,
        frame_size=geometry.frame_size,
    )


def _run_pass(
    command: list[str],
    collect: Callable[[Path, str], "_Pass"],
    *,
    max_memory_bytes: int,
    max_file_bytes: int,
    timeout_seconds: float,
    deadline: float,
    work_folder: str | None,
    said: list[str],
) -> "_Pass":
    """What `collect` makes of the folder that ffmpeg worked in, and of what it printed. Where something kills ffmpeg,
    it begins again in an empty folder.

    Raises:
        Unusable: `crash` if it is killed each time; what it may not do.
        FfmpegTimeout: it takes too long.
    """
    end = min(time.monotonic() + timeout_seconds, deadline)
    for attempt, wait in enumerate((*KILLED_WAIT_SECONDS, None)):
        with tempfile.TemporaryDirectory(dir=work_folder, prefix="pass-") as folder:
            try:
                finished = run_ffmpeg(
                    command,
                    Path(folder),
                    max(end - time.monotonic(), 0),
                    max_memory_bytes=max_memory_bytes,
                    max_file_bytes=max_file_bytes,
                )
            except FfmpegTimeout as error:
                if attempt:
                    raise Unusable("crash") from error  # it had less time than others
                raise
            said.append(finished.errors)
            _refuse_excess(finished)
            if not finished.killed:
                return collect(Path(folder), finished.errors)
        if wait is None or time.monotonic() + wait >= end:
            break
        time.sleep(wait)
    raise Unusable("crash")


def _refuse_excess(finished: Finished) -> None:
    if finished.too_large:
        raise Unusable("too-long")
    if finished.return_code and finished.no_memory:
        raise Unusable("memory")


def _can_seek(path: str, probe: VideoProbe, origin_seconds: int, limits: SourceLimits) -> bool:
    """Whether reading can begin at `origin_seconds`: the next packets of both streams after a jump are not later."""
    if not probe.format_name.startswith(EXACT_FORMATS):
        return False
    try:
        with open_media(path, limits) as container:
            origin = (container.start_time or 0) / av.time_base
            container.seek(round((origin_seconds + origin) * av.time_base))
            missing = {probe.video_stream, probe.audio_stream}
            for packet in container.demux(probe.video_stream, probe.audio_stream):
                if packet.stream_index not in missing or packet.pts is None:
                    continue
                if float(packet.pts * packet.time_base) - origin > origin_seconds + SEEK_MARGIN_SECONDS / 2:
                    return False
                if packet.stream_index == probe.video_stream and not packet.is_keyframe:
                    return False
                missing.remove(packet.stream_index)
                if not missing:
                    return True
    except (av.error.FFmpegError, OSError, ValueError, ArithmeticError):
        pass
    return False


def probe_video(path: str, needs: Needs = "both", limits: SourceLimits | None = None) -> VideoProbe:
    """Streams, size, rate and times of a video, from its header and first frame.

    Of several streams the one flagged as default is taken, then the one with the largest frame or the highest
    sample rate, then the first. Pictures attached to audio files are not video.

    Args:
        needs: which streams have to be there; the other one is not looked at.
        limits: on what the file may ask of the machine; None: the default ones.

    Raises:
        Unusable: `undecodable`, `no-video`, `no-audio`, or what `open_media` refuses.
        MemoryError: it takes more than there is.
    """
    limits = limits or SourceLimits()
    try:
        with open_media(path, limits) as container:
            return _probe_container(container, needs, limits)
    except MemoryError:
        raise
    except (av.error.FFmpegError, OSError, ValueError, ArithmeticError) as error:
        raise Unusable("undecodable") from error


def _probe_container(
    container: av.container.InputContainer, needs: Needs, limits: SourceLimits
) -> VideoProbe:
    pictures = av.stream.Disposition.attached_pic | av.stream.Disposition.still_image
    is_default = av.stream.Disposition.default
    videos = [stream for stream in container.streams.video if not stream.disposition & pictures]
    videos = [stream for stream in videos if stream.codec_context is not None]
    audios = [stream for stream in container.streams.audio if stream.codec_context is not None]
    if not videos and not audios:
        raise Unusable("undecodable")
    if not videos and needs != "audio":
        raise Unusable("no-video")
    if not audios and needs != "video":
        raise Unusable("no-audio")
    origin = (container.start_time or 0) / av.time_base
    total = None if container.duration is None else container.duration / av.time_base

    def end_of(stream: av.stream.Stream, start: float | None) -> float | None:
        known = stream.duration is not None and start is not None
        return start + float(stream.duration * stream.time_base) if known else total

    starts: list[float | None] = []
    picture: dict[str, Any] = {
        "video_stream": None, "width": 0, "height": 0, "pixel_aspect": 1.0, "fps": 0.0, "video_end_seconds": None,
    }  # fmt: skip
    sound: dict[str, Any] = {"audio_stream": None, "audio_end_seconds": None}
    if needs != "audio":
        video = max(
            videos,
            key=lambda s: (bool(s.disposition & is_default), (s.width or 0) * (s.height or 0), -s.index),
        )
        frame = _first_frame(container, video)
        width, height, aspect, rotation = video.width, video.height, video.sample_aspect_ratio, 0
        starts.append(_seconds(video.start_time, video, origin))
        video_end = end_of(video, starts[0])
        if frame is not None:
            width, height, rotation = frame.width, frame.height, frame.rotation
            starts.append(_seconds(frame.pts, video, origin))
        if not width or not height:
            raise Unusable("undecodable")
        if width * height > limits.max_pixels:
            raise Unusable("too-many-pixels")
        pixel_aspect = float(aspect) if aspect else 1.0
        if not 0.1 <= pixel_aspect <= 10:
            pixel_aspect = 1.0
        if round(rotation / 90) % 2:
            width, height, pixel_aspect = height, width, 1 / pixel_aspect
        rate = video.average_rate or video.guessed_rate or video.base_rate
        picture = {
            "video_stream": video.index,
            "width": width,
            "height": height,
            "pixel_aspect": pixel_aspect,
            "fps": float(rate) if rate else 0.0,
            "video_end_seconds": video_end,
        }
    if needs != "video":
        audio = max(
            audios,
            key=lambda s: (bool(s.disposition & is_default), s.codec_context.sample_rate or 0, -s.index),
        )
        start = _seconds(audio.start_time, audio, origin)
        starts.append(start)
        sound = {"audio_stream": audio.index, "audio_end_seconds": end_of(audio, start)}
    return VideoProbe(
        start_seconds=max([start for start in starts if start is not None], default=0.0),
        format_name=container.format.name,
        **picture,
        **sound,
    )


def _seconds(pts: int | None, stream: av.stream.Stream, origin: float) -> float | None:
    """Seconds after the start of the container, at least 0."""
    if pts is None or stream.time_base is None:
        return None
    return max(float(pts * stream.time_base) - origin, 0.0)


def _first_frame(container: av.container.InputContainer, video: av.video.VideoStream) -> av.VideoFrame | None:
    """First frame that decodes: it knows the rotation and the true size. None if there is none early on."""
    video.codec_context.thread_type = "NONE"
    for number, packet in enumerate(container.demux(video)):
        if number == MAX_PROBE_PACKETS:
            break
        try:
            for frame in packet.decode():
                return frame
        except av.error.FFmpegError as error:
            if isinstance(error, MemoryError):
                raise
    return None


@dataclass(frozen=True, kw_only=True)
class Geometry:
    """How a source frame becomes a clip's frame: scaled to cover it, then cropped at the center."""

    frame_size: tuple[int, int]
    scaled_size: tuple[int, int]
    crop_offset: tuple[int, int]
    """Even: colors are stored for 2x2 pixels."""
    source_crop: tuple[float, float, float, float]
    """(x, y, width, height) in pixels of the source."""


def frame_geometry(width: int, height: int, pixel_aspect: float = 1.0) -> Geometry:
    """Geometry for a source in display orientation: the size of `FRAME_SIZES` nearest in aspect ratio."""
    aspect = width * pixel_aspect / height
    frame_size = min(FRAME_SIZES, key=lambda size: (abs(math.log(size[0] / size[1] / aspect)), size))
    scale = max(frame_size[0] / (width * pixel_aspect), frame_size[1] / height)
    scaled = (
        max(round(width * pixel_aspect * scale), frame_size[0]),
        max(round(height * scale), frame_size[1]),
    )
    offset = tuple((big - small) // 4 * 2 for big, small in zip(scaled, frame_size))
    factor = (width / scaled[0], height / scaled[1])
    crop = (
        offset[0] * factor[0],
        offset[1] * factor[1],
        frame_size[0] * factor[0],
        frame_size[1] * factor[1],
    )
    return Geometry(
        frame_size=frame_size,
        scaled_size=scaled,
        crop_offset=offset,
        source_crop=tuple(round(value, 3) for value in crop),
    )


def _overlaps(clip: SlicedClip, damage: list[tuple[float, float]]) -> bool:
    begin, end = clip.start_seconds, clip.start_seconds + 1
    return any(
        start < end - TIME_SLACK_SECONDS and stop > begin + TIME_SLACK_SECONDS for start, stop in damage
    )


@dataclass(frozen=True, kw_only=True)
class _Pass:
    """What a pass left in its folder."""

    clips: tuple[SlicedClip, ...]
    audio_seconds: float
    """After the start of the grid."""
    any_video: bool
    any_audio: bool
    errors: str

    def more_audio_than(self, promised: int) -> bool:
        """The audio goes on well after what the header calls the end of the video or of the audio."""
        return self.audio_seconds >= promised + 2


def _collect(
    folder: Path,
    start: float,
    origin: int,
    chosen: tuple[int, ...] | None,
    frame_size: tuple[int, int],
    max_seconds: float,
    errors: str,
) -> _Pass:
    """Clips that are whole: 24,000 samples, and 32 frames of the right size when decoded."""
    audio_path = folder / AUDIO_FILE
    data = audio_path.read_bytes() if audio_path.exists() else b""
    waveform = np.frombuffer(data[: len(data) // 2 * 2], dtype="<i2")
    first = round(start * SAMPLE_RATE) - origin * SAMPLE_RATE
    clips = []
    paths = sorted(folder.glob("video*.mp4"))
    for position, path in enumerate(paths):
        if chosen is not None and position >= len(chosen):
            break
        second = position if chosen is None else chosen[position]
        begin = first + second * SAMPLES_PER_CLIP
        samples = waveform[begin : begin + SAMPLES_PER_CLIP]
        if second + 1 > max_seconds + TIME_SLACK_SECONDS or len(samples) < SAMPLES_PER_CLIP:
            break
        video = path.read_bytes()
        if decoded_frames(video) != [frame_size] * FRAMES_PER_CLIP:
            break  # the part of a second after the last whole one
        audio = WAV_HEADER + samples.tobytes()
        clips.append(
            SlicedClip(
                second=second,
                start_seconds=start + second,
                video=video,
                audio=audio,
                loudness_dbfs=loudness_dbfs(samples),
                video_crc32=zlib.crc32(video),
                audio_crc32=zlib.crc32(audio),
            )
        )
    return _Pass(
        clips=tuple(clips),
        audio_seconds=(len(waveform) - first) / SAMPLE_RATE,
        any_video=bool(paths) and paths[0].stat().st_size > 0,
        any_audio=len(waveform) > 0,
        errors=errors,
    )


def decoded_frames(video: bytes) -> list[tuple[int, int]]:
    """(width, height) of each frame of an mp4 that decodes, up to the first error."""
    sizes = []
    try:
        with av.open(io.BytesIO(video), format="mp4") as container:
            stream = container.streams.video[0]
            stream.codec_context.thread_type = "NONE"
            for frame in container.decode(stream):
                sizes.append((frame.width, frame.height))
    except (av.error.FFmpegError, IndexError):
        pass  # what this program's own ffmpeg wrote: a file cut off at most
    return sizes


def loudness_dbfs(samples: np.ndarray) -> float:
    """Root mean square of 16-bit samples in dB relative to full scale, at least `SILENCE_FLOOR_DBFS`."""
    mean_square = float(np.mean(np.square(samples.astype(np.float64) / 32768)))
    if mean_square <= 0:
        return SILENCE_FLOOR_DBFS
    return round(max(10 * math.log10(mean_square), SILENCE_FLOOR_DBFS), 2)
