"""The benchmarks of the training step and of its parts: small runs, wrong and failing contenders, the roofline."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import losses, train_step
from benchmarks.roofline import Pointwise, step_costs
from benchmarks.timing import attempt, check_close, count_launches, ratios, time_interleaved
from cmac.losses import LossConfig
from cmac.model import ModelConfig

ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")
ROW_FIELDS = {"benchmark", "variant", "config", "status", "reason", "ceiling", "commit", "utc", "libraries"}


def run(
    script: str, results: Path, *arguments: str, status: int = 0, **environment: str
) -> tuple[list[str], dict[str, Any], list[dict[str, Any]]]:
    """(lines, last line, rows) of a benchmark in a process of its own, on the CPU."""
    command = [sys.executable, f"benchmarks/{script}.py", "--device", "cpu", "--results", str(results)]
    done = subprocess.run(
        [*command, *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )
    assert done.returncode == status, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    rows = [json.loads(line) for line in (results / f"{script}.jsonl").read_text().splitlines()]
    assert all(row.keys() >= ROW_FIELDS for row in rows)
    return lines, json.loads(lines[-1]), rows


def test_the_step_is_timed_beside_stock_and_failures_are_kept(tmp_path: Path):
    names = ["stock", "ours, reference", "ours, padded", "ours, checkpointing", "ours, apex", "shuffle"]
    arguments = ["--only", *names, "--rounds", "2", "--steps", "1", "--batch", "4"]
    lines, last, rows = run("train_step", tmp_path, *arguments)
    assert lines[0].startswith("ceiling: copy ") and "TFLOP/s" in lines[0]
    table = next(n for n, line in enumerate(lines) if line.startswith("batch 4: clips/s"))
    assert any(line.startswith("roofline at batch 4") for line in lines[:table])
    assert last.keys() >= {
        "benchmark",
        "device",
        "ceiling",
        "roofline",
        "results",
        "fastest",
        "targets",
        "wrong",
    }
    assert last["ceiling"]["copy_bytes_per_second"] > 1e8 and last["ceiling"]["matmul_flops"] > 1e8
    assert last["targets"] == [] and last["wrong"] == []  # targets are for a GPU
    results = last["results"]["4"]
    shuffled = [name for name in results if name.startswith("shuffle")]
    assert results.keys() == {*names, *shuffled} and len(rows) == len(results)
    for name, result in results.items():
        if name == "ours, apex":
            assert result["status"] == "failed" and "apex" in result["reason"]
            assert result["clips_per_second"] is None
            continue
        assert result["status"] == "timed", result["reason"]
        assert result["clips_per_second"]["median"] > 0 and result["step_milliseconds"]["p80"] > 0
        assert result["ratio_to_stock"]["median"] > 0 and result["fraction_of_roofline"] > 0
        assert max(result["first_step_relative_difference"].values()) < 1e-4
        assert result["gradient_cosine"] > 0.999
    assert results["stock"]["ratio_to_stock"]["median"] == 1
    assert last["fastest"]["4"] in ("ours, reference", "ours, padded")
    by_name = {row["config"]["name"]: row for row in rows}
    assert by_name["ours, padded"]["config"]["compute"]["pad_channels"] is True
    assert by_name["ours, padded"]["repeats"] == 2 and by_name["ours, apex"]["repeats"] == 0


@pytest.mark.parametrize("fault", ["loss", "gradients", "nothing finite"])
def test_a_step_that_computes_something_else_is_reported(
    fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    build = train_step.Trial.__init__

    def build_wrong(trial: train_step.Trial, contender: train_step.Contender, *arguments: Any) -> None:
        build(trial, contender, *arguments)
        if contender.name != "ours":
            return
        model = trial.step.model
        if fault == "loss":
            model.loss_config = LossConfig(temperature=0.0701)
        elif fault == "nothing finite":
            model.heads["shared"].weight.data.fill_(float("nan"))
        else:
            for parameter in model.audio.parameters():
                parameter.register_hook(lambda gradient: -gradient)

    monkeypatch.setattr(train_step.Trial, "__init__", build_wrong)
    arguments = ["--device", "cpu", "--only", "stock", "ours", "ours, reference", "--batch", "4"]
    assert train_step.main([*arguments, "--rounds", "1", "--steps", "1", "--results", str(tmp_path)]) == 1
    out = capsys.readouterr().out
    assert "WRONG RESULT: batch 4: ours: " in out
    last = json.loads(out.splitlines()[-1])
    wrong = last["results"]["4"]["ours"]
    assert wrong["status"] == "wrong" and ("cosine" in wrong["reason"]) == (fault != "loss")
    assert last["fastest"] == {"4": "ours, reference"}  # however fast the wrong one is
    assert len(last["wrong"]) == 1 and wrong["clips_per_second"] is not None
    assert (wrong["gradient_cosine"] is None) == (fault == "nothing finite")


def test_the_parts_are_timed_and_failures_are_kept(tmp_path: Path):
    only = ["--only", "InfoNCE 8x150", "consistency 2", "batch norm 7", "optimizer"]
    contenders = [
        "--contenders",
        "eager",
        "SDPA",
        "fused",
        "for loop",
        "torch foreach",
        "ours: torch",
        "ours: apex",
    ]
    lines, last, rows = run("losses", tmp_path, *only, *contenders, "--rounds", "2")
    assert lines[0].startswith("ceiling: copy ")
    assert last.keys() >= {"benchmark", "device", "ceiling", "results", "targets", "wrong", "seconds"}
    assert len(rows) == sum(map(len, last["results"].values())) == 2 * 3 + 2 + 2 + 4
    for name, results in last["results"].items():
        for contender, result in results.items():
            if contender in ("fused", "ours: apex"):
                assert result["status"] == "failed" and result["milliseconds"] is None
                assert ("TRITON_INTERPRET=1 is not set" in result["reason"]) == (contender == "fused")
            else:
                assert result["status"] == "timed", result["reason"]
                assert result["milliseconds"]["median"] > 0 and result["ratio"]["median"] > 0
                assert result["relative_errors"] and max(result["relative_errors"].values()) < 0.03, name
    assert last["results"]["consistency 2 clips"]["eager"]["launches"] > 60
    assert last["results"]["batch norm 7"]["eager"]["effective_bytes_per_second"]["backward"]["median"] > 0


def test_interpreted_kernels_are_right_and_consistency_has_six_launches(tmp_path: Path):
    pytest.importorskip("triton")
    only = ["--only", "InfoNCE 8x150 bf", "consistency 2", "batch norm 7", "--contenders", "fused"]
    _, last, _ = run("losses", tmp_path, *only, "--rounds", "1", TRITON_INTERPRET="1")
    assert all(results["fused"]["status"] == "timed" for results in last["results"].values())
    assert last["results"]["consistency 2 clips"]["fused"]["launches"] == 6


def test_without_a_compiler_torch_compile_leaves_a_row_that_says_so(tmp_path: Path):
    environment = {"CXX": "/no/such/compiler", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    only = ["--only", "batch norm 7", "--contenders", "eager", "torch.compile", "--rounds", "1"]
    _, last, rows = run("losses", tmp_path, *only, **environment)
    results = last["results"]["batch norm 7"]
    assert results["eager"]["status"] == "timed" and results["torch.compile"]["status"] == "failed"
    assert "compiler" in results["torch.compile"]["reason"].lower()
    assert [row["status"] for row in rows] == ["timed", "failed"]


def test_a_loss_that_computes_something_else_is_reported(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    right = losses.SdpaContrastiveLoss.apply

    class Wrong:
        @staticmethod
        def apply(*arguments: Any) -> Tensor:
            return right(*arguments) * 1.001

    monkeypatch.setattr(losses, "SdpaContrastiveLoss", Wrong)
    arguments = ["--device", "cpu", "--only", "InfoNCE 8x150 float32", "--contenders", "eager", "SDPA"]
    assert losses.main([*arguments, "--rounds", "1", "--no-append"]) == 1
    out = capsys.readouterr().out
    assert "WRONG RESULT: InfoNCE 8x150 float32: SDPA: loss differs by 1" in out
    assert json.loads(out.splitlines()[-1])["results"]["InfoNCE 8x150 float32"]["SDPA"]["status"] == "wrong"


def test_the_command_lines_refuse_nonsense(capsys: pytest.CaptureFixture[str]):
    assert train_step.main(["--only", "no such contender"]) == 2
    assert (
        "'no such contender' is part of no contender's name, expected one of: stock; "
        in capsys.readouterr().out
    )
    assert train_step.main(["--only", "stock", "--without", "stock"]) == 2
    assert losses.main(["--device", "cpu", "--only", "no such problem"]) == 2
    assert "InfoNCE 8x150 bfloat16" in capsys.readouterr().out
    for arguments, message in ((["--rounds", "0"], "--rounds is 0"), (["--batch", "1"], "at least 2")):
        with pytest.raises(SystemExit):
            train_step.parse(arguments)
        assert message in capsys.readouterr().err


def test_contenders_without_time_left_are_named(capsys: pytest.CaptureFixture[str]):
    arguments = ["--device", "cpu", "--only", "stock", "ours, reference", "--batch", "4", "--no-append"]
    assert train_step.main([*arguments, "--limit", "0"]) == 0
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert {result["status"] for result in last["results"]["4"].values()} == {"left out"}
    assert last["fastest"] == {}


def test_targets_are_met_or_missed():
    def result(name: str, milliseconds: list[float], gigabytes: float) -> train_step.Result:
        contender = next(c for c in train_step.build_contenders() if c.name == name)
        seconds = {n: value / 1000 for n, value in enumerate(milliseconds)}
        return train_step.Result(contender, seconds=seconds, peak_bytes=int(gigabytes * 1e9))

    results = [
        result("stock", [900, 880], 100),
        result("stock, channels-last", [500, 510], 90),
        result("ours", [400, 410], 96),
        result("ours, checkpointing", [460, 470], 39),
    ]
    claims = {claim["claim"]: claim for claim in train_step.compare_with_targets({16: results, 128: results})}
    met = {name.removeprefix("batch 128: "): claim["met"] for name, claim in claims.items()}
    assert met == {
        "clips/s of ours": True,
        "x stock": True,
        "x best stock": True,
        "bytes of ours": False,
        "bytes with checkpointing": True,
        "time with checkpointing / without": True,
    }
    assert claims["batch 128: x best stock"]["value"] == pytest.approx((500 / 400 + 510 / 410) / 2)


def test_wrong_and_checkpointing_contenders_are_never_the_fastest():
    results = [train_step.Result(c, seconds={0: 1.0}) for c in train_step.build_contenders()]
    for each in results:
        if not each.contender.plain or each.contender.name == "ours":
            each.seconds[0] = 0.5
        if each.contender.name == "ours":
            each.status = "wrong"
        if each.contender.name == "ours, padded":
            each.seconds[0] = 0.8
    assert train_step.fastest_of(results, stock=False).contender.name == "ours, padded"
    assert train_step.fastest_of(results, stock=True).contender.is_stock


def test_the_roofline_counts_the_papers_step():
    costs = step_costs(ModelConfig(), (3, 32, 128, 128), (1, 257, 101))
    # R(2+1)D-18 and ResNet-9, students forward and backward and momentum encoders: 849 GFLOP; g and h: 12.
    assert costs.flops() / 1e9 == pytest.approx(861, abs=1)
    assert costs.traffic(fused=False, element_bytes=2) / 1e9 == pytest.approx(9.0, abs=0.1)
    assert costs.traffic(fused=True, element_bytes=2) / 1e9 == pytest.approx(6.7, abs=0.1)
    ceiling = {"copy_bytes_per_second": 4.3e12, "matmul_flops": 790e12}
    options = {"num_clips": 128, "element_bytes": 2}
    eager, fused = (costs.clips_per_second(ceiling, fused=f, **options) for f in (False, True))
    assert 370 < eager < 380 and 460 < fused < 485
    # With arithmetic for nothing, memory traffic alone decides, the optimizer's included.
    ceiling["matmul_flops"] = 1e30
    update = 4 * (5 * costs.num_parameters + 3 * costs.num_key_parameters) / 128
    expected = 4.3e12 / (costs.traffic(False, 2) + update)
    assert costs.clips_per_second(ceiling, fused=False, **options) == pytest.approx(expected)


def test_traffic_of_a_batch_norm_by_hand():
    plain = Pointwise(10, norm=True, relu=True, shortcut=False, has_keys=True)
    assert plain.traffic(fused=False) == (50, 80) and plain.traffic(fused=True) == (30, 50)
    added = dataclasses.replace(plain, shortcut=True)
    assert added.traffic(fused=False) == (80, 110) and added.traffic(fused=True) == (40, 110)


def test_turns_are_interleaved_and_a_contender_that_fails_ends_alone():
    calls: list[str] = []

    def breaks(_: None) -> None:
        calls.append("b")
        if calls.count("b") == 2:
            raise RuntimeError("no more\nof this")

    contenders = {"a": [lambda _: calls.append("a")], "b": [breaks], "c": [lambda _: calls.append("c")]}
    times, failed = time_interleaved(contenders, CPU, rounds=3, warm_up=0, max_seconds=9)
    assert "".join(calls) == "abcabcac"
    assert failed == {"b": "RuntimeError: no more"} and len(times["a"]) == len(times["c"]) == 3


def test_a_failure_keeps_nothing_alive():
    import weakref

    kept: list[weakref.ref] = []

    def fails() -> None:
        tensor = torch.zeros(3)
        kept.append(weakref.ref(tensor))
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 TiB")

    assert attempt(fails, CPU) == (None, "out of memory: CUDA out of memory. Tried to allocate 1 TiB")
    assert kept[0]() is None


def test_differences_are_relative_and_not_a_number_is_wrong():
    expected = torch.tensor([0.0, 4.0])
    assert check_close("x", torch.tensor([0.2, 4.0]), expected, 0.06) == pytest.approx(0.05)
    assert check_close("x", torch.tensor([0.3, 4.4]), expected, 0.13, mean_square=True) == pytest.approx(
        0.125
    )
    for wrong in ([0.2, 5.0], [0.0, float("nan")], [0.0, 4.0, 0.0]):
        with pytest.raises(Exception, match="^x "):
            check_close("x", torch.tensor(wrong), expected, 0.06)
    assert ratios([], []) is None and ratios([1, 2], [3, 3])["median"] == pytest.approx(2.25)


def test_views_and_allocations_are_no_launches():
    x = torch.ones(4, 6)
    assert count_launches(lambda: x.view(24)[3:].unsqueeze(0).mul(2).add_(1), CPU) == 2


def test_gpu_all_goes_on_after_a_failure_and_says_what_it_left_out(tmp_path: Path):
    tools = tmp_path / "bin"
    tools.mkdir()
    # Stands for python: imports fail, one benchmark fails, one prints what a benchmark prints.
    (tools / "python").write_text(
        '#!/bin/sh\ncase "$*" in *importlib*) exit 1;; *frame_kernel*) exit 3;; esac\n'
        'case "$*" in *losses*) echo "consistency: launches: 6 (target <= 6): met";; esac\n'
    )
    (tools / "nvidia-smi").write_text("#!/bin/sh\necho a GPU\n")
    for tool in tools.iterdir():
        tool.chmod(0o755)
    out = tmp_path / "out"
    environment = {**os.environ, "PATH": f"{tools}:{os.environ['PATH']}", "PYTHON": str(tools / "python")}
    done = subprocess.run(
        ["benchmarks/gpu_all.sh", "", str(out)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env=environment,
    )
    assert done.returncode == 1, done.stdout + done.stderr
    summary = done.stdout.partition("=== summary")[2]
    assert "FAILED (3)" in summary and summary.rstrip().endswith("failed: frame_kernel")
    assert "left out: not installed: nvidia.dali av webdataset" in summary
    assert "consistency: launches: 6 (target <= 6): met" in done.stdout.partition("=== targets")[2]
    assert (out / "all.tar.gz").stat().st_size > 0 and (out / "train_step.log").exists()
