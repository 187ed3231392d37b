"""Is what a contender hands out what is in the clips? Asked before anything is timed.

The reference is the portable decode, center crop, and the log-mel of `loaders.audio_ops`, without augmentation.
"""

import functools
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from benchmarks.contenders.base import AUDIO, CROP, NUM_FRAMES, SHORT_SIDE, Batch

NEIGHBORS = 2  # frames
LEAST_PSNR = {"clip": 35.0, "recoded": 30.0, "original": 20.0, "luma": 60.0}
"""dB, of the clip that comes off worst. `clip`: the same H.264 decoded, only the conversion to RGB may differ
(rounding, how chroma is scaled up). `recoded`: encoded once more. `original`: decoded from another file, scaled by
another method; each frame may match the reference's neighbor frames. `luma`: the decoded planes themselves."""
LEAST_SNR = 6.0
"""dB, of the clip that comes off worst, for every kind: variance of the reference against the mean squared error. Of
dark or flat pictures any two have a good PSNR; another picture than the one asked for is at 0 dB or below here."""
MOST_LOG_MEL_ERROR = {"clip": 0.05, "recoded": 0.05, "original": 0.35}
"""Mean absolute difference of the normalized log-mel, of the clip that comes off worst."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """How near a contender comes to the reference."""

    problem: str | None
    """What is wrong, or None."""
    num_clips: int = 0
    """Clips compared."""
    psnr: float | None = None
    """dB, of the clip that comes off worst; 99 if nothing differs."""
    snr: float | None = None
    """dB, likewise: see LEAST_SNR."""
    log_mel_error: float | None = None
    """Mean absolute difference of the clip that comes off worst."""


def squared_error(frames: np.ndarray, reference: np.ndarray, reach: int = 0) -> float:
    """Mean squared difference of uint8 arrays (T, ...) of one shape.

    reach: each frame is held against that of the reference's frames at most so far away which it is nearest to:
    clocks of loaders of original videos differ by parts of a frame.
    """
    errors = []
    for index, frame in enumerate(frames):
        near = reference[max(0, index - reach) : index + reach + 1].astype(np.float32)
        difference = near - frame.astype(np.float32)
        errors.append(np.square(difference).mean(axis=tuple(range(1, near.ndim))).min())
    return float(np.mean(errors))


def decibels(power: float, error: float) -> float:
    """10 log10(power / error), at most 99."""
    if error <= 0:
        return 99.0
    return float(min(99.0, 10 * np.log10(max(power, 1e-9) / error)))


def compare(batch: Batch, reference: str, content: str) -> Comparison:
    """Comparison of a batch that was made without augmentation.

    Args:
        batch: of the contender.
        reference: file that `write_reference` wrote.
        content: as Contender.content.
    """
    if batch.luma is not None:
        return _compare_lumas(batch, reference)
    if batch.frames is None or batch.log_mel is None:
        return Comparison(problem="it hands out no frames or no log-mel")
    shape = (batch.num_clips, 3, NUM_FRAMES, CROP, CROP)
    if batch.frames.dtype != torch.uint8 or tuple(batch.frames.shape) != shape:
        return Comparison(
            problem=f"frames are {batch.frames.dtype} {tuple(batch.frames.shape)}, expected {shape}"
        )
    mel_shape = (batch.num_clips, 1, AUDIO.num_mel_bins, AUDIO.num_steps())
    if batch.log_mel.dtype != torch.float32 or tuple(batch.log_mel.shape) != mel_shape:
        return Comparison(problem=f"log-mel is {tuple(batch.log_mel.shape)}, expected {mel_shape}")
    frames = batch.frames.permute(0, 2, 3, 4, 1).cpu().numpy()  # (N, T, H, W, 3)
    log_mels = batch.log_mel[:, 0].cpu().numpy()
    errors, variances, mel_errors = [], [], []
    for row in range(batch.num_clips):
        if content == "original":
            if batch.origins is None:
                return Comparison(problem="it does not tell where its clips come from")
            expected = original_clip(*batch.origins[row])
        else:
            known = _load(reference)
            if batch.keys is None or batch.keys[row] not in known:
                continue
            expected = known[batch.keys[row]]
        errors.append(squared_error(frames[row], expected[0], NEIGHBORS if content == "original" else 0))
        variances.append(expected[0].var())
        mel_errors.append(float(np.abs(log_mels[row] - expected[1]).mean()))
    return _judged(content, errors, variances, mel_errors)


def _compare_lumas(batch: Batch, reference: str) -> Comparison:
    known = _load(reference)
    pairs = [(batch.luma[row], known[key][2]) for row, key in enumerate(batch.keys) if key in known]
    return _judged("luma", [squared_error(*pair) for pair in pairs], [pair[1].var() for pair in pairs], [])


def _judged(content: str, errors: list[float], variances: list[float], mel_errors: list[float]) -> Comparison:
    """Comparison of clips by the squared errors of their frames, their references' variances, and the errors of their
    log-mels."""
    if not errors:
        return Comparison(problem="none of its clips is one that was asked for")
    psnr = min(decibels(255**2, error) for error in errors)
    snr = min(decibels(variance, error) for variance, error in zip(variances, errors, strict=True))
    mel = max(mel_errors) if mel_errors else None
    problem = None
    if not psnr >= LEAST_PSNR[content]:
        problem = f"PSNR {psnr:.1f} dB, expected at least {LEAST_PSNR[content]:.0f}"
    elif not snr >= LEAST_SNR:
        problem = f"signal to noise {snr:.1f} dB, expected at least {LEAST_SNR:.0f}"
    elif mel is not None and not mel <= MOST_LOG_MEL_ERROR[content]:
        problem = f"log-mel differs by {mel:.3f} on average, expected at most {MOST_LOG_MEL_ERROR[content]}"
    return Comparison(problem=problem, num_clips=len(errors), psnr=psnr, snr=snr, log_mel_error=mel)


def write_reference(path: Path, shard: str, num_clips: int) -> None:
    """Writes frames, log-mel and luma of the first num_clips of a shard."""
    from benchmarks.contenders.decode_only import _decode_pyav, center
    from loaders.audio_ops import log_mel_spectrogram
    from loaders.decode import decode_frames, decode_waveform
    from shards.reader import ShardReader

    arrays = {}
    with ShardReader(shard) as reader:
        for position in range(min(num_clips, len(reader))):
            raw = reader.read(position)
            key, info = raw.info.key, raw.info
            window = ((info.frame_height - CROP) // 2, (info.frame_width - CROP) // 2, CROP, CROP)
            arrays[f"{key}/frames"] = decode_frames(raw.video, range(NUM_FRAMES), SHORT_SIDE, window=window)
            waveform = torch.from_numpy(decode_waveform(raw.audio))
            arrays[f"{key}/log_mel"] = log_mel_spectrogram(waveform, AUDIO).numpy()
            planes: list[np.ndarray] = []
            _decode_pyav((key, raw.video), lambda plane, planes=planes: planes.append(center(plane)))
            arrays[f"{key}/luma"] = np.stack(planes)
    np.savez(path, **arrays)


@functools.lru_cache(maxsize=1)
def _load(path: str) -> dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """key -> (frames (T, 128, 128, 3), log_mel (F, S), luma (T, 128, 128))."""
    with np.load(path) as file:
        keys = sorted({name.partition("/")[0] for name in file.files})
        return {key: tuple(file[f"{key}/{part}"] for part in ("frames", "log_mel", "luma")) for key in keys}


def original_clip(path: str, start: float) -> tuple[np.ndarray, np.ndarray]:
    """(frames (T, 128, 128, 3), log_mel (F, S)) of the second of a video that starts at `start`, the slow and plain
    way: all frames decoded from the beginning, the one shown at each moment taken, all sound resampled."""
    import av

    from loaders.audio_ops import log_mel_spectrogram
    from loaders.augment import scaled_size

    with av.open(path) as container:
        stream = container.streams.video[0]
        # The clock of a clip counts from the start of the container.
        zero = (container.start_time or 0) / av.time_base
        shown = None
        frames: list[np.ndarray] = []
        for frame in container.decode(stream):
            time = float(frame.pts * frame.time_base) - zero
            if time > start - 0.5:
                while (
                    len(frames) < NUM_FRAMES and shown is not None and time > start + len(frames) / NUM_FRAMES
                ):
                    frames.append(_center_rgb(shown, scaled_size))
            shown = frame
            if len(frames) == NUM_FRAMES:
                break
        while len(frames) < NUM_FRAMES:
            frames.append(_center_rgb(shown, scaled_size))
    with av.open(path) as container:
        resampler = av.AudioResampler(format="s16p", layout="mono", rate=AUDIO.sample_rate)
        first, parts = None, []
        for frame in container.decode(audio=0):
            first = float(frame.pts * frame.time_base) - zero if first is None else first
            frame.pts = None
            parts.extend(part.to_ndarray()[0] for part in resampler.resample(frame))
    offset = round((start - (first or 0.0)) * AUDIO.sample_rate)
    samples = np.pad(np.concatenate(parts), (max(0, -offset), AUDIO.sample_rate))[max(0, offset) :]
    waveform = torch.from_numpy(samples[: AUDIO.sample_rate].astype(np.float32)).div_(32768)
    return np.stack(frames), log_mel_spectrogram(waveform, AUDIO).numpy()


def _center_rgb(frame, scaled_size) -> np.ndarray:
    width, height = scaled_size(frame.width, frame.height, SHORT_SIDE)
    image = frame.reformat(width, height, "rgb24", interpolation="BILINEAR").to_ndarray()
    top, left = (height - CROP) // 2, (width - CROP) // 2
    return image[top : top + CROP, left : left + CROP]
