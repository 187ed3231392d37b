"""The portable loader: PyAV and torch in worker processes. It needs nothing from the system.

A worker makes whole batches: it reads clips by position, decodes, cuts, mirrors and computes the log-mel, and
writes the result straight into memory of the training process that the request named.

    sampler (training process) -> BatchRequest -> ClipDataset (worker) -> FilledRequest
        -> [pinned copy] -> ClipBatch (training process)
"""

import logging
import math
import multiprocessing
import os
import sys
import threading
import types
from collections import Counter, OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from loaders.audio_ops import augment_log_mel, log_mel_spectrogram
from loaders.augment import ClipAugmentation, draw_augmentation, scaled_size
from loaders.batch import BadClipRecord, ClipBatch
from loaders.config import AudioConfig, LoaderConfig, VideoConfig
from loaders.decode import decode_frames, decode_waveform, uniform_frame_indices
from loaders.plan import PADDING, EpochPlan, check_world, count_batches, slots_of_epoch
from loaders.shared_memory import BufferPool, SharedBuffer
from loaders.video_ops import color_jitter, flip_frames
from shards.manifest import Manifest, read_manifest
from shards.reader import RawClip, ShardReader
from shards.schema import BadClip, ClipInfo

MIN_CLIPS_FOR_BUDGET = 100  # max_bad_fraction is not judged on fewer
OPEN_SHARDS = 64  # per worker: a file descriptor and an index in memory each
STATE_VERSION = 1

log = logging.getLogger(__name__)


class TooManyBadClips(RuntimeError):
    """More than max_bad_fraction of the clips seen could not be used."""


@dataclass(frozen=True, kw_only=True)
class BatchRequest:
    """What the training process asks of a worker: positions, no data."""

    epoch: int
    """Epoch number."""
    step: int
    """Index of the batch in the epoch."""
    rows: np.ndarray
    """int64 (N, 2): (shard index, position in the shard); PADDING for no clip."""
    slots: tuple[int, ...]
    """The slot to read, and with two clips per video that of the second ones."""
    buffer: SharedBuffer | None
    """Where the worker puts frames and log-mel; None: into memory of its own."""


@dataclass(frozen=True)
class _Layout:
    """Where frames and log-mel of each slot's clips lie in the memory of one batch."""

    frames_shape: tuple[int, int, int, int, int]
    """(N, T, H, W, 3), uint8."""
    log_mel_shape: tuple[int, int, int, int]
    """(N, 1, F, S), float32."""
    num_parts: int
    """1, or 2 with second clips."""

    @property
    def _frames_bytes(self) -> int:
        return -(-math.prod(self.frames_shape) // 64) * 64

    @property
    def _part_bytes(self) -> int:
        return self._frames_bytes + -(-math.prod(self.log_mel_shape) // 16) * 64

    @property
    def num_bytes(self) -> int:
        return self.num_parts * self._part_bytes

    def tensors(self, memory: Tensor, part: int) -> tuple[Tensor, Tensor]:
        """(frames, log_mel) as views of memory, uint8 (num_bytes,)."""
        start = part * self._part_bytes
        frames = memory[start : start + math.prod(self.frames_shape)].view(self.frames_shape)
        start += self._frames_bytes
        log_mel = memory[start : start + 4 * math.prod(self.log_mel_shape)].view(torch.float32)
        return frames, log_mel.view(self.log_mel_shape)


@dataclass(frozen=True, kw_only=True)
class _Part:
    """What a batch holds besides frames and log-mel; see ClipBatch."""

    keys: list[str]
    video_ids: list[int]
    clips: list[ClipInfo | None]
    augmentations: list[ClipAugmentation | None]
    bad: list[BadClipRecord]


@dataclass(frozen=True, kw_only=True)
class FilledRequest:
    """What a worker sends back; frames and log-mel lie in the request's buffer, or in memory."""

    request: BatchRequest
    layout: _Layout
    parts: list[_Part]
    memory: Tensor | None
    """uint8 (layout.num_bytes,), where the request had no buffer."""
    pinned: ClipBatch | None = None
    """The batch in page-locked memory, if it was copied there."""

    def batch(self, memory: Tensor) -> ClipBatch:
        """The batch, whose tensors are views of memory."""
        batch = None
        for index in reversed(range(len(self.parts))):
            part = self.parts[index]
            frames, log_mel = self.layout.tensors(memory, index)
            batch = ClipBatch(
                frames=frames.permute(0, 4, 1, 2, 3),  # (N, 3, T, H, W)
                log_mel=log_mel,
                keys=tuple(part.keys),
                video_ids=torch.tensor(part.video_ids, dtype=torch.int64),
                valid=torch.tensor([clip is not None for clip in part.clips]),
                clips=tuple(part.clips),
                augmentations=tuple(part.augmentations),
                bad=tuple(part.bad),
                epoch=self.request.epoch,
                step=self.request.step,
                second=batch,
            )
        assert batch is not None
        return batch

    def pin_memory(self) -> "FilledRequest":
        """Called by the DataLoader's thread in the training process, beside the training step."""
        buffer = self.request.buffer
        memory = self.memory if buffer is None else torch.from_numpy(buffer.open())
        return replace(self, pinned=self.batch(memory).pin_memory(), memory=None)


def prepare_clip(
    raw: RawClip,
    video: VideoConfig,
    audio: AudioConfig,
    seed: int,
    epoch: int,
    frames: Tensor,
    log_mel: Tensor,
) -> ClipAugmentation:
    """Decodes one clip into a row of a batch; returns what was done to it.

    Args:
        raw: the clip as stored.
        video: frames to take, crop, augmentation.
        audio: front end, augmentation.
        seed: LoaderConfig.seed.
        epoch: epoch number.
        frames: uint8 (T, H, W, 3), written.
        log_mel: float32 (F, S), written.

    Raises:
        BadClip: the clip could not be decoded; frames and log_mel then hold anything.
    """
    info = raw.info
    if min(info.frame_width, info.frame_height) < 1:
        raise BadClip(info.key, raw.shard, "frame-size")
    width, height = scaled_size(info.frame_width, info.frame_height, video.short_side)
    augmentation = draw_augmentation(video, audio, seed, epoch, info.key, height, width, log_mel.shape[-1])
    decode_frames(
        raw.video,
        uniform_frame_indices(video.num_frames),
        video.short_side,
        stored_size=(info.frame_width, info.frame_height),
        window=(augmentation.crop_top, augmentation.crop_left, video.crop_size, video.crop_size),
        out=frames.numpy(),
        key=info.key,
        shard=raw.shard,
    )
    if augmentation.flip:
        frames.copy_(flip_frames(frames))
    if augmentation.color_order:
        jitter = {name: getattr(augmentation, name) for name in augmentation.color_order}
        frames.copy_(color_jitter(frames, augmentation.color_order, **jitter))
    waveform = decode_waveform(raw.audio, key=info.key, shard=raw.shard)
    log_mel.copy_(augment_log_mel(log_mel_spectrogram(torch.from_numpy(waveform), audio), augmentation))
    return augmentation


class ClipDataset(Dataset):
    """BatchRequest -> FilledRequest. Lives in the workers, or in the training process with num_workers=0."""

    def __init__(
        self, shard_paths: list[list[str]], video: VideoConfig, audio: AudioConfig, seed: int
    ) -> None:
        """shard_paths[slot][i]: path of the i-th shard of a slot."""
        self._shard_paths = shard_paths
        self._video = video
        self._audio = audio
        self._seed = seed
        self._readers: OrderedDict[str, ShardReader] = OrderedDict()

    def layout(self, num_clips: int, num_parts: int) -> _Layout:
        """Layout of a batch of num_clips."""
        size = self._video.crop_size
        return _Layout(
            (num_clips, self._video.num_frames, size, size, 3),
            (num_clips, 1, self._audio.num_mel_bins, self._audio.num_steps()),
            num_parts,
        )

    def __getitem__(self, request: BatchRequest) -> FilledRequest:
        layout = self.layout(len(request.rows), len(request.slots))
        if request.buffer is None:
            memory = torch.empty(layout.num_bytes, dtype=torch.uint8)
        else:
            memory = torch.from_numpy(request.buffer.open())
        with _one_thread():
            parts = [
                self._read(request.rows, slot, request.epoch, *layout.tensors(memory, part))
                for part, slot in enumerate(request.slots)
            ]
        return FilledRequest(
            request=request, layout=layout, parts=parts, memory=memory if request.buffer is None else None
        )

    def _read(self, rows: np.ndarray, slot: int, epoch: int, frames: Tensor, log_mel: Tensor) -> _Part:
        num_clips = len(rows)
        part = _Part(
            keys=[""] * num_clips,
            video_ids=[-1] * num_clips,
            clips=[None] * num_clips,
            augmentations=[None] * num_clips,
            bad=[],
        )
        for row, (shard, position) in enumerate(rows.tolist()):
            if shard != PADDING:
                reader = self._reader(self._shard_paths[slot][shard])
                part.keys[row] = reader.key(position)
                try:
                    raw = reader.read(position)
                    part.video_ids[row] = raw.info.video_number
                    part.augmentations[row] = prepare_clip(
                        raw, self._video, self._audio, self._seed, epoch, frames[row], log_mel[row, 0]
                    )
                    part.clips[row] = raw.info
                except BadClip as error:
                    key = part.keys[row]
                    part.bad.append(BadClipRecord(key=key, shard=reader.shard, reason=error.reason))
            if part.clips[row] is None:
                frames[row] = round(255 * self._video.mean)
                log_mel[row] = 0.0
        return part

    def _reader(self, path: str) -> ShardReader:
        """Reader of a shard, the OPEN_SHARDS last used of which stay open."""
        if path not in self._readers:
            self._readers[path] = ShardReader(path)
            if len(self._readers) > OPEN_SHARDS:
                self._readers.popitem(last=False)[1].close()
        self._readers.move_to_end(path)
        return self._readers[path]


class _RequestSampler(Sampler):
    """Batch requests of one rank, from a position on and through all later epochs."""

    def __init__(
        self,
        order: "_Order",
        rank: int,
        world_size: int,
        epoch: int,
        next_batch: int,
        pool: BufferPool | None,
    ) -> None:
        self._order = order
        self._pool = pool
        self._rank = rank
        self._world_size = world_size
        self._epoch = epoch
        self._next_batch = next_batch

    def __iter__(self) -> Iterator[BatchRequest]:
        epoch, first = self._epoch, self._next_batch
        while True:
            plan, slots = self._order.plan(epoch), self._order.slots(epoch)
            for step in range(first, plan.num_batches):
                rows = plan.batch(step, self._rank, self._world_size)
                buffer = None if self._pool is None else self._pool.acquire()
                yield BatchRequest(epoch=epoch, step=step, rows=rows, slots=slots, buffer=buffer)
            epoch, first = epoch + 1, 0


@dataclass(frozen=True)
class _Order:
    """Which clips come when: the configuration and the shards, epoch by epoch."""

    config: LoaderConfig
    clips_per_shard: list[int]
    num_slots: int

    def plan(self, epoch: int) -> EpochPlan:
        config = self.config
        return EpochPlan(
            clips_per_shard=self.clips_per_shard,
            seed=config.seed,
            epoch=epoch,
            global_batch_size=config.global_batch_size,
            shuffle=config.shuffle,
            shuffle_window=config.shuffle_window,
            drop_last=config.drop_last,
        )

    def slots(self, epoch: int) -> tuple[int, ...]:
        return slots_of_epoch(epoch, self.num_slots, self.config.clips_per_video)


class PortableLoader:
    """Batches of one rank; see `loaders.Loader` for the interface.

    `for batch in loader` yields the rest of the current epoch and then moves on to the next one. Worker
    processes start at the first batch, live through all epochs, and work ahead over the end of an epoch.
    """

    def __init__(
        self, config: LoaderConfig, rank: int = 0, world_size: int = 1, *, pin_memory: bool = False
    ) -> None:
        """Reads the manifest and checks that every shard is there in its full size.

        Raises:
            ValueError: no manifest, a shard is missing or of another size, world_size does not divide the
                global batch, fewer clips than one batch, or two clips per video from shards with one slot.
        """
        check_world(config.global_batch_size, rank, world_size)
        self.config = config
        self.rank = rank
        self.world_size = world_size
        self._pin_memory = pin_memory
        self.manifest = read_manifest(config.shards)
        shard_paths, clips_per_shard = _check_shards(config.shards, self.manifest)
        self._order = _Order(config, clips_per_shard, self.manifest.num_slots)
        self._order.slots(0)
        self._num_batches = count_batches(sum(clips_per_shard), config.global_batch_size, config.drop_last)
        if self._num_batches == 0:
            raise ValueError(
                f"loader.global_batch_size is {config.global_batch_size}, expected at most "
                f"{sum(clips_per_shard)}, the clips in a slot of {config.shards}; or use drop_last=False"
            )
        self.epoch = 0
        self._next_batch = 0
        self._filled: Iterator[FilledRequest] | None = None
        self._pool: BufferPool | None = None
        self._processes: list[Any] = []
        self.bad_clips: Counter[str] = Counter()
        self._bad_by_shard: Counter[str] = Counter()
        self._clips_seen = 0
        self._dataset = ClipDataset(shard_paths, config.video, config.audio, config.seed)

    def __len__(self) -> int:
        """Batches per epoch, the same in every epoch and on every rank."""
        return self._num_batches

    @property
    def next_batch(self) -> int:
        """Index in the epoch of the batch that comes next; len(self) after the epoch's last one."""
        return self._next_batch

    def plan(self, epoch: int) -> EpochPlan:
        """Order of the clips of an epoch, over all ranks."""
        return self._order.plan(epoch)

    def __iter__(self) -> Iterator[ClipBatch]:
        """The batches that are left of the current epoch.

        Raises:
            TooManyBadClips: more than max_bad_fraction of the clips seen were bad.
            RuntimeError: a worker process died.
            ValueError: a shard cannot be read any more.
        """
        epoch = self.epoch
        while self.epoch == epoch and self._next_batch < len(self):
            batch = self._take()
            assert (batch.epoch, batch.step) == (self.epoch, self._next_batch)
            self._next_batch += 1
            self._count(batch)
            yield batch
        if self.epoch == epoch:
            self.epoch, self._next_batch = epoch + 1, 0

    def state_dict(self) -> dict[str, Any]:
        """Position after the last batch handed out, in global batches, and what makes it mean the same again.

        Batches that workers have ready but that were not handed out are not counted. Equal on all ranks that
        have taken equally many batches, and loadable with another number of ranks or workers.
        """
        return {
            "version": STATE_VERSION,
            "epoch": self.epoch,
            "next_batch": self._next_batch,
            **self._order_fields(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a saved position; batches already made ready are thrown away.

        Raises:
            ValueError: the state is of another version, or of another order of clips: other shards, seed,
                global batch size, shuffling, drop_last or clips per video.
        """
        if state.get("version") != STATE_VERSION:
            raise ValueError(f"loader state has version {state.get('version')}, expected {STATE_VERSION}")
        for name, expected in self._order_fields().items():
            if state.get(name) != expected:
                raise ValueError(
                    f"loader state was saved with {name} {state.get(name)!r}, but it is {expected!r} now; "
                    f"resume with the old value or start a new run"
                )
        if state["epoch"] < 0 or not 0 <= state["next_batch"] <= len(self):
            raise ValueError(
                f"loader state is at batch {state['next_batch']} of epoch {state['epoch']}, "
                f"expected 0 to {len(self)}"
            )
        if (self.epoch, self._next_batch) != (state["epoch"], state["next_batch"]):
            self.close()
            self.epoch, self._next_batch = state["epoch"], state["next_batch"]

    def close(self) -> None:
        """End the worker processes. Iterating again starts new ones at the current position."""
        # Asked for by name: a traceback may keep the DataLoader's iterator alive, and with it the workers.
        end_workers = getattr(self._filled, "_shutdown_workers", None)
        pool = self._pool
        self._filled, self._pool, self._processes = None, None, []
        if end_workers is not None:
            end_workers()
        if pool is not None:
            pool.close()

    def _order_fields(self) -> dict[str, Any]:
        """What the order of clips depends on, besides the epoch."""
        names = ("seed", "global_batch_size", "shuffle", "shuffle_window", "drop_last", "clips_per_video")
        return {"manifest": self.manifest.digest, **{name: getattr(self.config, name) for name in names}}

    def _take(self) -> ClipBatch:
        """The next batch; starts the workers if there are none."""
        if self._filled is None:
            self._start()
        try:
            filled = next(self._filled)
        except RuntimeError as error:
            dead = [process for process in self._processes if process.exitcode not in (None, 0)]
            self.close()
            if not dead:
                raise
            codes = ", ".join(f"pid {process.pid}: {_describe_exit(process.exitcode)}" for process in dead)
            raise RuntimeError(
                f"loader worker died ({codes}) before batch {self._next_batch} of epoch {self.epoch}; if "
                f"memory ran out, lower loader.num_workers or loader.prefetch_batches"
            ) from error
        except BaseException:
            # The DataLoader's iterator is not to be used after an error of a worker.
            self.close()
            raise
        if self._pool is None:
            return filled.pinned or filled.batch(filled.memory)
        if filled.pinned is not None:
            self._pool.release(filled.request.buffer)
            return filled.pinned
        return filled.batch(torch.from_numpy(self._pool.lend(filled.request.buffer)))

    def _start(self) -> None:
        config = self.config
        if config.num_workers > 0 and BufferPool.is_supported():
            num_clips = config.global_batch_size // self.world_size
            self._pool = BufferPool(self._dataset.layout(num_clips, config.clips_per_video).num_bytes)
        sampler = _RequestSampler(
            self._order, self.rank, self.world_size, self.epoch, self._next_batch, self._pool
        )
        workers = {}
        if config.num_workers > 0:
            workers = {
                "num_workers": config.num_workers,
                "prefetch_factor": -(-config.prefetch_batches // config.num_workers),
                "worker_init_fn": _start_worker,
                "multiprocessing_context": _worker_context(),
            }
        loader = DataLoader(
            self._dataset,
            batch_size=None,
            sampler=sampler,
            collate_fn=_as_is,
            pin_memory=self._pin_memory,
            **workers,
        )
        with _without_main_module():
            self._filled = iter(loader)
        self._processes = list(getattr(self._filled, "_workers", []))

    def _count(self, batch: ClipBatch) -> None:
        """Adds up bad clips; raises TooManyBadClips over the budget."""
        for part in (batch, batch.second):
            if part is None:
                continue
            self._clips_seen += sum(key != "" for key in part.keys)
            for record in part.bad:
                self.bad_clips[record.reason] += 1
                self._bad_by_shard[record.shard] += 1
                log.info("bad clip %s of %s: %s", record.key, record.shard, record.reason)
        num_bad = self.bad_clips.total()
        allowed = self.config.max_bad_fraction
        if self._clips_seen >= MIN_CLIPS_FOR_BUDGET and num_bad > allowed * self._clips_seen:
            self.close()
            reasons = ", ".join(f"{reason} {count}" for reason, count in self.bad_clips.most_common())
            shards = ", ".join(f"{shard} ({count})" for shard, count in self._bad_by_shard.most_common(3))
            raise TooManyBadClips(
                f"{num_bad} of {self._clips_seen} clips are bad ({reasons}), expected at most {allowed:.2%} "
                f"(loader.max_bad_fraction); most are in {shards}; run tools/check_shards.py on "
                f"{self.config.shards}"
            )


def _check_shards(folder: str, manifest: Manifest) -> tuple[list[list[str]], list[int]]:
    """(paths by slot and shard, clips per shard); ValueError unless the files are as the manifest says."""
    paths, layout = [], []
    for slot in range(manifest.num_slots):
        shards = manifest.slot_shards(slot)
        for shard in shards:
            path = Path(folder) / shard.name
            size = path.stat().st_size if path.is_file() else None
            if size != shard.bytes:
                found = "is missing" if size is None else f"has {size} bytes"
                raise ValueError(
                    f"{path} {found}, expected {shard.bytes} bytes by its manifest; copy it again or re-run "
                    f"make_shards"
                )
        paths.append([os.path.join(folder, shard.name) for shard in shards])
        layout.append([(shard.index, shard.num_clips) for shard in shards])
    if not layout or not layout[0] or any(slot_layout != layout[0] for slot_layout in layout):
        raise ValueError(f"{folder}: slots do not hold the same videos shard by shard; re-run make_shards")
    return paths, [num_clips for _, num_clips in layout[0]]


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
    context.set_forkserver_preload(["loaders.portable"])
    return context


@contextmanager
def _without_main_module() -> Iterator[None]:
    """Processes started inside do not import the program's main module, which they do not need.

    They start faster and smaller, and a script without an `if __name__ == "__main__":` guard works.
    """
    main = sys.modules["__main__"]
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


def _start_worker(worker: int) -> None:
    """Runs first in each worker: one thread for torch, and a watch on the training process."""
    torch.set_num_threads(1)
    # torch's own watchdog looks at the parent process: here the fork server, which lives as long as they do.
    threading.Thread(target=_exit_with_parent, daemon=True, name="loader-parent-watch").start()


def _exit_with_parent() -> None:
    """Ends this process when the one that asked for it ends, however that happens."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)


def _describe_exit(code: int) -> str:
    return f"killed by signal {-code}" if code < 0 else f"exit code {code}"
