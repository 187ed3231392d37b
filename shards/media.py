"""Opening a media file with libav without trusting it: it is given this file alone, and what the file asks of the
machine is bounded."""

import os
import stat
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import av
import av.logging

if sys.platform != "win32":
    import resource

av.logging.set_level(None)  # libav prints what it finds odd; here that gives a reason or is right

PROTOCOLS = "file,pipe"
"""A file may not make libav open addresses."""
FORMATS = (
    "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,flv,live_flv,mpegts,mpeg,asf,asf_o,ogg,rm,mxf,nut,wtv,dv,"
    "mp3,wav,aac,flac"
)
"""Containers that are read. A playlist (HLS, DASH, concat, ...) could make libav read other files, so none is among
them. Tracks of a QuickTime file that lie in other files are left out by libav itself (`enable_drefs` is off)."""

READ_BYTES = 1 << 20
"""Of a file that is read through, at a time."""


class Unusable(Exception):
    """A file gives no clips; the argument is the reason, a short slug."""

    @property
    def reason(self) -> str:
        return self.args[0]


@dataclass(frozen=True, kw_only=True)
class SourceLimits:
    """What a file may ask of the machine that reads it.

    What asks for more is left out, by what its header says, before anything of it is decoded. Like the limit on time,
    these guard the machine; they are not part of what makes two folders of shards the same.
    """

    max_pixels: int = 8192 * 8192
    """Of a picture; more is `too-many-pixels`. 8K video has 33 million."""
    max_fps: float = 100_000.0
    """Frames per second; more is `too-fast`. (Files without a frame rate may have that of their clock, 90,000.)"""
    max_sample_rate: int = 768_000
    """Hz; more is `too-fast`: what a resampler needs grows with it."""
    max_channels: int = 64
    """Of the sound; more is `too-many-streams`."""
    max_streams: int = 100
    """In a file; more is `too-many-streams`."""
    max_hours: float = 48.0
    """Length of a file; more is `too-long`: what is between times far apart gets filled with silence. (Damaged
    transport streams may seem to have 26.5, after which their clock turns over.)"""
    max_memory_bytes: int = 4 * 2**30
    """Address space of the ffmpeg that cuts a video, and memory that probing it may add to a worker; more is `memory`.
    Measured: 0.9 GB of address space for 1080p and 4K H.264, 1.6 GB for 8K HEVC of 10 bits, of which 0.9 are used."""

    def __post_init__(self) -> None:
        for name, least in (
            ("max_pixels", 1), ("max_fps", 1), ("max_sample_rate", 1), ("max_channels", 1), ("max_streams", 1),
            ("max_memory_bytes", 2**28),
        ):  # fmt: skip
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}, expected at least {least}")
        if not self.max_hours > 0:
            raise ValueError(f"max_hours is {self.max_hours}, expected more than 0")


@contextmanager
def open_media(path: str, limits: SourceLimits | None = None) -> Iterator[av.container.InputContainer]:
    """A media file, open for reading.

    Args:
        path: a name and nothing but a name: `concat:a`, `http://...` or `%d.jpg` are looked for as files.
        limits: None: the default ones.

    Raises:
        Unusable: `unreadable` if it is no regular file (a pipe would wait for ever, a device may never end),
            `too-many-pixels`, `too-fast`, `too-many-streams` or `too-long` by its header.
        av.error.FFmpegError, OSError, ValueError: libav cannot open it.
    """
    limits = limits or SourceLimits()
    if os.path.lexists(path) and not os.path.isfile(path):
        raise Unusable("unreadable")
    options = {
        "protocol_whitelist": PROTOCOLS,
        "format_whitelist": FORMATS,
        # For the decoders that libav opens to find out what a stream is.
        "max_pixels": str(limits.max_pixels),
    }
    # "file:" keeps names such as "concat:a" from being anything but a name.
    with av.open(f"file:{os.path.abspath(path)}", options=options, metadata_errors="replace") as container:
        _check_header(container, limits)
        for stream in container.streams.video:
            if stream.codec_context is not None:
                # The header may lie about the size of what is in the stream.
                stream.codec_context.options = {"max_pixels": str(limits.max_pixels)}
        yield container


def _check_header(container: av.container.InputContainer, limits: SourceLimits) -> None:
    if len(container.streams) > limits.max_streams:
        raise Unusable("too-many-streams")
    for stream in container.streams.video:
        if stream.codec_context is None:
            continue
        if stream.width * stream.height > limits.max_pixels:
            raise Unusable("too-many-pixels")
        if stream.average_rate is not None and stream.average_rate > limits.max_fps:
            raise Unusable("too-fast")
    for stream in container.streams.audio:
        if stream.codec_context is None:
            continue
        if (stream.codec_context.sample_rate or 0) > limits.max_sample_rate:
            raise Unusable("too-fast")
        if stream.codec_context.channels > limits.max_channels:
            raise Unusable("too-many-streams")
    if container.duration is not None and container.duration / av.time_base > limits.max_hours * 3600:
        raise Unusable("too-long")


def read_through(path: str, seconds: float) -> None:
    """Read a file once, for no longer than this: whether the disk or the file system gives it, whatever is in it.
    What is no regular file is not opened.

    Raises:
        OSError: it does not.
    """
    deadline = time.monotonic() + seconds
    if not stat.S_ISREG(os.stat(path).st_mode):
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        while time.monotonic() < deadline and os.read(descriptor, READ_BYTES):
            pass
    finally:
        os.close(descriptor)


def is_unmounted(path: str) -> bool:
    """Whether the folder that a file was in is gone or empty."""
    folder = os.path.dirname(os.path.abspath(path))
    try:
        return not os.path.lexists(path) and not os.listdir(folder)
    except OSError:
        return True


@contextmanager
def bounded_memory(num_bytes: int) -> Iterator[None]:
    """Inside, this process may take so much memory more than it has; then allocations fail (MemoryError, or an
    FFmpegError of that kind). Only where there is nothing else in the process that memory must not fail for. Does
    nothing on systems without /proc or such a limit."""
    try:
        with open("/proc/self/statm", "rb") as file:
            pages = int(file.read().split()[5])  # data and stack, what RLIMIT_DATA counts
    except OSError:
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    limit = pages * resource.getpagesize() + num_bytes
    if soft != resource.RLIM_INFINITY:
        limit = min(limit, soft)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))
