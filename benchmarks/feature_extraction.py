"""Clips per second of feature extraction, as evaluations do it, beside the bare loader's on the same files.

    python benchmarks/feature_extraction.py [--videos FOLDER] [--sampling video] [--checkpoint RUN] [--rounds 5]

Three contenders, in turn, round after round:

- loader: `loaders.listed.ListedLoader` alone; its batches are dropped;
- encoder: the encoder alone, on one batch that is on the device already, as often as there are batches;
- extraction: both, and the store: `cmac.evaluation.features.extract_features` into an empty folder.

The ceiling is the slower of the first two; on a CPU, where both need the same cores, also what these can do in all:
cores / (CPU seconds per clip of the loader + of the encoder). A turn reads all files once and begins with starting the
workers, for loader and extraction alike; the time to the first batch is given apart, and the rate from there on. The
index of the files is made before.

Without --videos: those of UCF101 that CMAC_DATA (default ../shared/data) holds, or synthetic ones.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import cmac
from benchmarks.common import (
    ROOT,
    append_row,
    make_row,
    peak_memory_bytes,
    quantiles,
    usable_cores,
)
from benchmarks.contenders.material import synthetic_videos
from benchmarks.process_tree import tree_usage
from benchmarks.timing import WrongResult, clean_up, ratios, synchronize
from cmac.encoders import AudioEncoderConfig, AudioResNet, R2Plus1D, VideoEncoderConfig
from cmac.evaluation.features import extract_features
from loaders.batch import ClipBatch
from loaders.config import AudioConfig, VideoConfig
from loaders.listed import ClipSampling, ListedLoader, listed_config
from loaders.video_ops import normalize_frames
from shards.sources import SourceVideo, videos_of_folder

SAMPLINGS = {
    "video": ClipSampling(needs="video"),
    "video 3 crops": ClipSampling(needs="video", num_crops=3),
    "audio": ClipSampling(needs="audio", clip_seconds=2.0),
    "both": ClipSampling(needs="both", clip_seconds=1.0),
}
"""What evaluations read: 10 clips of 32 frames (action recognition, retrieval; GDT takes 3 crops), 10 of 2 s of sound
(ESC-50), 10 of 1 s of both (cross-modal retrieval)."""

Encode = Callable[[ClipBatch], dict[str, Tensor]]


@dataclass(frozen=True, kw_only=True)
class Turn:
    """One contender's reading of all files."""

    num_clips: int
    seconds: float
    first_batch_seconds: float | None
    """From the start; None where nothing is loaded."""
    first_batch_clips: int
    cpu_seconds: float
    encode_seconds: float
    """Of `seconds`, spent in the encoder."""
    num_bad: int

    @property
    def clips_per_second(self) -> float:
        return self.num_clips / self.seconds

    @property
    def steady(self) -> float | None:
        """Clips per second after the first batch; None without a second one."""
        if self.first_batch_seconds is None or self.num_clips == self.first_batch_clips:
            return None
        return (self.num_clips - self.first_batch_clips) / (self.seconds - self.first_batch_seconds)


class Watched:
    """A loader that notes when its first batch came."""

    def __init__(self, loader: ListedLoader) -> None:
        self._loader = loader
        self.began = time.perf_counter()
        self.first_batch_seconds: float | None = None
        self.first_batch_clips = 0
        self.num_clips = 0

    def __iter__(self) -> Iterator[ClipBatch]:
        for batch in self._loader:
            count = int(batch.valid.sum())
            if self.first_batch_seconds is None:
                self.first_batch_seconds = time.perf_counter() - self.began
                self.first_batch_clips = count
            self.num_clips += count
            yield batch

    def __len__(self) -> int:
        return len(self._loader)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)


def cpu_seconds() -> float:
    """CPU time of this process and of all below it: workers are not its own children."""
    return tree_usage(os.getpid()).cpu_seconds


class Bench:
    """What all contenders share: files, loader, encoder."""

    def __init__(self, args: argparse.Namespace, folder: Path, scratch: Path) -> None:
        self.args = args
        self.folder = folder
        self.scratch = scratch
        self.device = torch.device(args.device)
        self.sampling = SAMPLINGS[args.sampling]
        if args.clips is not None:
            self.sampling = replace(self.sampling, clips_per_file=args.clips)
        self.files: list[SourceVideo] = videos_of_folder(str(folder))[: args.max_videos]
        self.encode, self.network, video, audio = build_encode(args, self.device, self.sampling)
        self.config = listed_config(
            str(folder),
            video=video,
            audio=audio,
            batch_size=args.batch_size,
            num_workers=args.workers,
        )
        self._kept: ClipBatch | None = None
        self._repeats = 0
        self._num_clips = 0
        self._num_stores = 0

    def open(self) -> ListedLoader:
        """A loader with workers of its own, which have not begun."""
        return ListedLoader(
            self.config,
            self.files,
            self.sampling,
            folder=str(self.folder),
            pin_memory=self.device.type == "cuda",
            cache=str(self.scratch / "index"),
        )

    def loader(self) -> Turn:
        """The loader alone."""
        turn = self._read(lambda watched: sum(1 for _ in watched))
        self._num_clips = turn.num_clips
        return turn

    def extraction(self) -> Turn:
        """extract_features, from the loader's start to the last row in the store."""
        self._num_stores += 1
        store = self.scratch / f"store-{self._num_stores}"
        spent = [0.0]

        def encode(batch: ClipBatch) -> dict[str, Tensor]:
            began = time.perf_counter()
            result = self.encode(batch)
            synchronize(self.device)
            spent[0] += time.perf_counter() - began
            return result

        rows: list[int] = []

        def extract(watched: Watched) -> None:
            features = extract_features(watched, encode, store, {"benchmark": self._num_stores})
            rows.append(len(features.video_ids))

        turn = self._read(extract, spent)
        if rows != [turn.num_clips]:
            raise WrongResult(f"{rows[0]} rows of features of {turn.num_clips} clips, expected one of each")
        return turn

    def encoder(self) -> Turn:
        """The encoder alone, on a batch that is in the device's memory."""
        if self._kept is None:
            loader = self.open()
            try:
                batch = next(iter(loader))
                # Copies: what a loader hands out may lie in memory that ends with it.
                batch = replace(batch, frames=batch.frames.clone(), log_mel=batch.log_mel.clone())
                self._kept = batch.to(self.device)
                self._repeats = len(loader)
            finally:
                loader.close()
        batch = self._kept
        cpu, began = cpu_seconds(), time.perf_counter()
        for _ in range(self._repeats):
            self.encode(batch)
        synchronize(self.device)
        seconds = time.perf_counter() - began
        return Turn(
            num_clips=self._num_clips,  # padding of the last batch is computed and does not count, as in extraction
            seconds=seconds,
            first_batch_seconds=None,
            first_batch_clips=0,
            cpu_seconds=cpu_seconds() - cpu,
            encode_seconds=seconds,
            num_bad=0,
        )

    def _read(self, use: Callable[[Watched], Any], spent: Sequence[float] = (0.0,)) -> Turn:
        loader = self.open()
        cpu = cpu_seconds()
        watched = Watched(loader)
        try:
            use(watched)
            synchronize(self.device)
            seconds = time.perf_counter() - watched.began
            cpu = cpu_seconds() - cpu
        finally:
            loader.close()
        return Turn(
            num_clips=watched.num_clips,
            seconds=seconds,
            first_batch_seconds=watched.first_batch_seconds,
            first_batch_clips=watched.first_batch_clips,
            cpu_seconds=cpu,
            encode_seconds=spent[0],
            num_bad=sum(loader.bad_clips.values()),
        )


def build_encode(
    args: argparse.Namespace, device: torch.device, sampling: ClipSampling
) -> tuple[Encode, str, VideoConfig, AudioConfig]:
    """(what extracts pooled features, which network, its frames, its log-mel). Weights are fresh without a checkpoint:
    they change nothing about time."""
    torch.manual_seed(0)
    if args.checkpoint is not None:
        encoders = cmac.load(args.checkpoint, device)
        video, audio = encoders.video, encoders.audio
        video_config, audio_config, network = encoders.video_config, encoders.audio_config, encoders.source
    else:
        tiny = {"widths": (8, 16), "blocks": (1, 1)} if args.tiny else {}
        video = R2Plus1D(VideoEncoderConfig(**tiny, **({"stem_width": 5} if args.tiny else {})))
        audio = AudioResNet(AudioEncoderConfig(**tiny))
        video, audio = video.to(device).eval(), audio.to(device).eval()
        video_config = VideoConfig(num_frames=8, short_side=36, crop_size=32) if args.tiny else VideoConfig()
        audio_config = AudioConfig()
        network = "tiny" if args.tiny else "R(2+1)D-18, ResNet-9"

    @torch.no_grad()
    def encode(batch: ClipBatch) -> dict[str, Tensor]:
        features = {}
        if sampling.needs != "audio":
            frames = normalize_frames(
                batch.frames.to(device, non_blocking=True), video_config.mean, video_config.std
            )
            features["video"] = video(frames).mean(dim=(2, 3, 4))
        if sampling.needs != "video":
            features["audio"] = audio(batch.log_mel.to(device, non_blocking=True)).mean(dim=(2, 3))
        return features

    return encode, network, video_config, audio_config


def summary(turns: Sequence[Turn]) -> dict[str, Any]:
    """What the row holds of a contender."""
    steady = [turn.steady for turn in turns if turn.steady is not None]
    first = [turn.first_batch_seconds for turn in turns if turn.first_batch_seconds is not None]
    return {
        "clips_per_second": quantiles([turn.clips_per_second for turn in turns]),
        "steady_clips_per_second": quantiles(steady) if steady else None,
        "first_batch_seconds": quantiles(first)["median"] if first else None,
        "cpu_seconds_per_clip": quantiles([turn.cpu_seconds / turn.num_clips for turn in turns])["median"],
        "encode_share": quantiles([turn.encode_seconds / turn.seconds for turn in turns])["median"],
        "num_clips": turns[0].num_clips,
        "num_bad": turns[0].num_bad,
        "repeats": len(turns),
    }


def find_ceiling(results: dict[str, dict[str, Any]], device: torch.device) -> dict[str, Any]:
    """Clips per second that extraction can reach at most, and by what."""
    limits = {name: results[name]["clips_per_second"]["median"] for name in ("loader", "encoder")}
    if device.type == "cpu":
        work = sum(results[name]["cpu_seconds_per_clip"] for name in limits)
        limits["cores"] = usable_cores() / work
    by = min(limits, key=limits.get)
    return {"clips_per_second": limits[by], "by": by, "limits": limits}


def measure(bench: Bench, rounds: int) -> dict[str, list[Turn]]:
    """Turns of each contender, interleaved; one round more is warm-up and not kept."""
    contenders = {"loader": bench.loader, "encoder": bench.encoder, "extraction": bench.extraction}
    turns: dict[str, list[Turn]] = {name: [] for name in contenders}
    for round_ in range(-1, rounds):
        for name, run in contenders.items():
            turn = run()
            if round_ >= 0:
                turns[name].append(turn)
    if turns["loader"][0].num_clips != turns["extraction"][0].num_clips:
        raise WrongResult("loader and extraction read different numbers of clips")
    return turns


def print_table(results: dict[str, dict[str, Any]]) -> None:
    """Figures of all contenders."""
    table = Table(title="clips/s: median (20th-80th percentile)")
    for name in (
        "contender",
        "whole turn",
        "after the first batch",
        "first batch s",
        "CPU ms/clip",
        "encoding",
    ):
        table.add_column(name, justify="left" if name == "contender" else "right")
    for name, result in results.items():
        cells = [
            "-" if rate is None else f"{rate['median']:.1f} ({rate['p20']:.1f}-{rate['p80']:.1f})"
            for rate in (result["clips_per_second"], result["steady_clips_per_second"])
        ]
        first = result["first_batch_seconds"]
        table.add_row(
            name,
            *cells,
            "-" if first is None else f"{first:.2f}",
            f"{1000 * result['cpu_seconds_per_clip']:.1f}",
            f"{100 * result['encode_share']:.0f} %",
        )
    Console(width=None if sys.stdout.isatty() else 120).print(table)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--videos", type=Path, help="folder of videos")
    parser.add_argument("--max-videos", type=int, help="at most so many of them")
    parser.add_argument("--sampling", choices=tuple(SAMPLINGS), default="video", help="what evaluations read")
    parser.add_argument("--clips", type=int, help="clips per file (default: 10)")
    parser.add_argument(
        "--checkpoint", help="a run, for its networks; fresh ones of the paper's size without"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--workers", type=int, default=usable_cores())
    parser.add_argument("--batch-size", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--tiny", action="store_true", help="narrow networks and small frames, to try the script"
    )
    parser.add_argument("--append", action=argparse.BooleanOptionalAction, default=True, help="append a row")
    parser.add_argument("--results", type=Path, help="folder of the row")
    parser.add_argument("--note", help="goes into the row, for example what else the machine was doing")
    args = parser.parse_args(argv)
    for name in ("rounds", "batch_size", "clips", "max_videos"):
        value = getattr(args, name)
        if value is not None and value < 1:
            parser.error(f"--{name.replace('_', '-')} is {value}, expected at least 1")
    return args


def find_videos(args: argparse.Namespace, scratch: Path) -> tuple[Path, str]:
    """(folder, what to call it)."""
    if args.videos is not None:
        return args.videos, args.videos.resolve().name
    real = Path(os.environ.get("CMAC_DATA", ROOT.parent / "shared" / "data")) / "ucf101" / "UCF-101"
    if real.is_dir():
        return real, "UCF101 sample"
    synthetic_videos(scratch / "videos", 4, 6.0)
    return scratch / "videos", "synthetic"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; returns the exit status."""
    args = parse(argv)
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        folder, source = find_videos(args, Path(scratch))
        bench = Bench(args, folder, Path(scratch))
        turns = measure(bench, args.rounds)
        clean_up(bench.device)
    results = {name: summary(each) for name, each in turns.items()}
    ceiling = find_ceiling(results, bench.device)
    print(f"ceiling: {ceiling['clips_per_second']:.1f} clips/s, of the {ceiling['by']}")
    print_table(results)
    to_loader = ratios(
        *([1 / turn.clips_per_second for turn in turns[name]] for name in ("extraction", "loader"))
    )
    spread = f"{to_loader['p20']:.2f}-{to_loader['p80']:.2f}"
    print(f"extraction / loader, round by round: {to_loader['median']:.2f} ({spread})")
    extraction = results["extraction"]
    row = make_row(
        "feature_extraction",
        args.sampling,
        {
            "device": str(bench.device),
            "network": bench.network,
            "source": source,
            "num_files": len(bench.files),
            "sampling": asdict(bench.sampling),
            "batch_size": args.batch_size,
            "workers": args.workers,
            "threads": torch.get_num_threads(),
            "video": asdict(bench.config.video),
            "audio": asdict(bench.config.audio),
        },
        clips_per_second=extraction["clips_per_second"],
        repeats=extraction["repeats"],
        seconds=time.monotonic() - began,
        first_batch_seconds=extraction["first_batch_seconds"],
        cpu_seconds_per_clip=extraction["cpu_seconds_per_clip"],
        peak_memory_bytes=peak_memory_bytes(),
        peak_gpu_memory_bytes=torch.cuda.max_memory_allocated(bench.device)
        if bench.device.type == "cuda"
        else None,
        num_bad=extraction["num_bad"],
        cache="warm",
        ceiling=ceiling,
        contenders=results,
        ratio_to_loader=to_loader,
        note=args.note,
    )
    if args.append:
        append_row(row, *([args.results] if args.results else []))
    print(json.dumps(row, allow_nan=False))
    return 0


if __name__ == "__main__":
    sys.exit(main())
