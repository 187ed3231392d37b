"""Checkpoints: written whole or not at all, told whole from torn, read without unpickling objects."""

import errno
import functools
import json
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from cmac.archive import NotWritten, find_problem, has_checksum, is_unchanged, write_archive
from cmac.config import RunConfig, config_from_dict, config_to_dict
from cmac.model import CMAC
from shards.manifest import sync_folder

log = logging.getLogger(__name__)

FORMAT = 2
"""Layout of a checkpoint file; raised when a reader of the old one would misread the new one."""
READABLE = (1, 2)
"""Layouts that are read. 1 has the same content and no checksum (`cmac.archive`)."""


def save_checkpoint(folder: Path, step: int, config: Any, state: dict, keep: int) -> Path:
    """Write `folder/step_XXXXXXXX.pt` atomically and remove all but the newest `keep` that are whole. Returns its path.

    Checkpoints that are not whole count for nothing and stay.

    config: a dataclass, of which JSON is kept.
    state: tensors, numbers, strings, lists and dictionaries only, so that `weights_only` loading takes it.

    Raises:
        OSError: the disk is full, or the folder cannot be written; the checkpoints before are as they were, and the
            message says how much room it takes.
    """
    path = folder / f"step_{step:08d}.pt"
    temporary = folder / f".{path.name}.{os.getpid()}.tmp"
    content = {"format": FORMAT, "step": step, "config": json.dumps(config_to_dict(config)), **state}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for abandoned in folder.glob(".step_*.tmp"):  # of a process that was killed while it wrote
            abandoned.unlink()
        try:
            write_archive(content, temporary)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        sync_folder(folder)
    except OSError as error:
        raise _unwritten(path, error) from error
    whole = [each for each in list_checkpoints(folder) if each == path or _is_whole(each)]
    for old in whole[:-keep]:
        old.unlink()
    return path


def _unwritten(path: Path, error: OSError) -> OSError:
    """The same error, which file it is about and what to do."""
    what = f"{path} was not written: {error.strerror or error}"
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        if isinstance(error, NotWritten):
            what += f"; it takes {_megabytes(error.num_bytes)}"
        if path.parent.is_dir():
            what += f"; {_megabytes(shutil.disk_usage(path.parent).free)} are free there"
        way_out = "make room"
    else:
        way_out = f"make {path.parent} a folder that this process can write to"
    told = OSError(f"{what}. Checkpoints before it are untouched: {way_out} and run the same command again")
    told.errno = error.errno
    return told


def _megabytes(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:,.2f} MB"


def _is_whole(path: Path) -> bool:
    """Whether a checkpoint is to be counted; one that was looked at before is read again only if it has changed."""
    try:
        found = path.stat()
    except FileNotFoundError:  # a link to nothing
        return False
    return _is_whole_as(path, found.st_ino, found.st_size, found.st_mtime_ns)


@functools.lru_cache(maxsize=64)
def _is_whole_as(path: Path, inode: int, size: int, changed: int) -> bool:
    try:
        return path.is_file() and (is_unchanged(path) or verify_checkpoint(path) is None)
    except OSError:  # of a bad disk, or another user's: no reason to end a run that has just saved itself
        return False


def list_checkpoints(folder: Path) -> list[Path]:
    """Finished checkpoints in a folder, oldest first, whole or not."""
    return sorted(folder.glob("step_*.pt"))


def verify_checkpoint(path: Path) -> str | None:
    """What is wrong with a checkpoint, judged by its checksum and without unpickling it; None if it is whole.

    Checkpoints of format 1 have no checksum; they are judged by the CRC-32 of their zip members.
    """
    return find_problem(path)


def newest_valid_checkpoint(folder: Path, say: Callable[[str], None]) -> Path | None:
    """The newest checkpoint in a folder that is whole; None if the folder holds none at all.

    say: is told of each one that is not, which stays where it is, and of one without a checksum.

    Raises:
        ValueError: there are checkpoints and none is whole.
    """
    checkpoints = list_checkpoints(folder)
    for path in reversed(checkpoints):
        problem = verify_checkpoint(path)
        if problem is None and not has_checksum(path):
            try:
                read_state(path)
            except ValueError as error:
                problem = str(error)
            else:
                say(f"{path}: has no checksum, being of format 1, but can be read")
        if problem is None:
            return path
        say(f"{path}: SKIPPED: {problem}. The one before it is taken; this one is kept, and can be removed")
    if checkpoints:
        raise ValueError(
            f"{folder}: none of its {len(checkpoints)} checkpoints is whole (the newest: "
            f"{verify_checkpoint(checkpoints[-1])}); bring one back, or remove them all to start anew"
        )
    return None


def newest_checkpoint(run_dir: Path) -> Path:
    """Newest whole checkpoint of a run folder; a newer one that is not is warned of.

    Raises:
        ValueError: there is none.
    """
    newest = newest_valid_checkpoint(run_dir / "checkpoints", log.warning)
    if newest is None:
        raise ValueError(
            f"{run_dir}: holds no checkpoints/step_*.pt; give the folder of a run that was trained"
        )
    return newest


def read_checkpoint(path: Path, device: torch.device | str = "cpu") -> dict:
    """All of a pretraining checkpoint, `config` as a RunConfig.

    Raises:
        ValueError: the file is no checkpoint of this project, is not whole, or of another layout.
    """
    return with_run_config(read_state(path, device), path)


def with_run_config(state: dict, path: Path) -> dict:
    """The state of a pretraining checkpoint, as `read_state` gives it, with `config` as a RunConfig.

    Raises:
        ValueError: it is of another kind of run or of another version.
    """
    try:
        return {**state, "config": config_from_dict(state["config"])}
    except (ValueError, TypeError, AttributeError, OverflowError) as error:
        raise ValueError(f"{path}: {error!s:.500}") from error


def read_state(path: Path, device: torch.device | str = "cpu") -> dict:
    """All of a checkpoint, `config` as a dictionary.

    Raises:
        ValueError: the file is no checkpoint of this project, is not whole, or of another layout.
    """
    if not path.exists():
        raise ValueError(f"{path}: no such checkpoint; checkpoints are RUN/checkpoints/step_*.pt")
    problem = verify_checkpoint(path)
    if problem is not None:
        raise ValueError(
            f"{path}: not a readable checkpoint: {problem}; remove it to go on from the one before"
        )
    try:
        state = torch.load(path, map_location=device, weights_only=True)
    except Exception as error:  # torch.load raises whatever a crafted file provokes
        raise ValueError(
            f"{path}: not a readable checkpoint ({type(error).__name__}: {error!s:.500}); "
            "remove it to go on from the one before"
        ) from error
    found = state.get("format") if type(state) is dict else type(state).__name__
    if type(found) is not int or found not in READABLE:
        raise ValueError(
            f"{path}: format {found!r:.100}, expected {' or '.join(map(str, READABLE))}; "
            "not of this version of cmac"
        )
    try:
        state["config"] = json.loads(state["config"])
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: its configuration cannot be read: {error!r:.200}") from error
    if type(state.get("step")) is not int or type(state["config"]) is not dict:
        raise ValueError(f"{path}: holds no step number or no configuration; not a checkpoint of cmac")
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


def build_trained(state: dict, path: Path, config: RunConfig | None = None) -> CMAC:
    """The model of a checkpoint with its weights, on the CPU.

    state: as `read_checkpoint` gives it; path: where it is from, for messages; config: in place of the state's.

    Raises:
        ValueError: weights are missing, too many or of other shapes than the configuration says.
    """
    model = build_as_saved(state, path, config)
    model.load_state_dict(state["model"])
    return model


def build_as_saved(state: dict, path: Path, config: RunConfig | None = None) -> CMAC:
    """A freshly initialized model for a checkpoint's weights; see `build_trained`.

    Takes no memory for a configuration that the weights do not bear out.
    """
    config = config or state["config"]
    try:
        num_blocks = sum(config.model.video.blocks) + sum(config.model.audio.blocks)
        if num_blocks > len(state["model"]):
            raise ValueError(f"{num_blocks} blocks, and {len(state['model'])} weights")
        with torch.device("meta"):
            build_model(config).load_state_dict(state["model"], assign=True)
        return build_model(config)
    except Exception as error:  # whatever a crafted configuration provokes
        raise ValueError(
            f"{path}: its weights do not fit its configuration ({type(error).__name__}: {error!s:.500})"
        ) from error


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
    return build_trained(state, path).to(device).eval(), state["config"]
