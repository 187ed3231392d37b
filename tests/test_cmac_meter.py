"""Rows of log.jsonl: which figures there are, what they are of, and that telling them changes and delays nothing."""

import dataclasses
import json
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fake_runs import CPU, FakeLoader, config, rows
from test_cmac_step import WaitCounter

from cmac.losses import LossConfig
from cmac.meter import Meter, Row, measures_gradients, timed_batches
from cmac.pretrain import Pretraining, pretrain
from cmac.run_log import GROUPS
from loaders.batch import BadClipRecord

FIELDS = {
    "step", "epoch", "loss", "loss_contrastive", "loss_consistency", "accuracy_v2a", "accuracy_a2v", "learning_rate",
    "loss_scale", "skipped_steps", "clips_per_second", "step_seconds_median", "step_seconds_max", "data_wait_seconds",
    "data_wait_fraction", "bad_clips", "bad_clips_by_reason", "gradient_step", "gradient_norm",
    "gradient_norm_contrastive", "gradient_norm_consistency", "gradient_cosine", "queue_age_oldest", "queue_age_mean",
    "queue_filled", "gpu_memory_allocated_bytes", "gpu_memory_reserved_bytes", "host_memory_bytes", "train_seconds",
    "eta_seconds",
}  # fmt: skip
TIMES = ("clips_per_second", "train_seconds", "eta_seconds", "host_memory_bytes")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Pretraining, list[Row]]:
    """A run of 15 steps that is never stopped; it measures gradients in steps 1, 4, 8 and 12."""
    folder = tmp_path_factory.mktemp("meter")
    training = pretrain(config(folder, gradient_norms_every=4, checkpoint_every=2), FakeLoader(), CPU)
    return training, rows(folder)


@pytest.fixture
def training(tmp_path: Path) -> Pretraining:
    return Pretraining(config(tmp_path), CPU, steps_per_epoch=5)


def refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON")


def test_each_row_has_all_figures_as_strict_json(whole, tmp_path):
    _, logged = whole
    assert {frozenset(row) for row in logged} == {frozenset(FIELDS)}
    path = Path(whole[0].config.run_dir) / "log.jsonl"
    for line in path.read_text().splitlines():
        json.loads(line, parse_constant=refuse)


def test_every_figure_has_a_chart():
    assert FIELDS - {name for names in GROUPS.values() for name in names} == {"step", "gradient_step"}


def test_gradient_norms_are_of_the_first_step_and_of_each_that_was_asked_for(whole):
    _, logged = whole
    assert [row["gradient_step"] for row in logged] == [1, 4, None, 8, None, 12, None, None]
    for row in logged:
        figures = [value for name, value in row.items() if name.startswith(("gradient_norm", "gradient_cos"))]
        if row["gradient_step"] is None:
            assert figures == [None] * 4
        else:
            assert row["gradient_norm"] > 0 and row["gradient_norm_consistency"] > 0
        if row["gradient_step"] == 1:  # the queue is empty: there is nothing to tell the positive from
            assert row["gradient_norm_contrastive"] == 0 and row["gradient_cosine"] is None
        elif row["gradient_step"] is not None:
            assert row["gradient_norm_contrastive"] > 0 and -1 <= row["gradient_cosine"] <= 1
    assert [step for step in range(1, 9) if measures_gradients(step, 3)] == [1, 3, 6]
    assert not any(measures_gradients(step, 0) for step in range(1, 9))


def test_measuring_gradients_changes_neither_weights_nor_losses(whole, tmp_path):
    measured, logged = whole
    plain = pretrain(config(tmp_path, gradient_norms_every=0), FakeLoader(), CPU)
    for name, value in measured.model.state_dict().items():
        assert torch.equal(value, plain.model.state_dict()[name]), name
    assert [row["loss"] for row in logged] == [row["loss"] for row in rows(tmp_path)]
    assert all(row["gradient_norm"] is None for row in rows(tmp_path))


def test_ages_of_keys_are_those_of_ten_slots_and_four_clips_a_step(whole):
    first, second, *others = whole[1]
    assert (first["queue_age_oldest"], first["queue_age_mean"], first["queue_filled"]) == (
        2,
        1.5,
        pytest.approx(0.8),
    )
    # Step 4 has a bad clip, so of ten slots one is empty: two clips of step 2, four of step 3 and three of step 4.
    assert (second["queue_age_oldest"], second["queue_filled"]) == (3, pytest.approx(0.9))
    assert second["queue_age_mean"] == pytest.approx((2 * 3 + 4 * 2 + 3 * 1) / 9)
    assert all(row["queue_age_oldest"] == 3 for row in others)


def test_rows_of_a_run_that_was_stopped_are_those_of_one_that_was_not(whole, tmp_path):
    """Gradients, ages of keys and bad clips as well; only what a clock or the machine says differs."""
    run = config(tmp_path, gradient_norms_every=4, checkpoint_every=2)
    pretrain(dataclasses.replace(run, max_steps=6), FakeLoader(), CPU)
    (tmp_path / "log.jsonl").open("a").write('{"step": 8, "loss": 1.0}\n{"step": 9, "lo')
    pretrain(run, FakeLoader(), CPU)
    for one, other in zip(whole[1], rows(tmp_path), strict=True):
        for name in FIELDS - set(TIMES):
            if "seconds" not in name and "wait" not in name:
                assert one[name] == other[name], (one["step"], name)
    assert rows(tmp_path)[-1]["bad_clips_by_reason"] == {"decode-error": 3}


def test_bad_clips_of_an_older_checkpoint_are_of_unknown_reason(training):
    state = training.state_dict(FakeLoader())
    assert state["bad_clips"] == {}
    training.load_state_dict({**state, "step": 0, "bad_clips": 7}, FakeLoader())
    assert training.bad_clips == Counter(unknown=7)


def test_what_is_not_trained_is_null(tmp_path):
    batch_negatives = LossConfig(negatives="batch", consistency_weight=0.0)
    pretrain(config(tmp_path, loss=batch_negatives, max_steps=2), FakeLoader(), CPU)
    (row,) = rows(tmp_path)
    none = ("gradient_norm_consistency", "gradient_cosine", "queue_age_oldest", "queue_filled", "loss_scale")
    assert [row[name] for name in (*none, "gpu_memory_allocated_bytes")] == [None] * 6
    assert row["gradient_norm_contrastive"] == row["gradient_norm"] > 0
    assert row["host_memory_bytes"] > 2**20


def taken(training: Pretraining, meter: Meter, batch: Any) -> None:
    meter.add(training.train_step(batch), batch)


def test_adding_a_step_waits_for_nothing_and_a_row_does(training):
    meter, loader = Meter(training), FakeLoader()
    first, second = next(iter(loader)), next(iter(loader))
    taken(training, meter, first)
    output = training.train_step(second)
    with WaitCounter() as counter:
        meter.add(output, second)
        meter.add_skipped(second)
    assert counter.count == {}
    with WaitCounter() as counter:
        meter.row()
    assert counter.count.total() > 0


def gather_with(**other: Any) -> Callable[[dict], list[dict]]:
    """As with a second rank, of which all is as on this one but for what is given."""
    return lambda own: [own, {**own, **other}]


def test_of_several_ranks_losses_are_means_clips_sums_and_times_those_of_the_slowest(training):
    meter, bad = Meter(training), BadClipRecord(key="a", shard="s", reason="checksum")
    taken(training, meter, dataclasses.replace(next(iter(FakeLoader())), bad=(bad, bad)))
    meter.wait_seconds = 0.001
    largest = [0.25, 40.0, 50.0, 6e9, 7e9, 2**50]
    other = gather_with(means=[0.0] * 5, clips=36, bad={"checksum": 1, "decode-error": 4}, largest=largest)
    training.agreement = SimpleNamespace(gather=lambda own: told.append(own) or other(own))
    told: list[dict] = []
    row = meter.row()
    assert row["loss"] == pytest.approx(told[0]["means"][0] / 2)
    assert row["bad_clips_by_reason"] == {"checksum": 3, "decode-error": 4} and row["bad_clips"] == 7
    assert row["data_wait_seconds"] == 0.25
    assert row["step_seconds_median"] == 40 and row["step_seconds_max"] == 50
    memory = ("gpu_memory_allocated_bytes", "gpu_memory_reserved_bytes", "host_memory_bytes")
    assert [row[name] for name in memory] == [6e9, 7e9, 2**50]
    assert row["clips_per_second"] == pytest.approx(40 / row["train_seconds"])


def test_steps_that_were_left_out_count_clips_and_time_and_no_losses(training):
    meter, loader = Meter(training), FakeLoader()
    training.step, training.trainer.skipped_steps = 1, 1
    meter.add_skipped(next(iter(loader)))
    row = meter.row()
    assert row["loss"] is None and row["accuracy_v2a"] is None and row["gradient_norm"] is None
    assert row["skipped_steps"] == 1 and row["clips_per_second"] > 0 and row["step_seconds_max"] > 0


def test_figures_that_are_not_finite_are_null(training):
    meter, loader = Meter(training), FakeLoader(nan_at=[(0, 0)])
    taken(training, meter, next(iter(loader)))
    row = meter.row()
    assert row["loss"] is None and row["gradient_norm"] is None
    json.loads(json.dumps(row), parse_constant=refuse)


def test_the_longest_step_is_that_which_took_longest(training):
    meter, loader = Meter(training), FakeLoader()
    batch = next(iter(loader))
    training.step = 3
    for pause in (0.0, 0.2, 0.0):
        time.sleep(pause)
        meter.add_skipped(batch)
    row = meter.row()
    assert row["step_seconds_max"] >= 0.2 > row["step_seconds_median"] > 0


def test_time_waiting_for_batches_is_counted_and_time_working_is_not():
    loader = FakeLoader(before=lambda epoch, step: time.sleep(0.02))
    meter = SimpleNamespace(wait_seconds=0.0)
    started = time.perf_counter()
    for _ in timed_batches(loader, meter):
        time.sleep(0.05)
    assert 5 * 0.02 <= meter.wait_seconds <= time.perf_counter() - started - 5 * 0.05


def test_loss_scale_is_told_with_fp16(tmp_path):
    training = pretrain(config(tmp_path, precision="fp16", max_steps=2), FakeLoader(), CPU)
    assert rows(tmp_path)[0]["loss_scale"] == training.trainer.scaler.get_scale() > 1


@pytest.mark.gpu
def test_memory_of_the_gpu_is_the_largest_since_the_last_row(tmp_path):
    device = torch.device("cuda")
    training = Pretraining(config(tmp_path, device="cuda"), device, steps_per_epoch=5)
    meter, loader = Meter(training), FakeLoader()
    batches = iter(loader)
    taken(training, meter, next(batches))
    held = torch.empty(2**28, dtype=torch.uint8, device=device)
    del held
    large = meter.row()
    taken(training, meter, next(batches))
    small = meter.row()
    assert large["gpu_memory_allocated_bytes"] > 2**28 > small["gpu_memory_allocated_bytes"] > 0
    assert small["gpu_memory_reserved_bytes"] >= 2**28 and small["step_seconds_max"] > 0
