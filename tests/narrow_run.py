"""A run of a narrow network, for tests of tools that read one."""

import dataclasses
from pathlib import Path

import torch

from cmac.checkpoint import build_model, save_checkpoint
from cmac.config import demo
from cmac.encoders import AudioEncoderConfig, VideoEncoderConfig
from cmac.model import ModelConfig


def save_narrow_run(folder: Path) -> None:
    """A checkpoint in a run folder; its weights are those of seed 5."""
    config = demo()
    model = ModelConfig(
        video=VideoEncoderConfig(widths=(8, 16), blocks=(1, 1), stem_width=5),
        audio=AudioEncoderConfig(widths=(8, 16), blocks=(1, 1)),
        filter_channels=16,
        embedding_dim=8,
        queue_length=8,
    )
    video = dataclasses.replace(config.loader.video, num_frames=4, short_side=36, crop_size=32)
    config = dataclasses.replace(config, model=model, loader=dataclasses.replace(config.loader, video=video))
    torch.manual_seed(5)
    state = {"model": build_model(config).state_dict(), "commit": "abc1234567"}
    save_checkpoint(folder / "checkpoints", 1, config, state, keep=1)
