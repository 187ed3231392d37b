"""Attention maps laid over frames and spectrograms, as tiles of a page and as one PNG (paper Fig. 5)."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from functools import cache, lru_cache
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageDraw, ImageFont

if TYPE_CHECKING:
    from cmac.evaluation.boxes import Crop

COLORMAP = "inferno"
"""Perceptually uniform: equal steps of the map look like equal steps of brightness, also in grey and to most
color-blind readers."""
SOUNDING_COLOR = (64, 224, 208)
SILENT_COLOR = (255, 255, 255)
UNSEEN_BRIGHTNESS = 0.35
"""What of a picture the network was not given is dimmed to this."""


@cache
def _color_table() -> np.ndarray:
    from matplotlib import colormaps

    return (colormaps[COLORMAP](np.linspace(0, 1, 256))[:, :3] * 255).round().astype(np.uint8)


def colorize(values: np.ndarray) -> np.ndarray:
    """Colors of values in [0, 1] (clipped to it): (...) -> uint8 (..., 3)."""
    return _color_table()[(np.clip(values, 0, 1) * 255).round().astype(np.uint8)]


def stretch(values: np.ndarray) -> np.ndarray:
    """Values scaled to fill [0, 1]; a constant array becomes zeros. For pictures only, never figures."""
    return stretch_between(values, float(values.min()), float(values.max()))


def stretch_between(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """Values scaled so that low becomes 0 and high 1, float32; zeros where both are the same."""
    if high - low < 1e-9:
        return np.zeros_like(values, dtype=np.float32)
    return ((values - low) / (high - low)).astype(np.float32)


def resize_map(values: np.ndarray, width: int, height: int) -> np.ndarray:
    """(H', W') -> float32 (height, width), bilinear, as the figures are computed."""
    image = Image.fromarray(np.ascontiguousarray(values, dtype=np.float32))
    return np.asarray(image.resize((width, height), Image.Resampling.BILINEAR))


def overlay(picture: np.ndarray, values: np.ndarray) -> np.ndarray:
    """The picture in dimmed grey with the map's colors over it, stronger where the map is higher.

    Grey, so that an object's own color cannot be mistaken for the map's.

    picture: uint8 (H, W, 3); values: (H', W') in [0, 1]. Returns uint8 (H, W, 3).
    """
    height, width = picture.shape[:2]
    if values.shape != (height, width):
        values = resize_map(values, width, height)
    levels = (np.clip(values, 0, 1) * 255).round().astype(np.uint8)
    grey = np.asarray(Image.fromarray(np.ascontiguousarray(picture)).convert("L"), dtype=np.float32)
    weight, color = _overlay_tables()
    return ((weight[levels] * grey)[..., None] + color[levels]).astype(np.uint8)


@cache
def _overlay_tables() -> tuple[np.ndarray, np.ndarray]:
    """(float32 (256,), float32 (256, 3)): for each level of a map, what the grey is weighted by and what is added."""
    alpha = 0.2 + 0.6 * np.arange(256, dtype=np.float32) / 255
    return (1 - alpha) * np.float32(0.8), alpha[:, None] * _color_table() + np.float32(0.5)


def place_map(
    values: np.ndarray, window: tuple[float, float, float, float], flip: bool, width: int, height: int
) -> np.ndarray:
    """A map of the square that the network was given, on the pixels of the whole picture.

    Args:
        values: (H', W').
        window: (x, y, width, height) of the square in pixels of the picture, whole or not.
        flip: the square was mirrored left to right before the network saw it; the map is mirrored back.
        width: of the picture, pixels.
        height: of the picture, pixels.

    Returns:
        float32 (height, width), bilinear as in `resize_map`; NaN where the network did not look.
    """
    values = values[:, ::-1] if flip else values
    x, y, across, down = window
    rows, is_row_seen = _bilinear_weights(values.shape[0], y, down, height)
    columns, is_column_seen = _bilinear_weights(values.shape[1], x, across, width)
    placed = (rows @ values @ columns.T).astype(np.float32)  # (height, width)
    placed[~(is_row_seen[:, None] & is_column_seen)] = np.nan
    return placed


@lru_cache(maxsize=64)
def _bilinear_weights(
    num_cells: int, start: float, length: float, num_pixels: int
) -> tuple[np.ndarray, np.ndarray]:
    """((num_pixels, num_cells), bool (num_pixels,)): each pixel's share of the cells that lie evenly between start
    and start + length, and whether its middle lies there."""
    inside = (np.arange(num_pixels) + 0.5 - start) / length
    position = np.clip(inside * num_cells - 0.5, 0, num_cells - 1)
    below = np.floor(position).astype(int)
    weights = np.zeros((num_pixels, num_cells))
    np.add.at(weights, (np.arange(num_pixels), below), 1 - (position - below))
    np.add.at(weights, (np.arange(num_pixels), np.minimum(below + 1, num_cells - 1)), position - below)
    return weights, (inside >= 0) & (inside < 1)


def overlay_seen(picture: np.ndarray, values: np.ndarray) -> np.ndarray:
    """As `overlay`, for a map as `place_map` gives it: where it is NaN the picture is dark and in its colors.

    picture: uint8 (H, W, 3); values: (H, W) in [0, 1] or NaN. Returns uint8 (H, W, 3).
    """
    dimmed = (np.arange(256) * UNSEEN_BRIGHTNESS).astype(np.uint8)[picture]
    is_seen = np.isfinite(values)
    rows, columns = np.flatnonzero(is_seen.any(axis=1)), np.flatnonzero(is_seen.any(axis=0))
    if len(rows):
        part = slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)
        seen = is_seen[part][..., None]
        laid_over = overlay(picture[part], np.where(is_seen[part], values[part], 0))
        dimmed[part] = np.where(seen, laid_over, dimmed[part])
    return dimmed


def crop_frames(frames: np.ndarray, crop: Crop, size: int) -> np.ndarray:
    """The square that the network was given, cut from frames at full size and scaled to size x size.

    frames: uint8 (T, frame_height, frame_width, 3). Returns uint8 (T, size, size, 3).
    """
    to_frame_x, to_frame_y = frames.shape[2] / crop.scaled_width, frames.shape[1] / crop.scaled_height
    box = (
        crop.crop_left * to_frame_x,
        crop.crop_top * to_frame_y,
        min((crop.crop_left + crop.crop_size) * to_frame_x, frames.shape[2]),
        min((crop.crop_top + crop.crop_size) * to_frame_y, frames.shape[1]),
    )
    squares = [
        np.asarray(Image.fromarray(frame).resize((size, size), Image.Resampling.BICUBIC, box=box))
        for frame in frames
    ]
    result = np.stack(squares)
    return result[:, :, ::-1] if crop.flip else result


def draw_boxes(
    picture: np.ndarray, sounding: np.ndarray | None, silent: Sequence[np.ndarray], scale: float
) -> np.ndarray:
    """The picture with the sounding object outlined in turquoise and the silent ones in white dashes.

    picture: uint8 (H, W, 3); boxes: (4,) in crop pixels; scale: picture pixels per crop pixel.
    """
    image = Image.fromarray(np.ascontiguousarray(picture))
    draw = ImageDraw.Draw(image)
    for box in silent:
        _dashed(draw, [round(float(edge) * scale) for edge in box])
    if sounding is not None:
        x0, y0, x1, y1 = (round(float(edge) * scale) for edge in sounding)
        draw.rectangle((x0 - 1, y0 - 1, x1 + 1, y1 + 1), outline=(0, 0, 0), width=1)
        draw.rectangle((x0, y0, x1, y1), outline=SOUNDING_COLOR, width=2)
    return np.asarray(image)


def _dashed(draw: ImageDraw.ImageDraw, box: Sequence[int], dash: int = 5) -> None:
    x0, y0, x1, y1 = box
    for x in range(x0, x1, 2 * dash):
        for y in (y0, y1):
            draw.line((x, y, min(x + dash, x1), y), fill=SILENT_COLOR)
    for y in range(y0, y1, 2 * dash):
        for x in (x0, x1):
            draw.line((x, y, x, min(y + dash, y1)), fill=SILENT_COLOR)


def log_mel_limits(log_mel: np.ndarray) -> tuple[float, float]:
    """What of a log-mel is shown black and what white."""
    low, high = np.percentile(log_mel, [5, 99.5])
    return float(low), float(high)


def log_mel_picture(
    log_mel: np.ndarray, width: int, height: int, limits: tuple[float, float] | None = None
) -> np.ndarray:
    """The log-mel in grey, low frequencies at the bottom: (F, S) -> uint8 (height, width, 3).

    limits: what is black and what white; None: `log_mel_limits` of what is shown.
    """
    low, high = limits or log_mel_limits(log_mel)
    values = np.clip((log_mel - low) / max(high - low, 1e-6), 0, 1)
    grey = resize_map(values[::-1], width, height)
    return np.repeat((np.clip(grey, 0, 1) * 255).astype(np.uint8)[..., None], 3, axis=2)


def draw_bands(picture: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """The picture with a turquoise bar at its left edge along the frequency bands of the sounding timbre.

    picture: uint8 (H, W, 3), low frequencies at the bottom; rows: bool (F,), lowest first.
    """
    picture = picture.copy()
    height = len(picture)
    marked = rows[::-1][np.minimum(np.arange(height) * len(rows) // height, len(rows) - 1)]
    picture[marked, :4] = SOUNDING_COLOR
    return picture


def encode_png(picture: np.ndarray) -> bytes:
    """PNG file of uint8 (H, W, 3)."""
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(picture)).save(buffer, format="PNG")
    return buffer.getvalue()


def encode_jpeg(picture: np.ndarray, quality: int = 88) -> bytes:
    """JPEG file of uint8 (H, W, 3)."""
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(picture)).save(buffer, format="JPEG", quality=quality, subsampling=0)
    return buffer.getvalue()


def data_uri(content: bytes, media_type: str) -> str:
    """`data:` address that holds the content itself, so that a page needs nothing else."""
    return f"data:{media_type};base64,{base64.b64encode(content).decode('ascii')}"


def compose_grid(
    tiles: Sequence[Sequence[np.ndarray]],
    row_names: Sequence[str],
    columns: Sequence[str],
    title: str = "",
    left: int = 110,
) -> np.ndarray:
    """One picture of all tiles with names at the left and above: uint8 (H, W, 3), white background.

    Args:
        tiles: rows of uint8 (height, width, 3), all tiles of a row of one size, all rows as long as `columns`.
        row_names: may have several lines.
        columns: may have two lines.
        title: one line above everything; empty: none.
        left: room for the names of the rows, pixels.
    """
    if not tiles or any(len(row) != len(columns) for row in tiles) or len(row_names) != len(tiles):
        raise ValueError(
            f"{len(tiles)} rows, {len(row_names)} names, {len(columns)} columns: expected a full grid"
        )
    gap, top, title_height = 6, 46, 30 if title else 0
    font = ImageFont.load_default(size=14)
    width = left + sum(tile.shape[1] + gap for tile in tiles[0])
    top += title_height
    height = top + sum(row[0].shape[0] + gap for row in tiles)
    image = Image.new("RGB", (width, height), (255, 255, 255))
    draw = ImageDraw.Draw(image)
    if title:
        draw.text((6, 8), title, fill=(0, 0, 0), font=ImageFont.load_default(size=17))
    x = left
    for tile, name in zip(tiles[0], columns, strict=True):
        draw.multiline_text((x + 2, 6 + title_height), name, fill=(40, 40, 40), font=font)
        x += tile.shape[1] + gap
    y = top
    for row, name in zip(tiles, row_names, strict=True):
        draw.multiline_text(
            (6, y + row[0].shape[0] / 2 - 10 - 8 * name.count("\n")), name, fill=(40, 40, 40), font=font
        )
        x = left
        for tile in row:
            image.paste(Image.fromarray(np.ascontiguousarray(tile)), (x, y))
            x += tile.shape[1] + gap
        y += row[0].shape[0] + gap
    return np.asarray(image)
