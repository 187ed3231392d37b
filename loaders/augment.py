"""What is done to a clip, drawn from (seed, epoch, key) alone.

The draws are plain numbers in a ClipAugmentation, apart from the code that applies them, so that every
backend can be fed the same ones. Each kind of augmentation has a random stream of its own: switching one on
or off, or changing its parameters, leaves the others as they were.
"""

import hashlib
import math
import struct
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from loaders.config import AudioConfig, VideoConfig

if TYPE_CHECKING:
    from shards.schema import ClipInfo

WORDS_PER_BLOCK = 8
LONGEST_SIDE = 4096  # pixels, of a scaled frame: what a damaged key.json says must not be allocated
COLOR_OPERATIONS = ("brightness", "contrast", "saturation")


@dataclass(frozen=True, kw_only=True)
class ClipAugmentation:
    """What was done to one clip. Pixels are those of the scaled frame (before the crop), steps and bins those
    of log_mel."""

    scaled_height: int
    """Height of the scaled frame the crop was cut from, pixels."""
    scaled_width: int
    """Width of the scaled frame, pixels."""
    crop_top: int
    """First row of the crop."""
    crop_left: int
    """First column of the crop."""
    crop_size: int
    """Side of the square crop, pixels."""
    flip: bool = False
    """Whether the crop was then mirrored left to right."""
    color_order: tuple[str, ...] = ()
    """Order in which brightness, contrast and saturation were changed; empty: colors untouched."""
    brightness: float = 1.0
    """Brightness factor."""
    contrast: float = 1.0
    """Contrast factor."""
    saturation: float = 1.0
    """Saturation factor."""
    warp_center: int = 0
    """Time warp: the step that moves."""
    warp_shift: int = 0
    """Time warp: by how many steps (0: no warp)."""
    frequency_masks: tuple[tuple[int, int], ...] = ()
    """(first bin, number of bins) of each frequency mask."""
    time_masks: tuple[tuple[int, int], ...] = ()
    """(first step, number of steps) of each time mask; applied after the warp."""


def random_stream(*parts: object) -> np.random.Philox:
    """Philox generator keyed by blake2b of the parts: equal parts give equal numbers on every machine."""
    text = "\0".join(str(part) for part in parts).encode("utf-8", "surrogateescape")
    return np.random.Philox(key=int.from_bytes(hashlib.blake2b(text, digest_size=16).digest(), "little"))


def random_permutation(count: int, stream: np.random.Philox) -> np.ndarray:
    """int64 (count,): the numbers 0 .. count-1 in random order.

    Built from the raw 64-bit stream, which numpy never changes; Generator.permutation may differ between its
    releases.
    """
    return np.argsort(stream.random_raw(count), kind="stable").astype(np.int64)


class _Draw:
    """Numbers of one named stream of a clip: 64-bit words of blake2b, which costs a tenth of a generator."""

    def __init__(self, *parts: object) -> None:
        text = "\0".join(str(part) for part in parts)
        self._text = text.encode("utf-8", "surrogateescape")
        self._words = self._block(0)
        self._count = 0

    def uniform(self, low: float = 0.0, high: float = 1.0) -> float:
        """A number in [low, high), from the 53 top bits of one word."""
        block, index = divmod(self._count, WORDS_PER_BLOCK)
        if index == 0 and block > 0:
            self._words = self._block(block)
        self._count += 1
        return low + (high - low) * ((self._words[index] >> 11) * 2.0**-53)

    def integer(self, low: int, high: int) -> int:
        """A whole number in low .. high, both included."""
        return low + int(self.uniform() * (high - low + 1))

    def _block(self, block: int) -> tuple[int, ...]:
        digest = hashlib.blake2b(self._text, salt=block.to_bytes(8, "little")).digest()
        return struct.unpack("<8Q", digest)


def scaled_size(width: int, height: int, short_side: int) -> tuple[int, int]:
    """(width, height) after scaling so that the shorter side is short_side pixels; the longer is rounded."""
    if width <= height:
        return short_side, max(short_side, round(height * short_side / width))
    return max(short_side, round(width * short_side / height)), short_side


def yuv_window_size(crop_size: int) -> int:
    """Side of the part of a 4:2:0 frame that holds a crop and starts at an even row and column: even."""
    return crop_size // 2 * 2 + 2


def crop_in_source(clip: "ClipInfo", augmentation: ClipAugmentation) -> tuple[float, float, float, float]:
    """(x, y, width, height) of a clip's crop in pixels of its source video, display orientation.

    With augmentation.flip the crop was mirrored: its column c came from column crop_size - 1 - c of this
    window.
    """
    x, y, width, height = clip.source_crop
    across, down = width / augmentation.scaled_width, height / augmentation.scaled_height
    return (
        x + augmentation.crop_left * across,
        y + augmentation.crop_top * down,
        augmentation.crop_size * across,
        augmentation.crop_size * down,
    )


def draw_augmentation(
    video: VideoConfig,
    audio: AudioConfig,
    seed: int,
    epoch: int,
    key: str,
    height: int,
    width: int,
    num_steps: int,
) -> ClipAugmentation:
    """What is done to the clip `key` in `epoch`: a function of (seed, epoch, key) and of the configuration.

    Args:
        video: crop, flip and color settings; with augment=False the center crop and nothing else.
        audio: warp and mask settings; with augment=False there are none.
        seed: LoaderConfig.seed.
        epoch: epoch number.
        key: the clip's key.
        height: of the scaled frame, pixels; at least video.crop_size.
        width: of the scaled frame, pixels; at least video.crop_size.
        num_steps: S, steps of the clip's log-mel.
    """
    assert min(height, width) >= video.crop_size, f"crop {video.crop_size} of a {width}x{height} frame"
    fields: dict[str, object] = {}

    room_y, room_x = height - video.crop_size, width - video.crop_size
    fields["crop_top"], fields["crop_left"] = room_y // 2, room_x // 2
    if video.augment:
        draw = _Draw(seed, epoch, key, "crop")
        fields["crop_top"], fields["crop_left"] = draw.integer(0, room_y), draw.integer(0, room_x)
        fields["flip"] = _Draw(seed, epoch, key, "flip").uniform() < video.flip_probability
    if video.augment and video.color_jitter:
        draw = _Draw(seed, epoch, key, "color")
        for name in COLOR_OPERATIONS:
            strength = getattr(video, name)
            fields[name] = draw.uniform(1 - strength, 1 + strength)
        remaining = list(COLOR_OPERATIONS)
        picks = (draw.integer(0, len(remaining) - 1) for _ in COLOR_OPERATIONS)
        fields["color_order"] = tuple(remaining.pop(pick) for pick in picks)

    if audio.augment:
        reach = audio.time_warp_steps
        if reach > 0:
            # Choice: before and after, the step is at least one away from both ends: no segment vanishes.
            draw = _Draw(seed, epoch, key, "time-warp")
            fields["warp_center"] = draw.integer(reach + 1, num_steps - 2 - reach)
            fields["warp_shift"] = draw.integer(-reach, reach)
        fields["frequency_masks"] = _draw_masks(
            _Draw(seed, epoch, key, "frequency-mask"),
            audio.num_frequency_masks,
            audio.frequency_mask_bins,
            audio.num_mel_bins,
        )
        fields["time_masks"] = _draw_masks(
            _Draw(seed, epoch, key, "time-mask"), audio.num_time_masks, audio.time_mask_steps, num_steps
        )
    return ClipAugmentation(scaled_height=height, scaled_width=width, crop_size=video.crop_size, **fields)


def draw_resized_crop(
    augmentation: ClipAugmentation,
    area: tuple[float, float],
    seed: int,
    epoch: int,
    key: str,
    height: int,
    width: int,
) -> ClipAugmentation:
    """augmentation with a random resized crop in place of its crop: a window of random area and aspect, stretched
    to the square (GDT's fine-tuning; torchvision's RandomResizedCrop).

    Scaling the window to the square and scaling the frame so that the window becomes the square are the same
    thing, so the result is a crop of a scaled frame as any other, only without the frame's aspect.

    Args:
        augmentation: drawn for the same clip; what else is done to it stays.
        area: least and largest share of the frame; the aspect is log-uniform in 3/4 .. 4/3.
        seed: LoaderConfig.seed.
        epoch: epoch number.
        key: the clip's key.
        height: of the frame, pixels.
        width: of the frame, pixels.
    """
    draw = _Draw(seed, epoch, key, "resized-crop")
    size = augmentation.crop_size
    # As torchvision: a window that does not fit is drawn again, ten times; then the largest one that does.
    for _ in range(10):
        target = draw.uniform(*area) * width * height
        ratio = math.exp(draw.uniform(math.log(3 / 4), math.log(4 / 3)))
        across, down = round(math.sqrt(target * ratio)), round(math.sqrt(target / ratio))
        if 0 < across <= width and 0 < down <= height:
            left, top = draw.integer(0, width - across), draw.integer(0, height - down)
            break
    else:
        across, down = min(width, round(height * 4 / 3)), min(height, round(width * 4 / 3))
        left, top = (width - across) // 2, (height - down) // 2
    scaled_width, scaled_height = (
        max(size, round(width * size / across)),
        max(size, round(height * size / down)),
    )
    return replace(
        augmentation,
        scaled_width=scaled_width,
        scaled_height=scaled_height,
        crop_left=min(round(left * size / across), scaled_width - size),
        crop_top=min(round(top * size / down), scaled_height - size),
    )


def happens(probability: float, *parts: object) -> bool:
    """A draw from the parts (seed, epoch, key, name): true with this probability."""
    return _Draw(*parts).uniform() < probability


def _draw_masks(draw: _Draw, count: int, widest: int, length: int) -> tuple[tuple[int, int], ...]:
    """count masks as (start, width): width uniform in 0 .. widest-1, start uniform where the mask fits."""
    masks = []
    for _ in range(count):
        width = draw.integer(0, widest - 1)
        masks.append((draw.integer(0, length - width), width))
    return tuple(masks)
