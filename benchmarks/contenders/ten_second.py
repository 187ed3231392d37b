"""Loaders that cut a second out of the original video each time, as peers ship them, in DataLoader workers.

- `avid-cma`: seek to the container time, decode on, `to_image` of each frame taken, resize and crop by PIL.
- `gdt`: seek in the stream with a margin, `to_rgb().to_ndarray()` of each frame of the second, 32 of them picked, all
  resized by torch, then cut.
- `fixed`: as avid-cma, but scaled and converted in one swscale call in one thread with the reformatter kept: what is
  left when the resizing is mended.

The sound is the same for all: decoded from the same file, resampled to 24 kHz mono; then torchaudio's mel and masks.
A video that fails gives way to the next one, as in both code bases.
"""

import random
from collections.abc import Iterator
from fractions import Fraction

import av
import numpy as np
import torch
from av.video.reformatter import VideoReformatter
from PIL import Image
from torch.utils.data import Dataset

from benchmarks.contenders.base import (
    AUDIO,
    CROP,
    NUM_FRAMES,
    SHORT_SIDE,
    Batch,
    Sample,
    Workload,
    batches_of_workers,
    collate,
    crop_and_flip,
    crop_offset,
    flips,
    log_mel_of,
)
from loaders.augment import scaled_size

SEEK_MARGIN = 1024  # of GDT, in units of the stream's time base
MAX_TRIES = 50


class TenSecondVideos(Dataset):
    """A random second of each video; off for the check: the second that starts at 1, or 0 of short ones."""

    def __init__(self, workload: Workload) -> None:
        self._videos = workload.videos
        self._augment = workload.augment
        self._read = {"avid-cma": _avid_cma, "gdt": _gdt, "fixed": _fixed}[workload.options["style"]]

    def __len__(self) -> int:
        return len(self._videos)

    def __getitem__(self, index: int) -> Sample:
        for attempt in range(MAX_TRIES):
            path, seconds = self._videos[(index + attempt) % len(self._videos)]
            latest = max(0.0, seconds - 1.1)
            start = random.uniform(0, latest) if self._augment else min(1.0, latest)
            try:
                with av.open(path) as container:
                    frames = self._read(container, start, self._augment)
                    samples = _sound(container, start)
            except (av.error.FFmpegError, IndexError, ValueError):
                if not self._augment:
                    raise
                continue
            return frames, log_mel_of(samples, self._augment), f"{path}\0{start}"
        raise RuntimeError(f"{MAX_TRIES} videos in a row could not be read")


def open_stream(workload: Workload) -> Iterator[Batch]:
    dataset = TenSecondVideos(workload)
    sampler = torch.utils.data.RandomSampler(dataset, replacement=True, num_samples=10**9)
    batches = batches_of_workers(
        dataset,
        workload,
        batch_size=workload.batch_size,
        sampler=sampler if workload.augment else None,
        collate_fn=collate,
    )
    for batch in batches:
        if not workload.augment:
            batch.origins = [(path, float(start)) for path, start in (key.split("\0") for key in batch.keys)]
        batch.keys = None
        yield batch


def _wanted(stream, start: float) -> list[int]:
    """Numbers of the frames shown at start, start + 1/32, ..."""
    first = stream.start_time * stream.time_base if stream.start_time is not None else Fraction(0)
    times = start + np.arange(NUM_FRAMES) / NUM_FRAMES
    return [int((time - float(first)) * float(stream.average_rate)) for time in times]


def _chosen(container, start: float, convert) -> list:
    """convert(frame) of the 32 frames, a frame that is shown twice converted once."""
    stream = container.streams.video[0]
    wanted = _wanted(stream, start)
    container.seek(int(start * av.time_base))
    out: list = []
    for frame in container.decode(video=0):
        number = frame.pts * frame.time_base * stream.average_rate
        if number < wanted[len(out)]:
            continue
        image = convert(frame)
        while len(out) < NUM_FRAMES and number >= wanted[len(out)]:
            out.append(image)
        if len(out) == NUM_FRAMES:
            return out
    raise ValueError(f"{len(out)} frames from {start} s, expected {NUM_FRAMES}")


def _avid_cma(container, start: float, augment: bool) -> torch.Tensor:
    images = _chosen(container, start, lambda frame: frame.to_image())
    size = scaled_size(*images[0].size, SHORT_SIDE)
    top, left = crop_offset(size[1], size[0], augment)
    flip = flips(augment)
    out = []
    for image in images:
        image = image.resize(size, Image.BILINEAR).crop((left, top, left + CROP, top + CROP))
        out.append(np.asarray(image.transpose(Image.FLIP_LEFT_RIGHT) if flip else image))
    return torch.from_numpy(np.stack(out))


_reformatter: VideoReformatter | None = None


def _fixed(container, start: float, augment: bool) -> torch.Tensor:
    global _reformatter
    if _reformatter is None:
        _reformatter = VideoReformatter()
    container.streams.video[0].thread_type = "NONE"
    stream = container.streams.video[0]
    width, height = scaled_size(stream.width, stream.height, SHORT_SIDE)

    def convert(frame) -> np.ndarray:
        image = _reformatter.reformat(frame, width, height, "rgb24", interpolation="BILINEAR", threads=1)
        plane = image.planes[0]
        lines = np.frombuffer(plane, np.uint8).reshape(height, plane.line_size)
        return lines[:, : 3 * width].reshape(height, width, 3)

    return crop_and_flip(np.stack(_chosen(container, start, convert)), augment)


def _gdt(container, start: float, augment: bool) -> torch.Tensor:
    stream = container.streams.video[0]
    first = stream.start_time or 0
    begin = first + int(start / stream.time_base)
    end = begin + int(1 / stream.time_base)
    container.seek(max(begin - SEEK_MARGIN, 0), any_frame=False, backward=True, stream=stream)
    by_time = {}
    for frame in container.decode(video=0):
        if frame.pts < begin:
            continue
        by_time[frame.pts] = frame
        if frame.pts > end:
            break
    frames = [by_time[pts].to_rgb().to_ndarray() for pts in sorted(by_time)]
    if not frames:
        raise ValueError(f"no frames from {start} s")
    video = torch.as_tensor(np.stack(frames))
    video = video[torch.linspace(0, len(video) - 1, NUM_FRAMES).long()]
    width, height = scaled_size(video.shape[2], video.shape[1], SHORT_SIDE)
    video = torch.nn.functional.interpolate(
        video.permute(0, 3, 1, 2).float(), size=(height, width), mode="bilinear", align_corners=False
    )
    top, left = crop_offset(height, width, augment)
    video = video[:, :, top : top + CROP, left : left + CROP]
    if flips(augment):
        video = video.flip(-1)
    return video.round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def _sound(container, start: float) -> np.ndarray:
    """int16 (24000,) from start on, padded with zeros at the end of the video."""
    stream = container.streams.audio[0]
    container.seek(int(start / stream.time_base), stream=stream)
    resampler = av.AudioResampler(format="s16p", layout="mono", rate=AUDIO.sample_rate)
    parts, first = [], None
    for frame in container.decode(stream):
        time = float(frame.pts * frame.time_base)
        if time + frame.samples / frame.rate < start:
            continue
        if time > start + 1:
            break
        first = time if first is None else first
        frame.pts = None
        parts.extend(part.to_ndarray()[0] for part in resampler.resample(frame))
    if first is None:
        raise ValueError(f"no sound from {start} s")
    samples = np.concatenate(parts)
    offset = round((start - first) * AUDIO.sample_rate)
    samples = samples[offset:] if offset >= 0 else np.pad(samples, (-offset, 0))
    samples = samples[: AUDIO.sample_rate]
    return np.pad(samples, (0, AUDIO.sample_rate - len(samples)))
