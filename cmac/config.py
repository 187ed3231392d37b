"""One run's configuration, and the presets named after the paper's runs."""

import dataclasses
import json
from dataclasses import dataclass, field
from typing import Literal

import dacite

from cmac.attention import AttentionConfig
from cmac.compute import ComputeConfig
from cmac.encoders import AudioEncoderConfig, VideoEncoderConfig
from cmac.losses import LossConfig
from cmac.model import ModelConfig
from cmac.optim import OptimizerConfig
from loaders.config import AudioConfig, LoaderConfig, VideoConfig
from shards.storage import is_url


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Everything that fixes a pretraining run."""

    run_dir: str = "runs/pretrain"
    """Folder of this run: config.json, log.jsonl, tb/, checkpoints/."""
    epochs: int = 200
    """Passes over the videos; an epoch reads one clip of each."""
    max_steps: int | None = None
    """Stop after this many optimization steps, however many epochs are left."""
    seed: int = 0
    """Initial weights and the shuffling of keys over ranks; `loader.seed` fixes what is read."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto` takes CUDA where there is any."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Autocast type of the encoders; losses, norms, attention and momentum copies stay float32. `auto`: bf16 on
    GPUs that have it, fp16 with loss scaling on older ones, fp32 on CPU."""
    channels_last: bool = True
    """Keep activations and weights channels-last, what cuDNN's tensor-core kernels and oneDNN read."""
    cpu_threads: int = 0
    """Threads per rank for CPU computation; 0 shares the usable cores among the ranks of this machine."""
    log_every: int = 10
    """Steps from one log row to the next. Only logging steps wait for the device."""
    checkpoint_every: int = 1000
    """Steps from one checkpoint to the next; the last step is always saved."""
    keep_checkpoints: int = 3
    """Newest checkpoints kept."""
    resume: Literal["auto", "never"] = "auto"
    """`auto` goes on from the newest checkpoint in run_dir that is whole; `never` refuses a folder that has one."""
    nonfinite: Literal["stop", "skip"] = "stop"
    """A loss that is not finite: `stop` ends the run, `skip` leaves such steps out, for which every step waits for the
    device. Either way the keys of the batch are saved in run_dir/nonfinite/."""
    max_skipped_steps: int = 10
    """With `skip`: the run stops when it has left out more steps than this."""
    hang_seconds: float = 1800.0
    """A rank that takes no step for so long writes the stacks of all its threads to run_dir/stacks/ and ends, so that
    torchrun can start all ranks again; 0 waits for ever."""
    gradient_norms_every: int = 100
    """Steps from one measurement of the gradient norms of both losses apart to the next, which costs about as much as
    a step; 0 for never."""
    wandb_project: str = ""
    """Project of Weights & Biases that rows are sent to as well; needs `pip install cmac[wandb]`."""
    loader: LoaderConfig
    """What is read and how."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """Encoders, attention, queue."""
    loss: LossConfig = field(default_factory=LossConfig)
    """Terms of Eq. (8)."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """Optimizer and schedule."""
    compute: ComputeConfig = field(default_factory=ComputeConfig)
    """Which implementations compute a step."""

    def __post_init__(self) -> None:
        for name in ("epochs", "log_every", "checkpoint_every", "keep_checkpoints"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected at least 1")
        if self.max_steps is not None and self.max_steps < 1:
            raise ValueError(f"max_steps is {self.max_steps}, expected at least 1")
        for name in ("seed", "cpu_threads", "max_skipped_steps", "hang_seconds", "gradient_norms_every"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}, expected at least 0")
        if self.nonfinite not in ("stop", "skip"):
            raise ValueError(f"nonfinite is {self.nonfinite!r}, expected stop or skip")
        retried = self.loader.source_retry_seconds
        if 0 < self.hang_seconds <= retried and is_url(self.loader.shards):
            raise ValueError(
                f"hang_seconds is {self.hang_seconds}, expected more than loader.source_retry_seconds ({retried}), for "
                "which no batch may come while a source is down; or 0"
            )
        if not self.run_dir:
            raise ValueError("run_dir is empty, expected the folder that this run writes to")
        needs_second = self.loss.positives != "cross"
        if needs_second and self.loader.clips_per_video != 2:
            raise ValueError(
                f"loss.positives is {self.loss.positives!r} and loader.clips_per_video is "
                f"{self.loader.clips_per_video}; within-modal positives need 2"
            )
        if self.loader.clips_per_video == 2 and not needs_second:
            raise ValueError(
                "loader.clips_per_video is 2 but loss.positives 'cross' uses one clip per video; "
                "set it to 1 or loss.positives to 'within' or 'both'"
            )


def config_to_dict(config: RunConfig) -> dict:
    """Plain nested dictionary that `json.dumps` takes and `config_from_dict` reads back."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def config_from_dict(data: dict) -> RunConfig:
    """Inverse of `config_to_dict`.

    Raises:
        ValueError: a field is unknown, missing or of the wrong type (the message names it).
    """
    try:
        return dacite.from_dict(RunConfig, data, dacite.Config(cast=[tuple, float], strict=True))
    except dacite.DaciteError as error:
        raise ValueError(f"this configuration does not fit this version of cmac: {error}") from error


def pretrain_k400(shards: str = "data/k400-train") -> RunConfig:
    """Section 4.1 with section 4.5's final schedule: 200 epochs, global batch 128, color jitter.

    Command: torchrun --nproc-per-node 8 train.py pretrain-k400 --loader.shards FOLDER
    Hardware: the paper used 8 V100; any number of ranks that divides 128 gives the same batches.
    Result: not run here; the paper reports 90.3 % on UCF101 and 61.1 % on HMDB51 after fine-tuning (Table 4).
    """
    return RunConfig(
        run_dir="runs/pretrain-k400",
        epochs=200,
        loader=LoaderConfig(shards=shards, global_batch_size=128, video=VideoConfig(color_jitter=True)),
    )


def pretrain_audioset(shards: str = "data/audioset-train") -> RunConfig:
    """AudioSet, the second data set of section 4.1, with the settings that the section gives for Kinetics-400.

    Command: torchrun --nproc-per-node 8 train.py pretrain-audioset --loader.shards FOLDER
    Hardware: the paper does not tell; `python -m tools.plan --dataset audioset` has the arithmetic of cost.
    Result: not run here; the paper's are in its supplement, which was not to be had, so there is nothing to match.
    Choice: 24 epochs, as the supplement may tell them and the paper does not: 1.8 million videos 24 times are about as
    many clips as pretrain-k400's 220,000 videos 200 times, 43 and 44 million, so that the two compare data and not
    budgets. The warm-up has as many clips as pretrain-k400's 10 epochs. Queue, rate and batch are not scaled.
    """
    return RunConfig(
        run_dir="runs/pretrain-audioset",
        epochs=24,
        loader=LoaderConfig(shards=shards, global_batch_size=128, video=VideoConfig(color_jitter=True)),
        optimizer=OptimizerConfig(warmup_epochs=1.2),
    )


def pretrain_k400_ablation(shards: str = "data/k400-train") -> RunConfig:
    """Section 4.3, the setting of Tables 1-3 and Fig. 4: 50 epochs, global batch 64, no color jitter.

    Command: torchrun --nproc-per-node 8 train.py pretrain-k400-ablation --loader.shards FOLDER
    Result: not run here; the paper reports 87.2 % on UCF101 and 57.8 % on HMDB51, split 1 (Table 1).
    """
    return RunConfig(
        run_dir="runs/pretrain-k400-ablation",
        epochs=50,
        loader=LoaderConfig(shards=shards, global_batch_size=64),
    )


def demo(shards: str = "runs/demo/shards/train") -> RunConfig:
    """Small enough for two CPU cores in minutes: 64-pixel crops, 8 frames, three narrow stages.

    Command: make demo
    Choice: AdamW with cosine decay where the paper has SGD; SGD at the paper's rate learns too slowly for a run of a
    few hundred steps. Momentum 0.99 and a queue of 1,024 for the same reason, and the squared error of Eq. (6)
    averaged, so that lambda does not depend on the size of the maps.
    """
    return RunConfig(
        run_dir="runs/demo",
        epochs=1000,
        max_steps=720,
        device="cpu",
        precision="fp32",
        log_every=10,
        checkpoint_every=250,
        keep_checkpoints=2,
        loader=LoaderConfig(
            shards=shards,
            global_batch_size=32,
            num_workers=1,
            prefetch_batches=8,
            backend="portable",  # no trial of backends: the demo is to do the same everywhere
            video=VideoConfig(num_frames=8, short_side=72, crop_size=64),
            audio=AudioConfig(time_warp_steps=0, frequency_mask_bins=12),
        ),
        model=ModelConfig(
            video=VideoEncoderConfig(widths=(8, 24, 64), blocks=(1, 1, 1), stem_width=8),
            audio=AudioEncoderConfig(widths=(8, 24, 64), blocks=(1, 1, 1)),
            attention=AttentionConfig(),
            filter_channels=64,
            embedding_dim=32,
            momentum=0.99,
            queue_length=1024,
        ),
        loss=LossConfig(consistency_reduction="mean"),
        optimizer=OptimizerConfig(
            name="adamw", learning_rate=2e-3, weight_decay=1e-2, warmup_epochs=1.0, schedule="cosine"
        ),
    )


def demo_ablation(shards: str = "runs/reproduce/demo/shards/train") -> RunConfig:
    """The demo cut down to minutes of one core, for tables of many trainings (tools/reproduce.py --scale demo).

    Command: python -m tools.reproduce --table 1 --scale demo
    Choice: 450 steps of 32 clips; with 300 steps a linear probe finds 46 % of the categories instead of 65 % (one
    seed each, benchmarks/LOG.md), with batches of 16 or a queue of 256 even less.
    """
    full = demo(shards)
    return dataclasses.replace(
        full,
        run_dir="runs/demo-ablation",
        max_steps=450,
        cpu_threads=1,
        log_every=25,
        checkpoint_every=100,
        keep_checkpoints=1,
        loader=dataclasses.replace(
            full.loader,
            video=VideoConfig(num_frames=8, short_side=45, crop_size=40),
            audio=AudioConfig(num_mel_bins=128, time_warp_steps=0, frequency_mask_bins=8),
        ),
        model=dataclasses.replace(full.model, momentum=0.98, queue_length=512),
        optimizer=dataclasses.replace(full.optimizer, learning_rate=4e-3),
    )


def tiny_sounds(shards: str = "runs/esc10/shards") -> RunConfig:
    """For the sound encoder, from tens of real videos and the generated world, in minutes on two CPU cores.

    Command: python benchmarks/esc10_probe.py --videos FOLDER --esc ESC-50 (generates, makes shards, trains, compares)
    Choice: strong masks of the log-mel, as there are few videos, and pictures as small as they can be, so that most of
    the arithmetic is the sound's. The command trains the variant `within-both`: the sound of another second of the same
    video is a teacher that does not need the picture to be understood first.
    """
    full = demo(shards)
    return dataclasses.replace(
        full,
        run_dir="runs/esc10",
        epochs=1_000_000,
        max_steps=1500,
        log_every=25,
        loader=dataclasses.replace(
            full.loader,
            video=VideoConfig(num_frames=4, short_side=54, crop_size=48),
            audio=AudioConfig(
                time_warp_steps=0,
                num_frequency_masks=2,
                frequency_mask_bins=40,
                num_time_masks=2,
                time_mask_steps=20,
            ),
        ),
        model=dataclasses.replace(
            full.model,
            audio=AudioEncoderConfig(widths=(16, 32, 64, 128), blocks=(1, 1, 1, 1)),
            filter_channels=128,
            embedding_dim=64,
        ),
        optimizer=dataclasses.replace(full.optimizer, warmup_epochs=5.0, clip_gradient_norm=1.0),
    )


PRESETS = {
    "pretrain-k400": pretrain_k400,
    "pretrain-audioset": pretrain_audioset,
    "pretrain-k400-ablation": pretrain_k400_ablation,
    "demo": demo,
    "demo-ablation": demo_ablation,
    "tiny-sounds": tiny_sounds,
}
"""Preset name -> function of the shards folder. The function's docstring is the preset's description."""


@dataclass(frozen=True, kw_only=True)
class Variant:
    """Changes that make one of the paper's (or a peer's) ablations of any preset."""

    description: str
    """One line: what it is and where the paper has it."""
    changes: dict[str, bool | int | float | str]
    """Dotted field of RunConfig -> value."""

    @property
    def flags(self) -> list[str]:
        """The same changes as arguments of train.py."""
        arguments = []
        for field_name, value in self.changes.items():
            *parents, name = field_name.replace("_", "-").split(".")
            if isinstance(value, bool):
                arguments.append("--" + ".".join([*parents, name if value else f"no-{name}"]))
            else:
                arguments += [f"--{'.'.join([*parents, name])}", str(value)]
        return arguments


_TWO_CLIPS = {"loader.clips_per_video": 2}
_NORM, _SCALES, _WEIGHT = "model.attention.norm", "model.attention.num_scales", "loss.consistency_weight"

VARIANTS = {
    "single-modality": Variant(
        description="each modality alone: within-modal positives, two clips per video (Tables 1, 6)",
        changes={"loss.positives": "within", _WEIGHT: 0.0, **_TWO_CLIPS},
    ),
    "no-contrastive": Variant(
        description="without L_cl (Table 1)",
        changes={"loss.contrastive": False},
    ),
    "no-consistency": Variant(
        description="without L_ac, lambda 0 (Table 1, Fig. 4)",
        changes={_WEIGHT: 0.0},
    ),
    "norm-none": Variant(
        description="Eq. (4) without norm, one scale (Table 2)",
        changes={_NORM: "none", _SCALES: 1},
    ),
    "norm-softmax": Variant(
        description="Eq. (4) with softmax, one scale (Table 2)",
        changes={_NORM: "softmax", _SCALES: 1},
    ),
    "scales-1": Variant(description="cosine norm, one scale (Table 2)", changes={_SCALES: 1}),
    "scales-3": Variant(description="cosine norm, three scales (Table 2)", changes={_SCALES: 3}),
    "no-within-negatives": Variant(
        description="negatives of the other modality only (Table 3)",
        changes={"loss.within_negatives": False},
    ),
    "within-positives": Variant(
        description="within-modal positives in place of within-modal negatives (Table 3)",
        changes={"loss.within_negatives": False, "loss.positives": "both", **_TWO_CLIPS},
    ),
    "within-both": Variant(
        description="within-modal positives and negatives, as AVID has them (Table 3)",
        changes={"loss.positives": "both", **_TWO_CLIPS},
    ),
    "lambda-0.5": Variant(description="lambda 0.5 (Fig. 4)", changes={_WEIGHT: 0.5}),
    "lambda-1": Variant(description="lambda 1 (Fig. 4)", changes={_WEIGHT: 1.0}),
    "lambda-2": Variant(description="lambda 2 (Fig. 4)", changes={_WEIGHT: 2.0}),
    "lambda-3": Variant(description="lambda 3 (Fig. 4)", changes={_WEIGHT: 3.0}),
    "baseline": Variant(
        description="plain cross-modal contrast of Eq. (2) (Table 6)",
        changes={"loss.within_negatives": False, _WEIGHT: 0.0},
    ),
    "batch-negatives": Variant(
        description="negatives from the batch in place of the queues, as GDT has them",
        changes={"loss.negatives": "batch"},
    ),
    "attached-target": Variant(
        description="guided maps of Eq. (6) are trained as well, not held fixed",
        changes={"model.attention.detach_target": False},
    ),
    "separate-heads": Variant(
        description="a projection head for each modality, as GDT and AVID have them",
        changes={"model.head": "separate"},
    ),
}
"""Variant name -> what it changes. `train.py PRESET:VARIANT` trains it; the preset alone is the full model."""


def apply_variant(config: RunConfig, name: str) -> RunConfig:
    """The run with a variant's changes, in a run folder of its own (`RUN_DIR-NAME`).

    Raises:
        ValueError: there is no such variant.
    """
    if name not in VARIANTS:
        raise ValueError(f"{name!r} is no variant, expected one of {', '.join(VARIANTS)}")
    data = config_to_dict(config)
    data["run_dir"] += f"-{name}"
    for field_name, value in VARIANTS[name].changes.items():
        *parents, last = field_name.split(".")
        part = data
        for parent in parents:
            part = part[parent]
        part[last] = value
    return config_from_dict(data)
