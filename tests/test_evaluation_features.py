"""Features are kept, go on after a kill, and are never those of something else."""

import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from cmac.evaluation.features import Features, extract_features, identity_digest, store_folder
from loaders.batch import BadClipRecord, ClipBatch
from shards.schema import ClipInfo


def clip_info(video: str, slot: int, label: str | None = "dog") -> ClipInfo:
    return ClipInfo(
        key=f"{video}_{slot}", video_id=video, video_number=1, label=label, slot=slot, start_seconds=slot / 2,
        end_seconds=slot / 2 + 1, source_fps=25.0, source_width=4, source_height=4, source_crop=(0.0, 0.0, 4.0, 4.0),
        frame_width=4, frame_height=4, loudness_dbfs=-20.0, video_crc32=0, audio_crc32=0,
    )  # fmt: skip


class FakeLoader:
    """Batches of two clips of the videos named; a clip in `broken` is bad. Counts what is read."""

    def __init__(self, videos: list[str], clips: int = 2, broken: tuple[str, ...] = ()) -> None:
        self.places = [(video, slot) for video in videos for slot in range(clips)]
        self.broken = broken
        self.epoch, self.next_batch, self.num_read = 0, 0, 0

    def __len__(self) -> int:
        return -(-len(self.places) // 2)

    def __iter__(self) -> Iterator[ClipBatch]:
        while self.next_batch < len(self):
            places = self.places[2 * self.next_batch : 2 * self.next_batch + 2]
            self.next_batch += 1
            self.num_read += 1
            yield self.batch(places)
        self.epoch, self.next_batch = self.epoch + 1, 0

    def batch(self, places: list[tuple[str, int]]) -> ClipBatch:
        padding = 2 - len(places)
        clips = [None if video in self.broken else clip_info(video, slot) for video, slot in places]
        numbers = [self.places.index(place) for place in places] + [-1] * padding
        bad = [
            BadClipRecord(key=f"{v}_{s}", shard=v, reason="decode-error")
            for v, s in places
            if v in self.broken
        ]
        return ClipBatch(
            frames=torch.tensor(numbers).view(-1, 1, 1, 1, 1).expand(-1, 3, 1, 1, 1),
            log_mel=torch.zeros(2, 1, 1, 1), keys=("",) * 2, video_ids=torch.zeros(2, dtype=torch.int64),
            valid=torch.tensor([clip is not None for clip in clips] + [False] * padding),
            clips=(*clips, *[None] * padding), augmentations=(None,) * 2, bad=tuple(bad), epoch=self.epoch,
            step=self.next_batch - 1,
        )  # fmt: skip

    def state_dict(self) -> dict:
        return {"epoch": self.epoch, "next_batch": self.next_batch}

    def load_state_dict(self, state: dict) -> None:
        self.epoch, self.next_batch = state["epoch"], state["next_batch"]


def encode(batch: ClipBatch) -> dict[str, Tensor]:
    number = batch.frames[:, 0, 0, 0, 0].float()
    return {"number": number, "pair": torch.stack([number, -number], dim=1)}


class Killed(Exception):
    pass


def same(a: Features, b: Features) -> bool:
    lists = ("video_ids", "labels", "bad")
    return (
        all(getattr(a, name) == getattr(b, name) for name in lists)
        and np.array_equal(a.slots, b.slots)
        and np.array_equal(a.start_seconds, b.start_seconds)
        and a.arrays.keys() == b.arrays.keys()
        and all(np.array_equal(a.arrays[name], b.arrays[name]) for name in a.arrays)
    )


def test_rows_are_the_valid_clips_in_reading_order(tmp_path: Path) -> None:
    loader = FakeLoader(["a", "b\udcff", "c"], clips=3, broken=("a",))
    features = extract_features(loader, encode, tmp_path / "store", {"weights": "1"})
    assert features.video_ids == ["b\udcff"] * 3 + ["c"] * 3  # a name that is not UTF-8
    assert features.slots.tolist() == [0, 1, 2] * 2 and features.start_seconds.tolist() == [0, 0.5, 1] * 2
    assert features.arrays["number"].tolist() == [3, 4, 5, 6, 7, 8]
    assert features.arrays["pair"].shape == (6, 2) and features.arrays["pair"].dtype == np.float32
    assert [record.reason for record in features.bad] == ["decode-error"] * 3


@pytest.mark.parametrize("killed_at", range(1, 6))
def test_a_killed_extraction_goes_on_and_gives_the_same(tmp_path: Path, killed_at: int) -> None:
    videos = ["a", "b", "c", "d", "e"]
    whole = extract_features(FakeLoader(videos, broken=("c",)), encode, tmp_path / "whole", {"weights": "1"})
    calls = 0

    def dies(batch: ClipBatch) -> dict[str, Tensor]:
        nonlocal calls
        calls += 1
        if calls == killed_at:
            raise Killed
        return encode(batch)

    store = tmp_path / "store"
    with pytest.raises(Killed):
        extract_features(
            FakeLoader(videos, broken=("c",)), dies, store, {"weights": "1"}, save_every_seconds=0
        )
    loader = FakeLoader(videos, broken=("c",))
    resumed = extract_features(loader, encode, store, {"weights": "1"}, save_every_seconds=0)
    assert loader.num_read == 5 - (killed_at - 1)
    assert same(whole, resumed)


def test_finished_features_are_read_back_without_reading_clips(tmp_path: Path) -> None:
    first = extract_features(FakeLoader(["a", "b"]), encode, tmp_path, {"weights": "1"})
    loader = FakeLoader(["a", "b"])
    assert same(first, extract_features(loader, encode, tmp_path, {"weights": "1"}))
    assert loader.num_read == 0


@pytest.mark.parametrize("save_every_seconds", [0, 30])
def test_killed_when_all_was_saved_it_reads_no_clip_twice(tmp_path: Path, save_every_seconds: float) -> None:
    options = {"save_every_seconds": save_every_seconds}
    whole = extract_features(FakeLoader(["a", "b"]), encode, tmp_path, {"weights": "1"}, **options)
    (tmp_path / "complete").unlink()
    loader = FakeLoader(["a", "b"])
    assert same(whole, extract_features(loader, encode, tmp_path, {"weights": "1"}, **options))
    assert loader.num_read == 0


def test_two_at_once_compute_the_features_once(tmp_path: Path) -> None:
    waits, goes_on = threading.Event(), threading.Event()

    def slow(batch: ClipBatch) -> dict[str, Tensor]:
        waits.set()
        assert goes_on.wait(timeout=60)
        return encode(batch)

    def say(line: str) -> None:
        assert line.startswith("waiting for another process")
        goes_on.set()

    second = FakeLoader(["a", "b"])
    with ThreadPoolExecutor() as pool:
        first = pool.submit(
            extract_features, FakeLoader(["a", "b"]), slow, tmp_path, {"weights": "1"}, save_every_seconds=0
        )
        assert waits.wait(timeout=60)
        later = pool.submit(extract_features, second, slow, tmp_path, {"weights": "1"}, say=say)
        assert same(first.result(), later.result())
    assert second.num_read == 0


def test_features_of_something_else_are_refused(tmp_path: Path) -> None:
    extract_features(FakeLoader(["a"]), encode, tmp_path, {"weights": "1", "clips": 10})
    with pytest.raises(ValueError, match=r"something else \(weights differ\)"):
        extract_features(FakeLoader(["a"]), encode, tmp_path, {"weights": "2", "clips": 10})


def test_each_identity_has_its_own_store(tmp_path: Path) -> None:
    assert store_folder(tmp_path, {"a": 1, "b": 2}) == store_folder(tmp_path, {"b": 2, "a": 1})
    assert store_folder(tmp_path, {"a": 1}) != store_folder(tmp_path, {"a": 2})
    assert len(identity_digest({})) == 16


@pytest.mark.parametrize("damage", ["torn", "identity"])
def test_a_damaged_store_is_named(tmp_path: Path, damage: str) -> None:
    extract_features(FakeLoader(["a"]), encode, tmp_path, {"weights": "1"})
    path = tmp_path / ("chunk-000000.npz" if damage == "torn" else "identity.json")
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(ValueError, match=str(path)):
        extract_features(FakeLoader(["a"]), encode, tmp_path, {"weights": "1"})


def test_a_pickle_in_a_chunk_is_not_unpickled(tmp_path: Path) -> None:
    extract_features(FakeLoader(["a"]), encode, tmp_path, {"weights": "1"})
    meta = np.array([{"state": {}}], dtype=object)
    np.savez(tmp_path / "chunk-000000.npz", __meta__=meta)
    with pytest.raises(ValueError, match="chunk-000000.npz cannot be read"):
        extract_features(FakeLoader(["a"]), encode, tmp_path, {"weights": "1"})


def test_no_usable_clip_is_an_error_that_says_why(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no clip could be used \(decode-error\)"):
        extract_features(FakeLoader(["a"], broken=("a",)), encode, tmp_path, {})


def test_means_per_video_are_over_its_clips(tmp_path: Path) -> None:
    features = extract_features(FakeLoader(["b", "a"], clips=3), encode, tmp_path, {})
    values, videos, labels = features.mean_per_video("pair")
    assert videos == ["b", "a"] and labels == ["dog", "dog"]
    assert values.tolist() == [[1.0, -1.0], [4.0, -4.0]]


def test_an_encoder_that_loses_rows_is_found(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="1 rows of number, expected 2"):
        extract_features(FakeLoader(["a"]), lambda batch: {"number": torch.zeros(1)}, tmp_path, {})


def test_identity_is_readable(tmp_path: Path) -> None:
    extract_features(FakeLoader(["a"]), encode, tmp_path, {"weights": "1"})
    assert json.loads((tmp_path / "identity.json").read_text())["weights"] == "1"
