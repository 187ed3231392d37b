"""Runs of train.py that are killed, or find the disk full, end where one ends that nothing ever happened to."""

import json
import os
import random
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lives import LONGEST_SECONDS, ROOT, Life, Lives, can_mount
from loaders_media import write_shards

from cmac.checkpoint import list_checkpoints, newest_valid_checkpoint, read_state, verify_checkpoint
from cmac.watchdog import descendants

NUM_KILLS = 20
NUM_STEPS = 44
LIVES_WITH_WORKERS = (3, 9, 15)
SMALL_DISK_BYTES = 2 << 20
OWN = {"config", "train_seconds", "commit"}
"""What differs between runs that are the same: the folder's name, how long it took."""
SMALL = (
    "--loader.global-batch-size 4 --loader.video.num-frames 2 --loader.video.short-side 36 --loader.video.crop-size 32 "
    "--model.video.widths 4 8 --model.video.blocks 1 1 --model.video.stem-width 4 --model.audio.widths 4 8 "
    "--model.audio.blocks 1 1 --model.filter-channels 8 --model.embedding-dim 8 --model.queue-length 50 "
    "--cpu-threads 1 --checkpoint-every 1 --log-every 4"
).split()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """With shards of eight videos: two steps an epoch."""
    folder = tmp_path_factory.mktemp("lives")
    write_shards(folder / "shards", [3, 2, 3], sizes=((64, 48),))
    return folder


@pytest.fixture(scope="module")
def lives(folder) -> Iterator[Lives]:
    with Lives(folder, folder / "small" if can_mount() else None, SMALL_DISK_BYTES) as lives:
        yield lives


@pytest.fixture(scope="module")
def command(folder) -> Callable[..., list[str]]:
    def command(run_dir: Path, *more: str, num_workers: int = 0) -> list[str]:
        shards = ["--loader.shards", str(folder / "shards"), "--loader.num-workers", str(num_workers)]
        return ["demo", "--run-dir", str(run_dir), "--max-steps", str(NUM_STEPS), *shards, *SMALL, *more]

    return command


@pytest.fixture(scope="module")
def unbroken(lives, folder, command) -> tuple[dict, list]:
    """Final state and log rows of a run that nothing happens to."""
    lives.run(command(folder / "unbroken"))
    return final_state(folder / "unbroken"), logged(folder / "unbroken")


def final_state(run_dir: Path) -> dict:
    newest = newest_valid_checkpoint(run_dir / "checkpoints", pytest.fail)
    return {name: value for name, value in read_state(newest).items() if name not in OWN}


def logged(run_dir: Path) -> list[tuple[int, float]]:
    rows = [json.loads(line) for line in (run_dir / "log.jsonl").read_text().splitlines()]
    return [(row["step"], row["loss"]) for row in rows]


def assert_identical(one: Any, other: Any, name: str = "state") -> None:
    """Same types, names and lengths all the way down, and tensors that are equal bit by bit."""
    assert type(one) is type(other), name
    if isinstance(one, dict):
        assert one.keys() == other.keys(), name
        for key in one:
            assert_identical(one[key], other[key], f"{name}.{key}")
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other), name
        for index, pair in enumerate(zip(one, other, strict=True)):
            assert_identical(*pair, f"{name}[{index}]")
    elif isinstance(one, torch.Tensor):
        assert (one.dtype, one.shape) == (other.dtype, other.shape), name
        assert torch.equal(*(each.contiguous().flatten().view(torch.uint8) for each in (one, other))), name
    else:
        assert one == other, name


def newest_step(run_dir: Path) -> int:
    checkpoints = list_checkpoints(run_dir / "checkpoints")
    return int(checkpoints[-1].stem.removeprefix("step_")) if checkpoints else 0


def is_writing(run_dir: Path) -> bool:
    """Whether a checkpoint is being written, or was when its process died."""
    return any((run_dir / "checkpoints").glob(".step_*.tmp"))


def wait_until(condition: Callable[[], bool], life: Life) -> None:
    """AssertionError if it takes too long; returns as well when the life has ended."""
    deadline = time.monotonic() + LONGEST_SECONDS
    while not condition():
        assert time.monotonic() < deadline, life.output.read_text()[-3000:]
        if not life.running():
            return
        time.sleep(0.0005)


@pytest.mark.slow
def test_a_run_killed_at_twenty_random_moments_ends_bit_for_bit_where_an_unbroken_one_does(
    lives, folder, command, unbroken
):
    """Weights, key encoders, queues with ids, optimizer, random states, position in the data, log rows."""
    seed = int(os.environ.get("CMAC_KILL_SEED", secrets.randbits(32)))
    print(f"moments of CMAC_KILL_SEED={seed}")
    draw = random.Random(seed)
    run_dir = folder / "killed"
    moments = sorted(draw.uniform(0, NUM_STEPS - 2) for _ in range(NUM_KILLS))
    step_seconds, num_torn, steps = 0.1, 0, []
    for index, moment in enumerate(moments):
        life = lives.start(command(run_dir, num_workers=int(index in LIVES_WITH_WORKERS)))
        if newest_step(run_dir) >= moment:  # while it starts
            time.sleep(draw.uniform(0, 1.0))
        else:
            started = newest_step(run_dir)
            wait_until(lambda before=started: newest_step(run_dir) > before, life)
            begun = time.monotonic()
            wait_until(lambda least=int(moment): newest_step(run_dir) >= least, life)
            if index % 3 == 0:  # in the midst of writing
                wait_until(lambda: is_writing(run_dir), life)
            else:
                time.sleep(draw.uniform(0, step_seconds))
            taken = newest_step(run_dir) - started - 1
            step_seconds = (time.monotonic() - begun) / taken if taken > 0 else step_seconds
        assert life.kill() == -signal.SIGKILL, (
            f"life {index} ended before:\n{life.output.read_text()[-3000:]}"
        )
        life.wait_for_its_workers()
        num_torn += is_writing(run_dir)
        steps.append(newest_step(run_dir))
    print(f"killed after the checkpoints of steps {steps}, {num_torn} of them while writing the next")
    assert num_torn >= 1
    assert steps[-1] > NUM_STEPS // 2
    last = lives.run(command(run_dir))
    last.wait_for_its_workers()
    assert f"at step {steps[-1]}" in last.output.read_text()
    state, rows = unbroken
    assert_identical(final_state(run_dir), state)
    assert logged(run_dir) == rows
    assert not is_writing(run_dir)


def test_a_run_on_a_full_disk_ends_with_what_to_do_and_goes_on_once_there_is_room(
    lives, folder, command, unbroken
):
    if not can_mount():
        pytest.skip("unshare -rm mount -t tmpfs is not allowed here")
    state, rows = unbroken
    run_dir, ballast = folder / "small/run", folder / "small/ballast"
    seen = lives.path(run_dir)
    size = (folder / f"unbroken/checkpoints/step_{NUM_STEPS:08d}.pt").stat().st_size
    room = size * 3 // 2 + (64 << 10)  # a checkpoint, logs and half a checkpoint
    lives.shell(f"head -c {SMALL_DISK_BYTES - room} /dev/zero > {ballast}")

    life = lives.start(command(run_dir))
    assert life.wait() == 1
    life.wait_for_its_workers()
    (line,) = [line for line in life.output.read_text().splitlines() if "train.py:" in line]
    assert f"{run_dir}/checkpoints/step_00000002.pt was not written: No space left on device" in line
    assert f"it takes {size / 1e6:,.2f} MB" in line and "MB are free there" in line
    assert "make room and run the same command again" in line
    assert life.output.read_text().rstrip().endswith(line) and "Traceback" not in life.output.read_text()
    (left,) = (seen / "checkpoints").iterdir()
    assert left.name == "step_00000001.pt" and verify_checkpoint(left) is None

    lives.shell(f"rm {ballast}")
    life = lives.run(command(run_dir))
    assert "at step 1" in life.output.read_text()
    assert_identical(final_state(seen), state)
    assert logged(seen) == rows


@pytest.mark.slow
def test_two_ranks_killed_under_torchrun_end_where_two_that_were_not_do(lives, folder, command, free_port):
    """The real command, killed with all its processes, as a machine that loses power; then the same command."""
    steps = ("--max-steps", "8", "--optimizer.schedule", "constant")
    ranks = []
    for rank in range(2):
        place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
        place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port)}
        ranks.append(lives.start(command(folder / "two-unbroken", *steps), **place))
    for life in ranks:
        assert life.wait() == 0, life.output.read_text()[-3000:]

    run_dir = folder / "two"
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
        "train.py",
    ]
    torchrun += command(run_dir, *steps, num_workers=1)
    started = subprocess.Popen(
        torchrun, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    deadline = time.monotonic() + LONGEST_SECONDS
    while newest_step(run_dir) < 3:
        assert started.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    family = descendants(started.pid)
    assert len(family) >= 2
    for pid in [started.pid, *family]:
        os.kill(pid, signal.SIGKILL)
    assert started.wait() == -signal.SIGKILL
    assert 3 <= newest_step(run_dir) < 8
    again = subprocess.run(
        torchrun, cwd=ROOT, capture_output=True, text=True, timeout=LONGEST_SECONDS, check=False
    )
    assert again.returncode == 0, again.stderr[-3000:]
    assert "going on from" in again.stdout
    assert_identical(final_state(run_dir), final_state(folder / "two-unbroken"))
