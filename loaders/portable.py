"""The portable loader: PyAV and torch in worker processes. It needs nothing from the system.

requests -> worker: read, decode, cut, flip, log-mel -> [pinned copy] -> ClipBatch
"""

from loaders.background import Background
from loaders.base import ClipTable, PositionedLoader
from loaders.batch import ClipBatch
from loaders.config import LoaderConfig
from loaders.device import DeviceBatch
from loaders.shard_files import ShardFiles, open_shards
from loaders.workers import (
    ClipDataset,
    ClipMaker,
    ClipOutputs,
    ClipWorkers,
    FilledRequest,
    ShardClips,
    assemble_batch,
)
from shards.manifest import read_manifest


def open_shard_table(config: LoaderConfig) -> tuple[ShardFiles, ClipTable]:
    """The shards of a configuration, checked, and which clips they hold.

    Raises:
        ValueError: no manifest, or too many shards are missing or damaged.
    """
    manifest = read_manifest(config.shards)
    files = open_shards(
        config.shards,
        manifest,
        config.verify_shards,
        clips_per_video=config.clips_per_video,
        max_bad_shard_fraction=config.max_bad_shard_fraction,
    )
    table = ClipTable(
        folder=config.shards,
        num_slots=manifest.num_slots,
        clips_per_shard=files.clips_per_shard,
        identity={"manifest": manifest.digest, **files.state()},
    )
    return files, table


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
        self._workers: ClipWorkers | None = None
        self._finished: Background[ClipBatch | DeviceBatch] | None = None

    def _finish(self, filled: FilledRequest) -> ClipBatch | DeviceBatch:
        """The batch, as views of the workers' memory; pinned in a thread beside the training step."""
        assert filled.memory is not None
        parts = [filled.layout.tensors(filled.memory, part) for part in range(len(filled.parts))]
        arrays = [(part["frames"].permute(0, 4, 1, 2, 3), part["log_mel"]) for part in parts]
        batch = assemble_batch(filled.request, filled.parts, arrays)
        return batch.pin_memory() if self._pin_memory else batch

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
        if finished is not None:
            finished.close()
        if workers is not None:
            workers.close()


class PortableLoader(WorkerLoader):
    """Batches of one rank; see `loaders.Loader` for the interface."""

    def __init__(
        self, config: LoaderConfig, rank: int = 0, world_size: int = 1, *, pin_memory: bool = False
    ) -> None:
        """Reads the manifest and checks the shards (`shard_files.open_shards`).

        Raises:
            ValueError: no manifest, too many bad shards, world_size does not divide the global batch, fewer
                clips than one batch, or two clips per video from shards with one slot.
        """
        files, table = open_shard_table(config)
        maker = ShardClips(files, ClipOutputs(video=config.video, audio=config.audio), config.seed)
        super().__init__(config, rank, world_size, table, maker, pin_memory=pin_memory)
