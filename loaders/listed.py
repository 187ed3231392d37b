"""The loader for evaluation: clips at chosen places of a list of original files, with picture, sound or both.

Action recognition takes ten clips of 32 frames of each video, audio classification ten of two seconds of each
recording, and neither has shards: the files have official lists, are short and few, and half of them have no
sound. So clips are cut from the files as they are read, by the same reader as backend `raw`.

    requests -> worker: where the clips are, search, decode, scale, cut, flip, log-mel -> [pinned copy] -> ClipBatch
"""

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from loaders.augment import (
    LONGEST_SIDE,
    ClipAugmentation,
    draw_augmentation,
    draw_resized_crop,
    happens,
    random_stream,
    scaled_size,
)
from loaders.base import ClipTable
from loaders.config import AudioConfig, LoaderConfig, VideoConfig
from loaders.decode import uniform_frame_indices
from loaders.raw_index import IndexedVideo, VideoIndex, index_files
from loaders.raw_video import EPSILON_SECONDS, RawVideoReader
from loaders.workers import ClipOutputs, WorkerLoader, finish_waveform, jitter_frames
from shards.schema import FRAMES_PER_CLIP, SAMPLE_RATE, BadClip, ClipInfo
from shards.sources import Needs, SourceVideo

Placement = Literal["uniform", "uniform-gdt", "random", "center", "stride"]
MAX_FRAMES_AT_ONCE = 1024
"""A file is decoded once for all its clips if these need so many pictures at most."""
MAX_SPARSITY = 4
"""And if it is at most so many times as long as they are together: else most would be decoded for nothing."""


@dataclass(frozen=True, kw_only=True)
class ClipSampling:
    """Which clips are taken of each file."""

    needs: Needs = "video"
    """`video`, `audio` or `both`: what the clips consist of. A file without it gives none; another stream is not
    looked at."""
    placement: Placement = "uniform"
    """Where a file's clips start, D being the file's length less the clip's. `uniform`: from 0 to D, both included.
    `uniform-gdt`: clip i of n at i D / n, which never reaches the end. `random`: drawn from (seed, epoch, key).
    `center`: one clip, around the middle. `stride`: every `stride_seconds`, and one at D."""
    clips_per_file: int = 10
    """Clips of each file for `uniform`, `uniform-gdt` and `random`."""
    stride_seconds: float = 0.5
    """From one start to the next for `stride`."""
    clip_seconds: float | None = None
    """Length of a clip; its frames are spread over it as over the second of a shard's clip. None: 32 consecutive
    frames of the source at its own rate, for `video` only."""
    num_crops: Literal[1, 3] = 1
    """3: each clip at both ends and in the middle of the longer side, as three rows."""
    resized_crop_area: tuple[float, float] | None = None
    """With loader.video.augment: random resized crops of this share of the frame in place of random crops of the
    scaled frame (GDT's fine-tuning: 0.14 to 1)."""
    color_jitter_probability: float = 1.0
    """With loader.video.color_jitter: share of the clips whose colors are changed."""
    decode_once: bool = True
    """Decode a file once for all its clips that follow each other in a batch, where places are not random. Off:
    each clip by itself; the result is the same."""

    def __post_init__(self) -> None:
        def check(name: str, ok: bool, expected: str) -> None:
            if not ok:
                raise ValueError(f"sampling.{name} is {getattr(self, name)!r}, expected {expected}")

        check("needs", self.needs in get_args(Needs), " or ".join(get_args(Needs)))
        check("placement", self.placement in get_args(Placement), " or ".join(get_args(Placement)))
        check("clips_per_file", self.clips_per_file >= 1, "at least 1")
        check("stride_seconds", self.stride_seconds > 0, "more than 0")
        check("num_crops", self.num_crops in (1, 3), "1 or 3")
        check("color_jitter_probability", 0 <= self.color_jitter_probability <= 1, "0 to 1")
        if self.clip_seconds is None:
            check(
                "clip_seconds", self.needs == "video", "a number of seconds unless sampling.needs is 'video'"
            )
        else:
            check("clip_seconds", self.clip_seconds > 0, "more than 0")
        if self.resized_crop_area is not None:
            low, high = self.resized_crop_area
            check("resized_crop_area", 0 < low <= high <= 1, "two shares, 0 < least <= largest <= 1")


def listed_config(
    folder: str,
    *,
    video: VideoConfig | None = None,
    audio: AudioConfig | None = None,
    batch_size: int,
    num_workers: int,
) -> LoaderConfig:
    """LoaderConfig for reading each clip once, in order and as it is: no shuffling, no augmentation, the last batch
    padded, and bad clips counted without a limit, as one bad file must not cost an evaluation."""
    return LoaderConfig(
        shards=folder,
        backend="raw",
        global_batch_size=batch_size,
        num_workers=num_workers,
        shuffle=False,
        drop_last=False,
        max_bad_fraction=1.0,
        video=replace(video or VideoConfig(), augment=False),
        audio=replace(audio or AudioConfig(), augment=False),
    )


def clip_lengths(video: IndexedVideo, sampling: ClipSampling) -> tuple[float, float]:
    """(seconds of a clip, seconds from one of its 32 frames to the next) in a file."""
    if sampling.clip_seconds is not None:
        return sampling.clip_seconds, sampling.clip_seconds / FRAMES_PER_CLIP
    return FRAMES_PER_CLIP / video.fps, 1 / video.fps


def least_seconds(video: IndexedVideo, sampling: ClipSampling) -> float:
    """How long a file has to be; infinite if it gives no clip however long it is."""
    if sampling.clip_seconds is not None:
        return sampling.clip_seconds
    return 0.0 if video.num_frames >= FRAMES_PER_CLIP and video.fps > 0 else float("inf")


def latest_start(video: IndexedVideo, sampling: ClipSampling) -> float:
    """When the last clip that fits into a file starts, seconds after the first one that does."""
    seconds, frame_seconds = clip_lengths(video, sampling)
    if sampling.clip_seconds is None:
        return (video.num_frames - FRAMES_PER_CLIP) * frame_seconds
    room = video.duration_seconds - seconds
    if video.video_stream is not None:
        # Half an output frame of the picture may be missing at the end.
        shown = video.video_end_seconds - video.start_seconds
        room = min(room, shown - (FRAMES_PER_CLIP - 0.5) * frame_seconds)
    return max(math.floor(room * 1e6) / 1e6, 0.0)


def num_clips(video: IndexedVideo, sampling: ClipSampling) -> int:
    """Clips of a file, crops not counted."""
    if sampling.placement == "center":
        return 1
    if sampling.placement == "stride":
        return 1 + math.ceil(latest_start(video, sampling) / sampling.stride_seconds - 1e-6)
    return sampling.clips_per_file


def clip_start(
    video: IndexedVideo, sampling: ClipSampling, index: int, seed: int = 0, epoch: int = 0, key: str = ""
) -> float:
    """Where clip `index` of a file starts: seconds on the file's clock, whole microseconds.

    With clips of consecutive frames, where one of the frames starts.
    """
    room = latest_start(video, sampling)
    step = clip_lengths(video, sampling)[1] if sampling.clip_seconds is None else 1e-6
    count = num_clips(video, sampling)
    if sampling.placement == "random":
        raw = int(random_stream(seed, epoch, key, "start").random_raw())
        # Every place is as likely as any other, the last one included.
        places = round(room / step) + 1
        offset = int((raw >> 11) * 2.0**-53 * places) * step
    elif sampling.placement == "stride":
        offset = min(index * sampling.stride_seconds, room)
    elif sampling.placement == "uniform-gdt":
        offset = room * index / count
    elif count == 1:
        offset = room / 2
    else:
        offset = room * index / (count - 1)
    return round(video.start_seconds + round(offset / step) * step, 6)


class _Decoded:
    """Pictures and sound of a file for all its clips."""

    def __init__(
        self, reader: RawVideoReader, position: int, starts: Sequence[float], clips: "ListedClips"
    ) -> None:
        """
        Raises:
            BadClip: not all of it can be decoded.
        """
        video = reader.video(position)
        seconds, _ = clip_lengths(video, clips.sampling)
        bounds = [clips.bounds(video, start) for start in starts]
        # Clips that overlap share pictures; times are rounded to microseconds.
        wanted = (
            sorted({bound for each in bounds for bound in each}) if video.video_stream is not None else []
        )
        rows = {bound: row for row, bound in enumerate(wanted)}
        self._rows = [[rows[bound] for bound in each] if wanted else [] for each in bounds]
        self._first = round(starts[0] * SAMPLE_RATE)
        self._places = [round(start * SAMPLE_RATE) - self._first for start in starts]
        self._num_samples = round(seconds * SAMPLE_RATE)
        self._frames, self._samples = reader.read_bounds(
            position,
            tuple(wanted),
            starts[0],
            (self._places[-1] + self._num_samples) / SAMPLE_RATE,
            scaled=clips.scaled_size(video),
            key=reader.key(position),
        )

    def clip(self, index: int, top: int, left: int, size: int) -> tuple[np.ndarray, np.ndarray]:
        """uint8 (T, size, size, 3) and int16 (num_samples,)."""
        frames = self._frames[self._rows[index], top : top + size, left : left + size]
        place = self._places[index]
        return frames, self._samples[place : place + self._num_samples]


class ListedClips:
    """Clips of a list of files. See `workers.ClipMaker`; a file counts as a shard, its clips are the positions."""

    def __init__(self, index: VideoIndex, outputs: ClipOutputs, sampling: ClipSampling, seed: int) -> None:
        self.outputs = outputs
        self.sampling = sampling
        self._reader = RawVideoReader(index)
        self._seed = seed
        self._frame_indices = uniform_frame_indices(outputs.video.num_frames)
        self._decoded: tuple[int, _Decoded | None] | None = None

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_decoded": None}

    def bounds(self, video: IndexedVideo, start: float) -> tuple[float, ...]:
        """The times before which the clip's pictures are shown last; see `RawVideoReader.read_bounds`."""
        _, frame_seconds = clip_lengths(video, self.sampling)
        return tuple(
            round(start + (i + 0.5) * frame_seconds - EPSILON_SECONDS, 6) for i in self._frame_indices
        )

    def scaled_size(self, video: IndexedVideo) -> tuple[int, int]:
        """(width, height) that a file's pictures are scaled to before they are cut; the crop's where it has none."""
        config = self.outputs.video
        if video.video_stream is None:
            return config.crop_size, config.crop_size
        return scaled_size(*video.frame_size, config.short_side)

    def name(self, slots: tuple[int, ...], part: int, shard: int, position: int) -> tuple[str, str]:
        """(key, file) of a clip."""
        return self._reader.key(shard, position), self._reader.video(shard).video_id

    def make(
        self, slots: tuple[int, ...], part: int, shard: int, position: int, epoch: int, row: dict[str, Tensor]
    ) -> tuple[ClipInfo, ClipAugmentation]:
        """Finds, decodes and prepares a clip; see ClipMaker."""
        reader, sampling, audio = self._reader, self.sampling, self.outputs.audio
        video = reader.video(shard)
        key, _ = self.name(slots, part, shard, position)
        index, crop = divmod(position, sampling.num_crops)
        seconds, _ = clip_lengths(video, sampling)
        done = self._augmentation(video, key, epoch, crop)
        start = clip_start(video, sampling, index, self._seed, epoch, key)
        size = done.crop_size

        decoded = self._whole_file(shard)
        # A resized crop has a scale of its own.
        shared = decoded is not None and sampling.resized_crop_area is None
        if shared:
            frames, samples = decoded.clip(index, done.crop_top, done.crop_left, size)
            if len(frames):
                row["frames"].numpy()[:] = frames
        else:
            _, samples = reader.read_bounds(
                shard,
                self.bounds(video, start),
                start,
                seconds,
                scaled=(done.scaled_width, done.scaled_height),
                window=(done.crop_top, done.crop_left, size, size),
                out=row["frames"].numpy(),
                key=key,
            )
        if len(row["frames"]):
            if done.flip:
                row["frames"].copy_(row["frames"].flip(-2))
            jitter_frames(row["frames"], done)
        if len(samples):
            waveform = torch.from_numpy(samples.astype(np.float32) / np.float32(32768))
            finish_waveform(waveform, audio, done, row["log_mel"])
        return reader.describe(shard, start, seconds, position, samples), done

    def _augmentation(self, video: IndexedVideo, key: str, epoch: int, crop: int) -> ClipAugmentation:
        config, audio, sampling, seed = self.outputs.video, self.outputs.audio, self.sampling, self._seed
        num_steps = audio.num_steps(self.outputs.num_samples)
        width, height = self.scaled_size(video)
        if max(width, height) > LONGEST_SIDE:
            raise BadClip(key, video.video_id, "frame-size")
        done = draw_augmentation(config, audio, seed, epoch, key, height, width, num_steps)
        if sampling.num_crops == 3:
            if width >= height:
                done = replace(done, crop_left=round((width - config.crop_size) * crop / 2))
            else:
                done = replace(done, crop_top=round((height - config.crop_size) * crop / 2))
        elif sampling.resized_crop_area is not None and config.augment:
            done = draw_resized_crop(
                done, sampling.resized_crop_area, seed, epoch, key, *reversed(video.frame_size)
            )
        if done.color_order and not happens(sampling.color_jitter_probability, seed, epoch, key, "jitter"):
            done = replace(done, color_order=())
        return done

    def _whole_file(self, shard: int) -> _Decoded | None:
        """All clips of a file; None where each is to be decoded by itself."""
        sampling = self.sampling
        if not sampling.decode_once or sampling.placement == "random":
            return None
        video = self._reader.video(shard)
        count = num_clips(video, sampling)
        num_frames = 0 if video.video_stream is None else count * len(self._frame_indices)
        together = count * clip_lengths(video, sampling)[0]
        if (
            count * sampling.num_crops == 1
            or num_frames > MAX_FRAMES_AT_ONCE
            or latest_start(video, sampling) > MAX_SPARSITY * together
        ):
            return None
        if self._decoded is None or self._decoded[0] != shard:
            self._decoded = None  # before the next one is there: one at a time
            starts = [clip_start(video, sampling, index) for index in range(count)]
            try:
                self._decoded = shard, _Decoded(self._reader, shard, starts, self)
            except BadClip:
                # Damage costs the clips that it meets, not the file.
                self._decoded = shard, None
        return self._decoded[1]


class ListedLoader(WorkerLoader):
    """Batches of one rank from a list of files; see `loaders.Loader` for the interface.

    In the batches `clips[i].slot` is the clip's number in its file times `num_crops` plus the number of the crop.
    """

    def __init__(
        self,
        config: LoaderConfig,
        files: Sequence[SourceVideo],
        sampling: ClipSampling,
        rank: int = 0,
        world_size: int = 1,
        *,
        folder: str,
        pin_memory: bool = False,
        cache: str | None = None,
    ) -> None:
        """Indexes the files, which is kept for the next time.

        Args:
            config: batches, seed, frames and log-mel; `backend` "raw". Its `shards` is not read.
            files: in the order in which they are read without shuffling.
            sampling: which clips.
            rank: as for `loaders.build_loader`.
            world_size: as for `loaders.build_loader`.
            folder: that the files lie in; `path` of each is `folder`/`video_id`.
            pin_memory: batches lie in page-locked memory.
            cache: file to keep the index in; None: a file in the user's cache.

        Raises:
            ValueError: no file gives clips, two have one id, world_size does not divide the global batch, there
                are fewer clips than one batch and drop_last is on, or the configuration asks for two clips per
                video.
        """
        if config.audio.sample_rate != SAMPLE_RATE and sampling.needs != "video":
            raise ValueError(
                f"loader.audio.sample_rate is {config.audio.sample_rate}, expected {SAMPLE_RATE}"
            )
        if config.clips_per_video != 1:
            raise ValueError(
                f"loader.clips_per_video is {config.clips_per_video}, expected 1 for a list of files; "
                "sampling.clips_per_file tells how many clips are taken of each"
            )
        names = [file.video_id for file in files]
        if len(set(names)) != len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise ValueError(f"{twice!r} is twice in the list of files, expected each once")
        index = index_files(
            folder,
            files,
            needs=sampling.needs,
            min_seconds=lambda video: least_seconds(video, sampling),
            cache=cache,
        )
        used = {video.video_id for video in index.videos}
        self.files = tuple(file for file in files if file.video_id in used)
        """Those that give clips, in order."""
        self.skipped = index.skipped
        """(video_id, reason) of the others."""
        self.sampling = sampling
        seconds = sampling.clip_seconds
        outputs = ClipOutputs(
            video=config.video,
            audio=config.audio,
            pixels="none" if sampling.needs == "audio" else "rgb",
            sound="none" if sampling.needs == "video" else "log-mel",
            num_samples=SAMPLE_RATE if seconds is None else round(seconds * SAMPLE_RATE),
        )
        # Not the length of the files' list, but all that makes clip (file, position) the same clip.
        described = json.dumps(asdict(sampling), sort_keys=True)
        table = ClipTable(
            folder=folder,
            num_slots=1,
            clips_per_shard=[num_clips(video, sampling) * sampling.num_crops for video in index.videos],
            identity={
                "videos": index.digest,
                "sampling": hashlib.sha256(described.encode()).hexdigest()[:16],
            },
        )
        maker = ListedClips(index, outputs, sampling, config.seed)
        super().__init__(config, rank, world_size, table, maker, pin_memory=pin_memory)
