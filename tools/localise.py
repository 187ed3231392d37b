"""Where does the network look for the source of a sound? cIoU, AUC and figures without a threshold, on annotated boxes
(paper section 4.5 shows pictures only).

    python -m tools.localise runs/k400 --dataset flickr-soundnet --data FLICKR --annotations FLICKR/Annotations
    python -m tools.localise runs/k400 --dataset vggss --data VGGSS --annotations vggss.json --list vggss_test.csv
    python -m tools.localise runs/demo --dataset world --data runs/demo/shards/test --annotations runs/demo/world

Of each sample four maps are scored: the guided one (Eq. 4) and the predicted one (Eq. 5), each at the annotated
moment (`slice`) and averaged over time (`mean`); for what they are worth, the whole picture, its center, noise and
the same network with random weights are scored by the same function. On the generated world objects move, so maps are
also compared step by step (`steps`), and clips whose sound is off-screen or that are silent ask whether a map knows
that nothing in sight sounds (`detection`).

What the network sees. Stills are squashed: the whole image is scaled to the network's square, as in the code of EZ-VSL
and SLAVC (--fit crop: scaled to the short side and cut, and boxes with it; LVS's code cuts the image but compares with
boxes of the whole one). Its second of sound is shorter than theirs (--clip-seconds 3). Videos and shards keep their
aspect and the center is cut out, as in training, and boxes are cut with it; how much of the ground truth is lost by
that is told, and a sample whose source is not in sight at all is left out and counted.

Maps are kept below --out: a run that was killed goes on where it was, and another --threshold asks no network.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor

from cmac.evaluation.features import Features, extract_features, identity_digest, store_folder
from cmac.evaluation.results import Metric, Result, append_result, stamp
from cmac.evaluation.sound_localisation import (
    DETECTION_FIGURES,
    FIGURES,
    THRESHOLDS,
    Sample,
    ScoreList,
    StoredClip,
    annotated_sample,
    baselines_over_steps,
    score_all_steps,
    score_baselines,
    score_maps,
    step_at,
    world_samples,
)
from cmac.evaluation.truth import Truth, find_truth
from cmac.evaluation.world import PARTS
from cmac.weights import Encoders, weights_digest
from loaders import Loader, build_loader
from loaders.batch import BadClipRecord, ClipBatch
from loaders.config import LoaderConfig
from loaders.listed import ClipSampling, ListedLoader, listed_config
from loaders.localisation_sets import (
    AnnotationSet,
    PairNames,
    find_pairs,
    find_videos,
    read_flickr_annotations,
    read_ids,
    read_non_sounding,
    read_vggss_annotations,
)
from loaders.stills import StillsLoader
from shards.manifest import read_manifest
from tools.common import RANDOM as RANDOM_PREFIX
from tools.common import (
    add_common_arguments,
    choose_device,
    count_skipped,
    open_encoders,
    random_encoders,
    run,
    say,
)
from tools.evaluate_demo import evaluation_loader_config

DATASETS = ("flickr-soundnet", "vggss", "world")
TRAINED, RANDOM = "trained", "random weights"
MAPS = ("guided", "predicted")
VERSION = 1
"""Of what is kept; raised whenever the same options would give other maps."""


@dataclass(frozen=True, kw_only=True)
class Reading:
    """What is read, before any network is asked."""

    loader: Loader
    epochs: int
    """Epochs of it that hold all clips."""
    source: str
    """`stills squash`, `stills crop`, `videos`, `shards`: for the protocol's name."""
    order: dict
    """JSON-able: equal only where the same clips are read in the same order."""
    skipped: list[tuple[str, str]]
    """(sample id, reason) of what is not read."""
    sample_ids: dict[str, str]
    """`ClipInfo.video_id` -> sample id, where they differ."""
    annotations: AnnotationSet | None
    """None on the generated world."""
    silent: frozenset[str]
    """Sample ids of pairs without a visible source."""


def annotations_of(args: argparse.Namespace) -> AnnotationSet:
    """Boxes of Flickr-SoundNet or VGG-SS, of the ids in --list or of all."""
    ids = None if args.list is None else read_ids(args.list)
    if args.dataset == "vggss":
        return read_vggss_annotations(args.annotations, ids)
    return read_flickr_annotations(args.annotations, ids)


def base_config(args: argparse.Namespace, encoders: Encoders) -> LoaderConfig:
    """What is done to clips: as in training, without augmentation."""
    return listed_config(
        str(args.data),
        video=encoders.video_config,
        audio=encoders.audio_config,
        batch_size=args.batch_size,
        num_workers=args.workers,
    )


def loader_order(loader: Loader) -> dict:
    """Its state but for the position."""
    return {name: value for name, value in loader.state_dict().items() if name not in ("epoch", "next_batch")}


def open_stills(args: argparse.Namespace, encoders: Encoders, pin_memory: bool) -> Reading:
    """Pairs `frames/<id>.jpg` and `audio/<id>.wav` with boxes, and those without source of --extended."""
    annotations = annotations_of(args)
    names = [PairNames(image_id=name, audio_id=name) for name in annotations.annotations]
    if args.extended is not None:
        names += read_non_sounding(args.extended)
    pairs, missing = find_pairs(args.data, names[: args.limit])
    if not pairs:
        raise ValueError(f"{args.data} has none of the {len(names)} annotated pairs, expected at least one")
    loader = StillsLoader(
        base_config(args, encoders),
        pairs,
        folder=str(args.data),
        clip_seconds=args.clip_seconds,
        fit=args.fit,
        pin_memory=pin_memory,
    )
    return Reading(
        loader=loader,
        epochs=1,
        source=f"stills {args.fit}",
        order=loader_order(loader),
        skipped=[*annotations.skipped, *missing, *loader.skipped],
        sample_ids={},
        annotations=annotations,
        silent=frozenset(pair.sample_id for pair in names if not pair.sounding),
    )


def open_videos(args: argparse.Namespace, encoders: Encoders, pin_memory: bool) -> Reading:
    """Original videos `<id>.mp4` with boxes at their middle (VGG-SS)."""
    annotations = annotations_of(args)
    found = find_videos(args.data, list(annotations.annotations)[: args.limit])
    sample_ids = {video.video_id: name for name, video in found}
    sampling = ClipSampling(needs="both", placement="center", clip_seconds=args.clip_seconds)
    loader = ListedLoader(
        base_config(args, encoders),
        [video for _, video in found],
        sampling,
        folder=str(args.data),
        pin_memory=pin_memory,
    )
    skipped = [(sample_ids[video_id], reason) for video_id, reason in loader.skipped]
    return Reading(
        loader=loader,
        epochs=1,
        source="videos",
        order=loader_order(loader),
        skipped=[*annotations.skipped, *skipped],
        sample_ids=sample_ids,
        annotations=annotations,
        silent=frozenset(),
    )


def open_shards(args: argparse.Namespace, encoders: Encoders, device: torch.device) -> Reading:
    """Shards of the generated world, all slots."""
    manifest = read_manifest(args.data)
    config = evaluation_loader_config(
        base_config(args, encoders), Path(args.data), args.batch_size, args.workers
    )
    loader = build_loader(config, 0, 1, device=device)
    return Reading(
        loader=loader,
        epochs=manifest.num_slots,
        source="shards",
        order={**loader_order(loader), "num_slots": manifest.num_slots},
        skipped=[],
        sample_ids={},
        annotations=None,
        silent=frozenset(),
    )


def open_reading(args: argparse.Namespace, encoders: Encoders, device: torch.device) -> Reading:
    """What --dataset and --data name."""
    if args.dataset == "world":
        return open_shards(args, encoders, device)
    stills = (Path(args.data) / "frames").is_dir()
    if args.dataset == "vggss" and not stills:
        if args.extended is not None:
            raise ValueError(
                f"--extended {args.extended} names pairs of stills, but {args.data} holds videos"
            )
        return open_videos(args, encoders, device.type == "cuda")
    return open_stills(args, encoders, device.type == "cuda")


def map_encoder(
    networks: Mapping[str, Encoders], device: torch.device
) -> Callable[[ClipBatch], dict[str, Tensor]]:
    """What `extract_features` asks for each batch: `clip` (numbers of `StoredClip`) and, by network and kind, maps
    (N, T', H', W')."""

    @torch.no_grad()
    def encode(batch: ClipBatch) -> dict[str, Tensor]:
        numbers = [
            StoredClip.numbers(info, done) if info is not None else [0.0] * 12
            for info, done in zip(batch.clips, batch.augmentations, strict=True)
        ]
        arrays = {"clip": torch.tensor(numbers, dtype=torch.float32)}
        frames, log_mel = batch.frames.to(device), batch.log_mel.to(device)
        for name, encoders in networks.items():
            encoded = encoders.require_model().encode(encoders.normalize_frames(frames), log_mel)
            for kind in MAPS:
                arrays[array_name(name, kind)] = getattr(encoded, f"{kind}_v")
        return arrays

    return encode


def array_name(network: str, kind: str) -> str:
    """Name in the store."""
    return f"{network}_{kind}".replace(" ", "_")


def extract_maps(
    args: argparse.Namespace,
    reading: Reading,
    networks: Mapping[str, Encoders],
    device: torch.device,
) -> tuple[Features, Path]:
    """Maps of all networks of all clips, each clip read once, and a folder for what is told of them."""
    trained, loader = networks[TRAINED], reading.loader
    identity = {
        "task": "localisation",
        "version": VERSION,
        # Filters and heads are part of what maps come from, but not of the encoders' digest.
        "weights": {name: weights_digest(net.require_model(), None) for name, net in networks.items()},
        "pixels": [trained.pixel_mean, trained.pixel_std],
        "video": dataclasses.asdict(trained.video_config),
        "audio": dataclasses.asdict(trained.audio_config),
        "source": reading.source,
        "clip_seconds": args.clip_seconds,
        "clips": reading.order,
    }
    parts = []
    for epoch in range(reading.epochs):
        described = {**identity, "epoch": epoch}
        loader.load_state_dict({**loader.state_dict(), "epoch": epoch, "next_batch": 0})
        encode = map_encoder(networks, device)
        parts.append(extract_features(loader, encode, store_folder(args.out, described), described, say=say))
    store = args.out / "localisation" / identity_digest(identity)
    store.mkdir(parents=True, exist_ok=True)
    return join_features(parts), store


def join_features(parts: Sequence[Features]) -> Features:
    """Features of several epochs as one."""
    return Features(
        arrays={name: np.concatenate([part.arrays[name] for part in parts]) for name in parts[0].arrays},
        video_ids=[name for part in parts for name in part.video_ids],
        labels=[label for part in parts for label in part.labels],
        slots=np.concatenate([part.slots for part in parts]),
        start_seconds=np.concatenate([part.start_seconds for part in parts]),
        bad=[record for part in parts for record in part.bad],
        seconds=sum(part.seconds for part in parts),
    )


@dataclass(kw_only=True)
class Samples:
    """Samples with maps, in the order in which they were read."""

    rows: list[int]
    """Of the features, one per sample."""
    samples: list[Sample]
    parts: list[str]
    """Part of the generated world; else empty texts."""
    skipped: list[tuple[str, str]]
    """(sample id, reason)."""
    outside: float
    """Mean share of the ground truth that lay outside of what the network saw, over samples with boxes."""


def join_samples(args: argparse.Namespace, reading: Reading, features: Features) -> Samples:
    """Ground truth of each clip that was read."""
    clips, rows, seen = [], [], set()
    for row, video_id in enumerate(features.video_ids):
        start = float(features.start_seconds[row])
        if (
            video_id,
            start,
        ) in seen:  # a video with fewer seconds than there are slots comes again with the same
            continue
        seen.add((video_id, start))
        name = reading.sample_ids.get(video_id, video_id)
        clips.append(StoredClip.from_numbers(features.arrays["clip"][row], name, start))
        rows.append(row)
    num_steps = features.arrays[array_name(TRAINED, "guided")].shape[1]
    found = Samples(rows=[], samples=[], parts=[], skipped=list(reading.skipped), outside=0.0)
    if reading.annotations is None:
        known = {name: find_truth(Path(args.annotations), name) for name in {clip.video_id for clip in clips}}
        truths: list[Truth | None] = [known[clip.video_id] for clip in clips]
        samples, reasons = world_samples(clips, truths, num_steps)
        for row, clip, truth, sample, reason in zip(rows, clips, truths, samples, reasons, strict=True):
            if sample is None or truth is None:
                found.skipped.append((clip.video_id, reason))
                continue
            found.rows.append(row)
            found.samples.append(sample)
            found.parts.append(truth.part)
        return found
    step, shares = step_at(args.clip_seconds / 2, args.clip_seconds, num_steps), []
    for row, clip in zip(rows, clips, strict=True):
        if clip.video_id in reading.silent:
            sample = Sample(sample_id=clip.video_id, truth=None, step=step)
        else:
            annotation = reading.annotations.annotations[clip.video_id]
            sample, outside = annotated_sample(annotation.boxes, annotation.votes, clip, step)
            shares.append(outside)
            if sample is None:
                found.skipped.append((clip.video_id, "outside-crop"))
                continue
        found.rows.append(row)
        found.samples.append(sample)
        found.parts.append("")
    found.outside = float(np.mean(shares)) if shares else 0.0
    return found


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the table: one kind of map of one network, or one baseline."""

    network: str
    """`trained`, `random weights`, or `none` for baselines."""
    name: str
    """`guided-slice`, ..., `whole-image`, ..."""
    draws: list[ScoreList]
    """One, or one per draw of noise."""

    def of_samples(self, chosen: Sequence[int]) -> Row:
        """The same of some of the samples."""
        draws = [ScoreList(scores=[draw.scores[number] for number in chosen]) for draw in self.draws]
        return Row(network=self.network, name=self.name, draws=draws)

    def metrics(self, groups: Sequence[str], chance: Mapping[str, float], seed: int) -> dict[str, Metric]:
        """By name of figure; the mean over draws."""
        each = [scores.figures() for scores in self.draws]
        intervals = self.draws[0].intervals(groups, seed) if len(self.draws) == 1 else {}
        return {
            name: Metric(
                value=float(np.mean([figures[name] for figures in each])),
                interval=intervals.get(name),
                per_fold=tuple(figures[name] for figures in each) if len(each) > 1 else None,
                chance=chance.get(name) if self.network != "none" else None,
            )
            for name in each[0]
        }


def score_rows(
    args: argparse.Namespace, samples: Sequence[Sample], maps: Mapping[str, Mapping[str, Tensor]], steps: bool
) -> list[Row]:
    """All lines of the table.

    Args:
        args: threshold, seed, number of draws.
        samples: N of them.
        maps: network -> kind -> (N, T', H', W').
        steps: also compare step by step.
    """
    rows = []
    size = next(iter(maps[TRAINED].values())).shape[1:]
    for network, kinds in maps.items():
        for name, scores in score_maps(samples, kinds, args.threshold).items():
            rows.append(Row(network=network, name=name, draws=[scores]))
        for kind, values in kinds.items() if steps else ():
            rows.append(Row(network=network, name=f"{kind}-steps", draws=[score_all_steps(samples, values)]))
    baselines = score_baselines(samples, tuple(size[1:]), args.threshold, args.seed, args.draws)
    rows += [Row(network="none", name=name, draws=draws) for name, draws in baselines.items()]
    if steps:
        over_steps = baselines_over_steps(samples, tuple(size), args.seed, args.draws)
        rows += [Row(network="none", name=f"{name}-steps", draws=draws) for name, draws in over_steps.items()]
    return rows


def protocol_name(args: argparse.Namespace, reading: Reading) -> str:
    """`stills squash, 1s, top-half`."""
    parts = [reading.source, f"{args.clip_seconds:g}s", args.threshold]
    if args.extended is not None:
        parts.append("extended")
    if args.limit is not None:
        parts.append(f"first {args.limit}")
    return ", ".join(parts)


def localise(args: argparse.Namespace, console: Console) -> list[Result]:
    """Reads, asks the networks, scores; returns and keeps a Result for each line of the table."""
    device = choose_device(args)
    networks = {TRAINED: open_encoders(args)}
    networks[TRAINED].require_model()
    is_random = args.checkpoint.startswith(RANDOM_PREFIX)
    if args.untrained and not is_random:
        networks[RANDOM] = random_encoders(args)
    reading = open_reading(args, networks[TRAINED], device)
    try:
        features, store = extract_maps(args, reading, networks, device)
    finally:
        reading.loader.close()
    began = time.monotonic()  # what came before counts as it is kept, over all starts
    torch.set_num_threads(
        1
    )  # a map is too small to share: threads would wait for each other, 80 times as long
    found = join_samples(args, reading, features)
    bad = [(bad_name(reading, record), record.reason) for record in features.bad]
    write_skipped(store / "skipped.tsv", [*found.skipped, *bad])
    lost = count_skipped(found.skipped, features.bad)
    if not any(sample.truth is not None for sample in found.samples):
        told = ", ".join(f"{name}: {count}" for name, count in lost.items()) or "no clip has one"
        raise ValueError(f"{args.data}: no sample has a visible source ({told}), expected at least one")
    maps = {
        network: {
            kind: torch.from_numpy(features.arrays[array_name(network, kind)][found.rows]) for kind in MAPS
        }
        for network in networks
    }
    say(f"scoring the maps of {len(found.samples):,} samples")
    all_rows = score_rows(args, found.samples, maps, steps=reading.annotations is None)
    protocol = protocol_name(args, reading)
    splits = {"test": list(range(len(found.samples)))}
    if reading.annotations is None:
        for part in PARTS:
            splits[f"test {part}"] = [number for number, name in enumerate(found.parts) if name == part]
    results = []
    for split, chosen in splits.items():
        samples = [found.samples[number] for number in chosen]
        visible = sum(sample.truth is not None for sample in samples)
        if not visible:
            console.print(f"{split}: no sample with a visible source, left out")
            continue
        rows = [row.of_samples(chosen) for row in all_rows]
        counts = {
            "num_clips": len(samples),
            "num_clips_with_visible_source": visible,
            "num_clips_without_visible_source": len(samples) - visible,
            "num_videos": len({sample.sample_id for sample in samples}),
            **lost,
        }
        made = make_results(
            args, networks, is_random, rows, [sample.sample_id for sample in samples],
            dataset=args.dataset, split=split, counts=counts, protocol=protocol,
            config={
                "threshold": args.threshold,
                "clip_seconds": args.clip_seconds,
                "source": reading.source,
                "seed": args.seed,
                "draws": args.draws,
                "video": dataclasses.asdict(networks[TRAINED].video_config),
                "audio": dataclasses.asdict(networks[TRAINED].audio_config),
                "annotations": None if reading.annotations is None else reading.annotations.digest,
                "share of truth outside of what was seen": found.outside,
            },
            **stamp(features.seconds + time.monotonic() - began),
        )  # fmt: skip
        print_table(
            console, f"{args.dataset}, {split}: {protocol}", rows, [made[row_key(row)] for row in rows]
        )
        results += made.values()
    print_notes(console, lost, found, reading, store)
    for result in results:
        append_result(args.results, result)
    console.print(f"results: {args.results}", soft_wrap=True, markup=False)
    return results


def row_key(row: Row) -> tuple[str, str]:
    """What tells a line of the table from the others."""
    return row.network, row.name


def make_results(
    args: argparse.Namespace,
    networks: Mapping[str, Encoders],
    is_random: bool,
    rows: Sequence[Row],
    groups: Sequence[str],
    *,
    protocol: str,
    config: dict,
    **fields,
) -> dict[tuple[str, str], Result]:
    """A Result for each line, by `row_key`. What noise scores is the chance of the others."""
    noise = {row.name: row.metrics(groups, {}, args.seed) for row in rows if row.name.startswith("random")}
    results = {}
    for row in rows:
        chance = noise["random-steps" if row.name.endswith("-steps") else "random"]
        encoders = networks.get(row.network)
        checkpoint = "none"
        if encoders is not None:
            checkpoint = "random" if row.network == RANDOM or is_random else encoders.source
        results[row_key(row)] = Result(
            task="localisation",
            protocol=f"{protocol}, {row.name}",
            config=config if encoders is None else {**config, "weights": encoders.source},
            checkpoint=checkpoint,
            checkpoint_digest=None if encoders is None else encoders.digest,
            metrics=row.metrics(groups, {name: metric.value for name, metric in chance.items()}, args.seed),
            **fields,
        )
    return results


def bad_name(reading: Reading, record: BadClipRecord) -> str:
    """Sample id of a bad clip; of the generated world its shard and key."""
    if reading.annotations is None:
        return f"{record.shard}/{record.key}"
    return reading.sample_ids.get(record.shard, record.shard)


def write_skipped(path: Path, skipped: Sequence[tuple[str, str]]) -> None:
    """Which samples were left out and why, a line each."""
    text = "".join(f"{name}\t{reason}\n" for name, reason in skipped)
    path.write_bytes(text.encode("utf-8", "surrogateescape"))


def print_table(console: Console, title: str, rows: Sequence[Row], results: Sequence[Result]) -> None:
    """Figures in percent, the 95 % interval below the headline ones."""
    names = [
        name for name in (*FIGURES, *DETECTION_FIGURES) if any(name in result.metrics for result in results)
    ]
    table = Table(title=escape(title))
    table.add_column("network")
    table.add_column("map")
    for name in names:
        table.add_column(name, justify="right")
    for row, result in zip(rows, results, strict=True):
        cells = []
        for name in names:
            metric = result.metrics.get(name)
            text = "" if metric is None else f"{metric.value:.1%}"
            if metric is not None and metric.interval is not None and name in FIGURES[:2]:
                text += f"\n[dim]{metric.interval[0]:.1%} .. {metric.interval[1]:.1%}[/]"
            cells.append(text)
        network = {"none": "", "random": RANDOM}.get(result.checkpoint, row.network)
        table.add_row(escape(network), row.name, *cells)
    console.print(table)


def print_notes(
    console: Console, lost: Mapping[str, int], found: Samples, reading: Reading, store: Path
) -> None:
    """What the figures do not tell."""
    for name, count in lost.items():
        console.print(f"{name}: {count}", soft_wrap=True)
    if lost:
        console.print(f"which ones: {store / 'skipped.tsv'}", soft_wrap=True, markup=False)
    boxes = reading.annotations
    if boxes is not None:
        console.print(
            f"{boxes.num_boxes} boxes, of which {boxes.num_clipped_boxes} reached out of the frame and "
            f"{boxes.num_empty_boxes} have no area; {found.outside:.1%} of the ground truth lies outside of what the "
            "network saw",
            soft_wrap=True,
        )


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    add_common_arguments(parser)
    parser.add_argument("--dataset", choices=DATASETS, required=True, help="which test set --data holds")
    parser.add_argument(
        "--annotations",
        type=Path,
        required=True,
        help="flickr-soundnet: folder of XML files; vggss: vggss.json; world: folder that make_world wrote",
    )
    parser.add_argument(
        "--list", type=Path, help="CSV file whose first column names the samples (default: all annotated)"
    )
    parser.add_argument(
        "--extended",
        type=Path,
        help="CSV file with pairs without a visible source (image,audio,non-sounding)",
    )
    parser.add_argument(
        "--fit",
        choices=("squash", "crop"),
        default="squash",
        help="how stills become square (default: squash)",
    )
    parser.add_argument(
        "--threshold",
        choices=THRESHOLDS,
        default="top-half",
        help="which pixels are selected (default: top-half)",
    )
    parser.add_argument(
        "--clip-seconds", type=float, default=1.0, help="sound, and video, around the middle (default: 1)"
    )
    parser.add_argument("--draws", type=int, default=5, help="of noise (default: 5)")
    parser.add_argument("--limit", type=int, help="only the first so many samples, for a quick look")
    parser.add_argument("--seed", type=int, default=0, help="of noise and intervals (default: 0)")
    parser.add_argument(
        "--no-untrained",
        dest="untrained",
        action="store_false",
        help="do not ask the same network with random weights",
    )
    return parser


def check_arguments(args: argparse.Namespace) -> None:
    """Raises ValueError for options that do not go together."""
    if args.dataset == "world" and (args.list or args.extended or args.limit is not None):
        raise ValueError(
            "--list, --extended and --limit are for pairs and videos, not for the generated world"
        )
    if args.dataset == "world" and args.clip_seconds != 1.0:
        raise ValueError(
            f"--clip-seconds is {args.clip_seconds:g}, expected 1 for the generated world's shards"
        )
    if args.draws < 1:
        raise ValueError(f"--draws is {args.draws}, expected at least 1")
    if args.limit is not None and args.limit < 1:
        raise ValueError(f"--limit is {args.limit}, expected at least 1")


def main(argv: list[str] | None = None) -> int:
    """Command line; 0 when the figures were written."""
    args = build_parser().parse_args(argv)

    def evaluate() -> None:
        check_arguments(args)
        localise(args, Console(width=None if sys.stdout.isatty() else 140))

    return run("localise", evaluate)


if __name__ == "__main__":
    sys.exit(main())
