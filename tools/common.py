"""What the evaluation commands share: their arguments, the encoders they ask for, and how a result is shown."""

import argparse
import sys
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

import cmac
from cmac.evaluation.results import Metric, Result, append_result
from cmac.weights import Encoders
from loaders.batch import BadClipRecord
from shards.pool import usable_cores
from shards.progress import print_any_name

RANDOM = "random:"
"""In front of a checkpoint: the same network with fresh weights."""


def add_common_arguments(
    parser: argparse.ArgumentParser, *, data: bool = True, checkpoint: bool = True
) -> None:
    """Arguments that mean the same to every evaluation.

    Args:
        parser: gets them.
        data: whether the command reads a data set in its official layout.
        checkpoint: whether it evaluates weights.
    """
    if checkpoint:
        parser.add_argument(
            "checkpoint",
            help="run folder, checkpoint, exported folder, or a file of GDT, XDC or torchvision; random:PATH is the "
            "same network with fresh weights",
        )
        parser.add_argument("--random-seed", type=int, default=0, help="of fresh weights (default: 0)")
    if data:
        parser.add_argument(
            "--data", type=Path, required=True, help="folder of the data set, official layout"
        )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("runs/evaluation"),
        help="folder for what lets a killed evaluation go on (default: runs/evaluation)",
    )
    parser.add_argument(
        "--results",
        type=Path,
        default=Path("runs/results.jsonl"),
        help="file that gets a line with the result (default: runs/results.jsonl)",
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: auto")
    parser.add_argument(
        "--workers",
        type=int,
        default=min(8, usable_cores()),
        help="processes that decode; 0: this one (default: one per core, at most 8)",
    )
    parser.add_argument("--batch-size", type=int, default=20, help="clips per batch (default: 20)")


def choose_device(args: argparse.Namespace) -> torch.device:
    """The device that --device asks for.

    Raises:
        ValueError: CUDA is asked for and missing.
    """
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device is 'cuda' but torch sees no CUDA device; use --device cpu or auto")
    cuda = args.device != "cpu" and torch.cuda.is_available()
    if not cuda:
        torch.set_num_threads(usable_cores())
    return torch.device("cuda" if cuda else "cpu")


def open_encoders(args: argparse.Namespace) -> Encoders:
    """The encoders that the positional argument names, on the device, in evaluation mode.

    Raises:
        ValueError: there is no such file, or it holds no encoders.
    """
    name: str = args.checkpoint
    if name.startswith(RANDOM):
        return random_encoders(args, name.removeprefix(RANDOM))
    return cmac.load(name, choose_device(args))


def random_encoders(args: argparse.Namespace, path: str | None = None) -> Encoders:
    """The same network as the checkpoint's (or `path`'s) with fresh weights of --random-seed."""
    path = path or args.checkpoint.removeprefix(RANDOM)
    return cmac.load(path, choose_device(args), random_seed=args.random_seed)


def count_skipped(skipped: Iterable[tuple[str, str]], bad: Iterable[BadClipRecord] = ()) -> dict[str, int]:
    """Result.counts of what could not be used: `skipped REASON` files and `bad clips REASON`.

    Args:
        skipped: (file, reason), e.g. `ListedLoader.skipped`.
        bad: clips, e.g. `Features.bad`.
    """
    counts = Counter(f"skipped {reason}" for _, reason in skipped)
    counts.update(f"bad clips {record.reason}" for record in bad)
    return dict(sorted(counts.items()))


def say(line: str) -> None:
    """Print a line at once."""
    print(line, flush=True)


def report(console: Console, result: Result, path: Path) -> None:
    """Append a result to the file of results and show it."""
    append_result(path, result)
    title = f"{result.task}: {result.dataset}, split {result.split} ({result.protocol})"
    table = Table(title=escape(title), title_justify="left")
    for name in ("metric", "value", "interval", "chance", "each"):
        table.add_column(name, justify="left" if name == "metric" else "right")
    for name, metric in result.metrics.items():
        table.add_row(name, *_cells(metric))
    console.print(table)
    counts = ", ".join(f"{name}: {count}" for name, count in result.counts.items())
    text = f"{result.checkpoint} ({result.checkpoint_digest or 'no weights'}); {counts}"
    console.print(text, soft_wrap=True, markup=False)
    console.print(f"added to {path}", soft_wrap=True, markup=False)


def _cells(metric: Metric) -> tuple[str, str, str, str]:
    def percent(value: float | None) -> str:
        return "" if value is None else f"{100 * value:.1f} %"

    interval = "" if metric.interval is None else " .. ".join(percent(edge) for edge in metric.interval)
    each = "" if metric.per_fold is None else " ".join(f"{100 * value:.1f}" for value in metric.per_fold)
    return f"[bold]{percent(metric.value)}[/]", interval, percent(metric.chance), each


def fail(command: str, error: Exception) -> int:
    """Print what is wrong; the exit status."""
    print(f"{command}: {error}", file=sys.stderr)
    return 1


def run(command: str, evaluate: Callable[[], object]) -> int:
    """Do what a command is for; its exit status. What its user can mend is told in a line."""
    print_any_name()
    try:
        evaluate()
    except (ValueError, OSError) as error:
        return fail(command, error)
    return 0
