"""Whether the kernels compute on this device what plain torch computes, asked once before a run relies on them.

A driver, a GPU or a version of Triton that nobody tried may refuse a kernel or miscompile it. That is to cost speed,
not a run.
"""

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from cmac.attention import AttentionConfig
from cmac.compute import ComputeConfig
from cmac.consistency import consistency_loss
from cmac.losses import Negatives, contrastive_loss
from cmac.norm import build_norm_layers
from loaders.kernels.choice import Impl, why_not_fused

TOLERANCE = 1e-2
"""Root mean square of the difference over that of the values: bfloat16 comes to 4e-3, a fault to more."""


def resolve_compute(compute: ComputeConfig, device: torch.device | str) -> tuple[ComputeConfig, list[str]]:
    """(compute with `auto` replaced by what runs on this device, lines that say what was chosen and why).

    On CUDA each kernel takes a small step beside plain torch first; where it fails or differs, plain torch it is.
    """
    device = torch.device(device)
    lines = []
    for name, check in (("batch_norm", _batch_norm), ("losses", _losses)):
        impl = compute.batch_norm_impl() if name == "batch_norm" else compute.losses
        if impl == "auto":
            if device.type != "cuda":
                impl, why = "reference", f"on {device.type}"
            else:
                fault = why_not_fused(device.type) or find_fault(check, device)
                impl = "reference" if fault else "fused"
                why = (
                    f"slower than with the kernels: {fault}"
                    if fault
                    else "the kernels agree with plain torch here"
                )
            lines.append(f"compute.{name}: {impl} ({why})")
        compute = dataclasses.replace(compute, **{name: impl})
    return compute, lines


def find_fault(check: Callable[[Impl, torch.device], list[Tensor]], device: torch.device) -> str | None:
    """What is wrong with a kernel on this device; None if its results are plain torch's."""
    try:
        expected, found = ([part.float() for part in check(impl, device)] for impl in ("reference", "fused"))
    except Exception as error:  # compilers and drivers raise what they like
        return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"[:300]
    for one, other in zip(expected, found, strict=True):
        apart = (one - other).norm().item() / max(one.norm().item(), 1e-6)
        if not apart <= TOLERANCE:  # not a number is a fault as well
            return f"its results are {apart:.1e} from plain torch's"
    return None


def _batch_norm(impl: Impl, device: torch.device) -> list[Tensor]:
    """Outputs, gradients and statistics of a grouped batch norm with shortcut, at an odd width; in bfloat16 the outputs
    alone, as rounding moves gradients to the other side of the ReLU."""
    generator = torch.Generator(device).manual_seed(0)
    x, shortcut, gradient = (
        torch.randn(4, 3, 9, 7, 45, generator=generator, device=device).permute(0, 4, 1, 2, 3)
        for _ in range(3)
    )
    norm = build_norm_layers(2, impl)[1](45).to(device)
    half = norm(x.bfloat16(), shortcut.bfloat16(), relu=True).detach()
    x.requires_grad_(), shortcut.requires_grad_()
    out = norm(x, shortcut, relu=True)
    out.backward(gradient)
    parameters = [parameter.grad for parameter in norm.parameters()]
    return [half, out.detach(), x.grad, shortcut.grad, *parameters, norm.running_mean, norm.running_var]


def _losses(impl: Impl, device: torch.device) -> list[Tensor]:
    """Losses and gradients of Eqs. (6) and (7), the latter with float32 and bfloat16 banks."""
    generator = torch.Generator(device).manual_seed(0)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    def unit(*shape: int) -> Tensor:
        return torch.nn.functional.normalize(noise(*shape), dim=1)

    results = []
    query, key, banks = unit(9, 256), unit(9, 256), (unit(301, 256), unit(77, 256))
    ids = torch.arange(9, device=device)
    for dtype in (torch.float32, torch.bfloat16):
        negatives = [Negatives(bank.to(dtype), torch.arange(len(bank), device=device) - 1) for bank in banks]
        leaf = query.clone().requires_grad_()
        output = contrastive_loss(leaf, key, ids, negatives, 0.2, impl)
        output.loss.sum().backward()
        results += [output.loss.detach(), leaf.grad]
    transformed = noise(2, 9, 4, 512).bfloat16().permute(0, 3, 1, 2)
    saliency, other_filter = noise(2, 1, 9, 4).requires_grad_(), noise(2, 512)
    loss = consistency_loss(transformed, other_filter, saliency, AttentionConfig(), "sum", impl)
    loss.sum().backward()
    return [*results, loss.detach(), saliency.grad]
