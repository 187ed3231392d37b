"""The ceiling: decoders alone, clips in memory, frames left where the decoder put them.

No tar, no checksum, no copy, no color conversion, no crop, no sound, no batch. Each makes sure that it got 32 frames.
"""

import io
import itertools
import tarfile
from collections.abc import Callable, Iterator

import numpy as np
import torch

from benchmarks.contenders.base import (
    CROP,
    NUM_FRAMES,
    PREFETCH_PER_WORKER,
    Batch,
    Workload,
    counted_in_processes,
)

MAX_CLIPS = 512  # held in memory


def open_stream(workload: Workload) -> Iterator[Batch]:
    clips = list(
        itertools.islice(clips_of(workload.shards), MAX_CLIPS if workload.augment else workload.batch_size)
    )
    engine = workload.options["engine"]
    if not workload.augment:
        return _lumas(clips, engine, workload.batch_size)
    if engine == "spdl":
        return _in_threads(clips, workload)
    decode = {"pyav": _decode_pyav, "ours": _decode_ours}[engine]

    def work(worker: int) -> Iterator[tuple[int, int]]:
        own = itertools.cycle(clips[worker % len(clips) :] + clips[: worker % len(clips)])
        while True:
            for video in itertools.islice(own, workload.batch_size):
                decode(video, None)
            yield workload.batch_size, 0

    return counted_in_processes(work, workload.num_workers)


def clips_of(shards: list[str]) -> Iterator[tuple[str, bytes]]:
    """(key, mp4) of all clips."""
    for path in shards:
        with tarfile.open(path) as tar:
            for member in tar:
                if member.name.endswith(".mp4"):
                    yield member.name[: -len(".mp4")], tar.extractfile(member).read()


Keep = Callable[[np.ndarray], None] | None
"""Called with each frame's Y plane, uint8 (H, W), in the content check."""


def _decode_pyav(clip: tuple[str, bytes], keep: Keep) -> None:
    import av

    count = 0
    with av.open(io.BytesIO(clip[1])) as container:
        stream = container.streams.video[0]
        stream.thread_type = "NONE"
        for frame in container.decode(stream):
            count += 1
            if keep is not None:
                keep(_luma(frame))
    _check_count(clip[0], count)


def _decode_ours(clip: tuple[str, bytes], keep: Keep) -> None:
    from loaders.decode import _chosen_frames

    count = 0
    for _row, frame in _chosen_frames(clip[1], range(NUM_FRAMES), None, clip[0], ""):
        count += 1
        if keep is not None:
            keep(_luma(frame))
    _check_count(clip[0], count)


def _decode_spdl(clip: tuple[str, bytes], keep: Keep) -> None:
    import spdl.io

    frames = spdl.io.decode_packets(spdl.io.demux_video(clip[1]), filter_desc=None)
    _check_count(clip[0], len(frames))
    if keep is not None:
        for planes in spdl.io.to_numpy(spdl.io.convert_frames(frames))[:, 0]:  # (H * 3 / 2, W)
            keep(planes[: len(planes) * 2 // 3])


def _luma(frame) -> np.ndarray:
    plane = frame.planes[0]
    return np.frombuffer(plane, np.uint8).reshape(-1, plane.line_size)[: frame.height, : frame.width]


def _check_count(key: str, count: int) -> None:
    if count != NUM_FRAMES:
        raise ValueError(f"{key}: decoded {count} frames, expected {NUM_FRAMES}")


def _in_threads(clips: list[tuple[str, bytes]], workload: Workload) -> Iterator[Batch]:
    from collections import deque
    from concurrent.futures import ThreadPoolExecutor

    torch.set_num_threads(1)
    endless = itertools.cycle(clips)

    def decode(batch: list[tuple[str, bytes]]) -> int:
        for clip in batch:
            _decode_spdl(clip, None)
        return len(batch)

    with ThreadPoolExecutor(workload.num_workers) as pool:
        ahead = deque()
        while True:
            while len(ahead) < PREFETCH_PER_WORKER * workload.num_workers:
                ahead.append(pool.submit(decode, list(itertools.islice(endless, workload.batch_size))))
            yield Batch(num_clips=ahead.popleft().result())


def _lumas(clips: list[tuple[str, bytes]], engine: str, batch_size: int) -> Iterator[Batch]:
    """For the content check: the centers of the Y planes."""
    decode = {"pyav": _decode_pyav, "ours": _decode_ours, "spdl": _decode_spdl}[engine]
    lumas = np.empty((len(clips), NUM_FRAMES, CROP, CROP), dtype=np.uint8)
    for row, clip in enumerate(clips):
        planes: list[np.ndarray] = []
        decode(clip, lambda plane, planes=planes: planes.append(center(plane)))
        lumas[row] = planes
    yield Batch(num_clips=len(clips), luma=lumas, keys=tuple(key for key, _ in clips))


def center(plane: np.ndarray) -> np.ndarray:
    """Copy of the middle 128 x 128 of a plane (H, W)."""
    top, left = (plane.shape[0] - CROP) // 2, (plane.shape[1] - CROP) // 2
    return plane[top : top + CROP, left : left + CROP].copy()
