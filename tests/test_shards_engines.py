"""Engines of make_shards: the same bytes from each, whatever dies; what a job does to its worker is told apart."""

import dataclasses
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_servers import FaultyServer
from fsspec.implementations.memory import MemoryFileSystem
from make_shards_worker import (
    FAST,
    CountingProgress,
    children,
    configure,
    contents,
    kill,
    processes,
    run_here,
)
from s3_environment import s3_at

import shards.jobs
import shards.lease
import shards.make
from shards import storage
from shards.engines import EngineConfig, open_engine
from shards.engines import ray as ray_engine
from shards.engines import slurm as slurm_engine
from shards.make import make_shards, read_report
from shards.pool import JobFailed, Lost
from shards.slicing import SliceSettings
from tools import make_shards as make_tool
from tools.make_synthetic_videos import make_flash_beep_video, make_synthetic_videos

ROOT = Path(__file__).parents[1]
SHORT = dataclasses.replace(FAST, max_clips=1)
RAY = EngineConfig(name="ray")


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """9 usable videos of 1 to 2 seconds, and two that are not usable."""
    folder = tmp_path_factory.mktemp("videos")
    make_synthetic_videos(folder / "barking", num_videos=3, seconds=2.2, seed=1)
    source = make_flash_beep_video(folder / "0.mp4", seconds=1.2).read_bytes()
    for number in range(1, 6):
        (folder / f"{number}.mp4").write_bytes(source)
    make_flash_beep_video(folder / "mute.mp4", seconds=1.2, sound="none")
    (folder / "broken.mp4").write_bytes(b"no video")
    return folder


@pytest.fixture(scope="module")
def reference(videos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of `videos`, made by processes of this machine."""
    out = tmp_path_factory.mktemp("reference") / "out"
    make_shards(configure(videos, out))
    return out


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """make_shards does its work in this process."""
    monkeypatch.setattr(shards.make, "open_engine", lambda *unused: run_here)


# Ray.


@pytest.fixture(scope="module")
def ray() -> Iterator[Any]:
    """A Ray of this machine with two workers, as --engine ray starts it, but for several runs."""
    pytest.importorskip("ray")
    with ray_engine._joined(2, None) as ray:
        yield ray


def working(title: str = "ray::_run") -> list[int]:
    """Worker processes of Ray, below this process, in which a task runs."""
    found, todo = [], [os.getpid()]
    while todo:
        below = children(todo.pop())
        todo += below
        for pid in below:
            try:
                if Path(f"/proc/{pid}/cmdline").read_bytes().startswith(title.encode()):
                    found.append(pid)
            except OSError:
                continue
    return found


class KillingProgress(CountingProgress):
    """Kills a worker of Ray that has a video under way each time that one is done, up to `num_kills` times."""

    def __init__(self, num_kills: int) -> None:
        super().__init__()
        self.left = num_kills
        self.killed: list[int] = []

    def video_done(self, row: Any) -> None:
        super().video_done(row)
        if self.left and (pids := working()) and kill(pids[0]):
            self.left -= 1
            self.killed.append(pids[0])


def test_ray_with_two_workers_and_with_workers_killed_gives_the_bytes_of_local(
    ray: Any, videos: Path, reference: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    make_shards(configure(videos, tmp_path / "two", engine=RAY))
    assert contents(tmp_path / "two") == contents(reference)
    progress = KillingProgress(3)
    make_shards(configure(videos, tmp_path / "killed", engine=RAY), progress)
    assert len(progress.killed) == 3
    assert contents(tmp_path / "killed") == contents(reference)
    assert len(progress.done) == len(set(progress.done)) == 11
    printed = capfd.readouterr()
    assert printed.out == "" and printed.err == ""  # Ray does not print into the progress bar


def test_ray_tells_crash_timeout_and_failure_apart(ray: Any) -> None:
    def behave(job: str) -> str:  # nested: Ray takes it along, as its workers do not find this module
        if job == "crash":
            os.kill(os.getpid(), signal.SIGSEGV)
        if job == "hang":
            time.sleep(600)
        if job == "raise":
            raise OSError("the disk of this node is full")
        return job.upper()

    jobs = ["a", "hang", "crash", "b", "c"]

    def next_job() -> str | None:
        return jobs.pop(0) if jobs else None

    outcomes = dict(ray_engine.run_jobs(behave, next_job, 2, limit_seconds=3))
    assert outcomes == {"a": "A", "b": "B", "c": "C", "crash": Lost("crash"), "hang": Lost("timeout")}
    jobs = ["raise"]
    with pytest.raises(JobFailed, match="^the disk of this node is full$"):
        list(ray_engine.run_jobs(behave, next_job, 2, limit_seconds=30))
    deadline = time.monotonic() + 30
    while working() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not working()  # the one that hung was killed


def test_ray_starts_again_what_a_dead_node_had(ray: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    deaths = [ray.exceptions.NodeDiedError("the machine is gone")] * 2

    def get(ref: Any, real: Callable[[Any], Any] = ray.get) -> Any:
        if deaths:
            raise deaths.pop()
        return real(ref)

    monkeypatch.setattr(ray, "get", get)
    jobs = ["a"]
    outcomes = list(ray_engine.run_jobs(str.upper, lambda: jobs.pop() if jobs else None, 2, limit_seconds=30))
    assert outcomes == [("a", "A")] and not deaths


def test_ray_without_a_machine_is_an_error_here_and_a_warning_on_a_cluster(
    ray: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    dead = [{"Alive": False, "Resources": {"CPU": 2.0}}]
    monkeypatch.setattr(ray_engine, "LOOK_SECONDS", 0.1)
    monkeypatch.setattr(ray, "nodes", lambda: dead)
    for address in (None, "auto"):
        jobs = [2.0]
        outcomes = ray_engine.run_jobs(time.sleep, lambda: jobs.pop() if jobs else None, 2, 30, address)  # noqa: B023
        if address is None:
            with pytest.raises(
                OSError, match="the Ray of this machine has ended; run the same command again"
            ):
                list(outcomes)
        else:
            assert list(outcomes) == [(2.0, None)]
            assert "no machine of the Ray cluster at auto has a CPU" in caplog.text


def test_ray_gets_no_more_tasks_than_workers(ray: Any, tmp_path: Path) -> None:
    started = []

    def next_job() -> int | None:
        started.append(None)
        return len(started) if len(started) <= 6 else None

    for number, _ in enumerate(ray_engine.run_jobs(abs, next_job, 2, limit_seconds=30)):
        assert len(started) <= number + 1 + 2 + 1
    assert number == 5


@pytest.mark.slow
def test_ray_of_its_own_runs_the_tool_and_ends_with_it(videos: Path, reference: Path, tmp_path: Path) -> None:
    """As users start it: in a process of its own, with a Ray of its own, on a terminal's standard error."""
    pytest.importorskip("ray")
    command = [
        sys.executable,
        "-m",
        "tools.make_shards",
        "--videos",
        str(videos),
        "--out",
        str(tmp_path / "out"),
    ]
    command += "--workers 2 --videos-per-shard 4 --max-clips 3 --preset ultrafast --engine ray".split()
    done = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    output, _ = done.communicate(timeout=240)
    assert done.returncode == 0, output
    assert contents(tmp_path / "out") == contents(reference)
    assert [line for line in output.splitlines() if "videos" not in line] == []
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        left = [name for _, group, state, name in processes().values() if group == done.pid and state != "Z"]
        if not left:
            break
        time.sleep(0.2)
    assert not left


def test_ray_that_is_late_is_started_again_and_an_address_without_cluster_is_told(
    ray: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers: list[Exception | None] = [Exception("The current node timed out during startup"), None]

    def init(**options: Any) -> None:
        if (answer := answers.pop(0)) is not None:
            raise answer

    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    ray_engine._start(ray, {"address": "local"})
    assert not answers
    answers += [Exception("timed out")] * 3
    with pytest.raises(OSError, match="did not start on this machine, 3 times: timed out"):
        ray_engine._start(ray, {"address": "local"})
    answers += [ConnectionError("nobody there")]
    with pytest.raises(ValueError, match="no Ray cluster at 'auto' .nobody there.; see `ray status`"):
        ray_engine._start(ray, {"address": "auto"})


REAL_BYTES = 450_000
"""Real videos up to this size are taken; all of them would take minutes."""


@pytest.mark.slow
def test_ray_and_ray_with_workers_killed_give_the_bytes_of_local_on_real_videos(
    ray: Any, real_data: Path, tmp_path: Path
) -> None:
    """The small ones, with their odd containers, damage and missing streams, and quick settings."""
    folder = tmp_path / "videos"
    for kind in ("av_videos", "odd_videos"):
        for path in sorted((real_data / kind).rglob("*")):
            if path.is_file() and path.stat().st_size <= REAL_BYTES:
                link = folder / path.relative_to(real_data)
                link.parent.mkdir(parents=True, exist_ok=True)
                link.symlink_to(path)
    if not folder.is_dir():
        pytest.skip(f"no av_videos or odd_videos in {real_data}")
    settings = SliceSettings(max_clips=2, max_seconds=8, preset="ultrafast")
    config = configure(folder, tmp_path / "local", slicing=settings, videos_per_shard=8)
    manifest = make_shards(config)
    assert manifest.num_videos >= 5 and sum(manifest.skipped.values()) >= 5
    make_shards(dataclasses.replace(config, out=str(tmp_path / "ray"), engine=RAY))
    progress = KillingProgress(3)
    make_shards(dataclasses.replace(config, out=str(tmp_path / "killed"), engine=RAY), progress)
    assert len(progress.killed) == 3
    assert contents(tmp_path / "ray") == contents(tmp_path / "local")
    assert contents(tmp_path / "killed") == contents(tmp_path / "local")


# Slurm.


def slurm(chunk: int = 6, **options: str) -> EngineConfig:
    """Slurm's place is taken by processes of this machine."""
    options = {"cluster": "local", "cpus-per-task": "1", **options}
    return EngineConfig(name="slurm", slurm_chunk=chunk, slurm_options=tuple(options.items()))


def test_slurm_jobs_give_the_bytes_of_local_and_leave_nothing_behind(
    videos: Path, reference: Path, tmp_path: Path
) -> None:
    pytest.importorskip("submitit")
    make_shards(configure(videos, tmp_path / "out", engine=slurm()))
    assert contents(tmp_path / "out") == contents(reference)


def test_slurm_job_that_is_preempted_is_submitted_again(
    videos: Path, reference: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    submitit = pytest.importorskip("submitit")
    monkeypatch.setattr(submitit.local.local.LocalJob, "_results_timeout_s", 0.5)
    killed: list[int] = []

    def kill_soon() -> None:
        deadline = time.monotonic() + 60
        while not list(tmp_path.glob("out/.work/video-*")) and time.monotonic() < deadline:
            time.sleep(0.01)
        for pid in children(os.getpid()):
            if b"submitit.local._local" in Path(f"/proc/{pid}/cmdline").read_bytes():
                killed.extend(task for task in children(pid) if kill(task))
                return

    thread = threading.Thread(target=kill_soon)
    thread.start()
    make_shards(configure(videos, tmp_path / "out", engine=slurm(chunk=20)))
    thread.join()
    assert killed
    assert contents(tmp_path / "out") == contents(reference)


def test_slurm_job_that_always_dies_is_given_up_with_its_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    submitit = pytest.importorskip("submitit")
    monkeypatch.setattr(slurm_engine, "SUBMISSIONS", 2)
    monkeypatch.setattr(submitit.local.local.LocalJob, "_results_timeout_s", 0.5)

    def die(function: Any, jobs: Any, num_processes: int, limit_seconds: float) -> None:
        os._exit(3)

    monkeypatch.setattr(slurm_engine, "_run_chunk", die)
    jobs = ["a"]
    run = open_engine(slurm(), str(tmp_path))
    with pytest.raises(
        JobFailed, match=r"(?s)ended without a result, as did 1 before it.*see its log .*\.err"
    ):
        list(run(str.upper, lambda: jobs.pop() if jobs else None, 1, limit_seconds=30))


STAND_INS = {
    # Calls are counted in $LOG; those named in $FAILING fail, or each with `all`. The copy is what Slurm does, too.
    "sbatch": """
echo sbatch >> "$LOG"
number=$(grep -c sbatch "$LOG")
case " $FAILING " in *" all "* | *" $number "*)
    printf 'sbatch: error: Batch job submission failed:\\nSocket timed out on send/recv operation\\n' >&2
    exit 1
esac
cp "$1" "$LOG-$number"
SLURM_JOB_ID=$number bash "$LOG-$number" > /dev/null 2>&1 < /dev/null &
echo "Submitted batch job $number"
""",
    "srun": """
while [[ $1 == --* ]]; do
    [[ $1 != --output && $1 != --error ]] || shift
    shift
done
export SLURM_NTASKS=1 SLURM_JOB_NUM_NODES=1 SLURM_NODEID=0 SLURM_PROCID=0 SLURM_LOCALID=0
exec "$@"
""",
    "sacct": "echo 'JobID|State|NodeList'",
    "scancel": 'echo scancel >> "$LOG"',
}


@pytest.fixture
def slurm_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Slurm's commands on PATH, which start jobs on this machine; the calls of sbatch and scancel, one per line."""
    pytest.importorskip("submitit")
    (tmp_path / "bin").mkdir()
    for name, text in STAND_INS.items():
        (tmp_path / "bin" / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    monkeypatch.setenv("LOG", str(tmp_path / "log"))
    monkeypatch.setitem(slurm_engine.POLL_SECONDS, "slurm", 0.1)
    monkeypatch.setattr(slurm_engine, "FIRST_WAIT_SECONDS", 0.2)
    return tmp_path / "log"


def test_sbatch_that_fails_is_tried_again_and_what_runs_goes_on(
    videos: Path,
    reference: Path,
    slurm_log: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("FAILING", "2 3")
    make_shards(configure(videos, tmp_path / "out", engine=slurm(cluster="slurm")))
    assert contents(tmp_path / "out") == contents(reference)
    calls = slurm_log.read_text().split()
    assert len(calls) >= 4 and "scancel" not in calls
    told = [record.getMessage() for record in caplog.records if "sbatch failed" in record.getMessage()]
    assert len(told) == 1 and "failed: Socket timed out on send/recv operation" in told[0]


def test_sbatch_that_always_fails_ends_the_run_in_one_line(
    videos: Path,
    slurm_log: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("FAILING", "all")
    monkeypatch.setattr(slurm_engine, "SUBMIT_SECONDS", 1.0)
    arguments = [
        "--videos",
        str(videos),
        "--out",
        str(tmp_path / "out"),
        "--engine",
        "slurm",
        "--workers",
        "2",
    ]
    assert make_tool.main(arguments) == 1
    error = capfd.readouterr().err
    assert re.fullmatch(
        r"make_shards: sbatch failed for 1 s \(.*Socket timed out on send/recv operation\); check --slurm-option.*run "
        r"the same command again.*\n",
        error,
    )
    assert 3 <= slurm_log.read_text().count("sbatch") <= 5


def test_slurm_options_become_those_of_sbatch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    submitit = pytest.importorskip("submitit")
    monkeypatch.setattr(submitit.SlurmExecutor, "affinity", classmethod(lambda cls: 2))
    options = {"partition": "cpu", "time": "04:00:00", "cpus-per-task": "8", "exclusive": True, "mem": "16G"}
    _, executor, num_processes, _ = slurm_engine._executor(str(tmp_path), options)
    script = executor._executor._make_submission_file_text("run", "0")
    lines = {line.removeprefix("#SBATCH --") for line in script.splitlines() if line.startswith("#SBATCH")}
    assert {"partition=cpu", "time=04:00:00", "cpus-per-task=8", "exclusive", "mem=16G"} <= lines
    assert len([line for line in lines if line.startswith(("time", "cpus"))]) == 2 and num_processes == 8


# URLs.


def test_targets_and_work_areas_at_urls_give_the_bytes_of_local(
    videos: Path, reference: Path, tmp_path: Path
) -> None:
    """file:// goes the way of all URLs here, and processes see it as well."""
    out, work = tmp_path / "out", tmp_path / "work"
    make_shards(configure(videos, f"file://{out}", work=f"file://{work}"))
    assert contents(out) == contents(reference)
    assert not list(work.iterdir())


@pytest.fixture
def memory() -> Iterator[MemoryFileSystem]:
    """fsspec's file system in the memory of this process, empty."""
    file_system = MemoryFileSystem()
    yield file_system
    for path in file_system.find("/"):
        file_system.rm_file(path)


def memory_contents(file_system: Any, folder: str) -> dict[str, bytes]:
    return {path.rsplit("/", 1)[1]: file_system.cat_file(path) for path in file_system.find(folder)}


def test_object_store_gets_each_shard_whole_and_once_and_the_manifest_last(
    videos: Path, reference: Path, memory: MemoryFileSystem, here: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards.lease, "SETTLE_SECONDS", 0)
    put: list[str] = []

    def put_file(self, source, target, *args, real=MemoryFileSystem.put_file, **options):
        put.append(target.rsplit("/", 1)[1])
        return real(self, source, target, *args, **options)

    monkeypatch.setattr(MemoryFileSystem, "put_file", put_file)
    make_shards(configure(videos, "memory://bucket/out"))
    assert memory_contents(memory, "/bucket/out") == contents(reference)
    shown = [name for name in put if name in contents(reference)]
    assert shown[-2:] == ["report.csv", "manifest.json"] and len(shown) == len(set(shown))
    tars = [name for name in shown if name.endswith(".tar")]
    assert all(shown.index(name.replace(".tar", ".idx")) == shown.index(name) - 1 for name in tars)

    # One is lost: its block is made again, and of its shards that one alone.
    put.clear()
    memory.rm_file(f"/bucket/out/{tars[1]}")
    progress = CountingProgress()
    make_shards(configure(videos, "memory://bucket/out"), progress)
    assert memory_contents(memory, "/bucket/out") == contents(reference)
    assert [name for name in put if name.endswith(".tar")] == [tars[1]] and len(progress.done) in (3, 4)
    make_shards(configure(videos, "memory://bucket/out"), progress)
    assert "nothing to do" in progress.messages[-1]


def test_run_against_an_object_store_stopped_at_any_upload_goes_on(
    videos: Path, reference: Path, memory: MemoryFileSystem, here: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Stop(Exception):
        pass

    monkeypatch.setattr(shards.lease, "SETTLE_SECONDS", 0)
    told: list[str] = []
    for attempt in range(60):
        left = 2 + attempt % 12

        def put_file(self, source, target, *args, real=MemoryFileSystem.put_file, **options):
            nonlocal left
            left -= 1
            if left < 0:
                raise Stop
            return real(self, source, target, *args, **options)

        progress = CountingProgress()
        with monkeypatch.context() as patch:
            patch.setattr(MemoryFileSystem, "put_file", put_file)
            try:
                make_shards(configure(videos, "memory://bucket/out"), progress)
                break
            except Stop:
                pass
            finally:
                told += progress.done
    assert 3 < attempt < 59
    assert len(told) == len(set(told))
    assert memory_contents(memory, "/bucket/out") == contents(reference)


def test_videos_at_urls_give_the_bytes_of_local_and_are_not_kept(
    videos: Path, reference: Path, tmp_path: Path, memory: MemoryFileSystem, here: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    memory.put(str(videos), "/bucket/videos", recursive=True)
    make_shards(configure("memory://bucket/videos", tmp_path / "out"))
    assert contents(tmp_path / "out") == contents(reference)
    assert not list(scratch.iterdir())


def test_what_a_killed_worker_left_on_its_machine_is_deleted(
    videos: Path, tmp_path: Path, memory: MemoryFileSystem, here: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    code = """
import sys, types
from shards import jobs
with jobs._temporary_folder(types.SimpleNamespace(temporary=sys.argv[1])) as folder:
    print(folder, flush=True)
    sys.stdin.read()
"""
    command = [sys.executable, "-c", code, str(scratch)]
    workers = [
        subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    try:
        killed, at_work = (Path(worker.stdout.readline().strip()) for worker in workers)
        (killed / "source.mp4").write_bytes(b"half")
        for folder in (killed, at_work):
            os.utime(folder, (time.time() - 3600,) * 2)
        workers[0].kill()
        workers[0].wait()
        (scratch / "make_shards-job-of-a-user").mkdir()
        make_shards(configure(videos, "memory://bucket/out"))
        assert {path.name for path in scratch.iterdir()} == {at_work.name, "make_shards-job-of-a-user"}
    finally:
        for worker in workers:
            worker.kill()
            worker.communicate()


def test_missing_and_too_large_videos_at_urls_have_their_reasons(
    videos: Path, tmp_path: Path, memory: MemoryFileSystem, here: None
) -> None:
    for name in ("0.mp4", "barking/video_000.mp4"):
        memory.pipe_file(f"/bucket/videos/{name}", (videos / name).read_bytes())
    memory.pipe_file("/bucket/list", b"gone.mp4\n0.mp4\nbarking/video_000.mp4\n")
    limit = (videos / "0.mp4").stat().st_size
    assert (videos / "barking/video_000.mp4").stat().st_size > limit
    config = configure(
        "memory://bucket/videos", tmp_path / "out", list_file="memory://bucket/list", max_source_bytes=limit
    )
    progress = CountingProgress()
    make_shards(config, progress)
    rows = {row.path: (row.status, row.reason) for row in read_report(tmp_path / "out" / "report.csv")}
    assert rows == {
        "0.mp4": ("kept", ""),
        "barking/video_000.mp4": ("skipped", "too-large"),
        "gone.mp4": ("skipped", "missing"),
    }


def test_video_whose_server_refuses_it_stops_the_run_with_its_name_or_is_skipped(
    videos: Path, reference: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Expired credentials look like that: nothing is skipped unless it is asked for, and the run can go on."""
    with FaultyServer(videos) as server:
        server.always["3.mp4"] = "403"
        listed = tmp_path / "list"
        listed.write_text("".join(f"{path.relative_to(videos)}\n" for path in sorted(videos.rglob("*.mp4"))))
        arguments = ["--videos", server.url, "--list", str(listed), "--out", str(tmp_path / "out")]
        arguments += "--workers 2 --videos-per-shard 4 --max-clips 3 --preset ultrafast".split()
        assert make_tool.main(arguments) == 1
        error = capsys.readouterr().err
        assert re.search(r"make_shards: cannot .*/3\.mp4: .*403.*--skip-unavailable", error)
        skipping = [*arguments, "--skip-unavailable", "--out", str(tmp_path / "skipping")]
        assert make_tool.main(skipping) == 0
        server.always.clear()
        assert make_tool.main(arguments) == 0
    assert contents(tmp_path / "out") == contents(reference)
    reasons = {row.path: row.reason for row in read_report(tmp_path / "skipping" / "report.csv")}
    usual = {row.path: row.reason for row in read_report(reference / "report.csv")}
    assert reasons == {**usual, "3.mp4": "refused"}


def test_s3_as_source_target_and_work_area_of_worker_processes_gives_the_bytes_of_local(
    videos: Path, tmp_path: Path
) -> None:
    pytest.importorskip("s3fs")
    moto_server = pytest.importorskip("moto.server")
    import fsspec

    server = moto_server.ThreadedMotoServer(port=0)
    server.start()
    try:
        host, port = server.get_host_and_port()
        with s3_at(f"http://{host}:{port}"):
            s3 = fsspec.filesystem("s3", skip_instance_cache=True)
            s3.mkdir("bucket")
            s3.put(str(videos / "barking"), "bucket/barking", recursive=True)
            progress = CountingProgress()
            config = configure("s3://bucket/barking", "s3://bucket/out", videos_per_shard=2, slicing=SHORT)
            make_shards(config, progress)
            local = dataclasses.replace(config, videos=str(videos / "barking"), out=str(tmp_path / "out"))
            make_shards(local)
            found = {path.rsplit("/", 1)[1]: s3.cat_file(path) for path in s3.find("bucket/out")}
            assert found == contents(tmp_path / "out")
            assert len(progress.done) == len(set(progress.done)) == 3
            make_shards(dataclasses.replace(config, verify=True), progress)
            assert "nothing to do" in progress.messages[-1]
    finally:
        server.stop()


def write_lease(**changes: object) -> None:
    lease = {"host": socket.gethostname(), "pid": os.getpid(), "token": "other", "time": time.time()}
    storage.write_bytes("memory://bucket/area/lease.json", json.dumps({**lease, **changes}).encode())


def test_lease_is_respected_while_alive_and_taken_over_when_its_run_is_gone(
    memory: MemoryFileSystem, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards.lease, "SETTLE_SECONDS", 0)
    work = "memory://bucket/area"
    for alive in ({}, {"host": "elsewhere", "pid": 1, "time": time.time() - 200}):
        write_lease(**alive)
        with pytest.raises(ValueError, match="written by another make_shards.*taken over 300 s after"):
            with shards.lease.held(work, "OUT"):
                pass
    for gone in ({"pid": 2**22 + 1}, {"host": "elsewhere", "pid": 1, "time": time.time() - 301}):
        write_lease(**gone)
        with shards.lease.held(work, "OUT") as check:
            check()
        assert storage.size(f"{work}/lease.json") is None


def test_run_whose_lease_was_taken_over_stops(
    memory: MemoryFileSystem, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards.lease, "SETTLE_SECONDS", 0)
    monkeypatch.setattr(shards.lease, "HEARTBEAT_SECONDS", 0.02)
    with shards.lease.held("memory://bucket/area", "OUT") as check:
        time.sleep(0.1)
        check()  # renewed
        write_lease()
        deadline = time.monotonic() + 20
        with pytest.raises(shards.lease.LeaseLost, match="taken over by another make_shards"):
            while time.monotonic() < deadline:
                check()
                time.sleep(0.01)
    assert b"other" in storage.read_bytes("memory://bucket/area/lease.json")  # it is not ours to delete


# The command line.


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--ray-address", "auto"], "ray_address is given for engine 'local'.*add --engine ray"),
        (["--slurm-option", "partition=x"], "slurm_options is given for engine 'local'.*add --engine slurm"),
        (["--engine", "slurm", "--slurm-option", "=x"], "expected KEY=VALUE"),
        (["--engine", "slurm", "--slurm-chunk", "0"], "slurm_chunk is 0, expected at least 1"),
        (
            ["--engine", "slurm", "--slurm-option", "cluster=local", "--slurm-option", "cpus-per-task=x"],
            "cpus-per-task is 'x', expected a number",
        ),
        (
            ["--engine", "slurm", "--slurm-option", "cluster=local", "--work", "memory://work"],
            "add --slurm-option folder=PATH",
        ),
    ],
)
def test_wrong_engine_options_are_refused(
    arguments: list[str], words: str, videos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(shards.lease, "SETTLE_SECONDS", 0)
    arguments = ["--videos", str(videos), "--out", str(tmp_path / "out"), *arguments]
    assert make_tool.main(arguments) == 2
    assert re.search(words, capsys.readouterr().err)


@pytest.mark.parametrize("engine, module, extra", [("ray", "ray", "ray"), ("slurm", "submitit", "slurm")])
def test_engine_that_is_not_installed_names_its_extra(
    engine: str, module: str, extra: str, videos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setitem(sys.modules, module, None)
    arguments = ["--videos", str(videos), "--out", str(tmp_path / "out"), "--engine", engine]
    assert make_tool.main(arguments) == 2
    assert f"pip install cmac[{extra}]" in capsys.readouterr().err
