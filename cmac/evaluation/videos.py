"""A clip that plays with its sound: the picture, the guided map and the predicted map side by side."""

import io
import os
from collections.abc import Iterable
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from av.container import OutputContainer
from PIL import Image, ImageDraw, ImageFont

from cmac.evaluation.pictures import overlay, stretch

STRIP = 28
"""Height of the names above the panels, pixels: under the pictures a player's controls would hide them."""
AAC_RATES = (96_000, 88_200, 64_000, 48_000, 44_100, 32_000, 24_000, 22_050, 16_000, 12_000, 11_025, 8_000)
"""Sample rates that AAC has, Hz."""
AAC_FRAME = 1024
"""Samples per block of AAC."""
PANELS = ("picture", "guided by sound", "predicted from picture")


def map_per_frame(maps: np.ndarray, num_frames: int) -> np.ndarray:
    """A map for each frame, linear between the steps' middles: (T', H', W') -> (num_frames, H', W')."""
    num_steps = len(maps)
    position = np.clip((np.arange(num_frames) + 0.5) * num_steps / num_frames - 0.5, 0, num_steps - 1)
    below = np.floor(position).astype(int)
    above = np.minimum(below + 1, num_steps - 1)
    weight = (position - below)[:, None, None]
    return (1 - weight) * maps[below] + weight * maps[above]


def overlay_panels(
    picture: np.ndarray, frames: np.ndarray, guided: np.ndarray, predicted: np.ndarray
) -> np.ndarray:
    """Three panels with their names above, for each frame: uint8 (T, size + STRIP, 3 * size, 3).

    Args:
        picture: uint8 (T, size, size, 3), shown in the first panel (with boxes drawn, where they are known).
        frames: uint8 (T, size, size, 3), under the maps.
        guided: (T', H', W'). Each map is stretched to its own range over the whole clip, so that its course
            over time is kept.
        predicted: (T', H', W').
    """
    num_frames, size = picture.shape[:2]
    font = ImageFont.load_default(size=16)
    strip = Image.new("RGB", (3 * size, STRIP), (24, 26, 31))
    draw = ImageDraw.Draw(strip)
    for panel, name in enumerate(PANELS):
        draw.text((panel * size + size // 2, STRIP // 2), name, fill=(235, 235, 230), font=font, anchor="mm")
    names = np.asarray(strip)
    maps = [map_per_frame(stretch(values), num_frames) for values in (guided, predicted)]
    result = []
    for index in range(num_frames):
        row = [picture[index], *(overlay(frames[index], values[index]) for values in maps)]
        result.append(np.concatenate([names, np.concatenate(row, axis=1)], axis=0))
    return np.stack(result)


def encode_mp4(
    frames: np.ndarray, waveform: np.ndarray, fps: int, sample_rate: int, repeats: int = 1
) -> bytes:
    """MP4 file (H.264, AAC) that a browser plays.

    Args:
        frames: uint8 (T, H, W, 3), H and W even.
        waveform: float32 (num_samples,) in [-1, 1], mono.
        fps: frames per second.
        sample_rate: Hz.
        repeats: how often the whole is played; one second alone is over before one has looked.
    """
    buffer = io.BytesIO()
    repeated = (frame for _ in range(repeats) for frame in frames)
    sound = np.tile(waveform[None], repeats)
    with av.open(buffer, "w", format="mp4") as container:
        _write_streams(container, repeated, frames.shape[2:0:-1], sound, fps, sample_rate, {"crf": "24"})
    return buffer.getvalue()


def write_mp4(
    path: str | os.PathLike,
    frames: Iterable[np.ndarray],
    size: tuple[int, int],
    sound: np.ndarray,
    *,
    fps: int,
    sample_rate: int,
    max_bits_per_second: int,
) -> None:
    """Writes an MP4 file (H.264 in yuv420p, AAC, index at the front) frame by frame, whole or not at all.

    Args:
        path: of the file, which is replaced.
        frames: uint8 (H, W, 3) each.
        size: (W, H), even.
        sound: float32 (1 or 2, num_samples) in [-1, 1].
        fps: frames per second.
        sample_rate: Hz, one of `AAC_RATES`.
        max_bits_per_second: of the picture, over any two seconds.
    """
    path = Path(path)
    options = {
        "crf": "22",
        "maxrate": str(max_bits_per_second),
        "bufsize": str(2 * max_bits_per_second),
    }
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        # The index can be moved to the front only in a file with a name.
        with av.open(f"file:{temporary}", "w", format="mp4", options={"movflags": "+faststart"}) as container:
            _write_streams(container, frames, size, sound, fps, sample_rate, options)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _write_streams(
    container: OutputContainer,
    frames: Iterable[np.ndarray],
    size: tuple[int, int],
    sound: np.ndarray,
    fps: int,
    sample_rate: int,
    options: dict[str, str],
) -> None:
    """Encodes frames and the sound beside them, (1 or 2, num_samples); sound that is longer goes on to its end."""
    width, height = size
    if height % 2 or width % 2:
        raise ValueError(f"frames are {width}x{height}, expected even sides (4:2:0)")
    video = container.add_stream("libx264", rate=fps, options={"preset": "veryfast", **options})
    video.width, video.height, video.pix_fmt = width, height, "yuv420p"
    layout = ("mono", "stereo")[len(sound) - 1]
    audio = container.add_stream("aac", rate=sample_rate, layout=layout)
    sound = np.clip(sound, -1, 1).astype(np.float32)
    sent = 0

    def send_sound(until: int) -> None:
        nonlocal sent
        while sent < until:
            part = np.ascontiguousarray(sound[:, sent : sent + AAC_FRAME])
            block = av.AudioFrame.from_ndarray(part, format="fltp", layout=layout)
            block.sample_rate, block.pts, block.time_base = sample_rate, sent, Fraction(1, sample_rate)
            container.mux(audio.encode(block))
            sent += part.shape[1]

    for index, picture in enumerate(frames):
        frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
        frame.pts, frame.time_base = index, Fraction(1, fps)
        container.mux(video.encode(frame))
        send_sound(min(index * sample_rate // fps, sound.shape[1]))
    container.mux(video.encode(None))
    send_sound(sound.shape[1])
    container.mux(audio.encode(None))
