"""What a result came from: commit, machine and library versions."""

import subprocess
from pathlib import Path

import torch

from shards.pool import cpu_model, usable_cores


def git_commit() -> str:
    """Short commit of this checkout with `+changes` when files differ from it, or "unknown" outside of one."""
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
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return result.stdout.strip() or "unknown"


def describe_hardware() -> str:
    """One line: CPU model and usable cores, and the GPUs that torch sees."""
    parts = [f"{cpu_model()}, {usable_cores()} cores"]
    if torch.cuda.is_available():
        parts.append(f"{torch.cuda.device_count()} x {torch.cuda.get_device_name(0)}")
    return ", ".join(parts)
