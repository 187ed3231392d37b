"""Thousands of damaged and hostile folders of shards: a clip is the right one or refused, and nothing else happens.

One child process reads them all (see fuzz_child); by hand, one alone:

    cd tests && PYTHONPATH=..:. python test_fuzz_shards.py FOLDER --only NAME
"""

import json
import logging
import math
import os
import shutil
import sys
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import fuzz_child
import numpy as np
import pytest
from mutations import MANIFEST_NAME, NUM_CLIPS, POSITION, SIZE, TAR, TARS, Base, Content, Mutant, mutants

from loaders.augment import LONGEST_SIDE, scaled_size
from loaders.decode import decode_frames, decode_waveform, uniform_frame_indices
from loaders.shard_files import OpenShards, open_shards
from shards.check import check_shards
from shards.manifest import read_manifest
from shards.reader import RawClip, ShardReader, find_shard_fault
from shards.schema import SAMPLES_PER_CLIP, BadClip, ClipInfo

NUM_FRAMES = 8
LIMIT_SECONDS = 20  # for one input; the slowest takes a twentieth of it
EXTRA_BYTES = 600_000_000  # of address space, threads' stacks included
PEAK_BYTES = 200_000_000


class Examiner:
    """Reads a damaged folder by every way there is; AssertionError where one of them gives a wrong clip."""

    def __init__(self, base: Base, folder: Path) -> None:
        self.base, self.folder = base, folder
        self.whole = {
            clip[0].name.partition(".")[0]: {member.suffix: member.data for member in clip}
            for clips in base.clips.values()
            for clip in clips
        }
        record = json.loads(base.files[MANIFEST_NAME])
        (self.entry,) = (entry for entry in record["shards"] if entry["name"] == TAR)
        self._decoded: dict[RawClip, str] = {}
        """The clip decoded last, and its outcome."""
        self.neighbor = base.member(0, "mp4").data
        self.neighbor_frames = self.frames(self.neighbor, (SIZE, SIZE))

    def frames(self, video: bytes, stored_size: tuple[int, int]) -> np.ndarray:
        return decode_frames(video, uniform_frame_indices(NUM_FRAMES), SIZE, stored_size=stored_size)

    def examine(self, mutant: Mutant) -> str:
        """The outcome, in a few words."""
        with fuzz_child.unwatched():
            for name, content in mutant.files.items():
                place(self.folder / name, content)
        try:
            return self._examine(mutant)
        finally:
            with fuzz_child.unwatched():
                for path in self.folder.iterdir():
                    if path.name not in self.base.files or path.name in mutant.files:
                        remove(path)
                for name in mutant.files:
                    if name in self.base.files:
                        (self.folder / name).write_bytes(self.base.files[name])

    def _examine(self, mutant: Mutant) -> str:
        fault = find_shard_fault(self.folder / TAR, self.entry["num_clips"], self.entry["bytes"])
        assert fault is None or str(self.folder) in fault, fault
        outcomes = set()
        try:
            reader = ShardReader(self.folder / TAR)
        except ValueError as error:
            self._names_folder(error)
        else:
            with reader:
                for position in range(min(len(reader), 2 * NUM_CLIPS)):
                    outcomes.add(self._read(partial(reader.read, position), mutant))
        try:
            manifest = read_manifest(self.folder)
        except ValueError as error:
            self._names_folder(error)
            with pytest.raises(ValueError):
                check_shards(self.folder)
            return "manifest refused"
        is_refused = False
        for verify in ("sha256",) if mutant.rewritten else ("size", "sha256"):
            try:
                files = open_shards(self.folder, manifest, verify, max_bad_shard_fraction=1.0)
            except ValueError as error:
                self._names_folder(error)
                is_refused = True
                continue
            is_refused |= bool(files.problems)
            shards = OpenShards(files)
            for slot in range(len(files.paths)):
                for shard, num_clips in enumerate(files.clips_per_shard):
                    for position in {*range(min(num_clips, 2 * NUM_CLIPS)), num_clips - 1}:
                        where = ((slot,), 0, shard, position)
                        shards.name(*where)
                        outcomes.add(self._read(partial(shards.read, *where), mutant))
            shards.close()
        decode = bool(mutant.rewritten) and zlib.crc32(mutant.name.encode()) % 4 == 0  # it takes longest
        problems = check_shards(self.folder, decode=decode).problems
        assert problems or not mutant.noticed, "check_shards finds nothing wrong"
        bad = sorted(outcome for outcome in outcomes if outcome not in ("whole", "other contents"))
        if is_refused:
            return "shard refused"
        if bad:
            return "clip refused: " + ", ".join(bad)
        return "other contents" if "other contents" in outcomes else "nothing lost"

    def _names_folder(self, error: ValueError) -> None:
        assert str(self.folder) in str(error), f"the message does not name the file: {error}"
        assert len(str(error)) < 3000, f"a message of {len(str(error))} letters"

    def _read(self, read: Callable[[], RawClip], mutant: Mutant) -> str:
        try:
            clip = read()
            whole, info = self.whole[clip.info.key], clip.info
            if info.key in mutant.rewritten:
                self._check_info(info)
                if clip not in self._decoded:
                    self._decoded = {clip: self._decode(clip, whole)}
                return self._decoded[clip]
        except BadClip as error:
            return error.reason
        known = ClipInfo.from_json(whole["json"])
        assert (clip.video, clip.audio) == (whole["mp4"], whole["wav"]), f"wrong contents of {info.key}"
        for name in ("video_id", "video_number", "slot", "video_crc32", "audio_crc32"):
            assert getattr(info, name) == getattr(known, name), name
        return "whole"

    def _check_info(self, info: ClipInfo) -> None:
        """What the rest of the program takes for granted."""
        assert 0 <= info.video_number < 2**63
        os.fsencode(info.video_id)
        info.to_json()
        assert info.label is None or info.label.encode("utf-8", "surrogateescape") is not None
        assert all(math.isfinite(x) for x in (info.start_seconds, info.source_fps, *info.source_crop))

    def _decode(self, clip: RawClip, whole: dict[str, bytes]) -> str:
        """Outcome of decoding, as the loaders do it; the clip decoded next must not suffer from it."""
        try:
            width, height = clip.info.frame_width, clip.info.frame_height
            if min(width, height) < 1 or max(scaled_size(width, height, SIZE)) > LONGEST_SIDE:
                raise BadClip(clip.info.key, clip.shard, "frame-size")
            try:
                frames = self.frames(clip.video, (width, height))
            finally:
                if clip.video != whole["mp4"]:
                    assert np.array_equal(self.frames(self.neighbor, (SIZE, SIZE)), self.neighbor_frames), (
                        "neighbor"
                    )
            scaled = scaled_size(width, height, SIZE)
            assert frames.dtype == np.uint8 and frames.shape == (NUM_FRAMES, *scaled[::-1], 3)
            waveform = decode_waveform(clip.audio)
            assert waveform.dtype == np.float32 and waveform.shape == (SAMPLES_PER_CLIP,)
            assert np.abs(waveform).max() <= 1
        except BadClip as error:
            return f"{error.reason} when decoded"
        return "whole" if (clip.video, clip.audio) == (whole["mp4"], whole["wav"]) else "other contents"


def place(path: Path, content: Content) -> None:
    remove(path)
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        content(path)


def remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def main(folder: Path, only: str | None = None) -> None:
    """The child: reads all mutants, or one, in a folder that it makes."""
    logging.disable()
    base = Base(folder)
    examiner = Examiner(base, folder)
    whole = examiner.examine(Mutant("whole", {}, frozenset((base.key(POSITION),))))
    assert whole == "nothing lost", whole

    def inputs() -> Iterator[tuple[str, Callable[[], str]]]:
        for mutant in mutants(base):
            if only in (None, mutant.name):
                yield mutant.name, partial(examiner.examine, mutant)

    fuzz_child.examine(
        inputs(), guarded=folder.parent, writable=folder, limit_seconds=LIMIT_SECONDS, extra_bytes=EXTRA_BYTES
    )


def test_damaged_shards_give_the_right_clips_or_refuse_them(tmp_path):
    outside = tmp_path / "outside"
    (outside / "here").mkdir(parents=True)
    (outside / "secret.txt").write_text("secret")
    shutil.copytree(write_neighbors(outside / "other"), outside / "sub")
    before = fuzz_child.snapshot(tmp_path, outside / "shards")
    report = fuzz_child.run_child(
        "test_fuzz_shards.py", str(outside / "shards"), cwd=outside / "here", timeout_seconds=500
    )
    text = report.text("shard reading")
    print(text)
    assert report.failures == [], text
    assert report.num_inputs >= 1500 and report.peak_bytes < PEAK_BYTES, text
    assert fuzz_child.snapshot(tmp_path, outside / "shards") == before, (
        "written outside of the folder of shards"
    )


def write_neighbors(folder: Path) -> Path:
    """A folder of shards beside the one that is read: names in a manifest may point at it."""
    base = Base(folder)
    shutil.copy(folder / TAR, folder.parent / "outside.tar")
    assert set(base.files) >= set(TARS)
    return folder


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[3] if len(sys.argv) > 3 else None)
