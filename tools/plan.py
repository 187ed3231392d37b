"""What preparing a data set and pretraining on it costs: core hours, bytes, GPU hours, bandwidth.

    python -m tools.plan --dataset audioset --gpus 8 --gpu h200
    python -m tools.plan --videos 50000 --seconds 30 --gpus 8 --nodes 4 --gpu h100 --epochs 100 --json

Each line names the rates it rests on, and each rate says where it comes from: measured rates are read from
benchmarks/results when the command runs, with their commit and hardware; what has not been measured is called
arithmetic, published or assumed, and a line is as firm as the weakest of its rates. A training step that
benchmarks/train_step.py has timed on the GPU in question takes the place of the arithmetic by itself.

--measured-here cuts a few videos now, on this machine: generated ones, or those of a folder.
"""

import argparse
import dataclasses
import functools
import json
import math
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.common import RESULTS, cpu_seconds
from benchmarks.roofline import Costs, step_costs
from cmac.config import PRESETS, RunConfig
from cmac.planning import ESTIMATES, Hardware, Rate, Rates, Training, exactly, plan
from shards.pool import cpu_model, usable_cores
from shards.storage import is_url

ELEMENT_BYTES = 2
"""bf16."""


@dataclass(frozen=True)
class DataSet:
    """What is known of a data set before it is there."""

    preset: str
    videos: Rate
    kept: Rate
    video_seconds: Rate


@dataclass(frozen=True)
class Gpu:
    """Ceilings of a data sheet."""

    matmul_flops: float
    """bf16 with float32 sums, without sparsity, per second."""
    memory_bytes: float
    """Per second."""


GPUS = {
    "a100": Gpu(312e12, 2.04e12),
    "h100": Gpu(989e12, 3.35e12),
    "h200": Gpu(989e12, 4.8e12),
    "b200": Gpu(2250e12, 8.0e12),
    "l40s": Gpu(362e12, 0.864e12),
}
"""SXM boards with the most memory, L40S: PCIe. CUDA 13 has no V100."""
REACHABLE_MATMUL, REACHABLE_MEMORY = 0.8, 0.9
"""Shares of the data sheet that large matrix products and copies reach."""
CONVOLUTIONS = (0.45, 0.60)
"""Shares of the reachable matrix rate that convolutions are taken to reach."""

TEN_SECONDS = exactly(
    "seconds per video",
    10,
    "s",
    "published",
    "10-second segments by the data set's definition (the paper, 4.1)",
)
DATASETS = {
    "k400": DataSet(
        "pretrain-k400",
        exactly("videos", 240_000, "videos", "published", "the paper, section 4.1"),
        exactly(
            "share kept", 220 / 240, "", "published", "the paper, section 4.1: about 220K of 240K have sound"
        ),
        TEN_SECONDS,
    ),
    "audioset": DataSet(
        "pretrain-audioset",
        exactly(
            "videos",
            2_063_949,
            "videos",
            "published",
            "heads of AudioSet's csv files: 2,041,789 unbalanced and 22,160 balanced training segments",
        ),
        Rate(
            name="share kept",
            value=0.87,
            low=0.6,
            high=0.95,
            unit="",
            kind="assumed",
            where="some videos have gone from YouTube, some are silent; count your files",
        ),
        TEN_SECONDS,
    ),
}
SOURCE_BYTES = Rate(
    name="source bytes",
    value=60e3,
    low=30e3,
    high=400e3,
    unit="bytes per second of video",
    kind="assumed",
    where="H.264 with sound, 340x256 to 640x360; 720p takes up to 400 kB/s; see --measured-here FOLDER",
)
SCALING = Rate(
    name="scaling over GPUs",
    value=0.95,
    low=0.8,
    high=1.0,
    unit="",
    kind="assumed",
    where="what gradients, keys and waiting for each other leave of one GPU's rate",
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool; returns the exit status."""
    args = build_parser().parse_args(argv)
    try:
        document = make_plan(args)
    except (ValueError, OSError) as error:
        print(f"plan: {error}", file=sys.stderr)
        return 2
    print(json.dumps(document, indent=1) if args.json else describe(document))
    return 0


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="plan", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--dataset", metavar="NAME", help=f"{', '.join(DATASETS)}, or give --videos")
    add("--videos", type=int, metavar="N", help="number of videos, of the data set or of your own")
    add(
        "--seconds",
        type=float,
        metavar="S",
        help="that are cut of each video (default: 10); those that make_shards leaves out cost less",
    )
    add("--kept", type=float, metavar="SHARE", help="of the videos that give clips, 0 to 1")
    add("--gpus", type=int, default=8, metavar="N", help="per node (default: 8)")
    add("--nodes", type=int, default=1, metavar="N", help="default: 1")
    add("--gpu", default="h200", metavar="NAME", help=f"one of {', '.join(GPUS)} (default: h200)")
    add("--cores", type=int, metavar="N", help="per node (default: 16 per GPU)")
    add("--epochs", type=int, metavar="N", help="default: those of the data set's preset")
    add("--batch", type=int, metavar="N", help="clips per step over all GPUs (default: the preset's)")
    add(
        "--measured-here",
        nargs="?",
        const="",
        metavar="FOLDER",
        help="measure shard making on this machine, on generated videos or on those in FOLDER",
    )
    add(
        "--results",
        type=Path,
        default=RESULTS,
        metavar="FOLDER",
        help="result files (default: benchmarks/results)",
    )
    add("--json", action="store_true", help="print JSON in place of tables")
    return parser


def make_plan(args: argparse.Namespace) -> dict[str, Any]:
    """The plan as a document of plain types.

    Raises:
        ValueError: a data set, GPU or number that does not exist, or no result file with a rate that is needed.
    """
    if args.gpu.lower() not in GPUS:
        raise ValueError(f"--gpu is {args.gpu!r}, expected one of {', '.join(GPUS)}")
    data_set = _data_set(args)
    preset = PRESETS[data_set.preset]()
    training = Training(
        epochs=preset.epochs if args.epochs is None else _positive("--epochs", args.epochs),
        global_batch_size=preset.loader.global_batch_size
        if args.batch is None
        else _positive("--batch", args.batch),
        clips_per_video=preset.loader.clips_per_video,
        keep_checkpoints=preset.keep_checkpoints,
    )
    cores = 16 * max(args.gpus, 1) if args.cores is None else args.cores
    hardware = Hardware(gpus=args.gpus, nodes=args.nodes, cores=cores)
    here = {} if args.measured_here is None else measure_here(args.measured_here)
    costs = _costs(data_set.preset)
    batch = max(training.global_batch_size // (hardware.gpus * hardware.nodes), 1)
    rates = Rates(
        videos=data_set.videos,
        kept=data_set.kept,
        video_seconds=data_set.video_seconds,
        source_bytes=here.get("source_bytes", SOURCE_BYTES),
        prepare=here.get("prepare") or _prepare_rate(args.results),
        clip_bytes=here.get("clip_bytes") or _clip_bytes(args.results),
        feed=_feed_rate(args.results),
        step=_step_rate(args.results, args.gpu.lower(), batch, costs),
        scaling=SCALING
        if hardware.gpus * hardware.nodes > 1
        else exactly("scaling over GPUs", 1, "", "counted", "one GPU"),
        checkpoint=_checkpoint_bytes(costs, preset),
    )
    sections = plan(rates, hardware, training)
    return {
        "dataset": args.dataset or "custom",
        "gpu": args.gpu.lower(),
        "hardware": dataclasses.asdict(hardware),
        "training": {"preset": data_set.preset, **dataclasses.asdict(training)},
        "quantities": [
            {
                "section": section,
                **{name: getattr(line, name) for name in ("name", "value", "low", "high", "unit", "basis")},
                "rests_on": [rate.name for rate in line.rests_on],
            }
            for section, lines in sections.items()
            for line in lines
        ],
        "rates": [dataclasses.asdict(getattr(rates, field.name)) for field in dataclasses.fields(rates)],
    }


def _data_set(args: argparse.Namespace) -> DataSet:
    if args.dataset is not None and args.dataset not in DATASETS:
        raise ValueError(
            f"--dataset is {args.dataset!r}, expected one of {', '.join(DATASETS)}, or --videos alone"
        )
    if args.dataset is None and args.videos is None:
        raise ValueError(f"neither --dataset ({', '.join(DATASETS)}) nor --videos is given, expected one")
    known = DATASETS.get(args.dataset)
    if known is None:
        share = Rate(
            name="share kept",
            value=0.9,
            low=0.6,
            high=1.0,
            unit="",
            kind="assumed",
            where="share with picture and sound; see make_shards --dry-run, then give --kept",
        )
        known = DataSet(
            "pretrain-k400",
            exactly("videos", _positive("--videos", args.videos), "videos", "given", "--videos"),
            share,
            exactly("seconds per video", 10, "s", "assumed", "--seconds was not given"),
        )
    changes = {}
    if args.videos is not None:
        changes["videos"] = exactly(
            "videos", _positive("--videos", args.videos), "videos", "given", "--videos"
        )
    if args.seconds is not None:
        changes["video_seconds"] = exactly(
            "seconds per video", _positive("--seconds", args.seconds), "s", "given", "--seconds"
        )
    if args.kept is not None:
        if not 0 < args.kept <= 1:
            raise ValueError(f"--kept is {args.kept:g}, expected more than 0 and at most 1")
        changes["kept"] = exactly("share kept", args.kept, "", "given", "--kept")
    return dataclasses.replace(known, **changes)


def _positive(flag: str, value: float) -> Any:
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"{flag} is {value:g}, expected more than 0")
    return value


@functools.cache
def _costs(preset: str) -> Costs:
    config = PRESETS[preset]()
    video, audio = config.loader.video, config.loader.audio
    frames = (3, video.num_frames, video.crop_size, video.crop_size)
    return step_costs(config.model, frames, (1, audio.num_mel_bins, audio.num_steps()))


def rows_of(folder: Path, file: str, wanted: Callable[[dict[str, Any]], bool]) -> list[dict[str, Any]]:
    """Rows of a result file that are `wanted` and have a rate, by time; none if there is no such file."""
    path = folder / file
    if not path.exists():
        return []
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    rows = [row for row in rows if row.get("clips_per_second") and wanted(row)]
    return sorted(rows, key=lambda row: row["utc"])


def newest_row(
    folder: Path, file: str, wanted: Callable[[dict[str, Any]], bool], command: str
) -> dict[str, Any]:
    """The newest row of a result file that is `wanted`.

    command: what makes one.

    Raises:
        ValueError: there is none.
    """
    rows = rows_of(folder, file, wanted)
    if not rows:
        raise ValueError(
            f"{folder / file} has no row that this needs, expected one by `{command}`; run it, or see --results"
        )
    return rows[-1]


def where_measured(file: str, row: dict[str, Any], note: str = "") -> str:
    """File, variant, commit, hardware and day of a result row."""
    machine = row.get("gpu") or f"{row.get('cpu') or 'unknown CPU'}, {row.get('usable_cores')} usable cores"
    parts = [
        f"benchmarks/results/{file}",
        f"{row['benchmark']}: {row['variant']}",
        f"commit {str(row.get('commit'))[:7]}{' with changes' if row.get('dirty') else ''}",
        machine,
        str(row["utc"])[:10],
        note,
    ]
    return "; ".join(part for part in parts if part)


def _prepare_rate(folder: Path) -> Rate:
    file = "make_shards.jsonl"
    row = newest_row(
        folder, file, lambda row: row["benchmark"] == "make_shards", "python benchmarks/make_shards.py"
    )
    rates = row["clips_per_second"]  # per core of CPU time
    return Rate(
        name="making clips",
        value=rates["median"],
        low=rates["p20"],
        high=rates["p80"],
        unit="clips/s per core",
        kind="measured",
        where=where_measured(
            file,
            row,
            f"{row['variant']} videos of 10 s, x264 {row['config']['preset']}; larger pictures take longer",
        ),
    )


def _clip_bytes(folder: Path) -> Rate:
    file = "loader_throughput.jsonl"
    row = newest_row(
        folder, file, lambda row: row["variant"] == "ladder: read", "python benchmarks/loader_throughput.py"
    )
    value = row["read_bytes_per_second"] / row["clips_per_second"]["median"]
    return exactly(
        "clip bytes",
        value,
        "bytes per clip",
        "measured",
        where_measured(file, row, f"mean of {row['config']['num_clips']} clips of {row['config']['source']}"),
    )


def _feed_rate(folder: Path) -> Rate:
    file = "loader_throughput.jsonl"
    row = newest_row(
        folder,
        file,
        lambda row: row["variant"] == "ladder: workers for a GPU",
        'python benchmarks/loader_throughput.py --only "workers for"',
    )
    rates = row["clips_per_second"]
    seconds = row["cpu_seconds_per_clip"]
    # The spread of the clips per second, for the same processes on the same cores.
    return Rate(
        name="feeding a GPU",
        value=seconds,
        low=seconds * min(rates["median"] / rates["p80"], 1),
        high=seconds * max(rates["median"] / rates["p20"], 1),
        unit="core seconds per clip",
        kind="measured",
        where=where_measured(file, row, "the workers' part: a GPU makes RGB and log-mel"),
    )


def _step_rate(folder: Path, gpu: str, batch: int, costs: Costs) -> Rate:
    file = "train_step.jsonl"

    def fits(row: dict[str, Any]) -> bool:
        on_gpu = gpu in (row.get("gpu") or "").lower()
        return on_gpu and row["config"].get("size") == "paper" and row["variant"].endswith(": ours")

    timed = rows_of(folder, file, fits)
    if timed:
        timed = [row for row in reversed(timed) if row["commit"] == timed[-1]["commit"]]
        row = min(timed, key=lambda row: abs(math.log(row["config"]["batch"] / batch)))
        rates = row["clips_per_second"]
        return Rate(
            name="training step",
            value=rates["median"],
            low=rates["p20"],
            high=rates["p80"],
            unit="clips/s per GPU",
            kind="measured",
            where=where_measured(
                file, row, f"batches of {row['config']['batch']} clips; this run has {batch} per GPU"
            ),
        )
    sheet = GPUS[gpu]

    def roofline(share: float, fused: bool) -> float:
        ceiling = {
            "matmul_flops": sheet.matmul_flops * REACHABLE_MATMUL * share,
            "copy_bytes_per_second": sheet.memory_bytes * REACHABLE_MEMORY,
        }
        return costs.clips_per_second(ceiling, fused=fused, num_clips=batch, element_bytes=ELEMENT_BYTES)

    traffic = [costs.traffic(fused, ELEMENT_BYTES) / 1e9 for fused in (True, False)]
    return Rate(
        name="training step",
        value=roofline(CONVOLUTIONS[0], True),
        low=roofline(CONVOLUTIONS[0], False),
        high=roofline(CONVOLUTIONS[1], True),
        unit="clips/s per GPU",
        kind="arithmetic",
        where=(
            f"no {gpu.upper()} has been timed (benchmarks/train_step.py would). Roofline of the model's layers, "
            f"{costs.flops() / 1e9:.0f} GFLOP and {traffic[0]:.1f} (fused) to {traffic[1]:.1f} GB of memory traffic "
            f"per clip, on {REACHABLE_MATMUL:.0%} of the data sheet's {sheet.matmul_flops / 1e12:g} TFLOP/s and "
            f"{REACHABLE_MEMORY:.0%} of its {sheet.memory_bytes / 1e12:g} TB/s, convolutions at {CONVOLUTIONS[0]:.0%} "
            f"to {CONVOLUTIONS[1]:.0%}; launches of small batches ({batch} per GPU) are not in it"
        ),
    )


def _checkpoint_bytes(costs: Costs, preset: RunConfig) -> Rate:
    model = preset.model
    queues = 2 * model.queue_length * model.embedding_dim
    numbers = 2 * costs.num_parameters + costs.num_key_parameters + queues
    return exactly(
        "checkpoint",
        4.0 * numbers,
        "bytes",
        "counted",
        f"float32: {costs.num_parameters:,} parameters and their momentum, {costs.num_key_parameters:,} of the key "
        f"encoders, two queues of {model.queue_length:,} x {model.embedding_dim}",
    )


def measure_here(folder: str) -> dict[str, Rate]:
    """Rates of shard making on this machine, now: of a few videos of a folder, or of generated ones for "".

    Raises:
        ValueError: no videos, or none that gives a clip.
    """
    from benchmarks.make_shards import make_videos
    from shards.make import DRY_RUN_VIDEOS, ShardConfig, estimate_shards, list_videos

    if is_url(folder):
        raise ValueError(
            f"--measured-here is {folder}, expected a folder of this machine: copy a few videos to it"
        )
    with tempfile.TemporaryDirectory(prefix="cmac-plan-") as temporary:
        if not folder:
            os.mkdir(f"{temporary}/videos")
            make_videos(Path(temporary) / "videos", DRY_RUN_VIDEOS)
        videos = folder or f"{temporary}/videos"
        config = ShardConfig(videos=videos, out=f"{temporary}/out")
        begin = cpu_seconds()
        estimate = estimate_shards(config)
        used = cpu_seconds() - begin
        if not estimate.num_distinct_clips:
            raise ValueError(f"none of {estimate.num_sampled} videos of {videos} gave a clip, expected some")
        of_all = estimate.num_sampled / estimate.num_videos
        num_clips = estimate.num_distinct_clips * of_all
        sizes = [os.path.getsize(video.path) for video in list_videos(config) if video.path] if folder else []
    where = (
        f"here, now: {estimate.num_sampled} {'of the videos in ' + folder if folder else 'generated videos'}, "
        f"{config.workers} processes, {cpu_model()}, {usable_cores()} usable cores"
    )
    rates = {"prepare": exactly("making clips", num_clips / used, "clips/s per core", "measured", where)}
    if sizes:
        per_clip = estimate.num_bytes / estimate.num_clips
        rates["clip_bytes"] = exactly("clip bytes", per_clip, "bytes per clip", "measured", where)
        value = sum(sizes) / len(sizes) / (num_clips / estimate.num_sampled)
        text = f"{where}; mean size of {len(sizes)} files per second that is cut of them"
        rates["source_bytes"] = exactly("source bytes", value, SOURCE_BYTES.unit, "measured", text)
    return rates


def describe(document: dict[str, Any]) -> str:
    """The document as text."""
    hardware, training = document["hardware"], document["training"]
    numbers = {rate["name"]: number for number, rate in enumerate(document["rates"], 1)}
    lines = [
        f"{document['dataset']}: {training['epochs']} epochs in batches of {training['global_batch_size']} clips "
        f"({training['preset']}), {hardware['nodes']} x {hardware['gpus']} {document['gpu'].upper()}, "
        f"{hardware['cores']} cores per node"
    ]
    titles = {"prepare": "To prepare", "train": "To train"}
    rows = []
    for line in document["quantities"]:
        if line["section"] in titles:
            rows.append((titles.pop(line["section"]), "", "range", "by", "rests on"))
        marks = "".join(f"[{numbers[name]}]" for name in line["rests_on"])
        spread = line["high"] > line["low"] * 1.0001
        text = f"{human(line['low'], line['unit'])} - {human(line['high'], line['unit'])}" if spread else ""
        rows.append(("  " + line["name"], human(line["value"], line["unit"]), text, line["basis"], marks))
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    for name, value, text, basis, marks in rows:
        if not value:
            lines.append("")
        lines.append(
            f"{name:<{widths[0]}}  {value:>{widths[1]}}  {text:<{widths[2]}}  {basis:<{widths[3]}}  {marks}".rstrip()
        )
    lines += ["", "Rates"]
    for number, rate in enumerate(document["rates"], 1):
        value, low, high = (_four_digits(rate[name]) for name in ("value", "low", "high"))
        spread = f" ({low} to {high})" if rate["high"] > rate["low"] else ""
        lines.append(f"  [{number}] {rate['name']}: {value}{spread} {rate['unit']}".rstrip())
        label = f"{rate['kind']}, not measured" if rate["kind"] in ESTIMATES else rate["kind"]
        lines.append(f"      {label}: {rate['where']}")
    loose = [kind for kind in ESTIMATES if any(rate["kind"] == kind for rate in document["rates"])]
    if loose:
        lines += [
            "",
            f"Lines by {' or '.join(loose)} are estimates: nothing has been measured for that part of them.",
        ]
    return "\n".join(lines)


def human(value: float, unit: str) -> str:
    """A number with three digits that count, and its unit: `1.34 TB`, `183 core hours`."""
    if unit.startswith("bytes"):
        power = min(max(int(math.log10(max(value, 1)) // 3), 0), 5)
        prefix = ("", "k", "M", "G", "T", "P")[power]
        return f"{_three_digits(value / 1000**power)} {prefix}B{unit.removeprefix('bytes')}"
    return f"{_three_digits(value)} {unit}"


def _four_digits(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"


def _three_digits(value: float) -> str:
    if value >= 1000:
        return f"{float(f'{value:.3g}'):,.0f}"
    return f"{value:.3g}"


if __name__ == "__main__":
    sys.exit(main())
