"""Pretraining: the step, the schedule and the loop over a loader."""

import contextlib
import dataclasses
import hashlib
import json
import math
import os
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from cmac.agreement import Agreement, Outlook
from cmac.checkpoint import (
    build_model,
    list_checkpoints,
    newest_valid_checkpoint,
    read_checkpoint,
    save_checkpoint,
)
from cmac.config import RunConfig, config_to_dict
from cmac.kernels.check import resolve_compute
from cmac.meter import Meter, measures_gradients, timed_batches
from cmac.model import CMAC, StepOutput
from cmac.nonfinite import StepWindow, tensors_not_finite
from cmac.optim import OptimizerConfig
from cmac.provenance import git_commit
from cmac.run_log import Output, RunLog
from cmac.step import Precision, TrainingStep
from cmac.stop import Stopped, StopSignals
from cmac.wandb_log import check_wandb
from cmac.watchdog import Watchdog
from loaders import Loader
from loaders.base import ClipCounts, TooManyBadClips, is_over_budget
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


def count_steps(config: RunConfig, steps_per_epoch: int) -> int:
    """Optimization steps of a whole run."""
    steps = config.epochs * steps_per_epoch
    return steps if config.max_steps is None else min(steps, config.max_steps)


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
        self.agreement = Agreement(config.hang_seconds)
        self.total_steps = count_steps(config, steps_per_epoch)
        self.step = 0
        self.train_seconds = 0.0
        self.bad_clips: Counter[str] = Counter()  # by reason, since the start of the run, of all ranks
        self.clips_seen = 0  # the same of all clips, without padding
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
            skip_nonfinite=config.nonfinite == "skip",
        )

    @property
    def skipped_steps(self) -> int:
        """Steps left out since the start of the run, as they were not finite."""
        return self.trainer.skipped_steps

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
            measure_gradients=measures_gradients(self.step + 1, self.config.gradient_norms_every),
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
            "bad_clips": dict(self.bad_clips),
            "clips_seen": self.clips_seen,
            "skipped_steps": self.skipped_steps,
            "commit": self.commit,
        }

    def load_state_dict(self, state: dict, loader: Loader) -> None:
        """Go on from a checkpoint's state, as `read_checkpoint` gives it."""
        self.step = state["step"]
        self.train_seconds = state["train_seconds"]
        bad = state["bad_clips"]  # a number alone in checkpoints of older versions
        self.bad_clips = Counter(bad if isinstance(bad, dict) else {"unknown": bad} if bad else {})
        per_step = self.config.loader.global_batch_size * self.config.loader.clips_per_video
        self.clips_seen = state.get("clips_seen", self.step * per_step)  # not in those of older versions
        self.trainer.load_state_dict(state)
        self.trainer.skipped_steps = state.get("skipped_steps", 0)
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
    check_wandb(config.wandb_project)
    run_dir = Path(config.run_dir)
    training = Pretraining(config, device, len(loader))
    _resume(training, loader, run_dir)
    if training.rank == 0:
        run_dir.mkdir(parents=True, exist_ok=True)
        keep_bad_clips_up_to(run_dir / "bad_clips.jsonl", training.step, training.steps_per_epoch)
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


class PeerFailed(RuntimeError):
    """Another rank could not go on, so this one does not either."""


class _Halt(Exception):
    """All ranks end before the next step."""

    def __init__(self, position: dict, stop: bool, failure: Exception | None) -> None:
        super().__init__()
        self.position = position
        self.stop = stop
        self.failure = failure


def run(
    training: Pretraining,
    loader: Loader,
    stop: StopSignals | None = None,
    watchdog: Watchdog | None = None,
) -> bool:
    """Train to the last step, logging and saving into the run folder. All ranks must call it.

    When a signal asks any rank to stop, the loader of any rank fails, or more than loader.max_bad_fraction of the
    clips of all ranks since the start of the run are bad, all ranks end before the next step and write a checkpoint
    of where they are.

    Args:
        training: from `start`.
        loader: the one that `start` was given; it no longer judges its bad clips itself.
        stop: entered by the caller; nothing stops the run when left out.
        watchdog: likewise; nothing watches when left out.

    Returns:
        Whether the last step was taken; False after a signal.

    Raises:
        FloatingPointError: the loss or a weight is no longer finite, or too many steps were left out.
        PeerFailed: the loader of another rank failed.
        RankLost: another rank is gone.
        TooManyBadClips: on all ranks, each with its own batch, which was not trained on.
        Exception: whatever this rank's loader raised.
    """
    return _Run(
        training,
        loader,
        stop or StopSignals(),
        watchdog or Watchdog(Path(training.config.run_dir) / "stacks", training.rank, 0),
    ).train()


class _Run:
    def __init__(self, training: Pretraining, loader: Loader, stop: StopSignals, watchdog: Watchdog) -> None:
        config = training.config
        self._training = training
        self._loader = loader
        self._stop = stop
        self._watchdog = watchdog
        self._folder = Path(config.run_dir)
        self._agreement = training.agreement
        self._window = StepWindow(self._folder / "nonfinite", training.rank, self._agreement)
        bad_clips = self._folder / "bad_clips.jsonl"
        self._bad_list = Output(str(bad_clips), lambda batch: record_bad_clips(bad_clips, batch))
        loader.judges_bad_clips = False
        self._bad_before = training.bad_clips.copy()
        self._counts = ClipCounts()  # of this rank, since this process started
        self._num_bad = training.bad_clips.total()  # of all ranks, since the start of the run
        self._log = None
        if training.rank == 0:
            self._log = RunLog(
                self._folder,
                training.total_steps,
                training.step,
                wandb_project=config.wandb_project,
                config=config_to_dict(config),
            )
        self._meter = Meter(training)
        self._logged = self._saved = training.step

    def train(self) -> bool:
        """See `run`."""
        try:
            finished = self._train()
        except BaseException:
            with contextlib.suppress(OSError):  # of a disk that is full the first error tells
                self._close_log()
            raise
        self._close_log()
        return finished

    def _close_log(self) -> None:
        self._bad_list.close()
        if self._log is not None:
            self._log.close()

    def _train(self) -> bool:
        training = self._training
        try:
            while training.step < training.total_steps:
                for batch in self._batches():
                    self._take(batch)
                    if training.step == training.total_steps:
                        break
        except _Halt as halt:
            return self._end_early(halt)
        return True

    def _batches(self) -> Iterator[ClipBatch]:
        """The batches that are left of the epoch, each once all ranks have theirs.

        Raises:
            _Halt: on all ranks.
        """
        stop, watchdog = self._stop, self._watchdog
        batches = timed_batches(self._loader, self._meter)
        while True:
            position, batch, failure = self._loader.state_dict(), None, None
            try:
                with watchdog.doing("waiting for data"), stop.interruptible():
                    batch = next(batches, None)
                    if batch is None:
                        return
            except Stopped:
                pass
            except Exception as error:  # whatever it is, the other ranks wait for this one
                failure = error
            own = ClipCounts()
            if batch is not None:
                own.add(batch)
            with watchdog.doing("waiting for the other ranks"):
                outlook = self._agreement.outlook(
                    stop=stop.received is not None,
                    failed=failure is not None,
                    num_clips=own.seen,
                    num_bad=own.bad,
                )
            if outlook.stop or outlook.failed:
                raise _Halt(position, outlook.stop, failure)
            if own.bad:
                self._bad_list.write(batch, own.bad)
            if not self._count(batch, outlook):
                raise _Halt(position, False, self._too_many_bad_clips(batch, outlook))
            yield batch

    def _count(self, batch: ClipBatch, outlook: Outlook) -> bool:
        """Count the clips of the next step. False, and nothing is counted, if with them too many of all are bad."""
        training = self._training
        num_bad, num_seen = self._num_bad + outlook.num_bad, training.clips_seen + outlook.num_clips
        loader = training.config.loader
        steps_left = training.steps_per_epoch - 1 - batch.step
        num_left = steps_left * loader.global_batch_size * loader.clips_per_video
        if is_over_budget(num_bad, num_seen, num_left, loader.max_bad_fraction):
            return False
        self._counts.add(batch)
        self._num_bad, training.clips_seen = num_bad, num_seen
        return True

    def _too_many_bad_clips(self, batch: ClipBatch, outlook: Outlook) -> TooManyBadClips:
        """The same message on all ranks. Shards are known of those clips that came since this process started."""
        training, counts = self._training, self._counts
        counts.add(batch)
        with self._watchdog.doing("waiting for the other ranks"):
            ranks = self._agreement.gather((counts.by_reason, counts.by_shard))
        whole = ClipCounts(seen=training.clips_seen + outlook.num_clips, by_reason=self._bad_before.copy())
        for by_reason, by_shard in ranks:
            whole.by_reason.update(by_reason)
            whole.by_shard.update(by_shard)
        whose = f" of all {training.world_size} ranks" if training.world_size > 1 else ""
        loader = training.config.loader
        return TooManyBadClips(whole.over_budget(loader.max_bad_fraction, loader.shards, whose), batch)

    def _take(self, batch: ClipBatch) -> None:
        training, config = self._training, self._training.config
        skipped_before = training.skipped_steps
        with self._watchdog.doing("in a step"):
            output = training.train_step(batch)
        self._window.add(training.step, batch, output)
        if training.skipped_steps > skipped_before:
            self._meter.add_skipped(batch)
            self._count_skipped()
        else:
            self._meter.add(output, batch)
        self._watchdog.step_done(training.step)
        if self._log is not None:
            self._log.advance(training.step)
        if training.step == training.total_steps or training.step % config.checkpoint_every == 0:
            self._save(self._loader.state_dict())
        elif training.step % config.log_every == 0:
            self._write_row()

    def _count_skipped(self) -> None:
        training, most = self._training, self._training.config.max_skipped_steps
        path = self._window.save_skipped()
        if training.skipped_steps > most:
            raise FloatingPointError(
                f"{training.skipped_steps} steps were not finite and left out, expected at most {most} "
                f"(max_skipped_steps); the clips of the last one are in {path}; {self._advice()}"
            )
        if training.rank == 0:
            print(
                f"step {training.step} is not finite and left out ({training.skipped_steps} of at most {most}); "
                f"its clips are in {path}",
                flush=True,
            )

    def _advice(self) -> str:
        rate = self._training.config.optimizer.learning_rate
        return (
            f"lower optimizer.learning_rate ({rate}), set optimizer.clip_gradient_norm, use precision bf16, or leave "
            "such steps out with --nonfinite skip"
        )

    def _write_row(self) -> None:
        with self._watchdog.doing("logging"):
            try:
                self._window.check()
            except FloatingPointError as error:
                raise FloatingPointError(f"{error}; {self._advice()}") from error
            row = self._meter.row()
            if self._log is not None:
                self._log.write(row)
        self._logged = self._training.step

    def _save(self, position: dict) -> None:
        """Write a checkpoint of the last step, with the loader at that position, unless there is one. All ranks must
        call it; others than the first do not wait until it is written."""
        training = self._training
        if self._logged < training.step:
            self._write_row()
        if self._saved == training.step:
            return
        with self._watchdog.doing("saving"):
            bad = self._agreement.gather(tensors_not_finite(training.trainer.state_dict()))
            for rank, names in enumerate(bad):
                if names:
                    raise FloatingPointError(
                        f"{names[0]} and {len(names) - 1} more tensors of rank {rank} are not finite after step "
                        f"{training.step}, though its loss was; no checkpoint is written; {self._advice()}"
                    )
            state = {**training.state_dict(self._loader), "loader": position}
            if training.rank == 0:
                save_checkpoint(
                    self._folder / "checkpoints",
                    training.step,
                    training.config,
                    state,
                    training.config.keep_checkpoints,
                )
        self._saved = training.step

    def _end_early(self, halt: _Halt) -> bool:
        """Save where all ranks are. True is never returned, as the run is not at its end.

        Raises:
            PeerFailed: the loader of another rank failed.
            Exception: what this rank's loader raised.
        """
        training = self._training
        self._save(halt.position)
        signal = self._stop.received
        # Nobody leaves before the checkpoint is there: torchrun ends all ranks once one has failed.
        reports = self._agreement.gather(
            (None if signal is None else signal.name, None if halt.failure is None else str(halt.failure))
        )
        signals = [name for name, _ in reports if name is not None]
        failures = [f"rank {rank}: {text}" for rank, (_, text) in enumerate(reports) if text is not None]
        if training.rank == 0:
            if halt.stop:
                print("".join(f"{failure}\n" for failure in failures), end="", file=sys.stderr, flush=True)
                print(f"{signals[0]}: the run stops", flush=True)
            where = f"step {training.step} of {training.total_steps}"
            if training.step > 0:
                print(f"{where} is saved; the same command goes on from there", flush=True)
        if halt.stop:
            return False
        if halt.failure is not None:
            raise halt.failure
        raise PeerFailed(f"ends with {failures[0]}")


def record_bad_clips(path: Path, batch: ClipBatch) -> None:
    """Append a line with epoch, step, key, shard and reason for each bad clip of a rank's batch, all in one write, as
    other ranks append to the same file.

    Raises:
        OSError: they cannot be written.
    """
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
    data = "".join(json.dumps(line) + "\n" for line in lines).encode()
    with open(path, "ab", buffering=0) as file:
        written = file.write(data)
        if written < len(data):
            if os.fstat(file.fileno()).st_size == file.tell():  # no other rank has appended since
                file.truncate(file.tell() - written)
            raise OSError(f"{written} of {len(data)} bytes could be written")


def keep_bad_clips_up_to(path: Path, step: int, steps_per_epoch: int) -> None:
    """Drop the lines of steps beyond the first `step`, which are taken again, and a last line that was cut off."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            clip = json.loads(line)
        except json.JSONDecodeError:
            continue
        if clip["epoch"] * steps_per_epoch + clip["step"] < step:
            kept.append(line + "\n")
    write_atomically(path, "".join(kept).encode())


def _resume(training: Pretraining, loader: Loader, run_dir: Path) -> None:
    """Go on from the checkpoint that the first rank chooses."""
    chosen = None
    if training.rank == 0:
        chosen = _choose_checkpoint(training.config, run_dir / "checkpoints")
    newest, problem = training.agreement.gather(chosen)[0]
    if problem is not None:
        raise ValueError(problem)
    if newest is None:
        return
    lines: list[str] = []
    try:
        lines = _load(training, loader, Path(newest))
    except (ValueError, RuntimeError) as error:
        problem = str(error)
    # All ranks have to know: those that could read it would wait for the others in the first step.
    for rank, text in enumerate(training.agreement.gather(problem)):
        if text is not None:
            where = "" if rank == training.rank else f"rank {rank}: "
            shared = "; all nodes must share run_dir" if training.world_size > 1 else ""
            raise ValueError(f"{where}{text}{shared}")
    if training.rank == 0:
        print("\n".join([f"going on from {newest} at step {training.step}", *lines]), flush=True)


def _choose_checkpoint(config: RunConfig, folder: Path) -> tuple[str | None, str | None]:
    """(path of the newest checkpoint that is whole, or None; why there is none to go on from, or None)."""
    checkpoints = list_checkpoints(folder)
    if checkpoints and config.resume == "never":
        return None, (
            f"{checkpoints[-1]} exists and resume is 'never'; choose another run_dir or remove this one"
        )
    try:
        newest = newest_valid_checkpoint(folder, lambda line: print(line, file=sys.stderr, flush=True))
    except ValueError as error:
        return None, str(error)
    return None if newest is None else str(newest), None


def _load(training: Pretraining, loader: Loader, path: Path) -> list[str]:
    """Go on from a checkpoint; lines that tell what has changed since.

    Raises:
        ValueError: it cannot be read, or is of a run that is not this one.
    """
    config = training.config
    state = read_checkpoint(path, training.device)
    changed = _differences(config_to_dict(state["config"]), config_to_dict(config))
    fixed = [
        line for line in changed if line.startswith(("model.", "loss.", "optimizer.name", "loader.clips_per"))
    ]
    if fixed:
        raise ValueError(
            f"{path} was trained with another configuration: {'; '.join(fixed)}; choose another run_dir, "
            "or give the values of the run that you want to go on with"
        )
    training.load_state_dict(state, loader)
    lines = [f"  changed since: {line}" for line in changed]
    return [*lines, *_what_length_changes(training, state), *_what_ranks_change(training, state)]


def _what_length_changes(training: Pretraining, state: dict) -> list[str]:
    """What another number of steps than before means for a schedule that ends with them."""
    before, now = count_steps(state["config"], training.steps_per_epoch), training.total_steps
    if training.config.optimizer.schedule != "cosine" or before == now:
        return []
    return [
        f"  learning rate: the cosine now ends at step {now}, it was {before}; it goes on at "
        f"{training.learning_rate():.3g} from step {training.step}"
    ]


def _what_ranks_change(training: Pretraining, state: dict) -> list[str]:
    """What another number of ranks than before means for this run."""
    before, now, model = len(state["rng"]), training.world_size, training.config.model
    if before == now:
        return []
    lines = [f"  ranks: {before} -> {now}; the global batches stay the same, clip for clip"]
    if model.batch_norm != "sync":
        lines.append(
            f"  batch norm ({model.batch_norm}) now takes its statistics over other groups of clips; running "
            "statistics go on from the first rank's"
        )
    if training.config.optimizer.learning_rate_per_rank:
        lines.append(f"  learning rate: now {now} times optimizer.learning_rate, it was {before} times")
    return lines


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
