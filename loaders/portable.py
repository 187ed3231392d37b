"""The portable loader: PyAV and torch in worker processes. It needs nothing from the system.

requests -> worker: read, decode, cut, flip, log-mel -> [pinned copy] -> ClipBatch
"""

from loaders.base import open_shard_table
from loaders.config import LoaderConfig
from loaders.workers import ClipOutputs, ShardClips, WorkerLoader


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
