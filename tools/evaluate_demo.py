"""Measure a finished run and write its report.

    python tools/evaluate_demo.py --run runs/demo --shards-test runs/demo/shards/test --world runs/demo/world

writes `metrics.json`, `report.html` and `attention_grid.png` into the run folder. With --world (the folder
that tools/make_world.py wrote) localisation is measured against its ground truth; without it, on anybody's
own videos, only retrieval is measured and the report shows the maps.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import sys
import time
from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from cmac.checkpoint import build_model, newest_checkpoint, read_checkpoint
from cmac.config import RunConfig
from cmac.evaluation.demo import Media, build_metrics, read_log, write_text
from cmac.evaluation.report import ReportContext, build_report, duration, figure_rows, percent
from cmac.evaluation.world import evaluate_world
from cmac.model import CMAC
from cmac.provenance import describe_hardware, git_commit
from loaders import build_loader
from loaders.batch import ClipBatch
from loaders.config import LoaderConfig
from loaders.decode import decode_frames, decode_waveform
from shards.manifest import Manifest, read_manifest, write_atomically
from shards.pool import usable_cores
from shards.progress import print_any_name
from shards.reader import ShardReader
from shards.schema import FRAMES_PER_CLIP, SAMPLE_RATE


class ClipMedia:
    """Frames and sound of single clips of a folder of shards, by key."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self._readers = [ShardReader(folder / entry.name) for entry in manifest.shards]
        self._places = {
            reader.key(position): (reader, position)
            for reader in self._readers
            for position in range(len(reader))
        }

    def __call__(self, key: str) -> Media:
        """The clip's frames at full size and its waveform."""
        reader, position = self._places[key]
        clip = reader.read(position)
        short_side = min(clip.info.frame_width, clip.info.frame_height)
        frames = decode_frames(clip.video, range(FRAMES_PER_CLIP), short_side, key=key, shard=clip.shard)
        waveform = decode_waveform(clip.audio, key=key, shard=clip.shard)
        return Media(frames=frames, waveform=waveform, sample_rate=SAMPLE_RATE)

    def close(self) -> None:
        """Close the shards."""
        for reader in self._readers:
            reader.close()


def evaluation_loader_config(
    config: LoaderConfig, shards: Path, batch_size: int, num_workers: int
) -> LoaderConfig:
    """The run's loader without shuffling and augmentation, over other shards."""
    return dataclasses.replace(
        config,
        shards=str(shards),
        global_batch_size=batch_size,
        num_workers=num_workers,
        prefetch_batches=max(2, 2 * num_workers),
        drop_last=False,
        shuffle=False,
        clips_per_video=1,
        backend="portable",  # whatever the run was trained with: these are shards, and this may be another machine
        video=dataclasses.replace(config.video, augment=False),
        audio=dataclasses.replace(config.audio, augment=False),
    )


def read_slots(config: LoaderConfig, num_slots: int) -> Iterator[ClipBatch]:
    """Batches of all slots, one epoch each."""
    loader = build_loader(config, 0, 1)
    try:
        for _ in range(num_slots):
            yield from loader
    finally:
        loader.close()


def load_models(run: Path, seed: int, device: torch.device) -> tuple[CMAC, CMAC, RunConfig, dict]:
    """(trained, untrained, configuration, {step, commit}) of a run's newest checkpoint."""
    state = read_checkpoint(newest_checkpoint(run))
    config = state["config"]
    trained = build_model(config)
    trained.load_state_dict(state["model"])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        untrained = build_model(config)
    origin = {"step": state["step"], "commit": state.get("commit")}
    return trained.to(device).eval(), untrained.to(device).eval(), config, origin


def describe_run(
    config: RunConfig,
    model: CMAC,
    origin: dict,
    manifest: Manifest,
    metrics: dict,
    command: str,
    seconds: float,
) -> list[tuple[str, str]]:
    """What the report says was run."""
    video, counts = config.loader.video, model.parameter_counts()
    optimizer = config.optimizer
    batch = config.loader.global_batch_size
    commit = origin["commit"] or "unknown"
    if metrics["commit"] not in (None, commit):
        commit += f" (trained), {metrics['commit']} (evaluated)"
    return [
        ("Command", command),
        ("Commit", commit),
        (
            "Training",
            f"{origin['step']:,} steps of {batch} clips in {duration(metrics['train_seconds'])}, "
            f"{optimizer.name} at {optimizer.learning_rate:g} ({optimizer.schedule}), "
            f"consistency weight {config.loss.consistency_weight:g}",
        ),
        (
            "Network",
            f"{sum(counts.values()) / 1e6:.2f} M parameters (video encoder "
            f"{counts['video encoder'] / 1e6:.2f} M, audio encoder {counts['audio encoder'] / 1e6:.2f} M), "
            f"queue of {config.model.queue_length:,}",
        ),
        (
            "Input",
            f"{video.num_frames} frames of {video.crop_size}x{video.crop_size} pixels and "
            f"{config.loader.audio.num_mel_bins} mel bands of the same second",
        ),
        (
            "Evaluated on",
            f"{metrics['num_clips_read']:,} clips of {manifest.num_videos:,} videos "
            f"(split {manifest.split!r})",
        ),
        ("Hardware", f"{describe_hardware()} (where it was evaluated)"),
        ("Software", f"torch {torch.__version__}, Python {sys.version.split()[0]}"),
        ("Seeds", f"training {config.seed}; one run"),
        ("Evaluation took", duration(seconds)),
    ]


def print_table(console: Console, metrics: dict) -> None:
    """The figures beside chance."""
    which = "the training clips" if metrics["evaluated_on_training_clips"] else "clips that were kept apart"
    table = Table(title=f"Figures on {which}")
    for name in ("figure", "trained", "95 % interval", "chance", "center", "untrained", "clips"):
        table.add_column(name, justify="left" if name == "figure" else "right")
    for row in figure_rows(metrics):
        if row.key.endswith(("_r5", "_r10")) or "band_share" in row.key:
            continue
        figure = row.figure
        low, high = figure["interval"]
        table.add_row(
            row.key,
            f"[bold]{percent(figure['value'])}[/]",
            f"{percent(low)} .. {percent(high)}",
            percent(figure["chance"]),
            percent(figure.get("center")),
            percent(figure["untrained"]),
            str(figure["num_clips"]),
        )
    console.print(table)


def evaluate(args: argparse.Namespace) -> Path:
    """Does it all; returns the report's path."""
    started = time.monotonic()
    console = Console(width=None if sys.stdout.isatty() else 120)
    device = torch.device("cuda" if torch.cuda.is_available() and args.device != "cpu" else "cpu")
    trained, untrained, config, origin = load_models(args.run, args.seed, device)
    manifest = read_manifest(args.shards_test)
    loader_config = evaluation_loader_config(config.loader, args.shards_test, args.batch_size, args.workers)
    # Closed here, so that the loader's processes end also when not all slots are needed.
    with contextlib.closing(read_slots(loader_config, manifest.num_slots)) as batches:
        evaluation = evaluate_world(
            trained,
            untrained,
            batches,
            config.loader.audio,
            world=args.world,
            num_retrieval_clips=args.retrieval_clips,
            device=device,
            seed=args.seed,
        )
    rows = read_log(args.run / "log.jsonl")
    metrics = build_metrics(
        evaluation,
        rows,
        kind="world" if args.world is not None else "videos",
        training_clips=manifest.split == "train",
        commit=git_commit(),
    )
    write_text(args.run / "metrics.json", json.dumps(metrics, indent=2, allow_nan=False) + "\n")
    seconds = time.monotonic() - started
    command = args.command or "not recorded"
    context = ReportContext(
        title=f"CMAC: {args.run.name}",
        date=datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        facts=describe_run(config, trained, origin, manifest, metrics, command, seconds),
        training_clips=metrics["evaluated_on_training_clips"],
        has_truth=args.world is not None,
    )
    media = ClipMedia(args.shards_test, manifest)
    try:
        page, grid = build_report(evaluation, metrics, rows, context, config.loader.audio, media)
    finally:
        media.close()
    report = args.run / "report.html"
    write_atomically(args.run / "attention_grid.png", grid)
    write_text(report, page)
    print_table(console, metrics)
    console.print(
        f"training took {duration(metrics['train_seconds'])}, "
        f"evaluation {duration(time.monotonic() - started)}; figures: {args.run / 'metrics.json'}",
        soft_wrap=True,
        markup=False,
    )
    console.print(f"report: [bold]{escape(str(report))}[/]", soft_wrap=True)
    return report


def main(argv: list[str] | None = None) -> int:
    """Command line; 0 when the report was written."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--run", type=Path, required=True, help="folder of a run (holds checkpoints/)")
    parser.add_argument("--shards-test", type=Path, required=True, help="folder of shards to evaluate on")
    parser.add_argument("--world", type=Path, help="folder that make_world wrote, for ground truth")
    parser.add_argument(
        "--retrieval-clips", type=int, default=256, help="clips among which to retrieve (default: 256)"
    )
    parser.add_argument("--batch-size", type=int, default=32, help="clips per batch (default: 32)")
    parser.add_argument(
        "--workers",
        type=int,
        default=min(2, usable_cores()),
        help="processes that decode clips; 0: this one (default: 2)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the untrained network and of the intervals")
    parser.add_argument(
        "--device", choices=("auto", "cpu"), default="auto", help="auto takes a GPU where there is one"
    )
    parser.add_argument("--command", help="what was typed, for the report")
    args = parser.parse_args(argv)
    print_any_name()
    try:
        evaluate(args)
    except ValueError as error:
        print(f"evaluate_demo: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
