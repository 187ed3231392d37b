"""torchcodec decoding on the GPU, as its documentation has it: decoders in threads of the training process.

A thread reads tars with webdataset, as many threads as there are workers decode (`device="cuda"`, approximate seek);
crop, flip, mel and masks run on the GPU, one clip after the other for the pixels and in one call for the sound.
"""

import itertools
import random
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
import webdataset
from torchcodec.decoders import VideoDecoder

from benchmarks.contenders.base import (
    CROP,
    NUM_FRAMES,
    PREFETCH_PER_WORKER,
    Batch,
    LogMel,
    Workload,
    crop_offset,
    finished,
    flips,
    read_wav,
)

SHUFFLE_BUFFER = 100  # clips, still encoded


def open_stream(workload: Workload) -> Iterator[Batch]:
    log_mel = LogMel(workload.device)
    augment = workload.augment
    dataset = webdataset.WebDataset(workload.shards, resampled=augment, shardshuffle=False)
    if augment:
        dataset = dataset.shuffle(SHUFFLE_BUFFER)
    samples = itertools.chain.from_iterable(itertools.repeat(dataset))

    def decode(sample: dict):
        video = VideoDecoder(
            sample["mp4"], device=workload.device, seek_mode="approximate", dimension_order="NHWC"
        )
        frames = video.get_frames_in_range(0, NUM_FRAMES).data
        top, left = crop_offset(*frames.shape[1:3], augment)
        frames = frames[:, top : top + CROP, left : left + CROP]
        if flips(augment):
            frames = frames.flip(2)
        return frames, read_wav(sample["wav"]), sample["__key__"]

    random.seed(0)
    with ThreadPoolExecutor(workload.num_workers) as pool:
        ahead: deque[Future] = deque()
        while True:
            while len(ahead) < workload.batch_size * PREFETCH_PER_WORKER:
                ahead.append(pool.submit(decode, next(samples)))
            frames, sounds, keys = zip(*(ahead.popleft().result() for _ in range(workload.batch_size)))
            mel = log_mel(np.stack(sounds), augment)
            yield finished(torch.stack(frames), mel, keys, workload.device)
