"""Losses and weights that are not finite: which step it was, and which clips were in it."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cmac.agreement import Agreement
from cmac.model import StepOutput
from loaders.batch import ClipBatch
from shards.manifest import write_atomically

_LOSSES = ("loss", "contrastive", "consistency")


class StepWindow:
    """The steps since the last `check`: losses on the device, and of the batches what names their clips.

    Args:
        folder: where steps that are not finite are saved, as JSON; made when it is needed.
        rank: of this process.
        agreement: with the other ranks.
    """

    def __init__(self, folder: Path, rank: int, agreement: Agreement) -> None:
        self._folder = folder
        self._rank = rank
        self._agreement = agreement
        self._steps: list[tuple[dict[str, Any], Tensor]] = []

    def add(self, step: int, batch: ClipBatch, output: StepOutput) -> None:
        """Keep a step (counted from 1). Nothing waits for the device."""
        named = {
            "step": step,
            "epoch": batch.epoch,
            "batch": batch.step,
            "keys": batch.keys,
            "second_keys": None if batch.second is None else batch.second.keys,
            "video_ids": batch.video_ids,
            "valid": batch.valid,
            "input_is_finite": _finite_rows(batch),
        }
        losses = torch.stack([getattr(output, name).detach().float() for name in _LOSSES])
        self._steps.append((named, losses))

    def check(self) -> None:
        """Look at the losses and forget the steps. Waits for the device. All ranks must call it.

        Raises:
            FloatingPointError: on all ranks, naming the first step whose loss is not finite on some rank; each rank has
                saved its part of that step.
        """
        if not self._steps:
            return
        losses = torch.stack([losses for _, losses in self._steps]).tolist()
        names = [named for named, _ in self._steps]
        self._steps = []
        bad = self._agreement.gather([not all(map(math.isfinite, step)) for step in losses])
        first = next((index for index in range(len(names)) if any(rank[index] for rank in bad)), None)
        if first is None:
            return
        ranks = [rank for rank, steps in enumerate(bad) if steps[first]]
        earlier = {
            named["step"]: _number(step[0]) for named, step in zip(names[:first], losses, strict=False)
        }
        path = self._save(names[first], losses[first], ranks, losses_before=earlier)
        reports = self._agreement.gather((losses[first][0], _not_finite_keys(names[first])))
        keys = [key for _, rank_keys in reports for key in rank_keys]
        raise FloatingPointError(
            f"the loss is {reports[ranks[0]][0]} at step {names[first]['step']}{_of_ranks(ranks, len(bad))}; its clips "
            f"are in {path}" + (f"; the input of {', '.join(keys[:3])} is not finite" if keys else "")
        )

    def save_skipped(self) -> Path:
        """Save the newest step, which was left out, and forget it; returns where. All ranks must call it."""
        named, losses = self._steps.pop()
        values = losses.tolist()
        bad = self._agreement.gather(not all(map(math.isfinite, values)))
        return self._save(named, values, [rank for rank, is_bad in enumerate(bad) if is_bad], skipped=True)

    def _save(self, named: dict[str, Any], losses: list[float], ranks: list[int], **more: Any) -> Path:
        num_ranks = self._agreement.num_ranks
        name = f"step_{named['step']:08d}"
        path = self._folder / f"{name}{f'_rank{self._rank}' if num_ranks > 1 else ''}.json"
        content = {
            **{k: v.tolist() if isinstance(v, Tensor) else v for k, v in named.items()},
            **{name: _number(loss) for name, loss in zip(_LOSSES, losses, strict=True)},
            "cause": "loss" if ranks else "gradients",
            "ranks_not_finite": ranks,
            "rank": self._rank,
            "num_ranks": num_ranks,
            **more,
        }
        self._folder.mkdir(parents=True, exist_ok=True)
        write_atomically(path, (json.dumps(content, indent=1) + "\n").encode())
        return path


def tensors_not_finite(state: Any, name: str = "") -> list[str]:
    """Dotted names of the floating-point tensors in nested dictionaries that hold NaN or inf. Waits for the device."""
    by_device: dict[torch.device, list[tuple[str, Tensor]]] = {}
    for place, tensor in _floats(state, name):
        by_device.setdefault(tensor.device, []).append((place, torch.isfinite(tensor).all()))
    found = []
    for places in by_device.values():
        finite = torch.stack([is_finite for _, is_finite in places]).tolist()
        found += [place for (place, _), is_finite in zip(places, finite, strict=True) if not is_finite]
    return found


def _finite_rows(batch: ClipBatch) -> Tensor:
    """bool (N,): whether all numbers of a clip, and of its second one, are finite."""
    tensors = [batch.frames, batch.log_mel]
    if batch.second is not None:
        tensors += [batch.second.frames, batch.second.log_mel]
    floats = [tensor for tensor in tensors if tensor.is_floating_point()]
    return torch.stack([torch.isfinite(tensor).flatten(1).all(1) for tensor in floats]).all(0)


def _not_finite_keys(named: dict[str, Any]) -> list[str]:
    finite = named["input_is_finite"].tolist()
    return [key for key, is_finite in zip(named["keys"], finite, strict=True) if not is_finite]


def _floats(state: Any, name: str) -> Iterator[tuple[str, Tensor]]:
    if isinstance(state, Tensor):
        if state.is_floating_point():
            yield name, state.detach()
    elif isinstance(state, dict):
        for key, value in state.items():
            yield from _floats(value, f"{name}.{key}" if name else str(key))


def _number(value: float) -> float | str:
    """JSON has no NaN."""
    return value if math.isfinite(value) else str(value)


def _of_ranks(ranks: list[int], num_ranks: int) -> str:
    if num_ranks == 1:
        return ""
    return f" on rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"
