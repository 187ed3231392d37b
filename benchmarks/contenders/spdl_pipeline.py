"""SPDL's pipeline as its documentation builds it (examples webdataset_pipeline and image_dataloading).

A source of tar paths; a stage that reads a tar at once, walks it with `iter_tarfile` and groups members by key; decode
threads: demux, decode with one FFmpeg thread, crop and flip as FFmpeg filters, sound by `load_wav`; aggregate; one
`convert_frames` for the whole batch into one buffer; a sink. All in threads of one process: nothing is copied between
processes.

With option `our_transforms` the draws, the sparse mel filters, time warp and masks are this project's: what is left
between the two is the pipeline and the decoding.
"""

import random
from collections.abc import Iterator

import numpy as np
import spdl.io
import torch
from spdl.pipeline import PipelineBuilder

from benchmarks.contenders.base import (
    AUDIO,
    CROP,
    SHORT_SIDE,
    Batch,
    Workload,
    crop_offset,
    finished,
    flips,
    log_mel_of,
)
from loaders.audio_ops import augment_log_mel, log_mel_spectrogram
from loaders.augment import draw_augmentation, scaled_size
from loaders.config import AudioConfig, VideoConfig

SINK_BATCHES = 3


def open_stream(workload: Workload) -> Iterator[Batch]:
    torch.set_num_threads(1)  # the pipeline's threads are the parallelism
    augment = workload.augment
    decode = _decode_ours if workload.options.get("our_transforms") else _decode
    order = "completion" if augment else "input"
    builder = (
        PipelineBuilder()
        .add_source(_tar_paths(workload.shards, augment))
        .pipe(_read_tar)
        .pipe(lambda sample: decode(*sample, augment), concurrency=workload.num_workers, output_order=order)
        .aggregate(workload.batch_size, drop_last=True)
        .pipe(_collate, concurrency=max(1, workload.num_workers // 8), output_order=order)
        .add_sink(SINK_BATCHES)
    )
    # Threads besides the decoding ones: tar reading and collating.
    pipeline = builder.build(num_threads=workload.num_workers + 2, max_failures=0)
    with pipeline.auto_stop():
        for frames, log_mel, keys in pipeline.get_iterator(timeout=60):
            yield finished(frames, log_mel, keys, workload.device)


def _tar_paths(paths: list[str], shuffle: bool) -> Iterator[str]:
    while True:
        yield from random.sample(paths, len(paths)) if shuffle else paths


def _read_tar(path: str) -> Iterator[tuple[str, memoryview, memoryview]]:
    """(key, video, audio) of each sample. Views of one buffer that holds the tar."""
    with open(path, "rb") as file:
        data = file.read()
    key, sample = None, {}
    for name, content in spdl.io.iter_tarfile(data):
        stem, _, suffix = name.partition(".")
        if key is not None and stem != key:
            yield key, sample["mp4"], sample["wav"]
            sample = {}
        key, sample[suffix] = stem, content
    if key is not None:
        yield key, sample["mp4"], sample["wav"]


def _decode(key: str, video: memoryview, audio: memoryview, augment: bool):
    packets = spdl.io.demux_video(video)
    top, left = crop_offset(packets.height, packets.width, augment)
    frames = _decode_cut(packets, top, left, flips(augment))
    samples = np.asarray(spdl.io.load_wav(audio))[:, 0]
    return frames, log_mel_of(samples, augment), key


def _decode_ours(key: str, video: memoryview, audio: memoryview, augment: bool):
    packets = spdl.io.demux_video(video)
    width, height = scaled_size(packets.width, packets.height, SHORT_SIDE)
    drawn = draw_augmentation(
        VideoConfig(augment=augment),
        AudioConfig(augment=augment),
        0,
        0,
        key,
        height,
        width,
        AUDIO.num_steps(),
    )
    frames = _decode_cut(packets, drawn.crop_top, drawn.crop_left, drawn.flip)
    samples = torch.from_numpy(np.asarray(spdl.io.load_wav(audio))[:, 0].astype(np.float32)).div_(32768)
    log_mel = log_mel_spectrogram(samples, AUDIO)
    if augment:
        log_mel = augment_log_mel(log_mel, drawn)
    return frames, log_mel.unsqueeze(0), key


def _decode_cut(packets, top: int, left: int, flip: bool):
    mirror = "hflip," if flip else ""
    cut = f"crop={CROP}:{CROP}:{left}:{top}:exact=1,{mirror}format=rgb24"
    return spdl.io.decode_packets(packets, filter_desc=cut)


def _collate(samples):
    frames, log_mels, keys = zip(*samples)
    pixels = spdl.io.to_torch(spdl.io.convert_frames(list(frames)))  # (N, T, H, W, 3)
    return pixels, torch.stack(log_mels), keys
