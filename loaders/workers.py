"""Clips made in worker processes: what the loaders that decode on the CPU share.

A worker makes whole batches: it reads clips by position, decodes and prepares them, and writes the result
straight into memory of the training process that the request named.

    requests (training process) -> BatchRequest -> ClipDataset (worker) -> FilledRequest (training process)
"""

import faulthandler
import math
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from multiprocessing.connection import wait
from typing import Any, Literal, Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from loaders.audio_ops import augment_log_mel, log_mel_spectrogram
from loaders.augment import (
    LONGEST_SIDE,
    ClipAugmentation,
    draw_augmentation,
    scaled_size,
    yuv_window_size,
)
from loaders.background import Background
from loaders.base import BatchRequest, ClipTable, PositionedLoader, WorkerDied
from loaders.batch import BadClipRecord, ClipBatch
from loaders.config import AudioConfig, LoaderConfig, VideoConfig
from loaders.decode import (
    decode_frames,
    decode_waveform,
    decode_yuv_windows,
    uniform_frame_indices,
    waveform_samples,
)
from loaders.device import DeviceBatch
from loaders.plan import PADDING
from loaders.shard_files import OpenShards, ShardFiles
from loaders.shared_memory import BufferPool
from loaders.video_ops import color_jitter
from shards.pool import without_main_module
from shards.schema import SAMPLES_PER_CLIP, BadClip, ClipInfo
from shards.storage import is_url

HANG_SECONDS = (
    900.0  # for one batch; a worker that makes none for longer is ended, before a rank that hangs is
)
CLOSE_SECONDS = 5.0  # for workers to end by themselves
STACK_SECONDS = 1.0  # for workers to write down where they hang
STACK_TURN_SECONDS = 0.1  # for each, or their lines would mix
STOP_SIGNALS = {signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP}  # ask a run to stop
ALIGNMENT = 64  # bytes: arrays of a batch start at a cache line


@dataclass(frozen=True, kw_only=True)
class ClipOutputs:
    """Which arrays a worker makes of each clip."""

    video: VideoConfig
    audio: AudioConfig
    pixels: Literal["rgb", "yuv", "none"] = "rgb"
    """`rgb`: `frames`, uint8 (T, H, W, 3), finished. `yuv`: `yuv`, uint8 (T, window * window * 3 // 2), what
    `decode.decode_yuv_windows` gives, to be finished on the device. `none`: `frames` with T = 0."""
    sound: Literal["log-mel", "waveform", "none"] = "log-mel"
    """`log-mel`: `log_mel`, float32 (1, F, S), finished. `waveform`: `waveform`, int16 (num_samples,). `none`:
    `log_mel` with S = 0."""
    num_samples: int = SAMPLES_PER_CLIP
    """Samples of a clip's waveform."""

    def arrays(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Name -> (shape for one clip, dtype)."""
        video, audio = self.video, self.audio
        arrays: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
        if self.pixels in ("rgb", "none"):
            num_frames, size = video.num_frames if self.pixels == "rgb" else 0, video.crop_size
            arrays["frames"] = ((num_frames, size, size, 3), torch.uint8)
        else:
            window = yuv_window_size(video.crop_size)
            arrays["yuv"] = ((video.num_frames, window * window * 3 // 2), torch.uint8)
        if self.sound in ("log-mel", "none"):
            num_steps = audio.num_steps(self.num_samples) if self.sound == "log-mel" else 0
            arrays["log_mel"] = ((1, audio.num_mel_bins, num_steps), torch.float32)
        else:
            arrays["waveform"] = ((self.num_samples,), torch.int16)
        return arrays

    def clear(self, row: dict[str, Tensor]) -> None:
        """Makes row that of a clip that is not valid."""
        for name, array in row.items():
            array.fill_(round(255 * self.video.mean) if name == "frames" else 0)


@dataclass(frozen=True)
class BatchLayout:
    """Where the arrays of a batch's clips lie in one piece of memory."""

    outputs: ClipOutputs
    num_clips: int
    """N."""
    num_parts: int
    """1, or 2 with second clips."""

    def _part_bytes(self) -> int:
        return sum(self._array_bytes(*array) for array in self.outputs.arrays().values())

    def _array_bytes(self, shape: tuple[int, ...], dtype: torch.dtype) -> int:
        return -(-self.num_clips * math.prod(shape) * dtype.itemsize // ALIGNMENT) * ALIGNMENT

    @property
    def num_bytes(self) -> int:
        """Size of that memory."""
        return self.num_parts * self._part_bytes()

    def tensors(self, memory: Tensor, part: int) -> dict[str, Tensor]:
        """Name -> (N, ...), views of memory, uint8 (num_bytes,)."""
        start = part * self._part_bytes()
        tensors = {}
        for name, (shape, dtype) in self.outputs.arrays().items():
            end = start + self.num_clips * math.prod(shape) * dtype.itemsize
            tensors[name] = memory[start:end].view(dtype).view(self.num_clips, *shape)
            start += self._array_bytes(shape, dtype)
        return tensors


@dataclass(frozen=True, kw_only=True)
class FilledPart:
    """What a batch holds besides its arrays; see ClipBatch."""

    keys: list[str]
    video_ids: list[int]
    clips: list[ClipInfo | None]
    augmentations: list[ClipAugmentation | None]
    bad: list[BadClipRecord]


@dataclass(frozen=True, kw_only=True)
class FilledRequest:
    """A request whose clips are made."""

    request: BatchRequest
    layout: BatchLayout
    parts: list[FilledPart]
    memory: Tensor | None
    """uint8 (layout.num_bytes,); None on the way from a worker that wrote to the request's buffer."""
    error: OSError | None = None
    """What ends the run, met in the worker: SourceError, or of the cache. It travels as a value because an exception
    arrives as another one, whose message is a traceback."""


class ClipMaker(Protocol):
    """Makes one clip. Pickled to the workers, so what it opens it opens there."""

    outputs: ClipOutputs

    def name(self, slots: tuple[int, ...], part: int, shard: int, position: int) -> tuple[str, str]:
        """(key, name of the shard) of a clip."""

    def make(
        self, slots: tuple[int, ...], part: int, shard: int, position: int, epoch: int, row: dict[str, Tensor]
    ) -> tuple[ClipInfo, ClipAugmentation]:
        """Writes a clip's arrays to row; what the clip is and what was done to it.

        Raises:
            BadClip: it cannot be used; row then holds anything.
        """


class ShardClips:
    """Clips of a folder of shards."""

    def __init__(self, files: ShardFiles, outputs: ClipOutputs, seed: int) -> None:
        self.outputs = outputs
        self._shards = OpenShards(files)
        self._seed = seed
        self._frame_indices = uniform_frame_indices(outputs.video.num_frames)

    def name(self, slots: tuple[int, ...], part: int, shard: int, position: int) -> tuple[str, str]:
        """(key, name of the shard) of a clip."""
        return self._shards.name(slots, part, shard, position)

    def make(
        self, slots: tuple[int, ...], part: int, shard: int, position: int, epoch: int, row: dict[str, Tensor]
    ) -> tuple[ClipInfo, ClipAugmentation]:
        """Reads, decodes and prepares a clip; see ClipMaker."""
        raw = self._shards.read(slots, part, shard, position)
        info, video, audio = raw.info, self.outputs.video, self.outputs.audio
        if min(info.frame_width, info.frame_height) < 1:
            raise BadClip(info.key, raw.shard, "frame-size")
        width, height = scaled_size(info.frame_width, info.frame_height, video.short_side)
        if max(width, height) > LONGEST_SIDE:
            raise BadClip(info.key, raw.shard, "frame-size")
        done = draw_augmentation(video, audio, self._seed, epoch, info.key, height, width, audio.num_steps())
        stored = {
            "stored_size": (info.frame_width, info.frame_height),
            "key": info.key,
            "shard": raw.shard,
        }
        if self.outputs.pixels == "yuv":
            decode_yuv_windows(
                raw.video, self._frame_indices, video.short_side, top=done.crop_top, left=done.crop_left,
                crop_size=video.crop_size, out=row["yuv"].numpy(), **stored,
            )  # fmt: skip
        else:
            window = (done.crop_top, done.crop_left, video.crop_size, video.crop_size)
            decode_frames(
                raw.video, self._frame_indices, video.short_side, window=window, flip=done.flip,
                out=row["frames"].numpy(), **stored,
            )  # fmt: skip
            jitter_frames(row["frames"], done)
        if self.outputs.sound == "waveform":
            row["waveform"].numpy()[:] = waveform_samples(raw.audio, key=info.key, shard=raw.shard)
        else:
            waveform = decode_waveform(raw.audio, key=info.key, shard=raw.shard)
            finish_waveform(torch.from_numpy(waveform), audio, done, row["log_mel"])
        return info, done


def jitter_frames(frames: Tensor, augmentation: ClipAugmentation) -> None:
    """Color jitter of a crop, uint8 (T, H, W, 3), in place."""
    if augmentation.color_order:
        jitter = {name: getattr(augmentation, name) for name in augmentation.color_order}
        frames.copy_(color_jitter(frames, augmentation.color_order, **jitter))


def finish_waveform(
    waveform: Tensor, config: AudioConfig, augmentation: ClipAugmentation, out: Tensor
) -> None:
    """Augmented log-mel of a waveform, float32 (num_samples,), into out, float32 (1, F, S)."""
    out[0] = augment_log_mel(log_mel_spectrogram(waveform, config), augmentation)


class ClipDataset(Dataset):
    """BatchRequest -> FilledRequest. Lives in the workers, or in the training process with num_workers=0."""

    def __init__(self, maker: ClipMaker) -> None:
        self._maker = maker

    def layout(self, num_clips: int, num_parts: int) -> BatchLayout:
        """Layout of a batch of num_clips."""
        return BatchLayout(self._maker.outputs, num_clips, num_parts)

    def __getitem__(self, request: BatchRequest) -> FilledRequest:
        layout = self.layout(len(request.rows), len(request.slots))
        if request.buffer is None:
            memory = torch.empty(layout.num_bytes, dtype=torch.uint8)
        else:
            memory = torch.from_numpy(request.buffer.open())
        with _one_thread():
            error, parts = None, []
            try:
                for part in range(layout.num_parts):
                    parts.append(self._make(request, part, layout.tensors(memory, part)))
            except OSError as problem:
                error = problem
        return FilledRequest(
            request=request,
            layout=layout,
            parts=parts,
            memory=memory if request.buffer is None else None,
            error=error,
        )

    def _make(self, request: BatchRequest, part: int, arrays: dict[str, Tensor]) -> FilledPart:
        num_clips = len(request.rows)
        filled = FilledPart(
            keys=[""] * num_clips,
            video_ids=[-1] * num_clips,
            clips=[None] * num_clips,
            augmentations=[None] * num_clips,
            bad=[],
        )
        for index, (shard, position) in enumerate(request.rows.tolist()):
            row = {name: array[index] for name, array in arrays.items()}
            if shard != PADDING:
                place = (request.slots, part, shard, position)
                filled.keys[index], shard_name = self._maker.name(*place)
                try:
                    info, augmentation = self._maker.make(*place, request.epoch, row)
                    filled.clips[index], filled.augmentations[index] = info, augmentation
                    filled.video_ids[index] = info.video_number
                except BadClip as error:
                    record = BadClipRecord(key=filled.keys[index], shard=shard_name, reason=error.reason)
                    filled.bad.append(record)
            if filled.clips[index] is None:
                self._maker.outputs.clear(row)
        return filled


def assemble_batch(
    request: BatchRequest, parts: Sequence[FilledPart], arrays: Sequence[tuple[Tensor, Tensor]]
) -> ClipBatch:
    """ClipBatch of the (frames, log_mel) of each part, which must be on one device."""
    batch = None
    for filled, (frames, log_mel) in reversed(list(zip(parts, arrays, strict=True))):
        valid = torch.tensor([clip is not None for clip in filled.clips])
        batch = ClipBatch(
            frames=frames,
            log_mel=log_mel,
            keys=tuple(filled.keys),
            video_ids=torch.tensor(filled.video_ids, dtype=torch.int64).to(frames.device),
            valid=valid.to(frames.device),
            clips=tuple(filled.clips),
            augmentations=tuple(filled.augmentations),
            bad=tuple(filled.bad),
            epoch=request.epoch,
            step=request.step,
            second=batch,
        )
    assert batch is not None
    return batch


class ClipWorkers:
    """Worker processes that fill requests, in order, a bounded number ahead.

    The memory of what they fill belongs to a pool: it goes back there when all tensors on it are gone.
    """

    def __init__(
        self,
        dataset: ClipDataset,
        requests: Iterator[BatchRequest],
        *,
        num_workers: int,
        prefetch_batches: int,
        num_clips: int,
        num_parts: int,
        hang_seconds: float = HANG_SECONDS,
    ) -> None:
        """Starts them. num_workers=0: the caller of `take` does the work.

        Args:
            dataset: fills one request.
            requests: all with num_clips rows and num_parts slots.
            num_workers: processes.
            prefetch_batches: filled ahead, rounded up to a multiple of num_workers.
            num_clips: N.
            num_parts: 1, or 2 with second clips.
            hang_seconds: longest that a batch may be waited for; then all workers are ended.
        """
        self._pool = None
        workers: dict[str, Any] = {}
        if num_workers > 0:
            if BufferPool.is_supported():
                self._pool = BufferPool(dataset.layout(num_clips, num_parts).num_bytes)
            workers = {
                "num_workers": num_workers,
                "prefetch_factor": -(-prefetch_batches // num_workers),
                "worker_init_fn": _start_worker,
                "multiprocessing_context": _worker_context(),
            }
        self._sampler = sampler = _RequestSampler(requests, self._pool)
        # A generator of its own: starting workers must not draw from the training's.
        loader = DataLoader(
            dataset,
            batch_size=None,
            sampler=sampler,
            collate_fn=_as_is,
            generator=torch.Generator().manual_seed(0),
            **workers,
        )
        with without_main_module(), _signals_held():
            self._filled: Iterator[FilledRequest] | None = iter(loader)
        self._processes: Sequence[Any] = list(getattr(self._filled, "_workers", []))
        self._hang_seconds = hang_seconds
        self._hung = ""
        self._num_taken = 0

    @property
    def process_ids(self) -> list[int]:
        """Of the workers; empty with num_workers=0."""
        return [process.pid for process in self._processes]

    @property
    def num_buffers(self) -> int:
        """Buffers of the pool: as many as were ever in use at once."""
        return 0 if self._pool is None else len(self._pool)

    def take(self) -> FilledRequest:
        """The next filled request, with memory.

        Raises:
            WorkerDied: a worker ended, or made nothing for `hang_seconds`.
            SourceError: a worker could not read the URL of the shards.
            OSError: or not write to their cache.
        """
        assert self._filled is not None, "closed"
        watch = threading.Timer(self._hang_seconds, self._end_hung) if self._processes else None
        try:
            if watch is not None:
                watch.daemon = True
                watch.start()
            filled = next(self._filled)
        except RuntimeError as error:
            dead = [process for process in self._processes if process.exitcode not in (None, 0)]
            self.close()
            if self._hung:
                raise WorkerDied(self._hung) from error
            if not dead:
                raise
            codes = ", ".join(f"pid {process.pid}: {_describe_exit(process.exitcode)}" for process in dead)
            raise WorkerDied(
                f"loader worker died ({codes}), expected it to live as long as the training; if memory ran out, "
                f"lower loader.num_workers or loader.prefetch_batches, then run the same command again"
            ) from error
        except BaseException:
            # The DataLoader's iterator is not to be used after an error of a worker.
            self.close()
            raise
        finally:
            if watch is not None:
                watch.cancel()
        del self._sampler.sent[self._num_taken]
        self._num_taken += 1
        if filled.error is not None:
            self.close()
            raise filled.error
        if filled.memory is None:
            assert self._pool is not None and filled.request.buffer is not None
            memory = torch.from_numpy(self._pool.lend(filled.request.buffer))
            filled = replace(filled, memory=memory)
        return filled

    def _end_hung(self) -> None:
        """Runs in a thread when a batch is overdue: says so, and ends all workers, so that `take` finds them dead."""
        worker = self._num_taken % len(self._processes)  # batches are given to workers in turns
        process, request = self._processes[worker], self._sampler.sent[self._num_taken]
        self._hung = (
            f"loader worker {worker} (pid {process.pid}) has made no batch for {self._hang_seconds:g} s, expected "
            f"batch {request.step} of epoch {request.epoch}; the stacks of all workers are above, its own first. If "
            f"the file system hangs, mend it; then run the same command again"
        )
        for other in sorted(self._processes, key=lambda other: other is not process):
            if other.is_alive():
                os.kill(other.pid, signal.SIGUSR2)  # writes its stacks
                time.sleep(STACK_TURN_SECONDS)
        time.sleep(STACK_SECONDS)
        self.kill()

    def kill(self) -> None:
        """End the processes at once, whatever they are at; a `take` in another thread finds them dead."""
        for process in self._processes:
            process.kill()

    def close(self) -> None:
        """End the processes, those that do not end by themselves by force. Memory that is lent stays valid."""
        # Asked for by name: a traceback may keep the DataLoader's iterator alive, and with it the workers.
        end_workers = getattr(self._filled, "_shutdown_workers", None)
        pool = self._pool
        self._filled, self._pool = None, None
        if end_workers is not None:
            watch = threading.Timer(CLOSE_SECONDS, self.kill)
            watch.daemon = True
            watch.start()
            try:
                end_workers()
            finally:
                watch.cancel()
            for process in self._processes:
                process.join(CLOSE_SECONDS)
        if pool is not None:
            pool.close()


class WorkerLoader(PositionedLoader):
    """A loader whose clips are made in worker processes; see `loaders.Loader` for the interface."""

    def __init__(
        self,
        config: LoaderConfig,
        rank: int,
        world_size: int,
        table: ClipTable,
        maker: ClipMaker,
        *,
        pin_memory: bool = False,
    ) -> None:
        super().__init__(config, rank, world_size, table)
        self._dataset = ClipDataset(maker)
        self._pin_memory = pin_memory
        # Page-locked memory belongs to a device's context, and a new thread starts at device 0.
        self._pin_device = torch.cuda.current_device() if pin_memory and torch.cuda.is_available() else None
        self._workers: ClipWorkers | None = None
        self._finished: Background[ClipBatch | DeviceBatch] | None = None

    def _finish(self, filled: FilledRequest) -> ClipBatch | DeviceBatch:
        """The batch, as views of the workers' memory; pinned in a thread beside the training step."""
        assert filled.memory is not None
        parts = [filled.layout.tensors(filled.memory, part) for part in range(len(filled.parts))]
        arrays = [(part["frames"].permute(0, 4, 1, 2, 3), part["log_mel"]) for part in parts]
        batch = assemble_batch(filled.request, filled.parts, arrays)
        if not self._pin_memory:
            return batch
        with nullcontext() if self._pin_device is None else torch.cuda.device(self._pin_device):
            return batch.pin_memory()

    def _finishes_ahead(self) -> bool:
        """Whether `_finish` is worth a thread of its own."""
        return self._pin_memory

    def _take(self) -> ClipBatch:
        if self._workers is None:
            config = self.config
            self._workers = ClipWorkers(
                self._dataset,
                self.requests(),
                num_workers=config.num_workers,
                prefetch_batches=config.prefetch_batches,
                num_clips=self.batch_size,
                num_parts=config.clips_per_video,
                # A worker may wait for a shard that another waits for.
                hang_seconds=HANG_SECONDS + 2 * config.source_retry_seconds * is_url(config.shards),
            )
            workers = self._workers
            if self._finishes_ahead():
                self._finished = Background(lambda: self._finish(workers.take()), depth=1)
        try:
            batch = self._finish(self._workers.take()) if self._finished is None else self._finished.take()
        except BaseException:
            self.close()
            raise
        return batch.hand_over() if isinstance(batch, DeviceBatch) else batch

    def close(self) -> None:
        """End the worker processes. Iterating again starts new ones at the current position."""
        finished, workers = self._finished, self._workers
        self._finished, self._workers = None, None
        self.stop_fetching()
        if finished is not None and not finished.close(CLOSE_SECONDS):
            assert workers is not None
            workers.kill()  # its thread waits for one that stalls
            finished.close()
        if workers is not None:
            workers.close()


class _RequestSampler(Sampler):
    """Requests with a buffer each. Asked for by the thread that takes."""

    def __init__(self, requests: Iterator[BatchRequest], pool: BufferPool | None) -> None:
        self._requests = requests
        self._pool = pool
        self.sent: dict[int, BatchRequest] = {}
        """Requests by their number; whoever takes the result removes it."""

    def __iter__(self) -> Iterator[BatchRequest]:
        for number, request in enumerate(self._requests):
            self.sent[number] = request
            yield request if self._pool is None else replace(request, buffer=self._pool.acquire())


def _as_is(filled: FilledRequest) -> FilledRequest:
    return filled


@contextmanager
def _one_thread() -> Iterator[None]:
    """Inside, torch computes in one thread: what one clip needs is too small to share out."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(num_threads)


def _worker_context() -> Any:
    """How workers are started.

    Choice: forkserver. A fork of the training process would copy the locks of its CUDA and collective threads
    in whatever state they are; spawn imports torch anew in each worker (more than a second of CPU time each),
    forkserver once for all of them.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["loaders.workers"])
    return context


@contextmanager
def _signals_held() -> Iterator[None]:
    """Processes started inside never get STOP_SIGNALS, which a batch system sends to all processes of a run: the
    training process ends its workers when it has no more use for them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _start_worker(worker: int) -> None:
    """Runs first in each worker: one thread for torch, and a watch on the training process."""
    # The fork server may be older than `_signals_held`.
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    torch.set_num_threads(1)
    # torch's own watchdog looks at the parent process: here the fork server, which lives as long as they do.
    threading.Thread(target=_exit_with_parent, daemon=True, name="loader-parent-watch").start()
    threading.Thread(target=_obey_parent, daemon=True, name="loader-signal-watch").start()
    faulthandler.register(signal.SIGUSR2)  # stacks of all threads, to see where a worker hangs


def _obey_parent() -> None:
    """Ends this process at a SIGTERM of the training process; those of others are dropped, see `_signals_held`."""
    parent = multiprocessing.parent_process()
    if not hasattr(signal, "sigwaitinfo"):  # macOS does not tell who sent it
        signal.sigwait({signal.SIGTERM})
        os._exit(0)
    while parent is not None:
        if signal.sigwaitinfo({signal.SIGTERM}).si_pid == parent.pid:
            os._exit(0)


def _exit_with_parent() -> None:
    """Ends this process when the one that asked for it ends, however that happens."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)


def _describe_exit(code: int) -> str:
    return f"killed by signal {-code}" if code < 0 else f"exit code {code}"
