"""What every row of benchmarks/results has: machine, commit, libraries, and how it is written."""

import functools
import importlib.metadata
import json
import os
import platform
import resource
import shutil
import subprocess
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np

from shards.pool import cpu_model, usable_cores

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
LIBRARIES = (
    "torch",
    "torchaudio",
    "nvidia-dali-cuda130",
    "av",
    "webdataset",
    "numpy",
    "imageio-ffmpeg",
    "ffmpeg-python",
    "spdl",
    "torchcodec",
    "decord",
    "opencv-python-headless",
    "triton",
    "torchvision",
    "nvidia-cudnn-cu13",
    "apex",
)


@functools.cache
def machine_info() -> dict[str, Any]:
    """CPU, usable cores, memory, GPU and driver of this machine; what is unknown is None."""
    memory = None
    if hasattr(os, "sysconf"):
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    gpu, driver = _gpu()
    return {
        "cpu": cpu_model(),
        "usable_cores": usable_cores(),
        "memory_bytes": memory,
        "gpu": gpu,
        "gpu_driver": driver,
        "python": platform.python_version(),
        "libraries": {name: _version(name) for name in LIBRARIES},
    }


@functools.cache
def commit_info() -> dict[str, Any]:
    """Commit of the checkout, and whether tracked files differ from it, before this process wrote any row.

    A copy of the files without their history takes the commit from the environment (CMAC_COMMIT).
    """
    commit = _output(["git", "rev-parse", "HEAD"]) or os.environ.get("CMAC_COMMIT")
    status = _output(["git", "status", "--porcelain", "--untracked-files=no"])
    return {"commit": commit, "dirty": None if status is None else bool(status)}


def quantiles(values: Sequence[float]) -> dict[str, float]:
    """Median, 20th and 80th percentile."""
    low, median, high = np.quantile(values, (0.2, 0.5, 0.8))
    return {"median": float(median), "p20": float(low), "p80": float(high)}


def cpu_seconds() -> float:
    """CPU time of this process and of all its children that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


def peak_memory_bytes() -> int:
    """Largest resident set of this process or of one of its ended children (Linux)."""
    return 1024 * max(
        resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    )


def make_row(benchmark: str, variant: str, config: dict[str, Any], **measured: Any) -> dict[str, Any]:
    """A row with all fields that rows have; those not measured are None."""
    fields = dict.fromkeys(
        (
            "clips_per_second",
            "repeats",
            "seconds",
            "first_batch_seconds",
            "read_bytes_per_second",
            "cpu_seconds_per_clip",
            "peak_memory_bytes",
            "peak_gpu_memory_bytes",
            "num_bad",
            "cache",
            "ceiling",
            "note",
        )
    )
    return {
        "benchmark": benchmark,
        "variant": variant,
        "config": config,
        **fields,
        **measured,
        **commit_info(),
        "utc": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        **machine_info(),
    }


def append_row(row: dict[str, Any], folder: Path = RESULTS) -> str:
    """Append the row to `<benchmark>.jsonl` and return it as a line of JSON, for printing last."""
    folder.mkdir(parents=True, exist_ok=True)
    line = json.dumps(row, sort_keys=False, allow_nan=False)
    with open(folder / f"{row['benchmark']}.jsonl", "a", encoding="utf-8") as file:
        file.write(line + "\n")
    return line


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _gpu() -> tuple[str | None, str | None]:
    if shutil.which("nvidia-smi") is None:
        return None, None
    text = _output(["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"])
    lines = (text or "").splitlines()
    if not lines:
        return None, None
    name, _, driver = lines[0].partition(", ")
    return f"{len(lines)} x {name}", driver


def _output(command: list[str]) -> str | None:
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
