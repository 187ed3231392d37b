"""Reproduce a table of the paper: train its variants, evaluate each, write the table beside the paper's figures.

    python -m tools.reproduce --table 1 --scale demo                       # minutes on two CPU cores, nothing needed
    python -m tools.reproduce --table 1 --data FOLDER                      # Kinetics-400, UCF101, HMDB51
    python -m tools.reproduce --table 4 --data FOLDER --checkpoint RUN     # one checkpoint through an evaluation

Tables 1 to 3 and Fig. 4 compare variants (`train.py --help` lists them); Tables 4 to 6 evaluate a checkpoint. Below
--data lie `k400-train` (shards), `ucf101`, `hmdb51`, `ESC-50` and `dcase`, as far as the table needs them. The demo
scale trains the same variants on a generated world of sounding objects, with several seeds.

Each step is a command of its own, printed before it runs; its output goes to OUT/SCALE/logs. The same command again
goes on where it stopped, and tries again what failed.
"""

from __future__ import annotations

import argparse
import ctypes
import dataclasses
import hashlib
import json
import multiprocessing.connection
import os
import shlex
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Literal

from cmac.evaluation.ablations import (
    FULL,
    SCRATCH,
    AblationTable,
    Figure,
    Measurements,
    summarize,
    to_json,
    to_markdown,
)
from cmac.evaluation.paper import TABLES
from cmac.evaluation.results import (
    MEAN_OF_THREE_SPLITS,
    Metric,
    Result,
    append_result,
    read_results,
    stamp,
)
from loaders.datasets import read_split
from shards.lock import take_lock
from shards.manifest import read_manifest, write_atomically
from shards.pool import usable_cores
from tools.results import render

ROOT = Path(__file__).resolve().parents[1]
DEMO_PRESET, PAPER_PRESET = "demo-ablation", "pretrain-k400-ablation"
TRAIN_VIDEOS, TEST_VIDEOS = 600, 480
"""Of the generated world. Half of them are easy; in nine of ten of those the sounding object is in view."""
PR_SET_PDEATHSIG = 1  # of <linux/prctl.h>
_LIBC = ctypes.CDLL(None)
LOG_LINES = 15
"""Of a failed step that are shown."""
ABLATIONS = ("1", "2", "3", "fig4")

DEMO_FIGURES = (
    Figure(name="probe_video", heading="video probe"),
    Figure(name="probe_audio_1shot", heading="audio probe, 1 label"),
    Figure(name="probe_audio", heading="audio probe"),
    Figure(name="category_video_r1", heading="same category R@1"),
    Figure(name="guided_prefers_sounding_easy", heading="guided prefers, easy"),
    Figure(name="guided_prefers_sounding_hard", heading="guided prefers, hard"),
    Figure(name="predicted_prefers_sounding_easy", heading="predicted prefers, easy"),
    Figure(name="predicted_prefers_sounding_hard", heading="predicted prefers, hard"),
    Figure(name="guided_pointing_easy", heading="guided points, easy"),
    Figure(name="guided_pointing_hard", heading="guided points, hard"),
    Figure(name="predicted_pointing_easy", heading="predicted points, easy"),
    Figure(name="predicted_pointing_hard", heading="predicted points, hard"),
    Figure(name="retrieval_v2a_r1", heading="R@1 v2a"),
    Figure(name="retrieval_a2v_r1", heading="R@1 a2v"),
)
"""What tools.evaluate_world measures, as columns."""
DEMO_JUDGED = {
    **{name: {"probe_video": 0, "probe_audio_1shot": 0} for name in ABLATIONS},
    "4": {"probe_video": 0},
    "5": {"category_video_r1": 0},
    "6": {"probe_audio_1shot": 1},
}
"""Table -> figures that put the paper's order to the test -> column of the paper's table whose order it is."""


@dataclass(frozen=True, kw_only=True)
class Step:
    """One command."""

    name: str
    """Unique; of its log and of the record that it is finished."""
    command: tuple[str, ...]
    after: tuple[str, ...] = ()
    """Steps that must be finished first."""
    outputs: tuple[Path, ...] = ()
    """What must be there when it is finished."""
    variant: str | None = None
    """Of the table; None for what all need."""
    environment: tuple[tuple[str, str], ...] = ()
    """Further variables."""

    def shown(self) -> str:
        """The command as one would type it from the project's folder."""
        variables = [f"{name}={shlex.quote(value)}" for name, value in self.environment]
        return " ".join([*variables, shlex.join(["python", *self.command[1:]])])


class Failed(Exception):
    """Something that a user can mend; its text says how."""


class Runner:
    """Runs steps, some at a time, and remembers those that are finished.

    Args:
        folder: holds `logs/NAME.log` and `steps/NAME.json`, the record of a finished step.
        jobs: steps at the same time.
    """

    def __init__(self, folder: Path, jobs: int = 1) -> None:
        self.folder = folder
        self.jobs = jobs
        self.ran: set[str] = set()
        """Names of steps that ran now and ended well."""

    def log(self, step: Step) -> Path:
        """File of a step's output."""
        return self.folder / "logs" / f"{step.name}.log"

    def is_finished(self, step: Step) -> bool:
        """Whether this very command ended well before, and what it made is still there."""
        try:
            record = json.loads((self.folder / "steps" / f"{step.name}.json").read_bytes())
        except (FileNotFoundError, json.JSONDecodeError):
            return False
        return record.get("command") == list(step.command) and all(path.exists() for path in step.outputs)

    def seconds(self, step: Step) -> float:
        """How long a finished step took; 0 for others."""
        if not self.is_finished(step):
            return 0.0
        return json.loads((self.folder / "steps" / f"{step.name}.json").read_bytes())["seconds"]

    def run(self, steps: Sequence[Step]) -> dict[str, str]:
        """Runs what is not finished. Returns {name: why} of the steps that failed or could not start for it.

        A failed step ends those that need it; all others go on. An interrupt or a plain kill ends the steps that run.
        """
        waiting = list(steps)
        finished: set[str] = set()
        failed: dict[str, str] = {}
        running: dict[str, tuple[Step, subprocess.Popen, float]] = {}
        previous = signal.signal(signal.SIGTERM, _interrupt)
        try:
            while waiting or running:
                before = len(waiting)
                for step in list(waiting):
                    broken = [name for name in step.after if name in failed]
                    if broken:
                        failed[step.name] = f"not started: it needs {broken[0]}, which failed"
                        waiting.remove(step)
                    elif len(running) < self.jobs and finished.issuperset(step.after):
                        waiting.remove(step)
                        if self.is_finished(step):
                            print(f"== {step.name}: finished earlier", flush=True)
                            finished.add(step.name)
                        else:
                            self._forget(step, steps)
                            running[step.name] = (step, self._start(step), time.monotonic())
                if not running:
                    assert len(waiting) < before, f"nothing can start: {[step.name for step in waiting]}"
                    continue
                _sleep_until_one_ends([process for _, process, _ in running.values()])
                for name, (step, process, started) in list(running.items()):
                    if process.poll() is None:
                        continue
                    del running[name]
                    seconds = time.monotonic() - started
                    why = self._end(step, process.returncode, seconds)
                    if why is None:
                        finished.add(name)
                        self.ran.add(name)
                        print(f"-- {name}: {seconds:.0f} s", flush=True)
                    else:
                        failed[name] = why
                        print(f"-- {name} FAILED after {seconds:.0f} s: {why}", flush=True)
        finally:
            for _, process, _ in running.values():
                process.terminate()
            for _, process, _ in running.values():
                process.wait()
            signal.signal(signal.SIGTERM, previous)
        return failed

    def _forget(self, step: Step, steps: Sequence[Step]) -> None:
        """Removes the records of a step and of all that follow from it: they are to be made anew."""
        names = {step.name}
        for other in steps:  # each stands behind those that it needs
            if names.intersection(other.after):
                names.add(other.name)
        for name in names:
            (self.folder / "steps" / f"{name}.json").unlink(missing_ok=True)

    def _start(self, step: Step) -> subprocess.Popen:
        print(f"== {step.name}\n$ {step.shown()}", flush=True)
        log = self.log(step)
        log.parent.mkdir(parents=True, exist_ok=True)
        with open(log, "a", encoding="utf-8") as file:  # what an earlier try said stays
            file.write(f"$ {step.shown()}\n")
            file.flush()
            return subprocess.Popen(
                step.command,
                cwd=ROOT,
                env={**os.environ, **dict(step.environment)},
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                preexec_fn=_end_with_parent,  # one thread, so nothing can hold a lock between fork and exec
            )

    def _end(self, step: Step, code: int, seconds: float) -> str | None:
        """Records a step that ended well; else what went wrong."""
        missing = [path for path in step.outputs if not path.exists()]
        if code == 0 and not missing:
            record = {"command": list(step.command), "seconds": round(seconds, 1)}
            path = self.folder / "steps" / f"{step.name}.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, (json.dumps(record, indent=2) + "\n").encode())
            return None
        ended = f"exit status {code}" if code >= 0 else f"ended by signal {-code}"
        if code == 0:
            ended = f"exit status 0, but {missing[0]} was not written"
        lines = self.log(step).read_text(encoding="utf-8", errors="replace").splitlines()[-LOG_LINES:]
        return "\n".join([f"{ended}; the end of {self.log(step)}:", *lines])


def _end_with_parent() -> None:
    """In a new process: be ended when the runner dies, even by SIGKILL, so that a second start finds no first one."""
    _LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def _sleep_until_one_ends(processes: Sequence[subprocess.Popen]) -> None:
    handles = [os.pidfd_open(process.pid) for process in processes]
    try:
        multiprocessing.connection.wait(handles)
    finally:
        for handle in handles:
            os.close(handle)


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Holds the folder for this process. Raises Failed when another one has it."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w") as file:
        if not take_lock(file, folder):
            raise Failed(
                f"{folder} is in use by another tools.reproduce; wait for it, or choose another --out"
            )
        yield


def relative(path: Path) -> str:
    """For commands: relative to the project's folder where it lies in it."""
    path = path.absolute()
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)


def scale_name(args: argparse.Namespace) -> str:
    """Name of the folder below --out: another world or length of training is another experiment."""
    sizes = (args.train_videos, args.test_videos, args.steps)
    if args.scale == "paper" or sizes == (TRAIN_VIDEOS, TEST_VIDEOS, None):
        return args.scale
    return "-".join([args.scale, *(str(size) for size in sizes if size is not None)])


def select_variants(table: str, rows: Sequence[str], only: Sequence[str]) -> list[str]:
    """The rows to work on, in the table's order. Raises Failed for one that it does not have."""
    unknown = [name for name in only if name not in rows]
    if unknown:
        raise Failed(f"table {table} has no variant {unknown[0]!r}, expected one of {', '.join(rows)}")
    return [name for name in rows if name in only] if only else list(rows)


# --- demo scale ---


def demo_steps(args: argparse.Namespace, variants: Sequence[str], folder: Path) -> list[Step]:
    """Everything from nothing to figures of each variant and seed, on one world."""
    world, shards = folder / "world", folder / "shards"
    python = sys.executable
    quiet = (("OMP_NUM_THREADS", "1"),)
    sizes = ("--train-videos", str(args.train_videos), "--test-videos", str(args.test_videos))
    steps = [
        Step(
            name="world",
            command=(python, "tools/make_world.py", "--out", relative(world), *sizes),
            outputs=(world / "train", world / "test"),
            environment=quiet,
        )
    ]
    for split, slots in (("train", "4"), ("test", "2")):
        steps.append(
            Step(
                name=f"shards-{split}",
                command=(
                    *(python, "tools/make_shards.py", "--preset", "veryfast", "--max-clips", slots),
                    *("--split", split, "--videos", relative(world / split)),
                    *("--out", relative(shards / split)),
                ),
                after=("world",),
                outputs=(shards / split / "manifest.json",),
                environment=quiet,
            )
        )
    where = (
        *("--world", relative(world), "--shards-train", relative(shards / "train")),
        *("--shards-test", relative(shards / "test")),
    )
    limit = ("--max-steps", str(args.steps)) if args.steps else ()
    for seed in range(args.seeds):
        for variant in variants:
            name = f"{variant}-seed{seed}"
            figures = folder / "figures" / f"{name}.json"
            after: tuple[str, ...] = ("shards-train", "shards-test")
            model: tuple[str, ...] = ("--untrained", DEMO_PRESET)
            if variant != SCRATCH:
                run = folder / "runs" / name
                preset = DEMO_PRESET if variant == FULL else f"{DEMO_PRESET}:{variant}"
                steps.append(
                    Step(
                        name=f"pretrain-{name}",
                        command=(
                            *(python, "train.py", preset, "--seed", str(seed), "--loader.seed", str(seed)),
                            *("--run-dir", relative(run), "--loader.shards", relative(shards / "train")),
                            *limit,
                        ),
                        after=after,
                        outputs=(run / "checkpoints",),
                        variant=variant,
                        environment=quiet,
                    )
                )
                after, model = (f"pretrain-{name}",), ("--run", relative(run))
            steps.append(
                Step(
                    name=f"evaluate-{name}",
                    command=(
                        *(python, "-m", "tools.evaluate_world", *model, "--seed", str(seed), *where),
                        *("--out", relative(figures)),
                    ),
                    after=after,
                    outputs=(figures,),
                    variant=variant,
                    environment=quiet,
                )
            )
    return steps


def demo_measurements(
    steps: Sequence[Step], runner: Runner, variants: Sequence[str], seeds: int
) -> Measurements:
    """Figures of all evaluations that are finished."""
    finished = {step.name: step for step in steps if runner.is_finished(step)}
    measured: dict[str, dict[int, dict[str, Metric]]] = {}
    for variant in variants:
        for seed in range(seeds):
            step = finished.get(f"evaluate-{variant}-seed{seed}")
            if step is None:
                continue
            figures = json.loads(step.outputs[0].read_bytes())["figures"]
            measured.setdefault(variant, {})[seed] = {
                name: Metric(value=figure["value"], chance=figure["chance"])
                for name, figure in figures.items()
                if figure["value"] is not None
            }
    return measured


# --- paper scale ---


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """One evaluation of a checkpoint on a dataset at the paper's scale."""

    tool: Literal["finetune", "retrieve", "classify_audio"]
    """Below `tools`."""
    dataset: str
    """As in `Result.dataset`."""
    folder: str
    """Below --data."""
    split: str
    """Of the result that counts, as in `Result.split`."""
    check: str
    """A split of the dataset that is looked for before anything starts."""
    preset: str = ""
    """Of tools.finetune."""

    def arguments(self, checkpoint: str, seed: int, alone: bool) -> list[str]:
        """Of `python`, but for folders. alone: without baselines beside the checkpoint, for tables of variants."""
        tool = ["-m", f"tools.{self.tool}"]
        if self.tool == "finetune":
            splits = ["1"] if self.split == "1" else ["1", "2", "3"]
            options = ["--checkpoint", checkpoint, "--splits", *splits, "--seed", str(seed)]
            return [*tool, self.preset, *options]
        options = [checkpoint, "--dataset", self.dataset, "--random-seed", str(seed)]
        if self.tool == "retrieve":
            options += ["--splits", self.split]
        elif alone:
            options += ["--random-networks", "0", "--no-log-mel"]
        return [*tool, *options]


ABLATION_EVALUATIONS = tuple(
    Evaluation(
        tool="finetune",
        dataset=name,
        folder=name,
        split="1",
        check="1",
        preset=f"finetune-{name}-ablation",
    )
    for name in ("ucf101", "hmdb51")
)
CHECKPOINT_EVALUATIONS = {
    "4": tuple(
        Evaluation(
            tool="finetune",
            dataset=name,
            folder=name,
            split=MEAN_OF_THREE_SPLITS,
            check="1",
            preset=f"finetune-{name}",
        )
        for name in ("ucf101", "hmdb51")
    ),
    "5": tuple(
        Evaluation(tool="retrieve", dataset=name, folder=name, split="1", check="1")
        for name in ("ucf101", "hmdb51")
    ),
    "6": tuple(
        Evaluation(tool="classify_audio", dataset=name, folder=folder, split=split, check=check)
        for name, folder, split, check in (
            ("esc50", "ESC-50", "folds 1-5", "1"),
            ("dcase2013", "dcase", "folds 1-5", "1"),
            ("dcase2014", "dcase", "test", "test"),
        )
    ),
}
"""What Tables 4 to 6 do to a checkpoint."""


def evaluations_of(table: str, datasets: Sequence[str] = ()) -> tuple[Evaluation, ...]:
    """What is done to each checkpoint of a table, on all of its datasets or on some.

    Raises:
        Failed: the table does not have one of them.
    """
    evaluations = ABLATION_EVALUATIONS if table in ABLATIONS else CHECKPOINT_EVALUATIONS[table]
    have = [evaluation.dataset for evaluation in evaluations]
    for name in datasets:
        if name not in have:
            raise Failed(f"table {table} has no dataset {name!r}, expected one of {', '.join(have)}")
    return tuple(evaluation for evaluation in evaluations if not datasets or evaluation.dataset in datasets)


def missing_inputs(data: Path, evaluations: Sequence[Evaluation], pretrain: bool) -> list[str]:
    """A line for everything below --data that is missing, with the way out."""
    lines = []
    if pretrain:
        shards = data / "k400-train"
        try:
            read_manifest(shards)
        except (ValueError, OSError) as error:
            lines.append(
                f"{error}; make the shards: python tools/make_shards.py --videos KINETICS/train --csv "
                f"kinetics400_train.csv --out {shards}"
            )
    for evaluation in evaluations:
        folder = data / evaluation.folder
        try:
            split = read_split(evaluation.dataset, folder, evaluation.check)
        except (ValueError, OSError) as error:
            lines.append(
                f"{evaluation.dataset}: {error}; put the dataset in its official layout (or a link to it) at {folder}, "
                "or leave it out: --dataset names those that are to be evaluated"
            )
            continue
        if split.missing:
            num_files = len(split.train) + len(split.test)
            print(
                f"note: {evaluation.dataset}: {len(split.missing)} of {num_files} listed files are missing below "
                f"{folder}, such as {split.missing[0]}; the evaluation will leave them out and count them",
                flush=True,
            )
    return lines


def evaluate_step(
    args: argparse.Namespace,
    folder: Path,
    evaluation: Evaluation,
    checkpoint: str,
    name: str,
    *,
    variant: str,
    seed: int = 0,
    after: tuple[str, ...] = (),
    alone: bool = True,
) -> Step:
    """The command that evaluates one checkpoint on one dataset, its result in a file of its own."""
    name = f"{evaluation.dataset}-{name}"
    results = folder / "results" / f"{name}.jsonl"
    return Step(
        name=name,
        command=(
            *(sys.executable, *evaluation.arguments(checkpoint, seed, alone)),
            *("--data", relative(args.data / evaluation.folder)),
            *("--out", relative(folder / "evaluation" / name), "--results", relative(results)),
        ),
        after=after,
        outputs=(results,),
        variant=variant,
    )


def paper_steps(args: argparse.Namespace, variants: Sequence[str], folder: Path) -> list[Step]:
    """Pretraining of each variant and seed as in section 4.3, and what the table measures of it."""
    steps = []
    shards = relative(args.data / "k400-train")
    launch = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", args.nproc)
    for seed in range(args.seeds):
        for variant in variants:
            evaluations = evaluations_of(args.table, args.dataset)
            if variant == SCRATCH and args.table in ABLATIONS:
                steps += [
                    evaluate_step(
                        args,
                        folder,
                        evaluation,
                        "scratch",
                        f"{variant}-seed{seed}",
                        variant=variant,
                        seed=seed,
                    )
                    for evaluation in evaluations
                ]
                continue
            trained = (
                FULL if variant == SCRATCH else variant
            )  # scratch: the full model's network, fresh weights
            run = folder / "runs" / f"{trained}-seed{seed}"
            preset = PAPER_PRESET if trained == FULL else f"{PAPER_PRESET}:{trained}"
            pretrain = Step(
                name=f"pretrain-{trained}-seed{seed}",
                command=(
                    *(*launch, "train.py", preset, "--seed", str(seed), "--loader.seed", str(seed)),
                    *("--run-dir", relative(run), "--loader.shards", shards),
                ),
                outputs=(run / "checkpoints",),
                variant=trained,
            )
            if pretrain.name not in {step.name for step in steps}:
                steps.append(pretrain)
            checkpoint = relative(run) if variant != SCRATCH else f"random:{relative(run)}"
            steps += [
                evaluate_step(
                    args,
                    folder,
                    evaluation,
                    checkpoint,
                    f"{variant}-seed{seed}",
                    variant=variant,
                    seed=seed,
                    after=(pretrain.name,),
                )
                for evaluation in evaluations
            ]
    return steps


def checkpoint_steps(args: argparse.Namespace, folder: Path) -> list[Step]:
    """Evaluations of the checkpoint that is given."""
    checkpoint = args.checkpoint if ":" in args.checkpoint else relative(Path(args.checkpoint))
    # Tables share datasets, and another checkpoint is another evaluation.
    name = f"table{args.table}-{hashlib.sha256(os.fsencode(checkpoint)).hexdigest()[:8]}"
    return [
        evaluate_step(args, folder, evaluation, checkpoint, name, variant=FULL, alone=False)
        for evaluation in evaluations_of(args.table, args.dataset)
    ]


def result_of(step: Step, evaluation: Evaluation) -> Result:
    """The newest result of an evaluation that is finished. Raises Failed when its file holds none."""
    results = [
        result
        for result in read_results(step.outputs[0])
        if result.dataset == evaluation.dataset and result.split == evaluation.split
    ]
    if not results:
        raise Failed(
            f"{step.outputs[0]} has no result of {evaluation.dataset}, split {evaluation.split}; remove it and run "
            "the same command again"
        )
    return results[-1]


def paper_figures(table: str) -> tuple[Figure, ...]:
    """Our columns at the paper's scale: the same as the paper's, each put to the test."""
    return tuple(
        Figure(name=f"{column.dataset} {column.metric}", heading=column.heading, paper_column=index)
        for index, column in enumerate(TABLES[table].columns)
    )


def paper_measurements(
    args: argparse.Namespace, steps: Sequence[Step], runner: Runner, variants: Sequence[str]
) -> Measurements:
    """The paper's columns, measured, of all evaluations that are finished."""
    finished = {step.name: step for step in steps if runner.is_finished(step)}
    measured: dict[str, dict[int, dict[str, Metric]]] = {}
    for variant in variants:
        for seed in range(args.seeds):
            for evaluation in evaluations_of(args.table, args.dataset):
                step = finished.get(f"{evaluation.dataset}-{variant}-seed{seed}")
                if step is None:
                    continue
                metrics = result_of(step, evaluation).metrics
                for column in TABLES[args.table].columns:
                    if column.dataset == evaluation.dataset and column.metric in metrics:
                        found = measured.setdefault(variant, {}).setdefault(seed, {})
                        found[f"{column.dataset} {column.metric}"] = metrics[column.metric]
    return measured


# --- the table ---


def failures_by_variant(
    steps: Sequence[Step], failed: Mapping[str, str], variants: Sequence[str]
) -> dict[str, str]:
    """Variant -> what went wrong with its steps; a failed step that belongs to no variant concerns all."""
    found: dict[str, list[str]] = {}
    for step in steps:
        if step.name in failed and not failed[step.name].startswith("not started"):
            concerned = variants if step.variant is None else [step.variant]
            for variant in concerned:
                found.setdefault(variant, []).append(f"{step.name}: {failed[step.name]}")
    for step in steps:  # scratch needs another variant's run
        if step.name in failed and step.variant is not None and step.variant not in found:
            found[step.variant] = [f"{step.name}: {failed[step.name]}"]
    return {variant: "\n".join(found[variant]) for variant in variants if variant in found}


def append_ablations(table: AblationTable, steps: Sequence[Step], runner: Runner, path: Path) -> None:
    """A line per variant and dataset for the file of results, of those that something was done for now."""
    changed = {step.variant for step in steps if step.name in runner.ran}
    everything = any(step.variant is None and step.name in runner.ran for step in steps)
    for variant, metrics in summarize(table.measured).items():
        if variant in table.failed or not (variant in changed or everything):
            continue
        by_dataset: dict[str, dict[str, Metric]] = {}
        if table.scale == "demo":
            by_dataset["world"] = metrics
        else:
            for name, metric in metrics.items():
                dataset, _, short = name.partition(" ")
                by_dataset.setdefault(dataset, {})[short] = metric
        seeds = sorted(table.measured[variant])
        for dataset, found in by_dataset.items():
            split = "test" if dataset == "world" else table.paper.split_of(dataset)
            append_result(
                path,
                Result(
                    task="ablation",
                    dataset=dataset,
                    split=split,
                    protocol=f"{table.scale} scale, {variant}, {len(seeds)} seed{'s' if len(seeds) > 1 else ''}",
                    checkpoint="random"
                    if variant == SCRATCH
                    else relative(runner.folder / "runs" / variant) + "-seed*",
                    checkpoint_digest=None,
                    config={"variant": variant, "table": table.table, "scale": table.scale, "seeds": seeds},
                    metrics=found,
                    **stamp(sum(runner.seconds(step) for step in steps if step.variant == variant)),
                ),
            )


def write_table(table: AblationTable, folder: Path) -> Path:
    """JSON and Markdown; returns the latter's path."""
    name = table.table if table.table == "fig4" else f"table{table.table}"
    record = to_json(table)
    write_atomically(folder / f"{name}.json", (json.dumps(record, indent=2, allow_nan=False) + "\n").encode())
    path = folder / f"{name}.md"
    write_atomically(path, to_markdown(table).encode())
    return path


def table_notes(args: argparse.Namespace) -> tuple[str, ...]:
    """What the table says about how it was made."""
    origin = stamp(0.0)
    shared = f"`{args.command}` at commit {origin['commit']}, {origin['hardware']}, {origin['time']}."
    if args.scale == "demo":
        return (
            shared,
            f"Generated world of {args.train_videos} training and {args.test_videos} held-out videos, "
            f"seeds 0 to {args.seeds - 1} (initial weights, order and augmentation of clips), preset `{DEMO_PRESET}`"
            + (f", {args.steps} steps." if args.steps else "."),
            "Not the paper's data and not its figures: only orders can be compared. Video probe: a linear classifier "
            "on frozen features, learnt on the training videos, names the category that sounds (easy part); audio "
            "probe: the same from sound, with all labels or with one labelled video per category. `scratch` is the "
            "network with fresh weights, not trained at all.",
        )
    return (
        shared,
        f"Pretraining: `{PAPER_PRESET}` on {relative(args.data / 'k400-train')}, seeds 0 to {args.seeds - 1}. "
        f"{TABLES[args.table].protocol}",
    )


def ablation_table(
    args: argparse.Namespace,
    steps: Sequence[Step] = (),
    runner: Runner | None = None,
    failed: Mapping[str, str] | None = None,
    variants: Sequence[str] = (),
) -> AblationTable:
    """The table with what is finished."""
    measured: Measurements = {}
    if args.scale == "demo":
        judged = DEMO_JUDGED[args.table]
        figures = tuple(
            dataclasses.replace(figure, paper_column=judged.get(figure.name)) for figure in DEMO_FIGURES
        )
        if runner is not None:
            measured = demo_measurements(steps, runner, variants, args.seeds)
    else:
        figures = paper_figures(args.table)
        if runner is not None:
            measured = paper_measurements(args, steps, runner, variants)
    return AblationTable(
        table=args.table,
        scale=args.scale,
        figures=figures,
        measured=measured,
        failed=failures_by_variant(steps, failed or {}, variants),
        notes=table_notes(args),
    )


def reproduce(args: argparse.Namespace) -> int:
    """Does it all; the exit status.

    Raises:
        Failed: something is missing, before anything was started.
    """
    folder = args.out.absolute() / scale_name(args)
    single = args.scale == "paper" and args.checkpoint is not None
    plan = demo_steps if args.scale == "demo" else paper_steps
    rows = [FULL] if single else list(dict.fromkeys(row.variant for row in ablation_table(args).rows()))
    variants = select_variants(args.table, rows, args.only)
    if args.scale == "paper":
        missing = missing_inputs(args.data, evaluations_of(args.table, args.dataset), pretrain=not single)
        if missing and not args.dry_run:
            raise Failed(
                "nothing was started, because this is missing:\n" + "\n".join(f"- {x}" for x in missing)
            )
        for line in missing:
            print(f"missing: {line}", flush=True)
    steps = checkpoint_steps(args, folder) if single else plan(args, variants, folder)
    if args.dry_run:
        for step in steps:
            print(f"# {step.name}\n{step.shown()}")
        return 0
    with locked(folder):
        started = time.monotonic()
        runner = Runner(folder, args.jobs)
        failed = runner.run(steps)
        if single:
            page = write_checkpoint_table(args, steps, runner, failed, folder)
        else:
            # What was left out now may have been finished earlier.
            table = ablation_table(args, plan(args, rows, folder), runner, failed, rows)
            page = write_table(table, folder)
            append_ablations(table, steps, runner, args.results)
    print(f"\n{page.read_text()}")
    counts = Counter("failed" if step.name in failed else "finished" for step in steps)
    done = ", ".join(f"{number} steps {what}" for what, number in counts.items())
    print(f"{done}, {(time.monotonic() - started) / 60:.1f} minutes; table: {page}")
    return 1 if failed else 0


def write_checkpoint_table(
    args: argparse.Namespace, steps: Sequence[Step], runner: Runner, failed: Mapping[str, str], folder: Path
) -> Path:
    """Results of one checkpoint beside all rows of the paper's table; appended to the file of results, too."""
    results, notes = [], []
    for step in steps:
        if step.name in failed:
            notes.append(f"{step.name} failed: {failed[step.name]}")
        elif runner.is_finished(step):
            own = read_results(step.outputs[0])
            results += own
            if step.name in runner.ran:
                for result in own:
                    append_result(args.results, result)
    path = folder / f"table{args.table}.md"
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(path, render(results, [args.table], notes).encode())
    record = [json.loads(result.to_json()) for result in results]
    write_atomically(path.with_suffix(".json"), (json.dumps(record, indent=2) + "\n").encode())
    return path


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line, checked as far as it can be without looking at files."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--table", required=True, choices=tuple(TABLES), help="of the paper, or fig4")
    parser.add_argument("--scale", choices=("paper", "demo"), default="paper", help="default: paper")
    parser.add_argument("--data", type=Path, help="folder of k400-train, ucf101, hmdb51, ESC-50, dcase")
    parser.add_argument("--checkpoint", help="what Tables 4 to 6 evaluate: a run folder or a file of weights")
    parser.add_argument(
        "--with-variants",
        action="store_true",
        help="Table 6: pretrain and evaluate the rows scratch, single-modality, baseline and full",
    )
    parser.add_argument("--only", action="append", default=[], metavar="VARIANT", help="may be repeated")
    parser.add_argument(
        "--dataset",
        action="append",
        default=[],
        metavar="NAME",
        help="paper scale: evaluate on this one alone; may be repeated (default: all of the table)",
    )
    parser.add_argument("--seeds", type=int, help="trainings of each variant (default: 1; demo: 3)")
    parser.add_argument("--out", type=Path, default=Path("runs/reproduce"), help="default: runs/reproduce")
    parser.add_argument(
        "--results", type=Path, default=Path("runs/results.jsonl"), help="gets a line per result"
    )
    parser.add_argument(
        "--jobs", type=int, help="steps at a time (default: 1; demo: as many as cores, at most 4)"
    )
    parser.add_argument("--nproc", help="paper scale: ranks of a pretraining (default: auto, one per GPU)")
    parser.add_argument("--steps", type=int, help="demo: optimization steps in place of the preset's")
    parser.add_argument("--train-videos", type=int, help=f"demo: of the world (default: {TRAIN_VIDEOS})")
    parser.add_argument("--test-videos", type=int, help=f"demo: of the world (default: {TEST_VIDEOS})")
    parser.add_argument("--dry-run", action="store_true", help="print all commands and run none")
    args = parser.parse_args(argv)
    demo = args.scale == "demo"
    other = ("data", "dataset", "nproc") if demo else ("steps", "train_videos", "test_videos")
    for name in other:
        if getattr(args, name):
            scale = "paper" if demo else "demo"
            parser.error(f"--{name.replace('_', '-')} is for --scale {scale}, the scale is {args.scale}")
    if args.checkpoint is not None and args.seeds is not None:
        parser.error(f"--seeds is {args.seeds} with --checkpoint: seeds are of trainings, and none is done")
    args.nproc = args.nproc or "auto"
    args.train_videos = TRAIN_VIDEOS if args.train_videos is None else args.train_videos
    args.test_videos = TEST_VIDEOS if args.test_videos is None else args.test_videos
    args.seeds = (3 if demo else 1) if args.seeds is None else args.seeds
    args.jobs = (min(4, usable_cores()) if demo else 1) if args.jobs is None else args.jobs
    for name in ("seeds", "jobs", "steps", "train_videos", "test_videos"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} is {getattr(args, name)}, expected at least 1")
    if not demo:
        if args.data is None:
            parser.error("--data is missing, expected the folder of the datasets; or use --scale demo")
        args.data = args.data.expanduser().absolute()
        if args.table in ABLATIONS and args.checkpoint is not None:
            parser.error(
                f"--checkpoint is for tables 4, 5 and 6; table {args.table} pretrains its variants itself"
            )
        if args.table not in ABLATIONS and args.checkpoint is None and not args.with_variants:
            parser.error(
                f"--checkpoint is missing: what table {args.table} evaluates, such as runs/pretrain-k400"
            )
        if args.with_variants and (args.table != "6" or args.checkpoint is not None):
            parser.error("--with-variants is for table 6, without --checkpoint")
    elif args.checkpoint is not None:
        parser.error("--checkpoint is for --scale paper; the demo trains what it evaluates")
    args.out, args.results = args.out.expanduser(), args.results.expanduser()
    args.command = shlex.join(["python", "-m", "tools.reproduce", *(sys.argv[1:] if argv is None else argv)])
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; 0 when every step ended well, 1 when one failed, 2 when nothing could be started."""
    args = parse(argv)
    try:
        return reproduce(args)
    except (Failed, ValueError, OSError) as error:
        print(f"reproduce: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("reproduce: interrupted; the same command goes on where it stopped", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
