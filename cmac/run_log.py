"""Where a run's figures go: log.jsonl, TensorBoard, Weights & Biases and the terminal. None of them can end a run."""

import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterable
from datetime import timedelta
from pathlib import Path
from typing import Any

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text
from torch.utils.tensorboard import SummaryWriter

from cmac.wandb_log import WandbLog
from shards.manifest import write_atomically

Row = dict[str, float | int | None | dict[str, int]]

GROUPS = {
    "losses": ("loss", "loss_contrastive", "loss_consistency"),
    "accuracy": ("accuracy", "accuracy_v2a", "accuracy_a2v"),
    "optimizer": ("learning_rate", "head_learning_rate", "loss_scale", "skipped_steps"),
    "speed": ("clips_per_second", "step_seconds_median", "step_seconds_max", "train_seconds", "eta_seconds"),
    "data": ("epoch", "data_wait_seconds", "data_wait_fraction", "bad_clips", "bad_clips_by_reason"),
    "gradients": (
        "gradient_norm",
        "gradient_norm_contrastive",
        "gradient_norm_consistency",
        "gradient_cosine",
    ),
    "queue": ("queue_age_oldest", "queue_age_mean", "queue_filled"),
    "memory": ("gpu_memory_allocated_bytes", "gpu_memory_reserved_bytes", "host_memory_bytes"),
}
"""Group of charts -> fields of a row that it shows."""


def scalars(row: Row) -> dict[str, float]:
    """What of a row can be drawn, by group and name: `losses/loss`, `data/bad_clips_by_reason/decode-error`."""
    found = {}
    for group, names in GROUPS.items():
        for name in names:
            value = row.get(name)
            if isinstance(value, dict):
                found.update({f"{group}/{name}/{key}": part for key, part in value.items()})
            elif value is not None:
                found[f"{group}/{name}"] = value
    return found


def pretraining_figures(row: Row) -> str:
    """A row of pretraining in words."""
    losses = "no step counted"
    if row["loss"] is not None:
        losses = (
            f"loss {row['loss']:.3f} (contrastive {row['loss_contrastive']:.3f}, "
            f"consistency {row['loss_consistency']:.4f})"
        )
    skipped = f", skipped steps {row['skipped_steps']}" if row["skipped_steps"] else ""
    return (
        f"{losses}, {row['clips_per_second']:.1f} clips/s, waiting for data {row['data_wait_fraction']:.0%}, "
        f"bad clips {row['bad_clips']}{skipped}"
    )


class RunLog:
    """Writes one row per logging step. On a terminal a progress bar with the remaining time, else plain lines; both
    where standard output goes to a file and standard error to a terminal.

    A row that cannot be written, of a full disk say, is lost and the run goes on: it says so once, and how many were
    lost when writing works again.

    Args:
        run_dir: the run's folder.
        total_steps: steps of the whole run.
        start_step: steps already done; rows beyond it, left by a run that was killed, are removed.
        title: what the progress bar is called.
        describe: a row in words.
        wandb_project: of Weights & Biases, for rows to go there too; "" for nowhere.
        config: what Weights & Biases shows as the run's configuration.

    Raises:
        OSError: the folder cannot be written now, before the first row.
    """

    def __init__(
        self,
        run_dir: Path,
        total_steps: int,
        start_step: int,
        *,
        title: str = "pretraining",
        describe: Callable[[Row], str] = pretraining_figures,
        wandb_project: str = "",
        config: dict[str, Any] | None = None,
    ) -> None:
        self.path = run_dir / "log.jsonl"
        self.total_steps = total_steps
        self._describe = describe
        self._wandb = WandbLog(wandb_project, run_dir, config or {}) if wandb_project else None
        tensorboard = _TensorBoard(run_dir / "tb", start_step)
        self._outputs = [
            Output(str(self.path), _Rows(self.path, start_step).write),
            # Exception: where TensorFlow is installed, TensorBoard writes through it, and it has errors of its own.
            Output("TensorBoard", tensorboard.write, tensorboard.close, Exception, longest_rest=64),
            Output("standard output", self._print),
        ]
        console = Console(file=sys.stderr)
        self._progress = None
        if console.is_interactive:
            self._progress = _Bar(
                TextColumn(f"[bold]{title}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[epoch]}"),
                TimeRemainingColumn(),
                TextColumn("left"),
                console=console,
                speed_estimate_period=600,  # seconds; a step may take a minute
                redirect_stdout=sys.stdout.isatty(),  # what goes to a file is to get there
            )
            self._progress.start()
            self._task = self._progress.add_task(
                "steps", total=total_steps, completed=start_step, figures="", epoch=""
            )
        self._print_lines = self._progress is None or not sys.stdout.isatty()

    def advance(self, step: int) -> None:
        """Move the progress bar."""
        if self._progress is not None:
            self._progress.update(self._task, completed=step)

    def write(self, row: Row) -> None:
        """Append a row; `step` and `eta_seconds` are among its fields."""
        for output in self._outputs:
            output.write(row)
        if self._wandb is not None:
            self._wandb.write(scalars(row), row["step"])
        if self._progress is not None:
            figures, epoch = self._describe(row), f"epoch {row['epoch']}"
            self._progress.update(self._task, completed=row["step"], figures=figures, epoch=epoch)

    def _print(self, row: Row) -> None:
        if self._print_lines:
            left = timedelta(seconds=round(row["eta_seconds"]))
            print(
                f"step {row['step']}/{self.total_steps}, epoch {row['epoch']}: {self._describe(row)}, {left} left",
                flush=True,
            )

    def close(self) -> None:
        """Flush what is open. Waits for Weights & Biases to send what is left, at most `wandb_log.FINISH_SECONDS`."""
        if self._progress is not None:
            with contextlib.suppress(OSError):  # a terminal that is gone
                self._progress.stop()
        for output in self._outputs:
            output.close()
        if self._wandb is not None:
            self._wandb.close()


class Output:
    """Where rows go; a failure is told once and ends nothing.

    Args:
        name: what it is called in what is told.
        write: takes what `write` is given.
        close: ends it.
        errors: what counts as failure.
        longest_rest: rows for which it is not tried again after a failure, at most.
    """

    def __init__(
        self,
        name: str,
        write: Callable[[Any], None],
        close: Callable[[], None] = lambda: None,
        errors: type[Exception] = OSError,
        longest_rest: int = 0,
    ) -> None:
        self._name, self._write, self._close, self._errors = name, write, close, errors
        self._longest_rest = longest_rest
        self._num_lost = self._num_failures = self._rest = 0

    def write(self, row: Any, num_rows: int = 1) -> None:
        """Write a row, or num_rows of them at once, or count them as lost."""
        if self._rest > 0:
            self._rest -= 1
            self._num_lost += num_rows
            return
        try:
            self._write(row)
        except self._errors as error:
            if self._num_lost == 0:
                _warn(f"{self._name}: {error}; the run goes on, rows are lost until writing works again")
            self._num_lost += num_rows
            self._num_failures += 1
            self._rest = min(2**self._num_failures - 1, self._longest_rest)
            return
        self._tell_lost("works again")
        self._num_lost = self._num_failures = 0

    def close(self) -> None:
        """End it, and tell what is missing."""
        try:
            self._close()
        except self._errors as error:
            _warn(f"{self._name}: {error}; its last rows may be missing")
        self._tell_lost("ends")

    def _tell_lost(self, what: str) -> None:
        if self._num_lost > 0:
            rows = "1 row is" if self._num_lost == 1 else f"{self._num_lost} rows are"
            _warn(f"{self._name} {what}; {rows} missing in it")


class _Rows:
    """log.jsonl. A row is in it whole or not at all."""

    def __init__(self, path: Path, start_step: int) -> None:
        keep_rows_up_to(path, start_step)
        self._path = path

    def write(self, row: Row) -> None:
        line = (json.dumps(row) + "\n").encode()
        size = self._path.stat().st_size if self._path.exists() else 0
        try:
            with open(self._path, "ab") as file:
                file.write(line)
        except OSError:
            with contextlib.suppress(OSError):  # which would be told by what is raised
                os.truncate(self._path, size)
            raise


class _TensorBoard:
    """Event files. After a failure the next row begins a new one, as nothing is read behind an event that was cut."""

    def __init__(self, folder: Path, start_step: int) -> None:
        self._folder = folder
        self._writer: SummaryWriter | None = SummaryWriter(folder, purge_step=start_step + 1)

    def write(self, row: Row) -> None:
        writer, self._writer = self._writer, None
        if writer is None:
            writer = SummaryWriter(self._folder)
        for name, value in scalars(row).items():
            writer.add_scalar(name, value, row["step"])
        writer.flush()  # a thread writes; this is where its failure shows
        self._writer = writer

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


class _Bar(Progress):
    """A progress bar with the newest figures below it, as one line of a terminal is too short for both."""

    def get_renderables(self) -> Iterable[RenderableType]:
        yield self.make_tasks_table(self.tasks)
        for task in self.tasks:
            if task.fields["figures"]:
                yield Text(task.fields["figures"], overflow="ellipsis", no_wrap=True)


def keep_rows_up_to(path: Path, step: int) -> None:
    """Drop the rows of log.jsonl beyond a step, and lines that were cut off."""
    if not path.exists():
        return
    text = path.read_bytes().decode(errors="replace")
    rows = []
    for line in text.split("\n"):
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(row, dict) and row.get("step", step + 1) <= step:
            rows.append(line + "\n")
    kept = "".join(rows)
    if kept != text:
        write_atomically(path, kept.encode())


def _warn(text: str) -> None:
    with contextlib.suppress(OSError):  # there is nobody left to tell
        print(f"WARNING: {text}", file=sys.stderr, flush=True)
