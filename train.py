"""Pretrain CMAC: torchrun --nproc-per-node N train.py PRESET[:VARIANT] [--field value ...]

`train.py --help` lists the presets and the ablations of each, `train.py PRESET --help` every field with its meaning and
default.
"""

import os
import signal

if __name__ == "__main__":
    # What follows takes seconds to import, and there is nothing yet that a signal could make anyone lose.
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, lambda *_: os._exit(0))

import dataclasses
import difflib
import inspect
import json
import logging
import socket
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist
import tyro
from torch.distributed.rendezvous import rendezvous

from cmac.agreement import RankLost, is_lost_connection
from cmac.config import PRESETS, VARIANTS, RunConfig, apply_variant
from cmac.pretrain import PeerFailed, run, start
from cmac.stop import Stopped, StopSignals
from cmac.watchdog import Watchdog
from loaders import Loader, build_loader
from loaders.base import TooManyBadClips, WorkerDied
from loaders.probe import resolve_backend
from shards.lock import take_lock
from shards.pool import usable_cores

MEET_SECONDS = 600.0
"""For all ranks to come to the start."""
COLLECTIVE_SECONDS = 86400.0
"""For one collective: those of the start wait for a rank that reads all shards or videos once, and from then on the
watchdog is faster and says more."""
DEVICES, DRIVER = Path("/dev"), Path("/proc/driver/nvidia/version")
HELD_SECONDS = 150.0
"""So long a run folder is waited for: network file systems notice late that a machine with a lock is gone."""


def parse(arguments: list[str]) -> RunConfig:
    """The configuration that a command line asks for. Prints help or what is wrong, and exits, as command lines do."""
    preset = arguments[0] if arguments else None
    name, colon, variant = preset.partition(":") if preset is not None else (None, "", "")
    if name in PRESETS:
        config, description = PRESETS[name](), inspect.getdoc(PRESETS[name])
        if colon:
            if variant not in VARIANTS:
                close = difflib.get_close_matches(variant, VARIANTS, n=1)
                hint = f"; did you mean {close[0]}?" if close else ""
                raise SystemExit(
                    f"train.py: {variant!r} is no variant, expected one of {', '.join(VARIANTS)}{hint}"
                )
            config = apply_variant(config, variant)
            description = f"{VARIANTS[variant].description}. Of this preset:\n\n{description}"
        return tyro.cli(
            RunConfig,
            default=config,
            prog=f"train.py {preset}",
            description=description,
            args=arguments[1:],
        )
    if name is not None and not name.startswith("-"):
        close = difflib.get_close_matches(name, PRESETS, n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise SystemExit(f"train.py: {name!r} is no preset, expected one of {', '.join(PRESETS)}{hint}")
    print("usage: train.py PRESET[:VARIANT] [--field value ...]")
    print("\npresets (train.py PRESET --help lists the fields):")
    for preset, build in PRESETS.items():
        print(f"  {preset:24}{inspect.getdoc(build).splitlines()[0]}")
    print("\nvariants of any preset:")
    for variant, changes in VARIANTS.items():
        print(f"  {variant:26}{changes.description}")
    raise SystemExit(0 if name in ("-h", "--help") else "train.py: a preset is missing")


def main() -> None:
    """Join a loader and a model, and train.

    SIGTERM, SIGUSR1, SIGHUP and Ctrl-C save the run after the step that is under way and end it with status 0.
    """
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    with StopSignals() as stop, ExitStack() as until_end:
        until_end.callback(stop.ignore)
        try:
            with stop.interruptible():
                config = parse(sys.argv[1:])
                # Not watched: with loader.verify_shards "sha256" it may rightly take hours, and says how far it is.
                config, loader, device = _build_loader(config, rank, world_size)
                if rank == 0:
                    until_end.enter_context(hold_run(Path(config.run_dir)))
                watchdog = Watchdog(Path(config.run_dir) / "stacks", rank, config.hang_seconds)
                until_end.enter_context(watchdog)
                training = start(config, loader, device)
        except Stopped:
            _leave(f"{stop.received.name}: the run stops before its first step", 0)
        except Exception as error:
            _fail(error, (ValueError, OSError, ImportError, RankLost))
        try:
            run(training, loader, stop, watchdog)
        except Exception as error:
            _fail(error, (FloatingPointError, TooManyBadClips, WorkerDied, OSError, PeerFailed, RankLost))
        finally:
            loader.close()
        if world_size > 1:
            dist.destroy_process_group()


@contextmanager
def hold_run(run_dir: Path, wait_seconds: float = HELD_SECONDS) -> Iterator[None]:
    """Inside, no other training writes to run_dir. The lock goes with the process, however that ends.

    Raises:
        ValueError: another training has held it for all of wait_seconds.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    with open(run_dir / "lock", "a+", encoding="utf-8") as file:
        deadline, told = time.monotonic() + wait_seconds, False
        while not take_lock(file, run_dir):
            file.seek(0)
            holder = file.read().strip() or "another process"
            if time.monotonic() >= deadline:
                raise ValueError(
                    f"{run_dir} is in training by {holder}, expected nobody; end that one, or choose another run_dir"
                )
            if not told:
                _say(f"{run_dir} is in training by {holder}: waiting up to {wait_seconds:g} s for its end")
                told = True
            time.sleep(min(0.5, wait_seconds))
        with suppress(OSError):  # a disk that is full
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}")
            file.flush()
        yield


def _build_loader(config: RunConfig, rank: int, world_size: int) -> tuple[RunConfig, Loader, torch.device]:
    """The configuration with what it leaves open, the loader and the device of this rank.

    Raises:
        ValueError: the configuration does not fit the shards, the machine or the number of ranks.
    """
    num_clips = config.loader.global_batch_size
    if num_clips % world_size:
        fitting = ", ".join(str(n) for n in range(1, num_clips + 1) if num_clips % n == 0)
        raise ValueError(
            f"loader.global_batch_size is {num_clips}, which {world_size} ranks cannot share equally; start one of "
            f"{fitting} ranks (torchrun --nnodes times --nproc-per-node)"
        )
    device = choose_device(config)
    if device.type == "cpu":
        # torchrun sets one thread per process when the user sets none.
        local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        torch.set_num_threads(config.cpu_threads or max(1, usable_cores() // local_ranks))
    torch.backends.cudnn.benchmark = True  # every batch has the same shape
    _show_log(rank)
    if world_size > 1:
        join_ranks(rank, world_size, device)
    loader_config = resolve_backend(
        config.loader,
        rank,
        world_size,
        device,
        _say,
        previous_backend(config.run_dir) if config.loader.backend == "auto" else None,
    )
    config = dataclasses.replace(config, loader=loader_config)
    loader = build_loader(config.loader, rank, world_size, device=device)
    check_ranks_agree(loader.state_dict(), world_size)
    return config, loader, device


def join_ranks(rank: int, world_size: int, device: torch.device) -> None:
    """The default process group: NCCL on GPUs, Gloo on CPUs.

    Raises:
        ValueError: rank 0 has another kind of device; the ranks would wait for each other.
    """
    store, _, _ = next(rendezvous("env://", rank, world_size, timeout=timedelta(seconds=MEET_SECONDS)))
    store.set(f"cmac/device/{rank}", f"{device.type} on {socket.gethostname()}")
    first = store.get("cmac/device/0").decode()
    if first.split()[0] != device.type:
        raise ValueError(
            f"rank {rank} is to train on {device.type} on {socket.gethostname()}, rank 0 on {first}; expected one kind "
            f"of device; see nvidia-smi there, or give --device cpu to all"
        )
    backend = "nccl" if device.type == "cuda" else "gloo"
    timeout = timedelta(seconds=COLLECTIVE_SECONDS)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)


def previous_backend(run_dir: str) -> str | None:
    """Loader backend that the run in run_dir was started with; None if there is no run yet."""
    try:
        return json.loads((Path(run_dir) / "config.json").read_bytes())["loader"]["backend"]
    except FileNotFoundError:
        return None
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise ValueError(
            f"{Path(run_dir) / 'config.json'} is not the configuration of a run ({error}); remove it, or choose "
            f"another run_dir"
        ) from error


def check_ranks_agree(state: dict[str, Any], world_size: int) -> None:
    """Raises ValueError unless the loaders of all ranks read the same clips in the same order."""
    if world_size == 1:
        return
    states: list[Any] = [None] * world_size
    dist.all_gather_object(states, state)
    for rank, other in enumerate(states):
        differences = [name for name in states[0] if other.get(name) != states[0][name]]
        if differences:
            name = differences[0]
            raise ValueError(
                f"rank {rank} reads other clips than rank 0: its loader has {name} {other.get(name)!r}, expected "
                f"{states[0][name]!r}; give all ranks the same shards"
            )


def choose_device(config: RunConfig) -> torch.device:
    """This rank's GPU, or the CPU.

    Raises:
        ValueError: CUDA is asked for and missing, there are more ranks on this machine than GPUs, or torch cannot use
            the GPUs that are there.
    """
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device is 'cuda' but torch sees no CUDA device; use --device cpu or auto")
    if config.device == "auto" and not torch.cuda.is_available():
        _refuse_lost_gpus()
    if config.device == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if local_rank >= torch.cuda.device_count():
        raise ValueError(
            f"local rank {local_rank} finds {torch.cuda.device_count()} GPU(s), expected one for each rank; "
            "lower --nproc-per-node"
        )
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    return device


def _refuse_lost_gpus() -> None:
    """Raises ValueError where there are GPUs, as far as the system goes: nobody means to train beside them."""
    nodes = sorted(str(path) for path in DEVICES.glob("nvidia[0-9]*"))
    if not nodes or os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1", "NoDevFiles"):
        return
    try:
        driver = DRIVER.read_text(errors="replace").splitlines()[0]
    except (OSError, IndexError):
        driver = "no driver is loaded"
    raise ValueError(
        f"{socket.gethostname()} has {', '.join(nodes)} but torch {torch.__version__} sees no CUDA device "
        f"(CUDA {torch.version.cuda}; {driver}); CUDA 13 needs driver 580 or newer; see "
        "nvidia-smi and `python -c 'import torch; torch.cuda.init()'`, or train on the CPU with --device cpu"
    )


class _Stderr(logging.StreamHandler):
    """Writes to whatever sys.stderr is at the time: a progress bar replaces it while it is shown."""

    stream = property(lambda self: sys.stderr, lambda self, value: None)


def _show_log(rank: int) -> None:
    """Print what a step's parts say of their choices; of other ranks than the first only warnings."""
    handler = _Stderr()
    handler.setFormatter(logging.Formatter("%(message)s" if rank == 0 else f"rank {rank}: %(message)s"))
    for name, level in {
        "cmac": logging.INFO,
        "loaders.kernels": logging.INFO,
        "loaders": logging.WARNING,
        "shards": logging.WARNING,
    }.items():
        logger = logging.getLogger(name)
        logger.setLevel(level if rank == 0 else logging.WARNING)
        logger.addHandler(handler)
        logger.propagate = False


def _say(line: str) -> None:
    print(line, flush=True)


def _fail(error: Exception, told: tuple[type[Exception], ...]) -> NoReturn:
    """Tell of an error and end this rank with status 1. told: errors whose message says all there is to say."""
    rank = f"rank {dist.get_rank()}: " if dist.is_initialized() else ""
    if isinstance(error, told):
        message = f"train.py: {rank}{error}"
    elif dist.is_initialized() and is_lost_connection(error):
        # Every rank but the one that failed first comes here: its traceback would bury that one's message. All of the
        # error's own text is told, as what NCCL itself complains of (a GPU that two ranks share) is in its last lines.
        message = f"train.py: {rank}cannot talk to the other ranks; if one ended, its own message tells why: {error}"
    else:
        message = f"{rank}{''.join(traceback.format_exception(error))}"
    _leave(message, 1)


def _leave(message: str, status: int) -> NoReturn:
    """Print a last line and end this rank.

    With other ranks about, at once: they may wait in a collective, and tearing down a process group waits for them.
    torchrun then ends them.
    """
    print(message, file=sys.stderr, flush=True)
    if dist.is_initialized():
        sys.stdout.flush()
        os._exit(status)
    raise SystemExit(status)


if __name__ == "__main__":
    main()
