"""Training runs of a tiny model on batches made up on the spot."""

import dataclasses
import json
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
import torch.multiprocessing

from cmac.config import RunConfig
from cmac.encoders import AudioEncoderConfig, VideoEncoderConfig
from cmac.model import ModelConfig
from cmac.optim import OptimizerConfig
from loaders.batch import BadClipRecord, ClipBatch
from loaders.config import LoaderConfig

CPU = torch.device("cpu")


def config(run_dir: Path, **changes: object) -> RunConfig:
    small = RunConfig(
        run_dir=str(run_dir),
        epochs=3,
        device="cpu",
        log_every=2,
        checkpoint_every=4,
        loader=LoaderConfig(shards="none", global_batch_size=4, num_workers=0, max_bad_fraction=0.1),
        model=ModelConfig(
            video=VideoEncoderConfig(widths=(4, 8), blocks=(1, 1), stem_width=4),
            audio=AudioEncoderConfig(widths=(4, 8), blocks=(1, 1)),
            filter_channels=8,
            embedding_dim=6,
            queue_length=10,
            momentum=0.9,
            batch_norm="shuffle",
            batch_norm_group=2,
        ),
        optimizer=OptimizerConfig(warmup_epochs=1.0),
    )
    return dataclasses.replace(small, **changes)


class FakeLoader:
    """Batches that depend on (epoch, step, rank) alone, five to an epoch.

    Args:
        nan_at: (epoch, step) of batches that hold NaN.
        before: called with (epoch, step) before each batch.
        rank: of several; each has batches of its own.
    """

    def __init__(
        self,
        nan_at: Sequence[tuple[int, int]] = (),
        before: Callable[[int, int], None] | None = None,
        rank: int = 0,
    ) -> None:
        self.epoch, self._next, self._nan_at = 0, 0, nan_at
        self._before, self._rank = before, rank
        self.bad_clips: Counter[str] = Counter()
        self.handed_out: list[tuple[int, int]] = []

    def __len__(self) -> int:
        return 5

    def __iter__(self) -> Iterator[ClipBatch]:
        while self._next < len(self):
            step = self._next
            if self._before is not None:
                self._before(self.epoch, step)
            self._next += 1
            self.handed_out.append((self.epoch, step))
            yield self._batch(step)
        self.epoch, self._next = self.epoch + 1, 0

    def _batch(self, step: int) -> ClipBatch:
        generator = torch.Generator().manual_seed(1000 * self._rank + 100 * self.epoch + step)
        log_mel = torch.randn(4, 1, 33, 21, generator=generator)
        if (self.epoch, step) in self._nan_at:
            log_mel[0] = math.nan
        if step == 3:
            self.bad_clips["decode-error"] += 1
        return ClipBatch(
            frames=torch.randint(0, 256, (4, 3, 4, 16, 16), dtype=torch.uint8, generator=generator),
            log_mel=log_mel,
            keys=("a", "b", "c", "d"),
            video_ids=torch.arange(4) + 4 * step + 100 * self._rank,
            valid=torch.tensor([True, True, True, step != 3]),
            clips=(None,) * 4,
            augmentations=(None,) * 4,
            bad=(BadClipRecord(key="d", shard="s", reason="decode-error"),) if step == 3 else (),
            epoch=self.epoch,
            step=step,
        )

    def state_dict(self) -> dict:
        return {"epoch": self.epoch, "next": self._next}

    def load_state_dict(self, state: dict) -> None:
        self.epoch, self._next = state["epoch"], state["next"]


def rows(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "log.jsonl").read_text().splitlines()]


def run_two_ranks(function: Callable[[int, str], None], folder: Path) -> Path:
    """`folder`, where function(rank, folder) has run as ranks 0 and 1."""
    torch.multiprocessing.spawn(function, (str(folder),), nprocs=2)
    return folder


def reports(folder: Path, name: str) -> list[dict]:
    """What each of two ranks has written of a scenario."""
    return [json.loads((folder / f"{name}_{rank}.json").read_text()) for rank in (0, 1)]
