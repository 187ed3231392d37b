"""This project's loaders: `loaders.build_loader` with one backend."""

from collections.abc import Iterator
from pathlib import Path

from benchmarks.contenders.base import PREFETCH_PER_WORKER, Batch, NotAvailable, Workload
from loaders import build_loader
from loaders.batch import ClipBatch
from loaders.config import AudioConfig, LoaderConfig, VideoConfig


def loader_config(workload: Workload, backend: str) -> LoaderConfig:
    """The paper's configuration without color jitter, which no contender does; two batches ahead per worker."""
    return LoaderConfig(
        shards=workload.video_folder if backend == "raw" else workload.shard_folder,
        global_batch_size=workload.batch_size,
        num_workers=workload.num_workers,
        prefetch_batches=PREFETCH_PER_WORKER * workload.num_workers,
        shuffle=workload.augment,
        backend=backend,
        dali_threads=workload.num_workers,
        video=VideoConfig(augment=workload.augment),
        audio=AudioConfig(augment=workload.augment),
    )


def open_loader(workload: Workload, backend: str):
    """The loader.

    Raises:
        NotAvailable: it cannot run here.
    """
    try:
        loader = build_loader(loader_config(workload, backend), device=workload.device)
    except (ValueError, ImportError, NotImplementedError) as error:
        raise NotAvailable(f"{type(error).__name__}: {error}") from error
    if backend != "portable" and type(loader).__module__ == "loaders.portable":
        raise NotAvailable(f"build_loader gives the portable loader for backend {backend}")
    return loader


def to_batch(batch: ClipBatch, workload: Workload, backend: str) -> Batch:
    """Batch of a ClipBatch."""
    origins = None
    if backend == "raw" and not workload.augment:
        folder = Path(workload.video_folder)
        origins = [
            (str(folder / clip.video_id), clip.start_seconds) for clip in batch.clips if clip is not None
        ]
    num_valid = int(batch.valid.sum())
    return Batch(
        num_clips=num_valid,
        num_bad=len(batch.bad),
        frames=batch.frames,
        log_mel=batch.log_mel,
        keys=batch.keys,
        origins=origins,
    )


def open_stream(workload: Workload) -> Iterator[Batch]:
    backend = workload.options["backend"]
    loader = open_loader(workload, backend)
    while True:
        for batch in loader:
            if workload.device != "cpu" and batch.frames.device.type == "cpu":
                batch = batch.to(workload.device)
            yield to_batch(batch, workload, backend)
