"""A small UCF101 in the official layout, its classes told apart by their color, and a checkpoint of a small network."""

import dataclasses
from pathlib import Path

import av
import numpy as np
import torch

from cmac.checkpoint import build_model, save_checkpoint
from cmac.config import demo
from cmac.encoders import AudioEncoderConfig, VideoEncoderConfig

CLASSES = ("Blue", "Green", "Red")


def write_color_video(path: Path, channel: int, seed: int, num_frames: int = 34) -> None:
    """Noise with more of one color, as UCF101 has videos: MPEG-4 in AVI, 25 fps."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=25, options={"qscale": "3"})
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for _ in range(num_frames):
            picture = rng.integers(20, 90, (48, 64, 3), dtype=np.uint8)
            picture[..., channel] += 100
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))


def write_ucf101(folder: Path) -> Path:
    """Six videos of each class; each split tests two of them."""
    for number, name in enumerate(CLASSES):
        for group in range(1, 7):
            path = folder / f"UCF-101/{name}/v_{name}_g0{group}_c01.avi"
            write_color_video(path, 2 - number, 10 * number + group)
    lists = folder / "ucfTrainTestlist"
    lists.mkdir()
    (lists / "classInd.txt").write_text("".join(f"{n + 1} {name}\n" for n, name in enumerate(CLASSES)))
    for split in (1, 2, 3):
        held_out = {2 * split - 1, 2 * split}
        for part in ("train", "test"):
            lines = [
                f"{name}/v_{name}_g0{group}_c01.avi" + (f" {number + 1}" if part == "train" else "")
                for number, name in enumerate(CLASSES)
                for group in range(1, 7)
                if (group in held_out) == (part == "test")
            ]
            (lists / f"{part}list0{split}.txt").write_text("\n".join(lines) + "\n")
    return folder


def write_checkpoint(run_dir: Path, seed: int) -> Path:
    """Run folder with a checkpoint of a small network with random weights of this seed."""
    small = {"widths": (4, 8), "blocks": (1, 1)}
    config = demo()
    model_config = dataclasses.replace(
        config.model, video=VideoEncoderConfig(**small, stem_width=4), audio=AudioEncoderConfig(**small)
    )
    video = dataclasses.replace(config.loader.video, num_frames=4, short_side=36, crop_size=32)
    config = dataclasses.replace(
        config, model=model_config, loader=dataclasses.replace(config.loader, video=video)
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = build_model(config)
    save_checkpoint(run_dir / "checkpoints", 1, config, {"model": model.state_dict()}, keep=1)
    return run_dir
