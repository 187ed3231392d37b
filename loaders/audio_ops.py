"""From waveform to log-mel, and SpecAugment: the reference in plain torch, and what the portable loader runs.

Axes: F mel bins, S steps. All functions take any leading dimensions.
"""

import math
import warnings
from collections.abc import Iterable
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional

from loaders.augment import ClipAugmentation
from loaders.config import AudioConfig

GDT_PRE_EMPHASIS = 0.97


def log_mel_spectrogram(waveform: Tensor, config: AudioConfig, normalize: bool = True) -> Tensor:
    """Log-mel of a waveform, without augmentation.

    `log-mel`: window of window_samples (periodic Hann), centered on every hop_samples-th sample with
    reflected edges and zero-padded to n_fft; power; continuous triangular HTK mel filters without area
    normalization; ln(power + log_offset).

    `gdt`: int16 scale, pre-emphasis x[t] - 0.97 x[t-1], rectangular windows from sample 0, power / n_fft,
    filters with corners rounded down to FFT bins; ln, with zero replaced by the float64 epsilon (-36.04).

    Args:
        waveform: float32 (..., num_samples) in [-1, 1) at config.sample_rate.
        config: the front end.
        normalize: subtract log_mel_mean and divide by log_mel_std.

    Returns:
        float32 (..., F, S) with S = config.num_steps(num_samples).

    Raises:
        ValueError: the waveform is too short to reflect at its edges (`log-mel`: n_fft // 2 samples or fewer)
            or empty.
    """
    num_samples = waveform.shape[-1]
    if num_samples < 1 or (config.front_end == "log-mel" and num_samples <= config.n_fft // 2):
        raise ValueError(
            f"waveform has {num_samples} samples, expected more than {config.n_fft // 2} "
            f"(half of loader.audio.n_fft)"
        )
    leading = waveform.shape[:-1]
    waveform = waveform.reshape(-1, num_samples)
    if config.front_end == "log-mel":
        log_mel = _log_mel(waveform, config)
    else:
        log_mel = _gdt_log_mel(waveform, config)
    if normalize:
        log_mel = log_mel.sub_(config.log_mel_mean).div_(config.log_mel_std)
    return log_mel.reshape(*leading, *log_mel.shape[-2:])


def _log_mel(waveform: Tensor, config: AudioConfig) -> Tensor:
    # torch.stft(center=True, pad_mode="reflect"), but what it pads its windows with is not stored and read again.
    num_samples, size = waveform.shape[1], config.window_samples
    before = config.n_fft // 2 - (config.n_fft - size) // 2  # samples of the first window before sample 0
    after = (config.num_steps(num_samples) - 1) * config.hop_samples + size - before - num_samples
    padded = functional.pad(waveform[:, None], (before, max(after, 0)), mode="reflect")[:, 0]
    windows = padded.unfold(1, size, config.hop_samples)  # (N, S, window)
    window = _hann_window(size).to(waveform.device)
    filters = _sparse_filters("log-mel", config.n_fft, config.sample_rate, config.num_mel_bins)
    power = _power(torch.fft.rfft(windows * window, n=config.n_fft))
    return _apply_filters(filters, power).add_(config.log_offset).log_()


def _gdt_log_mel(waveform: Tensor, config: AudioConfig) -> Tensor:
    waveform = waveform * 32768.0
    emphasized = torch.cat([waveform[:, :1], waveform[:, 1:] - GDT_PRE_EMPHASIS * waveform[:, :-1]], dim=1)
    num_steps = config.num_steps(waveform.shape[1])
    padded_samples = (num_steps - 1) * config.hop_samples + config.window_samples
    emphasized = functional.pad(emphasized, (0, padded_samples - waveform.shape[1]))
    windows = emphasized.unfold(1, config.window_samples, config.hop_samples)  # (N, S, window)
    power = _power(torch.fft.rfft(windows, n=config.n_fft)).div_(config.n_fft)
    filters = _sparse_filters("gdt", config.n_fft, config.sample_rate, config.num_mel_bins)
    mel = _apply_filters(filters, power)
    return mel.masked_fill_(mel == 0, torch.finfo(torch.float64).eps).log_()


def _power(spectrum: Tensor) -> Tensor:
    """Squared magnitude of spectrum (N, S, B), as (B, N, S), contiguous. Overwrites spectrum."""
    parts = torch.view_as_real(spectrum)
    parts.mul_(parts)
    num_clips, num_steps, num_bins = spectrum.shape
    power = parts.new_empty(num_bins, num_clips, num_steps)
    # Added and transposed in one pass: this and the product below are bound by memory.
    torch.add(parts[..., 0], parts[..., 1], out=power.permute(1, 2, 0))
    return power


def _apply_filters(filters: Tensor, power: Tensor) -> Tensor:
    """filters (F, B) on power (B, N, S) -> (N, F, S). Sparse: a bin counts in two filters."""
    num_bins, num_clips, num_steps = power.shape
    mel = filters.to(power.device) @ power.view(num_bins, num_clips * num_steps)  # (F, N * S)
    return mel.view(-1, num_clips, num_steps).transpose(0, 1)  # (N, F, S)


@lru_cache(maxsize=8)
def _hann_window(num_samples: int) -> Tensor:
    return torch.hann_window(num_samples, periodic=True)


@lru_cache(maxsize=8)
def _sparse_filters(front_end: str, n_fft: int, sample_rate: int, num_mel_bins: int) -> Tensor:
    build = mel_filters if front_end == "log-mel" else gdt_mel_filters
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch calls this layout a beta
        return build(n_fft, sample_rate, num_mel_bins).to_sparse_csr()


def mel_filters(n_fft: int, sample_rate: int, num_mel_bins: int) -> Tensor:
    """float32 (F, n_fft // 2 + 1): continuous triangular HTK mel filters of peak 1, 0 Hz to half the rate."""
    import torchaudio.functional  # here: the rest of this module is of use without it

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torchaudio warns of empty filters
        filters = torchaudio.functional.melscale_fbanks(
            n_fft // 2 + 1, 0.0, sample_rate / 2, num_mel_bins, sample_rate, norm=None, mel_scale="htk"
        )
    return filters.T.contiguous()


def gdt_mel_filters(n_fft: int, sample_rate: int, num_mel_bins: int) -> Tensor:
    """float32 (F, n_fft // 2 + 1): triangular HTK mel filters whose corners are rounded down to FFT bins.

    Corner m lies at bin floor((n_fft + 1) * hz(m) / sample_rate), hz(m) evenly spaced in mel from 0 Hz to
    sample_rate / 2. Corners that fall on one bin leave a filter empty: 38 of 257 at 24 kHz and n_fft 1024.
    """
    top = 2595 * math.log10(1 + sample_rate / 2 / 700)
    mels = torch.linspace(0, top, num_mel_bins + 2, dtype=torch.float64)
    hertz = 700 * (10 ** (mels / 2595) - 1)
    corners = torch.floor((n_fft + 1) * hertz / sample_rate)
    left, center, right = corners[:-2, None], corners[1:-1, None], corners[2:, None]
    bins = torch.arange(n_fft // 2 + 1, dtype=torch.float64)
    rising = (bins - left) / (center - left).clamp(min=1)
    falling = (right - bins) / (right - center).clamp(min=1)
    filters = torch.where((bins >= left) & (bins < center), rising, 0.0)
    filters = torch.where((bins >= center) & (bins < right), falling, filters)
    return filters.to(torch.float32)


def time_warp(log_mel: Tensor, center: int, shift: int) -> Tensor:
    """log_mel with step `center` moved to `center + shift`, the parts on either side stretched to fit.

    Piecewise linear: the segments [0, center] and [center, S-1] are resampled (linear interpolation) to
    [0, center+shift] and [center+shift, S-1]; the first and last step stay. A shift of 0 changes nothing.

    Choice: 1-D resampling of two segments in place of SpecAugment's 2-D sparse image warp: what it amounts to
    when the control points lie on one horizontal line.

    Args:
        log_mel: float (..., F, S).
        center: the step that moves, 1 .. S-2.
        shift: by how many steps; center + shift must lie in 1 .. S-2.

    Raises:
        ValueError: center or center + shift outside 1 .. S-2.
    """
    if shift == 0:
        return log_mel
    last = log_mel.shape[-1] - 1
    target = center + shift
    if not (1 <= center < last and 1 <= target < last):
        raise ValueError(f"time warp moves step {center} to {target}, expected both in 1 .. {last - 1}")
    low, high, weight = (tensor.to(log_mel.device) for tensor in _warp_sources(center, target, last))
    weight = weight.to(log_mel.dtype)
    earlier, later = log_mel.index_select(-1, low), log_mel.index_select(-1, high)
    return earlier.mul_(1 - weight).add_(later.mul_(weight))


@lru_cache(maxsize=2048)
def _warp_sources(center: int, target: int, last: int) -> tuple[Tensor, Tensor, Tensor]:
    """Per step of a warped log-mel the two steps that it lies between, int64, and the weight of the second."""
    steps = torch.arange(last + 1, dtype=torch.float64)
    before = steps * center / target
    after = center + (steps - target) * (last - center) / (last - target)
    source = torch.where(steps <= target, before, after)  # (S,)
    low = source.floor().long().clamp_(max=last - 1)
    # Products of small whole numbers: source is exact at `target`, step `center` is moved and not blurred.
    return low, low + 1, (source - low).to(torch.float32)


def mask_frequencies(log_mel: Tensor, masks: Iterable[tuple[int, int]], fill: float = 0.0) -> Tensor:
    """Copy of log_mel (..., F, S) with the bins of each mask (first bin, number of bins) set to fill."""
    log_mel = log_mel.clone()
    for start, width in masks:
        log_mel[..., start : start + width, :] = fill
    return log_mel


def mask_times(log_mel: Tensor, masks: Iterable[tuple[int, int]], fill: float = 0.0) -> Tensor:
    """Copy of log_mel (..., F, S) with the steps of each mask (first step, number of steps) set to fill."""
    log_mel = log_mel.clone()
    for start, width in masks:
        log_mel[..., start : start + width] = fill
    return log_mel


def augment_log_mel(log_mel: Tensor, augmentation: ClipAugmentation) -> Tensor:
    """Time warp, frequency masks, time masks, in this order, on a normalized log_mel (..., F, S)."""
    log_mel = time_warp(log_mel, augmentation.warp_center, augmentation.warp_shift)
    log_mel = mask_frequencies(log_mel, augmentation.frequency_masks)
    return mask_times(log_mel, augmentation.time_masks)


def log_mel_statistics(waveforms: Iterable[Tensor], config: AudioConfig) -> tuple[float, float]:
    """(mean, standard deviation) of the unnormalized log-mel over all bins and steps of the waveforms.

    What LoaderConfig's audio.log_mel_mean and audio.log_mel_std should be for a data set.

    Args:
        waveforms: float32 (..., num_samples), each at config.sample_rate.
        config: the front end; its own log_mel_mean and log_mel_std do not matter.

    Raises:
        ValueError: there are no waveforms.
    """
    count, total, total_square = 0, 0.0, 0.0
    for waveform in waveforms:
        values = log_mel_spectrogram(waveform, config, normalize=False).double()
        count += values.numel()
        total += values.sum().item()
        total_square += values.square().sum().item()
    if count == 0:
        raise ValueError("no waveforms to measure log-mel statistics on")
    mean = total / count
    return mean, math.sqrt(max(total_square / count - mean * mean, 0.0))
