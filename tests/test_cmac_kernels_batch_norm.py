"""The fused batch norm against the reference in float64: output, every gradient, statistics; and that it compiles."""

import contextlib
import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from cmac.norm import BatchNorm2d, BatchNorm3d, hold_statistics

MOMENTUM, EPS = 0.3, 1e-5
TOLERANCE = {torch.float32: 5e-6, torch.bfloat16: 1e-2, torch.float16: 1e-3}
"""Largest error of a value, as a share of the largest value. Of 16-bit dtypes: that of storing it, and a little."""
STATISTICS_TOLERANCE = 5e-6
"""Of float32 sums, whatever the dtype of x: of mean and variance, and of the gradients of weight and bias."""


def case(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    with_shortcut: bool = False,
    relu: bool = False,
    group_size: int | None = None,
    mean: float = 0.5,
) -> dict[str, Any]:
    """What a batch norm takes, and the gradient of its output."""
    generator = torch.Generator().manual_seed(sum(shape))
    channels = shape[1]

    def noise(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator)

    memory_format = torch.channels_last if len(shape) == 4 else torch.channels_last_3d
    spread = 1 + torch.rand(channels, generator=generator)
    x = (noise(*shape).movedim(1, -1) * spread + mean * noise(channels)).movedim(-1, 1)
    x, shortcut, grad = (
        v.to(dtype).contiguous(memory_format=memory_format) for v in (x, noise(*shape), noise(*shape))
    )
    return {
        "x": x,
        "shortcut": shortcut if with_shortcut else None,
        "grad": grad,
        "weight": noise(channels),
        "bias": noise(channels),
        "running_mean": noise(channels),
        "running_var": noise(channels).exp(),
        "relu": relu,
        "group_size": group_size,
    }


def expected(given: dict[str, Any], mask: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
    """The same in float64 by torch. mask: where the ReLU lets through; rounding near 0 may decide either way."""
    x, weight, bias = (given[name].double().requires_grad_() for name in ("x", "weight", "bias"))
    shortcut = None if given["shortcut"] is None else given["shortcut"].double().requires_grad_()
    size = given["group_size"]
    if size is None or x.shape[0] % size:
        size = x.shape[0]
    outs, statistics = [], []
    for group in x.split(size):
        buffers = given["running_mean"].double().clone(), given["running_var"].double().clone()
        outs.append(F.batch_norm(group, *buffers, weight, bias, True, MOMENTUM, EPS))
        statistics.append(torch.stack(buffers))
    out = torch.cat(outs)
    if shortcut is not None:
        out = out + shortcut
    if given["relu"]:
        out = torch.where(out > 0 if mask is None else mask, out, 0)
    out.backward(given["grad"].double())
    running_mean, running_var = torch.stack(statistics).mean(0)
    return {
        "out": out.detach(),
        "dx": x.grad,
        "dweight": weight.grad,
        "dbias": bias.grad,
        "dshortcut": None if shortcut is None else shortcut.grad,
        "running_mean": running_mean,
        "running_var": running_var,
    }


def fused(given: dict[str, Any], device: str = "cpu", **constants: int) -> dict[str, torch.Tensor | None]:
    """The same by the kernels. constants: of their module; smaller tiles, so that small inputs have many."""
    from cmac.kernels import batch_norm_triton

    given = {name: v.to(device) if isinstance(v, torch.Tensor) else v for name, v in given.items()}
    before = {name: getattr(batch_norm_triton, name) for name in constants}
    for name, value in constants.items():
        setattr(batch_norm_triton, name, value)
    batch_norm_triton._view.cache_clear()
    try:
        x, weight, bias = (given[name].clone().requires_grad_() for name in ("x", "weight", "bias"))
        shortcut = None if given["shortcut"] is None else given["shortcut"].clone().requires_grad_()
        running_mean, running_var = given["running_mean"].clone(), given["running_var"].clone()
        num_batches = torch.tensor(6, device=device)
        out = batch_norm_triton.fused_batch_norm(
            x,
            weight,
            bias,
            running_mean,
            running_var,
            shortcut,
            given["relu"],
            MOMENTUM,
            EPS,
            given["group_size"],
            True,
            num_batches,
        )
        assert out.dtype == x.dtype and out.stride() == x.stride()
        out.backward(given["grad"])
        assert num_batches == 7
    finally:
        for name, value in before.items():
            setattr(batch_norm_triton, name, value)
        batch_norm_triton._view.cache_clear()
    assert x.grad.dtype == x.dtype and x.grad.stride() == x.stride()
    return {
        "out": out.detach().cpu(),
        "dx": x.grad.cpu(),
        "dweight": weight.grad.cpu(),
        "dbias": bias.grad.cpu(),
        "dshortcut": None if shortcut is None else shortcut.grad.cpu(),
        "running_mean": running_mean.cpu(),
        "running_var": running_var.cpu(),
    }


def dx_scale(given: dict[str, Any]) -> torch.Tensor:
    size = given["group_size"] or len(given["x"])
    size = len(given["x"]) if len(given["x"]) % size else size
    axes = [0, *range(2, given["x"].dim())]
    variances = [group.var(axes, correction=0) for group in given["x"].double().split(size)]
    return given["grad"].abs().max() * (given["weight"].abs() * (torch.stack(variances) + EPS).rsqrt()).max()


def assert_equal_to_float64(given: dict[str, Any], got: dict[str, torch.Tensor | None]) -> None:
    want = expected(given)
    if given["relu"]:
        mask = got["out"] > 0
        flipped = mask != (want["out"] > 0)
        want = expected(given, mask)
        # Only what is 0 but for rounding may fall on the other side.
        limit = 1e-5 * (1 + want["out"].abs().max())
        exact = expected({**given, "relu": False})["out"]
        assert not flipped.any() or exact[flipped].abs().max() <= limit
    dtype = given["x"].dtype
    for name, value in want.items():
        if value is None:
            assert got[name] is None
            continue
        tolerance = TOLERANCE[dtype] if name in ("out", "dx", "dshortcut") else STATISTICS_TOLERANCE
        scale = value.abs().max().clamp(min=1e-3)
        if name == "dx":  # terms of the size of dy * weight / deviation, that may cancel
            scale = scale.clamp(min=dx_scale(given))
        if name in ("dweight", "dbias"):  # sums that may cancel
            scale = scale.clamp(min=given["grad"].double().abs().sum() / given["x"].shape[1])
        error = (got[name].double() - value).abs().max() / scale
        assert error <= tolerance, f"{name}: {error:.2e} of {scale:.3g}, expected at most {tolerance}"


SMALL_TILES = {
    "REDUCE_TILE": 64,
    "APPLY_TILE": 128,
    "MAX_REDUCE_PROGRAMS": 6,
    "MIN_APPLY_PROGRAMS": 4,
    "MAX_JOIN_ROWS": 4,
}
SHAPES = [
    (2, 1, 1, 1),
    (1, 3, 1, 2),
    (5, 7, 3, 3),
    (4, 45, 2, 3, 3),
    (2, 48, 4, 4),
    (2, 230, 1, 2, 1),
    (4, 64, 2, 4, 3),
]
ENDINGS = list(itertools.product([False, True], [False, True]))


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", SHAPES)
def test_fused_is_the_reference_after_a_shortcut_and_relu(interpreter, shape, dtype):
    given = case(shape, dtype, with_shortcut=True, relu=True)
    assert_equal_to_float64(given, interpreter(fused, given))


@pytest.mark.parametrize("shape", [(2, 1, 3, 5), (5, 7, 3, 3), (4, 45, 1, 3, 3), (2, 48, 3, 4)])
@pytest.mark.parametrize(("with_shortcut", "relu"), ENDINGS)
def test_fused_is_the_reference_over_many_tiles(interpreter, with_shortcut, relu, shape):
    given = case(shape, torch.float32, with_shortcut, relu)
    assert_equal_to_float64(given, interpreter(fused, given, **SMALL_TILES))


@pytest.mark.parametrize(("with_shortcut", "relu"), ENDINGS)
@pytest.mark.parametrize("group_size", [1, 2, 4, 6])
def test_fused_gives_groups_their_own_statistics(interpreter, group_size, with_shortcut, relu):
    given = case((6, 5, 1, 4, 3), torch.float32, with_shortcut, relu, group_size)
    assert_equal_to_float64(given, interpreter(fused, given, **SMALL_TILES))
    if group_size == 2:
        given = case((6, 45, 1, 4, 2), torch.bfloat16, with_shortcut, relu, group_size)
        assert_equal_to_float64(given, interpreter(fused, given, **SMALL_TILES))


def test_a_mean_far_from_zero_costs_no_accuracy(interpreter):
    """E[x^2] - E[x]^2 would have no correct digit here."""
    given = case((6, 3, 4, 4), torch.float32, mean=0)
    given["x"] = given["x"] + 4096
    for constants in ({}, SMALL_TILES):
        got, want = interpreter(fused, given, **constants), expected(given)
        torch.testing.assert_close(got["running_var"].double(), want["running_var"], rtol=1e-4, atol=0)
        torch.testing.assert_close(
            got["out"].double(), want["out"], rtol=0, atol=2e-3
        )  # 4096's last bit is 5e-4


def test_the_same_input_gives_the_same_bits(interpreter):
    given = case((4, 45, 2, 3, 3), torch.bfloat16, True, True, 2)
    first, second = (interpreter(fused, given, **SMALL_TILES) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def options_that_change_nothing_else() -> list[str]:
    """Names of the claims that do not hold."""
    from cmac.kernels.batch_norm_triton import fused_batch_norm

    given = case((4, 6, 3, 3), torch.float32, True, True, 2)
    fixed = (given["running_mean"], given["running_var"])
    before = [v.clone() for v in fixed]
    full = fused(given)
    failed = []

    def run(*needs: str, relu: bool = True, grad: torch.Tensor | None = None, **changed: Any) -> dict:
        tensors = {name: given[name].clone() for name in ("x", "weight", "bias", "shortcut")} | changed
        for name in needs:
            tensors[name].requires_grad_()
        out = fused_batch_norm(
            tensors["x"],
            tensors["weight"],
            tensors["bias"],
            *fixed,
            tensors["shortcut"],
            relu,
            0.1,
            EPS,
            2,
            False,
        )
        if needs:
            out.backward(given["grad"] if grad is None else grad)
        return {"out": out.detach()} | {
            name: tensors[name].grad for name in tensors if tensors[name] is not None
        }

    def check(claim: str, holds: bool) -> None:
        if not holds:
            failed.append(claim)

    key = {"x": "dx", "weight": "dweight", "bias": "dbias", "shortcut": "dshortcut"}
    for needs in ([], ["x"], ["weight"], ["bias"], ["shortcut"], ["x", "shortcut"], ["weight", "shortcut"]):
        got = run(*needs)
        check(f"output with {needs}", torch.equal(got["out"], full["out"]))
        for name in key:
            same = torch.equal(got[name], full[key[name]]) if name in needs else got[name] is None
            check(f"gradient of {name} with {needs}", same)
    check("held statistics", all(map(torch.equal, fixed, before)))
    with torch.no_grad():
        given["x"].requires_grad_()
        check("no graph without grad", not run(x=given["x"])["out"].requires_grad)
        given["x"].requires_grad_(False)
    flat = given["grad"].contiguous()
    check("gradient in other memory", torch.equal(run("x", grad=flat)["x"], full["dx"]))
    shortcut = given["shortcut"].double().contiguous()
    check("shortcut of other dtype and memory", torch.equal(run(shortcut=shortcut)["out"], full["out"]))
    expanded = run("x", "shortcut", relu=False, grad=torch.ones(()).expand(4, 6, 3, 3))
    check("expanded gradient", torch.equal(expanded["shortcut"], torch.ones(4, 6, 3, 3)))
    check("its sum through a batch norm is 0", bool(expanded["x"].abs().max() < 1e-5))
    broken = given["x"].clone()
    broken[0, 0, 0, 0] = torch.nan
    out = run(x=broken, shortcut=None)["out"]
    check(
        "NaN stays",
        bool(out[:2, 0].isnan().all()) and not out[:, 1:].isnan().any() and not out[2:].isnan().any(),
    )
    return failed


def test_what_needs_no_gradient_gets_none_and_the_rest_is_the_same(interpreter):
    assert interpreter(options_that_change_nothing_else) == []


def saved_bytes() -> dict[str, int]:
    """What the graph keeps of one call, weights left out."""
    from cmac.kernels.batch_norm_triton import fused_batch_norm

    sizes = {}
    for name, with_shortcut in (("plain", False), ("shortcut", True)):
        given = case((4, 8, 3, 3), torch.bfloat16, with_shortcut, True, 2)
        kept: list[torch.Tensor] = []
        weights = {given["weight"].data_ptr(), given["bias"].data_ptr()}
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: kept.append(t) or t, lambda t: t):
            fused_batch_norm(
                given["x"].requires_grad_(),
                given["weight"],
                given["bias"],
                None,
                None,
                given["shortcut"],
                True,
                group_size=2,
                update_statistics=False,
            )
        sizes[name] = sum(t.nbytes for t in kept if t.data_ptr() not in weights)
    return sizes


def test_backward_keeps_x_and_after_a_shortcut_the_output(interpreter):
    x, statistics = 4 * 8 * 9 * 2, 2 * 2 * 8 * 4
    assert interpreter(saved_bytes) == {"plain": x + statistics, "shortcut": 2 * x + statistics}


def layers_by_both(group_size: int | None, held: bool) -> dict[str, dict]:
    """Output, gradients and state of a layer, by each implementation."""
    results = {}
    for impl in ("reference", "fused"):
        torch.manual_seed(0)
        for layer, shape in ((BatchNorm2d, (4, 6, 3, 5)), (BatchNorm3d, (4, 6, 2, 3, 5))):
            norm = layer(6, group_size=group_size, impl=impl)
            torch.nn.init.normal_(norm.weight)
            memory_format = torch.channels_last if len(shape) == 4 else torch.channels_last_3d
            x, shortcut = (
                torch.randn(shape).to(memory_format=memory_format).requires_grad_() for _ in range(2)
            )
            with hold_statistics(norm) if held else contextlib.nullcontext():
                out = norm(norm(x, relu=True), shortcut, relu=True)
            (out * torch.randn(shape)).sum().backward()
            results.setdefault(layer.__name__, {})[impl] = {
                "out": out.detach(),
                "x": x.grad,
                "shortcut": shortcut.grad,
                "weight": norm.weight.grad,
                "bias": norm.bias.grad,
                **norm.state_dict(),
            }
    return results


@pytest.mark.parametrize("held", [False, True])
@pytest.mark.parametrize("group_size", [None, 2])
def test_layers_are_the_same_by_both_implementations(interpreter, group_size, held):
    for results in interpreter(layers_by_both, group_size, held).values():
        assert results["fused"]["num_batches_tracked"] == (0 if held else 2)
        for name, want in results["reference"].items():
            torch.testing.assert_close(results["fused"][name], want, rtol=1e-4, atol=1e-4, msg=name)


@pytest.mark.parametrize(
    ("x", "options", "message"),
    [
        (torch.zeros(2, 3, 4, 4), {}, "expected channels-last memory"),
        (torch.zeros(2, 3), {}, "expected channels-last memory"),
        (torch.zeros(2, 1, 4, 4, dtype=torch.float64), {}, "x is torch.float64"),
        (torch.zeros(1, 3, 1, 1), {}, "in 1 groups, expected more than 1 value"),
        (torch.zeros(4, 3, 1, 1), {"group_size": 1}, "in 4 groups, expected more than 1 value"),
    ],
)
def test_what_it_cannot_take_is_refused(x, options, message):
    pytest.importorskip("triton")
    from cmac.kernels.batch_norm_triton import fused_batch_norm

    with pytest.raises(ValueError, match=message):
        fused_batch_norm(x, torch.ones(3), torch.zeros(3), None, None, update_statistics=False, **options)


# Compiled

# (values per channel, C) of the encoders at 16 clips, and what no kernel was made for
PAPER = [
    (16 * 32 * 64 * 64, 45),
    (16 * 32 * 64 * 64, 64),
    (16 * 32 * 64 * 64, 144),
    (16 * 16 * 32 * 32, 230),
    (16 * 4 * 8 * 8, 921),
    (16 * 9 * 4, 512),
    (101, 45),
]


def compiled_kernels(
    compile_for_gpu: Any, rows: int, channels: int, dtype: str, groups: int, architecture: int
) -> dict:
    """What each kernel takes, as the module would launch it."""
    from cmac.kernels import batch_norm_triton as kernels

    view = kernels._view(rows, channels, groups)
    x, sums, sizes = f"*{dtype}", "*fp32", dict.fromkeys(("units", "rows", "splits", "channels"), "i32")
    tile_rows = max(1, kernels.REDUCE_TILE // view.tile_width)
    reduce = {
        "UNIT": view.units[1],
        "TILE_ROWS": tile_rows,
        "TILE_WIDTH": view.tile_width,
        "STEPS": view.steps,
    }
    join = {"FOLD": view.fold, **kernels._join_constants(view, groups)}
    _, apply = kernels._apply_grid(view, groups)
    apply["UNIT"] = view.units[1]
    saved, every = {"COUNTS": kernels.SAVED.value}, {"COUNTS": kernels.ALL.value, "out": None}
    recomputed = {"COUNTS": kernels.RECOMPUTED.value, "out": None}
    launches = {
        "_statistics": [reduce],
        "_join_statistics": [{**join, "TILE_ROWS": tile_rows, "UPDATE": True}],
        "_normalize": [
            {**apply, "RELU": True},
            {**apply, "RELU": True, "shortcut": None},
        ],
        "_gradient_sums": [{**reduce, **saved}, {**reduce, **recomputed, "dshortcut": None}],
        "_join_gradients": [join],
        "_gradients": [{**apply, **every}, {**apply, **saved}, {**apply, **recomputed}],
    }
    types = dict.fromkeys(("x", "grad", "out", "shortcut", "dx", "dshortcut"), x)
    types |= {**sizes, "momentum": "fp32", "eps": "fp32", "num_batches": "*i64"}
    taken = {}
    for name, variants in launches.items():
        kernel = getattr(kernels, name)
        for number, constants in enumerate(variants):
            signature = {a: types.get(a, sums) for a in kernel.arg_names if a not in constants}
            taken[f"{name}/{number}"] = compile_for_gpu(
                kernel, signature, constants, architecture, kernels.NUM_WARPS
            )
    return taken


@pytest.mark.parametrize(
    ("architecture", "dtype", "shapes", "groups"),
    [(90, "bf16", PAPER, 1), (90, "fp32", PAPER[:1], 1), (90, "bf16", PAPER[1:2], 8)]
    + [(80, "bf16", PAPER[:1], 1), (86, "bf16", PAPER[:1], 1)],
)
def test_kernels_compile_for_gpus_without_spills(compile_for_gpu, architecture, dtype, shapes, groups):
    for rows, channels in shapes:
        taken = compiled_kernels(compile_for_gpu, rows // groups, channels, dtype, groups, architecture)
        for name, kernel in taken.items():
            assert kernel.spilled_bytes == 0, (name, rows, channels, kernel)
            assert kernel.shared_bytes <= 16 * 1024, (name, rows, channels, kernel)


@pytest.mark.parametrize(
    ("rows", "channels"),
    [
        *((16 * 32 * 64 * 64, channels) for channels in (45, 48, 64, 144)),
        *((16 * 16 * 32 * 32, channels) for channels in (128, 230, 232, 288)),
        *((16 * 8 * 16 * 16, channels) for channels in (256, 460, 464, 576)),
        *((16 * 4 * 8 * 8, channels) for channels in (512, 921, 928, 1152)),
        *((16 * 65 * 25, 64), (16 * 33 * 13, 128), (16 * 17 * 7, 256), (16 * 9 * 4, 512)),
    ],
)
def test_tiles_fill_the_papers_layers_and_the_partial_sums_are_few(rows, channels):
    pytest.importorskip("triton")
    from cmac.kernels import batch_norm_triton as kernels

    for clips in (1, 8):
        for groups in (1, clips):
            view = kernels._view(rows * clips // groups, channels, groups)
            assert view.aligned and view.fold * view.rows == rows * clips // groups
            assert view.num_blocks * view.tile_width <= 1.07 * view.width
            assert view.splits * view.fold <= 4096
            assert groups * view.reduce_grid <= max(kernels.MAX_REDUCE_PROGRAMS, groups * view.num_blocks)


# On the device


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("with_shortcut", "relu"), ENDINGS)
@pytest.mark.parametrize("shape", [*SHAPES, (16, 144, 4, 16, 16), (8, 921, 2, 4, 4), (16, 64, 65, 25)])
def test_fused_is_the_reference_on_the_device(shape, with_shortcut, relu, dtype):
    for group_size in (None, 8):
        given = case(shape, dtype, with_shortcut, relu, group_size)
        assert_equal_to_float64(given, fused(given, "cuda"))


@pytest.mark.gpu
def test_layers_choose_the_kernels_on_the_device():
    x = torch.randn(4, 45, 2, 3, 3, device="cuda").to(memory_format=torch.channels_last_3d)
    norm = BatchNorm3d(45).cuda()
    assert norm._is_fused(x) and not norm._is_fused(x.contiguous()) and not norm.eval()._is_fused(x)


@pytest.mark.gpu
def test_more_than_2_to_the_31_values_on_the_device():
    if torch.cuda.mem_get_info()[0] < 24e9:
        pytest.skip("needs 24 GB of free memory on the GPU")
    given = case((2, 64, 4, 4), torch.bfloat16)
    shape = (130, 64, 512, 512)
    x = torch.empty(shape, dtype=torch.bfloat16, device="cuda", memory_format=torch.channels_last).normal_()
    weights = [given[name].cuda() for name in ("weight", "bias")]
    from cmac.kernels.batch_norm_triton import fused_batch_norm

    options = {"relu": True, "update_statistics": False}
    results = []
    for part in (x, x[65:]):
        part = part.detach().requires_grad_()
        out = fused_batch_norm(part, *weights, None, None, group_size=65, **options)
        (dx,) = torch.autograd.grad(out, part, part.detach())
        results.append((out[-65:].detach(), dx[-65:]))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-2, atol=1e-2)
