"""A finished run's figures: its log, metrics.json, and which clips its report shows."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cmac.evaluation.world import Evaluation
from shards.manifest import write_atomically

SCHEMA_VERSION = 1
LOCALISATION_KEYS = tuple(
    f"{kind}_{figure}_{part}"
    for part in ("easy", "hard")
    for kind in ("predicted", "guided")
    for figure in ("pointing", "prefers_sounding")
)
RETRIEVAL_KEYS = ("retrieval_v2a_r1", "retrieval_a2v_r1")


def read_log(path: Path) -> list[dict[str, Any]]:
    """Rows of a run's log.jsonl in the order of their steps.

    A run that was resumed may have logged a step twice: the later row counts. A torn last line (the run was
    killed while writing) is left out.
    """
    rows: dict[int, dict[str, Any]] = {}
    if not path.is_file():
        return []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(row, dict) and "step" in row:
            rows[int(row["step"])] = row
    return [rows[step] for step in sorted(rows)]


def column(rows: Sequence[dict[str, Any]], name: str) -> list[float]:
    """One field of the log over its rows; NaN where it is missing or null."""
    return [float(row[name]) if isinstance(row.get(name), (int, float)) else math.nan for row in rows]


def training_figures(rows: Sequence[dict[str, Any]]) -> dict[str, float | None]:
    """`train_seconds` (of the last row), `clips_per_second` (median over rows), `data_wait_fraction` (mean).

    The first row is left out of the last two when there are more: it holds the start of the workers.
    """
    steady = rows[1:] if len(rows) > 1 else rows

    def over(name: str, reduce: Callable[[Sequence[float]], float]) -> float | None:
        values = [value for value in column(steady, name) if math.isfinite(value)]
        return float(reduce(values)) if values else None

    seconds = [value for value in column(rows, "train_seconds") if math.isfinite(value)]
    return {
        "train_seconds": seconds[-1] if seconds else None,
        "clips_per_second": over("clips_per_second", np.median),
        "data_wait_fraction": over("data_wait_fraction", np.mean),
    }


def build_metrics(
    evaluation: Evaluation,
    rows: Sequence[dict[str, Any]],
    *,
    kind: str,
    training_clips: bool,
    commit: str | None,
) -> dict[str, Any]:
    """What metrics.json holds.

    Args:
        evaluation: the figures.
        rows: of the run's log.
        kind: `world` (ground truth is known) or `videos` (the user's own: retrieval only).
        training_clips: whether the clips that were evaluated are those the model was trained on.
        commit: of the code that evaluated.
    """
    return {
        "schema_version": SCHEMA_VERSION,
        "kind": kind,
        "evaluated_on_training_clips": training_clips,
        "num_clips_read": evaluation.clips.num_clips,
        "num_bad_clips": evaluation.clips.num_bad,
        "num_clips_with_sounding_object_in_sight": evaluation.num_placed,
        "retrieval_gallery": len(evaluation.retrieval_rows),
        "commit": commit,
        **evaluation.figures,
        **training_figures(rows),
    }


def write_text(path: Path, text: str) -> None:
    """Writes the file in UTF-8, whole or not at all: a reader never sees half of it.

    A name of a file that is not UTF-8 (it reached us with surrogate escapes) is shown with question marks.
    """
    write_atomically(path, text.encode("utf-8", "replace"))


@dataclass(frozen=True, kw_only=True)
class Media:
    """One clip as it lies in the shard."""

    frames: np.ndarray
    """uint8 (32, frame_height, frame_width, 3)."""
    waveform: np.ndarray
    """float32 (num_samples,), mono."""
    sample_rate: int
    """Hz."""


@dataclass(frozen=True, kw_only=True)
class ShownClip:
    """A clip that the report shows, and why."""

    index: int
    """Row in the ClipSet."""
    name: str
    """Short heading, e.g. `easy, 90th percentile`."""


PERCENTILES_PLAYED = (90, 50, 10)
PERCENTILES_SHOWN = (95, 65, 35, 5)


def choose_shown(evaluation: Evaluation, percentiles: Sequence[int], kind: str = "guided") -> list[ShownClip]:
    """Clips at fixed percentiles, so that neither the best nor the worst is picked by hand.

    With ground truth: of the preference margin of the guided map, within each part, best first. Without: of
    the rank at which the clip's picture finds its own sound (ties in reading order), twice as many
    percentiles spread evenly.
    """
    shown: list[ShownClip] = []
    if evaluation.scores:
        for part in ("easy", "hard"):
            scores = [score for score in evaluation.scores if score.placed.truth.part == part]
            scores.sort(key=lambda score: score.margins[kind])
            for percentile in percentiles if scores else ():
                score = scores[round(percentile / 100 * (len(scores) - 1))]
                if score.placed.index not in [item.index for item in shown]:
                    name = f"{part}, {percentile}th percentile"
                    shown.append(ShownClip(index=score.placed.index, name=name))
        return shown
    from cmac.evaluation.retrieval import retrieval_ranks

    rows = evaluation.retrieval_rows
    encoded = evaluation.clips.encoded["trained"]
    ranks = retrieval_ranks(encoded.embedding_v[rows], encoded.embedding_a[rows]).tolist()
    order = sorted(range(len(rows)), key=lambda position: ranks[position])
    count = min(2 * len(percentiles), len(rows))
    places = [round(place * (len(rows) - 1) / max(count - 1, 1)) for place in range(count)]
    return [
        ShownClip(index=rows[order[place]], name=f"own sound at rank {ranks[order[place]]} of {len(rows)}")
        for place in dict.fromkeys(places)
    ]
