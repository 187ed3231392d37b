"""Rows in Weights & Biases, where a project is named. Whatever goes wrong there, the run goes on without it."""

import contextlib
import importlib.util
import secrets
import sys
from pathlib import Path
from typing import Any

from shards.manifest import write_atomically

STEP = "step"
"""What charts have as their x axis."""
INIT_SECONDS = 60.0
"""How long the start of a run may wait for the server, or on a terminal for the key that is missing."""
FINISH_SECONDS = 30.0
"""How long its end may. What is not sent by then lies below the run's folder, for `wandb sync`."""


def check_wandb(project: str) -> None:
    """Raises ValueError if a project is named and Weights & Biases is not installed."""
    if not project:
        return
    # A folder of that name, which W&B itself makes where it is run, is found as well, but has no origin.
    found = importlib.util.find_spec("wandb")
    if found is None or found.origin is None:
        raise ValueError(
            f"wandb_project is {project!r}, but Weights & Biases is not installed; pip install cmac[wandb], or leave "
            "wandb_project out"
        )


class WandbLog:
    """A run of Weights & Biases. After a first failure nothing more is sent, which is said once.

    The server, the key and offline mode are the environment's (WANDB_BASE_URL, WANDB_API_KEY, WANDB_MODE). Nothing of
    the machine's source code is sent.

    Args:
        project: it belongs to.
        run_dir: the run's folder. Its file wandb_id holds the run's id, so that a run that goes on is the same one
            there; W&B's own files lie below it, in wandb/.
        config: what is shown as configuration.
    """

    def __init__(self, project: str, run_dir: Path, config: dict[str, Any]) -> None:
        self._run = None
        self._next = 0  # W&B's own number of the next row
        try:
            import wandb

            # Without a key W&B asks for one on a terminal, and would wait for ever.
            wandb.setup(wandb.Settings(login_timeout=INIT_SECONDS))
            run = wandb.init(
                project=project,
                id=_run_id(run_dir / "wandb_id"),
                name=run_dir.name,
                dir=run_dir,
                config=config,
                resume="allow",
                allow_val_change=True,  # a run may go on with other settings
                settings=wandb.Settings(
                    console="off",  # would stand between the progress bar and the terminal
                    silent=True,
                    disable_git=True,
                    disable_code=True,
                    init_timeout=INIT_SECONDS,
                    finish_timeout=FINISH_SECONDS,
                ),
            )
            self._next = run.starting_step
            run.define_metric(STEP)
            run.define_metric("*", step_metric=STEP)
            self._run = run
        except Exception as error:  # of whatever kind: not worth a training
            self._give_up(error)

    def write(self, values: dict[str, float], step: int) -> None:
        """Send figures of a step. Those of a step that is taken again, after a resume from an earlier one, stand beside
        the ones before: W&B drops rows whose own number goes back, so that one only grows, and charts go by STEP."""
        if self._run is None:
            return
        number = max(step, self._next)
        self._next = number + 1
        try:
            self._run.log({STEP: step, **values}, step=number, commit=True)
        except Exception as error:
            self._give_up(error)

    def close(self) -> None:
        """Send what is left, for at most FINISH_SECONDS."""
        if self._run is None:
            return
        try:
            self._run.finish()
        except Exception as error:
            self._give_up(error)
        self._run = None

    def _give_up(self, error: Exception) -> None:
        self._run = None
        with contextlib.suppress(OSError):
            print(
                f"WARNING: Weights & Biases: {type(error).__name__}: {error}; the run goes on without it, its rows "
                "are in log.jsonl",
                file=sys.stderr,
                flush=True,
            )


def _run_id(path: Path) -> str:
    if path.exists():
        return path.read_text(encoding="utf-8").strip()
    run_id = secrets.token_hex(8)
    write_atomically(path, f"{run_id}\n".encode())
    return run_id
