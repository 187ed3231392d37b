"""The portable loader: PyAV and torch in worker processes. It needs nothing from the system.

A worker makes whole batches: it reads clips by position, decodes, cuts, mirrors and computes the log-mel, and writes the
frames straight into the shared memory in which the batch travels.

    sampler (training process) -> BatchRequest -> ClipDataset (worker) -> ClipBatch -> [pinned copy] -> consumer
"""

import logging
import multiprocessing
import os
import shutil
import sys
import threading
import types
import warnings
from collections import Counter, OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, get_worker_info

from loaders.audio_ops import augment_log_mel, log_mel_spectrogram
from loaders.augment import ClipAugmentation, draw_augmentation, scaled_size
from loaders.batch import BadClipRecord, ClipBatch
from loaders.config import AudioConfig, LoaderConfig, VideoConfig
from loaders.decode import decode_frames, decode_waveform, uniform_frame_indices
from loaders.plan import PADDING, EpochPlan, check_world, count_batches, slots_of_epoch
from loaders.video_ops import color_jitter, flip_frames
from shards.manifest import Manifest, read_manifest
from shards.reader import RawClip, ShardReader
from shards.schema import BadClip

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


def prepare_clip(
    raw: RawClip, video: VideoConfig, audio: AudioConfig, seed: int, epoch: int, frames: Tensor, log_mel: Tensor
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
    """BatchRequest -> ClipBatch. Lives in the workers, or in the training process with num_workers=0."""

    def __init__(self, shard_paths: list[list[str]], video: VideoConfig, audio: AudioConfig, seed: int) -> None:
        """shard_paths[slot][i]: path of the i-th shard of a slot."""
        self._shard_paths = shard_paths
        self._video = video
        self._audio = audio
        self._seed = seed
        self._readers: OrderedDict[str, ShardReader] = OrderedDict()

    def __getitem__(self, request: BatchRequest) -> ClipBatch:
        batch = None
        with _one_thread():
            for slot in reversed(request.slots):
                batch = self._read_batch(request, slot, second=batch)
        assert batch is not None
        return batch

    def _read_batch(self, request: BatchRequest, slot: int, second: ClipBatch | None) -> ClipBatch:
        num_clips, size = len(request.rows), self._video.crop_size
        frames = _empty((num_clips, self._video.num_frames, size, size, 3), torch.uint8)
        log_mel = _empty((num_clips, 1, self._audio.num_mel_bins, self._audio.num_steps()), torch.float32)
        keys = [""] * num_clips
        video_ids = torch.full((num_clips,), -1, dtype=torch.int64)
        clips, augmentations, bad = [None] * num_clips, [None] * num_clips, []
        for row, (shard, position) in enumerate(request.rows.tolist()):
            if shard != PADDING:
                reader = self._reader(self._shard_paths[slot][shard])
                keys[row] = reader.key(position)
                try:
                    raw = reader.read(position)
                    video_ids[row] = raw.info.video_number
                    augmentations[row] = prepare_clip(
                        raw, self._video, self._audio, self._seed, request.epoch, frames[row], log_mel[row, 0]
                    )
                    clips[row] = raw.info
                except BadClip as error:
                    bad.append(BadClipRecord(key=keys[row], shard=reader.shard, reason=error.reason))
            if clips[row] is None:
                frames[row] = round(255 * self._video.mean)
                log_mel[row] = 0.0
        return ClipBatch(
            frames=frames.permute(0, 4, 1, 2, 3),  # (N, 3, T, H, W)
            log_mel=log_mel,
            keys=tuple(keys),
            video_ids=video_ids,
            valid=torch.tensor([clip is not None for clip in clips]),
            clips=tuple(clips),
            augmentations=tuple(augmentations),
            bad=tuple(bad),
            epoch=request.epoch,
            step=request.step,
            second=second,
        )

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

    def __init__(self, order: "_Order", rank: int, world_size: int, epoch: int, next_batch: int) -> None:
        self._order = order
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
                yield BatchRequest(epoch=epoch, step=step, rows=rows, slots=slots)
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

    `for batch in loader` yields the rest of the current epoch and then moves on to the next one. Worker processes start at
    the first batch, live through all epochs, and work ahead over the end of an epoch.
    """

    def __init__(self, config: LoaderConfig, rank: int = 0, world_size: int = 1) -> None:
        """Reads the manifest and checks that every shard is there in its full size.

        Raises:
            ValueError: no manifest, a shard is missing or of another size, world_size does not divide the global batch,
                fewer clips than one batch, or two clips per video from shards with one slot.
        """
        check_world(config.global_batch_size, rank, world_size)
        self.config = config
        self.rank = rank
        self.world_size = world_size
        self.manifest = read_manifest(config.shards)
        shard_paths, clips_per_shard = _check_shards(config.shards, self.manifest)
        self._order = _Order(config, clips_per_shard, self.manifest.num_slots)
        self._order.slots(0)
        self._num_batches = count_batches(sum(clips_per_shard), config.global_batch_size, config.drop_last)
        if self._num_batches == 0:
            raise ValueError(
                f"loader.global_batch_size is {config.global_batch_size}, expected at most {sum(clips_per_shard)}, the "
                f"clips in a slot of {config.shards}; or use drop_last=False"
            )
        self.epoch = 0
        self._next_batch = 0
        self._batches: Iterator[ClipBatch] | None = None
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
        """Index in the epoch of the batch that comes next; len(self) when the epoch's last one was handed out."""
        return self._next_batch

    def plan(self, epoch: int) -> EpochPlan:
        """Order of the clips of an epoch, over all ranks."""
        return self._order.plan(epoch)

    def __iter__(self) -> Iterator[ClipBatch]:
        """The batches that are left of the current epoch.

        Raises:
            TooManyBadClips: more than max_bad_fraction of the clips seen were bad.
            RuntimeError: a worker process died or hangs.
            ValueError: a shard cannot be read any more.
        """
        epoch = self.epoch
        while self.epoch == epoch and self._next_batch < len(self):
            batch = self._take()
            assert (batch.epoch, batch.step) == (self.epoch, self._next_batch), "workers and position disagree"
            self._next_batch += 1
            self._count(batch)
            yield batch
        if self.epoch == epoch:
            self.epoch, self._next_batch = epoch + 1, 0

    def state_dict(self) -> dict[str, Any]:
        """Position after the last batch handed out, in global batches, and what makes it mean the same again.

        Batches that workers have ready but that were not handed out are not counted. Equal on all ranks that have taken
        equally many batches, and loadable with another number of ranks or workers.
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
            ValueError: the state is of another version, or of another order of clips: other shards, seed, global batch
                size, shuffling, drop_last or clips per video.
        """
        if state.get("version") != STATE_VERSION:
            raise ValueError(f"loader state has version {state.get('version')}, expected {STATE_VERSION}")
        for name, expected in self._order_fields().items():
            if state.get(name) != expected:
                raise ValueError(
                    f"loader state was saved with {name} {state.get(name)!r}, but it is {expected!r} now; resume with the "
                    f"old value or start a new run"
                )
        if state["epoch"] < 0 or not 0 <= state["next_batch"] <= len(self):
            raise ValueError(
                f"loader state is at batch {state['next_batch']} of epoch {state['epoch']}, expected 0 to {len(self)}"
            )
        if (self.epoch, self._next_batch) != (state["epoch"], state["next_batch"]):
            self.close()
            self.epoch, self._next_batch = state["epoch"], state["next_batch"]

    def close(self) -> None:
        """End the worker processes. Iterating again starts new ones at the current position."""
        # Asked for by name: a traceback may keep the DataLoader's iterator alive, and with it the workers.
        end_workers = getattr(self._batches, "_shutdown_workers", None)
        self._batches, self._processes = None, []
        if end_workers is not None:
            end_workers()

    def _order_fields(self) -> dict[str, Any]:
        """What the order of clips depends on, besides the epoch."""
        names = ("seed", "global_batch_size", "shuffle", "shuffle_window", "drop_last", "clips_per_video")
        return {"manifest": self.manifest.digest, **{name: getattr(self.config, name) for name in names}}

    def _take(self) -> ClipBatch:
        """The next batch; starts the workers if there are none."""
        if self._batches is None:
            self._batches = self._start()
        try:
            return next(self._batches)
        except RuntimeError as error:
            dead = [process for process in self._processes if process.exitcode not in (None, 0)]
            self.close()
            if not dead:
                raise
            codes = ", ".join(f"pid {process.pid}: {_describe_exit(process.exitcode)}" for process in dead)
            raise RuntimeError(
                f"loader worker died ({codes}) before batch {self._next_batch} of epoch {self.epoch}; if memory ran out, "
                f"lower loader.num_workers or loader.prefetch_batches"
            ) from error
        except BaseException:
            # The DataLoader's iterator is not to be used after an error of a worker.
            self.close()
            raise

    def _start(self) -> Iterator[ClipBatch]:
        sampler = _RequestSampler(self._order, self.rank, self.world_size, self.epoch, self._next_batch)
        pin_memory = torch.cuda.is_available()
        num_workers = self.config.num_workers
        if num_workers == 0:
            return iter(DataLoader(self._dataset, None, sampler=sampler, collate_fn=_as_is, pin_memory=pin_memory))
        self._check_shared_memory()
        loader = DataLoader(
            self._dataset,
            batch_size=None,
            sampler=sampler,
            collate_fn=_as_is,
            pin_memory=pin_memory,
            num_workers=num_workers,
            prefetch_factor=-(-self.config.prefetch_batches // num_workers),
            worker_init_fn=_start_worker,
            multiprocessing_context=_worker_context(),
        )
        with _without_main_module():
            batches = iter(loader)
        self._processes = list(getattr(batches, "_workers", []))
        return batches

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
                f"(loader.max_bad_fraction); most are in {shards}; run tools/check_shards.py on {self.config.shards}"
            )

    def _check_shared_memory(self) -> None:
        """Warns when the batches on their way may not fit in /dev/shm (64 MB in a container by default)."""
        if not os.path.isdir("/dev/shm"):
            return
        config = self.config
        clip_bytes = config.video.num_frames * config.video.crop_size**2 * 3
        clip_bytes += 4 * config.audio.num_mel_bins * config.audio.num_steps()
        rank_clips = config.global_batch_size // self.world_size * config.clips_per_video
        batches_in_flight = max(config.prefetch_batches, config.num_workers) + config.num_workers + 1
        needed, free = clip_bytes * rank_clips * batches_in_flight, shutil.disk_usage("/dev/shm").free
        if needed > free:
            warnings.warn(
                f"/dev/shm has {free >> 20} MB free, but loader batches on their way may take {needed >> 20} MB, and a "
                f"worker that finds it full is killed; give the container more (--shm-size) or lower "
                f"loader.prefetch_batches or loader.num_workers",
                stacklevel=4,
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
                    f"{path} {found}, expected {shard.bytes} bytes by its manifest; copy it again or re-run make_shards"
                )
        paths.append([os.path.join(folder, shard.name) for shard in shards])
        layout.append([(shard.index, shard.num_clips) for shard in shards])
    if not layout or not layout[0] or any(slot_layout != layout[0] for slot_layout in layout):
        raise ValueError(f"{folder}: the slots do not hold the same videos shard by shard; re-run make_shards")
    return paths, [num_clips for _, num_clips in layout[0]]


def _as_is(batch: ClipBatch) -> ClipBatch:
    return batch


@contextmanager
def _one_thread() -> Iterator[None]:
    """torch computes in one thread inside: the tensors of one clip are too small to share out, and bits stay the same."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(num_threads)


def _empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Memory for a batch: in a worker shared with the training process from the start, so that nothing is copied."""
    tensor = torch.empty(shape, dtype=dtype)
    return tensor if get_worker_info() is None else tensor.share_memory_()


def _worker_context() -> Any:
    """How workers are started.

    Choice: forkserver. A fork of the training process would copy the locks of its CUDA and collective threads in
    whatever state they are; spawn imports torch anew in each worker (more than a second of CPU time each), forkserver once
    for all of them.
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
    # torch's own watchdog looks at the parent process, which here is the fork server: it lives as long as its children.
    threading.Thread(target=_exit_with_parent, daemon=True, name="loader-parent-watch").start()


def _exit_with_parent() -> None:
    """Ends this process when the one that asked for it ends, however that happens."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)


def _describe_exit(code: int) -> str:
    return f"killed by signal {-code}" if code < 0 else f"exit code {code}"
