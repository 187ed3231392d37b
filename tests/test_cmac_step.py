"""The step as a whole: the kernels against plain torch over many steps, no waiting for the device, and its options."""

import copy
import dataclasses
import math
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Container

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import nn
from torch._functorch import config as compiler_config
from torch.utils._python_dispatch import TorchDispatchMode

from cmac.attention import AttentionConfig
from cmac.collectives import KeyShuffle
from cmac.compute import ComputeConfig
from cmac.consistency import consistency_loss
from cmac.encoders import AudioEncoderConfig, VideoEncoderConfig
from cmac.gradient_norms import GradientNorms
from cmac.kernels import check
from cmac.losses import LossConfig, Negatives, contrastive_loss
from cmac.model import CMAC, ModelConfig
from cmac.norm import BatchNorm2d, BatchNorm3d
from cmac.optim import OptimizerConfig
from cmac.step import TrainingStep

TINY = ModelConfig(
    video=VideoEncoderConfig(widths=(16,), blocks=(1,), stem_width=5),
    audio=AudioEncoderConfig(widths=(16,), blocks=(1,)),
    filter_channels=8,
    embedding_dim=6,
    queue_length=23,
    momentum=0.9,
    batch_norm="shuffle",
    batch_norm_group=2,
)
NUM_CLIPS = 4
# Gentle, so that rounding grows slowly: training a network this small is chaotic at the usual rates.
LEARNING_RATE = 0.002
LOSS = LossConfig(temperature=1.0, consistency_reduction="mean")
SGD = OptimizerConfig(learning_rate=LEARNING_RATE, backend="torch")
REFERENCE = ComputeConfig(batch_norm="reference", losses="reference")
FUSED = ComputeConfig(batch_norm="fused", losses="fused")


def build(
    compute: ComputeConfig = REFERENCE,
    model: ModelConfig = TINY,
    loss: LossConfig | None = None,
    optimizer: OptimizerConfig = SGD,
    device: str = "cpu",
    precision: str = "fp32",
) -> TrainingStep:
    torch.manual_seed(0)
    return TrainingStep(
        CMAC(model, loss or LOSS, compute=compute), optimizer, device=device, precision=precision
    )


def batch(step: int, device: str = "cpu") -> tuple[torch.Tensor, ...]:
    """Coarse patterns in the memory layout of loaders; three batches come again and again, one with a bad clip."""
    generator = torch.Generator().manual_seed(step % 3)
    frames = torch.rand(NUM_CLIPS, 3, 2, 4, 4, generator=generator).mul(255).to(torch.uint8)
    frames = frames.repeat_interleave(2, 3).repeat_interleave(2, 4)
    frames = frames.contiguous(memory_format=torch.channels_last_3d)
    log_mel = torch.randn(NUM_CLIPS, 1, 9, 5, generator=generator)
    log_mel = log_mel.repeat_interleave(2, 2).repeat_interleave(2, 3)
    ids = torch.arange(NUM_CLIPS) + NUM_CLIPS * (step % 3)
    valid = torch.ones(NUM_CLIPS, dtype=torch.bool)
    valid[1] = step % 3 != 1
    return tuple(tensor.to(device) for tensor in (frames, log_mel, ids, valid))


def train(
    trainer: TrainingStep,
    steps: int,
    first: int = 0,
    device: str = "cpu",
    measured_at: Container[int] = (),
    measured: list[GradientNorms] | None = None,
) -> list[float]:
    """Losses of so many steps; gradient norms of those that measure them go to `measured`."""
    losses = []
    for step in range(first, first + steps):
        rate = LEARNING_RATE * min(1.0, (step + 1) / 50)
        measure = step in measured_at
        output = trainer(
            *batch(step, device), learning_rate=rate, shuffle_seed=step, measure_gradients=measure
        )
        assert (output.gradients is not None) == measure
        if measured is not None and measure:
            measured.append(output.gradients)
        losses.append(output.loss.clone())  # a CUDA graph writes to the same place in each step
    return torch.stack(losses).tolist()


# Fused against reference


LOCAL = dataclasses.replace(TINY, batch_norm="local")
"""Statistics of groups of two clips make training chaotic: rounding doubles every few steps."""


def trajectory(steps: int, **compute: str) -> list[float]:
    return train(build(ComputeConfig(**compute), LOCAL), steps)


def assert_same_trajectory(fused: list[float], reference: list[float]) -> None:
    """Between conv3d and its 2-D views rounding grows to 1e-4 in 200 steps; a gradient that is wrong shows at once."""
    apart = [abs(a - b) for a, b in zip(fused, reference, strict=True)]
    assert max(apart[:40]) < 1e-4
    assert max(apart) < 1e-2


@pytest.mark.slow
def test_fifty_steps_with_fused_losses_go_the_references_way(interpreter: Callable):
    """An interpreted step takes a second. On a GPU it is 200."""
    reference = trajectory(50, batch_norm="reference", losses="reference")
    assert reference[-1] < 0.85 * max(reference), "nothing was learned, so nothing could diverge"
    assert_same_trajectory(interpreter(trajectory, 50, batch_norm="reference", losses="fused"), reference)


@pytest.mark.slow
def test_steps_with_all_kernels_go_the_references_way(interpreter: Callable):
    """Few of them: an interpreted step with its 150 launches takes seconds. On a GPU it is 200."""
    fused = interpreter(trajectory, 4, batch_norm="fused", losses="fused")
    assert_same_trajectory(fused, trajectory(4, batch_norm="reference", losses="reference"))


def half_precision(precision: str, **compute: str) -> list[float]:
    return train(build(ComputeConfig(**compute), LOCAL, precision=precision), 2)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_reaches_all_kernels_and_stays_near_the_reference(
    interpreter: Callable, precision: str
):
    fused = interpreter(half_precision, precision, batch_norm="fused", losses="fused")
    reference = half_precision(precision, batch_norm="reference", losses="reference")
    exact = half_precision("fp32", batch_norm="reference", losses="reference")
    assert fused != exact
    for one, other in zip(fused, reference, strict=True):
        assert abs(one - other) < 0.03 * abs(other) + 0.01


@pytest.mark.gpu
def test_two_hundred_steps_with_all_kernels_go_the_references_way_on_the_gpu(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    fused = train(build(FUSED, LOCAL, device="cuda"), 200, device="cuda")
    assert_same_trajectory(fused, train(build(REFERENCE, LOCAL, device="cuda"), 200, device="cuda"))


@pytest.mark.gpu
def test_cuda_graph_takes_the_same_steps(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    eager = train(build(FUSED, LOCAL, device="cuda"), 30, device="cuda")
    graph = train(build(dataclasses.replace(FUSED, cuda_graph=True), LOCAL, device="cuda"), 30, device="cuda")
    assert max(abs(a - b) for a, b in zip(eager, graph, strict=True)) < 1e-3


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_step_never_waits_for_the_gpu(precision):
    trainer = build(FUSED, device="cuda", precision=precision)
    train(trainer, 2, device="cuda")  # kernels are compiled, optimizer state comes to be
    inputs = batch(0, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        trainer(*inputs, learning_rate=LEARNING_RATE, shuffle_seed=3)
        trainer(*inputs, learning_rate=LEARNING_RATE, shuffle_seed=4, measure_gradients=True)
        trainer.model.queue_v.staleness()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_learns_on_the_gpu(precision):
    losses = train(build(FUSED, device="cuda", precision=precision), 60, device="cuda")
    assert sum(losses[-6:]) < sum(losses[6:12])


# Waiting for the device

WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "unique", "_unique2")
"""Operators whose result the host must know."""


class WaitCounter(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.name().split("::")[1].split(".")[0]
        if name in WAITING or (
            name == "index" and any(i is not None and i.dtype == torch.bool for i in args[1])
        ):
            self.count[name] += 1
        return function(*args, **(kwargs or {}))


@pytest.fixture
def drawn_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shuffles are drawn on the host, where numbers may be looked at; keep that out of the count."""
    shuffles = [KeyShuffle.draw(NUM_CLIPS, seed) for seed in range(8)]
    monkeypatch.setattr(
        KeyShuffle, "draw", staticmethod(lambda num_clips, seed, device="cpu": shuffles[seed])
    )


@pytest.mark.parametrize(
    ("loss", "optimizer"),
    [
        (LOSS, SGD),
        (LossConfig(negatives="batch"), dataclasses.replace(SGD, clip_gradient_norm=1.0)),
        (LossConfig(contrastive=False), SGD),
    ],
)
def test_no_operator_of_a_step_waits_for_the_device(drawn_before, loss, optimizer):
    trainer = build(loss=loss, optimizer=optimizer)
    train(trainer, 2)
    with WaitCounter() as counter:
        trainer(*batch(2), learning_rate=LEARNING_RATE, shuffle_seed=2)
        trainer(*batch(3), learning_rate=LEARNING_RATE, shuffle_seed=3, measure_gradients=True)
        trainer.model.queue_v.staleness()
    assert counter.count == {}


def test_the_counter_sees_what_waits():
    values = torch.ones(3)
    for wait in (
        lambda: values.sum().item(),
        lambda: values[values > 0],
        lambda: torch.equal(values, values),
    ):
        with WaitCounter() as counter:
            wait()
        assert counter.count.total() == 1


# Options


def test_every_way_to_compute_takes_the_same_steps():
    expected = train(build(), 6)
    for compute in (
        ComputeConfig(convolutions="conv3d"),
        ComputeConfig(pad_channels=True),
        ComputeConfig(activation_checkpointing="early"),
    ):
        losses = train(build(compute), 6)
        assert max(abs(a - b) for a, b in zip(losses, expected, strict=True)) < 1e-4, compute


def test_compiled_encoders_take_the_same_steps(monkeypatch):
    """Traced as a whole and run operator by operator: what a compiler makes of it is not ours."""
    compiled, compile_module = [], nn.Module.compile

    def trace(module: nn.Module, **options: object) -> None:
        compiled.append(module)
        compile_module(module, backend="aot_eager", fullgraph=True, **options)

    monkeypatch.setattr(nn.Module, "compile", trace)
    monkeypatch.setattr(compiler_config, "donated_buffer", True)
    trainer = build(ComputeConfig(compile=True))
    assert len(compiled) == 4 and "video.encoder.stem.0.weight" in trainer.model.state_dict()
    measured = []  # in the last step: a backward compiled for graphs that are kept takes all others as well
    losses = train(trainer, 4, measured_at={3}, measured=measured)
    expected_norms = []
    expected = train(build(), 4, measured_at={3}, measured=expected_norms)
    assert max(abs(a - b) for a, b in zip(losses, expected, strict=True)) < 1e-4
    torch.testing.assert_close(numbers(measured[0]), numbers(expected_norms[0]), rtol=1e-3, atol=1e-3)


def test_the_queue_may_be_kept_in_bfloat16():
    trainer = build(model=dataclasses.replace(TINY, queue_dtype="bfloat16"))
    losses, expected = train(trainer, 10), train(build(), 10)
    assert trainer.model.queue_v.keys.dtype == torch.bfloat16
    assert 0 < max(abs(a - b) for a, b in zip(losses, expected, strict=True)) < 0.1


def test_fp16_scales_the_loss_and_skips_steps_that_overflow():
    trainer = build(precision="fp16")
    train(trainer, 1)  # of which the scaler learns its device
    trainer.scaler.update(2.0**40)
    before = {name: value.clone() for name, value in trainer.model.named_parameters()}
    train(trainer, 1)
    assert trainer.scaler.get_scale() == 2.0**39
    for name, value in trainer.model.named_parameters():
        assert torch.equal(value, before[name]) or name.startswith("key_"), name
    trainer.scaler.update(128.0)
    train(trainer, 1)
    assert not torch.equal(trainer.model.heads["shared"].weight, before["heads.shared.weight"])


def test_going_on_from_a_state_equals_never_stopping():
    whole, first = build(), build()
    expected = train(whole, 8)[4:]
    train(first, 4)
    second = build(ComputeConfig(convolutions="conv3d", losses="reference"), optimizer=SGD)
    second.load_state_dict(first.state_dict())
    losses = train(second, 4, first=4)
    assert max(abs(a - b) for a, b in zip(losses, expected, strict=True)) < 1e-4


def test_what_has_no_kernel_still_trains_where_kernels_work(monkeypatch):
    """`auto` stays `auto`: `fused` would refuse a softmax, and memory that is not channels-last."""
    monkeypatch.setattr(check, "find_fault", lambda part, device: None)
    softmax = AttentionConfig(norm="softmax")
    compute, _ = check.resolve_compute(ComputeConfig(), "cuda", attention=softmax)
    model = CMAC(dataclasses.replace(TINY, attention=softmax), LOSS, compute=compute)
    trainer = TrainingStep(model, SGD, device="cpu", channels_last=False)
    assert all(map(math.isfinite, train(trainer, 2)))


# Gradient norms


def numbers(norms: GradientNorms) -> list[float]:
    return [tensor.item() for tensor in dataclasses.astuple(norms)]


def gradients_by_hand(trainer: TrainingStep, step: int, loss: str) -> dict[str, torch.Tensor]:
    """Of one of the losses in this step, from a copy that has seen nothing of measuring."""
    model = copy.deepcopy(trainer.model)
    pairs = zip(*model.momentum_pairs(), strict=True)
    with torch.no_grad():
        for query, key in pairs:
            key.lerp_(query, 1 - TINY.momentum)
    shuffles = (KeyShuffle.draw(NUM_CLIPS, step),)
    getattr(model(*batch(step), shuffles), loss).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_gradient_norms_are_those_of_the_losses_apart_with_lambda():
    loss = dataclasses.replace(LOSS, consistency_weight=3.0)
    clipped = dataclasses.replace(SGD, clip_gradient_norm=0.1)  # after it was measured
    trainer = build(model=TINY, loss=loss, optimizer=clipped)
    train(trainer, 2)
    contrastive = gradients_by_hand(trainer, 2, "contrastive")
    consistency = {name: 3 * g for name, g in gradients_by_hand(trainer, 2, "consistency").items()}
    whole = gradients_by_hand(trainer, 2, "loss")
    measured = []
    train(trainer, 1, first=2, measured_at={2}, measured=measured)

    def norm(gradients: dict[str, torch.Tensor]) -> float:
        return torch.cat([gradient.flatten() for gradient in gradients.values()]).norm().item()

    shared = contrastive.keys() & consistency.keys()
    assert shared and shared < contrastive.keys() and shared < consistency.keys()
    dot = sum((contrastive[name] * consistency[name]).sum().item() for name in shared)
    lengths = [norm({name: part[name] for name in shared}) for part in (contrastive, consistency)]
    expected = [norm(whole), norm(contrastive), norm(consistency), dot / math.prod(lengths)]
    assert numbers(measured[0]) == pytest.approx(expected, rel=1e-3)


def test_a_loss_that_is_trained_alone_is_the_whole_gradient():
    for loss, one, none in (
        (LossConfig(contrastive=False), "consistency", "contrastive"),
        (LossConfig(consistency_weight=0.0), "contrastive", "consistency"),
    ):
        measured = []
        train(build(loss=loss), 2, measured_at={1}, measured=measured)
        (norms,) = measured
        assert getattr(norms, one) == norms.whole > 0
        assert getattr(norms, none) is None and norms.cosine is None


def measured_and_not(precision: str = "fp32", compare: bool = True, **compute: str) -> list[float]:
    """Norms of the last step; the state after steps that all measured is that after steps that did not."""
    options = {"model": LOCAL, "precision": precision}
    options["optimizer"] = dataclasses.replace(SGD, clip_gradient_norm=1.0)
    measuring, measured = build(ComputeConfig(**compute), **options), []
    train(measuring, 3, measured_at=range(3), measured=measured)
    if compare:
        plain = build(ComputeConfig(**compute), **options)
        train(plain, 3)
        _assert_same_state(measuring, plain)
    return numbers(measured[-1])


def _assert_same_state(one: TrainingStep, other: TrainingStep) -> None:
    states = [trainer.state_dict() for trainer in (one, other)]
    assert states[0]["model"].keys() == states[1]["model"].keys()
    for name, value in states[0]["model"].items():
        assert torch.equal(value, states[1]["model"][name]), name
    slots = [state["optimizer"]["state"] for state in states]
    for number, slot in slots[0].items():
        for name, value in slot.items():
            assert torch.equal(value, slots[1][number][name]) if torch.is_tensor(value) else True, name
    assert states[0]["scaler"] == states[1]["scaler"]


@pytest.mark.parametrize(
    ("precision", "compute"),
    [
        ("fp32", {}),
        ("fp32", {"activation_checkpointing": "early"}),
        ("fp32", {"pad_channels": True}),
        ("bf16", {}),
        ("fp16", {}),
    ],
)
def test_measuring_gradients_leaves_training_as_it_is_bit_for_bit(precision, compute):
    norms = measured_and_not(precision, batch_norm="reference", losses="reference", **compute)
    exact = measured_and_not(batch_norm="reference", losses="reference", compare=False)
    assert norms == pytest.approx(exact, rel=1e-4 if precision == "fp32" else 0.1, abs=0.1)


def gradients_of_kernels() -> list[list[torch.Tensor]]:
    """Of batch norm with shortcut, of the contrastive loss and of consistency: twice from the same graph, then from one
    of its own."""
    generator = torch.Generator().manual_seed(0)

    def leaf(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).requires_grad_()

    maps, shortcut, weight, bias = leaf(2, 4, 3, 3), leaf(2, 4, 3, 3), leaf(4), leaf(4)
    filters, saliency, query, bank = leaf(2, 4), leaf(2, 1, 3, 3), leaf(2, 4), leaf(5, 4).detach()
    attached = AttentionConfig(detach_target=False)
    leaves = [maps, shortcut, weight, bias, filters, saliency, query]

    def loss() -> torch.Tensor:
        x = maps.contiguous(memory_format=torch.channels_last)
        out = fused_batch_norm(x, weight, bias, None, None, shortcut, relu=True, update_statistics=False)
        per_clip = consistency_loss(out, filters, saliency, attached, impl="fused")
        negatives = [Negatives(bank, torch.arange(10, 15))]
        contrast = contrastive_loss(query, query.detach(), torch.arange(2), negatives, 1.0, "fused")
        return per_clip.sum() + contrast.loss.sum()

    from cmac.kernels.batch_norm_triton import fused_batch_norm

    kept = loss()
    twice = [list(torch.autograd.grad(kept, leaves, retain_graph=True)) for _ in range(2)]
    return [*twice, list(torch.autograd.grad(loss(), leaves))]


def test_kernels_give_the_same_gradients_each_time_a_graph_is_run_backward(interpreter: Callable):
    first, second, once = interpreter(gradients_of_kernels)
    for parts in zip(first, second, once, strict=True):
        assert parts[0].abs().sum() > 0
        assert torch.equal(parts[0], parts[2]) and torch.equal(parts[1], parts[2])


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_measuring_gradients_leaves_training_as_it_is_on_the_gpu(monkeypatch, precision):
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    trainers = [build(FUSED, LOCAL, device="cuda", precision=precision) for _ in range(2)]
    measured = []
    train(trainers[0], 5, device="cuda", measured_at={0, 4}, measured=measured)
    train(trainers[1], 5, device="cuda")
    _assert_same_state(*trainers)
    assert all(map(math.isfinite, numbers(measured[-1])))


def test_a_cuda_graph_measures_nothing_and_says_so_once(caplog):
    trainer = build()
    trainer._graph = lambda inputs, shuffles: trainer._run(inputs, shuffles)
    for step in range(2):
        output = trainer(*batch(step), learning_rate=0.0, shuffle_seed=step, measure_gradients=True)
        assert output.gradients is None
    assert [record.message for record in caplog.records] == [
        "gradient norms are not measured: compute.cuda_graph replays a step that has none"
    ]


@pytest.mark.parametrize("contrastive", [True, False])
def test_losses_of_a_step_keep_no_graph(contrastive):
    output = build(loss=dataclasses.replace(LOSS, contrastive=contrastive))(
        *batch(0), learning_rate=0.0, shuffle_seed=0, measure_gradients=True
    )
    figures = [output.loss, output.contrastive, output.consistency, output.gradients.whole]
    assert not any(figure.requires_grad for figure in figures)


# Several ranks


def _rank(rank: int, ranks: int, port: int, options: dict, path: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=ranks)
    trainers = []
    for _ in range(2):
        torch.manual_seed(0)
        model = CMAC(LOCAL, LOSS, compute=ComputeConfig(**options), world_size=ranks)
        optimizer = dataclasses.replace(SGD, clip_gradient_norm=1.0)
        trainers.append(TrainingStep(model, optimizer, device="cpu"))
    part = slice(rank * 2, rank * 2 + 2)
    states = _states(trainers[0], part, measured_at={1, 4})
    _states(trainers[1], part)
    _assert_same_state(*trainers)
    torch.save(states, f"{path}/{rank}.pt")
    dist.destroy_process_group()


def _states(trainer: TrainingStep, part: slice, measured_at: Container[int] = ()) -> dict[str, torch.Tensor]:
    """Parameters, gradients' traces in the optimizer and queues after five steps on a part of each batch, and
    gradient norms."""
    norms = []
    for step in range(5):
        clips = (tensor[part] for tensor in batch(step))
        output = trainer(
            *clips, learning_rate=LEARNING_RATE, shuffle_seed=step, measure_gradients=step in measured_at
        )
        if output.gradients is not None:
            norms += numbers(output.gradients)
    state = {n: v for n, v in trainer.model.state_dict().items() if "running" not in n and "tracked" not in n}
    for number, slot in enumerate(trainer.optimizer.state.values()):
        state[f"momentum.{number}"] = slot["momentum_buffer"]
    return {**state, "gradient norms": torch.tensor(norms)}


@pytest.mark.parametrize("options", [{}, {"activation_checkpointing": "early", "pad_channels": True}])
def test_two_ranks_equal_one_process_whose_batch_norm_has_their_groups(tmp_path, free_port, options):
    whole = build(ComputeConfig(**options), LOCAL, optimizer=dataclasses.replace(SGD, clip_gradient_norm=1.0))
    for module in whole.model.modules():
        if isinstance(module, (BatchNorm2d, BatchNorm3d)):
            module.group_size = 2
    expected = _states(whole, slice(0, 4), measured_at={1, 4})
    assert len(expected["gradient norms"]) == 8
    torch.multiprocessing.spawn(_rank, (2, free_port, options, str(tmp_path)), nprocs=2)
    for rank in (0, 1):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(
                found[name], value, atol=2e-5, rtol=1e-3, msg=lambda text, n=name: f"{n}: {text}"
            )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"compute": ComputeConfig(cuda_graph=True)}, "compute.cuda_graph is True on cpu with 1 rank"),
        ({"precision": "bf61"}, "precision is 'bf61', expected fp32 or bf16 or fp16"),
        ({"compute": FUSED}, "TRITON_INTERPRET=1 is not set"),
    ],
)
def test_options_that_cannot_be_had_say_so(options, message):
    with pytest.raises(ValueError, match=message):
        train(build(**options), 1)


def test_a_cudnn_with_broken_convolutions_is_refused(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91002)
    with pytest.raises(ValueError, match="cuDNN is 91002, expected at least 91500"):
        TrainingStep(CMAC(TINY), SGD, device="cuda")


def test_the_step_needs_torch_alone():
    """As on a machine that measures and has nothing else: no readers of video, tars or configurations."""
    code = """
import importlib.abc, sys
class Refuse(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("av", "dacite", "tyro", "webdataset", "torchaudio", "tensorboard", "rich"):
            raise ModuleNotFoundError(f"refused: {name}", name=name)
sys.meta_path.insert(0, Refuse())
import cmac.step
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_synchronized_batch_norms_take_the_places_and_the_state_of_ours():
    model = build().model.eval()
    synchronized = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(model))
    kinds = {
        type(module)
        for module in synchronized.modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm)
    }
    assert kinds == {nn.SyncBatchNorm}
    synchronized.load_state_dict(model.state_dict(), strict=True)
    frames, log_mel, _, _ = batch(0)
    one, other = model.encode(frames, log_mel), synchronized.encode(frames, log_mel)
    torch.testing.assert_close(one.embedding_v, other.embedding_v)
    torch.testing.assert_close(one.predicted_a, other.predicted_a)


@pytest.mark.parametrize("culprit", ["loss", "gradient"])
def test_a_step_that_is_not_finite_is_left_out_without_a_trace(culprit):
    """Parameters, key encoders, batch-norm statistics, queues and optimizer state stay bit for bit."""
    torch.manual_seed(0)
    trainer = TrainingStep(CMAC(TINY, LOSS, compute=REFERENCE), SGD, device="cpu", skip_nonfinite=True)
    train(trainer, 2)
    before = copy.deepcopy(trainer.state_dict())
    frames, log_mel, ids, valid = batch(2)
    weight = next(trainer.model.heads.parameters())
    hook = None
    if culprit == "loss":
        log_mel[0] = math.inf
    else:
        hook = weight.register_hook(lambda gradient: gradient * math.nan)
    shuffled = {"learning_rate": LEARNING_RATE, "shuffle_seed": 2}
    output = trainer(frames, log_mel, ids, valid, **shuffled)
    assert trainer.skipped_steps == 1 and math.isfinite(output.loss.item()) == (culprit == "gradient")
    after = trainer.state_dict()
    for state in (before, after):
        del state["optimizer"]["param_groups"]  # the learning rate is set anew for each step
    torch.testing.assert_close(after, before, rtol=0, atol=0, equal_nan=False)
    assert all(parameter.grad is None for parameter in trainer.model.parameters())
    if hook is not None:
        hook.remove()
    assert math.isfinite(trainer(*batch(2), **shuffled).loss.item()) and trainer.skipped_steps == 1
    assert not torch.equal(trainer.state_dict()["model"]["queue_v.keys"], before["model"]["queue_v.keys"])
