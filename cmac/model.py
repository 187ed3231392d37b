"""CMAC: two encoders, their momentum copies, the queues and one training forward (Eqs. 3-8)."""

import copy
from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.distributed as dist
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
from cmac.encoders import (
    AudioEncoderConfig,
    AudioResNet,
    R2Plus1D,
    VideoEncoderConfig,
    build_norm_layers,
    count_parameters,
    initialize_weights,
)
from cmac.losses import LossConfig, attention_consistency_loss, contrastive_loss, total_loss
from cmac.queue import KeyQueue
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
    """What one training forward gives. Scalars are float32 and stay on the device."""

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
    keys_v: Tensor
    """(global N, D) visual keys, for `CMAC.enqueue`."""
    keys_a: Tensor
    """(global N, D) audio keys."""
    video_ids: Tensor
    """(global N,) int64."""
    valid: Tensor
    """(global N,) bool."""


class CMAC(nn.Module):
    """The model of section 3 with MoCo's momentum encoders and queues.

    A training step is `output = model(...)`, `output.loss.backward()`, `optimizer.step()`,
    `model.enqueue(output)`.

    Args:
        config: shapes and the momentum path.
        loss: what is trained; the paper's full model when left out.
        world_size: ranks that will train it; one rank groups its batch norm (`ModelConfig.batch_norm`).
        pixel_mean: mean of frames scaled to [0, 1], subtracted from uint8 frames.
        pixel_std: their standard deviation, divided by.
    """

    def __init__(
        self,
        config: ModelConfig,
        loss: LossConfig | None = None,
        *,
        world_size: int = 1,
        pixel_mean: float = 0.45,
        pixel_std: float = 0.225,
    ) -> None:
        super().__init__()
        self.config = config
        self.pixel_mean, self.pixel_std = pixel_mean, pixel_std
        self.loss_config = loss or LossConfig()
        grouped = config.batch_norm == "shuffle" and world_size == 1
        norm_2d, norm_3d = build_norm_layers(config.batch_norm_group if grouped else None)
        video = R2Plus1D(config.video, norm=norm_3d)
        audio = AudioResNet(config.audio, norm=norm_2d)
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
        self.queue_v = KeyQueue(config.queue_length, config.embedding_dim)
        self.queue_a = KeyQueue(config.queue_length, config.embedding_dim)
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
        """uint8 frames -> float32, zero mean and unit deviation; float frames pass unchanged."""
        if frames.dtype != torch.uint8:
            return frames
        return normalize_frames(frames, self.pixel_mean, self.pixel_std)

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
        shuffle_seed: int,
        second: tuple[Tensor, Tensor] | None = None,
    ) -> StepOutput:
        """One training forward over this rank's clips: updates the key encoders, leaves the queues alone.

        Args:
            frames: (N, 3, T, H, W), uint8 or normalised.
            log_mel: (N, 1, F, S), normalised.
            video_ids: (N,) int64; negatives of the same video are left out.
            valid: (N,) bool; false rows enter neither losses nor queues.
            shuffle_seed: the same on all ranks, another for each step; decides which rank computes which key.
            second: frames and log_mel of another clip of the same videos, for within-modal positives.

        Raises:
            ValueError: within-modal positives are to be trained and `second` is missing.
        """
        loss = self.loss_config
        if loss.positives != "cross" and second is None:
            raise ValueError(
                f"loss.positives is {loss.positives!r} but the batch has no second clip; "
                "set loader.clips_per_video to 2"
            )
        feature_v, transformed_v, filter_v = self.video(self.normalize_frames(frames))
        feature_a, transformed_a, filter_a = self.audio(log_mel)

        self.update_key_encoders()
        keys_v, keys_a = self._keys(frames, log_mel, shuffle_seed)  # (N, D)
        gathered_ids, gathered_valid = _gather(video_ids), _gather(valid)
        weight = _loss_weight(valid, gathered_valid)  # (N,)
        gathered_v, gathered_a = _gather(keys_v), _gather(keys_a)  # (global N, D)

        zero = torch.zeros((), device=frames.device)
        contrastive, consistency, accuracy_v2a, accuracy_a2v = zero, zero, zero, zero
        if loss.contrastive:
            query_v, query_a = self.project(filter_v, "v"), self.project(filter_a, "a")
            negatives = self._negatives(video_ids, gathered_v, gathered_a, gathered_ids, gathered_valid)
            (negatives_v, excluded_v), (negatives_a, excluded_a) = negatives
            pairs = []
            if loss.positives in ("cross", "both"):
                # (query, positive, cross keys, cross excluded, within keys, within excluded)
                pairs.append((query_v, keys_a, negatives_a, excluded_a, negatives_v, excluded_v))
                pairs.append((query_a, keys_v, negatives_v, excluded_v, negatives_a, excluded_a))
            if loss.positives in ("within", "both"):
                second_v, second_a = self._keys(*second, shuffle_seed + 1)
                pairs.append((query_v, second_v, negatives_v, excluded_v, None, None))
                pairs.append((query_a, second_a, negatives_a, excluded_a, None, None))
            outputs = []
            for query, key, cross, cross_excluded, within, within_excluded in pairs:
                outputs.append(
                    contrastive_loss(
                        query,
                        key,
                        cross,
                        within if loss.within_negatives else None,
                        loss.temperature,
                        cross_excluded=cross_excluded,
                        within_excluded=within_excluded,
                    )
                )
            contrastive = sum((output.loss * weight).sum() for output in outputs)
            accuracy_v2a = (outputs[0].correct * weight).sum()
            accuracy_a2v = (outputs[1].correct * weight).sum()
        if loss.consistency_weight > 0:
            # Choice: filters of the query encoders; Eqs. (3) and (4) never mention keys.
            guided_v = guided_attention(transformed_v, filter_a, self.config.attention)
            guided_a = guided_attention(transformed_a, filter_v, self.config.attention)
            if self.config.attention.detach_target:
                guided_v, guided_a = guided_v.detach(), guided_a.detach()
            for guided, saliency, feature in (
                (guided_v, self.saliency_v, feature_v),
                (guided_a, self.saliency_a, feature_a),
            ):
                predicted = predicted_attention(saliency(feature))
                per_clip = attention_consistency_loss(guided, predicted, loss.consistency_reduction)
                consistency = consistency + (per_clip * weight).sum()
        return StepOutput(
            loss=total_loss(contrastive, consistency, loss.consistency_weight),
            contrastive=contrastive.detach(),
            consistency=consistency.detach(),
            accuracy_v2a=accuracy_v2a,
            accuracy_a2v=accuracy_a2v,
            keys_v=gathered_v,
            keys_a=gathered_a,
            video_ids=gathered_ids,
            valid=gathered_valid,
        )

    def _negatives(
        self, video_ids: Tensor, keys_v: Tensor, keys_a: Tensor, key_ids: Tensor, key_valid: Tensor
    ) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """((visual keys, excluded), (audio keys, excluded)) from the queues or from the global batch."""
        if self.loss_config.negatives == "queue":
            return (
                (self.queue_v.keys, self.queue_v.excluded(video_ids)),
                (self.queue_a.keys, self.queue_a.excluded(video_ids)),
            )
        excluded = (key_ids == video_ids[:, None]) | ~key_valid
        return (keys_v, excluded), (keys_a, excluded)

    @torch.no_grad()
    def update_key_encoders(self) -> None:
        """key = m * key + (1 - m) * query for f, g and the heads of both modalities; batch-norm statistics of the
        key encoders follow from their own forwards, as in MoCo."""
        queries, keys = [], []
        for query, key in (
            (self.video, self.key_video),
            (self.audio, self.key_audio),
            (self.heads, self.key_heads),
        ):
            queries += [parameter.detach() for parameter in query.parameters()]
            keys += list(key.parameters())
        torch._foreach_lerp_(keys, queries, 1 - self.config.momentum)

    @torch.no_grad()
    def _keys(self, frames: Tensor, log_mel: Tensor, shuffle_seed: int) -> tuple[Tensor, Tensor]:
        """Keys of this rank's clips, (N, D) each; with batch_norm "shuffle" computed among other clips."""
        shuffle = self.config.batch_norm == "shuffle"
        if shuffle:
            order = _shuffled_order(len(frames) * _world_size(), shuffle_seed).to(
                frames.device, non_blocking=True
            )
            frames, log_mel = _take_shuffled(frames, order), _take_shuffled(log_mel, order)
        keys_v = self.project(self.key_video(self.normalize_frames(frames))[2], "v", self.key_heads)
        keys_a = self.project(self.key_audio(log_mel)[2], "a", self.key_heads)
        if shuffle:
            keys_v, keys_a = _put_back(keys_v, order), _put_back(keys_a, order)
        return keys_v, keys_a

    def enqueue(self, output: StepOutput) -> None:
        """Move a step's keys into the queues; call it after backward, which still needs the old entries."""
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


def _world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _rank() -> int:
    return dist.get_rank() if _world_size() > 1 else 0


@torch.no_grad()
def _gather(tensor: Tensor) -> Tensor:
    """All ranks' rows in rank order, without gradient: (N, ...) -> (global N, ...)."""
    tensor = tensor.detach()
    if _world_size() == 1:
        return tensor
    gathered = tensor.new_empty(_world_size() * tensor.shape[0], *tensor.shape[1:])
    dist.all_gather_into_tensor(gathered, tensor.contiguous())
    return gathered


def _loss_weight(valid: Tensor, gathered_valid: Tensor) -> Tensor:
    """(N,) weights whose gradients, averaged over ranks by DDP, are those of the mean over all valid clips."""
    return valid.float() * _world_size() / gathered_valid.sum().clamp_min(1)


def _shuffled_order(num_clips: int, seed: int) -> Tensor:
    return torch.randperm(num_clips, generator=torch.Generator().manual_seed(seed))


def _take_shuffled(tensor: Tensor, order: Tensor) -> Tensor:
    """This rank's share of the global batch in shuffled order."""
    num_clips = tensor.shape[0]
    gathered = _gather(tensor)
    return gathered[order[_rank() * num_clips : (_rank() + 1) * num_clips]]


def _put_back(keys: Tensor, order: Tensor) -> Tensor:
    """Undo `_take_shuffled`: keys of this rank's own clips, in their order."""
    num_clips = keys.shape[0]
    shuffled = _gather(keys)
    gathered = torch.empty_like(shuffled)
    gathered[order] = shuffled
    return gathered[_rank() * num_clips : (_rank() + 1) * num_clips]
