"""The ffmpeg program: where it is, the command that slices a video, and running it without trusting it."""

import functools
import os
import shutil
import signal
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import ffmpeg
import imageio_ffmpeg

from shards.schema import FPS, FRAMES_PER_CLIP, SAMPLE_RATE

PROTOCOLS = "file,pipe"
"""A video may not make ffmpeg open addresses."""
FORMATS = (
    "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,flv,live_flv,mpegts,mpeg,asf,asf_o,ogg,rm,mxf,nut,wtv,dv,"
    "mp3,wav,aac,flac"
)
"""Containers that are read. A playlist (HLS, concat, ...) could make ffmpeg read other files, so none is
among them."""
AUDIO_FILE = "audio.raw"
VIDEO_PATTERN = "video%04d.mp4"
SOURCE = "<source>"
FULL_DISK = "No space left on device"


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
        file holds raw 16-bit mono samples at 24 kHz from the start of the container on, silence filled in
        where a stream starts late or has holes, so that sample n is at n/24000 s on the same clock.
        """
        source = ffmpeg.input(
            SOURCE,
            threads=1,
            protocol_whitelist=PROTOCOLS,
            format_whitelist=FORMATS,
            t=f"{self.read_seconds:.6f}",
        )
        video = source[str(self.video_stream)]
        if self.scale_first:
            video = self._scale(video)
        video = video.filter("fps", fps=FPS, start_time=f"{self.start_seconds:.6f}", round="near")
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
        limit = {} if self.seconds is None else {"frames:v": FRAMES_PER_CLIP * len(self.seconds)}
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
            },
            **limit,
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


class FfmpegTimeout(Exception):
    """ffmpeg took longer than allowed and was killed."""


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


def run_ffmpeg(command: Sequence[str], folder: Path, timeout_seconds: float) -> Finished:
    """Run a command in `folder`, in a session of its own (the terminal's Ctrl-C does not reach it).

    Raises:
        FfmpegTimeout: it was killed after `timeout_seconds`.
        OSError: the disk is full.
    """
    process = subprocess.Popen(
        command,
        cwd=folder,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    try:
        _, errors = process.communicate(timeout=timeout_seconds)
    except subprocess.TimeoutExpired:
        raise FfmpegTimeout(f"killed after {timeout_seconds} s") from None
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            process.wait()
        if process.stderr is not None:
            process.stderr.close()
    text = errors.decode("utf-8", "replace")
    if FULL_DISK in text:
        raise OSError(
            f"{folder}: {FULL_DISK}; make room and run the same command again, it goes on where it stopped"
        )
    return Finished(return_code=process.returncode, errors=text[-4000:])
