"""The reproduction runner: commands of every table, resuming, failures; one tiny table from nothing to Markdown."""

import argparse
import dataclasses
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import train
from cmac.checkpoint import build_model
from cmac.config import VARIANTS
from cmac.evaluation import world
from cmac.evaluation.ablations import FULL, SCRATCH
from cmac.evaluation.paper import TABLES
from cmac.evaluation.results import read_results
from cmac.evaluation.truth import Truth, TruthObject
from cmac.pretrain import Pretraining
from tools import classify_audio, evaluate_world, finetune, reproduce, retrieve
from tools.reproduce import Runner, Step

ROOT = Path(__file__).resolve().parents[1]


def commands(capsys, *arguments: object) -> dict[str, list[str]]:
    """Step -> words of its command, as a dry run prints them."""
    assert reproduce.main(["--dry-run", *map(str, arguments)]) == 0
    lines = [
        line for line in capsys.readouterr().out.splitlines() if not line.startswith(("missing:", "note:"))
    ]
    names = [line.removeprefix("# ") for line in lines[::2]]
    assert len(set(names)) == len(names)
    return {name: shlex.split(line) for name, line in zip(names, lines[1::2], strict=True)}


def configuration(words: list[str]):
    """What train.py makes of a printed command."""
    return train.parse(words[words.index("train.py") + 1 :])


def value(words: list[str], option: str) -> str:
    return words[words.index(option) + 1]


# --- plans ---


@pytest.mark.parametrize("table", TABLES)
def test_demo_trains_and_evaluates_every_row_on_one_world(table, capsys):
    planned = commands(capsys, "--table", table, "--scale", "demo", "--seeds", 2)
    assert list(planned)[:3] == ["world", "shards-train", "shards-test"]
    worlds = {value(words, "--world") for words in planned.values() if "--world" in words}
    assert worlds == {value(planned["world"], "--out")}
    evaluated = {name for name in planned if name.startswith("evaluate-")}
    rows = {row.variant for row in TABLES[table].rows if row.variant} | {SCRATCH}
    rows |= {name for name in VARIANTS if name.startswith("lambda-") and table == "fig4"}
    assert evaluated == {f"evaluate-{variant}-seed{seed}" for variant in rows for seed in (0, 1)}
    for variant in rows - {SCRATCH}:
        for seed in (0, 1):
            config = configuration(planned[f"pretrain-{variant}-seed{seed}"])
            assert (config.seed, config.loader.seed) == (seed, seed)
            assert value(planned[f"evaluate-{variant}-seed{seed}"], "--run") == config.run_dir
            plain = configuration(["train.py", "demo-ablation"])
            assert config.model.video == plain.model.video and config.max_steps == plain.max_steps
            assert ((config.loss, config.model, config.loader.clips_per_video) ==
                    (plain.loss, plain.model, plain.loader.clips_per_video)) == (variant == FULL)  # fmt: skip
    assert value(planned[f"evaluate-{SCRATCH}-seed1"], "--untrained") == "demo-ablation"
    folders = [value(words, "--run-dir") for words in planned.values() if "--run-dir" in words]
    assert len(set(folders)) == len(folders)


def test_another_world_or_length_is_another_folder(capsys):
    small = commands(
        capsys, "--table", 1, "--scale", "demo", "--steps", 5, "--train-videos", 32, "--seeds", 1
    )
    usual = commands(capsys, "--table", 1, "--scale", "demo", "--seeds", 1)
    assert value(small["world"], "--out") != value(usual["world"], "--out")
    assert configuration(small["pretrain-full-seed0"]).max_steps == 5


@pytest.mark.parametrize("table", ["1", "2", "3", "fig4"])
def test_paper_scale_pretrains_each_variant_and_fine_tunes_it_on_both_datasets(table, capsys):
    planned = commands(capsys, "--table", table, "--data", "/data")
    for row in reproduce.ablation_table(reproduce.parse(["--table", table, "--data", "/data"])).rows():
        run = f"runs/reproduce/paper/runs/{row.variant}-seed0"
        if row.variant != SCRATCH:
            words = planned[f"pretrain-{row.variant}-seed0"]
            assert words[:6] == "python -m torch.distributed.run --standalone --nproc-per-node auto".split()
            config = configuration(words)
            assert config.run_dir == run and config.loader.shards == "/data/k400-train"
            assert (config.epochs, config.loader.global_batch_size) == (50, 64)
            assert not config.loader.video.color_jitter
        for dataset in ("ucf101", "hmdb51"):
            words = planned[f"{dataset}-{row.variant}-seed0"]
            assert words[:3] == ["python", "-m", "tools.finetune"]
            config = finetune.parse(words[3:])
            assert config.preset == f"finetune-{dataset}-ablation" and config.dataset == dataset
            assert config.checkpoint == ("scratch" if row.variant == SCRATCH else run)
            assert config.data == f"/data/{dataset}" and config.splits == ("1",)
            assert not config.video.color_jitter


@pytest.mark.parametrize(
    ("table", "tool", "datasets"),
    [
        ("4", "tools.finetune", {"ucf101", "hmdb51"}),
        ("5", "tools.retrieve", {"ucf101", "hmdb51"}),
        ("6", "tools.classify_audio", {"esc50", "dcase2013", "dcase2014"}),
    ],
)
def test_a_checkpoint_goes_through_the_evaluations_of_its_table(table, tool, datasets, capsys):
    planned = commands(capsys, "--table", table, "--data", "/data", "--checkpoint", "runs/pretrain-k400")
    assert {name.split(f"-table{table}-")[0] for name in planned} == datasets
    assert all(tool in words and "runs/pretrain-k400" in words for words in planned.values())
    parse = {"4": finetune.parse, "5": retrieve.parse, "6": classify_audio.parse}[table]
    for words in planned.values():
        args = parse(words[3:])
        assert args.checkpoint == "runs/pretrain-k400" and args.dataset in datasets
        assert str(args.data).startswith("/data/")


def test_rows_of_table_6_are_pretrained_when_asked(capsys):
    planned = commands(capsys, "--table", 6, "--data", "/data", "--with-variants")
    config = configuration(planned["pretrain-baseline-seed0"])
    assert not config.loss.within_negatives and config.loss.consistency_weight == 0
    assert {f"dcase2013-{name}-seed0" for name in (SCRATCH, "single-modality", "baseline", FULL)} <= set(
        planned
    )


def test_a_dataset_that_one_does_not_have_can_be_left_out(capsys):
    common = ["--table", "6", "--data", "/data", "--checkpoint", "runs/x"]
    assert [name.split("-table6-")[0] for name in commands(capsys, *common, "--dataset", "esc50")] == [
        "esc50"
    ]
    assert reproduce.main([*common, "--dataset", "ucf101"]) == 2
    assert "expected one of esc50, dcase2013, dcase2014" in capsys.readouterr().err


def test_tables_and_checkpoints_share_no_step(capsys):
    names = [
        name
        for table in ("4", "5")
        for checkpoint in ("runs/x", "runs/y")
        for name in commands(capsys, "--table", table, "--data", "/data", "--checkpoint", checkpoint)
    ]
    assert len(names) == len(set(names)) == 8


def test_only_leaves_the_other_variants_out(capsys):
    planned = commands(capsys, "--table", 1, "--scale", "demo", "--only", "no-contrastive", "--seeds", 1)
    assert [name for name in planned if "seed" in name] == [
        "pretrain-no-contrastive-seed0",
        "evaluate-no-contrastive-seed0",
    ]
    assert reproduce.main(["--table", "1", "--scale", "demo", "--only", "norm-none"]) == 2
    assert "has no variant 'norm-none', expected one of scratch" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--table", "1"], "--data is missing"),
        (["--table", "1", "--data", "x", "--checkpoint", "y"], "--checkpoint is for tables 4, 5 and 6"),
        (["--table", "5", "--data", "x"], "--checkpoint is missing"),
        (["--table", "5", "--data", "x", "--with-variants"], "--with-variants is for table 6"),
        (["--table", "1", "--scale", "demo", "--seeds", "0"], "--seeds is 0, expected at least 1"),
        (["--table", "5", "--scale", "demo", "--checkpoint", "y"], "the demo trains what it evaluates"),
        (
            ["--table", "1", "--scale", "demo", "--data", "x"],
            "--data is for --scale paper, the scale is demo",
        ),
        (["--table", "1", "--data", "x", "--train-videos", "9"], "--train-videos is for --scale demo"),
        (
            ["--table", "5", "--data", "x", "--checkpoint", "y", "--seeds", "3"],
            "--seeds is 3 with --checkpoint",
        ),
    ],
)
def test_wrong_arguments_are_explained(arguments, message, capsys):
    with pytest.raises(SystemExit):
        reproduce.parse(arguments)
    assert message in capsys.readouterr().err


def test_everything_that_is_missing_is_said_before_anything_starts(tmp_path, capsys):
    (tmp_path / "ucf101" / "ucfTrainTestlist").mkdir(parents=True)
    (tmp_path / "ucf101" / "UCF-101").mkdir()
    lists = tmp_path / "ucf101" / "ucfTrainTestlist"
    (lists / "classInd.txt").write_text("1 Punch\n")
    (lists / "trainlist01.txt").write_text("Punch/v_Punch_g08_c01.avi 1\n")
    (lists / "testlist01.txt").write_text("Punch/v_Punch_g01_c01.avi\n")
    arguments = ["--table", "1", "--data", str(tmp_path), "--out", str(tmp_path / "out")]
    assert reproduce.main(arguments) == 2
    said = capsys.readouterr().err
    assert "k400-train" in said and "make_shards.py" in said  # the way out
    assert "none of the 2 files" in said
    assert "hmdb51" in said and "official layout" in said
    assert not (tmp_path / "out").exists()
    assert reproduce.main([*arguments, "--dry-run"]) == 0
    assert capsys.readouterr().out.count("missing:") == 3


# --- running steps ---


def python(name: str, code: str, **fields) -> Step:
    return Step(name=name, command=(sys.executable, "-c", code), **fields)


def test_a_failed_step_stops_what_needs_it_and_nothing_else(tmp_path, capsys):
    runner = Runner(tmp_path, jobs=2)
    failed = runner.run(
        [
            python("a", "print('first'); print('no disk left'); raise SystemExit(3)"),
            python("b", "pass", after=("a",)),
            python("c", "pass", after=("b",)),
            python("d", "print('fine')"),
            python("e", "pass", outputs=(tmp_path / "never",)),
            python("f", "import os; os.abort()"),
        ]
    )
    assert set(failed) == {"a", "b", "c", "e", "f"}
    assert failed["a"].startswith("exit status 3") and failed["a"].endswith("no disk left")
    assert failed["b"] == "not started: it needs a, which failed"
    assert "never was not written" in failed["e"] and "ended by signal 6" in failed["f"]
    assert runner.ran == {"d"} and "fine" in (tmp_path / "logs/d.log").read_text()
    assert "a FAILED after" in capsys.readouterr().out


def test_finished_steps_are_recognised_by_command_and_outputs(tmp_path, capsys):
    def steps(word: str = "one") -> list[Step]:
        made = tmp_path / "made"
        return [
            python("a", f"open({str(made)!r}, 'w').write({word!r})", outputs=(made,)),
            python("b", f"open({str(tmp_path / 'count')!r}, 'a').write('x')", after=("a",)),
        ]

    assert Runner(tmp_path).run(steps()) == {} and Runner(tmp_path).run(steps()) == {}
    assert (tmp_path / "count").read_text() == "x"
    assert capsys.readouterr().out.count("finished earlier") == 2
    (tmp_path / "made").unlink()  # gone, so it and what follows from it is made again
    Runner(tmp_path).run(steps())
    assert (tmp_path / "count").read_text() == "xx"
    Runner(tmp_path).run(steps("two"))  # another command
    assert (tmp_path / "made").read_text() == "two" and (tmp_path / "count").read_text() == "xxx"


def test_steps_run_beside_each_other(tmp_path):
    code = (
        "import pathlib, time\n"
        f"folder = pathlib.Path({str(tmp_path)!r})\n"
        "(folder / 'MINE').touch()\n"
        "end = time.monotonic() + 60\n"
        "while not (folder / 'OTHER').exists() and time.monotonic() < end: time.sleep(0.01)\n"
        "raise SystemExit(not (folder / 'OTHER').exists())"
    )
    steps = [python(mine, code.replace("MINE", mine).replace("OTHER", other)) for mine, other in ("xy", "yx")]
    assert Runner(tmp_path, jobs=2).run(steps) == {}


DRIVER = """
import sys
from pathlib import Path
from tools.reproduce import Runner, Step
folder = Path(sys.argv[1])
code = "import os, sys, time; open(sys.argv[1], 'w').write(str(os.getpid())); time.sleep(float(sys.argv[2]))"
def step(name, seconds, **fields):
    command = (sys.executable, "-c", code, str(folder / f"{name}.pid"), "0" if (folder / "go").exists() else seconds)
    return Step(name=name, command=command, **fields)
failed = Runner(folder).run([step("a", "0"), step("b", "100", after=("a",)), step("c", "0", after=("b",))])
print("failed:", failed)
"""


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_killed_runner_takes_its_steps_along_and_goes_on(tmp_path):
    command = [sys.executable, "-c", DRIVER, str(tmp_path)]
    for sent in (signal.SIGTERM, signal.SIGKILL):
        (tmp_path / "b.pid").unlink(missing_ok=True)
        first = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 120
        while not ((tmp_path / "b.pid").exists() and (tmp_path / "b.pid").read_text()):
            assert time.monotonic() < deadline and first.poll() is None
            time.sleep(0.02)
        pid = int((tmp_path / "b.pid").read_text())
        first.send_signal(sent)
        first.wait(60)
        while alive(pid):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        assert not (tmp_path / "c.pid").exists()
    (tmp_path / "go").touch()
    second = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=True)
    assert "a: finished earlier" in second.stdout and "failed: {}" in second.stdout
    assert (tmp_path / "c.pid").exists()


def test_two_runners_do_not_share_a_folder(tmp_path):
    with reproduce.locked(tmp_path / "x"):
        with pytest.raises(reproduce.Failed, match="in use by another"):
            with reproduce.locked(tmp_path / "x"):
                pass
    with reproduce.locked(tmp_path / "x"):
        pass


# --- from steps to the table ---


def test_one_failed_variant_does_not_lose_the_others(tmp_path, monkeypatch, capsys):
    """Steps that write made-up figures in place of trainings; one variant breaks in one of its seeds, one in all."""
    broken = {("single-modality", 0), ("single-modality", 1), ("no-contrastive", 1)}

    def steps(args, variants, folder):
        planned = [python("world", "pass")]
        for seed in range(args.seeds):
            for variant in variants:
                number = [row.variant for row in TABLES["1"].rows].index(variant)
                path = folder / "figures" / f"{variant}-{seed}.json"
                figure = {"value": 0.1 + 0.1 * number + 0.01 * seed, "chance": 0.0625}
                code = f"import pathlib; p = pathlib.Path({str(path)!r}); p.parent.mkdir(exist_ok=True); p.write_text("
                code += f"{json.dumps({'figures': {'probe_video': figure}})!r})"
                if (variant, seed) in broken:
                    code = "raise SystemExit('boom')"
                name = f"evaluate-{variant}-seed{seed}"
                planned.append(python(name, code, after=("world",), outputs=(path,), variant=variant))
        return planned

    monkeypatch.setattr(reproduce, "demo_steps", steps)
    arguments = ["--table", "1", "--scale", "demo", "--seeds", "2", "--out", str(tmp_path)]
    arguments += ["--results", str(tmp_path / "results.jsonl")]
    assert reproduce.main(arguments) == 1
    said = capsys.readouterr().out
    assert "3 steps failed" in said and "boom" in said
    page = (tmp_path / "demo/table1.md").read_text()
    assert "| Single Modality | `single-modality` | ✗ | ✓ | 82.5 | 47.3 | failed |" in page
    assert "30.0 (a seed failed)" in page and "50.5 [" in page
    results = {result.config["variant"]: result for result in read_results(tmp_path / "results.jsonl")}
    assert set(results) == {SCRATCH, "no-consistency", FULL}  # none for what failed
    assert results[FULL].metrics["probe_video"].per_fold == pytest.approx((0.5, 0.51))
    assert results[FULL].task == "ablation" and results[FULL].dataset == "world"

    broken.clear()  # mended: only what failed runs again
    assert reproduce.main(arguments) == 0
    said = capsys.readouterr().out
    assert said.count("finished earlier") == 8
    page = (tmp_path / "demo/table1.md").read_text()
    assert "## Failed" not in page and "seed failed" not in page and "boom" not in page
    record = json.loads((tmp_path / "demo/table1.json").read_text())
    assert [row["seeds"] for row in record["rows"]] == [[0, 1]] * 5
    lines = read_results(tmp_path / "results.jsonl")
    assert len(lines) == 5 and len({result.config["variant"] for result in lines}) == 5

    assert reproduce.main([*arguments, "--only", FULL]) == 0  # does not forget the others
    assert json.loads((tmp_path / "demo/table1.json").read_text())["rows"] == record["rows"]
    assert read_results(tmp_path / "results.jsonl") == lines


def test_results_of_paper_scale_are_read_from_what_evaluations_wrote(tmp_path, monkeypatch, capsys):
    result = {
        "task": "action-recognition", "dataset": "ucf101", "split": "1", "protocol": "finetune-ucf101-ablation",
        "checkpoint": "x", "checkpoint_digest": None, "config": {}, "counts": {}, "commit": "c", "hardware": "h",
        "time": "2026-01-01T00:00:00+00:00", "seconds": 1.0, "schema_version": 1,
        "metrics": {"top1": {"value": 0.5, "interval": None, "per_fold": None, "chance": 0.01}},
    }  # fmt: skip
    paths = {}

    def steps(args, variants, folder):
        planned = []
        for variant in variants:
            for dataset in ("ucf101", "hmdb51"):
                name = f"{dataset}-{variant}-seed0"
                path = paths[name] = folder / f"{name}.jsonl"
                line = json.dumps({**result, "dataset": dataset})
                code = f"open({str(path)!r}, 'w').write({line!r} + chr(10))"
                planned.append(python(name, code, outputs=(path,), variant=variant))
        return planned

    monkeypatch.setattr(reproduce, "paper_steps", steps)
    monkeypatch.setattr(reproduce, "missing_inputs", lambda *arguments, **options: [])
    arguments = ["--table", "1", "--data", str(tmp_path), "--out", str(tmp_path), "--only", FULL]
    assert reproduce.main([*arguments, "--results", str(tmp_path / "results.jsonl")]) == 0
    page = (tmp_path / "paper/table1.md").read_text()
    assert "| CMAC | `full` | ✓ | ✓ | 87.2 | 57.8 | 50.0 |  |  | 50.0 |" in page
    written = {(line.task, line.dataset): line for line in read_results(tmp_path / "results.jsonl")}
    assert set(written) == {("ablation", "ucf101"), ("ablation", "hmdb51")}
    assert (
        written["ablation", "ucf101"].split == "1"
        and written["ablation", "ucf101"].metrics["top1"].value == 0.5
    )


# --- the tools behind it ---


def test_evaluation_explains_what_it_cannot_do(tmp_path, capsys):
    common = ["--world", str(tmp_path), "--shards-train", str(tmp_path), "--shards-test", str(tmp_path)]
    common += ["--out", str(tmp_path / "x.json")]
    assert evaluate_world.main(["--run", str(tmp_path), *common]) == 1
    assert "holds no checkpoints" in capsys.readouterr().err
    assert evaluate_world.main(["--untrained", "nothing", *common]) == 1
    assert "is no preset" in capsys.readouterr().err
    assert evaluate_world.main(["--untrained", "demo-ablation", *common]) == 1
    assert "manifest.json does not exist" in capsys.readouterr().err
    assert not (tmp_path / "x.json").exists()


def clip_set(categories: list[str], part: str = "easy", clips_per_video: int = 2) -> world.ClipSet:
    """Clips of videos of which only the sounding category is known; the last video has no sound at all."""
    clips = world.ClipSet()
    for number, category in enumerate([*categories, None]):
        thing = TruthObject(category=str(category), sounding=True, moving=True, boxes=np.zeros((1, 4)))
        truth = Truth(
            part=part, sound="on-screen" if category else "silent", category=category, fps=25.0, width=8, height=8,
            objects=(thing,), bands_hz=(),
        )  # fmt: skip
        for _ in range(clips_per_video):
            clips.clips.append(SimpleNamespace(video_id=f"{part}_{number}.mp4"))
            clips.truths.append(truth)
    return clips


def test_probes_count_videos_and_know_no_category_they_were_not_taught():
    """Features that name the category: all found but the videos of a category without training video."""
    columns = {"bell": 0, "drum": 1, "horn": 2}

    def features(clips: world.ClipSet) -> np.ndarray:
        rng = np.random.default_rng(0)
        rows = [np.eye(4)[columns.get(truth.category, 3)] for truth in clips.truths]
        return (np.array(rows) + 0.01 * rng.standard_normal((len(rows), 4))).astype(np.float32)

    train_clips, test_clips = clip_set(["bell", "drum"] * 6), clip_set(["bell", "drum", "drum", "horn"])
    train_set, test_set = (train_clips, features(train_clips)), (test_clips, features(test_clips))
    figure = evaluate_world.probe_figure(train_set, test_set, lambda truth: True, 16, seed=0)
    assert figure["value"] == 0.75 and figure["num_videos"] == 4 and figure["num_clips"] == 8
    assert figure["chance"] == 1 / 16 and figure["num_training_videos"] == 12
    figure = evaluate_world.one_shot_figure(train_set, test_set, 16, seed=0)
    assert figure["value"] == 0.75 and figure["num_videos"] == 4
    figure = evaluate_world.category_retrieval_figure(train_set, test_set, seed=0)
    assert figure["value"] == 0.75 and figure["gallery"] == 12
    swapped = test_clips, features(clip_set(["drum", "bell", "bell", "horn"]))
    assert evaluate_world.probe_figure(train_set, swapped, lambda truth: True, 16, seed=0)["value"] == 0
    with pytest.raises(ValueError, match="none of 26 train clips"):
        evaluate_world.probe_figure(train_set, test_set, lambda truth: truth.part == "hard", 16, 0)


def test_features_are_means_over_all_positions():
    torch.manual_seed(0)
    model = build_model(train.parse(["demo-ablation"])).eval()
    pooled = evaluate_world.PooledFeatures(model)
    frames, log_mel = torch.randint(0, 256, (3, 3, 8, 40, 40), dtype=torch.uint8), torch.randn(3, 1, 128, 101)
    whole = model.encode(frames, log_mel)
    pooled.encode(frames[:2], log_mel[:2])
    pooled.encode(frames[2:], log_mel[2:])
    taken = pooled.take()
    np.testing.assert_allclose(
        taken["video"], whole.feature_v.mean(dim=(2, 3, 4)).numpy(), rtol=1e-4, atol=1e-5
    )
    np.testing.assert_allclose(taken["audio"], whole.feature_a.mean(dim=(2, 3)).numpy(), rtol=1e-4, atol=1e-5)


def test_untrained_network_is_what_a_training_of_that_seed_starts_from(tmp_path):
    args = argparse.Namespace(run=None, untrained="demo-ablation", seed=3)
    model, config, _ = evaluate_world.load(args)
    trained = Pretraining(dataclasses.replace(config, seed=3, run_dir=str(tmp_path)), torch.device("cpu"), 10)
    state = trained.model.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


@pytest.mark.slow
def test_a_tiny_table_from_nothing_to_markdown(tmp_path):
    command = [sys.executable, "-m", "tools.reproduce", "--table", "1", "--scale", "demo", "--seeds", "1"]
    command += [
        "--only",
        FULL,
        "--only",
        SCRATCH,
        "--steps",
        "2",
        "--train-videos",
        "40",
        "--test-videos",
        "24",
    ]
    command += ["--out", str(tmp_path), "--results", str(tmp_path / "results.jsonl")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600, check=False
    )
    logs = "".join(path.read_text()[-1500:] for path in tmp_path.rglob("*.log"))
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:] + logs
    (page,) = tmp_path.rglob("table1.md")
    assert "one seed" in page.read_text() and "87.2" in page.read_text()
    (figures,) = tmp_path.rglob("figures/full-seed0.json")
    record = json.loads(figures.read_text())
    for figure in reproduce.DEMO_FIGURES:
        assert 0 <= record["figures"][figure.name]["value"] <= 1, figure.name
        assert figure.heading in page.read_text()
    assert record["origin"]["step"] == 2 and record["num_bad_clips"] == {"train": 0, "test": 0}
    results = {line.config["variant"]: line for line in read_results(tmp_path / "results.jsonl")}
    assert set(results) == {FULL, SCRATCH}
