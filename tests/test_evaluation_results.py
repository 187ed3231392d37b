"""The file of results keeps what it was given, and the paper's numbers agree with themselves where they should."""

import dataclasses
import errno
import json
import logging
import multiprocessing
import os
from pathlib import Path

import numpy as np
import pytest

from cmac.evaluation.paper import TABLES
from cmac.evaluation.results import Metric, Result, append_result, latest, read_results, stamp


def a_result(**changes) -> Result:
    fields = {
        "task": "video-retrieval",
        "dataset": "ucf101",
        "split": "1",
        "protocol": "retrieval 10 uniform clips",
        "checkpoint": "runs/k400",
        "checkpoint_digest": "0123456789abcdef",
        "config": {"clips_per_file": 10, "sampling": {"placement": "uniform"}, "ks": [1, 5, 10]},
        "metrics": {
            "R@1": Metric(value=0.25, interval=(0.2, 0.3), per_fold=(0.2, 0.3), chance=0.01),
            "R@5": Metric(value=0.5),
        },
        "counts": {"num_videos": 12, "skipped too-short": 2},
        "commit": "abc",
        "hardware": "a machine",
        "time": "2024-05-17T09:30:00+00:00",
        "seconds": 1.5,
    }
    return Result(**{**fields, **changes})


# --- writing and reading ---


def test_results_come_back_as_they_were_written(tmp_path):
    path = tmp_path / "a" / "b" / "results.jsonl"
    written = [a_result(), a_result(checkpoint_digest=None, checkpoint="none", counts={})]
    for result in written:
        append_result(path, result)
    assert read_results(path) == written
    assert len(path.read_bytes().splitlines()) == 2


def test_line_is_plain_json_with_the_fields_by_name(tmp_path):
    append_result(tmp_path / "r", a_result())
    record = json.loads((tmp_path / "r").read_text())
    assert record["metrics"]["R@1"] == {
        "value": 0.25,
        "interval": [0.2, 0.3],
        "per_fold": [0.2, 0.3],
        "chance": 0.01,
    }
    assert record["schema_version"] == 1 and record["counts"] == {"num_videos": 12, "skipped too-short": 2}
    assert set(record) == {item.name for item in dataclasses.fields(Result)}


def test_stamp_fills_in_where_and_when():
    result = dataclasses.replace(a_result(), **stamp(2.0))
    assert result.seconds == 2.0 and "cores" in result.hardware and result.time.endswith("+00:00")


def test_names_that_are_not_utf8_survive(tmp_path):
    name = os.fsdecode(b"runs/caf\xe9 \xff\n|`line")
    append_result(tmp_path / "r", a_result(checkpoint=name, counts={name: 1}, config={"skipped": [name]}))
    (back,) = read_results(tmp_path / "r")
    assert back.checkpoint == name and back.counts == {name: 1} and back.config == {"skipped": [name]}


def test_what_json_has_a_form_for_is_taken(tmp_path):
    @dataclasses.dataclass(frozen=True)
    class Sampling:
        clips: int = 10
        folder: Path = Path("data")

    result = a_result(
        config={"sampling": Sampling(), "rate": np.float32(0.5), "pair": (1, None)},
        metrics={"top1": Metric(value=np.float64(0.5), per_fold=(np.float32(0.25),))},
        counts={"num_videos": np.int64(3)},
    )
    append_result(tmp_path / "r", result)
    (back,) = read_results(tmp_path / "r")
    assert back.config == {"sampling": {"clips": 10, "folder": "data"}, "rate": 0.5, "pair": [1, None]}
    assert back.metrics["top1"].per_fold == (0.25,) and back.counts["num_videos"] == 3


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"metrics": {"top1": Metric(value=NAN)}}, r"metrics.top1.value is nan, expected a finite"),
        ({"metrics": {"top1": Metric(value=0.5, interval=(0.1, INF))}}, r"top1.interval\[1\] is inf"),
        ({"metrics": {"top1": Metric(value=0.5, per_fold=(0.5, NAN))}}, r"top1.per_fold\[1\] is nan"),
        ({"metrics": {"top1": Metric(value=0.5, chance=NAN)}}, "top1.chance is nan"),
        ({"metrics": {"top1": Metric(value=87.2)}}, "87.2, expected a fraction"),
        ({"metrics": {"top1": Metric(value=0.5, interval=(0.6, 0.4))}}, "expected low <= high"),
        ({"metrics": {"top1": Metric(value=True)}}, "expected a number"),
        ({"metrics": {"top1": Metric(value=0.5, per_fold=())}}, "at least one figure"),
        ({"metrics": {"top1": 0.5}}, "expected a Metric"),
        ({"metrics": {}}, "at least one, by name"),
        ({"config": {"optimizer": {"lr": NAN}}}, "config.optimizer.lr is nan"),
        (
            {"config": {"model": object()}},
            "config.model is a object, expected something that JSON has a form for",
        ),
        ({"config": {1: "a"}}, "config has the name 1"),
        ({"counts": {"num_videos": -1}}, "counts.num_videos is -1"),
        ({"counts": {"num_videos": 1.5}}, "whole number"),
        ({"seconds": INF}, "seconds is inf"),
        ({"seconds": -1.0}, "at least 0"),
        ({"task": ""}, "task is ''"),
        ({"checkpoint_digest": ""}, "checkpoint_digest is ''"),
        ({"time": "2024-05-17T09:30:00"}, "with its offset"),
        ({"time": "yesterday"}, "with its offset"),
        ({"schema_version": 2}, "schema_version is 2, expected 1"),
    ],
)
def test_result_that_no_line_may_hold_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        a_result(**changes)


def test_nan_that_came_in_later_is_refused_and_nothing_written(tmp_path):
    result = a_result()
    result.metrics["R@1"] = Metric(value=NAN)
    with pytest.raises(ValueError, match="R@1.value is nan"):
        append_result(tmp_path / "r", result)
    assert not (tmp_path / "r").exists()


def _append_many(path: str, name: str) -> None:
    for number in range(40):
        append_result(path, a_result(protocol=f"{name} {number}", config={"padding": "x" * 5000}))


def test_processes_that_append_at_once_lose_nothing(tmp_path):
    path = tmp_path / "r"
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=_append_many, args=(str(path), name)) for name in "abc"]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0
    protocols = [result.protocol for result in read_results(path)]
    assert sorted(protocols) == sorted(f"{name} {number}" for name in "abc" for number in range(40))


def test_file_system_without_locks_still_takes_the_result(tmp_path, monkeypatch, caplog):
    def refuse(descriptor, operation):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", refuse)
    with caplog.at_level(logging.WARNING):
        append_result(tmp_path / "r", a_result())
    assert "cannot be locked (No locks available)" in caplog.text
    assert read_results(tmp_path / "r") == [a_result()]


def test_full_disk_is_an_error_that_names_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr("os.write", lambda descriptor, data: len(data) - 1)
    with pytest.raises(OSError, match="r: .* bytes were written; is the disk full"):
        append_result(tmp_path / "r", a_result())


def test_example_in_the_documentation_is_a_result(tmp_path):
    page = (Path(__file__).resolve().parents[1] / "docs" / "EVALUATION.md").read_text(encoding="utf-8")
    example = page.split("```json\n")[1].split("```")[0]
    (tmp_path / "r").write_text(" ".join(example.split()))
    (result,) = read_results(tmp_path / "r")
    assert result.metrics["R@1"].chance == 0.011
    for item in dataclasses.fields(Result):
        assert f"`{item.name}`" in page, item.name


# --- torn and wrong files ---


def test_line_torn_anywhere_is_left_out_with_a_warning(tmp_path, caplog):
    first, second = a_result(), a_result(protocol="b")
    line = second.to_json()
    for cut in range(1, len(line)):  # also behind an inner closing brace
        path = tmp_path / "r"
        path.write_text(first.to_json() + "\n" + line[:cut])
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            assert read_results(path) == [first]
        assert f"{path}, line 2: torn after {len(line[:cut].strip())} characters" in caplog.text
    # Only the newline is missing: nothing is lost.
    path.write_text(first.to_json() + "\n" + line)
    assert read_results(path) == [first, second]


def test_result_appended_behind_a_torn_line_is_not_swallowed(tmp_path, caplog):
    path = tmp_path / "r"
    append_result(path, a_result())
    with open(path, "a") as file:
        file.write(a_result(protocol="killed").to_json()[:100])
    append_result(path, a_result(protocol="again"))
    with caplog.at_level(logging.WARNING):
        assert [result.protocol for result in read_results(path)] == ["retrieval 10 uniform clips", "again"]
    assert "line 2: torn" in caplog.text


def edited(**changes) -> str:
    return json.dumps({**json.loads(a_result().to_json()), **changes})


def without(name: str) -> str:
    record = json.loads(a_result().to_json())
    del record[name]
    return json.dumps(record)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("[1, 2]", "is a list, expected a result"),
        ("hello", "not JSON"),
        ("{'task': 1}", "not JSON"),
        (edited(metrics={"R@1": {"value": NAN}}), "holds NaN"),
        (edited(metrics={"R@1": {"value": "0.5"}}), "metrics.R@1.value is '0.5', expected a number"),
        (edited(metrics={"R@1": {"interval": [0, 1]}}), "metrics.R@1.value is missing"),
        (edited(metrics={"R@1": {"value": 0.5, "interval": [1]}}), r"expected \(low, high\)"),
        (edited(metrics={"R@1": 0.5}), "metrics.R@1 is 0.5"),
        (edited(metrics=[]), "metrics is"),
        (edited(counts=[1]), "counts is"),
        (edited(config=3), "config is 3"),
        (edited(time=3), "time is 3"),
        (edited(dataset=None), "dataset is None"),
        (edited(schema_version=7), "schema_version is 7, expected 1; a newer checkout"),
        (without("schema_version"), "schema_version is None"),
        (without("commit"), "commit is missing"),
    ],
)
def test_wrong_line_is_named_with_file_and_number(tmp_path, line, message):
    path = tmp_path / "results.jsonl"
    path.write_text(a_result().to_json() + "\n\n" + line + "\n" + a_result().to_json() + "\n")
    with pytest.raises(ValueError, match=f"results.jsonl, line 3: .*{message}"):
        read_results(path)


def test_bytes_that_are_no_text_are_named(tmp_path):
    path = tmp_path / "r"
    path.write_bytes(b'{"task": "\xff"}\n')
    with pytest.raises(ValueError, match="r, line 1: .*utf-8"):
        read_results(path)


def test_fields_of_later_versions_are_left_out(tmp_path):
    path = tmp_path / "r"
    path.write_text(edited(energy=3.0, metrics={"R@1": {"value": 0.5, "median": 0.4}}) + "\n")
    (result,) = read_results(path)
    assert result == a_result(metrics={"R@1": Metric(value=0.5)})


def test_missing_file_and_folder_say_so(tmp_path):
    with pytest.raises(ValueError, match="nowhere.jsonl: No such file.*--results"):
        read_results(tmp_path / "nowhere.jsonl")
    with pytest.raises(ValueError, match="Is a directory"):
        read_results(tmp_path)
    (tmp_path / "empty").touch()
    assert read_results(tmp_path / "empty") == []


# --- newest ---


def test_newest_of_each_evaluation_wins_by_moment_not_by_place():
    new = a_result(time="2024-05-17T10:00:00+02:00", seconds=1.0)  # 08:00 UTC
    newer = a_result(time="2024-05-17T09:00:00Z", seconds=2.0)
    other = a_result(split="2")
    assert latest([newer, other, new]) == [newer, other]
    assert latest([new, newer]) == [newer]
    same_time = dataclasses.replace(newer, seconds=3.0)
    assert latest([newer, same_time]) == [same_time]
    assert latest([]) == []


@pytest.mark.parametrize("name", ["task", "dataset", "split", "protocol", "checkpoint_digest"])
def test_different_evaluations_do_not_replace_each_other(name):
    pair = [a_result(), a_result(**{name: "another"})]
    assert latest(pair) == pair


def test_weights_are_told_apart_by_digest_and_without_one_by_name():
    moved = a_result(checkpoint="elsewhere", time="2024-06-01T00:00:00Z")
    assert latest([a_result(), moved]) == [moved]
    bare = [a_result(checkpoint=name, checkpoint_digest=None) for name in ("none", "log-mel statistics")]
    assert latest(bare) == bare


# --- the paper's numbers ---


def test_every_row_of_the_paper_has_a_figure_per_column_and_a_key_of_its_own():
    for name, table in TABLES.items():
        assert table.name == name
        assert len({row.key for row in table.rows}) == len(table.rows)
        for row in table.rows:
            assert len(row.percents) == len(table.columns), (name, row.key)
            assert len(row.settings) == len(table.settings), (name, row.key)
            assert row.likely_percents is None or len(row.likely_percents) == len(table.columns)
        for value in table.values():
            assert value.percent is None or 0 < value.percent < 100
        assert sum(1 for _ in table.values()) == len(table.rows) * len(table.columns)


def test_full_model_is_the_same_wherever_the_paper_prints_it_but_in_table_2():
    def pair(table, key):
        return tuple(TABLES[table].value(key, dataset, "top1").percent for dataset in ("ucf101", "hmdb51"))

    assert pair("1", "full") == pair("3", "negatives") == (87.2, 57.8)
    assert pair("2", "cosine-2") == (87.2, 57.9)
    assert any("57.9" in error for error in TABLES["2"].known_errors)
    # Fig. 4 at 0 is CMAC without the consistency loss, at 1.5 the full model.
    assert (
        pair("fig4", "0")[0] == pair("1", "no-consistency")[0]
        and pair("fig4", "1.5")[0] == pair("1", "full")[0]
    )


def test_cmac_is_best_in_every_column_that_the_paper_compares_with_others():
    for name in ("4", "5", "6"):
        table = TABLES[name]
        for column in table.columns:
            figures = {
                row.key: table.value(row.key, column.dataset, column.metric).likely_percent
                for row in table.rows
            }
            best = max(value for value in figures.values() if value is not None)
            assert figures["cmac"] == best


def test_recall_rises_with_k():
    table = TABLES["5"]
    for row in table.rows:
        for dataset in ("ucf101", "hmdb51"):
            figures = [table.value(row.key, dataset, f"R@{k}").percent for k in (1, 5, 10)]
            if figures[0] is not None:
                assert figures == sorted(figures)


def test_misprinted_row_is_kept_as_printed_beside_its_likely_reading():
    speednet = TABLES["4"].value("speednet", "ucf101", "top1")
    assert (speednet.percent, speednet.likely_percent) == (48.8, 81.1)
    assert TABLES["4"].row("speednet").settings[-1] == "81.1"
    others = [value for table in TABLES.values() for value in table.values() if value.key != "speednet"]
    assert all(value.percent == value.likely_percent for value in others)


def test_text_of_the_paper_agrees_with_its_tables():
    """Differences that section 4 spells out: over GDT 1.0 and 1.1, over AVID 2.8 and 0.3, 2.8 on ESC50."""
    four, six = TABLES["4"], TABLES["6"]

    def lead(table, key, dataset):
        return table.value("cmac", dataset, "top1").percent - table.value(key, dataset, "top1").percent

    assert lead(four, "gdt", "ucf101") == pytest.approx(1.0)
    assert lead(four, "gdt", "hmdb51") == pytest.approx(1.1)
    assert lead(four, "avid", "ucf101") == pytest.approx(2.8)
    assert lead(four, "avid", "hmdb51") == pytest.approx(0.3)
    assert lead(six, "gdt", "esc50") == pytest.approx(2.8)
    one = TABLES["1"]
    softmax, none = (TABLES["2"].value(key, "ucf101", "top1").percent for key in ("softmax-1", "none-1"))
    assert softmax - none == pytest.approx(0.8)
    assert one.value("no-contrastive", "ucf101", "top1").percent == 76.4


def test_unknown_row_and_column_of_a_table_are_named():
    with pytest.raises(ValueError, match="table 1 has no row 'nothing', expected one of scratch"):
        TABLES["1"].row("nothing")
    with pytest.raises(ValueError, match="table 1 has no column R@1 of ucf101"):
        TABLES["1"].value("full", "ucf101", "R@1")
    assert TABLES["6"].split_of("dcase2014") == "test" and TABLES["6"].split_of("esc50") == "folds 1-5"
