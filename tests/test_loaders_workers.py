"""Worker processes that hang, die, or get signals that are meant for the training process."""

import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from loaders import workers
from loaders.base import ClipTable, WorkerDied
from loaders.config import AudioConfig, LoaderConfig, VideoConfig
from loaders.workers import ClipOutputs, WorkerLoader
from shards.schema import BadClip

ROOT = Path(__file__).parents[1]
HANGS = 7  # videos before the one at which a worker hangs
SMALL = {
    "video": VideoConfig(num_frames=1, short_side=8, crop_size=8),
    "audio": AudioConfig(num_mel_bins=8, frequency_mask_bins=1),
}


class Videos:
    """A maker of bad clips, which cost nothing, until the one at which it hangs."""

    outputs = ClipOutputs(**SMALL)

    def name(self, slots, part, shard, position):
        return f"{position}", "none.tar"

    def make(self, slots, part, shard, position, epoch, row):
        while position == HANGS:
            time.sleep(0.1)
        raise BadClip(f"{position}", "none.tar", "decode-error")


class Loader(WorkerLoader):
    """Finishes batches in a thread beside the step, as on a GPU."""

    def _finishes_ahead(self) -> bool:
        return True


def build(**changes) -> Loader:
    config = LoaderConfig(
        shards="none",
        global_batch_size=1,
        shuffle=False,
        prefetch_batches=2,
        max_bad_fraction=1.0,
        **{"num_workers": 2, **SMALL, **changes},
    )
    table = ClipTable(folder="none", num_slots=1, clips_per_shard=[100], identity={})
    return Loader(config, 0, 1, table, Videos())


def run_into_the_hang() -> None:
    loader = build(num_workers=1)
    batches = iter(loader)
    next(batches)
    loader._workers._hang_seconds = 0.5
    with pytest.raises(WorkerDied):
        while True:
            next(batches)


def test_a_worker_ignores_signals_of_others_and_is_named_when_it_hangs():
    loader = build()
    batches = iter(loader)
    assert [next(batches).keys for _ in range(2)] == [("0",), ("1",)]
    pids = [str(pid) for pid in loader._workers.process_ids]
    for name in (
        "TERM",
        "USR1",
        "INT",
        "HUP",
    ):  # as a batch system does; not from the training process itself
        subprocess.run(["kill", f"-{name}", *pids], check=True)
    assert [next(batches).keys for _ in range(4)] == [("2",), ("3",), ("4",), ("5",)]
    processes = loader._workers._processes
    assert all(process.is_alive() for process in processes)
    loader._workers._hang_seconds = 0.5
    expected = rf"^loader worker 1 \(pid {pids[1]}\) has made no batch for 0.5 s, expected batch 7 of epoch 0; [^\n]*$"
    with pytest.raises(WorkerDied, match=expected):
        while True:
            next(batches)
    assert not any(process.is_alive() for process in processes)


def test_a_worker_that_hangs_shows_where():
    """In a process of its own: workers print where their fork server did when it started."""
    code = "from tests import test_loaders_workers; test_loaders_workers.run_into_the_hang()"
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, timeout=120, check=True)
    assert re.search(r"test_loaders_workers.py\", line \d+ in make", result.stderr)


def test_closing_does_not_wait_for_a_worker_that_hangs(monkeypatch):
    monkeypatch.setattr(workers, "CLOSE_SECONDS", 0.5)
    loader = build()
    batches = iter(loader)
    for _ in range(HANGS):
        next(batches)
    processes = loader._workers._processes
    time.sleep(0.3)  # the thread waits for the batch that does not come
    begin = time.monotonic()
    loader.close()
    assert time.monotonic() - begin < 15
    assert not any(process.is_alive() for process in processes)


def test_a_worker_obeys_the_sigterm_of_its_training_process():
    loader = build(num_workers=1)
    next(iter(loader))
    (process,) = loader._workers._processes
    process.terminate()
    process.join(20)
    assert process.exitcode == 0
    loader.close()
