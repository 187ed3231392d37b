"""CMAC: two encoders, their momentum copies, the queues and one training forward (Eqs. 3-8)."""

import copy
from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cmac.attention import (
    AttentionConfig,
    CorrelationTransform,
    SaliencyHead,
    guided_attention,
    pool_filter,
    predicted_attention,
)
from cmac.collectives import Gathered, KeyShuffle, gather_keys, num_ranks, own_rows
from cmac.compute import ComputeConfig
from cmac.consistency import consistency_loss
from cmac.encoders import (
    AudioEncoderConfig,
    AudioResNet,
    R2Plus1D,
    VideoEncoderConfig,
    count_parameters,
    initialize_weights,
)
from cmac.gradient_norms import GradientNorms
from cmac.losses import ContrastiveOutput, LossConfig, Negatives, contrastive_loss, total_loss
from cmac.norm import build_norm_layers
from cmac.queue import EMPTY, KeyQueue
from loaders.video_ops import normalize_frames


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Shape of the model and of its momentum path; the defaults are the paper's (section 4.1)."""

    video: VideoEncoderConfig = field(default_factory=VideoEncoderConfig)
    """f_v."""
    audio: AudioEncoderConfig = field(default_factory=AudioEncoderConfig)
    """f_a."""
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    """Eqs. (3)-(5)."""
    filter_channels: int = 512
    """Channels of g and of the filters kappa."""
    embedding_dim: int = 256
    """Channels of the projected filters that Eq. (7) compares."""
    head: Literal["shared", "separate", "shared-mlp", "separate-mlp"] = "shared"
    """Projection of filters to embeddings: one linear layer ("FC heads") or two with a ReLU between. Choice: shared
    by both modalities. Separate heads leave kappa^a and g_v(v) in unrelated bases, and Eq. (4) then points nowhere."""
    momentum: float = 0.999
    """m of the key encoders: key = m * key + (1 - m) * query, before each key forward."""
    queue_length: int = 15_000
    """Past keys kept per modality."""
    queue_dtype: Literal["float32", "bfloat16"] = "float32"
    """What past keys are stored as. bfloat16 halves memory and traffic of long queues; at the paper's temperature it
    moves a logit by 0.002, at most by 0.01."""
    batch_norm: Literal["shuffle", "sync", "local"] = "shuffle"
    """How positives are kept from sharing batch statistics. `shuffle`: keys are computed on another rank than their
    query (MoCo); on one process, in shuffled groups of `batch_norm_group`. `sync`: SyncBatchNorm over all ranks
    (GPU only). `local`: whatever clips a rank holds."""
    batch_norm_group: int = 16
    """Clips per group for `shuffle` on one process: what each of 8 GPUs holds of a batch of 128."""

    def __post_init__(self) -> None:
        for name in ("filter_channels", "embedding_dim", "queue_length", "batch_norm_group"):
            if getattr(self, name) < 1:
                raise ValueError(f"model.{name} is {getattr(self, name)}, expected at least 1")
        if not 0 <= self.momentum <= 1:
            raise ValueError(f"model.momentum is {self.momentum}, expected a value from 0 to 1")


class ModalityBranch(nn.Module):
    """f and g of one modality."""

    def __init__(self, encoder: nn.Module, transform: CorrelationTransform) -> None:
        super().__init__()
        self.encoder = encoder
        self.transform = transform

    def forward(self, inputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(features (N, C, ...), g of them (N, K, ...), filter kappa (N, K) float32)."""
        features = self.encoder(inputs)
        transformed = self.transform(features)
        return features, transformed, pool_filter(transformed)


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """What an evaluation sees of N clips; maps are float32 and, but for norm "none", within [0, 1]."""

    feature_v: Tensor
    """(N, C, T, H, W): v of section 3.1."""
    feature_a: Tensor
    """(N, C, F, S): a of section 3.1 (frequency before time)."""
    filter_v: Tensor
    """(N, K): kappa^v of Eq. (3)."""
    filter_a: Tensor
    """(N, K): kappa^a of Eq. (3)."""
    embedding_v: Tensor
    """(N, D), unit norm."""
    embedding_a: Tensor
    """(N, D), unit norm."""
    guided_v: Tensor
    """(N, T, H, W): s^v of Eq. (4), where the sound says to look."""
    guided_a: Tensor
    """(N, F, S): s^a of Eq. (4)."""
    predicted_v: Tensor
    """(N, T, H, W): s-hat^v of Eq. (5), from vision alone."""
    predicted_a: Tensor
    """(N, F, S): s-hat^a of Eq. (5)."""


@dataclass(frozen=True, kw_only=True)
class StepOutput:
    """What one training forward gives. Scalars are float32 and stay on the device; the losses carry gradients."""

    loss: Tensor
    """Eq. (8)."""
    contrastive: Tensor
    """Sum of Eq. (7) over the directions that are trained."""
    consistency: Tensor
    """Sum of Eq. (6) over both modalities, before lambda."""
    accuracy_v2a: Tensor
    """Share of clips whose visual query is nearest to its positive."""
    accuracy_a2v: Tensor
    """Share of clips whose audio query is nearest to its positive."""
    keys_v: Tensor | None
    """(global N, D) visual keys, for `CMAC.enqueue`; None where L_cl is not trained."""
    keys_a: Tensor | None
    """(global N, D) audio keys."""
    video_ids: Tensor
    """(global N,) int64."""
    valid: Tensor
    """(global N,) bool."""
    gradients: GradientNorms | None = None
    """Of a `TrainingStep` that was asked to measure them."""


class CMAC(nn.Module):
    """The model of section 3 with MoCo's momentum encoders and queues.

    `cmac.step.TrainingStep` trains it: momentum update, forward, backward, optimizer, `enqueue`.

    Args:
        config: shapes and the momentum path.
        loss: what is trained; the paper's full model when left out.
        compute: how it is computed.
        world_size: ranks that will train it; one rank groups its batch norm (`ModelConfig.batch_norm`).
        pixel_mean: mean of frames scaled to [0, 1], subtracted from uint8 frames.
        pixel_std: their standard deviation, divided by.
    """

    def __init__(
        self,
        config: ModelConfig,
        loss: LossConfig | None = None,
        *,
        compute: ComputeConfig | None = None,
        world_size: int = 1,
        pixel_mean: float = 0.45,
        pixel_std: float = 0.225,
    ) -> None:
        super().__init__()
        self.config = config
        self.pixel_mean, self.pixel_std = pixel_mean, pixel_std
        self.loss_config = loss or LossConfig()
        self.compute = compute or ComputeConfig()
        grouped = config.batch_norm == "shuffle" and world_size == 1
        group_size = config.batch_norm_group if grouped else None
        norm_2d, norm_3d = build_norm_layers(group_size, self.compute.batch_norm_impl())
        video = R2Plus1D(config.video, norm=norm_3d, compute=self.compute)
        audio = AudioResNet(config.audio, norm=norm_2d)
        norm_2d, norm_3d = build_norm_layers(group_size, self.compute.batch_norm)  # g and h are not compiled
        channels = config.filter_channels
        self.video = ModalityBranch(video, CorrelationTransform(video.out_channels, channels, 3, norm_3d))
        self.audio = ModalityBranch(audio, CorrelationTransform(audio.out_channels, channels, 2, norm_2d))
        self.saliency_v = SaliencyHead(video.out_channels, 3, norm_3d)
        self.saliency_a = SaliencyHead(audio.out_channels, 2, norm_2d)
        self.heads = _build_heads(config)
        initialize_weights(self.video.transform)
        initialize_weights(self.audio.transform)

        # Choice: the key path copies f, g and the head, as MoCo copies its whole embedding path; h has no keys.
        self.key_video, self.key_audio = copy.deepcopy(self.video), copy.deepcopy(self.audio)
        self.key_heads = copy.deepcopy(self.heads)
        for module in (self.key_video, self.key_audio, self.key_heads):
            module.requires_grad_(False)
        queue_dtype = getattr(torch, config.queue_dtype)
        self.queue_v = KeyQueue(config.queue_length, config.embedding_dim, queue_dtype)
        self.queue_a = KeyQueue(config.queue_length, config.embedding_dim, queue_dtype)
        self._freeze_untrained()

    def _freeze_untrained(self) -> None:
        """Take out of training what the chosen losses do not reach, so that DDP waits for no gradient."""
        if self.loss_config.consistency_weight == 0:
            self.saliency_v.requires_grad_(False)
            self.saliency_a.requires_grad_(False)
        if not self.loss_config.contrastive:
            self.heads.requires_grad_(False)
            if self.config.attention.detach_target:
                self.video.transform.requires_grad_(False)
                self.audio.transform.requires_grad_(False)

    def parameter_counts(self) -> dict[str, int]:
        """Parameters by part; the key encoders hold copies and are not counted."""
        parts = {
            "video encoder": self.video.encoder,
            "audio encoder": self.audio.encoder,
            "g_v": self.video.transform,
            "g_a": self.audio.transform,
            "h_v": self.saliency_v,
            "h_a": self.saliency_a,
            "heads": self.heads,
        }
        return {name: count_parameters(module) for name, module in parts.items()}

    def project(
        self, filters: Tensor, modality: Literal["v", "a"], heads: nn.ModuleDict | None = None
    ) -> Tensor:
        """Embeddings that Eq. (7) compares: (N, K) filters -> (N, D) float32 of unit norm."""
        heads = self.heads if heads is None else heads
        head = heads["shared" if "shared" in heads else modality]
        with torch.autocast(filters.device.type, enabled=False):
            return F.normalize(head(filters.float()), dim=1)

    def normalize_frames(self, frames: Tensor) -> Tensor:
        """uint8 frames -> zero mean and unit deviation, float32 or what autocast computes in; others unchanged."""
        if frames.dtype != torch.uint8:
            return frames
        device = frames.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else torch.float32
        return normalize_frames(frames, self.pixel_mean, self.pixel_std, dtype)

    @torch.no_grad()
    def encode(self, frames: Tensor, log_mel: Tensor) -> Encoded:
        """Features, embeddings and maps of N clips, by the query encoders.

        Args:
            frames: (N, 3, T, H, W), uint8 or already normalised.
            log_mel: (N, 1, F, S), normalised.
        """
        feature_v, transformed_v, filter_v = self.video(self.normalize_frames(frames))
        feature_a, transformed_a, filter_a = self.audio(log_mel)
        return Encoded(
            feature_v=feature_v,
            feature_a=feature_a,
            filter_v=filter_v,
            filter_a=filter_a,
            embedding_v=self.project(filter_v, "v"),
            embedding_a=self.project(filter_a, "a"),
            guided_v=guided_attention(transformed_v, filter_a, self.config.attention),
            guided_a=guided_attention(transformed_a, filter_v, self.config.attention),
            predicted_v=predicted_attention(self.saliency_v(feature_v)),
            predicted_a=predicted_attention(self.saliency_a(feature_a)),
        )

    def forward(
        self,
        frames: Tensor,
        log_mel: Tensor,
        video_ids: Tensor,
        valid: Tensor,
        shuffles: tuple[KeyShuffle, ...] = (),
        second: tuple[Tensor, Tensor] | None = None,
    ) -> StepOutput:
        """One training forward over this rank's clips; changes neither key encoders nor queues.

        Args:
            frames: (N, 3, T, H, W), uint8 or normalised.
            log_mel: (N, 1, F, S), normalised.
            video_ids: (N,) int64; negatives of the same video are left out.
            valid: (N,) bool; false rows enter neither losses nor queues.
            shuffles: with batch_norm "shuffle" which rank computes which key: one for the clips and, for
                within-modal positives, one for the second clips.
            second: frames and log_mel of another clip of the same videos, for within-modal positives.

        Raises:
            ValueError: within-modal positives are to be trained and `second` is missing, or a shuffle is.
        """
        loss = self.loss_config
        self._check(shuffles, second)
        feature_v, transformed_v, filter_v = self.video(self.normalize_frames(frames))
        feature_a, transformed_a, filter_a = self.audio(log_mel)

        shuffle, second_shuffle = (*shuffles, None, None)[:2]
        keys = self._keys(frames, log_mel, shuffle) if loss.contrastive else ()  # (N, D) each
        gathered = gather_keys(keys, video_ids, valid, shuffle)
        # Weights whose gradients, averaged over ranks by DDP, are those of the mean over all valid clips.
        weight = valid.float() * num_ranks() / gathered.valid.sum().clamp_min(1)  # (N,)

        zero = torch.zeros((), device=frames.device)
        contrastive, consistency, accuracy_v2a, accuracy_a2v = zero, zero, zero, zero
        if loss.contrastive:
            queries = self.project(filter_v, "v"), self.project(filter_a, "a")  # (N, D) each
            negatives = self._negatives(gathered)
            outputs = []
            if loss.positives in ("cross", "both"):
                positives = tuple(own_rows(part, len(video_ids)) for part in gathered.keys)
                outputs += self._cross_modal(queries, positives, negatives, video_ids)
            if loss.positives in ("within", "both"):
                second_keys = gather_keys(
                    self._keys(*second, second_shuffle), video_ids, valid, second_shuffle
                )
                for query, part, bank in zip(queries, second_keys.keys, negatives, strict=True):
                    outputs.append(self._contrast(query, own_rows(part, len(video_ids)), [bank], video_ids))
            contrastive = sum((output.loss * weight).sum() for output in outputs)
            accuracy_v2a = (outputs[0].correct * weight).sum()
            accuracy_a2v = (outputs[1].correct * weight).sum()
        if loss.consistency_weight > 0:
            # Choice: filters of the query encoders; Eqs. (3) and (4) never mention keys.
            for transformed, other_filter, saliency, feature in (
                (transformed_v, filter_a, self.saliency_v, feature_v),
                (transformed_a, filter_v, self.saliency_a, feature_a),
            ):
                per_clip = consistency_loss(
                    transformed,
                    other_filter,
                    saliency(feature),
                    self.config.attention,
                    loss.consistency_reduction,
                    self.compute.losses,
                )
                consistency = consistency + (per_clip * weight).sum()
        return StepOutput(
            loss=total_loss(contrastive, consistency, loss.consistency_weight),
            contrastive=contrastive,
            consistency=consistency,
            accuracy_v2a=accuracy_v2a,
            accuracy_a2v=accuracy_a2v,
            keys_v=gathered.keys[0] if keys else None,
            keys_a=gathered.keys[1] if keys else None,
            video_ids=gathered.video_ids,
            valid=gathered.valid,
        )

    def num_shuffles(self) -> int:
        """How many `KeyShuffle`s a forward takes."""
        if self.config.batch_norm != "shuffle" or not self.loss_config.contrastive:
            return 0
        return 1 if self.loss_config.positives == "cross" else 2

    def _check(self, shuffles: tuple[KeyShuffle, ...], second: tuple[Tensor, Tensor] | None) -> None:
        if self.loss_config.positives != "cross" and second is None:
            raise ValueError(
                f"loss.positives is {self.loss_config.positives!r} but the batch has no second clip; "
                "set loader.clips_per_video to 2"
            )
        if len(shuffles) != self.num_shuffles():
            raise ValueError(
                f"{len(shuffles)} shuffles were given, expected {self.num_shuffles()} for model.batch_norm "
                f"{self.config.batch_norm!r}; draw them with KeyShuffle.draw"
            )

    def _cross_modal(
        self,
        queries: tuple[Tensor, Tensor],
        positives: tuple[Tensor, Tensor],
        negatives: tuple[Negatives, Negatives],
        video_ids: Tensor,
    ) -> list[ContrastiveOutput]:
        """Eq. (7) in both directions: vision against sound, sound against vision."""
        (query_v, query_a), (key_v, key_a), (bank_v, bank_a) = queries, positives, negatives
        if not self.loss_config.within_negatives:
            return [
                self._contrast(query_v, key_a, [bank_a], video_ids),
                self._contrast(query_a, key_v, [bank_v], video_ids),
            ]
        # Both directions have the same negatives, so one pass over them serves both.
        both = self._contrast(
            torch.cat([query_v, query_a]), torch.cat([key_a, key_v]), [bank_a, bank_v], video_ids.repeat(2)
        )
        halves = zip(both.loss.chunk(2), both.correct.chunk(2), strict=True)
        return [ContrastiveOutput(*half) for half in halves]

    def _contrast(
        self, query: Tensor, key: Tensor, negatives: list[Negatives], video_ids: Tensor
    ) -> ContrastiveOutput:
        temperature, impl = self.loss_config.temperature, self.compute.losses
        return contrastive_loss(query, key, video_ids, negatives, temperature, impl)

    def _negatives(self, gathered: Gathered) -> tuple[Negatives, Negatives]:
        """Visual and audio keys to tell the positive from, of the queues or of the global batch."""
        if self.loss_config.negatives == "queue":
            return tuple(Negatives(queue.keys, queue.video_ids) for queue in (self.queue_v, self.queue_a))
        video_ids = torch.where(gathered.valid, gathered.video_ids, EMPTY)
        return tuple(Negatives(part, video_ids) for part in gathered.keys)

    def momentum_pairs(self) -> tuple[list[Tensor], list[Tensor]]:
        """(query, key) parameters of f, g and the heads of both modalities, for the momentum update
        key = m * key + (1 - m) * query. Batch-norm statistics of the key encoders follow from their own forwards, as in
        MoCo."""
        queries, keys = [], []
        for query, key in (
            (self.video, self.key_video),
            (self.audio, self.key_audio),
            (self.heads, self.key_heads),
        ):
            queries += query.parameters()
            keys += key.parameters()
        return queries, keys

    @torch.no_grad()
    def _keys(self, frames: Tensor, log_mel: Tensor, shuffle: KeyShuffle | None) -> tuple[Tensor, Tensor]:
        """Visual and audio keys, (N, D) each: of this rank's clips, or of those that a shuffle deals it."""
        if shuffle is not None:
            frames, log_mel = shuffle.take(frames), shuffle.take(log_mel)
        keys_v = self.project(self.key_video(self.normalize_frames(frames))[2], "v", self.key_heads)
        keys_a = self.project(self.key_audio(log_mel)[2], "a", self.key_heads)
        return keys_v, keys_a

    def enqueue(self, output: StepOutput) -> None:
        """Move a step's keys into the queues; call it after backward, which still needs the old entries."""
        if output.keys_v is None:
            return
        self.queue_v.enqueue(output.keys_v, output.video_ids, output.valid)
        self.queue_a.enqueue(output.keys_a, output.video_ids, output.valid)


def _build_heads(config: ModelConfig) -> nn.ModuleDict:
    def head() -> nn.Module:
        if config.head.endswith("mlp"):
            return nn.Sequential(
                nn.Linear(config.filter_channels, config.filter_channels),
                nn.ReLU(inplace=True),
                nn.Linear(config.filter_channels, config.embedding_dim),
            )
        return nn.Linear(config.filter_channels, config.embedding_dim)

    names = ("shared",) if config.head.startswith("shared") else ("v", "a")
    return nn.ModuleDict({name: head() for name in names})
