"""The benchmark of what figures cost runs on a CPU and prints a row."""

import json
import sys

from benchmarks import logging_overhead


def test_steps_with_and_without_gradient_norms_are_timed_in_turn(tmp_path, monkeypatch, capsys):
    arguments = [
        "--device",
        "cpu",
        "--rounds",
        "1",
        "--batch",
        "2",
        "--results",
        str(tmp_path),
        "--preset",
        "demo-ablation",
    ]
    monkeypatch.setattr(sys, "argv", ["logging_overhead.py", *arguments])
    logging_overhead.main()
    lines = capsys.readouterr().out.splitlines()
    row = json.loads(lines[-1])
    assert [json.loads(line) for line in (tmp_path / "logging_overhead.jsonl").read_text().splitlines()] == [
        row
    ]
    assert any(line.startswith("measuring / plain: ") for line in lines)
    assert row["ratio"]["median"] > 0 and row["shares"].keys() == {"gradient_norms", "rows"}
    assert all(figures["median"] > 0 for figures in row["milliseconds"].values())
