"""Filters, pyramid correlation filtering and saliency: Eqs. (3)-(5) of the paper."""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cmac.encoders import FactoredConv3d
from cmac.norm import NormLayer

_AVERAGE_POOL = {2: F.avg_pool2d, 3: F.avg_pool3d}
_INTERPOLATION = {2: "bilinear", 3: "trilinear"}


@dataclass(frozen=True, kw_only=True)
class AttentionConfig:
    """Options of Eqs. (3)-(5), Table 2 among them."""

    norm: Literal["cosine", "softmax", "none"] = "cosine"
    """`norm` of Eq. (4): cosine similarity mapped to [0, 1], softmax over all positions of a clip, or the bare
    correlation (Table 2)."""
    cosine_range: Literal["shift", "relu", "minmax"] = "shift"
    """How a cosine becomes a value in [0, 1]. Choice: (1 + cos) / 2, the smooth map that covers the sigmoid's range;
    `relu` is max(cos, 0), `minmax` stretches each map to [0, 1]."""
    num_scales: int = 2
    """Scales of the pyramid (Table 2: 1, 2 or 3); each halves the one before and all are averaged."""
    halve_time: bool = False
    """Also halve T of the visual map from scale to scale. Choice: no; the paper argues from 8x8, and T is only 4."""
    detach_target: bool = True
    """Hold the guided map fixed in Eq. (6). Choice: yes, the paper calls it a pseudo label that supervises."""

    def __post_init__(self) -> None:
        if self.num_scales not in (1, 2, 3):
            raise ValueError(f"model.attention.num_scales is {self.num_scales}, expected 1, 2 or 3")


class CorrelationTransform(nn.Sequential):
    """g of Eq. (3): convolution and batch norm, (N, C, ...) -> (N, K, ...).

    Choice: one 1x1 convolution, applied once; the pyramid pools its output, since a 1x1 convolution commutes with
    average pooling and a second pass would update the batch norm twice.
    """

    def __init__(self, in_channels: int, filter_channels: int, num_dims: int, norm: NormLayer) -> None:
        conv = nn.Conv2d if num_dims == 2 else FactoredConv3d
        super().__init__(conv(in_channels, filter_channels, 1, bias=False), norm(filter_channels))


class SaliencyHead(nn.Sequential):
    """h of Eq. (5), before the sigmoid: (N, C, ...) -> (N, 1, ...).

    Choice: 3x3 (3x3x3) convolution, batch norm, ReLU, 1x1 convolution; the paper says "conv blocks" and no more.
    """

    def __init__(self, in_channels: int, num_dims: int, norm: NormLayer) -> None:
        conv = nn.Conv2d if num_dims == 2 else FactoredConv3d
        super().__init__(
            conv(in_channels, in_channels, 3, padding=1, bias=False),
            norm(in_channels),
            nn.ReLU(inplace=True),
            conv(in_channels, 1, 1),
        )


def pool_filter(transformed: Tensor) -> Tensor:
    """kappa of Eq. (3): mean of g(.) over all positions. (N, K, ...) -> (N, K) float32."""
    return transformed.float().flatten(2).mean(dim=2)


def predicted_attention(saliency: Tensor) -> Tensor:
    """s-hat of Eq. (5): sigmoid of a saliency head's output. (N, 1, ...) -> (N, ...) float32 in [0, 1].

    Here and in `guided_attention` float64 stays float64.
    """
    return _at_least_float32(saliency).squeeze(1).sigmoid()


def guided_attention(transformed: Tensor, other_filter: Tensor, config: AttentionConfig) -> Tensor:
    """s of Eq. (4): how much each position answers to the other modality's filter, fused over scales.

    Args:
        transformed: g(.) of this modality, (N, K, T, H, W) or (N, K, F, S).
        other_filter: kappa of the other modality, (N, K).
        config: normalisation, number of scales.

    Returns:
        (N, T, H, W) or (N, F, S), float32; within [0, 1] unless `config.norm` is "none".
    """
    num_dims = transformed.dim() - 2
    transformed, other_filter = _at_least_float32(transformed), _at_least_float32(other_filter)
    size = transformed.shape[2:]
    fused = transformed.new_zeros(transformed.shape[0], *size)
    for scale in range(config.num_scales):
        response = _response(transformed, other_filter, config)  # (N, *size of this scale)
        if scale > 0:
            mode = _INTERPOLATION[num_dims]
            response = F.interpolate(response[:, None], size=size, mode=mode, align_corners=False)[:, 0]
        fused = fused + response / config.num_scales
        if scale + 1 < config.num_scales:
            transformed = _halve(transformed, config.halve_time)
    if config.norm == "softmax" and config.num_scales > 1:
        # Interpolated softmax maps no longer sum to one.
        fused = fused / fused.flatten(1).sum(dim=1).view(-1, *[1] * num_dims)
    return fused


def _response(transformed: Tensor, other_filter: Tensor, config: AttentionConfig) -> Tensor:
    """norm(kappa * g(.)) at one scale: (N, K, ...), (N, K) -> (N, ...)."""
    shape = (*other_filter.shape, *[1] * (transformed.dim() - 2))
    if config.norm == "cosine":
        cosine = F.cosine_similarity(transformed, other_filter.view(shape), dim=1)
        if config.cosine_range == "shift":
            # Rounding takes a cosine past one by a few ulp.
            return ((1 + cosine) / 2).clamp(0, 1)
        if config.cosine_range == "relu":
            return cosine.clamp(0, 1)
        flat = cosine.flatten(1)
        low, high = flat.amin(dim=1, keepdim=True), flat.amax(dim=1, keepdim=True)
        return ((flat - low) / (high - low).clamp_min(1e-8)).view_as(cosine)
    correlation = (transformed * other_filter.view(shape)).sum(dim=1)
    if config.norm == "softmax":
        return correlation.flatten(1).softmax(dim=1).view_as(correlation)
    return correlation


def _halve(transformed: Tensor, halve_time: bool) -> Tensor:
    """Average-pool by 2 over H and W (and T on request), or over F and S; a last odd cell is kept."""
    num_dims = transformed.dim() - 2
    kernel = (2, 2) if num_dims == 2 else (2 if halve_time else 1, 2, 2)
    # avg_pool3d refuses a kernel larger than its input.
    kernel = tuple(min(pair) for pair in zip(kernel, transformed.shape[2:]))
    return _AVERAGE_POOL[num_dims](transformed, kernel, ceil_mode=True)


def _at_least_float32(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
