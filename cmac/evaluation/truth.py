"""What is known about a generated video: its objects, where they are, and which of them sounds."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np


@dataclass(frozen=True, kw_only=True)
class TruthObject:
    """One object of a video."""

    category: str
    """Name of what it is."""
    sounding: bool
    """Whether it makes the sound that is heard."""
    moving: bool
    """Whether it moves."""
    boxes: np.ndarray
    """float64 (num_frames, 4): x0, y0, x1, y1 in source pixels; x1 and y1 are edges, not the last pixel."""


@dataclass(frozen=True, kw_only=True)
class Truth:
    """Ground truth of one generated video (the JSON that `tools/make_world.py` writes beside it)."""

    part: str
    """`easy` (silent objects stand still) or `hard` (they move to a rhythm of their own)."""
    sound: str
    """`on-screen`, `off-screen` or `silent`."""
    category: str | None
    """Category of what is heard."""
    fps: float
    """Frames per second of the source."""
    width: int
    """Source pixels."""
    height: int
    """Source pixels."""
    objects: tuple[TruthObject, ...]
    """Everything that is seen except the background."""
    bands_hz: tuple[tuple[float, float], ...]
    """Frequency bands (low, high) of the timbre that is heard."""

    @property
    def sounding(self) -> TruthObject | None:
        """The object that is seen and heard; None when the sound is off-screen or there is none."""
        if self.sound != "on-screen":
            return None
        return next((item for item in self.objects if item.sounding), None)

    @property
    def silent(self) -> tuple[TruthObject, ...]:
        """The objects that are seen and not heard."""
        return tuple(item for item in self.objects if not item.sounding)


def read_truth(path: Path) -> Truth:
    """Ground truth from one JSON file. Raises ValueError naming the file and what is wrong with it."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        objects = tuple(
            TruthObject(
                category=str(item["category"]),
                sounding=bool(item["sounding"]),
                moving=bool(item["moving"]),
                boxes=np.asarray(item["boxes"], dtype=np.float64),
            )
            for item in data["objects"]
        )
        truth = Truth(
            part=data["part"],
            sound=data["sound"],
            category=data.get("category"),
            fps=float(data["fps"]),
            width=int(data["width"]),
            height=int(data["height"]),
            objects=objects,
            bands_hz=tuple((float(low), float(high)) for low, high in data.get("bands_hz") or ()),
        )
    except (KeyError, TypeError, ValueError) as error:
        message = f"{path}: not a ground-truth file ({error!r}); re-run tools/make_world.py"
        raise ValueError(message) from error
    for item in objects:
        if item.boxes.ndim != 2 or item.boxes.shape[1] != 4 or len(item.boxes) == 0:
            raise ValueError(
                f"{path}: boxes of {item.category} are {item.boxes.shape}, expected (num_frames, 4); "
                "re-run tools/make_world.py"
            )
    return truth


def find_truth(world: Path, video_id: str) -> Truth | None:
    """Ground truth of a video of a generated world; None when there is none.

    Args:
        world: folder that `tools/make_world.py` wrote (with `test` inside), or a folder of its videos.
        video_id: path of the video relative to the folder that was sliced, `ClipInfo.video_id`.
    """
    for folder in (world, world / "test"):
        path = (folder / video_id).with_suffix(".json")
        if path.is_file():
            return read_truth(path)
    return None
