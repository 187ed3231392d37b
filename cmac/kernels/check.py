"""Whether the kernels compute on this device what plain torch computes, asked once before a run relies on them.

A driver, a GPU or a version of Triton that nobody tried may refuse a kernel or miscompile it. That is to cost speed,
not a run. (One fault does end it: a kernel that touches memory that is not its own, after which CUDA answers nothing.)
"""

import dataclasses
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from cmac.attention import AttentionConfig
from cmac.compute import ComputeConfig
from cmac.consistency import consistency_loss, why_no_kernel
from cmac.losses import MAX_FUSED_DIM, Negatives, contrastive_loss
from cmac.norm import build_norm_layers
from loaders.kernels.choice import Impl, why_not_fused

TOLERANCES = {torch.float32: 1e-3, torch.bfloat16: 3e-2}
"""Of each channel's or clip's results: length of the difference over length, by dtype of the inputs. Rounding comes to
a tenth of it."""

Part = tuple[torch.dtype, Tensor]
"""(dtype of the inputs, results: one row for each channel or clip)."""
Check = Callable[[Impl, torch.device], Iterator[Part]]
"""What an implementation makes of a small problem."""


def resolve_compute(
    compute: ComputeConfig,
    device: torch.device | str,
    *,
    num_clips: int = 16,
    dim: int = 256,
    attention: AttentionConfig | None = None,
) -> tuple[ComputeConfig, list[str]]:
    """What `auto` may choose from on this device, and lines that say so.

    On CUDA the kernels run beside plain torch first; where they fail or differ, `auto` becomes `reference`. Elsewhere,
    and where the user chose, nothing changes.

    Args:
        compute: the configuration.
        device: where the run computes.
        num_clips: of a batch on this device, which decides how the kernel of Eq. (7) is tiled.
        dim: of the embeddings that it compares.
        attention: options of the kernels of Eqs. (4)-(6).
    """
    device = torch.device(device)
    losses = partial(_losses, num_clips=num_clips, dim=dim, attention=attention or AttentionConfig())
    lines = []
    for name, check in (("batch_norm", _batch_norm), ("losses", losses)):
        if getattr(compute, name) != "auto":
            continue
        if device.type != "cuda":
            lines.append(f"compute.{name}: plain torch (on {device.type})")
            continue
        fault = why_not_fused(device.type) or find_fault(check, device)
        if fault is None:
            compiled = ", torch.compile's in the encoders" if name == "batch_norm" and compute.compile else ""
            lines.append(f"compute.{name}: kernels (they agree with plain torch here){compiled}")
        else:
            compute = dataclasses.replace(compute, **{name: "reference"})
            lines.append(
                f"WARNING: compute.{name}: plain torch, which is slower, as the kernels fail here: {fault}"
            )
    return compute, lines


def find_fault(check: Check, device: torch.device) -> str | None:
    """What is wrong with kernels on this device; None if their results are plain torch's."""
    try:
        for (dtype, expected), (_, found) in zip(
            check("reference", device), check("fused", device), strict=True
        ):
            expected, found = expected.float().flatten(1), found.float().flatten(1)
            # A row that is next to nothing beside the others may be rounding alone.
            least = 1e-3 * expected.norm() / len(expected) ** 0.5
            apart = ((expected - found).norm(dim=1) / expected.norm(dim=1).clamp_min(least)).max().item()
            if not apart <= TOLERANCES[dtype]:  # not a number is a fault as well
                return f"results in {dtype} are {apart:.1e} from plain torch's"
    except Exception as error:  # compilers and drivers raise what they like
        return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"[:300]
    return None


def _batch_norm(impl: Impl, device: torch.device) -> Iterator[Part]:
    """Outputs, gradients and statistics of a grouped batch norm at an odd width, with and without shortcut."""
    generator = torch.Generator(device).manual_seed(0)
    inputs = [
        torch.randn(4, 3, 9, 7, 45, generator=generator, device=device).permute(0, 4, 1, 2, 3)
        for _ in range(3)
    ]
    for dtype in TOLERANCES:
        for with_shortcut in (False, True):
            x, shortcut, gradient = (tensor.to(dtype, copy=True) for tensor in inputs)
            norm = build_norm_layers(2, impl)[1](45).to(device)
            if dtype != torch.float32:  # rounding would move gradients to the other side of the ReLU
                torch.nn.init.constant_(norm.bias, 12.0)
            x.requires_grad_(), shortcut.requires_grad_(with_shortcut)
            out = norm(x, shortcut if with_shortcut else None, relu=True)
            out.backward(gradient)
            yield from ((dtype, tensor.transpose(0, 1)) for tensor in (out.detach(), x.grad))
            if with_shortcut:
                yield dtype, shortcut.grad.transpose(0, 1)
            for per_channel in (norm.weight.grad, norm.bias.grad, norm.running_mean, norm.running_var):
                yield dtype, per_channel[None]


def _losses(
    impl: Impl, device: torch.device, num_clips: int, dim: int, attention: AttentionConfig
) -> Iterator[Part]:
    """Losses and gradients of Eqs. (6) and (7)."""
    generator = torch.Generator(device).manual_seed(0)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    def unit(*shape: int) -> Tensor:
        return torch.nn.functional.normalize(noise(*shape), dim=1)

    # Both directions are stacked; the queues are long enough for several programs.
    query, key, banks = unit(2 * num_clips, dim), unit(2 * num_clips, dim), (unit(1501, dim), unit(307, dim))
    ids = torch.arange(2 * num_clips, device=device)
    for dtype in TOLERANCES:
        negatives = [Negatives(bank.to(dtype), torch.arange(len(bank), device=device) - 1) for bank in banks]
        leaf = query.clone().requires_grad_()
        output = contrastive_loss(
            leaf, key, ids, negatives, 0.2, "reference" if dim > MAX_FUSED_DIM else impl
        )
        output.loss.sum().backward()
        yield from ((dtype, tensor) for tensor in (output.loss.detach()[None], leaf.grad))
    if why_no_kernel(attention):
        return
    for size in ((4, 8, 8), (9, 4)):
        memory_format = torch.channels_last_3d if len(size) == 3 else torch.channels_last
        for dtype in TOLERANCES:
            transformed = noise(2, 512, *size).to(dtype=dtype, memory_format=memory_format)
            leaves = [transformed, noise(2, 512), noise(2, 1, *size)]
            trained = leaves[2:] if attention.detach_target else leaves
            for leaf in trained:
                leaf.requires_grad_()
            loss = consistency_loss(*leaves, attention, "sum", impl)
            loss.sum().backward()
            yield from ((dtype, tensor) for tensor in (loss.detach()[None], *(leaf.grad for leaf in trained)))
