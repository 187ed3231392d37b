"""train.py as a user runs it: videos to shards to a checkpoint, one process and two, stopped and resumed."""

import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import torch
from fake_runs import CPU, FakeLoader, config

import cmac
import train
from cmac.checkpoint import list_checkpoints
from cmac.watchdog import descendants
from tools import make_shards, make_world

ROOT = Path(__file__).resolve().parents[1]
SMALL = (
    "--loader.global-batch-size 8 --loader.video.num-frames 4 --loader.video.short-side 36 --loader.video.crop-size 32 "
    "--model.video.widths 8 16 --model.video.blocks 1 1 --model.audio.widths 8 16 --model.audio.blocks 1 1 "
    "--model.filter-channels 16 --model.embedding-dim 8 --model.queue-length 50 --log-every 1 --cpu-threads 1"
).split()


def make_sixteen_videos(folder: Path) -> Path:
    """Shards of sixteen generated videos."""
    world = ["--train-videos", "16", "--test-videos", "2", "--train-seconds", "4", "--workers", "2"]
    assert make_world.main(["--out", str(folder / "world"), *world]) == 0
    out = ["--out", str(folder / "shards"), "--max-clips", "3", "--videos-per-shard", "5", "--workers", "2"]
    assert make_shards.main(["--videos", str(folder / "world/train"), *out, "--preset", "ultrafast"]) == 0
    return folder / "shards"


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    return make_sixteen_videos(tmp_path_factory.mktemp("train"))


def command(shards: Path, run_dir: Path, *more: str, processes: int = 0) -> list[str]:
    start = [sys.executable]
    if processes:
        start = [*start, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    return [
        *start,
        "train.py",
        "demo",
        "--run-dir",
        str(run_dir),
        "--loader.shards",
        str(shards),
        *SMALL,
        *more,
    ]


def run(*arguments: object, **options: object) -> subprocess.CompletedProcess:
    result = subprocess.run(
        command(*arguments, **options), cwd=ROOT, capture_output=True, text=True, timeout=240, check=False
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return result


def rows(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "log.jsonl").read_text().splitlines()]


def test_loss_falls_on_a_few_synthetic_clips(shards, tmp_path):
    result = run(shards, tmp_path / "run", "--max-steps", "60")
    logged = rows(tmp_path / "run")
    full_queue = [row["loss_contrastive"] for row in logged[10:]]
    assert sum(full_queue[-10:]) < 0.95 * sum(full_queue[:10])
    consistency = [row["loss_consistency"] for row in logged]
    assert sum(consistency[-10:]) < sum(consistency[:10])
    assert "video encoder:" in result.stdout and "audio encoder:" in result.stdout
    model, _ = cmac.load_checkpoint(tmp_path / "run")
    assert (model.queue_v.video_ids >= 0).all()


@contextmanager
def started(*arguments: object, ignoring: str = "", **options: object) -> Iterator[subprocess.Popen]:
    """A run; all its processes are gone in the end. ignoring: a signal that the launcher is deaf to."""
    line = command(*arguments, **options)
    if ignoring:
        line = ["sh", "-c", f"trap '' {ignoring}; exec \"$@\"", "sh", *line]
    with subprocess.Popen(
        line,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            yield process
        finally:
            for pid in (*descendants(process.pid), process.pid):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)


def signal_all(process: subprocess.Popen, number: int) -> None:
    """To the launcher, ranks, fork servers and data workers, as Slurm does. torchrun gives ranks sessions of their own,
    so a signal to the group would reach none of them."""
    for pid in (process.pid, *descendants(process.pid)):
        os.kill(pid, number)


def wait_for_step(process: subprocess.Popen, run_dir: Path, step: int) -> None:
    """Until that step is in the log."""
    deadline = time.monotonic() + 200
    log = run_dir / "log.jsonl"
    while not (log.exists() and log.read_text().count("\n") >= step):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, f"step {step} was not reached"
        time.sleep(0.02)


def saved_step(run_dir: Path) -> int:
    return int(list_checkpoints(run_dir / "checkpoints")[-1].stem.removeprefix("step_"))


def assert_same_model(one: Path, other: Path) -> None:
    first, second = (cmac.load_checkpoint(run_dir)[0].state_dict() for run_dir in (one, other))
    for name, value in first.items():
        # Batch-norm statistics are each rank's own, and the checkpoint holds the first rank's.
        assert torch.equal(value, second[name]), name


def test_a_stopped_run_ends_where_an_unbroken_one_does(shards, tmp_path):
    """SIGTERM to all its processes, then the same command again."""
    options = ["--max-steps", "24", "--checkpoint-every", "100"]
    run(shards, tmp_path / "whole", *options)
    with started(shards, tmp_path / "run", *options) as process:
        wait_for_step(process, tmp_path / "run", 3)
        signal_all(process, signal.SIGTERM)
        out, err = process.communicate(timeout=100)
        assert process.returncode == 0, err
    step = saved_step(tmp_path / "run")
    assert 3 <= step < 24 and f"step {step} of 24 is saved; the same command goes on from there" in out
    assert "SIGTERM: the run stops" in out and "Traceback" not in err
    run(shards, tmp_path / "run", *options)
    assert_same_model(tmp_path / "whole", tmp_path / "run")
    losses = [[(row["step"], row["loss"]) for row in rows(tmp_path / name)] for name in ("whole", "run")]
    assert losses[0] == losses[1]


@pytest.mark.parametrize("moment", ["importing", "building"])
def test_a_signal_before_the_first_step_ends_the_start_without_harm(shards, tmp_path, moment):
    with started(shards, tmp_path / "run", "--max-steps", "5000") as process:
        if moment == "importing":
            status = Path(f"/proc/{process.pid}/status")
            while not int(status.read_text().split("SigCgt:")[1].split()[0], 16) >> (signal.SIGTERM - 1) & 1:
                time.sleep(0.01)
        else:
            assert "compute.batch_norm" in process.stdout.readline()
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=100)
        assert process.returncode == 0 and "Traceback" not in err, err
    if moment == "importing":
        assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_two_ranks_train_on_uneven_shards_and_resume_exactly(shards, tmp_path):
    """Sixteen videos in shards of five, five, five and one; stopped once, and at last one rank goes on."""
    options, folder = ("--model.batch-norm", "shuffle", "--optimizer.schedule", "constant"), tmp_path / "run"
    with started(shards, folder, *options, "--max-steps", "2000", processes=2, ignoring="USR1") as process:
        wait_for_step(process, folder, 2)
        signal_all(process, signal.SIGUSR1)
        out, err = process.communicate(timeout=100)
        assert process.returncode == 0, err
    step = saved_step(folder)
    assert step >= 2 and f"SIGUSR1: the run stops\nstep {step} of 2000 is saved" in out
    for name in ("run", "whole"):
        run(shards, tmp_path / name, "--max-steps", str(step + 2), *options, processes=2)
    assert_same_model(tmp_path / "whole", folder)
    assert [row["step"] for row in rows(folder)] == list(range(1, step + 3))
    result = run(shards, folder, "--max-steps", str(step + 4), *options)
    assert f"at step {step + 2}" in result.stdout and "ranks: 2 -> 1" in result.stdout
    assert [row["step"] for row in rows(folder)] == list(range(1, step + 5))


def test_a_rank_that_fails_ends_all(shards, tmp_path):
    """Clips 10 to 14 of 16 do not decode, which both ranks have some of: neither waits for its partner for ever."""
    damaged = tmp_path / "damaged"
    shutil.copytree(shards, damaged)
    for tar in damaged.glob("*-000002.tar"):
        content = bytearray(tar.read_bytes())
        for start in range(0, len(content), 1024):
            content[start + 700 : start + 720] = b"\0" * 20
        tar.write_bytes(content)
    options = ("--max-steps", "60", "--loader.no-shuffle", "--loader.max-bad-fraction", "0")
    result = subprocess.run(
        command(damaged, tmp_path / "run", *options, processes=2),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert result.returncode != 0
    assert re.search(r"[1-5] of 16 clips of all 2 ranks are bad \(.*check_shards", result.stderr)
    # What was trained so far is kept, and nobody's traceback hides the reason.
    assert saved_step(tmp_path / "run") == len(rows(tmp_path / "run")) == 1
    assert 'train.py", line' not in result.stderr


def test_a_list_of_bad_clips_that_cannot_be_written_does_not_hide_the_budget(tmp_path, monkeypatch, capsys):
    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    small = config(tmp_path / "run")
    small = dataclasses.replace(small, loader=dataclasses.replace(small.loader, max_bad_fraction=0.0))
    loader = FakeLoader()
    loader.close = lambda: None
    monkeypatch.setattr("cmac.pretrain.record_bad_clips", full)
    monkeypatch.setattr(train, "_build_loader", lambda *arguments: (small, loader, CPU))
    monkeypatch.setattr(train.StopSignals, "ignore", lambda self: None)  # tests go on in this process
    monkeypatch.setattr(sys, "argv", ["train.py", "demo"])
    with pytest.raises(SystemExit) as caught:
        train.main()
    assert caught.value.code == 1
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1].startswith("train.py: 1 of 16 clips are bad (decode-error 1), expected at most 0.00%")
    assert sum("No space left on device" in line for line in lines) == 1
    assert saved_step(tmp_path / "run") == 3


def test_two_clips_per_video_train_within_modal_positives(shards, tmp_path):
    run(
        shards,
        tmp_path / "run",
        "--max-steps",
        "3",
        "--loss.positives",
        "both",
        "--loader.clips-per-video",
        "2",
    )
    assert len(rows(tmp_path / "run")) == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["demoo"], "did you mean demo?"),
        (["pretrain-k40"], "did you mean pretrain-k400?"),
        ([], "a preset is missing"),
        (["demo", "--loader.shards", "nowhere"], "nowhere"),
        (["demo", "--loader.global-batch-size", "0"], "loader.global_batch_size is 0, expected at least 1"),
        (["demo", "--loader.globl-batch-size", "8"], "--loader.global-batch-size"),
        (["demo", "--model.batch-norm", "syncc"], "sync"),
        (["demo", "--nonfinite", "ignore"], "ignore"),
        (["demo", "--cpu-threads", "-1"], "cpu_threads is -1, expected at least 0"),
    ],
)
def test_mistakes_on_the_command_line_are_explained(arguments, message):
    environment = {**os.environ, "COLUMNS": "200"}
    result = subprocess.run(
        [sys.executable, "train.py", *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode != 0
    assert message in result.stderr + result.stdout
    assert "Traceback" not in result.stderr


def test_a_preset_and_its_overrides_become_the_configuration():
    config = train.parse(["pretrain-k400", "--loader.global-batch-size", "64", "--loss.no-within-negatives"])
    assert config.loader.global_batch_size == 64 and config.loader.video.color_jitter
    assert not config.loss.within_negatives and config.optimizer.learning_rate == 0.01


def test_checking_shards_may_take_longer_than_a_hang(monkeypatch, capsys):
    """The checksums of terabytes are read before the watchdog begins."""

    def build(*arguments: object) -> None:
        raise ValueError(f"watched: {'watchdog' in {thread.name for thread in threading.enumerate()}}")

    monkeypatch.setattr(train, "_build_loader", build)
    monkeypatch.setattr(train.StopSignals, "ignore", lambda self: None)  # tests go on in this process
    monkeypatch.setattr(sys, "argv", ["train.py", "demo"])
    with pytest.raises(SystemExit):
        train.main()
    assert "watched: False" in capsys.readouterr().err


def test_what_nccl_complains_of_is_told(monkeypatch):
    """In its first line it says no more than that something failed."""
    told = []
    monkeypatch.setattr(train.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(train.dist, "get_rank", lambda: 1)
    monkeypatch.setattr(train, "_leave", lambda message, status: told.append((message, status)))
    error = train.dist.DistBackendError(
        "NCCL error in: NCCLUtils.cpp:94, invalid usage\nLast error:\nDuplicate GPU detected : rank 1 and rank 0"
    )
    train._fail(error, (ValueError,))
    ((message, status),) = told
    assert message.startswith("train.py: rank 1: ") and "Duplicate GPU detected" in message and status == 1


def test_a_run_folder_is_trained_in_by_one_process_at_a_time(tmp_path, capsys):
    with train.hold_run(tmp_path / "run"):
        with pytest.raises(ValueError, match=rf"in training by process {os.getpid()} on .*; end that one"):
            with train.hold_run(tmp_path / "run", wait_seconds=0.2):
                pass
        assert "waiting up to 0.2 s for its end" in capsys.readouterr().out
    with train.hold_run(tmp_path / "run", wait_seconds=0):
        pass


def test_a_killed_training_does_not_keep_its_folder(tmp_path):
    """And one that lives does: of a torchrun that was killed alone, the ranks train on."""
    code = "import pathlib, sys, time, train\nwith train.hold_run(pathlib.Path(sys.argv[1])):"
    code += "\n    print('held', flush=True)\n    time.sleep(300)"
    command = [sys.executable, "-c", code, str(tmp_path)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout.readline() == "held\n"
            with pytest.raises(ValueError, match=f"in training by process {process.pid} on "):
                with train.hold_run(tmp_path, wait_seconds=0):
                    pass
        finally:
            process.kill()
        process.wait()
    with train.hold_run(tmp_path, wait_seconds=0):
        pass
