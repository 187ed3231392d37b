"""Checkpoint files: their checksum, the choice of the newest whole one, and disks that take no more."""

import errno
import json
import logging
import os
import resource
import struct
import zipfile
from pathlib import Path
from typing import BinaryIO

import pytest
import torch

import cmac
from cmac import archive
from cmac.checkpoint import (
    FORMAT,
    build_model,
    list_checkpoints,
    newest_checkpoint,
    newest_valid_checkpoint,
    read_checkpoint,
    read_state,
    save_checkpoint,
    verify_checkpoint,
)
from cmac.config import RunConfig, config_to_dict, demo

CONTENT = {
    "model": {"w": torch.arange(1000.0), "queue": torch.full((3,), 7)},
    "rng": [{"cpu": torch.get_rng_state()}],
}


def save(folder: Path, *steps: int, keep: int = 10) -> list[Path]:
    return [save_checkpoint(folder, step, demo(), CONTENT, keep) for step in steps]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


def tear(path: Path) -> None:
    os.truncate(path, path.stat().st_size * 2 // 3)


def make_format_1(path: Path) -> Path:
    """A checkpoint of before there were checksums."""
    state = read_state(path)
    content = {**state, "format": 1, "config": json.dumps(state["config"])}
    with open(path, "wb") as file:
        torch.save(content, file)
    return path


def test_what_is_saved_is_read_back_and_plain_torch_and_zip_readers_take_it_too(tmp_path):
    (path,) = save(tmp_path, 7)
    assert verify_checkpoint(path) is None
    state = read_checkpoint(path)
    assert (state["format"], state["step"]) == (FORMAT, 7) and isinstance(state["config"], RunConfig)
    assert config_to_dict(state["config"]) == config_to_dict(demo())
    with open(path, "rb") as file:
        found = [
            state,
            *(torch.load(path, weights_only=True, mmap=mmap) for mmap in (False, True)),
            torch.load(file),
        ]
    for each in found:
        assert torch.equal(each["model"]["w"], CONTENT["model"]["w"])
        assert torch.equal(each["rng"][0]["cpu"], CONTENT["rng"][0]["cpu"])
    with zipfile.ZipFile(path) as opened:
        assert opened.testzip() is None and opened.comment.startswith(archive.COMMENT)


def test_every_flipped_bit_and_every_cut_is_noticed(tmp_path):
    """One bit in each 97th byte, padding included, and all of the last 200; cuts at as many places."""
    (path,) = save(tmp_path, 1)
    data = path.read_bytes()
    places = sorted({*range(0, len(data), 97), *range(len(data) - 200, len(data))})
    unnoticed = []
    for place in places:
        for name, changed in {
            "flip": data[:place] + bytes([data[place] ^ 4]) + data[place + 1 :],
            "cut": data[:place],
        }.items():
            path.write_bytes(changed)
            if verify_checkpoint(path) is None:
                unnoticed.append((name, place))
    assert unnoticed == [] and len(places) > 250
    path.write_bytes(data)
    assert verify_checkpoint(path) is None


def test_no_reader_takes_a_checkpoint_with_a_flipped_bit(tmp_path):
    """In the middle of a tensor, where torch.load notices nothing."""
    (path,) = save(tmp_path / "checkpoints", 1)
    flip(path, path.read_bytes().index(struct.pack("<3f", 500, 501, 502)))
    assert not torch.equal(torch.load(path)["model"]["w"], CONTENT["model"]["w"])
    for read in (read_state, read_checkpoint, cmac.load, cmac.load_checkpoint):
        with pytest.raises(ValueError, match=r"step_00000001.pt: .*SHA-256.*changed or lost"):
            read(path)
    with pytest.raises(ValueError, match="none of its 1 checkpoints is whole"):
        cmac.load(tmp_path)


def test_the_newest_whole_checkpoint_is_found_and_each_broken_one_is_said_and_stays(tmp_path):
    paths = save(tmp_path, 1, 2, 3, 4, 5)
    flip(paths[2], 300)
    tear(paths[3])
    paths[4].write_bytes(b"")
    said = []
    assert newest_valid_checkpoint(tmp_path, said.append) == paths[1]
    assert [line.partition(": SKIPPED: ")[0] for line in said] == [str(path) for path in reversed(paths[2:])]
    assert "cut short" in said[0] and "cut short" in said[1] and "SHA-256" in said[2]
    assert all("The one before it is taken" in line for line in said)
    assert list_checkpoints(tmp_path) == paths
    assert newest_valid_checkpoint(tmp_path / "absent", pytest.fail) is None


def test_a_run_all_of_whose_checkpoints_are_broken_does_not_start_anew_by_itself(tmp_path):
    for path in save(tmp_path, 1, 2):
        tear(path)
    with pytest.raises(
        ValueError, match=r"none of its 2 checkpoints is whole .*remove them all to start anew"
    ):
        newest_valid_checkpoint(tmp_path, lambda line: None)


def test_what_is_no_file_is_skipped_and_not_waited_for(tmp_path):
    (whole,) = save(tmp_path, 1)
    os.mkfifo(tmp_path / "step_00000002.pt")
    (tmp_path / "step_00000003.pt").mkdir()
    (tmp_path / "step_00000004.pt").symlink_to("nowhere")
    (tmp_path / "step_00000005.pt").symlink_to("/dev/zero")
    said = []
    assert newest_valid_checkpoint(tmp_path, said.append) == whole
    assert len(said) == 4 and "no regular file" in said[0] and "a folder" in said[2]
    save(tmp_path, 6, keep=1)
    assert names(tmp_path) == [f"step_0000000{step}.pt" for step in (2, 3, 4, 5, 6)]


def test_broken_checkpoints_do_not_count_among_those_that_are_kept(tmp_path):
    """Two newer ones are torn: without the count the only whole one would be removed."""
    first, second, third = save(tmp_path, 1, 2, 3)
    tear(second)
    flip(third, 400)
    save(tmp_path, 4, keep=2)
    assert names(tmp_path) == [f"step_0000000{step}.pt" for step in (1, 2, 3, 4)]
    save(tmp_path, 5, keep=2)
    assert names(tmp_path) == [f"step_0000000{step}.pt" for step in (2, 3, 4, 5)]
    assert newest_valid_checkpoint(tmp_path, pytest.fail).name == "step_00000005.pt"


def test_a_whole_checkpoint_is_verified_once_for_pruning(tmp_path, monkeypatch):
    """Reading gigabytes again at every save would slow a run down."""
    checked = []
    real = archive._checksum
    monkeypatch.setattr(archive, "_checksum", lambda file: checked.append(file.name) or real(file))
    save(tmp_path, 1, 2, 3, 4, keep=3)
    assert sorted(Path(path).name for path in checked) == [f"step_0000000{step}.pt" for step in (1, 2, 3)]


def test_an_old_checkpoint_that_cannot_be_read_does_not_end_a_run_that_has_saved_itself(
    tmp_path, monkeypatch
):
    save(tmp_path, 1)

    def unreadable(file: BinaryIO) -> str:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(archive, "_checksum", unreadable)
    save(tmp_path, 2, keep=1)
    assert names(tmp_path) == ["step_00000001.pt", "step_00000002.pt"]


def test_a_run_folder_is_loaded_from_its_newest_whole_checkpoint_with_a_warning(tmp_path, caplog):
    state = {"model": build_model(demo()).state_dict()}
    whole, torn = (save_checkpoint(tmp_path / "checkpoints", step, demo(), state, 2) for step in (1, 2))
    tear(torn)
    with caplog.at_level(logging.WARNING, "cmac.checkpoint"):
        assert newest_checkpoint(tmp_path) == whole
    (record,) = caplog.records
    assert str(torn) in record.message and "cut short" in record.message
    assert cmac.load(tmp_path).file == whole


def test_checkpoints_without_a_checksum_are_read_and_said_and_their_damage_is_noticed(tmp_path):
    first, second = save(tmp_path, 1, 2)
    make_format_1(second)
    said = []
    assert newest_valid_checkpoint(tmp_path, said.append) == second
    assert len(said) == 1 and f"{second}: has no checksum" in said[0]
    assert torch.equal(read_checkpoint(second)["model"]["w"], CONTENT["model"]["w"])
    flip(second, second.read_bytes().index(struct.pack("<3f", 500, 501, 502)))
    assert newest_valid_checkpoint(tmp_path, said.append) == first
    assert "CRC-32 of its member" in said[1]
    make_format_1(first)
    tear(first)
    with pytest.raises(ValueError, match="cut short"):
        read_state(first)


def test_a_checkpoint_that_has_lost_its_checksum_is_not_taken_for_an_older_format(tmp_path):
    (path,) = save(tmp_path, 1)
    os.truncate(path, path.stat().st_size - len(archive.COMMENT) - 64)
    assert torch.load(path)["step"] == 1  # all of the content is there
    assert "neither a checksum nor the end of a zip file" in verify_checkpoint(path)


def test_a_configuration_that_the_weights_do_not_bear_out_is_refused_before_it_is_built(tmp_path):
    config = demo()
    path = save_checkpoint(tmp_path, 1, config, {"model": build_model(config).state_dict()}, keep=1)
    state = torch.load(path)
    for old, new in {
        '"queue_length": 1024': '"queue_length": 1000000000000',
        '"blocks": [1, 1, 1]': '"blocks": [1, 1, 10000000]',
    }.items():
        assert old in state["config"]
        crafted = save_checkpoint(
            tmp_path, 2, config, {**state, "config": state["config"].replace(old, new)}, 2
        )
        for load in (cmac.load, cmac.load_checkpoint):
            with pytest.raises(
                ValueError, match="step_00000002.pt: its weights do not fit its configuration"
            ):
                load(crafted)


def test_what_could_not_be_read_again_is_not_saved(tmp_path):
    save(tmp_path, 1)
    with pytest.raises(ValueError, match="could not be read again: it asks for '__builtin__.bytearray'"):
        save_checkpoint(tmp_path, 2, demo(), {"more": bytearray(3)}, keep=1)
    assert names(tmp_path) == ["step_00000001.pt"]


@pytest.mark.parametrize("fraction", [0.0, 0.5, 0.999])
def test_a_file_that_may_not_grow_leaves_the_checkpoint_before_and_says_what_is_needed(tmp_path, fraction):
    """A limit on the size of files stands in for a full disk; tests/test_kill_and_resume.py has a real one."""
    (before,) = save(tmp_path, 1)
    size = before.stat().st_size
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(size * fraction), hard))
    try:
        with pytest.raises(OSError) as raised:
            save(tmp_path, 2, keep=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    assert raised.value.errno == errno.EFBIG
    assert str(raised.value).startswith(
        f"{tmp_path}/step_00000002.pt was not written: File too large; it takes "
    )
    assert f"it takes {size / 1e6:,.2f} MB" in str(raised.value)
    assert "MB are free there" in str(raised.value)
    assert str(raised.value).endswith("make room and run the same command again")
    assert names(tmp_path) == ["step_00000001.pt"] and verify_checkpoint(before) is None


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "checkpoints").write_text("a file")
    with pytest.raises(
        OSError, match=r"checkpoints/step_00000001.pt was not written: .*a folder that this process"
    ):
        save(tmp_path / "checkpoints", 1)
