"""From a box in the source video to the pixels that the network was given.

A source pixel passes through three steps, and so does a box: slicing keeps the region `ClipInfo.source_crop`
and scales it to `frame_width` x `frame_height`; decoding scales the short side to `VideoConfig.short_side`;
augmentation cuts a square of `crop_size` and may mirror it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import numpy as np

if TYPE_CHECKING:  # ClipInfo reaches this package inside a ClipBatch; nothing of it is needed at run time
    from cmac.evaluation.truth import TruthObject
    from shards.schema import ClipInfo

FRAMES_PER_CLIP = 32
FPS = 32


class Crop(Protocol):
    """The part of `ClipAugmentation` that moves pixels, in pixels of the scaled frame."""

    scaled_width: int
    scaled_height: int
    crop_left: int
    crop_top: int
    crop_size: int
    flip: bool


def map_boxes_to_crop(boxes: np.ndarray, info: ClipInfo, crop: Crop) -> np.ndarray:
    """Boxes in pixels of the network's input, not clipped to it.

    Args:
        boxes: float (..., 4), x0, y0, x1, y1 in pixels of the display-oriented source frame, as edges: the
            box of the single pixel in column 3 reaches from x0 = 3 to x1 = 4.
        info: the clip's `ClipInfo`.
        crop: the clip's `ClipAugmentation`.

    Returns:
        float64 (..., 4), edges again; a box that lies outside the crop has edges below 0 or above crop_size.
    """
    left, top, width, height = info.source_crop
    boxes = np.asarray(boxes, dtype=np.float64)
    xs = (boxes[..., 0::2] - left) * (crop.scaled_width / width) - crop.crop_left
    ys = (boxes[..., 1::2] - top) * (crop.scaled_height / height) - crop.crop_top
    if crop.flip:
        xs = crop.crop_size - xs[..., ::-1]
    return np.stack([xs[..., 0], ys[..., 0], xs[..., 1], ys[..., 1]], axis=-1)


def object_boxes_in_clip(item: TruthObject, source_fps: float, start_seconds: float) -> np.ndarray:
    """The object's box in each of the clip's frames: float64 (32, 4), source pixels.

    The clip's frame j shows the source frame that is on screen at the middle of frame j:
    start_seconds + (j + 0.5) / 32.
    """
    times = start_seconds + (np.arange(FRAMES_PER_CLIP) + 0.5) / FPS
    frames = np.clip(np.floor(times * source_fps).astype(int), 0, len(item.boxes) - 1)
    return item.boxes[frames]


def boxes_per_step(boxes: np.ndarray, num_steps: int) -> np.ndarray:
    """Mean box over the frames that each of a map's steps covers: (32, 4) -> (num_steps, 4)."""
    steps = np.arange(len(boxes)) * num_steps // len(boxes)
    return np.stack([boxes[steps == step].mean(axis=0) for step in range(num_steps)])


def visible_share(boxes: np.ndarray, crop_size: int) -> float:
    """Mean share of the boxes' area that lies inside the crop, 0..1; boxes: (..., 4) in crop pixels."""
    inside = np.clip(boxes, 0, crop_size)
    area = (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])
    kept = (inside[..., 2] - inside[..., 0]) * (inside[..., 3] - inside[..., 1])
    return float(np.mean(np.divide(kept, area, out=np.zeros_like(area), where=area > 0)))
