"""Action recognition by fine-tuning f_v with a classifier (section 4.2): configuration, presets and the training loop.

One process and one device train one split; the splits of a dataset can be run side by side (`--splits 1`, `--splits 2`,
...). Training over several GPUs (DDP) is not part of it: a split of UCF101 is 71,520 steps of 16 clips.
"""

import dataclasses
import functools
import hashlib
import json
import math
import shutil
import time
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cmac.checkpoint import list_checkpoints, newest_valid_checkpoint, read_state, save_checkpoint
from cmac.compute import ComputeConfig
from cmac.encoders import R2Plus1D, VideoEncoderConfig
from cmac.kernels.check import resolve_compute
from cmac.meter import timed_batches
from cmac.norm import build_norm_layers
from cmac.optim import OptimizerConfig, build_optimizer
from cmac.pretrain import record_bad_clips, resolve_precision
from cmac.provenance import git_commit
from cmac.run_log import Row, RunLog
from cmac.step import autocast, check_device
from loaders import Loader
from loaders.batch import ClipBatch
from loaders.config import VideoConfig
from loaders.video_ops import normalize_frames
from shards.manifest import write_atomically

PixelStatistic = float | tuple[float, float, float]


@dataclass(frozen=True, kw_only=True)
class FinetuneOptimizerConfig:
    """Optimizer and learning-rate schedule; the defaults are section 4.2's."""

    name: Literal["sgd", "adamw"] = "sgd"
    """`sgd` with momentum (the paper), or `adamw`, which without weight decay is Adam."""
    learning_rate: float = 0.005
    """Peak learning rate of the encoder."""
    head_learning_rate: float | None = None
    """Peak learning rate of the classifier; None: the encoder's."""
    weight_decay: float = 5e-3
    """Applied to all parameters."""
    momentum: float = 0.9
    """Of SGD; beta_1 of AdamW."""
    schedule: Literal["constant", "steps", "cosine"] = "constant"
    """After the warm-up: as it is, times `decay` at each of `milestones`, or falling to zero. Choice: constant; the
    paper names no schedule for fine-tuning."""
    milestones: tuple[float, ...] = ()
    """Epochs (counted without head-only ones) at which `steps` lowers the learning rates."""
    decay: float = 0.1
    """What `steps` multiplies them by."""
    warmup_epochs: float = 0.0
    """Epochs over which the learning rates grow linearly to their peaks."""
    warmup_start: float = 0.0
    """Share of the peak that the warm-up starts from."""
    clip_gradient_norm: float = 0.0
    """Scale gradients down to this norm; 0 leaves them alone."""

    def __post_init__(self) -> None:
        for name in ("learning_rate", "head_learning_rate"):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise ValueError(f"optimizer.{name} is {value}, expected a finite value above 0")
        for name in ("weight_decay", "warmup_epochs", "clip_gradient_norm"):
            if getattr(self, name) < 0:
                raise ValueError(f"optimizer.{name} is {getattr(self, name)}, expected at least 0")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"optimizer.momentum is {self.momentum}, expected a value from 0 to below 1")
        if not 0 <= self.warmup_start <= 1:
            raise ValueError(f"optimizer.warmup_start is {self.warmup_start}, expected a share of 0 to 1")
        if (self.schedule == "steps") != bool(self.milestones):
            raise ValueError(
                f"optimizer.schedule is {self.schedule!r} with optimizer.milestones {self.milestones}, expected "
                "milestones with schedule 'steps' and none with the others"
            )
        if list(self.milestones) != sorted(self.milestones) or not 0 < self.decay <= 1:
            raise ValueError(
                f"optimizer.milestones is {self.milestones} and optimizer.decay {self.decay}, expected epochs in "
                "rising order and a factor above 0, up to 1"
            )

    def factor(self, step: int, steps_per_epoch: int, total_steps: int) -> float:
        """What the peak learning rates are multiplied by in a step, counted from 0 without head-only epochs."""
        factor = 1.0
        warmup_steps = self.warmup_epochs * steps_per_epoch
        if step < warmup_steps:
            factor = self.warmup_start + (1 - self.warmup_start) * (step + 1) / max(warmup_steps, step + 1)
        if self.schedule == "steps":
            factor *= self.decay ** bisect_right(self.milestones, step / steps_per_epoch)
        elif self.schedule == "cosine":
            factor *= 0.5 * (1 + math.cos(math.pi * step / total_steps))
        return factor


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig:
    """Everything that fixes the fine-tuning of one encoder on the splits of one dataset."""

    preset: str
    """What this configuration started as; results are filed under it (see `protocol_name`)."""
    checkpoint: str = ""
    """What is fine-tuned: a file or folder that `cmac.load` takes, `random:PATH` for fresh weights of its network, or
    `scratch` for fresh weights of `encoder`."""
    data: str = ""
    """Folder of the dataset in its official layout."""
    out: str = ""
    """Folder for checkpoints, predictions and results; a folder per split is made in it."""
    results: str = "runs/results.jsonl"
    """File that the results are appended to, one JSON line each."""
    dataset: Literal["ucf101", "hmdb51"]
    """Which dataset it is."""
    splits: tuple[Literal["1", "2", "3"], ...] = ("1", "2", "3")
    """Official splits, one after the other; their mean is reported when all three are finished in `out`."""
    max_videos: int = 0
    """For a quick look: at most this many training and this many test videos, spread over the lists. 0: all."""
    seed: int = 0
    """Initial weights of the classifier (and of random encoders), order and augmentation of clips, dropout."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto` takes CUDA where there is any."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Autocast type of the encoder (AMP); weights, classifier and loss stay float32. `auto`: bf16 on GPUs that have
    it, fp16 with loss scaling on older ones, fp32 on CPU."""
    channels_last: bool = True
    """Keep activations and weights channels-last."""
    cpu_threads: int = 0
    """Threads for CPU computation; 0 takes the usable cores."""
    epochs: int = 12
    """Passes over the training videos in which everything is trained."""
    head_epochs: int = 0
    """Passes before those in which the classifier alone is trained, with its peak learning rate. Choice: batch norms
    then use their running statistics, as the encoder is to stay what it was."""
    batch_size: int = 16
    """Clips per step."""
    clips_per_video: int = 10
    """Random clips of each training video per epoch: the dataset is repeated this many times."""
    clip_seconds: float | None = None
    """Length of a clip. None: 32 consecutive frames of the source at its own rate. 1.0: as in pretraining."""
    video: VideoConfig = field(default_factory=VideoConfig)
    """Frames: number, size, augmentation. Pixels are normalised as the checkpoint's were, whatever mean and std say."""
    resized_crop_area: tuple[float, float] | None = None
    """Random resized crops of this share of the frame in place of random crops of the scaled frame."""
    color_jitter_probability: float = 1.0
    """With video.color_jitter: share of the clips whose colors are changed. GDT changes them after normalisation, here
    it is before."""
    dropout: float = 0.0
    """Before the classifier."""
    optimizer: FinetuneOptimizerConfig = field(default_factory=FinetuneOptimizerConfig)
    """Optimizer and schedule."""
    encoder: VideoEncoderConfig = field(default_factory=VideoEncoderConfig)
    """Network for `scratch`; that of a checkpoint is the checkpoint's."""
    compute: ComputeConfig = field(default_factory=ComputeConfig)
    """Which implementations compute a step."""
    test_clips: int = 10
    """Clips of each test video."""
    test_placement: Literal["uniform", "uniform-gdt"] = "uniform"
    """`uniform`: from the first to the last that fits. `uniform-gdt`: clip i of n at i / n of the way, never at the
    end."""
    test_crops: Literal[1, 3] = 1
    """1: the center. 3: both ends and the middle of the longer side. Choice: 1, the paper names no crops."""
    test_average: Literal["softmax", "raw"] = "softmax"
    """What is averaged over a video's clips and crops: softmax (the paper) or raw logits (GDT)."""
    test_batch_size: int = 30
    """Clips per batch in tests; a multiple of a video's clips and crops decodes each video once."""
    first_test_epoch: int = 1
    """Tests start after this epoch, counted from 1 over head-only and other epochs."""
    test_every_epochs: int = 1
    """Epochs from one test to the next; after the last epoch there is always one. Choice: every epoch, which costs
    about an eighth of the training's arithmetic and gives the best epoch, as others report it, beside the last, which
    is the result."""
    num_workers: int = 4
    """Processes that decode clips. 0: this one."""
    prefetch_batches: int = 8
    """Batches made ready ahead."""
    max_bad_fraction: float = 0.01
    """Training stops when more than this share of the clips seen could not be used. Test clips are only counted."""
    log_every: int = 20
    """Steps from one log row to the next."""
    checkpoint_every: int = 500
    """Steps from one checkpoint to the next; the end of an epoch is always saved."""

    def __post_init__(self) -> None:
        at_least_one = (
            "epochs batch_size clips_per_video test_clips test_batch_size first_test_epoch test_every_epochs "
            "log_every checkpoint_every prefetch_batches"
        )
        for name in at_least_one.split():
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected at least 1")
        for name in ("seed", "cpu_threads", "head_epochs", "num_workers", "max_videos"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}, expected at least 0")
        if not self.splits or len(set(self.splits)) != len(self.splits):
            raise ValueError(f"splits is {self.splits}, expected at least one of 1, 2, 3, each once")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is {self.dropout}, expected a share of 0 to below 1")
        if self.compute.cuda_graph:
            raise ValueError("compute.cuda_graph is True, expected False: fine-tuning has no CUDA graphs")

    @property
    def total_epochs(self) -> int:
        """Head-only and other epochs."""
        return self.head_epochs + self.epochs

    def is_test_epoch(self, epoch: int) -> bool:
        """Whether there is a test after an epoch, counted from 1."""
        if epoch == self.total_epochs:
            return True
        return (
            epoch >= self.first_test_epoch and (epoch - self.first_test_epoch) % self.test_every_epochs == 0
        )


HARMLESS = (
    "out results splits device precision channels_last cpu_threads num_workers prefetch_batches log_every "
    "checkpoint_every max_bad_fraction compute"
).split()
"""Fields that change no result (beyond rounding), so that a run may go on with others."""
PLACES = ("checkpoint", "data", "seed")
"""Fields that a protocol leaves open."""


def finetune_ucf101() -> FinetuneConfig:
    """UCF101 as section 4.2 has it, with color jitter as in the final runs: 3 splits, 10 clips x 1 crop, last epoch.

    SGD at 0.005, weight decay 5e-3, momentum 0.9, batch 16, 12 epochs; 10 random clips of 32 frames of each video in
    an epoch.
    Command: python -m tools.finetune finetune-ucf101 --checkpoint runs/pretrain-k400 --data data/ucf101
    Hardware: one GPU; a split is 71,520 steps of 16 clips of 32x128x128.
    Result: not run here; the paper reports 90.3 % (Table 4).
    """
    return FinetuneConfig(
        preset="finetune-ucf101",
        out="runs/evaluation/finetune-ucf101",
        dataset="ucf101",
        video=VideoConfig(color_jitter=True),
    )


def finetune_hmdb51() -> FinetuneConfig:
    """HMDB51 as section 4.2 has it, with color jitter as in the final runs: 3 splits, 10 clips x 1 crop, last epoch.

    Command: python -m tools.finetune finetune-hmdb51 --checkpoint runs/pretrain-k400 --data data/hmdb51
    Hardware: one GPU; a split is 26,772 steps of 16 clips of 32x128x128.
    Result: not run here; the paper reports 61.1 % (Table 4).
    """
    return _on_hmdb51(finetune_ucf101())


def finetune_ucf101_ablation() -> FinetuneConfig:
    """Sections 4.2 and 4.3, the setting of Tables 1-3 and Fig. 4: UCF101 split 1, no color jitter.

    Command: python -m tools.finetune finetune-ucf101-ablation --checkpoint CHECKPOINT --data data/ucf101
    Hardware: one GPU.
    Result: not run here; the paper reports 87.2 % for the full model, 73.2 % from scratch (Table 1).
    """
    return dataclasses.replace(
        finetune_ucf101(),
        preset="finetune-ucf101-ablation",
        out="runs/evaluation/finetune-ucf101-ablation",
        splits=("1",),
        video=VideoConfig(),
    )


def finetune_hmdb51_ablation() -> FinetuneConfig:
    """Sections 4.2 and 4.3, the setting of Tables 1-3 and Fig. 4: HMDB51 split 1, no color jitter.

    Command: python -m tools.finetune finetune-hmdb51-ablation --checkpoint CHECKPOINT --data data/hmdb51
    Hardware: one GPU.
    Result: not run here; the paper reports 57.8 % for the full model, 23.7 % from scratch (Table 1).
    """
    return _on_hmdb51(finetune_ucf101_ablation())


def finetune_ucf101_gdt() -> FinetuneConfig:
    """UCF101 as GDT's code fine-tunes: two learning rates, resized crops, 10 clips x 3 crops, mean of raw logits.

    32 frames at 30 a second, whatever the video's own rate. Not the same: test frames have a short side of 144, where
    its code draws one of 128 to 160 for each clip, and their colors are left alone, which it changes in tests, too.
    Peaks of 0.02 (classifier) and 0.002 (encoder), 8 times GDT's head and base rates, which its warm-up of 2 epochs
    starts from (here by the step, in its code by the epoch), times 0.05 at epochs 6 and 10 (its scheduler gets there
    one epoch late: `--optimizer.milestones 7 11`). GDT reports the best of the tests after its epochs 7-11, counted
    from 0: that is the metric `top1 best epoch (chosen on test)`; `top1` is the last epoch's.
    Command: python -m tools.finetune finetune-ucf101-gdt --checkpoint WEIGHTS --data data/ucf101
    Hardware: one GPU.
    Result: not run here; GDT reports 89.3 % (Table 4), its repository 90.9 %.
    """
    return dataclasses.replace(
        finetune_ucf101(),
        preset="finetune-ucf101-gdt",
        out="runs/evaluation/finetune-ucf101-gdt",
        batch_size=32,
        clip_seconds=32 / 30,
        resized_crop_area=(0.14, 1.0),
        color_jitter_probability=0.8,
        optimizer=FinetuneOptimizerConfig(
            learning_rate=0.002,
            head_learning_rate=0.02,
            schedule="steps",
            milestones=(6, 10),
            decay=0.05,
            warmup_epochs=2.0,
            warmup_start=0.125,
        ),
        test_placement="uniform-gdt",
        test_crops=3,
        test_average="raw",
        first_test_epoch=8,
    )


def finetune_hmdb51_gdt() -> FinetuneConfig:
    """HMDB51 as GDT's code fine-tunes; see `finetune-ucf101-gdt`.

    Command: python -m tools.finetune finetune-hmdb51-gdt --checkpoint WEIGHTS --data data/hmdb51
    Hardware: one GPU.
    Result: not run here; GDT reports 60.0 % (Table 4), its repository 62.3 %.
    """
    return _on_hmdb51(finetune_ucf101_gdt())


def finetune_ucf101_avid() -> FinetuneConfig:
    """UCF101 as AVID's code fine-tunes: Adam, 5 epochs of the classifier and 16 of all, 32 frames in 2 s of 224x224.

    Adam at 1e-4, times 0.3 at epochs 6, 10 and 14, batch 32, dropout 0.5, 5 clips per video and epoch, resized crops of
    area 0.08-1; test: last epoch. Not the same: the network is the checkpoint's (AVID's "R(2+1)D-18" is another one),
    colors are changed without hue, and videos shorter than 2 s give no clip (`--clip-seconds 1` takes in more).
    Command: python -m tools.finetune finetune-ucf101-avid --checkpoint WEIGHTS --data data/ucf101
    Hardware: one GPU.
    Result: not run here; AVID reports 87.5 % (Table 4).
    """
    return dataclasses.replace(
        finetune_ucf101(),
        preset="finetune-ucf101-avid",
        out="runs/evaluation/finetune-ucf101-avid",
        epochs=16,
        head_epochs=5,
        batch_size=32,
        clips_per_video=5,
        clip_seconds=2.0,
        video=VideoConfig(short_side=256, crop_size=224, color_jitter=True),
        resized_crop_area=(0.08, 1.0),
        dropout=0.5,
        optimizer=FinetuneOptimizerConfig(
            name="adamw",
            learning_rate=1e-4,
            weight_decay=0.0,
            schedule="steps",
            milestones=(6, 10, 14),
            decay=0.3,
        ),
    )


def finetune_hmdb51_avid() -> FinetuneConfig:
    """HMDB51 as AVID's code fine-tunes; see `finetune-ucf101-avid`.

    Command: python -m tools.finetune finetune-hmdb51-avid --checkpoint WEIGHTS --data data/hmdb51
    Hardware: one GPU.
    Result: not run here; AVID reports 60.8 % (Table 4).
    """
    return _on_hmdb51(finetune_ucf101_avid())


def finetune_tiny() -> FinetuneConfig:
    """Small enough for a CPU in minutes: split 1, clips of 8 frames of 64x64, 4 epochs of 3 clips per video.

    Command: python -m tools.finetune finetune-tiny --checkpoint runs/demo --data data/ucf101 --max-videos 40
    Hardware: 2 CPU cores.
    Result: not run here on all of UCF101.
    Choice: AdamW with cosine decay, as in the preset `demo` whose network it is for.
    """
    return dataclasses.replace(
        finetune_ucf101(),
        preset="finetune-tiny",
        out="runs/evaluation/finetune-tiny",
        splits=("1",),
        device="cpu",
        precision="fp32",
        epochs=4,
        batch_size=8,
        clips_per_video=3,
        clip_seconds=1.0,
        video=VideoConfig(num_frames=8, short_side=72, crop_size=64),
        optimizer=FinetuneOptimizerConfig(
            name="adamw", learning_rate=1e-3, weight_decay=1e-2, schedule="cosine", warmup_epochs=0.5
        ),
        encoder=VideoEncoderConfig(widths=(8, 24, 64), blocks=(1, 1, 1), stem_width=8),
        test_clips=3,
        num_workers=1,
        log_every=5,
        checkpoint_every=50,
    )


def _on_hmdb51(config: FinetuneConfig) -> FinetuneConfig:
    preset = config.preset.replace("ucf101", "hmdb51")
    return dataclasses.replace(config, preset=preset, out=f"runs/evaluation/{preset}", dataset="hmdb51")


PRESETS: dict[str, Callable[[], FinetuneConfig]] = {
    "finetune-ucf101": finetune_ucf101,
    "finetune-hmdb51": finetune_hmdb51,
    "finetune-ucf101-ablation": finetune_ucf101_ablation,
    "finetune-hmdb51-ablation": finetune_hmdb51_ablation,
    "finetune-ucf101-gdt": finetune_ucf101_gdt,
    "finetune-hmdb51-gdt": finetune_hmdb51_gdt,
    "finetune-ucf101-avid": finetune_ucf101_avid,
    "finetune-hmdb51-avid": finetune_hmdb51_avid,
    "finetune-tiny": finetune_tiny,
}
"""Preset name -> function. The function's docstring is the preset's description."""


def fixed_fields(config: FinetuneConfig) -> dict[str, Any]:
    """What fixes the result of a split, flat and JSON-able: dotted field -> value."""
    data = json.loads(json.dumps(dataclasses.asdict(config)))
    return _flat({name: value for name, value in data.items() if name not in HARMLESS})


def _flat(data: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for name, value in data.items():
        flat.update(_flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value})
    return flat


def protocol_name(config: FinetuneConfig) -> str:
    """The preset's name and every field that is not the preset's: no result goes by a name that is not its own."""
    default, given = fixed_fields(PRESETS[config.preset]()), fixed_fields(config)
    scratch = config.checkpoint == "scratch"
    changes = [
        f"{name}={json.dumps(value)}"
        for name, value in given.items()
        if value != default[name] and name not in PLACES and (scratch or not name.startswith("encoder."))
    ]
    return config.preset + (f" with {', '.join(changes)}" if changes else "")


class VideoClassifier(nn.Module):
    """f_v with dropout and a linear classifier on its globally averaged features.

    Args:
        encoder: built with num_classes.
        dropout: before the classifier.
        pixel_mean, pixel_std: of pixels in [0, 1], what frames are normalised by.
    """

    def __init__(
        self, encoder: R2Plus1D, dropout: float, pixel_mean: PixelStatistic, pixel_std: PixelStatistic
    ) -> None:
        super().__init__()
        assert encoder.fc is not None
        self.encoder = encoder
        self.dropout = nn.Dropout(dropout)
        self._pixels = (pixel_mean, pixel_std)

    def features(self, frames: Tensor) -> Tensor:
        """float32 (N, C): v of section 3.1, averaged over T, H and W. frames: uint8 (N, 3, T, H, W)."""
        v = self.encoder(normalize_frames(frames, *self._pixels))  # (N, C, T', H', W')
        return v.float().mean(dim=(2, 3, 4))

    def classify(self, features: Tensor) -> Tensor:
        """float32 (N, num_classes): logits of features (N, C)."""
        return self.encoder.fc(self.dropout(features))


def build_classifier(
    config: FinetuneConfig,
    num_classes: int,
    encoder: VideoEncoderConfig,
    weights: dict[str, Tensor] | None,
    *,
    compute: ComputeConfig,
    pixel_mean: PixelStatistic,
    pixel_std: PixelStatistic,
) -> VideoClassifier:
    """A network to fine-tune: fresh classifier, and fresh encoder where `weights` is None. Seeded by `config.seed`.

    Args:
        config: seed and dropout.
        num_classes: of the dataset.
        encoder: the network's shape.
        weights: state of the encoder without classifier; loaded strictly.
        compute: how it is computed.
        pixel_mean, pixel_std: of pixels in [0, 1].
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        norm = build_norm_layers(None, compute.batch_norm_impl())[1]
        network = R2Plus1D(encoder, num_classes, norm, compute)
    if weights is not None:
        own = {f"fc.{name}": value for name, value in network.fc.state_dict().items()}
        network.load_state_dict({**weights, **own})
    return VideoClassifier(network, config.dropout, pixel_mean, pixel_std)


@dataclass(frozen=True, kw_only=True)
class EpochTest:
    """What a test after an epoch found; kept as JSON."""

    epoch: int
    """Counted from 1."""
    digest: str
    """Of the weights that were tested, classifier included."""
    top1: float
    top5: float
    seconds: float
    details: dict[str, Any] = field(default_factory=dict)
    """Whatever the caller's test adds: JSON-able."""


Test = Callable[["Finetuning", int, str], EpochTest]
"""(training, epoch counted from 1, digest of the weights) -> what the test found. It must be able to go on after being
killed, with weights of the same digest."""


class Finetuning:
    """Network, optimizer and step of one split.

    Args:
        config: the run.
        model: what is trained; moved to `device`.
        classes: class names, by number.
        device: where it computes.
        steps_per_epoch: length of the loader.
    """

    def __init__(
        self,
        config: FinetuneConfig,
        model: VideoClassifier,
        classes: Sequence[str],
        device: torch.device,
        steps_per_epoch: int,
    ) -> None:
        self.config = config
        self.device = device
        self.precision = resolve_precision(config.precision, device)
        check_device(device, self.precision)
        self.classes = tuple(classes)
        self._class_number = {name: number for number, name in enumerate(classes)}
        self.steps_per_epoch = steps_per_epoch
        self.total_steps = config.total_epochs * steps_per_epoch
        self.step = 0
        self.train_seconds = 0.0
        self.bad_clips: Counter[str] = Counter()
        self.commit = git_commit()
        torch.manual_seed(config.seed)  # of dropout
        model = model.to(device)
        if config.channels_last:
            model = model.to(memory_format=torch.channels_last_3d)
        if config.compute.compile:
            model.encoder.compile(dynamic=False)
        self.model = model
        head = list(model.encoder.fc.parameters())
        kept = {id(parameter) for parameter in head}
        body = [parameter for parameter in model.parameters() if id(parameter) not in kept]
        optimizer = config.optimizer
        self._peaks = (optimizer.learning_rate, optimizer.head_learning_rate or optimizer.learning_rate)
        self.optimizer = build_optimizer(
            body,
            OptimizerConfig(
                name=optimizer.name,
                learning_rate=optimizer.learning_rate,
                weight_decay=optimizer.weight_decay,
                momentum=optimizer.momentum,
                backend="torch",
            ),
        )
        self.optimizer.add_param_group({"params": head, "lr": self._peaks[1]})
        self.optimizer.load_state_dict(self.optimizer.state_dict())  # gives the added group its buffers, too
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.precision == "fp16")

    @property
    def epoch(self) -> int:
        """Epoch of the next step, counted from 0."""
        return self.step // self.steps_per_epoch

    def learning_rates(self, step: int) -> tuple[float, float]:
        """(of the encoder, of the classifier) in a step, counted from 0; the encoder's is 0 in head-only epochs."""
        head_steps = self.config.head_epochs * self.steps_per_epoch
        if step < head_steps:
            return 0.0, self._peaks[1]
        factor = self.config.optimizer.factor(
            step - head_steps, self.steps_per_epoch, self.total_steps - head_steps
        )
        return self._peaks[0] * factor, self._peaks[1] * factor

    def train_step(self, batch: ClipBatch) -> tuple[Tensor, Tensor] | None:
        """One optimization step; nothing waits for the device.

        Returns:
            (mean cross-entropy, share of the clips that were classified rightly), both on the device; None where
            all clips of the batch were bad: there was nothing to learn from.
        """
        frames = batch.frames
        if not batch.valid.all():  # on the CPU; a bad clip's grey frames must not count in batch statistics
            frames = frames[batch.valid].contiguous(memory_format=torch.channels_last_3d)
        numbers = [self._class_number[clip.label] for clip in batch.clips if clip is not None]
        rates = self.learning_rates(self.step)
        head_only = self.epoch < self.config.head_epochs
        self.step += 1
        if not numbers:
            return None
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        frames = frames.to(self.device, non_blocking=True)
        targets = torch.tensor(numbers).to(self.device, non_blocking=True)
        self.model.train()
        if head_only:
            self.model.encoder.eval()
        with torch.set_grad_enabled(not head_only), autocast(self.device, self.precision):
            features = self.model.features(frames)
        logits = self.model.classify(features)
        loss = F.cross_entropy(logits, targets)
        self.scaler.scale(loss).backward()
        if self.config.optimizer.clip_gradient_norm > 0:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), self.config.optimizer.clip_gradient_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach(), (logits.detach().argmax(dim=1) == targets).float().mean()

    @torch.no_grad()
    def logits(self, batch: ClipBatch) -> Tensor:
        """float32 (N, num_classes) of all rows of a batch, in evaluation mode."""
        self.model.eval()
        with autocast(self.device, self.precision):
            features = self.model.features(batch.frames.to(self.device, non_blocking=True))
        return self.model.classify(features)

    def digest(self) -> str:
        """16 hex digits over the weights, classifier included."""
        total = hashlib.sha256()
        for name, value in sorted(self.model.encoder.state_dict().items()):
            total.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
            total.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
        return total.hexdigest()[:16]

    def state_dict(self, loader: Loader) -> dict:
        """What resuming exactly needs, beside the configuration."""
        rng = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            rng["cuda"] = torch.cuda.get_rng_state(self.device)
        return {
            "model": self.model.encoder.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "loader": loader.state_dict(),
            "rng": rng,
            "train_seconds": self.train_seconds,
            "bad_clips": dict(self.bad_clips),
            "classes": list(self.classes),
            "commit": self.commit,
        }

    def load_state_dict(self, state: dict, loader: Loader) -> None:
        """Go on from a checkpoint's state, as `read_state` gives it."""
        self.step = state["step"]
        self.train_seconds = state["train_seconds"]
        self.bad_clips = Counter(state["bad_clips"])
        self.model.encoder.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        if state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])
        loader.load_state_dict(state["loader"])
        torch.set_rng_state(state["rng"]["cpu"].cpu())
        if self.device.type == "cuda" and "cuda" in state["rng"]:
            torch.cuda.set_rng_state(state["rng"]["cuda"].cpu(), self.device)


def finetune(
    config: FinetuneConfig,
    model: VideoClassifier,
    classes: Sequence[str],
    loader: Loader,
    test: Test,
    folder: Path,
    device: torch.device,
) -> tuple[Finetuning, list[EpochTest]]:
    """Train one split to the end, from its newest checkpoint if there is one, and test it.

    Killed at any moment and called again it goes on: training at the newest checkpoint, and a test where `test` can go
    on. `folder` holds config.json, log.jsonl, tb/, checkpoints/ (at the end only the last one, which is the fine-tuned
    network), tests/epoch_XXX.json.

    Args:
        config: the run.
        model: from `build_classifier`.
        classes: class names, by number; `clips[i].label` of the loader's batches are among them.
        loader: training clips, at its start.
        test: run after the epochs that the configuration names.
        folder: of this split.
        device: where it computes.

    Returns:
        The training, at its end, and what each test found, in order of epochs.

    Raises:
        ValueError: the folder holds another run, or checkpoints of which none is whole.
        OSError: a checkpoint cannot be written.
        FloatingPointError: the loss is no longer finite.
    """
    training = Finetuning(config, model, classes, device, len(loader))
    newest = newest_valid_checkpoint(folder / "checkpoints", functools.partial(print, flush=True))
    if newest is not None:
        state = read_state(newest, device)
        check_same_run(state["config"], config, newest)
        training.load_state_dict(state, loader)
        print(f"going on from {newest} at step {training.step}", flush=True)
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(
        folder / "config.json", (json.dumps(dataclasses.asdict(config), indent=2) + "\n").encode()
    )
    log = RunLog(folder, training.total_steps, training.step, title="fine-tuning", describe=_figures)
    tests: dict[int, EpochTest] = {}
    try:
        meter = _Meter(training)
        while True:
            finished = training.epoch if training.step % training.steps_per_epoch == 0 else 0
            if finished and finished not in tests and config.is_test_epoch(finished):
                tests[finished] = _test_once(training, finished, test, folder / "tests")
                meter.reset()
            if training.step == training.total_steps:
                break
            _train_epoch(training, loader, folder, log, meter)
        # Earlier tests of a run that was resumed after them.
        for epoch in range(1, config.total_epochs):
            if config.is_test_epoch(epoch) and epoch not in tests:
                kept = _read_test(folder / "tests", epoch)
                if kept is not None:
                    tests[epoch] = kept
    finally:
        log.close()
    for old in list_checkpoints(folder / "checkpoints")[:-1]:
        old.unlink()
    return training, [tests[epoch] for epoch in sorted(tests)]


def check_same_run(saved: dict[str, Any], config: FinetuneConfig, path: Path) -> None:
    """Raises ValueError unless a saved configuration (nested, as JSON has it) is this one but for harmless fields."""
    before = _flat({name: value for name, value in saved.items() if name not in HARMLESS})
    now = fixed_fields(config)
    changed = [
        f"{name}: {before.get(name)} -> {now.get(name)}"
        for name in sorted(before.keys() | now.keys())
        if before.get(name) != now.get(name)
    ]
    if changed:
        raise ValueError(
            f"{path} is of another run: {'; '.join(changed)}; choose another --out, or give the values of the run that "
            "you want to go on with"
        )


def _train_epoch(training: Finetuning, loader: Loader, folder: Path, log: RunLog, meter: "_Meter") -> None:
    """The rest of the loader's epoch; logs and saves."""
    config = training.config
    for batch in timed_batches(loader, meter):
        record_bad_clips(folder / "bad_clips.jsonl", batch)
        training.bad_clips.update(record.reason for record in batch.bad)
        meter.add(training.train_step(batch), batch)
        log.advance(training.step)
        save = training.step % training.steps_per_epoch == 0 or training.step % config.checkpoint_every == 0
        if save or training.step % config.log_every == 0:
            log.write(meter.row())  # before saving: it refuses to go on with a loss that is not finite
        if save:
            state = training.state_dict(loader)
            save_checkpoint(folder / "checkpoints", training.step, config, state, keep=2)


def _test_once(training: Finetuning, epoch: int, test: Test, folder: Path) -> EpochTest:
    """What the test after an epoch found: read back where these weights were tested already."""
    digest = training.digest()
    kept = _read_test(folder, epoch)
    if kept is not None and kept.digest == digest:
        return kept
    if kept is not None:  # of other weights: their predictions are worth nothing
        shutil.rmtree(predictions_folder(folder, epoch), ignore_errors=True)
    found = test(training, epoch, digest)
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(_test_path(folder, epoch), (json.dumps(dataclasses.asdict(found)) + "\n").encode())
    if epoch != training.config.total_epochs:
        shutil.rmtree(predictions_folder(folder, epoch), ignore_errors=True)
    print(
        f"epoch {epoch}/{training.config.total_epochs}: test top-1 {found.top1:.1%}, top-5 {found.top5:.1%} "
        f"({found.seconds:.0f} s)",
        flush=True,
    )
    return found


def predictions_folder(folder: Path, epoch: int) -> Path:
    """Where a test keeps what it goes on with; of the last epoch it stays. folder: SPLIT/tests."""
    return folder / f"epoch_{epoch:03d}"


def _test_path(folder: Path, epoch: int) -> Path:
    return folder / f"epoch_{epoch:03d}.json"


def _read_test(folder: Path, epoch: int) -> EpochTest | None:
    path = _test_path(folder, epoch)
    if not path.exists():
        return None
    return EpochTest(**json.loads(path.read_bytes()))


def _figures(row: Row) -> str:
    return (
        f"loss {row['loss']:.3f}, accuracy {row['accuracy']:.1%}, {row['clips_per_second']:.1f} clips/s, "
        f"waiting for data {row['data_wait_fraction']:.0%}, bad clips {row['bad_clips']}"
    )


class _Meter:
    """Figures between two log rows; tensors stay on the device until `row`."""

    def __init__(self, training: Finetuning) -> None:
        self._training = training
        self._seconds = 0.0
        self._first_step = training.step
        self.reset()

    def reset(self) -> None:
        """Start anew."""
        self.wait_seconds = 0.0
        self._started = time.perf_counter()
        self._sums = torch.zeros(2, device=self._training.device)
        self._num_steps = self._num_clips = 0

    def add(self, output: tuple[Tensor, Tensor] | None, batch: ClipBatch) -> None:
        """Count a step."""
        if output is not None:
            self._sums += torch.stack(output)
            self._num_steps += 1
        self._num_clips += batch.num_clips

    def row(self) -> Row:
        """A log row over the steps since the last one.

        Raises:
            FloatingPointError: the loss is not finite.
        """
        training = self._training
        loss, accuracy = (self._sums / max(self._num_steps, 1)).tolist()
        seconds = time.perf_counter() - self._started
        training.train_seconds += seconds
        self._seconds += seconds
        if not math.isfinite(loss):
            raise FloatingPointError(
                f"the loss is {loss} at step {training.step}; lower optimizer.learning_rate "
                f"({training.config.optimizer.learning_rate}) or set optimizer.clip_gradient_norm"
            )
        encoder_rate, head_rate = training.learning_rates(training.step - 1)
        per_step = self._seconds / max(training.step - self._first_step, 1)
        row = {
            "step": training.step,
            "epoch": (training.step - 1) // training.steps_per_epoch,
            "loss": loss,
            "accuracy": accuracy,
            "learning_rate": encoder_rate,
            "head_learning_rate": head_rate,
            "clips_per_second": self._num_clips / seconds,
            "data_wait_fraction": min(1.0, self.wait_seconds / seconds),
            "bad_clips": training.bad_clips.total(),
            "train_seconds": training.train_seconds,
            "eta_seconds": per_step * (training.total_steps - training.step),
        }
        self.reset()
        return row


def resolve_finetune_compute(config: FinetuneConfig, device: torch.device) -> ComputeConfig:
    """What `compute` means on this device; prints what was chosen."""
    # The losses of pretraining have no part in it.
    compute, lines = resolve_compute(dataclasses.replace(config.compute, losses="reference"), device)
    for line in lines:
        print(line, flush=True)
    return compute
