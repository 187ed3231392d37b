"""What processes do that share a cache of shards: a module that is quick to import."""

import multiprocessing.queues

from loaders.shard_cache import ShardCache


def open_all(cache: ShardCache, names: list[str], results: multiprocessing.queues.Queue) -> None:
    """Opens shards, then puts the videos of all their clips, shard by shard."""
    readers = [cache.open(name) for name in names]
    results.put([[reader.read(n).video for n in range(len(reader))] for reader in readers])
