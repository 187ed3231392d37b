"""What a training tells of itself: figures between two log rows, and the time spent waiting for data."""

import math
import os
import statistics
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from cmac.gradient_norms import GradientNorms
from cmac.model import StepOutput
from loaders import Loader
from loaders.batch import ClipBatch

if TYPE_CHECKING:
    from cmac.pretrain import Pretraining

Row = dict[str, float | int | None | dict[str, int]]


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


def measures_gradients(step: int, every: int) -> bool:
    """Whether a step (counted from 1) measures gradient norms: the first, which shows at once whether there is memory
    for it, and each that `every` divides; none with 0."""
    return every > 0 and (step == 1 or step % every == 0)


class Meter:
    """Figures between two log rows; tensors stay on the device until `row`."""

    _MEANS = ("loss", "contrastive", "consistency", "accuracy_v2a", "accuracy_a2v")

    def __init__(self, training: "Pretraining") -> None:
        self._training = training
        self._first_step = training.step
        self._started_run = time.perf_counter()
        self._epoch = 0
        self._reset()

    def _reset(self) -> None:
        self.wait_seconds = 0.0
        self._started = time.perf_counter()
        self._clock = _StepClock(self._training.device)
        self._sums = torch.zeros(len(self._MEANS), device=self._training.device)
        self._num_steps = 0
        self._num_clips = 0
        self._bad: Counter[str] = Counter()
        self._gradients: GradientNorms | None = None
        self._gradient_step: int | None = None

    def add(self, output: StepOutput, batch: ClipBatch) -> None:
        """Count a step that was taken. Nothing waits for the device."""
        self._sums += torch.stack([getattr(output, name).detach() for name in self._MEANS])
        self._num_steps += 1
        if output.gradients is not None:
            self._gradients, self._gradient_step = output.gradients, self._training.step
        self.add_skipped(batch)

    def add_skipped(self, batch: ClipBatch) -> None:
        """Count a step that was left out: its clips and its time, not its losses."""
        self._clock.tick()
        self._num_clips += batch.num_clips
        # Not the loader's count: it knows of batches that were fetched and not trained on, which come again.
        bad = batch.bad if batch.second is None else (*batch.bad, *batch.second.bad)
        self._bad.update(clip.reason for clip in bad)
        self._epoch = batch.epoch

    def row(self) -> Row:
        """A log row over the steps since the last one, JSON-able; what is unknown or not finite is None.

        Losses and accuracies are means over ranks, clips are summed, and of times and memory the largest counts: the
        rank that waits longest for its data holds up all others. All ranks must call it; it waits for the device.
        """
        training = self._training
        num_steps = max(1, self._num_steps)
        sums = [
            value / num_steps for value in self._sums.tolist()
        ]  # by then the device is through with all steps
        seconds = time.perf_counter() - self._started
        median, longest = self._clock.seconds()
        allocated, reserved = _gpu_memory(training.device)
        ranks = training.agreement.gather(
            {
                "means": sums,
                "clips": self._num_clips,
                "bad": dict(self._bad),
                "largest": [self.wait_seconds, median, longest, allocated, reserved, _host_memory()],
            }
        )
        means = [math.nan] * len(self._MEANS)
        if self._num_steps:
            means = [sum(values) / len(ranks) for values in zip(*(rank["means"] for rank in ranks))]
        loss, contrastive, consistency, accuracy_v2a, accuracy_a2v = map(_finite, means)
        wait, median, longest, allocated, reserved, host = (
            max((value for value in values if value is not None), default=None)
            for values in zip(*(rank["largest"] for rank in ranks))
        )
        for rank in ranks:
            training.bad_clips.update(rank["bad"])
        training.train_seconds += seconds
        per_step = (time.perf_counter() - self._started_run) / (training.step - self._first_step)
        scaler = training.trainer.scaler
        row: Row = {
            "step": training.step,
            "epoch": self._epoch,
            "loss": loss,
            "loss_contrastive": contrastive,
            "loss_consistency": consistency,
            "accuracy_v2a": accuracy_v2a,
            "accuracy_a2v": accuracy_a2v,
            "learning_rate": training.learning_rate(training.step - 1),
            "loss_scale": scaler.get_scale() if scaler.is_enabled() else None,
            "skipped_steps": training.skipped_steps,
            "clips_per_second": sum(rank["clips"] for rank in ranks) / seconds,
            "step_seconds_median": median,
            "step_seconds_max": longest,
            "data_wait_seconds": wait,
            "data_wait_fraction": min(1.0, wait / seconds),
            "bad_clips": training.bad_clips.total(),
            "bad_clips_by_reason": dict(sorted(training.bad_clips.items())),
            **self._gradient_figures(),
            **self._queue_figures(),
            "gpu_memory_allocated_bytes": allocated,
            "gpu_memory_reserved_bytes": reserved,
            "host_memory_bytes": host,
            "train_seconds": training.train_seconds,
            "eta_seconds": per_step * (training.total_steps - training.step),
        }
        self._reset()
        return row

    def _gradient_figures(self) -> Row:
        """Of the last step that measured them; None if no step since the last row did."""
        norms = self._gradients
        return {
            "gradient_step": self._gradient_step,
            "gradient_norm": None if norms is None else _figure(norms.whole),
            "gradient_norm_contrastive": None if norms is None else _figure(norms.contrastive),
            "gradient_norm_consistency": None if norms is None else _figure(norms.consistency),
            "gradient_cosine": None if norms is None else _figure(norms.cosine),
        }

    def _queue_figures(self) -> Row:
        """Of both queues together; None where they are not trained against."""
        model = self._training.model
        figures: list[float | None] = [None, None, None]
        if model.loss_config.contrastive and model.loss_config.negatives == "queue":
            queues = [torch.stack(queue.staleness()) for queue in (model.queue_v, model.queue_a)]
            oldest, mean, filled = zip(*torch.stack(queues).tolist())
            figures = [_finite(max(oldest)), _finite(sum(mean) / 2), _finite(sum(filled) / 2)]
        return dict(zip(("queue_age_oldest", "queue_age_mean", "queue_filled"), figures, strict=True))


class _StepClock:
    """Seconds from each step's end to the next one's, on a GPU by its own clock: the host runs ahead."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._marks: list[Any] = []
        self.tick()

    def tick(self) -> None:
        """A step has ended, on a GPU: is handed to it. Waits for nothing."""
        if self._on_gpu:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks.append(event)
        else:
            self._marks.append(time.perf_counter())

    def seconds(self) -> tuple[float | None, float | None]:
        """Median and longest; the device must be through with all steps."""
        pairs = zip(self._marks, self._marks[1:])
        if self._on_gpu:
            spans = [before.elapsed_time(after) / 1000 for before, after in pairs]
        else:
            spans = [after - before for before, after in pairs]
        if not spans:
            return None, None
        return statistics.median(spans), max(spans)


def _gpu_memory(device: torch.device) -> tuple[int | None, int | None]:
    """Largest bytes in use and held by torch since the last call; None without a GPU."""
    if device.type != "cuda":
        return None, None
    largest = torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device)
    torch.cuda.reset_peak_memory_stats(device)
    return largest


def _host_memory() -> int | None:
    """Resident bytes of this process, without its children; None where there is no /proc."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except FileNotFoundError:
        return None
    return pages * os.sysconf("SC_PAGE_SIZE")


def _figure(value: Tensor | None) -> float | None:
    return None if value is None else _finite(value.item())


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
