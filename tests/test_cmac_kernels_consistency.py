"""Attention consistency: the choice of implementation, and the kernels against float64."""

import logging
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from cmac import consistency
from cmac.attention import AttentionConfig, guided_attention, predicted_attention
from cmac.consistency import consistency_loss, consistency_loss_reference
from cmac.losses import attention_consistency_loss

TOLERANCE = {torch.float32: (2e-5, 2e-6), torch.bfloat16: (2**-7, 1e-5), torch.float16: (2**-10, 1e-5)}
"""Of outputs and gradients, by the dtype of the gradient: relative to the largest value of the tensor, and absolute.
Gradients in half precision are off by their last place; Triton's interpreter cuts bfloat16 off instead of rounding."""

VIDEO, AUDIO = (4, 8, 8), (9, 4)
NAMES = ("transformed", "other_filter", "saliency")
Result = dict[str, Tensor]


def draw(size: tuple[int, ...], num_clips: int, channels: int, dtype: torch.dtype, seed: int = 0) -> Result:
    """Inputs of one modality, in channels-last memory."""
    random = torch.Generator().manual_seed(seed)
    transformed = torch.randn(num_clips, *size, channels, generator=random).movedim(-1, 1)
    other_filter = torch.randn(num_clips, channels, generator=random)
    # Neither all small nor all parallel: cosines over the whole range.
    transformed = transformed * 3 + 2 * other_filter.view(num_clips, channels, *[1] * len(size))
    saliency = 2 * torch.randn(num_clips, 1, *size, generator=random)
    return {
        "transformed": transformed.to(dtype),
        "other_filter": other_filter,
        "saliency": saliency.to(dtype),
        "grad": torch.rand(num_clips, generator=random) + 0.5,
    }


def run(
    inputs: Result, options: dict[str, Any], reduction: str = "sum", impl: str = "fused", device: str = "cpu"
) -> Result:
    """Loss, and the gradients that there are. `inputs` as draw gives them."""
    leaves = {name: inputs[name].detach().to(device).requires_grad_() for name in NAMES}
    loss = consistency_loss(*leaves.values(), AttentionConfig(**options), reduction, impl)
    assert loss.dtype == torch.float32 and loss.device == leaves["saliency"].device
    loss.backward(inputs["grad"].to(device))
    result = {"loss": loss.detach().cpu()}
    for name, leaf in leaves.items():
        if leaf.grad is not None:
            assert leaf.grad.dtype == leaf.dtype and leaf.grad.shape == leaf.shape
            result[name] = leaf.grad.cpu()
    return result


def run_exactly(inputs: Result, options: dict[str, Any], reduction: str = "sum") -> Result:
    """The same by the reference's equations in float64."""
    leaves = {name: inputs[name].detach().double().requires_grad_() for name in NAMES}
    config = AttentionConfig(**options)
    guided = guided_attention(leaves["transformed"], leaves["other_filter"], config)
    if config.detach_target:
        guided = guided.detach()
    squared = (guided - predicted_attention(leaves["saliency"])).square().flatten(1)
    loss = squared.sum(1) if reduction == "sum" else squared.mean(1)
    assert loss.dtype == torch.float64
    loss.backward(inputs["grad"].double())
    gradients = {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
    return {"loss": loss.detach(), **gradients}


def assert_close(result: Result, expected: Result, inputs: Result) -> None:
    assert result.keys() == expected.keys()
    for name, value in result.items():
        dtype = torch.float32 if name == "loss" else inputs[name].dtype
        relative, absolute = TOLERANCE[dtype]
        error = (value.double() - expected[name]).abs().max().item()
        limit = absolute + relative * expected[name].abs().max().item()
        assert error <= limit, f"{name} is off by {error:.2e}, more than {limit:.2e}"


Run = Callable[..., Result]


@pytest.fixture
def interpreted(interpreter: Callable) -> Run:
    """The kernels under Triton's interpreter."""
    return lambda *args, **kwargs: interpreter(run, *args, **kwargs)


@pytest.fixture
def on_gpu() -> Run:
    return lambda *args, **kwargs: run(*args, **kwargs, device="cuda")


def check(fused: Run, inputs: Result, options: dict[str, Any], reduction: str = "sum") -> None:
    assert_close(fused(inputs, options, reduction), run_exactly(inputs, options, reduction), inputs)


# The choice


def test_reference_is_the_composition_of_the_equations():
    inputs = draw((3, 5, 3), 2, 7, torch.float32)
    x, kappa, saliency = (inputs[name] for name in NAMES)
    for options in ({}, {"norm": "softmax"}, {"cosine_range": "minmax", "num_scales": 3}):
        config = AttentionConfig(**options)
        guided, predicted = guided_attention(x, kappa, config), predicted_attention(saliency)
        for reduction in ("sum", "mean"):
            loss = consistency_loss(x, kappa, saliency, config, reduction)
            assert torch.equal(loss, attention_consistency_loss(guided, predicted, reduction))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("detach_target", [True, False])
def test_reference_agrees_with_float64_and_its_target_is_held_fixed_on_request(dtype, detach_target):
    inputs, options = draw(VIDEO, 2, 24, dtype), {"detach_target": detach_target}
    result = run(inputs, options, impl="reference")
    assert ("transformed" in result, "other_filter" in result) == (not detach_target, not detach_target)
    assert_close(result, run_exactly(inputs, options), inputs)


def test_consistency_of_a_hand_worked_case():
    # Positions along the filter and against it: guided 1 and 0, predicted 1/2 and sigmoid(ln 3) = 3/4.
    transformed = torch.tensor([[[[2.0, -3.0]], [[0.0, 0.0]]]])  # (1, 2, 1, 2)
    saliency = torch.tensor([0.0, 3.0]).view(1, 1, 1, 2)
    saliency[..., 1] = torch.tensor(3.0).log()
    config = AttentionConfig(num_scales=1)
    loss = consistency_loss(transformed, torch.tensor([[10.0, 0.0]]), saliency, config)
    torch.testing.assert_close(loss, torch.tensor([0.25 + 0.5625]))


@pytest.mark.parametrize(
    ("options", "named"),
    [({"norm": "softmax"}, "norm is 'softmax'"), ({"cosine_range": "minmax"}, "cosine_range is 'minmax'")],
)
def test_norms_without_a_kernel_take_the_reference_and_log_it_once(caplog, options, named):
    inputs = draw(AUDIO, 2, 5, torch.float32)
    arguments = [inputs[name] for name in NAMES]
    config = AttentionConfig(**options)
    with pytest.raises(
        ValueError, match=f"impl is 'fused', but model.attention.{named}; expected .*'cosine'"
    ):
        consistency_loss(*arguments, config, impl="fused")
    consistency._log_reference.cache_clear()
    with caplog.at_level(logging.INFO):
        results = [consistency_loss(*arguments, config) for _ in range(3)]
    assert sum(named in record.message for record in caplog.records) == 1
    assert torch.equal(results[0], consistency_loss_reference(*arguments, config))


def test_auto_on_the_cpu_is_the_reference_and_fused_says_what_is_missing(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    inputs = draw(AUDIO, 2, 5, torch.float32)
    auto, reference = run(inputs, {}, impl="auto"), run(inputs, {}, impl="reference")
    assert all(torch.equal(auto[name], reference[name]) for name in reference)
    with pytest.raises(ValueError, match="impl is 'fused', but tensors are on cpu and TRITON_INTERPRET=1"):
        run(inputs, {}, impl="fused")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"transformed": (2, 5, 9)}, r"transformed is \(2, 5, 9\), expected \(N, K, T, H, W\)"),
        ({"other_filter": (2, 4)}, r"other_filter is \(2, 4\), expected \(2, 5\)"),
        ({"other_filter": (1, 5)}, r"other_filter is \(1, 5\), expected \(2, 5\)"),
        ({"saliency": (2, 9, 4)}, r"saliency is \(2, 9, 4\), expected \(2, 1, 9, 4\)"),
        ({"reduction": "none"}, "consistency_reduction is 'none', expected 'sum' or 'mean'"),
        ({"impl": "triton"}, "impl is 'triton', expected auto or reference or fused"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(change, message):
    shapes = {"transformed": (2, 5, 9, 4), "other_filter": (2, 5), "saliency": (2, 1, 9, 4)}
    arguments = {name: torch.zeros(change.pop(name, shape)) for name, shape in shapes.items()}
    with pytest.raises(ValueError, match=message):
        consistency_loss(**arguments, config=AttentionConfig(), **change)


def test_an_empty_batch_has_no_losses():
    loss = consistency_loss(
        torch.zeros(0, 5, 9, 4), torch.zeros(0, 5), torch.zeros(0, 1, 9, 4), AttentionConfig()
    )
    assert loss.shape == (0,)


# The kernels against float64

CASES = [
    # (size, clips, channels, dtype, options)
    (VIDEO, 3, 24, torch.bfloat16, {}),
    ((2, 6, 6), 2, 521, torch.float32, {}),  # one cell per program
    (AUDIO, 3, 23, torch.float32, {}),
    (AUDIO, 1, 512, torch.bfloat16, {"num_scales": 3}),
    ((1, 1), 5, 1, torch.float32, {}),
    ((1, 1, 1), 1, 2, torch.float32, {"num_scales": 3, "halve_time": True}),
    ((17, 7), 2, 5, torch.float32, {"num_scales": 3}),
    ((5, 5, 7), 2, 11, torch.float32, {"num_scales": 3, "halve_time": True}),
    ((3, 5, 7), 2, 11, torch.float32, {"num_scales": 3}),
    ((4, 6, 5), 2, 130, torch.bfloat16, {"halve_time": True}),  # more channels than a block
    ((2, 23, 25), 1, 3, torch.float32, {}),  # more positions than a block
    ((3, 5, 7), 3, 13, torch.float32, {"num_scales": 1}),
    ((3, 5, 7), 3, 13, torch.float32, {"cosine_range": "relu"}),
    ((5, 3), 3, 13, torch.float16, {"cosine_range": "relu", "num_scales": 3}),
    ((3, 5, 7), 3, 13, torch.float32, {"norm": "none"}),
    ((9, 4), 3, 13, torch.bfloat16, {"norm": "none", "num_scales": 3}),
    ((9, 4), 3, 13, torch.float32, {"norm": "none", "num_scales": 1}),
]
HELD = [True, False]


def check_case(fused: Run, case: tuple, detach_target: bool) -> None:
    size, num_clips, channels, dtype, options = case
    inputs = draw(size, num_clips, channels, dtype)
    check(fused, inputs, {**options, "detach_target": detach_target})


def check_mean(fused: Run) -> None:
    for size in (VIDEO, AUDIO):
        check(fused, draw(size, 2, 9, torch.float32), {"detach_target": False}, "mean")


def check_memory(fused: Run) -> None:
    """Whatever the strides."""
    inputs = draw((3, 5, 4), 2, 6, torch.float32)
    inputs["transformed"] = inputs["transformed"].contiguous()
    inputs["other_filter"] = inputs["other_filter"].T.contiguous().T
    inputs["saliency"] = (
        inputs["saliency"].repeat(1, 2, 1, 1, 1).movedim(1, -1).contiguous().movedim(-1, 1)[:, :1]
    )
    inputs["grad"] = torch.tensor(0.7).expand(2)
    assert inputs["saliency"].stride(-1) == 2 and inputs["grad"].stride() == (0,)
    check(fused, inputs, {"detach_target": False})


def check_extremes(fused: Run) -> None:
    """Vectors of zeros, and shorter than the epsilon of F.cosine_similarity; saliency beyond float32's exp."""
    for options in ({}, {"cosine_range": "relu"}):
        inputs = draw((2, 4, 4), 3, 6, torch.float32)
        inputs["transformed"][0, :, 0, 1:3] = 0
        inputs["transformed"][1] *= 1e-10
        inputs["transformed"][2, :, 1] = inputs["other_filter"][2, :, None, None] * 2
        inputs["saliency"][:, :, :, 0] = 200
        inputs["saliency"][:, :, :, 1] = -200
        # Gradients of zeros are 1e8 times those of the others: what matters is that those are right as well.
        for rows in (slice(0, 1), slice(1, 2), slice(2, 3)):
            part = {name: value[rows] for name, value in inputs.items()}
            check(fused, part, {**options, "detach_target": False})
    inputs = draw((2, 4, 4), 3, 6, torch.float32)
    inputs["other_filter"][0] = 0
    inputs["other_filter"][1] *= 1e-9
    for rows in (slice(0, 1), slice(1, 2)):
        check(fused, {name: value[rows] for name, value in inputs.items()}, {"detach_target": False})


def check_not_finite(fused: Run) -> None:
    """What is not finite stays in its clip, and shows in its loss."""
    inputs = draw(AUDIO, 4, 6, torch.float32)
    expected = fused(inputs, {"detach_target": False})
    inputs["transformed"][1, 2, 3, 1] = float("nan")
    inputs["saliency"][2, 0, 1, 1] = float("nan")
    result = fused(inputs, {"detach_target": False})
    assert torch.equal(result["loss"].isnan(), torch.tensor([False, True, True, False]))
    for name, value in result.items():
        assert torch.equal(value[::3], expected[name][::3])


@pytest.mark.parametrize("detach_target", HELD)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_interpreted_kernels_agree_with_float64(interpreted, case, detach_target):
    check_case(interpreted, case, detach_target)


def test_interpreted_kernels_take_the_mean(interpreted):
    check_mean(interpreted)


def test_interpreted_kernels_read_any_memory_layout(interpreted):
    check_memory(interpreted)


def test_interpreted_kernels_clamp_as_torch_does(interpreted):
    check_extremes(interpreted)


def test_interpreted_kernels_keep_what_is_not_finite_in_its_clip(interpreted):
    check_not_finite(interpreted)


def run_for_some(inputs: Result, names: tuple[str, ...]) -> Result:
    """Gradients where only some of the inputs ask for one; none at all where gradients are off."""
    leaves = {name: inputs[name].requires_grad_(name in names) for name in inputs if name != "grad"}
    config = AttentionConfig(detach_target=False)
    with torch.set_grad_enabled(bool(names)):
        loss = consistency_loss(*leaves.values(), config, impl="fused")
    if names:
        loss.backward(inputs["grad"])
    gradients = {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
    return {"loss": loss.detach(), **gradients}


@pytest.mark.parametrize("names", [(), ("other_filter",), ("transformed", "saliency")])
def test_interpreted_kernels_give_the_gradients_asked_for(interpreter, names):
    inputs = draw((3, 5), 2, 6, torch.float32)
    expected = run_exactly(inputs, {"detach_target": False})
    result = interpreter(run_for_some, inputs, names)
    assert_close(result, {name: expected[name] for name in ("loss", *names)}, inputs)


@pytest.mark.gpu
@pytest.mark.parametrize("detach_target", HELD)
@pytest.mark.parametrize(
    "case",
    [
        *CASES,
        (VIDEO, 128, 512, torch.bfloat16, {}),
        (VIDEO, 16, 512, torch.float32, {}),
        (AUDIO, 128, 512, torch.bfloat16, {}),
        ((16, 28, 28), 2, 512, torch.bfloat16, {"num_scales": 3, "halve_time": True}),
        ((4, 14, 14), 3, 2048, torch.float32, {"num_scales": 3}),
    ],
    ids=str,
)
def test_kernels_agree_with_float64(on_gpu, case, detach_target):
    check_case(on_gpu, case, detach_target)


@pytest.mark.gpu
def test_kernels_take_the_mean(on_gpu):
    check_mean(on_gpu)


@pytest.mark.gpu
def test_kernels_read_any_memory_layout(on_gpu):
    check_memory(on_gpu)


@pytest.mark.gpu
def test_kernels_clamp_as_torch_does(on_gpu):
    check_extremes(on_gpu)


@pytest.mark.gpu
def test_kernels_keep_what_is_not_finite_in_its_clip(on_gpu):
    check_not_finite(on_gpu)


# What the kernels cost


class _Launches(TorchDispatchMode):
    """Counts torch's operations that would be a launch on a GPU: all but views and allocations."""

    FREE = ("detach", "empty", "view", "unsqueeze", "squeeze", "permute", "transpose", "slice", "select", "expand",
            "alias", "_unsafe_view", "empty_like", "new_empty", "empty_strided")  # fmt: skip

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        name = func.overloadpacket.__name__
        if name not in self.FREE:
            self.names.append(name)
        return func(*args, **(kwargs or {}))


def launches(modalities: list[Result], options: dict[str, Any], impl: str = "fused") -> list[str]:
    """Names of all that runs, forward and backward of each modality."""
    from triton.runtime.interpreter import GridExecutor

    config = AttentionConfig(**options)
    interpret = GridExecutor.__call__
    with _Launches() as counted:

        def count(self: GridExecutor, *args: Any, **kwargs: Any) -> None:
            counted.names.append(self.fn.__name__)
            with _disable_current_modes():  # the interpreter's own use of torch
                interpret(self, *args, **kwargs)

        GridExecutor.__call__ = count
        try:
            for inputs in modalities:
                leaves = [inputs[name].requires_grad_() for name in NAMES]
                loss = consistency_loss(*leaves, config, impl=impl)
                wanted = leaves[2:] if config.detach_target else leaves
                torch.autograd.grad(loss, wanted, inputs["grad"])
        finally:
            GridExecutor.__call__ = interpret
    return counted.names


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_both_modalities_are_six_launches_where_the_target_is_held_fixed(interpreter, dtype):
    modalities = [draw(VIDEO, 2, 8, dtype), draw(AUDIO, 2, 8, dtype)]
    assert interpreter(launches, modalities, {}) == ["_correlate", "_compare", "_saliency_gradient"] * 2
    through = interpreter(launches, modalities, {"detach_target": False})
    assert through[:5] == ["_correlate", "_compare", "_saliency_gradient", "_row_gradients", "_map_gradients"]
    assert through[5:] == through[:5]  # and nothing else
    # The count sees torch's operations: a copy where memory is not channels-last, and all of the reference's.
    modalities[0]["transformed"] = modalities[0]["transformed"].contiguous()
    assert len(interpreter(launches, modalities, {})) == 7
    assert len(interpreter(launches, modalities, {}, impl="reference")) > 60


@pytest.mark.gpu
def test_both_modalities_are_six_launches_on_the_gpu():
    inputs = [draw(size, 16, 512, torch.bfloat16) for size in (VIDEO, AUDIO)]
    inputs = [{name: value.cuda() for name, value in modality.items()} for modality in inputs]

    def step() -> None:
        for modality in inputs:
            leaves = [modality[name].requires_grad_() for name in NAMES]
            loss = consistency_loss(*leaves, AttentionConfig(), impl="fused")
            torch.autograd.grad(loss, leaves[2:], modality["grad"])

    step()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step()
        torch.cuda.synchronize()
    kernels = [
        event.name for event in profile.events() if event.device_type == torch.profiler.DeviceType.CUDA
    ]
    assert len(kernels) == 6, kernels


# What the kernels take of a GPU

KERNELS = ("_correlate", "_compare", "_saliency_gradient", "_row_gradients", "_map_gradients")
POINTERS = {torch.float32: "*fp32", torch.bfloat16: "*bf16"}


class _Launch(NamedTuple):
    kernel: Any
    signature: dict[str, str]
    constants: dict[str, Any]


class _Recorder:
    """In the place of a kernel: keeps what it would be launched with."""

    def __init__(self, kernel: Any, launched: dict[str, _Launch]) -> None:
        self.kernel, self.launched = kernel, launched

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def record(*args: Any, **constants: Any) -> None:
            types = [
                POINTERS[a.dtype] if isinstance(a, Tensor) else {int: "i32", float: "fp32"}[type(a)]
                for a in args
            ]
            launch = _Launch(self.kernel, dict(zip(self.kernel.arg_names, types)), constants)
            self.launched[self.kernel.__name__] = launch

        return record


@pytest.mark.parametrize(
    ("size", "dtype", "num_scales"),
    [
        (VIDEO, torch.bfloat16, 2),
        (VIDEO, torch.float32, 2),
        (AUDIO, torch.bfloat16, 2),
        (AUDIO, torch.float32, 2),
        (VIDEO, torch.bfloat16, 3),
    ],
    ids=str,
)
def test_kernels_fit_gpus_at_the_papers_shapes(compile_for_gpu, monkeypatch, size, dtype, num_scales):
    from cmac.kernels import consistency_triton

    launched: dict[str, _Launch] = {}
    for name in KERNELS:
        monkeypatch.setattr(consistency_triton, name, _Recorder(getattr(consistency_triton, name), launched))
    inputs = draw(size, 2, 512, dtype)
    leaves = [inputs[name].requires_grad_() for name in NAMES]
    config = AttentionConfig(detach_target=False, num_scales=num_scales)
    loss = consistency_triton.fused_attention_consistency(*leaves, config)
    loss.backward(inputs["grad"])  # of memory that nobody wrote
    monkeypatch.undo()
    assert tuple(launched) == KERNELS
    for architecture in (80, 86, 90):
        for name, (kernel, signature, constants) in launched.items():
            num_warps = constants["num_warps"]
            constants = {key: value for key, value in constants.items() if key != "num_warps"}
            compiled = compile_for_gpu(kernel, signature, constants, architecture, num_warps)
            print(f"sm_{architecture} {name}: {compiled}")
            assert compiled.spilled_bytes == 0, (name, architecture)
            assert compiled.shared_bytes <= 16 * 1024, (name, architecture)
