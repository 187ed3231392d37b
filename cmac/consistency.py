"""Attention consistency, Eqs. (4)-(6) in one call: the choice between plain torch and the kernels."""

import functools
import logging

from torch import Tensor

from cmac.attention import AttentionConfig, guided_attention, predicted_attention
from cmac.losses import attention_consistency_loss
from loaders.kernels.choice import Impl, choose_impl

log = logging.getLogger(__name__)


def consistency_loss(
    transformed: Tensor,
    other_filter: Tensor,
    saliency: Tensor,
    config: AttentionConfig,
    reduction: str = "sum",
    impl: Impl = "auto",
) -> Tensor:
    """Eq. (6) of one modality, per clip: ||s - s-hat||^2 of the guided and the predicted attention.

    Args:
        transformed: g(.) of this modality, (N, K, T, H, W) or (N, K, F, S), any float dtype. The kernels read
            channels-last memory; anything else costs them a copy.
        other_filter: kappa of the other modality, (N, K).
        saliency: h(.) of this modality before the sigmoid, (N, 1, ...) with the positions of `transformed`.
        config: Eqs. (4)-(5). With `detach_target` only `saliency` gets a gradient, else all three do.
        reduction: "sum" over a clip's positions, or "mean".
        impl: see `choice.Impl`. The kernels know `config.norm` "cosine" with `cosine_range` "shift" or "relu",
            and "none"; of the others `auto` takes the reference.

    Returns:
        (N,) float32. It is computed in float32, from whatever dtype.

    Raises:
        ValueError: reduction, impl or a shape is not one of those above, or `fused` cannot run: the message says
            what is missing.
    """
    _check(transformed, other_filter, saliency, reduction)
    why_not = why_no_kernel(config)
    if why_not and impl == "fused":
        raise ValueError(
            f"impl is 'fused', but {why_not}; expected model.attention.norm 'cosine' with cosine_range 'shift' or "
            "'relu', or norm 'none', or impl 'auto' or 'reference'"
        )
    if why_not and impl == "auto":
        _log_reference(why_not)
        impl = "reference"
    fused = choose_impl("attention consistency", impl, transformed.device.type) == "fused"
    if fused and len(transformed) > 0:
        from cmac.kernels.consistency_triton import fused_attention_consistency

        return fused_attention_consistency(transformed, other_filter, saliency, config, reduction)
    return consistency_loss_reference(transformed, other_filter, saliency, config, reduction)


def consistency_loss_reference(
    transformed: Tensor,
    other_filter: Tensor,
    saliency: Tensor,
    config: AttentionConfig,
    reduction: str = "sum",
) -> Tensor:
    """`consistency_loss` as the equations read, in plain torch."""
    guided = guided_attention(transformed, other_filter, config)
    if config.detach_target:
        guided = guided.detach()
    return attention_consistency_loss(guided, predicted_attention(saliency), reduction)


def _check(transformed: Tensor, other_filter: Tensor, saliency: Tensor, reduction: str) -> None:
    """Raises ValueError unless the arguments of consistency_loss fit together."""
    if reduction not in ("sum", "mean"):
        raise ValueError(f"loss.consistency_reduction is {reduction!r}, expected 'sum' or 'mean'")
    if transformed.dim() not in (4, 5):
        raise ValueError(
            f"transformed is {tuple(transformed.shape)}, expected (N, K, T, H, W) or (N, K, F, S)"
        )
    num_clips, channels, *size = transformed.shape
    for name, tensor, expected in (
        ("other_filter", other_filter, (num_clips, channels)),
        ("saliency", saliency, (num_clips, 1, *size)),
    ):
        if tuple(tensor.shape) != expected:
            raise ValueError(
                f"{name} is {tuple(tensor.shape)}, expected {expected} beside transformed {tuple(transformed.shape)}"
            )
        if tensor.device != transformed.device:
            raise ValueError(f"{name} is on {tensor.device}, expected {transformed.device} as transformed")


def why_no_kernel(config: AttentionConfig) -> str | None:
    """Which option the kernels lack; None if they have all."""
    if config.norm == "softmax":
        return "model.attention.norm is 'softmax'"
    if config.norm == "cosine" and config.cosine_range == "minmax":
        return "model.attention.cosine_range is 'minmax'"
    return None


@functools.cache
def _log_reference(why_not: str) -> None:
    log.info("attention consistency: %s, which has no kernel; runs in plain torch", why_not)
