"""Batch norm with what follows it: relu(bn(x) + shortcut) in one call, and statistics of groups of clips.

State dictionaries are torch's. The fused implementation (`cmac.kernels.batch_norm_triton`) reads and writes
channels-last memory; the reference is torch's batch norm.
"""

import contextlib
import functools
import logging
from collections.abc import Callable, Iterator
from typing import get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from loaders.kernels.choice import Impl, choose_impl

log = logging.getLogger(__name__)

NormLayer = Callable[[int], nn.Module]
FUSED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class _BatchNorm(nn.modules.batchnorm._BatchNorm):
    """relu(bn(x) + shortcut), where in training the statistics may come from groups of clips.

    With one process there are no ranks to shuffle keys over, and a positive pair that shares batch statistics lets
    the statistics give it away (MoCo, section 3.3). So `group_size` neighbors can be normalized by themselves, as if
    each group were on its own GPU; running statistics become the mean of what each group alone would make of them.
    A batch of at most `group_size` clips, or one that `group_size` does not divide, is normalized as a whole. State
    and evaluation are those of a plain batch norm.

    Args:
        num_features: C.
        group_size: clips that share statistics; None: all of the batch.
        impl: `auto`: fused in training, where x is channels-last on CUDA and not float64, else the reference; while
            torch.compile traces, the reference, which Inductor fuses. `fused`: raises where it cannot run.
            Evaluation always takes the reference.
        **options: of torch's batch norm.
    """

    def __init__(
        self, num_features: int, *, group_size: int | None = None, impl: Impl = "auto", **options: object
    ) -> None:
        super().__init__(num_features, **options)
        if group_size is not None and group_size < 1:
            raise ValueError(f"group_size is {group_size}, expected at least 1, or None for the whole batch")
        if impl not in get_args(Impl):
            raise ValueError(f"impl is {impl!r}, expected {' or '.join(get_args(Impl))}")
        if self.momentum is None:
            raise ValueError("momentum is None (a cumulative mean), expected a number")
        self.group_size = group_size
        self.impl = impl

    def forward(self, x: Tensor, shortcut: Tensor | None = None, relu: bool = False) -> Tensor:
        """relu(bn(x) + shortcut), in x's dtype and memory format.

        Args:
            x: (N, C, H, W) or (N, C, T, H, W).
            shortcut: added before the ReLU, x's shape; cast to x's dtype where it has another.
            relu: clamp at 0.
        """
        self._check_input_dim(x)
        if shortcut is not None and shortcut.dtype != x.dtype:
            shortcut = shortcut.to(x.dtype)
        if self._is_fused(x):
            return self._fused(x, shortcut, relu)
        num_groups = self._num_groups(x)
        if num_groups == 1:
            out = self._as_a_whole(x)
        elif torch.compiler.is_compiling():
            out = self._by_groups_for_inductor(x, num_groups)
        else:
            out = self._by_groups(x, num_groups)
        return _add_relu(out, shortcut, relu)

    def _num_groups(self, x: Tensor) -> int:
        size = self.group_size
        if not self.training or size is None or x.shape[0] <= size or x.shape[0] % size:
            return 1
        return x.shape[0] // size

    def _as_a_whole(self, x: Tensor) -> Tensor:
        if self.training and not self.track_running_stats:
            return self._torch_batch_norm(x)[0]
        return super().forward(x)

    def _torch_batch_norm(self, x: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """x normalized by its own statistics, and what running statistics would become.

        Clones: autograd keeps the running statistics that it was given, so they must not change later. It is given
        some even where they are held: a checkpoint's second run has to keep as many tensors as its first.
        """
        mean = None if self.running_mean is None else self.running_mean.clone()
        variance = None if self.running_var is None else self.running_var.clone()
        out = F.batch_norm(x, mean, variance, self.weight, self.bias, True, self.momentum, self.eps)
        return out, mean, variance

    def _by_groups(self, x: Tensor, num_groups: int) -> Tensor:
        groups, means, variances = zip(*map(self._torch_batch_norm, x.chunk(num_groups)), strict=True)
        if self.track_running_stats:
            with torch.no_grad():
                self.running_mean.copy_(torch.stack(means).mean(0))
                self.running_var.copy_(torch.stack(variances).mean(0))
                self.num_batches_tracked.add_(1)
        return torch.cat(groups)

    def _by_groups_for_inductor(self, x: Tensor, num_groups: int) -> Tensor:
        """`_by_groups` as one reduction and one pointwise expression, whatever the number of groups."""
        grouped = x.unflatten(0, (num_groups, -1))  # (G, N/G, C, ...)
        if x.dtype in (torch.bfloat16, torch.float16):
            grouped = grouped.float()
        axes = [1, *range(3, grouped.dim())]
        count = grouped.numel() // (num_groups * x.shape[1])
        if count == 1:
            raise ValueError(
                f"x is {tuple(x.shape)} in {num_groups} groups, expected more than 1 value per channel"
            )
        variance, mean = torch.var_mean(grouped, axes, correction=0, keepdim=True)  # (G, 1, C, 1, ...)
        out = (grouped - mean) * (variance + self.eps).rsqrt()
        if self.affine:
            per_channel = (-1, *[1] * (x.dim() - 2))
            out = out * self.weight.view(per_channel) + self.bias.view(per_channel)
        if self.track_running_stats:
            with torch.no_grad():
                unbiased = variance.flatten(1).mean(0) * (count / (count - 1))
                self.running_mean.lerp_(mean.flatten(1).mean(0).to(self.running_mean.dtype), self.momentum)
                self.running_var.lerp_(unbiased.to(self.running_var.dtype), self.momentum)
                self.num_batches_tracked.add_(1)
        return out.flatten(0, 1).to(x.dtype)

    def _is_fused(self, x: Tensor) -> bool:
        if self.impl == "reference" or not self.training or x.numel() == 0:
            return False
        why_not = self._why_not_fused(x)
        if self.impl == "auto":
            if torch.compiler.is_compiling():
                return False
            if why_not:
                if x.device.type == "cuda":
                    _announce(why_not)
                return False
        elif why_not or torch.compiler.is_compiling():
            why_not = why_not or "torch.compile is tracing"
            raise ValueError(
                f"impl is {self.impl!r}, but {why_not}; expected impl 'auto' or 'reference' here"
            )
        return choose_impl("batch norm", self.impl, x.device.type) == "fused"

    def _why_not_fused(self, x: Tensor) -> str | None:
        if not self.affine or self.weight.dtype != torch.float32:
            return "weights are absent or not float32"
        if x.dtype not in FUSED_DTYPES:
            return f"x is {x.dtype}"
        if not is_channels_last(x):
            return "x is not channels-last in memory"
        return None

    def _fused(self, x: Tensor, shortcut: Tensor | None, relu: bool) -> Tensor:
        from cmac.kernels.batch_norm_triton import fused_batch_norm

        return fused_batch_norm(
            x,
            self.weight,
            self.bias,
            self.running_mean,
            self.running_var,
            shortcut,
            relu,
            self.momentum,
            self.eps,
            self.group_size,
            self.track_running_stats,
            self.num_batches_tracked,
        )


@functools.cache
def _announce(why_not: str) -> None:
    log.warning("batch norm: %s; runs in plain torch, which is slower", why_not)


class BatchNorm2d(_BatchNorm, nn.BatchNorm2d):
    """relu(bn(x) + shortcut) of (N, C, H, W); see `_BatchNorm`."""


class BatchNorm3d(_BatchNorm, nn.BatchNorm3d):
    """relu(bn(x) + shortcut) of (N, C, T, H, W); see `_BatchNorm`."""


def apply_norm(norm: nn.Module, x: Tensor, shortcut: Tensor | None = None, relu: bool = True) -> Tensor:
    """relu(norm(x) + shortcut): one call of our layers, three of any other (nn.SyncBatchNorm)."""
    if isinstance(norm, _BatchNorm):
        return norm(x, shortcut, relu)
    out = norm(x)
    if out is x and shortcut is None:  # nn.Identity: not ours to overwrite
        return F.relu(x) if relu else x
    return _add_relu(out, shortcut, relu)


def _add_relu(out: Tensor, shortcut: Tensor | None, relu: bool) -> Tensor:
    if shortcut is not None:
        out = out + shortcut
    return F.relu(out, inplace=True) if relu else out  # out is new, and no backward needs it as it was


def is_channels_last(x: Tensor) -> bool:
    """Whether memory holds x (N, C, ...) as a dense (N * positions, C)."""
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    return x.dim() in formats and x.is_contiguous(memory_format=formats[x.dim()])


def build_norm_layers(group_size: int | None, impl: Impl = "auto") -> tuple[NormLayer, NormLayer]:
    """(2-D, 3-D) batch-norm constructors, each from a number of channels; see `_BatchNorm`."""
    options = {"group_size": group_size, "impl": impl}
    return functools.partial(BatchNorm2d, **options), functools.partial(BatchNorm3d, **options)


class hold_statistics(contextlib.AbstractContextManager):  # noqa: N801 - used as a function
    """Inside, batch norms in training normalize by the batch as ever, but leave running statistics and counts alone.

    For running a part of the network again, as activation checkpointing does in backward. It can be entered again
    after it was left: each backward through a graph that is kept runs the part once more.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module

    def __enter__(self) -> None:
        self._held = _hold_statistics(self._module)
        self._held.__enter__()

    def __exit__(self, *error: object) -> None:
        self._held.__exit__(*error)


@contextlib.contextmanager
def _hold_statistics(module: nn.Module) -> Iterator[None]:
    norms = [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    ours = [norm for norm in norms if isinstance(norm, _BatchNorm)]
    tracks = [norm.track_running_stats for norm in ours]
    others = [norm for norm in norms if not isinstance(norm, _BatchNorm) and norm.track_running_stats]
    buffers = [dict(norm.named_buffers(recurse=False)) for norm in others]
    for norm in ours:
        norm.track_running_stats = False
    for norm, kept in zip(others, buffers, strict=True):  # torch's get copies, which they may change
        for name, buffer in kept.items():
            setattr(norm, name, buffer.clone())
    try:
        yield
    finally:
        for norm, before in zip(ours, tracks, strict=True):
            norm.track_running_stats = before
        for norm, kept in zip(others, buffers, strict=True):
            for name, buffer in kept.items():
                setattr(norm, name, buffer)
