"""The page of results shows every result once where it belongs, beside the paper's rows, and what is missing."""

import os
import re
from pathlib import Path

import pytest

from cmac.config import VARIANTS
from cmac.evaluation.paper import LAMBDA, TABLES
from cmac.evaluation.results import Metric, Result, append_result
from tools import results as tool


def a_result(
    task="video-retrieval", dataset="ucf101", split="1", metrics=("R@1",), value=0.123, **changes
) -> Result:
    fields = {
        "protocol": "10x32f",
        "checkpoint": "runs/k400",
        "checkpoint_digest": "0123456789abcdef",
        "config": {},
        "metrics": metrics if isinstance(metrics, dict) else {name: Metric(value=value) for name in metrics},
        "counts": {"num_videos": 12000},
        "commit": "abc1234",
        "hardware": "a machine",
        "time": "2024-05-17T09:30:00+00:00",
        "seconds": 1.5,
    }
    return Result(task=task, dataset=dataset, split=split, **{**fields, **changes})


def section(page: str, heading: str) -> str:
    """From a heading to the next one."""
    found = re.search(rf"^## {re.escape(heading)}.*?(?=^## |\Z)", page, re.MULTILINE | re.DOTALL)
    assert found, f"no section {heading}"
    return found.group()


def tables(text: str) -> list[list[dict[str, str]]]:
    """Rows of each Markdown table of a text, by column head."""
    found = []
    for block in re.findall(r"(?:^\|.*\n?)+", text, re.MULTILINE):
        lines = [
            [cell.strip().replace("\\|", "|") for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
            for line in block.strip().splitlines()
        ]
        assert len({len(cells) for cells in lines}) == 1, block
        assert set("".join(lines[1])) == {"-"}
        found.append([dict(zip(lines[0], cells, strict=True)) for cells in lines[2:]])
    return found


def run(*args, capsys) -> str:
    assert tool.main([str(arg) for arg in args]) == 0
    return capsys.readouterr().out


# --- where a result goes ---


@pytest.mark.parametrize(
    ("result", "name"),
    [
        (a_result("action-recognition", "ucf101", "1-3 mean", ["top1"]), "4"),
        (a_result("action-recognition", "hmdb51", "1-3 mean", ["top1"]), "4"),
        (a_result("action-recognition", "ucf101", "1", ["top1"]), None),
        (a_result("linear-probe", "ucf101", "1-3 mean", ["top1"]), None),
        (a_result("video-retrieval", "hmdb51", "1"), "5"),
        (a_result("video-retrieval", "hmdb51", "2"), None),
        (a_result("cross-modal-retrieval", "ucf101", "1"), None),
        (a_result("audio-classification", "esc50", "folds 1-5", ["top1"]), "6"),
        (a_result("audio-classification", "dcase2014", "test", ["top1"]), "6"),
        (a_result("audio-classification", "esc10", "folds 1-5", ["top1"]), None),
        (a_result("localisation", "vggss", "test", ["AUC"]), None),
        (a_result("ablation", "world", "test", ["R@1"], config={"variant": "no-contrastive"}), "1"),
        (a_result("ablation", "world", "test", ["R@1"], config={"variant": "scales-3"}), "2"),
        (a_result("ablation", "world", "test", ["R@1"], config={"variant": "within-both"}), "3"),
        (a_result("ablation", "world", "test", ["R@1"], config={"variant": "lambda-2"}), "fig4"),
        (a_result("ablation", "world", "test", ["R@1"], config={"variant": "separate-heads"}), None),
        (a_result("ablation", "world", "test", ["R@1"]), None),
    ],
)
def test_result_is_shown_in_one_place_the_right_one(result, name):
    page = tool.render([result])
    own = f"## {result.task}: not in the paper's tables"
    assert [key for key, table in TABLES.items() if tool.belongs_to(result, table)] == (
        [name] if name else []
    )
    assert (own in page) == (name is None)
    # Once with all that belongs to it, whatever the place.
    assert sum(line.startswith("| #1") and "abc1234" in line for line in page.splitlines()) == 1


def test_full_model_is_a_row_of_every_ablation():
    result = a_result("ablation", "world", "test", ["R@1"], config={"variant": "full"})
    assert [key for key, table in TABLES.items() if tool.belongs_to(result, table)] == ["1", "2", "3", "fig4"]


def test_every_ablation_of_the_paper_has_a_variant_that_exists():
    for table in TABLES.values():
        for row in table.rows:
            assert (row.variant is not None) == row.ours, (table.name, row.key)
            assert row.variant in {None, "full", "scratch", *VARIANTS}
    assert any(name.startswith(LAMBDA) for name in VARIANTS)


def test_our_row_stands_above_the_papers_with_figures_under_the_same_heads():
    result = a_result(metrics=("R@1", "R@5", "R@10", "R@50"))
    main, figures, _ = tables(section(tool.render([result]), "Table 5"))
    assert main[0]["Method"] == "#1 `runs/k400`"
    assert [main[0][f"UCF101 R@{k}"] for k in (1, 5, 10)] == ["12.3"] * 3
    assert [main[0][f"HMDB51 R@{k}"] for k in (1, 5, 10)] == ["-"] * 3
    cmac = next(row for row in main if row["Method"] == "CMAC (paper)")
    assert cmac["UCF101 R@1"] == "58.4" and cmac["HMDB51 R@10"] == "64.2"
    speednet = next(row for row in main if row["Method"] == "SpeedNet [5] (paper)")
    assert speednet["HMDB51 R@1"] == "-"
    assert all("(paper)" in row["Method"] for row in main[1:])
    # The metric that the paper does not have is in the details.
    assert [row["Metric"] for row in figures] == ["R@1", "R@5", "R@10", "R@50"]


def test_details_hold_interval_chance_folds_weights_commit_and_skips():
    metric = Metric(value=0.5, interval=(0.401, 0.599), per_fold=(0.4, 0.6), chance=0.02)
    counts = {"num_videos": 400, "num_clips": 4000, "skipped too-short": 2, "skipped missing": 0}
    result = a_result("audio-classification", "esc50", "folds 1-5", {"top1": metric}, counts=counts)
    main, figures, sources = tables(section(tool.render([result]), "Table 6"))
    assert main[0]["ESC50"] == "50.0 [40.1, 59.9]"
    assert main[0]["Method"] == "#1 `runs/k400`, a part of the test videos"
    assert main[1] == {"Method": "chance", "ESC50": "2.0", "D2013": "-", "D2014": "-"}
    assert figures == [
        {
            "#": "#1",
            "Dataset": "esc50",
            "Split": "folds 1-5",
            "Protocol": "10x32f",
            "Metric": "top1",
            "Value": "50.0",
            "Interval": "[40.1, 59.9]",
            "Per fold": "40.0, 60.0",
            "Chance": "2.0",
        }
    ]
    assert sources == [
        {
            "#": "#1",
            "Weights": "`runs/k400`",
            "Digest": "0123456789abcdef",
            "Commit": "abc1234",
            "Time": "2024-05-17T09:30:00+00:00",
            "Videos": "400 of 2000",
            "Skipped, other counts": "skipped too-short: 2, clips: 4000",
        }
    ]


def test_misprinted_figures_are_shown_as_printed_with_their_likely_reading():
    (main,) = tables(section(tool.render([]), "Table 4"))
    row = next(row for row in main if row["Method"] == "SpeedNet [5] (paper)")
    assert (row["Epoch"], row["UCF101"], row["HMDB51"]) == ("81.1", "48.8 (likely 81.1)", "- (likely 48.8)")


# --- which results share a row ---


def test_datasets_of_the_same_weights_share_a_row_and_other_weights_have_their_own():
    both = [
        a_result("action-recognition", dataset, "1-3 mean", ["top1"], protocol=f"finetune-{dataset}")
        for dataset in ("ucf101", "hmdb51")
    ]
    random = a_result(
        "action-recognition",
        "hmdb51",
        "1-3 mean",
        ["top1"],
        0.02,
        protocol="finetune-hmdb51",
        checkpoint="random",
        checkpoint_digest="ff",
    )
    main = tables(section(tool.render([both[0], random, both[1]]), "Table 4"))[0]
    assert [row["Method"] for row in main[:2]] == ["#1 #3 `runs/k400`", "#2 `random`"]
    assert [(row["UCF101"], row["HMDB51"]) for row in main[:2]] == [("12.3", "12.3"), ("-", "2.0")]


def test_several_protocols_of_the_same_weights_are_not_mixed():
    results = [
        a_result(
            "action-recognition", dataset, "1-3 mean", ["top1"], value, protocol=protocol.format(dataset)
        )
        for protocol, value in (("finetune-{}", 0.5), ("finetune-{}-gdt", 0.6), ("other", 0.7))
        for dataset in ("ucf101", "hmdb51")
    ]
    main = tables(section(tool.render(results), "Table 4"))[0]
    assert [(row["UCF101"], row["HMDB51"]) for row in main[:3]] == [
        ("50.0",) * 2,
        ("60.0",) * 2,
        ("70.0",) * 2,
    ]
    assert [row["Method"] for row in main[:3]] == [
        "#1 #2 `runs/k400` finetune",
        "#3 #4 `runs/k400` finetune-gdt",
        "#5 #6 `runs/k400` other",
    ]
    # Protocols that differ in nothing but the dataset's name cannot share a row within a dataset.
    twins = [
        a_result("action-recognition", "ucf101", "1-3 mean", ["top1"], value, protocol=protocol)
        for protocol, value in (("finetune-ucf101", 0.5), ("finetune", 0.6))
    ]
    main = tables(section(tool.render(twins), "Table 4"))[0]
    assert [row["UCF101"] for row in main[:2]] == ["50.0", "60.0"]


def test_ablations_stand_in_the_papers_order_with_its_settings_and_columns_for_what_it_did_not_measure():
    results = [
        a_result(
            "ablation",
            "world",
            "test",
            ["R@1"],
            value,
            config={"variant": variant},
            checkpoint_digest=variant,
        )
        for variant, value in (("full", 0.9), ("scratch", 0.1), ("no-contrastive", 0.2))
    ]
    page = tool.render(results)
    main = tables(section(page, "Table 1"))[0]
    ours = [row for row in main if "(paper)" not in row["Method"]]
    assert [(row["Att. Cons."], row["Contr. Loss"], row["world R@1"]) for row in ours] == [
        ("✗", "✗", "10.0"),
        ("✓", "✗", "20.0"),
        ("✓", "✓", "90.0"),
    ]
    assert all(row["UCF101"] == "-" for row in ours)
    assert all(row["world R@1"] == "-" for row in main if "(paper)" in row["Method"])
    assert "- single-modality, no-consistency: `python -m tools.reproduce --table 1" in section(
        page, "Table 1"
    )
    # One variant on two datasets is one row.
    pair = [
        a_result("ablation", dataset, "1", ["top1"], config={"variant": "full"}, checkpoint_digest=None)
        for dataset in ("ucf101", "hmdb51")
    ]
    (row,) = (
        row for row in tables(section(tool.render(pair), "Table 3"))[0] if row["Method"].startswith("#")
    )
    assert (row["w/i Neg"], row["UCF101"], row["HMDB51"]) == ("✓", "12.3", "12.3")
    figure = [
        a_result("ablation", "world", "test", ["R@1"], config={"variant": name}, checkpoint_digest=name)
        for name in ("lambda-2", "no-consistency")
    ]
    main = tables(section(tool.render(figure), "Fig. 4"))[0]
    assert [row["λ"] for row in main] == ["0", "2", "0", "1.5"]


# --- newest, missing ---


def test_newest_is_shown_and_the_number_of_older_ones_told():
    results = [
        a_result(value=value, time=f"2024-05-1{day}T00:00:00Z")
        for day, value in ((1, 0.1), (3, 0.3), (2, 0.2))
    ]
    page = tool.render([*results, a_result(split="2")])
    assert "2 results; 2 older ones of the same evaluations left out" in page
    assert tables(section(page, "Table 5"))[0][0]["UCF101 R@1"] == "30.0"
    assert "older" not in tool.render(results[:1]).split("##")[0]


def test_missing_columns_name_the_command_that_makes_them():
    page = tool.render([a_result()])
    five = section(page, "Table 5")
    assert "- hmdb51, split 1: `python -m tools.retrieve CHECKPOINT --data HMDB51`" in five
    assert "- ucf101, split 1" not in five
    for name, table in TABLES.items():
        for column in table.columns:
            assert table.task == "ablation" or (table.task, column.dataset) in tool.COMMANDS, name
    complete = [a_result(dataset=dataset) for dataset in ("ucf101", "hmdb51")]
    assert "Not measured" not in section(tool.render(complete), "Table 5")


@pytest.mark.parametrize(
    "command",
    [*tool.COMMANDS.values(), *(tool.ablation_command(TABLES[name]) for name in ("1", "2", "3", "fig4"))],
)
def test_commands_that_are_suggested_exist_with_their_options(command):
    python, dash_m, module, *arguments = command.split()
    assert (python, dash_m) == ("python", "-m")
    path = Path(__file__).resolve().parents[1] / (module.replace(".", "/") + ".py")
    # Every option is one that the command or what it shares with the others declares, as a flag or a field.
    source = (
        path.read_text()
        + path.with_name("common.py").read_text()
        + (path.parents[1] / "cmac/finetune.py").read_text()
    )
    options = [argument for argument in arguments if argument.startswith("--")]
    assert options
    for option in options:
        assert f'"{option}"' in source or re.search(rf"^    {option[2:]}: ", source, re.MULTILINE), option


@pytest.mark.parametrize(
    ("counts", "shown"),
    [
        ({}, "-"),
        ({"num_videos": 3, "skipped missing": 0}, "nothing skipped"),
        ({"num_videos": 3, "num_clips": 30}, "nothing skipped, clips: 30"),
        ({"num_clips": 30, "bad clips undecodable": 1}, "bad clips undecodable: 1, clips: 30"),
        ({"num_clips": 30, "training skipped missing": 2}, "training skipped missing: 2, clips: 30"),
    ],
)
def test_what_was_left_out_comes_first_and_nothing_is_claimed_of_what_was_not_counted(counts, shown):
    _, _, sources = tables(section(tool.render([a_result(counts=counts)]), "Table 5"))
    assert sources[0]["Skipped, other counts"] == shown


# --- command ---


def test_command_prints_what_it_writes(tmp_path, capsys):
    append_result(tmp_path / "a.jsonl", a_result())
    append_result(tmp_path / "b.jsonl", a_result(dataset="hmdb51"))
    out = tmp_path / "pages" / "out.md"
    printed = run(tmp_path / "a.jsonl", tmp_path / "b.jsonl", "--markdown", out, capsys=capsys)
    assert out.read_text(encoding="utf-8") == printed
    assert "2 results." in printed and "#1 #2 `runs/k400`" in printed


def test_command_shows_one_table_alone(tmp_path, capsys):
    append_result(tmp_path / "a.jsonl", a_result())
    append_result(tmp_path / "a.jsonl", a_result("localisation", "vggss", "test", ["AUC"]))
    printed = run(tmp_path / "a.jsonl", "--table", "5", capsys=capsys)
    assert re.findall(r"^## (.*?):", printed, re.MULTILINE) == ["Table 5"]
    everything = run(tmp_path / "a.jsonl", capsys=capsys)
    assert re.findall(r"^## (.*?):", everything, re.MULTILINE) == [
        *(f"Table {number}" for number in (4, 5, 6, 1, 2, 3)),
        "Fig. 4",
        "localisation",
    ]


def test_without_any_file_the_papers_numbers_are_shown_and_it_is_said(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    printed = run(capsys=capsys)
    assert "runs/results.jsonl does not exist: nothing was measured here yet" in printed
    assert "0 results." in printed and "| CMAC (paper)" in printed


@pytest.mark.parametrize("content", [None, "not a result\n"])
def test_wrong_file_ends_with_a_message_and_nothing_written(tmp_path, capsys, content):
    path, out = tmp_path / "r.jsonl", tmp_path / "out.md"
    if content is not None:
        path.write_text(content)
    assert tool.main([str(path), "--markdown", str(out)]) == 1
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith(f"results: {path}")
    assert not out.exists()


def test_names_cannot_break_the_table_or_the_page(tmp_path, capsys):
    name = os.fsdecode(b"runs/a|b `c` \xff\nd")
    append_result(tmp_path / "r", a_result(checkpoint=name, protocol="p|q", counts={"skipped a|b\nc": 1}))
    printed = run(tmp_path / "r", "--markdown", tmp_path / "out.md", capsys=capsys)
    main, figures, sources = tables(section(printed, "Table 5"))
    assert main[0]["Method"] == "#1 ``runs/a|b `c` ? d``"
    assert figures[0]["Protocol"] == "p|q"
    assert sources[0]["Skipped, other counts"] == "skipped a|b c: 1"
    assert "?" in Path(tmp_path / "out.md").read_text(encoding="utf-8")
