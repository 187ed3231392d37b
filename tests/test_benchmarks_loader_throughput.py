"""The loader benchmark: accounting, content check, ratios, and one small run."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from loaders_media import write_shards

from benchmarks.contenders import CONTENDERS, Contender, scaling_contenders
from benchmarks.contenders.base import AUDIO, Batch, Workload, counted_in_processes
from benchmarks.contenders.content import compare, original_clip, squared_error, write_reference
from benchmarks.contenders.host import ContenderFailed, HostedContender
from benchmarks.loader_memory import trend
from benchmarks.loader_throughput import Entry, Turn, claims, main, missing_library, parse, round_ratios
from benchmarks.process_tree import descendants, machine_cpu_seconds, pinned_to, tree_memory, tree_usage
from tools.make_synthetic_videos import make_flash_beep_video

ROOT = Path(__file__).resolve().parents[1]

# A child that has a child; both compute for a given time of CPU, say so, and wait.
BUSY_TREE = """
import os, subprocess, sys, time
seconds, depth = float(sys.argv[1]), int(sys.argv[2])
child = None
if depth:
    child = subprocess.Popen([sys.executable, "-c", sys.argv[3], sys.argv[1], str(depth - 1), sys.argv[3]],
                             stdout=subprocess.PIPE)
memory = bytearray(30_000_000)
while time.process_time() < seconds:
    pass
if child:
    child.stdout.readline()
print("done", flush=True)
time.sleep(60)
"""


def make_turn(rate: float, cpu_ms: float, seconds: float = 2.0) -> Turn:
    clips = round(rate * seconds)
    return Turn(
        num_clips=clips,
        num_bad=0,
        num_batches=4,
        seconds=seconds,
        cpu_seconds=clips * cpu_ms / 1000,
        read_bytes=0,
        wait_seconds=0.0,
        foreign_cpu_seconds=0.0,
        stolen_cpu_seconds=0.0,
        memory_bytes=1,
    )


def make_entry(name: str, turns: list[Turn | None]) -> Entry:
    everyone = {contender.name: contender for contender in (*CONTENDERS, *scaling_contenders(2))}
    return Entry(contender=everyone[name], workload=Workload(), turns=turns)


# Accounting


def test_the_tree_counts_cpu_time_of_grandchildren() -> None:
    child = subprocess.Popen(
        [sys.executable, "-c", BUSY_TREE, "0.4", "1", BUSY_TREE], stdout=subprocess.PIPE, text=True
    )
    try:
        assert child.stdout.readline() == "done\n"
        tree = descendants(child.pid)
        assert tree[0] == child.pid and len(tree) == 2
        assert 0.78 <= tree_usage(child.pid).cpu_seconds < 2.0
        assert 60e6 < tree_memory(child.pid) < 200e6
    finally:
        for pid in reversed(tree):
            os.kill(pid, signal.SIGKILL)
        child.wait()
    assert descendants(child.pid) == []


def test_cpu_time_of_ended_children_stays_in_the_tree() -> None:
    before = tree_usage(os.getpid()).cpu_seconds
    code = "import time\nwhile time.process_time() < 0.3: pass"
    subprocess.run([sys.executable, "-c", code], check=True)
    assert tree_usage(os.getpid()).cpu_seconds - before >= 0.28


def test_bytes_read_are_counted(tmp_path: Path) -> None:
    path = tmp_path / "data"
    path.write_bytes(bytes(3_000_000))
    before = tree_usage(os.getpid()).read_bytes
    path.read_bytes()
    after = tree_usage(os.getpid()).read_bytes
    if before is None:
        pytest.skip("/proc/PID/io is not readable here")
    assert 3_000_000 <= after - before < 6_000_000


def test_machine_time_grows() -> None:
    busy, stolen = machine_cpu_seconds()
    end = time.process_time() + 0.1
    while time.process_time() < end:
        pass
    assert machine_cpu_seconds()[0] >= busy + 0.05 and machine_cpu_seconds()[1] >= stolen


def test_pinning_ends_with_its_block() -> None:
    cores = os.sched_getaffinity(0)
    with pinned_to([min(cores)]):
        assert os.sched_getaffinity(0) == {min(cores)}
    assert os.sched_getaffinity(0) == cores


# Content check


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, np.ndarray]]:
    """(path, arrays) of the reference of three clips."""
    folder = tmp_path_factory.mktemp("reference")
    manifest = write_shards(folder, [3], num_slots=1)
    path = folder / "reference.npz"
    write_reference(path, str(folder / manifest.shards[0].name), 8)
    with np.load(path) as file:
        return str(path), {name: file[name] for name in file.files}


def batch_of(arrays: dict[str, np.ndarray]) -> Batch:
    keys = sorted({name.partition("/")[0] for name in arrays})
    frames = torch.from_numpy(np.stack([arrays[f"{key}/frames"] for key in keys]))
    log_mel = torch.from_numpy(np.stack([arrays[f"{key}/log_mel"] for key in keys]))
    return Batch(
        num_clips=len(keys), frames=frames.permute(0, 4, 1, 2, 3), log_mel=log_mel[:, None], keys=tuple(keys)
    )


def test_the_reference_itself_passes(reference) -> None:
    path, arrays = reference
    found = compare(batch_of(arrays), path, "clip")
    assert found.problem is None and found.num_clips == 3
    assert found.psnr == 99.0 and found.log_mel_error == 0.0


def test_small_errors_pass_and_are_measured(reference) -> None:
    path, arrays = reference
    batch = batch_of(arrays)
    batch.frames = batch.frames.clamp(1, 254) + 1  # off by one or two: 10 log10(255^2) = 48.1 dB
    found = compare(batch, path, "clip")
    assert found.problem is None and 46 < found.psnr < 48.5


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (lambda batch: batch.frames.copy_(batch.frames.roll(1, 0)), "PSNR"),
        (lambda batch: batch.frames.zero_(), "PSNR"),
        (lambda batch: batch.frames.copy_(batch.frames.flip(-1)), "PSNR"),
        (lambda batch: batch.frames.copy_(batch.frames.roll(4, 2)), "PSNR"),
        (lambda batch: batch.frames[:, :, 20:].zero_(), "PSNR"),
        (lambda batch: batch.log_mel.copy_(batch.log_mel.roll(1, 0)), "log-mel"),
        (lambda batch: batch.log_mel.fill_(float("nan")), "log-mel"),
        (lambda batch: setattr(batch, "keys", ("a", "b", "c")), "none of its clips"),
        (lambda batch: setattr(batch, "frames", batch.frames.float()), "frames are torch.float32"),
        (lambda batch: setattr(batch, "frames", batch.frames[:, :, :31]), "frames are"),
        (lambda batch: setattr(batch, "frames", None), "no frames"),
    ],
    ids=["clips mixed up", "black", "mirrored", "late", "end black", "sound mixed up", "nan", "other keys",
         "float", "31 frames", "nothing"],
)  # fmt: skip
def test_wrong_content_is_found(reference, damage, problem: str) -> None:
    path, arrays = reference
    batch = batch_of(arrays)
    damage(batch)
    assert problem in compare(batch, path, "clip").problem


def test_dark_pictures_of_something_else_are_found(reference, tmp_path: Path) -> None:
    # Two pictures with values of 0 .. 15: more than 30 dB apart, yet not the same.
    path = tmp_path / "dark.npz"
    arrays = {name: array // 16 if array.dtype == np.uint8 else array for name, array in reference[1].items()}
    np.savez(path, **arrays)
    batch = batch_of(arrays)
    batch.frames = batch.frames.flip(-1)
    found = compare(batch, str(path), "recoded")
    assert found.psnr > 30 and "signal to noise" in found.problem


def test_neighbor_frames_count_where_clocks_may_differ() -> None:
    rng = np.random.default_rng(0)
    frames = rng.integers(0, 256, (8, 4, 4, 3), dtype=np.uint8)
    late = np.concatenate([frames[:1], frames[:-1]])
    assert squared_error(late, frames) > 1000
    assert squared_error(late, frames, reach=1) == 0


def test_originals_are_compared_at_the_moment_asked_for(tmp_path: Path) -> None:
    path = make_flash_beep_video(tmp_path / "video.mp4", seconds=3.0, size=(340, 256), gop_frames=250)
    from benchmarks.contenders.ten_second import open_stream

    workload = Workload(
        videos=[[str(path), 3.0]], batch_size=1, num_workers=1, augment=False, options={"style": "fixed"}
    )
    batch = next(open_stream(workload))
    assert compare(batch, "", "original").problem is None
    path_of, start = batch.origins[0]
    batch.origins = [(path_of, start + 0.7)]
    assert compare(batch, "", "original").problem is not None


def test_the_reference_of_an_original_has_the_clips_shape(tmp_path: Path) -> None:
    path = make_flash_beep_video(tmp_path / "video.mp4", seconds=2.0, size=(340, 256))
    frames, log_mel = original_clip(str(path), 0.5)
    assert frames.shape == (32, 128, 128, 3) and frames.dtype == np.uint8
    assert log_mel.shape == (AUDIO.num_mel_bins, AUDIO.num_steps())


# Ratios


def test_ratios_compare_turns_of_one_round() -> None:
    fast = make_entry("ours: portable", [make_turn(200, 5), make_turn(100, 5), None])
    slow = make_entry("webdataset + PyAV", [make_turn(100, 10), make_turn(50, 20), make_turn(50, 20)])
    assert round_ratios(fast, slow) == pytest.approx([2.0, 2.0])
    assert round_ratios(fast, slow, "CPU") == pytest.approx([2.0, 4.0])


def test_claims_take_the_best_of_each_side() -> None:
    entries = [
        make_entry("decode only: SPDL threads", [make_turn(300, 6)]),
        make_entry("decode only: ours", [make_turn(400, 5)]),
        make_entry("ours: portable", [make_turn(200, 10)]),
        make_entry("ours: raw", [make_turn(900, 1)]),
        make_entry("spdl", [make_turn(150, 12)]),
        make_entry("spdl + our transforms", [make_turn(180, 11)]),
        make_entry("webdataset + PyAV", [make_turn(60, 30)]),
        make_entry("webdataset + torchcodec", [make_turn(80, 25)]),
        make_entry("10-s videos, resize fixed", [make_turn(25, 80)]),
        make_entry("scaling: 1 core", [make_turn(100, 10)]),
        make_entry("scaling: 2 cores", [make_turn(190, 10)]),
    ]
    found = {ratio.claim: ratio for ratio in claims(entries) if ratio.by == "time"}
    assert found["of the ceiling"].median == pytest.approx(0.5)
    assert found["of the ceiling"].other == "decode only: ours" and not found["of the ceiling"].is_met
    assert found["SPDL's own pipeline"].median == pytest.approx(200 / 180)
    assert found["the best DataLoader with webdataset"].other == "webdataset + torchcodec"
    assert found["the best DataLoader with webdataset"].is_met
    assert found["the naive 10-second loader, resize fixed"].median == pytest.approx(8.0)
    assert found["1 to 2 cores"].median == pytest.approx(1.9) and found["1 to 2 cores"].is_met


def test_claims_leave_out_what_was_not_timed() -> None:
    assert claims([make_entry("ours: portable", [None]), make_entry("spdl", [make_turn(1, 1)])]) == []


def test_memory_trend_tells_growth_from_noise() -> None:
    clips = list(range(500, 10_001, 500))
    noise = np.random.default_rng(0).normal(0, 200_000, len(clips))
    flat = trend(clips, [round(8e8 + value) for value in noise])
    leak = trend(
        clips, [round(8e8 + value + 2_000 * count) for value, count in zip(noise, clips, strict=True)]
    )
    assert not flat.grows
    assert leak.grows and leak.bytes_per_1000_clips == pytest.approx(2e6, rel=0.1)


# Contenders and their processes


def test_names_are_unique_and_modules_exist() -> None:
    everyone = [*CONTENDERS, *scaling_contenders(16)]
    assert len({contender.name for contender in everyone}) == len(everyone)
    for contender in everyone:
        assert importlib.util.find_spec(f"benchmarks.contenders.{contender.module}") is not None
        assert contender.does
    assert [contender.cores for contender in scaling_contenders(6)] == [1, 2, 4, 6]


def test_a_missing_library_is_named() -> None:
    contender = Contender(name="x", group="library", module="ours", libraries=("json", "no_such_library"))
    assert missing_library(contender) == "no_such_library"


def test_counting_workers_stop_when_nobody_asks() -> None:
    def work(worker: int):
        while True:
            yield 4, 1

    stream = counted_in_processes(work, 2)
    assert next(stream).num_clips == 4 and next(stream).num_bad == 1
    time.sleep(0.3)
    before = tree_usage(os.getpid()).cpu_seconds
    time.sleep(0.3)
    assert tree_usage(os.getpid()).cpu_seconds - before < 0.1
    stream.close()


def test_a_contender_without_its_shards_fails_alone(tmp_path: Path) -> None:
    host = HostedContender("ours", tmp_path / "log")
    try:
        workload = {"shard_folder": str(tmp_path), "options": {"backend": "portable"}}
        with pytest.raises(ContenderFailed, match="manifest.json does not exist") as caught:
            host.call("start", workload=workload)
        assert caught.value.kind == "NotAvailable"
        with pytest.raises(ContenderFailed, match="AttributeError"):
            host.call("no_such_command")
    finally:
        host.close()
    assert descendants(host.pid) == []


def test_a_stopped_contender_ends_with_the_benchmark(tmp_path: Path) -> None:
    write_shards(tmp_path / "shards", [8], num_slots=1)
    code = f"""
import os, sys
from pathlib import Path
from benchmarks.contenders.host import HostedContender
host = HostedContender("ours", Path({str(tmp_path / "log")!r}))
host.call("start", workload=dict(shard_folder={str(tmp_path / "shards")!r}, batch_size=4, num_workers=1,
                                 options=dict(backend="portable")))
print(host.pid, flush=True)
sys.stdin.readline()
"""
    parent = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    pids = descendants(int(parent.stdout.readline()))
    assert len(pids) >= 2
    states = [Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] for pid in pids]
    assert set(states) == {"T"}
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 20
    while any(_is_running(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(_is_running(pid) for pid in pids)


def _is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in ("Z", "X")
    except OSError:
        return False


@pytest.mark.slow
def test_one_round_gives_a_row_for_each_contender(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shards = tmp_path / "shards"
    write_shards(shards, [8, 8], num_slots=2)
    only = [
        "decode only: PyAV",
        "decode only: ours",
        "ours: portable",
        "ours: dali-gpu",
        "webdataset + PyAV",
        "resize fixed",
    ]
    arguments = [
        "--shards",
        str(shards),
        "--output",
        str(tmp_path / "out"),
        "--cache",
        str(tmp_path / "cache"),
    ]
    arguments += ["--quick", "--rounds", "1", "--seconds", "0.2", "--batch", "4", "--workers", "1", "--cold"]
    assert main([*arguments, "--only", *only]) == 0
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    rows = [
        json.loads(line) for line in (tmp_path / "out" / "loader_throughput.jsonl").read_text().splitlines()
    ]
    by_name = {row["variant"]: row for row in rows}
    assert set(by_name) == set(last["clips_per_second"]) and len(rows) == 7
    for name in ("decode only: PyAV processes", "decode only: ours", "ours: portable", "webdataset + PyAV"):
        row = by_name[name]
        assert row["status"] == "timed", row["reason"]
        assert row["clips_per_second"]["median"] > 0 and row["cpu_seconds_per_clip"] > 0
        assert row["first_batch_seconds"] > 0 and row["peak_memory_bytes"] > 1e7 and row["num_bad"] == 0
        assert row["content"]["problem"] is None and row["content"]["num_clips"] >= 4
        assert row["cache"].startswith("cold") and row["ceiling"]["variant"].startswith("decode only")
    assert by_name["10-s videos, resize fixed"]["reason"] == "no original videos; give --videos"
    assert by_name["10-s videos, resize fixed"]["clips_per_second"] is None
    assert any(ratio["claim"] == "of the ceiling" and ratio["median"] > 0 for ratio in last["ratios"])
    assert (tmp_path / "out" / "loader_throughput_quick.png").stat().st_size > 5000


def test_the_command_line_refuses_nonsense(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(["--rounds", "0"])
    assert "--rounds is 0, expected at least 1" in capsys.readouterr().err
    assert main(["--only", "no such contender"]) == 2
    assert "expected parts of these names" in capsys.readouterr().err
