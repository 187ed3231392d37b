"""Encoders come out of every file as they went in, with their preprocessing, and nothing in a file is executed."""

import dataclasses
from pathlib import Path

import pytest
import torch

import cmac
from cmac.checkpoint import build_model, save_checkpoint
from cmac.config import RunConfig, demo
from cmac.norm import BatchNorm3d
from loaders.audio_ops import log_mel_spectrogram
from loaders.video_ops import normalize_frames


def small_config() -> RunConfig:
    config = demo()
    model = dataclasses.replace(config.model, queue_length=8)
    return dataclasses.replace(config, model=model)


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two checkpoints, whose batch norms are not those of a fresh network."""
    folder = tmp_path_factory.mktemp("run")
    config = small_config()
    for step in (1, 2):
        torch.manual_seed(step)
        model = build_model(config)
        for name, value in model.named_buffers():
            if name.endswith(("running_mean", "running_var")):
                value.uniform_(0.5, 1.5)
        state = {"model": model.state_dict(), "commit": "abc1234567"}
        save_checkpoint(folder / "checkpoints", step, config, state, keep=2)
    return folder


@pytest.fixture
def frames() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (2, 3, 8, 64, 64), dtype=torch.uint8, generator=generator)


@pytest.fixture
def waveform() -> torch.Tensor:
    return torch.rand(2, 24_000, generator=torch.Generator().manual_seed(1)) - 0.5


def test_a_run_folder_gives_the_newest_checkpoints_encoders_with_their_preprocessing(
    run_folder, frames, waveform
):
    model, config = cmac.load_checkpoint(run_folder)
    encoders = cmac.load(run_folder)
    assert encoders.source == str(run_folder / "checkpoints" / "step_00000002.pt")
    assert encoders.video_config == config.loader.video and encoders.audio_config == config.loader.audio
    assert not any(module.training for module in encoders.model.modules())
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


def test_random_weights_have_the_same_shapes_and_are_fixed_by_the_seed(run_folder, frames):
    trained, first, again, other = (cmac.load(run_folder, random_seed=seed) for seed in (None, 3, 3, 4))
    assert first.digest == again.digest
    assert len({trained.digest, first.digest, other.digest}) == 3
    assert first.video_features(frames).shape == trained.video_features(frames).shape
    assert "random weights of seed 3" in first.source


def test_loading_random_weights_leaves_the_generator_alone(run_folder):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    cmac.load(run_folder, random_seed=1)
    assert torch.equal(torch.get_rng_state(), before)
