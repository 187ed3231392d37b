"""Where does the network look for the source of a sound? The figures of Flickr-SoundNet and VGG-SS, and of the
generated world, for what the paper shows as pictures only (section 4.5, Fig. 5).

A map and its ground truth g are compared at a common size of 224x224. g is 0 outside of all boxes and at most 1
inside; with several annotators one vote alone counts less than 1 (`truth_map`).

    map -> bilinear 224x224 -> which pixels are selected (`THRESHOLDS`) -> cIoU = sum(p g) / (sum(g) + sum(p [g = 0]))

cIoU@0.5 is the share of samples with a cIoU of at least 0.5, AUC the area under that share over the thresholds 0,
0.05, ..., 1, as the code of "Localizing Visual Sounds the Hard Way" (LVS) computes them. By that rule half of the
picture is always selected, which assumes the size of objects and which a map that is right everywhere may fail:
so figures that need no threshold stand beside it (average precision and best F1 over pixels, pointing), and every
figure is also that of the whole picture, of its center, of noise and of the same network with random weights
(`baseline_maps`), computed by the same function.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from cmac.evaluation import boxes as box_ops
from cmac.evaluation import localisation
from cmac.evaluation.intervals import bootstrap_interval
from cmac.evaluation.world import ClipSet, place_clips

if TYPE_CHECKING:
    from cmac.evaluation.truth import Truth

SIZE = 224
"""Side of maps and ground truth when they are compared, pixels."""
IOU_THRESHOLD = 0.5
"""A cIoU of at least this is a success."""
AUC_THRESHOLDS = tuple(0.05 * step for step in range(21))
"""Thresholds of the area under the success curve."""
CONFIDENT_SHARE = 0.25
"""A map's confidence is the mean of this share of its pixels, the highest ones (as the SLAVC code has it)."""

Threshold = Literal["top-half", "half-range", "absolute"]
THRESHOLDS: tuple[str, ...] = get_args(Threshold)
"""How pixels are selected.

`top-half`: those above the median, the rule of LVS and of all who compare with it. Its code takes the upper one of
the two middle values. `half-range`: at least 0.5 after the map was stretched to [0, 1]. `absolute`: at least 0.5 as
the network gave it, the rule of SLAVC; with it a map can say that nothing sounds.
"""


# ----------------------------------------------------------------------------------------------------
# One map against one ground truth
# ----------------------------------------------------------------------------------------------------


def select_pixels(maps: Tensor, threshold: Threshold = "top-half") -> Tensor:
    """Pixels that a map says sound: (..., H, W) -> bool (..., H, W); see `THRESHOLDS`.

    Choice: of a constant map nothing is selected by the two rules that compare pixels with each other. (The LVS
    code does so with its own rule: no pixel is above the median.)
    """
    flat = maps.double().flatten(-2)
    if threshold == "top-half":
        middle = flat.kthvalue(flat.shape[-1] // 2 + 1, dim=-1, keepdim=True).values
        selected = flat > middle
    elif threshold == "half-range":
        low, high = flat.amin(dim=-1, keepdim=True), flat.amax(dim=-1, keepdim=True)
        selected = (flat - low >= 0.5 * (high - low)) & (high - low > 1e-12)
    elif threshold == "absolute":
        selected = flat >= 0.5
    else:
        raise ValueError(f"threshold is {threshold!r}, expected {' or '.join(THRESHOLDS)}")
    return selected.view(maps.shape)


def consensus_iou(selected: Tensor, truth: Tensor) -> float:
    """cIoU of Senocak et al.: sum(p g) / (sum(g) + sum(p [g = 0])).

    Args:
        selected: p, bool (H, W).
        truth: g, (H, W) in [0, 1], not all zero.

    Raises:
        ValueError: the shapes differ or there is no truth.
    """
    if selected.shape != truth.shape:
        raise ValueError(
            f"selected is {tuple(selected.shape)} and truth {tuple(truth.shape)}, expected the same"
        )
    total = truth.sum().item()
    if total <= 0:
        raise ValueError("the ground truth is zero everywhere, expected a box; leave the sample out")
    missed = (selected & (truth == 0)).sum().item()
    return (truth * selected).sum().item() / (total + missed)


def success_area(iou: float) -> float:
    """What one sample adds to the AUC: the area by trapezoids under [iou >= t] for t = 0, 0.05, ..., 1.

    The mean over samples is the AUC of the LVS code (`sklearn.metrics.auc` of the success curve), for the
    trapezoid rule is linear; so it has an interval as every mean.
    """
    passed = [float(iou >= threshold) for threshold in AUC_THRESHOLDS]
    return sum((left + right) / 2 * 0.05 for left, right in zip(passed, passed[1:]))


def pixel_scores(maps: Tensor, truth: Tensor) -> tuple[float, float]:
    """(average precision, best F1) of pixels ranked by the map, those with g > 0 being what is to be found.

    Average precision is sum over n of (R_n - R_(n-1)) P_n over the distinct values of the map, without
    interpolation, as scikit-learn has it; that of a constant map is the share of pixels with g > 0.

    Args:
        maps: any shape.
        truth: same shape, in [0, 1] or bool, not all zero.
    """
    values = maps.double().flatten().numpy()
    order = np.argsort(-values)
    values, positive = values[order], (truth.flatten() > 0).numpy()[order]
    last = np.append(values[1:] < values[:-1], True)  # the last of each run of equal values
    hits = np.cumsum(positive)[last]
    found = np.flatnonzero(last) + 1
    total = int(hits[-1])
    if total == 0:
        raise ValueError("the ground truth is zero everywhere, expected a box; leave the sample out")
    gained = np.diff(hits, prepend=0) / total
    return float((gained * hits / found).sum()), float((2 * hits / (found + total)).max())


def confidence(maps: Tensor) -> float:
    """How sure a map is that something in sight sounds: mean of the highest quarter of its values."""
    values = maps.double().flatten().numpy()
    count = max(1, int(len(values) * CONFIDENT_SHARE))
    return float(np.partition(values, len(values) - count)[-count:].mean())


# ----------------------------------------------------------------------------------------------------
# Many samples, some of which have no visible source
# ----------------------------------------------------------------------------------------------------


def detection_scores(
    ious: Sequence[float | None], confidences: Sequence[float]
) -> tuple[float, float] | None:
    """(average precision, best F1) of saying where something sounds, and of not saying it where nothing does.

    As the SLAVC code has it. At a confidence threshold a sample is a true positive when its source is visible, the
    map is confident and its cIoU at least 0.5; a false positive when the map is confident and either there is no
    visible source or the place is wrong; a false negative when the source is visible and the map not confident.
    F1 = 2 TP / (2 TP + FP + FN), the best over all thresholds. Average precision is the area under the envelope
    (highest precision at this recall or a higher one) of precision TP / (TP + FP) over recall TP / (TP + FN).

    Choice: all distinct confidences are thresholds and recall starts at 0; the SLAVC code takes every 200th part and
    starts at the second.

    Args:
        ious: cIoU of each sample; None where no source is visible.
        confidences: `confidence` of each sample's map.

    Returns:
        None unless there are samples of both kinds.
    """
    if len(ious) != len(confidences):
        raise ValueError(f"{len(ious)} cIoU and {len(confidences)} confidences, expected as many")
    if all(iou is None for iou in ious) or None not in ious:
        return None
    scores = np.asarray(confidences, dtype=np.float64)
    order = np.argsort(-scores, kind="stable")
    scores = scores[order]
    visible = np.array([iou is not None for iou in ious])[order]
    right = np.array([iou is not None and iou >= IOU_THRESHOLD for iou in ious])[order]
    last = np.append(scores[1:] < scores[:-1], True)
    true = np.cumsum(right)[last]
    false = np.cumsum(~right)[last]
    missed = visible.sum() - np.cumsum(visible)[last]
    precision = true / (true + false)
    recall = np.divide(true, true + missed, out=np.zeros(len(true)), where=true + missed > 0)
    envelope = np.maximum.accumulate(precision[::-1])[::-1]
    area = float((np.diff(recall, prepend=0.0) * envelope).sum())
    return area, float((2 * true / (2 * true + false + missed)).max())


# ----------------------------------------------------------------------------------------------------
# Ground truth
# ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class StoredClip:
    """Where a clip's pixels came from, as numbers that lie in a store of features beside the maps.

    Stands for both the `ClipInfo` and the `ClipAugmentation` of a clip where boxes are mapped
    (`boxes.map_boxes_to_crop`, `world.place_clips`).
    """

    video_id: str
    start_seconds: float
    source_width: float
    """Pixels of the source frame in display orientation."""
    source_height: float
    source_crop: tuple[float, float, float, float]
    """(x, y, width, height): the part of it that was scaled."""
    scaled_width: float
    """Pixels of the frame the crop was cut from."""
    scaled_height: float
    crop_left: float
    crop_top: float
    crop_size: int
    """Side of the network's input, pixels."""
    flip: bool

    @classmethod
    def numbers(cls, info: Any, crop: Any) -> list[float]:
        """What `from_numbers` takes, of a `ClipInfo` and a `ClipAugmentation`."""
        placed = (crop.scaled_width, crop.scaled_height, crop.crop_left, crop.crop_top, crop.crop_size)
        return [info.source_width, info.source_height, *info.source_crop, *placed, float(crop.flip)]

    @classmethod
    def from_numbers(cls, numbers: Sequence[float], video_id: str, start_seconds: float) -> StoredClip:
        """Inverse of `numbers`; the rest of a clip a store of features knows by itself."""
        numbers = [float(number) for number in numbers]
        return cls(
            video_id=video_id,
            start_seconds=float(start_seconds),
            source_width=numbers[0],
            source_height=numbers[1],
            source_crop=tuple(numbers[2:6]),
            scaled_width=numbers[6],
            scaled_height=numbers[7],
            crop_left=numbers[8],
            crop_top=numbers[9],
            crop_size=round(numbers[10]),
            flip=bool(numbers[11]),
        )


def truth_map(
    boxes: Sequence[Sequence[float]], votes: int, clip: StoredClip | None = None, size: int = SIZE
) -> Tensor:
    """g of one sample: float64 (size, size), min(1, number of boxes that cover a pixel / votes).

    Choice: edges are cut down to whole pixels of the common size and negative ones are taken as 0, as the LVS code
    does, so that the same map has the same cIoU; elsewhere in this package a pixel belongs to a box when its center
    does.

    Args:
        boxes: x0, y0, x1, y1 each, relative to the whole frame's width and height.
        votes: boxes that make a pixel certain: 2 for Flickr-SoundNet (of three annotators), 1 for VGG-SS.
        clip: the part of the frame that the network saw; None: all of it.
        size: side of the map.
    """
    total = torch.zeros(size, size, dtype=torch.float64)
    for box in boxes:
        edges = np.clip(np.asarray(box, dtype=np.float64), 0, 1)
        if clip is None:
            edges = np.floor(edges * size)
        else:
            frame = [clip.source_width, clip.source_height] * 2
            edges = box_ops.map_boxes_to_crop(edges * frame, clip, clip) * (size / clip.crop_size)
            edges = np.floor(np.clip(edges, 0, size) + 1e-4)  # numbers of clip were rounded to float32
        total += localisation.box_mask(edges[None], size)[0]
    return (total / votes).clamp(max=1)


def share_outside(boxes: Sequence[Sequence[float]], votes: int, clip: StoredClip) -> float:
    """Share of the ground truth of the whole frame that the network did not see, 0..1; see `truth_map`."""
    whole = truth_map(boxes, votes).sum().item()
    if whole == 0:
        return 0.0
    across = clip.crop_size * clip.source_crop[2] / clip.scaled_width
    down = clip.crop_size * clip.source_crop[3] / clip.scaled_height
    part = across * down / (clip.source_width * clip.source_height)
    return min(1.0, max(0.0, 1 - truth_map(boxes, votes, clip).sum().item() * part / whole))


# ----------------------------------------------------------------------------------------------------
# Samples and their figures
# ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Sample:
    """Ground truth of one clip at the steps of its maps."""

    sample_id: str
    """Of the video or pair: samples that share it are resampled together."""
    truth: Callable[[], Tensor] | None
    """Makes g, (T', SIZE, SIZE) or, where nothing moves, (1, SIZE, SIZE), anew each time: that of all samples would
    fill the memory. None: no visible source."""
    step: int
    """The map's step at the annotated moment."""

    def truth_at_step(self) -> Tensor | None:
        """g at the annotated moment, (SIZE, SIZE); None: no visible source."""
        if self.truth is None:
            return None
        truth = self.truth()
        return truth[self.step if len(truth) > 1 else 0]


FIGURES = ("cIoU@0.5", "AUC", "pixel AP", "pixel max-F1", "pointing")
"""Means over the samples with a visible source."""
DETECTION_FIGURES = ("detection AP", "detection max-F1")
"""Over all samples, where some have no visible source (`detection_scores`)."""


def step_at(offset_seconds: float, clip_seconds: float, num_steps: int) -> int:
    """The map's step that shows a moment of the clip. num_steps: T'; a moment between two belongs to the later."""
    return min(num_steps - 1, max(0, int(offset_seconds / clip_seconds * num_steps + 1e-6)))


@dataclass(frozen=True, kw_only=True)
class SampleScores:
    """What one map did on one sample."""

    figures: dict[str, float]
    """By name, of `FIGURES`; empty where no source is visible."""
    iou: float | None
    """cIoU; None where no source is visible, or where only steps were compared (`score_all_steps`)."""
    confidence: float
    """Of the map."""


def score_map(
    maps: Tensor,
    truth: Tensor | None,
    threshold: Threshold = "top-half",
    selected: Tensor | None = None,
) -> SampleScores:
    """Every figure of one map at one moment. What is compared with the network goes through here too.

    Args:
        maps: (H', W') of any size.
        truth: g, (SIZE, SIZE); None: no visible source.
        threshold: which pixels are selected.
        selected: bool (SIZE, SIZE), in place of what threshold selects: for the whole picture, which no rule that
            compares pixels with each other would select.
    """
    up = localisation.upsample_maps(maps, SIZE)  # (SIZE, SIZE)
    sure = confidence(up)
    if truth is None:
        return SampleScores(figures={}, iou=None, confidence=sure)
    iou = consensus_iou(select_pixels(up, threshold) if selected is None else selected, truth)
    average_precision, best_f1 = pixel_scores(up, truth)
    figures = {
        "cIoU@0.5": float(iou >= IOU_THRESHOLD),
        "AUC": success_area(iou),
        "pixel AP": average_precision,
        "pixel max-F1": best_f1,
        "pointing": localisation.pointing(up[None], (truth > 0)[None]),
    }
    return SampleScores(figures=figures, iou=iou, confidence=sure)


@dataclass(kw_only=True)
class ScoreList:
    """What one kind of map did on all samples, in their order."""

    scores: list[SampleScores] = field(default_factory=list)

    @property
    def num_visible(self) -> int:
        """Samples with a visible source."""
        return sum(bool(score.figures) for score in self.scores)

    def figures(self) -> dict[str, float]:
        """Means by name of `FIGURES`, and `DETECTION_FIGURES` where there are samples of both kinds."""
        seen = [score.figures for score in self.scores if score.figures]
        means = {name: float(np.mean([row[name] for row in seen])) for name in seen[0]} if seen else {}
        detection = None
        if "cIoU@0.5" in means:
            ious = [score.iou for score in self.scores]
            detection = detection_scores(ious, [score.confidence for score in self.scores])
        if detection is not None:
            means.update(zip(DETECTION_FIGURES, detection))
        return means

    def intervals(self, groups: Sequence[str], seed: int = 0) -> dict[str, tuple[float, float]]:
        """95 % bootstrap intervals of the means; groups: `Sample.sample_id` of each."""
        rows = [number for number, score in enumerate(self.scores) if score.figures]
        result = {}
        for name in self.scores[rows[0]].figures if rows else ():
            values = [self.scores[row].figures[name] for row in rows]
            interval = bootstrap_interval(values, [groups[row] for row in rows], seed)
            assert interval is not None
            result[name] = interval
        return result


def moments(maps: Tensor, step: int) -> dict[str, Tensor]:
    """The two maps (H', W') that stand for a map over time (T', H', W'): `slice` at the annotated moment and
    `mean` over time."""
    return {"slice": maps[step], "mean": maps.double().mean(dim=0)}


def score_maps(
    samples: Sequence[Sample],
    maps: Mapping[str, Tensor],
    threshold: Threshold = "top-half",
) -> dict[str, ScoreList]:
    """Scores of each map's `slice` and `mean` (`moments`), by `NAME-slice` and `NAME-mean`.

    Args:
        samples: N of them.
        maps: by name (`guided` for s of Eq. (4), `predicted` for s-hat of Eq. (5), ...), (N, T', H', W') each.
        threshold: which pixels are selected.
    """
    result: dict[str, ScoreList] = {}
    for number, sample in enumerate(samples):
        truth = sample.truth_at_step()
        for name, values in maps.items():
            for moment, still in moments(values[number], sample.step).items():
                score = score_map(still, truth, threshold)
                result.setdefault(f"{name}-{moment}", ScoreList()).scores.append(score)
    return result


def score_all_steps(samples: Sequence[Sample], maps: Tensor) -> ScoreList:
    """`pixel AP` and `pointing` (`localisation.pointing`) over time and space: maps against moving boxes.

    Choice: no cIoU, whose rule to select half of the pixels is one for a picture.

    maps: (N, T', H', W'); samples have a truth of T' steps.
    """
    result = ScoreList()
    for sample, values in zip(samples, maps, strict=True):
        up = localisation.upsample_maps(values, SIZE)  # (T', SIZE, SIZE)
        figures = {}
        if sample.truth is not None:
            truth = sample.truth().expand_as(up) > 0
            figures = {"pixel AP": pixel_scores(up, truth)[0], "pointing": localisation.pointing(up, truth)}
        result.scores.append(SampleScores(figures=figures, iou=None, confidence=confidence(up)))
    return result


# ----------------------------------------------------------------------------------------------------
# What any map has to be compared with
# ----------------------------------------------------------------------------------------------------


def center_map() -> Tensor:
    """A Gaussian about the picture's center, standard deviation a quarter of its side: (SIZE, SIZE).

    By `top-half` a centered disc of half the picture's area is selected.
    """
    offsets = (torch.arange(SIZE, dtype=torch.float64) + 0.5) / SIZE - 0.5
    squares = offsets[:, None] ** 2 + offsets[None, :] ** 2
    return torch.exp(-squares / (2 * 0.25**2))


def random_maps(num_samples: int, height: int, width: int, seed: int) -> Tensor:
    """Noise of a map's own resolution, uniform in [0, 1): (num_samples, height, width)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(num_samples, height, width, generator=generator, dtype=torch.float64)


def score_baselines(
    samples: Sequence[Sample],
    map_size: tuple[int, int],
    threshold: Threshold = "top-half",
    seed: int = 0,
    num_draws: int = 5,
) -> dict[str, list[ScoreList]]:
    """Scores of `whole-image`, `center` and, once per draw, `random`, by the function that scores the network.

    Args:
        samples: N of them.
        map_size: (H', W') of the network's maps, which noise has too.
        threshold: which pixels are selected; of the whole image always all.
        seed: of the first draw; the others count up from it.
        num_draws: of noise.
    """
    everything = torch.ones(SIZE, SIZE, dtype=torch.bool)
    constant, center = torch.ones(1, 1), center_map()
    noise = [random_maps(len(samples), *map_size, seed + draw) for draw in range(num_draws)]
    result = {
        "whole-image": [ScoreList()],
        "center": [ScoreList()],
        "random": [ScoreList() for _ in noise],
    }
    for number, sample in enumerate(samples):
        truth = sample.truth_at_step()
        result["whole-image"][0].scores.append(score_map(constant, truth, threshold, everything))
        result["center"][0].scores.append(score_map(center, truth, threshold))
        for scores, maps in zip(result["random"], noise):
            scores.scores.append(score_map(maps[number], truth, threshold))
    return result


def baselines_over_steps(
    samples: Sequence[Sample], map_size: tuple[int, int, int], seed: int = 0, num_draws: int = 5
) -> dict[str, list[ScoreList]]:
    """As `score_baselines`, by `score_all_steps`: a constant map, the center, and noise in time and space.

    map_size: (T', H', W') of the network's maps.
    """
    count, (steps, height, width) = len(samples), map_size
    noise = (
        random_maps(count * steps, height, width, seed + draw).view(count, steps, height, width)
        for draw in range(num_draws)
    )
    return {
        "whole-image": [score_all_steps(samples, torch.ones(1, 1, 1, 1).expand(count, steps, 1, 1))],
        "center": [score_all_steps(samples, center_map().expand(count, steps, SIZE, SIZE))],
        "random": [score_all_steps(samples, maps) for maps in noise],
    }


# ----------------------------------------------------------------------------------------------------
# Samples of the three data sets
# ----------------------------------------------------------------------------------------------------


def annotated_sample(
    boxes: Sequence[Sequence[float]], votes: int, clip: StoredClip, step: int
) -> tuple[Sample | None, float]:
    """(sample, share of its ground truth outside of what the network saw); no sample where all of it is.

    boxes and votes as for `truth_map`.
    """
    outside = share_outside(boxes, votes, clip)
    if truth_map(boxes, votes, clip).sum() == 0:
        return None, outside
    sample = Sample(sample_id=clip.video_id, truth=lambda: truth_map(boxes, votes, clip)[None], step=step)
    return sample, outside


def world_samples(
    clips: Sequence[StoredClip], truths: Sequence[Truth | None], num_steps: int
) -> tuple[list[Sample | None], list[str]]:
    """Samples of clips of the generated world, and why there is none (else an empty text), by clip.

    A clip whose sound is off-screen or that is silent is a sample without a visible source. `no-truth`: nothing is
    known of the clip's video; `outside-crop`: its sounding object is not in sight (`world.MIN_VISIBLE`).

    Args:
        clips: N of them.
        truths: ground truth of each clip's video.
        num_steps: T' of the maps; the annotated moment is the clip's middle.
    """
    known = ClipSet(clips=list(clips), crops=list(clips), truths=list(truths))
    placed = {clip.index: clip for clip in place_clips(known, num_steps)}
    step = step_at(0.5, 1.0, num_steps)
    samples: list[Sample | None] = []
    reasons = []
    for number, (clip, truth) in enumerate(zip(clips, truths, strict=True)):
        reason, make_truth = "", None
        if truth is None:
            reason = "no-truth"
        elif truth.sounding is not None:
            if number in placed:
                boxes = placed[number].sounding * (SIZE / clip.crop_size)
                make_truth = partial(_moving_truth, boxes)
            else:
                reason = "outside-crop"
        reasons.append(reason)
        samples.append(None if reason else Sample(sample_id=clip.video_id, truth=make_truth, step=step))
    return samples, reasons


def _moving_truth(boxes: np.ndarray) -> Tensor:
    """g of a box at each step, (T', SIZE, SIZE); boxes: (T', 4) in pixels of the common size."""
    return localisation.box_mask(boxes, SIZE).double()
