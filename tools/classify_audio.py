"""Audio classification: a linear classifier on the frozen audio encoder (paper sections 4.2 and 4.5, Table 6).

    python -m tools.classify_audio runs/pretrain-k400 --dataset esc50 --data ESC-50
    python -m tools.classify_audio runs/pretrain-k400 --dataset dcase2014 --data DCASE --features map gap
    python -m tools.classify_audio runs/demo --dataset esc10 --data ESC-50 --random-networks 5

ESC-50 (and its part ESC-10): 10 clips of 2 s of each file, the five official folds. DCASE: 60 clips of 1 s. There was
one set of scenes and no challenge in 2014, so two readings of the paper's two columns are here: `dcase2014` trains on
the development files and tests on the test files, `dcase2013` is cross-validation over the development files.

Beside the network, on the same clips with the same classifier: the same network with random weights, and the mean
and standard deviation of each log-mel band. C is chosen among training files alone. Each clip is read once for all
folds, networks and features; what was computed is kept below --out, and a run that was killed goes on where it was.
Fine-tuning the encoder on ESC-50, as XDC does, is not offered.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from collections import Counter
from collections.abc import Sequence

from rich.console import Console

from cmac.evaluation.audio_classification import (
    FEATURES_VERSION,
    LOG_MEL,
    PROTOCOLS,
    FoldResult,
    FoldTask,
    classify_folds,
    clip_encoder,
    difference_metric,
    top1_metric,
)
from cmac.evaluation.features import Features, extract_features, identity_digest, store_folder
from cmac.evaluation.results import Result, stamp
from cmac.weights import Encoders, load
from loaders.datasets import DATASETS, ClassificationSplit, read_split
from loaders.listed import ClipSampling, ListedLoader, listed_config
from shards.sources import SourceVideo, with_hashes
from tools.common import (
    RANDOM,
    add_common_arguments,
    choose_device,
    count_skipped,
    open_encoders,
    report,
    run,
    say,
)

KINDS = ("map", "gap", "gdt-pool", "flatten+l2")
TRAINED = "trained"


def read_splits(args: argparse.Namespace) -> list[ClassificationSplit]:
    """All splits of the dataset, with at most --max-files files of each class and part."""
    splits = [read_split(args.dataset, args.data, name) for name in DATASETS[args.dataset].splits]
    if args.max_files is None:
        return splits
    # What is for test in one fold is for training in the others; training files of a single split are another part.
    parts = [split.test for split in splits] + ([splits[0].train] if len(splits) == 1 else [])
    kept = {video.video_id for part in parts for video in first_of_each_class(part, args.max_files)}
    return [
        dataclasses.replace(
            split,
            train=tuple(video for video in split.train if video.video_id in kept),
            test=tuple(video for video in split.test if video.video_id in kept),
            missing=tuple(name for name in split.missing if name in kept),
        )
        for split in splits
    ]


def first_of_each_class(videos: Sequence[SourceVideo], most: int) -> list[SourceVideo]:
    """At most so many files of each class, in their order; files that are there before those that are not."""
    taken: Counter[str | None] = Counter()
    chosen = []
    for video in sorted(videos, key=lambda video: video.path is None):
        taken[video.label] += 1
        if taken[video.label] <= most:
            chosen.append(video)
    return chosen


def union(splits: Sequence[ClassificationSplit]) -> list[SourceVideo]:
    """Each file of the splits once, in the order of their names."""
    rows = {
        video.video_id: (video.video_id, video.path, video.label)
        for split in splits
        for video in (*split.train, *split.test)
    }
    return with_hashes(rows[name] for name in sorted(rows))


def fold_tasks(
    splits: Sequence[ClassificationSplit], features: Features, official: bool, folds: Sequence[str]
) -> list[FoldTask]:
    """The folds asked for, of the files that have features.

    official: the splits are given folds, which C is chosen with, too.
    """
    usable = set(features.video_ids)
    number = {video.video_id: index for index, split in enumerate(splits) for video in split.test}

    def labels(videos: Sequence[SourceVideo]) -> dict[str, str]:
        return {video.video_id: str(video.label) for video in videos if video.video_id in usable}

    return [
        FoldTask(
            name=split.split,
            classes=split.classes,
            train=labels(split.train),
            test=labels(split.test),
            inner_folds={name: number[name] for name in labels(split.train)} if official else None,
        )
        for split in splits
        if split.split in folds
    ]


def open_networks(args: argparse.Namespace) -> dict[str, Encoders]:
    """`trained` (the network asked for) and `random N`, N being the seed of its weights."""
    networks = {TRAINED: open_encoders(args)}
    path = args.checkpoint.removeprefix(RANDOM)
    # A network of fresh weights is compared with others, not with itself.
    first = args.random_seed + args.checkpoint.startswith(RANDOM)
    for seed in range(first, first + args.random_networks):
        networks[f"random {seed}"] = load(path, choose_device(args), random_seed=seed)
    return networks


def protocol_name(args: argparse.Namespace, sampling: ClipSampling, kind: str) -> str:
    """`10x2s map logistic`, and what was left out."""
    parts = [f"{sampling.clips_per_file}x{sampling.clip_seconds:g}s {kind} {args.classifier}"]
    if len(args.folds) < len(DATASETS[args.dataset].splits):
        parts.append(f"folds {' '.join(args.folds)} alone")
    if args.max_files is not None:
        parts.append(f"at most {args.max_files} files of each class and part")
    return ", ".join(parts)


def split_name(folds: Sequence[str]) -> str:
    """`folds 1-5`, `folds 1,3`, `test`."""
    if list(folds) == ["test"]:
        return "test"
    return "folds 1-5" if len(folds) == 5 else f"folds {','.join(folds)}"


def evaluate(args: argparse.Namespace) -> list[Result]:
    """Does it all; returns what was appended to --results."""
    console = Console(width=None if sys.stdout.isatty() else 120)
    began = time.monotonic()
    protocol = PROTOCOLS[args.dataset]
    console.print(f"{args.dataset}: {protocol.reading}", soft_wrap=True)
    splits = read_splits(args)
    networks = open_networks(args)
    trained, device = networks[TRAINED], choose_device(args)
    sampling = ClipSampling(
        needs="audio",
        clips_per_file=args.clips or protocol.clips_per_file,
        clip_seconds=args.clip_seconds or protocol.clip_seconds,
    )
    config = listed_config(
        str(args.data), audio=trained.audio_config, batch_size=args.batch_size, num_workers=args.workers
    )
    files = union(splits)
    loader = ListedLoader(config, files, sampling, folder=str(args.data), pin_memory=device.type == "cuda")
    try:
        console.print(
            f"{len(loader.files):,} of {len(files):,} files, {len(loader):,} batches of {args.batch_size} clips",
            soft_wrap=True,
        )
        skipped = loader.skipped
        for name, reason in skipped:
            console.print(f"skipped {name}: {reason}", soft_wrap=True, markup=False)
        described = {
            "sampling": dataclasses.asdict(sampling),
            "audio": dataclasses.asdict(config.audio),
            "log-mel deltas": args.deltas,
        }
        state = loader.state_dict()
        identity = {
            "task": "audio-classification",
            "version": FEATURES_VERSION,
            "weights": {name: encoders.digest for name, encoders in networks.items()},
            "features": list(args.features),
            "clips": {name: value for name, value in state.items() if name not in ("epoch", "next_batch")},
            **described,
        }
        encode = clip_encoder(networks, args.features, device, deltas=args.deltas)
        features = extract_features(loader, encode, store_folder(args.out, identity), identity, say=say)
    finally:
        loader.close()
    for name, reason in Counter((record.shard, record.reason) for record in features.bad):
        console.print(f"bad clips of {name}: {reason}", soft_wrap=True, markup=False)

    tasks = fold_tasks(splits, features, protocol.official_folds, args.folds)
    results: list[Result] = []
    log_mel: list[FoldResult] | None = None

    def classify(name: str, kind: str) -> list[FoldResult]:
        say(f"{name}:")
        return classify_folds(
            features.arrays[name],
            features.video_ids,
            tasks,
            args.out / "audio-classifiers",
            {"features": identity_digest(identity), "name": name},
            kind=kind,
            classifier=args.classifier,
            seed=args.seed,
            say=say,
        )

    counts = {
        "num_videos": sum(len(task.test) for task in tasks),
        "num_clips": features.num_clips,
        "classes without training file": sum(
            len(set(task.classes) - set(task.train.values())) for task in tasks
        ),
        "classes without test file": sum(len(set(task.classes) - set(task.test.values())) for task in tasks),
        **count_skipped(skipped, features.bad),
    }
    usable = set(features.video_ids)
    counts["skipped no-usable-clip"] = sum(file.video_id not in usable for file in loader.files)

    def make_result(
        folds: list[FoldResult],
        name: str,
        kind: str,
        checkpoint: str,
        digest: str | None,
        baselines: dict[str, list[list[FoldResult]]],
    ) -> Result:
        metrics = {"top1": top1_metric(folds)}
        for baseline, outcomes in baselines.items():
            if outcomes:
                metrics[f"top1 above {baseline}"] = difference_metric(folds, outcomes)
        return Result(
            task="audio-classification",
            dataset=args.dataset,
            split=split_name(args.folds),
            protocol=protocol_name(args, sampling, kind),
            checkpoint=checkpoint,
            checkpoint_digest=digest,
            config={
                **described,
                "reading": protocol.reading,
                "features": name,
                "dimensions": features.arrays[name].shape[1],
                "classifier": args.classifier,
                "C": {fold.name: fold.C for fold in folds},
                "converged": {fold.name: fold.converged for fold in folds},
            },
            metrics=metrics,
            counts=counts,
            **stamp(time.monotonic() - began),
        )

    if args.log_mel:
        log_mel = classify(LOG_MEL, LOG_MEL)
        what = "log-mel statistics" + (" and deltas" if args.deltas else "")
        results.append(make_result(log_mel, LOG_MEL, what, "none", None, {}))
        report(console, results[-1], args.results)
    for kind in args.features:
        untrained = {
            name: classify(f"{name} {kind}", kind) for name in networks if name != TRAINED
        }  # random N -> folds
        folds = classify(f"{TRAINED} {kind}", kind)
        for name, outcomes in untrained.items():
            digest = networks[name].digest
            results.append(make_result(outcomes, f"{name} {kind}", kind, "random", digest, {}))
            report(console, results[-1], args.results)
        results.append(
            make_result(
                folds,
                f"{TRAINED} {kind}",
                kind,
                "random" if args.checkpoint.startswith(RANDOM) else trained.source,
                trained.digest,
                {
                    "random weights": list(untrained.values()),
                    "log-mel statistics": [] if log_mel is None else [log_mel],
                },
            )
        )
        report(console, results[-1], args.results)
    return results


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add_common_arguments(parser)
    parser.add_argument("--dataset", choices=tuple(PROTOCOLS), required=True, help="what --data holds")
    parser.add_argument(
        "--features",
        nargs="+",
        choices=KINDS,
        default=["map"],
        help="what the classifier sees of the encoder's map; several are read in one pass (default: map)",
    )
    parser.add_argument(
        "--classifier", choices=("logistic", "svm"), default="logistic", help="default: logistic"
    )
    parser.add_argument("--folds", nargs="+", help="such as 1 2 (default: all)")
    parser.add_argument("--clips", type=int, help="clips per file (default: 10, DCASE 60)")
    parser.add_argument("--clip-seconds", type=float, help="length of a clip (default: 2, DCASE 1)")
    parser.add_argument(
        "--random-networks",
        type=int,
        default=1,
        help="networks with fresh weights to compare with, of --random-seed and the seeds after it (default: 1)",
    )
    parser.add_argument(
        "--log-mel",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="compare with the mean and standard deviation of each mel band (default: yes)",
    )
    parser.add_argument("--deltas", action="store_true", help="and of the differences of neighboring steps")
    parser.add_argument("--seed", type=int, default=0, help="of folds that are drawn, and of the SVM")
    parser.add_argument("--max-files", type=int, help="of each class and fold, for a quick look")
    args = parser.parse_args(argv)
    args.features = tuple(dict.fromkeys(args.features))
    known = DATASETS[args.dataset].splits
    args.folds = known if args.folds is None else tuple(dict.fromkeys(args.folds))
    if not set(args.folds) <= set(known):
        parser.error(f"--folds is {' '.join(args.folds)!r}, expected some of {', '.join(known)}")
    for name in ("clips", "clip_seconds", "max_files"):
        if getattr(args, name) is not None and getattr(args, name) <= 0:
            parser.error(f"--{name.replace('_', '-')} is {getattr(args, name)}, expected more than 0")
    if args.random_networks < 0:
        parser.error(f"--random-networks is {args.random_networks}, expected at least 0")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; 0 when the results were written."""
    args = parse(argv)
    return run("classify_audio", lambda: evaluate(args))


if __name__ == "__main__":
    sys.exit(main())
