"""The ffmpeg program: where it is, the command that slices a video, and running it without trusting it."""

import contextlib
import functools
import math
import os
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import ffmpeg
import imageio_ffmpeg

from shards.media import FORMATS, PROTOCOLS
from shards.schema import FPS, FRAMES_PER_CLIP, SAMPLE_RATE

if sys.platform == "linux":
    import resource

AUDIO_FILE = "audio.raw"
VIDEO_PATTERN = "video%04d.mp4"
SOURCE = "<source>"
FULL_DISK = ("No space left on device", "Disk quota exceeded")
NO_MEMORY = re.compile(r"Cannot allocate memory|malloc.{0,40} failed|pthread_create\(\) failed")
"""What ffmpeg and x264 print when they get none."""
STOPPED_CODE = 255
"""With this ffmpeg ends after a signal that asks it to (SIGTERM): what it has written by then looks whole."""
NOT_PERMITTED = "Operation not permitted"
"""Or with an error of this name, which decoders give for damage; then it prints it."""
MAX_ERROR_CHARACTERS = 4000
"""Of what a program prints, the last part is kept."""
_LAST_BYTES = 2**16
"""And looked through for what is said of disk and memory."""


@dataclass(frozen=True, kw_only=True)
class SliceCommand:
    """What one pass over a video does; see `build`."""

    path: str
    video_stream: int
    """Index in the file."""
    audio_stream: int
    start_seconds: float
    """Start of the first second, on the clock that starts with the container."""
    read_seconds: float
    """Nothing later than this is read."""
    origin_seconds: int = 0
    """The audio file starts there."""
    seek: bool = False
    """Jump to `origin_seconds` in place of decoding what is before. Only for formats that can do so exactly."""
    max_pixels: int = 2**31 - 1
    """What the decoder takes of a frame."""
    seconds: tuple[int, ...] | None
    """Which seconds after `start_seconds` become clips, ascending; None: all."""
    scaled_size: tuple[int, int]
    """(width, height) that the frame is scaled to, then cropped to `frame_size` at `crop_offset`. Pixels."""
    crop_offset: tuple[int, int]
    frame_size: tuple[int, int]
    scale_first: bool
    """Scale before the change of frame rate (which repeats frames if the source has fewer than 32 per
    second)."""
    crf: int
    preset: str

    def build(self, program: str) -> list[str]:
        """Command line, for a working folder in which it leaves `VIDEO_PATTERN` per clip and `AUDIO_FILE`.

        Frame k of the output shows the source at start_seconds + k/32 (the frame nearest in time). The audio
        file holds raw 16-bit mono samples at 24 kHz from `origin_seconds` on, silence filled in where a stream
        starts late or has holes, so that sample n is at origin_seconds + n/24000 s on the same clock.
        """
        # After a jump, times count from where it went.
        base = self.origin_seconds if self.seek else 0
        source = ffmpeg.input(
            SOURCE,
            threads=1,
            protocol_whitelist=PROTOCOLS,
            format_whitelist=FORMATS,
            max_pixels=self.max_pixels,
            t=f"{self.read_seconds - base:.6f}",
            **({"ss": str(base)} if base else {}),
        )
        video = source[str(self.video_stream)]
        if self.scale_first:
            video = self._scale(video)
        video = video.filter("fps", fps=FPS, start_time=f"{self.start_seconds - base:.6f}", round="near")
        if self.seconds is not None and self.seconds != tuple(range(len(self.seconds))):
            video = video.filter(
                "select", "+".join(f"eq(floor(n/{FRAMES_PER_CLIP}),{k})" for k in self.seconds)
            )
        # From 0 on, without holes: the muxer would fill up to the first time stamp.
        video = video.filter("setpts", f"N/({FPS}*TB)")
        if not self.scale_first:
            video = self._scale(video)
        width, height = self.frame_size
        video = (
            video.filter("crop", width, height, *self.crop_offset)
            .filter("setsar", 1)
            .filter("format", "yuv420p")
            .filter(
                "setparams",
                range="tv",
                colorspace="smpte170m",
                color_primaries="smpte170m",
                color_trc="smpte170m",
            )
        )
        # Without a choice there are no more than this, whatever the times in the file.
        most = math.ceil(self.read_seconds - self.start_seconds) + 2
        num_seconds = most if self.seconds is None else len(self.seconds)
        video_output = ffmpeg.output(
            video,
            VIDEO_PATTERN,
            **{
                "c:v": "libx264",
                "preset": self.preset,
                "crf": self.crf,
                "tune": "fastdecode",
                "bf": 0,
                "refs": 1,
                "g": FRAMES_PER_CLIP,
                "keyint_min": FRAMES_PER_CLIP,
                "sc_threshold": 0,
                "flags:v": "+bitexact+cgop",
                "fflags": "+bitexact",
                "threads": 1,
                "r": FPS,
                "f": "segment",
                "segment_format": "mp4",
                "segment_time": 1,
                "segment_time_delta": 0.015,
                "reset_timestamps": 1,
                "map_metadata": -1,
                "frames:v": FRAMES_PER_CLIP * num_seconds,
            },
        )
        # rematrix_maxval: otherwise the gain of a mix to mono depends on the sample format. min_hard_comp:
        # time stamps that are further off than this (0.1 s by default) are followed; it must be below one
        # output frame. aformat, not -ac 1: that would put a second resampler behind this one, without these
        # options.
        audio = (
            source[str(self.audio_stream)]
            .filter(
                "aresample",
                SAMPLE_RATE,
                **{"async": 1, "first_pts": 0, "min_hard_comp": 0.025, "rematrix_maxval": 1.0},
            )
            .filter("aformat", sample_fmts="s16", channel_layouts="mono")
        )
        if self.origin_seconds > base:
            audio = audio.filter("atrim", start_sample=(self.origin_seconds - base) * SAMPLE_RATE)
        audio_output = ffmpeg.output(audio, AUDIO_FILE, f="s16le", **{"c:a": "pcm_s16le"})
        command = ffmpeg.merge_outputs(video_output, audio_output).global_args(
            *"-nostdin -hide_banner -loglevel error -filter_threads 1 -filter_complex_threads 1".split()
        )
        # ffmpeg-python cannot hold names that are not UTF-8, so the name is put in here. "file:" keeps names
        # such as "concat:a" or "-y" from being anything but a name.
        words = command.overwrite_output().compile(cmd=program)
        return [f"file:{os.path.abspath(self.path)}" if word == SOURCE else word for word in words]

    def _scale(self, video: "ffmpeg.nodes.FilterableStream") -> "ffmpeg.nodes.FilterableStream":
        return video.filter(
            "scale",
            *self.scaled_size,
            flags="bicubic+accurate_rnd+bitexact",
            out_color_matrix="bt601",
            out_range="tv",
        )


@dataclass(frozen=True, kw_only=True)
class Finished:
    """How a program ended."""

    return_code: int
    errors: str
    """What it printed, the last 4,000 characters."""
    full_disk: bool = False
    """Whether it printed that the disk is full."""
    no_memory: bool = False
    """Whether it printed that it got no memory."""
    not_permitted: bool = False
    """Whether it printed `NOT_PERMITTED`."""

    @property
    def too_large(self) -> bool:
        """Whether it was killed as a file that it wrote became larger than allowed."""
        return self.return_code == -signal.SIGXFSZ

    @property
    def killed(self) -> bool:
        """Whether a signal ended it that none of our limits sends: from outside (out of memory, SIGTERM to all
        processes of a Slurm job), or its own crash. What it has written says nothing about the file."""
        if self.return_code == STOPPED_CODE:
            return not self.not_permitted
        return self.return_code < 0 and not self.too_large


class FfmpegTimeout(Exception):
    """ffmpeg took longer than allowed, or more time of the processor, and was killed."""


def find_ffmpeg() -> str:
    """Path of an ffmpeg that has libx264: the one that imageio-ffmpeg brings, else the one on PATH.

    The first is the same on every machine, so that shards are; IMAGEIO_FFMPEG_EXE in the environment names
    another one.

    Raises:
        ValueError: neither works.
    """
    tried = []
    for program in (_bundled_ffmpeg(), shutil.which("ffmpeg")):
        if program is None:
            continue
        tried.append(program)
        if _has_x264(program):
            return program
    raise ValueError(
        f"no ffmpeg with libx264 (tried: {', '.join(tried) or 'none found'}); install one that is on PATH, "
        f"or `pip install --force-reinstall imageio-ffmpeg`"
    )


def _bundled_ffmpeg() -> str | None:
    try:
        return imageio_ffmpeg.get_ffmpeg_exe()
    except RuntimeError:
        return None


@functools.lru_cache
def _has_x264(program: str) -> bool:
    try:
        done = subprocess.run(
            [program, "-nostdin", "-hide_banner", "-encoders"], capture_output=True, timeout=60, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return False
    return done.returncode == 0 and b" libx264 " in done.stdout


@functools.lru_cache
def ffmpeg_version(program: str) -> str:
    """First line that ffmpeg prints about itself, up to the copyright."""
    done = subprocess.run([program, "-nostdin", "-version"], capture_output=True, timeout=60, check=True)
    return done.stdout.decode("utf-8", "replace").splitlines()[0].partition(" Copyright")[0]


def run_ffmpeg(
    command: Sequence[str],
    folder: Path,
    timeout_seconds: float,
    *,
    max_memory_bytes: int | None = None,
    max_file_bytes: int | None = None,
) -> Finished:
    """Run a command in `folder`, in a session of its own (the terminal's Ctrl-C does not reach it).

    Args:
        max_memory_bytes: of its address space (on Linux); allocations beyond it fail.
        max_file_bytes: of each file that it writes (on Linux); it is killed where one becomes larger.

    Raises:
        FfmpegTimeout: it was killed after `timeout_seconds`, or at this machine's limit on processor time.
        OSError: the disk is full.
    """
    limits = {
        "RLIMIT_AS": max_memory_bytes,
        "RLIMIT_FSIZE": max_file_bytes,
        "RLIMIT_CORE": 0,
        # It outlives a worker that is killed, but not for long. It has no more than four threads at work.
        "RLIMIT_CPU": math.ceil(4 * timeout_seconds),
    }
    for _ in range(2):
        finished = _run_once(command, folder, timeout_seconds, limits)
        if not finished.full_disk:
            break
        if _is_full(folder):
            raise OSError(
                f"{folder}: {FULL_DISK[0]}; make room and run the same command again, it goes on where it stopped"
            )
        # There was room again a moment later; or these words are in the file.
    return finished


def _run_once(
    command: Sequence[str], folder: Path, timeout_seconds: float, limits: dict[str, int | None]
) -> Finished:
    deadline, cpu_before, cpu_limit = time.monotonic() + timeout_seconds, _children_cpu_seconds(), math.inf
    process = subprocess.Popen(
        command,
        cwd=folder,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    try:
        if sys.platform == "linux":
            # Not between fork and exec, where nothing of Python is safe: it has opened no file yet when this is set.
            with contextlib.suppress(ProcessLookupError):
                for name, value in limits.items():
                    if value is None:
                        continue
                    kind = getattr(resource, name)
                    _, hard = resource.getrlimit(kind)  # of a login node, say: none may go above it
                    if hard != resource.RLIM_INFINITY:
                        value = min(value, hard)
                    if name == "RLIMIT_CPU":
                        cpu_limit = value
                    resource.prlimit(process.pid, kind, (value, value))
        assert process.stderr is not None
        poll = select.poll()
        poll.register(process.stderr, select.POLLIN)
        errors = b""  # only its end is kept, whatever a file makes a program print
        while True:
            left = deadline - time.monotonic()
            if left <= 0 or not poll.poll(1000 * left):
                raise FfmpegTimeout(f"killed after {timeout_seconds} s")
            data = os.read(process.stderr.fileno(), 2**16)
            if not data:
                break
            errors = (errors + data)[-_LAST_BYTES:]
        try:
            process.wait(max(deadline - time.monotonic(), 0.01))
        except subprocess.TimeoutExpired:
            raise FfmpegTimeout(f"killed after {timeout_seconds} s") from None
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
        if process.stderr is not None:
            process.stderr.close()
    text = errors.decode("utf-8", "replace")
    finished = Finished(
        return_code=process.returncode,
        errors=text[-MAX_ERROR_CHARACTERS:],
        full_disk=any(words in text for words in FULL_DISK),
        no_memory=NO_MEMORY.search(text) is not None,
        not_permitted=NOT_PERMITTED in text,
    )
    if finished.killed and _children_cpu_seconds() - cpu_before > cpu_limit - 0.5:
        raise FfmpegTimeout(f"killed after {cpu_limit} s of processor time")
    return finished


def _children_cpu_seconds() -> float:
    """Processor time of all processes that this one has started and that have ended."""
    if sys.platform != "linux":
        return 0.0
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def _is_full(folder: Path) -> bool:
    """Whether the disk that a folder is on takes no more."""
    path = folder / "room"
    try:
        path.write_bytes(bytes(2**20))
    except OSError:
        return True
    finally:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)
    return False
