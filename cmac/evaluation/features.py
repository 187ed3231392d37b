"""Features of every clip that a loader gives, kept on disk so that a run that was killed goes on where it was.

A store is a folder: `identity.json` says what the features are of, `chunk-000000.npz` and so on hold them, each with
the loader's position behind it, and `complete` is there when the loader's epoch was read to its end. Every file is
written whole or not at all, and read without unpickling.
"""

import hashlib
import io
import json
import logging
import time
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from loaders import Loader
from loaders.batch import BadClipRecord, ClipBatch
from shards.lock import take_lock
from shards.manifest import write_atomically

STORE_VERSION = 1
SAVE_EVERY_SECONDS = 30.0
_COMPLETE = "complete"
_META = "__meta__"

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Features:
    """What was computed of N valid clips, in reading order."""

    arrays: dict[str, np.ndarray]
    """Name -> float32 (N, ...)."""
    video_ids: list[str]
    """N: `ClipInfo.video_id`."""
    labels: list[str | None]
    """N: class names, where the files have them."""
    slots: np.ndarray
    """int64 (N,): number of the clip (and crop) in its video."""
    start_seconds: np.ndarray
    """float64 (N,): where the clips start in their videos."""
    bad: list[BadClipRecord]
    """Clips that could not be used; they have no row."""
    seconds: float
    """How long they took to be read and computed, over all starts."""

    @property
    def num_clips(self) -> int:
        """N."""
        return len(self.video_ids)

    def mean_per_video(self, name: str) -> tuple[np.ndarray, list[str], list[str | None]]:
        """(float32 (V, ...), V video ids, V labels): means over each video's clips, videos in reading order."""
        numbers = {video: number for number, video in enumerate(dict.fromkeys(self.video_ids))}
        rows = np.array([numbers[video] for video in self.video_ids], dtype=np.int64)
        values = self.arrays[name]
        sums = np.zeros((len(numbers), *values.shape[1:]), dtype=np.float64)
        np.add.at(sums, rows, values)
        counts = np.bincount(rows, minlength=len(numbers)).reshape(-1, *[1] * (values.ndim - 1))
        labels = dict(zip(self.video_ids, self.labels))
        return (sums / counts).astype(np.float32), list(numbers), [labels[video] for video in numbers]


def identity_digest(identity: dict[str, Any]) -> str:
    """16 hex digits of an identity; equal ones have equal digests."""
    text = json.dumps(identity, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def store_folder(folder: Path, identity: dict[str, Any]) -> Path:
    """Where below `folder` the features of an identity are kept: each has a folder of its own."""
    return folder / "features" / identity_digest(identity)


def extract_features(
    loader: Loader,
    encode: Callable[[ClipBatch], dict[str, Tensor]],
    store: Path,
    identity: dict[str, Any],
    *,
    save_every_seconds: float = SAVE_EVERY_SECONDS,
    say: Callable[[str], None] | None = None,
) -> Features:
    """Features of one epoch of a loader; of what `store` holds already nothing is read or computed again.

    A process that asks for what another one is computing waits for it.

    Args:
        loader: at the start of its epoch; neither shuffled nor augmented for evaluation. It is left open.
        encode: a batch -> name -> (N, ...) float tensors for all of its rows, on any device; rows that are not valid
            are dropped. Called without gradients.
        store: folder of its own, `store_folder` names one.
        identity: JSON-able; everything that the features depend on: digest of the weights, preprocessing, clips.
            The loader's own position and order are checked besides.
        save_every_seconds: what is not yet saved when the process is killed is computed again.
        say: told now and then how far it is.

    Raises:
        ValueError: the store holds features of something else, or is damaged, or no clip could be used.
    """
    described = {"version": STORE_VERSION, **json.loads(json.dumps(identity))}
    store.mkdir(parents=True, exist_ok=True)
    with nullcontext() if (store / _COMPLETE).exists() else _alone(store, say):
        _check_identity(store, described)
        chunks = _read_chunks(store)
        if not (store / _COMPLETE).exists():
            epoch = loader.epoch
            if chunks:
                loader.load_state_dict(dict(chunks[-1]["state"]))
            # Killed when all was saved, it stands at the start of the next epoch: nothing is left to read.
            if loader.epoch == epoch:
                _extract(loader, encode, store, chunks, save_every_seconds, say)
            write_atomically(store / _COMPLETE, b"")
    features = _join(chunks)
    if features.num_clips == 0:
        reasons = sorted({record.reason for record in features.bad}) or ["the loader gave none"]
        raise ValueError(f"no clip could be used ({', '.join(reasons)}), expected at least one; see {store}")
    return features


@contextmanager
def _alone(store: Path, say: Callable[[str], None] | None) -> Iterator[None]:
    """Holds a store for this process, when no other one holds it any more: chunks of two would be mixed up."""
    with open(store / "lock", "w") as file:
        if not take_lock(file, store):
            if say is not None:
                say(f"waiting for another process, which computes the same features in {store}")
            take_lock(file, store, wait=True)
        yield


def _check_identity(store: Path, described: dict[str, Any]) -> None:
    path = store / "identity.json"
    if not path.exists():
        if any(store.glob("chunk-*.npz")):
            raise ValueError(f"{store} holds features without identity.json; remove the folder")
        write_atomically(path, (json.dumps(described, indent=1, sort_keys=True) + "\n").encode())
        return
    try:
        found = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(
            f"{path} is not JSON ({error}); remove {store} to compute its features again"
        ) from error
    if found != described:
        names = sorted(
            name for name in found.keys() | described.keys() if found.get(name) != described.get(name)
        )
        raise ValueError(
            f"{store} holds features of something else ({', '.join(names)} differ), expected those of "
            f"{ {name: described.get(name) for name in names} }; choose another folder or remove this one"
        )


def _extract(
    loader: Loader,
    encode: Callable[[ClipBatch], dict[str, Tensor]],
    store: Path,
    chunks: list[dict[str, Any]],
    save_every_seconds: float,
    say: Callable[[str], None] | None,
) -> None:
    """Reads the rest of the epoch and appends chunks, to the list as to the store."""
    parts: list[dict[str, Any]] = []
    started = saved = time.monotonic()
    num_new, num_batches = 0, len(loader)

    def save(step: int) -> None:
        nonlocal parts, saved
        chunk = {
            **_join_parts(parts),
            "state": loader.state_dict(),
            "seconds": time.monotonic() - saved,
        }
        _write_chunk(store / f"chunk-{len(chunks):06d}.npz", chunk)
        chunks.append(chunk)
        parts, saved = [], time.monotonic()
        if say is not None:
            rate = num_new / max(saved - started, 1e-9)
            say(f"batch {step} of {num_batches}, {rate:.1f} clips/s")

    step = 0
    for batch in loader:
        step = batch.step + 1
        with torch.inference_mode():
            encoded = encode(batch)
        rows = [row for row, clip in enumerate(batch.clips) if clip is not None]
        num_new += len(rows)
        for name, values in encoded.items():
            if len(values) != batch.num_clips:
                raise ValueError(f"encode gave {len(values)} rows of {name}, expected {batch.num_clips}")
        clips = [batch.clips[row] for row in rows]
        parts.append(
            {
                "arrays": {name: values[rows].float().cpu().numpy() for name, values in encoded.items()},
                "video_ids": [clip.video_id for clip in clips],
                "labels": [clip.label for clip in clips],
                "slots": [clip.slot for clip in clips],
                "start_seconds": [clip.start_seconds for clip in clips],
                "bad": [asdict(record) for record in batch.bad],
            }
        )
        if time.monotonic() - saved >= save_every_seconds:
            save(step)
    if parts:
        save(step)


def _join_parts(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    names = parts[0]["arrays"].keys() if parts else ()
    joined: dict[str, Any] = {
        "arrays": {name: np.concatenate([part["arrays"][name] for part in parts]) for name in names}
    }
    for name in ("video_ids", "labels", "slots", "start_seconds", "bad"):
        joined[name] = [value for part in parts for value in part[name]]
    return joined


def _join(chunks: Sequence[dict[str, Any]]) -> Features:
    joined = _join_parts(chunks)
    return Features(
        arrays=joined["arrays"],
        video_ids=joined["video_ids"],
        labels=joined["labels"],
        slots=np.array(joined["slots"], dtype=np.int64),
        start_seconds=np.array(joined["start_seconds"], dtype=np.float64),
        bad=[BadClipRecord(**record) for record in joined["bad"]],
        seconds=sum(chunk["seconds"] for chunk in chunks),
    )


def _write_chunk(path: Path, chunk: dict[str, Any]) -> None:
    meta = {name: value for name, value in chunk.items() if name != "arrays"}
    buffer = io.BytesIO()
    # JSON in ASCII: names of files that are not UTF-8 have surrogate escapes, which it keeps.
    encoded = np.frombuffer(json.dumps(meta).encode("ascii"), dtype=np.uint8)
    np.savez(buffer, **{_META: encoded}, **chunk["arrays"])
    write_atomically(path, buffer.getvalue())


def _read_chunks(store: Path) -> list[dict[str, Any]]:
    chunks = []
    for path in sorted(store.glob("chunk-*.npz")):
        try:
            with np.load(path, allow_pickle=False) as file:
                chunk = json.loads(file[_META].tobytes())
                chunk["arrays"] = {name: file[name] for name in file.files if name != _META}
        except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
            raise ValueError(f"{path} cannot be read ({error}); remove {store} and run again") from error
        chunks.append(chunk)
    return chunks
