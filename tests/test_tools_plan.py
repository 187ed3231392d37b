"""The plan's sums are right, ranges and origins go with them, and nothing that is not measured is called measured."""

import json
import re
from pathlib import Path

import pytest

import tools.plan
from cmac.config import PRESETS
from cmac.planning import Hardware, Rate, Rates, Training, exactly, plan, quantity
from tools.make_synthetic_videos import make_synthetic_videos


def rate(name: str, value: float, low: float = 0, high: float = 0, kind: str = "measured") -> Rate:
    return Rate(
        name=name, value=value, low=low or value, high=high or value, unit="", kind=kind, where=f"of {name}"
    )


RATES = Rates(
    videos=exactly("videos", 10_000, "", "given", "--videos"),
    kept=rate("kept", 0.5, 0.4, 0.8, "assumed"),
    video_seconds=exactly("seconds", 20, "", "given", "--seconds"),
    source_bytes=rate("source", 1000),
    prepare=rate("prepare", 10, 8, 16),
    clip_bytes=rate("clip", 50),
    feed=rate("feed", 0.01),
    step=rate("step", 100, 50, 200, "arithmetic"),
    scaling=rate("scaling", 0.8, 0.8, 1.0, "assumed"),
    checkpoint=exactly("checkpoint", 7, "", "counted", "the model"),
)


def lines(rates: Rates = RATES, **changes: int) -> dict[str, tuple[float, float, float, str]]:
    hardware = Hardware(gpus=4, nodes=2, cores=50)
    training = Training(**{"epochs": 36, "global_batch_size": 16, "num_slots": 10, **changes})
    found = [line for section in plan(rates, hardware, training).values() for line in section]
    return {line.name: (line.value, line.low, line.high, line.basis) for line in found}


def test_sums_of_a_small_plan_are_those_by_hand() -> None:
    found = {name: value for name, (value, *_) in lines().items()}
    assert found == pytest.approx(
        {
            "videos that give clips": 5000,
            "source files": 10_000 * 20 * 1000,
            "CPU time": 200_000 / 10 / 3600,
            "wall time on 100 cores": 200_000 / 10 / 3600 / 100,
            "read while preparing": 100 * 10 * 1000,
            "shards": 5000 * 10 * 50,
            "shard files": 50,
            "steps": 5000 * 36 / 16,
            "clips in all": 180_000,
            "all 8 GPUs": 640,
            "GPU time": 180_000 / 80 / 3600,
            "an epoch": 5000 / 640 / 3600,
            "the run": 180_000 / 640 / 3600 / 24,
            "cores that feed one GPU": 0.8,
            "cores that feed a node": 3.2,
            "read per epoch": 250_000,
            "read by a node": 4 * 80 * 50,
            "read by all nodes": 8 * 80 * 50,
            "a checkpoint": 7,
            "the 3 checkpoints kept": 21,
        }
    )


def test_ranges_and_origins_go_through_the_sums() -> None:
    found = lines()
    value, low, high, basis = found["GPU time"]
    assert (low, high) == pytest.approx((10_000 * 0.4 * 36 / 200 / 3600, 10_000 * 0.8 * 36 / 40 / 3600))
    assert low < value < high and basis == "arithmetic + assumed"
    assert found["CPU time"][1:3] == pytest.approx((200_000 / 16 / 3600, 200_000 / 8 / 3600))
    assert found["CPU time"][3] == "measured" and found["a checkpoint"][3] == "counted"
    assert found["shards"][3] == "measured + assumed"


def test_what_is_measured_twice_is_named_once() -> None:
    once = rate("a", 2, 1, 4)
    squared = quantity("square", "", [quantity("b", "", [once]), once], [once, 2.0])
    assert squared.rests_on == (once,)
    assert (squared.value, squared.low, squared.high) == (1, 1 * 1 / 4 / 2, 4 * 4 / 1 / 2)


def test_impossible_plans_are_refused() -> None:
    with pytest.raises(ValueError, match="8 GPUs do not divide the batch of 12"):
        lines(global_batch_size=12)
    with pytest.raises(ValueError, match="cores is 0"):
        Hardware(gpus=1, cores=0)
    with pytest.raises(ValueError, match="x is 3 with the range 4 to 5"):
        rate("x", 3, 4, 5)


def document(capsys: pytest.CaptureFixture, *arguments: str) -> dict:
    assert tools.plan.main([*arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def by_name(rows: list[dict]) -> dict[str, dict]:
    return {row["name"]: row for row in rows}


def test_rates_come_from_the_result_files_and_name_commit_and_hardware(capsys: pytest.CaptureFixture) -> None:
    plan_ = document(capsys, "--dataset", "audioset", "--gpus", "8", "--gpu", "h200")
    rates = by_name(plan_["rates"])
    for name, file in [
        ("making clips", "make_shards"),
        ("clip bytes", "loader_throughput"),
        ("feeding a GPU", "loader_throughput"),
    ]:
        rows = [json.loads(line) for line in (tools.plan.RESULTS / f"{file}.jsonl").read_text().splitlines()]
        assert rates[name]["kind"] == "measured"
        used = [
            row for row in rows if f"{row['variant']}; commit {row['commit'][:7]}" in rates[name]["where"]
        ]
        assert used and f"{file}.jsonl" in rates[name]["where"] and used[0]["cpu"] in rates[name]["where"]
    rows = [json.loads(line) for line in (tools.plan.RESULTS / "make_shards.jsonl").read_text().splitlines()]
    newest = max(rows, key=lambda row: row["utc"])
    assert rates["making clips"]["value"] == newest["clips_per_second"]["median"]
    assert plan_["training"]["preset"] == "pretrain-audioset"
    assert set(by_name(plan_["quantities"])["GPU time"]["rests_on"]) <= set(rates)


def results(folder: Path, **changes: float) -> Path:
    """Result files with round numbers."""
    values = {"prepare": 20.0, "clip": 1000.0, "feed": 0.01, **changes}
    common = {"commit": "abcdef0123", "dirty": False, "cpu": "CPU", "usable_cores": 2, "gpu": None}
    common["utc"] = "2026-01-02T00:00:00+00:00"

    def spread(value: float) -> dict[str, float]:
        return {"median": value, "p20": value / 2, "p80": value * 2}

    slices = {"benchmark": "make_shards", "variant": "generated", "config": {"preset": "medium"}, **common}
    slices["clips_per_second"] = spread(values["prepare"])
    older = {**slices, "utc": "2026-01-01T00:00:00+00:00", "clips_per_second": spread(1.0)}
    config = {"num_clips": 9, "source": "videos"}
    loader = {"benchmark": "loader_throughput", "config": config, "clips_per_second": spread(10.0), **common}
    reads = {**loader, "variant": "ladder: read", "read_bytes_per_second": 10 * values["clip"]}
    feeds = {**loader, "variant": "ladder: workers for a GPU", "cpu_seconds_per_clip": values["feed"]}
    failed = {**loader, "variant": "ladder: read", "clips_per_second": None, "utc": "2027-01-01"}
    folder.mkdir(exist_ok=True)
    for name, rows in {"make_shards": [slices, older], "loader_throughput": [reads, feeds, failed]}.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_a_changed_rate_changes_the_result(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    def cost(**changes: float) -> dict[str, float]:
        arguments = [
            "--dataset",
            "k400",
            "--results",
            str(results(tmp_path / "r", **changes)),
            "--cores",
            "10",
        ]
        found = by_name(document(capsys, *arguments)["quantities"])
        return {name: row["value"] for name, row in found.items()}

    before, after = cost(), cost(prepare=40.0, clip=2000.0)
    assert before["CPU time"] == pytest.approx(240_000 * 10 / 20 / 3600)
    assert after["CPU time"] == pytest.approx(before["CPU time"] / 2)
    assert before["shards"] == pytest.approx(220_000 * 10 * 1000)
    assert after["shards"] == pytest.approx(before["shards"] * 2)
    assert after["GPU time"] == before["GPU time"]


def test_gpu_rates_are_arithmetic_until_a_benchmark_has_timed_them(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    folder = results(tmp_path / "r")
    arguments = ["--dataset", "k400", "--gpu", "H100", "--results", str(folder)]
    guess = by_name(document(capsys, *arguments)["rates"])["training step"]
    assert guess["kind"] == "arithmetic" and guess["low"] < guess["value"] < guess["high"]
    assert "no H100 has been timed" in guess["where"]
    assert tools.plan.main(arguments) == 0
    text = capsys.readouterr().out
    assert (
        "arithmetic, not measured: no H100" in text
        and "measured: benchmarks/results/make_shards.jsonl" in text
    )
    row = {
        "benchmark": "train_step",
        "commit": "fedcba9876",
        "utc": "2026-05-05T",
        "usable_cores": 1,
        "cpu": "c",
    }
    row |= {"gpu": "NVIDIA H100 80GB HBM3", "dirty": True}
    timed = [
        {
            **row,
            "variant": f"batch {batch}: {name}",
            "config": {"batch": batch, "size": size},
            "clips_per_second": {"median": clips, "p20": clips - 1, "p80": clips + 1},
        }
        for batch, name, size, clips in [
            (16, "ours", "paper", 111.0),
            (128, "ours", "paper", 222.0),
            (16, "stock", "paper", 333.0),
            (16, "ours", "tiny", 444.0),
        ]
    ]
    (folder / "train_step.jsonl").write_text("".join(json.dumps(each) + "\n" for each in timed))
    for gpus, clips in [("8", 111.0), ("1", 222.0)]:
        measured = by_name(document(capsys, *arguments, "--gpus", gpus)["rates"])["training step"]
        assert measured["kind"] == "measured" and measured["value"] == clips
        assert "commit fedcba9 with changes; NVIDIA H100" in measured["where"]
    other = by_name(document(capsys, *arguments[:2], "--gpu", "h200", *arguments[4:])["rates"])[
        "training step"
    ]
    assert other["kind"] == "arithmetic"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dataset", "k600"], "--dataset is 'k600', expected one of k400, audioset"),
        (["--dataset", "k400", "--gpu", "v100"], "--gpu is 'v100', expected one of a100, h100, h200"),
        ([], "neither --dataset .* nor --videos is given"),
        (["--videos", "0"], "--videos is 0, expected more than 0"),
        (["--videos", "9", "--seconds", "nan"], "--seconds is nan, expected more than 0"),
        (["--videos", "9", "--kept", "2"], "--kept is 2, expected more than 0 and at most 1"),
        (["--videos", "9", "--gpus", "7"], "7 GPUs do not divide the batch of 128"),
        (
            ["--videos", "9", "--results", "/nowhere"],
            "/nowhere/make_shards.jsonl has no row.*benchmarks/make_shards.py",
        ),
    ],
)
def test_wrong_arguments_are_named(arguments: list[str], message: str, capsys: pytest.CaptureFixture) -> None:
    assert tools.plan.main(arguments) == 2
    assert re.search(message, capsys.readouterr().err)


def test_shard_making_can_be_measured_on_the_users_videos(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    make_synthetic_videos(tmp_path / "v", 3, seconds=2.0)
    rates = by_name(document(capsys, "--videos", "100", "--measured-here", str(tmp_path / "v"))["rates"])
    for name in ("making clips", "clip bytes", "source bytes"):
        assert rates[name]["kind"] == "measured" and "here, now: 3 of the videos in" in rates[name]["where"]
    assert 1000 < rates["clip bytes"]["value"] < 500_000


def test_audioset_has_as_many_clips_as_kinetics_and_as_long_a_warm_up() -> None:
    sounds, actions = PRESETS["pretrain-audioset"](), PRESETS["pretrain-k400"]()
    videos = {name: round(each.videos.value * each.kept.value) for name, each in tools.plan.DATASETS.items()}
    clips = {"audioset": sounds.epochs * videos["audioset"], "k400": actions.epochs * videos["k400"]}
    assert clips["audioset"] == pytest.approx(clips["k400"], rel=0.05)
    warm_up = sounds.optimizer.warmup_epochs * videos["audioset"]
    assert warm_up == pytest.approx(actions.optimizer.warmup_epochs * videos["k400"], rel=0.05)
