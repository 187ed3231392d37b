"""What all contenders share: what they are given, what they hand out, and how clips are cut and heard.

All do the same to a clip: 32 RGB frames, a random 128-pixel crop, a flip in half of the cases; the log-mel of
`loaders.config.AudioConfig` with one frequency and one time mask. Where a contender does more or less, its module
says so. Time warp, checksums, an order that can be resumed and randomness by (seed, epoch, key) are ours alone: no
other contender pays for them.
"""

import io
import random
import threading
import warnings
import wave
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from loaders.config import AudioConfig, VideoConfig

CROP = VideoConfig().crop_size
SHORT_SIDE = VideoConfig().short_side
NUM_FRAMES = VideoConfig().num_frames
AUDIO = AudioConfig()
PREFETCH_PER_WORKER = 2


@dataclass(frozen=True, kw_only=True)
class Workload:
    """What a contender reads and how. Plain values: it goes to the contender's process as JSON."""

    shard_folder: str = ""
    """Folder of the H.264 shards."""
    shards: list[str] = field(default_factory=list)
    """Paths of their tars; the index is beside each."""
    vp9_shards: list[str] = field(default_factory=list)
    """Tars of the same clips in VP9 (mp4)."""
    mjpeg_shards: list[str] = field(default_factory=list)
    """Tars of the same clips in Motion JPEG (avi)."""
    clip_files: list[list[str]] = field(default_factory=list)
    """[key, path of the mp4, path of the wav] of the same clips as files."""
    video_folder: str = ""
    """Folder of the original videos."""
    videos: list[list[Any]] = field(default_factory=list)
    """[path, seconds] of the originals: a second of it may start at 0 .. seconds - 1."""
    batch_size: int = 16
    """Clips per batch."""
    num_workers: int = 2
    """Worker processes, or threads where a library works with threads."""
    augment: bool = True
    """Off for the content check: center crop, no flip, no masks, clips in the order of the shards, one worker."""
    device: str = "cpu"
    """Where batches shall end up: cpu or cuda."""
    options: dict[str, Any] = field(default_factory=dict)
    """The contender's own."""


@dataclass(kw_only=True)
class Batch:
    """What a contender hands out."""

    num_clips: int
    """Clips in it that can be used."""
    num_bad: int = 0
    """Clips that could not be used."""
    frames: Tensor | None = None
    """uint8 (N, 3, T, H, W), in any order in memory; None where a stream only counts."""
    log_mel: Tensor | None = None
    """float32 (N, 1, F, S), normalized."""
    keys: tuple[str, ...] | None = None
    """Keys of the clips, where the contender knows them (always in the content check)."""
    origins: list[tuple[str, float]] | None = None
    """(path, start in seconds) of clips cut from original videos, in the content check."""
    luma: np.ndarray | None = None
    """uint8 (N, T, 128, 128): center of the Y plane, from decode-only engines in the content check."""
    wait_seconds: float = 0.0
    """With a training step: how long it waited for this batch."""


class NotAvailable(Exception):
    """This contender cannot run here; the message says why."""


def crop_offset(height: int, width: int, augment: bool) -> tuple[int, int]:
    """(top, left) of the crop: random, or of the center."""
    room_y, room_x = height - CROP, width - CROP
    if augment:
        return random.randint(0, room_y), random.randint(0, room_x)
    return room_y // 2, room_x // 2


def flips(augment: bool) -> bool:
    """Whether this clip is mirrored."""
    return augment and random.random() < 0.5


def crop_and_flip(frames: np.ndarray, augment: bool) -> Tensor:
    """uint8 (T, 128, 128, 3), contiguous, from (T, H, W, 3)."""
    top, left = crop_offset(*frames.shape[1:3], augment)
    cut = frames[:, top : top + CROP, left : left + CROP]
    if flips(augment):
        cut = cut[:, :, ::-1]
    return torch.from_numpy(np.ascontiguousarray(cut))


def read_wav(data: bytes) -> np.ndarray:
    """int16 (num_samples,) of a clip's sound, by the standard library."""
    with wave.open(io.BytesIO(data)) as file:
        return np.frombuffer(file.readframes(file.getnframes()), dtype="<i2")


class LogMel:
    """The log-mel of AudioConfig as a user of torchaudio writes it, with SpecAugment's masks."""

    def __init__(self, device: str = "cpu") -> None:
        from torchaudio.transforms import FrequencyMasking, MelSpectrogram, TimeMasking

        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            self._mel = MelSpectrogram(
                AUDIO.sample_rate,
                n_fft=AUDIO.n_fft,
                win_length=AUDIO.window_samples,
                hop_length=AUDIO.hop_samples,
                n_mels=AUDIO.num_mel_bins,
            ).to(device)
        self._mask_frequencies = FrequencyMasking(AUDIO.frequency_mask_bins)
        self._mask_times = TimeMasking(AUDIO.time_mask_steps)

    def __call__(self, samples: np.ndarray | Tensor, augment: bool) -> Tensor:
        """float32 (1, F, S) of int16 (num_samples,), or (N, 1, F, S) of (N, num_samples)."""
        waveform = torch.as_tensor(samples, device=self._mel.mel_scale.fb.device)
        waveform = waveform.to(torch.float32).div_(32768).unsqueeze(-2)
        log_mel = self._mel(waveform).add_(AUDIO.log_offset).log_()
        log_mel = log_mel.sub_(AUDIO.log_mel_mean).div_(AUDIO.log_mel_std)
        if augment:
            log_mel = self._mask_times(self._mask_frequencies(log_mel))
        return log_mel


_per_thread = threading.local()


def log_mel_of(samples: np.ndarray, augment: bool) -> Tensor:
    """LogMel of int16 samples, by this thread's own transform."""
    if not hasattr(_per_thread, "log_mel"):
        _per_thread.log_mel = LogMel()
    return _per_thread.log_mel(samples, augment)


Sample = tuple[Tensor, Tensor, str]
"""What a DataLoader worker makes of a clip: frames (T, H, W, 3), log-mel (1, F, S), key."""


def collate(samples: list[Sample]) -> tuple[Tensor, Tensor, list[str]]:
    """Batch of samples: (N, T, H, W, 3), (N, 1, F, S), keys."""
    frames, log_mels, keys = zip(*samples)
    return torch.stack(frames), torch.stack(log_mels), list(keys)


def one_thread(_worker: int) -> None:
    """For worker processes: workers are the parallelism, threads inside them only get into each other's way."""
    torch.set_num_threads(1)


def batches_of_workers(
    dataset: Dataset | IterableDataset, workload: Workload, **options: Any
) -> Iterator[Batch]:
    """Endless batches of a DataLoader: persistent workers, two batches ahead each, pinned where there is a GPU."""
    loader = DataLoader(
        dataset,
        num_workers=workload.num_workers,
        persistent_workers=True,
        prefetch_factor=PREFETCH_PER_WORKER,
        worker_init_fn=one_thread,
        pin_memory=workload.device == "cuda",
        **options,
    )
    while True:
        for frames, log_mel, keys in loader:
            yield finished(frames, log_mel, tuple(keys), workload.device)


def finished(
    frames: Tensor, log_mel: Tensor, keys: tuple[str, ...] | None, device: str, num_bad: int = 0
) -> Batch:
    """Batch of frames (N, T, H, W, 3) and log_mel, on the device."""
    if device != "cpu":
        frames, log_mel = frames.to(device, non_blocking=True), log_mel.to(device, non_blocking=True)
    return Batch(
        num_clips=len(frames) - num_bad,
        num_bad=num_bad,
        frames=frames.permute(0, 4, 1, 2, 3),
        log_mel=log_mel,
        keys=keys,
    )


def counted_in_processes(
    work: Callable[[int], Iterable[tuple[int, int]]], num_workers: int
) -> Iterator[Batch]:
    """Runs work(worker) in forked processes; the (good, bad) counts that they yield, as batches without data.

    At most two counts of each worker wait to be taken: they stop when nobody asks.
    """
    import multiprocessing

    context = multiprocessing.get_context("fork")
    results = context.SimpleQueue()
    room = context.Semaphore(PREFETCH_PER_WORKER * num_workers)

    def run(worker: int) -> None:
        torch.set_num_threads(1)
        random.seed(worker)
        try:
            for counts in work(worker):
                room.acquire()
                results.put(counts)
        except BaseException as error:
            results.put(f"{type(error).__name__}: {error}")

    processes = [context.Process(target=run, args=(worker,), daemon=True) for worker in range(num_workers)]
    for process in processes:
        process.start()
    while True:
        counts = results.get()
        if isinstance(counts, str):
            raise RuntimeError(counts)
        room.release()
        yield Batch(num_clips=counts[0], num_bad=counts[1])
