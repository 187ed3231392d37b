"""Retrieval, localisation, box mapping and intervals against cases worked by hand and against
scikit-learn."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from cmac.evaluation import boxes, localisation
from cmac.evaluation.intervals import bootstrap_interval
from cmac.evaluation.retrieval import retrieval_ranks, retrieval_recall

# --- retrieval ---


def test_recall_of_a_case_worked_by_hand():
    query = torch.eye(3)
    gallery = torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.2, 0.9], [0.0, 0.5, 0.4]])
    # Similarities by row: (1, 0, 0), (0, .2, .5), (0, .9, .4): ranks 1, 2, 2.
    assert retrieval_ranks(query, gallery).tolist() == [1, 2, 2]
    assert retrieval_recall(query, gallery, 1) == pytest.approx(1 / 3)
    assert retrieval_recall(query, gallery, 2) == 1.0


def test_recall_equals_scikit_learn_top_k_accuracy():
    metrics = pytest.importorskip("sklearn.metrics")
    generator = torch.Generator().manual_seed(3)
    query, noise = torch.randn(50, 8, generator=generator), torch.randn(50, 8, generator=generator)
    gallery = query + 1.5 * noise
    similarity = (query.double() @ gallery.double().T).numpy()
    for k in (1, 5, 10):
        expected = metrics.top_k_accuracy_score(np.arange(50), similarity, k=k)
        assert retrieval_recall(query, gallery, k) == pytest.approx(expected)
    assert 0.05 < retrieval_recall(query, gallery, 1) < 0.95


def test_one_embedding_for_all_clips_retrieves_nothing():
    same = torch.nn.functional.normalize(torch.randn(1, 16), dim=1).expand(20, 16)
    assert retrieval_ranks(same, same).tolist() == [20] * 20
    assert retrieval_recall(same, same, 10) == 0.0


def test_retrieval_refuses_unequal_sizes_and_nan():
    with pytest.raises(ValueError, match=r"\(3, 2\) and gallery \(4, 2\)"):
        retrieval_ranks(torch.zeros(3, 2), torch.zeros(4, 2))
    with pytest.raises(ValueError, match="NaN"):
        retrieval_ranks(torch.full((3, 2), float("nan")), torch.zeros(3, 2))
    with pytest.raises(ValueError, match="k is 0"):
        retrieval_recall(torch.zeros(3, 2), torch.zeros(3, 2), 0)


# --- intervals ---


def test_interval_holds_the_mean_and_is_the_same_for_the_same_seed():
    values = [1.0] * 60 + [0.0] * 40
    groups = list(range(100))
    low, high = bootstrap_interval(values, groups, seed=1)
    assert (low, high) == bootstrap_interval(values, groups, seed=1)
    # Normal approximation of a binomial share: 0.6 +- 1.96 * sqrt(.6 * .4 / 100) = 0.504 .. 0.696
    assert low == pytest.approx(0.504, abs=0.02) and high == pytest.approx(0.696, abs=0.02)


def test_interval_over_videos_is_wider_when_their_clips_agree():
    values = [float(video % 2) for video in range(20) for _ in range(10)]
    by_video = bootstrap_interval(values, [video for video in range(20) for _ in range(10)])
    by_clip = bootstrap_interval(values, list(range(200)))
    assert by_video[1] - by_video[0] > 2 * (by_clip[1] - by_clip[0])


def test_no_hit_at_all_still_has_an_interval():
    binomial = pytest.importorskip("scipy.stats").binomtest
    expected = binomial(0, 40).proportion_ci(0.95, method="exact")
    assert bootstrap_interval([0.0] * 40, list(range(40))) == pytest.approx((0.0, expected.high))
    assert bootstrap_interval([1.0] * 40, list(range(40))) == pytest.approx((1 - expected.high, 1.0))
    # Two clips of each of 20 videos are 20 independent observations, not 40.
    assert bootstrap_interval([0.0] * 40, [video // 2 for video in range(40)])[1] > expected.high


def test_interval_of_nothing_is_none():
    assert bootstrap_interval([], []) is None


# --- maps ---


def mask(crop_size: int, *per_step: tuple[float, float, float, float]) -> torch.Tensor:
    return localisation.box_mask(np.array(per_step, dtype=float), crop_size)


def test_box_mask_takes_pixels_whose_center_is_inside():
    result = mask(4, (1, 0, 3, 2))[0]
    assert result.int().tolist() == [[0, 1, 1, 0], [0, 1, 1, 0], [0, 0, 0, 0], [0, 0, 0, 0]]
    assert mask(4, (0.6, 0.4, 1.4, 1.4))[0].nonzero().tolist() == []  # holds no pixel's center
    assert mask(4, (0.5, 0.5, 1.5, 1.5))[0].nonzero().tolist() == [[0, 0]]  # left edge in, right edge out
    assert mask(4, (-3, -3, 99, 99)).all()


def test_pointing_needs_the_right_place_at_the_right_time():
    maps = torch.zeros(2, 4, 4)
    maps[1, 3, 2] = 1.0
    there_then = mask(4, (0, 0, 1, 1), (2, 3, 3, 4))
    there_too_early = mask(4, (2, 3, 3, 4), (0, 0, 1, 1))
    assert localisation.pointing(maps, there_then) == 1.0
    assert localisation.pointing(maps, there_too_early) == 0.0
    assert localisation.pointing_time_mean(maps, there_then) == 0.5  # the mean map points there at both steps


def test_constant_map_points_at_chance():
    sounding = mask(8, (0, 0, 4, 2), (0, 0, 4, 2), (0, 0, 4, 2))
    maps = localisation.upsample_maps(torch.full((3, 2, 2), 0.731), 8)
    assert localisation.pointing(maps, sounding) == pytest.approx(8 / 64)
    assert localisation.pointing_chance(sounding) == pytest.approx(8 / 64)
    assert localisation.prefers_sounding(maps, sounding, [mask(8, *[(5, 5, 8, 8)] * 3)]) == 0.5
    assert localisation.preference_margin(maps, sounding, [mask(8, *[(5, 5, 8, 8)] * 3)]) == 0.0


def test_chance_of_pointing_is_what_random_points_score():
    sounding = mask(10, (2, 2, 7, 6), (4, 4, 12, 9))
    generator = np.random.default_rng(0)
    points = np.stack([generator.integers(0, 2, 40_000), *generator.integers(0, 10, (2, 40_000))])
    hits = sounding.numpy()[tuple(points)].mean()
    assert localisation.pointing_chance(sounding) == pytest.approx(hits, abs=0.01)


def test_center_baseline_looks_at_the_middle_pixels():
    assert localisation.pointing_center(mask(8, (4, 4, 6, 6))) == 0.25  # one of four center pixels
    assert localisation.pointing_center(mask(7, (3, 3, 4, 4))) == 1.0
    assert localisation.pointing_center(mask(8, (3, 3, 5, 5), (0, 0, 1, 1))) == 0.5


def test_prefers_counts_pairs_and_ties():
    maps = torch.zeros(1, 4, 4)
    maps[0, 0, 0], maps[0, 0, 3], maps[0, 3, 0], maps[0, 3, 3] = 0.5, 0.2, 0.9, 0.5
    sounding, lower, higher, equal = (
        mask(4, box) for box in ((0, 0, 1, 1), (3, 0, 4, 1), (0, 3, 1, 4), (3, 3, 4, 4))
    )
    assert localisation.prefers_sounding(maps, sounding, [lower]) == 1.0
    assert localisation.prefers_sounding(maps, sounding, [higher]) == 0.0
    assert localisation.prefers_sounding(maps, sounding, [lower, higher, equal]) == pytest.approx(0.5)
    with pytest.raises(ValueError, match="no silent object"):
        localisation.prefers_sounding(maps, sounding, [])


def test_prefers_of_random_maps_is_half_whatever_the_number_of_silent_objects():
    generator = torch.Generator().manual_seed(0)
    sounding = mask(16, (0, 0, 6, 6))
    silent = [mask(16, (10, 0, 16, 6)), mask(16, (0, 10, 6, 16)), mask(16, (10, 10, 16, 16))]
    results = [
        localisation.prefers_sounding(
            localisation.upsample_maps(torch.rand(1, 4, 4, generator=generator), 16), sounding, silent
        )
        for _ in range(600)
    ]
    assert np.mean(results) == pytest.approx(0.5, abs=0.05)


def test_map_on_object_leaves_out_steps_in_which_it_is_not_visible():
    maps = torch.tensor([[[1.0, 1.0], [1.0, 1.0]], [[9.0, 9.0], [9.0, 9.0]]])
    assert localisation.map_on_object(maps, mask(2, (0, 0, 1, 1), (5, 5, 6, 6))) == 1.0
    with pytest.raises(ValueError, match="outside the crop"):
        localisation.map_on_object(maps, mask(2, (5, 5, 6, 6), (5, 5, 6, 6)))


def test_upsampling_puts_a_cell_where_it_belongs():
    maps = torch.zeros(1, 4, 4)
    maps[0, 1, 2] = 1.0
    up = localisation.upsample_maps(maps, 16)[0]
    rows, columns = (up == up.max()).nonzero(as_tuple=True)
    # Cell (1, 2) covers rows 4..7 and columns 8..11 of 16; its middle lies between the two middle pixels.
    assert sorted(set(rows.tolist())) == [5, 6] and sorted(set(columns.tolist())) == [9, 10]


# --- frequencies ---


def test_mel_centers_are_those_of_torchaudio():
    functional = pytest.importorskip("torchaudio.functional")
    filters = functional.melscale_fbanks(8193, 0.0, 12_000.0, 40, 24_000, norm=None, mel_scale="htk")
    peaks = torch.linspace(0, 12_000, 8193)[filters.argmax(dim=0)].numpy()
    np.testing.assert_allclose(localisation.mel_center_hz(40, 0, 12_000), peaks, atol=2.0)


def test_band_share_of_a_map_that_listens_to_one_band():
    rows = localisation.band_rows([(1000.0, 2000.0)], np.array([500.0, 1000.0, 1500.0, 3000.0]))
    assert rows.tolist() == [False, True, True, False]
    audio_map = torch.full((4, 5), 0.5)
    assert localisation.band_share(audio_map, rows) == 0.5  # constant: the share of rows
    audio_map[1] = 0.9
    assert localisation.band_share(audio_map, rows) == pytest.approx(1.0)
    assert localisation.band_share(audio_map, ~rows) == pytest.approx(0.0)


# --- boxes ---


def clip_info(**changes):
    fields = {"source_crop": (0.0, 0.0, 320.0, 180.0), "frame_width": 256, "frame_height": 144}
    return SimpleNamespace(**{**fields, **changes})


def crop(**changes):
    fields = {
        "scaled_width": 128,
        "scaled_height": 72,
        "crop_left": 32,
        "crop_top": 4,
        "crop_size": 64,
        "flip": False,
    }
    return SimpleNamespace(**{**fields, **changes})


def test_box_is_cut_scaled_and_shifted_like_its_pixels():
    # The clip shows the 320x180 that start at (10, 20); they become 128x72 (x 0.4), cropped at (32, 4).
    info = clip_info(source_crop=(10.0, 20.0, 320.0, 180.0))
    source = np.array([110.0, 70.0, 210.0, 120.0])
    assert boxes.map_boxes_to_crop(source, info, crop()).tolist() == [8.0, 16.0, 48.0, 36.0]


def test_mirrored_crop_mirrors_the_box():
    source = np.array([[80.0, 10.0, 180.0, 60.0]])
    plain = boxes.map_boxes_to_crop(source, clip_info(), crop())[0]
    flipped = boxes.map_boxes_to_crop(source, clip_info(), crop(flip=True))[0]
    assert plain.tolist() == [0.0, 0.0, 40.0, 20.0]
    assert flipped.tolist() == [24.0, 0.0, 64.0, 20.0]


@pytest.mark.parametrize("flip", [False, True])
def test_box_of_a_painted_rectangle_is_where_the_transforms_put_it(flip):
    """The same steps done to an image and to a box agree to the pixel, mirrored or not."""
    image = np.zeros((144, 256), dtype=np.float32)  # the clip's frame
    image[40:72, 64:112] = 1.0
    stacked = torch.tensor(image)[None, None]
    scaled = torch.nn.functional.interpolate(stacked, size=(72, 128), mode="area")[0, 0]
    picture = scaled[4 : 4 + 64, 32 : 32 + 64].numpy()
    picture = picture[:, ::-1] if flip else picture
    info = clip_info(source_crop=(0.0, 0.0, 256.0, 144.0))
    mapped = boxes.map_boxes_to_crop(np.array([[64.0, 40.0, 112.0, 72.0]]), info, crop(flip=flip))
    painted = torch.from_numpy(picture > 0.5)
    assert torch.equal(localisation.box_mask(mapped, 64)[0], painted)
    # A map that is high exactly there points at it; the mirrored box would be missed.
    assert localisation.pointing(painted[None].double(), localisation.box_mask(mapped, 64)) == 1.0
    other = boxes.map_boxes_to_crop(np.array([[64.0, 40.0, 112.0, 72.0]]), info, crop(flip=not flip))
    assert localisation.pointing(painted[None].double(), localisation.box_mask(other, 64)) < 0.5


def test_clip_sees_the_boxes_of_its_own_second():
    item = SimpleNamespace(boxes=np.arange(100)[:, None] * np.ones(4))
    result = boxes.object_boxes_in_clip(item, source_fps=16.0, start_seconds=2.0)
    assert result.shape == (32, 4)
    assert result[:, 0].tolist() == [32 + index // 2 for index in range(32)]  # each frame is shown twice
    late = boxes.object_boxes_in_clip(item, source_fps=16.0, start_seconds=6.0)
    assert late[-1, 0] == 99  # never beyond the last frame


def test_step_takes_the_mean_box_of_its_frames():
    per_frame = np.arange(32, dtype=float)[:, None] * np.ones(4)
    steps = boxes.boxes_per_step(per_frame, 4)
    assert steps[:, 0].tolist() == [3.5, 11.5, 19.5, 27.5]
    assert boxes.boxes_per_step(per_frame, 3).shape == (3, 4)


def test_visible_share_counts_area_inside_the_crop():
    assert boxes.visible_share(np.array([[-5.0, 0.0, 5.0, 10.0]]), 64) == 0.5
    assert boxes.visible_share(np.array([[70.0, 0.0, 80.0, 10.0]]), 64) == 0.0
    assert boxes.visible_share(np.array([[0.0, 0.0, 8.0, 8.0], [64.0, 0.0, 72.0, 8.0]]), 64) == 0.5
