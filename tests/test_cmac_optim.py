"""Optimizer and momentum update: torch and Apex give the same numbers, and what Apex computes wrongly is refused.

Apex needs an NVIDIA GPU and a build of its own. Where there is neither, a stand-in with its interfaces and its ways
(flat memory in the order it lies, dtypes skipped without a word, `first_run`) runs in its place on the CPU; tests
marked gpu take the real one if it is installed.
"""

import copy
import io
import itertools
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

from cmac import optim
from cmac.optim import (
    OptimizerConfig,
    build_momentum_update,
    build_optimizer,
    find_apex,
    set_learning_rate,
)

# ---- stand-in for NVIDIA Apex -------------------------------------------------------------------------------------

FILES = {
    "amp_C.py": "from test_cmac_optim import multi_tensor_axpby, multi_tensor_sgd",
    "apex/__init__.py": "from . import optimizers",
    "apex/optimizers/__init__.py": "from test_cmac_optim import FusedSGD",
    "apex/multi_tensor_apply/__init__.py": "from test_cmac_optim import multi_tensor_applier",
}
MAX_TENSORS, MAX_BLOCKS = 48, 320  # of a launch with three lists


def multi_tensor_applier(operation, flag: Tensor, lists: list[list[Tensor]], *args) -> None:
    operation(2048 * 32, flag, lists, *args)


def launches(chunk_size: int, flag: Tensor, lists: list[list[Tensor]]) -> Iterator[list[tuple[Tensor, ...]]]:
    """Chunks of flat memory, as many as go into a launch; what no last chunk follows is never launched."""
    assert flag.dtype == torch.int32 and len(lists) == 3
    first = lists[0]
    if not first or any(len(tensors) != len(first) for tensors in lists):
        raise RuntimeError("Size mismatch among tensor lists")
    for tensors in lists:
        for tensor, reference in zip(tensors, first):
            if not (
                tensor.is_contiguous()
                or (tensor.ndim == 4 and tensor.is_contiguous(memory_format=torch.channels_last))
                or (tensor.ndim == 5 and tensor.is_contiguous(memory_format=torch.channels_last_3d))
            ):
                raise RuntimeError("A tensor was not contiguous.")
            if tensor.numel() != reference.numel() or tensor.device != first[0].device:
                raise RuntimeError("Size mismatch")
    waiting: list[tuple[Tensor, ...]] = []
    num_tensors = 0
    for index, tensors in enumerate(zip(*lists)):
        flat = [tensor.detach().as_strided((tensor.numel(),), (1,)) for tensor in tensors]
        chunks = list(zip(*(tensor.split(chunk_size) for tensor in flat))) if flat[0].numel() else []
        num_tensors += 1
        for number, chunk in enumerate(chunks):
            waiting.append(chunk)
            last_of_tensor = number == len(chunks) - 1
            full = (last_of_tensor and num_tensors == MAX_TENSORS) or len(waiting) == MAX_BLOCKS
            if full or (last_of_tensor and index == len(first) - 1):
                yield waiting
                waiting, num_tensors = [], 0 if last_of_tensor else 1


def multi_tensor_sgd(
    chunk_size: int,
    flag: Tensor,
    lists: list[list[Tensor]],
    weight_decay: float,
    momentum: float,
    dampening: float,
    lr: float,
    nesterov: bool,
    first_run: bool,
    wd_after_momentum: bool,
    scale: float,
) -> None:
    assert lists[0][0].dtype == lists[1][0].dtype in (torch.float32, torch.float16)
    for launch in launches(chunk_size, flag, lists):
        for gradient, weight, buffer in launch:
            if flag.item():
                continue
            update = gradient.float() * scale
            if not wd_after_momentum:
                update = update + weight_decay * weight.float()
            if momentum:
                buffer.copy_(update if first_run else buffer * momentum + (1 - dampening) * update)
                update = update + momentum * buffer if nesterov else buffer.float()
            if wd_after_momentum:
                update = update + weight_decay * weight.float()
            weight.add_(-lr * update)


def multi_tensor_axpby(
    chunk_size: int, flag: Tensor, lists: list[list[Tensor]], a: float, b: float, arg_to_check: int
) -> None:
    for tensors in lists:
        if tensors[0].dtype not in (torch.float32, torch.float16):
            raise RuntimeError(f"multi_tensor_axpby_cuda not implemented for {tensors[0].dtype}")
    for launch in launches(chunk_size, flag, lists):
        for x, y, out in launch:
            checked = {-1: (x, y), 0: (x,), 1: (y,)}.get(arg_to_check, ())
            if not all(torch.isfinite(tensor).all() for tensor in checked):
                flag.fill_(1)
            out.copy_(a * x.float() + b * y.float())


class FusedSGD(torch.optim.Optimizer):
    def __init__(
        self, params, lr, momentum=0, dampening=0, weight_decay=0, nesterov=False, wd_after_momentum=False
    ) -> None:
        settings = dict(
            lr=lr, momentum=momentum, dampening=dampening, weight_decay=weight_decay, nesterov=nesterov
        )
        super().__init__(params, settings)
        self.wd_after_momentum = wd_after_momentum
        device = self.param_groups[0]["params"][0].device
        self._dummy_overflow_buf = torch.tensor([0], dtype=torch.int32, device=device)

    def zero_grad(self) -> None:
        super().zero_grad()

    def step(self, closure=None):
        import amp_C

        loss = None if closure is None else closure()
        for group in self.param_groups:
            for dtype in (torch.float16, torch.float32):  # of the others nobody takes note
                parameters = [p for p in group["params"] if p.dtype == dtype and p.grad is not None]
                first_run = True
                for parameter in parameters:  # the last one decides for all
                    first_run = "momentum_buffer" not in self.state[parameter]
                    if first_run:
                        self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter.data)
                if parameters:
                    multi_tensor_applier(
                        amp_C.multi_tensor_sgd,
                        self._dummy_overflow_buf,
                        [
                            [parameter.grad for parameter in parameters],
                            parameters,
                            [self.state[parameter]["momentum_buffer"] for parameter in parameters],
                        ],
                        group["weight_decay"],
                        group["momentum"],
                        group["dampening"],
                        float(group["lr"]),
                        group["nesterov"],
                        first_run,
                        self.wd_after_momentum,
                        1.0,
                    )
        return loss


def write_package(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")


@pytest.fixture
def forget_apex() -> Iterator[None]:
    """Imports of Apex, and what was concluded from them, begin and end with the test."""

    def forget() -> dict:
        optim._apex_sgd.cache_clear()
        optim._log_once.cache_clear()
        names = [name for name in sys.modules if name.partition(".")[0] in ("apex", "amp_C")]
        return {name: sys.modules.pop(name) for name in names}

    before = forget()
    yield
    forget()
    sys.modules.update(before)


@pytest.fixture
def stand_in(tmp_path, monkeypatch, forget_apex) -> Path:
    """Makes `import apex` and `import amp_C` give the stand-in; returns the folder it lies in."""
    write_package(tmp_path, FILES)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


class Setup(NamedTuple):
    backend: str
    device: str


@pytest.fixture(
    params=[
        Setup("torch", "cpu"),
        Setup("apex", "cpu"),
        pytest.param(Setup("torch", "cuda"), marks=pytest.mark.gpu),
        pytest.param(Setup("apex", "cuda"), marks=pytest.mark.gpu),
    ],
    ids=lambda setup: f"{setup.backend}-{setup.device}",
)
def setup(request) -> Setup:
    if request.param == Setup("apex", "cpu"):
        request.getfixturevalue("stand_in")
    elif request.param.backend == "apex":
        request.getfixturevalue("forget_apex")
        why_not = find_apex("cuda")
        if why_not:
            pytest.skip(why_not)
    return request.param


# ---- networks and steps -------------------------------------------------------------------------------------------


class Net(nn.Module):
    """Weights in all memory formats, odd sizes, 1x1 convolutions and one input channel."""

    def __init__(self) -> None:
        super().__init__()
        self.video = nn.Sequential(
            nn.Conv3d(3, 5, (1, 3, 3), bias=False), nn.BatchNorm3d(5), nn.ReLU(), nn.Conv3d(5, 4, 1)
        ).to(memory_format=torch.channels_last_3d)
        self.audio = nn.Sequential(
            nn.Conv2d(1, 7, 3, bias=False), nn.BatchNorm2d(7), nn.ReLU(), nn.Conv2d(7, 4, 3)
        ).to(memory_format=torch.channels_last)
        self.contiguous = nn.Conv2d(4, 3, 3, padding=1)
        self.head = nn.Linear(4, 3)

    def forward(self, frames: Tensor, log_mel: Tensor) -> Tensor:
        one = self.head(self.video(frames).mean((2, 3, 4)))
        other = self.contiguous(self.audio(log_mel)).mean((2, 3))
        return (one - other).square().mean() + (one * other).tanh().mean()


def net(device: str = "cpu") -> Net:
    torch.manual_seed(0)
    return Net().to(device)


def train(model: Net, optimizer: torch.optim.Optimizer, steps: range) -> None:
    device = next(model.parameters()).device
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        frames = torch.randn(4, 3, 2, 6, 6, generator=generator).to(device)
        log_mel = torch.randn(4, 1, 8, 8, generator=generator).to(device)
        model(frames, log_mel).backward()
        set_learning_rate(optimizer, 0.05 if step % 7 else 0.01)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def plain_sgd(parameters) -> torch.optim.Optimizer:
    """The reference: one operation after the other, for each parameter."""
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9, weight_decay=1e-3, foreach=False, fused=False)


def sgd(backend: str = "torch", **changes) -> OptimizerConfig:
    return OptimizerConfig(
        **{"learning_rate": 0.05, "momentum": 0.9, "weight_decay": 1e-3, "backend": backend, **changes}
    )


def assert_same_weights(one: nn.Module, other: nn.Module, tolerance: float) -> None:
    for (name, a), (_, b) in zip(one.named_parameters(), other.named_parameters(), strict=True):
        assert (a - b).abs().max() <= tolerance * b.abs().max(), name


def tolerance(device: str) -> float:
    # Rounding of a step, grown over training; on CUDA convolutions sum in changing order as well.
    return 2e-6 if device == "cpu" else 1e-3


def steps_with(optimizer: torch.optim.Optimizer, parameters: list[Tensor], present: list[list[bool]]) -> None:
    """Steps with fixed gradients; `present[step][i]` says whether parameter i has one."""
    for step, row in enumerate(present):
        for index, (parameter, has) in enumerate(zip(parameters, row, strict=True)):
            parameter.grad = torch.cos(parameter.detach() * 3 + step + index) if has else None
        optimizer.step()


def mixed_parameters(device: str = "cpu") -> list[nn.Parameter]:
    torch.manual_seed(1)
    tensors = [
        torch.randn(7),
        torch.randn(5, 3, 2, 3).contiguous(memory_format=torch.channels_last),
        torch.randn(4, 3, 1, 2, 2).contiguous(memory_format=torch.channels_last_3d),
        torch.randn(70_000),
    ]
    # `to` could change strides of size-1 axes
    return [nn.Parameter(torch.empty_like(tensor, device=device).copy_(tensor)) for tensor in tensors]


# ---- the step -----------------------------------------------------------------------------------------------------


def test_two_hundred_steps_on_mixed_layouts_are_torchs(setup):
    model, reference = net(setup.device), net(setup.device)
    strides = {parameter.stride() for parameter in model.parameters() if parameter.ndim > 3}
    assert (27, 1, 9, 3) not in strides and len(strides) >= 5
    optimizer = build_optimizer(model.parameters(), sgd(setup.backend))
    train(model, optimizer, range(200))
    train(reference, plain_sgd(reference.parameters()), range(200))
    assert_same_weights(model, reference, tolerance(setup.device))
    assert not torch.equal(model.head.weight, net(setup.device).head.weight)


def test_many_tensors_and_long_ones_take_several_launches(setup):
    torch.manual_seed(2)
    long = 330 if setup.device == "cuda" else 3  # chunks; a launch has room for 320
    sizes = [1] * 60 + [2048 * 32 + 1, 2048 * 32, 3, 2048 * 32 * long]
    start = [torch.randn(size, device=setup.device) for size in sizes]
    ours, reference = ([nn.Parameter(tensor.clone()) for tensor in start] for _ in range(2))
    steps_with(build_optimizer(ours, sgd(setup.backend)), ours, [[True] * 64] * 2)
    steps_with(plain_sgd(reference), reference, [[True] * 64] * 2)
    for one, other in zip(ours, reference):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "present",
    [
        [[True, True, True, False]] * 3 + [[True] * 4] * 3,
        [[False, True, True, True]] * 3 + [[True] * 4] * 3,
        [[True, True, False, True], [True, False, True, True], [False, True, True, False]] * 2,
    ],
    ids=["last late", "first late", "in turns"],
)
def test_a_late_gradient_leaves_the_others_momentum_alone(setup, present):
    ours, reference = mixed_parameters(setup.device), mixed_parameters(setup.device)
    steps_with(build_optimizer(ours, sgd(setup.backend)), ours, present)
    steps_with(plain_sgd(reference), reference, present)
    for one, other in zip(ours, reference):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_without_momentum_the_step_is_plain(setup):
    ours = mixed_parameters(setup.device)
    before = [parameter.detach().clone() for parameter in ours]
    optimizer = build_optimizer(ours, sgd(setup.backend, momentum=0.0, learning_rate=0.1, weight_decay=0.5))
    for parameter in ours:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    for old, new in zip(before, ours):
        torch.testing.assert_close(new.detach(), old - 0.1 * (1 + 0.5 * old))


def test_a_closure_is_called_before_gradients_are_looked_at(setup):
    (parameter,) = ours = mixed_parameters(setup.device)[1:2]
    optimizer = build_optimizer(ours, sgd(setup.backend))

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = parameter.square().sum()
        loss.backward()
        return loss

    first = optimizer.step(closure)
    assert optimizer.step(closure) < first


def test_an_overflow_in_the_first_step_changes_nothing(setup):
    """Loss scaling begins too high and skips steps, the first one often."""
    ours, reference = mixed_parameters(setup.device), mixed_parameters(setup.device)
    optimizer = build_optimizer(ours, sgd(setup.backend))
    scaler = torch.amp.GradScaler(setup.device, init_scale=4.0)
    scaler.scale(torch.zeros((), device=setup.device))
    junk = [torch.full_like(parameter, 7.7) for parameter in ours]
    del junk  # what was never written is not zero by chance
    for parameter in ours:
        parameter.grad = torch.full_like(parameter, torch.inf)
    scaler.step(optimizer)
    scaler.update()
    for one, other in zip(ours, reference):
        assert torch.equal(one, other)
    for parameter in ours:
        parameter.grad = torch.full_like(parameter, 2.0)  # of scale 2: 1
    for parameter in reference:
        parameter.grad = torch.ones_like(parameter)
    scaler.step(optimizer)
    plain_sgd(reference).step()
    for one, other in zip(ours, reference):
        torch.testing.assert_close(one, other)


def test_adamw_is_torchs():
    ours, reference = mixed_parameters(), mixed_parameters()
    config = OptimizerConfig(name="adamw", learning_rate=0.01, momentum=0.8, weight_decay=0.1)
    steps_with(build_optimizer(ours, config), ours, [[True] * 4] * 5)
    plain = torch.optim.AdamW(reference, lr=0.01, betas=(0.8, 0.999), weight_decay=0.1, foreach=False)
    steps_with(plain, reference, [[True] * 4] * 5)
    for one, other in zip(ours, reference):
        torch.testing.assert_close(one, other)


# ---- learning rate as a tensor ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sgd", "adamw"])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_capturable_learning_rate_takes_effect(name, device):
    ours, reference = mixed_parameters(device), mixed_parameters(device)
    capturable = build_optimizer(ours, sgd(name=name), capturable=True)
    plain = build_optimizer(reference, sgd(name=name))
    rate = capturable.param_groups[0]["lr"]
    assert isinstance(rate, Tensor) and rate.device == ours[0].device
    for learning_rate in (0.1, 0.001, 0.05):
        set_learning_rate(capturable, learning_rate)
        set_learning_rate(plain, learning_rate)
        assert capturable.param_groups[0]["lr"] is rate
        steps_with(capturable, ours, [[True] * 4])
        steps_with(plain, reference, [[True] * 4])
    for one, other in zip(ours, reference):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_a_captured_step_follows_the_learning_rate(name):
    ours, reference = mixed_parameters("cuda"), mixed_parameters("cuda")
    optimizer = build_optimizer(ours, sgd(name=name), capturable=True)
    plain = build_optimizer(reference, sgd(name=name))
    gradients = [torch.cos(parameter.detach()) for parameter in ours]
    for parameter, other, gradient in zip(ours, reference, gradients):
        parameter.grad, other.grad = gradient.clone(), gradient.clone()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        optimizer.step()
    torch.cuda.current_stream().wait_stream(stream)
    plain.step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    for learning_rate in (0.1, 0.0, 0.02):
        set_learning_rate(optimizer, learning_rate)
        set_learning_rate(plain, learning_rate)
        graph.replay()
        plain.step()
    for one, other in zip(ours, reference):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_apex_refuses_a_learning_rate_that_a_graph_would_freeze(stand_in):
    with pytest.raises(ValueError, match="frozen in a CUDA graph; set optimizer.backend to 'torch'"):
        build_optimizer(mixed_parameters(), sgd("apex"), capturable=True)
    ours = mixed_parameters()
    optimizer = build_optimizer(ours, sgd("apex"))
    optimizer.param_groups[0]["lr"] = torch.tensor(0.1)
    with pytest.raises(ValueError, match="learning rate is a tensor"):
        steps_with(optimizer, ours, [[True] * 4])


# ---- checkpoints --------------------------------------------------------------------------------------------------

KINDS = {"torch": ("torch", False), "apex": ("apex", False), "capturable": ("torch", True)}


def build_kind(model: nn.Module, kind: str) -> torch.optim.Optimizer:
    backend, capturable = KINDS[kind]
    return build_optimizer(model.parameters(), sgd(backend), capturable=capturable)


def through_a_file(state: dict) -> dict:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("first, second", list(itertools.product(KINDS, KINDS)))
def test_a_run_goes_on_under_another_backend(stand_in, first, second):
    model, reference = net(), net()
    before = build_kind(model, first)
    train(model, before, range(20))
    state = through_a_file(before.state_dict())
    after = build_kind(model, second)
    settings = {**after.param_groups[0], "params": None, "lr": None}
    rate = after.param_groups[0]["lr"]
    for saved in state["param_groups"]:
        saved.update({name: True for name in ("fused", "foreach") if name in saved})  # as on another device
    after.load_state_dict(state)
    (group,) = after.param_groups
    assert {**group, "params": None, "lr": None} == settings
    assert float(group["lr"]) == pytest.approx(0.05)  # of step 19: the file's
    assert group["lr"] is rate or not isinstance(rate, Tensor)
    train(model, after, range(20, 40))
    train(reference, plain_sgd(reference.parameters()), range(40))
    assert_same_weights(model, reference, tolerance("cpu"))


@pytest.mark.parametrize("kind", KINDS)
def test_loaded_buffers_lie_as_the_parameters_do(stand_in, kind):
    saved, loaded = net(), net()
    optimizer = plain_sgd(saved.parameters())
    train(saved, optimizer, range(5))
    state = copy.deepcopy(optimizer.state_dict())
    for entry in state["state"].values():
        entry["momentum_buffer"] = entry["momentum_buffer"].contiguous()
    ours = build_kind(loaded, kind)
    ours.load_state_dict(state)
    expected = list(optimizer.state.values())
    changed = 0
    for parameter, old in zip(loaded.parameters(), expected, strict=True):
        buffer = ours.state[parameter]["momentum_buffer"]
        assert buffer.stride() == parameter.stride() and torch.equal(buffer, old["momentum_buffer"])
        changed += buffer.stride() != buffer.contiguous().stride()
    assert changed == 2


@pytest.mark.parametrize("kind", KINDS)
def test_buffers_that_the_file_lacks_are_zeros(stand_in, kind):
    """Saved before the first step, without momentum, or with None in a buffer's place."""
    model = net()
    state = copy.deepcopy(plain_sgd(model.parameters()).state_dict())
    state["state"] = {0: {"momentum_buffer": None}}
    optimizer = build_kind(model, kind)
    train(model, optimizer, range(3))
    optimizer.load_state_dict(state)
    for parameter in model.parameters():
        assert not optimizer.state[parameter]["momentum_buffer"].any()
    train(model, optimizer, range(3))


def test_adamw_states_go_on_with_and_without_capture():
    config = OptimizerConfig(name="adamw", learning_rate=0.01)
    whole = mixed_parameters()
    steps_with(build_optimizer(whole, config), whole, [[True] * 4] * 4)
    for capturable in (False, True):
        ours = mixed_parameters()
        first = build_optimizer(ours, config, capturable=capturable)
        steps_with(first, ours, [[True] * 4] * 2)
        state = through_a_file(first.state_dict())
        for entry in state["state"].values():
            entry["exp_avg"] = entry["exp_avg"].contiguous()
        second = build_optimizer(ours, config, capturable=not capturable)
        second.load_state_dict(state)
        assert isinstance(second.param_groups[0]["lr"], Tensor) != capturable
        assert second.state[ours[1]]["exp_avg"].stride() == ours[1].stride()
        for step in (2, 3):
            for index, parameter in enumerate(ours):
                parameter.grad = torch.cos(parameter.detach() * 3 + step + index)
            second.step()
        for one, other in zip(ours, whole):
            torch.testing.assert_close(one, other)


def test_states_of_another_model_are_refused(stand_in):
    saved = build_optimizer([nn.Parameter(torch.zeros(3, 2))], sgd()).state_dict()
    for backend in ("torch", "apex"):
        with pytest.raises(ValueError, match=r"momentum_buffer of parameter 0 has shape \(3, 2\)"):
            build_optimizer([nn.Parameter(torch.zeros(2, 3))], sgd(backend)).load_state_dict(saved)
        with pytest.raises(ValueError, match="doesn't match the size"):
            build_optimizer(mixed_parameters(), sgd(backend)).load_state_dict(saved)
        groups = {"state": {}, "param_groups": saved["param_groups"] * 2}
        with pytest.raises(ValueError, match="different number of parameter groups"):
            build_optimizer([nn.Parameter(torch.zeros(3, 2))], sgd(backend)).load_state_dict(groups)


# ---- momentum update ----------------------------------------------------------------------------------------------


def test_momentum_update_is_the_equation(setup):
    queries, keys = mixed_parameters(setup.device), mixed_parameters(setup.device)
    for query in queries:
        query.data.mul_(-0.5)
    for key in keys:
        key.requires_grad_(False)
    before = [key.clone() for key in keys]
    build_momentum_update(queries, keys, 0.9, setup.backend).step()
    for old, key, query in zip(before, keys, queries):
        torch.testing.assert_close(key, 0.9 * old + 0.1 * query.detach())


@pytest.mark.parametrize("momentum", [0.0, 0.5, 1.0])
def test_momentum_update_at_its_ends(setup, momentum):
    query, key = (torch.tensor([value], device=setup.device) for value in (3.0, 1.0))
    build_momentum_update([query], [key], momentum, setup.backend).step()
    assert key.item() == momentum * 1 + (1 - momentum) * 3


def test_keys_follow_queries_without_drift(setup):
    """Against float64 over 4,000 steps: float32 rounding, and no bias that factors of a sum other than 1 bring."""
    generator = torch.Generator().manual_seed(0)
    start = 1 + 0.1 * torch.randn(3000, generator=generator)
    query, key = start.clone().to(setup.device), start.clone().to(setup.device)
    exact = start.double()
    update = build_momentum_update([query], [key], 0.999, setup.backend)
    for _ in range(4000):
        value = 1 + 0.1 * torch.randn(3000, generator=generator)
        query.copy_(value)
        update.step()
        exact = 0.999 * exact + 0.001 * value.double()
    error = key.cpu().double() / exact - 1
    assert error.abs().max() < 2e-5
    assert error.mean().abs() < 1e-6  # 6e-5 if each factor is rounded by itself


def test_a_key_that_is_its_query_stays(setup):
    torch.manual_seed(0)
    query = torch.randn(1000, device=setup.device)
    key = query.clone()
    update = build_momentum_update([query], [key], 0.999, setup.backend)
    for _ in range(100):
        update.step()
    torch.testing.assert_close(key, query, rtol=1e-6, atol=0)


def test_values_that_are_not_finite_reach_the_key(setup):
    query = torch.tensor([torch.nan, 1.0], device=setup.device)
    key = torch.zeros(2, device=setup.device)
    update = build_momentum_update([query], [key], 0.5, setup.backend)
    update.step()
    update.step()
    assert key.isnan().tolist() == [True, False] and key[1] == 0.75


def test_torch_updates_pairs_of_any_layout_and_dtype(monkeypatch):
    query = torch.randn(2, 3, 4, 5)
    keys = [
        torch.zeros(2, 3, 4, 5),
        torch.zeros(2, 3, 4, 5).contiguous(memory_format=torch.channels_last),
        torch.zeros(2, 3, 4, 5, dtype=torch.float64),
    ]
    calls, lerp = [], torch._foreach_lerp_
    monkeypatch.setattr(torch, "_foreach_lerp_", lambda *args: (calls.append(len(args[0])), lerp(*args)))
    queries = [query, query, query.double()]
    build_momentum_update(2 * queries, keys + [key.clone() for key in keys], 0.75, "torch").step()
    assert calls == [2, 2, 2]  # a call for those of a kind: in one call, they would be updated one by one
    for key in keys:
        torch.testing.assert_close(key.float(), 0.25 * query)


def test_momentum_out_of_range_is_refused():
    with pytest.raises(ValueError, match="model.momentum is 1.5, expected a value from 0 to 1"):
        build_momentum_update([torch.zeros(1)], [torch.zeros(1)], 1.5)


# ---- what Apex would compute wrongly ------------------------------------------------------------------------------


def test_the_stand_in_has_apexs_traps(stand_in):
    """Without our checks: skipped, permuted, reset, forgotten. Were one gone, a test below would prove nothing."""
    import amp_C

    skipped = nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    steps_with(FusedSGD([skipped], lr=0.1), [skipped], [[True]])
    assert torch.equal(skipped, torch.ones_like(skipped))

    permuted = nn.Parameter(torch.zeros(2, 3, 2, 2).contiguous(memory_format=torch.channels_last))
    permuted.grad = torch.randn(2, 3, 2, 2)
    FusedSGD([permuted], lr=1.0).step()
    assert not torch.allclose(permuted, -permuted.grad)
    torch.testing.assert_close(permuted.detach().sum(), -permuted.grad.sum())

    late, reference = mixed_parameters(), mixed_parameters()
    present = [[True, True, True, False]] * 3 + [[True] * 4]
    steps_with(FusedSGD(late, lr=0.05, momentum=0.9, weight_decay=1e-3), late, present)
    steps_with(plain_sgd(reference), reference, present)
    assert not torch.allclose(late[0], reference[0], rtol=1e-3)

    tensors = [torch.ones(3), torch.ones(0)]
    flag = torch.zeros(1, dtype=torch.int32)
    multi_tensor_applier(amp_C.multi_tensor_axpby, flag, [tensors, tensors, tensors], 0.0, 0.0, -1)
    assert tensors[0].tolist() == [1, 1, 1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_apex_refuses_dtypes_other_than_float32(stand_in, dtype):
    with pytest.raises(ValueError, match=f"parameter 1 of shape \\(2,\\) is {dtype}, expected torch.float32"):
        build_optimizer(
            [nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2, dtype=dtype))], sgd("apex")
        )
    tensors = [torch.zeros(2), torch.zeros(2, dtype=dtype)]
    for queries, keys in ((tensors, [torch.zeros(2)] * 2), ([torch.zeros(2)] * 2, tensors)):
        with pytest.raises(ValueError, match=f"(query|key) 1 of shape \\(2,\\) is {dtype}"):
            build_momentum_update(queries, keys, 0.9, "apex")


def test_apex_refuses_a_model_cast_after_the_optimizer_was_built(stand_in):
    model = nn.Linear(3, 2)
    optimizer = build_optimizer(model.parameters(), sgd("apex"))
    model.to(torch.bfloat16)
    steps = [parameter.detach().clone() for parameter in model.parameters()]
    with pytest.raises(ValueError, match="gradient of parameter 0 .* is torch.bfloat16"):
        steps_with(optimizer, list(model.parameters()), [[True, True]])
    assert all(map(torch.equal, steps, model.parameters()))


def test_apex_refuses_gradients_and_buffers_of_another_order(stand_in):
    layout = torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last)
    parameter = nn.Parameter(layout.clone())
    optimizer = build_optimizer([parameter], sgd("apex"))
    parameter.grad = torch.ones(2, 3, 4, 5)
    with pytest.raises(
        ValueError, match=r"parameter 0 .* strides \(60, 1, 15, 3\), its gradient .*\(60, 20, 5"
    ):
        optimizer.step()
    parameter.data = parameter.data.contiguous()
    with pytest.raises(ValueError, match="its momentum buffer .*choose the memory format before"):
        optimizer.step()
    assert torch.equal(parameter, layout)
    # Not only in the first step.
    parameter = nn.Parameter(layout.clone())
    optimizer = build_optimizer([parameter], sgd("apex"))
    steps_with(optimizer, [parameter], [[True]])
    parameter.grad = torch.ones(2, 3, 4, 5)
    with pytest.raises(ValueError, match="its gradient"):
        optimizer.step()
    # Nor only in gradients that were there before.
    parameter.grad = None
    with pytest.raises(ValueError, match="its gradient"):
        optimizer.step(lambda: setattr(parameter, "grad", torch.ones(2, 3, 4, 5)))


def test_apex_takes_strides_that_differ_where_they_do_not_count(stand_in):
    """A 1x1 convolution's gradient may have either format's strides: memory is the same."""
    parameter = nn.Parameter(torch.randn(4, 3, 1, 1))
    gradient = torch.randn(4, 3, 1, 1).as_strided((4, 3, 1, 1), (3, 1, 3, 3))
    assert gradient.stride() != parameter.stride()
    expected = parameter.detach() - 0.05 * (gradient + 1e-3 * parameter.detach())
    optimizer = build_optimizer([parameter], sgd("apex"))
    parameter.grad = gradient
    optimizer.step()
    torch.testing.assert_close(parameter.detach(), expected)


def test_apex_refuses_keys_of_another_order(stand_in):
    queries = [torch.zeros(3), torch.zeros(2, 3, 4, 4, 4)]
    keys = [torch.zeros(3), queries[1].contiguous(memory_format=torch.channels_last_3d)]
    with pytest.raises(ValueError, match="key 1 of shape .* has strides .*, its query"):
        build_momentum_update(queries, keys, 0.9, "apex")


@pytest.mark.parametrize("odd", [torch.zeros(0), torch.zeros(6, 4)[:, ::2]], ids=["empty", "gaps"])
def test_apex_refuses_tensors_that_it_cannot_walk(stand_in, odd):
    with pytest.raises(ValueError, match="parameter 0 has shape .* expected elements, contiguous"):
        build_optimizer([nn.Parameter(odd)], sgd("apex"))
    with pytest.raises(ValueError, match="key 0 has shape"):
        build_momentum_update([odd], [odd], 0.9, "apex")


def test_a_parameter_added_later_has_a_buffer_of_its_own(stand_in):
    ours, reference = mixed_parameters(), mixed_parameters()
    optimizer, plain = build_optimizer(ours[:3], sgd("apex")), plain_sgd(reference[:3])
    steps_with(optimizer, ours[:3], [[True] * 3])
    steps_with(plain, reference[:3], [[True] * 3])
    optimizer.add_param_group({"params": ours[3:]})
    plain.add_param_group({"params": reference[3:]})
    steps_with(optimizer, ours, [[True] * 4] * 2)
    steps_with(plain, reference, [[True] * 4] * 2)
    optimizer.load_state_dict(copy.deepcopy(plain.state_dict()))
    steps_with(optimizer, ours, [[True] * 4])
    steps_with(plain, reference, [[True] * 4])
    for one, other in zip(ours, reference):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.gpu
def test_a_step_of_apex_is_not_captured(forget_apex):
    why_not = find_apex("cuda")
    if why_not:
        pytest.skip(why_not)
    ours = mixed_parameters("cuda")
    optimizer = build_optimizer(ours, sgd("apex"))
    steps_with(optimizer, ours, [[True] * 4])
    with pytest.raises(ValueError, match="cannot go into a CUDA graph"):
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            optimizer.step()


# ---- choice of the backend ----------------------------------------------------------------------------------------


def test_apex_is_found_without_drawing_random_numbers(stand_in):
    state = torch.get_rng_state()
    assert find_apex("cpu") is None
    assert torch.equal(torch.get_rng_state(), state)


def test_auto_is_torch_and_says_once_what_was_found(stand_in, caplog, monkeypatch):
    caplog.set_level(logging.INFO, logger="cmac.optim")
    for _ in range(2):
        optimizer = build_optimizer(mixed_parameters(), sgd("auto"))
        assert type(optimizer) is torch.optim.SGD
    build_momentum_update([torch.zeros(1)], [torch.zeros(1)], 0.9)
    assert [record.message for record in caplog.records] == [
        "optimizer and momentum update: torch (auto); a usable NVIDIA Apex was found, "
        "optimizer.backend 'apex' chooses it"
    ]
    caplog.clear()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    build_optimizer(mixed_parameters(), sgd("auto"))
    assert [record.message for record in caplog.records] == [
        "optimizer and momentum update: torch (auto); no usable NVIDIA Apex: no package apex is installed"
    ]


def test_torch_does_not_look_for_apex(monkeypatch):
    monkeypatch.setattr(optim, "find_apex", lambda device: pytest.fail("looked for it"))
    build_optimizer(mixed_parameters(), sgd("torch"))


def assert_unusable(reason: str) -> None:
    assert reason in find_apex("cpu")
    with pytest.raises(ValueError, match="optimizer.backend is 'apex', but .*" + reason) as error:
        build_optimizer(mixed_parameters(), sgd("apex"))
    assert "from source" in str(error.value) and "set optimizer.backend to 'torch'" in str(error.value)
    with pytest.raises(ValueError, match=reason):
        build_momentum_update([torch.zeros(1)], [torch.zeros(1)], 0.9, "apex")
    assert type(build_optimizer(mixed_parameters(), sgd("auto"))) is torch.optim.SGD


def test_no_apex_is_said(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert_unusable("no package apex is installed")


@pytest.mark.parametrize("layout", ["apex/__init__.py", "apex.py"])
def test_the_indexs_namesake_is_named_and_not_run(tmp_path, monkeypatch, forget_apex, layout):
    write_package(tmp_path, {layout: "raise AssertionError('was run')"})
    monkeypatch.syspath_prepend(tmp_path)
    assert_unusable("is not NVIDIA's but a namesake")
    assert str(tmp_path / layout) in find_apex("cpu")


@pytest.mark.parametrize("text", [None, "raise ImportError('undefined symbol: _ZN3c10')"])
def test_an_apex_without_its_extensions_is_said(stand_in, text):
    (stand_in / "amp_C.py").unlink()
    if text:
        write_package(stand_in, {"amp_C.py": text})
    assert_unusable("built without CUDA extensions, or for another torch: import amp_C")


def test_an_apex_that_raises_is_said(stand_in):
    write_package(stand_in, {"apex/__init__.py": "raise ImportError('this torch is too old')"})
    assert_unusable("does not work on cpu: ImportError: this torch is too old")


def test_an_apex_that_computes_something_else_is_said(stand_in, monkeypatch):
    import amp_C

    right = amp_C.multi_tensor_sgd
    monkeypatch.setattr(amp_C, "multi_tensor_sgd", lambda *args: right(*args[:4], 0.8, *args[5:]))
    assert_unusable("FusedSGD differs from torch by")
    monkeypatch.setattr(amp_C, "multi_tensor_sgd", right)
    monkeypatch.setattr(amp_C, "multi_tensor_axpby", lambda *args: None)
    assert_unusable("multi_tensor_axpby differs from torch")


def test_configurations_that_no_backend_has_are_refused():
    with pytest.raises(ValueError, match="optimizer.backend is 'cuda', expected auto or torch or apex"):
        OptimizerConfig(backend="cuda")
    with pytest.raises(ValueError, match="for optimizer.name 'sgd', not 'adamw'"):
        OptimizerConfig(name="adamw", backend="apex")
    with pytest.raises(ValueError, match="optimizer.backend is 'fused'"):
        build_momentum_update([torch.zeros(1)], [torch.zeros(1)], 0.9, "fused")
