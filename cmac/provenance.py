"""What a result came from: commit, machine and library versions."""

import os
import subprocess
from pathlib import Path

import torch

from shards.pool import cpu_model, usable_cores


def git_commit() -> str:
    """Short commit of this checkout with `+changes` when files differ from it; outside of one, what the variable
    CMAC_COMMIT says, as in the image, or "unknown"."""
    folder = Path(__file__).resolve().parent
    command = [
        "git",
        "-C",
        str(folder),
        "describe",
        "--always",
        "--abbrev=10",
        "--dirty=+changes",
        "--exclude=*",
    ]
    elsewhere = os.environ.get("CMAC_COMMIT") or "unknown"
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return elsewhere
    return result.stdout.strip() or elsewhere


def describe_hardware() -> str:
    """One line: CPU model and usable cores, and the GPUs that torch sees."""
    parts = [f"{cpu_model()}, {usable_cores()} cores"]
    if torch.cuda.is_available():
        parts.append(f"{torch.cuda.device_count()} x {torch.cuda.get_device_name(0)}")
    return ", ".join(parts)
