"""Fine-tuning: the numbers of paper and peers, schedules, exact resume from any point, and what counts in a step."""

import dataclasses
import json
import math
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from loaders_media import clip_info

from cmac.checkpoint import list_checkpoints, read_state
from cmac.compute import ComputeConfig
from cmac.encoders import R2Plus1D, VideoEncoderConfig
from cmac.finetune import (
    PRESETS,
    EpochTest,
    FinetuneConfig,
    FinetuneOptimizerConfig,
    Finetuning,
    VideoClassifier,
    build_classifier,
    finetune,
    protocol_name,
)
from loaders.batch import BadClipRecord, ClipBatch
from loaders.video_ops import normalize_frames

CPU = torch.device("cpu")
EASY = FinetuneOptimizerConfig(name="adamw", learning_rate=0.01, weight_decay=0.0, schedule="cosine")
CLASSES = ("dark", "middle", "bright")
ENCODER = VideoEncoderConfig(widths=(4, 8), blocks=(1, 1), stem_width=4)


def config(**changes: object) -> FinetuneConfig:
    small = dataclasses.replace(
        PRESETS["finetune-tiny"](),
        checkpoint="scratch",
        epochs=3,
        batch_size=6,
        dropout=0.5,
        encoder=ENCODER,
        optimizer=FinetuneOptimizerConfig(learning_rate=0.02, head_learning_rate=0.05, warmup_epochs=1.0),
        log_every=2,
        checkpoint_every=3,
    )
    return dataclasses.replace(small, **changes)


def classifier(settings: FinetuneConfig) -> VideoClassifier:
    return build_classifier(
        settings, 3, settings.encoder, None, compute=ComputeConfig(), pixel_mean=0.45, pixel_std=0.225
    )


def clip_batch(seed: int, num_clips: int = 6, valid: tuple[bool, ...] | None = None) -> ClipBatch:
    """Noise of three levels of brightness, whose names are the labels."""
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.randint(0, 3, (num_clips,), generator=generator).tolist()
    noise = torch.randint(0, 40, (num_clips, 4, 16, 16, 3), generator=generator, dtype=torch.uint8)
    frames = noise + torch.tensor([20 + 80 * n for n in numbers], dtype=torch.uint8).view(-1, 1, 1, 1, 1)
    valid = valid or (True,) * num_clips
    clips = tuple(
        dataclasses.replace(clip_info(f"{seed}-{row}.avi", 0, 16, 16, b"", b""), label=CLASSES[number])
        if ok
        else None
        for row, (number, ok) in enumerate(zip(numbers, valid))
    )
    return ClipBatch(
        frames=frames.permute(0, 4, 1, 2, 3),
        log_mel=torch.zeros(num_clips, 1, 4, 0),
        keys=tuple(f"{seed}-{row}" for row in range(num_clips)),
        video_ids=torch.arange(num_clips),
        valid=torch.tensor(valid),
        clips=clips,
        augmentations=(None,) * num_clips,
        bad=tuple(
            BadClipRecord(key=f"{seed}-{row}", shard="v.avi", reason="decode-error")
            for row, ok in enumerate(valid)
            if not ok
        ),
        epoch=0,
        step=0,
    )


class FakeLoader:
    """Batches that depend on (epoch, step) alone, four to an epoch; one of them has a bad clip."""

    def __init__(self, count: "Fuse | None" = None) -> None:
        self.epoch, self._next, self._count = 0, 0, count
        self.bad_clips: Counter[str] = Counter()

    def __len__(self) -> int:
        return 4

    def __iter__(self) -> Iterator[ClipBatch]:
        while self._next < len(self):
            step = self._next
            self._next += 1
            if self._count is not None:
                self._count()
            bad = (self.epoch, step) == (0, 1)
            yield clip_batch(
                100 * self.epoch + step, valid=(True, False, True, True, True, True) if bad else None
            )
        self.epoch, self._next = self.epoch + 1, 0

    def state_dict(self) -> dict:
        return {"epoch": self.epoch, "next": self._next}

    def load_state_dict(self, state: dict) -> None:
        self.epoch, self._next = state["epoch"], state["next"]

    def close(self) -> None:
        pass


class Killed(BaseException):
    """Stands for SIGKILL: nothing catches it."""


class Fuse:
    """Raises Killed when called for the n-th time."""

    def __init__(self, n: int | None) -> None:
        self.left, self.calls = n, 0

    def __call__(self) -> None:
        self.calls += 1
        if self.left is not None:
            self.left -= 1
            if self.left < 0:
                raise Killed


def counting(count: Fuse):
    """A test over four fixed batches, which can be killed at each of them, and before and after it is written."""

    def run(training: Finetuning, epoch: int, digest: str) -> EpochTest:
        hits = clips = 0
        for seed in range(4):
            count()
            batch = clip_batch(9000 + seed)
            logits = training.logits(batch)
            labels = torch.tensor([CLASSES.index(clip.label) for clip in batch.clips])
            hits += (logits.argmax(1) == labels).sum().item()
            clips += len(labels)
        count()
        return EpochTest(epoch=epoch, digest=digest, top1=hits / clips, top5=1.0, seconds=0.0)

    return run


def run_once(settings: FinetuneConfig, folder: Path, count: Fuse) -> tuple[dict, list[EpochTest]]:
    training, tests = finetune(
        settings, classifier(settings), CLASSES, FakeLoader(count), counting(count), folder, CPU
    )
    return {name: value.clone() for name, value in training.model.encoder.state_dict().items()}, tests


def assert_same(found: tuple[dict, list[EpochTest]], expected: tuple[dict, list[EpochTest]]) -> None:
    assert found[1] == expected[1]
    for name, value in expected[0].items():
        assert torch.equal(found[0][name], value), name


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {
            "optimizer": FinetuneOptimizerConfig(name="adamw", learning_rate=3e-3, schedule="cosine"),
            "head_epochs": 1,
            "epochs": 2,
            "test_every_epochs": 2,
        },
    ],
    ids=["sgd", "adamw-head-first"],
)
def test_a_run_killed_at_any_point_ends_with_the_weights_and_tests_of_one_that_was_not(
    tmp_path: Path, changes: dict
) -> None:
    settings = config(**changes)
    counter = Fuse(None)
    expected = run_once(settings, tmp_path / "whole", counter)
    points = torch.randperm(counter.calls, generator=torch.Generator().manual_seed(0))[:4].tolist()
    for point in points:  # killed once, at every kind of place: between steps, inside a test, after it
        folder = tmp_path / f"killed-at-{point}"
        with pytest.raises(Killed):
            run_once(settings, folder, Fuse(point))
        torch.manual_seed(12345)  # another process has other random numbers
        assert_same(run_once(settings, folder, Fuse(None)), expected)
    folder = tmp_path / "killed-often"
    for survived in (2, 6, 4, 8):
        try:
            result = run_once(settings, folder, Fuse(survived))
        except Killed:
            continue
        break
    else:
        result = run_once(settings, folder, Fuse(None))
    assert_same(result, expected)


def test_a_finished_run_is_neither_trained_nor_tested_again(tmp_path: Path) -> None:
    expected = run_once(config(), tmp_path, Fuse(None))
    again = Fuse(None)
    assert_same(run_once(config(), tmp_path, again), expected)
    assert again.calls == 0
    assert [path.name for path in list_checkpoints(tmp_path / "checkpoints")] == ["step_00000012.pt"]


def test_tests_of_other_weights_are_not_taken_for_these(tmp_path: Path) -> None:
    """What an earlier run left behind in the folder, with its checkpoints removed."""
    expected = run_once(config(), tmp_path / "whole", Fuse(None))
    stale = dataclasses.asdict(EpochTest(epoch=2, digest="other", top1=1.0, top5=1.0, seconds=0.0))
    (tmp_path / "stale/tests").mkdir(parents=True)
    (tmp_path / "stale/tests/epoch_002.json").write_text(json.dumps(stale))
    assert_same(run_once(config(), tmp_path / "stale", Fuse(None)), expected)


def test_brightness_is_learned(tmp_path: Path) -> None:
    settings = config(epochs=10, dropout=0.0, optimizer=EASY)
    _, tests = run_once(settings, tmp_path, Fuse(None))
    assert tests[-1].top1 > 0.9
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert rows[-1]["loss"] < 0.6 * rows[0]["loss"] and rows[-1]["step"] == 40 and rows[-1]["bad_clips"] == 1
    assert json.loads((tmp_path / "config.json").read_text())["preset"] == "finetune-tiny"


def test_other_settings_are_refused_in_the_folder_of_a_run_and_harmless_ones_are_not(tmp_path: Path) -> None:
    with pytest.raises(Killed):
        run_once(config(), tmp_path, Fuse(5))
    with pytest.raises(
        ValueError, match="another run: optimizer.learning_rate: 0.02 -> 0.03; choose another --out"
    ):
        changed = FinetuneOptimizerConfig(learning_rate=0.03, head_learning_rate=0.05, warmup_epochs=1.0)
        run_once(config(optimizer=changed), tmp_path, Fuse(None))
    run_once(config(num_workers=0, log_every=1, checkpoint_every=1), tmp_path, Fuse(None))


def test_a_loss_that_is_not_finite_stops_the_run_before_it_is_saved(tmp_path: Path) -> None:
    settings = config(optimizer=FinetuneOptimizerConfig(learning_rate=1e30))
    with pytest.raises(FloatingPointError, match="lower optimizer.learning_rate"):
        run_once(settings, tmp_path, Fuse(None))


def test_a_step_is_one_of_plain_sgd_on_the_mean_cross_entropy() -> None:
    """Against torchvision's way of writing it: classify, cross-entropy, SGD with two learning rates."""
    settings = config(
        dropout=0.0, optimizer=FinetuneOptimizerConfig(learning_rate=0.02, head_learning_rate=0.1)
    )
    training = Finetuning(settings, classifier(settings), CLASSES, CPU, 4)
    network = R2Plus1D(ENCODER, 3)
    network.load_state_dict(training.model.encoder.state_dict())
    body = [value for name, value in network.named_parameters() if not name.startswith("fc.")]
    groups = [{"params": body, "lr": 0.02}, {"params": network.fc.parameters(), "lr": 0.1}]
    optimizer = torch.optim.SGD(groups, momentum=0.9, weight_decay=5e-3)
    for seed in range(3):
        batch = clip_batch(seed)
        loss, _ = training.train_step(batch)
        labels = torch.tensor([CLASSES.index(clip.label) for clip in batch.clips])
        expected = F.cross_entropy(network.classify(normalize_frames(batch.frames, 0.45, 0.225)), labels)
        optimizer.zero_grad()
        expected.backward()
        optimizer.step()
        torch.testing.assert_close(loss, expected.detach(), rtol=1e-4, atol=1e-5)
    for (name, found), value in zip(
        training.model.encoder.state_dict().items(), network.state_dict().values()
    ):
        torch.testing.assert_close(found, value, rtol=1e-3, atol=1e-5, msg=name)


def test_bad_clips_count_in_nothing() -> None:
    """A batch with two bad clips is one of the other four, in loss, statistics and weights."""
    settings = config(dropout=0.0)
    good = (True, False, True, True, False, True)
    whole = clip_batch(1, valid=good)
    rows = [row for row, ok in enumerate(good) if ok]
    part = dataclasses.replace(
        whole,
        frames=whole.frames[rows],
        valid=whole.valid[rows],
        clips=tuple(whole.clips[row] for row in rows),
        bad=(),
    )
    trained = []
    for batch in (whole, part):
        training = Finetuning(settings, classifier(settings), CLASSES, CPU, 4)
        training.train_step(batch)
        trained.append(training.model.encoder.state_dict())
    for name, value in trained[0].items():
        torch.testing.assert_close(value, trained[1][name], msg=name)


def test_a_batch_of_bad_clips_alone_changes_nothing() -> None:
    settings = config()
    training = Finetuning(settings, classifier(settings), CLASSES, CPU, 4)
    before = training.digest()
    assert training.train_step(clip_batch(1, valid=(False,) * 6)) is None
    assert training.digest() == before and training.step == 1


def test_head_only_epochs_leave_the_encoder_and_its_statistics_alone() -> None:
    settings = config(head_epochs=1)
    training = Finetuning(settings, classifier(settings), CLASSES, CPU, 4)
    assert training.total_steps == 16
    states = []
    for step in range(6):
        states.append({n: v.clone() for n, v in training.model.encoder.state_dict().items()})
        training.train_step(clip_batch(step))
    for name, value in states[0].items():
        assert torch.equal(value, states[4][name]) != name.startswith("fc."), name
    assert not torch.equal(states[5]["stem.0.weight"], states[4]["stem.0.weight"])
    assert not torch.equal(states[5]["stem.1.running_mean"], states[4]["stem.1.running_mean"])


def test_weights_of_a_checkpoint_are_taken_over_whole() -> None:
    settings = config()
    network = R2Plus1D(ENCODER)
    weights = network.state_dict()
    model = build_classifier(
        settings,
        3,
        ENCODER,
        weights,
        compute=ComputeConfig(),
        pixel_mean=(0.4, 0.5, 0.6),
        pixel_std=(0.2, 0.3, 0.4),
    )
    for name, value in weights.items():
        assert torch.equal(model.encoder.state_dict()[name], value), name
    batch = clip_batch(0)
    model.eval(), network.eval()
    frames = normalize_frames(batch.frames, (0.4, 0.5, 0.6), (0.2, 0.3, 0.4))
    torch.testing.assert_close(model.features(batch.frames), network(frames).mean(dim=(2, 3, 4)))
    with pytest.raises(RuntimeError, match="Missing key"):
        build_classifier(settings, 3, ENCODER, {}, compute=ComputeConfig(), pixel_mean=0.45, pixel_std=0.225)


def test_classifiers_differ_by_seed_alone() -> None:
    torch.manual_seed(0)
    first = classifier(config())
    second = classifier(config())
    other = classifier(config(seed=1))
    assert torch.equal(first.encoder.fc.weight, second.encoder.fc.weight)
    assert not torch.equal(first.encoder.fc.weight, other.encoder.fc.weight)


def test_checkpoints_are_read_without_unpickling_and_hold_what_resuming_needs(tmp_path: Path) -> None:
    run_once(config(), tmp_path, Fuse(None))
    state = read_state(list_checkpoints(tmp_path / "checkpoints")[-1])
    assert {"model", "optimizer", "scaler", "loader", "rng", "step", "config", "commit", "classes"} <= set(
        state
    )
    assert state["step"] == 12 and state["classes"] == list(CLASSES)


@pytest.mark.parametrize(
    ("optimizer", "expected"),
    [
        (FinetuneOptimizerConfig(), {0: 1, 50: 1, 119: 1}),
        (FinetuneOptimizerConfig(warmup_epochs=2), {0: 1 / 20, 9: 0.5, 19: 1, 20: 1}),
        (
            FinetuneOptimizerConfig(schedule="steps", milestones=(6, 10), decay=0.05),
            {0: 1, 59: 1, 60: 0.05, 99: 0.05, 100: 0.0025, 119: 0.0025},
        ),
        (
            FinetuneOptimizerConfig(schedule="cosine"),
            {0: 1, 60: 0.5, 119: 0.5 * (1 + math.cos(math.pi * 119 / 120))},
        ),
    ],
)
def test_schedules_are_as_described(optimizer: FinetuneOptimizerConfig, expected: dict) -> None:
    """12 epochs of 10 steps, by hand."""
    assert {step: optimizer.factor(step, 10, 120) for step in expected} == pytest.approx(expected)


def test_gdts_learning_rates_start_at_its_base_rates_and_rise_eightfold() -> None:
    settings = dataclasses.replace(PRESETS["finetune-ucf101-gdt"](), encoder=ENCODER, device="cpu")
    training = Finetuning(settings, classifier(settings), CLASSES, CPU, 1000)
    body, head = training.learning_rates(0)
    assert (body, head) == pytest.approx((0.00025, 0.0025), rel=1e-2)
    assert training.learning_rates(2000) == pytest.approx((0.002, 0.02))
    assert training.learning_rates(6000) == pytest.approx((0.0001, 0.001))
    assert training.learning_rates(10000) == pytest.approx((0.000005, 0.00005))
    assert [epoch for epoch in range(1, 13) if settings.is_test_epoch(epoch)] == [8, 9, 10, 11, 12]


def test_presets_hold_the_papers_numbers() -> None:
    for name, build in PRESETS.items():
        preset = build()
        assert preset.preset == name and protocol_name(preset) == name
        assert ("hmdb51" in name) == (preset.dataset == "hmdb51")
    paper = PRESETS["finetune-ucf101"]()
    assert (paper.epochs, paper.batch_size, paper.clips_per_video, paper.test_clips) == (12, 16, 10, 10)
    assert (paper.optimizer.learning_rate, paper.optimizer.weight_decay, paper.optimizer.momentum) == (
        0.005,
        5e-3,
        0.9,
    )
    assert (paper.video.num_frames, paper.video.crop_size, paper.video.color_jitter) == (32, 128, True)
    assert paper.splits == ("1", "2", "3") and paper.clip_seconds is None and paper.test_average == "softmax"
    ablation = PRESETS["finetune-hmdb51-ablation"]()
    assert ablation.splits == ("1",) and not ablation.video.color_jitter
    gdt = PRESETS["finetune-hmdb51-gdt"]()
    assert (gdt.batch_size, gdt.test_crops, gdt.test_average, gdt.test_placement) == (
        32,
        3,
        "raw",
        "uniform-gdt",
    )
    assert gdt.resized_crop_area == (0.14, 1.0) and gdt.color_jitter_probability == 0.8
    assert gdt.clip_seconds == pytest.approx(32 / 30)  # 32 frames at its target of 30 a second
    avid = PRESETS["finetune-ucf101-avid"]()
    assert (avid.head_epochs, avid.epochs, avid.dropout, avid.optimizer.weight_decay) == (5, 16, 0.5, 0.0)


def test_results_of_changed_presets_do_not_go_by_the_presets_name() -> None:
    changed = dataclasses.replace(
        PRESETS["finetune-ucf101"](), epochs=2, seed=5, data="d", checkpoint="c", num_workers=1, max_videos=40
    )
    assert protocol_name(changed) == "finetune-ucf101 with max_videos=40, epochs=2"
    scratch = dataclasses.replace(changed, epochs=12, max_videos=0, checkpoint="scratch", encoder=ENCODER)
    assert protocol_name(scratch).startswith("finetune-ucf101 with encoder.widths=[4, 8]")
    assert protocol_name(dataclasses.replace(scratch, checkpoint="runs/demo")) == "finetune-ucf101"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epochs": 0}, "epochs is 0, expected at least 1"),
        ({"splits": ("1", "1")}, "splits is \\('1', '1'\\)"),
        ({"splits": ()}, "splits is \\(\\)"),
        ({"dropout": 1.0}, "dropout is 1.0"),
        ({"max_videos": -1}, "max_videos is -1"),
        ({"compute": ComputeConfig(cuda_graph=True)}, "no CUDA graphs"),
    ],
)
def test_configurations_that_cannot_be_run_are_refused(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"learning_rate": 0.0}, "learning_rate is 0.0"),
        ({"head_learning_rate": -1.0}, "head_learning_rate is -1.0"),
        ({"schedule": "steps"}, "expected milestones with schedule 'steps'"),
        ({"milestones": (3,)}, "expected milestones with schedule 'steps'"),
        ({"schedule": "steps", "milestones": (5, 3)}, "rising order"),
        ({"warmup_start": 2.0}, "warmup_start is 2.0"),
        ({"weight_decay": -1.0}, "weight_decay is -1.0"),
    ],
)
def test_optimizers_that_make_no_sense_are_refused(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FinetuneOptimizerConfig(**changes)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_on_a_gpu_brightness_is_learned_in_every_precision_and_a_kill_sets_nothing_back(
    tmp_path: Path, precision: str
) -> None:
    device = torch.device("cuda")
    settings = config(epochs=10, dropout=0.1, device="cuda", precision=precision, optimizer=EASY)

    def run(folder: Path, count: Fuse) -> list[EpochTest]:
        model = classifier(settings)
        return finetune(settings, model, CLASSES, FakeLoader(count), counting(count), folder, device)[1]

    with pytest.raises(Killed):
        run(tmp_path, Fuse(30))
    tests = run(tmp_path, Fuse(None))
    assert [test.epoch for test in tests] == list(range(1, 11)) and tests[-1].top1 > 0.9
