"""The encoders are torchvision's in names, shapes and numbers, and as large as the paper says."""

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from cmac.compute import ComputeConfig
from cmac.encoders import (
    AudioEncoderConfig,
    AudioResNet,
    FactoredConv3d,
    R2Plus1D,
    VideoEncoderConfig,
    count_parameters,
)


def test_r2plus1d_has_torchvisions_state_dict_and_outputs():
    torchvision = pytest.importorskip("torchvision")
    torch.manual_seed(0)
    theirs = torchvision.models.video.r2plus1d_18(num_classes=7).eval()
    ours = R2Plus1D(VideoEncoderConfig(), num_classes=7).eval()
    for module in theirs.modules():
        if isinstance(module, nn.BatchNorm3d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    frames = torch.randn(1, 3, 8, 48, 48)
    with torch.no_grad():
        expected, got = theirs(frames), ours.classify(frames)
    assert expected.abs().max() > 1e-3
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


def test_audio_resnet_has_torchvisions_names_and_outputs():
    torchvision = pytest.importorskip("torchvision")
    theirs = torchvision.models.resnet.ResNet(torchvision.models.resnet.BasicBlock, [1, 1, 1, 1]).eval()
    theirs.conv1 = nn.Conv2d(1, 64, 7, 2, 3, bias=False)
    ours = AudioResNet(AudioEncoderConfig()).eval()
    without_fc = {name: value for name, value in theirs.state_dict().items() if not name.startswith("fc.")}
    ours.load_state_dict(without_fc, strict=True)
    log_mel = torch.randn(2, 1, 257, 101)
    with torch.no_grad():
        features = ours(log_mel)
        x = theirs.maxpool(theirs.relu(theirs.bn1(theirs.conv1(log_mel))))
        expected = theirs.layer4(theirs.layer3(theirs.layer2(theirs.layer1(x))))
    torch.testing.assert_close(features, expected, atol=1e-5, rtol=1e-5)


def test_encoders_have_the_papers_size_and_output_shape():
    with torch.device("meta"):
        video, audio = R2Plus1D(VideoEncoderConfig()), AudioResNet(AudioEncoderConfig())
        assert video(torch.empty(2, 3, 32, 128, 128)).shape == (2, 512, 4, 8, 8)
        assert audio(torch.empty(2, 1, 257, 101)).shape == (2, 512, 9, 4)
    assert count_parameters(video) == 31_300_125
    assert count_parameters(audio) == 4_899_520


def test_classify_without_a_classifier_says_how_to_get_one():
    with torch.device("meta"):
        video = R2Plus1D(VideoEncoderConfig())
        with pytest.raises(ValueError, match="num_classes"):
            video.classify(torch.empty(1, 3, 8, 32, 32))


@pytest.mark.parametrize("config", [VideoEncoderConfig, AudioEncoderConfig])
def test_widths_and_blocks_of_different_length_are_refused(config):
    with pytest.raises(ValueError, match=r"widths \(8, 16\) and blocks \(1,\)"):
        config(widths=(8, 16), blocks=(1,))


def full_gradients(
    encoder: nn.Module, run: Callable[[torch.Tensor], torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Output, parameter gradients and statistics of one training pass over float64 frames."""
    frames = torch.randn(4, 3, 6, 32, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    output = run(frames.to(memory_format=torch.channels_last_3d))
    output.square().mean().backward()
    gradients = {f"grad.{name}": p.grad for name, p in encoder.named_parameters() if p.grad is not None}
    return {"output": output.detach(), **gradients, **encoder.state_dict()}


@pytest.mark.parametrize(
    "compute",
    [
        ComputeConfig(),
        ComputeConfig(convolutions="conv3d"),
        ComputeConfig(pad_channels=True),
        ComputeConfig(convolutions="conv3d", pad_channels=True),
        ComputeConfig(activation_checkpointing="early"),
        ComputeConfig(activation_checkpointing="early", pad_channels=True),
    ],
    ids=["views", "conv3d", "padded", "conv3d-padded", "checkpointed", "checkpointed-padded"],
)
def test_every_way_to_compute_gives_torchvisions_outputs_gradients_and_statistics(compute):
    torchvision = pytest.importorskip("torchvision")
    torch.manual_seed(0)
    theirs = torchvision.models.video.r2plus1d_18()
    theirs.fc = None
    theirs = theirs.double().train()
    ours = R2Plus1D(VideoEncoderConfig(), compute=compute).double().train()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    ours.to(memory_format=torch.channels_last_3d)

    def their_features(x: torch.Tensor) -> torch.Tensor:
        for part in (theirs.stem, theirs.layer1, theirs.layer2, theirs.layer3, theirs.layer4):
            x = part(x)
        return x

    expected, got = full_gradients(theirs, their_features), full_gradients(ours, ours)
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        scale = value.abs().max().clamp_min(1.0)
        assert (got[name] - value).abs().max() <= 1e-10 * scale, name


def test_factored_convolutions_copy_neither_activations_nor_weights():
    for conv, size in (
        (FactoredConv3d(5, 6, (1, 3, 3), (1, 2, 2), (0, 1, 1), bias=False), (2, 5, 4, 9, 7)),
        (FactoredConv3d(5, 6, (3, 1, 1), (2, 1, 1), (1, 0, 0), bias=False), (2, 5, 5, 9, 7)),
        (FactoredConv3d(5, 6, 1, bias=False), (2, 5, 4, 9, 7)),
    ):
        conv.to(memory_format=torch.channels_last_3d)
        x = torch.randn(size).to(memory_format=torch.channels_last_3d).requires_grad_()
        with Calls() as calls:
            y = conv(x)
            y.backward(torch.ones_like(y))
        computing = [(function, args) for function, args in calls if not function.is_view]
        names = [function.name().split("::")[1] for function, _ in computing]
        assert names == ["convolution", "ones_like", "convolution_backward"]
        images, weight = computing[0][1][:2]
        assert images.data_ptr() == x.data_ptr() and images.dim() == 4
        assert images.is_contiguous(memory_format=torch.channels_last)
        assert weight.data_ptr() == conv.weight.data_ptr()
        assert y.is_contiguous(memory_format=torch.channels_last_3d)
        torch.testing.assert_close(y, nn.functional.conv3d(x, conv.weight, None, conv.stride, conv.padding))


class Calls(TorchDispatchMode):
    """Records the operators that run, with their arguments."""

    def __enter__(self) -> list:
        super().__enter__()
        self.calls = []
        return self.calls

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.calls.append((function, args))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("kernel", [(3, 3, 3), (1, 3, 3), (3, 1, 1), (1, 1, 1)])
@pytest.mark.parametrize("stride", [1, 2, (1, 2, 2), (2, 1, 1), (3, 2, 1)])
@pytest.mark.parametrize("padding", [0, 1])
@pytest.mark.parametrize("bias", [False, True])
def test_factored_convolutions_take_any_kernel_stride_padding_and_memory(kernel, stride, padding, bias):
    torch.manual_seed(0)
    conv = FactoredConv3d(3, 4, kernel, stride, padding, bias=bias).double()
    x = torch.randn(2, 3, 5, 8, 6, dtype=torch.float64, requires_grad=True)
    leaves = [x, *conv.parameters()]
    expected = nn.functional.conv3d(x, conv.weight, conv.bias, stride, padding)
    gradient = torch.randn_like(expected)
    wanted = torch.autograd.grad(expected, leaves, gradient)
    for memory_format in (torch.contiguous_format, torch.channels_last_3d):
        out = conv(x.to(memory_format=memory_format))
        torch.testing.assert_close(out, expected)
        for got, want in zip(torch.autograd.grad(out, leaves, gradient), wanted, strict=True):
            torch.testing.assert_close(got, want)


def test_checkpointing_keeps_less_for_backward():
    kept = {}
    for compute in (ComputeConfig(), ComputeConfig(activation_checkpointing="early")):
        encoder = R2Plus1D(VideoEncoderConfig(widths=(8, 16), blocks=(2, 1), stem_width=5), compute=compute)
        seen: dict[int, int] = {}

        def keep(tensor: torch.Tensor, seen: dict[int, int] = seen) -> torch.Tensor:
            seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            output = encoder(torch.randn(2, 3, 4, 32, 32))
        kept[compute.activation_checkpointing] = sum(seen.values())
        output.sum().backward()
    assert kept["early"] < 0.5 * kept["none"]


def test_padded_channels_leave_no_trace_in_the_state():
    config = VideoEncoderConfig(widths=(8, 16), blocks=(1, 1), stem_width=5)
    plain, padded = R2Plus1D(config), R2Plus1D(config, compute=ComputeConfig(pad_channels=True))
    with Calls() as calls:
        padded.eval()(torch.randn(1, 3, 4, 16, 16).to(memory_format=torch.channels_last_3d))
    outputs = {args[1].shape[0] for function, args in calls if function.name() == "aten::convolution"}
    assert outputs == {8, 16, 24, 32}  # widths 8 and 16; mid widths 5, 18 and 28
    shapes = [{name: value.shape for name, value in m.state_dict().items()} for m in (plain, padded)]
    assert shapes[0] == shapes[1]


def test_compiling_and_checkpointing_exclude_each_other():
    with pytest.raises(ValueError, match="compute.activation_checkpointing 'early'; use one of them"):
        ComputeConfig(compile=True, activation_checkpointing="early")
    with pytest.raises(ValueError, match="compute.batch_norm 'fused'"):
        ComputeConfig(compile=True, batch_norm="fused")
    assert ComputeConfig(compile=True).batch_norm_impl() == "reference"


@pytest.mark.parametrize("name", ["convolutions", "activation_checkpointing"])
def test_ways_to_compute_that_do_not_exist_are_refused(name):
    with pytest.raises(ValueError, match=f"compute.{name} is 'eraly', expected"):
        ComputeConfig(**{name: "eraly"})


def test_per_conv_midplanes_are_xdcs_network():
    config = VideoEncoderConfig(midplanes="per-conv", norm_eps=1e-3, norm_momentum=0.9)
    with torch.device("meta"):
        video = R2Plus1D(config)
        assert video(torch.empty(1, 3, 8, 64, 64)).shape == (1, 512, 1, 4, 4)
    assert count_parameters(video) == 33_165_639
    mids = [video.get_submodule(f"layer{n}.0.conv{c}.0.0").out_channels for n in (2, 3, 4) for c in (1, 2)]
    assert mids == [230, 288, 460, 576, 921, 1152]
    norms = [module for module in video.modules() if isinstance(module, nn.BatchNorm3d)]
    assert norms and {(norm.eps, norm.momentum) for norm in norms} == {(1e-3, 0.9)}


def test_batch_norms_are_torchs_unless_asked_otherwise():
    with torch.device("meta"):
        video = R2Plus1D(VideoEncoderConfig())
    norms = [module for module in video.modules() if isinstance(module, nn.BatchNorm3d)]
    assert {(norm.eps, norm.momentum) for norm in norms} == {(1e-5, 0.1)}


@pytest.mark.parametrize(
    ("field", "value"), [("midplanes", "per-layer"), ("norm_eps", 0.0), ("norm_momentum", 1.5)]
)
def test_shapes_and_norms_that_do_not_exist_are_refused(field, value):
    with pytest.raises(ValueError, match=f"model.video.{field} is .*{value}.*, expected"):
        VideoEncoderConfig(**{field: value})
