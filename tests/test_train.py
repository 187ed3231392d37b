"""train.py as a user runs it: videos to shards to a checkpoint, one process and two, stopped and resumed."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import cmac
import train
from cmac.checkpoint import list_checkpoints
from tools import make_shards, make_world

ROOT = Path(__file__).resolve().parents[1]
SMALL = (
    "--loader.global-batch-size 8 --loader.video.num-frames 4 --loader.video.short-side 36 --loader.video.crop-size 32 "
    "--model.video.widths 8 16 --model.video.blocks 1 1 --model.audio.widths 8 16 --model.audio.blocks 1 1 "
    "--model.filter-channels 16 --model.embedding-dim 8 --model.queue-length 50 --log-every 1 --cpu-threads 1"
).split()


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    """Sixteen generated videos as shards."""
    folder = tmp_path_factory.mktemp("train")
    world = ["--train-videos", "16", "--test-videos", "2", "--train-seconds", "4", "--workers", "2"]
    assert make_world.main(["--out", str(folder / "world"), *world]) == 0
    out = ["--out", str(folder / "shards"), "--max-clips", "3", "--videos-per-shard", "5", "--workers", "2"]
    assert make_shards.main(["--videos", str(folder / "world/train"), *out, "--preset", "ultrafast"]) == 0
    return folder / "shards"


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


def test_killed_run_ends_where_an_unbroken_one_does(shards, tmp_path):
    """SIGKILL in the middle, the same command again: weights and queues bit for bit, rows once each."""
    options = ["--max-steps", "24", "--checkpoint-every", "5"]
    run(shards, tmp_path / "whole", *options)
    started = subprocess.Popen(
        command(shards, tmp_path / "run", *options),
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 120
    while not list_checkpoints(tmp_path / "run/checkpoints") and started.poll() is None:
        assert time.monotonic() < deadline, "no checkpoint within two minutes"
        time.sleep(0.02)
    started.send_signal(signal.SIGKILL)
    started.wait()
    run(shards, tmp_path / "run", *options)
    whole, resumed = (cmac.load_checkpoint(tmp_path / name)[0].state_dict() for name in ("whole", "run"))
    for name, value in whole.items():
        assert torch.equal(value, resumed[name]), name
    losses = [[(row["step"], row["loss"]) for row in rows(tmp_path / name)] for name in ("whole", "run")]
    assert losses[0] == losses[1]


def test_two_ranks_train_on_uneven_shards_and_resume_exactly(shards, tmp_path):
    """Sixteen videos in shards of five, five, five and one; at last the run goes on with one rank."""
    options = ("--model.batch-norm", "shuffle", "--optimizer.schedule", "constant")
    run(shards, tmp_path / "whole", "--max-steps", "5", *options, processes=2)
    assert [row["step"] for row in rows(tmp_path / "whole")] == [1, 2, 3, 4, 5]
    for steps in ("3", "5"):
        run(shards, tmp_path / "run", "--max-steps", steps, *options, processes=2)
    whole, resumed = (cmac.load_checkpoint(tmp_path / name)[0].state_dict() for name in ("whole", "run"))
    for name, value in whole.items():
        # Batch-norm statistics are each rank's own, and the checkpoint holds the first rank's.
        assert torch.equal(value, resumed[name]), name
    result = run(shards, tmp_path / "run", "--max-steps", "7", *options)
    assert "at step 5" in result.stdout
    assert [row["step"] for row in rows(tmp_path / "run")] == [1, 2, 3, 4, 5, 6, 7]


def test_a_rank_that_fails_ends_all(shards, tmp_path):
    """Clips that do not decode reach one rank's budget or the other's; neither may wait for its partner for ever."""
    damaged = tmp_path / "damaged"
    shutil.copytree(shards, damaged)
    for tar in damaged.glob("*.tar"):
        content = bytearray(tar.read_bytes())
        for start in range(0, len(content), 1024):
            content[start + 700 : start + 720] = b"\0" * 20
        tar.write_bytes(content)
    options = ("--max-steps", "60", "--loader.max-bad-fraction", "0")
    result = subprocess.run(
        command(damaged, tmp_path / "run", *options, processes=2),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert result.returncode != 0
    assert "clips are bad" in result.stderr and "check_shards" in result.stderr


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
