"""Does a loader's memory stay flat? Read every 500 clips while 10,000 go through it.

    python benchmarks/loader_memory.py [--shards FOLDER] [--backend portable] [--clips 10000] [--workers N]
        [--batch 16] [--every 500] [--output FOLDER] [--note TEXT]

Prints FLAT or GROWS with the slope, appends a row to results/loader_memory.jsonl, and exits with 1 if it grows. Memory
is what this process and all its workers keep for themselves, anonymous and shared, shared pages counted once. The
first fifth of the clips is warm-up. The slope is that of a straight line through the rest; it counts as growth when it
is more than `--limit` and more than three times its standard error.
"""

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np  # noqa: E402

from benchmarks.common import RESULTS, append_row, make_row, usable_cores  # noqa: E402
from benchmarks.process_tree import tree_memory  # noqa: E402

EVERY_CLIPS = 500
WARM_UP_SHARE = 0.2
LIMIT = 200_000
"""Bytes per 1,000 clips: 44 MB over an epoch of Kinetics-400."""


@dataclass(frozen=True, kw_only=True)
class Trend:
    """A straight line through memory over clips."""

    bytes_per_1000_clips: float
    standard_error: float
    grows: bool


def trend(clips: Sequence[int], memory: Sequence[int], limit: float = LIMIT) -> Trend:
    """Trend of memory (bytes) after so many clips; at least three readings."""
    x = np.asarray(clips, dtype=np.float64) / 1000
    y = np.asarray(memory, dtype=np.float64)
    x = x - x.mean()
    slope = float((x * y).sum() / (x * x).sum())
    residuals = y - y.mean() - slope * x
    error = float(np.sqrt((residuals**2).sum() / (len(x) - 2) / (x * x).sum()))
    return Trend(bytes_per_1000_clips=slope, standard_error=error, grows=slope > limit and slope > 3 * error)


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark; returns the exit status: 1 if memory grows."""
    parser = argparse.ArgumentParser(
        prog="loader_memory", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shards", metavar="FOLDER", help="default: small synthetic ones")
    parser.add_argument("--backend", default="portable", help="default: portable")
    parser.add_argument("--clips", type=int, default=10_000)
    parser.add_argument("--every", type=int, default=EVERY_CLIPS, help="clips between two readings")
    parser.add_argument("--workers", type=int, default=usable_cores())
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument(
        "--limit", type=float, default=LIMIT, help="bytes per 1,000 clips that count as growth"
    )
    parser.add_argument("--output", metavar="FOLDER", default=str(RESULTS))
    parser.add_argument("--note", help="goes into the row")
    arguments = parser.parse_args(argv)
    if arguments.clips * (1 - WARM_UP_SHARE) < 3 * arguments.every:
        parser.error(f"--clips is {arguments.clips}, expected at least {int(3.75 * arguments.every) + 1}")

    import torch

    from benchmarks.contenders.material import prepare
    from loaders import build_loader
    from loaders.config import LoaderConfig

    shards = arguments.shards
    if shards is None:
        cache = Path(tempfile.gettempdir()) / f"cmac-loader-memory-{os.getuid()}"
        material = prepare(
            cache,
            shards=None,
            videos=None,
            num_synthetic=max(16, 2 * arguments.batch),
            synthetic_seconds=3.0,
            max_clips=2,
            need_recoded=False,
            need_files=False,
        )
        shards = str(material.shard_folder)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    config = LoaderConfig(
        shards=shards,
        backend=arguments.backend,
        global_batch_size=arguments.batch,
        num_workers=arguments.workers,
        prefetch_batches=2 * max(1, arguments.workers),
    )
    try:
        loader = build_loader(config, device=device)
    except (ValueError, ImportError) as error:
        print(f"loader_memory: {error}", file=sys.stderr)
        return 2
    begin = time.monotonic()
    clips, memory, gpu_memory = [], [], []
    num_clips = 0
    try:
        while num_clips < arguments.clips:
            for batch in loader:
                num_clips += batch.num_clips
                if num_clips // arguments.every > len(clips):
                    clips.append(num_clips)
                    memory.append(tree_memory(os.getpid()))
                    if device == "cuda":
                        free, total = torch.cuda.mem_get_info()
                        gpu_memory.append(total - free)
                    print(f"{num_clips:8d} clips {memory[-1] / 1e6:10.1f} MB", flush=True)
                if num_clips >= arguments.clips:
                    break
    finally:
        loader.close()
    seconds = time.monotonic() - begin
    first = int(np.searchsorted(clips, WARM_UP_SHARE * arguments.clips))
    found = trend(clips[first:], memory[first:], arguments.limit)
    on_gpu = trend(clips[first:], gpu_memory[first:], arguments.limit) if gpu_memory else None
    grows = found.grows or (on_gpu is not None and on_gpu.grows)
    row = make_row(
        "loader_memory",
        arguments.backend,
        {
            "shards": Path(arguments.shards).name if arguments.shards else "synthetic",
            "num_workers": arguments.workers,
            "batch_size": arguments.batch,
            "num_clips": num_clips,
            "limit_bytes_per_1000_clips": arguments.limit,
            "device": device,
        },
        seconds=seconds,
        repeats=1,
        peak_memory_bytes=max(memory),
        peak_gpu_memory_bytes=max(gpu_memory) if gpu_memory else None,
        num_bad=loader.bad_clips.total(),
        cache="warm",
        note=arguments.note,
        memory_bytes_by_clips=dict(zip(map(str, clips), memory, strict=True)),
        slope_bytes_per_1000_clips=found.bytes_per_1000_clips,
        slope_standard_error=found.standard_error,
        gpu_slope_bytes_per_1000_clips=None if on_gpu is None else on_gpu.bytes_per_1000_clips,
        verdict="GROWS" if grows else "FLAT",
    )
    slope = f"{found.bytes_per_1000_clips / 1e3:+.1f} kB per 1,000 clips"
    error = f"standard error {found.standard_error / 1e3:.1f} kB"
    print(f"{row['verdict']}: {slope} ({error}) over {num_clips} clips, {max(memory) / 1e6:.0f} MB at most")
    print(append_row(row, Path(arguments.output)))
    return 1 if grows else 0


if __name__ == "__main__":
    sys.exit(main())
