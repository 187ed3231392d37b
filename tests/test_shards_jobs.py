"""What a worker of make_shards does when its machine is not as that which started the run, or another run meddles."""

import dataclasses
import re
import socket
from pathlib import Path

import pytest
from fake_servers import FaultyServer
from make_shards_worker import FAST, configure

from shards import jobs, storage
from shards.ffmpeg import ffmpeg_version, find_ffmpeg
from shards.jobs import BlockJob, RunSettings, SliceJob, do_job
from shards.make import run_settings
from shards.results import result_location
from shards.sources import SourceVideo
from tools.make_synthetic_videos import make_flash_beep_video


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_flash_beep_video(tmp_path_factory.mktemp("video") / "video.mp4", seconds=1.2)


@pytest.fixture
def run(tmp_path: Path) -> RunSettings:
    """Settings of a run whose work area is there."""
    program = find_ffmpeg()
    config = configure(tmp_path, tmp_path / "out", slicing=dataclasses.replace(FAST, max_clips=1))
    (tmp_path / "work").mkdir()
    (tmp_path / "out").mkdir()
    return dataclasses.replace(
        run_settings(config, program, ffmpeg_version(program), str(tmp_path / "work")),
        temporary=str(tmp_path),
    )


def job(run: RunSettings, path: Path | str, video_id: str = "video.mp4") -> SliceJob:
    source = SourceVideo(video_id=video_id, path=str(path), label="x", key_hash="0" * 16)
    return SliceJob(number=0, source=source, run=run)


def test_a_listed_video_that_was_deleted_is_missing(run: RunSettings, tmp_path: Path) -> None:
    (tmp_path / "class").mkdir()
    (tmp_path / "class" / "other.mp4").write_bytes(b"")
    assert do_job(job(run, tmp_path / "class" / "video.mp4")).reason == "missing"


@pytest.mark.parametrize("mount", ["absent", "empty"])
def test_a_machine_without_the_folder_of_videos_is_named_and_no_video_is_blamed(
    run: RunSettings, tmp_path: Path, mount: str
) -> None:
    if mount == "empty":
        (tmp_path / "class").mkdir()
    expected = rf"^{re.escape(socket.gethostname())}: {tmp_path}/class is not there or empty, expected .*; mount them"
    with pytest.raises(OSError, match=expected):
        do_job(job(dataclasses.replace(run, host="head"), tmp_path / "class" / "video.mp4"))
    assert not Path(result_location(run.work, 0)).exists()


def test_the_machine_that_started_the_run_is_not_named(run: RunSettings, tmp_path: Path) -> None:
    with pytest.raises(OSError, match=f"^{tmp_path}/class is not there"):
        do_job(job(run, tmp_path / "class" / "video.mp4"))


def test_a_result_of_another_video_is_not_taken(run: RunSettings, video: Path) -> None:
    """As workers of an earlier run leave one that still work after the folder was deleted and begun again."""
    assert do_job(job(run, video, "other.mp4")).path == "other.mp4"
    with pytest.raises(OSError, match="is of 'other.mp4', expected 'video.mp4': workers of another run"):
        do_job(BlockJob(index=0, first=0, sources=(job(run, video).source,), run=run))
    assert do_job(job(run, video)).path == "video.mp4"
    assert do_job(job(run, video)).status == "kept"
    record = do_job(BlockJob(index=0, first=0, sources=(job(run, video).source,), run=run))
    assert [row["path"] for row in record["rows"]] == ["video.mp4"]


def test_an_endless_answer_is_too_large(run: RunSettings, tmp_path: Path) -> None:
    (tmp_path / "video.mp4").write_bytes(bytes(1 << 16))
    with FaultyServer(tmp_path) as server:
        server.always["video.mp4"] = "endless"
        limited = dataclasses.replace(run, max_source_bytes=1 << 20)
        assert do_job(job(limited, f"{server.url}/video.mp4")).reason == "too-large"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "video.mp4", "work"]


def test_a_url_that_fails_while_another_can_be_read_is_left_out_if_asked_for(
    run: RunSettings, video: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jobs, "RETRY", storage.Retry(total_seconds=0.3, first_wait=0.1))
    monkeypatch.setattr(jobs, "PROBE", storage.Retry(total_seconds=0.1, first_wait=0.1))
    monkeypatch.setattr(jobs, "_last_url", None)
    skipping = dataclasses.replace(run, skip_unavailable=True)
    (video.parent / "bad.mp4").write_bytes(b"x")
    with FaultyServer(video.parent) as server:
        server.always["bad.mp4"] = "503"
        bad = job(skipping, f"{server.url}/bad.mp4", "bad.mp4")
        with pytest.raises(storage.SourceError, match="bad.mp4"):  # nothing has been read yet
            do_job(bad)
        assert (
            do_job(dataclasses.replace(job(skipping, f"{server.url}/video.mp4"), number=1)).status == "kept"
        )
        with pytest.raises(storage.SourceError, match="bad.mp4.* with --skip-unavailable"):
            do_job(dataclasses.replace(bad, run=run))
        server.always["video.mp4"] = "403"  # what could be read cannot any more
        with pytest.raises(storage.SourceError, match="bad.mp4"):
            do_job(bad)
        del server.always["video.mp4"]
        assert do_job(bad).reason == "unreachable"


def test_temporary_folders_are_looked_through_once_in_a_while(
    run: RunSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Path] = []
    monkeypatch.setattr(jobs, "_is_abandoned", lambda folder: seen.append(folder))
    (tmp_path / f"{jobs.FOLDER_PREFIX}x").mkdir()
    for _ in range(3):
        with jobs._temporary_folder(run):
            pass
    assert len(seen) == 1
