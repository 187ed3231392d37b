"""The loader that decodes on the GPU, by DALI.

    requests -> threads: read, check -> DALI: decode, crop, flip, log-mel -> [kernel: jitter, normalize] -> ClipBatch

DALI is handed bytes and numbers and nothing else: which clips make up a batch and what is done to them come
from the plan and from draw_augmentation, as in every other loader.
"""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from loaders.augment import LONGEST_SIDE, ClipAugmentation, draw_augmentation, scaled_size
from loaders.background import Background, DaemonThreads
from loaders.base import BatchRequest, PositionedLoader, open_shard_table
from loaders.batch import BadClipRecord, ClipBatch
from loaders.config import LoaderConfig
from loaders.dali_audio import check_audio_config
from loaders.dali_video import DaliDecoder, DecodedClips, EncodedClips, is_scaled
from loaders.decode import waveform_samples
from loaders.device import DeviceBatch
from loaders.kernels.frames import DTYPES, finish_frames
from loaders.plan import PADDING
from loaders.shard_files import OpenShards
from loaders.video_ops import frame_parameters, mean_grey
from loaders.workers import CLOSE_SECONDS, FilledPart, assemble_batch
from shards.mp4 import read_video_track
from shards.reader import RawClip
from shards.schema import FRAMES_PER_CLIP, SHORT_SIDE, BadClip

NUM_READY = 2  # finished batches on the device


@dataclass(frozen=True, kw_only=True)
class ReadClips:
    """N clips as they were read, by row."""

    keys: list[str]
    """Empty for padding."""
    shards: list[str]
    """Name of each clip's shard; empty for padding."""
    raw: list[RawClip | None]
    """None for padding and for bad clips."""
    waveforms: list[np.ndarray | None]
    """int16 (24000,) each; None likewise."""
    augmentations: list[ClipAugmentation | None]
    """What will be done to each clip; None likewise."""
    reasons: dict[int, str] = field(default_factory=dict)
    """Row of a bad clip -> why."""

    @property
    def rows(self) -> list[int]:
        """Rows of the clips to decode."""
        return [row for row, raw in enumerate(self.raw) if raw is not None]

    def encoded(self) -> EncodedClips:
        """The clips of `rows`."""
        rows = self.rows
        infos = [self.raw[row].info for row in rows]
        return EncodedClips(
            videos=[self.raw[row].video for row in rows],
            sizes=[(info.frame_width, info.frame_height) for info in infos],
            waveforms=[self.waveforms[row] for row in rows],
            augmentations=[self.augmentations[row] for row in rows],
        )

    def drop(self, row: int, reason: str) -> None:
        """The clip of this row is bad."""
        self.raw[row] = self.waveforms[row] = self.augmentations[row] = None
        self.reasons[row] = reason

    def filled(self) -> FilledPart:
        """What a ClipBatch holds besides its arrays."""
        infos = [None if raw is None else raw.info for raw in self.raw]
        return FilledPart(
            keys=self.keys,
            video_ids=[-1 if info is None else info.video_number for info in infos],
            clips=infos,
            augmentations=self.augmentations,
            bad=[
                BadClipRecord(key=self.keys[row], shard=self.shards[row], reason=reason)
                for row, reason in sorted(self.reasons.items())
            ],
        )


@dataclass(frozen=True, kw_only=True)
class _Work:
    """What works ahead of the consumer, from one start to the next `close`; a thread that hangs then keeps its own."""

    requests: Iterator[BatchRequest]
    threads: DaemonThreads
    """Read clips."""
    decoder: DaliDecoder
    reading: deque[tuple[BatchRequest, Future[list[ReadClips]]]] = field(default_factory=deque)
    decoding: deque[tuple[BatchRequest, list[ReadClips]]] = field(default_factory=deque)


def check_coded_frames(raw: RawClip) -> None:
    """Raises BadClip unless key.mp4 holds 32 coded frames, as far as that can be seen without decoding.

    DALI believes the sample table: where the hardware decoder makes nothing of a sample, the frame is whatever
    was in memory. Reasons: `frame-count`; `decode-error` for a file that is damaged or not of the form that
    make_shards writes (`mp4.read_video_track`).
    """
    try:
        track = read_video_track(raw.video)
    except ValueError as error:
        raise BadClip(raw.info.key, raw.shard, "decode-error") from error
    if len(track.samples) != FRAMES_PER_CLIP:
        raise BadClip(raw.info.key, raw.shard, "frame-count")


class DaliGpuLoader(PositionedLoader):
    """Batches of one rank, made on its GPU; see `loaders.Loader` for the interface.

    num_workers threads read clips, prefetch_batches batches ahead; one thread runs DALI and keeps NUM_READY
    batches ready on the device.
    """

    def __init__(
        self,
        config: LoaderConfig,
        rank: int = 0,
        world_size: int = 1,
        *,
        device: torch.device | str = "cuda",
        frames_dtype: torch.dtype = torch.uint8,
    ) -> None:
        """Reads the manifest and checks the shards (`shard_files.open_shards`).

        Args:
            config: what to read and what to do to it; dali_threads clips are decoded at a time.
            rank: which part of each global batch.
            world_size: number of ranks.
            device: where clips are decoded and batches handed out. `cpu` is for tests: it decodes VP8, VP9 and
                MJPEG, and shards hold H.264.
            frames_dtype: uint8, or float32, bfloat16 or float16 for frames that are normalized already.

        Raises:
            ValueError: as PortableLoader; or there is no such device, the audio front end is not `log-mel`, or
                frames_dtype is another one.
        """
        check_audio_config(config.audio)
        if frames_dtype not in DTYPES:
            raise ValueError(f"frames_dtype is {frames_dtype}, expected one of {', '.join(map(str, DTYPES))}")
        self.device = torch.device(device)
        self._stream = None
        if self.device.type == "cuda":
            if not torch.cuda.is_available():
                raise ValueError(
                    "loader.backend dali-gpu needs a CUDA device and torch sees none; use loader.backend "
                    "dali-cpu-decode or portable"
                )
            if self.device.index is None:
                self.device = torch.device("cuda", torch.cuda.current_device())
            self._stream = torch.cuda.Stream(self.device)
        files, table = open_shard_table(config)
        self._shards = OpenShards(files)
        super().__init__(config, rank, world_size, table)
        self._frames_dtype = frames_dtype
        self._work: _Work | None = None
        self._batches: Background[ClipBatch | DeviceBatch] | None = None

    def _take(self) -> ClipBatch:
        if self._batches is None:
            self._work = work = _Work(
                requests=self.requests(),
                threads=DaemonThreads(max(1, self.config.num_workers), "loader-read"),
                decoder=DaliDecoder(self.config, self.batch_size, self.device),
            )
            self._batches = Background(partial(self._make_batch, work), depth=NUM_READY)
        try:
            batch = self._batches.take()
        except BaseException:
            self.close()
            raise
        return batch.hand_over() if isinstance(batch, DeviceBatch) else batch

    def close(self) -> None:
        """End the threads and free the pipeline: reads are not waited for, DALI for CLOSE_SECONDS. Iterating again
        starts anew at the current position."""
        batches, work = self._batches, self._work
        self._batches, self._work = None, None
        self.stop_fetching()
        if work is not None:
            work.threads.close()
        if batches is not None:
            batches.close(CLOSE_SECONDS)
        self._shards.close()

    # In threads that read: bytes to ReadClips.

    def _read(self, request: BatchRequest) -> list[ReadClips]:
        """The clips of each slot of a request."""
        return [self._read_part(request, part) for part in range(len(request.slots))]

    def _read_part(self, request: BatchRequest, part: int) -> ReadClips:
        num_clips = len(request.rows)
        clips = ReadClips(
            keys=[""] * num_clips,
            shards=[""] * num_clips,
            raw=[None] * num_clips,
            waveforms=[None] * num_clips,
            augmentations=[None] * num_clips,
        )
        for row, (shard, position) in enumerate(request.rows.tolist()):
            if shard == PADDING:
                continue
            place = (request.slots, part, shard, position)
            clips.keys[row], clips.shards[row] = self._shards.name(*place)
            try:
                raw = self._shards.read(*place)
                self._check(raw)
                clips.waveforms[row] = waveform_samples(raw.audio, key=raw.info.key, shard=raw.shard)
            except BadClip as error:
                clips.drop(row, error.reason)
                continue
            clips.raw[row], clips.augmentations[row] = raw, self._draw(raw, request.epoch)
        return clips

    def _check(self, raw: RawClip) -> None:
        """Raises BadClip where it is known before decoding."""
        width, height = raw.info.frame_width, raw.info.frame_height
        fits = min(width, height) >= 1 and (is_scaled(self.config.video) or min(width, height) == SHORT_SIDE)
        if not fits or max(scaled_size(width, height, self.config.video.short_side)) > LONGEST_SIDE:
            raise BadClip(raw.info.key, raw.shard, "frame-size")
        if self._stream is not None:
            check_coded_frames(raw)

    def _draw(self, raw: RawClip, epoch: int) -> ClipAugmentation:
        video, audio, info = self.config.video, self.config.audio, raw.info
        width, height = scaled_size(info.frame_width, info.frame_height, video.short_side)
        return draw_augmentation(
            video, audio, self.config.seed, epoch, info.key, height, width, audio.num_steps()
        )

    # In the thread of self._batches: ReadClips to ClipBatch.

    def _make_batch(self, work: _Work) -> ClipBatch | DeviceBatch:
        if self._stream is None:
            return self._decode_batch(work)
        with torch.cuda.device(self.device), torch.cuda.stream(self._stream):
            batch = self._decode_batch(work)
            written = torch.cuda.Event()
            written.record(self._stream)
        return DeviceBatch(batch, written)

    def _decode_batch(self, work: _Work) -> ClipBatch:
        parts, arrays = [], []
        for part in range(self.config.clips_per_video):
            while work.decoder.has_room:
                self._submit_next(work)
            request, read = work.decoding[0]
            arrays.append(self._finish(read[part], work.decoder.take()))
            parts.append(read[part].filled())
        work.decoding.popleft()
        return assemble_batch(request, parts, arrays)

    def _submit_next(self, work: _Work) -> None:
        """Hands the next request's clips to DALI, and keeps prefetch_batches requests being read."""
        while len(work.reading) < self.config.prefetch_batches:
            request = next(work.requests)
            work.reading.append((request, work.threads.submit(self._read, request)))
        request, future = work.reading.popleft()
        read = future.result()
        work.decoding.append((request, read))
        for clips in read:
            work.decoder.submit(clips.encoded())

    def _finish(self, clips: ReadClips, decoded: DecodedClips) -> tuple[Tensor, Tensor]:
        """(frames, log_mel) of a batch; clips that turned out bad are dropped from clips."""
        rows = clips.rows
        frames, log_mel = decoded.frames, decoded.log_mel
        if len(rows) < len(clips.raw):
            frames = frames.new_zeros(len(clips.raw), *frames.shape[1:])
            log_mel = log_mel.new_zeros(len(clips.raw), *log_mel.shape[1:])
            frames[rows], log_mel[rows] = decoded.frames, decoded.log_mel
        for index, reason in decoded.faults.items():
            clips.drop(rows[index], reason)
        bad = [row for row, raw in enumerate(clips.raw) if raw is None]
        video = self.config.video
        if bad:
            log_mel[bad] = 0.0
            frames[bad] = torch.tensor(mean_grey(video.mean), dtype=torch.uint8, device=frames.device)
        if self._frames_dtype == torch.uint8 and not (video.augment and video.color_jitter):
            return frames.permute(0, 4, 1, 2, 3), log_mel  # (N, 3, T, H, W)
        unflipped = [a if a is None else replace(a, flip=False) for a in clips.augmentations]  # DALI did it
        parameters = frame_parameters(unflipped).to(self.device)
        frames = finish_frames(
            frames, parameters, video.crop_size, mean=video.mean, std=video.std, dtype=self._frames_dtype
        )
        return frames, log_mel
