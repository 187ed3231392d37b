"""What a training tells of itself: figures between two log rows, and the time spent waiting for data."""

import math
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Protocol

import torch
import torch.distributed as dist

from cmac.model import StepOutput
from loaders import Loader
from loaders.batch import ClipBatch

if TYPE_CHECKING:
    from cmac.pretrain import Pretraining


class WaitMeter(Protocol):
    """Counts what a training waits for its data."""

    wait_seconds: float


def timed_batches(loader: Loader, meter: WaitMeter) -> Iterator[ClipBatch]:
    """The loader's batches; the time spent waiting for each goes to the meter."""
    batches = iter(loader)
    while True:
        started = time.perf_counter()
        batch = next(batches, None)
        meter.wait_seconds += time.perf_counter() - started
        if batch is None:
            return
        yield batch


class Meter:
    """Figures between two log rows; tensors stay on the device until `row`."""

    _MEANS = ("loss", "contrastive", "consistency", "accuracy_v2a", "accuracy_a2v")

    def __init__(self, training: "Pretraining") -> None:
        self._training = training
        self._first_step = training.step
        self._started_run = time.perf_counter()
        self._bad_before = training.bad_clips
        self._reset()

    def _reset(self) -> None:
        self.wait_seconds = 0.0
        self._started = time.perf_counter()
        self._sums = torch.zeros(len(self._MEANS), device=self._training.device)
        self._num_steps = 0
        self._num_clips = 0

    def add(self, output: StepOutput, batch: ClipBatch) -> None:
        self._sums += torch.stack([getattr(output, name).detach() for name in self._MEANS])
        self._num_steps += 1
        self._num_clips += batch.num_clips
        self._epoch = batch.epoch

    def row(self, loader: Loader) -> dict[str, float | int]:
        """A log row over the steps since the last one, averaged over ranks; of waits for data the longest.
        All ranks must call it.

        Raises:
            FloatingPointError: the loss is not finite.
        """
        training = self._training
        seconds = time.perf_counter() - self._started
        sums = self._sums / self._num_steps
        counts = torch.tensor([loader.bad_clips.total(), self._num_clips], device=training.device)
        # The rank that waits longest for its data holds up all others.
        wait_seconds = torch.tensor([self.wait_seconds], device=training.device)
        if training.world_size > 1:
            dist.all_reduce(sums)
            sums /= training.world_size
            dist.all_reduce(counts)
            dist.all_reduce(wait_seconds, op=dist.ReduceOp.MAX)
        means = dict(zip(self._MEANS, sums.tolist(), strict=True))
        bad_clips, num_clips = counts.tolist()
        training.bad_clips = self._bad_before + bad_clips
        training.train_seconds += seconds
        if not math.isfinite(means["loss"]):
            raise FloatingPointError(
                f"the loss is {means['loss']} at step {training.step}; lower optimizer.learning_rate "
                f"({training.config.optimizer.learning_rate}), set optimizer.clip_gradient_norm, or use precision bf16"
            )
        done = training.step - self._first_step
        per_step = (time.perf_counter() - self._started_run) / done
        row = {
            "step": training.step,
            "epoch": self._epoch,
            "loss": means["loss"],
            "loss_contrastive": means["contrastive"],
            "loss_consistency": means["consistency"],
            "accuracy_v2a": means["accuracy_v2a"],
            "accuracy_a2v": means["accuracy_a2v"],
            "learning_rate": training.learning_rate(training.step - 1),
            "clips_per_second": num_clips / seconds,
            "data_wait_fraction": min(1.0, wait_seconds.item() / seconds),
            "bad_clips": training.bad_clips,
            "train_seconds": training.train_seconds,
            "eta_seconds": per_step * (training.total_steps - training.step),
        }
        self._reset()
        return row
