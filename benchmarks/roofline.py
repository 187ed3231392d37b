"""How many clips per second the layers of the model allow at most, from their shapes and measured ceilings.

Each convolution takes the longer of its arithmetic and its memory traffic (input and output once; weights are not
counted); batch norm, ReLU and residual sum take their traffic, nothing of it kept on the chip:

- eager: forward 3 elements per output of a batch norm (twice read, once written), 2 per ReLU, 3 per sum; backward
  5, 3 and 3 (where a sum's two branches begin, their gradients are added).
- fused: batch norm with what follows it, forward 3 and 1 more for a shortcut; backward 5, and 6 more for a shortcut
  (the saved output read twice, its gradient written, and the sum of the branches' gradients).

The query encoders run forward and backward, the key encoders forward. The optimizer reads parameters, gradients and
momentum and writes two of them; the momentum update reads two and writes one. Pooling, attention and the losses are
left out: less than a hundredth. Needs torch alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from cmac.compute import ComputeConfig
from cmac.model import CMAC, ModelConfig


@dataclass(frozen=True)
class Convolution:
    """What a convolution does to one clip."""

    flops: int
    """Forward; backward by its input and by its weight take as many each."""
    elements: int
    """Of input and output."""
    is_first: bool
    """Its input needs no gradient."""
    has_keys: bool
    """It is in a key encoder, too."""


@dataclass(frozen=True)
class Pointwise:
    """What a batch norm with what follows it, or a ReLU by itself, does to one clip."""

    elements: int
    """Of the output."""
    norm: bool
    relu: bool
    shortcut: bool
    has_keys: bool

    def traffic(self, fused: bool) -> tuple[int, int]:
        """Elements moved (forward, backward)."""
        n = self.elements
        if fused and self.norm:
            return n * (4 if self.shortcut else 3), n * (11 if self.shortcut else 5)
        forward = 3 * self.norm + 2 * self.relu + 3 * self.shortcut
        backward = 5 * self.norm + 3 * self.relu + 3 * self.shortcut
        return n * forward, n * backward


@dataclass(frozen=True)
class Costs:
    """Of one step."""

    convolutions: tuple[Convolution, ...]
    pointwise: tuple[Pointwise, ...]
    num_parameters: int
    num_key_parameters: int

    def flops(self) -> int:
        """Of the convolutions per clip: queries forward and backward, keys forward."""
        return sum(c.flops * ((2 if c.is_first else 3) + c.has_keys) for c in self.convolutions)

    def traffic(self, fused: bool, element_bytes: int) -> int:
        """Bytes per clip, the optimizer's left out."""
        total = sum(c.elements * ((2 if c.is_first else 3) + c.has_keys) for c in self.convolutions)
        for each in self.pointwise:
            forward, backward = each.traffic(fused)
            total += forward * (1 + each.has_keys) + backward
        return total * element_bytes

    def clips_per_second(
        self, ceiling: dict[str, Any], *, fused: bool, num_clips: int, element_bytes: int
    ) -> float:
        """The roofline. ceiling: of `timing.measure_ceiling`; num_clips: that share an optimizer step."""
        bandwidth = ceiling["copy_bytes_per_second"]
        seconds = 0.0
        for each in self.convolutions:
            once = max(each.flops / ceiling["matmul_flops"], each.elements * element_bytes / bandwidth)
            seconds += once * ((2 if each.is_first else 3) + each.has_keys)
        for each in self.pointwise:
            forward, backward = each.traffic(fused)
            seconds += (forward * (1 + each.has_keys) + backward) * element_bytes / bandwidth
        update = 4 * (5 * self.num_parameters + 3 * self.num_key_parameters)
        return 1 / (seconds + update / bandwidth / num_clips)


def step_costs(config: ModelConfig, frames: Sequence[int], log_mel: Sequence[int]) -> Costs:
    """Costs of the layers of a model, from one clip that runs through it without memory.

    frames: (C, T, H, W) of a clip; log_mel: (1, F, S).
    """
    plain = ComputeConfig(convolutions="conv3d", batch_norm="reference", losses="reference")
    convolutions: list[Convolution] = []
    pointwise: list[Pointwise] = []
    with torch.device("meta"):
        model = CMAC(config, compute=plain)
    first = {model.video.encoder.stem[0], model.audio.encoder.conv1}
    with_keys = {*model.video.modules(), *model.audio.modules()}

    def see(module: nn.Module, arguments: tuple, out: Tensor) -> None:
        has_keys = module in with_keys
        if isinstance(module, nn.modules.conv._ConvNd):
            flops = 2 * out.numel() * prod(module.weight.shape[1:])
            elements = arguments[0].numel() + out.numel()
            convolutions.append(Convolution(flops, elements, module in first, has_keys))
        elif isinstance(module, nn.modules.batchnorm._BatchNorm):
            _, shortcut, relu = (*arguments, None, False)[:3]
            pointwise.append(Pointwise(out.numel(), True, relu, shortcut is not None, has_keys))
        elif isinstance(module, nn.ReLU):
            pointwise.append(Pointwise(out.numel(), False, True, False, has_keys))

    for module in model.modules():
        module.register_forward_hook(see)
    with torch.no_grad():
        features = model.video(torch.empty(1, *frames, device="meta"))[0]
        model.saliency_v(features)
        features = model.audio(torch.empty(1, *log_mel, device="meta"))[0]
        model.saliency_a(features)
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    keys = sum(key.numel() for key in model.momentum_pairs()[1])
    return Costs(tuple(convolutions), tuple(pointwise), trained, keys)
