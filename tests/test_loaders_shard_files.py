"""Shards that are missing or damaged when a loader starts: each is found, said aloud, replaced or left out."""

import json
import logging
import os
import pickle
import re
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from loaders_media import clip_info, write_noise_shards

from loaders.shard_files import ShardFiles, open_shards
from shards.manifest import read_manifest
from shards.reader import ShardReader, find_shard_fault
from shards.schema import WAV_HEADER
from shards.writer import ShardWriter

NUM_CLIPS = (3, 5, 4)
INDICES = (0, 1, 7)  # indices may have gaps
NUM_SLOTS = 3


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Path:
    """Three shards of 12 videos in three slots. What is in the clips does not matter here."""
    folder = tmp_path_factory.mktemp("original")
    write_noise_shards(folder, list(NUM_CLIPS), NUM_SLOTS, INDICES)
    return folder


@pytest.fixture
def folder(original, tmp_path) -> Path:
    """A copy to damage."""
    return shutil.copytree(original, tmp_path / "shards")


def tar(folder: Path, slot: int, index: int) -> Path:
    return folder / f"train-slot{slot:02d}-{index:06d}.tar"


def open_all(folder: Path, **options) -> ShardFiles:
    return open_shards(folder, read_manifest(folder), **{"max_bad_shard_fraction": 1.0, **options})


def names(files: ShardFiles) -> list[list[str]]:
    return [[Path(path).name for path in slot_paths] for slot_paths in files.paths]


@pytest.mark.parametrize("verify", ["size", "sha256"])
def test_whole_shards_are_read_as_they_are(original, verify, caplog):
    files = open_shards(original, read_manifest(original), verify, max_bad_shard_fraction=0.0)
    assert files.paths == tuple(
        tuple(str(tar(original, slot, index)) for index in INDICES) for slot in range(NUM_SLOTS)
    )
    assert files.clips_per_shard == NUM_CLIPS
    assert (files.substitutions, files.dropped, files.problems) == ({}, (), ())
    assert files.state() == {"dropped_shards": []} and caplog.records == []


def fill(path: Path, start: int, end: int, data: bytes) -> None:
    """Overwrites bytes start .. end by repeated data; the length stays."""
    old = path.read_bytes()
    end = min(end, len(old))
    path.write_bytes(old[:start] + (data * (end - start))[: end - start] + old[end:])


def zeros_of_right_size(path: Path) -> None:
    fill(path, 0, path.stat().st_size, b"\0")


def garbage_of_right_size(path: Path) -> None:
    fill(path, 0, path.stat().st_size, np.random.default_rng(1).bytes(4096))


def link_to_nowhere(path: Path) -> None:
    path.unlink()
    path.symlink_to("/no/such/file")


def directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


def pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def html(path: Path) -> None:
    path.write_bytes(b"<html><body>404 Not Found</body></html>")


def other_shard(path: Path) -> None:
    shutil.copy(tar(path.parent, 0, 1).with_suffix(path.suffix), path)


def other_slot(path: Path) -> None:
    shutil.copy(path.with_name(path.name.replace("slot01", "slot02")), path)


def keep(number: float):
    """Cuts a file to its first `number` bytes, by -number bytes, or to a share of it (0 to 1)."""

    def cut(path: Path) -> None:
        data = path.read_bytes()
        path.write_bytes(data[: int(number * len(data)) if 0 < number < 1 else int(number)])

    return cut


def edit(function):
    """Index with function(lines) for lines."""

    def change(path: Path) -> None:
        lines = function(path.read_text().splitlines())
        path.write_text("".join(line + "\n" for line in lines))

    return change


TAR_DAMAGE = {
    "missing": (Path.unlink, r"is missing, expected a tar of \d+ bytes"),
    "no bytes": (keep(0), r"has 0 bytes, expected \d+ bytes by its manifest"),
    "cut at 40 %": (keep(0.4), r"has \d+ bytes, expected \d+ bytes by its manifest"),
    "cut by a block": (keep(-512), r"has \d+ bytes, expected"),
    "longer": (lambda path: path.write_bytes(path.read_bytes() + bytes(10240)), r"has \d+ bytes, expected"),
    "error page": (html, r"has 39 bytes, expected"),
    "zeros of the right size": (zeros_of_right_size, r"at byte 0, expected the header of \w+_01.mp4"),
    "garbage of the right size": (garbage_of_right_size, r"at byte 0, expected the header of \w+_01.mp4"),
    "first header": (lambda path: fill(path, 0, 512, b"\xa5"), r"at byte 0, expected the header of"),
    "size in the header": (lambda path: fill(path, 124, 136, b"\xff"), "expected the header of"),
    "end": (lambda path: fill(path, path.stat().st_size - 60_000, 10**9, b"\0"), "expected the header of"),
    "other slot": (other_slot, "expected the header of|bytes by its manifest"),
    "link to nowhere": (link_to_nowhere, "is a link to /no/such/file, which does not exist, expected a tar"),
    "directory": (directory, "is a directory, expected a tar"),
    "pipe": (pipe, "is not a plain file, expected a tar"),
}
INDEX_DAMAGE = {
    "missing": (Path.unlink, "idx is missing, expected DALI's index beside the tar"),
    "no bytes": (keep(0), r"idx starts with b'' and has 0 lines, expected b'v1.2 3\\n' and 3 more by its"),
    "cut at 40 %": (keep(0.4), r"idx starts with b'v1.2 3.* and has \d lines, expected"),
    "last line cut": (keep(-3), r"idx starts with b'v1.2 3.* and has 3 lines, expected"),
    "of another shard": (other_shard, r"idx starts with b'v1.2 5.* and has 6 lines, expected b'v1.2 3"),
    "of another slot": (other_slot, "idx ends at byte|expected the header of"),
    "fewer clips": (edit(lambda lines: ["v1.2 2", *lines[1:3]]), "idx starts with b'v1.2 2"),
    "other version": (edit(lambda lines: ["v1.1 3", *lines[1:]]), "idx starts with b'v1.1 3"),
    "without its last line": (edit(lambda lines: lines[:-1]), "has 3 lines, expected"),
    "garbage": (garbage_of_right_size, "idx starts with"),
    "zeros in the middle": (lambda path: fill(path, 150, 160, b"\0"), r"idx holds b'\\x00\\x00"),
    "words for numbers": (edit(lambda lines: [*lines[:-1], "mp4 x y z"]), "idx has b'mp4 x y z', expected"),
    "moved by a block": (
        edit(lambda lines: [lines[0], *(move(line, 512) for line in lines[1:])]),
        "idx ends at byte|expected the header of",
    ),
    "first clip beyond the tar": (
        edit(lambda lines: [lines[0], move(lines[1], 10**30), *lines[2:]]),
        r"idx ends at byte \d+, expected the end of the tar's \d+ bytes",
    ),
    "beyond the tar": (
        edit(lambda lines: [*lines[:-1], move(lines[-1], 1 << 40)]),
        r"idx ends at byte \d+, expected the end of the tar's \d+ bytes",
    ),
    "link to nowhere": (link_to_nowhere, "idx is a link to /no/such/file, which does not exist"),
    "directory": (directory, "idx is a directory"),
}


def move(line: str, distance: int) -> str:
    words = line.split(" ")
    words[1::4] = [str(int(offset) + distance) for offset in words[1::4]]
    return " ".join(words)


DAMAGE = [("tar", name) for name in TAR_DAMAGE] + [("idx", name) for name in INDEX_DAMAGE]


@pytest.mark.parametrize(("suffix", "name"), DAMAGE)
def test_bad_shard_is_replaced_by_the_next_slot_and_said_aloud(folder, suffix, name, caplog):
    function, words = (TAR_DAMAGE if suffix == "tar" else INDEX_DAMAGE)[name]
    function(tar(folder, 1, 0).with_suffix(f".{suffix}"))
    with caplog.at_level(logging.INFO):
        files = open_all(folder, max_bad_shard_fraction=0.12)
    assert names(files) == [
        ["train-slot00-000000.tar", "train-slot00-000001.tar", "train-slot00-000007.tar"],
        ["train-slot02-000000.tar", "train-slot01-000001.tar", "train-slot01-000007.tar"],
        ["train-slot02-000000.tar", "train-slot02-000001.tar", "train-slot02-000007.tar"],
    ]
    assert (files.clips_per_shard, files.substitutions, files.dropped) == (NUM_CLIPS, {(1, 0): 2}, ())
    (problem,) = files.problems
    assert problem.startswith(str(folder / "train-slot01-000000"))
    assert problem.endswith("Until then train-slot02-000000.tar is read in its place")
    assert "copy " in problem and "again or re-run make_shards" in problem
    assert re.search(words, problem), problem
    assert [(record.levelname, record.message) for record in caplog.records] == [("WARNING", problem)]


@pytest.mark.parametrize(("suffix", "name"), DAMAGE)
def test_bad_shard_of_a_single_slot_is_left_out_with_its_videos(folder, suffix, name, caplog):
    manifest = read_manifest(folder)
    manifest = replace(manifest, num_slots=1, shards=manifest.slot_shards(0))
    path = tar(folder, 0, 0).with_suffix(f".{suffix}")
    if name == "other slot" or name == "of another slot":
        shutil.copy(tar(folder, 1, 0).with_suffix(path.suffix), path)
    else:
        (TAR_DAMAGE if suffix == "tar" else INDEX_DAMAGE)[name][0](path)
    files = open_shards(folder, manifest, max_bad_shard_fraction=0.4)
    assert names(files) == [["train-slot00-000001.tar", "train-slot00-000007.tar"]]
    assert (files.clips_per_shard, files.substitutions, files.dropped) == (NUM_CLIPS[1:], {}, (0,))
    assert files.problems[0].endswith(
        "Until then its 3 videos are left out: they are good in 0 of 1 slots, expected 1"
    )
    assert "3 of 12 videos are left out with shards [0]" in caplog.messages[-1]
    assert json.loads(json.dumps(files.state())) == files.state() == {"dropped_shards": [0]}


def test_damage_inside_is_seen_by_the_checksum_and_clip_by_clip(folder):
    path = tar(folder, 1, 7)
    with ShardReader(path) as reader:
        key = reader.key(1)
    data = bytearray(path.read_bytes())
    start = data.find(f"{key}.wav".encode()) + 30_000
    data[start : start + 100] = b"\xa5" * 100
    path.write_bytes(data)
    assert open_all(folder).problems == ()
    files = open_all(folder, verify="sha256")
    assert files.substitutions == {(1, 2): 2}
    assert "train-slot01-000007.tar has SHA-256" in files.problems[0]


def test_index_that_is_bad_in_the_middle_is_seen_with_sha256(folder):
    edit(lambda lines: [*lines[:2], lines[2].replace("wav ", "wav x"), *lines[3:]])(
        tar(folder, 2, 1).with_suffix(".idx")
    )
    assert open_all(folder).problems == ()
    files = open_all(folder, verify="sha256")
    assert files.substitutions == {(2, 1): 0} and "train-slot02-000001.idx, line 3 is" in files.problems[0]


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may read every file")
@pytest.mark.parametrize("suffix", [".tar", ".idx"])
def test_unreadable_file_is_a_bad_shard(folder, suffix):
    path = tar(folder, 0, 1).with_suffix(suffix)
    path.chmod(0)
    files = open_all(folder)
    assert files.substitutions == {(0, 1): 1} and "cannot be read (Permission denied)" in files.problems[0]


def test_link_to_a_whole_shard_is_good(folder, tmp_path):
    path = tar(folder, 0, 1)
    path.rename(tmp_path / "elsewhere.tar")
    path.symlink_to(tmp_path / "elsewhere.tar")
    assert open_all(folder, verify="sha256").problems == ()


def test_shard_that_is_bad_in_all_slots_is_left_out(folder, caplog):
    for slot, name in enumerate(["missing", "no bytes", "first header"]):
        TAR_DAMAGE[name][0](tar(folder, slot, 1))
    tar(folder, 0, 7).unlink()
    files = open_all(folder, max_bad_shard_fraction=0.5)
    assert names(files) == [
        ["train-slot00-000000.tar", "train-slot01-000007.tar"],
        ["train-slot01-000000.tar", "train-slot01-000007.tar"],
        ["train-slot02-000000.tar", "train-slot02-000007.tar"],
    ]
    assert (files.clips_per_shard, files.dropped, files.substitutions) == ((3, 4), (1,), {(0, 1): 1})
    assert len(files.problems) == 4 and len(caplog.records) == 5
    assert "5 of 12 videos are left out with shards [1]" in caplog.messages[-1]


def test_two_clips_of_a_video_never_come_from_one_tar(folder):
    tar(folder, 0, 0).unlink()
    tar(folder, 1, 7).unlink()
    files = open_all(folder, clips_per_video=2)

    def read(slots: tuple[int, ...], i: int) -> list[int]:
        return [int(Path(path).name[10:12]) for path in files.epoch_paths(slots, i)]

    assert [read((slot,), 0) for slot in range(3)] == [[1], [1], [2]]
    assert [Path(slot[0]).name[10:12] for slot in files.paths] == ["01", "01", "02"]
    assert read((0, 1), 0) == [2, 1] and read((0, 2), 0) == [1, 2] and read((2, 0), 0) == [2, 1]
    assert read((1, 2), 0) == [1, 2] and read((0, 1), 1) == [0, 1]
    for i in range(3):
        for slots in [(0, 1), (1, 2), (2, 0), (0, 2), (1, 0), (2, 1)]:
            assert len(set(read(slots, i))) == 2


def test_two_bad_slots_of_four_give_way_to_the_two_others(folder):
    files = ShardFiles(
        paths=(("c",), ("c",), ("c",), ("d",)),
        clips_per_shard=(3,),
        substitutions={(0, 0): 2, (1, 0): 2},
        dropped=(),
        problems=(),
    )
    assert files.epoch_paths((0, 1), 0) == ("c", "d") and files.epoch_paths((1, 0), 0) == ("c", "d")
    assert files.epoch_paths((0, 2), 0) == ("d", "c") and files.epoch_paths((3, 1), 0) == ("d", "c")


def test_two_clips_per_video_need_two_good_slots(folder):
    tar(folder, 0, 1).unlink()
    tar(folder, 1, 1).unlink()
    assert open_all(folder).dropped == ()
    files = open_all(folder, clips_per_video=2)
    assert files.dropped == (1,) and files.clips_per_shard == (3, 4)
    assert files.problems[0].endswith("its 5 videos are left out: they are good in 1 of 3 slots, expected 2")


def test_too_many_bad_shards_are_an_error_that_names_some(folder, caplog):
    for slot, index in [(0, 0), (1, 1), (2, 7), (0, 7), (1, 7)]:
        keep(100)(tar(folder, slot, index))
    with pytest.raises(ValueError) as caught:
        open_all(folder, max_bad_shard_fraction=0.5)
    message = str(caught.value)
    assert message.startswith(
        f"5 of 9 shards of {folder} are bad, expected at most 50% (loader.max_bad_shard_fraction):\n"
    )
    assert message.count("has 100 bytes, expected") == 3 and "train-slot00-000000.tar" in message
    assert message.endswith("and 2 more; tools/check_shards.py lists them") and caplog.records == []
    assert open_all(folder, max_bad_shard_fraction=0.56).dropped == (7,)
    with pytest.raises(ValueError, match="5 of 9 shards .* expected at most 10%"):
        open_shards(folder, read_manifest(folder))


def test_nothing_left_is_an_error_whatever_is_allowed(folder):
    for path in folder.glob("*.tar"):
        path.unlink()
    with pytest.raises(ValueError, match="no shard is left, expected at least one .*000000.tar is missing"):
        open_all(folder)
    with pytest.raises(ValueError, match="9 of 9 shards .* are bad"):
        open_all(folder, max_bad_shard_fraction=0.99)


def test_slots_that_do_not_fit_each_other_are_refused(folder):
    manifest = read_manifest(folder)
    with pytest.raises(ValueError, match="slots do not hold the same videos shard by shard"):
        open_shards(folder, replace(manifest, shards=manifest.shards[:-1]))
    with pytest.raises(ValueError, match="slots do not hold the same videos shard by shard"):
        open_shards(folder, replace(manifest, shards=()))
    with pytest.raises(ValueError, match="verify_shards is 'crc', expected size or sha256"):
        open_shards(folder, manifest, "crc")


def test_long_check_says_how_far_it_is(original, monkeypatch, caplog):
    monkeypatch.setattr("loaders.shard_files.PROGRESS_SECONDS", 0.0)
    with caplog.at_level(logging.INFO):
        open_all(original, verify="sha256")
    assert "checked 9 of 9 shards (0.0 of 0.0 GB, 0 s), 0 bad" in caplog.messages


def test_shard_files_survive_pickling(folder):
    tar(folder, 0, 0).unlink()
    files = open_all(folder)
    assert pickle.loads(pickle.dumps(files)) == files


def test_check_of_a_shard_of_a_thousand_clips_takes_less_than_a_millisecond(tmp_path):
    audio = WAV_HEADER + bytes(100)
    with ShardWriter(tmp_path, "train", 0, 0) as writer:
        for number in range(1000):
            writer.write(clip_info(f"{number}.mp4", 0, 192, 144, b"video", audio), b"video", audio)
    entry, path = writer.entry, tmp_path / writer.entry.name
    seconds = []
    for _ in range(20):
        begin = time.perf_counter()
        assert find_shard_fault(path, entry.num_clips, entry.bytes) is None
        seconds.append(time.perf_counter() - begin)
    assert min(seconds) < 1e-3


def test_opening_does_not_import_torch():
    script = "import sys, loaders.shard_files; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], check=True, cwd=Path(__file__).parents[1])
