"""Retrieval with frozen networks: of a video's class (paper section 4.2, Table 5), and of a picture's sound.

    python -m tools.retrieve runs/k400 --data UCF101
    python -m tools.retrieve runs/k400 --data UCF101 --cross-modal
    python -m tools.retrieve runs/demo --data runs/demo/world/test --cross-modal

By class: each test video of the split asks for the training videos nearest to it (cosine); R@k is the share of test
videos with one of their own class among the k nearest. A video's feature is the mean over 10 uniform clips of v
(section 3.1) averaged over time and place.

Across modalities: each video's picture asks for the sounds nearest to it, and the other way round; R@k is the share
that finds its own among N. It needs a whole CMAC model, as the embeddings are those of Eq. (7).

The same network with random weights is measured on the same clips beside it. What was read is kept below --out: a run
that was killed goes on where it was.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np
import torch
from rich.console import Console

from cmac.evaluation.features import Features, extract_features, store_folder
from cmac.evaluation.intervals import paired_difference_interval
from cmac.evaluation.metrics import mean_over_splits
from cmac.evaluation.probe import source_group
from cmac.evaluation.results import MEAN_OF_THREE_SPLITS, Metric, Result, stamp
from cmac.evaluation.retrieval import (
    CLASS_KS,
    CROSS_MODAL_KS,
    FEATURES_VERSION,
    class_ranks,
    class_recall_metrics,
    cross_modal_embeddings,
    cross_modal_metrics,
    pooled_video_features,
    unit_rows,
)
from cmac.weights import Encoders, weights_digest
from loaders.batch import BadClipRecord
from loaders.datasets import DATASETS, ClassificationSplit, detect_datasets, read_split
from loaders.listed import ClipSampling, ListedLoader, listed_config
from shards.sources import SourceVideo, videos_of_folder, with_hashes
from tools.common import (
    RANDOM,
    add_common_arguments,
    choose_device,
    count_skipped,
    open_encoders,
    random_encoders,
    report,
    run,
    say,
)

CROSS_MODAL_SECONDS = 1.0
"""As in pretraining (section 4.1)."""
TRAINED, UNTRAINED = "trained", "random"


def evenly(videos: Sequence[SourceVideo], most: int | None) -> list[SourceVideo]:
    """At most so many of the videos, spread over the list, whose order is that of the classes; None: all."""
    if most is None or len(videos) <= most:
        return list(videos)
    return [videos[place] for place in np.linspace(0, len(videos) - 1, most).round().astype(int)]


def limited(split: ClassificationSplit, most: int | None) -> ClassificationSplit:
    """The split with at most so many videos for training and for test."""
    train, test = (tuple(evenly(videos, most)) for videos in (split.train, split.test))
    kept = {video.video_id for video in train + test}
    missing = tuple(name for name in split.missing if name in kept)
    return dataclasses.replace(split, train=train, test=test, missing=missing)


def union(parts: Sequence[Sequence[SourceVideo]]) -> list[SourceVideo]:
    """Each video of the parts once, in the order of their names: what one split trains on another tests."""
    rows = {video.video_id: (video.video_id, video.path, video.label) for part in parts for video in part}
    return with_hashes(rows[name] for name in sorted(rows))


def protocol_name(sampling: ClipSampling, args: argparse.Namespace) -> str:
    """`10x32f` (clips, consecutive frames of the source), `10x1s, 3 crops, at most 8 videos`."""
    length = "32f" if sampling.clip_seconds is None else f"{sampling.clip_seconds:g}s"
    parts = [f"{sampling.clips_per_file}x{length}"]
    if sampling.num_crops == 3:
        parts.append("3 crops")
    if args.cross_modal and args.per_clip:
        parts.append("per clip")
    if args.max_videos is not None:
        parts.append(f"at most {args.max_videos} videos")
    return ", ".join(parts)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Extracted:
    """What was read of the videos, by all networks."""

    features: Features
    networks: dict[str, Encoders]
    """`trained` (the one asked for) and, for comparison, `random`."""
    skipped: dict[str, str]
    """video_id -> reason, of videos that give no clips."""
    config: dict
    """For the results."""


def extract(
    args: argparse.Namespace,
    console: Console,
    videos: Sequence[SourceVideo],
    sampling: ClipSampling,
    check: Callable[[dict[str, str]], None],
) -> Extracted:
    """Features of all networks of the videos' clips, each clip read once. Goes on where an earlier run was.

    check: called with the videos that give no clips, and why, before the first clip is read; raises ValueError where
    what is left is of no use.
    """
    device = choose_device(args)
    networks = {TRAINED: open_encoders(args)}
    trained = networks[TRAINED]
    if args.baseline_random and not is_random(args):
        networks[UNTRAINED] = random_encoders(args)
    encode = (cross_modal_embeddings if args.cross_modal else pooled_video_features)(networks, device)
    config = listed_config(
        str(args.data),
        video=trained.video_config,
        audio=trained.audio_config,
        batch_size=args.batch_size,
        num_workers=args.workers,
    )
    loader = ListedLoader(
        config, videos, sampling, folder=str(args.data), pin_memory=device.type == "cuda", cache=None
    )
    try:
        skipped = dict(loader.skipped)
        check(skipped)
        console.print(
            f"{len(loader.files):,} videos of {args.data}, {len(loader):,} batches of {config.global_batch_size} clips",
            soft_wrap=True,
            markup=False,
        )
        order = {
            name: value for name, value in loader.state_dict().items() if name not in ("epoch", "next_batch")
        }
        described = {
            "sampling": dataclasses.asdict(sampling),
            "video": dataclasses.asdict(config.video),
            "audio": dataclasses.asdict(config.audio) if args.cross_modal else None,
        }
        identity = {
            "task": "cross-modal-retrieval" if args.cross_modal else "video-retrieval",
            "version": FEATURES_VERSION,
            # Heads and g are part of what the embeddings come from, but not of the encoders' digest.
            "weights": {
                name: weights_digest(net.model, None) if args.cross_modal else net.digest
                for name, net in networks.items()
            },
            "pixels": [trained.pixel_mean, trained.pixel_std],
            "clips": order,
            **described,
        }
        features = extract_features(loader, encode, store_folder(args.out, identity), identity, say=say)
    finally:
        loader.close()
    return Extracted(features=features, networks=networks, skipped=skipped, config=described)


def is_random(args: argparse.Namespace) -> bool:
    """Whether the network asked for has fresh weights itself."""
    return args.checkpoint.startswith(RANDOM)


def unusable(videos: Sequence[SourceVideo], extracted: Extracted) -> list[tuple[str, str]]:
    """(video_id, reason) of the videos that gave no feature; `no-usable-clip`: each of its clips was bad."""
    usable = set(extracted.features.video_ids)
    names = [video.video_id for video in videos if video.video_id not in usable]
    return [(name, extracted.skipped.get(name, "no-usable-clip")) for name in names]


def bad_clips(videos: Sequence[SourceVideo], features: Features) -> list[BadClipRecord]:
    """The videos' clips that could not be used. A video's feature is the mean over its others."""
    names = {video.video_id for video in videos}
    return [record for record in features.bad if record.shard in names]


def make_results(
    args: argparse.Namespace,
    extracted: Extracted,
    metrics: dict[str, dict[str, Metric]],
    gallery: int,
    **fields,
) -> dict[str, Result]:
    """A Result for each network; `fields` are those that all have alike."""
    config = {
        **extracted.config,
        "ks": list(args.ks),
        "gallery": gallery,
        "ks above gallery": [k for k in args.ks if k > gallery],
    }
    return {
        name: Result(
            checkpoint="random" if name == UNTRAINED or is_random(args) else encoders.source,
            checkpoint_digest=encoders.digest,
            config={**config, "weights": encoders.source},
            metrics=metrics[name],
            **fields,
        )
        for name, encoders in extracted.networks.items()
    }


def class_results(
    args: argparse.Namespace, extracted: Extracted, split: ClassificationSplit, protocol: str
) -> dict[str, Result]:
    """The Result of each network on one split (paper section 4.2, Table 5)."""
    features = extracted.features
    usable = set(features.video_ids)
    query, gallery = ([v for v in videos if v.video_id in usable] for videos in (split.test, split.train))
    labels = [video.label for video in query]
    sources = [source_group(video.video_id, video.label) for video in query]  # what intervals resample
    gallery_labels = [video.label for video in gallery]
    read = Counter(features.video_ids)
    counts = {
        "num_videos": len(query),
        "num_gallery_videos": len(gallery),
        "num_clips": sum(read[video.video_id] for video in (*query, *gallery)),
        "queries without their class in the gallery": sum(
            label not in set(gallery_labels) for label in labels
        ),
        "classes without query": len(set(split.classes) - set(labels)),
        "classes without gallery": len(set(split.classes) - set(gallery_labels)),
        **count_skipped(unusable(split.test, extracted), bad_clips((*split.test, *split.train), features)),
        **count_skipped((name, f"gallery {reason}") for name, reason in unusable(split.train, extracted)),
    }
    metrics, hits = {}, {}
    for name in extracted.networks:
        means, video_ids, _ = features.mean_per_video(name)  # (V, C)
        rows = {video_id: row for row, video_id in enumerate(video_ids)}
        of_query, of_gallery = (
            torch.from_numpy(means[[rows[video.video_id] for video in videos]]) for videos in (query, gallery)
        )
        metrics[name] = class_recall_metrics(of_query, sources, labels, of_gallery, gallery_labels, args.ks)
        hits[name] = (class_ranks(of_query, labels, of_gallery, gallery_labels) <= 1).double().tolist()
    if UNTRAINED in hits:
        metrics[TRAINED]["R@1 above random weights"] = Metric(
            value=float(np.mean(hits[TRAINED]) - np.mean(hits[UNTRAINED])),
            interval=paired_difference_interval(hits[TRAINED], hits[UNTRAINED], sources),
        )
    return make_results(
        args,
        extracted,
        metrics,
        len(gallery),
        task="video-retrieval",
        dataset=split.name,
        split=split.split,
        protocol=protocol,
        counts=counts,
        **stamp(extracted.features.seconds),
    )


def cross_modal_results(
    args: argparse.Namespace,
    extracted: Extracted,
    videos: Sequence[SourceVideo],
    dataset: str,
    split: str,
    protocol: str,
) -> dict[str, Result]:
    """The Result of each network over all videos that have picture and sound."""
    features = extracted.features
    metrics = {}
    for name in extracted.networks:
        if args.per_clip:
            video_ids, labels = features.video_ids, features.labels
            embeddings = [features.arrays[f"{name}_{modality}"] for modality in "va"]
        else:
            pooled = [features.mean_per_video(f"{name}_{modality}") for modality in "va"]
            _, video_ids, labels = pooled[0]
            embeddings = [means for means, _, _ in pooled]
        rows = [unit_rows(torch.from_numpy(part), "embedding") for part in embeddings]  # (N, D) each
        sources = [source_group(video, label) for video, label in zip(video_ids, labels)]
        metrics[name] = cross_modal_metrics(*rows, sources, args.ks)
    counts = {
        "num_videos": len(set(video_ids)),
        "num_gallery_rows": len(video_ids),
        "num_clips": len(features.video_ids),
        **count_skipped(unusable(videos, extracted), bad_clips(videos, features)),
    }
    return make_results(
        args,
        extracted,
        metrics,
        len(video_ids),
        task="cross-modal-retrieval",
        dataset=dataset,
        split=split,
        protocol=protocol,
        counts=counts,
        **stamp(extracted.features.seconds),
    )


def choose_dataset(args: argparse.Namespace) -> str | None:
    """The labelled dataset that --data holds; None: a folder of videos, for --cross-modal.

    Raises:
        ValueError: it holds none and one is needed, or several.
    """
    if args.dataset is not None:
        return None if args.dataset == "folder" else args.dataset
    found = [name for name in detect_datasets(args.data) if DATASETS[name].streams == "video"]
    if len(found) > 1:
        raise ValueError(f"{args.data} holds {' and '.join(found)}; say which with --dataset")
    if not found and not args.cross_modal:
        raise ValueError(
            f"{args.data} holds neither UCF101 (ucfTrainTestlist/classInd.txt) nor HMDB51 "
            f"(testTrainMulti_7030_splits/*_test_split1.txt), expected one of them; check --data"
        )
    return found[0] if found else None


def retrieve_classes(args: argparse.Namespace, console: Console, dataset: str) -> list[dict[str, Result]]:
    """Retrieval by class on each of --splits, and their mean where these are all three."""
    splits = [limited(read_split(dataset, args.data, split), args.max_videos) for split in args.splits]
    sampling = ClipSampling(
        needs="video", clips_per_file=args.clips, clip_seconds=args.clip_seconds, num_crops=args.crops
    )

    def check(skipped: dict[str, str]) -> None:
        for split in splits:
            for what, videos in (("test", split.test), ("training", split.train)):
                if all(video.video_id in skipped for video in videos):
                    reasons = Counter(skipped[video.video_id] for video in videos)
                    counted = (
                        ", ".join(f"{reason} {count}" for reason, count in reasons.items()) or "none listed"
                    )
                    raise ValueError(
                        f"{args.data}: no {what} video of split {split.split} can be used ({counted}), expected "
                        f"at least one"
                    )

    videos = union([part for split in splits for part in (split.train, split.test)])
    extracted = extract(args, console, videos, sampling, check)
    protocol = protocol_name(sampling, args)
    results = [class_results(args, extracted, split, protocol) for split in splits]
    if len(results) == len(DATASETS[dataset].splits):
        results.append(mean_of_splits(results))
    return results


def mean_of_splits(results: Sequence[dict[str, Result]]) -> dict[str, Result]:
    """Results of the splits averaged; counts are sums."""
    return {
        name: dataclasses.replace(
            result,
            split=MEAN_OF_THREE_SPLITS,
            metrics=mean_over_splits([each[name].metrics for each in results]),
            counts=dict(sum((Counter(each[name].counts) for each in results), Counter())),
        )
        for name, result in results[0].items()
    }


def retrieve_across(
    args: argparse.Namespace, console: Console, dataset: str | None
) -> list[dict[str, Result]]:
    """Cross-modal retrieval among the test videos of each of --splits, or among all videos of a folder."""
    if dataset is None:
        parts = [(args.name or args.data.resolve().name, "all", videos_of_folder(str(args.data)))]
    else:
        parts = [(dataset, split, read_split(dataset, args.data, split).test) for split in args.splits]
    sampling = ClipSampling(
        needs="both",
        clips_per_file=args.clips,
        clip_seconds=CROSS_MODAL_SECONDS if args.clip_seconds is None else args.clip_seconds,
        num_crops=args.crops,
    )
    results = []
    for name, split, videos in parts:
        videos = evenly(videos, args.max_videos)
        extracted = extract(args, console, videos, sampling, lambda skipped: None)
        protocol = protocol_name(sampling, args)
        results.append(cross_modal_results(args, extracted, videos, name, split, protocol))
    return results


def notes(result: Result) -> list[str]:
    """What a table of figures does not tell, for the reader."""
    lines = []
    above = result.config["ks above gallery"]
    if above:
        lines.append(
            f"{', '.join(f'R@{k}' for k in above)}: the gallery has only {result.config['gallery']}, so all of it is "
            "among the nearest"
        )
    lost = result.counts.get("queries without their class in the gallery", 0)
    if lost:
        lines.append(
            f"{lost} of {result.counts['num_videos']} queries have no video of their class in the gallery: counted as "
            "not found, in chance too"
        )
    return lines


def evaluate(args: argparse.Namespace) -> list[Result]:
    """Does it all; returns what was appended to --results."""
    console = Console(width=None if sys.stdout.isatty() else 120)
    dataset = choose_dataset(args)
    if args.cross_modal:
        results = retrieve_across(args, console, dataset)
    else:
        results = retrieve_classes(args, console, dataset)
    for each in results:
        for result in each.values():
            report(console, result, args.results)
        for line in notes(each[TRAINED]):
            console.print(line, soft_wrap=True)
    return [result for each in results for result in each.values()]


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add_common_arguments(parser)
    parser.add_argument(
        "--dataset",
        choices=(*(name for name, dataset in DATASETS.items() if dataset.streams == "video"), "folder"),
        help="what --data holds; `folder`: all videos in it, for --cross-modal (default: what is found there)",
    )
    parser.add_argument("--name", help="what results call a folder of videos (default: the folder's name)")
    parser.add_argument(
        "--splits",
        nargs="+",
        default=["1"],
        help="of the dataset, such as 1 2 3 (default: 1, as in the paper)",
    )
    parser.add_argument("--clips", type=int, default=10, help="uniform clips per video (default: 10)")
    parser.add_argument(
        "--clip-seconds",
        type=float,
        help="length of a clip; 1.0 is that of pretraining (default: 32 consecutive frames of the source; "
        "1.0 with --cross-modal)",
    )
    parser.add_argument(
        "--crops", type=int, choices=(1, 3), default=1, help="per clip (default: 1, the center)"
    )
    parser.add_argument(
        "--cross-modal", action="store_true", help="find a picture's sound and a sound's picture"
    )
    parser.add_argument(
        "--per-clip", action="store_true", help="with --cross-modal: among clips instead of videos"
    )
    parser.add_argument(
        "--ks",
        nargs="+",
        type=int,
        help="numbers of nearest entries (default: 1 5 10 20 50; 1 5 10 with --cross-modal)",
    )
    parser.add_argument(
        "--baseline-random",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="also the same network with fresh weights of --random-seed, on the same clips (default: yes)",
    )
    parser.add_argument(
        "--max-videos", type=int, help="at most so many videos for training and for test, for a quick look"
    )
    args = parser.parse_args(argv)
    args.ks = tuple(dict.fromkeys(args.ks or (CROSS_MODAL_KS if args.cross_modal else CLASS_KS)))
    args.splits = tuple(dict.fromkeys(args.splits))
    if min(args.ks) < 1:
        parser.error(f"--ks has {min(args.ks)}, expected numbers of at least 1")
    if args.per_clip and not args.cross_modal:
        parser.error("--per-clip is for --cross-modal: by class, videos are compared")
    if args.per_clip and args.crops != 1:
        parser.error("--per-clip takes --crops 1: three crops of one clip would look for each other's sound")
    if args.dataset == "folder" and not args.cross_modal:
        parser.error("--dataset folder is for --cross-modal: by class, training and test videos are needed")
    if args.max_videos is not None and args.max_videos < 1:
        parser.error(f"--max-videos is {args.max_videos}, expected at least 1")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; 0 when the results were written."""
    args = parse(argv)
    return run("retrieve", lambda: evaluate(args))


if __name__ == "__main__":
    sys.exit(main())
