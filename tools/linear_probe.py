"""Linear classification of actions on frozen features: UCF101 and HMDB51 on their official splits.

    python -m tools.linear_probe runs/k400 --data UCF101 --splits 1 2 3

A video's feature is the mean over 10 uniform clips of v (section 3.1) averaged over time and place, as in
tools.retrieve, whose kept features serve here too. A logistic regression (or a linear SVM) on standardised features is
fitted to the training videos; its C is chosen by cross-validation among them, in folds that never part videos cut from
one source. Test videos have no part in any of it. The same network with random weights is measured on the same clips
beside it.

Choice: the paper has no such figure. It tells how much of the classes is in the features as they are, in minutes where
fine-tuning takes a day.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from collections import Counter
from collections.abc import Sequence

import numpy as np
from rich.console import Console

from cmac.evaluation.intervals import paired_difference_interval
from cmac.evaluation.metrics import average_clips
from cmac.evaluation.probe import C_GRID, LinearProbe, fit_linear_probe, source_group
from cmac.evaluation.results import Metric, Result, stamp
from loaders.datasets import DATASETS, ClassificationSplit, read_split
from loaders.listed import ClipSampling
from tools.common import add_common_arguments, count_skipped, report, run
from tools.finetune import describe_split, split_counts, split_metrics
from tools.retrieve import (
    TRAINED,
    UNTRAINED,
    Extracted,
    bad_clips,
    extract,
    is_random,
    limited,
    mean_of_splits,
    union,
    unusable,
)

TASK = "linear-probe"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rows:
    """Features of some videos: a row per video, or per clip."""

    features: np.ndarray
    """float32 (N, C)."""
    video_ids: list[str]
    labels: list[str]


def rows_of(extracted: Extracted, name: str, videos: set[str], per_clip: bool) -> Rows:
    """A network's features of these videos, of those that gave any."""
    features = extracted.features
    if per_clip:
        values, video_ids, labels = features.arrays[name], features.video_ids, features.labels
    else:
        values, video_ids, labels = features.mean_per_video(name)
    kept = [row for row, video in enumerate(video_ids) if video in videos]
    return Rows(
        features=values[kept],
        video_ids=[video_ids[row] for row in kept],
        labels=[labels[row] for row in kept],
    )


def fit(train: Rows, args: argparse.Namespace) -> LinearProbe:
    """A linear classifier on the training videos' features; see `fit_linear_probe`."""
    return fit_linear_probe(
        train.features,
        train.labels,
        groups=[source_group(video, label) for video, label in zip(train.video_ids, train.labels)],
        items=train.video_ids,
        classifier=args.classifier,
        candidates=C_GRID if args.C is None else (args.C,),
        seed=args.seed,
    )


def class_scores(probe: LinearProbe, features: np.ndarray, classes: Sequence[str]) -> np.ndarray:
    """float64 (N, all classes): a class without training video comes behind all others."""
    own = probe.scores(features)
    scores = np.full((len(own), len(classes)), own.min() - 1 if probe.classifier == "svm" else 0.0)
    scores[:, [classes.index(name) for name in probe.classes]] = own
    return scores


def protocol_name(args: argparse.Namespace) -> str:
    """`10x32f logistic`, `10x1s svm, 3 crops, per clip, at most 40 videos`."""
    length = "32f" if args.clip_seconds is None else f"{args.clip_seconds:g}s"
    parts = [f"{args.clips}x{length} {args.classifier}"]
    if args.C is not None:
        parts.append(f"C {args.C:g}")
    if args.crops == 3:
        parts.append("3 crops")
    if args.per_clip:
        parts.append("per clip")
    if args.max_videos is not None:
        parts.append(f"at most {args.max_videos} videos")
    return ", ".join(parts)


def probe_split(
    args: argparse.Namespace, extracted: Extracted, split: ClassificationSplit, seconds: float
) -> dict[str, Result]:
    """The Result of each network on one split. seconds: that reading took, of which each split counts its share."""
    train_skipped, test_skipped = (unusable(videos, extracted) for videos in (split.train, split.test))
    train_ids, test_ids = ({video.video_id for video in videos} for videos in (split.train, split.test))
    read = Counter(extracted.features.video_ids)
    bad = bad_clips((*split.train, *split.test), extracted.features)
    counts = {
        **split_counts(split, train_skipped, test_skipped),
        "num_clips": sum(count for video, count in read.items() if video in train_ids | test_ids),
        **count_skipped((), bad),
    }
    results, hits, groups = {}, {}, []
    for name, encoders in extracted.networks.items():
        began = time.monotonic()
        train = rows_of(extracted, name, train_ids, args.per_clip)
        test = rows_of(extracted, name, test_ids, args.per_clip)
        probe = fit(train, args)
        scores = class_scores(probe, test.features, split.classes)
        metrics, _ = split_metrics(scores, test.video_ids, test.labels, split, train_skipped, "raw")
        if probe.fold_accuracies:
            metrics["training folds"] = Metric(value=probe.fold_accuracies[probe.C])
        numbers = [split.classes.index(label) for label in test.labels]
        predictions = average_clips(scores, test.video_ids, numbers, "raw")
        hits[name] = predictions.correct().astype(float).tolist()
        groups = [
            source_group(video, split.classes[n])
            for video, n in zip(predictions.video_ids, predictions.labels)
        ]
        results[name] = Result(
            task=TASK,
            dataset=split.name,
            split=split.split,
            protocol=protocol_name(args),
            checkpoint="random" if name == UNTRAINED or is_random(args) else encoders.source,
            checkpoint_digest=encoders.digest,
            config={
                **extracted.config,
                "weights": encoders.source,
                "classifier": args.classifier,
                "per_clip": args.per_clip,
                "seed": args.seed,
                "chosen": [
                    {
                        "C": probe.C,
                        "fold_accuracies": {f"{c:g}": value for c, value in probe.fold_accuracies.items()},
                        "num_folds": probe.num_folds,
                        "converged": probe.converged,
                    }
                ],
            },
            metrics=metrics,
            counts=counts,
            **stamp(seconds + time.monotonic() - began),
        )
    if UNTRAINED in hits:
        results[TRAINED].metrics["top1 above random weights"] = Metric(
            value=float(np.mean(hits[TRAINED]) - np.mean(hits[UNTRAINED])),
            interval=paired_difference_interval(hits[TRAINED], hits[UNTRAINED], groups),
        )
    return results


def evaluate(args: argparse.Namespace) -> list[Result]:
    """Does it all; returns what was appended to --results."""
    began = time.monotonic()
    console = Console(width=None if sys.stdout.isatty() else 120)
    splits = [limited(read_split(args.dataset, args.data, split), args.max_videos) for split in args.splits]
    sampling = ClipSampling(
        needs="video", clips_per_file=args.clips, clip_seconds=args.clip_seconds, num_crops=args.crops
    )

    def check(skipped: dict[str, str]) -> None:
        for split in splits:
            parts = {
                part: tuple(
                    (v.video_id, skipped[v.video_id]) for v in getattr(split, part) if v.video_id in skipped
                )
                for part in ("train", "test")
            }
            for line in describe_split(split, parts):
                console.print(line, soft_wrap=True, markup=False)
            trainable = Counter(video.label for video in split.train if video.video_id not in skipped)
            num_tests = len(split.test) - len(parts["test"])
            if len(trainable) < 2 or num_tests == 0:
                raise ValueError(
                    f"{args.data}: split {split.split} has usable training videos of {len(trainable)} class(es) and "
                    f"{num_tests} usable test videos, expected at least 2 and 1"
                )
            if args.C is None and max(trainable.values()) < 2:
                raise ValueError(
                    f"{args.data}: split {split.split} has one usable training video per class at most, expected more "
                    "to choose C by cross-validation; name it (--C 1)"
                )

    videos = union([part for split in splits for part in (split.train, split.test)])
    extracted = extract(args, console, videos, sampling, check)
    seconds = (time.monotonic() - began) / len(splits)
    each = [probe_split(args, extracted, split, seconds) for split in splits]
    if len(each) == len(DATASETS[args.dataset].splits):
        mean = mean_of_splits(each)
        each.append(
            {
                name: dataclasses.replace(
                    result,
                    config={
                        **result.config,
                        "chosen": [one for split in each for one in split[name].config["chosen"]],
                    },
                    seconds=sum(split[name].seconds for split in each),
                )
                for name, result in mean.items()
            }
        )
    results = [result for split in each for result in split.values()]
    for result in results:
        report(console, result, args.results)
    return results


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add_common_arguments(parser)
    names = [name for name, dataset in DATASETS.items() if dataset.streams == "video"]
    parser.add_argument("--dataset", choices=names, default=names[0], help=f"default: {names[0]}")
    parser.add_argument(
        "--splits", nargs="+", default=["1"], help="such as 1 2 3, with their mean (default: 1)"
    )
    parser.add_argument("--clips", type=int, default=10, help="uniform clips per video (default: 10)")
    parser.add_argument(
        "--clip-seconds",
        type=float,
        help="length of a clip; 1.0 is that of pretraining (default: 32 consecutive frames of the source)",
    )
    parser.add_argument(
        "--crops", type=int, choices=(1, 3), default=1, help="per clip (default: 1, the center)"
    )
    parser.add_argument(
        "--classifier", choices=("logistic", "svm"), default="logistic", help="default: logistic regression"
    )
    parser.add_argument(
        "--C", type=float, help="inverse regularisation strength (default: chosen among the training videos)"
    )
    parser.add_argument(
        "--per-clip",
        action="store_true",
        help="fit to clips, test by the mean of a video's clips' scores (default: to videos' mean features)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the folds (default: 0)")
    parser.add_argument(
        "--baseline-random",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="also the same network with fresh weights of --random-seed, on the same clips (default: yes)",
    )
    parser.add_argument(
        "--max-videos", type=int, help="at most so many videos for training and for test, for a quick look"
    )
    parser.set_defaults(cross_modal=False)  # what tools.retrieve's extraction asks for
    args = parser.parse_args(argv)
    args.splits = tuple(dict.fromkeys(args.splits))
    if args.max_videos is not None and args.max_videos < 1:
        parser.error(f"--max-videos is {args.max_videos}, expected at least 1")
    if args.C is not None and args.C <= 0:
        parser.error(f"--C is {args.C}, expected more than 0")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; 0 when the results were written."""
    args = parse(argv)
    return run("linear_probe", lambda: evaluate(args))


if __name__ == "__main__":
    sys.exit(main())
