"""How a training step is computed. Nothing here changes what is learned, beyond rounding."""

from dataclasses import dataclass
from typing import Literal, get_args

from loaders.kernels.choice import Impl

Convolutions = Literal["views", "conv3d"]
Checkpointing = Literal["none", "early"]


@dataclass(frozen=True, kw_only=True)
class ComputeConfig:
    """Which implementations a step uses; a run may be resumed with others."""

    convolutions: Convolutions = "views"
    """`views`: the video encoder's 1x3x3 and 3x1x1 convolutions as 2-D ones on views of channels-last memory.
    `conv3d`: as 3-D ones."""
    batch_norm: Impl = "auto"
    """Batch norm with the ReLU and residual sum behind it: one Triton operator (`fused`) or plain torch (`reference`);
    `auto` takes fused on CUDA, and the reference with `compile`, which fuses it itself."""
    losses: Impl = "auto"
    """Eqs. (4)-(7) in Triton, without ever storing similarities to the queues (`fused`), or in plain torch
    (`reference`); `auto` takes fused on CUDA."""
    pad_channels: bool = False
    """Fill up the video encoder's mid widths (45, 230, 460, 921) with zeros to multiples of 8, which tensor cores
    want."""
    activation_checkpointing: Checkpointing = "none"
    """`early`: keep nothing inside the video encoder's stem and first stage for backward, and compute them again:
    less memory, more time."""
    compile: bool = False
    """Run the encoders through torch.compile."""
    cuda_graph: bool = False
    """Replay the whole step as one CUDA graph; for small batches, where launching kernels takes longer than running
    them. One GPU, bf16 or fp32."""

    def __post_init__(self) -> None:
        for name, choices in (("convolutions", Convolutions), ("activation_checkpointing", Checkpointing)):
            if getattr(self, name) not in get_args(choices):
                expected = " or ".join(get_args(choices))
                raise ValueError(f"compute.{name} is {getattr(self, name)!r}, expected {expected}")
        if self.compile and self.activation_checkpointing != "none":
            raise ValueError(
                "compute.compile is True with compute.activation_checkpointing "
                f"{self.activation_checkpointing!r}; use one of them"
            )
        if self.compile and self.batch_norm == "fused":
            raise ValueError(
                "compute.compile is True with compute.batch_norm 'fused'; torch.compile fuses batch norm itself: "
                "leave compute.batch_norm at 'auto'"
            )

    def batch_norm_impl(self) -> Impl:
        """`batch_norm`, with what `compile` means for it."""
        return "reference" if self.compile else self.batch_norm
