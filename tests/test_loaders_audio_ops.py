"""Log-mel and SpecAugment against independent float64 computations and cases small enough to check by
hand."""

import math

import numpy as np
import pytest
import torch
from loaders_media import tone

from loaders.audio_ops import (
    augment_log_mel,
    gdt_mel_filters,
    log_mel_spectrogram,
    log_mel_statistics,
    mask_frequencies,
    mask_times,
    mel_filters,
    time_warp,
)
from loaders.augment import ClipAugmentation
from loaders.config import AudioConfig, gdt_audio_config

NOISE = torch.from_numpy(np.random.default_rng(0).normal(0, 0.1, 24_000).astype(np.float32))


def mel_corners(num_mel_bins: int, top_hertz: float) -> np.ndarray:
    """Corner frequencies in Hz of HTK mel filters: filter m rises from m to m + 1 and falls to m + 2."""
    return 700 * (10 ** (np.linspace(0, 2595 * np.log10(1 + top_hertz / 700), num_mel_bins + 2) / 2595) - 1)


def test_log_mel_of_a_clip_is_257_by_101():
    log_mel = log_mel_spectrogram(NOISE, AudioConfig())
    assert log_mel.shape == (257, 101) and log_mel.dtype == torch.float32


def test_log_mel_equals_an_independent_float64_computation():
    config = AudioConfig()
    padded = np.pad(NOISE.double().numpy(), 1024, mode="reflect")
    window = np.zeros(2048)
    window[784 : 784 + 480] = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(480) / 480)
    windows = np.stack([padded[240 * s : 240 * s + 2048] * window for s in range(101)])
    power = np.abs(np.fft.rfft(windows)).T ** 2
    corners, hertz = mel_corners(257, 12_000), np.arange(1025) * 24_000 / 2048
    rising = (hertz - corners[:-2, None]) / (corners[1:-1] - corners[:-2])[:, None]
    falling = (corners[2:, None] - hertz) / (corners[2:] - corners[1:-1])[:, None]
    mel = np.maximum(0, np.minimum(rising, falling)) @ power
    expected = (np.log(mel + 1e-6) - config.log_mel_mean) / config.log_mel_std
    # float32 filters and FFT here, float64 there.
    assert np.abs(log_mel_spectrogram(NOISE, config).numpy() - expected).max() < 2e-3


def test_gdt_front_end_equals_an_independent_float64_computation():
    config = gdt_audio_config()
    signal = np.round(NOISE.double().numpy() * 32768)
    signal = np.append(signal[0], signal[1:] - 0.97 * signal[:-1])
    signal = np.append(signal, np.zeros(240))
    windows = np.stack([signal[240 * s : 240 * s + 480] for s in range(99)])
    power = np.abs(np.fft.rfft(windows, 1024)).T ** 2 / 1024
    corners = np.floor(1025 * mel_corners(257, 12_000) / 24_000).astype(int)
    filters = np.zeros((257, 513))
    for m in range(257):
        for k in range(corners[m], corners[m + 1]):
            filters[m, k] = (k - corners[m]) / (corners[m + 1] - corners[m])
        for k in range(corners[m + 1], corners[m + 2]):
            filters[m, k] = (corners[m + 2] - k) / (corners[m + 2] - corners[m + 1])
    mel = filters @ power
    expected = (np.log(np.where(mel == 0, np.finfo(float).eps, mel)) - 1.93) / 17.89
    rounded = torch.from_numpy(np.round(NOISE.numpy() * 32768) / 32768).float()
    result = log_mel_spectrogram(rounded, config).numpy()
    assert result.shape == (257, 99)
    assert np.abs(result - expected).max() < 1e-3


def test_default_filters_have_no_empty_band_and_gdt_has_38():
    assert (mel_filters(2048, 24_000, 257).sum(dim=1) > 0).all()
    assert (mel_filters(1024, 24_000, 257).sum(dim=1) == 0).sum() == 7
    assert (gdt_mel_filters(1024, 24_000, 257).sum(dim=1) == 0).sum() == 38


@pytest.mark.parametrize("band", [60, 128, 200, 250])
def test_pure_tone_is_loudest_in_its_band(band):
    hertz = mel_corners(257, 12_000)[band + 1]  # the peak of filter `band`
    log_mel = log_mel_spectrogram(torch.from_numpy(tone(hertz)), AudioConfig())
    assert (log_mel[:, 5:96].argmax(dim=0) - band).abs().max() <= (1 if band < 100 else 0)


def test_click_is_loudest_at_its_step():
    waveform = torch.zeros(24_000)
    waveform[240 * 40] = 1.0
    assert log_mel_spectrogram(waveform, AudioConfig()).sum(dim=0).argmax() == 40


def test_silence_is_the_log_of_the_offset():
    config = AudioConfig()
    silence = log_mel_spectrogram(torch.zeros(24_000), config, normalize=False)
    assert torch.allclose(silence, torch.full_like(silence, math.log(1e-6)))
    assert torch.allclose(
        log_mel_spectrogram(torch.zeros(24_000), config), (silence - config.log_mel_mean) / config.log_mel_std
    )


def test_twice_the_amplitude_adds_ln_4():
    quiet = log_mel_spectrogram(NOISE, AudioConfig(log_offset=1e-12), normalize=False)
    loud = log_mel_spectrogram(2 * NOISE, AudioConfig(log_offset=1e-12), normalize=False)
    assert torch.allclose(loud - quiet, torch.full_like(quiet, math.log(4)), atol=1e-3)


@pytest.mark.parametrize("config", [AudioConfig(), gdt_audio_config()])
def test_leading_dimensions_do_not_change_a_clip(config):
    waveforms = torch.stack([NOISE, NOISE.flip(0), torch.zeros(24_000), NOISE * 0.1]).view(2, 2, -1)
    together = log_mel_spectrogram(waveforms, config)
    assert together.shape == (2, 2, 257, config.num_steps())
    assert torch.allclose(together[1, 1], log_mel_spectrogram(NOISE * 0.1, config), atol=1e-4)


def test_too_short_waveform_is_refused():
    with pytest.raises(ValueError, match="waveform has 1024 samples, expected more than 1024"):
        log_mel_spectrogram(torch.zeros(1024), AudioConfig())


def test_time_warp_resamples_two_segments():
    ramp = torch.arange(7.0).mul(10).expand(2, 7)
    # Step 2 moves to 3: steps 0..3 show 0..2 (two thirds of a step each), steps 3..6 show 2..6 (four thirds
    # each).
    expected = torch.tensor([0, 20 / 3, 40 / 3, 20, 100 / 3, 140 / 3, 60])
    assert torch.allclose(time_warp(ramp, 2, 1)[1], expected)


@pytest.mark.parametrize(("center", "shift"), [(6, -5), (50, 5), (50, -3), (94, 5), (33, 1)])
def test_time_warp_moves_exactly_the_stated_step(center, shift):
    log_mel = torch.from_numpy(np.random.default_rng(1).normal(size=(257, 101)).astype(np.float32))
    warped = time_warp(log_mel, center, shift)
    assert torch.equal(warped[:, center + shift], log_mel[:, center])
    assert torch.equal(warped[:, 0], log_mel[:, 0]) and torch.equal(warped[:, -1], log_mel[:, -1])


def test_time_warp_by_nothing_changes_nothing():
    log_mel = torch.rand(3, 101)
    assert torch.equal(time_warp(log_mel, 0, 0), log_mel)


@pytest.mark.parametrize(("center", "shift"), [(0, 1), (100, -1), (3, -3), (97, 3)])
def test_time_warp_refuses_to_lose_a_segment(center, shift):
    with pytest.raises(ValueError, match="time warp moves step"):
        time_warp(torch.zeros(3, 101), center, shift)


def test_masks_set_exactly_the_stated_bins_and_steps():
    log_mel = torch.ones(1, 6, 8)
    rows = mask_frequencies(log_mel, [(1, 2), (5, 1)])
    assert rows[0, :, 0].tolist() == [1, 0, 0, 1, 1, 0] and (rows == rows[..., :1]).all()
    columns = mask_times(log_mel, [(0, 1), (6, 2)], fill=-3.0)
    assert columns[0, 0].tolist() == [-3, 1, 1, 1, 1, 1, -3, -3] and (columns == columns[:, :1]).all()
    assert (log_mel == 1).all()  # both gave copies
    assert torch.equal(mask_times(log_mel, [(3, 0)]), log_mel)


def test_masks_lie_where_they_were_drawn_after_the_warp():
    augmentation = ClipAugmentation(
        scaled_height=1, scaled_width=1, crop_top=0, crop_left=0, crop_size=1,
        warp_center=40, warp_shift=4, frequency_masks=((10, 3),), time_masks=((44, 2),),
    )  # fmt: skip
    log_mel = torch.rand(257, 101) + 1
    result = augment_log_mel(log_mel, augmentation)
    zero = result == 0
    assert zero[10:13].all() and zero[:, 44:46].all() and zero.sum() == 3 * 101 + 2 * 257 - 6
    assert torch.equal(result[0, 47:], time_warp(log_mel, 40, 4)[0, 47:])


def test_statistics_are_those_of_all_values():
    config = AudioConfig()
    waveforms = [NOISE, NOISE * 0.01, torch.zeros(24_000)]
    values = torch.stack([log_mel_spectrogram(w, config, normalize=False) for w in waveforms]).double()
    mean, std = log_mel_statistics(waveforms, config)
    assert mean == pytest.approx(values.mean().item())
    assert std == pytest.approx(values.std(correction=0).item())
    with pytest.raises(ValueError, match="no waveforms"):
        log_mel_statistics([], config)
