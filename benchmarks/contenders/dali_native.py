"""DALI alone: readers.webdataset, decoders, augmentation and log-mel as one DALI pipeline.

On CPU its video decoder takes VP9 and Motion JPEG, not H.264; the clips were encoded once more for it. With device
`mixed` it decodes the H.264 shards on the GPU, where the threads are decoding sessions: DALI has no default for their
number; option `threads` is 4, as in its examples, or as many as there are cores. No time warp.
"""

import json
from collections.abc import Iterator

import numpy as np
import nvidia.dali.fn as fn
import nvidia.dali.math as dali_math
import nvidia.dali.types as types
from nvidia.dali import pipeline_def
from nvidia.dali.plugin.pytorch import DALIGenericIterator

from benchmarks.contenders.base import AUDIO, CROP, NUM_FRAMES, Batch, Workload

SHUFFLE_BUFFER = 100  # clips, still encoded
QUEUE_DEPTH = 2


def open_stream(workload: Workload) -> Iterator[Batch]:
    mixed = workload.options.get("device") == "mixed"
    kind = workload.options["shards"]
    paths = {"vp9": workload.vp9_shards, "mjpeg": workload.mjpeg_shards, "h264": workload.shards}[kind]
    pipeline = _pipeline(
        paths,
        "avi" if kind == "mjpeg" else "mp4",
        workload.augment,
        mixed,
        batch_size=workload.batch_size,
        device_id=0 if mixed else None,
        prefetch_queue_depth=QUEUE_DEPTH,
        num_threads=workload.options.get("threads", workload.num_workers),
    )
    names = ["frames", "log_mel"] if workload.augment else ["frames", "log_mel", "json"]
    keys = None
    for batches in DALIGenericIterator([pipeline], names):
        batch = batches[0]
        if not workload.augment:
            keys = tuple(json.loads(bytes(row.numpy()).rstrip(b"\0"))["key"] for row in batch["json"])
        frames = batch["frames"]
        if workload.device != "cpu" and not frames.is_cuda:
            frames = frames.to(workload.device)
        yield Batch(
            num_clips=len(frames),
            frames=frames.permute(0, 4, 1, 2, 3),
            log_mel=batch["log_mel"].to(workload.device).unsqueeze(1),
            keys=keys,
        )


@pipeline_def
def _pipeline(paths: list[str], suffix: str, augment: bool, mixed: bool):
    video, audio, info = fn.readers.webdataset(
        paths=paths,
        index_paths=[path[: -len("tar")] + "idx" for path in paths],
        ext=[suffix, "wav", "json"],
        random_shuffle=augment,
        initial_fill=SHUFFLE_BUFFER,
    )
    frames = fn.decoders.video(
        video,
        device="mixed" if mixed else "cpu",
        sequence_length=NUM_FRAMES,
        pad_mode="none",
        build_index=False,
    )  # (T, H, W, 3)
    position_x = fn.random.uniform(range=(0.0, 1.0)) if augment else 0.5
    position_y = fn.random.uniform(range=(0.0, 1.0)) if augment else 0.5
    frames = fn.crop(frames, crop=(CROP, CROP), crop_pos_x=position_x, crop_pos_y=position_y)
    if augment:
        frames = fn.flip(frames, horizontal=fn.random.coin_flip())

    waveform, _rate = fn.decoders.audio(audio, dtype=types.FLOAT, downmix=True)
    if mixed:
        waveform = waveform.gpu()
    window = np.hanning(AUDIO.window_samples + 1)[:-1]  # periodic, as torch has it
    power = fn.spectrogram(
        waveform,
        nfft=AUDIO.n_fft,
        window_length=AUDIO.window_samples,
        window_step=AUDIO.hop_samples,
        window_fn=window.tolist(),
    )
    mel = fn.mel_filter_bank(
        power, sample_rate=AUDIO.sample_rate, nfilter=AUDIO.num_mel_bins, mel_formula="htk", normalize=False
    )
    log_mel = (dali_math.log(mel + AUDIO.log_offset) - AUDIO.log_mel_mean) / AUDIO.log_mel_std
    if augment:
        log_mel = _masked(log_mel, 0, AUDIO.num_mel_bins, AUDIO.frequency_mask_bins)
        log_mel = _masked(log_mel, 1, AUDIO.num_steps(), AUDIO.time_mask_steps)
        return frames, log_mel
    return frames, log_mel, fn.pad(info)


def _masked(log_mel, axis: int, length: int, widest: int):
    width = fn.random.uniform(range=(0.0, float(widest)))
    start = fn.random.uniform(range=(0.0, 1.0)) * (length - width)
    return fn.erase(log_mel, anchor=fn.stack(start), shape=fn.stack(width), axes=(axis,), fill_value=0.0)
