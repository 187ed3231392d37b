"""decord and OpenCV in DataLoader workers. They read files, so the clips lie beside the shards as mp4 and wav."""

from collections.abc import Iterator

import numpy as np
from torch.utils.data import Dataset

from benchmarks.contenders.base import (
    CROP,
    NUM_FRAMES,
    Batch,
    Sample,
    Workload,
    batches_of_workers,
    collate,
    crop_and_flip,
    crop_offset,
    flips,
    log_mel_of,
    read_wav,
)


class ClipFiles(Dataset):
    """Clips as [key, mp4, wav] paths."""

    def __init__(self, workload: Workload) -> None:
        self._files = workload.clip_files
        self._augment = workload.augment
        self._decode = {"decord": _decord, "opencv": _opencv}[workload.options["decoder"]]

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> Sample:
        key, video, audio = self._files[index]
        frames = self._decode(video, self._augment)
        with open(audio, "rb") as file:
            samples = read_wav(file.read())
        return frames, log_mel_of(samples, self._augment), key


def open_stream(workload: Workload) -> Iterator[Batch]:
    dataset = ClipFiles(workload)
    return batches_of_workers(
        dataset,
        workload,
        batch_size=min(workload.batch_size, len(dataset)),
        shuffle=workload.augment,
        drop_last=True,
        collate_fn=collate,
    )


def _decord(path: str, augment: bool):
    import decord

    reader = decord.VideoReader(path, ctx=decord.cpu(0), num_threads=1)
    if len(reader) != NUM_FRAMES:
        raise ValueError(f"{path} has {len(reader)} frames, expected {NUM_FRAMES}")
    return crop_and_flip(reader.get_batch(range(NUM_FRAMES)).asnumpy(), augment)


def _opencv(path: str, augment: bool):
    import cv2
    import torch

    cv2.setNumThreads(0)
    video = cv2.VideoCapture(path, cv2.CAP_FFMPEG, [cv2.CAP_PROP_N_THREADS, 1])
    out = np.empty((NUM_FRAMES, CROP, CROP, 3), dtype=np.uint8)
    count, window, flip = 0, None, flips(augment)
    while True:
        good, image = video.read()
        if not good:
            break
        if count == NUM_FRAMES:
            raise ValueError(f"{path} has more than {NUM_FRAMES} frames")
        top, left = window = window or crop_offset(*image.shape[:2], augment)
        cut = image[top : top + CROP, left : left + CROP]
        cv2.cvtColor(cv2.flip(cut, 1) if flip else cut, cv2.COLOR_BGR2RGB, dst=out[count])
        count += 1
    video.release()
    if count != NUM_FRAMES:
        raise ValueError(f"{path} has {count} frames, expected {NUM_FRAMES}")
    return torch.from_numpy(out)
