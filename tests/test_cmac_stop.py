"""Runs that are asked to stop, or cannot go on: what is saved, and that all ranks end at the same step."""

import dataclasses
import json
import os
import pty
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from fake_runs import CPU, FakeLoader, config, reports, run_two_ranks

from cmac import agreement
from cmac import pretrain as pretrain_module
from cmac.checkpoint import list_checkpoints, read_checkpoint
from cmac.nonfinite import tensors_not_finite
from cmac.pretrain import Pretraining, pretrain, run, start
from cmac.stop import Stopped, StopSignals
from loaders.batch import ClipBatch

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def hangup() -> Iterator[None]:
    """The tests may run under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> dict[str, torch.Tensor]:
    """What eight steps make of the model."""
    folder = tmp_path_factory.mktemp("whole")
    return pretrain(config(folder, max_steps=8), FakeLoader(), CPU).model.state_dict()


def signal_in_step(training: Pretraining, step: int, number: int) -> None:
    """The process gets a signal while it takes a step (counted from 1)."""
    take = training.train_step

    def train_step(batch: ClipBatch) -> object:
        output = take(batch)
        if training.step == step:
            os.kill(os.getpid(), number)
        return output

    training.train_step = train_step


def checkpoints(run_dir: Path) -> list[int]:
    return [int(path.stem.removeprefix("step_")) for path in list_checkpoints(run_dir / "checkpoints")]


def test_a_signal_in_a_step_saves_that_step_and_the_run_goes_on_as_if_never_stopped(tmp_path, whole, capfd):
    wanted = config(tmp_path, max_steps=8)
    signals = ((signal.SIGTERM, 2), (signal.SIGUSR1, 5), (signal.SIGINT, 6), (signal.SIGHUP, 7))
    for number, step in signals:
        loader = FakeLoader()
        training = start(wanted, loader, CPU)
        signal_in_step(training, step, number)
        with StopSignals() as stop:
            assert run(training, loader, stop) is False
        assert checkpoints(tmp_path)[-1] == step and loader.handed_out[-1] == divmod(step - 1, 5)
        said = capfd.readouterr()
        assert f"{number.name}: the run stops after this step" in said.err
        assert f"step {step} of 8 is saved; the same command goes on from there" in said.out
    resumed = pretrain(wanted, FakeLoader(), CPU)
    for name, value in whole.items():
        assert torch.equal(resumed.model.state_dict()[name], value), name


def test_further_signals_while_saving_do_not_break_it_off(tmp_path, monkeypatch):
    save = pretrain_module.save_checkpoint

    def interrupted(*arguments: object) -> Path:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGTERM):
            os.kill(os.getpid(), number)
        return save(*arguments)

    monkeypatch.setattr(pretrain_module, "save_checkpoint", interrupted)
    loader = FakeLoader()
    training = start(config(tmp_path), loader, CPU)
    signal_in_step(training, 2, signal.SIGUSR1)
    with StopSignals() as stop:
        assert run(training, loader, stop) is False
    assert checkpoints(tmp_path) == [2]


def test_a_signal_while_data_stalls_ends_the_run_at_once(tmp_path):
    def stall(epoch: int, step: int) -> None:
        if (epoch, step) == (0, 3):
            threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGTERM)).start()
            time.sleep(300)

    loader = FakeLoader(before=stall)
    training = start(config(tmp_path), loader, CPU)
    with StopSignals() as stop:
        assert run(training, loader, stop) is False
    assert checkpoints(tmp_path) == [3] and stop.received == signal.SIGTERM


def test_a_batch_that_was_fetched_and_not_trained_on_counts_once(tmp_path):
    """With its bad clip: it comes again when the run goes on. Of several ranks those that have theirs wait so."""

    class Stopping(FakeLoader):
        def _batch(self, step: int) -> ClipBatch:
            batch = super()._batch(step)
            if batch.bad:
                os.kill(os.getpid(), signal.SIGTERM)
            return batch

    loader = Stopping()
    training = start(config(tmp_path, max_steps=4), loader, CPU)
    with StopSignals() as stop:
        assert run(training, loader, stop) is False
    assert checkpoints(tmp_path) == [3] and loader.bad_clips.total() == 1
    assert pretrain(config(tmp_path, max_steps=4), FakeLoader(), CPU).bad_clips == {"decode-error": 1}


def test_a_signal_before_the_first_step_leaves_no_checkpoint(tmp_path):
    loader = FakeLoader()
    training = start(config(tmp_path), loader, CPU)
    with StopSignals() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        assert run(training, loader, stop) is False
        with pytest.raises(Stopped), stop.interruptible():
            pytest.fail("what may be given up is not even begun")
    assert checkpoints(tmp_path) == [] and loader.handed_out == []


def test_handlers_are_put_back():
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
    with StopSignals():
        assert all(signal.getsignal(number) != handler for number, handler in before.items())
    assert {number: signal.getsignal(number) for number in before} == before


def test_a_hangup_that_nohup_ignores_stays_ignored():
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with StopSignals() as stop:
        os.kill(os.getpid(), signal.SIGHUP)
        with stop.interruptible():
            os.kill(os.getpid(), signal.SIGHUP)
    assert stop.received is None and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN


def test_a_run_whose_terminal_is_gone_can_still_print_and_ends_with_status_0(tmp_path):
    program = f"""
import pathlib, sys, time
from cmac.stop import StopSignals
with StopSignals() as stop:
    pathlib.Path({str(tmp_path / "ready")!r}).touch()
    while stop.received is None:
        time.sleep(0.01)
    print("saved", flush=True)
    print("saved", file=sys.stderr, flush=True)
"""
    process, terminal = pty.fork()
    if process == 0:
        os.execve(sys.executable, [sys.executable, "-c", program], {**os.environ, "PYTHONPATH": str(ROOT)})
    deadline = time.monotonic() + 60
    while not (tmp_path / "ready").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 0


def test_machines_that_do_not_reach_each_other_are_told_the_way_out(monkeypatch):
    def refused(**options: object) -> None:
        raise RuntimeError(
            "[gloo/transport/tcp/pair.cc:446] Connection refused, remote=[127.0.1.1]:3217\nmore"
        )

    monkeypatch.setattr(agreement, "num_ranks", lambda: 2)
    monkeypatch.setattr(dist, "new_group", refused)
    with pytest.raises(
        ValueError, match=r"refused, remote=\[127.0.1.1\]:3217\); unless .* GLOO_SOCKET_IFNAME"
    ):
        agreement.Agreement(60.0)


# Two ranks. What happens to the second one is listed by scenario: changes of the configuration, and of its run.
SCENARIOS = {
    "signal": {"max_steps": 10},
    "loader": {"max_steps": 10},
    "stop": {"max_steps": 10, "log_every": 4},
    "skip": {"max_steps": 9, "nonfinite": "skip", "log_every": 4},
    "torn": {"max_steps": 9},
}


def _scenario(name: str, rank: int, folder: Path) -> dict:
    wanted = config(folder, loader=dataclasses.replace(config(folder).loader, global_batch_size=8))
    wanted = dataclasses.replace(wanted, **SCENARIOS[name])
    report: dict = {}

    def fail(epoch: int, step: int) -> None:
        if name == "loader" and rank == 1 and (epoch, step) == (1, 2):
            raise OSError("the disk is gone")

    bad = rank == 1 and name in ("stop", "skip")
    loader = FakeLoader(nan_at=[(1, 1)] if bad else (), before=fail, rank=rank)
    if name == "torn" and rank == 0:
        # The run of "signal" once more; its newest checkpoint lost its end.
        newest = list_checkpoints(folder / "checkpoints")[-1]
        newest.write_bytes(newest.read_bytes()[:-1000])
    dist.barrier()
    training = start(wanted, loader, CPU)
    report["began"] = training.step
    if name == "signal" and rank == 1:
        signal_in_step(training, 6, signal.SIGUSR1)
    with StopSignals() as stop:
        try:
            report["finished"] = run(training, loader, stop)
        except Exception as error:
            report["error"] = f"{type(error).__name__}: {error}"
    report |= {"step": training.step, "skipped": training.skipped_steps}
    report["not_finite"] = tensors_not_finite(training.model.state_dict())
    report["handed_out"] = len(loader.handed_out)
    return report


def _rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    for name in SCENARIOS:
        run_dir = Path(folder, "signal" if name == "torn" else name)
        report = _scenario(name, rank, run_dir)
        Path(folder, f"{name}_{rank}.json").write_text(json.dumps(report))
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory) -> Path:
    """Folder where two ranks have run all scenarios, one after the other."""
    return run_two_ranks(_rank, tmp_path_factory.mktemp("ranks"))


def test_a_signal_to_one_rank_stops_all_at_the_same_step(two_ranks):
    for report in reports(two_ranks, "signal"):
        assert (report["finished"], report["step"]) == (False, 6), report
    assert 6 in checkpoints(two_ranks / "signal")


def test_when_the_loader_of_one_rank_fails_all_save_what_they_have(two_ranks):
    first, second = reports(two_ranks, "loader")
    assert first["error"] == "PeerFailed: ends with rank 1: the disk is gone"
    assert second["error"] == "OSError: the disk is gone"
    assert first["step"] == second["step"] == 7 and checkpoints(two_ranks / "loader") == [4, 7]
    assert first["handed_out"] == 8 and second["handed_out"] == 7, "rank 0 had its batch, which comes again"
    saved = read_checkpoint(list_checkpoints(two_ranks / "loader/checkpoints")[-1])
    assert saved["loader"] == {"epoch": 1, "next": 2}


def test_the_step_and_the_clip_of_a_loss_that_is_not_finite_are_found(two_ranks):
    """Keys are computed on other ranks than their clips, so in the same step the losses of both are NaN."""
    for rank, report in enumerate(reports(two_ranks, "stop")):
        assert "the loss is nan at step 7 on ranks 0, 1" in report["error"]
        assert "the input of a is not finite; lower optimizer.learning_rate" in report["error"]
        saved = json.loads((two_ranks / f"stop/nonfinite/step_00000007_rank{rank}.json").read_text())
        assert saved["keys"] == ["a", "b", "c", "d"]
        assert saved["input_is_finite"] == [rank == 0, True, True, True]
    assert checkpoints(two_ranks / "stop") == [4]


def test_a_step_that_one_rank_cannot_take_is_left_out_by_all(two_ranks):
    for report in reports(two_ranks, "skip"):
        assert (report["finished"], report["step"], report["skipped"]) == (True, 9, 1), report
        assert report["not_finite"] == []
    assert sorted(path.name for path in (two_ranks / "skip/nonfinite").iterdir()) == [
        "step_00000007_rank0.json",
        "step_00000007_rank1.json",
    ]


def test_all_ranks_go_on_from_the_checkpoint_that_the_first_one_found_whole(two_ranks):
    for report in reports(two_ranks, "torn"):
        assert (report["began"], report["step"], report["finished"]) == (4, 9, True), report
