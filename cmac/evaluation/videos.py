"""A clip that plays with its sound: the picture, the guided map and the predicted map side by side."""

import io
from fractions import Fraction

import av
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from cmac.evaluation.pictures import overlay, stretch

STRIP = 28
"""Height of the names above the panels, pixels: under the pictures a player's controls would hide them."""
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
    num_frames, height, width, _ = frames.shape
    if height % 2 or width % 2:
        raise ValueError(f"frames are {width}x{height}, expected even sides (4:2:0)")
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        video = container.add_stream("libx264", rate=fps, options={"crf": "24", "preset": "veryfast"})
        video.width, video.height, video.pix_fmt = width, height, "yuv420p"
        audio = container.add_stream("aac", rate=sample_rate, layout="mono")
        for index in range(repeats * num_frames):
            picture = np.ascontiguousarray(frames[index % num_frames])
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = index, Fraction(1, fps)
            container.mux(video.encode(frame))
        container.mux(video.encode(None))
        samples = np.tile(np.clip(waveform, -1, 1).astype(np.float32), repeats)
        for start in range(0, len(samples), 1024):
            part = samples[None, start : start + 1024]
            block = av.AudioFrame.from_ndarray(part, format="fltp", layout="mono")
            block.sample_rate, block.pts, block.time_base = sample_rate, start, Fraction(1, sample_rate)
            container.mux(audio.encode(block))
        container.mux(audio.encode(None))
    return buffer.getvalue()
