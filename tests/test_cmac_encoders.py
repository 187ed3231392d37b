"""The encoders are torchvision's in names, shapes and numbers, and as large as the paper says."""

import pytest
import torch
from torch import nn

from cmac.encoders import (
    AudioEncoderConfig,
    AudioResNet,
    GroupedBatchNorm2d,
    R2Plus1D,
    VideoEncoderConfig,
    build_norm_layers,
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


def test_grouped_batch_norm_normalizes_each_group_by_itself():
    norm_2d, _ = build_norm_layers(4)
    grouped, plain = norm_2d(3), nn.BatchNorm2d(3)
    x = torch.randn(8, 3, 5, 5, requires_grad=True)
    out = grouped(x)
    expected = torch.cat([nn.BatchNorm2d(3)(x[:4]), nn.BatchNorm2d(3)(x[4:])])
    torch.testing.assert_close(out, expected)
    out.square().sum().backward()
    assert x.grad is not None and grouped.num_batches_tracked == 1

    first, second = nn.BatchNorm2d(3), nn.BatchNorm2d(3)
    first(x[:4]), second(x[4:])
    torch.testing.assert_close(grouped.running_mean, (first.running_mean + second.running_mean) / 2)
    torch.testing.assert_close(grouped.running_var, (first.running_var + second.running_var) / 2)
    plain.load_state_dict(grouped.state_dict(), strict=True)
    torch.testing.assert_close(grouped.eval()(x), plain.eval()(x))


@pytest.mark.parametrize("num_clips", [1, 4, 6])
def test_grouped_batch_norm_takes_undividable_batches_whole(num_clips):
    norm = build_norm_layers(4)[0](3)
    assert isinstance(norm, GroupedBatchNorm2d)
    x = torch.randn(num_clips, 3, 5, 5)
    torch.testing.assert_close(norm(x), nn.BatchNorm2d(3)(x))
