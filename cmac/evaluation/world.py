"""Figures of a model on the generated world, where it is known what sounds and where it is."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from cmac.evaluation import boxes as box_ops
from cmac.evaluation import localisation
from cmac.evaluation.intervals import bootstrap_interval
from cmac.evaluation.retrieval import retrieval_ranks
from cmac.evaluation.truth import Truth, TruthObject, find_truth
from loaders.config import AudioConfig

if TYPE_CHECKING:
    from cmac.evaluation.boxes import Crop
    from loaders.batch import ClipBatch
    from shards.schema import ClipInfo

PARTS = ("easy", "hard")
MAPS = ("guided", "predicted")
RECALL_AT = (1, 5, 10)
MIN_VISIBLE = 0.5
"""Share of an object's box that must lie in the crop. Choice: what is cut away cannot be pointed at."""


@dataclass(kw_only=True)
class EncodedClips:
    """What one model said about N clips; tensors on the CPU."""

    embedding_v: Tensor
    """float32 (N, D), unit norm."""
    embedding_a: Tensor
    """float32 (N, D), unit norm."""
    guided_v: Tensor
    """float32 (N, T', H', W'): s of Eq. (4)."""
    predicted_v: Tensor
    """float32 (N, T', H', W'): s-hat of Eq. (5)."""
    guided_a: Tensor
    """float32 (N, F', S')."""
    predicted_a: Tensor
    """float32 (N, F', S')."""


@dataclass(kw_only=True)
class ClipSet:
    """N clips in the order in which they were read, and what each model said about them."""

    clips: list[ClipInfo] = field(default_factory=list)
    """Descriptions from the shards."""
    crops: list[Crop] = field(default_factory=list)
    """What was done to each clip (a `ClipAugmentation`)."""
    truths: list[Truth | None] = field(default_factory=list)
    """Ground truth of each clip's video, None where there is none."""
    num_bad: int = 0
    """Clips that could not be read or decoded; they are in no figure."""
    log_mel: Tensor | None = None
    """float16 (N, F, S): for pictures."""
    encoded: dict[str, EncodedClips] = field(default_factory=dict)
    """By the model's name."""

    @property
    def num_clips(self) -> int:
        """N."""
        return len(self.clips)


@torch.no_grad()
def encode_clips(
    models: Mapping[str, torch.nn.Module],
    batches: Iterable[ClipBatch],
    *,
    world: Path | None = None,
    device: torch.device | str = "cpu",
    enough: Callable[[ClipSet], bool] | None = None,
) -> ClipSet:
    """Every valid clip of the batches, encoded by each model; a clip that comes again is left out.

    Args:
        models: by name; each is put in eval mode and has `encode(frames uint8, log_mel) -> Encoded`. All see
            the same batch, so that clips are decoded once.
        batches: from a loader that neither shuffles nor augments.
        world: folder of the generated world, for ground truth; None for videos without.
        device: where the models are.
        enough: asked when an epoch is over (each slot holds every video once); True stops reading.

    Raises:
        ValueError: when no valid clip was read.
    """
    for model in models.values():
        model.eval()
    result = ClipSet()
    seen: set[tuple[str, float]] = set()
    known: dict[str, Truth | None] = {}
    parts: dict[str, dict[str, list[Tensor]]] = {name: {} for name in models}
    log_mels: list[Tensor] = []
    epoch: int | None = None
    for batch in batches:
        if epoch is not None and batch.epoch != epoch and enough is not None and enough(result):
            break
        epoch = batch.epoch
        result.num_bad += len(batch.bad)
        rows = []
        for row, info in enumerate(batch.clips):
            # A video with fewer seconds than there are slots comes again with the same second.
            if info is None or (info.video_id, info.start_seconds) in seen:
                continue
            seen.add((info.video_id, info.start_seconds))
            rows.append(row)
            if info.video_id not in known:
                known[info.video_id] = find_truth(world, info.video_id) if world is not None else None
            result.clips.append(info)
            result.crops.append(batch.augmentations[row])
            result.truths.append(known[info.video_id])
        if not rows:
            continue
        log_mels.append(batch.log_mel[rows, 0].half())
        frames = batch.frames[rows].to(device)
        log_mel = batch.log_mel[rows].to(device)
        for name, model in models.items():
            encoded = model.encode(frames, log_mel)
            for key in EncodedClips.__dataclass_fields__:
                parts[name].setdefault(key, []).append(getattr(encoded, key).float().cpu())
    if not result.clips:
        raise ValueError("no valid clip was read; check the shards with tools/check_shards.py")
    result.log_mel = torch.cat(log_mels)
    result.encoded = {
        name: EncodedClips(**{key: torch.cat(blocks) for key, blocks in part.items()})
        for name, part in parts.items()
    }
    return result


@dataclass(kw_only=True)
class PlacedClip:
    """A clip whose sounding object is on screen: where everything is, at each step of the maps."""

    index: int
    """Row in the ClipSet."""
    truth: Truth
    """Of its video."""
    sounding: np.ndarray
    """(T', 4): the sounding object's box in crop pixels."""
    silent: list[np.ndarray]
    """(T', 4) each: the silent objects that are visible."""


def _boxes_in_crop(
    item: TruthObject, source_fps: float, info: ClipInfo, crop: Crop, num_steps: int
) -> np.ndarray:
    """(num_steps, 4): an object's mean box at each step of a map, in pixels of the network's input."""
    source = box_ops.object_boxes_in_clip(item, source_fps, info.start_seconds)
    return box_ops.boxes_per_step(box_ops.map_boxes_to_crop(source, info, crop), num_steps)


def place_clips(clips: ClipSet, num_steps: int) -> list[PlacedClip]:
    """The clips whose sounding object is on screen and at least MIN_VISIBLE in the crop, in reading order."""
    placed = []
    for index, (info, crop, truth) in enumerate(zip(clips.clips, clips.crops, clips.truths, strict=True)):
        if truth is None or truth.sounding is None:
            continue
        sounding = _boxes_in_crop(truth.sounding, truth.fps, info, crop, num_steps)
        if box_ops.visible_share(sounding, crop.crop_size) < MIN_VISIBLE:
            continue
        silent = [_boxes_in_crop(item, truth.fps, info, crop, num_steps) for item in truth.silent]
        silent = [boxes for boxes in silent if box_ops.visible_share(boxes, crop.crop_size) >= MIN_VISIBLE]
        placed.append(PlacedClip(index=index, truth=truth, sounding=sounding, silent=silent))
    return placed


def _figure(
    values: Sequence[float],
    groups: Sequence[object],
    chance: float,
    untrained: Sequence[float],
    seed: int,
    **others: float | None,
) -> dict[str, Any]:
    """One figure as it stands in metrics.json."""
    interval = bootstrap_interval(values, groups, seed)
    return {
        "value": float(np.mean(values)) if len(values) else None,
        "chance": float(chance) if len(values) else None,
        "untrained": float(np.mean(untrained)) if len(untrained) else None,
        "num_clips": len(values),
        "num_videos": len(set(groups)),
        "interval": None if interval is None else list(interval),
        **others,
    }


def retrieval_figures(clips: ClipSet, rows: Sequence[int], seed: int = 0) -> dict[str, dict[str, Any]]:
    """`retrieval_v2a_r1`, `_r5`, `_r10` and the same for a2v, among the clips in `rows`.

    v2a asks with a clip's visual embedding for its own audio embedding among those of all rows. Chance is k /
    N. Where truth is known, `category_only` is what a network expects that knows which kind of object sounds
    and nothing more: it guesses among the clips of that kind.
    """
    rows = list(rows)
    categories = [truth.category if (truth := clips.truths[row]) is not None else None for row in rows]
    known = bool(rows) and None not in categories
    same = [categories.count(category) for category in categories]
    groups = [clips.clips[row].video_id for row in rows]
    figures = {}
    for direction in ("v2a", "a2v"):
        ranks = {}
        for name, encoded in clips.encoded.items():
            query, gallery = encoded.embedding_v[rows], encoded.embedding_a[rows]
            if direction == "a2v":
                query, gallery = gallery, query
            ranks[name] = retrieval_ranks(query, gallery).tolist() if rows else []
        for k in RECALL_AT:
            hits = {name: [float(rank <= k) for rank in values] for name, values in ranks.items()}
            chance = min(1.0, k / len(rows)) if rows else 0.0
            others = {}
            if known:
                others["category_only"] = float(np.mean([min(1.0, k / count) for count in same]))
            figures[f"retrieval_{direction}_r{k}"] = _figure(
                hits["trained"], groups, chance, hits.get("untrained", []), seed, **others
            )
    return figures


@dataclass(kw_only=True)
class ClipScore:
    """What the trained model's maps did on one clip: for ordering clips from bad to good, not for figures."""

    placed: PlacedClip
    """The clip."""
    margins: dict[str, float]
    """`preference_margin` of the guided and of the predicted map."""


def localisation_figures(
    clips: ClipSet, placed: Sequence[PlacedClip], seed: int = 0
) -> tuple[dict[str, dict[str, Any]], list[ClipScore]]:
    """`{guided,predicted}_{pointing,prefers_sounding}_{easy,hard}`, and a score per clip.

    Only clips with a silent object in sight have a score. Pointing has `center`, the hit rate of the
    picture's center, and `time_mean`, the same figure for the maximum of the map's mean over time, beside it.
    """
    values: dict[tuple[str, str, str], list[float]] = {}  # by model, figure, part
    groups: dict[tuple[str, str], list[str]] = {}  # by figure without the map's name, part
    scores = []
    for clip in placed:
        part, video_id = clip.truth.part, clips.clips[clip.index].video_id
        crop_size = clips.crops[clip.index].crop_size
        sounding = localisation.box_mask(clip.sounding, crop_size)
        silent = [localisation.box_mask(boxes, crop_size) for boxes in clip.silent]
        silent = [mask for mask in silent if mask.any()]
        groups.setdefault(("pointing", part), []).append(video_id)
        if silent:
            groups.setdefault(("prefers_sounding", part), []).append(video_id)
        baselines = {
            "chance": localisation.pointing_chance(sounding),
            "center": localisation.pointing_center(sounding),
        }
        for name, value in baselines.items():
            values.setdefault(("baseline", name, part), []).append(value)
        margins = {}
        for model, encoded in clips.encoded.items():
            for kind in MAPS:
                maps = localisation.upsample_maps(getattr(encoded, f"{kind}_v")[clip.index], crop_size)
                figures = {
                    "pointing": localisation.pointing(maps, sounding),
                    "pointing_time_mean": localisation.pointing_time_mean(maps, sounding),
                }
                if silent:
                    figures["prefers_sounding"] = localisation.prefers_sounding(maps, sounding, silent)
                    if model == "trained":
                        margins[kind] = localisation.preference_margin(maps, sounding, silent)
                for figure, value in figures.items():
                    values.setdefault((model, f"{kind}_{figure}", part), []).append(value)
        if silent:
            scores.append(ClipScore(placed=clip, margins=margins))

    def mean(*key: str) -> float | None:
        return float(np.mean(values[key])) if values.get(key) else None

    result = {}
    for part in PARTS:
        for kind in MAPS:
            result[f"{kind}_pointing_{part}"] = _figure(
                values.get(("trained", f"{kind}_pointing", part), []),
                groups.get(("pointing", part), []),
                mean("baseline", "chance", part) or 0.0,
                values.get(("untrained", f"{kind}_pointing", part), []),
                seed,
                center=mean("baseline", "center", part),
                time_mean=mean("trained", f"{kind}_pointing_time_mean", part),
            )
            result[f"{kind}_prefers_sounding_{part}"] = _figure(
                values.get(("trained", f"{kind}_prefers_sounding", part), []),
                groups.get(("prefers_sounding", part), []),
                0.5,
                values.get(("untrained", f"{kind}_prefers_sounding", part), []),
                seed,
            )
    return result, scores


def listening_figures(
    clips: ClipSet, placed: Sequence[PlacedClip], audio: AudioConfig, seed: int = 0
) -> dict[str, dict[str, Any]]:
    """`{guided,predicted}_band_share_{easy,hard}`: audio maps' share of energy in the timbre's bands.

    Chance is the same share in the bands of the other categories that occur, averaged: a map that always
    favors, say, low frequencies gains nothing by it. `uniform` is the share of a constant map. Empty when no
    bands are known.
    """
    center_hz = localisation.mel_center_hz(audio.num_mel_bins, 0, audio.sample_rate / 2)
    rows_of = {}
    for clip in placed:
        if clip.truth.bands_hz:
            rows_of.setdefault(clip.truth.category, localisation.band_rows(clip.truth.bands_hz, center_hz))
    if len(rows_of) < 2:
        return {}
    result = {}
    for part in PARTS:
        chosen = [clip for clip in placed if clip.truth.part == part and clip.truth.bands_hz]
        groups = [clips.clips[clip.index].video_id for clip in chosen]
        for kind in MAPS:
            shares: dict[str, list[float]] = {"trained": [], "untrained": [], "other": [], "uniform": []}
            for clip in chosen:
                rows = localisation.band_rows(clip.truth.bands_hz, center_hz)
                shares["uniform"].append(float(rows.mean()))
                others = [other for category, other in rows_of.items() if category != clip.truth.category]
                for model, encoded in clips.encoded.items():
                    audio_map = getattr(encoded, f"{kind}_a")[clip.index]
                    energy = localisation.band_energy(audio_map, audio.num_mel_bins)  # (F,)
                    shares[model].append(float(energy[rows].sum()))
                    if model == "trained":
                        shares["other"].append(float(np.mean([energy[other].sum() for other in others])))
            result[f"{kind}_band_share_{part}"] = _figure(
                shares["trained"],
                groups,
                float(np.mean(shares["other"])) if chosen else 0.0,
                shares["untrained"],
                seed,
                uniform=float(np.mean(shares["uniform"])) if chosen else None,
            )
    return result


def choose_retrieval_rows(clips: ClipSet, placed: Sequence[PlacedClip] | None, num_clips: int) -> list[int]:
    """Rows for retrieval: the first `num_clips` in reading order; with truth, placed clips of the easy part.

    The loader reads slot by slot and a slot holds each video once, so these are clips of different videos as
    far as there are enough, then further seconds of the same videos.
    """
    if placed is None:
        return list(range(clips.num_clips))[:num_clips]
    return [clip.index for clip in placed if clip.truth.part == "easy"][:num_clips]


@dataclass(kw_only=True)
class Evaluation:
    """Everything that a report needs about the clips."""

    clips: ClipSet
    """The clips and what the models said."""
    figures: dict[str, dict[str, Any]]
    """As in metrics.json."""
    scores: list[ClipScore]
    """One per clip of the generated world with both a sounding and a silent object in sight; else empty."""
    retrieval_rows: list[int]
    """Rows of the clips among which retrieval was measured."""
    num_placed: int
    """Clips with the sounding object in sight."""


def evaluate_clips(
    clips: ClipSet, audio: AudioConfig, *, num_retrieval_clips: int = 256, seed: int = 0
) -> Evaluation:
    """All figures for encoded clips: localisation, listening and retrieval where truth is known, else
    retrieval.

    `clips.encoded` holds `trained` and, for comparison, `untrained`.
    """
    known = any(truth is not None for truth in clips.truths)
    if not known:
        rows = choose_retrieval_rows(clips, None, num_retrieval_clips)
        figures = retrieval_figures(clips, rows, seed)
        return Evaluation(clips=clips, figures=figures, scores=[], retrieval_rows=rows, num_placed=0)
    num_steps = clips.encoded["trained"].guided_v.shape[1]
    placed = place_clips(clips, num_steps)
    figures, scores = localisation_figures(clips, placed, seed)
    rows = choose_retrieval_rows(clips, placed, num_retrieval_clips)
    figures.update(retrieval_figures(clips, rows, seed))
    figures.update(listening_figures(clips, placed, audio, seed))
    return Evaluation(
        clips=clips, figures=figures, scores=scores, retrieval_rows=rows, num_placed=len(placed)
    )


def evaluate_world(
    model: torch.nn.Module,
    untrained: torch.nn.Module | None,
    batches: Iterable[ClipBatch],
    audio: AudioConfig,
    *,
    world: Path | None,
    num_retrieval_clips: int = 256,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> Evaluation:
    """Figures of `model` beside chance and an untrained network of the same configuration.

    Args:
        model: has `encode(frames uint8, log_mel) -> Encoded`.
        untrained: the same network with fresh weights from a seed; None leaves `untrained` empty.
        batches: epochs of a loader without shuffling and augmentation, one slot each. Whole epochs are read
            until there are `num_retrieval_clips` clips of the easy part, or no more batches.
        audio: the loader's configuration, for frequency bands.
        world: folder of the generated world; None: videos without ground truth, then only retrieval is
            measured.
        num_retrieval_clips: size of the gallery.
        device: where the models are.
        seed: of the bootstrap.
    """
    models = {"trained": model} if untrained is None else {"trained": model, "untrained": untrained}

    def enough(clips: ClipSet) -> bool:
        if world is None:
            return clips.num_clips >= num_retrieval_clips
        placed = place_clips(clips, num_steps=1)
        return len(choose_retrieval_rows(clips, placed, num_retrieval_clips)) >= num_retrieval_clips

    clips = encode_clips(models, batches, world=world, device=device, enough=enough)
    if world is not None and all(truth is None for truth in clips.truths):
        raise ValueError(
            f"{world}: no ground truth for any video of these shards (looked for {clips.clips[0].video_id} "
            "with .json in it and in its test folder); give the folder that was sliced, or leave --world out"
        )
    return evaluate_clips(clips, audio, num_retrieval_clips=num_retrieval_clips, seed=seed)
