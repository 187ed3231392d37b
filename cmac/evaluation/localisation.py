"""Does an attention map look where the sound is? Pointing and preference, with the baselines beside them.

Every function takes one clip's map over time and space and the boxes at each of the map's steps. The map is
upsampled bilinearly to the pixels of the network's input; a pixel belongs to a box when its center does.

Choice: objects move within a clip, so a step's map is compared with the boxes at that step's time. One mean
map and one box around the whole path would be kinder to a map that is blurred over time.
"""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


def upsample_maps(maps: Tensor, crop_size: int) -> Tensor:
    """Maps at pixel resolution: (..., H', W') -> float64 (..., crop_size, crop_size), bilinear, edges held.

    float64, so that a constant map stays constant to the last bit that matters and ties are seen as ties.
    """
    flat = maps.double().reshape(-1, 1, *maps.shape[-2:])
    up = F.interpolate(flat, size=(crop_size, crop_size), mode="bilinear", align_corners=False)
    return up.reshape(*maps.shape[:-2], crop_size, crop_size)


def box_mask(boxes: np.ndarray, crop_size: int) -> Tensor:
    """Pixels whose center lies in the box, at each step.

    boxes: (T', 4) in crop pixels. Returns bool (T', crop_size, crop_size).
    """
    centers = np.arange(crop_size) + 0.5
    in_x = (centers >= boxes[:, 0:1]) & (centers < boxes[:, 2:3])  # (T', W)
    in_y = (centers >= boxes[:, 1:2]) & (centers < boxes[:, 3:4])  # (T', H)
    return torch.from_numpy(in_y[:, :, None] & in_x[:, None, :])


def _check(maps: Tensor, masks: Tensor) -> None:
    if maps.shape != masks.shape:
        raise ValueError(
            f"map is {tuple(maps.shape)} and mask {tuple(masks.shape)}, expected the same (T', H, W)"
        )


def pointing(maps: Tensor, sounding: Tensor) -> float:
    """1 when the map's maximum over time and space falls in the sounding object at that time, else 0.

    Args:
        maps: (T', H, W) at pixel resolution.
        sounding: bool (T', H, W), the sounding object's pixels.

    Returns:
        0..1. Choice: when several pixels share the maximum (a constant map; the plateau that upsampling
        leaves at the border), the share of them inside the object: what a fair draw among them would score on
        average.
    """
    _check(maps, sounding)
    best = maps >= maps.max() - 1e-12
    return (sounding & best).sum().item() / best.sum().item()


def pointing_time_mean(maps: Tensor, sounding: Tensor) -> float:
    """As `pointing`, for the maximum of the map's mean over time: share of steps whose box covers it."""
    _check(maps, sounding)
    return pointing(maps.mean(dim=0, keepdim=True).expand_as(maps), sounding)


def pointing_chance(sounding: Tensor) -> float:
    """Expected `pointing` of a uniformly random pixel at a random step: the object's share of the picture."""
    return sounding.double().mean().item()


def pointing_center(sounding: Tensor) -> float:
    """Expected `pointing` of the picture's center (an even side has four center pixels) at a random step."""
    height, width = sounding.shape[-2:]
    rows = slice((height - 1) // 2, height // 2 + 1)
    columns = slice((width - 1) // 2, width // 2 + 1)
    return sounding[:, rows, columns].double().mean().item()


def map_on_object(maps: Tensor, mask: Tensor) -> float:
    """Mean of the map over the object's pixels, averaged over the steps in which any of it is visible.

    maps: (T', H, W); mask: bool, same shape. Raises ValueError when the object is never visible.
    """
    _check(maps, mask)
    area = mask.flatten(1).sum(dim=1)  # (T',)
    seen = area > 0
    if not seen.any():
        raise ValueError("the object is outside the crop in every step; leave the clip out")
    sums = (maps.double() * mask).flatten(1).sum(dim=1)
    return (sums[seen] / area[seen]).mean().item()


def prefers_sounding(maps: Tensor, sounding: Tensor, silent: Sequence[Tensor]) -> float:
    """Share of the clip's (sounding, silent) pairs in which the map is higher on the sounding object.

    Args:
        maps: (T', H, W) at pixel resolution.
        sounding: bool (T', H, W).
        silent: one such mask per silent object that is visible, at least one.

    Returns:
        0..1; an exact tie counts one half. Choice: the mean over pairs, not "higher than all of them", so
        that chance is 50 % whatever the number of silent objects.
    """
    if not silent:
        raise ValueError("no silent object is visible, expected at least one; leave the clip out")
    value = map_on_object(maps, sounding)
    margins = [value - map_on_object(maps, mask) for mask in silent]
    return sum(0.5 if abs(margin) <= 1e-12 else float(margin > 0) for margin in margins) / len(margins)


def preference_margin(maps: Tensor, sounding: Tensor, silent: Sequence[Tensor]) -> float:
    """How much higher the map is on the sounding object than on the silent ones' mean, in units of its range.

    Used to order clips from bad to good when a few are shown. Range -1..1; 0 for a constant map.
    """
    spread = (maps.max() - maps.min()).item()
    if spread <= 1e-12:
        return 0.0
    others = sum(map_on_object(maps, mask) for mask in silent) / len(silent)
    return (map_on_object(maps, sounding) - others) / spread


def mel_center_hz(num_mel_bins: int, low_hz: float, high_hz: float) -> np.ndarray:
    """Centre frequency of each band of an HTK mel filter bank: float64 (num_mel_bins,), Hz."""
    low, high = (2595 * np.log10(1 + hz / 700) for hz in (low_hz, high_hz))
    mels = np.linspace(low, high, num_mel_bins + 2)[1:-1]
    return 700 * (10 ** (mels / 2595) - 1)


def band_rows(bands_hz: Sequence[tuple[float, float]], center_hz: np.ndarray) -> np.ndarray:
    """Rows of a log-mel whose center frequency lies in one of the bands: bool (F,)."""
    rows = np.zeros(len(center_hz), dtype=bool)
    for low, high in bands_hz:
        rows |= (center_hz >= low) & (center_hz <= high)
    return rows


def band_energy(audio_map: Tensor, num_mel_bins: int) -> np.ndarray:
    """How an audio map's energy spreads over frequency: (F', S') -> float64 (num_mel_bins,), sums to 1.

    The map is upsampled bilinearly and its minimum subtracted, because a cosine map in [0, 1] has a large
    constant part that says nothing about where it points. A constant map spreads evenly.
    """
    up = F.interpolate(
        audio_map.double()[None, None],
        size=(num_mel_bins, audio_map.shape[1]),
        mode="bilinear",
        align_corners=False,
    )[0, 0]
    energy = (up - up.min()).sum(dim=1).numpy()  # (F,)
    total = energy.sum()
    return energy / total if total > 1e-12 else np.full(num_mel_bins, 1 / num_mel_bins)


def band_share(audio_map: Tensor, rows: np.ndarray) -> float:
    """Share of an audio map's energy (`band_energy`) in the given rows of the log-mel, 0..1.

    audio_map: (F', S'); rows: bool (F,), e.g. from `band_rows`.
    """
    return float(band_energy(audio_map, len(rows))[rows].sum())
