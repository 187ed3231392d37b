"""Action recognition (section 4.2): fine-tune an encoder on UCF101 or HMDB51 and test it on their official splits.

    python -m tools.finetune PRESET --checkpoint PATH --data FOLDER [--field value ...]

`--help` lists the presets, `PRESET --help` every field with its meaning and default. `--checkpoint random:PATH` is the
same network with fresh weights, `scratch` a fresh one of the fields `encoder`: chance and random weights belong beside
every figure. Killed and started again with the same arguments it goes on where it was. One process, one device;
`--splits 1`, `--splits 2` and `--splits 3` may run side by side with one `--out`.

The result is the accuracy after the last epoch. That of the best epoch, which others report, is chosen on the test
videos; it stands beside it and says so.
Test videos that cannot be used (missing, shorter than 32 frames, undecodable) are counted by reason and left out of
`top1`; in `top1 skipped as wrong` each of them is wrong.
"""

import contextlib
import dataclasses
import difflib
import inspect
import json
import math
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import tyro
from rich.console import Console

import cmac
from cmac.compute import ComputeConfig
from cmac.evaluation.features import extract_features
from cmac.evaluation.intervals import bootstrap_interval
from cmac.evaluation.metrics import accuracy_metric, average_clips, mean_over_splits
from cmac.evaluation.probe import source_group
from cmac.evaluation.results import MEAN_OF_THREE_SPLITS, Metric, Result, read_results, stamp
from cmac.finetune import (
    PRESETS,
    EpochTest,
    FinetuneConfig,
    Finetuning,
    VideoClassifier,
    build_classifier,
    check_same_run,
    finetune,
    fixed_fields,
    predictions_folder,
    protocol_name,
    resolve_finetune_compute,
)
from cmac.pretrain import record_bad_clips
from cmac.weights import Encoders, weights_digest
from loaders.base import TooManyBadClips
from loaders.config import LoaderConfig
from loaders.datasets import DATASETS, ClassificationSplit, read_split
from loaders.listed import ClipSampling, ListedLoader, listed_config
from shards.lock import take_lock
from shards.manifest import write_atomically
from shards.pool import usable_cores
from shards.progress import print_any_name
from tools.common import RANDOM, count_skipped, report, say
from tools.retrieve import limited

SCRATCH = "scratch"
TASK = "action-recognition"
BEST_EPOCH = "top1 best epoch (chosen on test)"


def parse(arguments: Sequence[str]) -> FinetuneConfig:
    """The configuration that a command line asks for. Prints help or what is wrong, and exits, as command lines do."""
    name = arguments[0] if arguments else None
    if name in PRESETS:
        description = inspect.getdoc(PRESETS[name])
        return tyro.cli(
            FinetuneConfig,
            default=PRESETS[name](),
            prog=f"tools.finetune {name}",
            description=description,
            args=list(arguments[1:]),
        )
    if name is not None and not name.startswith("-"):
        close = difflib.get_close_matches(name, PRESETS, n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise SystemExit(f"tools.finetune: {name!r} is no preset, expected one of {', '.join(PRESETS)}{hint}")
    print(
        "usage: python -m tools.finetune PRESET --checkpoint PATH --data FOLDER [--field value ...]\n\npresets:"
    )
    for preset, build in PRESETS.items():
        print(f"  {preset:26}{inspect.getdoc(build).splitlines()[0]}")
    raise SystemExit(0 if name in ("-h", "--help") else "tools.finetune: a preset is missing")


def describe_split(
    split: ClassificationSplit, skipped: dict[str, tuple[tuple[str, str], ...]], show: int = 3
) -> list[str]:
    """Lines that say what a split lacks. skipped: `train` and `test` -> (video, reason) of those without clips."""
    lines = []
    for part in ("train", "test"):
        videos = getattr(split, part)
        word = "training" if part == "train" else part
        line = f"{split.name} split {split.split}, {word}: {len(videos)} videos"
        if skipped[part]:
            counts = ", ".join(f"{name}: {count}" for name, count in count_skipped(skipped[part]).items())
            some = ", ".join(f"{video} ({reason})" for video, reason in skipped[part][:show])
            more = ", ..." if len(skipped[part]) > show else ""
            line += f"; WARNING: not used: {len(skipped[part])} ({counts}): {some}{more}"
        lines.append(line)
        empty = without_videos(split, part, skipped[part])
        if empty:
            more = ", ..." if len(empty) > show else ""
            lines.append(
                f"  WARNING: {len(empty)} of {len(split.classes)} classes have no {word} video: "
                f"{', '.join(empty[:show])}{more}"
            )
    return lines


def without_videos(
    split: ClassificationSplit, part: str, skipped: Sequence[tuple[str, str]]
) -> tuple[str, ...]:
    """Classes of which no video of `train` or `test` can be used."""
    gone = {video for video, _ in skipped}
    there = {video.label for video in getattr(split, part) if video.video_id not in gone}
    return tuple(name for name in split.classes if name not in there)


def split_counts(
    split: ClassificationSplit,
    train_skipped: Sequence[tuple[str, str]],
    test_skipped: Sequence[tuple[str, str]],
) -> dict[str, int]:
    """Result.counts of a split: what was used of it, what was not and why."""
    train = {f"training {name}": count for name, count in count_skipped(train_skipped).items()}
    return {
        "num_videos": len(split.test) - len(test_skipped),
        "num_training_videos": len(split.train) - len(train_skipped),
        **count_skipped(test_skipped),
        **train,
        "classes without test video": len(without_videos(split, "test", test_skipped)),
        "classes without training video": len(without_videos(split, "train", train_skipped)),
    }


def constant_guess(
    training_labels: Sequence[int], test_labels: Sequence[int], num_classes: int, k: int = 1
) -> float:
    """Share of test videos whose class is among the k largest classes of the training videos."""
    counts = torch.bincount(torch.tensor(list(training_labels), dtype=torch.int64), minlength=num_classes)
    best = set(counts.argsort(descending=True, stable=True)[:k].tolist())
    return sum(label in best for label in test_labels) / len(test_labels)


def split_metrics(
    scores: Any,
    video_ids: Sequence[str],
    labels: Sequence[str],
    split: ClassificationSplit,
    unused_train: Sequence[tuple[str, str]],
    how: str,
) -> tuple[dict[str, Metric], list[str]]:
    """Metrics of a split's test, and the test videos of which no clip could be used.

    `top1`, `top5`: of the videos that could be used; intervals by groups of videos that were cut from one source;
    chance is the better of guessing evenly and of always naming the largest training classes.

    Args:
        scores: (N, classes), one row per clip.
        video_ids: N.
        labels: N class names.
        split: as it was tested, with all its videos.
        unused_train: (video, reason) of training videos without clips.
        how: see `average_clips`.
    """
    number = {name: index for index, name in enumerate(split.classes)}
    num_classes = len(split.classes)
    predictions = average_clips(scores, video_ids, [number[label] for label in labels], how)
    groups = [
        source_group(video, split.classes[label])
        for video, label in zip(predictions.video_ids, predictions.labels.tolist())
    ]
    gone = {video for video, _ in unused_train}
    training = [number[video.label] for video in split.train if video.video_id not in gone]
    metrics = {}
    for k in (1, min(5, num_classes)):
        metric = accuracy_metric(predictions, k, groups)
        guess = constant_guess(training, predictions.labels.tolist(), num_classes, k)
        metrics["top1" if k == 1 else "top5"] = dataclasses.replace(
            metric, chance=max(guess, metric.chance or 0.0)
        )
    metrics["largest class"] = Metric(
        value=constant_guess(training, predictions.labels.tolist(), num_classes)
    )
    metrics["even guess"] = Metric(value=1 / num_classes)
    used = set(predictions.video_ids)
    unused = [video for video in split.test if video.video_id not in used]
    correct = predictions.correct().astype(float).tolist() + [0.0] * len(unused)
    all_groups = groups + [source_group(video.video_id, video.label) for video in unused]
    metrics["top1 skipped as wrong"] = Metric(
        value=sum(correct) / len(correct), interval=bootstrap_interval(correct, all_groups)
    )
    return metrics, [video.video_id for video in unused]


class SplitRun:
    """One split: its videos, its loaders and its test."""

    def __init__(self, config: FinetuneConfig, name: str, *, pin_memory: bool) -> None:
        self.config = config
        self.name = name
        self.folder = Path(config.out) / f"split{name}"
        self.split = limited(read_split(config.dataset, config.data, name), config.max_videos or None)
        self._pin_memory = pin_memory
        self.skipped: dict[str, tuple[tuple[str, str], ...]] = {}

    def train_loader(self) -> ListedLoader:
        """Random clips of the training videos, in a new order each epoch."""
        config = self.config
        num_clips = len(self.split.train) * config.clips_per_video
        loader_config = LoaderConfig(
            shards=config.data,
            backend="raw",
            global_batch_size=config.batch_size,
            num_workers=config.num_workers,
            prefetch_batches=config.prefetch_batches,
            seed=config.seed,
            shuffle=True,
            shuffle_window=max(1, num_clips),  # the whole epoch
            drop_last=True,
            max_bad_fraction=config.max_bad_fraction,
            video=config.video,
        )
        sampling = ClipSampling(
            placement="random",
            clips_per_file=config.clips_per_video,
            clip_seconds=config.clip_seconds,
            resized_crop_area=config.resized_crop_area,
            color_jitter_probability=config.color_jitter_probability,
        )
        return self._open("train", loader_config, sampling)

    def test_loader(self) -> ListedLoader:
        """Each test video's clips, in order."""
        config = self.config
        loader_config = listed_config(
            config.data, video=config.video, batch_size=config.test_batch_size, num_workers=config.num_workers
        )
        sampling = ClipSampling(
            placement=config.test_placement,
            clips_per_file=config.test_clips,
            clip_seconds=config.clip_seconds,
            num_crops=config.test_crops,
        )
        return self._open("test", loader_config, sampling)

    def _open(self, part: str, loader_config: LoaderConfig, sampling: ClipSampling) -> ListedLoader:
        try:
            loader = ListedLoader(
                loader_config,
                getattr(self.split, part),
                sampling,
                folder=self.config.data,
                pin_memory=self._pin_memory,
            )
        except ValueError as error:
            raise ValueError(f"{self.split.name} split {self.name}, {part}: {error}") from error
        self.skipped[part] = loader.skipped
        return loader

    def check(self) -> None:
        """Open both loaders and close them: what is wrong is to be known before the first split is trained."""
        self.train_loader().close()
        self.test_loader().close()
        for line in describe_split(self.split, self.skipped):
            say(line)

    def test(self, training: Finetuning, epoch: int, digest: str) -> EpochTest:
        """Test after an epoch; see `cmac.finetune.Test`."""
        started = time.monotonic()
        loader = self.test_loader()
        try:
            features = extract_features(
                loader,
                lambda batch: {"logits": training.logits(batch)},
                predictions_folder(self.folder / "tests", epoch),
                {"what": "logits after fine-tuning", "weights": digest, **fixed_fields(self.config)},
            )
        finally:
            loader.close()
        metrics, unused = split_metrics(
            features.arrays["logits"],
            features.video_ids,
            features.labels,
            self.split,
            self.skipped["train"],
            self.config.test_average,
        )
        known = {video for video, _ in self.skipped["test"]}
        skipped = (
            *self.skipped["test"],
            *((video, "no-usable-clip") for video in unused if video not in known),
        )
        counts = {
            **split_counts(self.split, self.skipped["train"], skipped),
            "num_clips": features.num_clips,
            **count_skipped((), features.bad),
        }
        return EpochTest(
            epoch=epoch,
            digest=digest,
            top1=metrics["top1"].value,
            top5=metrics["top5"].value,
            seconds=time.monotonic() - started,
            details={"metrics": {n: dataclasses.asdict(m) for n, m in metrics.items()}, "counts": counts},
        )

    def run(self, network: "Network", device: torch.device) -> Result:
        """Train and test, or read back what a finished run found."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with _alone(self.folder):
            path = self.folder / "result.jsonl"
            if path.exists():
                (result,) = read_results(path)
                check_same_run(result.config, self.config, path)
                if result.checkpoint_digest != network.digest:
                    raise ValueError(
                        f"{path} is of other weights ({result.checkpoint_digest}) than {self.config.checkpoint} holds "
                        f"({network.digest}); choose another --out"
                    )
                say(f"split {self.name}: finished before, see {path}")
                return result
            self._check_weights(network)
            loader = self.train_loader()
            try:
                training, tests = finetune(
                    self.config,
                    network.build(self.config, len(self.split.classes)),
                    self.split.classes,
                    loader,
                    self.test,
                    self.folder,
                    device,
                )
            except TooManyBadClips as error:  # the batch that was one too many was not handed out
                record_bad_clips(self.folder / "bad_clips.jsonl", error.batch)
                raise
            finally:
                loader.close()
            result = self._result(training, tests, network)
            write_atomically(path, (result.to_json() + "\n").encode())
            return result

    def _check_weights(self, network: "Network") -> None:
        """Refuse to go on with the checkpoints of other weights: they are no part of the configuration."""
        check_weights_of_splits(self.config, network)
        described = {"digest": network.digest, "source": network.source}
        write_atomically(self.folder / "weights.json", (json.dumps(described) + "\n").encode())

    def _result(self, training: Finetuning, tests: Sequence[EpochTest], network: "Network") -> Result:
        last = tests[-1]
        best = max(tests, key=lambda test: test.top1)
        metrics = {name: Metric(**_tuples(values)) for name, values in last.details["metrics"].items()}
        metrics[BEST_EPOCH] = Metric(value=best.top1)
        return Result(
            task=TASK,
            dataset=self.config.dataset,
            split=self.name,
            protocol=protocol_name(self.config),
            checkpoint=network.source,
            checkpoint_digest=network.digest,
            config=json.loads(json.dumps(dataclasses.asdict(self.config))),
            metrics=metrics,
            counts={**last.details["counts"], "last epoch": last.epoch, "best epoch": best.epoch},
            **stamp(training.train_seconds + sum(test.seconds for test in tests)),
        )


def _tuples(values: dict[str, Any]) -> dict[str, Any]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Raises ValueError where another process trains in this folder."""
    with open(folder / "lock", "w") as file:
        if not take_lock(file, folder):
            raise ValueError(f"{folder} is in use by another process; wait for it, or choose another --out")
        yield


@dataclasses.dataclass(frozen=True, kw_only=True)
class Network:
    """What is fine-tuned."""

    encoders: Encoders | None
    """None: from scratch."""
    source: str
    digest: str
    compute: ComputeConfig

    def build(self, config: FinetuneConfig, num_classes: int) -> VideoClassifier:
        """A fresh one for a split."""
        encoders = self.encoders
        if encoders is None:
            return build_classifier(
                config,
                num_classes,
                config.encoder,
                None,
                compute=self.compute,
                pixel_mean=config.video.mean,
                pixel_std=config.video.std,
            )
        weights = {
            name: value
            for name, value in encoders.require_video().state_dict().items()
            if not name.startswith("fc.")
        }
        return build_classifier(
            config,
            num_classes,
            encoders.video_encoder_config,
            weights,
            compute=self.compute,
            pixel_mean=encoders.pixel_mean,
            pixel_std=encoders.pixel_std,
        )


def open_network(config: FinetuneConfig, device: torch.device) -> Network:
    """The network that `config.checkpoint` names.

    Raises:
        ValueError: nothing is named, there is no such file, or it has no video encoder.
    """
    name, compute = config.checkpoint, resolve_finetune_compute(config, device)
    if not name:
        raise ValueError(
            "checkpoint is empty, expected weights: --checkpoint PATH, random:PATH (fresh ones) or scratch"
        )
    if name == SCRATCH:
        fresh = Network(encoders=None, source="random", digest="", compute=compute)
        digest = weights_digest(fresh.build(config, 2).encoder, None)
        return dataclasses.replace(fresh, digest=digest)
    is_random = name.startswith(RANDOM)
    encoders = cmac.load(name.removeprefix(RANDOM), random_seed=config.seed if is_random else None)
    digest = weights_digest(encoders.require_video(), None)
    return Network(
        encoders=encoders, source="random" if is_random else encoders.source, digest=digest, compute=compute
    )


def mean_result(config: FinetuneConfig) -> Result | None:
    """The mean over all splits of the dataset; None while one of them is not finished in `config.out`."""
    results = []
    for name in DATASETS[config.dataset].splits:
        path = Path(config.out) / f"split{name}" / "result.jsonl"
        if not path.exists():
            return None
        (result,) = read_results(path)
        check_same_run(result.config, config, path)
        results.append(result)
    last = max(results, key=lambda result: result.time)
    names = {name for result in results for name in result.counts if "epoch" not in name}
    return dataclasses.replace(
        last,
        split=MEAN_OF_THREE_SPLITS,
        metrics=mean_over_splits([result.metrics for result in results]),
        counts={name: sum(result.counts.get(name, 0) for result in results) for name in sorted(names)},
        seconds=math.fsum(result.seconds for result in results),
    )


def check_weights_of_splits(config: FinetuneConfig, network: Network) -> None:
    """Raises ValueError where any split in `config.out` was started with other weights: a mean over splits is of one
    network, and a file of weights may have changed since."""
    for name in DATASETS[config.dataset].splits:
        folder = Path(config.out) / f"split{name}"
        path = folder / "weights.json"
        digest = json.loads(path.read_bytes())["digest"] if path.exists() else network.digest
        if digest != network.digest:
            raise ValueError(
                f"{folder} was started with other weights ({digest}) than {config.checkpoint} holds "
                f"({network.digest}); choose another --out"
            )


def choose_device(config: FinetuneConfig) -> torch.device:
    """The device that a configuration asks for.

    Raises:
        ValueError: CUDA is asked for and missing.
    """
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device is 'cuda' but torch sees no CUDA device; use --device cpu or auto")
    device = torch.device("cuda" if config.device != "cpu" and torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        torch.set_num_threads(config.cpu_threads or usable_cores())
    torch.backends.cudnn.benchmark = True  # every batch has the same shape
    return device


def run(config: FinetuneConfig) -> list[Result]:
    """Fine-tune on each of `config.splits`, report each, and the mean where all of the dataset's are finished.

    What is reported already (a finished run that is started again) is shown, but not added again.

    Raises:
        ValueError: what the user can put right; the message says how.
    """
    for name in ("data", "out"):
        if not getattr(config, name):
            raise ValueError(f"{name} is empty, expected a folder: --{name} FOLDER")
    device = choose_device(config)
    network = open_network(config, device)
    check_weights_of_splits(config, network)
    if Path(config.results).exists():
        read_results(config.results)  # what is wrong with it is to be known now
    runs = [SplitRun(config, name, pin_memory=device.type == "cuda") for name in config.splits]
    for split in runs:
        split.check()
    console = Console(width=None if sys.stdout.isatty() else 120)
    results = []
    for split in runs:
        say(f"{config.dataset} split {split.name}: {protocol_name(config)} of {network.source} on {device}")
        results.append(split.run(network, device))
        report_once(console, results[-1], Path(config.results))
    mean = mean_result(config)
    if mean is not None:
        results.append(mean)
        report_once(console, mean, Path(config.results))
    return results


def report_once(console: Console, result: Result, path: Path) -> None:
    """Show a result, and add it to the file of results unless it holds the very same one."""
    if path.exists() and any(known.to_json() == result.to_json() for known in read_results(path)):
        figures = ", ".join(f"{name} {metric.value:.1%}" for name, metric in result.metrics.items())
        console.print(f"split {result.split}: {figures}; in {path} already", soft_wrap=True, markup=False)
        return
    report(console, result, path)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; 0 when everything was tested."""
    print_any_name()
    try:
        run(parse(sys.argv[1:] if argv is None else argv))
    except (ValueError, OSError, FloatingPointError, TooManyBadClips) as error:
        print(f"tools.finetune: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
