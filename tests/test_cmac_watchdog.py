"""A training that hangs ends by itself and leaves the stacks of all its threads behind."""

import os
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing
from fake_runs import CPU, FakeLoader, config

from cmac.pretrain import run, start
from cmac.watchdog import Watchdog

ROOT = Path(__file__).resolve().parents[1]
HANG_SECONDS = 1.0
RANKS_HANG_SECONDS = 6.0
"""Where steps are taken, with a log row and TensorBoard: a busy machine has been seen to take seconds for one."""


def hang(folder: Path, body: str) -> subprocess.CompletedProcess:
    """A process whose watchdog allows a second without a step, after a first one."""
    code = """
    import ctypes, os, subprocess, sys, threading, time
    from pathlib import Path
    from cmac import watchdog as module
    from cmac.watchdog import Watchdog
    module._GRACE_SECONDS = 0.1

    def waits_for_ever(): time.sleep(300)

    with Watchdog(Path(sys.argv[1]), 3, float(sys.argv[2])) as watchdog:
        watchdog.step_done(41)
    """
    code = textwrap.dedent(code) + textwrap.indent(textwrap.dedent(body), "    ")
    command = [sys.executable, "-c", code, str(folder), str(HANG_SECONDS)]
    with (
        tempfile.TemporaryFile("w+") as out,
        tempfile.TemporaryFile("w+") as err,
    ):  # pipes outlive it in its children
        done = subprocess.run(command, cwd=ROOT, stdout=out, stderr=err, timeout=100, check=False)
        out.seek(0), err.seek(0)
        done.stdout, done.stderr = out.read(), err.read()
    return done


def test_a_process_that_hangs_writes_what_it_did_and_ends_with_status_1(tmp_path):
    """A worker that catches SIGUSR2 tells its stacks too; one that does not is only described, not killed."""
    done = hang(
        tmp_path / "stacks",
        """
        worker = "import faulthandler, signal, time; faulthandler.register(signal.SIGUSR2); print(); "
        worker += "\\ndef decodes(): time.sleep(300)\\ndecodes()"
        started = subprocess.Popen([sys.executable, "-uc", worker], stdout=subprocess.PIPE)
        started.stdout.readline()
        other = subprocess.Popen(["sleep", "300"])
        threading.Thread(target=waits_for_ever, daemon=True).start()
        print(started.pid, other.pid, flush=True)
        with watchdog.doing("waiting for data"):
            time.sleep(300)
        """,
    )
    assert done.returncode == 1
    assert "rank 3: no step for " in done.stderr and "after step 41 (waiting for data)" in done.stderr
    assert "in decodes" in done.stderr, "the worker's own stack"
    written = (tmp_path / "stacks/rank_003.txt").read_text()
    assert "after step 41 (waiting for data)" in written
    assert "in waits_for_ever" in written and 'File "<string>", line ' in written
    worker, other = done.stdout.split()
    lines = {line.split(":")[0].strip(): line for line in written.splitlines() if line.startswith("  pid ")}
    assert "asked for its stacks" in lines[f"pid {worker}"] and "faulthandler" in lines[f"pid {worker}"]
    assert "asked" not in lines[f"pid {other}"]
    for process in (worker, other):
        os.kill(int(process), signal.SIGKILL)  # raises if it had been ended


def test_a_hang_that_keeps_the_interpreters_lock_ends_as_well(tmp_path):
    done = hang(tmp_path, "time.sleep(0.6); ctypes.PyDLL(None).sleep(300)")
    assert done.returncode == 1
    assert "Timeout (0:00:02)" in done.stderr and 'File "<string>"' in done.stderr


def test_a_folder_that_cannot_be_written_does_not_keep_the_stacks_back(tmp_path):
    (tmp_path / "stacks").write_text("a file")
    done = hang(tmp_path / "stacks", "waits_for_ever()")
    assert done.returncode == 1
    assert "cannot be written" in done.stderr and "in waits_for_ever" in done.stderr


def test_whatever_fails_while_stacks_are_written_the_process_ends(tmp_path):
    done = hang(tmp_path, "module.descendants = lambda parent: 1 / 0; waits_for_ever()")
    assert done.returncode == 1 and "cannot be written (division by zero)" in done.stderr


def test_steps_in_time_a_long_start_and_no_limit_let_a_run_live(tmp_path):
    done = hang(
        tmp_path,
        """
        for step in range(6):
            time.sleep(0.4)
            watchdog.step_done(step)
        with Watchdog(Path(sys.argv[1]), 3, 0.1), Watchdog(Path(sys.argv[1]), 4, 0) as unlimited:
            unlimited.step_done(1)
            for step in range(3):
                time.sleep(0.4)
                watchdog.step_done(step)
        print("lives")
        """,
    )
    assert (done.returncode, done.stdout) == (0, "lives\n"), done.stderr
    assert not list(tmp_path.iterdir())


def _rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)

    def stall(epoch: int, step: int) -> None:
        if rank == 1 and step == 3:
            time.sleep(300)

    wanted = config(Path(folder) / "run", hang_seconds=RANKS_HANG_SECONDS)
    loader = FakeLoader(before=stall, rank=rank)
    training = start(wanted, loader, CPU)
    with Watchdog(Path(wanted.run_dir) / "stacks", rank, wanted.hang_seconds) as watchdog:
        run(training, loader, watchdog=watchdog)


def test_when_one_of_two_ranks_stalls_both_write_their_stacks_and_end(tmp_path):
    ranks = torch.multiprocessing.spawn(_rank, (str(tmp_path),), nprocs=2, join=False)
    for process in ranks.processes:
        process.join(100)
    assert [process.exitcode for process in ranks.processes] == [1, 1]
    first, second = ((tmp_path / f"run/stacks/rank_00{rank}.txt").read_text() for rank in (0, 1))
    assert "after step 3 (waiting for the other ranks)" in first and "in outlook" in first
    assert "after step 3 (waiting for data)" in second and "in stall" in second
