"""The rungs of our own loader: where do the clips per second go?

`read`, `decode` and `transforms` run in worker processes like the loader's and hand nothing over; each does what the
one before does and more. The loader itself and its copies to the device come on top; with the training step behind it
the waiting for data is timed.
"""

import itertools
import random
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from benchmarks.contenders.base import (
    AUDIO,
    CROP,
    NUM_FRAMES,
    SHORT_SIDE,
    Batch,
    Workload,
    counted_in_processes,
)
from benchmarks.contenders.ours import loader_config
from benchmarks.contenders.ours import open_stream as open_ours
from loaders import build_loader
from loaders.batch import ClipBatch
from shards.reader import RawClip, ShardReader
from shards.schema import BadClip


def open_stream(workload: Workload) -> Iterator[Batch]:
    rung = workload.options["rung"]
    if rung == "synthetic batch":
        return _synthetic(workload)
    if rung == "copy to device":
        return open_ours(replace(workload, options={"backend": "portable"}))
    if rung == "workers for a GPU":
        return _for_gpu(workload)
    if rung == "step on one batch":
        return _steps(workload, one_batch=True)
    if rung == "loader and step":
        return _steps(workload, one_batch=False)
    work = {"read": _read, "decode": _decode, "transforms": _transform}[rung]

    def run(worker: int) -> Iterator[tuple[int, int]]:
        clips = _clips(workload.shards)
        frames = np.empty((workload.batch_size, NUM_FRAMES, CROP, CROP, 3), dtype=np.uint8)
        log_mel = torch.empty((workload.batch_size, AUDIO.num_mel_bins, AUDIO.num_steps()))
        while True:
            num_bad = 0
            for row in range(workload.batch_size):
                try:
                    work(next(clips), frames[row], log_mel[row])
                except BadClip:
                    num_bad += 1
            yield workload.batch_size - num_bad, num_bad

    return counted_in_processes(run, workload.num_workers)


def _clips(paths: list[str]) -> Iterator[RawClip]:
    """Endless, in random order."""
    readers = [ShardReader(path) for path in paths]
    order = [(reader, position) for reader in readers for position in range(len(reader))]
    while True:
        random.shuffle(order)
        for reader, position in order:
            yield reader.read(position)


def _read(raw: RawClip, frames: np.ndarray, log_mel: torch.Tensor) -> None:
    assert raw.video and raw.audio


def _decode(raw: RawClip, frames: np.ndarray, log_mel: torch.Tensor) -> None:
    from loaders.decode import decode_frames, decode_waveform

    window = ((raw.info.frame_height - CROP) // 2, (raw.info.frame_width - CROP) // 2, CROP, CROP)
    decode_frames(raw.video, range(NUM_FRAMES), SHORT_SIDE, window=window, out=frames, key=raw.info.key)
    decode_waveform(raw.audio, key=raw.info.key)


def _transform(raw: RawClip, frames: np.ndarray, log_mel: torch.Tensor) -> None:
    from loaders.audio_ops import augment_log_mel, log_mel_spectrogram
    from loaders.augment import draw_augmentation, scaled_size
    from loaders.config import VideoConfig
    from loaders.decode import decode_frames, decode_waveform

    info, video = raw.info, VideoConfig()
    width, height = scaled_size(info.frame_width, info.frame_height, SHORT_SIDE)
    drawn = draw_augmentation(video, AUDIO, 0, 0, info.key, height, width, AUDIO.num_steps())
    window = (drawn.crop_top, drawn.crop_left, CROP, CROP)
    decode_frames(
        raw.video, range(NUM_FRAMES), SHORT_SIDE, window=window, flip=drawn.flip, out=frames, key=info.key
    )
    waveform = torch.from_numpy(decode_waveform(raw.audio, key=info.key))
    log_mel.copy_(augment_log_mel(log_mel_spectrogram(waveform, AUDIO), drawn))


def _for_gpu(workload: Workload) -> Iterator[Batch]:
    """Filled requests, as they would be copied to the GPU."""
    from loaders.base import open_shard_table
    from loaders.portable import PortableLoader
    from loaders.workers import ClipDataset, ClipOutputs, ClipWorkers, ShardClips

    config = loader_config(workload, "portable")
    files, _ = open_shard_table(config)
    outputs = ClipOutputs(video=config.video, audio=config.audio, pixels="yuv", sound="waveform")
    workers = ClipWorkers(
        ClipDataset(ShardClips(files, outputs, config.seed)),
        PortableLoader(config).requests(),
        num_workers=config.num_workers,
        prefetch_batches=config.prefetch_batches,
        num_clips=workload.batch_size,
        num_parts=1,
    )
    while True:
        (part,) = workers.take().parts
        num_bad = len(part.bad)
        yield Batch(num_clips=workload.batch_size - num_bad, num_bad=num_bad)


def _synthetic(workload: Workload) -> Iterator[Batch]:
    shape = (workload.batch_size, NUM_FRAMES, CROP, CROP, 3)
    frames = torch.randint(0, 256, shape, dtype=torch.uint8).permute(0, 4, 1, 2, 3)
    log_mel = torch.randn(workload.batch_size, 1, AUDIO.num_mel_bins, AUDIO.num_steps())
    while True:
        time.sleep(0)
        yield Batch(num_clips=workload.batch_size, frames=frames, log_mel=log_mel)


def _steps(workload: Workload, one_batch: bool) -> Iterator[Batch]:
    """Batches after their training step: preset `demo` on the CPU, `pretrain-k400` on a GPU."""
    from cmac.config import PRESETS
    from cmac.pretrain import Pretraining

    torch.set_num_threads(max(1, workload.num_workers))
    on_gpu = workload.device != "cpu"
    config = PRESETS["pretrain-k400" if on_gpu else "demo"](workload.shard_folder)
    ours = replace(
        config.loader,
        backend="portable",
        global_batch_size=workload.batch_size,
        num_workers=max(1, workload.num_workers - (not on_gpu)),
    )
    config = replace(config, loader=ours, run_dir=str(Path(workload.shard_folder) / "unused-run"))
    loader = build_loader(ours, device=workload.device)
    training = Pretraining(config, torch.device(workload.device), len(loader))
    batches = itertools.chain.from_iterable(itertools.repeat(loader))
    fixed: ClipBatch | None = next(batches) if one_batch else None
    if one_batch:
        loader.close()
    while True:
        begin = time.perf_counter()
        batch = fixed or next(batches)
        waited = time.perf_counter() - begin
        training.train_step(batch)
        if on_gpu:
            torch.cuda.synchronize()
        yield Batch(num_clips=int(batch.valid.sum()), num_bad=len(batch.bad), wait_seconds=waited)
