"""Where rows go: whole rows on a disk that is full at times, a bar on a terminal, and Weights & Biases that fails."""

import importlib.machinery
import importlib.util
import io
import json
import logging
import os
import pty
import re
import resource
import struct
import sys
import threading
import time
import types
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from fake_runs import CPU, FakeLoader, config
from fake_runs import rows as rows_of
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from cmac.pretrain import pretrain
from cmac.run_log import RunLog, keep_rows_up_to, scalars
from cmac.wandb_log import WandbLog, check_wandb


def row(step: int, **changes: Any) -> dict[str, Any]:
    figures = {
        "step": step,
        "epoch": 3,
        "loss": 6.5,
        "loss_contrastive": 5.0,
        "loss_consistency": 1.0,
        "skipped_steps": 0,
        "clips_per_second": 123.4,
        "data_wait_fraction": 0.25,
        "bad_clips": 2,
        "bad_clips_by_reason": {"checksum": 2},
        "gradient_norm": None,
        "eta_seconds": 93_784.0,
    }
    return {**figures, **changes}


def steps(run_dir: Path) -> list[int]:
    return [line["step"] for line in rows_of(run_dir)]


def drawn(run_dir: Path) -> EventAccumulator:
    events = EventAccumulator(str(run_dir / "tb"))
    events.Reload()
    return events


# Files


def test_rows_are_lines_of_json_and_scalars_in_groups(tmp_path):
    log = RunLog(tmp_path, 100, 0)
    log.write(row(10))
    log.write(row(20, loss=None, gradient_norm=2.0))
    log.close()
    assert rows_of(tmp_path) == [row(10), row(20, loss=None, gradient_norm=2.0)]
    events = drawn(tmp_path)
    assert [event.step for event in events.Scalars("losses/loss")] == [10]
    assert [event.step for event in events.Scalars("gradients/gradient_norm")] == [20]
    assert events.Scalars("data/bad_clips_by_reason/checksum")[0].value == 2
    assert set(events.Tags()["scalars"]) == scalars(row(10, gradient_norm=2.0)).keys()


def test_a_run_that_goes_on_drops_rows_beyond_its_step_in_both_places(tmp_path):
    for start, written in ((0, (10, 20, 30)), (20, (30, 40))):
        log = RunLog(tmp_path, 100, start)
        for step in written:
            log.write(row(step, loss=float(start)))
        log.close()
    assert [(line["step"], line["loss"]) for line in rows_of(tmp_path)] == [
        (10, 0),
        (20, 0),
        (30, 20),
        (40, 20),
    ]
    assert [(e.step, e.value) for e in drawn(tmp_path).Scalars("losses/loss")] == [
        (10, 0),
        (20, 0),
        (30, 20),
        (40, 20),
    ]


@pytest.mark.parametrize(
    "torn", [b'{"step": 3, "lo', b"\0" * 40, b"\xff\xfe\n", b"[3]\n", b'{"loss": 1}\n', b"\n\n"]
)
def test_what_is_no_row_is_dropped(tmp_path, torn):
    path = tmp_path / "log.jsonl"
    path.write_bytes(b'{"step": 1}\n{"step": 2}\n' + torn)
    keep_rows_up_to(path, 5)
    assert path.read_bytes() == b'{"step": 1}\n{"step": 2}\n'


def test_a_file_of_which_nothing_is_to_be_dropped_is_left_alone(tmp_path):
    """Where the disk is full a run can still go on."""
    path = tmp_path / "log.jsonl"
    path.write_bytes(b'{"step": 1}\n{"step": 2}\n')
    before = path.stat()
    keep_rows_up_to(path, 2)
    assert (path.stat().st_ino, path.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    keep_rows_up_to(tmp_path / "absent.jsonl", 2)
    assert not (tmp_path / "absent.jsonl").exists()


@contextmanager
def files_no_longer_than(size: int) -> Iterator[None]:
    """The kernel writes what fits and then refuses, as on a full disk (with EFBIG in place of ENOSPC)."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_rows_that_do_not_fit_on_the_disk_are_lost_whole_and_the_run_goes_on(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(threading, "excepthook", lambda args: None)  # of TensorBoard's thread
    log = RunLog(tmp_path, 100, 0)
    log.write(row(1))
    size = log.path.stat().st_size
    with files_no_longer_than(size + size // 2):
        for step in range(2, 5):
            log.write(row(step))
    assert steps(tmp_path) == [1]
    told = capsys.readouterr().err
    assert (
        told.count("File too large") == 2 and told.count("the run goes on") == 2
    )  # log.jsonl and TensorBoard
    for step in range(5, 14):
        log.write(row(step))
    log.close()
    assert steps(tmp_path) == [1, *range(5, 14)]
    told = capsys.readouterr().err
    assert f"{log.path} works again; 3 rows are missing in it" in told and told.count("works again") == 2
    seen = [event.step for event in drawn(tmp_path).Scalars("losses/loss")]
    assert seen[0] == 1 and seen[-1] == 13


def test_a_disk_that_stays_full_ends_no_run_and_tells_what_is_missing(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(threading, "excepthook", lambda args: None)
    log = RunLog(tmp_path, 100, 0)
    with files_no_longer_than(10):
        for step in range(1, 40):
            log.write(row(step))
        log.close()
    told = capsys.readouterr().err
    assert told.count("rows are lost until writing works again") == 2
    assert told.count("ends; 39 rows are missing in it") == 2
    assert steps(tmp_path) == []


def test_standard_output_that_is_closed_ends_no_run(tmp_path, capsys, monkeypatch):
    reading, writing = os.pipe()
    os.close(reading)
    with open(writing, "w") as closed, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", closed)
        log = RunLog(tmp_path, 100, 0)
        for step in (1, 2):
            log.write(row(step))
        log.close()
        os.dup2(os.open(os.devnull, os.O_WRONLY), writing)  # what is buffered has to go somewhere
    told = capsys.readouterr().err
    assert "standard output: [Errno 32] Broken pipe" in told and "2 rows are missing" in told
    assert steps(tmp_path) == [1, 2]


# Terminal


class Terminal:
    """A pseudo-terminal, as standard error or both; `text()` is what came out of it."""

    def __init__(self) -> None:
        self._leader, follower = pty.openpty()
        self.file = open(follower, "w", buffering=1)
        self._chunks: list[bytes] = []
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        while True:
            try:
                self._chunks.append(os.read(self._leader, 65536))
            except OSError:  # the other end is closed
                return

    def text(self) -> str:
        self.file.close()
        self._reader.join()
        os.close(self._leader)
        return b"".join(self._chunks).decode()


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    for name, value in (("TERM", "xterm-256color"), ("COLUMNS", "120"), ("LINES", "40")):
        monkeypatch.setenv(name, value)
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_INTERACTIVE", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)
    return Terminal()


def without_control(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)


def test_a_terminal_shows_a_bar_with_epoch_figures_and_time_left_and_prints_do_not_tear_it(
    tmp_path, terminal, monkeypatch
):
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", terminal.file)
        patch.setattr(sys, "stderr", terminal.file)
        log = RunLog(tmp_path, 100, 40)
        for step in (41, 42, 43):
            log.advance(step)
        log.write(row(43))
        print("a line of another module")
        print("a warning", file=sys.stderr)
        log.write(row(44, skipped_steps=2))
        log.close()
        assert sys.stdout is terminal.file and sys.stderr is terminal.file
    text = without_control(terminal.text())
    lines = [line.rstrip() for line in re.split(r"[\r\n]+", text)]
    assert "a line of another module" in lines and "a warning" in lines
    bar = next(line for line in reversed(lines) if line.startswith("pretraining"))
    assert "44/100" in bar and "epoch 3" in bar and re.search(r"(\d+:\d\d:\d\d|-:--:--) left$", bar), bar
    figures = next(line for line in reversed(lines) if line.startswith("loss 6.500"))
    expected = "loss 6.500 (contrastive 5.000, consistency 1.0000), 123.4 clips/s, waiting for data 25%, bad clips 2, "
    assert figures == expected + "skipped steps 2"
    assert not any(line.startswith("step ") for line in lines)


def test_lines_go_to_a_file_also_where_the_bar_is_on_a_terminal(tmp_path, terminal, monkeypatch):
    output = io.StringIO()
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", output)
        patch.setattr(sys, "stderr", terminal.file)
        log = RunLog(tmp_path, 100, 0)
        print("a line of another module")
        log.write(row(10))
        log.close()
    assert "10/100" in without_control(terminal.text())
    assert output.getvalue().splitlines() == [
        "a line of another module",
        "step 10/100, epoch 3: loss 6.500 (contrastive 5.000, consistency 1.0000), 123.4 clips/s, "
        "waiting for data 25%, bad clips 2, 1 day, 2:03:04 left",
    ]


def test_a_terminal_without_control_codes_gets_lines(tmp_path, terminal, monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", terminal.file)
        patch.setattr(sys, "stderr", terminal.file)
        log = RunLog(tmp_path, 100, 0)
        log.write(row(10))
        log.close()
    text = terminal.text()
    assert text.startswith("step 10/100") and "\x1b" not in text


def test_what_the_loggers_of_train_py_say_does_not_tear_the_bar(tmp_path, terminal, monkeypatch):
    import train

    logger = logging.getLogger("cmac")
    before = list(logger.handlers), logger.level, logger.propagate
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", terminal.file)
        patch.setattr(sys, "stderr", terminal.file)
        train._show_log(0)
        try:
            log = RunLog(tmp_path, 100, 0)
            log.write(row(10))
            logging.getLogger("cmac.step").info("told by a logger")
            log.close()
        finally:
            for name in ("cmac", "loaders.kernels"):
                for handler in logging.getLogger(name).handlers[:]:
                    if handler not in before[0]:
                        logging.getLogger(name).removeHandler(handler)
            logger.setLevel(before[1])
            logger.propagate = before[2]
    lines = [line.rstrip() for line in re.split(r"[\r\n]+", without_control(terminal.text()))]
    assert "told by a logger" in lines


# Weights & Biases


class FakeRun:
    """Of Weights & Biases; fails in the call that is named."""

    def __init__(self, fails: str) -> None:
        self._fails = fails
        self.starting_step = 0
        self.defined: dict[str, str | None] = {}
        self.logged: list[tuple[int, dict]] = []
        self.numbers: list[int] = []
        self.finished = False

    def init(self, **options: Any) -> "FakeRun":
        self.options = options
        self._maybe("init")
        return self

    def define_metric(self, name: str, step_metric: str | None = None) -> None:
        self._maybe("define_metric")
        self.defined[name] = step_metric

    def log(self, values: dict, step: int, commit: bool) -> None:
        self._maybe("log")
        assert commit
        values = dict(values)
        self.logged.append((values.pop("step"), values))
        self.numbers.append(step)

    def finish(self) -> None:
        self.finished = True
        self._maybe("finish")

    def _maybe(self, call: str) -> None:
        if call == self._fails:
            raise ConnectionError(f"no network in {call}")


def fake_wandb(monkeypatch: pytest.MonkeyPatch, fails: str) -> FakeRun:
    run = FakeRun(fails)
    module = types.ModuleType("wandb")
    module.__spec__ = importlib.machinery.ModuleSpec("wandb", None, origin="fake")
    module.init, module.setup, module.Settings = run.init, lambda settings: None, lambda **options: options
    monkeypatch.setitem(sys.modules, "wandb", module)
    return run


@pytest.mark.parametrize("fails", ["init", "define_metric", "log", "finish", "nothing"])
def test_weights_and_biases_that_fails_is_told_once(tmp_path, monkeypatch, capsys, fails):
    fake = fake_wandb(monkeypatch, fails)
    log = RunLog(tmp_path, 100, 0, wandb_project="cmac")
    for step in (10, 20, 30):
        log.write(row(step))
    log.close()
    told = capsys.readouterr().err
    assert told.count("WARNING: Weights & Biases") == (fails != "nothing")
    assert (f"ConnectionError: no network in {fails}; the run goes on without it" in told) == (
        fails != "nothing"
    )
    assert steps(tmp_path) == [10, 20, 30]
    sends = fails in ("finish", "nothing")
    assert fake.logged == ([(step, scalars(row(step))) for step in (10, 20, 30)] if sends else [])
    assert fake.finished == sends


def test_a_training_sends_its_rows_and_goes_on_where_that_fails(tmp_path, monkeypatch, capsys):
    fake = fake_wandb(monkeypatch, "finish")
    run = config(tmp_path / "run", wandb_project="cmac", max_steps=4)
    assert pretrain(run, FakeLoader(), CPU).step == 4
    assert "no network in finish; the run goes on without it" in capsys.readouterr().err
    assert [(step, values["losses/loss"]) for step, values in fake.logged] == [
        (line["step"], line["loss"]) for line in rows_of(tmp_path / "run")
    ]
    assert fake.options["project"] == "cmac" and fake.options["config"]["seed"] == 0


def test_a_run_that_goes_on_is_the_same_one_there(tmp_path, monkeypatch):
    fake = fake_wandb(monkeypatch, "nothing")
    ids = []
    for _ in range(2):
        WandbLog("cmac", tmp_path, {}).close()
        ids.append((fake.options["id"], fake.options["resume"]))
    assert ids[0] == ids[1] and ids[0][1] == "allow"
    (tmp_path / "other").mkdir()
    WandbLog("cmac", tmp_path / "other", {})
    assert fake.options["id"] != ids[0][0]


def test_rows_of_steps_that_are_taken_again_are_sent_again(tmp_path, monkeypatch):
    """W&B drops a row whose number is not above those before; after a resume those are the server's."""
    fake = fake_wandb(monkeypatch, "nothing")
    for start, steps_logged in ((0, (10, 20, 30)), (12, (20, 30, 40)), (40, (50,))):
        log = RunLog(tmp_path, 100, start, wandb_project="cmac")
        for step in steps_logged:
            log.write(row(step))
        log.close()
        fake.starting_step = fake.numbers[-1] + 1
    assert [step for step, _ in fake.logged] == [10, 20, 30, 20, 30, 40, 50]
    assert fake.numbers == [10, 20, 30, 31, 32, 40, 50]  # their own while it can be
    assert fake.defined == {"step": None, "*": "step"}


@pytest.mark.parametrize("found", [None, importlib.machinery.ModuleSpec("wandb", None)])
def test_a_project_without_the_package_is_refused_before_anything_is_built(tmp_path, monkeypatch, found):
    """A folder named wandb, which the package makes where it is run, is not the package."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: found)
    with pytest.raises(ValueError, match=r"wandb_project is 'cmac'.*pip install cmac\[wandb\]"):
        pretrain(config(tmp_path / "run", wandb_project="cmac"), FakeLoader(), CPU)
    assert not (tmp_path / "run").exists()
    check_wandb("")


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[types.ModuleType]:
    wandb = pytest.importorskip("wandb")
    for name in list(os.environ):
        if name.startswith("WANDB_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("WANDB_MODE", "offline")
    for name in ("WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "elsewhere"))
    hook = sys.excepthook
    yield wandb
    wandb.teardown()
    sys.excepthook = hook


def test_the_real_package_writes_rows_below_the_run_folder_when_it_is_offline(tmp_path, offline, capsys):
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    for start, step in ((0, 10), (10, 20)):
        log = RunLog(run_dir, 20, start, wandb_project="cmac", config={"optimizer": {"learning_rate": 0.125}})
        assert log._wandb._run is not None
        log.write(row(step, loss=step + 0.03125))
        log.close()
    assert "WARNING" not in capsys.readouterr().err
    run_id = (run_dir / "wandb_id").read_text().strip()
    expected = [b"losses/loss", b"10.03125", b"20.03125", b"learning_rate", b"0.125"]
    deadline = (
        time.monotonic() + 30
    )  # a process of its own writes, and goes on for a moment after the run's end
    missing = expected
    while missing and time.monotonic() < deadline:
        time.sleep(0.05)
        files = list(run_dir.glob(f"wandb/offline-run-*-{run_id}*/run-{run_id}.wandb"))
        content = b"".join(path.read_bytes() for path in files)
        missing = [part for part in expected if part not in content]
    assert not missing and len(files) == 2
    assert not list(tmp_path.glob("wandb"))


def history(path: Path) -> list[dict[str, float]]:
    """Rows of a file of Weights & Biases: records of protobuf in the format of LevelDB's log, behind 7 bytes."""
    record_type = pytest.importorskip("wandb.proto.wandb_internal_pb2").Record
    data, position, record, rows = path.read_bytes(), 7, b"", []
    while position + 7 <= len(data):
        if 32768 - position % 32768 < 7:  # the rest of a block
            position += 32768 - position % 32768
            continue
        _, length, kind = struct.unpack_from("<IHB", data, position)
        record += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # whole, or the last part
            items = record_type.FromString(record).history.item
            if items:
                rows.append({".".join(i.nested_key) or i.key: json.loads(i.value_json) for i in items})
            record = b""
    return rows


def test_the_real_package_keeps_rows_of_steps_that_are_taken_again(tmp_path, offline):
    log = WandbLog("cmac", tmp_path, {})
    given = [(1000, 1.5), (1990, 2.5), (1010, 3.5), (1020, 4.5), (2000, 5.5)]
    for step, loss in given:
        log.write({"losses/loss": loss}, step)
    log.close()
    deadline, rows = time.monotonic() + 30, []
    while len(rows) < len(given) and time.monotonic() < deadline:
        time.sleep(0.05)
        rows = [found for path in tmp_path.glob("wandb/offline-run-*/*.wandb") for found in history(path)]
    assert [(found["step"], found["losses/loss"]) for found in rows] == given
    assert [found["_step"] for found in rows] == [1000, 1990, 1991, 1992, 2000]
