"""Clips per second of the whole training step: torchvision's network as it comes, ours, and ours without each part.

    python benchmarks/train_step.py [--batch 16 64 128] [--rounds 5] [--steps 5] [--only NAMES] [--limit SECONDS]

A step is `cmac.step.TrainingStep`: momentum update, both query encoders forward and backward, both key encoders,
Eqs. (3)-(8), SGD, queues. Its clips lie in device memory as uint8 (synthetic: coarse patterns and noise), the queues
are full.

`stock` is what one has without this repository: R(2+1)D-18 and ResNet-9 under bf16 autocast, NCDHW memory, torch's
foreach SGD and a for loop for the momentum update as in MoCo's code. Its network is `ComputeConfig(convolutions=
"conv3d", batch_norm="reference", losses="reference")`: modules, operations and numbers are torchvision's
(tests/test_cmac_encoders.py compares them), so torchvision need not be installed. It gets its frames in NCDHW memory.
The other contenders say what they have; `ours` is what `ComputeConfig()` chooses, which without a GPU is plain torch.

All models stay on the device; contenders take turns, round after round: memory is given back, one step is not timed,
`--steps` are. What each needs is its own model and the most it allocated in a turn. The CUDA graph keeps its memory, so
it takes part up to a batch of 16. Before anything is timed, the first step of each, from the same weights and clips,
is compared with plain torch in float32: its losses, and the direction of all its gradients together. A contender that
differs by more than rounding is marked WRONG, is never the fastest and makes the exit status 1; one that fails leaves a
row that says why. All have batch norm over the whole batch (model.batch_norm "local") but those named shuffle, which
have groups of 16 and a reference of their own.

The ratio to stock is taken in each round. The roofline is that of `benchmarks/roofline.py` with the ceilings that are
measured first. cuDNN tries its algorithms (`torch.backends.cudnn.benchmark`) for all contenders alike.
"""

import argparse
import contextlib
import dataclasses
import json
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import Tensor  # noqa: E402

from benchmarks.common import append_row, make_row, peak_memory_bytes, quantiles  # noqa: E402
from benchmarks.roofline import Costs, step_costs  # noqa: E402
from benchmarks.stock import ForLoopMomentumUpdate  # noqa: E402
from benchmarks.timing import (  # noqa: E402
    attempt,
    clean_up,
    finite,
    is_lost,
    measure_ceiling,
    milliseconds,
    print_ceiling,
    ratios,
    restart_without,
    synchronize,
)
from cmac.collectives import KeyShuffle  # noqa: E402
from cmac.compute import ComputeConfig  # noqa: E402
from cmac.encoders import AudioEncoderConfig, VideoEncoderConfig  # noqa: E402
from cmac.losses import LossConfig  # noqa: E402
from cmac.model import CMAC, ModelConfig, StepOutput  # noqa: E402
from cmac.norm import BatchNorm2d, BatchNorm3d, is_channels_last  # noqa: E402
from cmac.optim import OptimizerConfig  # noqa: E402
from cmac.step import TrainingStep  # noqa: E402

LEARNING_RATE = 1e-4
"""Small: a hundred steps on the same clips must not lead anywhere."""
GROUP = 16
"""Clips that share statistics with batch norm "shuffle"."""
LARGEST_GRAPH_BATCH = 16
COMPILE_SECONDS = 60.0
"""To expect of torch.compile before it has been seen."""
LOSSES = ("loss", "contrastive", "consistency")
EXACT = (1e-4, 0.999)
"""Of a first step in float32: largest relative difference of each loss, smallest cosine of all gradients together."""
ROUNDED = (2e-2, 0.3)
"""The same in bfloat16, or 3 times the difference and 0.1 less than the cosine that plain torch has there, if that is
more: before training, clips have nearly the same embeddings, and rounding turns gradients far."""
TARGETS = {
    "rate": 300.0,
    "stock": 1.5,
    "best stock": 1.15,
    "bytes": 95e9,
    "checkpointing bytes": 40e9,
    "checkpointing time": 1.18,
}


@dataclass(frozen=True)
class Contender:
    """A way to compute the step."""

    name: str
    compute: ComputeConfig
    is_stock: bool = False
    """Momentum update and optimizer as one writes them without us."""
    channels_last: bool = True
    batch_norm: str = "local"
    backend: str = "torch"
    plain: bool = True
    """The same work as stock, within the same memory: not checkpointing, not shuffle."""

    def config(self) -> dict[str, Any]:
        """For the row."""
        fields = dataclasses.asdict(self)
        return {**fields, "compute": dataclasses.asdict(self.compute)}


def build_contenders() -> list[Contender]:
    """In the order of the table."""
    reference = {"batch_norm": "reference", "losses": "reference"}
    stock = {"convolutions": "conv3d", **reference}

    def ours(name: str, **compute: Any) -> Contender:
        return Contender(name, ComputeConfig(**compute))

    return [
        Contender("stock", ComputeConfig(**stock), True, False),
        Contender("stock, channels-last", ComputeConfig(**stock), True),
        Contender("stock, channels-last, compile", ComputeConfig(**stock, compile=True), True),
        ours("ours, reference", **reference),
        ours("ours"),
        ours("ours, conv3d", convolutions="conv3d"),
        ours("ours, reference batch norm", batch_norm="reference"),
        ours("ours, reference losses", losses="reference"),
        ours("ours, padded", pad_channels=True),
        ours("ours, compile", compile=True),
        dataclasses.replace(ours("ours, checkpointing", activation_checkpointing="early"), plain=False),
        dataclasses.replace(ours("ours, apex"), backend="apex"),
        ours("ours, CUDA graph", cuda_graph=True),
        dataclasses.replace(ours("shuffle"), batch_norm="shuffle", plain=False),
        dataclasses.replace(ours("shuffle, reference", **reference), batch_norm="shuffle", plain=False),
    ]


@dataclass(frozen=True)
class Size:
    """Shapes of model and clips."""

    model: ModelConfig
    frames: tuple[int, int, int, int]
    """(C, T, H, W)."""
    log_mel: tuple[int, int, int]
    """(1, F, S)."""


SIZES = {
    "paper": Size(ModelConfig(), (3, 32, 128, 128), (1, 257, 101)),
    "small": Size(
        ModelConfig(
            video=VideoEncoderConfig(widths=(8, 16), blocks=(1, 1), stem_width=6),
            audio=AudioEncoderConfig(widths=(8, 16), blocks=(1, 1)),
            filter_channels=16,
            embedding_dim=16,
            queue_length=64,
        ),
        (3, 4, 16, 16),
        (1, 33, 21),
    ),
}


class Clips:
    """A batch on the device, frames in both memory layouts."""

    def __init__(self, size: Size, num_clips: int, device: torch.device) -> None:
        generator = torch.Generator(device).manual_seed(num_clips)

        def draw(*shape: int) -> Tensor:
            return torch.rand(shape, device=device, generator=generator)

        channels, num_frames, height, width = size.frames
        # Each clip has a coarse pattern of its own: of noise alone all clips would look alike to the network.
        coarse = draw(num_clips, channels, *(max(1, n // 16) for n in (4 * num_frames, height, width)))
        frames = F.interpolate(coarse, size.frames[1:], mode="trilinear")
        frames = frames.mul_(200).add_(draw(num_clips, *size.frames), alpha=55).to(torch.uint8)
        self.contiguous = frames
        self.channels_last = frames.contiguous(memory_format=torch.channels_last_3d)
        coarse = draw(num_clips, 1, *(max(1, n // 16) for n in size.log_mel[1:]))
        log_mel = F.interpolate(coarse, size.log_mel[1:], mode="bilinear")
        self.log_mel = (log_mel - 0.5) * 3 + draw(num_clips, *size.log_mel)
        self.video_ids = torch.arange(num_clips, device=device)
        self.valid = torch.ones(num_clips, dtype=torch.bool, device=device)

    def __len__(self) -> int:
        return len(self.valid)

    def nbytes(self) -> int:
        """Of what a step is given: one layout."""
        return sum(t.nbytes for t in (self.contiguous, self.log_mel, self.video_ids, self.valid))


def initial_state(size: Size, device: torch.device) -> dict[str, Tensor]:
    """Weights and full queues that all contenders start from."""
    torch.manual_seed(0)
    with device:
        model = CMAC(size.model)
    generator = torch.Generator(device).manual_seed(1)
    for queue in (model.queue_v, model.queue_a):
        keys = torch.randn(queue.keys.shape, device=device, generator=generator)
        queue.keys.copy_(F.normalize(keys, dim=1))
        queue.video_ids.copy_(torch.arange(len(keys), device=device) + 10_000_000)
    return model.state_dict()


class Trial:
    """A contender's model on the device, and its steps."""

    def __init__(
        self,
        contender: Contender,
        size: Size,
        state: dict[str, Tensor],
        clips: Clips,
        device: torch.device,
        precision: str,
    ) -> None:
        config = dataclasses.replace(
            size.model, batch_norm=contender.batch_norm, batch_norm_group=min(GROUP, max(1, len(clips) // 2))
        )
        with device:
            model = CMAC(config, LossConfig(), compute=contender.compute)
        model.load_state_dict(state)
        optimizer = OptimizerConfig(backend=contender.backend)
        self.step = TrainingStep(
            model, optimizer, device=device, precision=precision, channels_last=contender.channels_last
        )
        if contender.is_stock:
            self._use_stock_updates(model, optimizer)
        self._frames = clips.channels_last if contender.channels_last else clips.contiguous
        self._clips, self._num_steps = clips, 0

    def _use_stock_updates(self, model: CMAC, config: OptimizerConfig) -> None:
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.step.optimizer = torch.optim.SGD(
            parameters,
            lr=config.learning_rate,
            momentum=config.momentum,
            weight_decay=config.weight_decay,
            foreach=True,
        )
        self.step.momentum_update = ForLoopMomentumUpdate(*model.momentum_pairs(), model.config.momentum)

    def run(self) -> StepOutput:
        """One step."""
        self._num_steps += 1
        return self.step(
            self._frames,
            self._clips.log_mel,
            self._clips.video_ids,
            self._clips.valid,
            learning_rate=LEARNING_RATE,
            shuffle_seed=self._num_steps,
        )

    def gradients(self) -> list[Tensor]:
        """Of the first step, with weight decay: what SGD's momentum holds after it."""
        optimizer = self.step.optimizer
        return [optimizer.state[p]["momentum_buffer"] for g in optimizer.param_groups for p in g["params"]]

    def nbytes(self) -> int:
        """Of what outlives a step: weights, queues, optimizer state, clips."""
        model, states = self.step.model, self.step.optimizer.state.values()
        tensors = [*model.parameters(), *model.buffers()]
        tensors += [value for state in states for value in state.values() if isinstance(value, Tensor)]
        return sum(tensor.nbytes for tensor in tensors) + self._clips.nbytes()


@dataclass
class First:
    """What a first step gives."""

    losses: dict[str, float]
    gradients: list[Tensor] | None
    tolerance: tuple[float, float] = EXACT
    """Relative difference and cosine that others may have from it."""


@dataclass
class Result:
    """What is known of a contender at a batch size."""

    contender: Contender
    status: str = "timed"
    """Or `wrong` (timed all the same), `failed`, `left out`."""
    reason: str | None = None
    first_seconds: float | None = None
    """Building and the first two steps, with all that is compiled or tried out."""
    losses: dict[str, float] | None = None
    differences: dict[str, float] | None = None
    """Of the first step's losses from float32, relative."""
    cosine: float | None = None
    """Between its gradients and float32's."""
    reference_norms: dict[str, int] = field(default_factory=dict)
    """Batch norms that could not take the kernel, by reason."""
    step_seconds: float | None = None
    """Of the second step: an estimate for planning."""
    seconds: dict[int, float] = field(default_factory=dict)
    """Of a step, by round."""
    peak_bytes: int | None = None
    reserved_bytes: int | None = None
    ratio: dict[str, float] | None = None

    def rates(self, num_clips: int) -> list[float]:
        """Clips per second of each round."""
        return [num_clips / seconds for seconds in self.seconds.values()]

    def summary(self, num_clips: int, roofline: dict[str, float]) -> dict[str, Any]:
        """For the row and the last line."""
        rate = quantiles(self.rates(num_clips)) if self.seconds else None
        summary = {
            "status": self.status,
            "reason": self.reason,
            "clips_per_second": rate,
            "step_milliseconds": milliseconds(list(self.seconds.values())),
            "fraction_of_roofline": rate["median"] / roofline["fused"] if rate else None,
            "ratio_to_stock": self.ratio,
            "peak_gpu_memory_bytes": self.peak_bytes,
            "reserved_gpu_memory_bytes": self.reserved_bytes,
            "first_batch_seconds": self.first_seconds,
            "first_step": self.losses,
            "first_step_relative_difference": self.differences,
            "gradient_cosine": self.cosine,
            "reference_batch_norms": self.reference_norms,
        }
        return finite(summary)


# Comparing the first step


@contextlib.contextmanager
def exact_float32() -> Iterator[None]:
    """Inside, float32 products are float32 products."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=False, allow_tf32=False):
            yield
    finally:
        torch.set_float32_matmul_precision(before)


def reference_step(
    size: Size, state: dict[str, Tensor], clips: Clips, device: torch.device, batch_norm: str
) -> First:
    """The first step in float32 and plain torch; without gradients where they do not fit into memory.

    On CUDA, where contenders round, with what rounding costs plain torch.
    """
    # Checkpointing leaves room for float32.
    plain = ComputeConfig(batch_norm="reference", losses="reference", activation_checkpointing="early")
    contender = Contender("plain torch", plain, batch_norm=batch_norm)

    def step(precision: str) -> First:
        trial = Trial(contender, size, state, clips, device, precision)
        losses = read_losses(trial.run())
        return First(losses, trial.gradients())

    def forward() -> First:
        trial = Trial(contender, size, state, clips, device, "fp32")
        inputs = clips.channels_last, clips.log_mel, clips.video_ids, clips.valid
        count = trial.step.model.num_shuffles()
        shuffles = tuple(KeyShuffle.draw(len(clips), 1, device) for _ in range(count))
        with torch.no_grad():
            return First(read_losses(trial.step.forward(*inputs, shuffles)), None)

    with exact_float32():
        first, reason = attempt(lambda: step("fp32"), device)
        if first is None:
            print(f"  float32 reference without gradients: {reason}")
            first = forward()
    if device.type == "cuda":
        first.tolerance = ROUNDED
        clean_up(device)
        rounded, reason = attempt(lambda: step("bf16"), device)
        if rounded is None:
            print(f"  no plain torch in bfloat16 to tell rounding from errors: {reason}")
        else:
            differences, angle = differences_from(rounded.losses, rounded.gradients, first)
            relative = max(ROUNDED[0], 3 * max(differences.values()))
            smallest = ROUNDED[1] if angle is None else max(ROUNDED[1], angle - 0.1)
            first.tolerance = relative, smallest
            print(
                f"  plain torch in bfloat16, batch norm {batch_norm!r}: {max(differences.values()):.1e} from float32, "
                f"gradients' cosine {angle}"
            )
            del rounded
    clean_up(device)
    return first


def read_losses(output: StepOutput) -> dict[str, float]:
    """The parts of Eq. (8); waits for the device."""
    return {name: float(getattr(output, name).detach()) for name in LOSSES}


@torch.no_grad()
def cosine(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> float:
    """Between all gradients of one model and another's."""
    dots = torch.stack(
        [
            torch.stack([(a * b).sum(dtype=torch.float64), a.double().norm() ** 2, b.double().norm() ** 2])
            for a, b in zip(ours, theirs, strict=True)
        ]
    ).sum(0)
    return float(dots[0] / (dots[1] * dots[2]).sqrt())


def differences_from(
    losses: dict[str, float], gradients: list[Tensor], reference: First
) -> tuple[dict[str, float], float | None]:
    """Relative difference of each loss, and the cosine of all gradients, if the reference has any."""
    differences = {name: abs(losses[name] - value) / abs(value) for name, value in reference.losses.items()}
    angle = None if reference.gradients is None else cosine(gradients, reference.gradients)
    return differences, angle


def compare(result: Result, losses: dict[str, float], gradients: list[Tensor], reference: First) -> None:
    """Fill in how a first step differs from the reference, and that it is wrong if that is more than rounding."""
    relative, smallest = reference.tolerance
    result.losses = losses
    result.differences, result.cosine = differences_from(losses, gradients, reference)
    problems = [
        f"first {name} is {losses[name]:.6g}, float32's {reference.losses[name]:.6g}: {difference:.1e} apart, "
        f"expected at most {relative:.2g}"
        for name, difference in result.differences.items()
        if not difference <= relative  # not a number is wrong, too
    ]
    if result.cosine is not None and not result.cosine >= smallest:
        problems.append(
            f"gradients of the first step have cosine {result.cosine:.4f} with float32's, expected {smallest:.3g}"
        )
    if problems:
        result.status, result.reason = "wrong", "; ".join(problems)


@contextlib.contextmanager
def watch_norms(trial: Trial, result: Result) -> Iterator[None]:
    """Inside, count the batch norms that fall back to plain torch, and why."""
    compute = trial.step.compute
    if not trial._frames.is_cuda or compute.batch_norm_impl() == "reference":
        yield
        return
    seen: dict[torch.nn.Module, str] = {}

    def look(module: torch.nn.Module, arguments: tuple) -> None:
        if not is_channels_last(arguments[0]):
            seen[module] = "not channels-last"

    norms = [m for m in trial.step.model.modules() if isinstance(m, (BatchNorm2d, BatchNorm3d))]
    hooks = [norm.register_forward_pre_hook(look) for norm in norms]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        result.reference_norms = dict(Counter(seen.values()))


# Taking turns


def prepare(
    result: Result,
    size: Size,
    state: dict[str, Tensor],
    clips: Clips,
    device: torch.device,
    reference: First,
) -> Trial:
    """Build, take two steps (a CUDA graph: more), compare the first."""
    began = time.perf_counter()
    precision = "bf16" if device.type == "cuda" else "fp32"
    trial = Trial(result.contender, size, state, clips, device, precision)
    with watch_norms(trial, result):
        losses = read_losses(trial.run())
    compare(result, losses, trial.gradients(), reference)
    if result.contender.compute.cuda_graph:  # runs as it is at first, then is captured
        for _ in range(4):
            trial.run()
    synchronize(device)
    started = time.perf_counter()
    trial.run()
    synchronize(device)
    result.step_seconds = time.perf_counter() - started
    result.first_seconds = time.perf_counter() - began
    return trial


def take_turn(trial: Trial, result: Result, device: torch.device, steps: int) -> float:
    """Seconds of a step; keeps the most memory it takes."""
    clean_up(device)
    before, reserved = 0, 0
    if device.type == "cuda":
        before, reserved = torch.cuda.memory_allocated(device), torch.cuda.memory_reserved(device)
        torch.cuda.reset_peak_memory_stats(device)
    trial.run()
    synchronize(device)
    began = time.perf_counter()
    for _ in range(steps):
        trial.run()
    synchronize(device)
    seconds = (time.perf_counter() - began) / steps
    if device.type == "cuda":
        own = trial.nbytes()
        peak = torch.cuda.max_memory_allocated(device) - before + own
        most = torch.cuda.max_memory_reserved(device) - reserved + own
        result.peak_bytes = max(peak, result.peak_bytes or 0)
        result.reserved_bytes = max(most, result.reserved_bytes or 0)
    return seconds


def measure(
    contenders: Sequence[Contender],
    size: Size,
    num_clips: int,
    device: torch.device,
    args: argparse.Namespace,
    lost: dict[str, str],
    deadline: float,
) -> list[Result]:
    """All contenders at one batch size."""
    clips, state = Clips(size, num_clips, device), initial_state(size, device)
    references: dict[str, First] = {}
    results = [Result(contender) for contender in contenders]
    trials: dict[str, Trial] = {}
    expected = {True: COMPILE_SECONDS, False: 0.0}  # seconds to get ready, with and without torch.compile
    # What takes longest to get ready comes last, in case time runs out.
    for result in sorted(results, key=lambda r: (r.contender.compute.compile, not r.contender.plain)):
        name, compiles = result.contender.name, result.contender.compute.compile
        round_seconds = sum(r.step_seconds * (args.steps + 1) for r in results if r.contender.name in trials)
        if name in lost:
            result.status, result.reason = "failed", lost[name]
        elif result.contender.compute.cuda_graph and num_clips > LARGEST_GRAPH_BATCH:
            result.status, result.reason = "left out", f"for batches of at most {LARGEST_GRAPH_BATCH}"
        elif time.monotonic() + 2 * round_seconds + expected[compiles] > deadline:
            result.status, result.reason = "left out", "no time left (--limit)"
        if result.status != "timed":
            continue
        batch_norm = result.contender.batch_norm
        if batch_norm not in references:
            references[batch_norm] = reference_step(size, state, clips, device, batch_norm)
        arguments = result, size, state, clips, device, references[batch_norm]
        clean_up(device)
        trial, reason = attempt(lambda a=arguments: prepare(*a), device)
        if reason is not None:
            fail(result, reason, device, args)
            continue
        trials[name] = trial
        expected[compiles] = result.first_seconds
        difference = max(result.differences.values())
        angle = "" if result.cosine is None else f", gradients' cosine {result.cosine:.4f}"
        print(
            f"  {name}: ready in {result.first_seconds:.1f} s; first loss {result.losses['loss']:.5g}, "
            f"{difference:.1e} from float32{angle}",
            flush=True,
        )
        if result.status == "wrong":
            print(f"  {name}: WRONG: {result.reason}", flush=True)
        for why, count in result.reference_norms.items():
            print(f"  {name}: {count} batch norms in plain torch: {why}")
    references.clear()
    began = time.monotonic()
    for round_ in range(args.rounds):
        round_seconds = sum(r.step_seconds * (args.steps + 1) for r in results if r.contender.name in trials)
        if round_ > 0 and time.monotonic() + round_seconds > deadline:
            print(f"  {round_} of {args.rounds} rounds: no time left (--limit)")
            break
        for result in results:
            trial = trials.get(result.contender.name)
            spent = sum(result.seconds.values()) * (args.steps + 1)
            if trial is None or (result.seconds and spent > args.seconds):
                continue
            turn = trial, result, device, args.steps
            seconds, reason = attempt(lambda t=turn: take_turn(*t), device)
            if reason is None:
                result.seconds[round_] = seconds
            else:
                del trials[result.contender.name]
                del trial, turn
                fail(result, reason, device, args)
    print(f"  timed in {time.monotonic() - began:.0f} s", flush=True)
    stock = results[0].seconds if results[0].contender.name == "stock" else {}
    for result in results:
        both = sorted(result.seconds.keys() & stock.keys())
        result.ratio = ratios([result.seconds[n] for n in both], [stock[n] for n in both])
    return results


def fail(result: Result, reason: str, device: torch.device, args: argparse.Namespace) -> None:
    """Note a failure; start anew without the contender if it has taken the device along."""
    result.status, result.reason = "failed", reason
    result.seconds.clear()
    name = result.contender.name
    print(f"  {name}: failed: {reason}", flush=True)
    if is_lost(device):
        restart_without(name, reason, args.arguments)


# Reporting


def report(results: list[Result], num_clips: int, roofline: dict[str, float]) -> None:
    """The table of one batch size."""
    rounds = max(len(result.seconds) for result in results)
    print(
        f"\nbatch {num_clips}: clips/s, median of {rounds} rounds (20 to 80 %); roofline "
        f"{roofline['eager']:.0f} eager, {roofline['fused']:.0f} with batch norm fused\n"
        f"{'':32s}{'clips/s':>9s}{'':>18s}{'ms':>9s}{'peak GB':>9s}{'of roofline':>13s}{'x stock':>9s}"
    )
    for result in results:
        name = f"{result.contender.name:32s}"
        if not result.seconds:
            print(f"{name}{'no round' if result.status == 'timed' else result.status}: {result.reason}")
            continue
        summary = result.summary(num_clips, roofline)
        rate = summary["clips_per_second"]
        spread = f"({rate['p20']:.1f} to {rate['p80']:.1f})"
        memory = f"{result.peak_bytes / 1e9:9.1f}" if result.peak_bytes is not None else f"{'-':>9s}"
        ratio = f"{'-':>9s}"
        if result.ratio:
            ratio = f"{result.ratio['median']:9.2f}  ({result.ratio['p20']:.2f} to {result.ratio['p80']:.2f})"
        print(
            f"{name}{rate['median']:9.1f}{spread:>18s}{summary['step_milliseconds']['median']:9.1f}{memory}"
            f"{summary['fraction_of_roofline']:13.3f}{ratio}{'  WRONG' if result.status == 'wrong' else ''}"
        )
    fastest = fastest_of(results, stock=False)
    if fastest:
        default = ComputeConfig()
        flags = {
            name: value
            for name, value in dataclasses.asdict(fastest.contender.compute).items()
            if value != getattr(default, name)
        }
        said = ", ".join(f"{name} {value}" for name, value in flags.items()) or "those of ComputeConfig()"
        print(f"fastest flags at batch {num_clips}: {said} ({fastest.contender.name})", flush=True)


def fastest_of(results: list[Result], stock: bool) -> Result | None:
    """Of stock's contenders, or of ours that do the same work; None if none was timed."""
    right = [r for r in results if r.seconds and r.status == "timed" and r.contender.plain]
    timed = [r for r in right if r.contender.is_stock == stock]
    return min(timed, key=lambda r: quantiles(list(r.seconds.values()))["median"], default=None)


def compare_with_targets(by_batch: dict[int, list[Result]]) -> list[dict[str, Any]]:
    """Claims with what was measured (None where nothing was) and whether it is enough."""
    claims = []

    def claim(text: str, value: float | None, target: float, at_most: bool = False) -> None:
        met = None if value is None else value <= target if at_most else value >= target
        claims.append({"claim": text, "value": value, "target": target, "at_most": at_most, "met": met})

    def median_ratio(ours: Result | None, theirs: Result | None) -> float | None:
        if ours is None or theirs is None:
            return None
        both = sorted(ours.seconds.keys() & theirs.seconds.keys())
        ratio = ratios([ours.seconds[n] for n in both], [theirs.seconds[n] for n in both])
        return None if ratio is None else ratio["median"]

    for num_clips, results in by_batch.items():
        if num_clips < 64:
            continue
        named = {result.contender.name: result for result in results}
        ours, best_stock = fastest_of(results, stock=False), fastest_of(results, stock=True)
        at = f"batch {num_clips}"
        rate = None if ours is None else quantiles(ours.rates(num_clips))["median"]
        claim(f"{at}: clips/s of ours", rate, TARGETS["rate"])
        claim(f"{at}: x stock", median_ratio(ours, named.get("stock")), TARGETS["stock"])
        claim(f"{at}: x best stock", median_ratio(ours, best_stock), TARGETS["best stock"])
        if num_clips != 128:
            continue
        claim(f"{at}: bytes of ours", ours and ours.peak_bytes, TARGETS["bytes"], at_most=True)
        kept, twice = named.get("ours"), named.get("ours, checkpointing")
        claim(
            f"{at}: bytes with checkpointing",
            twice and twice.peak_bytes,
            TARGETS["checkpointing bytes"],
            at_most=True,
        )
        claim(
            f"{at}: time with checkpointing / without",
            median_ratio(kept, twice),
            TARGETS["checkpointing time"],
            at_most=True,
        )
    return claims


def choose(only: Sequence[str] | None, without: Sequence[str] = ()) -> list[Contender]:
    """Contenders of these names, or that hold one of these texts (all if there are none), but for those `without`.

    Raises:
        ValueError: a text is in no name, or nobody is left.
    """
    everyone = build_contenders()

    def named(texts: Sequence[str]) -> set[str]:
        picked = set()
        for text in texts:
            exact = [c.name for c in everyone if c.name == text]
            found = exact or [c.name for c in everyone if text in c.name]
            if not found:
                known = "; ".join(c.name for c in everyone)
                raise ValueError(f"{text!r} is part of no contender's name, expected one of: {known}")
            picked.update(found)
        return picked

    names = (named(only) if only else {c.name for c in everyone}) - named(without)
    if not names:
        raise ValueError(f"--only {only} and --without {without} leave no contender")
    return [c for c in everyone if c.name in names]


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Options; `arguments` are those to start again with."""
    parser = argparse.ArgumentParser(
        prog="train_step benchmark",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--size", choices=tuple(SIZES), help="default: paper on CUDA, else small")
    parser.add_argument("--batch", type=int, nargs="+", help="default: 128 64 16, small: 8")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=5, help="timed in a turn")
    parser.add_argument(
        "--only", nargs="+", metavar="NAME", help="contenders of this name, or that hold this text"
    )
    parser.add_argument("--without", nargs="+", metavar="NAME", default=[], help="likewise: not these")
    parser.add_argument(
        "--seconds", type=float, default=60.0, help="of timing per contender and batch size, about"
    )
    parser.add_argument("--limit", type=float, default=float("inf"), help="seconds for everything, about")
    parser.add_argument(
        "--append", action=argparse.BooleanOptionalAction, default=True, help="append result rows"
    )
    parser.add_argument("--results", type=Path, help="folder of the rows")
    parser.add_argument("--note", help="goes into the rows, for example what else the machine was doing")
    parser.add_argument("--lost", action="append", default=[], help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    args.arguments = list(sys.argv[1:] if argv is None else argv)
    args.size = args.size or ("paper" if args.device.startswith("cuda") else "small")
    args.batch = args.batch or ([128, 64, 16] if args.size == "paper" else [8])
    for name in ("rounds", "steps"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} is {getattr(args, name)}, expected at least 1")
    if min(args.batch) < 2:
        parser.error(f"--batch is {args.batch}, expected at least 2: batch norm needs more than one clip")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; returns the exit status: 1 if a contender computes something else."""
    args = parse(argv)
    try:
        contenders = choose(args.only, args.without)
    except ValueError as error:
        print(error)
        return 2
    began = time.monotonic()
    device, size = torch.device(args.device), SIZES[args.size]
    lost = dict(each.split("=", 1) for each in args.lost)
    ceiling = measure_ceiling(device, quick=args.size == "small")
    print_ceiling(ceiling)
    costs = step_costs(size.model, size.frames, size.log_mel)
    element_bytes = 2 if device.type == "cuda" else 4
    rooflines = {n: rooflines_of(costs, ceiling, n, element_bytes) for n in args.batch}
    print(
        f"a step has {costs.flops() / 1e9:.4g} GFLOP and moves {costs.traffic(False, element_bytes) / 1e9:.4g} GB "
        f"per clip, {costs.traffic(True, element_bytes) / 1e9:.4g} with batch norm fused"
    )
    for num_clips, roofline in rooflines.items():
        print(
            f"roofline at batch {num_clips}: {roofline['eager']:.0f} clips/s eager, {roofline['fused']:.0f} fused"
        )
    if device.type != "cuda":
        print(f"there are no kernels on {device.type}: ours is ours, reference here")
    torch.backends.cudnn.benchmark = device.type == "cuda"
    by_batch: dict[int, list[Result]] = {}
    for index, num_clips in enumerate(args.batch):
        now = time.monotonic()
        deadline = now + (began + args.limit - now) / (len(args.batch) - index)
        print(f"\nbatch {num_clips}:", flush=True)
        torch.compiler.reset()
        results = measure(contenders, size, num_clips, device, args, lost, deadline)
        clean_up(device)
        report(results, num_clips, rooflines[num_clips])
        by_batch[num_clips] = results
        for result in results:
            row = make_row(
                "train_step",
                f"batch {num_clips}: {result.contender.name}",
                {
                    "batch": num_clips,
                    "size": args.size,
                    "device": str(device),
                    "precision": "bf16" if device.type == "cuda" else "fp32",
                    "cudnn_benchmark": True,
                    **result.contender.config(),
                },
                repeats=len(result.seconds),
                seconds=sum(result.seconds.values()) * args.steps,
                steps=args.steps,
                peak_memory_bytes=peak_memory_bytes(),
                ceiling={**ceiling, "roofline": rooflines[num_clips]},
                note=args.note,
                **result.summary(num_clips, rooflines[num_clips]),
            )
            if args.append:
                append_row(row, *([args.results] if args.results else []))
    print()
    on_gpu = args.size == "paper" and device.type == "cuda"
    claims = compare_with_targets(by_batch) if on_gpu else []
    for each in claims:
        value = "not measured" if each["value"] is None else f"{each['value']:.4g}"
        verdict = {True: "met", False: "MISSED", None: "-"}[each["met"]]
        sign = "<=" if each["at_most"] else ">="
        print(f"{each['claim']}: {value} (target {sign} {each['target']:g}): {verdict}")
    wrong = [
        f"batch {n}: {r.contender.name}: {r.reason}"
        for n, rs in by_batch.items()
        for r in rs
        if r.status == "wrong"
    ]
    for each in wrong:
        print(f"WRONG RESULT: {each}")
    print(
        json.dumps(
            {
                "benchmark": "train_step",
                "device": str(device),
                "size": args.size,
                "ceiling": ceiling,
                "roofline": rooflines,
                "results": {
                    n: {r.contender.name: r.summary(n, rooflines[n]) for r in results}
                    for n, results in by_batch.items()
                },
                "fastest": {
                    n: fastest.contender.name
                    for n, results in by_batch.items()
                    if (fastest := fastest_of(results, stock=False))
                },
                "targets": claims,
                "wrong": wrong,
                "seconds": time.monotonic() - began,
            }
        )
    )
    return 1 if wrong else 0


def rooflines_of(
    costs: Costs, ceiling: dict[str, Any], num_clips: int, element_bytes: int
) -> dict[str, float]:
    """Clips per second, `eager` and `fused`."""
    return {
        name: costs.clips_per_second(ceiling, fused=fused, num_clips=num_clips, element_bytes=element_bytes)
        for name, fused in (("eager", False), ("fused", True))
    }


if __name__ == "__main__":
    sys.exit(main())
