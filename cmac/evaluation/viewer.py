"""A video with the maps of its windows laid over it: one timeline, still pictures, an MP4 and a page that plays it.

A network sees windows of a second that overlap. `Course` blends their maps to one course over time, and
`Renderer` draws moments of it: as the columns of a grid (paper Fig. 5), and as frames of a video.
"""

from __future__ import annotations

import base64
import hashlib
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Literal

import numpy as np
from markupsafe import Markup
from PIL import Image, ImageDraw, ImageFont

from cmac.evaluation import pictures
from cmac.evaluation.boxes import FPS
from cmac.evaluation.pages import page_environment

Kind = Literal["guided", "predicted"]
KINDS: tuple[Kind, ...] = ("guided", "predicted")
LONG_SIDE, SHORT_SIDE = 360, 240
"""A panel fits into these, pixels."""
MIN_WIDTH = 640
"""Of a rendered video: what a spectrogram of some seconds needs, pixels."""
GAP = 8
NAME_HEIGHT = 28
STRIP_NAME_HEIGHT = 24
STRIP_HEIGHT = 72
AXIS_HEIGHT = 26
GROUND, INK, SOFT = (24, 26, 31), (235, 235, 230), (160, 165, 177)
NO_MAP_COLOR = (70, 40, 40)
PANEL_NAMES = ("picture", "guided by the sound", "predicted from the picture")
STRIP_NAMES = (
    "sound as log-mel spectrogram",
    "guided by the picture",
    "predicted from the sound",
)
GRID_ROWS = (
    "frame",
    "guided\nby the sound",
    "predicted\nfrom the picture",
    "log-mel",
    "guided\nby the picture",
    "predicted\nfrom the sound",
)
GRID_SECONDS = 1.0
"""How much of the sound a column of the grid shows."""
LEAST_WEIGHT = 1e-3
"""Of a window at its very ends, so that a moment that only one window reaches has a map."""


@dataclass(frozen=True, kw_only=True)
class Window:
    """What the network said about one stretch of a video. All arrays have time first."""

    start_seconds: float
    """On the video's clock."""
    end_seconds: float
    region: tuple[float, float, float, float]
    """(x, y, width, height) of the square that the network was given, as shares of the displayed picture."""
    flip: bool
    """Whether that square was mirrored left to right."""
    guided_v: np.ndarray
    """float32 (T', H', W'): s^v of Eq. (4)."""
    predicted_v: np.ndarray
    """float32 (T', H', W'): s-hat^v of Eq. (5)."""
    guided_a: np.ndarray
    """float32 (S', F'): s^a of Eq. (4)."""
    predicted_a: np.ndarray
    """float32 (S', F'): s-hat^a of Eq. (5)."""
    log_mel: np.ndarray
    """float32 (S, F)."""


class Course:
    """The maps of a video's windows, blended to one course over its time.

    Where windows overlap, each counts by its distance from its nearer end: most in its middle, where it has seen
    what comes before and after. Within a window a map is linear between the middles of its steps.
    """

    def __init__(self, windows: Sequence[Window]) -> None:
        """
        Args:
            windows: at least one, of the same shapes and region.

        Raises:
            ValueError: none, or of several regions.
        """
        if not windows:
            raise ValueError("no window of the video could be decoded, expected at least one")
        places = {(window.region, window.flip) for window in windows}
        if len(places) > 1:
            raise ValueError(f"windows show {len(places)} regions, expected one; switch augmentation off")
        self.region, self.flip = windows[0].region, windows[0].flip
        self._windows = sorted(windows, key=lambda window: window.start_seconds)
        self._ranges = {}
        for name in ("guided_v", "predicted_v", "guided_a", "predicted_a"):
            middles = np.unique(np.concatenate([_middles(window, name) for window in self._windows]))
            values = self._blend(name, middles)
            self._ranges[name] = float(np.nanmin(values)), float(np.nanmax(values))
        self.log_mel_limits = pictures.log_mel_limits(
            np.concatenate([window.log_mel for window in windows]).T
        )

    def range(self, kind: Kind, modality: Literal["v", "a"]) -> tuple[float, float]:
        """(lowest, highest) value of a map over the whole video: what `map_at` and `strip` are stretched by."""
        return self._ranges[f"{kind}_{modality}"]

    def map_at(self, kind: Kind, seconds: float) -> np.ndarray | None:
        """The visual map at a time, stretched to [0, 1]: float32 (H', W'); None where no window reaches."""
        values = self._blend(f"{kind}_v", np.array([seconds]))[0]
        return None if np.isnan(values).any() else self._stretch(values, kind, "v")

    def strip(self, kind: Kind, times: np.ndarray) -> np.ndarray:
        """The audio map over times, stretched to [0, 1]: float32 (F', len(times)); NaN where no window reaches."""
        return self._stretch(self._blend(f"{kind}_a", times).T, kind, "a")

    def log_mel(self, times: np.ndarray) -> np.ndarray:
        """float32 (F, len(times)); NaN where no window reaches."""
        return self._blend("log_mel", times).T

    def _stretch(self, values: np.ndarray, kind: Kind, modality: Literal["v", "a"]) -> np.ndarray:
        # Between the middles of steps the weights of windows differ a little, and so may what they blend to.
        return np.clip(pictures.stretch_between(values, *self.range(kind, modality)), 0, 1)

    def _blend(self, name: str, times: np.ndarray) -> np.ndarray:
        shape = getattr(self._windows[0], name).shape[1:]
        total, weights = np.zeros((len(times), *shape)), np.zeros(len(times))
        for window in self._windows:
            inside = (times - window.start_seconds) / (window.end_seconds - window.start_seconds)
            rows = np.flatnonzero((inside >= 0) & (inside < 1))
            if not len(rows):
                continue
            values = getattr(window, name)
            position = np.clip(inside[rows] * len(values) - 0.5, 0, len(values) - 1)
            below = np.floor(position).astype(int)
            above = np.minimum(below + 1, len(values) - 1)
            share = (position - below).reshape(-1, *[1] * len(shape))
            weight = np.maximum(np.minimum(inside[rows], 1 - inside[rows]), LEAST_WEIGHT)
            blended = (1 - share) * values[below] + share * values[above]
            total[rows] += weight.reshape(share.shape) * blended
            weights[rows] += weight
        with np.errstate(invalid="ignore"):
            return (total / weights.reshape(-1, *[1] * len(shape))).astype(np.float32)


def _middles(window: Window, name: str) -> np.ndarray:
    num_steps = len(getattr(window, name))
    length = window.end_seconds - window.start_seconds
    return window.start_seconds + (np.arange(num_steps) + 0.5) / num_steps * length


@dataclass(frozen=True, kw_only=True)
class Box:
    """A rectangle of a rendered frame, pixels."""

    x: int
    y: int
    width: int
    height: int

    def paste(self, canvas: np.ndarray, content: np.ndarray) -> None:
        """Draws uint8 (height, width, 3) there."""
        canvas[self.y : self.y + self.height, self.x : self.x + self.width] = content


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Where things are in a rendered frame."""

    width: int
    height: int
    panels: tuple[Box, Box, Box]
    """Picture, guided map, predicted map."""
    strips: tuple[Box, Box, Box]
    """Spectrogram, guided map, predicted map; all as wide as the frame."""
    axis: Box
    """Seconds, below the strips."""


def panel_size(width: int, height: int) -> tuple[int, int]:
    """(width, height) of a panel for a picture of that size with square pixels; both even and at least 16."""
    scale = min(LONG_SIDE / max(width, height), SHORT_SIDE / min(width, height))
    return max(round(width * scale / 2) * 2, 16), max(round(height * scale / 2) * 2, 16)


def make_layout(panel_width: int, panel_height: int) -> Layout:
    """Three panels beside each other, three strips and the axis below; both sides of the frame are even."""
    row = 3 * panel_width + 2 * GAP
    width = max(row, MIN_WIDTH) // 2 * 2
    left = (width - row) // 2
    panels = tuple(
        Box(x=left + place * (panel_width + GAP), y=NAME_HEIGHT, width=panel_width, height=panel_height)
        for place in range(3)
    )
    y = NAME_HEIGHT + panel_height + GAP
    strips = []
    for _ in range(3):
        strips.append(Box(x=0, y=y + STRIP_NAME_HEIGHT, width=width, height=STRIP_HEIGHT))
        y += STRIP_NAME_HEIGHT + STRIP_HEIGHT
    axis = Box(x=0, y=y, width=width, height=AXIS_HEIGHT)
    height = (y + AXIS_HEIGHT + 1) // 2 * 2
    return Layout(width=width, height=height, panels=panels, strips=tuple(strips), axis=axis)


class Renderer:
    """Draws moments of a video with its maps."""

    def __init__(self, course: Course, panel: tuple[int, int], start_seconds: float, seconds: float) -> None:
        """
        Args:
            course: the maps.
            panel: (width, height) of a frame as it will be given.
            start_seconds: first moment that is shown, on the video's clock.
            seconds: how much is shown.
        """
        self.course = course
        self.layout = make_layout(*panel)
        self._panel = panel
        self._start, self._seconds = start_seconds, seconds
        x, y, width, height = course.region
        self.window = (x * panel[0], y * panel[1], width * panel[0], height * panel[1])
        """(x, y, width, height) of what the network was given, in pixels of a panel."""
        self._outline = self._draw_outline()
        self._background = self._draw_background()

    def picture(self, frame: np.ndarray | None) -> np.ndarray:
        """A frame with the outline of what the network was given; None: it could not be decoded."""
        if frame is None:
            return self._notice("no picture")
        return np.where(self._outline[..., None], 255 - (255 - frame) // 3, frame).astype(np.uint8)

    def overlay(self, frame: np.ndarray | None, kind: Kind, seconds: float) -> np.ndarray:
        """A frame with the map of that time over what the network was given, dark around it."""
        if frame is None:
            return self._notice("no picture")
        values = self.course.map_at(kind, seconds)
        width, height = self._panel
        if values is None:
            nothing = np.full((height, width), np.nan, dtype=np.float32)
            return _write_middle(pictures.overlay_seen(frame, nothing), "no map")
        placed = pictures.place_map(values, self.window, self.course.flip, width, height)
        return pictures.overlay_seen(frame, placed)

    def spectrogram(
        self, kind: Kind | None, start_seconds: float, seconds: float, width: int, height: int
    ) -> np.ndarray:
        """The log-mel of a stretch, low frequencies at the bottom, with a map over it: uint8 (height, width, 3).

        kind: None for the log-mel alone.
        """
        times = start_seconds + (np.arange(width) + 0.5) / width * seconds
        log_mel = self.course.log_mel(times)
        is_known = np.isfinite(log_mel).all(axis=0)  # (width,)
        limits = self.course.log_mel_limits
        log_mel = np.where(is_known, log_mel, limits[0])
        picture = pictures.log_mel_picture(log_mel, width, height, limits)
        if kind is not None:
            values = np.where(is_known, self.course.strip(kind, times), 0)
            picture = pictures.overlay(picture, values[::-1])
        return np.where(is_known[:, None], picture, np.array(NO_MAP_COLOR, dtype=np.uint8))

    def frame(self, frame: np.ndarray | None, seconds: float) -> np.ndarray:
        """A frame of the video: uint8 (layout.height, layout.width, 3).

        Args:
            frame: uint8 (panel height, panel width, 3), or None where it could not be decoded.
            seconds: its time on the video's clock.
        """
        canvas = self._background.copy()
        panels = [self.picture(frame), *(self.overlay(frame, kind, seconds) for kind in KINDS)]
        for box, content in zip(self.layout.panels, panels):
            box.paste(canvas, content)
        place = (seconds - self._start) / self._seconds
        for box in self.layout.strips:
            _draw_playhead(canvas[box.y : box.y + box.height], place)
        return canvas

    def column(self, frame: np.ndarray | None, seconds: float) -> list[np.ndarray]:
        """Tiles of a moment, in the order of GRID_ROWS; the sound reaches half a second to either side."""
        width, height = self._panel[0], STRIP_HEIGHT * 2
        begin = seconds - GRID_SECONDS / 2
        tiles = [self.picture(frame), *(self.overlay(frame, kind, seconds) for kind in KINDS)]
        for kind in (None, *KINDS):
            tiles.append(self.spectrogram(kind, begin, GRID_SECONDS, width, height))
            _draw_playhead(tiles[-1], 0.5)
        return tiles

    def grid(self, columns: Sequence[tuple[float, list[np.ndarray]]], title: str) -> np.ndarray:
        """One picture of columns, (seconds, tiles): uint8 (H, W, 3)."""
        names = list(GRID_ROWS)
        for row, (kind, modality) in enumerate((k, m) for m in "va" for k in KINDS):
            place = 1 + row + row // 2
            names[place] += "\n" + range_text(self.course.range(kind, modality))
        tiles = [[tiles[row] for _, tiles in columns] for row in range(len(GRID_ROWS))]
        times = [f"{seconds:.2f} s" for seconds, _ in columns]
        return pictures.compose_grid(tiles, names, times, title=title, left=130)

    def _draw_outline(self) -> np.ndarray:
        """bool (height, width): the dashes around what the network was given."""
        width, height = self._panel
        x, y, across, down = self.window
        box = np.array([x, y, min(x + across, width) - 1, min(y + down, height) - 1])
        blank = np.zeros((height, width, 3), dtype=np.uint8)
        return pictures.draw_boxes(blank, None, [box], 1)[..., 0] > 0

    def _draw_background(self) -> np.ndarray:
        """All that does not move."""
        layout = self.layout
        image = Image.new("RGB", (layout.width, layout.height), GROUND)
        draw = ImageDraw.Draw(image)
        # Wide frames are shown smaller.
        size = min(max(layout.width // 64, 14), 17)
        font, small = ImageFont.load_default(size=size), ImageFont.load_default(size=size - 1)
        for box, name, kind in zip(layout.panels, PANEL_NAMES, (None, *KINDS)):
            choices = [name, *(name.rsplit(" ", count)[0] for count in (2, 3))]
            if kind is not None:
                choices.insert(0, f"{name}   ({range_text(self.course.range(kind, 'v'))})")
            text = next((text for text in choices if draw.textlength(text, font=font) <= box.width), "")
            place = (box.x + box.width // 2, NAME_HEIGHT // 2)
            draw.text(place, text, fill=INK, font=font, anchor="mm")
        for box, name, kind in zip(layout.strips, STRIP_NAMES, (None, *KINDS)):
            if kind is not None:
                name += f"   ({range_text(self.course.range(kind, 'a'))})"
            draw.text((6, box.y - STRIP_NAME_HEIGHT // 2), name, fill=SOFT, font=small, anchor="lm")
        step = _tick_seconds(self._seconds)
        first = math.ceil(self._start / step - 1e-6)
        last = math.floor((self._start + self._seconds) / step + 1e-6)
        for tick in range(first, last + 1):
            seconds = tick * step
            x = (seconds - self._start) / self._seconds * layout.width
            draw.line((x, layout.axis.y, x, layout.axis.y + 4), fill=SOFT)
            text = f"{seconds:g} s"
            room = draw.textlength(text, font=small) / 2 + 2
            x = min(max(x, room), layout.width - room)
            draw.text((x, layout.axis.y + 15), text, fill=SOFT, font=small, anchor="mm")
        canvas = np.asarray(image).copy()
        for box, kind in zip(layout.strips, (None, *KINDS)):
            box.paste(canvas, self.spectrogram(kind, self._start, self._seconds, box.width, box.height))
        return canvas

    def _notice(self, text: str) -> np.ndarray:
        width, height = self._panel
        blank = np.full((height, width, 3), NO_MAP_COLOR, dtype=np.uint8)
        return _write_middle(blank, text)


def _draw_playhead(picture: np.ndarray, place: float) -> None:
    """Marks a moment, 0 at the left edge and 1 at the right, in uint8 (H, W, 3)."""
    x = int(place * picture.shape[1])
    for offset, color in ((-1, 0), (0, 255), (1, 255), (2, 0)):
        if 0 <= x + offset < picture.shape[1]:
            picture[:, x + offset] = color


def _write_middle(picture: np.ndarray, text: str) -> np.ndarray:
    image = Image.fromarray(np.ascontiguousarray(picture))
    font = ImageFont.load_default(size=14)
    place = image.width // 2, image.height // 2
    ImageDraw.Draw(image).text(
        place, text, fill=INK, font=font, anchor="mm", stroke_width=2, stroke_fill=(0, 0, 0)
    )
    return np.asarray(image)


def _tick_seconds(seconds: float) -> float:
    """From one tick of an axis to the next, so that there are at most a dozen."""
    return next((step for step in (0.5, 1, 2, 5, 10, 20, 30, 60) if seconds / step <= 12), 120)


def range_text(limits: tuple[float, float]) -> str:
    """`0.31 to 0.72`, with as many digits as it takes to tell the ends apart, up to five."""
    low, high = limits
    digits = 2
    while digits < 5 and f"{low:.{digits}f}" == f"{high:.{digits}f}":
        digits += 1
    return f"{low:.{digits}f} to {high:.{digits}f}"


def moments(start_seconds: float, seconds: float, count: int) -> list[float]:
    """count times spread evenly, so far from both ends that a column's sound is inside: one in the middle if there
    is no room."""
    first, last = start_seconds + GRID_SECONDS / 2, start_seconds + seconds - GRID_SECONDS / 2
    if count == 1 or last - first < 1 / FPS:
        return [(first + last) / 2]
    return [first + (last - first) * place / (count - 1) for place in range(count)]


@dataclass(frozen=True, kw_only=True)
class PlayedVideo:
    """A video of the page."""

    name: str
    """As it is called; any text."""
    notes: Sequence[str]
    """What is shown of it and what is not, a sentence each."""
    ranges: Sequence[tuple[str, str]]
    """(map, its range)."""
    video: bytes
    """MP4 of `Renderer.frame`s."""
    poster: bytes
    """JPEG of one of them."""
    layout: Layout


def build_page(
    videos: Sequence[PlayedVideo], title: str, facts: Sequence[tuple[str, str]], left_out: Sequence[str]
) -> str:
    """One HTML page that plays videos side by side and fetches nothing: all is inside it, and its
    Content-Security-Policy forbids everything else.

    Args:
        videos: at least one.
        title: of the page.
        facts: what was run: (name, value).
        left_out: which videos are not in it and why, a sentence each.
    """
    environment = page_environment()
    environment.filters["csp_hash"] = _csp_hash
    return environment.get_template("viewer.html.j2").render(
        videos=videos,
        layouts=[asdict(video.layout) for video in videos],
        title=title,
        facts=facts,
        left_out=left_out,
        colormap=[tuple(int(channel) for channel in pictures.colorize(np.array(x / 10))) for x in range(11)],
    )


def _csp_hash(text: str | Markup) -> str:
    """The source of a Content-Security-Policy that allows exactly this text between the tags."""
    digest = hashlib.sha256(str(text).encode("utf-8")).digest()
    return f"sha256-{base64.b64encode(digest).decode('ascii')}"
