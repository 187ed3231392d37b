"""make_shards: the same bytes however it is run or interrupted, each video accounted for, wrong input
refused."""

import dataclasses
import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
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

import shards.jobs
import shards.lease
import shards.make
from shards.check import check_shards
from shards.engines import EngineConfig
from shards.ffmpeg import find_ffmpeg, run_ffmpeg
from shards.make import (
    NothingKept,
    ProgressListener,
    ShardConfig,
    SilentProgress,
    estimate_shards,
    make_shards,
    read_report,
)
from shards.manifest import read_manifest
from shards.pool import JobFailed, Lost, run_jobs
from shards.reader import ShardReader
from tools import check_shards as check_tool
from tools import make_shards as make_tool
from tools.make_synthetic_videos import make_flash_beep_video, make_synthetic_videos

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """7 usable videos of 1 to 4 seconds in two folders, and three that are not usable."""
    folder = tmp_path_factory.mktemp("videos")
    make_synthetic_videos(folder / "barking", num_videos=4, seconds=2.2, seed=1)
    make_synthetic_videos(folder / "singing", num_videos=2, seconds=3.0, seed=2)
    make_flash_beep_video(folder / "one second.mp4", seconds=1.2)
    make_flash_beep_video(folder / "mute.mp4", seconds=1.2, sound="none")
    (folder / "broken.mp4").write_bytes(b"no video")
    (folder / "empty.mkv").write_bytes(b"")
    (folder / "barking" / "video_000.json").write_text("{}")  # what belongs to a video is left alone
    (folder / ".hidden.mp4").write_bytes(b"")
    return folder


@pytest.fixture(scope="module")
def reference(videos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of `videos`, made without interruption."""
    out = tmp_path_factory.mktemp("reference") / "out"
    make_shards(configure(videos, out))
    return out


def test_shards_hold_every_usable_second_in_slots(videos: Path, reference: Path) -> None:
    result = check_shards(reference, decode=True)
    assert result.problems == []
    manifest = result.manifest
    assert manifest.num_slots == 3 and manifest.num_videos == 7 and manifest.num_clips == 21
    assert manifest.skipped == {"no-audio": 1, "undecodable": 2}
    names = {path.name for path in reference.iterdir()}
    stems = {f"train-slot{slot:02d}-{index:06d}" for slot in range(3) for index in range(3)}
    assert {name for name in names if name.endswith(".tar")} <= {f"{stem}.tar" for stem in stems}
    assert names - {f"{stem}.{suffix}" for stem in stems for suffix in ("tar", "idx")} == {
        "manifest.json",
        "report.csv",
    }
    assert result.statistics.labels == {"barking": 4, "singing": 2}

    by_slot: dict[int, list[str]] = {}
    starts: dict[str, list[float]] = {}
    for entry in manifest.shards:
        with ShardReader(reference / entry.name) as reader:
            for position in range(len(reader)):
                info = reader.read(position).info
                by_slot.setdefault(info.slot, []).append(info.video_id)
                starts.setdefault(info.video_id, []).append(info.start_seconds)
                assert info.end_seconds == pytest.approx(info.start_seconds + 1)
    assert by_slot[0] == by_slot[1] == by_slot[2] and len(set(by_slot[0])) == 7
    rows = {row.path: row for row in read_report(reference / "report.csv")}
    assert set(rows) == {str(p.relative_to(videos)) for p in videos.rglob("[!.]*.m*")}
    for name, seconds in starts.items():
        assert len(set(seconds)) == rows[name].num_clips == min(rows[name].seconds, 3)
        counts = Counter(seconds).values()
        assert max(counts) - min(counts) <= 1  # repeats are spread evenly


@pytest.mark.parametrize("workers", [1, 3])
def test_bytes_do_not_depend_on_the_number_of_workers(
    workers: int, videos: Path, reference: Path, tmp_path: Path
) -> None:
    make_shards(configure(videos, tmp_path / "out", workers=workers))
    assert contents(tmp_path / "out") == contents(reference)


def test_another_seed_gives_another_order(videos: Path, reference: Path, tmp_path: Path) -> None:
    make_shards(configure(videos, tmp_path / "out", seed=5))
    orders = []
    for folder in (reference, tmp_path / "out"):
        ids = []
        for entry in read_manifest(folder).slot_shards(0):
            with ShardReader(folder / entry.name) as reader:
                ids += [reader.read(position).info.video_id for position in range(len(reader))]
        orders.append(ids)
    assert orders[0] != orders[1] and sorted(orders[0]) == sorted(orders[1])


def run_tool(videos: Path, out: Path, *more: str) -> subprocess.Popen:
    command = [
        sys.executable,
        str(ROOT / "tools" / "make_shards.py"),
        "--videos",
        str(videos),
        "--out",
        str(out),
    ]
    command += "--workers 2 --videos-per-shard 4 --max-clips 3 --preset ultrafast".split()
    return subprocess.Popen(
        [*command, *more],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        # Tests that run in the background of a shell ignore SIGINT, and would hand that on.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        cwd=out.parent,
    )


def finished_parts(out: Path) -> set[str]:
    paths = [path for folder in (out, out / ".work") for path in folder.glob("*[0-9]*")]
    return {path.name for path in paths if "tmp" not in path.name}


NUM_KILLS = 25


def test_killed_25_times_at_random_it_ends_with_the_same_bytes(videos: Path, tmp_path: Path) -> None:
    """Kills of the program alone (its workers are left to find out), of all its processes at once, and of single
    workers under way, at random moments from before its start to its end."""
    many = tmp_path / "many"
    many.mkdir()
    for number in range(28):
        source = "mute.mp4" if number % 9 == 0 else ("one second.mp4", "barking/video_000.mp4")[number % 2]
        (many / f"{number}.mp4").symlink_to(videos / source)
    make_shards(configure(many, tmp_path / "unbroken"))
    wanted = contents(tmp_path / "unbroken")
    seed = int(os.environ.get("CMAC_KILL_SEED", random.SystemRandom().randrange(1000)))
    rng = random.Random(seed)
    num_killed, num_finished = 0, 0
    killed: Counter[str] = Counter()
    try:
        while num_killed < NUM_KILLS:
            out = tmp_path / f"out{num_finished}"
            before = finished_parts(out)
            process = run_tool(many, out)
            if rng.random() < 0.7:  # once it gets anywhere
                while process.poll() is None and finished_parts(out) == before:
                    time.sleep(0.005)
                time.sleep(0.3 * rng.random() ** 2)
            else:
                time.sleep(rng.random())
            victim = rng.choice(["program", "all", "worker"])
            if victim == "worker":
                workers = [
                    pid for pid in children(process.pid) if "python" in processes().get(pid, ("",) * 4)[3]
                ]
                if workers and kill(rng.choice(workers)):
                    killed[victim] += 1
                time.sleep(0.2 * rng.random())
            if process.poll() is None:
                if victim == "all":
                    os.killpg(process.pid, signal.SIGKILL)
                else:
                    process.kill()
                killed["all" if victim == "all" else "program"] += 1
                num_killed += 1
                process.communicate()
                for path in out.glob("*.tar"):
                    assert path.read_bytes() == wanted[path.name]  # never a torn one
                    assert path.with_suffix(".idx").read_bytes() == wanted[path.with_suffix(".idx").name]
            else:
                output, _ = process.communicate()
                assert process.returncode == 0, output
                assert contents(out) == wanted
                num_finished += 1
        output, _ = run_tool(many, out).communicate(timeout=120)
        assert contents(out) == wanted, output
        print(killed, num_finished)
    except AssertionError:
        print(
            f"CMAC_KILL_SEED={seed} repeats this; killed {dict(killed)}, finished {num_finished} times between"
        )
        raise
    assert killed["program"] and killed["all"]


class Crash(Exception):
    """Stands for a kill in the tests below."""


def test_stopped_at_every_step_nothing_is_done_twice(
    videos: Path, reference: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each run is stopped at one of its first 10 renames or removals, be it of a worker or of the program itself; all
    of them together leave each result once."""
    out = tmp_path / "out"
    renamed: Counter[str] = Counter()
    told: Counter[str] = Counter()
    finished = False
    monkeypatch.setattr(shards.make, "open_engine", lambda *unused: run_here)
    monkeypatch.setattr(shards.jobs, "TRANSFERS_AT_ONCE", 1)
    for attempt in range(60):  # noqa: B007
        left = 1 + attempt % 10

        def count_down() -> None:
            nonlocal left
            left -= 1
            if left < 0:
                raise Crash

        def replace(source: str, target: str, real=os.replace) -> None:
            count_down()
            real(source, target)
            renamed[Path(target).name] += 1

        def unlink(path: Path, missing_ok: bool = False, real=Path.unlink) -> None:
            if path.name.startswith("video-"):
                count_down()
            real(path, missing_ok)

        progress = CountingProgress()
        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", replace)
            patch.setattr(Path, "unlink", unlink)
            try:
                make_shards(configure(videos, out), progress)
                finished = True
            except Crash:
                pass
        told.update(progress.done)
        if finished:
            break
    assert finished and attempt > 10
    results = {name: count for name, count in renamed.items() if not name.endswith((".tar", ".idx"))}
    assert set(results.values()) == {1} and sum(name.startswith("video-") for name in results) == 10
    # Stopped between the first of a block's shards and its record, they are written again.
    assert max(renamed.values()) <= 10
    assert set(told) <= {row.path for row in read_report(out / "report.csv")} and max(told.values()) == 1
    assert contents(out) == contents(reference)


def test_finished_folder_is_left_alone(videos: Path, reference: Path) -> None:
    before = {path.name: path.stat().st_mtime_ns for path in reference.iterdir()}
    progress = CountingProgress()
    assert make_shards(configure(videos, reference, workers=1), progress) == read_manifest(reference)
    assert progress.done == [] and "nothing to do" in progress.messages[0]
    assert {path.name: path.stat().st_mtime_ns for path in reference.iterdir()} == before


def test_damaged_result_of_an_earlier_run_is_made_again(
    videos: Path, reference: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    with monkeypatch.context() as patch, pytest.raises(Crash):
        patch.setattr(shards.make, "open_engine", lambda *unused: run_here)
        patch.setattr(shards.jobs, "_write_block", lambda *unused: (_ for _ in ()).throw(Crash()))
        make_shards(configure(videos, out))
    results = sorted((out / ".work").glob("video-*"))
    results[0].write_bytes(results[0].read_bytes()[:-7])
    results[1].write_bytes(b"")
    make_shards(configure(videos, out))
    assert contents(out) == contents(reference)


def refused(config: ShardConfig, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make_shards(config)


def test_other_settings_on_a_finished_folder_are_refused(
    videos: Path, reference: Path, tmp_path: Path
) -> None:
    before = contents(reference)
    refused(configure(videos, reference, seed=3), r"seed 0 \(now 3\).*choose another --out")
    refused(configure(videos, reference, split="test"), r"split 'train' \(now 'test'\)")
    refused(configure(videos, reference, videos_per_shard=5), r"videos_per_shard 4 \(now 5\)")
    crf = dataclasses.replace(FAST, crf=30)
    refused(configure(videos, reference, slicing=crf), r"crf 23 \(now 30\)")
    refused(configure(videos / "barking", reference), "another list of videos")
    assert contents(reference) == before


def test_other_settings_on_an_unfinished_folder_are_refused(
    videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    with monkeypatch.context() as patch, pytest.raises(Crash):
        patch.setattr(shards.make._Run, "work_off", lambda self: (_ for _ in ()).throw(Crash()))
        make_shards(configure(videos, out))
    refused(configure(videos, out, seed=3), r"unfinished run with seed 0 \(now 3\).*repeat the old command")
    monkeypatch.setattr(shards.make, "ffmpeg_version", lambda program: "ffmpeg version 99")
    refused(configure(videos, out), r"ffmpeg .*\(now 'ffmpeg version 99'\)")


def test_more_shards_than_a_manifest_may_have_are_refused_before_the_work(
    videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards.make, "MAX_SHARDS", 5)
    refused(
        configure(videos, tmp_path / "out"),
        r"would become \d+ shards, expected at most 5; raise --videos-per-",
    )
    assert not (tmp_path / "out").exists()


def test_folders_with_something_else_in_them_are_refused(videos: Path, tmp_path: Path) -> None:
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "old.tar").write_bytes(b"")
    refused(configure(videos, tmp_path / "foreign"), "1 tar and idx files")
    (tmp_path / "file").write_bytes(b"")
    refused(configure(videos, tmp_path / "file"), "is a file")


def test_missing_and_cut_shards_of_a_finished_folder_are_made_again_and_no_others(
    videos: Path, reference: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    shutil.copytree(reference, out)
    first, second, *others = sorted(out.glob("*-000000.*"))  # idx and tar of slot 0
    second.unlink()
    cut = sorted(out.glob("*slot02-000001.tar"))[0]
    cut.write_bytes(cut.read_bytes()[:-1])
    before = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    progress = CountingProgress()
    assert make_shards(configure(videos, out), progress) == read_manifest(reference)
    assert contents(out) == contents(reference)
    after = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    made = {name for name in after if after[name] != before.get(name)}
    assert made == {first.name, second.name, cut.name, cut.with_suffix(".idx").name}
    assert len(progress.done) == 8  # the videos of two blocks of three
    assert (
        f"2 of 9 shards are missing or damaged and made again: {second.name}, {cut.name}" in progress.messages
    )


def test_damaged_indexes_of_a_finished_folder_are_made_again(
    videos: Path, reference: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the loader tells users to do who have one."""
    monkeypatch.setattr(shards.make, "open_engine", lambda *unused: run_here)
    out = tmp_path / "out"
    shutil.copytree(reference, out)
    damaged = sorted(out.glob("*-000001.idx"))[0]
    for location, verify in ((str(out), False), (f"file://{out}", True)):
        damaged.write_bytes(b"")
        make_shards(configure(videos, location, verify=verify, work=str(tmp_path / "work")))
        assert contents(out) == contents(reference)


def test_changed_shards_are_made_again_with_verify(videos: Path, reference: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(reference, out)
    changed = sorted(out.glob("*.tar"))[3]
    changed.write_bytes(changed.read_bytes()[:-1] + b"x")
    progress = CountingProgress()
    make_shards(configure(videos, out), progress)
    assert "nothing to do" in progress.messages[0]
    make_shards(configure(videos, out, verify=True), progress)
    assert contents(out) == contents(reference) and len(progress.done) in (2, 4)


def test_shards_that_cannot_be_made_again_the_same_are_refused(
    videos: Path, reference: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, others = tmp_path / "out", tmp_path / "videos"
    shutil.copytree(reference, out)
    shutil.copytree(videos, others)
    for path in others.rglob("video_00*.mp4"):
        path.write_bytes((others / "one second.mp4").read_bytes())
    lost = sorted(out.glob("*.tar"))[0]
    lost.unlink()
    left = contents(out)
    monkeypatch.setattr(shards.make, "open_engine", lambda *unused: run_here)
    refused(configure(others, out), rf"{lost.name} has SHA-256 .*, expected .* a video was changed")
    shutil.rmtree(out / ".work")
    assert contents(out) == left
    monkeypatch.setattr(shards.make, "ffmpeg_version", lambda program: "ffmpeg version 99")
    refused(configure(videos, out), r"was made with 'ffmpeg version .* now there is 'ffmpeg version 99'")


def test_shards_that_vanish_from_an_unfinished_folder_are_made_again(
    videos: Path, reference: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    monkeypatch.setattr(shards.make, "open_engine", lambda *unused: run_here)
    with monkeypatch.context() as patch, pytest.raises(Crash):
        patch.setattr(shards.make._Run, "finish", lambda *unused: (_ for _ in ()).throw(Crash()))
        make_shards(configure(videos, out))
    sorted(out.glob("*.tar"))[0].unlink()
    make_shards(configure(videos, out))
    assert contents(out) == contents(reference)


def test_work_area_elsewhere_is_left_as_it_was(videos: Path, reference: Path, tmp_path: Path) -> None:
    """The user may have named any folder, with files called like some of ours."""
    work = tmp_path / "work"
    names = ["notes.txt", "video-1.mp4", "video-0000001.mp4", "video-clips/a.mp4", "block-a.json", "tmp-x/a"]
    names += ["slurm/job.sh", ".notes.tmp", "lock"]
    for name in names:
        (work / name).parent.mkdir(parents=True, exist_ok=True)
        (work / name).write_text("not ours")
    make_shards(configure(videos, tmp_path / "out", work=str(work)))
    assert contents(tmp_path / "out") == contents(reference)
    left = [path for path in work.rglob("*") if path.is_file()]
    assert sorted(str(path.relative_to(work)) for path in left) == sorted(names)
    assert all(path.read_text() == "not ours" for path in left)


def test_work_area_may_be_on_another_file_system(
    videos: Path, reference: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a fast disk may be, or the system's temporary folder where the work area is at a URL."""
    out = tmp_path / "out"

    def replace(source: str, target: str, real=os.replace) -> None:
        if Path(target).parent == out != Path(source).parent:
            raise OSError(errno.EXDEV, "Invalid cross-device link")
        real(source, target)

    monkeypatch.setattr(os, "replace", replace)
    monkeypatch.setattr(shards.make, "open_engine", lambda *unused: run_here)
    out.mkdir()
    (out / ".train-slot00-000000.tar.0123456789abcdef.tmp").write_bytes(b"of a run that was killed")
    make_shards(configure(videos, out, work=str(tmp_path / "work")))
    assert contents(out) == contents(reference) and not (tmp_path / "work").exists()


def test_relative_paths_are_those_of_who_started_the_run(
    videos: Path, reference: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Workers of a cluster start in other folders."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()

    def run(function, next_job, *unused):
        while True:
            os.chdir(tmp_path)
            if (job := next_job()) is None:
                return
            os.chdir(elsewhere)
            outcome = function(job)
            os.chdir(tmp_path)
            yield job, outcome

    monkeypatch.setattr(shards.make, "open_engine", lambda *unused: run)
    monkeypatch.chdir(tmp_path)
    make_shards(configure(os.path.relpath(videos), "out"))
    assert contents(tmp_path / "out") == contents(reference)


def test_finished_run_clears_its_own_work_area_and_leaves_that_of_another(
    videos: Path, reference: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One --work for two outputs, one after the other."""
    monkeypatch.setattr(shards.make, "open_engine", lambda *unused: run_here)
    first, second = (
        configure(videos, tmp_path / name, work=str(tmp_path / "work"), seed=seed)
        for name, seed in (("first", 0), ("second", 1))
    )
    with monkeypatch.context() as patch:
        patch.setattr(shards.make, "_clear_work", lambda work: None)  # killed before that
        make_shards(first)
    assert list((tmp_path / "work").iterdir())
    make_shards(first)
    assert not (tmp_path / "work").exists()
    with monkeypatch.context() as patch, pytest.raises(Crash):
        patch.setattr(shards.make._Run, "finish", lambda *unused: (_ for _ in ()).throw(Crash()))
        make_shards(second)
    before = sorted((tmp_path / "work").rglob("*"))
    assert len(before) > 2
    make_shards(first)
    assert sorted((tmp_path / "work").rglob("*")) == before


def test_folder_of_a_version_without_a_setting_is_accepted(
    videos: Path, reference: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    shutil.copytree(reference, out)
    record = json.loads((out / "manifest.json").read_bytes())
    del record["settings"]["crf"]
    (out / "manifest.json").write_text(json.dumps(record))
    make_shards(configure(videos, out))
    refused(configure(videos, out, slicing=dataclasses.replace(FAST, crf=30)), r"crf 23 \(now 30\)")


def test_two_runs_at_once_are_refused(videos: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    (out / ".work").mkdir(parents=True)
    with shards.lease.held(str(out / ".work"), str(out)):
        refused(configure(videos, out), "written by another make_shards")


# The work of one job done twice.


def jobs_of(
    videos: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> list[shards.jobs.SliceJob | shards.jobs.BlockJob]:
    """Does all the jobs of a run and keeps its work area; returns the jobs."""
    jobs = []

    def remember(function, next_job, num_workers, limit_seconds):
        for job, outcome in run_here(function, next_job, num_workers, limit_seconds):
            jobs.append(job)
            yield job, outcome

    with monkeypatch.context() as patch, pytest.raises(Crash):
        patch.setattr(shards.make, "open_engine", lambda *unused: remember)
        patch.setattr(shards.make._Run, "finish", lambda *unused: (_ for _ in ()).throw(Crash()))
        make_shards(configure(videos, out))
    return jobs


def test_workers_given_up_for_dead_change_nothing_when_they_come_late(
    videos: Path, reference: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    jobs = jobs_of(videos, out, monkeypatch)
    before = {path: path.stat().st_mtime_ns for path in out.glob("*")}
    for job in jobs:
        if isinstance(job, shards.jobs.BlockJob):
            shards.jobs.do_job(job)  # knows by the record that there is nothing to do
    assert {path: path.stat().st_mtime_ns for path in out.glob("*")} == before
    job = next(job for job in jobs if isinstance(job, shards.jobs.SliceJob))
    row = shards.jobs.do_job(job)
    monkeypatch.setattr(
        shards.jobs, "_sliced", lambda *unused: pytest.fail("sliced though a result is there")
    )
    assert shards.jobs.do_job(job) == row
    # Given up for being late, while the result is there: it counts, as another worker may have read it.
    assert shards.jobs.give_up(job, "timeout") == row
    make_shards(configure(videos, out))
    assert contents(out) == contents(reference)


def test_job_whose_worker_dies_is_tried_again_a_bounded_number_of_times(
    videos: Path, reference: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The video that always kills its worker is skipped; one that did so thrice is not."""
    tries: Counter[str] = Counter()

    def deadly(function, next_job, num_workers, limit_seconds):
        while (job := next_job()) is not None:
            name = job.source.video_id if isinstance(job, shards.jobs.SliceJob) else f"block {job.index}"
            tries[name] += 1
            dies = {"one second.mp4": 99, "barking/video_001.mp4": 3, "block 1": 3}.get(name, 0)
            yield job, Lost("crash") if tries[name] <= dies else function(job)

    monkeypatch.setattr(shards.make, "open_engine", lambda *unused: deadly)
    out = tmp_path / "out"
    make_shards(configure(videos, out))
    assert {name: count for name, count in tries.items() if count > 1} == {
        "one second.mp4": 4,
        "barking/video_001.mp4": 4,
        "block 1": 4,
    }
    rows, others = (
        {row.path: row for row in read_report(folder / "report.csv")} for folder in (out, reference)
    )
    assert (rows["one second.mp4"].status, rows["one second.mp4"].reason) == ("skipped", "crash")
    assert rows | {"one second.mp4": others["one second.mp4"]} == others
    assert check_shards(out).problems == []


def test_block_whose_results_another_worker_has_tidied_up_is_that_workers(
    videos: Path, reference: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    job = next(j for j in jobs_of(videos, out, monkeypatch) if isinstance(j, shards.jobs.BlockJob))
    answers = [None, shards.jobs.read_record(job.run.work, job.index)]  # it comes while this one is at work
    monkeypatch.setattr(shards.jobs, "read_record", lambda *unused: answers.pop(0))
    assert shards.jobs.do_job(job)["shards"] and not answers
    answers += [None, None]
    with pytest.raises(FileNotFoundError):
        shards.jobs.do_job(job)


def test_another_ffmpeg_on_a_workers_machine_is_refused(videos: Path, tmp_path: Path) -> None:
    program = find_ffmpeg()
    settings = shards.make.run_settings(
        configure(videos, tmp_path), program, "ffmpeg version 99", str(tmp_path)
    )
    os.mkdir(settings.temporary)
    source = shards.make.list_videos(configure(videos, tmp_path))[0]
    with pytest.raises(OSError, match=r"is 'ffmpeg .*expected 'ffmpeg version 99'.*install the same version"):
        shards.jobs.do_job(shards.jobs.SliceJob(number=0, source=source, run=settings))


def test_file_above_the_limit_is_too_large(videos: Path, tmp_path: Path) -> None:
    largest = max(videos.rglob("*.mp4"), key=lambda path: path.stat().st_size)
    make_shards(configure(videos, tmp_path / "out", max_source_bytes=largest.stat().st_size - 1))
    rows = {row.path: row.reason for row in read_report(tmp_path / "out" / "report.csv")}
    assert [name for name, reason in rows.items() if reason == "too-large"] == [
        str(largest.relative_to(videos))
    ]


def test_nothing_kept_is_an_error_and_the_report_tells_why(tmp_path: Path) -> None:
    (tmp_path / "videos").mkdir()
    (tmp_path / "videos" / "a.mp4").write_bytes(b"")
    with pytest.raises(NothingKept, match="none of 1 videos.*undecodable 1"):
        make_shards(configure(tmp_path / "videos", tmp_path / "out"))
    assert [row.reason for row in read_report(tmp_path / "out" / "report.csv")] == ["undecodable"]
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_names_that_are_not_text_survive(tmp_path: Path) -> None:
    source = make_flash_beep_video(tmp_path / "good.mp4", seconds=1.3).read_bytes()
    names = [
        b"not \xff utf8.mp4",
        b'new\nline,"quoted".mp4',
        "größe 声.mp4".encode(),
        b"[a]*?%d.mp4",
        b"-n.mp4",
    ]
    (tmp_path / "videos").mkdir()
    for name in names:
        (tmp_path / "videos" / os.fsdecode(name)).write_bytes(source)
    make_shards(configure(tmp_path / "videos", tmp_path / "out"))
    rows = read_report(tmp_path / "out" / "report.csv")
    assert sorted(os.fsencode(row.path) for row in rows if row.status == "kept") == sorted(names)
    result = check_shards(tmp_path / "out")
    assert result.problems == []
    with ShardReader(tmp_path / "out" / result.manifest.shards[0].name) as reader:
        ids = {os.fsencode(reader.read(position).info.video_id) for position in range(len(reader))}
    assert ids <= set(names) and len(ids) == 4


def test_estimate_is_near_the_truth_and_writes_nothing(videos: Path, reference: Path, tmp_path: Path) -> None:
    estimate = estimate_shards(configure(videos, tmp_path / "out"))
    manifest = read_manifest(reference)
    assert not (tmp_path / "out").exists()
    assert (estimate.num_videos, estimate.num_sampled, estimate.num_kept) == (10, 10, 7)
    assert estimate.num_clips == manifest.num_clips
    assert estimate.num_distinct_clips == manifest.num_distinct_clips
    assert estimate.num_bytes == pytest.approx(manifest.num_bytes, rel=0.1)


@pytest.mark.parametrize(
    "engine, workers, at_once",
    [
        (EngineConfig(), 512, 2),
        (EngineConfig(name="ray"), 512, 2),
        (EngineConfig(name="ray", ray_address="auto"), 8, 8),
        (EngineConfig(name="ray", ray_address="auto"), 512, 10),
        (EngineConfig(name="slurm", slurm_chunk=5), 1, 4),
        (EngineConfig(name="slurm", slurm_chunk=5, slurm_options=(("cpus-per-task", "3"),)), 512, 6),
    ],
)
def test_dry_run_uses_the_cores_of_this_machine_and_counts_with_the_workers_of_the_run(
    engine: EngineConfig,
    workers: int,
    at_once: int,
    videos: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """10 videos, of which 4 are sliced, in 3 seconds each as the clock has it."""
    started: list[int] = []

    def run(function: Callable, next_job: Callable, num_workers: int, limit_seconds: float) -> Iterator:
        started.append(num_workers)
        return run_here(function, next_job, num_workers, limit_seconds)

    def slice_job(job: shards.jobs.SliceJob) -> shards.make.ReportRow:
        now[0] += 3.0
        return shards.jobs.give_up(job, "no-audio")

    now = [100.0]
    monkeypatch.setattr(shards.make, "DRY_RUN_VIDEOS", 4)
    monkeypatch.setattr(shards.make, "usable_cores", lambda: 2)
    monkeypatch.setattr(shards.make, "run_jobs", run)
    monkeypatch.setattr(shards.make, "do_job", slice_job)
    clock = SimpleNamespace(monotonic=lambda: now[0], time_ns=time.time_ns)
    monkeypatch.setattr(shards.make, "time", clock)
    estimate = estimate_shards(configure(videos, tmp_path / "out", engine=engine, workers=workers))
    assert started == [min(workers, 2)]
    assert (estimate.num_videos, estimate.num_sampled, estimate.workers) == (10, 4, at_once)
    assert estimate.seconds == pytest.approx(10 * 3 / at_once)


def test_jobs_may_take_longer_where_a_list_names_urls(
    videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits: list[float] = []

    def run(function: Callable, next_job: Callable, num_workers: int, limit_seconds: float) -> Iterator:
        limits.append(limit_seconds)
        raise JobFailed("far enough")

    monkeypatch.setattr(shards.make, "run_jobs", run)
    monkeypatch.setattr(shards.make, "open_engine", lambda *unused: run)
    for lines in ("one second.mp4\n", "one second.mp4\nhttps://127.0.0.1:9/two.mp4\n"):
        (tmp_path / "list").write_text(lines)
        config = configure(videos, tmp_path / "out", list_file=str(tmp_path / "list"), timeout_seconds=100)
        for start in (make_shards, estimate_shards):
            with pytest.raises(JobFailed):
                start(config)
        shutil.rmtree(tmp_path / "out")
    remote = 260 + shards.make.TRANSFER_SECONDS
    assert limits == [260, 260, remote, remote]


# The command line.


@pytest.mark.parametrize("start", [["tools/make_shards.py"], ["-m", "tools.make_shards"]])
def test_tool_runs_both_ways(start: list[str], videos: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, *start, "--videos", str(videos), "--out", str(tmp_path / "out"), "--max-clips", "1"]
        + ["--workers", "1", "--preset", "ultrafast"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "7 videos kept" in done.stdout and "3 videos skipped: no-audio 1, undecodable 2" in done.stdout
    assert "10/10 videos" in done.stderr and "\x1b" not in done.stderr


@pytest.mark.parametrize(
    "arguments, status, words",
    [
        ([], 2, "is not a folder"),
        (["--max-clips", "0"], 2, "max_clips is 0"),
        (["--workers", "0"], 2, "workers is 0, expected at least 1"),
        (["--list", "/does/not/exist"], 2, "is not a folder"),
    ],
)
def test_wrong_input_has_its_exit_status(
    arguments: list[str], status: int, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--videos", str(tmp_path / "no"), "--out", str(tmp_path / "out"), *arguments]
    assert make_tool.main(arguments) == status
    assert words in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_dry_run_of_the_tool(videos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [
        "--videos",
        str(videos),
        "--out",
        str(tmp_path / "out"),
        "--dry-run",
        "--preset",
        "ultrafast",
    ]
    assert make_tool.main(arguments) == 0
    printed = capsys.readouterr().out
    assert "10 videos; sliced 10 of them, kept 7" in printed
    assert "each as fast as a core of this machine" in printed
    assert not (tmp_path / "out").exists()


def running_in_group(group: int) -> list[str]:
    """Names of the processes of a group that are not zombies."""
    return [name for _, of, state, name in processes().values() if of == group and state != "Z"]


def test_interrupt_ends_all_processes_and_can_go_on(videos: Path, reference: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    process = run_tool(videos, out)
    deadline = time.monotonic() + 30
    while not list(out.glob(".work/video-*")) and time.monotonic() < deadline:
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)  # what Ctrl-C does
    output, _ = process.communicate(timeout=30)
    assert process.returncode == 130 and "run the same command again" in output and "Traceback" not in output
    deadline = time.monotonic() + 10  # for the resource tracker of multiprocessing
    while running_in_group(process.pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not running_in_group(process.pid)
    make_shards(configure(videos, out))
    assert contents(out) == contents(reference)


def test_check_tool_tells_what_is_wrong(
    reference: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    shutil.copytree(reference, out)
    sheet = tmp_path / "sheet.png"
    assert check_tool.main([str(out), "--decode", "--contact-sheet", str(sheet), "--clips", "5"]) == 0
    assert sheet.read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert "7 videos in 3 slots, 21 clips" in printed and "all is well" in printed

    first, second = sorted(out.glob("*.tar"))[:2]
    data = bytearray(first.read_bytes())
    data[2000] ^= 1
    first.write_bytes(data)
    second.write_bytes(second.read_bytes()[:-10240])
    (out / "train-slot00-000099.tar").write_bytes(b"")
    assert check_tool.main([str(out), "--contact-sheet", ""]) == 1
    errors = capsys.readouterr().err
    for words in ("SHA-256 differs", ": checksum", "bytes, expected", "000099.tar: not in the manifest"):
        assert words in errors
    assert check_tool.main(["s3://bucket/out"]) == 2
    assert "is a URL, expected a folder of this machine" in capsys.readouterr().err
    assert check_tool.main([str(tmp_path)]) == 2
    assert "manifest.json does not exist" in capsys.readouterr().err


def test_check_tool_tells_what_is_wrong_though_it_cannot_write_the_contact_sheet(
    reference: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    shutil.copytree(reference, out)
    (out / check_tool.DEFAULT_SHEET).mkdir()
    monkeypatch.setattr(check_tool, "LINE_SECONDS", 0.0)
    assert check_tool.main([str(out)]) == 0
    printed, errors = capsys.readouterr()
    assert printed.endswith("all is well\n")
    assert "no contact sheet ([Errno 21] Is a directory" in errors and "--contact-sheet FILE" in errors
    num_shards = len(list(out.glob("*.tar")))
    assert errors.count(" shards  ") == num_shards and f"{num_shards}/{num_shards} shards" in errors

    first = min(out.glob("*.tar"))
    first.write_bytes(first.read_bytes()[:-10240])
    assert check_tool.main([str(out)]) == 1
    errors = capsys.readouterr().err
    assert 0 < errors.index("PROBLEM") < errors.index("problems in") < errors.index("no contact sheet")


def test_check_counts_seconds_labels_and_repeated_videos(reference: Path, tmp_path: Path) -> None:
    """Against sums over the clips, of a whole folder and of one in which two blocks hold the same videos."""
    out = tmp_path / "out"
    shutil.copytree(reference, out)
    record = json.loads((out / "manifest.json").read_bytes())
    for entry in [entry for entry in record["shards"] if entry["index"] == 0 and entry["slot"] < 2]:
        copy = {**entry, "index": 9, "name": entry["name"].replace("-000000.", "-000009.")}
        for suffix in (".tar", ".idx"):
            shutil.copy(
                out / entry["name"].replace(".tar", suffix), out / copy["name"].replace(".tar", suffix)
            )
        record["shards"].append(copy)
    (out / "manifest.json").write_text(json.dumps(record))
    for folder in (reference, out):
        result = check_shards(folder)
        infos = []
        for shard in result.manifest.shards:
            with ShardReader(folder / shard.name) as reader:
                infos += [(shard, reader.read(position).info) for position in range(len(reader))]
        starts: dict[str, set[float]] = {}
        for _, info in infos:
            starts.setdefault(info.video_id, set()).add(info.start_seconds)
        counts = result.statistics
        assert (counts.num_clips, counts.num_videos) == (len(infos), len(starts))
        assert counts.num_distinct_clips == sum(map(len, starts.values()))
        assert counts.seconds_per_video == Counter(map(len, starts.values()))
        assert counts.labels == Counter(
            dict((info.video_id, info.label) for _, info in infos if info.label is not None).values()
        )
        assert counts.loudness_dbfs == Counter(info.loudness_dbfs for _, info in infos)
        if folder == reference:
            assert result.problems == []
            continue
        twice = [info.video_id for shard, info in infos if (shard.slot, shard.index) == (0, 9)]
        told = f"{len(twice)} videos are in a slot more than once, for example {twice[0]!r}"
        assert told in result.problems and "index 9: slots [0, 1], expected 0 to 2" in result.problems


def test_check_sees_slots_that_do_not_belong_together(reference: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(reference, out)
    record = json.loads((out / "manifest.json").read_bytes())
    for entry in record["shards"]:
        if entry["slot"] == 1 and entry["index"] == 0:
            entry["index"] = 7
    (out / "manifest.json").write_text(json.dumps(record))
    problems = check_shards(out).problems
    assert any("index 7: slots [1]" in problem for problem in problems)
    assert any("index 0: slots [0, 2]" in problem for problem in problems)


def test_log_mel_statistics_are_printed(reference: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("torch")
    assert check_tool.main([str(reference), "--contact-sheet", "", "--log-mel-stats", "3"]) == 0
    assert "log-mel of 3 clips: mean" in capsys.readouterr().out


# Worker processes.


def _behave(job: str) -> str:
    if job == "crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    if job == "hang":
        time.sleep(60)
    if job == "raise":
        raise RuntimeError("something of ours is broken")
    return job.upper()


def test_jobs_that_crash_or_hang_cost_only_themselves() -> None:
    jobs = ["a", "crash", "b", "hang", "c"]
    begin = time.monotonic()
    outcomes = dict(run_jobs(_behave, lambda: jobs.pop(0) if jobs else None, 2, limit_seconds=8))
    assert outcomes == {"a": "A", "b": "B", "c": "C", "crash": Lost("crash"), "hang": Lost("timeout")}
    assert time.monotonic() - begin < 40


def test_job_that_raises_stops_everything_with_its_traceback() -> None:
    jobs = ["raise"]
    with pytest.raises(JobFailed, match="something of ours is broken"):
        list(run_jobs(_behave, lambda: jobs.pop(0) if jobs else None, 1, limit_seconds=30))


def test_full_disk_is_an_error_and_not_the_fault_of_the_video(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full on this machine")
    monkeypatch.setattr("shards.ffmpeg._is_full", lambda folder: True)  # /dev/full always is
    command = [
        find_ffmpeg(),
        "-v",
        "error",
        "-f",
        "lavfi",
        "-i",
        "anullsrc=d=20",
        "-f",
        "wav",
        "-y",
        "/dev/full",
    ]
    with pytest.raises(OSError, match="No space left on device"):
        run_ffmpeg(command, tmp_path, 60)


def test_progress_listener_is_what_the_tool_gives() -> None:
    listener: ProgressListener = SilentProgress()
    listener.start(1, 0)


# Real videos.

ODD_VIDEOS = {
    "av1_video.mkv": ("no-audio", 0),
    "corrupted.mp4": ("no-audio", 0),
    "first_vid.mp4": ("no-video", 0),
    "h265_video.mp4": ("no-audio", 0),
    "mmaction2_demo.mp4": ("no-audio", 0),
    "no_duration.webm": ("silent", 0),
    "silence_girl.mp4": ("no-audio", 0),
    "tinyavi.avi": ("too-short", 0),
    "truncated_50pct.mkv": ("truncated", 4),  # 5.0 s of picture, 4.994 s of sound
    "truncated_60pct.mp4": ("undecodable", 0),
    "video_90.mov": ("no-audio", 0),
    "video_with_failing_audio.mp4": ("", 4),  # 11 whole seconds; the sound is zero after 4.x s
    "zero_bytes.mp4": ("undecodable", 0),
}


def test_odd_real_videos_have_the_right_reasons(
    real_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = real_data / "odd_videos"
    if not folder.is_dir():
        pytest.skip(f"no odd_videos in {real_data}")
    out = tmp_path / "out"
    assert make_tool.main(["--videos", str(folder), "--out", str(out), "--workers", "2"]) == 0
    rows = {row.path: row for row in read_report(out / "report.csv")}
    assert set(rows) == {path.name for path in folder.iterdir()}
    for name, (reason, num_clips) in ODD_VIDEOS.items():
        if name in rows:
            row = rows[name]
            assert (row.reason, row.num_clips) == (reason, num_clips), name
            assert row.status == ("kept" if num_clips else "skipped")
    assert check_shards(out, decode=True).problems == []
