"""The two encoders: R(2+1)D for video (f_v) and a small ResNet for log-mel spectrograms (f_a).

Module names and shapes are torchvision's (`r2plus1d_18`; `ResNet` with one BasicBlock per stage), so weights move
both ways with `load_state_dict(strict=True)`.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NormLayer = Callable[[int], nn.Module]


@dataclass(frozen=True, kw_only=True)
class VideoEncoderConfig:
    """Shape of the R(2+1)D encoder; the defaults are R(2+1)D-18 (31,300,125 parameters without the classifier)."""

    widths: tuple[int, ...] = (64, 128, 256, 512)
    """Channels of each stage; the last is the C of the paper's v in R^{C x T x H x W}."""
    blocks: tuple[int, ...] = (2, 2, 2, 2)
    """Residual blocks per stage. Every stage but the first halves T, H and W."""
    stem_width: int = 45
    """Channels between the stem's 1x7x7 and 3x1x1 convolutions."""

    def __post_init__(self) -> None:
        _check_stages("model.video", self.widths, self.blocks)
        if self.stem_width < 1:
            raise ValueError(f"model.video.stem_width is {self.stem_width}, expected at least 1")


@dataclass(frozen=True, kw_only=True)
class AudioEncoderConfig:
    """Shape of the spectrogram ResNet; the defaults are ResNet-9 (4,899,520 parameters without a classifier)."""

    widths: tuple[int, ...] = (64, 128, 256, 512)
    """Channels of each stage. Every stage but the first halves F and S."""
    blocks: tuple[int, ...] = (1, 1, 1, 1)
    """Residual blocks per stage."""

    def __post_init__(self) -> None:
        _check_stages("model.audio", self.widths, self.blocks)


def _check_stages(name: str, widths: tuple[int, ...], blocks: tuple[int, ...]) -> None:
    if not widths or len(widths) != len(blocks) or min(widths) < 1 or min(blocks) < 1:
        raise ValueError(
            f"{name}: widths {widths} and blocks {blocks}, expected two non-empty tuples of one length, all at least 1"
        )


class _SpatioTemporalConv(nn.Sequential):
    """1x3x3 convolution, batch norm, ReLU, 3x1x1 convolution: (N, C, T, H, W) -> (N, out, T/s, H/s, W/s)."""

    def __init__(
        self, in_channels: int, out_channels: int, mid_channels: int, stride: int, norm: NormLayer
    ) -> None:
        super().__init__(
            nn.Conv3d(in_channels, mid_channels, (1, 3, 3), (1, stride, stride), (0, 1, 1), bias=False),
            norm(mid_channels),
            nn.ReLU(inplace=True),
            nn.Conv3d(mid_channels, out_channels, (3, 1, 1), (stride, 1, 1), (1, 0, 0), bias=False),
        )


class _VideoBlock(nn.Module):
    """Residual block of two (2+1)D convolutions with one mid width for both, as torchvision and GDT have it."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, norm: NormLayer) -> None:
        super().__init__()
        mid = (27 * in_channels * out_channels) // (9 * in_channels + 3 * out_channels)
        self.conv1 = nn.Sequential(
            _SpatioTemporalConv(in_channels, out_channels, mid, stride, norm),
            norm(out_channels),
            nn.ReLU(inplace=True),
        )
        self.conv2 = nn.Sequential(
            _SpatioTemporalConv(out_channels, out_channels, mid, 1, norm), norm(out_channels)
        )
        self.relu = nn.ReLU(inplace=True)
        self.downsample = None
        if stride != 1 or in_channels != out_channels:
            self.downsample = nn.Sequential(
                nn.Conv3d(in_channels, out_channels, 1, stride, bias=False), norm(out_channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        return self.relu(self.conv2(self.conv1(x)) + shortcut)


class R2Plus1D(nn.Module):
    """f_v: R(2+1)D with torchvision's names.

    Args:
        config: widths and depths.
        num_classes: adds torchvision's `fc` when given; `classify` then works.
        norm: makes a batch norm from a channel count.
    """

    def __init__(
        self, config: VideoEncoderConfig, num_classes: int | None = None, norm: NormLayer = nn.BatchNorm3d
    ) -> None:
        super().__init__()
        self.out_channels = config.widths[-1]
        self.stem = nn.Sequential(
            nn.Conv3d(3, config.stem_width, (1, 7, 7), (1, 2, 2), (0, 3, 3), bias=False),
            norm(config.stem_width),
            nn.ReLU(inplace=True),
            nn.Conv3d(config.stem_width, config.widths[0], (3, 1, 1), 1, (1, 0, 0), bias=False),
            norm(config.widths[0]),
            nn.ReLU(inplace=True),
        )
        self.num_stages = _add_stages(self, _VideoBlock, config.widths, config.blocks, norm)
        self.fc = None if num_classes is None else nn.Linear(self.out_channels, num_classes)
        initialize_weights(self)

    def forward(self, frames: Tensor) -> Tensor:
        """Features v. frames: (N, 3, T, H, W) normalised. Returns (N, C, T', H', W'); 3x32x128x128 gives 512x4x8x8."""
        x = self.stem(frames)
        for stage in range(1, self.num_stages + 1):
            x = getattr(self, f"layer{stage}")(x)
        return x

    def classify(self, frames: Tensor) -> Tensor:
        """Class logits (N, num_classes) from globally averaged features, as torchvision's forward gives them."""
        if self.fc is None:
            raise ValueError("this encoder has no classifier; build it with num_classes")
        return self.fc(self(frames).mean(dim=(2, 3, 4)))


class _AudioBlock(nn.Module):
    """ResNet basic block: two 3x3 convolutions."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, norm: NormLayer) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, 1, bias=False)
        self.bn1 = norm(out_channels)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, 1, 1, bias=False)
        self.bn2 = norm(out_channels)
        self.downsample = None
        if stride != 1 or in_channels != out_channels:
            self.downsample = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, stride, bias=False), norm(out_channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        x = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(x)) + shortcut)


class AudioResNet(nn.Module):
    """f_a: ResNet over one-channel spectrograms, 7x7 stride-2 stem and 3x3 stride-2 max-pool (GDT's ResNet-9)."""

    def __init__(self, config: AudioEncoderConfig, norm: NormLayer = nn.BatchNorm2d) -> None:
        super().__init__()
        self.out_channels = config.widths[-1]
        self.conv1 = nn.Conv2d(1, config.widths[0], 7, 2, 3, bias=False)
        self.bn1 = norm(config.widths[0])
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        self.num_stages = _add_stages(self, _AudioBlock, config.widths, config.blocks, norm)
        initialize_weights(self)

    def forward(self, log_mel: Tensor) -> Tensor:
        """Features a. log_mel: (N, 1, F, S) normalised. Returns (N, C, F', S'); 1x257x101 gives 512x9x4."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(log_mel))))
        for stage in range(1, self.num_stages + 1):
            x = getattr(self, f"layer{stage}")(x)
        return x


def _add_stages(
    module: nn.Module, block: type, widths: tuple[int, ...], blocks: tuple[int, ...], norm: NormLayer
) -> int:
    """Add `layer1`, `layer2`, ... to module; returns how many. Every stage but the first has stride 2."""
    in_channels = widths[0]
    for stage, (width, depth) in enumerate(zip(widths, blocks, strict=True)):
        layers = []
        for index in range(depth):
            stride = 2 if stage > 0 and index == 0 else 1
            layers.append(block(in_channels, width, stride, norm))
            in_channels = width
        module.add_module(f"layer{stage + 1}", nn.Sequential(*layers))
    return len(widths)


def initialize_weights(module: nn.Module) -> None:
    """Convolutions fan-out normal for ReLU, batch norms 1 and 0, linear layers normal(0, 0.01).

    Choice: the paper names no initialisation; these are GDT's and torchvision's.
    """
    for layer in module.modules():
        if isinstance(layer, (nn.Conv2d, nn.Conv3d)):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
        elif isinstance(layer, (nn.BatchNorm2d, nn.BatchNorm3d)):
            nn.init.ones_(layer.weight)
            nn.init.zeros_(layer.bias)
        elif isinstance(layer, nn.Linear):
            nn.init.normal_(layer.weight, 0, 0.01)
            nn.init.zeros_(layer.bias)


def count_parameters(module: nn.Module) -> int:
    """Number of parameters, shared ones counted once."""
    return sum(parameter.numel() for parameter in module.parameters())


class _GroupedBatchNorm(nn.Module):
    """Batch norm whose training statistics come from groups of neighbours, as if each group were on its own GPU.

    With one process there are no ranks to shuffle keys over, and a positive pair that shares batch statistics lets
    the statistics give it away (MoCo, section 3.3). A batch of at most `group_size` clips, or one that `group_size`
    does not divide, is normalised as a whole. State and evaluation are those of a plain batch norm.
    """

    group_size: int = 0

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or x.shape[0] <= self.group_size or x.shape[0] % self.group_size:
            return super().forward(x)
        groups, means, variances = [], [], []
        for group in x.split(self.group_size):
            # Clones: autograd keeps the running statistics that it was given, so they must not change later.
            mean, variance = self.running_mean.clone(), self.running_var.clone()
            groups.append(
                F.batch_norm(group, mean, variance, self.weight, self.bias, True, self.momentum, self.eps)
            )
            means.append(mean)
            variances.append(variance)
        with torch.no_grad():
            self.running_mean.copy_(torch.stack(means).mean(0))
            self.running_var.copy_(torch.stack(variances).mean(0))
            self.num_batches_tracked.add_(1)
        return torch.cat(groups)


class GroupedBatchNorm2d(_GroupedBatchNorm, nn.BatchNorm2d):
    """(N, C, H, W); see `_GroupedBatchNorm`."""


class GroupedBatchNorm3d(_GroupedBatchNorm, nn.BatchNorm3d):
    """(N, C, T, H, W); see `_GroupedBatchNorm`."""


def build_norm_layers(group_size: int | None) -> tuple[NormLayer, NormLayer]:
    """(2-D, 3-D) batch-norm constructors; `group_size` None gives torch's own."""
    if group_size is None:
        return nn.BatchNorm2d, nn.BatchNorm3d

    def grouped(kind: type[_GroupedBatchNorm]) -> NormLayer:
        def build(num_features: int) -> nn.Module:
            layer = kind(num_features)
            layer.group_size = group_size
            return layer

        return build

    return grouped(GroupedBatchNorm2d), grouped(GroupedBatchNorm3d)
