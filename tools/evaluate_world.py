"""Measure one pretrained (or untrained) model on held-out videos of the generated world, figures into one JSON file.

    python -m tools.evaluate_world --run RUN --world WORLD --shards-train TRAIN --shards-test TEST --out FIGURES.json
    python -m tools.evaluate_world --untrained demo --seed 1 ...

The analogue of the paper's downstream accuracy at the scale of minutes: a linear classifier on frozen features says
which category sounds. It learns on the videos that the model was pretrained on (without labels) and is tested on videos
that neither has seen. Beside it stand where the attention maps point and whether a clip's picture finds its sound.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cmac.checkpoint import build_model, newest_checkpoint, read_checkpoint
from cmac.config import PRESETS, VARIANTS, RunConfig, apply_variant
from cmac.evaluation.intervals import bootstrap_interval
from cmac.evaluation.probe import fit_linear_probe, mean_per_item
from cmac.evaluation.results import stamp
from cmac.evaluation.retrieval import class_recall_metrics
from cmac.evaluation.truth import Truth
from cmac.evaluation.world import ClipSet, encode_clips, evaluate_clips
from cmac.model import CMAC, Encoded
from shards.manifest import read_manifest, write_atomically
from tools.evaluate_demo import evaluation_loader_config, read_slots

PROBE_CANDIDATES = (1e-3, 1e-2, 1e-1, 1.0, 10.0)
"""Values of C that cross-validation within the training videos chooses from."""
ONE_SHOT_DRAWS = 20
"""Choices of one labelled video per category to average over."""


class PooledFeatures(torch.nn.Module):
    """A model that also keeps the mean over all positions of every feature map it gives."""

    def __init__(self, model: CMAC) -> None:
        super().__init__()
        self.model = model
        self._video: list[Tensor] = []
        self._audio: list[Tensor] = []

    def encode(self, frames: Tensor, log_mel: Tensor) -> Encoded:
        """`CMAC.encode`."""
        encoded = self.model.encode(frames, log_mel)
        self._video.append(encoded.feature_v.flatten(2).mean(dim=2).cpu())
        self._audio.append(encoded.feature_a.flatten(2).mean(dim=2).cpu())
        return encoded

    def take(self) -> dict[str, np.ndarray]:
        """`video` and `audio`, float32 (N, C), of all clips since the last call, in their order."""
        taken = {"video": torch.cat(self._video).numpy(), "audio": torch.cat(self._audio).numpy()}
        self._video, self._audio = [], []
        return taken


def probe_figure(
    train: tuple[ClipSet, np.ndarray],
    test: tuple[ClipSet, np.ndarray],
    wanted: Callable[[Truth], bool],
    num_categories: int,
    seed: int,
) -> dict[str, Any]:
    """Accuracy of a linear classifier of the sounding category, over test videos (mean probability of their clips).

    Args:
        train: clips and their features (N, C); C of the classifier is chosen by cross-validation over their videos.
        test: the same of the videos to be tested on.
        wanted: of which videos.
        num_categories: of the world, for chance.
        seed: of folds and interval.

    Raises:
        ValueError: no test video, or too few training videos.
    """
    rows = {}
    for name, (clips, features) in {"train": train, "test": test}.items():
        chosen = [row for row, truth in enumerate(clips.truths) if truth and truth.category and wanted(truth)]
        if not chosen:
            raise ValueError(
                f"none of {clips.num_clips} {name} clips is of a video whose category can be told; generate more "
                "videos"
            )
        videos = [clips.clips[row].video_id for row in chosen]
        labels = [clips.truths[row].category for row in chosen]
        rows[name] = features[chosen], videos, labels
    features, videos, labels = rows["train"]
    probe = fit_linear_probe(
        features, labels, items=videos, groups=videos, candidates=PROBE_CANDIDATES, seed=seed
    )
    test_features, test_videos, test_labels = rows["test"]
    scores, names, _ = mean_per_item(probe.scores(test_features), test_videos)
    truth = dict(zip(test_videos, test_labels))
    hits = [float(probe.classes[best] == truth[name]) for name, best in zip(names, scores.argmax(axis=1))]
    return {
        "value": float(np.mean(hits)),
        "interval": bootstrap_interval(hits, names, seed),
        "chance": 1 / num_categories,
        "num_videos": len(names),
        "num_clips": len(test_videos),
        "num_training_videos": len(set(videos)),
        "C": probe.C,
        "converged": probe.converged,
    }


def one_shot_figure(
    train: tuple[ClipSet, np.ndarray], test: tuple[ClipSet, np.ndarray], num_categories: int, seed: int
) -> dict[str, Any]:
    """As `probe_figure` with one labelled training video per category, over all test videos; mean of several draws.

    Timbres are told apart by linear classifiers of random features when there are many examples; with one per category
    it shows what a network has learnt. The draws are the same for all models.

    Choice: features are standardised over all training clips, which takes no labels; over the few that are drawn noise
    would count as much as what tells categories apart.
    """
    (clips, features), (test_clips, test_features) = train, test
    mean, scale = features.mean(axis=0), features.std(axis=0)
    scale = np.where(scale > 0, scale, 1)
    features, test_features = (features - mean) / scale, (test_features - mean) / scale
    by_category: dict[str, dict[str, list[int]]] = {}
    for row, truth in enumerate(clips.truths):
        if truth is not None and truth.category:
            videos = by_category.setdefault(truth.category, {})
            videos.setdefault(clips.clips[row].video_id, []).append(row)
    rows = [row for row, truth in enumerate(test_clips.truths) if truth is not None and truth.category]
    videos = [test_clips.clips[row].video_id for row in rows]
    truth = {video: test_clips.truths[row].category for video, row in zip(videos, rows)}
    rng = np.random.default_rng(0)
    hits: dict[str, list[float]] = {}
    for _ in range(ONE_SHOT_DRAWS):
        chosen, labels = [], []
        for category in sorted(by_category):
            of_video = list(by_category[category].values())[rng.integers(len(by_category[category]))]
            chosen += of_video
            labels += [category] * len(of_video)
        probe = fit_linear_probe(features[chosen], labels, candidates=(1.0,), standardize=False, seed=seed)
        scores, names, _ = mean_per_item(probe.scores(test_features[rows]), videos)
        for name, best in zip(names, scores.argmax(axis=1)):
            hits.setdefault(name, []).append(float(probe.classes[best] == truth[name]))
    means = [float(np.mean(values)) for values in hits.values()]
    return {
        "value": float(np.mean(means)),
        "interval": bootstrap_interval(means, list(hits), seed),
        "chance": 1 / num_categories,
        "num_videos": len(means),
        "num_clips": len(rows),
        "num_draws": ONE_SHOT_DRAWS,
    }


def category_retrieval_figure(
    train: tuple[ClipSet, np.ndarray], test: tuple[ClipSet, np.ndarray], seed: int
) -> dict[str, Any]:
    """Share of easy test videos whose nearest training video by video features (mean of clips) has the sounding
    category: the analogue of Table 5's R@1. Arguments as in `probe_figure`."""
    sides = []
    for clips, features in (train, test):
        rows = [row for row, truth in enumerate(clips.truths) if truth is not None and _is_seen(truth)]
        means, names, _ = mean_per_item(features[rows], [clips.clips[row].video_id for row in rows])
        labels = {clips.clips[row].video_id: clips.truths[row].category for row in rows}
        sides.append((torch.from_numpy(means), names, [labels[name] for name in names]))
    (gallery, _, gallery_labels), (query, names, labels) = sides
    metric = class_recall_metrics(query, names, labels, gallery, gallery_labels, (1,), seed)["R@1"]
    return {**dataclasses.asdict(metric), "num_videos": len(names), "gallery": len(gallery_labels)}


def _is_seen(truth: Truth) -> bool:
    """Whether sight can tell what sounds: nothing else moves."""
    return truth.part == "easy" and truth.sounding is not None


def load(args: argparse.Namespace) -> tuple[CMAC, RunConfig, dict[str, Any]]:
    """(model in eval mode, its configuration, where it came from)."""
    if args.run is not None:
        state = read_checkpoint(newest_checkpoint(args.run))
        config = state["config"]
        model = build_model(config)
        model.load_state_dict(state["model"])
        origin = {"run": str(args.run), "step": state["step"], "train_seconds": state["train_seconds"]}
    else:
        preset, _, variant = args.untrained.partition(":")
        if preset not in PRESETS:
            raise ValueError(f"{preset!r} is no preset, expected one of {', '.join(PRESETS)}")
        config = PRESETS[preset]()
        if variant:
            config = apply_variant(config, variant)
        torch.manual_seed(args.seed)  # the weights that `train.py PRESET --seed SEED` starts from
        model = build_model(config)
        origin = {"run": None, "step": 0, "train_seconds": 0.0}
    return model.eval(), config, origin


def evaluate(args: argparse.Namespace) -> dict[str, Any]:
    """All figures of one model."""
    started = time.monotonic()
    device = torch.device("cuda" if torch.cuda.is_available() and args.device != "cpu" else "cpu")
    model, config, origin = load(args)
    pooled = PooledFeatures(model.to(device)).eval()
    sets: dict[str, ClipSet] = {}
    features: dict[str, dict[str, np.ndarray]] = {}
    sources = {
        "train": (args.shards_train, args.world / "train", args.train_slots),
        "test": (args.shards_test, args.world / "test", args.test_slots),
    }
    for name, (shards, folder, num_slots) in sources.items():
        num_slots = min(num_slots, read_manifest(shards).num_slots)
        loader = evaluation_loader_config(config.loader, shards, args.batch_size, args.workers)
        with contextlib.closing(read_slots(loader, num_slots)) as batches:
            sets[name] = encode_clips({"trained": pooled}, batches, world=folder, device=device)
        if all(truth is None for truth in sets[name].truths):
            raise ValueError(
                f"{folder}: no ground truth for any clip of {shards}; give the world that was sliced"
            )
        features[name] = pooled.take()
    categories = {truth.category for clips in sets.values() for truth in clips.truths if truth} - {None}
    figures = evaluate_clips(
        sets["test"], config.loader.audio, num_retrieval_clips=args.retrieval_clips, seed=args.seed
    ).figures

    def probe(modality: str, wanted: Callable[[Truth], bool]) -> dict[str, Any]:
        train = sets["train"], features["train"][modality]
        return probe_figure(
            train, (sets["test"], features["test"][modality]), wanted, len(categories), args.seed
        )

    # Choice: the picture's classifier sees the easy part alone; in the hard part sight cannot tell what sounds.
    figures["probe_video"] = probe("video", _is_seen)
    figures["probe_audio"] = probe("audio", lambda truth: True)
    figures["probe_audio_1shot"] = one_shot_figure(
        (sets["train"], features["train"]["audio"]),
        (sets["test"], features["test"]["audio"]),
        len(categories),
        args.seed,
    )
    figures["category_video_r1"] = category_retrieval_figure(
        (sets["train"], features["train"]["video"]), (sets["test"], features["test"]["video"]), args.seed
    )
    return {
        "figures": {
            name: {key: value for key, value in figure.items() if key != "untrained"}
            for name, figure in figures.items()
        },
        "origin": origin,
        "seed": args.seed,
        "num_clips": {name: clips.num_clips for name, clips in sets.items()},
        "num_bad_clips": {name: clips.num_bad for name, clips in sets.items()},
        "parts": dict(Counter(truth.part for truth in sets["test"].truths if truth is not None)),
        **stamp(time.monotonic() - started),
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; 0 when the figures were written."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--run", type=Path, help="folder of a run (holds checkpoints/)")
    model.add_argument(
        "--untrained",
        metavar="PRESET[:VARIANT]",
        help=f"the network of a preset with fresh weights of --seed; variants: {', '.join(VARIANTS)}",
    )
    parser.add_argument("--seed", type=int, default=0, help="of fresh weights, folds and intervals")
    parser.add_argument("--world", type=Path, required=True, help="folder that make_world wrote")
    parser.add_argument("--shards-train", type=Path, required=True, help="shards of WORLD/train")
    parser.add_argument("--shards-test", type=Path, required=True, help="shards of WORLD/test")
    parser.add_argument(
        "--train-slots", type=int, default=2, help="seconds of each training video (default: 2)"
    )
    parser.add_argument("--test-slots", type=int, default=2, help="seconds of each test video (default: 2)")
    parser.add_argument("--retrieval-clips", type=int, default=256, help="gallery (default: 256)")
    parser.add_argument("--batch-size", type=int, default=32, help="clips per batch (default: 32)")
    parser.add_argument("--workers", type=int, default=1, help="processes that decode clips (default: 1)")
    parser.add_argument("--device", choices=("auto", "cpu"), default="auto")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    args = parser.parse_args(argv)
    for name in ("train_slots", "test_slots", "retrieval_clips", "batch_size"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} is {getattr(args, name)}, expected at least 1")
    try:
        found = evaluate(args)
        args.out.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(args.out, (json.dumps(found, indent=2, allow_nan=False) + "\n").encode())
    except (ValueError, OSError) as error:
        print(f"evaluate_world: {error}", file=sys.stderr)
        return 1
    for name, figure in found["figures"].items():
        if not name.endswith(("_r5", "_r10")) and figure["value"] is not None:
            print(f"{name:32}{100 * figure['value']:6.1f} %  chance {100 * figure['chance']:.1f} %")
    print(f"figures: {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
