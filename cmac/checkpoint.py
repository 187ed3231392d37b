"""Checkpoints: written whole or not at all, read without unpickling objects."""

import json
import os
from pathlib import Path
from typing import Any

import torch

from cmac.config import RunConfig, config_from_dict, config_to_dict
from cmac.model import CMAC
from shards.manifest import sync_folder

FORMAT = 1
"""Layout of a checkpoint file; raised when a reader of the old one would misread the new one."""


def save_checkpoint(folder: Path, step: int, config: Any, state: dict, keep: int) -> Path:
    """Write `folder/step_XXXXXXXX.pt` atomically and remove all but the newest `keep`. Returns its path.

    config: a dataclass, of which JSON is kept.
    state: tensors, numbers, strings, lists and dictionaries only, so that `weights_only` loading takes it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for abandoned in folder.glob(".step_*.tmp"):  # of a process that was killed while it wrote
        abandoned.unlink()
    path = folder / f"step_{step:08d}.pt"
    temporary = folder / f".{path.name}.{os.getpid()}.tmp"
    try:
        with open(temporary, "wb") as file:
            torch.save(
                {"format": FORMAT, "step": step, "config": json.dumps(config_to_dict(config)), **state}, file
            )
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(folder)
    for old in list_checkpoints(folder)[:-keep]:
        old.unlink()
    return path


def list_checkpoints(folder: Path) -> list[Path]:
    """Finished checkpoints in a folder, oldest first."""
    return sorted(folder.glob("step_*.pt"))


def newest_checkpoint(run_dir: Path) -> Path:
    """Newest finished checkpoint of a run folder.

    Raises:
        ValueError: there is none.
    """
    checkpoints = list_checkpoints(run_dir / "checkpoints")
    if not checkpoints:
        raise ValueError(
            f"{run_dir}: holds no checkpoints/step_*.pt; give the folder of a run that was trained"
        )
    return checkpoints[-1]


def read_checkpoint(path: Path, device: torch.device | str = "cpu") -> dict:
    """All of a pretraining checkpoint, `config` as a RunConfig.

    Raises:
        ValueError: the file is no checkpoint of this project, or of another layout.
    """
    state = read_state(path, device)
    state["config"] = config_from_dict(state["config"])
    return state


def read_state(path: Path, device: torch.device | str = "cpu") -> dict:
    """All of a checkpoint, `config` as a dictionary.

    Raises:
        ValueError: the file is no checkpoint of this project, or of another layout.
    """
    try:
        state = torch.load(path, map_location=device, weights_only=True)
    except FileNotFoundError as error:
        raise ValueError(f"{path}: no such checkpoint; checkpoints are RUN/checkpoints/step_*.pt") from error
    except Exception as error:  # torch.load raises whatever the broken byte provokes
        raise ValueError(
            f"{path}: not a readable checkpoint ({type(error).__name__}: {error}); "
            "remove it to go on from the one before"
        ) from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        found = state.get("format") if isinstance(state, dict) else type(state).__name__
        raise ValueError(f"{path}: format {found}, expected {FORMAT}; not of this version of cmac")
    state["config"] = json.loads(state["config"])
    return state


def build_model(config: RunConfig, world_size: int = 1) -> CMAC:
    """A freshly initialized model for a run."""
    return CMAC(
        config.model,
        config.loss,
        compute=config.compute,
        world_size=world_size,
        pixel_mean=config.loader.video.mean,
        pixel_std=config.loader.video.std,
    )


def load_checkpoint(path: str | Path, device: torch.device | str = "cpu") -> tuple[CMAC, RunConfig]:
    """The trained model of a checkpoint in evaluation mode, and its run's configuration.

    path: a checkpoint file, or a run folder, whose newest checkpoint is taken.

    Raises:
        ValueError: there is no checkpoint, or it cannot be read.
    """
    path = Path(path)
    if path.is_dir():
        path = newest_checkpoint(path)
    state = read_checkpoint(path, device)
    model = build_model(state["config"])
    model.load_state_dict(state["model"])
    return model.to(device).eval(), state["config"]
