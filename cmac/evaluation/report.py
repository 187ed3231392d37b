"""The report of a run: one HTML page that needs nothing else."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import PurePosixPath
from typing import Any

import numpy as np

from cmac.evaluation import pictures
from cmac.evaluation.charts import Line, line_chart, smooth
from cmac.evaluation.demo import (
    PERCENTILES_PLAYED,
    PERCENTILES_SHOWN,
    Media,
    ShownClip,
    choose_shown,
    column,
)
from cmac.evaluation.localisation import band_rows, mel_center_hz
from cmac.evaluation.pages import page_environment
from cmac.evaluation.videos import encode_mp4, overlay_panels
from cmac.evaluation.world import Evaluation, PlacedClip, place_clips
from loaders.config import AudioConfig

TILE = 144
"""Side of a tile of the grid, pixels."""
PANEL = 256
"""Side of a panel of a clip that plays, pixels."""
REPEATS = 3
"""How often a clip of one second is played."""
GRID_ROWS = ("frame", "guided", "predicted", "log-mel", "guided", "predicted")


@dataclass(frozen=True, kw_only=True)
class FigureRow:
    """One line of the table of figures."""

    key: str
    """As in metrics.json."""
    name: str
    """What it is, in words."""
    group: str
    """Heading it stands under."""
    figure: Mapping[str, Any]
    """`value`, `chance`, `untrained`, `num_clips`, `interval`, perhaps `center`."""
    verdict: str
    """What the interval says about chance, in words."""
    tone: str
    """`good`, `flat` or `odd`: how the verdict is colored."""


_EASY, _HARD = "Easy part: silent objects stand still", "Hard part: silent objects move too"
_POINTS, _PREFERS = "map points at the sounding object", "map prefers the sounding object"
_ROWS = (
    (_EASY, "predicted_pointing_easy", f"Predicted {_POINTS}"),
    (_EASY, "predicted_prefers_sounding_easy", f"Predicted {_PREFERS}"),
    (_EASY, "guided_pointing_easy", f"Guided {_POINTS}"),
    (_EASY, "guided_prefers_sounding_easy", f"Guided {_PREFERS}"),
    (_HARD, "guided_pointing_hard", f"Guided {_POINTS}"),
    (_HARD, "guided_prefers_sounding_hard", f"Guided {_PREFERS}"),
    (_HARD, "predicted_pointing_hard", f"Predicted {_POINTS}"),
    (_HARD, "predicted_prefers_sounding_hard", f"Predicted {_PREFERS} (must stay near 50 %)"),
    ("Retrieval", "retrieval_v2a_r1", "Picture finds its own sound, first guess"),
    ("Retrieval", "retrieval_v2a_r5", "... within five guesses"),
    ("Retrieval", "retrieval_v2a_r10", "... within ten guesses"),
    ("Retrieval", "retrieval_a2v_r1", "Sound finds its own picture, first guess"),
    ("Retrieval", "retrieval_a2v_r5", "... within five guesses"),
    ("Retrieval", "retrieval_a2v_r10", "... within ten guesses"),
    ("Listening", "guided_band_share_easy", "Guided audio map: share in the sounding timbre's bands, easy"),
    ("Listening", "predicted_band_share_easy", "Predicted audio map: the same, easy"),
    ("Listening", "guided_band_share_hard", "Guided audio map: the same, hard"),
    ("Listening", "predicted_band_share_hard", "Predicted audio map: the same, hard"),
)
HEADLINES = (
    "predicted_pointing_easy",
    "predicted_prefers_sounding_easy",
    "guided_pointing_easy",
    "guided_prefers_sounding_easy",
    "guided_prefers_sounding_hard",
    "predicted_prefers_sounding_hard",
    "retrieval_v2a_r1",
    "retrieval_a2v_r1",
)


def verdict(key: str, figure: Mapping[str, Any]) -> tuple[str, str]:
    """(words, tone) from the figure's interval, chance and the untrained network; no clips: says so."""
    if not figure["num_clips"] or figure["interval"] is None:
        return "no clips", "flat"
    low, high = figure["interval"]
    expected_at_chance = key == "predicted_prefers_sounding_hard"
    if low > figure["chance"]:
        if expected_at_chance:
            return "above chance: look for a leak", "odd"
        if figure["untrained"] is not None and low <= figure["untrained"]:
            return "above chance, but not above the untrained network", "flat"
        return "above chance", "good"
    if high < figure["chance"]:
        return ("below chance: look for a leak", "odd") if expected_at_chance else ("below chance", "odd")
    if expected_at_chance:
        return "at chance, as it must be", "good"
    return "not distinguishable from chance", "flat"


def figure_rows(figures: Mapping[str, Any]) -> list[FigureRow]:
    """The figures that there are, in the order of the report."""
    rows = []
    for group, key, name in _ROWS:
        figure = figures.get(key)
        if not isinstance(figure, Mapping) or not figure.get("num_clips"):
            continue
        words, tone = verdict(key, figure)
        rows.append(FigureRow(key=key, name=name, group=group, figure=figure, verdict=words, tone=tone))
    return rows


def percent(value: float | None, digits: int = 1) -> str:
    """`0.312` -> `31.2 %` (no line break before the sign); None -> an en dash."""
    if value is None or not math.isfinite(value):
        return "\N{EN DASH}"
    return f"{100 * value:.{digits}f}\N{NO-BREAK SPACE}%"


def duration(seconds: float | None) -> str:
    """`75` -> `1 min 15 s`."""
    if seconds is None:
        return "\N{EN DASH}"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


@dataclass(frozen=True, kw_only=True)
class Tile:
    """One picture of the grid."""

    picture: np.ndarray
    """uint8 (TILE, TILE, 3)."""
    text: str
    """What is seen, for those who cannot."""
    note: str
    """Range of the map before it was stretched, else empty."""


@dataclass(frozen=True, kw_only=True)
class GridColumn:
    """One clip of the grid: six tiles."""

    title: str
    """Why it is shown."""
    subtitle: str
    """What it is."""
    tiles: tuple[Tile, ...]
    """In the order of GRID_ROWS."""


@dataclass(frozen=True, kw_only=True)
class PlayedClip:
    """A clip that plays with its sound."""

    title: str
    """Why it is shown."""
    subtitle: str
    """What it is."""
    video: bytes
    """MP4."""
    poster: bytes
    """JPEG of its middle."""


def describe(evaluation: Evaluation, index: int) -> str:
    """One line about a clip."""
    info, truth = evaluation.clips.clips[index], evaluation.clips.truths[index]
    place = f"{PurePosixPath(info.video_id).name} at {info.start_seconds:.1f} s"
    if truth is None:
        return place
    silent = sorted({item.category for item in truth.silent})
    return f"{truth.category} sounds" + (f", {', '.join(silent)} silent" if silent else "") + f" ({place})"


def _range(values: np.ndarray) -> str:
    return f"{values.min():.2f} to {values.max():.2f}"


def _placed(evaluation: Evaluation, num_steps: int) -> dict[int, PlacedClip]:
    return {clip.index: clip for clip in place_clips(evaluation.clips, num_steps)}


def build_grid(
    evaluation: Evaluation, shown: Sequence[ShownClip], read_media: Callable[[str], Media], audio: AudioConfig
) -> list[GridColumn]:
    """A column of six tiles for each clip, as in the paper's Fig. 5 (GRID_ROWS).

    The frame and the visual maps are those of the middle of the clip. Each map is stretched to its range.
    """
    encoded = evaluation.clips.encoded["trained"]
    num_steps = encoded.guided_v.shape[1]
    placed = _placed(evaluation, num_steps)
    center_hz = mel_center_hz(audio.num_mel_bins, 0, audio.sample_rate / 2)
    step = num_steps // 2
    columns = []
    for item in shown:
        info, crop = evaluation.clips.clips[item.index], evaluation.clips.crops[item.index]
        media = read_media(info.key)
        middle = int((step + 0.5) * len(media.frames) / num_steps)
        frame = pictures.crop_frames(media.frames[middle : middle + 1], crop, TILE)[0]
        truth = placed.get(item.index)
        outlined = frame
        if truth is not None:
            boxes = [box[step] for box in truth.silent]
            outlined = pictures.draw_boxes(frame, truth.sounding[step], boxes, TILE / crop.crop_size)
        tiles = [Tile(picture=outlined, text="frame at the middle of the clip", note="")]
        for kind in ("guided", "predicted"):
            values = getattr(encoded, f"{kind}_v")[item.index, step].numpy()
            picture = pictures.overlay(frame, pictures.stretch(values))
            tiles.append(Tile(picture=picture, text=f"{kind} visual map over the frame", note=_range(values)))
        log_mel = pictures.log_mel_picture(evaluation.clips.log_mel[item.index].float().numpy(), TILE, TILE)
        marked = log_mel
        if truth is not None and truth.truth.bands_hz:
            marked = pictures.draw_bands(log_mel, band_rows(truth.truth.bands_hz, center_hz))
        tiles.append(Tile(picture=marked, text="log-mel of the clip, low frequencies at the bottom", note=""))
        for kind in ("guided", "predicted"):
            values = getattr(encoded, f"{kind}_a")[item.index].numpy()
            picture = pictures.overlay(log_mel, pictures.stretch(values[::-1]))
            text = f"{kind} audio map over the log-mel"
            tiles.append(Tile(picture=picture, text=text, note=_range(values)))
        subtitle = describe(evaluation, item.index)
        columns.append(GridColumn(title=item.name, subtitle=subtitle, tiles=tuple(tiles)))
    return columns


def compose_grid_png(columns: Sequence[GridColumn]) -> bytes:
    """The grid as one PNG file."""
    tiles = [[column.tiles[row].picture for column in columns] for row in range(len(GRID_ROWS))]
    names = [column.title.replace(", ", "\n").replace(" at rank ", "\nat rank ") for column in columns]
    return pictures.encode_png(pictures.compose_grid(tiles, list(GRID_ROWS), names))


def build_played(
    evaluation: Evaluation, shown: Sequence[ShownClip], read_media: Callable[[str], Media]
) -> list[PlayedClip]:
    """The clips as MP4: picture, guided map, predicted map, with sound."""
    encoded = evaluation.clips.encoded["trained"]
    placed = _placed(evaluation, 32)
    played = []
    for item in shown:
        info, crop = evaluation.clips.clips[item.index], evaluation.clips.crops[item.index]
        media = read_media(info.key)
        frames = pictures.crop_frames(media.frames, crop, PANEL)
        picture = frames
        if (truth := placed.get(item.index)) is not None:
            scale = PANEL / crop.crop_size
            picture = np.stack(
                [
                    pictures.draw_boxes(
                        frame, truth.sounding[index], [box[index] for box in truth.silent], scale
                    )
                    for index, frame in enumerate(frames)
                ]
            )
        guided, predicted = encoded.guided_v[item.index].numpy(), encoded.predicted_v[item.index].numpy()
        panels = overlay_panels(picture, frames, guided, predicted)
        video = encode_mp4(panels, media.waveform, len(frames), media.sample_rate, REPEATS)
        played.append(
            PlayedClip(
                title=item.name,
                subtitle=describe(evaluation, item.index),
                video=video,
                poster=pictures.encode_jpeg(panels[len(panels) // 2], quality=80),
            )
        )
    return played


def training_charts(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Loss, accuracy and data-wait curves of a run's log: dictionaries of title, svg, legend and note."""
    steps = column(rows, "step")
    span = max(1, len(rows) // 25)

    def curve(name: str, label: str, css_class: str) -> Line:
        return Line(name=label, xs=steps, ys=smooth(column(rows, name), span), css_class=css_class)

    smoothing = f"Running mean over {span} logged steps." if span > 1 else ""
    charts = []
    for title, lines, note, is_percent in (
        (
            "Contrastive loss",
            [curve("loss_contrastive", "both directions, Eq. (7)", "line-1")],
            "Lower: a clip's picture and sound are told from those of other clips. It can rise at first, "
            "while the queue of past clips fills up and the task gets harder.",
            False,
        ),
        (
            "Attention consistency loss",
            [curve("loss_consistency", "both modalities, Eq. (6)", "line-2")],
            "Lower: the map predicted from one modality is closer to the map guided by the other.",
            False,
        ),
        (
            "Accuracy of the contrastive task",
            [
                curve("accuracy_v2a", "picture to sound", "line-1"),
                curve("accuracy_a2v", "sound to picture", "line-2"),
            ],
            "Share of training clips whose own counterpart scores above everything in the queues.",
            True,
        ),
        (
            "Share of time waiting for data",
            [curve("data_wait_fraction", "waiting", "line-3")],
            "Near zero means that the loader keeps up with the training step.",
            True,
        ),
    ):
        charts.append(
            {
                "title": title,
                "svg": line_chart(lines, title, "optimization step", percent=is_percent),
                "legend": [(line.name, line.css_class) for line in lines],
                "note": f"{note} {smoothing}".strip(),
            }
        )
    return charts


@dataclass(frozen=True, kw_only=True)
class ReportContext:
    """What the page says about the run beside its figures."""

    title: str
    """Of the page."""
    date: str
    """When it was evaluated, UTC."""
    facts: Sequence[tuple[str, str]]
    """What was run: (name, value)."""
    training_clips: bool
    """Whether the clips evaluated are those the model was trained on."""
    has_truth: bool
    """Whether it is the generated world."""


def build_report(
    evaluation: Evaluation,
    metrics: Mapping[str, Any],
    rows: Sequence[Mapping[str, Any]],
    context: ReportContext,
    audio: AudioConfig,
    read_media: Callable[[str], Media],
) -> tuple[str, bytes]:
    """(the page, the grid as PNG).

    Args:
        evaluation: the clips and their figures.
        metrics: as in metrics.json.
        rows: of the run's log.
        context: what was run.
        audio: the loader's configuration.
        read_media: a clip's frames and sound by its key.
    """
    grid = build_grid(evaluation, choose_shown(evaluation, PERCENTILES_SHOWN), read_media, audio)
    played = build_played(evaluation, choose_shown(evaluation, PERCENTILES_PLAYED), read_media)
    figures = figure_rows(metrics)
    environment = page_environment()
    environment.filters.update(
        percent=percent,
        duration=duration,
        jpeg=lambda picture: pictures.data_uri(pictures.encode_jpeg(picture), "image/jpeg"),
    )
    page = environment.get_template("report.html.j2").render(
        context=context,
        metrics=metrics,
        groups=[(group, list(items)) for group, items in groupby(figures, key=lambda row: row.group)],
        headlines=[row for key in HEADLINES for row in figures if row.key == key],
        charts=training_charts(rows),
        grid=grid,
        grid_rows=GRID_ROWS,
        played=played,
        colormap=[tuple(int(channel) for channel in pictures.colorize(np.array(x / 10))) for x in range(11)],
        repeats=REPEATS,
        percentiles_shown=PERCENTILES_SHOWN,
        percentiles_played=PERCENTILES_PLAYED,
    )
    return page, compose_grid_png(grid)
