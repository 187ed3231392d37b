"""Ablation tables: pairs of seeds, verdicts on the paper's order, and what the page shows. All figures made up here."""

import dataclasses
import json
import math

import pytest
import torch

import train
from cmac.checkpoint import build_model
from cmac.config import PRESETS, VARIANTS, apply_variant
from cmac.encoders import AudioEncoderConfig, VideoEncoderConfig
from cmac.evaluation.ablations import (
    FULL,
    SCRATCH,
    AblationTable,
    Figure,
    compare,
    judge,
    paper_lead,
    paper_order,
    summarize,
    table_rows,
    to_json,
    to_markdown,
)
from cmac.evaluation.paper import TABLES
from cmac.evaluation.results import Metric
from cmac.step import TrainingStep

ABLATIONS = ("1", "2", "3", "fig4")


def seeds(*values: float, figure: str = "probe", chance: float | None = 0.0625) -> dict:
    return {seed: {figure: Metric(value=value, chance=chance)} for seed, value in enumerate(values)}


MEASURED = {
    SCRATCH: seeds(0.20, 0.22, 0.21),
    "single-modality": seeds(0.50, 0.10, 0.30),
    "no-contrastive": seeds(0.30, 0.31, 0.29),
    "no-consistency": seeds(0.62, 0.60, 0.61),
    FULL: seeds(0.55, 0.52, 0.56),
}


def table(**changes) -> AblationTable:
    fields = {
        "table": "1",
        "scale": "demo",
        "figures": (Figure(name="probe", heading="video probe", paper_column=0),),
        "measured": MEASURED,
        "failed": {},
        "notes": ("made up",),
    }
    return AblationTable(**{**fields, **changes})


# --- variants ---


@pytest.mark.parametrize("name", VARIANTS)
def test_a_variant_is_the_same_as_its_flags(name):
    for preset in PRESETS:
        named = train.parse([f"{preset}:{name}"])
        typed = train.parse([preset, *VARIANTS[name].flags])
        assert named == dataclasses.replace(typed, run_dir=f"{typed.run_dir}-{name}")
        assert named == apply_variant(PRESETS[preset](), name)
        assert dataclasses.replace(named, run_dir=typed.run_dir) != PRESETS[preset]()


def test_every_row_of_the_ablations_can_be_trained():
    for name in ABLATIONS:
        assert [row.method for row in table_rows(TABLES[name])]
        for row in table_rows(TABLES[name]):
            assert row.variant in {FULL, SCRATCH, *VARIANTS}
        assert len(table_rows(TABLES[name])) >= len(TABLES[name].rows)  # none of the paper's rows is left out
    weights = [(row.settings[0], row.variant) for row in table_rows(TABLES["fig4"])]
    assert weights == [
        ("0", "no-consistency"), ("0.5", "lambda-0.5"), ("1", "lambda-1"), ("1.5", FULL), ("2", "lambda-2"),
        ("3", "lambda-3"),
    ]  # fmt: skip
    for weight, variant in weights:
        config = PRESETS["demo"]() if variant == FULL else apply_variant(PRESETS["demo"](), variant)
        assert config.loss.consistency_weight == float(weight)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("demo:no-contrastve", "did you mean no-contrastive"),
        ("dmo:no-contrastive", "did you mean demo"),
        ("demo:", "is no variant"),
    ],
)
def test_a_wrong_variant_is_explained(arguments, message):
    with pytest.raises(SystemExit, match=message):
        train.parse([arguments])
    with pytest.raises(ValueError, match="is no variant, expected one of single-modality"):
        apply_variant(PRESETS["demo"](), "nothing")


@pytest.mark.parametrize("name", [FULL, *VARIANTS])
def test_every_variant_trains(name):
    """Two steps of a small network: encoders change, and what the variant takes out of training does not."""
    config = PRESETS["demo-ablation"]() if name == FULL else apply_variant(PRESETS["demo-ablation"](), name)
    model = dataclasses.replace(
        config.model,
        video=VideoEncoderConfig(widths=(4, 8), blocks=(1, 1), stem_width=4),
        audio=AudioEncoderConfig(widths=(4, 8), blocks=(1, 1)),
        filter_channels=8,
        embedding_dim=8,
        queue_length=16,
        batch_norm_group=2,
    )
    torch.manual_seed(0)
    trainer = TrainingStep(
        build_model(dataclasses.replace(config, model=model)),
        config.optimizer,
        device=torch.device("cpu"),
        precision="fp32",
        channels_last=True,
    )
    before = {key: value.clone() for key, value in trainer.model.state_dict().items()}
    ids, valid = torch.arange(4), torch.ones(4, dtype=torch.bool)
    for step in range(2):
        frames = torch.randint(0, 256, (2, 4, 3, 4, 16, 16), dtype=torch.uint8)
        log_mel = torch.randn(2, 4, 1, 32, 33)
        output = trainer(
            frames[0], log_mel[0], ids, valid, learning_rate=1e-2, shuffle_seed=step,
            second=(frames[1], log_mel[1]) if config.loader.clips_per_video == 2 else None,
        )  # fmt: skip
        ids = ids + 4
        assert torch.isfinite(output.loss)
    changed = {
        key for key, value in trainer.model.state_dict().items() if not torch.equal(value, before[key])
    }
    assert {"video.encoder.stem.0.weight", "audio.encoder.conv1.weight"} <= changed
    assert any(key.startswith("saliency_v") for key in changed) == (config.loss.consistency_weight > 0)
    assert any(key.startswith("heads") for key in changed) == config.loss.contrastive
    assert (output.consistency > 0) == (config.loss.consistency_weight > 0)
    assert (output.contrastive > 0) == config.loss.contrastive


# --- the paper's order ---


def test_order_of_table_1_is_the_papers():
    assert paper_order(TABLES["1"], 0) == [
        (FULL, "no-consistency", 1.7),
        ("no-consistency", "single-modality", 3.0),
        ("single-modality", "no-contrastive", 6.1),
        ("no-contrastive", SCRATCH, 3.2),
    ]


def test_order_of_figure_4_rises_to_one_and_a_half_and_falls():
    pairs = [(better, worse) for better, worse, points in paper_order(TABLES["fig4"], 0)]
    assert pairs == [
        ("lambda-0.5", "no-consistency"), ("lambda-1", "lambda-0.5"), (FULL, "lambda-1"), (FULL, "lambda-2"),
        ("lambda-2", "lambda-3"),
    ]  # fmt: skip


def test_lead_over_the_full_model_knows_who_is_ahead():
    rows = {row.variant: row for row in table_rows(TABLES["2"])}
    assert paper_lead(TABLES["2"], rows["norm-none"], 0) == (FULL, "norm-none", 1.4)
    assert paper_lead(TABLES["2"], rows["scales-3"], 1) == (FULL, "scales-3", 0.1)
    assert paper_lead(TABLES["2"], rows[FULL], 0) is None
    esc50 = {row.variant: row for row in table_rows(TABLES["6"])}["baseline"]
    assert paper_lead(TABLES["6"], esc50, 0) is None  # a dash is no claim
    assert paper_lead(TABLES["6"], esc50, 1) == (FULL, "baseline", 8.0)


# --- comparisons ---


def test_pairs_of_seeds_give_the_t_interval_worked_by_hand():
    pair = compare(MEASURED, FULL, "no-contrastive", "probe", 10.8)
    differences = [0.25, 0.21, 0.27]
    mean = sum(differences) / 3
    deviation = math.sqrt(sum((value - mean) ** 2 for value in differences) / 2)
    half = 4.302653 * deviation / math.sqrt(3)  # t of two degrees of freedom, 97.5 %
    assert pair.difference == pytest.approx(mean)
    assert pair.interval == pytest.approx((mean - half, mean + half), rel=1e-5)
    assert pair.seeds == (0, 1, 2) and pair.verdict == "holds"


def test_only_seeds_of_both_are_compared():
    measured = {
        **MEASURED,
        "no-contrastive": {1: MEASURED["no-contrastive"][1], 7: MEASURED["no-contrastive"][2]},
    }
    pair = compare(measured, FULL, "no-contrastive", "probe")
    assert pair.seeds == (1,) and pair.verdict == "one seed" and pair.difference == pytest.approx(0.21)
    assert compare(measured, FULL, "norm-none", "probe").verdict == "not measured"
    assert compare(measured, FULL, "no-contrastive", "other").difference is None


@pytest.mark.parametrize(
    ("num_seeds", "interval", "verdict"),
    [
        (3, (0.01, 0.2), "holds"),
        (3, (-0.2, -0.01), "reversed"),
        (3, (-0.01, 0.2), "not distinguishable"),
        (3, (0.0, 0.2), "not distinguishable"),
        (3, None, "not distinguishable"),
        (1, None, "one seed"),
        (0, None, "not measured"),
    ],
)
def test_verdict_follows_the_interval(num_seeds, interval, verdict):
    assert judge(num_seeds, interval) == verdict


def test_order_is_reported_as_found_also_where_it_does_not_hold():
    verdicts = {(pair.better, pair.worse): pair.verdict for pair in table().order()}
    assert verdicts == {
        (FULL, "no-consistency"): "reversed",
        ("no-consistency", "single-modality"): "not distinguishable",
        ("single-modality", "no-contrastive"): "not distinguishable",
        ("no-contrastive", SCRATCH): "holds",
    }


def test_summary_is_mean_interval_and_seeds():
    metric = summarize(MEASURED)[FULL]["probe"]
    assert metric.value == pytest.approx((0.55 + 0.52 + 0.56) / 3) and metric.per_fold == (0.55, 0.52, 0.56)
    assert metric.interval[0] < metric.value < metric.interval[1] and metric.chance == 0.0625
    partly = {FULL: {0: {"a": Metric(value=0.1), "b": Metric(value=0.2)}, 1: {"a": Metric(value=0.3)}}}
    assert list(summarize(partly)[FULL]) == ["a"]


# --- the page ---


def cells(page: str, start: str) -> list[str]:
    line = next(line for line in page.splitlines() if line.startswith(start))
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_page_has_the_papers_figures_beside_ours():
    page = to_markdown(table())
    assert cells(page, "| Method")[4:6] == ["UCF101 (paper)", "HMDB51 (paper)"]
    row = cells(page, "| CMAC w/o L_cl")
    assert row[:6] == ["CMAC w/o L_cl", "`no-contrastive`", "✓", "✗", "76.4", "25.1"]
    assert row[6].startswith("30.0 [") and row[7].startswith("-24.3 [") and row[8] == "holds"
    row = cells(page, "| CMAC w/o L_ac")
    assert row[7].startswith("+6.7 [") and row[8] == "reversed"
    assert cells(page, "| CMAC |")[7:] == ["", ""]  # the full model is not compared with itself
    assert cells(page, "| chance")[6] == "6.2"
    assert "made up" in page and "57.9 in Table 2" in page


def test_page_says_what_failed_and_keeps_the_rest():
    measured = {name: values for name, values in MEASURED.items() if name != "single-modality"}
    measured["no-contrastive"] = {0: MEASURED["no-contrastive"][0]}
    failed = {"single-modality": "exit status 3; the end of x.log:\nboom", "no-contrastive": "seed 1"}
    page = to_markdown(table(measured=measured, failed=failed))
    assert cells(page, "| Single Modality")[6:] == ["failed", "", "not measured"]
    assert cells(page, "| CMAC w/o L_cl")[6] == "30.0 (a seed failed)"
    assert cells(page, "| CMAC w/o L_ac")[6].startswith("61.0 [")
    assert "## Failed" in page and "boom" in page


def test_json_holds_all_that_the_page_shows():
    record = json.loads(json.dumps(to_json(table(failed={"no-contrastive": "why"})), allow_nan=False))
    rows = {row["variant"]: row for row in record["rows"]}
    assert rows[FULL]["paper_percents"] == [87.2, 57.8] and rows[FULL]["against_full"] == {}
    assert rows["no-contrastive"]["failed"] == "why"
    assert rows["no-contrastive"]["figures"]["probe"]["per_fold"] == [0.30, 0.31, 0.29]
    assert rows["no-consistency"]["against_full"]["probe"]["verdict"] == "reversed"
    assert [pair["verdict"] for pair in record["order"]].count("holds") == 1


def test_fresh_weights_stand_in_every_table_of_the_demo():
    assert [row.variant for row in table(table="4").rows()] == [SCRATCH, FULL]
    assert [row.variant for row in table(table="1").rows()].count(SCRATCH) == 1
    assert SCRATCH not in [row.variant for row in table(table="2", scale="paper").rows()]
    page = to_markdown(table(table="4", measured={FULL: MEASURED[FULL]}))
    assert cells(page, "| fresh weights")[-3] == "-"


def test_empty_table_can_be_shown():
    page = to_markdown(table(measured={}))
    assert "| CMAC w/o L_cl | `no-contrastive` |" in page and "not measured" in page
