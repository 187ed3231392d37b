"""webdataset in DataLoader workers, as its documentation has it: shards resampled, a shuffle buffer, decoding and
batching in the workers.

Decoders: `pyav` as a careful user writes it (one thread, one reformatter for all frames); `pyav-to-ndarray` as most
code does, `frame.to_ndarray(format="rgb24")` for each frame; `torchcodec` by its performance tips (approximate seek,
one FFmpeg thread, one batch call; the crop as a tensor slice, which was faster than its own transform).
"""

import io
from collections.abc import Iterator

import av
import numpy as np
import webdataset
from av.video.reformatter import VideoReformatter

from benchmarks.contenders.base import (
    NUM_FRAMES,
    Batch,
    Sample,
    Workload,
    batches_of_workers,
    collate,
    crop_and_flip,
    log_mel_of,
    read_wav,
)

SHUFFLE_BUFFER = 100  # clips, still encoded


def open_stream(workload: Workload) -> Iterator[Batch]:
    decode = {"pyav": pyav_frames, "pyav-to-ndarray": pyav_naive_frames, "torchcodec": torchcodec_frames}[
        workload.options["decoder"]
    ]
    augment = workload.augment
    dataset = webdataset.WebDataset(workload.shards, resampled=augment, shardshuffle=False)
    if augment:
        dataset = dataset.shuffle(SHUFFLE_BUFFER)

    def prepare(sample: dict) -> Sample:
        frames = crop_and_flip(decode(sample["mp4"]), augment)
        return frames, log_mel_of(read_wav(sample["wav"]), augment), sample["__key__"]

    dataset = dataset.map(prepare).batched(workload.batch_size, collation_fn=collate, partial=False)
    return batches_of_workers(dataset, workload, batch_size=None)


_reformatter: VideoReformatter | None = None


def pyav_frames(video: bytes) -> np.ndarray:
    """uint8 (32, H, W, 3)."""
    global _reformatter
    if _reformatter is None:
        _reformatter = VideoReformatter()
    frames = None
    with av.open(io.BytesIO(video)) as container:
        stream = container.streams.video[0]
        stream.thread_type = "NONE"
        for index, frame in enumerate(container.decode(stream)):
            image = _reformatter.reformat(frame, format="rgb24", threads=1)
            height, width, plane = image.height, image.width, image.planes[0]
            if frames is None:
                frames = np.empty((NUM_FRAMES, height, width, 3), dtype=np.uint8)
            lines = np.frombuffer(plane, np.uint8).reshape(height, plane.line_size)
            frames[index] = lines[:, : 3 * width].reshape(height, width, 3)
    if frames is None or index != NUM_FRAMES - 1:
        raise ValueError(f"expected {NUM_FRAMES} frames")
    return frames


def pyav_naive_frames(video: bytes) -> np.ndarray:
    """uint8 (32, H, W, 3)."""
    with av.open(io.BytesIO(video)) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    if len(frames) != NUM_FRAMES:
        raise ValueError(f"decoded {len(frames)} frames, expected {NUM_FRAMES}")
    return np.stack(frames)


def torchcodec_frames(video: bytes) -> np.ndarray:
    """uint8 (32, H, W, 3)."""
    from torchcodec.decoders import VideoDecoder

    decoder = VideoDecoder(video, num_ffmpeg_threads=1, seek_mode="approximate", dimension_order="NHWC")
    return decoder.get_frames_in_range(0, NUM_FRAMES).data.numpy()
