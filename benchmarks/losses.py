"""What Eq. (7), Eqs. (4)-(6), batch norm and the optimizer cost by themselves, and what else could compute them.

    python benchmarks/losses.py [--size paper|small] [--only InfoNCE 1024x65536] [--rounds 20] [--limit SECONDS]

- InfoNCE: Eq. (7), both directions (2 N queries) against both banks of K keys of 256 dimensions, forward and
  backward: our reference (`eager`), torch.compile of it, torch's flash attention (`SDPA`: see `benchmarks/stock.py`; it
  leaves no key out), the kernel (`fused`).
- consistency: Eqs. (4)-(6) of both modalities, forward and backward; with launches.
- batch norm: relu(bn(x) + shortcut) at the encoder's largest shapes, forward and backward, with effective GB/s: the
  bytes that a fused operator has to move (forward reads x twice and writes once; backward reads x and the gradient
  twice and writes once; a shortcut adds one read forward, the saved output twice and one write backward) per second
  of each contender, beside the measured copy bandwidth.
- optimizer: SGD and the momentum update of the whole model's parameters.

Each contender's results and gradients are first compared with float64 (of some rows or channels where all would not
fit); one that differs is marked WRONG and makes the exit status 1. One that fails, out of memory for example, leaves a
row that says why. Times are medians over rounds that run every contender in turn, between CUDA events (`wall`: from an
idle device, launches included). Runs without a GPU, where kernels run only with TRITON_INTERPRET=1.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from benchmarks.common import append_row, make_row, peak_memory_bytes, quantiles  # noqa: E402
from benchmarks.stock import ForLoopMomentumUpdate, SdpaContrastiveLoss  # noqa: E402
from benchmarks.timing import (  # noqa: E402
    Stage,
    WrongResult,
    attempt,
    check_close,
    clean_up,
    count_launches,
    is_lost,
    measure_ceiling,
    milliseconds,
    peak_extra_bytes,
    print_ceiling,
    ratios,
    restart_without,
    run_stages,
    time_interleaved,
)
from cmac.attention import AttentionConfig  # noqa: E402
from cmac.consistency import consistency_loss, consistency_loss_reference  # noqa: E402
from cmac.losses import Negatives, contrastive_loss, contrastive_loss_reference  # noqa: E402
from cmac.model import CMAC, ModelConfig  # noqa: E402
from cmac.norm import BatchNorm3d  # noqa: E402
from cmac.optim import OptimizerConfig, build_momentum_update, build_optimizer  # noqa: E402

WARM_UP = 3
TEMPERATURE = 0.07
EXACT_ROWS = 64
"""Queries whose results are compared with float64."""
EXACT_CHANNELS = 8
"""Channels of a batch norm that are."""
TARGET_INFO_NCE, TARGET_INFO_NCE_BYTES = 5.0, 1.2e9
TARGET_CONSISTENCY, TARGET_LAUNCHES = 4.0, 6


@dataclass
class Case:
    """A contender made ready."""

    stages: Sequence[Stage]
    """What is timed, part by part."""
    results: Callable[[], dict[str, Tensor]]
    """Runs it once and names what is to be compared."""


@dataclass
class Problem:
    """What several contenders compute."""

    kind: str
    """`InfoNCE`, `consistency`, `batch norm` or `optimizer`."""
    size: str
    config: dict[str, Any]
    contenders: dict[str, Callable[[], Case]]
    """How to make each ready."""
    check: Callable[[dict[str, Tensor]], dict[str, float]]
    """Largest relative differences from float64; raises WrongResult."""
    stage_names: tuple[str, ...] = ("forward", "backward")
    stage_bytes: tuple[int, ...] | None = None
    """That a fused operator has to move."""
    inputs_bytes: int = 0
    """Of what outlives a step: the banks."""
    count: bool = False
    """Count launches."""
    baseline: str = "eager"
    """Whose time is divided by the others'."""

    @property
    def name(self) -> str:
        """Kind and size."""
        return f"{self.kind} {self.size}"

    def release(self) -> None:
        """Forget the tensors; what is left is for the report."""
        self.contenders, self.check = {}, lambda results: {}


@dataclass
class Result:
    """What is known of a contender of a problem."""

    name: str
    status: str = "timed"
    """Or `wrong` (timed all the same), `failed`, `left out`."""
    reason: str | None = None
    errors: dict[str, float] | None = None
    peak_bytes: int | None = None
    launches: int | None = None
    times: list[dict[str, Any]] = field(default_factory=list)
    ratio: dict[str, float] | None = None
    ratio_wall: dict[str, float] | None = None

    def of(self, key: str) -> list[float]:
        """`device` or `wall` seconds of each round."""
        return [each[key] for each in self.times]

    def summary(self, problem: Problem) -> dict[str, Any]:
        """For the last line and the row."""
        stages, rates = None, None
        if self.times:
            per_stage = list(zip(*(each["stages"] for each in self.times)))
            stages = {name: milliseconds(seconds) for name, seconds in zip(problem.stage_names, per_stage)}
            if problem.stage_bytes:
                rates = {
                    name: quantiles([count / seconds for seconds in each])
                    for name, count, each in zip(problem.stage_names, problem.stage_bytes, per_stage)
                }
        return {
            "status": self.status,
            "reason": self.reason,
            "milliseconds": milliseconds(self.of("device")),
            "milliseconds_wall": milliseconds(self.of("wall")),
            "milliseconds_of_stages": stages,
            "effective_bytes_per_second": rates,
            "ratio_to": problem.baseline,
            "ratio": self.ratio,
            "ratio_wall": self.ratio_wall,
            "extra_gpu_memory_bytes": self.peak_bytes,
            "launches": self.launches,
            "relative_errors": self.errors,
        }


# The problems


def info_nce(num_clips: int, num_keys: int, dim: int, dtype: torch.dtype, device: torch.device) -> Problem:
    """Eq. (7) of 2 * num_clips queries against two banks."""
    generator = torch.Generator(device).manual_seed(0)

    def unit(*shape: int) -> Tensor:
        return F.normalize(torch.randn(*shape, device=device, generator=generator), dim=1)

    rows = 2 * num_clips
    key = unit(rows, dim)
    query = F.normalize(0.5 * key + unit(rows, dim), dim=1).requires_grad_()
    ids = torch.arange(num_clips, device=device).repeat(2)
    banks = [
        Negatives(
            unit(num_keys, dim).to(dtype), torch.arange(num_keys, device=device) + num_clips
        )  # all negatives
        for _ in range(2)
    ]
    grad = torch.ones(rows, device=device)

    def case(loss: Callable[[], Tensor]) -> Case:
        stages: tuple[Stage, ...] = (
            lambda _: loss(),
            lambda value: (value.detach(), torch.autograd.grad(value, query, grad)[0]),
        )
        return Case(stages, lambda: dict(zip(("loss", "gradient"), run_stages(stages))))

    def by(run: Callable[..., Any], *options: str) -> Callable[[], Tensor]:
        return lambda: run(query, key, ids, banks, TEMPERATURE, *options).loss

    def compiled() -> Case:
        return case(by(torch.compile(contrastive_loss_reference, dynamic=False, fullgraph=True)))

    picked = torch.arange(0, rows, max(1, rows // EXACT_ROWS), device=device)

    def check(results: dict[str, Tensor]) -> dict[str, float]:
        exact = query.detach()[picked].double().requires_grad_()
        wide = [Negatives(bank.keys.double(), bank.video_ids) for bank in banks]
        loss = contrastive_loss_reference(exact, key[picked].double(), ids[picked], wide, TEMPERATURE).loss
        (gradient,) = torch.autograd.grad(loss.sum(), exact)
        # Kernels round queries and softmax weights to the banks' bfloat16.
        relative = (
            {"loss": 1e-5, "gradient": 1e-3} if dtype == torch.float32 else {"loss": 5e-3, "gradient": 3e-2}
        )
        expected = {"loss": loss.detach(), "gradient": gradient}
        return {
            name: check_close(name, results[name][picked], value, relative[name])
            for name, value in expected.items()
        }

    return Problem(
        "InfoNCE",
        f"{num_clips}x{num_keys} {str(dtype).removeprefix('torch.')}",
        {"num_clips": num_clips, "num_keys": num_keys, "dim": dim, "dtype": str(dtype), "banks": 2},
        {
            "eager": lambda: case(by(contrastive_loss_reference)),
            "torch.compile": compiled,
            "SDPA": lambda: case(lambda: SdpaContrastiveLoss.apply(query, key, banks, TEMPERATURE)),
            "fused": lambda: case(by(contrastive_loss, "fused")),
        },
        check,
        inputs_bytes=sum(bank.keys.nbytes + bank.video_ids.nbytes for bank in banks),
    )


def consistency(
    num_clips: int, channels: int, sizes: Sequence[tuple[int, ...]], dtype: torch.dtype, device: torch.device
) -> Problem:
    """Eqs. (4)-(6) of both modalities, the target held fixed."""
    generator = torch.Generator(device).manual_seed(0)
    config = AttentionConfig()

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device, generator=generator)

    inputs = []
    for size in sizes:
        transformed = draw(num_clips, *size, channels).to(dtype).movedim(-1, 1)
        saliency = draw(num_clips, 1, *size).to(dtype).requires_grad_()
        inputs.append((transformed, draw(num_clips, channels), saliency))
    leaves = [each[2] for each in inputs]
    grads = [torch.ones(num_clips, device=device) for _ in inputs]

    def case(loss: Callable[..., Tensor], *options: str) -> Case:
        stages: tuple[Stage, ...] = (
            lambda _: [loss(*each, config, "sum", *options) for each in inputs],
            lambda values: (values, torch.autograd.grad(values, leaves, grads)),
        )

        def results() -> dict[str, Tensor]:
            values, gradients = run_stages(stages)
            losses = {f"loss {n}": value.detach() for n, value in enumerate(values)}
            return losses | {f"gradient {n}": value for n, value in enumerate(gradients)}

        return Case(stages, results)

    def check(results: dict[str, Tensor]) -> dict[str, float]:
        errors = {}
        for n, (transformed, other_filter, saliency) in enumerate(inputs):
            exact = saliency.detach().double().requires_grad_()
            arguments = transformed.double(), other_filter.double(), exact
            loss = _consistency_in_float64(*arguments, config)
            (gradient,) = torch.autograd.grad(loss.sum(), exact)
            errors[f"loss {n}"] = check_close(f"loss {n}", results[f"loss {n}"], loss.detach(), 1e-4)
            relative = 1e-4 if dtype == torch.float32 else 2**-7
            errors[f"gradient {n}"] = check_close(
                f"gradient {n}", results[f"gradient {n}"], gradient, relative
            )
        return errors

    def compiled() -> Case:
        return case(torch.compile(consistency_loss_reference, dynamic=False, fullgraph=True))

    return Problem(
        "consistency",
        f"{num_clips} clips",
        {"num_clips": num_clips, "channels": channels, "sizes": list(map(list, sizes)), "dtype": str(dtype)},
        {
            "eager": lambda: case(consistency_loss_reference),
            "torch.compile": compiled,
            "fused": lambda: case(consistency_loss, "fused"),
        },
        check,
        count=True,
    )


def _consistency_in_float64(
    transformed: Tensor, other_filter: Tensor, saliency: Tensor, config: AttentionConfig
) -> Tensor:
    """The reference, which ends in float32, with that end in float64."""
    from cmac.attention import guided_attention, predicted_attention

    guided = guided_attention(transformed, other_filter, config).detach()
    return (guided - predicted_attention(saliency)).square().flatten(1).sum(dim=1)


def batch_norm(
    name: str,
    shape: tuple[int, ...],
    with_shortcut: bool,
    dtype: torch.dtype,
    device: torch.device,
) -> Problem:
    """relu(bn(x) + shortcut) in training. shape: (N, T, H, W, C)."""
    generator = torch.Generator(device).manual_seed(0)
    channels = shape[-1]

    def draw(dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(shape, device=device, generator=generator, dtype=dtype).movedim(-1, 1)

    x, grad = draw().requires_grad_(), draw()
    shortcut = draw().requires_grad_() if with_shortcut else None
    weight = torch.rand(channels, device=device, generator=generator).add_(0.5).requires_grad_()
    bias = torch.randn(channels, device=device, generator=generator).mul_(0.1).requires_grad_()
    leaves = {"x": x, "weight": weight, "bias": bias}
    if with_shortcut:
        leaves["shortcut"] = shortcut
    statistics = torch.zeros(channels, device=device), torch.ones(channels, device=device)

    def eager(x: Tensor, shortcut: Tensor | None, weight: Tensor, bias: Tensor) -> Tensor:
        out = F.batch_norm(x, *statistics, weight, bias, True, 0.1, 1e-5)
        if shortcut is not None:
            out = out + shortcut
        return F.relu(out, inplace=True)

    def case(run: Callable[..., Tensor]) -> Case:
        stages: tuple[Stage, ...] = (
            lambda _: run(x, shortcut, weight, bias),
            lambda out: (out.detach(), torch.autograd.grad(out, list(leaves.values()), grad)),
        )

        def results() -> dict[str, Tensor]:
            out, gradients = run_stages(stages)
            return {"output": out, **{f"gradient of {n}": g for n, g in zip(leaves, gradients)}}

        return Case(stages, results)

    def fused() -> Case:
        norm = BatchNorm3d(channels, impl="fused").to(device)
        norm.weight, norm.bias = nn.Parameter(weight.detach()), nn.Parameter(bias.detach())
        of_norm = {"weight": norm.weight, "bias": norm.bias}
        stages: tuple[Stage, ...] = (
            lambda _: norm(x, shortcut, True),
            lambda out: (
                out.detach(),
                torch.autograd.grad(out, [of_norm.get(n, leaf) for n, leaf in leaves.items()], grad),
            ),
        )

        def results() -> dict[str, Tensor]:
            out, gradients = run_stages(stages)
            return {"output": out, **{f"gradient of {n}": g for n, g in zip(leaves, gradients)}}

        return Case(stages, results)

    picked = torch.arange(0, channels, max(1, channels // EXACT_CHANNELS), device=device)

    def check(results: dict[str, Tensor]) -> dict[str, float]:
        def cut(tensor: Tensor) -> Tensor:  # to the picked channels: each is normalized by itself
            return tensor.detach().index_select(0 if tensor.dim() == 1 else 1, picked)

        exact = {n: cut(leaf).double().requires_grad_() for n, leaf in leaves.items()}
        out = F.batch_norm(exact["x"], None, None, exact["weight"], exact["bias"], True, 0.1, 1e-5)
        out = F.relu(out + exact["shortcut"] if with_shortcut else out)
        gradients = torch.autograd.grad(out, list(exact.values()), cut(grad).double())
        expected = {"output": out.detach(), **{f"gradient of {n}": g for n, g in zip(exact, gradients)}}
        # By the root mean square: a value that rounds to the other side of 0 has another gradient altogether.
        limit = 1e-4 if dtype == torch.float32 else 1e-2
        return {
            n: check_close(n, cut(results[n]), value, limit, mean_square=True)
            for n, value in expected.items()
        }

    size = x.nbytes
    return Problem(
        "batch norm",
        name,
        {"shape": list(x.shape), "shortcut": with_shortcut, "dtype": str(dtype), "memory": "channels-last"},
        {
            "eager": lambda: case(eager),
            "torch.compile": lambda: case(torch.compile(eager, dynamic=False, fullgraph=True)),
            "fused": fused,
        },
        check,
        stage_bytes=(size * (4 if with_shortcut else 3), size * (8 if with_shortcut else 5)),
        count=True,
    )


def optimizer(config: ModelConfig, device: torch.device) -> Problem:
    """SGD over all trained parameters and the momentum update of the keys."""
    with torch.device("meta"):
        model = CMAC(config)
        shapes = [parameter.shape for parameter in model.parameters() if parameter.requires_grad]
        key_shapes = [key.shape for key in model.momentum_pairs()[1]]
    generator = torch.Generator(device).manual_seed(0)
    start = [torch.randn(shape, device=device, generator=generator) for shape in shapes]
    gradients = [torch.randn(shape, device=device, generator=generator) for shape in shapes]
    pairs = []  # index of the parameter that each key follows: the first of its shape that is free
    free = list(range(len(shapes)))
    for shape in key_shapes:
        pairs.append(next(index for index in free if shapes[index] == shape))
        free.remove(pairs[-1])
    settings = OptimizerConfig()
    momentum, rate = config.momentum, settings.learning_rate
    common = {"lr": rate, "momentum": settings.momentum, "weight_decay": settings.weight_decay}

    def case(build: Callable[[list[nn.Parameter], list[Tensor], list[Tensor]], tuple[Any, Any]]) -> Case:
        parameters = [nn.Parameter(tensor.clone()) for tensor in start]
        for parameter, gradient in zip(parameters, gradients):
            parameter.grad = gradient
        queries = [parameters[index].detach() for index in pairs]
        keys = [torch.zeros_like(query) for query in queries]
        sgd, update = build(parameters, queries, keys)

        def step(_: None) -> None:
            sgd.step()
            update.step()

        def results() -> dict[str, Tensor]:
            step(None)
            step(None)
            return {
                "parameters": torch.cat([p.detach().flatten() for p in parameters]),
                "keys": torch.cat([key.flatten() for key in keys]),
            }

        return Case((step,), results)

    def check(results: dict[str, Tensor]) -> dict[str, float]:
        parameters = torch.cat([tensor.flatten() for tensor in start]).double()
        gradient = torch.cat([tensor.flatten() for tensor in gradients]).double()
        buffer, kept = torch.zeros_like(parameters), []
        for _ in range(2):
            buffer = settings.momentum * buffer + gradient + settings.weight_decay * parameters
            parameters = parameters - rate * buffer
            kept.append(parameters)
        parts = [step.split([shape.numel() for shape in shapes]) for step in kept]
        first, second = (torch.cat([part[index] for index in pairs]) for part in parts)
        keys = momentum * (1 - momentum) * first + (1 - momentum) * second
        return {
            "parameters": check_close("parameters", results["parameters"], parameters, 1e-6),
            "keys": check_close("keys", results["keys"], keys, 1e-4),
        }

    def loop(parameters: list[nn.Parameter], queries: list[Tensor], keys: list[Tensor]) -> tuple[Any, Any]:
        return (
            torch.optim.SGD(parameters, foreach=False, **common),
            ForLoopMomentumUpdate(queries, keys, momentum),
        )

    def foreach(parameters: list[nn.Parameter], queries: list[Tensor], keys: list[Tensor]) -> tuple[Any, Any]:
        return torch.optim.SGD(parameters, foreach=True, **common), build_momentum_update(
            queries, keys, momentum, "torch"
        )

    def by(backend: str) -> Callable[..., tuple[Any, Any]]:
        def build(
            parameters: list[nn.Parameter], queries: list[Tensor], keys: list[Tensor]
        ) -> tuple[Any, Any]:
            return (
                build_optimizer(parameters, OptimizerConfig(backend=backend)),
                build_momentum_update(queries, keys, momentum, backend),
            )

        return build

    count = sum(shape.numel() for shape in shapes)
    key_count = sum(shape.numel() for shape in key_shapes)
    return Problem(
        "optimizer",
        f"{count / 1e6:.1f} M parameters",
        {"num_parameters": count, "num_tensors": len(shapes), "num_key_parameters": key_count},
        {
            "for loop": lambda: case(loop),
            "torch foreach": lambda: case(foreach),
            "ours: torch": lambda: case(by("torch")),
            "ours: apex": lambda: case(by("apex")),
        },
        check,
        stage_names=("step",),
        baseline="for loop",
        stage_bytes=(4 * (5 * count + 3 * key_count),),
        count=True,
    )


def build_problems(size: str, device: torch.device, num_clips: int) -> dict[str, Callable[[], Problem]]:
    """Makers of all problems of a size, by name; small ones are for CPUs."""
    bf16, fp32 = torch.bfloat16, torch.float32
    problems: dict[str, Callable[[], Problem]] = {}
    if size == "paper":
        model, channels, maps, dtype = ModelConfig(), 512, ((4, 8, 8), (9, 4)), bf16
        dim, banks, clips = 256, ((128, 15_000), (1024, 65_536), (1024, 2**20)), (16, 128)
        norms = {
            "stem 45": ((32, 64, 64, 45), False),
            "layer1 mid 144": ((32, 64, 64, 144), False),
            "layer1 out 64 + shortcut": ((32, 64, 64, 64), True),
        }
    else:
        model, channels, maps, dtype = small_model(), 16, ((2, 4, 4), (5, 3)), fp32
        dim, banks, clips = 32, ((8, 150), (16, 512)), (2, 4)
        norms = {"7": ((4, 8, 8, 7), False), "16 + shortcut": ((4, 8, 8, 16), True)}

    def add(name: str, build: Callable[..., Problem], *arguments: Any) -> None:
        problems[name] = lambda: build(*arguments, device)

    def add_info_nce(bank_dtype: torch.dtype) -> None:
        for count, num_keys in banks:
            name = f"InfoNCE {count}x{num_keys} {str(bank_dtype).removeprefix('torch.')}"
            add(name, info_nce, count, num_keys, dim, bank_dtype)

    # In the order of what is to be known first, in case time runs out.
    add_info_nce(bf16)
    for count in clips:
        add(f"consistency {count} clips", consistency, count, channels, maps, dtype)
    for name, (shape, with_shortcut) in norms.items():
        add(f"batch norm {name}", batch_norm, name, (num_clips, *shape), with_shortcut, dtype)
    add("optimizer", optimizer, model)
    add_info_nce(fp32)
    return problems


def small_model() -> ModelConfig:
    """A model for tests."""
    from cmac.encoders import AudioEncoderConfig, VideoEncoderConfig

    return ModelConfig(
        video=VideoEncoderConfig(widths=(8, 16), blocks=(1, 1), stem_width=7),
        audio=AudioEncoderConfig(widths=(8, 16), blocks=(1, 1)),
        filter_channels=16,
        embedding_dim=16,
        queue_length=64,
    )


# Running them


def measure(
    problem: Problem, device: torch.device, args: argparse.Namespace, lost: dict[str, str], deadline: float
) -> list[Result]:
    """Check, count and time all contenders of a problem."""
    results = {name: Result(name) for name in problem.contenders}
    cases: dict[str, Case] = {}
    torch.compiler.reset()  # or each size would count as one more recompilation of the same function
    for name, build in problem.contenders.items():
        result, label = results[name], f"{problem.kind}: {name}"
        if label in lost:
            result.status, result.reason = "failed", lost[label]
            continue
        if time.monotonic() > deadline:
            result.status, result.reason = "left out", "no time left (--limit)"
            continue

        def prepare(build: Callable[[], Case] = build, result: Result = result) -> Case:
            case = build()
            try:
                result.errors = problem.check(case.results())
            except WrongResult as error:  # timed all the same
                result.status, result.reason = "wrong", str(error)
            result.peak_bytes = peak_extra_bytes(lambda: run_stages(case.stages), device)
            return case

        case, reason = attempt(prepare, device)
        if reason is not None:
            result.status, result.reason = "failed", reason
            if is_lost(device):
                restart_without(label, reason, args.arguments)
            continue
        cases[name] = case
        if problem.count and (name != "torch.compile" or device.type == "cuda"):
            result.launches = attempt(
                lambda c=case: count_launches(lambda: run_stages(c.stages), device), device
            )[0]
    times, failed = time_interleaved(
        {name: case.stages for name, case in cases.items()},
        device,
        rounds=args.rounds,
        warm_up=WARM_UP,
        max_seconds=args.seconds,
    )
    for name, reason in failed.items():
        results[name].status, results[name].reason = "failed", reason
        if is_lost(device):
            restart_without(f"{problem.kind}: {name}", reason, args.arguments)
    for name, result in results.items():
        result.times = [] if name in failed else times.get(name, [])
    first = results.get(problem.baseline, Result(problem.baseline))
    for result in results.values():
        result.ratio = ratios(result.of("device"), first.of("device"))
        result.ratio_wall = ratios(result.of("wall"), first.of("wall"))
    return list(results.values())


def report(problem: Problem, results: list[Result]) -> None:
    """The table of a problem."""
    stages = "".join(f"{name:>10s}" for name in problem.stage_names)
    rates = (
        "".join(f"{name[:8] + ' GB/s':>14s}" for name in problem.stage_names) if problem.stage_bytes else ""
    )
    print(
        f"\n{problem.name}: ms, median of {max(len(each.times) for each in results)} rounds (20 to 80 %)\n"
        f"{'':16s}{'ms':>10s}{'':>20s}{stages}{'wall':>10s}{'speed-up':>9s}{'wall':>8s}{'extra MB':>10s}"
        f"{'launches':>10s}{rates}"
    )
    for result in results:
        if not result.times:
            print(f"{result.name:16s}{result.status}: {result.reason}")
            continue
        summary = result.summary(problem)
        device = summary["milliseconds"]
        spread = f"({device['p20']:.3f} to {device['p80']:.3f})"
        line = f"{result.name:16s}{device['median']:10.3f}{spread:>20s}"
        line += "".join(f"{each['median']:10.3f}" for each in summary["milliseconds_of_stages"].values())
        line += f"{summary['milliseconds_wall']['median']:10.3f}"
        for ratio in (result.ratio, result.ratio_wall):
            width = 9 if ratio is result.ratio else 8
            line += f"{ratio['median']:{width}.2f}" if ratio else f"{'-':>{width}s}"
        line += f"{result.peak_bytes / 1e6:10.1f}" if result.peak_bytes is not None else f"{'-':>10s}"
        line += f"{result.launches:10d}" if result.launches is not None else f"{'-':>10s}"
        if summary["effective_bytes_per_second"]:
            line += "".join(
                f"{r['median'] / 1e9:14.1f}" for r in summary["effective_bytes_per_second"].values()
            )
        print(line + ("  WRONG" if result.status == "wrong" else ""), flush=True)


def compare_with_targets(problems: list[tuple[Problem, list[Result]]]) -> list[dict[str, Any]]:
    """Claims with what was measured (None where nothing was) and whether it is enough."""
    claims = []

    def claim(text: str, value: float | None, target: float, at_most: bool = False) -> None:
        met = None if value is None else value <= target if at_most else value >= target
        claims.append({"claim": text, "value": value, "target": target, "at_most": at_most, "met": met})

    for problem, results in problems:
        by_name = {result.name: result for result in results}
        fused = by_name.get("fused", Result("fused"))
        if problem.kind == "InfoNCE":
            large = problem.config["num_keys"]
            if problem.config["num_clips"] == 1024 and large == 65_536:
                claim(f"{problem.name}: x eager", _median(fused.ratio), TARGET_INFO_NCE)
            if large == 2**20 and problem.config["dtype"] == "torch.bfloat16":
                used = None if fused.peak_bytes is None else fused.peak_bytes + problem.inputs_bytes
                claim(f"{problem.name}: bytes, banks included", used, TARGET_INFO_NCE_BYTES, at_most=True)
        if problem.kind == "consistency":
            claim(f"{problem.name}: x eager, queued", _median(fused.ratio), TARGET_CONSISTENCY)
            claim(
                f"{problem.name}: x eager, launches included", _median(fused.ratio_wall), TARGET_CONSISTENCY
            )
            claim(f"{problem.name}: launches", fused.launches, TARGET_LAUNCHES, at_most=True)
    return claims


def _median(ratio: dict[str, float] | None) -> float | None:
    return None if ratio is None else ratio["median"]


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Options; `arguments` are those to start again with."""
    parser = argparse.ArgumentParser(
        prog="losses benchmark", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--size", choices=("paper", "small"), help="default: paper on CUDA, else small")
    parser.add_argument("--only", nargs="+", metavar="TEXT", help="problems whose names hold one of these")
    parser.add_argument("--contenders", nargs="+", metavar="NAME", help="only these of each problem")
    parser.add_argument("--num-clips", type=int, help="of the batch norms (default: 64, small: 2)")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=3.0, help="of timing per problem, about")
    parser.add_argument(
        "--limit", type=float, default=float("inf"), help="seconds, after which nothing new begins"
    )
    parser.add_argument(
        "--append", action=argparse.BooleanOptionalAction, default=True, help="append result rows"
    )
    parser.add_argument("--results", type=Path, help="folder of the rows")
    parser.add_argument("--note", help="goes into the rows, for example what else the machine was doing")
    parser.add_argument("--lost", action="append", default=[], help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    args.arguments = list(sys.argv[1:] if argv is None else argv)
    args.size = args.size or ("paper" if args.device.startswith("cuda") else "small")
    args.num_clips = args.num_clips or (64 if args.size == "paper" else 2)
    if args.rounds < 1:
        parser.error(f"--rounds is {args.rounds}, expected at least 1")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; returns the exit status: 1 if a contender computes something else."""
    args = parse(argv)
    began = time.monotonic()
    deadline = began + args.limit
    device = torch.device(args.device)
    lost = dict(each.split("=", 1) for each in args.lost)
    makers = build_problems(args.size, device, args.num_clips)
    names = list(makers)
    if args.only:
        makers = {name: make for name, make in makers.items() if any(text in name for text in args.only)}
    if not makers:
        print(f"--only {args.only} is part of no name; there are {', '.join(names)}")
        return 2
    ceiling = measure_ceiling(device, quick=args.size == "small")
    print_ceiling(ceiling)
    done: list[tuple[Problem, list[Result]]] = []
    summaries: dict[str, Any] = {}
    for name, make in makers.items():
        if time.monotonic() > deadline:
            print(f"\n{name}: left out, no time left (--limit)")
            summaries[name] = {"status": "left out", "reason": "no time left (--limit)"}
            continue
        problem, reason = attempt(make, device)
        if reason is not None:
            print(f"\n{name}: not measured: {reason}")
            summaries[name] = {"status": "failed", "reason": reason}
            continue
        if args.contenders:
            problem.contenders = {n: b for n, b in problem.contenders.items() if n in args.contenders}
            if not problem.contenders:
                continue
        started = time.monotonic()
        results = measure(problem, device, args, lost, deadline)
        report(problem, results)
        done.append((problem, results))
        summaries[name] = {result.name: result.summary(problem) for result in results}
        for result in results:
            row = make_row(
                "losses",
                f"{name}: {result.name}",
                {"kind": problem.kind, "contender": result.name, "device": str(device), **problem.config},
                repeats=len(result.times),
                seconds=time.monotonic() - started,
                peak_memory_bytes=peak_memory_bytes(),
                peak_gpu_memory_bytes=result.peak_bytes,
                ceiling=ceiling,
                note=args.note,
                **result.summary(problem),
            )
            if args.append:
                append_row(row, *([args.results] if args.results else []))
        problem.release()  # its tensors make room for the next one's
        clean_up(device)
    print()
    claims = compare_with_targets(done) if args.size == "paper" and device.type == "cuda" else []
    for each in claims:
        value = "not measured" if each["value"] is None else f"{each['value']:.4g}"
        verdict = {True: "met", False: "MISSED", None: "-"}[each["met"]]
        sign = "<=" if each["at_most"] else ">="
        print(f"{each['claim']}: {value} (target {sign} {each['target']:g}): {verdict}")
    wrong = [f"{p.name}: {r.name}: {r.reason}" for p, results in done for r in results if r.status == "wrong"]
    for each in wrong:
        print(f"WRONG RESULT: {each}")
    print(
        json.dumps(
            {
                "benchmark": "losses",
                "device": str(device),
                "size": args.size,
                "ceiling": ceiling,
                "results": summaries,
                "targets": claims,
                "wrong": wrong,
                "seconds": time.monotonic() - began,
            }
        )
    )
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
