"""Pretraining: the step, the schedule and the loop over a loader."""

import dataclasses
import hashlib
import json
import math
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from cmac.checkpoint import build_model, list_checkpoints, read_checkpoint, save_checkpoint
from cmac.config import RunConfig, config_to_dict
from cmac.kernels.check import resolve_compute
from cmac.meter import Meter, timed_batches
from cmac.model import CMAC, StepOutput
from cmac.optim import OptimizerConfig
from cmac.provenance import git_commit
from cmac.run_log import RunLog
from cmac.step import Precision, TrainingStep
from loaders import Loader
from loaders.batch import ClipBatch
from shards.manifest import write_atomically


def learning_rate_at(
    config: OptimizerConfig, step: int, steps_per_epoch: int, total_steps: int, ranks: int
) -> float:
    """Learning rate of a step (counted from 0): linear warm-up, then constant or cosine to zero."""
    peak = config.learning_rate * (ranks if config.learning_rate_per_rank else 1)
    warmup_steps = config.warmup_epochs * steps_per_epoch
    warmup = min(1.0, (step + 1) / warmup_steps) if warmup_steps > 0 else 1.0
    if config.schedule == "cosine":
        warmup *= 0.5 * (1 + math.cos(math.pi * step / total_steps))
    return peak * warmup


def resolve_precision(precision: str, device: torch.device) -> Precision:
    """`auto` -> bf16 where the GPU has it, fp16 on older GPUs, fp32 on CPU; anything else unchanged."""
    if precision != "auto":
        return precision
    if device.type != "cuda":
        return "fp32"
    return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"


class Pretraining:
    """Model, optimizer and step of one rank.

    Args:
        config: the run.
        device: where this rank computes.
        steps_per_epoch: length of the loader.
    """

    def __init__(self, config: RunConfig, device: torch.device, steps_per_epoch: int) -> None:
        if steps_per_epoch < 1:
            raise ValueError(
                f"an epoch has {steps_per_epoch} batches, expected at least 1: the shards hold fewer videos than "
                f"loader.global_batch_size {config.loader.global_batch_size}; make it smaller"
            )
        self.config = config
        self.device = device
        self.steps_per_epoch = steps_per_epoch
        self.distributed = dist.is_available() and dist.is_initialized()
        self.world_size = dist.get_world_size() if self.distributed else 1
        self.rank = dist.get_rank() if self.distributed else 0
        self.total_steps = config.epochs * steps_per_epoch
        if config.max_steps is not None:
            self.total_steps = min(self.total_steps, config.max_steps)
        self.step = 0
        self.train_seconds = 0.0
        self.bad_clips = 0
        self.commit = git_commit() if self.rank == 0 else None

        torch.manual_seed(config.seed)
        compute, lines = resolve_compute(
            config.compute,
            device,
            num_clips=config.loader.global_batch_size // self.world_size,
            dim=config.model.embedding_dim,
            attention=config.model.attention,
        )
        if config.model.batch_norm == "sync" and self.world_size > 1:
            lines = [line for line in lines if "compute.batch_norm" not in line]
            lines.append("compute.batch_norm: torch's SyncBatchNorm, as model.batch_norm is 'sync'")
        for line in lines:
            if self.rank == 0 or line.startswith("WARNING"):
                print(line if self.rank == 0 else f"rank {self.rank}: {line}", flush=True)
        self.trainer = TrainingStep(
            build_model(dataclasses.replace(config, compute=compute), self.world_size),
            config.optimizer,
            device=device,
            precision=resolve_precision(config.precision, device),
            channels_last=config.channels_last,
        )

    @property
    def model(self) -> CMAC:
        """The model in training."""
        return self.trainer.model

    def learning_rate(self, step: int | None = None) -> float:
        """Learning rate of a step (counted from 0); of the next one if left out."""
        optimizer = self.config.optimizer
        step = self.step if step is None else step
        return learning_rate_at(optimizer, step, self.steps_per_epoch, self.total_steps, self.world_size)

    def train_step(self, batch: ClipBatch) -> StepOutput:
        """One optimization step of Eq. (8) on this rank's part of a global batch; nothing waits for the device."""
        batch = batch.to(self.device)
        second, valid = None, batch.valid
        if batch.second is not None:
            second = batch.second.frames, batch.second.log_mel
            valid = valid & batch.second.valid
        output = self.trainer(
            batch.frames,
            batch.log_mel,
            batch.video_ids,
            valid,
            learning_rate=self.learning_rate(),
            shuffle_seed=self._shuffle_seed(),
            second=second,
        )
        self.step += 1
        return output

    def _shuffle_seed(self) -> int:
        """The same on all ranks, another for each run's seed and step."""
        digest = hashlib.blake2b(f"{self.config.seed}/{self.step}".encode(), digest_size=7).digest()
        return int.from_bytes(digest, "big")

    def state_dict(self, loader: Loader) -> dict:
        """What resuming exactly needs, beside the configuration. All ranks must call it."""
        states = [self._rng_state()]
        if self.world_size > 1:
            states = [None] * self.world_size
            dist.all_gather_object(states, self._rng_state())
        return {
            **self.trainer.state_dict(),
            "loader": loader.state_dict(),
            "rng": states,
            "train_seconds": self.train_seconds,
            "bad_clips": self.bad_clips,
            "commit": self.commit,
        }

    def load_state_dict(self, state: dict, loader: Loader) -> None:
        """Go on from a checkpoint's state, as `read_checkpoint` gives it."""
        self.step = state["step"]
        self.train_seconds = state["train_seconds"]
        self.bad_clips = state["bad_clips"]
        self.trainer.load_state_dict(state)
        loader.load_state_dict(state["loader"])
        if len(state["rng"]) == self.world_size:
            # Nothing in the step draws from these generators today (crops and shuffles have seeds of their own).
            rng = state["rng"][self.rank]
            torch.set_rng_state(rng["cpu"].cpu())
            if self.device.type == "cuda" and "cuda" in rng:
                torch.cuda.set_rng_state(rng["cuda"].cpu(), self.device)

    def _rng_state(self) -> dict[str, Tensor]:
        state = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            state["cuda"] = torch.cuda.get_rng_state(self.device)
        return state


def pretrain(config: RunConfig, loader: Loader, device: torch.device) -> Pretraining:
    """`start` and `run` in one."""
    training = start(config, loader, device)
    run(training, loader)
    return training


def start(config: RunConfig, loader: Loader, device: torch.device) -> Pretraining:
    """Build the model, go on from the newest checkpoint in `config.run_dir` if there is one, and write config.json.

    Raises:
        ValueError: the configuration does not fit the shards or the machine, or the run folder holds another run.
        OSError: the run folder cannot be written.
    """
    run_dir = Path(config.run_dir)
    training = Pretraining(config, device, len(loader))
    _resume(training, loader, run_dir)
    if training.rank == 0:
        run_dir.mkdir(parents=True, exist_ok=True)
        write_atomically(
            run_dir / "config.json", (json.dumps(config_to_dict(config), indent=2) + "\n").encode()
        )
        for name, count in training.model.parameter_counts().items():
            print(f"{name}: {count:,} parameters", flush=True)
        plan = f"{training.total_steps} steps of {config.loader.global_batch_size} clips"
        print(f"{plan}, {training.trainer.precision}, {training.world_size} rank(s) on {device}", flush=True)
        _warn_of_shared_statistics(training)
    return training


def _warn_of_shared_statistics(training: Pretraining) -> None:
    model, num_clips = training.config.model, training.config.loader.global_batch_size
    group = model.batch_norm_group
    if (
        training.world_size == 1
        and model.batch_norm == "shuffle"
        and (num_clips <= group or num_clips % group)
    ):
        print(
            f"note: model.batch_norm is 'shuffle', but one rank cannot split {num_clips} clips into groups of {group}: "
            "queries and keys share batch statistics; choose a larger batch or a smaller model.batch_norm_group",
            flush=True,
        )


def run(training: Pretraining, loader: Loader) -> None:
    """Train to the last step, logging and saving into the run folder. All ranks must call it.

    Raises:
        FloatingPointError: the loss is no longer finite.
    """
    config, main_rank = training.config, training.rank == 0
    run_dir = Path(config.run_dir)
    log = RunLog(run_dir, training.total_steps, training.step) if main_rank else None
    meter = Meter(training)
    try:
        while training.step < training.total_steps:
            for batch in timed_batches(loader, meter):
                record_bad_clips(run_dir / "bad_clips.jsonl", batch)
                output = training.train_step(batch)
                meter.add(output, batch)
                if log is not None:
                    log.advance(training.step)
                last = training.step == training.total_steps
                save = last or training.step % config.checkpoint_every == 0
                if save or training.step % config.log_every == 0:
                    row = meter.row(
                        loader
                    )  # before saving: it refuses to go on with a loss that is not finite
                    if log is not None:
                        log.write(row)
                if save:
                    state = training.state_dict(loader)
                    if main_rank:
                        folder = run_dir / "checkpoints"
                        save_checkpoint(folder, training.step, config, state, config.keep_checkpoints)
                if last:
                    break
    finally:
        if log is not None:
            log.close()


def record_bad_clips(path: Path, batch: ClipBatch) -> None:
    """Append a line with epoch, step, key, shard and reason for each bad clip of a rank's batch."""
    bad = batch.bad if batch.second is None else (*batch.bad, *batch.second.bad)
    if not bad:
        return
    lines = [
        {
            "epoch": batch.epoch,
            "step": batch.step,
            "key": clip.key,
            "shard": clip.shard,
            "reason": clip.reason,
        }
        for clip in bad
    ]
    with open(path, "a", encoding="utf-8") as file:
        file.write("".join(json.dumps(line) + "\n" for line in lines))


def _resume(training: Pretraining, loader: Loader, run_dir: Path) -> None:
    checkpoints = list_checkpoints(run_dir / "checkpoints")
    if not checkpoints:
        return
    newest, config = checkpoints[-1], training.config
    if config.resume == "never":
        raise ValueError(f"{newest} exists and resume is 'never'; choose another run_dir or remove this one")
    state = read_checkpoint(newest, training.device)
    changed = _differences(config_to_dict(state["config"]), config_to_dict(config))
    fixed = [
        line for line in changed if line.startswith(("model.", "loss.", "optimizer.name", "loader.clips_per"))
    ]
    if fixed:
        raise ValueError(
            f"{newest} was trained with another configuration: {'; '.join(fixed)}; choose another run_dir, "
            "or give the values of the run that you want to go on with"
        )
    training.load_state_dict(state, loader)
    if training.rank == 0:
        print(f"going on from {newest} at step {training.step}", flush=True)
        for line in changed:
            print(f"  changed since: {line}", flush=True)


def _differences(old: dict, new: dict, prefix: str = "") -> list[str]:
    """`name: old -> new` for every field that differs."""
    lines = []
    for name in sorted(old.keys() | new.keys()):
        before, after = old.get(name), new.get(name)
        if isinstance(before, dict) and isinstance(after, dict):
            lines += _differences(before, after, f"{prefix}{name}.")
        elif before != after:
            lines.append(f"{prefix}{name}: {before} -> {after}")
    return lines
