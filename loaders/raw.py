"""The loader that needs no shards: clips are cut from the original videos as they are read.

For a first look at one's own videos, and as the honest baseline of what shards save: each clip costs a search in
its file, and the decoding at full size of all that lies between its start and the key frame before.

    requests -> worker: search, decode, scale, cut, flip, log-mel -> [pinned copy] -> ClipBatch
"""

import torch
import torch.distributed as dist
from torch import Tensor

from loaders.augment import ClipAugmentation, draw_augmentation, scaled_size
from loaders.base import ClipTable
from loaders.config import LoaderConfig
from loaders.decode import uniform_frame_indices
from loaders.raw_index import VideoIndex, index_videos
from loaders.raw_video import RawVideoReader
from loaders.video_ops import flip_frames
from loaders.workers import ClipOutputs, WorkerLoader, finish_waveform, jitter_frames
from shards.schema import SAMPLE_RATE, ClipInfo


class RawClips:
    """Clips of the original videos: one random second of each per epoch. See `workers.ClipMaker`; every video
    counts as a shard of one clip, and slot 1 is the second clip where there are two of a video."""

    def __init__(self, index: VideoIndex, outputs: ClipOutputs, seed: int) -> None:
        assert outputs.pixels == "rgb" and outputs.sound == "log-mel", outputs
        self.outputs = outputs
        self._reader = RawVideoReader(index)
        self._seed = seed
        self._frame_indices = uniform_frame_indices(outputs.video.num_frames)

    def name(self, slots: tuple[int, ...], part: int, shard: int, position: int) -> tuple[str, str]:
        """(key, video id) of a clip."""
        return self._reader.key(shard, slots[part]), self._reader.video(shard).video_id

    def make(
        self, slots: tuple[int, ...], part: int, shard: int, position: int, epoch: int, row: dict[str, Tensor]
    ) -> tuple[ClipInfo, ClipAugmentation]:
        """Cuts, decodes and prepares a clip; see ClipMaker."""
        reader, slot, video, audio = self._reader, slots[part], self.outputs.video, self.outputs.audio
        key, _ = self.name(slots, part, shard, position)
        width, height = scaled_size(*reader.frame_size(shard), video.short_side)
        done = draw_augmentation(video, audio, self._seed, epoch, key, height, width, audio.num_steps())
        second = reader.read(
            shard,
            reader.start_seconds(shard, self._seed, epoch, slot),
            short_side=video.short_side,
            frame_indices=self._frame_indices,
            window=(done.crop_top, done.crop_left, video.crop_size, video.crop_size),
            out=row["frames"].numpy(),
            slot=slot,
        )
        if done.flip:
            row["frames"].copy_(flip_frames(row["frames"]))
        jitter_frames(row["frames"], done)
        finish_waveform(torch.from_numpy(second.waveform), audio, done, row["log_mel"])
        return second.info, done


class RawLoader(WorkerLoader):
    """Batches of one rank; see `loaders.Loader` for the interface."""

    def __init__(
        self, config: LoaderConfig, rank: int = 0, world_size: int = 1, *, pin_memory: bool = False
    ) -> None:
        """Indexes the videos of config.shards (`raw_index.index_videos`), which is kept for the next time.

        Raises:
            ValueError: no video gives clips, world_size does not divide the global batch, or there are fewer
                videos than one batch.
        """
        if config.audio.sample_rate != SAMPLE_RATE:
            raise ValueError(
                f"loader.audio.sample_rate is {config.audio.sample_rate}, expected {SAMPLE_RATE} with backend raw"
            )
        index = _index(config, rank, world_size)
        # A second slot, so that two clips of a video have two keys.
        table = ClipTable(
            folder=config.shards,
            num_slots=config.clips_per_video,
            clips_per_shard=[1] * len(index.videos),
            identity={"videos": index.digest},
        )
        maker = RawClips(index, ClipOutputs(video=config.video, audio=config.audio), config.seed)
        super().__init__(config, rank, world_size, table, maker, pin_memory=pin_memory)


def _index(config: LoaderConfig, rank: int, world_size: int) -> VideoIndex:
    """The index; with several ranks the first one reads the videos, those that share its cache read what it kept.

    The others wait for it for as long as a collective may take.
    """
    together = world_size > 1 and dist.is_available() and dist.is_initialized()
    if together and rank != 0:
        dist.barrier()
    try:
        return index_videos(
            config.shards, list_file=config.video_list or None, csv_file=config.video_csv or None
        )
    finally:
        if together and rank == 0:
            dist.barrier()
