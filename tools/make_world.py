"""Generate a small world of sounding objects: videos with known answers to "what sounds, and where?".

    python tools/make_world.py --out runs/demo/world --train-videos 600 --test-videos 384

writes `OUT/train/*.mp4` and `OUT/test/*.mp4` (H.264 + AAC), each with a JSON of the same stem beside it.
Objects of 16 categories stand in front of busy backgrounds; each category has its look (hue, shape, core) and
its timbre (a few partials, its bands). One object sounds: it pulses, and so does its sound. The others are
silent:

* `easy` part (even indices): they stand still, so sight alone can tell which object sounds;
* `hard` part (odd indices): they pulse to a rhythm of their own. All that is seen is drawn before it is drawn
  which object sounds, from another random stream, so that sight alone cannot tell: only the sound can.

A few videos of each part are marked: `off-screen` (a category that is not shown sounds) and `silent` (only
soft noise). Everything in a video depends on (seed, split, index) alone, and on the length where one is asked
for (`--train-seconds`, `--test-seconds`). A second run keeps the finished videos of the first.
"""

from __future__ import annotations

import argparse
import colorsys
import dataclasses
import functools
import json
import math
import multiprocessing
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, Future, ProcessPoolExecutor, wait
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from av.video.reformatter import VideoReformatter

from shards.lock import take_lock
from shards.pool import usable_cores

WORLD_VERSION = 3
"""Raised whenever the same (seed, split, index) would give another video."""

SAMPLE_RATE = 24_000
"""Hz, mono."""

SPLITS = ("train", "test")

OFF_SCREEN_SHARE = 0.05
SILENT_SHARE = 0.05
THREE_OBJECTS_SHARE = 0.2

CENTRAL_SIDE = 0.86
"""Objects stay inside the central square of this share of the short side: a 128/144 center crop shows all."""

FRAME_SIZES = {  # (width, height): share of the videos
    (144, 144): 0.60,
    (176, 144): 0.24,
    (192, 144): 0.04,
    (256, 144): 0.03,
    (144, 192): 0.03,
    (320, 240): 0.03,
    (240, 320): 0.03,
}
"""Choice: most are near square, so that a random 128x128 crop of a training frame seldom cuts objects off."""

FRAME_RATES = {  # frames per second: share of the videos
    Fraction(15): 0.25,
    Fraction(24): 0.2,
    Fraction(25): 0.25,
    Fraction(30_000, 1001): 0.15,
    Fraction(30): 0.15,
}

MIN_SECONDS, MAX_SECONDS = 4.0, 10.0


# ----------------------------------------------------------------------------------------------------
# Categories: how they look and how they sound
# ----------------------------------------------------------------------------------------------------

_HUE_NAMES = (
    "red", "vermilion", "orange", "yellow", "lime", "grass", "green", "emerald",
    "cyan", "azure", "cobalt", "blue", "indigo", "violet", "magenta", "rose",
)  # fmt: skip


_Gauge = Callable[[np.ndarray, np.ndarray], np.ndarray]


def _polygon_gauge(num_sides: int, apothem: float, start: float) -> _Gauge:
    angles = start + 2 * math.pi * np.arange(num_sides) / num_sides

    def gauge(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        return functools.reduce(np.maximum, [math.cos(a) * x + math.sin(a) * y for a in angles]) / apothem

    return gauge


def _star_gauge(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    outer, inner, sector = 1.25, 0.62, math.pi / 5
    tip = np.array([outer, 0.0])
    notch = np.array([inner * math.cos(sector), inner * math.sin(sector)])
    normal = np.array([notch[1] - tip[1], tip[0] - notch[0]])
    radius, angle = np.hypot(x, y), np.arctan2(y, x) + math.pi / 2  # a tip points up
    folded = np.abs((angle + sector) % (2 * sector) - sector)
    return radius * (normal[0] * np.cos(folded) + normal[1] * np.sin(folded)) / (normal @ tip)


def _plus_gauge(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    x, y = np.abs(x), np.abs(y)
    return np.minimum(np.maximum(x / 1.05, y / 0.45), np.maximum(x / 0.45, y / 1.05))


# A gauge grows linearly from 0 in the center through 1 on the outline: {gauge <= r} is the shape at size r.
_GAUGES: dict[str, _Gauge] = {
    "disc": np.hypot,
    "square": lambda x, y: np.maximum(np.abs(x), np.abs(y)) / 0.88,
    "triangle": _polygon_gauge(3, 0.64, math.pi / 2),
    "star": _star_gauge,
    "ring": np.hypot,
    "diamond": lambda x, y: (np.abs(x) + np.abs(y)) / 1.2,
    "plus": _plus_gauge,
    "hexagon": _polygon_gauge(6, 0.92, 0.0),
}
# Size of the core beside that of the outline.
_CORES = {"ring": 0.62, "star": 0.35, "triangle": 0.38, "plus": 0.36}
_OTHER_CORE = 0.45


@functools.cache
def _extent(shape: str) -> tuple[float, float, float, float]:
    """Return how far the shape of size 1 reaches to the left, top, right and bottom of its centre."""
    axis = np.linspace(-1.5, 1.5, 601)
    inside = _GAUGES[shape](axis[None, :], axis[:, None]) <= 1
    columns, rows = axis[inside.any(0)], axis[inside.any(1)]
    return -columns[0], -rows[0], columns[-1], rows[-1]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Category:
    """What the objects of one category share."""

    name: str
    """Hue and shape, such as `red-disc`."""
    hue: float
    """In [0, 1)."""
    shape: str
    core_color: tuple[int, int, int]
    """RGB of the core, the second color."""
    partials: tuple[tuple[float, float], ...]
    """(frequency in Hz, amplitude beside the first) of the timbre; all under 11 kHz."""

    @property
    def bands_hz(self) -> tuple[tuple[float, float], ...]:
        """The [low, high] band around each partial that holds its energy, vibrato and detuning included."""
        return tuple((round(0.96 * f - 40, 1), round(1.04 * f + 40, 1)) for f, _ in self.partials)


def _build_categories() -> tuple[Category, ...]:
    """Return the 16 categories; first partials evenly spaced over the mel axis, 298 Hz to 5.7 kHz."""
    num = len(_HUE_NAMES)
    shapes = list(_GAUGES)
    ratios = ((1.0, 2.0), (1.0, 3.0), (1.0, 1.5), (1.0, 2.0, 3.0))
    categories = []
    for k, hue_name in enumerate(_HUE_NAMES):
        first = 700 * (10 ** ((400 + k * 2100 / (num - 1)) / 2595) - 1)  # mel (HTK) to Hz
        kept = [ratio for ratio in ratios[k % 4] if ratio * first < 10_500]
        if len(kept) == 1:
            kept.append(1.5)
        shape = shapes[k % len(shapes)]
        categories.append(
            Category(
                name=f"{hue_name}-{shape}",
                hue=k / num,
                shape=shape,
                core_color=(244, 244, 240) if (k + k // 8) % 2 == 0 else (16, 16, 24),
                partials=tuple((first * ratio, amplitude) for ratio, amplitude in zip(kept, (1.0, 0.5, 0.3))),
            )
        )
    return tuple(categories)


CATEGORIES = _build_categories()


# ----------------------------------------------------------------------------------------------------
# Rhythms
# ----------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Rhythm:
    """Beats at 1 to 3.2 per second; rate and height of the beats vary, so that no second is like another."""

    rate: float
    phase: float
    depth: float
    drift_rate: float
    drift_phase: float
    sharpness: float
    heights: np.ndarray

    def envelope(self, seconds: np.ndarray) -> np.ndarray:
        """Return the envelope in [0, 1] at these times; 0 between two beats, continuous."""
        wander = 2 * math.pi * self.drift_rate
        swing = np.cos(wander * seconds + self.drift_phase) - math.cos(self.drift_phase)
        turns = self.phase + self.rate * (seconds - self.depth / wander * swing)
        beat = np.floor(turns).astype(np.int64) % len(self.heights)
        return self.heights[beat] * (0.5 - 0.5 * np.cos(2 * math.pi * turns)) ** self.sharpness


def _draw_rhythms(rng: np.random.Generator, num: int) -> list[_Rhythm]:
    """Return `num` rhythms, exchangeable, their rates at least 0.2 Hz apart."""
    while True:
        rates = rng.uniform(1.2, 2.8, num)
        if num < 2 or np.diff(np.sort(rates)).min() >= 0.2:
            break
    return [
        _Rhythm(
            rate=float(rate),
            phase=float(rng.uniform(0, 1)),
            depth=float(rng.uniform(0.05, 0.15)),
            drift_rate=float(rng.uniform(0.1, 0.4)),
            drift_phase=float(rng.uniform(0, 2 * math.pi)),
            sharpness=float(rng.uniform(0.8, 1.5)),
            heights=rng.uniform(0.7, 1.0, 64),
        )
        for rate in rates
    ]


# ----------------------------------------------------------------------------------------------------
# One video
# ----------------------------------------------------------------------------------------------------


@functools.cache
def _pixel_noise_bank(level: int) -> np.ndarray:
    """Return 2^20 values of standard deviation `level` in [-7, 7], as uint8 modulo 256.

    Added to pixels in [7, 248] they never wrap: no clipping is needed.
    """
    values = np.random.default_rng(20_260_101 + level).standard_normal(1 << 20, dtype=np.float32)
    return np.clip(np.rint(values * level), -7, 7).astype(np.int8).view(np.uint8)


@functools.cache
def _sound_noise_bank(pink: bool) -> np.ndarray:
    """Return 2^19 float32 samples of white or pink noise, RMS 1."""
    noise = np.random.default_rng(20_260_201).standard_normal(1 << 19, dtype=np.float32)
    if pink:
        spectrum = np.fft.rfft(noise)
        frequency = np.fft.rfftfreq(len(noise), 1 / SAMPLE_RATE)
        noise = np.fft.irfft(spectrum / np.sqrt(np.maximum(frequency, 20.0))).astype(np.float32)
    return noise / np.sqrt(np.mean(noise**2))


def _stretch(grid: np.ndarray, height: int, width: int) -> np.ndarray:
    """Return `grid` (h, w, C) stretched to (height, width, C), bilinear, float32."""

    def weights(num_in: int, num_out: int) -> np.ndarray:
        position = np.linspace(0, num_in - 1, num_out)
        return np.maximum(0, 1 - np.abs(position[:, None] - np.arange(num_in)[None])).astype(np.float32)

    rows = np.tensordot(weights(grid.shape[0], height), grid.astype(np.float32), (1, 0))  # (height, w, C)
    return np.tensordot(weights(grid.shape[1], width), rows, (1, 1)).transpose(1, 0, 2)  # (height, width, C)


def _draw_background(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Return color fields, panels, gratings and speckle: uint8 (height, width, 3) in [16, 190]."""
    fields = rng.integers(3, 8)
    image = 30 + 110 * _stretch(rng.random((fields, fields + 1, 3)), height, width)
    image = image.mean(2, keepdims=True) + 0.75 * (image - image.mean(2, keepdims=True))
    y, x = np.arange(height, dtype=np.float32)[:, None], np.arange(width, dtype=np.float32)[None, :]
    short = min(height, width)
    for _ in range(rng.integers(4, 10)):  # panels
        top, left = rng.uniform(-0.1, 1, 2) * (height, width)
        bottom, right = (top, left) + rng.uniform(0.06, 0.5, 2) * short
        rows, columns = slice(max(int(top), 0), int(bottom) + 1), slice(max(int(left), 0), int(right) + 1)
        image[rows, columns] += rng.uniform(-40, 40) + rng.uniform(-15, 15, 3)
    for _ in range(2):  # gratings, each fading in and out over the frame
        angle, period = rng.uniform(0, math.pi), rng.uniform(0.04, 0.2) * short
        along = math.cos(angle) * x + math.sin(angle) * y
        wave = np.sin(2 * math.pi * (along / period + rng.random()))
        fade = _stretch(rng.random((3, 3, 1)), height, width)
        image += rng.uniform(6, 24) * fade * wave[..., None]
    cells = max(int(short / rng.uniform(3, 9)), 4)
    image += rng.uniform(8, 24) * (_stretch(rng.random((cells, cells, 1)), height, width) - 0.5)
    return np.clip(image, 16, 190).astype(np.uint8)


@dataclasses.dataclass(kw_only=True)
class _Object:
    category: Category
    radius: float
    """Size at the height of a full beat, pixels."""
    rest: float
    """Size between two beats beside `radius`."""
    bounce: tuple[float, float]
    """Shift (x, y) at the height of a full beat, pixels."""
    color: tuple[int, int, int]
    rhythm: _Rhythm
    still_at: float
    """Where on its beat an object that stands still stands."""
    center: tuple[float, float] = (0.0, 0.0)

    def spread(self) -> tuple[float, float, float, float]:
        """Return how far the object ever reaches to the left, top, right and bottom of its center, pixels."""
        left, top, right, bottom = (self.radius * side for side in _extent(self.category.shape))
        dx, dy = self.bounce
        return left + max(-dx, 0), top + max(-dy, 0), right + max(dx, 0), bottom + max(dy, 0)


def _place(rng: np.random.Generator, objects: list[_Object], middle: np.ndarray, half_side: float) -> None:
    """Set the centers: in the central square, no box ever touching another; all shrink alike if need be."""
    while True:
        spread = np.array([o.spread() for o in objects])
        low, high = -half_side + spread[:, :2], half_side - spread[:, 2:]  # of the centers
        for _ in range(200 if (low < high).all() else 0):
            centers = rng.uniform(low, high)
            apart = True
            for i in range(len(objects)):
                for j in range(i):
                    gap = centers[i] - centers[j]
                    after = gap - spread[i, :2] - spread[j, 2:]  # pixels between their boxes in x and y
                    before = -gap - spread[j, :2] - spread[i, 2:]
                    apart &= max(after.max(), before.max()) >= 3
            if apart:
                for o, c in zip(objects, centers + middle):
                    o.center = (float(c[0]), float(c[1]))
                return
        for o in objects:
            o.radius *= 0.95
            o.bounce = (0.9 * o.bounce[0], 0.9 * o.bounce[1])


def _choose(rng: np.random.Generator, shares: dict) -> object:
    values = list(shares)
    return values[int(np.searchsorted(np.cumsum(list(shares.values())), rng.random() * sum(shares.values())))]


class _Scene:
    """One video, drawn but not yet rendered."""

    def __init__(self, seed: int, split: str, index: int, seconds: float | None = None) -> None:
        if split not in SPLITS:
            raise ValueError(f"split is {split!r}, expected one of {', '.join(SPLITS)}")
        if seed < 0 or index < 0:
            raise ValueError(f"seed is {seed} and index {index}, expected both at least 0")
        if seconds is not None and not 1 <= seconds <= 20:
            raise ValueError(f"seconds is {seconds}, expected 1 to 20, or None (random, 4 to 10)")
        # What is seen and what is heard have streams of their own: nothing seen can depend on what sounds.
        streams = np.random.SeedSequence([WORLD_VERSION, seed, SPLITS.index(split), index]).spawn(6)
        form, seen, heard = (np.random.default_rng(stream) for stream in streams[:3])
        self._background_seed, self._noise_seed, self._wave_seed = streams[3:]

        self.part = "easy" if index % 2 == 0 else "hard"
        self.width, self.height = _choose(form, FRAME_SIZES)
        self.fps: Fraction = _choose(form, FRAME_RATES)
        drawn = min(MIN_SECONDS + form.geometric(0.55) - 1, MAX_SECONDS - 0.5) + form.uniform(0, 0.4)
        self.num_frames = math.ceil((seconds or drawn) * self.fps - 0.01)
        self.num_samples = round(self.num_frames / self.fps * SAMPLE_RATE)
        self.times = np.arange(self.num_frames) / float(self.fps)

        # Seen: everything but which object sounds.
        short = min(self.width, self.height)
        num_objects = 3 if seen.random() < THREE_OBJECTS_SHARE else 2
        chosen = [CATEGORIES[k] for k in seen.permutation(len(CATEGORIES))[: num_objects + 1]]
        rhythms = _draw_rhythms(seen, num_objects + 1)
        largest = (0.18, 0.215) if num_objects == 2 else (0.145, 0.17)
        self.objects = []
        for category, rhythm in zip(chosen[:-1], rhythms[:-1]):
            angle, swing = seen.uniform(0, 2 * math.pi), seen.uniform(0, 0.04) * short
            hue, saturation = (category.hue + seen.uniform(-0.008, 0.008)) % 1, seen.uniform(0.86, 0.94)
            value = seen.uniform(215, 245)
            self.objects.append(
                _Object(
                    category=category,
                    radius=float(seen.uniform(*largest) * short),
                    rest=float(seen.uniform(0.55, 0.65)),
                    bounce=(swing * math.cos(angle), swing * math.sin(angle)),
                    color=tuple(max(int(value * c), 10) for c in colorsys.hsv_to_rgb(hue, saturation, 1.0)),
                    rhythm=rhythm,
                    still_at=float(rhythm.envelope(seen.uniform(0, 4, 1))[0]),
                )
            )
        reach = seen.uniform(0.008, 0.022, 2) * short  # camera drift, pixels in x and y
        drift_rate, drift_phase = seen.uniform(0.06, 0.22, 2), seen.uniform(0, 2 * math.pi, 2)
        drift = reach * np.sin(2 * math.pi * drift_rate * self.times[:, None] + drift_phase)
        self.drift = np.rint(drift).astype(np.int64)  # (T, 2)
        self._margin = math.ceil(0.022 * short) + 1
        half_side = CENTRAL_SIDE / 2 * short - reach.max() - 1.5  # 1.5: rounding to pixels
        _place(seen, self.objects, np.array([self.width / 2, self.height / 2]), half_side)

        # Heard.
        lot = heard.random()
        self.sound = (
            "off-screen" if lot < OFF_SCREEN_SHARE
            else "silent" if lot < OFF_SCREEN_SHARE + SILENT_SHARE
            else "on-screen"
        )  # fmt: skip
        sounding = int(heard.integers(num_objects))
        self.sounding = sounding if self.sound == "on-screen" else None
        self.category = {"on-screen": chosen[sounding], "off-screen": chosen[-1], "silent": None}[self.sound]
        self.rhythm = rhythms[-1] if self.sound == "off-screen" else rhythms[sounding]
        self.moving = [self.part == "hard" or k == self.sounding for k in range(num_objects)]

        # Pixels: every object is drawn around an integer pixel, its size in steps of 1/4 pixel.
        self._radii, self._pixels = [], []
        for o, moving in zip(self.objects, self.moving):
            envelope = o.rhythm.envelope(self.times) if moving else np.full(self.num_frames, o.still_at)
            self._radii.append(np.rint(4 * o.radius * (o.rest + (1 - o.rest) * envelope)) / 4)
            shift = np.array(o.center) + envelope[:, None] * np.array(o.bounce)
            self._pixels.append(np.floor(shift).astype(np.int64) + self.drift)  # (T, 2)

    def boxes(self, k: int) -> np.ndarray:
        """Return the boxes of object k, float (T, 4): x0, y0, x1, y1; pixel i spans [i, i + 1)."""
        left, top, right, bottom = _extent(self.objects[k].category.shape)
        x, y = (self._pixels[k] + 0.5).T
        radius = self._radii[k]
        return np.stack([x - left * radius, y - top * radius, x + right * radius, y + bottom * radius], 1)

    def truth(self) -> dict:
        """Return the ground truth, ready for JSON."""
        return {
            "part": self.part,
            "sound": self.sound,
            "category": self.category.name if self.category else None,
            "bands_hz": [list(band) for band in self.category.bands_hz] if self.category else [],
            "fps": float(self.fps),
            "width": self.width,
            "height": self.height,
            "num_frames": self.num_frames,
            "seconds": float(self.num_frames / self.fps),
            "sample_rate": SAMPLE_RATE,
            "categories": [category.name for category in CATEGORIES],
            "objects": [
                {
                    "category": o.category.name,
                    "sounding": k == self.sounding,
                    "moving": self.moving[k],
                    "boxes": np.round(self.boxes(k), 2).tolist(),
                }
                for k, o in enumerate(self.objects)
            ],
        }

    def _patch(self, k: int, radius: float, gauge: np.ndarray) -> tuple[np.ndarray, np.ndarray, int, int]:
        """Return (transparency, paint, left, top) of object k at this size.

        A pixel becomes (pixel * transparency + paint) >> 8.
        transparency, paint: uint16 (height, width, 3); left, top: how far they reach from the center, pixels.
        """
        o = self.objects[k]
        left, top, right, bottom = (math.ceil(radius * side + 0.5) for side in _extent(o.category.shape))
        middle = len(gauge) // 2
        gauge = gauge[middle - top : middle + bottom + 1, middle - left : middle + right + 1, None]
        core_radius = radius * _CORES.get(o.category.shape, _OTHER_CORE)
        opacity = 256 * np.clip(radius + 0.5 - gauge, 0, 1)
        core_color, color = np.array([o.category.core_color, o.color], np.float32)
        paint = color + np.clip(core_radius + 0.5 - gauge, 0, 1) * (core_color - color)
        transparency = np.repeat((256.5 - opacity).astype(np.uint16), 3, axis=2)
        return transparency, (opacity * paint).astype(np.uint16), left, top

    def frames(self) -> Iterator[np.ndarray]:
        """Yield the frames one by one, uint8 (H, W, 3) RGB; a frame is overwritten by the next."""
        gauges = []
        for o in self.objects:
            half = math.ceil(o.radius * max(_extent(o.category.shape))) + 3
            axis = np.arange(-half, half + 1, dtype=np.float32)
            gauges.append(_GAUGES[o.category.shape](axis[None, :], axis[:, None]).astype(np.float32))
        patches: dict[tuple[int, float], tuple[np.ndarray, np.ndarray, int, int]] = {}
        frame = np.empty((self.height, self.width, 3), np.uint8)
        flat = frame.reshape(-1)
        margins = 2 * self._margin
        background_rng = np.random.default_rng(self._background_seed)
        background = _draw_background(background_rng, self.height + margins, self.width + margins)
        noise_rng = np.random.default_rng(self._noise_seed)
        bank = _pixel_noise_bank(int(noise_rng.integers(1, 4)))
        offsets = noise_rng.integers(0, len(bank) - frame.size, self.num_frames)
        for t in range(self.num_frames):
            x, y = self._margin - self.drift[t]
            frame[...] = background[y : y + self.height, x : x + self.width]
            for k, gauge in enumerate(gauges):
                radius = float(self._radii[k][t])
                if (k, radius) not in patches:
                    patches[k, radius] = self._patch(k, radius, gauge)
                transparency, paint, left, top = patches[k, radius]
                x, y = self._pixels[k][t] - (left, top)
                region = frame[y : y + paint.shape[0], x : x + paint.shape[1]]
                mixed = region * transparency
                mixed += paint
                mixed >>= 8
                region[...] = mixed
            flat += bank[offsets[t] : offsets[t] + frame.size]
            yield frame

    def waveform(self) -> np.ndarray:
        """Return the sound, float32 (samples,) mono within [-1, 1] at SAMPLE_RATE."""
        rng = np.random.default_rng(self._wave_seed)
        bank = _sound_noise_bank(bool(rng.integers(2)))
        offset = rng.integers(len(bank) - self.num_samples)
        noise_dbfs = rng.uniform(-53, -47) if self.category is None else rng.uniform(-56, -38)
        noise = bank[offset : offset + self.num_samples] * np.float32(10 ** (noise_dbfs / 20))
        if self.category is None:
            return noise
        seconds = np.arange(self.num_samples) / SAMPLE_RATE
        detune, vibrato, vibrato_rate = rng.uniform(0.99, 1.01), rng.uniform(0, 0.008), rng.uniform(4, 7)
        swing = vibrato / (2 * math.pi * vibrato_rate) * np.sin(2 * math.pi * vibrato_rate * seconds)
        turns = 2 * math.pi * detune * (seconds + swing)
        tone = sum(
            amplitude * rng.uniform(0.8, 1.2) * np.sin(frequency * turns + rng.uniform(0, 2 * math.pi))
            for frequency, amplitude in self.category.partials
        )
        coarse = np.arange(0, seconds[-1] + 0.002, 0.001)
        tone *= np.interp(seconds, coarse, self.rhythm.envelope(coarse))
        tone *= 10 ** (rng.uniform(-20, -12) / 20) / np.sqrt(np.mean(tone**2))
        tone *= min(1, 0.9 / np.abs(tone).max())
        return tone.astype(np.float32) + noise


def render_video(
    seed: int, split: str, index: int, seconds: float | None = None
) -> tuple[np.ndarray, np.ndarray, dict]:
    """Return (frames, waveform, truth) of one video, before any encoding.

    Args:
        seed: of the world, at least 0.
        split: `train` or `test`.
        index: of the video in its split, at least 0; even: easy part, odd: hard part.
        seconds: length, rounded up to whole frames; None draws it (4 to 10 s, mostly short).

    Returns:
        frames: uint8 (T, H, W, 3) RGB; frame t is shown at t / fps.
        waveform: float32 (samples,) mono at SAMPLE_RATE, within [-1, 1].
        truth: the ground truth as in the JSON (boxes in pixels of the frame; pixel i spans [i, i + 1)).

    Raises:
        ValueError: unknown split, negative seed or index, seconds outside 1 to 20.
    """
    scene = _Scene(seed, split, index, seconds)
    frames = np.empty((scene.num_frames, scene.height, scene.width, 3), np.uint8)
    for t, frame in enumerate(scene.frames()):
        frames[t] = frame
    return frames, scene.waveform(), scene.truth()


def draw_truth(seed: int, split: str, index: int, seconds: float | None = None) -> dict:
    """Return the truth of `render_video` alone; nothing is rendered."""
    return _Scene(seed, split, index, seconds).truth()


def video_stem(index: int) -> str:
    """Return the file name of video `index` without its suffix, such as `easy_000042`."""
    return f"{'easy' if index % 2 == 0 else 'hard'}_{index:06d}"


def _encode(scene: _Scene, path: Path) -> None:
    """Write the scene as H.264 + AAC mp4 to `path`; the same bytes for the same scene and FFmpeg libraries.

    Choice: the FFmpeg libraries within PyAV, not the binary: no process to start, no pipe to fill, about 40 %
    less time. The fast AAC coder takes half the time of the default one and is closer to its input here.
    """
    with av.open(str(path), "w", format="mp4", options={"fflags": "+bitexact"}) as container:
        video = container.add_stream("libx264", rate=scene.fps)
        video.width, video.height, video.pix_fmt = scene.width, scene.height, "yuv420p"
        video.options = {"preset": "ultrafast", "crf": "21", "flags": "+bitexact"}
        video.thread_count = 1
        audio_options = {"aac_coder": "fast", "flags": "+bitexact"}
        audio = container.add_stream("aac", rate=SAMPLE_RATE, layout="mono", options=audio_options)
        audio.bit_rate = 96_000
        reformatter = VideoReformatter()
        waveform = scene.waveform()[None]  # (1, samples)
        for start in range(0, waveform.shape[1], SAMPLE_RATE):
            chunk = np.ascontiguousarray(waveform[:, start : start + SAMPLE_RATE])
            samples = av.AudioFrame.from_ndarray(chunk, format="fltp", layout="mono")
            samples.sample_rate, samples.pts, samples.time_base = SAMPLE_RATE, start, Fraction(1, SAMPLE_RATE)
            container.mux(audio.encode(samples))
        container.mux(audio.encode())
        for t, pixels in enumerate(scene.frames()):
            rgb = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            picture = reformatter.reformat(rgb, format="yuv420p", threads=1)
            picture.pts, picture.time_base = t, 1 / scene.fps
            container.mux(video.encode(picture))
        container.mux(video.encode())


# ----------------------------------------------------------------------------------------------------
# A folder of videos
# ----------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class WorldSettings:
    """What the content of the videos depends on; kept in `OUT/world.json`."""

    seed: int = 0
    train_seconds: float | None = None
    """Length of the training videos; None draws it, 4 to 10 s."""
    test_seconds: float | None = 4.0
    """Length of the test videos; None draws it, 4 to 10 s."""
    version: int = WORLD_VERSION

    def __post_init__(self) -> None:
        if self.seed < 0:
            raise ValueError(f"seed is {self.seed}, expected at least 0")
        for name in ("train_seconds", "test_seconds"):
            value = getattr(self, name)
            if value is not None and not 1 <= value <= 20:
                raise ValueError(f"{name} is {value}, expected 1 to 20 (command line: 0 for random, 4 to 10)")


def _write_atomic(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.part")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def _identity(settings: WorldSettings, split: str, index: int) -> dict:
    seconds = settings.train_seconds if split == "train" else settings.test_seconds
    return {
        "version": settings.version,
        "seed": settings.seed,
        "split": split,
        "index": index,
        "fixed_seconds": None if seconds is None else float(seconds),
    }


def _is_finished(folder: Path, settings: WorldSettings, split: str, index: int) -> bool:
    """Return whether the video is there, whole and of these settings; the JSON is written last."""
    path = folder / f"{video_stem(index)}.mp4"
    try:
        truth = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        whole = truth["file_bytes"] == path.stat().st_size
        return whole and truth["source"] == _identity(settings, split, index)
    except (FileNotFoundError, json.JSONDecodeError, KeyError, TypeError):
        return False


def write_video(folder: Path, settings: WorldSettings, split: str, index: int) -> float:
    """Render and encode one video into `folder`, mp4 first, JSON last, each under its name only when whole.

    Returns:
        Its length in seconds.
    """
    identity = _identity(settings, split, index)
    scene = _Scene(settings.seed, split, index, identity["fixed_seconds"])
    path = folder / f"{video_stem(index)}.mp4"
    path.with_suffix(".json").unlink(missing_ok=True)
    temporary = path.with_name(f".{path.name}.part")
    _encode(scene, temporary)
    os.replace(temporary, path)
    truth = scene.truth() | {"source": identity, "file_bytes": path.stat().st_size}
    _write_atomic(path.with_suffix(".json"), json.dumps(truth, sort_keys=True))
    return truth["seconds"]


def _start_worker() -> None:
    """End this worker when the process that started it is gone, killed or not."""
    parent = multiprocessing.parent_process()

    def watch() -> None:
        parent.join()
        os._exit(1)

    if parent is not None:
        threading.Thread(target=watch, daemon=True).start()


class _Progress:
    """A bar on a terminal, a line per tenth elsewhere."""

    def __init__(self, num_videos: int) -> None:
        self._num, self._done, self._seconds, self._start = num_videos, 0, 0.0, time.perf_counter()
        self._bar = None
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            self._bar = Progress(
                TextColumn("rendering videos"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
                console=Console(stderr=True),
            )  # fmt: skip
            self._task = self._bar.add_task("", total=num_videos)

    def __enter__(self) -> _Progress:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar:
            self._bar.stop()

    def advance(self, video_seconds: float) -> None:
        self._done += 1
        self._seconds += video_seconds
        if self._bar:
            self._bar.advance(self._task)
        elif self._done * 10 // self._num != (self._done - 1) * 10 // self._num:
            print(f"  {self._done}/{self._num} videos, {self.rate()}", flush=True)

    def rate(self) -> str:
        elapsed = time.perf_counter() - self._start
        return f"{self._done / elapsed:.1f} videos/s, {self._seconds / elapsed:.0f} s of video per second"


_STEM = re.compile(r"(easy|hard)_(\d{6})\.(mp4|json)")


def make_world(
    out: Path, *, train_videos: int, test_videos: int, settings: WorldSettings, workers: int | None = None
) -> tuple[int, int]:
    """Fill `out/train` and `out/test`; videos that are there and whole are kept.

    Args:
        out: the folder, made if missing.
        train_videos, test_videos: how many, at least 0.
        settings: what the videos depend on.
        workers: processes; None: one per usable core.

    Returns:
        (videos rendered, videos kept from an earlier run).

    Raises:
        ValueError: a count out of range; `out` holds another world, foreign files, more than asked for.
    """
    for name, value in (("train-videos", train_videos), ("test-videos", test_videos)):
        if not 0 <= value <= 999_999:
            raise ValueError(f"--{name} is {value}, expected 0 to 999999")
    if workers is None:
        workers = usable_cores()
    if workers < 1:
        raise ValueError(f"--workers is {workers}, expected at least 1")
    out = Path(out)
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file, expected a folder: choose another --out")
    out.mkdir(parents=True, exist_ok=True)
    with open(out / ".lock", "w") as lock:
        if not take_lock(lock, out):
            raise ValueError(f"{out}: another make_world is at work; wait or choose another --out")
        _check_folder(out, settings, {"train": train_videos, "test": test_videos})
        jobs, num_kept = [], 0
        for split, num in (("train", train_videos), ("test", test_videos)):
            folder = out / split
            folder.mkdir(exist_ok=True)
            for index in range(num):
                if _is_finished(folder, settings, split, index):
                    num_kept += 1
                else:
                    jobs.append((folder, settings, split, index))
        if num_kept:
            print(f"{num_kept} videos are there already, {len(jobs)} to render", flush=True)
        if jobs:
            _render_all(jobs, min(workers, len(jobs)))
    return len(jobs), num_kept


def _check_folder(out: Path, settings: WorldSettings, num_videos: dict[str, int]) -> None:
    wanted = dataclasses.asdict(settings)
    for name in ("train_seconds", "test_seconds"):
        wanted[name] = None if wanted[name] is None else float(wanted[name])
    marker = out / "world.json"
    if marker.exists():
        try:
            found = json.loads(marker.read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            raise ValueError(f"{marker}: not JSON ({error}); remove {out} or choose another --out") from error
        if found != wanted:
            keys = sorted(set(found) | set(wanted)) if isinstance(found, dict) else []
            other = [key for key in keys if found.get(key) != wanted.get(key)]
            other = ", ".join(f"{key} {found.get(key)} (asked: {wanted.get(key)})" for key in other)
            raise ValueError(
                f"{out} holds a world of other settings: {other or found}; remove it, or choose another --out"
            )
    for split, num in num_videos.items():
        for path in sorted((out / split).glob("*")):
            if re.fullmatch(r"\..*\.part", path.name):
                path.unlink()  # left by a run that was killed
                continue
            match = _STEM.fullmatch(path.name)
            if not match or not marker.exists():
                raise ValueError(f"{path} was not made by make_world; choose an --out of its own")
            if int(match[2]) >= num:
                raise ValueError(
                    f"{path} is beyond the {num} videos asked for; ask for more (--{split}-videos), "
                    f"remove {out}, or choose another --out"
                )
    if not marker.exists():
        _write_atomic(marker, json.dumps(wanted, sort_keys=True))


def _render_all(jobs: list[tuple[Path, WorldSettings, str, int]], workers: int) -> None:
    with _Progress(len(jobs)) as progress:
        if workers == 1:
            for job in jobs:
                progress.advance(write_video(*job))
        else:
            # Fresh processes: they hold neither the lock nor the threads of this one.
            context = multiprocessing.get_context("spawn")
            with ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker) as pool:
                remaining = iter(jobs)
                pending: set[Future] = set()
                try:
                    while True:
                        while len(pending) < 4 * workers and (job := next(remaining, None)) is not None:
                            pending.add(pool.submit(write_video, *job))
                        if not pending:
                            break
                        done, pending = wait(pending, return_when=FIRST_COMPLETED)
                        for future in done:
                            progress.advance(future.result())
                except BaseException:
                    pool.shutdown(wait=False, cancel_futures=True)
                    raise
    print(f"rendered {len(jobs)} videos with {workers} workers: {progress.rate()}", flush=True)


def main(argv: list[str] | None = None) -> int:
    """Run the command line; return the exit status: 0, 1 or 2 on errors, 130 when interrupted."""
    parser = argparse.ArgumentParser(
        prog="make_world", description="Generate videos of sounding objects, with the truth beside each."
    )
    parser.add_argument("--out", type=Path, required=True, help="folder to fill: OUT/train and OUT/test")
    parser.add_argument("--train-videos", type=int, default=600, metavar="N", help="default 600")
    parser.add_argument("--test-videos", type=int, default=384, metavar="M", help="default 384")
    parser.add_argument("--seed", type=int, default=0, help="of the whole world; default 0")
    parser.add_argument("--workers", type=int, metavar="W", help="processes; default one per usable core")
    length = "length of these videos; 0: random, 4 to 10, mostly short; default "
    parser.add_argument("--train-seconds", type=float, default=0, metavar="S", help=length + "0")
    parser.add_argument("--test-seconds", type=float, default=4, metavar="S", help=length + "4")
    args = parser.parse_args(argv)
    try:
        settings = WorldSettings(
            seed=args.seed, train_seconds=args.train_seconds or None, test_seconds=args.test_seconds or None
        )
        num_rendered, num_kept = make_world(
            args.out,
            train_videos=args.train_videos,
            test_videos=args.test_videos,
            settings=settings,
            workers=args.workers,
        )
    except (ValueError, OSError) as error:
        print(f"make_world: error: {error}", file=sys.stderr)
        return 2
    except BrokenExecutor as error:
        print(f"make_world: error: a worker died: {error} Fewer --workers need less memory.", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("make_world: interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    print(f"{args.out}: {num_rendered} videos rendered, {num_kept} kept from an earlier run")
    return 0


if __name__ == "__main__":
    sys.exit(main())
