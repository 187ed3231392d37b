"""Pretrain CMAC: torchrun --nproc-per-node N train.py PRESET [--field value ...]

`train.py --help` lists the presets, `train.py PRESET --help` every field with its meaning and default.
"""

import difflib
import inspect
import os
import sys

import torch
import torch.distributed as dist
import tyro

from cmac.config import PRESETS, RunConfig
from cmac.pretrain import pretrain
from cmac.provenance import usable_cores
from loaders import build_loader
from loaders.portable import TooManyBadClips


def parse(arguments: list[str]) -> RunConfig:
    """The configuration that a command line asks for. Prints help or what is wrong, and exits, as command lines do."""
    name = arguments[0] if arguments else None
    if name in PRESETS:
        description = inspect.getdoc(PRESETS[name])
        return tyro.cli(
            RunConfig,
            default=PRESETS[name](),
            prog=f"train.py {name}",
            description=description,
            args=arguments[1:],
        )
    if name is not None and not name.startswith("-"):
        close = difflib.get_close_matches(name, PRESETS, n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise SystemExit(f"train.py: {name!r} is no preset, expected one of {', '.join(PRESETS)}{hint}")
    print("usage: train.py PRESET [--field value ...]\n\npresets (train.py PRESET --help lists the fields):")
    for preset, build in PRESETS.items():
        print(f"  {preset:24}{inspect.getdoc(build).splitlines()[0]}")
    raise SystemExit(0 if name in ("-h", "--help") else "train.py: a preset is missing")


def main() -> None:
    """Join a loader and a model, and train."""
    try:
        config = parse(sys.argv[1:])
    except ValueError as error:
        raise SystemExit(f"train.py: {error}") from error
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    device = _device(config)
    if device.type == "cpu":
        # torchrun sets one thread per process when the user sets none.
        local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        torch.set_num_threads(config.cpu_threads or max(1, usable_cores() // local_ranks))
    if world_size > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        loader = build_loader(config.loader, rank, world_size)
        try:
            pretrain(config, loader, device)
        finally:
            loader.close()
    except (ValueError, FloatingPointError, TooManyBadClips) as error:
        raise SystemExit(f"train.py: {error}") from error
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _device(config: RunConfig) -> torch.device:
    if config.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("train.py: device is 'cuda' but torch sees no CUDA device; use --device cpu or auto")
    if config.device == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(device)
    return device


if __name__ == "__main__":
    main()
