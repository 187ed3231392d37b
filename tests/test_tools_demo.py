"""The demo driver end to end, tiny: the generated world, the same again, and a folder of somebody's videos."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tools.demo import choose_videos, run_name

ROOT = Path(__file__).resolve().parents[1]
WORLD_FIGURES = [
    f"{kind}_{measure}_{part}"
    for kind in ("predicted", "guided")
    for measure in ("pointing", "prefers_sounding")
    for part in ("easy", "hard")
]
RETRIEVAL = ["retrieval_v2a_r1", "retrieval_a2v_r1"]


def demo(*arguments: object) -> subprocess.CompletedProcess:
    command = [sys.executable, "tools/demo.py", *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=400, check=False
    )


@pytest.fixture(scope="module")
def world_run(tmp_path_factory) -> Path:
    run_dir = tmp_path_factory.mktemp("demo") / "run"
    result = demo("--run", run_dir, "--train-videos", 16, "--test-videos", 16, "--steps", 3)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    assert str(run_dir / "report.html") in result.stdout
    return run_dir


@pytest.mark.slow
def test_demo_goes_from_nothing_to_report_and_figures(world_run):
    metrics = json.loads((world_run / "metrics.json").read_text())
    for name in (*WORLD_FIGURES, *RETRIEVAL):
        assert {"value", "chance", "untrained", "num_clips"} <= metrics[name].keys(), name
        assert 0 <= metrics[name]["value"] <= 1
    assert metrics["train_seconds"] > 0 and metrics["clips_per_second"] > 0
    assert 0 <= metrics["data_wait_fraction"] <= 1
    assert (world_run / "report.html").stat().st_size > 50_000


@pytest.mark.slow
def test_second_demo_reuses_what_is_there(world_run):
    shards = {path: path.stat().st_mtime_ns for path in world_run.rglob("*.tar")}
    videos = {path: path.stat().st_mtime_ns for path in world_run.rglob("*.mp4")}
    log = (world_run / "log.jsonl").read_bytes()
    result = demo("--run", world_run, "--train-videos", 16, "--test-videos", 16, "--steps", 3)
    assert result.returncode == 0, result.stderr[-2000:]
    assert "at step 3" in result.stdout and (world_run / "log.jsonl").read_bytes() == log
    assert shards and {path: path.stat().st_mtime_ns for path in shards} == shards
    assert videos and {path: path.stat().st_mtime_ns for path in videos} == videos


@pytest.mark.slow
def test_demo_on_ones_own_videos_has_no_figures_that_need_truth(world_run, tmp_path):
    videos = tmp_path / "my videos $(x)"
    videos.mkdir()
    for video in sorted((world_run / "world/train").glob("*.mp4"))[:6]:
        (videos / video.name).symlink_to(video)
    result = demo("--run", tmp_path / "run", "--videos", videos, "--steps", 2)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    metrics = json.loads((tmp_path / "run/metrics.json").read_text())
    assert set(RETRIEVAL) <= metrics.keys() and not set(WORLD_FIGURES) & metrics.keys()
    assert (tmp_path / "run/report.html").is_file()


def test_large_folders_are_sampled_and_equal_names_kept_apart(tmp_path, capsys):
    for index in range(9):
        (tmp_path / f"{index}.mp4").touch()
    arguments = choose_videos(tmp_path, 4, tmp_path / "run/list.txt")
    chosen = (tmp_path / "run/list.txt").read_text().splitlines()
    assert arguments[-2:] == ["--list", str(tmp_path / "run/list.txt")]
    assert len(set(chosen)) == 4 and "9 videos" in capsys.readouterr().out
    assert choose_videos(tmp_path, 9, tmp_path / "unused.txt") == ["--videos", str(tmp_path)]
    assert run_name(Path("/a/videos")) != run_name(Path("/b/videos"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--videos", "/nowhere"], "no such folder"), (["--steps", "0"], "--steps is 0, expected at least 1")],
)
def test_wrong_arguments_are_explained(arguments, message):
    result = demo(*arguments)
    assert result.returncode == 2 and message in result.stderr
