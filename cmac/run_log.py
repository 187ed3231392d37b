"""Where a run's figures go: log.jsonl, TensorBoard and the terminal."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch.utils.tensorboard import SummaryWriter

from shards.manifest import write_atomically

Row = dict[str, float | int | None]


def pretraining_figures(row: Row) -> str:
    """A row of pretraining in words."""
    return (
        f"loss {row['loss']:.3f} (contrastive {row['loss_contrastive']:.3f}, "
        f"consistency {row['loss_consistency']:.4f}), {row['clips_per_second']:.1f} clips/s, "
        f"waiting for data {row['data_wait_fraction']:.0%}, bad clips {row['bad_clips']}"
    )


class RunLog:
    """Writes one row per logging step. On a terminal a progress bar with the remaining time, else plain lines.

    Args:
        run_dir: the run's folder.
        total_steps: steps of the whole run.
        start_step: steps already done; rows beyond it, left by a run that was killed, are removed.
        title: what the progress bar is called.
        describe: a row in words.
    """

    def __init__(
        self,
        run_dir: Path,
        total_steps: int,
        start_step: int,
        *,
        title: str = "pretraining",
        describe: Callable[[Row], str] = pretraining_figures,
    ) -> None:
        self.path = run_dir / "log.jsonl"
        self.total_steps = total_steps
        self._describe = describe
        keep_rows_up_to(self.path, start_step)
        self._tensorboard = SummaryWriter(run_dir / "tb", purge_step=start_step + 1)
        console = Console(file=sys.stderr)
        self._progress = None
        if console.is_terminal:
            self._progress = Progress(
                TextColumn(f"[bold]{title}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[figures]}"),
                TimeRemainingColumn(),
                console=console,
            )
            self._progress.start()
            self._task = self._progress.add_task("steps", total=total_steps, completed=start_step, figures="")

    def advance(self, step: int) -> None:
        """Move the progress bar."""
        if self._progress is not None:
            self._progress.update(self._task, completed=step)

    def write(self, row: Row) -> None:
        """Append a row; `step` and `eta_seconds` are among its fields."""
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        for name, value in row.items():
            if name != "step" and isinstance(value, int | float):
                self._tensorboard.add_scalar(name, value, row["step"])
        figures = self._describe(row)
        if self._progress is not None:
            self._progress.update(self._task, completed=row["step"], figures=figures)
        else:
            minutes, seconds = divmod(round(row["eta_seconds"]), 60)
            print(
                f"step {row['step']}/{self.total_steps}: {figures}, {minutes}:{seconds:02d} left", flush=True
            )

    def close(self) -> None:
        """Flush what is open."""
        if self._progress is not None:
            self._progress.stop()
        self._tensorboard.close()


def keep_rows_up_to(path: Path, step: int) -> None:
    """Drop the rows of log.jsonl beyond a step, and a last line that was cut off."""
    if not path.exists():
        return
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        if row["step"] <= step:
            rows.append(line + "\n")
    write_atomically(path, "".join(rows).encode())
