"""Timing contenders beside each other on one device: ceilings, stages, launches, and what a failure leaves behind.

Needs torch alone.
"""

import gc
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from benchmarks.common import quantiles

BUSY_CYCLES = 10_000_000
"""The device counts for about 5 ms before an event-timed call, so that the work is queued when its time begins."""

Stage = Callable[[Any], Any]
"""A part of what is timed; takes what the part before gave (the first one takes None)."""


class WrongResult(Exception):
    """A contender computes something else than the reference."""


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def clean_up(device: torch.device) -> None:
    """Give unused memory back to the device."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def attempt(run: Callable[[], Any], device: torch.device) -> tuple[Any, str | None]:
    """(result, None), or (None, reason) if it raised something. Keeps nothing of what failed.

    Whatever a contender raises is a line of the result, not the end of the benchmark.
    """
    try:
        result = run()
        synchronize(device)
        return result, None
    except Exception as error:
        # The traceback would hold on to the tensors of a contender that ran out of memory.
        reason = describe(error)
    clean_up_after_failure(device)
    return None, reason


def clean_up_after_failure(device: torch.device) -> None:
    """`clean_up` that also works where the device no longer answers."""
    try:
        clean_up(device)
    except Exception:
        gc.collect()


def describe(error: BaseException) -> str:
    """Kind and first line of an error, at most 300 characters."""
    if isinstance(error, torch.OutOfMemoryError):
        return f"out of memory: {str(error).splitlines()[0][:250]}"
    lines = [line for line in str(error).splitlines() if line.strip()] or [""]
    return f"{type(error).__name__}: {lines[0]}"[:300]


def is_lost(device: torch.device) -> bool:
    """Whether the CUDA context no longer works, as after an illegal access of a kernel."""
    if device.type != "cuda":
        return False
    try:
        torch.ones(1, device=device).item()
        torch.cuda.synchronize(device)
    except Exception:
        return True
    return False


def restart_without(name: str, reason: str, arguments: Sequence[str]) -> None:
    """Start this script anew, with `--lost NAME=REASON` added: only a new process gets a new CUDA context."""
    print(f"{name} has broken the CUDA context ({reason}); starting again without it", flush=True)
    lost = f"--lost={name}={reason}"
    os.execv(sys.executable, [sys.executable, sys.argv[0], *arguments, lost])


def check_close(
    name: str, result: Tensor, expected: Tensor, relative: float, *, mean_square: bool = False
) -> float:
    """Largest difference over the largest expected value; with mean_square their root mean squares instead.

    Raises:
        WrongResult: the shape is another, or it is more than `relative`.
    """
    if result.shape != expected.shape:
        raise WrongResult(f"{name} is {tuple(result.shape)}, expected {tuple(expected.shape)}")
    difference, expected = (result.double() - expected.double()).abs(), expected.double().abs()
    if mean_square:
        apart, size = difference.norm().item(), expected.norm().item()
    else:
        apart, size = difference.max().item(), expected.max().item()
    error = apart / size if size else apart
    if not error <= relative:  # not a number is wrong, too
        kind = "root mean square" if mean_square else "largest value"
        raise WrongResult(f"{name} differs by {error:.2e} of its {kind}, expected at most {relative:g}")
    return error


def time_stages(stages: Sequence[Stage], device: torch.device) -> dict[str, Any]:
    """Seconds of each stage of one run: on CUDA between events, the work queued ahead of its time, elsewhere of the
    wall. `device`: their sum; `wall`: of the wall from an idle device, launches included (on CUDA a second run)."""
    if device.type == "cuda":
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(len(stages) + 1)]
        value = None
        torch.cuda.synchronize(device)
        torch.cuda._sleep(BUSY_CYCLES)
        marks[0].record()
        for stage, mark in zip(stages, marks[1:], strict=True):
            value = stage(value)
            mark.record()
        torch.cuda.synchronize(device)
        seconds = [one.elapsed_time(other) / 1000 for one, other in zip(marks, marks[1:])]
        del value
        started = time.perf_counter()
        run_stages(stages)
        torch.cuda.synchronize(device)
        return {"stages": seconds, "device": sum(seconds), "wall": time.perf_counter() - started}
    seconds, value = [], None
    for stage in stages:
        started = time.perf_counter()
        value = stage(value)
        seconds.append(time.perf_counter() - started)
    return {"stages": seconds, "device": sum(seconds), "wall": sum(seconds)}


def run_stages(stages: Sequence[Stage]) -> Any:
    """What the last stage gives."""
    value = None
    for stage in stages:
        value = stage(value)
    return value


def time_interleaved(
    contenders: dict[str, Sequence[Stage]],
    device: torch.device,
    *,
    rounds: int,
    warm_up: int,
    max_seconds: float,
) -> tuple[dict[str, list[dict[str, Any]]], dict[str, str]]:
    """Each contender in turn, round after round: (times of each round of each contender, reasons of those that failed).

    rounds: at most; no further round begins after max_seconds, once there are 3.
    """
    times: dict[str, list[dict[str, Any]]] = {name: [] for name in contenders}
    failed: dict[str, str] = {}
    began = time.perf_counter()
    for round_ in range(warm_up + rounds):
        if round_ >= warm_up + 3 and time.perf_counter() - began > max_seconds:
            break
        for name, stages in contenders.items():
            if name in failed:
                continue
            taken, reason = attempt(lambda s=stages: time_stages(s, device), device)
            if reason is not None:
                failed[name] = reason
            elif round_ >= warm_up:
                times[name].append(taken)
    return times, failed


def ratios(ours: Sequence[float], theirs: Sequence[float]) -> dict[str, float] | None:
    """Median, 20th and 80th percentile of theirs / ours, round by round; None without a round that both have."""
    both = [their / our for our, their in zip(ours, theirs)]
    return quantiles(both) if both else None


def milliseconds(seconds: Sequence[float]) -> dict[str, float] | None:
    """`quantiles` in ms; None of nothing."""
    return quantiles([1000 * value for value in seconds]) if len(seconds) else None


def finite(value: Any) -> Any:
    """value with None for numbers that JSON does not have, as a wrong contender may give."""
    if isinstance(value, dict):
        return {name: finite(part) for name, part in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def peak_extra_bytes(run: Callable[[], Any], device: torch.device) -> int | None:
    """Largest memory of the device that a run allocates beyond what is there before; None off CUDA."""
    if device.type != "cuda":
        run()
        return None
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    run()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def measure_ceiling(device: torch.device, quick: bool = False) -> dict[str, Any]:
    """What the device can do at most: bytes copied per second (read and written, both counted) and FLOP/s of a matrix
    product, bf16 on CUDA and fp32 elsewhere. quick: smaller tensors, for tests."""
    ceiling = _measure_ceiling(device, quick)
    clean_up(device)
    return ceiling


def _measure_ceiling(device: torch.device, quick: bool) -> dict[str, Any]:
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    side = 8192 if device.type == "cuda" else 512 if quick else 2048
    count = 2**30 if device.type == "cuda" else 2**22 if quick else 2**25  # elements of 2 bytes
    source = torch.ones(count, dtype=torch.bfloat16, device=device)
    target = torch.empty_like(source)
    one, other = (torch.randn(side, side, dtype=dtype, device=device) for _ in range(2))
    out = torch.empty_like(one)
    stages = {
        "copy": [lambda _: target.copy_(source)],
        "matmul": [lambda _: torch.mm(one, other, out=out)],
    }
    times, failed = time_interleaved(stages, device, rounds=10, warm_up=3, max_seconds=5.0)
    if failed:
        raise RuntimeError(f"the ceilings could not be measured: {failed}")
    copy, matmul = (quantiles([each["device"] for each in times[name]])["median"] for name in stages)
    return {
        "copy_bytes_per_second": 2 * 2 * count / copy,
        "matmul_flops": 2 * side**3 / matmul,
        "matmul_dtype": str(dtype).removeprefix("torch."),
    }


def print_ceiling(ceiling: dict[str, Any]) -> None:
    """The first lines of a report."""
    print(
        f"ceiling: copy {ceiling['copy_bytes_per_second'] / 1e9:.0f} GB/s (read + written), "
        f"matrix product {ceiling['matmul_flops'] / 1e12:.3g} TFLOP/s ({ceiling['matmul_dtype']})",
        flush=True,
    )


class _Operations(TorchDispatchMode):
    """Counts torch's operations that do something: no views, no allocations."""

    FREE = (
        "empty",
        "empty_like",
        "new_empty",
        "empty_strided",
        "new_empty_strided",
        "_unsafe_view",
        "detach",
    )

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        returns = func._schema.returns
        views = any(part.alias_info is not None and not part.alias_info.is_write for part in returns)
        if not views and func.overloadpacket.__name__ not in self.FREE:
            self.count += 1
        return func(*args, **(kwargs or {}))


def count_launches(run: Callable[[], Any], device: torch.device) -> int | None:
    """Launches of a run: on CUDA kernels, copies and fills that the profiler saw (None where it sees nothing).

    Elsewhere torch's operations, views and allocations left out, and interpreted Triton kernels; what torch.compile
    made of a run is not seen.
    """
    if device.type != "cuda":
        with _interpreted_launches() as interpreted, _Operations() as operations:
            run()
        return operations.count + interpreted[0]
    run()
    torch.cuda.synchronize(device)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run()
        torch.cuda.synchronize(device)
    on_device = [event for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    return len(on_device) or None


@contextmanager
def _interpreted_launches() -> Iterator[list[int]]:
    """Inside, [number of Triton kernels launched in the interpreter]."""
    count = [0]
    interpreter = sys.modules.get("triton.runtime.interpreter")
    if interpreter is None:
        yield count
        return
    executor = interpreter.GridExecutor
    interpret = executor.__call__

    def counted(self: Any, *args: Any, **kwargs: Any) -> None:
        count[0] += 1
        with _disable_current_modes():  # the interpreter's own use of torch
            interpret(self, *args, **kwargs)

    executor.__call__ = counted
    try:
        yield count
    finally:
        executor.__call__ = interpret
