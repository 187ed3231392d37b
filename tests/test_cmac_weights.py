"""Encoders come out of every file as they went in, with their preprocessing, and nothing in a file is executed."""

import argparse
import dataclasses
import json
import logging
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

import cmac
from cmac.checkpoint import build_model, save_checkpoint
from cmac.config import RunConfig, config_from_dict, config_to_dict, demo
from cmac.encoders import VideoEncoderConfig, count_parameters
from cmac.finetune import finetune_tiny
from cmac.norm import BatchNorm3d
from cmac.weight_files import KINETICS_MEAN, KINETICS_STD
from cmac.weights import CARD, export_encoders, weights_digest
from loaders.audio_ops import log_mel_spectrogram
from loaders.config import AudioConfig, gdt_audio_config
from loaders.video_ops import normalize_frames

torchvision = pytest.importorskip("torchvision")
video_resnet = torchvision.models.video.resnet


def small_config() -> RunConfig:
    config = demo()
    return dataclasses.replace(config, model=dataclasses.replace(config.model, queue_length=8))


def shake_statistics(module: nn.Module) -> None:
    """Running statistics and weights of batch norms that are not those of a fresh network."""
    for norm in module.modules():
        if isinstance(norm, nn.modules.batchnorm._BatchNorm):
            norm.running_mean.normal_(0, 0.1)
            norm.running_var.uniform_(0.5, 1.5)
            nn.init.uniform_(norm.weight, 0.5, 1.5)


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two checkpoints."""
    folder = tmp_path_factory.mktemp("run")
    config = small_config()
    for step in (1, 2):
        torch.manual_seed(step)
        model = build_model(config)
        shake_statistics(model)
        state = {"model": model.state_dict(), "commit": "abc1234567"}
        save_checkpoint(folder / "checkpoints", step, config, state, keep=2)
    return folder


@pytest.fixture(scope="module")
def r2plus1d_18() -> nn.Module:
    """torchvision's, with a classifier of 7 classes."""
    torch.manual_seed(0)
    net = video_resnet.r2plus1d_18(num_classes=7).eval()
    shake_statistics(net)
    return net


@pytest.fixture(scope="module")
def resnet9() -> nn.Module:
    """GDT's audio network: torchvision's ResNet of one block per stage and one input channel; keeps an unused fc."""
    torch.manual_seed(1)
    net = torchvision.models.resnet.ResNet(torchvision.models.resnet.BasicBlock, [1, 1, 1, 1]).eval()
    net.conv1 = nn.Conv2d(1, 64, 7, 2, 3, bias=False)
    shake_statistics(net)
    return net


@pytest.fixture
def frames() -> Tensor:
    return torch.randint(
        0, 256, (1, 3, 4, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )


@pytest.fixture
def waveform() -> Tensor:
    return torch.rand(2, 24_000, generator=torch.Generator().manual_seed(1)) - 0.5


@torch.no_grad()
def their_video_features(net: nn.Module, normalized: Tensor) -> Tensor:
    x = net.stem(normalized)
    return net.layer4(net.layer3(net.layer2(net.layer1(x))))


@torch.no_grad()
def their_audio_features(net: nn.Module, log_mel: Tensor) -> Tensor:
    x = net.maxpool(net.relu(net.bn1(net.conv1(log_mel))))
    return net.layer4(net.layer3(net.layer2(net.layer1(x))))


def without_fc(net: nn.Module) -> dict[str, Tensor]:
    return {name: value for name, value in net.state_dict().items() if not name.startswith("fc.")}


def gdt_state(video: nn.Module, audio: nn.Module, prefix: str = "") -> dict[str, Tensor]:
    """Names and shapes of a GDT model with MLP heads."""
    state = {f"video_network.base.{name}": value for name, value in without_fc(video).items()}
    state |= {f"audio_network.base.{name}": value for name, value in audio.state_dict().items()}
    for head in ("mlp_v", "mlp_a"):
        layers = {2: nn.Linear(512, 512, bias=False), 4: nn.BatchNorm1d(512), 8: nn.Linear(512, 256)}
        for index, layer in layers.items():
            state |= {f"{head}.block_forward.{index}.{k}": v for k, v in layer.state_dict().items()}
    return {prefix + name: value for name, value in state.items()}


# --- this project's own runs


def test_a_run_folder_gives_the_newest_checkpoints_encoders_with_their_preprocessing(
    run_folder, frames, waveform
):
    model, config = cmac.load_checkpoint(run_folder)
    encoders = cmac.load(run_folder)
    assert encoders.source == str(run_folder / "checkpoints" / "step_00000002.pt")
    assert encoders.video_config == config.loader.video and encoders.audio_config == config.loader.audio
    assert not any(module.training for module in encoders.model.modules())
    frames = frames.expand(2, -1, -1, -1, -1)
    normalized = normalize_frames(frames, config.loader.video.mean, config.loader.video.std)
    log_mel = log_mel_spectrogram(waveform, config.loader.audio)[:, None]
    expected = model.encode(normalized, log_mel)
    torch.testing.assert_close(encoders.video_features(frames), expected.feature_v)
    torch.testing.assert_close(encoders.audio_features(waveform), expected.feature_a)
    by_model = encoders.model.encode(frames, log_mel)
    torch.testing.assert_close(by_model.embedding_a, expected.embedding_a)
    torch.testing.assert_close(by_model.guided_v, expected.guided_v)


def test_a_checkpoint_file_is_loaded_by_itself(run_folder):
    old = cmac.load(run_folder / "checkpoints" / "step_00000001.pt")
    new = cmac.load(run_folder)
    assert old.digest != new.digest
    assert cmac.load(run_folder).digest == new.digest


def test_loaded_encoders_normalize_a_training_batch_as_a_whole(run_folder):
    norms = [m for m in cmac.load(run_folder).video.modules() if isinstance(m, BatchNorm3d)]
    assert norms and all(norm.group_size is None for norm in norms)


def test_configurations_from_before_the_mid_planes_were_a_choice_give_the_same_network():
    config = small_config()
    data = config_to_dict(config)
    for name in ("midplanes", "norm_eps", "norm_momentum"):
        del data["model"]["video"][name]
    assert config_from_dict(data) == config


def test_random_weights_have_the_same_shapes_and_are_fixed_by_the_seed(run_folder, frames):
    trained, first, again, other = (cmac.load(run_folder, random_seed=seed) for seed in (None, 3, 3, 4))
    assert first.digest == again.digest
    assert len({trained.digest, first.digest, other.digest}) == 3
    assert first.video_features(frames).shape == trained.video_features(frames).shape
    assert "random weights of seed 3" in first.source


def test_random_weights_of_a_run_and_of_its_export_are_the_same(run_folder, tmp_path):
    export = export_encoders(cmac.load(run_folder), tmp_path / "export")
    assert cmac.load(export, random_seed=3).digest == cmac.load(run_folder, random_seed=3).digest


def test_loading_random_weights_leaves_the_generator_alone(run_folder):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    cmac.load(run_folder, random_seed=1)
    assert torch.equal(torch.get_rng_state(), before)


def test_sound_of_another_rate_is_resampled(run_folder):
    encoders = cmac.load(run_folder)
    seconds = torch.arange(48_000) / 48_000
    tone = 0.5 * torch.sin(2 * torch.pi * 440 * seconds)[None]
    resampled, own = encoders.log_mel(tone, 48_000), encoders.log_mel(tone[:, ::2])  # (1, 1, F, S)
    assert resampled.shape == own.shape == (1, 1, 257, 101)
    (loudest, band), (expected, expected_band) = resampled.max(2), own.max(2)  # (1, 1, S) each
    assert torch.equal(band, expected_band)
    torch.testing.assert_close(loudest[..., 5:-5], expected[..., 5:-5], atol=0.02, rtol=0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda e: e.video_features(torch.zeros(1, 3, 4, 32, 32)),
            "frames are torch.float32 .*expected torch.uint8",
        ),
        (
            lambda e: e.video_features(torch.zeros(1, 4, 32, 32, 3, dtype=torch.uint8)),
            "expected .*N, 3, T, H, W",
        ),
        (lambda e: e.audio_features(torch.zeros(24_000)), r"waveform is torch.float32 \(24000,\), expected"),
        (
            lambda e: e.audio_features(torch.zeros(1, 24_000, dtype=torch.int16)),
            "torch.int16 .*floating point",
        ),
        (lambda e: e.audio_features(torch.zeros(1, 24_000), 0), "sample_rate is 0, expected at least 1"),
    ],
)
def test_inputs_of_other_shapes_and_types_are_refused(run_folder, call, message):
    with pytest.raises(ValueError, match=message):
        call(cmac.load(run_folder))


# --- exports


def test_an_exported_folder_gives_the_same_features_bit_for_bit_and_the_same_preprocessing(
    run_folder, tmp_path, frames, waveform
):
    before = cmac.load(run_folder)
    after = cmac.load(export_encoders(before, tmp_path / "export"))
    assert torch.equal(before.video_features(frames), after.video_features(frames))
    assert torch.equal(before.audio_features(waveform), after.audio_features(waveform))
    for name in ("digest", "video_config", "audio_config", "pixel_mean", "pixel_std"):
        assert getattr(after, name) == getattr(before, name), name
    assert after.video_encoder_config == before.video_encoder_config
    assert after.audio_encoder_config == before.audio_encoder_config
    assert after.model is None
    with pytest.raises(ValueError, match="holds no whole CMAC model"):
        after.require_model()
    by_file = cmac.load(tmp_path / "export" / "encoders.safetensors")
    assert by_file.digest == before.digest and by_file.video_config == before.video_config


def test_the_model_card_says_where_weights_come_from_and_what_they_want(run_folder, tmp_path):
    folder = export_encoders(cmac.load(run_folder), tmp_path / "export")
    card = json.loads((folder / CARD).read_text())
    assert card["source"]["file"] == "step_00000002.pt"
    assert card["source"]["step"] == 2 and card["source"]["commit"] == "abc1234567"
    assert len(card["source"]["file_sha256"]) == 64
    assert card["preprocessing"]["frames"]["config"]["crop_size"] == 64
    assert card["preprocessing"]["sound"]["config"]["sample_rate"] == 24_000
    assert "pixel / 255 - pixel_mean" in card["preprocessing"]["frames"]["what"]
    assert card["video"]["num_parameters"] == count_parameters(cmac.load(run_folder).video)
    assert str(tmp_path) not in json.dumps(card)
    assert "licence" in card and card["exported_by_commit"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["export"]


def test_weights_changed_after_the_export_are_noticed(run_folder, tmp_path):
    folder = export_encoders(cmac.load(run_folder), tmp_path / "export")
    weights = safetensors.torch.load_file(folder / "encoders.safetensors")
    weights["audio.conv1.weight"][0, 0, 0, 0] += 1
    safetensors.torch.save_file(weights, folder / "encoders.safetensors")
    with pytest.raises(ValueError, match="changed since the export"):
        cmac.load(folder)
    del weights["audio.conv1.weight"]
    safetensors.torch.save_file(weights, folder / "encoders.safetensors")
    with pytest.raises(ValueError, match="missing keys: conv1.weight"):
        cmac.load(folder)


def test_an_export_leaves_a_folder_that_holds_something_alone(run_folder, tmp_path):
    (tmp_path / "export").mkdir()
    (tmp_path / "export" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="not empty"):
        export_encoders(cmac.load(run_folder), tmp_path / "export")
    assert [path.name for path in tmp_path.rglob("*")] == ["export", "notes.txt"]


def test_an_export_that_fails_leaves_nothing(run_folder, tmp_path, monkeypatch):
    def fail(*_: object) -> bytes:
        raise OSError("disk full")

    monkeypatch.setattr("cmac.weights.write_atomically", fail)
    with pytest.raises(OSError, match="disk full"):
        export_encoders(cmac.load(run_folder), tmp_path / "export")
    assert not list(tmp_path.iterdir())


def test_a_card_that_names_a_file_elsewhere_is_refused(run_folder, tmp_path):
    folder = export_encoders(cmac.load(run_folder), tmp_path / "export")
    card = json.loads((folder / CARD).read_text())
    card["weights"]["file"] = "../encoders.safetensors"
    (folder / CARD).write_text(json.dumps(card))
    with pytest.raises(ValueError, match="expected a file of the folder"):
        cmac.load(folder)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda card: card.pop("audio"), "not a model card of this version.*audio"),
        (lambda card: card.update(format="cmac-encoders-0"), "format cmac-encoders-0, expected"),
        (lambda card: card["video"]["config"].update(depth=3), "not a model card.*depth"),
    ],
)
def test_damaged_cards_are_refused(run_folder, tmp_path, damage, message):
    folder = export_encoders(cmac.load(run_folder), tmp_path / "export")
    card = json.loads((folder / CARD).read_text())
    damage(card)
    (folder / CARD).write_text(json.dumps(card))
    with pytest.raises(ValueError, match=message):
        cmac.load(folder)


def test_a_network_that_is_not_torchvisions_is_not_exported_as_such(run_folder, tmp_path):
    with pytest.raises(ValueError, match=r"not torchvision's r2plus1d_18: widths \(8, 24, 64\)"):
        export_encoders(cmac.load(run_folder), tmp_path / "export", "torchvision")
    assert not list(tmp_path.iterdir())


def test_the_digest_counts_values_and_names_not_order_memory_or_classifier():
    torch.manual_seed(0)
    first, second = nn.Conv3d(3, 4, 3), nn.Conv3d(3, 4, 3)
    second.load_state_dict(first.state_dict())
    digest = weights_digest(first, None)
    assert len(digest) == 16 and int(digest, 16) >= 0
    second.to(memory_format=torch.channels_last_3d)
    assert weights_digest(second, None) == digest
    second.fc = nn.Linear(2, 2)
    assert weights_digest(second, None) == digest
    assert weights_digest(None, first) != digest
    weight = second._parameters.pop("weight")
    second._parameters["weight"] = weight  # now after the bias
    assert list(second.state_dict()) == ["bias", "weight", "fc.weight", "fc.bias"]
    assert weights_digest(second, None) == digest
    with torch.no_grad():
        second.bias[0] += 1e-6
    assert weights_digest(second, None) != digest
    assert weights_digest(first.double(), None) != digest


# --- torchvision


def test_torchvisions_weights_give_torchvisions_features_with_three_means(r2plus1d_18, tmp_path, frames):
    torch.save(r2plus1d_18.state_dict(), tmp_path / "r2plus1d_18.pth")
    encoders = cmac.load(tmp_path / "r2plus1d_18.pth")
    assert encoders.pixel_mean == KINETICS_MEAN and encoders.pixel_std == KINETICS_STD
    weights = torchvision.models.video.R2Plus1D_18_Weights.KINETICS400_V1
    transforms = weights.transforms()
    assert list(encoders.pixel_mean) == transforms.mean and list(encoders.pixel_std) == transforms.std
    clip = frames[0].permute(1, 0, 2, 3)  # (T, 3, H, W), as torchvision wants it
    presets = torchvision.transforms._presets.VideoClassification(
        crop_size=(32, 32), resize_size=(32, 32), mean=transforms.mean, std=transforms.std
    )
    expected = their_video_features(r2plus1d_18, presets(clip)[None])
    torch.testing.assert_close(encoders.video_features(frames), expected, atol=1e-4, rtol=1e-4)
    assert encoders.origin["dropped"] == ["fc.weight", "fc.bias"]
    assert count_parameters(encoders.video) == 31_300_125
    with pytest.raises(ValueError, match="holds no audio encoder"):
        encoders.audio_features(torch.zeros(1, 24_000))


def test_torchvisions_classifier_is_kept_when_asked_for(r2plus1d_18, tmp_path, frames):
    torch.save(r2plus1d_18.state_dict(), tmp_path / "net.pth")
    encoders = cmac.load(tmp_path / "net.pth", classifier=True)
    normalized = normalize_frames(frames, KINETICS_MEAN, KINETICS_STD)
    with torch.no_grad():
        expected, got = r2plus1d_18(normalized), encoders.video.classify(encoders.normalize_frames(frames))
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)
    assert encoders.origin["dropped"] == []
    again = cmac.load(export_encoders(encoders, tmp_path / "export"))
    assert torch.equal(again.video.fc.weight, r2plus1d_18.fc.weight)


def test_an_export_for_torchvision_fits_torchvision_and_computes_the_same(r2plus1d_18, tmp_path, frames):
    torch.save(without_fc(r2plus1d_18), tmp_path / "net.pth")
    encoders = cmac.load(tmp_path / "net.pth")
    folder = export_encoders(encoders, tmp_path / "export", "torchvision")
    state = torch.load(folder / "r2plus1d_18.pth", weights_only=True)
    theirs = video_resnet.r2plus1d_18()
    theirs.fc = nn.Identity()
    theirs.load_state_dict(state, strict=True)
    with torch.no_grad():
        pooled = theirs.eval()(normalize_frames(frames, KINETICS_MEAN, KINETICS_STD))
    torch.testing.assert_close(encoders.video_features(frames).mean((2, 3, 4)), pooled, atol=1e-4, rtol=1e-4)
    again = cmac.load(folder)
    assert again.digest == encoders.digest and again.audio is None
    assert torch.equal(again.video_features(frames), encoders.video_features(frames))


# --- XDC


class PerConvolution(nn.Sequential):
    """XDC's (2+1)D convolution: mid planes of the convolution's own channels."""

    def __init__(self, in_planes: int, out_planes: int, _: int, stride: int = 1, padding: int = 1) -> None:
        mid = (in_planes * out_planes * 27) // (in_planes * 9 + 3 * out_planes)
        super().__init__(
            nn.Conv3d(in_planes, mid, (1, 3, 3), (1, stride, stride), (0, padding, padding), bias=False),
            nn.BatchNorm3d(mid),
            nn.ReLU(inplace=True),
            nn.Conv3d(mid, out_planes, (3, 1, 1), (stride, 1, 1), (padding, 0, 0), bias=False),
        )

    @staticmethod
    def get_downsample_stride(stride: int) -> tuple[int, int, int]:
        return stride, stride, stride


def test_xdcs_weights_give_xdcs_features(tmp_path, frames):
    torch.manual_seed(2)
    net = video_resnet.VideoResNet(
        video_resnet.BasicBlock, [PerConvolution] * 4, [2, 2, 2, 2], video_resnet.R2Plus1dStem, 5
    ).eval()
    shake_statistics(net)
    for norm in net.modules():
        if isinstance(norm, nn.BatchNorm3d):
            norm.eps, norm.momentum = 1e-3, 0.9
            norm.running_var.mul_(1e-3)  # so that eps counts
            norm.weight.data.mul_(1e-3**0.5)  # and values stay what they were
    # Converted from another framework: nothing counted batches there.
    state = {name: v for name, v in net.state_dict().items() if not name.endswith("num_batches_tracked")}
    torch.save(state, tmp_path / "xdc.pth", _use_new_zipfile_serialization=False)
    encoders = cmac.load(tmp_path / "xdc.pth")
    assert count_parameters(encoders.video) == 33_165_639
    assert encoders.video_encoder_config == VideoEncoderConfig(
        midplanes="per-conv", norm_eps=1e-3, norm_momentum=0.9
    )
    expected = their_video_features(net, normalize_frames(frames, KINETICS_MEAN, KINETICS_STD))
    scale = expected.abs().max().item()
    torch.testing.assert_close(encoders.video_features(frames), expected, atol=1e-4 * scale, rtol=1e-4)
    assert encoders.audio is None and encoders.origin["layout"] == "xdc"
    assert encoders.origin["dropped"] == ["fc.weight", "fc.bias"]
    with pytest.raises(ValueError, match="format is 'torchvision', but .* xdc"):
        cmac.load(tmp_path / "xdc.pth", format="torchvision")
    with pytest.raises(ValueError, match="midplanes per-conv .expected per-block"):
        export_encoders(encoders, tmp_path / "export", "torchvision")


# --- GDT


def gdt_training_state(state: dict[str, Tensor], **arguments: Any) -> dict[str, Any]:
    """What GDT's training saves: weights, optimizer, a scheduler that holds another one, and its arguments."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(3))], lr=0.01, momentum=0.9)
    optimizer.param_groups[0]["params"][0].grad = torch.ones(3)
    optimizer.step()
    after = torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones=[20, 30])
    return {
        "model": state,
        "optimizer": optimizer.state_dict(),
        "lr_scheduler": {"multiplier": 64, "finished": False, "after_scheduler": after},
        "epoch": 200,
        "args": argparse.Namespace(output_dir="somewhere", aug_audio=[1, 1, 3, 6], **arguments),
    }


@pytest.fixture(scope="module")
def gdt_file(tmp_path_factory, r2plus1d_18, resnet9) -> Path:
    path = tmp_path_factory.mktemp("gdt") / "gdt_k400.pth"
    arguments = {
        "aud_spec_type": 1,
        "aud_sample_rate": 24_000,
        "z_normalize": True,
        "clip_len": 30,
        "train_crop_size": 112,
    }
    torch.save(gdt_training_state(gdt_state(r2plus1d_18, resnet9), **arguments), path)
    return path


def test_gdts_weights_fit_both_encoders_exactly(gdt_file, r2plus1d_18, resnet9, frames, waveform, caplog):
    with caplog.at_level(logging.INFO, "cmac.weights"):
        encoders = cmac.load(gdt_file)
    assert count_parameters(encoders.video) == 31_300_125
    assert count_parameters(encoders.audio) == 4_899_520
    expected = their_video_features(r2plus1d_18, normalize_frames(frames, 0.45, 0.225))
    torch.testing.assert_close(encoders.video_features(frames), expected, atol=1e-4, rtol=1e-4)
    config = gdt_audio_config(num_mel_bins=40)
    assert encoders.audio_config == config
    log_mel = log_mel_spectrogram(waveform, config)[:, None]
    assert log_mel.shape == (2, 1, 40, 99)
    expected = their_audio_features(resnet9, log_mel)
    torch.testing.assert_close(encoders.audio_features(waveform), expected, atol=1e-4, rtol=1e-4)
    heads = [name for name in gdt_state(nn.Identity(), nn.Identity()) if name.startswith("mlp_")]
    assert len(heads) == 2 * (1 + 5 + 2)
    fc = ["audio_network.base.fc.weight", "audio_network.base.fc.bias"]
    beside = ["optimizer", "lr_scheduler", "epoch", "args"]
    assert sorted(encoders.origin["dropped"]) == sorted([*heads, *fc, *beside])
    for name in encoders.origin["dropped"]:
        assert f"not used: {name}" in caplog.text


def test_gdts_encoders_survive_an_export(gdt_file, tmp_path, frames, waveform):
    encoders = cmac.load(gdt_file)
    folder = export_encoders(encoders, tmp_path / "export")
    again = cmac.load(folder)
    assert again.digest == encoders.digest
    assert torch.equal(again.video_features(frames), encoders.video_features(frames))
    assert torch.equal(again.audio_features(waveform), encoders.audio_features(waveform))
    assert again.audio_config == encoders.audio_config and again.video_config == encoders.video_config
    card = json.loads((folder / CARD).read_text())
    assert "mlp_v.block_forward.2.weight" in card["source"]["dropped"]
    assert "redistribute" in card["licence"]


def small_gdt(prefix: str = "") -> dict[str, Tensor]:
    """A GDT model of this run's small networks."""
    torch.manual_seed(0)
    model = build_model(small_config())
    state = {f"video_network.base.{n}": v for n, v in model.video.encoder.state_dict().items()}
    state |= {f"audio_network.base.{n}": v for n, v in model.audio.encoder.state_dict().items()}
    return {prefix + name: value for name, value in state.items()}


def save(path: Path, content: Any) -> Path:
    torch.save(content, path)
    return path


@pytest.mark.parametrize(
    ("key", "prefix"), [("model", "module."), ("state_dict", ""), ("state_dict", "module.")]
)
def test_gdt_files_of_all_layouts_give_the_same_encoders(tmp_path, key, prefix):
    plain = cmac.load(save(tmp_path / "plain.pth", {"model": small_gdt(), "epoch": 3}))
    other = cmac.load(save(tmp_path / "other.pth", {"epoch": 3, key: small_gdt(prefix)}))
    assert other.digest == plain.digest
    assert other.origin["layout"] == "gdt" and other.origin["dropped"] == ["epoch"]


def test_gdts_front_end_is_what_the_file_says_or_the_caller(tmp_path):
    state = small_gdt()
    silent = save(tmp_path / "silent.pth", {"model": state, "epoch": 3})
    assert cmac.load(silent).audio_config == gdt_audio_config()
    assert any("257 mel bands assumed" in note for note in cmac.load(silent).origin["notes"])
    assert cmac.load(silent, audio="gdt-40").audio_config == gdt_audio_config(num_mel_bins=40)
    own = AudioConfig(num_mel_bins=80)
    assert cmac.load(silent, audio=own).audio_config == own
    arguments = {"aud_spec_type": 2, "z_normalize": False, "aud_sample_rate": 48_000}
    stica = save(tmp_path / "stica.pth", gdt_training_state(state, **arguments))
    expected = gdt_audio_config(
        sample_rate=48_000, window_samples=960, hop_samples=480, log_mel_mean=0.0, log_mel_std=1.0
    )
    assert cmac.load(stica).audio_config == expected
    assert cmac.load(stica, audio="gdt").audio_config == gdt_audio_config()


def test_a_gdt_file_of_one_encoder_gives_that_one(tmp_path):
    state = {name: value for name, value in small_gdt().items() if name.startswith("audio_")}
    encoders = cmac.load(save(tmp_path / "audio.pth", {"model": state}))
    assert encoders.video is None and encoders.device == torch.device("cpu")
    with pytest.raises(ValueError, match="holds no video encoder"):
        encoders.video_features(torch.zeros(1, 3, 4, 32, 32, dtype=torch.uint8))
    again = cmac.load(export_encoders(encoders, tmp_path / "export"))
    assert again.video is None and again.digest == encoders.digest


# --- files that do not fit


def altered(change: Callable[[dict[str, Tensor]], object]) -> dict[str, Tensor]:
    state = small_gdt()
    change(state)
    return state


STEM = "video_network.base.stem.0.weight"
BN = "audio_network.base.layer2.0.bn1.running_mean"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"model": altered(lambda s: s.pop(BN))}, "missing keys: layer2.0.bn1.running_mean"),
        (
            {
                "model": altered(
                    lambda s: s.update({"video_network.base.layer2.0.gate.weight": torch.ones(2)})
                )
            },
            "unexpected keys: layer2.0.gate.weight",
        ),
        ({"model": altered(lambda s: s.update(extra=torch.ones(2)))}, "unexpected keys in a GDT file: extra"),
        (
            {"model": altered(lambda s: s.update({BN: torch.ones(3)}))},
            "size mismatch for layer2.0.bn1.running_mean",
        ),
        ({"model": altered(lambda s: s.pop(STEM))}, "stem.0.weight is missing"),
        (
            {"model": {"module.video_model.conv1.0.weight": torch.ones(1)}, "train_criterion": {}},
            "AVID-CMA.*max-pool",
        ),
        (
            {"model": {"encoder.weight": torch.ones(1)}},
            "no known layout .*encoder.weight.*expected those of GDT",
        ),
        ({"model": {"weight": 3}}, "'weight' is no tensor"),
        ({}, "it is empty"),
        ([torch.ones(1)], "holds a list, expected a dictionary"),
        (
            {"stem.0.weight": torch.ones(64, 3, 3, 7, 7), "layer1.0.conv1.0.weight": torch.ones(1)},
            "no known layout",
        ),
    ],
)
def test_files_that_do_not_fit_are_refused_by_name(tmp_path, content, message):
    with pytest.raises(ValueError, match=message):
        cmac.load(save(tmp_path / "file.pth", content))


def test_a_fine_tuned_network_is_refused_by_name(tmp_path):
    state = {"model": {"fc.weight": torch.ones(1)}, "classes": ["dog"]}
    path = save_checkpoint(tmp_path / "checkpoints", 1, finetune_tiny(), state, keep=1)
    for given in (path, tmp_path):
        with pytest.raises(ValueError, match="a checkpoint of tools.finetune, a video classifier"):
            cmac.load(given)


def test_paths_that_are_nothing_are_refused(tmp_path):
    with pytest.raises(ValueError, match="no such file"):
        cmac.load(tmp_path / "missing.pth")
    with pytest.raises(ValueError, match="neither a run folder .* nor an exported one"):
        cmac.load(tmp_path)
    (tmp_path / "note.txt").write_text("hello")
    with pytest.raises(ValueError, match="not a readable file of weights"):
        cmac.load(tmp_path / "note.txt")
    (tmp_path / "broken.safetensors").write_bytes(b"1234567890")
    with pytest.raises(ValueError, match="not a readable file of weights"):
        cmac.load(tmp_path / "broken.safetensors")
    with pytest.raises(ValueError, match="random_seed is -1"):
        cmac.load(tmp_path, random_seed=-1)


def test_a_checkpoint_cut_short_is_refused(run_folder, tmp_path):
    data = (run_folder / "checkpoints" / "step_00000002.pt").read_bytes()
    (tmp_path / "cut.pt").write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match="not a readable file of weights"):
        cmac.load(tmp_path / "cut.pt")


def test_another_format_than_the_files_is_refused(run_folder, tmp_path):
    with pytest.raises(ValueError, match="format is 'gdt', but this is a checkpoint of cmac"):
        cmac.load(run_folder, format="gdt")
    path = save(tmp_path / "gdt.pth", {"model": small_gdt()})
    with pytest.raises(ValueError, match="format is 'xdc', but names and shapes of its weights are gdt's"):
        cmac.load(path, format="xdc")
    with pytest.raises(ValueError, match="format is 'caffe', expected auto or gdt"):
        cmac.load(path, format="caffe")
    with pytest.raises(ValueError, match="audio is 'mp3', expected auto or gdt"):
        cmac.load(path, audio="mp3")
    with pytest.raises(ValueError, match="has no classifier"):
        cmac.load(path, classifier=True)


# --- files that would execute something


class Evil:
    """Unpickled by Python's own unpickler, calls a function."""

    def __init__(self, function: Callable[..., object], *args: object) -> None:
        self.call = function, args

    def __reduce__(self) -> tuple:
        return self.call


def evil_calls(victim: Path) -> dict[str, tuple[Evil, str]]:
    """Ways to create the file, and the global that a refusal is to name."""
    return {
        "system": (Evil(os.system, f"touch '{victim}'"), f"{os.name}.system"),
        "exec": (Evil(exec, f"open({str(victim)!r}, 'w')"), "exec"),
        "open": (Evil(open, str(victim), "w"), "open"),
    }


WRITERS = {
    "zip": lambda content, path: torch.save(content, path),
    "legacy": lambda content, path: torch.save(content, path, _use_new_zipfile_serialization=False),
    "pickle": lambda content, path: path.write_bytes(pickle.dumps(content, protocol=2)),
}


@pytest.mark.parametrize("place", ["alone", "beside", "in-arguments", "in-scheduler"])
@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("way", ["system", "exec", "open"])
def test_a_file_that_would_execute_something_is_refused_and_nothing_happens(tmp_path, way, writer, place):
    victim, path = tmp_path / "victim", tmp_path / "file.pth"
    evil, named = evil_calls(victim)[way]
    content = {
        "alone": evil,
        "beside": {"model": {"video_network.base.a": 1}, "extra": evil},
        "in-arguments": {"model": {}, "args": argparse.Namespace(lr=evil)},
        "in-scheduler": {"model": {}, "after": evil_scheduler(evil)},
    }[place]
    WRITERS[writer](content, path)
    with pytest.raises(
        ValueError, match=rf"asks for (\w+\.)?{named.split('.')[-1]}, which could execute code"
    ):
        cmac.load(path)
    assert not victim.exists()
    # The file does what it says when it is let: the test above would notice.
    loads = {"pickle": lambda: pickle.loads(path.read_bytes())}
    loads.get(writer, lambda: torch.load(path, weights_only=False))()
    assert victim.exists()


def evil_scheduler(evil: Evil) -> torch.optim.lr_scheduler.MultiStepLR:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [1])
    scheduler.milestones = evil
    return scheduler


def test_what_stands_in_for_arguments_can_do_nothing(tmp_path):
    """State that would replace methods or attributes of the stand-in is data that is thrown away."""
    hostile = argparse.Namespace(aud_spec_type=[1], values=3)
    vars(hostile).update(__setstate__=torch.Size, __class__=torch.Size, __dict__={})
    path = save(tmp_path / "file.pth", {"model": small_gdt(), "args": hostile})
    encoders = cmac.load(path)
    assert encoders.audio_config == gdt_audio_config()  # a list is no type of spectrogram
    assert not any("weight_files" in repr(allowed) for allowed in torch.serialization.get_safe_globals())
