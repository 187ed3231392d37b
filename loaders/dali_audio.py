"""Log-mel and SpecAugment as DALI operators, on CPU or GPU: the same numbers as audio_ops.

`log_mel_graph` is the part that other pipelines build in; `DaliAudio` is a pipeline of its own around it.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from loaders.augment import ClipAugmentation
from loaders.config import AudioConfig

try:
    from nvidia.dali import fn, math, types
    from nvidia.dali.pipeline import Pipeline
    from nvidia.dali.plugin.pytorch import feed_ndarray
except ImportError as error:
    raise ImportError(
        f"this loader needs NVIDIA DALI ({error}): pip install nvidia-dali-cuda130, or use backend portable"
    ) from error

PARAMETER_NAMES = ("mask_anchors", "mask_shapes", "warp_steps", "warp_weights")


def audio_parameters(
    augmentations: Sequence[ClipAugmentation | None], config: AudioConfig
) -> dict[str, np.ndarray]:
    """What `log_mel_graph` is to do to each of N clips, by the name of the graph's input.

    Args:
        augmentations: of each clip; None: its log-mel becomes zeros.
        config: the front end that the graph was built for.

    Returns:
        mask_anchors, mask_shapes: float32 (N, 2 R), the (bin, step) where each of R regions starts and how
        many (bins, steps) it has. If config has a time warp, also warp_steps: int32 (N, S), and warp_weights:
        float32 (N, S, 1): step s becomes (1 - weight) x step + weight x the step after it.
    """
    num_steps = config.num_steps()
    anchors = np.zeros((len(augmentations), _num_regions(config), 2), np.float32)
    shapes = np.zeros_like(anchors)  # regions of no bins and no steps erase nothing
    for row, augmentation in enumerate(augmentations):
        if augmentation is None:
            shapes[row, 0] = config.num_mel_bins, num_steps
            continue
        regions = [((start, 0), (width, num_steps)) for start, width in augmentation.frequency_masks]
        regions += [((0, start), (config.num_mel_bins, width)) for start, width in augmentation.time_masks]
        assert len(regions) <= anchors.shape[1], f"{len(regions)} masks, the graph has {anchors.shape[1]}"
        for region, (anchor, shape) in enumerate(regions):
            anchors[row, region], shapes[row, region] = anchor, shape
    parameters = {
        "mask_anchors": anchors.reshape(len(anchors), -1),
        "mask_shapes": shapes.reshape(len(shapes), -1),
    }
    moves = [(0, 0) if a is None else (a.warp_center, a.warp_shift) for a in augmentations]
    if _warps(config):
        steps, weights = zip(*(_warp_sources(center, shift, num_steps) for center, shift in moves))
        parameters["warp_steps"] = np.stack(steps)
        parameters["warp_weights"] = np.stack(weights)[:, :, None]
    else:
        assert not any(shift for _, shift in moves), "a time warp for a graph without one"
    return parameters


def log_mel_graph(waveform: Any, config: AudioConfig, *, full_scale: float = 32768.0) -> Any:
    """Inside a DALI pipeline: the normalized, augmented log-mel of a batch of waveforms.

    `audio_ops.augment_log_mel(audio_ops.log_mel_spectrogram(waveform / full_scale))` as DALI operators, on
    the device of `waveform`. Declares external sources with the names of `audio_parameters`, to be fed in
    each iteration.

    Args:
        waveform: DataNode, per clip (config.sample_rate,) of any number type.
        config: the front end, `log-mel`.
        full_scale: value of the waveform that stands for 1: 32768 for 16-bit samples, 1 for float ones.

    Returns:
        DataNode, float32 (F, S) per clip.

    Raises:
        ValueError: config asks for another front end, or n_fft for a longer waveform than a clip's.
    """
    check_audio_config(config)
    samples = fn.cast(waveform, dtype=types.FLOAT) * (1.0 / full_scale)
    power = fn.spectrogram(
        samples,
        nfft=config.n_fft,
        window_length=config.window_samples,
        window_step=config.hop_samples,
        # Given in full: DALI's own Hann window is sampled half a sample later.
        window_fn=torch.hann_window(config.window_samples, periodic=True, dtype=torch.float64).tolist(),
        power=2,
        center_windows=True,
        reflect_padding=True,
        layout="tf",
    )  # (S, n_fft // 2 + 1)
    mel = fn.mel_filter_bank(
        power,
        sample_rate=config.sample_rate,
        nfilter=config.num_mel_bins,
        freq_low=0.0,
        freq_high=config.sample_rate / 2,
        mel_formula="htk",
        normalize=False,
    )  # (S, F)
    log_mel = (math.log(mel + config.log_offset) - config.log_mel_mean) * (1.0 / config.log_mel_std)
    if _warps(config):
        steps = fn.external_source(name="warp_steps", dtype=types.INT32, ndim=1)
        weights = fn.external_source(name="warp_weights", dtype=types.FLOAT, ndim=2)
        if log_mel.device == "gpu":
            weights = weights.gpu()
        log_mel = fn.reshape(log_mel, layout="FC")  # a sequence of steps, to sequence_rearrange
        before = fn.sequence_rearrange(log_mel, new_order=steps)
        after = fn.sequence_rearrange(log_mel, new_order=steps + 1)
        log_mel = before * (1.0 - weights) + after * weights
    log_mel = fn.transpose(log_mel, perm=[1, 0], transpose_layout=False)  # (F, S)
    return fn.erase(
        log_mel,
        anchor=fn.external_source(name="mask_anchors", dtype=types.FLOAT, ndim=1),
        shape=fn.external_source(name="mask_shapes", dtype=types.FLOAT, ndim=1),
        axes=[0, 1],
        fill_value=0.0,
    )


def check_audio_config(config: AudioConfig) -> None:
    """Raises ValueError unless `log_mel_graph` can be built for config."""
    if config.front_end != "log-mel":
        raise ValueError(
            f"loader.audio.front_end is {config.front_end!r}, expected 'log-mel' with DALI; "
            f"use loader.backend portable for the front end {config.front_end}"
        )
    if config.sample_rate <= config.n_fft // 2:
        raise ValueError(
            f"waveform has {config.sample_rate} samples, expected more than {config.n_fft // 2} "
            f"(half of loader.audio.n_fft)"
        )


class DaliAudio:
    """Batches of waveforms to batches of log-mels, normalized and augmented, by a DALI pipeline."""

    def __init__(
        self,
        config: AudioConfig,
        batch_size: int,
        device: torch.device | str = "cpu",
        num_threads: int = 1,
    ) -> None:
        """Builds the pipeline.

        Args:
            config: the front end and its augmentation.
            batch_size: the most clips of one call.
            device: where the operators run and the result lies.
            num_threads: CPU threads of the pipeline.

        Raises:
            ValueError: config asks for a front end other than `log-mel`.
        """
        self.config = config
        self.device = torch.device(device)
        self._batch_size = batch_size
        device_id = None
        if self.device.type == "cuda":
            device_id = torch.cuda.current_device() if self.device.index is None else self.device.index
        # A depth of 1: what a call is given comes back from the same call.
        self._pipeline = Pipeline(
            batch_size=batch_size, num_threads=num_threads, device_id=device_id, prefetch_queue_depth=1
        )
        with self._pipeline:
            waveform = fn.external_source(
                name="waveform",
                device="cpu" if device_id is None else "gpu",
                dtype=types.INT16,
                ndim=1,
            )
            self._pipeline.set_outputs(log_mel_graph(waveform, config))
        self._pipeline.build()

    def __call__(self, waveform: Tensor, augmentations: Sequence[ClipAugmentation | None]) -> Tensor:
        """The log-mels of N clips, in memory of their own.

        Args:
            waveform: int16 (N, config.sample_rate), on the CPU or on the device; 1 <= N <= batch_size.
            augmentations: what to do to each clip; None gives zeros.

        Returns:
            float32 (N, 1, F, S) on the device; on a GPU ready on torch's current stream.
        """
        config, num_clips = self.config, len(waveform)
        assert waveform.dtype == torch.int16, waveform.dtype
        assert waveform.shape == (num_clips, config.sample_rate), waveform.shape
        assert 1 <= num_clips <= self._batch_size and num_clips == len(augmentations), len(augmentations)
        stream = None if self.device.type == "cpu" else torch.cuda.current_stream(self.device)
        samples: Any = waveform.to(self.device, non_blocking=True).contiguous()
        if stream is None:
            samples = samples.numpy()  # given a CPU tensor, DALI would ask torch for a CUDA stream
        (outputs,) = self._pipeline.run(stream, waveform=samples, **audio_parameters(augmentations, config))
        log_mel = torch.empty(
            num_clips, config.num_mel_bins, config.num_steps(), dtype=torch.float32, device=self.device
        )
        feed_ndarray(outputs.as_tensor(), log_mel, cuda_stream=stream)
        if stream is not None:
            stream.synchronize()  # from here on DALI may write to its buffers again
        return log_mel.unsqueeze(1)


def _num_regions(config: AudioConfig) -> int:
    """R: masks of a clip, at least the one that erases a clip without augmentation."""
    return max(1, config.num_frequency_masks + config.num_time_masks) if config.augment else 1


def _warps(config: AudioConfig) -> bool:
    return config.augment and config.time_warp_steps > 0


def _warp_sources(center: int, shift: int, num_steps: int) -> tuple[np.ndarray, np.ndarray]:
    """(low, weight), int32 and float32 (S,): what audio_ops.time_warp interpolates step s between.

    Step s is (1 - weight) x[low] + weight x[low + 1]; a shift of 0 gives every step itself.
    """
    last, target = num_steps - 1, center + shift
    source = np.arange(num_steps, dtype=np.float64)
    if shift != 0:
        assert 1 <= center < last and 1 <= target < last, (center, shift)
        before = source * center / target
        after = center + (source - target) * (last - center) / (last - target)
        source = np.where(source <= target, before, after)
    low = np.minimum(np.floor(source).astype(np.int32), last - 1)
    return low, (source - low).astype(np.float32)
