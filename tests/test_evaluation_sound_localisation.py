"""Figures of sound localisation against cases worked by hand, scikit-learn, and loops that spell the definitions
out; annotations as the test sets have them."""

import json
import math

import numpy as np
import pytest
import torch
from loaders_media import clip_info

from cmac.evaluation import sound_localisation as figures
from cmac.evaluation.sound_localisation import Sample, ScoreList, StoredClip
from cmac.evaluation.truth import Truth, TruthObject
from loaders import localisation_sets as sets
from loaders.augment import ClipAugmentation

SIZE = figures.SIZE


def box_truth(x0: int, y0: int, x1: int, y1: int, value: float = 1.0) -> torch.Tensor:
    """g with one box, in pixels of the common size."""
    truth = torch.zeros(SIZE, SIZE, dtype=torch.float64)
    truth[y0:y1, x0:x1] = value
    return truth


def still_sample(sample_id: str, truth: torch.Tensor | None, step: int = 0) -> Sample:
    """A sample whose truth, (SIZE, SIZE) or (T', SIZE, SIZE), is known; None: no visible source."""
    if truth is None:
        return Sample(sample_id=sample_id, truth=None, step=step)
    stack = truth[None] if truth.dim() == 2 else truth
    return Sample(sample_id=sample_id, truth=lambda: stack, step=step)


def smooth_map(seed: int, side: int = 8) -> torch.Tensor:
    return torch.rand(side, side, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# --- selecting pixels ---


def test_top_half_selects_what_is_above_the_upper_middle_value():
    values = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    # Six values: the upper one of the middle two is 4, above it are 5 and 6. With eight, half less one.
    assert figures.select_pixels(values).tolist() == [[False, False, False], [False, True, True]]
    assert figures.select_pixels(torch.arange(8.0).view(2, 4)).sum() == 3
    assert figures.select_pixels(torch.rand(SIZE, SIZE)).sum() == SIZE * SIZE // 2 - 1
    assert not figures.select_pixels(torch.full((4, 4), 0.7)).any()


def test_top_half_is_the_rule_of_the_lvs_code():
    for seed in range(5):
        values = smooth_map(seed, 32).numpy()
        middle = np.sort(values.flatten())[int(values.shape[0] * values.shape[1] / 2)]
        assert np.array_equal(figures.select_pixels(torch.from_numpy(values)).numpy(), values > middle)


def test_half_range_is_after_stretching_and_absolute_before_it():
    values = torch.tensor([[0.6, 0.71], [0.79, 0.8]])
    assert figures.select_pixels(values, "half-range").tolist() == [[False, True], [True, True]]
    assert figures.select_pixels(values, "absolute").all()
    assert not figures.select_pixels(0.5 * values, "absolute").any()
    assert not figures.select_pixels(torch.full((2, 2), 0.7), "half-range").any()
    with pytest.raises(ValueError, match="top-half or half-range or absolute"):
        figures.select_pixels(values, "otsu")


# --- consensus IoU and what is made of it ---


def test_consensus_iou_of_a_case_worked_by_hand():
    truth = torch.tensor([[1.0, 0.5, 0.0], [0.0, 0.0, 0.0]])
    selected = torch.tensor([[True, True, True], [True, False, False]])
    # p g: 1 + 0.5. g: 1.5. Selected where g = 0: 2.
    assert figures.consensus_iou(selected, truth) == pytest.approx(1.5 / 3.5)
    # A pixel that one annotator alone marked is never a mistake, and counts as half.
    only_half = torch.tensor([[False, True, False], [False, False, False]])
    assert figures.consensus_iou(only_half, truth) == pytest.approx(0.5 / 1.5)


def test_consensus_iou_equals_jaccard_where_truth_is_whole():
    metrics = pytest.importorskip("sklearn.metrics")
    for seed in range(4):
        selected = smooth_map(seed, 16) > 0.5
        truth = smooth_map(100 + seed, 16) > 0.7
        expected = metrics.jaccard_score(truth.flatten(), selected.flatten())
        assert figures.consensus_iou(selected, truth.double()) == pytest.approx(expected)


def test_consensus_iou_refuses_a_sample_without_truth():
    with pytest.raises(ValueError, match="leave the sample out"):
        figures.consensus_iou(torch.ones(2, 2, dtype=torch.bool), torch.zeros(2, 2))


def test_area_equals_scikit_learn_on_the_success_curve():
    metrics = pytest.importorskip("sklearn.metrics")
    ious = np.random.default_rng(0).random(37)
    curve = [np.mean(ious >= 0.05 * i) for i in range(21)]
    expected = metrics.auc([0.05 * i for i in range(21)], curve)
    assert np.mean([figures.success_area(iou) for iou in ious]) == pytest.approx(expected)


def test_area_of_single_samples():
    # Of a miss the threshold 0 alone is passed: half a step. Of a perfect map every one.
    assert figures.success_area(0.0) == pytest.approx(0.025)
    assert figures.success_area(1.0) == pytest.approx(1.0)
    # 0.5 is passed at 0, ..., 0.5: ten whole steps and half of the next.
    assert figures.success_area(0.5) == pytest.approx(0.525)


# --- pixels ---


@pytest.mark.parametrize("levels", [3, 10_000])
def test_pixel_average_precision_equals_scikit_learn(levels):
    metrics = pytest.importorskip("sklearn.metrics")
    for seed in range(4):
        maps = (smooth_map(seed, 24) * levels).round() / levels  # with 3 levels most values are shared
        truth = smooth_map(50 + seed, 24) > 0.8
        average_precision, best = figures.pixel_scores(maps, truth)
        expected = metrics.average_precision_score(truth.flatten(), maps.flatten())
        assert average_precision == pytest.approx(expected)
        precision, recall, _ = metrics.precision_recall_curve(truth.flatten(), maps.flatten())
        assert best == pytest.approx((2 * precision * recall / (precision + recall).clip(1e-9)).max())
        if levels == 3:
            scores = [metrics.f1_score(truth.flatten(), (maps >= value).flatten()) for value in maps.unique()]
            assert best == pytest.approx(max(scores))


def test_pixel_scores_of_a_case_worked_by_hand():
    maps = torch.tensor([[0.9, 0.8], [0.7, 0.1]])
    truth = torch.tensor([[0.5, 0.0], [1.0, 0.0]])
    # By rank: hit, miss, hit. AP = 1/2 * 1/1 + 1/2 * 2/3; F1 after the third = 2 * 2 / (3 + 2).
    assert figures.pixel_scores(maps, truth) == pytest.approx((0.5 + 1 / 3, 0.8))


def test_a_constant_map_scores_the_share_of_the_picture():
    truth = box_truth(0, 0, 112, 56)
    share = 112 * 56 / SIZE**2
    score = figures.score_map(torch.full((8, 8), 0.3), truth)
    assert score.figures["pixel AP"] == pytest.approx(share)
    assert score.figures["pixel max-F1"] == pytest.approx(2 * share / (1 + share))
    assert score.figures["pointing"] == pytest.approx(share)
    assert score.iou == 0.0


# --- detection ---


def naive_detection(ious, confidences):
    """Counts at every threshold, by loops."""
    points = []
    for threshold in sorted(set(confidences), reverse=True):
        true = false = missed = 0
        for iou, sure in zip(ious, confidences):
            if iou is None:
                false += sure >= threshold
            elif sure < threshold:
                missed += 1
            elif iou >= 0.5:
                true += 1
            else:
                false += 1
        recall = true / (true + missed) if true + missed else 0.0
        points.append((true / (true + false), recall, 2 * true / (2 * true + false + missed)))
    area, before = 0.0, 0.0
    for number, (_, recall, _) in enumerate(points):
        area += (recall - before) * max(precision for precision, _, _ in points[number:])
        before = recall
    return area, max(f1 for _, _, f1 in points)


def test_detection_of_a_case_worked_by_hand():
    # In order of confidence: found (0.9), off-screen (0.8), found (0.7), in the wrong place (0.6).
    ious, confidences = [0.6, None, 0.5, 0.2], [0.9, 0.8, 0.7, 0.6]
    # Precision 1, 1/2, 2/3, 1/2 at recall 1/3, 1/3, 2/3, 1 (at the end none is missed: one was misplaced).
    area, best = figures.detection_scores(ious, confidences)
    assert area == pytest.approx(1 / 3 + 1 / 3 * 2 / 3 + 1 / 3 * 1 / 2)
    # F1: 2/4, 2/5, 4/6, 4/6.
    assert best == pytest.approx(2 / 3)


def test_detection_equals_counting_at_every_threshold():
    rng = np.random.default_rng(4)
    for _ in range(10):
        ious = [None if rng.random() < 0.3 else float(rng.random()) for _ in range(25)]
        confidences = [float(round(rng.random(), 1)) for _ in ious]  # many are shared
        assert figures.detection_scores(ious, confidences) == pytest.approx(
            naive_detection(ious, confidences)
        )


def test_detection_needs_samples_of_both_kinds():
    assert figures.detection_scores([0.3, 0.9], [0.1, 0.2]) is None
    assert figures.detection_scores([None, None], [0.1, 0.2]) is None
    assert figures.detection_scores([], []) is None


def test_a_map_that_is_flat_where_nothing_sounds_detects_perfectly():
    loud = still_sample("a", box_truth(0, 0, SIZE, SIZE // 2), step=0)
    quiet = still_sample("b", None, step=0)
    half = torch.zeros(1, 8, 8)
    half[:, :4] = 1.0
    scored = figures.score_maps([loud, quiet], {"guided": torch.stack([half, torch.full((1, 8, 8), 0.1)])})
    means = scored["guided-slice"].figures()
    assert means["detection AP"] == means["detection max-F1"] == 1.0
    swapped = figures.score_maps([loud, quiet], {"guided": torch.stack([0.1 * half, torch.ones(1, 8, 8)])})
    assert swapped["guided-slice"].figures()["detection AP"] < 1.0


# --- whole samples ---


def test_a_map_of_the_box_scores_one_and_its_opposite_zero():
    sample = still_sample("a", box_truth(0, 0, SIZE, SIZE // 2), step=1)
    maps = torch.zeros(1, 4, 8, 8)
    maps[0, 1, :4] = 1.0  # the annotated moment
    scored = figures.score_maps([sample], {"guided": maps, "predicted": 1 - maps})
    assert scored["guided-slice"].scores[0].iou > 0.93  # the map's edge is blurred by half a cell
    assert scored["guided-mean"].scores[0].iou > 0.93  # a quarter as high, and the other steps flat
    assert scored["predicted-slice"].scores[0].iou == 0.0
    assert scored["guided-slice"].figures()["pixel AP"] > 0.99
    assert scored["guided-slice"].figures()["pointing"] == 1.0


def test_slice_is_the_annotated_moment_and_mean_all():
    maps = torch.arange(4.0)[:, None, None].expand(4, 2, 2)
    assert figures.moments(maps, 3)["slice"].eq(3).all()
    assert figures.moments(maps, 3)["mean"].eq(1.5).all()
    assert [figures.step_at(t, 1.0, 4) for t in (0.0, 0.24, 0.25, 0.5, 0.99, 1.0)] == [0, 0, 1, 2, 3, 3]
    assert figures.step_at(2.5, 5.0, 1) == 0


def test_moving_boxes_are_compared_step_by_step():
    truth = torch.stack([box_truth(0, 0, SIZE, 112), box_truth(0, 112, SIZE, SIZE)])
    sample = still_sample("a", truth, step=1)
    follows = torch.zeros(1, 2, 8, 8)
    follows[0, 0, :4] = follows[0, 1, 4:] = 1.0
    right = figures.score_all_steps([sample], follows).figures()
    wrong = figures.score_all_steps([sample], follows.flip(1)).figures()
    assert set(right) == {"pixel AP", "pointing"}
    assert right["pixel AP"] > 0.99 and right["pointing"] == 1.0
    assert wrong["pixel AP"] < 0.5 and wrong["pointing"] == 0.0
    assert torch.equal(sample.truth_at_step(), truth[1])
    quiet = still_sample("b", None)
    both = figures.score_all_steps([sample, quiet], follows.expand(2, -1, -1, -1))
    assert both.figures() == right and both.num_visible == 1
    baselines = figures.baselines_over_steps([sample], (2, 8, 8), num_draws=2)
    assert baselines["whole-image"][0].figures() == pytest.approx({"pixel AP": 0.5, "pointing": 0.5})
    assert baselines["center"][0].figures()["pixel AP"] == pytest.approx(0.5, abs=0.02)
    assert len({draw.figures()["pixel AP"] for draw in baselines["random"]}) == 2


def test_intervals_hold_the_means_and_leave_out_samples_without_source():
    samples = [still_sample(str(n), box_truth(0, 0, 100, 100) if n % 4 else None) for n in range(16)]
    maps = torch.stack([smooth_map(n)[None] for n in range(16)])
    scored = figures.score_maps(samples, {"guided": maps})["guided-slice"]
    means, intervals = scored.figures(), scored.intervals([sample.sample_id for sample in samples])
    assert set(intervals) == set(figures.FIGURES)
    for name, (low, high) in intervals.items():
        assert low <= means[name] <= high and low < high
    assert means["AUC"] == pytest.approx(
        np.mean([figures.success_area(score.iou) for score in scored.scores if score.iou is not None])
    )


def bilinear(values: np.ndarray, size: int) -> np.ndarray:
    """What cv2.resize(..., INTER_LINEAR) does: pixel centers aligned, edges held."""
    place = np.clip((np.arange(size) + 0.5) * len(values) / size - 0.5, 0, len(values) - 1)
    low = np.minimum(np.floor(place).astype(int), len(values) - 2)
    weight = place - low
    rows = values[low] * (1 - weight)[:, None] + values[low + 1] * weight[:, None]
    return rows[:, low] * (1 - weight) + rows[:, low + 1] * weight


def test_figures_are_those_of_the_lvs_evaluation_spelled_out():
    """Its arithmetic from the map to the two figures, on random maps and boxes."""
    rng = np.random.default_rng(11)
    samples, maps, ious = [], [], []
    for number in range(25):
        x0, y0 = rng.random(2) * 0.25
        boxes = [(x0, y0, x0 + 0.7, y0 + 0.65), (x0, y0, x0 + 0.6, y0 + 0.7), (0.7, 0.7, 0.8, 0.9)]
        values = rng.random((8, 8))
        values[int(8 * y0) :, int(8 * x0) :][:5, :5] += rng.random()
        prediction = bilinear(values, 224)
        prediction = (prediction - prediction.min()) / (prediction.max() - prediction.min())
        middle = np.sort(prediction.flatten())[int(224 * 224 / 2)]
        selected = np.where(prediction > middle, 1.0, 0.0)
        truth = np.zeros((224, 224))
        for box in boxes:
            left, top, right, bottom = (int(224 * edge) for edge in box)
            truth[top:bottom, left:right] += 1
        truth = np.minimum(truth / 2, 1)
        ious.append((selected * truth).sum() / (truth.sum() + (selected * (truth == 0)).sum()))
        samples.append(still_sample(str(number), figures.truth_map(boxes, 2)))
        maps.append(torch.from_numpy(values)[None])
    scored = figures.score_maps(samples, {"guided": torch.stack(maps)})["guided-slice"]
    assert [score.iou for score in scored.scores] == pytest.approx(ious)
    means = scored.figures()
    assert means["cIoU@0.5"] == np.mean(np.array(ious) >= 0.5) and 0 < means["cIoU@0.5"] < 1
    curve = [np.mean(np.array(ious) >= 0.05 * i) for i in range(21)]
    assert means["AUC"] == pytest.approx(sum(0.05 * (a + b) / 2 for a, b in zip(curve, curve[1:])))


# --- baselines ---


def test_baselines_score_what_is_computed_by_hand():
    # A box of the left 3/5 of the picture, to its full height.
    truth = box_truth(0, 0, 134, SIZE)
    samples = [still_sample(str(n), truth, step=0) for n in range(12)]
    baselines = figures.score_baselines(samples, (8, 8), num_draws=3)
    whole, center = baselines["whole-image"][0], baselines["center"][0]
    assert whole.scores[0].iou == pytest.approx(134 / SIZE)
    assert whole.figures()["cIoU@0.5"] == 1.0 and whole.figures()["AUC"] == pytest.approx(0.575)
    # The centered disc of half the area, radius sqrt(0.5 / pi) = 0.3989: right of x = 0.598 lies a segment of angle
    # 2 acos(0.0982 / 0.3989) = 2.644, area r^2 (2.644 - sin 2.644) / 2 = 0.1724.
    angle = 2 * math.acos((134 / SIZE - 0.5) / math.sqrt(0.5 / math.pi))
    segment = 0.5 / math.pi * (angle - math.sin(angle)) / 2
    expected = (0.5 - segment) / (134 / SIZE + segment)
    assert center.scores[0].iou == pytest.approx(expected, abs=0.005)
    assert len(baselines["random"]) == 3
    # Half of the pixels at random: 0.3 of 0.6 + 0.2.
    ious = [score.iou for draw in baselines["random"] for score in draw.scores]
    assert np.mean(ious) == pytest.approx(0.299 / (0.598 + 0.201), abs=0.02)
    again = figures.score_baselines(samples[:2], (8, 8), num_draws=1)["random"][0]
    assert len({score.iou for score in again.scores}) == 2


def test_baselines_are_the_same_for_the_same_seed_and_draws_differ():
    sample = [still_sample("a", box_truth(30, 30, 120, 90), step=0)]
    first = figures.score_baselines(sample, (4, 4), seed=1, num_draws=2)["random"]
    second = figures.score_baselines(sample, (4, 4), seed=1, num_draws=2)["random"]
    assert [draw.scores[0].iou for draw in first] == [draw.scores[0].iou for draw in second]
    assert first[0].scores[0].iou != first[1].scores[0].iou


def test_no_visible_source_gives_no_figures():
    samples = [still_sample("a", None, step=0)]
    assert figures.score_maps(samples, {"guided": torch.rand(1, 2, 4, 4)})["guided-mean"].figures() == {}
    assert ScoreList().intervals([]) == {}


# --- ground truth ---


def stored(width: float, height: float, scaled: tuple[float, float], left: float, top: float, **others):
    return StoredClip(
        video_id="a",
        start_seconds=0.0,
        source_width=width,
        source_height=height,
        source_crop=(0.0, 0.0, width, height),
        scaled_width=scaled[0],
        scaled_height=scaled[1],
        crop_left=left,
        crop_top=top,
        crop_size=112,
        flip=others.get("flip", False),
    )


def test_two_votes_make_a_pixel_certain_and_one_is_half():
    boxes = [(0.0, 0.0, 0.5, 0.5), (0.25, 0.0, 0.5, 0.5), (0.25, 0.0, 0.5, 0.25)]
    truth = figures.truth_map(boxes, votes=2)
    assert truth[0, 0] == 0.5  # one
    assert truth[100, 60] == 1.0  # two
    assert truth[0, 60] == 1.0  # three are no more than two
    assert truth[200, 200] == 0.0
    assert figures.truth_map(boxes, votes=1).unique().tolist() == [0.0, 1.0]


def test_truth_of_a_squashed_frame_is_that_of_the_frame():
    boxes = [(0.1, 0.2, 0.55, 0.9), (0.31, 0.07, 0.62, 0.5)]
    clip = stored(640, 360, (112, 112), 0, 0)
    assert torch.equal(figures.truth_map(boxes, 1, clip), figures.truth_map(boxes, 1))
    assert figures.share_outside(boxes, 1, clip) == 0.0


def test_truth_of_a_crop_is_cut_with_it():
    # 400x200 scaled to 224x112, the middle 112 cut out: of the width the part from 1/4 to 3/4.
    clip = stored(400, 200, (224, 112), 56, 0)
    truth = figures.truth_map([(0.0, 0.5, 0.5, 1.0)], 1, clip)
    expected = box_truth(0, 112, 112, SIZE)
    assert torch.equal(truth, expected)
    assert figures.share_outside([(0.0, 0.5, 0.5, 1.0)], 1, clip) == pytest.approx(0.5)
    assert figures.truth_map([(0.0, 0.0, 0.2, 1.0)], 1, clip).sum() == 0
    assert figures.share_outside([(0.0, 0.0, 0.2, 1.0)], 1, clip) == 1.0
    mirrored = stored(400, 200, (224, 112), 56, 0, flip=True)
    assert torch.equal(figures.truth_map([(0.0, 0.5, 0.5, 1.0)], 1, mirrored), expected.flip(1))


def test_stored_clip_survives_as_float32_numbers():
    info = clip_info("a.mp4", 0, 192, 144, b"", b"")
    crop = ClipAugmentation(
        scaled_height=144, scaled_width=192, crop_top=8, crop_left=32, crop_size=128, flip=True
    )
    numbers = np.float32(StoredClip.numbers(info, crop))
    clip = StoredClip.from_numbers(numbers, "a.mp4", 2.0)
    assert (clip.source_width, clip.source_height, clip.source_crop) == (384, 288, (0, 0, 384, 288))
    assert (clip.scaled_width, clip.crop_left, clip.crop_top, clip.crop_size) == (192, 32, 8, 128)
    assert clip.flip and clip.start_seconds == 2.0


def test_a_source_outside_of_the_crop_gives_no_sample():
    clip = stored(400, 200, (224, 112), 56, 0)
    sample, outside = figures.annotated_sample([(0.0, 0.5, 0.5, 1.0)], 1, clip, step=1)
    assert outside == pytest.approx(0.5) and torch.equal(sample.truth_at_step(), box_truth(0, 112, 112, SIZE))
    assert figures.annotated_sample([(0.0, 0.0, 0.2, 1.0)], 1, clip, step=1) == (None, 1.0)


def world_truth(sound: str, x0: float = 10.0) -> Truth:
    """One object that moves 60 pixels to the right within the second in which it is seen, at 32 fps."""
    boxes = np.array([[x0 + 60 * (i / 31), 32.0, x0 + 32 + 60 * (i / 31), 64.0] for i in range(32)])
    item = TruthObject(category="bell", sounding=sound == "on-screen", moving=True, boxes=boxes)
    return Truth(
        part="easy",
        sound=sound,
        category="bell",
        fps=32.0,
        width=128,
        height=128,
        objects=(item,),
        bands_hz=(),
    )


def test_world_boxes_follow_the_object_and_sounds_without_source_have_none():
    clip = StoredClip(
        video_id="a.mp4",
        start_seconds=0.0,
        source_width=128,
        source_height=128,
        source_crop=(0.0, 0.0, 128.0, 128.0),
        scaled_width=128,
        scaled_height=128,
        crop_left=0,
        crop_top=0,
        crop_size=112,
        flip=False,
    )
    truths = [world_truth("on-screen"), world_truth("off-screen"), world_truth("silent"), None]
    truths.append(world_truth("on-screen", x0=400.0))
    samples, reasons = figures.world_samples([clip] * 5, truths, num_steps=4)
    assert reasons == ["", "", "", "no-truth", "outside-crop"]
    assert samples[1].truth is None and samples[2].truth is None and samples[3:] == [None, None]
    truth = samples[0].truth()
    assert truth.shape == (4, SIZE, SIZE) and samples[0].step == 2
    centers = [float((row.sum(dim=0) * torch.arange(SIZE)).sum() / row.sum()) for row in truth]
    # A step is eight frames: the object's center moves by 8 * 60 / 31 = 15.5 pixels of 112, twice that of 224.
    assert np.diff(centers) == pytest.approx([2 * 8 * 60 / 31] * 3, abs=1.0)
    assert truth[0].sum() == pytest.approx((2 * 32) ** 2, rel=0.05)


# --- annotations ---

FLICKR_XML = """<?xml version="1.0"?>
<annotation>
  <annotator>
    <bbox><name>a</name><xmin>0</xmin><ymin>0</ymin><xmax>128</xmax><ymax>128</ymax></bbox>
  </annotator>
  <annotator>
    <bbox><name>b</name><xmin>64</xmin><ymin>0</ymin><xmax>128</xmax><ymax>128</ymax></bbox>
    <bbox><name>b</name><xmin>200</xmin><ymin>200</ymin><xmax>256</xmax><ymax>256</ymax></bbox>
  </annotator>
  <annotator/>
</annotation>
"""


def lvs_flickr_truth(boxes: list[list[int]]) -> np.ndarray:
    """g by the LVS code's arithmetic, from pixels of 256x256."""
    truth = np.zeros((224, 224))
    for box in boxes:
        x0, y0, x1, y1 = (int(224 * edge / 256) for edge in box)
        truth[y0:y1, x0:x1] += 1
    return np.minimum(truth / 2, 1)


def test_flickr_boxes_become_votes(tmp_path):
    (tmp_path / "one.xml").write_text(FLICKR_XML)
    found = sets.read_flickr_annotations(tmp_path)
    assert list(found.annotations) == ["one"] and found.skipped == () and found.num_boxes == 3
    annotation = found.annotations["one"]
    assert annotation.boxes[0] == (0.0, 0.0, 0.5, 0.5) and annotation.votes == 2
    truth = figures.truth_map(annotation.boxes, annotation.votes).numpy()
    expected = lvs_flickr_truth([[0, 0, 128, 128], [64, 0, 128, 128], [200, 200, 256, 256]])
    assert np.array_equal(truth, expected) and set(np.unique(truth)) == {0.0, 0.5, 1.0}


def test_every_whole_pixel_of_256_is_cut_down_as_the_lvs_code_does():
    for edge in range(1, 257):
        ours = figures.truth_map([(0.0, 0.0, edge / 256, edge / 256)], 2).numpy()
        assert np.array_equal(ours, lvs_flickr_truth([[0, 0, edge, edge]])), edge


def test_flickr_files_that_are_missing_or_broken_are_named(tmp_path):
    (tmp_path / "good.xml").write_text(FLICKR_XML)
    (tmp_path / "torn.xml").write_text(FLICKR_XML[:200])
    (tmp_path / "word.xml").write_text(FLICKR_XML.replace(">128<", ">wide<"))
    (tmp_path / "three.xml").write_text(FLICKR_XML.replace("<ymax>128</ymax>", ""))
    (tmp_path / "none.xml").write_text("<annotation><annotator/></annotation>")
    found = sets.read_flickr_annotations(
        tmp_path, ["good", "torn", "word", "three", "none", "absent", "good"]
    )
    assert list(found.annotations) == ["good"]
    assert dict(found.skipped) == {
        "torn": "bad-annotation",
        "word": "bad-annotation",
        "three": "bad-annotation",
        "none": "no-box",
        "absent": "no-annotation",
    }
    with pytest.raises(ValueError, match="is not a folder"):
        sets.read_flickr_annotations(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no XML files"):
        sets.read_flickr_annotations(tmp_path / "empty")


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
def test_xml_that_declares_entities_is_refused(tmp_path, encoding):
    bomb = '<!DOCTYPE a [<!ENTITY x "128"><!ENTITY y "&x;&x;">]>'
    text = FLICKR_XML.replace(
        '<?xml version="1.0"?>', f'<?xml version="1.0" encoding="{encoding}"?>{bomb}'
    ).replace(">128<", ">&x;<")
    (tmp_path / "bomb.xml").write_bytes(text.encode(encoding))
    assert sets.read_flickr_annotations(tmp_path).skipped == (("bomb", "bad-annotation"),)


def test_vggss_boxes_are_clipped_and_those_without_area_counted(tmp_path):
    rows = [
        {
            "file": "aaaaaaaaaaa_000010",
            "class": "dog",
            "bbox": [[-0.5, 0.25, 0.5, 0.75], [0.5, 0.5, 0.5, 0.9]],
        },
        {"file": "bbbbbbbbbbb_000020", "class": "cat", "bbox": [[0.3, 0.3, 0.3, 0.3]]},
        {"file": "ccccccccccc_000030", "class": "owl", "bbox": [[0.1, 0.2, 0.3]]},
        {"file": "ddddddddddd_000040", "class": "cow", "bbox": [[0.1, 0.1, 0.2, 0.2], [0.1, 0.1, 0.2, 0.2]]},
    ]
    path = tmp_path / "vggss.json"
    path.write_text(json.dumps(rows))
    found = sets.read_vggss_annotations(path)
    assert list(found.annotations) == ["aaaaaaaaaaa_000010", "ddddddddddd_000040"]
    assert dict(found.skipped) == {"bbbbbbbbbbb_000020": "no-box", "ccccccccccc_000030": "bad-annotation"}
    assert (found.num_boxes, found.num_clipped_boxes, found.num_empty_boxes) == (5, 1, 2)
    dog, cow = found.annotations.values()
    rows[0]["bbox"][0][2] = 0.51
    path.write_text(json.dumps(rows))
    assert sets.read_vggss_annotations(path).digest != found.digest
    assert dog.boxes == ((0.0, 0.25, 0.5, 0.75),) and dog.label == "dog" and dog.votes == 1
    assert figures.truth_map(cow.boxes, cow.votes).max() == 1.0  # a union, not a sum
    assert sets.read_vggss_annotations(path, ["eeeeeeeeeee_000001"]).skipped[0][1] == "no-annotation"
    path.write_text('{"file": 1}')
    with pytest.raises(ValueError, match="no list of objects"):
        sets.read_vggss_annotations(path)
    with pytest.raises(ValueError, match="cannot be read"):
        sets.read_vggss_annotations(tmp_path / "absent.json")


def test_published_vggss_annotations_give_the_truth_of_the_lvs_code(real_data):
    folder = real_data / "annotations_full"
    ids = sets.read_ids(folder / "vggss_test.csv")
    found = sets.read_vggss_annotations(folder / "vggss.json", ids)
    assert len(ids) == 5158 and len(found.annotations) == 5156
    assert (found.num_boxes, found.num_clipped_boxes, found.num_empty_boxes) == (5941, 12, 18)
    assert [reason for _, reason in found.skipped] == ["no-box", "no-box"]
    for row in json.loads((folder / "vggss.json").read_text())[::5]:
        expected = np.zeros((224, 224))
        for box in row["bbox"]:
            x0, y0, x1, y1 = (int(224 * max(edge, 0)) for edge in box)
            expected[y0:y1, x0:x1] = 1
        annotation = found.annotations.get(row["file"])
        ours = np.zeros((224, 224)) if annotation is None else figures.truth_map(annotation.boxes, 1).numpy()
        assert np.array_equal(ours, expected), row["file"]


def test_published_flickr_ids_are_read(real_data):
    ids = sets.read_ids(real_data / "annotations_full" / "flickr_test.csv")
    assert len(ids) == 249 and ids[0] == "10000130166" and "," not in "".join(ids)


def test_lists_that_cannot_be_used_are_refused(tmp_path):
    with pytest.raises(ValueError, match="cannot be read"):
        sets.read_ids(tmp_path / "absent.csv")
    (tmp_path / "empty.csv").write_text("\n\n")
    with pytest.raises(ValueError, match="no rows"):
        sets.read_ids(tmp_path / "empty.csv")
    (tmp_path / "silent.csv").write_text("a,b,sounding\nc,d,non-sounding\n")
    (pair,) = sets.read_non_sounding(tmp_path / "silent.csv")
    assert (pair.image_id, pair.audio_id, pair.sounding, pair.sample_id) == ("c", "d", False, "c+d")
    (tmp_path / "loud.csv").write_text("a,b,sounding\n")
    with pytest.raises(ValueError, match="non-sounding"):
        sets.read_non_sounding(tmp_path / "loud.csv")
