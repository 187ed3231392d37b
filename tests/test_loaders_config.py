"""Checks and derived sizes of the loader configuration."""

import dataclasses

import pytest

from loaders.config import AudioConfig, LoaderConfig, VideoConfig, gdt_audio_config


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (
            lambda: LoaderConfig(shards="s", global_batch_size=0),
            "loader.global_batch_size is 0, expected at least 1",
        ),
        (lambda: LoaderConfig(shards=""), "loader.shards is '', expected the folder that make_shards wrote"),
        (lambda: LoaderConfig(shards="s", clips_per_video=3), "loader.clips_per_video is 3, expected 1 or 2"),
        (
            lambda: LoaderConfig(shards="s", max_bad_fraction=1.5),
            "loader.max_bad_fraction is 1.5, expected 0 to 1",
        ),
        (lambda: VideoConfig(num_frames=33), "loader.video.num_frames is 33, expected 1 to 32"),
        (
            lambda: VideoConfig(crop_size=160),
            r"loader.video.crop_size is 160, expected 1 to loader.video.short_side \(144\)",
        ),
        (lambda: VideoConfig(flip_probability=-1), "loader.video.flip_probability is -1, expected 0 to 1"),
        (lambda: AudioConfig(window_samples=4096), "loader.audio.window_samples is 4096, expected at most"),
        (lambda: AudioConfig(log_mel_std=0), "loader.audio.log_mel_std is 0, expected more than 0"),
        (lambda: AudioConfig(time_warp_steps=60), "loader.audio.time_warp_steps is 60, expected at most 49"),
        (
            lambda: AudioConfig(front_end="gdt"),
            "loader.audio.n_fft is 2048, expected 1024 with front_end gdt",
        ),
    ],
)
def test_config_names_field_value_and_expectation(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_config_is_frozen_and_keyword_only():
    with pytest.raises(dataclasses.FrozenInstanceError):
        LoaderConfig(shards="s").seed = 1
    with pytest.raises(TypeError):
        LoaderConfig("s")


def test_one_second_has_101_steps_and_99_in_the_gdt_front_end():
    assert AudioConfig().num_steps() == 101
    assert gdt_audio_config().num_steps() == 99
    assert AudioConfig().num_steps(48_000) == 201
    assert gdt_audio_config().num_steps(48_000) == 199


def test_gdt_preset_takes_changes():
    assert gdt_audio_config(num_mel_bins=40, augment=False) == AudioConfig(
        front_end="gdt", n_fft=1024, num_mel_bins=40, augment=False, log_mel_mean=1.93, log_mel_std=17.89
    )
