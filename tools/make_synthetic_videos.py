"""Make small test videos whose content is known exactly: a flash and a beep at the same moment.

    python tools/make_synthetic_videos.py --out FOLDER [--num-videos 8] [--seed 0] [--seconds 3]

`make_flash_beep_video` makes one video with a given frame rate, size, rotation, sound layout and start of
each stream; `make_synthetic_videos` makes a folder of varied ones. Needs nothing but ffmpeg
(imageio-ffmpeg's or the one on PATH).
"""

import argparse
import os
import subprocess
import sys
import tempfile
import wave
from fractions import Fraction
from pathlib import Path

import numpy as np

from shards.ffmpeg import find_ffmpeg
from shards.order import hash_fraction

BEEP_HZ = 1000.0
BEEP_AMPLITUDE = 0.8
EVENT_SECONDS = 0.1
"""How long a flash and a beep last."""
DARKNESS = 0.25
"""The moving test picture behind the flash is dimmed to this."""


def make_flash_beep_video(
    path: str | os.PathLike,
    *,
    fps: str = "25",
    seconds: float = 3.0,
    size: tuple[int, int] = (160, 120),
    video_start: float = 0.0,
    audio_start: float = 0.0,
    audio_seconds: float | None = None,
    beep_lag: float = 0.0,
    beep_hz: float = BEEP_HZ,
    variable_rate: bool = False,
    rotation: int = 0,
    channels: int = 1,
    sample_rate: int = 44100,
    pixel_format: str = "yuv420p",
    sound: str = "beep",
    noise_dbfs: float = -45.0,
    has_video: bool = True,
    codecs: tuple[str, str] = ("libx264", "aac"),
    gop_frames: int = 12,
    extra: tuple[str, ...] = (),
) -> Path:
    """Write one video; returns its path. Flashes begin half a second after the start of the video stream, at
    the next frame, and repeat every round(fps) frames; a beep begins at the exact time of each flash.

    Args:
        path: the suffix tells the container.
        fps: as ffmpeg takes it, for example "30000/1001".
        seconds: length of the picture.
        size: (width, height) before rotation.
        video_start, audio_start: when each stream begins on the presentation clock. Beeps stay at the
            flashes.
        audio_seconds: the sound ends at this time; default: with the picture.
        beep_lag: a true lack of synchronization: each beep is this much later than its flash.
        variable_rate: leave out about a third of the frames, in a pattern, never a flash.
        rotation: degrees counter-clockwise that a player shall turn the picture.
        channels: 1, 2 or 6 (5.1; the beep is in all of them).
        sound: "beep", "noise" (only the noise floor), "zeros", or "none" (no audio stream).
        noise_dbfs: root mean square of the noise floor.
        codecs: video and audio encoder.
        extra: further output options.

    Raises:
        ValueError: ffmpeg refused.
    """
    if sound not in ("beep", "noise", "zeros", "none"):
        raise ValueError(f"sound is {sound!r}, expected 'beep', 'noise', 'zeros' or 'none'")
    path = Path(path)
    rate = Fraction(fps)
    period = round(rate)
    first = round(rate / 2)
    flash_frames = max(round(float(rate) * EVENT_SECONDS), 1)
    with tempfile.TemporaryDirectory() as folder:
        command = [find_ffmpeg(), "-nostdin", "-v", "error", "-y"]
        maps = []
        if has_video:
            width, height = size
            picture = (
                f"testsrc2=s={width}x{height}:r={fps}:d={seconds},"
                f"lutrgb=r=val*{DARKNESS}:g=val*{DARKNESS}:b=val*{DARKNESS},"
                f"drawbox=x=0:y=0:w=iw/4:h=ih/4:c=0xb0b0b0:t=fill,"
                f"drawbox=c=white:t=fill:"
                f"enable='between(mod(n-{first}+{period * 1000},{period}),0,{flash_frames - 1})'"
            )
            if variable_rate:
                gap = (first + flash_frames + 1, first + flash_frames + period // 3)
                picture += f",select='not(between(mod(n,{period}),{gap[0]},{gap[1]})*mod(n,4))'"
            command += ["-itsoffset", f"{video_start}", "-f", "lavfi", "-i", picture]
            maps += ["-map", "0:v"]
        if sound != "none":
            events = [
                video_start + float((first + k * period) / rate) + beep_lag for k in range(round(seconds) + 1)
            ]
            end = video_start + seconds if audio_seconds is None else audio_seconds
            samples = _waveform(
                audio_start, end, sample_rate, events if sound == "beep" else [], beep_hz, noise_dbfs
            )
            if sound == "zeros":
                samples = np.zeros_like(samples)
            _write_wav(Path(folder) / "sound.wav", samples, sample_rate, channels)
            command += ["-itsoffset", f"{audio_start}", "-i", str(Path(folder) / "sound.wav")]
            maps += ["-map", f"{1 if has_video else 0}:a"]
        suffix = path.suffix
        whole = Path(folder) / f"whole{suffix}"
        command += maps
        if has_video:
            command += [
                "-c:v",
                codecs[0],
                "-pix_fmt",
                pixel_format,
                "-g",
                str(gop_frames),
                "-fps_mode",
                "vfr",
            ]
            if codecs[0] == "libx264":
                command += ["-preset", "ultrafast", "-crf", "18"]
        if sound != "none":
            command += ["-c:a", codecs[1]]
        _run([*command, *extra, "-threads", "1", str(whole)])
        if rotation:
            turned = Path(folder) / f"turned{suffix}"
            _run(
                [find_ffmpeg(), *"-nostdin -v error -y -display_rotation".split(), str(rotation)]
                + ["-i", str(whole), "-c", "copy", str(turned)]
            )
            whole = turned
        path.write_bytes(whole.read_bytes())
    return path


def _waveform(
    start: float, end: float, sample_rate: int, events: list[float], beep_hz: float, noise_dbfs: float
) -> np.ndarray:
    """Sound from `start` to `end` on the presentation clock, float64 in [-1, 1]."""
    times = start + np.arange(max(round((end - start) * sample_rate), 1)) / sample_rate
    samples = np.random.default_rng(0).normal(0, 10 ** (noise_dbfs / 20), len(times))
    for event in events:
        inside = (times >= event) & (times < event + EVENT_SECONDS)
        samples[inside] += BEEP_AMPLITUDE * np.sin(2 * np.pi * beep_hz * (times[inside] - event))
    return np.clip(samples, -1, 1)


def _write_wav(path: Path, samples: np.ndarray, sample_rate: int, channels: int) -> None:
    data = np.repeat(np.round(samples * 32767).astype("<i2")[:, None], channels, axis=1)
    with wave.open(str(path), "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(2)
        file.setframerate(sample_rate)
        file.writeframes(data.tobytes())


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, check=False)
    if done.returncode:
        raise ValueError(f"ffmpeg failed, expected it to make {command[-1]}: {done.stderr.decode()[-500:]}")


def make_synthetic_videos(
    folder: str | os.PathLike, num_videos: int = 8, seed: int = 0, seconds: float = 3.0
) -> list[Path]:
    """Write `video_000.mp4`, ... of varied frame rate, size, sound and length (seconds to seconds + 2); their
    paths.

    Video k depends on (seed, k, seconds) alone.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    sizes = ((160, 120), (240, 136), (120, 160), (128, 128), (320, 180))
    rates = ("25", "30", "30000/1001", "24", "60")
    paths = []
    for number in range(num_videos):
        paths.append(
            make_flash_beep_video(
                folder / f"video_{number:03d}.mp4",
                fps=rates[int(hash_fraction(seed, "fps", number) * len(rates))],
                size=sizes[int(hash_fraction(seed, "size", number) * len(sizes))],
                seconds=seconds + round(2 * hash_fraction(seed, "seconds", number), 2),
                channels=1 + int(hash_fraction(seed, "channels", number) * 2),
                beep_hz=300 + 3000 * hash_fraction(seed, "beep", number),
            )
        )
    return paths


def main(argv: list[str] | None = None) -> int:
    """Run the tool; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="make_synthetic_videos",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", required=True, metavar="FOLDER")
    parser.add_argument("--num-videos", type=int, default=8, metavar="N")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--seconds", type=float, default=3.0, help="length of the shortest video (default: 3)"
    )
    args = parser.parse_args(argv)
    try:
        paths = make_synthetic_videos(args.out, args.num_videos, args.seed, args.seconds)
    except ValueError as error:
        print(f"make_synthetic_videos: {error}", file=sys.stderr)
        return 2
    print(f"{len(paths)} videos in {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
