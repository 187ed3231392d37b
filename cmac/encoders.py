"""The two encoders: R(2+1)D for video (f_v) and a small ResNet for log-mel spectrograms (f_a).

Module names and shapes are torchvision's (`r2plus1d_18`; `ResNet` with one BasicBlock per stage), so weights move
both ways with `load_state_dict(strict=True)`.
"""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from cmac.compute import ComputeConfig
from cmac.norm import BatchNorm2d, BatchNorm3d, NormLayer, apply_norm, hold_statistics

MidPlanes = Literal["per-block", "per-conv"]


@dataclass(frozen=True, kw_only=True)
class VideoEncoderConfig:
    """Shape of the R(2+1)D encoder; the defaults are R(2+1)D-18 (31,300,125 parameters without the classifier)."""

    widths: tuple[int, ...] = (64, 128, 256, 512)
    """Channels of each stage; the last is the C of the paper's v in R^{C x T x H x W}."""
    blocks: tuple[int, ...] = (2, 2, 2, 2)
    """Residual blocks per stage. Every stage but the first halves T, H and W."""
    stem_width: int = 45
    """Channels between the stem's 1x7x7 and 3x1x1 convolutions."""
    midplanes: MidPlanes = "per-block"
    """Channels between the two parts of a (2+1)D convolution: `per-block`: computed once from the block's channels, as
    torchvision and GDT have it. `per-conv`: from each convolution's own, as XDC has it (33,165,639 parameters)."""
    norm_eps: float = 1e-5
    """Added to the variance by batch norms; XDC's have 1e-3."""
    norm_momentum: float = 0.1
    """Share of a batch's statistics in the running ones; XDC's batch norms have 0.9."""

    def __post_init__(self) -> None:
        _check_stages("model.video", self.widths, self.blocks)
        if self.stem_width < 1:
            raise ValueError(f"model.video.stem_width is {self.stem_width}, expected at least 1")
        if self.midplanes not in get_args(MidPlanes):
            raise ValueError(
                f"model.video.midplanes is {self.midplanes!r}, expected {' or '.join(get_args(MidPlanes))}"
            )
        if self.norm_eps <= 0:
            raise ValueError(f"model.video.norm_eps is {self.norm_eps}, expected more than 0")
        if not 0 < self.norm_momentum <= 1:
            raise ValueError(
                f"model.video.norm_momentum is {self.norm_momentum}, expected more than 0, up to 1"
            )


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


class FactoredConv3d(nn.Conv3d):
    """A 1 x k x k or k x 1 x 1 convolution, computed as a 2-D one on a view of channels-last memory.

    (N, C, T, H, W) in channels_last_3d memory is N * T channels-last images to a 1 x k x k kernel, and N images of T
    rows and H * W columns to a k x 1 x 1 kernel, so that the 2-D convolutions of cuDNN and oneDNN serve, which are
    better kept than their 3-D ones. Other memory layouts and kernels take nn.Conv3d's way. Parameters, initialization
    and state dict are nn.Conv3d's.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, T, H, W) -> (N, out_channels, T', H', W'), channels-last if x is."""
        return self.convolve(x, self.weight)

    def convolve(self, x: Tensor, weight: Tensor) -> Tensor:
        """`forward` with another weight (out, in, kt, kh, kw) of the same kernel size."""
        time, height, width = self.kernel_size
        if x.is_contiguous(memory_format=torch.channels_last_3d) and self._is_plain:
            if self.kernel_size == (1, 1, 1) and max(self.stride) > 1 and self.padding == (0, 0, 0):
                return frames_conv(_Subsample.apply(x, self.stride), weight, self.bias, (1, 1), (0, 0))
            if time == 1 and self.stride[0] == 1 and self.padding[0] == 0:
                return frames_conv(x, weight, self.bias, self.stride[1:], self.padding[1:])
            if height == width == 1 and self.stride[1:] == (1, 1) and self.padding[1:] == (0, 0):
                return time_conv(x, weight, self.bias, self.stride[0], self.padding[0])
        if x.device.type == "cpu" and torch.is_autocast_enabled("cpu"):
            # In half precision torch 2.11 gives gradients on CPUs that were never written.
            with torch.autocast("cpu", enabled=False):
                return self._conv_forward(x.float(), weight.float(), self.bias)
        return self._conv_forward(x, weight, self.bias)

    @property
    def _is_plain(self) -> bool:
        return self.groups == 1 and set(self.dilation) == {1} and self.padding_mode == "zeros"


class _Subsample(torch.autograd.Function):
    """What a strided 1 x 1 x 1 convolution sees of x, copied: backward fills one tensor and writes the few values that
    are not zero, where slices would fill one per axis."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, stride: tuple[int, int, int]) -> Tensor:
        ctx.stride, ctx.shape = stride, x.shape
        time, height, width = stride
        return x[:, :, ::time, ::height, ::width].contiguous(memory_format=torch.channels_last_3d)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        time, height, width = ctx.stride
        num_clips, channels, *size = ctx.shape
        full = gradient.new_zeros(num_clips, *size, channels).permute(0, 4, 1, 2, 3)
        full[:, :, ::time, ::height, ::width] = gradient
        return full, None


def frames_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: tuple[int, int], padding: tuple[int, int]
) -> Tensor:
    """Each frame by itself. x: (N, C, T, H, W), channels_last_3d; weight: (O, C, 1, kh, kw); bias: (O,) or None.

    Copies none of them.
    """
    num_clips, channels, num_frames, height, width = x.shape
    images = x.permute(0, 2, 3, 4, 1).reshape(num_clips * num_frames, height, width, channels)
    y = F.conv2d(images.permute(0, 3, 1, 2), weight.squeeze(2), bias, stride, padding)  # (N * T, O, H', W')
    y = y.permute(0, 2, 3, 1).reshape(num_clips, num_frames, *y.shape[2:], y.shape[1])
    return y.permute(0, 4, 1, 2, 3)  # (N, O, T, H', W')


def time_conv(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, padding: int) -> Tensor:
    """Each pixel by itself. x: (N, C, T, H, W), channels_last_3d; weight: (O, C, kt, 1, 1); bias: (O,) or None.

    Copies none of them.
    """
    num_clips, channels, num_frames, height, width = x.shape
    images = x.permute(0, 2, 3, 4, 1).reshape(num_clips, num_frames, height * width, channels)
    # Without its fourth axis, not its fifth, the weight's gradient has the weight's strides, as DDP wants them.
    y = F.conv2d(images.permute(0, 3, 1, 2), weight.squeeze(3), bias, (stride, 1), (padding, 0))
    y = y.permute(0, 2, 3, 1).reshape(num_clips, y.shape[2], height, width, y.shape[1])
    return y.permute(0, 4, 1, 2, 3)  # (N, O, T', H, W)


class _SpatioTemporalConv(nn.Sequential):
    """1 x k x k convolution, batch norm, ReLU, k x 1 x 1 convolution: (N, C, T, H, W) -> (N, out, T/s, H/s, W/s)."""

    def __init__(self, spatial: nn.Conv3d, norm: nn.Module, temporal: nn.Conv3d, pad_channels: bool) -> None:
        super().__init__(spatial, norm, nn.ReLU(inplace=True), temporal)
        self._padding = -spatial.out_channels % 8 if pad_channels else 0

    def forward(self, x: Tensor) -> Tensor:
        return _factored_forward(*self, x, self._padding)


def _factored_forward(
    spatial: nn.Conv3d, norm: nn.Module, _: nn.Module, temporal: nn.Conv3d, x: Tensor, padding: int
) -> Tensor:
    """temporal(relu(norm(spatial(x)))), with that many channels of zeros in between, which change nothing.

    The mid widths of R(2+1)D-18 are 45, 144, 230, 288, 460, 576, 921 and 1152; tensor cores want multiples of 8.
    """
    if padding == 0:
        return temporal(apply_norm(norm, spatial(x)))
    x = _convolve(spatial, x, _pad_channels(spatial.weight, 0, padding))
    # Zeros stay zeros: the norm's weights are padded with zeros as well.
    padded = {
        name: F.pad(value, (0, padding))
        for name, value in (*norm.named_parameters(), *norm.named_buffers())
        if value.dim() == 1
    }
    x = torch.func.functional_call(_ApplyNorm(norm), {f"norm.{n}": v for n, v in padded.items()}, (x,))
    with torch.no_grad():
        for name, buffer in norm.named_buffers():
            if buffer.dim() == 1:
                buffer.copy_(padded[name][: len(buffer)])
    return _convolve(temporal, x, _pad_channels(temporal.weight, 1, padding))


def _convolve(conv: nn.Conv3d, x: Tensor, weight: Tensor) -> Tensor:
    """conv(x) with another weight."""
    if isinstance(conv, FactoredConv3d):
        return conv.convolve(x, weight)
    return F.conv3d(x, weight, conv.bias, conv.stride, conv.padding)


class _ApplyNorm(nn.Module):
    """relu(norm(x)) as a module, for `torch.func.functional_call`."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        return apply_norm(self.norm, x)


def _pad_channels(weight: Tensor, dim: int, padding: int) -> Tensor:
    """A convolution's weight with zeros added to its outputs (dim 0) or inputs (dim 1), in channels-last memory."""
    zeros = [0] * 10
    zeros[2 * (4 - dim) + 1] = padding
    return F.pad(weight, zeros).contiguous(memory_format=torch.channels_last_3d)


class _VideoBlock(nn.Module):
    """Residual block of two (2+1)D convolutions."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, build: "_Builder") -> None:
        super().__init__()
        mid = mid_width(in_channels, out_channels)
        second_mid = mid if build.midplanes == "per-block" else mid_width(out_channels, out_channels)
        self.conv1 = nn.Sequential(
            build.factored_conv(in_channels, mid, out_channels, stride),
            build.norm(out_channels),
            nn.ReLU(inplace=True),
        )
        self.conv2 = nn.Sequential(
            build.factored_conv(out_channels, second_mid, out_channels, 1), build.norm(out_channels)
        )
        self.relu = nn.ReLU(inplace=True)
        self.downsample = None
        if stride != 1 or in_channels != out_channels:
            self.downsample = nn.Sequential(
                build.conv(in_channels, out_channels, 1, stride, bias=False), build.norm(out_channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x
        if self.downsample is not None:
            conv, norm = self.downsample
            shortcut = apply_norm(norm, conv(x), relu=False)
        conv, norm, _ = self.conv1  # the ReLUs hold torchvision's places; apply_norm does their work
        x = apply_norm(norm, conv(x))
        conv, norm = self.conv2
        return apply_norm(norm, conv(x), shortcut)


def mid_width(in_channels: int, out_channels: int) -> int:
    """Channels with which a (2+1)D convolution has about the parameters of a 3x3x3 one."""
    return (27 * in_channels * out_channels) // (9 * in_channels + 3 * out_channels)


@dataclass(frozen=True)
class _Builder:
    """How the video encoder's layers are made."""

    config: VideoEncoderConfig
    plain_norm: NormLayer
    conv: type[nn.Conv3d]
    pad_channels: bool

    @property
    def midplanes(self) -> MidPlanes:
        return self.config.midplanes

    def norm(self, channels: int) -> nn.Module:
        """A batch norm as the configuration wants it."""
        norm = self.plain_norm(channels)
        norm.eps, norm.momentum = self.config.norm_eps, self.config.norm_momentum
        return norm

    def factored_conv(
        self, in_channels: int, mid_channels: int, out_channels: int, stride: int
    ) -> _SpatioTemporalConv:
        """1x3x3 to mid_channels and 3x1x1 to out_channels, each with its part of the stride."""
        return _SpatioTemporalConv(
            self.conv(in_channels, mid_channels, (1, 3, 3), (1, stride, stride), (0, 1, 1), bias=False),
            self.norm(mid_channels),
            self.conv(mid_channels, out_channels, (3, 1, 1), (stride, 1, 1), (1, 0, 0), bias=False),
            self.pad_channels,
        )


class R2Plus1D(nn.Module):
    """f_v: R(2+1)D with torchvision's names.

    Args:
        config: widths and depths.
        num_classes: adds torchvision's `fc` when given; `classify` then works.
        norm: makes a batch norm from a channel count.
        compute: how it is computed; weights and results are the same whatever is chosen (to rounding).
    """

    def __init__(
        self,
        config: VideoEncoderConfig,
        num_classes: int | None = None,
        norm: NormLayer = BatchNorm3d,
        compute: ComputeConfig | None = None,
    ) -> None:
        super().__init__()
        compute = compute or ComputeConfig()
        conv = FactoredConv3d if compute.convolutions == "views" else nn.Conv3d
        build = _Builder(config, norm, conv, compute.pad_channels)
        self.out_channels = config.widths[-1]
        self.stem = nn.Sequential(
            conv(3, config.stem_width, (1, 7, 7), (1, 2, 2), (0, 3, 3), bias=False),
            build.norm(config.stem_width),
            nn.ReLU(inplace=True),
            conv(config.stem_width, config.widths[0], (3, 1, 1), 1, (1, 0, 0), bias=False),
            build.norm(config.widths[0]),
            nn.ReLU(inplace=True),
        )
        self._stem_padding = -config.stem_width % 8 if compute.pad_channels else 0
        self._checkpoint = compute.activation_checkpointing == "early"

        def block(in_channels: int, out_channels: int, stride: int) -> _VideoBlock:
            return _VideoBlock(in_channels, out_channels, stride, build)

        self.num_stages = _add_stages(self, block, config.widths, config.blocks)
        self.fc = None if num_classes is None else nn.Linear(self.out_channels, num_classes)
        initialize_weights(self)

    def forward(self, frames: Tensor) -> Tensor:
        """Features v. frames: (N, 3, T, H, W) normalised. Returns (N, C, T', H', W'); 3x32x128x128 gives 512x4x8x8."""
        # Two thirds of what backward keeps are the stem's and layer1's: those are worth computing twice.
        x = self._maybe_twice(self.stem, self._run_stem, frames)
        for block in self.layer1:
            x = self._maybe_twice(block, block, x)
        for stage in range(2, self.num_stages + 1):
            x = getattr(self, f"layer{stage}")(x)
        return x

    def _run_stem(self, frames: Tensor) -> Tensor:
        *factored, norm, _ = self.stem
        return apply_norm(norm, _factored_forward(*factored, frames, self._stem_padding))

    def _maybe_twice(self, module: nn.Module, run: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """run(x); with activation checkpointing nothing inside is kept, and backward runs it once more."""
        if not (self._checkpoint and torch.is_grad_enabled()):
            return run(x)
        return checkpoint(
            run,
            x,
            use_reentrant=False,
            preserve_rng_state=False,  # nothing in it is random
            context_fn=lambda: (nullcontext(), hold_statistics(module)),
        )

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
        shortcut = x
        if self.downsample is not None:
            conv, norm = self.downsample
            shortcut = apply_norm(norm, conv(x), relu=False)
        x = apply_norm(
            self.bn1, self.conv1(x)
        )  # the ReLU holds torchvision's place; apply_norm does its work
        return apply_norm(self.bn2, self.conv2(x), shortcut)


class AudioResNet(nn.Module):
    """f_a: ResNet over one-channel spectrograms, 7x7 stride-2 stem and 3x3 stride-2 max-pool (GDT's ResNet-9)."""

    def __init__(self, config: AudioEncoderConfig, norm: NormLayer = BatchNorm2d) -> None:
        super().__init__()
        self.out_channels = config.widths[-1]
        self.conv1 = nn.Conv2d(1, config.widths[0], 7, 2, 3, bias=False)
        self.bn1 = norm(config.widths[0])
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1)

        def block(in_channels: int, out_channels: int, stride: int) -> _AudioBlock:
            return _AudioBlock(in_channels, out_channels, stride, norm)

        self.num_stages = _add_stages(self, block, config.widths, config.blocks)
        initialize_weights(self)

    def forward(self, log_mel: Tensor) -> Tensor:
        """Features a. log_mel: (N, 1, F, S) normalised. Returns (N, C, F', S'); 1x257x101 gives 512x9x4."""
        x = self.maxpool(apply_norm(self.bn1, self.conv1(log_mel)))
        for stage in range(1, self.num_stages + 1):
            x = getattr(self, f"layer{stage}")(x)
        return x


def _add_stages(
    module: nn.Module,
    block: Callable[[int, int, int], nn.Module],
    widths: tuple[int, ...],
    blocks: tuple[int, ...],
) -> int:
    """Add `layer1`, `layer2`, ... to module; returns how many. Every stage but the first has stride 2.

    block: makes a block from its input channels, output channels and stride.
    """
    in_channels = widths[0]
    for stage, (width, depth) in enumerate(zip(widths, blocks, strict=True)):
        layers = []
        for index in range(depth):
            stride = 2 if stage > 0 and index == 0 else 1
            layers.append(block(in_channels, width, stride))
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
