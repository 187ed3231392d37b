"""Crop, flip, color jitter and normalization, by hand and against torchvision."""

import numpy as np
import pytest
import torch

from loaders.video_ops import color_jitter, crop_frames, flip_frames, normalize_frames

NOISE = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (4, 20, 30, 3), dtype=np.uint8))


def constant(red: int, green: int, blue: int) -> torch.Tensor:
    return torch.tensor([red, green, blue], dtype=torch.uint8).expand(2, 4, 4, 3)


def test_normalize_gives_pixel_minus_mean_over_std_in_the_same_layout():
    frames = NOISE[None].permute(0, 4, 1, 2, 3)
    result = normalize_frames(frames, 0.45, 0.225)
    assert result.dtype == torch.float32 and result.stride() == frames.stride()
    assert torch.allclose(result, (frames / 255 - 0.45) / 0.225, atol=1e-5)
    assert normalize_frames(frames, 0.45, 0.225, torch.bfloat16).dtype == torch.bfloat16


def test_normalize_takes_one_value_per_channel():
    frames = NOISE[None].permute(0, 4, 1, 2, 3)
    mean, std = (0.43, 0.39, 0.37), (0.228, 0.221, 0.217)
    result = normalize_frames(frames, mean, std)
    for channel in range(3):
        assert torch.allclose(
            result[:, channel], normalize_frames(frames, mean[channel], std[channel])[:, channel], atol=1e-6
        )


def test_crop_is_the_stated_window():
    assert torch.equal(crop_frames(NOISE, 3, 5, 8), NOISE[:, 3:11, 5:13])
    with pytest.raises(ValueError, match="crop of 8 at row 13, column 5 of 30x20 frames"):
        crop_frames(NOISE, 13, 5, 8)


def test_flip_mirrors_columns_and_twice_is_nothing():
    assert torch.equal(flip_frames(NOISE)[:, :, 0], NOISE[:, :, 29])
    assert torch.equal(flip_frames(flip_frames(NOISE)), NOISE)


def test_brightness_multiplies_and_clamps():
    result = color_jitter(constant(100, 200, 51), ["brightness"], brightness=1.5)
    assert result[0, 0, 0].tolist() == [150, 255, 76]  # 76.5 is rounded to even


def test_saturation_0_is_grey():
    grey = round(0.299 * 100 + 0.587 * 200 + 0.114 * 50)
    result = color_jitter(constant(100, 200, 50), ["saturation"], saturation=0.0)
    assert result[1, 2, 3].tolist() == [grey] * 3


def test_contrast_pulls_towards_the_mean_of_the_frame():
    frames = torch.zeros(2, 1, 2, 3, dtype=torch.uint8)
    frames[0, 0, 1] = 200  # frame 0: 0 and 200, mean 100; frame 1: black
    result = color_jitter(frames, ["contrast"], contrast=0.5)
    assert result[0, 0, :, 0].tolist() == [50, 150] and (result[1] == 0).all()


def test_factors_of_1_change_nothing():
    assert torch.equal(color_jitter(NOISE, ["contrast", "saturation", "brightness"]), NOISE)
    assert torch.equal(color_jitter(NOISE, [], 0.5, 0.5, 0.5), NOISE)


def test_equal_frames_stay_equal():
    still = NOISE[:1].expand(4, -1, -1, -1)
    result = color_jitter(still, ["saturation", "contrast", "brightness"], 1.3, 0.7, 1.4)
    assert (result == result[:1]).all() and result.is_contiguous()


@pytest.mark.parametrize(
    "order", [("brightness", "contrast", "saturation"), ("saturation", "contrast", "brightness")]
)
def test_jitter_agrees_with_torchvision(order):
    functional = pytest.importorskip("torchvision.transforms.functional")
    factors = {"brightness": 1.3, "contrast": 0.7, "saturation": 1.35}
    expected = NOISE.permute(0, 3, 1, 2)
    for name in order:
        expected = getattr(functional, f"adjust_{name}")(expected, factors[name])
    result = color_jitter(NOISE, order, **factors).permute(0, 3, 1, 2)
    # torchvision cuts off fractions after each step, here they are rounded once.
    assert (result.int() - expected.int()).abs().max() <= 3


def test_unknown_operation_is_refused():
    with pytest.raises(ValueError, match="color operation is 'hue', expected brightness, contrast"):
        color_jitter(NOISE, ["hue"])
