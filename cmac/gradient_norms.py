"""How strongly each loss of Eq. (8) pulls at the weights, and whether both pull the same way."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from cmac.collectives import num_ranks


@dataclass(frozen=True, kw_only=True)
class GradientNorms:
    """Euclidean norms of one step's gradients over all trained weights: of the mean over ranks, before clipping and
    weight decay, without loss scaling. float32 scalars on the device, the same on all ranks; they are not finite where
    the gradients are not."""

    whole: Tensor
    """Of Eq. (8): what the optimizer gets."""
    contrastive: Tensor | None
    """Of the sum of Eq. (7) alone; None if it is not trained."""
    consistency: Tensor | None
    """Of lambda times the sum of Eq. (6) alone; None if it is not trained."""
    cosine: Tensor | None
    """Of the angle between both, over the weights that both reach (each loss has heads of its own, which would hide
    a conflict): below 0 they pull apart. None unless both are trained."""


def measure_parts(
    contrastive: Tensor, consistency: Tensor, parameters: Sequence[Tensor], scale: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Norms of the gradients of two losses, and the cosine of the angle between them (see `GradientNorms`).

    The graph stays as it is, for the backward pass that trains; no gradient is accumulated, and hooks of
    DistributedDataParallel do not run. All ranks must call it. Takes a backward pass for each loss and memory for
    three gradients.

    Args:
        contrastive, consistency: scalars with a graph, on this rank; the latter times lambda.
        parameters: with respect to which.
        scale: scalar that losses are multiplied by, so that gradients in half precision do not vanish.
    """
    first, second = (
        torch.autograd.grad(loss * scale, parameters, retain_graph=True, allow_unused=True)
        for loss in (contrastive, consistency)
    )
    shared = [a is not None and b is not None for a, b in zip(first, second, strict=True)]
    num_shared = sum(parameter.numel() for parameter, both in zip(parameters, shared, strict=True) if both)
    first = _mean_over_ranks(first, shared, scale)
    second = _mean_over_ranks(second, shared, scale)
    first_shared, second_shared = first[:num_shared], second[:num_shared]
    cosine = (first_shared @ second_shared) / (first_shared.norm() * second_shared.norm())
    return first.norm(), second.norm(), cosine


def whole_norm(parameters: Sequence[Tensor], scale: Tensor) -> Tensor:
    """Norm of the gradients that a backward pass has left, which are scaled."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    return torch.stack(torch._foreach_norm(gradients)).norm() / scale


def _mean_over_ranks(gradients: Sequence[Tensor | None], shared: Sequence[bool], scale: Tensor) -> Tensor:
    """All numbers of the gradients that there are in one vector, those of shared weights first."""
    ordered = sorted(zip(shared, gradients, strict=True), key=lambda pair: not pair[0])
    flat = torch.cat([gradient.flatten() for _, gradient in ordered if gradient is not None])
    if num_ranks() > 1:
        dist.all_reduce(flat)
    return flat.div_(scale * num_ranks())
