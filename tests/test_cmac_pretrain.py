"""The training loop: schedule, exact resume, log rows, checkpoints, and what it refuses."""

import contextlib
import dataclasses
import io
import json
import math
import resource
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from fake_runs import CPU, FakeLoader, config, reports, rows, run_two_ranks

import cmac
from cmac import agreement
from cmac.checkpoint import list_checkpoints, read_checkpoint, save_checkpoint
from cmac.config import (
    PRESETS,
    config_from_dict,
    config_to_dict,
    demo,
    pretrain_k400,
    pretrain_k400_ablation,
)
from cmac.losses import LossConfig
from cmac.model import StepOutput
from cmac.nonfinite import tensors_not_finite
from cmac.optim import OptimizerConfig
from cmac.pretrain import (
    Pretraining,
    learning_rate_at,
    pretrain,
    record_bad_clips,
    resolve_precision,
    start,
)
from cmac.pretrain import run as run_training
from loaders.base import TooManyBadClips, is_over_budget
from loaders.batch import BadClipRecord, ClipBatch
from loaders.config import LoaderConfig


def test_learning_rate_warms_up_linearly_and_then_stays_or_falls():
    constant = OptimizerConfig(learning_rate=0.01, warmup_epochs=10)
    rates = [learning_rate_at(constant, step, 100, 20_000, 8) for step in (0, 499, 999, 1000, 19_999)]
    assert rates == pytest.approx([0.01 / 1000, 0.005, 0.01, 0.01, 0.01])
    scaled = dataclasses.replace(constant, learning_rate_per_rank=True)
    assert learning_rate_at(scaled, 5000, 100, 20_000, 8) == pytest.approx(0.08)
    cosine = OptimizerConfig(learning_rate=0.01, warmup_epochs=0, schedule="cosine")
    assert learning_rate_at(cosine, 0, 100, 1000, 1) == pytest.approx(0.01)
    assert learning_rate_at(cosine, 500, 100, 1000, 1) == pytest.approx(0.005)
    assert learning_rate_at(cosine, 999, 100, 1000, 1) < 1e-7


def test_presets_hold_the_papers_numbers():
    final, ablation = pretrain_k400(), pretrain_k400_ablation()
    assert (final.epochs, final.loader.global_batch_size, final.loader.video.color_jitter) == (200, 128, True)
    assert (ablation.epochs, ablation.loader.global_batch_size, ablation.loader.video.color_jitter) == (
        50,
        64,
        False,
    )
    for preset in (final, ablation):
        optimizer, model = preset.optimizer, preset.model
        assert (optimizer.name, optimizer.learning_rate, optimizer.weight_decay) == ("sgd", 0.01, 1e-5)
        assert (optimizer.momentum, optimizer.warmup_epochs) == (0.9, 10)
        assert (model.momentum, model.queue_length, preset.loss.temperature) == (0.999, 15_000, 0.07)
        assert (model.filter_channels, model.embedding_dim, preset.loss.consistency_weight) == (512, 256, 1.5)
        assert (preset.loader.video.crop_size, preset.loader.video.num_frames) == (128, 32)
        assert preset.loader.audio.num_mel_bins == 257


@pytest.mark.parametrize("name", PRESETS)
def test_configurations_survive_json(name):
    preset = PRESETS[name]()
    assert config_from_dict(json.loads(json.dumps(config_to_dict(preset)))) == preset


def test_unknown_field_in_a_saved_configuration_is_named():
    data = config_to_dict(demo())
    data["optimizer"]["learning_rat"] = 1.0
    with pytest.raises(ValueError, match="learning_rat"):
        config_from_dict(data)


def test_precision_on_cpu_is_fp32_unless_chosen():
    assert resolve_precision("auto", CPU) == "fp32"
    assert resolve_precision("bf16", CPU) == "bf16"


def test_a_run_writes_its_configuration_rows_and_checkpoints(tmp_path):
    run = config(tmp_path / "run")
    training = pretrain(run, FakeLoader(), CPU)
    assert training.step == 15
    saved = config_from_dict(json.loads((tmp_path / "run/config.json").read_text()))
    assert saved == run
    logged = rows(tmp_path / "run")
    assert [row["step"] for row in logged] == [2, 4, 6, 8, 10, 12, 14, 15]
    assert logged[-1]["epoch"] == 2 and logged[-1]["bad_clips"] == 3
    for row in logged:
        assert 0 <= row["data_wait_fraction"] <= 1 and row["clips_per_second"] > 0
        assert row["loss"] == pytest.approx(row["loss_contrastive"] + 1.5 * row["loss_consistency"], rel=1e-5)
    names = [path.name for path in list_checkpoints(tmp_path / "run/checkpoints")]
    assert names == ["step_00000008.pt", "step_00000012.pt", "step_00000015.pt"]
    assert not list((tmp_path / "run").rglob("*.tmp"))
    assert list((tmp_path / "run/tb").iterdir())
    bad = [json.loads(line) for line in (tmp_path / "run/bad_clips.jsonl").read_text().splitlines()]
    assert (
        bad[0] == {"epoch": 0, "step": 3, "key": "d", "shard": "s", "reason": "decode-error"}
        and len(bad) == 3
    )


@pytest.mark.parametrize("stop_after", [4, 8, 10])
def test_resuming_equals_never_stopping(tmp_path, stop_after):
    """Weights, momentum copies, queues, batch-norm statistics and log rows, bit for bit."""
    whole = pretrain(config(tmp_path / "whole", checkpoint_every=2), FakeLoader(), CPU)
    run = config(tmp_path / "run", checkpoint_every=2)
    pretrain(dataclasses.replace(run, max_steps=stop_after), FakeLoader(), CPU)
    torch.rand(7)  # another process has drawn other random numbers
    loader = FakeLoader()
    resumed = pretrain(run, loader, CPU)
    assert loader.handed_out[0] == divmod(stop_after, 5)
    expected, got = whole.model.state_dict(), resumed.model.state_dict()
    assert expected.keys() == got.keys()
    for name in expected:
        assert torch.equal(expected[name], got[name]), name
    for one, other in zip(rows(tmp_path / "whole"), rows(tmp_path / "run"), strict=True):
        assert (one["step"], one["loss"], one["learning_rate"]) == (
            other["step"],
            other["loss"],
            other["learning_rate"],
        )


def test_resuming_takes_the_optimizer_settings_of_the_new_configuration(tmp_path):
    run = config(tmp_path / "run")
    pretrain(dataclasses.replace(run, max_steps=4), FakeLoader(), CPU)
    changed = dataclasses.replace(
        run, optimizer=dataclasses.replace(run.optimizer, weight_decay=0.5, momentum=0.1)
    )
    training = start(changed, FakeLoader(), CPU)
    (group,) = training.trainer.optimizer.param_groups
    assert (group["weight_decay"], group["momentum"]) == (0.5, 0.1)
    assert all(
        "momentum_buffer" in training.trainer.optimizer.state[parameter] for parameter in group["params"]
    )


def test_a_run_made_longer_says_what_becomes_of_its_cosine(tmp_path, capsys):
    cosine = OptimizerConfig(warmup_epochs=0, schedule="cosine")
    pretrain(config(tmp_path, optimizer=cosine, max_steps=1), FakeLoader(), CPU)
    capsys.readouterr()
    training = start(config(tmp_path, optimizer=cosine, max_steps=2), FakeLoader(), CPU)
    assert (
        "the cosine now ends at step 2, it was 1; it goes on at 0.005 from step 1" in capsys.readouterr().out
    )
    assert training.learning_rate() == pytest.approx(0.005)


def test_bad_clips_are_counted_over_a_resume(tmp_path):
    run = config(tmp_path / "run")
    pretrain(dataclasses.replace(run, max_steps=8), FakeLoader(), CPU)
    pretrain(run, FakeLoader(), CPU)
    assert [row["bad_clips"] for row in rows(tmp_path / "run")] == [0, 1, 1, 1, 2, 2, 3, 3]


@pytest.mark.parametrize("seed", [0, 20240101, 2**62])
def test_any_seed_shuffles_keys_anew_at_every_step(tmp_path, seed):
    training = Pretraining(config(tmp_path, seed=seed), CPU, steps_per_epoch=5)
    seeds = []
    for batch in FakeLoader():
        seeds.append(training._shuffle_seed())
        training.train_step(batch)
    assert len(set(seeds)) == 5 and 0 <= min(seeds) and max(seeds) < 2**63


def test_a_batch_that_groups_cannot_split_is_said_aloud(tmp_path, capsys):
    fits = config(tmp_path / "fits")
    start(fits, FakeLoader(), CPU)
    assert "share batch statistics" not in capsys.readouterr().out
    model = dataclasses.replace(fits.model, batch_norm_group=16)
    start(config(tmp_path / "small", model=model), FakeLoader(), CPU)
    assert "share batch statistics" in capsys.readouterr().out


def test_rows_after_the_checkpoint_are_replaced_on_resume(tmp_path):
    run = config(tmp_path / "run")
    pretrain(dataclasses.replace(run, max_steps=4), FakeLoader(), CPU)
    log = tmp_path / "run/log.jsonl"
    log.write_text(log.read_text() + json.dumps({"step": 6, "loss": -1.0}) + '\n{"step": 8, "lo')
    pretrain(run, FakeLoader(), CPU)
    assert [row["step"] for row in rows(tmp_path / "run")] == [2, 4, 6, 8, 10, 12, 14, 15]
    assert all(row["loss"] >= 0 for row in rows(tmp_path / "run"))


def test_a_finished_run_is_left_as_it_is(tmp_path):
    run = config(tmp_path / "run")
    pretrain(run, FakeLoader(), CPU)
    loader = FakeLoader()
    assert pretrain(run, loader, CPU).step == 15
    assert loader.handed_out == []


def test_another_model_in_the_same_folder_is_refused(tmp_path):
    pretrain(config(tmp_path / "run", max_steps=4), FakeLoader(), CPU)
    other = config(tmp_path / "run", loss=LossConfig(temperature=0.1))
    with pytest.raises(ValueError, match="loss.temperature: 0.07 -> 0.1; choose another run_dir"):
        pretrain(other, FakeLoader(), CPU)
    with pytest.raises(ValueError, match="resume is 'never'"):
        pretrain(config(tmp_path / "run", resume="never"), FakeLoader(), CPU)


def test_a_loss_that_is_not_finite_stops_the_run_and_saves_what_was_in_the_step(tmp_path):
    """The step itself is named, though losses are looked at every four steps only."""
    run = config(tmp_path / "run", log_every=4)
    with pytest.raises(
        FloatingPointError,
        match=r"at step 7; its clips .*00007.json; the input of a is not finite; lower optimizer",
    ):
        pretrain(run, FakeLoader(nan_at=[(1, 1)]), CPU)
    assert [path.name for path in list_checkpoints(tmp_path / "run/checkpoints")] == ["step_00000004.pt"]
    (saved,) = (tmp_path / "run/nonfinite").iterdir()
    step = json.loads(saved.read_text())
    assert (step["step"], step["epoch"], step["batch"]) == (7, 1, 1)
    assert step["keys"] == ["a", "b", "c", "d"] and step["video_ids"] == [4, 5, 6, 7]
    assert step["input_is_finite"] == [False, True, True, True]
    assert step["loss"] == "nan" and step["cause"] == "loss" and list(step["losses_before"]) == ["5", "6"]


def test_skipped_steps_are_counted_saved_and_bounded_also_over_a_resume(tmp_path):
    run = config(tmp_path / "run", nonfinite="skip", max_skipped_steps=2, log_every=3)
    loader = FakeLoader(nan_at=[(0, 1), (1, 1), (2, 1)])
    training = pretrain(dataclasses.replace(run, max_steps=8), loader, CPU)
    assert training.skipped_steps == 2 and not tensors_not_finite(training.model.state_dict())
    logged = rows(tmp_path / "run")
    assert [(row["step"], row["skipped_steps"]) for row in logged] == [(3, 1), (4, 1), (6, 1), (8, 2)]
    assert all(math.isfinite(row["loss"]) for row in logged)
    with pytest.raises(FloatingPointError, match=r"3 steps were not finite and left out, expected at most 2"):
        pretrain(run, loader, CPU)
    saved = sorted(path.name for path in (tmp_path / "run/nonfinite").iterdir())
    assert saved == ["step_00000002.json", "step_00000007.json", "step_00000012.json"]
    assert json.loads((tmp_path / "run/nonfinite" / saved[0]).read_text())["skipped"] is True


def test_weights_that_are_not_finite_are_never_saved(tmp_path):
    run = config(tmp_path / "run")
    loader = FakeLoader()
    training = start(run, loader, CPU)
    forward = training.train_step

    def spoil(batch: ClipBatch) -> StepOutput:
        output = forward(batch)
        if training.step == 8:
            next(training.model.saliency_a.parameters()).data[0] = math.inf
        return output

    training.train_step = spoil
    with pytest.raises(FloatingPointError, match=r"model\.saliency_a\..* not finite after step 8"):
        run_training(training, loader)
    assert [path.name for path in list_checkpoints(tmp_path / "run/checkpoints")] == ["step_00000004.pt"]


def test_a_loader_that_fails_costs_no_step(tmp_path):
    """What was trained before is saved, and the batch that could not be had comes first on resuming."""
    run = config(tmp_path / "run")

    def fail(epoch: int, step: int) -> None:
        if (epoch, step) == (1, 2):
            raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        pretrain(run, FakeLoader(before=fail), CPU)
    assert [row["step"] for row in rows(tmp_path / "run")] == [2, 4, 6, 7]
    whole = pretrain(config(tmp_path / "whole"), FakeLoader(), CPU)
    loader = FakeLoader()
    resumed = pretrain(run, loader, CPU)
    assert loader.handed_out[0] == (1, 2)
    for name, value in whole.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], value), name


def test_bad_clips_of_steps_that_are_taken_again_are_listed_once(tmp_path):
    run = config(tmp_path / "run")
    pretrain(dataclasses.replace(run, max_steps=4), FakeLoader(), CPU)
    path = tmp_path / "run/bad_clips.jsonl"
    line = json.loads(path.read_text())
    later = json.dumps({**line, "epoch": 1}) + "\n"
    path.write_text(
        path.read_text() + later + '{"epoch": 1, "st'
    )  # of a run that was killed in its tenth step
    pretrain(run, FakeLoader(), CPU)
    listed = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(clip["epoch"], clip["step"]) for clip in listed] == [(0, 3), (1, 3), (2, 3)]


# The budget of bad clips


class Damaged(FakeLoader):
    """Of each batch of four as many clips are bad as bad(epoch, step) says."""

    def __init__(self, bad: Callable[[int, int], int], rank: int = 0) -> None:
        super().__init__(rank=rank)
        self._bad = bad

    def _batch(self, step: int) -> ClipBatch:
        batch, num_bad = super()._batch(step), self._bad(self.epoch, step)
        shard = f"shard{self._rank}"
        return dataclasses.replace(
            batch,
            valid=torch.arange(4) >= num_bad,
            bad=tuple(BadClipRecord(key=key, shard=shard, reason="checksum") for key in batch.keys[:num_bad]),
        )

    def close(self) -> None:
        pass


def budget(run_dir: Path, allowed: float, **changes: object):
    loader = LoaderConfig(shards="none", global_batch_size=4, num_workers=0, max_bad_fraction=allowed)
    return config(run_dir, loader=loader, **changes)


def listed(run_dir: Path) -> list[tuple[int, str, str]]:
    lines = map(json.loads, (run_dir / "bad_clips.jsonl").read_text().splitlines())
    return sorted((line["step"], line["key"], line["shard"]) for line in lines)


def stops_after(bad: np.ndarray, batch: int = 128) -> int:
    """Steps that a run of one epoch takes with 1 % allowed and so many bad clips in each step, all ranks together."""
    for step, num_bad in enumerate(np.cumsum(bad).tolist(), start=1):
        if is_over_budget(num_bad, step * batch, (len(bad) - step) * batch, 0.01):
            return step
    return len(bad)


def test_runs_within_the_budget_never_stop_and_those_over_it_do():
    generator, num_steps = np.random.default_rng(7), 1700
    for rate in (0.002, 0.005, 0.008):
        assert {stops_after(generator.binomial(128, rate, num_steps)) for _ in range(100)} == {num_steps}, (
            rate
        )
    for rate, steps in ((0.02, 850), (0.05, 340)):  # when 1 % of the epoch's clips are bad
        assert stops_after(generator.binomial(128, rate, num_steps)) == pytest.approx(steps, rel=0.1)
    assert max(stops_after(generator.binomial(128, 0.7, num_steps)) for _ in range(100)) == 1


def test_a_bad_shard_at_the_start_of_a_run_within_the_budget_does_not_stop_it():
    bad = np.zeros(1700, dtype=int)
    bad[:32] = 32  # 1,024 clips, mixed with those of three shards
    assert stops_after(bad) == 1700
    bad[:100] = 32  # three of them: more than 2,176, 1 % of the epoch
    assert stops_after(bad) == 69


def test_how_many_clips_are_too_many():
    over = is_over_budget
    assert over(4, 4, 10_000, 0.01) and not over(2, 2, 10_000, 0.01) and not over(49, 100, 10_000, 0.01)
    assert over(101, 5_000, 5_000, 0.01) and not over(100, 5_000, 5_000, 0.01)
    assert over(1, 1, 99, 0.0) and not over(0, 100, 0, 0.0) and not over(0, 0, 100, 0.01)
    assert not over(10_000, 10_000, 0, 1.0)
    # Of a handful of clips one bad clip is not a share.
    assert over(2, 100, 0, 0.01) and not over(1, 100, 0, 0.01)
    assert not over(1, 8, 0, 0.01) and over(6, 8, 0, 0.01)


def test_the_budget_goes_on_over_a_resume(tmp_path):
    """An epoch has 20 clips, too few to be judged. In the fifth it is certain: 2 of 100 are over 1 %."""
    wanted = budget(tmp_path, 0.01, epochs=9)

    def loader() -> Damaged:
        return Damaged(lambda epoch, step: int(epoch == 0 and step in (1, 2)))

    assert pretrain(dataclasses.replace(wanted, max_steps=13), loader(), CPU).clips_seen == 52
    training = start(wanted, loader(), CPU)
    assert training.clips_seen == 52 and training.bad_clips == {"checksum": 2}
    message = r"^2 of 84 clips are bad \(checksum 2\), expected at most 1.00% \(loader.max_bad_fraction\); run tools"
    for _ in range(2):  # going on without a change ends at once, and as before
        with pytest.raises(TooManyBadClips, match=message):
            pretrain(wanted, loader(), CPU)
        assert list_checkpoints(tmp_path / "checkpoints")[-1].name == "step_00000020.pt"
    assert listed(tmp_path) == [(1, "a", "shard0"), (2, "a", "shard0")]
    assert (
        pretrain(dataclasses.replace(budget(tmp_path, 0.02), max_steps=26, epochs=9), loader(), CPU).step
        == 26
    )


def test_a_checkpoint_without_the_number_of_clips_counts_its_steps(tmp_path):
    training = start(budget(tmp_path, 0.5), FakeLoader(), CPU)
    state = {**training.state_dict(FakeLoader()), "step": 6}
    assert state.pop("clips_seen") == 0
    training.load_state_dict(state, FakeLoader())
    assert training.clips_seen == 24


def test_bad_clips_that_cannot_be_listed_end_no_run_and_are_told_once(tmp_path, monkeypatch, capsys):
    real, calls = record_bad_clips, []

    def failing(path: Path, batch: ClipBatch) -> None:
        calls.append(batch.step)
        if len(calls) in (2, 3):
            raise OSError(28, "No space left on device")
        real(path, batch)

    monkeypatch.setattr("cmac.pretrain.record_bad_clips", failing)
    assert pretrain(budget(tmp_path, 1.0, max_steps=5), Damaged(lambda epoch, step: 2), CPU).step == 5
    err = capsys.readouterr().err
    assert (
        err.count("No space left on device") == 1 and "bad_clips.jsonl works again; 4 rows are missing" in err
    )
    assert [step for step, *_ in listed(tmp_path)] == [0, 0, 3, 3, 4, 4]
    assert rows(tmp_path)[-1]["bad_clips"] == 10


def test_rows_of_bad_clips_that_fit_in_part_are_taken_back(tmp_path):
    path, batch = tmp_path / "bad_clips.jsonl", next(iter(Damaged(lambda epoch, step: 4)))
    record_bad_clips(path, batch)
    whole = path.read_bytes()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(whole) + 100, before[1]))
    try:
        with pytest.raises(OSError, match=f"100 of {len(whole)} bytes could be written"):
            record_bad_clips(path, batch)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert path.read_bytes() == whole
    record_bad_clips(path, batch)
    assert path.read_bytes() == 2 * whole


# Two ranks; of the second one's clips all are bad, or one in four.
SCENARIOS = {"under": (0.55, 4, 15), "over": (0.01, 4, 15), "apart": (1.0, 1, 3)}


def _rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    agreement.LEAST_TIMEOUT_SECONDS = 60.0  # not half an hour, should one rank stop alone
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    for name, (allowed, num_bad, max_steps) in SCENARIOS.items():
        run_dir = Path(folder, name)
        wanted = budget(run_dir / "elsewhere" if name == "apart" and rank == 1 else run_dir, allowed)
        wanted = dataclasses.replace(
            wanted,
            max_steps=max_steps,
            hang_seconds=30.0,
            loader=dataclasses.replace(wanted.loader, global_batch_size=8),
        )
        loader = Damaged(lambda epoch, step, num_bad=rank * num_bad: num_bad, rank)
        training, error = start(wanted, loader, CPU), None
        with contextlib.redirect_stderr(io.StringIO()) as told:
            try:
                run_training(training, loader)
            except Exception as caught:
                error = f"{type(caught).__name__}: {caught}"
        report = {"step": training.step, "error": error, "told": told.getvalue(), "seen": training.clips_seen}
        Path(folder, f"{name}_{rank}.json").write_text(json.dumps(report))
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory) -> Path:
    """Folder where two ranks have run all scenarios, one after the other."""
    return run_two_ranks(_rank, tmp_path_factory.mktemp("ranks"))


def test_a_rank_of_which_all_clips_are_bad_stops_no_run_that_is_within_the_budget(two_ranks):
    for report in reports(two_ranks, "under"):
        assert (report["step"], report["error"], report["seen"]) == (15, None, 120), report
    assert rows(two_ranks / "under")[-1]["bad_clips"] == 60


def test_all_ranks_stop_at_the_same_step_when_their_clips_together_are_over_the_budget(two_ranks):
    for report in reports(two_ranks, "over"):
        assert report["step"] == 1 and report["error"] == (
            "TooManyBadClips: 8 of 16 clips of all 2 ranks are bad (checksum 8), expected at most 1.00% "
            "(loader.max_bad_fraction); most are in shard1 (8); run tools/check_shards.py on none"
        ), report
    assert listed(two_ranks / "over") == [(step, key, "shard1") for step in (0, 1) for key in "abcd"]
    saved = read_checkpoint(list_checkpoints(two_ranks / "over/checkpoints")[-1])
    assert (saved["step"], saved["clips_seen"], saved["bad_clips"]) == (1, 8, {"checksum": 4})


def test_a_rank_without_the_run_folder_loses_its_rows_of_bad_clips_and_no_step(two_ranks):
    first, second = reports(two_ranks, "apart")
    assert first == {"step": 3, "error": None, "told": "", "seen": 24}
    assert (second["step"], second["error"]) == (3, None) and second["told"].count("No such file") == 1
    assert "bad_clips.jsonl ends; 3 rows are missing in it" in second["told"]


def test_an_epoch_without_batches_is_refused(tmp_path):
    with pytest.raises(ValueError, match="fewer videos than loader.global_batch_size 4"):
        Pretraining(config(tmp_path), CPU, steps_per_epoch=0)


def test_load_checkpoint_gives_the_trained_model(tmp_path):
    training = pretrain(config(tmp_path / "run", max_steps=4), FakeLoader(), CPU)
    for path in (tmp_path / "run", tmp_path / "run/checkpoints/step_00000004.pt"):
        model, run = cmac.load_checkpoint(path)
        assert run == config(tmp_path / "run", max_steps=4) and not model.training
        for name, value in training.model.state_dict().items():
            assert torch.equal(model.state_dict()[name], value), name


def test_unusable_checkpoints_say_so(tmp_path):
    with pytest.raises(ValueError, match="no checkpoints/step_"):
        cmac.load_checkpoint(tmp_path)
    with pytest.raises(ValueError, match="no such checkpoint"):
        cmac.load_checkpoint(tmp_path / "absent.pt")
    (tmp_path / "garbage.pt").write_bytes(b"garbage")
    with pytest.raises(ValueError, match="not a readable checkpoint"):
        cmac.load_checkpoint(tmp_path / "garbage.pt")
    torch.save({"format": 99}, tmp_path / "future.pt")
    with pytest.raises(ValueError, match="format 99, expected 1"):
        read_checkpoint(tmp_path / "future.pt")


def test_checkpoint_that_fails_to_write_leaves_the_old_ones(tmp_path):
    (tmp_path / ".step_00000009.pt.1.tmp").touch()  # of a process that was killed
    save_checkpoint(tmp_path, 1, demo(), {"model": {}}, keep=2)
    with pytest.raises(Exception, match="pickle|local"):
        save_checkpoint(tmp_path, 2, demo(), {"model": lambda: None}, keep=2)
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000001.pt"]


def test_within_positives_need_two_clips_per_video(tmp_path):
    with pytest.raises(ValueError, match="clips_per_video is 1"):
        config(tmp_path, loss=LossConfig(positives="both"))
    with pytest.raises(ValueError, match="clips_per_video is 2"):
        config(tmp_path, loader=LoaderConfig(shards="none", clips_per_video=2))


@pytest.mark.slow
def test_the_papers_preset_takes_two_steps_at_full_size(tmp_path):
    """R(2+1)D-18 and ResNet-9 on 3x32x128x128 and 1x257x101, SGD, the queue of 15,000: two steps of two clips."""
    run = pretrain_k400()
    run = dataclasses.replace(
        run, run_dir=str(tmp_path), loader=dataclasses.replace(run.loader, global_batch_size=2), device="cpu"
    )
    training = Pretraining(run, CPU, steps_per_epoch=1)
    before = {name: value.clone() for name, value in training.model.named_parameters()}
    for step in range(2):
        generator = torch.Generator().manual_seed(step)
        frames = torch.randint(0, 256, (2, 3, 32, 128, 128), dtype=torch.uint8, generator=generator)
        batch = ClipBatch(
            frames=frames,
            log_mel=torch.randn(2, 1, 257, 101, generator=generator),
            keys=("a", "b"),
            video_ids=torch.tensor([2 * step, 2 * step + 1]),
            valid=torch.ones(2, dtype=torch.bool),
            clips=(None, None),
            augmentations=(None, None),
            bad=(),
            epoch=step,
            step=0,
        )
        output = training.train_step(batch)
        assert math.isfinite(output.loss.item())
    assert output.contrastive.item() > 0 and output.consistency.item() > 0
    for name, value in training.model.named_parameters():
        # At momentum 0.999 and the first steps of a warm-up some copies do not move by a float32's precision.
        moved = not torch.equal(value, before[name])
        assert torch.isfinite(value).all() and (moved or not value.requires_grad), name
    assert (training.model.queue_v.video_ids >= 0).sum() == 4
