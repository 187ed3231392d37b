"""The loader for pairs of a still image and a sound, as test sets for sound localisation have them.

A pair becomes a clip whose frames all show the image, beside the middle of the sound. The sound is read as
`loaders.listed` reads it; the image by Pillow, which has what libav's demuxers of videos have not (a truncated JPEG
is an error).

    requests -> worker: image -> scale, repeat; sound -> middle -> log-mel -> [pinned copy] -> ClipBatch
"""

import hashlib
import json
import os
import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal, get_args

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from loaders.augment import LONGEST_SIDE, ClipAugmentation, draw_augmentation, scaled_size
from loaders.base import ClipTable
from loaders.config import LoaderConfig
from loaders.listed import ClipSampling, ListedClips
from loaders.localisation_sets import PairFiles
from loaders.raw_index import VideoIndex, index_files
from loaders.workers import ClipOutputs, WorkerLoader
from shards.media import SourceLimits
from shards.schema import SAMPLE_RATE, BadClip, ClipInfo, clip_key, video_number
from shards.sources import with_hashes

FORMATS = ("JPEG", "PNG", "WEBP", "BMP")
"""Of images, whatever their names say. Pillow would hand others to programs (EPS to Ghostscript)."""

Fit = Literal["squash", "crop"]
"""How an image becomes a square.

`squash`: the whole image is scaled to the crop's size, aspect not kept. `crop`: it is scaled to the short side and
the center is cut out, as of videos.
"""


def read_still(path: str, key: str = "", shard: str = "") -> Image.Image:
    """An image file as RGB, decoded, in its stored orientation (boxes of test sets are of stored pixels).

    Raises:
        BadClip: `missing-image`, `unreadable` if it is no regular file, `too-many-pixels` by its header, or
            `bad-image` if it cannot be read or decoded to its end.
    """
    if os.path.lexists(path) and not os.path.isfile(path):
        raise BadClip(key, shard, "unreadable")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the limit below is ours
            with Image.open(path, formats=FORMATS) as image:
                if image.width * image.height > SourceLimits().max_pixels:
                    raise BadClip(key, shard, "too-many-pixels")
                return image.convert("RGB")
    except FileNotFoundError:
        raise BadClip(key, shard, "missing-image") from None
    except Image.DecompressionBombError as error:
        raise BadClip(key, shard, "too-many-pixels") from error
    except (OSError, ValueError, SyntaxError, EOFError) as error:
        raise BadClip(key, shard, "bad-image") from error


def fit_still(image: Image.Image, window: ClipAugmentation) -> np.ndarray:
    """uint8 (crop_size, crop_size, 3): an image scaled (bilinear over the area of a pixel, as frames of videos are)
    to the size that window names, and cut to its crop."""
    size = (window.scaled_width, window.scaled_height)
    pixels = np.asarray(image.resize(size, Image.Resampling.BILINEAR))
    top, left, side = window.crop_top, window.crop_left, window.crop_size
    return pixels[top : top + side, left : left + side]


class StillClips:
    """Pairs as clips. See `workers.ClipMaker`; every pair counts as a shard of one clip."""

    def __init__(
        self,
        folder: str,
        pairs: Sequence[PairFiles],
        index: VideoIndex,
        outputs: ClipOutputs,
        sampling: ClipSampling,
        fit: Fit,
        seed: int,
    ) -> None:
        self.outputs = outputs
        self._folder = folder
        self._pairs = pairs
        self._hashes = [
            row.key_hash for row in with_hashes((pair.names.sample_id, None, None) for pair in pairs)
        ]
        self._sounds = {video.video_id: position for position, video in enumerate(index.videos)}
        self._listed = ListedClips(index, replace(outputs, pixels="none"), sampling, seed)
        self._fit = fit
        self._seed = seed

    def name(self, slots: tuple[int, ...], part: int, shard: int, position: int) -> tuple[str, str]:
        """(key, sample id) of a pair."""
        return clip_key(self._hashes[shard], slots[part]), self._pairs[shard].names.sample_id

    def make(
        self, slots: tuple[int, ...], part: int, shard: int, position: int, epoch: int, row: dict[str, Tensor]
    ) -> tuple[ClipInfo, ClipAugmentation]:
        """Reads and prepares a pair; see ClipMaker."""
        pair, (key, sample_id) = self._pairs[shard], self.name(slots, part, shard, position)
        image = read_still(os.path.join(self._folder, pair.image), key, sample_id)
        done = self._window(*image.size, key, sample_id, epoch)
        frames = row["frames"]  # (T, S, S, 3)
        frames.copy_(torch.from_numpy(fit_still(image, done).copy()))  # the same in all frames
        sound = {"frames": frames[:0], "log_mel": row["log_mel"]}
        try:
            info, _ = self._listed.make(slots, part, self._sounds[pair.audio], 0, epoch, sound)
        except BadClip as error:
            raise BadClip(key, sample_id, error.reason) from error
        width, height = image.size
        described = replace(
            info,
            key=key,
            video_id=sample_id,
            video_number=video_number(sample_id),
            source_fps=0.0,
            source_width=width,
            source_height=height,
            source_crop=(0.0, 0.0, float(width), float(height)),
            frame_width=width,
            frame_height=height,
        )
        return described, done

    def _window(self, width: int, height: int, key: str, sample_id: str, epoch: int) -> ClipAugmentation:
        video, audio = self.outputs.video, self.outputs.audio
        if self._fit == "squash":
            size = video.crop_size
            return ClipAugmentation(
                scaled_height=size, scaled_width=size, crop_top=0, crop_left=0, crop_size=size
            )
        width, height = scaled_size(width, height, video.short_side)
        if max(width, height) > LONGEST_SIDE:
            raise BadClip(key, sample_id, "frame-size")
        steps = audio.num_steps(self.outputs.num_samples)
        return draw_augmentation(video, audio, self._seed, epoch, key, height, width, steps)


class StillsLoader(WorkerLoader):
    """Batches of one rank from pairs of a still image and a sound; see `loaders.Loader` for the interface.

    In the batches a clip's `video_id` is the pair's `sample_id`; its times are those of the sound.
    """

    def __init__(
        self,
        config: LoaderConfig,
        pairs: Sequence[PairFiles],
        rank: int = 0,
        world_size: int = 1,
        *,
        folder: str,
        clip_seconds: float = 1.0,
        fit: Fit = "squash",
        pin_memory: bool = False,
        cache: str | None = None,
    ) -> None:
        """Indexes the sounds, which is kept for the next time.

        Args:
            config: batches, frames and log-mel, without augmentation; `backend` "raw". Its `shards` is not read.
            pairs: in the order in which they are read without shuffling.
            rank: as for `loaders.build_loader`.
            world_size: as for `loaders.build_loader`.
            folder: that the files of pairs lie in.
            clip_seconds: how much of a sound is taken, from its middle.
            fit: how an image becomes a square.
            pin_memory: batches lie in page-locked memory.
            cache: file to keep the index of sounds in; None: a file in the user's cache.

        Raises:
            ValueError: no pair is left, two have one id, augmentation or two clips per video are asked for, or
                world_size does not divide the global batch.
        """
        if fit not in get_args(Fit):
            raise ValueError(f"fit is {fit!r}, expected {' or '.join(get_args(Fit))}")
        if config.video.augment or config.audio.augment:
            raise ValueError(
                "loader.video.augment or loader.audio.augment is on, expected both off for stills"
            )
        if config.clips_per_video != 1:
            raise ValueError(f"loader.clips_per_video is {config.clips_per_video}, expected 1 for stills")
        if config.audio.sample_rate != SAMPLE_RATE:
            raise ValueError(
                f"loader.audio.sample_rate is {config.audio.sample_rate}, expected {SAMPLE_RATE}"
            )
        names = [pair.names.sample_id for pair in pairs]
        if len(set(names)) != len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise ValueError(f"{twice!r} is twice in the list of pairs, expected each once")
        sampling = ClipSampling(needs="audio", placement="center", clip_seconds=clip_seconds)
        sounds = with_hashes(
            (name, path if os.path.exists(path := os.path.join(folder, name)) else None, None)
            for name in dict.fromkeys(pair.audio for pair in pairs)
        )
        index = index_files(
            folder, sounds, needs="audio", min_seconds=lambda video: clip_seconds, cache=cache
        )
        reasons = dict(index.skipped)
        self.pairs = tuple(pair for pair in pairs if pair.audio not in reasons)
        """Those whose sound can be read, in order."""
        self.skipped = tuple(
            (pair.names.sample_id, reasons[pair.audio]) for pair in pairs if pair.audio in reasons
        )
        """(sample id, reason) of the others."""
        outputs = ClipOutputs(
            video=config.video, audio=config.audio, num_samples=round(clip_seconds * SAMPLE_RATE)
        )
        described = json.dumps(
            [[pair.names.sample_id, pair.image, pair.audio] for pair in self.pairs] + [fit, clip_seconds]
        )
        table = ClipTable(
            folder=folder,
            num_slots=1,
            clips_per_shard=[1] * len(self.pairs),
            identity={"videos": index.digest, "pairs": hashlib.sha256(described.encode()).hexdigest()[:16]},
        )
        maker = StillClips(folder, self.pairs, index, outputs, sampling, fit, config.seed)
        super().__init__(config, rank, world_size, table, maker, pin_memory=pin_memory)
